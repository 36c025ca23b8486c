//! A client that can also misbehave.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use duplex_frontend::nbd::wire::{
    self, CHUNK_MAGIC, OPTION_MAGIC, OPTION_REPLY_MAGIC, REQUEST_MAGIC, SIMPLE_REPLY_MAGIC, option, reply,
};

use super::volume::EXPORT;

/// A chunk of a structured reply.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Chunk {
    pub(crate) flags: u16,
    pub(crate) kind: u16,
    pub(crate) cookie: u64,
    pub(crate) data: Vec<u8>,
}

pub(crate) struct Client {
    pub(crate) stream: UnixStream,
}

impl Client {
    /// Greeting and flags exchanged.
    pub(crate) fn greet(stream: UnixStream) -> Self {
        let mut client = Self { stream };
        let greeting = client.take(18);
        assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
        client.send(&3u32.to_be_bytes());
        client
    }

    /// Ready for requests.
    pub(crate) fn go(stream: UnixStream) -> Self {
        let mut client = Self::greet(stream);
        client.go_now();
        client
    }

    /// Ready for requests, with structured replies and block status.
    pub(crate) fn go_structured(stream: UnixStream) -> Self {
        let mut client = Self::greet(stream);
        client.option(option::STRUCTURED_REPLY, &[]);
        assert_eq!(client.option_reply(), (option::STRUCTURED_REPLY, reply::ACK, vec![]));
        let mut data = named();
        data.extend_from_slice(&1u32.to_be_bytes());
        data.extend_from_slice(&15u32.to_be_bytes());
        data.extend_from_slice(b"base:allocation");
        client.option(option::SET_META_CONTEXT, &data);
        assert_eq!(client.option_reply().1, reply::META_CONTEXT);
        assert_eq!(client.option_reply().1, reply::ACK);
        client.go_now();
        client
    }

    fn go_now(&mut self) {
        self.option(option::GO, &go_data());
        while self.option_reply().1 != reply::ACK {}
    }

    pub(crate) fn option(&mut self, option: u32, data: &[u8]) {
        let mut bytes = OPTION_MAGIC.to_be_bytes().to_vec();
        bytes.extend_from_slice(&option.to_be_bytes());
        bytes.extend_from_slice(&(data.len() as u32).to_be_bytes());
        bytes.extend_from_slice(data);
        self.send(&bytes);
    }

    pub(crate) fn option_reply(&mut self) -> (u32, u32, Vec<u8>) {
        assert_eq!(self.u64(), OPTION_REPLY_MAGIC);
        let (option, reply, length) = (self.u32(), self.u32(), self.u32());
        assert!(
            reply < 0x8000_0000 || option != option::GO || reply == wire::reply::ERR_SHUTDOWN,
            "{reply:#x}"
        );
        (option, reply, self.take(length as usize))
    }

    pub(crate) fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).expect("send");
    }

    pub(crate) fn request(&mut self, command: u16, flags: u16, cookie: u64, offset: u64, length: u32) {
        let bytes = request(command, flags, cookie, offset, length);
        self.send(&bytes);
    }

    pub(crate) fn take(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.stream.read_exact(&mut bytes).expect("the server answers");
        bytes
    }

    fn u32(&mut self) -> u32 {
        u32::from_be_bytes(self.take(4).try_into().expect("4 bytes"))
    }

    fn u64(&mut self) -> u64 {
        u64::from_be_bytes(self.take(8).try_into().expect("8 bytes"))
    }

    /// Cookie and error of a simple reply.
    pub(crate) fn simple(&mut self) -> (u64, u32) {
        assert_eq!(self.u32(), SIMPLE_REPLY_MAGIC);
        let error = self.u32();
        (self.u64(), error)
    }

    pub(crate) fn chunk(&mut self) -> Chunk {
        let header = self.take(20);
        let number = |from: usize, to: usize| {
            header[from..to].iter().fold(0u64, |sum, byte| sum << 8 | u64::from(*byte))
        };
        assert_eq!(number(0, 4), u64::from(CHUNK_MAGIC));
        Chunk {
            flags: number(4, 6) as u16,
            kind: number(6, 8) as u16,
            cookie: number(8, 16),
            data: self.take(number(16, 20) as usize),
        }
    }

    /// The server closes, and has sent nothing more.
    pub(crate) fn expect_end(&mut self) {
        let mut rest = Vec::new();
        match self.stream.read_to_end(&mut rest) {
            Ok(_) => assert!(rest.is_empty(), "{} bytes before the end", rest.len()),
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset),
        }
    }
}

fn named() -> Vec<u8> {
    let mut data = (EXPORT.len() as u32).to_be_bytes().to_vec();
    data.extend_from_slice(EXPORT.as_bytes());
    data
}

/// Data of a GO without wishes.
pub(crate) fn go_data() -> Vec<u8> {
    let mut data = named();
    data.extend_from_slice(&0u16.to_be_bytes());
    data
}

pub(crate) fn request(command: u16, flags: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
    let mut bytes = REQUEST_MAGIC.to_be_bytes().to_vec();
    bytes.extend_from_slice(&flags.to_be_bytes());
    bytes.extend_from_slice(&command.to_be_bytes());
    bytes.extend_from_slice(&cookie.to_be_bytes());
    bytes.extend_from_slice(&offset.to_be_bytes());
    bytes.extend_from_slice(&length.to_be_bytes());
    bytes
}
