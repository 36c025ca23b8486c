//! interim signatures
#![allow(missing_docs, unused_variables, clippy::all)]
use crate::format::placement::MetaPlacement;
use crate::ids::{ByteRange, Proven};
pub const CAPACITY_EXTENTS: u32 = 900;
#[derive(Clone, Copy, Debug)]
pub struct LogGeometry {
    pub size_bytes: u64,
    pub block_bytes: u32,
    pub log_slots: u32,
    pub capacity_extents: u32,
    pub placement: MetaPlacement,
}
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ticket(pub u64);
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FlushMark(pub u64);
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum WriteEnd {
    Both,
    OnlyHere,
    Nothing,
}
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum MetaOp {
    Read { offset_bytes: u64, length_bytes: u32 },
    Write { offset_bytes: u64, bytes: Vec<u8> },
}
pub enum NextDirty {
    Run { first_block: u64, blocks: u64 },
    Loading,
    End,
}
pub enum NextPage {
    Page { index: u64, bits: Box<[u8; 3968]> },
    Loading,
    End,
}
pub struct BadPage;
#[derive(Debug)]
pub struct DirtyLog;
impl DirtyLog {
    pub fn fresh(g: LogGeometry, instance: u128, life: u64, first_counter: u64) -> Self {
        Self
    }
    pub fn load(g: LogGeometry, instance: u128, life: u64, map_floor: u64, first_counter: u64) -> Self {
        Self
    }
    pub fn is_loaded(&self) -> bool {
        true
    }
    pub fn replayed_extents(&self) -> u64 {
        0
    }
    pub fn replayed_proven(&self) -> Option<Proven> {
        None
    }
    pub fn log_was_empty(&self) -> bool {
        true
    }
    pub fn begin_life(&mut self, life: u64) {}
    pub fn poll_op(&mut self) -> Option<(u64, MetaOp)> {
        None
    }
    pub fn op_done(&mut self, op: u64, outcome: Result<Vec<u8>, i32>) {}
    pub fn failed(&self) -> Option<i32> {
        None
    }
    pub fn begin(&mut self, ticket: Ticket, range: ByteRange) -> bool {
        true
    }
    pub fn poll_ready(&mut self) -> Option<Ticket> {
        None
    }
    pub fn end(&mut self, range: ByteRange, outcome: WriteEnd) {}
    pub fn mark(&mut self, range: ByteRange) {}
    pub fn session_lost(&mut self) {}
    pub fn flush_issued(&mut self) -> FlushMark {
        FlushMark(0)
    }
    pub fn flush_completed(&mut self, m: FlushMark) {}
    pub fn flush_abandoned(&mut self, m: FlushMark) {}
    pub fn wants_flush(&self) -> bool {
        false
    }
    pub fn settle(&mut self) {}
    pub fn is_settled(&self) -> bool {
        true
    }
    pub fn has_touched(&self) -> bool {
        false
    }
    pub fn active_extents(&self) -> usize {
        0
    }
    pub fn set_proven(&mut self, p: Proven) {}
    pub fn dirty_blocks(&self) -> u64 {
        0
    }
    pub fn next_dirty(&mut self, from: u64, max: u64) -> NextDirty {
        NextDirty::End
    }
    pub fn copied(&mut self, range: ByteRange) {}
    pub fn next_page(&mut self, from: u64) -> NextPage {
        NextPage::End
    }
    pub fn merge_page(&mut self, index: u64, bits: &[u8]) -> Result<(), BadPage> {
        Ok(())
    }
    pub fn can_merge(&self) -> bool {
        true
    }
    pub fn merges_durable(&self) -> bool {
        true
    }
    pub fn set_all(&mut self) {}
    pub fn clear_all_at(&mut self, floor: u64) {}
    pub fn next_floor(&self) -> u64 {
        0
    }
}
