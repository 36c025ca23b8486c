//! One volume with a disk in memory and a peer that agrees to everything.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::api::{Action, CopyChange, CopyPlan, Input, Order, Part, Report, ServeMode};
use super::{Volume, VolumeConfig};
use crate::format::placement::{LOG_SLOTS, MetaPlacement};
use crate::format::record::{CopyRecord, CopyState, ServerRecord};
use crate::format::superblock::{self, Superblock};
use crate::ids::{BootId, BufferId, ByteRange, Generation, PairId, SessionId, VolumeId};
use crate::limits::ZERO_MAX_BYTES;
use crate::message::{RemoteOutcome, VolumeMessage};
use crate::request::{DiskOp, DiskOpKind, DiskOutcome};
use crate::time::Instant;

const SIZE: u64 = 64 << 20;
const BLOCK: u64 = 4096;
const SESSION: SessionId = SessionId(1);

struct Bench {
    now: Instant,
    volume: Volume,
    meta: BTreeMap<u64, Vec<u8>>,
    /// Blocks that cannot be read.
    bad: BTreeSet<u64>,
    /// Blocks the peer has.
    copied: BTreeSet<u64>,
    reports: Vec<Report>,
    reads: u64,
    /// The whole disk is a hole.
    hole: bool,
    /// Ranges that the peer has not zeroed yet.
    zeroing: Vec<(u64, ByteRange)>,
}

impl Bench {
    /// A volume alone that begins to copy everything to its peer.
    fn copying(bad: &[u64]) -> Self {
        let mut bench = Self::alone(bad);
        bench.join();
        bench
    }

    /// A volume alone, with every block marked.
    fn alone(bad: &[u64]) -> Self {
        let blank = Superblock {
            instance: 9,
            features: 0,
            placement: MetaPlacement::for_size(SIZE, 4096, LOG_SLOTS),
            data_offset_bytes: 1 << 20,
            capacity_bytes: SIZE,
            server: ServerRecord::fresh(BootId(1)),
            copy: CopyRecord::blank(SIZE, 4096, 4096),
            log_life: 1,
            map_floor: 1,
        };
        let first = superblock::encode(&blank, 0, 1).expect("small");
        let config = VolumeConfig {
            boot_id: BootId(1),
            copy_buffers: (0..4).map(BufferId).collect(),
            stall: Duration::from_secs(10),
            capacity_bytes: SIZE,
        };
        let meta = first.chunks(4096).enumerate().map(|(at, b)| (at as u64 * 4096, b.to_vec())).collect();
        let mut bench = Self {
            now: Instant(1_000_000_000),
            volume: Volume::new(config),
            meta,
            bad: bad.iter().copied().collect(),
            copied: BTreeSet::new(),
            reports: Vec::new(),
            reads: 0,
            hole: false,
            zeroing: Vec::new(),
        };
        bench.settle();
        let change = CopyChange::Identity {
            pair: PairId(1),
            volume: VolumeId(2),
            size_bytes: SIZE,
            block_bytes: 4096,
            sector_bytes: 4096,
            generation: Generation(3),
            state: CopyState::UpToDate,
        };
        let server = ServerRecord::fresh(BootId(1));
        bench.order(Order::Record { tag: 1, server, change, preflush: true });
        bench.order(Order::Serve { mode: ServeMode::Alone, epoch: 1 });
        let generation = Generation(4);
        let server = ServerRecord::fresh(BootId(1));
        let change = CopyChange::WholeMap { generation };
        bench.order(Order::Record { tag: 2, server, change, preflush: false });
        bench
    }

    fn join(&mut self) {
        let part = Part::Source(CopyPlan::Full);
        self.order(Order::Join { session: SESSION, part, resume: false });
    }

    fn order(&mut self, order: Order) {
        self.volume.handle(self.now, Input::Order(order));
        self.settle();
    }

    fn settle(&mut self) {
        while let Some(action) = self.volume.poll_action() {
            match action {
                Action::Disk(DiskOp { id, kind }) => {
                    let outcome = self.disk(kind);
                    self.volume.handle(self.now, Input::Disk(id, outcome));
                }
                Action::Send(session, message, _) => {
                    if let Some(answer) = self.peer(message) {
                        self.volume.handle(self.now, Input::Message(session, answer, None));
                    }
                }
                Action::Report(report) => self.reports.push(report),
                Action::Complete(..)
                | Action::Release(_)
                | Action::CopyBuffer { .. }
                | Action::Exposure(_) => {}
            }
        }
    }

    fn disk(&mut self, kind: DiskOpKind) -> DiskOutcome {
        match kind {
            DiskOpKind::Read { range, buffer: _ } => {
                self.reads += 1;
                let bad = blocks(range).any(|block| self.bad.contains(&block));
                if bad { DiskOutcome::Failed { errno: 5 } } else { DiskOutcome::Done }
            }
            DiskOpKind::Write { .. } | DiskOpKind::Zero { .. } | DiskOpKind::Flush => DiskOutcome::Done,
            DiskOpKind::SeekData { range } => {
                DiskOutcome::Zeroes { length_bytes: if self.hole { range.length_bytes } else { 0 } }
            }
            DiskOpKind::MetaRead { offset_bytes, length_bytes } => {
                let block = |at: u64| self.meta.get(&at).cloned().unwrap_or_else(|| vec![0; 4096]);
                let end = offset_bytes + u64::from(length_bytes);
                DiskOutcome::Bytes((offset_bytes..end).step_by(4096).flat_map(block).collect())
            }
            DiskOpKind::MetaWrite { offset_bytes, bytes, preflush: _ } => {
                for (at, block) in (offset_bytes..).step_by(4096).zip(bytes.chunks(4096)) {
                    self.meta.insert(at, block.to_vec());
                }
                DiskOutcome::Done
            }
        }
    }

    fn peer(&mut self, message: VolumeMessage) -> Option<VolumeMessage> {
        match message {
            VolumeMessage::Copy { id, range } => {
                self.copied.extend(blocks(range));
                Some(VolumeMessage::CopyAck { id, outcome: RemoteOutcome::Done })
            }
            VolumeMessage::CopyZero { id, range } => {
                self.zeroing.push((id, range));
                None
            }
            VolumeMessage::Flush { id } => Some(VolumeMessage::FlushAck { id, outcome: RemoteOutcome::Done }),
            VolumeMessage::SyncDone { .. } => Some(VolumeMessage::SyncAck { outcome: RemoteOutcome::Done }),
            VolumeMessage::Write { .. }
            | VolumeMessage::Zero { .. }
            | VolumeMessage::Ack { .. }
            | VolumeMessage::FlushAck { .. }
            | VolumeMessage::CopyAck { .. }
            | VolumeMessage::Read { .. }
            | VolumeMessage::ReadReply { .. }
            | VolumeMessage::MarksPage { .. }
            | VolumeMessage::MarksEnd { .. }
            | VolumeMessage::MarksAck { .. }
            | VolumeMessage::SyncAck { .. } => None,
        }
    }

    fn advance(&mut self, ms: u64) {
        for _ in 0..ms.div_ceil(20) {
            self.now = self.now + Duration::from_millis(20);
            self.volume.handle(self.now, Input::Time);
            self.settle();
        }
    }

    fn unreadable(&self) -> Vec<ByteRange> {
        let told = self.reports.iter();
        told.filter_map(|report| if let Report::Unreadable { range } = report { Some(*range) } else { None })
            .collect()
    }
}

fn blocks(range: ByteRange) -> impl Iterator<Item = u64> {
    range.offset_bytes / BLOCK..range.end_bytes().div_ceil(BLOCK)
}

#[test]
fn only_the_unreadable_block_stays_marked_and_is_named() {
    let mut bench = Bench::copying(&[70, 1000, 1001]);
    bench.advance(300);
    assert_eq!(bench.volume.dirty_blocks(), 3);
    assert_eq!(bench.copied.len() as u64, SIZE / BLOCK - 3, "everything around them is copied");
    let block = |at: u64| ByteRange::new(at * BLOCK, BLOCK);
    assert_eq!(bench.unreadable(), [block(70), block(1000), block(1001)], "each told once");
    assert_eq!(bench.volume.unreadable(), (3, vec![block(70), ByteRange::new(1000 * BLOCK, 2 * BLOCK)]));
    assert!(!bench.volume.is_synced());
    // They are tried again now and then, not all the time.
    let before = bench.reads;
    bench.advance(5_000);
    assert!((9..=18).contains(&(bench.reads - before)), "{} reads", bench.reads - before);
    assert_eq!(bench.unreadable().len(), 3);
}

#[test]
fn a_block_that_can_be_read_again_ends_the_resync() {
    let mut bench = Bench::copying(&[70]);
    bench.advance(3_000);
    assert!(!bench.volume.is_synced());
    bench.bad.clear();
    bench.advance(3_000);
    assert!(bench.volume.is_synced());
    assert_eq!(bench.volume.dirty_blocks(), 0);
    assert_eq!(bench.volume.unreadable(), (0, Vec::new()));
}

#[test]
fn a_disk_that_reads_nothing_is_not_read_over_and_over() {
    let mut bench = Bench::copying(&(0..SIZE / BLOCK).collect::<Vec<_>>());
    bench.advance(200);
    assert!(bench.copied.is_empty());
    assert!(bench.unreadable().len() <= 1024);
    let before = bench.reads;
    bench.advance(3_000);
    assert!(bench.reads - before < 8_000, "{} reads", bench.reads - before);
}

#[test]
fn a_slow_target_never_has_more_to_zero_than_one_range() {
    let mut bench = Bench::alone(&[]);
    bench.hole = true;
    bench.join();
    let mut zeroed = 0;
    while !bench.volume.is_synced() {
        let waits: u64 = bench.zeroing.iter().map(|(_, range)| range.length_bytes).sum();
        assert!(waits <= ZERO_MAX_BYTES, "{waits} bytes at once, {:?}", bench.zeroing);
        assert_ne!(waits, 0, "{zeroed} bytes are zeroed, and it does not go on");
        // A target that writes 10 MB/s of zeroes takes 3.4 s: below the stall time of 10 s.
        let (id, range) = bench.zeroing.remove(0);
        bench.advance(range.length_bytes / 10_000);
        zeroed += range.length_bytes;
        let answer = VolumeMessage::CopyAck { id, outcome: RemoteOutcome::Done };
        bench.volume.handle(bench.now, Input::Message(SESSION, answer, None));
        bench.settle();
    }
    assert_eq!((zeroed, bench.reads), (SIZE, 0));
}
