//! What `create` writes, and what a look at a disk at rest tells.

use duplex_core::format::placement::{LOG_SLOTS, MetaPlacement};
use duplex_core::format::record::{CopyRecord, ServerRecord};
use duplex_core::format::superblock::{self, Superblock};
use duplex_core::ids::BootId;

use super::disk::Disk;

/// Granularity of the simulated volumes.
const BLOCK_BYTES: u32 = 4096;

fn placement(size_bytes: u64) -> MetaPlacement {
    MetaPlacement::for_size(size_bytes, BLOCK_BYTES, LOG_SLOTS)
}

/// A fresh blank copy, as offsets in the metadata area and bytes.
pub fn blank(size_bytes: u64, boot_id: BootId, instance: u128) -> Vec<(u64, Vec<u8>)> {
    let superblock = Superblock {
        instance,
        features: 0,
        placement: placement(size_bytes),
        data_offset_bytes: 0,
        server: ServerRecord::fresh(boot_id),
        copy: CopyRecord::blank(size_bytes, BLOCK_BYTES, BLOCK_BYTES),
        capacity_bytes: size_bytes,
        log_life: 1,
        map_floor: 1,
    };
    let bytes = superblock::encode(&superblock, 0, 1).expect("a fresh superblock fits");
    vec![(0, bytes)]
}

/// A superblock slot begins here.
pub const fn is_superblock(offset_bytes: u64) -> bool {
    offset_bytes < 8192
}

/// A block of the activity log begins here.
pub fn is_log(offset_bytes: u64, size_bytes: u64) -> bool {
    let placement = placement(size_bytes);
    (placement.log_offset_bytes..placement.head_bytes()).contains(&offset_bytes)
}

/// The record at rest says that its server runs alone.
pub fn is_solo(disk: &Disk) -> bool {
    let selected = superblock::select(&disk.meta(0, 1), &disk.meta(1, 1));
    selected.is_ok_and(|selected| selected.superblock.server.era.is_solo())
}
