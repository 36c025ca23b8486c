//! The system programs that tests and the demo call, and the Debian package each comes from.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// A program and the Debian package that brings it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Need {
    /// Name of the program.
    pub(crate) program: &'static str,
    /// Debian's package.
    pub(crate) package: &'static str,
}

const fn need(program: &'static str, package: &'static str) -> Need {
    Need { program, package }
}

/// What `duplex demo` calls.
pub(crate) const DEMO: &[Need] = &[
    need("ip", "iproute2"),
    need("mkfs.ext4", "e2fsprogs"),
    need("fsck.ext4", "e2fsprogs"),
    need("mount", "mount"),
    need("losetup", "mount"),
];

/// What the lab, the acceptance cases and the crash rounds call.
pub(crate) const LAB: &[Need] = &[
    need("ip", "iproute2"),
    need("ss", "iproute2"),
    need("nft", "nftables"),
    need("mkfs.ext4", "e2fsprogs"),
    need("fsck.ext4", "e2fsprogs"),
    need("e2fsck", "e2fsprogs"),
    need("mkfs.xfs", "xfsprogs"),
    need("xfs_repair", "xfsprogs"),
    need("mkfs.btrfs", "btrfs-progs"),
    need("mkfs.vfat", "dosfstools"),
    need("mount", "mount"),
    need("losetup", "mount"),
    need("blkdiscard", "util-linux"),
    need("setpriv", "util-linux"),
    need("fio", "fio"),
    need("nbdinfo", "libnbd-bin"),
    need("nbdcopy", "libnbd-bin"),
    need("qemu-nbd", "qemu-utils"),
    need("qemu-img", "qemu-utils"),
    need("qemu-io", "qemu-utils"),
    need("postgres", POSTGRESQL),
    need("pgbench", POSTGRESQL),
    need("pg_amcheck", POSTGRESQL),
    need("strace", "strace"),
];

const POSTGRESQL: &str = "postgresql";
/// Debian puts each version's programs in a directory of their own.
const POSTGRESQL_VERSIONS: &str = "/usr/lib/postgresql";
/// Settings of the cluster that Debian's package makes and starts when it is installed.
const POSTGRESQL_CLUSTERS: &str = "/etc/postgresql-common/createcluster.d";

/// Our file among them; its first line names the process that made it.
const NO_CLUSTER: &str = "duplex-tests.conf";

/// What the benchmarks call.
pub(crate) const BENCH: &[Need] =
    &[need("fio", "fio"), need("qemu-storage-daemon", "qemu-system-common"), need("strace", "strace")];

/// The needs whose program is nowhere on the path.
pub(crate) fn missing(needs: &[Need]) -> Vec<Need> {
    needs.iter().copied().filter(|need| !present(need.program)).collect()
}

fn present(program: &str) -> bool {
    let path = std::env::var("PATH").unwrap_or_default();
    let versions = std::fs::read_dir(POSTGRESQL_VERSIONS).into_iter().flatten().flatten();
    path.split(':')
        .chain(["/usr/sbin", "/sbin", "/usr/local/sbin"])
        .any(|directory| Path::new(directory).join(program).is_file())
        || versions.map(|version| version.path().join("bin").join(program)).any(|path| path.is_file())
}

/// Whether this process may install packages, mount and make namespaces.
pub(crate) fn is_root() -> bool {
    std::fs::read_to_string("/proc/self/status")
        .ok()
        .and_then(|status| {
            let line = status.lines().find(|line| line.starts_with("Uid:"))?.to_owned();
            line.split_whitespace().nth(2).map(|uid| uid == "0")
        })
        .unwrap_or(false)
}

/// Installs what is missing (root on a machine with apt), or fails and names every package.
pub(crate) fn require(needs: &[Need]) -> Result<()> {
    if is_root() {
        NoCluster::sweep(Path::new(POSTGRESQL_CLUSTERS));
    }
    let absent = missing(needs);
    if absent.is_empty() {
        return Ok(());
    }
    let names = package_names(&absent);
    if !is_root() || !present("apt-get") {
        bail!("missing programs; install these packages: {}", names.join(" "));
    }
    println!("installing {}", names.join(" "));
    apt(&["update", "-q"])?;
    let mut words = vec!["install", "-y", "-q", "--no-install-recommends"];
    words.extend(names.iter().copied());
    let no_cluster = names.contains(&POSTGRESQL).then(NoCluster::begin).transpose()?;
    let installed = apt(&words);
    drop(no_cluster);
    installed?;
    let still = missing(needs);
    if still.is_empty() {
        return Ok(());
    }
    bail!("still missing after the installation: {}", package_names(&still).join(" "))
}

/// While it lives, an installation of PostgreSQL makes no database and starts no server: the tests want the programs.
struct NoCluster {
    file: PathBuf,
    made_directory: bool,
}

impl NoCluster {
    fn begin() -> Result<NoCluster> {
        let directory = Path::new(POSTGRESQL_CLUSTERS);
        let made_directory = !directory.is_dir();
        std::fs::create_dir_all(directory)?;
        let file = directory.join(NO_CLUSTER);
        std::fs::write(&file, format!("# {}\ncreate_main_cluster = false\n", std::process::id()))
            .with_context(|| format!("{} cannot be written", file.display()))?;
        Ok(NoCluster { file, made_directory })
    }

    /// Removes the file that a killed run left: with it, no installation makes a database any more.
    fn sweep(directory: &Path) {
        let file = directory.join(NO_CLUSTER);
        let Ok(text) = std::fs::read_to_string(&file) else { return };
        let owner = text.lines().next().and_then(|line| line.strip_prefix("# ")?.parse::<u32>().ok());
        if owner.is_none_or(|owner| !Path::new("/proc").join(owner.to_string()).exists()) {
            let _ = std::fs::remove_file(&file);
        }
    }
}

impl Drop for NoCluster {
    fn drop(&mut self) {
        // What cannot be removed is harmless, and the next installation tries again.
        let _ = std::fs::remove_file(&self.file);
        if self.made_directory {
            let _ = std::fs::remove_dir(POSTGRESQL_CLUSTERS);
        }
    }
}

fn package_names(needs: &[Need]) -> Vec<&'static str> {
    let mut names: Vec<_> = needs.iter().map(|need| need.package).collect();
    names.sort_unstable();
    names.dedup();
    names
}

fn apt(words: &[&str]) -> Result<()> {
    let output = Command::new("apt-get")
        .args(words)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .output()
        .context("apt-get cannot be started")?;
    if output.status.success() {
        return Ok(());
    }
    bail!("apt-get {} failed:\n{}", words.join(" "), String::from_utf8_lossy(&output.stderr))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dead_runs_file_is_swept_and_a_living_ones_stays() {
        let directory = std::env::temp_dir().join(format!("duplex-xtask-{}", std::process::id()));
        std::fs::create_dir_all(&directory).expect("a directory");
        let file = directory.join(NO_CLUSTER);
        for (owner, stays) in [(std::process::id(), true), (u32::MAX, false)] {
            std::fs::write(&file, format!("# {owner}\ncreate_main_cluster = false\n")).expect("written");
            NoCluster::sweep(&directory);
            assert_eq!(file.exists(), stays, "{owner}");
        }
        // As earlier versions wrote it.
        std::fs::write(&file, "create_main_cluster = false\n").expect("written");
        NoCluster::sweep(&directory);
        assert!(!file.exists());
        std::fs::remove_dir_all(&directory).expect("removed");
    }

    #[test]
    fn a_program_that_is_nowhere_is_missing_and_named_once() {
        let needs =
            [need("no-such-program-a", "pkg-z"), need("no-such-program-b", "pkg-z"), need("sh", "dash")];
        let absent = missing(&needs);
        assert_eq!(absent.len(), 2);
        assert_eq!(package_names(&absent), ["pkg-z"]);
    }
}
