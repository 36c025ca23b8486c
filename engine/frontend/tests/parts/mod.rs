//! Real parts for the tests of the FUSE frontend: a file-backed volume on its own ring, the loop device, guards.
#![allow(dead_code, reason = "every test program uses its own part of this")]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use duplex_core::ids::{ByteRange, RequestId};
use duplex_core::request::{Request, RequestError, RequestOp};
use duplex_frontend::FrontendEvent;
use duplex_frontend::fuse::{Connection, FuseConfig, FuseDevice, FuseEnd, FuseMount, FuseStats, Service};
use duplex_frontend::loopdev::{DetachMode, LoopDevice, LoopOptions, set_up_device};
use duplex_ring::{Arena, Completion, Owner, Ring, Waker};
use rustix::fs::{FallocateFlags, fallocate};

pub(crate) const SIZE_BYTES: u64 = 256 << 20;
pub(crate) const SECTOR_BYTES: u32 = 4096;
const FUSE: Owner = Owner(7);

/// Says why a test does nothing here; true when it can run.
pub(crate) fn can_run() -> bool {
    let why = if !rustix::process::geteuid().is_root() {
        "needs root"
    } else if !duplex_frontend::loopdev::is_available() {
        "needs /dev/fuse and /dev/loop-control"
    } else {
        return true;
    };
    println!("SKIPPED: {why}");
    false
}

/// True when the program is installed.
pub(crate) fn has(program: &str) -> bool {
    let found = std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|directory| directory.join(program).exists()));
    if !found {
        println!("SKIPPED: {program} is not installed");
    }
    found
}

/// What the volume's thread was asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) reads: u64,
    pub(crate) writes: u64,
    pub(crate) flushes: u64,
    pub(crate) zeroes: u64,
    pub(crate) unmaps: u64,
    pub(crate) longest_bytes: u64,
    pub(crate) in_flight_most: usize,
    /// Inside the volume now, with this many turns to go at least.
    pub(crate) in_flight: usize,
    /// Inside for good: they came when the delay was without end.
    pub(crate) kept: usize,
    pub(crate) misaligned: u64,
    pub(crate) opened: u64,
}

pub(crate) enum Order {
    Service(Service),
    Fail(Option<RequestError>),
    /// Complete requests only this many turns later.
    Delay(u32),
    Stop,
}

pub(crate) struct Ended {
    pub(crate) end: Option<FuseEnd>,
    pub(crate) stats: FuseStats,
}

/// A volume whose content is a plain file, served by one thread.
pub(crate) struct Server {
    orders: Sender<Order>,
    waker: Waker,
    pub(crate) seen: Arc<Mutex<Seen>>,
    thread: Option<JoinHandle<Ended>>,
}

impl Server {
    pub(crate) fn start(backing: File, connection: Connection, service: Service) -> Self {
        let (orders, taken) = channel();
        let seen = Arc::new(Mutex::new(Seen::default()));
        let ring = Ring::new(256).expect("a ring");
        let waker = ring.waker();
        let shared = Arc::clone(&seen);
        let thread =
            std::thread::spawn(move || Volume::new(backing, connection, ring, taken, shared).run(service));
        Self { orders, waker, seen, thread: Some(thread) }
    }

    pub(crate) fn order(&self, order: Order) {
        // The thread ends by itself when its device is gone: then nobody listens.
        let _ = self.orders.send(order);
        self.waker.wake();
    }

    pub(crate) fn seen(&self) -> Seen {
        *self.seen.lock().expect("not poisoned")
    }

    /// Waits until what was seen fulfils the condition.
    pub(crate) fn wait_seen(&self, condition: impl Fn(&Seen) -> bool) -> Seen {
        loop {
            let seen = self.seen();
            if condition(&seen) || self.thread.as_ref().is_none_or(JoinHandle::is_finished) {
                return seen;
            }
            std::thread::yield_now();
        }
    }

    pub(crate) fn stop(mut self) -> Ended {
        self.order(Order::Stop);
        self.thread.take().expect("runs").join().expect("the volume's thread did not panic")
    }

    /// Waits for the thread to end by itself.
    pub(crate) fn join(mut self) -> Ended {
        self.thread.take().expect("runs").join().expect("the volume's thread did not panic")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            self.order(Order::Stop);
            let _ = thread.join();
        }
    }
}

struct Volume {
    backing: File,
    device: FuseDevice,
    ring: Ring,
    arena: Arena,
    orders: Receiver<Order>,
    seen: Arc<Mutex<Seen>>,
    fail: Option<RequestError>,
    delay_turns: u32,
    turn: u64,
    waiting: Vec<(u64, RequestId, Result<(), RequestError>)>,
}

impl Volume {
    fn new(
        backing: File,
        connection: Connection,
        ring: Ring,
        orders: Receiver<Order>,
        seen: Arc<Mutex<Seen>>,
    ) -> Self {
        let config =
            FuseConfig { volume: "test".to_owned(), size_bytes: SIZE_BYTES, sector_bytes: SECTOR_BYTES };
        let device = FuseDevice::new(FUSE, config, connection);
        let arena = Arena::new(64 << 20).expect("an arena");
        Self {
            backing,
            device,
            ring,
            arena,
            orders,
            seen,
            fail: None,
            delay_turns: 0,
            turn: 0,
            waiting: Vec::new(),
        }
    }

    fn run(mut self, service: Service) -> Ended {
        let (mut completions, mut events) = (Vec::<Completion>::new(), Vec::new());
        self.device.start(&mut self.ring, &mut self.arena);
        self.device.set_service(service, &mut self.arena, &mut events);
        let mut stopping = false;
        loop {
            while let Ok(order) = self.orders.try_recv() {
                match order {
                    Order::Service(service) => self.device.set_service(service, &mut self.arena, &mut events),
                    Order::Fail(error) => self.fail = error,
                    Order::Delay(turns) => self.delay_turns = turns,
                    Order::Stop => stopping = true,
                }
            }
            self.serve(&mut events);
            self.device.flush(&mut self.ring, &mut self.arena);
            if stopping || self.device.end().is_some() {
                self.device.close(&mut self.ring, &mut self.arena);
                if self.device.is_idle() {
                    break;
                }
            }
            let wait = if self.waiting.is_empty() { None } else { Some(Duration::from_micros(200)) };
            self.ring.turn(wait, &mut completions).expect("a turn");
            self.turn += 1;
            for completion in completions.drain(..) {
                assert_eq!(completion.token.owner, FUSE);
                self.device.on_completion(completion, &mut self.ring, &mut self.arena, &mut events);
            }
        }
        Ended { end: self.device.end(), stats: self.device.stats() }
    }

    fn serve(&mut self, events: &mut Vec<FrontendEvent>) {
        let mut next = Vec::new();
        for event in events.drain(..) {
            match event {
                FrontendEvent::Request(request) => {
                    let result = match self.fail {
                        Some(error) => Err(error),
                        None => self.perform(&request),
                    };
                    self.waiting.push((self.turn + u64::from(self.delay_turns), request.id, result));
                }
                FrontendEvent::ClientOpened => self.seen.lock().expect("not poisoned").opened += 1,
                FrontendEvent::ClientClosed => {}
            }
        }
        let most = self.waiting.len();
        {
            let mut seen = self.seen.lock().expect("not poisoned");
            seen.in_flight_most = seen.in_flight_most.max(most);
            seen.in_flight = most;
            seen.kept = self.waiting.iter().filter(|(at, _, _)| *at >= u64::from(u32::MAX)).count();
        }
        let turn = self.turn;
        let due: Vec<_> = self.waiting.extract_if(.., |(at, _, _)| *at <= turn).collect();
        for (_, id, result) in due {
            self.device.complete(id, result, &mut self.arena, &mut next);
        }
        events.append(&mut next);
        if !events.is_empty() {
            self.serve(events);
        }
    }

    fn perform(&mut self, request: &Request) -> Result<(), RequestError> {
        let mut seen = *self.seen.lock().expect("not poisoned");
        let done = match request.op {
            RequestOp::Read { range, buffer } => {
                seen.reads += 1;
                let bytes = &mut self.arena.bytes_mut(buffer)[..length(range)];
                self.backing.read_exact_at(bytes, range.offset_bytes)
            }
            RequestOp::Write { range, buffer, .. } => {
                seen.writes += 1;
                seen.longest_bytes = seen.longest_bytes.max(range.length_bytes);
                seen.misaligned += u64::from(!(self.arena.ptr(buffer) as usize).is_multiple_of(4096));
                self.backing.write_all_at(&self.arena.bytes(buffer)[..length(range)], range.offset_bytes)
            }
            RequestOp::Flush => {
                seen.flushes += 1;
                Ok(())
            }
            RequestOp::Zero { range, may_unmap, .. } => {
                seen.zeroes += 1;
                seen.unmaps += u64::from(may_unmap);
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                fallocate(&self.backing, flags, range.offset_bytes, range.length_bytes).map_err(Into::into)
            }
        };
        *self.seen.lock().expect("not poisoned") = seen;
        done.map_err(|error| {
            println!("backing: {error}");
            RequestError::Io
        })
    }
}

fn length(range: ByteRange) -> usize {
    usize::try_from(range.length_bytes).expect("one request")
}

/// A backing file of the volume's size.
pub(crate) fn backing_in(directory: &Path) -> PathBuf {
    let path = directory.join("backing");
    let file = File::create_new(&path).expect("a backing");
    file.set_len(SIZE_BYTES).expect("a sparse backing");
    path
}

pub(crate) fn open_backing(path: &Path) -> File {
    File::options().read(true).write(true).open(path).expect("the backing")
}

/// A served volume with its loop device; takes all away again.
pub(crate) struct Bench {
    pub(crate) device: Option<LoopDevice>,
    pub(crate) server: Option<Server>,
    pub(crate) directory: tempfile::TempDir,
}

impl Bench {
    pub(crate) fn new() -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let backing = open_backing(&backing_in(directory.path()));
        let (mount, connection) = FuseMount::create("test").expect("a FUSE file system");
        let server = Server::start(backing, connection, Service::Serving);
        let device = set_up_device(&mount, &options()).expect("a loop device");
        drop(mount);
        Self { device: Some(device), server: Some(server), directory }
    }

    pub(crate) fn path(&self) -> &Path {
        self.device.as_ref().expect("set up").path()
    }

    pub(crate) fn server(&self) -> &Server {
        self.server.as_ref().expect("runs")
    }

    /// Detaches and waits for the file system's end.
    pub(crate) fn finish(mut self) -> Ended {
        let device = self.device.take().expect("set up");
        device.detach(DetachMode::IfUnused).expect("detached");
        self.server.take().expect("runs").join()
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        // A server that does not serve would let the last writes of the device's cache wait for ever.
        if let Some(server) = &self.server {
            server.order(Order::Service(Service::Refusing));
        }
        if let Some(device) = self.device.take() {
            let _ = device.detach(DetachMode::WhenClosed);
        }
    }
}

pub(crate) fn options() -> LoopOptions {
    LoopOptions { volume: "test".to_owned(), sector_bytes: SECTOR_BYTES, read_only: false }
}

/// A mounted file system; unmounts on drop.
pub(crate) struct Mounted(PathBuf);

impl Mounted {
    pub(crate) fn new(device: &Path, at: &Path) -> Self {
        std::fs::create_dir_all(at).expect("a mount point");
        run("mount", [device.as_os_str(), at.as_os_str()]);
        Self(at.to_owned())
    }

    pub(crate) fn unmount(self) {
        run("umount", [self.0.as_os_str()]);
        std::mem::forget(self);
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

pub(crate) fn output<I: AsRef<std::ffi::OsStr>>(
    program: &str,
    arguments: impl IntoIterator<Item = I>,
) -> Output {
    Command::new(program).args(arguments).output().expect("it starts")
}

pub(crate) fn run<I: AsRef<std::ffi::OsStr>>(
    program: &str,
    arguments: impl IntoIterator<Item = I>,
) -> String {
    let output = output(program, arguments);
    let text =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{program}: {}\n{text}", output.status);
    text
}

/// Bytes that are not zero and differ from block to block.
pub(crate) fn pattern(length_bytes: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut bytes = Vec::with_capacity(length_bytes);
    while bytes.len() < length_bytes {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length_bytes);
    bytes
}
