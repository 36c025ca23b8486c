//! Payload slots: one mapping, size classes carved on demand, counted by reference.

use duplex_core::ids::BufferId;
use memmap2::{Advice, MmapMut, MmapOptions};

/// Largest slot.
pub const BUFFER_MAX_BYTES: usize = CLASS_BYTES[CLASSES - 1];

const PAGE_BYTES: usize = 4096;
const CLASSES: usize = 5;
const CLASS_BYTES: [usize; CLASSES] = [4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20];
/// Every class is this many of the one below.
const FAN: u32 = 4;
const NONE: u32 = u32::MAX;

/// Why an arena could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ArenaError {
    /// The size is not one the arena can have.
    #[error("a buffer arena of {bytes} bytes is not possible: it must be between 1 MiB and 1 TiB")]
    Size {
        /// Asked for.
        bytes: usize,
    },
    /// The mapping failed.
    #[error("mapping {bytes} bytes for buffers failed: {error}; free memory or make the buffer size smaller")]
    Map {
        /// Asked for.
        bytes: usize,
        /// The kernel's answer.
        error: std::io::Error,
    },
}

/// What is known of one page: only the first page of a slot says something.
#[derive(Clone, Copy)]
struct Page {
    /// Holders of the slot that begins here; 0 = free or not the first page of a slot.
    references: u32,
    /// Class of the slot that begins here.
    class: u8,
    /// True when a free slot of `class` begins here.
    free: bool,
    /// Neighbours in the free list of `class`.
    next: u32,
    previous: u32,
}

/// The buffers of one volume thread: 4096-aligned slots of 4 KiB to 1 MiB in one lazily touched mapping. A free slot
/// splits into four of the class below when a smaller one is wanted and merges with its three neighbours when all are
/// free again, so the same memory can be all 4 KiB at one time and all 1 MiB at another.
///
/// A slot's number is the number of its first page. The mapping is not inherited by forked children and not part of core dumps.
pub struct Arena {
    memory: MmapMut,
    pages: Vec<Page>,
    free_heads: [u32; CLASSES],
    in_use_bytes: usize,
}

impl Arena {
    /// An arena of `bytes`, rounded down to whole MiB; memory is taken only when a slot is first written.
    pub fn new(bytes: usize) -> Result<Self, ArenaError> {
        let whole = bytes / BUFFER_MAX_BYTES * BUFFER_MAX_BYTES;
        if whole == 0 || whole > 1 << 40 {
            return Err(ArenaError::Size { bytes });
        }
        let memory = MmapOptions::new()
            .len(whole)
            .no_reserve_swap()
            .map_anon()
            .map_err(|error| ArenaError::Map { bytes: whole, error })?;
        // Neither is needed for correct work of a process that does not fork; an old kernel may refuse them.
        let _ = memory.advise(Advice::DontFork);
        let _ = memory.advise(Advice::DontDump);
        let unused = Page { references: 0, class: 0, free: false, next: NONE, previous: NONE };
        let mut arena = Self {
            memory,
            pages: vec![unused; whole / PAGE_BYTES],
            free_heads: [NONE; CLASSES],
            in_use_bytes: 0,
        };
        // Lowest address first out, so that a quiet volume touches the same few pages again and again.
        for chunk in (0..whole / BUFFER_MAX_BYTES).rev() {
            arena.link_free((chunk * BUFFER_MAX_BYTES / PAGE_BYTES) as u32, CLASSES - 1);
        }
        Ok(arena)
    }

    /// A slot of at least `len` bytes with one reference, or `None` when there is no room (wait for a release) or
    /// `len` is more than [`BUFFER_MAX_BYTES`]. Its content is whatever was there.
    pub fn alloc(&mut self, len: usize) -> Option<BufferId> {
        let wanted = CLASS_BYTES.iter().position(|&bytes| bytes >= len)?;
        let mut class = (wanted..CLASSES).find(|&class| self.free_heads[class] != NONE)?;
        let first = self.free_heads[class];
        self.unlink_free(first);
        while class > wanted {
            class -= 1;
            let pages = class_pages(class);
            for part in (1..FAN).rev() {
                self.link_free(first + part * pages, class);
            }
        }
        let page = self.page_mut(first);
        page.references = 1;
        page.class = wanted as u8;
        self.in_use_bytes += CLASS_BYTES[wanted];
        Some(BufferId(first))
    }

    /// One more holder of the slot.
    pub fn retain(&mut self, buffer: BufferId) {
        let page = self.page_mut(buffer.0);
        debug_assert!(page.references > 0, "retain of {buffer:?}, which is free");
        if page.references > 0 {
            page.references += 1;
        }
    }

    /// One holder fewer; the last one frees the slot.
    pub fn release(&mut self, buffer: BufferId) {
        let page = self.page_mut(buffer.0);
        debug_assert!(page.references > 0, "release of {buffer:?}, which is free");
        if page.references == 0 {
            return;
        }
        page.references -= 1;
        if page.references == 0 {
            let class = usize::from(page.class);
            self.in_use_bytes -= CLASS_BYTES[class];
            self.give_back(buffer.0, class);
        }
    }

    /// The whole slot, `capacity` bytes. Not while the kernel may write to it.
    pub fn bytes(&self, buffer: BufferId) -> &[u8] {
        let (start, len) = self.span(buffer);
        &self.memory[start..start + len]
    }

    /// The whole slot for writing. Not while an operation on it is in flight.
    pub fn bytes_mut(&mut self, buffer: BufferId) -> &mut [u8] {
        let (start, len) = self.span(buffer);
        &mut self.memory[start..start + len]
    }

    /// The slot's address, aligned to 4096; valid for [`capacity`](Self::capacity) bytes until the last release, also
    /// when the arena is moved.
    pub fn ptr(&self, buffer: BufferId) -> *mut u8 {
        let (start, _) = self.span(buffer);
        // Only the kernel and the holder of the slot write through it.
        self.memory.as_ptr().wrapping_add(start).cast_mut()
    }

    /// Bytes the slot holds.
    pub fn capacity(&self, buffer: BufferId) -> usize {
        self.span(buffer).1
    }

    /// Bytes in slots that are held, whole capacities counted.
    pub const fn in_use_bytes(&self) -> usize {
        self.in_use_bytes
    }

    /// Bytes the arena has in all.
    pub fn total_bytes(&self) -> usize {
        self.memory.len()
    }

    /// Gives the memory of all free whole-MiB pieces back to the system; a volume calls it when it has been idle for a while.
    /// Returns how many bytes that were.
    pub fn trim(&mut self) -> usize {
        let mut trimmed = 0;
        let mut at = self.free_heads[CLASSES - 1];
        while at != NONE {
            let start = at as usize * PAGE_BYTES;
            // SAFETY: the piece is free: nobody holds a reference into it and no operation on it is in flight.
            let done = unsafe {
                self.memory.unchecked_advise_range(
                    memmap2::UncheckedAdvice::DontNeed,
                    start,
                    BUFFER_MAX_BYTES,
                )
            };
            if done.is_ok() {
                trimmed += BUFFER_MAX_BYTES;
            }
            at = self.page(at).next;
        }
        trimmed
    }

    fn span(&self, buffer: BufferId) -> (usize, usize) {
        let page = self.page(buffer.0);
        debug_assert!(page.references > 0, "use of {buffer:?}, which is free");
        (buffer.0 as usize * PAGE_BYTES, CLASS_BYTES[usize::from(page.class)])
    }

    fn page(&self, first: u32) -> &Page {
        &self.pages[first as usize]
    }

    fn page_mut(&mut self, first: u32) -> &mut Page {
        &mut self.pages[first as usize]
    }

    fn give_back(&mut self, first: u32, class: usize) {
        let (mut first, mut class) = (first, class);
        while class + 1 < CLASSES {
            let pages = class_pages(class);
            let family = first - first % (pages * FAN);
            let siblings = || (0..FAN).map(|part| family + part * pages);
            let is_free = |at: u32| at == first || self.is_free(at, class);
            if !siblings().all(is_free) {
                break;
            }
            for sibling in siblings() {
                if sibling != first {
                    self.unlink_free(sibling);
                }
            }
            first = family;
            class += 1;
        }
        self.link_free(first, class);
    }

    fn is_free(&self, first: u32, class: usize) -> bool {
        let page = self.page(first);
        page.free && usize::from(page.class) == class
    }

    fn link_free(&mut self, first: u32, class: usize) {
        let head = self.free_heads[class];
        *self.page_mut(first) =
            Page { references: 0, class: class as u8, free: true, next: head, previous: NONE };
        if head != NONE {
            self.page_mut(head).previous = first;
        }
        self.free_heads[class] = first;
    }

    fn unlink_free(&mut self, first: u32) {
        let Page { class, next, previous, .. } = *self.page(first);
        if previous == NONE {
            self.free_heads[usize::from(class)] = next;
        } else {
            self.page_mut(previous).next = next;
        }
        if next != NONE {
            self.page_mut(next).previous = previous;
        }
        self.page_mut(first).free = false;
    }
}

impl std::fmt::Debug for Arena {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Arena")
            .field("total_bytes", &self.memory.len())
            .field("in_use_bytes", &self.in_use_bytes)
            .finish_non_exhaustive()
    }
}

const fn class_pages(class: usize) -> u32 {
    (CLASS_BYTES[class] / PAGE_BYTES) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: usize = 1 << 20;

    fn take_all(arena: &mut Arena, len: usize) -> Vec<BufferId> {
        std::iter::from_fn(|| arena.alloc(len)).collect()
    }

    #[test]
    fn the_same_memory_is_all_small_then_all_large() {
        let mut arena = Arena::new(64 * MIB).unwrap();
        for (len, count) in [(1, 16384), (MIB, 64), (4096, 16384), (100_000, 256), (65_536, 1024)] {
            let slots = take_all(&mut arena, len);
            assert_eq!(slots.len(), count, "slots of {len}");
            assert_eq!(arena.in_use_bytes(), 64 * MIB);
            assert_eq!(arena.alloc(1), None, "exhausted");
            for slot in slots {
                assert!(arena.capacity(slot) >= len);
                assert_eq!(arena.ptr(slot) as usize % PAGE_BYTES, 0);
                arena.release(slot);
            }
            assert_eq!(arena.in_use_bytes(), 0);
        }
    }

    #[test]
    fn a_slot_is_free_after_the_last_release_only() {
        let mut arena = Arena::new(MIB).unwrap();
        let slot = arena.alloc(MIB).unwrap();
        arena.retain(slot);
        arena.release(slot);
        assert_eq!(arena.alloc(1), None);
        arena.release(slot);
        assert_eq!(arena.alloc(MIB), Some(slot));
    }

    #[test]
    fn too_large_and_impossible_sizes_are_refused() {
        let mut arena = Arena::new(2 * MIB + 5).unwrap();
        assert_eq!(arena.total_bytes(), 2 * MIB);
        assert_eq!(arena.alloc(MIB + 1), None);
        assert!(Arena::new(MIB - 1).unwrap_err().to_string().contains("1048575"));
    }

    #[test]
    fn held_slots_never_share_a_byte() {
        let mut arena = Arena::new(4 * MIB).unwrap();
        let mut held: Vec<(BufferId, u8)> = Vec::new();
        let mut random = 0x2545_f491_4f6c_dd1d_u64;
        for round in 0..20_000_u32 {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let draw = (random >> 33) as usize;
            if draw.is_multiple_of(2) {
                let len = CLASS_BYTES[draw / 2 % CLASSES] - draw % 4096;
                if let Some(slot) = arena.alloc(len) {
                    let mark = (round % 251) as u8;
                    let bytes = arena.bytes_mut(slot);
                    bytes[0] = mark;
                    *bytes.last_mut().unwrap() = mark;
                    held.push((slot, mark));
                }
            } else if !held.is_empty() {
                let (slot, mark) = held.swap_remove(draw / 2 % held.len());
                assert_eq!(arena.bytes(slot)[0], mark);
                assert_eq!(*arena.bytes(slot).last().unwrap(), mark);
                arena.release(slot);
            }
            let expected: usize = held.iter().map(|&(slot, _)| arena.capacity(slot)).sum();
            assert_eq!(arena.in_use_bytes(), expected);
        }
        for (slot, _) in held {
            arena.release(slot);
        }
        assert_eq!(take_all(&mut arena, MIB).len(), 4, "everything merged again");
    }

    #[test]
    fn trimmed_memory_reads_as_zeroes_and_held_memory_stays() {
        let mut arena = Arena::new(2 * MIB).unwrap();
        let kept = arena.alloc(4096).unwrap();
        let freed = arena.alloc(MIB).unwrap();
        arena.bytes_mut(kept).fill(7);
        arena.bytes_mut(freed).fill(9);
        arena.release(freed);
        assert_eq!(arena.trim(), MIB);
        let again = arena.alloc(MIB).unwrap();
        assert!(arena.bytes(again).iter().all(|&byte| byte == 0));
        assert!(arena.bytes(kept).iter().all(|&byte| byte == 7));
    }

    #[cfg(debug_assertions)]
    #[test]
    #[should_panic(expected = "which is free")]
    fn a_double_release_is_found_in_debug_builds() {
        let mut arena = Arena::new(MIB).unwrap();
        let slot = arena.alloc(1).unwrap();
        arena.release(slot);
        arena.release(slot);
    }
}
