//! Identities and numbers, one type each.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A 128-bit random identity, shown as 32 hex digits.
macro_rules! random_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub u128);

        impl $name {
            /// The identity that nothing has: a field not yet set.
            pub const NONE: Self = Self(0);

            /// True when the field was never set.
            pub const fn is_none(self) -> bool {
                self.0 == 0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:032x}", self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({:032x})", stringify!($name), self.0)
            }
        }

        impl std::str::FromStr for $name {
            type Err = ParseIdError;

            fn from_str(text: &str) -> Result<Self, ParseIdError> {
                if text.len() != 32 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
                    return Err(ParseIdError);
                }
                u128::from_str_radix(text, 16).map(Self).map_err(|_| ParseIdError)
            }
        }

        impl Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

/// An identity is 32 hex digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("an identity is 32 hex digits")]
pub struct ParseIdError;

random_id!(
    /// Identity of a pair, drawn by `activate`.
    PairId
);
random_id!(
    /// Identity of a volume, drawn by `activate`.
    VolumeId
);
random_id!(
    /// Identity of a data lineage: changes before the first write completed alone (G4).
    Generation
);
random_id!(
    /// One process of a server: drawn at every start.
    Incarnation
);
random_id!(
    /// The kernel's boot id: a change means that the machine lost its memory.
    BootId
);
random_id!(
    /// One session between two incarnations. Everything said in another session is dropped.
    SessionId
);

/// A server's name, as in the configuration.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ServerName(pub String);

impl fmt::Display for ServerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Position of a volume in the server's list, the same on both servers of a pair (by name order).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct VolumeIndex(pub u16);

/// The number of a promotion and who was promoted. Only grows.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Epoch {
    /// Counts promotions, solo runs and returns to the pair.
    pub number: u64,
    /// The server that was promoted; `None` before the first activation.
    pub holder: Option<ServerName>,
}

impl Epoch {
    /// The epoch of a pair that was never activated.
    pub const fn never() -> Self {
        Self { number: 0, holder: None }
    }
}

/// Sequence number of a replicated operation of one volume; grows by one each, never reused in an epoch.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Sequence(pub u64);

/// How far a copy was proven durable on both servers: everything up to `seq` of `epoch` was flushed on both.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize, Deserialize)]
pub struct Proven {
    /// Epoch number of the operation.
    pub epoch: u64,
    /// Sequence in that epoch.
    pub seq: Sequence,
}

/// A frontend's name for a request in flight. Chosen by the shell, unique while the request lives.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct RequestId(pub u64);

/// A slot of the volume thread's buffer arena. The core only carries it about.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct BufferId(pub u32);

/// The core's name for a disk operation it asked for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct DiskOpId(pub u64);

/// A byte range of a volume's data.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct ByteRange {
    /// First byte, from the volume's start.
    pub offset_bytes: u64,
    /// Length, never 0 in a valid request.
    pub length_bytes: u64,
}

impl ByteRange {
    /// A range by its first byte and length.
    pub const fn new(offset_bytes: u64, length_bytes: u64) -> Self {
        Self { offset_bytes, length_bytes }
    }

    /// One past the last byte. Saturates, so that a hostile range is past every volume's end.
    pub const fn end_bytes(self) -> u64 {
        self.offset_bytes.saturating_add(self.length_bytes)
    }

    /// True when both share a byte.
    pub const fn overlaps(self, other: Self) -> bool {
        self.offset_bytes < other.end_bytes() && other.offset_bytes < self.end_bytes()
    }
}

impl fmt::Display for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}+{}", self.offset_bytes, self.length_bytes)
    }
}
