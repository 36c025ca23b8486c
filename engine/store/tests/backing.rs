//! Opening, claiming, refusing and probing, with real files, loop devices and mounts.
#![allow(clippy::unwrap_used, reason = "tests and their helpers: a panic with its place is the report")]

mod common;

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;

use common::{Bench, LoopDevice, MIB, Mount, config, is_root, make_file, once, placement};
use duplex_core::ids::ByteRange;
use duplex_core::request::DiskOpKind;
use duplex_store::probe::{Finding, probe};
use duplex_store::usage::Use;
use duplex_store::{Access, Backing, BackingConfig, StoreError};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

const CHILD_PATH: &str = "DUPLEX_STORE_TEST_CHILD_PATH";

fn refusal(path: &Path) -> StoreError {
    Backing::open(&once(path), Access::Exclusive).unwrap_err()
}

#[test]
fn what_is_no_backing_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let missing = dir.path().join("missing");
    assert_eq!(refusal(&missing), StoreError::NotFound { path: missing.clone() });
    assert!(refusal(&missing).to_string().contains("missing"));
    assert!(matches!(refusal(dir.path()), StoreError::NotBacking { found: "directory", .. }));
    assert!(matches!(
        refusal(Path::new("/dev/null")),
        StoreError::NotBacking { found: "character device", .. }
    ));
    let data = make_file(&dir, "data", MIB);
    let twice = BackingConfig { metadata: Some(data.clone()), ..once(&data) };
    assert_eq!(
        Backing::open(&twice, Access::Exclusive).unwrap_err(),
        StoreError::SameFile { path: data.clone() }
    );
}

fn second_claim_is_refused(path: &Path) {
    let first = Backing::open(&once(path), Access::Exclusive).unwrap();
    let error = refusal(path);
    let StoreError::InUse { by, .. } = &error else { panic!("{error}") };
    let own = std::process::id();
    assert!(by.iter().any(|one| matches!(one, Use::Process { pid, .. } if *pid == own)), "{error}");
    assert!(Backing::open(&once(path), Access::ReadClaimed).is_err(), "a reader that wants it quiet");
    drop(Backing::open(&once(path), Access::ReadShared).unwrap());
    drop(first);
    drop(Backing::open(&once(path), Access::Exclusive).unwrap());
}

#[test]
fn a_claimed_file_is_refused_and_its_holder_named() {
    let dir = tempfile::tempdir().unwrap();
    second_claim_is_refused(&make_file(&dir, "backing", MIB));
}

#[test]
fn a_claimed_device_is_refused_and_its_holder_named() {
    if !is_root("claimed device") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let device = LoopDevice::attach(&make_file(&dir, "backing", MIB), &[]);
    second_claim_is_refused(&device.path);
    // Those who know nothing of our lock are kept out by the kernel: mount, mdadm, LVM open like this.
    let claim = Backing::open(&once(&device.path), Access::Exclusive).unwrap();
    let flags = OFlags::RDWR | OFlags::EXCL | OFlags::CLOEXEC;
    assert_eq!(rustix::fs::open(&device.path, flags, Mode::empty()).unwrap_err(), Errno::BUSY);
    drop(claim);
    rustix::fs::open(&device.path, flags, Mode::empty()).unwrap();
}

#[test]
fn an_opener_waits_for_a_claim_that_goes() {
    let dir = tempfile::tempdir().unwrap();
    let path = make_file(&dir, "backing", MIB);
    let first = Backing::open(&once(&path), Access::Exclusive).unwrap();
    let (started, has_started) = mpsc::channel();
    let waiter = thread::spawn(move || {
        started.send(()).unwrap();
        Backing::open(&config(&path), Access::Exclusive).map(drop)
    });
    has_started.recv().unwrap();
    drop(first);
    waiter.join().unwrap().unwrap();
}

#[test]
fn sizes_come_from_the_device() {
    let dir = tempfile::tempdir().unwrap();
    let file = make_file(&dir, "backing", 3 * MIB);
    let geometry = Backing::open(&once(&file), Access::ReadShared).unwrap().geometry();
    assert_eq!(geometry.backing_bytes, 3 * MIB);
    assert!(!geometry.is_device);
    let backing = Backing::open(&once(&file), Access::ReadShared).unwrap();
    assert_eq!(backing.require_bytes(3 * MIB), Ok(()));
    let text = backing.require_bytes(3 * MIB + 1).unwrap_err().to_string();
    assert!(text.contains("3145728") && text.contains("3145729"), "{text}");
    if !is_root("sizes of devices") {
        return;
    }
    for sector in ["512", "4096"] {
        let device = LoopDevice::attach(&file, &["--sector-size", sector]);
        let geometry = Backing::open(&once(&device.path), Access::Exclusive).unwrap().geometry();
        assert_eq!(geometry.backing_bytes, 3 * MIB);
        assert_eq!(geometry.sector_bytes.to_string(), sector);
        assert!(geometry.is_device && geometry.physical_bytes >= geometry.sector_bytes);
    }
}

#[test]
fn a_read_only_device_is_refused_as_such() {
    if !is_root("read-only device") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let device = LoopDevice::attach(&make_file(&dir, "backing", MIB), &["--read-only"]);
    assert_eq!(refusal(&device.path), StoreError::ReadOnly { path: device.path.clone() });
}

#[test]
fn a_file_under_a_loop_device_is_refused() {
    if !is_root("file under a loop device") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let file = make_file(&dir, "backing", MIB);
    let device = LoopDevice::attach(&file, &[]);
    let expected = Use::Loop { device: device.path.display().to_string() };
    let error = refusal(&file);
    assert!(matches!(&error, StoreError::InUse { by, .. } if by.contains(&expected)), "{error}");
}

#[test]
fn a_mounted_device_is_refused_with_its_mount_point_at_once() {
    if !is_root("mounted device") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let device = LoopDevice::attach(&make_file(&dir, "backing", 32 * MIB), &[]);
    make_file_system("mkfs.ext4", &["-q"], &device.path);
    let at = dir.path().join("mount");
    let Some(mount) = Mount::new(&[device.path.to_str().unwrap()], &at) else { return };
    // The bound of 30 s must not be used up: nobody unmounts by being waited for.
    let error = Backing::open(&config(&device.path), Access::Exclusive).unwrap_err();
    let text = error.to_string();
    assert!(text.contains(&format!("mounted at {}", at.display())) && !text.contains("tried for"), "{text}");
    assert!(!probe(&device.path).unwrap().is_blank());
    drop(mount);
}

fn make_file_system(program: &str, options: &[&str], on: &Path) -> bool {
    let output = Command::new(program).args(options).arg(on).output();
    match output {
        Ok(output) => {
            assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
            true
        }
        Err(error) => {
            eprintln!("SKIPPED: {program}: {error}");
            false
        }
    }
}

#[test]
fn file_systems_made_by_their_own_tools_are_recognised() {
    let dir = tempfile::tempdir().unwrap();
    let cases: [(&str, &[&str], &str); 6] = [
        ("mkfs.ext4", &["-q"], "ext4"),
        ("mkfs.ext4", &["-q", "-t", "ext3"], "ext3"),
        ("mkfs.xfs", &["-q", "-f"], "XFS"),
        ("mkfs.btrfs", &["-q"], "btrfs"),
        ("mkfs.vfat", &["-F", "32"], "FAT"),
        ("mkswap", &["-q"], "swap space"),
    ];
    for (index, (program, options, what)) in cases.into_iter().enumerate() {
        let path = make_file(&dir, &index.to_string(), 512 * MIB);
        assert!(probe(&path).unwrap().is_blank());
        if make_file_system(program, options, &path) {
            let report = probe(&path).unwrap();
            let found =
                |finding: &Finding| matches!(finding, Finding::Signature { what: is, .. } if *is == what);
            assert!(report.findings.iter().any(found), "{what}: {report:?}");
        }
    }
}

/// Not a test of its own: the process that the next one kills, with writes always in flight.
#[test]
fn killed_child() {
    let Some(path) = std::env::var_os(CHILD_PATH).map(PathBuf::from) else { return };
    let mut bench = Bench::open(&config(&path), placement());
    let buffer = bench.filled(&vec![3; 128 << 10]);
    let mut out = Vec::new();
    let mut completions = Vec::new();
    let mut index = 0_u64;
    loop {
        while bench.store.in_flight() < 32 {
            let range = ByteRange::new(index % 64 * (128 << 10), 128 << 10);
            bench.submit(DiskOpKind::Write { range, buffer, fua: index.is_multiple_of(2) }, &mut out);
            index += 1;
        }
        bench.ring.turn(None, &mut completions).unwrap();
        if out.is_empty() {
            println!("IN FLIGHT");
        }
        for completion in completions.drain(..) {
            bench.store.on_completion(completion, &mut bench.ring, &mut bench.arena, &mut out);
        }
        out.truncate(1);
    }
}

fn survives_a_kill(path: &Path) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "killed_child", "--nocapture"])
        .env(CHILD_PATH, path)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let seen = lines.map_while(Result::ok).any(|line| line.contains("IN FLIGHT"));
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(seen, "the child never had writes in flight");
    // Not at once, perhaps: the killed ring's worker still holds the open file.
    drop(Backing::open(&config(path), Access::Exclusive).unwrap());
}

#[test]
fn a_backing_can_be_claimed_after_its_holder_was_killed() {
    let dir = tempfile::tempdir().unwrap();
    let file = make_file(&dir, "backing", 18 * MIB);
    survives_a_kill(&file);
    if !is_root("claim of a device after a kill") {
        return;
    }
    let device = LoopDevice::attach(&file, &["--direct-io=on"]);
    survives_a_kill(&device.path);
}
