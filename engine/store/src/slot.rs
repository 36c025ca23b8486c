//! One disk operation in flight.

use duplex_core::ids::{BufferId, DiskOpId};

/// What an operation in flight is. Offsets of `Data` and `Zero` are those of the data backing, those of `Meta` count from
/// the metadata area's start.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Work {
    /// A read or write of the volume's data; the buffer is the volume thread's.
    Data { write: bool, fua: bool, buffer: BufferId },
    /// Zeroing a range of the data.
    Zero { may_unmap: bool, fua: bool },
    /// A flush of everything.
    Flush,
    /// A read or write of metadata; the buffer is the store's own.
    Meta { write: bool, buffer: BufferId },
}

impl Work {
    /// True when its failure latches the copy.
    pub(crate) const fn changes_disk(self) -> bool {
        match self {
            Self::Data { write, .. } | Self::Meta { write, .. } => write,
            Self::Zero { .. } | Self::Flush => true,
        }
    }

    /// For the latch's text.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Data { write: true, .. } => "write",
            Self::Data { write: false, .. } => "read",
            Self::Zero { .. } => "zeroing",
            Self::Flush => "flush",
            Self::Meta { write: true, .. } => "metadata write",
            Self::Meta { write: false, .. } => "metadata read",
        }
    }
}

/// How a range is zeroed, best way first.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum ZeroWay {
    /// `FALLOC_FL_PUNCH_HOLE`: space may go, zeroes are guaranteed.
    Punch,
    /// `FALLOC_FL_ZERO_RANGE`: space stays.
    Range,
    /// Writing zeroes.
    Write,
}

/// What the entries in the kernel's hands are doing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Step {
    /// Nothing pushed yet.
    Begin,
    /// Flushing before a metadata write.
    Preflush,
    /// Moving bytes.
    Transfer,
    /// Zeroing a piece of so many bytes.
    Zero { way: ZeroWay, piece_bytes: u64 },
    /// Flushing: a flush, or the end of a stable zeroing.
    Sync,
}

/// One operation in flight.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slot {
    pub(crate) id: DiskOpId,
    pub(crate) work: Work,
    pub(crate) step: Step,
    /// Flush before the first byte moves.
    pub(crate) preflush: bool,
    pub(crate) offset_bytes: u64,
    pub(crate) length_bytes: u64,
    pub(crate) done_bytes: u64,
    /// Entries in the kernel's hands.
    pub(crate) pending: u8,
    /// Interruptions in a row without progress.
    pub(crate) interruptions: u8,
    /// First error; 0 = none.
    pub(crate) errno: i32,
}

impl Slot {
    pub(crate) const fn new(id: DiskOpId, work: Work, offset_bytes: u64, length_bytes: u64) -> Self {
        Self {
            id,
            work,
            step: Step::Begin,
            preflush: false,
            offset_bytes,
            length_bytes,
            done_bytes: 0,
            pending: 0,
            interruptions: 0,
            errno: 0,
        }
    }

    pub(crate) const fn left_bytes(&self) -> u64 {
        self.length_bytes - self.done_bytes
    }

    /// True when nothing is left to be pushed. Asked between steps, when nothing of it is pending.
    pub(crate) fn is_complete(&self) -> bool {
        match self.work {
            Work::Flush => self.step == Step::Sync,
            Work::Data { .. } | Work::Meta { .. } => self.left_bytes() == 0,
            Work::Zero { fua, .. } => self.left_bytes() == 0 && (!fua || self.step == Step::Sync),
        }
    }
}
