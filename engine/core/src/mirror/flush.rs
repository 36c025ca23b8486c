//! The volume's own flushes of both copies: they let marks go (G2), empty the log in idle time (G10), and
//! stand before a hand-over (G9) and before the return to the pair (G6).

use std::time::Duration;

use super::api::{CopyChange, Report, ServeMode};
use super::client::Leg;
use super::record::{After, Job};
use super::volume::{DiskPurpose, Serve, Volume};
use crate::dirty_log::{DirtyLog, FlushMark};
use crate::format::record::{CopyRecord, ServerRecord};
use crate::ids::Proven;
use crate::message::{RemoteOutcome, VolumeMessage};
use crate::request::{DiskOpKind, DiskOutcome, RequestError};
use crate::time::Instant;

/// Marks are settled after this long without a request.
const IDLE: Duration = Duration::from_secs(1);
/// Extents that no write wanted for this long leave the log under load, too.
const COOL: Duration = Duration::from_secs(2);
/// Own flushes carry this bit in their id.
const OWN_FLUSH: u64 = 1 << 63;

/// How the peer's part of a flush begins: it is asked. In a build made to show that this is tested it is not, and
/// counts as done.
pub(super) const PEER_FLUSH: Leg = if cfg!(feature = "no-peer-flush") { Leg::Done } else { Leg::Pending };

/// Why the volume flushes by itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Purpose {
    /// The log or the resync wants marks to go.
    Clear,
    /// Idle: empty the log.
    Settle,
    Drain,
    Return,
}

/// What a flush of the volume's own stands before.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum OwnFlushFor {
    /// Marks that may go.
    Marks,
    /// A hand-over, a demotion, an orderly stop.
    Drain,
    /// The return to the pair.
    Return,
}

#[derive(Clone, Copy, Debug)]
struct OwnFlush {
    purpose: Purpose,
    local: Leg,
    remote: Leg,
    mark: Option<(FlushMark, Proven)>,
    started: Instant,
}

#[derive(Clone, PartialEq, Eq, Debug)]
enum Draining {
    /// Operations in flight end first.
    Emptying,
    Flushing,
    /// The log becomes empty on disk.
    Settling,
    /// Reported; requests are refused until the server machine closes the volume or serves again.
    Drained,
}

/// Flushes under way and what waits for them.
#[derive(Debug, Default)]
pub(super) struct FlushState {
    own: Vec<Option<OwnFlush>>,
    draining: Option<(u64, Draining)>,
    returning: Option<(u64, ServerRecord, bool)>,
    settling: bool,
    /// When cold extents are looked for next, and the log's clock at the last look.
    cool: Option<(Instant, u64)>,
}

impl FlushState {
    pub(super) const fn is_draining(&self) -> bool {
        self.draining.is_some()
    }

    pub(super) fn cancel_drain(&mut self) {
        self.draining = None;
    }

    pub(super) fn in_flight(&self) -> bool {
        self.own.iter().any(Option::is_some)
    }

    /// When the oldest one began that still waits for this disk.
    pub(super) fn oldest_here(&self) -> Option<Instant> {
        self.own.iter().flatten().filter(|f| f.local == Leg::Pending).map(|f| f.started).min()
    }

    /// The same for the peer's.
    pub(super) fn oldest_there(&self) -> Option<Instant> {
        self.own.iter().flatten().filter(|f| f.remote == Leg::Pending).map(|f| f.started).min()
    }

    fn has(&self, purpose: Purpose) -> bool {
        self.own.iter().flatten().any(|f| f.purpose == purpose)
    }
}

impl Volume {
    /// What the flush in this slot is for.
    pub(super) fn own_flush(&self, slot: u32) -> Option<OwnFlushFor> {
        let flush = self.flushes.own.get(slot as usize)?.as_ref()?;
        Some(match flush.purpose {
            Purpose::Clear | Purpose::Settle => OwnFlushFor::Marks,
            Purpose::Drain => OwnFlushFor::Drain,
            Purpose::Return => OwnFlushFor::Return,
        })
    }

    /// Both copies are flushed for a drain, and the marks go.
    pub(super) fn settles_for_drain(&self) -> bool {
        matches!(self.flushes.draining, Some((_, Draining::Settling)))
    }

    pub(super) fn idle_deadline(&self) -> Option<Instant> {
        if self.clients.running() != 0 || self.flushes.in_flight() || self.flushes.settling {
            return None;
        }
        let open = self.serve != Serve::Closed && self.serve != Serve::Frozen;
        let active = self.log.as_ref().is_some_and(|log| log.active_extents() > 0);
        // What only a flush of both copies proves waits for the peer. The log is looked through only when it matters.
        let provable = || self.can_replicate() || self.log.as_ref().is_some_and(|log| !log.has_touched());
        (open && active && self.failed.is_none() && provable()).then(|| self.clients.last_use + IDLE)
    }

    /// Idle for long enough: empty the log.
    pub(super) fn check_idle(&mut self) {
        if self.idle_deadline().is_none_or(|at| self.now < at) {
            return;
        }
        let touched = self.log.as_ref().is_some_and(DirtyLog::has_touched);
        if touched && self.can_replicate() {
            self.flush_own(Purpose::Settle);
        } else if !touched && let Some(log) = self.log.as_mut() {
            log.settle();
            self.flushes.settling = true;
        }
    }

    /// When cold extents are looked for next.
    pub(super) fn cool_deadline(&self) -> Option<Instant> {
        self.flushes.cool.map(|(at, _)| at)
    }

    fn arm_cooling(&mut self) {
        let open = matches!(self.serve, Serve::Open(ServeMode::Alone | ServeMode::Mirrored));
        let clock = self.log.as_ref().filter(|log| log.active_extents() > 0).map(DirtyLog::clock);
        match (clock.filter(|_| open && self.failed.is_none()), self.flushes.cool) {
            (Some(clock), None) => self.flushes.cool = Some((self.now + COOL, clock)),
            (None, Some(_)) => self.flushes.cool = None,
            (Some(_), Some(_)) | (None, None) => {}
        }
    }

    /// Under load, too, extents leave the log that nobody writes to any more.
    pub(super) fn check_cold(&mut self) {
        let (Some((at, before)), Some(log)) = (self.flushes.cool, self.log.as_mut()) else {
            return;
        };
        if self.now < at {
            return;
        }
        let wants_flush = log.cool(before);
        self.flushes.cool = Some((self.now + COOL, log.clock()));
        if wants_flush && self.can_replicate() && !self.flushes.has(Purpose::Clear) {
            self.flush_own(Purpose::Clear);
        }
    }

    fn flush_own(&mut self, purpose: Purpose) {
        let replicate = self.can_replicate();
        let proven = self.proven_now();
        let mark = self.log.as_mut().filter(|_| replicate).map(|log| (log.flush_issued(), proven));
        let flush = OwnFlush {
            purpose,
            local: Leg::Pending,
            remote: if replicate { PEER_FLUSH } else { Leg::None },
            mark,
            started: self.now,
        };
        let slot = match self.flushes.own.iter().position(Option::is_none) {
            Some(slot) => slot,
            None => {
                self.flushes.own.push(None);
                self.flushes.own.len() - 1
            }
        };
        self.flushes.own[slot] = Some(flush);
        let slot = u32::try_from(slot).expect("own flushes are few");
        self.disk(DiskPurpose::Flush(slot), DiskOpKind::Flush);
        if replicate && PEER_FLUSH == Leg::Pending {
            self.send(VolumeMessage::Flush { id: OWN_FLUSH | u64::from(slot) }, None);
        }
    }

    pub(super) fn on_flush_disk(&mut self, slot: u32, outcome: &DiskOutcome) {
        let Some(flush) = self.flushes.own.get_mut(slot as usize).and_then(Option::as_mut) else {
            return;
        };
        match outcome {
            DiskOutcome::Done | DiskOutcome::Bytes(_) | DiskOutcome::Zeroes { .. } => flush.local = Leg::Done,
            DiskOutcome::Failed { errno } => {
                flush.local = Leg::Failed;
                self.fail_mine(*errno, None);
            }
        }
        self.finish_own_flush(slot);
    }

    pub(super) fn on_flush_ack(&mut self, id: u64, outcome: RemoteOutcome) {
        let remote = match outcome {
            RemoteOutcome::Done => Leg::Done,
            RemoteOutcome::Failed { .. } => Leg::Failed,
        };
        let Ok(slot) = u32::try_from(id & !OWN_FLUSH) else {
            return;
        };
        if id & OWN_FLUSH == 0 {
            match self.clients.get_mut(slot) {
                Some(op) if op.remote == Leg::Pending => op.remote = remote,
                Some(_) | None => return,
            }
        } else {
            match self.flushes.own.get_mut(slot as usize).and_then(Option::as_mut) {
                Some(flush) if flush.remote == Leg::Pending => flush.remote = remote,
                Some(_) | None => return,
            }
        }
        if let RemoteOutcome::Failed { errno } = outcome {
            self.fail_peer(errno, None);
        }
        if id & OWN_FLUSH == 0 {
            self.finish_client(slot);
        } else {
            self.finish_own_flush(slot);
        }
    }

    /// A flush of a client or of the volume ended; `both`: on both copies.
    pub(super) fn flush_ended(&mut self, mark: Option<(FlushMark, Proven)>, both: bool) {
        let (Some((mark, proven)), Some(log)) = (mark, self.log.as_mut()) else {
            return;
        };
        if both {
            log.flush_completed(mark);
            log.set_proven(proven);
        } else {
            log.flush_abandoned(mark);
        }
    }

    fn finish_own_flush(&mut self, slot: u32) {
        let place = self.flushes.own.get_mut(slot as usize);
        let Some(flush) = place.as_ref().and_then(|p| **p) else {
            return;
        };
        if flush.local == Leg::Pending || flush.remote == Leg::Pending {
            return;
        }
        if let Some(place) = place {
            *place = None;
        }
        let both = flush.local == Leg::Done && flush.remote == Leg::Done;
        let enough = both || (flush.local == Leg::Done && flush.remote == Leg::None);
        self.flush_ended(flush.mark, both);
        match flush.purpose {
            Purpose::Clear => {}
            Purpose::Settle => {
                if both && let Some(log) = self.log.as_mut() {
                    log.settle();
                    self.flushes.settling = true;
                }
            }
            Purpose::Drain => self.drain_flushed(enough),
            Purpose::Return => self.return_flushed(both),
        }
    }

    /// The session is over: flushes that waited for the peer end without it.
    pub(super) fn flushes_lose_session(&mut self) {
        if self.flushes.returning.take().is_some() {
            self.clients.gate = false;
            if self.serve != Serve::Frozen {
                self.let_in();
            }
        }
        for slot in 0..self.flushes.own.len() {
            if let Some(flush) = self.flushes.own[slot].as_mut()
                && flush.remote == Leg::Pending
            {
                flush.remote = Leg::Lost;
                self.finish_own_flush(u32::try_from(slot).expect("own flushes are few"));
            }
        }
    }

    pub(super) fn pump_flushes(&mut self) -> bool {
        self.arm_stall_check();
        self.arm_cooling();
        if self.flushes.settling {
            let settled = self.log.as_ref().is_none_or(DirtyLog::is_settled);
            if settled || self.clients.running() != 0 {
                self.flushes.settling = false;
            }
        }
        let wants = self.log.as_ref().is_some_and(DirtyLog::wants_flush);
        let due = self.clients.waiting_for_log > 0 || self.copy_wants_flush();
        if wants && due && self.can_replicate() && self.failed.is_none() && !self.flushes.has(Purpose::Clear)
        {
            self.copy_flushing();
            self.flush_own(Purpose::Clear);
            return true;
        }
        self.pump_drain() || self.pump_return()
    }

    pub(super) fn begin_drain(&mut self, tag: u64) {
        self.flushes.draining = Some((tag, Draining::Emptying));
        for request in std::mem::take(&mut self.clients.held) {
            self.complete(request.id, Err(RequestError::NotServing));
        }
    }

    fn pump_drain(&mut self) -> bool {
        let idle = self.clients.running() == 0;
        let settled = self.log.as_ref().is_none_or(DirtyLog::is_settled);
        let Some((tag, stage)) = self.flushes.draining.clone() else {
            return false;
        };
        if self.failed.is_some() {
            // Nothing can be flushed or settled any more, and what the disk never lets go has its answer.
            let answered = self.clients.iter().all(|(_, op)| op.answered);
            if answered {
                self.flushes.draining = None;
                self.report(Report::Drained { tag });
            }
            return answered;
        }
        match stage {
            Draining::Emptying if idle => {
                self.flushes.draining = Some((tag, Draining::Flushing));
                self.flush_own(Purpose::Drain);
                true
            }
            Draining::Settling if settled => {
                self.flushes.draining = Some((tag, Draining::Drained));
                self.report(Report::Drained { tag });
                true
            }
            Draining::Emptying | Draining::Flushing | Draining::Settling | Draining::Drained => false,
        }
    }

    fn drain_flushed(&mut self, enough: bool) {
        let Some((tag, Draining::Flushing)) = self.flushes.draining.clone() else {
            return;
        };
        if !enough {
            // The session ended in between: the server machine decides anew.
            self.flushes.draining = Some((tag, Draining::Emptying));
            return;
        }
        if let Some(log) = self.log.as_mut() {
            log.settle();
        }
        self.flushes.draining = Some((tag, Draining::Settling));
    }

    pub(super) fn begin_return(&mut self, tag: u64, server: ServerRecord) {
        self.clients.gate = true;
        self.flushes.returning = Some((tag, server, false));
    }

    fn pump_return(&mut self) -> bool {
        let idle = self.clients.running() == 0;
        match self.flushes.returning.as_mut() {
            Some((_, _, flushing)) if idle && !*flushing && self.joined.is_some() => {
                *flushing = true;
                self.flush_own(Purpose::Return);
                true
            }
            Some(_) | None => false,
        }
    }

    /// Both copies are stable and equal. From the moment the record is under way this server owns nothing:
    /// both acknowledgements are needed (G7).
    fn return_flushed(&mut self, both: bool) {
        let clean = self.dirty_blocks() == 0;
        let Some((tag, server, _)) = self.flushes.returning.take() else {
            return;
        };
        if !both || !clean {
            self.flushes.returning = Some((tag, server, false));
            return;
        }
        if self.serve != Serve::Closed {
            self.serve = Serve::Open(ServeMode::Mirrored);
        }
        self.recording.queue(Job {
            server: Some(server),
            change: CopyChange::None,
            preflush: true,
            unproven: false,
            after: After::Return(tag),
        });
    }

    /// era = pair is durable.
    pub(super) fn returned(&mut self, tag: u64, copy: Box<CopyRecord>) {
        self.clients.gate = false;
        if self.serve != Serve::Frozen {
            self.let_in();
        }
        self.report(Report::Recorded { tag, copy });
    }
}
