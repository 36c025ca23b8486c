//! Marks as the resync sees them: found, sent, merged, set and cleared as a whole.

use super::map::{PageBits, extents_of_page};
use super::{BadPage, DirtyLog, EXTENT_WORDS, NextDirty, NextPage, count, is_clear, place_in_page};
use crate::format::map_page::{EXTENT_BLOCKS, PAGE_BLOCKS, PAGE_BYTES, PAGE_EXTENTS, PAGE_WORDS};

impl DirtyLog {
    /// Blocks marked, each once; marks of active extents whose page is not in memory may be counted twice.
    pub fn dirty_blocks(&self) -> u64 {
        let mut active = 0;
        for (number, extent) in &self.extents {
            let marked = count(&extent.dirty);
            if marked == 0 {
                continue;
            }
            let (page, first) = place_in_page(*number);
            if self.map.is_full(page) {
                continue;
            }
            let in_page = self.map.known(page).map_or(0, |bits| {
                let own = bits[first..first + EXTENT_WORDS].iter();
                own.zip(&extent.dirty).map(|(a, b)| u64::from((a & b).count_ones())).sum()
            });
            active += marked - in_page;
        }
        self.map.total() + active + self.map.waiting_marks()
    }

    /// Some block is marked. Cheap where many are: asked after every input.
    pub fn has_dirty_blocks(&self) -> bool {
        self.map.total() > 0
            || self.map.has_waiting_marks()
            || self.extents.values().any(|extent| !is_clear(&extent.dirty))
    }

    /// The next marked blocks at or after `from_block` that are not copied yet. A run ends with its page, or with a
    /// later one when every block of the pages between is marked.
    pub fn next_dirty(&mut self, from_block: u64, max_blocks: u64) -> NextDirty {
        let mut page = from_block / PAGE_BLOCKS;
        let mut first = from_block % PAGE_BLOCKS;
        while let Some(marked) = self.next_marked(page, false) {
            if marked > page {
                first = 0;
            }
            let most = max_blocks.max(1);
            if self.is_whole(marked) {
                let blocks = self.whole_pages(marked, marked * PAGE_BLOCKS + first, most);
                if blocks > 0 {
                    return NextDirty::Run { first_block: marked * PAGE_BLOCKS + first, blocks };
                }
            } else if !self.marks.has_page(marked) {
                let Some(mut bits) = self.compose(marked, false) else {
                    return NextDirty::Loading;
                };
                self.without_copied(marked, &mut bits);
                if let Some((start, blocks)) = run(&bits, first, most) {
                    let first_block = marked * PAGE_BLOCKS + start;
                    let ends = start + blocks == PAGE_BLOCKS;
                    let more = if ends {
                        self.whole_pages(marked + 1, first_block + blocks, most - blocks)
                    } else {
                        0
                    };
                    return NextDirty::Run { first_block, blocks: blocks + more };
                }
            }
            page = marked + 1;
            first = 0;
        }
        NextDirty::End
    }

    /// Every block of the page is marked, and none is copied.
    fn is_whole(&self, page: u64) -> bool {
        self.map.count(page) > 0 && self.map.is_full(page) && !self.marks.touches(page)
    }

    /// Blocks from `first_block` on, at most `most`, as long as their pages, of which `page` is the first, are whole.
    fn whole_pages(&self, mut page: u64, first_block: u64, most: u64) -> u64 {
        let limit = first_block.saturating_add(most).min(self.blocks());
        let mut end = first_block;
        while end < limit && self.is_whole(page) {
            page += 1;
            end = (page * PAGE_BLOCKS).min(limit);
        }
        end - first_block
    }

    /// The next page with marks at or after `from_page`, blocks not flushed on both included.
    pub fn next_page(&mut self, from_page: u64) -> NextPage {
        if let Some(page) = self.next_marked(from_page, true) {
            let Some(bits) = self.compose(page, true) else {
                return NextPage::Loading;
            };
            let mut bytes = Box::new([0; PAGE_BYTES]);
            for (piece, word) in bytes.chunks_exact_mut(8).zip(bits.iter()) {
                piece.copy_from_slice(&word.to_le_bytes());
            }
            return NextPage::Page { index: page, bits: bytes };
        }
        NextPage::End
    }

    /// The first page at or after `from` that may have marks, in the map or in active extents.
    fn next_marked(&self, from: u64, touched: bool) -> Option<u64> {
        let marked =
            |e: &super::Extent| !is_clear(&e.dirty) || (touched && (e.is_touched() || !is_clear(&e.busy)));
        let first = extents_of_page(from).start;
        let active = self.extents.range(first..).find(|(_, e)| marked(e)).map(|(n, _)| place_in_page(*n).0);
        let page = self.map.next_marked(from).into_iter().chain(active).min()?;
        (page < self.map.page_count()).then_some(page)
    }

    fn extents_of(&self, page: u64) -> impl IntoIterator<Item = (&u32, &super::Extent)> {
        self.extents.range(extents_of_page(page))
    }

    /// The page with the marks of its active extents; `None` while it is being read.
    fn compose(&mut self, page: u64, touched: bool) -> Option<Box<PageBits>> {
        let Some(mut bits) = self.map.bits(page) else {
            self.map.want(page);
            self.pump_map();
            return None;
        };
        self.map.waiting_bits(page, &mut bits);
        for (number, extent) in self.extents_of(page) {
            let (_, first) = place_in_page(*number);
            for (at, word) in bits[first..first + EXTENT_WORDS].iter_mut().enumerate() {
                *word |= extent.dirty[at];
                if touched {
                    *word |= extent.touched[at] | extent.flushing[at] | extent.busy[at];
                }
            }
        }
        Some(bits)
    }

    fn without_copied(&self, page: u64, bits: &mut PageBits) {
        if self.marks.is_empty() {
            return;
        }
        for number in extents_of_page(page) {
            let copied = self.marks.copied_of(number);
            let (_, at) = place_in_page(number);
            for (word, other) in bits[at..at + EXTENT_WORDS].iter_mut().zip(&copied) {
                *word &= !other;
            }
        }
    }

    /// The block may differ between the copies: it is marked, or its extent is active. Where the page is not in
    /// memory and only partly marked the answer is true.
    pub fn is_marked(&self, block: u64) -> bool {
        let extent = u32::try_from(block / EXTENT_BLOCKS).unwrap_or(u32::MAX);
        self.extents.contains_key(&extent) || self.map.is_marked(block)
    }

    /// Takes in a page of the peer's marks: the union of both maps.
    ///
    /// # Errors
    /// The page is not of this volume.
    pub fn merge_page(&mut self, index: u64, bits: &[u8]) -> Result<(), BadPage> {
        if index >= self.map.page_count() || bits.len() != PAGE_BYTES {
            return Err(BadPage { index, bytes: bits.len() });
        }
        let mut page = Box::new([0; PAGE_WORDS]);
        for (word, piece) in page.iter_mut().zip(bits.chunks_exact(8)) {
            *word = crate::format::seal::read_u64(piece, 0);
        }
        // Copied before the peer marked it: it is to be copied again.
        for (number, words) in (index * PAGE_EXTENTS..).zip(page.chunks_exact(EXTENT_WORDS)) {
            let mut marked = [0; EXTENT_WORDS];
            marked.copy_from_slice(words);
            self.marks.forget(u32::try_from(number).unwrap_or(u32::MAX), &marked);
        }
        self.map.take_merge(index, page);
        self.pump();
        Ok(())
    }

    /// Another page may be merged now.
    pub fn can_merge(&self) -> bool {
        self.map.can_take_merge()
    }

    /// Everything merged or set so far is durable.
    pub fn merges_durable(&self) -> bool {
        self.map.all_durable()
    }

    /// Marks every block. Durable when [`Self::merges_durable`].
    pub fn set_all(&mut self) {
        self.marks.clear();
        self.map.set_all();
        self.pump();
    }

    /// The floor that the owner's next superblock must bear to make the map empty.
    pub const fn next_floor(&self) -> u64 {
        self.map.next_counter()
    }

    /// The owner's superblock with this floor is durable: nothing is marked any more.
    pub fn clear_all_at(&mut self, floor: u64) {
        self.marks.clear();
        self.map.clear_all(floor);
        for extent in self.extents.values_mut() {
            extent.dirty = [0; EXTENT_WORDS];
            extent.touched = [0; EXTENT_WORDS];
            extent.flushing = [0; EXTENT_WORDS];
        }
        self.settle();
    }
}

/// The first run of set bits at or after `first`, at most `max` long.
fn run(bits: &PageBits, first: u64, max: u64) -> Option<(u64, u64)> {
    let mut start = first;
    loop {
        if start >= PAGE_BLOCKS {
            return None;
        }
        let word = bits[(start / 64) as usize] >> (start % 64);
        if word != 0 {
            start += u64::from(word.trailing_zeros());
            break;
        }
        start = (start / 64 + 1) * 64;
    }
    let limit = PAGE_BLOCKS.min(start.saturating_add(max));
    let mut end = start;
    while end < limit {
        let ones = u64::from((bits[(end / 64) as usize] >> (end % 64)).trailing_ones());
        end += ones;
        if ones == 0 || !end.is_multiple_of(64) {
            break;
        }
    }
    Some((start, end.min(limit) - start))
}
