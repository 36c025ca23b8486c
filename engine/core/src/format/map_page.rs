//! Pages of the dirty map and blocks of its summary. Both are valid sector by sector.
//!
//! A sector that was never written, or whose counter is below the map's floor, is empty. A damaged
//! sector of a page has all its bits set, a damaged sector of the summary says *full*: never trusted as
//! clean. Mixing old and new sectors of a page is safe, because a bit is relied upon only after the
//! write that set it was durable.

use super::seal::{Kind, SECTOR_PAYLOAD_LEN, SECTORS, Seal, SectorState, sector_payload};

/// Blocks of an extent.
pub const EXTENT_BLOCKS: u64 = 1024;
/// Extents of a page.
pub const PAGE_EXTENTS: u64 = 31;
/// Blocks (bits) of a page.
pub const PAGE_BLOCKS: u64 = EXTENT_BLOCKS * PAGE_EXTENTS;
/// Bytes of a page's bitmap.
pub const PAGE_BYTES: usize = 3968;
/// 64-bit words of a page's bitmap.
pub const PAGE_WORDS: usize = PAGE_BYTES / 8;
/// Counts in a summary block.
pub const SUMMARY_COUNTS: u64 = 1984;
/// The count that says: every block of the page is dirty, the page need not be read.
pub const COUNT_FULL: u16 = 31744;

const SECTOR_COUNTS: usize = SECTOR_PAYLOAD_LEN / 2;

/// What the sector of a map or summary block is worth.
enum Worth<'a> {
    Empty,
    Payload(&'a [u8]),
    Damaged,
}

fn worth<'a>(seal: &Seal, block: &'a [u8], number: usize, floor: u64, seen: &mut u64) -> Worth<'a> {
    match seal.sector(block, number) {
        SectorState::Empty => Worth::Empty,
        SectorState::Damaged => Worth::Damaged,
        SectorState::Intact { counter } => {
            *seen = (*seen).max(counter);
            if counter < floor { Worth::Empty } else { Worth::Payload(sector_payload(block, number)) }
        }
    }
}

fn page_seal(instance: u128, page: u64) -> Seal {
    Seal { kind: Kind::Page, index: page, instance, life: 0 }
}

fn summary_seal(instance: u128, block: u64) -> Seal {
    Seal { kind: Kind::Summary, index: block, instance, life: 0 }
}

/// A page's block.
pub fn encode_page(instance: u128, page: u64, counter: u64, bits: &[u64; PAGE_WORDS]) -> Vec<u8> {
    let payload: Vec<u8> = bits.iter().flat_map(|word| word.to_le_bytes()).collect();
    page_seal(instance, page).seal(&payload, counter)
}

/// A page's bits, and the greatest counter seen in an intact sector.
pub fn decode_page(instance: u128, page: u64, floor: u64, block: &[u8]) -> (Box<[u64; PAGE_WORDS]>, u64) {
    let seal = page_seal(instance, page);
    let mut bits = Box::new([0_u64; PAGE_WORDS]);
    let mut seen = 0;
    for (number, words) in bits.chunks_exact_mut(PAGE_WORDS / SECTORS).enumerate() {
        match worth(&seal, block, number, floor, &mut seen) {
            Worth::Empty => {}
            Worth::Damaged => words.fill(u64::MAX),
            Worth::Payload(payload) => {
                for (word, bytes) in words.iter_mut().zip(payload.chunks_exact(8)) {
                    *word = super::seal::read_u64(bytes, 0);
                }
            }
        }
    }
    (bits, seen)
}

/// A summary block with up to [`SUMMARY_COUNTS`] counts.
pub fn encode_summary(instance: u128, block: u64, counter: u64, counts: &[u16]) -> Vec<u8> {
    let payload: Vec<u8> = counts.iter().flat_map(|count| count.to_le_bytes()).collect();
    summary_seal(instance, block).seal(&payload, counter)
}

/// The counts of a summary block ([`COUNT_FULL`] where a sector is damaged), and the greatest counter
/// seen in an intact sector.
pub fn decode_summary(instance: u128, block: u64, floor: u64, bytes: &[u8]) -> (Vec<u16>, u64) {
    let seal = summary_seal(instance, block);
    let mut counts = Vec::with_capacity(SECTOR_COUNTS * SECTORS);
    let mut seen = 0;
    for number in 0..SECTORS {
        match worth(&seal, bytes, number, floor, &mut seen) {
            Worth::Empty => counts.extend([0; SECTOR_COUNTS]),
            Worth::Damaged => counts.extend([COUNT_FULL; SECTOR_COUNTS]),
            Worth::Payload(payload) => {
                counts.extend(payload.chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]])));
            }
        }
    }
    (counts, seen)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_numbers_fit() {
        assert_eq!(PAGE_BYTES, SECTOR_PAYLOAD_LEN * SECTORS);
        assert_eq!(PAGE_BLOCKS, PAGE_BYTES as u64 * 8);
        assert_eq!(u64::from(COUNT_FULL), PAGE_BLOCKS);
        assert_eq!(SUMMARY_COUNTS as usize, SECTOR_COUNTS * SECTORS);
    }

    #[test]
    fn a_page_comes_back() {
        let mut bits = Box::new([0_u64; PAGE_WORDS]);
        bits[0] = 1;
        bits[495] = 1 << 63;
        let block = encode_page(5, 9, 77, &bits);
        assert_eq!(decode_page(5, 9, 0, &block), (bits.clone(), 77));
        assert_eq!(decode_page(5, 9, 77, &block), (bits, 77));
        assert_eq!(decode_page(5, 9, 78, &block).0, Box::new([0; PAGE_WORDS]), "below the floor is empty");
    }

    #[test]
    fn damage_is_dirt() {
        let mut block = encode_page(5, 9, 77, &[0; PAGE_WORDS]);
        block[512 + 3] ^= 1;
        let (bits, _) = decode_page(5, 9, 0, &block);
        assert_eq!(bits.iter().map(|word| word.count_ones()).sum::<u32>(), 496 * 8);
        assert_eq!(decode_page(5, 9, 0, &[1, 2]).0, Box::new([u64::MAX; PAGE_WORDS]));
        let mut summary = encode_summary(5, 1, 77, &[3; 1984]);
        summary[512 * 7] ^= 1;
        let (counts, _) = decode_summary(5, 1, 0, &summary);
        assert_eq!(counts[248 * 7 - 1], 3);
        assert!(counts[248 * 7..].iter().all(|&count| count == COUNT_FULL));
        assert_eq!(decode_page(6, 9, 0, &encode_page(5, 9, 77, &[0; PAGE_WORDS])).0[0], u64::MAX);
    }
}
