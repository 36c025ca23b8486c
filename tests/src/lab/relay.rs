//! A man in the middle of a TCP connection: passes bytes on, records them, and flips a bit when told.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::Result;

use super::NetNs;

/// What a relay shares with its threads.
#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    /// Position inside the next large enough piece whose bit is flipped; `u64::MAX`: none.
    flip: AtomicU64,
    flipped: AtomicU64,
    connections: AtomicU64,
    recorded: Mutex<Vec<u8>>,
}

/// A running relay; dropping it closes every connection through it.
#[derive(Debug)]
pub struct Relay {
    shared: Arc<Shared>,
}

const NO_FLIP: u64 = u64::MAX;
/// Pieces shorter than this pass unharmed: a flip is meant for frames that carry data.
const FLIP_BYTES_MIN: usize = 2048;

impl Relay {
    /// Listens at `listen` and passes on to `target`, both inside this namespace.
    pub fn start(network: &NetNs, listen: SocketAddr, target: SocketAddr) -> Result<Relay> {
        let listener = network.enter(|| Ok(TcpListener::bind(listen)?))?;
        listener.set_nonblocking(true)?;
        let shared = Arc::new(Shared { flip: AtomicU64::new(NO_FLIP), ..Shared::default() });
        let (inside, for_thread) = (network.handle()?, Arc::clone(&shared));
        std::thread::Builder::new().name("relay".to_owned()).spawn(move || {
            if inside.move_this_thread().is_ok() {
                accept(&listener, target, &for_thread);
            }
        })?;
        Ok(Relay { shared })
    }

    /// Flips one bit, so far into the next piece with data that passes from client to server or back.
    pub fn flip_next(&self, position: u64) {
        self.shared.flip.store(position, Ordering::SeqCst);
    }

    /// How many bits it has flipped.
    pub fn flipped(&self) -> u64 {
        self.shared.flipped.load(Ordering::SeqCst)
    }

    /// How many connections it has passed on.
    pub fn connections(&self) -> u64 {
        self.shared.connections.load(Ordering::SeqCst)
    }

    /// What the first client sent so far (at most 64 KiB).
    pub fn recorded(&self) -> Vec<u8> {
        self.shared.recorded.lock().map(|bytes| bytes.clone()).unwrap_or_default()
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
    }
}

fn accept(listener: &TcpListener, target: SocketAddr, shared: &Arc<Shared>) {
    while !shared.stop.load(Ordering::SeqCst) {
        match listener.accept() {
            Ok((client, _)) => {
                let _ = pass_on(client, target, shared);
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                std::thread::sleep(Duration::from_millis(5))
            }
            Err(_) => return,
        }
    }
}

fn pass_on(client: TcpStream, target: SocketAddr, shared: &Arc<Shared>) -> Result<()> {
    let server = TcpStream::connect_timeout(&target, Duration::from_secs(5))?;
    let first = shared.connections.fetch_add(1, Ordering::SeqCst) == 0;
    for stream in [&client, &server] {
        stream.set_nonblocking(false)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(Duration::from_millis(100)))?;
    }
    let ways = [(client.try_clone()?, server.try_clone()?, first), (server, client, false)];
    for (from, to, record) in ways {
        let shared = Arc::clone(shared);
        std::thread::Builder::new()
            .name("relay".to_owned())
            .spawn(move || carry(from, to, record, &shared))?;
    }
    Ok(())
}

fn carry(mut from: TcpStream, mut to: TcpStream, record: bool, shared: &Shared) {
    let mut buffer = vec![0; 256 << 10];
    while !shared.stop.load(Ordering::SeqCst) {
        let length = match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(length) => length,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => continue,
            Err(_) => break,
        };
        let piece = &mut buffer[..length];
        if record && let Ok(mut recorded) = shared.recorded.lock() {
            let room = (64 << 10) - recorded.len().min(64 << 10);
            recorded.extend_from_slice(&piece[..room.min(piece.len())]);
        }
        if piece.len() >= FLIP_BYTES_MIN {
            let position = shared.flip.swap(NO_FLIP, Ordering::SeqCst);
            if position != NO_FLIP {
                piece[position as usize % length] ^= 0x10;
                shared.flipped.fetch_add(1, Ordering::SeqCst);
            }
        }
        if to.write_all(piece).is_err() {
            break;
        }
    }
    for stream in [from, to] {
        let _ = stream.shutdown(std::net::Shutdown::Both);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab;

    #[test]
    fn it_stands_in_the_wire_records_and_flips_once() {
        if let Some(why) = lab::unavailable() {
            println!("SKIPPED: {why}");
            return;
        }
        let (a, b) = (NetNs::new().expect("a"), NetNs::new().expect("b"));
        a.cable("mir", "10.9.0.1/24", &b, "mir", "10.9.0.2/24").expect("a cable");
        let server = b.enter(|| Ok(TcpListener::bind("10.9.0.2:7700")?)).expect("bound");
        let wire = "10.9.0.2:7799".parse().expect("an address");
        let target = "10.9.0.2:7700".parse().expect("an address");
        let relay = Relay::start(&b, wire, target).expect("started");
        b.redirect("mir", 7700, 7799).expect("redirected");
        let mut client = a.enter(|| Ok(TcpStream::connect(target)?)).expect("connected");
        let (mut served, _) = server.accept().expect("through the relay");
        let mut pass = |bytes: &[u8]| {
            client.write_all(bytes).expect("sent");
            let mut got = vec![0; bytes.len()];
            served.read_exact(&mut got).expect("passed on");
            got
        };
        assert_eq!(pass(b"hello"), b"hello");
        relay.flip_next(9);
        assert_eq!(pass(b"short pieces pass"), b"short pieces pass");
        let data = [7; FLIP_BYTES_MIN];
        assert_eq!(pass(&data).iter().filter(|byte| **byte != 7).count(), 1);
        assert_eq!(pass(&data), data);
        assert_eq!((relay.flipped(), relay.connections()), (1, 1));
        assert!(relay.recorded().starts_with(b"helloshort"));
    }
}
