//! A volume's channel over real sockets: every message once, in order, whole, whatever happens on the way.
#![allow(clippy::unwrap_used, reason = "tests and their helpers: a panic with its place is the report")]
#![allow(clippy::wildcard_enum_match_arm, reason = "a test waits for one event among all there are")]

mod common;

use common::{Heard, Order, Pair, Server, Volume, pair};
use duplex_core::ids::{ByteRange, Sequence};
use duplex_core::message::{RemoteOutcome, VolumeMessage};
use duplex_link::{ChannelLimits, Encryption};

const ARENA_BYTES: usize = 64 << 20;

/// Lengths around every border: sectors, the receive buffer, the largest payload.
const LENGTHS: [u64; 8] = [512, 4096, 4097, 65_536, 100_000, 262_144, 1 << 20, 4096];

fn content(seq: u64, length: u64) -> Vec<u8> {
    let mut state = seq.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(length as usize + 8);
    while (bytes.len() as u64) < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length as usize);
    bytes
}

fn write(seq: u64, length: u64) -> VolumeMessage {
    VolumeMessage::Write {
        seq: Sequence(seq),
        range: ByteRange::new(seq << 20, length),
        fua: seq.is_multiple_of(3),
    }
}

struct Rig {
    pair: Pair,
    alpha: Server,
    beta: Server,
    a: Volume,
    b: Volume,
}

fn rig(paths: usize, encryption: Encryption, limits: ChannelLimits, b_arena_bytes: usize) -> Rig {
    let pair = pair(paths, encryption);
    let a = Volume::start(ARENA_BYTES, limits);
    let b = Volume::start(b_arena_bytes, limits);
    let beta = Server::start(pair.beta.clone(), Some(&b));
    let alpha = Server::start(pair.alpha.clone(), Some(&a));
    Rig { pair, alpha, beta, a, b }
}

impl Rig {
    /// Sends writes one way and their acknowledgements the other; `harm` is called after each arrival.
    fn exchange(&self, count: u64, lengths: &[u64], mut harm: impl FnMut(u64)) {
        for seq in 1..=count {
            let length = lengths[seq as usize % lengths.len()];
            self.a.send(write(seq, length), content(seq, length));
        }
        for seq in 1..=count {
            let length = lengths[seq as usize % lengths.len()];
            let (message, payload) = self.b.message();
            assert_eq!(message, write(seq, length));
            assert!(payload == content(seq, length), "payload of {seq} differs");
            self.b.send(VolumeMessage::Ack { seq: Sequence(seq), outcome: RemoteOutcome::Done }, Vec::new());
            harm(seq);
        }
        for seq in 1..=count {
            let ack = VolumeMessage::Ack { seq: Sequence(seq), outcome: RemoteOutcome::Done };
            assert_eq!(self.a.message().0, ack);
        }
    }

    /// Everything is given back at the end.
    fn finish(self) -> (usize, u64) {
        let Self { a, b, alpha, beta, .. } = self;
        let (frames, bytes, arena_bytes) = a.stop();
        assert_eq!(arena_bytes, 0, "alpha's volume kept buffers");
        assert_eq!(b.stop().2, 0, "beta's volume kept buffers");
        drop((alpha, beta));
        (frames, bytes)
    }
}

#[test]
fn messages_come_in_order_and_whole() {
    for encryption in [Encryption::Off, Encryption::Tls] {
        let rig = rig(1, encryption, ChannelLimits::default(), ARENA_BYTES);
        rig.exchange(200, &LENGTHS, |_| {});
        rig.exchange(2000, &[4096], |_| {});
        rig.finish();
    }
}

#[test]
fn reads_marks_and_generations_travel_too() {
    let rig = rig(1, Encryption::Off, ChannelLimits::default(), ARENA_BYTES);
    let range = ByteRange::new(4096, 8192);
    let marks = VolumeMessage::MarksPage { index: 7, bits: content(7, 4096) };
    let failed = VolumeMessage::ReadReply { id: 2, range, outcome: RemoteOutcome::Failed { errno: 5 } };
    let done = VolumeMessage::ReadReply { id: 1, range, outcome: RemoteOutcome::Done };
    rig.a.send(VolumeMessage::Read { id: 1, range }, Vec::new());
    rig.a.send(marks.clone(), Vec::new());
    assert_eq!(rig.b.message().0, VolumeMessage::Read { id: 1, range });
    assert_eq!(rig.b.message().0, marks);
    rig.b.send(failed.clone(), Vec::new());
    rig.b.send(done.clone(), content(1, 8192));
    assert_eq!(rig.a.message(), (failed, Vec::new()));
    assert_eq!(rig.a.message(), (done, content(1, 8192)));
    rig.finish();
}

#[test]
fn connections_that_are_cut_lose_and_double_nothing() {
    for encryption in [Encryption::Off, Encryption::Tls] {
        let rig = rig(2, encryption, ChannelLimits::default(), ARENA_BYTES);
        rig.exchange(400, &LENGTHS, |seq| {
            if seq % 40 == 0 {
                rig.pair.proxies[0].cut();
                rig.pair.proxies[1].cut();
            }
        });
        rig.finish();
    }
}

#[test]
fn a_dead_path_moves_everything_to_the_other_and_back() {
    let rig = rig(2, Encryption::Tls, ChannelLimits::default(), ARENA_BYTES);
    rig.exchange(300, &LENGTHS, |seq| match seq {
        50 => rig.pair.proxies[0].down(),
        150 => {
            rig.pair.proxies[0].up();
            rig.pair.proxies[1].down();
        }
        _ => {}
    });
    rig.finish();
}

#[test]
fn a_path_that_falls_silent_is_left() {
    let rig = rig(2, Encryption::Off, ChannelLimits::default(), ARENA_BYTES);
    rig.exchange(10, &[4096], |_| {});
    rig.pair.proxies[0].stall(true);
    let began = std::time::Instant::now();
    rig.exchange(1, &[4096], |_| {});
    println!("moved to the other path in {} ms", began.elapsed().as_millis());
    assert!(began.elapsed() < std::time::Duration::from_secs(3), "three times the bound of 1 s");
    rig.exchange(50, &LENGTHS, |_| {});
    rig.pair.proxies[0].stall(false);
    rig.finish();
}

#[test]
fn a_flipped_bit_is_caught_and_the_frame_sent_again() {
    for encryption in [Encryption::Off, Encryption::Tls] {
        let rig = rig(1, encryption, ChannelLimits::default(), ARENA_BYTES);
        rig.exchange(5, &LENGTHS, |_| {});
        for round in 0..6 {
            rig.pair.proxies[0].flip_after(1000 + 70_001 * round);
            rig.exchange(40, &LENGTHS, |_| {});
        }
        assert_eq!(rig.pair.proxies[0].flips(), 6);
        rig.finish();
    }
}

#[test]
fn a_corrupt_frame_is_reported() {
    let rig = rig(1, Encryption::Off, ChannelLimits::default(), ARENA_BYTES);
    rig.exchange(1, &[4096], |_| {});
    // Probes are small: among 64 payloads of 1 MiB the flipped bit is in a payload.
    rig.pair.proxies[0].flip_after(20 << 20);
    for seq in 1..=40 {
        rig.a.send(write(seq, 1 << 20), content(seq, 1 << 20));
    }
    let mut corrupt = Vec::new();
    let mut next = 1;
    while next <= 40 {
        match rig.b.next() {
            Heard::Message(message, payload) => {
                assert_eq!(message, write(next, 1 << 20));
                assert!(payload == content(next, 1 << 20));
                next += 1;
            }
            Heard::Corrupt(why) => corrupt.push(why),
            Heard::Broken(_) | Heard::Ended { .. } => {}
        }
    }
    assert_eq!(corrupt.len(), 1, "{corrupt:?}");
    assert!(corrupt[0].contains("checksum"), "{corrupt:?}");
    rig.finish();
}

#[test]
fn credit_bounds_what_is_unacknowledged_and_never_stalls() {
    let limits = ChannelLimits { window_frames: 4, window_bytes: 64 << 10, ..ChannelLimits::default() };
    let rig = rig(1, Encryption::Off, limits, ARENA_BYTES);
    let began = std::time::Instant::now();
    rig.exchange(1000, &[4096, 512], |_| {});
    println!("1000 writes with 4 in flight in {} ms", began.elapsed().as_millis());
    let (frames, bytes) = rig.finish();
    assert!(frames <= 4, "{frames} frames were unacknowledged");
    assert!(bytes <= (64 << 10) + 8192, "{bytes} bytes were unacknowledged");
}

#[test]
fn a_receiver_without_buffers_stops_receiving_and_goes_on() {
    for encryption in [Encryption::Off, Encryption::Tls] {
        // Room for four payloads of 1 MiB, and the volume keeps them.
        let rig = rig(1, encryption, ChannelLimits::default(), 4 << 20);
        rig.b.order(Order::Hoard(true));
        for seq in 1..=12 {
            rig.a.send(write(seq, 1 << 20), content(seq, 1 << 20));
        }
        let mut next = 1;
        while next <= 12 {
            let (message, payload) = rig.b.message();
            assert_eq!(message, write(next, 1 << 20));
            assert!(payload == content(next, 1 << 20));
            if next % 4 == 0 {
                rig.b.order(Order::Hoard(false));
                rig.b.order(Order::Hoard(true));
            }
            next += 1;
        }
        rig.finish();
    }
}
