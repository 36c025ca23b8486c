//! Two linked servers on the loopback, a proxy that harms what passes, a volume's thread.
#![allow(clippy::unwrap_used, reason = "tests and their helpers: a panic with its place is the report")]
#![allow(dead_code, unreachable_pub, reason = "each test program uses a part of this")]

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use duplex_core::ids::{BootId, Incarnation, ServerName, SessionId, VolumeIndex};
use duplex_core::message::VolumeMessage;
use duplex_link::{
    ChannelEvent, ChannelLimits, DataChannel, DataConnection, Encryption, Link, LinkConfig, LinkEvent,
    LinkHandle, PathConfig, Secret, Secrets, Timers,
};
use duplex_ring::{Arena, Owner, Ring, Waker};
use tokio::runtime::Runtime;

/// Long enough for a machine that does other things, too; a test that waits so long has failed.
pub const PATIENCE: Duration = Duration::from_secs(30);

pub fn free_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

pub fn secrets(byte: u8) -> Secrets {
    Secrets { current: Secret::new(&[byte; 32]).unwrap(), other: None }
}

pub fn fast_timers() -> Timers {
    Timers {
        backoff_min: Duration::from_millis(10),
        backoff_max: Duration::from_millis(100),
        ..Timers::default()
    }
}

/// alpha dials, beta listens. One proxy a path.
pub struct Pair {
    pub alpha: LinkConfig,
    pub beta: LinkConfig,
    pub proxies: Vec<Proxy>,
}

pub fn pair(paths: usize, encryption: Encryption) -> Pair {
    let proxies: Vec<_> = (0..paths).map(|_| Proxy::start(free_address())).collect();
    let unused: SocketAddr = "127.0.0.1:1".parse().unwrap();
    let alpha = LinkConfig {
        server: ServerName("alpha".into()),
        peer: ServerName("beta".into()),
        pair_name: "test".into(),
        paths: proxies.iter().map(|proxy| PathConfig::new(unused, proxy.address)).collect(),
        secrets: secrets(1),
        encryption,
        incarnation: Incarnation(rand::random()),
        boot_id: BootId(1),
        volumes: vec!["v0".into()],
        frame_max_bytes: LinkConfig::frame_limit_bytes(),
        timers: fast_timers(),
    };
    let beta = LinkConfig {
        server: alpha.peer.clone(),
        peer: alpha.server.clone(),
        paths: proxies
            .iter()
            .map(|proxy| PathConfig { listen: proxy.target, address: proxy.address, peer: unused })
            .collect(),
        incarnation: Incarnation(rand::random()),
        boot_id: BootId(2),
        ..alpha.clone()
    };
    Pair { alpha, beta, proxies }
}

/// Forwards to `target` what comes to `address`, and harms it on demand.
pub struct Proxy {
    pub address: SocketAddr,
    pub target: SocketAddr,
    shared: Arc<ProxyShared>,
}

#[derive(Default)]
struct ProxyShared {
    sockets: Mutex<Vec<TcpStream>>,
    stalled: Mutex<bool>,
    moved: Condvar,
    refusing: AtomicBool,
    /// Bytes (both directions) until one bit is flipped; negative: never.
    flip_after: AtomicI64,
    flips: AtomicU64,
    /// Bytes from the dialler, when they are recorded.
    recording: Mutex<Option<Vec<u8>>>,
}

impl Proxy {
    pub fn start(target: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(ProxyShared { flip_after: AtomicI64::new(-1), ..ProxyShared::default() });
        let copy = Arc::clone(&shared);
        thread::spawn(move || {
            for client in listener.incoming() {
                let Ok(client) = client else { return };
                let server = TcpStream::connect(target);
                let (false, Ok(server)) = (copy.refusing.load(Ordering::SeqCst), server) else { continue };
                client.set_nodelay(true).unwrap();
                server.set_nodelay(true).unwrap();
                let mut sockets = copy.sockets.lock().unwrap();
                sockets.push(client.try_clone().unwrap());
                sockets.push(server.try_clone().unwrap());
                drop(sockets);
                copy.pump(client.try_clone().unwrap(), server.try_clone().unwrap(), true);
                copy.pump(server, client, false);
            }
        });
        Self { address, target, shared }
    }

    /// Ends every connection that passes.
    pub fn cut(&self) {
        for socket in self.shared.sockets.lock().unwrap().drain(..) {
            let _ = socket.shutdown(Shutdown::Both);
        }
    }

    /// Ends every connection and lets none be made.
    pub fn down(&self) {
        self.shared.refusing.store(true, Ordering::SeqCst);
        self.cut();
    }

    pub fn up(&self) {
        self.shared.refusing.store(false, Ordering::SeqCst);
    }

    /// Forwards nothing, but breaks nothing either: a pulled cable.
    pub fn stall(&self, stalled: bool) {
        *self.shared.stalled.lock().unwrap() = stalled;
        self.shared.moved.notify_all();
    }

    pub fn flip_after(&self, bytes: i64) {
        self.shared.flip_after.store(bytes, Ordering::SeqCst);
    }

    pub fn flips(&self) -> u64 {
        self.shared.flips.load(Ordering::SeqCst)
    }

    pub fn record(&self) {
        *self.shared.recording.lock().unwrap() = Some(Vec::new());
    }

    pub fn recorded(&self) -> Vec<u8> {
        self.shared.recording.lock().unwrap().take().unwrap()
    }
}

impl ProxyShared {
    fn pump(self: &Arc<Self>, mut from: TcpStream, mut to: TcpStream, dialler: bool) {
        let shared = Arc::clone(self);
        thread::spawn(move || {
            let mut bytes = vec![0; 64 << 10];
            while let Ok(count @ 1..) = from.read(&mut bytes) {
                let stalled = shared.stalled.lock().unwrap();
                drop(shared.moved.wait_while(stalled, |stalled| *stalled).unwrap());
                let chunk = &mut bytes[..count];
                if dialler && let Some(recording) = &mut *shared.recording.lock().unwrap() {
                    recording.extend_from_slice(chunk);
                }
                shared.harm(chunk);
                if to.write_all(chunk).is_err() {
                    break;
                }
            }
            let _ = from.shutdown(Shutdown::Both);
            let _ = to.shutdown(Shutdown::Both);
        });
    }

    fn harm(&self, chunk: &mut [u8]) {
        let left = self.flip_after.load(Ordering::SeqCst);
        if left < 0 {
            return;
        }
        let after = left - chunk.len() as i64;
        self.flip_after.store(after.max(-1), Ordering::SeqCst);
        if after < 0 {
            chunk[left as usize % chunk.len()] ^= 0x10;
            self.flips.fetch_add(1, Ordering::SeqCst);
        }
    }
}

/// One server: the link in a runtime, its events in a queue, data connections to its volume.
pub struct Server {
    pub handle: LinkHandle,
    pub events: Receiver<LinkEvent>,
    _runtime: Runtime,
}

impl Server {
    /// Data connections and the sessions they belong to go to `volume`, everything else is an event.
    pub fn start(config: LinkConfig, volume: Option<&Volume>) -> Self {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let guard = runtime.enter();
        let (handle, mut link_events) = Link::start(config).unwrap();
        drop(guard);
        let (sender, events) = channel();
        let volume = volume.map(|volume| (volume.orders.clone(), volume.waker.clone()));
        if let Some((orders, waker)) = &volume {
            orders.send(Order::Handle(handle.clone())).unwrap();
            waker.wake();
        }
        runtime.spawn(async move {
            while let Some(event) = link_events.recv().await {
                match (event, &volume) {
                    (LinkEvent::Data(data), Some((orders, waker))) => {
                        if orders.send(Order::Attach(data)).is_err() {
                            return;
                        }
                        waker.wake();
                    }
                    (event, _) => {
                        if sender.send(event).is_err() {
                            return;
                        }
                    }
                }
            }
        });
        Self { handle, events, _runtime: runtime }
    }

    /// The first event that the closure likes.
    pub fn expect<T>(&self, what: &str, mut wanted: impl FnMut(LinkEvent) -> Option<T>) -> T {
        let deadline = std::time::Instant::now() + PATIENCE;
        let mut seen = Vec::new();
        loop {
            let left = deadline.saturating_duration_since(std::time::Instant::now());
            match self.events.recv_timeout(left) {
                Ok(event) => {
                    seen.push(format!("{event:?}"));
                    if let Some(found) = wanted(event) {
                        return found;
                    }
                }
                Err(_) => panic!("{what} did not come; what came: {seen:#?}"),
            }
        }
    }

    pub fn session(&self) -> SessionId {
        self.expect("a session", |event| match event {
            LinkEvent::SessionUp { session, .. } => Some(session),
            _ => None,
        })
    }
}

pub enum Order {
    Handle(LinkHandle),
    Attach(DataConnection),
    Send(VolumeMessage, Vec<u8>),
    /// Keep payload buffers instead of giving them back; `false` gives all back.
    Hoard(bool),
    Stop,
}

#[derive(Debug)]
pub enum Heard {
    Message(VolumeMessage, Vec<u8>),
    Broken(String),
    Corrupt(String),
    /// The most that was ever unacknowledged, and the arena's use at the end.
    Ended {
        unacknowledged_frames: usize,
        unacknowledged_bytes: u64,
        arena_bytes: usize,
    },
}

/// A volume's thread: ring, arena, channel.
pub struct Volume {
    pub orders: Sender<Order>,
    pub heard: Receiver<Heard>,
    pub waker: Waker,
    thread: Option<JoinHandle<()>>,
}

impl Volume {
    pub fn start(arena_bytes: usize, limits: ChannelLimits) -> Self {
        let (orders, order_queue) = channel();
        let (hear, heard) = channel();
        let (give_waker, take_waker) = channel();
        let thread = thread::spawn(move || {
            let ring = Ring::new(256).unwrap();
            give_waker.send(ring.waker()).unwrap();
            VolumeThread {
                ring,
                arena: Arena::new(arena_bytes).unwrap(),
                channel: None,
                handle: None,
                hear,
                limits,
                queue: VecDeque::new(),
                hoard: None,
                most: (0, 0),
            }
            .run(&order_queue);
        });
        Self { orders, heard, waker: take_waker.recv().unwrap(), thread: Some(thread) }
    }

    pub fn order(&self, order: Order) {
        self.orders.send(order).unwrap();
        self.waker.wake();
    }

    pub fn send(&self, message: VolumeMessage, payload: Vec<u8>) {
        self.order(Order::Send(message, payload));
    }

    pub fn next(&self) -> Heard {
        self.heard.recv_timeout(PATIENCE).expect("nothing was heard")
    }

    /// The next message; connections may be lost meanwhile.
    pub fn message(&self) -> (VolumeMessage, Vec<u8>) {
        loop {
            if let Heard::Message(message, payload) = self.next() {
                return (message, payload);
            }
        }
    }

    /// Stops the thread: the most frames and bytes unacknowledged, and what is still used of the arena.
    pub fn stop(mut self) -> (usize, u64, usize) {
        self.order(Order::Stop);
        loop {
            if let Heard::Ended { unacknowledged_frames, unacknowledged_bytes, arena_bytes } = self.next() {
                self.thread.take().unwrap().join().unwrap();
                return (unacknowledged_frames, unacknowledged_bytes, arena_bytes);
            }
        }
    }
}

struct VolumeThread {
    ring: Ring,
    arena: Arena,
    channel: Option<DataChannel>,
    handle: Option<LinkHandle>,
    hear: Sender<Heard>,
    limits: ChannelLimits,
    queue: VecDeque<(VolumeMessage, Vec<u8>)>,
    hoard: Option<Vec<duplex_core::ids::BufferId>>,
    most: (usize, u64),
}

impl VolumeThread {
    fn run(mut self, orders: &Receiver<Order>) {
        let (mut completions, mut events) = (Vec::new(), Vec::new());
        let mut stopping = false;
        loop {
            self.ring.turn(None, &mut completions).unwrap();
            for completion in completions.drain(..) {
                if let Some(channel) = &mut self.channel {
                    channel.on_completion(completion, &mut self.ring, &mut self.arena, &mut events);
                }
            }
            while let Ok(order) = orders.try_recv() {
                stopping |= self.order(order, &mut events);
            }
            if stopping && self.channel.as_ref().is_none_or(DataChannel::is_idle) {
                break;
            }
            if let Some(channel) = &mut self.channel {
                channel.resume_receiving(&mut self.arena, &mut events);
            }
            self.tell(&mut events);
            self.send_queued();
            if let Some(channel) = &mut self.channel {
                channel.flush(&mut self.ring, &mut self.arena, &mut events);
                let (frames, bytes) = channel.unacknowledged();
                self.most = (self.most.0.max(frames), self.most.1.max(bytes));
            }
            self.tell(&mut events);
        }
        let ended = Heard::Ended {
            unacknowledged_frames: self.most.0,
            unacknowledged_bytes: self.most.1,
            arena_bytes: self.arena.in_use_bytes(),
        };
        let _ = self.hear.send(ended);
    }

    fn order(&mut self, order: Order, events: &mut Vec<ChannelEvent>) -> bool {
        match order {
            Order::Handle(handle) => self.handle = Some(handle),
            Order::Attach(data) => {
                let fits = self.channel.as_ref().is_some_and(|channel| channel.session() == data.session);
                if !fits {
                    if let Some(mut old) = self.channel.take() {
                        old.close(&mut self.arena);
                        self.drain(&mut old, events);
                    }
                    let (owner, volume) = (Owner(3), VolumeIndex(0));
                    self.channel = Some(DataChannel::new(owner, data.session, volume, self.limits));
                }
                self.channel.as_mut().unwrap().attach(data, &mut self.arena, events);
            }
            Order::Send(message, payload) => self.queue.push_back((message, payload)),
            Order::Hoard(true) => self.hoard = Some(Vec::new()),
            Order::Hoard(false) => {
                for buffer in self.hoard.take().unwrap_or_default() {
                    self.arena.release(buffer);
                }
            }
            Order::Stop => {
                for buffer in self.hoard.take().unwrap_or_default() {
                    self.arena.release(buffer);
                }
                if let Some(channel) = &mut self.channel {
                    channel.close(&mut self.arena);
                }
                self.queue.clear();
                return true;
            }
        }
        false
    }

    fn drain(&mut self, channel: &mut DataChannel, events: &mut Vec<ChannelEvent>) {
        let mut completions = Vec::new();
        while !channel.is_idle() {
            self.ring.turn(None, &mut completions).unwrap();
            for completion in completions.drain(..) {
                channel.on_completion(completion, &mut self.ring, &mut self.arena, events);
            }
        }
    }

    fn send_queued(&mut self) {
        let Some(channel) = &mut self.channel else { return };
        while channel.has_room()
            && let Some((message, payload)) = self.queue.front()
        {
            let buffer = if payload.is_empty() {
                None
            } else {
                let Some(buffer) = self.arena.alloc(payload.len()) else { return };
                self.arena.bytes_mut(buffer)[..payload.len()].copy_from_slice(payload);
                Some(buffer)
            };
            if channel.send(message, buffer, &mut self.arena).is_ok() {
                self.queue.pop_front();
            }
            if let Some(buffer) = buffer {
                self.arena.release(buffer);
            }
        }
    }

    fn tell(&mut self, events: &mut Vec<ChannelEvent>) {
        for event in events.drain(..) {
            let heard = match event {
                ChannelEvent::Message(message, buffer) => {
                    let bytes = usize::try_from(message.payload_bytes()).unwrap();
                    let payload = buffer.map_or_else(Vec::new, |buffer| {
                        let payload = self.arena.bytes(buffer)[..bytes].to_vec();
                        match &mut self.hoard {
                            Some(hoard) => hoard.push(buffer),
                            None => self.arena.release(buffer),
                        }
                        payload
                    });
                    Heard::Message(message, payload)
                }
                ChannelEvent::Broken { attempt, reason } => {
                    if let (Some(handle), Some(channel)) = (&self.handle, &self.channel) {
                        let _ = handle.data_broken(channel.session(), VolumeIndex(0), attempt);
                    }
                    Heard::Broken(reason.to_string())
                }
                ChannelEvent::Corrupt { why, .. } => Heard::Corrupt(why),
            };
            let _ = self.hear.send(heard);
        }
    }
}
