//! The server: listeners, connections, and what the volume's loop calls.

use std::net::SocketAddr;
use std::os::fd::{FromRawFd, OwnedFd};
use std::time::Duration;

use duplex_core::ids::RequestId;
use duplex_core::request::{Request, RequestError};
use duplex_core::time::Instant;
use duplex_ring::{Arena, Completion, Errno, Owner, Ring, Token};
use io_uring::{opcode, types::Fd};

use super::config::{AllocationExtent, AllocationSource, ListenAddress, NbdConfig, NbdError};
use super::connection::{
    Blocked, Connection, Context, KIND_RECV, KIND_SEND, Phase, RX_BYTES, issue, release, zero_piece,
};
use super::listen::{OpenListener, set_up_tcp};
use super::negotiate::Export;
use super::slots::{Kind, Slots, Stage};
use crate::{FrontendEvent, request_generation, request_owner, request_slot};

const KIND_ACCEPT: u16 = 1;
const KIND_CARE: u16 = 4;
/// Receive buffers kept for the next connections.
const SPARE_RX_MAX: usize = 4;
/// Pause after an accept that failed, for want of descriptors say.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);
/// Preferred request size told to clients.
const PREFERRED_BYTES: u32 = 4096;

/// Whether clients are served.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ServerState {
    /// Requests are taken.
    Serving,
    /// Requests are refused with `ESHUTDOWN`, new clients with the text. Connections in use end when their requests
    /// in flight are answered.
    Refusing {
        /// For a person: "secondary; primary is alpha".
        text: String,
    },
}

struct Listener {
    address: ListenAddress,
    open: Option<OpenListener>,
    accept_in_flight: bool,
    /// When the last accept failed, as far as the clock has seen it.
    paused: Option<Option<Instant>>,
}

impl Listener {
    const fn is_tcp(&self) -> bool {
        match self.address {
            ListenAddress::Tcp(_) => true,
            ListenAddress::Unix { .. } => false,
        }
    }
}

/// The NBD server of one volume: a component of the volume's thread.
///
/// The loop calls [`start`](Self::start) once, [`on_completion`](Self::on_completion) for completions of its owner,
/// [`complete`](Self::complete) for every request it was given, [`flush`](Self::flush) in every turn, and
/// [`on_time`](Self::on_time) when [`deadline`](Self::deadline) has come. It begins refusing; see
/// [`set_state`](Self::set_state). To end: [`close`](Self::close), then turn until [`is_idle`](Self::is_idle).
pub struct NbdServer {
    owner: Owner,
    config: NbdConfig,
    export: Export,
    state: ServerState,
    listeners: Vec<Listener>,
    connections: Vec<Option<Box<Connection>>>,
    connection_count: usize,
    /// Every connection's place lies before this one: most have one client, and every turn looks at each place.
    connections_end: usize,
    slots: Slots,
    allocation: Option<Box<dyn AllocationSource + Send>>,
    extents: Vec<AllocationExtent>,
    spare_rx: Vec<Vec<u8>>,
    /// Requests whose next piece is to be handed to the loop.
    pieces: Vec<u16>,
    /// Something needs `care`, which runs on the completion of a no-op: only there can events be given out.
    care_wanted: bool,
    care_in_flight: bool,
    care_turn: usize,
    closing: bool,
}

impl NbdServer {
    /// A server that refuses its clients until [`set_state`](Self::set_state) says otherwise.
    pub fn new(owner: Owner, config: NbdConfig) -> Self {
        let geometry = config.geometry;
        let export = Export {
            name: config.export.clone(),
            is_default: config.is_default,
            size_bytes: geometry.size_bytes,
            sector_bytes: geometry.sector_bytes,
            preferred_bytes: PREFERRED_BYTES.max(geometry.sector_bytes),
            // 1 MiB.
            max_bytes: duplex_core::limits::REQUEST_MAX_BYTES as u32,
            read_only: geometry.read_only,
        };
        let listeners = config.listeners.iter().map(|address| Listener {
            address: address.clone(),
            open: None,
            accept_in_flight: false,
            paused: None,
        });
        let connections_max = config.connections_max.clamp(1, usize::from(u16::MAX));
        Self {
            owner,
            export,
            state: ServerState::Refusing { text: "the volume is not served yet".to_owned() },
            listeners: listeners.collect(),
            connections: (0..connections_max).map(|_| None).collect(),
            connection_count: 0,
            connections_end: 0,
            slots: Slots::new(config.requests_max),
            config,
            allocation: None,
            extents: Vec::new(),
            spare_rx: Vec::new(),
            pieces: Vec::new(),
            care_wanted: false,
            care_in_flight: false,
            care_turn: 0,
            closing: false,
        }
    }

    /// Answers block status from `source` instead of "all data".
    pub fn set_allocation_source(&mut self, source: Box<dyn AllocationSource + Send>) {
        self.allocation = Some(source);
    }

    /// Opens the listeners of the present state. After an error nothing more is opened; what is open stays.
    pub fn start(&mut self, ring: &mut Ring, _arena: &mut Arena) -> Result<(), NbdError> {
        self.open_listeners(ring)
    }

    /// Serves or refuses from now on. Going to serve opens the TCP listeners, which is what can fail: the state is
    /// the new one nevertheless, and Unix sockets work.
    pub fn set_state(&mut self, state: ServerState, ring: &mut Ring) -> Result<(), NbdError> {
        self.state = state;
        self.want_care(ring);
        for connection in self.connections.iter_mut().flatten() {
            if connection.phase == Phase::Transmission {
                connection.since = None;
            }
        }
        match self.state {
            ServerState::Serving => self.open_listeners(ring),
            ServerState::Refusing { .. } => {
                self.close_listeners(ring, Listener::is_tcp);
                Ok(())
            }
        }
    }

    /// The present state.
    pub const fn state(&self) -> &ServerState {
        &self.state
    }

    /// Connections, negotiating and ending ones included.
    pub const fn connections(&self) -> usize {
        self.connection_count
    }

    /// Requests in flight, those of clients that are gone included.
    pub fn requests_in_flight(&self) -> usize {
        self.slots.in_use()
    }

    /// The bound TCP addresses, in the listeners' order: the kernel's choice where port 0 was configured.
    pub fn tcp_addresses(&self) -> Vec<SocketAddr> {
        self.listeners.iter().filter_map(|listener| listener.open.as_ref()?.local()).collect()
    }

    /// Takes in a completion of this owner.
    pub fn on_completion(
        &mut self,
        completion: Completion,
        ring: &mut Ring,
        arena: &mut Arena,
        out: &mut Vec<FrontendEvent>,
    ) {
        let index = completion.token.index as usize;
        match completion.token.kind {
            KIND_RECV => self.on_received(index, completion.outcome(), ring, arena, out),
            KIND_SEND => self.on_sent(index, completion.outcome(), ring, arena, out),
            KIND_ACCEPT => self.on_accepted(index, completion.outcome(), ring, arena),
            KIND_CARE => {
                self.care_in_flight = false;
                self.care(ring, arena, out);
            }
            other => tracing::error!(kind = other, "completion of a kind the NBD server never pushed"),
        }
    }

    /// Takes back a request. The write's buffer is released here, the read's when its data is sent. A name that is
    /// not in flight is ignored.
    pub fn complete(
        &mut self,
        id: RequestId,
        result: Result<(), RequestError>,
        _ring: &mut Ring,
        arena: &mut Arena,
    ) {
        let index = request_slot(id);
        let issued = self.slots.issued(index, request_generation(id));
        let Some(slot) = issued.filter(|_| request_owner(id) == self.owner.0) else {
            debug_assert!(false, "completion of {id:?}, which is not in flight");
            tracing::error!(request = id.0, "completion of an NBD request that is not in flight");
            return;
        };
        let connection = slot.connection.and_then(|at| self.connections[usize::from(at)].as_mut());
        let Some(connection) = connection else {
            release(arena, self.slots.free(index));
            return;
        };
        if let Kind::Zero { end_bytes, .. } = slot.kind
            && slot.range.end_bytes() < end_bytes
            && result.is_ok()
        {
            self.pieces.push(index);
            self.care_wanted = true;
            return;
        }
        connection.answer(index, result, &mut self.slots, arena);
    }

    /// Sends what waits: one message per connection.
    pub fn flush(&mut self, ring: &mut Ring, arena: &mut Arena) {
        let refusing = self.state != ServerState::Serving;
        for connection in self.connections[..self.connections_end].iter_mut().flatten() {
            let how = (self.owner, self.config.direct_send);
            let mut moved = connection.send(how, &mut self.slots, arena, ring);
            moved |= match connection.blocked {
                Blocked::Room(bytes) => has_room(connection, bytes, &self.slots, &self.config, arena),
                Blocked::No | Blocked::Sending => false,
            };
            let ends =
                connection.phase == Phase::Finishing || (refusing && connection.phase == Phase::Transmission);
            if ends {
                connection.settle(refusing);
                moved |= connection.phase != Phase::Finishing && connection.phase != Phase::Transmission;
            }
            self.care_wanted |= moved;
        }
        if self.care_wanted && !self.care_in_flight {
            self.want_care(ring);
        }
    }

    /// When [`on_time`](Self::on_time) is to be called next.
    pub fn deadline(&self) -> Option<Instant> {
        let refusing = self.state != ServerState::Serving;
        let connections = self.connections[..self.connections_end].iter().flatten();
        let connections = connections.filter_map(|connection| {
            let timeout = connection.timeout(refusing, &self.config)?;
            Some(connection.since.map_or(Instant(0), |since| since + timeout))
        });
        let accepts = self
            .listeners
            .iter()
            .filter_map(|listener| Some(listener.paused?.map_or(Instant(0), |since| since + ACCEPT_PAUSE)));
        connections.chain(accepts).min()
    }

    /// Ends negotiations and farewells that took too long, and takes up listening again after an error.
    pub fn on_time(&mut self, now: Instant, ring: &mut Ring) {
        let refusing = self.state != ServerState::Serving;
        let mut expired = false;
        for connection in self.connections.iter_mut().flatten() {
            let Some(timeout) = connection.timeout(refusing, &self.config) else { continue };
            if now >= *connection.since.get_or_insert(now) + timeout {
                tracing::debug!(export = %self.export.name, "NBD client took too long");
                connection.cut(self.owner, ring);
                expired = true;
            }
        }
        if expired {
            self.want_care(ring);
        }
        for listener in &mut self.listeners {
            if let Some(since) = &mut listener.paused
                && now >= *since.get_or_insert(now) + ACCEPT_PAUSE
            {
                listener.paused = None;
            }
        }
        self.arm_accepts(ring);
    }

    /// Ends everything: listeners and connections. Requests that the loop has are still to be completed.
    pub fn close(&mut self, ring: &mut Ring) {
        self.closing = true;
        self.close_listeners(ring, |_| true);
        for connection in self.connections.iter_mut().flatten() {
            connection.cut(self.owner, ring);
        }
        self.want_care(ring);
    }

    /// True when the kernel uses nothing of the server and no request is in flight: after [`close`](Self::close)
    /// it may be dropped.
    pub fn is_idle(&self) -> bool {
        let accepting = self.listeners.iter().any(|listener| listener.accept_in_flight);
        !accepting && self.connection_count == 0 && !self.care_in_flight && self.slots.in_use() == 0
    }

    fn want_care(&mut self, ring: &mut Ring) {
        if self.care_in_flight {
            // It may run before what is wanted now is there to be done.
            self.care_wanted = true;
            return;
        }
        self.care_wanted = false;
        self.care_in_flight = true;
        // SAFETY: a no-op points to nothing.
        unsafe { ring.push(opcode::Nop::new().build(), Token::new(self.owner, KIND_CARE, 0)) };
    }

    fn open_listeners(&mut self, ring: &mut Ring) -> Result<(), NbdError> {
        let serving = self.state == ServerState::Serving;
        for listener in &mut self.listeners {
            if listener.open.is_none() && (serving || !listener.is_tcp()) {
                listener.open = Some(OpenListener::open(&listener.address)?);
            }
        }
        self.arm_accepts(ring);
        Ok(())
    }

    fn close_listeners(&mut self, ring: &mut Ring, which: impl Fn(&Listener) -> bool) {
        for (index, listener) in self.listeners.iter_mut().enumerate() {
            if !which(listener) {
                continue;
            }
            listener.paused = None;
            if listener.accept_in_flight {
                ring.cancel(Token::new(self.owner, KIND_ACCEPT, index as u32));
            } else {
                listener.open = None;
            }
        }
    }

    fn arm_accepts(&mut self, ring: &mut Ring) {
        // Accepts in flight count as connections, so that there is always a place for who comes.
        let mut places = self.connections.len() - self.connection_count;
        places = places.saturating_sub(self.listeners.iter().filter(|one| one.accept_in_flight).count());
        for (index, listener) in self.listeners.iter_mut().enumerate() {
            if listener.accept_in_flight || listener.paused.is_some() || places == 0 || self.closing {
                continue;
            }
            let Some(open) = &listener.open else { continue };
            let null = std::ptr::null_mut();
            let entry = opcode::Accept::new(Fd(open.as_raw_fd()), null, null.cast());
            let entry = entry.flags(libc::SOCK_CLOEXEC).build();
            // SAFETY: no memory is given; the descriptor is closed only when no accept is in flight.
            unsafe { ring.push(entry, Token::new(self.owner, KIND_ACCEPT, index as u32)) };
            listener.accept_in_flight = true;
            places -= 1;
        }
    }

    fn on_accepted(&mut self, index: usize, outcome: Result<u32, Errno>, ring: &mut Ring, arena: &mut Arena) {
        let refusing = self.state != ServerState::Serving;
        let Some(listener) = self.listeners.get_mut(index) else { return };
        listener.accept_in_flight = false;
        let is_tcp = listener.is_tcp();
        let unwanted = self.closing || (is_tcp && refusing);
        if unwanted {
            listener.open = None;
        }
        match outcome {
            Ok(descriptor) => {
                // SAFETY: the kernel has just made the descriptor for us; nobody else has it.
                let socket = unsafe { OwnedFd::from_raw_fd(descriptor as i32) };
                if !unwanted && self.may_enter(&socket, is_tcp) {
                    self.add_connection(socket, ring, arena);
                }
            }
            Err(Errno::CANCELED | Errno::INTR | Errno::AGAIN | Errno::CONNABORTED) => {}
            Err(errno) => {
                tracing::warn!(listener = %listener.address, %errno, "accepting an NBD client failed");
                listener.paused = Some(None);
            }
        }
        self.arm_accepts(ring);
    }

    fn may_enter(&self, socket: &OwnedFd, is_tcp: bool) -> bool {
        if !is_tcp {
            return true;
        }
        match set_up_tcp(socket) {
            Ok(peer) => {
                let allowed = self.config.allowed.iter().any(|network| network.contains(peer.ip()));
                if !allowed {
                    tracing::warn!(%peer, export = %self.export.name, "NBD client is not in the allowed networks");
                }
                allowed
            }
            Err(error) => {
                tracing::debug!(%error, "NBD client was gone before it was looked at");
                false
            }
        }
    }

    fn add_connection(&mut self, socket: OwnedFd, ring: &mut Ring, arena: &mut Arena) {
        // There is a place: `arm_accepts` saw to it.
        let Some(index) = self.connections.iter().position(Option::is_none) else { return };
        let rx = self.spare_rx.pop().unwrap_or_else(|| vec![0; RX_BYTES]);
        let mut connection = Box::new(Connection::new(socket, index as u16, rx));
        connection.arm_receive(self.owner, &self.slots, arena, ring);
        self.connections[index] = Some(connection);
        self.connection_count += 1;
        self.connections_end = self.connections_end.max(index + 1);
    }

    fn on_received(
        &mut self,
        index: usize,
        outcome: Result<u32, Errno>,
        ring: &mut Ring,
        arena: &mut Arena,
        out: &mut Vec<FrontendEvent>,
    ) {
        if let Some(Some(connection)) = self.connections.get_mut(index) {
            connection.on_received(outcome, &mut self.slots);
            self.attend(index, ring, arena, out);
        }
    }

    fn on_sent(
        &mut self,
        index: usize,
        outcome: Result<u32, Errno>,
        ring: &mut Ring,
        arena: &mut Arena,
        out: &mut Vec<FrontendEvent>,
    ) {
        if let Some(Some(connection)) = self.connections.get_mut(index) {
            connection.on_sent(outcome, &mut self.slots, arena);
            if connection.blocked != Blocked::No || connection.phase != Phase::Transmission {
                self.attend(index, ring, arena, out);
            }
        }
    }

    /// Works on a connection's input, moves its life on, arms its receive.
    fn attend(&mut self, index: usize, ring: &mut Ring, arena: &mut Arena, out: &mut Vec<FrontendEvent>) {
        let Some(Some(connection)) = self.connections.get_mut(index) else { return };
        let refusal = match &self.state {
            ServerState::Serving => None,
            ServerState::Refusing { text } => Some(text.as_str()),
        };
        if !connection.rx_in_flight {
            connection.pump(&mut Context {
                owner: self.owner,
                config: &self.config,
                export: &self.export,
                refusal,
                slots: &mut self.slots,
                allocation: &mut self.allocation,
                extents: &mut self.extents,
                arena,
                out,
            });
        }
        connection.settle(refusal.is_some());
        if connection.phase == Phase::Dead {
            connection.cut(self.owner, ring);
            if connection.is_reaped() {
                self.remove(index, ring, arena, out);
            }
            return;
        }
        connection.arm_receive(self.owner, &self.slots, arena, ring);
    }

    fn remove(&mut self, index: usize, ring: &mut Ring, arena: &mut Arena, out: &mut Vec<FrontendEvent>) {
        let Some(connection) = self.connections[index].take() else { return };
        for slot in self.slots.of_connection(index as u16) {
            match self.slots.get(slot).stage {
                Stage::Issued => self.slots.get_mut(slot).connection = None,
                Stage::Receiving { .. } | Stage::Sending => release(arena, self.slots.free(slot)),
                Stage::Free => {}
            }
        }
        if connection.opened {
            out.push(FrontendEvent::ClientClosed);
        }
        self.connection_count -= 1;
        self.connections_end = self.connections.iter().rposition(Option::is_some).map_or(0, |last| last + 1);
        if self.spare_rx.len() < SPARE_RX_MAX {
            self.spare_rx.push(connection.into_rx());
        }
        self.arm_accepts(ring);
    }

    /// What could not be done where it was noticed: next pieces, blocked connections, ends.
    fn care(&mut self, ring: &mut Ring, arena: &mut Arena, out: &mut Vec<FrontendEvent>) {
        for index in std::mem::take(&mut self.pieces) {
            out.extend(self.next_piece(index, arena).map(FrontendEvent::Request));
        }
        // A different connection is first every time, so that none takes all the room.
        let count = self.connections.len();
        self.care_turn = (self.care_turn + 1) % count;
        for step in 0..count {
            self.attend((self.care_turn + step) % count, ring, arena, out);
        }
    }

    fn next_piece(&mut self, index: u16, arena: &mut Arena) -> Option<Request> {
        let serving = self.state == ServerState::Serving;
        let slot = self.slots.get_mut(index);
        let Kind::Zero { end_bytes, .. } = slot.kind else { return None };
        let connection = slot.connection.and_then(|at| self.connections[usize::from(at)].as_mut());
        match connection {
            None => {
                release(arena, self.slots.free(index));
                None
            }
            Some(connection) if !serving => {
                connection.answer(index, Err(RequestError::NotServing), &mut self.slots, arena);
                None
            }
            Some(_) => {
                slot.range = zero_piece(slot.range.end_bytes(), end_bytes, &self.config);
                slot.generation = slot.generation.wrapping_add(1);
                issue(index, self.owner, &mut self.slots)
            }
        }
    }
}

fn has_room(
    connection: &Connection,
    buffer_bytes: usize,
    slots: &Slots,
    config: &NbdConfig,
    arena: &mut Arena,
) -> bool {
    if !connection.may_admit(buffer_bytes, slots, config) {
        return false;
    }
    if buffer_bytes == 0 {
        return true;
    }
    let buffer = arena.alloc(buffer_bytes);
    release(arena, buffer);
    buffer.is_some()
}
