//! The loop of a volume's thread: one turn of the ring, then everything that follows from it.

use std::sync::atomic::Ordering;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use duplex_core::ids::{BootId, BufferId, SessionId, VolumeIndex};
use duplex_core::limits::{COPY_CHUNK_BYTES, COPY_CHUNKS_MAX};
use duplex_core::message::VolumeMessage;
use duplex_core::mirror::api::{Action, Exposure, Input};
use duplex_core::mirror::{Volume, VolumeConfig};
use duplex_core::request::{DiskOp, DiskOutcome};
use duplex_core::time::Instant;
use duplex_frontend::FrontendEvent;
use duplex_link::{BreakReason, ChannelEvent, ChannelLimits, DataChannel};
use duplex_ring::{Arena, Completion, ENTRIES_DEFAULT, Owner, Ring};
use duplex_store::{Store, StoreEvent};

use super::frontends::{CLOSE_TIME, Frontends, NBD, NbdSettings};
use super::place::Placed;
use super::{Shared, Snapshot, VolumeCommand, VolumeEvent, VolumeHandle};
use crate::{clock, crash_at};

const STORE: Owner = Owner(1);
/// Channels of successive sessions have successive owners: an old one's last completions never meet a new one.
const CHANNEL_FIRST: u16 = 16;
/// Buffer arena of a volume: copy chunks, clients' and the peer's payloads. Untouched pages cost nothing.
const ARENA_BYTES: usize = 96 << 20;
/// Unacknowledged bytes before the channel counts as full.
const WINDOW_BYTES: u64 = 64 << 20;
/// The loop turns at least this often: heartbeats promise only while it does.
const TURN_AT_LEAST: Duration = Duration::from_millis(200);
/// The status page is this old at most while something happens.
const SNAPSHOT_EVERY: Duration = Duration::from_millis(100);
/// With this many operations on the disk a turn gathers completions: one for every four, and so many at most. Fewer
/// than that are answered one by one, for latency. Measured at depth 32: half the processor time for a write, the same
/// number of writes.
const GATHER_FROM: usize = 8;
const GATHER_EACH: usize = 4;
const GATHER_MAX: usize = 16;
/// While requests wait for a lease nobody wakes the thread for, it looks this often.
const LEASE_LOOK: Duration = Duration::from_millis(20);

/// Why a volume's thread could not begin.
#[derive(Debug, thiserror::Error)]
pub enum ThreadError {
    /// io_uring is not to be had.
    #[error(transparent)]
    Ring(#[from] duplex_ring::RingError),
    /// No memory for buffers.
    #[error(transparent)]
    Arena(#[from] duplex_ring::ArenaError),
    /// The backing.
    #[error(transparent)]
    Store(#[from] duplex_store::StoreError),
    /// The system gives no thread.
    #[error("cannot start the thread of volume {volume}: {error}")]
    Thread {
        /// Which volume.
        volume: String,
        /// As the system said it.
        error: std::io::Error,
    },
}

/// What a volume's thread is told at its start.
#[derive(Debug)]
pub struct Settings {
    /// The volume's name.
    pub name: String,
    /// Its position.
    pub index: VolumeIndex,
    /// This boot.
    pub boot_id: BootId,
    /// An operation unanswered this long counts as a failed copy.
    pub stall: Duration,
    /// Its NBD server.
    pub nbd: NbdSettings,
    /// Where its events go.
    pub events: tokio::sync::mpsc::Sender<(VolumeIndex, VolumeEvent)>,
}

struct Channel {
    owner: Owner,
    channel: DataChannel,
}

struct VolumeLoop {
    settings: Settings,
    shared: Arc<Shared>,
    commands: mpsc::Receiver<VolumeCommand>,
    ring: Ring,
    arena: Arena,
    core: Volume,
    store: Store,
    frontends: Frontends,
    channel: Option<Channel>,
    /// Channels of ended sessions whose operations are being reaped.
    ended: Vec<Channel>,
    channels_made: u16,
    completions: Vec<Completion>,
    disk_events: Vec<StoreEvent>,
    client_events: Vec<FrontendEvent>,
    channel_events: Vec<ChannelEvent>,
    now: Instant,
    /// When a component next wants to be told the time, as of the last turn.
    due: Instant,
    snapshot_at: Instant,
    stopping: Option<Instant>,
}

/// Starts the thread of a volume.
///
/// # Errors
/// [`ThreadError`]; nothing is left behind.
pub fn spawn(settings: Settings, placed: Placed) -> Result<(VolumeHandle, JoinHandle<()>), ThreadError> {
    let ring = Ring::new(ENTRIES_DEFAULT)?;
    let mut arena = Arena::new(ARENA_BYTES)?;
    let capacity_bytes = placed.capacity_bytes;
    let store = Store::new(STORE, placed.backing, placed.placement)?;
    // A block is copied whole.
    let chunk = COPY_CHUNK_BYTES.max(u64::from(placed.superblock.copy.block_bytes));
    let chunk = usize::try_from(chunk).expect("a chunk fits into memory");
    let copy_buffers: Vec<BufferId> = (0..COPY_CHUNKS_MAX).filter_map(|_| arena.alloc(chunk)).collect();
    let config =
        VolumeConfig { boot_id: settings.boot_id, copy_buffers, stall: settings.stall, capacity_bytes };
    let (sender, commands) = mpsc::channel();
    let shared = Arc::new(Shared::default());
    let handle = VolumeHandle {
        index: settings.index,
        commands: sender,
        waker: ring.waker(),
        shared: Arc::clone(&shared),
    };
    let name = settings.name.clone();
    // Frontends are made on the thread they live on.
    let (index, events) = (settings.index, settings.events.clone());
    let begin = move || {
        VolumeLoop {
            frontends: Frontends::new(&settings.name),
            settings,
            shared,
            commands,
            ring,
            arena,
            core: Volume::new(config),
            store,
            channel: None,
            ended: Vec::new(),
            channels_made: 0,
            completions: Vec::new(),
            disk_events: Vec::new(),
            client_events: Vec::new(),
            channel_events: Vec::new(),
            now: clock::now(),
            due: Instant::default(),
            snapshot_at: Instant::default(),
            stopping: None,
        }
        .run();
        // Everything it held is free now. A closed queue means that the process ends.
        let _ = events.blocking_send((index, VolumeEvent::Ended));
    };
    let thread = std::thread::Builder::new()
        .name(format!("volume-{name}"))
        .spawn(begin)
        .map_err(|error| ThreadError::Thread { volume: name, error })?;
    Ok((handle, thread))
}

impl VolumeLoop {
    fn run(mut self) {
        loop {
            self.now = clock::now();
            self.shared.turned_ns.store(self.now.0, Ordering::Relaxed);
            self.take_commands();
            self.feed_time();
            self.settle();
            if self.is_over() {
                break;
            }
            self.publish();
            let wait = self.wait_for();
            self.gather();
            let mut completions = std::mem::take(&mut self.completions);
            if let Err(error) = self.ring.turn(Some(wait), &mut completions) {
                self.tell(VolumeEvent::Trouble(format!("volume {}: {error}", self.settings.name)));
                break;
            }
            for completion in completions.drain(..) {
                self.dispatch(completion);
            }
            self.completions = completions;
        }
    }

    fn tell(&self, event: VolumeEvent) {
        // The control plane never waits for this thread, so a full queue drains; a closed one means that the
        // process ends.
        let _ = self.settings.events.blocking_send((self.settings.index, event));
    }

    fn wait_for(&mut self) -> Duration {
        let deadlines = [self.core.next_deadline(), self.frontends.deadline()];
        self.due = deadlines.into_iter().flatten().min().unwrap_or(Instant::NEVER);
        let mut wait = self.due.since(self.now).min(TURN_AT_LEAST);
        if self.core.waits_for_lease() {
            wait = wait.min(LEASE_LOOK);
        }
        wait
    }

    fn gather(&mut self) {
        let on_disk = self.store.in_flight();
        let more = if on_disk < GATHER_FROM { 0 } else { (on_disk / GATHER_EACH).min(GATHER_MAX) };
        self.ring.gather(u32::try_from(more).unwrap_or(0));
    }

    fn feed_lease(&mut self) {
        let until = Instant(self.shared.lease_until_ns.load(Ordering::Acquire));
        self.core.set_lease(self.now, until);
        self.shared.wants_lease.store(self.core.waits_for_lease(), Ordering::Release);
    }

    fn feed_time(&mut self) {
        self.feed_lease();
        if self.now < self.due {
            return;
        }
        if self.core.next_deadline().is_some_and(|at| at <= self.now) {
            self.core.handle(self.now, Input::Time);
        }
        self.frontends.on_time(self.now, &mut self.ring);
    }

    fn take_commands(&mut self) {
        loop {
            match self.commands.try_recv() {
                Ok(command) => self.command(command),
                Err(mpsc::TryRecvError::Empty) => return,
                Err(mpsc::TryRecvError::Disconnected) => return self.begin_stop(),
            }
        }
    }

    fn command(&mut self, command: VolumeCommand) {
        match command {
            VolumeCommand::Order(order) => self.core.handle(self.now, Input::Order(order)),
            VolumeCommand::Session(session) => self.begin_channel(session),
            VolumeCommand::SessionOver(session) => {
                if self.channel.as_ref().is_some_and(|c| c.channel.session() == session) {
                    self.end_channel();
                }
            }
            VolumeCommand::Connection(connection) => {
                let session = connection.session;
                if let Some(channel) = self.channel.as_mut().filter(|c| c.channel.session() == session) {
                    channel.channel.attach(*connection, &mut self.arena, &mut self.channel_events);
                }
            }
            VolumeCommand::Fuse(connection, number) => {
                self.frontends.take_fuse(connection, number);
                self.begin_fuse();
            }
            VolumeCommand::FuseRefuse => {
                self.frontends.refuse_fuse(&mut self.arena, &mut self.client_events);
            }
            VolumeCommand::FuseHold => self.frontends.hold_fuse(&mut self.arena, &mut self.client_events),
            VolumeCommand::FuseEnd => self.frontends.detach_fuse(&mut self.ring, &mut self.arena),
            VolumeCommand::Stop => self.begin_stop(),
        }
    }

    fn begin_fuse(&mut self) {
        self.frontends.begin_fuse(&mut self.ring, &mut self.arena);
        self.frontends.serve_fuse(&mut self.arena, &mut self.client_events);
    }

    fn begin_channel(&mut self, session: SessionId) {
        self.end_channel();
        let owner = Owner(CHANNEL_FIRST + self.channels_made % 1024);
        self.channels_made = self.channels_made.wrapping_add(1);
        // Twice the window holds all a full arena can: `send` never refuses for want of room.
        let limits = ChannelLimits { window_bytes: WINDOW_BYTES, ..ChannelLimits::default() };
        let channel = DataChannel::new(owner, session, self.settings.index, limits);
        self.channel = Some(Channel { owner, channel });
    }

    fn end_channel(&mut self) {
        if let Some(mut channel) = self.channel.take() {
            channel.channel.close(&mut self.arena);
            self.ended.push(channel);
        }
    }

    fn begin_stop(&mut self) {
        if self.stopping.is_none() {
            self.stopping = Some(self.now + CLOSE_TIME);
            self.frontends.close(&mut self.ring, &mut self.arena);
            self.end_channel();
            self.store.close(&mut self.disk_events);
        }
    }

    /// Everything the kernel had is back, or it does not come back.
    fn is_over(&self) -> bool {
        let Some(give_up) = self.stopping else {
            return false;
        };
        let idle = self.store.is_idle()
            && self.frontends.is_idle()
            && self.ended.is_empty()
            && self.channel.is_none();
        idle || self.now >= give_up
    }

    fn dispatch(&mut self, completion: Completion) {
        let owner = completion.token.owner;
        if owner == STORE {
            self.store.on_completion(completion, &mut self.ring, &mut self.arena, &mut self.disk_events);
        } else if owner.0 < CHANNEL_FIRST {
            self.frontends.on_completion(
                completion,
                &mut self.ring,
                &mut self.arena,
                &mut self.client_events,
            );
        } else if let Some(channel) = self.channel.as_mut().filter(|c| c.owner == owner) {
            channel.channel.on_completion(
                completion,
                &mut self.ring,
                &mut self.arena,
                &mut self.channel_events,
            );
        } else if let Some(channel) = self.ended.iter_mut().find(|c| c.owner == owner) {
            let mut late = Vec::new();
            channel.channel.on_completion(completion, &mut self.ring, &mut self.arena, &mut late);
            release_late(late, &mut self.arena);
        }
    }

    /// Feeds events to the core and carries out its actions until nothing is left to do, then lets every
    /// component put its output into the ring.
    fn settle(&mut self) {
        loop {
            self.feed_events();
            self.carry_out();
            self.flush();
            let quiet = self.disk_events.is_empty()
                && self.client_events.is_empty()
                && self.channel_events.is_empty();
            if quiet {
                return;
            }
        }
    }

    fn feed_events(&mut self) {
        let mut disk = std::mem::take(&mut self.disk_events);
        for (id, outcome) in disk.drain(..) {
            crash_at::ended(id);
            self.give(Input::Disk(id, outcome));
        }
        put_back(&mut self.disk_events, disk);
        let mut clients = std::mem::take(&mut self.client_events);
        for event in clients.drain(..) {
            match event {
                FrontendEvent::Request(request) => self.give(Input::Request(request)),
                FrontendEvent::ClientOpened | FrontendEvent::ClientClosed => {}
            }
        }
        put_back(&mut self.client_events, clients);
        let mut channel = std::mem::take(&mut self.channel_events);
        for event in channel.drain(..) {
            self.on_channel_event(event);
        }
        put_back(&mut self.channel_events, channel);
    }

    fn on_channel_event(&mut self, event: ChannelEvent) {
        let Some(session) = self.channel.as_ref().map(|c| c.channel.session()) else {
            return release_late(vec![event], &mut self.arena);
        };
        match event {
            ChannelEvent::Message(message, buffer) => {
                let buffer = match message {
                    // The core fills it: the answer's payload.
                    VolumeMessage::Read { range, .. } => {
                        usize::try_from(range.length_bytes).ok().and_then(|length| self.arena.alloc(length))
                    }
                    VolumeMessage::Write { .. }
                    | VolumeMessage::Zero { .. }
                    | VolumeMessage::Ack { .. }
                    | VolumeMessage::Flush { .. }
                    | VolumeMessage::FlushAck { .. }
                    | VolumeMessage::Copy { .. }
                    | VolumeMessage::CopyZero { .. }
                    | VolumeMessage::CopyAck { .. }
                    | VolumeMessage::ReadReply { .. }
                    | VolumeMessage::MarksPage { .. }
                    | VolumeMessage::MarksEnd { .. }
                    | VolumeMessage::MarksAck { .. }
                    | VolumeMessage::SyncDone { .. }
                    | VolumeMessage::SyncAck { .. } => buffer,
                };
                self.give(Input::Message(session, message, buffer));
            }
            ChannelEvent::Broken { attempt, reason } => {
                let fatal = matches!(reason, BreakReason::Mismatch(_));
                let reason = reason.to_string();
                self.tell(VolumeEvent::ChannelBroken { session, attempt, fatal, reason });
            }
            ChannelEvent::Corrupt { path, why } => self.tell(VolumeEvent::Corrupt { path, why }),
        }
    }

    fn give(&mut self, input: Input) {
        crash_at::reached(|| self.core.boundary_at(&input));
        self.core.handle(self.now, input);
    }

    fn begin_disk(&mut self, mut op: DiskOp) {
        if crash_at::log_write_is_lost(&op) {
            return self.disk_events.push((op.id, DiskOutcome::Done));
        }
        crash_at::begins(&mut op, |op| self.core.boundary_before_disk(op));
        self.store.submit(op, &mut self.ring, &mut self.arena, &mut self.disk_events);
    }

    fn carry_out(&mut self) {
        while let Some(action) = self.core.poll_action() {
            crash_at::reached(|| self.core.boundary_before(&action));
            match action {
                Action::Disk(op) => self.begin_disk(op),
                Action::Send(session, message, buffer) => self.send(session, message, buffer),
                Action::Complete(id, result) => {
                    self.frontends.complete(
                        id,
                        result,
                        &mut self.ring,
                        &mut self.arena,
                        &mut self.client_events,
                    );
                }
                Action::Release(buffer) => self.arena.release(buffer),
                Action::CopyBuffer { from, into, length_bytes } => self.copy_buffer(from, into, length_bytes),
                Action::Report(report) => {
                    self.snapshot_at = Instant::default();
                    self.open_frontends();
                    self.tell(VolumeEvent::Report(report));
                }
                Action::Exposure(exposure) => self.expose(exposure),
            }
        }
    }

    fn send(&mut self, session: SessionId, message: VolumeMessage, buffer: Option<BufferId>) {
        let Some(channel) = self.channel.as_mut().filter(|c| c.channel.session() == session) else {
            return;
        };
        let (message, buffer) = match (message, buffer) {
            // Zeroes travel as a range: a fresh disk costs no link.
            (VolumeMessage::Copy { id, range }, Some(payload)) => {
                let length = usize::try_from(range.length_bytes).unwrap_or(usize::MAX);
                let bytes = self.arena.bytes(payload);
                if is_zero(&bytes[..length.min(bytes.len())]) {
                    (VolumeMessage::CopyZero { id, range }, None)
                } else {
                    (VolumeMessage::Copy { id, range }, Some(payload))
                }
            }
            other => other,
        };
        if let Err(error) = channel.channel.send(&message, buffer, &mut self.arena) {
            // The peer takes nothing any more: the session is over, the core goes on without it.
            let reason = error.to_string();
            let attempt = channel.channel.attempt().unwrap_or(0);
            self.end_channel();
            self.tell(VolumeEvent::ChannelBroken { session, attempt, fatal: true, reason });
        }
    }

    fn copy_buffer(&mut self, from: BufferId, into: BufferId, length_bytes: u64) {
        let length = usize::try_from(length_bytes).unwrap_or(usize::MAX);
        let length = length.min(self.arena.capacity(from)).min(self.arena.capacity(into));
        let bytes = self.arena.bytes(from)[..length].to_vec();
        self.arena.bytes_mut(into)[..length].copy_from_slice(&bytes);
    }

    fn open_frontends(&mut self) {
        let size_bytes = self.core.size_bytes();
        let Some(sector_bytes) = self.core.copy().map(|c| c.sector_bytes).filter(|_| size_bytes > 0) else {
            return;
        };
        let opened = self.frontends.open(
            &self.settings.nbd,
            size_bytes,
            sector_bytes,
            &mut self.ring,
            &mut self.arena,
        );
        if let Err(text) = opened {
            self.tell(VolumeEvent::Trouble(text));
        }
        self.begin_fuse();
    }

    fn expose(&mut self, exposure: Exposure) {
        self.open_frontends();
        let serving = match exposure {
            Exposure::Serving => true,
            Exposure::Refusing => false,
        };
        let exposed = self.frontends.expose(
            serving,
            &self.settings.nbd.refusal,
            &mut self.ring,
            &mut self.arena,
            &mut self.client_events,
        );
        if let Err(text) = exposed {
            self.tell(VolumeEvent::Trouble(text));
        }
        self.snapshot_at = Instant::default();
        self.tell(VolumeEvent::Exposed { serving });
    }

    fn flush(&mut self) {
        self.frontends.flush(&mut self.ring, &mut self.arena);
        if let Some((number, end)) = self.frontends.fuse_ended() {
            self.tell(VolumeEvent::FuseEnded { number, end });
        }
        if let Some(channel) = self.channel.as_mut() {
            channel.channel.resume_receiving(&mut self.arena, &mut self.channel_events);
            channel.channel.flush(&mut self.ring, &mut self.arena, &mut self.channel_events);
        }
        self.ended.retain(|channel| !channel.channel.is_idle());
    }

    fn publish(&mut self) {
        if self.now < self.snapshot_at {
            return;
        }
        self.snapshot_at = self.now + SNAPSHOT_EVERY;
        let (clients, serving) = (self.frontends.clients(), self.frontends.serving());
        self.shared.publish(Snapshot::of(&self.core, clients, serving));
    }
}

/// Keeps the capacity of an emptied list, and what came in meanwhile.
fn put_back<T>(place: &mut Vec<T>, mut emptied: Vec<T>) {
    emptied.append(place);
    *place = emptied;
}

/// Payloads of messages that nobody takes any more.
fn release_late(events: Vec<ChannelEvent>, arena: &mut Arena) {
    for event in events {
        match event {
            ChannelEvent::Message(_, Some(buffer)) => arena.release(buffer),
            ChannelEvent::Message(_, None) | ChannelEvent::Broken { .. } | ChannelEvent::Corrupt { .. } => {}
        }
    }
}

/// True if every byte is zero. Compares words: the compiler makes vectors of it.
fn is_zero(bytes: &[u8]) -> bool {
    let (words, rest) = bytes.as_chunks::<64>();
    rest.iter().all(|byte| *byte == 0)
        && words.iter().all(|word| word.iter().fold(0, |all, byte| all | *byte) == 0)
}

const _: () = assert!(NBD.0 < CHANNEL_FIRST, "channel owners lie above all others");
