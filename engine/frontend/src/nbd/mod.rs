//! The NBD server of a volume.
//!
//! Fixed newstyle negotiation, simple and structured replies, several connections. [`wire`] and [`plan()`] and
//! [`negotiate`](negotiate()) are pure; [`NbdServer`] is the component of the volume's thread: one receive and one send in flight
//! per connection, many requests taken from one receive and many replies put into one send.

mod config;
mod connection;
mod listen;
pub mod negotiate;
mod plan;
mod server;
mod slots;
mod tx;
pub mod wire;

pub use config::{
    Allocation, AllocationExtent, AllocationSource, ListenAddress, NbdConfig, NbdError, Network,
    ParseNetworkError,
};
pub use negotiate::{Agreed, Export, Step, negotiate};
pub use plan::{Plan, Rules, plan};
pub use server::{NbdServer, ServerState};
pub use wire::parse_request as parse;
