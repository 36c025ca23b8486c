//! The table of requests in flight: one entry per kernel request, with the memory the kernel reads and writes.

use std::mem::ManuallyDrop;

use duplex_core::ids::{BufferId, ByteRange};

use super::protocol::{HEADER_BYTES, Reply};

/// Memory that operations of the ring point to. Boxed as a slice: it never moves.
pub(super) struct EntryIo {
    /// First bytes of the request.
    pub(super) header: [u8; HEADER_BYTES],
    /// The answer.
    pub(super) reply: Reply,
    /// For the read, later for the answer.
    pub(super) vectors: [libc::iovec; 2],
}

/// A request the volume has to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Pending {
    /// The kernel's number for it.
    pub(super) unique: u64,
    /// What is to be done.
    pub(super) work: Work,
}

/// What the volume has to do for one request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Work {
    /// Fill the entry's buffer.
    Read(ByteRange),
    /// Write the entry's buffer.
    Write(ByteRange),
    /// Make everything stable.
    Flush,
    /// Make the range zeroes. Done piece by piece: `rest` is what is not yet asked for.
    Zero { rest: ByteRange, may_unmap: bool },
}

/// Where an entry is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum EntryState {
    /// Not used.
    Free,
    /// A read from the device is in flight (or about to be pushed) into it.
    Reading,
    /// It waits until the volume serves.
    Held(Pending),
    /// The volume has it.
    Asked(Pending),
    /// Its answer waits for the next flush, or is in flight.
    Answering {
        /// Bytes of the buffer that follow the header.
        data_bytes: u32,
    },
}

/// What belongs to one entry besides the kernel's memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry {
    /// Where it is.
    pub(super) state: EntryState,
    /// Counts its requests, so that a late completion of an earlier one is recognised.
    pub(super) serial: u32,
    /// Payload of a write, target of a read, or what the device is being read into.
    pub(super) buffer: Option<BufferId>,
}

/// All entries of a device.
pub(super) struct Entries {
    entries: Box<[Entry]>,
    io: ManuallyDrop<Box<[EntryIo]>>,
    free: Vec<u16>,
    /// Operations whose memory belongs to the kernel.
    in_flight: usize,
}

impl Entries {
    pub(super) fn new(count: u16) -> Self {
        let no_vector = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
        let io = (0..count)
            .map(|_| EntryIo { header: [0; HEADER_BYTES], reply: Reply::EMPTY, vectors: [no_vector; 2] })
            .collect();
        Self {
            entries: vec![Entry { state: EntryState::Free, serial: 0, buffer: None }; usize::from(count)]
                .into(),
            io: ManuallyDrop::new(io),
            free: (0..count).rev().collect(),
            in_flight: 0,
        }
    }

    /// A free entry, now `Reading`.
    pub(super) fn take(&mut self) -> Option<u16> {
        let index = self.free.pop()?;
        let entry = self.entry_mut(index);
        entry.state = EntryState::Reading;
        entry.serial = entry.serial.wrapping_add(1);
        Some(index)
    }

    /// The entry is free again. Its buffer must have been taken out.
    pub(super) fn give_back(&mut self, index: u16) {
        let entry = self.entry_mut(index);
        debug_assert!(entry.buffer.is_none(), "entry {index} still has a buffer");
        debug_assert!(entry.state != EntryState::Free, "entry {index} is already free");
        entry.state = EntryState::Free;
        self.free.push(index);
    }

    pub(super) fn get(&self, index: u16) -> Option<&Entry> {
        self.entries.get(usize::from(index))
    }

    pub(super) fn entry_mut(&mut self, index: u16) -> &mut Entry {
        &mut self.entries[usize::from(index)]
    }

    pub(super) fn io(&self, index: u16) -> &EntryIo {
        &self.io[usize::from(index)]
    }

    /// The entry's kernel memory. Not while an operation on this entry is in flight.
    pub(super) fn io_mut(&mut self, index: u16) -> &mut EntryIo {
        &mut self.io[usize::from(index)]
    }

    pub(super) fn indices(&self) -> impl Iterator<Item = u16> + use<> {
        0..self.entries.len() as u16
    }

    pub(super) fn pushed(&mut self) {
        self.in_flight += 1;
    }

    pub(super) fn reaped(&mut self) {
        debug_assert!(self.in_flight > 0, "more completions than operations");
        self.in_flight = self.in_flight.saturating_sub(1);
    }

    pub(super) const fn in_flight(&self) -> usize {
        self.in_flight
    }
}

impl Drop for Entries {
    fn drop(&mut self) {
        if self.in_flight == 0 {
            // SAFETY: dropped once, here, and no operation of the kernel points into it any more.
            unsafe { ManuallyDrop::drop(&mut self.io) };
        } else {
            // The kernel may still write there: the memory is given up rather than used after it is freed.
            tracing::error!(
                operations = self.in_flight,
                "FUSE device dropped with operations in flight; close it and reap them first"
            );
        }
    }
}
