//! One volume with its disk in hand: every action becomes a word, and nothing ends before the test says so.

use std::collections::BTreeMap;
use std::time::Duration;

use duplex_core::format::placement::{LOG_SLOTS, MetaPlacement};
use duplex_core::format::record::{CopyRecord, CopyState, Era, ServerRecord};
use duplex_core::format::superblock::{self, SUPERBLOCK_BYTES, Superblock};
use duplex_core::ids::{
    BootId, BufferId, ByteRange, Generation, PairId, RequestId, Sequence, SessionId, VolumeId,
};
use duplex_core::message::{RemoteOutcome, VolumeMessage};
use duplex_core::mirror::api::{Action, Input, Order, Part, ServeMode};
use duplex_core::mirror::{Volume, VolumeConfig};
use duplex_core::request::{DiskOp, DiskOpKind, DiskOutcome, Request, RequestOp};
use duplex_core::time::Instant;

/// Size of the volume: four extents of the activity log.
pub(crate) const SIZE_BYTES: u64 = 16 << 20;
/// One block of the dirty map.
pub(crate) const BLOCK: u64 = 4096;
/// The session of these tests.
pub(crate) const SESSION: SessionId = SessionId(7);
/// An operation that takes so long counts as a failed copy.
pub(crate) const STALL: Duration = Duration::from_secs(3600);
/// The lease lasts longer than any test.
const LEASE: Instant = Instant(u64::MAX / 2);

const BLOCK_BYTES: u32 = 4096;
const BOOT: BootId = BootId(1);

/// A block's range.
pub(crate) fn block(at: u64) -> ByteRange {
    ByteRange::new(at * BLOCK, BLOCK)
}

/// A server's record in this era, of this boot, ended in order.
pub(crate) fn record(era: Era) -> ServerRecord {
    ServerRecord { era, ..ServerRecord::fresh(BOOT) }
}

/// An up-to-date copy of generation 1.
pub(crate) fn copy() -> CopyRecord {
    CopyRecord {
        pair: PairId(1),
        volume: VolumeId(2),
        generation: Generation(1),
        base: Generation(1),
        state: CopyState::UpToDate,
        ..CopyRecord::blank(SIZE_BYTES, BLOCK_BYTES, BLOCK_BYTES)
    }
}

/// The volume under test.
pub(crate) struct Rig {
    pub(crate) volume: Volume,
    /// Disk operations that have not ended, oldest first.
    pending: Vec<(String, DiskOp)>,
    meta: BTreeMap<u64, Vec<u8>>,
    placement: MetaPlacement,
    now: Instant,
    /// The newest flush and the newest chunk that were sent.
    sent_flush: u64,
    sent_chunk: u64,
}

impl Rig {
    /// A volume that has just read its disk: this server record, this copy.
    pub(crate) fn new(server: ServerRecord, copy: CopyRecord) -> Self {
        let placement = MetaPlacement::for_size(SIZE_BYTES, BLOCK_BYTES, LOG_SLOTS);
        let first = Superblock {
            instance: 5,
            features: 0,
            placement,
            data_offset_bytes: 0,
            server,
            copy,
            capacity_bytes: SIZE_BYTES,
            log_life: 1,
            map_floor: 1,
        };
        let config = VolumeConfig {
            boot_id: BOOT,
            copy_buffers: (100..116).map(BufferId).collect(),
            stall: STALL,
            capacity_bytes: SIZE_BYTES,
        };
        let bytes = superblock::encode(&first, 0, 1).expect("a small superblock fits");
        let mut rig = Self {
            volume: Volume::new(config),
            pending: Vec::new(),
            meta: bytes.chunks(SUPERBLOCK_BYTES).zip(0..).map(|(b, at)| (at * BLOCK, b.to_vec())).collect(),
            placement,
            now: Instant(1),
            sent_flush: u64::MAX,
            sent_chunk: u64::MAX,
        };
        rig.give(Input::Time);
        rig.settle();
        assert!(rig.volume.is_loaded(), "the volume starts");
        rig
    }

    /// A primary with its peer in step.
    pub(crate) fn mirrored() -> Self {
        let mut rig = Self::new(record(Era::Pair), copy());
        rig.order(Order::Join { session: SESSION, part: Part::Source(super_plan()), resume: false });
        rig.order(Order::Serve { mode: ServeMode::Mirrored, epoch: 3 });
        rig.volume.set_lease(rig.now, LEASE);
        rig.settle();
        rig
    }

    /// A primary that serves alone, by right.
    pub(crate) fn alone() -> Self {
        let mut rig = Self::new(record(Era::Solo(3)), copy());
        rig.order(Order::Serve { mode: ServeMode::Alone, epoch: 3 });
        rig.settle();
        rig
    }

    /// A secondary in step with its primary.
    pub(crate) fn secondary() -> Self {
        let mut rig = Self::new(record(Era::Pair), copy());
        rig.order(Order::Join { session: SESSION, part: Part::Target(super_plan()), resume: false });
        rig.settle();
        rig
    }

    /// Gives an input and tells what the volume does.
    pub(crate) fn give(&mut self, input: Input) -> Vec<String> {
        self.now = self.now + Duration::from_nanos(1);
        self.volume.handle(self.now, input);
        self.told()
    }

    /// The same for an order.
    pub(crate) fn order(&mut self, order: Order) -> Vec<String> {
        self.give(Input::Order(order))
    }

    /// A client writes a block; the buffer bears the request's number.
    pub(crate) fn write(&mut self, id: u32, at: u64) -> Vec<String> {
        let op = RequestOp::Write { range: block(at), buffer: BufferId(id), fua: false };
        self.give(Input::Request(Request { id: RequestId(id.into()), op }))
    }

    /// A client reads a block.
    pub(crate) fn read(&mut self, id: u32, at: u64) -> Vec<String> {
        let op = RequestOp::Read { range: block(at), buffer: BufferId(id) };
        self.give(Input::Request(Request { id: RequestId(id.into()), op }))
    }

    /// A client flushes.
    pub(crate) fn flush(&mut self, id: u32) -> Vec<String> {
        self.give(Input::Request(Request { id: RequestId(id.into()), op: RequestOp::Flush }))
    }

    /// The peer says this.
    pub(crate) fn hear(&mut self, message: VolumeMessage, buffer: Option<u32>) -> Vec<String> {
        self.give(Input::Message(SESSION, message, buffer.map(BufferId)))
    }

    /// The peer has written the n-th replicated operation.
    pub(crate) fn ack(&mut self, seq: u64) -> Vec<String> {
        self.hear(VolumeMessage::Ack { seq: Sequence(seq), outcome: RemoteOutcome::Done }, None)
    }

    /// The peer has flushed.
    pub(crate) fn peer_flushed(&mut self) -> Vec<String> {
        self.hear(VolumeMessage::FlushAck { id: self.sent_flush, outcome: RemoteOutcome::Done }, None)
    }

    /// The peer has written the chunk.
    pub(crate) fn peer_copied(&mut self) -> Vec<String> {
        self.hear(VolumeMessage::CopyAck { id: self.sent_chunk, outcome: RemoteOutcome::Done }, None)
    }

    /// The oldest disk operation of this name ends well.
    pub(crate) fn ends(&mut self, name: &str) -> Vec<String> {
        let op = self.take(name);
        if let DiskOpKind::MetaWrite { offset_bytes, bytes, .. } = &op.kind {
            self.meta.insert(*offset_bytes, bytes.clone());
        }
        self.give(Input::Disk(op.id, DiskOutcome::Done))
    }

    /// The oldest disk operation of this name fails.
    pub(crate) fn fails(&mut self, name: &str, errno: i32) -> Vec<String> {
        let op = self.take(name);
        self.give(Input::Disk(op.id, DiskOutcome::Failed { errno }))
    }

    /// Time passes.
    pub(crate) fn later(&mut self, pause: Duration) -> Vec<String> {
        self.now = self.now + pause;
        self.give(Input::Time)
    }

    /// So much time passes, and the volume is woken only when it asked to be.
    pub(crate) fn wakes_for(&mut self, time: Duration) -> Vec<String> {
        let until = self.now + time;
        let mut told = Vec::new();
        while let Some(at) = self.volume.next_deadline().filter(|at| *at <= until) {
            self.now = self.now.max(at);
            told.extend(self.give(Input::Time));
        }
        self.now = until;
        told
    }

    /// Every disk operation ends, until none is left; what else was done meanwhile.
    pub(crate) fn settle(&mut self) -> Vec<String> {
        let mut all = Vec::new();
        while let Some((name, _)) = self.pending.first().cloned() {
            all.extend(self.ends(&name));
        }
        all
    }

    /// Names of the disk operations that have not ended.
    pub(crate) fn pending(&self) -> Vec<&str> {
        self.pending.iter().map(|(name, _)| name.as_str()).collect()
    }

    fn take(&mut self, name: &str) -> DiskOp {
        let Some(at) = self.pending.iter().position(|(n, _)| n == name) else {
            panic!("no {name} under way, only {:?}", self.pending());
        };
        self.pending.remove(at).1
    }

    fn told(&mut self) -> Vec<String> {
        let mut told = Vec::new();
        while let Some(action) = self.volume.poll_action() {
            match action {
                Action::Disk(op) => {
                    if let DiskOpKind::MetaRead { offset_bytes, length_bytes } = op.kind {
                        let bytes = self.meta_bytes(offset_bytes, length_bytes);
                        self.volume.handle(self.now, Input::Disk(op.id, DiskOutcome::Bytes(bytes)));
                        continue;
                    }
                    let name = self.name(&op.kind);
                    told.push(name.clone());
                    self.pending.push((name, op));
                }
                Action::Send(_, message, _) => {
                    if let VolumeMessage::Flush { id } = &message {
                        self.sent_flush = *id;
                    }
                    if let VolumeMessage::Copy { id, .. } = &message {
                        self.sent_chunk = *id;
                    }
                    told.push(format!("send {}", word(&message)));
                }
                Action::Complete(id, Ok(())) => told.push(format!("complete {}", id.0)),
                Action::Complete(id, Err(error)) => told.push(format!("refuse {}: {error}", id.0)),
                Action::Report(report) => {
                    let text = format!("{report:?}");
                    let name = text.split([' ', '(']).next().unwrap_or_default();
                    told.push(format!("report {name}"));
                }
                Action::Release(_) | Action::CopyBuffer { .. } | Action::Exposure(_) => {}
            }
        }
        told
    }

    fn meta_bytes(&self, offset_bytes: u64, length_bytes: u32) -> Vec<u8> {
        let blocks = (offset_bytes / BLOCK)..(offset_bytes + u64::from(length_bytes)).div_ceil(BLOCK);
        blocks.flat_map(|at| self.meta.get(&(at * BLOCK)).cloned().unwrap_or_else(|| vec![0; 4096])).collect()
    }

    fn name(&self, kind: &DiskOpKind) -> String {
        match kind {
            DiskOpKind::Read { range, .. } => format!("read {range}"),
            DiskOpKind::Write { range, .. } => format!("write {range}"),
            DiskOpKind::Zero { range, .. } => format!("zero {range}"),
            DiskOpKind::Flush => "flush".to_owned(),
            DiskOpKind::SeekData { range } => format!("seek {range}"),
            DiskOpKind::MetaRead { .. } => "meta read".to_owned(),
            DiskOpKind::MetaWrite { offset_bytes, preflush, .. } => {
                let place = match *offset_bytes {
                    at if at < 2 * SUPERBLOCK_BYTES as u64 => "record",
                    at if at >= self.placement.log_offset_bytes && at < self.placement.head_bytes() => "log",
                    _ => "map",
                };
                if *preflush { format!("preflush {place}") } else { place.to_owned() }
            }
        }
    }
}

/// Both copies are in step: nothing to copy.
const fn super_plan() -> duplex_core::mirror::api::CopyPlan {
    duplex_core::mirror::api::CopyPlan::None
}

fn word(message: &VolumeMessage) -> String {
    match message {
        VolumeMessage::Write { range, .. } => format!("write {range}"),
        VolumeMessage::Zero { range, .. } => format!("zero {range}"),
        VolumeMessage::Ack { outcome, .. } => format!("ack {}", ended(*outcome)),
        VolumeMessage::Flush { .. } => "flush".to_owned(),
        VolumeMessage::FlushAck { outcome, .. } => format!("flush-ack {}", ended(*outcome)),
        VolumeMessage::Copy { range, .. } => format!("copy {range}"),
        VolumeMessage::CopyZero { range, .. } => format!("copy-zero {range}"),
        VolumeMessage::CopyAck { outcome, .. } => format!("copy-ack {}", ended(*outcome)),
        VolumeMessage::Read { range, .. } => format!("read {range}"),
        VolumeMessage::ReadReply { outcome, .. } => format!("read-reply {}", ended(*outcome)),
        VolumeMessage::MarksPage { .. } => "marks-page".to_owned(),
        VolumeMessage::MarksEnd { .. } => "marks-end".to_owned(),
        VolumeMessage::MarksAck { .. } => "marks-ack".to_owned(),
        VolumeMessage::SyncDone { .. } => "sync-done".to_owned(),
        VolumeMessage::SyncAck { outcome } => format!("sync-ack {}", ended(*outcome)),
    }
}

fn ended(outcome: RemoteOutcome) -> String {
    match outcome {
        RemoteOutcome::Done => "done".to_owned(),
        RemoteOutcome::Failed { errno } => format!("failed {errno}"),
    }
}
