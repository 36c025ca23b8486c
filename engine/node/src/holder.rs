//! The holder: keeps the devices' descriptors while the daemon restarts.

use duplex_frontend::holder::{HolderError, run_holder};

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
    run_holder(&options.run_dir.holder()).map_err(|error| match error {
        HolderError::AlreadyRuns { .. } => Failure::refused(error.to_string()),
        HolderError::System { .. }
        | HolderError::Refused { .. }
        | HolderError::Garbled { .. }
        | HolderError::Ended { .. } => Failure::failed(error.to_string()),
    })
}
