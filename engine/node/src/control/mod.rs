//! The control plane as operators and scripts see it: typed requests and answers over HTTP/JSON on the Unix
//! socket `RUN_DIR/control`.
//!
//! | request | answer |
//! |---|---|
//! | `GET /v1/status[?wait=STATE&timeout_ms=N]` | a [`status::Status`] |
//! | `GET /v1/events[?since=TIME&follow=1]` | one [`crate::events::EventRecord`] a line |
//! | `POST /v1/command` with an [`api::Command`] | an [`api::Answer`] |
//!
//! Everything that is not a success carries an [`api::Answer`].

pub mod api;
pub mod client;
mod http;
pub mod server;
pub mod status;

#[cfg(test)]
mod tests;
