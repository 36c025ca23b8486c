//! Which blocks may differ between the copies, durably: dirty map and activity log.
//!
//! The **activity log** names the extents that may have writes in flight. It is written before any copy can
//! get a write (G1), one block for all that wait. The **dirty map** has a bit for each block; the bits of an
//! active extent live in memory and reach the map when the extent leaves the log. Orders that must hold:
//!
//! - an extent is durable in the log before a write to it begins;
//! - an extent leaves the log only when nothing is in flight on it, everything written to it was flushed on
//!   both copies or is marked, and its marks are durable: page first, then the summary that says that the
//!   page exists;
//! - the summary calls a page partly dirty only after that page is durable; one it calls empty or full is not read;
//! - a bit is cleared only for a block that was copied, then covered by a flush of both copies, and not
//!   marked or lost in between (G2).
//!
//! Rooms: `extents` (the active extents, begin and end of writes, group commit), `flushes` (what a flush of
//! both copies proves), `map` (pages and summary), `load` (replay), `resync` (finding, sending, merging marks).

mod extents;
mod flushes;
mod load;
mod map;
#[cfg(test)]
mod model_test;
mod resync;
#[cfg(test)]
mod scale_test;

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};

use crate::format::log_block::LOG_EXTENTS_MAX;
use crate::format::map_page::{EXTENT_BLOCKS, PAGE_BLOCKS, PAGE_BYTES, PAGE_EXTENTS};
use crate::format::placement::MetaPlacement;
use crate::ids::{ByteRange, Proven};

use extents::Extent;
use load::Loading;
use map::Map;

/// Active extents of a volume: 3.5 GiB of scattered writes without leaving the log.
pub const CAPACITY_EXTENTS: u32 = 900;
/// Fewest: a write may span this many.
pub const CAPACITY_MIN: u32 = 4;

const EXTENT_WORDS: usize = (EXTENT_BLOCKS / 64) as usize;

/// The bits of one extent.
pub(crate) type ExtentBits = [u64; EXTENT_WORDS];

/// Sizes and places.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LogGeometry {
    /// Of the volume.
    pub size_bytes: u64,
    /// One bit each.
    pub block_bytes: u32,
    /// Slots of the log's ring.
    pub log_slots: u32,
    /// Extents active at once.
    pub capacity_extents: u32,
    /// Where everything stands.
    pub placement: MetaPlacement,
}

/// The owner's name for a write that waits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Ticket(pub u64);

/// A flush of both copies under way.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FlushMark(u64);

/// How a write ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum WriteEnd {
    /// Done on both copies.
    Both,
    /// The peer's copy may not have it.
    OnlyHere,
    /// It reached no copy.
    Nothing,
}

/// An operation on the metadata area.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum MetaOp {
    /// The bytes come back.
    Read {
        /// Multiple of 4096.
        offset_bytes: u64,
        /// Multiple of 4096, at most 64 KiB.
        length_bytes: u32,
    },
    /// Durable when done.
    Write {
        /// Multiple of 4096.
        offset_bytes: u64,
        /// Whole blocks.
        bytes: Vec<u8>,
    },
}

/// The next marked blocks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NextDirty {
    /// A run of marked blocks.
    Run {
        /// The first.
        first_block: u64,
        /// How many.
        blocks: u64,
    },
    /// A page is being read: ask again.
    Loading,
    /// None from there on.
    End,
}

/// The next page with marks.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum NextPage {
    /// A page.
    Page {
        /// Its number.
        index: u64,
        /// Its bits, least significant bit first.
        bits: Box<[u8; PAGE_BYTES]>,
    },
    /// A page is being read: ask again.
    Loading,
    /// None from there on.
    End,
}

/// A page of marks that this volume cannot have.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("a page of marks for page {index} with {bytes} bytes does not fit this volume")]
pub struct BadPage {
    /// Its number.
    pub index: u64,
    /// Its length.
    pub bytes: usize,
}

#[derive(Clone, PartialEq, Eq, Debug)]
enum OpKind {
    Log { seq: u64, extents: Vec<u32> },
    PageRead { page: u64, round: u64 },
    PageWrite { page: u64, count: u16, round: u64 },
    SummaryWrite { block: u64, round: u64, counts: Vec<u16> },
    LoadLog { first_slot: u64 },
    LoadSummary { first_block: u64 },
}

/// Dirty map and activity log of one volume.
#[derive(Debug)]
pub struct DirtyLog {
    geometry: LogGeometry,
    instance: u128,
    life: u64,
    next_seq: u64,
    proven: Proven,
    loading: Option<Loading>,
    /// The life is this process's own: only then a block of the log may be written.
    begun: bool,
    replayed_extents: u64,
    replayed_proven: Option<Proven>,
    log_was_empty: bool,
    /// Active extents: those in the log, and those on the way in or out.
    extents: BTreeMap<u32, Extent>,
    /// What the newest durable block of the log names, and the one being written too.
    logged: BTreeSet<u32>,
    log_writing: bool,
    /// The set in memory differs from the log and someone wants it there.
    log_wanted: bool,
    waiting: VecDeque<extents::Waiting>,
    /// So many of the first that wait have their extents brought in.
    placed: usize,
    /// More was logged or placed: some that wait may be ready.
    ready_stale: bool,
    /// Those that may be leaving.
    leaving: BTreeSet<u32>,
    ready: VecDeque<Ticket>,
    /// The front waiter needs room that only a flush makes.
    room_needs_flush: bool,
    settling: bool,
    /// Cold extents are leaving while others are written.
    cooling: bool,
    /// Something changed that nobody pumped for.
    poked: bool,
    clock: u64,
    map: Map,
    marks: flushes::Marks,
    ops: VecDeque<(u64, MetaOp)>,
    in_flight: HashMap<u64, OpKind>,
    next_op: u64,
    failed: Option<i32>,
}

impl DirtyLog {
    /// The log of a copy whose metadata was just written anew: nothing to read.
    pub fn fresh(geometry: LogGeometry, instance: u128, life: u64, first_counter: u64) -> Self {
        Self::empty(geometry, instance, life, first_counter, first_counter)
    }

    fn empty(mut geometry: LogGeometry, instance: u128, life: u64, floor: u64, first_counter: u64) -> Self {
        let most = u32::try_from(LOG_EXTENTS_MAX).unwrap_or(CAPACITY_MIN);
        geometry.capacity_extents = geometry.capacity_extents.clamp(CAPACITY_MIN, most);
        Self {
            geometry,
            instance,
            life,
            next_seq: 1,
            proven: Proven::default(),
            loading: None,
            begun: true,
            replayed_extents: 0,
            replayed_proven: None,
            log_was_empty: true,
            extents: BTreeMap::new(),
            logged: BTreeSet::new(),
            log_writing: false,
            log_wanted: false,
            waiting: VecDeque::new(),
            placed: 0,
            ready_stale: false,
            leaving: BTreeSet::new(),
            ready: VecDeque::new(),
            room_needs_flush: false,
            settling: false,
            cooling: false,
            poked: false,
            clock: 0,
            map: Map::new(&geometry, floor, first_counter),
            marks: flushes::Marks::default(),
            ops: VecDeque::new(),
            in_flight: HashMap::new(),
            next_op: 1,
            failed: None,
        }
    }

    /// The next operation to do on the metadata area.
    pub fn poll_op(&mut self) -> Option<(u64, MetaOp)> {
        if self.poked && self.failed.is_none() {
            self.poked = false;
            self.pump();
        }
        self.ops.pop_front()
    }

    /// An operation ended; reads bring their bytes, failures their errno.
    pub fn op_done(&mut self, op: u64, outcome: Result<Vec<u8>, i32>) {
        let Some(kind) = self.in_flight.remove(&op) else {
            return;
        };
        let bytes = match outcome {
            Ok(bytes) => bytes,
            Err(errno) => {
                self.failed.get_or_insert(errno);
                return;
            }
        };
        match kind {
            OpKind::Log { seq, extents } => self.log_written(seq, extents),
            OpKind::PageRead { page, round } => self.map.page_read(self.instance, page, round, &bytes),
            OpKind::PageWrite { page, count, round } => self.map.page_written(page, count, round),
            OpKind::SummaryWrite { block, round, counts } => self.map.summary_written(block, round, &counts),
            OpKind::LoadLog { first_slot } => self.log_slots_read(first_slot, &bytes),
            OpKind::LoadSummary { first_block } => {
                self.map.summary_read(self.instance, first_block, &bytes);
                self.summary_blocks_read(first_block, &bytes);
            }
        }
        self.pump();
    }

    /// Errno of the first operation that failed: the copy is to be latched.
    pub const fn failed(&self) -> Option<i32> {
        self.failed
    }

    /// An operation does not answer: nothing more is marked, as if it had failed.
    pub fn fail(&mut self, errno: i32) {
        self.failed.get_or_insert(errno);
    }

    /// How far both copies are proven: travels in every block of the log.
    pub fn set_proven(&mut self, proven: Proven) {
        self.proven = self.proven.max(proven);
    }

    fn push_op(&mut self, kind: OpKind, op: MetaOp) {
        let id = self.next_op;
        self.next_op += 1;
        self.in_flight.insert(id, kind);
        self.ops.push_back((id, op));
    }

    /// Everything that can go on goes on.
    fn pump(&mut self) {
        self.pump_load();
        self.pump_retiring();
        self.finish_load();
        self.pump_waiting();
        // Room that was made without any write is there at once.
        while self.pump_retiring() {
            self.finish_load();
            self.pump_waiting();
        }
        self.pump_clears();
        self.pump_map();
        self.pump_log();
    }

    /// Blocks of the volume.
    fn blocks(&self) -> u64 {
        self.geometry.size_bytes.div_ceil(u64::from(self.geometry.block_bytes))
    }

    /// The blocks a range touches: first and one past the last, within the volume.
    fn block_span(&self, range: ByteRange) -> (u64, u64) {
        let block = u64::from(self.geometry.block_bytes);
        let first = range.offset_bytes / block;
        let end = range.end_bytes().div_ceil(block).min(self.blocks());
        (first, end)
    }
}

/// Calls `each` with every extent of a block span and the bits of the span inside it.
fn for_extents(first: u64, end: u64, mut each: impl FnMut(u32, &ExtentBits)) {
    let mut block = first;
    while block < end {
        let extent = block / EXTENT_BLOCKS;
        let stop = ((extent + 1) * EXTENT_BLOCKS).min(end);
        let mut bits = [0; EXTENT_WORDS];
        for at in block..stop {
            let bit = at % EXTENT_BLOCKS;
            bits[(bit / 64) as usize] |= 1 << (bit % 64);
        }
        each(u32::try_from(extent).unwrap_or(u32::MAX), &bits);
        block = stop;
    }
}

fn set(bits: &mut ExtentBits, with: &ExtentBits) {
    for (word, other) in bits.iter_mut().zip(with) {
        *word |= other;
    }
}

fn clear(bits: &mut ExtentBits, with: &ExtentBits) {
    for (word, other) in bits.iter_mut().zip(with) {
        *word &= !other;
    }
}

fn is_clear(bits: &ExtentBits) -> bool {
    bits.iter().all(|word| *word == 0)
}

fn count(bits: &[u64]) -> u64 {
    bits.iter().map(|word| u64::from(word.count_ones())).sum()
}

/// The page of an extent and its first word there.
const fn place_in_page(extent: u32) -> (u64, usize) {
    let extent = extent as u64;
    (extent / PAGE_EXTENTS, (extent % PAGE_EXTENTS) as usize * EXTENT_WORDS)
}

const _: () = assert!(PAGE_BLOCKS == PAGE_EXTENTS * EXTENT_BLOCKS);
