//! Files, loop devices and a store to test with.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use duplex_core::ids::{BufferId, ByteRange, DiskOpId};
use duplex_core::request::{DiskOp, DiskOpKind, DiskOutcome};
use duplex_ring::{Arena, Completion, Owner, Ring};
use duplex_store::{Access, Backing, BackingConfig, Placement, Store, StoreEvent};
use tempfile::TempDir;

pub const MIB: u64 = 1 << 20;
pub const DATA_BYTES: u64 = 16 * MIB;
pub const OWNER: Owner = Owner(3);

/// Data at 1 MiB, the rest of the metadata in the last MiB.
pub fn placement() -> Placement {
    Placement::internal(MIB, DATA_BYTES, MIB + DATA_BYTES)
}

pub fn config(path: &Path) -> BackingConfig {
    BackingConfig { data: path.to_owned(), metadata: None, wait: Duration::from_secs(30) }
}

pub fn once(path: &Path) -> BackingConfig {
    BackingConfig { wait: Duration::ZERO, ..config(path) }
}

pub fn make_file(dir: &TempDir, name: &str, bytes: u64) -> PathBuf {
    let path = dir.path().join(name);
    File::create(&path).unwrap().set_len(bytes).unwrap();
    path
}

pub fn is_root(test: &str) -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("SKIPPED: {test} needs root (loop devices, mounts)");
    }
    root
}

/// A loop device, detached when dropped.
pub struct LoopDevice {
    pub path: PathBuf,
}

impl LoopDevice {
    pub fn attach(file: &Path, options: &[&str]) -> Self {
        let output =
            Command::new("losetup").args(["--find", "--show"]).args(options).arg(file).output().unwrap();
        assert!(output.status.success(), "losetup: {}", String::from_utf8_lossy(&output.stderr));
        Self { path: PathBuf::from(String::from_utf8(output.stdout).unwrap().trim()) }
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.path).status();
    }
}

/// A mount, taken away when dropped.
pub struct Mount {
    pub at: PathBuf,
}

impl Mount {
    pub fn new(arguments: &[&str], at: &Path) -> Option<Self> {
        std::fs::create_dir_all(at).unwrap();
        let status = Command::new("mount").args(arguments).arg(at).status();
        if status.is_ok_and(|status| status.success()) {
            Some(Self { at: at.to_owned() })
        } else {
            eprintln!("SKIPPED: mount {arguments:?} is not possible here");
            None
        }
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.at).status();
    }
}

/// A store with its ring and its buffers.
pub struct Bench {
    pub ring: Ring,
    pub arena: Arena,
    pub store: Store,
    next_id: u64,
}

impl Bench {
    pub fn open(config: &BackingConfig, placement: Placement) -> Self {
        let backing = Backing::open(config, Access::Exclusive).unwrap();
        let store = Store::new(OWNER, backing, placement).unwrap();
        Self { ring: Ring::new(1024).unwrap(), arena: Arena::new(64 << 20).unwrap(), store, next_id: 1 }
    }

    pub fn submit(&mut self, kind: DiskOpKind, out: &mut Vec<StoreEvent>) -> DiskOpId {
        let id = DiskOpId(self.next_id);
        self.next_id += 1;
        self.store.submit(DiskOp { id, kind }, &mut self.ring, &mut self.arena, out);
        id
    }

    /// Turns until the store is idle.
    pub fn drain(&mut self, out: &mut Vec<StoreEvent>) {
        let mut completions: Vec<Completion> = Vec::new();
        while !self.store.is_idle() {
            self.ring.turn(None, &mut completions).unwrap();
            for completion in completions.drain(..) {
                assert_eq!(completion.token.owner, OWNER);
                self.store.on_completion(completion, &mut self.ring, &mut self.arena, out);
            }
        }
    }

    pub fn run(&mut self, kind: DiskOpKind) -> DiskOutcome {
        let mut out = Vec::new();
        let id = self.submit(kind, &mut out);
        self.drain(&mut out);
        assert_eq!(out.len(), 1);
        let (done, outcome) = out.remove(0);
        assert_eq!(done, id);
        outcome
    }

    pub fn filled(&mut self, bytes: &[u8]) -> BufferId {
        let buffer = self.arena.alloc(bytes.len()).unwrap();
        self.arena.bytes_mut(buffer)[..bytes.len()].copy_from_slice(bytes);
        buffer
    }

    pub fn write(&mut self, offset: u64, bytes: &[u8], fua: bool) -> DiskOutcome {
        let buffer = self.filled(bytes);
        let range = ByteRange::new(offset, bytes.len() as u64);
        let outcome = self.run(DiskOpKind::Write { range, buffer, fua });
        self.arena.release(buffer);
        outcome
    }

    pub fn read(&mut self, offset: u64, len: usize) -> Result<Vec<u8>, DiskOutcome> {
        let buffer = self.arena.alloc(len).unwrap();
        let outcome = self.run(DiskOpKind::Read { range: ByteRange::new(offset, len as u64), buffer });
        let bytes = self.arena.bytes(buffer)[..len].to_vec();
        self.arena.release(buffer);
        if outcome == DiskOutcome::Done { Ok(bytes) } else { Err(outcome) }
    }
}

/// Numbers that look random and are the same in every run.
pub struct Draws(pub u64);

impl Draws {
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }
}
