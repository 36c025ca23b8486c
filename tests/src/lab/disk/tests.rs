use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::process::{Child, Command as Process};

use super::*;
use crate::lab::{self, Space, wait};

const SIZE: u64 = 16 << 20;
const LIMIT: Duration = Duration::from_secs(20);

#[repr(align(4096))]
struct Page([u8; 4096]);

struct Lab {
    disk: FaultyDisk,
    _space: Space,
}

fn lab() -> Option<Lab> {
    let why =
        lab::unavailable().or_else(|| process::program("duplex-lab").err().map(|error| format!("{error:#}")));
    if let Some(why) = why {
        println!("SKIPPED: {why}");
        return None;
    }
    let space = Space::new().expect("a directory");
    let options = DiskOptions { size_bytes: SIZE, sector_bytes: 512, volatile_cache: true };
    let disk = FaultyDisk::new(&space.path().join("platter"), options).expect("a disk");
    Some(Lab { disk, _space: space })
}

fn open(lab: &Lab) -> File {
    File::options().read(true).write(true).custom_flags(libc::O_DIRECT).open(lab.disk.path()).expect("opened")
}

fn write(file: &File, block: u64, byte: u8) -> std::io::Result<()> {
    file.write_all_at(&Page([byte; 4096]).0, block * 4096)
}

fn read(file: &File, block: u64) -> std::io::Result<u8> {
    let mut page = Page([0; 4096]);
    file.read_exact_at(&mut page.0, block * 4096)?;
    assert!(page.0.iter().all(|byte| *byte == page.0[0]));
    Ok(page.0[0])
}

/// Cuts the power with nobody using the device.
fn cut(lab: &Lab, loss: Loss) {
    lab.disk.hold().expect("held");
    lab.disk.lose_power(loss).expect("cut");
    lab.disk.power_back(LIMIT).expect("back");
}

#[test]
fn what_was_flushed_survives_and_what_was_not_is_lost() {
    let Some(lab) = lab() else { return };
    let file = open(&lab);
    write(&file, 1, 1).expect("written");
    file.sync_all().expect("flushed");
    write(&file, 1, 2).expect("written");
    write(&file, 2, 2).expect("written");
    assert_eq!(read(&file, 1).expect("read"), 2);
    cut(&lab, Loss::Drop);
    assert_eq!((read(&file, 1).expect("read"), read(&file, 2).expect("read")), (1, 0));
    write(&file, 3, 3).expect("written");
    cut(&lab, Loss::Keep);
    assert_eq!(read(&file, 3).expect("read"), 3);
    let counts = lab.disk.counts().expect("counts");
    assert!(counts.flushes >= 1 && counts.writes >= 4, "{counts:?}");
}

#[test]
fn a_lying_flush_loses_what_it_said_was_safe() {
    let Some(lab) = lab() else { return };
    let file = open(&lab);
    lab.disk.lie_about_flush(true).expect("told");
    write(&file, 1, 1).expect("written");
    file.sync_all().expect("said to be flushed");
    cut(&lab, Loss::Drop);
    assert_eq!(read(&file, 1).expect("read"), 0);
}

#[test]
fn faults_hit_their_range_and_operation_only_and_count_down() {
    let Some(lab) = lab() else { return };
    let file = open(&lab);
    lab.disk.fail(Fault::range(Operation::Read, 8192, 512)).expect("told");
    assert!(read(&file, 2).is_err());
    assert_eq!(read(&file, 1).expect("not in the range"), 0);
    write(&file, 2, 1).expect("writes are not hit");
    lab.disk.heal().expect("told");
    assert_eq!(read(&file, 2).expect("healed"), 1);
    lab.disk.fail(Fault { times: Some(1), ..Fault::all(Operation::Flush) }).expect("told");
    assert!(file.sync_all().is_err());
    file.sync_all().expect("the one fault is used up");
    assert_eq!(lab.disk.counts().expect("counts").faults, 2);
}

#[test]
fn a_delayed_write_is_answered_after_its_delay_and_reads_pass_it() {
    let Some(lab) = lab() else { return };
    let file = open(&lab);
    lab.disk.delay(Operation::Write, 200).expect("told");
    let start = std::time::Instant::now();
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| write(&file, 1, 1));
        assert_eq!(read(&file, 5).expect("read"), 0);
        writer.join().expect("no panic").expect("written");
    });
    assert!(start.elapsed() >= Duration::from_millis(200));
}

/// Starts a process that keeps io_uring writes in flight, and waits until it does.
fn holder(lab: &Lab) -> Child {
    let before = lab.disk.counts().expect("counts").writes;
    let child = Process::new(process::program("duplex-lab").expect("found"))
        .args(["holder".as_ref(), lab.disk.path().as_os_str()])
        .spawn()
        .expect("started");
    wait::until("writes", LIMIT, || Ok((lab.disk.counts()?.writes > before + 64).then_some(())))
        .expect("it writes");
    child
}

fn kill(child: &mut Child) {
    child.kill().expect("killed");
    child.wait().expect("gone");
}

#[test]
fn a_killed_ring_lets_go_when_the_disk_answers() {
    let Some(lab) = lab() else { return };
    for _ in 0..5 {
        let mut child = holder(&lab);
        kill(&mut child);
        let held = lab.disk.device().wait_released(LIMIT).expect("it lets go");
        println!("process kill: held {} ms", held.as_millis());
    }
}

#[test]
fn a_killed_ring_holds_on_while_a_request_is_unanswered_and_lets_go_in_a_power_cut() {
    let Some(lab) = lab() else { return };
    for _ in 0..3 {
        let mut child = holder(&lab);
        lab.disk.hold().expect("held");
        wait::until("held requests", LIMIT, || Ok((lab.disk.counts()?.held > 0).then_some(())))
            .expect("held");
        kill(&mut child);
        assert!(lab.disk.device().wait_released(Duration::from_millis(500)).is_err(), "nothing was answered");
        lab.disk.lose_power(Loss::Tear { seed: 1 }).expect("cut");
        let held = lab.disk.power_back(LIMIT).expect("it lets go");
        println!("power cut: held {} ms after the disk answered", held.as_millis());
    }
}
