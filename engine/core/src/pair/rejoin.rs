//! The end of a resync: back to the pair (G6), seen from both sides.

use std::collections::BTreeMap;

use super::api::Action;
use super::server::{Server, Serving, newer};
use super::session::Phase;
use super::steps::Step;
use crate::format::record::Era;
use crate::ids::{Epoch, SessionId};
use crate::message::ControlMessage;
use crate::mirror::api::{Order, ServeMode};

impl Server {
    /// Source: the target adopted this volume. When all are, the solo right is given back (step 3).
    pub(super) fn on_synced(&mut self, at: usize) {
        let Some(session) = self.session.as_mut() else {
            return;
        };
        let Phase::Syncing { synced } = &mut session.phase else {
            return;
        };
        if let Some(mine) = synced.get_mut(at) {
            *mine = true;
        }
        if !synced.iter().all(|s| *s) || self.stopping.is_some() {
            return;
        }
        let Some(id) = self.session.as_ref().map(|s| s.id) else {
            return;
        };
        let serves = self.serving == Serving::Alone;
        let mut epoch = self.record.epoch_seen.clone();
        if serves {
            epoch = Epoch { number: self.next_epoch_number(), holder: Some(self.config.name.clone()) };
            self.record.last_primary = epoch.number;
            self.serving = Serving::Returning;
            self.in_step_since = self.now;
        }
        self.record.epoch_seen = epoch.clone();
        self.era_before_return = self.record.era;
        self.record.era = Era::Pair;
        self.in_step_heard = self.now;
        self.set_phase(Phase::Returning);
        let tag = self.begin_step(Step::Returned { session: id, epoch });
        let order = Order::Return { tag, server: self.record.clone() };
        self.order_all(&order);
    }

    /// Source: era = pair is durable on every volume; both copies are flushed and equal. Mirrored (step 5).
    pub(super) fn returned(&mut self, id: SessionId, epoch: Epoch) {
        if self.session.as_ref().is_none_or(|s| s.id != id || s.phase != Phase::Returning) {
            return;
        }
        let primary = self.serving == Serving::Returning;
        if primary {
            self.serving = Serving::Mirrored;
            self.order_all(&Order::Serve { mode: ServeMode::Mirrored, epoch: epoch.number });
        }
        self.send(ControlMessage::Mirrored { epoch, primary });
        let fields = self.resync_fields();
        self.enter_mirrored_with("the resync ended", fields);
    }

    /// What a resync begins with, by the marks of both sides: at most their sum is left to copy.
    pub(super) fn marks_fields(&self) -> BTreeMap<String, String> {
        let mine: u64 = self.volumes.iter().filter_map(|v| v.facts.as_ref()).map(|f| f.dirty_blocks).sum();
        let hello = self.session.as_ref().and_then(|s| s.peer_hello.as_ref());
        let theirs: u64 = hello.into_iter().flat_map(|h| &h.volumes).map(|v| v.dirty_blocks).sum();
        let field = |name: &str, value: String| (name.to_owned(), value);
        BTreeMap::from([
            field("role", "source".to_owned()),
            field("my_blocks", mine.to_string()),
            field("their_blocks", theirs.to_string()),
        ])
    }

    /// Fields for the event just made.
    pub(super) fn tell_in_event(&mut self, fields: BTreeMap<String, String>) {
        if let Some(Action::Event(event)) = self.actions.back_mut() {
            event.fields = fields;
        }
    }

    /// The source's account of the resync: what was marked, and what was sent.
    fn resync_fields(&mut self) -> BTreeMap<String, String> {
        let all = self.resynced.iter_mut().filter_map(Option::take);
        let (total, sent) = all.fold((0, 0), |(t, s), r| (t + r.total_bytes, s + r.sent_bytes));
        let field = |name: &str, value: String| (name.to_owned(), value);
        BTreeMap::from([
            field("role", "source".to_owned()),
            field("total_bytes", total.to_string()),
            field("sent_bytes", sent.to_string()),
        ])
    }

    /// A return that could not end: its record may never be written, the era is what the disks say.
    pub(super) fn take_return_back(&mut self) {
        let before = self.pending.len();
        self.pending.retain(|p| !matches!(p.step, Step::Returned { .. }));
        if self.pending.len() != before {
            self.record.era = self.era_before_return;
        }
    }

    /// Target: this copy is the source's equal, durably.
    pub(super) fn on_adopted(&mut self, at: usize) {
        if let Some(session) = self.session.as_mut()
            && let Phase::Syncing { synced } = &mut session.phase
            && let Some(mine) = synced.get_mut(at)
        {
            *mine = true;
        }
        if let Some(facts) = self.volumes[at].facts.as_mut() {
            facts.dirty_blocks = 0;
        }
        let early = self.session.as_mut().and_then(|session| session.mirrored_early.take());
        if let Some((epoch, primary)) = early {
            self.on_mirrored(epoch, primary);
        }
    }

    /// Target: the source gave its right back (C5). Durable before this server counts itself mirrored.
    pub(super) fn on_mirrored(&mut self, epoch: Epoch, primary: bool) {
        let Some(session) = self.session.as_mut() else {
            return;
        };
        let adopted = matches!(&session.phase, Phase::Syncing { synced } if synced.iter().all(|s| *s));
        if session.i_am_source == Some(true) {
            return;
        }
        if !adopted {
            // The source heard of it on the data connection; this server's own volumes tell in a moment.
            if matches!(session.phase, Phase::Syncing { .. }) {
                session.mirrored_early = Some((epoch, primary));
            }
            return;
        }
        session.peer_primary = primary;
        let id = session.id;
        self.record.epoch_seen = newer(&self.record.epoch_seen, &epoch);
        self.record.era = Era::Pair;
        self.record_only(Step::MirroredNoted { session: id, epoch });
    }

    pub(super) fn mirrored_noted(&mut self, id: SessionId, epoch: Epoch) {
        let stands =
            self.session.as_ref().is_some_and(|s| s.id == id && matches!(s.phase, Phase::Syncing { .. }));
        if !stands {
            return;
        }
        self.send(ControlMessage::MirroredAck { epoch });
        let fields = BTreeMap::from([("role".to_owned(), "target".to_owned())]);
        self.enter_mirrored_with("the resync ended", fields);
    }
}
