//! The control connection of one path: probes, silence, and what waits to be sent.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, sleep_until};

use crate::config::Timers;
use crate::control::{ControlWord, LinkWord, decode_control, encode_link};
use crate::frame::{CONTROL_MAX_BYTES, Channel};
use crate::manager::Input;
use crate::stream::{Stream, StreamError};

/// Encrypted or plain bytes that may wait for the socket before more is taken from the queue: what a heartbeat can
/// be behind.
const UNSENT_MAX_BYTES: usize = 64 << 10;

/// Counts of one path since the start, for `status` and metrics. Read them at any time.
#[derive(Debug, Default)]
pub struct PathCounters {
    /// A control connection stands.
    pub up: AtomicBool,
    /// The control channel uses this path now.
    pub active: AtomicBool,
    /// Smoothed round trip of the probes, in microseconds; 0 = not known.
    pub rtt_us: AtomicU64,
    /// Control connections made.
    pub connections: AtomicU64,
    /// Control frames sent.
    pub control_frames_sent: AtomicU64,
    /// Control frames received.
    pub control_frames_received: AtomicU64,
    /// Data connections made.
    pub data_connections: AtomicU64,
    /// Bytes of data connections sent, as the socket took them.
    pub data_bytes_sent: AtomicU64,
    /// Bytes of data connections received.
    pub data_bytes_received: AtomicU64,
    /// Frames sent once more after a connection was lost.
    pub frames_resent: AtomicU64,
    /// Frames that failed a checksum.
    pub corrupt_frames: AtomicU64,
}

impl PathCounters {
    pub(crate) fn add(counter: &AtomicU64, count: u64) {
        counter.fetch_add(count, Ordering::Relaxed);
    }

    fn measured(&self, rtt: Duration) {
        let new_us = u64::try_from(rtt.as_micros()).unwrap_or(u64::MAX).max(1);
        let old_us = self.rtt_us.load(Ordering::Relaxed);
        let smoothed_us =
            if old_us == 0 { new_us } else { (old_us / 8 * 7).saturating_add(new_us / 8).max(1) };
        self.rtt_us.store(smoothed_us, Ordering::Relaxed);
    }
}

#[derive(Debug, Default)]
struct Queues {
    /// Only the newest one: a heartbeat that waited is not worth sending.
    heartbeat: Option<Arc<[u8]>>,
    frames: VecDeque<Arc<[u8]>>,
    closed: bool,
}

#[derive(Debug, Default)]
struct OutboxInner {
    queues: Mutex<Queues>,
    news: Notify,
}

/// What waits to be sent on a connection. Bounded by the session's unacknowledged frames.
#[derive(Clone, Debug, Default)]
pub(crate) struct Outbox(Arc<OutboxInner>);

impl Outbox {
    fn queues(&self) -> MutexGuard<'_, Queues> {
        self.0.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn send(&self, frame: Arc<[u8]>) {
        self.queues().frames.push_back(frame);
        self.0.news.notify_one();
    }

    /// Goes before everything that waits, and replaces a heartbeat that still waits.
    pub(crate) fn heartbeat(&self, frame: Option<Arc<[u8]>>) {
        self.queues().heartbeat = frame;
        self.0.news.notify_one();
    }

    /// The connection ends after what waits now (best effort).
    pub(crate) fn close(&self) {
        self.queues().closed = true;
        self.0.news.notify_one();
    }

    fn take(&self) -> Option<Arc<[u8]>> {
        let mut queues = self.queues();
        queues.heartbeat.take().or_else(|| queues.frames.pop_front())
    }

    fn is_over(&self) -> bool {
        let queues = self.queues();
        queues.closed && queues.frames.is_empty()
    }
}

/// A running control connection.
pub(crate) struct ControlConnection {
    pub(crate) connection: u64,
    pub(crate) stream: Stream,
    pub(crate) outbox: Outbox,
    pub(crate) counters: Arc<PathCounters>,
    pub(crate) timers: Timers,
    pub(crate) inputs: mpsc::Sender<Input>,
    /// Zero of the probes' clock.
    pub(crate) started: Instant,
}

impl ControlConnection {
    /// Runs until the connection ends; the error says why.
    pub(crate) async fn run(mut self) -> StreamError {
        let mut heard_at = Instant::now();
        let mut heard_bytes = 0;
        let mut silent = false;
        let mut tick_at = heard_at;
        loop {
            if let Err(error) = self.exchange().await {
                return error;
            }
            if self.stream.received_bytes() != heard_bytes {
                heard_bytes = self.stream.received_bytes();
                heard_at = Instant::now();
                if silent {
                    silent = false;
                    self.report(Input::Silence { connection: self.connection, silent }).await;
                }
            }
            if self.outbox.is_over() {
                // The peer sees the end of the stream in any case.
                let _ = tokio::time::timeout(self.timers.probe, self.stream.drain()).await;
                return StreamError::Closed;
            }
            tokio::select! {
                pumped = self.stream.pump() => if let Err(error) = pumped {
                    return error;
                },
                () = self.outbox.0.news.notified() => {}
                () = sleep_until(tick_at) => {
                    let now = Instant::now();
                    tick_at = now + self.timers.probe;
                    let quiet = now.duration_since(heard_at);
                    if quiet >= self.timers.path_dead {
                        return StreamError::Deadline(self.timers.path_dead);
                    }
                    if quiet >= self.timers.path_silent && !silent {
                        silent = true;
                        self.report(Input::Silence { connection: self.connection, silent }).await;
                    }
                    let sent_ns = self.clock_ns();
                    if let Err(error) = self.say(&LinkWord::Probe { sent_ns }) {
                        return error;
                    }
                }
            }
        }
    }

    fn clock_ns(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    async fn report(&self, input: Input) {
        // The manager is gone only when the link itself ends.
        let _ = self.inputs.send(input).await;
    }

    fn say(&mut self, word: &LinkWord) -> Result<(), StreamError> {
        let frame = encode_link(word, Channel::Control, 0)
            .map_err(|error| std::io::Error::other(error.to_string()))?;
        self.stream.queue(&frame)
    }

    /// Moves frames both ways as far as it goes without waiting for the network.
    async fn exchange(&mut self) -> Result<(), StreamError> {
        while self.stream.unsent_bytes() < UNSENT_MAX_BYTES {
            let Some(frame) = self.outbox.take() else { break };
            PathCounters::add(&self.counters.control_frames_sent, 1);
            self.stream.queue(&frame)?;
        }
        while let Some(frame) = self.stream.next_frame(CONTROL_MAX_BYTES)? {
            PathCounters::add(&self.counters.control_frames_received, 1);
            match decode_control(&frame.header, &frame.body)? {
                ControlWord::Link(LinkWord::Probe { sent_ns }) => {
                    self.say(&LinkWord::ProbeReply { sent_ns })?;
                }
                ControlWord::Link(LinkWord::ProbeReply { sent_ns }) => {
                    let rtt_ns = self.clock_ns().saturating_sub(sent_ns);
                    self.counters.measured(Duration::from_nanos(rtt_ns));
                }
                word @ (ControlWord::Message(_) | ControlWord::Link(_)) => {
                    let (connection, routing) = (self.connection, frame.header.routing);
                    self.report(Input::Word { connection, routing, word }).await;
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_heartbeat_goes_first_and_only_the_newest() {
        let outbox = Outbox::default();
        outbox.send(Arc::from(&b"one"[..]));
        outbox.heartbeat(Some(Arc::from(&b"old"[..])));
        outbox.heartbeat(Some(Arc::from(&b"new"[..])));
        let mut taken = Vec::new();
        while let Some(frame) = outbox.take() {
            taken.push(String::from_utf8(frame.to_vec()).unwrap());
        }
        assert_eq!(taken, ["new", "one"]);
        outbox.send(Arc::from(&b"last"[..]));
        outbox.close();
        assert!(!outbox.is_over());
        outbox.take().unwrap();
        assert!(outbox.is_over());
    }
}
