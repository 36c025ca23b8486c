//! Holes of the source: what its disk knows to be zero goes to the target as a range, unread.
//!
//! The disk is asked twice. First without a lock, to learn how long the next chunk may be: only a hint. Then under the
//! chunk's lock, where no write is under way and none begins: only this answer counts. So a client's write that came in
//! between is copied like any other.

use std::time::Duration;

use super::volume::{DiskPurpose, Volume};
use crate::format::map_page::PAGE_BLOCKS;
use crate::ids::ByteRange;
use crate::limits::{COPY_CHUNK_BYTES, COPY_ZERO_MAX_BYTES, ZERO_MAX_BYTES};
use crate::request::{DiskOpKind, DiskOutcome};

/// After data was found the disk is asked again this far on, and twice as far each time: a disk without holes is asked
/// seldom, and a hole in between is read, and seen to be zero, at most so far.
const ASK_FIRST_BYTES: u64 = COPY_CHUNK_BYTES;
const ASK_MOST_BYTES: u64 = 16 << 20;
/// A range zeroed this quickly makes the next one longer.
const QUICK: Duration = Duration::from_millis(20);
/// One that took this long makes the next ones as short as a client's.
const SLOW: Duration = Duration::from_millis(100);

/// What is known of the source's disk.
#[derive(Debug)]
pub(super) struct Holes {
    /// From here on the two below hold.
    from_bytes: u64,
    /// Zero up to here, when asked.
    zero_until_bytes: u64,
    /// Taken as data up to here.
    data_until_bytes: u64,
    ask_bytes: u64,
    asking: bool,
    longest_bytes: u64,
}

impl Holes {
    pub(super) const fn new() -> Self {
        Self {
            from_bytes: 0,
            zero_until_bytes: 0,
            data_until_bytes: 0,
            ask_bytes: ASK_FIRST_BYTES,
            asking: false,
            longest_bytes: ZERO_MAX_BYTES,
        }
    }

    /// Most bytes to be zeroed at once, in one range or several.
    pub(super) const fn longest_bytes(&self) -> u64 {
        self.longest_bytes
    }

    /// The hint was wrong.
    pub(super) const fn forget(&mut self) {
        (self.zero_until_bytes, self.data_until_bytes) = (self.from_bytes, self.from_bytes);
    }

    /// The target took so long for a range. A short one says little about a long one.
    pub(super) fn took(&mut self, length_bytes: u64, time: Duration) {
        if time <= QUICK && length_bytes >= self.longest_bytes / 3 {
            self.longest_bytes = (self.longest_bytes * 2).min(COPY_ZERO_MAX_BYTES);
        } else if time >= SLOW {
            self.longest_bytes = ZERO_MAX_BYTES;
        }
    }

    fn learn(&mut self, from_bytes: u64, zero_bytes: u64) {
        self.from_bytes = from_bytes;
        self.zero_until_bytes = from_bytes + zero_bytes;
        self.ask_bytes =
            if zero_bytes > 0 { ASK_FIRST_BYTES } else { (self.ask_bytes * 2).min(ASK_MOST_BYTES) };
        self.data_until_bytes = self.zero_until_bytes + self.ask_bytes;
    }

    /// Zero bytes from here on by the last answer; `None` where it says nothing.
    fn zeroes_at(&self, offset_bytes: u64) -> Option<u64> {
        (self.from_bytes..self.data_until_bytes)
            .contains(&offset_bytes)
            .then(|| self.zero_until_bytes.saturating_sub(offset_bytes))
    }
}

/// How a run of marked blocks goes on its way.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Piece {
    /// So many blocks, to be read.
    Read(u64),
    /// So many blocks, zero as it seems.
    Zero(u64),
    /// The disk was asked: wait.
    Asked,
}

impl Volume {
    /// How the first blocks of this run are to be copied.
    pub(super) fn piece(&mut self, first_block: u64, blocks: u64) -> Piece {
        let block = self.block_bytes();
        let chunk = (COPY_CHUNK_BYTES / block).max(1);
        if blocks < chunk {
            return Piece::Read(blocks);
        }
        let offset = first_block * block;
        let Some(zero_bytes) = self.copying.holes.zeroes_at(offset) else {
            if !self.copying.holes.asking {
                self.copying.holes.asking = true;
                self.copying.holes.from_bytes = offset;
                self.copying.holes.forget();
                let size = self.copy().map_or(0, |c| c.size_bytes);
                let range = ByteRange::new(offset, size - offset);
                self.disk(DiskPurpose::Seek(self.copying.round()), DiskOpKind::SeekData { range });
            }
            return Piece::Asked;
        };
        let zero = (zero_bytes / block).min(blocks);
        if zero < chunk {
            return Piece::Read(chunk);
        }
        // Whole pages where it can: their marks are then cleared as one.
        let end = first_block + zero;
        let page_end = end / PAGE_BLOCKS * PAGE_BLOCKS;
        Piece::Zero(if page_end > first_block { page_end - first_block } else { zero })
    }

    /// Where the next data is.
    pub(super) fn on_seek(&mut self, round: u32, outcome: &DiskOutcome) {
        if round != self.copying.round() {
            return;
        }
        let zero_bytes = match outcome {
            DiskOutcome::Zeroes { length_bytes } => *length_bytes,
            // Asked again by reading; a disk that fails shows it there.
            DiskOutcome::Failed { .. } | DiskOutcome::Done | DiskOutcome::Bytes(_) => 0,
        };
        let holes = &mut self.copying.holes;
        holes.asking = false;
        holes.learn(holes.from_bytes, zero_bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_without_holes_is_asked_seldom() {
        let mut holes = Holes::new();
        let (mut at, mut asked) = (0, 0);
        while at < 2 << 30 {
            if holes.zeroes_at(at).is_none() {
                asked += 1;
                holes.learn(at, 0);
            }
            assert_eq!(holes.zeroes_at(at), Some(0));
            at += COPY_CHUNK_BYTES;
        }
        assert!(asked < 150, "{asked}");
        holes.learn(at, 4096);
        assert_eq!(holes.zeroes_at(at + 1024), Some(3072));
        assert_eq!(holes.zeroes_at(at + 4096), Some(0), "data follows a hole");
        assert_eq!(holes.zeroes_at(at + 4096 + ASK_FIRST_BYTES), None);
        assert_eq!(holes.zeroes_at(at - 1), None);
    }

    #[test]
    fn slow_targets_get_short_ranges() {
        let mut holes = Holes::new();
        for _ in 0..9 {
            holes.took(COPY_CHUNK_BYTES, Duration::from_millis(19));
        }
        assert_eq!(holes.longest_bytes(), ZERO_MAX_BYTES, "13 MB/s");
        for _ in 0..9 {
            // Whole pages of marks are a little shorter.
            holes.took(holes.longest_bytes() / 256 * 124, Duration::from_millis(1));
        }
        assert_eq!(holes.longest_bytes(), COPY_ZERO_MAX_BYTES);
        holes.took(COPY_ZERO_MAX_BYTES, Duration::from_millis(50));
        assert_eq!(holes.longest_bytes(), COPY_ZERO_MAX_BYTES);
        holes.took(COPY_ZERO_MAX_BYTES, Duration::from_millis(2600));
        assert_eq!(holes.longest_bytes(), ZERO_MAX_BYTES);
    }
}
