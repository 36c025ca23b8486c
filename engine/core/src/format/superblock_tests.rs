use proptest::prelude::*;

use super::*;
use crate::format::seal::SECTOR_LEN;

fn sample() -> Superblock {
    let mut copy = CopyRecord::blank(64 << 20, 4096, 512);
    copy.pair = PairId(1);
    copy.volume = VolumeId(2);
    copy.generation = Generation(3);
    copy.base = Generation(4);
    copy.history = (0..16).map(Generation).collect();
    copy.state = CopyState::Inconsistent { toward: Generation(77) };
    copy.origin = Origin::Forced;
    copy.proven = Proven { epoch: 4, seq: Sequence(5) };
    let mut server = ServerRecord::fresh(BootId(6));
    server.epoch_seen = Epoch { number: 9, holder: Some(ServerName("x".repeat(255))) };
    server.era = Era::Solo(9);
    Superblock {
        instance: 0xABCD,
        features: 0,
        placement: MetaPlacement::for_size(64 << 20, 4096, 64),
        data_offset_bytes: 1 << 20,
        capacity_bytes: 1 << 30,
        server,
        copy,
        log_life: 7,
        map_floor: 8,
    }
}

fn zero() -> Vec<u8> {
    vec![0; BLOCK_LEN]
}

fn put(superblock: &Superblock, slot: u8, counter: u64) -> Vec<u8> {
    encode(superblock, slot, counter).expect("it fits")
}

#[test]
fn the_greatest_superblock_comes_back() {
    let selected = select(&zero(), &put(&sample(), 1, 5)).expect("valid");
    assert_eq!(selected, Selected { superblock: sample(), slot: 1, next_counter: 6 });
}

#[test]
fn the_newer_slot_counts_and_a_torn_one_falls_back() {
    let old = sample();
    let mut new = sample();
    new.log_life = 8;
    let (slot0, slot1) = (put(&old, 0, 5), put(&new, 1, 6));
    assert_eq!(select(&slot0, &slot1).expect("valid").superblock, new);
    let before = put(&old, 1, 4);
    for pattern in 1_u32..255 {
        let mut torn = before.clone();
        for number in (0..SECTORS).filter(|n| pattern & (1 << n) != 0) {
            let at = number * SECTOR_LEN..(number + 1) * SECTOR_LEN;
            torn[at.clone()].copy_from_slice(&slot1[at]);
        }
        let selected = select(&slot0, &torn).expect("slot 0 is whole");
        assert_eq!((selected.slot, selected.next_counter), (0, 7), "above the torn write's counter too");
    }
}

#[test]
fn each_refusal_has_its_reason() {
    assert_eq!(select(&zero(), &zero()), Err(SuperblockError::Blank));
    assert_eq!(select(&[3; BLOCK_LEN], &zero()), Err(SuperblockError::Foreign));
    let mut broken = put(&sample(), 0, 5);
    broken[600] ^= 1;
    assert_eq!(select(&broken, &zero()), Err(SuperblockError::Torn));
    assert_eq!(
        select(&put(&sample(), 0, 5), &put(&sample(), 0, 9)).expect("slot 0").slot,
        0,
        "bound to its slot"
    );
    let newer = {
        let mut payload = vec![0; 16];
        payload[..8].copy_from_slice(&MAGIC);
        payload[8] = 2;
        seal(0).seal(&payload, 9)
    };
    assert_eq!(select(&newer, &zero()), Err(SuperblockError::NewerVersion { found: 2, known: 1 }));
    let mut other = sample();
    other.features = 4;
    assert!(matches!(
        select(&put(&other, 0, 1), &zero()),
        Err(SuperblockError::UnknownFeatures { found: 4, known: FEATURES_KNOWN })
    ));
    let mut other = sample();
    other.placement.pages = 0;
    assert_eq!(select(&put(&other, 0, 1), &zero()), Err(SuperblockError::Inconsistent { field: "pages" }));
}

#[test]
fn what_does_not_fit_is_refused() {
    let mut big = sample();
    big.server.epoch_seen.holder = Some(ServerName("x".repeat(256)));
    assert_eq!(encode(&big, 0, 1), Err(EncodeError::NameTooLong(256)));
    let mut big = sample();
    big.copy.history.push(Generation(1));
    assert_eq!(encode(&big, 0, 1), Err(EncodeError::HistoryTooLong(17)));
    assert_eq!(encode(&sample(), 0, u64::MAX), Err(EncodeError::CounterUsedUp));
}

proptest! {
    #[test]
    fn any_sealed_payload_is_read_without_panic(payload in proptest::collection::vec(any::<u8>(), 0..3968), magic: bool) {
        let mut payload = payload;
        if magic && payload.len() >= 12 {
            payload[..8].copy_from_slice(&MAGIC);
            payload[8..12].copy_from_slice(&1_u32.to_le_bytes());
            if payload.len() >= 24 {
                payload[16..24].fill(0);
            }
        }
        let _ = select(&seal(0).seal(&payload, 1), &[]);
    }

    #[test]
    fn any_changed_byte_is_read_without_panic(at in 0_usize..3968, value: u8, seed in any::<[u8; 32]>()) {
        let mut payload = seal(0).open(&put(&sample(), 0, 1)).expect("whole").1;
        payload[at] = value;
        let _ = select(&seal(0).seal(&payload, 2), &seed);
        let _ = select(&seed, &seed[..7]);
    }
}
