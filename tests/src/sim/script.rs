//! Faults and the operator: what goes wrong, and what an honest operator types.

use duplex_core::ids::VolumeIndex;
use duplex_core::message::LiveState;
use duplex_core::mirror::api::Pace;
use duplex_core::pair::api::Operator;

use super::disk::{self, Cut};
use super::oracle::Host;
use super::world::{Event, MS, World};

/// One kind of trouble or command.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// Both directions for longer than the silence allowed.
    Cut,
    /// One direction.
    OneWay,
    /// Both directions, shorter than the silence allowed.
    Blip,
    /// SIGKILL of a daemon.
    Kill,
    /// Power loss of a machine.
    PowerCut,
    /// Power loss of both.
    BothPowerCut,
    /// SIGKILL of both.
    BothKilled,
    /// SIGSTOP for a while.
    Pause,
    /// Operator.
    Demote,
    /// Operator.
    Switchover,
    /// Operator.
    Promote,
    /// Operator, only when it is true.
    PromotePeerIsDown,
    /// Operator.
    Down,
    /// SIGTERM.
    Stop,
    /// Operator: pause now, resume later.
    ResyncPause,
    /// Operator.
    FullCopy,
    /// A few blocks cannot be read.
    BadBlocks,
    /// Every operation of a disk fails.
    DiskDies,
    /// A server's disk makes place for a new one, or for the one that lay on the shelf.
    SwapDisk,
    /// Clients are idle for a while.
    Quiet,
}

/// The script's memory.
#[derive(Debug, Default)]
pub struct Script {
    /// No more faults.
    pub over: bool,
    /// Resync is paused by the operator.
    pub paused: bool,
    /// Disks that failed and wait for their replacement.
    pub failed: [bool; 2],
}

impl World {
    /// Draws one fault and plans the next.
    pub fn script_acts(&mut self) {
        if self.script.over {
            return;
        }
        let mean = self.profile.fault_pause_ns;
        let pause = self.rng.between(mean / 20, mean * 2);
        self.plan(self.now + pause, Event::Script);
        self.check_marks();
        if let Some(fault) = self.rng.weighted(&self.profile.faults) {
            self.strike(fault);
        }
    }

    fn strike(&mut self, fault: Fault) {
        let host = self.rng.index(2);
        match fault {
            Fault::Cut => {
                self.cover.hit("fault link cut");
                let until = self.now + self.rng.between(300, 6000) * MS;
                self.cut(0, until);
                let later = self.rng.below(20) * MS;
                self.cut(1, until + later);
                if self.rng.chance(300) {
                    self.leave_session(host, false, "reset");
                    let life = self.machines[host].life;
                    if let Some(session) = self.machines[host].process.as_ref().and_then(|p| p.session) {
                        let why = "connection reset".to_owned();
                        self.input(host, life, super::host::Inbox::Down(session, why));
                    }
                }
            }
            Fault::OneWay => {
                self.cover.hit("fault one way");
                let until = self.now + self.rng.between(100, 4000) * MS;
                self.cut(host, until);
            }
            Fault::Blip => {
                let until = self.now + self.rng.between(10, 700) * MS;
                self.cut(0, until);
                self.cut(1, until);
                if self.rng.chance(500) {
                    self.leave_session(host, true, "reset");
                    let life = self.machines[host].life;
                    if let Some(session) = self.machines[host].process.as_ref().and_then(|p| p.session) {
                        let why = "connection reset".to_owned();
                        self.input(host, life, super::host::Inbox::Down(session, why));
                    }
                }
            }
            Fault::Kill => self.kill(host, None),
            Fault::PowerCut => {
                let cut = self.draw_cut();
                self.kill(host, Some(cut));
            }
            Fault::BothPowerCut => {
                self.cover.hit("fault both power cut");
                for host in [host, 1 - host] {
                    let cut = self.draw_cut();
                    self.kill(host, Some(cut));
                }
            }
            Fault::BothKilled => {
                self.kill(host, None);
                self.kill(1 - host, None);
            }
            Fault::Pause => {
                self.cover.hit("fault pause");
                let pause = self.rng.weighted(&[(2, 50), (2, 700), (1, 2500)]).unwrap_or(50);
                let until = self.now + (pause + self.rng.below(300)) * MS;
                self.pause(host, until);
            }
            Fault::Quiet => {
                self.clients.quiet_until = self.now + self.rng.between(500, 3000) * MS;
            }
            Fault::BadBlocks | Fault::DiskDies => self.hurt_disk(host, fault),
            Fault::SwapDisk => self.swap_disk(host),
            Fault::Demote
            | Fault::Switchover
            | Fault::Promote
            | Fault::PromotePeerIsDown
            | Fault::Down
            | Fault::Stop
            | Fault::ResyncPause
            | Fault::FullCopy => self.command(host, fault),
        }
    }

    fn draw_cut(&mut self) -> Cut {
        self.rng.weighted(&[(2, Cut::Lose), (1, Cut::Keep), (3, Cut::Tear)]).unwrap_or(Cut::Lose)
    }

    /// Ends a daemon, or its machine, and plans its return.
    pub(super) fn kill(&mut self, host: Host, power: Option<Cut>) {
        self.cover.hit(if power.is_some() { "fault power cut" } else { "fault kill" });
        let resync = |live: LiveState| matches!(live, LiveState::Syncing | LiveState::SyncTail);
        if self.machines.iter().any(|m| m.process.as_ref().is_some_and(|p| resync(p.server.live()))) {
            self.cover.hit("crash in resync");
        }
        self.end(host, power);
        if !self.machines[host].restart_planned {
            self.machines[host].restart_planned = true;
            let pause = self.rng.weighted(&[(2, 150), (2, 1500), (1, 6000)]).unwrap_or(150);
            let at = self.now + self.rng.between(20, pause) * MS;
            self.plan(at, Event::Start(host));
        }
    }

    fn hurt_disk(&mut self, host: Host, fault: Fault) {
        // One copy at a time, and only where the other one is complete.
        if self.script.failed != [false; 2] || !self.is_mirrored() {
            return;
        }
        self.cover.hit("fault disk");
        let volume = self.rng.index(self.profile.volumes.len());
        if fault == Fault::DiskDies {
            self.machines[host].disks[volume].dead = true;
            self.script.failed[host] = true;
            self.oracle.disk_lost(host, volume);
            self.trace.step(self.now, [8, host as u64, 0], || format!("{host}.{volume} disk dies"));
            return;
        }
        let blocks = self.oracle.blocks(volume);
        if blocks.is_empty() {
            return;
        }
        let first = blocks[self.rng.index(blocks.len())];
        let last = first + self.rng.below(3);
        let faults = &mut self.machines[host].disks[volume].faults;
        faults.push(disk::Fault { first, last, read: true, write: false });
        self.trace.step(self.now, [8, host as u64, first], || {
            format!("{host}.{volume} {first}..={last} unreadable")
        });
    }

    /// What an honest operator checks before: the other server runs alone by right, this one does not.
    pub fn swap_disk(&mut self, host: Host) {
        let other = self.machines[1 - host].process.as_ref();
        let alone = other.is_some_and(|process| process.server.live().is_alone());
        if !alone || self.script.failed != [false; 2] || self.is_solo_on_disk(host) {
            return;
        }
        self.end(host, None);
        let volume = self.rng.index(self.profile.volumes.len());
        let from_shelf = self.rng.chance(600);
        let stored = self.machines[host].shelf[volume].take().filter(|_| from_shelf);
        let pulled = std::mem::take(&mut self.machines[host].disks[volume]);
        self.machines[host].shelf[volume] = Some(pulled);
        self.cover.hit(if stored.is_some() { "disk from the shelf" } else { "new disk" });
        let what = if stored.is_some() { "the disk from the shelf" } else { "a new disk" };
        self.trace.step(self.now, [8, host as u64, 1], || format!("{host}.{volume} gets {what}"));
        match stored {
            Some(disk) => self.machines[host].disks[volume] = disk,
            None => self.format(host, volume),
        }
        self.oracle.disk_lost(host, volume);
        if self.rng.chance(700) {
            let later = self.rng.weighted(&[(2, 300), (1, 3000)]).unwrap_or(300);
            let at = self.now + self.rng.between(30, later) * MS;
            self.plan(at, Event::SwapAgain(host));
        }
        if !self.machines[host].restart_planned {
            self.machines[host].restart_planned = true;
            let at = self.now + self.rng.between(5, 60) * MS;
            self.plan(at, Event::Start(host));
        }
    }

    fn command(&mut self, host: Host, fault: Fault) {
        let volume = self.rng.index(self.profile.volumes.len());
        match fault {
            Fault::Demote => self.say(host, "operator demote", Operator::Demote),
            Fault::Switchover => self.say(host, "operator switchover", Operator::Switchover),
            Fault::Promote => self.say(host, "operator promote", Operator::Promote),
            Fault::PromotePeerIsDown if self.peer_is_down(host) => {
                self.say(host, "operator promote-peer-is-down", Operator::PromotePeerIsDown);
            }
            Fault::Down => self.say(host, "operator down", Operator::Down),
            Fault::Stop => self.say(host, "operator stop", Operator::Stop),
            Fault::ResyncPause => {
                let pace = if self.script.paused { Pace::Resume } else { Pace::Pause };
                self.script.paused = !self.script.paused;
                self.say(host, "operator pause", Operator::Resync(pace));
            }
            Fault::FullCopy => {
                let target = self.machines[self.rng.index(2)].name.clone();
                let volume = VolumeIndex(u16::try_from(volume).unwrap_or(0));
                self.say(host, "operator full-copy", Operator::FullCopy { volume, target });
            }
            Fault::PromotePeerIsDown
            | Fault::Cut
            | Fault::OneWay
            | Fault::Blip
            | Fault::Kill
            | Fault::PowerCut
            | Fault::BothPowerCut
            | Fault::BothKilled
            | Fault::Pause
            | Fault::BadBlocks
            | Fault::DiskDies
            | Fault::SwapDisk
            | Fault::Quiet => {}
        }
    }

    fn say(&mut self, host: Host, name: &str, command: Operator) {
        if self.operate(host, command).is_some() {
            self.cover.hit(name);
        }
    }

    /// What an honest operator checks before testifying: the peer's daemon is not running, it did not run
    /// alone (its disk would say so when it comes back), and the own copy did not lose its memory.
    fn peer_is_down(&self, host: Host) -> bool {
        let peer = &self.machines[1 - host];
        let mine = self.machines[host].process.as_ref();
        let proven = mine.is_some_and(|process| {
            process.volumes.iter().all(|t| t.machine.copy().is_some_and(|copy| !copy.unproven))
        });
        peer.process.is_none() && proven && !self.is_solo_on_disk(1 - host)
    }

    /// Both serve as a mirrored pair.
    pub fn is_mirrored(&self) -> bool {
        let live = |host: Host| self.machines[host].process.as_ref().map(|process| process.server.live());
        let pair = [live(0), live(1)];
        pair.contains(&Some(LiveState::PrimaryMirrored)) && pair.contains(&Some(LiveState::Secondary))
    }

    /// A server that completes requests or may do so soon.
    pub fn somebody_serves(&self) -> bool {
        self.machines.iter().filter_map(|machine| machine.process.as_ref()).any(|process| {
            let live = process.server.live();
            live.is_alone() || live.is_live_primary() || live == LiveState::Granted
        })
    }
}
