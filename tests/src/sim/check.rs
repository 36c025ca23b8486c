//! Checks of the copies themselves, of the resync's economy, and what events and states tell.

use duplex_core::event::Event as CoreEvent;
use duplex_core::format::record::CopyState;
use duplex_core::message::{Hello, LiveState};
use duplex_core::mirror::api::CopyPlan;
use duplex_core::resync::pair::decide_pair;

use super::client::BLOCK_BYTES;
use super::oracle::Host;
use super::page;
use super::world::World;

/// Payload a resync may send beyond 1.05 times what was marked: chunks under way when a session breaks.
const SLACK_BYTES: u64 = 512 << 10;

/// What the current session's resync may send, per volume.
#[derive(Debug, Default)]
pub struct ResyncBudget {
    volumes: Vec<Budget>,
}

#[derive(Clone, Debug, Default)]
struct Budget {
    allowed_bytes: u64,
    sent_bytes: u64,
    source: Host,
    plan: Option<CopyPlan>,
}

impl ResyncBudget {
    fn volume(&mut self, volume: usize) -> &mut Budget {
        if self.volumes.len() <= volume {
            self.volumes.resize(volume + 1, Budget::default());
        }
        &mut self.volumes[volume]
    }

    /// A client wrote: these blocks may be sent once more.
    pub fn written(&mut self, volume: usize, blocks: u64) {
        self.volume(volume).allowed_bytes += blocks * BLOCK_BYTES;
    }
}

impl World {
    /// A source begins.
    pub fn resync_begins(&mut self, host: Host, volume: usize, plan: CopyPlan, resume: bool) {
        if plan == CopyPlan::Full {
            // From now on its map tells what this target lacks, and of no other disk what it lacks.
            self.machines[host].disks[volume].twin = None;
        }
        if resume {
            return;
        }
        let dirty = |machine: &super::host::Machine| {
            machine.process.as_ref().map_or(0, |process| process.volumes[volume].machine.dirty_blocks())
        };
        let marked: u64 = self.machines.iter().map(dirty).sum();
        let all = self.profile.volumes[volume].size_bytes;
        let allowed_bytes = match plan {
            CopyPlan::None => 0,
            CopyPlan::Union => (marked * BLOCK_BYTES).min(all),
            CopyPlan::Full => all,
        };
        *self.resync.volume(volume) = Budget { allowed_bytes, sent_bytes: 0, source: host, plan: Some(plan) };
    }

    /// A chunk is sent.
    pub fn resync_sent(&mut self, host: Host, volume: usize, bytes: u64) {
        let found = self.machines[host]
            .process
            .as_ref()
            .map_or(0, |process| process.volumes[volume].machine.dirty_blocks() * BLOCK_BYTES);
        let budget = self.resync.volume(volume);
        if budget.source != host {
            return;
        }
        if budget.sent_bytes == 0 && budget.plan == Some(CopyPlan::Union) {
            // A start that was cut off left the summary's number behind its page; now the page is read.
            budget.allowed_bytes = budget.allowed_bytes.max(found);
        }
        budget.sent_bytes += bytes;
        let limit = budget.allowed_bytes + budget.allowed_bytes / 20 + SLACK_BYTES;
        if budget.sent_bytes > limit {
            let (sent, allowed) = (budget.sent_bytes, budget.allowed_bytes);
            self.fail(format!(
                "P5: the resync of volume {volume} sent {sent} bytes where {allowed} were marked"
            ));
        }
    }

    /// The block is marked, or its extent is active, in the log of a running server.
    fn is_marked(&self, host: Host, volume: usize, at: u64) -> bool {
        let process = self.machines[host].process.as_ref();
        process.is_some_and(|p| p.volumes[volume].machine.dirty_log().is_some_and(|log| log.is_marked(at)))
    }

    /// The server's record on its disks says that it runs alone.
    pub fn is_solo_on_disk(&self, host: Host) -> bool {
        self.machines[host].disks.iter().any(super::create::is_solo)
    }

    /// P4: whatever differs between two usable copies is marked on one of them.
    pub fn check_marks(&mut self) {
        for volume in 0..self.profile.volumes.len() {
            if !self.comparable(volume) {
                continue;
            }
            for at in self.differing(volume) {
                let marked = (0..2).any(|host| self.is_marked(host, volume, at));
                self.cover.hit("marks compared");
                if !marked {
                    let why = format!("P4: volume {volume} block {at} differs and is marked on neither side");
                    return self.fail(why);
                }
            }
        }
    }

    /// Both copies of a volume are equal but for what is under way: each map tells from now on what differs from the
    /// other one.
    pub fn become_twins(&mut self, volume: usize) {
        let numbers = [0, 1].map(|host: Host| self.machines[host].disks[volume].number);
        for host in 0..2 {
            self.machines[host].disks[volume].twin = Some(numbers[1 - host]);
        }
    }

    /// Both copies are usable, and the one was made equal to the other last. This is the simulator's own rule: it looks
    /// at which disks were copied, not at what their records say.
    fn comparable(&self, volume: usize) -> bool {
        let usable = |machine: &super::host::Machine| {
            machine.process.as_ref().is_some_and(|process| {
                let machine = &process.volumes[volume].machine;
                machine.is_loaded() && machine.copy_state() == Some(CopyState::UpToDate)
            })
        };
        let [a, b] = [0, 1].map(|host: Host| &self.machines[host].disks[volume]);
        self.machines.iter().all(usable) && a.twin == Some(b.number) && b.twin == Some(a.number)
    }

    /// Blocks whose content differs now.
    pub fn differing(&self, volume: usize) -> Vec<u64> {
        let [a, b] = &self.machines;
        let (a, b) = (&a.disks[volume], &b.disks[volume]);
        let mut blocks = a.written();
        blocks.extend(b.written());
        blocks.sort_unstable();
        blocks.dedup();
        blocks.retain(|at| !page::same(&a.data(*at), &b.data(*at)));
        blocks
    }

    /// Both copies are equal, and hold what the history allows.
    pub fn check_equal(&mut self) {
        for volume in 0..self.profile.volumes.len() {
            if let Some(at) = self.differing(volume).first() {
                let stamp = |host: Host| page::stamp_of(&self.machines[host].disks[volume].data(*at));
                let why = format!(
                    "P4: settled, and volume {volume} block {at} is {:?} on alpha and {:?} on beta",
                    stamp(0),
                    stamp(1)
                );
                return self.fail(why);
            }
            for at in self.oracle.blocks(volume) {
                let got = page::stamp_of(&self.machines[0].disks[volume].data(at));
                if let Err(why) = self.oracle.at_rest(volume, at, got) {
                    return self.fail(why);
                }
            }
        }
    }

    /// A hello is sent: with the newest one of the other side it says which rules are reached.
    pub fn on_hello(&mut self, host: Host, hello: &Hello) {
        self.hellos[host] = Some(hello.clone());
        let [Some(a), Some(b)] = &self.hellos else { return };
        let rules: Vec<_> = decide_pair(a, b).volumes.iter().map(|decision| decision.rule).collect();
        for rule in rules {
            self.cover.hit(&format!("decide {}", rule.name()));
        }
    }

    /// An event of a server: what must never be said in these runs.
    pub fn on_event(&mut self, host: Host, event: &CoreEvent) {
        self.trace.step(self.now, [13, host as u64, 0], || {
            format!("{host} event {}: {} [{}]", event.kind, event.text, event.reason)
        });
        self.cover.hit(&format!("event {}", event.kind));
        if event.kind == "split-brain" {
            self.fail(format!("a false split brain: {}", event.text));
        }
    }

    /// Looks at the live state after every input of a server.
    pub fn note_live(&mut self, host: Host) {
        let Some(process) = &mut self.machines[host].process else { return };
        let live = process.server.live();
        let before = std::mem::replace(&mut process.live, live);
        if live == before {
            return;
        }
        self.trace
            .step(self.now, [14, host as u64, live as u64], || format!("{host} is {live:?}, was {before:?}"));
        self.cover.hit(&format!("state {live:?}"));
        match (before, live) {
            (LiveState::Granted, LiveState::Alone | LiveState::Syncing) => {
                self.oracle.all_stable([host == 0, host == 1]);
            }
            // The record that gives the solo right back is durable, and both copies were flushed before it.
            (LiveState::Returning, LiveState::PrimaryMirrored) => {
                for (volume, covers) in std::mem::take(&mut self.returning) {
                    self.oracle.returned_solo(volume, &covers);
                }
            }
            (LiveState::Returning, LiveState::Frozen | LiveState::Granted | LiveState::Alone) => {
                self.cover.hit("G7 alone after a return that was cut off");
            }
            (_, _) => {}
        }
    }
}
