//! The daemon of one server: the server machine of the core, the volumes' threads, the link, the control
//! socket, the devices.
//!
//! Rooms: `run` (start, the main loop, signals), `input` (what comes in becomes the core's input), `output`
//! (the core's actions are carried out), `attach` (disks that are replaced), `devices` (FUSE and loop devices of the volumes), `keeper` (what
//! outlives this process), `page` (the status
//! page), `identity` (boot id, incarnation, seeds).

mod attach;
mod devices;
mod identity;
mod input;
mod keeper;
mod output;
mod page;
mod run;

use std::path::PathBuf;

pub use run::{Prepared, prepare, run};

use crate::config::RunDir;

/// What the command line says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Options {
    /// The configuration file.
    pub config: PathBuf,
    /// Which server this is; `None` = the host name.
    pub server: Option<String>,
    /// Sockets and device links.
    pub run_dir: RunDir,
}
