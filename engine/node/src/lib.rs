//! Composition: one loop per volume, the control plane, the configuration.

pub mod config;
pub mod control;
pub mod events;
