//! The daemon's end of the control socket.
//!
//! Who may call: root and the daemon's own user, by the socket's mode *and* by the peer's credentials.
//! Every request that was read is answered, also while the daemon stops; a refused caller is answered in
//! full before the connection is closed. One request a connection.

use std::io;
use std::os::unix::net::UnixListener as StdListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use http_body_util::BodyExt;
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio::task::JoinSet;

use super::api::{Answer, Command, Wait};
use super::http::{self, Feed, Reply};
use super::status::{Status, Time};
use crate::config::RunDir;
use crate::events::EventLog;

/// Connections served at once; more wait in the socket's queue.
const CONNECTIONS_MAX: usize = 64;
/// A request must have arrived whole by then.
const REQUEST_TIME: Duration = Duration::from_secs(5);
/// After the stop was ordered, what is under way is answered by then.
const STOP_TIME: Duration = Duration::from_secs(3);
/// How often a connection is looked at for a client that went away while it waited.
const GONE_CHECK_TIME: Duration = Duration::from_millis(500);
/// Events given in one piece.
const EVENTS_PIECE: usize = 64;

/// Who called.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Caller {
    /// User.
    pub uid: u32,
    /// Process, where the kernel says.
    pub pid: Option<i32>,
}

/// A command on its way to the daemon.
#[derive(Debug)]
pub struct Call {
    /// What is wanted.
    pub command: Command,
    /// By whom.
    pub caller: Caller,
    /// Where the answer goes. Dropping it answers "stopping".
    pub reply: oneshot::Sender<Answer>,
}

/// What the server needs of the daemon.
#[derive(Clone)]
pub struct Backend {
    /// Commands go here.
    pub commands: mpsc::Sender<Call>,
    /// The page, replaced whenever something on it changes.
    pub status: watch::Receiver<Arc<Status>>,
    /// The events.
    pub events: EventLog,
    /// Called for every caller that was refused.
    pub on_refused: Arc<dyn Fn(Caller) + Send + Sync>,
}

/// The socket cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// A daemon lives here.
    #[error("another daemon runs with the run directory {}; stop it with `duplex down`, or use another --run-dir", run_dir.display())]
    Busy {
        /// The directory.
        run_dir: PathBuf,
    },
    /// The path does not fit into a socket address.
    #[error("the run directory {} is too long for a socket path ({bytes} bytes, 107 are allowed); use a shorter --run-dir", run_dir.display())]
    TooLong {
        /// The directory.
        run_dir: PathBuf,
        /// Of the longest socket path.
        bytes: usize,
    },
    /// The system said no.
    #[error("control socket {}: cannot {what}: {error}", path.display())]
    Io {
        /// Which path.
        path: PathBuf,
        /// Which step.
        what: &'static str,
        /// The system's words.
        error: io::Error,
    },
}

/// The bound socket. Holds the run directory's lock; dropping it removes the socket.
#[derive(Debug)]
pub struct Listener {
    socket: UnixListener,
    path: PathBuf,
    _lock: std::fs::File,
}

impl Drop for Listener {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Takes the run directory and its control socket, mode 0600. What a killed daemon left is removed. Must be
/// called within a tokio runtime.
///
/// # Errors
/// Another daemon has it, or the system refuses.
pub fn bind(run_dir: &RunDir) -> Result<Listener, BindError> {
    let path = run_dir.control();
    let bytes = path.as_os_str().len();
    if bytes > 107 {
        return Err(BindError::TooLong { run_dir: run_dir.path().to_owned(), bytes });
    }
    let failed = |path: &Path, what| {
        let path = path.to_owned();
        move |error: io::Error| BindError::Io { path, what, error }
    };
    std::fs::create_dir_all(run_dir.path()).map_err(failed(run_dir.path(), "make the run directory"))?;
    let lock_path = run_dir.path().join("lock");
    let lock = std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .open(&lock_path)
        .map_err(failed(&lock_path, "open the lock"))?;
    match rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => {
            return Err(BindError::Busy { run_dir: run_dir.path().to_owned() });
        }
        Err(errno) => return Err(failed(&lock_path, "lock the run directory")(errno.into())),
    }
    // The lock says that nobody lives here: a socket found now is left over.
    match std::fs::remove_file(&path) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(&path, "remove the old socket")(error)),
    }
    let socket = listen(&path).map_err(failed(&path, "listen"))?;
    let socket = UnixListener::from_std(socket).map_err(failed(&path, "listen"))?;
    Ok(Listener { socket, path, _lock: lock })
}

/// The mode is set before the name exists: nobody else can slip in between.
fn listen(path: &Path) -> io::Result<StdListener> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::fs::fchmod(&socket, rustix::fs::Mode::from_raw_mode(0o600))?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    rustix::net::listen(&socket, 128)?;
    Ok(StdListener::from(socket))
}

/// Serves until `stop` becomes true (or its sender is gone), then answers what is under way and returns.
pub async fn serve(listener: Listener, backend: Backend, mut stop: watch::Receiver<bool>) {
    let mut connections = JoinSet::new();
    let stopped = stop.clone();
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        while connections.try_join_next().is_some() {}
        let place = tokio::select! {
            place = Arc::clone(&places).acquire_owned() => place,
            () = ordered(&mut stop) => break,
        };
        tokio::select! {
            accepted = listener.socket.accept() => match accepted {
                Ok((stream, _)) => {
                    let serving = connection(stream, backend.clone(), stopped.clone());
                    connections.spawn(async move {
                        serving.await;
                        drop(place);
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "control socket: cannot accept");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            },
            () = ordered(&mut stop) => break,
        }
    }
    answer_the_queue(&listener, &backend, &stop, &mut connections);
    drop(listener);
    let finish = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(STOP_TIME + Duration::from_secs(1), finish).await.is_err() {
        connections.shutdown().await;
    }
}

/// Until the stop is ordered, or nobody is left who could.
async fn ordered(stop: &mut watch::Receiver<bool>) {
    let _ = stop.wait_for(|stop| *stop).await;
}

/// Those who connected before the stop get an answer too.
fn answer_the_queue(
    listener: &Listener,
    backend: &Backend,
    stop: &watch::Receiver<bool>,
    connections: &mut JoinSet<()>,
) {
    let waker = std::task::Waker::noop();
    let mut context = std::task::Context::from_waker(waker);
    for _ in 0..CONNECTIONS_MAX * 2 {
        match listener.socket.poll_accept(&mut context) {
            std::task::Poll::Ready(Ok((stream, _))) => {
                connections.spawn(connection(stream, backend.clone(), stop.clone()));
            }
            std::task::Poll::Ready(Err(_)) | std::task::Poll::Pending => return,
        }
    }
}

async fn connection(stream: UnixStream, backend: Backend, stop: watch::Receiver<bool>) {
    let Ok(credentials) = stream.peer_cred() else { return };
    let caller = Caller { uid: credentials.uid(), pid: credentials.pid() };
    let allowed = caller.uid == 0 || caller.uid == rustix::process::geteuid().as_raw();
    if !allowed {
        (backend.on_refused)(caller);
    }
    let service = service_fn(|request| {
        let backend = backend.clone();
        let stop = stop.clone();
        async move { Ok::<_, std::convert::Infallible>(handle(request, backend, stop, caller, allowed).await) }
    });
    let Ok(watched) = rustix::io::fcntl_dupfd_cloexec(&stream, 0) else { return };
    // A caller that closed only its sending half still gets its answer; one that is gone ends the wait.
    let serving = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .half_close(true)
        .header_read_timeout(REQUEST_TIME)
        .keep_alive(false)
        .max_buf_size(http::REQUEST_MAX_BYTES)
        .serve_connection(TokioIo::new(stream), service);
    tokio::select! {
        served = serving => if let Err(error) = served {
            tracing::debug!(%error, uid = caller.uid, "control connection ended");
        },
        () = gone(watched) => tracing::debug!(uid = caller.uid, "control client went away"),
    }
}

/// Until the other end of the connection is closed in both directions.
async fn gone(socket: rustix::fd::OwnedFd) {
    use rustix::event::{PollFd, PollFlags, poll};
    let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    loop {
        tokio::time::sleep(GONE_CHECK_TIME).await;
        let mut polled = [PollFd::new(&socket, PollFlags::empty())];
        let hung_up = poll(&mut polled, Some(&now)).is_ok()
            && polled[0].revents().intersects(PollFlags::HUP | PollFlags::ERR);
        if hung_up {
            return;
        }
    }
}

async fn handle(
    request: Request<Incoming>,
    backend: Backend,
    stop: watch::Receiver<bool>,
    caller: Caller,
    allowed: bool,
) -> Reply {
    let (head, body) = request.into_parts();
    // The body is read before anything is answered: a client that still writes would otherwise lose the
    // answer with the connection.
    let body = tokio::time::timeout(REQUEST_TIME, read_body(body)).await;
    if !allowed {
        let text =
            format!("user {} may not control this daemon; call as root or as the daemon's user", caller.uid);
        return http::answer(&Answer::refused(http::NOT_ALLOWED, text));
    }
    let body = match body {
        Ok(Ok(body)) => body,
        Ok(Err(answer)) => return http::answer(&answer),
        Err(_) => {
            let text = "the request did not arrive whole within 5 s".to_owned();
            return http::answer(&Answer::TimedOut { text });
        }
    };
    let query = head.uri.query();
    match (&head.method, head.uri.path()) {
        (&Method::GET, "/v1/status") => status(query, backend, stop).await,
        (&Method::GET, "/v1/events") => events(query, backend, stop).await,
        (&Method::POST, "/v1/command") => http::answer(&command(&body, backend, stop, caller).await),
        (method, path) => {
            let text = format!(
                "{method} {path} is not known; this daemon speaks /v1/status, /v1/events, /v1/command"
            );
            http::json(StatusCode::NOT_FOUND, &Answer::Wrong { text })
        }
    }
}

async fn read_body(mut body: Incoming) -> Result<Bytes, Answer> {
    let mut kept = Vec::new();
    let mut seen = 0_usize;
    while let Some(frame) = body.frame().await {
        let frame =
            frame.map_err(|error| Answer::Wrong { text: format!("the request broke off: {error}") })?;
        let Ok(data) = frame.into_data() else { continue };
        seen = seen.saturating_add(data.len());
        if seen <= http::REQUEST_MAX_BYTES {
            kept.extend_from_slice(&data);
        } else if seen > http::DRAIN_MAX_BYTES {
            break;
        }
    }
    if seen > http::REQUEST_MAX_BYTES {
        let text = format!("the request has more than {} bytes", http::REQUEST_MAX_BYTES);
        return Err(Answer::Wrong { text });
    }
    Ok(kept.into())
}

fn stopping() -> Answer {
    Answer::Stopping { text: "the daemon is stopping; the request was not carried out".to_owned() }
}

async fn command(body: &Bytes, backend: Backend, mut stop: watch::Receiver<bool>, caller: Caller) -> Answer {
    let command: Command = match serde_json::from_slice(body) {
        Ok(command) => command,
        Err(error) => return Answer::Wrong { text: format!("the command cannot be read: {error}") },
    };
    let (reply, mut answer) = oneshot::channel();
    match backend.commands.try_send(Call { command, caller, reply }) {
        Ok(()) => {}
        Err(mpsc::error::TrySendError::Full(_)) => {
            return Answer::refused("busy", "too many commands are waiting; try again");
        }
        Err(mpsc::error::TrySendError::Closed(_)) => return stopping(),
    }
    // The daemon may still answer while it stops (`down` itself does).
    let stopped = async {
        ordered(&mut stop).await;
        tokio::time::sleep(STOP_TIME).await;
    };
    tokio::select! {
        biased;
        given = &mut answer => given.unwrap_or_else(|_| stopping()),
        () = stopped => stopping(),
    }
}

async fn status(query: Option<&str>, mut backend: Backend, mut stop: watch::Receiver<bool>) -> Reply {
    let wait = match http::query(query, "wait").map(|text| text.parse::<Wait>().map_err(|what| (text, what)))
    {
        None => None,
        Some(Ok(wait)) => Some(wait),
        Some(Err((text, what))) => {
            return http::answer(&Answer::Wrong { text: format!("wait={text} {what}") });
        }
    };
    let timeout = match http::query(query, "timeout_ms").map(|text| text.parse::<u64>()) {
        None => None,
        Some(Ok(millis)) => Some(Duration::from_millis(millis)),
        Some(Err(_)) => {
            return http::answer(&Answer::Wrong {
                text: "timeout_ms is not a number of milliseconds".to_owned(),
            });
        }
    };
    let Some(wait) = wait else {
        let now = Arc::clone(&backend.status.borrow());
        return http::json(StatusCode::OK, now.as_ref());
    };
    let reached = async {
        let found = backend.status.wait_for(|status| wait.holds(status)).await;
        found.ok().map(|status| Arc::clone(&status))
    };
    let timed_out = async {
        match timeout {
            Some(timeout) => tokio::time::sleep(timeout).await,
            None => std::future::pending().await,
        }
    };
    let found = tokio::select! {
        biased;
        found = reached => found,
        () = ordered(&mut stop) => None,
        () = timed_out => {
            let now = Arc::clone(&backend.status.borrow());
            let text = format!("not {wait} in time: {} is {}, role {}", now.server, now.state, now.role);
            return http::answer(&Answer::TimedOut { text });
        }
    };
    match found {
        Some(status) => http::json(StatusCode::OK, status.as_ref()),
        None => http::answer(&stopping()),
    }
}

async fn events(query: Option<&str>, backend: Backend, stop: watch::Receiver<bool>) -> Reply {
    let since = match http::query(query, "since").map(|text| text.parse::<Time>()) {
        None => None,
        Some(Ok(time)) => Some(time),
        Some(Err(error)) => {
            return http::answer(&Answer::Wrong { text: format!("since is not a time: {error}") });
        }
    };
    let follow = http::query(query, "follow").is_some_and(|text| text == "1");
    let (sender, receiver) = mpsc::channel(4);
    tokio::spawn(feed_events(backend.events, since, follow, sender, stop));
    http::stream("application/x-ndjson", Feed(receiver))
}

/// Gives what is there, then, when following, what comes. Ends with the client or the daemon.
async fn feed_events(
    log: EventLog,
    since: Option<Time>,
    follow: bool,
    sender: mpsc::Sender<Bytes>,
    mut stop: watch::Receiver<bool>,
) {
    let mut newest = log.newest();
    let mut last = 0;
    let mut since = since;
    loop {
        let seen = *newest.borrow_and_update();
        let reader = log.clone();
        let read = tokio::task::spawn_blocking(move || reader.after(last, since)).await;
        let records = match read {
            Ok(Ok(records)) => records,
            Ok(Err(error)) => {
                tracing::warn!(%error, "cannot read the events");
                return;
            }
            Err(_) => return,
        };
        for piece in records.chunks(EVENTS_PIECE) {
            let mut lines = Vec::new();
            for record in piece {
                if serde_json::to_writer(&mut lines, record.as_ref()).is_ok() {
                    lines.push(b'\n');
                }
            }
            if sender.send(lines.into()).await.is_err() {
                return;
            }
        }
        last = records.last().map_or(last.max(seen), |record| record.sequence);
        if !follow {
            return;
        }
        since = None;
        tokio::select! {
            changed = newest.changed() => if changed.is_err() { return },
            () = ordered(&mut stop) => return,
            () = sender.closed() => return,
        }
    }
}
