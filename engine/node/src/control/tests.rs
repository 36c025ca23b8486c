use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use duplex_core::event::Event;
use duplex_core::ids::{Epoch, Generation, ServerName};
use duplex_core::mirror::api::Priority;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{mpsc, watch};

use super::api::{Answer, Command, Direction, Exit, Explanation, PromoteMode, Wait};
use super::client::{Client, ClientError};
use super::server::{Backend, BindError, Call, bind, serve};
use super::status::*;
use crate::config::RunDir;
use crate::events::EventLog;

fn server(name: &str) -> ServerName {
    ServerName(name.to_owned())
}

pub(crate) fn page(state: State, role: Role) -> Status {
    Status {
        version: STATUS_VERSION,
        pair: "shop".to_owned(),
        server: server("alpha"),
        state,
        role,
        epoch: Epoch { number: 3, holder: Some(server("alpha")) },
        reason: None,
        peer: Peer { server: server("beta"), state: None, role: None, heard_ms: None },
        link: vec![],
        lan: vec![],
        witness: None,
        policy: "manual".to_owned(),
        frozen: None,
        refusal: None,
        volumes: vec![VolumeStatus {
            name: "data".to_owned(),
            size_bytes: Some(1 << 30),
            device: None,
            nbd: None,
            copy: CopyState::UpToDate,
            peer_copy: CopyState::Unknown,
            generation: Some(Generation(7)),
            dirty_blocks: 0,
            block_bytes: 4096,
            resync: None,
        }],
        memory: vec![],
    }
}

fn event(kind: &str) -> Event {
    Event {
        server: server("alpha"),
        kind: kind.to_owned(),
        text: "text".to_owned(),
        reason: "reason".to_owned(),
        epoch: Epoch::never(),
        state_before: "joining".to_owned(),
        state_after: "mirrored".to_owned(),
        peer_state: None,
        evidence: BTreeMap::new(),
        fields: BTreeMap::new(),
    }
}

struct Daemon {
    dir: tempfile::TempDir,
    client: Client,
    status: watch::Sender<Arc<Status>>,
    calls: Option<mpsc::Receiver<Call>>,
    events: EventLog,
    stop: watch::Sender<bool>,
    serving: tokio::task::JoinHandle<()>,
    refused: Arc<AtomicU32>,
}

fn daemon() -> Daemon {
    let dir = tempfile::tempdir().expect("directory");
    let run_dir = RunDir::new(&dir.path().join("run"));
    let (status, status_seen) = watch::channel(Arc::new(page(State::Joining, Role::Secondary)));
    let (commands, calls) = mpsc::channel(8);
    let events = EventLog::open(&dir.path().join("state"), &server("alpha")).expect("events");
    let refused = Arc::new(AtomicU32::new(0));
    let counter = Arc::clone(&refused);
    let backend = Backend {
        commands,
        status: status_seen,
        events: events.clone(),
        on_refused: Arc::new(move |caller| counter.store(caller.uid, Ordering::SeqCst)),
    };
    let (stop, stopped) = watch::channel(false);
    let listener = bind(&run_dir).expect("bound");
    let serving = tokio::spawn(serve(listener, backend, stopped));
    Daemon { client: Client::new(&run_dir), dir, status, calls: Some(calls), events, stop, serving, refused }
}

#[test]
fn the_page_has_every_field_and_nulls() {
    let value = serde_json::to_value(page(State::Mirrored, Role::Primary)).expect("JSON");
    let keys: Vec<&str> = value.as_object().expect("object").keys().map(String::as_str).collect();
    for key in [
        "version", "pair", "server", "state", "role", "epoch", "reason", "peer", "link", "lan", "witness",
        "policy", "frozen", "refusal", "volumes", "memory",
    ] {
        assert!(keys.contains(&key), "{key}");
    }
    assert_eq!(value["state"], "mirrored");
    assert_eq!(value["epoch"]["holder"], "alpha");
    assert!(value["witness"].is_null() && value["frozen"].is_null() && value["reason"].is_null());
    assert_eq!(value["volumes"][0]["generation"], "00000000000000000000000000000007");
    assert_eq!(value["volumes"][0]["copy"], "up-to-date");
    assert!(value["volumes"][0]["resync"].is_null());
    let back: Status = serde_json::from_value(value).expect("read back");
    assert_eq!(back, page(State::Mirrored, Role::Primary));
    let time: Time = "2026-11-21T12:00:00Z".parse().expect("time");
    assert_eq!(time.to_string(), "2026-11-21T12:00:00.000Z");
}

#[test]
fn commands_and_answers_survive_the_wire() {
    let all = [
        Command::Activate,
        Command::Promote { mode: PromoteMode::Plain },
        Command::Promote { mode: PromoteMode::PeerIsDown },
        Command::Promote { mode: PromoteMode::Force(Generation(9)) },
        Command::Demote { force: true },
        Command::Switchover { force: false },
        Command::Connect,
        Command::Disconnect,
        Command::Detach { volume: "data".to_owned() },
        Command::Attach { volume: "data".to_owned() },
        Command::ResyncPause,
        Command::ResyncResume,
        Command::ResyncPriority { priority: Priority::Low },
        Command::ResyncMaxRate { max_bytes_per_s: 5 },
        Command::ResyncStartFull { volume: "data".to_owned(), target: server("beta") },
        Command::Explain { volume: None },
        Command::Resolve { victim: server("beta") },
        Command::Dump { volume: "data".to_owned() },
        Command::Down,
    ];
    for command in all {
        let text = serde_json::to_string(&command).expect("JSON");
        assert_eq!(serde_json::from_str::<Command>(&text).expect("back"), command, "{text}");
    }
    assert!(serde_json::from_str::<Command>(r#"{"verb":"demote","force":true,"colour":1}"#).is_err());
    let exits = [
        (Answer::ok("x"), Exit::Done),
        (Answer::refused("in-use", "x"), Exit::Refused),
        (Answer::Wrong { text: "x".to_owned() }, Exit::Wrong),
        (Answer::Stopping { text: "x".to_owned() }, Exit::NoDaemon),
        (Answer::TimedOut { text: "x".to_owned() }, Exit::TimedOut),
        (Answer::Failed { text: "x".to_owned() }, Exit::Failed),
    ];
    for (number, (answer, exit)) in exits.into_iter().enumerate() {
        assert_eq!(answer.exit(), exit);
        assert_eq!(usize::from(exit.code()), number);
    }
}

#[test]
fn waits_parse() {
    assert_eq!("mirrored".parse(), Ok(Wait::State(State::Mirrored)));
    assert_eq!("state=alone".parse(), Ok(Wait::State(State::Alone)));
    assert_eq!("role=primary".parse(), Ok(Wait::Role(Role::Primary)));
    assert!("primary".parse::<Wait>().expect_err("a role needs role=").contains("role=primary"));
    assert!("role=king".parse::<Wait>().is_err());
}

#[test]
fn explanations_show_the_generation_to_type() {
    let one = Explanation {
        volume: "data".to_owned(),
        rule: Some("D9 descends".to_owned()),
        direction: Direction::ToPeer,
        full: false,
        copy_bytes: 4096,
        lost_bytes: 0,
        generation: Some(Generation(0xabc)),
        text: "would be copied to beta".to_owned(),
    };
    let answer = Explanation::answer(&[one]);
    assert!(answer.text().contains("00000000000000000000000000000abc"));
    let Answer::Ok { data: Some(data), .. } = answer else { panic!("{answer:?}") };
    assert_eq!(data[0]["direction"], "to-peer");
}

#[tokio::test]
async fn status_commands_and_refusals() {
    use std::os::unix::fs::PermissionsExt;
    let mut daemon = daemon();
    let mode = std::fs::metadata(daemon.client.socket()).expect("socket").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    assert_eq!(daemon.client.status().await.expect("status").state, State::Joining);
    let mut calls = daemon.calls.take().expect("calls");
    let answering = tokio::spawn(async move {
        let mut seen = Vec::new();
        while let Some(call) = calls.recv().await {
            assert_eq!(call.caller.uid, rustix::process::geteuid().as_raw());
            let answer = if matches!(call.command, Command::Promote { .. }) {
                Answer::refused("peer-not-heard", "no")
            } else {
                Answer::ok(call.command.verb())
            };
            seen.push(call.command);
            let _ = call.reply.send(answer);
        }
        seen
    });
    let answer = daemon.client.command(&Command::Activate).await.expect("answer");
    assert_eq!(answer, Answer::ok("activate"));
    let answer = daemon.client.command(&Command::Promote { mode: PromoteMode::Plain }).await.expect("answer");
    assert_eq!(answer, Answer::refused("peer-not-heard", "no"));
    daemon.stop.send_replace(true);
    daemon.serving.await.expect("served");
    assert!(!daemon.client.socket().exists(), "the socket is gone after the stop");
    assert_eq!(answering.await.expect("answered").len(), 2);
    assert_eq!(daemon.client.status().await.expect_err("gone").exit(), Exit::NoDaemon);
}

#[tokio::test]
async fn waiting_is_done_by_the_daemon() {
    let daemon = daemon();
    let client = daemon.client.clone();
    let waiting = tokio::spawn(async move { client.wait(Wait::Role(Role::Primary), None).await });
    let timed_out = daemon.client.wait(Wait::State(State::Alone), Some(Duration::from_millis(20))).await;
    let error = timed_out.expect_err("never alone");
    assert_eq!(error.exit(), Exit::TimedOut);
    assert!(error.to_string().contains("alpha is joining"), "{error}");
    daemon.status.send_replace(Arc::new(page(State::Mirrored, Role::Primary)));
    assert_eq!(waiting.await.expect("ran").expect("status").state, State::Mirrored);
    let client = daemon.client.clone();
    let hanging = tokio::spawn(async move { client.wait(Wait::State(State::Down), None).await });
    // The one that hangs is in the daemon once this later one is answered.
    daemon.client.status().await.expect("status");
    daemon.stop.send_replace(true);
    let error = hanging.await.expect("ran").expect_err("the daemon stops");
    assert_eq!(error.exit(), Exit::NoDaemon, "{error}");
}

#[tokio::test]
async fn what_is_under_way_is_answered_when_the_daemon_stops() {
    let mut daemon = daemon();
    let mut calls = daemon.calls.take().expect("calls");
    let client = daemon.client.clone();
    let dropped = tokio::spawn(async move { client.command(&Command::Connect).await });
    let call = calls.recv().await.expect("call");
    daemon.stop.send_replace(true);
    drop(call);
    let answer = dropped.await.expect("ran").expect("an answer");
    assert_eq!(answer.exit(), Exit::NoDaemon);
    daemon.serving.await.expect("served");
}

#[tokio::test]
async fn down_is_answered_by_the_stopping_daemon() {
    let mut daemon = daemon();
    let mut calls = daemon.calls.take().expect("calls");
    let client = daemon.client.clone();
    let down = tokio::spawn(async move { client.command(&Command::Down).await });
    let call = calls.recv().await.expect("call");
    daemon.stop.send_replace(true);
    // The server has seen the stop once its socket is gone; the connection saw it in the same turn.
    while daemon.client.socket().exists() {
        tokio::task::yield_now().await;
    }
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    call.reply.send(Answer::ok("handed over to beta")).expect("the server waits for it");
    assert_eq!(down.await.expect("ran").expect("an answer"), Answer::ok("handed over to beta"));
}

#[tokio::test]
async fn events_with_and_without_follow() {
    let daemon = daemon();
    for kind in ["started", "joining"] {
        daemon.events.append(event(kind)).expect("written");
    }
    let mut kinds = Vec::new();
    let ended = daemon.client.events(None, false, |record| {
        kinds.push(record.kind);
        true
    });
    ended.await.expect("events");
    assert_eq!(kinds, ["started", "joining"]);
    let future = Time("2999-01-01T00:00:00Z".parse().expect("time"));
    let client = daemon.client.clone();
    let (sender, mut seen) = mpsc::unbounded_channel();
    let following = tokio::spawn(async move {
        client.events(Some(future), true, |record| sender.send(record.kind).is_ok()).await
    });
    let client = daemon.client.clone();
    let all = Arc::new(Mutex::new(Vec::new()));
    let collected = Arc::clone(&all);
    let second = tokio::spawn(async move {
        client
            .events(None, true, |record| {
                let mut all = collected.lock().expect("lock");
                all.push(record.kind);
                all.len() < 4
            })
            .await
    });
    // Written until the follower, which asked for nothing older, has seen one: it is connected then.
    let first = loop {
        daemon.events.append(event("synced")).expect("written");
        tokio::task::yield_now().await;
        if let Ok(Some(kind)) = tokio::time::timeout(Duration::from_millis(20), seen.recv()).await {
            break kind;
        }
    };
    assert_eq!(first, "synced", "nothing older than since");
    daemon.events.append(event("link-lost")).expect("written");
    second.await.expect("ran").expect("left by itself");
    assert_eq!(all.lock().expect("lock")[..3], ["started", "joining", "synced"]);
    daemon.stop.send_replace(true);
    assert!(matches!(following.await.expect("ran"), Err(ClientError::Lost(_))));
}

async fn raw(daemon: &Daemon, bytes: &[u8]) -> String {
    let mut stream = tokio::net::UnixStream::connect(daemon.client.socket()).await.expect("connected");
    // A refusal may come before everything is written; the answer is what counts.
    let _ = stream.write_all(bytes).await;
    let _ = stream.shutdown().await;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.expect("an answer, not a reset");
    String::from_utf8_lossy(&answer).into_owned()
}

#[tokio::test]
async fn bad_requests_are_answered() {
    let daemon = daemon();
    let huge = format!(
        "POST /v1/command HTTP/1.1\r\nHost: d\r\nContent-Length: 1000000\r\n\r\n{}",
        "x".repeat(1_000_000)
    );
    let cases = [
        ("GET /v2/status HTTP/1.1\r\nHost: d\r\n\r\n".to_owned(), " 404 ", "/v1/status"),
        ("POST /v1/status HTTP/1.1\r\nHost: d\r\nContent-Length: 0\r\n\r\n".to_owned(), " 404 ", "wrong"),
        ("POST /v1/command HTTP/1.1\r\nHost: d\r\nContent-Length: 2\r\n\r\n{}".to_owned(), " 400 ", "verb"),
        ("GET /v1/status?wait=happy HTTP/1.1\r\nHost: d\r\n\r\n".to_owned(), " 400 ", "mirrored"),
        ("GET /v1/status?wait=%6a%GG HTTP/1.1\r\nHost: d\r\n\r\n".to_owned(), " 200 ", "joining"),
        (
            "GET /v1/status?wait=down&timeout_ms=x HTTP/1.1\r\nHost: d\r\n\r\n".to_owned(),
            " 400 ",
            "timeout_ms",
        ),
        ("GET /v1/events?since=never HTTP/1.1\r\nHost: d\r\n\r\n".to_owned(), " 400 ", "since"),
        (huge, " 400 ", "65536"),
        (
            "POST /v1/command HTTP/1.1\r\nHost: d\r\nContent-Length: 99\r\n\r\n{".to_owned(),
            " 400 ",
            "broke off",
        ),
        ("\u{0}\u{1}garbage\r\n\r\n".to_owned(), " 400 ", ""),
    ];
    for (request, status, part) in cases {
        let answer = raw(&daemon, request.as_bytes()).await;
        let start = &request[..request.len().min(60)];
        assert!(answer.lines().next().unwrap_or_default().contains(status), "{start}: {answer}");
        assert!(answer.contains(part), "{start}: {answer}");
    }
    assert_eq!(daemon.client.status().await.expect("still there").state, State::Joining);
}

#[tokio::test]
async fn one_daemon_a_run_directory_and_leftovers_go() {
    let daemon = daemon();
    let run_dir = RunDir::new(&daemon.dir.path().join("run"));
    assert!(matches!(bind(&run_dir), Err(BindError::Busy { .. })));
    daemon.client.status().await.expect("the first is untouched");
    let other = RunDir::new(&daemon.dir.path().join("other"));
    std::fs::create_dir_all(other.path()).expect("made");
    drop(std::os::unix::net::UnixListener::bind(other.control()).expect("a dead daemon's socket"));
    bind(&other).expect("taken over");
    let long = RunDir::new(&daemon.dir.path().join("x".repeat(120)));
    assert!(matches!(bind(&long), Err(BindError::TooLong { .. })));
}

/// The socket is opened to everybody here, so that only the credentials stand between.
#[tokio::test(flavor = "multi_thread")]
async fn another_user_gets_a_whole_403() {
    use std::io::{Read, Write};
    use std::os::unix::fs::PermissionsExt;
    if !rustix::process::geteuid().is_root() {
        panic!("run as root: the caller's user is changed");
    }
    let daemon = daemon();
    let open = |path: &std::path::Path, mode| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).expect("mode");
    };
    open(daemon.dir.path(), 0o755);
    open(daemon.client.socket(), 0o666);
    let socket = daemon.client.socket().to_owned();
    let body = "x".repeat(200_000);
    let calling = std::thread::spawn(move || {
        // This thread alone becomes another user; glibc's setuid would change the whole process.
        // SAFETY: setresuid takes three numbers and touches no memory.
        let changed = unsafe { libc::syscall(libc::SYS_setresuid, 65534, 65534, 65534) };
        assert_eq!(changed, 0);
        let mut stream = std::os::unix::net::UnixStream::connect(socket).expect("the mode lets in");
        let head = format!("POST /v1/command HTTP/1.1\r\nHost: d\r\nContent-Length: {}\r\n\r\n", body.len());
        stream.write_all(head.as_bytes()).expect("head");
        stream.write_all(body.as_bytes()).expect("the whole body is read before the refusal");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("a whole answer");
        answer
    });
    let answer = tokio::task::spawn_blocking(move || calling.join().expect("called")).await.expect("ran");
    assert!(answer.starts_with("HTTP/1.1 403 "), "{answer}");
    assert!(answer.contains("not-allowed") && answer.contains("65534"), "{answer}");
    assert_eq!(daemon.refused.load(Ordering::SeqCst), 65534);
}
