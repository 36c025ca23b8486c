//! An NBD server over a volume in memory, on a thread of its own. Time stands still unless a test moves it.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::JoinHandle;
use std::time::Duration;

use duplex_core::ids::RequestId;
use duplex_core::request::{Request, RequestError, RequestOp};
use duplex_core::time::Instant;
use duplex_frontend::nbd::{ListenAddress, NbdConfig, NbdServer, ServerState};
use duplex_frontend::{FrontendEvent, Geometry};
use duplex_ring::{Arena, Owner, Ring, Waker};

pub(crate) const EXPORT: &str = "vm1";
const OWNER: Owner = Owner(3);

type Work = Box<dyn FnOnce(&mut Engine) + Send>;

/// What runs on the volume's thread.
pub(crate) struct Engine {
    pub(crate) ring: Ring,
    pub(crate) arena: Arena,
    pub(crate) server: NbdServer,
    pub(crate) memory: Vec<u8>,
    pub(crate) now: Instant,
    /// Requests are kept instead of carried out.
    pub(crate) holding: bool,
    pub(crate) held: VecDeque<Request>,
    /// What writes and reads are answered with.
    pub(crate) failure: Option<RequestError>,
    pub(crate) opened: usize,
    pub(crate) closed: usize,
    pub(crate) requests: Vec<RequestOp>,
    /// Requests are noted in `requests`.
    pub(crate) noting: bool,
    most_in_flight: usize,
    stop: bool,
}

impl Engine {
    fn run(&mut self, work: &Receiver<Work>) {
        let mut completions = Vec::new();
        let mut events = Vec::new();
        while !(self.stop && self.server.is_idle()) {
            while self.server.deadline().is_some_and(|deadline| deadline <= self.now) {
                self.server.on_time(self.now, &mut self.ring);
            }
            // A test that has ended waits for the server's end, but not for ever.
            let limit = self.stop.then_some(Duration::from_secs(20));
            self.ring.turn(limit, &mut completions).expect("turn");
            let stuck = self.stop && completions.is_empty() && !self.server.is_idle();
            assert!(!stuck, "the server does not end: {} requests", self.server.requests_in_flight());
            for completion in completions.drain(..) {
                self.server.on_completion(completion, &mut self.ring, &mut self.arena, &mut events);
            }
            self.most_in_flight = self.most_in_flight.max(self.server.requests_in_flight());
            for event in events.drain(..) {
                match event {
                    FrontendEvent::Request(request) if self.holding => self.held.push_back(request),
                    FrontendEvent::Request(request) => self.carry_out(request),
                    FrontendEvent::ClientOpened => self.opened += 1,
                    FrontendEvent::ClientClosed => self.closed += 1,
                }
            }
            // One in a turn, so that a test that asks again and again does not keep the server from its work.
            if let Ok(work) = work.try_recv() {
                work(self);
                self.ring.waker().wake();
            }
            self.server.flush(&mut self.ring, &mut self.arena);
        }
        assert_eq!(self.arena.in_use_bytes(), 0, "buffers were lost");
    }

    pub(crate) fn carry_out(&mut self, request: Request) {
        if self.noting {
            self.requests.push(request.op);
        }
        if let Some(failure) = self.failure {
            self.complete(request.id, Err(failure));
            return;
        }
        let span = request.op.range().map(|range| range.offset_bytes as usize..range.end_bytes() as usize);
        match (request.op, span) {
            (RequestOp::Read { buffer, .. }, Some(span)) => {
                self.arena.bytes_mut(buffer)[..span.len()].copy_from_slice(&self.memory[span]);
            }
            (RequestOp::Write { buffer, .. }, Some(span)) => {
                let length = span.len();
                self.memory[span].copy_from_slice(&self.arena.bytes(buffer)[..length]);
            }
            (RequestOp::Zero { .. }, Some(span)) => self.memory[span].fill(0),
            (RequestOp::Flush, _) => {}
            (RequestOp::Read { .. } | RequestOp::Write { .. } | RequestOp::Zero { .. }, None) => {
                unreachable!("they have a range")
            }
        }
        self.complete(request.id, Ok(()));
    }

    fn complete(&mut self, id: RequestId, result: Result<(), RequestError>) {
        self.server.complete(id, result, &mut self.ring, &mut self.arena);
    }

    pub(crate) fn let_go(&mut self) {
        self.holding = false;
        for request in std::mem::take(&mut self.held) {
            self.carry_out(request);
        }
    }

    pub(crate) fn set_state(&mut self, state: ServerState) {
        self.server.set_state(state, &mut self.ring).expect("set_state");
    }

    pub(crate) fn advance(&mut self, by: Duration) {
        self.now = self.now + by;
    }
}

/// A running server.
pub(crate) struct Volume {
    thread: Option<JoinHandle<()>>,
    work: Sender<Work>,
    waker: Waker,
    pub(crate) socket: PathBuf,
    pub(crate) tcp: Option<SocketAddr>,
    pub(crate) dir: tempfile::TempDir,
}

impl Volume {
    pub(crate) fn start(size_bytes: u64) -> Self {
        Self::with(size_bytes, 64 << 20, |_| {})
    }

    /// A serving server on a Unix socket and what `adjust` adds to the configuration.
    pub(crate) fn with(size_bytes: u64, arena_bytes: usize, adjust: impl FnOnce(&mut NbdConfig)) -> Self {
        let dir = tempfile::tempdir().expect("temporary directory");
        let socket = dir.path().join("nbd.sock");
        let geometry = Geometry { size_bytes, sector_bytes: 512, read_only: false };
        let mut config = NbdConfig::new(EXPORT, geometry);
        config.is_default = true;
        config.listeners.push(ListenAddress::Unix { path: socket.clone(), group: None });
        adjust(&mut config);
        let (work, inbox) = mpsc::channel::<Work>();
        let (ready, started) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            let mut engine = engine(size_bytes, arena_bytes, config);
            let Engine { server, ring, arena, .. } = &mut engine;
            server.start(ring, arena).expect("start");
            server.set_state(ServerState::Serving, ring).expect("serve");
            let tcp = server.tcp_addresses().first().copied();
            ready.send((ring.waker(), tcp)).expect("the test waits");
            engine.run(&inbox);
        });
        let (waker, tcp) = started.recv().expect("the server starts");
        Self { thread: Some(thread), work, waker, socket, tcp, dir }
    }

    /// Runs something on the volume's thread.
    pub(crate) fn on<T: Send + 'static>(&self, work: impl FnOnce(&mut Engine) -> T + Send + 'static) -> T {
        let (answer, result) = mpsc::channel();
        let boxed: Work = Box::new(move |engine| {
            // The test waits for it unless it has failed.
            let _ = answer.send(work(engine));
        });
        self.work.send(boxed).expect("the volume's thread lives");
        self.waker.wake();
        result.recv().expect("the volume's thread answers")
    }

    /// Waits until the volume is as wanted, turn by turn.
    pub(crate) fn wait_until(&self, what: &str, wanted: impl Fn(&Engine) -> bool + Send + Clone + 'static) {
        let limit = std::time::Instant::now() + Duration::from_secs(20);
        loop {
            let wanted = wanted.clone();
            if self.on(move |engine| wanted(engine)) {
                return;
            }
            assert!(std::time::Instant::now() < limit, "waited in vain for: {what}");
            std::thread::yield_now();
        }
    }

    pub(crate) fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.socket).expect("connect");
        stream.set_read_timeout(Some(Duration::from_secs(20))).expect("timeout");
        stream
    }

    pub(crate) fn uri(&self) -> String {
        format!("nbd+unix:///{EXPORT}?socket={}", self.socket.display())
    }

    pub(crate) fn most_in_flight(&self) -> usize {
        self.on(|engine| engine.most_in_flight)
    }
}

impl Drop for Volume {
    /// Ends the server; every buffer must have come back.
    fn drop(&mut self) {
        let end: Work = Box::new(|engine| {
            engine.stop = true;
            engine.let_go();
            engine.server.close(&mut engine.ring);
        });
        let sent = self.work.send(end).is_ok();
        self.waker.wake();
        let ended = self.thread.take().map(JoinHandle::join);
        if !std::thread::panicking() {
            assert!(sent && matches!(ended, Some(Ok(()))), "the volume's thread failed");
        }
    }
}

fn engine(size_bytes: u64, arena_bytes: usize, config: NbdConfig) -> Engine {
    Engine {
        ring: Ring::new(256).expect("ring"),
        arena: Arena::new(arena_bytes).expect("arena"),
        server: NbdServer::new(OWNER, config),
        memory: vec![0; size_bytes as usize],
        now: Instant(1),
        holding: false,
        held: VecDeque::new(),
        failure: None,
        opened: 0,
        closed: 0,
        requests: Vec::new(),
        noting: false,
        most_in_flight: 0,
        stop: false,
    }
}
