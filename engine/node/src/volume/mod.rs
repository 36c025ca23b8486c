//! A volume's thread: one ring that serves the clients, the disk and the mirror link (DESIGN section 4).
//!
//! Rooms: `place` (opening a backing, finding its areas), `thread` (the loop), `frontends` (NBD server and
//! FUSE device of a volume), `snapshot` (what the status page sees). The control plane talks to the thread by
//! [`VolumeHandle`]; the thread reports by [`VolumeEvent`]s.

mod frontends;
pub mod place;
mod snapshot;
mod thread;

use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex, PoisonError, mpsc};

use duplex_core::ids::{SessionId, VolumeIndex};
use duplex_core::mirror::api::{Order, Report};
use duplex_frontend::fuse::{Connection, FuseEnd};
use duplex_link::DataConnection;
use duplex_ring::Waker;

pub use frontends::NbdSettings;
pub use snapshot::Snapshot;
pub use thread::{Settings, ThreadError, spawn};

/// What the control plane tells a volume's thread.
#[derive(Debug)]
pub enum VolumeCommand {
    /// An order of the server machine.
    Order(Order),
    /// A session began: its data channel exists from now on.
    Session(SessionId),
    /// The session is over.
    SessionOver(SessionId),
    /// A connection of the session's data channel.
    Connection(Box<DataConnection>),
    /// Serve this FUSE connection, as soon as the volume has a size. The number comes back in
    /// [`VolumeEvent::FuseEnded`].
    Fuse(Connection, u64),
    /// The FUSE connection was a predecessor's, and this server does not become primary: its requests fail.
    FuseRefuse,
    /// This process ends, a successor goes on: requests of the FUSE connection that are not answered wait for it.
    FuseHold,
    /// Let go of the FUSE connection; its requests stay in the kernel for whoever has the descriptor.
    FuseEnd,
    /// End: nothing is served any more.
    Stop,
}

/// What a volume's thread tells the control plane.
#[derive(Debug)]
pub enum VolumeEvent {
    /// Of the core.
    Report(Report),
    /// Clients are served from now on, or refused.
    Exposed {
        /// Served.
        serving: bool,
    },
    /// The data channel of this session lost its connection and needs another one.
    ChannelBroken {
        /// Which.
        session: SessionId,
        /// Of the connection.
        attempt: u64,
        /// No other connection helps: the session is over.
        fatal: bool,
        /// In words.
        reason: String,
    },
    /// The FUSE connection ended by itself.
    FuseEnded {
        /// As given with it.
        number: u64,
        /// Why.
        end: FuseEnd,
    },
    /// A frame was altered on the way; it will be sent again.
    Corrupt {
        /// On which path.
        path: u16,
        /// What was wrong.
        why: String,
    },
    /// A component failed in a way the control plane should tell the operator.
    Trouble(String),
    /// The thread ended, and holds nothing any more.
    Ended,
}

/// What both sides of the thread see without messages.
#[derive(Debug, Default)]
pub struct Shared {
    /// CLOCK_BOOTTIME in ns until which mirrored requests may complete.
    pub lease_until_ns: AtomicU64,
    /// Some request waits for a lease: a renewal should wake the thread.
    pub wants_lease: AtomicBool,
    /// When the thread last turned its loop, CLOCK_BOOTTIME in ns.
    pub turned_ns: AtomicU64,
    snapshot: Mutex<Snapshot>,
}

impl Shared {
    /// The newest snapshot.
    pub fn snapshot(&self) -> Snapshot {
        self.snapshot.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn publish(&self, snapshot: Snapshot) {
        *self.snapshot.lock().unwrap_or_else(PoisonError::into_inner) = snapshot;
    }
}

/// The control plane's end.
#[derive(Clone, Debug)]
pub struct VolumeHandle {
    /// Position in the server's list.
    pub index: VolumeIndex,
    commands: mpsc::Sender<VolumeCommand>,
    waker: Waker,
    /// What both see.
    pub shared: Arc<Shared>,
}

impl VolumeHandle {
    /// Gives a command. A thread that ended takes none: its `Ended` says so.
    pub fn send(&self, command: VolumeCommand) {
        if self.commands.send(command).is_ok() {
            self.waker.wake();
        }
    }

    /// Makes the thread look at the lease.
    pub fn wake(&self) {
        self.waker.wake();
    }
}
