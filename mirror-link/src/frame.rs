//! The fixed header of every frame, its limits and its errors.

use duplex_core::ids::VolumeIndex;

/// Bytes of the header of every frame.
pub const HEAD_BYTES: usize = 64;
/// First bytes of every frame, before the version byte.
pub const MAGIC: [u8; 3] = *b"DXL";
/// Largest payload of one frame: one client request (`limits::REQUEST_MAX_BYTES`).
pub const PAYLOAD_MAX_BYTES: u32 = 1 << 20;
/// Largest control word.
pub const CONTROL_MAX_BYTES: u32 = 1 << 20;
/// Largest body of a frame that is neither payload nor control word: a page of marks.
pub const INLINE_MAX_BYTES: u32 = 4096;
/// Largest frame on the wire, header included.
pub const FRAME_MAX_BYTES: u32 = HEAD_BYTES as u32 + PAYLOAD_MAX_BYTES;

/// One version of the wire protocol.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct WireVersion {
    /// The byte in every header and the number in the handshake.
    pub number: u8,
    /// Can this program speak it?
    pub spoken: bool,
    /// What it brought.
    pub brought: &'static str,
}

/// Every version there ever was, oldest first.
pub const VERSIONS: &[WireVersion] =
    &[WireVersion { number: 1, spoken: true, brought: "frames of 64 bytes, CRC-32 of header and body" }];

/// The newest version spoken here.
pub const VERSION: u8 = 1;

/// Lowest and highest version this program can speak.
pub fn spoken_versions() -> (u8, u8) {
    let spoken = || VERSIONS.iter().filter(|version| version.spoken).map(|version| version.number);
    (spoken().min().unwrap_or(VERSION), spoken().max().unwrap_or(VERSION))
}

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident = $number:literal, $limit:expr;)*) => {
        /// What a frame is. The number is the byte on the wire.
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
        #[repr(u8)]
        pub enum Kind {
            $($(#[$doc])* $name = $number,)*
        }

        impl Kind {
            /// Every kind of this version.
            pub const ALL: &'static [Self] = &[$(Self::$name),*];

            /// The kind of a byte; `None` for a byte this version does not know.
            pub const fn from_byte(byte: u8) -> Option<Self> {
                match byte {
                    $($number => Some(Self::$name),)*
                    _ => None,
                }
            }

            /// Most bytes that may follow the header, checked before anything is allocated.
            pub const fn body_limit_bytes(self) -> u32 {
                match self {
                    $(Self::$name => $limit,)*
                }
            }
        }
    };
}

kinds! {
    /// `VolumeMessage::Write`; the body is the payload.
    Write = 1, PAYLOAD_MAX_BYTES;
    /// `VolumeMessage::Zero`.
    Zero = 2, 0;
    /// `VolumeMessage::Ack`.
    Ack = 3, 0;
    /// `VolumeMessage::Flush`.
    Flush = 4, 0;
    /// `VolumeMessage::FlushAck`.
    FlushAck = 5, 0;
    /// `VolumeMessage::Copy`; the body is the payload.
    Copy = 6, PAYLOAD_MAX_BYTES;
    /// `VolumeMessage::CopyZero`.
    CopyZero = 7, 0;
    /// `VolumeMessage::CopyAck`.
    CopyAck = 8, 0;
    /// `VolumeMessage::Read`.
    Read = 9, 0;
    /// `VolumeMessage::ReadReply`; the body is the payload when the read was done.
    ReadReply = 10, PAYLOAD_MAX_BYTES;
    /// `VolumeMessage::MarksPage`; the body is the page.
    MarksPage = 11, INLINE_MAX_BYTES;
    /// `VolumeMessage::MarksEnd`.
    MarksEnd = 12, 0;
    /// `VolumeMessage::MarksAck`.
    MarksAck = 13, 0;
    /// `VolumeMessage::SyncDone`; the body is the generations.
    SyncDone = 14, INLINE_MAX_BYTES;
    /// `VolumeMessage::SyncAck`.
    SyncAck = 15, 0;
    /// `ControlMessage::Heartbeat`; the body is the holder's name.
    Heartbeat = 32, NAME_MAX_BYTES;
    /// Any other `ControlMessage`, as JSON.
    Control = 33, CONTROL_MAX_BYTES;
    /// Only the cumulative acknowledgement of the header.
    LinkAck = 48, 0;
    /// Are you there? The control connection of every path.
    Probe = 49, 0;
    /// Yes.
    ProbeReply = 50, 0;
    /// First frame on a connection of a session: where the sender's receiving side stands.
    Resume = 51, 16;
    /// The dialling server proposes a session.
    SessionOpen = 52, 16;
    /// The other agrees: both numbers make the session's identity.
    SessionOpened = 53, 16;
    /// A session is over, and why.
    SessionClose = 54, 1024;
    /// Handshake: nonce, role and name.
    Greeting = 64, 256;
    /// Handshake: proof of the shared secret.
    Proof = 65, 96;
    /// Handshake: the facts both must agree on, as JSON.
    LinkHello = 66, INLINE_MAX_BYTES;
    /// Handshake: accepted, with the other side's facts, as JSON.
    LinkWelcome = 67, INLINE_MAX_BYTES;
    /// Handshake: refused, with a code and both values, as JSON.
    LinkRefusal = 68, INLINE_MAX_BYTES;
}

/// Longest server name on the wire.
pub const NAME_MAX_BYTES: u32 = 64;

/// Which channel of a session a frame belongs to.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Channel {
    /// The control channel.
    Control,
    /// A volume's data channel.
    Volume(VolumeIndex),
}

impl Channel {
    const CONTROL: u16 = u16::MAX;

    /// The number on the wire: the volume's position, or 65535 for the control channel.
    pub const fn number(self) -> u16 {
        match self {
            Self::Control => Self::CONTROL,
            Self::Volume(VolumeIndex(index)) => index,
        }
    }

    /// The channel of a number.
    pub const fn from_number(number: u16) -> Self {
        match number {
            Self::CONTROL => Self::Control,
            index => Self::Volume(VolumeIndex(index)),
        }
    }
}

/// Where a frame goes and where it stands in its channel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Routing {
    /// The channel.
    pub channel: Channel,
    /// Number of the frame in its channel, from 1; 0 = not numbered, never sent again.
    pub sequence: u64,
    /// Every frame of the other direction up to this one was received.
    pub ack: u64,
}

/// The fields whose meaning depends on the kind. Unused ones are 0, and must be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fields {
    /// What the frame is.
    pub kind: Kind,
    /// Bits, by kind.
    pub flags: u8,
    /// A sequence, an id or a time, by kind.
    pub aux: u64,
    /// An offset, or another number, by kind.
    pub offset: u64,
    /// A length, or another number, by kind.
    pub length: u64,
    /// An errno, or another small number, by kind.
    pub detail: u32,
}

impl Fields {
    /// Fields of a kind, all zero.
    pub const fn of(kind: Kind) -> Self {
        Self { kind, flags: 0, aux: 0, offset: 0, length: 0, detail: 0 }
    }
}

/// A frame's header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    /// Channel, number and acknowledgement.
    pub routing: Routing,
    /// The rest.
    pub fields: Fields,
    /// Bytes that follow the header.
    pub body_bytes: u32,
    /// CRC-32 of them; 0 when there are none.
    pub body_crc: u32,
}

/// The bytes of a header.
pub type Head = [u8; HEAD_BYTES];

/// CRC-32 (IEEE) of bytes; 0 for none.
pub fn crc(bytes: &[u8]) -> u32 {
    crc32fast::hash(bytes)
}

fn put<const N: usize>(head: &mut Head, at: usize, bytes: [u8; N]) {
    head[at..at + N].copy_from_slice(&bytes);
}

fn get<const N: usize>(head: &Head, at: usize) -> [u8; N] {
    let mut bytes = [0; N];
    bytes.copy_from_slice(&head[at..at + N]);
    bytes
}

impl Header {
    /// The header's 64 bytes, with their checksum.
    pub fn encode(&self) -> Head {
        let mut head = [0; HEAD_BYTES];
        put(&mut head, 0, MAGIC);
        head[3] = VERSION;
        head[4] = self.fields.kind as u8;
        head[5] = self.fields.flags;
        put(&mut head, 6, self.routing.channel.number().to_le_bytes());
        put(&mut head, 8, self.routing.sequence.to_le_bytes());
        put(&mut head, 16, self.routing.ack.to_le_bytes());
        put(&mut head, 24, self.fields.aux.to_le_bytes());
        put(&mut head, 32, self.fields.offset.to_le_bytes());
        put(&mut head, 40, self.fields.length.to_le_bytes());
        put(&mut head, 48, self.fields.detail.to_le_bytes());
        put(&mut head, 52, self.body_bytes.to_le_bytes());
        put(&mut head, 56, self.body_crc.to_le_bytes());
        seal(&mut head);
        head
    }

    /// Reads and checks 64 bytes: magic, checksum, version, kind and the kind's limit, in this order.
    /// Nothing was allocated yet.
    pub fn decode(head: &Head) -> Result<Self, FrameError> {
        if head[..3] != MAGIC {
            return Err(FrameError::Magic { found: get(head, 0) });
        }
        if u32::from_le_bytes(get(head, 60)) != crc(&head[..60]) {
            return Err(FrameError::HeadChecksum);
        }
        if head[3] != VERSION {
            return Err(FrameError::Version { theirs: head[3] });
        }
        let kind = Kind::from_byte(head[4]).ok_or(FrameError::Kind { found: head[4] })?;
        let body_bytes = u32::from_le_bytes(get(head, 52));
        let limit_bytes = kind.body_limit_bytes();
        if body_bytes > limit_bytes {
            return Err(FrameError::TooLong { kind, body_bytes, limit_bytes });
        }
        Ok(Self {
            routing: Routing {
                channel: Channel::from_number(u16::from_le_bytes(get(head, 6))),
                sequence: u64::from_le_bytes(get(head, 8)),
                ack: u64::from_le_bytes(get(head, 16)),
            },
            fields: Fields {
                kind,
                flags: head[5],
                aux: u64::from_le_bytes(get(head, 24)),
                offset: u64::from_le_bytes(get(head, 32)),
                length: u64::from_le_bytes(get(head, 40)),
                detail: u32::from_le_bytes(get(head, 48)),
            },
            body_bytes,
            body_crc: u32::from_le_bytes(get(head, 56)),
        })
    }

    /// Checks the body against the header.
    pub fn check_body(&self, body: &[u8]) -> Result<(), FrameError> {
        if body.len() as u64 != u64::from(self.body_bytes) || crc(body) != self.body_crc {
            return Err(FrameError::BodyChecksum { kind: self.fields.kind });
        }
        Ok(())
    }
}

fn seal(head: &mut Head) {
    let sum = crc(&head[..60]);
    put(head, 60, sum.to_le_bytes());
}

/// Renews the acknowledgement in an encoded header, just before it is sent (again).
pub fn restamp(head: &mut Head, ack: u64) {
    put(head, 16, ack.to_le_bytes());
    seal(head);
}

/// Why bytes are not a frame of this protocol. All of them end the connection they came on.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum FrameError {
    /// Not our protocol, or the stream lost its place.
    #[error(
        "frame does not begin with \"DXL\" but with bytes {found:02x?}: not a mirror link, or a damaged stream"
    )]
    Magic {
        /// What came.
        found: [u8; 3],
    },
    /// Altered on the way.
    #[error("frame header fails its checksum: altered on the way")]
    HeadChecksum,
    /// Another version.
    #[error("frame has version {theirs}, this program speaks {VERSION}: upgrade the older server")]
    Version {
        /// The peer's.
        theirs: u8,
    },
    /// A kind this version does not have.
    #[error("frame of unknown kind {found}: this version has no such frame")]
    Kind {
        /// What came.
        found: u8,
    },
    /// Beyond the limit.
    #[error("{kind:?} frame announces {body_bytes} bytes, the limit is {limit_bytes}")]
    TooLong {
        /// Of the frame.
        kind: Kind,
        /// Announced.
        body_bytes: u32,
        /// Allowed.
        limit_bytes: u32,
    },
    /// Altered on the way.
    #[error("{kind:?} frame's body fails its checksum: altered on the way")]
    BodyChecksum {
        /// Of the frame.
        kind: Kind,
    },
    /// Well transported, but no such message exists.
    #[error("{kind:?} frame is malformed: {what}")]
    Malformed {
        /// Of the frame.
        kind: Kind,
        /// What is wrong.
        what: &'static str,
    },
    /// Not here, or not now.
    #[error("{kind:?} frame is not allowed {place}")]
    Unexpected {
        /// Of the frame.
        kind: Kind,
        /// Where or when it came.
        place: &'static str,
    },
}

impl FrameError {
    /// The stable word for events and counters.
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Magic { .. } => "magic",
            Self::HeadChecksum => "header-checksum",
            Self::Version { .. } => "version",
            Self::Kind { .. } => "unknown-kind",
            Self::TooLong { .. } => "too-long",
            Self::BodyChecksum { .. } => "body-checksum",
            Self::Malformed { .. } => "malformed",
            Self::Unexpected { .. } => "unexpected",
        }
    }

    /// True when the bytes were altered on the way: the frame will be sent again on a new connection.
    pub const fn is_corruption(&self) -> bool {
        match self {
            Self::Magic { .. } | Self::HeadChecksum | Self::BodyChecksum { .. } => true,
            Self::Version { .. }
            | Self::Kind { .. }
            | Self::TooLong { .. }
            | Self::Malformed { .. }
            | Self::Unexpected { .. } => false,
        }
    }
}
