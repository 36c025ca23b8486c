//! The whole thing on one machine, in namespaces.

use std::path::PathBuf;

use crate::failure::Failure;

/// How the demo was started.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Options {
    /// Leave the pair running and say what to type next.
    pub keep: bool,
    /// Where the disks' files go; `None` = a directory of its own under the system's temporary one.
    pub dir: Option<PathBuf>,
    /// Size of each disk.
    pub size_bytes: u64,
    /// One JSON object a step instead of words.
    pub json: bool,
}

/// Runs it.
///
/// # Errors
/// A step did not hold.
pub fn run(options: &Options) -> Result<(), Failure> {
    Err(Failure::failed(format!(
        "the demo of two {}-byte disks needs the whole daemon, which this build has not",
        options.size_bytes
    )))
}
