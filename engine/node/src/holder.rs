//! The holder: keeps the devices' descriptors while the daemon restarts.

use crate::config::RunDir;
use crate::failure::Failure;

/// How the holder was started.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Options {
    /// Its socket is here.
    pub run_dir: RunDir,
}

/// Keeps descriptors until `down` or a signal.
///
/// # Errors
/// Why it could not start.
pub fn run(options: &Options) -> Result<(), Failure> {
    let socket = options.run_dir.holder();
    Err(Failure::failed(format!("{}: this build has no holder; build the daemon whole", socket.display())))
}
