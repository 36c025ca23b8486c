//! The working directory of one run, and the sweeping of what a run that was killed left behind.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result};

use super::loopdev;

const PREFIX: &str = "duplex-lab-";

/// A directory of this run, removed when dropped. Its name carries our process id, so that a later run can tell that
/// its owner is dead.
#[derive(Debug)]
pub struct Space {
    path: PathBuf,
    keep: bool,
}

impl Space {
    /// Sweeps what dead runs left, then makes a new directory under the system's directory for temporary files.
    pub fn new() -> Result<Space> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let base = std::env::temp_dir();
        sweep(&base)?;
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = base.join(format!("{PREFIX}{}-{number}", std::process::id()));
        std::fs::create_dir(&path).with_context(|| format!("{} cannot be made", path.display()))?;
        Ok(Space { path, keep: std::env::var_os("DUPLEX_LAB_KEEP").is_some() })
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A new directory inside.
    pub fn directory(&self, name: &str) -> Result<PathBuf> {
        let path = self.path.join(name);
        std::fs::create_dir_all(&path)?;
        Ok(path)
    }

    /// A directory inside that is a file system in memory; made once.
    pub fn memory(&self) -> Result<PathBuf> {
        let path = self.path.join("memory");
        if !path.exists() {
            std::fs::create_dir(&path)?;
            let words = ["-t", "tmpfs", "-o", "size=4g", "duplex-lab"];
            let status = std::process::Command::new("mount").args(words).arg(&path).status()?;
            anyhow::ensure!(status.success(), "a tmpfs cannot be mounted on {}", path.display());
        }
        Ok(path)
    }

    /// A sparse file of `bytes` inside.
    pub fn sparse_file(&self, name: &str, bytes: u64) -> Result<PathBuf> {
        let path = self.path.join(name);
        std::fs::File::create(&path)?.set_len(bytes)?;
        Ok(path)
    }
}

impl Drop for Space {
    fn drop(&mut self) {
        unmount_below(&self.path);
        if !self.keep {
            let _ = std::fs::remove_dir_all(&self.path);
        }
    }
}

/// Removes directories of runs whose process is gone, with the mounts and loop devices on them.
fn sweep(base: &Path) -> Result<()> {
    for entry in std::fs::read_dir(base)? {
        let Ok(entry) = entry else { continue };
        let name = entry.file_name();
        let Some(owner) = name.to_str().and_then(|name| name.strip_prefix(PREFIX)) else { continue };
        let owner = owner.split('-').next().unwrap_or_default();
        if owner.parse::<u32>().is_err() || Path::new("/proc").join(owner).exists() {
            continue;
        }
        unmount_below(&entry.path());
        loopdev::detach_below(&entry.path());
        detach_dead_volumes(&entry.path());
        let _ = std::fs::remove_dir_all(entry.path());
    }
    Ok(())
}

/// Detaches the volumes' devices that a dead run's servers still name.
fn detach_dead_volumes(run: &Path) {
    for server in std::fs::read_dir(run).into_iter().flatten().flatten() {
        loopdev::detach_dead(&server.path().join("run/dev"));
    }
}

/// Unmounts what is mounted below `path`, deepest first, lazily where it is busy.
pub fn unmount_below(path: &Path) {
    let Ok(table) = std::fs::read_to_string("/proc/self/mounts") else { return };
    let mut points: Vec<&str> = table
        .lines()
        .filter_map(|line| line.split_whitespace().nth(1))
        .filter(|point| Path::new(point).starts_with(path))
        .collect();
    points.reverse();
    for point in points {
        if rustix::mount::unmount(point, rustix::mount::UnmountFlags::empty()).is_err() {
            let _ = rustix::mount::unmount(point, rustix::mount::UnmountFlags::DETACH);
        }
    }
}
