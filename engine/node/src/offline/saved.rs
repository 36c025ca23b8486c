//! Files of saved blocks: what the victim of a split brain alone wrote, kept before it is overwritten.
//!
//! A file is a header line of JSON, then for each range 16 bytes (offset, length, little-endian), the bytes,
//! and the CRC-32 of both; it ends with a range of length 0. Nothing is believed of a file that does not end so.

use std::fs::{File, OpenOptions};
use std::io::{BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use duplex_core::ids::ByteRange;
use duplex_store::Access;
use serde::{Deserialize, Serialize};

use super::Saved;
use super::metadata::OfflineCopy;
use crate::config::{Config, Volume};
use crate::control::status::Time;
use crate::failure::Failure;

/// Copied in one piece.
const PIECE_BYTES: u64 = 1 << 20;
/// First line of a file.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct Header {
    format: String,
    version: u32,
    pair: String,
    volume: String,
    generation: String,
    size_bytes: u64,
    saved_at: Time,
}

const FORMAT: &str = "duplex-saved-blocks";

/// Saves every marked block of the volumes, flushed. Returns the files.
///
/// # Errors
/// No space, or the backing cannot be read: nothing must be given up then. Files begun are removed.
pub fn save_marked(config: &Config, volumes: &[Volume]) -> Result<Vec<PathBuf>, Failure> {
    let mut files = Vec::new();
    for volume in volumes {
        match save_volume(config, volume) {
            Ok(file) => files.extend(file),
            Err(error) => {
                for file in files {
                    let _ = std::fs::remove_file(file);
                }
                return Err(error);
            }
        }
    }
    Ok(files)
}

fn save_volume(config: &Config, volume: &Volume) -> Result<Option<PathBuf>, Failure> {
    let metadata = volume.metadata.of(config.me).path();
    let mut copy = OfflineCopy::open(volume.backing.of(config.me), metadata, Access::ReadShared)?;
    if copy.dirty_blocks() == 0 {
        return Ok(None);
    }
    let directory = config.state_dir.of(config.me).join("saved");
    let failed = |what: &str, path: &Path, error: std::io::Error| {
        Failure::failed(format!("cannot {what} {}: {error}", path.display()))
    };
    std::fs::create_dir_all(&directory).map_err(|error| failed("make", &directory, error))?;
    let needed = copy.dirty_blocks() * u64::from(copy.superblock.copy.block_bytes);
    require_space(&directory, needed)?;
    let saved_at = Time::now();
    let stamp: String = saved_at.to_string().replace([':', '.'], "-");
    let path = directory.join(format!("{}-{}-{stamp}.blocks", config.pair, volume.name));
    let header = Header {
        format: FORMAT.to_owned(),
        version: 1,
        pair: config.pair.clone(),
        volume: volume.name.clone(),
        generation: copy.superblock.copy.generation.to_string(),
        size_bytes: copy.superblock.copy.size_bytes,
        saved_at,
    };
    match write_file(&path, &header, &mut copy) {
        Ok(()) => Ok(Some(path)),
        Err(error) => {
            let _ = std::fs::remove_file(&path);
            Err(error)
        }
    }
}

fn require_space(directory: &Path, needed: u64) -> Result<(), Failure> {
    let space = rustix::fs::statvfs(directory)
        .map_err(|errno| Failure::failed(format!("cannot look at {}: {errno}", directory.display())))?;
    let free = space.f_bavail.saturating_mul(space.f_frsize);
    // A little more than the blocks themselves: headers and the file system's own.
    if free < needed + needed / 16 + (1 << 20) {
        return Err(Failure::refused(format!(
            "{} has {free} bytes free, saving the blocks needs {needed}; make room or move state_dir",
            directory.display()
        )));
    }
    Ok(())
}

fn write_file(path: &Path, header: &Header, copy: &mut OfflineCopy) -> Result<(), Failure> {
    let failed = |error: std::io::Error| Failure::failed(format!("cannot write {}: {error}", path.display()));
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(failed)?;
    let mut out = BufWriter::new(file);
    let mut line = serde_json::to_string(header).map_err(|error| Failure::failed(error.to_string()))?;
    line.push('\n');
    out.write_all(line.as_bytes()).map_err(failed)?;
    let block = u64::from(copy.superblock.copy.block_bytes);
    let mut from_block = 0;
    while let Some(range) = copy.next_dirty(from_block)? {
        let mut at = range.offset_bytes;
        while at < range.end_bytes() {
            let length = (range.end_bytes() - at).min(PIECE_BYTES);
            let mut bytes = vec![0; usize::try_from(length).unwrap_or(0)];
            copy.io.read_data(at, &mut bytes).map_err(|error| Failure::failed(error.to_string()))?;
            write_range(&mut out, at, &bytes).map_err(failed)?;
            at += length;
        }
        from_block = range.end_bytes().div_ceil(block);
    }
    write_range(&mut out, 0, &[]).map_err(failed)?;
    let file = out.into_inner().map_err(|error| failed(error.into_error()))?;
    file.sync_all().map_err(failed)?;
    if let Some(parent) = path.parent() {
        File::open(parent).and_then(|directory| directory.sync_all()).map_err(failed)?;
    }
    Ok(())
}

fn write_range(out: &mut impl Write, offset: u64, bytes: &[u8]) -> std::io::Result<()> {
    let mut head = [0; 16];
    head[..8].copy_from_slice(&offset.to_le_bytes());
    head[8..].copy_from_slice(&(bytes.len() as u64).to_le_bytes());
    let mut crc = crc32fast::Hasher::new();
    crc.update(&head);
    crc.update(bytes);
    out.write_all(&head)?;
    out.write_all(bytes)?;
    out.write_all(&crc.finalize().to_le_bytes())
}

/// Reads a file of saved blocks.
pub(super) fn dump(file: &Path, what: &Saved) -> Result<(String, serde_json::Value), Failure> {
    let failed = |error: std::io::Error| Failure::failed(format!("{}: {error}", file.display()));
    let mut input = BufReader::new(File::open(file).map_err(failed)?);
    let header = read_header(&mut input, file)?;
    let mut onto = match what {
        Saved::List | Saved::Extract { .. } => None,
        Saved::Onto(path) => Some(OpenOptions::new().write(true).open(path).map_err(|error| {
            Failure::failed(format!("cannot write {}: {error}; it must exist", path.display()))
        })?),
    };
    let mut extracted = match what {
        Saved::Extract { length_bytes, .. } => {
            let length = usize::try_from(*length_bytes).unwrap_or(usize::MAX).min(1 << 30);
            vec![0; length]
        }
        Saved::List | Saved::Onto(_) => Vec::new(),
    };
    let mut ranges: Vec<ByteRange> = Vec::new();
    while let Some((offset, bytes)) = read_range(&mut input, file)? {
        if let Some(onto) = onto.as_mut() {
            onto.seek(SeekFrom::Start(offset)).and_then(|_| onto.write_all(&bytes)).map_err(failed)?;
        }
        if let Saved::Extract { offset_bytes, .. } = what {
            overlay(&mut extracted, *offset_bytes, offset, &bytes);
        }
        match ranges.last_mut().filter(|last| last.end_bytes() == offset) {
            Some(last) => last.length_bytes += bytes.len() as u64,
            None => ranges.push(ByteRange::new(offset, bytes.len() as u64)),
        }
    }
    if let Some(onto) = onto {
        onto.sync_all().map_err(failed)?;
    }
    if matches!(what, Saved::Extract { .. }) {
        std::io::stdout().lock().write_all(&extracted).map_err(failed)?;
    }
    let total: u64 = ranges.iter().map(|r| r.length_bytes).sum();
    let mut text = format!(
        "pair {} volume {} generation {} saved {}: {total} bytes in {} ranges\n",
        header.pair,
        header.volume,
        header.generation,
        header.saved_at,
        ranges.len()
    );
    for range in ranges.iter().take(64) {
        text.push_str(&format!("  {range}\n"));
    }
    let data = serde_json::json!({ "header": header, "ranges": ranges, "bytes": total });
    Ok((text.trim_end().to_owned(), data))
}

fn overlay(into: &mut [u8], into_offset: u64, offset: u64, bytes: &[u8]) {
    let wanted = ByteRange::new(into_offset, into.len() as u64);
    let have = ByteRange::new(offset, bytes.len() as u64);
    let start = wanted.offset_bytes.max(have.offset_bytes);
    let end = wanted.end_bytes().min(have.end_bytes());
    if start >= end {
        return;
    }
    let place = |base: u64| {
        let from = usize::try_from(start - base).unwrap_or(0);
        let to = usize::try_from(end - base).unwrap_or(0);
        from..to
    };
    into[place(into_offset)].copy_from_slice(&bytes[place(offset)]);
}

fn read_header(input: &mut impl Read, file: &Path) -> Result<Header, Failure> {
    let mut line = Vec::new();
    let mut byte = [0];
    loop {
        input.read_exact(&mut byte).map_err(|_| torn(file))?;
        if byte[0] == b'\n' {
            break;
        }
        line.push(byte[0]);
        if line.len() > 4096 {
            return Err(torn(file));
        }
    }
    let header: Header = serde_json::from_slice(&line).map_err(|_| torn(file))?;
    if header.format != FORMAT || header.version != 1 {
        return Err(torn(file));
    }
    Ok(header)
}

fn read_range(input: &mut impl Read, file: &Path) -> Result<Option<(u64, Vec<u8>)>, Failure> {
    let mut head = [0; 16];
    input.read_exact(&mut head).map_err(|_| torn(file))?;
    let number = |at: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&head[at..at + 8]);
        u64::from_le_bytes(bytes)
    };
    let (offset, length) = (number(0), number(8));
    if length > PIECE_BYTES {
        return Err(torn(file));
    }
    let mut bytes = vec![0; usize::try_from(length).map_err(|_| torn(file))?];
    input.read_exact(&mut bytes).map_err(|_| torn(file))?;
    let mut stored = [0; 4];
    input.read_exact(&mut stored).map_err(|_| torn(file))?;
    let mut crc = crc32fast::Hasher::new();
    crc.update(&head);
    crc.update(&bytes);
    if crc.finalize() != u32::from_le_bytes(stored) {
        return Err(torn(file));
    }
    Ok((length > 0).then_some((offset, bytes)))
}

fn torn(file: &Path) -> Failure {
    Failure::failed(format!("{}: not a whole file of saved blocks", file.display()))
}
