//! Numbers and layouts of the NBD protocol: everything big-endian.

/// "NBDMAGIC", the server's first word.
pub const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// "IHAVEOPT": the server's second word, and the first of every option.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// First word of an option's reply.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// First word of a request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// First word of a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// First word of a structured reply's chunk.
pub const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// Length of a request's header.
pub const REQUEST_BYTES: usize = 28;
/// Length of a simple reply's header.
pub const SIMPLE_REPLY_BYTES: usize = 16;
/// Length of a chunk's header.
pub const CHUNK_BYTES: usize = 20;

/// Handshake flags of client and server.
pub mod handshake {
    /// Fixed newstyle negotiation.
    pub const FIXED_NEWSTYLE: u16 = 1;
    /// No 124 zero bytes after the answer to `EXPORT_NAME`.
    pub const NO_ZEROES: u16 = 2;
}

/// Options a client may send.
pub mod option {
    /// Go to transmission, no way to fail but to close.
    pub const EXPORT_NAME: u32 = 1;
    /// End of the negotiation.
    pub const ABORT: u32 = 2;
    /// Names of the exports.
    pub const LIST: u32 = 3;
    /// Begin TLS.
    pub const STARTTLS: u32 = 5;
    /// Describe an export.
    pub const INFO: u32 = 6;
    /// Describe an export and go to transmission.
    pub const GO: u32 = 7;
    /// Structured replies from now on.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// Which metadata contexts are there?
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Which metadata contexts block status reports.
    pub const SET_META_CONTEXT: u32 = 10;
}

/// Replies to options.
pub mod reply {
    /// Done.
    pub const ACK: u32 = 1;
    /// An export's name.
    pub const SERVER: u32 = 2;
    /// A piece of information about the export.
    pub const INFO: u32 = 3;
    /// A metadata context.
    pub const META_CONTEXT: u32 = 4;
    /// The option is not known.
    pub const ERR_UNSUP: u32 = 0x8000_0001;
    /// The option's data makes no sense.
    pub const ERR_INVALID: u32 = 0x8000_0003;
    /// No such export.
    pub const ERR_UNKNOWN: u32 = 0x8000_0006;
    /// The server does not serve now.
    pub const ERR_SHUTDOWN: u32 = 0x8000_0007;
    /// The option's data is too long.
    pub const ERR_TOO_BIG: u32 = 0x8000_0009;
}

/// Pieces of information about an export.
pub mod info {
    /// Size and transmission flags.
    pub const EXPORT: u16 = 0;
    /// The export's own name.
    pub const NAME: u16 = 1;
    /// Text for people.
    pub const DESCRIPTION: u16 = 2;
    /// Smallest, preferred and largest request.
    pub const BLOCK_SIZE: u16 = 3;
}

/// Transmission flags.
pub mod transmission {
    /// Always set.
    pub const HAS_FLAGS: u16 = 1 << 0;
    /// Writes are refused.
    pub const READ_ONLY: u16 = 1 << 1;
    /// FLUSH is known.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// FUA is known.
    pub const SEND_FUA: u16 = 1 << 3;
    /// TRIM is known.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// WRITE_ZEROES is known.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// DF is known (structured replies only).
    pub const SEND_DF: u16 = 1 << 7;
    /// A flush on one connection covers what completed on all.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    /// FAST_ZERO is known.
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
}

/// Request types.
pub mod command {
    /// Read.
    pub const READ: u16 = 0;
    /// Write; the payload follows the header.
    pub const WRITE: u16 = 1;
    /// No more requests.
    pub const DISC: u16 = 2;
    /// Everything completed is stable.
    pub const FLUSH: u16 = 3;
    /// The range is not needed.
    pub const TRIM: u16 = 4;
    /// The range reads as zeroes.
    pub const WRITE_ZEROES: u16 = 6;
    /// What is allocated?
    pub const BLOCK_STATUS: u16 = 7;
}

/// Request flags.
pub mod flag {
    /// Answer when stable.
    pub const FUA: u16 = 1 << 0;
    /// WRITE_ZEROES: keep the space allocated.
    pub const NO_HOLE: u16 = 1 << 1;
    /// READ: one chunk.
    pub const DF: u16 = 1 << 2;
    /// BLOCK_STATUS: one extent.
    pub const REQ_ONE: u16 = 1 << 3;
    /// WRITE_ZEROES: fail rather than be as slow as a write.
    pub const FAST_ZERO: u16 = 1 << 4;
}

/// Chunks of structured replies.
pub mod chunk {
    /// Flag: the reply's last chunk.
    pub const DONE: u16 = 1;
    /// A read's data at an offset.
    pub const OFFSET_DATA: u16 = 1;
    /// Extents of a metadata context.
    pub const BLOCK_STATUS: u16 = 5;
    /// An error with a text.
    pub const ERROR: u16 = 0x8001;
}

/// An error on the wire.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum WireError {
    /// The export is read-only.
    Perm = 1,
    /// Input/output error.
    Io = 5,
    /// No memory, or too much in flight.
    NoMem = 12,
    /// The request makes no sense.
    Inval = 22,
    /// A write past the end.
    NoSpc = 28,
    /// The request would be slow, or is not supported.
    NotSup = 95,
    /// The server does not serve the volume.
    Shutdown = 108,
}

/// A request's header as it came.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RequestHeader {
    /// See [`flag`].
    pub flags: u16,
    /// See [`command`].
    pub command: u16,
    /// Comes back in the reply.
    pub cookie: u64,
    /// First byte.
    pub offset_bytes: u64,
    /// Length of the range; of the payload, too, for a write.
    pub length_bytes: u32,
}

/// The stream is out of step: no request begins here.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("no NBD request begins with {found:#010x}; the connection is closed")]
pub struct BadMagic {
    /// What was there instead of the request's first word.
    pub found: u32,
}

/// Reads a request's header from the front of `input`; `None` while it is not all there.
pub fn parse_request(input: &[u8]) -> Result<Option<RequestHeader>, BadMagic> {
    let mut reader = Reader(input);
    if let Some(found) = reader.u32()
        && found != REQUEST_MAGIC
    {
        return Err(BadMagic { found });
    }
    let mut rest = || {
        Some(RequestHeader {
            flags: reader.u16()?,
            command: reader.u16()?,
            cookie: reader.u64()?,
            offset_bytes: reader.u64()?,
            length_bytes: reader.u32()?,
        })
    };
    Ok(rest())
}

/// Appends a simple reply; a read's data follows it.
pub fn put_simple_reply(out: &mut Vec<u8>, cookie: u64, error: Option<WireError>) {
    out.extend_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
    out.extend_from_slice(&error.map_or(0, |error| error as u32).to_be_bytes());
    out.extend_from_slice(&cookie.to_be_bytes());
}

/// Appends a chunk's header; `length_bytes` of payload follow it.
pub fn put_chunk(out: &mut Vec<u8>, kind: u16, flags: u16, cookie: u64, length_bytes: u32) {
    out.extend_from_slice(&CHUNK_MAGIC.to_be_bytes());
    out.extend_from_slice(&flags.to_be_bytes());
    out.extend_from_slice(&kind.to_be_bytes());
    out.extend_from_slice(&cookie.to_be_bytes());
    out.extend_from_slice(&length_bytes.to_be_bytes());
}

/// Appends the only chunk of a failed structured reply.
pub fn put_error_chunk(out: &mut Vec<u8>, cookie: u64, error: WireError) {
    put_chunk(out, chunk::ERROR, chunk::DONE, cookie, 6);
    out.extend_from_slice(&(error as u32).to_be_bytes());
    out.extend_from_slice(&0u16.to_be_bytes());
}

/// Appends what comes before a read's data in its only chunk.
pub fn put_data_chunk(out: &mut Vec<u8>, cookie: u64, offset_bytes: u64, data_bytes: u32) {
    put_chunk(out, chunk::OFFSET_DATA, chunk::DONE, cookie, data_bytes.saturating_add(8));
    out.extend_from_slice(&offset_bytes.to_be_bytes());
}

/// Appends a reply to an option.
pub fn put_option_reply(out: &mut Vec<u8>, option: u32, reply: u32, data: &[u8]) {
    out.extend_from_slice(&OPTION_REPLY_MAGIC.to_be_bytes());
    out.extend_from_slice(&option.to_be_bytes());
    out.extend_from_slice(&reply.to_be_bytes());
    // Our replies are bounded by the configuration's names and texts, far below 4 GiB.
    out.extend_from_slice(&(data.len() as u32).to_be_bytes());
    out.extend_from_slice(data);
}

/// Takes big-endian numbers off the front of bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reader<'a>(pub(super) &'a [u8]);

impl<'a> Reader<'a> {
    pub(super) fn bytes(&mut self, count: usize) -> Option<&'a [u8]> {
        let (front, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(front)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (front, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*front)
    }

    pub(super) fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    pub(super) fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    pub(super) fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn header_bytes(header: RequestHeader) -> Vec<u8> {
        let mut out = REQUEST_MAGIC.to_be_bytes().to_vec();
        out.extend_from_slice(&header.flags.to_be_bytes());
        out.extend_from_slice(&header.command.to_be_bytes());
        out.extend_from_slice(&header.cookie.to_be_bytes());
        out.extend_from_slice(&header.offset_bytes.to_be_bytes());
        out.extend_from_slice(&header.length_bytes.to_be_bytes());
        out
    }

    #[test]
    fn a_request_is_read_only_when_whole() {
        let header = RequestHeader {
            flags: flag::FUA,
            command: command::WRITE,
            cookie: 0x0102_0304_0506_0708,
            offset_bytes: 1 << 40,
            length_bytes: 4096,
        };
        let bytes = header_bytes(header);
        assert_eq!(bytes.len(), REQUEST_BYTES);
        for short in 0..REQUEST_BYTES {
            assert_eq!(parse_request(&bytes[..short]), Ok(None));
        }
        assert_eq!(parse_request(&bytes), Ok(Some(header)));
    }

    #[test]
    fn another_magic_is_out_of_step() {
        assert_eq!(parse_request(&[0; 28]), Err(BadMagic { found: 0 }));
        assert_eq!(parse_request(b"GET / HTTP/1.1"), Err(BadMagic { found: 0x4745_5420 }));
    }

    #[test]
    fn replies_have_the_lengths_their_headers_say() {
        let mut out = Vec::new();
        put_simple_reply(&mut out, 7, Some(WireError::NoSpc));
        assert_eq!(out.len(), SIMPLE_REPLY_BYTES);
        assert_eq!(&out[..8], &[0x67, 0x44, 0x66, 0x98, 0, 0, 0, 28]);
        out.clear();
        put_error_chunk(&mut out, 7, WireError::Io);
        assert_eq!(out.len(), CHUNK_BYTES + 6);
        assert_eq!(&out[16..20], &[0, 0, 0, 6]);
        out.clear();
        put_data_chunk(&mut out, 7, 4096, 512);
        assert_eq!(out.len(), CHUNK_BYTES + 8);
        assert_eq!(&out[16..20], &[0, 0, 2, 8]);
    }

    proptest! {
        #[test]
        fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = parse_request(&bytes);
        }

        #[test]
        fn what_is_written_is_read(flags: u16, command: u16, cookie: u64, offset_bytes: u64, length_bytes: u32) {
            let header = RequestHeader { flags, command, cookie, offset_bytes, length_bytes };
            prop_assert_eq!(parse_request(&header_bytes(header)), Ok(Some(header)));
        }
    }
}
