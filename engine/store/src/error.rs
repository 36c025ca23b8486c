//! Why a backing cannot be used.

use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::io::Errno;

use crate::placement::PlacementError;
use crate::usage::Use;

/// Why a backing cannot be used. Every text names the path, the cause and what to do.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum StoreError {
    /// Nothing there.
    #[error("{}: no such file or device; check the path, or create the file with `truncate -s SIZE {}`", path.display(), path.display())]
    NotFound {
        /// As configured.
        path: PathBuf,
    },
    /// Neither a file nor a block device.
    #[error("{} is a {found}, not a block device or a regular file; name another path", path.display())]
    NotBacking {
        /// As configured.
        path: PathBuf,
        /// What it is.
        found: &'static str,
    },
    /// The caller may not open it.
    #[error("{}: permission denied ({errno}); run as root, or give the daemon's user access", path.display())]
    Permission {
        /// As configured.
        path: PathBuf,
        /// The kernel's answer.
        errno: Errno,
    },
    /// Somebody else uses it.
    #[error("{} is in use: {}{}", path.display(), describe_uses(by), describe_wait(*waited))]
    InUse {
        /// As configured.
        path: PathBuf,
        /// Who, as far as can be seen.
        by: Vec<Use>,
        /// How long it was tried.
        waited: Duration,
    },
    /// Read-only device, file or file system.
    #[error("{} is read-only; make it writable (blockdev --setrw, remount, or the file's mode) or name another", path.display())]
    ReadOnly {
        /// As configured.
        path: PathBuf,
    },
    /// The file system has no direct I/O.
    #[error("{}: its file system does not do direct I/O (O_DIRECT); put the file on ext4, XFS or btrfs, or use a block device", path.display())]
    NoDirectIo {
        /// As configured.
        path: PathBuf,
    },
    /// Not enough room.
    #[error("{} has {bytes} bytes, at least {needed_bytes} are needed; make it larger or the volume smaller", path.display())]
    TooSmall {
        /// As configured.
        path: PathBuf,
        /// What it has.
        bytes: u64,
        /// What it takes.
        needed_bytes: u64,
    },
    /// Sectors that we cannot serve.
    #[error("{} has sectors of {sector_bytes} bytes; only 512 and 4096 can be mirrored, name another device", path.display())]
    Sectors {
        /// As configured.
        path: PathBuf,
        /// What the device says.
        sector_bytes: u32,
    },
    /// The areas do not fit the backing.
    #[error("{}: {error}", path.display())]
    Placement {
        /// As configured.
        path: PathBuf,
        /// What is wrong.
        error: PlacementError,
    },
    /// The two paths are one.
    #[error("{} is named as data and as metadata; name a file of its own for the metadata", path.display())]
    SameFile {
        /// As configured.
        path: PathBuf,
    },
    /// Read or write beyond the area, or not on sector boundaries.
    #[error("{}: bytes {offset_bytes}+{length_bytes} are outside the area or not on its sector boundaries", path.display())]
    Range {
        /// As configured.
        path: PathBuf,
        /// First byte.
        offset_bytes: u64,
        /// How many.
        length_bytes: u64,
    },
    /// It was there already.
    #[error("{} exists already; remove it or name another file", path.display())]
    Exists {
        /// As configured.
        path: PathBuf,
    },
    /// A system call failed.
    #[error("{}: {step} failed: {errno}", path.display())]
    Io {
        /// As configured.
        path: PathBuf,
        /// Which step.
        step: &'static str,
        /// The kernel's answer.
        errno: Errno,
    },
}

impl StoreError {
    pub(crate) fn io(path: &Path, step: &'static str, errno: Errno) -> Self {
        Self::Io { path: path.to_owned(), step, errno }
    }
}

fn describe_uses(by: &[Use]) -> String {
    if by.is_empty() {
        return "by an open file that no process shows any more (a killed process's last operations may not be \
                answered yet, or the holder is in another container); try again, or look with `lsof` and `lsblk` on the host"
            .to_owned();
    }
    by.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

fn describe_wait(waited: Duration) -> String {
    if waited.is_zero() { String::new() } else { format!(" (tried for {:.1} s)", waited.as_secs_f64()) }
}
