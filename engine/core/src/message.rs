//! What two servers say to each other, as values. The link turns them into frames and back.
//!
//! [`VolumeMessage`]s travel in order on a volume's data channel, [`ControlMessage`]s in order on the
//! control channel. Both belong to one session: what was said in another session is dropped by the link.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::format::record::{CopyRecord, ServerRecord};
use crate::ids::{BootId, ByteRange, Epoch, Generation, Incarnation, Proven, Sequence, ServerName};

/// Version of the protocol spoken here.
pub const PROTOCOL_VERSION: u32 = 1;

/// What became of an operation on the other server's disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RemoteOutcome {
    /// Done as asked.
    Done,
    /// The disk failed with this errno; the copy is latched.
    Failed {
        /// As the other kernel gave it.
        errno: i32,
    },
}

/// One message of a volume's data channel. A payload, where one belongs, travels beside it as a buffer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum VolumeMessage {
    /// Primary to secondary: a client's write. Payload: `range.length_bytes` bytes.
    Write {
        /// Grows by one with each replicated operation.
        seq: Sequence,
        /// Where to.
        range: ByteRange,
        /// Stable before the acknowledgement.
        fua: bool,
    },
    /// Primary to secondary: make the range read as zeroes.
    Zero {
        /// As for a write.
        seq: Sequence,
        /// The range.
        range: ByteRange,
        /// Space may be given back.
        may_unmap: bool,
        /// Stable before the acknowledgement.
        fua: bool,
    },
    /// Secondary to primary: that write or zero is done.
    Ack {
        /// Of the operation.
        seq: Sequence,
        /// How it ended.
        outcome: RemoteOutcome,
    },
    /// Make every operation acknowledged so far stable.
    Flush {
        /// Chosen by the sender.
        id: u64,
    },
    /// The flush ended.
    FlushAck {
        /// Of the flush.
        id: u64,
        /// How it ended.
        outcome: RemoteOutcome,
    },
    /// Source to target: a resync chunk. Payload: `range.length_bytes` bytes.
    Copy {
        /// Chosen by the source.
        id: u64,
        /// Where to.
        range: ByteRange,
    },
    /// Source to target: a resync chunk that is all zeroes or a hole.
    CopyZero {
        /// Chosen by the source.
        id: u64,
        /// The range.
        range: ByteRange,
    },
    /// Target to source: that chunk is written (not yet flushed).
    CopyAck {
        /// Of the chunk.
        id: u64,
        /// How it ended.
        outcome: RemoteOutcome,
    },
    /// Ask the peer for the content of a range (healing a bad block, or a front without a disk).
    Read {
        /// Chosen by the asker.
        id: u64,
        /// What.
        range: ByteRange,
    },
    /// The content asked for. Payload only when done.
    ReadReply {
        /// Of the question.
        id: u64,
        /// What.
        range: ByteRange,
        /// How it ended.
        outcome: RemoteOutcome,
    },
    /// Target to source: one page of the target's dirty map, for the union of both.
    MarksPage {
        /// Page number.
        index: u64,
        /// The page's bits.
        bits: Vec<u8>,
    },
    /// Target to source: that was the last page.
    MarksEnd {
        /// Pages sent.
        pages: u64,
    },
    /// Source to target: so many pages are taken in; the target keeps at most a few pages ahead of this.
    MarksAck {
        /// Pages taken in so far.
        pages: u64,
    },
    /// Source to target: nothing is left to copy; become this.
    SyncDone {
        /// The source's generation.
        generation: Generation,
        /// The source's history.
        history: Vec<Generation>,
        /// How far the source is proven.
        proven: Proven,
    },
    /// Target to source: adopted, durable.
    SyncAck {
        /// A failed adoption latches the target's copy.
        outcome: RemoteOutcome,
    },
}

impl VolumeMessage {
    /// Bytes of payload that travel beside the message.
    pub const fn payload_bytes(&self) -> u64 {
        match self {
            Self::Write { range, .. } | Self::Copy { range, .. } => range.length_bytes,
            Self::ReadReply { range, outcome, .. } => match outcome {
                RemoteOutcome::Done => range.length_bytes,
                RemoteOutcome::Failed { .. } => 0,
            },
            Self::Zero { .. }
            | Self::Ack { .. }
            | Self::Flush { .. }
            | Self::FlushAck { .. }
            | Self::CopyZero { .. }
            | Self::CopyAck { .. }
            | Self::Read { .. }
            | Self::MarksPage { .. }
            | Self::MarksEnd { .. }
            | Self::MarksAck { .. }
            | Self::SyncDone { .. }
            | Self::SyncAck { .. } => 0,
        }
    }
}

/// The live state of a server (docs/protocol.md section 2).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LiveState {
    /// Reads its disks; knows nothing yet.
    Loading,
    /// No session; serves nothing.
    Joining,
    /// In a session, serves nothing.
    Secondary,
    /// Both copies are written; completes with both acknowledgements and a lease.
    PrimaryMirrored,
    /// Was primary-mirrored or returning, lost the peer, holds no right.
    Frozen,
    /// Going alone: the right is taken, the record not yet durable. Serves nothing.
    Granted,
    /// Serves from its own copy by right.
    Alone,
    /// Alone, with a session: the peer is being resynchronised.
    Syncing,
    /// Syncing, SyncDone sent on every volume.
    SyncTail,
    /// Gave up the solo right; both copies must acknowledge.
    Returning,
    /// Orderly stop under way.
    Stopping,
}

impl LiveState {
    /// May complete requests by its own right.
    pub const fn is_alone(self) -> bool {
        match self {
            Self::Alone | Self::Syncing | Self::SyncTail => true,
            Self::Loading
            | Self::Joining
            | Self::Secondary
            | Self::PrimaryMirrored
            | Self::Frozen
            | Self::Granted
            | Self::Returning
            | Self::Stopping => false,
        }
    }

    /// Is a primary in a pair era: frozen or not.
    pub const fn is_live_primary(self) -> bool {
        match self {
            Self::PrimaryMirrored | Self::Frozen | Self::Returning => true,
            Self::Loading
            | Self::Joining
            | Self::Secondary
            | Self::Granted
            | Self::Alone
            | Self::Syncing
            | Self::SyncTail
            | Self::Stopping => false,
        }
    }
}

/// One volume's part of a [`Hello`].
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct VolumeHello {
    /// The volume's name in the configuration.
    pub name: String,
    /// The copy's durable facts. While blank, `size_bytes` is the capacity.
    pub copy: CopyRecord,
    /// Blocks marked dirty, active extents included.
    pub dirty_blocks: u64,
    /// The server went alone, and this copy lacks the record of it: the process ended in the middle of G4,
    /// nothing was completed alone.
    pub lacks_solo: bool,
    /// Every block is marked, under a generation that no copy was ever copied towards: a full copy may begin.
    pub whole_map: bool,
    /// An undo area can roll this copy back (reserved: false in this version).
    pub undo_available: bool,
}

/// A memory region of the configuration (reserved: none in this version).
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct MemoryRegion {
    /// Its name.
    pub name: String,
    /// Its size.
    pub size_bytes: u64,
}

/// The handshake of docs/protocol.md section 7: everything `decide` needs from one side.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Hello {
    /// Protocol version.
    pub version: u32,
    /// Grows when any fact changed since the last hello of this session: the newest one counts.
    pub revision: u64,
    /// Who speaks.
    pub server: ServerName,
    /// The pair's name in the configuration.
    pub pair_name: String,
    /// The process that speaks.
    pub incarnation: Incarnation,
    /// Its boot.
    pub boot_id: BootId,
    /// Its state now.
    pub live: LiveState,
    /// Its durable record.
    pub record: ServerRecord,
    /// A compare-and-swap at the witness without an answer (reserved: false without a witness).
    pub cas_outstanding: bool,
    /// A grant not yet used.
    pub granted: bool,
    /// The configuration by canonical key, as far as both must agree.
    pub config: BTreeMap<String, String>,
    /// Memory regions.
    pub memory: Vec<MemoryRegion>,
    /// The volumes, in name order.
    pub volumes: Vec<VolumeHello>,
}

/// A word of the control channel.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum ControlMessage {
    /// My facts.
    Hello(Box<Hello>),
    /// I decided on your revision and on mine; when both say so with the same numbers, the session stands.
    Agree {
        /// The sender's revision.
        mine: u64,
        /// The revision of the receiver's hello.
        yours: u64,
    },
    /// I refuse this session.
    Refuse {
        /// Stable word.
        code: String,
        /// In a sentence, with both values.
        text: String,
    },
    /// The heartbeat; sent on its own schedule, never behind data.
    Heartbeat {
        /// Sender's clock when it was sent, in ns.
        sent_ns: u64,
        /// `sent_ns` of the newest heartbeat the sender received; 0 = none yet.
        echo_ns: u64,
        /// The echo is a promise: the sender will not serve before `silent_ms` after it received it.
        promising: bool,
        /// The sender's state.
        live: LiveState,
        /// Its newest epoch.
        epoch: Epoch,
    },
    /// From now on I am primary in this epoch.
    Primary {
        /// The new epoch.
        epoch: Epoch,
    },
    /// May I become primary? Sent when nobody serves.
    PromoteAsk {
        /// The epoch I would begin.
        epoch: Epoch,
    },
    /// The answer to PromoteAsk.
    PromoteAnswer {
        /// Of the question.
        epoch: Epoch,
        /// Yes: the sender will not become primary by itself in this session before it heard the outcome.
        granted: bool,
        /// Why not.
        text: String,
    },
    /// Secondary asks the primary to hand over (switchover or promote typed on the secondary).
    HandOverAsk,
    /// The primary will not.
    HandOverRefused {
        /// Why.
        text: String,
    },
    /// Old primary to secondary: I drained, flushed both, hold no marks and am secondary, durably. Your turn.
    HandedOver {
        /// The epoch that ended.
        epoch: Epoch,
    },
    /// Source to target, after the source's era is `pair` durably: both are mirrored.
    Mirrored {
        /// The epoch of the pair from now on.
        epoch: Epoch,
        /// The source is primary.
        primary: bool,
    },
    /// Target to source: recorded.
    MirroredAck {
        /// Same epoch.
        epoch: Epoch,
    },
    /// I am no longer primary; nobody is.
    Demoted {
        /// The epoch that ended.
        epoch: Epoch,
    },
    /// Operator's wish concerning the resync, carried to the other side.
    Resync {
        /// `pause`, `resume`, or a rate or priority.
        command: crate::mirror::api::Pace,
    },
    /// Operator asked for a full copy towards the server that receives this.
    FullCopy {
        /// The volume's position.
        volume: u16,
    },
    /// The operator chose the receiver of this as the victim of a split brain.
    Resolve {
        /// The server that loses its own blocks (they are saved first).
        victim: ServerName,
    },
    /// The victim saved its blocks and gave up its generation; a fresh hello follows.
    Resolved,
    /// Resolving failed; nothing was given up.
    ResolveFailed {
        /// Why.
        text: String,
    },
    /// My copy of a volume failed (G12).
    CopyFailed {
        /// The volume's position.
        volume: u16,
        /// The errno.
        errno: i32,
    },
    /// I stop in order; this is not a failure.
    Bye {
        /// Why, for the events of both.
        text: String,
    },
}
