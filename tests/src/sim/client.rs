//! Clients: stamped writes, zeroes, flushes and reads on a small hot set of blocks.

use duplex_core::ids::{ByteRange, RequestId};
use duplex_core::request::{Request, RequestOp};

use super::host::{Asked, Inbox};
use super::oracle::Host;
use super::page;
use super::profile::Profile;
use super::rng::Rng;
use super::world::{Event, World};

/// Blocks of the simulated volumes.
pub const BLOCK_BYTES: u64 = 4096;

/// What the clients remember.
#[derive(Debug)]
pub struct Clients {
    /// First blocks of the hot places of each volume.
    hot: Vec<Vec<u64>>,
    next_stamp: u64,
    next_request: u64,
    /// No new requests.
    pub quiet: bool,
    /// None before this.
    pub quiet_until: u64,
}

impl Clients {
    /// Draws the hot blocks.
    pub fn new(profile: &Profile, rng: &mut Rng) -> Self {
        let hot = profile.volumes.iter().map(|volume| {
            let blocks = volume.size_bytes / BLOCK_BYTES;
            let mut chosen: Vec<u64> = Vec::new();
            while (chosen.len() as u64) < volume.hot_blocks {
                let first = rng.below(blocks);
                let run = rng.between(1, 8);
                chosen.extend((first..blocks).take(usize::try_from(run).unwrap_or(1)));
            }
            chosen
        });
        Self { hot: hot.collect(), next_stamp: 0, next_request: 0, quiet: false, quiet_until: 0 }
    }

    fn stamp(&mut self) -> u64 {
        self.next_stamp += 16;
        self.next_stamp
    }
}

impl World {
    /// One client of a volume acts, and plans when it does so again.
    pub fn client_acts(&mut self, volume: usize) {
        let think = self.profile.volumes[volume].think_ns;
        let pause = self.rng.between(think / 8, think * 2);
        self.plan(self.now + pause, Event::Client(volume));
        if self.clients.quiet || self.now < self.clients.quiet_until {
            return;
        }
        // A front and its host both let clients in. Of two overlapping writes under way at both either may be the
        // later one; the oracle knows one order, so all that is under way is asked at one of them.
        let under_way = |host: Host| {
            self.machines[host].process.as_ref().is_some_and(|p| !p.volumes[volume].requests.is_empty())
        };
        let first = match (under_way(0), under_way(1)) {
            (true, false) => 0,
            (false, true) => 1,
            (true, true) | (false, false) => self.rng.index(2),
        };
        let serving = [first, 1 - first].into_iter().find(|host| self.exposed(*host, volume));
        let Some(host) = serving else { return };
        let depth = self.profile.volumes[volume].depth;
        let busy = self.machines[host].process.as_ref().map_or(0, |p| p.volumes[volume].requests.len());
        if busy >= depth {
            return;
        }
        self.ask(host, volume);
    }

    fn ask(&mut self, host: Host, volume: usize) {
        let [reads, flushes, zeroes] = self.profile.mix;
        let kind = self.rng.below(100);
        let hot = &self.clients.hot[volume];
        let first = hot[self.rng.index(hot.len())];
        let blocks = self.profile.volumes[volume].size_bytes / BLOCK_BYTES;
        let longest = self.rng.weighted(&[(6, 1), (2, 4), (1, 8)]).unwrap_or(1);
        let count = self.rng.between(1, longest).min(blocks - first);
        let range = ByteRange::new(first * BLOCK_BYTES, count * BLOCK_BYTES);
        let list: Vec<u64> = (first..first + count).collect();
        let fua = self.rng.chance(self.profile.fua_per_mille);
        let Some(process) = &mut self.machines[host].process else { return };
        let thread = &mut process.volumes[volume];
        let mut asked = Asked { ticket: 0, buffer: None, read_pages: 0 };
        let op = if kind < reads {
            asked.ticket = self.oracle.read(volume, first, count);
            asked.read_pages = list.len();
            let buffer = thread.buffers.put(vec![page::stamped(u64::MAX); list.len()]);
            asked.buffer = Some(buffer);
            RequestOp::Read { range, buffer }
        } else if kind < reads + flushes {
            asked.ticket = self.oracle.flush(volume);
            RequestOp::Flush
        } else if kind < reads + flushes + zeroes {
            asked.ticket = self.oracle.write(volume, list, 0, fua);
            RequestOp::Zero { range, may_unmap: self.rng.chance(500), fua }
        } else {
            let stamp = self.clients.stamp();
            asked.ticket = self.oracle.write(volume, list, stamp, fua);
            let pages = (0..count).map(|place| page::stamped(stamp + place)).collect();
            let buffer = thread.buffers.put(pages);
            asked.buffer = Some(buffer);
            self.resync.written(volume, count);
            RequestOp::Write { range, buffer, fua }
        };
        if matches!(op, RequestOp::Zero { .. }) {
            self.resync.written(volume, count);
        }
        self.clients.next_request += 1;
        let id = RequestId(self.clients.next_request);
        thread.requests.insert(id, asked);
        let life = self.machines[host].life;
        self.input(host, life, Inbox::Request(volume, Request { id, op }));
    }

    /// Requests without an answer.
    pub fn unanswered(&self) -> usize {
        let processes = self.machines.iter().filter_map(|machine| machine.process.as_ref());
        processes.flat_map(|process| &process.volumes).map(|thread| thread.requests.len()).sum()
    }
}
