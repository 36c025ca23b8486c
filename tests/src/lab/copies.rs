//! Reads both backings itself, past every cache, and compares the data areas: internal metadata ends and data begins at 1 MiB.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use anyhow::{Context, Result, bail};

/// Where data begins on a backing with internal metadata.
pub const DATA_BEGIN_BYTES: u64 = 1 << 20;
const CHUNK_BYTES: usize = 256 << 10;
const BLOCK_BYTES: usize = 4096;

#[repr(C, align(4096))]
struct Chunk([u8; CHUNK_BYTES]);

/// A backing's data area, open for reading.
#[derive(Debug)]
pub struct Copy {
    file: File,
    begin_bytes: u64,
    size_bytes: u64,
}

impl Copy {
    /// With internal metadata.
    pub fn open(backing: &Path, size_bytes: u64) -> Result<Copy> {
        Copy::open_at(backing, DATA_BEGIN_BYTES, size_bytes)
    }

    /// With data from `begin_bytes` on.
    pub fn open_at(backing: &Path, begin_bytes: u64, size_bytes: u64) -> Result<Copy> {
        let direct = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(backing);
        let file = match direct {
            Ok(file) => file,
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => File::open(backing)?,
            Err(error) => return Err(error).with_context(|| format!("{} cannot be read", backing.display())),
        };
        Ok(Copy { file, begin_bytes, size_bytes })
    }

    /// Hands the data area to `take`, piece by piece with its offset.
    pub fn scan(&self, mut take: impl FnMut(u64, &[u8]) -> Result<()>) -> Result<()> {
        let mut chunk = new_chunk();
        let mut offset = 0;
        while offset < self.size_bytes {
            let length = CHUNK_BYTES.min(usize::try_from(self.size_bytes - offset)?);
            self.file
                .read_exact_at(&mut chunk.0[..length], self.begin_bytes + offset)
                .with_context(|| format!("the backing cannot be read at data offset {offset}"))?;
            take(offset, &chunk.0[..length])?;
            offset += length as u64;
        }
        Ok(())
    }

    /// One block.
    pub fn block(&self, number: u64) -> Result<Vec<u8>> {
        let mut chunk = new_chunk();
        let bytes = &mut chunk.0[..BLOCK_BYTES];
        self.file.read_exact_at(bytes, self.begin_bytes + number * BLOCK_BYTES as u64)?;
        Ok(bytes.to_vec())
    }

    /// A short name for the whole content: FNV-1a over 64-bit words.
    pub fn digest(&self) -> Result<u64> {
        let mut digest = 0xcbf2_9ce4_8422_2325_u64;
        self.scan(|_, bytes| {
            for word in bytes.chunks_exact(8) {
                let word = u64::from_le_bytes(word.try_into()?);
                digest = (digest ^ word).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(23);
            }
            Ok(())
        })?;
        Ok(digest)
    }
}

fn new_chunk() -> Box<Chunk> {
    Box::new(Chunk([0; CHUNK_BYTES]))
}

/// How two copies differ.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// The first differing block.
    pub first_block: u64,
    /// How many differ.
    pub blocks: u64,
    /// Both contents' first bytes that differ.
    pub sample: (Vec<u8>, Vec<u8>),
}

impl std::fmt::Display for Difference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (a, b) = &self.sample;
        write!(
            f,
            "{} blocks differ, the first is {}: {a:02x?} against {b:02x?}",
            self.blocks, self.first_block
        )
    }
}

/// Two copies that should be equal are not.
#[derive(Debug, thiserror::Error)]
#[error("the copies are not equal: {0}")]
pub struct Unequal(pub Difference);

/// Compares two copies of one size; `None` when they are equal.
pub fn compare(a: &Copy, b: &Copy) -> Result<Option<Difference>> {
    if a.size_bytes != b.size_bytes {
        bail!("copies of {} and {} bytes cannot be compared", a.size_bytes, b.size_bytes);
    }
    let mut found: Option<Difference> = None;
    let mut other = new_chunk();
    a.scan(|offset, bytes| {
        let theirs = &mut other.0[..bytes.len()];
        b.file.read_exact_at(theirs, b.begin_bytes + offset)?;
        if bytes == theirs {
            return Ok(());
        }
        for (number, (mine, their)) in bytes.chunks(BLOCK_BYTES).zip(theirs.chunks(BLOCK_BYTES)).enumerate() {
            if let Some(at) = mine.iter().zip(their).position(|(x, y)| x != y) {
                let end = (at + 16).min(mine.len());
                let difference = found.get_or_insert_with(|| Difference {
                    first_block: offset / BLOCK_BYTES as u64 + number as u64,
                    blocks: 0,
                    sample: (mine[at..end].to_vec(), their[at..end].to_vec()),
                });
                difference.blocks += 1;
            }
        }
        Ok(())
    })?;
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::Space;

    #[test]
    fn the_first_differing_block_is_named_and_metadata_is_not_compared() {
        let space = Space::new().expect("a directory");
        let size = 4 << 20;
        let [a, b] = ["a", "b"].map(|name| space.sparse_file(name, DATA_BEGIN_BYTES + size).expect("a file"));
        let write = |path: &Path, offset: u64| {
            OpenOptions::new()
                .write(true)
                .open(path)
                .expect("opened")
                .write_all_at(&[1], offset)
                .expect("written");
        };
        write(&a, 100);
        let open = |path: &Path| Copy::open(path, size).expect("opened");
        assert_eq!(compare(&open(&a), &open(&b)).expect("read"), None);
        assert_eq!(open(&a).digest().expect("read"), open(&b).digest().expect("read"));
        write(&b, DATA_BEGIN_BYTES + 7 * 4096 + 9);
        write(&b, DATA_BEGIN_BYTES + 3 * 4096 + (1 << 20));
        let difference = compare(&open(&a), &open(&b)).expect("read").expect("they differ");
        assert_eq!((difference.first_block, difference.blocks), (7, 2));
        assert_ne!(open(&a).digest().expect("read"), open(&b).digest().expect("read"));
    }
}
