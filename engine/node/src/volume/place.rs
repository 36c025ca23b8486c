//! Opening a backing and finding its areas.

use std::path::PathBuf;
use std::time::Duration;

use duplex_core::format::placement::{LOG_SLOTS, MetaPlacement};
use duplex_core::format::superblock::{self, Superblock, SuperblockError};
use duplex_core::limits::{DATA_OFFSET_BYTES, SIZE_ALIGN_BYTES};
use duplex_store::usage::{PROCESSES_MAX, Use};
use duplex_store::{Access, Backing, BackingConfig, MetaIo, Placement, StoreError};

/// Bytes of both superblocks.
pub const SUPERBLOCKS_BYTES: usize = 2 * superblock::SUPERBLOCK_BYTES;

/// A backing that cannot be used as a copy.
#[derive(Debug, thiserror::Error)]
pub enum PlaceError {
    /// It cannot be opened or read.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Its metadata cannot be used.
    #[error("{}: {error}", path.display())]
    Metadata {
        /// The backing.
        path: PathBuf,
        /// Why.
        error: SuperblockError,
    },
    /// The backing is smaller than it was.
    #[error(
        "{}: the metadata was made for a backing with room for {recorded_bytes} bytes of data, now there is room \
         for {found_bytes} only; bring the old size back, or make the copy anew (`duplex create`)",
        path.display()
    )]
    WrongSize {
        /// The backing.
        path: PathBuf,
        /// Capacity in the superblock.
        recorded_bytes: u64,
        /// Capacity now.
        found_bytes: u64,
    },
    /// There is no room for even the smallest volume.
    #[error("{}: {bytes} bytes are too few: {needed_bytes} are the least", path.display())]
    TooSmall {
        /// The backing.
        path: PathBuf,
        /// Its size.
        bytes: u64,
        /// The least.
        needed_bytes: u64,
    },
}

impl PlaceError {
    /// The stable word.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Store(_) => "io",
            Self::Metadata { error, .. } => error.code(),
            Self::WrongSize { .. } => "wrong-size",
            Self::TooSmall { .. } => "too-small",
        }
    }

    /// This very process holds the backing, as far as can be seen.
    pub fn is_held_here(&self) -> bool {
        let Self::Store(StoreError::InUse { by, .. }) = self else {
            return false;
        };
        let own = std::process::id();
        // Where nobody is seen, or as many as are looked for, it may be this process.
        let here = |one: &Use| matches!(one, Use::Process { pid, .. } if *pid == own);
        let only_processes = by.iter().all(|one| matches!(one, Use::Process { .. }));
        only_processes && (by.is_empty() || by.len() >= PROCESSES_MAX || by.iter().any(here))
    }
}

/// Room for data on a backing of this size: what metadata leaves, rounded down to 4 MiB. With metadata in a
/// file of its own all of it is data.
pub fn capacity_bytes(backing_bytes: u64, block_bytes: u32, internal: bool) -> u64 {
    if !internal {
        return backing_bytes / SIZE_ALIGN_BYTES * SIZE_ALIGN_BYTES;
    }
    let room = backing_bytes.saturating_sub(DATA_OFFSET_BYTES);
    let tail = MetaPlacement::for_size(room, block_bytes, LOG_SLOTS).tail_bytes();
    room.saturating_sub(tail) / SIZE_ALIGN_BYTES * SIZE_ALIGN_BYTES
}

/// Where the store finds data and metadata of a copy with this capacity.
pub fn placement(capacity_bytes: u64, internal: bool) -> Placement {
    if internal {
        Placement::internal(DATA_OFFSET_BYTES, capacity_bytes, DATA_OFFSET_BYTES + capacity_bytes)
    } else {
        Placement::external(capacity_bytes)
    }
}

/// A claimed backing whose metadata was recognised.
#[derive(Debug)]
pub struct Placed {
    /// Claimed.
    pub backing: Backing,
    /// Its areas.
    pub placement: Placement,
    /// Room for data.
    pub capacity_bytes: u64,
    /// As found.
    pub superblock: Superblock,
}

/// Claims the backing and reads its superblocks. Sleeps while a killed predecessor still holds it.
///
/// # Errors
/// [`PlaceError`], with what to do about it. Nothing is written.
pub fn open(data: PathBuf, metadata: Option<PathBuf>, wait: Duration) -> Result<Placed, PlaceError> {
    open_with(data, metadata, wait, Access::Exclusive)
}

/// The same with any access, for offline verbs.
///
/// # Errors
/// As [`open`].
pub fn open_with(
    data: PathBuf,
    metadata: Option<PathBuf>,
    wait: Duration,
    access: Access,
) -> Result<Placed, PlaceError> {
    let internal = metadata.is_none();
    let backing = Backing::open(&BackingConfig { data: data.clone(), metadata, wait }, access)?;
    let backing_bytes = backing.geometry().backing_bytes;
    let mut io = MetaIo::new(backing)?;
    let mut bytes = vec![0; SUPERBLOCKS_BYTES];
    io.read_meta(0, &mut bytes)?;
    let (first, second) = bytes.split_at(superblock::SUPERBLOCK_BYTES);
    let selected = superblock::select(first, second)
        .map_err(|error| PlaceError::Metadata { path: data.clone(), error })?;
    let superblock = selected.superblock;
    let found_bytes = capacity_bytes(backing_bytes, superblock.copy.block_bytes, internal);
    let recorded_bytes = superblock.capacity_bytes;
    if found_bytes < recorded_bytes {
        return Err(PlaceError::WrongSize { path: data, recorded_bytes, found_bytes });
    }
    if found_bytes > recorded_bytes {
        tracing::warn!(
            "{}: it grew, there is room for {found_bytes} bytes of data now; the {recorded_bytes} bytes it was made for \
             go on being served (growing comes later; a copy made anew by `duplex create` uses all)",
            data.display()
        );
    }
    let placement = placement(recorded_bytes, internal);
    Ok(Placed { backing: io.into_backing(), placement, capacity_bytes: recorded_bytes, superblock })
}
