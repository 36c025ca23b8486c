//! Where the data area and the metadata area lie on a backing.

use crate::geometry::Geometry;

/// Where the areas lie. The core speaks of one contiguous metadata area: its first `meta_head_bytes` are the first bytes of the
/// metadata backing, the rest begins at `meta_tail_offset_bytes`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Placement {
    /// First byte of the volume's data on the data backing: 1 MiB with internal metadata, 0 with external.
    pub data_offset_bytes: u64,
    /// Size of the volume's data.
    pub data_bytes: u64,
    /// Bytes of the metadata area before the jump; `u64::MAX` when there is none (external metadata).
    pub meta_head_bytes: u64,
    /// Where the metadata area goes on after its head.
    pub meta_tail_offset_bytes: u64,
}

/// Areas that do not fit.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PlacementError {
    /// The data area is larger than its room.
    #[error(
        "the data area {offset_bytes}+{length_bytes} ends beyond the backing's {backing_bytes} bytes; make the backing larger"
    )]
    DataPastEnd {
        /// First byte.
        offset_bytes: u64,
        /// Size.
        length_bytes: u64,
        /// What there is.
        backing_bytes: u64,
    },
    /// Metadata and data share bytes.
    #[error(
        "the metadata area (head {meta_head_bytes} bytes, rest at {meta_tail_offset_bytes}) overlaps the data area {data_offset_bytes}+{data_bytes}"
    )]
    Overlap {
        /// First data byte.
        data_offset_bytes: u64,
        /// Data size.
        data_bytes: u64,
        /// Size of the head.
        meta_head_bytes: u64,
        /// Start of the rest.
        meta_tail_offset_bytes: u64,
    },
    /// An offset is not a multiple of 4096.
    #[error("offset {offset_bytes} of an area is not a multiple of 4096")]
    Unaligned {
        /// The offset.
        offset_bytes: u64,
    },
}

impl Placement {
    /// Metadata in a file of its own: data from byte 0, metadata contiguous.
    pub const fn external(data_bytes: u64) -> Self {
        Self { data_offset_bytes: 0, data_bytes, meta_head_bytes: u64::MAX, meta_tail_offset_bytes: 0 }
    }

    /// Metadata on the same backing: `meta_head_bytes` before the data, the rest at `meta_tail_offset_bytes`.
    pub const fn internal(data_offset_bytes: u64, data_bytes: u64, meta_tail_offset_bytes: u64) -> Self {
        Self { data_offset_bytes, data_bytes, meta_head_bytes: data_offset_bytes, meta_tail_offset_bytes }
    }

    pub(crate) fn check(&self, data: &Geometry, external_metadata: bool) -> Result<(), PlacementError> {
        let data_end = self.data_offset_bytes.checked_add(self.data_bytes);
        if data_end.is_none_or(|end| end > data.backing_bytes) {
            return Err(PlacementError::DataPastEnd {
                offset_bytes: self.data_offset_bytes,
                length_bytes: self.data_bytes,
                backing_bytes: data.backing_bytes,
            });
        }
        for offset_bytes in [self.data_offset_bytes, self.meta_tail_offset_bytes] {
            if !offset_bytes.is_multiple_of(4096) {
                return Err(PlacementError::Unaligned { offset_bytes });
            }
        }
        let tail_overlaps = data_end.is_some_and(|end| self.meta_tail_offset_bytes < end);
        if !external_metadata && (self.meta_head_bytes > self.data_offset_bytes || tail_overlaps) {
            return Err(PlacementError::Overlap {
                data_offset_bytes: self.data_offset_bytes,
                data_bytes: self.data_bytes,
                meta_head_bytes: self.meta_head_bytes,
                meta_tail_offset_bytes: self.meta_tail_offset_bytes,
            });
        }
        Ok(())
    }

    /// Where byte `offset_bytes` of the metadata area lies on the metadata backing, and how many of `length_bytes` follow
    /// it without a jump. `None` when the offset is beyond what a file offset can say.
    pub(crate) fn meta_piece(&self, offset_bytes: u64, length_bytes: u64) -> Option<(u64, u64)> {
        let (at, room) = if offset_bytes < self.meta_head_bytes {
            (offset_bytes, self.meta_head_bytes - offset_bytes)
        } else {
            (self.meta_tail_offset_bytes.checked_add(offset_bytes - self.meta_head_bytes)?, u64::MAX)
        };
        let length = length_bytes.min(room);
        (at.checked_add(length)? <= i64::MAX as u64).then_some((at, length))
    }

    /// Where a range of the volume lies on the data backing; `None` when it is not inside the data area.
    pub(crate) fn data_piece(&self, offset_bytes: u64, length_bytes: u64) -> Option<u64> {
        let end = offset_bytes.checked_add(length_bytes)?;
        (end <= self.data_bytes).then_some(self.data_offset_bytes + offset_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn geometry(backing_bytes: u64) -> Geometry {
        Geometry { backing_bytes, sector_bytes: 512, physical_bytes: 4096, is_device: true }
    }

    #[test]
    fn metadata_jumps_over_the_data_area() {
        let placement = Placement::internal(MIB, 8 * MIB, 9 * MIB);
        assert_eq!(placement.meta_piece(0, 4096), Some((0, 4096)));
        assert_eq!(placement.meta_piece(MIB - 4096, 8192), Some((MIB - 4096, 4096)));
        assert_eq!(placement.meta_piece(MIB, 8192), Some((9 * MIB, 8192)));
        assert_eq!(placement.meta_piece(MIB + 4096, 1), Some((9 * MIB + 4096, 1)));
        assert_eq!(placement.meta_piece(u64::MAX - 4, 8), None);
        assert_eq!(Placement::external(MIB).meta_piece(5 * MIB, 4096), Some((5 * MIB, 4096)));
    }

    #[test]
    fn data_stays_inside_its_area() {
        let placement = Placement::internal(MIB, 8 * MIB, 9 * MIB);
        assert_eq!(placement.data_piece(8 * MIB - 512, 512), Some(9 * MIB - 512));
        assert_eq!(placement.data_piece(8 * MIB - 512, 1024), None);
        assert_eq!(placement.data_piece(u64::MAX, 2), None);
    }

    #[test]
    fn areas_that_overlap_or_do_not_fit_are_refused() {
        let fits = Placement::internal(MIB, 8 * MIB, 9 * MIB);
        assert_eq!(fits.check(&geometry(10 * MIB), false), Ok(()));
        assert!(matches!(fits.check(&geometry(8 * MIB), false), Err(PlacementError::DataPastEnd { .. })));
        let tail_in_data = Placement::internal(MIB, 8 * MIB, 8 * MIB);
        assert!(matches!(
            tail_in_data.check(&geometry(10 * MIB), false),
            Err(PlacementError::Overlap { .. })
        ));
        let odd = Placement::internal(MIB, 8 * MIB, 9 * MIB + 512);
        assert!(matches!(odd.check(&geometry(10 * MIB), false), Err(PlacementError::Unaligned { .. })));
        assert_eq!(Placement::external(8 * MIB).check(&geometry(8 * MIB), true), Ok(()));
    }
}
