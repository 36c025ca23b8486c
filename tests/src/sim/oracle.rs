//! What a client may see: every read returns a value the history allows, and nothing flushed is lost.
//!
//! Overlapping requests run in arrival order, so the versions of a block form one line. A block keeps the
//! versions that its next read may return: the newest one known to count, and everything after it.

use std::collections::BTreeMap;
use std::ops::RangeBounds;

/// Which server, 0 or 1.
pub type Host = usize;

/// A client's request as the oracle sees it.
pub type Ticket = u64;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Fate {
    /// Handed in and not answered.
    Flying,
    /// Not answered, and nobody is working on it any more: it may have happened or not.
    Unknown,
    /// Completed; held by these servers' copies.
    Done { holders: [bool; 2] },
}

#[derive(Clone, Debug)]
struct Version {
    ticket: Ticket,
    stamp: u64,
    fate: Fate,
    /// Covered by a completed flush, or by the record of a solo run, or FUA.
    stable: bool,
    /// Which servers lost power since it completed.
    power_lost: [bool; 2],
}

impl Version {
    fn may_be_lost(&self) -> bool {
        match self.fate {
            Fate::Flying | Fate::Unknown => true,
            Fate::Done { holders } => {
                !self.stable && (0..2).all(|host| !holders[host] || self.power_lost[host])
            }
        }
    }
}

/// The versions a read may return, oldest first; never empty.
#[derive(Clone, Debug)]
struct Block {
    line: Vec<Version>,
}

impl Block {
    fn new() -> Self {
        let fate = Fate::Done { holders: [true, true] };
        let zero = Version { ticket: 0, stamp: 0, fate, stable: true, power_lost: [false; 2] };
        Self { line: vec![zero] }
    }

    /// Forgets everything before the newest version that no power cut can take back.
    fn trim(&mut self) {
        let floor = self.line.iter().rposition(|version| version.stable).unwrap_or(0);
        self.line.drain(..floor);
    }

    /// Versions a read may return now: from the newest completed one that no power cut threatens.
    fn allowed(&self) -> &[Version] {
        let floor = self.line.iter().rposition(|version| !version.may_be_lost()).unwrap_or(0);
        &self.line[floor..]
    }
}

#[derive(Clone, Debug)]
enum Asked {
    Write { volume: usize, blocks: Vec<u64>, fua: bool },
    Read { volume: usize, first: u64, starts: Vec<Vec<Version>> },
    Flush { volume: usize, covers: Vec<(u64, Ticket)> },
}

/// The history of every volume.
#[derive(Debug, Default)]
pub struct Oracle {
    blocks: BTreeMap<(usize, u64), Block>,
    asked: BTreeMap<Ticket, Asked>,
    next: Ticket,
    /// The newest epoch something completed in, with its holder.
    fence: (u64, Host),
    /// A block whose history is written to stderr.
    pub watch: Option<(usize, u64)>,
    /// Reads compared.
    pub reads: u64,
    /// Writes and zeroes completed.
    pub writes: u64,
    /// Flushes completed.
    pub flushes: u64,
    /// Completed writes that a power cut of every copy that held them made losable.
    pub losable: u64,
}

impl Oracle {
    fn show(&self, what: &str) {
        let Some(block) = self.watch.and_then(|place| self.blocks.get(&place)) else { return };
        let each = block.line.iter().map(|v| format!("{}{} {:?}", v.stamp, mark(v), v.fate));
        eprintln!("{what}: {}", each.collect::<Vec<_>>().join(" | "));
    }

    fn ticket(&mut self) -> Ticket {
        self.next += 1;
        self.next
    }

    fn block(&mut self, volume: usize, at: u64) -> &mut Block {
        self.blocks.entry((volume, at)).or_insert_with(Block::new)
    }

    /// A write (or, with stamp 0, zeroes) of these blocks is handed in; the n-th block carries `stamp + n`.
    pub fn write(&mut self, volume: usize, blocks: Vec<u64>, stamp: u64, fua: bool) -> Ticket {
        let ticket = self.ticket();
        for (place, at) in (0..).zip(&blocks) {
            let stamp = if stamp == 0 { 0 } else { stamp + place };
            let version =
                Version { ticket, stamp, fate: Fate::Flying, stable: false, power_lost: [false; 2] };
            self.block(volume, *at).line.push(version);
        }
        if self.watch.is_some_and(|(v, at)| v == volume && blocks.contains(&at)) {
            self.show("asked");
        }
        self.asked.insert(ticket, Asked::Write { volume, blocks, fua });
        ticket
    }

    /// A read is handed in.
    pub fn read(&mut self, volume: usize, first: u64, count: u64) -> Ticket {
        let ticket = self.ticket();
        let starts = (first..first + count).map(|at| self.block(volume, at).allowed().to_vec()).collect();
        self.asked.insert(ticket, Asked::Read { volume, first, starts });
        ticket
    }

    /// A flush is handed in: it covers what has completed.
    pub fn flush(&mut self, volume: usize) -> Ticket {
        let ticket = self.ticket();
        let covers = self.completed(volume);
        self.asked.insert(ticket, Asked::Flush { volume, covers });
        ticket
    }

    fn completed(&self, volume: usize) -> Vec<(u64, Ticket)> {
        let mine = self.blocks.range((volume, 0)..(volume + 1, 0));
        // What every holder lost already cannot be flushed any more.
        let done = |version: &&Version| {
            matches!(version.fate, Fate::Done { .. }) && !version.stable && !version.may_be_lost()
        };
        mine.flat_map(|((_, at), block)| block.line.iter().filter(done).map(|v| (*at, v.ticket))).collect()
    }

    fn settle(&mut self, volume: usize, covers: &[(u64, Ticket)]) {
        for (at, ticket) in covers {
            let block = self.block(volume, *at);
            for version in &mut block.line {
                if version.ticket == *ticket {
                    version.stable = true;
                }
            }
            block.trim();
        }
    }

    /// Nobody answers this request any more.
    pub fn abandon(&mut self, ticket: Ticket) {
        if let Some(Asked::Write { volume, blocks, .. }) = self.asked.remove(&ticket) {
            for at in blocks {
                for version in &mut self.block(volume, at).line {
                    if version.ticket == ticket && version.fate == Fate::Flying {
                        version.fate = Fate::Unknown;
                    }
                }
            }
        }
    }

    /// A request completed successfully on `host`, in `epoch`; `holders` are the copies that count.
    /// `content` is what a read returned, one stamp a block.
    ///
    /// # Errors
    /// With the promise that was broken.
    pub fn complete(
        &mut self,
        ticket: Ticket,
        host: Host,
        epoch: u64,
        holders: [bool; 2],
        content: &[Option<u64>],
    ) -> Result<(), String> {
        self.fenced(host, epoch)?;
        match self.asked.remove(&ticket) {
            Some(Asked::Write { volume, blocks, fua }) => {
                self.writes += 1;
                for at in blocks {
                    self.written(volume, at, ticket, holders, fua);
                    if self.watch == Some((volume, at)) {
                        self.show(&format!("written by {host}"));
                    }
                }
                Ok(())
            }
            Some(Asked::Flush { volume, covers }) => {
                self.flushes += 1;
                self.settle(volume, &covers);
                self.show("flushed");
                Ok(())
            }
            Some(Asked::Read { volume, first, starts }) => {
                self.reads += 1;
                for ((at, start), stamp) in (first..).zip(starts).zip(content) {
                    self.returned(volume, at, &start, *stamp, (host, holders))?;
                    if self.watch == Some((volume, at)) {
                        self.show(&format!("{stamp:?} read at {host}"));
                    }
                }
                Ok(())
            }
            None => Err(format!("request {ticket} is answered twice")),
        }
    }

    /// P1: completions never go back to an older epoch, nor to another holder of the same one.
    fn fenced(&mut self, host: Host, epoch: u64) -> Result<(), String> {
        let (newest, holder) = self.fence;
        // A server's volumes learn of its new epoch one after the other.
        if epoch <= newest && holder != host {
            return Err(format!(
                "P1: server {host} completes in epoch {epoch} after server {holder} completed in epoch {newest}"
            ));
        }
        self.fence = (epoch.max(newest), host);
        Ok(())
    }

    fn written(&mut self, volume: usize, at: u64, ticket: Ticket, holders: [bool; 2], fua: bool) {
        let block = self.block(volume, at);
        // A younger overlapping write completed first, or a read saw a younger one: nothing to add.
        let Some(place) = block.line.iter().position(|version| version.ticket == ticket) else { return };
        block.line[place].fate = Fate::Done { holders };
        block.line[place].stable |= fua;
        block.trim();
    }

    fn returned(
        &mut self,
        volume: usize,
        at: u64,
        start: &[Version],
        got: Option<u64>,
        (host, holders): (Host, [bool; 2]),
    ) -> Result<(), String> {
        let block = self.block(volume, at);
        let allowed = block.allowed();
        let known = |versions: &[Version]| versions.iter().any(|v| Some(v.stamp) == got);
        if !known(allowed) && !known(start) {
            let show = |versions: &[Version]| -> String {
                let each = versions.iter().map(|v| format!("{}{}", v.stamp, mark(v)));
                each.collect::<Vec<_>>().join(" ")
            };
            let got = got.map_or("a torn block".to_owned(), |stamp| stamp.to_string());
            return Err(format!(
                "P2/P6: volume {volume} block {at} reads {got}; allowed {} (when it was asked: {})",
                show(allowed),
                show(start)
            ));
        }
        // What was read counts from now on, as if it were acknowledged unflushed; what nobody works on any
        // more and was not read is gone. Two versions with the same content cannot be told apart.
        let matches = || block.line.iter().enumerate().filter(|(_, v)| Some(v.stamp) == got);
        let (count, newest) = (matches().count(), matches().next_back().map(|(at, _)| at));
        let Some(newest) = newest else { return Ok(()) };
        if count == 1 && !matches!(block.line[newest].fate, Fate::Done { .. }) {
            block.line[newest].fate = Fate::Done { holders };
        }
        if count == 1 {
            block.line[newest].power_lost[host] = false;
        }
        let mut place = 0;
        block.line.retain(|version| {
            place += 1;
            place <= newest + 1 || version.fate != Fate::Unknown
        });
        // A younger one that every copy lost was not read: it does not come back.
        if count == 1 && block.line[newest].fate != Fate::Unknown {
            let mut place = 0;
            block.line.retain(|version| {
                place += 1;
                place <= newest + 1 || !(matches!(version.fate, Fate::Done { .. }) && version.may_be_lost())
            });
        }
        Ok(())
    }

    /// `host` lost power: what it held without a flush may be gone.
    pub fn power_cut(&mut self, host: Host) {
        self.forget(host, ..);
        self.show(&format!("server {host} lost power"));
    }

    /// The disk of one volume of `host` is gone; its other volumes are as they were.
    pub fn disk_lost(&mut self, host: Host, volume: usize) {
        self.forget(host, (volume, 0)..(volume + 1, 0));
        self.show(&format!("server {host} lost the disk of volume {volume}"));
    }

    fn forget(&mut self, host: Host, places: impl RangeBounds<(usize, u64)>) {
        let mut losable = 0;
        for (_, block) in self.blocks.range_mut(places) {
            for version in &mut block.line {
                let before = version.may_be_lost();
                // One in flight may have been acknowledged there already, and be completed without it.
                version.power_lost[host] = true;
                losable += u64::from(!before && version.may_be_lost());
            }
        }
        self.losable += losable;
    }

    /// What has completed and is not stable: a solo run's return will flush it on both.
    pub fn unstable(&self, volume: usize) -> Vec<(u64, Ticket)> {
        self.completed(volume)
    }

    /// The flush of both copies that ends a solo run covered these (G6.3).
    pub fn returned_solo(&mut self, volume: usize, covers: &[(u64, Ticket)]) {
        self.settle(volume, covers);
        self.show("solo right given back");
    }

    /// Everything completed so far is stable on every copy that counts: a solo run began (G4). `holders` are
    /// the copies that count from now on.
    pub fn all_stable(&mut self, holders: [bool; 2]) {
        for block in self.blocks.values_mut() {
            for version in &mut block.line {
                // What every holder lost already stays losable.
                if matches!(version.fate, Fate::Done { .. }) && !version.may_be_lost() {
                    version.stable = true;
                    version.fate = Fate::Done { holders };
                }
            }
            block.trim();
        }
        self.show(&format!("all stable on {holders:?}"));
    }

    /// Every block that was ever asked for, with what both copies may hold now.
    pub fn blocks(&self, volume: usize) -> Vec<u64> {
        self.blocks.range((volume, 0)..(volume + 1, 0)).map(|((_, at), _)| *at).collect()
    }

    /// What a copy at rest may hold.
    ///
    /// # Errors
    /// With the promise that was broken.
    pub fn at_rest(&self, volume: usize, at: u64, got: Option<u64>) -> Result<(), String> {
        let Some(block) = self.blocks.get(&(volume, at)) else { return Ok(()) };
        let allowed = block.allowed();
        if allowed.iter().any(|version| Some(version.stamp) == got) {
            return Ok(());
        }
        let stamps: Vec<u64> = allowed.iter().map(|version| version.stamp).collect();
        Err(format!("P2: volume {volume} block {at} holds {got:?} at rest, allowed {stamps:?}"))
    }
}

const fn mark(version: &Version) -> &'static str {
    match (version.fate, version.stable) {
        (Fate::Flying, _) => "?",
        (Fate::Unknown, _) => "(unanswered)",
        (Fate::Done { .. }, true) => "!",
        (Fate::Done { .. }, false) => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOTH: [bool; 2] = [true, true];

    fn written(oracle: &mut Oracle, stamp: u64) {
        let ticket = oracle.write(0, vec![5], stamp, false);
        oracle.complete(ticket, 0, 1, BOTH, &[]).unwrap();
    }

    fn read(oracle: &mut Oracle, stamp: u64) -> Result<(), String> {
        let ticket = oracle.read(0, 5, 1);
        oracle.complete(ticket, 0, 1, BOTH, &[Some(stamp)])
    }

    #[test]
    fn the_last_completed_write_is_read() {
        let mut oracle = Oracle::default();
        read(&mut oracle, 0).unwrap();
        written(&mut oracle, 7);
        written(&mut oracle, 8);
        assert!(read(&mut oracle, 7).is_err());
        read(&mut oracle, 8).unwrap();
        assert!(read(&mut oracle, 0).is_err());
    }

    #[test]
    fn an_unanswered_write_may_have_happened_but_does_not_come_and_go() {
        for seen in [7, 8] {
            let mut oracle = Oracle::default();
            written(&mut oracle, 7);
            let lost = oracle.write(0, vec![5], 8, false);
            oracle.abandon(lost);
            read(&mut oracle, seen).unwrap();
            assert!(read(&mut oracle, 15 - seen).is_err(), "the other value must not appear after {seen}");
        }
    }

    #[test]
    fn only_a_power_cut_of_every_copy_loses_unflushed_writes() {
        let mut oracle = Oracle::default();
        written(&mut oracle, 7);
        oracle.power_cut(0);
        assert!(read(&mut oracle, 0).is_err());
        oracle.power_cut(1);
        read(&mut oracle, 0).unwrap();

        let mut oracle = Oracle::default();
        written(&mut oracle, 7);
        let flush = oracle.flush(0);
        oracle.complete(flush, 0, 1, BOTH, &[]).unwrap();
        oracle.power_cut(0);
        oracle.power_cut(1);
        assert!(read(&mut oracle, 0).is_err());
    }

    #[test]
    fn a_lost_disk_loses_one_volume_only() {
        let mut oracle = Oracle::default();
        for volume in [0, 1] {
            let ticket = oracle.write(volume, vec![5], 7, false);
            oracle.complete(ticket, 0, 1, BOTH, &[]).unwrap();
        }
        oracle.disk_lost(0, 1);
        oracle.disk_lost(1, 1);
        assert!(oracle.at_rest(0, 5, Some(0)).is_err());
        oracle.at_rest(1, 5, Some(0)).unwrap();
    }

    #[test]
    fn two_holders_of_one_epoch_are_found() {
        let mut oracle = Oracle::default();
        let first = oracle.flush(0);
        oracle.complete(first, 0, 3, BOTH, &[]).unwrap();
        for (host, epoch, fine) in
            [(1, 3, false), (1, 2, false), (0, 3, true), (0, 2, true), (1, 4, true), (0, 3, false)]
        {
            let ticket = oracle.flush(0);
            assert_eq!(oracle.complete(ticket, host, epoch, BOTH, &[]).is_ok(), fine, "{host} {epoch}");
        }
    }
}
