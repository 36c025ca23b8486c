//! The shapes both ends of the control socket share.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

use http_body_util::{BodyExt, Full, combinators::UnsyncBoxBody};
use hyper::body::{Body, Bytes, Frame};
use hyper::{Response, StatusCode, header};
use tokio::sync::mpsc;

use super::api::Answer;

/// Largest request body.
pub(super) const REQUEST_MAX_BYTES: usize = 64 << 10;
/// A body above its bound is read (and dropped) up to here, so that the refusal can be read.
pub(super) const DRAIN_MAX_BYTES: usize = 4 << 20;
/// Largest answer a client takes into memory; events are streamed.
pub(super) const ANSWER_MAX_BYTES: usize = 64 << 20;

pub(super) type Reply = Response<UnsyncBoxBody<Bytes, Infallible>>;

/// A body that another task feeds. It ends when the sender is dropped.
pub(super) struct Feed(pub(super) mpsc::Receiver<Bytes>);

impl Body for Feed {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.0.poll_recv(context).map(|bytes| bytes.map(|bytes| Ok(Frame::data(bytes))))
    }
}

/// A whole body.
pub(super) fn reply(status: StatusCode, kind: &'static str, body: impl Into<Bytes>) -> Reply {
    build(status, kind, UnsyncBoxBody::new(Full::new(body.into())))
}

/// A body that is still being made.
pub(super) fn stream(kind: &'static str, feed: Feed) -> Reply {
    build(StatusCode::OK, kind, feed.boxed_unsync())
}

fn build(status: StatusCode, kind: &'static str, body: UnsyncBoxBody<Bytes, Infallible>) -> Reply {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(kind));
    response
}

/// An answer with the HTTP status that belongs to it.
pub(super) fn answer(answer: &Answer) -> Reply {
    let status = match answer {
        Answer::Ok { .. } => StatusCode::OK,
        Answer::Refused { code, .. } if code == NOT_ALLOWED => StatusCode::FORBIDDEN,
        Answer::Refused { .. } => StatusCode::CONFLICT,
        Answer::Wrong { .. } => StatusCode::BAD_REQUEST,
        Answer::TimedOut { .. } => StatusCode::GATEWAY_TIMEOUT,
        Answer::Stopping { .. } => StatusCode::SERVICE_UNAVAILABLE,
        Answer::Failed { .. } => StatusCode::INTERNAL_SERVER_ERROR,
    };
    json(status, answer)
}

/// Anything as JSON.
pub(super) fn json<T: serde::Serialize>(status: StatusCode, value: &T) -> Reply {
    match serde_json::to_vec(value) {
        Ok(bytes) => reply(status, "application/json", bytes),
        Err(error) => reply(StatusCode::INTERNAL_SERVER_ERROR, "text/plain", error.to_string()),
    }
}

/// Code of a refusal by who asked.
pub(super) const NOT_ALLOWED: &str = "not-allowed";

/// A field of a query, decoded.
pub(super) fn query(query: Option<&str>, name: &str) -> Option<String> {
    let raw = query?.split('&').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='))?;
    let mut decoded = Vec::with_capacity(raw.len());
    let mut bytes = raw.bytes();
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            decoded.push(byte);
            continue;
        }
        let digits = [bytes.next()?, bytes.next()?];
        let digits = std::str::from_utf8(&digits).ok()?;
        decoded.push(u8::from_str_radix(digits, 16).ok()?);
    }
    String::from_utf8(decoded).ok()
}

/// A value as it may stand in a query.
pub(super) fn encode(value: &str) -> String {
    let mut out = String::new();
    for byte in value.bytes() {
        if byte.is_ascii_alphanumeric() || b"-_.:".contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}
