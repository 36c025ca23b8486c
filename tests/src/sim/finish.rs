//! A whole run: set-up, trouble, healing, and the proof that the pair came back.

use std::collections::BTreeMap;

use duplex_core::boundary::Boundary;
use duplex_core::message::LiveState;
use duplex_core::mirror::api::Pace;
use duplex_core::pair::api::Operator;

use super::cover::Cover;
use super::mutant::Mutant;
use super::oracle::Host;
use super::trap::Trap;
use super::world::{Event, MS, World};

/// Activation takes no longer than this.
const ACTIVATION_NS: u64 = 30_000 * MS;
/// Healing takes no longer than this.
const HEALING_NS: u64 = 240_000 * MS;
/// Between two looks while healing.
const LOOK_NS: u64 = 250 * MS;

/// What became of a run.
#[derive(Debug)]
pub struct Outcome {
    /// The seed.
    pub seed: u64,
    /// Hash of every input and action in order.
    pub hash: u64,
    /// The promise that was broken.
    pub broken: Option<String>,
    /// What was reached.
    pub cover: Cover,
    /// Things recorded.
    pub steps: u64,
    /// Virtual time it took.
    pub virtual_ns: u64,
    /// Reads, writes, flushes compared.
    pub requests: [u64; 3],
    /// How often each server stood at which boundary.
    pub passed: BTreeMap<(Boundary, Host), u64>,
    /// The crash that was asked for happened.
    pub fired: bool,
    /// The last lines, when text was asked for.
    pub tail: Vec<String>,
}

/// How a run is looked at.
#[derive(Clone, Copy, Debug, Default)]
pub struct Look {
    /// Keep so many lines of text.
    pub lines: Option<usize>,
    /// Write the history of this block (volume, block) to stderr.
    pub watch: Option<(usize, u64)>,
    /// Crash here.
    pub crash: Option<Trap>,
}

/// Runs one seed to its end.
pub fn run(seed: u64, mutant: Option<Mutant>, look: Look) -> Outcome {
    let mut world = World::new(seed, mutant, look.lines.is_some());
    world.trace.keep(look.lines.unwrap_or(0));
    world.oracle.watch = look.watch;
    world.traps.set = look.crash;
    world.activate();
    world.traps.armed = true;
    if world.broken.is_none() {
        world.trouble();
    }
    if world.broken.is_none() {
        world.recover();
    }
    Outcome {
        seed,
        hash: world.trace.hash(),
        broken: world.broken.clone(),
        steps: world.trace.steps,
        virtual_ns: world.now,
        requests: [world.oracle.reads, world.oracle.writes, world.oracle.flushes],
        tail: world.trace.tail(),
        cover: world.cover,
        passed: world.traps.passed,
        fired: world.traps.fired,
    }
}

impl World {
    /// Two blank servers become a pair.
    fn activate(&mut self) {
        for host in 0..2 {
            let at = self.rng.below(300 * MS);
            self.plan(at, Event::Start(host));
        }
        self.plan(0, Event::Connect);
        let host = self.rng.index(2);
        for volume in 0..self.profile.volumes.len() {
            self.litter(1 - host, volume);
        }
        while self.broken.is_none() && self.now < ACTIVATION_NS {
            self.run_until(self.now + LOOK_NS);
            let Some(token) = self.operate(host, Operator::Activate) else { continue };
            self.run_until(self.now + 500 * MS);
            if self.answers.get(&token).is_some_and(Result::is_ok) {
                return;
            }
        }
        if self.broken.is_none() {
            let answers = format!("{:?}", self.answers.values().last());
            self.fail(format!("liveness: the pair cannot be activated: {answers}"));
        }
    }

    fn trouble(&mut self) {
        for volume in 0..self.profile.volumes.len() {
            self.plan(self.now, Event::Client(volume));
        }
        // Often the first copy ends before the trouble begins, sometimes it does not.
        let calm = self.rng.weighted(&[(1, 0), (2, 1500), (2, 4000)]).unwrap_or(0);
        self.plan(self.now + calm * MS, Event::Script);
        let end = self.now + calm * MS + self.profile.chaos_ns;
        self.run_until(end);
    }

    /// Everything is healed; the operator helps if nobody serves. Then both copies must be equal.
    fn recover(&mut self) {
        self.script.over = true;
        // A pause typed on one server may not have reached the other: both are told to go on.
        self.script.paused = true;
        self.link.passes = [false; 2];
        self.heal(0);
        self.heal(1);
        for disk in self.machines.iter_mut().flat_map(|machine| &mut machine.disks) {
            disk.faults.clear();
        }
        let end = self.now + HEALING_NS;
        let busy_until = self.now + 2000 * MS;
        let mut idle = 0;
        let mut lonely = 0;
        let mut turn = self.rng.index(2);
        while self.broken.is_none() && self.now < end {
            self.run_until(self.now + LOOK_NS);
            self.clients.quiet = self.now >= busy_until;
            self.mend();
            if self.is_settled() {
                idle += 1;
                if idle > 12 {
                    return self.check_equal();
                }
                continue;
            }
            idle = 0;
            lonely = if self.somebody_serves() { 0 } else { lonely + 1 };
            if lonely > 12 && lonely % 4 == 0 {
                turn = 1 - turn;
                self.operate(turn, Operator::Promote);
            }
        }
        if self.broken.is_none() {
            let why = format!("liveness: healed, but not mirrored: {}", self.describe());
            self.fail(why);
        }
    }

    /// Starts what is down, replaces what is broken, takes back what the operator stopped.
    fn mend(&mut self) {
        for host in 0..2 {
            if self.machines[host].process.is_none() && !self.machines[host].restart_planned {
                self.plan(self.now, Event::Start(host));
            }
        }
        if self.script.paused && self.rng.chance(300) {
            let told = (0..2).filter(|host| self.operate(*host, Operator::Resync(Pace::Resume)).is_some());
            self.script.paused = told.count() < 2;
        }
        for host in 0..2 {
            if (self.script.failed[host] || self.is_mixed(host)) && self.other_is_whole(host) {
                self.replace_disks(host);
            }
        }
    }

    /// The other server's copies are whole (they were in step when the disk died): this is not the last copy.
    fn other_is_whole(&self, host: Host) -> bool {
        let process = self.machines[1 - host].process.as_ref();
        let whole = Some(duplex_core::format::record::CopyState::UpToDate);
        process.is_some_and(|process| process.volumes.iter().all(|t| t.machine.copy_state() == whole))
    }

    /// A replaced disk here, and on another volume the proven copy here: the servers refuse each other.
    fn is_mixed(&self, host: Host) -> bool {
        let blank = Some(duplex_core::format::record::CopyState::Blank);
        self.machines[host].process.as_ref().is_some_and(|process| {
            process.server.reason().contains("mixed-sources")
                && process.volumes.iter().any(|t| t.machine.copy_state() == blank)
        })
    }

    /// A dead disk makes place for a new one. A server whose disk died in the middle of going alone has the new
    /// generation on its other volumes only; nothing was served in it, but the servers refuse each other
    /// (`mixed-sources`). The operator then gives up all of its copies: the peer's are whole. The same after both lost
    /// power, when the new disk's server holds the only proven copy of another volume.
    fn replace_disks(&mut self, host: Host) {
        let half_alone = self.machines[host].process.as_ref().is_some_and(|process| {
            process.volumes.iter().any(|t| t.machine.server_record().is_some_and(|r| r.era.is_solo()))
        });
        let mixed = self.is_mixed(host);
        self.end(host, None);
        for volume in 0..self.profile.volumes.len() {
            if self.machines[host].disks[volume].dead || half_alone || mixed {
                self.format(host, volume);
                self.litter(host, volume);
                self.oracle.disk_lost(host, volume);
            }
        }
        self.script.failed[host] = false;
        self.plan(self.now + 100 * MS, Event::Start(host));
    }

    /// Mirrored, nothing under way, nothing marked.
    fn is_settled(&self) -> bool {
        let clean = self.machines.iter().all(|machine| {
            machine.process.as_ref().is_some_and(|process| {
                process.volumes.iter().all(|t| t.machine.dirty_blocks() == 0 && t.requests.is_empty())
            })
        });
        self.is_mirrored() && clean && self.link.is_quiet()
    }

    /// Both servers in a line.
    pub fn describe(&self) -> String {
        let one = |host: Host| {
            let machine = &self.machines[host];
            let Some(process) = &machine.process else { return format!("{} is down", machine.name) };
            let volumes = process.volumes.iter().map(|t| {
                let state = t.machine.copy_state().map_or("unread", |state| state.word());
                format!("{state} {} marked {} asked", t.machine.dirty_blocks(), t.requests.len())
            });
            let volumes = volumes.collect::<Vec<_>>().join("; ");
            let (live, reason) = (process.server.live(), process.server.reason());
            let stopped = if live == LiveState::Stopping { " (stopping)" } else { "" };
            format!("{} {live:?}{stopped} [{volumes}] because {reason}", machine.name)
        };
        format!("{} | {}", one(0), one(1))
    }
}
