//! Opening and claiming a backing.

use std::fs::OpenOptions;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FallocateFlags, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;

use crate::error::StoreError;
use crate::geometry::{Geometry, is_read_only_device, last_errno};
use crate::usage::{self, Use};

/// How long a claim is tried when nothing else is said: a killed predecessor's last operations need a while (see the crate's text).
pub const WAIT_DEFAULT: Duration = Duration::from_secs(30);

const RETRY_FIRST: Duration = Duration::from_millis(5);
const RETRY_LAST: Duration = Duration::from_millis(250);

/// What to open.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BackingConfig {
    /// Block device, loop device or regular file with the data.
    pub data: PathBuf,
    /// File or device with the metadata, when it is not on the data backing.
    pub metadata: Option<PathBuf>,
    /// How long to try while somebody who may go away has it; zero = once.
    pub wait: Duration,
}

/// How to open.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// Read and write, nobody else may have claimed it. What the daemon and `create` use.
    Exclusive,
    /// Read only; refused while somebody has claimed it (`compare`, `dump` of a stopped copy).
    ReadClaimed,
    /// Read only, whoever else has it: what is read may change meanwhile.
    ReadShared,
}

/// One claimed file or device.
#[derive(Debug)]
pub(crate) struct Part {
    pub(crate) path: PathBuf,
    fd: OwnedFd,
    pub(crate) geometry: Geometry,
}

impl Part {
    pub(crate) fn raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A claimed backing; dropping it gives up the claim.
#[derive(Debug)]
pub struct Backing {
    data: Part,
    metadata: Option<Part>,
    access: Access,
}

impl Backing {
    /// Opens for direct I/O and claims. Sleeps between tries for at most `config.wait` per file.
    pub fn open(config: &BackingConfig, access: Access) -> Result<Self, StoreError> {
        let data = open_part(&config.data, access, config.wait)?;
        let metadata = match &config.metadata {
            None => None,
            Some(path) => {
                if same_file(&config.data, path) {
                    return Err(StoreError::SameFile { path: path.clone() });
                }
                Some(open_part(path, access, config.wait)?)
            }
        };
        Ok(Self { data, metadata, access })
    }

    /// The data backing's sizes. With internal metadata both share it.
    pub const fn geometry(&self) -> Geometry {
        self.data.geometry
    }

    /// The sizes of the metadata file, when there is one.
    pub fn metadata_geometry(&self) -> Option<Geometry> {
        self.metadata.as_ref().map(|part| part.geometry)
    }

    /// Asks the kernel for the data backing's size again (it may have been grown or cut meanwhile).
    pub fn current_bytes(&self) -> Result<u64, StoreError> {
        Geometry::of(self.data.fd(), &self.data.path).map(|geometry| geometry.backing_bytes)
    }

    /// Refuses a data backing with less than `needed_bytes`.
    pub fn require_bytes(&self, needed_bytes: u64) -> Result<(), StoreError> {
        let bytes = self.data.geometry.backing_bytes;
        if bytes >= needed_bytes {
            return Ok(());
        }
        Err(StoreError::TooSmall { path: self.data.path.clone(), bytes, needed_bytes })
    }

    /// How it was opened.
    pub const fn access(&self) -> Access {
        self.access
    }

    /// The data path as configured.
    pub fn path(&self) -> &Path {
        &self.data.path
    }

    pub(crate) const fn data(&self) -> &Part {
        &self.data
    }

    /// Where metadata goes: its own file, or the data backing.
    pub(crate) fn metadata(&self) -> &Part {
        self.metadata.as_ref().unwrap_or(&self.data)
    }

    pub(crate) const fn has_external_metadata(&self) -> bool {
        self.metadata.is_some()
    }
}

/// Makes the metadata file of a volume: new, allocated, all zeroes, stable (its directory entry too).
pub fn create_metadata_file(path: &Path, bytes: u64) -> Result<(), StoreError> {
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(|error| {
        match Errno::from_io_error(&error).unwrap_or(Errno::IO) {
            Errno::EXIST => StoreError::Exists { path: path.to_owned() },
            Errno::NOENT => StoreError::NotFound { path: path.to_owned() },
            errno @ (Errno::ACCESS | Errno::PERM) => StoreError::Permission { path: path.to_owned(), errno },
            Errno::ROFS => StoreError::ReadOnly { path: path.to_owned() },
            errno => StoreError::io(path, "create", errno),
        }
    })?;
    let allocated = match rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, bytes) {
        Err(Errno::OPNOTSUPP) => rustix::fs::ftruncate(&file, bytes),
        other => other,
    };
    let made = allocated
        .map_err(|errno| StoreError::io(path, "allocation", errno))
        .and_then(|()| rustix::fs::fsync(&file).map_err(|errno| StoreError::io(path, "fsync", errno)))
        .and_then(|()| sync_directory(path));
    if made.is_err() {
        // Best effort: what failed is reported, a half-made file helps nobody.
        let _ = std::fs::remove_file(path);
    }
    made
}

fn sync_directory(path: &Path) -> Result<(), StoreError> {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        Some(_) | None => Path::new("."),
    };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open(directory, flags, Mode::empty())
        .and_then(rustix::fs::fsync)
        .map_err(|errno| StoreError::io(directory, "fsync of the directory", errno))
}

fn same_file(one: &Path, other: &Path) -> bool {
    match (rustix::fs::stat(one), rustix::fs::stat(other)) {
        (Ok(one), Ok(other)) => {
            let both_devices = [one, other].iter().all(|stat| file_type(stat).is_block_device());
            (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino)
                || (both_devices && one.st_rdev == other.st_rdev)
        }
        (Err(_), _) | (_, Err(_)) => false,
    }
}

fn file_type(stat: &Stat) -> FileType {
    FileType::from_raw_mode(stat.st_mode)
}

/// Why one try did not claim.
enum Refused {
    /// EBUSY or a lock: somebody has it.
    Busy,
    /// For ever.
    Error(StoreError),
}

fn open_part(path: &Path, access: Access, wait: Duration) -> Result<Part, StoreError> {
    let start = Instant::now();
    let mut pause = RETRY_FIRST;
    loop {
        match try_open(path, access) {
            Ok(part) => return Ok(part),
            Err(Refused::Error(error)) => return Err(error),
            Err(Refused::Busy) => {}
        }
        let waited = start.elapsed();
        // Mounts, swap and holders do not go away by waiting; a line in fstab holds nothing.
        let mut stays = usage::find_lasting(path);
        stays.retain(|one| !matches!(one, Use::Fstab { .. }));
        if !stays.is_empty() {
            return Err(StoreError::InUse { path: path.to_owned(), by: stays, waited: Duration::ZERO });
        }
        if waited >= wait {
            let by = usage::find_processes(path);
            let waited = if wait.is_zero() { Duration::ZERO } else { waited };
            return Err(StoreError::InUse { path: path.to_owned(), by, waited });
        }
        thread::sleep(pause.min(wait - waited));
        pause = (pause * 2).min(RETRY_LAST);
    }
}

fn try_open(path: &Path, access: Access) -> Result<Part, Refused> {
    let fail = |error| Refused::Error(error);
    let stat = rustix::fs::stat(path).map_err(|errno| fail(open_error(path, errno, false)))?;
    let found = file_type(&stat);
    let is_device = found.is_block_device();
    if !is_device && !found.is_file() {
        return Err(fail(StoreError::NotBacking { path: path.to_owned(), found: type_name(found) }));
    }
    let claims = access != Access::ReadShared;
    let writes = access == Access::Exclusive;
    if writes {
        let uses: Vec<Use> = usage::find_lasting(path);
        if !uses.is_empty() {
            let error = StoreError::InUse { path: path.to_owned(), by: uses, waited: Duration::ZERO };
            return Err(fail(error));
        }
    }
    let mut flags = OFlags::DIRECT | OFlags::CLOEXEC | OFlags::NOCTTY;
    flags |= if writes { OFlags::RDWR } else { OFlags::RDONLY };
    if is_device && claims {
        flags |= OFlags::EXCL;
    }
    let fd = match rustix::fs::open(path, flags, Mode::empty()) {
        Ok(fd) => fd,
        Err(Errno::BUSY | Errno::AGAIN) => return Err(Refused::Busy),
        Err(errno) => return Err(fail(open_error(path, errno, is_device))),
    };
    if writes
        && is_device
        && is_read_only_device(&fd).map_err(|e| fail(StoreError::io(path, "BLKROGET", e)))?
    {
        return Err(fail(StoreError::ReadOnly { path: path.to_owned() }));
    }
    if claims {
        let kind = if writes { libc::F_WRLCK } else { libc::F_RDLCK };
        match lock(fd.as_fd(), kind) {
            Ok(()) => {}
            Err(Errno::AGAIN | Errno::ACCESS) => return Err(Refused::Busy),
            Err(errno) => return Err(fail(StoreError::io(path, "lock (F_OFD_SETLK)", errno))),
        }
    }
    let geometry = Geometry::of(fd.as_fd(), path).map_err(fail)?;
    Ok(Part { path: path.to_owned(), fd, geometry })
}

fn open_error(path: &Path, errno: Errno, is_device: bool) -> StoreError {
    let path = path.to_owned();
    match errno {
        Errno::NOENT | Errno::NOTDIR => StoreError::NotFound { path },
        Errno::ROFS => StoreError::ReadOnly { path },
        Errno::ACCESS | Errno::PERM if is_device && rustix::process::geteuid().is_root() => {
            StoreError::ReadOnly { path }
        }
        Errno::ACCESS | Errno::PERM => StoreError::Permission { path, errno },
        Errno::INVAL if !is_device => StoreError::NoDirectIo { path },
        errno => StoreError::Io { path, step: "open", errno },
    }
}

const fn type_name(file_type: FileType) -> &'static str {
    match file_type {
        FileType::RegularFile => "regular file",
        FileType::Directory => "directory",
        FileType::Symlink => "symbolic link",
        FileType::Fifo => "pipe",
        FileType::Socket => "socket",
        FileType::CharacterDevice => "character device",
        FileType::BlockDevice => "block device",
        FileType::Unknown => "file of unknown type",
    }
}

/// A lock on the whole open file: it ends with the open file, not with the process.
fn lock(fd: BorrowedFd<'_>, kind: libc::c_int) -> Result<(), Errno> {
    // SAFETY: flock is plain numbers; all zero is "from the start to the end, whatever that becomes".
    let mut request: libc::flock = unsafe { std::mem::zeroed() };
    request.l_type = kind as libc::c_short;
    request.l_whence = libc::SEEK_SET as libc::c_short;
    // SAFETY: F_OFD_SETLK reads one flock, and l_pid is 0 as it demands.
    let result = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_OFD_SETLK, &raw const request) };
    if result < 0 { Err(last_errno()) } else { Ok(()) }
}
