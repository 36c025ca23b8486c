//! The configuration: one file, the same on both servers, checked whole before anything starts.
//!
//! [`Config::load`] reads `duplex.toml` and reports *every* problem with file, line, column, key, value and
//! fix. [`environment::check`] then looks at this machine.  What a later version will have is refused as
//! `not-supported`, never ignored.

mod canonical;
mod cross;
pub mod environment;
mod host;
mod paths;
mod problem;
mod reader;
pub mod secret;
mod sections;
mod unsupported;
mod values;
mod volumes;

#[cfg(test)]
mod environment_tests;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::io::Read;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use duplex_core::ids::ServerName;
use duplex_core::mirror::api::Priority;

pub use paths::{DEFAULT_CONFIG, DEFAULT_RUN_DIR, DEFAULT_STATE_DIR, RunDir};
pub use problem::{Place, Problem, Problems, Severity};
pub use values::{NAME_MAX_BYTES, Network, parse_size};

/// Largest configuration file: far above 1024 volumes, far below what hurts.
const FILE_MAX_BYTES: u64 = 4 << 20;

/// Assumed worst difference of two servers' clock rates, in thousandths (rho of the safe relation).
pub const CLOCK_RATE_ERROR_PERMILLE: u64 = 50;
/// Granularity of timers in the safe relation.
pub const TIMER_GRANULARITY_MS: u64 = 10;

/// Which of the two servers, by name order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Side {
    /// The one whose name sorts first.
    First,
    /// The other.
    Second,
}

impl Side {
    /// The other one.
    pub const fn other(self) -> Self {
        match self {
            Self::First => Self::Second,
            Self::Second => Self::First,
        }
    }
}

/// A value for each server.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PerServer<T>(pub [T; 2]);

impl<T> PerServer<T> {
    /// The value of one server.
    pub const fn of(&self, side: Side) -> &T {
        match side {
            Side::First => &self.0[0],
            Side::Second => &self.0[1],
        }
    }
}

/// One server of the pair.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Server {
    /// Its name.
    pub name: ServerName,
    /// Its addresses on the mirror link; position is the path's number, equal on both servers.
    pub link: Vec<SocketAddr>,
}

/// Where a volume's metadata lies.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Metadata {
    /// On the backing, before the data.
    Internal,
    /// In a file or device of its own; the backing is data from its first byte.
    Path(PathBuf),
}

impl Metadata {
    /// The file or device of its own, where there is one.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::Internal => None,
            Self::Path(path) => Some(path),
        }
    }
}

/// How a volume appears besides NBD.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Frontend {
    /// The best the kernel has; NBD alone, with a warning, where there is none.
    Auto,
    /// FUSE file and loop device, or the start fails.
    Fuse,
    /// NBD alone.
    None,
}

/// Where a volume's NBD server listens.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Nbd {
    /// `RUN_DIR/NAME.nbd`.
    Unix,
    /// Plain NBD over TCP, while primary only.
    Tcp(SocketAddr),
}

/// One mirrored volume.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Volume {
    /// Its name; also the NBD export's.
    pub name: String,
    /// Block device, loop device or file.
    pub backing: PerServer<PathBuf>,
    /// Metadata.
    pub metadata: PerServer<Metadata>,
    /// Size to use at activation; `None` = the capacity rounded down to 4 MiB.
    pub size_bytes: Option<u64>,
    /// Granularity of the dirty map.
    pub block_bytes: u32,
    /// Sector size clients see: 512 or 4096.
    pub sector_bytes: u32,
    /// Besides NBD.
    pub frontend: Frontend,
    /// NBD.
    pub nbd: PerServer<Nbd>,
    /// Clients of a TCP listener; empty with a loopback address means loopback only.
    pub nbd_allow: Vec<Network>,
    /// Group of the Unix socket (mode 0660), by name or number; `None` = root.
    pub nbd_group: Option<String>,
}

/// Times and policy. There is no witness in this version.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Arbiter {
    /// Between two heartbeats.
    pub heartbeat: Duration,
    /// Lease: a primary not acknowledged this long stops completing requests.
    pub freeze: Duration,
    /// Silence after which the peer counts as lost; also the link timeout.
    pub silent: Duration,
    /// An operation unanswered this long counts as a failed copy.
    pub stall: Duration,
}

impl Arbiter {
    /// The policy in the operator's words, whatever is configured.
    pub const POLICY: &'static str = "manual (no LAN evidence in this version)";
    /// What the policy means; printed at start.
    pub const POLICY_MEANING: &'static str = "a secondary that loses the primary waits for `duplex promote \
        --peer-is-down`; promoting while only the link is cut makes two primaries";
}

/// Who may talk to whom.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Security {
    /// The shared secret's file.
    pub secret: PathBuf,
    /// Accepted besides, while the secret is being changed.
    pub secret_old: Option<PathBuf>,
    /// TLS 1.3 on the mirror link; off = authenticated plaintext.
    pub encryption: bool,
}

/// Resync settings.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Resync {
    /// Upper bound; 0 = none.
    pub max_bytes_per_s: u64,
    /// Weight against clients.
    pub priority: Priority,
}

/// A whole configuration, seen from one of its servers. Valid by construction.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Config {
    /// The file it came from.
    pub file: PathBuf,
    /// The pair's name.
    pub pair: String,
    /// Which server this is.
    pub me: Side,
    /// Both servers, in name order.
    pub servers: PerServer<Server>,
    /// The volumes, in name order: position = `VolumeIndex`.
    pub volumes: Vec<Volume>,
    /// Times.
    pub arbiter: Arbiter,
    /// Secrets and encryption.
    pub security: Security,
    /// Resync.
    pub resync: Resync,
    /// Events and saved blocks.
    pub state_dir: PerServer<PathBuf>,
    places: BTreeMap<String, reader::Seen>,
}

impl Config {
    /// Reads and checks a file. `server` is who this machine is; `None` takes the host name.
    ///
    /// # Errors
    /// All problems found, errors only.
    pub fn load(file: &Path, server: Option<&str>) -> Result<Self, Problems> {
        let text = read_bounded(file).map_err(|(code, what, fix)| {
            Problems(vec![Problem {
                severity: Severity::Error,
                file: file.to_owned(),
                place: Place::START,
                key: String::new(),
                value: None,
                code,
                text: what,
                fix: fix.to_owned(),
            }])
        })?;
        Self::parse(&text, file, server)
    }

    /// As [`Config::load`], from text.
    ///
    /// # Errors
    /// All problems found.
    pub fn parse(text: &str, file: &Path, server: Option<&str>) -> Result<Self, Problems> {
        sections::parse(text, file, server)
    }

    /// This server.
    pub const fn my_server(&self) -> &Server {
        self.servers.of(self.me)
    }

    /// The other server.
    pub const fn peer_server(&self) -> &Server {
        self.servers.of(self.me.other())
    }

    /// This server's state directory.
    pub const fn my_state_dir(&self) -> &PathBuf {
        self.state_dir.of(self.me)
    }

    /// The volume of that name.
    pub fn volume(&self, name: &str) -> Option<(duplex_core::ids::VolumeIndex, &Volume)> {
        let at = self.volumes.iter().position(|volume| volume.name == name)?;
        let index = u16::try_from(at).ok()?;
        Some((duplex_core::ids::VolumeIndex(index), &self.volumes[at]))
    }

    /// What both servers must have equal, by key, for the handshake.
    pub fn canonical(&self) -> BTreeMap<String, String> {
        canonical::canonical(self)
    }

    /// A problem of a key, at the key's place in the file (or its table's, where it has a default).
    pub fn problem(
        &self,
        severity: Severity,
        key: &str,
        code: &'static str,
        text: impl Into<String>,
        fix: impl Into<String>,
    ) -> Problem {
        let mut at = key;
        let mut seen = None;
        while seen.is_none() {
            seen = self.places.get(at);
            match at.rsplit_once('.') {
                Some((table, _)) => at = table,
                None => break,
            }
        }
        let exact = self.places.get(key).filter(|seen| !seen.value.is_empty());
        Problem {
            severity,
            file: self.file.clone(),
            place: seen.map_or(Place::START, |seen| seen.place),
            key: key.to_owned(),
            value: exact.map(|seen| seen.value.clone()),
            code,
            text: text.into(),
            fix: fix.into(),
        }
    }

    /// The key of a per-server setting as it is written: `KEY.SERVER` where it is a table, else `KEY`.
    pub fn key_of(&self, key: &str, side: Side) -> String {
        let own = format!("{key}.{}", self.servers.of(side).name);
        if self.places.contains_key(&own) { own } else { key.to_owned() }
    }
}

type ReadFault = (&'static str, String, &'static str);

fn read_bounded(file: &Path) -> Result<String, ReadFault> {
    const FIX: &str = "name the configuration with --config FILE";
    let failed = |error: std::io::Error| {
        let code = if error.kind() == std::io::ErrorKind::NotFound {
            "no-file"
        } else if error.kind() == std::io::ErrorKind::PermissionDenied {
            "no-permission"
        } else {
            "unreadable"
        };
        (code, format!("cannot read the configuration: {error}"), FIX)
    };
    let about = std::fs::metadata(file).map_err(failed)?;
    if !about.is_file() {
        return Err(("unreadable", "the configuration is not a regular file".to_owned(), FIX));
    }
    let mut bytes = Vec::new();
    let mut open = std::fs::File::open(file).map_err(failed)?.take(FILE_MAX_BYTES + 1);
    open.read_to_end(&mut bytes).map_err(failed)?;
    if u64::try_from(bytes.len()).unwrap_or(u64::MAX) > FILE_MAX_BYTES {
        return Err(("too-long", format!("the file is larger than {FILE_MAX_BYTES} bytes"), FIX));
    }
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        ("syntax", format!("byte {at} is not UTF-8"), "save the file as UTF-8")
    })
}
