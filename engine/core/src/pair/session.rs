//! A session: both hellos, the agreement on them, and what follows from `decide`.

use std::collections::BTreeMap;

use super::full_copy::waits_for_whole_map;
use super::server::{Server, Serving};
use super::steps::Step;
use super::vouch::waits_for_vouched;
use crate::format::record::{CopyState, Era, Origin};
use crate::ids::{Epoch, Generation, Incarnation, SessionId, VolumeIndex};
use crate::message::{ControlMessage, Hello, LiveState, PROTOCOL_VERSION, VolumeHello};
use crate::mirror::api::{CopyChange, CopyPlan, Order, Part};
use crate::resync::decide::WaitFor;
use crate::resync::pair::{PairDecision, PairOutcome, Primary, decide_pair, who_is_primary};
use crate::time::Instant;

/// How far a session is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Phase {
    /// Facts are exchanged.
    Hello,
    /// No work together; a new hello may change that.
    Refused { code: String, rule: String, mine: String, theirs: String },
    /// Both sides have what the other lacks.
    SplitBrain,
    /// This side is becoming a target: its records are being written.
    Joining { parts: Vec<Part> },
    /// Blocks are copied.
    Syncing { synced: Vec<bool> },
    /// Source: G6 step 3 is under way.
    Returning,
    /// Both copies are in step.
    Mirrored,
    /// One copy is failed: nothing is mirrored.
    OneCopy,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Session {
    pub(super) id: SessionId,
    pub(super) peer_incarnation: Incarnation,
    pub(super) began: Instant,
    pub(super) phase: Phase,
    pub(super) sent: Option<Hello>,
    pub(super) peer_hello: Option<Hello>,
    /// The revisions this side agreed to: (mine, theirs).
    agreed_here: Option<(u64, u64)>,
    /// The revisions the other side agreed to, in this side's order.
    agreed_there: Option<(u64, u64)>,
    acted_on: Option<(u64, u64)>,
    pub(super) peer_live: Option<LiveState>,
    pub(super) peer_primary: bool,
    /// Target: `Mirrored` of the source, come before this server's volumes had told that they adopted.
    pub(super) mirrored_early: Option<(Epoch, bool)>,
    /// The peer's disk failed; it forwards its clients' requests here.
    pub(super) host: bool,
    pub(super) echo_ns: u64,
    pub(super) next_heartbeat: Instant,
    pub(super) i_am_source: Option<bool>,
    pub(super) rule: String,
}

impl Server {
    pub(super) fn on_link_up(&mut self, id: SessionId, peer_incarnation: Incarnation) {
        if self.session.is_some() {
            self.lose_session("a new session began");
        }
        self.session = Some(Session {
            id,
            peer_incarnation,
            began: self.now,
            phase: Phase::Hello,
            sent: None,
            peer_hello: None,
            agreed_here: None,
            agreed_there: None,
            acted_on: None,
            peer_live: None,
            peer_primary: false,
            mirrored_early: None,
            host: false,
            echo_ns: 0,
            next_heartbeat: self.now,
            i_am_source: None,
            rule: String::new(),
        });
        self.last_heard = self.now;
        self.event("link-up", "the peer answers on the mirror link".to_owned(), "session");
        self.begin_hello(id);
    }

    pub(super) fn on_link_down(&mut self, id: SessionId, reason: &str) {
        if self.session.as_ref().is_some_and(|s| s.id == id) {
            self.lose_session(reason);
        }
    }

    /// Ends the session from this side.
    pub(super) fn close_session(&mut self, reason: &str) {
        if let Some(id) = self.session.as_ref().map(|s| s.id) {
            self.actions.push_back(super::api::Action::CloseSession(id));
            self.lose_session(reason);
        }
    }

    /// The session is over, whoever ended it.
    pub(super) fn lose_session(&mut self, reason: &str) {
        let Some(session) = self.session.take() else {
            return;
        };
        let in_step = matches!(session.phase, Phase::Mirrored | Phase::Returning);
        self.order_all(&Order::Leave);
        self.eligible = match session.phase {
            Phase::Mirrored => self.all_up_to_date(),
            Phase::Hello | Phase::Refused { .. } => self.eligible,
            Phase::SplitBrain | Phase::Joining { .. } | Phase::Syncing { .. } | Phase::Returning => false,
            // The other copy is the failed one: nobody can have gone on without this one.
            Phase::OneCopy => self.eligible && self.all_up_to_date(),
        };
        if self.holds_lease_rule() {
            self.freeze();
            if in_step {
                self.in_step_heard = self.last_heard;
            }
        }
        if self.serving == Serving::Front {
            // Nobody answers for this server's clients any more.
            self.stop_serving();
        }
        if self.serving == Serving::No {
            self.take_return_back();
        }
        self.peer_copies.fill(None);
        reason.clone_into(&mut self.reason);
        self.event("link-lost", format!("the peer is lost: {reason}"), reason);
        self.operators_lose_session();
        self.stop_loses_session();
    }

    pub(super) fn on_message(&mut self, id: SessionId, message: ControlMessage) {
        if self.session.as_ref().is_none_or(|s| s.id != id) {
            return;
        }
        self.heard();
        match message {
            ControlMessage::Hello(hello) => self.on_hello(*hello),
            ControlMessage::Agree { mine, yours } => {
                if let Some(session) = self.session.as_mut() {
                    session.agreed_there = Some((yours, mine));
                }
                self.try_agree();
            }
            ControlMessage::Refuse { code, text } => self.refused_by_peer(code, text),
            ControlMessage::Heartbeat { sent_ns, echo_ns, promising, live, epoch } => {
                self.on_heartbeat(sent_ns, echo_ns, promising, live, &epoch);
            }
            ControlMessage::Primary { epoch } => self.on_peer_primary(epoch),
            ControlMessage::PromoteAsk { epoch } => self.on_promote_ask(epoch),
            ControlMessage::PromoteAnswer { epoch, granted, text } => {
                self.on_promote_answer(&epoch, granted, text);
            }
            ControlMessage::HandOverAsk => self.on_hand_over_ask(),
            ControlMessage::HandOverRefused { text } => self.on_hand_over_refused(text),
            ControlMessage::HandedOver { epoch } => self.on_handed_over(epoch),
            ControlMessage::Demoted { epoch } => self.on_peer_demoted(&epoch),
            ControlMessage::Mirrored { epoch, primary } => self.on_mirrored(epoch, primary),
            ControlMessage::MirroredAck { epoch: _ } => {}
            ControlMessage::Resync { command } => self.order_all(&Order::Pace(command)),
            ControlMessage::FullCopy { volume } => self.on_full_copy_asked(volume),
            ControlMessage::Resolve { victim } => self.on_resolve_asked(&victim),
            ControlMessage::Resolved => self.on_resolved(Ok(())),
            ControlMessage::ResolveFailed { text } => self.on_resolved(Err(text)),
            ControlMessage::CopyFailed { volume, errno } => {
                self.on_peer_copy_failed(usize::from(volume), errno);
            }
            ControlMessage::Bye { text } => self.on_bye(&text),
        }
    }

    /// Begins the first hello, or says why there is none. What is marked has changed since the disks were read:
    /// the volumes are asked first.
    pub(super) fn begin_hello(&mut self, id: SessionId) {
        if self.session.as_ref().is_none_or(|s| s.id != id) {
            return;
        }
        let unusable = self.volumes.iter().enumerate().find_map(|(at, v)| {
            v.unusable.as_ref().map(|(code, text)| (at, (*code).to_owned(), text.clone()))
        });
        if let Some((at, code, text)) = unusable {
            let text = format!("volume {}: {text}", self.name(at));
            self.send(ControlMessage::Refuse { code, text });
        }
        if self.loaded && self.volumes.iter().any(|v| !v.gone) {
            let tag = self.begin_step(Step::MarksTold);
            self.order_all(&Order::TellMarks { tag });
        }
    }

    fn hello(&self, revision: u64) -> Hello {
        let volumes = self.config.volumes.iter().zip(&self.volumes).filter_map(|(name, volume)| {
            let facts = volume.facts.as_ref()?;
            let mut copy = facts.copy.clone();
            if volume.failed.is_some() {
                copy.state = CopyState::Failed;
            }
            Some(VolumeHello {
                name: name.clone(),
                copy,
                dirty_blocks: facts.dirty_blocks,
                lacks_solo: volume.lacks_solo,
                whole_map: volume.whole_map,
                undo_available: false,
            })
        });
        Hello {
            version: PROTOCOL_VERSION,
            revision,
            server: self.config.name.clone(),
            pair_name: self.config.pair_name.clone(),
            incarnation: self.config.incarnation,
            boot_id: self.config.boot_id,
            live: self.live(),
            record: self.record.clone(),
            cas_outstanding: false,
            granted: self.serving == Serving::GoingAlone,
            config: self.config.config.clone(),
            memory: Vec::new(),
            volumes: volumes.collect(),
        }
    }

    /// A changed fact starts the exchange over (section 7).
    pub(super) fn refresh_hello(&mut self) {
        if !self.loaded || self.stopping.is_some() || self.facts_are_moving() {
            return;
        }
        let Some(session) = self.session.as_ref() else {
            return;
        };
        match session.phase {
            Phase::Hello | Phase::Refused { .. } | Phase::SplitBrain => {}
            Phase::Joining { .. }
            | Phase::Syncing { .. }
            | Phase::Returning
            | Phase::Mirrored
            | Phase::OneCopy => return,
        }
        let revision = session.sent.as_ref().map_or(0, |h| h.revision);
        let now = self.hello(revision);
        if session.sent.as_ref() == Some(&now) {
            return;
        }
        let next = Hello { revision: revision + 1, ..now };
        if let Some(session) = self.session.as_mut() {
            session.sent = Some(next.clone());
        }
        self.send(ControlMessage::Hello(Box::new(next)));
        self.try_agree();
    }

    /// Records are under way whose outcome the hello must tell.
    fn facts_are_moving(&self) -> bool {
        self.is_pending(|step| match step {
            Step::TargetReady { .. }
            | Step::PrimaryReady { .. }
            | Step::Returned { .. }
            | Step::MirroredNoted { .. }
            | Step::HandedOver { .. }
            | Step::Demoted { .. }
            | Step::Surrendered
            | Step::Vouched
            | Step::MapsWhole { .. }
            | Step::Activated { .. }
            | Step::MarksTold
            | Step::TakenBack
            | Step::Noted => true,
            Step::GoneAlone { .. }
            | Step::DrainedForHandOver
            | Step::DrainedForDemote
            | Step::DrainedForStop
            | Step::FrozenForFront { .. }
            | Step::CleanStop => false,
        })
    }

    fn on_hello(&mut self, hello: Hello) {
        let Some(session) = self.session.as_mut() else {
            return;
        };
        match session.phase {
            Phase::Hello | Phase::Refused { .. } | Phase::SplitBrain => {}
            Phase::Joining { .. }
            | Phase::Syncing { .. }
            | Phase::Returning
            | Phase::Mirrored
            | Phase::OneCopy => return self.close_session("the peer began anew"),
        }
        self.peer_copies = hello.volumes.iter().map(|v| Some(v.copy.state)).collect();
        self.peer_copies.resize(self.volumes.len(), None);
        session.peer_live = Some(hello.live);
        session.peer_hello = Some(hello);
        self.try_agree();
    }

    fn try_agree(&mut self) {
        let Some(session) = self.session.as_mut() else {
            return;
        };
        let (Some(mine), Some(theirs)) = (session.sent.as_ref(), session.peer_hello.as_ref()) else {
            return;
        };
        let pair = (mine.revision, theirs.revision);
        if session.agreed_here != Some(pair) {
            session.agreed_here = Some(pair);
            let agree = ControlMessage::Agree { mine: pair.0, yours: pair.1 };
            let id = session.id;
            self.actions.push_back(super::api::Action::Send(id, agree));
        }
        let Some(session) = self.session.as_mut() else {
            return;
        };
        if session.agreed_there == Some(pair) && session.acted_on != Some(pair) {
            session.acted_on = Some(pair);
            self.act_on_agreement();
        }
    }

    /// Both sides hold the same two hellos: the same pure function gives both the same verdict.
    fn act_on_agreement(&mut self) {
        let Some((mine, theirs)) =
            self.session.as_ref().and_then(|s| Some((s.sent.clone()?, s.peer_hello.clone()?)))
        else {
            return;
        };
        self.peer_epoch = super::server::newer(&self.peer_epoch, &theirs.record.epoch_seen);
        if let Some((code, a, b)) = differences(&mine, &theirs) {
            return self.refuse(code, "configuration", a, b);
        }
        let decision = decide_pair(&mine, &theirs);
        let primary = who_is_primary(&decision, &mine, &theirs);
        if let Some(session) = self.session.as_mut() {
            session.rule = decision.rule.to_string();
            session.i_am_source = decision.i_am_source();
        }
        self.apply(decision, primary, &theirs);
    }

    fn apply(&mut self, decision: PairDecision, primary: Primary, theirs: &Hello) {
        let rule = decision.rule.to_string();
        match decision.outcome {
            PairOutcome::Refuse { code, mine, theirs } => self.refuse(code, &rule, mine, theirs),
            PairOutcome::Wait(what) => {
                self.set_phase(Phase::Hello);
                self.reason = match what {
                    WaitFor::Activate => {
                        format!("no copy is activated yet ({rule}): `duplex activate` on one server, once")
                    }
                    WaitFor::Settled => format!("waits until a server has taken its right ({rule})"),
                };
            }
            PairOutcome::SplitBrain => self.split_brain(&rule),
            PairOutcome::InStep { i_am_source } => self.in_step(i_am_source, primary, &rule),
            PairOutcome::Resume { i_am_primary } => self.resume(i_am_primary, &rule),
            PairOutcome::Copy { i_am_source, right_first, parts } => {
                let parts: Option<Vec<Part>> = parts.into_iter().collect();
                match parts {
                    None => self.one_copy(i_am_source, primary, theirs, &rule),
                    Some(parts) if i_am_source => self.copy_out(right_first, primary, parts, &rule),
                    Some(parts) => self.copy_in(right_first, primary, parts, theirs, &rule),
                }
            }
        }
    }

    pub(super) fn set_phase(&mut self, phase: Phase) {
        if let Some(session) = self.session.as_mut() {
            session.phase = phase;
        }
    }

    fn refuse(&mut self, code: &str, rule: &str, mine: String, theirs: String) {
        let phase = Phase::Refused {
            code: code.to_owned(),
            rule: rule.to_owned(),
            mine: mine.clone(),
            theirs: theirs.clone(),
        };
        let known = self.session.as_ref().is_some_and(|s| s.phase == phase);
        self.set_phase(phase);
        if !known {
            let hellos = self.session.as_ref().and_then(|s| Some((s.sent.as_ref()?, s.peer_hello.as_ref()?)));
            let fix = hellos.map_or_else(String::new, |(a, b)| super::remedy::remedy(code, a, b));
            let text = format!("the peer is refused: {code} ({rule}): here {mine}, there {theirs}. {fix}");
            self.reason.clone_from(&text);
            let fields = BTreeMap::from([
                ("code".to_owned(), code.to_owned()),
                ("rule".to_owned(), rule.to_owned()),
                ("mine".to_owned(), mine),
                ("theirs".to_owned(), theirs),
            ]);
            self.event_with("refused", text, rule, fields);
        }
    }

    fn refused_by_peer(&mut self, code: String, text: String) {
        let reason = format!("the peer refuses: {text}");
        self.event("refused", reason.clone(), &code);
        self.reason = reason;
        self.set_phase(Phase::Refused { code, rule: "peer".to_owned(), mine: String::new(), theirs: text });
    }

    /// D4: one copy is failed, the other serves: at once where one of the servers was primary, else by the operator's
    /// word. A server without a copy ends its service first; its next hello says so.
    fn one_copy(&mut self, mine_is_good: bool, primary: Primary, theirs: &Hello, rule: &str) {
        let peer = self.config.peer.clone();
        if !mine_is_good {
            self.eligible = false;
            let served = self.is_primary();
            self.stop_serving();
            self.set_phase(if served { Phase::Hello } else { Phase::OneCopy });
            self.reason = format!(
                "this copy is failed: nothing is mirrored ({rule}); {peer} has the good one. Replace the disk, then \
                 `duplex attach VOLUME`"
            );
            return;
        }
        if theirs.live.is_alone() || theirs.live.is_live_primary() {
            return self.set_phase(Phase::Hello);
        }
        self.set_phase(Phase::OneCopy);
        self.eligible = true;
        match self.serving {
            Serving::Alone | Serving::GoingAlone => {
                self.reason = format!("{peer}'s copy is failed: nothing is mirrored ({rule})");
            }
            Serving::Mirrored | Serving::Returning => {
                self.go_alone(&format!("the peer's copy failed ({rule})"), Origin::Solo);
            }
            Serving::No | Serving::Front if primary == Primary::Mine => {
                self.go_alone(&format!("takeover: the peer's copy failed ({rule})"), Origin::Solo);
            }
            Serving::No | Serving::Front => self.reason = waits_for_promote(&peer),
        }
    }

    /// D15 without a mark: nothing to copy.
    fn in_step(&mut self, i_am_source: bool, primary: Primary, rule: &str) {
        let part = if i_am_source { Part::Source(CopyPlan::None) } else { Part::Target(CopyPlan::None) };
        if self.holds_lease_rule() && primary != Primary::Mine {
            self.stop_serving();
        }
        self.join_all(part, false);
        self.enter_mirrored(rule);
        match primary {
            Primary::Mine => self.become_primary(None),
            Primary::Theirs | Primary::Nobody => {}
        }
    }

    /// D12: the live primary goes on in the same epoch.
    fn resume(&mut self, i_am_primary: bool, rule: &str) {
        let part = if i_am_primary { Part::Source(CopyPlan::None) } else { Part::Target(CopyPlan::None) };
        self.join_all(part, i_am_primary);
        if let Some(session) = self.session.as_mut() {
            session.peer_primary = !i_am_primary;
        }
        self.enter_mirrored(rule);
        if i_am_primary {
            self.serving = Serving::Mirrored;
            self.in_step_since = self.now;
            self.serve_mirrored();
        }
    }

    /// Both copies are in step.
    pub(super) fn enter_mirrored(&mut self, reason: &str) {
        self.enter_mirrored_with(reason, BTreeMap::new());
    }

    /// The same, with what is to be told of the resync before.
    pub(super) fn enter_mirrored_with(&mut self, reason: &str, fields: BTreeMap<String, String>) {
        self.in_step_heard = self.now;
        self.eligible = true;
        self.peer_copies.fill(Some(CopyState::UpToDate));
        self.transition("synced", reason, |s| s.set_phase(Phase::Mirrored));
        self.tell_in_event(fields);
        self.beat_now();
    }

    fn join_all(&mut self, part: Part, resume: bool) {
        for index in self.indexes() {
            self.join(index, part, resume);
        }
    }

    fn join(&mut self, index: VolumeIndex, part: Part, resume: bool) {
        let Some(session) = self.session.as_ref().map(|s| s.id) else {
            return;
        };
        if let Some(volume) = self.volumes.get_mut(usize::from(index.0)) {
            volume.whole_map = false;
        }
        self.order(index, Order::Join { session, part, resume });
    }

    /// Joins every volume again with the given role, after a role changed inside the session.
    pub(super) fn join_in_step(&mut self, source: bool) {
        self.join_all(
            if source { Part::Source(CopyPlan::None) } else { Part::Target(CopyPlan::None) },
            false,
        );
    }

    /// This side is the source. It serves only by right (T2, G4): a frozen primary and one that is to become
    /// primary go alone first; the changed facts then begin the exchange again.
    fn copy_out(&mut self, right_first: bool, primary: Primary, parts: Vec<Part>, rule: &str) {
        let alone = self.serving == Serving::Alone;
        if !alone && (right_first || self.holds_lease_rule() || primary == Primary::Mine) {
            self.set_phase(Phase::Hello);
            self.go_alone(&format!("source of the resync by {rule}"), Origin::Solo);
            return;
        }
        if (!alone && self.vouches(rule)) || self.makes_maps_whole(&parts, rule) {
            return;
        }
        for (index, part) in self.indexes().zip(parts) {
            self.join(index, part, false);
        }
        let synced = vec![false; self.volumes.len()];
        self.resynced.fill(None);
        self.peer_copies.fill(Some(CopyState::Inconsistent { toward: Generation::NONE }));
        self.transition("sync-started", &format!("source by {rule}"), |s| {
            s.set_phase(Phase::Syncing { synced });
        });
        self.tell_in_event(self.marks_fields());
    }

    /// This side is the target, once the source holds its right (G5).
    fn copy_in(&mut self, right_first: bool, primary: Primary, parts: Vec<Part>, theirs: &Hello, rule: &str) {
        let source_serves = theirs.live.is_alone();
        if !source_serves && (right_first || theirs.live.is_live_primary() || primary == Primary::Theirs) {
            // The source goes alone first; its next hello comes then.
            return self.set_phase(Phase::Hello);
        }
        if (!source_serves && waits_for_vouched(theirs)) || waits_for_whole_map(&parts, theirs) {
            return self.set_phase(Phase::Hello);
        }
        let Some(session) = self.session.as_ref().map(|s| s.id) else {
            return;
        };
        self.stop_serving();
        self.eligible = false;
        self.record.era = Era::Pair;
        self.record.was_primary = false;
        self.record.epoch_seen = super::server::newer(&self.record.epoch_seen, &theirs.record.epoch_seen);
        let changes = self
            .volumes
            .iter()
            .zip(&theirs.volumes)
            .map(|(mine, theirs)| target_change(mine.facts.as_ref().map(|f| &f.copy), theirs))
            .collect();
        self.transition("will-sync", &format!("target by {rule}"), |s| {
            s.set_phase(Phase::Joining { parts });
        });
        self.record_all(Step::TargetReady { session }, changes, true);
    }

    /// The target's records are durable: data may come in.
    pub(super) fn target_ready(&mut self, id: SessionId) {
        let Some(session) = self.session.as_mut().filter(|s| s.id == id) else {
            return;
        };
        let Phase::Joining { parts } = session.phase.clone() else {
            return;
        };
        session.phase = Phase::Syncing { synced: vec![false; parts.len()] };
        for (index, part) in self.indexes().zip(parts) {
            self.join(index, part, false);
        }
    }

    /// Requests end; this server is not primary any more.
    pub(super) fn stop_serving(&mut self) {
        if self.serving != Serving::No {
            self.serving = Serving::No;
            self.waiting_to_serve = None;
            self.attempt = None;
            self.order_all(&Order::Close);
            self.operators_not_alone();
        }
    }
}

/// Nobody serves and one copy is left.
pub(super) fn waits_for_promote(peer: &crate::ids::ServerName) -> String {
    format!(
        "{peer}'s copy is failed: nothing is mirrored, and nobody serves; `duplex promote` makes this server primary"
    )
}

/// What a target writes before the first block: its identity if it is blank, and towards what it is copied.
/// The source's marks are durable: a copy that breaks off goes on where it was.
fn target_change(mine: Option<&crate::format::record::CopyRecord>, theirs: &VolumeHello) -> CopyChange {
    let source = &theirs.copy;
    if mine.is_some_and(|c| c.state == CopyState::Blank) {
        return CopyChange::Identity {
            pair: source.pair,
            volume: source.volume,
            size_bytes: source.size_bytes,
            block_bytes: source.block_bytes,
            sector_bytes: source.sector_bytes,
            generation: source.generation,
            state: CopyState::Inconsistent { toward: source.generation },
        };
    }
    CopyChange::Target { toward: source.generation }
}

/// The first difference that forbids a session: code, here, there.
fn differences(mine: &Hello, theirs: &Hello) -> Option<(&'static str, String, String)> {
    if mine.version != theirs.version {
        return Some(("version", mine.version.to_string(), theirs.version.to_string()));
    }
    if mine.memory != theirs.memory {
        let say = |hello: &Hello| {
            let regions = hello.memory.iter().map(|m| format!("{}={}", m.name, m.size_bytes));
            regions.collect::<Vec<_>>().join(", ")
        };
        return Some(("memory", say(mine), say(theirs)));
    }
    let keys: std::collections::BTreeSet<&String> = mine.config.keys().chain(theirs.config.keys()).collect();
    keys.into_iter().find_map(|key| {
        let (a, b) = (mine.config.get(key), theirs.config.get(key));
        (a != b).then(|| {
            let say = |value: Option<&String>| format!("{key} = {}", value.map_or("(absent)", |v| v));
            (code_of_key(key), say(a), say(b))
        })
    })
}

/// What differs, in a stable word of its own where a monitor would want to tell it apart.
fn code_of_key(key: &str) -> &'static str {
    match key.rsplit('.').next() {
        Some("block_bytes") => "block-size",
        Some("size") => "volume-size",
        Some("link") => "address",
        Some(_) | None => "configuration",
    }
}
