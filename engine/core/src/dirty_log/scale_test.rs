//! The log at its largest: 64 TiB, and more writers than it has room for. Counts what it asks of the disk.

use super::*;
use crate::limits::{COPY_ZERO_MAX_BYTES, VOLUME_MAX_BYTES};

const BLOCK: u64 = 4096;
const MAP_BYTES: u64 = 541_201 * 4096;

/// A log over a metadata area that is kept sparsely, and what it read and wrote.
struct Bench {
    log: DirtyLog,
    disk: BTreeMap<u64, Vec<u8>>,
    read_bytes: u64,
    written_bytes: u64,
}

fn geometry() -> LogGeometry {
    LogGeometry {
        size_bytes: VOLUME_MAX_BYTES,
        block_bytes: BLOCK as u32,
        log_slots: 64,
        capacity_extents: CAPACITY_EXTENTS,
        placement: MetaPlacement::for_size(VOLUME_MAX_BYTES, BLOCK as u32, 64),
    }
}

impl Bench {
    fn new(disk: BTreeMap<u64, Vec<u8>>, life: u64) -> Self {
        let log = DirtyLog::load(geometry(), 7, life, 0, life << 32);
        let mut bench = Self { log, disk, read_bytes: 0, written_bytes: 0 };
        bench.rest();
        assert!(bench.log.is_loaded());
        bench.log.begin_life(life + 1);
        bench.rest();
        bench
    }

    fn step(&mut self) -> bool {
        let Some((id, op)) = self.log.poll_op() else { return false };
        let bytes = match op {
            MetaOp::Read { offset_bytes, length_bytes } => {
                self.read_bytes += u64::from(length_bytes);
                let blocks = (0..u64::from(length_bytes)).step_by(4096);
                let block = |at: u64| self.disk.get(&(offset_bytes + at)).cloned().unwrap_or(vec![0; 4096]);
                blocks.flat_map(block).collect()
            }
            MetaOp::Write { offset_bytes, bytes } => {
                self.written_bytes += bytes.len() as u64;
                self.disk.insert(offset_bytes, bytes);
                Vec::new()
            }
        };
        self.log.op_done(id, Ok(bytes));
        true
    }

    fn rest(&mut self) {
        while self.step() {}
    }

    fn flush(&mut self) {
        let mark = self.log.flush_issued();
        self.log.flush_completed(mark);
    }

    /// Copies everything that is marked, in ranges as long as a hole's; how many.
    fn copy_all(&mut self) -> u64 {
        let (mut from, mut ranges) = (0, 0);
        loop {
            match self.log.next_dirty(from, COPY_ZERO_MAX_BYTES / BLOCK) {
                NextDirty::Run { first_block, blocks } => {
                    self.log.copied(ByteRange::new(first_block * BLOCK, blocks * BLOCK));
                    from = first_block + blocks;
                    ranges += 1;
                }
                NextDirty::Loading => assert!(self.step(), "a page is being read"),
                NextDirty::End => return ranges,
            }
            if self.log.copied_pages() > 4096 {
                self.flush();
                self.rest();
            }
        }
    }
}

/// The same sequence on every run: blocks all over the volume, each in an extent of its own.
fn scattered(count: u64) -> impl Iterator<Item = ByteRange> {
    (0..count).map(|at| {
        let block = at.wrapping_mul(0x9E37_79B9_7F4A_7C15) % (VOLUME_MAX_BYTES / BLOCK);
        ByteRange::new(block * BLOCK, BLOCK)
    })
}

#[test]
fn the_largest_volume_is_copied_crashed_and_resynced_without_a_pass_over_its_map() {
    let mut bench = Bench::new(BTreeMap::new(), 1);
    bench.log.set_all();
    bench.rest();
    assert!(bench.log.merges_durable());
    assert_eq!(bench.log.dirty_blocks(), VOLUME_MAX_BYTES / BLOCK);
    assert!(bench.written_bytes < 4 << 20, "{} bytes to mark all", bench.written_bytes);
    let ranges = bench.copy_all();
    assert!(ranges <= VOLUME_MAX_BYTES / COPY_ZERO_MAX_BYTES + 1, "{ranges} ranges");
    bench.flush();
    bench.rest();
    assert_eq!(bench.log.dirty_blocks(), 0);
    assert!(bench.log.merges_durable());
    assert!(bench.written_bytes < MAP_BYTES / 50, "{} bytes to clear all", bench.written_bytes);

    // A lone primary, killed: what it wrote is in extents, or in pages of its own.
    for range in scattered(1000) {
        if !bench.log.begin(Ticket(0), range) {
            while bench.log.poll_ready().is_none() {
                assert!(bench.step(), "a write waits for nothing");
            }
        }
        bench.log.mark(range);
        bench.log.end(range, WriteEnd::OnlyHere);
    }
    let mut bench = Bench::new(bench.disk, 2);
    let (read, wrote) = (bench.read_bytes, bench.written_bytes);
    assert!(read < 8 << 20 && wrote < 8 << 20, "{read} read, {wrote} written to start again");
    assert!(bench.log.replayed_extents() <= u64::from(CAPACITY_EXTENTS));
    for range in scattered(1000) {
        assert!(bench.log.is_marked(range.offset_bytes / BLOCK));
    }
    let ranges = bench.copy_all();
    assert!((1000..2100).contains(&ranges), "{ranges} ranges");
    bench.flush();
    bench.rest();
    assert_eq!(bench.log.dirty_blocks(), 0);
    assert!(bench.read_bytes < 16 << 20, "{} bytes read", bench.read_bytes);
}

/// A thousand writers at a time over cold extents: everyone gets his turn, the log keeps its size.
fn thousand_writers(outcome: WriteEnd) {
    const WRITERS: usize = 1000;
    const WRITES: usize = 4000;
    let mut bench = Bench::new(BTreeMap::new(), 1);
    let all: Vec<ByteRange> = scattered(WRITES as u64).collect();
    let (mut begun, mut ended, mut flushes) = (0, 0, 0);
    let mut running = VecDeque::new();
    while ended < WRITES {
        while begun < WRITES && begun - ended < WRITERS {
            if bench.log.begin(Ticket(begun as u64), all[begun]) {
                running.push_back(begun);
            }
            begun += 1;
        }
        let mut moved = bench.step();
        while let Some(ticket) = bench.log.poll_ready() {
            running.push_back(ticket.0 as usize);
        }
        assert!(bench.log.active_extents() <= CAPACITY_EXTENTS as usize, "the log grows");
        if let Some(at) = running.pop_front() {
            if outcome == WriteEnd::OnlyHere {
                bench.log.mark(all[at]);
            }
            bench.log.end(all[at], outcome);
            ended += 1;
            moved = true;
        }
        if !moved && bench.log.wants_flush() {
            bench.flush();
            flushes += 1;
            moved = true;
        }
        assert!(moved || bench.step(), "{ended} of {WRITES} writes ended, {begun} begun: it stands still");
    }
    let (writes, pages) = (bench.written_bytes / BLOCK, WRITES as u64);
    assert!(writes < 4 * pages, "{writes} blocks of metadata for {WRITES} writes");
    println!("{outcome:?}: {writes} blocks of metadata, {flushes} flushes for {WRITES} writes");
}

#[test]
fn a_log_full_of_cold_extents_neither_stops_nor_grows_alone() {
    thousand_writers(WriteEnd::OnlyHere);
}

#[test]
fn a_log_full_of_cold_extents_neither_stops_nor_grows_mirrored() {
    thousand_writers(WriteEnd::Both);
}
