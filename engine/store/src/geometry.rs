//! Sizes of an open backing.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::Path;

use rustix::fs::{AtFlags, FileType, StatxFlags};
use rustix::io::Errno;

use crate::error::StoreError;

/// `BLKGETSIZE64`.
const BLKGETSIZE64: libc::c_ulong = 0x8008_1272;
/// `BLKROGET`.
const BLKROGET: libc::c_ulong = 0x125e;
/// `STATX_DIOALIGN`.
const STATX_DIOALIGN: u32 = 0x2000;
/// Alignment assumed where the file system does not say: every one in use does 4096.
const DIRECT_ALIGN_DEFAULT: u32 = 4096;

/// What an open backing is like.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Geometry {
    /// Whole size.
    pub backing_bytes: u64,
    /// Smallest unit of a read or write: the device's logical sector, the file system's direct-I/O unit.
    pub sector_bytes: u32,
    /// Smallest unit the device writes without reading first.
    pub physical_bytes: u32,
    /// A block device (partitions and loop devices too), not a file.
    pub is_device: bool,
}

impl Geometry {
    pub(crate) fn of(fd: BorrowedFd<'_>, path: &Path) -> Result<Self, StoreError> {
        let stat = rustix::fs::fstat(fd).map_err(|errno| StoreError::io(path, "fstat", errno))?;
        let is_device = FileType::from_raw_mode(stat.st_mode).is_block_device();
        let geometry = if is_device { Self::of_device(fd, path)? } else { Self::of_file(fd, path)? };
        if geometry.sector_bytes != 512 && geometry.sector_bytes != 4096 {
            return Err(StoreError::Sectors { path: path.to_owned(), sector_bytes: geometry.sector_bytes });
        }
        Ok(geometry)
    }

    fn of_device(fd: BorrowedFd<'_>, path: &Path) -> Result<Self, StoreError> {
        let io = |step| move |errno| StoreError::io(path, step, errno);
        Ok(Self {
            backing_bytes: device_bytes(fd).map_err(io("BLKGETSIZE64"))?,
            sector_bytes: rustix::fs::ioctl_blksszget(fd).map_err(io("BLKSSZGET"))?,
            physical_bytes: rustix::fs::ioctl_blkpbszget(fd).map_err(io("BLKPBSZGET"))?,
            is_device: true,
        })
    }

    fn of_file(fd: BorrowedFd<'_>, path: &Path) -> Result<Self, StoreError> {
        let flags = StatxFlags::BASIC_STATS | StatxFlags::from_bits_retain(STATX_DIOALIGN);
        let stat = rustix::fs::statx(fd, c"", AtFlags::EMPTY_PATH, flags)
            .map_err(|errno| StoreError::io(path, "statx", errno))?;
        let told = stat.stx_mask & STATX_DIOALIGN != 0;
        if told && stat.stx_dio_offset_align == 0 {
            return Err(StoreError::NoDirectIo { path: path.to_owned() });
        }
        let align = if told { stat.stx_dio_offset_align } else { DIRECT_ALIGN_DEFAULT };
        // Some file systems allow any offset; a disk sector is still the least we serve.
        let sector_bytes = align.max(512);
        Ok(Self {
            backing_bytes: stat.stx_size,
            sector_bytes,
            physical_bytes: sector_bytes.max(stat.stx_blksize.min(4096)),
            is_device: false,
        })
    }
}

fn device_bytes(fd: BorrowedFd<'_>) -> Result<u64, Errno> {
    let mut bytes = 0_u64;
    // SAFETY: BLKGETSIZE64 writes one u64 to the address; `bytes` is one.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), BLKGETSIZE64 as _, &raw mut bytes) };
    if result < 0 { Err(last_errno()) } else { Ok(bytes) }
}

/// True when the block device takes no writes.
pub(crate) fn is_read_only_device(fd: impl AsFd) -> Result<bool, Errno> {
    let mut flag: libc::c_int = 0;
    // SAFETY: BLKROGET writes one int to the address; `flag` is one.
    let result = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), BLKROGET as _, &raw mut flag) };
    if result < 0 { Err(last_errno()) } else { Ok(flag != 0) }
}

/// The calling thread's errno.
pub(crate) fn last_errno() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}
