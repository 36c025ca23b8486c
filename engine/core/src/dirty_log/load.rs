//! Start: the newest block of the log, the summary, and the active extents of the last life into the map.

use super::extents::Extent;
use super::{DirtyLog, EXTENT_WORDS, LogGeometry, MetaOp, OpKind};
use crate::format::log_block::{self, LogBlock};
use crate::format::map_page::EXTENT_BLOCKS;
use crate::format::seal::BLOCK_LEN;
use crate::ids::Proven;

/// Blocks read in one operation: 64 KiB.
const READ_BLOCKS: u64 = 16;

/// What is still to be read.
#[derive(Debug, Default)]
pub(super) struct Loading {
    reads_left: usize,
    newest: Option<LogBlock>,
    merging: bool,
}

impl DirtyLog {
    /// Reads what an earlier life left. `map_floor` and `life` are the superblock's; `first_counter` is
    /// greater than every counter used so far.
    pub fn load(
        geometry: LogGeometry,
        instance: u128,
        life: u64,
        map_floor: u64,
        first_counter: u64,
    ) -> Self {
        let mut log = Self::empty(geometry, instance, life, map_floor, first_counter);
        let mut loading = Loading::default();
        let slots = u64::from(geometry.log_slots);
        let mut first_slot = 0;
        while first_slot < slots {
            let blocks = READ_BLOCKS.min(slots - first_slot);
            let offset_bytes = geometry.placement.log_slot_offset(first_slot);
            log.push_op(OpKind::LoadLog { first_slot }, read(offset_bytes, blocks));
            loading.reads_left += 1;
            first_slot += blocks;
        }
        let all = log.map.summary_blocks();
        let mut first_block = 0;
        while first_block < all {
            let blocks = READ_BLOCKS.min(all - first_block);
            let offset_bytes = geometry.placement.summary_block_offset(first_block);
            log.push_op(OpKind::LoadSummary { first_block }, read(offset_bytes, blocks));
            loading.reads_left += 1;
            first_block += blocks;
        }
        log.loading = Some(loading);
        log.begun = false;
        log
    }

    /// Everything is read, and what was in flight is marked durably.
    pub const fn is_loaded(&self) -> bool {
        self.loading.is_none()
    }

    /// Extents that were active at the end of the last life.
    pub const fn replayed_extents(&self) -> u64 {
        self.replayed_extents
    }

    /// How far the last life's log was proven.
    pub const fn replayed_proven(&self) -> Option<Proven> {
        self.replayed_proven
    }

    /// The last life left no extent active.
    pub const fn log_was_empty(&self) -> bool {
        self.log_was_empty
    }

    /// The owner's superblock with this life is durable: blocks of the last one count no more.
    pub fn begin_life(&mut self, life: u64) {
        debug_assert!(self.is_loaded(), "a life begins after the last one is replayed");
        self.life = life;
        self.next_seq = 1;
        self.logged.clear();
        self.begun = true;
        self.log_wanted |= !self.extents.is_empty();
        self.pump();
    }

    pub(super) fn log_slots_read(&mut self, first_slot: u64, bytes: &[u8]) {
        let slots = u64::from(self.geometry.log_slots);
        let (instance, life) = (self.instance, self.life);
        let Some(loading) = self.loading.as_mut() else {
            return;
        };
        loading.reads_left -= 1;
        for (slot, piece) in (first_slot..slots).zip(bytes.chunks(BLOCK_LEN)) {
            if let Some(block) = log_block::decode(instance, life, slot, slots, piece)
                && loading.newest.as_ref().is_none_or(|newest| newest.seq < block.seq)
            {
                loading.newest = Some(block);
            }
        }
    }

    pub(super) fn summary_blocks_read(&mut self, _first_block: u64, _bytes: &[u8]) {
        if let Some(loading) = self.loading.as_mut() {
            loading.reads_left -= 1;
        }
    }

    /// All is read: every active extent is marked whole, because nobody knows which of its writes landed.
    pub(super) fn pump_load(&mut self) {
        let blocks = self.blocks();
        let Some(loading) = self.loading.as_mut() else {
            return;
        };
        if loading.reads_left > 0 {
            return;
        }
        if !loading.merging {
            loading.merging = true;
            let newest = loading.newest.take();
            self.replayed_proven = newest.as_ref().map(|block| block.proven);
            let active = newest.map(|block| block.extents).unwrap_or_default();
            self.log_was_empty = active.is_empty();
            self.replayed_extents = active.len() as u64;
            for number in active {
                let first = u64::from(number) * EXTENT_BLOCKS;
                if first >= blocks {
                    continue;
                }
                let mut extent = Extent::new(0);
                let valid = (blocks - first).min(EXTENT_BLOCKS);
                extent.dirty = ones(valid);
                self.extents.insert(number, extent);
            }
        }
    }

    /// The replay ends when every extent of the last life left into the map.
    pub(super) fn finish_load(&mut self) {
        if self.extents.is_empty() && self.loading.as_ref().is_some_and(|loading| loading.merging) {
            self.loading = None;
        }
    }
}

fn ones(blocks: u64) -> super::ExtentBits {
    let mut bits = [0; EXTENT_WORDS];
    for block in 0..blocks {
        bits[(block / 64) as usize] |= 1 << (block % 64);
    }
    bits
}

fn read(offset_bytes: u64, blocks: u64) -> MetaOp {
    let length_bytes = u32::try_from(blocks * BLOCK_LEN as u64).unwrap_or(u32::MAX);
    MetaOp::Read { offset_bytes, length_bytes }
}
