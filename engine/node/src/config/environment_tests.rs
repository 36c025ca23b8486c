use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;

use super::environment::{Purpose, check, group_id};
use super::*;

/// Files and directories of one small, right pair.
struct Place {
    dir: tempfile::TempDir,
    /// Free a moment ago.
    port: u16,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir_in("/var/tmp").expect("directory");
        let free = std::net::TcpListener::bind("127.0.0.1:0").expect("port");
        let place = Self { dir, port: free.local_addr().expect("address").port() };
        let file = std::fs::File::create(place.path("data.img")).expect("made");
        file.set_len(64 << 20).expect("sized");
        secret::create(&place.path("secret")).expect("secret");
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn text(&self) -> String {
        format!(
            "pair = \"p\"\nstate_dir = \"{d}/state\"\n[servers.a]\nlink = [\"127.0.0.1:{p}\"]\n\
             [servers.b]\nlink = [\"127.0.0.2:{p}\"]\n[volumes.data]\nbacking = \"{d}/data.img\"\n\
             frontend = \"none\"\n[security]\nsecret = \"{d}/secret\"\n",
            d = self.dir.path().display(),
            p = self.port
        )
    }

    fn check(&self, text: &str) -> Vec<Problem> {
        let config = Config::parse(text, &self.path("duplex.toml"), Some("a")).expect("a right text");
        check(&config, &RunDir::new(&self.path("run")), Purpose::Check).0
    }
}

fn one<'a>(found: &'a [Problem], code: &str) -> &'a Problem {
    found.iter().find(|problem| problem.code == code).unwrap_or_else(|| panic!("no {code} in {found:#?}"))
}

#[test]
fn a_right_machine_has_no_problem_and_is_not_changed() {
    let place = Place::new();
    let names = |dir: &Path| {
        let mut names: Vec<_> =
            std::fs::read_dir(dir).expect("read").map(|entry| entry.expect("entry").file_name()).collect();
        names.sort();
        names
    };
    let before = names(place.dir.path());
    assert_eq!(place.check(&place.text()), []);
    assert_eq!(names(place.dir.path()), before);
}

#[test]
fn what_is_wrong_here_names_the_line() {
    let place = Place::new();
    let text = place.text();
    let found = place.check(&text.replace("data.img", "none.img"));
    let problem = one(&found, "backing");
    assert_eq!((problem.place.line, problem.key.as_str()), (8, "volumes.data.backing"));
    assert!(problem.fix.contains("truncate -s") && problem.to_string().contains("none.img"), "{problem}");

    let found = place.check(&text.replace("127.0.0.1", "192.0.2.77"));
    let problem = one(&found, "no-address");
    assert_eq!((problem.place.line, problem.key.as_str()), (4, "servers.a.link[0]"));
    assert!(problem.fix.contains("ip address add 192.0.2.77/24"), "{problem}");

    std::fs::set_permissions(place.path("secret"), std::fs::Permissions::from_mode(0o644)).expect("mode");
    let found = place.check(&text);
    let problem = one(&found, "secret-mode");
    assert_eq!((problem.place.line, problem.key.as_str()), (11, "security.secret"));
    assert!(problem.text.contains("0644") && problem.fix.contains("chmod 600"), "{problem}");

    std::fs::remove_file(place.path("secret")).expect("removed");
    assert!(one(&place.check(&text), "missing-file").fix.contains("duplex secret new"));
    std::fs::write(place.path("secret"), "short").expect("written");
    std::fs::set_permissions(place.path("secret"), std::fs::Permissions::from_mode(0o600)).expect("mode");
    assert!(one(&place.check(&text), "bad-secret").text.contains("5 characters"));
}

#[test]
fn more_that_is_wrong_here() {
    let place = Place::new();
    let text = place.text();
    let found = place.check(&format!("{text}encryption = \"off\"\n"));
    let problem = one(&found, "not-encrypted");
    assert_eq!((problem.severity, problem.place.line), (Severity::Warning, 12));
    assert!(!Problems(found).has_errors());

    let found = place.check(&text.replace("frontend = \"none\"", "frontend = \"none\"\nsize = \"64MiB\""));
    assert!(one(&found, "too-small").text.contains("67108864 are needed"));

    // What `check` lets pass, `create` takes: the metadata needs more than the head's 1 MiB.
    std::fs::File::create(place.path("five.img"))
        .and_then(|file| file.set_len(5 << 20))
        .expect("a small file");
    let found = place.check(&text.replace("/data.img", "/five.img"));
    assert!(one(&found, "too-small").text.contains("room for 0 bytes"));

    let found = place.check(&text.replace("/state\"", "/data.img/state\""));
    assert_eq!(one(&found, "state-dir").key, "state_dir");

    std::os::unix::fs::symlink(place.path("data.img"), place.path("link.img")).expect("link");
    let link = format!("frontend = \"none\"\nmetadata = \"{}/link.img\"", place.dir.path().display());
    let found = place.check(&text.replace("frontend = \"none\"", &link));
    assert!(one(&found, "duplicate").text.contains("volumes.data.backing"));

    let found =
        place.check(&text.replace("frontend = \"none\"", "frontend = \"none\"\nmetadata = \"/nowhere/m\""));
    assert!(one(&found, "no-metadata").fix.contains("duplex create data"));

    let found = place.check(&text.replace("frontend = \"none\"", "nbd_group = \"no-such-group\""));
    assert!(one(&found, "no-group").fix.contains("groupadd no-such-group"));
}

#[test]
fn ports_and_left_over_sockets() {
    let place = Place::new();
    std::fs::create_dir(place.path("run")).expect("made");
    drop(UnixListener::bind(place.path("run/control")).expect("socket"));
    drop(UnixListener::bind(place.path("run/data.nbd")).expect("socket"));
    let busy = std::net::TcpListener::bind("127.0.0.1:0").expect("port");
    let port = busy.local_addr().expect("address").port();
    let text = place.text().replace(&format!("127.0.0.1:{}", place.port), &format!("127.0.0.1:{port}"));
    let found = place.check(&text);
    let stale = found.iter().filter(|problem| problem.code == "stale-socket").count();
    assert_eq!(stale, 2, "{found:#?}");
    assert_eq!(one(&found, "port-in-use").key, "servers.a.link[0]");
    let _daemon = {
        std::fs::remove_file(place.path("run/control")).expect("removed");
        UnixListener::bind(place.path("run/control")).expect("socket")
    };
    assert_eq!(place.check(&text), [], "a running daemon has the port and the sockets by right");
}

#[test]
fn groups() {
    assert_eq!(group_id("root"), Some(0));
    assert_eq!(group_id("77"), Some(77));
    assert_eq!(group_id("no-such-group"), None);
}

#[test]
fn secrets_are_made_once_and_are_private() {
    let place = Place::new();
    let path = place.path("second");
    secret::create(&path).expect("made");
    let mode = std::fs::metadata(&path).expect("file").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let first = secret::read(&path).expect("read");
    assert_eq!(first.len(), 64);
    assert!(matches!(secret::create(&path), Err(secret::SecretError::Exists { .. })));
    assert_eq!(secret::read(&path).expect("untouched"), first);
    assert_ne!(secret::read(&place.path("secret")).expect("read"), first);
    rustix::fs::mkfifoat(rustix::fs::CWD, place.path("fifo"), rustix::fs::Mode::from_raw_mode(0o600))
        .expect("fifo");
    assert!(matches!(secret::read(&place.path("fifo")), Err(secret::SecretError::Content { .. })));
}

#[test]
fn check_takes_the_secrets_that_the_daemon_takes() {
    let place = Place::new();
    for (count, taken) in [(16, false), (31, false), (32, true), (1024, true), (1025, false), (4096, false)] {
        let path = place.path(&format!("of-{count}"));
        let text = "s".repeat(count);
        std::fs::write(&path, format!("{text}\n")).expect("written");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).expect("mode");
        assert_eq!(secret::read(&path).is_ok(), taken, "{count} characters, by `check`");
        assert_eq!(
            duplex_link::Secret::new(text.as_bytes()).is_ok(),
            taken,
            "{count} characters, by the link"
        );
    }
}
