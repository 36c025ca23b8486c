//! The mirror link: how two servers of a pair talk.
//!
//! - [`frame`], [`codec`], [`control`]: bytes of the wire, pure (`docs/wire-protocol.md` draws them).
//! - [`Link`]: the control plane's side, on tokio: paths, handshakes, the session, control messages, heartbeats.
//! - [`DataChannel`]: a volume's side, on the volume's ring: messages with payload, in order, once each.

pub mod codec;
pub mod control;
pub mod frame;

mod channel;
mod config;
mod data_dial;
mod dialler;
mod guard;
mod handshake;
mod link;
mod listener;
mod manager;
mod path;
mod secret;
mod session;
mod stream;
mod tls;

pub use channel::{BreakReason, ChannelError, ChannelEvent, ChannelLimits, DataChannel};
pub use config::{Encryption, LinkConfig, PathConfig, Timers};
pub use handshake::{LinkHello, LinkWelcome, PeerFacts, Purpose, Refusal};
pub use link::{DataConnection, Link, LinkError, LinkEvent, LinkHandle, SendError, SessionEnd};
pub use path::PathCounters;
pub use secret::{SECRET_MAX_BYTES, SECRET_MIN_BYTES, Secret, SecretLengthError, Secrets};
pub use tls::TlsSetupError;
