//! File systems on a server's mirrored device, mounted in the server's own mount namespace: a server that dies takes
//! its mounts along, and nobody else sees them.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::{Server, loopdev, wait};

/// How long a file system's tool may take.
const LIMIT: Duration = Duration::from_secs(90);

/// Which file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileSystem {
    /// ext4.
    Ext4,
    /// XFS; it wants 300 MiB.
    Xfs,
}

impl FileSystem {
    /// Makes one on the server's device.
    pub fn make(self, server: &Server) -> Result<()> {
        let device = device_of(server)?.display().to_string();
        match self {
            // Without discards: they would put every extent into use.
            FileSystem::Ext4 => on(server, &["mkfs.ext4", "-q", "-E", "nodiscard", &device]),
            FileSystem::Xfs => on(server, &["mkfs.xfs", "-q", "-f", "-K", &device]),
        }
        .map(drop)
    }

    /// Mounts it, which replays its journal.
    pub fn mount(self, server: &Server, point: &Path) -> Result<()> {
        std::fs::create_dir_all(point)?;
        let kind = match self {
            FileSystem::Ext4 => "ext4",
            FileSystem::Xfs => "xfs",
        };
        let device = device_of(server)?;
        on(server, &["mount", "-t", kind, &device.display().to_string(), &point.display().to_string()])
            .map(drop)
    }

    /// Unmounts it.
    pub fn unmount(self, server: &Server, point: &Path) -> Result<()> {
        on(server, &["umount", &point.display().to_string()])?;
        loopdev::wait_released(&device_of(server)?, LIMIT).map(drop)
    }

    /// The checker of an unmounted file system, which changes nothing and must find nothing.
    pub fn check(self, server: &Server) -> Result<()> {
        let device = device_of(server)?.display().to_string();
        match self {
            FileSystem::Ext4 => on(server, &["e2fsck", "-fn", &device]),
            FileSystem::Xfs => on(server, &["xfs_repair", "-n", &device]),
        }
        .context("the file system is not clean")
        .map(drop)
    }

    /// After a crash: mounts it for its journal, unmounts it, checks it.
    pub fn check_after_crash(self, server: &Server, point: &Path) -> Result<()> {
        self.mount(server, point).context("the journal is not replayed")?;
        self.unmount(server, point)?;
        self.check(server)
    }
}

/// The volume's loop device on a primary: soon after the role it is there.
pub fn device_of(server: &Server) -> Result<PathBuf> {
    let status = server.wait_status("a device", |status| status["volumes"][0]["device"].is_string())?;
    let link = status["volumes"][0]["device"].as_str().context("no device")?;
    std::fs::canonicalize(link).with_context(|| link.to_owned())
}

/// Waits until nothing of a dead server uses its device any more: its mounts go after its processes.
pub fn wait_gone(device: &Path) -> Result<()> {
    wait::until(&format!("the dead server's {} to be let go", device.display()), LIMIT, || {
        match loopdev::wait_released(device, Duration::ZERO) {
            Ok(_) => Ok(Some(())),
            // Detached already.
            Err(_) if !loopdev::is_attached(device) => Ok(Some(())),
            Err(_) => Ok(None),
        }
    })
}

/// Runs a program on the server that must succeed; gives what it said.
pub fn on(server: &Server, words: &[&str]) -> Result<String> {
    let words: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
    let output = server.host()?.run(&words, LIMIT)?;
    if output.success() { Ok(output.stdout) } else { bail!("{}: {}", words.join(" "), output.text()) }
}
