//! Real files with known contents, written durably and read back by their checksums.

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

/// A file as it must read.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Known {
    pub(crate) name: String,
    pub(crate) len_bytes: u64,
    sha256: [u8; 32],
}

/// Bytes of these files.
pub(crate) fn total_bytes(files: &[Known]) -> u64 {
    files.iter().map(|file| file.len_bytes).sum()
}

const CHUNK_BYTES: usize = 256 << 10;

/// Contents nobody can compress or guess, from a seed.
struct Contents(u64);

impl Contents {
    fn fill(&mut self, chunk: &mut [u8]) {
        for word in chunk.chunks_mut(8) {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut mixed = self.0;
            mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            word.copy_from_slice(&(mixed ^ (mixed >> 31)).to_le_bytes()[..word.len()]);
        }
    }
}

/// Writes one file; when this returns it is on stable storage, name and all.
pub(crate) fn write(directory: &Path, name: &str, seed: u64, len_bytes: u64) -> Result<Known> {
    let path = directory.join(name);
    let mut file = File::create(&path).with_context(|| format!("{} cannot be made", path.display()))?;
    let mut contents = Contents(seed);
    let mut digest = Sha256::new();
    let mut chunk = vec![0; CHUNK_BYTES];
    let mut left_bytes = len_bytes;
    while left_bytes > 0 {
        let take = usize::try_from(left_bytes).unwrap_or(usize::MAX).min(CHUNK_BYTES);
        contents.fill(&mut chunk[..take]);
        digest.update(&chunk[..take]);
        file.write_all(&chunk[..take]).with_context(|| format!("{}", path.display()))?;
        left_bytes -= take as u64;
    }
    file.sync_all().with_context(|| format!("fsync of {}", path.display()))?;
    File::open(directory)?.sync_all().with_context(|| format!("fsync of {}", directory.display()))?;
    Ok(Known { name: name.to_owned(), len_bytes, sha256: digest.finalize().into() })
}

/// Reads every file; fails at the first one that is not what was written.
pub(crate) fn verify(directory: &Path, files: &[Known]) -> Result<()> {
    let mut chunk = vec![0; CHUNK_BYTES];
    for known in files {
        let path = directory.join(&known.name);
        let mut file = File::open(&path).with_context(|| format!("{} is lost", path.display()))?;
        let mut digest = Sha256::new();
        let mut len_bytes = 0;
        loop {
            let count = file.read(&mut chunk).with_context(|| format!("{}", path.display()))?;
            if count == 0 {
                break;
            }
            digest.update(&chunk[..count]);
            len_bytes += count as u64;
        }
        if len_bytes != known.len_bytes {
            bail!("{} has {len_bytes} bytes, {} were written", path.display(), known.len_bytes);
        }
        if <[u8; 32]>::from(digest.finalize()) != known.sha256 {
            bail!("{} does not read as it was written: wrong SHA-256", path.display());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_found_right_and_any_change_is_found() {
        let directory = tempfile::tempdir().expect("a directory");
        let at = directory.path();
        let len_bytes = CHUNK_BYTES as u64 + 4099;
        let files = vec![write(at, "a", 1, len_bytes).expect("a"), write(at, "b", 2, 5).expect("b")];
        assert_ne!(files[0].sha256, files[1].sha256);
        assert_eq!(total_bytes(&files), len_bytes + 5);
        verify(at, &files).expect("as written");

        let mut bytes = std::fs::read(at.join("a")).expect("a");
        bytes[CHUNK_BYTES] ^= 1;
        std::fs::write(at.join("a"), &bytes).expect("changed");
        let error = verify(at, &files).expect_err("one bit differs");
        assert!(error.to_string().contains("wrong SHA-256"), "{error}");

        bytes.pop();
        std::fs::write(at.join("a"), &bytes).expect("changed");
        assert!(verify(at, &files).expect_err("shorter").to_string().contains("were written"));
        std::fs::remove_file(at.join("b")).expect("removed");
        assert!(verify(at, &files[1..]).expect_err("gone").to_string().contains("is lost"));
    }
}
