//! A front without a disk, and the peer that serves it (G12).
//!
//! The front's copy is failed: every request goes to the peer and completes by the peer's answer. The host
//! serves alone by its own right; what the front forwards is a request like any client's, marked and done on
//! the host's copy only.

use super::api::{Action, ServeMode};
use super::client::{ClientOp, Leg, Stage};
use super::lock::Access;
use super::peer::EINVAL;
use super::volume::{Holder, Joined, Serve, SessionRole, Volume};
use crate::ids::{BufferId, ByteRange, RequestId, Sequence, SessionId};
use crate::message::{RemoteOutcome, VolumeMessage};
use crate::request::{RequestError, RequestOp};

/// Who gets the answer of a forwarded request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Forwarded {
    /// A write or a zero.
    Operation { session: SessionId, seq: Sequence },
    /// A read.
    Read { session: SessionId, id: u64, range: ByteRange },
}

impl Volume {
    /// This server serves alone; the peer's front joins its clients.
    pub(super) fn host(&mut self, session: SessionId) {
        self.leave();
        if self.serve == Serve::Open(ServeMode::Alone) {
            self.joined = Some(Joined { session, role: SessionRole::Host });
        }
    }

    /// The peer serves: what it did not acknowledge is asked for again, in order.
    pub(super) fn begin_front(&mut self) {
        let mut slots: Vec<(Sequence, u32)> = self
            .clients
            .iter()
            .filter(|(_, op)| op.stage != Stage::Lock)
            .map(|(slot, op)| (op.seq, slot))
            .collect();
        slots.sort_by_key(|(seq, _)| if seq.0 == 0 { u64::MAX } else { seq.0 });
        for (_, slot) in slots {
            let done = self
                .clients
                .get(slot)
                .is_some_and(|op| op.remote == Leg::Done && !matches!(op.op, RequestOp::Read { .. }));
            if !done {
                self.forward(slot);
            }
        }
    }

    /// Sends a request to the peer.
    pub(super) fn forward(&mut self, slot: u32) {
        let fresh = self.clients.get(slot).is_some_and(|op| op.seq.0 == 0);
        let seq = if fresh { self.next_sequence() } else { Sequence(0) };
        let now = self.now;
        let Some(op) = self.clients.get_mut(slot) else {
            return;
        };
        op.stage = Stage::Running;
        op.remote = Leg::Pending;
        op.started = now;
        match op.op {
            RequestOp::Read { range, .. } => {
                self.send(VolumeMessage::Read { id: u64::from(slot), range }, None);
            }
            RequestOp::Write { .. } | RequestOp::Zero { .. } => {
                if fresh {
                    op.seq = seq;
                    self.clients.number(slot, seq);
                }
                self.replicate(slot);
            }
            RequestOp::Flush => self.replicate(slot),
        }
    }

    /// The peer's answer decides.
    pub(super) fn finish_forwarded(&mut self, slot: u32) {
        let Some(op) = self.clients.get_mut(slot) else {
            return;
        };
        let result = match op.remote {
            Leg::None | Leg::Pending => return,
            Leg::Done => Ok(()),
            Leg::Failed | Leg::Lost => Err(RequestError::Io),
        };
        if op.local == Leg::Pending {
            // Its buffer is the dead disk's until the kernel gives it back; the client need not wait for that.
            if !op.answered {
                op.answered = true;
                let id = op.id;
                self.complete(id, result);
            }
            return;
        }
        self.end_client(slot, result);
    }

    pub(super) fn on_forwarded_read(
        &mut self,
        slot: u32,
        range: ByteRange,
        into: BufferId,
        outcome: RemoteOutcome,
        buffer: Option<BufferId>,
    ) {
        let Some(op) = self.clients.get_mut(slot) else {
            return self.release(buffer);
        };
        match (outcome, buffer) {
            (RemoteOutcome::Done, Some(from)) => {
                op.remote = Leg::Done;
                let length_bytes = range.length_bytes;
                self.actions.push_back(Action::CopyBuffer { from, into, length_bytes });
            }
            (RemoteOutcome::Done | RemoteOutcome::Failed { .. }, _) => op.remote = Leg::Failed,
        }
        self.release(buffer);
        self.finish_forwarded(slot);
    }

    /// Host: the front's request becomes one of this server's.
    pub(super) fn on_front_op(
        &mut self,
        session: SessionId,
        message: &VolumeMessage,
        buffer: Option<BufferId>,
        access: Access,
    ) {
        let asked = match (message, buffer) {
            (&VolumeMessage::Write { seq, range, fua }, Some(buffer)) => {
                Some((Forwarded::Operation { session, seq }, RequestOp::Write { range, buffer, fua }))
            }
            (&VolumeMessage::Zero { seq, range, may_unmap, fua }, _) => {
                Some((Forwarded::Operation { session, seq }, RequestOp::Zero { range, may_unmap, fua }))
            }
            (&VolumeMessage::Read { id, range }, Some(buffer)) => {
                Some((Forwarded::Read { session, id, range }, RequestOp::Read { range, buffer }))
            }
            (_, _) => None,
        };
        let range = asked.and_then(|(_, op)| op.range()).map(|range| self.widen(range));
        let (Some((forwarded, op)), Some(range)) = (asked, range) else {
            self.answer_peer(message, RemoteOutcome::Failed { errno: EINVAL }, None);
            return self.release(buffer);
        };
        let slot = self.clients.insert(ClientOp {
            id: RequestId(u64::MAX),
            op,
            range,
            stage: Stage::Lock,
            seq: Sequence(0),
            local: Leg::None,
            remote: Leg::None,
            mark: None,
            logged: false,
            forwarded: Some(forwarded),
            answered: false,
            started: self.now,
        });
        if self.locks.acquire(range, access, Holder::Client(slot)) {
            self.client_locked(slot);
        }
    }

    /// Host: a forwarded request ended.
    pub(super) fn answer_front(
        &mut self,
        forwarded: &Forwarded,
        op: &ClientOp,
        result: Result<(), RequestError>,
    ) {
        let buffer = op.op.buffer();
        if !op.answered {
            self.tell_front(forwarded, buffer, result);
        }
        self.release(buffer);
    }

    /// Host: the answer alone, with the payload of a read.
    pub(super) fn tell_front(
        &mut self,
        forwarded: &Forwarded,
        buffer: Option<BufferId>,
        result: Result<(), RequestError>,
    ) {
        let outcome = match result {
            Ok(()) => RemoteOutcome::Done,
            Err(_) => RemoteOutcome::Failed { errno: super::client::EIO },
        };
        let (Forwarded::Operation { session, .. } | Forwarded::Read { session, .. }) = *forwarded;
        if self.joined.is_some_and(|j| j.session == session) {
            match *forwarded {
                Forwarded::Operation { seq, .. } => self.send(VolumeMessage::Ack { seq, outcome }, None),
                Forwarded::Read { id, range, .. } => {
                    let payload = buffer.filter(|_| outcome == RemoteOutcome::Done);
                    self.send(VolumeMessage::ReadReply { id, range, outcome }, payload);
                }
            }
        }
    }
}
