//! What a client was promised, block by block, and whether what is read now keeps the promise.
//!
//! Each write of a block carries a stamp in each of its 512-byte sectors: run, block, sector, sequence. A block has at
//! most one write under way, so its writes are in one order. What may be read is any write from the newest promised
//! one on: promised by its acknowledgement where no power was lost, by a flush where it was.

use std::collections::VecDeque;

/// Bytes of a block of the history.
pub const BLOCK_BYTES: usize = 4096;
const SECTOR_BYTES: usize = 512;
const MAGIC: u64 = 0x4455_504c_4558_5354;

/// Which promise counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Floor {
    /// No valid copy lost power: what was acknowledged is there.
    Acknowledged,
    /// Every copy that had it may have lost power: what was flushed is there.
    Flushed,
}

/// One write of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Issued {
    sequence: u64,
    zeroes: bool,
}

/// What is known of one block.
#[derive(Debug, Clone)]
struct Block {
    /// Writes from the flushed one on, oldest first; never empty.
    issued: VecDeque<Issued>,
    acknowledged: u64,
    flushed: u64,
}

/// What is wrong with a block that was read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    /// The content is no write of this block at all.
    #[error("block {block}: sector {sector} holds bytes that were never written there: {begin:02x?}")]
    Foreign {
        /// Which block.
        block: u64,
        /// Which sector of it.
        sector: usize,
        /// Its first bytes.
        begin: Vec<u8>,
    },
    /// A write that was promised is gone.
    #[error("block {block}: sector {sector} holds write {found}, but write {promised} was {how}")]
    Lost {
        /// Which block.
        block: u64,
        /// Which sector of it.
        sector: usize,
        /// The write that is there.
        found: u64,
        /// The one that should be there, or a later one.
        promised: u64,
        /// How it was promised.
        how: &'static str,
    },
}

/// The history of a volume.
#[derive(Debug, Clone)]
pub struct History {
    run: u64,
    next: u64,
    blocks: Vec<Block>,
    /// Acknowledged since the last flush was sent: (block, sequence).
    unflushed: Vec<(u64, u64)>,
}

/// A flush under way: what it covers.
#[derive(Debug)]
pub struct FlushMark(Vec<(u64, u64)>);

impl History {
    /// Of a volume of zeroes.
    pub fn new(run: u64, blocks: u64) -> History {
        let zero = Block {
            issued: VecDeque::from([Issued { sequence: 0, zeroes: true }]),
            acknowledged: 0,
            flushed: 0,
        };
        let blocks = usize::try_from(blocks).expect("a volume of the lab fits into memory");
        History { run, next: 1, blocks: vec![zero; blocks], unflushed: Vec::new() }
    }

    /// Number of blocks.
    pub fn blocks(&self) -> u64 {
        self.blocks.len() as u64
    }

    /// Blocks that were ever written.
    pub fn touched(&self) -> Vec<u64> {
        let touched = self
            .blocks
            .iter()
            .enumerate()
            .filter(|(_, block)| block.issued.len() > 1 || block.acknowledged > 0);
        touched.map(|(number, _)| number as u64).collect()
    }

    /// The newest acknowledged write of a block; 0: none.
    pub fn promised(&self, block: u64) -> u64 {
        self.blocks[block as usize].acknowledged
    }

    fn issue(&mut self, block: u64, zeroes: bool) -> u64 {
        let sequence = self.next;
        self.next += 1;
        self.blocks[block as usize].issued.push_back(Issued { sequence, zeroes });
        sequence
    }

    /// A write about to be sent: its sequence and its bytes.
    pub fn write(&mut self, block: u64) -> (u64, Vec<u8>) {
        let sequence = self.issue(block, false);
        (sequence, stamp(self.run, block, sequence))
    }

    /// A discard or write-zeroes of a block about to be sent.
    pub fn zero(&mut self, block: u64) -> u64 {
        self.issue(block, true)
    }

    /// The write was acknowledged.
    pub fn acknowledge(&mut self, block: u64, sequence: u64) {
        let known = &mut self.blocks[block as usize];
        known.acknowledged = known.acknowledged.max(sequence);
        self.unflushed.push((block, sequence));
    }

    /// A flush about to be sent. What a power cut took (read since, and found older) it cannot bring back.
    pub fn flush(&mut self) -> FlushMark {
        let mut covered = std::mem::take(&mut self.unflushed);
        covered.retain(|(block, sequence)| *sequence <= self.blocks[*block as usize].acknowledged);
        FlushMark(covered)
    }

    /// The flush was acknowledged.
    pub fn flushed(&mut self, mark: FlushMark) {
        for (block, sequence) in mark.0 {
            let known = &mut self.blocks[block as usize];
            known.flushed = known.flushed.max(sequence);
            let floor = known.flushed;
            while known.issued.front().is_some_and(|first| first.sequence < floor) {
                known.issued.pop_front();
            }
        }
    }

    /// The flush failed: what it covered is as unflushed as before.
    pub fn flush_failed(&mut self, mark: FlushMark) {
        self.unflushed.extend(mark.0);
    }

    /// Judges what was read of a block, and settles on it: from now on nothing older may be read.
    pub fn read(&mut self, block: u64, bytes: &[u8], floor: Floor) -> Result<(), Broken> {
        let oldest = self.judge(block, bytes, floor)?;
        let known = &mut self.blocks[block as usize];
        known.acknowledged = oldest;
        if floor == Floor::Flushed {
            known.flushed = known.flushed.max(oldest);
        }
        Ok(())
    }

    /// Judges without settling; gives the oldest write found in the block.
    pub fn judge(&self, block: u64, bytes: &[u8], floor: Floor) -> Result<u64, Broken> {
        let known = &self.blocks[block as usize];
        let (promised, how) = match floor {
            Floor::Acknowledged => (known.acknowledged, "acknowledged"),
            Floor::Flushed => (known.flushed, "flushed"),
        };
        let mut oldest = u64::MAX;
        for (sector, content) in bytes.chunks(SECTOR_BYTES).enumerate() {
            let found = self.identify(known, block, sector, content)?;
            if found < promised {
                return Err(Broken::Lost { block, sector, found, promised, how });
            }
            oldest = oldest.min(found);
        }
        Ok(oldest)
    }

    /// Which write a sector's content is; of several that fit (zeroes), the newest.
    fn identify(&self, known: &Block, block: u64, sector: usize, content: &[u8]) -> Result<u64, Broken> {
        if content.iter().all(|byte| *byte == 0) {
            let newest = known.issued.iter().rev().find(|issued| issued.zeroes);
            // Zeroes older than all that is remembered: the volume's beginning.
            return Ok(newest.map_or(0, |issued| issued.sequence));
        }
        let foreign = || Broken::Foreign { block, sector, begin: content[..32.min(content.len())].to_vec() };
        let sequence = word(content, 4);
        if content != stamp_sector(self.run, block, sector, sequence) {
            return Err(foreign());
        }
        let issued = known.issued.iter().any(|issued| issued.sequence == sequence && !issued.zeroes);
        // Older than what is remembered: the caller finds it below its floor.
        let older = known.issued.front().is_some_and(|first| sequence < first.sequence);
        if issued || older { Ok(sequence) } else { Err(foreign()) }
    }
}

fn word(content: &[u8], number: usize) -> u64 {
    content
        .get(number * 8..number * 8 + 8)
        .and_then(|bytes| bytes.try_into().ok())
        .map_or(0, u64::from_le_bytes)
}

fn stamp(run: u64, block: u64, sequence: u64) -> Vec<u8> {
    (0..BLOCK_BYTES / SECTOR_BYTES).flat_map(|sector| stamp_sector(run, block, sector, sequence)).collect()
}

fn stamp_sector(run: u64, block: u64, sector: usize, sequence: u64) -> Vec<u8> {
    let words = [MAGIC, run, block, sector as u64, sequence];
    let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    // The rest differs by write, so that a partly written sector is seen.
    let mut filler = super::Seed::new(sequence ^ (block << 32) ^ ((sector as u64) << 24));
    while bytes.len() < SECTOR_BYTES {
        bytes.extend_from_slice(&filler.bits().to_le_bytes());
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn acknowledged_writes_must_be_there_and_later_ones_may() {
        let mut history = History::new(9, 4);
        let (first, one) = history.write(2);
        history.acknowledge(2, first);
        let (_, two) = history.write(2);
        assert_eq!(history.judge(2, &one, Floor::Acknowledged), Ok(first));
        assert!(history.judge(2, &two, Floor::Acknowledged).is_ok());
        let lost = history.judge(2, &[0; BLOCK_BYTES], Floor::Acknowledged);
        assert!(matches!(lost, Err(Broken::Lost { found: 0, .. })), "{lost:?}");
        assert!(history.judge(2, &[0; BLOCK_BYTES], Floor::Flushed).is_ok());
    }

    #[test]
    fn a_flush_covers_what_was_acknowledged_before_it_was_sent() {
        let mut history = History::new(9, 4);
        let (first, one) = history.write(0);
        history.acknowledge(0, first);
        let mark = history.flush();
        let (second, two) = history.write(0);
        history.acknowledge(0, second);
        history.flushed(mark);
        assert!(history.judge(0, &one, Floor::Flushed).is_ok());
        assert!(history.judge(0, &two, Floor::Flushed).is_ok());
        assert!(history.judge(0, &one, Floor::Acknowledged).is_err());
        assert!(history.judge(0, &[0; BLOCK_BYTES], Floor::Flushed).is_err());
    }

    #[test]
    fn a_torn_write_under_way_is_fine_and_a_torn_promised_one_is_not() {
        let mut history = History::new(9, 4);
        let (first, one) = history.write(1);
        history.acknowledge(1, first);
        let (second, two) = history.write(1);
        let mut torn = one.clone();
        torn[..1024].copy_from_slice(&two[..1024]);
        assert!(history.judge(1, &torn, Floor::Acknowledged).is_ok());
        history.acknowledge(1, second);
        assert!(history.judge(1, &torn, Floor::Acknowledged).is_err());
    }

    #[test]
    fn foreign_bytes_and_other_blocks_content_are_found() {
        let mut history = History::new(9, 4);
        let (_, one) = history.write(1);
        history.write(2);
        assert!(matches!(history.judge(2, &one, Floor::Flushed), Err(Broken::Foreign { .. })));
        let mut flipped = history.write(3).1;
        flipped[700] ^= 1;
        assert!(matches!(history.judge(3, &flipped, Floor::Flushed), Err(Broken::Foreign { sector: 1, .. })));
    }

    #[test]
    fn what_was_read_once_may_not_be_taken_back() {
        let mut history = History::new(9, 4);
        let (_, one) = history.write(1);
        history.read(1, &one, Floor::Flushed).expect("a write under way may be there");
        assert!(history.judge(1, &[0; BLOCK_BYTES], Floor::Flushed).is_err());
    }

    #[test]
    fn a_flush_after_a_power_cut_does_not_promise_what_the_cut_took() {
        let mut history = History::new(9, 4);
        let (first, _) = history.write(1);
        history.acknowledge(1, first);
        history.read(1, &[0; BLOCK_BYTES], Floor::Flushed).expect("it was never flushed");
        let mark = history.flush();
        history.flushed(mark);
        assert!(history.judge(1, &[0; BLOCK_BYTES], Floor::Flushed).is_ok());
    }

    #[test]
    fn zeroes_are_writes_too() {
        let mut history = History::new(9, 4);
        let (first, one) = history.write(1);
        history.acknowledge(1, first);
        let second = history.zero(1);
        assert!(history.judge(1, &[0; BLOCK_BYTES], Floor::Acknowledged).is_ok());
        history.acknowledge(1, second);
        assert!(history.judge(1, &one, Floor::Acknowledged).is_err());
    }
}
