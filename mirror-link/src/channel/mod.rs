//! A volume's side of the link, on the volume's own ring: messages with payload, each once and in order, over
//! whatever connection there is.

mod connection;
mod ledger;
mod parser;

use duplex_core::ids::{BufferId, SessionId, VolumeIndex};
use duplex_core::message::VolumeMessage;
use duplex_ring::{Arena, Completion, Errno, Owner, Ring};

use crate::codec::EncodeError;
use crate::control::{LinkWord, encode_link};
use crate::frame::{FrameError, HEAD_BYTES, Head};
use crate::link::DataConnection;
use crate::path::PathCounters;

use connection::{Connection, with_plain};
use ledger::Ledger;
use parser::{Item, Parser};

const KIND_RECEIVE: u16 = 1;
const KIND_SEND: u16 = 2;

/// Bounds of a channel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ChannelLimits {
    /// Unacknowledged bytes, headers included, in each direction.
    pub window_bytes: u64,
    /// Unacknowledged frames in each direction.
    pub window_frames: u64,
    /// The receive buffer. Measured: 64 KiB is enough, less is not.
    pub receive_bytes: usize,
    /// Frames in one send.
    pub send_frames: usize,
    /// Payload after which a send takes no further frame.
    pub send_bytes: usize,
    /// Received frames after which an acknowledgement goes out alone.
    pub ack_frames: u64,
    /// Received bytes after which an acknowledgement goes out alone.
    pub ack_bytes: u64,
}

impl Default for ChannelLimits {
    fn default() -> Self {
        Self {
            window_bytes: 32 << 20,
            window_frames: 4096,
            receive_bytes: 256 << 10,
            send_frames: 64,
            send_bytes: 1 << 20,
            ack_frames: 64,
            ack_bytes: 64 << 10,
        }
    }
}

/// Why a connection of a channel is over. Nothing is lost: the next one carries on.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BreakReason {
    /// The peer closed it.
    #[error("the peer closed the data connection")]
    Closed,
    /// The network.
    #[error("data connection: {0}")]
    Io(Errno),
    /// TLS: altered bytes, too.
    #[error("data connection: {0}")]
    Tls(String),
    /// What came is not what may come.
    #[error("data connection: {0}")]
    Frame(FrameError),
    /// The two sides do not remember the same session: it has to be closed.
    #[error("data connection: {0}: close the session")]
    Mismatch(&'static str),
}

/// What a channel tells its volume's loop.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ChannelEvent {
    /// The peer said this. A payload's buffer carries one reference, which is now the receiver's.
    Message(VolumeMessage, Option<BufferId>),
    /// The connection of this attempt is lost: tell [`crate::LinkHandle::data_broken`]; another one will come to
    /// [`DataChannel::attach`]. A [`BreakReason::Mismatch`] ends the session instead.
    Broken {
        /// Of the connection.
        attempt: u64,
        /// Why.
        reason: BreakReason,
    },
    /// A frame was altered on the way; `Broken` follows, and the frame will be sent again.
    Corrupt {
        /// On which path.
        path: u16,
        /// What was wrong.
        why: String,
    },
}

/// A message was not taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ChannelError {
    /// It is no frame.
    #[error(transparent)]
    Encode(#[from] EncodeError),
    /// Twice the window is unacknowledged: the owner did not look at [`DataChannel::has_room`].
    #[error("{frames} frames and {bytes} bytes wait for the peer, twice the window: wait for room")]
    Full {
        /// Kept.
        frames: usize,
        /// Kept.
        bytes: u64,
    },
    /// After [`DataChannel::close`].
    #[error("the channel is closed")]
    Closed,
}

/// One volume's channel of one session.
///
/// Each turn of the volume's loop: completions of this owner to [`DataChannel::on_completion`], then
/// [`DataChannel::resume_receiving`] (buffers may have become free), the volume's messages to
/// [`DataChannel::send`], and last [`DataChannel::flush`], which puts at most one send and one receive into the ring.
pub struct DataChannel {
    owner: Owner,
    session: SessionId,
    volume: VolumeIndex,
    limits: ChannelLimits,
    ledger: Ledger,
    connection: Option<Connection>,
    /// Connections that are over and still have operations in flight.
    ending: Vec<Connection>,
    newest_attempt: u64,
    next_index: u32,
    closed: bool,
}

impl DataChannel {
    /// A channel without a connection: messages wait for one.
    pub fn new(owner: Owner, session: SessionId, volume: VolumeIndex, limits: ChannelLimits) -> Self {
        Self {
            owner,
            session,
            volume,
            limits,
            ledger: Ledger::new(volume, limits),
            connection: None,
            ending: Vec::new(),
            newest_attempt: 0,
            next_index: 0,
            closed: false,
        }
    }

    /// The session it belongs to.
    pub const fn session(&self) -> SessionId {
        self.session
    }

    /// The attempt number of the present connection.
    pub fn attempt(&self) -> Option<u64> {
        self.connection.as_ref().map(|connection| connection.attempt)
    }

    /// Takes a connection into use, in place of the present one; what the peer has not received is sent again on it.
    /// `false`: it is of another session or volume, or older than the present one, and was closed.
    pub fn attach(&mut self, data: DataConnection, arena: &mut Arena, out: &mut Vec<ChannelEvent>) -> bool {
        let fits = data.session == self.session && data.volume == self.volume;
        if self.closed || !fits || data.attempt <= self.newest_attempt {
            return false;
        }
        self.newest_attempt = data.attempt;
        self.retire(arena);
        let flown = self.ledger.restart();
        PathCounters::add(&data.counters.frames_resent, flown as u64);
        self.next_index = self.next_index.wrapping_add(1);
        let parser = Parser::new(self.ledger.channel());
        self.connection = Some(Connection::new(self.next_index, data, parser, self.limits));
        self.parse(arena, out);
        true
    }

    /// Takes a message for the peer; it goes out at the next [`DataChannel::flush`]. The payload is the first
    /// `message.payload_bytes()` bytes of `buffer`, of which the channel takes its own reference until the peer has
    /// it; the content must not change until then.
    pub fn send(
        &mut self,
        message: &VolumeMessage,
        buffer: Option<BufferId>,
        arena: &mut Arena,
    ) -> Result<(), ChannelError> {
        if self.closed {
            return Err(ChannelError::Closed);
        }
        if !self.ledger.is_within(2) {
            let (frames, bytes) = self.ledger.unacknowledged();
            return Err(ChannelError::Full { frames, bytes });
        }
        Ok(self.ledger.keep(message, buffer, arena)?)
    }

    /// Is less than the window unacknowledged? While not, take no further work that has to be sent.
    pub fn has_room(&self) -> bool {
        self.ledger.is_within(1)
    }

    /// Frames and bytes the peer has not acknowledged.
    pub fn unacknowledged(&self) -> (usize, u64) {
        self.ledger.unacknowledged()
    }

    /// Acknowledges at the next flush whatever was received: for a loop that goes idle. Not needed for progress.
    pub const fn acknowledge(&mut self) {
        self.ledger.acknowledge_now();
    }

    /// Goes on with a payload for which the arena had no room. Cheap when there is none.
    pub fn resume_receiving(&mut self, arena: &mut Arena, out: &mut Vec<ChannelEvent>) {
        if self.connection.as_ref().is_some_and(|connection| connection.starved) {
            self.parse(arena, out);
        }
    }

    /// Puts everything queued into the ring: at most one send and one receive.
    pub fn flush(&mut self, ring: &mut Ring, arena: &mut Arena, out: &mut Vec<ChannelEvent>) {
        let Some(connection) = &mut self.connection else { return };
        if !connection.is_sending() {
            let resume = (!connection.resume_sent).then(|| self.resume());
            let Some(connection) = &mut self.connection else { return };
            let ack = (resume.is_none() && connection.resumed && self.ledger.ack_is_due())
                .then(|| self.ledger.received());
            connection.resume_sent = true;
            let sent =
                connection.transmit(ack_head(ack, &self.ledger), resume.as_deref(), &mut self.ledger, arena);
            match sent {
                Ok(true) => connection.start_send(self.owner, ring),
                Ok(false) => {}
                Err(error) => return self.lost(BreakReason::Tls(error.to_string()), arena, out),
            }
        }
        if let Some(connection) = &mut self.connection {
            connection.receive(self.owner, ring, arena);
        }
    }

    fn resume(&self) -> Vec<u8> {
        let word = LinkWord::Resume {
            session: self.session,
            received: self.ledger.received(),
            window_bytes: self.limits.window_bytes,
            window_frames: self.limits.window_frames,
        };
        encode_link(&word, self.ledger.channel(), self.ledger.received()).unwrap_or_default()
    }

    /// A completion of this owner.
    pub fn on_completion(
        &mut self,
        completion: Completion,
        ring: &mut Ring,
        arena: &mut Arena,
        out: &mut Vec<ChannelEvent>,
    ) {
        let index = completion.token.index;
        match &mut self.connection {
            Some(connection) if connection.index == index => match completion.token.kind {
                KIND_RECEIVE => self.received(completion.outcome(), arena, out),
                KIND_SEND => self.sent(completion.outcome(), ring, arena, out),
                _ => {}
            },
            Some(_) | None => self.ended(completion, arena),
        }
    }

    /// A completion of a connection that is over.
    fn ended(&mut self, completion: Completion, arena: &mut Arena) {
        let index = completion.token.index;
        if let Some(connection) = self.ending.iter_mut().find(|connection| connection.index == index) {
            match completion.token.kind {
                KIND_RECEIVE => connection.receive_done(),
                KIND_SEND => connection.send_failed(),
                _ => {}
            }
            connection.release(arena);
        }
        self.ending.retain(Connection::is_busy);
    }

    fn received(&mut self, outcome: Result<u32, Errno>, arena: &mut Arena, out: &mut Vec<ChannelEvent>) {
        let Some(connection) = &mut self.connection else { return };
        connection.receive_done();
        match outcome {
            Ok(0) => self.lost(BreakReason::Closed, arena, out),
            Ok(count) => {
                connection.came(count as usize);
                self.parse(arena, out);
            }
            Err(Errno::INTR | Errno::AGAIN) => {}
            Err(errno) => self.lost(BreakReason::Io(errno), arena, out),
        }
    }

    fn sent(
        &mut self,
        outcome: Result<u32, Errno>,
        ring: &mut Ring,
        arena: &mut Arena,
        out: &mut Vec<ChannelEvent>,
    ) {
        let Some(connection) = &mut self.connection else { return };
        let count = match outcome {
            Ok(count) => count as usize,
            Err(Errno::INTR | Errno::AGAIN) => 0,
            Err(errno) => {
                connection.send_failed();
                return self.lost(BreakReason::Io(errno), arena, out);
            }
        };
        if connection.sent(count, arena) {
            connection.start_send(self.owner, ring);
        }
    }

    /// Parses whatever came in, until nothing is left or the arena is exhausted.
    fn parse(&mut self, arena: &mut Arena, out: &mut Vec<ChannelEvent>) {
        if let Err(reason) = self.parse_all(arena, out) {
            let corrupt = match &reason {
                BreakReason::Frame(error) => error.is_corruption(),
                BreakReason::Tls(_) => true,
                BreakReason::Closed | BreakReason::Io(_) | BreakReason::Mismatch(_) => false,
            };
            if let Some(connection) = self.connection.as_ref().filter(|_| corrupt) {
                PathCounters::add(&connection.counters.corrupt_frames, 1);
                out.push(ChannelEvent::Corrupt { path: connection.path, why: reason.to_string() });
            }
            self.lost(reason, arena, out);
        }
    }

    fn parse_all(&mut self, arena: &mut Arena, out: &mut Vec<ChannelEvent>) -> Result<(), BreakReason> {
        let Some(connection) = &mut self.connection else { return Ok(()) };
        let (session, ledger) = (self.session, &mut self.ledger);
        connection.starved = false;
        let parser = &mut connection.parser;
        let resumed = &mut connection.resumed;
        let mut feed = |input: &mut &[u8], arena: &mut Arena| {
            consume(parser, ledger, session, resumed, input, arena, out)
        };
        let mut early = &connection.early[connection.early_at..];
        if !early.is_empty() {
            connection.starved = !feed(&mut early, arena)?;
            connection.early_at = connection.early.len() - early.len();
        }
        if connection.starved {
            return Ok(());
        }
        if connection.tls.is_none() {
            let mut input = &connection.received[connection.received_at..connection.received_end];
            connection.starved = !feed(&mut input, arena)?;
            connection.received_at = connection.received_end - input.len();
            return Ok(());
        }
        loop {
            if let Some(tls) = &mut connection.tls {
                loop {
                    let fed = with_plain(tls, |input| feed(input, arena));
                    match fed.map_err(|error| BreakReason::Tls(error.to_string()))? {
                        Some(fed) => connection.starved = !fed?,
                        None => break,
                    }
                    if connection.starved {
                        return Ok(());
                    }
                }
            }
            let mut raw = &connection.received[connection.received_at..connection.received_end];
            if raw.is_empty() {
                return Ok(());
            }
            if let Some(tls) = &mut connection.tls {
                connection.received_at +=
                    tls.read_tls(&mut raw).map_err(|error| BreakReason::Tls(error.to_string()))?;
                tls.process_new_packets().map_err(|error| BreakReason::Tls(error.to_string()))?;
            }
        }
    }

    /// The present connection is over; another one will carry on.
    fn lost(&mut self, reason: BreakReason, arena: &mut Arena, out: &mut Vec<ChannelEvent>) {
        if let Some(attempt) = self.attempt() {
            self.retire(arena);
            out.push(ChannelEvent::Broken { attempt, reason });
        }
    }

    fn retire(&mut self, arena: &mut Arena) {
        if let Some(mut connection) = self.connection.take() {
            connection.shut_down();
            connection.release(arena);
            if connection.is_busy() {
                self.ending.push(connection);
            }
        }
    }

    /// Ends the channel: nothing more is sent or received, every buffer not in the kernel's hands is given back.
    /// Go on with completions until [`DataChannel::is_idle`].
    pub fn close(&mut self, arena: &mut Arena) {
        self.closed = true;
        self.retire(arena);
        self.ledger.clear(arena);
    }

    /// No operation is in flight: the channel may be dropped.
    pub fn is_idle(&self) -> bool {
        self.connection.is_none() && self.ending.is_empty()
    }
}

fn ack_head(ack: Option<u64>, ledger: &Ledger) -> Option<Head> {
    let frame = encode_link(&LinkWord::Ack, ledger.channel(), ack?).ok()?;
    frame.first_chunk::<HEAD_BYTES>().copied()
}

/// Feeds bytes to the parser and acts on what comes out. `false`: the arena is exhausted.
fn consume(
    parser: &mut Parser,
    ledger: &mut Ledger,
    session: SessionId,
    resumed: &mut bool,
    input: &mut &[u8],
    arena: &mut Arena,
    out: &mut Vec<ChannelEvent>,
) -> Result<bool, BreakReason> {
    loop {
        let Some(item) = parser.next(input, arena, ledger.received()).map_err(BreakReason::Frame)? else {
            return Ok(true);
        };
        let header = match &item {
            Item::Message(header, ..) | Item::Seen(header) | Item::Link(header, _) => *header,
            Item::Starved => return Ok(false),
        };
        let is_resume = matches!(&item, Item::Link(_, LinkWord::Resume { .. }));
        if is_resume == *resumed {
            if let Item::Message(_, _, Some(buffer)) = item {
                arena.release(buffer);
            }
            return Err(BreakReason::Mismatch("the first frame, and only the first, must be a resume"));
        }
        if !is_resume && !ledger.acknowledged(header.routing.ack, arena) {
            return Err(BreakReason::Mismatch("the peer acknowledged what was never sent"));
        }
        match item {
            Item::Message(_, message, buffer) => {
                if !ledger.arrived(header.routing.sequence, header.body_bytes) {
                    if let Some(buffer) = buffer {
                        arena.release(buffer);
                    }
                    return Err(BreakReason::Mismatch("a frame is missing"));
                }
                out.push(ChannelEvent::Message(message, buffer));
            }
            Item::Seen(_) => ledger.seen_again(),
            Item::Link(_, LinkWord::Resume { session: theirs, received, window_bytes, window_frames }) => {
                if theirs != session || !ledger.acknowledged(received, arena) {
                    return Err(BreakReason::Mismatch("the peer resumes another session"));
                }
                ledger.peer_window(window_bytes, window_frames);
                *resumed = true;
            }
            Item::Link(..) | Item::Starved => {}
        }
    }
}

#[cfg(test)]
mod tests;
