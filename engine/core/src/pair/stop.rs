//! The orderly end: drain, settle the marks, write `clean`, say goodbye.

use std::time::Duration;

use super::api::{Action, OperatorToken};
use super::server::{Server, Serving};
use super::steps::Step;
use crate::format::record::Origin;
use crate::message::ControlMessage;
use crate::mirror::api::Order;
use crate::time::Instant;

/// An orderly end that takes longer than this becomes a disorderly one: marks stay, nothing is lost.
const GIVE_UP: Duration = Duration::from_secs(8);

#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Stopping {
    pub(super) token: Option<OperatorToken>,
    pub(super) give_up_at: Instant,
    why: String,
}

impl Server {
    /// Takes no new request, lets those in flight end, settles, writes `clean`, ends.
    pub(super) fn begin_stop(&mut self, token: Option<OperatorToken>, why: &str) {
        let give_up_at = self.now + GIVE_UP;
        let why = why.to_owned();
        self.transition("clean-stop", &why, |_| ());
        self.stopping = Some(Stopping { token, give_up_at, why });
        if !self.loaded {
            return self.stopped();
        }
        if self.volumes.iter().all(|v| v.gone) {
            return self.stopped();
        }
        let tag = self.begin_step(Step::DrainedForStop);
        self.order_all(&Order::Drain { tag });
    }

    pub(super) fn drained_for_stop(&mut self) {
        self.waiting_to_serve = None;
        if self.serving != Serving::No {
            self.serving = Serving::No;
            self.order_all(&Order::Close);
        }
        if self.volumes.iter().any(|v| v.failed.is_some()) {
            // A failed disk takes no record: this is no clean end.
            return self.stopped();
        }
        self.record.clean = true;
        self.record_only(Step::CleanStop);
    }

    /// Everything is durable, or given up.
    pub(super) fn stopped(&mut self) {
        let Some(stopping) = self.stopping.as_mut() else {
            return;
        };
        let token = stopping.token.take();
        let text = stopping.why.clone();
        self.send(ControlMessage::Bye { text: text.clone() });
        self.event("down", format!("this server ends: {text}"), &text);
        if let Some(token) = token {
            self.answer(token, Ok(text));
        }
        self.actions.push_back(Action::Exit);
    }

    /// The peer ends in order: no need to wait for its silence.
    pub(super) fn on_bye(&mut self, text: &str) {
        let reason = format!("the peer ended in order: {text}");
        self.close_session(&reason);
        if self.holds_lease_rule() && self.stopping.is_none() {
            self.go_alone(&reason, Origin::Solo);
        }
    }

    /// A mirrored primary that loses its peer while it drains has operations nobody will acknowledge.
    pub(super) fn stop_loses_session(&mut self) {
        if self.stopping.is_some() && self.holds_lease_rule() {
            self.serving = Serving::No;
            self.order_all(&Order::Close);
        }
    }

    pub(super) fn check_stop(&mut self) {
        let late = self.stopping.as_ref().is_some_and(|s| s.give_up_at <= self.now);
        if late {
            if let Some(stopping) = self.stopping.as_mut() {
                stopping.give_up_at = Instant::NEVER;
            }
            self.order_all(&Order::Close);
            self.stopped();
        }
    }
}
