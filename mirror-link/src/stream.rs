//! A TCP connection of the control plane, plain or TLS, as a stream of frames.

use std::io::{self, Read, Write};
use std::time::Duration;

use rustls::Connection;
use tokio::io::Interest;
use tokio::net::TcpStream;

use crate::frame::{FrameError, HEAD_BYTES, Header};
use crate::tls;

/// Read from the socket at a time.
const READ_BYTES: usize = 16 << 10;

/// Why a connection is over.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StreamError {
    #[error("the connection was closed by the other side")]
    Closed,
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("TLS: {0}")]
    Tls(#[from] rustls::Error),
    #[error("{0}")]
    Frame(#[from] FrameError),
    #[error("more than {limit_bytes} bytes before the peer proved who it is")]
    TooMuch { limit_bytes: usize },
    #[error("no answer within {} ms", .0.as_millis())]
    Deadline(Duration),
}

/// One frame.
pub(crate) struct Frame {
    pub(crate) header: Header,
    pub(crate) body: Vec<u8>,
}

/// Every method but [`Stream::pump`] is synchronous; `pump` may be dropped at any time without loss.
pub(crate) struct Stream {
    tcp: TcpStream,
    tls: Option<Box<Connection>>,
    /// Plain bytes received and not yet taken out as frames.
    inbox: Vec<u8>,
    /// Bytes for the socket.
    outbox: Vec<u8>,
    scratch: Box<[u8]>,
    received_bytes: usize,
    /// The very first byte that came: tells TLS from a plain frame.
    first_byte: Option<u8>,
    /// Until the peer has proved who it is.
    limit_bytes: Option<usize>,
}

impl Stream {
    pub(crate) fn new(tcp: TcpStream, tls: Option<Connection>, limit_bytes: usize) -> Self {
        Self {
            tcp,
            tls: tls.map(Box::new),
            inbox: Vec::new(),
            outbox: Vec::new(),
            scratch: vec![0; READ_BYTES].into_boxed_slice(),
            received_bytes: 0,
            first_byte: None,
            limit_bytes: Some(limit_bytes),
        }
    }

    /// The peer is who it says: bytes are counted no longer.
    pub(crate) fn trust(&mut self) {
        self.limit_bytes = None;
    }

    /// The TLS exporter's bytes; `None` on a plain connection. Only after [`Stream::secure`].
    pub(crate) fn binding(&self) -> Result<Option<[u8; 32]>, rustls::Error> {
        self.tls.as_ref().map(|connection| tls::binding(connection)).transpose()
    }

    /// The very first byte that came.
    pub(crate) const fn first_byte(&self) -> Option<u8> {
        self.first_byte
    }

    /// Bytes received so far, as they came from the socket.
    pub(crate) const fn received_bytes(&self) -> usize {
        self.received_bytes
    }

    /// Bytes that wait for the socket.
    pub(crate) fn unsent_bytes(&self) -> usize {
        self.outbox.len()
    }

    pub(crate) const fn tcp(&self) -> &TcpStream {
        &self.tcp
    }

    /// Takes socket and TLS state out, with plain bytes that came after the last frame taken.
    pub(crate) fn into_parts(self) -> (TcpStream, Option<Box<Connection>>, Vec<u8>) {
        (self.tcp, self.tls, self.inbox)
    }

    /// Queues a whole frame; `pump` sends it.
    pub(crate) fn queue(&mut self, frame: &[u8]) -> Result<(), StreamError> {
        match &mut self.tls {
            Some(connection) => {
                connection.writer().write_all(frame)?;
                self.encrypted()?;
            }
            None => self.outbox.extend_from_slice(frame),
        }
        Ok(())
    }

    fn encrypted(&mut self) -> Result<(), StreamError> {
        if let Some(connection) = &mut self.tls {
            while connection.wants_write() {
                connection.write_tls(&mut self.outbox)?;
            }
        }
        Ok(())
    }

    /// The next whole frame, if it is here. `body_limit_bytes` holds before a peer is known.
    pub(crate) fn next_frame(&mut self, body_limit_bytes: u32) -> Result<Option<Frame>, StreamError> {
        let Some((head, rest)) = self.inbox.split_first_chunk::<HEAD_BYTES>() else {
            return Ok(None);
        };
        let header = Header::decode(head)?;
        let kind = header.fields.kind;
        if header.body_bytes > body_limit_bytes {
            return Err(FrameError::Unexpected { kind, place: "before both have proved who they are" }.into());
        }
        let body_bytes = header.body_bytes as usize;
        let Some(body) = rest.get(..body_bytes) else {
            return Ok(None);
        };
        header.check_body(body)?;
        let body = body.to_vec();
        self.inbox.drain(..HEAD_BYTES + body_bytes);
        Ok(Some(Frame { header, body }))
    }

    /// Waits until the socket can be read (or written, when something waits) and does it once. Call it only when
    /// [`Stream::next_frame`] has nothing: so the inbox stays below one frame and one read.
    pub(crate) async fn pump(&mut self) -> Result<(), StreamError> {
        let writing = !self.outbox.is_empty();
        let interest = if writing { Interest::READABLE | Interest::WRITABLE } else { Interest::READABLE };
        let ready = self.tcp.ready(interest).await?;
        if writing && ready.is_writable() {
            self.write_some()?;
        }
        if ready.is_readable() || ready.is_read_closed() {
            self.read_some()?;
        }
        Ok(())
    }

    fn write_some(&mut self) -> Result<(), StreamError> {
        match self.tcp.try_write(&self.outbox) {
            Ok(sent) => {
                self.outbox.drain(..sent);
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn read_some(&mut self) -> Result<(), StreamError> {
        let count = match self.tcp.try_read(&mut self.scratch) {
            Ok(0) => return Err(StreamError::Closed),
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        self.first_byte = self.first_byte.or(Some(self.scratch[0]));
        self.received_bytes = self.received_bytes.saturating_add(count);
        if let Some(limit_bytes) = self.limit_bytes.filter(|limit| self.received_bytes > *limit) {
            return Err(StreamError::TooMuch { limit_bytes });
        }
        let Some(connection) = &mut self.tls else {
            self.inbox.extend_from_slice(&self.scratch[..count]);
            return Ok(());
        };
        let mut raw = &self.scratch[..count];
        while !raw.is_empty() {
            connection.read_tls(&mut raw)?;
            let state = connection.process_new_packets()?;
            let mut plain = vec![0; state.plaintext_bytes_to_read()];
            connection.reader().read_exact(&mut plain)?;
            self.inbox.extend_from_slice(&plain);
            if state.peer_has_closed() {
                return Err(StreamError::Closed);
            }
        }
        self.encrypted()
    }

    /// Runs the TLS handshake, if there is TLS.
    pub(crate) async fn secure(&mut self) -> Result<(), StreamError> {
        self.encrypted()?;
        while self.tls.as_ref().is_some_and(|connection| connection.is_handshaking())
            || self.unsent_bytes() > 0
        {
            self.pump().await?;
        }
        Ok(())
    }

    /// The next frame, however long it takes.
    pub(crate) async fn receive(&mut self, body_limit_bytes: u32) -> Result<Frame, StreamError> {
        loop {
            if let Some(frame) = self.next_frame(body_limit_bytes)? {
                return Ok(frame);
            }
            self.pump().await?;
        }
    }

    /// Sends a frame and waits until the socket has it all.
    pub(crate) async fn send(&mut self, frame: &[u8]) -> Result<(), StreamError> {
        self.queue(frame)?;
        self.drain().await
    }

    /// Waits until the socket has everything queued. Reads nothing.
    pub(crate) async fn drain(&mut self) -> Result<(), StreamError> {
        while !self.outbox.is_empty() {
            self.tcp.writable().await?;
            self.write_some()?;
        }
        Ok(())
    }
}
