//! Names of everything under the run directory.

use std::path::{Path, PathBuf};

/// Where the configuration is looked for.
pub const DEFAULT_CONFIG: &str = "/etc/duplex/duplex.toml";
/// Where sockets and device links are, of the one daemon of a machine.
pub const DEFAULT_RUN_DIR: &str = "/run/duplex";
/// Where events and saved blocks are.
pub const DEFAULT_STATE_DIR: &str = "/var/lib/duplex";

/// A daemon's run directory. Two daemons on one machine have one each.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RunDir(PathBuf);

impl Default for RunDir {
    fn default() -> Self {
        Self(PathBuf::from(DEFAULT_RUN_DIR))
    }
}

impl RunDir {
    /// A run directory, absolute: the device links in it are told to others. `//` and `/./` are collapsed so that
    /// the default is recognised.
    pub fn new(path: &Path) -> Self {
        Self(std::path::absolute(path).unwrap_or_else(|_| path.to_owned()).components().collect())
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The control socket.
    pub fn control(&self) -> PathBuf {
        self.0.join("control")
    }

    /// The holder's socket.
    pub fn holder(&self) -> PathBuf {
        self.0.join("holder")
    }

    /// A volume's NBD socket.
    pub fn nbd(&self, volume: &str) -> PathBuf {
        self.0.join(format!("{volume}.nbd"))
    }

    /// Where device links are: `/dev/duplex`, or `RUN_DIR/dev` with a run directory of one's own.
    pub fn device_dir(&self) -> PathBuf {
        if self.0 == Path::new(DEFAULT_RUN_DIR) { PathBuf::from("/dev/duplex") } else { self.0.join("dev") }
    }

    /// A volume's device link.
    pub fn device(&self, volume: &str) -> PathBuf {
        self.device_dir().join(volume)
    }
}
