//! Everything the demo makes lies in one directory or is found from it: so one function takes it all away, for a run
//! that ended, failed, was interrupted, was kept, or was killed.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use duplex_frontend::loopdev::{DetachMode, LoopDevice};

use super::config::{SERVERS, VOLUME};
use super::{network, run};

const PREFIX: &str = "duplex-demo-";
const LIMIT: Duration = Duration::from_secs(30);
/// A path of a Unix socket may be this long.
const SOCKET_PATH_MAX_BYTES: usize = 107;

/// Makes the demo's directory below `base`, its name with our process id.
///
/// # Errors
/// No room, no rights, or a name too long for sockets.
pub(crate) fn make(base: &Path, size_bytes: u64) -> Result<PathBuf> {
    let base = base
        .canonicalize()
        .with_context(|| format!("{} cannot be used: make it, or name another --dir", base.display()))?;
    let directory = base.join(format!("{PREFIX}{}", std::process::id()));
    let longest = directory.join(SERVERS[0]).join("run").join(format!("{VOLUME}.nbd"));
    if longest.as_os_str().len() > SOCKET_PATH_MAX_BYTES {
        bail!(
            "{} is too long: sockets below it must have at most {SOCKET_PATH_MAX_BYTES} bytes in their names; \
             name a shorter directory with --dir",
            base.display()
        );
    }
    room(&base, 2 * size_bytes)?;
    std::fs::create_dir(&directory).with_context(|| format!("{} cannot be made", directory.display()))?;
    Ok(directory)
}

fn room(base: &Path, wanted_bytes: u64) -> Result<()> {
    let about =
        rustix::fs::statvfs(base).with_context(|| format!("{} cannot be looked at", base.display()))?;
    let free_bytes = about.f_bavail.saturating_mul(about.f_frsize);
    if free_bytes < wanted_bytes {
        bail!(
            "{} has {free_bytes} bytes free, {wanted_bytes} are needed for both disks; make room, or name another \
             directory with --dir",
            base.display()
        );
    }
    Ok(())
}

/// The network namespaces' files below a demo's directory.
pub(crate) fn networks(directory: &Path) -> [PathBuf; 3] {
    let [first, second] = SERVERS.map(|server| directory.join(server).join("netns"));
    [first, second, directory.join("lan-netns")]
}

/// A disk: a sparse file under a loop device.
///
/// # Errors
/// No loop device, or no direct I/O on this file system.
pub(crate) fn disk(file: &Path, size_bytes: u64) -> Result<PathBuf> {
    let new = File::create(file).with_context(|| format!("{} cannot be made", file.display()))?;
    new.set_len(size_bytes).with_context(|| format!("{} cannot be {size_bytes} bytes", file.display()))?;
    let attach = |direct: &str| {
        let mut command = run::tool("losetup");
        command.args(["--find", "--show", direct]).arg(file);
        run::must(&mut command, LIMIT)
    };
    // Some file systems know no direct I/O: the disk is then slower, not worse, as nothing here loses power.
    let said = attach("--direct-io=on").or_else(|_| attach("--direct-io=off"))?;
    Ok(PathBuf::from(said.trim()))
}

/// Remembers the device a server made, so that it is found when nobody is left to ask.
///
/// # Errors
/// The link does not lead to a device of ours.
pub(crate) fn note_device(directory: &Path, link: &Path) -> Result<()> {
    let device = link.canonicalize().with_context(|| format!("{} leads nowhere", link.display()))?;
    let found = LoopDevice::find(VOLUME, None).into_iter().find(|known| known.path() == device);
    let Some(found) = found else {
        bail!("{} is no device of volume {VOLUME}", device.display());
    };
    let mut notes = OpenOptions::new().create(true).append(true).open(directory.join("devices"))?;
    writeln!(notes, "{} {}", found.number(), found.file_system())?;
    Ok(())
}

/// Devices made by servers of this demo that still are attached.
fn devices(directory: &Path) -> Vec<LoopDevice> {
    let notes = std::fs::read_to_string(directory.join("devices")).unwrap_or_default();
    let noted: Vec<(u32, u64)> = notes.lines().filter_map(note).collect();
    let linked: Vec<PathBuf> = SERVERS
        .iter()
        .filter_map(|server| directory.join(server).join("run/dev").join(VOLUME).canonicalize().ok())
        .collect();
    let ours = |device: &LoopDevice| {
        noted.contains(&(device.number(), device.file_system()))
            || linked.iter().any(|link| link == device.path())
    };
    LoopDevice::find(VOLUME, None).into_iter().filter(ours).collect()
}

fn note(line: &str) -> Option<(u32, u64)> {
    let (number, file_system) = line.split_once(' ')?;
    Some((number.parse().ok()?, file_system.parse().ok()?))
}

/// Takes everything away that was made in or from this directory. Says what it could not.
///
/// # Errors
/// Something is left.
pub(crate) fn remove(directory: &Path) -> Result<()> {
    let mut wrong = Vec::new();
    let mut keep = |result: Result<()>| {
        if let Err(error) = result {
            wrong.push(format!("{error:#}"));
        }
    };
    // Without its servers a device answers every request with an error: nothing below can hang.
    for file in networks(directory) {
        keep(network::kill_all(&file));
    }
    for point in mounts_below(directory) {
        if !networks(directory).contains(&point) {
            keep(unmount(&point));
        }
    }
    for device in devices(directory) {
        keep(device.detach(DetachMode::WhenClosed).map_err(Into::into));
    }
    keep(gone("devices of the servers", || {
        devices(directory).iter().map(|device| device.path().to_owned()).collect()
    }));
    for device in disks_below(directory) {
        keep(run::must(run::tool("losetup").arg("--detach").arg(&device), LIMIT).map(drop));
    }
    keep(gone("loop devices", || disks_below(directory)));
    for file in networks(directory) {
        keep(network::remove(&file));
    }
    keep(gone("mounts", || mounts_below(directory)));
    if wrong.is_empty() {
        std::fs::remove_dir_all(directory)
            .with_context(|| format!("{} cannot be removed", directory.display()))?;
        return Ok(());
    }
    bail!("left behind below {}: {}", directory.display(), wrong.join("; "))
}

/// Waits until nothing is left of a kind.
fn gone(what: &str, mut left: impl FnMut() -> Vec<PathBuf>) -> Result<()> {
    let end = Instant::now() + LIMIT;
    loop {
        let now = left();
        if now.is_empty() {
            return Ok(());
        }
        if Instant::now() >= end {
            bail!("{what}: {}", now.iter().map(|p| p.display().to_string()).collect::<Vec<_>>().join(" "));
        }
        std::thread::sleep(run::LOOK);
    }
}

/// Unmounts; lazily where somebody still has a file open.
pub(crate) fn unmount(point: &Path) -> Result<()> {
    let plain = run::run(run::tool("umount").arg(point), LIMIT)?;
    if plain.code == Some(0) {
        return Ok(());
    }
    run::must(run::tool("umount").arg("--lazy").arg(point), LIMIT).map(drop)
}

/// Loop devices whose file lies below a directory.
fn disks_below(directory: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir("/sys/block").into_iter().flatten().flatten();
    let devices = entries.filter_map(|entry| {
        let file = std::fs::read(entry.path().join("loop/backing_file")).ok()?;
        let file = PathBuf::from(OsString::from_vec(file.trim_ascii_end().to_vec()));
        file.starts_with(directory).then(|| Path::new("/dev").join(entry.file_name()))
    });
    devices.collect()
}

/// Mount points below a directory, the newest first.
fn mounts_below(directory: &Path) -> Vec<PathBuf> {
    let table = std::fs::read("/proc/self/mountinfo").unwrap_or_default();
    let mut points: Vec<PathBuf> = table
        .split(|byte| *byte == b'\n')
        .filter_map(|line| line.split(|byte| *byte == b' ').nth(4))
        .map(unescape)
        .filter(|point| point.starts_with(directory))
        .collect();
    points.reverse();
    points
}

/// The kernel writes blanks of a path as `\040`.
fn unescape(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut at = 0;
    while at < field.len() {
        let octal = field.get(at + 1..at + 4).and_then(|digits| {
            let digits = std::str::from_utf8(digits).ok()?;
            u8::from_str_radix(digits, 8).ok()
        });
        match (field[at], octal) {
            (b'\\', Some(byte)) => {
                bytes.push(byte);
                at += 4;
            }
            (byte, _) => {
                bytes.push(byte);
                at += 1;
            }
        }
    }
    PathBuf::from(OsString::from_vec(bytes))
}

/// Directories of demos whose process is gone: kept, or killed.
pub(crate) fn abandoned(base: &Path) -> Result<Vec<PathBuf>> {
    let base = base
        .canonicalize()
        .with_context(|| format!("{} cannot be used: make it, or name another --dir", base.display()))?;
    let mut found = Vec::new();
    for entry in std::fs::read_dir(&base)?.flatten() {
        let name = entry.file_name();
        let Some(pid) = name.as_bytes().strip_prefix(PREFIX.as_bytes()).and_then(|pid| {
            let pid: u32 = std::str::from_utf8(pid).ok()?.parse().ok()?;
            Some(pid)
        }) else {
            continue;
        };
        let program = std::fs::read_link(format!("/proc/{pid}/exe"));
        let runs =
            program.is_ok_and(|p| p.file_name().is_some_and(|name| name.as_bytes().starts_with(b"duplex")));
        if !runs {
            found.push(entry.path());
        }
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_point_with_blanks_is_read() {
        assert_eq!(unescape(b"/a\\040b\\134c"), PathBuf::from("/a b\\c"));
        assert_eq!(unescape(b"/plain"), PathBuf::from("/plain"));
        assert_eq!(unescape(b"/end\\04"), PathBuf::from("/end\\04"));
    }

    #[test]
    fn a_device_is_noted_by_number_and_file_system() {
        assert_eq!(note("12 345"), Some((12, 345)));
        assert_eq!(note("12"), None);
        assert_eq!(note("x 1"), None);
    }

    #[test]
    fn only_directories_of_demos_that_ended_are_abandoned() {
        let base = tempfile::tempdir().expect("a directory");
        // No process has this number: it is above the kernel's greatest.
        for name in ["duplex-demo-4194305", "duplex-demo-x", "other-4194305"] {
            std::fs::create_dir(base.path().join(name)).expect("made");
        }
        let own = base.path().join(format!("{PREFIX}{}", std::process::id()));
        std::fs::create_dir(own).expect("made");
        let found = abandoned(base.path()).expect("readable");
        // This test's program is called duplex-HASH: it runs.
        assert_eq!(found, [base.path().canonicalize().expect("there").join("duplex-demo-4194305")]);
    }

    #[test]
    fn a_long_directory_and_a_full_one_are_refused_with_the_reason() {
        let base = tempfile::tempdir().expect("a directory");
        let long = base.path().join("x".repeat(100));
        std::fs::create_dir(&long).expect("made");
        assert!(make(&long, 1 << 20).expect_err("too long").to_string().contains("too long"));
        let error = make(base.path(), 1 << 60).expect_err("no disk has so much");
        assert!(error.to_string().contains("make room"), "{error}");
        assert_eq!(std::fs::read_dir(base.path()).expect("readable").count(), 1);
    }

    #[test]
    fn a_directory_that_nothing_was_made_in_is_removed() {
        let base = tempfile::tempdir().expect("a directory");
        let directory = make(base.path(), 1 << 20).expect("made");
        std::fs::create_dir(directory.join("alpha")).expect("made");
        remove(&directory).expect("removed");
        assert!(!directory.exists());
    }
}
