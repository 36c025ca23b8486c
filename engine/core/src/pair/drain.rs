//! A role is given up: every volume drains first. One such drain at a time, and nobody waits for it for ever.
//!
//! A drain that does not apply any more ends here, after every input: the peer was lost and this server goes alone, its
//! own copy failed, the daemon stops. Volumes that drained for nothing serve again by what happens then, or are told to.

use super::api::{OperatorToken, Refusal};
use super::operator::ANSWER_WAIT;
use super::roles::peer_lost;
use super::server::{Server, Serving};
use super::steps::Step;
use crate::ids::SessionId;
use crate::message::ControlMessage;
use crate::mirror::api::{Order, ServeMode};
use crate::time::Instant;

/// What is given up.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Giving {
    /// G9: the role goes to the peer of this session.
    HandOver { session: SessionId, then_stop: bool },
    /// Nobody serves then; served like this until now, in this session if by both copies.
    Demote { serving: Serving, session: Option<SessionId> },
}

/// A drain under way.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct RoleDrain {
    tag: u64,
    giving: Giving,
    /// The command that asked; `None`: the peer did.
    token: Option<OperatorToken>,
    since: Instant,
}

impl Server {
    /// The role is being given up already.
    pub(super) const fn gives_role_up(&self) -> bool {
        self.role_drain.is_some()
    }

    /// Lets every volume end what is in flight, flush both and settle its marks.
    pub(super) fn begin_role_drain(&mut self, giving: Giving, token: Option<OperatorToken>) {
        if self.role_drain.is_some() {
            // Asked for before every call; a second drain would make the volumes forget the first.
            if let Some(token) = token {
                self.answer(token, Err(not_now()));
            }
            return;
        }
        let step = match giving {
            Giving::HandOver { .. } => Step::DrainedForHandOver,
            Giving::Demote { .. } => Step::DrainedForDemote,
        };
        let tag = self.begin_step(step);
        self.role_drain = Some(RoleDrain { tag, giving, token, since: self.now });
        self.order_all(&Order::Drain { tag });
    }

    /// Every volume is drained.
    pub(super) fn drained_for_role(&mut self) {
        let Some(drain) = self.role_drain.take() else {
            return;
        };
        if !self.applies(drain.giving) {
            return self.give_drain_up(drain.token, self.why_not_drained(drain.giving));
        }
        self.stop_serving();
        self.record.was_primary = false;
        let step = match (drain.giving, drain.token) {
            (Giving::HandOver { session, then_stop }, token) => {
                Step::HandedOver { session, token, then_stop }
            }
            (Giving::Demote { .. }, Some(token)) => Step::Demoted { token },
            // Only an operator demotes.
            (Giving::Demote { .. }, None) => Step::Noted,
        };
        self.record_only(step);
    }

    /// It is still this server's role, by the same right.
    fn applies(&self, giving: Giving) -> bool {
        let stays = match giving {
            Giving::HandOver { session, .. } => {
                self.serving == Serving::Mirrored && self.in_step_session() == Some(session)
            }
            Giving::Demote { serving: Serving::Mirrored, session } => {
                self.serving == Serving::Mirrored && self.in_step_session() == session
            }
            Giving::Demote { serving, .. } => self.serving == serving,
        };
        stays && self.stopping.is_none()
    }

    /// When the drain under way is given up.
    pub(super) fn role_drain_deadline(&self) -> Option<Instant> {
        self.role_drain.as_ref().map(|drain| drain.since + ANSWER_WAIT)
    }

    /// Ends a drain that does not apply any more, or does not end.
    pub(super) fn check_role_drain(&mut self) {
        let Some(giving) = self.role_drain.as_ref().map(|drain| drain.giving) else {
            return;
        };
        let applies = self.applies(giving);
        let late = self.role_drain_deadline().is_some_and(|at| self.now >= at);
        if applies && !late {
            return;
        }
        let Some(drain) = self.role_drain.take() else {
            return;
        };
        self.pending.retain(|pending| pending.tag != drain.tag);
        if !applies {
            return self.give_drain_up(drain.token, self.why_not_drained(giving));
        }
        // Nothing else tells the volumes that they are to take requests again.
        match self.serving {
            Serving::Alone => {
                let epoch = self.record.epoch_seen.number;
                self.order_all(&Order::Serve { mode: ServeMode::Alone, epoch });
            }
            Serving::Mirrored => self.serve_mirrored(),
            Serving::No | Serving::GoingAlone | Serving::Returning | Serving::Front => {}
        }
        // A peer that asked has a bound of its own.
        if let Some(token) = drain.token {
            let text = format!(
                "requests in flight or marks here did not end within {} s; this server keeps its role and serves on: \
                 see `duplex status`, and try again",
                ANSWER_WAIT.as_secs()
            );
            self.answer(token, Err(Refusal { code: "no-answer", text }));
        }
    }

    fn give_drain_up(&mut self, token: Option<OperatorToken>, refusal: Refusal) {
        match token {
            Some(token) => self.answer(token, Err(refusal)),
            None => {
                let text = format!("{} says: {}", self.config.name, refusal.text);
                self.send(ControlMessage::HandOverRefused { text });
            }
        }
    }

    fn why_not_drained(&self, giving: Giving) -> Refusal {
        if self.stopping.is_some() {
            return Refusal { code: "stopping", text: "the daemon is stopping".to_owned() };
        }
        if self.volumes.iter().any(|volume| volume.failed.is_some()) {
            return Refusal { code: "disk-failed", text: self.why_not_current() };
        }
        match giving {
            Giving::HandOver { .. } | Giving::Demote { serving: Serving::Mirrored, .. } => peer_lost(),
            Giving::Demote { .. } => not_now(),
        }
    }
}

/// A second change of the role while one is under way.
pub(super) fn not_now() -> Refusal {
    Refusal {
        code: "not-now",
        text: "this server's role is changing already; try again in a moment".to_owned(),
    }
}
