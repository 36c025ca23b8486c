//! One connection of a channel: its socket, its buffers, its operations in the ring.

use std::io::{BufRead, IoSlice, Write};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::ptr;
use std::sync::Arc;

use duplex_core::ids::BufferId;
use duplex_ring::{Arena, Owner, Ring, Token};
use io_uring::opcode;
use io_uring::types::Fd;
use rustls::Connection as TlsConnection;

use crate::frame::{HEAD_BYTES, Head, restamp};
use crate::link::DataConnection;
use crate::path::PathCounters;

use super::ledger::{Kept, Ledger};
use super::parser::Parser;
use super::{ChannelLimits, KIND_RECEIVE, KIND_SEND};

/// A receive in flight: what the kernel reads must not move.
struct Receive {
    header: libc::msghdr,
    parts: [libc::iovec; 2],
    /// Bytes of the first part that go straight into a payload's buffer.
    direct: usize,
    in_flight: bool,
}

/// A send in flight: what the kernel reads must not move.
struct Send {
    header: libc::msghdr,
    parts: Vec<libc::iovec>,
    heads: Vec<Head>,
    buffers: Vec<BufferId>,
    inlines: Vec<Arc<[u8]>>,
    /// TLS records, when there is TLS.
    records: Vec<u8>,
    in_flight: bool,
}

/// See the module's text.
pub(super) struct Connection {
    pub(super) index: u32,
    pub(super) attempt: u64,
    pub(super) path: u16,
    pub(super) counters: Arc<PathCounters>,
    pub(super) parser: Parser,
    /// This side's `Resume` went out, the peer's came in.
    pub(super) resume_sent: bool,
    pub(super) resumed: bool,
    /// The arena had no buffer for the next payload: nothing is received until it has.
    pub(super) starved: bool,
    socket: std::net::TcpStream,
    pub(super) tls: Option<Box<TlsConnection>>,
    /// Plain bytes that came with the handshake.
    pub(super) early: Vec<u8>,
    pub(super) early_at: usize,
    /// Received bytes, as they came, not yet parsed.
    pub(super) received: Box<[u8]>,
    pub(super) received_at: usize,
    pub(super) received_end: usize,
    receive: Box<Receive>,
    send: Box<Send>,
    limits: ChannelLimits,
}

// SAFETY: the raw pointers in `receive` and `send` point into this connection's own heap allocations or into the
// arena of the thread that owns the channel; they are rebuilt before each operation, and no operation is in flight
// when a channel without a connection is moved to another thread (`attach` runs on the volume's thread).
unsafe impl std::marker::Send for Connection {}

fn zeroed_header() -> libc::msghdr {
    // SAFETY: msghdr is a plain C structure of integers and pointers: all-zero is a valid (empty) value.
    unsafe { std::mem::zeroed() }
}

const fn part(base: *mut u8, length: usize) -> libc::iovec {
    libc::iovec { iov_base: base.cast(), iov_len: length }
}

impl Connection {
    pub(super) fn new(index: u32, data: DataConnection, parser: Parser, limits: ChannelLimits) -> Self {
        Self {
            index,
            attempt: data.attempt,
            path: data.path,
            counters: data.counters,
            parser,
            resume_sent: false,
            resumed: false,
            starved: false,
            socket: data.socket,
            tls: data.tls,
            early: data.early,
            early_at: 0,
            received: vec![0; limits.receive_bytes].into_boxed_slice(),
            received_at: 0,
            received_end: 0,
            receive: Box::new(Receive {
                header: zeroed_header(),
                parts: [part(ptr::null_mut(), 0); 2],
                direct: 0,
                in_flight: false,
            }),
            send: Box::new(Send {
                header: zeroed_header(),
                parts: Vec::with_capacity(2 * limits.send_frames + 2),
                heads: Vec::with_capacity(limits.send_frames + 1),
                buffers: Vec::with_capacity(limits.send_frames),
                inlines: Vec::new(),
                records: Vec::new(),
                in_flight: false,
            }),
            limits,
        }
    }

    pub(super) const fn is_busy(&self) -> bool {
        self.receive.in_flight || self.send.in_flight
    }

    pub(super) const fn is_sending(&self) -> bool {
        self.send.in_flight
    }

    /// Ends both directions: what is in flight completes at once. The peer sees the end of the stream.
    pub(super) fn shut_down(&self) {
        // Fails when the peer has reset the connection: then everything completes by itself.
        let _ = self.socket.shutdown(Shutdown::Both);
    }

    /// Gives the buffers back that no operation uses any more.
    pub(super) fn release(&mut self, arena: &mut Arena) {
        if !self.receive.in_flight
            && let Some(buffer) = self.parser.abandon()
        {
            arena.release(buffer);
        }
        if !self.send.in_flight {
            self.send.let_go(arena);
        }
    }

    /// One receive in flight, straight into the payload in progress and then into the receive buffer.
    pub(super) fn receive(&mut self, owner: Owner, ring: &mut Ring, arena: &mut Arena) {
        if self.receive.in_flight || self.starved {
            return;
        }
        let whole = part(self.received.as_mut_ptr(), self.received.len());
        let direct = if self.tls.is_some() { None } else { self.parser.rest() };
        let parts = match direct {
            Some((buffer, filled, left)) => {
                self.receive.direct = left;
                // Within the buffer: the parser took it for at least the body's length.
                let rest = arena.bytes_mut(buffer)[filled..filled + left].as_mut_ptr();
                self.receive.parts = [part(rest, left), whole];
                2
            }
            None => {
                self.receive.direct = 0;
                self.receive.parts[0] = whole;
                1
            }
        };
        self.receive.header.msg_iov = self.receive.parts.as_mut_ptr();
        self.receive.header.msg_iovlen = parts;
        let header = ptr::from_mut(&mut self.receive.header);
        let entry = opcode::RecvMsg::new(Fd(self.socket.as_raw_fd()), header).build();
        self.receive.in_flight = true;
        // SAFETY: header and parts are boxed, the receive buffer is boxed, the payload's buffer is held by the
        // parser; all of them, and the socket, live until the completion: a connection is dropped only when not busy.
        unsafe { ring.push(entry, Token::new(owner, KIND_RECEIVE, self.index)) };
    }

    /// A receive ended with so many bytes.
    pub(super) fn receive_done(&mut self) {
        self.receive.in_flight = false;
    }

    /// So many bytes came: those that were placed directly are taken note of, the rest waits to be parsed.
    pub(super) fn came(&mut self, count: usize) {
        PathCounters::add(&self.counters.data_bytes_received, count as u64);
        let placed = count.min(self.receive.direct);
        self.parser.placed(placed);
        self.received_at = 0;
        self.received_end = count - placed;
    }

    /// Collects what is to be sent, and sends it in one operation. `link` is a word of the link that goes first.
    pub(super) fn transmit(
        &mut self,
        link: Option<Head>,
        resume: Option<&[u8]>,
        ledger: &mut Ledger,
        arena: &mut Arena,
    ) -> Result<bool, rustls::Error> {
        let mut budget = self.limits.send_bytes;
        let send = &mut *self.send;
        if let Some(resume) = resume {
            send.inlines.push(Arc::from(resume));
            send.parts.push(part(resume_pointer(&send.inlines), resume.len()));
        }
        if let Some(head) = link {
            send.push_head(head);
        }
        if self.resumed && resume.is_none() {
            while send.heads.len() < self.limits.send_frames && budget > 0 {
                let ack = ledger.received();
                let Some(frame) = ledger.next() else { break };
                let mut head = frame.head;
                restamp(&mut head, ack);
                send.push_head(head);
                budget = budget.saturating_sub(HEAD_BYTES);
                match &frame.body {
                    Kept::Nothing => {}
                    Kept::Buffer(buffer, bytes) => {
                        let bytes = *bytes as usize;
                        arena.retain(*buffer);
                        send.buffers.push(*buffer);
                        send.parts.push(part(arena.ptr(*buffer), bytes));
                        budget = budget.saturating_sub(bytes);
                    }
                    Kept::Inline(bytes) => {
                        send.inlines.push(Arc::clone(bytes));
                        send.parts.push(part(bytes.as_ptr().cast_mut(), bytes.len()));
                        budget = budget.saturating_sub(bytes.len());
                    }
                }
            }
        }
        if !send.heads.is_empty() {
            ledger.ack_sent();
        }
        if let Some(tls) = &mut self.tls {
            send.encrypt(tls, arena)?;
        }
        Ok(!send.parts.is_empty())
    }

    /// Starts (or continues) the send of what was collected.
    pub(super) fn start_send(&mut self, owner: Owner, ring: &mut Ring) {
        let send = &mut *self.send;
        send.header.msg_iov = send.parts.as_mut_ptr();
        send.header.msg_iovlen = send.parts.len();
        let header = ptr::from_mut(&mut send.header);
        let flags = (libc::MSG_NOSIGNAL | libc::MSG_WAITALL).cast_unsigned();
        let entry = opcode::SendMsg::new(Fd(self.socket.as_raw_fd()), header).flags(flags).build();
        send.in_flight = true;
        // SAFETY: header and parts are boxed and not touched before the completion; heads, inline bodies and records
        // are held by `send`, payloads by references to their arena buffers; all of them, and the socket, live
        // until the completion: a connection is dropped only when not busy.
        unsafe { ring.push_prompt(entry, Token::new(owner, KIND_SEND, self.index)) };
    }

    /// A send ended; `count` bytes went out. `true`: some are left, send again.
    pub(super) fn sent(&mut self, count: usize, arena: &mut Arena) -> bool {
        PathCounters::add(&self.counters.data_bytes_sent, count as u64);
        let send = &mut *self.send;
        send.in_flight = false;
        let mut left = count;
        let whole = send.parts.iter().take_while(|part| {
            let gone = part.iov_len <= left;
            left -= if gone { part.iov_len } else { 0 };
            gone
        });
        let whole = whole.count();
        send.parts.drain(..whole);
        if let Some(first) = send.parts.first_mut() {
            // `left` is less than the part's length: the pointer stays inside it.
            first.iov_base = first.iov_base.wrapping_byte_add(left);
            first.iov_len -= left;
            return true;
        }
        send.let_go(arena);
        false
    }

    pub(super) const fn send_failed(&mut self) {
        self.send.in_flight = false;
    }
}

/// Plain bytes that are ready in the TLS connection.
pub(super) fn with_plain<R>(
    tls: &mut TlsConnection,
    parse: impl FnOnce(&mut &[u8]) -> R,
) -> Result<Option<R>, std::io::Error> {
    let mut reader = tls.reader();
    let (result, taken) = match reader.fill_buf() {
        Ok([]) => return Err(std::io::ErrorKind::UnexpectedEof.into()),
        Ok(plain) => {
            let mut input = plain;
            let result = parse(&mut input);
            (result, plain.len() - input.len())
        }
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return Ok(None),
        Err(error) => return Err(error),
    };
    reader.consume(taken);
    Ok(Some(result))
}

fn resume_pointer(inlines: &[Arc<[u8]>]) -> *mut u8 {
    inlines.last().map_or(ptr::null_mut(), |bytes| bytes.as_ptr().cast_mut())
}

impl Send {
    /// The vector never grows beyond its capacity, so that earlier heads do not move.
    fn push_head(&mut self, head: Head) {
        debug_assert!(self.heads.len() < self.heads.capacity());
        self.heads.push(head);
        let at = self.heads.len() - 1;
        self.parts.push(part(self.heads[at].as_mut_ptr(), HEAD_BYTES));
    }

    /// Turns the collected parts into TLS records; the parts' own memory is free afterwards.
    fn encrypt(&mut self, tls: &mut TlsConnection, arena: &mut Arena) -> Result<(), rustls::Error> {
        let failed = |error: std::io::Error| rustls::Error::General(error.to_string());
        let slices: Vec<IoSlice<'_>> = self
            .parts
            .iter()
            .map(|part| {
                // SAFETY: every part was made in this turn from heads, inline bodies or arena buffers that `self`
                // holds and nobody writes to meanwhile.
                IoSlice::new(unsafe { std::slice::from_raw_parts(part.iov_base.cast(), part.iov_len) })
            })
            .collect();
        let total: usize = self.parts.iter().map(|part| part.iov_len).sum();
        let mut writer = tls.writer();
        let written = if slices.is_empty() { 0 } else { writer.write_vectored(&slices).map_err(failed)? };
        drop(slices);
        if written != total {
            return Err(rustls::Error::General("TLS did not take a whole batch".to_owned()));
        }
        self.parts.clear();
        self.let_go(arena);
        while tls.wants_write() {
            tls.write_tls(&mut self.records).map_err(failed)?;
        }
        if !self.records.is_empty() {
            self.parts.push(part(self.records.as_mut_ptr(), self.records.len()));
        }
        Ok(())
    }

    fn let_go(&mut self, arena: &mut Arena) {
        for buffer in self.buffers.drain(..) {
            arena.release(buffer);
        }
        self.parts.clear();
        self.heads.clear();
        self.inlines.clear();
        self.records.clear();
    }
}
