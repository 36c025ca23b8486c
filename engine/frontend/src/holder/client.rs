//! The daemon's side of the holder.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use super::{DONE, DROP, GET, HolderError, LIST, NOT_THERE, PUT, Packet, STOP, receive_packet, send_packet};

/// The holder answers at once; longer than this it does not live.
const ANSWER_WAIT: Duration = Duration::from_secs(5);

/// A connection to the holder.
#[derive(Debug)]
pub struct HolderClient {
    path: PathBuf,
    socket: OwnedFd,
}

impl HolderClient {
    /// Connects to the holder at a path. `None` when none runs there.
    ///
    /// # Errors
    /// [`HolderError::System`] for anything but a missing holder.
    pub fn connect(path: &Path) -> Result<Option<Self>, HolderError> {
        let failed = |step: &'static str| {
            move |errno: rustix::io::Errno| HolderError::System {
                path: path.to_owned(),
                step,
                source: errno.into(),
            }
        };
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .map_err(failed("make a socket"))?;
        for side in [Timeout::Recv, Timeout::Send] {
            set_socket_timeout(&socket, side, Some(ANSWER_WAIT)).map_err(failed("set a time limit"))?;
        }
        let address = SocketAddrUnix::new(path).map_err(failed("name the socket"))?;
        match rustix::io::retry_on_intr(|| connect(&socket, &address)) {
            Ok(()) => Ok(Some(Self { path: path.to_owned(), socket })),
            Err(rustix::io::Errno::NOENT | rustix::io::Errno::CONNREFUSED) => Ok(None),
            Err(errno) => Err(failed("connect")(errno)),
        }
    }

    /// Hands a volume's `/dev/fuse` descriptor over; an earlier one of the name is dropped.
    ///
    /// # Errors
    /// [`HolderError`].
    pub fn put(&self, volume: &str, descriptor: BorrowedFd<'_>) -> Result<(), HolderError> {
        self.ask(PUT, volume, Some(descriptor)).map(drop)
    }

    /// A descriptor of the volume's connection, if there is a living one. The holder keeps its own.
    ///
    /// # Errors
    /// [`HolderError`].
    pub fn get(&self, volume: &str) -> Result<Option<OwnedFd>, HolderError> {
        match self.ask(GET, volume, None)? {
            Some(Packet { descriptor: Some(descriptor), .. }) => Ok(Some(descriptor)),
            Some(_) => Err(self.garbled("no descriptor")),
            None => Ok(None),
        }
    }

    /// The volumes whose connections live.
    ///
    /// # Errors
    /// [`HolderError`].
    pub fn list(&self) -> Result<Vec<String>, HolderError> {
        let mut names: Vec<String> = Vec::new();
        loop {
            let after = names.last().cloned().unwrap_or_default();
            let Some(packet) = self.ask(LIST, &after, None)? else { return Err(self.garbled("no list")) };
            let text =
                String::from_utf8(packet.bytes).map_err(|_| self.garbled("a name that is not text"))?;
            let before = names.len();
            names.extend(text[1..].lines().map(str::to_owned));
            if names.len() == before {
                return Ok(names);
            }
        }
    }

    /// Forgets the volume's descriptor. True when there was one.
    ///
    /// # Errors
    /// [`HolderError`].
    pub fn forget(&self, volume: &str) -> Result<bool, HolderError> {
        Ok(self.ask(DROP, volume, None)?.is_some())
    }

    /// Ends the holder, and with it every connection that nobody else has.
    ///
    /// # Errors
    /// [`HolderError`].
    pub fn stop(self) -> Result<(), HolderError> {
        self.ask(STOP, "", None).map(drop)
    }

    /// Becomes readable for end of file when the holder ends, or when this client is dropped: see [`wait_for_end`].
    ///
    /// # Errors
    /// No descriptor is free.
    pub fn watched(&self) -> Result<OwnedFd, HolderError> {
        let failed = |source| HolderError::System { path: self.path.clone(), step: "watch it", source };
        self.socket.try_clone().map_err(failed)
    }

    fn garbled(&self, what: &'static str) -> HolderError {
        HolderError::Garbled { path: self.path.clone(), what }
    }

    /// `None`: the holder has no such volume.
    fn ask(
        &self,
        verb: u8,
        name: &str,
        descriptor: Option<BorrowedFd<'_>>,
    ) -> Result<Option<Packet>, HolderError> {
        let failed = |step: &'static str| {
            move |source: io::Error| HolderError::System { path: self.path.clone(), step, source }
        };
        let mut request = Vec::with_capacity(1 + name.len());
        request.push(verb);
        request.extend_from_slice(name.as_bytes());
        send_packet(self.socket.as_fd(), &request, descriptor).map_err(failed("ask"))?;
        let packet = receive_packet(self.socket.as_fd()).map_err(failed("answer"))?;
        let Some(packet) = packet else { return Err(self.garbled("a closed connection")) };
        match packet.bytes.first() {
            Some(&DONE) => Ok(Some(packet)),
            Some(&NOT_THERE) => Ok(None),
            Some(_) => {
                let reason = String::from_utf8_lossy(&packet.bytes[1..]).into_owned();
                Err(HolderError::Refused { path: self.path.clone(), reason })
            }
            None => Err(self.garbled("nothing")),
        }
    }
}

impl Drop for HolderClient {
    fn drop(&mut self) {
        // Who watches this connection sees its end.
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Both);
    }
}

/// Waits until the holder at the other end of a [`HolderClient::watched`] connection has ended, or the client let the
/// connection go.
pub fn wait_for_end(watched: &OwnedFd) {
    loop {
        let mut polled = [PollFd::new(watched, PollFlags::RDHUP)];
        match poll(&mut polled, None) {
            Ok(_) if polled[0].revents().is_empty() => {}
            Err(rustix::io::Errno::INTR) => {}
            Ok(_) | Err(_) => return,
        }
    }
}

/// Starts a holder as a process in a session of its own, which outlives this one, and connects to it. `command` runs
/// [`super::run_holder`] with the same path. The child is to be waited for while the daemon lives.
///
/// # Errors
/// [`HolderError::Ended`] when it does not come up, [`HolderError::System`] when it cannot be started or does not answer.
pub fn start_holder(mut command: Command, path: &Path) -> Result<(Child, HolderClient), HolderError> {
    let failed =
        |step: &'static str| move |source| HolderError::System { path: path.to_owned(), step, source };
    // The holder lets its standard output go once it listens; the kernel does so when it ends.
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    // SAFETY: `setsid` is a plain system call, sound between fork and exec.
    unsafe {
        command.pre_exec(|| {
            rustix::process::setsid()?;
            Ok(())
        });
    }
    let mut child = command.spawn().map_err(failed("start it"))?;
    let output = child.stdout.take();
    let connected = match output.map(wait_until_let_go).transpose() {
        Ok(_) => HolderClient::connect(path),
        Err(error) => Err(failed("wait until it answers")(error)),
    };
    match connected {
        Ok(Some(client)) => Ok((child, client)),
        Ok(None) => {
            // It has ended, or somebody took its socket away: then it is of no use and must not be waited for.
            let _ = child.kill();
            let status = child.wait().map_err(failed("wait for it"))?;
            Err(HolderError::Ended { path: path.to_owned(), status })
        }
        Err(error) => {
            // Of no use to anybody, and it may yet come up: end it.
            let _ = child.kill();
            let _ = child.wait();
            Err(error)
        }
    }
}

/// Waits until nobody writes to a pipe any more, [`ANSWER_WAIT`] at most. What is written is dropped.
fn wait_until_let_go(pipe: ChildStdout) -> io::Result<()> {
    let end = Instant::now() + ANSWER_WAIT;
    let mut dropped = [0; 256];
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let left =
            rustix::event::Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
        let mut polled = [PollFd::new(&pipe, PollFlags::IN)];
        match poll(&mut polled, Some(&left)) {
            Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
            Ok(_) => {
                if rustix::io::retry_on_intr(|| rustix::io::read(&pipe, &mut dropped))? == 0 {
                    return Ok(());
                }
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}
