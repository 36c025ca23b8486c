//! Signals while the daemon waits for the holder's answer: it goes on waiting. The kernel interrupts a thread by
//! itself, too, some time after a ring that the thread made was closed.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc;
use std::thread::JoinHandle;

use duplex_frontend::holder::HolderClient;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, accept, bind, listen, recv,
    send, socket_with,
};

/// Interruptions before each answer.
const SIGNALS: u32 = 50;

static SEEN: AtomicU32 = AtomicU32::new(0);

extern "C" fn count(_: libc::c_int) {
    SEEN.fetch_add(1, Ordering::SeqCst);
}

/// A handler for SIGUSR1; a system call that waits is not restarted after it.
fn catch_signals() {
    // SAFETY: an all-zero sigaction is a valid one: no flags, an empty mask.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = count as *const () as libc::sighandler_t;
    // SAFETY: the handler adds to an atomic number and does nothing else.
    let set = unsafe { libc::sigaction(libc::SIGUSR1, &raw const action, std::ptr::null_mut()) };
    assert_eq!(set, 0);
}

/// Interrupts a thread that waits, again and again, until it ends.
fn interrupt<T>(thread: libc::pid_t, client: &JoinHandle<T>) {
    for _ in 0..SIGNALS {
        let before = SEEN.load(Ordering::SeqCst);
        // SAFETY: tgkill takes three numbers; for a thread that ended it is an error and does nothing.
        unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, libc::SIGUSR1) };
        while SEEN.load(Ordering::SeqCst) == before && !client.is_finished() {
            std::thread::yield_now();
        }
    }
}

fn listener(path: &std::path::Path) -> OwnedFd {
    let flags = SocketFlags::CLOEXEC;
    let listener = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).expect("a socket");
    bind(&listener, &SocketAddrUnix::new(path).expect("a name")).expect("bound");
    listen(&listener, 1).expect("listens");
    listener
}

#[test]
fn an_interrupted_wait_for_the_holder_goes_on() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("holder");
    let listener = listener(&path);
    catch_signals();
    let (tell, told) = mpsc::channel();
    let client = std::thread::spawn(move || {
        // SAFETY: gettid takes nothing and cannot fail.
        tell.send(unsafe { libc::gettid() }).expect("the test listens");
        let holder = HolderClient::connect(&path).expect("reached").expect("somebody listens");
        (holder.get("a").map(|held| held.is_some()), holder.forget("b"))
    });
    let thread = told.recv().expect("its number");
    let served = accept(&listener).expect("a client");
    let mut request = [0; 64];
    for answer in [2, 0] {
        // A client that gave up is seen by what it says, below.
        let _ = recv(served.as_fd(), &mut request[..], RecvFlags::empty());
        interrupt(thread, &client);
        let _ = send(&served, &[answer], SendFlags::NOSIGNAL);
    }
    let (held, forgotten) = client.join().expect("the client ended");
    assert!(!held.expect("an answer"), "the answer was: there is none");
    assert!(forgotten.expect("an answer"), "the answer was: forgotten");
}
