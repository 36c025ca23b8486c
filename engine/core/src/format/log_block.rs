//! One block of the activity log: the whole set of extents that may have writes in flight.
//!
//! Why no block of an earlier life can come back: the life is part of every sector's checksum, so a
//! sector of another life never passes in this one. Within a life each sequence number is written once,
//! into slot `seq % slots`, and it is the counter of every sector: a torn block is a mix of two counters
//! and does not open. A new life begins only by a superblock that was written after the active extents of
//! the old one were durable in the map; until then the old life replays again and again, to the same end.

use super::seal::{Kind, PAYLOAD_LEN, Seal, read_u64};
use crate::ids::{Proven, Sequence};

const HEADER_LEN: usize = 64;
/// Most extents in a block.
pub const LOG_EXTENTS_MAX: usize = (PAYLOAD_LEN - HEADER_LEN) / 4;

/// What a block of the log holds.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LogBlock {
    /// Grows by one with each block of a life.
    pub seq: u64,
    /// Everything up to here was flushed on both copies.
    pub proven: Proven,
    /// All active extents, at most [`LOG_EXTENTS_MAX`].
    pub extents: Vec<u32>,
}

fn seal(instance: u128, life: u64, slot: u64) -> Seal {
    Seal { kind: Kind::Log, index: slot, instance, life }
}

/// The block's bytes; extents beyond [`LOG_EXTENTS_MAX`] must not be there.
pub fn encode(instance: u128, life: u64, slot: u64, block: &LogBlock) -> Vec<u8> {
    debug_assert!(block.extents.len() <= LOG_EXTENTS_MAX, "the owner bounds the set");
    let mut payload = Vec::with_capacity(PAYLOAD_LEN);
    payload.extend(life.to_le_bytes());
    payload.extend(block.seq.to_le_bytes());
    payload.extend(block.proven.epoch.to_le_bytes());
    payload.extend(block.proven.seq.0.to_le_bytes());
    payload.extend((block.extents.len() as u64).to_le_bytes());
    payload.resize(HEADER_LEN, 0);
    payload.extend(block.extents.iter().flat_map(|extent| extent.to_le_bytes()));
    seal(instance, life, slot).seal(&payload, block.seq)
}

/// The block in `slot`, when it was written whole in this life.
pub fn decode(instance: u128, life: u64, slot: u64, slots: u64, bytes: &[u8]) -> Option<LogBlock> {
    let (counter, payload) = seal(instance, life, slot).open(bytes)?;
    let seq = read_u64(&payload, 8);
    let count = usize::try_from(read_u64(&payload, 32)).ok()?;
    if read_u64(&payload, 0) != life
        || seq != counter
        || seq % slots.max(1) != slot
        || count > LOG_EXTENTS_MAX
    {
        return None;
    }
    let extents = payload[HEADER_LEN..HEADER_LEN + count * 4]
        .chunks_exact(4)
        .map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
        .collect();
    let proven = Proven { epoch: read_u64(&payload, 16), seq: Sequence(read_u64(&payload, 24)) };
    Some(LogBlock { seq, proven, extents })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_block_comes_back_only_in_its_life_and_slot() {
        let block = LogBlock {
            seq: 67,
            proven: Proven { epoch: 3, seq: Sequence(9) },
            extents: (0..u32::try_from(LOG_EXTENTS_MAX).expect("small")).map(|i| i * 3).collect(),
        };
        let bytes = encode(1, 2, 3, &block);
        assert_eq!(decode(1, 2, 3, 64, &bytes), Some(block));
        assert_eq!(decode(1, 3, 3, 64, &bytes), None);
        assert_eq!(decode(1, 2, 4, 64, &bytes), None);
        assert_eq!(decode(1, 2, 3, 63, &bytes), None);
        assert_eq!(decode(2, 2, 3, 64, &bytes), None);
        assert_eq!(decode(1, 2, 3, 64, &[]), None);
    }
}
