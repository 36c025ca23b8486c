//! What was begun and does not end: an operation unanswered for `stall`, here or there, counts as a failed copy.
//!
//! Every operation counts from when it went to the disk or to the peer, metadata too: a write that waits for its mark
//! has nothing else under way. What waits for a lock waits for an operation that is counted itself, or for a chunk that is
//! on its way to the target of a resync: a peer's volume that stands still promises nothing, and its session ends.

use std::time::Duration;

use super::api::ServeMode;
use super::client::{Leg, Stage};
use super::volume::{Serve, Volume};
use crate::request::RequestError;
use crate::time::Instant;

/// How often stalls are looked for while something is in flight.
const STALL_CHECK: Duration = Duration::from_millis(500);
/// Errno of a stalled operation, as Linux numbers it.
const ETIMEDOUT: i32 = 110;

impl Volume {
    /// When stalls are looked for next.
    pub(super) const fn stall_deadline(&self) -> Option<Instant> {
        self.stall_check
    }

    pub(super) fn arm_stall_check(&mut self) {
        let busy = self.clients.running() != 0
            || self.flushes.in_flight()
            || self.peers.in_flight() != 0
            || self.oldest_log_op().is_some()
            || self.recording.began().is_some()
            || self.copying.oldest_read().is_some();
        match (busy, self.stall_check) {
            (true, None) => self.stall_check = Some(self.now + STALL_CHECK),
            (false, Some(_)) => self.stall_check = None,
            (true, Some(_)) | (false, None) => {}
        }
    }

    /// When the oldest operation of the dirty log began: a log block, a page, a summary.
    fn oldest_log_op(&self) -> Option<Instant> {
        self.log_slots.iter().flatten().map(|op| op.started).min()
    }

    /// When the oldest operation began that this server's disk owes.
    fn oldest_here(&self) -> Option<Instant> {
        let clients = self.clients.iter().filter(|(_, op)| op.local == Leg::Pending);
        let clients = clients.map(|(_, op)| op.started).min();
        let others = [
            self.flushes.oldest_here(),
            self.peers.oldest(),
            self.copying.oldest_read(),
            self.recording.began(),
            self.oldest_log_op(),
        ];
        others.into_iter().chain([clients]).flatten().min()
    }

    /// When the oldest operation began that the peer owes.
    fn oldest_there(&self) -> Option<Instant> {
        let clients = self.clients.iter().filter(|(_, op)| op.remote == Leg::Pending);
        clients.map(|(_, op)| op.started).chain(self.flushes.oldest_there()).min()
    }

    /// An operation unanswered for `stall` counts as a failed copy.
    pub(super) fn check_stalls(&mut self) {
        let Some(at) = self.stall_check.filter(|at| *at <= self.now) else {
            return;
        };
        self.stall_check = None;
        let (stall, now) = (self.config.stall, self.now);
        if now.since(at) > STALL_CHECK {
            // It was this thread that stood still: what was done meanwhile is taken in first.
            self.stall_check = Some(now + STALL_CHECK);
            return;
        }
        let late = |started: Option<Instant>| started.is_some_and(|at| now.since(at) >= stall);
        let (mine, peers) = (late(self.oldest_here()), late(self.oldest_there()));
        if late(self.oldest_log_op())
            && let Some(log) = self.log.as_mut()
        {
            log.fail(ETIMEDOUT);
        }
        if mine {
            self.fail_mine(ETIMEDOUT, None);
            self.answer_stalled();
        }
        // Without a copy here the peer's is the last one: that server looks after it itself.
        if peers && self.failed.is_none() {
            self.fail_peer(ETIMEDOUT, None);
        }
    }

    /// Where nobody else can answer, a client is not kept waiting for a disk that does not. An operation that is on the
    /// disk stays until the disk lets it go: its buffer is the kernel's until then.
    fn answer_stalled(&mut self) {
        match self.serve {
            Serve::Open(ServeMode::Alone) | Serve::Closed => {}
            Serve::Open(ServeMode::Mirrored | ServeMode::Front) | Serve::Frozen => return,
        }
        self.fail_waiting();
        let (stall, now) = (self.config.stall, self.now);
        let ops = self.clients.iter().filter(|(_, op)| !op.answered);
        let stalled: Vec<(u32, bool)> = ops
            .filter_map(|(slot, op)| match op.stage {
                // Behind an operation that does not end.
                Stage::Lock => (now.since(op.started) >= stall).then_some((slot, true)),
                Stage::Running | Stage::Healing => (op.local == Leg::Pending).then_some((slot, false)),
                // Ended above, if it is the log that does not answer.
                Stage::Log => None,
            })
            .collect();
        for (slot, waits) in stalled {
            if waits {
                self.cancel_waiting(slot, RequestError::Io);
            } else {
                self.answer_early(slot);
            }
        }
    }

    /// The client has its answer, the disk still has the buffer.
    fn answer_early(&mut self, slot: u32) {
        let Some(op) = self.clients.get_mut(slot) else {
            return;
        };
        op.answered = true;
        let (id, forwarded) = (op.id, op.forwarded);
        match forwarded {
            Some(forwarded) => self.tell_front(&forwarded, None, Err(RequestError::Io)),
            None => self.complete(id, Err(RequestError::Io)),
        }
    }
}
