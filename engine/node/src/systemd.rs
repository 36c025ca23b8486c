//! What the daemon says to systemd and gets from it: readiness, watchdog, the descriptor store.
//!
//! Everything here does nothing where systemd did not start the process.

use std::ffi::OsStr;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::time::Duration;

use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags,
    SocketType,
};

/// First descriptor that systemd passes.
const FIRST_FD: RawFd = 3;
/// More descriptors than this are a mistake of whoever set the environment.
const FDS_MAX: RawFd = 4096;

/// The service manager's end, if there is one.
#[derive(Debug)]
pub struct Manager {
    socket: Option<(OwnedFd, SocketAddrUnix)>,
    watchdog: Option<Duration>,
}

/// A descriptor that came back from the store, with the name it was given.
#[derive(Debug)]
pub struct Stored {
    /// Its name.
    pub name: String,
    /// The descriptor, close-on-exec.
    pub fd: OwnedFd,
}

impl Manager {
    /// As the environment says: `NOTIFY_SOCKET`, `WATCHDOG_USEC`, `WATCHDOG_PID`.
    ///
    /// # Errors
    /// `NOTIFY_SOCKET` is no socket's name, or no socket can be had.
    pub fn from_environment() -> io::Result<Self> {
        Self::from_variables(|name| std::env::var_os(name))
    }

    /// As [`Manager::from_environment`], from elsewhere.
    ///
    /// # Errors
    /// As there.
    pub fn from_variables(get: impl Fn(&str) -> Option<std::ffi::OsString>) -> io::Result<Self> {
        let socket = match get("NOTIFY_SOCKET") {
            Some(name) if !name.is_empty() => Some((socket()?, address(&name)?)),
            Some(_) | None => None,
        };
        let number =
            |name| get(name).and_then(|text| text.to_str().and_then(|text| text.parse::<u64>().ok()));
        let for_me = number("WATCHDOG_PID").is_none_or(|pid| pid == u64::from(std::process::id()));
        let watchdog = number("WATCHDOG_USEC").filter(|usec| for_me && *usec > 0).map(Duration::from_micros);
        Ok(Self { socket, watchdog })
    }

    /// True when somebody listens.
    pub const fn is_there(&self) -> bool {
        self.socket.is_some()
    }

    /// How often [`Manager::alive`] is expected at least. Say it at half this time.
    pub const fn watchdog(&self) -> Option<Duration> {
        self.watchdog
    }

    /// Start-up is done.
    ///
    /// # Errors
    /// The manager cannot be told.
    pub fn ready(&self, status: &str) -> io::Result<()> {
        self.send(&format!("READY=1\nSTATUS={}", one_line(status)), &[])
    }

    /// A line for `systemctl status`.
    ///
    /// # Errors
    /// The manager cannot be told.
    pub fn status(&self, status: &str) -> io::Result<()> {
        self.send(&format!("STATUS={}", one_line(status)), &[])
    }

    /// Every volume thread turned its loop.
    ///
    /// # Errors
    /// The manager cannot be told.
    pub fn alive(&self) -> io::Result<()> {
        self.send("WATCHDOG=1", &[])
    }

    /// The orderly end has begun.
    ///
    /// # Errors
    /// The manager cannot be told.
    pub fn stopping(&self) -> io::Result<()> {
        self.send("STOPPING=1", &[])
    }

    /// Puts a descriptor into the store; it comes back by [`stored`] after a restart. The name has at most 255
    /// characters and no colon.
    ///
    /// # Errors
    /// The name is not possible, or the manager cannot be told.
    pub fn store(&self, name: &str, fd: BorrowedFd<'_>) -> io::Result<()> {
        // Not polled: `/dev/fuse` reports an error when the mount is gone, and must stay until it is taken out.
        self.send(&format!("FDSTORE=1\nFDPOLL=0\nFDNAME={}", fd_name(name)?), &[fd])
    }

    /// Takes a descriptor out of the store.
    ///
    /// # Errors
    /// The name is not possible, or the manager cannot be told.
    pub fn forget(&self, name: &str) -> io::Result<()> {
        self.send(&format!("FDSTOREREMOVE=1\nFDNAME={}", fd_name(name)?), &[])
    }

    fn send(&self, message: &str, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let Some((socket, address)) = &self.socket else { return Ok(()) };
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(io::Error::other("too many descriptors in one message"));
        }
        let text = [IoSlice::new(message.as_bytes())];
        rustix::net::sendmsg_addr(socket, address, &text, &mut control, SendFlags::NOSIGNAL)?;
        Ok(())
    }
}

/// What systemd passed: `LISTEN_PID`, `LISTEN_FDS`, `LISTEN_FDNAMES`. Only the first call gives anything.
///
/// # Safety
/// Must be called before anything else in the process has opened or taken over descriptors from 3 on.
pub unsafe fn stored() -> Vec<Stored> {
    static TAKEN: std::sync::atomic::AtomicBool = std::sync::atomic::AtomicBool::new(false);
    if TAKEN.swap(true, std::sync::atomic::Ordering::SeqCst) {
        return Vec::new();
    }
    let names = passed(|name| std::env::var(name).ok());
    let mut all = Vec::new();
    for (fd, name) in (FIRST_FD..).zip(names) {
        // SAFETY: fcntl takes numbers; a descriptor that is not open answers an error.
        if unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
            continue;
        }
        // SAFETY: it is open, systemd passed it to this process, and the caller says that nobody else owns it.
        all.push(Stored { name, fd: unsafe { OwnedFd::from_raw_fd(fd) } });
    }
    all
}

/// Names of what was passed to this process, in order; unnamed ones are `unknown`.
fn passed(get: impl Fn(&str) -> Option<String>) -> Vec<String> {
    let mine = get("LISTEN_PID").is_some_and(|pid| pid == std::process::id().to_string());
    let count = get("LISTEN_FDS").and_then(|text| text.parse::<RawFd>().ok()).unwrap_or(0);
    if !mine || !(1..=FDS_MAX).contains(&count) {
        return Vec::new();
    }
    let names = get("LISTEN_FDNAMES").unwrap_or_default();
    let mut names = names.split(':').map(|name| if name.is_empty() { "unknown" } else { name });
    (0..count).map(|_| names.next().unwrap_or("unknown").to_owned()).collect()
}

fn socket() -> io::Result<OwnedFd> {
    Ok(rustix::net::socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?)
}

fn address(name: &OsStr) -> io::Result<SocketAddrUnix> {
    match name.as_bytes().split_first() {
        Some((b'@', rest)) => Ok(SocketAddrUnix::new_abstract_name(rest)?),
        Some((b'/', _)) => Ok(SocketAddrUnix::new(name)?),
        Some(_) | None => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("NOTIFY_SOCKET={} is neither a path nor an abstract name", name.display()),
        )),
    }
}

fn one_line(text: &str) -> String {
    text.replace('\n', " ")
}

fn fd_name(name: &str) -> io::Result<&str> {
    let good = |c: char| c.is_ascii_graphic() && c != ':';
    if name.is_empty() || name.len() > 255 || !name.chars().all(good) {
        let text = format!("\"{name}\" is not a descriptor's name");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    Ok(name)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::ffi::OsString;
    use std::io::{Read, Write};
    use std::os::fd::AsFd;
    use std::os::unix::net::{UnixDatagram, UnixStream};

    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};

    use super::*;

    fn manager(pairs: &[(&str, OsString)]) -> io::Result<Manager> {
        let all: HashMap<&str, OsString> = pairs.iter().cloned().collect();
        Manager::from_variables(|name| all.get(name).cloned())
    }

    fn receive(socket: &UnixDatagram) -> (String, Vec<OwnedFd>) {
        let mut bytes = [0; 512];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [io::IoSliceMut::new(&mut bytes)];
        let got =
            rustix::net::recvmsg(socket, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC).expect("message");
        let mut fds = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(passed) = message {
                fds.extend(passed);
            }
        }
        (String::from_utf8_lossy(&bytes[..got.bytes]).into_owned(), fds)
    }

    #[test]
    fn a_manager_hears_everything_and_gets_the_descriptor() {
        let dir = tempfile::tempdir().expect("directory");
        let path = dir.path().join("notify");
        let systemd = UnixDatagram::bind(&path).expect("bound");
        let manager = manager(&[
            ("NOTIFY_SOCKET", path.into_os_string()),
            ("WATCHDOG_USEC", "30000000".into()),
            ("WATCHDOG_PID", std::process::id().to_string().into()),
        ])
        .expect("manager");
        assert!(manager.is_there());
        assert_eq!(manager.watchdog(), Some(Duration::from_secs(30)));
        manager.ready("mirrored,\nprimary").expect("sent");
        assert_eq!(receive(&systemd).0, "READY=1\nSTATUS=mirrored, primary");
        manager.alive().expect("sent");
        assert_eq!(receive(&systemd).0, "WATCHDOG=1");
        manager.stopping().expect("sent");
        assert_eq!(receive(&systemd).0, "STOPPING=1");
        let (mut mine, theirs) = UnixStream::pair().expect("pair");
        manager.store("fuse-data", theirs.as_fd()).expect("sent");
        drop(theirs);
        let (text, mut fds) = receive(&systemd);
        assert_eq!(text, "FDSTORE=1\nFDPOLL=0\nFDNAME=fuse-data");
        let mut kept = UnixStream::from(fds.pop().expect("the descriptor"));
        kept.write_all(b"kept").expect("written");
        drop(kept);
        let mut read = String::new();
        mine.read_to_string(&mut read).expect("read");
        assert_eq!(read, "kept");
        manager.forget("fuse-data").expect("sent");
        assert_eq!(receive(&systemd).0, "FDSTOREREMOVE=1\nFDNAME=fuse-data");
        assert!(manager.store("a:b", mine.as_fd()).is_err() && manager.forget("").is_err());
    }

    #[test]
    fn without_a_manager_nothing_happens_and_bad_names_are_errors() {
        let none = manager(&[]).expect("nobody");
        assert!(!none.is_there() && none.watchdog().is_none());
        none.ready("x").expect("nothing to do");
        assert!(manager(&[("NOTIFY_SOCKET", "relative".into())]).is_err());
        let other =
            manager(&[("WATCHDOG_USEC", "1000".into()), ("WATCHDOG_PID", "1".into())]).expect("nobody");
        assert_eq!(other.watchdog(), None, "meant for another process");
    }

    #[test]
    fn an_abstract_name_is_reached() {
        use std::os::linux::net::SocketAddrExt;
        let name = format!("duplex-notify-{}", std::process::id());
        let address = std::os::unix::net::SocketAddr::from_abstract_name(&name).expect("name");
        let systemd = UnixDatagram::bind_addr(&address).expect("bound");
        let manager = manager(&[("NOTIFY_SOCKET", format!("@{name}").into())]).expect("manager");
        manager.status("alone").expect("sent");
        assert_eq!(receive(&systemd).0, "STATUS=alone");
    }

    #[test]
    fn passed_names() {
        let me = std::process::id().to_string();
        let with = |pid: &str, count: &str, names: &str| {
            let (pid, count, names) = (pid.to_owned(), count.to_owned(), names.to_owned());
            passed(move |name| match name {
                "LISTEN_PID" => Some(pid.clone()),
                "LISTEN_FDS" => Some(count.clone()),
                _ => Some(names.clone()),
            })
        };
        assert_eq!(with(&me, "3", "fuse-a:fuse-b"), ["fuse-a", "fuse-b", "unknown"]);
        assert!(with("1", "2", "a:b").is_empty());
        assert!(
            with(&me, "-1", "").is_empty()
                && with(&me, "999999", "").is_empty()
                && with(&me, "x", "").is_empty()
        );
        assert!(passed(|_| None).is_empty());
    }
}
