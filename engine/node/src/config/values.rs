//! Values with a grammar of their own: names, sizes, addresses, networks.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use super::reader::Value;

/// Longest name of a pair, server or volume, in bytes.
pub const NAME_MAX_BYTES: usize = 48;
/// Longest path in the configuration, in bytes.
const PATH_MAX_BYTES: usize = 4095;

/// A network in CIDR form.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Network {
    /// Any address of it.
    pub address: IpAddr,
    /// Leading bits that count.
    pub prefix_bits: u8,
}

impl Network {
    /// True when the address lies in the network. IPv4 in IPv6 form counts as IPv4.
    pub fn contains(&self, address: IpAddr) -> bool {
        match (self.address, address.to_canonical()) {
            (IpAddr::V4(mine), IpAddr::V4(other)) => {
                let mask = u32::MAX.checked_shl(32 - u32::from(self.prefix_bits)).unwrap_or(0);
                mine.to_bits() & mask == other.to_bits() & mask
            }
            (IpAddr::V6(mine), IpAddr::V6(other)) => {
                let mask = u128::MAX.checked_shl(128 - u32::from(self.prefix_bits)).unwrap_or(0);
                mine.to_bits() & mask == other.to_bits() & mask
            }
            (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => false,
        }
    }
}

impl std::str::FromStr for Network {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (address, prefix) = text.split_once('/').unwrap_or((text, ""));
        let address: IpAddr = address.parse().map_err(|_| "is not an IP network".to_owned())?;
        let most = if address.is_ipv4() { 32 } else { 128 };
        let prefix_bits = if prefix.is_empty() && !text.contains('/') {
            most
        } else {
            prefix
                .parse()
                .ok()
                .filter(|bits| *bits <= most)
                .ok_or(format!("has a prefix outside 0 to {most}"))?
        };
        Ok(Self { address, prefix_bits })
    }
}

/// Why a name cannot be used, if it cannot.
pub(super) fn name_fault(name: &str) -> Option<(&'static str, String)> {
    if name.len() > NAME_MAX_BYTES {
        return Some(("too-long", format!("has {} bytes, {NAME_MAX_BYTES} are allowed", name.len())));
    }
    let good = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_' || c == '.';
    if name.is_empty() || !name.chars().all(good) || !name.starts_with(|c: char| c.is_ascii_alphanumeric()) {
        return Some(("bad-name", "is not a name".to_owned()));
    }
    None
}

/// The rule for names, as a fix.
pub(crate) const NAME_FIX: &str =
    "use letters, digits, '-', '_' and '.', begin with a letter or digit, at most 48 bytes";

/// An absolute path without `..`.
pub(crate) fn path(value: &Value<'_>, fix: &str) -> Option<PathBuf> {
    let text = value.string(fix)?;
    if text.len() > PATH_MAX_BYTES {
        value.wrong("too-long", format!("is a path of {} bytes", text.len()), "use a path under 4096 bytes");
        return None;
    }
    let path = PathBuf::from(text);
    if !path.is_absolute() {
        value.wrong("relative-path", "is not an absolute path", fix);
        return None;
    }
    if path.components().any(|part| matches!(part, std::path::Component::ParentDir)) {
        value.wrong("bad-path", "holds '..'", "write the path without '..'");
        return None;
    }
    // Collapses `//` and `/./`, so that equal paths compare equal.
    Some(path.components().collect())
}

/// An IP address with a port that can be bound and dialled.
pub(crate) fn socket_address(value: &Value<'_>, example: &str) -> Option<SocketAddr> {
    let fix = format!("write an IP address and a port, for example \"{example}\" or \"[fd00::1]:7700\"");
    let text = value.string(&fix)?;
    let Ok(address) = text.parse::<SocketAddr>() else {
        let (code, what) = address_fault(text);
        value.wrong(code, what, fix);
        return None;
    };
    if address.port() == 0 {
        value.wrong("bad-port", "has port 0", format!("name the port, for example {example}"));
        return None;
    }
    let ip = address.ip();
    let broadcast = matches!(ip, IpAddr::V4(v4) if v4.is_broadcast());
    if ip.is_unspecified() || ip.is_multicast() || broadcast {
        let what = if ip.is_unspecified() { "names every address" } else { "is not one machine's address" };
        value.wrong("bad-address", what, "write the one address that the server has on this network");
        return None;
    }
    Some(address)
}

fn address_fault(text: &str) -> (&'static str, &'static str) {
    if text.parse::<IpAddr>().is_ok() {
        return ("bad-port", "has no port");
    }
    match text.rsplit_once(':') {
        Some((host, port)) => {
            let bare = host.trim_matches(|c| c == '[' || c == ']');
            if bare.parse::<IpAddr>().is_ok() && port.parse::<u16>().is_err() {
                ("bad-port", "has a port outside 1 to 65535")
            } else if looks_like_host(host) {
                ("host-name", "is a host name; only IP addresses are taken, so that no resolver decides")
            } else {
                ("bad-address", "is not an IP address with a port")
            }
        }
        None if looks_like_host(text) => {
            ("host-name", "is a host name; only IP addresses are taken, so that no resolver decides")
        }
        None => ("bad-address", "is not an IP address with a port"),
    }
}

fn looks_like_host(text: &str) -> bool {
    text.chars().any(|c| c.is_ascii_alphabetic())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '.')
}

/// Bytes, as a number or with KiB, MiB, GiB, TiB.
pub(crate) fn size(value: &Value<'_>) -> Option<u64> {
    const FIX: &str = "write bytes as a number, or a string such as \"64MiB\", \"10GiB\", \"2TiB\"";
    if value.is_integer() {
        return value.integer(0..u64::MAX, "bytes");
    }
    let text = value.string(FIX)?;
    let parsed = parse_size(text);
    if parsed.is_none() {
        value.wrong("bad-size", "is not a size", FIX);
    }
    parsed
}

/// Bytes of `64MiB`, `512 KiB`, `4096`. Decimal units are not taken: they are too easily meant otherwise.
pub fn parse_size(text: &str) -> Option<u64> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let number: u64 = text[..digits].parse().ok()?;
    let shift = match text[digits..].trim() {
        "" | "B" => 0,
        "KiB" => 10,
        "MiB" => 20,
        "GiB" => 30,
        "TiB" => 40,
        _ => return None,
    };
    number.checked_mul(1 << shift)
}
