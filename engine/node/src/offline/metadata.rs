//! Writing a blank copy's metadata, and reading a copy's metadata without a ring.

use std::path::Path;
use std::time::Duration;

use duplex_core::dirty_log::{CAPACITY_EXTENTS, DirtyLog, LogGeometry, MetaOp, NextDirty};
use duplex_core::format::placement::{LOG_SLOTS, MetaPlacement};
use duplex_core::format::record::{CopyRecord, CopyState, Era, ServerRecord};
use duplex_core::format::superblock::{self, Superblock};
use duplex_core::ids::{BootId, ByteRange};
use duplex_core::limits::{DATA_OFFSET_BYTES, SIZE_ALIGN_BYTES};
use duplex_store::{Access, Backing, BackingConfig, MetaIo, create_metadata_file};

use super::{Progress, refused_or_failed};
use crate::config::Volume;
use crate::failure::Failure;
use crate::volume::place;

/// Zeroed in one piece.
const PIECE_BYTES: usize = 64 << 10;
/// Dirty ranges looked for in one step.
const RUN_BLOCKS: u64 = 1 << 20;

/// Writes a blank copy: an empty summary, then both superblocks.
pub(super) fn write_blank(
    backing: Backing,
    metadata: Option<&Path>,
    volume: &Volume,
    progress: Progress<'_>,
) -> Result<String, Failure> {
    let internal = metadata.is_none();
    let path = backing.path().to_owned();
    let backing_bytes = backing.geometry().backing_bytes;
    let capacity_bytes = place::capacity_bytes(backing_bytes, volume.block_bytes, internal);
    if capacity_bytes == 0 {
        return Err(Failure::refused(format!(
            "{}: {backing_bytes} bytes leave no room for data beside the metadata; make it 8 MiB or more",
            path.display()
        )));
    }
    let wanted = volume.size_bytes.map_or(capacity_bytes, |size| size / SIZE_ALIGN_BYTES * SIZE_ALIGN_BYTES);
    if wanted == 0 || wanted > capacity_bytes {
        return Err(Failure::wrong(format!(
            "volume {}: size = {} bytes does not fit: {} has room for {capacity_bytes} bytes of data",
            volume.name,
            volume.size_bytes.unwrap_or(0),
            path.display()
        )));
    }
    let meta = MetaPlacement::for_size(capacity_bytes, volume.block_bytes, LOG_SLOTS);
    let backing = match metadata {
        None => backing,
        Some(file) => {
            drop(backing);
            if !file.exists() {
                create_metadata_file(file, meta.total_bytes()).map_err(|error| refused_or_failed(&error))?;
            }
            let config =
                BackingConfig { data: path.clone(), metadata: Some(file.to_owned()), wait: Duration::ZERO };
            Backing::open(&config, Access::Exclusive).map_err(|error| refused_or_failed(&error))?
        }
    };
    let blank = Superblock {
        instance: rand::random::<u128>().max(1),
        features: 0,
        placement: meta,
        data_offset_bytes: if internal { DATA_OFFSET_BYTES } else { 0 },
        capacity_bytes,
        server: ServerRecord::fresh(BootId::NONE),
        copy: CopyRecord::blank(wanted, volume.block_bytes, volume.sector_bytes),
        log_life: 0,
        map_floor: 0,
    };
    let mut io = MetaIo::new(backing).map_err(|error| refused_or_failed(&error))?;
    io.place(place::placement(capacity_bytes, internal)).map_err(|error| refused_or_failed(&error))?;
    write_all(&mut io, &blank, progress)?;
    Ok(format!(
        "volume {}: blank copy on {}, room for {wanted} bytes; next: `duplex daemon`, then `duplex activate` on one server",
        volume.name,
        path.display()
    ))
}

fn write_all(io: &mut MetaIo, blank: &Superblock, progress: Progress<'_>) -> Result<(), Failure> {
    let meta = &blank.placement;
    // What says where pages stand must be empty; pages it calls empty are never read.
    let (start, end) = (meta.summary_offset_bytes, meta.pages_offset_bytes);
    let zeroes = vec![0; PIECE_BYTES];
    let mut at = start;
    while at < end {
        progress(at - start, end - start);
        let left = usize::try_from(end - at).unwrap_or(PIECE_BYTES).min(PIECE_BYTES);
        io.write_meta(at, &zeroes[..left]).map_err(|error| refused_or_failed(&error))?;
        at += left as u64;
    }
    let mut old = vec![0; place::SUPERBLOCKS_BYTES];
    io.read_meta(0, &mut old).map_err(|error| refused_or_failed(&error))?;
    let (first, second) = old.split_at(superblock::SUPERBLOCK_BYTES);
    let counter = superblock::next_counter(first, second);
    for (slot, counter) in [(0u8, counter), (1, counter + 1)] {
        let bytes =
            superblock::encode(blank, slot, counter).map_err(|error| Failure::failed(error.to_string()))?;
        let offset = u64::from(slot) * superblock::SUPERBLOCK_BYTES as u64;
        io.write_meta(offset, &bytes).map_err(|error| refused_or_failed(&error))?;
    }
    io.flush().map_err(|error| refused_or_failed(&error))?;
    progress(end - start, end - start);
    Ok(())
}

/// A copy read without a ring: its superblock and its dirty log.
pub(super) struct OfflineCopy {
    pub(super) io: MetaIo,
    pub(super) superblock: Superblock,
    log: DirtyLog,
}

impl OfflineCopy {
    /// Reads; nothing is written, whatever the log would like to.
    pub(super) fn open(data: &Path, metadata: Option<&Path>, access: Access) -> Result<Self, Failure> {
        let placed = place::open_with(data.to_owned(), metadata.map(Path::to_owned), Duration::ZERO, access)
            .map_err(|error| Failure::refused(error.to_string()))?;
        let superblock = placed.superblock;
        let mut io = MetaIo::new(placed.backing).map_err(|error| refused_or_failed(&error))?;
        io.place(placed.placement).map_err(|error| refused_or_failed(&error))?;
        let geometry = LogGeometry {
            size_bytes: superblock.copy.size_bytes,
            block_bytes: superblock.copy.block_bytes,
            log_slots: superblock.placement.log_slots,
            capacity_extents: CAPACITY_EXTENTS,
            placement: superblock.placement,
        };
        let mut log = DirtyLog::load(
            geometry,
            superblock.instance,
            superblock.log_life,
            superblock.map_floor,
            u64::MAX >> 1,
        );
        pump(&mut log, &mut io)?;
        Ok(Self { io, superblock, log })
    }

    pub(super) fn dirty_blocks(&self) -> u64 {
        self.log.dirty_blocks()
    }

    pub(super) fn replayed_extents(&self) -> u64 {
        self.log.replayed_extents()
    }

    /// The next marked range at or after a block.
    pub(super) fn next_dirty(&mut self, from_block: u64) -> Result<Option<ByteRange>, Failure> {
        let block = u64::from(self.superblock.copy.block_bytes);
        loop {
            match self.log.next_dirty(from_block, RUN_BLOCKS) {
                NextDirty::Run { first_block, blocks } => {
                    let offset = first_block * block;
                    let length = (blocks * block).min(self.superblock.copy.size_bytes - offset);
                    return Ok(Some(ByteRange::new(offset, length)));
                }
                NextDirty::Loading => pump(&mut self.log, &mut self.io)?,
                NextDirty::End => return Ok(None),
            }
        }
    }
}

/// Answers the log's reads; its writes are taken as done and dropped: the copy is only looked at.
fn pump(log: &mut DirtyLog, io: &mut MetaIo) -> Result<(), Failure> {
    while let Some((op, meta)) = log.poll_op() {
        match meta {
            MetaOp::Read { offset_bytes, length_bytes } => {
                let mut bytes = vec![0; usize::try_from(length_bytes).unwrap_or(0)];
                io.read_meta(offset_bytes, &mut bytes).map_err(|error| refused_or_failed(&error))?;
                log.op_done(op, Ok(bytes));
            }
            MetaOp::Write { .. } => log.op_done(op, Ok(Vec::new())),
        }
    }
    match log.failed() {
        Some(errno) => Err(Failure::failed(format!("the dirty log cannot be read (errno {errno})"))),
        None => Ok(()),
    }
}

/// The metadata as a page and for programs.
pub fn describe(
    copy: &CopyRecord,
    server: Option<&ServerRecord>,
    dirty_blocks: u64,
) -> (String, serde_json::Value) {
    let state = match copy.state {
        CopyState::Inconsistent { toward } => format!("inconsistent towards {toward}"),
        CopyState::Blank | CopyState::UpToDate | CopyState::Outdated | CopyState::Failed => {
            copy.state.word().to_owned()
        }
    };
    let history: Vec<String> = copy.history.iter().map(ToString::to_string).collect();
    let mut page = format!(
        "pair        {}\nvolume      {}\nsize        {} bytes, blocks of {}, sectors of {}\nstate       {state}{}\n\
         generation  {} ({:?})\nbase        {}\nhistory     {}\nproven      epoch {} operation {}\nmarked      {dirty_blocks} blocks\n",
        copy.pair,
        copy.volume,
        copy.size_bytes,
        copy.block_bytes,
        copy.sector_bytes,
        if copy.unproven { ", unproven" } else { "" },
        copy.generation,
        copy.origin,
        copy.base,
        if history.is_empty() { "-".to_owned() } else { history.join("\n            ") },
        copy.proven.epoch,
        copy.proven.seq.0,
    );
    if let Some(server) = server {
        let era = match server.era {
            Era::Pair => "pair".to_owned(),
            Era::Solo(number) => format!("solo {number}"),
        };
        let holder = server.epoch_seen.holder.as_ref().map_or("-".to_owned(), ToString::to_string);
        page.push_str(&format!(
            "server      epoch {} of {holder}, era {era}, last primary in {}, {}{}\n",
            server.epoch_seen.number,
            server.last_primary,
            if server.was_primary { "was primary" } else { "was secondary" },
            if server.clean { ", ended in order" } else { "" },
        ));
    }
    let data = serde_json::json!({ "copy": copy, "server": server, "dirty_blocks": dirty_blocks });
    (page.trim_end().to_owned(), data)
}
