//! Many clients that do anything and break off anywhere: nothing may be lost, stuck or mixed up.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use duplex_frontend::nbd::ServerState;
use duplex_frontend::nbd::wire::command;

use super::client::{Client, go_data, request};
use super::volume::{Engine, Volume};

const SIZE: u64 = 4 << 20;

/// A small generator: the same run for the same seed.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % below
    }
}

/// Requests, most of them good, some refused, at times garbage at the end; cut off anywhere.
fn stream(dice: &mut Dice) -> Vec<u8> {
    let mut bytes = Vec::new();
    for cookie in 0..dice.roll(24) {
        let kind = [command::READ, command::WRITE, command::WRITE, command::FLUSH, command::TRIM, 77];
        let kind = kind[dice.roll(kind.len() as u64) as usize];
        let offset = dice.roll(SIZE / 512) * 512;
        let length = [512, 4096, 65536, 300 * 512, 1 << 20, 3 << 20][dice.roll(6) as usize];
        let length = if dice.roll(20) == 0 { length + 1 } else { length };
        bytes.extend_from_slice(&request(kind, 0, cookie, offset, length));
        if kind == command::WRITE {
            bytes.resize(bytes.len() + length as usize, cookie as u8);
        }
    }
    if dice.roll(4) == 0 {
        bytes.extend_from_slice(&[0x5a; 40]);
    }
    if dice.roll(2) == 0 {
        bytes.truncate(dice.roll(bytes.len() as u64 + 1) as usize);
    }
    bytes
}

fn one_client(volume: &Volume, dice: &mut Dice) -> Option<UnixStream> {
    let stream_bytes = stream(dice);
    let socket = volume.connect();
    let mut client = Client::greet(socket);
    if dice.roll(10) == 0 {
        return Some(client.stream);
    }
    client.option(duplex_frontend::nbd::wire::option::GO, &go_data());
    if dice.roll(10) != 0 {
        // The whole answer to GO, whatever it is.
        let mut some = [0; 64];
        let _ = client.stream.read(&mut some);
    }
    client.stream.set_nonblocking(true).expect("nonblocking");
    let mut rest = &stream_bytes[..];
    let mut patience = 50;
    let mut sink = vec![0; 1 << 20];
    while !rest.is_empty() && patience > 0 {
        let piece = rest.len().min(1 + dice.roll(200_000) as usize);
        match (&client.stream).write(&rest[..piece]) {
            Ok(count) => rest = &rest[count..],
            Err(_full_or_closed) => patience -= 1,
        }
        if dice.roll(3) == 0 {
            let _ = (&client.stream).read(&mut sink);
        }
        if dice.roll(8) == 0 {
            volume.on(Engine::let_go);
        }
    }
    match dice.roll(4) {
        0 => Some(client.stream),
        1 => {
            let _ = client.stream.shutdown(Shutdown::Write);
            Some(client.stream)
        }
        _ => None,
    }
}

fn run(seed: u64, arena_bytes: usize, direct_send: bool) {
    let volume = Volume::with(SIZE, arena_bytes, |config| {
        config.connections_max = 8;
        config.requests_max = 24;
        config.connection_requests_max = 6;
        config.zero_max_bytes = 100_000;
        config.direct_send = direct_send;
    });
    let mut dice = Dice(seed);
    let mut kept = Vec::new();
    for _ in 0..150 {
        // Clients that are gone keep their places while their requests are held: room for the next one is made.
        volume.on(|engine| {
            if engine.server.connections() > 6 {
                engine.let_go();
            }
        });
        kept.extend(one_client(&volume, &mut dice));
        if kept.len() > 3 {
            kept.clear();
        }
        match dice.roll(12) {
            0 => volume.on(|engine| engine.holding = true),
            1 => volume.on(|engine| {
                engine.let_go();
                engine.set_state(ServerState::Refusing { text: "secondary".to_owned() });
            }),
            2 => volume.on(|engine| engine.advance(Duration::from_secs(40))),
            _ => volume.on(|engine| engine.set_state(ServerState::Serving)),
        }
    }
    kept.clear();
    volume.on(|engine| {
        engine.let_go();
        engine.set_state(ServerState::Serving);
    });
    volume.wait_until("every client to be gone", |engine| {
        let server = &engine.server;
        (server.connections(), server.requests_in_flight(), engine.arena.in_use_bytes()) == (0, 0, 0)
    });
    assert_eq!(volume.on(|engine| engine.opened - engine.closed), 0);
    let mut client = Client::go(volume.connect());
    client.request(command::FLUSH, 0, 1, 0, 0);
    assert_eq!(client.simple(), (1, 0));
}

#[test]
fn anything_goes_with_room() {
    run(0x1234_5678_9abc_def1, 64 << 20, true);
}

#[test]
fn anything_goes_without_room() {
    run(0x0fed_cba9_8765_4321, 2 << 20, true);
}

#[test]
fn anything_goes_by_the_ring() {
    run(0x5555_aaaa_1234_4321, 2 << 20, false);
}
