//! The mirror link: sessions, ordered channels, directions that can be cut.

use std::collections::VecDeque;

use duplex_core::ids::SessionId;

use super::oracle::Host;
use super::rng::Rng;

/// Something on its way.
#[derive(Debug)]
pub enum Parcel {
    /// A frame of the control channel.
    Control(Vec<u8>),
    /// A frame of a volume's channel.
    Volume(Vec<u8>),
    /// The sender closed the session.
    Closed(String),
}

#[derive(Debug)]
struct Queued {
    due: u64,
    parcel: Parcel,
}

/// One session.
#[derive(Debug)]
pub struct Session {
    /// Its id on both sides.
    pub id: SessionId,
    /// Which ends are open.
    pub open: [bool; 2],
    /// By sender, then channel: 0 is control, volume v is v + 1.
    queues: [Vec<VecDeque<Queued>>; 2],
    sent: [Vec<u64>; 2],
}

/// The link.
#[derive(Debug)]
pub struct Link {
    /// Direction from host i passes.
    pub passes: [bool; 2],
    /// The current session.
    pub session: Option<Session>,
    channels: usize,
    /// Shortest and longest way, in ns.
    pub delay: (u64, u64),
    /// Not before: both sides pause between attempts.
    pub retry_at: u64,
}

impl Link {
    /// A healthy link with so many volumes.
    pub const fn new(volumes: usize, delay: (u64, u64)) -> Self {
        Self { passes: [true; 2], session: None, channels: volumes + 1, delay, retry_at: 0 }
    }

    /// Both ends open this session.
    pub fn open(&mut self, id: SessionId) {
        let queues = || (0..self.channels).map(|_| VecDeque::new()).collect();
        self.session = Some(Session {
            id,
            open: [true; 2],
            queues: [queues(), queues()],
            sent: [vec![0; self.channels], vec![0; self.channels]],
        });
    }

    /// Next number of a channel's frame.
    pub fn number(&mut self, from: Host, channel: usize) -> u64 {
        let Some(session) = &mut self.session else { return 1 };
        session.sent[from][channel] += 1;
        session.sent[from][channel]
    }

    /// Sends; gives the time of arrival if the session is this one and open at the sender.
    pub fn send(
        &mut self,
        now: u64,
        from: Host,
        id: SessionId,
        channel: usize,
        parcel: Parcel,
        rng: &mut Rng,
    ) -> Option<u64> {
        let session = self.session.as_mut().filter(|session| session.id == id)?;
        if !session.open[from] && !matches!(parcel, Parcel::Closed(_)) {
            return None;
        }
        let queue = &mut session.queues[from][channel];
        let after = queue.back().map_or(0, |last| last.due);
        let due = (now + rng.between(self.delay.0, self.delay.1)).max(after + 1);
        queue.push_back(Queued { due, parcel });
        Some(due)
    }

    /// What has arrived on a channel and may pass.
    pub fn arrived(&mut self, now: u64, from: Host, channel: usize) -> Option<(SessionId, Parcel)> {
        if !self.passes[from] {
            return None;
        }
        let session = self.session.as_mut()?;
        let queue = &mut session.queues[from][channel];
        if queue.front().is_some_and(|first| first.due <= now) {
            return queue.pop_front().map(|queued| (session.id, queued.parcel));
        }
        None
    }

    /// When the first parcel of a channel is due.
    pub fn next_due(&self, from: Host, channel: usize) -> Option<u64> {
        let session = self.session.as_ref()?;
        session.queues[from][channel].front().map(|queued| queued.due)
    }

    /// Channels of a session.
    pub const fn channels(&self) -> usize {
        self.channels
    }

    /// The sender is gone: what it had not sent yet is lost, per channel some of it.
    pub fn drop_from(&mut self, from: Host, rng: &mut Rng) {
        if let Some(session) = &mut self.session {
            for queue in &mut session.queues[from] {
                let kept = rng.index(queue.len() + 1);
                queue.truncate(kept);
            }
        }
    }

    /// Nothing is on its way but heartbeats.
    pub fn is_quiet(&self) -> bool {
        self.session.as_ref().is_none_or(|session| {
            session.queues.iter().all(|queues| queues.iter().skip(1).all(VecDeque::is_empty))
        })
    }
}
