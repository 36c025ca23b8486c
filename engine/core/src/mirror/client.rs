//! Clients' requests: lock, mark, both copies, completion.

use std::collections::HashMap;

use super::api::{Exposure, ServeMode};
use super::flush::PEER_FLUSH;
use super::front::Forwarded;
use super::lock::Access;
use super::volume::{DiskPurpose, Holder, Serve, Volume};
use crate::dirty_log::{DirtyLog, FlushMark, Ticket, WriteEnd};
use crate::ids::{BufferId, ByteRange, Proven, RequestId, Sequence};
use crate::limits::{REQUEST_MAX_BYTES, REQUESTS_MAX, ZERO_MAX_BYTES};
use crate::message::{RemoteOutcome, VolumeMessage};
use crate::request::{DiskOpKind, DiskOutcome, Request, RequestError, RequestOp};
use crate::time::Instant;

/// One copy's part of an operation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Leg {
    /// Not asked.
    None,
    Pending,
    Done,
    Failed,
    /// The session ended before the answer came.
    Lost,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Stage {
    /// Waits for its range.
    Lock,
    /// Waits for its extents to be durable in the activity log.
    Log,
    /// Under way on the copies.
    Running,
    /// Reads only: the local block is bad, the peer was asked; then the block is rewritten.
    Healing,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct ClientOp {
    pub(super) id: RequestId,
    pub(super) op: RequestOp,
    /// What is locked and marked: whole blocks. Empty for a flush.
    pub(super) range: ByteRange,
    pub(super) stage: Stage,
    pub(super) seq: Sequence,
    pub(super) local: Leg,
    pub(super) remote: Leg,
    /// Of a flush that goes to both copies: what it covers.
    pub(super) mark: Option<(FlushMark, Proven)>,
    /// Its extents were begun in the activity log.
    pub(super) logged: bool,
    /// The peer's front asked, not a client of this server.
    pub(super) forwarded: Option<Forwarded>,
    /// The client has its answer; only the disk still owes one.
    pub(super) answered: bool,
    /// When it went on its way to the copies; before that, when it came.
    pub(super) started: Instant,
}

/// The requests in flight.
#[derive(Debug, Default)]
pub(super) struct ClientOps {
    slots: Vec<Option<ClientOp>>,
    free: Vec<u32>,
    by_seq: HashMap<u64, u32>,
    pub(super) last_sequence: Sequence,
    /// Done on both copies, but without a lease.
    pub(super) lease_wait: Vec<u32>,
    /// Came while nothing may complete.
    pub(super) held: Vec<Request>,
    /// No new request is let in for a moment (G6 step 3).
    pub(super) gate: bool,
    /// Writes that wait for their extents to be durable in the activity log.
    pub(super) waiting_for_log: usize,
    /// When the last request came or ended.
    pub(super) last_use: Instant,
}

impl ClientOps {
    pub(super) const fn len(&self) -> usize {
        self.slots.len() - self.free.len() + self.held.len()
    }

    /// Operations that were let in and did not end.
    pub(super) const fn running(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    pub(super) fn get(&self, slot: u32) -> Option<&ClientOp> {
        self.slots.get(slot as usize).and_then(Option::as_ref)
    }

    pub(super) fn get_mut(&mut self, slot: u32) -> Option<&mut ClientOp> {
        self.slots.get_mut(slot as usize).and_then(Option::as_mut)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (u32, &ClientOp)> {
        (0u32..).zip(&self.slots).filter_map(|(slot, op)| op.as_ref().map(|op| (slot, op)))
    }

    pub(super) fn insert(&mut self, op: ClientOp) -> u32 {
        if let Some(slot) = self.free.pop() {
            self.slots[slot as usize] = Some(op);
            return slot;
        }
        self.slots.push(Some(op));
        u32::try_from(self.slots.len() - 1).expect("REQUESTS_MAX bounds the table")
    }

    fn remove(&mut self, slot: u32) -> Option<ClientOp> {
        let op = self.slots.get_mut(slot as usize)?.take()?;
        self.free.push(slot);
        if op.seq.0 != 0 {
            self.by_seq.remove(&op.seq.0);
        }
        Some(op)
    }

    /// The peer's answer to this sequence is this operation's.
    pub(super) fn number(&mut self, slot: u32, seq: Sequence) {
        self.by_seq.insert(seq.0, slot);
    }

    /// Every operation up to this sequence has ended.
    pub(super) fn settled_sequence(&self) -> Sequence {
        self.by_seq.keys().min().map_or(self.last_sequence, |first| Sequence(first - 1))
    }
}

/// False only in a build made to measure what the dirty log costs: it loses track of what differs.
const LOGGED: bool = !cfg!(feature = "no-dirty-log");

impl Volume {
    pub(super) fn on_request(&mut self, request: Request) {
        self.clients.last_use = self.now;
        if self.serve == Serve::Closed || self.flushes.is_draining() {
            return self.complete(request.id, Err(RequestError::NotServing));
        }
        if let Err(error) = self.check_request(&request) {
            return self.complete(request.id, Err(error));
        }
        if self.clients.len() >= REQUESTS_MAX {
            return self.complete(request.id, Err(RequestError::TooMany));
        }
        if self.serve == Serve::Frozen || self.clients.gate {
            self.clients.held.push(request);
            return;
        }
        self.admit(request);
    }

    fn check_request(&self, request: &Request) -> Result<(), RequestError> {
        let Some(range) = request.op.range() else {
            return Ok(());
        };
        let Some(copy) = self.copy() else {
            return Err(RequestError::NotServing);
        };
        let sector = u64::from(copy.sector_bytes);
        let longest = match request.op {
            RequestOp::Read { .. } | RequestOp::Write { .. } | RequestOp::Flush => REQUEST_MAX_BYTES,
            RequestOp::Zero { .. } => ZERO_MAX_BYTES,
        };
        let too_long = range.length_bytes > longest;
        if range.length_bytes == 0
            || too_long
            || !range.offset_bytes.is_multiple_of(sector)
            || !range.length_bytes.is_multiple_of(sector)
        {
            return Err(RequestError::Unaligned);
        }
        if range.end_bytes() > copy.size_bytes {
            return Err(RequestError::PastEnd);
        }
        Ok(())
    }

    fn admit(&mut self, request: Request) {
        let range = request.op.range().map_or(ByteRange::new(0, 0), |r| self.widen(r));
        let op = ClientOp {
            id: request.id,
            op: request.op,
            range,
            stage: Stage::Lock,
            seq: Sequence(0),
            local: Leg::None,
            remote: Leg::None,
            mark: None,
            logged: false,
            forwarded: None,
            answered: false,
            started: self.now,
        };
        let slot = self.clients.insert(op);
        let access = match request.op {
            RequestOp::Flush => return self.run_flush(slot),
            RequestOp::Read { .. } => Access::Shared,
            RequestOp::Write { .. } | RequestOp::Zero { .. } => Access::Exclusive,
        };
        if self.locks.acquire(range, access, Holder::Client(slot)) {
            self.client_locked(slot);
        }
    }

    /// The range is this operation's now.
    pub(super) fn client_locked(&mut self, slot: u32) {
        if self.serve == Serve::Open(ServeMode::Front) {
            return self.forward(slot);
        }
        let now = self.now;
        let Some(op) = self.clients.get_mut(slot) else {
            return;
        };
        match op.op {
            RequestOp::Read { range, buffer } => {
                op.stage = Stage::Running;
                op.started = now;
                op.local = Leg::Pending;
                self.disk(DiskPurpose::Client(slot), DiskOpKind::Read { range, buffer });
            }
            RequestOp::Write { .. } | RequestOp::Zero { .. } => {
                op.stage = Stage::Log;
                let range = op.range;
                if self.has_nobody_left() {
                    return self.end_client(slot, Err(RequestError::Io));
                }
                let begin = |log: &mut DirtyLog| log.begin(Ticket(u64::from(slot)), range);
                let ready = !LOGGED || self.log.as_mut().is_some_and(begin);
                if ready {
                    self.run_write(slot);
                } else {
                    self.clients.waiting_for_log += 1;
                }
            }
            RequestOp::Flush => {}
        }
    }

    /// The log failed while this copy served alone, or serves nobody any more: nothing can be marked, and there is no
    /// peer to ask.
    fn has_nobody_left(&self) -> bool {
        let nobody = match self.serve {
            Serve::Open(ServeMode::Alone) | Serve::Closed => true,
            Serve::Open(ServeMode::Mirrored | ServeMode::Front) | Serve::Frozen => false,
        };
        nobody && self.log.as_ref().is_some_and(|log| log.failed().is_some())
    }

    /// What waits for a failed log with nobody beside it ends with an error, and does not wait for ever.
    pub(super) fn fail_waiting(&mut self) {
        if !self.has_nobody_left() {
            return;
        }
        let waiting = |(_, op): &(u32, &ClientOp)| op.stage == Stage::Log;
        let slots: Vec<u32> = self.clients.iter().filter(waiting).map(|(slot, _)| slot).collect();
        for slot in slots {
            self.clients.waiting_for_log = self.clients.waiting_for_log.saturating_sub(1);
            self.end_client(slot, Err(RequestError::Io));
        }
    }

    /// The extents of a waiting write are durable in the activity log (G1).
    pub(super) fn client_logged(&mut self, ticket: Ticket) {
        if let Ok(slot) = u32::try_from(ticket.0) {
            self.clients.waiting_for_log = self.clients.waiting_for_log.saturating_sub(1);
            // A front forwarded it meanwhile: its failed copy's log says nothing any more.
            if self.clients.get(slot).is_some_and(|op| op.stage == Stage::Log) {
                self.run_write(slot);
            }
        }
    }

    /// Submits to the disk and to the peer. Whether the peer gets it is decided here, not earlier: what does
    /// not go to the peer is marked before it goes to the disk.
    fn run_write(&mut self, slot: u32) {
        let replicate = self.can_replicate();
        let alone = self.serve == Serve::Open(ServeMode::Alone);
        let op_goes_alone = alone && !replicate;
        let seq = self.next_sequence();
        let now = self.now;
        let Some(op) = self.clients.get_mut(slot) else {
            return;
        };
        op.stage = Stage::Running;
        op.started = now;
        op.logged = LOGGED;
        op.seq = seq;
        op.local = Leg::Pending;
        op.remote = match (replicate, alone) {
            (true, _) => Leg::Pending,
            (false, true) => Leg::None,
            // Mirrored or frozen without a session: the peer owes an answer that never came.
            (false, false) => Leg::Lost,
        };
        let (request, range) = (op.op, op.range);
        self.clients.number(slot, seq);
        // Where the peer only owes its answer the active extent is the mark: it may be sent again (D12), and
        // going alone marks what is in flight.
        if LOGGED
            && op_goes_alone
            && let Some(log) = self.log.as_mut()
        {
            log.mark(range);
        }
        let kind = match request {
            RequestOp::Write { range, buffer, fua } => DiskOpKind::Write { range, buffer, fua },
            RequestOp::Zero { range, may_unmap, fua } => DiskOpKind::Zero { range, may_unmap, fua },
            RequestOp::Read { .. } | RequestOp::Flush => return,
        };
        self.disk(DiskPurpose::Client(slot), kind);
        if replicate {
            self.replicate(slot);
        }
    }

    /// Sends a running operation to the peer.
    pub(super) fn replicate(&mut self, slot: u32) {
        let Some(op) = self.clients.get(slot) else {
            return;
        };
        let seq = op.seq;
        match op.op {
            RequestOp::Write { range, buffer, fua } => {
                self.send(VolumeMessage::Write { seq, range, fua }, Some(buffer));
            }
            RequestOp::Zero { range, may_unmap, fua } => {
                self.send(VolumeMessage::Zero { seq, range, may_unmap, fua }, None);
            }
            RequestOp::Flush => self.send(VolumeMessage::Flush { id: client_flush_id(slot) }, None),
            RequestOp::Read { .. } => {}
        }
    }

    /// A client's flush: both copies in a pair era, the own copy alone (F8).
    fn run_flush(&mut self, slot: u32) {
        if self.serve == Serve::Open(ServeMode::Front) {
            return self.forward(slot);
        }
        let mirrored = self.serve == Serve::Open(ServeMode::Mirrored);
        let replicate = self.can_replicate();
        let mark = self.log.as_mut().filter(|_| replicate).map(DirtyLog::flush_issued);
        let proven = self.proven_now();
        let Some(op) = self.clients.get_mut(slot) else {
            return;
        };
        op.stage = Stage::Running;
        op.local = Leg::Pending;
        op.mark = mark.map(|mark| (mark, proven));
        op.remote = match (replicate, mirrored) {
            (true, _) => PEER_FLUSH,
            (false, true) => Leg::Lost,
            (false, false) => Leg::None,
        };
        self.disk(DiskPurpose::Client(slot), DiskOpKind::Flush);
        if replicate && PEER_FLUSH == Leg::Pending {
            self.replicate(slot);
        }
    }

    pub(super) fn on_client_disk(&mut self, slot: u32, outcome: &DiskOutcome) {
        let Some(op) = self.clients.get_mut(slot) else {
            return;
        };
        let range = op.op.range();
        match outcome {
            DiskOutcome::Done | DiskOutcome::Bytes(_) | DiskOutcome::Zeroes { .. } => op.local = Leg::Done,
            DiskOutcome::Failed { errno } => {
                op.local = Leg::Failed;
                match op.op {
                    RequestOp::Read { range, .. } => return self.heal(slot, range),
                    RequestOp::Write { .. } | RequestOp::Zero { .. } | RequestOp::Flush => {
                        self.fail_mine(*errno, range);
                    }
                }
            }
        }
        self.finish_client(slot);
    }

    pub(super) fn on_ack(&mut self, seq: Sequence, outcome: RemoteOutcome) {
        let Some(slot) = self.clients.by_seq.get(&seq.0).copied() else {
            return;
        };
        let Some(op) = self.clients.get_mut(slot) else {
            return;
        };
        let range = op.range;
        if op.remote != Leg::Pending {
            return;
        }
        match outcome {
            RemoteOutcome::Done => op.remote = Leg::Done,
            RemoteOutcome::Failed { errno } => {
                op.remote = Leg::Failed;
                self.lost_on_peer(range);
                self.fail_peer(errno, Some(range));
            }
        }
        self.finish_client(slot);
    }

    /// The peer's copy of this range is not what it should be: mark it.
    fn lost_on_peer(&mut self, range: ByteRange) {
        if range.length_bytes != 0
            && let Some(log) = self.log.as_mut()
        {
            log.mark(range);
        }
    }

    /// Completes the operation if all it needs is there.
    pub(super) fn finish_client(&mut self, slot: u32) {
        let Some(op) = self.clients.get(slot) else {
            return;
        };
        if self.serve == Serve::Open(ServeMode::Front) {
            return self.finish_forwarded(slot);
        }
        if op.stage != Stage::Running || op.local == Leg::Pending {
            return;
        }
        let result = match self.serve {
            Serve::Frozen => return,
            Serve::Closed | Serve::Open(ServeMode::Front) => Err(RequestError::NotServing),
            Serve::Open(ServeMode::Mirrored) => {
                let is_read = matches!(op.op, RequestOp::Read { .. });
                let earned = op.local == Leg::Done && (is_read || op.remote == Leg::Done);
                if !earned {
                    return;
                }
                if self.now >= self.lease_until {
                    self.clients.lease_wait.push(slot);
                    return;
                }
                Ok(())
            }
            Serve::Open(ServeMode::Alone) => {
                if op.remote == Leg::Pending {
                    return;
                }
                if op.local == Leg::Done { Ok(()) } else { Err(RequestError::Io) }
            }
        };
        self.end_client(slot, result);
    }

    /// Ends an operation: dirty log, lock, answer.
    pub(super) fn end_client(&mut self, slot: u32, result: Result<(), RequestError>) {
        let Some(op) = self.clients.remove(slot) else {
            return;
        };
        self.clients.last_use = self.now;
        let both = op.local == Leg::Done && op.remote == Leg::Done;
        match op.op {
            RequestOp::Read { .. } => self.locks.release(op.range, Access::Shared, &mut self.granted),
            RequestOp::Write { .. } | RequestOp::Zero { .. } => {
                if let Some(log) = self.log.as_mut().filter(|_| op.logged) {
                    log.end(op.range, if both { WriteEnd::Both } else { WriteEnd::OnlyHere });
                }
                self.locks.release(op.range, Access::Exclusive, &mut self.granted);
            }
            RequestOp::Flush => self.flush_ended(op.mark, both),
        }
        match op.forwarded {
            Some(forwarded) => self.answer_front(&forwarded, &op, result),
            None if !op.answered => self.complete(op.id, result),
            None => {}
        }
    }

    /// A local read failed: the peer's copy answers and the block is rewritten; without a peer the error goes
    /// to the client and nothing latches.
    fn heal(&mut self, slot: u32, range: ByteRange) {
        let peer_is_good = self.serve != Serve::Open(ServeMode::Alone) && self.can_replicate();
        if !peer_is_good {
            if self.serve == Serve::Frozen {
                // Asked again when the server may serve.
                return;
            }
            return self.end_client(slot, Err(RequestError::Io));
        }
        let now = self.now;
        if let Some(op) = self.clients.get_mut(slot) {
            op.stage = Stage::Healing;
            op.started = now;
            op.remote = Leg::Pending;
        }
        self.send(VolumeMessage::Read { id: u64::from(slot), range }, None);
    }

    /// The peer's content of a block that is bad here.
    pub(super) fn on_read_reply(
        &mut self,
        id: u64,
        range: ByteRange,
        outcome: RemoteOutcome,
        buffer: Option<BufferId>,
    ) {
        let now = self.now;
        let slot = u32::try_from(id).ok();
        let waiting = slot.and_then(|slot| self.clients.get_mut(slot).map(|op| (slot, op)));
        let Some((slot, op)) = waiting else {
            return self.release(buffer);
        };
        let RequestOp::Read { range: wanted, buffer: into } = op.op else {
            return self.release(buffer);
        };
        if self.serve == Serve::Open(ServeMode::Front) && op.remote == Leg::Pending && wanted == range {
            return self.on_forwarded_read(slot, range, into, outcome, buffer);
        }
        if op.stage != Stage::Healing || op.remote != Leg::Pending || wanted != range {
            return self.release(buffer);
        }
        match (outcome, buffer) {
            (RemoteOutcome::Done, Some(from)) => {
                op.remote = Leg::Done;
                op.started = now;
                op.local = Leg::Pending;
                let length_bytes = range.length_bytes;
                self.actions.push_back(super::api::Action::CopyBuffer { from, into, length_bytes });
                self.release(Some(from));
                self.disk(DiskPurpose::Heal(slot), DiskOpKind::Write { range, buffer: into, fua: false });
            }
            (RemoteOutcome::Done | RemoteOutcome::Failed { .. }, buffer) => {
                self.release(buffer);
                self.end_client(slot, Err(RequestError::Io));
            }
        }
    }

    /// The rewrite of a bad block ended.
    pub(super) fn on_heal_written(&mut self, slot: u32, outcome: &DiskOutcome) {
        let Some(op) = self.clients.get_mut(slot) else {
            return;
        };
        let range = op.range;
        op.stage = Stage::Running;
        op.local = Leg::Done;
        match outcome {
            DiskOutcome::Done | DiskOutcome::Bytes(_) | DiskOutcome::Zeroes { .. } => {
                self.bad_blocks += 1;
                self.report(super::api::Report::Healed { range });
                if self.bad_blocks > crate::limits::BAD_BLOCKS_MAX {
                    self.fail_mine(EIO, Some(range));
                }
            }
            DiskOutcome::Failed { errno } => self.fail_mine(*errno, Some(range)),
        }
        self.finish_client(slot);
    }

    /// Requests complete in this mode from now on; what was held goes on.
    pub(super) fn open(&mut self, mode: ServeMode, epoch: u64) {
        if epoch != self.epoch {
            self.epoch = epoch;
            // Operations in flight keep their numbers: they are sent again only within their epoch.
            if self.clients.by_seq.is_empty() {
                self.clients.last_sequence = Sequence(0);
            }
        }
        if mode == ServeMode::Alone && self.joined.is_none() {
            self.forget_peer();
        }
        let was = self.serve;
        self.serve = Serve::Open(mode);
        self.flushes.cancel_drain();
        if was == Serve::Closed {
            self.expose(Exposure::Serving);
        }
        if mode == ServeMode::Front {
            self.begin_front();
        }
        let slots: Vec<u32> = self.clients.iter().map(|(slot, _)| slot).collect();
        for slot in slots {
            self.retry_client(slot);
        }
        self.let_in();
    }

    /// An operation that could not go on while frozen.
    fn retry_client(&mut self, slot: u32) {
        let Some(op) = self.clients.get(slot) else {
            return;
        };
        if let RequestOp::Read { range, .. } = op.op
            && op.stage == Stage::Running
            && op.local == Leg::Failed
            && self.serve != Serve::Open(ServeMode::Front)
        {
            return self.heal(slot, range);
        }
        self.finish_client(slot);
    }

    /// What no session will ever answer is marked: writes in flight and those not yet flushed on both.
    pub(super) fn forget_peer(&mut self) {
        let ranges: Vec<ByteRange> = self
            .clients
            .iter()
            .filter(|(_, op)| op.stage == Stage::Running && op.range.length_bytes != 0)
            .filter(|(_, op)| !matches!(op.op, RequestOp::Read { .. }))
            .map(|(_, op)| op.range)
            .collect();
        if let Some(log) = self.log.as_mut() {
            log.session_lost();
            for range in ranges {
                log.mark(range);
            }
        }
    }

    /// Requests that came while nothing could complete.
    pub(super) fn let_in(&mut self) {
        if self.clients.gate {
            return;
        }
        for request in std::mem::take(&mut self.clients.held) {
            self.admit(request);
        }
    }

    pub(super) fn freeze(&mut self) {
        match self.serve {
            Serve::Open(_) => self.serve = Serve::Frozen,
            Serve::Closed | Serve::Frozen => {}
        }
    }

    /// No request is taken any more; those held are refused. Operations under way end as they can.
    pub(super) fn close(&mut self) {
        if self.serve != Serve::Closed {
            self.serve = Serve::Closed;
            self.expose(Exposure::Refusing);
        }
        self.flushes.cancel_drain();
        self.clients.gate = false;
        for request in std::mem::take(&mut self.clients.held) {
            self.complete(request.id, Err(RequestError::NotServing));
        }
        let slots: Vec<u32> = self.clients.iter().map(|(slot, _)| slot).collect();
        for slot in slots {
            self.abandon_client(slot);
        }
    }

    /// After closing: what is not on the disk's queue ends now with an error, the rest when the disk is done.
    fn abandon_client(&mut self, slot: u32) {
        let Some(op) = self.clients.get_mut(slot) else {
            return;
        };
        if op.remote == Leg::Pending {
            op.remote = Leg::Lost;
        }
        match op.stage {
            Stage::Lock => self.cancel_waiting(slot, RequestError::NotServing),
            // Its extents become active soon; then it runs, is marked, and ends with an error.
            Stage::Log => {}
            Stage::Healing => {
                if op.local != Leg::Pending {
                    self.end_client(slot, Err(RequestError::NotServing));
                }
            }
            Stage::Running => self.finish_client(slot),
        }
    }

    /// Ends a request that still waits for its range.
    pub(super) fn cancel_waiting(&mut self, slot: u32, error: RequestError) {
        if self.locks.cancel(Holder::Client(slot), &mut self.granted)
            && let Some(op) = self.clients.remove(slot)
        {
            match op.forwarded {
                Some(forwarded) => self.answer_front(&forwarded, &op, Err(error)),
                None => self.complete(op.id, Err(error)),
            }
        }
    }

    /// The session is over: what the peer owed is lost.
    pub(super) fn clients_lose_session(&mut self) {
        let slots: Vec<u32> = self.clients.iter().map(|(slot, _)| slot).collect();
        for slot in slots {
            let Some(op) = self.clients.get_mut(slot) else {
                continue;
            };
            if op.remote == Leg::Pending {
                op.remote = Leg::Lost;
                if op.stage == Stage::Healing && op.local == Leg::Failed {
                    op.stage = Stage::Running;
                    op.remote = Leg::None;
                }
            }
            if op.stage == Stage::Running {
                self.retry_client(slot);
            }
        }
    }

    /// D12: every operation whose answer was lost is sent again, in order.
    pub(super) fn resend_clients(&mut self) {
        let mut lost: Vec<(Sequence, u32)> = self
            .clients
            .iter()
            .filter(|(_, op)| op.stage == Stage::Running && op.remote == Leg::Lost)
            .map(|(slot, op)| (op.seq, slot))
            .collect();
        lost.sort_by_key(|(seq, _)| if seq.0 == 0 { u64::MAX } else { seq.0 });
        let proven = self.proven_now();
        for (_, slot) in lost {
            let flush = self.clients.get(slot).filter(|op| op.op == RequestOp::Flush).map(|op| op.mark);
            let mark = match (flush, self.log.as_mut()) {
                (Some(old), Some(log)) => {
                    if let Some((old, _)) = old {
                        log.flush_abandoned(old);
                    }
                    Some(log.flush_issued())
                }
                (None, _) | (_, None) => None,
            };
            if let Some(op) = self.clients.get_mut(slot) {
                op.remote = Leg::Pending;
                op.mark = mark.map(|mark| (mark, proven));
                self.replicate(slot);
            }
        }
    }
}

/// Errno of a device error, as Linux numbers it.
pub(super) const EIO: i32 = 5;

/// Flush ids of clients have the top bit clear, those of the volume's own flushes have it set.
pub(super) const fn client_flush_id(slot: u32) -> u64 {
    slot as u64
}
