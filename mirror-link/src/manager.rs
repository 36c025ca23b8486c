//! The one task that owns the session: which paths stand, which one carries the control channel, which volumes
//! need a connection.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use duplex_core::ids::{Incarnation, SessionId, VolumeIndex};
use duplex_core::message::ControlMessage;
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval};

use crate::config::GOOD_AFTER;
use crate::control::{ControlWord, LinkWord, encode_control, encode_link};
use crate::data_dial::{Dialled, VolumeConnections, dial_volume};
use crate::dialler::{Backoff, reason};
use crate::frame::{Channel, Routing};
use crate::handshake::{HandshakeError, PeerFacts, Refusal, Shared};
use crate::link::{DataConnection, LinkEvent, SessionEnd};
use crate::listener::session_unknown;
use crate::path::{Outbox, PathCounters};
use crate::secret::session_id;
use crate::session::{Arrival, Session};
use crate::stream::StreamError;

/// How often owed acknowledgements and retries are looked at.
const TICK: Duration = Duration::from_millis(20);
/// For the answer to a proposed session.
const PROPOSAL_TIMEOUT: Duration = Duration::from_secs(1);
/// Data connections being dialled at once.
const DIALS_MAX: usize = 4;

/// From the handle.
#[derive(Debug)]
pub(crate) enum Command {
    Send { session: SessionId, message: ControlMessage },
    Close { session: SessionId, reason: String },
    DataBroken { session: SessionId, volume: VolumeIndex, attempt: u64 },
    Wanted(bool),
}

/// A listener asks whether a data connection belongs to the session.
pub(crate) struct DataAsk {
    pub(crate) session: SessionId,
    pub(crate) incarnation: Incarnation,
    pub(crate) volume: VolumeIndex,
    pub(crate) attempt: u64,
    pub(crate) answer: oneshot::Sender<Result<(), Refusal>>,
}

/// From the connections' tasks.
pub(crate) enum Input {
    ControlUp { path: u16, connection: u64, peer: PeerFacts, outbox: Outbox },
    ControlDown { connection: u64, error: StreamError },
    NotConnected { path: u16, error: HandshakeError },
    Silence { connection: u64, silent: bool },
    Word { connection: u64, routing: Routing, word: ControlWord },
    DataAsked(DataAsk),
    DataAccepted(DataConnection),
    DataDialled(Dialled),
    Event(LinkEvent),
}

/// A process-wide number for a control connection.
pub(crate) fn next_connection() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

struct Control {
    path: u16,
    peer: PeerFacts,
    outbox: Outbox,
    silent: bool,
    /// The session the peer's frames on this connection belong to.
    theirs: Option<SessionId>,
    /// The session this server's frames on this connection belong to.
    mine: Option<SessionId>,
}

enum Slot {
    None,
    /// Dialler: waits for the other part of the identity.
    Proposed {
        connection: u64,
        part: u128,
        since: Instant,
    },
    /// Listener: the identity is agreed, the dialler has not used it yet.
    Agreed(Session),
    Up(Session, Instant),
}

/// See the module's text.
pub(crate) struct Manager {
    shared: Arc<Shared>,
    counters: Arc<[Arc<PathCounters>]>,
    inputs: mpsc::Sender<Input>,
    events: mpsc::Sender<LinkEvent>,
    outgoing: Vec<LinkEvent>,
    tasks: JoinSet<()>,
    controls: BTreeMap<u64, Control>,
    slot: Slot,
    volumes: VolumeConnections,
    dials: Arc<Semaphore>,
    wanted: bool,
    open_at: Instant,
    backoff: Backoff,
    /// Why each path is down, as last told.
    told: BTreeMap<u16, (bool, bool, String)>,
}

impl Manager {
    pub(crate) fn new(
        shared: Arc<Shared>,
        counters: Arc<[Arc<PathCounters>]>,
        inputs: mpsc::Sender<Input>,
        events: mpsc::Sender<LinkEvent>,
        tasks: JoinSet<()>,
    ) -> Self {
        let timers = &shared.config.timers;
        Self {
            backoff: Backoff::new(timers),
            volumes: VolumeConnections::new(shared.config.volumes.len(), timers),
            shared,
            counters,
            inputs,
            events,
            outgoing: Vec::new(),
            tasks,
            controls: BTreeMap::new(),
            slot: Slot::None,
            dials: Arc::new(Semaphore::new(DIALS_MAX)),
            wanted: true,
            open_at: Instant::now(),
            told: BTreeMap::new(),
        }
    }

    /// Runs until the last handle or the receiver of events is gone. Dropping the tasks ends every connection.
    pub(crate) async fn run(
        mut self,
        mut commands: mpsc::Receiver<Command>,
        mut inputs: mpsc::Receiver<Input>,
    ) {
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                command = commands.recv() => match command {
                    Some(command) => self.command(command),
                    None => return,
                },
                input = inputs.recv() => match input {
                    Some(input) => self.input(input),
                    None => return,
                },
                _ = ticks.tick() => self.tick(),
                Some(_) = self.tasks.join_next() => {}
            }
            for event in std::mem::take(&mut self.outgoing) {
                if self.events.send(event).await.is_err() {
                    return;
                }
            }
        }
    }

    fn command(&mut self, command: Command) {
        match command {
            Command::Send { session, message } => self.send(session, &message),
            Command::Close { session, reason } => {
                if self.session_id() == Some(session) {
                    self.end(SessionEnd::Closed(reason));
                }
            }
            Command::DataBroken { session, volume, attempt } => {
                if self.session_id() == Some(session) {
                    self.volumes.broken(volume, attempt, Instant::now());
                    self.dial_volumes();
                }
            }
            Command::Wanted(wanted) => {
                self.wanted = wanted;
                self.backoff.reset();
                self.open_at = Instant::now();
                if !wanted {
                    self.end(SessionEnd::Closed("disconnected by the operator".to_owned()));
                }
            }
        }
    }

    fn input(&mut self, input: Input) {
        match input {
            Input::ControlUp { path, connection, peer, outbox } => {
                self.control_up(path, connection, peer, outbox);
            }
            Input::ControlDown { connection, error } => self.control_down(connection, &error),
            Input::NotConnected { path, error } => self.not_connected(path, error),
            Input::Silence { connection, silent } => self.silence(connection, silent),
            Input::Word { connection, routing, word } => self.word(connection, routing, word),
            Input::DataAsked(ask) => self.data_asked(ask),
            Input::DataAccepted(data) => {
                if self.session_id() == Some(data.session) {
                    self.outgoing.push(LinkEvent::Data(data));
                }
            }
            Input::DataDialled(dialled) => self.data_dialled(dialled),
            Input::Event(event) => self.outgoing.push(event),
        }
    }

    fn tick(&mut self) {
        let ack = match &mut self.slot {
            Slot::Up(session, _) => session.take_ack(true),
            Slot::None | Slot::Proposed { .. } | Slot::Agreed(_) => None,
        };
        if let Some(ack) = ack {
            self.say_ack(ack);
        }
        if let Slot::Proposed { since, .. } = self.slot
            && since.elapsed() >= PROPOSAL_TIMEOUT
        {
            self.slot = Slot::None;
        }
        self.open();
        self.dial_volumes();
    }

    fn session_id(&self) -> Option<SessionId> {
        match &self.slot {
            Slot::Up(session, _) => Some(session.id),
            Slot::None | Slot::Proposed { .. } | Slot::Agreed(_) => None,
        }
    }

    /// Also a session that is agreed and not yet used.
    fn known_id(&self) -> Option<SessionId> {
        match &self.slot {
            Slot::Up(session, _) | Slot::Agreed(session) => Some(session.id),
            Slot::None | Slot::Proposed { .. } => None,
        }
    }

    // Paths.

    fn control_up(&mut self, path: u16, connection: u64, peer: PeerFacts, outbox: Outbox) {
        let restarted = match &self.slot {
            Slot::Up(session, _) | Slot::Agreed(session) => session.peer.incarnation != peer.incarnation,
            Slot::None | Slot::Proposed { .. } => false,
        };
        if restarted {
            self.end(SessionEnd::PeerRestarted);
        }
        // One control connection a path, all of one process of the peer: the newest counts.
        let old: Vec<_> = self
            .controls
            .iter()
            .filter(|(_, control)| control.path == path || control.peer.incarnation != peer.incarnation)
            .map(|(old, _)| *old)
            .collect();
        for old in old {
            self.forget(old, "replaced by a new connection");
        }
        let control = Control { path, peer, outbox, silent: false, theirs: None, mine: None };
        self.controls.insert(connection, control);
        if self.shared.config.dials()
            && let Some(session) = self.session_id()
        {
            self.resume(connection, session);
        }
        self.tell_path(path, "");
        self.open();
        self.dial_volumes();
    }

    fn control_down(&mut self, connection: u64, error: &StreamError) {
        let Some(path) = self.controls.get(&connection).map(|control| control.path) else { return };
        if let StreamError::Frame(frame) = error
            && frame.is_corruption()
        {
            PathCounters::add(&self.counters[usize::from(path)].corrupt_frames, 1);
            self.outgoing.push(LinkEvent::CorruptFrame { path, why: frame.to_string() });
        }
        self.forget(connection, &error.to_string());
    }

    fn forget(&mut self, connection: u64, why: &str) {
        let Some(control) = self.controls.remove(&connection) else { return };
        control.outbox.close();
        if matches!(self.slot, Slot::Proposed { connection: on, .. } if on == connection) {
            self.slot = Slot::None;
        }
        self.volumes.path_lost(control.path, false);
        self.choose();
        self.tell_path(control.path, why);
        self.dial_volumes();
    }

    fn not_connected(&mut self, path: u16, error: HandshakeError) {
        let why = reason(&error);
        let news = self.told.get(&path).is_none_or(|(_, _, told)| *told != why);
        self.tell_path(path, &why);
        match error {
            HandshakeError::Refused(refusal) if news => self.outgoing.push(LinkEvent::Refused(refusal)),
            HandshakeError::Stranger(why) if news => {
                let address = self.shared.config.paths[usize::from(path)].peer;
                self.outgoing.push(LinkEvent::Stranger { address, why });
            }
            HandshakeError::Refused(_)
            | HandshakeError::Stranger(_)
            | HandshakeError::Vanished(_)
            | HandshakeError::Connection(_) => {}
        }
    }

    fn silence(&mut self, connection: u64, silent: bool) {
        let Some(control) = self.controls.get_mut(&connection) else { return };
        control.silent = silent;
        let path = control.path;
        if silent {
            self.volumes.path_lost(path, true);
        } else {
            self.volumes.path_back(path);
        }
        self.choose();
        self.tell_path(path, if silent { "nothing is heard on this path" } else { "" });
        self.dial_volumes();
    }

    /// The event of a path, when something changed.
    fn tell_path(&mut self, path: u16, why: &str) {
        let active = self.active();
        let found = self.controls.iter().find(|(_, control)| control.path == path);
        let up = found.is_some_and(|(_, control)| !control.silent);
        let active = found.is_some_and(|(connection, _)| Some(*connection) == active);
        let counters = &self.counters[usize::from(path)];
        counters.up.store(up, Ordering::Relaxed);
        counters.active.store(active, Ordering::Relaxed);
        let why = if up { "" } else { why };
        let now = (up, active, why.to_owned());
        if self.told.get(&path) != Some(&now) {
            self.told.insert(path, now);
            self.outgoing.push(LinkEvent::Path { path, up, active, why: why.to_owned() });
        }
    }

    fn active(&self) -> Option<u64> {
        match &self.slot {
            Slot::Up(session, _) => session.active,
            Slot::None | Slot::Proposed { .. } | Slot::Agreed(_) => None,
        }
    }

    /// The connection the peer is best reached on.
    fn best(&self) -> Option<(u64, &Control)> {
        let answering = self.controls.iter().filter(|(_, control)| !control.silent);
        answering.min_by_key(|(_, control)| control.path).map(|(connection, control)| (*connection, control))
    }

    /// Chooses the connection that carries the control channel; on a change, what is unacknowledged is said again.
    fn choose(&mut self) {
        let Slot::Up(session, _) = &mut self.slot else { return };
        let usable = |control: &Control| control.theirs == Some(session.id);
        let current = session.active.and_then(|active| self.controls.get(&active));
        let best = self
            .controls
            .iter()
            .filter(|(_, control)| usable(control))
            .min_by_key(|(_, control)| (control.silent, control.path));
        let change = match (current, best) {
            (Some(current), Some((_, best))) => current.silent && !best.silent,
            (Some(_), None) => false,
            (None, _) => true,
        };
        if !change {
            return;
        }
        session.active = best.map(|(connection, _)| *connection);
        if let Some((_, control)) = best {
            let counters = &self.counters[usize::from(control.path)];
            PathCounters::add(&counters.frames_resent, session.unacknowledged().len() as u64);
            for frame in session.unacknowledged() {
                control.outbox.send(Arc::clone(frame));
            }
        }
        for path in 0..self.counters.len() {
            let path = u16::try_from(path).unwrap_or(u16::MAX);
            if let Some((_, _, why)) = self.told.get(&path).cloned() {
                self.tell_path(path, &why);
            }
        }
    }

    // Sessions.

    /// Dialler: proposes a session when one is wanted.
    fn open(&mut self) {
        let ready = self.shared.config.dials()
            && self.wanted
            && matches!(self.slot, Slot::None)
            && Instant::now() >= self.open_at;
        if !ready {
            return;
        }
        let Some((connection, _)) = self.best() else { return };
        let part = rand::random();
        self.open_at = Instant::now() + self.backoff.pause();
        self.slot = Slot::Proposed { connection, part, since: Instant::now() };
        self.say(connection, &LinkWord::SessionOpen { part });
    }

    fn say(&self, connection: u64, word: &LinkWord) {
        let Some(control) = self.controls.get(&connection) else { return };
        if let Ok(frame) = encode_link(word, Channel::Control, 0) {
            control.outbox.send(frame.into());
        }
    }

    fn say_ack(&self, ack: u64) {
        let control = self.active().and_then(|active| self.controls.get(&active));
        if let (Some(control), Ok(frame)) = (control, encode_link(&LinkWord::Ack, Channel::Control, ack)) {
            control.outbox.send(frame.into());
        }
    }

    /// From here on this server's frames on the connection belong to the session.
    fn resume(&mut self, connection: u64, session: SessionId) {
        let received = match &self.slot {
            Slot::Up(session, _) | Slot::Agreed(session) => session.received(),
            Slot::None | Slot::Proposed { .. } => return,
        };
        if let Some(control) = self.controls.get_mut(&connection)
            && control.mine != Some(session)
        {
            control.mine = Some(session);
            let word = LinkWord::Resume { session, received, window_bytes: 0, window_frames: 0 };
            self.say(connection, &word);
        }
    }

    fn up(&mut self, session: Session) {
        let (id, peer) = (session.id, session.peer);
        self.slot = Slot::Up(session, Instant::now());
        self.volumes.session_up();
        self.outgoing.push(LinkEvent::SessionUp { session: id, peer });
    }

    /// The session is over, for this reason; the peer is told unless it said so itself.
    fn end(&mut self, end: SessionEnd) {
        let (session, since) = match std::mem::replace(&mut self.slot, Slot::None) {
            Slot::None | Slot::Proposed { .. } => return,
            Slot::Agreed(session) => (session, None),
            Slot::Up(session, since) => (session, Some(since)),
        };
        if since.is_some_and(|since| since.elapsed() >= GOOD_AFTER) {
            self.backoff.reset();
        }
        self.open_at = Instant::now() + self.backoff.pause();
        let reason = match &end {
            SessionEnd::Closed(reason) => Some(reason.clone()),
            SessionEnd::PeerRestarted | SessionEnd::ClosedByPeer(_) => None,
        };
        let connections: Vec<_> = self.controls.keys().copied().collect();
        for connection in connections {
            if let Some(control) = self.controls.get_mut(&connection) {
                control.outbox.heartbeat(None);
                control.mine = None;
                control.theirs = None;
            }
            if let Some(reason) = &reason {
                let word = LinkWord::SessionClose { session: session.id, reason: reason.clone() };
                self.say(connection, &word);
            }
        }
        self.volumes.session_down();
        if since.is_some() {
            self.outgoing.push(LinkEvent::SessionDown { session: session.id, end });
        }
        for path in self.told.keys().copied().collect::<Vec<_>>() {
            let why = self.told.get(&path).map(|(_, _, why)| why.clone()).unwrap_or_default();
            self.tell_path(path, &why);
        }
    }

    fn send(&mut self, id: SessionId, message: &ControlMessage) {
        let Slot::Up(session, _) = &mut self.slot else { return };
        if session.id != id {
            return;
        }
        if let ControlMessage::Heartbeat { .. } = message {
            if let Ok(frame) = encode_control(message, 0, session.received()) {
                let frame: Arc<[u8]> = frame.into();
                for control in self.controls.values().filter(|control| control.mine == Some(id)) {
                    control.outbox.heartbeat(Some(Arc::clone(&frame)));
                }
            }
            return;
        }
        match session.send(message) {
            Ok(frame) => {
                let active = session.active.and_then(|active| self.controls.get(&active));
                if let Some(control) = active {
                    control.outbox.send(frame);
                }
            }
            Err(error) => self.end(SessionEnd::Closed(error.to_string())),
        }
    }

    fn word(&mut self, connection: u64, routing: Routing, word: ControlWord) {
        let Some(control) = self.controls.get(&connection) else { return };
        let (peer, in_session) = (control.peer, control.theirs.is_some());
        let current = in_session && control.theirs == self.session_id();
        if current
            && let Slot::Up(session, _) = &mut self.slot
            && !session.acknowledged(routing.ack)
        {
            self.forget(connection, "the peer acknowledged what was never sent");
            return;
        }
        match word {
            ControlWord::Message(message) if current => self.message(connection, routing, message),
            ControlWord::Message(_) => {}
            ControlWord::Link(LinkWord::SessionOpen { part }) => self.opened_by_peer(connection, peer, part),
            ControlWord::Link(LinkWord::SessionOpened { part }) => self.agreed(connection, peer, part),
            ControlWord::Link(LinkWord::Resume { session, received, .. }) => {
                self.resumed(connection, session, received);
            }
            ControlWord::Link(LinkWord::SessionClose { session, reason }) => {
                self.closed_by_peer(session, reason);
            }
            ControlWord::Link(LinkWord::Ack | LinkWord::Probe { .. } | LinkWord::ProbeReply { .. }) => {}
        }
    }

    fn message(&mut self, connection: u64, routing: Routing, message: ControlMessage) {
        let Slot::Up(session, _) = &mut self.slot else { return };
        let id = session.id;
        if let ControlMessage::Heartbeat { sent_ns, .. } = &message {
            if session.is_new_heartbeat(*sent_ns) {
                self.outgoing.push(LinkEvent::Control(id, message));
            }
            return;
        }
        match session.arrived(routing.sequence) {
            Arrival::New => {
                let ack = session.take_ack(false);
                self.outgoing.push(LinkEvent::Control(id, message));
                if let Some(ack) = ack {
                    self.say_ack(ack);
                }
            }
            Arrival::Seen => {}
            Arrival::Gap => self.forget(connection, "a control frame is missing"),
        }
    }

    /// Listener: the dialler proposes a session; one that stood is over for it.
    fn opened_by_peer(&mut self, connection: u64, peer: PeerFacts, part: u128) {
        if self.shared.config.dials() {
            self.forget(connection, "the listening server proposed a session");
            return;
        }
        if !self.wanted {
            let reason = "disconnected by the operator".to_owned();
            self.say(connection, &LinkWord::SessionClose { session: SessionId::NONE, reason });
            return;
        }
        self.end(SessionEnd::ClosedByPeer("the peer opened a new session".to_owned()));
        let mine = rand::random();
        let own = self.shared.config.incarnation;
        self.slot = Slot::Agreed(Session::new(session_id((peer.incarnation, part), (own, mine)), peer));
        self.say(connection, &LinkWord::SessionOpened { part: mine });
    }

    /// Dialler: the listener agreed.
    fn agreed(&mut self, connection: u64, peer: PeerFacts, theirs: u128) {
        let Slot::Proposed { connection: on, part, .. } = self.slot else { return };
        if on != connection {
            return;
        }
        let own = self.shared.config.incarnation;
        let id = session_id((own, part), (peer.incarnation, theirs));
        self.up(Session::new(id, peer));
        for connection in self.controls.keys().copied().collect::<Vec<_>>() {
            self.resume(connection, id);
        }
        self.dial_volumes();
    }

    fn resumed(&mut self, connection: u64, id: SessionId, received: u64) {
        if self.known_id() != Some(id) {
            if !self.shared.config.dials() {
                let reason = "the session is not known here".to_owned();
                self.say(connection, &LinkWord::SessionClose { session: id, reason });
            }
            return;
        }
        self.use_agreed();
        if let Some(control) = self.controls.get_mut(&connection) {
            control.theirs = Some(id);
        }
        self.resume(connection, id);
        let fits = match &mut self.slot {
            Slot::Up(session, _) => session.acknowledged(received),
            Slot::None | Slot::Proposed { .. } | Slot::Agreed(_) => true,
        };
        if fits {
            self.choose();
        } else {
            self.end(SessionEnd::Closed("the peer received what was never sent".to_owned()));
        }
    }

    /// Listener: the dialler uses the agreed session, so it knows it.
    fn use_agreed(&mut self) {
        match std::mem::replace(&mut self.slot, Slot::None) {
            Slot::Agreed(session) => self.up(session),
            other @ (Slot::None | Slot::Proposed { .. } | Slot::Up(..)) => self.slot = other,
        }
    }

    fn closed_by_peer(&mut self, id: SessionId, reason: String) {
        if self.known_id() == Some(id) {
            self.end(SessionEnd::ClosedByPeer(reason));
        } else if id.is_none() && matches!(self.slot, Slot::Proposed { .. }) {
            self.slot = Slot::None;
        }
    }

    // Data connections.

    fn data_asked(&mut self, ask: DataAsk) {
        let fits = match &self.slot {
            Slot::Up(session, _) | Slot::Agreed(session) => {
                session.id == ask.session && session.peer.incarnation == ask.incarnation
            }
            Slot::None | Slot::Proposed { .. } => false,
        };
        let answer = if fits {
            self.use_agreed();
            self.volumes.accept(ask.volume, ask.attempt)
        } else {
            let mine = self.known_id().map_or_else(|| "none".to_owned(), |id| id.to_string());
            Err(session_unknown(&mine, &ask.session.to_string()))
        };
        // The asking task may have run into its deadline.
        let _ = ask.answer.send(answer);
    }

    /// Dialler: dials for every volume that needs it, over the best path.
    fn dial_volumes(&mut self) {
        let Some(session) = self.session_id().filter(|_| self.shared.config.dials()) else { return };
        let Some(path) = self.best().map(|(_, control)| control.path) else { return };
        let now = Instant::now();
        while let Some((volume, attempt)) = self.volumes.next_dial(path, now) {
            self.tasks.spawn(dial_volume(
                Arc::clone(&self.shared),
                Arc::clone(&self.dials),
                Arc::clone(&self.counters[usize::from(path)]),
                self.inputs.clone(),
                (session, volume, attempt, path),
            ));
        }
    }

    fn data_dialled(&mut self, dialled: Dialled) {
        let Dialled { session, volume, attempt, result } = dialled;
        if self.session_id() != Some(session) {
            return;
        }
        match result {
            Ok(data) => {
                if self.volumes.dialled(volume, attempt, Instant::now()) {
                    self.outgoing.push(LinkEvent::Data(data));
                }
            }
            Err(error) => {
                let news = self.volumes.failed(volume, attempt, Instant::now());
                match error {
                    HandshakeError::Refused(refusal) if news && refusal.code != "session-unknown" => {
                        self.outgoing.push(LinkEvent::Refused(refusal));
                    }
                    HandshakeError::Refused(_)
                    | HandshakeError::Stranger(_)
                    | HandshakeError::Vanished(_)
                    | HandshakeError::Connection(_) => {
                        tracing::info!(volume = volume.0, %error, "mirror link: no data connection yet");
                    }
                }
            }
        }
    }
}
