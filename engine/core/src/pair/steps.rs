//! Records on all volumes before anything follows from them.

use std::collections::VecDeque;

use super::api::{OperatorToken, Refusal};
use super::server::Server;
use crate::format::record::Era;
use crate::ids::{Epoch, SessionId};
use crate::mirror::api::{CopyChange, Order};

/// What follows once a record is durable on every volume.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Step {
    /// G4: serve alone.
    GoneAlone {
        epoch: u64,
    },
    /// Going alone was given up: the lineages are again what they were.
    TakenBack,
    /// G5: take part as a target.
    TargetReady {
        session: SessionId,
    },
    /// A mirrored pair gets its primary: serve.
    PrimaryReady {
        session: SessionId,
        epoch: Epoch,
        token: Option<OperatorToken>,
    },
    /// G6 step 3 is durable.
    Returned {
        session: SessionId,
        epoch: Epoch,
    },
    /// The target noted that both are mirrored.
    MirroredNoted {
        session: SessionId,
        epoch: Epoch,
    },
    /// G9: secondary, durably; tell the peer.
    HandedOver {
        session: SessionId,
        token: Option<OperatorToken>,
        then_stop: bool,
    },
    /// Drained: no request in flight, both flushed, no marks.
    DrainedForHandOver,
    DrainedForDemote,
    DrainedForStop,
    /// Nothing completes here any more: the peer may take the service (G12).
    FrozenForFront {
        session: SessionId,
        volume: u16,
        errno: i32,
    },
    Demoted {
        token: OperatorToken,
    },
    CleanStop,
    Surrendered,
    /// A source that does not serve made its copies proven.
    Vouched,
    /// Every block of these volumes is marked for a full copy.
    MapsWhole {
        volumes: Vec<bool>,
    },
    Activated {
        token: OperatorToken,
    },
    /// Every volume said how many blocks it has marked: the hello tells it.
    MarksTold,
    /// Nothing follows.
    Noted,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Pending {
    pub(super) tag: u64,
    /// Volumes whose answer is still awaited.
    pub(super) waits: Vec<bool>,
    pub(super) step: Step,
}

impl Server {
    pub(super) fn tag(&mut self) -> u64 {
        self.next_tag += 1;
        self.next_tag
    }

    /// Writes the server's record with each volume's change; `step` follows when all are durable.
    pub(super) fn record_all(&mut self, step: Step, changes: Vec<CopyChange>, preflush: bool) {
        let tag = self.begin_step(step);
        for (index, change) in self.indexes().zip(changes) {
            let mut server = self.record.clone();
            if self.volumes[usize::from(index.0)].lacks_solo {
                // Only G4 makes a copy part of a solo run.
                server.era = Era::Pair;
            }
            self.order(index, Order::Record { tag, server, change, preflush });
        }
        // A failed copy takes no record.
        for at in 0..self.volumes.len() {
            if self.volumes[at].failed.is_some() {
                self.on_recorded(at, tag);
            }
        }
    }

    /// The same without any change of the copies.
    pub(super) fn record_only(&mut self, step: Step) {
        let changes = vec![CopyChange::None; self.volumes.len()];
        self.record_all(step, changes, true);
    }

    /// A step that waits for every volume; the orders carry the tag.
    pub(super) fn begin_step(&mut self, step: Step) -> u64 {
        self.record.counter += 1;
        let tag = self.tag();
        // A volume whose thread was let go for a new disk answers nothing.
        let waits = self.volumes.iter().map(|v| !v.gone).collect();
        self.pending.push_back(Pending { tag, waits, step });
        tag
    }

    /// A volume answered an order with this tag.
    pub(super) fn on_recorded(&mut self, volume: usize, tag: u64) {
        let Some(at) = self.pending.iter().position(|p| p.tag == tag) else {
            return;
        };
        if let Some(waits) = self.pending[at].waits.get_mut(volume) {
            *waits = false;
        }
        if self.pending[at].waits.contains(&true) {
            return;
        }
        if let Some(pending) = self.pending.remove(at) {
            self.follow(pending.step);
        }
    }

    /// A copy failed: records that it still owes never come. What cannot be without them does not happen; what was
    /// only to be told or to end goes on by the other volumes.
    pub(super) fn steps_lose_volume(&mut self, volume: usize, resumes_solo: bool) {
        // A return cannot end without the copy, even if that one's record stands already.
        let owed =
            |p: &Pending| p.waits.get(volume) == Some(&true) || matches!(p.step, Step::Returned { .. });
        let (stuck, rest): (VecDeque<Pending>, VecDeque<Pending>) =
            std::mem::take(&mut self.pending).into_iter().partition(owed);
        self.pending = rest;
        let gave_back = stuck.iter().any(|pending| matches!(pending.step, Step::Returned { .. }));
        for pending in stuck {
            match pending.step {
                // Answered by a failed copy, too.
                Step::DrainedForHandOver
                | Step::DrainedForDemote
                | Step::DrainedForStop
                | Step::FrozenForFront { .. } => self.pending.push_back(pending),
                // The other volumes' records are enough.
                Step::Demoted { .. }
                | Step::HandedOver { .. }
                | Step::CleanStop
                | Step::MarksTold
                | Step::Noted
                | Step::TakenBack => self.excuse(volume, pending),
                Step::GoneAlone { .. } if resumes_solo => self.excuse(volume, pending),
                Step::PrimaryReady { token: Some(token), .. } | Step::Activated { token } => {
                    let text = self.why_not_current();
                    self.answer(token, Err(Refusal { code: "disk-failed", text }));
                }
                Step::Surrendered => self.on_resolved(Err(self.why_not_current())),
                Step::GoneAlone { .. }
                | Step::TargetReady { .. }
                | Step::PrimaryReady { token: None, .. }
                | Step::Returned { .. }
                | Step::Vouched
                | Step::MapsWhole { .. }
                | Step::MirroredNoted { .. } => {}
            }
        }
        if gave_back {
            // The targets adopted everything: the right stays given back, on every disk that takes a record (G7).
            self.record_only(Step::Noted);
        }
    }

    fn excuse(&mut self, volume: usize, pending: Pending) {
        let tag = pending.tag;
        self.pending.push_back(pending);
        self.on_recorded(volume, tag);
    }

    /// All volumes answered.
    fn follow(&mut self, step: Step) {
        match step {
            Step::GoneAlone { epoch } => self.gone_alone(epoch),
            Step::TargetReady { session } => self.target_ready(session),
            Step::PrimaryReady { session, epoch, token } => self.primary_ready(session, epoch, token),
            Step::Returned { session, epoch } => self.returned(session, epoch),
            Step::MirroredNoted { session, epoch } => self.mirrored_noted(session, epoch),
            Step::HandedOver { session, token, then_stop } => self.handed_over(session, token, then_stop),
            Step::DrainedForHandOver | Step::DrainedForDemote => self.drained_for_role(),
            Step::DrainedForStop => self.drained_for_stop(),
            Step::FrozenForFront { session, volume, errno } => {
                self.frozen_for_front(session, volume, errno);
            }
            Step::Demoted { token } => self.demoted(token),
            Step::CleanStop => self.stopped(),
            Step::Surrendered => self.surrendered(),
            Step::MapsWhole { volumes } => self.maps_are_whole(&volumes),
            Step::Activated { token } => self.activated(token),
            Step::MarksTold | Step::TakenBack | Step::Vouched | Step::Noted => {}
        }
    }

    /// A step of this kind is under way.
    pub(super) fn is_pending(&self, test: impl Fn(&Step) -> bool) -> bool {
        self.pending.iter().any(|p| test(&p.step))
    }
}
