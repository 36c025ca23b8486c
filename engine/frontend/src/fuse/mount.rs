//! Makes the detached FUSE file system of one volume.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::retry_on_intr;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_flag, fsconfig_set_string,
    fsmount, fsopen,
};

use super::protocol::{self, Agreed, HEADER_BYTES, InitError, Operation, PAYLOAD_MAX_BYTES};

/// The kernel sends INIT the moment the file system is made; longer than this is a broken kernel.
const INIT_WAIT: Duration = Duration::from_secs(10);

/// Why a volume has no FUSE file.
#[derive(Debug, thiserror::Error)]
pub enum FuseError {
    /// No `/dev/fuse`.
    #[error(
        "cannot open /dev/fuse: {source}; load the module (modprobe fuse) and run as root, or use NBD only"
    )]
    Device {
        /// As the kernel gave it.
        source: io::Error,
    },
    /// A step of making the file system.
    #[error(
        "cannot make the FUSE file system of volume {volume}: {step}: {source}; this needs CAP_SYS_ADMIN and Linux 5.2 or newer"
    )]
    Mount {
        /// Which volume.
        volume: String,
        /// The call.
        step: &'static str,
        /// As the kernel gave it.
        source: io::Error,
    },
    /// The kernel's offer is not enough.
    #[error("volume {volume}: {source}")]
    Init {
        /// Which volume.
        volume: String,
        /// What is missing.
        source: InitError,
    },
    /// Something else than INIT came first, or nothing.
    #[error(
        "volume {volume}: the kernel did not begin with FUSE INIT ({what}); another process has the descriptor?"
    )]
    NoInit {
        /// Which volume.
        volume: String,
        /// What happened.
        what: String,
    },
    /// The file could not be opened.
    #[error("cannot open the FUSE file of volume {volume} through {}: {source}; /proc must be mounted in the daemon's namespace", path.display())]
    Open {
        /// Which volume.
        volume: String,
        /// Through which path.
        path: PathBuf,
        /// As the kernel gave it.
        source: io::Error,
    },
}

/// An initialised `/dev/fuse` descriptor: what the holder keeps and [`super::FuseDevice`] serves.
#[derive(Debug)]
pub struct Connection {
    descriptor: OwnedFd,
    resend: bool,
}

impl Connection {
    /// A descriptor that an earlier process initialised, from the holder or systemd. Its predecessor's pending
    /// requests are sent again when it is served.
    ///
    /// # Errors
    /// The descriptor's flags cannot be set.
    pub fn resumed(descriptor: OwnedFd) -> io::Result<Self> {
        set_nonblocking(descriptor.as_fd())?;
        Ok(Self { descriptor, resend: true })
    }

    /// A second descriptor of the same connection, for the holder.
    ///
    /// # Errors
    /// No descriptors left.
    pub fn duplicate(&self) -> io::Result<OwnedFd> {
        self.descriptor.try_clone()
    }

    /// True where pending requests of a predecessor must be asked for.
    pub const fn is_resumed(&self) -> bool {
        self.resend
    }

    /// True while the file system exists.
    pub fn is_alive(&self) -> bool {
        connection_is_alive(self.descriptor.as_fd())
    }

    /// Number of the file system, as [`crate::loopdev::LoopDevice::file_system`] has it. `None` where the kernel does not
    /// tell (before Linux 6.10).
    pub fn file_system(&self) -> Option<u64> {
        let path = format!("/proc/self/fdinfo/{}", self.descriptor.as_raw_fd());
        file_system_in(&std::fs::read_to_string(path).ok()?)
    }

    pub(super) fn into_descriptor(self) -> OwnedFd {
        self.descriptor
    }
}

/// `fuse_connection: N`, where N is the kernel's device number; the loop device's status has the one of user space.
fn file_system_in(information: &str) -> Option<u64> {
    let line = information.lines().find_map(|line| line.strip_prefix("fuse_connection:"))?;
    let kernel: u64 = line.trim().parse().ok()?;
    let (major, minor) = (kernel >> 20, kernel & 0xf_ffff);
    Some((minor & 0xff) | (major << 8) | ((minor & !0xff) << 12))
}

/// True while the file system behind a `/dev/fuse` descriptor exists: its loop device still has it open, and nobody
/// aborted it. A descriptor that is not worth keeping answers false.
pub fn connection_is_alive(descriptor: BorrowedFd<'_>) -> bool {
    let mut polled = [PollFd::from_borrowed_fd(descriptor, PollFlags::empty())];
    match poll(&mut polled, Some(&rustix::time::Timespec::default())) {
        Ok(_) => !polled[0].revents().intersects(PollFlags::ERR | PollFlags::HUP | PollFlags::NVAL),
        Err(_) => false,
    }
}

/// A read of the ring that finds nothing then waits by poll; without, it would take a thread of the kernel's pool.
fn set_nonblocking(descriptor: BorrowedFd<'_>) -> io::Result<()> {
    let flags = fcntl_getfl(descriptor)?;
    fcntl_setfl(descriptor, flags | OFlags::NONBLOCK)?;
    Ok(())
}

/// The detached mount of one volume. It lives as long as this value or a file opened through it: once the loop
/// device has the file, this may be dropped, and when the loop device lets go, the file system is gone.
#[derive(Debug)]
pub struct FuseMount {
    volume: String,
    mount: OwnedFd,
    agreed: Agreed,
}

impl FuseMount {
    /// Makes the file system and does INIT. Blocks shortly; not for the volume's thread.
    ///
    /// # Errors
    /// [`FuseError`], with what to do about it.
    pub fn create(volume: &str) -> Result<(Self, Connection), FuseError> {
        let device = rustix::fs::open("/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, rustix::fs::Mode::empty())
            .map_err(|errno| FuseError::Device { source: errno.into() })?;
        let mount = make_mount(volume, device.as_fd())?;
        let agreed = initialise(volume, device.as_fd())?;
        set_nonblocking(device.as_fd()).map_err(|source| FuseError::Device { source })?;
        let this = Self { volume: volume.to_owned(), mount, agreed };
        Ok((this, Connection { descriptor: device, resend: false }))
    }

    /// True where a successor can have this process's pending requests (Linux 6.9).
    pub const fn can_resend(&self) -> bool {
        self.agreed.resend
    }

    pub(crate) fn descriptor(&self) -> BorrowedFd<'_> {
        self.mount.as_fd()
    }

    /// Opens the volume's file. Waits for the volume's thread to answer: call it from another one (better from another
    /// process: see [`crate::loopdev::set_up_device`]), while [`super::FuseDevice`] runs.
    ///
    /// # Errors
    /// [`FuseError::Open`].
    pub fn open_file(&self) -> Result<File, FuseError> {
        let path = PathBuf::from(format!("/proc/self/fd/{}", self.mount.as_raw_fd()));
        match File::options().read(true).write(true).open(&path) {
            Ok(file) => Ok(file),
            Err(source) => Err(FuseError::Open { volume: self.volume.clone(), path, source }),
        }
    }
}

fn make_mount(volume: &str, device: BorrowedFd<'_>) -> Result<OwnedFd, FuseError> {
    let failed = |step: &'static str| {
        move |errno: rustix::io::Errno| FuseError::Mount {
            volume: volume.to_owned(),
            step,
            source: errno.into(),
        }
    };
    let context = fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC).map_err(failed("fsopen"))?;
    let set = |key: &'static str, value: &str| {
        fsconfig_set_string(context.as_fd(), key, value).map_err(failed("fsconfig"))
    };
    set("source", "duplex")?;
    set("fd", &device.as_raw_fd().to_string())?;
    set("rootmode", "100600")?;
    set("user_id", "0")?;
    set("group_id", "0")?;
    for flag in ["default_permissions", "allow_other"] {
        fsconfig_set_flag(context.as_fd(), flag).map_err(failed("fsconfig"))?;
    }
    fsconfig_create(context.as_fd()).map_err(failed("fsconfig create"))?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
    fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes).map_err(failed("fsmount"))
}

fn initialise(volume: &str, device: BorrowedFd<'_>) -> Result<Agreed, FuseError> {
    let no_init = |what: String| FuseError::NoInit { volume: volume.to_owned(), what };
    let mut polled = [PollFd::new(&device, PollFlags::IN)];
    let wait = rustix::time::Timespec { tv_sec: INIT_WAIT.as_secs() as i64, tv_nsec: 0 };
    let ready = retry_on_intr(|| poll(&mut polled, Some(&wait)))
        .map_err(|errno| no_init(format!("poll: {errno}")))?;
    if ready == 0 {
        return Err(no_init(format!("nothing for {} s", INIT_WAIT.as_secs())));
    }
    let mut header = [0; HEADER_BYTES];
    let mut rest = vec![0; PAYLOAD_MAX_BYTES as usize];
    let mut vectors = [IoSliceMut::new(&mut header), IoSliceMut::new(&mut rest)];
    let received_bytes = retry_on_intr(|| rustix::io::readv(device, &mut vectors))
        .map_err(|errno| no_init(format!("read: {errno}")))?;
    let message = protocol::parse(&header, received_bytes).map_err(|error| no_init(error.to_string()))?;
    let Operation::Init(offer) = message.operation else {
        return Err(no_init(format!("{:?}", message.operation)));
    };
    let (reply, agreed) = protocol::negotiate(message.unique, &offer)
        .map_err(|source| FuseError::Init { volume: volume.to_owned(), source })?;
    retry_on_intr(|| rustix::io::writev(device, &[IoSlice::new(reply.as_bytes())]))
        .map_err(|errno| no_init(format!("answer: {errno}")))?;
    Ok(agreed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_system_s_number_is_read_as_user_space_has_it() {
        assert_eq!(file_system_in("pos:\t0\nfuse_connection:\t56\n"), Some(56));
        assert_eq!(file_system_in("fuse_connection:\t300\n"), Some(0x10_002c));
        assert_eq!(file_system_in("pos:\t0\n"), None);
    }
}
