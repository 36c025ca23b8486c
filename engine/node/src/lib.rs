//! Composition: one loop per volume, the control plane, the configuration.

pub mod config;
