//! What goes into a volume and what comes out.

use serde::{Deserialize, Serialize};

use crate::format::record::{CopyRecord, CopyState, Origin, ServerRecord};
use crate::ids::{BufferId, ByteRange, Generation, PairId, RequestId, SessionId, VolumeId};
use crate::message::VolumeMessage;
use crate::request::{DiskOp, DiskOutcome, Request, RequestError};

/// An input of a volume.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Input {
    /// A client's request.
    Request(Request),
    /// A disk operation ended.
    Disk(crate::ids::DiskOpId, DiskOutcome),
    /// The peer said this in this session. A payload's buffer now belongs to the volume, which gives it
    /// back by [`Action::Release`].
    Message(SessionId, VolumeMessage, Option<BufferId>),
    /// The server machine wants this.
    Order(Order),
    /// A deadline passed, or nothing but time.
    Time,
}

/// What the shell must do now.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Action {
    /// Start this disk operation; its end comes back as [`Input::Disk`].
    Disk(DiskOp),
    /// Send to the peer, in order.
    Send(SessionId, VolumeMessage, Option<BufferId>),
    /// Answer the client. The request's buffer is the frontend's again.
    Complete(RequestId, Result<(), RequestError>),
    /// The payload buffer of a message is not needed any more.
    Release(BufferId),
    /// Copy the first bytes of one buffer into another.
    CopyBuffer {
        /// From here.
        from: BufferId,
        /// To here.
        into: BufferId,
        /// How many.
        length_bytes: u64,
    },
    /// Tell the server machine.
    Report(Report),
    /// Frontends: serve clients, hold them, or refuse them.
    Exposure(Exposure),
}

/// How the frontends treat clients.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Exposure {
    /// Take requests.
    Serving,
    /// Refuse: this server is not primary.
    Refusing,
}

/// A change of the copy's record that goes to disk together with the server's record.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum CopyChange {
    /// Only the server's record changes.
    None,
    /// First activation, or the source's identity adopted by a blank copy. The dirty log begins anew, empty.
    Identity {
        /// The pair.
        pair: PairId,
        /// The volume.
        volume: VolumeId,
        /// The volume's size.
        size_bytes: u64,
        /// Block size.
        block_bytes: u32,
        /// Sector size.
        sector_bytes: u32,
        /// The generation; for a blank copy the source's.
        generation: Generation,
        /// Up to date at activation; `Inconsistent` towards the source's generation for a blank copy.
        state: CopyState,
    },
    /// G4, or the operator's force: history += old, unproven = no, up to date.
    NewGeneration {
        /// The new one.
        generation: Generation,
        /// Why.
        origin: Origin,
        /// How far the map reaches back from here.
        reach: MapReach,
    },
    /// Before a full copy: history += old, base = the new generation, every block marked, durably, before the
    /// record is written. From then on no copy made earlier passes for one that the map knows.
    WholeMap {
        /// The new one.
        generation: Generation,
    },
    /// Going alone was given up before anything completed: the lineage is again what it was before G4.
    TakeBack {
        /// The record as it was.
        before: Box<CopyRecord>,
    },
    /// `decide` named this copy the source and nobody serves: unproven = no, as going alone would set it.
    Proven,
    /// G5: becomes a target, inconsistent towards this generation.
    Target {
        /// The source's generation.
        toward: Generation,
    },
    /// The peer went on without this copy.
    Outdated,
    /// The victim of a split brain gives its own lineage up and goes back to the common ancestor. With
    /// `full` every block is marked, durably, before the record is written.
    Surrender {
        /// The newest generation both lineages share.
        to: Generation,
        /// This copy's map does not reach back to it.
        full: bool,
    },
}

/// Which older copies the dirty map speaks of once a generation begins.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MapReach {
    /// Those it spoke of before; with nothing marked, those of the generation before.
    Back,
    /// None: any other copy needs everything.
    Nothing,
}

/// How a volume takes part in a session.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CopyPlan {
    /// Nothing to copy.
    None,
    /// Union of both maps.
    Union,
    /// Everything.
    Full,
}

/// A volume's part in a session.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Part {
    /// Copies towards the peer by this plan; with `None` both copies are in step already.
    Source(CopyPlan),
    /// Is copied to.
    Target(CopyPlan),
}

/// How completions are earned.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ServeMode {
    /// By this copy alone, by right. Writes also go to the peer while there is a session.
    Alone,
    /// By both copies, with a lease.
    Mirrored,
    /// This copy is failed: every request goes to the peer, which serves by its own right (G12).
    Front,
}

/// The pace of resync.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "what", content = "value")]
pub enum Pace {
    /// Stop copying; every bit stays.
    Pause,
    /// Go on.
    Resume,
    /// How much of the machine the resync may take while clients work.
    Priority(Priority),
    /// Upper bound; 0 = none.
    MaxBytesPerSecond(u64),
}

/// Weight of the resync against clients.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Priority {
    /// One chunk at a time while clients work.
    Low,
    /// Yields to clients.
    #[default]
    Normal,
    /// As if there were no clients.
    High,
}

impl Priority {
    /// The operator's word.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Low => "low",
            Self::Normal => "normal",
            Self::High => "high",
        }
    }
}

/// What the server machine orders.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Order {
    /// Write one superblock with this server record and change; answer [`Report::Recorded`].
    Record {
        /// Comes back.
        tag: u64,
        /// The whole record.
        server: ServerRecord,
        /// Of the copy.
        change: CopyChange,
        /// Everything completed before is stable before the record is (PREFLUSH + FUA).
        preflush: bool,
    },
    /// A session stands: take part.
    Join {
        /// The session.
        session: SessionId,
        /// Source or target.
        part: Part,
        /// D12: a live primary goes on; its in-flight operations are sent again.
        resume: bool,
    },
    /// The session is over.
    Leave,
    /// This server serves alone, and does what the peer's front forwards, too (G12).
    Host {
        /// The session the requests come in.
        session: SessionId,
    },
    /// Complete requests this way from now on, in this epoch.
    Serve {
        /// How.
        mode: ServeMode,
        /// The epoch's number: enters sequence numbers and `proven`.
        epoch: u64,
    },
    /// Complete nothing, keep everything. With a tag answer [`Report::Drained`]: nothing completes after that.
    Freeze {
        /// Comes back.
        tag: Option<u64>,
    },
    /// Take no new request, finish those in flight, flush both, let every mark go; then [`Report::Drained`].
    Drain {
        /// Comes back.
        tag: u64,
    },
    /// After `Drain` (or at once when nothing is served): requests get `NotServing`.
    Close,
    /// G6 step 3: no operation in flight, nothing unsent, both flushed, then this record durable; from here
    /// both acknowledgements are needed. Answer [`Report::Recorded`].
    Return {
        /// Comes back.
        tag: u64,
        /// era = pair.
        server: ServerRecord,
    },
    /// Say how many blocks are marked now: [`Report::Dirty`], then [`Report::Drained`] with the tag.
    TellMarks {
        /// Comes back.
        tag: u64,
    },
    /// Resync pace.
    Pace(Pace),
    /// The local copy is detached by the operator: as if it had failed.
    Fail {
        /// What to report.
        errno: i32,
    },
}

/// Which copy a failure concerns.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Whose {
    /// This server's.
    Mine,
    /// The peer's.
    Peers,
}

/// What a volume tells the server machine.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Report {
    /// Superblock read, log replayed, G10 applied: these are the facts.
    Loaded(Box<Facts>),
    /// The metadata cannot be used; nothing was written.
    Unusable {
        /// Stable word: `blank`, `foreign`, `torn`, `newer-version`, `wrong-size`, `io`.
        code: &'static str,
        /// In a sentence.
        text: String,
    },
    /// A record is durable.
    Recorded {
        /// Of the order.
        tag: u64,
        /// The copy as it is now on disk.
        copy: Box<CopyRecord>,
    },
    /// Source: the target adopted everything (SyncAck).
    Synced {
        /// Bytes that were marked when the copying began.
        total_bytes: u64,
        /// Bytes of blocks sent, marks of writes that came meanwhile included.
        sent_bytes: u64,
    },
    /// Target: adopted, durable.
    Adopted {
        /// The copy as it is now on disk.
        copy: Box<CopyRecord>,
    },
    /// Blocks marked: told when asked, and outside a session when the first one is marked or the last one goes.
    Dirty {
        /// How many.
        blocks: u64,
    },
    /// Drained, or frozen, or told.
    Drained {
        /// Of the order.
        tag: u64,
    },
    /// A copy is latched as failed.
    CopyFailed {
        /// Which one.
        whose: Whose,
        /// Why.
        errno: i32,
        /// Where, when it has a place.
        range: Option<ByteRange>,
    },
    /// An unreadable block was answered by the peer and rewritten.
    Healed {
        /// Where.
        range: ByteRange,
    },
    /// The resync cannot read this block here and nobody else has it: the pair stays syncing.
    Unreadable {
        /// Where.
        range: ByteRange,
    },
}

/// A volume's facts after start and after every recorded change.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Facts {
    /// The server record found in this volume's superblock (stale ones are outvoted).
    pub server: ServerRecord,
    /// The copy's record.
    pub copy: CopyRecord,
    /// Blocks marked.
    pub dirty_blocks: u64,
    /// Extents that were active at the crash and are now marked whole.
    pub replayed_extents: u64,
}

/// Progress and state for the status page.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Progress {
    /// Bytes to copy when the resync began (and what was added since).
    pub total_bytes: u64,
    /// Bytes still marked.
    pub left_bytes: u64,
    /// Payload sent.
    pub sent_bytes: u64,
    /// Paused by the operator.
    pub paused: bool,
}
