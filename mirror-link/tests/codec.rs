//! What is sent is what is received; what was altered is never taken for something else.
#![allow(clippy::unwrap_used, reason = "tests and their helpers: a panic with its place is the report")]

use duplex_core::format::record::{CopyRecord, ServerRecord};
use duplex_core::ids::{
    BootId, ByteRange, Epoch, Generation, Proven, Sequence, ServerName, SessionId, VolumeIndex,
};
use duplex_core::message::{
    ControlMessage, Hello, LiveState, PROTOCOL_VERSION, RemoteOutcome, VolumeHello, VolumeMessage,
};
use duplex_core::mirror::api::{Pace, Priority};
use duplex_link::codec::{EncodeError, decode_volume_frame, encode_volume, encode_volume_frame};
use duplex_link::control::{
    ControlWord, LinkWord, decode_control_frame, decode_link, encode_control, encode_link,
};
use duplex_link::frame::{
    Channel, FrameError, HEAD_BYTES, Header, Kind, PAYLOAD_MAX_BYTES, Routing, crc, restamp,
};
use proptest::collection::vec;
use proptest::prelude::*;

fn outcomes() -> impl Strategy<Value = RemoteOutcome> {
    prop_oneof![Just(RemoteOutcome::Done), any::<i32>().prop_map(|errno| RemoteOutcome::Failed { errno })]
}

fn ranges() -> impl Strategy<Value = ByteRange> {
    (any::<u64>(), any::<u64>()).prop_map(|(offset, length)| ByteRange::new(offset, length))
}

fn payload_ranges() -> impl Strategy<Value = ByteRange> {
    (any::<u64>(), 1_u64..9000).prop_map(|(offset, length)| ByteRange::new(offset, length))
}

fn volume_messages() -> impl Strategy<Value = VolumeMessage> {
    use VolumeMessage as M;
    prop_oneof![
        (any::<u64>(), payload_ranges(), any::<bool>()).prop_map(|(seq, range, fua)| M::Write {
            seq: Sequence(seq),
            range,
            fua
        }),
        (any::<u64>(), ranges(), any::<bool>(), any::<bool>())
            .prop_map(|(seq, range, may_unmap, fua)| M::Zero { seq: Sequence(seq), range, may_unmap, fua }),
        (any::<u64>(), outcomes()).prop_map(|(seq, outcome)| M::Ack { seq: Sequence(seq), outcome }),
        any::<u64>().prop_map(|id| M::Flush { id }),
        (any::<u64>(), outcomes()).prop_map(|(id, outcome)| M::FlushAck { id, outcome }),
        (any::<u64>(), payload_ranges()).prop_map(|(id, range)| M::Copy { id, range }),
        (any::<u64>(), ranges()).prop_map(|(id, range)| M::CopyZero { id, range }),
        (any::<u64>(), outcomes()).prop_map(|(id, outcome)| M::CopyAck { id, outcome }),
        (any::<u64>(), ranges()).prop_map(|(id, range)| M::Read { id, range }),
        (any::<u64>(), payload_ranges(), outcomes()).prop_map(|(id, range, outcome)| M::ReadReply {
            id,
            range,
            outcome
        }),
        (any::<u64>(), vec(any::<u8>(), 0..4097)).prop_map(|(index, bits)| M::MarksPage { index, bits }),
        any::<u64>().prop_map(|pages| M::MarksEnd { pages }),
        any::<u64>().prop_map(|pages| M::MarksAck { pages }),
        (any::<u128>(), vec(any::<u128>(), 0..17), any::<u64>(), any::<u64>()).prop_map(
            |(generation, history, epoch, seq)| M::SyncDone {
                generation: Generation(generation),
                history: history.into_iter().map(Generation).collect(),
                proven: Proven { epoch, seq: Sequence(seq) },
            }
        ),
        outcomes().prop_map(|outcome| M::SyncAck { outcome }),
    ]
}

fn epochs() -> impl Strategy<Value = Epoch> {
    (any::<u64>(), proptest::option::of(1_usize..20)).prop_map(|(number, holder)| Epoch {
        number,
        holder: holder.map(|length| ServerName("alphabetagammadelta_"[..length].to_owned())),
    })
}

fn live_states() -> impl Strategy<Value = LiveState> {
    prop_oneof![
        Just(LiveState::Loading),
        Just(LiveState::Joining),
        Just(LiveState::Secondary),
        Just(LiveState::PrimaryMirrored),
        Just(LiveState::Frozen),
        Just(LiveState::Granted),
        Just(LiveState::Alone),
        Just(LiveState::Syncing),
        Just(LiveState::SyncTail),
        Just(LiveState::Returning),
        Just(LiveState::Stopping),
    ]
}

fn hello(revision: u64, live: LiveState) -> ControlMessage {
    ControlMessage::Hello(Box::new(Hello {
        version: PROTOCOL_VERSION,
        revision,
        server: ServerName("alpha".into()),
        pair_name: "p".into(),
        incarnation: duplex_core::ids::Incarnation(u128::MAX - 1),
        boot_id: BootId(7),
        live,
        record: ServerRecord::fresh(BootId(7)),
        cas_outstanding: false,
        granted: false,
        config: [("silent_ms".to_owned(), "800".to_owned())].into(),
        memory: Vec::new(),
        volumes: vec![VolumeHello {
            name: "v".into(),
            copy: CopyRecord::blank(1 << 30, 4096, 512),
            dirty_blocks: u64::MAX,
            lacks_solo: false,
            whole_map: true,
            undo_available: false,
        }],
    }))
}

fn control_messages() -> impl Strategy<Value = ControlMessage> {
    use ControlMessage as C;
    prop_oneof![
        (any::<u64>(), live_states()).prop_map(|(revision, live)| hello(revision, live)),
        (any::<u64>(), any::<u64>()).prop_map(|(mine, yours)| C::Agree { mine, yours }),
        (any::<String>(), any::<String>()).prop_map(|(code, text)| C::Refuse { code, text }),
        (any::<u64>(), any::<u64>(), any::<bool>(), live_states(), epochs()).prop_map(
            |(sent_ns, echo_ns, promising, live, epoch)| C::Heartbeat {
                sent_ns,
                echo_ns,
                promising,
                live,
                epoch
            }
        ),
        epochs().prop_map(|epoch| C::Primary { epoch }),
        (epochs(), any::<bool>(), any::<String>()).prop_map(|(epoch, granted, text)| C::PromoteAnswer {
            epoch,
            granted,
            text
        }),
        Just(C::HandOverAsk),
        any::<u64>().prop_map(|limit| C::Resync { command: Pace::MaxBytesPerSecond(limit) }),
        Just(C::Resync { command: Pace::Priority(Priority::High) }),
        Just(C::Resync { command: Pace::Pause }),
        (any::<u16>(), any::<i32>()).prop_map(|(volume, errno)| C::CopyFailed { volume, errno }),
        any::<String>().prop_map(|text| C::Bye { text }),
    ]
}

fn link_words() -> impl Strategy<Value = LinkWord> {
    use LinkWord as L;
    prop_oneof![
        Just(L::Ack),
        any::<u64>().prop_map(|sent_ns| L::Probe { sent_ns }),
        any::<u64>().prop_map(|sent_ns| L::ProbeReply { sent_ns }),
        (any::<u128>(), any::<u64>(), any::<u64>(), any::<u64>()).prop_map(
            |(session, received, window_bytes, window_frames)| L::Resume {
                session: SessionId(session),
                received,
                window_bytes,
                window_frames,
            }
        ),
        any::<u128>().prop_map(|part| L::SessionOpen { part }),
        any::<u128>().prop_map(|part| L::SessionOpened { part }),
        (any::<u128>(), "[a-zé ]{0,300}")
            .prop_map(|(session, reason)| L::SessionClose { session: SessionId(session), reason }),
    ]
}

fn routings() -> impl Strategy<Value = Routing> {
    (0_u16..u16::MAX, any::<u64>(), any::<u64>()).prop_map(|(volume, sequence, ack)| Routing {
        channel: Channel::Volume(VolumeIndex(volume)),
        sequence,
        ack,
    })
}

fn payload_for(message: &VolumeMessage) -> Vec<u8> {
    (0..message.payload_bytes()).map(|index| ((index * 31) >> 3) as u8).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn volume_messages_come_back(message in volume_messages(), routing in routings()) {
        let payload = payload_for(&message);
        let frame = encode_volume_frame(&message, &payload, routing).unwrap();
        let (header, back, back_payload) = decode_volume_frame(&frame).unwrap();
        prop_assert_eq!(back, message);
        prop_assert_eq!(back_payload, &payload[..]);
        prop_assert_eq!(header.routing, routing);
    }

    #[test]
    fn control_messages_come_back(message in control_messages(), sequence in 1_u64.., ack in any::<u64>()) {
        let sequence = if matches!(message, ControlMessage::Heartbeat { .. }) { 0 } else { sequence };
        let frame = encode_control(&message, sequence, ack).unwrap();
        let (header, back) = decode_control_frame(&frame).unwrap();
        prop_assert_eq!(back, ControlWord::Message(message));
        prop_assert_eq!((header.routing.sequence, header.routing.ack), (sequence, ack));
    }

    #[test]
    fn link_words_come_back(word in link_words(), ack in any::<u64>()) {
        let frame = encode_link(&word, Channel::Control, ack).unwrap();
        prop_assert_eq!(decode_control_frame(&frame).unwrap().1, ControlWord::Link(word.clone()));
        let frame = encode_link(&word, Channel::Volume(VolumeIndex(3)), ack).unwrap();
        let (head, body) = frame.split_first_chunk::<HEAD_BYTES>().unwrap();
        prop_assert_eq!(decode_link(&Header::decode(head).unwrap(), body).unwrap(), word);
    }

    /// CRC-32 finds every error of up to 3 bits in frames of these lengths.
    #[test]
    fn altered_frames_are_refused(
        message in volume_messages(),
        routing in routings(),
        bits in vec(any::<prop::sample::Index>(), 1..4),
    ) {
        let mut frame = encode_volume_frame(&message, &payload_for(&message), routing).unwrap();
        let total = frame.len() * 8;
        let bits: std::collections::BTreeSet<_> = bits.iter().map(|bit| bit.index(total)).collect();
        for bit in bits {
            frame[bit / 8] ^= 1 << (bit % 8);
        }
        prop_assert!(decode_volume_frame(&frame).is_err());
    }

    #[test]
    fn altered_control_frames_are_refused(message in control_messages(), bit in any::<prop::sample::Index>()) {
        let mut frame = encode_control(&message, 1, 0).unwrap();
        let bit = bit.index(frame.len() * 8);
        frame[bit / 8] ^= 1 << (bit % 8);
        prop_assert!(decode_control_frame(&frame).is_err());
    }

    /// With a valid checksum, too: what decodes encodes to the same bytes again, and nothing panics.
    #[test]
    fn only_one_encoding_exists(
        kind in any::<u8>(), flags in 0_u8..8, numbers in any::<[u64; 3]>(), small in any::<bool>(),
        detail in 0_u32..12, body in vec(any::<u8>(), 0..100), sequence in 0_u64..2,
    ) {
        let mut head = [0_u8; HEAD_BYTES];
        head[..4].copy_from_slice(b"DXL\x01");
        (head[4], head[5]) = (kind, flags);
        head[8] = sequence as u8;
        for (index, number) in numbers.iter().enumerate() {
            let number = if small { number % 3 * body.len() as u64 } else { *number };
            head[24 + 8 * index..32 + 8 * index].copy_from_slice(&number.to_le_bytes());
        }
        head[48..52].copy_from_slice(&detail.to_le_bytes());
        head[52..56].copy_from_slice(&(body.len() as u32).to_le_bytes());
        head[56..60].copy_from_slice(&crc(&body).to_le_bytes());
        restamp(&mut head, 0);
        let frame = [&head[..], &body].concat();
        if let Ok((header, message, payload)) = decode_volume_frame(&frame) {
            prop_assert_eq!(encode_volume_frame(&message, payload, header.routing).unwrap(), frame.clone());
        }
        if let Ok((header, ControlWord::Link(word))) = decode_control_frame(&frame) {
            prop_assert_eq!(encode_link(&word, header.routing.channel, header.routing.ack).unwrap(), frame);
        }
    }

    #[test]
    fn garbage_never_panics(bytes in vec(any::<u8>(), 0..300)) {
        prop_assert!(decode_volume_frame(&bytes).is_err());
        prop_assert!(decode_control_frame(&bytes).is_err());
    }
}

fn routing() -> Routing {
    Routing { channel: Channel::Volume(VolumeIndex(0)), sequence: 1, ack: 0 }
}

#[test]
fn a_write_has_the_documented_bytes() {
    let range = ByteRange::new(0x1_0000, 4);
    let message = VolumeMessage::Write { seq: Sequence(9), range, fua: true };
    let routing = Routing { channel: Channel::Volume(VolumeIndex(2)), sequence: 5, ack: 3 };
    let frame = encode_volume_frame(&message, b"data", routing).unwrap();
    let mut expected = Vec::new();
    expected.extend_from_slice(b"DXL\x01\x01\x01\x02\x00");
    for number in [5_u64, 3, 9, 0x1_0000, 4] {
        expected.extend_from_slice(&number.to_le_bytes());
    }
    expected.extend_from_slice(&[0; 4]);
    expected.extend_from_slice(&4_u32.to_le_bytes());
    expected.extend_from_slice(&0xadf3_f363_u32.to_le_bytes());
    let head_crc = crc(&expected);
    expected.extend_from_slice(&head_crc.to_le_bytes());
    expected.extend_from_slice(b"data");
    assert_eq!(frame, expected);
}

#[test]
fn hostile_lengths_are_refused_from_the_header_alone() {
    for kind in Kind::ALL {
        let header = Header {
            routing: routing(),
            fields: duplex_link::frame::Fields::of(*kind),
            body_bytes: kind.body_limit_bytes() + 1,
            body_crc: 0,
        };
        let refused = Header::decode(&header.encode());
        assert!(matches!(refused, Err(FrameError::TooLong { .. })), "{kind:?}: {refused:?}");
    }
}

#[test]
fn an_unknown_kind_and_an_unknown_version_are_named() {
    let mut head = encode_volume(&VolumeMessage::Flush { id: 1 }, &[], routing()).unwrap().0;
    head[4] = 200;
    restamp(&mut head, 0);
    assert_eq!(Header::decode(&head), Err(FrameError::Kind { found: 200 }));
    head[3] = 2;
    restamp(&mut head, 0);
    assert_eq!(Header::decode(&head), Err(FrameError::Version { theirs: 2 }));
}

#[test]
fn what_does_not_fit_a_frame_is_refused_before_it_is_sent() {
    let range = ByteRange::new(0, u64::from(PAYLOAD_MAX_BYTES) + 1);
    let payload = vec![0; range.length_bytes as usize];
    let write = VolumeMessage::Write { seq: Sequence(1), range, fua: false };
    assert!(matches!(encode_volume(&write, &payload, routing()), Err(EncodeError::TooLong { .. })));
    let marks = VolumeMessage::MarksPage { index: 0, bits: vec![0; 4097] };
    assert!(matches!(encode_volume(&marks, &[], routing()), Err(EncodeError::TooLong { .. })));
    let write = VolumeMessage::Write { seq: Sequence(1), range: ByteRange::new(0, 8), fua: false };
    assert!(matches!(encode_volume(&write, b"1234567", routing()), Err(EncodeError::Payload { .. })));
}

#[test]
fn a_new_acknowledgement_keeps_the_rest() {
    let mut head = encode_volume(&VolumeMessage::Flush { id: 77 }, &[], routing()).unwrap().0;
    let before = Header::decode(&head).unwrap();
    restamp(&mut head, 41);
    let after = Header::decode(&head).unwrap();
    assert_eq!(after, Header { routing: Routing { ack: 41, ..before.routing }, ..before });
}
