//! Fixed newstyle negotiation as a machine over bytes: no socket, no clock.

use super::wire::{self, Reader, handshake, info, option, put_option_reply, reply, transmission};

/// Longest option data that is looked at; longer data is skipped and refused.
pub const OPTION_MAX_BYTES: usize = 32 << 10;
/// Longest option data that is skipped; a longer option ends the connection.
const SKIP_MAX_BYTES: u64 = 4 << 20;
/// Longest export name, by the protocol.
const NAME_MAX_BYTES: usize = 4096;
/// Most metadata queries or information requests in one option.
const QUERIES_MAX: u32 = 256;
/// Most options of one negotiation: a client has no use for more.
const OPTIONS_MAX: u32 = 1024;
/// The only metadata context.
pub const BASE_ALLOCATION: &str = "base:allocation";
/// Number of `base:allocation` in replies to block status.
pub const BASE_ALLOCATION_ID: u32 = 1;
const OPTION_HEADER_BYTES: usize = 16;

/// What is offered: the same for every client.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Export {
    /// The volume's name.
    pub name: String,
    /// The empty name means this volume, too.
    pub is_default: bool,
    /// Size.
    pub size_bytes: u64,
    /// Smallest unit of a request.
    pub sector_bytes: u32,
    /// Preferred request size.
    pub preferred_bytes: u32,
    /// Largest payload.
    pub max_bytes: u32,
    /// Writes are refused.
    pub read_only: bool,
}

impl Export {
    fn is_called(&self, name: &[u8]) -> bool {
        name == self.name.as_bytes() || (self.is_default && name.is_empty())
    }

    /// The transmission flags a client is told.
    pub const fn transmission_flags(&self, structured: bool) -> u16 {
        let mut flags = transmission::HAS_FLAGS
            | transmission::SEND_FLUSH
            | transmission::SEND_FUA
            | transmission::CAN_MULTI_CONN;
        flags |= if self.read_only {
            transmission::READ_ONLY
        } else {
            transmission::SEND_TRIM | transmission::SEND_WRITE_ZEROES | transmission::SEND_FAST_ZERO
        };
        if structured {
            flags |= transmission::SEND_DF;
        }
        flags
    }
}

/// What client and server agreed on.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Agreed {
    /// Reads are answered with chunks.
    pub structured: bool,
    /// Block status of `base:allocation` may be asked for.
    pub allocation: bool,
}

/// Where the negotiation is after a step.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    /// More bytes are needed.
    More,
    /// The bytes after the consumed ones are requests.
    Transmission(Agreed),
    /// Send what is to be sent, then close.
    Close,
}

/// One client's negotiation.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Negotiation {
    flags_seen: bool,
    no_zeroes: bool,
    structured: bool,
    /// Name of the export for which `base:allocation` was chosen.
    allocation_of: Option<Vec<u8>>,
    /// Rest of an option that is too long.
    skip_bytes: u64,
    options: u32,
}

impl Negotiation {
    /// Begins a negotiation: appends the server's greeting to `out`.
    pub fn new(out: &mut Vec<u8>) -> Self {
        out.extend_from_slice(&wire::INIT_MAGIC.to_be_bytes());
        out.extend_from_slice(&wire::OPTION_MAGIC.to_be_bytes());
        out.extend_from_slice(&(handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES).to_be_bytes());
        Self {
            flags_seen: false,
            no_zeroes: false,
            structured: false,
            allocation_of: None,
            skip_bytes: 0,
            options: 0,
        }
    }

    /// Takes at most one piece (the client's flags, or an option) off the front of `input` and appends the answer to
    /// `out`. Returns how many bytes were taken; call again while bytes are taken and the step is [`Step::More`].
    /// `refusal` is the text for clients while the server does not serve.
    pub fn feed(
        &mut self,
        input: &[u8],
        export: &Export,
        refusal: Option<&str>,
        out: &mut Vec<u8>,
    ) -> (usize, Step) {
        if self.skip_bytes > 0 {
            let skipped = usize::try_from(self.skip_bytes).unwrap_or(usize::MAX).min(input.len());
            self.skip_bytes -= skipped as u64;
            return (skipped, Step::More);
        }
        let mut reader = Reader(input);
        if !self.flags_seen {
            let Some(flags) = reader.u32() else { return (0, Step::More) };
            return (4, self.client_flags(flags));
        }
        let header = (|| Some((reader.u64()?, reader.u32()?, reader.u32()?)))();
        let Some((magic, option, length_bytes)) = header else { return (0, Step::More) };
        if magic != wire::OPTION_MAGIC {
            return (0, Step::Close);
        }
        let length = length_bytes as usize;
        if length > OPTION_MAX_BYTES {
            return (OPTION_HEADER_BYTES, self.too_long(option, u64::from(length_bytes), out));
        }
        let Some(data) = reader.bytes(length) else { return (0, Step::More) };
        self.options += 1;
        if self.options > OPTIONS_MAX {
            return (0, Step::Close);
        }
        (OPTION_HEADER_BYTES + length, self.option(option, data, export, refusal, out))
    }

    fn client_flags(&mut self, flags: u32) -> Step {
        let known = u32::from(handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES);
        if flags & !known != 0 {
            return Step::Close;
        }
        self.flags_seen = true;
        self.no_zeroes = flags & u32::from(handshake::NO_ZEROES) != 0;
        Step::More
    }

    fn too_long(&mut self, option: u32, length_bytes: u64, out: &mut Vec<u8>) -> Step {
        if option == option::EXPORT_NAME || length_bytes > SKIP_MAX_BYTES {
            return Step::Close;
        }
        let text = format!("option data of {length_bytes} bytes is too long; at most {OPTION_MAX_BYTES}");
        put_option_reply(out, option, reply::ERR_TOO_BIG, text.as_bytes());
        self.skip_bytes = length_bytes;
        Step::More
    }

    fn option(
        &mut self,
        option: u32,
        data: &[u8],
        export: &Export,
        refusal: Option<&str>,
        out: &mut Vec<u8>,
    ) -> Step {
        match option {
            option::EXPORT_NAME => return self.export_name(data, export, refusal, out),
            option::ABORT => {
                put_option_reply(out, option, reply::ACK, &[]);
                return Step::Close;
            }
            option::LIST if data.is_empty() => list(export, out),
            option::STRUCTURED_REPLY if data.is_empty() => {
                self.structured = true;
                put_option_reply(out, option, reply::ACK, &[]);
            }
            option::LIST | option::STRUCTURED_REPLY => {
                refuse(out, option, reply::ERR_INVALID, "this option has no data");
            }
            option::INFO | option::GO => return self.describe(option, data, export, refusal, out),
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => self.contexts(option, data, export, out),
            option::STARTTLS => refuse(out, option, reply::ERR_UNSUP, "this export has no TLS"),
            unknown => {
                let text = format!("option {unknown} is not known here");
                refuse(out, option, reply::ERR_UNSUP, &text);
            }
        }
        Step::More
    }

    fn agreed(&self, name: &[u8]) -> Agreed {
        Agreed {
            structured: self.structured,
            allocation: self.allocation_of.as_deref().is_some_and(|chosen| chosen == name),
        }
    }

    fn export_name(&self, name: &[u8], export: &Export, refusal: Option<&str>, out: &mut Vec<u8>) -> Step {
        if refusal.is_some() || !export.is_called(name) {
            return Step::Close;
        }
        out.extend_from_slice(&export.size_bytes.to_be_bytes());
        out.extend_from_slice(&export.transmission_flags(self.structured).to_be_bytes());
        if !self.no_zeroes {
            out.extend_from_slice(&[0; 124]);
        }
        Step::Transmission(self.agreed(name))
    }

    fn describe(
        &self,
        option: u32,
        data: &[u8],
        export: &Export,
        refusal: Option<&str>,
        out: &mut Vec<u8>,
    ) -> Step {
        let Some((name, wanted)) = parse_describe(data) else {
            refuse(out, option, reply::ERR_INVALID, "the option's lengths do not fit together");
            return Step::More;
        };
        if !export.is_called(name) {
            refuse_unknown(out, option, name, export);
            return Step::More;
        }
        if let Some(text) = refusal {
            refuse(out, option, reply::ERR_SHUTDOWN, text);
            return Step::More;
        }
        let mut piece = info::EXPORT.to_be_bytes().to_vec();
        piece.extend_from_slice(&export.size_bytes.to_be_bytes());
        piece.extend_from_slice(&export.transmission_flags(self.structured).to_be_bytes());
        put_option_reply(out, option, reply::INFO, &piece);
        if wanted.name {
            put_option_reply(out, option, reply::INFO, &text_info(info::NAME, &export.name));
        }
        if wanted.description {
            let text = format!("Duplex volume {}", export.name);
            put_option_reply(out, option, reply::INFO, &text_info(info::DESCRIPTION, &text));
        }
        // Also to a client that did not ask: it may use it, and must not mind.
        let mut piece = info::BLOCK_SIZE.to_be_bytes().to_vec();
        for bytes in [export.sector_bytes, export.preferred_bytes, export.max_bytes] {
            piece.extend_from_slice(&bytes.to_be_bytes());
        }
        put_option_reply(out, option, reply::INFO, &piece);
        put_option_reply(out, option, reply::ACK, &[]);
        if option == option::GO { Step::Transmission(self.agreed(name)) } else { Step::More }
    }

    fn contexts(&mut self, option: u32, data: &[u8], export: &Export, out: &mut Vec<u8>) {
        let is_set = option == option::SET_META_CONTEXT;
        if is_set {
            self.allocation_of = None;
        }
        let Some((name, chosen)) = parse_contexts(data, is_set) else {
            refuse(out, option, reply::ERR_INVALID, "the option's lengths do not fit together");
            return;
        };
        if !self.structured {
            refuse(out, option, reply::ERR_INVALID, "metadata contexts need structured replies first");
            return;
        }
        if !export.is_called(name) {
            refuse_unknown(out, option, name, export);
            return;
        }
        if chosen {
            let mut piece = (if is_set { BASE_ALLOCATION_ID } else { 0 }).to_be_bytes().to_vec();
            piece.extend_from_slice(BASE_ALLOCATION.as_bytes());
            put_option_reply(out, option, reply::META_CONTEXT, &piece);
            if is_set {
                self.allocation_of = Some(name.to_vec());
            }
        }
        put_option_reply(out, option, reply::ACK, &[]);
    }
}

#[derive(Clone, Copy, Default)]
struct Wanted {
    name: bool,
    description: bool,
}

/// Export name and wanted information of an INFO or GO; `None` when the lengths do not fit together.
fn parse_describe(data: &[u8]) -> Option<(&[u8], Wanted)> {
    let mut reader = Reader(data);
    let name = name_of(&mut reader)?;
    let count = reader.u16()?;
    if reader.0.len() != usize::from(count) * 2 {
        return None;
    }
    let mut wanted = Wanted::default();
    for _ in 0..count {
        match reader.u16()? {
            info::NAME => wanted.name = true,
            info::DESCRIPTION => wanted.description = true,
            // Sent anyway, or not known here: nothing need be said about either.
            _ => {}
        }
    }
    Some((name, wanted))
}

/// Export name of a metadata option, and whether a query matches `base:allocation`.
fn parse_contexts(data: &[u8], is_set: bool) -> Option<(&[u8], bool)> {
    let mut reader = Reader(data);
    let name = name_of(&mut reader)?;
    let count = reader.u32()?;
    if count > QUERIES_MAX {
        return None;
    }
    // A list without queries means all there is.
    let mut chosen = count == 0 && !is_set;
    for _ in 0..count {
        let length = reader.u32()? as usize;
        let query = reader.bytes(length)?;
        chosen |= query == BASE_ALLOCATION.as_bytes() || (!is_set && query == b"base:");
    }
    reader.0.is_empty().then_some((name, chosen))
}

fn name_of<'a>(reader: &mut Reader<'a>) -> Option<&'a [u8]> {
    let length = reader.u32()? as usize;
    if length > NAME_MAX_BYTES {
        return None;
    }
    reader.bytes(length)
}

fn list(export: &Export, out: &mut Vec<u8>) {
    // A volume name is far below 4 GiB.
    let mut piece = (export.name.len() as u32).to_be_bytes().to_vec();
    piece.extend_from_slice(export.name.as_bytes());
    put_option_reply(out, option::LIST, reply::SERVER, &piece);
    put_option_reply(out, option::LIST, reply::ACK, &[]);
}

fn text_info(kind: u16, text: &str) -> Vec<u8> {
    let mut piece = kind.to_be_bytes().to_vec();
    piece.extend_from_slice(text.as_bytes());
    piece
}

fn refuse(out: &mut Vec<u8>, option: u32, error: u32, text: &str) {
    put_option_reply(out, option, error, text.as_bytes());
}

fn refuse_unknown(out: &mut Vec<u8>, option: u32, name: &[u8], export: &Export) {
    let name: String = String::from_utf8_lossy(name).chars().take(256).collect();
    let text = format!("no export {name:?} here; the export is {:?}", export.name);
    refuse(out, option, reply::ERR_UNKNOWN, &text);
}

/// Runs a whole negotiation over `input` and returns everything sent, how much was taken and the last step: for
/// tests and fuzzers.
pub fn negotiate(input: &[u8], export: &Export, refusal: Option<&str>) -> (Vec<u8>, usize, Step) {
    let mut out = Vec::new();
    let mut negotiation = Negotiation::new(&mut out);
    let mut taken = 0;
    loop {
        let (consumed, step) = negotiation.feed(&input[taken..], export, refusal, &mut out);
        taken += consumed;
        if step != Step::More || consumed == 0 {
            return (out, taken, step);
        }
    }
}

#[cfg(test)]
#[path = "negotiate_tests.rs"]
mod tests;
