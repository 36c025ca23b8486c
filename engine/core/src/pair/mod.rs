//! The life of a server in its pair: sessions, roles, epochs, going alone and coming back.
//!
//! Rooms: `api` (what goes in and out), `server` (the machine), `session` (hello, agreement, what follows
//! from `decide`), `solo` (freezing and going alone, G4, G7), `rejoin` (the end of a resync, G6), `roles`
//! (promote, demote, hand-over, G9), `drain` (before a role is given up), `operator` (commands), `full_copy` and `vouch`
//! (what comes before a copy), `stop` (orderly end), `remedy` (what mends a refusal), `steps` (records on all volumes before anything follows
//! from them), `heartbeat` (lease and silence), `boundary` (named places between two steps, for crash tests).

pub mod api;
mod boundary;
mod drain;
mod explain;
mod full_copy;
mod heartbeat;
mod operator;
mod rejoin;
mod remedy;
mod roles;
mod server;
mod session;
mod solo;
mod split;
mod steps;
mod stop;
#[cfg(test)]
mod tests;
mod vouch;

pub use explain::{Direction, Explained};
pub use server::{Server, SessionView, VolumeView};
