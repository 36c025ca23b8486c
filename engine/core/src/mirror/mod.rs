//! The life of one mirrored volume: requests, both copies, dirty log, resync.
//!
//! Rooms: `api` (what goes in and out), `volume` (the machine), `start` (superblock, replay, G10), `record`
//! (superblock writes), `client` (requests), `peer` (the peer's operations on this disk), `lock` (range
//! locks), `flush` (own flushes, drain, return), `stall` (what does not end), `front` (a server without a disk and
//! its host), `copy` (resync source), `holes` (what it need not read), `target` (resync target), `unreadable` (blocks
//! that the source cannot read), `boundary` (named places between two steps, for crash tests).

pub mod api;
mod boundary;
mod client;
mod copy;
mod flush;
mod front;
mod holes;
mod lock;
mod peer;
mod record;
mod stall;
mod start;
mod target;
#[cfg(test)]
mod tests;
mod unreadable;
mod volume;

pub use boundary::RecordPurpose;
pub use volume::{Volume, VolumeConfig};
