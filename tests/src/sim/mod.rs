//! The deterministic simulator: the shipped machines, formats and frames of two servers in one thread of
//! virtual time. Every fault, delay and request follows from one seed.
//!
//! Rooms: `world` (time and events), `glue` (the shell around the machines), `host` (machines, processes),
//! `disk`, `link`, `wire`, `client`, `script` (faults and the operator), `oracle` (what reads may return),
//! `check` (both copies, marks, economy), `finish` (a whole run), `trap`
//! and `sweep` (a crash at a chosen boundary, and at all of them), `cover`, `mutant`, `trace`.

pub mod check;
pub mod client;
pub mod cover;
pub mod create;
pub mod disk;
pub mod finish;
pub mod glue;
pub mod host;
pub mod link;
pub mod mutant;
pub mod oracle;
pub mod page;
pub mod profile;
pub mod rng;
pub mod script;
pub mod sweep;
pub mod trace;
pub mod trap;
pub mod wire;
pub mod world;

#[cfg(test)]
mod tests;
