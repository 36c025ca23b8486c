//! Files of a run: a directory that goes with it, and disk images whose blocks are really there.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use tempfile::TempDir;

const CHUNK_BYTES: usize = 1 << 20;
/// Between two looks at something that is awaited.
const LOOK_TIME: Duration = Duration::from_millis(10);

/// A directory removed at the end.
#[derive(Debug)]
pub struct Scratch {
    directory: TempDir,
}

impl Scratch {
    /// Makes one in `below`, which decides on which disk the images are.
    pub fn new(below: &Path) -> Result<Scratch> {
        let directory = tempfile::Builder::new()
            .prefix("duplex-bench-")
            .tempdir_in(below)
            .with_context(|| format!("no directory can be made in {}", below.display()))?;
        Ok(Scratch { directory })
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// An image of `size_bytes`, every block written and none of them zero: neither side can skip one, and no write
    /// to it later allocates anything in the file system.
    pub fn image(&self, name: &str, size_bytes: u64) -> Result<PathBuf> {
        let path = self.path().join(name);
        let mut file = File::create(&path)?;
        let mut state = size_bytes ^ 0x9e37_79b9_7f4a_7c15;
        let mut chunk = vec![0; CHUNK_BYTES];
        let mut left = usize::try_from(size_bytes)?;
        while left > 0 {
            for word in chunk.as_chunks_mut::<8>().0 {
                *word = next(&mut state).to_le_bytes();
            }
            let bytes = left.min(CHUNK_BYTES);
            file.write_all(&chunk[..bytes])
                .with_context(|| format!("{} cannot be filled", path.display()))?;
            left -= bytes;
        }
        file.sync_all()?;
        // A direct write that meets cached pages drops them first, and so waits: that is not what is measured.
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
        Ok(path)
    }

    /// A log file, opened for appending by the process that is started with it.
    pub fn log(&self, name: &str) -> Result<File> {
        Ok(OpenOptions::new().create(true).append(true).mode(0o600).open(self.path().join(name))?)
    }
}

/// The next number of a xorshift generator; never 0 for a state that is not.
pub fn next(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

/// Looks until `look` gives something; an error names what was awaited.
pub fn await_that<T>(what: &str, limit: Duration, mut look: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let end = Instant::now() + limit;
    loop {
        if let Some(found) = look()? {
            return Ok(found);
        }
        if Instant::now() >= end {
            bail!("waited {} s for {what}, in vain", limit.as_secs());
        }
        std::thread::sleep(LOOK_TIME);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_has_its_size_and_no_zero_block() {
        let scratch = Scratch::new(&std::env::temp_dir()).expect("a directory");
        let path = scratch.image("a", (2 << 20) + 4096).expect("an image");
        let bytes = std::fs::read(path).expect("read");
        assert_eq!(bytes.len(), (2 << 20) + 4096);
        assert!(bytes.chunks(4096).all(|block| block.iter().any(|byte| *byte != 0)));
    }

    #[test]
    fn what_never_comes_is_named() {
        let error = await_that::<()>("a miracle", Duration::ZERO, || Ok(None)).expect_err("in vain");
        assert!(error.to_string().contains("a miracle"), "{error}");
    }
}
