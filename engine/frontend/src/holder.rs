//! Keeps `/dev/fuse` descriptors while the daemon restarts.
//!
//! A FUSE file system ends with its last `/dev/fuse` descriptor. The holder is a tiny process that keeps a second one
//! per volume; a restarted daemon gets it back and has the pending requests sent again, so users see a pause and no
//! error. The holder keeps nothing else: no backing, no mount, no loop device. So when both processes die, the
//! connections end and users get EIO; nothing hangs. Under systemd its descriptor store does the same ([`systemd`]).
//!
//! One request is one packet of a Unix socket, its answer another; a descriptor travels beside it.

mod client;
pub mod systemd;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use duplex_core::limits::VOLUMES_MAX;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{FlockOperation, flock};
use rustix::io::retry_on_intr;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, listen,
    recvmsg, sendmsg, socket_with,
};

pub use client::{HolderClient, start_holder, wait_for_end};

use crate::fuse::connection_is_alive;

/// Longest volume name.
const NAME_MAX_BYTES: usize = 255;
/// Longest packet: a page of names.
const PACKET_MAX_BYTES: usize = 16 << 10;
/// Clients at once; there is one daemon and now and then an operator's tool.
const CLIENTS_MAX: usize = 16;

const PUT: u8 = 1;
const GET: u8 = 2;
const LIST: u8 = 3;
const DROP: u8 = 4;
const STOP: u8 = 5;
const DONE: u8 = 0;
const REFUSED: u8 = 1;
const NOT_THERE: u8 = 2;

/// Why the holder, or talking to it, failed.
#[derive(Debug, thiserror::Error)]
pub enum HolderError {
    /// A system call.
    #[error("holder at {}: {step}: {source}; check the directory's owner and that the holder runs", path.display())]
    System {
        /// The socket.
        path: PathBuf,
        /// What was tried.
        step: &'static str,
        /// As the kernel gave it.
        source: io::Error,
    },
    /// Another holder has the socket.
    #[error("a holder already runs at {}; end it with `duplex down` or SIGTERM first", path.display())]
    AlreadyRuns {
        /// The socket.
        path: PathBuf,
    },
    /// The holder said no.
    #[error("holder at {} refused: {reason}", path.display())]
    Refused {
        /// The socket.
        path: PathBuf,
        /// Its words.
        reason: String,
    },
    /// Its answer makes no sense.
    #[error("holder at {} answered with {what}; is another program at that path?", path.display())]
    Garbled {
        /// The socket.
        path: PathBuf,
        /// What was wrong.
        what: &'static str,
    },
    /// A started holder ended at once.
    #[error("the holder for {} ended with {status} before it answered; run it by hand to see why", path.display())]
    Ended {
        /// The socket.
        path: PathBuf,
        /// How.
        status: std::process::ExitStatus,
    },
}

/// One packet with what came beside it.
struct Packet {
    bytes: Vec<u8>,
    descriptor: Option<OwnedFd>,
}

/// A signal may interrupt any of these calls, and does where a ring of this thread just ended: the kernel then wakes
/// the thread for the ring's last work, and a socket with a time limit is not restarted by it.
fn send_packet(to: BorrowedFd<'_>, bytes: &[u8], descriptor: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut beside = SendAncillaryBuffer::new(&mut space);
    let list = descriptor.map(|descriptor| [descriptor]);
    if let Some(list) = &list
        && !beside.push(SendAncillaryMessage::ScmRights(list))
    {
        return Err(io::Error::other("no room for a descriptor"));
    }
    retry_on_intr(|| sendmsg(to, &[IoSlice::new(bytes)], &mut beside, SendFlags::NOSIGNAL))?;
    Ok(())
}

/// `None` when the other side closed.
fn receive_packet(from: BorrowedFd<'_>) -> io::Result<Option<Packet>> {
    let mut bytes = vec![0; PACKET_MAX_BYTES];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut beside = RecvAncillaryBuffer::new(&mut space);
    let mut vectors = [IoSliceMut::new(&mut bytes)];
    let received = retry_on_intr(|| recvmsg(from, &mut vectors, &mut beside, RecvFlags::CMSG_CLOEXEC))?;
    let mut descriptor = None;
    for message in beside.drain() {
        if let RecvAncillaryMessage::ScmRights(descriptors) = message {
            descriptor = descriptors.last().or(descriptor);
        }
    }
    if received.bytes == 0 {
        return Ok(None);
    }
    bytes.truncate(received.bytes);
    Ok(Some(Packet { bytes, descriptor }))
}

/// Runs the holder until it is told to stop; SIGTERM ends it as it ends any process, and with it the descriptors it
/// alone keeps. Call it in a process of its own, in a session of its own.
///
/// # Errors
/// [`HolderError::AlreadyRuns`], or the socket cannot be made or polled.
pub fn run_holder(path: &Path) -> Result<(), HolderError> {
    let system = |step: &'static str| {
        move |source: io::Error| HolderError::System { path: path.to_owned(), step, source }
    };
    let _lock = lock(path)?;
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(system("remove the old socket")(error));
        }
        Ok(()) | Err(_) => {}
    }
    let listener = listen_at(path).map_err(system("make the socket"))?;
    prepare_process();
    let_output_go();
    let mut holder = Holder { listener, clients: Vec::new(), held: BTreeMap::new() };
    while holder.step().map_err(system("poll"))? {}
    // A successor may already be starting; it removes what it finds.
    let _ = std::fs::remove_file(path);
    Ok(())
}

/// Only one holder per path: the lock ends with the process, however it ends.
fn lock(path: &Path) -> Result<File, HolderError> {
    let mut lock_path = path.as_os_str().to_owned();
    lock_path.push(".lock");
    let failed = |source| HolderError::System { path: path.to_owned(), step: "lock", source };
    let file = File::options().create(true).truncate(false).write(true).open(lock_path).map_err(failed)?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(HolderError::AlreadyRuns { path: path.to_owned() }),
        Err(errno) => Err(failed(errno.into())),
    }
}

fn listen_at(path: &Path) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let listener = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    // The mode is set before the name exists: nobody else can slip in between.
    rustix::fs::fchmod(&listener, rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR)?;
    bind(&listener, &SocketAddrUnix::new(path)?)?;
    listen(&listener, CLIENTS_MAX as i32)?;
    Ok(listener)
}

/// Whoever started the holder sees by the end of its output that it listens.
fn let_output_go() {
    let null = File::options().write(true).open("/dev/null");
    let gone = null.and_then(|null| Ok(rustix::stdio::dup2_stdout(&null)?));
    if let Err(error) = gone {
        tracing::warn!(%error, "holder: cannot let its output go");
    }
}

/// The holder must not keep a directory busy, be the one that dies when memory is short, or run out of descriptors.
/// Each is a help, none a condition.
fn prepare_process() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    if let Err(error) = rustix::process::chdir("/") {
        tracing::warn!(%error, "holder: cannot leave its directory");
    }
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", "-1000") {
        tracing::debug!(%error, "holder: cannot be spared when memory is short");
    }
    let mut limit = getrlimit(Resource::Nofile);
    let wanted = (VOLUMES_MAX + CLIENTS_MAX + 16) as u64;
    if limit.current.is_some_and(|current| current < wanted) {
        limit.current = Some(limit.maximum.map_or(wanted, |maximum| maximum.min(wanted)));
        if let Err(error) = setrlimit(Resource::Nofile, limit) {
            tracing::warn!(%error, "holder: cannot raise its limit of descriptors");
        }
    }
}

struct Holder {
    listener: OwnedFd,
    clients: Vec<OwnedFd>,
    held: BTreeMap<String, OwnedFd>,
}

/// What to do with a client after its request.
enum Next {
    Keep,
    Close,
    Stop,
}

impl Holder {
    /// Waits for something and does it. False when told to stop.
    fn step(&mut self) -> io::Result<bool> {
        let mut polled = vec![PollFd::new(&self.listener, PollFlags::IN)];
        polled.extend(self.clients.iter().map(|client| PollFd::new(client, PollFlags::IN)));
        match poll(&mut polled, None) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => return Ok(true),
            Err(errno) => return Err(errno.into()),
        }
        let ready: Vec<bool> = polled.iter().map(|polled| !polled.revents().is_empty()).collect();
        for at in (0..self.clients.len()).rev().filter(|at| ready[at + 1]) {
            match self.serve(at) {
                Next::Keep => {}
                Next::Close => drop(self.clients.swap_remove(at)),
                Next::Stop => return Ok(false),
            }
        }
        if ready[0] {
            self.accept();
        }
        Ok(true)
    }

    fn accept(&mut self) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let Ok(client) = accept_with(&self.listener, flags) else { return };
        let own = rustix::process::geteuid();
        let allowed = rustix::net::sockopt::socket_peercred(&client)
            .is_ok_and(|peer| peer.uid == own || peer.uid.is_root());
        if allowed && self.clients.len() < CLIENTS_MAX {
            self.clients.push(client);
        } else {
            // It finds its connection closed, or this short word before.
            let reason: &[u8] =
                if allowed { b"\x01too many clients" } else { b"\x01only the daemon's user and root may" };
            let _ = send_packet(client.as_fd(), reason, None);
        }
    }

    fn serve(&mut self, at: usize) -> Next {
        let packet = match receive_packet(self.clients[at].as_fd()) {
            Ok(Some(packet)) => packet,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Next::Keep,
            Ok(None) | Err(_) => return Next::Close,
        };
        let stop = packet.bytes.first() == Some(&STOP);
        let mut answer = Vec::with_capacity(64);
        let descriptor = answer_to(&mut self.held, packet, &mut answer);
        let sent = send_packet(self.clients[at].as_fd(), &answer, descriptor);
        match sent {
            _ if stop => Next::Stop,
            Ok(()) => Next::Keep,
            Err(_) => Next::Close,
        }
    }
}

/// What to answer, and what goes beside it.
fn answer_to<'a>(
    held: &'a mut BTreeMap<String, OwnedFd>,
    packet: Packet,
    answer: &mut Vec<u8>,
) -> Option<BorrowedFd<'a>> {
    let (&verb, name) = packet.bytes.split_first()?;
    let name = match std::str::from_utf8(name) {
        Ok(name) if name.len() <= NAME_MAX_BYTES && !name.contains('\n') => name,
        Ok(_) | Err(_) => return refuse(answer, "a name is text of at most 255 bytes in one line"),
    };
    match verb {
        PUT => {
            let Some(descriptor) = packet.descriptor else { return refuse(answer, "no descriptor came") };
            forget_dead(held);
            if held.len() >= VOLUMES_MAX && !held.contains_key(name) {
                return refuse(answer, "as many descriptors are held as there may be volumes");
            }
            held.insert(name.to_owned(), descriptor);
            answer.push(DONE);
        }
        GET => {
            forget_dead(held);
            let Some(descriptor) = held.get(name) else {
                answer.push(NOT_THERE);
                return None;
            };
            answer.push(DONE);
            return Some(descriptor.as_fd());
        }
        LIST => {
            forget_dead(held);
            answer.push(DONE);
            for volume in held.keys().filter(|volume| volume.as_str() > name) {
                if answer.len() + volume.len() + 1 > PACKET_MAX_BYTES {
                    break;
                }
                answer.extend_from_slice(volume.as_bytes());
                answer.push(b'\n');
            }
        }
        DROP => {
            let was_there = held.remove(name).is_some();
            answer.push(if was_there { DONE } else { NOT_THERE });
        }
        STOP => answer.push(DONE),
        _ => return refuse(answer, "unknown request; daemon and holder are of different versions"),
    }
    None
}

/// A connection whose file system is gone is of no use to anybody.
fn forget_dead(held: &mut BTreeMap<String, OwnedFd>) {
    held.retain(|_, descriptor| connection_is_alive(descriptor.as_fd()));
}

fn refuse<'a>(answer: &mut Vec<u8>, reason: &str) -> Option<BorrowedFd<'a>> {
    answer.push(REFUSED);
    answer.extend_from_slice(reason.as_bytes());
    None
}
