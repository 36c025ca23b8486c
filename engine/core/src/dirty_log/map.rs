//! The dirty map in memory: counts for every page, bits for the pages in use, and what is durable of both.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    DirtyLog, EXTENT_WORDS, ExtentBits, LogGeometry, MetaOp, OpKind, count, is_clear, place_in_page, set,
};
use crate::format::map_page::{
    COUNT_FULL, PAGE_BLOCKS, PAGE_EXTENTS, PAGE_WORDS, SUMMARY_COUNTS, decode_page, decode_summary,
    encode_page, encode_summary,
};

/// The bits of one page.
pub(super) type PageBits = [u64; PAGE_WORDS];

/// Pages kept in memory beyond those being written.
const PAGES_MAX: usize = 256;
/// Pages read at once.
const READS_MAX: usize = 8;
/// Page and summary writes at once.
const WRITES_MAX: usize = 32;
/// Pages of the peer's marks taken in before they are in the map.
const MERGES_MAX: usize = 64;

#[derive(Debug)]
struct Page {
    bits: Box<PageBits>,
    /// Of the newest change.
    version: u64,
    /// Of the newest durable write.
    durable: u64,
    last_use: u64,
}

/// Pages and summary.
#[derive(Debug)]
pub(super) struct Map {
    blocks: u64,
    /// Marked blocks of each page, as in memory.
    counts: Vec<u16>,
    /// As in each page's newest durable write; [`COUNT_FULL`] needs no page.
    durable: Vec<u16>,
    /// As in the newest durable summary.
    on_disk: Vec<u16>,
    total: u64,
    /// Pages with marks in each summary block: who looks for marks skips what has none.
    groups: Vec<u32>,
    pages: BTreeMap<u64, Page>,
    changed: BTreeSet<u64>,
    wanted: BTreeSet<u64>,
    reading: BTreeSet<u64>,
    /// Page -> version being written.
    writing: BTreeMap<u64, u64>,
    summary_changed: BTreeSet<u64>,
    /// Block -> counts being written.
    summary_writing: BTreeMap<u64, Vec<u16>>,
    /// Marks that wait for their page.
    later: BTreeMap<u32, ExtentBits>,
    /// The peer's marks that wait for their page.
    merges: BTreeMap<u64, Box<PageBits>>,
    pub(super) floor: u64,
    next_counter: u64,
    version: u64,
    /// Grows when everything changes at once: writes of an earlier round say nothing about the map.
    round: u64,
    clock: u64,
}

impl Map {
    pub(super) fn new(geometry: &LogGeometry, floor: u64, next_counter: u64) -> Self {
        let blocks = geometry.size_bytes.div_ceil(u64::from(geometry.block_bytes));
        let pages = usize::try_from(blocks.div_ceil(PAGE_BLOCKS)).unwrap_or(usize::MAX);
        Self {
            blocks,
            counts: vec![0; pages],
            durable: vec![0; pages],
            on_disk: vec![0; pages],
            total: 0,
            groups: vec![0; pages.div_ceil(SUMMARY_COUNTS as usize)],
            pages: BTreeMap::new(),
            changed: BTreeSet::new(),
            wanted: BTreeSet::new(),
            reading: BTreeSet::new(),
            writing: BTreeMap::new(),
            summary_changed: BTreeSet::new(),
            summary_writing: BTreeMap::new(),
            later: BTreeMap::new(),
            merges: BTreeMap::new(),
            floor,
            // What is written from now on must never count as older than the floor.
            next_counter: next_counter.max(floor),
            version: 1,
            round: 0,
            clock: 0,
        }
    }

    pub(super) const fn page_count(&self) -> u64 {
        self.counts.len() as u64
    }

    pub(super) const fn summary_blocks(&self) -> u64 {
        (self.counts.len() as u64).div_ceil(SUMMARY_COUNTS)
    }

    pub(super) const fn total(&self) -> u64 {
        self.total
    }

    pub(super) const fn next_counter(&self) -> u64 {
        self.next_counter
    }

    /// Blocks of the volume in a page.
    fn valid(&self, page: u64) -> u64 {
        self.blocks.saturating_sub(page * PAGE_BLOCKS).min(PAGE_BLOCKS)
    }

    pub(super) fn count(&self, page: u64) -> u64 {
        self.counts.get(at(page)).copied().map_or(0, u64::from)
    }

    fn set_count(&mut self, page: u64, new: u64) {
        if let Some(own) = self.counts.get_mut(at(page)) {
            self.total = self.total + new - u64::from(*own);
            let group = &mut self.groups[at(page / SUMMARY_COUNTS)];
            *group = *group + u32::from(new > 0) - u32::from(*own > 0);
            *own = u16::try_from(new).unwrap_or(COUNT_FULL);
        }
    }

    /// The count as it stands on disk.
    fn coded(&self, page: u64) -> u16 {
        let own = self.count(page);
        if own > 0 && own == self.valid(page) { COUNT_FULL } else { u16::try_from(own).unwrap_or(COUNT_FULL) }
    }

    /// The page's bits, if they are known without reading.
    pub(super) fn bits(&mut self, page: u64) -> Option<Box<PageBits>> {
        self.clock += 1;
        if let Some(own) = self.pages.get_mut(&page) {
            own.last_use = self.clock;
            return Some(own.bits.clone());
        }
        let own = self.count(page);
        if own == 0 {
            return Some(Box::new([0; PAGE_WORDS]));
        }
        (own == self.valid(page)).then(|| self.full(page))
    }

    fn full(&self, page: u64) -> Box<PageBits> {
        let valid = self.valid(page);
        let mut bits = Box::new([0; PAGE_WORDS]);
        for (word, first) in bits.iter_mut().zip((0..).step_by(64)) {
            *word = match valid.saturating_sub(first) {
                0 => 0,
                left @ 1..64 => (1 << left) - 1,
                _ => u64::MAX,
            };
        }
        bits
    }

    /// The page's bits, if they are in memory.
    pub(super) fn known(&self, page: u64) -> Option<&PageBits> {
        self.pages.get(&page).map(|own| &*own.bits)
    }

    /// Every block of the page is marked.
    pub(super) fn is_full(&self, page: u64) -> bool {
        self.count(page) == self.valid(page)
    }

    /// Asks for a page that must be read.
    pub(super) fn want(&mut self, page: u64) {
        if !self.reading.contains(&page) {
            self.wanted.insert(page);
        }
    }

    /// The page in memory, to be changed; `None` when it must be read first (and is asked for).
    fn change(&mut self, page: u64) -> Option<&mut Page> {
        if !self.pages.contains_key(&page) {
            let Some(bits) = self.bits(page) else {
                self.want(page);
                return None;
            };
            let (version, last_use) = (0, self.clock);
            self.pages.insert(page, Page { bits, version, durable: 0, last_use });
        }
        self.version += 1;
        self.changed.insert(page);
        let (version, clock) = (self.version, self.clock);
        let own = self.pages.get_mut(&page)?;
        own.version = version;
        own.last_use = clock;
        Some(own)
    }

    fn recount(&mut self, page: u64) {
        if let Some(own) = self.pages.get(&page) {
            let new = count(&own.bits[..]);
            self.set_count(page, new);
        }
    }

    /// Marks blocks of an extent, now or once its page is read; the version that holds them.
    pub(super) fn merge(&mut self, extent: u32, bits: &ExtentBits) -> u64 {
        if !is_clear(bits) {
            self.set_later(extent, bits);
            self.apply_later();
        }
        self.version
    }

    /// Marks blocks as soon as the page is there.
    pub(super) fn set_later(&mut self, extent: u32, bits: &ExtentBits) {
        set(self.later.entry(extent).or_insert([0; EXTENT_WORDS]), bits);
    }

    fn apply_later(&mut self) {
        for (extent, bits) in std::mem::take(&mut self.later) {
            let (page, first) = place_in_page(extent);
            match self.change(page) {
                Some(own) => {
                    for (word, other) in own.bits[first..first + EXTENT_WORDS].iter_mut().zip(&bits) {
                        *word |= other;
                    }
                    self.recount(page);
                }
                None => {
                    self.later.insert(extent, bits);
                }
            }
        }
        for (page, bits) in std::mem::take(&mut self.merges) {
            match self.change(page) {
                Some(own) => {
                    for (word, other) in own.bits.iter_mut().zip(bits.iter()) {
                        *word |= other;
                    }
                    self.recount(page);
                }
                None => {
                    self.merges.insert(page, bits);
                }
            }
        }
    }

    /// Clears blocks of an extent; false: the page must be read first.
    pub(super) fn clear(&mut self, extent: u32, bits: &ExtentBits) -> bool {
        let (page, first) = place_in_page(extent);
        if self.count(page) == 0 {
            return true;
        }
        let Some(own) = self.change(page) else {
            return false;
        };
        for (word, other) in own.bits[first..first + EXTENT_WORDS].iter_mut().zip(bits) {
            *word &= !other;
        }
        self.recount(page);
        true
    }

    /// Nothing of the page is marked any more; it need not be read for that.
    pub(super) fn clear_page(&mut self, page: u64) {
        if self.count(page) == 0 {
            return;
        }
        self.pages.remove(&page);
        self.wanted.remove(&page);
        self.set_count(page, 0);
        self.changed.insert(page);
    }

    /// Everything up to this version of the page is durable, and the summary says so.
    pub(super) fn is_durable(&self, page: u64, version: u64) -> bool {
        if self.waits_in(page) {
            return false;
        }
        let needed = self.pages.get(&page).map_or(0, |own| own.version.min(version));
        if self.pages.get(&page).is_some_and(|own| own.durable < needed) {
            return false;
        }
        if self.durable.get(at(page)).copied().unwrap_or(0) == 0 {
            return true;
        }
        let block = page / SUMMARY_COUNTS;
        let place = at(page % SUMMARY_COUNTS);
        let hides = self.summary_writing.get(&block).is_some_and(|counts| counts.get(place) == Some(&0));
        self.on_disk.get(at(page)).copied().unwrap_or(0) != 0 && !hides
    }

    /// Everything marked so far is durable.
    pub(super) fn all_durable(&self) -> bool {
        self.later.is_empty()
            && self.merges.is_empty()
            && self.changed.is_empty()
            && self.writing.is_empty()
            && self.summary_changed.is_empty()
            && self.summary_writing.is_empty()
    }

    pub(super) fn can_take_merge(&self) -> bool {
        self.merges.len() < MERGES_MAX && self.changed.len() < PAGES_MAX
    }

    pub(super) fn take_merge(&mut self, page: u64, mut bits: Box<PageBits>) {
        for (word, valid) in bits.iter_mut().zip(self.full(page).iter()) {
            *word &= valid;
        }
        if bits.iter().any(|word| *word != 0) {
            let own = self.merges.entry(page).or_insert_with(|| Box::new([0; PAGE_WORDS]));
            for (word, other) in own.iter_mut().zip(bits.iter()) {
                *word |= other;
            }
        }
    }

    /// Blocks marked that are not in a page yet.
    pub(super) fn waiting_marks(&self) -> u64 {
        let later: u64 = self.later.values().map(|bits| count(bits)).sum();
        later + self.merges.values().map(|bits| count(&bits[..])).sum::<u64>()
    }

    pub(super) fn has_waiting_marks(&self) -> bool {
        !self.later.is_empty() || !self.merges.is_empty()
    }

    /// Marks of a page that are not in it yet.
    pub(super) fn waiting_bits(&self, page: u64, into: &mut PageBits) {
        for (extent, bits) in self.later.range(extents_of_page(page)) {
            let (_, first) = place_in_page(*extent);
            for (word, other) in into[first..first + EXTENT_WORDS].iter_mut().zip(bits) {
                *word |= other;
            }
        }
        if let Some(bits) = self.merges.get(&page) {
            for (word, other) in into.iter_mut().zip(bits.iter()) {
                *word |= other;
            }
        }
    }

    /// The block is marked or waits to be; true where a page partly marked is not in memory.
    pub(super) fn is_marked(&self, block: u64) -> bool {
        let page = block / PAGE_BLOCKS;
        let bit = block % PAGE_BLOCKS;
        let has = |bits: &PageBits| bits[(bit / 64) as usize] >> (bit % 64) & 1 == 1;
        let mut waiting = [0; PAGE_WORDS];
        self.waiting_bits(page, &mut waiting);
        has(&waiting) || self.known(page).map_or(self.count(page) > 0, has)
    }

    pub(super) fn waits_in(&self, page: u64) -> bool {
        self.merges.contains_key(&page) || self.later.range(extents_of_page(page)).next().is_some()
    }

    /// The first page at or after `from` with marks in it or waiting for it.
    pub(super) fn next_marked(&self, from: u64) -> Option<u64> {
        let counted = self.next_counted(from);
        let first = extents_of_page(from).start;
        let later = self.later.range(first..).next().map(|(extent, _)| place_in_page(*extent).0);
        let merged = self.merges.range(from..).next().map(|(page, _)| *page);
        [counted, later, merged].into_iter().flatten().min()
    }

    fn next_counted(&self, from: u64) -> Option<u64> {
        let mut page = from;
        while page < self.page_count() {
            let group = page / SUMMARY_COUNTS;
            let end = ((group + 1) * SUMMARY_COUNTS).min(self.page_count());
            if self.groups[at(group)] > 0
                && let Some(found) = (page..end).find(|page| self.counts[at(*page)] > 0)
            {
                return Some(found);
            }
            page = end;
        }
        None
    }

    /// Every block is marked.
    pub(super) fn set_all(&mut self) {
        self.forget_pages();
        for page in 0..self.page_count() {
            self.set_count(page, self.valid(page));
            self.durable[at(page)] = COUNT_FULL;
        }
        self.summary_changed = (0..self.summary_blocks()).collect();
    }

    /// Nothing is marked; the floor makes it so on disk.
    pub(super) fn clear_all(&mut self, floor: u64) {
        self.forget_pages();
        self.floor = floor;
        self.counts.fill(0);
        self.groups.fill(0);
        self.durable.fill(0);
        self.total = 0;
        self.summary_changed.clear();
    }

    fn forget_pages(&mut self) {
        self.round += 1;
        // What is on its way may land after this: nothing on disk is relied upon until it is written again.
        self.on_disk.fill(0);
        self.pages.clear();
        self.changed.clear();
        self.wanted.clear();
        self.later.clear();
        self.merges.clear();
    }

    pub(super) fn page_read(&mut self, instance: u128, page: u64, round: u64, bytes: &[u8]) {
        self.reading.remove(&page);
        if round != self.round {
            return;
        }
        // Changed as a whole meanwhile: what was read is not the page any more.
        if self.pages.contains_key(&page) || self.count(page) == 0 || self.count(page) == self.valid(page) {
            return;
        }
        let (mut bits, seen) = decode_page(instance, page, self.floor, bytes);
        self.next_counter = self.next_counter.max(seen.saturating_add(1));
        for (word, valid) in bits.iter_mut().zip(self.full(page).iter()) {
            *word &= valid;
        }
        self.clock += 1;
        let last_use = self.clock;
        self.pages.insert(page, Page { bits, version: 0, durable: 0, last_use });
        self.recount(page);
        self.apply_later();
    }

    pub(super) fn page_written(&mut self, page: u64, count: u16, round: u64) {
        let Some(version) = self.writing.remove(&page) else {
            return;
        };
        if round != self.round {
            return;
        }
        if let Some(own) = self.pages.get_mut(&page) {
            own.durable = version;
        }
        self.durable[at(page)] = count;
        if self.on_disk[at(page)] != count {
            self.summary_changed.insert(page / SUMMARY_COUNTS);
        }
    }

    pub(super) fn summary_written(&mut self, block: u64, round: u64, counts: &[u16]) {
        self.summary_writing.remove(&block);
        if round != self.round {
            // What landed is of an earlier round: say it again.
            self.summary_changed.insert(block);
            return;
        }
        let first = at(block * SUMMARY_COUNTS);
        self.on_disk[first..first + counts.len()].copy_from_slice(counts);
        if self.counts_of(block) != counts {
            self.summary_changed.insert(block);
        }
    }

    fn counts_of(&self, block: u64) -> &[u16] {
        let first = at(block * SUMMARY_COUNTS).min(self.durable.len());
        let end = at((block + 1) * SUMMARY_COUNTS).min(self.durable.len());
        &self.durable[first..end]
    }

    pub(super) fn summary_read(&mut self, instance: u128, first_block: u64, bytes: &[u8]) {
        for (block, piece) in (first_block..).zip(bytes.chunks(crate::format::seal::BLOCK_LEN)) {
            let (counts, seen) = decode_summary(instance, block, self.floor, piece);
            self.next_counter = self.next_counter.max(seen.saturating_add(1));
            for (page, coded) in (block * SUMMARY_COUNTS..).zip(counts) {
                if page >= self.page_count() {
                    break;
                }
                let own = if coded == COUNT_FULL { self.valid(page) } else { u64::from(coded) };
                self.set_count(page, own.min(self.valid(page)));
                self.durable[at(page)] = coded;
                self.on_disk[at(page)] = coded;
            }
        }
    }

    fn next_reads(&mut self) -> Vec<u64> {
        let room = READS_MAX.saturating_sub(self.reading.len());
        let pages: Vec<u64> = self.wanted.iter().copied().take(room).collect();
        for page in &pages {
            self.wanted.remove(page);
            self.reading.insert(*page);
        }
        pages
    }

    fn next_page_write(&mut self, instance: u128) -> Option<(u64, u16, Vec<u8>)> {
        let page = loop {
            if self.writing.len() >= WRITES_MAX {
                return None;
            }
            let page = self.changed.iter().copied().find(|page| !self.writing.contains_key(page))?;
            self.changed.remove(&page);
            if self.count(page) > 0 {
                break page;
            }
            // What the summary calls empty is never read: the page on disk may hold what it wants.
            if let Some(own) = self.pages.get_mut(&page) {
                own.durable = own.version;
            }
            self.durable[at(page)] = 0;
            if self.on_disk[at(page)] != 0 {
                self.summary_changed.insert(page / SUMMARY_COUNTS);
            }
        };
        let coded = self.coded(page);
        let counter = self.next_counter;
        self.next_counter += 1;
        let own = self.pages.get(&page)?;
        let bytes = encode_page(instance, page, counter, &own.bits);
        self.writing.insert(page, own.version);
        Some((page, coded, bytes))
    }

    fn next_summary_write(&mut self, instance: u128) -> Option<(u64, Vec<u16>, Vec<u8>)> {
        if self.summary_writing.len() >= WRITES_MAX {
            return None;
        }
        let mut blocks = self.summary_changed.iter().copied();
        let block = blocks.find(|block| !self.summary_writing.contains_key(block))?;
        self.summary_changed.remove(&block);
        let counts = self.counts_of(block).to_vec();
        let counter = self.next_counter;
        self.next_counter += 1;
        let bytes = encode_summary(instance, block, counter, &counts);
        self.summary_writing.insert(block, counts.clone());
        Some((block, counts, bytes))
    }

    /// Pages that nobody needs in memory go, the longest unused first.
    fn evict(&mut self) {
        while self.pages.len() > PAGES_MAX {
            let oldest = self
                .pages
                .iter()
                .filter(|(page, _)| !self.changed.contains(page) && !self.writing.contains_key(page))
                .min_by_key(|(_, own)| own.last_use)
                .map(|(page, _)| *page);
            let Some(page) = oldest else {
                return;
            };
            self.pages.remove(&page);
        }
    }
}

impl DirtyLog {
    /// Reads, page writes, then summary writes: a summary says only what durable pages hold.
    pub(super) fn pump_map(&mut self) {
        self.map.apply_later();
        for page in self.map.next_reads() {
            let offset_bytes = self.geometry.placement.page_offset(page);
            let kind = OpKind::PageRead { page, round: self.map.round };
            self.push_op(kind, MetaOp::Read { offset_bytes, length_bytes: 4096 });
        }
        while let Some((page, coded, bytes)) = self.map.next_page_write(self.instance) {
            let offset_bytes = self.geometry.placement.page_offset(page);
            let kind = OpKind::PageWrite { page, count: coded, round: self.map.round };
            self.push_op(kind, MetaOp::Write { offset_bytes, bytes });
        }
        while let Some((block, counts, bytes)) = self.map.next_summary_write(self.instance) {
            let offset_bytes = self.geometry.placement.summary_block_offset(block);
            let kind = OpKind::SummaryWrite { block, round: self.map.round, counts };
            self.push_op(kind, MetaOp::Write { offset_bytes, bytes });
        }
        self.map.evict();
    }

    /// Proven blocks are cleared as soon as their page is there.
    pub(super) fn pump_clears(&mut self) {
        for page in std::mem::take(&mut self.marks.proven.pages) {
            self.map.clear_page(page);
        }
        for (extent, bits) in std::mem::take(&mut self.marks.proven.extents) {
            if !self.map.clear(extent, &bits) {
                self.marks.proven.extents.insert(extent, bits);
            }
        }
    }
}

/// The numbers of a page's extents.
pub(super) fn extents_of_page(page: u64) -> std::ops::Range<u32> {
    let number = |page: u64| u32::try_from(page.saturating_mul(PAGE_EXTENTS)).unwrap_or(u32::MAX);
    number(page)..number(page.saturating_add(1))
}

fn at(page: u64) -> usize {
    usize::try_from(page).unwrap_or(usize::MAX)
}
