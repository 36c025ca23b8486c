//! What lies on the platter and what still is in the volatile cache, in sectors of 512 bytes.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Result;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use rustix::fs::FallocateFlags;

use super::Loss;
use crate::lab::Seed;

const SECTOR: u64 = 512;
const BLOCK: u64 = 4096;
/// Above this the oldest part of the cache is written down by itself, as real disks do.
const CACHE_BYTES_MAX: usize = 256 << 20;
/// A zeroed range above this goes straight to the platter: a disk may write its cache down whenever it likes.
const ZERO_BYTES_CACHED: u64 = 1 << 20;

/// A cached block: its bytes and which of its eight sectors they are.
#[derive(Debug)]
struct Cached {
    bytes: Box<[u8; BLOCK as usize]>,
    sectors: u8,
}

/// Platter and cache.
#[derive(Debug)]
pub(super) struct Platter {
    file: File,
    size_bytes: u64,
    volatile: bool,
    cache: BTreeMap<u64, Cached>,
}

impl Platter {
    pub(super) fn new(file: File, volatile: bool) -> Result<Platter> {
        let size_bytes = file.metadata()?.len();
        Ok(Platter { file, size_bytes, volatile, cache: BTreeMap::new() })
    }

    pub(super) fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    pub(super) fn volatile_bytes(&self) -> u64 {
        self.cache.values().map(|block| u64::from(block.sectors.count_ones()) * SECTOR).sum()
    }

    /// Reads as the host sees it: the cache lies over the platter.
    pub(super) fn read(&self, offset: u64, bytes: &mut [u8]) -> Result<()> {
        self.file.read_exact_at(bytes, offset)?;
        let end = offset + bytes.len() as u64;
        for (block, cached) in self.cache.range(offset / BLOCK..end.div_ceil(BLOCK)) {
            for sector in cached.list() {
                let at = block * BLOCK + sector * SECTOR;
                let (from, to) = (at.max(offset), (at + SECTOR).min(end));
                if from < to {
                    let inside = (from - block * BLOCK) as usize..(to - block * BLOCK) as usize;
                    bytes[(from - offset) as usize..(to - offset) as usize]
                        .copy_from_slice(&cached.bytes[inside]);
                }
            }
        }
        Ok(())
    }

    /// A write: into the cache, or straight down where there is none. Whole sectors.
    pub(super) fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        if !self.volatile {
            return self.file.write_all_at(bytes, offset);
        }
        for (number, sector) in bytes.chunks(SECTOR as usize).enumerate() {
            let at = offset + number as u64 * SECTOR;
            let block = self.cache.entry(at / BLOCK).or_insert_with(Cached::empty);
            let index = (at % BLOCK) / SECTOR;
            let begin = (index * SECTOR) as usize;
            block.bytes[begin..begin + sector.len()].copy_from_slice(sector);
            block.sectors |= 1 << index;
        }
        while self.cache.len() * BLOCK as usize > CACHE_BYTES_MAX {
            self.write_down_first()?;
        }
        Ok(())
    }

    /// Zeroes: discard or write-zeroes.
    pub(super) fn zero(&mut self, offset: u64, length: u64) -> Result<()> {
        if self.volatile && length <= ZERO_BYTES_CACHED {
            return self.write(offset, &vec![0; length as usize]);
        }
        let end = offset + length;
        let inside: Vec<u64> =
            self.cache.range(offset / BLOCK..end.div_ceil(BLOCK)).map(|(block, _)| *block).collect();
        for block in inside {
            if let Some(cached) = self.cache.get_mut(&block) {
                for sector in 0..BLOCK / SECTOR {
                    let at = block * BLOCK + sector * SECTOR;
                    if at >= offset && at < end {
                        cached.sectors &= !(1 << sector);
                    }
                }
            }
        }
        self.cache.retain(|_, cached| cached.sectors != 0);
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(rustix::fs::fallocate(self.file.as_fd(), punch, offset, length)?)
    }

    /// A flush: the cache reaches the platter.
    pub(super) fn flush(&mut self) -> Result<()> {
        while !self.cache.is_empty() {
            self.write_down_first()?;
        }
        Ok(())
    }

    fn write_down_first(&mut self) -> Result<()> {
        let Some((block, cached)) = self.cache.pop_first() else { return Ok(()) };
        for sector in cached.list() {
            self.write_down(block, &cached, sector)?;
        }
        Ok(())
    }

    fn write_down(&self, block: u64, cached: &Cached, sector: u64) -> Result<()> {
        let begin = (sector * SECTOR) as usize;
        self.file.write_all_at(&cached.bytes[begin..begin + SECTOR as usize], block * BLOCK + sector * SECTOR)
    }

    /// A power cut. `under_way`: writes that had not been answered (offset, bytes); only a torn cut lets any of them in.
    pub(super) fn lose_power(&mut self, loss: Loss, under_way: &[(u64, Vec<u8>)]) -> Result<()> {
        match loss {
            Loss::Drop => {}
            Loss::Keep => self.flush()?,
            Loss::Tear { seed } => {
                let mut seed = Seed::new(seed);
                let cache = std::mem::take(&mut self.cache);
                for (block, cached) in &cache {
                    for sector in cached.list().filter(|_| seed.once_in(2)) {
                        self.write_down(*block, cached, sector)?;
                    }
                }
                for (offset, bytes) in under_way {
                    for (number, sector) in bytes.chunks(SECTOR as usize).enumerate() {
                        if seed.once_in(2) {
                            self.file.write_all_at(sector, offset + number as u64 * SECTOR)?;
                        }
                    }
                }
            }
        }
        self.cache.clear();
        Ok(())
    }

    /// Changes the platter itself, and the cache over it.
    pub(super) fn poke(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        for (number, byte) in bytes.iter().enumerate() {
            let at = offset + number as u64;
            self.file.write_all_at(&[*byte], at)?;
            if let Some(cached) = self.cache.get_mut(&(at / BLOCK)) {
                cached.bytes[(at % BLOCK) as usize] = *byte;
            }
        }
        Ok(())
    }
}

impl Cached {
    fn empty() -> Cached {
        Cached { bytes: Box::new([0; BLOCK as usize]), sectors: 0 }
    }

    /// The sectors it holds.
    fn list(&self) -> impl Iterator<Item = u64> + '_ {
        (0..BLOCK / SECTOR).filter(|sector| self.sectors & (1 << sector) != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::Space;

    fn platter(space: &Space) -> Platter {
        let path = space.sparse_file("platter", 1 << 20).expect("a file");
        let file = std::fs::OpenOptions::new().read(true).write(true).open(path).expect("opened");
        Platter::new(file, true).expect("a platter")
    }

    fn byte(platter: &Platter, offset: u64) -> u8 {
        let mut bytes = [0];
        platter.read(offset, &mut bytes).expect("inside");
        bytes[0]
    }

    #[test]
    fn a_cut_drops_what_was_not_flushed_and_nothing_else() {
        let space = Space::new().expect("a directory");
        let mut disk = platter(&space);
        disk.write(4096, &[1; 4096]).expect("written");
        disk.flush().expect("flushed");
        disk.write(4096 + 512, &[2; 512]).expect("written");
        assert_eq!((byte(&disk, 4096), byte(&disk, 4096 + 512), byte(&disk, 4096 + 1024)), (1, 2, 1));
        assert_eq!(disk.volatile_bytes(), 512);
        disk.lose_power(Loss::Drop, &[]).expect("cut");
        assert_eq!((byte(&disk, 4096), byte(&disk, 4096 + 512)), (1, 1));
    }

    #[test]
    fn a_torn_cut_keeps_some_sectors_of_cache_and_of_writes_under_way() {
        let space = Space::new().expect("a directory");
        let mut disk = platter(&space);
        disk.write(0, &[1; 64 * 512]).expect("written");
        disk.lose_power(Loss::Tear { seed: 7 }, &[(65536, vec![2; 64 * 512])]).expect("cut");
        for begin in [0, 65536] {
            let kept = (0..64).filter(|sector| byte(&disk, begin + sector * 512) != 0).count();
            assert!((8..56).contains(&kept), "{kept} of 64 kept");
        }
    }

    #[test]
    fn zeroes_large_and_small_are_seen_and_small_ones_are_volatile() {
        let space = Space::new().expect("a directory");
        let mut disk = platter(&space);
        disk.write(0, &[1; 8192]).expect("written");
        disk.flush().expect("flushed");
        disk.zero(4096, 512).expect("zeroed");
        assert_eq!((byte(&disk, 4096), byte(&disk, 4608)), (0, 1));
        disk.lose_power(Loss::Drop, &[]).expect("cut");
        assert_eq!(byte(&disk, 4096), 1);
    }
}
