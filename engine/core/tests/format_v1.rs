//! The on-disk format of version 1, as bytes that must open for ever, and hostile bytes that must not panic.
//!
//! The fixture is the head of a small volume's metadata area (both superblocks, two log slots), one summary
//! block and one page. `DUPLEX_WRITE_FIXTURES=1` writes it anew: only for a new version, under a new name.

use duplex_core::format::log_block::{self, LogBlock};
use duplex_core::format::map_page::{
    PAGE_BLOCKS, PAGE_WORDS, SUMMARY_COUNTS, decode_page, decode_summary, encode_page, encode_summary,
};
use duplex_core::format::placement::MetaPlacement;
use duplex_core::format::record::{CopyRecord, CopyState, Era, Origin, ServerRecord};
use duplex_core::format::seal::BLOCK_LEN;
use duplex_core::format::superblock::{self, Selected, Superblock, SuperblockError};
use duplex_core::ids::{BootId, Epoch, Generation, PairId, Proven, Sequence, ServerName, VolumeId};
use proptest::prelude::*;

const INSTANCE: u128 = 0x0011_2233_4455_6677_8899_AABB_CCDD_EEFF;
const SIZE_BYTES: u64 = 64 << 20;
const LOG_SLOTS: u32 = 2;
const LIFE: u64 = 5;
const FLOOR: u64 = 100;

fn superblock() -> Superblock {
    let mut copy = CopyRecord::blank(SIZE_BYTES, 4096, 512);
    copy.pair = PairId(1);
    copy.volume = VolumeId(2);
    copy.generation = Generation(3);
    copy.base = Generation(4);
    copy.history = vec![Generation(4), Generation(5)];
    copy.state = CopyState::Inconsistent { toward: Generation(6) };
    copy.unproven = true;
    copy.proven = Proven { epoch: 7, seq: Sequence(8) };
    copy.origin = Origin::Solo;
    let server = ServerRecord {
        counter: 9,
        boot_id: BootId(10),
        epoch_seen: Epoch { number: 11, holder: Some(ServerName("alpha".to_owned())) },
        era: Era::Solo(11),
        last_primary: 11,
        was_primary: true,
        clean: false,
    };
    Superblock {
        instance: INSTANCE,
        features: 0,
        placement: MetaPlacement::for_size(SIZE_BYTES, 4096, LOG_SLOTS),
        data_offset_bytes: 1 << 20,
        capacity_bytes: SIZE_BYTES,
        server,
        copy,
        log_life: LIFE,
        map_floor: FLOOR,
    }
}

fn log() -> LogBlock {
    LogBlock { seq: 3, proven: Proven { epoch: 7, seq: Sequence(8) }, extents: vec![0, 7, 15] }
}

fn page() -> Box<[u64; PAGE_WORDS]> {
    let mut bits = Box::new([0; PAGE_WORDS]);
    (bits[0], bits[255]) = (0b101, 1 << 63);
    bits
}

fn fixture() -> Vec<u8> {
    let mut older = superblock();
    older.log_life = LIFE - 1;
    [
        superblock::encode(&older, 0, 40).expect("it fits"),
        superblock::encode(&superblock(), 1, 41).expect("it fits"),
        vec![0; BLOCK_LEN],
        log_block::encode(INSTANCE, LIFE, 1, &log()),
        encode_summary(INSTANCE, 0, FLOOR + 1, &[3]),
        encode_page(INSTANCE, 0, FLOOR, &page()),
    ]
    .concat()
}

fn path() -> std::path::PathBuf {
    std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/format-v1.bin")
}

#[test]
fn a_volume_of_version_1_opens() {
    if std::env::var_os("DUPLEX_WRITE_FIXTURES").is_some() {
        std::fs::write(path(), fixture()).expect("the fixtures can be written");
    }
    let bytes = std::fs::read(path()).expect("the fixture is there");
    let blocks: Vec<&[u8]> = bytes.chunks(BLOCK_LEN).collect();
    assert_eq!(blocks.len(), 6);
    let selected = superblock::select(blocks[0], blocks[1]).expect("a superblock");
    assert_eq!(selected, Selected { superblock: superblock(), slot: 1, next_counter: 42 });
    let slots = u64::from(LOG_SLOTS);
    assert_eq!(log_block::decode(INSTANCE, LIFE, 0, slots, blocks[2]), None);
    assert_eq!(log_block::decode(INSTANCE, LIFE, 1, slots, blocks[3]), Some(log()));
    assert_eq!(log_block::decode(INSTANCE, LIFE + 1, 1, slots, blocks[3]), None);
    let (counts, seen) = decode_summary(INSTANCE, 0, FLOOR, blocks[4]);
    assert_eq!((counts[0], counts[1], counts.len() as u64, seen), (3, 0, SUMMARY_COUNTS, FLOOR + 1));
    assert_eq!(decode_page(INSTANCE, 0, FLOOR, blocks[5]), (page(), FLOOR));
    assert_eq!(bytes, fixture(), "what is written now is what was written then");
}

proptest! {
    #[test]
    fn random_blocks_never_panic(
        first in proptest::collection::vec(any::<u8>(), 0..BLOCK_LEN + 2),
        second in proptest::collection::vec(any::<u8>(), BLOCK_LEN),
        numbers in any::<[u64; 4]>(),
    ) {
        let [a, b, c, d] = numbers;
        for bytes in [&first, &second] {
            prop_assert!(superblock::select(bytes, &second).is_err());
            let _ = superblock::next_counter(bytes, &first);
            prop_assert_eq!(log_block::decode(u128::from(a), b, c, d, bytes), None);
            prop_assert_eq!(decode_summary(u128::from(a), b, c, bytes).0.len() as u64, SUMMARY_COUNTS);
            let (bits, _) = decode_page(u128::from(a), b, c, bytes);
            prop_assert_eq!(bits.iter().map(|w| u64::from(w.count_ones())).sum::<u64>(), PAGE_BLOCKS);
        }
    }

    #[test]
    fn damage_is_never_taken_for_something_else(at in 0_usize..6 * BLOCK_LEN, flip in 1_u8..) {
        let mut bytes = fixture();
        bytes[at] ^= flip;
        let blocks: Vec<&[u8]> = bytes.chunks(BLOCK_LEN).collect();
        match superblock::select(blocks[0], blocks[1]) {
            Ok(selected) => prop_assert!(
                selected.superblock == superblock() || (at / BLOCK_LEN == 1 && selected.slot == 0)
            ),
            Err(error) => prop_assert!(false, "one slot is whole: {error:?}"),
        }
        let read = log_block::decode(INSTANCE, LIFE, 1, 2, blocks[3]);
        prop_assert_eq!(read, (at / BLOCK_LEN != 3).then(log));
        let (counts, _) = decode_summary(INSTANCE, 0, FLOOR, blocks[4]);
        prop_assert!(counts[0] >= 3);
        let (bits, _) = decode_page(INSTANCE, 0, FLOOR, blocks[5]);
        prop_assert!(bits.iter().zip(page().iter()).all(|(read, set)| read & set == *set));
    }
}

#[test]
fn nothing_there_is_blank() {
    assert_eq!(superblock::select(&[0; BLOCK_LEN], &[0; BLOCK_LEN]), Err(SuperblockError::Blank));
}
