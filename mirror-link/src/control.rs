//! The control channel's words, and the link's own, as frames and back. Pure.

use duplex_core::ids::{Epoch, ServerName, SessionId};
use duplex_core::message::{ControlMessage, LiveState};

use crate::codec::{EncodeError, split_head};
use crate::frame::{CONTROL_MAX_BYTES, Channel, Fields, FrameError, HEAD_BYTES, Header, Kind, Routing, crc};

/// Heartbeat: the echo is a promise.
const FLAG_PROMISING: u8 = 1;
/// Heartbeat: the epoch has a holder, whose name is the body.
const FLAG_HOLDER: u8 = 2;

/// Every state in the order of its number in a heartbeat. Only ever appended to.
const LIVE_STATES: [LiveState; 11] = [
    LiveState::Loading,
    LiveState::Joining,
    LiveState::Secondary,
    LiveState::PrimaryMirrored,
    LiveState::Frozen,
    LiveState::Granted,
    LiveState::Alone,
    LiveState::Syncing,
    LiveState::SyncTail,
    LiveState::Returning,
    LiveState::Stopping,
];

const fn live_number(live: LiveState) -> u32 {
    match live {
        LiveState::Loading => 0,
        LiveState::Joining => 1,
        LiveState::Secondary => 2,
        LiveState::PrimaryMirrored => 3,
        LiveState::Frozen => 4,
        LiveState::Granted => 5,
        LiveState::Alone => 6,
        LiveState::Syncing => 7,
        LiveState::SyncTail => 8,
        LiveState::Returning => 9,
        LiveState::Stopping => 10,
    }
}

/// The link's own words, never seen above it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum LinkWord {
    /// Only the header's acknowledgement.
    Ack,
    /// Are you there?
    Probe {
        /// The sender's clock; comes back.
        sent_ns: u64,
    },
    /// Yes.
    ProbeReply {
        /// As asked.
        sent_ns: u64,
    },
    /// This connection now carries this session's channel, and this is what the sender can take.
    Resume {
        /// The session.
        session: SessionId,
        /// Every frame up to this one was received.
        received: u64,
        /// Unacknowledged bytes the sender takes.
        window_bytes: u64,
        /// Unacknowledged frames the sender takes.
        window_frames: u64,
    },
    /// The dialling server proposes a session.
    SessionOpen {
        /// Its random part of the identity.
        part: u128,
    },
    /// The other agrees.
    SessionOpened {
        /// Its random part of the identity.
        part: u128,
    },
    /// The session is over, or was never known.
    SessionClose {
        /// Which.
        session: SessionId,
        /// Why, for the events of both.
        reason: String,
    },
}

/// A frame of a control connection.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ControlWord {
    /// For the layer above.
    Message(ControlMessage),
    /// For the link.
    Link(LinkWord),
}

/// A whole frame from fields and body.
pub(crate) fn whole_frame(routing: Routing, fields: Fields, body: &[u8]) -> Result<Vec<u8>, EncodeError> {
    let limit_bytes = fields.kind.body_limit_bytes();
    let body_bytes = u32::try_from(body.len()).ok().filter(|bytes| *bytes <= limit_bytes);
    let body_bytes = body_bytes.ok_or(EncodeError::TooLong { body_bytes: body.len() as u64, limit_bytes })?;
    let head = Header { routing, fields, body_bytes, body_crc: crc(body) }.encode();
    let mut frame = Vec::with_capacity(HEAD_BYTES + body.len());
    frame.extend_from_slice(&head);
    frame.extend_from_slice(body);
    Ok(frame)
}

/// A control message as a whole frame. The only error is a message beyond 1 MiB (or a holder's name beyond 64 bytes).
pub fn encode_control(message: &ControlMessage, sequence: u64, ack: u64) -> Result<Vec<u8>, EncodeError> {
    let routing = Routing { channel: Channel::Control, sequence, ack };
    if let ControlMessage::Heartbeat { epoch, .. } = message {
        let name = epoch.holder.as_ref().map_or("", |holder| holder.0.as_str());
        return whole_frame(routing, heartbeat_fields(message), name.as_bytes());
    }
    let too_long = EncodeError::TooLong { body_bytes: u64::MAX, limit_bytes: CONTROL_MAX_BYTES };
    let body = serde_json::to_vec(message).map_err(|_| too_long)?;
    whole_frame(routing, Fields::of(Kind::Control), &body)
}

fn heartbeat_fields(message: &ControlMessage) -> Fields {
    let empty = Fields::of(Kind::Heartbeat);
    if let ControlMessage::Heartbeat { sent_ns, echo_ns, promising, live, epoch } = message {
        let promising = if *promising { FLAG_PROMISING } else { 0 };
        let holder = if epoch.holder.is_some() { FLAG_HOLDER } else { 0 };
        return Fields {
            flags: promising | holder,
            aux: *sent_ns,
            offset: *echo_ns,
            length: epoch.number,
            detail: live_number(*live),
            ..empty
        };
    }
    empty
}

/// The link's word as a whole frame of this channel, not numbered.
pub fn encode_link(word: &LinkWord, channel: Channel, ack: u64) -> Result<Vec<u8>, EncodeError> {
    let routing = Routing { channel, sequence: 0, ack };
    match word {
        LinkWord::Resume { session, .. } => whole_frame(routing, link_fields(word), &session.0.to_le_bytes()),
        LinkWord::SessionOpen { part } | LinkWord::SessionOpened { part } => {
            whole_frame(routing, link_fields(word), &part.to_le_bytes())
        }
        LinkWord::SessionClose { session, reason } => {
            let mut body = session.0.to_le_bytes().to_vec();
            let room = Kind::SessionClose.body_limit_bytes() as usize - body.len();
            body.extend_from_slice(&reason.as_bytes()[..reason.floor_char_boundary(room)]);
            whole_frame(routing, link_fields(word), &body)
        }
        LinkWord::Ack | LinkWord::Probe { .. } | LinkWord::ProbeReply { .. } => {
            whole_frame(routing, link_fields(word), &[])
        }
    }
}

fn link_fields(word: &LinkWord) -> Fields {
    match *word {
        LinkWord::Ack => Fields::of(Kind::LinkAck),
        LinkWord::Probe { sent_ns } => Fields { aux: sent_ns, ..Fields::of(Kind::Probe) },
        LinkWord::ProbeReply { sent_ns } => Fields { aux: sent_ns, ..Fields::of(Kind::ProbeReply) },
        LinkWord::Resume { received, window_bytes, window_frames, .. } => {
            Fields { aux: received, offset: window_bytes, length: window_frames, ..Fields::of(Kind::Resume) }
        }
        LinkWord::SessionOpen { .. } => Fields::of(Kind::SessionOpen),
        LinkWord::SessionOpened { .. } => Fields::of(Kind::SessionOpened),
        LinkWord::SessionClose { .. } => Fields::of(Kind::SessionClose),
    }
}

/// The link's word of a header and its checked body.
pub fn decode_link(header: &Header, body: &[u8]) -> Result<LinkWord, FrameError> {
    let (kind, fields) = (header.fields.kind, &header.fields);
    let number = || {
        let bytes = body.try_into().map_err(|_| FrameError::Malformed { kind, what: "not 16 bytes" })?;
        Ok(u128::from_le_bytes(bytes))
    };
    let word = match kind {
        Kind::LinkAck => LinkWord::Ack,
        Kind::Probe => LinkWord::Probe { sent_ns: fields.aux },
        Kind::ProbeReply => LinkWord::ProbeReply { sent_ns: fields.aux },
        Kind::Resume => LinkWord::Resume {
            session: SessionId(number()?),
            received: fields.aux,
            window_bytes: fields.offset,
            window_frames: fields.length,
        },
        Kind::SessionOpen => LinkWord::SessionOpen { part: number()? },
        Kind::SessionOpened => LinkWord::SessionOpened { part: number()? },
        Kind::SessionClose => session_close(body)?,
        kind @ (Kind::Write
        | Kind::Zero
        | Kind::Ack
        | Kind::Flush
        | Kind::FlushAck
        | Kind::Copy
        | Kind::CopyZero
        | Kind::CopyAck
        | Kind::Read
        | Kind::ReadReply
        | Kind::MarksPage
        | Kind::MarksEnd
        | Kind::MarksAck
        | Kind::SyncDone
        | Kind::SyncAck
        | Kind::Heartbeat
        | Kind::Control
        | Kind::Greeting
        | Kind::Proof
        | Kind::LinkHello
        | Kind::LinkWelcome
        | Kind::LinkRefusal) => return Err(FrameError::Unexpected { kind, place: "as a word of the link" }),
    };
    if link_fields(&word) != *fields || header.routing.sequence != 0 {
        return Err(FrameError::Malformed { kind, what: "a field this kind does not use is not 0" });
    }
    Ok(word)
}

fn session_close(body: &[u8]) -> Result<LinkWord, FrameError> {
    let malformed = |what| FrameError::Malformed { kind: Kind::SessionClose, what };
    let (session, reason) = body.split_first_chunk().ok_or(malformed("no session"))?;
    let reason = str::from_utf8(reason).map_err(|_| malformed("the reason is not UTF-8"))?;
    Ok(LinkWord::SessionClose {
        session: SessionId(u128::from_le_bytes(*session)),
        reason: reason.to_owned(),
    })
}

/// The word of a control connection's header and its checked body.
pub fn decode_control(header: &Header, body: &[u8]) -> Result<ControlWord, FrameError> {
    let kind = header.fields.kind;
    if header.routing.channel != Channel::Control {
        return Err(FrameError::Unexpected { kind, place: "on the control connection: it names a volume" });
    }
    if kind == Kind::Heartbeat {
        return heartbeat(header, body).map(ControlWord::Message);
    }
    if kind != Kind::Control {
        return decode_link(header, body).map(ControlWord::Link);
    }
    if header.fields != Fields::of(Kind::Control) || header.routing.sequence == 0 {
        return Err(FrameError::Malformed { kind, what: "a field is not as this kind has it" });
    }
    let message: ControlMessage = serde_json::from_slice(body)
        .map_err(|_| FrameError::Malformed { kind, what: "not a control message of this version" })?;
    if matches!(message, ControlMessage::Heartbeat { .. }) {
        return Err(FrameError::Malformed { kind, what: "a heartbeat has its own frame" });
    }
    Ok(ControlWord::Message(message))
}

fn heartbeat(header: &Header, body: &[u8]) -> Result<ControlMessage, FrameError> {
    let (kind, fields) = (Kind::Heartbeat, &header.fields);
    let malformed = |what| FrameError::Malformed { kind, what };
    let name = str::from_utf8(body).map_err(|_| malformed("the holder's name is not UTF-8"))?;
    let has_holder = fields.flags & FLAG_HOLDER != 0;
    if has_holder == name.is_empty() || header.routing.sequence != 0 {
        return Err(malformed("holder and flags disagree, or it is numbered"));
    }
    let live = LIVE_STATES.get(fields.detail as usize).ok_or(malformed("unknown state"))?;
    let message = ControlMessage::Heartbeat {
        sent_ns: fields.aux,
        echo_ns: fields.offset,
        promising: fields.flags & FLAG_PROMISING != 0,
        live: *live,
        epoch: Epoch { number: fields.length, holder: has_holder.then(|| ServerName(name.to_owned())) },
    };
    if heartbeat_fields(&message) != *fields {
        return Err(malformed("a field this kind does not use is not 0"));
    }
    Ok(message)
}

/// Takes one whole frame of a control connection apart.
pub fn decode_control_frame(frame: &[u8]) -> Result<(Header, ControlWord), FrameError> {
    let (head, body) = split_head(frame)?;
    let header = Header::decode(head)?;
    header.check_body(body)?;
    Ok((header, decode_control(&header, body)?))
}
