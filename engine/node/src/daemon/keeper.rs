//! Where the devices' `/dev/fuse` descriptors outlive this process: in the holder, and with systemd in its
//! descriptor store too.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::sync::{Mutex, PoisonError};

use duplex_frontend::holder::{HolderClient, HolderError, start_holder, systemd};

use crate::config::RunDir;

/// The keeper of all volumes' descriptors. Its calls wait for another process, at most some seconds.
#[derive(Debug)]
pub(super) struct Keeper {
    run_dir: PathBuf,
    socket: PathBuf,
    notify_socket: Option<OsString>,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    client: Option<HolderClient>,
    /// The holder, if this process started it.
    child: Option<Child>,
    /// What systemd kept for us.
    stored: BTreeMap<String, OwnedFd>,
}

impl Keeper {
    /// `stored` is what [`systemd::take_stored`] gave.
    pub(super) fn new(run_dir: &RunDir, stored: Vec<(String, OwnedFd)>) -> Self {
        Self {
            run_dir: run_dir.path().to_owned(),
            socket: run_dir.holder(),
            notify_socket: std::env::var_os("NOTIFY_SOCKET").filter(|path| !path.is_empty()),
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
        // A connection of a holder that died meanwhile fails once; its successor takes the descriptor.
        if self.connected(&mut inner)? && inner.put(volume, descriptor).is_ok() {
            return Ok(());
        }
        inner.client = None;
        inner.reap();
        if !self.connected(&mut inner)? {
            let (child, client) = start_holder(self.command(), &self.socket)?;
            inner.child = Some(child);
            inner.client = Some(client);
        }
        inner.put(volume, descriptor)
    }

    /// A volume's living connection that an earlier process left.
    pub(super) fn take(&self, volume: &str) -> Result<Option<OwnedFd>, HolderError> {
        let mut inner = self.lock();
        let stored = inner.stored.remove(volume);
        let held = match (self.connected(&mut inner)?, &inner.client) {
            (true, Some(client)) => client.get(volume),
            (_, None) | (false, _) => Ok(None),
        };
        match held {
            Ok(Some(held)) => return Ok(Some(held)),
            Ok(None) => {}
            Err(error) => {
                // An answer that still comes would be taken for that of the next question.
                inner.client = None;
                return Err(error);
            }
        }
        Ok(stored.filter(|descriptor| duplex_frontend::fuse::connection_is_alive(descriptor.as_fd())))
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
        match self.connected(&mut inner) {
            Ok(true) => {
                if let Some(client) = inner.client.take()
                    && let Err(error) = client.stop()
                {
                    tracing::warn!("{error}");
                }
                if let Some(mut child) = inner.child.take() {
                    // It was told to end and has nothing to wait for.
                    let _ = child.wait();
                }
            }
            Ok(false) => {}
            Err(error) => tracing::warn!("{error}"),
        }
    }

    fn connected(&self, inner: &mut Inner) -> Result<bool, HolderError> {
        if inner.client.is_none() {
            inner.client = HolderClient::connect(&self.socket)?;
        }
        Ok(inner.client.is_some())
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
