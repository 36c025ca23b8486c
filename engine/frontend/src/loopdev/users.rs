//! Who uses a block device.

use std::collections::BTreeSet;
use std::fmt;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// One user of a block device.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum DeviceUser {
    /// A mount point, in some mount namespace.
    Mounted {
        /// Where.
        at: PathBuf,
    },
    /// Swap space.
    Swap,
    /// Another block device lies on it (LVM, dm-crypt, md).
    Device {
        /// Its kernel name.
        name: String,
    },
    /// A process has it open.
    Process {
        /// Its number.
        pid: u32,
        /// Its name.
        name: String,
    },
    /// The kernel says that it is claimed, and nothing says by whom (a mount in a namespace that is hidden from us).
    Unknown,
}

impl fmt::Display for DeviceUser {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mounted { at } => write!(f, "mounted at {}", at.display()),
            Self::Swap => f.write_str("used as swap"),
            Self::Device { name } => write!(f, "part of device {name}"),
            Self::Process { pid, name } => write!(f, "open in process {pid} ({name})"),
            Self::Unknown => f.write_str("claimed by somebody this process cannot see"),
        }
    }
}

/// Mounts (of every namespace that is visible), swap, devices above and processes that use the device `major:minor`.
/// Nothing is opened. Costs a walk through `/proc`: for operators' verbs, not for a timer.
pub fn device_users(path: &Path, major: u32, minor: u32) -> Vec<DeviceUser> {
    let mut users = BTreeSet::new();
    let number = rustix::fs::makedev(major, minor);
    let mut namespaces = BTreeSet::new();
    mounts_of(Path::new("/proc/self"), major, minor, &mut namespaces, &mut users);
    let own = std::process::id();
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        let process = entry.path();
        mounts_of(&process, major, minor, &mut namespaces, &mut users);
        if has_open(&process, number) && pid != own {
            let name = std::fs::read_to_string(process.join("comm")).unwrap_or_default();
            users.insert(DeviceUser::Process { pid, name: name.trim().to_owned() });
        }
    }
    let holders = format!("/sys/dev/block/{major}:{minor}/holders");
    for holder in std::fs::read_dir(holders).into_iter().flatten().flatten() {
        users.insert(DeviceUser::Device { name: holder.file_name().to_string_lossy().into_owned() });
    }
    let swaps = std::fs::read_to_string("/proc/swaps").unwrap_or_default();
    if swaps
        .lines()
        .skip(1)
        .any(|line| line.split_whitespace().next().is_some_and(|used| Path::new(used) == path))
    {
        users.insert(DeviceUser::Swap);
    }
    users.into_iter().collect()
}

fn mounts_of(
    process: &Path,
    major: u32,
    minor: u32,
    namespaces: &mut BTreeSet<PathBuf>,
    users: &mut BTreeSet<DeviceUser>,
) {
    let Ok(namespace) = std::fs::read_link(process.join("ns/mnt")) else { return };
    if !namespaces.insert(namespace) {
        return;
    }
    let Ok(text) = std::fs::read_to_string(process.join("mountinfo")) else { return };
    for at in mounts_in(&text, major, minor) {
        users.insert(DeviceUser::Mounted { at });
    }
}

/// Mount points of the device in a `mountinfo` text: by its number, or by its path where the file system has a
/// number of its own (btrfs).
fn mounts_in(text: &str, major: u32, minor: u32) -> Vec<PathBuf> {
    let number = format!("{major}:{minor}");
    let source = format!("/dev/loop{minor}");
    let mut found = Vec::new();
    for line in text.lines() {
        let mut words = line.split(' ');
        let device = words.nth(2);
        let at = words.nth(1);
        let from = line.split(" - ").nth(1).and_then(|rest| rest.split(' ').nth(1));
        if device == Some(number.as_str()) || from == Some(source.as_str()) {
            found.extend(at.map(unescape));
        }
    }
    found
}

/// Undoes the kernel's `\040` for a space and its like.
fn unescape(word: &str) -> PathBuf {
    let bytes = word.as_bytes();
    let mut plain = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let digits = bytes.get(at + 1..at + 4).and_then(|digits| std::str::from_utf8(digits).ok());
        match digits.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) if bytes[at] == b'\\' => {
                plain.push(byte);
                at += 4;
            }
            Some(_) | None => {
                plain.push(bytes[at]);
                at += 1;
            }
        }
    }
    PathBuf::from(std::ffi::OsString::from_vec(plain))
}

fn has_open(process: &Path, number: u64) -> bool {
    let Ok(descriptors) = std::fs::read_dir(process.join("fd")) else { return false };
    descriptors.flatten().any(|descriptor| {
        // Only what is named in /dev is looked at: following other links could wait for a dead server.
        std::fs::read_link(descriptor.path()).is_ok_and(|target| target.starts_with("/dev"))
            && std::fs::metadata(descriptor.path()).is_ok_and(|metadata| {
                metadata.rdev() == number && metadata.mode() & libc::S_IFMT == libc::S_IFBLK
            })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_found_by_number_and_by_source() {
        let text = "36 35 7:3 / /srv/a\\040b rw,noatime master:1 - ext4 /dev/loop3 rw\n\
                    37 35 0:55 / /srv/c rw - btrfs /dev/loop3 rw\n\
                    38 35 7:30 / /srv/d rw - ext4 /dev/loop30 rw\n\
                    garbage\n";
        assert_eq!(mounts_in(text, 7, 3), [PathBuf::from("/srv/a b"), PathBuf::from("/srv/c")]);
        assert_eq!(mounts_in(text, 7, 30), [PathBuf::from("/srv/d")]);
        assert!(mounts_in(text, 7, 4).is_empty());
    }

    #[test]
    fn escapes_are_undone_and_nothing_else() {
        assert_eq!(unescape("/a\\134b\\"), PathBuf::from("/a\\b\\"));
        assert_eq!(unescape("/plain"), PathBuf::from("/plain"));
    }
}
