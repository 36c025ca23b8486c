//! The requests in flight: one table for all connections, made once.

use duplex_core::ids::{BufferId, ByteRange};
use duplex_core::request::RequestOp;

/// Where a request is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Stage {
    /// The slot is not used.
    Free,
    /// A write's payload is still coming in.
    Receiving {
        /// Payload bytes that are here.
        filled_bytes: usize,
    },
    /// The loop has it.
    Issued,
    /// A read's data is being sent.
    Sending,
}

/// What a request is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    /// A read.
    Read,
    /// A write.
    Write {
        /// Answer when stable.
        fua: bool,
    },
    /// A flush.
    Flush,
    /// Zeroing; `range` is the piece in work.
    Zero {
        /// Where the last piece ends.
        end_bytes: u64,
        /// Space may be given back.
        may_unmap: bool,
        /// Answer when stable.
        fua: bool,
    },
}

/// A request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Slot {
    pub(super) generation: u32,
    pub(super) stage: Stage,
    /// Index of the client's connection; `None` when it is gone.
    pub(super) connection: Option<u16>,
    pub(super) cookie: u64,
    pub(super) kind: Kind,
    pub(super) range: ByteRange,
    pub(super) buffer: Option<BufferId>,
}

impl Slot {
    /// What the loop is asked for.
    pub(super) fn operation(&self) -> Option<RequestOp> {
        let range = self.range;
        match (self.kind, self.buffer) {
            (Kind::Read, Some(buffer)) => Some(RequestOp::Read { range, buffer }),
            (Kind::Write { fua }, Some(buffer)) => Some(RequestOp::Write { range, buffer, fua }),
            (Kind::Flush, _) => Some(RequestOp::Flush),
            (Kind::Zero { may_unmap, fua, .. }, _) => Some(RequestOp::Zero { range, may_unmap, fua }),
            (Kind::Read | Kind::Write { .. }, None) => None,
        }
    }

    /// Buffer bytes it holds.
    pub(super) fn held_bytes(&self) -> u64 {
        if self.buffer.is_some() { self.range.length_bytes } else { 0 }
    }
}

/// The table.
#[derive(Debug)]
pub(super) struct Slots {
    table: Vec<Slot>,
    free: Vec<u16>,
}

impl Slots {
    /// A table of `count` slots, at most 65,536.
    pub(super) fn new(count: usize) -> Self {
        let count = count.clamp(1, 1 << 16);
        let unused = Slot {
            generation: 0,
            stage: Stage::Free,
            connection: None,
            cookie: 0,
            kind: Kind::Flush,
            range: ByteRange::new(0, 0),
            buffer: None,
        };
        Self { table: vec![unused; count], free: (0..count).rev().map(|slot| slot as u16).collect() }
    }

    pub(super) fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    pub(super) fn in_use(&self) -> usize {
        self.table.len() - self.free.len()
    }

    /// Takes a free slot; the caller has seen that there is one.
    pub(super) fn take(&mut self, slot: Slot) -> Option<u16> {
        let index = self.free.pop()?;
        let place = &mut self.table[usize::from(index)];
        *place = Slot { generation: place.generation.wrapping_add(1), ..slot };
        Some(index)
    }

    pub(super) fn get(&self, index: u16) -> &Slot {
        &self.table[usize::from(index)]
    }

    pub(super) fn get_mut(&mut self, index: u16) -> &mut Slot {
        &mut self.table[usize::from(index)]
    }

    /// The slot, when it is of this generation and the loop has it.
    pub(super) fn issued(&self, index: u16, generation: u32) -> Option<Slot> {
        let slot = *self.table.get(usize::from(index))?;
        (slot.generation == generation && slot.stage == Stage::Issued).then_some(slot)
    }

    /// Frees the slot; returns the buffer it held, to be released.
    pub(super) fn free(&mut self, index: u16) -> Option<BufferId> {
        let slot = &mut self.table[usize::from(index)];
        debug_assert!(slot.stage != Stage::Free, "slot {index} freed twice");
        slot.stage = Stage::Free;
        slot.connection = None;
        self.free.push(index);
        slot.buffer.take()
    }

    /// Indexes of the slots of a connection.
    pub(super) fn of_connection(&self, connection: u16) -> Vec<u16> {
        let of_it = |slot: &Slot| slot.stage != Stage::Free && slot.connection == Some(connection);
        let indexed = self.table.iter().enumerate().filter(|(_, slot)| of_it(slot));
        indexed.map(|(index, _)| index as u16).collect()
    }
}
