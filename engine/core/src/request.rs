//! What a client may ask of a volume, and what the core asks of a disk.

use crate::ids::{BufferId, ByteRange, DiskOpId, RequestId};

/// A client's request, already inside the volume's thread.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Request {
    /// The frontend's name for it; comes back in the completion.
    pub id: RequestId,
    /// What to do.
    pub op: RequestOp,
}

/// The operations of a block device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RequestOp {
    /// Fill `buffer` with the range's content.
    Read {
        /// What to read.
        range: ByteRange,
        /// Where to: at least `range.length_bytes` long.
        buffer: BufferId,
    },
    /// Write `buffer` to the range.
    Write {
        /// Where to.
        range: ByteRange,
        /// The payload.
        buffer: BufferId,
        /// Complete only when stable on every in-sync copy.
        fua: bool,
    },
    /// Every write completed before this is stable on every in-sync copy when it completes.
    Flush,
    /// The range reads as zeroes afterwards.
    Zero {
        /// The range.
        range: ByteRange,
        /// The backing may give the space back (discard, or write-zeroes without NO_HOLE).
        may_unmap: bool,
        /// As for a write.
        fua: bool,
    },
}

impl RequestOp {
    /// The range the operation touches; a flush touches none.
    pub const fn range(&self) -> Option<ByteRange> {
        match *self {
            Self::Read { range, .. } | Self::Write { range, .. } | Self::Zero { range, .. } => Some(range),
            Self::Flush => None,
        }
    }

    /// The buffer it carries.
    pub const fn buffer(&self) -> Option<BufferId> {
        match *self {
            Self::Read { buffer, .. } | Self::Write { buffer, .. } => Some(buffer),
            Self::Flush | Self::Zero { .. } => None,
        }
    }
}

/// Why a request was not done. Frontends turn it into their protocol's error.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum RequestError {
    /// Not a multiple of the sector size, or empty.
    #[error("request is not aligned to the sector size")]
    Unaligned,
    /// Beyond the volume's last byte.
    #[error("request goes past the end of the volume")]
    PastEnd,
    /// The server does not serve this volume (it is secondary, joining or stopping).
    #[error("this server does not serve the volume")]
    NotServing,
    /// No valid copy could do it.
    #[error("input/output error")]
    Io,
    /// More requests in flight than the volume allows.
    #[error("too many requests in flight")]
    TooMany,
}

/// What the core wants done on the local backing.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DiskOp {
    /// Comes back in the completion.
    pub id: DiskOpId,
    /// The operation.
    pub kind: DiskOpKind,
}

/// The operations of a backing. Offsets of data operations count from the volume's first byte,
/// those of metadata operations from the metadata area's first byte: the store adds what its layout needs.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum DiskOpKind {
    /// Read data into the buffer.
    Read {
        /// What.
        range: ByteRange,
        /// Where to.
        buffer: BufferId,
    },
    /// Write the buffer to the data area.
    Write {
        /// Where to.
        range: ByteRange,
        /// The payload.
        buffer: BufferId,
        /// Stable when done (RWF_DSYNC).
        fua: bool,
    },
    /// Make the range of the data area read as zeroes.
    Zero {
        /// The range.
        range: ByteRange,
        /// Space may be given back.
        may_unmap: bool,
        /// Stable when done.
        fua: bool,
    },
    /// How many of the range's first bytes surely read as zeroes: found without reading them, at once. A disk that
    /// cannot tell says none; too few is never wrong, too many always.
    SeekData {
        /// Where to look.
        range: ByteRange,
    },
    /// Make every completed write stable.
    Flush,
    /// Read metadata; the bytes come back in the completion.
    MetaRead {
        /// From the metadata area's start; a multiple of 4096.
        offset_bytes: u64,
        /// A multiple of 4096, at most 64 KiB.
        length_bytes: u32,
    },
    /// Write metadata, stable when done.
    MetaWrite {
        /// From the metadata area's start; a multiple of 4096.
        offset_bytes: u64,
        /// A multiple of 4096 long, at most 64 KiB.
        bytes: Vec<u8>,
        /// Flush the data area (and metadata device) before: everything completed earlier is stable first.
        preflush: bool,
    },
}

/// A finished disk operation's result.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum DiskOutcome {
    /// Done.
    Done,
    /// A metadata read's bytes.
    Bytes(Vec<u8>),
    /// So many first bytes of the range read as zeroes.
    Zeroes {
        /// At most the range's length.
        length_bytes: u64,
    },
    /// It failed with this errno. Never retried by the store.
    Failed {
        /// As the kernel gave it.
        errno: i32,
    },
}
