//! Synchronous reads and writes of a claimed backing: for `create`, `dump`, `compare`, and a first look at a superblock.

use duplex_core::ids::{BufferId, ByteRange};
use duplex_ring::{Arena, BUFFER_MAX_BYTES, Errno};
use rustix::io::{IoSlice, ReadWriteFlags};

use crate::backing::{Access, Backing, BackingConfig, Part};
use crate::error::StoreError;
use crate::geometry::Geometry;
use crate::placement::Placement;

/// A backing with a placement, used without a ring. Buffers may lie anywhere; offsets and lengths are whole sectors.
#[derive(Debug)]
pub struct MetaIo {
    backing: Backing,
    placement: Placement,
    /// One aligned buffer through which everything goes.
    arena: Arena,
    bounce: BufferId,
}

/// Where a piece goes.
#[derive(Clone, Copy)]
enum Area {
    Data,
    Meta,
    /// The whole data backing, whatever the placement.
    Raw,
}

impl MetaIo {
    /// Opens the backing; as [`new`](Self::new).
    pub fn open(config: &BackingConfig, access: Access) -> Result<Self, StoreError> {
        Self::new(Backing::open(config, access)?)
    }

    /// On an open backing. Until [`place`](Self::place) is called, data is the whole backing and metadata is contiguous from byte 0.
    pub fn new(backing: Backing) -> Result<Self, StoreError> {
        let no_memory = || StoreError::io(backing.path(), "mapping a buffer", Errno::NOMEM);
        let mut arena = Arena::new(BUFFER_MAX_BYTES).map_err(|_| no_memory())?;
        let bounce = arena.alloc(BUFFER_MAX_BYTES).ok_or_else(no_memory)?;
        let placement = Placement::external(backing.geometry().backing_bytes);
        Ok(Self { backing, placement, arena, bounce })
    }

    /// Sets where the areas lie, after checking that they fit.
    pub fn place(&mut self, placement: Placement) -> Result<(), StoreError> {
        placement
            .check(&self.backing.geometry(), self.backing.has_external_metadata())
            .map_err(|error| StoreError::Placement { path: self.backing.path().to_owned(), error })?;
        self.placement = placement;
        Ok(())
    }

    /// Where the areas lie.
    pub const fn placement(&self) -> Placement {
        self.placement
    }

    /// Size of the data area as placed.
    pub const fn data_bytes(&self) -> u64 {
        self.placement.data_bytes
    }

    /// Sizes of the data backing.
    pub const fn geometry(&self) -> Geometry {
        self.backing.geometry()
    }

    /// The backing, for a store.
    pub fn into_backing(self) -> Backing {
        self.backing
    }

    /// The backing.
    pub const fn backing(&self) -> &Backing {
        &self.backing
    }

    /// Reads metadata from `offset_bytes` of the metadata area.
    pub fn read_meta(&mut self, offset_bytes: u64, into: &mut [u8]) -> Result<(), StoreError> {
        self.read(Area::Meta, offset_bytes, into)
    }

    /// Writes metadata, stable when it returns.
    pub fn write_meta(&mut self, offset_bytes: u64, bytes: &[u8]) -> Result<(), StoreError> {
        self.write(Area::Meta, offset_bytes, bytes, ReadWriteFlags::DSYNC)
    }

    /// Reads the volume's data from `offset_bytes`.
    pub fn read_data(&mut self, offset_bytes: u64, into: &mut [u8]) -> Result<(), StoreError> {
        self.read(Area::Data, offset_bytes, into)
    }

    /// Writes the volume's data; stable after [`flush`](Self::flush).
    pub fn write_data(&mut self, offset_bytes: u64, bytes: &[u8]) -> Result<(), StoreError> {
        self.write(Area::Data, offset_bytes, bytes, ReadWriteFlags::empty())
    }

    /// Reads the data backing from its first byte on, whatever the placement.
    pub fn read_raw(&mut self, offset_bytes: u64, into: &mut [u8]) -> Result<(), StoreError> {
        self.read(Area::Raw, offset_bytes, into)
    }

    /// The next range of the volume's data at or after `offset_bytes` that may hold something else than zeroes: holes of a file are
    /// skipped; a device, or a file system that cannot say, gives everything. `None` when there is none.
    pub fn next_data(&self, offset_bytes: u64) -> Result<Option<ByteRange>, StoreError> {
        let end = self.placement.data_bytes;
        if offset_bytes >= end {
            return Ok(None);
        }
        let all = ByteRange::new(offset_bytes, end - offset_bytes);
        let part = self.backing.data();
        if part.geometry.is_device {
            return Ok(Some(all));
        }
        let base = self.placement.data_offset_bytes;
        let from = match rustix::fs::seek(part.fd(), rustix::fs::SeekFrom::Data(base + offset_bytes)) {
            Ok(from) => from.saturating_sub(base),
            // Of a file that was cut since it was opened the rest is no hole: reading it says so.
            Err(Errno::NXIO) if self.backing.current_bytes()? >= base + end => return Ok(None),
            Err(_) => return Ok(Some(all)),
        };
        if from >= end {
            return Ok(None);
        }
        let to = match rustix::fs::seek(part.fd(), rustix::fs::SeekFrom::Hole(base + from)) {
            Ok(to) => to.saturating_sub(base).min(end),
            Err(_) => end,
        };
        // Holes begin and end at file-system blocks, which may be smaller than our sector.
        let sector = u64::from(part.geometry.sector_bytes);
        let start = (from / sector * sector).max(offset_bytes);
        let stop = to.next_multiple_of(sector).min(end);
        Ok(Some(ByteRange::new(start, stop - start)))
    }

    /// Makes everything written stable.
    pub fn flush(&mut self) -> Result<(), StoreError> {
        for part in [self.backing.data(), self.backing.metadata()] {
            rustix::fs::fdatasync(part.fd())
                .map_err(|errno| StoreError::io(&part.path, "fdatasync", errno))?;
        }
        Ok(())
    }

    fn part(&self, area: Area) -> &Part {
        match area {
            Area::Data | Area::Raw => self.backing.data(),
            Area::Meta => self.backing.metadata(),
        }
    }

    fn read(&mut self, area: Area, offset_bytes: u64, into: &mut [u8]) -> Result<(), StoreError> {
        let mut done = 0;
        while done < into.len() {
            let (at, length) = self.piece(area, offset_bytes, done, into.len())?;
            let bounce = self.bounce;
            let part = match area {
                Area::Data | Area::Raw => self.backing.data(),
                Area::Meta => self.backing.metadata(),
            };
            let buffer = &mut self.arena.bytes_mut(bounce)[..length];
            let count = match rustix::io::pread(part.fd(), &mut *buffer, at) {
                Ok(0) => return Err(StoreError::io(&part.path, "read past the end", Errno::IO)),
                Ok(count) => count,
                Err(Errno::INTR) => 0,
                Err(errno) => return Err(StoreError::io(&part.path, "read", errno)),
            };
            into[done..done + count].copy_from_slice(&buffer[..count]);
            done += count;
        }
        Ok(())
    }

    fn write(
        &mut self,
        area: Area,
        offset_bytes: u64,
        bytes: &[u8],
        flags: ReadWriteFlags,
    ) -> Result<(), StoreError> {
        let mut done = 0;
        while done < bytes.len() {
            let (at, length) = self.piece(area, offset_bytes, done, bytes.len())?;
            self.arena.bytes_mut(self.bounce)[..length].copy_from_slice(&bytes[done..done + length]);
            let part = self.part(area);
            let slice = IoSlice::new(&self.arena.bytes(self.bounce)[..length]);
            done += match rustix::io::pwritev2(part.fd(), &[slice], at, flags) {
                Ok(0) => return Err(StoreError::io(&part.path, "write", Errno::NOSPC)),
                Ok(count) => count,
                Err(Errno::INTR) => 0,
                Err(errno) => return Err(StoreError::io(&part.path, "write", errno)),
            };
        }
        Ok(())
    }

    /// Where the next piece lies on its file, and its length.
    fn piece(
        &self,
        area: Area,
        offset_bytes: u64,
        done: usize,
        total: usize,
    ) -> Result<(u64, usize), StoreError> {
        let part = self.part(area);
        let out_of_range =
            || StoreError::Range { path: part.path.clone(), offset_bytes, length_bytes: total as u64 };
        let sector = u64::from(part.geometry.sector_bytes);
        let offset = offset_bytes.checked_add(done as u64).ok_or_else(out_of_range)?;
        let left = (total - done).min(BUFFER_MAX_BYTES) as u64;
        if !offset.is_multiple_of(sector) || !left.is_multiple_of(sector) {
            return Err(out_of_range());
        }
        let (at, length) = match area {
            Area::Data => (self.placement.data_piece(offset, left).ok_or_else(out_of_range)?, left),
            Area::Meta => self.placement.meta_piece(offset, left).ok_or_else(out_of_range)?,
            Area::Raw => {
                let end = offset.checked_add(left).ok_or_else(out_of_range)?;
                if end > part.geometry.backing_bytes {
                    return Err(out_of_range());
                }
                (offset, left)
            }
        };
        Ok((at, length as usize))
    }
}
