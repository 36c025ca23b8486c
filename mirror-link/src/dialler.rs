//! The dialling server's side: one control connection a path, for ever.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use duplex_core::ids::SessionId;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};

use crate::config::{GOOD_AFTER, Timers};
use crate::handshake::{HandshakeError, Purpose, Shared, dial};
use crate::manager::{Input, next_connection};
use crate::path::{ControlConnection, Outbox, PathCounters};
use crate::stream::StreamError;

/// Pauses between attempts: doubling, with jitter so that two paths or servers do not keep in step.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Backoff {
    next: Duration,
    min: Duration,
    max: Duration,
}

impl Backoff {
    pub(crate) const fn new(timers: &Timers) -> Self {
        Self { next: timers.backoff_min, min: timers.backoff_min, max: timers.backoff_max }
    }

    pub(crate) const fn reset(&mut self) {
        self.next = self.min;
    }

    /// The pause before the next attempt: 75 to 125 % of the doubling time.
    pub(crate) fn pause(&mut self) -> Duration {
        let pause = self.next;
        self.next = pause.saturating_mul(2).min(self.max);
        pause.mul_f64(rand::random_range(0.75..1.25))
    }
}

/// Keeps the control connection of a path until the manager is gone.
pub(crate) async fn keep(
    shared: Arc<Shared>,
    path: u16,
    counters: Arc<PathCounters>,
    inputs: mpsc::Sender<Input>,
) {
    let mut backoff = Backoff::new(&shared.config.timers);
    let started = Instant::now();
    loop {
        let tried = match dial(&shared, &Purpose::Control { path }, SessionId::NONE).await {
            Ok((stream, peer)) => {
                let since = Instant::now();
                let (connection, outbox) = (next_connection(), Outbox::default());
                counters.connections.fetch_add(1, Ordering::Relaxed);
                let up = Input::ControlUp { path, connection, peer, outbox: outbox.clone() };
                if inputs.send(up).await.is_err() {
                    return;
                }
                let control = ControlConnection {
                    connection,
                    stream,
                    outbox,
                    counters: Arc::clone(&counters),
                    timers: shared.config.timers,
                    inputs: inputs.clone(),
                    started,
                };
                let error = control.run().await;
                if since.elapsed() >= GOOD_AFTER {
                    backoff.reset();
                }
                inputs.send(Input::ControlDown { connection, error }).await
            }
            Err(error) => inputs.send(Input::NotConnected { path, error }).await,
        };
        if tried.is_err() {
            return;
        }
        sleep(backoff.pause()).await;
    }
}

/// The event of a failed handshake with the configured peer, if it is one.
pub(crate) fn reason(error: &HandshakeError) -> String {
    match error {
        HandshakeError::Connection(StreamError::Closed) => {
            "the peer closed the connection during the handshake".to_owned()
        }
        HandshakeError::Connection(_)
        | HandshakeError::Stranger(_)
        | HandshakeError::Vanished(_)
        | HandshakeError::Refused(_) => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_longest() {
        let mut backoff = Backoff::new(&Timers::default());
        let pauses: Vec<_> = (0..10).map(|_| backoff.pause().as_millis()).collect();
        assert!((75..=125).contains(&pauses[0]), "{pauses:?}");
        assert!((150..=250).contains(&pauses[1]), "{pauses:?}");
        assert!((3750..=6250).contains(&pauses[9]), "{pauses:?}");
        backoff.reset();
        assert!(backoff.pause().as_millis() <= 125);
    }
}
