//! A simulated server: a machine with disks and a clock, and the process that runs on it.

use std::collections::{BTreeMap, VecDeque};

use duplex_core::ids::{BootId, BufferId, Incarnation, RequestId, ServerName, SessionId};
use duplex_core::message::{ControlMessage, LiveState, VolumeMessage};
use duplex_core::mirror::Volume;
use duplex_core::mirror::api::{Exposure, Order, Report, ServeMode};
use duplex_core::pair::Server;
use duplex_core::request::{DiskOutcome, Request};
use duplex_core::time::Instant;

use super::disk::{Disk, Pending};
use super::oracle::Ticket;
use super::page::{Buffers, Page};

/// A clock that runs at its own rate.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    /// Shown at `since`.
    base: u64,
    since: u64,
    /// Parts of a million: 1,000,000 is right.
    rate: u64,
}

impl Clock {
    /// Shows `base` at `since`.
    pub const fn new(base: u64, since: u64, rate: u64) -> Self {
        Self { base, since, rate }
    }

    /// What it shows.
    pub fn at(&self, now: u64) -> Instant {
        let passed = u128::from(now - self.since) * u128::from(self.rate) / 1_000_000;
        Instant(self.base + u64::try_from(passed).expect("a run is short"))
    }

    /// When it will show this, or never.
    pub fn when(&self, instant: Instant) -> Option<u64> {
        if instant == Instant::NEVER {
            return None;
        }
        let ahead = u128::from(instant.0.saturating_sub(self.base));
        let passed = (ahead * 1_000_000).div_ceil(u128::from(self.rate));
        u64::try_from(passed).ok().and_then(|passed| self.since.checked_add(passed))
    }
}

/// A client's request under way at a server.
#[derive(Clone, Copy, Debug)]
pub struct Asked {
    /// The oracle's name.
    pub ticket: Ticket,
    /// Its buffer.
    pub buffer: Option<BufferId>,
    /// Blocks to read back; 0 for other requests.
    pub read_pages: usize,
}

/// A volume's thread.
#[derive(Debug)]
pub struct VolumeThread {
    /// The shipped machine.
    pub machine: Volume,
    /// Its arena.
    pub buffers: Buffers,
    /// Disk operations started and not ended.
    pub disk: BTreeMap<u64, Pending>,
    /// What the frontends were told.
    pub exposure: Exposure,
    /// How completions are earned, and in which epoch.
    pub serving: Option<(ServeMode, u64)>,
    /// Clients' requests.
    pub requests: BTreeMap<RequestId, Asked>,
    /// When the last order, or report, arrives: they keep their order.
    pub order_due: u64,
    /// Of reports.
    pub report_due: u64,
}

/// Something that waits for a stopped process.
#[derive(Debug)]
pub enum Inbox {
    /// For a volume.
    Disk(usize, u64),
    /// Of the peer, parsed.
    Volume(usize, SessionId, VolumeMessage, Vec<Page>),
    /// Of the peer.
    Control(SessionId, Box<ControlMessage>),
    /// Of the server machine.
    Order(usize, Box<Order>),
    /// Of a volume.
    Report(usize, Box<Report>),
    /// A client.
    Request(usize, Request),
    /// The link.
    Up(SessionId, Incarnation),
    /// The link.
    Down(SessionId, String),
    /// The saved blocks are stable.
    Saved,
}

/// The daemon.
#[derive(Debug)]
pub struct Process {
    /// Drawn at its start.
    pub incarnation: Incarnation,
    /// The shipped machine.
    pub server: Server,
    /// One each.
    pub volumes: Vec<VolumeThread>,
    /// Stopped until; inputs wait.
    pub stopped_until: u64,
    /// What waits.
    pub inbox: VecDeque<Inbox>,
    /// The session it knows.
    pub session: Option<SessionId>,
    /// When its next time input is due.
    pub wake_at: u64,
    /// Last live state seen, for coverage.
    pub live: LiveState,
    /// Time inputs at one instant, to find a deadline that does not move.
    pub spins: (u64, u32),
}

/// One machine.
#[derive(Debug)]
pub struct Machine {
    /// Its name.
    pub name: ServerName,
    /// The kernel's.
    pub boot_id: BootId,
    /// Its clock.
    pub clock: Clock,
    /// One each volume.
    pub disks: Vec<Disk>,
    /// A disk of each volume that was pulled and not thrown away.
    pub shelf: Vec<Option<Disk>>,
    /// The daemon, when it runs.
    pub process: Option<Process>,
    /// Counts processes: late events of an earlier one are dropped.
    pub life: u64,
    /// The script will start the daemon again.
    pub restart_planned: bool,
    /// State in which the last process ended.
    pub ended_as: LiveState,
}

impl Machine {
    /// The process, when it runs and belongs to this life.
    pub fn running(&mut self, life: u64) -> Option<&mut Process> {
        if self.life == life { self.process.as_mut() } else { None }
    }
}

/// A disk operation's end, for the core.
pub fn outcome_numbers(outcome: &DiskOutcome) -> u64 {
    match outcome {
        DiskOutcome::Done => 0,
        DiskOutcome::Bytes(bytes) => bytes.len() as u64,
        DiskOutcome::Zeroes { length_bytes } => *length_bytes | (1 << 60),
        DiskOutcome::Failed { errno } => u64::from(errno.unsigned_abs()) | (1 << 32),
    }
}
