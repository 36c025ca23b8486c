//! The FUSE file under a real loop device: file systems, fio, discards, errors, detaching.

mod parts;

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::process::Command;

use duplex_core::request::RequestError;
use duplex_frontend::fuse::{FuseEnd, FuseMount, Service};
use duplex_frontend::loopdev::{
    DetachMode, DeviceUser, LoopDevice, LoopError, make_device_link, remove_device_link, set_io_flusher,
    set_up_device,
};
use parts::{
    Bench, Mounted, Order, Server, backing_in, can_run, has, open_backing, options, output, pattern, run,
};
use rustix::fs::{FallocateFlags, fallocate};

fn setting(bench: &Bench, name: &str) -> String {
    let number = bench.device.as_ref().expect("set up").number();
    std::fs::read_to_string(format!("/sys/block/loop{number}/{name}")).expect("a setting").trim().to_owned()
}

/// The device, past every cache.
fn open_direct(bench: &Bench) -> File {
    File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(bench.path())
        .expect("the device")
}

/// Memory that direct I/O takes.
struct Aligned(Vec<u8>, usize, usize);

impl Aligned {
    fn new(length_bytes: usize) -> Self {
        let memory = vec![0; length_bytes + 4096];
        let at = memory.as_ptr().align_offset(4096);
        Self(memory, at, length_bytes)
    }

    fn of(bytes: &[u8]) -> Self {
        let mut this = Self::new(bytes.len());
        this.bytes().copy_from_slice(bytes);
        this
    }

    fn bytes(&mut self) -> &mut [u8] {
        &mut self.0[self.1..self.1 + self.2]
    }
}

#[test]
fn a_file_system_lives_on_the_device() {
    if !can_run() {
        return;
    }
    let bench = Bench::new();
    assert_eq!(setting(&bench, "loop/dio"), "1");
    assert_eq!(setting(&bench, "queue/logical_block_size"), "4096");
    assert_eq!(setting(&bench, "queue/max_sectors_kb"), "1024");
    run("mkfs.ext4", ["-q".as_ref(), "-F".as_ref(), bench.path().as_os_str()]);
    assert!(bench.server().seen().zeroes > 0, "mkfs discards");

    let at = bench.directory.path().join("mnt");
    let mounted = Mounted::new(bench.path(), &at);
    let content = pattern(32 << 20, 11);
    let mut file = File::create(at.join("file")).expect("created");
    file.write_all(&content).expect("written");
    let flushes = bench.server().seen().flushes;
    file.sync_all().expect("synced");
    assert!(bench.server().seen().flushes > flushes, "fsync reaches the volume as a flush");
    drop(file);
    let users = bench.device.as_ref().expect("set up").users().expect("users");
    assert!(users.contains(&DeviceUser::Mounted { at: at.clone() }), "{users:?}");
    let refused = bench.device.as_ref().expect("set up").detach(DetachMode::IfUnused).expect_err("mounted");
    assert!(matches!(refused, LoopError::InUse { .. }), "{refused}");
    mounted.unmount();

    let mounted = Mounted::new(bench.path(), &at);
    let mut back = Vec::new();
    File::open(at.join("file")).expect("there").read_to_end(&mut back).expect("read");
    assert!(back == content, "the file's content changed");
    std::fs::remove_file(at.join("file")).expect("removed");
    let unmaps = bench.server().seen().unmaps;
    run("fstrim", [at.as_os_str()]);
    assert!(bench.server().seen().unmaps > unmaps, "fstrim unmaps");
    mounted.unmount();
    run("e2fsck", ["-fn".as_ref(), bench.path().as_os_str()]);

    let seen = bench.server().seen();
    assert_eq!(seen.misaligned, 0);
    assert!(seen.longest_bytes >= 128 << 10, "{seen:?}");
    let ended = bench.finish();
    assert_eq!(ended.end, Some(FuseEnd::Gone));
    assert_eq!(ended.stats.resent, 0);
}

#[test]
fn fio_verifies_what_it_wrote_many_at_once() {
    if !can_run() || !has("fio") {
        return;
    }
    let bench = Bench::new();
    // Requests stay with the volume for some turns: without asynchronous direct I/O there would be one at a time.
    bench.server().order(Order::Delay(3));
    let file = format!("--filename={}", bench.path().display());
    for (kind, block, depth, size) in
        [("randwrite", "4k", "32", "32M"), ("write", "1M", "8", "128M"), ("randwrite", "64k", "16", "64M")]
    {
        run(
            "fio",
            [
                "--name=v",
                &file,
                &format!("--rw={kind}"),
                &format!("--bs={block}"),
                &format!("--iodepth={depth}"),
                &format!("--size={size}"),
                "--ioengine=io_uring",
                "--direct=1",
                "--verify=crc32c",
                "--do_verify=1",
                "--verify_fatal=1",
                "--verify_state_save=0",
            ],
        );
    }
    let seen = bench.server().seen();
    assert!(seen.in_flight_most >= 8, "{seen:?}");
    // The loop device takes 128 segments: more than half a mebibyte at once, as memory happens to lie.
    assert!(seen.longest_bytes >= 512 << 10, "{seen:?}");
    assert_eq!(seen.misaligned, 0);
    let ended = bench.finish();
    assert!(ended.stats.moved > 0 && ended.stats.requests > 8192, "{:?}", ended.stats);
}

#[test]
fn discards_and_zero_ranges_read_back_as_zeroes() {
    if !can_run() {
        return;
    }
    let bench = Bench::new();
    let device = open_direct(&bench);
    let mut full = Aligned::of(&pattern(1 << 20, 3));
    for part in 0..128 {
        device.write_all_at(full.bytes(), part << 20).expect("written");
    }
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    let zero = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
    // 3 MiB + 4 KiB off, long enough for several pieces.
    fallocate(&device, punch, (3 << 20) + 4096, 70 << 20).expect("punched");
    fallocate(&device, zero, 90 << 20, 4096).expect("zeroed");
    let seen = bench.server().seen();
    assert!(seen.zeroes >= 4, "a long range comes in pieces: {seen:?}");
    for part in 0..128_u64 {
        let mut back = Aligned::new(1 << 20);
        device.read_exact_at(back.bytes(), part << 20).expect("read");
        for (block, bytes) in back.bytes().chunks(4096).enumerate() {
            let at = (part << 20) + block as u64 * 4096;
            let zeroed = ((3 << 20) + 4096..(73 << 20) + 4096).contains(&at) || at == 90 << 20;
            let expected = if zeroed { &[0; 4096] } else { &full.bytes()[block * 4096..][..4096] };
            assert!(bytes == expected, "block at {at}");
        }
    }
    // Nothing but a hole or zeroes can be had of FALLOCATE, and asking does not turn it off.
    drop(device);
    bench.finish();
}

#[test]
fn the_file_itself_takes_a_mebibyte_and_refuses_what_a_volume_has_not() {
    if !can_run() {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let backing = open_backing(&backing_in(directory.path()));
    let (mount, connection) = FuseMount::create("test").expect("a FUSE file system");
    let server = Server::start(backing, connection, Service::Serving);
    let file = mount.open_file().expect("the file");
    assert_eq!(file.metadata().expect("attributes").len(), parts::SIZE_BYTES);
    let refused = fallocate(&file, FallocateFlags::empty(), 0, 4096).expect_err("not a volume's business");
    assert_eq!(refused, rustix::io::Errno::OPNOTSUPP);
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(&file, punch, 0, 4096).expect("punched");
    assert_eq!(server.seen().zeroes, 1, "the punch reached the volume");
    file.set_len(4096).expect_err("a volume's size is not changed through its file");
    file.sync_data().expect("synced");
    file.sync_all().expect("synced");
    assert_eq!(server.seen().flushes, 2);
    let mut large = Aligned::of(&pattern(1 << 20, 17));
    file.write_all_at(large.bytes(), 1 << 20).expect("written");
    assert_eq!((server.seen().writes, server.seen().longest_bytes), (1, 1 << 20), "one request");
    let mut back = Aligned::new(1 << 20);
    file.read_exact_at(back.bytes(), 1 << 20).expect("read");
    assert!(back.bytes() == large.bytes() && server.seen().reads == 1);
    let statistics = rustix::fs::fstatfs(&file).expect("statistics");
    assert_eq!(statistics.f_blocks * 4096, parts::SIZE_BYTES);
    drop((file, mount));
    assert_eq!(server.join().end, Some(FuseEnd::Gone));
}

#[test]
fn errors_and_refusals_reach_the_client() {
    if !can_run() {
        return;
    }
    let bench = Bench::new();
    let device = open_direct(&bench);
    let mut block = Aligned::of(&pattern(4096, 5));
    for error in [RequestError::Io, RequestError::NotServing] {
        bench.server().order(Order::Fail(Some(error)));
        for result in
            [device.write_all_at(block.bytes(), 0), device.read_exact_at(block.bytes(), 0), device.sync_all()]
        {
            let errno = result.expect_err("refused").raw_os_error();
            assert_eq!(errno, Some(libc::EIO));
        }
    }
    bench.server().order(Order::Fail(None));
    bench.server().order(Order::Service(Service::Refusing));
    let asked = || {
        let seen = bench.server().seen();
        (seen.reads, seen.writes, seen.flushes, seen.zeroes)
    };
    let before = asked();
    device.write_all_at(block.bytes(), 0).expect_err("refused");
    device.sync_all().expect_err("refused");
    assert_eq!(asked(), before, "a refused request reaches no volume");
    bench.server().order(Order::Service(Service::Serving));
    device.write_all_at(block.bytes(), 0).expect("served again");
    device.sync_all().expect("served again");
    drop(device);
    bench.finish();
}

#[test]
fn held_requests_wait_and_are_served_then() {
    if !can_run() {
        return;
    }
    let bench = Bench::new();
    bench.server().order(Order::Service(Service::Held));
    let mut writers = Vec::new();
    // More than are taken in: the others wait in the kernel.
    for part in 0..40_u64 {
        let device = open_direct(&bench);
        writers.push(std::thread::spawn(move || {
            device.write_all_at(Aligned::of(&pattern(8192, part)).bytes(), part << 20)
        }));
    }
    // A question about the file is answered although nothing is served.
    let found = LoopDevice::find("test", Some(bench.device.as_ref().expect("set up").file_system()));
    assert_eq!(found.len(), 1);
    assert_eq!(bench.server().seen().writes, 0);
    assert!(writers.iter().all(|writer| !writer.is_finished()));
    bench.server().order(Order::Service(Service::Serving));
    for writer in writers {
        writer.join().expect("no panic").expect("written");
    }
    assert_eq!(bench.server().seen().writes, 40);
    let device = open_direct(&bench);
    for part in 0..40_u64 {
        let mut back = Aligned::new(8192);
        device.read_exact_at(back.bytes(), part << 20).expect("read");
        assert!(back.bytes() == pattern(8192, part), "write {part}");
    }
    drop(device);
    bench.finish();
}

#[test]
fn a_stopped_server_leaves_errors_not_hangs() {
    if !can_run() {
        return;
    }
    let mut bench = Bench::new();
    let device = open_direct(&bench);
    bench.server().order(Order::Service(Service::Held));
    let blocked = std::thread::spawn({
        let device = device.try_clone().expect("a descriptor");
        move || device.write_all_at(Aligned::of(&pattern(4096, 9)).bytes(), 0)
    });
    // Nobody else has the connection: with the server it ends, and what waits gets an error.
    let ended = bench.server.take().expect("runs").stop();
    assert_eq!(ended.end, None);
    let errno = blocked.join().expect("no panic").expect_err("nobody answers").raw_os_error();
    assert_eq!(errno, Some(libc::EIO));
    device.read_exact_at(Aligned::new(4096).bytes(), 0).expect_err("nobody answers");
    let users = bench.device.as_ref().expect("set up").users().expect("users");
    println!("users: {users:?}");
    drop(device);
    bench.device.take().expect("set up").detach(DetachMode::IfUnused).expect("detached");
}

#[test]
fn a_device_is_found_by_name_and_connection_and_says_who_has_it() {
    if !can_run() {
        return;
    }
    let bench = Bench::new();
    let device = bench.device.clone().expect("set up");
    assert_eq!(LoopDevice::find("test", Some(device.file_system())), std::slice::from_ref(&device));
    assert!(LoopDevice::find("test", Some(device.file_system() + 1_000_000)).is_empty());
    assert!(LoopDevice::find("tes", Some(device.file_system())).is_empty());

    let links = bench.directory.path().join("dev");
    let link = make_device_link(&links, "test", device.path()).expect("a link");
    // A reader that waits for its input has the device open.
    let mut reader = Command::new("sh")
        .args(["-c", "exec 3<\"$0\"; read line"])
        .arg(&link)
        .stdin(std::process::Stdio::piped())
        .spawn()
        .expect("a reader");
    let pid = reader.id();
    let users = loop {
        let users = device.users().expect("users");
        if !users.is_empty() {
            break users;
        }
        std::thread::yield_now();
    };
    assert!(matches!(&users[..], [DeviceUser::Process { pid: found, .. }] if *found == pid), "{users:?}");
    let refused = device.detach(DetachMode::IfUnused).expect_err("open");
    assert!(refused.to_string().contains(&format!("process {pid}")), "{refused}");
    device.detach(DetachMode::WhenClosed).expect("asked for");
    assert!(device.is_attached(), "it goes with its last user");
    drop(reader.stdin.take());
    reader.wait().expect("ended");
    remove_device_link(&links, "test", device.path()).expect("removed");
    let mut bench = bench;
    assert_eq!(bench.server.take().expect("runs").join().end, Some(FuseEnd::Gone));
    assert!(!device.is_attached());
    bench.device = None;
}

#[test]
fn sector_size_512_where_the_volume_has_it() {
    if !can_run() {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let backing = open_backing(&backing_in(directory.path()));
    let (mount, connection) = FuseMount::create("test").expect("a FUSE file system");
    let server = Server::start(backing, connection, Service::Serving);
    let mut small = options();
    small.sector_bytes = 512;
    let device = set_up_device(&mount, &small).expect("a loop device");
    let bench = Bench { device: Some(device), server: Some(server), directory };
    drop(mount);
    assert_eq!(setting(&bench, "queue/logical_block_size"), "512");
    let written = output(
        "dd",
        [
            "if=/dev/urandom".to_owned(),
            format!("of={}", bench.path().display()),
            "bs=512".to_owned(),
            "count=3".to_owned(),
            "oflag=direct".to_owned(),
            "seek=5".to_owned(),
        ],
    );
    assert!(written.status.success(), "{written:?}");
    bench.finish();
}

#[test]
fn the_io_flusher_flag_is_set_or_refused_with_a_reason() {
    let (known, errno) = match set_io_flusher() {
        Ok(()) => (true, None),
        Err(error) => (false, error.raw_os_error()),
    };
    assert!(known || errno == Some(libc::EPERM) || errno == Some(libc::EINVAL), "{errno:?}");
}
