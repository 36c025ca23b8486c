//! The first frames of a connection: proof of the secret, then the facts both must agree on.
//!
//! ```text
//! dialler                              listener
//!   [TLS 1.3 handshake]
//!   Greeting {nonce, name, session} ->
//!                                   <- Greeting {nonce, name}
//!   Proof                           ->             nothing else was read before this
//!                                   <- Proof
//!   LinkHello                       ->
//!                                   <- LinkWelcome or LinkRefusal
//! ```

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use duplex_core::ids::{BootId, Incarnation, ServerName, SessionId};
use serde::{Deserialize, Serialize};
use socket2::{SockRef, TcpKeepalive};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;

use crate::config::{Encryption, LinkConfig};
use crate::control::whole_frame;
use crate::frame::{
    Channel, Fields, FrameError, INLINE_MAX_BYTES, Kind, NAME_MAX_BYTES, Routing, spoken_versions,
};
use crate::secret::{Role, Secrets, SharedSecrets, Transcript};
use crate::stream::{Frame, Stream, StreamError};
use crate::tls::{Tls, TlsSetupError};

/// Most bytes read from a socket before its owner has proved who it is.
pub(crate) const UNPROVEN_MAX_BYTES: usize = 64 << 10;
/// First byte of a TLS connection.
const TLS_HANDSHAKE_BYTE: u8 = 0x16;
/// Bytes of nonce and session at the start of a greeting.
const NONCE_BYTES: usize = 32;
const SESSION_BYTES: usize = 16;
/// A connection whose bytes the other kernel does not take for so long is over: another one is made.
const STUCK_AFTER: Duration = Duration::from_secs(5);
/// Socket buffers of a data connection.
const DATA_BUFFER_BYTES: usize = 4 << 20;

/// What a connection is for.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "for", rename_all = "kebab-case")]
pub enum Purpose {
    /// The control connection of a path.
    Control {
        /// Its position.
        path: u16,
    },
    /// A volume's data, in the session that the greeting names.
    Data {
        /// On which path.
        path: u16,
        /// The volume's position.
        volume: u16,
        /// Its name: the position alone could mean another volume over there.
        name: String,
        /// Counts the connections of this volume in this session; the newest one is used.
        attempt: u64,
    },
}

impl Purpose {
    pub(crate) const fn path(&self) -> u16 {
        match self {
            Self::Control { path } | Self::Data { path, .. } => *path,
        }
    }
}

/// The dialler's facts.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinkHello {
    /// Lowest and highest protocol version.
    pub versions: (u8, u8),
    /// Name of the pair.
    pub pair_name: String,
    /// Whom the dialler wants to speak to.
    pub wanted: ServerName,
    /// Which address it dialled.
    pub dialled: SocketAddr,
    /// Its process.
    pub incarnation: Incarnation,
    /// Its boot.
    pub boot_id: BootId,
    /// Largest frame it takes.
    pub frame_max_bytes: u32,
    /// What the connection is for.
    pub purpose: Purpose,
}

/// The listener's facts.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinkWelcome {
    /// The version both speak.
    pub version: u8,
    /// Its process.
    pub incarnation: Incarnation,
    /// Its boot.
    pub boot_id: BootId,
    /// Largest frame it takes.
    pub frame_max_bytes: u32,
}

/// Why the two do not fit together: a stable code and both values.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Refusal {
    /// `encryption`, `secret`, `version`, `pair`, `server-name`, `address`, `volume`, `attempt` or `session-unknown`.
    pub code: String,
    /// The value of the server that says it.
    pub mine: String,
    /// The value of the other one.
    pub theirs: String,
}

impl Refusal {
    pub(crate) fn new(code: &str, mine: impl ToString, theirs: impl ToString) -> Self {
        Self { code: code.to_owned(), mine: mine.to_string(), theirs: theirs.to_string() }
    }

    /// As the other server sees it.
    fn swapped(self) -> Self {
        Self { code: self.code, mine: self.theirs, theirs: self.mine }
    }
}

/// What is known of the peer after a handshake.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PeerFacts {
    /// Its process.
    pub incarnation: Incarnation,
    /// Its boot.
    pub boot_id: BootId,
    /// Largest frame both take.
    pub frame_max_bytes: u32,
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HandshakeError {
    /// The other end did not prove that it holds the secret.
    #[error("{0}")]
    Stranger(String),
    /// The connection ended, or nothing came, before anything could be proved.
    #[error("{0}")]
    Vanished(String),
    /// It is the peer, but the two do not fit.
    #[error("refused ({}): here {:?}, there {:?}", .0.code, .0.mine, .0.theirs)]
    Refused(Refusal),
    /// The network.
    #[error("{0}")]
    Connection(#[from] StreamError),
}

/// What every handshake needs.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) config: LinkConfig,
    pub(crate) secrets: SharedSecrets,
    pub(crate) tls: Tls,
}

impl Shared {
    pub(crate) fn new(config: LinkConfig) -> Result<Arc<Self>, TlsSetupError> {
        let secrets = SharedSecrets::new(config.secrets.clone());
        Ok(Arc::new(Self { config, secrets, tls: Tls::new()? }))
    }

    fn greeting(&self, role: Role, session: SessionId) -> Result<Vec<u8>, StreamError> {
        let nonce: [u8; NONCE_BYTES] = rand::random();
        let mut body = nonce.to_vec();
        body.extend_from_slice(&session.0.to_le_bytes());
        body.extend_from_slice(self.config.server.0.as_bytes());
        Ok(frame(Kind::Greeting, role.number(), &body)?)
    }

    fn facts(&self, incarnation: Incarnation, boot_id: BootId, frame_max_bytes: u32) -> PeerFacts {
        let frame_max_bytes = frame_max_bytes.min(self.config.frame_max_bytes);
        PeerFacts { incarnation, boot_id, frame_max_bytes }
    }
}

fn frame(kind: Kind, flags: u8, body: &[u8]) -> Result<Vec<u8>, FrameError> {
    let routing = Routing { channel: Channel::Control, sequence: 0, ack: 0 };
    whole_frame(routing, Fields { flags, ..Fields::of(kind) }, body)
        .map_err(|_| FrameError::Malformed { kind, what: "a name or an address is too long for the frame" })
}

fn json_frame<T: Serialize>(kind: Kind, value: &T) -> Result<Vec<u8>, FrameError> {
    let body = serde_json::to_vec(value)
        .map_err(|_| FrameError::Malformed { kind, what: "it cannot be written as JSON" })?;
    frame(kind, 0, &body)
}

fn json_body<'a, T: Deserialize<'a>>(frame: &'a Frame) -> Result<T, FrameError> {
    let kind = frame.header.fields.kind;
    serde_json::from_slice(&frame.body)
        .map_err(|_| FrameError::Malformed { kind, what: "not as this version writes it" })
}

fn wanted(frame: &Frame, kind: Kind) -> Result<(), FrameError> {
    let found = frame.header.fields.kind;
    if found == kind {
        Ok(())
    } else {
        Err(FrameError::Unexpected { kind: found, place: "at this point of the handshake" })
    }
}

/// A greeting's frame (again as bytes, for the transcript), name and session.
struct Greeted {
    bytes: Vec<u8>,
    name: ServerName,
    session: SessionId,
}

fn greeted(frame: &Frame, role: Role) -> Result<Greeted, FrameError> {
    let kind = Kind::Greeting;
    wanted(frame, kind)?;
    let malformed = |what| FrameError::Malformed { kind, what };
    if frame.header.fields != (Fields { flags: role.number(), ..Fields::of(kind) }) {
        return Err(malformed("wrong role, or a field that is not 0"));
    }
    let name_at = NONCE_BYTES + SESSION_BYTES;
    let name = frame.body.get(name_at..).filter(|name| name.len() <= NAME_MAX_BYTES as usize);
    let name = str::from_utf8(name.ok_or(malformed("not a nonce, a session and a name"))?)
        .map_err(|_| malformed("the name is not UTF-8"))?;
    let session = frame.body[NONCE_BYTES..].first_chunk().ok_or(malformed("no session"))?;
    let mut bytes = frame.header.encode().to_vec();
    bytes.extend_from_slice(&frame.body);
    Ok(Greeted {
        bytes,
        name: ServerName(name.to_owned()),
        session: SessionId(u128::from_le_bytes(*session)),
    })
}

/// Socket options of a connection.
fn tune(tcp: &TcpStream, purpose: &Purpose) -> Result<(), StreamError> {
    tcp.set_nodelay(true)?;
    let socket = SockRef::from(tcp);
    let keepalive = TcpKeepalive::new().with_time(STUCK_AFTER).with_interval(Duration::from_secs(1));
    socket.set_tcp_keepalive(&keepalive.with_retries(3))?;
    // One flow that is swallowed on the way (a firewall that forgot it) while its path answers.
    socket.set_tcp_user_timeout(Some(STUCK_AFTER))?;
    match purpose {
        Purpose::Control { .. } => {}
        Purpose::Data { .. } => {
            // The kernel may grant less; that costs speed only.
            socket.set_send_buffer_size(DATA_BUFFER_BYTES)?;
            socket.set_recv_buffer_size(DATA_BUFFER_BYTES)?;
        }
    }
    Ok(())
}

async fn connect(shared: &Shared, path: u16) -> Result<TcpStream, HandshakeError> {
    let config = shared.config.paths.get(usize::from(path)).ok_or_else(|| {
        HandshakeError::Refused(Refusal::new("address", format!("path {path} is not configured"), ""))
    })?;
    let attempt = async {
        let socket = if config.peer.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        if config.listen.is_ipv4() == config.peer.is_ipv4() {
            socket.bind(SocketAddr::new(config.listen.ip(), 0))?;
        }
        socket.connect(config.peer).await
    };
    let deadline = shared.config.timers.connect;
    let connected = timeout(deadline, attempt).await.map_err(|_| StreamError::Deadline(deadline))?;
    Ok(connected.map_err(StreamError::from)?)
}

/// Connects and goes through the handshake as the dialler.
pub(crate) async fn dial(
    shared: &Shared,
    purpose: &Purpose,
    session: SessionId,
) -> Result<(Stream, PeerFacts), HandshakeError> {
    let tcp = connect(shared, purpose.path()).await?;
    let deadline = shared.config.timers.handshake;
    timeout(deadline, dial_connected(shared, tcp, purpose, session))
        .await
        .unwrap_or(Err(StreamError::Deadline(deadline).into()))
}

async fn dial_connected(
    shared: &Shared,
    tcp: TcpStream,
    purpose: &Purpose,
    session: SessionId,
) -> Result<(Stream, PeerFacts), HandshakeError> {
    tune(&tcp, purpose)?;
    let tls = match shared.config.encryption {
        Encryption::Tls => Some(shared.tls.dial().map_err(StreamError::from)?),
        Encryption::Off => None,
    };
    let mut stream = Stream::new(tcp, tls, UNPROVEN_MAX_BYTES);
    if let Err(error) = stream.secure().await {
        let plain = stream.first_byte().is_some_and(|byte| byte != TLS_HANDSHAKE_BYTE && byte != 0x15);
        return Err(if plain {
            HandshakeError::Refused(Refusal::new("encryption", Encryption::Tls.word(), "off"))
        } else {
            error.into()
        });
    }
    let mine = shared.greeting(Role::Dialler, session)?;
    stream.send(&mine).await?;
    let answer = receive_or_refusal(&mut stream).await?;
    let theirs = greeted(&answer, Role::Listener).map_err(StreamError::from)?;
    let binding = stream.binding().map_err(StreamError::from)?;
    let transcript = Transcript { binding, dialler: mine, listener: theirs.bytes };
    prove(&mut stream, &transcript, &shared.secrets.get(), Role::Dialler).await?;
    let proof = receive_or_refusal(&mut stream).await?;
    verify(&proof, &transcript, &shared.secrets.get(), Role::Listener)?;
    stream.trust();
    agree_as_dialler(shared, stream, purpose, &theirs.name).await
}

async fn agree_as_dialler(
    shared: &Shared,
    mut stream: Stream,
    purpose: &Purpose,
    name: &ServerName,
) -> Result<(Stream, PeerFacts), HandshakeError> {
    let config = &shared.config;
    let dialled = config.paths.get(usize::from(purpose.path())).map(|path| path.peer);
    let hello = LinkHello {
        versions: spoken_versions(),
        pair_name: config.pair_name.clone(),
        wanted: config.peer.clone(),
        dialled: dialled.unwrap_or_else(|| SocketAddr::from(([0, 0, 0, 0], 0))),
        incarnation: config.incarnation,
        boot_id: config.boot_id,
        frame_max_bytes: config.frame_max_bytes,
        purpose: purpose.clone(),
    };
    stream.send(&json_frame(Kind::LinkHello, &hello).map_err(StreamError::from)?).await?;
    let answer = receive_or_refusal(&mut stream).await?;
    wanted(&answer, Kind::LinkWelcome).map_err(StreamError::from)?;
    let welcome: LinkWelcome = json_body(&answer).map_err(StreamError::from)?;
    if *name != config.peer {
        return Err(HandshakeError::Refused(Refusal::new("server-name", &config.peer, name)));
    }
    let (lowest, highest) = spoken_versions();
    if !(lowest..=highest).contains(&welcome.version) {
        let mine = format!("{lowest} to {highest}");
        return Err(HandshakeError::Refused(Refusal::new("version", mine, welcome.version)));
    }
    Ok((stream, shared.facts(welcome.incarnation, welcome.boot_id, welcome.frame_max_bytes)))
}

async fn receive_or_refusal(stream: &mut Stream) -> Result<Frame, HandshakeError> {
    let frame = stream.receive(INLINE_MAX_BYTES).await?;
    if frame.header.fields.kind == Kind::LinkRefusal {
        let refusal: Refusal = json_body(&frame).map_err(StreamError::from)?;
        return Err(HandshakeError::Refused(refusal.swapped()));
    }
    Ok(frame)
}

async fn prove(
    stream: &mut Stream,
    transcript: &Transcript,
    secrets: &Secrets,
    role: Role,
) -> Result<(), HandshakeError> {
    let proofs = transcript.proofs(secrets, role);
    Ok(stream.send(&frame(Kind::Proof, role.number(), &proofs).map_err(StreamError::from)?).await?)
}

fn verify(
    proof: &Frame,
    transcript: &Transcript,
    secrets: &Secrets,
    role: Role,
) -> Result<Secrets, HandshakeError> {
    wanted(proof, Kind::Proof).map_err(|error| HandshakeError::Stranger(error.to_string()))?;
    match transcript.verify(secrets, role, &proof.body) {
        Some(current) => Ok(Secrets { current, other: None }),
        None => Err(HandshakeError::Stranger("it does not hold the pair's secret".to_owned())),
    }
}

/// What a dialler that proved itself wants; [`Accepted::welcome`] or [`Accepted::refuse`] answers it.
pub(crate) struct Accepted {
    stream: Stream,
    pub(crate) purpose: Purpose,
    pub(crate) session: SessionId,
    pub(crate) peer: PeerFacts,
    version: u8,
}

/// Goes through the handshake as the listener, up to the peer's hello. Everything that happens before the proof
/// was checked makes the other end a stranger.
pub(crate) async fn accept(shared: &Shared, tcp: TcpStream) -> Result<Accepted, HandshakeError> {
    let (mut stream, greeted) = match prove_as_listener(shared, tcp).await {
        Err(HandshakeError::Connection(error)) => Err(unproven(&error)),
        other => other,
    }?;
    stream.trust();
    let frame = stream.receive(INLINE_MAX_BYTES).await?;
    wanted(&frame, Kind::LinkHello).map_err(StreamError::from)?;
    let hello: LinkHello = json_body(&frame).map_err(StreamError::from)?;
    match judge(&shared.config, &hello, &greeted.name) {
        Ok(version) => Ok(Accepted {
            stream,
            session: greeted.session,
            peer: shared.facts(hello.incarnation, hello.boot_id, hello.frame_max_bytes),
            purpose: hello.purpose,
            version,
        }),
        Err(refusal) => Err(refuse(stream, refusal).await),
    }
}

/// A connection that ended before the proof: by what was said, or by itself?
pub(crate) fn unproven(error: &StreamError) -> HandshakeError {
    match error {
        StreamError::Closed | StreamError::Io(_) | StreamError::Deadline(_) => {
            HandshakeError::Vanished(error.to_string())
        }
        StreamError::Tls(_) | StreamError::Frame(_) | StreamError::TooMuch { .. } => {
            HandshakeError::Stranger(error.to_string())
        }
    }
}

/// Sends the refusal, best effort, and returns it as the error.
async fn refuse(mut stream: Stream, refusal: Refusal) -> HandshakeError {
    if let Ok(frame) = json_frame(Kind::LinkRefusal, &refusal) {
        // The connection ends either way.
        let _ = stream.send(&frame).await;
    }
    HandshakeError::Refused(refusal)
}

async fn prove_as_listener(shared: &Shared, tcp: TcpStream) -> Result<(Stream, Greeted), HandshakeError> {
    tcp.set_nodelay(true).map_err(StreamError::from)?;
    let mut first = [0];
    if tcp.peek(&mut first).await.map_err(StreamError::from)? == 0 {
        return Err(StreamError::Closed.into());
    }
    let encryption = shared.config.encryption;
    let offered = if first[0] == TLS_HANDSHAKE_BYTE { Encryption::Tls } else { Encryption::Off };
    if offered != encryption {
        let refusal = Refusal::new("encryption", encryption.word(), offered.word());
        refuse(Stream::new(tcp, None, UNPROVEN_MAX_BYTES), refusal).await;
        let text = format!("encryption is {} here, {} there", encryption.word(), offered.word());
        return Err(HandshakeError::Stranger(text));
    }
    let tls = match encryption {
        Encryption::Tls => Some(shared.tls.accept().map_err(StreamError::from)?),
        Encryption::Off => None,
    };
    let mut stream = Stream::new(tcp, tls, UNPROVEN_MAX_BYTES);
    stream.secure().await?;
    let greeting = stream.receive(Kind::Greeting.body_limit_bytes()).await?;
    let theirs = greeted(&greeting, Role::Dialler).map_err(StreamError::from)?;
    let mine = shared.greeting(Role::Listener, SessionId::NONE)?;
    stream.send(&mine).await?;
    let binding = stream.binding().map_err(StreamError::from)?;
    let transcript = Transcript { binding, dialler: theirs.bytes.clone(), listener: mine };
    let proof = stream.receive(Kind::Proof.body_limit_bytes()).await?;
    match verify(&proof, &transcript, &shared.secrets.get(), Role::Dialler) {
        Ok(matched) => {
            prove(&mut stream, &transcript, &matched, Role::Listener).await?;
            Ok((stream, theirs))
        }
        Err(error) => {
            refuse(stream, Refusal::new("secret", "", "")).await;
            Err(error)
        }
    }
}

/// Does the dialler fit? The version both speak.
fn judge(config: &LinkConfig, hello: &LinkHello, name: &ServerName) -> Result<u8, Refusal> {
    let (lowest, highest) = spoken_versions();
    let (their_lowest, their_highest) = hello.versions;
    let version = highest.min(their_highest);
    if version < lowest.max(their_lowest) {
        let range = |lowest, highest| format!("{lowest} to {highest}");
        return Err(Refusal::new("version", range(lowest, highest), range(their_lowest, their_highest)));
    }
    if hello.pair_name != config.pair_name {
        return Err(Refusal::new("pair", &config.pair_name, &hello.pair_name));
    }
    if *name != config.peer {
        return Err(Refusal::new("server-name", format!("peer {}", config.peer), name));
    }
    if hello.wanted != config.server {
        return Err(Refusal::new("server-name", &config.server, format!("peer {}", hello.wanted)));
    }
    let path = config.paths.get(usize::from(hello.purpose.path()));
    if path.map(|path| path.address) != Some(hello.dialled) {
        let mine = path.map_or_else(|| "no such path".to_owned(), |path| path.address.to_string());
        return Err(Refusal::new("address", mine, hello.dialled));
    }
    if let Purpose::Data { volume, name, .. } = &hello.purpose
        && config.volumes.get(usize::from(*volume)) != Some(name)
    {
        let mine = config.volumes.get(usize::from(*volume)).map_or("none", String::as_str);
        return Err(Refusal::new("volume", format!("{volume} is {mine}"), format!("{volume} is {name}")));
    }
    Ok(version)
}

impl Accepted {
    pub(crate) async fn welcome(self, shared: &Shared) -> Result<Stream, HandshakeError> {
        let Self { mut stream, version, purpose, .. } = self;
        tune(stream.tcp(), &purpose)?;
        let welcome = LinkWelcome {
            version,
            incarnation: shared.config.incarnation,
            boot_id: shared.config.boot_id,
            frame_max_bytes: shared.config.frame_max_bytes,
        };
        stream.send(&json_frame(Kind::LinkWelcome, &welcome).map_err(StreamError::from)?).await?;
        Ok(stream)
    }

    pub(crate) async fn refuse(self, refusal: Refusal) -> HandshakeError {
        refuse(self.stream, refusal).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_without_a_common_one_are_refused_with_both_ranges() {
        let path = crate::PathConfig::new(([127, 0, 0, 1], 1).into(), ([127, 0, 0, 1], 2).into());
        let secret = crate::Secret::new(&[1; 32]).expect("32 bytes");
        let config = LinkConfig {
            server: ServerName("beta".into()),
            peer: ServerName("alpha".into()),
            pair_name: "p".into(),
            paths: vec![path],
            secrets: Secrets { current: secret, other: None },
            encryption: Encryption::Off,
            incarnation: Incarnation(1),
            boot_id: BootId(1),
            volumes: vec!["v".into()],
            frame_max_bytes: LinkConfig::frame_limit_bytes(),
            timers: crate::Timers::default(),
        };
        let hello = |versions| LinkHello {
            versions,
            pair_name: "p".into(),
            wanted: ServerName("beta".into()),
            dialled: path.address,
            incarnation: Incarnation(2),
            boot_id: BootId(2),
            frame_max_bytes: 1 << 20,
            purpose: Purpose::Control { path: 0 },
        };
        let name = ServerName("alpha".into());
        let refused = judge(&config, &hello((2, 3)), &name);
        assert_eq!(refused, Err(Refusal::new("version", "1 to 1", "2 to 3")));
        assert_eq!(judge(&config, &hello((1, 3)), &name), Ok(1), "the highest common one");
        let nowhere = LinkHello { purpose: Purpose::Control { path: 9 }, ..hello((1, 1)) };
        assert_eq!(judge(&config, &nowhere, &name).map_err(|refusal| refusal.code), Err("address".into()));
    }

    #[test]
    fn a_refusal_turns_round_at_the_other_server() {
        let refusal = Refusal::new("pair", "a", "b");
        assert_eq!(refusal.clone().swapped(), Refusal::new("pair", "b", "a"));
        assert_eq!(refusal.clone().swapped().swapped(), refusal);
    }
}
