//! A volume's messages as frames and back. Pure: the simulator's wire carries the same bytes.

use duplex_core::ids::{ByteRange, Generation, Proven, Sequence};
use duplex_core::message::{RemoteOutcome, VolumeMessage};

use crate::frame::{
    Fields, FrameError, HEAD_BYTES, Head, Header, INLINE_MAX_BYTES, Kind, PAYLOAD_MAX_BYTES, Routing, crc,
};

/// Write, Zero: stable before the acknowledgement.
const FLAG_FUA: u8 = 1;
/// Zero: space may be given back.
const FLAG_MAY_UNMAP: u8 = 2;
/// Acknowledgements and replies: the operation failed, `detail` is the errno.
const FLAG_FAILED: u8 = 1;
/// Bytes of a generation.
const GENERATION_BYTES: usize = 16;

/// What follows a header.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Body<'a> {
    /// Nothing.
    Empty,
    /// The message's payload, where it already lies.
    Payload(&'a [u8]),
    /// Bytes made for this frame (marks, generations); rare.
    Inline(Vec<u8>),
}

impl Body<'_> {
    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        match self {
            Self::Empty => &[],
            Self::Payload(bytes) => bytes,
            Self::Inline(bytes) => bytes,
        }
    }
}

/// Why a message cannot be sent. The sender's mistake: nothing was sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum EncodeError {
    /// The payload is not as long as the message's range.
    #[error("payload has {given_bytes} bytes, the message says {wanted_bytes}: give the whole range")]
    Payload {
        /// Given.
        given_bytes: u64,
        /// By the message.
        wanted_bytes: u64,
    },
    /// Longer than a frame may be.
    #[error("message needs {body_bytes} bytes, a frame carries at most {limit_bytes}: send it in parts")]
    TooLong {
        /// Needed.
        body_bytes: u64,
        /// Allowed.
        limit_bytes: u32,
    },
}

/// Header and body of a message. `payload` is exactly `message.payload_bytes()` long (`&[]` for none).
/// Allocates only for pages of marks and lists of generations.
pub fn encode_volume<'a>(
    message: &VolumeMessage,
    payload: &'a [u8],
    routing: Routing,
) -> Result<(Head, Body<'a>), EncodeError> {
    let wanted_bytes = message.payload_bytes();
    if wanted_bytes > u64::from(PAYLOAD_MAX_BYTES) {
        return Err(EncodeError::TooLong { body_bytes: wanted_bytes, limit_bytes: PAYLOAD_MAX_BYTES });
    }
    if payload.len() as u64 != wanted_bytes {
        return Err(EncodeError::Payload { given_bytes: payload.len() as u64, wanted_bytes });
    }
    let body = match inline_body(message) {
        Some(bytes) if bytes.len() > INLINE_MAX_BYTES as usize => {
            return Err(EncodeError::TooLong {
                body_bytes: bytes.len() as u64,
                limit_bytes: INLINE_MAX_BYTES,
            });
        }
        Some(bytes) => Body::Inline(bytes),
        None if payload.is_empty() => Body::Empty,
        None => Body::Payload(payload),
    };
    let bytes = body.bytes();
    let body_bytes = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    let header = Header { routing, fields: fields_of(message), body_bytes, body_crc: crc(bytes) };
    Ok((header.encode(), body))
}

/// A whole frame in one vector, for tests and the simulator's wire.
pub fn encode_volume_frame(
    message: &VolumeMessage,
    payload: &[u8],
    routing: Routing,
) -> Result<Vec<u8>, EncodeError> {
    let (head, body) = encode_volume(message, payload, routing)?;
    let mut frame = Vec::with_capacity(HEAD_BYTES + body.bytes().len());
    frame.extend_from_slice(&head);
    frame.extend_from_slice(body.bytes());
    Ok(frame)
}

/// Takes one whole frame of a data channel apart: header, message, payload (empty for none).
pub fn decode_volume_frame(frame: &[u8]) -> Result<(Header, VolumeMessage, &[u8]), FrameError> {
    let (head, body) = split_head(frame)?;
    let header = Header::decode(head)?;
    header.check_body(body)?;
    let message = decode_volume(&header, if is_payload(header.fields.kind) { &[] } else { body })?;
    let payload = if is_payload(header.fields.kind) { body } else { &[] };
    Ok((header, message, payload))
}

/// The first 64 bytes and the rest; too few bytes count as an altered header.
pub(crate) fn split_head(frame: &[u8]) -> Result<(&Head, &[u8]), FrameError> {
    frame.split_first_chunk::<HEAD_BYTES>().ok_or(FrameError::HeadChecksum)
}

/// True for kinds whose body is the payload of the message, not a part of the message itself.
pub const fn is_payload(kind: Kind) -> bool {
    matches!(kind, Kind::Write | Kind::Copy | Kind::ReadReply)
}

fn outcome_fields(kind: Kind, id: u64, outcome: RemoteOutcome) -> Fields {
    let fields = Fields { aux: id, ..Fields::of(kind) };
    match outcome {
        RemoteOutcome::Done => fields,
        RemoteOutcome::Failed { errno } => {
            Fields { flags: FLAG_FAILED, detail: u32::from_le_bytes(errno.to_le_bytes()), ..fields }
        }
    }
}

fn outcome_of(fields: &Fields) -> RemoteOutcome {
    if fields.flags & FLAG_FAILED == 0 {
        RemoteOutcome::Done
    } else {
        RemoteOutcome::Failed { errno: i32::from_le_bytes(fields.detail.to_le_bytes()) }
    }
}

fn with_range(fields: Fields, range: ByteRange) -> Fields {
    Fields { offset: range.offset_bytes, length: range.length_bytes, ..fields }
}

const fn flag(set: bool, bit: u8) -> u8 {
    if set { bit } else { 0 }
}

fn fields_of(message: &VolumeMessage) -> Fields {
    match *message {
        VolumeMessage::Write { seq, range, fua } => {
            let fields = Fields { aux: seq.0, flags: flag(fua, FLAG_FUA), ..Fields::of(Kind::Write) };
            with_range(fields, range)
        }
        VolumeMessage::Zero { seq, range, may_unmap, fua } => {
            let flags = flag(fua, FLAG_FUA) | flag(may_unmap, FLAG_MAY_UNMAP);
            with_range(Fields { aux: seq.0, flags, ..Fields::of(Kind::Zero) }, range)
        }
        VolumeMessage::Ack { seq, outcome } => outcome_fields(Kind::Ack, seq.0, outcome),
        VolumeMessage::Flush { id } => Fields { aux: id, ..Fields::of(Kind::Flush) },
        VolumeMessage::FlushAck { id, outcome } => outcome_fields(Kind::FlushAck, id, outcome),
        VolumeMessage::Copy { id, range } => with_range(Fields { aux: id, ..Fields::of(Kind::Copy) }, range),
        VolumeMessage::CopyZero { id, range } => {
            with_range(Fields { aux: id, ..Fields::of(Kind::CopyZero) }, range)
        }
        VolumeMessage::CopyAck { id, outcome } => outcome_fields(Kind::CopyAck, id, outcome),
        VolumeMessage::Read { id, range } => with_range(Fields { aux: id, ..Fields::of(Kind::Read) }, range),
        VolumeMessage::ReadReply { id, range, outcome } => {
            with_range(outcome_fields(Kind::ReadReply, id, outcome), range)
        }
        VolumeMessage::MarksPage { index, .. } => Fields { aux: index, ..Fields::of(Kind::MarksPage) },
        VolumeMessage::MarksEnd { pages } => Fields { aux: pages, ..Fields::of(Kind::MarksEnd) },
        VolumeMessage::MarksAck { pages } => Fields { aux: pages, ..Fields::of(Kind::MarksAck) },
        VolumeMessage::SyncDone { proven, .. } => {
            Fields { aux: proven.epoch, offset: proven.seq.0, ..Fields::of(Kind::SyncDone) }
        }
        VolumeMessage::SyncAck { outcome } => outcome_fields(Kind::SyncAck, 0, outcome),
    }
}

fn inline_body(message: &VolumeMessage) -> Option<Vec<u8>> {
    match message {
        VolumeMessage::MarksPage { bits, .. } => Some(bits.clone()),
        VolumeMessage::SyncDone { generation, history, .. } => {
            let all = std::iter::once(generation).chain(history);
            Some(all.flat_map(|generation| generation.0.to_le_bytes()).collect())
        }
        VolumeMessage::Write { .. }
        | VolumeMessage::Zero { .. }
        | VolumeMessage::Ack { .. }
        | VolumeMessage::Flush { .. }
        | VolumeMessage::FlushAck { .. }
        | VolumeMessage::Copy { .. }
        | VolumeMessage::CopyZero { .. }
        | VolumeMessage::CopyAck { .. }
        | VolumeMessage::Read { .. }
        | VolumeMessage::ReadReply { .. }
        | VolumeMessage::MarksEnd { .. }
        | VolumeMessage::MarksAck { .. }
        | VolumeMessage::SyncAck { .. } => None,
    }
}

/// The message of a header. `inline` is the body of a kind that is not [`is_payload`] (checked against its checksum
/// already), empty otherwise: so a payload's message is known before the payload has come in.
pub fn decode_volume(header: &Header, inline: &[u8]) -> Result<VolumeMessage, FrameError> {
    let fields = &header.fields;
    let range = ByteRange::new(fields.offset, fields.length);
    let (seq, id, outcome) = (Sequence(fields.aux), fields.aux, outcome_of(fields));
    let fua = fields.flags & FLAG_FUA != 0;
    let message = match fields.kind {
        Kind::Write => VolumeMessage::Write { seq, range, fua },
        Kind::Zero => VolumeMessage::Zero { seq, range, may_unmap: fields.flags & FLAG_MAY_UNMAP != 0, fua },
        Kind::Ack => VolumeMessage::Ack { seq, outcome },
        Kind::Flush => VolumeMessage::Flush { id },
        Kind::FlushAck => VolumeMessage::FlushAck { id, outcome },
        Kind::Copy => VolumeMessage::Copy { id, range },
        Kind::CopyZero => VolumeMessage::CopyZero { id, range },
        Kind::CopyAck => VolumeMessage::CopyAck { id, outcome },
        Kind::Read => VolumeMessage::Read { id, range },
        Kind::ReadReply => VolumeMessage::ReadReply { id, range, outcome },
        Kind::MarksPage => VolumeMessage::MarksPage { index: fields.aux, bits: inline.to_vec() },
        Kind::MarksEnd => VolumeMessage::MarksEnd { pages: fields.aux },
        Kind::MarksAck => VolumeMessage::MarksAck { pages: fields.aux },
        Kind::SyncDone => sync_done(fields, inline)?,
        Kind::SyncAck => VolumeMessage::SyncAck { outcome },
        kind @ (Kind::Heartbeat
        | Kind::Control
        | Kind::LinkAck
        | Kind::Probe
        | Kind::ProbeReply
        | Kind::Resume
        | Kind::SessionOpen
        | Kind::SessionOpened
        | Kind::SessionClose
        | Kind::Greeting
        | Kind::Proof
        | Kind::LinkHello
        | Kind::LinkWelcome
        | Kind::LinkRefusal) => {
            return Err(FrameError::Unexpected { kind, place: "as a volume's message" });
        }
    };
    let kind = fields.kind;
    if fields_of(&message) != *fields {
        return Err(FrameError::Malformed { kind, what: "a field this kind does not use is not 0" });
    }
    if is_payload(kind) && message.payload_bytes() != u64::from(header.body_bytes) {
        return Err(FrameError::Malformed { kind, what: "the payload is not as long as the range" });
    }
    Ok(message)
}

fn sync_done(fields: &Fields, inline: &[u8]) -> Result<VolumeMessage, FrameError> {
    let (chunks, rest) = inline.as_chunks::<GENERATION_BYTES>();
    let mut generations = chunks.iter().map(|bytes| Generation(u128::from_le_bytes(*bytes)));
    match (generations.next(), rest) {
        (Some(generation), []) => Ok(VolumeMessage::SyncDone {
            generation,
            history: generations.collect(),
            proven: Proven { epoch: fields.aux, seq: Sequence(fields.offset) },
        }),
        _ => Err(FrameError::Malformed { kind: fields.kind, what: "not a whole number of generations" }),
    }
}
