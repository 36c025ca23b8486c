//! What a channel has sent and received, whatever the connection: numbers, credit, what is to be sent again.

use std::collections::VecDeque;
use std::sync::Arc;

use duplex_core::ids::{BufferId, VolumeIndex};
use duplex_core::message::VolumeMessage;
use duplex_ring::Arena;

use crate::codec::{Body, EncodeError, encode_volume};
use crate::frame::{Channel, HEAD_BYTES, Head, Routing};

use super::ChannelLimits;

/// What follows the header of a kept frame.
#[derive(Clone, Debug)]
pub(super) enum Kept {
    Nothing,
    /// So many bytes of an arena buffer, of which the ledger holds a reference.
    Buffer(BufferId, u32),
    Inline(Arc<[u8]>),
}

#[derive(Debug)]
pub(super) struct KeptFrame {
    pub(super) head: Head,
    pub(super) body: Kept,
}

impl KeptFrame {
    fn bytes(&self) -> u64 {
        let body = match &self.body {
            Kept::Nothing => 0,
            Kept::Buffer(_, bytes) => u64::from(*bytes),
            Kept::Inline(bytes) => bytes.len() as u64,
        };
        HEAD_BYTES as u64 + body
    }
}

/// See the module's text.
#[derive(Debug)]
pub(super) struct Ledger {
    channel: Channel,
    limits: ChannelLimits,
    /// Everything not acknowledged, oldest first.
    frames: VecDeque<KeptFrame>,
    bytes: u64,
    /// Number of the newest frame.
    numbered: u64,
    /// How many of `frames` went out on the present connection.
    flown: usize,
    flown_bytes: u64,
    /// What the peer takes unacknowledged.
    peer_frames: u64,
    peer_bytes: u64,
    received: u64,
    owed_frames: u64,
    owed_bytes: u64,
    ack_now: bool,
}

impl Ledger {
    pub(super) const fn new(volume: VolumeIndex, limits: ChannelLimits) -> Self {
        Self {
            channel: Channel::Volume(volume),
            limits,
            frames: VecDeque::new(),
            bytes: 0,
            numbered: 0,
            flown: 0,
            flown_bytes: 0,
            peer_frames: limits.window_frames,
            peer_bytes: limits.window_bytes,
            received: 0,
            owed_frames: 0,
            owed_bytes: 0,
            ack_now: false,
        }
    }

    pub(super) const fn channel(&self) -> Channel {
        self.channel
    }

    pub(super) const fn received(&self) -> u64 {
        self.received
    }

    pub(super) fn unacknowledged(&self) -> (usize, u64) {
        (self.frames.len(), self.bytes)
    }

    pub(super) fn is_within(&self, times: u64) -> bool {
        (self.frames.len() as u64) < self.limits.window_frames.saturating_mul(times)
            && self.bytes < self.limits.window_bytes.saturating_mul(times)
    }

    /// Numbers and keeps a message. Takes its own reference of the buffer.
    pub(super) fn keep(
        &mut self,
        message: &VolumeMessage,
        buffer: Option<BufferId>,
        arena: &mut Arena,
    ) -> Result<(), EncodeError> {
        let wanted_bytes = message.payload_bytes();
        let room = buffer.map_or(0, |buffer| arena.capacity(buffer) as u64);
        if wanted_bytes > room {
            return Err(EncodeError::Payload { given_bytes: room, wanted_bytes });
        }
        let (head, body) = {
            let routing = Routing { channel: self.channel, sequence: self.numbered + 1, ack: self.received };
            let bytes = match buffer {
                Some(buffer) => &arena.bytes(buffer)[..usize::try_from(wanted_bytes).unwrap_or(0)],
                None => &[],
            };
            let (head, body) = encode_volume(message, bytes, routing)?;
            let kept = match (body, buffer) {
                (Body::Inline(bytes), _) => Kept::Inline(bytes.into()),
                (Body::Payload(bytes), Some(buffer)) => {
                    Kept::Buffer(buffer, u32::try_from(bytes.len()).unwrap_or(u32::MAX))
                }
                (Body::Empty | Body::Payload(_), _) => Kept::Nothing,
            };
            (head, kept)
        };
        if let Kept::Buffer(buffer, _) = body {
            arena.retain(buffer);
        }
        let frame = KeptFrame { head, body };
        self.numbered += 1;
        self.bytes += frame.bytes();
        self.frames.push_back(frame);
        Ok(())
    }

    /// The peer has everything up to `number`. `false`: that was never sent.
    pub(super) fn acknowledged(&mut self, number: u64, arena: &mut Arena) -> bool {
        if number > self.numbered {
            return false;
        }
        while self.numbered - (self.frames.len() as u64) < number
            && let Some(frame) = self.frames.pop_front()
        {
            self.bytes -= frame.bytes();
            if self.flown > 0 {
                self.flown -= 1;
                self.flown_bytes -= frame.bytes();
            }
            if let Kept::Buffer(buffer, _) = frame.body {
                arena.release(buffer);
            }
        }
        true
    }

    /// A new connection: everything kept is to be sent again. How many frames had gone out before.
    pub(super) const fn restart(&mut self) -> usize {
        let flown = self.flown;
        self.flown = 0;
        self.flown_bytes = 0;
        flown
    }

    /// What the peer said it takes.
    pub(super) fn peer_window(&mut self, bytes: u64, frames: u64) {
        self.peer_bytes = bytes.clamp(1, self.limits.window_bytes);
        self.peer_frames = frames.clamp(1, self.limits.window_frames);
    }

    /// The next frame to go out, if the peer has room for it.
    pub(super) fn next(&mut self) -> Option<&KeptFrame> {
        if self.flown as u64 >= self.peer_frames || self.flown_bytes >= self.peer_bytes {
            return None;
        }
        let frame = self.frames.get(self.flown)?;
        self.flown += 1;
        self.flown_bytes += frame.bytes();
        Some(frame)
    }

    /// A numbered frame came. `false`: one is missing.
    pub(super) fn arrived(&mut self, number: u64, body_bytes: u32) -> bool {
        if number != self.received + 1 {
            return false;
        }
        self.received = number;
        self.owed_frames += 1;
        self.owed_bytes += HEAD_BYTES as u64 + u64::from(body_bytes);
        true
    }

    /// A frame came a second time: the peer has not heard that it is here.
    pub(super) const fn seen_again(&mut self) {
        self.ack_now = true;
    }

    /// Something received has not been acknowledged.
    pub(super) const fn owes(&self) -> bool {
        self.owed_frames > 0 || self.ack_now
    }

    pub(super) const fn acknowledge_now(&mut self) {
        self.ack_now = self.owes();
    }

    /// So much is owed that an acknowledgement goes out alone: well before the peer's credit runs out.
    pub(super) fn ack_is_due(&self) -> bool {
        let frames = self.peer_frames.min(self.limits.window_frames) / 4;
        let bytes = self.peer_bytes.min(self.limits.window_bytes) / 4;
        self.ack_now
            || self.owed_frames >= frames.clamp(1, self.limits.ack_frames)
            || self.owed_bytes >= bytes.clamp(1, self.limits.ack_bytes)
    }

    /// An acknowledgement is on its way.
    pub(super) const fn ack_sent(&mut self) {
        self.owed_frames = 0;
        self.owed_bytes = 0;
        self.ack_now = false;
    }

    /// Gives every buffer back.
    pub(super) fn clear(&mut self, arena: &mut Arena) {
        for frame in self.frames.drain(..) {
            if let Kept::Buffer(buffer, _) = frame.body {
                arena.release(buffer);
            }
        }
        self.bytes = 0;
        self.restart();
    }
}
