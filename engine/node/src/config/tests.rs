use std::collections::BTreeSet;
use std::path::Path;

use super::*;

const BASE: &str = r#"pair = "shop"

[servers.alpha]
link = ["10.9.0.1:7700", "10.9.1.1:7700"]
[servers.beta]
link = ["10.9.0.2:7700", "10.9.1.2:7700"]

[volumes.data]
backing = "/dev/vg0/data"

[volumes.logs]
backing = { alpha = "/dev/vg0/logs", beta = "/dev/vg1/logs" }

[arbiter]
silent_ms = 800

[security]
secret = "/etc/duplex/secret"
"#;

fn parse(text: &str) -> Result<Config, Problems> {
    Config::parse(text, Path::new("/etc/duplex/duplex.toml"), Some("alpha"))
}

#[test]
fn the_base_is_right() {
    let config = parse(BASE).expect("valid");
    assert_eq!(config.pair, "shop");
    assert_eq!(config.me, Side::First);
    assert_eq!(config.my_server().name.0, "alpha");
    assert_eq!(config.peer_server().name.0, "beta");
    let names: Vec<&str> = config.volumes.iter().map(|volume| volume.name.as_str()).collect();
    assert_eq!(names, ["data", "logs"]);
    assert_eq!(config.volumes[1].backing.of(Side::Second), Path::new("/dev/vg1/logs"));
    assert_eq!(config.volumes[0].block_bytes, 4096);
    assert_eq!(config.volumes[0].sector_bytes, 4096);
    assert_eq!(config.arbiter.freeze, Duration::from_millis(600));
    assert_eq!(config.arbiter.silent, Duration::from_millis(800));
    assert!(config.security.encryption);
    assert_eq!(config.my_state_dir(), Path::new(DEFAULT_STATE_DIR));
}

#[test]
fn every_setting_is_read() {
    let text = r#"
pair = "p"
state_dir = { a = "/var/a", b = "/var/b" }
nbd_group = "disk"
[servers.a]
link = ["[fd00::1]:7700"]
[servers.b]
link = ["[fd00::2]:7700"]
[volumes.zeta]
backing = "/srv/zeta"
metadata = { a = "internal", b = "/srv/zeta.meta" }
mode = "sync"
block_bytes = 65536
sector_bytes = 512
size = "1GiB"
frontend = "none"
nbd = { a = "unix", b = "192.168.1.10:10809" }
nbd_allow = ["192.168.1.0/24"]
[volumes.abc]
backing = "/srv/abc"
nbd_group = 6
frontend = "fuse"
size = 8_388_608
[arbiter]
policy = "classic"
heartbeat_ms = 50
freeze_ms = 300
silent_ms = 500
stall_ms = 5000
no_grant = "freeze"
lone_restart = "wait"
[resync]
max_bytes_per_s = "100MiB"
priority = "high"
[security]
secret = "/s"
secret_old = "/t"
encryption = "off"
"#;
    let config = Config::parse(text, Path::new("f"), Some("b")).expect("valid");
    assert_eq!(config.me, Side::Second);
    let names: Vec<&str> = config.volumes.iter().map(|volume| volume.name.as_str()).collect();
    assert_eq!(names, ["abc", "zeta"], "by name, whatever the order in the file");
    let zeta = &config.volumes[1];
    assert_eq!(*zeta.metadata.of(Side::First), Metadata::Internal);
    assert_eq!(*zeta.metadata.of(config.me), Metadata::Path("/srv/zeta.meta".into()));
    assert_eq!((zeta.block_bytes, zeta.sector_bytes, zeta.size_bytes), (65536, 512, Some(1 << 30)));
    assert_eq!(zeta.frontend, Frontend::None);
    assert_eq!(*zeta.nbd.of(config.me), Nbd::Tcp("192.168.1.10:10809".parse().expect("address")));
    assert!(zeta.nbd_allow[0].contains("192.168.1.77".parse().expect("address")));
    assert!(!zeta.nbd_allow[0].contains("192.168.2.77".parse().expect("address")));
    assert_eq!(zeta.nbd_group.as_deref(), Some("disk"));
    assert_eq!(config.volumes[0].nbd_group.as_deref(), Some("6"));
    assert_eq!(config.volumes[0].size_bytes, Some(8 << 20));
    assert_eq!(config.resync.max_bytes_per_s, 100 << 20);
    assert_eq!(config.resync.priority, Priority::High);
    assert!(!config.security.encryption);
    assert_eq!(config.security.secret_old.as_deref(), Some(Path::new("/t")));
    assert_eq!(config.my_state_dir(), Path::new("/var/b"));
}

#[test]
fn canonical_agrees_across_servers_and_spellings() {
    let alpha = parse(BASE).expect("valid").canonical();
    let moved =
        BASE.replace("\"/dev/vg0/data\"", "\"/dev/other\"").replace("silent_ms = 800", "silent_ms=0x320");
    let beta = Config::parse(&moved, Path::new("x"), Some("beta")).expect("valid").canonical();
    assert_eq!(alpha, beta);
    assert_eq!(alpha["servers.beta.link"], "10.9.0.2:7700 10.9.1.2:7700");
    assert_eq!(alpha["volumes.data.block_bytes"], "4096");
    let other = parse(&BASE.replace("silent_ms = 800", "silent_ms = 900")).expect("valid").canonical();
    let differing: Vec<&String> = alpha.keys().filter(|key| alpha[*key] != other[*key]).collect();
    assert_eq!(differing, ["arbiter.silent_ms"]);
}

/// (from, to, line, key, code, part of the fix).
type Wrong = (&'static str, &'static str, u32, &'static str, &'static str, &'static str);

const DATA: &str = "backing = \"/dev/vg0/data\"";
const SILENT: &str = "silent_ms = 800";
const SECRET: &str = "secret = \"/etc/duplex/secret\"";
const A_LINK: &str = "link = [\"10.9.0.1:7700\", \"10.9.1.1:7700\"]";

const WRONG: &[Wrong] = &[
    // Syntax and keys.
    ("pair = \"shop\"", "pair = shop", 1, "", "syntax", "double quotes"),
    (SILENT, "silent_ms = 800\nsilent_ms = 900", 16, "silent_ms", "duplicate", "keep one"),
    ("[arbiter]", "[arbiter", 14, "", "syntax", "brackets"),
    ("pair = \"shop\"", "pear = \"shop\"", 1, "pear", "unknown-key", "\"pair\""),
    (
        DATA,
        "backing = \"/dev/vg0/data\"\nbackign = 1",
        10,
        "volumes.data.backign",
        "unknown-key",
        "\"backing\"",
    ),
    (SECRET, "secret = \"/s\"\ncolour = 1", 19, "security.colour", "unknown-key", "known here: encryption"),
    ("[arbiter]", "[arbitre]", 14, "arbitre", "unknown-key", "\"arbiter\""),
    (
        A_LINK,
        "link = [\"10.9.0.1:7700\", \"10.9.1.1:7700\"]\nport = 1",
        5,
        "servers.alpha.port",
        "unknown-key",
        "link",
    ),
    // Missing.
    ("pair = \"shop\"", "", 1, "pair", "missing", "pair = \"NAME\""),
    (DATA, "", 8, "volumes.data.backing", "missing", "/dev/vg0/data"),
    (A_LINK, "", 3, "servers.alpha.link", "missing", "one address for each path"),
    (", beta = \"/dev/vg1/logs\" }", " }", 12, "volumes.logs.backing.beta", "missing", "one value for both"),
    (
        "[servers.beta]\nlink = [\"10.9.0.2:7700\", \"10.9.1.2:7700\"]",
        "",
        3,
        "servers",
        "server-count",
        "twice",
    ),
    (
        "[arbiter]",
        "[servers.gamma]\nlink = [\"10.9.0.3:7700\"]\n[arbiter]",
        3,
        "servers",
        "server-count",
        "twice",
    ),
    // Types.
    ("pair = \"shop\"", "pair = 7", 1, "pair", "wrong-type", "pair = \"NAME\""),
    (DATA, "backing = [\"/dev/a\"]", 9, "volumes.data.backing", "wrong-type", "absolute path"),
    (SILENT, "silent_ms = \"800\"", 15, "arbiter.silent_ms", "wrong-type", "whole number of milliseconds"),
    (SILENT, "silent_ms = 800.5", 15, "arbiter.silent_ms", "wrong-type", "whole number"),
    (A_LINK, "link = \"10.9.0.1:7700\"", 4, "servers.alpha.link", "wrong-type", "one address for each path"),
    (SECRET, "secret = true", 18, "security.secret", "wrong-type", "/etc/duplex/secret"),
    (
        "[security]\nsecret = \"/etc/duplex/secret\"",
        "security = 1",
        17,
        "arbiter.security",
        "unknown-key",
        "take it out",
    ),
    // Names.
    ("pair = \"shop\"", "pair = \"my shop\"", 1, "pair", "bad-name", "begin with a letter"),
    ("pair = \"shop\"", "pair = \"\"", 1, "pair", "empty", "pair = \"NAME\""),
    ("[volumes.data]", "[volumes.\"../data\"]", 8, "volumes.../data", "bad-name", "begin with a letter"),
    ("[volumes.data]", "[volumes.control]", 8, "volumes.control", "bad-name", "another name"),
    (
        "pair = \"shop\"",
        "pair = \"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\"",
        1,
        "pair",
        "too-long",
        "at most 48 bytes",
    ),
    // Paths.
    (DATA, "backing = \"vg0/data\"", 9, "volumes.data.backing", "relative-path", "/dev/vg0/data"),
    (DATA, "backing = \"/dev/../etc/passwd\"", 9, "volumes.data.backing", "bad-path", "without '..'"),
    (DATA, "backing = \"\"", 9, "volumes.data.backing", "empty", "absolute path"),
    (SECRET, "secret = \"secret\"", 18, "security.secret", "relative-path", "absolute path"),
    (
        "pair = \"shop\"",
        "pair = \"shop\"\nstate_dir = \"var\"",
        2,
        "state_dir",
        "relative-path",
        "/var/lib/duplex",
    ),
    (
        DATA,
        "backing = \"/d\"\nmetadata = \"extern\"",
        10,
        "volumes.data.metadata",
        "relative-path",
        "internal",
    ),
    // Addresses.
    (
        A_LINK,
        "link = [\"alpha.lan:7700\", \"10.9.1.1:7700\"]",
        4,
        "servers.alpha.link[0]",
        "host-name",
        "IP address",
    ),
    (
        A_LINK,
        "link = [\"10.9.0.1\", \"10.9.1.1:7700\"]",
        4,
        "servers.alpha.link[0]",
        "bad-port",
        "and a port",
    ),
    (
        A_LINK,
        "link = [\"10.9.0.1:7700\", \"10.9.1.1:0\"]",
        4,
        "servers.alpha.link[1]",
        "bad-port",
        "name the port",
    ),
    (A_LINK, "link = [\"10.9.0.1:77000\"]", 4, "servers.alpha.link[0]", "bad-port", "and a port"),
    (
        A_LINK,
        "link = [\"10.9.0.300:7700\"]",
        4,
        "servers.alpha.link[0]",
        "bad-address",
        "IP address and a port",
    ),
    (
        A_LINK,
        "link = [\"0.0.0.0:7700\", \"10.9.1.1:7700\"]",
        4,
        "servers.alpha.link[0]",
        "bad-address",
        "one address",
    ),
    (
        A_LINK,
        "link = [\"224.0.0.1:7700\", \"10.9.1.1:7700\"]",
        4,
        "servers.alpha.link[0]",
        "bad-address",
        "one address",
    ),
    (A_LINK, "link = []", 4, "servers.alpha.link", "path-count", "one address for each path"),
    (
        A_LINK,
        "link = [\"10.9.0.1:7700\"]",
        6,
        "servers.beta.link",
        "paths-differ",
        "same number of addresses",
    ),
    (
        A_LINK,
        "link = [\"[fd00::1]:7700\", \"10.9.1.1:7700\"]",
        6,
        "servers.beta.link[0]",
        "paths-differ",
        "same kind",
    ),
    (
        A_LINK,
        "link = [\"10.9.0.2:7700\", \"10.9.1.1:7700\"]",
        6,
        "servers.beta.link[0]",
        "duplicate",
        "its own address",
    ),
    (
        A_LINK,
        "link = [\"10.9.0.1:7700\", \"10.9.0.1:7700\"]",
        4,
        "servers.alpha.link[1]",
        "duplicate",
        "its own address",
    ),
    // Volumes.
    (DATA, "backing = \"/dev/vg0/logs\"", 12, "volumes.logs.backing.alpha", "duplicate", "of its own"),
    (DATA, "backing = \"/dev//vg1/./logs\"", 12, "volumes.logs.backing.beta", "duplicate", "of its own"),
    (DATA, "backing = \"/d\"\nmetadata = \"/d\"", 10, "volumes.data.metadata", "duplicate", "of its own"),
    (DATA, "backing = \"/etc/duplex/secret\"", 9, "volumes.data.backing", "duplicate", "of its own"),
    (
        DATA,
        "backing = { alpha = \"/a\", beta = \"/b\", gamma = \"/c\" }",
        9,
        "volumes.data.backing.gamma",
        "unknown-key",
        "alpha",
    ),
    (
        DATA,
        "backing = \"/d\"\nblock_bytes = 5000",
        10,
        "volumes.data.block_bytes",
        "out-of-range",
        "power of two",
    ),
    (
        DATA,
        "backing = \"/d\"\nblock_bytes = 2097152",
        10,
        "volumes.data.block_bytes",
        "out-of-range",
        "1048576",
    ),
    (DATA, "backing = \"/d\"\nsector_bytes = 1024", 10, "volumes.data.sector_bytes", "out-of-range", "4096"),
    (DATA, "backing = \"/d\"\nsize = \"10MB\"", 10, "volumes.data.size", "bad-size", "MiB"),
    (DATA, "backing = \"/d\"\nsize = \"10MiB\"", 10, "volumes.data.size", "bad-size", "write 8388608"),
    (DATA, "backing = \"/d\"\nsize = \"65TiB\"", 10, "volumes.data.size", "out-of-range", "64TiB"),
    (DATA, "backing = \"/d\"\nsize = -1", 10, "volumes.data.size", "out-of-range", "bytes"),
    (DATA, "backing = \"/d\"\nfrontend = \"iscsi\"", 10, "volumes.data.frontend", "unknown-value", "fuse"),
    (DATA, "backing = \"/d\"\nmode = \"fast\"", 10, "volumes.data.mode", "unknown-value", "sync"),
    (DATA, "backing = \"/d\"\nnbd = \"10.0.0.1:10809\"", 10, "volumes.data.nbd", "nbd-open", "nbd_allow"),
    (DATA, "backing = \"/d\"\nnbd = \"storage:10809\"", 10, "volumes.data.nbd", "host-name", "IP address"),
    (
        DATA,
        "backing = \"/d\"\nnbd_allow = [\"10.0.0.0/8\"]",
        10,
        "volumes.data.nbd_allow",
        "no-effect",
        "take it out",
    ),
    (
        DATA,
        "backing = \"/d\"\nnbd = \"127.0.0.1:1\"\nnbd_allow = [\"10.0.0.0/33\"]",
        11,
        "volumes.data.nbd_allow[0]",
        "bad-network",
        "192.168.1.0/24",
    ),
    (
        DATA,
        "backing = \"/d\"\nnbd = \"127.0.0.1:1\"\n[volumes.e]\nbacking = \"/e\"\nnbd = \"127.0.0.1:1\"",
        13,
        "volumes.e.nbd",
        "duplicate",
        "port of its own",
    ),
    (DATA, "backing = \"/d\"\nnbd_group = \"a b\"", 10, "volumes.data.nbd_group", "bad-name", "disk"),
    // Times.
    (SILENT, "silent_ms = 600", 15, "arbiter.silent_ms", "bad-timers", "freeze_ms = 533 at most"),
    (
        SILENT,
        "silent_ms = 800\nfreeze_ms = 750",
        16,
        "arbiter.freeze_ms",
        "bad-timers",
        "silent_ms = 840 at least",
    ),
    (
        SILENT,
        "silent_ms = 800\nheartbeat_ms = 300",
        16,
        "arbiter.heartbeat_ms",
        "bad-timers",
        "heartbeat_ms = 200 at most",
    ),
    (
        SILENT,
        "silent_ms = 5000\nstall_ms = 1000",
        16,
        "arbiter.stall_ms",
        "bad-timers",
        "stall_ms = 5000 at least",
    ),
    (SILENT, "silent_ms = 0", 15, "arbiter.silent_ms", "out-of-range", "from 100 to 120000"),
    (SILENT, "policy = \"always\"", 15, "arbiter.policy", "unknown-value", "classic"),
    (SILENT, "no_grant = \"panic\"", 15, "arbiter.no_grant", "unknown-value", "freeze"),
    (SECRET, "encryption = \"yes\"", 18, "security.encryption", "unknown-value", "on, off"),
    (SECRET, "[resync]\npriority = \"max\"", 19, "resync.priority", "unknown-value", "low, normal, high"),
    // Later versions.
    (SILENT, "witness = \"10.0.0.5:7701\"", 15, "arbiter.witness", "not-supported", "promote"),
    (SILENT, "policy = \"prefer:alpha\"", 15, "arbiter.policy", "not-supported", "classic"),
    (SILENT, "no_grant = \"fail\"", 15, "arbiter.no_grant", "not-supported", "freeze"),
    (SILENT, "lone_restart = \"after:30s\"", 15, "arbiter.lone_restart", "not-supported", "wait"),
    (DATA, "backing = \"/d\"\nfrontend = \"ublk\"", 10, "volumes.data.frontend", "not-supported", "auto"),
    (DATA, "backing = \"/d\"\nmode = \"memory\"", 10, "volumes.data.mode", "not-supported", "sync"),
    (DATA, "backing = \"/d\"\nmode = \"async\"", 10, "volumes.data.mode", "not-supported", "sync"),
    (
        DATA,
        "backing = \"/d\"\nnbd = \"tls:10.0.0.1:10809\"",
        10,
        "volumes.data.nbd",
        "not-supported",
        "loopback",
    ),
    (DATA, "backing = \"/d\"\nnbd_tls = true", 10, "volumes.data.nbd_tls", "not-supported", "loopback"),
    (
        DATA,
        "backing = \"/d\"\nchecksums = true",
        10,
        "volumes.data.checksums",
        "not-supported",
        "take it out",
    ),
    (DATA, "backing = \"/d\"\nundo_bytes = 1", 10, "volumes.data.undo_bytes", "not-supported", "take it out"),
    ("[arbiter]", "[memory.sessions]\nsize = \"1MiB\"\n[arbiter]", 14, "memory", "not-supported", "[memory]"),
    ("[arbiter]", "[service]\naddresses = []\n[arbiter]", 14, "service", "not-supported", "[service]"),
    ("[arbiter]", "[lan]\ntargets = [\"10.0.0.1\"]\n[arbiter]", 14, "lan", "not-supported", "take it out"),
    (
        A_LINK,
        "link = [\"10.9.0.1:7700\", \"10.9.1.1:7700\"]\nlan = []",
        5,
        "servers.alpha.lan",
        "not-supported",
        "take it out",
    ),
    ("[arbiter]", "[metrics]\nlisten = \"x\"\n[arbiter]", 14, "metrics", "not-supported", "status --json"),
];

#[test]
fn wrong_configurations_name_line_key_and_fix() {
    assert!(WRONG.len() >= 60, "{} cases", WRONG.len());
    let mut failed = Vec::new();
    for (from, to, line, key, code, fix) in WRONG {
        let text = BASE.replacen(from, to, 1);
        assert_ne!(text, BASE, "the case changes nothing: {from}");
        let problems = match parse(&text) {
            Ok(_) => {
                failed.push(format!("{to:?}: accepted"));
                continue;
            }
            Err(problems) => problems.0,
        };
        let found = problems.iter().any(|problem| {
            problem.place.line == *line
                && problem.key == *key
                && problem.code == *code
                && problem.fix.contains(fix)
                && problem.severity == Severity::Error
        });
        let stray = problems.iter().any(|problem| problem.code == "unknown-key" && *code != "unknown-key");
        if !found || stray || problems.len() > 3 {
            failed.push(format!("{to:?}: wanted line {line} {key} [{code}] …{fix}…\n{}", Problems(problems)));
        }
    }
    assert!(failed.is_empty(), "{} of {}:\n{}", failed.len(), WRONG.len(), failed.join("\n\n"));
}

#[test]
fn all_problems_are_reported_in_file_order_and_shown_whole() {
    let text = BASE
        .replace("pair = \"shop\"", "pair = \"my shop\"")
        .replace(DATA, "backing = \"data\"\nmode = \"async\"")
        .replace(SILENT, "silent_ms = \"x\"");
    let problems = parse(&text).expect_err("wrong");
    let lines: Vec<u32> = problems.0.iter().map(|problem| problem.place.line).collect();
    assert_eq!(lines, [1, 9, 10, 16]);
    let shown = problems.to_string();
    assert!(
        shown.contains(
            "/etc/duplex/duplex.toml:9:11: error: volumes.data.backing = \"data\": is not an absolute path"
        ),
        "{shown}"
    );
    assert!(shown.contains("    fix: write an absolute path"), "{shown}");
    let codes: BTreeSet<&str> = problems.0.iter().map(|problem| problem.code).collect();
    assert!(codes.contains("not-supported"));
}

#[test]
fn who_am_i() {
    let error = Config::parse(BASE, Path::new("f"), Some("gamma")).expect_err("unknown server");
    assert_eq!(error.0[0].code, "not-a-server");
    assert!(error.0[0].fix.contains("--server alpha"), "{error}");
    let host = host::host_name();
    let text = BASE.replace("alpha", &host);
    let config = Config::parse(&text, Path::new("f"), None).expect("the host's name");
    assert_eq!(config.my_server().name.0, host);
}

#[test]
fn files_that_cannot_be_read() {
    let dir = tempfile::tempdir().expect("directory");
    let missing = Config::load(&dir.path().join("none.toml"), None).expect_err("missing");
    assert_eq!(missing.0[0].code, "no-file");
    assert!(missing.0[0].fix.contains("--config"));
    let binary = dir.path().join("binary.toml");
    std::fs::write(&binary, [b'a', 0xff, b'\n']).expect("written");
    assert_eq!(Config::load(&binary, None).expect_err("not UTF-8").0[0].code, "syntax");
    assert_eq!(Config::load(dir.path(), None).expect_err("a directory").0[0].code, "unreadable");
    let long = dir.path().join("long.toml");
    std::fs::write(&long, vec![b'#'; 5 << 20]).expect("written");
    assert_eq!(Config::load(&long, None).expect_err("too long").0[0].code, "too-long");
}

#[test]
fn garbage_never_panics() {
    for cut in 0..BASE.len() {
        if let Some(text) = BASE.get(..cut) {
            let _ = parse(text);
        }
        if let (Some(a), Some(b)) = (BASE.get(..cut), BASE.get(cut + 1..)) {
            let _ = parse(&format!("{a}\u{0}{b}"));
            let _ = parse(&format!("{a}[{b}"));
            let _ = parse(&format!("{a}é\"{b}"));
        }
    }
    let deep = format!("pair = {}", "[".repeat(100_000));
    assert!(parse(&deep).is_err());
}

#[test]
fn sizes() {
    assert_eq!(parse_size("64MiB"), Some(64 << 20));
    assert_eq!(parse_size("2 TiB"), Some(2 << 40));
    assert_eq!(parse_size("4096"), Some(4096));
    assert_eq!(parse_size("1GB"), None);
    assert_eq!(parse_size("99999999999TiB"), None);
    assert_eq!(parse_size("MiB"), None);
}

#[test]
fn run_dirs() {
    assert_eq!(RunDir::default().device("data"), Path::new("/dev/duplex/data"));
    assert_eq!(RunDir::new(Path::new("/run//duplex/")).device("data"), Path::new("/dev/duplex/data"));
    assert_eq!(RunDir::new(Path::new("/tmp/a")).device("data"), Path::new("/tmp/a/dev/data"));
    assert_eq!(RunDir::new(Path::new("/tmp/a")).control(), Path::new("/tmp/a/control"));
}

#[test]
fn two_servers_on_one_loopback_address() {
    let text = BASE
        .replace(A_LINK, "link = [\"127.0.0.1:7700\"]")
        .replace("link = [\"10.9.0.2:7700\", \"10.9.1.2:7700\"]", "link = [\"127.0.0.1:7701\"]");
    parse(&text).expect("loopback with two ports");
    let same = text.replace("7701", "7700");
    assert_eq!(parse(&same).expect_err("one port").0[0].code, "duplicate");
}

/// The shipped example is right as it stands, and with every commented setting switched on.
#[test]
fn the_example_is_right() {
    let example = include_str!("../../../../dist/duplex.toml");
    let plain = Config::parse(example, Path::new("duplex.toml"), Some("alpha")).expect("the example");
    let all: String = example
        .lines()
        .map(|line| line.strip_prefix("# ").filter(|rest| rest.contains(" = ")).unwrap_or(line))
        .map(|line| line.replace("nbd = \"unix\"", "nbd = \"192.168.1.5:10809\"").replace("{ alpha", "{ …"))
        .map(|line| format!("{line}\n"))
        .collect();
    let on = Config::parse(&all, Path::new("duplex.toml"), Some("beta")).expect("everything switched on");
    assert_eq!(on.resync.max_bytes_per_s, 100 << 20);
    assert_eq!(plain.arbiter, on.arbiter, "the times shown are the defaults");
    let same = |config: &Config| (config.volumes[0].block_bytes, config.volumes[0].sector_bytes);
    assert_eq!(same(&plain), same(&on));
}
