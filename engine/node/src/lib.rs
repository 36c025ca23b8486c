//! Composition: one loop per volume, the control plane, the configuration.

pub mod clock;
pub mod config;
pub mod control;
pub mod crash_at;
pub mod daemon;
pub mod events;
pub mod failure;
pub mod holder;
pub mod offline;
pub mod systemd;
pub mod volume;
