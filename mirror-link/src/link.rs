//! The control plane's view of the link: start it, speak, listen.

use std::net::SocketAddr;
use std::net::TcpStream;
use std::sync::Arc;

use duplex_core::ids::{ServerName, SessionId, VolumeIndex};
use duplex_core::message::ControlMessage;
use rustls::Connection;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::config::LinkConfig;
use crate::frame::NAME_MAX_BYTES;
use crate::handshake::{PeerFacts, Refusal, Shared};
use crate::manager::{Command, Manager};
use crate::path::PathCounters;
use crate::secret::{Secrets, SharedSecrets};
use crate::tls::TlsSetupError;
use crate::{dialler, listener};

/// Events that may wait for the layer above before the link stops reading from the peer.
const EVENTS_MAX: usize = 1024;
/// Commands that may wait for the link.
const COMMANDS_MAX: usize = 1024;
/// What the connections may have told the manager and it has not yet looked at.
const INPUTS_MAX: usize = 256;
/// Connections the kernel completes before they are accepted.
const BACKLOG: i32 = 128;

/// Why a session ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum SessionEnd {
    /// By this server.
    Closed(String),
    /// By the peer.
    ClosedByPeer(String),
    /// The peer's process is another one now.
    PeerRestarted,
}

/// What the link tells the control plane.
#[derive(Debug)]
pub enum LinkEvent {
    /// Both agreed on a session: control messages may be sent, data connections follow.
    SessionUp {
        /// Its identity.
        session: SessionId,
        /// The other end.
        peer: PeerFacts,
    },
    /// The session is over; its data connections are to be closed.
    SessionDown {
        /// Which.
        session: SessionId,
        /// Why.
        end: SessionEnd,
    },
    /// The peer said this.
    Control(SessionId, ControlMessage),
    /// A connection for a volume's channel: give it to [`crate::DataChannel::attach`].
    Data(DataConnection),
    /// A path changed.
    Path {
        /// Its position.
        path: u16,
        /// A control connection stands and answers.
        up: bool,
        /// The control channel uses it.
        active: bool,
        /// Why it is down or silent; empty when it is up.
        why: String,
    },
    /// Someone who did not prove to be the peer. Nothing of what it said was looked at.
    Stranger {
        /// From where.
        address: SocketAddr,
        /// What was wrong.
        why: String,
    },
    /// The peer (it holds the secret) does not fit this server.
    Refused(Refusal),
    /// A frame that was altered on the way; its connection was reset, the frame will be sent again.
    CorruptFrame {
        /// On which path.
        path: u16,
        /// What was wrong.
        why: String,
    },
}

/// An authenticated connection of a volume's data channel.
#[derive(Debug)]
pub struct DataConnection {
    /// The session it belongs to.
    pub session: SessionId,
    /// The volume.
    pub volume: VolumeIndex,
    /// Grows with each connection of this volume in this session; give it back in [`LinkHandle::data_broken`].
    pub attempt: u64,
    /// The path it runs over.
    pub path: u16,
    pub(crate) socket: TcpStream,
    pub(crate) tls: Option<Box<Connection>>,
    pub(crate) early: Vec<u8>,
    pub(crate) counters: Arc<PathCounters>,
}

/// Why the link could not be started.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The configuration cannot work.
    #[error("{what}: {value}; {fix}")]
    Config {
        /// What is wrong.
        what: &'static str,
        /// The value.
        value: String,
        /// What to do.
        fix: &'static str,
    },
    /// No listener.
    #[error(
        "cannot listen on {address} for the mirror link: {error}; is the address on this machine, and free?"
    )]
    Listen {
        /// The address.
        address: SocketAddr,
        /// The kernel's answer.
        error: std::io::Error,
    },
    /// No TLS.
    #[error(transparent)]
    Tls(#[from] TlsSetupError),
}

/// The link did not take a command.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SendError {
    /// It is not keeping up.
    #[error("{COMMANDS_MAX} commands wait for the link already: it is not keeping up")]
    Busy,
    /// It has ended.
    #[error("the link has been stopped")]
    Stopped,
}

/// The running link. The link stops when the last handle is dropped.
#[derive(Clone, Debug)]
pub struct LinkHandle {
    commands: mpsc::Sender<Command>,
    counters: Arc<[Arc<PathCounters>]>,
    secrets: SharedSecrets,
}

/// The mirror link.
#[derive(Debug)]
pub struct Link;

impl Link {
    /// Starts it, inside a tokio runtime. The server with the smaller name dials, the other one listens on every
    /// path. Take every event: while [`EVENTS_MAX`] wait, nothing is read from the peer.
    pub fn start(config: LinkConfig) -> Result<(LinkHandle, mpsc::Receiver<LinkEvent>), LinkError> {
        check(&config)?;
        let listeners = if config.dials() { Vec::new() } else { listen(&config)? };
        let counters: Arc<[Arc<PathCounters>]> = config.paths.iter().map(|_| Arc::default()).collect();
        let shared = Shared::new(config)?;
        let (commands, command_queue) = mpsc::channel(COMMANDS_MAX);
        let (event_queue, events) = mpsc::channel(EVENTS_MAX);
        let (inputs, input_queue) = mpsc::channel(INPUTS_MAX);
        let mut tasks = JoinSet::new();
        if shared.config.dials() {
            for (path, counters) in (0..).zip(counters.iter()) {
                tasks.spawn(dialler::keep(Arc::clone(&shared), path, Arc::clone(counters), inputs.clone()));
            }
        } else {
            listener::spawn(&shared, listeners, &counters, &inputs, &mut tasks);
        }
        let handle =
            LinkHandle { commands, counters: Arc::clone(&counters), secrets: shared.secrets.clone() };
        let manager = Manager::new(shared, counters, inputs, event_queue, tasks);
        tokio::spawn(manager.run(command_queue, input_queue));
        Ok((handle, events))
    }
}

fn check(config: &LinkConfig) -> Result<(), LinkError> {
    let bad =
        |what, value: &dyn ToString, fix| Err(LinkError::Config { what, value: value.to_string(), fix });
    if config.server == config.peer {
        return bad("both servers have the same name", &config.server, "name them differently");
    }
    for ServerName(name) in [&config.server, &config.peer] {
        if name.is_empty() || name.len() > NAME_MAX_BYTES as usize {
            return bad("a server's name is empty or too long", name, "use 1 to 64 bytes");
        }
    }
    if config.paths.is_empty() || config.paths.len() > usize::from(u8::MAX) {
        return bad("number of link paths", &config.paths.len(), "configure 1 to 255");
    }
    Ok(())
}

fn listen(config: &LinkConfig) -> Result<Vec<TcpListener>, LinkError> {
    let one = |address: SocketAddr| {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
        socket.set_reuse_address(true)?;
        if address.is_ipv6() {
            socket.set_only_v6(true)?;
        }
        socket.set_nonblocking(true)?;
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        TcpListener::from_std(socket.into())
    };
    let listen = |address| one(address).map_err(|error| LinkError::Listen { address, error });
    config.paths.iter().map(|path| listen(path.listen)).collect()
}

impl LinkHandle {
    fn command(&self, command: Command) -> Result<(), SendError> {
        self.commands.try_send(command).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => SendError::Busy,
            mpsc::error::TrySendError::Closed(_) => SendError::Stopped,
        })
    }

    /// Sends a control message in order; it survives the loss of paths. A message of a session that is over is
    /// dropped. Heartbeats go over every path at once, before everything else, and are never sent twice.
    pub fn send(&self, session: SessionId, message: ControlMessage) -> Result<(), SendError> {
        self.command(Command::Send { session, message })
    }

    /// Ends a session; the reason is for the peer's events. A new one is opened after a short pause.
    pub fn close_session(&self, session: SessionId, reason: &str) -> Result<(), SendError> {
        self.command(Command::Close { session, reason: reason.to_owned() })
    }

    /// A volume's channel lost this connection ([`crate::ChannelEvent::Broken`]): another one will come.
    pub fn data_broken(
        &self,
        session: SessionId,
        volume: VolumeIndex,
        attempt: u64,
    ) -> Result<(), SendError> {
        self.command(Command::DataBroken { session, volume, attempt })
    }

    /// Operator: sessions are wanted (the state at start).
    pub fn connect(&self) -> Result<(), SendError> {
        self.command(Command::Wanted(true))
    }

    /// Operator: end the session and open none until [`LinkHandle::connect`].
    pub fn disconnect(&self) -> Result<(), SendError> {
        self.command(Command::Wanted(false))
    }

    /// One set of counters a path.
    pub fn path_counters(&self) -> &[Arc<PathCounters>] {
        &self.counters
    }

    /// The secrets of all handshakes from now on. Standing connections stay.
    pub fn set_secrets(&self, secrets: Secrets) {
        self.secrets.set(secrets);
    }
}
