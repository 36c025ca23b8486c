//! The life of one mirrored volume.

pub mod api;
