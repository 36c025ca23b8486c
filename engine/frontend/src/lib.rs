//! How a volume appears to its users.
//!
//! A frontend is a component of a volume's thread: it takes requests from clients, hands them to the
//! thread's loop as [`FrontendEvent::Request`] and answers when the loop calls its `complete`. It owns the
//! request's buffer: the buffer is released when the answer is on its way (a read) or when `complete` is
//! called (a write). Whoever needs it longer retains it in the arena.

pub mod fuse;
pub mod holder;
pub mod loopdev;
pub mod nbd;

use duplex_core::ids::RequestId;
use duplex_core::request::Request;

/// What a frontend tells the loop of its volume's thread.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FrontendEvent {
    /// A client wants something done. Answer exactly once with the frontend's `complete`, also when the
    /// client has gone meanwhile.
    Request(Request),
    /// A client began to use the volume.
    ClientOpened,
    /// A client that had begun to use the volume is gone. Its requests in flight are still to be completed.
    ClientClosed,
}

/// What a frontend tells its clients about the volume.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Geometry {
    /// Size of the volume, a multiple of `sector_bytes`.
    pub size_bytes: u64,
    /// Smallest unit of a request: 512 or 4096.
    pub sector_bytes: u32,
    /// Writes are refused.
    pub read_only: bool,
}

/// The request named by a frontend's owner number, its slot and the slot's generation. Two frontends of one
/// volume never give the same name, and a slot that is used again gives another.
pub const fn request_id(owner: u16, slot: u16, generation: u32) -> RequestId {
    RequestId((owner as u64) << 48 | (slot as u64) << 32 | generation as u64)
}

/// The owner number of the frontend that named the request: where its completion goes.
pub const fn request_owner(id: RequestId) -> u16 {
    (id.0 >> 48) as u16
}

/// The slot in the frontend that named the request.
pub const fn request_slot(id: RequestId) -> u16 {
    (id.0 >> 32) as u16
}

/// The generation of the slot when the request was named.
pub const fn request_generation(id: RequestId) -> u32 {
    id.0 as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_id_gives_back_its_parts() {
        let id = request_id(0xfffe, 0x1234, 0xdead_beef);
        assert_eq!(
            (request_owner(id), request_slot(id), request_generation(id)),
            (0xfffe, 0x1234, 0xdead_beef)
        );
    }
}
