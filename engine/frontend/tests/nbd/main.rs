//! The NBD server with a real ring, real sockets and real clients.
#![allow(clippy::unwrap_used, reason = "tests and their helpers: a panic with its place is the report")]

mod chaos;
mod client;
mod misbehave;
mod tools;
mod volume;
