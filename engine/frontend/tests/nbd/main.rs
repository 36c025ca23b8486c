//! The NBD server with a real ring, real sockets and real clients.
#![allow(clippy::unwrap_used)]

mod client;
mod misbehave;
mod tools;
mod volume;
