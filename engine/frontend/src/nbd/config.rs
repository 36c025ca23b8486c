//! How an NBD server is set up, and why it could not be.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use duplex_core::ids::ByteRange;
use duplex_core::limits::REQUESTS_MAX;

use crate::Geometry;

/// Where clients come in.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ListenAddress {
    /// A Unix socket, made with mode 0660. Open in every state: a server that does not serve says so there.
    Unix {
        /// The socket file; the file of a dead process is replaced.
        path: PathBuf,
        /// Numeric group that may connect; `None` leaves the process's own.
        group: Option<u32>,
    },
    /// A TCP port. Open only while serving.
    Tcp(SocketAddr),
}

impl fmt::Display for ListenAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix { path, .. } => write!(f, "unix:{}", path.display()),
            Self::Tcp(address) => write!(f, "tcp:{address}"),
        }
    }
}

/// A network in CIDR notation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Network {
    address: IpAddr,
    prefix_bits: u8,
}

impl Network {
    /// The networks of the loopback interface.
    pub const LOOPBACK: [Self; 2] = [
        Self { address: IpAddr::V4(Ipv4Addr::new(127, 0, 0, 0)), prefix_bits: 8 },
        Self { address: IpAddr::V6(Ipv6Addr::LOCALHOST), prefix_bits: 128 },
    ];

    /// True when the address lies in the network. An IPv4 address mapped into IPv6 counts as IPv4.
    pub fn contains(&self, address: IpAddr) -> bool {
        let shifted = |bits: u128, width: u8| {
            bits.checked_shr(u32::from(width - self.prefix_bits.min(width))).unwrap_or(0)
        };
        match (self.address.to_canonical(), address.to_canonical()) {
            (IpAddr::V4(own), IpAddr::V4(other)) => {
                shifted(own.to_bits().into(), 32) == shifted(other.to_bits().into(), 32)
            }
            (IpAddr::V6(own), IpAddr::V6(other)) => {
                shifted(own.to_bits(), 128) == shifted(other.to_bits(), 128)
            }
            (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => false,
        }
    }
}

impl Network {
    /// A network by its address and prefix length, which is held within the address's width.
    pub fn new(address: IpAddr, prefix_bits: u8) -> Self {
        let width = if address.is_ipv4() { 32 } else { 128 };
        Self { address, prefix_bits: prefix_bits.min(width) }
    }
}

/// A network that is not one.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{text:?} is not a network: write an address and a prefix length, as in 10.0.0.0/24 or fd00::/64")]
pub struct ParseNetworkError {
    /// What was given.
    pub text: String,
}

impl FromStr for Network {
    type Err = ParseNetworkError;

    /// An address without a prefix length is one host.
    fn from_str(text: &str) -> Result<Self, ParseNetworkError> {
        let parse = || {
            let (address, prefix) = match text.split_once('/') {
                Some((address, prefix)) => (address, Some(prefix.parse::<u8>().ok()?)),
                None => (text, None),
            };
            let address: IpAddr = address.parse().ok()?;
            let width = if address.is_ipv4() { 32 } else { 128 };
            let prefix_bits = prefix.unwrap_or(width);
            (prefix_bits <= width).then_some(Self { address, prefix_bits })
        };
        parse().ok_or_else(|| ParseNetworkError { text: text.to_owned() })
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix_bits)
    }
}

/// How an NBD server is set up.
#[derive(Clone, Debug)]
pub struct NbdConfig {
    /// Name of the export: the volume's.
    pub export: String,
    /// The empty name means this export, too: the server's only volume.
    pub is_default: bool,
    /// The volume's shape.
    pub geometry: Geometry,
    /// Where clients come in.
    pub listeners: Vec<ListenAddress>,
    /// Who may come over TCP.
    pub allowed: Vec<Network>,
    /// Connections at a time, negotiating ones included; more wait in the listener's queue.
    pub connections_max: usize,
    /// Requests of one connection in flight; no more are received from it meanwhile.
    pub connection_requests_max: usize,
    /// Requests of all connections in flight.
    pub requests_max: usize,
    /// Buffer bytes one connection may hold (at least one request is always let through), so that a client that
    /// takes no replies cannot keep the buffers from the others.
    pub connection_bytes_max: usize,
    /// A longer discard or write-zeroes is handed on in pieces of this, one after the other.
    pub zero_max_bytes: u64,
    /// Zeroing is faster than writing zeroes. Otherwise a client that insists on fast gets `ENOTSUP`.
    pub fast_zero: bool,
    /// How long a client may take to negotiate.
    pub negotiation_timeout: Duration,
    /// A reply that has no other to go with (a client that waits for each of its requests) is tried with one
    /// `sendmsg` outside the ring, which saves the turn for the send's completion. `false`: all by the ring.
    pub direct_send: bool,
}

impl NbdConfig {
    /// The defaults: nobody listens yet, loopback may come, 64 connections of 256 requests and 32 MiB each.
    pub fn new(export: impl Into<String>, geometry: Geometry) -> Self {
        Self {
            export: export.into(),
            is_default: false,
            geometry,
            listeners: Vec::new(),
            allowed: Network::LOOPBACK.to_vec(),
            connections_max: 64,
            connection_requests_max: 256,
            requests_max: REQUESTS_MAX,
            connection_bytes_max: 32 << 20,
            zero_max_bytes: 32 << 20,
            fast_zero: false,
            negotiation_timeout: Duration::from_secs(30),
            direct_send: true,
        }
    }
}

/// Why a listener could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum NbdError {
    /// Another process answers on the socket file.
    #[error("{path} is in use by a running process: stop it, or give this volume another socket path", path = path.display())]
    SocketInUse {
        /// The socket file.
        path: PathBuf,
    },
    /// Something else is at the socket's path.
    #[error("{path} exists and is not a socket: move it away, or give this volume another socket path", path = path.display())]
    NotASocket {
        /// What is in the way.
        path: PathBuf,
    },
    /// The kernel refused a step.
    #[error("listening for NBD clients on {address} failed in {step}: {error}")]
    Listen {
        /// Where.
        address: ListenAddress,
        /// The step.
        step: &'static str,
        /// The kernel's answer.
        error: io::Error,
    },
}

/// What is known of a piece of the volume.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Allocation {
    /// Data, or not known.
    Data,
    /// Not allocated; reads as zeroes.
    Hole,
    /// Allocated; reads as zeroes.
    Zero,
}

/// A piece of the volume.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AllocationExtent {
    /// Length, a multiple of the sector size.
    pub length_bytes: u64,
    /// What is known of it.
    pub allocation: Allocation,
}

/// Knows what of the volume is allocated, from memory: it is asked on the volume's thread and must not block.
pub trait AllocationSource {
    /// Appends extents that cover `range` from its start on, in order. Fewer may be given than asked for; none means
    /// "data".
    fn extents(&mut self, range: ByteRange, out: &mut Vec<AllocationExtent>);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn contains(network: &str, address: &str) -> bool {
        network.parse::<Network>().expect("a network").contains(address.parse().expect("an address"))
    }

    #[test]
    fn networks_contain_their_addresses_only() {
        assert!(contains("10.1.0.0/16", "10.1.255.3"));
        assert!(!contains("10.1.0.0/16", "10.2.0.1"));
        assert!(contains("10.1.0.5", "10.1.0.5"));
        assert!(!contains("10.1.0.5", "10.1.0.4"));
        assert!(contains("0.0.0.0/0", "203.0.113.9"));
        assert!(contains("10.1.0.0/16", "::ffff:10.1.2.3"));
        assert!(!contains("0.0.0.0/0", "fd00::1"));
        assert!(contains("::/0", "fd00::1"));
        assert!(contains("fd00:1::/32", "fd00:1:2::3"));
        assert!(!contains("fd00:1::/32", "fd00:2::3"));
        let is_own = |address: &str| {
            let address = address.parse().expect("an address");
            Network::LOOPBACK.iter().any(|network| network.contains(address))
        };
        assert!(is_own("127.9.9.9"));
        assert!(!is_own("::2"));
    }

    #[test]
    fn what_is_no_network_is_refused() {
        for text in ["", "10.0.0.0/33", "10.0.0/8", "fd00::/129", "host/8", "10.0.0.0/"] {
            let error = text.parse::<Network>().expect_err("it is none");
            assert!(error.to_string().contains("10.0.0.0/24"), "{error}");
        }
        assert_eq!("fd00::/64".parse::<Network>().expect("a network").to_string(), "fd00::/64");
    }
}
