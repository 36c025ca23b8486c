//! The loop device over a volume's FUSE file: set up, found again after a restart, detached, and its link.
//!
//! Setting up and detaching do blocking I/O to a file that this very program serves: in a child process, because a
//! process that waits for itself cannot be killed. Call them from another thread than the volume's, while that runs.

mod apart;
mod link;
mod users;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

pub use apart::set_up_device;
pub use link::{LinkError, device_link, make_device_link, remove_device_link};
pub use users::{DeviceUser, device_users};

const PR_SET_IO_FLUSHER: libc::c_int = 57;
const LOOP_CLR_FD: libc::Ioctl = 0x4C01;
const LOOP_GET_STATUS64: libc::Ioctl = 0x4C05;
const LOOP_CONFIGURE: libc::Ioctl = 0x4C0A;
const LOOP_CTL_GET_FREE: libc::Ioctl = 0x4C82;
const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_DIRECT_IO: u32 = 16;
const LOOP_MAJOR: u32 = 7;
/// Name bytes the loop device remembers for us, without the closing zero.
const NAME_MAX_BYTES: usize = 63;
/// How often a free number may be lost to somebody else.
const ATTEMPTS_MAX: u32 = 64;
/// Largest request of the loop device: FUSE's, so that each becomes one FUSE request.
const REQUEST_MAX_KIB: u32 = 1024;
/// A detached device is really free when its last user closed it; a scanner of new devices may need this long.
const DETACH_WAIT: Duration = Duration::from_secs(5);

/// What `struct loop_info64` is to the kernel.
#[repr(C)]
#[derive(Clone, Copy)]
struct LoopInfo {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    sizelimit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

impl LoopInfo {
    const EMPTY: Self = Self {
        device: 0,
        inode: 0,
        rdevice: 0,
        offset: 0,
        sizelimit: 0,
        number: 0,
        encrypt_type: 0,
        encrypt_key_size: 0,
        flags: 0,
        file_name: [0; 64],
        crypt_name: [0; 64],
        encrypt_key: [0; 32],
        init: [0; 2],
    };
}

/// What `struct loop_config` is to the kernel.
#[repr(C)]
struct LoopConfig {
    descriptor: u32,
    block_bytes: u32,
    info: LoopInfo,
    reserved: [u64; 8],
}

/// Why a loop device could not be used.
#[derive(Debug, thiserror::Error)]
pub enum LoopError {
    /// A device or control file could not be opened.
    #[error("cannot open {}: {source}; load the module (modprobe loop) and run as root, or use NBD only", path.display())]
    Open {
        /// Which.
        path: PathBuf,
        /// As the kernel gave it.
        source: io::Error,
    },
    /// A device control call failed.
    #[error("{call} on {} failed: {source}; Linux 5.8 or newer and CAP_SYS_ADMIN are needed", path.display())]
    Control {
        /// The call.
        call: &'static str,
        /// On what.
        path: PathBuf,
        /// As the kernel gave it.
        source: io::Error,
    },
    /// Others were faster each time.
    #[error("no free loop device after {ATTEMPTS_MAX} tries: others take each one first; try again")]
    Contended,
    /// Without direct I/O data would lie in two caches, and a power cut would tell.
    #[error("{} does not use direct I/O on the volume's file; the kernel is too old for a loop device over FUSE: use NBD", path.display())]
    NotDirect {
        /// The device.
        path: PathBuf,
    },
    /// It is in use.
    #[error("{} is in use: {}", path.display(), list(users))]
    InUse {
        /// The device.
        path: PathBuf,
        /// By whom.
        users: Vec<DeviceUser>,
    },
    /// The work in the child process failed.
    #[error("cannot {what} the loop device: {reason}")]
    Apart {
        /// What was to be done.
        what: &'static str,
        /// Why not, and what to do.
        reason: String,
    },
    /// It was detached but does not become free.
    #[error("{} was detached but is still held by somebody: {}; it goes when they let go", path.display(), list(users))]
    StillHeld {
        /// The device.
        path: PathBuf,
        /// By whom, as far as can be seen.
        users: Vec<DeviceUser>,
    },
}

fn list(users: &[DeviceUser]) -> String {
    if users.is_empty() {
        return "by somebody this process cannot see".to_owned();
    }
    users.iter().map(DeviceUser::to_string).collect::<Vec<_>>().join("; ")
}

/// What a volume's loop device shall be.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LoopOptions {
    /// The volume's name; the device carries it, so that it is found again after a restart.
    pub volume: String,
    /// 512 or 4096.
    pub sector_bytes: u32,
    /// Refuse writes.
    pub read_only: bool,
}

/// A loop device over a volume's file. Dropping it changes nothing: the device stays until [`detach`](Self::detach).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LoopDevice {
    number: u32,
    path: PathBuf,
    /// Number of the file system the file lies on: the FUSE connection's.
    file_system: u64,
}

/// What to do about users at [`LoopDevice::detach`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DetachMode {
    /// Refuse.
    IfUnused,
    /// Detach as soon as the last one closes it. Until then their requests still come.
    WhenClosed,
}

impl LoopDevice {
    /// Sets a free loop device up over the volume's file, with direct I/O.
    fn configure(file: &File, options: &LoopOptions) -> Result<Self, LoopError> {
        let control_path = Path::new("/dev/loop-control");
        let control = open_device(control_path)?;
        for _ in 0..ATTEMPTS_MAX {
            let number = control_call(control.as_fd(), control_path, "LOOP_CTL_GET_FREE", LOOP_CTL_GET_FREE)?;
            let path = device_path(number);
            let device = match open_or_make(&path, number) {
                Ok(device) => device,
                // Somebody removed the number meanwhile.
                Err(LoopError::Open { source, .. }) if source.raw_os_error() == Some(libc::ENXIO) => continue,
                Err(error) => return Err(error),
            };
            match set_up(device.as_fd(), file, options) {
                Ok(()) => return Self::configured(number, path, device.as_fd()),
                Err(source) if source.raw_os_error() == Some(libc::EBUSY) => {}
                Err(source) => return Err(LoopError::Control { call: "LOOP_CONFIGURE", path, source }),
            }
        }
        Err(LoopError::Contended)
    }

    fn configured(number: u32, path: PathBuf, device: BorrowedFd<'_>) -> Result<Self, LoopError> {
        let finish = || {
            let info = status(device).map_err(|source| LoopError::Control {
                call: "LOOP_GET_STATUS64",
                path: path.clone(),
                source,
            })?;
            if info.flags & LO_FLAGS_DIRECT_IO == 0 {
                return Err(LoopError::NotDirect { path: path.clone() });
            }
            Ok(info.device)
        };
        match finish() {
            Ok(file_system) => {
                let this = Self { number, path, file_system };
                this.tune();
                Ok(this)
            }
            Err(error) => {
                // The device is of no use: give it back. A failure here leaves it to the operator, whom `error` tells.
                let _ = control_call(device, &path, "LOOP_CLR_FD", LOOP_CLR_FD);
                Err(error)
            }
        }
    }

    /// Every volume's loop device of this machine that carries the volume's name, the one of `file_system` (when
    /// known) only. After a restart there is one; a device whose connection died answers every request with EIO and should be detached.
    pub fn find(volume: &str, file_system: Option<u64>) -> Vec<Self> {
        let mut found = Vec::new();
        let Ok(devices) = std::fs::read_dir("/sys/block") else { return found };
        for entry in devices.flatten() {
            let name = entry.file_name();
            let Some(number) = name.to_str().and_then(|name| name.strip_prefix("loop")?.parse().ok()) else {
                continue;
            };
            if !entry.path().join("loop/backing_file").exists() {
                continue;
            }
            let path = device_path(number);
            let Ok(device) = open_device(&path) else { continue };
            let Ok(info) = status(device.as_fd()) else { continue };
            let same = file_system.is_none_or(|file_system| file_system == info.device);
            if same && info.file_name == tag_of(volume) {
                found.push(Self { number, path, file_system: info.device });
            }
        }
        found.sort_by_key(|device| device.number);
        found
    }

    /// The device's path, `/dev/loopN`. Users should be shown the link instead.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// N of `/dev/loopN`.
    pub const fn number(&self) -> u32 {
        self.number
    }

    /// Number of the FUSE file system that the device's file lies on. The same after a takeover, another one after
    /// a new mount.
    pub const fn file_system(&self) -> u64 {
        self.file_system
    }

    /// Who uses the device, as far as this process can see. Empty means: nobody.
    ///
    /// # Errors
    /// The device cannot be opened.
    pub fn users(&self) -> Result<Vec<DeviceUser>, LoopError> {
        let mut users = device_users(&self.path, LOOP_MAJOR, self.number);
        if users.is_empty() && self.open_exclusively()?.is_none() {
            users.push(DeviceUser::Unknown);
        }
        Ok(users)
    }

    fn open_exclusively(&self) -> Result<Option<File>, LoopError> {
        let opened =
            OpenOptions::new().read(true).custom_flags(libc::O_EXCL | libc::O_CLOEXEC).open(&self.path);
        match opened {
            Ok(device) => Ok(Some(device)),
            Err(source) if source.raw_os_error() == Some(libc::EBUSY) => Ok(None),
            Err(source) => Err(LoopError::Open { path: self.path.clone(), source }),
        }
    }

    /// The blocking part of a detach.
    fn clear(&self, mode: DetachMode) -> Result<(), LoopError> {
        let device = match mode {
            DetachMode::IfUnused => self.open_exclusively()?.ok_or_else(|| LoopError::InUse {
                path: self.path.clone(),
                users: vec![DeviceUser::Unknown],
            })?,
            DetachMode::WhenClosed => open_device(&self.path)?,
        };
        if self.is_still_ours(device.as_fd()) {
            control_call(device.as_fd(), &self.path, "LOOP_CLR_FD", LOOP_CLR_FD)?;
        }
        Ok(())
    }

    /// True while the number still is this volume's device.
    pub fn is_attached(&self) -> bool {
        open_device(&self.path).is_ok_and(|device| self.is_still_ours(device.as_fd()))
    }

    fn is_still_ours(&self, device: BorrowedFd<'_>) -> bool {
        status(device).is_ok_and(|info| info.device == self.file_system)
    }

    /// One loop request becomes one FUSE request. A refusal costs speed only.
    fn tune(&self) {
        let setting = format!("/sys/block/loop{}/queue/max_sectors_kb", self.number);
        // Not logged: this runs in the child process.
        let _ = std::fs::write(setting, REQUEST_MAX_KIB.to_string());
    }
}

fn device_path(number: u32) -> PathBuf {
    PathBuf::from(format!("/dev/loop{number}"))
}

fn open_device(path: &Path) -> Result<File, LoopError> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_CLOEXEC)
        .open(path)
        .map_err(|source| LoopError::Open { path: path.to_owned(), source })
}

/// Opens `/dev/loopN`, and makes it first where nobody (udev, devtmpfs) does.
fn open_or_make(path: &Path, number: u32) -> Result<File, LoopError> {
    if let Err(error) = std::fs::symlink_metadata(path)
        && error.kind() == io::ErrorKind::NotFound
    {
        let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
        let device = rustix::fs::makedev(LOOP_MAJOR, number);
        let made =
            rustix::fs::mknodat(rustix::fs::CWD, path, rustix::fs::FileType::BlockDevice, mode, device);
        match made {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(errno) => return Err(LoopError::Open { path: path.to_owned(), source: errno.into() }),
        }
    }
    let device = open_device(path)?;
    let right = device.metadata().is_ok_and(|metadata| {
        metadata.file_type().is_block_device() && metadata.rdev() == rustix::fs::makedev(LOOP_MAJOR, number)
    });
    if right {
        Ok(device)
    } else {
        let source = io::Error::other(format!("it is not block device {LOOP_MAJOR}:{number}"));
        Err(LoopError::Open { path: path.to_owned(), source })
    }
}

fn control_call(
    descriptor: BorrowedFd<'_>,
    path: &Path,
    call: &'static str,
    request: libc::Ioctl,
) -> Result<u32, LoopError> {
    // SAFETY: both requests used here take no pointer.
    let result = unsafe { libc::ioctl(descriptor.as_raw_fd(), request, 0) };
    u32::try_from(result).map_err(|_| LoopError::Control {
        call,
        path: path.to_owned(),
        source: io::Error::last_os_error(),
    })
}

fn set_up(device: BorrowedFd<'_>, file: &File, options: &LoopOptions) -> io::Result<()> {
    let mut info =
        LoopInfo { file_name: tag_of(&options.volume), flags: LO_FLAGS_DIRECT_IO, ..LoopInfo::EMPTY };
    if options.read_only {
        info.flags |= LO_FLAGS_READ_ONLY;
    }
    let config = LoopConfig {
        descriptor: file.as_raw_fd() as u32,
        block_bytes: options.sector_bytes,
        info,
        reserved: [0; 8],
    };
    // SAFETY: the structure has the kernel's layout and lives through the call; the kernel only reads it.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &raw const config) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn status(device: BorrowedFd<'_>) -> io::Result<LoopInfo> {
    let mut info = LoopInfo::EMPTY;
    // SAFETY: the structure has the kernel's layout and lives through the call.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_GET_STATUS64, &raw mut info) };
    if result == 0 { Ok(info) } else { Err(io::Error::last_os_error()) }
}

/// What the device remembers: `duplex:NAME`, cut to what fits (names longer than that share a prefix; the file
/// system's number then tells them apart).
fn tag_of(volume: &str) -> [u8; 64] {
    let mut tag = [0; 64];
    let text = format!("duplex:{volume}");
    let used = text.len().min(NAME_MAX_BYTES);
    tag[..used].copy_from_slice(&text.as_bytes()[..used]);
    tag
}

/// Tells the kernel that the calling thread (and those it starts later) writes for others: it must not wait for
/// write-back that only it could do. Call it first in the daemon's main thread.
///
/// # Errors
/// Without CAP_SYS_RESOURCE, or before Linux 5.6: a warning is due, nothing more.
pub fn set_io_flusher() -> io::Result<()> {
    // SAFETY: this prctl takes numbers only.
    let result = unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// True where the kernel has what the FUSE frontend needs: `/dev/fuse` and loop devices.
pub fn is_available() -> bool {
    Path::new("/dev/fuse").exists() && Path::new("/dev/loop-control").exists()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_have_the_kernel_s_sizes() {
        assert_eq!(size_of::<LoopInfo>(), 232);
        assert_eq!(size_of::<LoopConfig>(), 304);
        assert_eq!(std::mem::offset_of!(LoopInfo, file_name), 56);
    }

    #[test]
    fn a_tag_is_bounded_and_closed() {
        let tag = tag_of(&"v".repeat(200));
        assert!(tag.starts_with(b"duplex:vvv"));
        assert_eq!(tag[63], 0);
        assert_ne!(tag_of("a"), tag_of("b"));
    }

    #[test]
    fn an_error_names_the_users() {
        let error = LoopError::InUse {
            path: PathBuf::from("/dev/loop3"),
            users: vec![DeviceUser::Mounted { at: PathBuf::from("/srv") }],
        };
        assert_eq!(error.to_string(), "/dev/loop3 is in use: mounted at /srv");
    }
}
