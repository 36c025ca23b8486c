//! Loop devices, always with direct I/O: no page cache between the program under test and the disk that may lose power.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::{system, wait};

const LOOP_CTL_GET_FREE: libc::c_ulong = 0x4C82;
const LOOP_CLR_FD: libc::c_ulong = 0x4C01;
const LOOP_CONFIGURE: libc::c_ulong = 0x4C0A;
const LO_FLAGS_AUTOCLEAR: u32 = 4;
const LO_FLAGS_DIRECT_IO: u32 = 16;

/// The kernel's `struct loop_info64`.
#[repr(C)]
struct LoopInfo {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// The kernel's `struct loop_config`.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_bytes: u32,
    info: LoopInfo,
    reserved: [u64; 8],
}

/// A loop device that detaches itself when the last user closes it; this value is one of the users.
#[derive(Debug)]
pub struct LoopDevice {
    path: PathBuf,
    device: Option<File>,
}

impl LoopDevice {
    /// Over a regular file.
    pub fn over_file(path: &Path, sector_bytes: u32) -> Result<LoopDevice> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_DIRECT)
            .open(path)
            .with_context(|| format!("{} cannot be opened", path.display()))?;
        LoopDevice::over(file.into(), sector_bytes)
    }

    /// Over an open file of any kind; the name shown by the kernel is the file's.
    pub fn over(file: OwnedFd, sector_bytes: u32) -> Result<LoopDevice> {
        let control = OpenOptions::new().read(true).write(true).open("/dev/loop-control")?;
        // Loop numbers belong to the whole machine: another process may take the free one first.
        wait::until("a free loop device", Duration::from_secs(20), || {
            // SAFETY: LOOP_CTL_GET_FREE takes no argument and returns a number.
            let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) };
            if number < 0 {
                bail!("LOOP_CTL_GET_FREE: {}", std::io::Error::last_os_error());
            }
            let path = PathBuf::from(format!("/dev/loop{number}"));
            let device = match OpenOptions::new().read(true).write(true).open(&path) {
                Ok(device) => device,
                Err(error) if error.raw_os_error() == Some(libc::ENXIO) => return Ok(None),
                Err(error) => {
                    return Err(error).with_context(|| format!("{} cannot be opened", path.display()));
                }
            };
            match configure(&device, &file, sector_bytes) {
                Ok(()) => Ok(Some(LoopDevice { path, device: Some(device) })),
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => Ok(None),
                Err(error) => Err(error).context("LOOP_CONFIGURE"),
            }
        })
        .and_then(LoopDevice::verified)
    }

    fn verified(self) -> Result<LoopDevice> {
        let name = self.path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let direct = std::fs::read_to_string(format!("/sys/block/{name}/loop/dio"))?;
        if direct.trim() != "1" {
            bail!("{} does not use direct I/O; its page cache would hide a power cut", self.path.display());
        }
        Ok(self)
    }

    /// `/dev/loopN`.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Waits until nobody holds the device exclusively any more (a killed process' io_uring holds it until its last
    /// operation has ended), and gives how long that took.
    pub fn wait_released(&self, limit: Duration) -> Result<Duration> {
        wait_released(&self.path, limit)
    }
}

/// The same for any loop device.
pub fn wait_released(path: &Path, limit: Duration) -> Result<Duration> {
    let start = std::time::Instant::now();
    wait::until(&format!("{} to be released", path.display()), limit, || {
        let open = OpenOptions::new().read(true).write(true).custom_flags(libc::O_EXCL).open(path);
        match open {
            Ok(_) => Ok(Some(())),
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => Ok(None),
            Err(error) => Err(error).with_context(|| format!("{} cannot be opened", path.display())),
        }
    })?;
    Ok(start.elapsed())
}

/// Whether the loop device has a file.
pub fn is_attached(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default();
    Path::new("/sys/block").join(name).join("loop/backing_file").exists()
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        if let Some(device) = self.device.take() {
            clear(&device);
        }
    }
}

fn clear(device: &File) {
    // SAFETY: LOOP_CLR_FD takes no argument.
    unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CLR_FD) };
}

fn configure(device: &File, file: &OwnedFd, sector_bytes: u32) -> std::io::Result<()> {
    // SAFETY: LoopConfig is plain integers; all zero is a valid value.
    let mut config: LoopConfig = unsafe { std::mem::zeroed() };
    config.fd = u32::try_from(file.as_raw_fd()).expect("an open descriptor is not negative");
    config.block_bytes = sector_bytes;
    config.info.flags = LO_FLAGS_DIRECT_IO | LO_FLAGS_AUTOCLEAR;
    // SAFETY: the argument is a loop_config that lives over the call.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &raw const config) };
    if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}

/// Detaches every loop device whose backing file is below `directory`.
pub fn detach_below(directory: &Path) {
    let Ok(entries) = std::fs::read_dir("/sys/block") else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let backing = std::fs::read_to_string(entry.path().join("loop/backing_file")).unwrap_or_default();
        if !backing.is_empty()
            && Path::new(backing.trim()).starts_with(directory)
            && let Ok(device) = File::open(Path::new("/dev").join(name))
        {
            clear(&device);
        }
    }
}

/// Detaches the loop devices that the links in this directory name and whose daemon is dead. The number of one may be
/// another's by now: only a device whose every read fails, as its file system is dead, goes. One that somebody still has
/// open goes with its last user.
pub fn detach_dead(links: &Path) {
    for link in std::fs::read_dir(links).into_iter().flatten().flatten() {
        let Ok(device) = std::fs::read_link(link.path()) else { continue };
        let device = device.display().to_string();
        let input = format!("if={device}");
        let read = ["dd", &input, "of=/dev/null", "iflag=direct", "bs=4096", "count=1"];
        let said = system::try_run(&read, Duration::from_secs(2));
        if said.is_ok_and(|said| !said.success && said.stderr.contains("Input/output error")) {
            let _ = system::try_run(&["losetup", "-d", &device], Duration::from_secs(2));
        }
    }
}
