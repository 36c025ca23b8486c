//! The sending half of a connection: replies gathered, one send in flight.

use std::os::fd::{AsRawFd, BorrowedFd};

use duplex_core::ids::BufferId;
use duplex_ring::{Arena, Errno};

use super::wire::CHUNK_BYTES;

/// The kernel's limit of vectors in one message.
const VECTORS_MAX: usize = 1024;

/// The longest header of one reply: less than two of the shortest.
const LONE_HEADER_BYTES: usize = CHUNK_BYTES + 8;

/// A message header with its vectors, at addresses that do not change while the kernel uses them.
pub(super) struct Message {
    header: Box<libc::msghdr>,
    vectors: Vec<libc::iovec>,
}

// SAFETY: the pointers are addresses for the kernel; nothing is ever read or written through them here.
unsafe impl Send for Message {}

impl Message {
    pub(super) fn new() -> Self {
        // SAFETY: a message header is plain numbers and pointers, all of which may be zero.
        let header = Box::new(unsafe { std::mem::zeroed::<libc::msghdr>() });
        Self { header, vectors: Vec::with_capacity(64) }
    }

    pub(super) fn clear(&mut self) {
        self.vectors.clear();
    }

    pub(super) fn add(&mut self, start: *mut u8, length_bytes: usize) {
        self.vectors.push(libc::iovec { iov_base: start.cast(), iov_len: length_bytes });
    }

    /// The header over the vectors added so far. Valid until the next call of any method.
    pub(super) fn as_header(&mut self) -> *mut libc::msghdr {
        self.header.msg_iov = self.vectors.as_mut_ptr();
        self.header.msg_iovlen = self.vectors.len();
        &raw mut *self.header
    }
}

/// A piece of what is sent.
#[derive(Clone, Copy, Debug)]
enum Segment {
    /// Headers, in `Batch::bytes`.
    Bytes { start: usize, end: usize },
    /// A read's data.
    Payload { slot: u16, buffer: BufferId, length_bytes: usize },
}

#[derive(Default)]
struct Batch {
    bytes: Vec<u8>,
    segments: Vec<Segment>,
}

impl Batch {
    /// Makes the bytes written since the last segment one, or part of the last one.
    fn seal(&mut self) {
        let end_now = self.bytes.len();
        let start = match self.segments.last_mut() {
            Some(Segment::Bytes { end, .. }) => {
                *end = end_now;
                return;
            }
            Some(Segment::Payload { .. }) | None => self.sealed(),
        };
        if start < end_now {
            self.segments.push(Segment::Bytes { start, end: end_now });
        }
    }

    fn sealed(&self) -> usize {
        let ends = self.segments.iter().rev().find_map(|segment| match segment {
            Segment::Bytes { end, .. } => Some(*end),
            Segment::Payload { .. } => None,
        });
        ends.unwrap_or(0)
    }

    fn clear(&mut self) {
        self.bytes.clear();
        self.segments.clear();
    }
}

/// The sending half.
pub(super) struct Tx {
    next: Batch,
    current: Batch,
    /// Segments of `current` that are sent, and bytes of the one after them.
    sent_segments: usize,
    sent_bytes: usize,
    message: Message,
    pub(super) in_flight: bool,
}

impl Tx {
    pub(super) fn new() -> Self {
        Self {
            next: Batch::default(),
            current: Batch::default(),
            sent_segments: 0,
            sent_bytes: 0,
            message: Message::new(),
            in_flight: false,
        }
    }

    /// Where headers are appended.
    pub(super) const fn bytes(&mut self) -> &mut Vec<u8> {
        &mut self.next.bytes
    }

    /// Appends a read's data after the header just appended.
    pub(super) fn payload(&mut self, slot: u16, buffer: BufferId, length_bytes: usize) {
        self.next.seal();
        self.next.segments.push(Segment::Payload { slot, buffer, length_bytes });
    }

    /// Header bytes that wait for the send in flight.
    pub(super) const fn waiting_bytes(&self) -> usize {
        self.next.bytes.len()
    }

    /// True when everything is sent.
    pub(super) fn is_empty(&self) -> bool {
        self.next.bytes.is_empty() && self.current.segments.is_empty()
    }

    /// True when what is being sent is one reply from its beginning.
    pub(super) fn is_lone(&self) -> bool {
        let data = self.current.segments.len().saturating_sub(1);
        self.current.bytes.len() <= LONE_HEADER_BYTES
            && data <= 1
            && self.sent_segments + self.sent_bytes == 0
    }

    /// The message to send now; `None` when there is nothing to send, or a send is in flight.
    pub(super) fn prepare(&mut self, arena: &Arena) -> Option<*const libc::msghdr> {
        if self.in_flight {
            return None;
        }
        if self.current.segments.is_empty() {
            self.next.seal();
            if self.next.segments.is_empty() {
                return None;
            }
            std::mem::swap(&mut self.next, &mut self.current);
        }
        self.message.clear();
        let mut skip_bytes = self.sent_bytes;
        for segment in self.current.segments[self.sent_segments..].iter().take(VECTORS_MAX) {
            let (start, length_bytes) = match *segment {
                Segment::Bytes { start, end } => {
                    (self.current.bytes[start..].as_ptr().cast_mut(), end - start)
                }
                Segment::Payload { buffer, length_bytes, .. } => (arena.ptr(buffer), length_bytes),
            };
            self.message.add(start.wrapping_add(skip_bytes), length_bytes - skip_bytes);
            skip_bytes = 0;
        }
        Some(self.message.as_header())
    }

    /// Takes in that `count_bytes` were sent; appends the slots whose data is all sent.
    pub(super) fn sent(&mut self, count_bytes: usize, finished: &mut Vec<u16>) {
        let mut left_bytes = count_bytes + self.sent_bytes;
        while let Some(segment) = self.current.segments.get(self.sent_segments) {
            let length_bytes = match *segment {
                Segment::Bytes { start, end } => end - start,
                Segment::Payload { length_bytes, .. } => length_bytes,
            };
            if left_bytes < length_bytes {
                break;
            }
            left_bytes -= length_bytes;
            self.sent_segments += 1;
            if let Segment::Payload { slot, .. } = *segment {
                finished.push(slot);
            }
        }
        self.sent_bytes = left_bytes;
        if self.sent_segments == self.current.segments.len() {
            self.current.clear();
            self.sent_segments = 0;
            self.sent_bytes = 0;
        }
    }
}

/// One `sendmsg` that does not wait.
///
/// # Safety
/// The message's header, vectors and what they point to are valid.
pub(super) unsafe fn send_now(socket: BorrowedFd<'_>, message: *const libc::msghdr) -> Result<usize, Errno> {
    // SAFETY: the caller's contract.
    let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), message, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT) };
    usize::try_from(sent)
        .map_err(|_| Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lengths(tx: &mut Tx, arena: &Arena) -> Vec<usize> {
        match tx.prepare(arena) {
            None => Vec::new(),
            Some(_) => tx.message.vectors.iter().map(|vector| vector.iov_len).collect(),
        }
    }

    #[test]
    fn headers_are_gathered_and_short_sends_go_on_where_they_stopped() {
        let mut arena = Arena::new(1 << 20).unwrap();
        let buffer = arena.alloc(4096).unwrap();
        let mut tx = Tx::new();
        assert!(lengths(&mut tx, &arena).is_empty());
        tx.bytes().extend_from_slice(&[1; 16]);
        tx.bytes().extend_from_slice(&[2; 16]);
        tx.payload(7, buffer, 4096);
        tx.bytes().extend_from_slice(&[3; 16]);
        assert_eq!(lengths(&mut tx, &arena), [32, 4096, 16]);
        assert!(!tx.is_lone());
        let mut finished = Vec::new();
        tx.sent(20, &mut finished);
        assert_eq!(lengths(&mut tx, &arena), [12, 4096, 16]);
        tx.sent(12 + 4000, &mut finished);
        assert!(finished.is_empty());
        assert_eq!(lengths(&mut tx, &arena), [96, 16]);
        // What comes meanwhile waits for the batch to be done.
        tx.bytes().extend_from_slice(&[4; 16]);
        assert_eq!(lengths(&mut tx, &arena), [96, 16]);
        tx.sent(96, &mut finished);
        assert_eq!(finished, [7]);
        tx.sent(16, &mut finished);
        assert!(!tx.is_empty());
        assert_eq!(lengths(&mut tx, &arena), [16]);
        assert!(tx.is_lone());
        tx.sent(16, &mut finished);
        assert!(tx.is_empty());
        assert_eq!(finished, [7]);
    }

    #[test]
    fn adjoining_headers_are_one_vector_and_payloads_follow_each_other() {
        let mut arena = Arena::new(1 << 20).unwrap();
        let buffer = arena.alloc(4096).unwrap();
        let mut tx = Tx::new();
        for slot in 0..3 {
            tx.bytes().extend_from_slice(&[0; 28]);
            tx.payload(slot, buffer, 512);
        }
        assert_eq!(lengths(&mut tx, &arena), [28, 512, 28, 512, 28, 512]);
        let mut finished = Vec::new();
        tx.sent(28 + 512 + 28 + 511, &mut finished);
        assert_eq!(finished, [0]);
        tx.sent(1 + 28 + 512, &mut finished);
        assert_eq!(finished, [0, 1, 2]);
        assert!(tx.is_empty());
    }
}
