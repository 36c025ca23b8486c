//! Roles inside a session in step: becoming primary, giving it up, handing it over (G9).

use super::api::OperatorToken;
use super::drain::Giving;
use super::operator::Waiting;
use super::server::{Server, Serving, newer};
use super::session::Phase;
use super::steps::Step;
use crate::format::record::Era;
use crate::ids::{Epoch, SessionId};
use crate::message::ControlMessage;
use crate::mirror::api::{Order, ServeMode};

impl Server {
    pub(super) fn in_step_session(&self) -> Option<SessionId> {
        self.session.as_ref().filter(|s| s.phase == Phase::Mirrored).map(|s| s.id)
    }

    /// A promotion of this server is under way.
    pub(super) fn becoming_primary(&self) -> bool {
        self.is_pending(|step| matches!(step, Step::PrimaryReady { .. }))
    }

    /// Nobody serves and both copies are in step: this server becomes primary in a new epoch.
    pub(super) fn become_primary(&mut self, token: Option<OperatorToken>) {
        let Some(session) = self.in_step_session() else {
            return;
        };
        let number = self.next_epoch_number();
        let epoch = Epoch { number, holder: Some(self.config.name.clone()) };
        self.record.epoch_seen = epoch.clone();
        self.record.era = Era::Pair;
        self.record.last_primary = number;
        self.record.was_primary = true;
        self.record_only(Step::PrimaryReady { session, epoch, token });
    }

    pub(super) fn primary_ready(&mut self, id: SessionId, epoch: Epoch, token: Option<OperatorToken>) {
        let stands = self.in_step_session() == Some(id)
            && self.session.as_ref().is_some_and(|s| !s.peer_primary)
            && self.serving == Serving::No
            && self.stopping.is_none();
        if !stands {
            if let Some(token) = token {
                self.answer(token, Err(peer_lost()));
            }
            return;
        }
        self.join_in_step(true);
        self.serving = Serving::Mirrored;
        self.in_step_since = self.now;
        self.serve_mirrored();
        self.send(ControlMessage::Primary { epoch: epoch.clone() });
        self.beat_now();
        let reason = format!("primary of epoch {}", epoch.number);
        self.transition("promoted", &reason, |_| ());
        if let Some(token) = token {
            self.answer(token, Ok(reason));
        }
    }

    /// Requests complete with both acknowledgements and a lease.
    pub(super) fn serve_mirrored(&mut self) {
        let epoch = self.record.epoch_seen.number;
        self.order_all(&Order::Serve { mode: ServeMode::Mirrored, epoch });
    }

    pub(super) fn on_peer_primary(&mut self, epoch: Epoch) {
        let Some(session) = self.session.as_mut() else {
            return;
        };
        session.peer_primary = true;
        if self.serving == Serving::Front {
            return self.begin_front(&epoch);
        }
        self.record.epoch_seen = newer(&self.record.epoch_seen, &epoch);
        self.record_only(Step::Noted);
        let reason = format!("the peer is primary of epoch {}", epoch.number);
        self.transition("switchover", &reason, |_| ());
        self.taken_over();
    }

    /// The peer asks for the role while nobody serves. One of two askers wins by name.
    pub(super) fn on_promote_ask(&mut self, epoch: Epoch) {
        let asking = self.operators.iter().any(|asked| matches!(asked.waiting, Waiting::Promote { .. }));
        let i_win = asking && self.config.name < self.config.peer;
        let free = self.in_step_session().is_some()
            && self.serving == Serving::No
            && !self.becoming_primary()
            && self.stopping.is_none()
            && !i_win;
        let text = if free { String::new() } else { "the peer is primary or becomes it".to_owned() };
        if free {
            if let Some(session) = self.session.as_mut() {
                session.peer_primary = true;
            }
            self.join_in_step(false);
        }
        self.send(ControlMessage::PromoteAnswer { epoch, granted: free, text });
    }

    pub(super) fn on_promote_answer(&mut self, epoch: &Epoch, granted: bool, text: String) {
        let mine = |w: &Waiting| matches!(w, Waiting::Promote { number } if *number == epoch.number);
        let Some(token) = self.take_asked(mine) else {
            return;
        };
        let free = self.session.as_ref().is_some_and(|s| !s.peer_primary);
        if granted && free {
            self.become_primary(Some(token));
        } else {
            let text = if text.is_empty() { "the peer became primary first".to_owned() } else { text };
            self.answer(token, Err(super::api::Refusal { code: "not-now", text }));
        }
    }

    /// G9: drain, flush both, zero marks; then secondary, durably; then the peer's turn.
    pub(super) fn begin_hand_over(&mut self, token: Option<OperatorToken>, then_stop: bool) {
        let Some(session) = self.in_step_session() else {
            return;
        };
        self.begin_role_drain(Giving::HandOver { session, then_stop }, token);
    }

    pub(super) fn handed_over(&mut self, id: SessionId, token: Option<OperatorToken>, then_stop: bool) {
        if self.in_step_session() != Some(id) {
            if let Some(token) = token {
                self.answer(token, Err(peer_lost()));
            }
            return;
        }
        self.join_in_step(false);
        let epoch = self.record.epoch_seen.clone();
        self.send(ControlMessage::HandedOver { epoch });
        self.transition("switchover", "handed over to the peer", |_| ());
        if let Some(token) = token {
            // A goodbye before the peer is primary would end the session that its promotion needs.
            self.wait(token, Waiting::TakenOver { then_stop });
        }
    }

    /// The peer took over: what was waited for is done, and `down` goes on to its end.
    fn taken_over(&mut self) {
        while let Some(token) = self.take_asked(|w| *w == Waiting::TakenOver { then_stop: true }) {
            self.begin_stop(Some(token), "handed over");
        }
        while let Some(token) = self.take_asked(|w| *w == Waiting::TakenOver { then_stop: false }) {
            self.answer(token, Ok("handed over; the peer is primary".to_owned()));
        }
    }

    /// The peer is secondary, durably: this server's turn.
    pub(super) fn on_handed_over(&mut self, epoch: Epoch) {
        if let Some(session) = self.session.as_mut() {
            session.peer_primary = false;
        }
        self.peer_epoch = newer(&self.peer_epoch, &epoch);
        if self.in_step_session().is_some() && self.serving == Serving::No && self.stopping.is_none() {
            let token = self.take_asked(|w| *w == Waiting::HandOver);
            self.become_primary(token);
        }
    }

    pub(super) fn on_hand_over_ask(&mut self) {
        let refusal = if self.serving != Serving::Mirrored || self.in_step_session().is_none() {
            Some("the peer is not a primary with both copies in step".to_owned())
        } else if self.gives_role_up() {
            Some("the peer gives its role up already; try again in a moment".to_owned())
        } else {
            self.in_use.as_ref().map(|by| format!("the device is in use there: {by}"))
        };
        match refusal {
            Some(text) => self.send(ControlMessage::HandOverRefused { text }),
            None => self.begin_hand_over(None, false),
        }
    }

    pub(super) fn on_hand_over_refused(&mut self, text: String) {
        if let Some(token) = self.take_asked(|w| *w == Waiting::HandOver) {
            let code = if text.contains("in use") { "in-use" } else { "not-now" };
            self.answer(token, Err(super::api::Refusal { code, text }));
        }
    }

    pub(super) fn begin_demote(&mut self, token: OperatorToken) {
        let giving = Giving::Demote { serving: self.serving, session: self.in_step_session() };
        self.begin_role_drain(giving, Some(token));
    }

    /// Not primary any more; a solo right stays until a resync gave it back.
    pub(super) fn demoted(&mut self, token: OperatorToken) {
        let epoch = self.record.epoch_seen.clone();
        if self.in_step_session().is_some() {
            self.join_in_step(false);
        }
        self.send(ControlMessage::Demoted { epoch });
        self.transition("demoted", "by the operator", |_| ());
        self.answer(token, Ok("secondary".to_owned()));
    }

    pub(super) fn on_peer_demoted(&mut self, epoch: &Epoch) {
        self.peer_epoch = newer(&self.peer_epoch, epoch);
        if let Some(session) = self.session.as_mut() {
            session.peer_primary = false;
        }
        self.transition("demoted", "the peer is not primary any more", |_| ());
    }
}

pub(super) fn peer_lost() -> super::api::Refusal {
    super::api::Refusal {
        code: "peer-lost",
        text: "the peer was lost in between; see `duplex status`".to_owned(),
    }
}
