//! Both servers, the link and the clients in one thread of virtual time.

use std::collections::BTreeMap;
use std::time::Duration;

use duplex_core::ids::{BootId, Incarnation, ServerName, SessionId, VolumeIndex};
use duplex_core::limits::{COPY_CHUNK_BYTES, COPY_CHUNKS_MAX};
use duplex_core::message::{Hello, LiveState};
use duplex_core::mirror::api::{Exposure, Input as VolumeInput};
use duplex_core::mirror::{Volume, VolumeConfig};
use duplex_core::pair::Server;
use duplex_core::pair::api::{Input as ServerInput, Operator, OperatorToken, ServerConfig};
use duplex_core::time::Instant;

use super::client::Clients;
use super::cover::Cover;
use super::disk::{Cut, Disk};
use super::host::{Clock, Inbox, Machine, Process, VolumeThread};
use super::link::{Link, Parcel};
use super::mutant::Mutant;
use super::oracle::{Host, Oracle};
use super::page::{Buffers, PAGE_BYTES};
use super::profile::Profile;
use super::rng::Rng;
use super::script::Script;
use super::trace::Trace;

/// Nanoseconds of a millisecond.
pub const MS: u64 = 1_000_000;

/// What stands on a used disk; no client ever writes it.
const LITTER: u64 = u64::MAX - 1;

/// Which life of which machine's daemon an event is for; later ones drop it.
#[derive(Clone, Copy, Debug)]
pub struct Life {
    /// The machine.
    pub host: Host,
    /// Its daemon's number.
    pub life: u64,
}

/// Something that will happen.
#[derive(Debug)]
pub enum Event {
    /// This reaches a daemon.
    Input(Life, Inbox),
    /// Something arrives from a host on a channel.
    Arrive(Host, usize),
    /// Time for a process.
    Wake(Life),
    /// A stopped process goes on.
    Continue(Life),
    /// The link tries to get a session.
    Connect,
    /// A client of this volume acts.
    Client(usize),
    /// The script acts.
    Script,
    /// A daemon is started.
    Start(Host),
    /// The operator, who changed a disk a moment ago, changes his mind.
    SwapAgain(Host),
    /// The direction from a host passes again, unless a newer cut than this one holds.
    Heal(Host, u64),
}

/// Everything.
#[derive(Debug)]
pub struct World {
    /// Virtual time.
    pub now: u64,
    queue: BTreeMap<(u64, u64), Event>,
    order: u64,
    /// All chance.
    pub rng: Rng,
    /// What this run is like.
    pub profile: Profile,
    /// Two machines.
    pub machines: [Machine; 2],
    /// Between them.
    pub link: Link,
    /// What clients may see.
    pub oracle: Oracle,
    /// What was reached.
    pub cover: Cover,
    /// What happened.
    pub trace: Trace,
    /// A deliberate bug.
    pub mutant: Option<Mutant>,
    /// Clients.
    pub clients: Clients,
    /// Faults and commands.
    pub script: Script,
    /// The promise that was broken, once one was.
    pub broken: Option<String>,
    /// Answers of the operator's commands.
    pub answers: BTreeMap<OperatorToken, Result<String, String>>,
    next_token: u64,
    next_disk: u64,
    /// Copy payload sent in the current session, and the blocks marked when it began.
    pub resync: super::check::ResyncBudget,
    /// What had completed on each volume when its solo right began to be given back.
    pub returning: BTreeMap<usize, Vec<(u64, super::oracle::Ticket)>>,
    /// The newest hellos of the current session.
    pub hellos: [Option<Hello>; 2],
    /// A crash at a chosen boundary.
    pub traps: super::trap::Traps,
    /// Cuts of a direction, so that an older heal does not end a newer cut.
    pub cuts: [u64; 2],
}

/// Most steps of one run: fifty times as many as a long one takes.
const STEPS_MAX: u64 = 5_000_000;

impl World {
    /// Two servers with fresh metadata, not started.
    pub fn new(seed: u64, mutant: Option<Mutant>, text: bool) -> Self {
        let mut rng = Rng::new(seed);
        let profile = Profile::draw(&mut rng);
        let machine = |host: usize, rng: &mut Rng| Machine {
            name: ServerName(["alpha", "beta"][host].to_owned()),
            boot_id: BootId(rng.wide()),
            clock: Clock::new(rng.between(1, 1 << 40), 0, profile.rates[host]),
            disks: (0..profile.volumes.len()).map(|_| Disk::default()).collect(),
            shelf: (0..profile.volumes.len()).map(|_| None).collect(),
            process: None,
            life: 0,
            restart_planned: false,
            ended_as: LiveState::Loading,
        };
        let machines = [machine(0, &mut rng), machine(1, &mut rng)];
        let volumes = profile.volumes.len();
        let mut world = Self {
            now: 0,
            queue: BTreeMap::new(),
            order: 0,
            machines,
            link: Link::new(volumes, profile.delay),
            oracle: Oracle::default(),
            cover: Cover::default(),
            trace: Trace::new(text),
            mutant,
            clients: Clients::new(&profile, &mut rng),
            script: Script::default(),
            broken: None,
            answers: BTreeMap::new(),
            next_token: 0,
            next_disk: 0,
            resync: super::check::ResyncBudget::default(),
            returning: BTreeMap::new(),
            hellos: [None, None],
            traps: super::trap::Traps::default(),
            cuts: [0; 2],
            profile,
            rng,
        };
        for host in 0..2 {
            for volume in 0..volumes {
                world.format(host, volume);
            }
        }
        world
    }

    /// What `create` does: a fresh blank copy.
    pub fn format(&mut self, host: Host, volume: usize) {
        let boot_id = self.machines[host].boot_id;
        let instance = self.rng.wide();
        let disk = &mut self.machines[host].disks[volume];
        *disk = Disk::default();
        self.next_disk += 1;
        disk.number = self.next_disk;
        disk.stale_holes = self.mutant == Some(Mutant::StaleHole);
        for (offset_bytes, bytes) in
            super::create::blank(self.profile.volumes[volume].size_bytes, boot_id, instance)
        {
            disk.format(offset_bytes, &bytes);
        }
    }

    /// The disk of a copy that will be a target held something before: the first copy must not leave it there.
    pub fn litter(&mut self, host: Host, volume: usize) {
        let pages = self.profile.volumes[volume].size_bytes / PAGE_BYTES as u64;
        for _ in 0..self.rng.below(24) {
            let first = self.rng.below(pages);
            for at in (first..pages).take(self.rng.index(40)) {
                self.machines[host].disks[volume].litter(at, super::page::stamped(LITTER));
            }
        }
    }

    /// Plans an event.
    pub fn plan(&mut self, at: u64, event: Event) {
        self.order += 1;
        self.queue.insert((at.max(self.now), self.order), event);
    }

    /// Runs until `end`, or until a promise is broken.
    pub fn run_until(&mut self, end: u64) {
        while self.broken.is_none() {
            let Some(((at, _), _)) = self.queue.first_key_value() else { break };
            if *at > end {
                break;
            }
            let Some(((at, _), event)) = self.queue.pop_first() else { break };
            self.now = at;
            self.happen(event);
            if self.trace.steps > STEPS_MAX {
                self.fail(format!("the machines do not come to rest: {STEPS_MAX} steps"));
            }
        }
        self.now = self.now.max(end);
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Input(to, input) => self.input(to.host, to.life, input),
            Event::Arrive(from, channel) => self.arrive(from, channel),
            Event::Wake(to) => self.wake(to.host, to.life),
            Event::Continue(to) => self.go_on(to.host, to.life),
            Event::Connect => self.connect(),
            Event::Client(volume) => self.client_acts(volume),
            Event::Script => self.script_acts(),
            Event::Start(host) => self.start(host),
            Event::SwapAgain(host) => self.swap_disk(host),
            Event::Heal(from, ticket) => {
                if self.cuts[from] == ticket {
                    self.heal(from);
                }
            }
        }
    }

    /// A promise is broken.
    pub fn fail(&mut self, why: impl Into<String>) {
        let why = why.into();
        self.trace.step(self.now, [99, 0, 0], || format!("BROKEN {why}"));
        self.broken.get_or_insert(why);
    }

    /// What a machine's clock shows.
    pub fn clock(&self, host: Host) -> Instant {
        self.machines[host].clock.at(self.now)
    }

    /// Starts the daemon of a machine, if it is not running.
    pub fn start(&mut self, host: Host) {
        self.machines[host].restart_planned = false;
        if self.machines[host].process.is_some() {
            return;
        }
        let incarnation = Incarnation(self.rng.wide());
        let machine = &self.machines[host];
        let config = ServerConfig {
            name: machine.name.clone(),
            peer: self.machines[1 - host].name.clone(),
            pair_name: "shop".to_owned(),
            incarnation,
            boot_id: machine.boot_id,
            volumes: self.profile.volumes.iter().map(|volume| volume.name.clone()).collect(),
            config: BTreeMap::new(),
            heartbeat: Duration::from_millis(100),
            freeze: Duration::from_millis(600),
            silent: Duration::from_millis(800),
            id_seed: self.rng.wide(),
        };
        let volumes = (0..self.profile.volumes.len()).map(|at| self.thread(host, at)).collect();
        let now = self.now;
        let machine = &mut self.machines[host];
        machine.life += 1;
        machine.process = Some(Process {
            incarnation,
            server: Server::new(config),
            volumes,
            stopped_until: 0,
            inbox: std::collections::VecDeque::new(),
            session: None,
            wake_at: u64::MAX,
            live: LiveState::Loading,
            spins: (0, 0),
        });
        self.cover.hit("state Loading");
        self.trace.step(now, [1, host as u64, 0], || format!("{host} starts"));
        for volume in 0..self.profile.volumes.len() {
            self.volume_actions(host, volume);
        }
        self.server_actions(host);
        self.schedule(host);
    }

    fn thread(&self, host: Host, volume: usize) -> VolumeThread {
        let mut buffers = Buffers::default();
        let pages = usize::try_from(COPY_CHUNK_BYTES).unwrap_or(0) / PAGE_BYTES;
        let copy_buffers = (0..COPY_CHUNKS_MAX).map(|_| buffers.put(vec![None; pages])).collect();
        let machine = Volume::new(VolumeConfig {
            boot_id: self.machines[host].boot_id,
            copy_buffers,
            stall: Duration::from_secs(10),
            capacity_bytes: self.profile.volumes[volume].size_bytes,
        });
        VolumeThread {
            machine,
            buffers,
            disk: BTreeMap::new(),
            exposure: Exposure::Refusing,
            serving: None,
            requests: BTreeMap::new(),
            order_due: 0,
            report_due: 0,
        }
    }

    /// Ends the daemon: `power` takes the machine down with it.
    pub fn end(&mut self, host: Host, power: Option<Cut>) {
        let now = self.now;
        self.trace.step(now, [2, host as u64, power.map_or(0, |cut| cut as u64 + 1)], || match power {
            Some(cut) => format!("{host} loses power ({cut:?})"),
            None => format!("{host} is killed"),
        });
        let machine = &mut self.machines[host];
        let process = machine.process.take();
        if let Some(process) = &process {
            machine.ended_as = process.server.live();
        }
        let mut pending: Vec<Vec<_>> = Vec::new();
        if let Some(process) = process {
            for thread in process.volumes {
                for asked in thread.requests.values() {
                    self.oracle.abandon(asked.ticket);
                }
                pending.push(thread.disk.into_values().collect());
            }
        }
        pending.resize_with(self.profile.volumes.len(), Vec::new);
        for (disk, pending) in machine.disks.iter_mut().zip(pending) {
            match power {
                Some(cut) => disk.power_cut(pending, cut, &mut self.rng),
                None => disk.kill(pending, &mut self.rng),
            }
        }
        if power.is_some() {
            let rate = self.profile.rates[host];
            machine.clock = Clock::new(self.rng.between(1, 1 << 40), now, rate);
            if self.mutant != Some(Mutant::SameBootId) {
                machine.boot_id = BootId(self.rng.wide());
            }
            self.oracle.power_cut(host);
        }
        self.leave_session(host, power.is_none(), "the process ended");
    }

    /// One end of the session is gone; `tell`: the kernel says so to the other one.
    pub fn leave_session(&mut self, host: Host, tell: bool, why: &str) {
        let Some(session) = &mut self.link.session else { return };
        if !session.open[host] {
            return;
        }
        session.open[host] = false;
        let id = session.id;
        self.link.drop_from(host, &mut self.rng);
        if tell {
            let parcel = Parcel::Closed(why.to_owned());
            if let Some(due) = self.link.send(self.now, host, id, 0, parcel, &mut self.rng) {
                self.plan(due, Event::Arrive(host, 0));
            }
        }
        self.link.retry_at = self.link.retry_at.max(self.now + 100 * MS);
    }

    fn connect(&mut self) {
        let pause = self.rng.between(40, 160) * MS;
        self.plan(self.now + pause, Event::Connect);
        let up = self.link.passes == [true; 2] && self.now >= self.link.retry_at;
        let awake = |machine: &Machine| {
            machine.process.as_ref().is_some_and(|process| process.stopped_until <= self.now)
        };
        if !up || !self.machines.iter().all(awake) {
            return;
        }
        if self.link.session.as_ref().is_some_and(|session| session.open == [true; 2]) {
            return;
        }
        // A side that still believes in the old session learns of its end by the new connection.
        if let Some(old) = self.link.session.take() {
            for host in 0..2 {
                if old.open[host] {
                    self.cover.hit("G8 new incarnation");
                    let life = self.machines[host].life;
                    self.input(host, life, Inbox::Down(old.id, "the peer connected anew".to_owned()));
                }
            }
        }
        self.hellos = [None, None];
        let id = SessionId(self.rng.wide());
        self.link.open(id);
        self.trace.step(self.now, [3, 0, 0], || format!("session {:x}", id.0 >> 100));
        let first = self.rng.index(2);
        for host in [first, 1 - first] {
            let Some(peer) = self.machines[1 - host].process.as_ref().map(|p| p.incarnation) else {
                continue;
            };
            let life = self.machines[host].life;
            self.input(host, life, Inbox::Up(id, peer));
        }
    }

    /// Cuts a direction until `until`.
    pub fn cut(&mut self, from: Host, until: u64) {
        self.link.passes[from] = false;
        self.cuts[from] += 1;
        let ticket = self.cuts[from];
        self.trace.step(self.now, [4, from as u64, until], || format!("the link from {from} is cut"));
        self.plan(until, Event::Heal(from, ticket));
    }

    /// A direction passes again.
    pub fn heal(&mut self, from: Host) {
        if self.link.passes[from] {
            return;
        }
        self.link.passes[from] = true;
        self.trace.step(self.now, [5, from as u64, 0], || format!("the link from {from} passes again"));
        for channel in 0..self.link.channels() {
            if let Some(due) = self.link.next_due(from, channel) {
                let due = due.max(self.now + self.rng.below(2 * MS));
                self.plan(due, Event::Arrive(from, channel));
            }
        }
    }

    /// Stops a process for a while (SIGSTOP): what its kernel does goes on.
    pub fn pause(&mut self, host: Host, until: u64) {
        let life = self.machines[host].life;
        if let Some(process) = &mut self.machines[host].process {
            process.stopped_until = process.stopped_until.max(until);
            self.trace.step(self.now, [6, host as u64, until], || format!("{host} is stopped for a while"));
            self.plan(until, Event::Continue(Life { host, life }));
        }
    }

    fn go_on(&mut self, host: Host, life: u64) {
        let now = self.now;
        let Some(process) = self.machines[host].running(life) else { return };
        if process.stopped_until > now {
            return;
        }
        process.stopped_until = 0;
        let inbox = std::mem::take(&mut process.inbox);
        for waiting in inbox {
            self.input(host, life, waiting);
        }
        if let Some(process) = self.machines[host].running(life) {
            process.wake_at = u64::MAX;
        }
        self.schedule(host);
    }

    /// Time passed for a process.
    fn wake(&mut self, host: Host, life: u64) {
        let (now, shown) = (self.now, self.clock(host));
        let Some(process) = self.machines[host].running(life) else { return };
        if process.stopped_until > now || process.wake_at > now {
            return;
        }
        process.wake_at = u64::MAX;
        process.spins = if process.spins.0 == now { (now, process.spins.1 + 1) } else { (now, 0) };
        if process.spins.1 > 100 {
            let of_server = process.server.next_deadline();
            let of_volumes: Vec<_> = process.volumes.iter().map(|t| t.machine.next_deadline()).collect();
            return self.fail(format!(
                "server {host} spins at {shown:?}: deadlines {of_server:?} of the server, {of_volumes:?} of its volumes"
            ));
        }
        let late = |deadline: Option<Instant>| deadline.is_some_and(|at| at <= shown);
        let server = late(process.server.next_deadline());
        let volumes: Vec<bool> =
            process.volumes.iter().map(|thread| late(thread.machine.next_deadline())).collect();
        if server {
            self.server_input(host, ServerInput::Time);
        }
        for (volume, late) in volumes.into_iter().enumerate() {
            if late {
                self.volume_input(host, volume, VolumeInput::Time);
            }
        }
        self.schedule(host);
    }

    /// Plans the next time input of a process.
    pub fn schedule(&mut self, host: Host) {
        let now = self.now;
        let machine = &mut self.machines[host];
        let life = machine.life;
        let Some(process) = &mut machine.process else { return };
        let volumes = process.volumes.iter().filter_map(|thread| thread.machine.next_deadline());
        let next = volumes.chain(process.server.next_deadline()).min();
        let Some(at) = next.and_then(|at| machine.clock.when(at)) else { return };
        let at = at.max(now);
        if at < process.wake_at {
            process.wake_at = at;
            self.plan(at, Event::Wake(Life { host, life }));
        }
    }

    /// The operator types a command; the answer comes later.
    pub fn operate(&mut self, host: Host, command: Operator) -> Option<OperatorToken> {
        let process = self.machines[host].process.as_ref()?;
        if process.stopped_until > self.now {
            return None;
        }
        self.next_token += 1;
        let token = OperatorToken(self.next_token);
        self.trace.step(self.now, [7, host as u64, token.0], || format!("{host} operator: {command:?}"));
        self.server_input(host, ServerInput::Operator(token, command));
        self.schedule(host);
        Some(token)
    }

    /// Where a volume's index stands.
    pub fn index(volume: usize) -> VolumeIndex {
        VolumeIndex(u16::try_from(volume).unwrap_or(u16::MAX))
    }
}
