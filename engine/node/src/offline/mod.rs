//! What works on backings without a daemon: `create`, `dump`, `compare`.

mod compare;
mod metadata;
mod saved;

use std::path::{Path, PathBuf};
use std::time::Duration;

use duplex_store::{Access, BackingConfig, MetaIo, StoreError, probe};

use crate::config::{Config, Volume};
use crate::failure::Failure;

pub use compare::{Comparison, compare_data};
pub use metadata::describe;
pub use saved::save_marked;

/// Bytes done of bytes to do; called often, cheap to ignore.
pub type Progress<'a> = &'a mut dyn FnMut(u64, u64);

/// What `create` may do to the data area.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DataArea {
    /// Must read as zeroes at both ends.
    MustBeEmpty,
    /// Holds data to bring along; metadata lies elsewhere.
    Keep,
    /// Whatever is there is given up.
    Overwrite,
}

/// Writes fresh metadata for a volume on this server, after making sure that nothing is lost.
///
/// # Errors
/// Refused where the backing holds something, is used, or holds a copy already; failed where I/O fails.
pub fn create(
    config: &Config,
    volume: &Volume,
    area: DataArea,
    progress: Progress<'_>,
) -> Result<String, Failure> {
    let path = volume.backing.of(config.me);
    let own_metadata = volume.metadata.of(config.me).path();
    if area == DataArea::Keep && own_metadata.is_none() {
        return Err(Failure::wrong(format!(
            "--keep-data needs the metadata elsewhere: internal metadata would overwrite {}; write \
             metadata = \"FILE\" in [volumes.{}]",
            path.display(),
            volume.name
        )));
    }
    let opened = BackingConfig { data: path.clone(), metadata: None, wait: Duration::ZERO };
    let mut io = MetaIo::open(&opened, Access::Exclusive).map_err(|error| refused_or_failed(&error))?;
    if area == DataArea::MustBeEmpty {
        let found = probe::probe_open(&mut io).map_err(|error| refused_or_failed(&error))?;
        if let Some(first) = found.first() {
            return Err(Failure::refused(format!(
                "{} holds {first}; to bring it along write metadata = \"FILE\" and use --keep-data, to give \
                 it up use --overwrite-data",
                path.display()
            )));
        }
    }
    metadata::write_blank(io.into_backing(), own_metadata, volume, progress)
}

/// The metadata of a volume of a stopped server, as text and for programs.
///
/// # Errors
/// The backing cannot be read, or holds no metadata.
pub fn dump(config: &Config, volume: &Volume) -> Result<(String, serde_json::Value), Failure> {
    let metadata = volume.metadata.of(config.me).path();
    let copy = metadata::OfflineCopy::open(volume.backing.of(config.me), metadata, Access::ReadShared)?;
    let superblock = &copy.superblock;
    let (text, data) = describe(&superblock.copy, Some(&superblock.server), copy.dirty_blocks());
    Ok((format!("{text}\nin flight   {} extents at the end", copy.replayed_extents()), data))
}

/// What to do with a file of saved blocks.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Saved {
    /// List its ranges.
    List,
    /// Write a range's bytes to the standard output.
    Extract {
        /// First byte of the volume.
        offset_bytes: u64,
        /// How many.
        length_bytes: u64,
    },
    /// Put every saved block into this file or device.
    Onto(PathBuf),
}

/// Reads a file of blocks that `resolve` saved.
///
/// # Errors
/// It cannot be read, is torn, or the target cannot be written.
pub fn dump_saved(file: &Path, what: &Saved) -> Result<(String, serde_json::Value), Failure> {
    saved::dump(file, what)
}

/// Compares the data of two backings of stopped servers.
///
/// # Errors
/// One cannot be read or claimed, or their volumes are of different sizes.
pub fn compare(a: &Path, b: &Path, progress: Progress<'_>) -> Result<Comparison, Failure> {
    let open = |path: &Path| {
        let copy = metadata::OfflineCopy::open(path, None, Access::ReadClaimed)?;
        let size_bytes = copy.superblock.copy.size_bytes;
        let mut io = copy.io;
        let mut area = io.placement();
        area.data_bytes = size_bytes;
        io.place(area).map_err(|error| refused_or_failed(&error))?;
        Ok::<_, Failure>(io)
    };
    let (mut a, mut b) = (open(a)?, open(b)?);
    compare_data(&mut a, &mut b, progress)
}

fn refused_or_failed(error: &StoreError) -> Failure {
    match error {
        StoreError::Io { .. } | StoreError::Range { .. } => Failure::failed(error.to_string()),
        StoreError::NotFound { .. } | StoreError::NotBacking { .. } | StoreError::SameFile { .. } => {
            Failure::wrong(error.to_string())
        }
        StoreError::Permission { .. }
        | StoreError::InUse { .. }
        | StoreError::ReadOnly { .. }
        | StoreError::NoDirectIo { .. }
        | StoreError::TooSmall { .. }
        | StoreError::Sectors { .. }
        | StoreError::Placement { .. }
        | StoreError::Exists { .. } => Failure::refused(error.to_string()),
    }
}
