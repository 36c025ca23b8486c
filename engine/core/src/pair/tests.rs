//! Two server machines with volumes that do at once what they are told, unless a test holds them back.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use super::Server;
use super::api::{Action, Input, Operator, OperatorToken, Refusal, ServerConfig};
use crate::event::Event;
use crate::format::record::{CopyRecord, CopyState, Era, Origin, ServerRecord};
use crate::ids::{BootId, Epoch, Incarnation, ServerName, SessionId, VolumeIndex};
use crate::message::{ControlMessage, LiveState};
use crate::mirror::api::{CopyChange, Facts, Order, Report, ServeMode, Whose};
use crate::resync::fixtures::copy;
use crate::time::Instant;

/// A volume's durable facts, and what it was told.
#[derive(Clone, Debug)]
struct Disk {
    copy: CopyRecord,
    server: ServerRecord,
    dirty_blocks: u64,
    serve: Option<ServeMode>,
    failed: bool,
}

struct Node {
    server: Server,
    disks: Vec<Disk>,
    answers: BTreeMap<u64, Result<String, Refusal>>,
    events: Vec<Event>,
    exited: bool,
    /// Orders that this test keeps from the volumes.
    hold: fn(VolumeIndex, &Order) -> bool,
    held: Vec<(VolumeIndex, Order)>,
    /// Messages that this test loses.
    mute: fn(&ControlMessage) -> bool,
}

struct Bench {
    now: Instant,
    nodes: [Node; 2],
    session: Option<SessionId>,
    sessions: u64,
    tokens: u64,
    mail: VecDeque<(usize, SessionId, ControlMessage)>,
}

const A: usize = 0;
const B: usize = 1;

fn config(name: &str, peer: &str, volumes: usize) -> ServerConfig {
    ServerConfig {
        name: ServerName(name.to_owned()),
        peer: ServerName(peer.to_owned()),
        pair_name: "shop".to_owned(),
        incarnation: Incarnation(name.len() as u128 + u128::from(name.as_bytes()[0])),
        boot_id: BootId(1),
        volumes: (0..volumes).map(|at| format!("v{at}")).collect(),
        config: BTreeMap::new(),
        heartbeat: Duration::from_millis(100),
        freeze: Duration::from_millis(600),
        silent: Duration::from_millis(800),
        id_seed: u128::from(name.as_bytes()[0]) << 64 | 77,
    }
}

fn record(primary: bool) -> ServerRecord {
    ServerRecord {
        counter: 4,
        boot_id: BootId(1),
        epoch_seen: Epoch { number: 5, holder: Some(ServerName("alpha".to_owned())) },
        era: Era::Pair,
        last_primary: if primary { 5 } else { 0 },
        was_primary: primary,
        clean: false,
    }
}

impl Node {
    fn new(config: ServerConfig, disks: Vec<Disk>) -> Self {
        Self {
            server: Server::new(config),
            disks,
            answers: BTreeMap::new(),
            events: Vec::new(),
            exited: false,
            hold: |_, _| false,
            held: Vec::new(),
            mute: |_| false,
        }
    }

    /// What a volume answers to an order.
    fn obey(&mut self, index: VolumeIndex, order: Order) -> Option<Report> {
        let disk = &mut self.disks[usize::from(index.0)];
        match order {
            Order::Record { tag, server, change, preflush: _ } => {
                if disk.failed {
                    return None;
                }
                disk.server = server;
                change_copy(&mut disk.copy, change);
                Some(Report::Recorded { tag, copy: Box::new(disk.copy.clone()) })
            }
            Order::Return { tag, server } => {
                disk.server = server;
                Some(Report::Recorded { tag, copy: Box::new(disk.copy.clone()) })
            }
            Order::Serve { mode, epoch: _ } => {
                disk.serve = Some(mode);
                None
            }
            Order::Close => {
                disk.serve = None;
                None
            }
            Order::Freeze { tag } => {
                disk.serve = None;
                tag.map(|tag| Report::Drained { tag })
            }
            Order::Drain { tag } | Order::TellMarks { tag } => Some(Report::Drained { tag }),
            Order::Fail { errno } => {
                disk.failed = true;
                Some(Report::CopyFailed { whose: Whose::Mine, errno, range: None })
            }
            Order::Join { .. } | Order::Leave | Order::Host { .. } | Order::Pace(_) => None,
        }
    }
}

fn change_copy(copy: &mut CopyRecord, change: CopyChange) {
    match change {
        CopyChange::None => {}
        CopyChange::NewGeneration { generation, origin, reach: _ } => {
            copy.history.insert(0, copy.generation);
            copy.base = copy.generation;
            copy.generation = generation;
            copy.origin = origin;
            copy.unproven = false;
            copy.state = CopyState::UpToDate;
        }
        CopyChange::Proven => copy.unproven = false,
        CopyChange::WholeMap { generation } => {
            copy.history.insert(0, copy.generation);
            copy.base = generation;
            copy.generation = generation;
        }
        CopyChange::TakeBack { before } => {
            let before = *before;
            copy.generation = before.generation;
            copy.history = before.history;
            copy.base = before.base;
            copy.state = before.state;
        }
        CopyChange::Target { toward } => copy.state = CopyState::Inconsistent { toward },
        CopyChange::Outdated => copy.state = CopyState::Outdated,
        CopyChange::Surrender { to, full: _ } => {
            copy.history.retain(|g| *g != to);
            copy.generation = to;
            copy.state = CopyState::Outdated;
        }
        CopyChange::Identity { pair, volume, size_bytes, generation, state, .. } => {
            copy.pair = pair;
            copy.volume = volume;
            copy.size_bytes = size_bytes;
            copy.generation = generation;
            copy.state = state;
        }
    }
}

impl Bench {
    /// Two servers with equal copies; `primary` was primary when it last changed its role.
    fn new(volumes: usize, primary: Option<usize>) -> Self {
        let disk = |primary| Disk {
            copy: copy(),
            server: record(primary),
            dirty_blocks: 0,
            serve: None,
            failed: false,
        };
        let node =
            |at, name, peer| Node::new(config(name, peer, volumes), vec![disk(primary == Some(at)); volumes]);
        Self {
            now: Instant(1_000_000_000),
            nodes: [node(A, "alpha", "beta"), node(B, "beta", "alpha")],
            session: None,
            sessions: 0,
            tokens: 0,
            mail: VecDeque::new(),
        }
    }

    /// Loaded and met: both copies in step.
    fn mirrored(volumes: usize, primary: Option<usize>) -> Self {
        let mut bench = Self::new(volumes, primary);
        bench.load(A);
        bench.load(B);
        bench.meet();
        bench.advance(300);
        assert_eq!(bench.nodes[A].server.state_word(), "mirrored");
        assert_eq!(bench.nodes[B].server.state_word(), "mirrored");
        bench
    }

    /// The volumes are read.
    fn load(&mut self, at: usize) {
        for (index, disk) in (0..).zip(self.nodes[at].disks.clone()) {
            let facts = Facts {
                server: disk.server,
                copy: disk.copy,
                dirty_blocks: disk.dirty_blocks,
                replayed_extents: 0,
            };
            self.input(at, Input::Report(VolumeIndex(index), Report::Loaded(Box::new(facts))));
        }
    }

    /// The process ends; another one reads the same disks.
    fn restart(&mut self, at: usize) {
        self.begin_process(at);
        self.load(at);
    }

    /// The process ends; another one begins.
    fn begin_process(&mut self, at: usize) {
        self.cut();
        let node = &mut self.nodes[at];
        node.server = Server::new(node.server.config.clone());
        node.held.clear();
        for disk in &mut node.disks {
            disk.serve = None;
        }
    }

    fn input(&mut self, at: usize, input: Input) {
        self.nodes[at].server.handle(self.now, input);
        self.settle();
    }

    fn meet(&mut self) {
        self.sessions += 1;
        let session = SessionId(u128::from(self.sessions));
        self.session = Some(session);
        for at in [A, B] {
            let peer_incarnation = self.nodes[1 - at].server.config.incarnation;
            self.nodes[at].server.handle(self.now, Input::LinkUp { session, peer_incarnation });
        }
        self.settle();
    }

    /// Both learn that the session is over.
    fn cut(&mut self) {
        if let Some(session) = self.session.take() {
            self.mail.clear();
            for at in [A, B] {
                let reason = "connection reset".to_owned();
                self.nodes[at].server.handle(self.now, Input::LinkDown { session, reason });
            }
            self.settle();
        }
    }

    /// Runs every action until nothing follows any more.
    fn settle(&mut self) {
        for _ in 0..10_000 {
            let Some(at) = [A, B].into_iter().find(|at| self.act(*at)) else {
                match self.mail.pop_front() {
                    Some((to, session, message)) if self.session == Some(session) => {
                        self.nodes[to].server.handle(self.now, Input::Message(session, message));
                        continue;
                    }
                    Some(_) => continue,
                    None => return,
                }
            };
            let _ = at;
        }
        panic!("the machines never come to rest");
    }

    /// Runs one action of a server; false when there is none.
    fn act(&mut self, at: usize) -> bool {
        let node = &mut self.nodes[at];
        let Some(action) = node.server.poll_action() else {
            return false;
        };
        match action {
            Action::Order(index, order) if (node.hold)(index, &order) => node.held.push((index, order)),
            Action::Order(index, order) => {
                if let Some(report) = node.obey(index, order) {
                    node.server.handle(self.now, Input::Report(index, report));
                }
            }
            Action::Send(_, message) if (node.mute)(&message) => {}
            Action::Send(session, message) => self.mail.push_back((1 - at, session, message)),
            Action::CloseSession(session) => {
                if self.session == Some(session) {
                    self.cut();
                }
            }
            Action::Answer(token, result) => {
                let earlier = node.answers.insert(token.0, result);
                assert_eq!(earlier, None, "a command is answered once");
            }
            Action::Event(event) => node.events.push(*event),
            Action::SaveBlocks => node.server.handle(self.now, Input::Saved(Ok(()))),
            Action::Exit => node.exited = true,
        }
        true
    }

    /// The orders kept back so far are done now.
    fn release(&mut self, at: usize) {
        self.nodes[at].hold = |_, _| false;
        for (index, order) in std::mem::take(&mut self.nodes[at].held) {
            if let Some(report) = self.nodes[at].obey(index, order) {
                self.input(at, Input::Report(index, report));
            }
        }
    }

    fn advance(&mut self, ms: u64) {
        for _ in 0..ms.div_ceil(20) {
            self.now = self.now + Duration::from_millis(20);
            for at in [A, B] {
                if !self.nodes[at].exited {
                    self.input(at, Input::Time);
                }
            }
        }
    }

    fn ask(&mut self, at: usize, command: Operator) -> u64 {
        self.tokens += 1;
        self.input(at, Input::Operator(OperatorToken(self.tokens), command));
        self.tokens
    }

    fn answer(&self, at: usize, token: u64) -> Option<&Result<String, Refusal>> {
        self.nodes[at].answers.get(&token)
    }

    /// A command that must be refused at once.
    fn refused(&mut self, at: usize, command: Operator) -> Refusal {
        let token = self.ask(at, command);
        self.answer(at, token).expect("answered at once").clone().expect_err("refused")
    }

    fn disk_fails(&mut self, at: usize, volume: u16) {
        self.nodes[at].disks[usize::from(volume)].failed = true;
        let report = Report::CopyFailed { whose: Whose::Mine, errno: 5, range: None };
        self.input(at, Input::Report(VolumeIndex(volume), report));
    }

    /// The operator's `attach` of the same disk, which can be written again.
    fn attach(&mut self, at: usize, volume: u16) {
        let disk = &mut self.nodes[at].disks[usize::from(volume)];
        disk.failed = false;
        let facts = Facts {
            server: disk.server.clone(),
            copy: disk.copy.clone(),
            dirty_blocks: disk.dirty_blocks,
            replayed_extents: 0,
        };
        self.input(at, Input::Reopened(VolumeIndex(volume)));
        self.input(at, Input::Report(VolumeIndex(volume), Report::Loaded(Box::new(facts))));
    }

    fn live(&self, at: usize) -> LiveState {
        self.nodes[at].server.live()
    }

    /// Some volume of this server completes requests.
    fn serves(&self, at: usize) -> bool {
        self.nodes[at].disks.iter().any(|d| d.serve.is_some())
    }

    /// Alone, with both volumes' marks: the start of a resync towards the other.
    fn syncing() -> Self {
        let mut bench = Self::mirrored(1, Some(A));
        bench.cut();
        bench.advance(1500);
        assert_eq!(bench.live(A), LiveState::Alone);
        bench.meet();
        bench.advance(100);
        assert_eq!(bench.live(A), LiveState::Syncing);
        bench
    }

    /// The target's volume 0 adopted the source's generation.
    fn adopt(&mut self, target: usize) {
        self.adopt_volume(target, 0);
    }

    fn adopt_volume(&mut self, target: usize, volume: u16) {
        let at = usize::from(volume);
        let source = self.nodes[1 - target].disks[at].copy.clone();
        let disk = &mut self.nodes[target].disks[at];
        disk.copy = CopyRecord { base: source.generation, unproven: false, ..source };
        let copy = Box::new(disk.copy.clone());
        self.input(target, Input::Report(VolumeIndex(volume), Report::Adopted { copy }));
    }

    fn synced(&mut self, source: usize) {
        let report = Report::Synced { total_bytes: 0, sent_bytes: 0 };
        self.input(source, Input::Report(VolumeIndex(0), report));
    }
}

mod attach;
mod before_a_copy;
mod half_alone;
mod one_copy;
mod waits;
