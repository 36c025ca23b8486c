//! Where everything stands in the metadata area.
//!
//! The area has a head (superblocks, activity log) below 1 MiB and a tail (summary, pages) from
//! [`TAIL_OFFSET_BYTES`] on. With internal metadata the head lies before the data and the store puts the
//! tail behind it; a metadata file holds the area as it is, with a hole between both.

use super::map_page::{EXTENT_BLOCKS, PAGE_EXTENTS, SUMMARY_COUNTS};
use super::seal::BLOCK_LEN;
use crate::limits::{DATA_OFFSET_BYTES, VOLUME_MAX_BYTES};

/// The tail's first byte in the metadata area.
pub const TAIL_OFFSET_BYTES: u64 = DATA_OFFSET_BYTES;
/// Ring slots unless said otherwise.
pub const LOG_SLOTS: u32 = 64;
/// Fewest ring slots: the newest block is never overwritten by the next one.
pub const LOG_SLOTS_MIN: u32 = 2;
/// Most ring slots: the head ends below the data.
pub const LOG_SLOTS_MAX: u32 = 254;

const BLOCK: u64 = BLOCK_LEN as u64;

/// Offsets and sizes in the metadata area.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MetaPlacement {
    /// First byte of the log's ring.
    pub log_offset_bytes: u64,
    /// Slots of the ring, a block each.
    pub log_slots: u32,
    /// First byte of the summary.
    pub summary_offset_bytes: u64,
    /// Blocks of the summary.
    pub summary_blocks: u64,
    /// First byte of the pages.
    pub pages_offset_bytes: u64,
    /// Pages of the map.
    pub pages: u64,
}

impl MetaPlacement {
    /// The placement for a volume. Sizes over [`VOLUME_MAX_BYTES`] count as that; slots are held within
    /// their bounds.
    pub fn for_size(size_bytes: u64, block_bytes: u32, log_slots: u32) -> Self {
        let log_slots = log_slots.clamp(LOG_SLOTS_MIN, LOG_SLOTS_MAX);
        let page_bytes = u64::from(block_bytes.max(512)) * EXTENT_BLOCKS * PAGE_EXTENTS;
        let pages = size_bytes.min(VOLUME_MAX_BYTES).div_ceil(page_bytes).max(1);
        let summary_blocks = pages.div_ceil(SUMMARY_COUNTS);
        Self {
            log_offset_bytes: 2 * BLOCK,
            log_slots,
            summary_offset_bytes: TAIL_OFFSET_BYTES,
            summary_blocks,
            pages_offset_bytes: TAIL_OFFSET_BYTES + summary_blocks * BLOCK,
            pages,
        }
    }

    /// Bytes of the head: superblocks and log.
    pub const fn head_bytes(&self) -> u64 {
        self.log_offset_bytes + self.log_slots as u64 * BLOCK
    }

    /// Bytes of the tail: summary and pages.
    pub const fn tail_bytes(&self) -> u64 {
        (self.summary_blocks + self.pages) * BLOCK
    }

    /// One past the area's last byte.
    pub const fn total_bytes(&self) -> u64 {
        TAIL_OFFSET_BYTES + self.tail_bytes()
    }

    pub(crate) const fn log_slot_offset(&self, slot: u64) -> u64 {
        self.log_offset_bytes + slot * BLOCK
    }

    pub(crate) const fn summary_block_offset(&self, block: u64) -> u64 {
        self.summary_offset_bytes + block * BLOCK
    }

    pub(crate) const fn page_offset(&self, page: u64) -> u64 {
        self.pages_offset_bytes + page * BLOCK
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_volume_has_a_summary_of_a_megabyte() {
        let placement = MetaPlacement::for_size(VOLUME_MAX_BYTES, 4096, LOG_SLOTS);
        assert_eq!(placement.pages, 541_201);
        assert_eq!(placement.summary_blocks, 273);
        assert!(placement.head_bytes() <= DATA_OFFSET_BYTES);
        assert_eq!(placement.page_offset(placement.pages), placement.total_bytes());
    }

    #[test]
    fn hostile_sizes_are_bounded() {
        let placement = MetaPlacement::for_size(u64::MAX, 0, u32::MAX);
        assert!(placement.head_bytes() <= DATA_OFFSET_BYTES);
        assert!(placement.total_bytes() < 1 << 40);
        assert_eq!(MetaPlacement::for_size(0, 4096, 0).pages, 1);
    }
}
