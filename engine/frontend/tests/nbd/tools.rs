//! Clients that others wrote. A missing tool skips its test and says so.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use duplex_core::request::RequestOp;
use duplex_frontend::nbd::ListenAddress;

use super::volume::{EXPORT, Volume};

const MIB: u64 = 1 << 20;

fn has(tool: &str) -> bool {
    let found = Command::new(tool).arg("--version").output().is_ok_and(|output| output.status.success());
    if !found {
        println!("SKIPPED: {tool} is not installed");
    }
    found
}

fn run(command: &mut Command) -> Output {
    let output = command.output().expect("the tool starts");
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Bytes that repeat nowhere near.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

#[test]
fn nbdinfo_sees_the_export() {
    if !has("nbdinfo") {
        return;
    }
    let volume = Volume::start(24 * MIB);
    let info = text(&run(Command::new("nbdinfo").args(["--json", &volume.uri()])));
    for wanted in [
        "\"export-name\": \"vm1\"",
        "\"protocol\": \"newstyle-fixed\"",
        "\"structured\": true",
        "\"export-size\": 25165824",
        "\"block_size_minimum\": 512",
        "\"block_size_preferred\": 4096",
        "\"block_size_maximum\": 1048576",
        "\"can_multi_conn\": true",
        "\"can_fua\": true",
        "\"can_zero\": true",
        "\"can_fast_zero\": true",
        "\"is_read_only\": false",
        "base:allocation",
    ] {
        assert!(info.contains(wanted), "{wanted} is not in {info}");
    }
    let list = text(&run(Command::new("nbdinfo").args(["--list", &volume.uri()])));
    assert!(list.contains("export=\"vm1\""), "{list}");
    let map = text(&run(Command::new("nbdinfo").args(["--map", &volume.uri()])));
    assert_eq!(map.split_whitespace().collect::<Vec<_>>(), ["0", "25165824", "0", "data"]);
}

fn copy_in_and_out(volume: &Volume, extra: &[&str]) {
    let (from, to) = (volume.dir.path().join("in"), volume.dir.path().join("out"));
    let content = noise((24 * MIB) as usize);
    fs::write(&from, &content).expect("write");
    let path = |path: &Path| path.display().to_string();
    run(Command::new("nbdcopy").args(extra).args(["--flush", &path(&from), &volume.uri()]));
    assert!(volume.on(move |engine| engine.memory == content), "the volume has another content");
    run(Command::new("nbdcopy").args(extra).args([&volume.uri(), &path(&to)]));
    assert_eq!(fs::read(&from).expect("read"), fs::read(&to).expect("read"));
}

#[test]
fn nbdcopy_copies_in_and_out() {
    if !has("nbdcopy") {
        return;
    }
    let volume = Volume::start(24 * MIB);
    copy_in_and_out(&volume, &[]);
    copy_in_and_out(&volume, &["--synchronous"]);
    copy_in_and_out(&volume, &["--connections=4", "--requests=16", "--request-size=1048576"]);
    volume.wait_until("clients to be gone", |engine| engine.server.connections() == 0);
    let (opened, closed) = volume.on(|engine| (engine.opened, engine.closed));
    assert!(opened >= 6 && opened == closed, "{opened} opened, {closed} closed");
}

#[test]
fn nbdcopy_waits_when_there_is_no_room() {
    if !has("nbdcopy") {
        return;
    }
    let volume = Volume::with(24 * MIB, 1 << 20, |config| config.requests_max = 3);
    copy_in_and_out(&volume, &["--connections=4", "--requests=16", "--request-size=262144"]);
    assert!(volume.most_in_flight() <= 3);
    let by_ring = Volume::with(24 * MIB, 2 << 20, |config| config.direct_send = false);
    copy_in_and_out(&by_ring, &["--connections=2", "--requests=32", "--request-size=65536"]);
}

#[test]
fn qemu_io_reads_what_it_wrote() {
    if !has("qemu-io") {
        return;
    }
    let volume = Volume::start(24 * MIB);
    volume.on(|engine| engine.noting = true);
    let uri = volume.uri();
    let commands = [
        "write -P 0xab 0 64k",
        "write -P 0xcd -f 64k 512",
        "aio_write -P 0x11 1M 2M",
        "aio_write -P 0x22 4M 64k",
        "aio_flush",
        "read -P 0xab 0 64k",
        "read -P 0xcd 64k 512",
        "read -P 0x11 1M 2M",
        "write -z 4k 8k",
        "read -P 0 4k 8k",
        "read -P 0xab 12k 4k",
        "write -z -u 1M 1M",
        "read -P 0 1M 1M",
        "read -P 0x11 2M 1M",
        "discard 4M 64k",
        "read -P 0 4M 64k",
        "flush",
    ];
    let mut command = Command::new("qemu-io");
    command.args(["-f", "raw", "-t", "none"]);
    for one in commands {
        command.args(["-c", one]);
    }
    let output = run(command.arg(&uri));
    let said = text(&output);
    assert!(!said.contains("verification failed") && !said.contains("error"), "{said}");
    let seen = volume.on(|engine| std::mem::take(&mut engine.requests));
    let has = |wanted: fn(&RequestOp) -> bool| seen.iter().any(wanted);
    assert!(has(|op| matches!(op, RequestOp::Write { fua: true, .. })), "no FUA write came");
    assert!(has(|op| matches!(op, RequestOp::Zero { may_unmap: false, .. })), "no write-zeroes came");
    assert!(has(|op| matches!(op, RequestOp::Zero { may_unmap: true, .. })), "no discard came");
    assert!(has(|op| matches!(op, RequestOp::Flush)), "no flush came");
    let map = text(&run(Command::new("qemu-img").args(["map", "--output=json", "-f", "raw", &uri])));
    assert!(map.contains("\"length\": 25165824") && map.contains("\"data\": true"), "{map}");
}

fn fio(volume: &Volume, uri: &str, name: &str, options: &[&str]) {
    let mut command = Command::new("fio");
    command.current_dir(volume.dir.path());
    command.args(["--ioengine=nbd", "--verify=crc32c", "--verify_fatal=1", "--randrepeat=1", "--thread"]);
    command.args([&format!("--uri={uri}"), &format!("--name={name}")]);
    let output = run(command.args(options));
    let said = text(&output);
    assert!(said.contains("err= 0"), "{said}");
}

#[test]
fn fio_verifies_over_a_unix_socket() {
    if !has("fio") {
        return;
    }
    let volume = Volume::start(64 * MIB);
    let uri = volume.uri();
    fio(&volume, &uri, "deep", &["--rw=randwrite", "--bs=4k", "--iodepth=32", "--size=64m"]);
    fio(&volume, &uri, "mixed", &["--rw=randrw", "--bsrange=512-1m", "--iodepth=16", "--size=64m"]);
    fio(&volume, &uri, "one", &["--rw=randwrite", "--bs=4k", "--iodepth=1", "--size=8m", "--fsync=8"]);
}

#[test]
fn fio_verifies_with_little_room() {
    if !has("fio") {
        return;
    }
    let volume = Volume::with(32 * MIB, 1 << 20, |config| config.connection_requests_max = 5);
    let uri = volume.uri();
    fio(&volume, &uri, "tight", &["--rw=randrw", "--bsrange=4k-1m", "--iodepth=64", "--size=32m"]);
    assert!(volume.most_in_flight() <= 5);
}

#[test]
fn fio_verifies_over_tcp() {
    if !has("fio") {
        return;
    }
    let volume = Volume::with(64 * MIB, 64 << 20, |config| {
        config.listeners.push(ListenAddress::Tcp("127.0.0.1:0".parse().expect("an address")));
    });
    let address = volume.tcp.expect("a TCP listener");
    let uri = format!("nbd://{address}/{EXPORT}");
    fio(&volume, &uri, "tcp", &["--rw=randwrite", "--bsrange=4k-256k", "--iodepth=32", "--size=64m"]);
}
