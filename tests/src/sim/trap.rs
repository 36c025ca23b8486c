//! A crash at a chosen boundary: which time, from 1, a server stands there, who dies of it, and how.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use duplex_core::boundary::Boundary;
use duplex_core::ids::DiskOpId;
use duplex_core::request::{DiskOp, DiskOpKind};

use super::disk::Cut;
use super::oracle::Host;
use super::world::World;

/// Names of the hosts, in order.
const HOSTS: [&str; 2] = ["alpha", "beta"];

/// Who dies.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Victim {
    /// The server that stands at the boundary.
    Own,
    /// The other one.
    Peer,
    /// Both.
    Both,
}

impl Victim {
    /// Every one.
    pub const ALL: [Self; 3] = [Self::Own, Self::Peer, Self::Both];

    const fn name(self) -> &'static str {
        match self {
            Self::Own => "own",
            Self::Peer => "peer",
            Self::Both => "both",
        }
    }
}

/// How: `None` is a process kill.
pub const WAYS: [Option<Cut>; 3] = [None, Some(Cut::Lose), Some(Cut::Tear)];

const fn way_name(way: Option<Cut>) -> &'static str {
    match way {
        None => "kill",
        Some(Cut::Lose) => "lose",
        Some(Cut::Keep) => "keep",
        Some(Cut::Tear) => "tear",
    }
}

/// One crash. As text: `g4-durable@2:alpha:own:kill`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Trap {
    /// Where.
    pub boundary: Boundary,
    /// Which time, from 1.
    pub times: u64,
    /// Who stands there.
    pub host: Host,
    /// Who dies.
    pub victim: Victim,
    /// How.
    pub power: Option<Cut>,
}

impl fmt::Display for Trap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (boundary, host) = (self.boundary.name(), HOSTS[self.host]);
        write!(f, "{boundary}@{}:{host}:{}:{}", self.times, self.victim.name(), way_name(self.power))
    }
}

impl FromStr for Trap {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is not like g4-durable@2:alpha:own:kill");
        let mut parts = text.split(':');
        let (place, host) = (parts.next().ok_or_else(wrong)?, parts.next().ok_or_else(wrong)?);
        let (victim, way) = (parts.next().ok_or_else(wrong)?, parts.next().ok_or_else(wrong)?);
        let (boundary, times) = place.split_once('@').ok_or_else(wrong)?;
        let ways = [None, Some(Cut::Lose), Some(Cut::Keep), Some(Cut::Tear)];
        Ok(Self {
            boundary: boundary.parse().map_err(|error| format!("{error}"))?,
            times: times.parse().map_err(|_| wrong())?,
            host: HOSTS.iter().position(|name| *name == host).ok_or_else(wrong)?,
            victim: Victim::ALL.into_iter().find(|v| v.name() == victim).ok_or_else(wrong)?,
            power: ways.into_iter().find(|power| way_name(*power) == way).ok_or_else(wrong)?,
        })
    }
}

/// What a run knows of boundaries.
#[derive(Debug, Default)]
pub struct Traps {
    /// The one crash of this run.
    pub set: Option<Trap>,
    /// It happened.
    pub fired: bool,
    /// Counting began: the pair is active.
    pub armed: bool,
    /// How often each server stood where.
    pub passed: BTreeMap<(Boundary, Host), u64>,
    /// A record's flush after which the crash comes, instead of the record where that server dies.
    flushing: Option<(Host, usize, DiskOpId)>,
}

impl World {
    /// A server stands at this boundary. True if its process is gone.
    pub fn stands_at(&mut self, host: Host, boundary: Option<Boundary>) -> bool {
        let Some(boundary) = boundary.filter(|_| self.traps.armed) else { return false };
        let times = self.traps.passed.entry((boundary, host)).or_default();
        *times += 1;
        let times = *times;
        let here = |trap: &Trap| (trap.boundary, trap.host, trap.times) == (boundary, host, times);
        match self.traps.set.filter(here) {
            Some(trap) => self.spring(trap),
            None => false,
        }
    }

    /// A disk operation begins: its record's flush may have to be the whole of it.
    pub fn begins_at(&mut self, host: Host, volume: usize, op: &mut DiskOp) {
        let Some(process) = &self.machines[host].process else { return };
        let place = process.volumes[volume].machine.boundary_before_disk(op);
        let Some(between) = place.and_then(Boundary::between_flush_and_write) else { return };
        if !self.traps.armed {
            return;
        }
        let times = self.traps.passed.entry((between, host)).or_default();
        *times += 1;
        let reached = (between, host, *times);
        let set = self.traps.set.filter(|trap| (trap.boundary, trap.host, trap.times) == reached);
        if let Some(trap) = set {
            // Who goes on living writes its record all the same.
            if trap.victim != Victim::Peer {
                op.kind = DiskOpKind::Flush;
            }
            self.traps.flushing = Some((host, volume, op.id));
        }
    }

    /// A disk operation ended. True if its process is gone.
    pub fn ends_at(&mut self, host: Host, volume: usize, id: DiskOpId) -> bool {
        match self.traps.set {
            Some(trap) if self.traps.flushing == Some((host, volume, id)) => self.spring(trap),
            Some(_) | None => false,
        }
    }

    fn spring(&mut self, trap: Trap) -> bool {
        self.traps.flushing = None;
        self.traps.fired = true;
        self.trace.step(self.now, [9, trap.host as u64, trap.times], || format!("CRASH at {trap}"));
        if trap.victim != Victim::Own {
            self.kill(1 - trap.host, trap.power);
        }
        if trap.victim != Victim::Peer {
            self.kill(trap.host, trap.power);
        }
        self.machines[trap.host].process.is_none()
    }
}
