//! Two backings, block by block.

use duplex_core::ids::ByteRange;
use duplex_core::limits::BLOCK_BYTES;
use duplex_store::MetaIo;
use serde::Serialize;

use super::Progress;
use crate::failure::Failure;

/// Read in one piece.
const CHUNK_BYTES: u64 = 1 << 20;
/// Differing ranges named at most; all are counted.
const RANGES_MAX: usize = 32;

/// What a comparison found.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Comparison {
    /// Compared on each side.
    pub compared_bytes: u64,
    /// 4 KiB blocks that differ.
    pub differing_blocks: u64,
    /// The first differing ranges, joined where they touch.
    pub ranges: Vec<ByteRange>,
}

impl Comparison {
    /// True when nothing differs.
    pub const fn equal(&self) -> bool {
        self.differing_blocks == 0
    }

    fn differs(&mut self, at: u64, length: u64) {
        self.differing_blocks += 1;
        if let Some(last) = self.ranges.last_mut().filter(|last| last.end_bytes() == at) {
            last.length_bytes += length;
        } else if self.ranges.len() < RANGES_MAX {
            self.ranges.push(ByteRange::new(at, length));
        }
    }
}

/// Compares the placed data areas of two backings. Holes of both files are passed over.
///
/// # Errors
/// A read fails, or the areas differ in size.
pub fn compare_data(a: &mut MetaIo, b: &mut MetaIo, progress: Progress<'_>) -> Result<Comparison, Failure> {
    let (bytes, other_bytes) = (a.data_bytes(), b.data_bytes());
    if bytes != other_bytes {
        return Err(Failure::refused(format!("the volumes differ in size: {bytes} and {other_bytes} bytes")));
    }
    let failed = |error: duplex_store::StoreError| Failure::failed(error.to_string());
    let mut found = Comparison { compared_bytes: bytes, differing_blocks: 0, ranges: Vec::new() };
    let (mut left, mut right) = (Vec::new(), Vec::new());
    let mut at = 0;
    while at < bytes {
        progress(at, bytes);
        let next =
            |io: &MetaIo| io.next_data(at).map(|range| range.map_or(bytes, |range| range.offset_bytes));
        // What neither file holds reads as zeroes on both.
        let start = next(a).map_err(failed)?.min(next(b).map_err(failed)?);
        at = at.max(start / CHUNK_BYTES * CHUNK_BYTES);
        if at >= bytes {
            break;
        }
        let length = CHUNK_BYTES.min(bytes - at);
        let size = usize::try_from(length).map_err(|_| Failure::failed("a chunk is too large"))?;
        left.resize(size, 0);
        right.resize(size, 0);
        a.read_data(at, &mut left).map_err(failed)?;
        b.read_data(at, &mut right).map_err(failed)?;
        if left != right {
            let block = BLOCK_BYTES as usize;
            for (index, (x, y)) in left.chunks(block).zip(right.chunks(block)).enumerate() {
                if x != y {
                    found.differs(at + (index * block) as u64, x.len() as u64);
                }
            }
        }
        at += length;
    }
    progress(bytes, bytes);
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;
    use std::time::Duration;

    use duplex_store::{Access, BackingConfig, Placement};

    use super::*;

    fn open(path: &std::path::Path, bytes: u64) -> MetaIo {
        let config = BackingConfig { data: path.to_owned(), metadata: None, wait: Duration::ZERO };
        let mut io = MetaIo::open(&config, Access::ReadClaimed).expect("opened");
        io.place(Placement::internal(0, bytes, bytes)).expect("placed");
        io
    }

    #[test]
    fn every_differing_block_is_found_across_holes() {
        let dir = tempfile::tempdir_in("/var/tmp").expect("directory with direct I/O");
        let bytes: u64 = 40 << 20;
        let files = ["a", "b"].map(|name| {
            let path = dir.path().join(name);
            let file = std::fs::File::create(&path).expect("made");
            file.set_len(bytes).expect("sized");
            file.write_all_at(&[7; 8192], 5 << 20).expect("written");
            (path, file)
        });
        let mut io = files.each_ref().map(|(path, _)| open(path, bytes));
        let [a, b] = &mut io;
        let mut last = (0, 0);
        let same = compare_data(a, b, &mut |done, all| last = (done, all)).expect("compared");
        assert!(same.equal());
        assert_eq!(last, (bytes, bytes));
        // One bit in the last block of the second, two touching blocks of the first, zeroes written over a hole.
        files[1].1.write_all_at(&[1], bytes - 1).expect("written");
        files[0].1.write_all_at(&[9; 4097], 20 << 20).expect("written");
        files[0].1.write_all_at(&[0; 4096], 30 << 20).expect("written");
        for (_, file) in &files {
            file.sync_all().expect("synced");
        }
        let found = compare_data(a, b, &mut |_, _| {}).expect("compared");
        assert_eq!(found.differing_blocks, 3);
        assert_eq!(found.ranges, [ByteRange::new(20 << 20, 8192), ByteRange::new(bytes - 4096, 4096)]);
        a.place(Placement::internal(0, bytes - 4096, bytes)).expect("placed");
        let refused = compare_data(a, b, &mut |_, _| {}).expect_err("sizes");
        assert_eq!(refused.exit, crate::control::api::Exit::Refused);
    }
}
