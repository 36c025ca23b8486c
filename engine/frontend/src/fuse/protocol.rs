//! The FUSE wire protocol as far as one file needs it: pure functions over bytes, no descriptor in sight.
//!
//! Only the kernel speaks on the other side, so numbers are in the machine's own byte order.

use duplex_core::ids::ByteRange;

/// Bytes of the header vector of every read: the 40-byte request header and a READ's or WRITE's 40-byte argument.
/// A WRITE's payload therefore begins exactly at the second vector, aligned as that is.
pub const HEADER_BYTES: usize = 80;
/// Bytes of the kernel's request header.
const IN_HEADER_BYTES: usize = 40;
/// Bytes of the header of an answer.
pub const OUT_HEADER_BYTES: usize = 16;
/// The longest answer without data: an attribute answer.
pub const REPLY_MAX_BYTES: usize = OUT_HEADER_BYTES + 104;
/// Largest payload of one READ or WRITE, and the size of a receive buffer.
pub const PAYLOAD_MAX_BYTES: u32 = 1 << 20;
/// Pages of the largest payload.
const PAYLOAD_MAX_PAGES: u16 = 256;
/// Asynchronous requests (all of the loop device's reads and writes) the kernel gives us at once.
pub const BACKGROUND_MAX: u16 = 112;
/// The newest minor version of protocol 7 whose structures we know.
const MINOR_MAX: u32 = 45;
/// The oldest minor version that sends the 64-byte INIT structures: Linux 4.20 and newer.
const MINOR_MIN: u32 = 28;

const FUSE_ASYNC_READ: u64 = 1 << 0;
const FUSE_BIG_WRITES: u64 = 1 << 5;
const FUSE_ASYNC_DIO: u64 = 1 << 15;
const FUSE_MAX_PAGES: u64 = 1 << 22;
const FUSE_INIT_EXT: u64 = 1 << 30;
const FUSE_HAS_RESEND: u64 = 1 << 39;

/// A request the kernel sends again after a takeover carries this bit; the answer must carry it too.
pub const UNIQUE_RESEND: u64 = 1 << 63;
const NOTIFY_RESEND: i32 = 7;
const FATTR_SIZE: u32 = 1 << 3;
const FOPEN_DIRECT_IO: u32 = 1;
const FOPEN_PARALLEL_DIRECT_WRITES: u32 = 1 << 6;

const FALLOC_KEEP_SIZE: u32 = 0x01;
const FALLOC_PUNCH_HOLE: u32 = 0x02;
const FALLOC_ZERO_RANGE: u32 = 0x10;

/// What the kernel asks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Operation {
    /// A name in a directory: there is no directory.
    Lookup,
    /// Forget an inode; never answered.
    Forget,
    /// The file's attributes.
    GetAttr,
    /// Change attributes.
    SetAttr {
        /// The new size, where it is to change.
        size_bytes: Option<u64>,
    },
    /// Open the file.
    Open,
    /// Read.
    Read(ByteRange),
    /// Write; the payload lies in the second vector.
    Write(ByteRange),
    /// Size of the file system.
    StatFs,
    /// The last descriptor of an open was closed.
    Release,
    /// Make everything stable.
    Fsync,
    /// A descriptor was closed: nothing to do.
    Flush,
    /// Agree on version and features.
    Init(InitRequest),
    /// The caller of another request got a signal; never answered.
    Interrupt,
    /// The file system goes away.
    Destroy,
    /// Make a range read as zeroes.
    Zero {
        /// The range.
        range: ByteRange,
        /// True for a punched hole (a discard), false for a zero range.
        may_unmap: bool,
    },
    /// An FALLOCATE mode we do not do. Answered with EOPNOTSUPP, never with ENOSYS: after that
    /// the kernel would not ask again and report success.
    OtherFallocate,
    /// Anything else.
    Other {
        /// Its number in the kernel's header.
        opcode: u32,
    },
}

/// What the kernel offers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct InitRequest {
    /// Protocol version.
    pub major: u32,
    /// Its revision.
    pub minor: u32,
    /// Largest read-ahead.
    pub max_readahead_bytes: u32,
    /// Features, both words.
    pub flags: u64,
}

/// One request as read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Message {
    /// The kernel's number for it, with [`UNIQUE_RESEND`] as sent.
    pub unique: u64,
    /// What it asks.
    pub operation: Operation,
}

impl Message {
    /// True when an earlier process may have begun (or done) it.
    pub const fn is_resent(&self) -> bool {
        self.unique & UNIQUE_RESEND != 0
    }
}

/// A request that does not hold together. The kernel does not send such.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ParseError {
    /// Not even a header: it cannot be answered.
    #[error(
        "the FUSE device gave {received_bytes} bytes, a request has at least {IN_HEADER_BYTES}; update the kernel or report this"
    )]
    NoHeader {
        /// What came.
        received_bytes: usize,
    },
    /// Answered with EIO.
    #[error(
        "FUSE request {unique} (operation {opcode}) says {said_bytes} bytes but has {received_bytes}; update the kernel or report this"
    )]
    Length {
        /// The kernel's number for it.
        unique: u64,
        /// Its operation.
        opcode: u32,
        /// In its header, or what its argument needs.
        said_bytes: usize,
        /// What came.
        received_bytes: usize,
    },
}

/// Why INIT failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum InitError {
    /// Too old or too new.
    #[error(
        "the kernel speaks FUSE {major}.{minor}, this program 7.{MINOR_MIN} to 7.x: use Linux 4.20 or newer, or NBD"
    )]
    Version {
        /// Protocol version.
        major: u32,
        /// Its revision.
        minor: u32,
    },
    /// A feature without which the loop device would crawl.
    #[error(
        "the kernel's FUSE ({flags:#x}) lacks asynchronous direct I/O or large requests: use Linux 4.20 or newer, or NBD"
    )]
    Feature {
        /// What it offered.
        flags: u64,
    },
}

/// What was agreed on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Agreed {
    /// Revision of protocol 7.
    pub minor: u32,
    /// Pending requests can be sent again to a successor (Linux 6.9): without it a restarted daemon
    /// leaves the requests of its predecessor unanswered.
    pub resend: bool,
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_ne_bytes(word)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_ne_bytes(word)
}

/// Reads a request. `header` holds its first [`HEADER_BYTES`]; what is longer lies in the second vector.
///
/// # Errors
/// [`ParseError`]: lengths that contradict each other.
pub fn parse(header: &[u8; HEADER_BYTES], received_bytes: usize) -> Result<Message, ParseError> {
    if received_bytes < IN_HEADER_BYTES {
        return Err(ParseError::NoHeader { received_bytes });
    }
    let said_bytes = u32_at(header, 0) as usize;
    let opcode = u32_at(header, 4);
    let unique = u64_at(header, 8);
    let length_error = |said_bytes| ParseError::Length { unique, opcode, said_bytes, received_bytes };
    let needs_bytes = IN_HEADER_BYTES + argument_bytes(opcode);
    if said_bytes != received_bytes {
        return Err(length_error(said_bytes));
    }
    if received_bytes < needs_bytes {
        return Err(length_error(needs_bytes));
    }
    let argument = &header[IN_HEADER_BYTES..];
    let operation = parse_operation(opcode, argument);
    if let Operation::Write(range) = operation {
        let whole_bytes = HEADER_BYTES as u64 + range.length_bytes;
        if whole_bytes != received_bytes as u64 {
            return Err(length_error(usize::try_from(whole_bytes).unwrap_or(usize::MAX)));
        }
    }
    Ok(Message { unique, operation })
}

/// Bytes of the argument this program looks at, per operation.
const fn argument_bytes(opcode: u32) -> usize {
    match opcode {
        4 => 24,       // SETATTR: valid, handle, size
        15 | 16 => 40, // READ, WRITE
        26 => 20,      // INIT: up to the second word of flags where there is one
        43 => 32,      // FALLOCATE
        _ => 0,
    }
}

fn parse_operation(opcode: u32, argument: &[u8]) -> Operation {
    match opcode {
        1 => Operation::Lookup,
        2 | 42 => Operation::Forget,
        3 => Operation::GetAttr,
        4 => {
            let changes_size = u32_at(argument, 0) & FATTR_SIZE != 0;
            Operation::SetAttr { size_bytes: changes_size.then(|| u64_at(argument, 16)) }
        }
        14 => Operation::Open,
        15 => Operation::Read(transfer_range(argument)),
        16 => Operation::Write(transfer_range(argument)),
        17 => Operation::StatFs,
        18 => Operation::Release,
        20 => Operation::Fsync,
        25 => Operation::Flush,
        26 => Operation::Init(parse_init(argument)),
        36 => Operation::Interrupt,
        38 => Operation::Destroy,
        43 => {
            let range = ByteRange::new(u64_at(argument, 8), u64_at(argument, 16));
            match u32_at(argument, 24) & !FALLOC_KEEP_SIZE {
                FALLOC_PUNCH_HOLE => Operation::Zero { range, may_unmap: true },
                FALLOC_ZERO_RANGE => Operation::Zero { range, may_unmap: false },
                _ => Operation::OtherFallocate,
            }
        }
        _ => Operation::Other { opcode },
    }
}

fn transfer_range(argument: &[u8]) -> ByteRange {
    ByteRange::new(u64_at(argument, 8), u64::from(u32_at(argument, 16)))
}

fn parse_init(argument: &[u8]) -> InitRequest {
    let low = u32_at(argument, 12);
    let high = if u64::from(low) & FUSE_INIT_EXT != 0 { u32_at(argument, 16) } else { 0 };
    InitRequest {
        major: u32_at(argument, 0),
        minor: u32_at(argument, 4),
        max_readahead_bytes: u32_at(argument, 8),
        flags: u64::from(low) | u64::from(high) << 32,
    }
}

/// An answer without data, built in place: no allocation.
#[derive(Clone, Copy, Debug)]
pub struct Reply {
    bytes: [u8; REPLY_MAX_BYTES],
    used_bytes: usize,
}

impl Reply {
    /// Nothing yet.
    pub const EMPTY: Self = Self { bytes: [0; REPLY_MAX_BYTES], used_bytes: 0 };

    fn new(unique: u64, errno: i32, body_bytes: usize, data_bytes: usize) -> Self {
        let mut reply = Self { bytes: [0; REPLY_MAX_BYTES], used_bytes: OUT_HEADER_BYTES + body_bytes };
        reply.put_u32(0, (reply.used_bytes + data_bytes) as u32);
        reply.put_u32(4, (-errno) as u32);
        reply.put_u64(8, unique);
        reply
    }

    fn put_u16(&mut self, at: usize, value: u16) {
        self.bytes[at..at + 2].copy_from_slice(&value.to_ne_bytes());
    }

    fn put_u32(&mut self, at: usize, value: u32) {
        self.bytes[at..at + 4].copy_from_slice(&value.to_ne_bytes());
    }

    fn put_u64(&mut self, at: usize, value: u64) {
        self.bytes[at..at + 8].copy_from_slice(&value.to_ne_bytes());
    }

    /// What to write to the device, in front of a READ's data.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.used_bytes]
    }

    /// Done, with nothing to say.
    pub fn done(unique: u64) -> Self {
        Self::new(unique, 0, 0, 0)
    }

    /// Failed with a (positive) errno.
    pub fn failed(unique: u64, errno: i32) -> Self {
        Self::new(unique, errno, 0, 0)
    }

    /// The header before a READ's data.
    pub fn data(unique: u64, data_bytes: usize) -> Self {
        Self::new(unique, 0, 0, data_bytes)
    }

    /// A WRITE's answer.
    pub fn written(unique: u64, written_bytes: u32) -> Self {
        let mut reply = Self::new(unique, 0, 8, 0);
        reply.put_u32(16, written_bytes);
        reply
    }

    /// The file's attributes: a regular file of `size_bytes`, valid for ever, so that the kernel never has to ask
    /// while nobody answers.
    pub fn attributes(unique: u64, size_bytes: u64, block_bytes: u32) -> Self {
        let mut reply = Self::new(unique, 0, 104, 0);
        reply.put_u64(16, u64::from(u32::MAX)); // valid, in seconds
        let attributes = 32;
        reply.put_u64(attributes, 1); // inode
        reply.put_u64(attributes + 8, size_bytes);
        reply.put_u64(attributes + 16, size_bytes / 512);
        reply.put_u32(attributes + 60, libc::S_IFREG | 0o600);
        reply.put_u32(attributes + 64, 1); // links
        reply.put_u32(attributes + 80, block_bytes);
        reply
    }

    /// An OPEN's answer: no page cache of FUSE under the loop device.
    pub fn opened(unique: u64) -> Self {
        let mut reply = Self::new(unique, 0, 16, 0);
        reply.put_u32(24, FOPEN_DIRECT_IO | FOPEN_PARALLEL_DIRECT_WRITES);
        reply
    }

    /// A STATFS's answer: one file that fills everything.
    pub fn file_system(unique: u64, size_bytes: u64, block_bytes: u32) -> Self {
        let mut reply = Self::new(unique, 0, 80, 0);
        reply.put_u64(16, size_bytes / u64::from(block_bytes.max(1)));
        reply.put_u64(16 + 24, 1); // files
        reply.put_u32(16 + 40, block_bytes);
        reply.put_u32(16 + 44, 255); // longest name
        reply.put_u32(16 + 48, block_bytes);
        reply
    }
}

/// Answers INIT.
///
/// # Errors
/// [`InitError`]: the kernel cannot do what a mirror needs.
pub fn negotiate(unique: u64, offer: &InitRequest) -> Result<(Reply, Agreed), InitError> {
    if offer.major != 7 || offer.minor < MINOR_MIN {
        return Err(InitError::Version { major: offer.major, minor: offer.minor });
    }
    let needed = FUSE_ASYNC_READ | FUSE_BIG_WRITES | FUSE_ASYNC_DIO | FUSE_MAX_PAGES;
    if offer.flags & needed != needed {
        return Err(InitError::Feature { flags: offer.flags });
    }
    let flags = offer.flags & (needed | FUSE_INIT_EXT | FUSE_HAS_RESEND);
    let minor = offer.minor.min(MINOR_MAX);
    let mut reply = Reply::new(unique, 0, 64, 0);
    reply.put_u32(16, 7);
    reply.put_u32(20, minor);
    reply.put_u32(24, offer.max_readahead_bytes);
    reply.put_u32(28, flags as u32);
    reply.put_u16(32, BACKGROUND_MAX);
    reply.put_u16(34, BACKGROUND_MAX); // never called congested
    reply.put_u32(36, PAYLOAD_MAX_BYTES);
    reply.put_u32(40, 1); // time granularity
    reply.put_u16(44, PAYLOAD_MAX_PAGES);
    reply.put_u32(48, (flags >> 32) as u32);
    Ok((reply, Agreed { minor, resend: flags & FUSE_HAS_RESEND != 0 }))
}

/// The notice that makes the kernel send every pending request again.
pub fn resend_notice() -> [u8; OUT_HEADER_BYTES] {
    let mut bytes = [0; OUT_HEADER_BYTES];
    bytes[..4].copy_from_slice(&(OUT_HEADER_BYTES as u32).to_ne_bytes());
    bytes[4..8].copy_from_slice(&NOTIFY_RESEND.to_ne_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(
        opcode: u32,
        unique: u64,
        argument: &[u8],
        payload_bytes: usize,
    ) -> ([u8; HEADER_BYTES], usize) {
        let mut header = [0; HEADER_BYTES];
        let whole = IN_HEADER_BYTES + argument.len() + payload_bytes;
        header[..4].copy_from_slice(&(whole as u32).to_ne_bytes());
        header[4..8].copy_from_slice(&opcode.to_ne_bytes());
        header[8..16].copy_from_slice(&unique.to_ne_bytes());
        let fits = argument.len().min(40);
        header[40..40 + fits].copy_from_slice(&argument[..fits]);
        (header, whole)
    }

    fn transfer(offset_bytes: u64, length_bytes: u32) -> [u8; 40] {
        let mut argument = [0; 40];
        argument[8..16].copy_from_slice(&offset_bytes.to_ne_bytes());
        argument[16..20].copy_from_slice(&length_bytes.to_ne_bytes());
        argument
    }

    fn fallocate(offset_bytes: u64, length_bytes: u64, mode: u32) -> [u8; 32] {
        let mut argument = [0; 32];
        argument[8..16].copy_from_slice(&offset_bytes.to_ne_bytes());
        argument[16..24].copy_from_slice(&length_bytes.to_ne_bytes());
        argument[24..28].copy_from_slice(&mode.to_ne_bytes());
        argument
    }

    #[test]
    fn a_write_is_parsed_with_its_payload_behind_the_header_vector() {
        let (header, whole) = request(16, 7 | UNIQUE_RESEND, &transfer(8192, 4096), 4096);
        let message = parse(&header, whole).expect("a sound write");
        assert!(message.is_resent());
        assert_eq!(message.unique, 7 | UNIQUE_RESEND);
        assert_eq!(message.operation, Operation::Write(ByteRange::new(8192, 4096)));
        assert_eq!(whole, HEADER_BYTES + 4096);
    }

    #[test]
    fn a_write_whose_payload_is_short_is_refused() {
        let (header, whole) = request(16, 7, &transfer(8192, 4096), 4095);
        let error = parse(&header, whole).expect_err("one byte is missing");
        assert_eq!(
            error,
            ParseError::Length {
                unique: 7,
                opcode: 16,
                said_bytes: HEADER_BYTES + 4096,
                received_bytes: whole
            }
        );
    }

    #[test]
    fn truncated_requests_are_refused_and_never_panic() {
        for opcode in 0..60 {
            let (header, whole) = request(opcode, 9, &[0; 40], 0);
            for received in 0..whole {
                assert!(parse(&header, received).is_err(), "operation {opcode} cut at {received}");
            }
        }
    }

    #[test]
    fn fallocate_modes() {
        let range = ByteRange::new(4096, 1 << 32);
        for (mode, expected) in [
            (0x3, Operation::Zero { range, may_unmap: true }),
            (0x2, Operation::Zero { range, may_unmap: true }),
            (0x11, Operation::Zero { range, may_unmap: false }),
            (0x10, Operation::Zero { range, may_unmap: false }),
            (0x0, Operation::OtherFallocate),
            (0x1, Operation::OtherFallocate),
            (0x8, Operation::OtherFallocate),
            (0x13, Operation::OtherFallocate),
        ] {
            let (header, whole) = request(43, 1, &fallocate(4096, 1 << 32, mode), 0);
            assert_eq!(parse(&header, whole).expect("sound").operation, expected, "mode {mode:#x}");
        }
    }

    #[test]
    fn setattr_tells_a_size_change_from_others() {
        let mut argument = [0; 88];
        argument[16..24].copy_from_slice(&77_u64.to_ne_bytes());
        let (header, whole) = request(4, 1, &argument, 0);
        assert_eq!(parse(&header, whole).expect("sound").operation, Operation::SetAttr { size_bytes: None });
        argument[..4].copy_from_slice(&FATTR_SIZE.to_ne_bytes());
        let (header, whole) = request(4, 1, &argument, 0);
        assert_eq!(
            parse(&header, whole).expect("sound").operation,
            Operation::SetAttr { size_bytes: Some(77) }
        );
    }

    fn offer(minor: u32, flags: u64) -> InitRequest {
        InitRequest { major: 7, minor, max_readahead_bytes: 1 << 17, flags }
    }

    #[test]
    fn init_takes_async_dio_and_one_mebibyte_and_leaves_the_rest() {
        let (reply, agreed) = negotiate(5, &offer(45, u64::MAX >> 1)).expect("a new kernel");
        assert_eq!(agreed, Agreed { minor: 45, resend: true });
        let bytes = reply.as_bytes();
        assert_eq!(bytes.len(), 80);
        assert_eq!(u64_at(bytes, 8), 5);
        let flags = u64::from(u32_at(bytes, 28)) | u64::from(u32_at(bytes, 48)) << 32;
        assert_eq!(
            flags,
            FUSE_ASYNC_READ
                | FUSE_BIG_WRITES
                | FUSE_ASYNC_DIO
                | FUSE_MAX_PAGES
                | FUSE_INIT_EXT
                | FUSE_HAS_RESEND
        );
        assert_eq!(u32_at(bytes, 36), 1 << 20);
        assert_eq!(u32_at(bytes, 44) & 0xffff, 256);
    }

    #[test]
    fn init_without_resend_says_so_and_without_async_dio_is_refused() {
        let old = FUSE_ASYNC_READ | FUSE_BIG_WRITES | FUSE_ASYNC_DIO | FUSE_MAX_PAGES;
        assert_eq!(
            negotiate(1, &offer(31, old)).expect("good enough").1,
            Agreed { minor: 31, resend: false }
        );
        let flags = old & !FUSE_ASYNC_DIO;
        assert_eq!(negotiate(1, &offer(45, flags)).expect_err("too slow"), InitError::Feature { flags });
        assert_eq!(
            negotiate(1, &offer(20, old)).expect_err("too old"),
            InitError::Version { major: 7, minor: 20 }
        );
    }

    #[test]
    fn init_reads_the_second_word_of_flags_only_where_there_is_one() {
        let mut argument = [0; 64];
        argument[0] = 7;
        argument[4] = 45;
        argument[12..16].copy_from_slice(&(FUSE_INIT_EXT as u32).to_ne_bytes());
        argument[16..20].copy_from_slice(&(1_u32 << 7).to_ne_bytes());
        let (header, whole) = request(26, 1, &argument, 0);
        let Operation::Init(init) = parse(&header, whole).expect("sound").operation else {
            panic!("not INIT")
        };
        assert_eq!(init.flags, FUSE_INIT_EXT | FUSE_HAS_RESEND);
        argument[12..16].fill(0);
        let (header, whole) = request(26, 1, &argument, 0);
        let Operation::Init(init) = parse(&header, whole).expect("sound").operation else {
            panic!("not INIT")
        };
        assert_eq!(init.flags, 0);
    }

    #[test]
    fn answers_have_the_kernel_s_layout() {
        let failed = Reply::failed(3, libc::EIO);
        assert_eq!(failed.as_bytes().len(), 16);
        assert_eq!(u32_at(failed.as_bytes(), 0), 16);
        assert_eq!(u32_at(failed.as_bytes(), 4) as i32, -libc::EIO);
        let data = Reply::data(3, 4096);
        assert_eq!(data.as_bytes().len(), 16);
        assert_eq!(u32_at(data.as_bytes(), 0), 16 + 4096);
        let attributes = Reply::attributes(3, 1 << 30, 4096);
        assert_eq!(attributes.as_bytes().len(), 120);
        assert_eq!(u64_at(attributes.as_bytes(), 16 + 16 + 8), 1 << 30);
        assert_eq!(u32_at(attributes.as_bytes(), 16 + 16 + 60), 0o100_600);
        assert_eq!(u32_at(Reply::opened(3).as_bytes(), 24), 65);
        assert_eq!(u32_at(Reply::written(3, 512).as_bytes(), 16), 512);
        assert_eq!(u64_at(Reply::file_system(3, 1 << 30, 4096).as_bytes(), 16), 1 << 18);
        let notice = resend_notice();
        assert_eq!((u32_at(&notice, 0), u32_at(&notice, 4), u64_at(&notice, 8)), (16, 7, 0));
    }
}
