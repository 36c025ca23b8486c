//! Active extents: begin and end of writes, group commit, leaving the log.

use super::{
    DirtyLog, EXTENT_WORDS, ExtentBits, MetaOp, OpKind, Ticket, WriteEnd, clear, for_extents, is_clear,
    place_in_page, set,
};
use crate::format::log_block::{self, LogBlock};
use crate::format::map_page::EXTENT_BLOCKS;
use crate::ids::ByteRange;

/// How many cold extents leave at once when the log is full: one log write for many.
const LEAVE_TOGETHER: usize = 64;

#[derive(Clone, Debug)]
pub(super) struct Extent {
    /// Writes under way.
    in_flight: u32,
    /// Waiting tickets for which it was brought in.
    reserved: u32,
    /// Blocks with a write under way.
    pub(super) busy: ExtentBits,
    /// Marked, not yet in the page.
    pub(super) dirty: ExtentBits,
    /// Written, not yet covered by a flush of both copies.
    pub(super) touched: ExtentBits,
    /// As `touched`, covered by the flush under way.
    pub(super) flushing: ExtentBits,
    last_use: u64,
    /// Its marks are on their way into the page of this version.
    leaving: Option<u64>,
}

impl Extent {
    pub(super) const fn new(last_use: u64) -> Self {
        let none = [0; EXTENT_WORDS];
        Self {
            in_flight: 0,
            reserved: 0,
            busy: none,
            dirty: none,
            touched: none,
            flushing: none,
            last_use,
            leaving: None,
        }
    }

    pub(super) fn is_touched(&self) -> bool {
        !is_clear(&self.touched) || !is_clear(&self.flushing)
    }

    const fn is_idle(&self) -> bool {
        self.in_flight == 0 && self.reserved == 0
    }
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Waiting {
    ticket: Ticket,
    range: ByteRange,
}

impl DirtyLog {
    /// Extents active now.
    pub fn active_extents(&self) -> usize {
        self.extents.len()
    }

    /// A write wants to begin. True: its extents are durable in the log, it may begin now. False: `ticket`
    /// comes out of [`Self::poll_ready`] when it may. The owner holds the range's lock meanwhile.
    pub fn begin(&mut self, ticket: Ticket, range: ByteRange) -> bool {
        self.clock += 1;
        if self.waiting.is_empty() && self.is_logged(range) {
            self.activate(range);
            return true;
        }
        self.waiting.push_back(Waiting { ticket, range });
        self.pump();
        false
    }

    /// A waiting write that may begin now.
    pub fn poll_ready(&mut self) -> Option<Ticket> {
        self.ready.pop_front()
    }

    /// A write ended.
    pub fn end(&mut self, range: ByteRange, outcome: WriteEnd) {
        let (first, end) = self.block_span(range);
        let marks = &mut self.marks;
        let extents = &mut self.extents;
        for_extents(first, end, |number, bits| {
            let Some(extent) = extents.get_mut(&number) else {
                debug_assert!(false, "a write ended in an extent that is not active");
                return;
            };
            debug_assert!(extent.in_flight > 0, "ended twice");
            extent.in_flight = extent.in_flight.saturating_sub(1);
            clear(&mut extent.busy, bits);
            match outcome {
                WriteEnd::Both => set(&mut extent.touched, bits),
                WriteEnd::OnlyHere => {
                    set(&mut extent.dirty, bits);
                    clear(&mut extent.touched, bits);
                    clear(&mut extent.flushing, bits);
                    marks.forget(number, bits);
                }
                WriteEnd::Nothing => {}
            }
        });
        if !self.waiting.is_empty() || self.settling {
            self.pump();
        }
    }

    /// Marks blocks of a write under way: what the peer may not have. Before anything completes.
    pub fn mark(&mut self, range: ByteRange) {
        let (first, end) = self.block_span(range);
        let marks = &mut self.marks;
        let extents = &mut self.extents;
        let map = &mut self.map;
        let poked = &mut self.poked;
        for_extents(first, end, |number, bits| {
            marks.forget(number, bits);
            match extents.get_mut(&number) {
                Some(extent) => {
                    set(&mut extent.dirty, bits);
                    extent.leaving = None;
                }
                None => {
                    map.set_later(number, bits);
                    *poked = true;
                }
            }
        });
    }

    fn is_logged(&self, range: ByteRange) -> bool {
        let (first, end) = self.block_span(range);
        let mut all = first < end && self.loading.is_none();
        for_extents(first, end, |number, _| {
            all &= self.logged.contains(&number) && self.extents.contains_key(&number);
        });
        all
    }

    fn activate(&mut self, range: ByteRange) {
        let (first, end) = self.block_span(range);
        let clock = self.clock;
        let extents = &mut self.extents;
        for_extents(first, end, |number, bits| {
            if let Some(extent) = extents.get_mut(&number) {
                extent.in_flight += 1;
                extent.last_use = clock;
                extent.leaving = None;
                set(&mut extent.busy, bits);
            }
        });
        self.settling = false;
    }

    /// Brings in the extents of waiting writes as far as there is room, in arrival order.
    pub(super) fn pump_waiting(&mut self) {
        self.room_needs_flush = false;
        if self.loading.is_some() {
            return;
        }
        while let Some(waiting) = self.waiting.get(self.placed).copied() {
            if !self.place(waiting.range) {
                break;
            }
            self.placed += 1;
            self.ready_stale = true;
        }
        if std::mem::take(&mut self.ready_stale) {
            self.let_ready();
        }
    }

    fn place(&mut self, range: ByteRange) -> bool {
        let (first, end) = self.block_span(range);
        let mut missing = 0;
        for_extents(first, end, |number, _| {
            missing += usize::from(!self.extents.contains_key(&number));
        });
        let room = (self.geometry.capacity_extents as usize).saturating_sub(self.extents.len());
        if missing > room {
            self.make_room(missing - room, first / EXTENT_BLOCKS, end.div_ceil(EXTENT_BLOCKS));
            return false;
        }
        let clock = self.clock;
        let logged = &self.logged;
        let mut new = false;
        let extents = &mut self.extents;
        for_extents(first, end, |number, _| {
            let extent = extents.entry(number).or_insert_with(|| Extent::new(clock));
            extent.reserved += 1;
            extent.leaving = None;
            new |= !logged.contains(&number);
        });
        self.log_wanted |= new;
        true
    }

    /// Writes whose extents are all durable begin, wherever they stand in the queue.
    fn let_ready(&mut self) {
        let placed: Vec<Waiting> = self.waiting.drain(..self.placed).collect();
        let mut left = Vec::new();
        for waiting in placed {
            if !self.is_logged(waiting.range) {
                left.push(waiting);
                continue;
            }
            let (first, end) = self.block_span(waiting.range);
            let extents = &mut self.extents;
            for_extents(first, end, |number, _| {
                if let Some(extent) = extents.get_mut(&number) {
                    extent.reserved = extent.reserved.saturating_sub(1);
                }
            });
            self.activate(waiting.range);
            self.ready.push_back(waiting.ticket);
        }
        self.placed = left.len();
        for waiting in left.into_iter().rev() {
            self.waiting.push_front(waiting);
        }
    }

    /// Cold extents begin to leave, the longest unused first; not those of the extents wanted.
    fn make_room(&mut self, missing: usize, keep_first: u64, keep_end: u64) {
        let still = |number: &&u32| self.extents.get(*number).is_some_and(|e| e.leaving.is_some());
        let leaving = self.leaving.iter().filter(still).count();
        if leaving >= missing {
            return;
        }
        let wanted = |number: u32| (keep_first..keep_end).contains(&u64::from(number));
        let mut cold: Vec<(u64, u32)> = self
            .extents
            .iter()
            .filter(|(number, e)| e.is_idle() && e.leaving.is_none() && !wanted(**number))
            .map(|(number, e)| (e.last_use, *number))
            .collect();
        cold.sort_unstable();
        let ready: Vec<u32> = cold
            .iter()
            .map(|(_, number)| *number)
            .filter(|number| self.extents.get(number).is_some_and(|e| !e.is_touched()))
            .take(missing.max(LEAVE_TOGETHER).min(self.geometry.capacity_extents as usize / 4 + 1))
            .collect();
        if ready.len() + leaving < missing && ready.len() < cold.len() {
            self.room_needs_flush = true;
        }
        for number in ready {
            self.begin_leaving(number);
        }
    }

    /// The extent's marks go into its page; it leaves when they are durable there.
    fn begin_leaving(&mut self, number: u32) {
        let Some(extent) = self.extents.get_mut(&number) else {
            return;
        };
        let dirty = std::mem::replace(&mut extent.dirty, [0; EXTENT_WORDS]);
        let version = self.map.merge(number, &dirty);
        if let Some(extent) = self.extents.get_mut(&number) {
            extent.leaving = Some(version);
            self.leaving.insert(number);
        }
    }

    /// Extents whose marks are durable in the map leave; true if one did.
    pub(super) fn pump_retiring(&mut self) -> bool {
        if self.settling || self.loading.is_some() {
            self.settle_more();
        }
        let before = self.extents.len();
        let (extents, map) = (&mut self.extents, &self.map);
        // One that was wanted again is not leaving any more.
        self.leaving.retain(|number| {
            let Some((extent, version)) = extents.get(number).and_then(|e| Some((e, e.leaving?))) else {
                return false;
            };
            let stays = !extent.is_idle() || extent.is_touched() || !is_clear(&extent.dirty);
            let goes = !stays && map.is_durable(place_in_page(*number).0, version);
            if goes {
                extents.remove(number);
            }
            !goes
        });
        let gone = self.extents.len() < before;
        self.log_wanted |= gone && (self.settling || self.cooling);
        self.cooling &= !self.leaving.is_empty();
        gone
    }

    fn settle_more(&mut self) {
        let idle: Vec<u32> = self
            .extents
            .iter()
            .filter(|(_, e)| e.is_idle() && !e.is_touched() && e.leaving.is_none())
            .map(|(number, _)| *number)
            .collect();
        for number in idle {
            self.begin_leaving(number);
        }
    }

    /// Idle: every extent leaves that can. Ends with [`Self::is_settled`] when nothing is touched or in flight.
    pub fn settle(&mut self) {
        self.settling = true;
        if self.extents.is_empty() && !self.logged.is_empty() {
            self.log_wanted = true;
        }
        self.pump();
    }

    /// A moment of [`Self::cool`]: grows with each write.
    pub const fn clock(&self) -> u64 {
        self.clock
    }

    /// Extents that no write wanted since `before` begin to leave, also while others are written: what a crash
    /// marks stays small. True: some of them cannot before a flush of both copies.
    pub fn cool(&mut self, before: u64) -> bool {
        let is_cold = |e: &Extent| e.is_idle() && e.leaving.is_none() && e.last_use < before;
        let touched = self.extents.values().any(|e| is_cold(e) && e.is_touched());
        let cold: Vec<u32> = self
            .extents
            .iter()
            .filter(|(_, e)| is_cold(e) && !e.is_touched())
            .map(|(number, _)| *number)
            .collect();
        self.cooling |= !cold.is_empty();
        for number in cold {
            self.begin_leaving(number);
        }
        self.pump();
        touched
    }

    /// The log on disk is empty and nothing is on its way.
    pub fn is_settled(&self) -> bool {
        self.extents.is_empty() && self.logged.is_empty() && self.waiting.is_empty() && !self.log_writing
    }

    /// One block of the log for everyone who waits.
    pub(super) fn pump_log(&mut self) {
        if !self.log_wanted || self.log_writing || !self.begun {
            return;
        }
        self.log_wanted = false;
        let extents: Vec<u32> = self.extents.keys().copied().collect();
        let seq = self.next_seq;
        self.next_seq += 1;
        let slot = seq % u64::from(self.geometry.log_slots);
        // From now on either block may be the one a crash leaves: only what both name is logged.
        self.logged.retain(|number| self.extents.contains_key(number));
        let block = LogBlock { seq, proven: self.proven, extents: extents.clone() };
        let bytes = log_block::encode(self.instance, self.life, slot, &block);
        let offset_bytes = self.geometry.placement.log_slot_offset(slot);
        self.log_writing = true;
        self.push_op(OpKind::Log { seq, extents }, MetaOp::Write { offset_bytes, bytes });
    }

    pub(super) fn log_written(&mut self, _seq: u64, extents: Vec<u32>) {
        self.log_writing = false;
        self.logged = extents.into_iter().collect();
        self.ready_stale = true;
        // An extent that left while the block was written comes back only by another block.
        let settled = self.settling && self.extents.is_empty() && !self.logged.is_empty();
        self.log_wanted |= settled;
    }
}
