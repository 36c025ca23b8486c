//! The io_uring loop and the aligned buffer arena of a volume thread.
//!
//! One volume is one thread is one [`Ring`]. Components (store, frontends, link) push entries under a
//! [`Token`] that carries their [`Owner`]; the thread's loop calls [`Ring::turn`], which is one
//! `io_uring_enter` in the usual case, and hands every [`Completion`] to the component that owns it.
//! Payload lives in the [`Arena`]: slots aligned for `O_DIRECT`, counted by reference, named by
//! [`duplex_core::ids::BufferId`].

mod arena;
mod error;
mod ring;
mod token;
mod waker;

pub use arena::{Arena, ArenaError, BUFFER_MAX_BYTES};
pub use error::{Errno, RingError};
pub use ring::{ENTRIES_DEFAULT, Ring};
pub use token::{Completion, Owner, Token};
pub use waker::Waker;
