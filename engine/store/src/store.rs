//! The store of a volume thread: disk operations in, ring entries and outcomes out.

use std::collections::VecDeque;

use duplex_core::ids::{BufferId, ByteRange, DiskOpId};
use duplex_core::request::{DiskOp, DiskOpKind, DiskOutcome};
use duplex_ring::{Arena, Completion, Errno, Owner, Ring, Token};
use io_uring::types::{Fd, FsyncFlags};
use io_uring::{opcode, squeue};

use crate::backing::{Access, Backing};
use crate::error::StoreError;
use crate::geometry::Geometry;
use crate::holes::Holes;
use crate::placement::Placement;
use crate::slot::{Slot, Step, Work, ZeroWay};

/// Operations in the kernel's hands at once; more wait in order.
pub const OPERATIONS_MAX: usize = 2048;
/// Longest metadata read or write.
pub const META_MAX_BYTES: usize = 64 << 10;

/// Room for metadata in flight: 64 operations of the longest kind.
const META_POOL_BYTES: usize = 4 << 20;
/// The shared zeroes, also the longest piece that is zeroed by writing.
const ZEROES_BYTES: usize = 1 << 20;
/// Longest piece that one fallocate zeroes: a slow device must answer within the stall time.
const ZERO_PIECE_BYTES: u64 = 64 << 20;
/// Interruptions (EINTR, EAGAIN) in a row without progress after which an operation fails.
const INTERRUPTIONS_MAX: u8 = 16;
const META_ALIGN_BYTES: u64 = 4096;

/// A finished operation.
pub type StoreEvent = (DiskOpId, DiskOutcome);

/// Why the store takes no more operations: the first write or flush that failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("a {operation} failed with errno {errno}")]
pub struct Failure {
    /// Which kind of operation.
    pub operation: &'static str,
    /// As the kernel gave it.
    pub errno: i32,
}

/// What comes after a completion or a start.
enum Next {
    /// Entries are in the kernel's hands.
    Wait,
    /// Over.
    Finish(DiskOutcome),
}

/// The asynchronous side of a claimed backing. Operations run in any order; who needs an order waits for the completion.
/// A failed write or flush latches: everything after it fails at once with the same errno, and nothing is retried.
#[derive(Debug)]
pub struct Store {
    owner: Owner,
    backing: Backing,
    placement: Placement,
    slots: Vec<Option<Slot>>,
    free: Vec<u32>,
    /// Operations for which there was no slot or no metadata buffer.
    waiting: VecDeque<DiskOp>,
    /// The metadata buffers and the zeroes.
    pool: Arena,
    /// A slot of the pool that is never written: it costs no memory.
    zeroes: BufferId,
    punch_refused: bool,
    range_refused: bool,
    holes: Holes,
    failure: Option<Failure>,
    closed: bool,
}

impl Store {
    /// A store on a backing opened with [`Access::Exclusive`].
    pub fn new(owner: Owner, backing: Backing, placement: Placement) -> Result<Self, StoreError> {
        if backing.access() != Access::Exclusive {
            return Err(StoreError::ReadOnly { path: backing.path().to_owned() });
        }
        placement
            .check(&backing.geometry(), backing.has_external_metadata())
            .map_err(|error| StoreError::Placement { path: backing.path().to_owned(), error })?;
        let no_memory = || StoreError::io(backing.path(), "mapping metadata buffers", Errno::NOMEM);
        let mut pool = Arena::new(META_POOL_BYTES + ZEROES_BYTES).map_err(|_| no_memory())?;
        let zeroes = pool.alloc(ZEROES_BYTES).ok_or_else(no_memory)?;
        let holes = Holes::new(backing.geometry().is_device);
        Ok(Self {
            owner,
            backing,
            placement,
            slots: vec![None; OPERATIONS_MAX],
            free: (0..OPERATIONS_MAX as u32).rev().collect(),
            waiting: VecDeque::new(),
            pool,
            zeroes,
            punch_refused: false,
            range_refused: false,
            holes,
            failure: None,
            closed: false,
        })
    }

    /// Sizes of the data backing.
    pub const fn geometry(&self) -> Geometry {
        self.backing.geometry()
    }

    /// Where the areas lie.
    pub const fn placement(&self) -> Placement {
        self.placement
    }

    /// The backing, for its path and current size.
    pub const fn backing(&self) -> &Backing {
        &self.backing
    }

    /// The write or flush that failed, when one did.
    pub const fn failed(&self) -> Option<Failure> {
        self.failure
    }

    /// Starts an operation, or lets it wait for room. What fails at once goes to `out`. The store holds a reference of
    /// its own to a data buffer until the operation's end.
    pub fn submit(&mut self, op: DiskOp, ring: &mut Ring, arena: &mut Arena, out: &mut Vec<StoreEvent>) {
        if let Some(op) = self.try_start(op, ring, arena, out) {
            self.waiting.push_back(op);
        }
    }

    /// Takes a completion of this owner; at most a few events come of it.
    pub fn on_completion(
        &mut self,
        completion: Completion,
        ring: &mut Ring,
        arena: &mut Arena,
        out: &mut Vec<StoreEvent>,
    ) {
        let index = completion.token.index;
        let Some(mut slot) = self.slots.get(index as usize).copied().flatten() else {
            debug_assert!(false, "completion of an operation that is not in flight: {completion:?}");
            return;
        };
        slot.pending -= 1;
        self.account(&mut slot, completion.outcome());
        let next = if slot.pending > 0 { Next::Wait } else { self.go_on(&mut slot, index, ring, arena) };
        match next {
            Next::Wait => self.slots[index as usize] = Some(slot),
            Next::Finish(outcome) => {
                self.finish(&slot, index, arena);
                out.push((slot.id, outcome));
                self.start_waiting(ring, arena, out);
            }
        }
    }

    /// Takes no more operations; those that wait fail with `ESHUTDOWN`, those in flight run to their end.
    pub fn close(&mut self, out: &mut Vec<StoreEvent>) {
        self.closed = true;
        for op in self.waiting.drain(..) {
            out.push((op.id, failed(Errno::SHUTDOWN)));
        }
    }

    /// True when the kernel has nothing of this store: it may be dropped, and its claim ends at once.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.in_flight() == 0
    }

    /// Operations in the kernel's hands.
    pub fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Gives the backing back, to be used synchronously. `Err` returns the store while operations are in flight.
    pub fn into_backing(self) -> Result<Backing, Box<Self>> {
        if self.is_idle() { Ok(self.backing) } else { Err(Box::new(self)) }
    }

    fn start_waiting(&mut self, ring: &mut Ring, arena: &mut Arena, out: &mut Vec<StoreEvent>) {
        while let Some(op) = self.waiting.pop_front() {
            if let Some(op) = self.try_start(op, ring, arena, out) {
                self.waiting.push_front(op);
                return;
            }
        }
    }

    /// Starts the operation, or gives it back when there is no room.
    fn try_start(
        &mut self,
        op: DiskOp,
        ring: &mut Ring,
        arena: &mut Arena,
        out: &mut Vec<StoreEvent>,
    ) -> Option<DiskOp> {
        if let Err(outcome) = self.admit(&op.kind, arena) {
            out.push((op.id, outcome));
            return None;
        }
        if let DiskOpKind::SeekData { range } = &op.kind {
            let at = self.placement.data_offset_bytes + range.offset_bytes;
            out.push((op.id, DiskOutcome::Zeroes { length_bytes: self.zeroes(at, range.length_bytes) }));
            return None;
        }
        let Some(&index) = self.free.last() else { return Some(op) };
        let Some(mut slot) = self.make_slot(&op) else { return Some(op) };
        self.free.pop();
        if let Work::Data { buffer, .. } = slot.work {
            arena.retain(buffer);
        }
        match self.go_on(&mut slot, index, ring, arena) {
            Next::Wait => self.slots[index as usize] = Some(slot),
            Next::Finish(outcome) => {
                self.finish(&slot, index, arena);
                out.push((slot.id, outcome));
            }
        }
        None
    }

    /// Refuses what the latch, the closing or the areas forbid.
    fn admit(&self, kind: &DiskOpKind, arena: &Arena) -> Result<(), DiskOutcome> {
        if self.closed {
            return Err(failed(Errno::SHUTDOWN));
        }
        if let Some(failure) = self.failure {
            return Err(DiskOutcome::Failed { errno: failure.errno });
        }
        let fits = match kind {
            DiskOpKind::Read { range, buffer } | DiskOpKind::Write { range, buffer, .. } => {
                self.data_fits(range) && range.length_bytes <= arena.capacity(*buffer) as u64
            }
            DiskOpKind::Zero { range, .. } | DiskOpKind::SeekData { range } => self.data_fits(range),
            DiskOpKind::Flush => true,
            DiskOpKind::MetaRead { offset_bytes, length_bytes } => {
                self.meta_fits(*offset_bytes, *length_bytes as usize)
            }
            DiskOpKind::MetaWrite { offset_bytes, bytes, .. } => self.meta_fits(*offset_bytes, bytes.len()),
        };
        if fits { Ok(()) } else { Err(failed(Errno::INVAL)) }
    }

    fn data_fits(&self, range: &ByteRange) -> bool {
        let sector = u64::from(self.backing.geometry().sector_bytes);
        range.length_bytes > 0
            && range.offset_bytes.is_multiple_of(sector)
            && range.length_bytes.is_multiple_of(sector)
            && self.placement.data_piece(range.offset_bytes, range.length_bytes).is_some()
    }

    fn meta_fits(&self, offset_bytes: u64, length: usize) -> bool {
        (1..=META_MAX_BYTES).contains(&length)
            && offset_bytes.is_multiple_of(META_ALIGN_BYTES)
            && (length as u64).is_multiple_of(META_ALIGN_BYTES)
            && offset_bytes
                .checked_add(length as u64)
                .is_some_and(|end| self.placement.meta_piece(end, 0).is_some())
    }

    /// How many bytes of the data backing from `at` on are known to be a hole: whole sectors.
    fn zeroes(&mut self, at: u64, length: u64) -> u64 {
        let writing = self.slots.iter().flatten().filter_map(|slot| match slot.work {
            Work::Data { write: true, .. } => {
                Some((slot.offset_bytes, slot.offset_bytes + slot.length_bytes))
            }
            Work::Data { write: false, .. } | Work::Meta { .. } | Work::Zero { .. } | Work::Flush => None,
        });
        let geometry = self.backing.geometry();
        let fd = self.backing.data().fd();
        let bytes = self.holes.zeroes(fd, (at, length), geometry.backing_bytes, writing);
        bytes / u64::from(geometry.sector_bytes) * u64::from(geometry.sector_bytes)
    }

    /// The slot of an admitted operation; `None` when there is no metadata buffer.
    fn make_slot(&mut self, op: &DiskOp) -> Option<Slot> {
        let data_offset_bytes = self.placement.data_offset_bytes;
        let at = |range: &ByteRange| data_offset_bytes + range.offset_bytes;
        Some(match &op.kind {
            DiskOpKind::Read { range, buffer } => {
                let work = Work::Data { write: false, fua: false, buffer: *buffer };
                Slot::new(op.id, work, at(range), range.length_bytes)
            }
            DiskOpKind::Write { range, buffer, fua } => {
                self.holes.written(at(range), range.length_bytes);
                let work = Work::Data { write: true, fua: *fua, buffer: *buffer };
                Slot::new(op.id, work, at(range), range.length_bytes)
            }
            DiskOpKind::Zero { range, may_unmap, fua } => {
                let work = Work::Zero { may_unmap: *may_unmap, fua: *fua };
                let mut slot = Slot::new(op.id, work, at(range), range.length_bytes);
                if *may_unmap {
                    // What is a hole already stays one.
                    slot.done_bytes = self.zeroes(slot.offset_bytes, slot.length_bytes);
                }
                slot
            }
            DiskOpKind::SeekData { .. } => return None,
            DiskOpKind::Flush => Slot::new(op.id, Work::Flush, 0, 0),
            DiskOpKind::MetaRead { offset_bytes, length_bytes } => {
                let buffer = self.pool.alloc(*length_bytes as usize)?;
                let work = Work::Meta { write: false, buffer };
                Slot::new(op.id, work, *offset_bytes, u64::from(*length_bytes))
            }
            DiskOpKind::MetaWrite { offset_bytes, bytes, preflush } => {
                let buffer = self.pool.alloc(bytes.len())?;
                self.pool.bytes_mut(buffer)[..bytes.len()].copy_from_slice(bytes);
                let work = Work::Meta { write: true, buffer };
                let mut slot = Slot::new(op.id, work, *offset_bytes, bytes.len() as u64);
                slot.preflush = *preflush;
                slot
            }
        })
    }

    /// Frees the slot and what it holds.
    fn finish(&mut self, slot: &Slot, index: u32, arena: &mut Arena) {
        match slot.work {
            Work::Data { buffer, .. } => arena.release(buffer),
            Work::Meta { buffer, .. } => self.pool.release(buffer),
            Work::Zero { .. } | Work::Flush => {}
        }
        self.slots[index as usize] = None;
        self.free.push(index);
    }

    /// Books one result into the slot: progress, an error, or a way of zeroing that is not there.
    fn account(&mut self, slot: &mut Slot, outcome: Result<u32, Errno>) {
        let errno = match (slot.step, outcome) {
            (Step::Begin, _) | (Step::Preflush | Step::Sync, Ok(_)) => return,
            (Step::Transfer | Step::Zero { way: ZeroWay::Write, .. }, Ok(count)) => {
                match self.whole_sectors(slot, count) {
                    Ok(bytes) => {
                        slot.done_bytes += bytes;
                        slot.interruptions = 0;
                        return;
                    }
                    Err(errno) => errno,
                }
            }
            (Step::Zero { piece_bytes, .. }, Ok(_)) => {
                slot.done_bytes += piece_bytes;
                slot.interruptions = 0;
                return;
            }
            (Step::Transfer | Step::Zero { .. }, Err(Errno::INTR | Errno::AGAIN))
                if slot.interruptions < INTERRUPTIONS_MAX =>
            {
                slot.interruptions += 1;
                return;
            }
            (Step::Zero { way: ZeroWay::Punch, .. }, Err(Errno::OPNOTSUPP | Errno::NOSYS)) => {
                self.punch_refused = true;
                return;
            }
            (Step::Zero { way: ZeroWay::Range, .. }, Err(Errno::OPNOTSUPP | Errno::NOSYS)) => {
                self.range_refused = true;
                return;
            }
            (Step::Preflush | Step::Transfer | Step::Zero { .. } | Step::Sync, Err(errno)) => errno,
        };
        if slot.errno == 0 {
            slot.errno = errno.raw_os_error();
        }
        if slot.work.changes_disk() && self.failure.is_none() {
            self.failure = Some(Failure { operation: slot.work.name(), errno: slot.errno });
        }
    }

    /// The progress that a short transfer counts as: whole sectors. None at all is the end of the backing.
    fn whole_sectors(&self, slot: &Slot, count: u32) -> Result<u64, Errno> {
        let moved = u64::from(count).min(slot.left_bytes());
        let sector = u64::from(self.backing.geometry().sector_bytes);
        let whole = if moved == slot.left_bytes() { moved } else { moved / sector * sector };
        match (whole, slot.work.changes_disk()) {
            (0, true) => Err(Errno::NOSPC),
            (0, false) => Err(Errno::IO),
            (bytes, _) => Ok(bytes),
        }
    }

    /// Pushes the slot's next entries, or finds that it is over. Nothing of it is in the kernel's hands.
    fn go_on(&mut self, slot: &mut Slot, index: u32, ring: &mut Ring, arena: &Arena) -> Next {
        if slot.errno != 0 {
            return Next::Finish(DiskOutcome::Failed { errno: slot.errno });
        }
        if slot.is_complete() {
            return Next::Finish(self.success(slot));
        }
        if let Some(failure) = self.failure {
            return Next::Finish(DiskOutcome::Failed { errno: failure.errno });
        }
        match slot.work {
            Work::Flush => self.push_sync(slot, index, ring, Step::Sync),
            Work::Data { write, fua, buffer } => {
                let at = slot.offset_bytes + slot.done_bytes;
                let piece = Piece { fd: self.backing.data().raw_fd(), at, length: slot.left_bytes() };
                let pointer = arena.ptr(buffer).wrapping_add(slot.done_bytes as usize);
                slot.step = Step::Transfer;
                self.push(slot, index, ring, piece.transfer(write, fua, pointer));
            }
            Work::Meta { .. } if slot.preflush => {
                slot.preflush = false;
                self.push_sync(slot, index, ring, Step::Preflush);
            }
            Work::Meta { write, buffer } => {
                let offset = slot.offset_bytes + slot.done_bytes;
                let Some((at, length)) = self.placement.meta_piece(offset, slot.left_bytes()) else {
                    return Next::Finish(failed(Errno::INVAL));
                };
                let piece = Piece { fd: self.backing.metadata().raw_fd(), at, length };
                let pointer = self.pool.ptr(buffer).wrapping_add(slot.done_bytes as usize);
                slot.step = Step::Transfer;
                self.push(slot, index, ring, piece.transfer(write, write, pointer));
            }
            Work::Zero { may_unmap, .. } if slot.left_bytes() > 0 => {
                self.push_zero(slot, index, ring, may_unmap)
            }
            Work::Zero { .. } => self.push_sync(slot, index, ring, Step::Sync),
        }
        Next::Wait
    }

    /// The outcome of a slot that did all it had to.
    fn success(&self, slot: &Slot) -> DiskOutcome {
        match slot.work {
            Work::Meta { write: false, buffer } => {
                DiskOutcome::Bytes(self.pool.bytes(buffer)[..slot.length_bytes as usize].to_vec())
            }
            Work::Meta { write: true, .. } | Work::Data { .. } | Work::Zero { .. } | Work::Flush => {
                DiskOutcome::Done
            }
        }
    }

    fn push_zero(&self, slot: &mut Slot, index: u32, ring: &mut Ring, may_unmap: bool) {
        let way = if may_unmap && !self.punch_refused {
            ZeroWay::Punch
        } else if !self.range_refused {
            ZeroWay::Range
        } else {
            ZeroWay::Write
        };
        let limit = if way == ZeroWay::Write { ZEROES_BYTES as u64 } else { ZERO_PIECE_BYTES };
        let piece_bytes = slot.left_bytes().min(limit);
        let at = slot.offset_bytes + slot.done_bytes;
        let piece = Piece { fd: self.backing.data().raw_fd(), at, length: piece_bytes };
        slot.step = Step::Zero { way, piece_bytes };
        let entry = match way {
            ZeroWay::Punch => piece.fallocate(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE),
            ZeroWay::Range => piece.fallocate(libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE),
            ZeroWay::Write => piece.transfer(true, false, self.pool.ptr(self.zeroes)),
        };
        self.push(slot, index, ring, entry);
    }

    fn push_sync(&self, slot: &mut Slot, index: u32, ring: &mut Ring, step: Step) {
        slot.step = step;
        let data = self.backing.data().raw_fd();
        let metadata = self.backing.has_external_metadata().then(|| self.backing.metadata().raw_fd());
        for fd in [Some(data), metadata].into_iter().flatten() {
            self.push(slot, index, ring, opcode::Fsync::new(Fd(fd)).flags(FsyncFlags::DATASYNC).build());
        }
    }

    fn push(&self, slot: &mut Slot, index: u32, ring: &mut Ring, entry: squeue::Entry) {
        slot.pending += 1;
        // SAFETY: data buffers are held by a reference of the slot, metadata buffers and zeroes by the pool; both live
        // until the last completion. The descriptors live as long as the store, which is not dropped before it is idle.
        unsafe { ring.push(entry, Token::new(self.owner, 0, index)) };
    }
}

const fn failed(errno: Errno) -> DiskOutcome {
    DiskOutcome::Failed { errno: errno.raw_os_error() }
}

/// A contiguous piece of a file.
struct Piece {
    fd: i32,
    at: u64,
    /// At most what a buffer holds, except for `fallocate`.
    length: u64,
}

impl Piece {
    fn transfer(&self, write: bool, stable: bool, pointer: *mut u8) -> squeue::Entry {
        let length = self.length as u32;
        let flags = if stable { libc::RWF_DSYNC } else { 0 };
        if write {
            opcode::Write::new(Fd(self.fd), pointer, length).offset(self.at).rw_flags(flags).build()
        } else {
            opcode::Read::new(Fd(self.fd), pointer, length).offset(self.at).build()
        }
    }

    fn fallocate(&self, mode: i32) -> squeue::Entry {
        opcode::Fallocate::new(Fd(self.fd), self.length).offset(self.at).mode(mode).build()
    }
}
