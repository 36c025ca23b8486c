//! Serves the volume's FUSE file on the volume's ring.

use std::collections::{BTreeSet, VecDeque};
use std::os::fd::{AsRawFd, OwnedFd};

use duplex_core::ids::{BufferId, ByteRange, RequestId};
use duplex_core::request::{Request, RequestError, RequestOp};
use duplex_ring::{Arena, Completion, Owner, Ring, Token};
use io_uring::opcode;
use io_uring::types::Fd;

use super::entries::{Entries, EntryState, Pending, Work};
use super::mount::Connection;
use super::protocol::{self, HEADER_BYTES, Operation, PAYLOAD_MAX_BYTES, ParseError, Reply};
use crate::{FrontendEvent, request_generation, request_id, request_owner, request_slot};

/// Kernel requests this side of the device at once: all the kernel gives asynchronously, and some for the rest.
const ENTRIES: u16 = 128;
/// Reads from the device pushed at once.
const READS_MAX: usize = 16;
/// Requests taken in while the volume does not serve yet; the others wait in the kernel.
const HELD_MAX: usize = 16;
/// A write of at most this much is moved to a buffer of its size, so that a 4 KiB write does not hold 1 MiB.
/// Moving 16 KiB costs about a microsecond.
const MOVE_MAX_BYTES: u64 = 16 << 10;
/// A longer zero range is asked for in pieces of this size: the extents it makes active stay few.
const ZERO_PIECE_BYTES: u64 = 32 << 20;

const KIND_READ: u16 = 1;
const KIND_ANSWER: u16 = 2;
const KIND_NOTICE: u16 = 3;

/// What the device is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FuseConfig {
    /// The volume's name, for messages.
    pub volume: String,
    /// The volume's size.
    pub size_bytes: u64,
    /// Its block size, 512 or 4096: told to the kernel as the file's.
    pub sector_bytes: u32,
}

/// What happens to requests for data. Questions about the file itself are always answered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Service {
    /// They go to the volume.
    Serving,
    /// They wait (the daemon begins, or the volume is frozen): a few here, the others in the kernel.
    Held,
    /// They fail with EIO.
    Refusing,
}

/// Why a device ended by itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum FuseEnd {
    /// The loop device let go of the file, or the connection was aborted.
    #[error("the FUSE file system is gone (its loop device was detached, or the connection aborted)")]
    Gone,
    /// A successor cannot have its predecessor's requests.
    #[error(
        "the kernel refused to send pending requests again (errno {errno}; Linux 6.9 is needed): close the descriptor, clients get EIO"
    )]
    CannotResend {
        /// As the kernel gave it.
        errno: i32,
    },
    /// The device cannot be read.
    #[error("reading the FUSE device failed with errno {errno}: detach and attach the volume's device")]
    Failed {
        /// As the kernel gave it.
        errno: i32,
    },
}

/// Counters since the start.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct FuseStats {
    /// Requests for data that came.
    pub requests: u64,
    /// Those of them that an earlier process had already been given.
    pub resent: u64,
    /// Writes whose payload was moved to a smaller buffer.
    pub moved: u64,
    /// Reads of the device that found nothing.
    pub empty_reads: u64,
}

/// One volume's FUSE file, a component of the volume's ring.
///
/// Reading: one read waits for the next request; while requests come faster than turns, more do, so that a busy
/// volume takes many requests per turn.
pub struct FuseDevice {
    owner: Owner,
    config: FuseConfig,
    descriptor: OwnedFd,
    resend: bool,
    service: Service,
    entries: Entries,
    held: VecDeque<u16>,
    answers: Vec<u16>,
    /// Buffers of [`PAYLOAD_MAX_BYTES`] ready to be read into.
    receive_buffers: Vec<BufferId>,
    /// Buffers whose pages are there: a process killed while the kernel copies into a missing page would
    /// answer EIO with its last breath.
    populated: BTreeSet<u32>,
    /// Reads in flight.
    reading: usize,
    /// Reads that shall be in flight.
    reads_wanted: usize,
    /// Requests since the last flush.
    round_messages: usize,
    notice: Box<[u8; protocol::OUT_HEADER_BYTES]>,
    end: Option<FuseEnd>,
    closing: bool,
    stats: FuseStats,
}

impl FuseDevice {
    /// A device for the connection, in state `Held`. [`start`](Self::start) makes it read.
    pub fn new(owner: Owner, config: FuseConfig, connection: Connection) -> Self {
        let resend = connection.is_resumed();
        Self {
            owner,
            config,
            descriptor: connection.into_descriptor(),
            resend,
            service: Service::Held,
            entries: Entries::new(ENTRIES),
            held: VecDeque::with_capacity(usize::from(ENTRIES)),
            answers: Vec::with_capacity(usize::from(ENTRIES)),
            receive_buffers: Vec::with_capacity(READS_MAX + 1),
            populated: BTreeSet::new(),
            reading: 0,
            reads_wanted: 1,
            round_messages: 0,
            notice: Box::new(protocol::resend_notice()),
            end: None,
            closing: false,
            stats: FuseStats::default(),
        }
    }

    /// Begins to read; a resumed connection first gives its predecessor's pending requests.
    pub fn start(&mut self, ring: &mut Ring, arena: &mut Arena) {
        if self.resend {
            let write = opcode::Write::new(self.fd(), self.notice.as_ptr(), self.notice.len() as u32).build();
            // SAFETY: the notice is boxed and lives until its completion: `is_idle` counts it.
            unsafe { ring.push(write, Token::new(self.owner, KIND_NOTICE, 0)) };
            self.entries.pushed();
        }
        self.flush(ring, arena);
    }

    /// True when the completion of `id` belongs here.
    pub const fn owns(&self, id: RequestId) -> bool {
        request_owner(id) == self.owner.0
    }

    /// What happens to requests for data.
    pub const fn service(&self) -> Service {
        self.service
    }

    /// Why the device ended, once it did. It takes nothing in any more; requests of the volume may still complete.
    pub const fn end(&self) -> Option<FuseEnd> {
        self.end
    }

    /// Counters.
    pub const fn stats(&self) -> FuseStats {
        self.stats
    }

    /// Requests of clients that are not answered yet, held ones included.
    pub fn open_requests(&self) -> usize {
        let open = |index: &u16| match self.entries.get(*index).map(|entry| entry.state) {
            Some(EntryState::Held(_) | EntryState::Asked(_)) => true,
            Some(EntryState::Free | EntryState::Reading | EntryState::Answering { .. }) | None => false,
        };
        self.entries.indices().filter(open).count()
    }

    /// The arena gave memory back to the system: pages must be made sure of again.
    pub fn memory_trimmed(&mut self) {
        self.populated.clear();
    }

    /// Changes what happens to requests for data; those that wait are passed on or refused at once.
    /// Requests the volume already has are not touched: it completes them as it sees fit.
    pub fn set_service(&mut self, service: Service, arena: &mut Arena, out: &mut Vec<FrontendEvent>) {
        self.service = service;
        match service {
            Service::Held => {}
            Service::Serving => {
                while let Some(index) = self.held.pop_front() {
                    if let EntryState::Held(pending) = self.entries.entry_mut(index).state {
                        self.ask(index, pending, out);
                    }
                }
            }
            Service::Refusing => {
                while let Some(index) = self.held.pop_front() {
                    if let EntryState::Held(pending) = self.entries.entry_mut(index).state {
                        self.answer(index, Reply::failed(pending.unique, libc::EIO), arena);
                    }
                }
            }
        }
    }

    /// The volume's answer to a request. A long zero range may ask for its next piece in `out`. An answer to a request
    /// that is not open (any more) is ignored.
    pub fn complete(
        &mut self,
        id: RequestId,
        result: Result<(), RequestError>,
        arena: &mut Arena,
        out: &mut Vec<FrontendEvent>,
    ) {
        let index = request_slot(id);
        let serial = request_generation(id);
        let pending = match self.entries.get(index) {
            Some(entry) if entry.serial == serial && self.owns(id) => match entry.state {
                EntryState::Asked(pending) => pending,
                EntryState::Free
                | EntryState::Reading
                | EntryState::Held(_)
                | EntryState::Answering { .. } => return,
            },
            Some(_) | None => return,
        };
        let reply = match (result, pending.work) {
            (Err(error), work) => Reply::failed(pending.unique, errno_of(error, work)),
            (Ok(()), Work::Zero { rest, .. }) if rest.length_bytes > 0 && self.end.is_none() => {
                self.ask(index, pending, out);
                return;
            }
            (Ok(()), Work::Read(range)) => {
                self.answer_data(index, pending.unique, range, arena);
                return;
            }
            (Ok(()), Work::Write(range)) => Reply::written(pending.unique, range.length_bytes as u32),
            (Ok(()), Work::Flush | Work::Zero { .. }) => Reply::done(pending.unique),
        };
        self.answer(index, reply, arena);
    }

    /// Takes one of the ring's completions of this owner.
    pub fn on_completion(
        &mut self,
        completion: Completion,
        _ring: &mut Ring,
        arena: &mut Arena,
        out: &mut Vec<FrontendEvent>,
    ) {
        match completion.token.kind {
            KIND_READ => {
                self.entries.reaped();
                self.on_read(completion.token.index as u16, completion.result, arena, out);
            }
            KIND_ANSWER => {
                self.entries.reaped();
                self.on_answered(completion.token.index as u16, completion.result, arena);
            }
            KIND_NOTICE => {
                self.entries.reaped();
                if completion.result < 0 {
                    self.end_with(FuseEnd::CannotResend { errno: -completion.result });
                }
            }
            other => {
                tracing::error!(volume = self.config.volume, kind = other, "completion of an unknown kind")
            }
        }
    }

    /// Pushes the answers and the reads of this turn.
    pub fn flush(&mut self, ring: &mut Ring, arena: &mut Arena) {
        let mut answers = std::mem::take(&mut self.answers);
        for index in answers.drain(..) {
            self.push_answer(index, ring, arena);
        }
        self.answers = answers;
        if self.end.is_none() && !self.closing {
            self.push_reads(ring, arena);
        }
    }

    /// Stops: nothing more is read, and requests that were not answered stay in the kernel for a successor (or get EIO
    /// when nobody keeps the connection). Call it, then turn the ring until [`is_idle`](Self::is_idle), then drop.
    /// Answers already given are still sent by [`flush`](Self::flush).
    pub fn close(&mut self, ring: &mut Ring, arena: &mut Arena) {
        if self.closing {
            return;
        }
        self.closing = true;
        if self.reading > 0 {
            // Answers go out at once when submitted; they are in front of this in the queue.
            ring.cancel_descriptor(self.descriptor.as_raw_fd());
        }
        for buffer in self.receive_buffers.drain(..) {
            arena.release(buffer);
        }
        while let Some(index) = self.held.pop_front() {
            self.free_entry(index, arena);
        }
    }

    /// True when no operation of the ring is in flight or waiting to be pushed.
    pub fn is_idle(&self) -> bool {
        self.entries.in_flight() == 0 && self.answers.is_empty()
    }

    fn fd(&self) -> Fd {
        Fd(self.descriptor.as_raw_fd())
    }

    fn end_with(&mut self, end: FuseEnd) {
        if self.end.is_none() {
            self.end = Some(end);
            match end {
                FuseEnd::Gone => tracing::debug!(volume = self.config.volume, "{end}"),
                FuseEnd::CannotResend { .. } | FuseEnd::Failed { .. } => {
                    tracing::error!(volume = self.config.volume, "{end}");
                }
            }
        }
    }

    // ---- reading ----

    fn push_reads(&mut self, ring: &mut Ring, arena: &mut Arena) {
        self.adapt();
        if self.service == Service::Held {
            self.reads_wanted = 1;
            if self.held.len() >= HELD_MAX {
                return;
            }
        }
        while self.reading < self.reads_wanted {
            let Some(index) = self.prepare_read(arena) else { return };
            self.push_read(index, ring);
        }
        while let Some(buffer) = self.receive_buffers.pop() {
            arena.release(buffer);
        }
    }

    /// Decides how many reads wait: twice as many when all of them found a request since the last flush, one fewer when
    /// most found none. Each that waits in vain is woken by the kernel all the same, so an idle volume has one.
    fn adapt(&mut self) {
        let messages = std::mem::take(&mut self.round_messages);
        if messages == 0 {
            return;
        }
        if self.reading == 0 {
            self.reads_wanted = (self.reads_wanted * 2).min(READS_MAX);
        } else if messages <= self.reads_wanted / 2 {
            self.reads_wanted = (self.reads_wanted - 1).max(1);
        }
    }

    /// An entry with a buffer, ready to be read into; none when requests or memory are short (then the next turn tries).
    fn prepare_read(&mut self, arena: &mut Arena) -> Option<u16> {
        let buffer = match self.receive_buffers.pop() {
            Some(buffer) => buffer,
            None => self.new_receive_buffer(arena)?,
        };
        let Some(index) = self.entries.take() else {
            self.receive_buffers.push(buffer);
            return None;
        };
        self.entries.entry_mut(index).buffer = Some(buffer);
        let target = arena.ptr(buffer);
        let io = self.entries.io_mut(index);
        io.vectors = [
            libc::iovec { iov_base: io.header.as_mut_ptr().cast(), iov_len: HEADER_BYTES },
            libc::iovec { iov_base: target.cast(), iov_len: PAYLOAD_MAX_BYTES as usize },
        ];
        Some(index)
    }

    fn new_receive_buffer(&mut self, arena: &mut Arena) -> Option<BufferId> {
        let buffer = arena.alloc(PAYLOAD_MAX_BYTES as usize)?;
        if self.populated.insert(buffer.0) {
            // SAFETY: the range is a slot of the arena that we hold; populating changes no content.
            let populated = unsafe {
                libc::madvise(arena.ptr(buffer).cast(), PAYLOAD_MAX_BYTES as usize, libc::MADV_POPULATE_WRITE)
            };
            if populated != 0 {
                // Linux before 5.14: touch the pages by hand; what was in a fresh slot does not matter.
                arena.bytes_mut(buffer).fill(0);
            }
        }
        Some(buffer)
    }

    fn push_read(&mut self, index: u16, ring: &mut Ring) {
        let vectors = self.entries.io(index).vectors.as_ptr();
        let read = opcode::Readv::new(self.fd(), vectors, 2).build();
        // SAFETY: vectors and header lie in the entry's fixed memory, the payload in a slot whose reference the entry
        // holds; both stay until the completion, and `Entries` gives its memory up rather than free it before.
        unsafe { ring.push(read, Token::new(self.owner, KIND_READ, u32::from(index))) };
        self.entries.pushed();
        self.reading += 1;
    }

    fn on_read(&mut self, index: u16, result: i32, arena: &mut Arena, out: &mut Vec<FrontendEvent>) {
        self.reading -= 1;
        if let Ok(received_bytes) = usize::try_from(result) {
            self.round_messages += 1;
            self.on_message(index, received_bytes, arena, out);
            return;
        }
        match -result {
            libc::EAGAIN => self.stats.empty_reads += 1,
            // A request that was taken back before we read it, a signal, our own cancellation.
            libc::ENOENT | libc::EINTR | libc::ECANCELED => {}
            libc::ENODEV | libc::ECONNABORTED => self.end_with(FuseEnd::Gone),
            errno => self.end_with(FuseEnd::Failed { errno }),
        }
        self.free_read(index, arena);
    }

    /// Frees an entry that was read into, and keeps its buffer for the next read.
    fn free_read(&mut self, index: u16, arena: &mut Arena) {
        if let Some(buffer) = self.entries.entry_mut(index).buffer.take() {
            self.keep_receive_buffer(buffer, arena);
        }
        self.entries.give_back(index);
    }

    fn keep_receive_buffer(&mut self, buffer: BufferId, arena: &mut Arena) {
        if self.closing || self.receive_buffers.len() > READS_MAX {
            arena.release(buffer);
        } else {
            self.receive_buffers.push(buffer);
        }
    }

    fn on_message(
        &mut self,
        index: u16,
        received_bytes: usize,
        arena: &mut Arena,
        out: &mut Vec<FrontendEvent>,
    ) {
        let message = match protocol::parse(&self.entries.io(index).header, received_bytes) {
            Ok(message) => message,
            Err(error) => {
                tracing::error!(volume = self.config.volume, "{error}");
                match error {
                    ParseError::NoHeader { .. } => self.free_read(index, arena),
                    ParseError::Length { unique, .. } => {
                        self.answer_now(index, Reply::failed(unique, libc::EIO), arena);
                    }
                }
                return;
            }
        };
        if message.is_resent() {
            self.stats.resent += 1;
        }
        let unique = message.unique;
        let work = match message.operation {
            Operation::Read(range) => match self.clip(range) {
                Some(range) => Work::Read(range),
                None => return self.answer_now(index, Reply::data(unique, 0), arena),
            },
            Operation::Write(range) if range.length_bytes == 0 => {
                return self.answer_now(index, Reply::written(unique, 0), arena);
            }
            Operation::Write(range) => Work::Write(range),
            Operation::Zero { range, .. } if range.length_bytes == 0 => {
                return self.answer_now(index, Reply::failed(unique, libc::EINVAL), arena);
            }
            Operation::Zero { range, may_unmap } => Work::Zero { rest: range, may_unmap },
            Operation::Fsync => Work::Flush,
            question @ (Operation::Lookup
            | Operation::Forget
            | Operation::GetAttr
            | Operation::SetAttr { .. }
            | Operation::Open
            | Operation::StatFs
            | Operation::Release
            | Operation::Flush
            | Operation::Init(_)
            | Operation::Interrupt
            | Operation::Destroy
            | Operation::OtherFallocate
            | Operation::Other { .. }) => return self.on_question(index, unique, question, arena, out),
        };
        let inside = match work {
            Work::Write(range) | Work::Zero { rest: range, .. } => {
                range.end_bytes() <= self.config.size_bytes
            }
            Work::Read(_) | Work::Flush => true,
        };
        if !inside {
            return self.answer_now(index, Reply::failed(unique, libc::ENOSPC), arena);
        }
        self.stats.requests += 1;
        self.accept(index, Pending { unique, work }, arena, out);
    }

    /// A read beyond the end is short, as of any file; so is one beyond what was agreed on.
    fn clip(&self, range: ByteRange) -> Option<ByteRange> {
        let end_bytes = range.end_bytes().min(self.config.size_bytes);
        let length_bytes = end_bytes.saturating_sub(range.offset_bytes).min(u64::from(PAYLOAD_MAX_BYTES));
        (length_bytes > 0).then(|| ByteRange::new(range.offset_bytes, length_bytes))
    }

    /// Questions about the file itself.
    fn on_question(
        &mut self,
        index: u16,
        unique: u64,
        operation: Operation,
        arena: &mut Arena,
        out: &mut Vec<FrontendEvent>,
    ) {
        let size_bytes = self.config.size_bytes;
        let block_bytes = self.config.sector_bytes;
        let reply = match operation {
            Operation::Forget | Operation::Interrupt => return self.free_read(index, arena),
            Operation::Lookup => Reply::failed(unique, libc::ENOENT),
            Operation::SetAttr { size_bytes: Some(wanted) } if wanted != size_bytes => {
                Reply::failed(unique, libc::EPERM)
            }
            Operation::GetAttr | Operation::SetAttr { .. } => {
                Reply::attributes(unique, size_bytes, block_bytes)
            }
            Operation::Open => {
                out.push(FrontendEvent::ClientOpened);
                Reply::opened(unique)
            }
            Operation::Release => {
                out.push(FrontendEvent::ClientClosed);
                Reply::done(unique)
            }
            Operation::StatFs => Reply::file_system(unique, size_bytes, block_bytes),
            Operation::Flush | Operation::Destroy => Reply::done(unique),
            Operation::Init(offer) => match protocol::negotiate(unique, &offer) {
                Ok((reply, _)) => reply,
                Err(error) => {
                    tracing::error!(volume = self.config.volume, "{error}");
                    Reply::failed(unique, libc::EPROTO)
                }
            },
            // Never ENOSYS here: the kernel would report success from then on.
            Operation::OtherFallocate => Reply::failed(unique, libc::EOPNOTSUPP),
            Operation::Other { opcode } => {
                tracing::debug!(
                    volume = self.config.volume,
                    opcode,
                    "FUSE operation that a volume does not have"
                );
                Reply::failed(unique, libc::ENOSYS)
            }
            // Taken by `on_message`; a request must have an answer whatever happens.
            Operation::Read(_) | Operation::Write(_) | Operation::Fsync | Operation::Zero { .. } => {
                Reply::failed(unique, libc::EIO)
            }
        };
        self.answer_now(index, reply, arena);
    }

    // ---- requests for data ----

    fn accept(&mut self, index: u16, pending: Pending, arena: &mut Arena, out: &mut Vec<FrontendEvent>) {
        match self.service {
            Service::Refusing => self.answer_now(index, Reply::failed(pending.unique, libc::EIO), arena),
            Service::Held => {
                self.settle_buffer(index, pending.work, arena);
                self.entries.entry_mut(index).state = EntryState::Held(pending);
                self.held.push_back(index);
            }
            Service::Serving => {
                self.settle_buffer(index, pending.work, arena);
                self.ask(index, pending, out);
            }
        }
    }

    /// Exchanges the large receive buffer for one of the request's size, where that is cheap.
    fn settle_buffer(&mut self, index: u16, work: Work, arena: &mut Arena) {
        let Some(received) = self.entries.entry_mut(index).buffer else { return };
        let settled = match work {
            Work::Flush | Work::Zero { .. } => None,
            // Without room for a small one the large one does, for either.
            Work::Read(range) => match arena.alloc(range.length_bytes as usize) {
                Some(small) => Some(small),
                None => return,
            },
            Work::Write(range) if range.length_bytes <= MOVE_MAX_BYTES => {
                let length = range.length_bytes as usize;
                let Some(small) = arena.alloc(length) else { return };
                let (from, to) = (arena.ptr(received), arena.ptr(small));
                // SAFETY: two different slots we hold, both at least `length` long (the parser checked the payload's
                // length against the receive buffer), and nothing is in flight on either.
                unsafe { std::ptr::copy_nonoverlapping(from, to, length) };
                self.stats.moved += 1;
                Some(small)
            }
            Work::Write(_) => return,
        };
        self.entries.entry_mut(index).buffer = settled;
        self.keep_receive_buffer(received, arena);
    }

    /// Gives the request (for a zero range: its next piece) to the volume.
    fn ask(&mut self, index: u16, pending: Pending, out: &mut Vec<FrontendEvent>) {
        let buffer = self.entries.entry_mut(index).buffer;
        let mut pending = pending;
        let op = match (pending.work, buffer) {
            (Work::Read(range), Some(buffer)) => RequestOp::Read { range, buffer },
            (Work::Write(range), Some(buffer)) => RequestOp::Write { range, buffer, fua: false },
            (Work::Zero { rest, may_unmap }, _) => {
                let (piece, rest) = split_zero(rest);
                pending.work = Work::Zero { rest, may_unmap };
                RequestOp::Zero { range: piece, may_unmap, fua: false }
            }
            (Work::Flush, _) => RequestOp::Flush,
            (Work::Read(_) | Work::Write(_), None) => {
                unreachable!("a read or write keeps the buffer it was received in or a smaller one")
            }
        };
        let entry = self.entries.entry_mut(index);
        entry.state = EntryState::Asked(pending);
        let id = request_id(self.owner.0, index, entry.serial);
        out.push(FrontendEvent::Request(Request { id, op }));
    }

    // ---- answering ----

    /// Answers an entry that was just read: its receive buffer goes back.
    fn answer_now(&mut self, index: u16, reply: Reply, arena: &mut Arena) {
        if let Some(buffer) = self.entries.entry_mut(index).buffer.take() {
            self.keep_receive_buffer(buffer, arena);
        }
        self.answer(index, reply, arena);
    }

    fn answer(&mut self, index: u16, reply: Reply, arena: &mut Arena) {
        self.release_buffer(index, arena);
        self.queue_answer(index, reply, 0, arena);
    }

    fn answer_data(&mut self, index: u16, unique: u64, range: ByteRange, arena: &mut Arena) {
        let data_bytes = range.length_bytes as u32;
        self.queue_answer(index, Reply::data(unique, data_bytes as usize), data_bytes, arena);
    }

    fn queue_answer(&mut self, index: u16, reply: Reply, data_bytes: u32, arena: &mut Arena) {
        if self.end.is_some() {
            self.free_entry(index, arena);
            return;
        }
        self.entries.entry_mut(index).state = EntryState::Answering { data_bytes };
        self.entries.io_mut(index).reply = reply;
        self.answers.push(index);
    }

    fn push_answer(&mut self, index: u16, ring: &mut Ring, arena: &mut Arena) {
        let entry = *self.entries.entry_mut(index);
        let EntryState::Answering { data_bytes } = entry.state else { return };
        let data = match entry.buffer {
            Some(buffer) if data_bytes > 0 => arena.ptr(buffer),
            Some(_) | None => std::ptr::null_mut(),
        };
        let descriptor = self.fd();
        let io = self.entries.io_mut(index);
        let head = io.reply.as_bytes();
        io.vectors = [
            libc::iovec { iov_base: head.as_ptr().cast_mut().cast(), iov_len: head.len() },
            libc::iovec { iov_base: data.cast(), iov_len: data_bytes as usize },
        ];
        let count = if data_bytes > 0 { 2 } else { 1 };
        let write = opcode::Writev::new(descriptor, io.vectors.as_ptr(), count).build();
        // SAFETY: reply and vectors lie in the entry's fixed memory, the data in a slot whose reference the entry
        // holds until the completion; the kernel only reads them.
        unsafe { ring.push(write, Token::new(self.owner, KIND_ANSWER, u32::from(index))) };
        self.entries.pushed();
    }

    fn on_answered(&mut self, index: u16, result: i32, arena: &mut Arena) {
        match -result {
            errno if errno <= 0 => {}
            // The client was killed and its request taken back.
            libc::ENOENT => {}
            libc::ENODEV | libc::ECONNABORTED | libc::EPERM => self.end_with(FuseEnd::Gone),
            errno => {
                tracing::error!(
                    volume = self.config.volume,
                    errno,
                    "the kernel refused the answer to a FUSE request"
                );
            }
        }
        self.free_entry(index, arena);
    }

    fn release_buffer(&mut self, index: u16, arena: &mut Arena) {
        if let Some(buffer) = self.entries.entry_mut(index).buffer.take() {
            arena.release(buffer);
        }
    }

    fn free_entry(&mut self, index: u16, arena: &mut Arena) {
        self.release_buffer(index, arena);
        self.entries.give_back(index);
    }
}

impl std::fmt::Debug for FuseDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FuseDevice")
            .field("volume", &self.config.volume)
            .field("service", &self.service)
            .field("in_flight", &self.entries.in_flight())
            .field("end", &self.end)
            .field("stats", &self.stats)
            .finish_non_exhaustive()
    }
}

/// The next piece of a zero range, and what is left. Pieces end on multiples of [`ZERO_PIECE_BYTES`].
const fn split_zero(rest: ByteRange) -> (ByteRange, ByteRange) {
    let boundary_bytes = (rest.offset_bytes / ZERO_PIECE_BYTES + 1) * ZERO_PIECE_BYTES;
    let fits_bytes = boundary_bytes - rest.offset_bytes;
    let piece_bytes = if rest.length_bytes < fits_bytes { rest.length_bytes } else { fits_bytes };
    (
        ByteRange::new(rest.offset_bytes, piece_bytes),
        ByteRange::new(rest.offset_bytes + piece_bytes, rest.length_bytes - piece_bytes),
    )
}

const fn errno_of(error: RequestError, work: Work) -> i32 {
    match error {
        RequestError::Unaligned => libc::EINVAL,
        RequestError::PastEnd => match work {
            Work::Read(_) | Work::Flush => libc::EINVAL,
            Work::Write(_) | Work::Zero { .. } => libc::ENOSPC,
        },
        RequestError::NotServing | RequestError::Io => libc::EIO,
        RequestError::TooMany => libc::EAGAIN,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_pieces_are_aligned_and_cover_the_range() {
        let whole = ByteRange::new(ZERO_PIECE_BYTES - 4096, 3 * ZERO_PIECE_BYTES);
        let (mut at, mut rest) = (whole.offset_bytes, whole);
        let mut pieces = 0;
        while rest.length_bytes > 0 {
            let (piece, left) = split_zero(rest);
            assert_eq!(piece.offset_bytes, at);
            assert!(piece.length_bytes > 0 && piece.length_bytes <= ZERO_PIECE_BYTES);
            at = piece.end_bytes();
            rest = left;
            pieces += 1;
        }
        assert_eq!((at, pieces), (whole.end_bytes(), 4));
    }

    #[test]
    fn every_refusal_has_an_errno_the_block_layer_reports() {
        let range = ByteRange::new(0, 4096);
        assert_eq!(errno_of(RequestError::NotServing, Work::Flush), libc::EIO);
        assert_eq!(errno_of(RequestError::Unaligned, Work::Write(range)), libc::EINVAL);
        assert_eq!(errno_of(RequestError::PastEnd, Work::Write(range)), libc::ENOSPC);
        assert_eq!(errno_of(RequestError::PastEnd, Work::Read(range)), libc::EINVAL);
    }
}
