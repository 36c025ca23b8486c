//! The mirror link: how two servers of a pair talk.
//!
//! - [`frame`], [`codec`], [`control`]: bytes of the wire, pure (`docs/wire-protocol.md` draws them).

pub mod codec;
pub mod control;
pub mod frame;
