//! What a flush of both copies proves: writes on both are stable there, and copied blocks are equal (G2).

use std::collections::BTreeMap;

use super::{DirtyLog, EXTENT_WORDS, ExtentBits, FlushMark, clear, for_extents, is_clear, set};
use crate::ids::ByteRange;

type Sparse = BTreeMap<u32, ExtentBits>;

/// Copied blocks on their way to being cleared.
#[derive(Debug, Default)]
pub(super) struct Marks {
    /// Acknowledged by the peer with exactly this content.
    copied: Sparse,
    /// As `copied`, covered by the flush under way.
    flushing: Sparse,
    /// Proven: to be cleared in the map as soon as the page is there.
    pub(super) proven: Sparse,
    /// The flush that is followed; others prove nothing more.
    followed: Option<u64>,
    next: u64,
}

impl Marks {
    /// Blocks that were written or lost again: nothing is proven of them.
    pub(super) fn forget(&mut self, extent: u32, bits: &ExtentBits) {
        for sparse in [&mut self.copied, &mut self.flushing, &mut self.proven] {
            if let Some(own) = sparse.get_mut(&extent) {
                clear(own, bits);
                if is_clear(own) {
                    sparse.remove(&extent);
                }
            }
        }
    }

    /// Copied blocks of an extent: not to be copied again.
    pub(super) fn copied_of(&self, extent: u32) -> ExtentBits {
        let mut all = [0; EXTENT_WORDS];
        for sparse in [&self.copied, &self.flushing, &self.proven] {
            if let Some(bits) = sparse.get(&extent) {
                set(&mut all, bits);
            }
        }
        all
    }

    pub(super) fn is_empty(&self) -> bool {
        self.copied.is_empty() && self.flushing.is_empty() && self.proven.is_empty()
    }

    pub(super) fn clear(&mut self) {
        self.copied.clear();
        self.flushing.clear();
        self.proven.clear();
        self.followed = None;
    }
}

impl DirtyLog {
    /// Whole blocks that the peer acknowledged with exactly this content; the owner held their lock.
    pub fn copied(&mut self, range: ByteRange) {
        let (first, end) = self.block_span(range);
        let copied = &mut self.marks.copied;
        for_extents(first, end, |number, bits| {
            set(copied.entry(number).or_insert([0; EXTENT_WORDS]), bits);
        });
    }

    /// A flush goes to both copies now: it covers every write that has ended.
    pub fn flush_issued(&mut self) -> FlushMark {
        self.marks.next += 1;
        let mark = self.marks.next;
        if self.marks.followed.is_none() {
            self.marks.followed = Some(mark);
            for extent in self.extents.values_mut() {
                let mut settled = extent.touched;
                clear(&mut settled, &extent.busy);
                set(&mut extent.flushing, &settled);
                clear(&mut extent.touched, &settled);
            }
            let copied = std::mem::take(&mut self.marks.copied);
            for (number, bits) in copied {
                set(self.marks.flushing.entry(number).or_insert([0; EXTENT_WORDS]), &bits);
            }
        }
        FlushMark(mark)
    }

    /// It completed on both copies.
    pub fn flush_completed(&mut self, mark: FlushMark) {
        if self.marks.followed != Some(mark.0) {
            return;
        }
        self.marks.followed = None;
        for extent in self.extents.values_mut() {
            extent.flushing = [0; EXTENT_WORDS];
        }
        let flushed = std::mem::take(&mut self.marks.flushing);
        for (number, bits) in flushed {
            if let Some(extent) = self.extents.get_mut(&number) {
                clear(&mut extent.dirty, &bits);
            }
            set(self.marks.proven.entry(number).or_insert([0; EXTENT_WORDS]), &bits);
        }
        self.pump();
    }

    /// It did not complete on both: it proves nothing.
    pub fn flush_abandoned(&mut self, mark: FlushMark) {
        if self.marks.followed != Some(mark.0) {
            return;
        }
        self.marks.followed = None;
        for extent in self.extents.values_mut() {
            let flushing = std::mem::replace(&mut extent.flushing, [0; EXTENT_WORDS]);
            set(&mut extent.touched, &flushing);
        }
        let flushing = std::mem::take(&mut self.marks.flushing);
        for (number, bits) in flushing {
            set(self.marks.copied.entry(number).or_insert([0; EXTENT_WORDS]), &bits);
        }
    }

    /// The session is over: what was not flushed on both may differ, what was copied is not proven.
    pub fn session_lost(&mut self) {
        self.marks.clear();
        for extent in self.extents.values_mut() {
            let touched = std::mem::replace(&mut extent.touched, [0; EXTENT_WORDS]);
            let flushing = std::mem::replace(&mut extent.flushing, [0; EXTENT_WORDS]);
            let busy = extent.busy;
            for open in [&touched, &flushing, &busy] {
                set(&mut extent.dirty, open);
            }
        }
        self.pump();
    }

    /// A flush of both copies would let something go on.
    pub fn wants_flush(&self) -> bool {
        self.room_needs_flush || !self.marks.copied.is_empty()
    }

    /// Something was written on both copies and not flushed since.
    pub fn has_touched(&self) -> bool {
        self.extents.values().any(super::extents::Extent::is_touched)
    }
}
