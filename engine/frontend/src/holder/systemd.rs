//! systemd's descriptor store: what the holder is where there is no systemd.
//!
//! The unit needs `FileDescriptorStoreMax=`. systemd hands the descriptors to the next start of the service.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use super::send_packet;

/// First descriptor systemd passes.
const LISTEN_FIRST: i32 = 3;
/// Before the volume's name in the store, so that it is told from sockets of socket activation.
const PREFIX: &str = "fuse-";

/// Stores a volume's `/dev/fuse` descriptor under its name. `notify_socket` is `$NOTIFY_SOCKET`.
///
/// # Errors
/// The socket cannot be reached.
pub fn store(notify_socket: &OsStr, volume: &str, descriptor: BorrowedFd<'_>) -> io::Result<()> {
    // FDPOLL=0: systemd would otherwise wake up for every request of the device, and drop it on an error it sees.
    let message = format!("FDSTORE=1\nFDNAME={}\nFDPOLL=0", stored_name(volume));
    notify(notify_socket, &message, Some(descriptor))
}

/// Makes systemd forget a volume's descriptor.
///
/// # Errors
/// The socket cannot be reached.
pub fn forget(notify_socket: &OsStr, volume: &str) -> io::Result<()> {
    notify(notify_socket, &format!("FDSTOREREMOVE=1\nFDNAME={}", stored_name(volume)), None)
}

/// The name in the store: systemd takes 255 printable ASCII characters without a colon, so every other byte is
/// written as `%XX`.
fn stored_name(volume: &str) -> String {
    let mut name = PREFIX.to_owned();
    for byte in volume.bytes() {
        if byte.is_ascii_alphanumeric() || b"-_.".contains(&byte) {
            name.push(char::from(byte));
        } else {
            name.push_str(&format!("%{byte:02X}"));
        }
    }
    name
}

fn volume_of(stored: &str) -> Option<String> {
    let text = stored.strip_prefix(PREFIX)?.as_bytes();
    let mut plain = Vec::with_capacity(text.len());
    let mut at = 0;
    while at < text.len() {
        if text[at] == b'%' {
            let digits = std::str::from_utf8(text.get(at + 1..at + 3)?).ok()?;
            plain.push(u8::from_str_radix(digits, 16).ok()?);
            at += 3;
        } else {
            plain.push(text[at]);
            at += 1;
        }
    }
    String::from_utf8(plain).ok()
}

fn notify(notify_socket: &OsStr, message: &str, descriptor: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let socket = socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    let address = match notify_socket.as_bytes() {
        [b'@', name @ ..] => SocketAddrUnix::new_abstract_name(name)?,
        path => SocketAddrUnix::new(path)?,
    };
    connect(&socket, &address)?;
    send_packet(socket.as_fd(), message.as_bytes(), descriptor)
}

/// Which descriptors systemd passed: number and volume, by the values of `LISTEN_PID`, `LISTEN_FDS` and
/// `LISTEN_FDNAMES`. Those of other kinds are left out.
pub fn passed_volumes(
    own_pid: u32,
    listen_pid: Option<&str>,
    listen_fds: Option<&str>,
    names: Option<&str>,
) -> Vec<(i32, String)> {
    let meant = listen_pid.and_then(|pid| pid.parse().ok()) == Some(own_pid);
    let count = listen_fds.and_then(|count| count.parse::<usize>().ok()).unwrap_or(0);
    if !meant {
        return Vec::new();
    }
    let names = names.unwrap_or_default().split(':').take(count).enumerate();
    names.filter_map(|(at, name)| Some((LISTEN_FIRST + i32::try_from(at).ok()?, volume_of(name)?))).collect()
}

/// Takes the `/dev/fuse` descriptors that systemd kept, with their volumes. Call it once, before threads are started
/// and before any other descriptor is opened or taken.
///
/// # Safety
/// Nobody else owns the descriptors that `LISTEN_FDS` names, and this was not called before.
pub unsafe fn take_stored() -> Vec<(String, OwnedFd)> {
    let value = |name: &str| std::env::var(name).ok();
    let (pid, count, names) = (value("LISTEN_PID"), value("LISTEN_FDS"), value("LISTEN_FDNAMES"));
    let passed = passed_volumes(std::process::id(), pid.as_deref(), count.as_deref(), names.as_deref());
    let mut taken = Vec::with_capacity(passed.len());
    for (number, volume) in passed {
        // SAFETY: the caller's promise: the descriptor is open and nobody else's.
        let descriptor = unsafe { OwnedFd::from_raw_fd(number) };
        if let Err(error) = rustix::io::fcntl_setfd(&descriptor, rustix::io::FdFlags::CLOEXEC) {
            tracing::warn!(volume, %error, "systemd named a descriptor that is not open");
            // Not ours to close, and nothing is there.
            std::mem::forget(descriptor);
            continue;
        }
        taken.push((volume, descriptor));
    }
    taken
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_survive_the_store() {
        for volume in ["v", "my volume:1", "größe", "a%b", "data-1_x.y"] {
            let stored = stored_name(volume);
            assert!(stored.is_ascii() && !stored.contains(':') && !stored.contains(' '), "{stored}");
            assert_eq!(volume_of(&stored).as_deref(), Some(volume));
        }
        assert_eq!(volume_of("control.socket"), None);
        assert_eq!(volume_of("fuse-%4"), None);
    }

    #[test]
    fn only_our_descriptors_of_our_process_are_taken() {
        let names = Some("control:fuse-a:fuse-b%20c");
        assert_eq!(
            passed_volumes(7, Some("7"), Some("3"), names),
            [(4, "a".to_owned()), (5, "b c".to_owned())]
        );
        assert!(passed_volumes(7, Some("8"), Some("3"), names).is_empty());
        assert!(passed_volumes(7, None, Some("3"), names).is_empty());
        assert_eq!(passed_volumes(7, Some("7"), Some("2"), names), [(4, "a".to_owned())]);
        assert!(passed_volumes(7, Some("7"), Some("x"), names).is_empty());
    }
}
