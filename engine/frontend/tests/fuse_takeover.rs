//! Killing what serves a device: a successor takes over with no error, or, when nobody is left, clients get EIO.
//!
//! The parts that are killed are this test program itself, started again with a role.

mod parts;

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use duplex_frontend::fuse::{Connection, FuseMount, Service};
use duplex_frontend::holder::{HolderClient, HolderError, run_holder, start_holder, systemd};
use duplex_frontend::loopdev::{DetachMode, LoopDevice, set_up_device};
use parts::{Mounted, Order, Server, backing_in, can_run, has, open_backing, options, pattern, run};

const ROLE: &str = "DUPLEX_TEST_ROLE";
const PLACE: &str = "DUPLEX_TEST_PLACE";

fn socket(place: &Path) -> PathBuf {
    place.join("holder.sock")
}

/// This program as one of the parts below.
fn part(role: &str, place: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("this program"));
    command.args(["--exact", "a_part_that_is_killed", "--nocapture"]).env(ROLE, role).env(PLACE, place);
    command
}

/// Not a test: what the other processes do.
#[test]
fn a_part_that_is_killed() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let place = PathBuf::from(std::env::var_os(PLACE).expect("a place"));
    match role.as_str() {
        "holder" => run_holder(&socket(&place)).expect("the holder ends when told"),
        "serve" => serve(&place, false),
        "serve-and-stall" => serve(&place, true),
        other => panic!("no part {other}"),
    }
}

/// The daemon in small: takes the connection over or makes it, with the loop device.
fn serve(place: &Path, stall: bool) {
    let holder = HolderClient::connect(&socket(place)).expect("reached").expect("runs");
    let backing = open_backing(&place.join("backing"));
    let server = match holder.get("test").expect("answered") {
        Some(descriptor) => {
            let connection = Connection::resumed(descriptor).expect("resumed");
            Server::start(backing, connection, Service::Serving)
        }
        None => {
            let (mount, connection) = FuseMount::create("test").expect("a FUSE file system");
            assert!(mount.can_resend());
            holder.put("test", connection.duplicate().expect("a descriptor").as_fd()).expect("kept");
            let server = Server::start(backing, connection, Service::Serving);
            let mut named = options();
            named.volume = volume_at(place);
            set_up_device(&mount, &named).expect("a loop device");
            server
        }
    };
    // Requests stay inside this process for some turns, so that a kill finds some.
    server.order(Order::Delay(3));
    say("ready");
    if stall {
        // After a while it keeps what it is given: a kill then finds requests inside.
        server.wait_seen(|seen| seen.writes > 1000);
        server.order(Order::Delay(u32::MAX));
        server.wait_seen(|seen| seen.kept > 0);
        say("stalled");
    }
    let ended = server.join();
    println!("ended {:?} resent={} .", ended.end, ended.stats.resent);
}

fn say(word: &str) {
    println!("\n{word}");
    std::io::stdout().flush().expect("said");
}

/// A process that is killed on drop.
struct Killed(Child, Option<BufReader<std::process::ChildStdout>>);

impl Killed {
    fn start(role: &str, place: &Path) -> Self {
        let mut child = part(role, place).stdout(Stdio::piped()).spawn().expect("started");
        let output = child.stdout.take().map(BufReader::new);
        Self(child, output)
    }

    fn wait_for(&mut self, word: &str) {
        let output = self.1.as_mut().expect("its output");
        let mut line = String::new();
        while output.read_line(&mut line).expect("read") > 0 {
            if line.trim() == word {
                return;
            }
            line.clear();
        }
        panic!("it ended without the word {word}");
    }

    fn kill(&mut self) {
        self.0.kill().expect("killed");
        self.0.wait().expect("waited for");
    }

    fn last_words(mut self) -> String {
        let mut text = String::new();
        std::io::Read::read_to_string(self.1.as_mut().expect("its output"), &mut text).expect("read");
        self.0.wait().expect("waited for");
        text
    }
}

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Detaches whatever is left. Declared before the processes, so that it runs after them.
struct Leftover(Option<LoopDevice>);

impl Drop for Leftover {
    fn drop(&mut self) {
        if let Some(device) = &self.0 {
            let _ = device.detach(DetachMode::WhenClosed);
        }
    }
}

/// The device's name: the directory's, so that no other run has the same.
fn volume_at(place: &Path) -> String {
    place.file_name().and_then(|name| name.to_str()).expect("a directory of ours").to_owned()
}

fn device_at(place: &Path) -> LoopDevice {
    LoopDevice::find(&volume_at(place), None).pop().expect("the device")
}

#[test]
fn a_killed_server_s_requests_are_done_by_its_successor() {
    if !can_run() || !has("fio") {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let place = directory.path();
    backing_in(place);
    let mut leftover = Leftover(None);
    let (holder_process, holder) = start_holder(part("holder", place), &socket(place)).expect("a holder");
    let _holder_process = Killed(holder_process, None);
    let mut server = Killed::start("serve", place);
    server.wait_for("ready");
    let device = device_at(place);
    leftover.0 = Some(device.clone());
    run("mkfs.ext4", ["-q".as_ref(), "-F".as_ref(), device.path().as_os_str()]);
    let at = place.join("mnt");
    let mounted = Mounted::new(device.path(), &at);

    let fio = Command::new("fio")
        .args(["--name=v", "--size=32M", "--rw=randwrite", "--bs=4k", "--iodepth=16", "--ioengine=io_uring"])
        .args([
            "--direct=1",
            "--verify=crc32c",
            "--do_verify=1",
            "--verify_fatal=1",
            "--verify_state_save=0",
            "--loops=3",
        ])
        .arg(format!("--filename={}", at.join("file").display()))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("started");
    let mut fio = Killed(fio, None);
    // The first one made the file system and serves; the others stall with requests inside, and the last serves.
    server.kill();
    for _ in 0..3 {
        server = Killed::start("serve-and-stall", place);
        server.wait_for("stalled");
        assert!(fio.0.try_wait().expect("asked").is_none(), "fio ended early");
        server.kill();
    }
    server = Killed::start("serve", place);
    server.wait_for("ready");
    let mut complaints = String::new();
    let mut stderr = fio.0.stderr.take().expect("its errors");
    std::io::Read::read_to_string(&mut stderr, &mut complaints).expect("read");
    let status = fio.0.wait().expect("ended");
    assert!(status.success(), "fio: {status} {complaints}");
    mounted.unmount();
    run("e2fsck", ["-fn".as_ref(), device.path().as_os_str()]);
    assert_eq!(holder.list().expect("listed"), ["test"]);
    device.detach(DetachMode::IfUnused).expect("detached");
    leftover.0 = None;
    let words = server.last_words();
    println!("{words}");
    assert!(words.contains("ended Some(Gone)"), "{words}");
    assert!(!words.contains("resent=0 "), "the kill found no request inside the server: {words}");
    assert!(holder.list().expect("listed").is_empty(), "a dead connection is not kept");
    holder.stop().expect("told");
}

#[test]
fn when_server_and_holder_die_clients_get_an_error() {
    if !can_run() {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let place = directory.path();
    backing_in(place);
    let mut leftover = Leftover(None);
    let (holder_process, holder) = start_holder(part("holder", place), &socket(place)).expect("a holder");
    let mut holder_process = Killed(holder_process, None);
    let mut server = Killed::start("serve", place);
    server.wait_for("ready");
    let device = device_at(place);
    leftover.0 = Some(device.clone());
    drop(holder);
    holder_process.kill();
    server.kill();
    let file = File::options().read(true).custom_flags(libc::O_DIRECT).open(device.path()).expect("open");
    let mut memory = vec![0; 8192];
    let at = memory.as_ptr().align_offset(4096);
    let error = file.read_exact_at(&mut memory[at..at + 4096], 1 << 20).expect_err("nobody answers");
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
    drop(file);
    device.detach(DetachMode::IfUnused).expect("detached");
    leftover.0 = None;
}

#[test]
fn the_holder_keeps_gives_lists_and_drops() {
    let directory = tempfile::tempdir().expect("a directory");
    let place = directory.path();
    assert!(HolderClient::connect(&socket(place)).expect("asked").is_none());
    let (child, holder) = start_holder(part("holder", place), &socket(place)).expect("a holder");
    let mut child = Killed(child, None);
    let path = place.join("file");
    std::fs::write(&path, pattern(64, 1)).expect("written");
    for name in ["b", "a", "größe"] {
        holder.put(name, File::open(&path).expect("open").as_fd()).expect("kept");
    }
    assert_eq!(holder.list().expect("listed"), ["a", "b", "größe"]);
    let again = File::from(holder.get("a").expect("answered").expect("there"));
    let mut bytes = [0; 64];
    again.read_exact_at(&mut bytes, 0).expect("read");
    assert_eq!(bytes[..], pattern(64, 1)[..]);
    assert!(holder.get("c").expect("answered").is_none());
    assert!(holder.forget("a").expect("answered"));
    assert!(!holder.forget("a").expect("answered"));
    let refused =
        holder.put(&"n".repeat(256), File::open(&path).expect("open").as_fd()).expect_err("too long");
    assert!(matches!(refused, HolderError::Refused { .. }), "{refused}");
    let second = start_holder(part("holder", place), &socket(place)).map(|(mut child, _)| child.wait());
    // The first one answers; the second finds the lock taken and ends.
    assert!(!second.expect("the first answers").expect("ended").success());
    assert_eq!(holder.list().expect("the first still runs"), ["b", "größe"]);
    let many: Vec<_> = (0..40).map(|_| HolderClient::connect(&socket(place))).collect();
    drop(many);
    holder.stop().expect("told");
    assert!(child.0.wait().expect("ended").success());
    assert!(HolderClient::connect(&socket(place)).expect("asked").is_none());
}

#[test]
fn many_names_are_listed_page_by_page() {
    let directory = tempfile::tempdir().expect("a directory");
    let place = directory.path();
    let (child, holder) = start_holder(part("holder", place), &socket(place)).expect("a holder");
    let _child = Killed(child, None);
    let file = File::open("/dev/null").expect("open");
    let names: Vec<String> = (0..300).map(|at| format!("{at:03}-{}", "x".repeat(200))).collect();
    for name in &names {
        holder.put(name, file.as_fd()).expect("kept");
    }
    assert_eq!(holder.list().expect("listed"), names);
    holder.stop().expect("told");
}

#[test]
fn a_service_manager_is_given_the_descriptor() {
    use std::os::unix::net::UnixDatagram;
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("notify");
    let manager = UnixDatagram::bind(&path).expect("a socket");
    let file = File::open("/dev/null").expect("open");
    systemd::store(path.as_os_str(), "a b", file.as_fd()).expect("sent");
    let mut bytes = [0; 256];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut beside = rustix::net::RecvAncillaryBuffer::new(&mut space);
    let mut vectors = [std::io::IoSliceMut::new(&mut bytes)];
    let received =
        rustix::net::recvmsg(&manager, &mut vectors, &mut beside, rustix::net::RecvFlags::CMSG_CLOEXEC)
            .expect("received");
    assert_eq!(&bytes[..received.bytes], b"FDSTORE=1\nFDNAME=fuse-a%20b\nFDPOLL=0");
    let mut bytes = [0; 256];
    systemd::forget(path.as_os_str(), "a b").expect("sent");
    let length = manager.recv(&mut bytes).expect("received");
    assert_eq!(&bytes[..length], b"FDSTOREREMOVE=1\nFDNAME=fuse-a%20b");
}
