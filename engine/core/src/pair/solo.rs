//! Going alone by rule G4, taking a solo run up again after a restart (T2), and failed copies (G12).

use super::server::{Server, Serving, newer};
use super::session::Phase;
use super::steps::Step;
use crate::format::record::{CopyRecord, Era, Origin, ServerRecord};
use crate::ids::{ByteRange, Epoch, Generation, SessionId};
use crate::message::{ControlMessage, LiveState};
use crate::mirror::api::{CopyChange, MapReach, Order, ServeMode};

/// What stood before a G4 that is not finished.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Attempt {
    record: ServerRecord,
    copies: Vec<CopyRecord>,
    lacks_solo: Vec<bool>,
}

impl Server {
    /// G4: freeze, take the right (here without a register: the operator's word or the silence), flush and
    /// write {new generation, era = solo}; only then complete anything, reads too.
    pub(super) fn go_alone(&mut self, reason: &str, origin: Origin) {
        if matches!(self.serving, Serving::GoingAlone | Serving::Alone) {
            return;
        }
        if self.volumes.iter().any(|v| v.failed.is_some()) {
            return self.cannot_go_alone();
        }
        let gave_back = self.serving == Serving::Returning;
        let frozen_before = self.frozen_since;
        self.freeze();
        self.frozen_since = frozen_before.or(Some(self.now));
        self.drop_roles_in_session();
        self.take_return_back();
        let number = self.next_epoch_number();
        let mut record = self.record.clone();
        if gave_back {
            // The targets adopted everything: without a new right there is none (G7).
            record.era = Era::Pair;
        }
        self.attempt = Some(Attempt {
            record,
            copies: self.copies().cloned().collect(),
            lacks_solo: self.volumes.iter().map(|volume| volume.lacks_solo).collect(),
        });
        self.begin_solo_record(number);
        for volume in &mut self.volumes {
            volume.lacks_solo = false;
        }
        let generations: Vec<CopyChange> = (0..self.volumes.len())
            .map(|at| {
                let whole = self.full_copy.get_mut(at).is_some_and(std::mem::take);
                let reach = if whole { MapReach::Nothing } else { MapReach::Back };
                CopyChange::NewGeneration { generation: Generation(self.draw()), origin, reach }
            })
            .collect();
        let reason = reason.to_owned();
        self.transition("going-alone", &reason, |s| s.serving = Serving::GoingAlone);
        self.record_all(Step::GoneAlone { epoch: number }, generations, true);
    }

    /// A session in step, if there still is one, is over for this purpose: facts change, both begin anew.
    fn drop_roles_in_session(&mut self) {
        let in_work = self.session.as_ref().is_some_and(|s| match s.phase {
            Phase::Joining { .. } | Phase::Syncing { .. } | Phase::Returning | Phase::Mirrored => true,
            Phase::Hello | Phase::Refused { .. } | Phase::SplitBrain | Phase::OneCopy => false,
        });
        if in_work {
            self.close_session("this server goes alone");
        }
    }

    pub(super) fn next_epoch_number(&self) -> u64 {
        self.record.epoch_seen.number.max(self.peer_epoch.number) + 1
    }

    fn begin_solo_record(&mut self, number: u64) {
        self.record.epoch_seen = Epoch { number, holder: Some(self.config.name.clone()) };
        self.record.era = Era::Solo(number);
        self.record.last_primary = number;
        self.record.was_primary = true;
    }

    /// The record is durable everywhere; nothing is served before the old primary's lease can be over.
    pub(super) fn gone_alone(&mut self, epoch: u64) {
        if self.serving != Serving::GoingAlone {
            return;
        }
        self.waiting_to_serve = Some(epoch);
        self.check_wait();
    }

    pub(super) fn check_wait(&mut self) {
        let Some(epoch) = self.waiting_to_serve else {
            return;
        };
        if self.now < self.serve_not_before {
            return;
        }
        self.waiting_to_serve = None;
        self.attempt = None;
        self.order_all(&Order::Serve { mode: ServeMode::Alone, epoch });
        let reason = self.reason.clone();
        self.frozen_since = None;
        self.transition("alone", &reason, |s| s.serving = Serving::Alone);
        self.host_the_front();
        self.operators_gone_alone();
    }

    /// The peer whose disk failed forwards its clients' requests from now on.
    fn host_the_front(&mut self) {
        let host = self.session.as_ref().filter(|s| s.host && s.phase == Phase::OneCopy).map(|s| s.id);
        if let Some(session) = host {
            self.order_all(&Order::Host { session });
            let epoch = self.record.epoch_seen.clone();
            self.send(ControlMessage::Primary { epoch });
        }
    }

    /// G4 writes every copy, and one is failed: nothing may complete here any more. The clients learn it; the peer's
    /// copies are whole, it takes the service when it is met or promoted.
    fn cannot_go_alone(&mut self) {
        let reason = format!("this server cannot go alone: {}", self.why_not_current());
        self.transition("dying", &reason, Self::stop_serving);
    }

    /// A solo run is being taken up again (T2): its records stand already, the new ones only carry a number.
    fn resumes_solo(&self) -> bool {
        let going = self.is_pending(|step| matches!(step, Step::GoneAlone { .. }));
        self.serving == Serving::GoingAlone
            && self.attempt.is_none()
            && (going || self.waiting_to_serve.is_some())
    }

    /// A copy failed before anything completed alone. No volume may be left with a generation that the others lack:
    /// the servers would each be the source of some volume (`mixed-sources`).
    fn give_up_going_alone(&mut self) {
        let attempt = self.attempt.take();
        self.cannot_go_alone();
        let Some(Attempt { record, copies, lacks_solo }) = attempt else {
            return;
        };
        for (volume, lacks) in self.volumes.iter_mut().zip(lacks_solo) {
            volume.lacks_solo = lacks;
        }
        self.record.era = record.era;
        self.record.last_primary = record.last_primary;
        self.record.was_primary = record.was_primary;
        let changes = copies.into_iter().map(|copy| CopyChange::TakeBack { before: Box::new(copy) });
        self.record_all(Step::TakenBack, changes.collect(), true);
    }

    /// The last process ended in the middle of G4: nothing was completed in that solo run.
    pub(super) fn solo_is_unfinished(&self) -> bool {
        self.volumes.iter().any(|volume| volume.lacks_solo)
    }

    /// T2: the superblock says that this server runs alone, and nothing newer can be anywhere else. It goes
    /// on under a new number. A volume that lacks the record is settled with the peer, or by the operator's word:
    /// nothing was completed alone before all had it.
    pub(super) fn resume_solo(&mut self) {
        if !(self.record.era.is_solo() && self.record.was_primary && self.all_up_to_date()) {
            return;
        }
        match self.volumes.iter().position(|volume| volume.lacks_solo) {
            None => self.take_up_solo("it ran alone when it stopped"),
            Some(at) => {
                self.reason = format!(
                    "this server ended while it went alone (volume {} lacks the record), so nothing was completed \
                     alone: it waits for {}; if that is down: `duplex promote --peer-is-down`",
                    self.name(at),
                    self.config.peer
                );
            }
        }
    }

    pub(super) fn take_up_solo(&mut self, reason: &str) {
        let number = self.next_epoch_number();
        self.attempt = None;
        self.begin_solo_record(number);
        let reason = reason.to_owned();
        self.transition("resumed-alone", &reason, |s| s.serving = Serving::GoingAlone);
        self.record_only(Step::GoneAlone { epoch: number });
    }

    /// This server's disk failed.
    pub(super) fn on_my_copy_failed(&mut self, at: usize, errno: i32, range: Option<ByteRange>) {
        if self.volumes[at].failed.is_some() {
            return;
        }
        self.volumes[at].failed = Some(errno);
        self.eligible = false;
        let place = range.map_or_else(String::new, |r| format!(" at {r}"));
        let text = format!("volume {}: this copy failed ({}){place}", self.name(at), errno_words(errno));
        let mut fields = std::collections::BTreeMap::new();
        fields.insert("errno".to_owned(), errno.to_string());
        if let Some(range) = range {
            fields.insert("offset_bytes".to_owned(), range.offset_bytes.to_string());
        }
        self.event_with("disk-failed", text.clone(), "a write or flush failed here", fields);
        let volume = u16::try_from(at).unwrap_or(u16::MAX);
        let session = self.in_step_session();
        let resumes = self.resumes_solo();
        self.steps_lose_volume(at, resumes);
        match (self.serving, session) {
            (Serving::Mirrored, Some(session)) => {
                // The peer's copy is whole: it takes the service once nothing completes here any more, and
                // this server stays as a front for its clients (G12).
                let tag = self.begin_step(Step::FrozenForFront { session, volume, errno });
                self.transition("dying", &text, |s| s.serving = Serving::Front);
                self.order_all(&Order::Freeze { tag: Some(tag) });
            }
            (Serving::GoingAlone, _) if !resumes => self.give_up_going_alone(),
            // The peer has adopted everything: it is the source of nothing and lacks nothing. Both say so anew, then
            // it serves (D4).
            (Serving::Returning, _) => {
                self.cannot_go_alone();
                self.close_session("this copy failed");
            }
            // Alone, requests get the error; a frozen server has nobody to give the service to.
            (Serving::Alone | Serving::GoingAlone | Serving::Mirrored, _) => {
                self.send(ControlMessage::CopyFailed { volume, errno });
            }
            (Serving::Front, _) => {}
            // The copies are not in step, and nobody serves: whether the other may is for `decide` (D4).
            (Serving::No, None) if !self.peer_serves() => self.close_session("this copy failed"),
            (Serving::No, _) => {
                self.send(ControlMessage::CopyFailed { volume, errno });
                self.order_all(&Order::Leave);
                self.set_phase(Phase::OneCopy);
                self.reason = self.why_not_current();
            }
        }
    }

    /// The peer said that it serves, or is about to.
    fn peer_serves(&self) -> bool {
        let live = self.session.as_ref().and_then(|session| session.peer_live);
        live.is_some_and(|live| live.is_alone() || live.is_live_primary() || live == LiveState::Granted)
    }

    /// Nothing completes here any more: the peer may serve.
    pub(super) fn frozen_for_front(&mut self, session: SessionId, volume: u16, errno: i32) {
        if self.in_step_session() == Some(session) && self.serving == Serving::Front {
            self.send(ControlMessage::CopyFailed { volume, errno });
            self.set_phase(Phase::OneCopy);
        } else if self.serving == Serving::Front {
            self.stop_serving();
        }
    }

    /// The peer serves: this server's clients are served from its copy.
    pub(super) fn begin_front(&mut self, epoch: &Epoch) {
        self.peer_epoch = newer(&self.peer_epoch, epoch);
        self.order_all(&Order::Serve { mode: ServeMode::Front, epoch: epoch.number });
        let reason =
            format!("this copy failed; requests are served from the peer's copy in epoch {}", epoch.number);
        self.transition("front", &reason, |_| ());
    }

    /// The peer's disk failed: a failed copy is a lost peer (G12).
    pub(super) fn on_peer_copy_failed(&mut self, at: usize, errno: i32) {
        let Some(phase) = self.session.as_ref().map(|s| s.phase.clone()) else {
            return;
        };
        if phase == Phase::OneCopy {
            return;
        }
        if let Some(copy) = self.peer_copies.get_mut(at) {
            *copy = Some(crate::format::record::CopyState::Failed);
        }
        let text = format!("volume {}: the peer's copy failed ({})", self.name(at), errno_words(errno));
        self.event("disk-failed", text, "the peer says so");
        let mirrored = phase == Phase::Mirrored;
        self.order_all(&Order::Leave);
        self.set_phase(Phase::OneCopy);
        match self.serving {
            Serving::Mirrored | Serving::Returning => {
                self.go_alone("the peer's copy failed", Origin::Solo);
            }
            Serving::No if mirrored && self.all_up_to_date() => match self.session.as_mut() {
                // The primary gave its service up: this copy holds everything it acknowledged.
                Some(session) if session.peer_primary => {
                    session.host = true;
                    session.peer_primary = false;
                    self.go_alone("takeover: the primary's copy failed", Origin::Solo);
                }
                // Nobody served, and nobody asked for a primary.
                Some(_) | None => self.reason = super::session::waits_for_promote(&self.config.peer),
            },
            Serving::Alone | Serving::GoingAlone => {
                let (name, peer) = (self.name(at), &self.config.peer);
                self.reason = format!(
                    "{peer}'s copy of volume {name} failed ({}): nothing is mirrored; mend its disk, then `duplex attach \
                     {name}` there",
                    errno_words(errno)
                );
            }
            Serving::No | Serving::Front => {}
        }
    }
}

/// An errno in words and as its number; the core has no system to ask.
pub(super) fn errno_words(errno: i32) -> String {
    let words = match errno {
        5 => "input/output error",
        19 => "detached",
        28 => "no space left on the device",
        30 => "read-only file system",
        61 => "no data available",
        75 => "a number too large",
        110 => "no answer in time",
        121 => "remote input/output error",
        122 => "disk quota exceeded",
        _ => return format!("errno {errno}"),
    };
    format!("{words}, errno {errno}")
}
