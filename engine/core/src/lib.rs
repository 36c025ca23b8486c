//! The pure core of Duplex.
//!
//! No clock, no files, no sockets, no threads, no randomness: the shells feed inputs and carry out
//! actions. Two machines live here: [`mirror::Volume`], the life of one mirrored volume, and
//! [`pair::Server`], the life of a server in its pair. Both have the same shape: `handle(now, input)`,
//! `poll_action()`, `next_deadline()`.

pub mod boundary;
pub mod dirty_log;
pub mod event;
pub mod format;
pub mod ids;
pub mod limits;
pub mod message;
pub mod mirror;
pub mod pair;
pub mod request;
pub mod resync;
pub mod time;
