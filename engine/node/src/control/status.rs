//! The status page, exactly as scripts read it: absent is null and never omitted.

use duplex_core::ids::{Epoch, Generation, ServerName};
use serde::{Deserialize, Serialize};

/// Version of the page.
pub const STATUS_VERSION: u32 = 1;

/// A point in time: RFC 3339, UTC, milliseconds.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Time(pub jiff::Timestamp);

impl Time {
    /// Now, by the wall clock. For people only: nothing is decided by it.
    pub fn now() -> Self {
        let now = jiff::Timestamp::now();
        // What is written has milliseconds: what is compared must have no more.
        Self(jiff::Timestamp::from_millisecond(now.as_millisecond()).unwrap_or(now))
    }
}

impl std::fmt::Display for Time {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:.3}", self.0)
    }
}

impl std::str::FromStr for Time {
    type Err = jiff::Error;

    fn from_str(text: &str) -> Result<Self, jiff::Error> {
        text.parse().map(Self)
    }
}

impl Serialize for Time {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Time {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $word:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
        pub enum $name {
            $($(#[$vdoc])* #[serde(rename = $word)] $variant,)+
        }

        impl $name {
            /// All of them.
            pub const ALL: [Self; [$($word),+].len()] = [$(Self::$variant),+];

            /// The operator's word.
            pub const fn word(self) -> &'static str {
                match self {
                    $(Self::$variant => $word,)+
                }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.pad(self.word())
            }
        }
    };
}

words!(
    /// A server's state in operators' words.
    State {
        /// No session; waits for the peer or the operator.
        Joining = "joining",
        /// A copy is being brought up to date.
        Syncing = "syncing",
        /// Both copies are equal and written together.
        Mirrored = "mirrored",
        /// Serves from its own copy by right.
        Alone = "alone",
        /// Stops itself because the other goes on.
        Dying = "dying",
        /// Stopped in order.
        Down = "down",
        /// The session is refused; see `refusal`.
        Refused = "refused",
    }
);

words!(
    /// A server's role.
    Role {
        /// Serves the clients.
        Primary = "primary",
        /// Holds the copy.
        Secondary = "secondary",
        /// Neither.
        None = "none",
    }
);

words!(
    /// A copy's state.
    CopyState {
        /// Holds everything acknowledged.
        UpToDate = "up-to-date",
        /// Consistent, but older.
        Outdated = "outdated",
        /// Being overwritten by a resync.
        Inconsistent = "inconsistent",
        /// Its disk failed, or it is detached.
        Failed = "failed",
        /// Never activated.
        Blank = "blank",
        /// Not heard of.
        Unknown = "unknown",
    }
);

words!(
    /// A path of the mirror link.
    PathState {
        /// Carries the session.
        Up = "up",
        /// Is being tried.
        Connecting = "connecting",
        /// Does not answer.
        Down = "down",
        /// Given up by `disconnect`.
        Disconnected = "disconnected",
    }
);

words!(
    /// This server's part in a resync.
    ResyncRole {
        /// Is copied from.
        Source = "source",
        /// Is copied to.
        Target = "target",
    }
);

/// The whole page.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Status {
    /// [`STATUS_VERSION`].
    pub version: u32,
    /// The pair's name.
    pub pair: String,
    /// This server.
    pub server: ServerName,
    /// Its state.
    pub state: State,
    /// Its role.
    pub role: Role,
    /// The newest epoch known here.
    pub epoch: Epoch,
    /// Why the state is what it is.
    pub reason: Option<String>,
    /// The other server.
    pub peer: Peer,
    /// The mirror link's paths.
    pub link: Vec<LinkPath>,
    /// LAN adapters; none in this version.
    pub lan: Vec<LanAdapter>,
    /// The witness; none in this version.
    pub witness: Option<Witness>,
    /// The policy in words.
    pub policy: String,
    /// Completes nothing now, and why.
    pub frozen: Option<Frozen>,
    /// Why the session is refused.
    pub refusal: Option<SessionRefusal>,
    /// The volumes, in name order.
    pub volumes: Vec<VolumeStatus>,
    /// Memory regions; none in this version.
    pub memory: Vec<MemoryStatus>,
}

impl Status {
    /// The page of a server that has not looked at anything yet.
    pub fn empty(pair: &str, server: &ServerName, peer: &ServerName) -> Self {
        Self {
            version: STATUS_VERSION,
            pair: pair.to_owned(),
            server: server.clone(),
            state: State::Joining,
            role: Role::None,
            epoch: Epoch::never(),
            reason: None,
            peer: Peer { server: peer.clone(), state: None, role: None, heard_ms: None },
            link: Vec::new(),
            lan: Vec::new(),
            witness: None,
            policy: crate::config::Arbiter::POLICY.to_owned(),
            frozen: None,
            refusal: None,
            volumes: Vec::new(),
            memory: Vec::new(),
        }
    }
}

/// What is known of the peer.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Peer {
    /// Its name.
    pub server: ServerName,
    /// Its state as last heard.
    pub state: Option<State>,
    /// Its role as last heard.
    pub role: Option<Role>,
    /// Milliseconds since it was last heard.
    pub heard_ms: Option<u64>,
}

/// A path of the mirror link.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct LinkPath {
    /// Its number.
    pub path: u16,
    /// Its state.
    pub state: PathState,
    /// Own address.
    pub local: String,
    /// The peer's address.
    pub remote: String,
    /// Round trip, newest.
    pub rtt_us: Option<u64>,
    /// Since the daemon's start.
    pub sent_bytes: u64,
    /// Since the daemon's start.
    pub received_bytes: u64,
}

/// A LAN adapter.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct LanAdapter {
    /// Its name.
    pub adapter: String,
    /// alive, silent or cannot-tell.
    pub state: String,
    /// Own score.
    pub score: u32,
    /// The peer's.
    pub peer_score: Option<u32>,
}

/// A witness.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Witness {
    /// Its address.
    pub address: String,
    /// Whether it answers.
    pub state: String,
}

/// A server that completes nothing.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Frozen {
    /// Since when.
    pub since: Time,
    /// Why.
    pub reason: String,
}

/// A refused session.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SessionRefusal {
    /// Stable word.
    pub code: String,
    /// The rule that refused.
    pub rule: Option<String>,
    /// This server's value.
    pub mine: Option<String>,
    /// The peer's.
    pub theirs: Option<String>,
}

/// A volume.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct VolumeStatus {
    /// Its name.
    pub name: String,
    /// Its size; `None` before activation.
    pub size_bytes: Option<u64>,
    /// The device clients use; `None` while there is none.
    pub device: Option<String>,
    /// The NBD socket or address.
    pub nbd: Option<String>,
    /// This copy.
    pub copy: CopyState,
    /// The peer's copy.
    pub peer_copy: CopyState,
    /// This copy's lineage.
    pub generation: Option<Generation>,
    /// Blocks marked.
    pub dirty_blocks: u64,
    /// Granularity of the marks.
    pub block_bytes: u32,
    /// The resync under way.
    pub resync: Option<ResyncStatus>,
}

/// A resync.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ResyncStatus {
    /// This server's part.
    pub role: ResyncRole,
    /// `disk`.
    pub phase: String,
    /// To copy when it began, and what was added since.
    pub total_bytes: u64,
    /// Still to copy.
    pub left_bytes: u64,
    /// Payload sent.
    pub sent_bytes: u64,
    /// Over the last seconds.
    pub rate_bytes_per_s: u64,
    /// Time left at this rate; `None` while it cannot be told.
    pub eta_s: Option<u64>,
    /// `idle` (no clients), `yielding`, `limited`, `paused`.
    pub pace: String,
    /// Blocks the source cannot read: they stay marked, and the resync does not end before they can be read or are
    /// written anew.
    #[serde(default)]
    pub unreadable_blocks: u64,
    /// Where they are: the first few ranges.
    #[serde(default)]
    pub unreadable: Vec<RangeStatus>,
}

/// A part of a volume.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct RangeStatus {
    /// From the volume's first byte.
    pub offset_bytes: u64,
    /// How long.
    pub length_bytes: u64,
}

/// A memory region.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct MemoryStatus {
    /// Its name.
    pub name: String,
    /// Its size.
    pub size_bytes: u64,
    /// Newest committed memory epoch here.
    pub committed: u64,
    /// And at the peer.
    pub peer_committed: Option<u64>,
}
