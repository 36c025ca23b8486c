//! Heartbeats, the lease they carry, and silence (docs/protocol.md section 6).

use std::time::Duration;

use super::server::{Server, Serving};
use super::session::Phase;
use crate::ids::Epoch;
use crate::message::{ControlMessage, LiveState};
use crate::mirror::api::Order;
use crate::time::Instant;

impl Server {
    /// When to call again with [`super::api::Input::Time`] if nothing else happens.
    pub fn next_deadline(&self) -> Option<Instant> {
        let session = self.session.as_ref();
        let heartbeat = session.map(|s| s.next_heartbeat);
        let silence = session.map(|_| self.last_heard + self.config.silent);
        // When a freeze is told: not before a fresh primary had time for its first promise.
        let told = self.lease_until.max(self.in_step_since + self.config.freeze);
        let lease = (self.holds_lease_rule() && self.frozen_since.is_none()).then_some(told);
        let alone = self.must_go_alone_at();
        let wait = self.waiting_to_serve.map(|_| self.serve_not_before);
        let stop = self.stopping.as_ref().map(|s| s.give_up_at);
        let answers = self.operators_deadline();
        let drain = self.role_drain_deadline();
        [heartbeat, silence, lease, alone, wait, stop, answers, drain].into_iter().flatten().min()
    }

    /// Completions need a lease.
    pub(super) const fn holds_lease_rule(&self) -> bool {
        match self.serving {
            Serving::Mirrored | Serving::Returning => true,
            Serving::No | Serving::GoingAlone | Serving::Alone | Serving::Front => false,
        }
    }

    /// The peer was heard, in this session.
    pub(super) fn heard(&mut self) {
        self.last_heard = self.now;
    }

    pub(super) fn on_heartbeat(
        &mut self,
        sent_ns: u64,
        echo_ns: u64,
        promising: bool,
        live: LiveState,
        epoch: &Epoch,
    ) {
        let lease_rule = self.holds_lease_rule();
        let freeze = self.config.freeze;
        let Some(session) = self.session.as_mut() else {
            return;
        };
        session.echo_ns = session.echo_ns.max(sent_ns);
        session.peer_live = Some(live);
        let in_step = matches!(session.phase, Phase::Mirrored | Phase::Returning);
        if in_step {
            self.in_step_heard = self.now;
        }
        // The lease counts from when the heartbeat that the peer answers was sent: never later than the
        // moment from which the peer counts its silence.
        let fresh = echo_ns >= session.began.0 && echo_ns <= self.now.0;
        if promising && lease_rule && in_step && fresh {
            self.lease_until = self.lease_until.max(Instant(echo_ns) + freeze);
        }
        self.peer_epoch = super::server::newer(&self.peer_epoch, epoch);
    }

    /// What time alone brings.
    pub(super) fn on_time(&mut self) {
        self.check_silence();
        self.check_freeze();
        self.check_alone();
        self.check_wait();
        self.check_stop();
        self.check_role_drain();
        self.check_operators();
        self.beat();
    }

    fn check_silence(&mut self) {
        if self.session.is_some() && self.now >= self.last_heard + self.config.silent {
            let silent_ms = self.now.since(self.last_heard).as_millis();
            self.close_session(&format!("link silent {silent_ms} ms"));
        }
    }

    /// The lease ran out, or came back.
    fn check_freeze(&mut self) {
        if !self.holds_lease_rule() {
            if self.serving != Serving::GoingAlone {
                self.frozen_since = None;
            }
            return;
        }
        let frozen = self.now >= self.lease_until;
        match (frozen, self.frozen_since) {
            // A fresh primary has no promise yet: that is no freeze.
            (true, None) if self.now.since(self.in_step_since) < self.config.freeze => {}
            (true, None) => {
                self.frozen_since = Some(self.now);
                let heard_ms = self.now.since(self.last_heard).as_millis();
                let reason = format!("no promise of the peer; last heard {heard_ms} ms ago");
                self.event("frozen", format!("requests wait: {reason}"), &reason);
            }
            (false, Some(_)) if self.session.is_some() => {
                self.frozen_since = None;
                self.event("resumed", "requests complete again".to_owned(), "the peer answers");
            }
            (true, Some(_)) | (false, Some(_) | None) => {}
        }
    }

    /// A primary whose peer is silent goes alone at this time.
    fn must_go_alone_at(&self) -> Option<Instant> {
        if !self.holds_lease_rule() || self.stopping.is_some() {
            return None;
        }
        let in_step =
            self.session.as_ref().is_some_and(|s| matches!(s.phase, Phase::Mirrored | Phase::Returning));
        // A peer that was never told `mirrored` may not serve (C5): after a return that was cut off no silence has
        // to pass. It may have adopted this generation, so there is a new one (G7).
        let wait = if self.serving == Serving::Returning { Duration::ZERO } else { self.config.silent };
        (!in_step).then(|| self.in_step_heard + wait)
    }

    fn check_alone(&mut self) {
        if self.must_go_alone_at().is_some_and(|at| self.now >= at) {
            let reason = if self.serving == Serving::Returning {
                "the peer was lost before both counted as mirrored".to_owned()
            } else {
                format!("link silent {} ms", self.now.since(self.in_step_heard).as_millis())
            };
            self.go_alone(&reason, crate::format::record::Origin::Solo);
        }
    }

    fn beat(&mut self) {
        let promising = self.promises();
        let live = self.live();
        let epoch = self.record.epoch_seen.clone();
        let now = self.now;
        let every = self.config.heartbeat;
        let Some(session) = self.session.as_mut() else {
            return;
        };
        if now < session.next_heartbeat {
            return;
        }
        session.next_heartbeat = now + every;
        let echo_ns = session.echo_ns;
        self.send(ControlMessage::Heartbeat { sent_ns: now.0, echo_ns, promising, live, epoch });
    }

    /// A heartbeat at once: the other side waits for it.
    pub(super) fn beat_now(&mut self) {
        if let Some(session) = self.session.as_mut() {
            session.next_heartbeat = self.now;
        }
    }

    /// This server will not serve before `silent` after the last heartbeat it answered (section 6).
    fn promises(&self) -> bool {
        let in_session = self.session.as_ref().is_some_and(|s| match s.phase {
            Phase::Joining { .. } | Phase::Syncing { .. } | Phase::Returning | Phase::Mirrored => true,
            Phase::Hello | Phase::Refused { .. } | Phase::SplitBrain | Phase::OneCopy => false,
        });
        in_session && self.serving == Serving::No && self.volumes_turn && !self.becoming_primary()
    }

    /// Freezes every volume: nothing completes until this server has a right again.
    pub(super) fn freeze(&mut self) {
        self.order_all(&Order::Freeze { tag: None });
        self.frozen_since.get_or_insert(self.now);
    }
}
