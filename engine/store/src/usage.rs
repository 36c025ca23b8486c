//! Who uses a file or a block device: mounts, swap, stacked devices, loop devices, `/etc/fstab`, processes.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, major, minor};

/// Processes named at most: the message is for a human.
pub const PROCESSES_MAX: usize = 4;

/// One user of a backing.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Use {
    /// Mounted.
    Mounted {
        /// The device or partition.
        device: String,
        /// Where.
        at: String,
    },
    /// A swap area in use.
    Swap {
        /// As `/proc/swaps` says.
        device: String,
    },
    /// Another block device is built on it (device mapper, md, bcache).
    Holder {
        /// The device or partition.
        device: String,
        /// The kernel name of the upper device.
        holder: String,
    },
    /// A loop device reads and writes the file.
    Loop {
        /// Such as `/dev/loop0`.
        device: String,
    },
    /// `/etc/fstab` mounts it at the next start.
    Fstab {
        /// First field of the line.
        device: String,
        /// Second field of the line.
        at: String,
    },
    /// A process has it open.
    Process {
        /// Process number.
        pid: u32,
        /// Its name.
        name: String,
    },
}

impl fmt::Display for Use {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mounted { device, at } => write!(f, "{device} is mounted at {at}: umount it"),
            Self::Swap { device } => write!(f, "{device} is swap space: swapoff it"),
            Self::Holder { device, holder } => {
                write!(f, "{device} is part of /dev/{holder}: stop that first (dmsetup, mdadm, vgchange)")
            }
            Self::Loop { device } => write!(f, "{device} uses it: losetup -d {device}"),
            Self::Fstab { device, at } => {
                write!(
                    f,
                    "/etc/fstab mounts {device} at {at}: remove that line (mount the mirrored volume instead)"
                )
            }
            Self::Process { pid, name } => write!(f, "process {pid} ({name}) has it open"),
        }
    }
}

/// What a path stands for.
struct Target {
    path: PathBuf,
    canonical: PathBuf,
    is_device: bool,
    /// Of a device: its own number and its partitions'.
    numbers: BTreeSet<u64>,
    /// Of a file: device and inode.
    inode: (u64, u64),
}

impl Target {
    fn of(path: &Path) -> Option<Self> {
        let stat = rustix::fs::stat(path).ok()?;
        let is_device = FileType::from_raw_mode(stat.st_mode).is_block_device();
        let mut numbers = BTreeSet::new();
        if is_device {
            numbers.insert(stat.st_rdev);
            numbers.extend(partitions(stat.st_rdev));
        }
        let canonical = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        Some(Self { path: path.to_owned(), canonical, is_device, numbers, inode: (stat.st_dev, stat.st_ino) })
    }

    /// True when `path` is this device (or one of its partitions), or this file.
    fn is(&self, path: &Path) -> bool {
        let Ok(stat) = rustix::fs::stat(path) else { return false };
        if self.is_device {
            FileType::from_raw_mode(stat.st_mode).is_block_device() && self.numbers.contains(&stat.st_rdev)
        } else {
            (stat.st_dev, stat.st_ino) == self.inode
        }
    }
}

/// Everybody who uses the path, lasting users first. Empty when nobody does, or the path does not exist.
pub fn find(path: &Path) -> Vec<Use> {
    let mut uses = find_lasting(path);
    uses.extend(find_processes(path));
    uses
}

/// The users that stay until somebody acts: mounts, swap, holders, loop devices, and the mention in `/etc/fstab`.
pub fn find_lasting(path: &Path) -> Vec<Use> {
    let Some(target) = Target::of(path) else { return Vec::new() };
    let read = |name: &str| fs::read_to_string(name).unwrap_or_default();
    let mut uses = mounts(&target, &read("/proc/self/mountinfo"));
    uses.extend(swaps(&target, &read("/proc/swaps")));
    if target.is_device {
        uses.extend(holders(&target));
    } else {
        uses.extend(loops(&target));
    }
    uses.extend(fstab(&target, &read("/etc/fstab")));
    uses.dedup();
    uses
}

/// The processes that have the path open (this one too); at most four.
pub fn find_processes(path: &Path) -> Vec<Use> {
    let Some(target) = Target::of(path) else { return Vec::new() };
    let Ok(processes) = fs::read_dir("/proc") else { return Vec::new() };
    processes
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .filter(|&pid| has_open(&target, pid))
        .take(PROCESSES_MAX)
        .map(|pid| {
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            Use::Process { pid, name: name.trim().to_owned() }
        })
        .collect()
}

fn has_open(target: &Target, pid: u32) -> bool {
    let Ok(descriptors) = fs::read_dir(format!("/proc/{pid}/fd")) else { return false };
    // The link is read first: following one into a dead network file system would hang.
    descriptors.flatten().any(|entry| {
        let Ok(link) = fs::read_link(entry.path()) else { return false };
        link.is_absolute()
            && (link == target.canonical || (target.is_device && link.starts_with("/dev")))
            && target.is(&entry.path())
    })
}

/// The device numbers of a disk's partitions.
fn partitions(number: u64) -> Vec<u64> {
    let Ok(entries) = fs::read_dir(sysfs(number)) else { return Vec::new() };
    entries
        .flatten()
        .filter(|entry| entry.path().join("partition").exists())
        .filter_map(|entry| parse_number(fs::read_to_string(entry.path().join("dev")).ok()?.trim()))
        .collect()
}

fn sysfs(number: u64) -> PathBuf {
    PathBuf::from(format!("/sys/dev/block/{}:{}", major(number), minor(number)))
}

fn parse_number(text: &str) -> Option<u64> {
    let (major, minor) = text.split_once(':')?;
    Some(rustix::fs::makedev(major.parse().ok()?, minor.parse().ok()?))
}

fn device_name(number: u64) -> String {
    let name = fs::canonicalize(sysfs(number))
        .ok()
        .and_then(|path| path.file_name().map(|name| name.to_string_lossy().into_owned()));
    name.map_or_else(|| format!("{}:{}", major(number), minor(number)), |name| format!("/dev/{name}"))
}

fn mounts(target: &Target, mountinfo: &str) -> Vec<Use> {
    let mut uses = Vec::new();
    for line in mountinfo.lines() {
        // id parent major:minor root mount-point options [optional...] - type source super-options
        let Some((left, right)) = line.split_once(" - ") else { continue };
        let mut left = left.split(' ').skip(2);
        let (Some(number), Some(_root), Some(at)) = (left.next(), left.next(), left.next()) else { continue };
        let source = unescape(right.split(' ').nth(1).unwrap_or_default());
        let by_number = parse_number(number).filter(|number| target.numbers.contains(number));
        // btrfs and others give their mounts numbers of their own; a file system may also be mounted from a file.
        let by_source = source.starts_with('/') && target.is(Path::new(&source));
        if by_number.is_some() || by_source {
            let device = by_number.map_or(source, device_name);
            uses.push(Use::Mounted { device, at: unescape(at) });
        }
    }
    uses.truncate(PROCESSES_MAX);
    uses
}

fn swaps(target: &Target, swaps: &str) -> Vec<Use> {
    swaps
        .lines()
        .skip(1)
        .filter_map(|line| line.split_whitespace().next())
        .map(unescape)
        .filter(|name| target.is(Path::new(name)))
        .map(|device| Use::Swap { device })
        .collect()
}

fn holders(target: &Target) -> Vec<Use> {
    let mut uses = Vec::new();
    for &number in &target.numbers {
        let Ok(entries) = fs::read_dir(sysfs(number).join("holders")) else { continue };
        for entry in entries.flatten() {
            let holder = entry.file_name().to_string_lossy().into_owned();
            uses.push(Use::Holder { device: device_name(number), holder });
        }
    }
    uses
}

fn loops(target: &Target) -> Vec<Use> {
    let Ok(entries) = fs::read_dir("/sys/block") else { return Vec::new() };
    entries
        .flatten()
        .filter(|entry| {
            let Ok(text) = fs::read_to_string(entry.path().join("loop/backing_file")) else { return false };
            // The path as seen by whoever set it up: believed only when it leads to this very file.
            let path = Path::new(text.trim_end_matches('\n'));
            path.file_name() == target.canonical.file_name() && target.is(path)
        })
        .map(|entry| Use::Loop { device: format!("/dev/{}", entry.file_name().to_string_lossy()) })
        .collect()
}

fn fstab(target: &Target, fstab: &str) -> Vec<Use> {
    let mut uses = Vec::new();
    for line in fstab.lines() {
        let mut fields = line.split_whitespace();
        let (Some(device), Some(at)) = (fields.next(), fields.next()) else { continue };
        if device.starts_with('#') {
            continue;
        }
        if target.is(&fstab_path(device)) || Path::new(&unescape(device)) == target.path {
            uses.push(Use::Fstab { device: unescape(device), at: unescape(at) });
        }
    }
    uses
}

/// The path of fstab's first field: `UUID=`, `LABEL=`, `PARTUUID=` and `PARTLABEL=` go through udev's links.
fn fstab_path(field: &str) -> PathBuf {
    let field = unescape(field);
    let Some((key, value)) = field.split_once('=') else { return PathBuf::from(field) };
    let value = value.trim_matches('"');
    match key {
        "UUID" => Path::new("/dev/disk/by-uuid").join(value),
        "LABEL" => Path::new("/dev/disk/by-label").join(value),
        "PARTUUID" => Path::new("/dev/disk/by-partuuid").join(value),
        "PARTLABEL" => Path::new("/dev/disk/by-partlabel").join(value),
        _ => PathBuf::from(field),
    }
}

/// Undoes the octal escapes of `/proc` tables and fstab (`\040` for a blank).
fn unescape(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        let octal =
            after.get(..3).filter(|digits| byte == b'\\' && digits.iter().all(|d| (b'0'..=b'7').contains(d)));
        if let Some(digits) = octal {
            bytes.push(
                digits.iter().fold(0_u8, |value, digit| value.wrapping_mul(8).wrapping_add(digit - b'0')),
            );
            rest = &after[3..];
        } else {
            bytes.push(byte);
            rest = after;
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// True when `path` (a log, a state directory) lies on a file system that is mounted from `backing`.
pub fn lies_on(path: &Path, backing: &Path) -> bool {
    let (Some(target), Ok(metadata)) = (Target::of(backing), fs::metadata(path)) else { return false };
    target.is_device && target.numbers.contains(&metadata.dev())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file_target(path: &Path) -> Target {
        Target::of(path).unwrap()
    }

    #[test]
    fn escapes_of_proc_tables_are_undone() {
        assert_eq!(unescape(r"/mnt/a\040b\134c"), r"/mnt/a b\c");
        assert_eq!(unescape(r"a\04"), r"a\04");
    }

    #[test]
    fn a_mounted_file_is_found_by_its_source() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let path = file.path().display();
        let table = format!(
            "21 1 8:1 / / rw - ext4 /dev/none rw\n36 21 0:99 / /srv/my\\040data rw shared:1 - fuse {path} rw\n"
        );
        let uses = mounts(&file_target(file.path()), &table);
        assert_eq!(uses, [Use::Mounted { device: path.to_string(), at: "/srv/my data".to_owned() }]);
        assert!(uses[0].to_string().contains("/srv/my data"));
    }

    #[test]
    fn fstab_names_count_and_comments_do_not() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let path = file.path().display();
        let table = format!("# {path} /old ext4\n{path} /data ext4 defaults 0 2\nUUID=nope / ext4\n");
        let uses = fstab(&file_target(file.path()), &table);
        assert_eq!(uses, [Use::Fstab { device: path.to_string(), at: "/data".to_owned() }]);
        assert_eq!(fstab_path("UUID=\"1-2\""), Path::new("/dev/disk/by-uuid/1-2"));
    }

    #[test]
    fn a_swap_file_is_found() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let path = file.path().display();
        let table = format!("Filename Type Size Used Priority\n{path} file 1 0 -2\n");
        assert_eq!(swaps(&file_target(file.path()), &table), [Use::Swap { device: path.to_string() }]);
    }

    #[test]
    fn the_root_file_system_is_mounted() {
        let mountinfo = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let root = mountinfo.lines().find(|line| line.split(' ').nth(4) == Some("/")).unwrap();
        let source = root.split_once(" - ").unwrap().1.split(' ').nth(1).unwrap();
        let is_device = fs::metadata(source).is_ok_and(|metadata| metadata.rdev() != 0);
        if !is_device {
            eprintln!(
                "SKIPPED: the root file system is not on a block device that is visible here ({source})"
            );
            return;
        }
        let uses = find_lasting(Path::new(source));
        assert!(uses.iter().any(|one| matches!(one, Use::Mounted { at, .. } if at == "/")), "{uses:?}");
    }
}
