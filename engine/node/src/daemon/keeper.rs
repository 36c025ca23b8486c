//! Where the devices' `/dev/fuse` descriptors outlive this process: in the holder, and with systemd in its
//! descriptor store too.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use duplex_frontend::holder::{HolderClient, HolderError, start_holder, systemd, wait_for_end};
use tokio::sync::mpsc;

use super::devices::DeviceEvent;
use crate::config::RunDir;

/// Holders are replaced no more often than this: what ends one may end the next one, too.
const REPLACE_EVERY: Duration = Duration::from_secs(5);

/// The keeper of all volumes' descriptors. Its calls wait for another process, at most some seconds.
#[derive(Debug)]
pub(super) struct Keeper {
    run_dir: PathBuf,
    socket: PathBuf,
    notify_socket: Option<OsString>,
    /// Is told the number of a connection to the holder that ended.
    lost: mpsc::Sender<DeviceEvent>,
    /// When a holder was last replaced. Apart from the rest, whose lock is held while a holder is asked.
    replaced: Mutex<Option<Instant>>,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    client: Option<HolderClient>,
    /// Numbers the connections to holders.
    connection: u64,
    /// No holder is wanted any more.
    stopped: bool,
    /// What the holder keeps, for its successor.
    kept: BTreeMap<String, OwnedFd>,
    /// The holder, if this process started it.
    child: Option<Child>,
    /// What systemd kept for us.
    stored: BTreeMap<String, OwnedFd>,
}

impl Keeper {
    /// `stored` is what [`systemd::take_stored`] gave.
    pub(super) fn new(
        run_dir: &RunDir,
        stored: Vec<(String, OwnedFd)>,
        lost: mpsc::Sender<DeviceEvent>,
    ) -> Self {
        Self {
            run_dir: run_dir.path().to_owned(),
            socket: run_dir.holder(),
            notify_socket: std::env::var_os("NOTIFY_SOCKET").filter(|path| !path.is_empty()),
            lost,
            replaced: Mutex::new(None),
            inner: Mutex::new(Inner { stored: stored.into_iter().collect(), ..Inner::default() }),
        }
    }

    /// Keeps a volume's descriptor; starts the holder where none runs.
    pub(super) fn keep(&self, volume: &str, descriptor: BorrowedFd<'_>) -> Result<(), HolderError> {
        if let Some(socket) = &self.notify_socket
            && let Err(error) = systemd::store(socket, volume, descriptor)
        {
            tracing::warn!(volume, %error, "systemd's descriptor store takes nothing; the holder does");
        }
        let mut inner = self.lock();
        inner.remember(volume, descriptor);
        // A connection of a holder that died meanwhile fails once; its successor takes the descriptor.
        if self.connected(&mut inner)? && inner.put(volume, descriptor).is_ok() {
            return Ok(());
        }
        self.start(&mut inner)
    }

    /// A holder where none answers, with everything that is kept.
    fn start(&self, inner: &mut Inner) -> Result<(), HolderError> {
        inner.client = None;
        inner.reap();
        if !self.connected(inner)? {
            let (child, client) = start_holder(self.command(), &self.socket)?;
            inner.child = Some(child);
            self.met(inner, client);
        }
        for (volume, descriptor) in &inner.kept {
            inner.put(volume, descriptor.as_fd())?;
        }
        Ok(())
    }

    /// The holder of this connection ended by itself. Starts another one, and gives it everything that is kept; how
    /// many that is, or `None` when there is nothing to do.
    pub(super) fn replace(&self, connection: u64) -> Result<Option<usize>, HolderError> {
        let mut inner = self.lock();
        if inner.stopped || inner.connection != connection {
            return Ok(None);
        }
        if inner.kept.is_empty() {
            inner.client = None;
            inner.reap();
            return Ok(None);
        }
        *self.replaced.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        self.start(&mut inner)?;
        Ok(Some(inner.kept.len()))
    }

    /// From now until a holder may be replaced: nothing, unless one was replaced a moment ago.
    pub(super) fn replace_after(&self) -> Duration {
        let replaced = *self.replaced.lock().unwrap_or_else(PoisonError::into_inner);
        let since = replaced.map(|at| at.elapsed());
        since.map_or(Duration::ZERO, |since| REPLACE_EVERY.saturating_sub(since))
    }

    /// A volume's living connection that an earlier process left.
    pub(super) fn take(&self, volume: &str) -> Result<Option<OwnedFd>, HolderError> {
        let mut inner = self.lock();
        let held = match (self.connected(&mut inner)?, &inner.client) {
            (true, Some(client)) => client.get(volume),
            (_, None) | (false, _) => Ok(None),
        };
        match held {
            Ok(Some(held)) => {
                inner.stored.remove(volume);
                inner.remember(volume, held.as_fd());
                return Ok(Some(held));
            }
            Ok(None) => {}
            Err(error) => {
                // An answer that still comes would be taken for that of the next question.
                inner.client = None;
                return Err(error);
            }
        }
        let stored = inner.stored.remove(volume);
        let stored =
            stored.filter(|descriptor| duplex_frontend::fuse::connection_is_alive(descriptor.as_fd()));
        if let Some(descriptor) = &stored {
            // The holder ended with its server; a new one keeps it from now on.
            inner.remember(volume, descriptor.as_fd());
            if let Err(error) = self.start(&mut inner) {
                tracing::warn!(volume, %error, "only systemd's descriptor store keeps the device");
            }
        }
        Ok(stored)
    }

    /// The volume has no device any more.
    pub(super) fn forget(&self, volume: &str) {
        if let Some(socket) = &self.notify_socket
            && let Err(error) = systemd::forget(socket, volume)
        {
            tracing::debug!(volume, %error, "systemd's descriptor store");
        }
        let mut inner = self.lock();
        inner.stored.remove(volume);
        inner.kept.remove(volume);
        let forgotten = match self.connected(&mut inner) {
            Ok(true) => inner.client.as_ref().map_or(Ok(false), |client| client.forget(volume)),
            Ok(false) => Ok(false),
            Err(error) => Err(error),
        };
        if let Err(error) = forgotten {
            // A holder that died keeps nothing.
            tracing::debug!("{error}");
            inner.client = None;
        }
    }

    /// Ends the holder: no device is left that it could keep.
    pub(super) fn stop(&self) {
        let mut inner = self.lock();
        inner.stopped = true;
        inner.kept.clear();
        let told = match self.connected(&mut inner) {
            Ok(_) => inner.client.take().map_or(Ok(false), |client| client.stop().map(|()| true)),
            Err(error) => Err(error),
        };
        if let Err(error) = &told {
            tracing::warn!("{error}");
        }
        if let Some(mut child) = inner.child.take() {
            if !matches!(told, Ok(true)) {
                // It does not hear: nobody waits for it.
                let _ = child.kill();
            }
            let _ = child.wait();
        }
    }

    fn connected(&self, inner: &mut Inner) -> Result<bool, HolderError> {
        if inner.client.is_none()
            && let Some(client) = HolderClient::connect(&self.socket)?
        {
            self.met(inner, client);
        }
        Ok(inner.client.is_some())
    }

    /// From now on the holder's end is noticed.
    fn met(&self, inner: &mut Inner, client: HolderClient) {
        inner.connection += 1;
        let (connection, lost) = (inner.connection, self.lost.clone());
        let watched = client.watched().map_err(|error| error.to_string()).and_then(|watched| {
            let watch = move || {
                wait_for_end(&watched);
                let _ = lost.blocking_send(DeviceEvent::HolderLost(connection));
            };
            std::thread::Builder::new()
                .name("holder-watch".to_owned())
                .spawn(watch)
                .map_err(|error| error.to_string())
        });
        if let Err(error) = watched {
            tracing::warn!("the holder is not watched, it is replaced at the next device only: {error}");
        }
        inner.client = Some(client);
    }

    /// This very program: also when its file was replaced meanwhile.
    fn command(&self) -> Command {
        let mut command = Command::new("/proc/self/exe");
        command.arg0("duplex").arg("--run-dir").arg(&self.run_dir).arg("holder");
        command
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn remember(&mut self, volume: &str, descriptor: BorrowedFd<'_>) {
        match descriptor.try_clone_to_owned() {
            Ok(own) => drop(self.kept.insert(volume.to_owned(), own)),
            Err(error) => tracing::warn!(volume, %error, "a replaced holder will not keep this device"),
        }
    }

    fn put(&self, volume: &str, descriptor: BorrowedFd<'_>) -> Result<(), HolderError> {
        self.client.as_ref().map_or(Ok(()), |client| client.put(volume, descriptor))
    }

    fn reap(&mut self) {
        if let Some(child) = self.child.as_mut()
            && matches!(child.try_wait(), Ok(Some(_)))
        {
            self.child = None;
        }
    }
}
