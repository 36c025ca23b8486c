//! The NBD server with a real ring, real sockets and real clients.
#![allow(clippy::unwrap_used)]

mod chaos;
mod client;
mod misbehave;
mod tools;
mod volume;
