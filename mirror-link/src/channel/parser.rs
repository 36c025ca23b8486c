//! Frames out of a stream of bytes that comes in any pieces.

use duplex_core::ids::BufferId;
use duplex_core::message::VolumeMessage;
use duplex_ring::Arena;

use crate::codec::{decode_volume, is_payload};
use crate::control::{LinkWord, decode_link};
use crate::frame::{Channel, FrameError, HEAD_BYTES, Header, INLINE_MAX_BYTES, Kind};

/// What came.
#[derive(Debug)]
pub(super) enum Item {
    /// A message, with its payload's buffer (one reference, the receiver's).
    Message(Header, VolumeMessage, Option<BufferId>),
    /// A numbered frame that was received before, over another connection.
    Seen(Header),
    /// A word of the link.
    Link(Header, LinkWord),
    /// The arena has no buffer for the payload that comes next. Ask again later.
    Starved,
}

#[derive(Debug)]
enum State {
    /// Collecting a header (in `carry`).
    Head,
    /// Collecting a body that is part of the message (in `carry`).
    Inline(Header),
    /// A payload comes; it has no buffer yet.
    Unplaced(Header, VolumeMessage),
    /// Collecting a payload.
    Payload { header: Header, message: VolumeMessage, buffer: BufferId, filled: usize },
    /// Passing over the body of a frame seen before.
    Skip(Header, usize),
}

/// One connection's parser.
#[derive(Debug)]
pub(super) struct Parser {
    channel: Channel,
    /// A header or inline body in parts. Never grows beyond its first capacity.
    carry: Vec<u8>,
    state: State,
}

impl Parser {
    pub(super) fn new(channel: Channel) -> Self {
        let carry = Vec::with_capacity(HEAD_BYTES.max(INLINE_MAX_BYTES as usize));
        Self { channel, carry, state: State::Head }
    }

    /// Where the rest of a payload in progress goes: its buffer, the bytes already there, the bytes missing.
    pub(super) const fn rest(&self) -> Option<(BufferId, usize, usize)> {
        match &self.state {
            State::Payload { header, buffer, filled, .. } => {
                Some((*buffer, *filled, header.body_bytes as usize - *filled))
            }
            State::Head | State::Inline(_) | State::Unplaced(..) | State::Skip(..) => None,
        }
    }

    /// So many bytes of the rest were put in place by the kernel.
    pub(super) const fn placed(&mut self, count: usize) {
        if let State::Payload { filled, .. } = &mut self.state {
            *filled += count;
        }
    }

    /// The connection is over: its unfinished payload's buffer.
    pub(super) fn abandon(&mut self) -> Option<BufferId> {
        match std::mem::replace(&mut self.state, State::Head) {
            State::Payload { buffer, .. } => Some(buffer),
            State::Head | State::Inline(_) | State::Unplaced(..) | State::Skip(..) => None,
        }
    }

    /// Takes bytes from the front of `input` until something is whole. `None`: everything was taken.
    /// Frames up to `received` were seen before.
    pub(super) fn next(
        &mut self,
        input: &mut &[u8],
        arena: &mut Arena,
        received: u64,
    ) -> Result<Option<Item>, FrameError> {
        loop {
            match std::mem::replace(&mut self.state, State::Head) {
                State::Head => match self.head(input)? {
                    Some(header) => self.state = self.after_head(header, received)?,
                    None => return Ok(None),
                },
                State::Inline(header) => {
                    let Some(item) = self.inline(header, input)? else { return Ok(None) };
                    return Ok(Some(item));
                }
                State::Unplaced(header, message) => match arena.alloc(header.body_bytes as usize) {
                    Some(buffer) => self.state = State::Payload { header, message, buffer, filled: 0 },
                    None => {
                        self.state = State::Unplaced(header, message);
                        return Ok(Some(Item::Starved));
                    }
                },
                State::Payload { header, message, buffer, filled } => {
                    let total = header.body_bytes as usize;
                    let count = (total - filled).min(input.len());
                    arena.bytes_mut(buffer)[filled..filled + count].copy_from_slice(&input[..count]);
                    *input = &input[count..];
                    let filled = filled + count;
                    if filled < total {
                        self.state = State::Payload { header, message, buffer, filled };
                        return Ok(None);
                    }
                    if let Err(error) = header.check_body(&arena.bytes(buffer)[..total]) {
                        arena.release(buffer);
                        return Err(error);
                    }
                    return Ok(Some(Item::Message(header, message, Some(buffer))));
                }
                State::Skip(header, left) => {
                    let count = left.min(input.len());
                    *input = &input[count..];
                    if count < left {
                        self.state = State::Skip(header, left - count);
                        return Ok(None);
                    }
                    return Ok(Some(Item::Seen(header)));
                }
            }
        }
    }

    fn head(&mut self, input: &mut &[u8]) -> Result<Option<Header>, FrameError> {
        let Some(bytes) = collect(&mut self.carry, HEAD_BYTES, input) else { return Ok(None) };
        let head = bytes.first_chunk().ok_or(FrameError::HeadChecksum)?;
        let header = Header::decode(head)?;
        self.carry.clear();
        Ok(Some(header))
    }

    fn after_head(&self, header: Header, received: u64) -> Result<State, FrameError> {
        let kind = header.fields.kind;
        if header.routing.channel != self.channel {
            return Err(FrameError::Unexpected {
                kind,
                place: "on this connection: it is another channel's",
            });
        }
        if header.routing.sequence != 0 && header.routing.sequence <= received {
            return Ok(State::Skip(header, header.body_bytes as usize));
        }
        if is_payload(kind) && header.body_bytes > 0 {
            return Ok(State::Unplaced(header, decode_volume(&header, &[])?));
        }
        Ok(State::Inline(header))
    }

    fn inline(&mut self, header: Header, input: &mut &[u8]) -> Result<Option<Item>, FrameError> {
        // Every kind that gets here has a limit of INLINE_MAX_BYTES or less, but for those not allowed here.
        let kind = header.fields.kind;
        if header.body_bytes > INLINE_MAX_BYTES {
            return Err(FrameError::Unexpected { kind, place: "on a data connection" });
        }
        let wanted = header.body_bytes as usize;
        let item = match collect(&mut self.carry, wanted, input) {
            Some(body) => {
                header.check_body(body)?;
                if matches!(kind, Kind::LinkAck | Kind::Resume) {
                    Item::Link(header, decode_link(&header, body)?)
                } else {
                    Item::Message(header, decode_volume(&header, body)?, None)
                }
            }
            None => {
                self.state = State::Inline(header);
                return Ok(None);
            }
        };
        self.carry.clear();
        Ok(Some(item))
    }
}

/// Collects `wanted` bytes in `carry`, or finds them whole in the input. The caller clears `carry` afterwards.
fn collect<'c, 'i: 'c>(carry: &'c mut Vec<u8>, wanted: usize, input: &mut &'i [u8]) -> Option<&'c [u8]> {
    if carry.is_empty() && input.len() >= wanted {
        let (whole, rest) = input.split_at(wanted);
        *input = rest;
        return Some(whole);
    }
    let count = (wanted - carry.len()).min(input.len());
    carry.extend_from_slice(&input[..count]);
    *input = &input[count..];
    (carry.len() == wanted).then_some(&carry[..])
}
