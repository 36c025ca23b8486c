//! The listening server's side: who comes in, and what for.

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use duplex_core::ids::VolumeIndex;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

use crate::guard::{Attempt, Guard};
use crate::handshake::{Accepted, HandshakeError, Purpose, Refusal, Shared, accept, unproven};
use crate::link::{DataConnection, LinkEvent};
use crate::manager::{DataAsk, Input, next_connection};
use crate::path::{ControlConnection, Outbox, PathCounters};
use crate::stream::{Stream, StreamError};

/// Pause when the kernel has no descriptor for a new connection.
const NO_DESCRIPTOR_PAUSE: Duration = Duration::from_millis(100);

struct Listening {
    shared: Arc<Shared>,
    counters: Arc<[Arc<PathCounters>]>,
    inputs: mpsc::Sender<Input>,
    guard: Mutex<Guard>,
    started: Instant,
}

/// One task a listener; their connections' tasks end with them.
pub(crate) fn spawn(
    shared: &Arc<Shared>,
    listeners: Vec<TcpListener>,
    counters: &Arc<[Arc<PathCounters>]>,
    inputs: &mpsc::Sender<Input>,
    tasks: &mut JoinSet<()>,
) {
    let peers: Vec<IpAddr> = shared.config.paths.iter().map(|path| path.peer.ip()).collect();
    let listening = Arc::new(Listening {
        shared: Arc::clone(shared),
        counters: Arc::clone(counters),
        inputs: inputs.clone(),
        guard: Mutex::new(Guard::new(peers)),
        started: Instant::now(),
    });
    for listener in listeners {
        tasks.spawn(accept_all(Arc::clone(&listening), listener));
    }
}

async fn accept_all(listening: Arc<Listening>, listener: TcpListener) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((tcp, address)) => {
                    if let Some(why) = listening.turned_away(address) {
                        drop(tcp);
                        listening.tell(LinkEvent::Stranger { address, why }).await;
                    } else {
                        connections.spawn(Arc::clone(&listening).serve(tcp, address));
                    }
                }
                Err(error) => {
                    tracing::warn!(%error, "mirror link: accept failed");
                    sleep(NO_DESCRIPTOR_PAUSE).await;
                }
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

impl Listening {
    fn guard(&self) -> MutexGuard<'_, Guard> {
        self.guard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Connections that are closed unread; a text when it is news. `Some` only for those.
    fn turned_away(&self, address: SocketAddr) -> Option<String> {
        match self.guard().enter(address.ip(), Instant::now()) {
            Ok(()) => None,
            Err((turned, true)) => Some(turned.to_string()),
            Err((_, false)) => Some(String::new()),
        }
    }

    async fn tell(&self, event: LinkEvent) {
        if matches!(&event, LinkEvent::Stranger { why, .. } if why.is_empty()) {
            return;
        }
        // Fails only when the link itself ends.
        let _ = self.inputs.send(Input::Event(event)).await;
    }

    async fn serve(self: Arc<Self>, tcp: TcpStream, address: SocketAddr) {
        let deadline = self.shared.config.timers.handshake;
        let accepted = timeout(deadline, accept(&self.shared, tcp))
            .await
            .unwrap_or_else(|_| Err(unproven(&StreamError::Deadline(deadline))));
        let end = match &accepted {
            Err(HandshakeError::Stranger(_)) => Attempt::Failed,
            Err(HandshakeError::Vanished(_)) => Attempt::Vanished,
            Err(HandshakeError::Refused(_) | HandshakeError::Connection(_)) | Ok(_) => Attempt::Proven,
        };
        self.guard().leave(address.ip(), end, Instant::now());
        match accepted {
            Err(HandshakeError::Stranger(why) | HandshakeError::Vanished(why)) => {
                self.tell(LinkEvent::Stranger { address, why }).await
            }
            Err(HandshakeError::Refused(refusal)) => self.tell(LinkEvent::Refused(refusal)).await,
            Err(HandshakeError::Connection(error)) => {
                tracing::info!(%address, %error, "mirror link: the peer's connection ended in the handshake");
            }
            Ok(accepted) => self.welcome(accepted).await,
        }
    }

    async fn welcome(self: Arc<Self>, accepted: Accepted) {
        match accepted.purpose.clone() {
            Purpose::Control { path } => self.control(accepted, path).await,
            Purpose::Data { path, volume, attempt, .. } => {
                self.data(accepted, path, VolumeIndex(volume), attempt).await;
            }
        }
    }

    async fn control(self: Arc<Self>, accepted: Accepted, path: u16) {
        let peer = accepted.peer;
        let deadline = self.shared.config.timers.handshake;
        let Ok(Ok(stream)) = timeout(deadline, accepted.welcome(&self.shared)).await else { return };
        let counters = Arc::clone(&self.counters[usize::from(path)]);
        counters.connections.fetch_add(1, Ordering::Relaxed);
        let (connection, outbox) = (next_connection(), Outbox::default());
        let up = Input::ControlUp { path, connection, peer, outbox: outbox.clone() };
        if self.inputs.send(up).await.is_err() {
            return;
        }
        let control = ControlConnection {
            connection,
            stream,
            outbox,
            counters,
            timers: self.shared.config.timers,
            inputs: self.inputs.clone(),
            started: self.started,
        };
        let error = control.run().await;
        // Fails only when the link itself ends.
        let _ = self.inputs.send(Input::ControlDown { connection, error }).await;
    }

    async fn data(self: Arc<Self>, accepted: Accepted, path: u16, volume: VolumeIndex, attempt: u64) {
        let (session, peer) = (accepted.session, accepted.peer);
        let (answer, allowed) = oneshot::channel();
        let ask = DataAsk { session, incarnation: peer.incarnation, volume, attempt, answer };
        if self.inputs.send(Input::DataAsked(ask)).await.is_err() {
            return;
        }
        let deadline = self.shared.config.timers.handshake;
        match allowed.await {
            Ok(Ok(())) => {}
            Ok(Err(refusal)) => {
                // Not news for the operator: the dialler has not yet heard that the session ended.
                let _ = timeout(deadline, accepted.refuse(refusal)).await;
                return;
            }
            Err(_) => return,
        }
        let Ok(Ok(stream)) = timeout(deadline, accepted.welcome(&self.shared)).await else { return };
        let counters = Arc::clone(&self.counters[usize::from(path)]);
        if let Ok(connection) = data_connection(stream, session, volume, attempt, path, counters) {
            // Fails only when the link itself ends.
            let _ = self.inputs.send(Input::DataAccepted(connection)).await;
        }
    }
}

/// The refusal of a data connection of a session that does not stand.
pub(crate) fn session_unknown(mine: &str, theirs: &str) -> Refusal {
    Refusal::new("session-unknown", mine, theirs)
}

/// Turns a connection of the control plane into one for a volume's ring.
pub(crate) fn data_connection(
    stream: Stream,
    session: duplex_core::ids::SessionId,
    volume: VolumeIndex,
    attempt: u64,
    path: u16,
    counters: Arc<PathCounters>,
) -> Result<DataConnection, StreamError> {
    let (tcp, tls, early) = stream.into_parts();
    let socket = tcp.into_std()?;
    // The ring waits in the kernel: a non-blocking socket would answer EAGAIN instead.
    socket.set_nonblocking(false)?;
    counters.data_connections.fetch_add(1, Ordering::Relaxed);
    Ok(DataConnection { session, volume, attempt, path, socket, tls, early, counters })
}
