//! This machine against the configuration. Looks, changes nothing.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use duplex_core::limits;
use duplex_store::{Access, Backing, BackingConfig, StoreError, usage};

use super::{Config, Frontend, Metadata, Nbd, Problem, Problems, RunDir, Severity, Volume, secret, volumes};

/// What the look is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Purpose {
    /// `duplex check`: also tries claims and ports, where no daemon runs.
    Check,
    /// The daemon's start: claims and ports are its own to take, with patience.
    Start,
}

/// Everything that is wrong here, errors first. Warnings do not keep the daemon from starting.
pub fn check(config: &Config, run_dir: &RunDir, purpose: Purpose) -> Problems {
    let mut look = Look { config, run_dir, found: Vec::new(), alone: false };
    let running = UnixStream::connect(run_dir.control()).is_ok();
    look.alone = purpose == Purpose::Check && !running;
    look.secrets();
    look.addresses();
    look.kernel();
    look.state_dir();
    look.volumes();
    look.run_dir(running);
    let mut problems = Problems(look.found);
    problems.sort();
    problems
}

struct Look<'a> {
    config: &'a Config,
    run_dir: &'a RunDir,
    found: Vec<Problem>,
    /// No daemon runs and none is starting: claims and ports can be tried.
    alone: bool,
}

impl Look<'_> {
    fn error(&mut self, key: &str, code: &'static str, text: impl Into<String>, fix: impl Into<String>) {
        self.found.push(self.config.problem(Severity::Error, key, code, text, fix));
    }

    fn warning(&mut self, key: &str, code: &'static str, text: impl Into<String>, fix: impl Into<String>) {
        self.found.push(self.config.problem(Severity::Warning, key, code, text, fix));
    }

    fn secrets(&mut self) {
        let security = &self.config.security;
        let old = security.secret_old.iter().map(|path| ("security.secret_old", path));
        for (key, path) in std::iter::once(("security.secret", &security.secret)).chain(old) {
            if let Err(error) = secret::read(path) {
                let text = error.to_string();
                let (what, fix) = split_fix(&text);
                self.error(key, error.code(), what, fix);
            }
        }
        if !security.encryption {
            self.warning(
                "security.encryption",
                "not-encrypted",
                "the mirror link is authenticated but not encrypted; frames carry a CRC, no signature",
                "keep \"off\" for a direct cable only; take the line out for TLS 1.3",
            );
        }
    }

    fn addresses(&mut self) {
        let name = &self.config.my_server().name;
        for (path, address) in self.config.my_server().link.iter().enumerate() {
            self.address(&format!("servers.{name}.link[{path}]"), *address);
        }
        for volume in &self.config.volumes {
            if let Nbd::Tcp(address) = volume.nbd.of(self.config.me) {
                let key = self.config.key_of(&format!("volumes.{}.nbd", volume.name), self.config.me);
                self.address(&key, *address);
            }
        }
    }

    fn address(&mut self, key: &str, address: SocketAddr) {
        match bind_once(SocketAddr::new(address.ip(), 0)).map_err(|error| error.kind()) {
            Err(ErrorKind::AddrNotAvailable) => {
                let ip = address.ip();
                self.error(
                    key,
                    "no-address",
                    format!("{ip} is not an address of this machine"),
                    format!("`ip address add {ip}/{} dev ADAPTER`, or name the address it has", prefix(ip)),
                );
            }
            Err(kind) => {
                let text = format!("{address} cannot be used: {kind}");
                self.error(key, "no-address", text, "name an address of this machine");
            }
            Ok(_) if self.alone => {
                if let Err(error) = bind_once(address) {
                    let text = format!("{address} cannot be listened on: {error}");
                    self.error(
                        key,
                        "port-in-use",
                        text,
                        "stop who uses the port (`ss -ltnp`), or name another",
                    );
                }
            }
            Ok(_) => {}
        }
    }

    fn kernel(&mut self) {
        if let Err(error) = duplex_ring::Ring::new(8) {
            let text = format!("io_uring cannot be used: {error}");
            self.error("", "no-io-uring", text, "`sysctl kernel.io_uring_disabled=0`, kernel 6.1 or newer");
        }
        let wants = |kind| self.config.volumes.iter().find(|volume| volume.frontend == kind);
        let (must, may) = (wants(Frontend::Fuse), wants(Frontend::Auto));
        let Some(volume) = must.or(may) else { return };
        for (device, module) in [("/dev/fuse", "fuse"), ("/dev/loop-control", "loop")] {
            let opened = fs::OpenOptions::new().read(true).write(true).open(device);
            let Err(error) = opened else { continue };
            let key = format!("volumes.{}.frontend", volume.name);
            let fix = format!("`modprobe {module}`, run as root, or write frontend = \"none\"");
            if must.is_some() {
                self.error(&key, "no-frontend", format!("{device} cannot be opened: {error}"), fix);
            } else {
                let text = format!("{device} cannot be opened: {error}; volumes are there by NBD only");
                self.warning(&key, "no-frontend", text, fix);
            }
        }
    }

    fn state_dir(&mut self) {
        let key = self.config.key_of("state_dir", self.config.me);
        let dir = self.config.my_state_dir().clone();
        let existing = first_existing(&dir);
        if !existing.is_dir() {
            let text = format!("{} is not a directory", existing.display());
            self.error(&key, "state-dir", text, "name a directory");
        } else if let Err(errno) = rustix::fs::access(&existing, rustix::fs::Access::WRITE_OK) {
            let text = format!("{} cannot be written: {errno}", existing.display());
            self.error(&key, "state-dir", text, "run as root, or name a directory that can be written");
        }
        for volume in &self.config.volumes {
            let device = self.run_dir.device(&volume.name);
            if device.exists() && usage::lies_on(&existing, &device) {
                let text = format!("{} lies on the mirrored volume {}", dir.display(), volume.name);
                self.warning(&key, "state-on-volume", text, "put it on a disk that is not mirrored");
            }
        }
    }

    fn volumes(&mut self) {
        let mut devices: BTreeMap<(bool, u64, u64), String> = BTreeMap::new();
        for volume in &self.config.volumes {
            for (what, path) in volumes::places(volume, self.config.me) {
                let full = format!("volumes.{}.{what}", volume.name);
                let key = self.config.key_of(&full, self.config.me);
                if let Some(identity) = identity(&path)
                    && let Some(other) = devices.insert(identity, full)
                {
                    let text = format!("{} is the same device or file as {other}", path.display());
                    self.error(&key, "duplicate", text, "give every volume a backing of its own");
                }
                self.users(&key, &path);
                let missing_metadata = what == "metadata" && !path.exists();
                if missing_metadata {
                    let text = format!("{} does not exist yet", path.display());
                    let fix = format!("`duplex create {}` makes it", volume.name);
                    self.warning(&key, "no-metadata", text, fix);
                }
            }
            self.backing(volume);
            self.group(volume);
            self.socket(volume);
        }
    }

    fn users(&mut self, key: &str, path: &Path) {
        for user in usage::find_lasting(path) {
            let text = user.to_string();
            let (what, fix) = split_fix(&text);
            let code = match user {
                usage::Use::Mounted { .. } => "mounted",
                usage::Use::Swap { .. } => "swap",
                usage::Use::Holder { .. } => "held",
                usage::Use::Loop { .. } => "held",
                usage::Use::Fstab { .. } => "in-fstab",
                usage::Use::Process { .. } => continue,
            };
            self.error(key, code, what, fix);
        }
    }

    fn backing(&mut self, volume: &Volume) {
        let path = volume.backing.of(self.config.me);
        let key = self.config.key_of(&format!("volumes.{}.backing", volume.name), self.config.me);
        let access = if self.alone { Access::ReadClaimed } else { Access::ReadShared };
        let what = BackingConfig { data: path.clone(), metadata: None, wait: Duration::ZERO };
        let backing = match Backing::open(&what, access) {
            Ok(backing) => backing,
            // Its users are named already, each with its own fix.
            Err(StoreError::InUse { .. }) if !usage::find_lasting(path).is_empty() => return,
            Err(error) => {
                let text = error.to_string();
                let (what, fix) = split_fix(&text);
                self.error(&key, "backing", what, fix);
                return;
            }
        };
        let geometry = backing.geometry();
        let internal = match volume.metadata.of(self.config.me) {
            Metadata::Internal => true,
            Metadata::Path(_) => false,
        };
        let room = crate::volume::place::capacity_bytes(geometry.backing_bytes, volume.block_bytes, internal);
        let needed = volume.size_bytes.unwrap_or(limits::SIZE_ALIGN_BYTES);
        if room < needed {
            let text = format!(
                "{} has {} bytes: with the metadata that is room for {room} bytes of data, and {needed} are needed",
                path.display(),
                geometry.backing_bytes
            );
            self.error(&key, "too-small", text, "make it larger, or the volume's size smaller");
        }
        if geometry.sector_bytes > volume.sector_bytes {
            let text = format!(
                "{} has sectors of {} bytes, the volume {}",
                path.display(),
                geometry.sector_bytes,
                volume.sector_bytes
            );
            let fix = "take sector_bytes out of the volume: 4096 fits every disk";
            self.error(&key, "sector-bytes", text, fix);
        }
    }

    fn group(&mut self, volume: &Volume) {
        let Some(group) = &volume.nbd_group else { return };
        if group_id(group).is_none() {
            let volume_key = format!("volumes.{}.nbd_group", volume.name);
            let key = if self.config.places.contains_key(&volume_key) {
                volume_key
            } else {
                "nbd_group".to_owned()
            };
            let text = format!("there is no group \"{group}\"");
            self.error(&key, "no-group", text, format!("`groupadd {group}`, or name a group that exists"));
        }
    }

    fn socket(&mut self, volume: &Volume) {
        let socket = self.run_dir.nbd(&volume.name);
        let key = format!("volumes.{}", volume.name);
        let bytes = socket.as_os_str().len();
        if bytes > 107 {
            let text = format!("{} has {bytes} bytes; a socket's path has at most 107", socket.display());
            self.error(&key, "too-long", text, "use a shorter --run-dir or volume name");
        }
        if self.alone {
            self.leftover(&key, &socket);
        }
    }

    fn leftover(&mut self, key: &str, socket: &Path) {
        let is_socket = fs::symlink_metadata(socket).is_ok_and(|about| about.file_type().is_socket());
        if !is_socket {
            return;
        }
        if UnixStream::connect(socket).is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused) {
            let text = format!("{} is left of a daemon that was killed", socket.display());
            self.warning(key, "stale-socket", text, "nothing to do: the next start replaces it");
        }
    }

    fn run_dir(&mut self, running: bool) {
        let dir = self.run_dir.path();
        let existing = first_existing(dir);
        if rustix::fs::access(&existing, rustix::fs::Access::WRITE_OK).is_err() {
            let text = format!("the run directory {} cannot be made or written", dir.display());
            self.error("", "run-dir", text, "run as root, or name another with --run-dir");
        }
        if !running {
            let control = self.run_dir.control();
            self.leftover("", &control);
        }
    }
}

/// Binds and lets go. A bound socket that never listens is seen by nobody, and two of them do not disturb
/// each other.
fn bind_once(address: SocketAddr) -> std::io::Result<()> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, socket_with, sockopt};
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    bind(&socket, &address)?;
    Ok(())
}

const fn prefix(ip: IpAddr) -> u8 {
    if ip.is_ipv4() { 24 } else { 64 }
}

/// "What is wrong; what to do" in two; what has no second half is its own fix.
fn split_fix(text: &str) -> (String, String) {
    let at = text.rfind("; ").or_else(|| text.rfind(": "));
    match at {
        Some(at) => (text[..at].to_owned(), text[at + 2..].to_owned()),
        None => (text.to_owned(), "see the text".to_owned()),
    }
}

/// The path, or the nearest directory above it that is there.
fn first_existing(path: &Path) -> PathBuf {
    path.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/")).to_owned()
}

/// What a path stands for, whatever its name: a device's number, or a file's place.
fn identity(path: &Path) -> Option<(bool, u64, u64)> {
    let about = fs::metadata(path).ok()?;
    if about.file_type().is_block_device() {
        Some((true, about.rdev(), 0))
    } else {
        Some((false, about.dev(), about.ino()))
    }
}

/// The number of a group, by number or by name.
pub fn group_id(group: &str) -> Option<u32> {
    if let Ok(number) = group.parse() {
        return Some(number);
    }
    let name = std::ffi::CString::new(group).ok()?;
    let mut buffer = vec![0; 64 << 10];
    // SAFETY: a zeroed `group` is a valid value: its pointers are null and its number 0.
    let mut entry: libc::group = unsafe { std::mem::zeroed() };
    let mut found = std::ptr::null_mut();
    // SAFETY: all pointers are to live locals, the length is the buffer's, and only `found` and a plain
    // number are looked at afterwards.
    let result =
        unsafe { libc::getgrnam_r(name.as_ptr(), &mut entry, buffer.as_mut_ptr(), buffer.len(), &mut found) };
    (result == 0 && !found.is_null()).then_some(entry.gr_gid)
}
