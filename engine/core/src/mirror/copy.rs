//! The source of a resync: union of both maps, chunks under range locks, marks cleared by proof (G2, G6).

use std::collections::VecDeque;
use std::time::Duration;

use super::api::{CopyPlan, Pace, Part, Priority, Progress, Report, ServeMode};
use super::holes::{Holes, Piece};
use super::lock::Access;
use super::unreadable::Unreadable;
use super::volume::{DiskPurpose, Holder, Joined, Serve, SessionRole, Volume};
use crate::dirty_log::{DirtyLog, NextDirty};
use crate::ids::{BufferId, ByteRange, SessionId};
use crate::limits::COPY_CHUNK_BYTES;
use crate::message::{RemoteOutcome, VolumeMessage};
use crate::request::{DiskOpKind, DiskOutcome};
use crate::time::Instant;

/// A client's request this recent makes the resync yield.
const CLIENT_RECENT: Duration = Duration::from_millis(20);
/// Chunks in flight while clients work: the floor that makes the resync end.
const YIELD_CHUNKS: usize = 2;
/// Copied marks are cleared by a flush of both copies at least this often: what is copied again after an interruption.
const FLUSH_EVERY_BYTES: u64 = 64 << 20;
/// And this often, where the copying is slow.
const FLUSH_EVERY: Duration = Duration::from_secs(1);
/// The same for holes, in whole pages of marks (124 MiB each with blocks of 4 KiB): half a terabyte.
const FLUSH_EVERY_PAGES: usize = 4096;
/// No further hole is begun while so many wait for their flush.
const PAGES_MAX: usize = 2 * FLUSH_EVERY_PAGES;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    /// Not a source, or nothing to do.
    Off,
    /// The target's marks come in.
    Marks,
    /// All marks are in; they become durable before anything is copied.
    MarksDurable,
    Chunks,
    /// SyncDone is sent.
    Tail,
    /// The target adopted.
    Done,
}

#[derive(Clone, Copy, Debug)]
struct Chunk {
    range: ByteRange,
    /// Whole blocks; more than `range` when a hole was shorter than it seemed.
    locked: ByteRange,
    buffer: BufferId,
    session: SessionId,
    /// When the disk was asked.
    asked: Option<Instant>,
    /// When it was sent.
    sent: Option<Instant>,
    /// Goes as a range, if the disk says under the lock that it is zero.
    zero: bool,
}

/// State of the copying.
#[derive(Debug)]
pub(super) struct Copying {
    phase: Phase,
    plan: CopyPlan,
    buffers: Vec<BufferId>,
    chunks: Vec<Option<Chunk>>,
    /// Session tags in chunk ids, so that a late answer is never taken for a new chunk's.
    round: u32,
    cursor_block: u64,
    pages: VecDeque<(u64, Vec<u8>)>,
    pages_taken: u64,
    marks_end: Option<u64>,
    total_bytes: u64,
    sent_bytes: u64,
    /// `sent_bytes` when both copies were last flushed.
    flushed_at_bytes: u64,
    /// And when.
    flushed_at: Instant,
    paused: bool,
    priority: Priority,
    max_bytes_per_s: u64,
    /// Not before this (rate cap, unreadable blocks).
    not_before: Instant,
    pub(super) holes: Holes,
    unreadable: Unreadable,
}

impl Copying {
    pub(super) const fn new(buffers: Vec<BufferId>) -> Self {
        Self {
            phase: Phase::Off,
            plan: CopyPlan::None,
            buffers,
            chunks: Vec::new(),
            round: 0,
            cursor_block: 0,
            pages: VecDeque::new(),
            pages_taken: 0,
            marks_end: None,
            total_bytes: 0,
            sent_bytes: 0,
            flushed_at_bytes: 0,
            flushed_at: Instant(0),
            paused: false,
            priority: Priority::Normal,
            max_bytes_per_s: 0,
            not_before: Instant(0),
            holes: Holes::new(),
            unreadable: Unreadable::new(),
        }
    }

    pub(super) const fn round(&self) -> u32 {
        self.round
    }

    /// A pace typed now counts from now on: what the old cap still made wait goes on by the new one.
    pub(super) fn set_pace(&mut self, now: Instant, pace: Pace) {
        match pace {
            Pace::Pause => self.paused = true,
            Pace::Resume => self.paused = false,
            Pace::Priority(priority) => self.priority = priority,
            Pace::MaxBytesPerSecond(rate) => {
                self.max_bytes_per_s = rate;
                self.not_before = self.not_before.min(now);
            }
        }
    }

    /// So many bytes are about to be copied: the next chunk waits as long as the cap wants.
    fn hold_pace(&mut self, now: Instant, bytes: u64) {
        if self.max_bytes_per_s > 0 {
            let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(self.max_bytes_per_s);
            let pause = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
            self.not_before = self.not_before.max(now) + pause;
        }
    }

    pub(super) fn progress(&self, left_bytes: u64) -> Option<Progress> {
        (self.phase != Phase::Off && self.phase != Phase::Done).then_some(Progress {
            total_bytes: self.total_bytes.max(left_bytes),
            left_bytes,
            sent_bytes: self.sent_bytes,
            paused: self.paused,
        })
    }

    /// No chunk is begun any more; those under way end.
    pub(super) fn stop(&mut self) {
        self.phase = Phase::Off;
        self.pages.clear();
        self.marks_end = None;
        self.unreadable.clear();
    }

    fn in_flight(&self) -> usize {
        self.chunks.iter().flatten().count()
    }

    /// Bytes of holes on their way: what the target may have to zero before it answers.
    fn zero_bytes(&self) -> u64 {
        self.chunks.iter().flatten().filter(|chunk| chunk.zero).map(|chunk| chunk.range.length_bytes).sum()
    }

    /// When the oldest chunk was asked for that the disk still owes.
    pub(super) fn oldest_read(&self) -> Option<Instant> {
        self.chunks
            .iter()
            .flatten()
            .filter(|chunk| chunk.sent.is_none())
            .filter_map(|chunk| chunk.asked)
            .min()
    }
}

impl Volume {
    /// Takes part in a session.
    pub(super) fn join(&mut self, session: SessionId, part: Part, resume: bool) {
        if self.joined.is_some() {
            self.leave();
        }
        self.left = None;
        self.peer_failed = false;
        match part {
            Part::Source(plan) => {
                self.joined = Some(Joined { session, role: SessionRole::Source });
                if resume {
                    self.resend_clients();
                }
                self.begin_source(plan);
            }
            Part::Target(plan) => {
                self.joined = Some(Joined { session, role: SessionRole::Target });
                self.begin_target(plan);
            }
        }
    }

    /// The session is over. Marks stay; answers that were owed are lost.
    pub(super) fn leave(&mut self) {
        let Some(joined) = self.joined.take() else {
            return self.drop_early();
        };
        self.left = Some(joined.session);
        self.copying.stop();
        self.drop_sent_chunks();
        self.taking.reset();
        self.peers_lose_session();
        match self.serve {
            // Marks are kept as they are: the same peer may take the session up again (D12), and going alone
            // marks everything it did not prove.
            Serve::Open(ServeMode::Mirrored) | Serve::Frozen => {}
            Serve::Open(ServeMode::Alone | ServeMode::Front) | Serve::Closed => self.forget_peer(),
        }
        self.flushes_lose_session();
        self.clients_lose_session();
    }

    fn begin_source(&mut self, plan: CopyPlan) {
        let block_bytes = self.block_bytes();
        let Some(log) = self.log.as_mut() else {
            return;
        };
        let copying = &mut self.copying;
        copying.stop();
        copying.plan = plan;
        copying.round = copying.round.wrapping_add(1);
        copying.cursor_block = 0;
        copying.pages_taken = 0;
        copying.sent_bytes = 0;
        copying.flushed_at_bytes = 0;
        copying.flushed_at = self.now;
        copying.not_before = Instant(0);
        copying.holes = Holes::new();
        copying.phase = match plan {
            CopyPlan::None => Phase::Off,
            CopyPlan::Union => Phase::Marks,
            // Every block was marked before the session.
            CopyPlan::Full => Phase::MarksDurable,
        };
        copying.total_bytes = log.dirty_blocks() * block_bytes;
    }

    pub(super) fn on_marks_page(&mut self, index: u64, bits: Vec<u8>) {
        if self.copying.phase == Phase::Marks {
            self.copying.pages.push_back((index, bits));
        }
    }

    pub(super) fn on_marks_end(&mut self, pages: u64) {
        if self.copying.phase == Phase::Marks {
            self.copying.marks_end = Some(pages);
        }
    }

    /// Goes on with the resync as far as pace, locks and buffers allow.
    pub(super) fn pump_copy(&mut self) -> bool {
        match self.copying.phase {
            Phase::Off | Phase::Tail | Phase::Done => false,
            Phase::Marks => self.merge_marks(),
            Phase::MarksDurable => {
                let block_bytes = self.block_bytes();
                let Some(log) = self.log.as_ref().filter(|log| log.merges_durable()) else {
                    return false;
                };
                self.copying.total_bytes = log.dirty_blocks() * block_bytes;
                self.copying.phase = Phase::Chunks;
                self.send(VolumeMessage::MarksAck { pages: self.copying.pages_taken }, None);
                true
            }
            Phase::Chunks => self.pump_chunks(),
        }
    }

    fn merge_marks(&mut self) -> bool {
        let mut moved = false;
        while self.marks_room()
            && let Some((index, bits)) = self.copying.pages.pop_front()
        {
            moved = true;
            let merged = self.log.as_mut().map(|log| log.merge_page(index, &bits));
            if let Some(Err(_)) = merged {
                // The peer speaks of blocks this volume does not have: nothing it says can be relied on.
                self.fail_peer(super::client::EIO, None);
                return true;
            }
            self.copying.pages_taken += 1;
            self.send(VolumeMessage::MarksAck { pages: self.copying.pages_taken }, None);
        }
        if self.copying.marks_end == Some(self.copying.pages_taken) && self.copying.pages.is_empty() {
            self.copying.phase = Phase::MarksDurable;
            moved = true;
        }
        moved
    }

    fn window(&self) -> usize {
        // Free buffers and those with a chunk: a window of all of them.
        let all = self.copying.buffers.len() + self.copying.in_flight();
        let clients = self.clients.running() > 0 || self.now.since(self.clients.last_use) < CLIENT_RECENT;
        match (self.copying.priority, clients) {
            (Priority::High, _) | (Priority::Normal, false) => all,
            (Priority::Normal, true) => YIELD_CHUNKS.min(all),
            (Priority::Low, true) => 1,
            (Priority::Low, false) => all.div_ceil(2),
        }
    }

    fn pump_chunks(&mut self) -> bool {
        let mut moved = false;
        while !self.copying.paused
            && self.now >= self.copying.not_before
            && self.copying.in_flight() < self.window()
            && self.copying.phase == Phase::Chunks
        {
            if let Some(block) = self.copying.unreadable.next_try() {
                moved = true;
                self.begin_chunk(block, 1, false);
                continue;
            }
            let max_blocks = self.copying.holes.longest_bytes() / self.block_bytes();
            let Some(log) = self.log.as_mut().filter(|log| log.copied_pages() < PAGES_MAX) else {
                return moved;
            };
            match log.next_dirty(self.copying.cursor_block, max_blocks) {
                NextDirty::Run { first_block, blocks } => {
                    let (skipped, blocks) = self.copying.unreadable.readable(first_block, blocks);
                    let first_block = first_block + skipped;
                    self.copying.cursor_block = first_block;
                    if blocks == 0 {
                        // Only looked at: nothing moved.
                        continue;
                    }
                    let (blocks, zero) = match self.piece(first_block, blocks) {
                        Piece::Read(blocks) => (blocks, false),
                        Piece::Zero(blocks) if self.zeroes_fit(blocks) => (blocks, true),
                        Piece::Zero(_) | Piece::Asked => return moved,
                    };
                    moved = true;
                    self.copying.cursor_block = first_block + blocks;
                    self.begin_chunk(first_block, blocks, zero);
                }
                NextDirty::Loading => return moved,
                NextDirty::End if self.copying.cursor_block > 0 && self.copying.in_flight() == 0 => {
                    self.copying.cursor_block = 0;
                    if self.log.as_ref().is_some_and(DirtyLog::wants_flush) {
                        // What is copied waits for its flush; what was marked meanwhile is found next time.
                        return moved;
                    }
                    moved = true;
                    if let Some(at) = self.copying.unreadable.pass_ended(self.now) {
                        self.copying.not_before = self.copying.not_before.max(at);
                    }
                }
                NextDirty::End => return self.end_chunks() || moved,
            }
        }
        moved
    }

    /// Each range may be as long as all together: their sum is what the target has to do within its stall time.
    fn zeroes_fit(&self, blocks: u64) -> bool {
        let under_way = self.copying.zero_bytes();
        under_way == 0 || under_way + blocks * self.block_bytes() <= self.copying.holes.longest_bytes()
    }

    /// Nothing is left to copy when nothing is marked, in flight or waiting for its flush.
    fn end_chunks(&mut self) -> bool {
        if self.copying.in_flight() != 0 || self.dirty_blocks() != 0 {
            return false;
        }
        let Some(copy) = self.copy().cloned() else {
            return false;
        };
        self.copying.phase = Phase::Tail;
        let proven = self.proven_now();
        self.send(
            VolumeMessage::SyncDone { generation: copy.generation, history: copy.history, proven },
            None,
        );
        true
    }

    fn begin_chunk(&mut self, first_block: u64, blocks: u64, zero: bool) {
        let block = self.block_bytes();
        let size = self.copy().map_or(0, |c| c.size_bytes);
        let offset = first_block * block;
        let range = ByteRange::new(offset, (blocks * block).min(size - offset));
        let (Some(joined), Some(buffer)) = (self.joined, self.copying.buffers.pop()) else {
            return;
        };
        let locked = self.widen(range);
        let chunk = Chunk { range, locked, buffer, session: joined.session, asked: None, sent: None, zero };
        let slot = match self.copying.chunks.iter().position(Option::is_none) {
            Some(slot) => slot,
            None => {
                self.copying.chunks.push(None);
                self.copying.chunks.len() - 1
            }
        };
        self.copying.chunks[slot] = Some(chunk);
        if !zero {
            self.copying.hold_pace(self.now, range.length_bytes);
        }
        self.copying.unreadable.begun(first_block);
        let slot = u32::try_from(slot).expect("chunks are as many as copy buffers");
        if self.locks.acquire(locked, Access::Exclusive, Holder::Copy(slot)) {
            self.copy_locked(slot);
        }
    }

    fn chunk(&self, slot: u32) -> Option<Chunk> {
        self.copying.chunks.get(slot as usize).copied().flatten()
    }

    pub(super) fn copy_locked(&mut self, slot: u32) {
        let Some(chunk) = self.chunk(slot) else {
            return;
        };
        if !self.chunk_is_current(&chunk) {
            return self.drop_chunk(slot);
        }
        let kind = match chunk.zero {
            true => DiskOpKind::SeekData { range: chunk.range },
            false => DiskOpKind::Read { range: chunk.range, buffer: chunk.buffer },
        };
        self.copying.chunks[slot as usize] = Some(Chunk { asked: Some(self.now), ..chunk });
        self.disk(DiskPurpose::CopyRead(slot), kind);
    }

    fn chunk_is_current(&self, chunk: &Chunk) -> bool {
        self.copying.phase == Phase::Chunks && self.joined.is_some_and(|j| j.session == chunk.session)
    }

    /// Gives the chunk's lock and buffer back.
    fn drop_chunk(&mut self, slot: u32) {
        let Some(chunk) = self.copying.chunks.get_mut(slot as usize).and_then(Option::take) else {
            return;
        };
        self.copying.buffers.push(chunk.buffer);
        self.locks.release(chunk.locked, Access::Exclusive, &mut self.granted);
    }

    pub(super) fn on_copy_read(&mut self, slot: u32, outcome: &DiskOutcome) {
        let Some(chunk) = self.chunk(slot) else {
            return;
        };
        if !self.chunk_is_current(&chunk) {
            return self.drop_chunk(slot);
        }
        let id = (u64::from(self.copying.round) << 32) | u64::from(slot);
        match outcome {
            DiskOutcome::Zeroes { length_bytes }
                if chunk.zero && *length_bytes >= chunk.range.length_bytes =>
            {
                self.set_sent(slot);
                self.send(VolumeMessage::CopyZero { id, range: chunk.range }, None);
            }
            DiskOutcome::Zeroes { .. } | DiskOutcome::Failed { .. } if chunk.zero => self.read_instead(slot),
            DiskOutcome::Done | DiskOutcome::Bytes(_) | DiskOutcome::Zeroes { .. } => {
                self.set_sent(slot);
                let block = self.block_bytes();
                self.copying.unreadable.read(chunk.range.offset_bytes / block);
                self.copying.sent_bytes += chunk.range.length_bytes;
                self.send(VolumeMessage::Copy { id, range: chunk.range }, Some(chunk.buffer));
            }
            DiskOutcome::Failed { .. } => {
                self.drop_chunk(slot);
                let block = self.block_bytes();
                let first = chunk.range.offset_bytes / block;
                if self.copying.unreadable.failed(first, chunk.range.length_bytes.div_ceil(block)) {
                    self.report(Report::Unreadable { range: chunk.range });
                }
            }
        }
    }

    fn set_sent(&mut self, slot: u32) {
        let now = self.now;
        if let Some(chunk) = self.copying.chunks[slot as usize].as_mut() {
            chunk.sent = Some(now);
        }
    }

    /// Under the lock it is not all zero: its first bytes are read, the rest is found when the marks are gone through
    /// again.
    fn read_instead(&mut self, slot: u32) {
        self.copying.holes.forget();
        let longest = COPY_CHUNK_BYTES.max(self.block_bytes());
        if let Some(chunk) = self.copying.chunks[slot as usize].as_mut() {
            chunk.zero = false;
            chunk.range.length_bytes = chunk.range.length_bytes.min(longest);
            let bytes = chunk.range.length_bytes;
            self.copying.hold_pace(self.now, bytes);
        }
        self.copy_locked(slot);
    }

    /// What the resync could not read here, and how many blocks that is: the first few ranges.
    pub fn unreadable(&self) -> (u64, Vec<ByteRange>) {
        let block = self.block_bytes();
        let bytes = |(first, blocks)| ByteRange::new(first * block, blocks * block);
        let known = &self.copying.unreadable;
        (known.blocks(), known.runs().map(bytes).collect())
    }

    pub(super) fn on_copy_ack(&mut self, id: u64, outcome: RemoteOutcome) {
        let slot = (id & 0xffff_ffff) as u32;
        let Some(chunk) = self.chunk(slot) else {
            return;
        };
        let Some(sent) = chunk.sent.filter(|_| id >> 32 == u64::from(self.copying.round)) else {
            return;
        };
        if chunk.zero {
            self.copying.holes.took(chunk.range.length_bytes, self.now.since(sent));
        }
        match outcome {
            RemoteOutcome::Done => {
                if self.chunk_is_current(&chunk)
                    && let Some(log) = self.log.as_mut()
                {
                    log.copied(chunk.range);
                }
            }
            RemoteOutcome::Failed { errno } => self.fail_peer(errno, Some(chunk.range)),
        }
        self.drop_chunk(slot);
    }

    /// Chunks sent in a session that ended will never be answered.
    fn drop_sent_chunks(&mut self) {
        for slot in 0..self.copying.chunks.len() {
            let sent = self.copying.chunks[slot].is_some_and(|c| c.sent.is_some());
            if sent {
                self.drop_chunk(u32::try_from(slot).expect("chunks are as many as copy buffers"));
            }
        }
    }

    pub(super) fn on_sync_ack(&mut self, outcome: RemoteOutcome) {
        if self.copying.phase != Phase::Tail {
            return;
        }
        match outcome {
            RemoteOutcome::Done => {
                self.copying.phase = Phase::Done;
                let (total_bytes, sent_bytes) = (self.copying.total_bytes, self.copying.sent_bytes);
                self.report(Report::Synced { total_bytes, sent_bytes });
            }
            RemoteOutcome::Failed { errno } => self.fail_peer(errno, None),
        }
    }

    /// Enough is copied for a flush of both copies, or nothing else is left to do.
    pub(super) fn copy_wants_flush(&self) -> bool {
        match self.copying.phase {
            Phase::Chunks => {
                self.copying.in_flight() == 0
                    || self.copying.sent_bytes - self.copying.flushed_at_bytes >= FLUSH_EVERY_BYTES
                    || self.now.since(self.copying.flushed_at) >= FLUSH_EVERY
                    || self.log.as_ref().is_some_and(|log| log.copied_pages() >= FLUSH_EVERY_PAGES)
            }
            Phase::Off | Phase::Marks | Phase::MarksDurable | Phase::Tail | Phase::Done => true,
        }
    }

    /// A flush that clears what was copied so far is under way.
    pub(super) fn copy_flushing(&mut self) {
        self.copying.flushed_at_bytes = self.copying.sent_bytes;
        self.copying.flushed_at = self.now;
    }

    /// When the resync wants to go on by itself.
    pub(super) fn copy_deadline(&self) -> Option<Instant> {
        if self.copying.phase != Phase::Chunks || self.copying.paused {
            return None;
        }
        if self.now < self.copying.not_before {
            return Some(self.copying.not_before);
        }
        // While clients worked a moment ago fewer chunks are allowed: look again when that moment is over.
        let recent = self.clients.last_use + CLIENT_RECENT;
        (self.now < recent && self.clients.running() == 0).then_some(recent)
    }

    /// True once the target has everything.
    pub fn is_synced(&self) -> bool {
        self.copying.phase == Phase::Done
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::BootId;
    use crate::mirror::{Volume, VolumeConfig};

    #[test]
    fn a_cap_holds_every_chunk_and_a_new_one_counts_at_once() {
        let now = Instant(1_000_000_000);
        let mut copying = Copying::new(Vec::new());
        copying.set_pace(now, Pace::MaxBytesPerSecond(1 << 20));
        for chunk in 1..=3 {
            copying.hold_pace(now, 256 << 10);
            assert_eq!(copying.not_before, now + chunk * Duration::from_millis(250));
        }
        let later = now + Duration::from_millis(10);
        copying.set_pace(later, Pace::MaxBytesPerSecond(4 << 20));
        assert_eq!(copying.not_before, later, "the old cap's wait is over");
        copying.hold_pace(later, 256 << 10);
        assert_eq!(copying.not_before, later + Duration::from_micros(62_500));
    }

    #[test]
    fn a_lease_passes_no_deadline_of_the_resync_over() {
        let config = VolumeConfig {
            boot_id: BootId(1),
            copy_buffers: Vec::new(),
            stall: Duration::from_secs(10),
            capacity_bytes: 0,
        };
        let mut volume = Volume::new(config);
        let capped = Instant(1_000_000_000);
        volume.copying.phase = Phase::Chunks;
        volume.copying.not_before = capped;
        assert_eq!(volume.copy_deadline(), Some(capped));
        volume.set_lease(Instant(2_000_000_000), Instant(3_000_000_000));
        assert_eq!(volume.copy_deadline(), Some(capped), "still due: nothing was pumped since");
    }
}
