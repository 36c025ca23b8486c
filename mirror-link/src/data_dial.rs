//! Which volumes have a data connection, over which path, and when to dial for another.

use std::sync::Arc;
use std::time::Duration;

use duplex_core::ids::{SessionId, VolumeIndex};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::Instant;

use crate::config::{GOOD_AFTER, Timers};
use crate::dialler::Backoff;
use crate::handshake::{HandshakeError, Purpose, Refusal, Shared, dial};
use crate::link::DataConnection;
use crate::listener::data_connection;
use crate::manager::Input;
use crate::path::PathCounters;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    /// Needs a connection, not before this.
    Wanted(Instant),
    /// Being dialled over the path.
    Dialling(u16),
    /// Stands on the path since then.
    Standing(u16, Instant),
    /// On a path that is lost, or nowhere yet: another is wanted as soon as a path answers. One that stood
    /// (where, since when) is kept if its own path answers again first.
    Stale(Option<(u16, Instant)>),
}

#[derive(Clone, Copy, Debug)]
struct Volume {
    state: State,
    /// Of the newest connection, dialled or accepted.
    attempt: u64,
    backoff: Backoff,
    failures: u32,
}

/// The data connections of a session, by volume.
#[derive(Debug)]
pub(crate) struct VolumeConnections {
    volumes: Vec<Volume>,
}

impl VolumeConnections {
    pub(crate) fn new(count: usize, timers: &Timers) -> Self {
        let backoff = Backoff::new(timers);
        let volume = Volume { state: State::Stale(None), attempt: 0, backoff, failures: 0 };
        Self { volumes: vec![volume; count] }
    }

    fn volume(&mut self, volume: VolumeIndex, attempt: u64) -> Option<&mut Volume> {
        self.volumes.get_mut(usize::from(volume.0)).filter(|volume| volume.attempt == attempt)
    }

    pub(crate) fn session_up(&mut self) {
        for volume in &mut self.volumes {
            volume.state = State::Stale(None);
            volume.attempt = 0;
            volume.failures = 0;
            volume.backoff.reset();
        }
    }

    pub(crate) fn session_down(&mut self) {
        self.session_up();
    }

    /// Listener: takes a connection unless a newer one was taken already.
    pub(crate) fn accept(&mut self, volume: VolumeIndex, attempt: u64) -> Result<(), Refusal> {
        let found = self.volumes.get_mut(usize::from(volume.0));
        let found = found.ok_or_else(|| Refusal::new("volume", "none", volume.0))?;
        if attempt <= found.attempt {
            return Err(Refusal::new("attempt", found.attempt, attempt));
        }
        found.attempt = attempt;
        Ok(())
    }

    /// The path fails: everything on it is wanted on another. `silent`: its connections may yet carry on.
    pub(crate) fn path_lost(&mut self, path: u16, silent: bool) {
        for volume in &mut self.volumes {
            match volume.state {
                State::Standing(on, since) if on == path => {
                    volume.state = State::Stale(silent.then_some((on, since)));
                }
                State::Dialling(on) | State::Stale(Some((on, _))) if on == path => {
                    volume.state = State::Stale(None);
                }
                State::Dialling(_) | State::Standing(..) | State::Wanted(_) | State::Stale(_) => {}
            }
        }
    }

    /// The path was only silent: what stood on it and was not replaced meanwhile goes on.
    pub(crate) fn path_back(&mut self, path: u16) {
        for volume in &mut self.volumes {
            match volume.state {
                State::Stale(Some((on, since))) if on == path => volume.state = State::Standing(on, since),
                State::Dialling(_) | State::Standing(..) | State::Wanted(_) | State::Stale(_) => {}
            }
        }
    }

    /// The volume's thread lost the connection.
    pub(crate) fn broken(&mut self, volume: VolumeIndex, attempt: u64, now: Instant) {
        let Some(volume) = self.volume(volume, attempt) else { return };
        if let State::Standing(_, since) | State::Stale(Some((_, since))) = volume.state {
            let good = now.duration_since(since) >= GOOD_AFTER;
            if good {
                volume.backoff.reset();
            }
            let pause = if good { Duration::ZERO } else { volume.backoff.pause() };
            volume.state = State::Wanted(now + pause);
        }
    }

    /// The next volume to dial for, over this path.
    pub(crate) fn next_dial(&mut self, path: u16, now: Instant) -> Option<(VolumeIndex, u64)> {
        for (index, volume) in (0..).zip(&mut self.volumes) {
            let due = match volume.state {
                State::Stale(_) => true,
                State::Wanted(at) => now >= at,
                State::Dialling(_) | State::Standing(..) => false,
            };
            if due {
                volume.state = State::Dialling(path);
                volume.attempt += 1;
                return Some((VolumeIndex(index), volume.attempt));
            }
        }
        None
    }

    /// A dialled connection stands. `false`: a newer attempt has been made, drop it.
    pub(crate) fn dialled(&mut self, volume: VolumeIndex, attempt: u64, now: Instant) -> bool {
        let Some(volume) = self.volume(volume, attempt) else { return false };
        if let State::Dialling(path) = volume.state {
            volume.state = State::Standing(path, now);
        }
        volume.failures = 0;
        true
    }

    /// An attempt failed. `true`: the first time in a row.
    pub(crate) fn failed(&mut self, volume: VolumeIndex, attempt: u64, now: Instant) -> bool {
        let Some(volume) = self.volume(volume, attempt) else { return false };
        volume.state = State::Wanted(now + volume.backoff.pause());
        volume.failures = volume.failures.saturating_add(1);
        volume.failures == 1
    }
}

/// What became of an attempt.
pub(crate) struct Dialled {
    pub(crate) session: SessionId,
    pub(crate) volume: VolumeIndex,
    pub(crate) attempt: u64,
    pub(crate) result: Result<DataConnection, HandshakeError>,
}

/// Dials one data connection and tells the manager.
pub(crate) async fn dial_volume(
    shared: Arc<Shared>,
    dials: Arc<Semaphore>,
    counters: Arc<PathCounters>,
    inputs: mpsc::Sender<Input>,
    (session, volume, attempt, path): (SessionId, VolumeIndex, u64, u16),
) {
    let Ok(_permit) = dials.acquire().await else { return };
    let name = shared.config.volumes.get(usize::from(volume.0)).cloned().unwrap_or_default();
    let purpose = Purpose::Data { path, volume: volume.0, name, attempt };
    let result = match dial(&shared, &purpose, session).await {
        Ok((stream, _)) => {
            data_connection(stream, session, volume, attempt, path, counters).map_err(HandshakeError::from)
        }
        Err(error) => Err(error),
    };
    // Fails only when the link itself ends.
    let _ = inputs.send(Input::DataDialled(Dialled { session, volume, attempt, result })).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    const V: VolumeIndex = VolumeIndex(0);

    #[test]
    fn a_lost_path_makes_a_new_attempt_and_the_old_one_is_dropped() {
        let now = Instant::now();
        let mut volumes = VolumeConnections::new(1, &Timers::default());
        volumes.session_up();
        assert_eq!(volumes.next_dial(0, now), Some((V, 1)));
        assert_eq!(volumes.next_dial(0, now), None, "one attempt at a time");
        volumes.path_lost(0, false);
        assert_eq!(volumes.next_dial(1, now), Some((V, 2)));
        assert!(!volumes.dialled(V, 1, now));
        assert!(volumes.dialled(V, 2, now));
        volumes.path_lost(0, false);
        assert_eq!(volumes.next_dial(1, now), None, "it stands on the other path");
        volumes.broken(V, 1, now);
        assert_eq!(volumes.next_dial(1, now), None, "an old connection's end is not news");
    }

    #[test]
    fn a_connection_on_a_silent_path_goes_on_when_nothing_better_came() {
        let now = Instant::now();
        let mut volumes = VolumeConnections::new(1, &Timers::default());
        volumes.next_dial(0, now).unwrap();
        assert!(volumes.dialled(V, 1, now));
        volumes.path_lost(0, true);
        volumes.path_back(0);
        assert_eq!(volumes.next_dial(0, now), None, "it stands again");
        volumes.path_lost(0, true);
        assert_eq!(volumes.next_dial(1, now), Some((V, 2)), "the other path was quicker");
        volumes.path_back(0);
        assert!(volumes.dialled(V, 2, now));
        volumes.path_lost(1, true);
        volumes.path_lost(1, false);
        volumes.path_back(1);
        assert_eq!(volumes.next_dial(1, now), Some((V, 3)), "a lost connection does not come back");
    }

    #[test]
    fn a_connection_that_breaks_at_once_is_not_dialled_at_once() {
        let now = Instant::now();
        let mut volumes = VolumeConnections::new(1, &Timers::default());
        volumes.next_dial(0, now).unwrap();
        assert!(volumes.dialled(V, 1, now));
        volumes.broken(V, 1, now);
        assert_eq!(volumes.next_dial(0, now), None);
        assert_eq!(volumes.next_dial(0, now + Duration::from_millis(200)), Some((V, 2)));
        assert!(volumes.dialled(V, 2, now));
        volumes.broken(V, 2, now + GOOD_AFTER);
        assert_eq!(volumes.next_dial(0, now + GOOD_AFTER), Some((V, 3)));
    }

    #[test]
    fn the_newest_attempt_is_taken() {
        let mut volumes = VolumeConnections::new(1, &Timers::default());
        assert!(volumes.accept(V, 2).is_ok());
        assert_eq!(volumes.accept(V, 1).unwrap_err().code, "attempt");
        assert_eq!(volumes.accept(V, 2).unwrap_err().code, "attempt");
        assert_eq!(volumes.accept(VolumeIndex(1), 1).unwrap_err().code, "volume");
        assert!(volumes.accept(V, 3).is_ok());
    }
}
