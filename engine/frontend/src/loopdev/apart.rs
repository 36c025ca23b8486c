//! A short-lived process for the blocking work on a device that this very program serves.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use super::{
    DETACH_WAIT, DetachMode, DeviceUser, LOOP_MAJOR, LoopDevice, LoopError, LoopOptions, device_path,
    device_users,
};
use crate::fuse::FuseMount;

/// Longest answer of the child: an error's text.
const ANSWER_MAX_BYTES: u64 = 16 << 10;
/// How often a device that was let go is looked at. Another program (udev's probe) may have it open for a moment, and
/// nothing tells when it is free: the kernel's event for the last close comes before. At most `DETACH_WAIT` long, and not
/// on a volume's thread.
const GONE_LOOK: Duration = Duration::from_millis(5);
const DONE: u8 = 0;
const FAILED: u8 = 1;
const IN_USE: u8 = 2;

/// Opens the volume's file and sets a loop device up over it. Blocks until the volume's thread has answered: call it
/// from another one, while [`crate::fuse::FuseDevice`] runs and serves or refuses. The mount may be dropped afterwards.
///
/// # Errors
/// [`LoopError`]; those of the work itself are [`LoopError::Apart`].
pub fn set_up_device(mount: &FuseMount, options: &LoopOptions) -> Result<LoopDevice, LoopError> {
    let answer = apart("set up", Some(mount.descriptor()), || {
        let made = mount
            .open_file()
            .map_err(|error| error.to_string())
            .and_then(|file| LoopDevice::configure(&file, options).map_err(|error| error.to_string()));
        match made {
            Ok(device) => {
                let mut bytes = vec![DONE];
                bytes.extend_from_slice(&device.number.to_ne_bytes());
                bytes.extend_from_slice(&device.file_system.to_ne_bytes());
                bytes
            }
            Err(text) => failed_with(&text),
        }
    })?;
    if answer.first() == Some(&DONE) && answer.len() == 13 {
        let (mut number, mut file_system) = ([0; 4], [0; 8]);
        number.copy_from_slice(&answer[1..5]);
        file_system.copy_from_slice(&answer[5..]);
        let number = u32::from_ne_bytes(number);
        let file_system = u64::from_ne_bytes(file_system);
        return Ok(LoopDevice { number, path: device_path(number), file_system });
    }
    Err(error_of("set up", &answer))
}

impl LoopDevice {
    /// Takes the device away. What its cache still holds is written first, so the volume must serve (or refuse)
    /// meanwhile: call it from another thread than the volume's.
    ///
    /// # Errors
    /// [`LoopError::InUse`] with the users (`IfUnused`), [`LoopError::StillHeld`] when somebody opened it meanwhile:
    /// it then goes with the last of them; else [`LoopError::Apart`].
    pub fn detach(&self, mode: DetachMode) -> Result<(), LoopError> {
        let in_use = |users| LoopError::InUse { path: self.path.clone(), users };
        if mode == DetachMode::IfUnused {
            let users = device_users(&self.path, LOOP_MAJOR, self.number);
            if !users.is_empty() {
                return Err(in_use(users));
            }
        }
        let answer = apart("detach", None, || match self.clear(mode) {
            Ok(()) => vec![DONE],
            Err(LoopError::InUse { .. }) => vec![IN_USE],
            Err(error) => failed_with(&error.to_string()),
        })?;
        match answer.first() {
            Some(&DONE) if mode == DetachMode::IfUnused => self.wait_until_gone(),
            Some(&DONE) => Ok(()),
            Some(&IN_USE) => Err(in_use(vec![DeviceUser::Unknown])),
            Some(_) | None => Err(error_of("detach", &answer)),
        }
    }

    fn wait_until_gone(&self) -> Result<(), LoopError> {
        let began = Instant::now();
        while self.is_attached() {
            if began.elapsed() > DETACH_WAIT {
                let users = device_users(&self.path, LOOP_MAJOR, self.number);
                return Err(LoopError::StillHeld { path: self.path.clone(), users });
            }
            std::thread::sleep(GONE_LOOK);
        }
        Ok(())
    }
}

fn failed_with(text: &str) -> Vec<u8> {
    let mut bytes = vec![FAILED];
    bytes.extend_from_slice(text.as_bytes());
    bytes
}

fn error_of(what: &'static str, answer: &[u8]) -> LoopError {
    let reason = match answer.split_first() {
        Some((_, text)) if !text.is_empty() => String::from_utf8_lossy(text).into_owned(),
        Some(_) | None => "the process that did it ended without an answer".to_owned(),
    };
    LoopError::Apart { what, reason }
}

/// Does the work in a child of this process, which keeps only the standard descriptors and `keep`.
///
/// Why: who waits for its own process's answer cannot be killed. A killed daemon with such a thread would keep its
/// memory, its ring with it, the ring's reads, and by them `/dev/fuse`: the connection would not end, and the device
/// would hang where it must answer EIO. The child has none of these.
fn apart(
    what: &'static str,
    keep: Option<BorrowedFd<'_>>,
    work: impl FnOnce() -> Vec<u8>,
) -> Result<Vec<u8>, LoopError> {
    let failed = |source: io::Error| LoopError::Apart { what, reason: source.to_string() };
    let (reader, writer) =
        rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(|errno| failed(errno.into()))?;
    // SAFETY: the child runs with one thread. It uses the C library's memory (which is made sound across a fork) and
    // plain system calls, takes no lock of this program (no logging), and ends by `_exit`.
    let child = unsafe { libc::fork() };
    if child < 0 {
        return Err(failed(io::Error::last_os_error()));
    }
    if child == 0 {
        run_child(&writer, keep, work);
    }
    drop(writer);
    let mut answer = Vec::new();
    let read = File::from(reader).take(ANSWER_MAX_BYTES).read_to_end(&mut answer);
    // SAFETY: waits for the child just made; the status is not wanted. Interrupted: tried again.
    while unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) } < 0
        && io::Error::last_os_error().kind() == io::ErrorKind::Interrupted
    {}
    read.map_err(failed)?;
    Ok(answer)
}

fn run_child(writer: &OwnedFd, keep: Option<BorrowedFd<'_>>, work: impl FnOnce() -> Vec<u8>) -> ! {
    let mut kept = vec![writer.as_raw_fd()];
    kept.extend(keep.map(|descriptor| descriptor.as_raw_fd()));
    let answer = match leave_descriptors(&kept) {
        Ok(()) => catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| failed_with("it panicked")),
        Err(error) => failed_with(&error.to_string()),
    };
    let mut rest = &answer[..];
    while let Ok(written) = rustix::io::write(writer, rest) {
        rest = &rest[written..];
        if rest.is_empty() {
            break;
        }
    }
    // SAFETY: ends this process at once; nothing of the parent's is run or flushed twice.
    unsafe { libc::_exit(0) }
}

/// Closes every descriptor above the standard ones that is not kept.
fn leave_descriptors(kept: &[RawFd]) -> io::Result<()> {
    let mut open = Vec::new();
    for entry in std::fs::read_dir("/proc/self/fd")? {
        open.extend(entry?.file_name().to_str().and_then(|name| name.parse::<RawFd>().ok()));
    }
    for number in open.into_iter().filter(|number| *number > 2 && !kept.contains(number)) {
        if rustix::io::fcntl_getfd(
            // SAFETY: only asks whether the number is open; the listing's own descriptor is not any more.
            unsafe { BorrowedFd::borrow_raw(number) },
        )
        .is_ok()
        {
            // SAFETY: this process is a copy that runs `work` only: nobody in it uses this descriptor again.
            drop(unsafe { OwnedFd::from_raw_fd(number) });
        }
    }
    Ok(())
}
