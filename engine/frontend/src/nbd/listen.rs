//! Listening sockets.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{Mode, fchmod};
use socket2::{Domain, SockAddr, SockRef, Socket, TcpKeepalive, Type};

use super::config::{ListenAddress, NbdError};

const BACKLOG: i32 = 128;
const UNIX_MODE: u32 = 0o660;
/// A TCP client that is silent this long is asked whether it is still there.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(60);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_RETRIES: u32 = 6;
/// A TCP client whose machine acknowledges nothing of a reply this long is gone.
const USER_TIMEOUT: Duration = Duration::from_secs(120);

/// A socket file of ours, removed when dropped unless somebody replaced it.
struct SocketFile {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let ours = fs::symlink_metadata(&self.path)
            .is_ok_and(|meta| meta.dev() == self.device && meta.ino() == self.inode);
        if ours {
            // Gone already is as good.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// A listening socket.
pub(super) struct OpenListener {
    socket: OwnedFd,
    local: Option<SocketAddr>,
    _file: Option<SocketFile>,
}

impl OpenListener {
    pub(super) fn open(address: &ListenAddress) -> Result<Self, NbdError> {
        match address {
            ListenAddress::Unix { path, group } => open_unix(address, path, *group),
            ListenAddress::Tcp(tcp) => open_tcp(address, *tcp),
        }
    }

    pub(super) fn as_raw_fd(&self) -> i32 {
        self.socket.as_raw_fd()
    }

    /// The address it is bound to: the port chosen by the kernel where the configured one is 0.
    pub(super) const fn local(&self) -> Option<SocketAddr> {
        self.local
    }
}

fn failed(address: &ListenAddress, step: &'static str) -> impl FnOnce(io::Error) -> NbdError {
    let address = address.clone();
    move |error| NbdError::Listen { address, step, error }
}

fn open_unix(address: &ListenAddress, path: &Path, group: Option<u32>) -> Result<OpenListener, NbdError> {
    remove_stale(address, path)?;
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None).map_err(failed(address, "socket"))?;
    // The file is made with the socket's mode: nobody else can connect before its group is set.
    fchmod(&socket, Mode::RUSR | Mode::WUSR).map_err(|errno| failed(address, "fchmod")(errno.into()))?;
    let name = SockAddr::unix(path).map_err(failed(address, "the socket path"))?;
    socket.bind(&name).map_err(failed(address, "bind"))?;
    let meta = fs::symlink_metadata(path).map_err(failed(address, "stat of the socket file"))?;
    let file = SocketFile { path: path.to_owned(), device: meta.dev(), inode: meta.ino() };
    if let Some(group) = group {
        std::os::unix::fs::chown(path, None, Some(group))
            .map_err(failed(address, "chown of the socket file"))?;
    }
    fs::set_permissions(path, fs::Permissions::from_mode(UNIX_MODE))
        .map_err(failed(address, "chmod of the socket file"))?;
    socket.listen(BACKLOG).map_err(failed(address, "listen"))?;
    Ok(OpenListener { socket: socket.into(), local: None, _file: Some(file) })
}

/// Removes the socket file of a dead process. A file on which somebody answers is left alone.
fn remove_stale(address: &ListenAddress, path: &Path) -> Result<(), NbdError> {
    let meta = match fs::symlink_metadata(path) {
        Ok(meta) => meta,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(address, "stat of the socket path")(error)),
    };
    if !meta.file_type().is_socket() {
        return Err(NbdError::NotASocket { path: path.to_owned() });
    }
    let probe = Socket::new(Domain::UNIX, Type::STREAM, None).map_err(failed(address, "socket"))?;
    probe.set_nonblocking(true).map_err(failed(address, "socket"))?;
    let name = SockAddr::unix(path).map_err(failed(address, "the socket path"))?;
    match probe.connect(&name) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(failed(address, "removing the stale socket file"))
        }
        // Answered, or its queue is full, or we may not ask: somebody is there.
        Ok(()) | Err(_) => Err(NbdError::SocketInUse { path: path.to_owned() }),
    }
}

fn open_tcp(address: &ListenAddress, tcp: SocketAddr) -> Result<OpenListener, NbdError> {
    let socket =
        Socket::new(Domain::for_address(tcp), Type::STREAM, None).map_err(failed(address, "socket"))?;
    socket.set_reuse_address(true).map_err(failed(address, "SO_REUSEADDR"))?;
    socket.bind(&tcp.into()).map_err(failed(address, "bind"))?;
    socket.listen(BACKLOG).map_err(failed(address, "listen"))?;
    let local = socket.local_addr().ok().and_then(|name| name.as_socket());
    Ok(OpenListener { socket: socket.into(), local, _file: None })
}

/// Sets up an accepted TCP socket and returns who is there.
pub(super) fn set_up_tcp(socket: &OwnedFd) -> io::Result<SocketAddr> {
    let socket = SockRef::from(socket);
    socket.set_tcp_nodelay(true)?;
    let keepalive = TcpKeepalive::new()
        .with_time(KEEPALIVE_IDLE)
        .with_interval(KEEPALIVE_INTERVAL)
        .with_retries(KEEPALIVE_RETRIES);
    socket.set_tcp_keepalive(&keepalive)?;
    socket.set_tcp_user_timeout(Some(USER_TIMEOUT))?;
    socket.peer_addr()?.as_socket().ok_or_else(|| io::Error::other("the peer has no address"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    fn unix(path: &Path) -> ListenAddress {
        ListenAddress::Unix { path: path.to_owned(), group: None }
    }

    #[test]
    fn a_dead_socket_file_is_replaced_and_removed_at_the_end() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("nbd.sock");
        drop(UnixListener::bind(&path).expect("bound"));
        assert!(path.exists());
        let listener = OpenListener::open(&unix(&path)).expect("opened");
        assert_eq!(fs::metadata(&path).expect("it is there").permissions().mode() & 0o777, UNIX_MODE);
        std::os::unix::net::UnixStream::connect(&path).expect("it listens");
        drop(listener);
        assert!(!path.exists());
    }

    #[test]
    fn the_group_gets_the_socket_file() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("nbd.sock");
        let group = rustix::process::getegid().as_raw();
        let address = ListenAddress::Unix { path: path.clone(), group: Some(group) };
        let _listener = OpenListener::open(&address).expect("opened");
        assert_eq!(fs::metadata(&path).expect("it is there").gid(), group);
    }

    #[test]
    fn a_live_socket_and_another_file_are_left_alone() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("nbd.sock");
        let live = UnixListener::bind(&path).expect("bound");
        assert!(matches!(OpenListener::open(&unix(&path)), Err(NbdError::SocketInUse { .. })));
        std::os::unix::net::UnixStream::connect(&path).expect("it listens");
        drop(live);
        let file = dir.path().join("file");
        fs::write(&file, "mine").expect("written");
        assert!(matches!(OpenListener::open(&unix(&file)), Err(NbdError::NotASocket { .. })));
        assert_eq!(fs::read_to_string(&file).expect("read"), "mine");
    }

    #[test]
    fn a_file_that_replaced_ours_stays() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("nbd.sock");
        let listener = OpenListener::open(&unix(&path)).expect("opened");
        fs::remove_file(&path).expect("removed");
        let _other = UnixListener::bind(&path).expect("bound");
        drop(listener);
        assert!(path.exists());
    }

    #[test]
    fn a_directory_that_is_not_there_is_named() {
        let path = Path::new("/nonexistent/dir/nbd.sock");
        let error = OpenListener::open(&unix(path)).err().expect("refused").to_string();
        assert!(error.contains("unix:/nonexistent/dir/nbd.sock"), "{error}");
    }
}
