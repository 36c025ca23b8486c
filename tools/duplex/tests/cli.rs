//! The program as an operator meets it: exit codes, texts, and a daemon's answers over the real socket.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;

use duplex_core::event::Event;
use duplex_core::ids::{Epoch, Generation, ServerName};
use duplex_node::config::RunDir;
use duplex_node::control::api::{self, Answer, PromoteMode};
use duplex_node::control::server::{Backend, Call, bind, serve};
use duplex_node::control::status::{
    CopyState, Peer, ResyncRole, ResyncStatus, Role, STATUS_VERSION, State, Status, VolumeStatus,
};
use duplex_node::events::EventLog;
use tokio::sync::{mpsc, watch};

fn duplex(args: &[&str]) -> Output {
    program(args).output().expect("the program runs")
}

fn program(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_duplex"));
    command.args(args).stdin(Stdio::null()).env_remove("NO_COLOR");
    command
}

/// Exit code, standard output, standard error.
fn parts(output: &Output) -> (i32, String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code().expect("no signal"), text(&output.stdout), text(&output.stderr))
}

fn expect(args: &[&str], code: i32, error_part: &str) {
    let (got, out, err) = parts(&duplex(args));
    assert_eq!(got, code, "{args:?}\n{out}\n{err}");
    assert!(err.contains(error_part), "{args:?}: {err}");
}

#[test]
fn wrong_use_is_2() {
    for (args, part) in [
        (&["frobnicate"][..], "frobnicate"),
        (&["status", "--colour"], "--colour"),
        (&["status", "--wait", "happy"], "mirrored"),
        (&["status", "--wait", "mirrored", "--timeout", "soon"], "seconds"),
        (&["status", "--wait", "mirrored", "--timeout", "-1"], "-1"),
        (&["events", "--since", "yesterday"], "2h"),
        (
            &["promote", "--peer-is-down", "--force", "00000000000000000000000000000001"],
            "cannot be used with",
        ),
        (&["promote", "--force", "abc"], "32 hex digits"),
        (&["promote", "--force"], "GENERATION"),
        (&["resync", "priority", "max"], "normal"),
        (&["resync", "start"], "--full"),
        (&["resync", "start", "--full", "data"], "--target"),
        (&["resync", "max-rate", "5MB"], "64MiB"),
        (&["resolve"], "--victim"),
        (&["detach"], "VOLUME"),
        (&["create"], "VOLUME"),
        (&["create", "data", "--overwrite-data", "--keep-data"], "cannot be used with"),
        (&["compare", "one"], "FILE_B"),
        (&["dump"], "VOLUME"),
        (&["dump", "data", "--extract", "0:4096"], "cannot be used with"),
        (&["dump", "--extract", "0:4096"], "--saved"),
        (&["dump", "--saved", "f", "--extract", "4096"], "OFFSET:LENGTH"),
        (&["secret"], "new"),
        (&["secret", "new"], "FILE"),
        (&["--server"], "--server"),
    ] {
        expect(args, 2, part);
    }
    let (code, _, err) = parts(&duplex(&[]));
    assert_eq!(code, 2);
    assert!(err.contains("Usage"), "{err}");
}

#[test]
fn verbs_of_later_versions_say_so() {
    for args in [
        &["witness", "--listen", "10.0.0.1:1", "--state", "/x"][..],
        &["witness", "adopt"],
        &["switchback"],
        &["clear"],
        &["verify", "data"],
        &["top"],
    ] {
        expect(args, 2, "not in this version");
    }
}

#[test]
fn help_and_version_are_answers() {
    let (code, out, _) = parts(&duplex(&["--help"]));
    assert_eq!(code, 0);
    for verb in [
        "check",
        "secret",
        "create",
        "daemon",
        "holder",
        "activate",
        "status",
        "events",
        "promote",
        "demote",
        "switchover",
        "connect",
        "disconnect",
        "detach",
        "attach",
        "resync",
        "explain",
        "resolve",
        "dump",
        "compare",
        "down",
        "demo",
    ] {
        assert!(out.contains(&format!("  {verb} ")), "{verb}: {out}");
        let (code, out, _) = parts(&duplex(&[verb, "--help"]));
        assert_eq!(code, 0, "{verb}");
        assert!(out.contains("--run-dir") && out.contains("--json"), "{verb}: {out}");
    }
    assert_eq!(parts(&duplex(&["--version"])).0, 0);
}

#[test]
fn no_daemon_is_3() {
    let dir = tempfile::tempdir().expect("directory");
    let run_dir = dir.path().to_str().expect("UTF-8");
    for verb in [
        &["status"][..],
        &["status", "--json"],
        &["status", "--wait", "mirrored", "--timeout", "1"],
        &["events"],
        &["events", "--follow"],
        &["activate"],
        &["promote"],
        &["demote"],
        &["switchover"],
        &["connect"],
        &["disconnect"],
        &["detach", "data"],
        &["attach", "data"],
        &["resync"],
        &["resync", "pause"],
        &["explain"],
        &["resolve", "--victim", "beta"],
        &["down"],
    ] {
        let mut args = vec!["--run-dir", run_dir];
        args.extend(verb);
        expect(&args, 3, "no daemon answers at");
    }
    // A socket that nobody listens on any more is no daemon either.
    drop(std::os::unix::net::UnixListener::bind(dir.path().join("control")).expect("socket"));
    expect(&["status", "--run-dir", run_dir], 3, "refused");
}

/// A small, right pair on this machine.
struct Place {
    dir: tempfile::TempDir,
    config: PathBuf,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("directory");
        let d = dir.path().display();
        // Free a moment ago.
        let free = std::net::TcpListener::bind("127.0.0.1:0").expect("port");
        let port = free.local_addr().expect("address").port();
        drop(free);
        let text = format!(
            "pair = \"shop\"\nstate_dir = \"{d}/state\"\n[servers.alpha]\nlink = [\"127.0.0.1:{port}\"]\n\
             [servers.beta]\nlink = [\"127.0.0.2:{port}\"]\n[volumes.data]\nbacking = \"{d}/data.img\"\n\
             frontend = \"none\"\n[security]\nsecret = \"{d}/secret\"\n"
        );
        let config = dir.path().join("duplex.toml");
        std::fs::write(&config, text).expect("written");
        std::fs::File::create(dir.path().join("data.img")).expect("made").set_len(64 << 20).expect("sized");
        Self { dir, config }
    }

    fn change(&self, from: &str, to: &str) {
        let text = std::fs::read_to_string(&self.config).expect("read");
        assert!(text.contains(from));
        std::fs::write(&self.config, text.replace(from, to)).expect("written");
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }

    fn duplex(&self, args: &[&str]) -> (i32, String, String) {
        let run_dir = self.path("run");
        let config = self.config.to_str().expect("UTF-8");
        let mut all = vec!["--config", config, "--server", "alpha", "--run-dir", &run_dir];
        all.extend(args);
        parts(&duplex(&all))
    }
}

#[test]
fn secret_then_check() {
    let place = Place::new();
    let (code, out, err) = place.duplex(&["check"]);
    assert_eq!(code, 2, "{out}{err}");
    assert!(
        err.contains("duplex.toml:11:10: error: security.secret") && err.contains("missing-file"),
        "{err}"
    );
    assert!(out.contains("1 errors"), "{out}");
    let secret = place.path("secret");
    assert_eq!(place.duplex(&["secret", "new", &secret]).0, 0);
    let before = std::fs::read(&secret).expect("read");
    let (code, _, err) = place.duplex(&["secret", "new", &secret]);
    assert_eq!(code, 1);
    assert!(err.contains("not overwritten"), "{err}");
    assert_eq!(std::fs::read(&secret).expect("read"), before);
    let (code, out, err) = place.duplex(&["check"]);
    assert_eq!((code, err.as_str()), (0, ""), "{out}");
    assert!(
        out.contains("0 errors, 0 warnings (pair shop, this is alpha, the peer is beta, 1 volumes)"),
        "{out}"
    );
    assert!(!Path::new(&place.path("run")).exists() && !Path::new(&place.path("state")).exists());
}

#[test]
fn check_and_daemon_refuse_a_wrong_configuration_alike() {
    let place = Place::new();
    place.change("[volumes.data]", "[volumes.data]\nmode = \"async\"\nblocks = 4");
    for verb in ["check", "daemon"] {
        let (code, _, err) = place.duplex(&[verb]);
        assert_eq!(code, 2, "{verb}: {err}");
        assert!(err.contains("duplex.toml:8:8: error: volumes.data.mode = \"async\""), "{verb}: {err}");
        assert!(
            err.contains("[not-supported]") && err.contains("fix: write mode = \"sync\""),
            "{verb}: {err}"
        );
        assert!(err.contains("duplex.toml:9:1: error: volumes.data.blocks = 4"), "{verb}: {err}");
    }
    let (code, out, _) = place.duplex(&["check", "--json"]);
    assert_eq!(code, 2);
    let page: serde_json::Value = serde_json::from_str(&out).expect("JSON");
    assert_eq!(page["ok"], false);
    assert_eq!(page["problems"][0]["line"], 8);
    assert_eq!(page["problems"][0]["key"], "volumes.data.mode");
    assert_eq!(page["problems"][0]["code"], "not-supported");
    let (code, _, err) = parts(&duplex(&["check", "--config", "/no/such/file"]));
    assert_eq!(code, 2);
    assert!(err.contains("/no/such/file") && err.contains("--config FILE"), "{err}");
}

#[test]
fn create_refuses_what_would_lose_data() {
    let place = Place::new();
    let (code, _, err) = place.duplex(&["create", "logs"]);
    assert_eq!(code, 2);
    assert!(err.contains("no volume \"logs\"; volumes: data"), "{err}");
    let (code, _, err) = place.duplex(&["create", "data", "--keep-data"]);
    assert_eq!(code, 2);
    assert!(err.contains("metadata = \"FILE\""), "{err}");
    let image = place.path("data.img");
    let made = Command::new("mkfs.ext4").args(["-q", "-F", &image]).status().expect("mkfs.ext4");
    assert!(made.success());
    let before = std::fs::read(&image).expect("read");
    let (code, _, err) = place.duplex(&["create", "data"]);
    assert_eq!(code, 1, "{err}");
    assert!(err.contains("ext4") && err.contains("--overwrite-data") && err.contains("--keep-data"), "{err}");
    assert!(std::fs::read(&image).expect("read") == before, "nothing was touched");
    let (code, _, err) = place.duplex(&["compare", &image, "/no/such/file"]);
    assert_ne!(code, 0);
    assert!(!err.is_empty());
}

#[test]
fn a_backing_that_grew_keeps_its_copy_and_one_that_shrank_is_refused() {
    let place = Place::new();
    let image = place.path("data.img");
    let grow = |bytes: u64| {
        std::fs::File::options().write(true).open(&image).and_then(|f| f.set_len(bytes)).expect("resized");
    };
    grow(64 << 20);
    let (code, _, err) = place.duplex(&["create", "data"]);
    assert_eq!(code, 0, "{err}");
    let (code, _, err) = place.duplex(&["create", "data"]);
    assert_eq!(code, 1);
    assert!(err.contains("a copy of a volume of duplex"), "{err}");
    let (code, before, err) = place.duplex(&["dump", "data"]);
    assert_eq!(code, 0, "{err}");
    grow(96 << 20);
    let (code, after, err) = place.duplex(&["dump", "data"]);
    assert_eq!(code, 0, "{err}");
    assert_eq!(before, after, "the old size goes on");
    grow(32 << 20);
    let (code, _, err) = place.duplex(&["dump", "data"]);
    assert_ne!(code, 0);
    assert!(err.contains("bring the old size back"), "{err}");
}

#[test]
fn man_pages_and_completions_come_from_the_definitions() {
    let dir = tempfile::tempdir().expect("directory");
    let path = dir.path().to_str().expect("UTF-8");
    assert_eq!(parts(&duplex(&["generate", "man", path])).0, 0);
    assert_eq!(parts(&duplex(&["generate", "completions", path])).0, 0);
    for name in [
        "duplex.8",
        "duplex-status.8",
        "duplex-resync-start.8",
        "duplex-secret-new.8",
        "duplex.bash",
        "_duplex",
    ] {
        assert!(dir.path().join(name).exists(), "{name}");
    }
    assert!(!dir.path().join("duplex-generate.8").exists() && !dir.path().join("duplex-top.8").exists());
    let page = std::fs::read_to_string(dir.path().join("duplex.8")).expect("read");
    assert!(page.contains("Exit codes"), "{page}");
    expect(&["generate", "man", "/proc/no"], 5, "/proc/no");
}

/// A daemon's socket with made-up answers.
struct Fake {
    dir: tempfile::TempDir,
    runtime: tokio::runtime::Runtime,
    status: watch::Sender<Arc<Status>>,
    events: EventLog,
    stop: watch::Sender<bool>,
    refused: std::sync::mpsc::Receiver<u32>,
}

fn name(name: &str) -> ServerName {
    ServerName(name.to_owned())
}

fn page(state: State, role: Role, resync: Option<ResyncStatus>) -> Arc<Status> {
    Arc::new(Status {
        version: STATUS_VERSION,
        pair: "shop".to_owned(),
        server: name("alpha"),
        state,
        role,
        epoch: Epoch { number: 3, holder: Some(name("alpha")) },
        reason: Some("takeover: link silent 812 ms".to_owned()),
        peer: Peer { server: name("beta"), state: None, role: None, heard_ms: None },
        link: vec![],
        lan: vec![],
        witness: None,
        policy: "manual".to_owned(),
        frozen: None,
        refusal: None,
        volumes: vec![VolumeStatus {
            name: "data".to_owned(),
            size_bytes: Some(1 << 30),
            device: Some("/dev/duplex/data".to_owned()),
            nbd: None,
            copy: CopyState::UpToDate,
            peer_copy: CopyState::Unknown,
            generation: Some(Generation(7)),
            dirty_blocks: 0,
            block_bytes: 4096,
            resync,
        }],
        memory: vec![],
    })
}

fn answer(command: &api::Command) -> Answer {
    if *command == (api::Command::Promote { mode: PromoteMode::Force(Generation(7)) }) {
        return Answer::ok("promoted by force");
    }
    match command.verb() {
        "promote" => Answer::refused("peer-not-heard", "the peer was not heard; say --peer-is-down"),
        "demote" => Answer::refused("in-use", "/dev/duplex/data is mounted at /srv"),
        "detach" => Answer::Wrong { text: "there is no volume \"x\"".to_owned() },
        "resolve" => Answer::Failed { text: "the disk is full".to_owned() },
        "connect" => Answer::TimedOut { text: "10 s".to_owned() },
        verb => Answer::ok(format!("{verb} done")),
    }
}

impl Fake {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("directory");
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
        let runtime = runtime.expect("runtime");
        let (status, status_seen) = watch::channel(page(State::Joining, Role::Secondary, None));
        let (commands, mut calls) = mpsc::channel::<Call>(8);
        let events = EventLog::open(&dir.path().join("state"), &name("alpha")).expect("events");
        let (stop, stopped) = watch::channel(false);
        let (refused_sender, refused) = std::sync::mpsc::channel();
        let backend = Backend {
            commands,
            status: status_seen,
            events: events.clone(),
            on_refused: Arc::new(move |caller| {
                let _ = refused_sender.send(caller.uid);
            }),
        };
        {
            let _inside = runtime.enter();
            let listener = bind(&RunDir::new(&dir.path().join("run"))).expect("bound");
            runtime.spawn(serve(listener, backend, stopped));
        }
        runtime.spawn(async move {
            while let Some(call) = calls.recv().await {
                let given = answer(&call.command);
                let _ = call.reply.send(given);
            }
        });
        Self { dir, runtime, status, events, stop, refused }
    }

    fn run_dir(&self) -> String {
        self.dir.path().join("run").display().to_string()
    }

    fn program(&self, args: &[&str]) -> Command {
        let run_dir = self.run_dir();
        let mut all = vec!["--run-dir", run_dir.as_str()];
        all.extend(args);
        program(&all)
    }

    fn duplex(&self, args: &[&str]) -> (i32, String, String) {
        parts(&self.program(args).output().expect("the program runs"))
    }

    fn event(&self, kind: &str) {
        let event = Event {
            server: name("alpha"),
            kind: kind.to_owned(),
            text: format!("text of {kind}"),
            reason: "reason".to_owned(),
            epoch: Epoch::never(),
            state_before: "joining".to_owned(),
            state_after: "mirrored".to_owned(),
            peer_state: None,
            evidence: std::collections::BTreeMap::new(),
            fields: std::collections::BTreeMap::new(),
        };
        self.events.append(event).expect("written");
    }
}

#[test]
fn answers_become_exit_codes_and_texts() {
    let fake = Fake::new();
    for (args, code, out_part, err_part) in [
        (&["activate"][..], 0, "activate done", ""),
        (&["switchover"], 0, "switchover done", ""),
        (&["down"], 0, "down done", ""),
        (&["explain", "data"], 0, "explain done", ""),
        (&["dump", "data"], 0, "dump done", ""),
        (&["resync", "pause"], 0, "resync done", ""),
        (&["resync", "max-rate", "50MiB"], 0, "resync done", ""),
        (&["promote"], 1, "", "refused (peer-not-heard): the peer was not heard"),
        (&["promote", "--force", "00000000000000000000000000000007"], 0, "promoted by force", ""),
        (&["demote"], 1, "", "refused (in-use)"),
        (&["detach", "x"], 2, "", "no volume"),
        (&["connect"], 4, "", "timed out"),
        (&["resolve", "--victim", "beta"], 5, "", "disk is full"),
    ] {
        let (got, out, err) = fake.duplex(args);
        assert_eq!(got, code, "{args:?}\n{out}\n{err}");
        assert!(out.contains(out_part) && err.contains(err_part), "{args:?}\n{out}\n{err}");
        assert_eq!(out.is_empty(), code != 0, "{args:?}: {out}");
    }
    let (code, out, _) = fake.duplex(&["promote", "--json"]);
    assert_eq!(code, 1);
    let value: serde_json::Value = serde_json::from_str(&out).expect("JSON");
    assert_eq!((&value["result"], &value["code"]), (&"refused".into(), &"peer-not-heard".into()));
}

#[test]
fn status_waits_and_times_out() {
    let fake = Fake::new();
    let (code, out, err) = fake.duplex(&["status"]);
    assert_eq!((code, err.as_str()), (0, ""));
    assert!(out.starts_with("shop  alpha: joining, secondary   epoch 3 (alpha)\n"), "{out}");
    assert!(!out.contains('\u{1b}'), "no colours without a terminal");
    let (_, out, _) = fake.duplex(&["status", "--json"]);
    let value: serde_json::Value = serde_json::from_str(&out).expect("JSON");
    assert_eq!(value["state"], "joining");
    assert!(value.as_object().expect("object").contains_key("witness"));
    let (code, _, err) = fake.duplex(&["status", "--wait", "mirrored", "--timeout", "0.05"]);
    assert_eq!(code, 4);
    assert!(err.contains("not mirrored in time: alpha is joining"), "{err}");
    let waiting =
        fake.program(&["status", "--wait", "role=primary", "--json"]).stdout(Stdio::piped()).spawn();
    fake.status.send_replace(page(State::Alone, Role::Primary, None));
    let (code, out, _) = parts(&waiting.expect("started").wait_with_output().expect("ended"));
    assert_eq!(code, 0);
    assert!(out.contains("\"alone\""), "{out}");
    let waiting =
        fake.program(&["status", "--wait", "down"]).stderr(Stdio::piped()).spawn().expect("started");
    fake.stop.send_replace(true);
    let (code, _, err) = parts(&waiting.wait_with_output().expect("ended"));
    assert_eq!(code, 3, "{err}");
}

#[test]
fn events_are_lines_and_follow() {
    use std::io::BufRead;
    let fake = Fake::new();
    fake.event("started");
    fake.event("joining");
    let (code, out, _) = fake.duplex(&["events"]);
    assert_eq!((code, out.lines().count()), (0, 2));
    assert!(out.contains("text of started [joining -> mirrored] (reason)"), "{out}");
    let (_, out, _) = fake.duplex(&["events", "--json"]);
    for line in out.lines() {
        let value: serde_json::Value = serde_json::from_str(line).expect("one object a line");
        assert!(value["time"].as_str().expect("time").ends_with('Z') && value.get("peer_state").is_some());
    }
    assert_eq!(fake.duplex(&["events", "--since", "2999-01-01T00:00:00Z"]).1, "");
    assert_eq!(fake.duplex(&["events", "--since", "1h"]).1.lines().count(), 2);
    let mut following =
        fake.program(&["events", "--follow", "--json"]).stdout(Stdio::piped()).spawn().expect("started");
    let mut lines = std::io::BufReader::new(following.stdout.take().expect("piped")).lines();
    for kind in ["started", "joining"] {
        assert!(lines.next().expect("line").expect("read").contains(kind));
    }
    fake.event("synced");
    assert!(lines.next().expect("line").expect("read").contains("synced"));
    fake.stop.send_replace(true);
    assert_eq!(following.wait().expect("ended").code(), Some(3), "the daemon went away");
}

#[test]
fn resync_is_watched_to_its_end() {
    let fake = Fake::new();
    let resync = ResyncStatus {
        role: ResyncRole::Source,
        phase: "disk".to_owned(),
        total_bytes: 4 << 20,
        left_bytes: 1 << 20,
        sent_bytes: 3 << 20,
        rate_bytes_per_s: 1 << 20,
        eta_s: Some(1),
        pace: "idle".to_owned(),
        unreadable_blocks: 0,
        unreadable: Vec::new(),
    };
    fake.status.send_replace(page(State::Syncing, Role::Primary, Some(resync)));
    use std::io::{BufRead, Read};
    let mut watching =
        fake.program(&["resync"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("started");
    let mut shown = std::io::BufReader::new(watching.stderr.take().expect("piped"));
    let mut line = String::new();
    shown.read_line(&mut line).expect("a line");
    assert!(line.contains("75 %  3.0 MiB of 4.0 MiB  1.0 MiB/s  1 s left  to beta, idle"), "{line}");
    fake.status.send_replace(page(State::Mirrored, Role::Primary, None));
    let mut out = String::new();
    watching.stdout.take().expect("piped").read_to_string(&mut out).expect("read");
    assert_eq!(watching.wait().expect("ended").code(), Some(0));
    assert!(out.contains("mirrored"), "{out}");
    fake.status.send_replace(page(State::Alone, Role::Primary, None));
    let (code, out, _) = fake.duplex(&["resync"]);
    assert_eq!(code, 1);
    assert!(out.contains("alone: takeover"), "{out}");
}

#[test]
fn another_user_is_refused_by_mode_and_by_credentials() {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::process::CommandExt;
    assert!(rustix::process::geteuid().is_root(), "run as root: the caller's user is changed");
    let fake = Fake::new();
    let open = |path: &Path, mode| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).expect("mode");
    };
    open(fake.dir.path(), 0o755);
    // The program may lie where this user cannot look.
    let copy = fake.dir.path().join("duplex");
    // By another process: a writing descriptor here could slip into a child of a test beside this one, and a
    // file that is open for writing cannot be run.
    let copied = Command::new("cp").arg(env!("CARGO_BIN_EXE_duplex")).arg(&copy).status().expect("cp");
    assert!(copied.success());
    let as_nobody = |args: &[&str]| {
        let run_dir = fake.run_dir();
        let mut command = Command::new(&copy);
        command.arg("--run-dir").arg(run_dir).args(args).current_dir("/").uid(65534).gid(65534);
        parts(&command.output().expect("the program runs"))
    };
    for args in [&["status"][..], &["activate"], &["events"]] {
        let (code, out, err) = as_nobody(args);
        assert_eq!((code, out.as_str()), (1, ""), "{err}");
        assert!(err.contains("refused: this user may not use"), "{err}");
    }
    assert!(fake.refused.try_recv().is_err(), "the mode alone refused");
    open(Path::new(&format!("{}/control", fake.run_dir())), 0o666);
    for args in [&["status"][..], &["activate"], &["events", "--follow"], &["resync"]] {
        let (code, out, err) = as_nobody(args);
        assert_eq!((code, out.as_str()), (1, ""), "{err}");
        assert!(err.contains("refused (not-allowed): user 65534"), "{err}");
        assert_eq!(fake.refused.recv().expect("told"), 65534);
    }
    assert_eq!(fake.duplex(&["status"]).0, 0, "root is served as before");
    let _keep = &fake.runtime;
}
