//! One client's connection.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Duration;

use duplex_core::ids::{BufferId, ByteRange};
use duplex_core::request::{Request, RequestError};
use duplex_core::time::Instant;
use duplex_ring::{Arena, Errno, Owner, Ring, Token};
use io_uring::{opcode, types::Fd};

use super::config::{Allocation, AllocationExtent, AllocationSource, NbdConfig};
use super::negotiate::{Agreed, BASE_ALLOCATION_ID, Export, Negotiation, Step};
use super::plan::{Plan, Rules, plan, wire_error};
use super::slots::{Kind, Slot, Slots, Stage};
use super::tx::{Message, Tx, send_now};
use super::wire::{self, RequestHeader, WireError, chunk, command, parse_request};
use crate::{FrontendEvent, request_id};

/// Receive buffer of a connection.
pub(super) const RX_BYTES: usize = 256 << 10;
/// Replies that may wait to be sent before no more requests are taken.
const TX_WAITING_MAX_BYTES: usize = 64 << 10;
/// How long a client may take to take its last replies and to close.
const LINGER_TIMEOUT: Duration = Duration::from_secs(5);
/// Extents in one answer to block status.
const EXTENTS_MAX: usize = 1024;

pub(super) const KIND_RECV: u16 = 2;
pub(super) const KIND_SEND: u16 = 3;

/// Where a connection is in its life.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Phase {
    /// Client and server agree on options.
    Negotiating(Negotiation),
    /// Requests are taken.
    Transmission,
    /// No more requests are taken; what is in flight and what waits to be sent ends first.
    Finishing,
    /// Everything is sent and the sending side shut: what the client still sends is thrown away until it closes, so
    /// that the kernel does not throw away our last replies instead.
    Lingering,
    /// Over; waits for the kernel's operations to end.
    Dead,
}

/// Why a connection takes no more requests for now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Blocked {
    No,
    /// It needs a request slot and this many buffer bytes (0: no buffer).
    Room(usize),
    /// The client does not take its replies.
    Sending,
}

/// What to do next in `pump`.
enum Flow {
    Again,
    NeedBytes,
    Blocked(Blocked),
    Stop,
}

/// What a connection uses of its server.
pub(super) struct Context<'a> {
    pub(super) owner: Owner,
    pub(super) config: &'a NbdConfig,
    pub(super) export: &'a Export,
    /// Text for clients while the server does not serve.
    pub(super) refusal: Option<&'a str>,
    pub(super) slots: &'a mut Slots,
    pub(super) allocation: &'a mut Option<Box<dyn AllocationSource + Send>>,
    pub(super) extents: &'a mut Vec<AllocationExtent>,
    pub(super) arena: &'a mut Arena,
    pub(super) out: &'a mut Vec<FrontendEvent>,
}

/// A connection.
pub(super) struct Connection {
    socket: OwnedFd,
    index: u16,
    pub(super) phase: Phase,
    agreed: Agreed,
    /// The loop was told that a client is there.
    pub(super) opened: bool,
    pub(super) blocked: Blocked,
    /// When the phase (negotiating, lingering) was first seen by the clock.
    pub(super) since: Option<Instant>,
    /// Slots it has, in any stage, and how many of them have a read's data to be sent.
    in_flight: usize,
    sending: usize,
    held_bytes: u64,
    rx: Vec<u8>,
    rx_start: usize,
    rx_end: usize,
    rx_message: Message,
    pub(super) rx_in_flight: bool,
    rx_ended: bool,
    /// The write whose payload is coming in.
    receiving: Option<u16>,
    /// Rest of a refused write's payload.
    drain_bytes: u64,
    tx: Tx,
    finished: Vec<u16>,
}

impl Connection {
    /// A fresh connection with the greeting ready to be sent. `rx` has [`RX_BYTES`].
    pub(super) fn new(socket: OwnedFd, index: u16, rx: Vec<u8>) -> Self {
        let mut tx = Tx::new();
        let negotiation = Negotiation::new(tx.bytes());
        Self {
            socket,
            index,
            phase: Phase::Negotiating(negotiation),
            agreed: Agreed::default(),
            opened: false,
            blocked: Blocked::No,
            since: None,
            in_flight: 0,
            sending: 0,
            held_bytes: 0,
            rx,
            rx_start: 0,
            rx_end: 0,
            rx_message: Message::new(),
            rx_in_flight: false,
            rx_ended: false,
            receiving: None,
            drain_bytes: 0,
            tx,
            finished: Vec::new(),
        }
    }

    fn enter(&mut self, phase: Phase) {
        self.phase = phase;
        self.since = None;
    }

    /// How long the connection may stay as it is; `None` while that is not the client's doing.
    pub(super) fn timeout(&self, refusing: bool, config: &NbdConfig) -> Option<Duration> {
        let with_loop = self.in_flight - self.sending - usize::from(self.receiving.is_some());
        match self.phase {
            Phase::Negotiating(_) => Some(config.negotiation_timeout),
            Phase::Lingering => Some(LINGER_TIMEOUT),
            // Only replies that the client does not take, or a payload that it does not send, are in the way.
            Phase::Finishing => (with_loop == 0).then_some(LINGER_TIMEOUT),
            Phase::Transmission => (refusing && with_loop == 0).then_some(LINGER_TIMEOUT),
            Phase::Dead => None,
        }
    }

    /// Gives the receive buffer back.
    pub(super) fn into_rx(self) -> Vec<u8> {
        self.rx
    }

    /// True when the kernel uses nothing of it any more.
    pub(super) const fn is_reaped(&self) -> bool {
        !self.rx_in_flight && !self.tx.in_flight
    }

    /// Takes in a receive's result.
    pub(super) fn on_received(&mut self, outcome: Result<u32, Errno>, slots: &mut Slots) {
        self.rx_in_flight = false;
        match outcome {
            Ok(0) => {
                self.rx_ended = true;
                match self.phase {
                    // Requests in flight are answered: the client may have closed its sending half only.
                    Phase::Transmission | Phase::Finishing => self.enter(Phase::Finishing),
                    Phase::Negotiating(_) | Phase::Lingering | Phase::Dead => self.phase = Phase::Dead,
                }
            }
            Ok(count) => self.take_received(count as usize, slots),
            Err(Errno::INTR | Errno::AGAIN) => {}
            Err(errno) => {
                tracing::debug!(connection = self.index, %errno, "NBD receive failed");
                self.phase = Phase::Dead;
            }
        }
    }

    fn take_received(&mut self, count: usize, slots: &mut Slots) {
        let mut count = count;
        if let Some(slot) = self.receiving {
            let slot = slots.get_mut(slot);
            if let Stage::Receiving { filled_bytes } = &mut slot.stage {
                let rest = slot.range.length_bytes as usize - *filled_bytes;
                let direct = rest.min(count);
                *filled_bytes += direct;
                count -= direct;
            }
        }
        self.rx_end += count;
    }

    /// Takes in a send's result.
    pub(super) fn on_sent(&mut self, outcome: Result<u32, Errno>, slots: &mut Slots, arena: &mut Arena) {
        self.tx.in_flight = false;
        match outcome {
            Ok(count) => self.sent(count as usize, slots, arena),
            Err(Errno::INTR | Errno::AGAIN) => {}
            Err(errno) => {
                tracing::debug!(connection = self.index, %errno, "NBD send failed");
                self.phase = Phase::Dead;
            }
        }
    }

    fn sent(&mut self, count_bytes: usize, slots: &mut Slots, arena: &mut Arena) {
        let mut finished = std::mem::take(&mut self.finished);
        self.tx.sent(count_bytes, &mut finished);
        for slot in finished.drain(..) {
            self.sending -= 1;
            self.free(slot, slots, arena);
        }
        self.finished = finished;
    }

    /// Works on what was received until it is used up or there is no room.
    pub(super) fn pump(&mut self, cx: &mut Context<'_>) {
        self.blocked = Blocked::No;
        loop {
            let flow = match self.phase {
                Phase::Negotiating(_) => self.pump_negotiation(cx),
                Phase::Transmission => self.pump_request(cx),
                Phase::Lingering => {
                    self.discard_received(cx);
                    Flow::NeedBytes
                }
                Phase::Finishing | Phase::Dead => Flow::Stop,
            };
            match flow {
                Flow::Again => {}
                Flow::Blocked(blocked) => {
                    self.blocked = blocked;
                    return;
                }
                Flow::NeedBytes | Flow::Stop => return,
            }
        }
    }

    fn discard_received(&mut self, cx: &mut Context<'_>) {
        self.rx_start = 0;
        self.rx_end = 0;
        if let Some(slot) = self.receiving.take() {
            self.free(slot, cx.slots, cx.arena);
        }
    }

    fn pump_negotiation(&mut self, cx: &mut Context<'_>) -> Flow {
        if self.tx.waiting_bytes() > TX_WAITING_MAX_BYTES {
            return Flow::Blocked(Blocked::Sending);
        }
        let Phase::Negotiating(negotiation) = &mut self.phase else { return Flow::Stop };
        let input = &self.rx[self.rx_start..self.rx_end];
        let (taken, step) = negotiation.feed(input, cx.export, cx.refusal, self.tx.bytes());
        self.rx_start += taken;
        match step {
            Step::More if taken == 0 => Flow::NeedBytes,
            Step::More => Flow::Again,
            Step::Transmission(agreed) => {
                self.agreed = agreed;
                self.enter(Phase::Transmission);
                self.opened = true;
                cx.out.push(FrontendEvent::ClientOpened);
                Flow::Again
            }
            Step::Close => {
                self.enter(Phase::Finishing);
                Flow::Stop
            }
        }
    }

    fn pump_request(&mut self, cx: &mut Context<'_>) -> Flow {
        if self.tx.waiting_bytes() > TX_WAITING_MAX_BYTES {
            return Flow::Blocked(Blocked::Sending);
        }
        if self.drain_bytes > 0 {
            let here = self.rx_end - self.rx_start;
            let skipped = usize::try_from(self.drain_bytes).unwrap_or(usize::MAX).min(here);
            self.rx_start += skipped;
            self.drain_bytes -= skipped as u64;
            return if self.drain_bytes > 0 { Flow::NeedBytes } else { Flow::Again };
        }
        if let Some(index) = self.receiving {
            let slot = cx.slots.get(index);
            let filled = Stage::Receiving { filled_bytes: slot.range.length_bytes as usize };
            if slot.stage != filled {
                return Flow::NeedBytes;
            }
            self.receiving = None;
            self.issue(index, cx);
            return Flow::Again;
        }
        match parse_request(&self.rx[self.rx_start..self.rx_end]) {
            Ok(Some(header)) => self.take_request(&header, cx),
            Ok(None) => Flow::NeedBytes,
            Err(error) => {
                tracing::warn!(connection = self.index, %error, "NBD client out of step");
                self.phase = Phase::Dead;
                Flow::Stop
            }
        }
    }

    fn take_request(&mut self, header: &RequestHeader, cx: &mut Context<'_>) -> Flow {
        let rules = Rules {
            export: cx.export,
            agreed: self.agreed,
            serving: cx.refusal.is_none(),
            fast_zero: cx.config.fast_zero,
        };
        let (kind, range) = match plan(header, &rules) {
            Plan::Disconnect => {
                self.rx_start += wire::REQUEST_BYTES;
                self.enter(Phase::Finishing);
                return Flow::Stop;
            }
            Plan::Refuse { error, payload_bytes } => {
                self.rx_start += wire::REQUEST_BYTES;
                let structured =
                    self.agreed.structured && matches!(header.command, command::READ | command::BLOCK_STATUS);
                put_error(self.tx.bytes(), header.cookie, error, structured);
                self.drain_bytes = u64::from(payload_bytes);
                return Flow::Again;
            }
            Plan::BlockStatus { range, one } => {
                self.rx_start += wire::REQUEST_BYTES;
                self.answer_status(header.cookie, range, one, cx);
                return Flow::Again;
            }
            Plan::Read { range } => (Kind::Read, range),
            Plan::Write { range, fua } => (Kind::Write { fua }, range),
            Plan::Flush => (Kind::Flush, ByteRange::new(0, 0)),
            Plan::Zero { range, may_unmap, fua } => {
                let end_bytes = range.end_bytes();
                (
                    Kind::Zero { end_bytes, may_unmap, fua },
                    zero_piece(range.offset_bytes, end_bytes, cx.config),
                )
            }
        };
        self.admit(header.cookie, kind, range, cx)
    }

    /// Takes the request in when there is room for it.
    fn admit(&mut self, cookie: u64, kind: Kind, range: ByteRange, cx: &mut Context<'_>) -> Flow {
        let buffer_bytes = match kind {
            Kind::Read | Kind::Write { .. } => range.length_bytes as usize,
            Kind::Flush | Kind::Zero { .. } => 0,
        };
        if !self.may_admit(buffer_bytes, cx.slots, cx.config) {
            return Flow::Blocked(Blocked::Room(buffer_bytes));
        }
        let mut buffer = None;
        if buffer_bytes > 0 {
            buffer = cx.arena.alloc(buffer_bytes);
            if buffer.is_none() {
                return Flow::Blocked(Blocked::Room(buffer_bytes));
            }
        }
        let stage = Stage::Receiving { filled_bytes: 0 };
        let slot = Slot { generation: 0, stage, connection: Some(self.index), cookie, kind, range, buffer };
        let Some(index) = cx.slots.take(slot) else {
            release(cx.arena, buffer);
            return Flow::Blocked(Blocked::Room(buffer_bytes));
        };
        self.rx_start += wire::REQUEST_BYTES;
        self.in_flight += 1;
        self.held_bytes += slot.held_bytes();
        match (kind, buffer) {
            (Kind::Write { .. }, Some(buffer)) => self.take_payload(index, buffer, buffer_bytes, cx),
            (Kind::Read | Kind::Write { .. } | Kind::Flush | Kind::Zero { .. }, _) => self.issue(index, cx),
        }
        Flow::Again
    }

    /// True when the limits let one more request in.
    pub(super) fn may_admit(&self, buffer_bytes: usize, slots: &Slots, config: &NbdConfig) -> bool {
        let bytes_after = self.held_bytes + buffer_bytes as u64;
        slots.has_room()
            && self.in_flight < config.connection_requests_max.max(1)
            && (self.held_bytes == 0 || bytes_after <= config.connection_bytes_max as u64)
    }

    /// Copies what is here of a write's payload; the rest is received in place.
    fn take_payload(&mut self, index: u16, buffer: BufferId, length: usize, cx: &mut Context<'_>) {
        let here = (self.rx_end - self.rx_start).min(length);
        let from = &self.rx[self.rx_start..self.rx_start + here];
        cx.arena.bytes_mut(buffer)[..here].copy_from_slice(from);
        self.rx_start += here;
        if here == length {
            self.issue(index, cx);
        } else {
            cx.slots.get_mut(index).stage = Stage::Receiving { filled_bytes: here };
            self.receiving = Some(index);
        }
    }

    fn issue(&mut self, index: u16, cx: &mut Context<'_>) {
        if cx.refusal.is_some() {
            let cookie = cx.slots.get(index).cookie;
            self.free(index, cx.slots, cx.arena);
            put_error(self.tx.bytes(), cookie, WireError::Shutdown, false);
            return;
        }
        if let Some(request) = issue(index, cx.owner, cx.slots) {
            cx.out.push(FrontendEvent::Request(request));
        }
    }

    fn answer_status(&mut self, cookie: u64, range: ByteRange, one: bool, cx: &mut Context<'_>) {
        let extents = &mut *cx.extents;
        extents.clear();
        if let Some(source) = cx.allocation {
            source.extents(range, extents);
        }
        if extents.is_empty() {
            let whole = AllocationExtent { length_bytes: range.length_bytes, allocation: Allocation::Data };
            extents.push(whole);
        }
        let mut left_bytes = range.length_bytes;
        let mut count = 0u32;
        let limit = if one { 1 } else { EXTENTS_MAX };
        for extent in extents.iter_mut().take(limit) {
            extent.length_bytes = extent.length_bytes.min(left_bytes);
            left_bytes -= extent.length_bytes;
            if extent.length_bytes == 0 {
                break;
            }
            count += 1;
        }
        let bytes = self.tx.bytes();
        wire::put_chunk(bytes, chunk::BLOCK_STATUS, chunk::DONE, cookie, 4 + 8 * count);
        bytes.extend_from_slice(&BASE_ALLOCATION_ID.to_be_bytes());
        for extent in extents.iter().take(count as usize) {
            let state: u32 = match extent.allocation {
                Allocation::Data => 0,
                Allocation::Hole => 3,
                Allocation::Zero => 2,
            };
            // The range's length came as 32 bits and bounds the extent's.
            bytes.extend_from_slice(&(extent.length_bytes as u32).to_be_bytes());
            bytes.extend_from_slice(&state.to_be_bytes());
        }
    }

    /// Answers a request; the loop is done with it.
    pub(super) fn answer(
        &mut self,
        index: u16,
        result: Result<(), RequestError>,
        slots: &mut Slots,
        arena: &mut Arena,
    ) {
        let slot = *slots.get(index);
        let is_read = slot.kind == Kind::Read;
        match (result, slot.buffer) {
            (Ok(()), Some(buffer)) if is_read => {
                let length_bytes = slot.range.length_bytes;
                if self.agreed.structured {
                    let bytes = self.tx.bytes();
                    // A read's length came as 32 bits.
                    wire::put_data_chunk(bytes, slot.cookie, slot.range.offset_bytes, length_bytes as u32);
                } else {
                    wire::put_simple_reply(self.tx.bytes(), slot.cookie, None);
                }
                self.tx.payload(index, buffer, length_bytes as usize);
                slots.get_mut(index).stage = Stage::Sending;
                self.sending += 1;
            }
            (Ok(()), _) => {
                self.free(index, slots, arena);
                wire::put_simple_reply(self.tx.bytes(), slot.cookie, None);
            }
            (Err(error), _) => {
                self.free(index, slots, arena);
                let error = wire_error(error, !is_read);
                put_error(self.tx.bytes(), slot.cookie, error, is_read && self.agreed.structured);
            }
        }
    }

    fn free(&mut self, index: u16, slots: &mut Slots, arena: &mut Arena) {
        self.held_bytes -= slots.get(index).held_bytes();
        self.in_flight -= 1;
        release(arena, slots.free(index));
    }

    /// Arms the receive when one is wanted and none is in flight.
    pub(super) fn arm_receive(&mut self, owner: Owner, slots: &Slots, arena: &Arena, ring: &mut Ring) {
        let wanted = match self.phase {
            Phase::Negotiating(_) | Phase::Transmission => self.blocked == Blocked::No,
            Phase::Lingering => true,
            Phase::Finishing | Phase::Dead => false,
        };
        if !wanted || self.rx_in_flight || self.rx_ended {
            return;
        }
        self.rx.copy_within(self.rx_start..self.rx_end, 0);
        self.rx_end -= self.rx_start;
        self.rx_start = 0;
        let token = Token::new(owner, KIND_RECV, self.index.into());
        let fd = Fd(self.socket.as_raw_fd());
        let rest = &mut self.rx[self.rx_end..];
        let entry = match self.receiving.map(|slot| slots.get(slot)) {
            Some(&Slot { stage: Stage::Receiving { filled_bytes }, buffer: Some(buffer), range, .. }) => {
                self.rx_message.clear();
                let start = arena.ptr(buffer).wrapping_add(filled_bytes);
                self.rx_message.add(start, range.length_bytes as usize - filled_bytes);
                self.rx_message.add(rest.as_mut_ptr(), rest.len());
                opcode::RecvMsg::new(fd, self.rx_message.as_header()).build()
            }
            // At most RX_BYTES long.
            Some(_) | None => opcode::Recv::new(fd, rest.as_mut_ptr(), rest.len() as u32).build(),
        };
        // SAFETY: the receive buffer, the message and the payload's slot stay where they are and are not used until
        // the completion: the connection is dropped, and the slot freed, only after it.
        unsafe { ring.push(entry, token) };
        self.rx_in_flight = true;
    }

    /// Sends what waits. Returns true when the connection needs the server's care (its life moved on).
    pub(super) fn send(
        &mut self,
        cx: (Owner, bool),
        slots: &mut Slots,
        arena: &mut Arena,
        ring: &mut Ring,
    ) -> bool {
        let (owner, direct) = cx;
        let mut moved = false;
        if self.phase == Phase::Dead {
            return false;
        }
        while let Some(message) = self.tx.prepare(arena) {
            if direct && self.tx.is_lone() {
                // SAFETY: the message was just prepared over memory of this connection and held slots.
                match unsafe { send_now(self.socket.as_fd(), message) } {
                    Ok(count) => {
                        self.sent(count, slots, arena);
                        moved = true;
                        continue;
                    }
                    Err(Errno::INTR) => continue,
                    Err(Errno::AGAIN) => {}
                    Err(errno) => {
                        tracing::debug!(connection = self.index, %errno, "NBD send failed");
                        self.phase = Phase::Dead;
                        return true;
                    }
                }
            }
            let fd = Fd(self.socket.as_raw_fd());
            let entry = opcode::SendMsg::new(fd, message).flags(libc::MSG_NOSIGNAL as u32).build();
            // SAFETY: batch, vectors and header stay where they are until the completion (`tx.in_flight`), and the
            // slots of its payloads are freed only when they are sent or the connection is reaped.
            unsafe { ring.push_prompt(entry, Token::new(owner, KIND_SEND, self.index.into())) };
            self.tx.in_flight = true;
        }
        moved && (self.blocked != Blocked::No || self.phase != Phase::Transmission)
    }

    /// Moves on to the next phase when what it waits for is done.
    pub(super) fn settle(&mut self, refusing: bool) {
        let receiving = usize::from(self.receiving.is_some());
        let is_done = self.tx.is_empty() && self.in_flight == receiving;
        let is_over = match self.phase {
            Phase::Finishing => is_done,
            // A blocked one has requests that are still to be refused.
            Phase::Transmission => is_done && refusing && self.blocked == Blocked::No,
            Phase::Negotiating(_) | Phase::Lingering | Phase::Dead => false,
        };
        if !is_over {
            return;
        }
        if self.rx_ended {
            self.phase = Phase::Dead;
            return;
        }
        self.enter(Phase::Lingering);
        // A peer that is gone already is found by the receive.
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Write);
    }

    /// Makes the operations in flight end.
    pub(super) fn cut(&mut self, owner: Owner, ring: &mut Ring) {
        self.phase = Phase::Dead;
        // Not connected any more is as good.
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Both);
        if self.rx_in_flight {
            ring.cancel(Token::new(owner, KIND_RECV, self.index.into()));
        }
        if self.tx.in_flight {
            ring.cancel(Token::new(owner, KIND_SEND, self.index.into()));
        }
    }
}

/// Hands a slot to the loop.
pub(super) fn issue(index: u16, owner: Owner, slots: &mut Slots) -> Option<Request> {
    let slot = slots.get_mut(index);
    let op = slot.operation()?;
    slot.stage = Stage::Issued;
    Some(Request { id: request_id(owner.0, index, slot.generation), op })
}

/// The piece of a zeroing that begins at `start_bytes`.
pub(super) fn zero_piece(start_bytes: u64, end_bytes: u64, config: &NbdConfig) -> ByteRange {
    let sector_bytes = u64::from(config.geometry.sector_bytes.max(1));
    let most_bytes = (config.zero_max_bytes / sector_bytes * sector_bytes).max(sector_bytes);
    ByteRange::new(start_bytes, (end_bytes - start_bytes).min(most_bytes))
}

pub(super) fn release(arena: &mut Arena, buffer: Option<BufferId>) {
    if let Some(buffer) = buffer {
        arena.release(buffer);
    }
}

fn put_error(bytes: &mut Vec<u8>, cookie: u64, error: WireError, structured: bool) {
    if structured {
        wire::put_error_chunk(bytes, cookie, error);
    } else {
        wire::put_simple_reply(bytes, cookie, Some(error));
    }
}
