//! The little of the FUSE protocol that one file needs: structures of the kernel's header as bytes, and the mount.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use anyhow::{Context, Result};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen,
};

pub(super) const LOOKUP: u32 = 1;
pub(super) const FORGET: u32 = 2;
pub(super) const GETATTR: u32 = 3;
pub(super) const SETATTR: u32 = 4;
pub(super) const OPEN: u32 = 14;
pub(super) const READ: u32 = 15;
pub(super) const WRITE: u32 = 16;
pub(super) const STATFS: u32 = 17;
pub(super) const RELEASE: u32 = 18;
pub(super) const FSYNC: u32 = 20;
pub(super) const FLUSH: u32 = 25;
pub(super) const INIT: u32 = 26;
pub(super) const INTERRUPT: u32 = 36;
pub(super) const DESTROY: u32 = 38;
pub(super) const BATCH_FORGET: u32 = 42;
pub(super) const FALLOCATE: u32 = 43;

/// Largest read or write.
pub(super) const IO_BYTES_MAX: usize = 1 << 20;
/// Bytes of the request header, and of the header with the arguments of a read or write.
pub(super) const HEADER_BYTES: usize = 40;
pub(super) const IO_HEADER_BYTES: usize = 80;

const INIT_BIG_WRITES: u32 = 1 << 5;
const INIT_ASYNC_READ: u32 = 1;
const INIT_ASYNC_DIO: u32 = 1 << 15;
const INIT_MAX_PAGES: u32 = 1 << 22;
const OPEN_DIRECT_IO: u32 = 1;
const OPEN_PARALLEL_DIRECT_WRITES: u32 = 1 << 6;

/// A request's header.
#[derive(Debug, Clone, Copy)]
pub(super) struct Header {
    pub(super) operation: u32,
    pub(super) unique: u64,
}

/// Opens /dev/fuse and mounts it with a regular file as root, attached to no directory of anyone.
pub(super) fn mount() -> Result<(File, OwnedFd)> {
    let device =
        File::options().read(true).write(true).open("/dev/fuse").context("/dev/fuse cannot be opened")?;
    let context = fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC).context("fsopen(fuse)")?;
    let descriptor = device.as_raw_fd().to_string();
    for (key, value) in [
        ("source", "duplex-lab"),
        ("fd", descriptor.as_str()),
        ("rootmode", "100600"),
        ("user_id", "0"),
        ("group_id", "0"),
    ] {
        fsconfig_set_string(context.as_fd(), key, value)
            .with_context(|| format!("fsconfig {key}={value}"))?;
    }
    fsconfig_create(context.as_fd()).context("fsconfig create")?;
    let mount = fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())
        .context("fsmount")?;
    Ok((device, mount))
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|part| part.try_into().ok()).map_or(0, u32::from_le_bytes)
}

pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|part| part.try_into().ok()).map_or(0, u64::from_le_bytes)
}

pub(super) fn header(bytes: &[u8]) -> Header {
    Header { operation: u32_at(bytes, 4), unique: u64_at(bytes, 8) }
}

/// The answer to INIT.
pub(super) fn init_answer() -> Vec<u8> {
    let mut out = Vec::with_capacity(64);
    for word in [7, 31, 1 << 20, INIT_ASYNC_READ | INIT_BIG_WRITES | INIT_ASYNC_DIO | INIT_MAX_PAGES] {
        out.extend_from_slice(&u32::to_le_bytes(word));
    }
    out.extend_from_slice(&512u16.to_le_bytes()); // max_background
    out.extend_from_slice(&384u16.to_le_bytes()); // congestion_threshold
    out.extend_from_slice(&(IO_BYTES_MAX as u32).to_le_bytes());
    out.extend_from_slice(&1u32.to_le_bytes()); // time_gran
    out.extend_from_slice(&256u16.to_le_bytes()); // max_pages
    out.resize(64, 0);
    out
}

/// `struct fuse_attr_out`: how long it is valid, then the attributes of the file.
pub(super) fn attribute_answer(size_bytes: u64) -> Vec<u8> {
    let mut out = Vec::with_capacity(104);
    out.extend_from_slice(&3600u64.to_le_bytes());
    out.extend_from_slice(&0u64.to_le_bytes()); // nanoseconds, dummy
    for word in [1, size_bytes, size_bytes.div_ceil(512), 0, 0, 0] {
        out.extend_from_slice(&u64::to_le_bytes(word)); // ino, size, blocks, three times
    }
    // three nanoseconds, mode, links, owner, group, device, block size, flags
    for word in [0, 0, 0, 0o100_600, 1, 0, 0, 0, 4096, 0] {
        out.extend_from_slice(&u32::to_le_bytes(word));
    }
    out
}

/// `struct fuse_open_out`.
pub(super) fn open_answer() -> Vec<u8> {
    let mut out = vec![0; 16];
    out[8..12].copy_from_slice(&(OPEN_DIRECT_IO | OPEN_PARALLEL_DIRECT_WRITES).to_le_bytes());
    out
}

/// `struct fuse_statfs_out`.
pub(super) fn statfs_answer(size_bytes: u64) -> Vec<u8> {
    let mut out = Vec::with_capacity(80);
    for word in [size_bytes / 4096, 0, 0, 1, 0] {
        out.extend_from_slice(&u64::to_le_bytes(word));
    }
    for word in [4096u32, 255, 4096, 0] {
        out.extend_from_slice(&word.to_le_bytes());
    }
    out.resize(80, 0);
    out
}

/// A whole answer: header and payload. `error` is an errno or 0.
pub(super) fn answer(unique: u64, error: i32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(16 + payload.len()).expect("answers are below 2 MiB");
    let mut out = Vec::with_capacity(length as usize);
    out.extend_from_slice(&length.to_le_bytes());
    out.extend_from_slice(&(-error).to_le_bytes());
    out.extend_from_slice(&unique.to_le_bytes());
    out.extend_from_slice(payload);
    out
}
