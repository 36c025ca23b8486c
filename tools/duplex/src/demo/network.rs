//! Network namespaces, each a file one can name (`nsenter --net=FILE`), and the cables between them.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use rustix::mount::{UnmountFlags, mount_bind, unmount};

use super::config::{LAN, LINK};
use super::run;

const LIMIT: Duration = Duration::from_secs(20);

/// A network namespace, mounted at a file.
#[derive(Debug)]
pub(crate) struct Network {
    file: PathBuf,
    open: File,
}

impl Network {
    /// A new one, with `lo` up.
    pub(crate) fn new(file: &Path) -> Result<Self> {
        File::create(file).with_context(|| format!("{} cannot be made", file.display()))?;
        std::thread::scope(|scope| scope.spawn(|| make(file)).join())
            .unwrap_or_else(|_| Err(anyhow!("the thread that makes a namespace panicked")))?;
        let open = File::open(file).with_context(|| format!("{} cannot be opened", file.display()))?;
        let network = Self { file: file.to_owned(), open };
        network.ip("link set lo up")?;
        Ok(network)
    }

    /// Makes a command run inside, and in a session of its own: Ctrl-C is the demo's alone. Nothing but the network
    /// is another one: a copied mount namespace would pin the mounts of the demo.
    pub(crate) fn enter(&self, command: &mut Command) {
        let descriptor = self.open.as_raw_fd();
        // SAFETY: between fork and exec only two system calls are made, on a descriptor that this process holds open.
        unsafe {
            command.pre_exec(move || {
                if libc::setns(descriptor, libc::CLONE_NEWNET) < 0 || libc::setsid() < 0 {
                    return Err(std::io::Error::last_os_error());
                }
                Ok(())
            });
        }
    }

    /// `ip WORDS` inside.
    pub(crate) fn ip(&self, words: &str) -> Result<()> {
        let mut command = run::tool("ip");
        command.args(words.split_whitespace());
        self.enter(&mut command);
        run::must(&mut command, LIMIT).map(drop)
    }

    /// Puts one end of a cable here and the other end there.
    fn cable(&self, name: &str, other: &Self, other_name: &str) -> Result<()> {
        let mut command = run::tool("ip");
        command.args(["link", "add", name, "type", "veth", "peer", "name", other_name, "netns"]);
        command.arg(&other.file);
        self.enter(&mut command);
        run::must(&mut command, LIMIT).map(drop)
    }
}

fn make(file: &Path) -> Result<()> {
    // SAFETY: this thread was made for the call; no descriptor or memory of other threads is unshared.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }
        .context("a network namespace cannot be made (CLONE_NEWNET)")?;
    mount_bind("/proc/thread-self/ns/net", file)
        .with_context(|| format!("the namespace cannot be mounted at {}", file.display()))
}

/// Two servers joined by a mirror link of their own, and by a LAN with a switch.
pub(crate) fn wire(servers: [&Network; 2], lan: &Network) -> Result<()> {
    let [first, second] = servers;
    first.cable("link0", second, "link0")?;
    lan.ip("link add switch0 type bridge")?;
    lan.ip("link set switch0 up")?;
    for (at, server) in servers.into_iter().enumerate() {
        let port = format!("port{at}");
        lan.cable(&port, server, "lan0")?;
        lan.ip(&format!("link set {port} master switch0 up"))?;
        for (adapter, address) in [("link0", LINK[at]), ("lan0", LAN[at])] {
            server.ip(&format!("address add {address}/24 dev {adapter}"))?;
            server.ip(&format!("link set {adapter} up"))?;
        }
    }
    Ok(())
}

/// Every process whose network is the one of this file.
pub(crate) fn processes(file: &Path) -> Vec<i32> {
    let Some(wanted) = identity(file) else { return Vec::new() };
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| {
        let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
        // A process that was killed and not buried yet has no namespace any more.
        (identity(&entry.path().join("ns/net"))? == wanted).then_some(pid)
    });
    pids.collect()
}

fn identity(file: &Path) -> Option<(u64, u64)> {
    let about = std::fs::metadata(file).ok()?;
    Some((about.dev(), about.ino()))
}

/// True where a namespace is mounted at the file: then it is not an ordinary one on the directory's disk.
fn is_mounted(file: &Path) -> bool {
    let directory = file.parent().and_then(identity);
    matches!((identity(file), directory), (Some((of_file, _)), Some((of_directory, _))) if of_file != of_directory)
}

/// Kills every process of this network, until none is left.
///
/// # Errors
/// One does not die.
pub(crate) fn kill_all(file: &Path) -> Result<()> {
    if !is_mounted(file) || identity(file) == identity(Path::new("/proc/self/ns/net")) {
        return Ok(());
    }
    let end = std::time::Instant::now() + LIMIT;
    loop {
        let pids = processes(file);
        if pids.is_empty() {
            return Ok(());
        }
        for pid in &pids {
            // SAFETY: kill takes two numbers.
            unsafe { libc::kill(*pid, libc::SIGKILL) };
        }
        if std::time::Instant::now() >= end {
            bail!("processes {pids:?} do not die");
        }
        std::thread::sleep(run::LOOK / 4);
    }
}

/// Takes the namespace's file away; the network goes with its last process.
///
/// # Errors
/// It cannot be unmounted.
pub(crate) fn remove(file: &Path) -> Result<()> {
    if is_mounted(file) {
        unmount(file, UnmountFlags::DETACH).with_context(|| format!("umount {}", file.display()))?;
    }
    match std::fs::remove_file(file) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("{} cannot be removed", file.display()))
        }
        Ok(()) | Err(_) => Ok(()),
    }
}
