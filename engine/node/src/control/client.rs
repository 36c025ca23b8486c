//! The operator's end of the control socket.

use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;

use super::api::{Answer, Command, Exit, Wait};
use super::http;
use super::status::{Status, Time};
use crate::config::RunDir;
use crate::events::EventRecord;

/// Why there is no answer, or not the one wanted.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens.
    #[error("no daemon answers at {}: {why}; start it with `duplex daemon`, or name its --run-dir", socket.display())]
    NoDaemon {
        /// The socket.
        socket: PathBuf,
        /// In the system's words.
        why: String,
    },
    /// The socket's mode refuses this user.
    #[error("refused: this user may not use {}; call as root or as the daemon's user", socket.display())]
    NoPermission {
        /// The socket.
        socket: PathBuf,
    },
    /// The daemon went away before it had answered.
    #[error("the daemon ended before it answered: {0}")]
    Lost(String),
    /// The answer makes no sense.
    #[error("the daemon's answer cannot be read: {0}; are program and daemon of one version?")]
    Unreadable(String),
    /// The daemon answered something other than success.
    #[error("{}", .0.text())]
    Answered(Answer),
}

impl ClientError {
    /// What the program exits with.
    pub const fn exit(&self) -> Exit {
        match self {
            Self::NoDaemon { .. } | Self::Lost(_) => Exit::NoDaemon,
            Self::NoPermission { .. } => Exit::Refused,
            Self::Unreadable(_) => Exit::Failed,
            Self::Answered(answer) => answer.exit(),
        }
    }
}

/// Speaks to one daemon. One connection a request.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
}

impl Client {
    /// For the daemon of that run directory.
    pub fn new(run_dir: &RunDir) -> Self {
        Self { socket: run_dir.control() }
    }

    /// The socket's path.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The status now.
    ///
    /// # Errors
    /// No daemon, no permission, or an unreadable answer.
    pub async fn status(&self) -> Result<Status, ClientError> {
        self.get_json("/v1/status").await
    }

    /// The status once it shows `wait`. The daemon waits, not we.
    ///
    /// # Errors
    /// As [`Client::status`]; `Answered(TimedOut)` when it did not happen in time.
    pub async fn wait(&self, wait: Wait, timeout: Option<Duration>) -> Result<Status, ClientError> {
        let mut path = format!("/v1/status?wait={}", http::encode(&wait.to_string()));
        if let Some(timeout) = timeout {
            path.push_str(&format!("&timeout_ms={}", timeout.as_millis()));
        }
        self.get_json(&path).await
    }

    /// Carries a command out; any answer of the daemon is `Ok`.
    ///
    /// # Errors
    /// No daemon, no permission, or an unreadable answer.
    pub async fn command(&self, command: &Command) -> Result<Answer, ClientError> {
        let body = serde_json::to_vec(command).map_err(|error| ClientError::Unreadable(error.to_string()))?;
        let response = self.send(Method::POST, "/v1/command", body.into()).await?;
        parse(&collect(response).await?)
    }

    /// Gives each event to `each` until it says false, or the stream ends.
    ///
    /// # Errors
    /// As [`Client::status`]; `Lost` when a followed stream ends because the daemon does.
    pub async fn events(
        &self,
        since: Option<Time>,
        follow: bool,
        mut each: impl FnMut(EventRecord) -> bool,
    ) -> Result<(), ClientError> {
        let mut path = format!("/v1/events?follow={}", u8::from(follow));
        if let Some(since) = since {
            path.push_str(&format!("&since={}", http::encode(&since.to_string())));
        }
        let response = self.send(Method::GET, &path, Bytes::new()).await?;
        if response.status() != StatusCode::OK {
            return Err(ClientError::Answered(parse(&collect(response).await?)?));
        }
        let mut body = response.into_body();
        let mut rest = Vec::new();
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| ClientError::Lost(error.to_string()))?;
            let Ok(data) = frame.into_data() else { continue };
            rest.extend_from_slice(&data);
            while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = rest.drain(..=end).collect();
                if !each(parse(&line)?) {
                    return Ok(());
                }
            }
            if rest.len() > http::REQUEST_MAX_BYTES {
                return Err(ClientError::Unreadable("an event without end".to_owned()));
            }
        }
        if follow { Err(ClientError::Lost("the stream of events ended".to_owned())) } else { Ok(()) }
    }

    async fn get_json(&self, path: &str) -> Result<Status, ClientError> {
        let response = self.send(Method::GET, path, Bytes::new()).await?;
        let good = response.status() == StatusCode::OK;
        let body = collect(response).await?;
        if good { parse(&body) } else { Err(ClientError::Answered(parse(&body)?)) }
    }

    async fn send(&self, method: Method, path: &str, body: Bytes) -> Result<Response<Incoming>, ClientError> {
        let stream = UnixStream::connect(&self.socket).await.map_err(|error| {
            if error.kind() == std::io::ErrorKind::PermissionDenied {
                ClientError::NoPermission { socket: self.socket.clone() }
            } else {
                ClientError::NoDaemon { socket: self.socket.clone(), why: error.to_string() }
            }
        })?;
        let lost = |error: hyper::Error| ClientError::Lost(error.to_string());
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(lost)?;
        tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(hyper::header::HOST, "duplex")
            .header(hyper::header::CONTENT_TYPE, "application/json")
            .body(Full::new(body))
            .map_err(|error| ClientError::Unreadable(error.to_string()))?;
        sender.send_request(request).await.map_err(lost)
    }
}

async fn collect(response: Response<Incoming>) -> Result<Bytes, ClientError> {
    let body = Limited::new(response.into_body(), http::ANSWER_MAX_BYTES).collect().await;
    Ok(body.map_err(|error| ClientError::Lost(error.to_string()))?.to_bytes())
}

fn parse<T: serde::de::DeserializeOwned>(bytes: &[u8]) -> Result<T, ClientError> {
    serde_json::from_slice(bytes).map_err(|error| ClientError::Unreadable(error.to_string()))
}
