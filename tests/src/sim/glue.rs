//! The shell around the machines: inputs in, actions out. Deliberate bugs live here.

use duplex_core::ids::{BufferId, RequestId, SessionId};
use duplex_core::message::{ControlMessage, RemoteOutcome, VolumeMessage};
use duplex_core::mirror::api::{
    Action as VolumeAction, CopyChange, Exposure, Input as VolumeInput, Order, Part, Report, ServeMode,
};
use duplex_core::pair::Server;
use duplex_core::pair::api::{Action as ServerAction, Input as ServerInput};
use duplex_core::request::{DiskOp, DiskOpKind, DiskOutcome, RequestError};
use duplex_core::time::Instant;

use super::host::{Inbox, outcome_numbers};
use super::link::Parcel;
use super::mutant::Mutant;
use super::oracle::Host;
use super::page::{self, PAGE_BYTES, Page};
use super::wire;
use super::world::{Event, Life, MS, World};

impl World {
    /// Gives an input to a process of this life, or keeps it while the process is stopped.
    pub fn input(&mut self, host: Host, life: u64, input: Inbox) {
        let now = self.now;
        let Some(process) = self.machines[host].running(life) else { return };
        if process.stopped_until > now {
            process.inbox.push_back(input);
            return;
        }
        match input {
            Inbox::Disk(volume, id) => self.disk_done(host, volume, id),
            Inbox::Volume(volume, session, message, pages) => {
                self.volume_message(host, volume, session, message, pages);
            }
            Inbox::Control(session, message) => {
                self.server_input(host, ServerInput::Message(session, *message));
            }
            Inbox::Order(volume, order) => self.give_order(host, volume, *order),
            Inbox::Report(volume, report) => {
                let index = Self::index(volume);
                self.server_input(host, ServerInput::Report(index, *report));
            }
            Inbox::Request(volume, request) => self.volume_input(host, volume, VolumeInput::Request(request)),
            Inbox::Up(session, peer_incarnation) => {
                if self.link.session.as_ref().is_some_and(|s| s.id == session) {
                    process.session = Some(session);
                    self.server_input(host, ServerInput::LinkUp { session, peer_incarnation });
                }
            }
            Inbox::Down(session, reason) => {
                if process.session == Some(session) {
                    process.session = None;
                    self.server_input(host, ServerInput::LinkDown { session, reason });
                }
            }
            Inbox::Saved => self.server_input(host, ServerInput::Saved(Ok(()))),
        }
        self.schedule(host);
    }

    /// One input of the server machine, and everything it asks for.
    pub fn server_input(&mut self, host: Host, input: ServerInput) {
        let shown = self.clock(host);
        if self.machines[host].process.is_none() {
            return;
        }
        if self.trace.is_text() && !matches!(input, ServerInput::Time) {
            let line = format!("{host} server <- {input:?}");
            if !line.contains("Heartbeat") {
                self.trace.step(self.now, [10, host as u64, 0], || line);
            }
        } else if !matches!(input, ServerInput::Time) {
            let quiet = matches!(&input, ServerInput::Message(_, ControlMessage::Heartbeat { .. }));
            if !quiet {
                self.trace.step(self.now, [10, host as u64, 0], String::new);
            }
        }
        if self.stands_at(host, Server::boundary_at(&input)) {
            return;
        }
        let Some(process) = &mut self.machines[host].process else { return };
        process.server.handle(shown, input);
        self.server_actions(host);
        self.lease(host);
    }

    /// The volumes see the lease at once: it is one word of shared memory.
    fn lease(&mut self, host: Host) {
        let shown = self.clock(host);
        let ignore = self.mutant == Some(Mutant::IgnoreLease);
        let Some(process) = &mut self.machines[host].process else { return };
        let until = if ignore { Instant::NEVER } else { process.server.lease_until() };
        for thread in &mut process.volumes {
            thread.machine.set_lease(shown, until);
        }
        for volume in 0..self.profile.volumes.len() {
            self.volume_actions(host, volume);
        }
    }

    /// Carries out what the server machine asked for.
    pub fn server_actions(&mut self, host: Host) {
        loop {
            let Some(process) = &mut self.machines[host].process else { return };
            let Some(action) = process.server.poll_action() else { break };
            if self.stands_at(host, Server::boundary_before(&action)) {
                return;
            }
            let Some(process) = &mut self.machines[host].process else { return };
            let life = self.machines[host].life;
            match action {
                ServerAction::Order(index, order) => {
                    let volume = usize::from(index.0);
                    self.cover_order(&order);
                    let due = self.hop(host, volume, true);
                    self.plan(due, Event::Input(Life { host, life }, Inbox::Order(volume, Box::new(order))));
                }
                ServerAction::Send(session, message) => self.send_control(host, session, &message),
                ServerAction::CloseSession(session) => {
                    if process.session == Some(session) {
                        process.session = None;
                        self.trace
                            .step(self.now, [11, host as u64, 0], || format!("{host} closes the session"));
                        self.leave_session(host, true, "closed by the peer");
                    }
                }
                ServerAction::Answer(token, result) => {
                    self.trace
                        .step(self.now, [12, host as u64, token.0], || format!("{host} answers {result:?}"));
                    self.answers.insert(token, result.map_err(|refusal| refusal.code.to_owned()));
                }
                ServerAction::Event(event) => self.on_event(host, &event),
                ServerAction::SaveBlocks => {
                    let due = self.now + self.rng.between(1, 20) * MS;
                    self.plan(due, Event::Input(Life { host, life }, Inbox::Saved));
                }
                ServerAction::Exit => {
                    self.end(host, None);
                    let due = self.now + self.rng.between(100, 3000) * MS;
                    self.machines[host].restart_planned = true;
                    self.plan(due, Event::Start(host));
                    return;
                }
            }
        }
        self.note_live(host);
    }

    /// When an order or a report arrives at the other thread.
    fn hop(&mut self, host: Host, volume: usize, order: bool) -> u64 {
        let delay = self.rng.below(self.profile.hop_ns + 1);
        let due = self.now + delay;
        let Some(process) = &mut self.machines[host].process else { return due };
        let Some(thread) = process.volumes.get_mut(volume) else { return due };
        let last = if order { &mut thread.order_due } else { &mut thread.report_due };
        *last = due.max(*last + 1);
        *last
    }

    fn give_order(&mut self, host: Host, volume: usize, order: Order) {
        if let Some(process) = &mut self.machines[host].process
            && let Some(thread) = process.volumes.get_mut(volume)
        {
            match &order {
                Order::Serve { mode, epoch } => thread.serving = Some((*mode, *epoch)),
                Order::Return { .. } => {
                    self.returning.insert(volume, self.oracle.unstable(volume));
                    thread.serving = thread.serving.map(|(_, epoch)| (ServeMode::Alone, epoch));
                }
                Order::Close
                | Order::Drain { .. }
                | Order::Freeze { .. }
                | Order::Leave
                | Order::Host { .. }
                | Order::Fail { .. }
                | Order::Record { .. }
                | Order::Join { .. }
                | Order::Pace(_)
                | Order::TellMarks { .. } => {}
            }
        }
        if let Order::Join { part: Part::Source(plan), resume, .. } = &order {
            self.resync_begins(host, volume, *plan, *resume);
        }
        self.volume_input(host, volume, VolumeInput::Order(order));
    }

    /// One input of a volume, and everything it asks for.
    pub fn volume_input(&mut self, host: Host, volume: usize, input: VolumeInput) {
        let shown = self.clock(host);
        if self.machines[host].process.is_none() {
            return;
        }
        if !matches!(input, VolumeInput::Time) {
            let line = self.trace.is_text().then(|| format!("{host}.{volume} <- {input:?}"));
            self.trace.step(self.now, [20, host as u64, volume as u64], || line.unwrap_or_default());
        }
        if let VolumeInput::Disk(id, _) = &input
            && self.ends_at(host, volume, *id)
        {
            return;
        }
        let Some(process) = &self.machines[host].process else { return };
        let place = process.volumes[volume].machine.boundary_at(&input);
        if self.stands_at(host, place) {
            return;
        }
        let Some(process) = &mut self.machines[host].process else { return };
        process.volumes[volume].machine.handle(shown, input);
        self.volume_actions(host, volume);
    }

    /// Carries out what a volume asked for.
    pub fn volume_actions(&mut self, host: Host, volume: usize) {
        loop {
            let Some(process) = &mut self.machines[host].process else { return };
            let Some(action) = process.volumes[volume].machine.poll_action() else { return };
            let line = self.trace.is_text().then(|| format!("{host}.{volume} -> {action:?}"));
            self.trace.step(self.now, [21, host as u64, volume as u64], || line.unwrap_or_default());
            let Some(process) = &self.machines[host].process else { return };
            let place = process.volumes[volume].machine.boundary_before(&action);
            if self.stands_at(host, place) {
                return;
            }
            match action {
                VolumeAction::Disk(op) => self.disk_begin(host, volume, op),
                VolumeAction::Send(session, message, buffer) => {
                    self.send_volume(host, volume, session, message, buffer);
                }
                VolumeAction::Complete(id, result) => self.complete(host, volume, id, result),
                VolumeAction::Release(buffer) => {
                    self.unused(host, volume, buffer);
                    self.thread_buffers(host, volume, |buffers| buffers.release(buffer));
                }
                VolumeAction::CopyBuffer { from, into, length_bytes } => {
                    let count = usize::try_from(length_bytes).unwrap_or(0).div_ceil(PAGE_BYTES);
                    self.thread_buffers(host, volume, |buffers| {
                        let pages = buffers.pages(from, count);
                        buffers.fill(into, &pages);
                    });
                }
                VolumeAction::Report(report) => {
                    self.cover_report(host, volume, &report);
                    let life = self.machines[host].life;
                    let due = self.hop(host, volume, false);
                    self.plan(
                        due,
                        Event::Input(Life { host, life }, Inbox::Report(volume, Box::new(report))),
                    );
                }
                VolumeAction::Exposure(exposure) => {
                    if let Some(process) = &mut self.machines[host].process {
                        process.volumes[volume].exposure = exposure;
                    }
                }
            }
        }
    }

    fn thread_buffers<T>(
        &mut self,
        host: Host,
        volume: usize,
        use_them: impl FnOnce(&mut super::page::Buffers) -> T,
    ) -> Option<T> {
        let process = self.machines[host].process.as_mut()?;
        Some(use_them(&mut process.volumes[volume].buffers))
    }

    /// A buffer goes back to its owner: no operation may still write into it.
    fn unused(&mut self, host: Host, volume: usize, buffer: BufferId) {
        let Some(process) = &self.machines[host].process else { return };
        if let Some(op) = process.volumes[volume].disk.values().find(|op| op.fills(buffer)) {
            let why = format!("{host}.{volume} gives buffer {buffer:?} back while {:?} reads into it", op.id);
            self.fail(why);
        }
    }

    fn disk_begin(&mut self, host: Host, volume: usize, mut op: DiskOp) {
        self.begins_at(host, volume, &mut op);
        let skip_preflush = self.mutant == Some(Mutant::SkipSoloFlush);
        if let DiskOpKind::MetaWrite { preflush, .. } = &mut op.kind
            && skip_preflush
        {
            *preflush = false;
        }
        if self.lied_to(host, volume, &op.kind) {
            let offset_bytes = 1 << 40;
            let bytes = Vec::new();
            op.kind = DiskOpKind::MetaWrite { offset_bytes, bytes, preflush: false };
        }
        let delay = self.profile.disk_delay(&op.kind, &mut self.rng);
        let machine = &mut self.machines[host];
        let life = machine.life;
        let Some(process) = &mut machine.process else { return };
        let thread = &mut process.volumes[volume];
        let others: Vec<_> = thread.disk.values().collect();
        let id = op.id.0;
        match machine.disks[volume].begin(&op, &thread.buffers, &others) {
            Ok(pending) => {
                if thread.disk.insert(id, pending).is_some() {
                    return self.fail(format!("{host}.{volume} uses the name {id:x} for two operations"));
                }
                self.plan(self.now + delay, Event::Input(Life { host, life }, Inbox::Disk(volume, id)));
            }
            Err(why) => self.fail(format!("W1: {host}.{volume}: {why}")),
        }
    }

    /// A deliberate bug swallows this operation.
    fn lied_to(&self, host: Host, volume: usize, kind: &DiskOpKind) -> bool {
        match (self.mutant, kind) {
            (Some(Mutant::SkipOwnFlush), DiskOpKind::Flush) => true,
            (Some(Mutant::SkipSuperblock), DiskOpKind::MetaWrite { offset_bytes, .. }) => {
                let activated = self.machines[host].process.as_ref().is_some_and(|process| {
                    process.volumes[volume].machine.copy().is_some_and(|copy| !copy.generation.is_none())
                });
                activated && super::create::is_superblock(*offset_bytes)
            }
            (Some(Mutant::SkipLog), DiskOpKind::MetaWrite { offset_bytes, .. }) => {
                super::create::is_log(*offset_bytes, self.profile.volumes[volume].size_bytes)
            }
            (_, _) => false,
        }
    }

    fn disk_done(&mut self, host: Host, volume: usize, id: u64) {
        let machine = &mut self.machines[host];
        let Some(process) = &mut machine.process else { return };
        let thread = &mut process.volumes[volume];
        let Some(pending) = thread.disk.remove(&id) else { return };
        let core_id = pending.id;
        let mut finished = machine.disks[volume].finish(pending);
        if let DiskOutcome::Zeroes { length_bytes } = &mut finished.outcome
            && self.rng.chance(self.profile.blind_per_mille)
        {
            // A disk may always say less: none at all, as a block device does, or an earlier end.
            let pages = *length_bytes / PAGE_BYTES as u64;
            *length_bytes = self.rng.below(pages / 64 + 1) * 64 * self.rng.below(2) * PAGE_BYTES as u64;
        }
        if let Some((buffer, pages)) = &finished.read {
            thread.buffers.fill(*buffer, pages);
        }
        let numbers = outcome_numbers(&finished.outcome);
        self.trace
            .step(self.now, [22, id, numbers], || format!("{host}.{volume} disk {id:x} ends {numbers}"));
        self.volume_input(host, volume, VolumeInput::Disk(core_id, finished.outcome));
    }

    fn complete(&mut self, host: Host, volume: usize, id: RequestId, result: Result<(), RequestError>) {
        let Some(process) = &mut self.machines[host].process else { return };
        let thread = &mut process.volumes[volume];
        let Some(asked) = thread.requests.remove(&id) else {
            return self.fail(format!("{host}.{volume} answers {id:?}, which nobody asked"));
        };
        let serving = thread.serving;
        let mut content = Vec::new();
        if let Some(buffer) = asked.buffer {
            self.unused(host, volume, buffer);
            let pages = self.thread_buffers(host, volume, |buffers| {
                let pages = buffers.pages(buffer, asked.read_pages);
                buffers.release(buffer);
                pages
            });
            content = pages.unwrap_or_default().iter().map(page::stamp_of).collect();
        }
        if result.is_err() {
            self.oracle.abandon(asked.ticket);
            return;
        }
        let Some((mode, epoch)) = serving else {
            return self.fail(format!("{host}.{volume} completes {id:?} and was never told to serve"));
        };
        let shown = self.clock(host);
        let lease = self.machines[host].process.as_ref().map_or(shown, |p| p.server.lease_until());
        let mut holders = [true; 2];
        match mode {
            ServeMode::Alone => holders[1 - host] = false,
            ServeMode::Mirrored if shown >= lease => {
                return self.fail(format!(
                    "W4: {host}.{volume} completes {id:?} at {shown:?}, its lease was {lease:?}"
                ));
            }
            ServeMode::Mirrored => {}
            // The peer serves, by its own right; this server only passes on.
            ServeMode::Front => holders[host] = false,
        }
        let server = if mode == ServeMode::Front { 1 - host } else { host };
        if let Err(why) = self.oracle.complete(asked.ticket, server, epoch, holders, &content) {
            self.fail(format!("{why} (server {host}, {mode:?}, epoch {epoch})"));
        }
    }

    fn send_control(&mut self, host: Host, session: SessionId, message: &ControlMessage) {
        if let ControlMessage::Hello(hello) = message {
            self.on_hello(host, hello);
        }
        self.cover_control(message);
        let quiet = matches!(message, ControlMessage::Heartbeat { .. });
        if !quiet {
            self.trace.step(self.now, [15, host as u64, 0], || format!("{host} server -> {message:?}"));
        }
        let number = if quiet { 0 } else { self.link.number(host, 0) };
        match wire::control_frame(number, message) {
            Ok(frame) => self.post(host, session, 0, Parcel::Control(frame)),
            Err(why) => self.fail(format!("{host} sends what the link cannot carry: {why}")),
        }
    }

    fn send_volume(
        &mut self,
        host: Host,
        volume: usize,
        session: SessionId,
        message: VolumeMessage,
        buffer: Option<BufferId>,
    ) {
        let count = usize::try_from(message.payload_bytes()).unwrap_or(0).div_ceil(PAGE_BYTES);
        let pages: Vec<Page> = buffer
            .and_then(|buffer| self.thread_buffers(host, volume, |buffers| buffers.pages(buffer, count)))
            .unwrap_or_default();
        self.cover_message(&message);
        let mut message = message;
        if let VolumeMessage::CopyZero { .. } = &message {
            self.cover.hit("copy of a hole");
        }
        if let VolumeMessage::Copy { id, range } = &message {
            self.resync_sent(host, volume, range.length_bytes);
            // The shell sends chunks of zeroes as ranges.
            if pages.iter().all(Option::is_none) && self.profile.zero_chunks {
                message = VolumeMessage::CopyZero { id: *id, range: *range };
            }
        }
        let channel = volume + 1;
        let number = self.link.number(host, channel);
        let pages = if message.payload_bytes() == 0 { Vec::new() } else { pages };
        match wire::volume_frame(volume, number, &message, &pages) {
            Ok(frame) => self.post(host, session, channel, Parcel::Volume(frame)),
            Err(why) => self.fail(format!("{host}.{volume} sends what the link cannot carry: {why}")),
        }
    }

    fn post(&mut self, from: Host, session: SessionId, channel: usize, parcel: Parcel) {
        if let Some(due) = self.link.send(self.now, from, session, channel, parcel, &mut self.rng) {
            self.plan(due, Event::Arrive(from, channel));
        }
    }

    /// Something may have arrived from `from`.
    pub fn arrive(&mut self, from: Host, channel: usize) {
        let to = 1 - from;
        while let Some((session, parcel)) = self.link.arrived(self.now, from, channel) {
            let life = self.machines[to].life;
            let open = self.link.session.as_ref().is_some_and(|s| s.open[to]);
            if !open {
                continue;
            }
            match parcel {
                Parcel::Closed(why) => {
                    if let Some(session) = &mut self.link.session {
                        session.open[to] = false;
                    }
                    self.input(to, life, Inbox::Down(session, why));
                }
                Parcel::Control(frame) => match wire::parse_control(&frame) {
                    Ok(message) => self.input(to, life, Inbox::Control(session, Box::new(message))),
                    Err(why) => self.fail(why),
                },
                Parcel::Volume(frame) => match wire::parse_volume(&frame) {
                    Ok((message, pages)) => {
                        self.input(to, life, Inbox::Volume(channel - 1, session, message, pages));
                    }
                    Err(why) => self.fail(why),
                },
            }
        }
    }

    fn volume_message(
        &mut self,
        host: Host,
        volume: usize,
        session: SessionId,
        mut message: VolumeMessage,
        pages: Vec<Page>,
    ) {
        if let Some(answer) = self.swallowed(&message) {
            return self.send_volume(host, volume, session, answer, None);
        }
        if self.mutant == Some(Mutant::DropMarks)
            && let VolumeMessage::MarksPage { bits, .. } = &mut message
        {
            bits.fill(0);
        }
        // What is to be read needs room for the answer; a payload arrives in a buffer of its own.
        let room = if let VolumeMessage::Read { range, .. } = &message {
            Some(vec![None; usize::try_from(range.length_bytes).unwrap_or(0).div_ceil(PAGE_BYTES)])
        } else {
            (message.payload_bytes() > 0).then_some(pages)
        };
        let buffer = room.and_then(|pages| self.thread_buffers(host, volume, |buffers| buffers.put(pages)));
        self.volume_input(host, volume, VolumeInput::Message(session, message, buffer));
    }

    /// A deliberate bug answers this message without doing it.
    fn swallowed(&self, message: &VolumeMessage) -> Option<VolumeMessage> {
        let outcome = RemoteOutcome::Done;
        match (self.mutant?, message) {
            (Mutant::SkipPeerFlush, VolumeMessage::Flush { id }) => {
                Some(VolumeMessage::FlushAck { id: *id, outcome })
            }
            (Mutant::SkipCopy, VolumeMessage::Copy { id, .. }) => {
                Some(VolumeMessage::CopyAck { id: *id, outcome })
            }
            (Mutant::SkipHole, VolumeMessage::CopyZero { id, .. }) => {
                Some(VolumeMessage::CopyAck { id: *id, outcome })
            }
            (Mutant::SkipReplica, VolumeMessage::Write { seq, .. }) => {
                Some(VolumeMessage::Ack { seq: *seq, outcome })
            }
            _ => None,
        }
    }

    fn cover_order(&mut self, order: &Order) {
        match order {
            Order::Record { change: CopyChange::NewGeneration { .. }, .. } => {
                self.cover.hit("G4 solo record")
            }
            Order::Record { change: CopyChange::Target { .. }, .. } => self.cover.hit("G5 target record"),
            Order::Return { .. } => self.cover.hit("G6.3 return"),
            Order::Join { resume: true, .. } => self.cover.hit("W2 resume"),
            Order::Serve { mode: ServeMode::Front, .. } => self.cover.hit("G12 front"),
            Order::Record { .. }
            | Order::Join { .. }
            | Order::Leave
            | Order::Host { .. }
            | Order::Serve { .. }
            | Order::Freeze { .. }
            | Order::Drain { .. }
            | Order::Close
            | Order::Pace(_)
            | Order::TellMarks { .. }
            | Order::Fail { .. } => {}
        }
    }

    fn cover_report(&mut self, host: Host, volume: usize, report: &Report) {
        if let Report::Loaded(facts) = report {
            if facts.copy.unproven {
                self.cover.hit("G10 unproven");
            } else if facts.server.was_primary && !facts.server.clean && facts.replayed_extents == 0 {
                self.cover.hit("G10 settled primary keeps its word");
            }
            if facts.server.era.is_solo() {
                self.cover.hit("T2 solo restart");
            }
        }
        if matches!(report, Report::Adopted { .. }) {
            self.cover.hit("G6.2 adopted");
            self.become_twins(volume);
        }
        if matches!(report, Report::CopyFailed { .. }) {
            self.cover.hit("G12 copy failed");
        }
        if let Report::Unusable { code, text } = report
            && !self.machines[host].disks[volume].dead
        {
            self.fail(format!("server {host} cannot use its metadata: {code}: {text}"));
        }
    }

    fn cover_control(&mut self, message: &ControlMessage) {
        if matches!(message, ControlMessage::HandedOver { .. }) {
            self.cover.hit("G9 handed over");
        }
        if matches!(message, ControlMessage::Mirrored { .. }) {
            self.cover.hit("G6.5 mirrored");
        }
    }

    fn cover_message(&mut self, message: &VolumeMessage) {
        if matches!(message, VolumeMessage::SyncDone { .. }) {
            self.cover.hit("G6.1 sync done");
        }
    }

    /// What the frontends may do.
    pub fn exposed(&self, host: Host, volume: usize) -> bool {
        self.machines[host].process.as_ref().is_some_and(|process| {
            process.volumes.get(volume).is_some_and(|thread| thread.exposure == Exposure::Serving)
        })
    }
}
