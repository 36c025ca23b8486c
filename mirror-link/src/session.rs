//! The control channel of a session: numbered, kept until acknowledged, said again on another connection. Pure.

use std::collections::VecDeque;
use std::sync::Arc;

use duplex_core::ids::SessionId;
use duplex_core::message::ControlMessage;

use crate::codec::EncodeError;
use crate::control::encode_control;
use crate::frame::CONTROL_MAX_BYTES;
use crate::handshake::PeerFacts;

/// Unacknowledged control frames before the session counts as stuck.
const UNACKED_MAX_FRAMES: usize = 4096;
/// Unacknowledged control bytes before the session counts as stuck.
const UNACKED_MAX_BYTES: usize = 8 * CONTROL_MAX_BYTES as usize;
/// Received frames after which an acknowledgement is sent at once.
const ACK_EVERY: u64 = 16;

/// Why a control message was not taken.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub(crate) enum ControlError {
    #[error("{0}")]
    Encode(#[from] EncodeError),
    #[error("{frames} control messages are unacknowledged")]
    Stuck { frames: usize },
}

/// What to do with a numbered frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Arrival {
    /// The next one.
    New,
    /// Seen already.
    Seen,
    /// One is missing: the connection lost its place.
    Gap,
}

/// The control channel of a session.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) id: SessionId,
    pub(crate) peer: PeerFacts,
    unacked: VecDeque<Arc<[u8]>>,
    unacked_bytes: usize,
    /// Number of the newest frame sent.
    sent: u64,
    /// Number of the newest frame received.
    received: u64,
    /// The newest acknowledgement sent.
    acked: u64,
    heartbeat_ns: u64,
    /// The connection that carries numbered frames now.
    pub(crate) active: Option<u64>,
}

impl Session {
    pub(crate) const fn new(id: SessionId, peer: PeerFacts) -> Self {
        Self {
            id,
            peer,
            unacked: VecDeque::new(),
            unacked_bytes: 0,
            sent: 0,
            received: 0,
            acked: 0,
            heartbeat_ns: 0,
            active: None,
        }
    }

    pub(crate) const fn received(&self) -> u64 {
        self.received
    }

    /// Numbers a message and keeps it; the frame to send now.
    pub(crate) fn send(&mut self, message: &ControlMessage) -> Result<Arc<[u8]>, ControlError> {
        if self.unacked.len() >= UNACKED_MAX_FRAMES || self.unacked_bytes >= UNACKED_MAX_BYTES {
            return Err(ControlError::Stuck { frames: self.unacked.len() });
        }
        let frame: Arc<[u8]> = encode_control(message, self.sent + 1, self.received)?.into();
        self.sent += 1;
        self.acked = self.received;
        self.unacked_bytes += frame.len();
        self.unacked.push_back(Arc::clone(&frame));
        Ok(frame)
    }

    /// The peer has everything up to `number`. `false`: it cannot know that number.
    pub(crate) fn acknowledged(&mut self, number: u64) -> bool {
        if number > self.sent {
            return false;
        }
        while self.sent - (self.unacked.len() as u64) < number
            && let Some(frame) = self.unacked.pop_front()
        {
            self.unacked_bytes -= frame.len();
        }
        true
    }

    /// Everything the peer may not have, oldest first: for a new connection.
    pub(crate) fn unacknowledged(&self) -> impl ExactSizeIterator<Item = &Arc<[u8]>> {
        self.unacked.iter()
    }

    /// A numbered frame came.
    pub(crate) const fn arrived(&mut self, number: u64) -> Arrival {
        if number == self.received + 1 {
            self.received = number;
            Arrival::New
        } else if number <= self.received {
            Arrival::Seen
        } else {
            Arrival::Gap
        }
    }

    /// Heartbeats come over every path: only a newer one counts.
    pub(crate) const fn is_new_heartbeat(&mut self, sent_ns: u64) -> bool {
        let new = sent_ns > self.heartbeat_ns;
        if new {
            self.heartbeat_ns = sent_ns;
        }
        new
    }

    /// An acknowledgement is owed: many frames since the last one, or (at a tick) any.
    pub(crate) const fn take_ack(&mut self, tick: bool) -> Option<u64> {
        let owed = self.received - self.acked;
        if owed >= ACK_EVERY || (tick && owed > 0) {
            self.acked = self.received;
            return Some(self.received);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use duplex_core::ids::{BootId, Incarnation};

    use super::*;

    fn session() -> Session {
        let peer = PeerFacts { incarnation: Incarnation(1), boot_id: BootId(2), frame_max_bytes: 3 };
        Session::new(SessionId(9), peer)
    }

    fn bye() -> ControlMessage {
        ControlMessage::Bye { text: "x".into() }
    }

    #[test]
    fn what_is_acknowledged_is_not_said_again() {
        let mut session = session();
        for _ in 0..5 {
            session.send(&bye()).unwrap();
        }
        assert!(session.acknowledged(3));
        assert_eq!(session.unacknowledged().len(), 2);
        assert!(session.acknowledged(1), "an old acknowledgement changes nothing");
        assert_eq!(session.unacknowledged().len(), 2);
        assert!(!session.acknowledged(6), "never sent");
        assert!(session.acknowledged(5));
        assert_eq!((session.unacknowledged().len(), session.unacked_bytes), (0, 0));
    }

    #[test]
    fn every_number_is_taken_once_and_in_order() {
        let mut session = session();
        let numbers = [1, 1, 2, 4, 3, 2, 4];
        let arrivals = numbers.map(|number| session.arrived(number));
        use Arrival::{Gap, New, Seen};
        assert_eq!(arrivals, [New, Seen, New, Gap, New, Seen, New]);
    }

    #[test]
    fn acknowledgements_are_owed_after_many_or_at_a_tick() {
        let mut session = session();
        for number in 1..ACK_EVERY {
            session.arrived(number);
        }
        assert_eq!(session.take_ack(false), None);
        assert_eq!(session.take_ack(true), Some(ACK_EVERY - 1));
        assert_eq!(session.take_ack(true), None);
        for number in ACK_EVERY..3 * ACK_EVERY {
            session.arrived(number);
        }
        assert_eq!(session.take_ack(false), Some(3 * ACK_EVERY - 1));
    }

    #[test]
    fn a_peer_that_acknowledges_nothing_is_found() {
        let mut session = session();
        let stuck = (0..=UNACKED_MAX_FRAMES).find_map(|_| session.send(&bye()).err());
        assert_eq!(stuck, Some(ControlError::Stuck { frames: UNACKED_MAX_FRAMES }));
    }
}
