//! The channel against a peer that speaks raw bytes, and the parser against any division of them.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use duplex_core::ids::{ByteRange, Sequence};
use duplex_core::message::RemoteOutcome;
use proptest::prelude::*;

use super::*;
use crate::codec::{decode_volume_frame, encode_volume_frame};
use crate::control::encode_control;
use crate::frame::{Channel, Header, Routing};

const SESSION: SessionId = SessionId(42);
const VOLUME: VolumeIndex = VolumeIndex(1);
const CHANNEL: Channel = Channel::Volume(VOLUME);
const ARENA_BYTES: usize = 16 << 20;

fn sockets() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let far = listener.accept().unwrap().0;
    near.set_nodelay(true).unwrap();
    far.set_nodelay(true).unwrap();
    (near, far)
}

fn data(socket: TcpStream, attempt: u64) -> DataConnection {
    DataConnection {
        session: SESSION,
        volume: VOLUME,
        attempt,
        path: 0,
        socket,
        tls: None,
        early: Vec::new(),
        counters: Arc::default(),
    }
}

/// A channel on its ring, and a raw peer.
struct Rig {
    ring: Ring,
    arena: Arena,
    channel: DataChannel,
    far: TcpStream,
    events: Vec<ChannelEvent>,
}

impl Rig {
    fn new(limits: ChannelLimits) -> Self {
        let (near, far) = sockets();
        let mut rig = Self {
            ring: Ring::new(64).unwrap(),
            arena: Arena::new(ARENA_BYTES).unwrap(),
            channel: DataChannel::new(Owner(1), SESSION, VOLUME, limits),
            far,
            events: Vec::new(),
        };
        assert!(rig.channel.attach(data(near, 1), &mut rig.arena, &mut rig.events));
        rig
    }

    fn turn(&mut self, wait: Option<Duration>) {
        self.channel.flush(&mut self.ring, &mut self.arena, &mut self.events);
        let mut completions = Vec::new();
        self.ring.turn(wait, &mut completions).unwrap();
        for completion in completions {
            self.channel.on_completion(completion, &mut self.ring, &mut self.arena, &mut self.events);
        }
    }

    fn until(&mut self, mut done: impl FnMut(&ChannelEvent) -> bool) -> ChannelEvent {
        loop {
            if let Some(at) = self.events.iter().position(&mut done) {
                return self.events.swap_remove(at);
            }
            let broken = self.events.iter().find(|event| matches!(event, ChannelEvent::Broken { .. }));
            assert_eq!(broken, None, "the connection broke instead");
            self.turn(None);
        }
    }

    fn broken(&mut self) -> BreakReason {
        match self.until(|event| matches!(event, ChannelEvent::Broken { .. })) {
            ChannelEvent::Broken { reason, .. } => reason,
            ChannelEvent::Message(..) | ChannelEvent::Corrupt { .. } => unreachable!(),
        }
    }

    fn close(mut self) {
        self.channel.close(&mut self.arena);
        while !self.channel.is_idle() {
            self.turn(None);
        }
        for event in self.events.drain(..) {
            if let ChannelEvent::Message(_, Some(buffer)) = event {
                self.arena.release(buffer);
            }
        }
        assert_eq!(self.arena.in_use_bytes(), 0);
    }
}

fn resume(session: SessionId, received: u64) -> Vec<u8> {
    let word = LinkWord::Resume { session, received, window_bytes: 1 << 20, window_frames: 100 };
    encode_link(&word, CHANNEL, received).unwrap()
}

fn routing(sequence: u64) -> Routing {
    Routing { channel: CHANNEL, sequence, ack: 0 }
}

fn write(seq: u64, payload: &[u8]) -> VolumeMessage {
    let range = ByteRange::new(0, payload.len() as u64);
    VolumeMessage::Write { seq: Sequence(seq), range, fua: false }
}

fn write_frame(sequence: u64, payload: &[u8]) -> Vec<u8> {
    encode_volume_frame(&write(sequence, payload), payload, routing(sequence)).unwrap()
}

fn read_frame(socket: &mut TcpStream) -> Vec<u8> {
    let mut frame = vec![0; HEAD_BYTES];
    socket.read_exact(&mut frame).unwrap();
    let header = Header::decode(frame.first_chunk().unwrap()).unwrap();
    frame.resize(HEAD_BYTES + header.body_bytes as usize, 0);
    socket.read_exact(&mut frame[HEAD_BYTES..]).unwrap();
    frame
}

#[test]
fn a_peer_that_breaks_the_rules_is_found_out() {
    let flush =
        |sequence| encode_volume_frame(&VolumeMessage::Flush { id: 1 }, &[], routing(sequence)).unwrap();
    let mut other_volume = routing(1);
    other_volume.channel = Channel::Volume(VolumeIndex(2));
    let other_volume = encode_volume_frame(&VolumeMessage::Flush { id: 1 }, &[], other_volume).unwrap();
    let false_ack = encode_link(&LinkWord::Ack, CHANNEL, 1).unwrap();
    let control = encode_control(&duplex_core::message::ControlMessage::HandOverAsk, 1, 0).unwrap();
    let greet = || resume(SESSION, 0);
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("must be a resume", flush(1)),
        ("must be a resume", [greet(), greet()].concat()),
        ("another session", resume(SessionId(43), 0)),
        ("another session", resume(SESSION, 1)),
        ("missing", [greet(), flush(2)].concat()),
        ("missing", [greet(), flush(0)].concat()),
        ("missing", [greet(), flush(1), write_frame(3, &[1; 512])].concat()),
        ("never sent", [greet(), false_ack].concat()),
        ("another channel's", [greet(), other_volume].concat()),
        ("another channel's", [greet(), control].concat()),
        (
            "does not begin",
            [greet(), b"GET / HTTP/1.1 and so on, for the length of one header and more....".to_vec()]
                .concat(),
        ),
    ];
    for (expected, bytes) in cases {
        let mut rig = Rig::new(ChannelLimits::default());
        rig.far.write_all(&bytes).unwrap();
        let reason = rig.broken().to_string();
        assert!(reason.contains(expected), "wanted {expected:?}, got {reason:?}");
        rig.close();
    }
}

#[test]
fn a_seen_frame_is_not_delivered_again() {
    let mut rig = Rig::new(ChannelLimits::default());
    let payload = vec![5; 300_000];
    rig.far.write_all(&resume(SESSION, 0)).unwrap();
    for sequence in [1, 1, 2, 1, 2, 3] {
        rig.far.write_all(&write_frame(sequence, &payload)).unwrap();
    }
    let mut delivered = Vec::new();
    while delivered.len() < 3 {
        if let ChannelEvent::Message(message, Some(buffer)) =
            rig.until(|event| matches!(event, ChannelEvent::Message(..)))
        {
            rig.arena.release(buffer);
            delivered.push(message);
        }
    }
    assert_eq!(delivered, [1, 2, 3].map(|seq| write(seq, &payload)));
    rig.close();
}

#[test]
fn a_new_connection_carries_on_and_an_old_one_is_not_taken() {
    let mut rig = Rig::new(ChannelLimits::default());
    let buffer = rig.arena.alloc(4096).unwrap();
    rig.arena.bytes_mut(buffer).fill(9);
    for seq in 1..=3 {
        rig.channel.send(&write(seq, &[9; 4096]), Some(buffer), &mut rig.arena).unwrap();
    }
    rig.arena.release(buffer);
    rig.far.write_all(&resume(SESSION, 0)).unwrap();
    // All three go out; the peer receives the first two and says so only on the next connection.
    let mut first = rig.far.try_clone().unwrap();
    let reader = std::thread::spawn(move || (0..4).map(|_| read_frame(&mut first)).count());
    while !reader.is_finished() {
        rig.turn(Some(Duration::from_millis(1)));
    }
    assert_eq!(reader.join().unwrap(), 4);
    let (near, mut far) = sockets();
    assert!(rig.channel.attach(data(near, 3), &mut rig.arena, &mut rig.events));
    let (stale, _) = sockets();
    assert!(
        !rig.channel.attach(data(stale, 2), &mut rig.arena, &mut rig.events),
        "older than the present one"
    );
    assert_eq!(rig.channel.attempt(), Some(3));
    far.write_all(&resume(SESSION, 2)).unwrap();
    let reader = std::thread::spawn(move || {
        let resume = read_frame(&mut far);
        assert_eq!(Header::decode(resume.first_chunk().unwrap()).unwrap().routing.sequence, 0);
        let again = read_frame(&mut far);
        let (header, message, payload) = decode_volume_frame(&again).unwrap();
        (header.routing.sequence, message, payload.to_vec())
    });
    while !reader.is_finished() {
        rig.turn(Some(Duration::from_millis(1)));
    }
    assert_eq!(reader.join().unwrap(), (3, write(3, &[9; 4096]), vec![9; 4096]));
    assert_eq!(rig.channel.unacknowledged().0, 1);
    rig.close();
}

#[test]
fn closing_with_everything_in_flight_gives_every_buffer_back() {
    let mut rig = Rig::new(ChannelLimits::default());
    rig.far.write_all(&resume(SESSION, 0)).unwrap();
    // Half a payload: the receive in flight points into its buffer.
    let frame = write_frame(1, &[3; 1 << 20]);
    rig.far.write_all(&frame[..frame.len() / 2]).unwrap();
    while rig.arena.in_use_bytes() == 0 {
        rig.turn(None);
    }
    // The peer reads nothing: the send in flight stays there.
    let buffer = rig.arena.alloc(1 << 20).unwrap();
    for seq in 1..=16 {
        let message = write(seq, &[0; 1 << 20]);
        rig.channel.send(&message, Some(buffer), &mut rig.arena).unwrap();
    }
    rig.arena.release(buffer);
    rig.turn(Some(Duration::from_millis(1)));
    rig.turn(Some(Duration::from_millis(1)));
    assert!(!rig.channel.is_idle());
    rig.close();
}

#[test]
fn a_channel_that_is_not_emptied_says_so() {
    let limits = ChannelLimits { window_frames: 8, ..ChannelLimits::default() };
    let mut rig = Rig::new(limits);
    let message = VolumeMessage::Ack { seq: Sequence(1), outcome: RemoteOutcome::Done };
    let mut taken = 0;
    while rig.channel.send(&message, None, &mut rig.arena).is_ok() {
        taken += 1;
        assert_eq!(rig.channel.has_room(), taken < 8);
    }
    assert_eq!(taken, 16);
    assert!(matches!(
        rig.channel.send(&write(1, &[0; 512]), None, &mut rig.arena),
        Err(ChannelError::Full { frames: 16, .. })
    ));
    rig.close();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    /// However the stream is divided, the same comes out; an altered byte never yields another message.
    #[test]
    fn any_division_of_the_stream_gives_the_same(
        lengths in proptest::collection::vec(0_usize..9000, 1..6),
        cuts in proptest::collection::vec(1_usize..5000, 1..8),
        flip in proptest::option::of(any::<prop::sample::Index>()),
    ) {
        let mut arena = Arena::new(4 << 20).unwrap();
        let frames: Vec<_> = (1..).zip(&lengths).map(|(sequence, length)| match length {
            0 => (VolumeMessage::MarksPage { index: sequence, bits: vec![7; 4096] }, Vec::new(), sequence),
            length => (write(sequence, &vec![sequence as u8; *length]), vec![sequence as u8; *length], sequence),
        }).collect();
        let mut stream: Vec<u8> = frames.iter()
            .flat_map(|(message, payload, sequence)| encode_volume_frame(message, payload, routing(*sequence)).unwrap())
            .collect();
        if let Some(flip) = flip {
            let at = flip.index(stream.len());
            stream[at] ^= 0x40;
        }
        let mut parser = Parser::new(CHANNEL);
        let (mut at, mut got, mut failed) = (0, 0, false);
        'stream: for cut in cuts.iter().cycle() {
            if at == stream.len() {
                break;
            }
            let end = (at + cut).min(stream.len());
            let mut input = &stream[at..end];
            at = end;
            loop {
                match parser.next(&mut input, &mut arena, got as u64) {
                    Ok(None) => break,
                    Ok(Some(Item::Message(header, message, buffer))) => {
                        let (expected, payload, sequence) = &frames[got];
                        prop_assert_eq!((&message, header.routing.sequence), (expected, *sequence));
                        if let Some(buffer) = buffer {
                            prop_assert_eq!(&arena.bytes(buffer)[..payload.len()], &payload[..]);
                            arena.release(buffer);
                        }
                        got += 1;
                    }
                    Ok(Some(other)) => prop_assert!(false, "{:?}", other),
                    Err(_) => {
                        failed = true;
                        break 'stream;
                    }
                }
            }
        }
        if let Some(buffer) = parser.abandon() {
            arena.release(buffer);
        }
        prop_assert_eq!(arena.in_use_bytes(), 0);
        prop_assert_eq!(failed, flip.is_some());
        prop_assert!(failed || got == frames.len());
    }
}
