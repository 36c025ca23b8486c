//! The store's operations against real files and loop devices.
#![allow(clippy::unwrap_used, reason = "tests and their helpers: a panic with its place is the report")]

mod common;

use std::fs;
use std::path::Path;

use common::{Bench, DATA_BYTES, Draws, LoopDevice, MIB, Mount, config, is_root, make_file, placement};
use duplex_core::ids::ByteRange;
use duplex_core::request::{DiskOpKind, DiskOutcome};
use duplex_store::{
    Access, Backing, BackingConfig, MetaIo, OPERATIONS_MAX, Placement, Store, StoreError,
    create_metadata_file,
};

const BACKING_BYTES: u64 = DATA_BYTES + 2 * MIB;

/// Random writes, zeroes, reads and flushes, many at once in lanes of their own, against bytes in memory.
fn compare_with_model(path: &Path, seed: u64) {
    const LANES: u64 = 32;
    const LANE: u64 = DATA_BYTES / LANES;
    let mut bench = Bench::open(&config(path), placement());
    let sector = u64::from(bench.store.geometry().sector_bytes);
    // Nothing is zero to begin with: a zeroing that does nothing shows.
    let mut model = vec![0xee_u8; DATA_BYTES as usize];
    for offset in (0..DATA_BYTES).step_by(MIB as usize) {
        assert_eq!(bench.write(offset, &vec![0xee; MIB as usize], false), DiskOutcome::Done);
    }
    let mut draws = Draws(seed);
    for round in 0..40_u64 {
        let mut out = Vec::new();
        let mut reads = Vec::new();
        let mut held = Vec::new();
        for lane in 0..LANES {
            let start = draws.below(LANE / sector) * sector;
            let most = (LANE - start).min(128 << 10) / sector;
            let range = ByteRange::new(lane * LANE + start, (1 + draws.below(most)) * sector);
            let span = range.offset_bytes as usize..range.end_bytes() as usize;
            match draws.below(8) {
                0..=3 => {
                    let byte = (1 + (round * LANES + lane) % 255) as u8;
                    let buffer = bench.filled(&vec![byte; span.len()]);
                    held.push(buffer);
                    model[span].fill(byte);
                    let fua = draws.below(4) == 0;
                    bench.submit(DiskOpKind::Write { range, buffer, fua }, &mut out);
                }
                4..=5 => {
                    let (may_unmap, fua) = (draws.below(2) == 0, draws.below(4) == 0);
                    model[span].fill(0);
                    bench.submit(DiskOpKind::Zero { range, may_unmap, fua }, &mut out);
                }
                6 => {
                    bench.submit(DiskOpKind::Flush, &mut out);
                }
                _ => {
                    let buffer = bench.arena.alloc(span.len()).unwrap();
                    held.push(buffer);
                    reads.push((buffer, span));
                    bench.submit(DiskOpKind::Read { range, buffer }, &mut out);
                }
            }
        }
        bench.drain(&mut out);
        assert_eq!(out.len() as u64, LANES);
        assert!(out.iter().all(|(_, outcome)| *outcome == DiskOutcome::Done), "{out:?}");
        for (buffer, span) in reads {
            assert!(bench.arena.bytes(buffer)[..span.len()] == model[span.clone()], "read of {span:?}");
        }
        held.into_iter().for_each(|buffer| bench.arena.release(buffer));
        // Early on, before later writes cover what went wrong.
        for offset in (0..DATA_BYTES).step_by(MIB as usize).filter(|_| round < 3) {
            let span = offset as usize..(offset + MIB) as usize;
            assert!(bench.read(offset, MIB as usize).unwrap() == model[span], "round {round}, at {offset}");
        }
    }
    assert_eq!(bench.arena.in_use_bytes(), 0, "the store gave every reference back");
    let mut io = MetaIo::new(bench.store.into_backing().unwrap()).unwrap();
    io.place(placement()).unwrap();
    let mut bytes = vec![1; DATA_BYTES as usize];
    io.read_data(0, &mut bytes).unwrap();
    assert!(bytes == model, "what is on the disk at the end");
    let mut around = vec![1; MIB as usize];
    io.read_raw(0, &mut around).unwrap();
    assert!(around.iter().all(|&byte| byte == 0), "nothing before the data area was touched");
    io.read_raw(MIB + DATA_BYTES, &mut around).unwrap();
    assert!(around.iter().all(|&byte| byte == 0), "nothing after the data area was touched");
}

#[test]
fn a_file_holds_what_was_written() {
    let dir = tempfile::tempdir().unwrap();
    compare_with_model(&make_file(&dir, "backing", BACKING_BYTES), 1);
}

#[test]
fn a_loop_device_of_512_byte_sectors_holds_what_was_written() {
    if !is_root("loop 512") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let device = LoopDevice::attach(&make_file(&dir, "backing", BACKING_BYTES), &["--sector-size", "512"]);
    compare_with_model(&device.path, 2);
}

#[test]
fn a_loop_device_of_4096_byte_sectors_holds_what_was_written() {
    if !is_root("loop 4096") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let file = make_file(&dir, "backing", BACKING_BYTES);
    let device = LoopDevice::attach(&file, &["--sector-size", "4096", "--direct-io=on"]);
    compare_with_model(&device.path, 3);
}

#[test]
fn a_file_system_without_zero_ranges_gets_written_zeroes() {
    if !is_root("tmpfs") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let Some(mount) = Mount::new(&["-t", "tmpfs", "-o", "size=64m", "none"], &dir.path().join("mount"))
    else {
        return;
    };
    let path = mount.at.join("backing");
    fs::File::create(&path).unwrap().set_len(BACKING_BYTES).unwrap();
    match Backing::open(&config(&path), Access::Exclusive) {
        Ok(backing) => drop(backing),
        Err(error) => {
            assert!(matches!(error, StoreError::NoDirectIo { .. }), "{error}");
            eprintln!("SKIPPED: tmpfs has no direct I/O here");
            return;
        }
    }
    compare_with_model(&path, 4);
}

#[test]
fn metadata_jumps_over_the_data_and_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = make_file(&dir, "backing", BACKING_BYTES);
    let mut bench = Bench::open(&config(&path), placement());
    let bytes: Vec<u8> = (0..65536_u32).map(|at| (at / 4096) as u8 + 1).collect();
    let offset_bytes = MIB - 16384;
    for preflush in [true, false] {
        let write = DiskOpKind::MetaWrite { offset_bytes, bytes: bytes.clone(), preflush };
        assert_eq!(bench.run(write), DiskOutcome::Done);
    }
    let read = DiskOpKind::MetaRead { offset_bytes, length_bytes: 65536 };
    assert_eq!(bench.run(read), DiskOutcome::Bytes(bytes.clone()));
    drop(bench);
    let raw = fs::read(&path).unwrap();
    let (before, after) = (offset_bytes as usize, (MIB + DATA_BYTES) as usize);
    assert!(raw[before..before + 16384] == bytes[..16384]);
    assert!(raw[after..after + 49152] == bytes[16384..]);
    assert!(raw[MIB as usize..after].iter().all(|&byte| byte == 0), "the data area was not touched");

    let mut io = MetaIo::open(&config(&path), Access::ReadClaimed).unwrap();
    io.place(placement()).unwrap();
    let mut again = vec![0; 65536];
    io.read_meta(offset_bytes, &mut again).unwrap();
    assert!(again == bytes);
}

/// Flushes that the device has done; `None` when the kernel does not count them.
fn flushes(device: &Path) -> Option<u64> {
    let name = device.file_name().unwrap().to_str().unwrap();
    let text = fs::read_to_string(format!("/sys/block/{name}/stat")).unwrap();
    text.split_whitespace().nth(15).map(|count| count.parse().unwrap())
}

#[test]
fn what_must_be_stable_reaches_the_device_as_flushes() {
    if !is_root("counting flushes") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let device = LoopDevice::attach(&make_file(&dir, "backing", BACKING_BYTES), &[]);
    let Some(mut before) = flushes(&device.path) else {
        eprintln!("SKIPPED: this kernel does not count flushes");
        return;
    };
    let mut bench = Bench::open(&config(&device.path), placement());
    let mut step = |outcome: DiskOutcome, expected: u64, what: &str| {
        assert_eq!(outcome, DiskOutcome::Done, "{what}");
        let now = flushes(&device.path).unwrap();
        assert_eq!(now - before, expected, "flushes of a {what}");
        before = now;
    };
    let range = ByteRange::new(0, 8192);
    let zero = |fua| DiskOpKind::Zero { range, may_unmap: true, fua };
    let meta = |preflush| DiskOpKind::MetaWrite { offset_bytes: 0, bytes: vec![1; 4096], preflush };
    step(bench.write(0, &[1; 4096], false), 0, "write");
    step(bench.write(0, &[1; 4096], true), 1, "stable write");
    step(bench.run(DiskOpKind::Flush), 1, "flush");
    step(bench.run(zero(false)), 0, "zeroing");
    step(bench.run(zero(true)), 1, "stable zeroing");
    step(bench.run(meta(false)), 1, "metadata write");
    step(bench.run(meta(true)), 2, "metadata write with a flush before");
}

#[test]
fn external_metadata_leaves_the_data_where_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let data = make_file(&dir, "data", DATA_BYTES);
    let metadata = dir.path().join("metadata");
    create_metadata_file(&metadata, MIB).unwrap();
    assert!(matches!(create_metadata_file(&metadata, MIB), Err(StoreError::Exists { .. })));
    let config = BackingConfig { metadata: Some(metadata.clone()), ..config(&data) };
    let mut bench = Bench::open(&config, Placement::external(DATA_BYTES));
    assert_eq!(bench.write(0, &[7; 4096], false), DiskOutcome::Done);
    let write = DiskOpKind::MetaWrite { offset_bytes: 8192, bytes: vec![9; 4096], preflush: true };
    assert_eq!(bench.run(write), DiskOutcome::Done);
    assert_eq!(bench.run(DiskOpKind::Flush), DiskOutcome::Done);
    drop(bench);
    assert!(fs::read(&data).unwrap()[..4096] == [7; 4096]);
    assert!(fs::read(&metadata).unwrap()[8192..12288] == [9; 4096]);
    assert_eq!(fs::metadata(&metadata).unwrap().len(), MIB);
}

#[test]
fn more_operations_than_slots_and_metadata_buffers_all_complete() {
    let dir = tempfile::tempdir().unwrap();
    let mut bench = Bench::open(&config(&make_file(&dir, "backing", BACKING_BYTES)), placement());
    let mut out = Vec::new();
    let buffer = bench.filled(&[5; 4096]);
    let count = OPERATIONS_MAX as u64 + 500;
    for index in 0..count {
        let range = ByteRange::new(index * 4096 % DATA_BYTES, 4096);
        bench.submit(DiskOpKind::Write { range, buffer, fua: false }, &mut out);
    }
    for index in 0..200 {
        let offset_bytes = index % 16 * 65536;
        bench.submit(DiskOpKind::MetaRead { offset_bytes, length_bytes: 65536 }, &mut out);
    }
    assert!(out.is_empty());
    assert_eq!(bench.store.in_flight(), OPERATIONS_MAX);
    bench.drain(&mut out);
    assert_eq!(out.len() as u64, count + 200);
    assert!(out.iter().all(|(_, outcome)| !matches!(outcome, DiskOutcome::Failed { .. })));
    let mut ids: Vec<u64> = out.iter().map(|(id, _)| id.0).collect();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len() as u64, count + 200, "each once");
    bench.arena.release(buffer);
    assert_eq!(bench.arena.in_use_bytes(), 0);
}

#[test]
fn a_range_longer_than_one_call_zeroes_is_zeroed_whole() {
    const BYTES: u64 = 200 * MIB;
    let dir = tempfile::tempdir().unwrap();
    let path = make_file(&dir, "backing", BYTES);
    let mut bench = Bench::open(&config(&path), Placement::internal(0, BYTES, BYTES));
    let marks = [0, 63 * MIB, 64 * MIB, 128 * MIB, BYTES - 4096];
    for may_unmap in [true, false] {
        for mark in marks {
            assert_eq!(bench.write(mark, &[1; 4096], false), DiskOutcome::Done);
        }
        let range = ByteRange::new(4096, BYTES - 4096);
        assert_eq!(bench.run(DiskOpKind::Zero { range, may_unmap, fua: true }), DiskOutcome::Done);
        for mark in marks {
            let expected = if mark == 0 { [1; 4096] } else { [0; 4096] };
            assert!(bench.read(mark, 4096).unwrap() == expected, "at {mark}, may_unmap {may_unmap}");
        }
    }
}

#[test]
fn what_does_not_fit_is_refused_and_latches_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mut bench = Bench::open(&config(&make_file(&dir, "backing", BACKING_BYTES)), placement());
    let refused = DiskOutcome::Failed { errno: libc::EINVAL };
    let sector = u64::from(bench.store.geometry().sector_bytes);
    assert_eq!(bench.write(sector / 2, &vec![0; sector as usize], false), refused, "odd offset");
    assert_eq!(bench.write(0, &[0; 100], false), refused, "odd length");
    assert_eq!(bench.write(DATA_BYTES, &[0; 4096], false), refused, "past the data area");
    let buffer = bench.filled(&[0; 4096]);
    let range = ByteRange::new(0, 8192);
    assert_eq!(bench.run(DiskOpKind::Read { range, buffer }), refused, "buffer too small");
    let range = ByteRange::new(u64::MAX - 4095, 4096);
    assert_eq!(bench.run(DiskOpKind::Zero { range, may_unmap: true, fua: false }), refused);
    let long = DiskOpKind::MetaRead { offset_bytes: 0, length_bytes: 65536 + 4096 };
    assert_eq!(bench.run(long), refused, "metadata too long");
    let odd = DiskOpKind::MetaWrite { offset_bytes: 0, bytes: vec![0; 512], preflush: false };
    assert_eq!(bench.run(odd), refused, "metadata not a multiple of 4096");
    assert_eq!(bench.store.failed(), None);
    assert_eq!(bench.write(0, &[1; 4096], true), DiskOutcome::Done);
}

#[test]
fn a_failed_read_does_not_latch() {
    let dir = tempfile::tempdir().unwrap();
    let path = make_file(&dir, "backing", BACKING_BYTES);
    let mut bench = Bench::open(&config(&path), placement());
    fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(4 * MIB).unwrap();
    let past_end = bench.read(8 * MIB, 4096).unwrap_err();
    assert_eq!(past_end, DiskOutcome::Failed { errno: libc::EIO });
    // Half of it is there: the short read is continued and meets the end.
    assert_eq!(bench.read(3 * MIB - 4096, 8192).unwrap_err(), DiskOutcome::Failed { errno: libc::EIO });
    assert_eq!(bench.store.failed(), None);
    assert_eq!(bench.read(0, 4096).unwrap(), vec![0; 4096]);
}

#[test]
fn a_failed_write_latches_and_nothing_is_retried() {
    if !is_root("tmpfs") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let Some(mount) = Mount::new(&["-t", "tmpfs", "-o", "size=2m", "none"], &dir.path().join("mount")) else {
        return;
    };
    let file = mount.at.join("backing");
    fs::File::create(&file).unwrap().set_len(BACKING_BYTES).unwrap();
    // The loop device over a full file system answers with an error, as a broken disk does.
    let device = LoopDevice::attach(&file, &[]);
    let mut bench = Bench::open(&config(&device.path), placement());
    assert_eq!(bench.write(0, &[1; 4096], false), DiskOutcome::Done);
    let mut out = Vec::new();
    let buffer = bench.filled(&vec![2; 1 << 20]);
    for index in 0..8 {
        let range = ByteRange::new(index * MIB, MIB);
        bench.submit(DiskOpKind::Write { range, buffer, fua: true }, &mut out);
    }
    bench.drain(&mut out);
    bench.arena.release(buffer);
    let errnos: Vec<i32> = out
        .iter()
        .filter_map(|(_, outcome)| match outcome {
            DiskOutcome::Failed { errno } => Some(*errno),
            DiskOutcome::Done | DiskOutcome::Bytes(_) | DiskOutcome::Zeroes { .. } => None,
        })
        .collect();
    assert!(!errnos.is_empty(), "2 MiB do not hold 8 MiB");
    let failure = bench.store.failed().unwrap();
    assert_eq!(failure.operation, "write");
    assert_eq!(failure.errno, errnos[0]);
    let enters = bench.ring.enters();
    let later = DiskOutcome::Failed { errno: failure.errno };
    assert_eq!(bench.run(DiskOpKind::Flush), later);
    assert_eq!(bench.write(0, &[1; 4096], false), later);
    assert_eq!(bench.read(0, 4096).unwrap_err(), later);
    assert_eq!(bench.run(DiskOpKind::MetaRead { offset_bytes: 0, length_bytes: 4096 }), later);
    assert_eq!(bench.ring.enters(), enters, "nothing of it reached the kernel");
}

#[test]
fn a_closed_store_ends_what_is_in_flight_and_gives_up_its_claim() {
    let dir = tempfile::tempdir().unwrap();
    let path = make_file(&dir, "backing", BACKING_BYTES);
    let mut bench = Bench::open(&config(&path), placement());
    let mut out = Vec::new();
    let buffer = bench.filled(&[5; 4096]);
    for index in 0..OPERATIONS_MAX as u64 + 10 {
        let range = ByteRange::new(index * 4096 % DATA_BYTES, 4096);
        bench.submit(DiskOpKind::Write { range, buffer, fua: false }, &mut out);
    }
    bench.store.close(&mut out);
    assert_eq!(out.len(), 10, "those that waited");
    assert!(out.iter().all(|(_, outcome)| *outcome == DiskOutcome::Failed { errno: libc::ESHUTDOWN }));
    assert!(!bench.store.is_idle());
    bench.drain(&mut out);
    assert_eq!(out.len(), OPERATIONS_MAX + 10);
    assert_eq!(bench.run(DiskOpKind::Flush), DiskOutcome::Failed { errno: libc::ESHUTDOWN });
    drop(bench);
    Backing::open(&common::once(&path), Access::Exclusive).unwrap();
}

#[test]
fn a_store_needs_a_claim_and_areas_that_fit() {
    let dir = tempfile::tempdir().unwrap();
    let path = make_file(&dir, "backing", BACKING_BYTES);
    let shared = Backing::open(&config(&path), Access::ReadShared).unwrap();
    assert!(matches!(Store::new(common::OWNER, shared, placement()), Err(StoreError::ReadOnly { .. })));
    let claimed = Backing::open(&config(&path), Access::Exclusive).unwrap();
    let too_large = Placement::external(BACKING_BYTES + 4096);
    let error = Store::new(common::OWNER, claimed, too_large).unwrap_err();
    assert!(error.to_string().contains(&BACKING_BYTES.to_string()), "{error}");
}

#[test]
fn holes_of_a_file_are_skipped() {
    let dir = tempfile::tempdir().unwrap();
    let path = make_file(&dir, "backing", BACKING_BYTES);
    let mut io = MetaIo::open(&config(&path), Access::Exclusive).unwrap();
    io.place(placement()).unwrap();
    assert_eq!(io.next_data(0).unwrap(), None);
    io.write_data(4 * MIB, &[1; 4096]).unwrap();
    io.flush().unwrap();
    let found = io.next_data(0).unwrap().unwrap();
    assert!(found.offset_bytes <= 4 * MIB && found.end_bytes() >= 4 * MIB + 4096, "{found}");
    assert_eq!(io.next_data(found.end_bytes()).unwrap(), None);
    assert!(matches!(io.write_data(DATA_BYTES, &[0; 4096]), Err(StoreError::Range { .. })));
    assert!(matches!(io.read_data(1, &mut [0; 4096]), Err(StoreError::Range { .. })));
}
