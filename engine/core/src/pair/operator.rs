//! What the operator may ask, and when it is refused.

use std::time::Duration;

use super::api::{Operator, OperatorToken, Refusal};
use super::drain::not_now;
use super::server::{Server, Serving};
use super::session::Phase;
use super::steps::Step;
use crate::format::record::{CopyState, Era, Origin};
use crate::ids::{Epoch, Generation, PairId, VolumeId, VolumeIndex};
use crate::limits::SIZE_ALIGN_BYTES;
use crate::message::ControlMessage;
use crate::mirror::api::{CopyChange, Order, Pace};
use crate::time::Instant;

/// A command that is not answered yet.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Asked {
    pub(super) token: OperatorToken,
    pub(super) waiting: Waiting,
    since: Instant,
}

/// What an operator's command waits for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Waiting {
    /// The peer's answer to PromoteAsk.
    Promote { number: u64 },
    /// The peer hands over.
    HandOver,
    /// This server serves alone.
    Alone,
    /// The peer becomes primary after a hand-over.
    TakenOver { then_stop: bool },
    /// The victim saves its blocks.
    Resolve,
}

pub(super) fn refuse(code: &'static str, text: impl Into<String>) -> Result<String, Refusal> {
    Err(Refusal { code, text: text.into() })
}

/// ESTALE-like errno told for a copy that the operator detached: no device.
pub(super) const ENODEV: i32 = 19;

/// A peer that does not answer a command within this time never will: it lives (else the session would be over), but a
/// disk or a device there does not let go. The same holds for a drain here. Longer than `stall_ms`, after which such a
/// disk counts as failed.
pub(super) const ANSWER_WAIT: Duration = Duration::from_secs(20);

/// So many commands may wait until the disks are read.
const EARLY_MAX: usize = 64;

impl Server {
    pub(super) fn on_operator(&mut self, token: OperatorToken, command: Operator) {
        let reading = !self.loaded && self.volumes.iter().all(|v| v.unusable.is_none());
        if reading && !matches!(command, Operator::Stop | Operator::Down) && self.early.len() < EARLY_MAX {
            return self.early.push((token, command));
        }
        if !self.loaded && !matches!(command, Operator::Stop | Operator::Down) {
            let text = format!("the copies are not ready: {}", self.reason);
            return self.answer(token, refuse("not-ready", text));
        }
        if self.stopping.is_some() {
            return self.answer(token, refuse("stopping", "the daemon is stopping"));
        }
        match command {
            Operator::Activate => self.activate(token),
            Operator::Promote => self.promote(token),
            Operator::PromotePeerIsDown => self.promote_peer_is_down(token),
            Operator::PromoteForce(generation) => self.promote_force(token, generation),
            Operator::Demote => self.demote(token),
            Operator::Switchover => self.switchover(token),
            Operator::Down => self.down(token),
            Operator::Stop => self.begin_stop(Some(token), "stopped"),
            Operator::Resync(pace) => self.pace(token, pace),
            Operator::FullCopy { volume, target } => {
                let target_is_me = target == self.config.name;
                self.full_copy(token, volume, target_is_me);
            }
            Operator::Resolve { victim } => self.resolve(token, &victim),
            Operator::Detach(volume) => self.detach(token, volume),
        }
    }

    /// The local copy is given up. A server that does not serve lets its backing go at once.
    fn detach(&mut self, token: OperatorToken, index: VolumeIndex) {
        let lets_go = self.serving == Serving::No;
        let at = usize::from(index.0);
        let Some(volume) = self.volumes.get(at) else {
            return;
        };
        if volume.gone {
            return self.answer(token, Ok("detached already".to_owned()));
        }
        if volume.failed.is_none() && self.is_primary() && self.in_step_session().is_none() {
            let text = format!(
                "this server serves without its peer: its copy of volume {} is the only current one. `duplex status --wait \
                 mirrored` first, then `duplex switchover`",
                self.name(at)
            );
            return self.answer(token, refuse("last-copy", text));
        }
        if volume.failed.is_none() && self.peer_copies.get(at) == Some(&Some(CopyState::Failed)) {
            let (name, peer) = (self.name(at), &self.config.peer);
            let text = format!(
                "{peer}'s copy of volume {name} is failed: this one is the last. Mend the disk there first, `duplex attach \
                 {name}` there, then `duplex status --wait mirrored`"
            );
            return self.answer(token, refuse("last-copy", text));
        }
        let Some(volume) = self.volumes.get_mut(at) else {
            return;
        };
        volume.gone = lets_go;
        if lets_go {
            self.on_my_copy_failed(at, ENODEV, None);
        }
        self.order(index, Order::Fail { errno: ENODEV });
        self.answer(token, Ok("detached".to_owned()));
    }

    /// True when a volume's backing may be closed: it was detached and nothing here needs it.
    pub fn lets_go(&self, index: VolumeIndex) -> bool {
        self.volumes.get(usize::from(index.0)).is_some_and(|v| v.gone)
    }

    /// The disks are read, or cannot be: commands that came before.
    pub(super) fn answer_early(&mut self) {
        for (token, command) in std::mem::take(&mut self.early) {
            self.on_operator(token, command);
        }
    }

    /// First start of a new pair: this server's blank copies get an identity, the peer copies everything.
    fn activate(&mut self, token: OperatorToken) {
        let active = self.copies().position(|c| c.state != CopyState::Blank);
        if let Some(at) = active {
            let text = format!("volume {} has an identity already; nothing to activate", self.name(at));
            return self.answer(token, refuse("already-active", text));
        }
        let peer_active = self
            .session
            .as_ref()
            .and_then(|s| s.peer_hello.as_ref())
            .is_some_and(|h| h.volumes.iter().any(|v| v.copy.state != CopyState::Blank));
        if peer_active {
            let text = "the peer is active already; this server becomes its copy by itself";
            return self.answer(token, refuse("peer-active", text));
        }
        let pair = PairId(self.draw());
        let capacities: Vec<u64> = self.copies().map(|c| c.size_bytes).collect();
        let peers: Vec<u64> = self
            .session
            .as_ref()
            .and_then(|s| s.peer_hello.as_ref())
            .map(|h| h.volumes.iter().map(|v| v.copy.size_bytes).collect())
            .unwrap_or_default();
        let mut changes = Vec::new();
        for (at, capacity) in capacities.into_iter().enumerate() {
            let size = capacity.min(peers.get(at).copied().unwrap_or(u64::MAX));
            let size_bytes = size / SIZE_ALIGN_BYTES * SIZE_ALIGN_BYTES;
            let (volume, generation) = (VolumeId(self.draw()), Generation(self.draw()));
            let Some(copy) = self.volumes[at].facts.as_ref().map(|f| &f.copy) else {
                continue;
            };
            changes.push(CopyChange::Identity {
                pair,
                volume,
                size_bytes,
                block_bytes: copy.block_bytes,
                sector_bytes: copy.sector_bytes,
                generation,
                state: CopyState::UpToDate,
            });
        }
        let number = self.next_epoch_number();
        self.record.epoch_seen = Epoch { number, holder: Some(self.config.name.clone()) };
        self.record.era = Era::Solo(number);
        self.record.last_primary = number;
        self.record.was_primary = true;
        self.attempt = None;
        self.serving = Serving::GoingAlone;
        self.record_all(Step::Activated { token }, changes, true);
    }

    pub(super) fn activated(&mut self, token: OperatorToken) {
        self.transition("activated", "by the operator", |_| ());
        let epoch = self.record.epoch_seen.number;
        self.gone_alone(epoch);
        self.answer(token, Ok("activated: this server is primary".to_owned()));
    }

    fn promote(&mut self, token: OperatorToken) {
        if self.is_primary() {
            return self.answer(token, Ok("this server is primary already".to_owned()));
        }
        if self.becoming_primary() {
            return self.answer(token, refuse("not-now", "this server is becoming primary already"));
        }
        if !self.all_up_to_date() {
            return self.answer(token, refuse("not-up-to-date", self.why_not_current()));
        }
        // The role is on its way to the peer: asking for it now would make two of one hand-over.
        if self.is_pending(|step| matches!(step, Step::HandedOver { .. } | Step::Demoted { .. })) {
            let text = "this server is giving its role up; try again in a moment".to_owned();
            return self.answer(token, refuse("not-now", text));
        }
        let phase = self.session.as_ref().map(|s| (s.phase.clone(), s.peer_primary));
        match phase {
            Some((Phase::Mirrored, true)) => {
                self.wait(token, Waiting::HandOver);
                self.send(ControlMessage::HandOverAsk);
            }
            Some((Phase::Mirrored, false)) => {
                let number = self.next_epoch_number();
                let epoch = Epoch { number, holder: Some(self.config.name.clone()) };
                self.wait(token, Waiting::Promote { number });
                self.send(ControlMessage::PromoteAsk { epoch });
            }
            Some((Phase::Syncing { .. } | Phase::Returning, false))
                if self.session.as_ref().is_some_and(|s| s.i_am_source == Some(true)) =>
            {
                self.wait(token, Waiting::Alone);
                self.go_alone("promoted by the operator while it copies to the peer", Origin::Solo);
            }
            // The peer's copy is failed, and it does not serve: nobody can hold anything newer (G12).
            Some((Phase::OneCopy, false)) if self.eligible => {
                self.wait(token, Waiting::Alone);
                self.go_alone("promoted by the operator; the peer's copy is failed", Origin::Solo);
            }
            Some((Phase::SplitBrain, _)) => {
                let text =
                    "both servers hold blocks the other lacks; see `duplex explain`, then `duplex resolve`";
                self.answer(token, refuse("split-brain", text));
            }
            // Its own solo right was never given back: nobody can hold anything newer.
            Some(_) | None if self.record.era.is_solo() && !self.solo_is_unfinished() => {
                self.wait(token, Waiting::Alone);
                self.take_up_solo("promoted by the operator; it holds the solo right");
            }
            Some(_) => {
                let text = format!(
                    "the peer is heard, but there is no agreement with it on who serves ({}); see `duplex explain`",
                    self.reason
                );
                self.answer(token, refuse("peer-not-heard", text));
            }
            None => {
                let text = "the peer is not heard, so it may be primary. If it is down: \
                            `duplex promote --peer-is-down`";
                self.answer(token, refuse("peer-not-heard", text));
            }
        }
    }

    pub(super) fn why_not_current(&self) -> String {
        let failed = self.volumes.iter().enumerate().find_map(|(at, v)| Some((at, v.failed?)));
        if let Some((at, errno)) = failed {
            let (name, peer) = (self.name(at), &self.config.peer);
            let words = super::solo::errno_words(errno);
            return format!(
                "volume {name}: this copy is failed ({words}); the good copy is {peer}'s: `duplex promote` \
                 there, and `duplex attach {name}` here once the disk is replaced"
            );
        }
        let bad = self.volumes.iter().enumerate().find_map(|(at, v)| {
            let state = v.facts.as_ref().map(|f| f.copy.state)?;
            (state != CopyState::UpToDate).then_some((at, state.word()))
        });
        match bad {
            Some((at, word)) => format!("volume {}: this copy is {word}", self.name(at)),
            None => "the copies are not ready".to_owned(),
        }
    }

    fn promote_peer_is_down(&mut self, token: OperatorToken) {
        if self.is_primary() {
            return self.answer(token, Ok("this server is primary already".to_owned()));
        }
        if self.session.is_some() {
            let text = "the peer is heard; use `duplex promote` or `duplex switchover`";
            return self.answer(token, refuse("peer-is-heard", text));
        }
        if !self.all_up_to_date() {
            return self.answer(token, refuse("not-up-to-date", self.why_not_current()));
        }
        // Where it never served alone, a copy that lost its memory may lack what the peer's has (D13).
        let holds_right = self.record.era.is_solo()
            && !(self.solo_is_unfinished() && self.copies().any(|copy| copy.unproven));
        if !self.eligible && !holds_right {
            let text = format!(
                "this copy is not proven current: it was not mirrored when the peer was last heard (since epoch {}). \
                 If data may be lost: `duplex promote --force {}`",
                self.record.epoch_seen.number,
                self.describe_generations()
            );
            return self.answer(token, refuse("not-proven-current", text));
        }
        self.serve_not_before = self.last_heard + self.config.silent;
        self.wait(token, Waiting::Alone);
        self.go_alone("takeover: the operator says that the peer is down", Origin::Solo);
    }

    fn promote_force(&mut self, token: OperatorToken, generation: Generation) {
        if self.is_primary() {
            return self.answer(token, Ok("this server is primary already".to_owned()));
        }
        let unusable = |s: CopyState| match s {
            CopyState::Blank | CopyState::Inconsistent { .. } | CopyState::Failed => true,
            CopyState::UpToDate | CopyState::Outdated => false,
        };
        let failed = self.volumes.iter().any(|v| v.failed.is_some());
        if failed || self.copies().any(|c| unusable(c.state)) {
            return self.answer(token, refuse("no-usable-copy", self.why_not_current()));
        }
        if !self.copies().any(|c| c.generation == generation) {
            let text = format!(
                "{generation} is not a generation of this server's copies; they are {} (`duplex explain`)",
                self.describe_generations()
            );
            return self.answer(token, refuse("wrong-generation", text));
        }
        self.serve_not_before = self.last_heard + self.config.silent;
        self.wait(token, Waiting::Alone);
        self.go_alone("forced by the operator: data may be lost", Origin::Forced);
    }

    fn demote(&mut self, token: OperatorToken) {
        match self.serving {
            Serving::No => self.answer(token, Ok("this server is not primary".to_owned())),
            Serving::Front => match self.in_use.clone() {
                Some(by) => self.answer(token, in_use(&by)),
                None => {
                    self.stop_serving();
                    self.answer(token, Ok("requests go no more to the peer from here".to_owned()));
                }
            },
            Serving::GoingAlone | Serving::Returning => {
                self.answer(token, refuse("not-now", "a change of the right is under way; try again"));
            }
            Serving::Mirrored if self.in_step_session().is_none() => {
                self.answer(token, refuse("frozen", "the peer is silent; this server goes alone first"));
            }
            Serving::Mirrored | Serving::Alone if self.gives_role_up() => self.answer(token, Err(not_now())),
            Serving::Mirrored | Serving::Alone => match self.in_use.clone() {
                Some(by) => self.answer(token, in_use(&by)),
                None => self.begin_demote(token),
            },
        }
    }

    fn switchover(&mut self, token: OperatorToken) {
        if self.in_step_session().is_none() {
            let text = format!("both copies must be in step; the state is {}", self.state_word());
            return self.answer(token, refuse("not-mirrored", text));
        }
        match (self.serving, self.in_use.clone()) {
            (Serving::Mirrored, _) if self.gives_role_up() => self.answer(token, Err(not_now())),
            (Serving::Mirrored, Some(by)) => self.answer(token, in_use(&by)),
            (Serving::Mirrored, None) => self.begin_hand_over(Some(token), false),
            (Serving::No, _) => self.promote(token),
            (Serving::GoingAlone | Serving::Alone | Serving::Returning | Serving::Front, _) => {
                self.answer(token, refuse("not-now", "a change of the right is under way; try again"));
            }
        }
    }

    fn down(&mut self, token: OperatorToken) {
        let hand_over = self.serving == Serving::Mirrored && self.in_step_session().is_some();
        // A front has clients, too: it only lacks the disk.
        let has_clients = self.is_primary() || self.serving == Serving::Front;
        match self.in_use.clone() {
            Some(by) if has_clients => self.answer(token, in_use(&by)),
            Some(_) | None if hand_over && self.gives_role_up() => self.answer(token, Err(not_now())),
            Some(_) | None if hand_over => self.begin_hand_over(Some(token), true),
            Some(_) | None => self.begin_stop(Some(token), "down"),
        }
    }

    fn pace(&mut self, token: OperatorToken, pace: Pace) {
        self.order_all(&Order::Pace(pace));
        self.send(ControlMessage::Resync { command: pace });
        let text = match pace {
            Pace::Pause => "the resync is paused; what is marked stays marked".to_owned(),
            Pace::Resume => "the resync goes on".to_owned(),
            Pace::Priority(priority) => format!("the resync has {} priority", priority.word()),
            Pace::MaxBytesPerSecond(0) => "the resync has no cap".to_owned(),
            Pace::MaxBytesPerSecond(rate) => format!("the resync copies at most {rate} bytes/s"),
        };
        self.event("resync-command", text, "by the operator");
        self.answer(token, Ok("done".to_owned()));
    }

    /// The command is answered later.
    pub(super) fn wait(&mut self, token: OperatorToken, waiting: Waiting) {
        self.operators.push(Asked { token, waiting, since: self.now });
    }

    /// The first command that waits for this.
    pub(super) fn take_asked(&mut self, test: impl Fn(&Waiting) -> bool) -> Option<OperatorToken> {
        let at = self.operators.iter().position(|asked| test(&asked.waiting))?;
        Some(self.operators.remove(at).token)
    }

    /// Commands that waited for this.
    pub(super) fn operators_gone_alone(&mut self) {
        let reason = format!("primary of epoch {}, alone", self.record.epoch_seen.number);
        while let Some(token) = self.take_asked(|waiting| *waiting == Waiting::Alone) {
            self.answer(token, Ok(reason.clone()));
        }
    }

    /// Going alone was given up.
    fn not_alone(&self) -> Refusal {
        Refusal {
            code: "not-alone",
            text: format!("this server did not become primary: {}", self.why_not_current()),
        }
    }

    pub(super) fn operators_not_alone(&mut self) {
        while let Some(token) = self.take_asked(|waiting| *waiting == Waiting::Alone) {
            let refusal = self.not_alone();
            self.answer(token, Err(refusal));
        }
    }

    pub(super) fn operators_lose_session(&mut self) {
        for asked in std::mem::take(&mut self.operators) {
            match asked.waiting {
                Waiting::Alone => self.operators.push(asked),
                Waiting::TakenOver { then_stop: true } => {
                    self.begin_stop(
                        Some(asked.token),
                        "handed over; the peer was lost before it said that it is primary: if it is not, \
                         `duplex promote --peer-is-down` there",
                    );
                }
                Waiting::Promote { .. }
                | Waiting::HandOver
                | Waiting::TakenOver { then_stop: false }
                | Waiting::Resolve => {
                    self.answer(asked.token, Err(super::roles::peer_lost()));
                }
            }
        }
    }

    /// When the next command gets its answer although the peer gave none.
    pub(super) fn operators_deadline(&self) -> Option<Instant> {
        self.operators.iter().filter(|asked| asked.waiting.is_bounded()).map(|a| a.since + ANSWER_WAIT).min()
    }

    /// The peer lives and does not answer: nobody waits for ever.
    pub(super) fn check_operators(&mut self) {
        if self.operators_deadline().is_none_or(|at| self.now < at) {
            return;
        }
        let now = self.now;
        let late = |asked: &Asked| asked.waiting.is_bounded() && now >= asked.since + ANSWER_WAIT;
        let (late, rest) = std::mem::take(&mut self.operators).into_iter().partition(late);
        self.operators = rest;
        for asked in late {
            self.give_up_waiting(asked);
        }
    }

    fn give_up_waiting(&mut self, asked: Asked) {
        let (peer, waited_s) = (self.config.peer.clone(), ANSWER_WAIT.as_secs());
        let text = match asked.waiting {
            Waiting::TakenOver { then_stop: true } => {
                let why = format!(
                    "handed over; {peer} did not say that it is primary within {waited_s} s: see `duplex status` \
                     there; if it is not, `duplex promote --peer-is-down` there"
                );
                return self.begin_stop(Some(asked.token), &why);
            }
            Waiting::TakenOver { then_stop: false } => format!(
                "this server gave its role up, but {peer} did not say that it is primary within {waited_s} s; nobody \
                 may be serving: see `duplex status` there, then `duplex promote` where it is to be primary"
            ),
            Waiting::Promote { .. } | Waiting::HandOver => format!(
                "{peer} is heard, but did not give the role up within {waited_s} s; see `duplex status` there and \
                 try again"
            ),
            // Not bounded: the first ends with the lease, the second takes as long as there are blocks to save.
            Waiting::Alone | Waiting::Resolve => return self.operators.push(asked),
        };
        self.answer(asked.token, refuse("no-answer", text));
    }
}

impl Waiting {
    /// The peer alone can end the wait.
    const fn is_bounded(&self) -> bool {
        match self {
            Self::Promote { .. } | Self::HandOver | Self::TakenOver { .. } => true,
            Self::Alone | Self::Resolve => false,
        }
    }
}

fn in_use(by: &str) -> Result<String, Refusal> {
    refuse("in-use", format!("the device is in use: {by}; unmount it, or use --force"))
}
