//! The machine of one server: what it knows, and where each input goes.

use std::collections::{BTreeMap, VecDeque};

use super::api::{Action, Input, Operator, OperatorToken, Refusal, ServerConfig};
use super::session::{Phase, Session};
use super::steps::Pending;
use super::stop::Stopping;
use crate::event::Event;
use crate::format::record::{CopyRecord, CopyState, Era, ServerRecord};
use crate::ids::{Epoch, Generation, VolumeIndex};
use crate::message::{ControlMessage, LiveState};
use crate::mirror::api::{Facts, Order, Report, Whose};
use crate::time::Instant;

/// By what right requests complete.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Serving {
    No,
    /// Both copies, a lease. Without a session this is the frozen state.
    Mirrored,
    /// The right is taken, the record not yet durable everywhere.
    GoingAlone,
    Alone,
    /// The solo right is being given back (G6 step 3 to 5).
    Returning,
    /// This server's disk failed: its clients' requests go to the peer, which is primary (G12).
    Front,
}

/// What a finished resync copied.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Resynced {
    pub(super) total_bytes: u64,
    pub(super) sent_bytes: u64,
}

/// What is known of a volume.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct VolumeState {
    pub(super) facts: Option<Facts>,
    pub(super) unusable: Option<(&'static str, String)>,
    pub(super) failed: Option<i32>,
    /// Its disk lacks the record of going alone that another volume's has.
    pub(super) lacks_solo: bool,
    /// Whether it lacks that was settled when its disk was read; later this process's own records count.
    pub(super) solo_settled: bool,
    /// Every block is marked under a generation no copy was made towards, and nothing was copied since.
    pub(super) whole_map: bool,
    /// Detached, and its backing let go: nothing answers for it.
    pub(super) gone: bool,
}

/// A volume as the status page shows it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VolumeView<'a> {
    /// The copy's record; `None` until it is loaded or when it is unusable.
    pub copy: Option<&'a CopyRecord>,
    /// The metadata cannot be used: code and sentence.
    pub unusable: Option<(&'static str, &'a str)>,
    /// The copy failed with this errno.
    pub failed: Option<i32>,
    /// The peer's copy as it last said.
    pub peer_copy: Option<CopyState>,
}

/// The session as the status page shows it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SessionView {
    /// The peer's state as it last said.
    pub peer_live: Option<LiveState>,
    /// When it was last heard.
    pub last_heard: Instant,
    /// This server copies to the peer (syncing).
    pub i_am_source: Option<bool>,
    /// Both copies are in step.
    pub mirrored: bool,
    /// The session is refused: code, rule, both values.
    pub refusal: Option<(String, String, String, String)>,
}

/// The machine of one server of a pair.
#[derive(Debug)]
pub struct Server {
    pub(super) config: ServerConfig,
    pub(super) now: Instant,
    pub(super) actions: VecDeque<Action>,
    pub(super) volumes: Vec<VolumeState>,
    pub(super) loaded: bool,
    /// The disks were read once: the record is what this process knows.
    pub(super) was_loaded: bool,
    /// A disk was put in while this process runs.
    attached: bool,
    pub(super) record: ServerRecord,
    pub(super) serving: Serving,
    pub(super) session: Option<Session>,
    pub(super) pending: VecDeque<Pending>,
    pub(super) role_drain: Option<super::drain::RoleDrain>,
    /// What the record said before the return under way.
    pub(super) era_before_return: Era,
    /// What stood before the G4 under way.
    pub(super) attempt: Option<super::solo::Attempt>,
    pub(super) next_tag: u64,
    pub(super) ids_drawn: u64,
    pub(super) lease_until: Instant,
    /// When the peer was last heard, in whatever session.
    pub(super) last_heard: Instant,
    /// When the peer was last heard while both were in step: from here a lost peer's silence counts.
    pub(super) in_step_heard: Instant,
    /// When this server began to serve by both copies.
    pub(super) in_step_since: Instant,
    /// The newest epoch the peer spoke of.
    pub(super) peer_epoch: Epoch,
    /// Since when a primary without a session waits for its peer.
    pub(super) frozen_since: Option<Instant>,
    /// The own copy was mirrored when the peer was lost, and this process saw it (promote --peer-is-down).
    pub(super) eligible: bool,
    /// Nothing may be served before this: the old primary's lease (section 6).
    pub(super) serve_not_before: Instant,
    pub(super) waiting_to_serve: Option<u64>,
    pub(super) stopping: Option<Stopping>,
    /// Commands that came before the disks were read.
    pub(super) early: Vec<(OperatorToken, Operator)>,
    pub(super) in_use: Option<String>,
    pub(super) volumes_turn: bool,
    pub(super) peer_copies: Vec<Option<CopyState>>,
    /// The next solo run of the volume begins with a map that reaches no older copy: the operator wants a full copy.
    pub(super) full_copy: Vec<bool>,
    /// What the resync of this session copied, by volume, once it is done.
    pub(super) resynced: Vec<Option<Resynced>>,
    pub(super) reason: String,
    pub(super) operators: Vec<super::operator::Asked>,
}

impl Server {
    /// A server whose volumes are being loaded.
    pub fn new(config: ServerConfig) -> Self {
        let count = config.volumes.len();
        let record = ServerRecord::fresh(config.boot_id);
        Self {
            config,
            now: Instant::default(),
            actions: VecDeque::new(),
            volumes: vec![VolumeState::default(); count],
            loaded: false,
            was_loaded: false,
            attached: false,
            record,
            serving: Serving::No,
            session: None,
            pending: VecDeque::new(),
            role_drain: None,
            era_before_return: Era::Pair,
            attempt: None,
            next_tag: 1,
            ids_drawn: 0,
            lease_until: Instant::default(),
            last_heard: Instant::default(),
            in_step_heard: Instant::default(),
            in_step_since: Instant::default(),
            peer_epoch: Epoch::never(),
            frozen_since: None,
            eligible: false,
            serve_not_before: Instant::default(),
            waiting_to_serve: None,
            stopping: None,
            early: Vec::new(),
            in_use: None,
            volumes_turn: true,
            peer_copies: vec![None; count],
            full_copy: vec![false; count],
            resynced: vec![None; count],
            reason: "reading the disks".to_owned(),
            operators: Vec::new(),
        }
    }

    /// Takes one input in.
    pub fn handle(&mut self, now: Instant, input: Input) {
        self.now = self.now.max(now);
        match input {
            Input::Report(volume, report) => self.on_report(volume, report),
            Input::LinkUp { session, peer_incarnation } => self.on_link_up(session, peer_incarnation),
            Input::LinkDown { session, reason } => self.on_link_down(session, &reason),
            Input::Message(session, message) => self.on_message(session, message),
            Input::Operator(token, command) => self.on_operator(token, command),
            Input::Saved(result) => self.on_saved(result),
            Input::Gone(volume) => self.on_gone(volume),
            Input::Reopened(volume) => self.on_reopened(volume),
            Input::Time => {}
        }
        self.on_time();
        self.refresh_hello();
    }

    /// The next thing the shell must do.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// The device of a volume is used by this (mount point or program), or by nobody: role changes that take
    /// it away are refused while it is.
    pub fn set_in_use(&mut self, by: Option<String>) {
        self.in_use = by;
    }

    /// False while a volume's thread did not turn its loop within `freeze`: heartbeats promise nothing then.
    pub const fn set_volumes_turn(&mut self, turn: bool) {
        self.volumes_turn = turn;
    }

    /// Mirrored requests complete only before this.
    pub const fn lease_until(&self) -> Instant {
        self.lease_until
    }

    /// The durable record as far as it is known here.
    pub const fn record(&self) -> &ServerRecord {
        &self.record
    }

    /// Why the state is what it is.
    pub fn reason(&self) -> &str {
        &self.reason
    }

    /// A frozen primary: since when.
    pub fn frozen_since(&self) -> Option<Instant> {
        match self.serving {
            Serving::Mirrored | Serving::Returning if self.now >= self.lease_until => self.frozen_since,
            Serving::GoingAlone => Some(self.frozen_since.unwrap_or(self.now)),
            Serving::Mirrored | Serving::Returning | Serving::No | Serving::Alone | Serving::Front => None,
        }
    }

    /// A volume for the status page.
    pub fn volume(&self, index: VolumeIndex) -> Option<VolumeView<'_>> {
        let volume = self.volumes.get(usize::from(index.0))?;
        Some(VolumeView {
            copy: volume.facts.as_ref().map(|f| &f.copy),
            unusable: volume.unusable.as_ref().map(|(code, text)| (*code, text.as_str())),
            failed: volume.failed,
            peer_copy: self.peer_copies.get(usize::from(index.0)).copied().flatten(),
        })
    }

    /// The live state (docs/protocol.md section 2).
    pub fn live(&self) -> LiveState {
        if !self.loaded {
            return LiveState::Loading;
        }
        if self.stopping.is_some() {
            return LiveState::Stopping;
        }
        let phase = self.session.as_ref().map(|s| &s.phase);
        match self.serving {
            Serving::No => match phase {
                Some(
                    Phase::Joining { .. }
                    | Phase::Syncing { .. }
                    | Phase::Returning
                    | Phase::Mirrored
                    | Phase::OneCopy,
                ) => LiveState::Secondary,
                Some(Phase::Hello | Phase::Refused { .. } | Phase::SplitBrain) | None => LiveState::Joining,
            },
            Serving::Mirrored => match phase {
                Some(Phase::Mirrored) => LiveState::PrimaryMirrored,
                Some(_) | None => LiveState::Frozen,
            },
            Serving::Front => LiveState::Secondary,
            Serving::GoingAlone => LiveState::Granted,
            Serving::Alone => match phase {
                Some(Phase::Syncing { synced, .. }) if synced.iter().all(|s| *s) => LiveState::SyncTail,
                Some(Phase::Syncing { .. }) => LiveState::Syncing,
                Some(_) | None => LiveState::Alone,
            },
            Serving::Returning => match phase {
                Some(Phase::Returning) => LiveState::Returning,
                Some(_) | None => LiveState::Frozen,
            },
        }
    }

    /// The operators' word for the state.
    pub fn state_word(&self) -> &'static str {
        if self.volumes.iter().any(|v| v.unusable.is_some()) {
            return "refused";
        }
        if self.stopping.is_some() {
            return "down";
        }
        let phase = self.session.as_ref().map(|s| &s.phase);
        match (self.serving, phase) {
            (_, Some(Phase::Mirrored)) => "mirrored",
            (_, Some(Phase::Syncing { .. } | Phase::Returning | Phase::Joining { .. })) => "syncing",
            (Serving::No, Some(Phase::Refused { .. } | Phase::SplitBrain)) => "refused",
            (Serving::Front, _) => "dying",
            (Serving::Alone | Serving::GoingAlone, _) => "alone",
            (Serving::Mirrored | Serving::Returning, _) => "mirrored",
            (Serving::No, Some(Phase::Hello | Phase::OneCopy) | None) => "joining",
        }
    }

    /// The operators' word for the role.
    pub fn role_word(&self) -> &'static str {
        match self.serving {
            Serving::Mirrored | Serving::Alone | Serving::GoingAlone | Serving::Returning => "primary",
            Serving::Front => "secondary",
            Serving::No => {
                let blank = self.copies().any(|c| c.state == CopyState::Blank);
                if !self.loaded || blank || self.volumes.iter().any(|v| v.unusable.is_some()) {
                    "none"
                } else {
                    "secondary"
                }
            }
        }
    }

    /// The session for the status page.
    pub fn session_view(&self) -> Option<SessionView> {
        let session = self.session.as_ref()?;
        let refusal = match &session.phase {
            Phase::Refused { code, rule, mine, theirs } => {
                Some((code.clone(), rule.clone(), mine.clone(), theirs.clone()))
            }
            Phase::SplitBrain => Some((
                "split-brain".to_owned(),
                session.rule.clone(),
                self.describe_generations(),
                session.peer_hello.as_ref().map_or_else(String::new, describe_peer),
            )),
            Phase::Hello
            | Phase::Joining { .. }
            | Phase::Syncing { .. }
            | Phase::Returning
            | Phase::Mirrored
            | Phase::OneCopy => None,
        };
        Some(SessionView {
            peer_live: session.peer_live,
            last_heard: self.last_heard,
            i_am_source: session.i_am_source,
            mirrored: matches!(session.phase, Phase::Mirrored),
            refusal,
        })
    }

    /// Every volume is served by right or could be: the copies of all volumes.
    pub(super) fn copies(&self) -> impl Iterator<Item = &CopyRecord> {
        self.volumes.iter().filter_map(|v| v.facts.as_ref().map(|f| &f.copy))
    }

    pub(super) fn all_up_to_date(&self) -> bool {
        self.loaded
            && self.volumes.iter().all(|v| v.failed.is_none())
            && self.copies().all(|c| c.state == CopyState::UpToDate)
    }

    pub(super) fn is_primary(&self) -> bool {
        match self.serving {
            Serving::Mirrored | Serving::GoingAlone | Serving::Alone | Serving::Returning => true,
            Serving::No | Serving::Front => false,
        }
    }

    pub(super) fn describe_generations(&self) -> String {
        describe(self.copies())
    }

    /// A new random identity, from the shell's seed.
    pub(super) fn draw(&mut self) -> u128 {
        self.ids_drawn += 1;
        let mut high = self.config.id_seed as u64 ^ self.ids_drawn;
        let mut low = (self.config.id_seed >> 64) as u64 ^ self.ids_drawn.rotate_left(32);
        high = mix(mix(high).wrapping_add(low));
        low = mix(mix(low).wrapping_add(high));
        (u128::from(high) << 64 | u128::from(low)).max(1)
    }

    pub(super) fn order_all(&mut self, order: &Order) {
        for index in self.indexes() {
            self.order(index, order.clone());
        }
    }

    pub(super) fn order(&mut self, index: VolumeIndex, order: Order) {
        self.actions.push_back(Action::Order(index, order));
    }

    pub(super) fn indexes(&self) -> impl Iterator<Item = VolumeIndex> + use<> {
        (0..u16::try_from(self.volumes.len()).unwrap_or(u16::MAX)).map(VolumeIndex)
    }

    pub(super) fn answer(&mut self, token: OperatorToken, result: Result<String, Refusal>) {
        self.actions.push_back(Action::Answer(token, result));
    }

    pub(super) fn send(&mut self, message: ControlMessage) {
        if let Some(session) = self.session.as_ref() {
            self.actions.push_back(Action::Send(session.id, message));
        }
    }

    pub(super) fn event(&mut self, kind: &str, text: String, reason: &str) {
        self.event_with(kind, text, reason, BTreeMap::new());
    }

    /// One event a change of state: the rule, the evidence, both servers' view (P7).
    pub(super) fn event_with(
        &mut self,
        kind: &str,
        text: String,
        reason: &str,
        fields: BTreeMap<String, String>,
    ) {
        let peer_state = self.session.as_ref().and_then(|s| s.peer_live).map(|l| live_word(l).to_owned());
        let mut evidence = BTreeMap::new();
        evidence.insert("peer_heard_ms".to_owned(), self.now.since(self.last_heard).as_millis().to_string());
        evidence.insert("link".to_owned(), if self.session.is_some() { "up" } else { "down" }.to_owned());
        let after = self.state_word().to_owned();
        let event = Event {
            server: self.config.name.clone(),
            kind: kind.to_owned(),
            text,
            reason: reason.to_owned(),
            epoch: self.record.epoch_seen.clone(),
            state_before: after.clone(),
            state_after: after,
            peer_state,
            evidence,
            fields,
        };
        self.actions.push_back(Action::Event(Box::new(event)));
    }

    /// Changes the state between two looks at it, and tells why in one event.
    pub(super) fn transition(&mut self, kind: &str, reason: &str, change: impl FnOnce(&mut Self)) {
        let before = self.state_word().to_owned();
        change(self);
        reason.clone_into(&mut self.reason);
        let text = format!("{kind}: {reason}");
        self.event(kind, text, reason);
        if let Some(Action::Event(event)) = self.actions.back_mut() {
            event.state_before = before;
        }
    }

    fn on_report(&mut self, index: VolumeIndex, report: Report) {
        let at = usize::from(index.0);
        if at >= self.volumes.len() {
            return;
        }
        match report {
            Report::Loaded(facts) => {
                self.volumes[at].facts = Some(*facts);
                self.check_loaded();
            }
            Report::Unusable { code, text } => {
                self.reason.clone_from(&text);
                self.volumes[at].unusable = Some((code, text.clone()));
                self.answer_early();
                self.event("refused", format!("volume {}: {text}", self.config.volumes[at]), code);
            }
            Report::Recorded { tag, copy } => {
                // One that landed after its disk was given up tells of a step that did not happen.
                if self.volumes[at].failed.is_none() {
                    self.set_copy(at, *copy);
                }
                self.on_recorded(at, tag);
            }
            Report::Synced { total_bytes, sent_bytes } => {
                self.resynced[at] = Some(Resynced { total_bytes, sent_bytes });
                self.on_synced(at);
            }
            Report::Adopted { copy } => {
                self.set_copy(at, *copy);
                self.on_adopted(at);
            }
            Report::Dirty { blocks } => {
                if let Some(facts) = self.volumes[at].facts.as_mut() {
                    facts.dirty_blocks = blocks;
                }
            }
            Report::Drained { tag } => self.on_recorded(at, tag),
            Report::CopyFailed { whose, errno, range } => match whose {
                Whose::Mine => self.on_my_copy_failed(at, errno, range),
                Whose::Peers => self.on_peer_copy_failed(at, errno),
            },
            Report::Healed { range } => {
                let text = format!("volume {}: {range} was read from the peer and rewritten", self.name(at));
                self.event("block-healed", text, "a read failed here");
            }
            Report::Unreadable { range } => {
                let text = format!(
                    "volume {}: {range} cannot be read here, and the peer lacks it: everything else is copied, and \
                     the resync ends once this is written anew (restore what it belongs to)",
                    self.name(at)
                );
                let fields = BTreeMap::from([
                    ("volume".to_owned(), self.name(at).to_owned()),
                    ("offset_bytes".to_owned(), range.offset_bytes.to_string()),
                    ("length_bytes".to_owned(), range.length_bytes.to_string()),
                ]);
                self.event_with("unreadable", text, "a read failed at the source of a resync", fields);
            }
        }
    }

    /// A disk is being replaced, and nothing answers for the old one any more: nobody waits for it.
    fn on_gone(&mut self, index: VolumeIndex) {
        let at = usize::from(index.0);
        if at >= self.volumes.len() {
            return;
        }
        self.close_session("a disk is being attached");
        self.volumes[at].gone = true;
        self.on_my_copy_failed(at, super::operator::ENODEV, None);
        let owed = |p: &&Pending| p.waits.get(at) == Some(&true);
        let tags: Vec<u64> = self.pending.iter().filter(owed).map(|p| p.tag).collect();
        for tag in tags {
            self.on_recorded(at, tag);
        }
    }

    /// A replaced disk: the server knows its facts only once it is loaded.
    fn on_reopened(&mut self, index: VolumeIndex) {
        let Some(volume) = self.volumes.get_mut(usize::from(index.0)) else {
            return;
        };
        *volume = VolumeState::default();
        self.attached = true;
        self.loaded = false;
        self.eligible = false;
        self.close_session("a disk was attached");
        self.reason = "reading the disks".to_owned();
    }

    pub(super) fn name(&self, at: usize) -> &str {
        self.config.volumes.get(at).map_or("", String::as_str)
    }

    fn set_copy(&mut self, at: usize, copy: CopyRecord) {
        if let Some(facts) = self.volumes[at].facts.as_mut() {
            facts.copy = copy;
        }
    }

    /// All disks are read: the newest server record counts; a volume that lacks it is settled by `decide`.
    fn check_loaded(&mut self) {
        if self.loaded || self.volumes.iter().any(|v| v.facts.is_none()) {
            return;
        }
        let newest = self
            .volumes
            .iter()
            .filter_map(|v| v.facts.as_ref())
            .map(|f| &f.server)
            // A volume that lacks a solo run has a record of the same number that does not tell of it.
            .max_by_key(|record| (record.order(), record.era.is_solo()))
            .cloned();
        let first = !self.was_loaded;
        // A disk that was put in while this process runs may know less than the process does.
        if let Some(record) = newest.filter(|record| first || record.order() > self.record.order()) {
            self.record = record;
        }
        self.was_loaded = true;
        for volume in self.volumes.iter_mut().filter(|volume| !volume.solo_settled) {
            let lacks = |facts: &Facts| !facts.server.era.is_solo();
            volume.lacks_solo = self.record.era.is_solo() && volume.facts.as_ref().is_some_and(lacks);
            volume.solo_settled = true;
        }
        self.loaded = true;
        let dirty: u64 = self.volumes.iter().filter_map(|v| v.facts.as_ref()).map(|f| f.dirty_blocks).sum();
        let replayed: u64 =
            self.volumes.iter().filter_map(|v| v.facts.as_ref()).map(|f| f.replayed_extents).sum();
        self.reason = "the disks are read; the peer is not heard yet".to_owned();
        let mut fields = BTreeMap::new();
        fields.insert("dirty_blocks".to_owned(), dirty.to_string());
        fields.insert("in_flight_extents".to_owned(), replayed.to_string());
        let text = format!("recovered {dirty} dirty blocks, {replayed} extents were in flight");
        self.event_with("recovered", text, "start", fields);
        // A disk that comes back while the process runs gives no right: the peer may have it by now.
        if !self.attached {
            self.resume_solo();
        }
        if let Some(session) = self.session.as_ref().map(|s| s.id) {
            self.begin_hello(session);
        }
        self.answer_early();
    }
}

/// The operators' word for a peer's live state.
pub(super) const fn live_word(live: LiveState) -> &'static str {
    match live {
        LiveState::Loading | LiveState::Joining => "joining",
        LiveState::Secondary | LiveState::PrimaryMirrored | LiveState::Frozen => "mirrored",
        LiveState::Granted | LiveState::Alone => "alone",
        LiveState::Syncing | LiveState::SyncTail | LiveState::Returning => "syncing",
        LiveState::Stopping => "down",
    }
}

fn describe_peer(hello: &crate::message::Hello) -> String {
    describe(hello.volumes.iter().map(|v| &v.copy))
}

fn describe<'a>(copies: impl Iterator<Item = &'a CopyRecord>) -> String {
    let generations: Vec<String> = copies.map(|c| c.generation.to_string()).collect();
    generations.join(", ")
}

/// The finaliser of splitmix64 (public domain, S. Vigna): spreads one changed bit over all.
const fn mix(mut z: u64) -> u64 {
    z = z.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The newest epoch of two.
pub(super) fn newer(a: &Epoch, b: &Epoch) -> Epoch {
    if b.number > a.number { b.clone() } else { a.clone() }
}

/// The newest generation both lineages share.
pub(super) fn common_ancestor(mine: &CopyRecord, theirs: &CopyRecord) -> Option<Generation> {
    std::iter::once(mine.generation)
        .chain(mine.history.iter().copied())
        .find(|g| !g.is_none() && (*g == theirs.generation || theirs.descends_from(*g)))
}
