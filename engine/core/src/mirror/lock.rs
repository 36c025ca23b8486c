//! Range locks (W1, W3): overlapping operations run in arrival order, all others in any order.
//!
//! A read shares; a write, a zero and a resync chunk exclude. A newcomer also waits for earlier waiters it
//! overlaps, so nothing is overtaken and nothing starves. Ranges are widened to whole blocks by the caller.

use std::collections::{BTreeMap, VecDeque};

use crate::ids::ByteRange;

/// Longest range a reader may lock; bounds the search for overlapping readers.
const SHARED_MAX_BYTES: u64 = 2 * crate::limits::ZERO_MAX_BYTES;

/// Shares or excludes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Access {
    /// Any number of readers.
    Shared,
    /// Alone.
    Exclusive,
}

#[derive(Clone, Copy, Debug)]
struct Waiter<H> {
    range: ByteRange,
    access: Access,
    holder: H,
}

/// The locks of one volume. `H` names a holder and is given back when its turn comes.
#[derive(Debug)]
pub(super) struct RangeLocks<H> {
    /// start -> end; never overlap each other.
    exclusive: BTreeMap<u64, u64>,
    /// (start, serial) -> end.
    shared: BTreeMap<(u64, u64), u64>,
    serial: u64,
    waiting: VecDeque<Waiter<H>>,
}

impl<H: Copy + PartialEq> RangeLocks<H> {
    pub(super) const fn new() -> Self {
        Self { exclusive: BTreeMap::new(), shared: BTreeMap::new(), serial: 0, waiting: VecDeque::new() }
    }

    /// True: locked now. False: `holder` waits and comes out of [`Self::release`] when it is its turn.
    pub(super) fn acquire(&mut self, range: ByteRange, access: Access, holder: H) -> bool {
        debug_assert!(
            access == Access::Exclusive || range.length_bytes <= SHARED_MAX_BYTES,
            "lock longer than the search window"
        );
        let free = !self.conflicts(range, access)
            && !self.waiting.iter().any(|w| w.range.overlaps(range) && !both_shared(w.access, access));
        if free {
            self.insert(range, access);
        } else {
            self.waiting.push_back(Waiter { range, access, holder });
        }
        free
    }

    /// Gives the range back; those whose turn it is now are appended to `ready`, already locked.
    pub(super) fn release(&mut self, range: ByteRange, access: Access, ready: &mut Vec<H>) {
        match access {
            Access::Exclusive => {
                let end = self.exclusive.remove(&range.offset_bytes);
                debug_assert_eq!(end, Some(range.end_bytes()), "released what was not locked");
            }
            Access::Shared => {
                let key = self
                    .shared
                    .range((range.offset_bytes, 0)..=(range.offset_bytes, u64::MAX))
                    .find(|(_, end)| **end == range.end_bytes())
                    .map(|(key, _)| *key);
                debug_assert!(key.is_some(), "released what was not locked");
                if let Some(key) = key {
                    self.shared.remove(&key);
                }
            }
        }
        self.grant(ready);
    }

    /// Takes a waiter out of the queue; true if it was there.
    pub(super) fn cancel(&mut self, holder: H, ready: &mut Vec<H>) -> bool {
        let before = self.waiting.len();
        self.waiting.retain(|w| w.holder != holder);
        let found = self.waiting.len() != before;
        if found {
            self.grant(ready);
        }
        found
    }

    fn grant(&mut self, ready: &mut Vec<H>) {
        let mut index = 0;
        while index < self.waiting.len() {
            let waiter = self.waiting[index];
            let behind = self
                .waiting
                .iter()
                .take(index)
                .any(|w| w.range.overlaps(waiter.range) && !both_shared(w.access, waiter.access));
            if behind || self.conflicts(waiter.range, waiter.access) {
                index += 1;
                continue;
            }
            self.waiting.remove(index);
            self.insert(waiter.range, waiter.access);
            ready.push(waiter.holder);
        }
    }

    fn insert(&mut self, range: ByteRange, access: Access) {
        match access {
            Access::Exclusive => {
                self.exclusive.insert(range.offset_bytes, range.end_bytes());
            }
            Access::Shared => {
                self.serial += 1;
                self.shared.insert((range.offset_bytes, self.serial), range.end_bytes());
            }
        }
    }

    fn conflicts(&self, range: ByteRange, access: Access) -> bool {
        let last = self.exclusive.range(..range.end_bytes()).next_back();
        if last.is_some_and(|(_, end)| *end > range.offset_bytes) {
            return true;
        }
        match access {
            Access::Shared => false,
            Access::Exclusive => {
                let first = range.offset_bytes.saturating_sub(SHARED_MAX_BYTES);
                self.shared
                    .range((first, 0)..(range.end_bytes(), 0))
                    .any(|(_, end)| *end > range.offset_bytes)
            }
        }
    }
}

const fn both_shared(a: Access, b: Access) -> bool {
    matches!((a, b), (Access::Shared, Access::Shared))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn r(offset: u64, length: u64) -> ByteRange {
        ByteRange::new(offset, length)
    }

    #[test]
    fn overlapping_writers_run_in_arrival_order() {
        let mut locks = RangeLocks::new();
        assert!(locks.acquire(r(0, 10), Access::Exclusive, 1));
        assert!(!locks.acquire(r(5, 10), Access::Exclusive, 2));
        assert!(!locks.acquire(r(12, 2), Access::Exclusive, 3), "overtakes the waiter before it");
        assert!(locks.acquire(r(20, 5), Access::Exclusive, 4));
        let mut ready = Vec::new();
        locks.release(r(0, 10), Access::Exclusive, &mut ready);
        assert_eq!(ready, [2]);
        ready.clear();
        locks.release(r(5, 10), Access::Exclusive, &mut ready);
        assert_eq!(ready, [3]);
    }

    #[test]
    fn readers_share_and_a_writer_waits_for_all_of_them() {
        let mut locks = RangeLocks::new();
        assert!(locks.acquire(r(0, 10), Access::Shared, 1));
        assert!(locks.acquire(r(0, 10), Access::Shared, 2));
        assert!(!locks.acquire(r(8, 4), Access::Exclusive, 3));
        assert!(!locks.acquire(r(9, 1), Access::Shared, 4), "a reader must not starve the writer");
        let mut ready = Vec::new();
        locks.release(r(0, 10), Access::Shared, &mut ready);
        assert!(ready.is_empty());
        locks.release(r(0, 10), Access::Shared, &mut ready);
        assert_eq!(ready, [3]);
        ready.clear();
        locks.release(r(8, 4), Access::Exclusive, &mut ready);
        assert_eq!(ready, [4]);
    }

    #[test]
    fn a_cancelled_waiter_lets_the_next_one_in() {
        let mut locks = RangeLocks::new();
        assert!(locks.acquire(r(0, 4), Access::Shared, 1));
        assert!(!locks.acquire(r(0, 4), Access::Exclusive, 2));
        assert!(!locks.acquire(r(0, 4), Access::Shared, 3));
        let mut ready = Vec::new();
        assert!(locks.cancel(2, &mut ready));
        assert_eq!(ready, [3]);
        assert!(!locks.cancel(2, &mut ready));
    }
}
