//! Clients that break the rules or break off.

use std::io::Write;
use std::net::{Shutdown, TcpStream};
use std::time::Duration;

use duplex_core::ids::ByteRange;
use duplex_core::request::{RequestError, RequestOp};
use duplex_frontend::nbd::wire::{chunk, command, flag, option, reply};
use duplex_frontend::nbd::{Allocation, AllocationExtent, AllocationSource, ListenAddress, ServerState};

use super::client::{Chunk, Client, go_data, request};
use super::volume::Volume;

const SIZE: u64 = 8 << 20;
const EPERM: u32 = 1;
const EIO: u32 = 5;
const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;
const ENOTSUP: u32 = 95;
const ESHUTDOWN: u32 = 108;

#[test]
fn refused_requests_leave_the_connection_in_step() {
    let volume = Volume::start(SIZE);
    let mut client = Client::go(volume.connect());
    let over = (1 << 20) + 512;
    let cases = [
        (command::WRITE, 0, 0, over, EINVAL),
        (command::WRITE, 0, SIZE - 512, 4096, ENOSPC),
        (command::WRITE, 0, 100, 512, EINVAL),
        (command::WRITE, 0, 512, 100, EINVAL),
        (command::WRITE, 0, 0, 5 << 20, EINVAL),
        (command::WRITE, 1 << 9, 0, 512, EINVAL),
        (command::READ, 0, 0, over, EINVAL),
        (command::READ, 0, SIZE, 512, EINVAL),
        (command::READ, flag::DF, 0, 512, EINVAL),
        (command::TRIM, 0, SIZE, 512, EINVAL),
        (command::WRITE_ZEROES, 0, SIZE, 512, ENOSPC),
        (command::WRITE_ZEROES, flag::FAST_ZERO, 0, 512, ENOTSUP),
        (command::BLOCK_STATUS, 0, 0, 512, EINVAL),
        (77, 0, 0, 0, EINVAL),
    ];
    for (cookie, (command, flags, offset, length, error)) in cases.into_iter().enumerate() {
        let cookie = cookie as u64;
        client.request(command, flags, cookie, offset, length);
        if command == command::WRITE {
            client.send(&vec![0xee; length as usize]);
        }
        assert_eq!(client.simple(), (cookie, error), "command {command}, flags {flags}, {offset}+{length}");
    }
    client.request(command::WRITE, 0, 99, 0, 1 << 20);
    client.send(&vec![7; 1 << 20]);
    assert_eq!(client.simple(), (99, 0));
    assert!(volume.on(|engine| engine.memory[..1 << 20].iter().all(|byte| *byte == 7)));
    assert!(volume.on(|engine| engine.memory[1 << 20..].iter().all(|byte| *byte == 0)));
}

#[test]
fn a_payload_in_many_pieces_arrives_whole() {
    let volume = Volume::start(SIZE);
    let mut client = Client::go(volume.connect());
    let payload: Vec<u8> = (0..600_000u32).map(|at| (at % 251) as u8).collect();
    let payload = &payload[..512 * 1000];
    let mut bytes = request(command::WRITE, 0, 1, 4096, payload.len() as u32);
    bytes.extend_from_slice(payload);
    bytes.extend_from_slice(&request(command::WRITE, flag::FUA, 2, 0, 512));
    bytes.extend_from_slice(&[9; 512]);
    for piece in bytes.chunks(7919) {
        client.send(piece);
    }
    assert_eq!([client.simple(), client.simple()], [(1, 0), (2, 0)]);
    client.request(command::READ, 0, 3, 4096, payload.len() as u32);
    assert_eq!(client.simple(), (3, 0));
    assert!(client.take(payload.len()) == payload);
}

#[test]
fn garbage_ends_the_connection_and_only_that() {
    let volume = Volume::start(SIZE);
    let mut good = Client::go(volume.connect());
    let mut bad = Client::go(volume.connect());
    bad.send(&[0x5a; 64]);
    bad.expect_end();
    let mut early = volume.connect();
    early.write_all(b"GET / HTTP/1.1\r\n\r\n").expect("send");
    let mut early = Client { stream: early };
    early.take(18);
    early.expect_end();
    good.request(command::FLUSH, 0, 5, 0, 0);
    assert_eq!(good.simple(), (5, 0));
}

#[test]
fn a_client_that_breaks_off_leaves_nothing_behind() {
    let volume = Volume::start(SIZE);
    volume.on(|engine| engine.holding = true);
    let mut client = Client::go(volume.connect());
    client.request(command::READ, 0, 1, 0, 65536);
    client.request(command::WRITE, 0, 2, 0, 4096);
    client.send(&[1; 4096]);
    // A third one stops in its payload.
    client.request(command::WRITE, 0, 3, 0, 1 << 20);
    client.send(&[1; 300_000]);
    volume.wait_until("three requests", |engine| engine.server.requests_in_flight() == 3);
    drop(client);
    volume.wait_until("the payload to be given up", |engine| engine.held.len() == 2);
    // The completions come when nobody is there.
    volume.on(super::volume::Engine::let_go);
    volume.wait_until("the end", |engine| {
        let server = &engine.server;
        (server.connections(), server.requests_in_flight(), engine.arena.in_use_bytes()) == (0, 0, 0)
    });
    assert_eq!(volume.on(|engine| (engine.opened, engine.closed)), (1, 1));
}

#[test]
fn a_client_that_only_stopped_sending_gets_its_replies() {
    let volume = Volume::start(SIZE);
    volume.on(|engine| engine.holding = true);
    let mut client = Client::go(volume.connect());
    client.request(command::READ, 0, 1, 0, 4096);
    volume.wait_until("the request", |engine| engine.held.len() == 1);
    client.stream.shutdown(Shutdown::Write).expect("shutdown");
    volume.on(super::volume::Engine::let_go);
    assert_eq!(client.simple(), (1, 0));
    client.take(4096);
    client.expect_end();
}

#[test]
fn disconnect_waits_for_what_is_in_flight() {
    let volume = Volume::start(SIZE);
    volume.on(|engine| engine.holding = true);
    let mut client = Client::go(volume.connect());
    client.request(command::WRITE, 0, 1, 0, 512);
    client.send(&[3; 512]);
    client.request(command::DISC, 0, 2, 0, 0);
    volume.wait_until("the request", |engine| engine.held.len() == 1);
    volume.on(super::volume::Engine::let_go);
    assert_eq!(client.simple(), (1, 0));
    client.expect_end();
    drop(client);
    volume.wait_until("the end", |engine| engine.server.connections() == 0);
}

#[test]
fn a_client_that_takes_no_replies_holds_no_more_than_its_share() {
    let volume = Volume::with(SIZE, 16 << 20, |config| config.connection_bytes_max = 4 << 20);
    let mut greedy = Client::go(volume.connect());
    for cookie in 0..64 {
        greedy.request(command::READ, 0, cookie, 0, 1 << 20);
    }
    volume.wait_until("its share", |engine| engine.server.requests_in_flight() == 4);
    let mut other = Client::go(volume.connect());
    other.request(command::READ, 0, 1, 0, 1 << 20);
    assert_eq!(other.simple(), (1, 0));
    other.take(1 << 20);
    // It is served to the end when it takes them.
    let mut cookies = Vec::new();
    for _ in 0..64 {
        cookies.push(greedy.simple());
        greedy.take(1 << 20);
    }
    assert_eq!(cookies, (0..64).map(|cookie| (cookie, 0)).collect::<Vec<_>>());
}

#[test]
fn buffers_that_others_held_are_used_when_they_come_back() {
    let volume = Volume::with(SIZE, 1 << 20, |_| {});
    let mut client = Client::go(volume.connect());
    let taken = volume.on(|engine| engine.arena.alloc(1 << 20).expect("all of it"));
    // In one piece: when the first is answered, the second has been looked at.
    let mut bytes = request(77, 0, 0, 0, 0);
    bytes.extend_from_slice(&request(command::READ, 0, 1, 0, 4096));
    bytes.extend_from_slice(&request(command::FLUSH, 0, 2, 0, 0));
    client.send(&bytes);
    assert_eq!(client.simple(), (0, EINVAL));
    assert_eq!(volume.on(|engine| engine.server.requests_in_flight()), 0);
    volume.on(move |engine| engine.arena.release(taken));
    assert_eq!(client.simple(), (1, 0));
    client.take(4096);
    assert_eq!(client.simple(), (2, 0));
}

#[test]
fn endless_refused_requests_do_not_pile_up_replies() {
    let volume = Volume::start(SIZE);
    let client = Client::go(volume.connect());
    let one = request(77, 0, 1, 0, 0);
    client.stream.set_nonblocking(true).expect("nonblocking");
    let bytes: Vec<u8> = one.iter().copied().cycle().take(one.len() * 1000).collect();
    let mut sent = 0;
    let mut stalled = 0;
    // Replies are 16 of 28 bytes: unless the server stops, this never ends.
    while stalled < 1000 {
        match (&client.stream).write(&bytes[sent % one.len()..]) {
            Ok(count) => {
                sent += count;
                stalled = 0;
            }
            Err(_full) => {
                stalled += 1;
                volume.on(|_| ());
            }
        }
        assert!(sent < 64 << 20, "the server takes requests without end");
    }
}

#[test]
fn a_negotiation_without_end_is_ended() {
    let volume = Volume::with(SIZE, 4 << 20, |config| config.connections_max = 2);
    let mut slow = Client::greet(volume.connect());
    let mut slower = Client { stream: volume.connect() };
    slower.take(18);
    volume.wait_until("both", |engine| engine.server.connections() == 2);
    // The third waits for a place.
    let waiting = volume.connect();
    volume.on(|engine| engine.advance(Duration::from_secs(29)));
    slow.option(option::LIST, &[]);
    assert_eq!(slow.option_reply().1, reply::SERVER);
    volume.on(|engine| engine.advance(Duration::from_secs(2)));
    slower.expect_end();
    let mut third = Client::go(waiting);
    third.request(command::FLUSH, 0, 1, 0, 0);
    assert_eq!(third.simple(), (1, 0));
    // One that is through stays, however long it is silent.
    volume.on(|engine| engine.advance(Duration::from_secs(3600)));
    third.request(command::FLUSH, 0, 2, 0, 0);
    assert_eq!(third.simple(), (2, 0));
}

fn refusing() -> ServerState {
    ServerState::Refusing { text: "secondary; primary is alpha".to_owned() }
}

#[test]
fn a_secondary_answers_what_is_in_flight_then_closes_and_says_why() {
    let volume = Volume::start(SIZE);
    volume.on(|engine| engine.holding = true);
    let mut busy = Client::go(volume.connect());
    let mut idle = Client::go(volume.connect());
    busy.request(command::WRITE, 0, 1, 0, 512);
    busy.send(&[3; 512]);
    volume.wait_until("the request", |engine| engine.held.len() == 1);
    volume.on(|engine| engine.set_state(refusing()));
    idle.expect_end();
    busy.request(command::READ, 0, 2, 0, 512);
    busy.request(command::WRITE, 0, 3, 0, 512);
    busy.send(&[4; 512]);
    assert_eq!([busy.simple(), busy.simple()], [(2, ESHUTDOWN), (3, ESHUTDOWN)]);
    volume.on(super::volume::Engine::let_go);
    assert_eq!(busy.simple(), (1, 0));
    busy.expect_end();
    assert_eq!(volume.on(|engine| (engine.memory[0], engine.memory[511])), (3, 3));
    let mut asking = Client::greet(volume.connect());
    asking.option(option::GO, &go_data());
    assert_eq!(
        asking.option_reply(),
        (option::GO, reply::ERR_SHUTDOWN, b"secondary; primary is alpha".to_vec())
    );
    // The same client gets in when the server is promoted.
    volume.on(|engine| engine.set_state(ServerState::Serving));
    asking.option(option::GO, &go_data());
    while asking.option_reply().1 != reply::ACK {}
    asking.request(command::FLUSH, 0, 9, 0, 0);
    assert_eq!(asking.simple(), (9, 0));
}

#[test]
fn a_secondary_has_no_tcp_listener_and_strangers_do_not_get_in() {
    let volume = Volume::with(SIZE, 4 << 20, |config| {
        config.listeners.push(ListenAddress::Tcp("127.0.0.1:0".parse().expect("an address")));
    });
    let address = volume.tcp.expect("a TCP listener");
    TcpStream::connect(address).expect("it listens");
    volume.on(|engine| engine.set_state(refusing()));
    volume.wait_until("the listener to close", |engine| engine.server.tcp_addresses().is_empty());
    assert!(TcpStream::connect(address).is_err());
    let strict = Volume::with(SIZE, 4 << 20, |config| {
        config.listeners.push(ListenAddress::Tcp("127.0.0.1:0".parse().expect("an address")));
        config.allowed = vec!["192.0.2.0/24".parse().expect("a network")];
    });
    let mut stranger = TcpStream::connect(strict.tcp.expect("a TCP listener")).expect("connect");
    let mut greeting = Vec::new();
    std::io::Read::read_to_end(&mut stranger, &mut greeting).expect("closed");
    assert!(greeting.is_empty());
}

#[test]
fn errors_of_the_volume_reach_the_client() {
    let volume = Volume::start(SIZE);
    let mut client = Client::go(volume.connect());
    let mut structured = Client::go_structured(volume.connect());
    for (failure, error) in [(RequestError::Io, EIO), (RequestError::NotServing, ESHUTDOWN)] {
        volume.on(move |engine| engine.failure = Some(failure));
        client.request(command::READ, 0, 1, 0, 512);
        assert_eq!(client.simple(), (1, error));
        client.request(command::FLUSH, 0, 2, 0, 0);
        assert_eq!(client.simple(), (2, error));
        structured.request(command::READ, 0, 3, 0, 512);
        let mut data = error.to_be_bytes().to_vec();
        data.extend_from_slice(&[0, 0]);
        let wanted = Chunk { flags: chunk::DONE, kind: chunk::ERROR, cookie: 3, data };
        assert_eq!(structured.chunk(), wanted);
    }
    let read_only = Volume::with(SIZE, 4 << 20, |config| config.geometry.read_only = true);
    let mut client = Client::go(read_only.connect());
    client.request(command::WRITE_ZEROES, 0, 1, 0, 512);
    assert_eq!(client.simple(), (1, EPERM));
}

#[test]
fn structured_reads_are_one_chunk() {
    let volume = Volume::start(SIZE);
    volume.on(|engine| engine.memory[4096..8192].fill(0x5a));
    let mut client = Client::go_structured(volume.connect());
    client.request(command::READ, flag::DF, 1, 4096, 4096);
    let mut data = 4096u64.to_be_bytes().to_vec();
    data.extend_from_slice(&[0x5a; 4096]);
    assert_eq!(client.chunk(), Chunk { flags: chunk::DONE, kind: chunk::OFFSET_DATA, cookie: 1, data });
}

struct Halves;

impl AllocationSource for Halves {
    fn extents(&mut self, range: ByteRange, out: &mut Vec<AllocationExtent>) {
        let half = range.length_bytes / 2;
        out.push(AllocationExtent { length_bytes: half, allocation: Allocation::Hole });
        out.push(AllocationExtent { length_bytes: half + 4096, allocation: Allocation::Zero });
    }
}

#[test]
fn block_status_is_data_or_what_the_source_says() {
    let volume = Volume::start(SIZE);
    let mut client = Client::go_structured(volume.connect());
    let status = |extents: &[(u32, u32)]| {
        let mut data = 1u32.to_be_bytes().to_vec();
        for (length, state) in extents {
            data.extend_from_slice(&length.to_be_bytes());
            data.extend_from_slice(&state.to_be_bytes());
        }
        Chunk { flags: chunk::DONE, kind: chunk::BLOCK_STATUS, cookie: 1, data }
    };
    client.request(command::BLOCK_STATUS, 0, 1, 0, SIZE as u32);
    assert_eq!(client.chunk(), status(&[(SIZE as u32, 0)]));
    volume.on(|engine| engine.server.set_allocation_source(Box::new(Halves)));
    client.request(command::BLOCK_STATUS, 0, 1, 0, 16384);
    assert_eq!(client.chunk(), status(&[(8192, 3), (8192, 2)]));
    client.request(command::BLOCK_STATUS, flag::REQ_ONE, 1, 0, 16384);
    assert_eq!(client.chunk(), status(&[(8192, 3)]));
}

#[test]
fn a_long_zeroing_goes_in_pieces_and_is_answered_once() {
    let volume = Volume::with(SIZE, 4 << 20, |config| config.zero_max_bytes = 3 << 20);
    volume.on(|engine| {
        engine.memory.fill(0xff);
        engine.noting = true;
    });
    let mut client = Client::go(volume.connect());
    client.request(command::TRIM, flag::FUA, 1, 512, (7 << 20) + 512);
    client.request(command::FLUSH, 0, 2, 0, 0);
    let mut answers = [client.simple(), client.simple()];
    answers.sort_unstable();
    assert_eq!(answers, [(1, 0), (2, 0)]);
    let seen = volume.on(|engine| std::mem::take(&mut engine.requests));
    let piece = |offset, length| RequestOp::Zero {
        range: ByteRange::new(offset, length),
        may_unmap: true,
        fua: true,
    };
    let zeroes: Vec<_> = seen.into_iter().filter(|op| *op != RequestOp::Flush).collect();
    let most = 3 << 20;
    assert_eq!(zeroes, [piece(512, most), piece(512 + most, most), piece(512 + 2 * most, (1 << 20) + 512)]);
    let edges = volume.on(|engine| {
        let end = (7 << 20) + 1024;
        [engine.memory[511], engine.memory[512], engine.memory[end - 1], engine.memory[end]]
    });
    assert_eq!(edges, [0xff, 0, 0, 0xff]);
}
