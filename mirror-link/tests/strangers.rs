//! Those who are not the peer: refused by name, bounded, and without harm to the pair.
#![allow(clippy::unwrap_used, reason = "tests and their helpers: a panic with its place is the report")]
#![allow(clippy::wildcard_enum_match_arm, reason = "a test waits for one event among all there are")]

mod common;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use common::{PATIENCE, Server, pair, secrets};
use duplex_core::message::ControlMessage;
use duplex_link::frame::{Channel, Fields, HEAD_BYTES, Header, Kind, Routing, crc};
use duplex_link::{Encryption, LinkConfig, LinkEvent, Secrets};

fn stranger(server: &Server) -> (SocketAddr, String) {
    server.expect("a stranger's report", |event| match event {
        LinkEvent::Stranger { address, why } => Some((address, why)),
        LinkEvent::SessionDown { end, .. } => panic!("the pair was disturbed: {end:?}"),
        LinkEvent::Refused(refusal) => panic!("taken for the peer: {refusal:?}"),
        _ => None,
    })
}

/// The server closes the connection; what it said before.
fn read_to_the_end(mut socket: TcpStream) -> Vec<u8> {
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut said = Vec::new();
    match socket.read_to_end(&mut said) {
        Ok(_) => said,
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => said,
        Err(error) => panic!("the connection was not closed: {error}"),
    }
}

fn frame(kind: Kind, flags: u8, body: &[u8]) -> Vec<u8> {
    let header = Header {
        routing: Routing { channel: Channel::Control, sequence: 0, ack: 0 },
        fields: Fields { flags, ..Fields::of(kind) },
        body_bytes: body.len() as u32,
        body_crc: crc(body),
    };
    [&header.encode()[..], body].concat()
}

#[test]
fn a_wrong_secret_is_refused_on_both_sides() {
    for encryption in [Encryption::Tls, Encryption::Off] {
        let pair = pair(1, encryption);
        let beta = Server::start(pair.beta.clone(), None);
        let alpha = Server::start(LinkConfig { secrets: secrets(2), ..pair.alpha.clone() }, None);
        let (address, why) = stranger(&beta);
        assert_eq!(address.ip(), pair.proxies[0].target.ip());
        assert!(why.contains("secret"), "{why}");
        let code = alpha.expect("a refusal", |event| match event {
            LinkEvent::Refused(refusal) => Some(refusal.code),
            LinkEvent::SessionUp { .. } => panic!("a session with the wrong secret"),
            _ => None,
        });
        assert_eq!(code, "secret");
        // The right one is learnt while running: both go on.
        alpha.handle.set_secrets(Secrets { current: secrets(2).current, other: Some(secrets(1).current) });
        let session = alpha.session();
        assert_eq!(beta.session(), session);
    }
}

#[test]
fn a_recorded_handshake_opens_nothing() {
    for encryption in [Encryption::Tls, Encryption::Off] {
        let pair = pair(1, encryption);
        pair.proxies[0].record();
        let beta = Server::start(pair.beta.clone(), None);
        let alpha = Server::start(pair.alpha.clone(), None);
        let session = alpha.session();
        assert_eq!(beta.session(), session);
        alpha.handle.send(session, ControlMessage::HandOverAsk).unwrap();
        beta.expect("the message", |event| matches!(event, LinkEvent::Control(..)).then_some(()));
        let recorded = pair.proxies[0].recorded();
        assert!(recorded.len() > 4 * HEAD_BYTES);
        let mut socket = TcpStream::connect(pair.proxies[0].target).unwrap();
        // The server may close before everything is written.
        let _ = socket.write_all(&recorded);
        let (_, why) = stranger(&beta);
        println!("{encryption:?}: {why}");
        read_to_the_end(socket);
        // The pair goes on.
        alpha.handle.send(session, ControlMessage::HandOverAsk).unwrap();
        beta.expect("the message", |event| match event {
            LinkEvent::Control(of, message) => {
                (of == session && message == ControlMessage::HandOverAsk).then_some(())
            }
            LinkEvent::SessionDown { .. } => panic!("the pair was disturbed"),
            _ => None,
        });
    }
}

#[test]
fn nothing_is_looked_at_before_the_proof() {
    let pair = pair(1, Encryption::Off);
    let beta = Server::start(pair.beta.clone(), None);
    let greeting = || frame(Kind::Greeting, 1, &[&[9; 48][..], b"alpha"].concat());
    let attacks: Vec<(&str, Vec<Vec<u8>>)> = vec![
        (
            "does not begin",
            vec![b"GET / HTTP/1.1\r\nHost: duplex.example.com\r\nUser-Agent: somebody/1.0\r\n\r\n".to_vec()],
        ),
        ("checksum", vec![[&frame(Kind::Greeting, 1, b"")[..60], &[0; 4]].concat()]),
        ("not allowed before", vec![frame(Kind::Control, 0, &[b' '; 300])]),
        ("not allowed at this point", vec![frame(Kind::Heartbeat, 0, b"")]),
        ("wrong role", vec![frame(Kind::Greeting, 2, &[9; 53])]),
        ("not a nonce", vec![frame(Kind::Greeting, 1, &[9; 20])]),
        ("not allowed at this point", vec![greeting(), frame(Kind::LinkHello, 0, b"{}")]),
        ("secret", vec![greeting(), frame(Kind::Proof, 1, &[7; 64])]),
        ("secret", vec![greeting(), frame(Kind::Proof, 1, &[])]),
    ];
    for (expected, frames) in attacks {
        let mut socket = TcpStream::connect(pair.proxies[0].target).unwrap();
        for frame in frames {
            // The server may have closed after an earlier one.
            let _ = socket.write_all(&frame);
        }
        let (address, why) = stranger(&beta);
        assert_eq!(address, socket.local_addr().unwrap());
        assert!(why.contains(expected), "wanted {expected:?}, got {why:?}");
        read_to_the_end(socket);
    }
}

#[test]
fn garbage_leaves_the_pair_alone() {
    for encryption in [Encryption::Tls, Encryption::Off] {
        let pair = pair(1, encryption);
        let (beta, alpha) = (Server::start(pair.beta.clone(), None), Server::start(pair.alpha.clone(), None));
        let session = alpha.session();
        assert_eq!(beta.session(), session);
        for seed in 0..60_u8 {
            let mut socket = TcpStream::connect(pair.proxies[0].target).unwrap();
            let mut bytes: Vec<u8> =
                (0..2000_u32).map(|at| (at as u8).wrapping_mul(seed | 1) ^ seed).collect();
            match seed % 3 {
                0 => bytes[..3].copy_from_slice(b"DXL"),
                1 => bytes[..3].copy_from_slice(&[0x16, 3, 1]),
                _ => {}
            }
            let _ = socket.write_all(&bytes);
            let _ = socket.shutdown(std::net::Shutdown::Write);
            read_to_the_end(socket);
        }
        let mut reports = 0;
        let mut limited = false;
        while !limited {
            limited = stranger(&beta).1.contains("must wait");
            reports += 1;
        }
        println!("{reports} reports for 60 attempts");
        assert!(reports < 60, "every attempt was let in");
        beta.handle.send(session, ControlMessage::HandOverAsk).unwrap();
        alpha.expect("the message", |event| matches!(event, LinkEvent::Control(..)).then_some(()));
    }
}

#[test]
fn who_says_nothing_is_shown_the_door() {
    let mut pair = pair(1, Encryption::Tls);
    pair.beta.timers.handshake = Duration::from_millis(300);
    // Those who come from the peer's address have places of their own.
    pair.beta.paths[0].peer = "127.0.0.2:1".parse().unwrap();
    let beta = Server::start(pair.beta.clone(), None);
    let silent = TcpStream::connect(pair.proxies[0].target).unwrap();
    let (address, why) = stranger(&beta);
    assert_eq!(address, silent.local_addr().unwrap());
    assert!(why.contains("300 ms"), "{why}");
    assert!(read_to_the_end(silent).is_empty());
    // Only so many at once: the ninth of one address is closed at once, the others at their deadline.
    let slow: Vec<_> = (0..9).map(|_| TcpStream::connect(pair.proxies[0].target).unwrap()).collect();
    let mut reasons: Vec<_> = (0..9).map(|_| stranger(&beta).1).collect();
    assert!(reasons.remove(0).contains("too many handshakes"), "{reasons:?}");
    assert!(reasons.iter().all(|why| why.contains("300 ms")), "{reasons:?}");
    for socket in slow {
        read_to_the_end(socket);
    }
}

#[test]
fn who_says_too_much_is_cut_off() {
    let pair = pair(1, Encryption::Tls);
    let beta = Server::start(pair.beta.clone(), None);
    let mut socket = TcpStream::connect(pair.proxies[0].target).unwrap();
    // Endless TLS handshake records that announce a huge message.
    let record = [&[0x16, 3, 1, 0x40, 0][..], &[1, 0xff, 0xff, 0xff], &[0; 0x4000 - 4]].concat();
    let mut sent = 0;
    while sent < 16 << 20 && socket.write_all(&record).is_ok() {
        sent += record.len();
    }
    assert!(sent < 16 << 20, "16 MiB were taken from a stranger");
    println!("{}", stranger(&beta).1);
}
