//! Data as pages that are shared instead of copied: an absent page is all zeroes.

use std::rc::Rc;

use duplex_core::ids::BufferId;

/// Bytes of a page.
pub const PAGE_BYTES: usize = 4096;

/// A page's content; `None` reads as zeroes.
pub type Page = Option<Rc<[u8; PAGE_BYTES]>>;

/// A page that carries this stamp in every sector; stamp 0 is the page of zeroes.
pub fn stamped(stamp: u64) -> Page {
    if stamp == 0 {
        return None;
    }
    let mut bytes = [0; PAGE_BYTES];
    for word in bytes.chunks_exact_mut(8) {
        word.copy_from_slice(&stamp.to_le_bytes());
    }
    Some(Rc::new(bytes))
}

/// The stamp of a page, or `None` if it is not one stamp throughout.
pub fn stamp_of(page: &Page) -> Option<u64> {
    let Some(bytes) = page else { return Some(0) };
    let first = &bytes[..8];
    let same = bytes.chunks_exact(8).all(|word| word == first);
    same.then(|| first.iter().rev().fold(0, |value, byte| (value << 8) | u64::from(*byte)))
}

/// A page from bytes; all zeroes become the absent page.
pub fn from_bytes(bytes: &[u8]) -> Page {
    if bytes.iter().all(|byte| *byte == 0) {
        return None;
    }
    let mut page = [0; PAGE_BYTES];
    page[..bytes.len()].copy_from_slice(bytes);
    Some(Rc::new(page))
}

/// The bytes of a page.
pub fn to_bytes(page: &Page) -> [u8; PAGE_BYTES] {
    page.as_ref().map_or([0; PAGE_BYTES], |bytes| **bytes)
}

/// Equal content.
pub fn same(a: &Page, b: &Page) -> bool {
    match (a, b) {
        (None, None) => true,
        (Some(a), Some(b)) => Rc::ptr_eq(a, b) || a == b,
        (Some(x), None) | (None, Some(x)) => x.iter().all(|byte| *byte == 0),
    }
}

/// The buffer arena of one volume's thread.
#[derive(Debug, Default)]
pub struct Buffers {
    slots: Vec<Option<Vec<Page>>>,
    free: Vec<u32>,
}

impl Buffers {
    /// A buffer with this content.
    pub fn put(&mut self, pages: Vec<Page>) -> BufferId {
        if let Some(slot) = self.free.pop() {
            self.slots[slot as usize] = Some(pages);
            return BufferId(slot);
        }
        self.slots.push(Some(pages));
        BufferId(u32::try_from(self.slots.len() - 1).expect("fewer than 2^32 buffers in a run"))
    }

    /// Gives a buffer back.
    ///
    /// # Panics
    /// If it is not in use: then the core gave a buffer back twice.
    pub fn release(&mut self, id: BufferId) {
        let slot = self.slots.get_mut(id.0 as usize).and_then(Option::take);
        assert!(slot.is_some(), "buffer {} is given back twice", id.0);
        self.free.push(id.0);
    }

    /// The first `count` pages.
    ///
    /// # Panics
    /// If the buffer is not in use: then the core uses one it gave back.
    pub fn pages(&self, id: BufferId, count: usize) -> Vec<Page> {
        let slot = self.slots.get(id.0 as usize).and_then(Option::as_ref);
        let pages = slot.unwrap_or_else(|| panic!("buffer {} is used after it was given back", id.0));
        let mut taken: Vec<Page> = pages.iter().take(count).cloned().collect();
        taken.resize(count, None);
        taken
    }

    /// Overwrites the first pages; a buffer that is gone is left alone (its request was abandoned).
    pub fn fill(&mut self, id: BufferId, pages: &[Page]) {
        if let Some(Some(slot)) = self.slots.get_mut(id.0 as usize) {
            for (at, page) in pages.iter().enumerate() {
                match slot.get_mut(at) {
                    Some(place) => place.clone_from(page),
                    None => slot.push(page.clone()),
                }
            }
        }
    }

    /// Buffers in use.
    pub fn in_use(&self) -> usize {
        self.slots.len() - self.free.len()
    }
}
