//! The life of one mirrored volume: requests, both copies, dirty log, resync.

pub mod api;
