//! A small NBD client of our own: fixed newstyle, plain requests, any number in flight, over a Unix or TCP socket.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};

const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
const OPTION_MAGIC: u64 = 0x4948_4156_454F_5054;
const REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST: u32 = 0x2560_9513;
const SIMPLE_REPLY: u32 = 0x6744_6698;
const OPT_GO: u32 = 7;
const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;
const INFO_EXPORT: u16 = 0;

/// What to ask for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ask {
    /// Read so many bytes.
    Read(u32),
    /// Write these.
    Write(Vec<u8>),
    /// Write these, durable before the answer.
    WriteFua(Vec<u8>),
    /// Everything acknowledged is durable before the answer.
    Flush,
    /// Discard so many bytes.
    Trim(u32),
    /// Zero so many bytes; `true`: they may become a hole.
    WriteZeroes(u32, bool),
}

impl Ask {
    fn wire(&self) -> (u16, u16, u32, &[u8]) {
        match self {
            Ask::Read(length) => (0, 0, *length, &[]),
            Ask::Write(bytes) => (0, 1, bytes.len() as u32, bytes),
            Ask::WriteFua(bytes) => (1, 1, bytes.len() as u32, bytes),
            Ask::Flush => (0, 3, 0, &[]),
            Ask::Trim(length) => (0, 4, *length, &[]),
            Ask::WriteZeroes(length, hole) => (if *hole { 0 } else { 2 }, 6, *length, &[]),
        }
    }
}

/// An answer: which request, its error (0: none; else an NBD errno), and data of a read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Which request, as [`Nbd::send`] numbered it.
    pub cookie: u64,
    /// 0 or an errno.
    pub error: u32,
    /// What a read gave.
    pub data: Vec<u8>,
}

trait Stream: Read + Write + Send + std::fmt::Debug {}
impl<T: Read + Write + Send + std::fmt::Debug> Stream for T {}

/// An open connection to an export.
#[derive(Debug)]
pub struct Nbd {
    stream: Box<dyn Stream>,
    size_bytes: u64,
    flags: u16,
    next: u64,
    reads: HashMap<u64, usize>,
    pending: usize,
}

impl Nbd {
    /// Over a Unix socket; no answer within `patience` is an error.
    pub fn unix(path: &Path, export: &str, patience: Duration) -> Result<Nbd> {
        let stream = UnixStream::connect(path).with_context(|| format!("{} refuses", path.display()))?;
        stream.set_read_timeout(Some(patience))?;
        stream.set_write_timeout(Some(patience))?;
        Nbd::negotiate(Box::new(stream), export)
    }

    /// Over TCP.
    pub fn tcp(address: SocketAddr, export: &str, patience: Duration) -> Result<Nbd> {
        let stream = TcpStream::connect_timeout(&address, patience)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(patience))?;
        stream.set_write_timeout(Some(patience))?;
        Nbd::negotiate(Box::new(stream), export)
    }

    fn negotiate(mut stream: Box<dyn Stream>, export: &str) -> Result<Nbd> {
        let (first, second, _flags) = (u64_of(&mut stream)?, u64_of(&mut stream)?, u16_of(&mut stream)?);
        if (first, second) != (INIT_MAGIC, OPTION_MAGIC) {
            bail!("not an NBD server: it began with {first:#x} {second:#x}");
        }
        stream.write_all(&3u32.to_be_bytes())?; // fixed newstyle, no zeroes
        let name = export.as_bytes();
        let mut option = Vec::new();
        option.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
        option.extend_from_slice(&OPT_GO.to_be_bytes());
        option.extend_from_slice(&u32::try_from(name.len() + 6)?.to_be_bytes());
        option.extend_from_slice(&u32::try_from(name.len())?.to_be_bytes());
        option.extend_from_slice(name);
        option.extend_from_slice(&0u16.to_be_bytes());
        stream.write_all(&option)?;
        let (mut size_bytes, mut flags) = (0, 0);
        loop {
            let (magic, _option) = (u64_of(&mut stream)?, u32_of(&mut stream)?);
            let (kind, length) = (u32_of(&mut stream)?, u32_of(&mut stream)? as usize);
            if magic != REPLY_MAGIC || length > 65536 {
                bail!("a broken reply to GO: magic {magic:#x}, {length} bytes");
            }
            let mut payload = vec![0; length];
            stream.read_exact(&mut payload)?;
            match kind {
                REP_ACK => break,
                REP_INFO if payload.len() >= 12 && payload[..2] == INFO_EXPORT.to_be_bytes() => {
                    size_bytes = u64::from_be_bytes(payload[2..10].try_into()?);
                    flags = u16::from_be_bytes(payload[10..12].try_into()?);
                }
                REP_INFO => {}
                error => bail!(
                    "the server refused export {export:?}: {error:#x} {}",
                    String::from_utf8_lossy(&payload)
                ),
            }
        }
        Ok(Nbd { stream, size_bytes, flags, next: 1, reads: HashMap::new(), pending: 0 })
    }

    /// Size of the export.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Its transmission flags.
    pub fn flags(&self) -> u16 {
        self.flags
    }

    /// Requests without an answer yet.
    pub fn in_flight(&self) -> usize {
        self.pending
    }

    /// Sends a request; the answer comes by [`Nbd::receive`], in any order.
    pub fn send(&mut self, offset_bytes: u64, ask: &Ask) -> Result<u64> {
        let cookie = self.next;
        self.next += 1;
        let (flags, kind, length, payload) = ask.wire();
        let mut request = Vec::with_capacity(28 + payload.len());
        request.extend_from_slice(&REQUEST.to_be_bytes());
        request.extend_from_slice(&flags.to_be_bytes());
        request.extend_from_slice(&kind.to_be_bytes());
        request.extend_from_slice(&cookie.to_be_bytes());
        request.extend_from_slice(&offset_bytes.to_be_bytes());
        request.extend_from_slice(&length.to_be_bytes());
        request.extend_from_slice(payload);
        self.stream.write_all(&request).context("the server is gone")?;
        if let Ask::Read(length) = ask {
            self.reads.insert(cookie, *length as usize);
        }
        self.pending += 1;
        Ok(cookie)
    }

    /// The next answer.
    pub fn receive(&mut self) -> Result<Answer> {
        let magic = u32_of(&mut self.stream).context("the server is gone")?;
        if magic != SIMPLE_REPLY {
            bail!("a reply began with {magic:#x}");
        }
        let (error, cookie) = (u32_of(&mut self.stream)?, u64_of(&mut self.stream)?);
        let mut data = Vec::new();
        if let (Some(length), 0) = (self.reads.remove(&cookie), error) {
            data = vec![0; length];
            self.stream.read_exact(&mut data)?;
        }
        self.pending = self.pending.saturating_sub(1);
        Ok(Answer { cookie, error, data })
    }

    /// One request and its answer, with nothing else in flight.
    pub fn call(&mut self, offset_bytes: u64, ask: &Ask) -> Result<Vec<u8>> {
        let cookie = self.send(offset_bytes, ask)?;
        let answer = self.receive()?;
        if answer.cookie != cookie {
            bail!("an answer to {} where {cookie} was asked", answer.cookie);
        }
        if answer.error != 0 {
            let error = std::io::Error::from_raw_os_error(answer.error as i32);
            return Err(error).with_context(|| format!("request at {offset_bytes} failed"));
        }
        Ok(answer.data)
    }

    /// Reads.
    pub fn read(&mut self, offset_bytes: u64, length: u32) -> Result<Vec<u8>> {
        self.call(offset_bytes, &Ask::Read(length))
    }

    /// Writes.
    pub fn write(&mut self, offset_bytes: u64, bytes: &[u8]) -> Result<()> {
        self.call(offset_bytes, &Ask::Write(bytes.to_vec())).map(drop)
    }

    /// Flushes.
    pub fn flush(&mut self) -> Result<()> {
        self.call(0, &Ask::Flush).map(drop)
    }
}

fn u16_of(stream: &mut impl Read) -> Result<u16> {
    let mut bytes = [0; 2];
    stream.read_exact(&mut bytes)?;
    Ok(u16::from_be_bytes(bytes))
}

fn u32_of(stream: &mut impl Read) -> Result<u32> {
    let mut bytes = [0; 4];
    stream.read_exact(&mut bytes)?;
    Ok(u32::from_be_bytes(bytes))
}

fn u64_of(stream: &mut impl Read) -> Result<u64> {
    let mut bytes = [0; 8];
    stream.read_exact(&mut bytes)?;
    Ok(u64::from_be_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command, Stdio};

    use super::*;
    use crate::lab::{Space, wait};

    /// QEMU's NBD server, as the thing to talk to.
    fn server(space: &Space) -> Option<(Child, std::path::PathBuf)> {
        let disk = space.sparse_file("disk", 1 << 20).expect("a file");
        let socket = space.path().join("socket");
        let child = Command::new("qemu-nbd")
            .args([
                "--format=raw",
                "--export-name=data",
                "--persistent",
                "--shared=4",
                "--cache=writeback",
                "--discard=unmap",
                "--socket",
            ])
            .arg(&socket)
            .arg(&disk)
            .stdout(Stdio::null())
            .spawn();
        let Ok(child) = child else {
            println!("SKIPPED: qemu-nbd is not installed");
            return None;
        };
        wait::until("qemu-nbd", Duration::from_secs(20), || Ok(socket.exists().then_some(())))
            .expect("it listens");
        Some((child, socket))
    }

    #[test]
    fn every_request_against_a_real_server() {
        let space = Space::new().expect("a directory");
        let Some((mut child, socket)) = server(&space) else { return };
        let patience = Duration::from_secs(20);
        let mut nbd = Nbd::unix(&socket, "data", patience).expect("connected");
        assert_eq!(nbd.size_bytes(), 1 << 20);
        nbd.write(4096, &[7; 4096]).expect("written");
        nbd.call(8192, &Ask::WriteFua(vec![8; 4096])).expect("written");
        nbd.flush().expect("flushed");
        let first = nbd.send(4096, &Ask::Read(8192)).expect("sent");
        let second = nbd.send(8192, &Ask::WriteZeroes(4096, false)).expect("sent");
        let mut answers = [nbd.receive().expect("answer"), nbd.receive().expect("answer")];
        answers.sort_by_key(|answer| answer.cookie);
        assert_eq!([answers[0].cookie, answers[1].cookie], [first, second]);
        assert_eq!(answers[0].data.len(), 8192);
        nbd.call(4096, &Ask::Trim(4096)).expect("trimmed");
        assert_eq!(nbd.read(8192, 4096).expect("read"), vec![0; 4096]);
        assert!(nbd.read(1 << 20, 4096).is_err(), "past the end");
        assert!(Nbd::unix(&socket, "no such export", patience).is_err());
        drop(nbd);
        child.kill().expect("killed");
        child.wait().expect("gone");
    }
}
