//! What the link is told at start.

use std::net::SocketAddr;
use std::time::Duration;

use duplex_core::ids::{BootId, Incarnation, ServerName};

use crate::frame::FRAME_MAX_BYTES;
use crate::secret::Secrets;

/// A connection or session that lived so long was a good one: the next pause is short again.
pub(crate) const GOOD_AFTER: Duration = Duration::from_secs(1);

/// Is the link encrypted? Both servers must say the same.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Encryption {
    /// TLS 1.3; the proof of the secret is bound to it.
    Tls,
    /// Only the proof at the start of each connection: for a direct cable. An attacker on the cable can read
    /// and alter what follows.
    Off,
}

impl Encryption {
    /// The word of the configuration.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Tls => "tls",
            Self::Off => "off",
        }
    }
}

/// One path of the link.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PathConfig {
    /// Where this server listens, and (its IP address) where it dials from.
    pub listen: SocketAddr,
    /// The address the peer dials to get here: `listen`, unless something forwards.
    pub address: SocketAddr,
    /// The peer's address on this path.
    pub peer: SocketAddr,
}

impl PathConfig {
    /// A path without forwarding.
    pub const fn new(mine: SocketAddr, peer: SocketAddr) -> Self {
        Self { listen: mine, address: mine, peer }
    }
}

/// The link's times. The defaults suit `silent_ms` = 800.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Timers {
    /// Between two probes of a path.
    pub probe: Duration,
    /// A path from which nothing comes for so long while probes are unanswered is left for another.
    pub path_silent: Duration,
    /// A path silent for so long is connected anew.
    pub path_dead: Duration,
    /// For a connection to be made.
    pub connect: Duration,
    /// From the connection's first byte to the end of the handshake.
    pub handshake: Duration,
    /// First pause between two attempts; doubles, with jitter.
    pub backoff_min: Duration,
    /// Longest pause between two attempts.
    pub backoff_max: Duration,
}

impl Default for Timers {
    fn default() -> Self {
        Self {
            probe: Duration::from_millis(100),
            path_silent: Duration::from_millis(300),
            path_dead: Duration::from_millis(1500),
            connect: Duration::from_secs(1),
            handshake: Duration::from_secs(5),
            backoff_min: Duration::from_millis(100),
            backoff_max: Duration::from_secs(5),
        }
    }
}

/// What the link is told at start.
#[derive(Clone, Debug)]
pub struct LinkConfig {
    /// This server. The server with the smaller name (by bytes) dials, the other listens.
    pub server: ServerName,
    /// The other one.
    pub peer: ServerName,
    /// The pair's name.
    pub pair_name: String,
    /// The paths, the preferred one first; both servers list them in the same order.
    pub paths: Vec<PathConfig>,
    /// One secret, or two while it is being changed.
    pub secrets: Secrets,
    /// TLS or not.
    pub encryption: Encryption,
    /// This process.
    pub incarnation: Incarnation,
    /// This boot.
    pub boot_id: BootId,
    /// Names of the volumes, by position (name order).
    pub volumes: Vec<String>,
    /// Largest frame this server takes; the smaller one of both counts.
    pub frame_max_bytes: u32,
    /// Times.
    pub timers: Timers,
}

impl LinkConfig {
    /// Does this server dial?
    pub fn dials(&self) -> bool {
        self.server < self.peer
    }

    /// The largest frame there is.
    pub const fn frame_limit_bytes() -> u32 {
        FRAME_MAX_BYTES
    }
}
