//! What a flush of both copies proves: writes on both are stable there, and copied blocks are equal (G2).

use std::collections::{BTreeMap, BTreeSet};

use super::map::extents_of_page;
use super::{
    DirtyLog, EXTENT_WORDS, ExtentBits, FlushMark, clear, for_extents, is_clear, place_in_page, set,
};
use crate::format::map_page::PAGE_BLOCKS;
use crate::ids::ByteRange;

/// A set of blocks: bits of extents, and pages of which every block is meant. A copied hole of terabytes costs one
/// number a page.
#[derive(Debug, Default)]
pub(super) struct Sparse {
    pub(super) extents: BTreeMap<u32, ExtentBits>,
    pub(super) pages: BTreeSet<u64>,
}

impl Sparse {
    fn is_empty(&self) -> bool {
        self.extents.is_empty() && self.pages.is_empty()
    }

    fn clear(&mut self) {
        self.extents.clear();
        self.pages.clear();
    }

    fn add(&mut self, extent: u32, bits: &ExtentBits) {
        set(self.extents.entry(extent).or_insert([0; EXTENT_WORDS]), bits);
    }

    fn add_all(&mut self, mut other: Self) {
        for (number, bits) in other.extents {
            self.add(number, &bits);
        }
        self.pages.append(&mut other.pages);
    }

    fn remove(&mut self, extent: u32, bits: &ExtentBits) {
        let (page, _) = place_in_page(extent);
        if self.pages.remove(&page) {
            // The rest of the page stays, from now on by its extents.
            for number in extents_of_page(page) {
                self.extents.insert(number, [u64::MAX; EXTENT_WORDS]);
            }
        }
        if let Some(own) = self.extents.get_mut(&extent) {
            clear(own, bits);
            if is_clear(own) {
                self.extents.remove(&extent);
            }
        }
    }

    fn put_into(&self, extent: u32, bits: &mut ExtentBits) {
        if let Some(own) = self.extents.get(&extent) {
            set(bits, own);
        }
    }

    fn touches(&self, page: u64) -> bool {
        self.pages.contains(&page) || self.extents.range(extents_of_page(page)).next().is_some()
    }
}

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
        if is_clear(bits) {
            return;
        }
        for sparse in [&mut self.copied, &mut self.flushing, &mut self.proven] {
            sparse.remove(extent, bits);
        }
    }

    /// Copied blocks of an extent: not to be copied again. Ask [`Self::has_page`] first.
    pub(super) fn copied_of(&self, extent: u32) -> ExtentBits {
        let mut all = [0; EXTENT_WORDS];
        for sparse in [&self.copied, &self.flushing, &self.proven] {
            sparse.put_into(extent, &mut all);
        }
        all
    }

    /// Every block of the page is copied.
    pub(super) fn has_page(&self, page: u64) -> bool {
        [&self.copied, &self.flushing, &self.proven].into_iter().any(|sparse| sparse.pages.contains(&page))
    }

    /// Something of the page is copied.
    pub(super) fn touches(&self, page: u64) -> bool {
        [&self.copied, &self.flushing, &self.proven].into_iter().any(|sparse| sparse.touches(page))
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
        let blocks = self.blocks();
        let copied = &mut self.marks.copied;
        let mut block = first;
        while block < end {
            let page = block / PAGE_BLOCKS;
            let page_end = ((page + 1) * PAGE_BLOCKS).min(blocks);
            let stop = page_end.min(end);
            if block == page * PAGE_BLOCKS && stop == page_end {
                copied.pages.insert(page);
            } else {
                for_extents(block, stop, |number, bits| copied.add(number, bits));
            }
            block = stop;
        }
    }

    /// Whole pages that are copied and not yet proven by a flush.
    pub fn copied_pages(&self) -> usize {
        self.marks.copied.pages.len() + self.marks.flushing.pages.len()
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
            self.marks.flushing.add_all(copied);
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
        for (number, bits) in &flushed.extents {
            if let Some(extent) = self.extents.get_mut(number) {
                clear(&mut extent.dirty, bits);
            }
        }
        for page in &flushed.pages {
            for (_, extent) in self.extents.range_mut(extents_of_page(*page)) {
                extent.dirty = [0; EXTENT_WORDS];
            }
        }
        self.marks.proven.add_all(flushed);
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
        self.marks.copied.add_all(flushing);
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
