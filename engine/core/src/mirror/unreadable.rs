//! Blocks that the source of a resync cannot read: only they stay marked, everything around them is copied.

use std::collections::{BTreeSet, VecDeque};
use std::time::Duration;

use crate::time::Instant;

/// Unreadable blocks are tried again after this long, once nothing else is left to copy.
const RETRY: Duration = Duration::from_secs(1);
/// So many are known one by one. A disk with more is lost; its chunks are then tried as a whole.
const KNOWN_MAX: usize = 1024;
/// Ranges told to the operator.
const RUNS_MAX: usize = 8;

/// What could not be read in this session.
#[derive(Debug)]
pub(super) struct Unreadable {
    /// Failed when read alone.
    known: BTreeSet<u64>,
    /// To be read alone: the blocks of a chunk that failed, or known ones once more.
    tries: VecDeque<u64>,
    /// A chunk that is not known as unreadable was begun in this pass over the map.
    found: bool,
}

impl Unreadable {
    pub(super) const fn new() -> Self {
        Self { known: BTreeSet::new(), tries: VecDeque::new(), found: false }
    }

    pub(super) fn clear(&mut self) {
        *self = Self::new();
    }

    /// The next block that is to be read alone.
    pub(super) fn next_try(&mut self) -> Option<u64> {
        self.tries.pop_front()
    }

    /// Of a marked run: how many blocks at its start are skipped, and how many after them are not known as
    /// unreadable.
    pub(super) fn readable(&self, first: u64, blocks: u64) -> (u64, u64) {
        let end = first + blocks;
        let start = (first..end).find(|block| !self.known.contains(block)).unwrap_or(end);
        let stop = self.known.range(start..end).next().copied().unwrap_or(end);
        (start - first, stop - start)
    }

    pub(super) fn begun(&mut self, first: u64) {
        self.found |= !self.known.contains(&first);
    }

    pub(super) fn read(&mut self, first: u64) {
        self.known.remove(&first);
    }

    /// A chunk could not be read. True: it is to be told.
    pub(super) fn failed(&mut self, first: u64, blocks: u64) -> bool {
        if self.known.len() >= KNOWN_MAX {
            return false;
        }
        if blocks > 1 {
            self.tries.extend(first..first + blocks);
            return false;
        }
        self.known.insert(first)
    }

    /// The whole map was gone through. When nothing but unreadable blocks was found: when they are tried again.
    pub(super) fn pass_ended(&mut self, now: Instant) -> Option<Instant> {
        let found = std::mem::replace(&mut self.found, false);
        let lost = self.known.len() >= KNOWN_MAX;
        if self.known.is_empty() || (found && !lost) {
            return None;
        }
        self.tries = self.known.iter().copied().collect();
        Some(now + RETRY)
    }

    pub(super) fn blocks(&self) -> u64 {
        self.known.len() as u64
    }

    /// Runs of known ones, the first few: first block and length.
    pub(super) fn runs(&self) -> impl Iterator<Item = (u64, u64)> {
        let mut blocks = self.known.iter().copied().peekable();
        std::iter::from_fn(move || {
            let first = blocks.next()?;
            let mut length = 1;
            while blocks.next_if_eq(&(first + length)).is_some() {
                length += 1;
            }
            Some((first, length))
        })
        .take(RUNS_MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_is_cut_at_unreadable_blocks() {
        let mut unreadable = Unreadable::new();
        assert_eq!(unreadable.readable(10, 6), (0, 6));
        assert!(!unreadable.failed(10, 6), "first its blocks one by one");
        assert_eq!(
            std::iter::from_fn(|| unreadable.next_try()).collect::<Vec<_>>(),
            [10, 11, 12, 13, 14, 15]
        );
        for block in [10, 12, 13] {
            assert!(unreadable.failed(block, 1));
            assert!(!unreadable.failed(block, 1), "told once");
        }
        assert_eq!(unreadable.readable(10, 6), (1, 1));
        assert_eq!(unreadable.readable(12, 4), (2, 2));
        assert_eq!(unreadable.readable(12, 2), (2, 0));
        assert_eq!(unreadable.runs().collect::<Vec<_>>(), [(10, 1), (12, 2)]);
    }

    #[test]
    fn they_are_tried_again_when_nothing_else_is_left() {
        let mut unreadable = Unreadable::new();
        assert_eq!(unreadable.pass_ended(Instant(0)), None);
        unreadable.begun(5);
        unreadable.failed(5, 1);
        assert_eq!(unreadable.pass_ended(Instant(0)), None, "something was found in this pass");
        assert_eq!(unreadable.pass_ended(Instant(0)), Some(Instant(0) + RETRY));
        assert_eq!(unreadable.next_try(), Some(5));
        unreadable.begun(5);
        unreadable.read(5);
        assert_eq!(unreadable.pass_ended(Instant(0)), None);
    }

    #[test]
    fn a_lost_disk_fills_no_memory() {
        let mut unreadable = Unreadable::new();
        for block in 0..10_000 {
            unreadable.failed(block, 1);
        }
        assert_eq!(unreadable.blocks(), KNOWN_MAX as u64);
        unreadable.begun(20_000);
        assert!(unreadable.pass_ended(Instant(0)).is_some(), "it is not read over and over");
    }
}
