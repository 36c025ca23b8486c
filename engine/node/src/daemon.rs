//! The daemon's start: configuration, this machine, then the pair.

use std::path::PathBuf;

use crate::config::environment::{self, Purpose};
use crate::config::{Config, Problems, RunDir, Severity};
use crate::failure::Failure;

/// How the daemon was started.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Options {
    /// The configuration file.
    pub config: PathBuf,
    /// Which server this is; `None` = the host name.
    pub server: Option<String>,
    /// Sockets and device links.
    pub run_dir: RunDir,
}

/// What a start may go on with.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Prepared {
    /// The configuration.
    pub config: Config,
    /// What is worth saying and keeps nothing from starting.
    pub warnings: Problems,
}

/// Reads the configuration and looks at this machine.
///
/// # Errors
/// Every problem that keeps the daemon from starting, warnings after them.
pub fn prepare(options: &Options) -> Result<Prepared, Failure> {
    let config = Config::load(&options.config, options.server.as_deref())?;
    let found = environment::check(&config, &options.run_dir, Purpose::Start);
    if found.has_errors() {
        return Err(found.into());
    }
    debug_assert!(found.0.iter().all(|problem| problem.severity == Severity::Warning));
    Ok(Prepared { config, warnings: found })
}

/// Runs this server until it is told to stop.
///
/// # Errors
/// Why it could not start, or why it ended in disorder.
pub fn run(options: &Options) -> Result<(), Failure> {
    let prepared = prepare(options)?;
    Err(Failure::failed(format!(
        "pair {}: this build has no volume loop; build the daemon whole",
        prepared.config.pair
    )))
}
