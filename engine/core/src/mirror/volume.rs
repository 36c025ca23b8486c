//! The machine of one volume: what it knows, and where each input goes.

use std::collections::VecDeque;
use std::time::Duration;

use super::api::{Action, Exposure, Facts, Input, Order, Progress, Report, ServeMode, Whose};
use super::client::ClientOps;
use super::copy::Copying;
use super::flush::FlushState;
use super::lock::RangeLocks;
use super::peer::PeerOps;
use super::record::Recording;
use super::start::Starting;
use super::target::Taking;
use crate::dirty_log::{DirtyLog, MetaOp};
use crate::format::record::{CopyRecord, CopyState, ServerRecord};
use crate::format::superblock::Superblock;
use crate::ids::{BootId, BufferId, ByteRange, DiskOpId, Proven, Sequence, SessionId};
use crate::message::VolumeMessage;
use crate::request::{DiskOp, DiskOpKind, DiskOutcome, RequestError};
use crate::time::Instant;

/// What never changes while the process lives.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VolumeConfig {
    /// This boot: a change since the last record means lost memory (G10).
    pub boot_id: BootId,
    /// Buffers of `limits::COPY_CHUNK_BYTES` each, of a block where that is more, for resync chunks; the core hands them
    /// about by id.
    pub copy_buffers: Vec<BufferId>,
    /// An operation unanswered this long, here or there, counts as a failed copy.
    pub stall: Duration,
    /// The capacity of the backing as it is now, to see a changed size.
    pub capacity_bytes: u64,
}

/// Bytes of a block of metadata.
const META_BLOCK_BYTES: u64 = 4096;

/// Who holds a range lock or waits for one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Holder {
    Client(u32),
    Peer(u32),
    Copy(u32),
}

/// Whether and how requests complete.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Serve {
    /// No request is taken.
    Closed,
    /// See [`ServeMode`].
    Open(ServeMode),
    /// Requests are kept, nothing completes.
    Frozen,
}

/// The session this volume takes part in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Joined {
    pub(super) session: SessionId,
    pub(super) role: SessionRole,
}

/// What this side does in the session.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum SessionRole {
    Source,
    Target,
    /// Serves alone; the peer forwards its clients' requests.
    Host,
}

/// An operation of the dirty log under way.
#[derive(Clone, Copy, Debug)]
pub(super) struct LogOp {
    /// The log's name for it.
    op: u64,
    offset_bytes: u64,
    pub(super) started: Instant,
}

/// What a finished disk operation belongs to; the kind sits in the id's top byte, a slot below it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum DiskPurpose {
    Client(u32),
    Heal(u32),
    Peer(u32),
    CopyRead(u32),
    Flush(u32),
    PeerFlush(u32),
    Log(u32),
    Super,
    SuperRead,
    /// Where the next data is, asked in this round of copying.
    Seek(u32),
}

impl DiskPurpose {
    const fn id(self) -> DiskOpId {
        let (kind, slot) = match self {
            Self::Client(slot) => (1, slot),
            Self::Heal(slot) => (2, slot),
            Self::Peer(slot) => (3, slot),
            Self::CopyRead(slot) => (4, slot),
            Self::Flush(slot) => (5, slot),
            Self::PeerFlush(slot) => (6, slot),
            Self::Log(slot) => (7, slot),
            Self::Super => (8, 0),
            Self::SuperRead => (9, 0),
            Self::Seek(round) => (10, round),
        };
        DiskOpId((kind << 56) | slot as u64)
    }

    pub(super) const fn of(id: DiskOpId) -> Option<Self> {
        let slot = (id.0 & 0xffff_ffff) as u32;
        match id.0 >> 56 {
            1 => Some(Self::Client(slot)),
            2 => Some(Self::Heal(slot)),
            3 => Some(Self::Peer(slot)),
            4 => Some(Self::CopyRead(slot)),
            5 => Some(Self::Flush(slot)),
            6 => Some(Self::PeerFlush(slot)),
            7 => Some(Self::Log(slot)),
            8 => Some(Self::Super),
            9 => Some(Self::SuperRead),
            10 => Some(Self::Seek(slot)),
            _ => None,
        }
    }
}

/// One mirrored volume on one server.
#[derive(Debug)]
pub struct Volume {
    pub(super) config: VolumeConfig,
    pub(super) now: Instant,
    pub(super) actions: VecDeque<Action>,
    pub(super) start: Starting,
    /// The durable superblock, once read.
    pub(super) superblock: Option<Superblock>,
    pub(super) recording: Recording,
    pub(super) log: Option<DirtyLog>,
    pub(super) serve: Serve,
    pub(super) epoch: u64,
    pub(super) lease_until: Instant,
    pub(super) joined: Option<Joined>,
    /// The session this volume took part in last.
    pub(super) left: Option<SessionId>,
    /// What the peer said in a session that this side was not yet told to join.
    pub(super) early: VecDeque<(SessionId, VolumeMessage, Option<BufferId>)>,
    pub(super) locks: RangeLocks<Holder>,
    /// Holders whose turn came; drained before `handle` returns.
    pub(super) granted: Vec<Holder>,
    pub(super) clients: ClientOps,
    pub(super) peers: PeerOps,
    pub(super) flushes: FlushState,
    pub(super) copying: Copying,
    pub(super) taking: Taking,
    /// The local copy is latched: errno of the first failure.
    pub(super) failed: Option<i32>,
    /// The peer's copy failed in this session; nothing more is expected from it.
    pub(super) peer_failed: bool,
    /// Metadata operations under way.
    pub(super) log_slots: Vec<Option<LogOp>>,
    /// When stalls are looked for next.
    pub(super) stall_check: Option<Instant>,
    pub(super) bad_blocks: u32,
    /// What the server machine was last told: whether anything is marked.
    told_marked: bool,
}

impl Volume {
    /// A volume that begins by reading its superblock.
    pub fn new(config: VolumeConfig) -> Self {
        let copy_buffers = config.copy_buffers.clone();
        let mut volume = Self {
            config,
            now: Instant::default(),
            actions: VecDeque::new(),
            start: Starting::ReadingSuperblock,
            superblock: None,
            recording: Recording::default(),
            log: None,
            serve: Serve::Closed,
            epoch: 0,
            lease_until: Instant::default(),
            joined: None,
            left: None,
            early: VecDeque::new(),
            locks: RangeLocks::new(),
            granted: Vec::new(),
            clients: ClientOps::default(),
            peers: PeerOps::default(),
            flushes: FlushState::default(),
            copying: Copying::new(copy_buffers),
            taking: Taking::default(),
            failed: None,
            peer_failed: false,
            log_slots: Vec::new(),
            stall_check: None,
            bad_blocks: 0,
            told_marked: false,
        };
        volume.begin_start();
        volume
    }

    /// Takes one input in. Afterwards [`Self::poll_action`] gives what is to be done.
    pub fn handle(&mut self, now: Instant, input: Input) {
        self.now = self.now.max(now);
        match input {
            Input::Request(request) => self.on_request(request),
            Input::Disk(id, outcome) => self.on_disk(id, outcome),
            Input::Message(session, message, buffer) => self.on_message(session, message, buffer),
            Input::Order(order) => self.on_order(order),
            Input::Time => self.on_time(),
        }
        self.pump();
        self.tell_marked();
        self.check_invariants();
    }

    /// Whether a copy that is alone has blocks of its own decides who copies to whom (D5): the server machine
    /// always knows. In a session it asks where it needs to know.
    fn tell_marked(&mut self) {
        // Asked after every input, alone: no sum over the active extents.
        let marked = || self.log.as_ref().is_some_and(DirtyLog::has_dirty_blocks);
        if self.joined.is_none() && self.told_marked != marked() {
            self.tell_marks();
        }
    }

    fn tell_marks(&mut self) {
        let blocks = self.dirty_blocks();
        self.told_marked = blocks > 0;
        self.report(Report::Dirty { blocks });
    }

    /// The next thing the shell must do.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// When to call again with [`Input::Time`] if nothing else happens.
    pub fn next_deadline(&self) -> Option<Instant> {
        [self.idle_deadline(), self.stall_deadline(), self.copy_deadline(), self.cool_deadline()]
            .into_iter()
            .flatten()
            .min()
    }

    /// The server machine's lease: mirrored requests complete only before this (W4).
    pub fn set_lease(&mut self, now: Instant, until: Instant) {
        let renewed = until > self.lease_until;
        self.lease_until = until;
        // Without work for it time stands still: a deadline passes only where the pump sees it pass.
        if renewed && !self.clients.lease_wait.is_empty() {
            self.now = self.now.max(now);
            let waiting = std::mem::take(&mut self.clients.lease_wait);
            for slot in waiting {
                self.finish_client(slot);
            }
            self.pump();
        }
    }

    /// Some request is done but for the lease.
    pub fn waits_for_lease(&self) -> bool {
        !self.clients.lease_wait.is_empty()
    }

    /// The copy's durable record, once read.
    pub fn copy(&self) -> Option<&CopyRecord> {
        self.superblock.as_ref().map(|s| &s.copy)
    }

    /// The server record in this volume's superblock.
    pub fn server_record(&self) -> Option<&ServerRecord> {
        self.superblock.as_ref().map(|s| &s.server)
    }

    /// State of the copy, a latched failure included.
    pub fn copy_state(&self) -> Option<CopyState> {
        match self.failed {
            Some(_) => Some(CopyState::Failed),
            None => self.copy().map(|c| c.state),
        }
    }

    /// Blocks marked as possibly different.
    pub fn dirty_blocks(&self) -> u64 {
        self.log.as_ref().map_or(0, DirtyLog::dirty_blocks)
    }

    /// Extents in the activity log now.
    pub fn active_extents(&self) -> usize {
        self.log.as_ref().map_or(0, DirtyLog::active_extents)
    }

    /// The dirty log, for checkers.
    pub const fn dirty_log(&self) -> Option<&DirtyLog> {
        self.log.as_ref()
    }

    /// Client requests in flight.
    pub fn requests_in_flight(&self) -> usize {
        self.clients.len()
    }

    /// Progress of the resync, if this side is its source.
    pub fn progress(&self) -> Option<Progress> {
        self.copying.progress(self.dirty_blocks() * self.block_bytes())
    }

    /// The size clients see; 0 while blank or not loaded.
    pub fn size_bytes(&self) -> u64 {
        match self.copy() {
            Some(copy) if copy.state != CopyState::Blank => copy.size_bytes,
            Some(_) | None => 0,
        }
    }

    /// The facts for the server machine.
    pub fn facts(&self) -> Option<Facts> {
        let superblock = self.superblock.as_ref()?;
        let mut copy = superblock.copy.clone();
        if self.failed.is_some() {
            copy.state = CopyState::Failed;
        }
        Some(Facts {
            server: superblock.server.clone(),
            copy,
            dirty_blocks: self.dirty_blocks(),
            replayed_extents: self.log.as_ref().map_or(0, DirtyLog::replayed_extents),
        })
    }

    pub(super) fn block_bytes(&self) -> u64 {
        self.copy().map_or(u64::from(crate::limits::BLOCK_BYTES), |c| u64::from(c.block_bytes))
    }

    /// The range widened to whole blocks: what is locked and marked.
    pub(super) fn widen(&self, range: ByteRange) -> ByteRange {
        let block = self.block_bytes();
        let start = range.offset_bytes / block * block;
        let end = range.end_bytes().div_ceil(block) * block;
        ByteRange::new(start, end - start)
    }

    pub(super) fn report(&mut self, report: Report) {
        self.actions.push_back(Action::Report(report));
    }

    pub(super) fn disk(&mut self, purpose: DiskPurpose, kind: DiskOpKind) {
        self.actions.push_back(Action::Disk(DiskOp { id: purpose.id(), kind }));
    }

    pub(super) fn send(&mut self, message: VolumeMessage, buffer: Option<BufferId>) {
        if let Some(joined) = self.joined {
            self.actions.push_back(Action::Send(joined.session, message, buffer));
        }
    }

    pub(super) fn is_source(&self) -> bool {
        self.joined.is_some_and(|j| j.role == SessionRole::Source)
    }

    /// A replicated operation can be sent now.
    pub(super) fn can_replicate(&self) -> bool {
        self.is_source() && !self.peer_failed
    }

    /// Latches this server's copy. Only the first failure is reported.
    pub(super) fn fail_mine(&mut self, errno: i32, range: Option<ByteRange>) {
        if self.failed.is_none() {
            self.failed = Some(errno);
            self.copying.stop();
            self.report(Report::CopyFailed { whose: Whose::Mine, errno, range });
        }
    }

    /// The peer said that its copy failed.
    pub(super) fn fail_peer(&mut self, errno: i32, range: Option<ByteRange>) {
        if !self.peer_failed {
            self.peer_failed = true;
            self.copying.stop();
            self.report(Report::CopyFailed { whose: Whose::Peers, errno, range });
        }
    }

    fn on_disk(&mut self, id: DiskOpId, outcome: DiskOutcome) {
        let Some(purpose) = DiskPurpose::of(id) else {
            debug_assert!(false, "a completion of nobody's operation");
            return;
        };
        match purpose {
            DiskPurpose::Client(slot) => self.on_client_disk(slot, &outcome),
            DiskPurpose::Heal(slot) => self.on_heal_written(slot, &outcome),
            DiskPurpose::Peer(slot) => self.on_peer_disk(slot, &outcome),
            DiskPurpose::CopyRead(slot) => self.on_copy_read(slot, &outcome),
            DiskPurpose::Flush(slot) => self.on_flush_disk(slot, &outcome),
            DiskPurpose::PeerFlush(slot) => self.on_peer_flush_disk(slot, &outcome),
            DiskPurpose::Log(slot) => self.on_log_disk(slot, outcome),
            DiskPurpose::Super => self.on_record_disk(&outcome),
            DiskPurpose::SuperRead => self.on_superblock_read(outcome),
            DiskPurpose::Seek(round) => self.on_seek(round, &outcome),
        }
    }

    fn on_log_disk(&mut self, slot: u32, outcome: DiskOutcome) {
        let op = self.log_slots.get_mut(slot as usize).and_then(Option::take);
        let (Some(LogOp { op, offset_bytes, started: _ }), Some(log)) = (op, self.log.as_mut()) else {
            return;
        };
        let result = match outcome {
            DiskOutcome::Done | DiskOutcome::Zeroes { .. } => Ok(Vec::new()),
            DiskOutcome::Bytes(bytes) => Ok(bytes),
            DiskOutcome::Failed { errno } => Err(errno),
        };
        log.op_done(op, result);
        if let Some(errno) = log.failed() {
            self.fail_mine(errno, Some(ByteRange::new(offset_bytes, META_BLOCK_BYTES)));
            self.fail_waiting();
        }
    }

    fn on_message(&mut self, session: SessionId, message: VolumeMessage, buffer: Option<BufferId>) {
        if self.joined.is_none_or(|j| j.session != session) {
            return self.keep_early(session, message, buffer);
        }
        match message {
            VolumeMessage::Write { .. }
            | VolumeMessage::Zero { .. }
            | VolumeMessage::Copy { .. }
            | VolumeMessage::CopyZero { .. }
            | VolumeMessage::Read { .. } => self.on_peer_op(session, message, buffer),
            VolumeMessage::Flush { id } => self.on_peer_flush(session, id),
            VolumeMessage::Ack { seq, outcome } => self.on_ack(seq, outcome),
            VolumeMessage::FlushAck { id, outcome } => self.on_flush_ack(id, outcome),
            VolumeMessage::CopyAck { id, outcome } => self.on_copy_ack(id, outcome),
            VolumeMessage::ReadReply { id, range, outcome } => self.on_read_reply(id, range, outcome, buffer),
            VolumeMessage::MarksPage { index, bits } => self.on_marks_page(index, bits),
            VolumeMessage::MarksEnd { pages } => self.on_marks_end(pages),
            VolumeMessage::MarksAck { pages } => self.on_marks_ack(pages),
            VolumeMessage::SyncDone { generation, history, proven } => {
                self.on_sync_done(generation, history, proven);
            }
            VolumeMessage::SyncAck { outcome } => self.on_sync_ack(outcome),
        }
    }

    /// The peer took part before this side was told to: what it says waits for [`Order::Join`]. The link's
    /// credit bounds how much that is.
    fn keep_early(&mut self, session: SessionId, message: VolumeMessage, buffer: Option<BufferId>) {
        if self.left == Some(session) {
            return self.release(buffer);
        }
        if self.early.front().is_some_and(|(earlier, _, _)| *earlier != session) {
            self.drop_early();
        }
        self.early.push_back((session, message, buffer));
    }

    /// This side takes part from now on: hear what the peer said meanwhile.
    pub(super) fn hear_early(&mut self, session: SessionId) {
        for (said_in, message, buffer) in std::mem::take(&mut self.early) {
            if said_in == session {
                self.on_message(session, message, buffer);
            } else {
                self.release(buffer);
            }
        }
    }

    /// What was said early in a session that is over.
    pub(super) fn drop_early(&mut self) {
        for (_, _, buffer) in std::mem::take(&mut self.early) {
            self.release(buffer);
        }
    }

    fn on_order(&mut self, order: Order) {
        match order {
            Order::Record { tag, server, change, preflush } => {
                self.order_record(tag, server, change, preflush);
            }
            Order::Join { session, part, resume } => {
                self.join(session, part, resume);
                self.hear_early(session);
            }
            Order::Leave => self.leave(),
            Order::Host { session } => self.host(session),
            Order::Serve { mode, epoch } => self.open(mode, epoch),
            Order::Freeze { tag } => {
                self.freeze();
                if let Some(tag) = tag {
                    self.report(Report::Drained { tag });
                }
            }
            Order::Drain { tag } => self.begin_drain(tag),
            Order::Close => self.close(),
            Order::Return { tag, server } => self.begin_return(tag, server),
            Order::TellMarks { tag } => {
                self.tell_marks();
                self.report(Report::Drained { tag });
            }
            Order::Pace(pace) => self.copying.set_pace(self.now, pace),
            Order::Fail { errno } => self.fail_mine(errno, None),
        }
    }

    fn on_time(&mut self) {
        self.check_stalls();
        self.check_idle();
        self.check_cold();
    }

    /// Lets every part go on as far as it can. Ends when nothing moves any more.
    fn pump(&mut self) {
        loop {
            let mut moved = false;
            while let Some(holder) = self.granted.pop() {
                moved = true;
                match holder {
                    Holder::Client(slot) => self.client_locked(slot),
                    Holder::Peer(slot) => self.peer_locked(slot),
                    Holder::Copy(slot) => self.copy_locked(slot),
                }
            }
            moved |= self.pump_start();
            moved |= self.pump_records();
            moved |= self.pump_flushes();
            moved |= self.pump_marks();
            moved |= self.pump_copy();
            // Last: the others make the log ask for pages, and nothing else may ever wake this volume.
            moved |= self.pump_log();
            if !moved {
                return;
            }
        }
    }

    /// Metadata operations of the dirty log go to the disk; tickets whose extents are durable go on.
    fn pump_log(&mut self) -> bool {
        let mut moved = false;
        while let Some((op, meta)) = self.log.as_mut().and_then(DirtyLog::poll_op) {
            moved = true;
            let slot = match self.log_slots.iter().position(Option::is_none) {
                Some(slot) => slot,
                None => {
                    self.log_slots.push(None);
                    self.log_slots.len() - 1
                }
            };
            let (MetaOp::Read { offset_bytes, .. } | MetaOp::Write { offset_bytes, .. }) = meta;
            self.log_slots[slot] = Some(LogOp { op, offset_bytes, started: self.now });
            let slot = u32::try_from(slot).expect("fewer than 2^32 metadata operations are in flight");
            let kind = match meta {
                MetaOp::Read { offset_bytes, length_bytes } => {
                    DiskOpKind::MetaRead { offset_bytes, length_bytes }
                }
                MetaOp::Write { offset_bytes, bytes } => {
                    DiskOpKind::MetaWrite { offset_bytes, bytes, preflush: false }
                }
            };
            self.disk(DiskPurpose::Log(slot), kind);
        }
        while let Some(ticket) = self.log.as_mut().and_then(DirtyLog::poll_ready) {
            moved = true;
            self.client_logged(ticket);
        }
        moved
    }

    pub(super) fn release(&mut self, buffer: Option<BufferId>) {
        if let Some(buffer) = buffer {
            self.actions.push_back(Action::Release(buffer));
        }
    }

    pub(super) fn expose(&mut self, exposure: Exposure) {
        self.actions.push_back(Action::Exposure(exposure));
    }

    pub(super) fn complete(&mut self, id: crate::ids::RequestId, result: Result<(), RequestError>) {
        self.actions.push_back(Action::Complete(id, result));
    }

    /// How far both copies are proven if a flush issued now completes on both.
    pub(super) fn proven_now(&self) -> Proven {
        Proven { epoch: self.epoch, seq: self.clients.settled_sequence() }
    }

    /// The next replicated operation's number.
    pub(super) fn next_sequence(&mut self) -> Sequence {
        self.clients.last_sequence = Sequence(self.clients.last_sequence.0 + 1);
        self.clients.last_sequence
    }

    /// What must hold after every input, in release builds too: a broken rule stops the process before it
    /// can write anything wrong.
    fn check_invariants(&self) {
        match self.serve {
            Serve::Closed => {}
            Serve::Open(_) | Serve::Frozen => {
                let usable = self.copy().is_some_and(|c| c.state == CopyState::UpToDate);
                assert!(usable, "P6: serving from a copy that is not up to date");
                assert!(
                    self.joined.is_none_or(|j| j.role != SessionRole::Target),
                    "a server that serves is not a target"
                );
            }
        }
    }
}
