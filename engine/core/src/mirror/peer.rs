//! What the peer asks of this server's disk: replicated writes, resync chunks, reads, flushes.

use super::lock::Access;
use super::volume::{DiskPurpose, Holder, SessionRole, Volume};
use crate::ids::{BufferId, ByteRange, SessionId};
use crate::limits::{COPY_ZERO_MAX_BYTES, REQUEST_MAX_BYTES, ZERO_MAX_BYTES};
use crate::message::{RemoteOutcome, VolumeMessage};
use crate::request::{DiskOpKind, DiskOutcome};
use crate::time::Instant;

/// Errno for a request this server cannot take, as Linux numbers it.
pub(super) const EINVAL: i32 = 22;
const ENOMEM: i32 = 12;

#[derive(Clone, Debug)]
struct PeerOp {
    session: SessionId,
    message: VolumeMessage,
    buffer: Option<BufferId>,
    locked: ByteRange,
    access: Access,
    submitted: bool,
    started: Instant,
}

/// Operations of the peer under way here.
#[derive(Debug, Default)]
pub(super) struct PeerOps {
    slots: Vec<Option<PeerOp>>,
    free: Vec<u32>,
    flushes: Vec<Option<(SessionId, u64, Instant)>>,
}

impl PeerOps {
    pub(super) fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len() + self.flushes.iter().flatten().count()
    }

    /// When the oldest one began.
    pub(super) fn oldest(&self) -> Option<Instant> {
        let ops = self.slots.iter().flatten().filter(|op| op.submitted).map(|op| op.started);
        ops.chain(self.flushes.iter().flatten().map(|f| f.2)).min()
    }

    fn insert(&mut self, op: PeerOp) -> u32 {
        if let Some(slot) = self.free.pop() {
            self.slots[slot as usize] = Some(op);
            return slot;
        }
        self.slots.push(Some(op));
        u32::try_from(self.slots.len() - 1).expect("the link's credit bounds the peer's operations")
    }

    fn remove(&mut self, slot: u32) -> Option<PeerOp> {
        let op = self.slots.get_mut(slot as usize)?.take()?;
        self.free.push(slot);
        Some(op)
    }
}

impl Volume {
    pub(super) fn on_peer_op(
        &mut self,
        session: SessionId,
        message: VolumeMessage,
        buffer: Option<BufferId>,
    ) {
        let Some((range, access)) = self.acceptable(&message, buffer) else {
            let errno = if buffer.is_none() { ENOMEM } else { EINVAL };
            self.answer_peer(&message, RemoteOutcome::Failed { errno }, None);
            return self.release(buffer);
        };
        if let Some(errno) = self.failed {
            self.answer_peer(&message, RemoteOutcome::Failed { errno }, None);
            return self.release(buffer);
        }
        if self.joined.is_some_and(|j| j.role == SessionRole::Host) {
            return self.on_front_op(session, &message, buffer, access);
        }
        let locked = self.widen(range);
        let op = PeerOp { session, message, buffer, locked, access, submitted: false, started: self.now };
        let slot = self.peers.insert(op);
        if self.locks.acquire(locked, access, Holder::Peer(slot)) {
            self.peer_locked(slot);
        }
    }

    /// The range of an operation that this side may take now: a target takes writes and chunks, a source or a
    /// target answers reads. Anything else is a fault of the peer and gets an error, nothing is written.
    fn acceptable(&self, message: &VolumeMessage, buffer: Option<BufferId>) -> Option<(ByteRange, Access)> {
        let is_target = self.joined.is_some_and(|j| match j.role {
            SessionRole::Target | SessionRole::Host => true,
            SessionRole::Source => false,
        });
        let size = self.copy().map_or(0, |c| c.size_bytes);
        let within = |range: ByteRange, longest: u64| {
            range.length_bytes > 0 && range.length_bytes <= longest && range.end_bytes() <= size
        };
        let fits = |range: ByteRange| within(range, REQUEST_MAX_BYTES);
        match *message {
            VolumeMessage::Write { range, .. } | VolumeMessage::Copy { range, .. } => {
                (is_target && buffer.is_some() && fits(range)).then_some((range, Access::Exclusive))
            }
            VolumeMessage::Zero { range, .. } => {
                (is_target && within(range, ZERO_MAX_BYTES)).then_some((range, Access::Exclusive))
            }
            VolumeMessage::CopyZero { range, .. } => {
                (is_target && within(range, COPY_ZERO_MAX_BYTES)).then_some((range, Access::Exclusive))
            }
            VolumeMessage::Read { range, .. } => {
                (is_target && buffer.is_some() && fits(range)).then_some((range, Access::Shared))
            }
            VolumeMessage::Ack { .. }
            | VolumeMessage::Flush { .. }
            | VolumeMessage::FlushAck { .. }
            | VolumeMessage::CopyAck { .. }
            | VolumeMessage::ReadReply { .. }
            | VolumeMessage::MarksPage { .. }
            | VolumeMessage::MarksEnd { .. }
            | VolumeMessage::MarksAck { .. }
            | VolumeMessage::SyncDone { .. }
            | VolumeMessage::SyncAck { .. } => None,
        }
    }

    pub(super) fn peer_locked(&mut self, slot: u32) {
        let now = self.now;
        let Some(op) = self.peers.slots.get_mut(slot as usize).and_then(Option::as_mut) else {
            return;
        };
        op.submitted = true;
        op.started = now;
        let buffer = op.buffer;
        let kind = match (&op.message, buffer) {
            (&VolumeMessage::Write { range, fua, .. }, Some(buffer)) => {
                DiskOpKind::Write { range, buffer, fua }
            }
            (&VolumeMessage::Copy { range, .. }, Some(buffer)) => {
                DiskOpKind::Write { range, buffer, fua: false }
            }
            (&VolumeMessage::Zero { range, may_unmap, fua, .. }, _) => {
                DiskOpKind::Zero { range, may_unmap, fua }
            }
            (&VolumeMessage::CopyZero { range, .. }, _) => {
                DiskOpKind::Zero { range, may_unmap: true, fua: false }
            }
            (&VolumeMessage::Read { range, .. }, Some(buffer)) => DiskOpKind::Read { range, buffer },
            (other, _) => {
                debug_assert!(false, "{other:?} passed `acceptable`");
                return;
            }
        };
        self.disk(DiskPurpose::Peer(slot), kind);
    }

    pub(super) fn on_peer_disk(&mut self, slot: u32, outcome: &DiskOutcome) {
        let Some(op) = self.peers.remove(slot) else {
            return;
        };
        self.locks.release(op.locked, op.access, &mut self.granted);
        let result = match outcome {
            DiskOutcome::Done | DiskOutcome::Bytes(_) | DiskOutcome::Zeroes { .. } => RemoteOutcome::Done,
            DiskOutcome::Failed { errno } => {
                if op.access == Access::Exclusive {
                    self.fail_mine(*errno, Some(op.locked));
                }
                RemoteOutcome::Failed { errno: *errno }
            }
        };
        if self.joined.is_some_and(|j| j.session == op.session) {
            self.answer_peer(&op.message, result, op.buffer);
        }
        self.release(op.buffer);
    }

    pub(super) fn answer_peer(
        &mut self,
        message: &VolumeMessage,
        outcome: RemoteOutcome,
        buffer: Option<BufferId>,
    ) {
        match *message {
            VolumeMessage::Write { seq, .. } | VolumeMessage::Zero { seq, .. } => {
                self.send(VolumeMessage::Ack { seq, outcome }, None);
            }
            VolumeMessage::Copy { id, .. } | VolumeMessage::CopyZero { id, .. } => {
                self.send(VolumeMessage::CopyAck { id, outcome }, None);
            }
            VolumeMessage::Read { id, range } => {
                let payload = if outcome == RemoteOutcome::Done { buffer } else { None };
                self.send(VolumeMessage::ReadReply { id, range, outcome }, payload);
            }
            VolumeMessage::Ack { .. }
            | VolumeMessage::Flush { .. }
            | VolumeMessage::FlushAck { .. }
            | VolumeMessage::CopyAck { .. }
            | VolumeMessage::ReadReply { .. }
            | VolumeMessage::MarksPage { .. }
            | VolumeMessage::MarksEnd { .. }
            | VolumeMessage::MarksAck { .. }
            | VolumeMessage::SyncDone { .. }
            | VolumeMessage::SyncAck { .. } => {}
        }
    }

    /// The peer's flush: covers every operation acknowledged so far.
    pub(super) fn on_peer_flush(&mut self, session: SessionId, id: u64) {
        if let Some(errno) = self.failed {
            return self.send(VolumeMessage::FlushAck { id, outcome: RemoteOutcome::Failed { errno } }, None);
        }
        let place = self.peers.flushes.iter().position(Option::is_none);
        let slot = place.unwrap_or_else(|| {
            self.peers.flushes.push(None);
            self.peers.flushes.len() - 1
        });
        self.peers.flushes[slot] = Some((session, id, self.now));
        let slot = u32::try_from(slot).expect("the link's credit bounds the peer's flushes");
        self.disk(DiskPurpose::PeerFlush(slot), DiskOpKind::Flush);
    }

    pub(super) fn on_peer_flush_disk(&mut self, slot: u32, outcome: &DiskOutcome) {
        let Some((session, id, _)) = self.peers.flushes.get_mut(slot as usize).and_then(Option::take) else {
            return;
        };
        let outcome = match outcome {
            DiskOutcome::Done | DiskOutcome::Bytes(_) | DiskOutcome::Zeroes { .. } => RemoteOutcome::Done,
            DiskOutcome::Failed { errno } => {
                self.fail_mine(*errno, None);
                RemoteOutcome::Failed { errno: *errno }
            }
        };
        if self.joined.is_some_and(|j| j.session == session) {
            self.send(VolumeMessage::FlushAck { id, outcome }, None);
        }
    }

    /// The session is over: operations that wait for their range are dropped, those on the disk end quietly.
    pub(super) fn peers_lose_session(&mut self) {
        for slot in 0..self.peers.slots.len() {
            let waiting = self.peers.slots[slot].as_ref().is_some_and(|op| !op.submitted);
            let slot = u32::try_from(slot).expect("the link's credit bounds the peer's operations");
            if waiting
                && self.locks.cancel(Holder::Peer(slot), &mut self.granted)
                && let Some(op) = self.peers.remove(slot)
            {
                self.release(op.buffer);
            }
        }
    }
}
