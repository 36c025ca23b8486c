//! A server's operating system, as far as a test needs one: a PID, mount and network namespace with an init that
//! starts programs when told. Killing the init kills every process of the server; a boot id of its own makes the
//! difference between a killed process and a machine that lost power.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind, mount_change, unmount,
};
use rustix::process::{Pid, Signal, WaitOptions};
use serde::{Deserialize, Serialize};

use super::disk::process::{Helper, program};
use super::system::{self, NoProgram};
use super::{NetNs, wait};

const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

#[derive(Debug, Serialize, Deserialize)]
enum Order {
    Spawn {
        words: Vec<String>,
        environment: Vec<(String, String)>,
        output: PathBuf,
        errors: PathBuf,
    },
    Look {
        pid: i32,
    },
    Signal {
        pid: i32,
        signal: i32,
    },
    /// Process ids of every process of the server but the init, with their command lines.
    Processes,
}

#[derive(Debug, Serialize, Deserialize)]
enum Report {
    Up {
        outer_pid: u32,
    },
    Spawned {
        pid: i32,
    },
    Running,
    Ended {
        code: Option<i32>,
        signal: Option<i32>,
    },
    Done,
    Processes(Vec<(i32, String)>),
    /// There is no such program: nothing was started.
    NoProgram(String),
    Refused(String),
}

/// How a program of the server ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    /// Its exit code, if it exited.
    pub code: Option<i32>,
    /// The signal that ended it, if one did.
    pub signal: Option<i32>,
}

/// What a program that ran to its end said.
#[derive(Debug, Clone)]
pub struct Output {
    /// How it ended.
    pub ended: Ended,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Output {
    /// True for exit code 0.
    pub fn success(&self) -> bool {
        self.ended.code == Some(0)
    }

    /// Both streams, for a message.
    pub fn text(&self) -> String {
        format!("{}{}", self.stdout, self.stderr).trim().to_owned()
    }
}

/// A running server machine. Dropping it ends every process of it.
#[derive(Debug)]
pub struct Host {
    helper: Helper,
    init: Pid,
    scratch: PathBuf,
    runs: AtomicU32,
}

impl Host {
    /// Boots a server in this network with this boot id; `scratch` holds the output of its programs.
    pub fn boot(network: &NetNs, boot_id: &str, scratch: &Path) -> Result<Host> {
        std::fs::create_dir_all(scratch)?;
        let boot_file = scratch.join("boot_id");
        std::fs::write(&boot_file, format!("{boot_id}\n"))?;
        let program = program("duplex-lab")?;
        let mut command = network.command(program.to_str().context("a program path that is not text")?);
        command.arg("host").arg("--boot-id").arg(&boot_file);
        let mut helper = Helper::start_command(command)?;
        let report = helper.receive()?;
        let Report::Up { outer_pid } = report else { bail!("the server did not boot: {report:?}") };
        let init =
            i32::try_from(outer_pid).ok().and_then(Pid::from_raw).context("the init has no process id")?;
        let host = Host { helper, init, scratch: scratch.to_owned(), runs: AtomicU32::new(0) };
        host.processes().context("the init does not answer")?;
        Ok(host)
    }

    fn tell(&self, order: &Order) -> Result<Report> {
        let report = self.helper.ask(order)?;
        if let Report::NoProgram(name) = report {
            return Err(NoProgram(name, system::INSTALL).into());
        }
        if let Report::Refused(why) = report {
            bail!("the init refused {order:?}: {why}");
        }
        Ok(report)
    }

    /// Starts a program; both streams go to files. Gives its process id inside.
    pub fn spawn(&self, words: &[String], output: &Path, errors: &Path) -> Result<i32> {
        self.spawn_with(words, &[], output, errors)
    }

    /// The same with environment variables added.
    pub fn spawn_with(
        &self,
        words: &[String],
        environment: &[(String, String)],
        output: &Path,
        errors: &Path,
    ) -> Result<i32> {
        let order = Order::Spawn {
            words: words.to_vec(),
            environment: environment.to_vec(),
            output: output.to_owned(),
            errors: errors.to_owned(),
        };
        let report = self.tell(&order)?;
        let Report::Spawned { pid } = report else { bail!("{words:?}: {report:?}") };
        Ok(pid)
    }

    /// How a program ended; `None` while it runs.
    pub fn ended(&self, pid: i32) -> Result<Option<Ended>> {
        let report = self.tell(&Order::Look { pid })?;
        if let Report::Running = report {
            return Ok(None);
        }
        let Report::Ended { code, signal } = report else { bail!("process {pid}: {report:?}") };
        Ok(Some(Ended { code, signal }))
    }

    /// Waits for a program's end.
    pub fn wait(&self, pid: i32, limit: Duration) -> Result<Ended> {
        wait::until(&format!("process {pid} to end"), limit, || self.ended(pid))
    }

    /// Sends a signal to a program.
    pub fn signal(&self, pid: i32, signal: Signal) -> Result<()> {
        self.tell(&Order::Signal { pid, signal: signal.as_raw() }).map(drop)
    }

    /// Every process of the server but the init, with its command line.
    pub fn processes(&self) -> Result<Vec<(i32, String)>> {
        let report = self.tell(&Order::Processes)?;
        let Report::Processes(list) = report else { bail!("processes: {report:?}") };
        Ok(list)
    }

    /// Runs a program to its end; killed at the limit.
    pub fn run(&self, words: &[String], limit: Duration) -> Result<Output> {
        let number = self.runs.fetch_add(1, Ordering::Relaxed);
        let (output, errors) =
            (self.scratch.join(format!("run{number}.out")), self.scratch.join(format!("run{number}.err")));
        let pid = self.spawn(words, &output, &errors)?;
        let ended = self.wait(pid, limit);
        if ended.is_err() {
            self.signal(pid, Signal::KILL)?;
        }
        let text =
            |path: &Path| std::fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        let (stdout, stderr) = (text(&output)?, text(&errors)?);
        let _ = (std::fs::remove_file(&output), std::fs::remove_file(&errors));
        let ended = ended.with_context(|| format!("`{}` said: {stdout}{stderr}", words.join(" ")))?;
        Ok(Output { ended, stdout, stderr })
    }

    /// Kills every process of the server at once, and waits until the kernel has buried them.
    pub fn kill(self) -> Result<()> {
        self.kill_with(|| Ok(()))
    }

    /// The same; `then` is done once no program runs any more, if some wait in the kernel for a disk that does not
    /// answer: they cannot be buried before it does, and never run again.
    pub fn kill_with(mut self, then: impl FnOnce() -> Result<()>) -> Result<()> {
        rustix::process::kill_process(self.init, Signal::KILL).context("the init cannot be killed")?;
        let buried = self.helper.wait_end(Duration::from_millis(500));
        then()?;
        buried
            .or_else(|_| self.helper.wait_end(Duration::from_secs(20)))
            .context("a killed server does not die")
    }
}

/// The outer side: makes the namespaces, starts the init in them, ends when the init has ended.
pub fn outer(boot_id: &Path) -> Result<()> {
    // Shared memory of its own, too: a database's dies with its server.
    let flags = rustix::thread::UnshareFlags::NEWPID
        | rustix::thread::UnshareFlags::NEWNS
        | rustix::thread::UnshareFlags::NEWIPC;
    // SAFETY: this process has a single thread and shares neither mounts nor children with anyone that relies on it.
    unsafe { rustix::thread::unshare_unsafe(flags) }
        .context("unshare(CLONE_NEWPID | CLONE_NEWNS | CLONE_NEWIPC)")?;
    let mut init =
        Command::new(std::env::current_exe()?).arg("init").arg("--boot-id").arg(boot_id).spawn()?;
    say(&Report::Up { outer_pid: init.id() })?;
    init.wait()?;
    Ok(())
}

/// The init of a server.
pub fn init(boot_id: &Path) -> Result<()> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    arrange_mounts(boot_id)?;
    let control = std::io::stdin().as_fd().try_clone_to_owned()?;
    let mut ended = Vec::new();
    for line in BufReader::new(File::from(control)).lines() {
        let line = line?;
        reap(&mut ended);
        let report =
            match serde_json::from_str(&line).context("not an order").and_then(|order| obey(order, &ended)) {
                Ok(report) => report,
                Err(error) => Report::Refused(format!("{error:#}")),
            };
        say(&report)?;
    }
    Ok(())
}

/// A mount table of its own for this process, which has a single thread: what it mounts goes with it, however it ends.
///
/// # Errors
/// The kernel refuses the namespace.
pub fn own_mounts() -> Result<()> {
    // SAFETY: this process has a single thread and shares its mounts with nobody that relies on them.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS) }
        .context("unshare(CLONE_NEWNS)")?;
    part_mounts()
}

/// Parts a new mount table from the one that it was copied from, so that it pins nobody else's file system.
fn part_mounts() -> Result<()> {
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .context("mounts made private")?;
    let table = std::fs::read_to_string("/proc/self/mounts")?;
    for line in table.lines().rev() {
        let mut words = line.split_whitespace();
        let (source, point) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        if source.starts_with("/dev/loop") {
            let _ = unmount(point, UnmountFlags::DETACH);
        }
    }
    Ok(())
}

/// A mount table of our own, a /proc of the new PID namespace, our boot id over it.
fn arrange_mounts(boot_id: &Path) -> Result<()> {
    part_mounts()?;
    mount("proc", "/proc", "proc", MountFlags::empty(), None).context("/proc of the server")?;
    if Path::new("/dev/shm").is_dir() {
        mount("tmpfs", "/dev/shm", "tmpfs", MountFlags::empty(), Some(c"mode=1777"))
            .context("/dev/shm of the server")?;
    }
    mount_bind(boot_id, BOOT_ID).context("the server's boot id")
}

fn say(report: &Report) -> Result<()> {
    let mut text = serde_json::to_vec(report)?;
    text.push(b'\n');
    let mut control = File::from(std::io::stdin().as_fd().try_clone_to_owned()?);
    Ok(control.write_all(&text)?)
}

/// Buries whoever ended: our own programs and orphans.
fn reap(ended: &mut Vec<(i32, Ended)>) {
    while let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG) {
        let status = ExitStatus::from_raw(status.as_raw());
        ended.push((pid.as_raw_nonzero().get(), Ended { code: status.code(), signal: status.signal() }));
    }
}

fn obey(order: Order, ended: &[(i32, Ended)]) -> Result<Report> {
    match order {
        Order::Spawn { words, environment, output, errors } => {
            let (program, arguments) = words.split_first().context("no program")?;
            let append = |path: &Path| File::options().create(true).append(true).open(path);
            let child = Command::new(program)
                .args(arguments)
                .envs(environment)
                .stdin(Stdio::null())
                .stdout(append(&output)?)
                .stderr(append(&errors)?)
                .spawn();
            let child = match child {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                    return Ok(Report::NoProgram(program.clone()));
                }
                child => child.with_context(|| format!("{program} cannot be started"))?,
            };
            Ok(Report::Spawned { pid: i32::try_from(child.id())? })
        }
        Order::Look { pid } => {
            let found = ended.iter().rev().find(|(of, _)| *of == pid);
            Ok(found.map_or(Report::Running, |(_, how)| Report::Ended { code: how.code, signal: how.signal }))
        }
        Order::Signal { pid, signal } => {
            // SAFETY: kill takes two numbers; a wrong one is an error, not harm to this process.
            let result = unsafe { libc::kill(pid, signal) };
            if result < 0 { Err(std::io::Error::last_os_error()).context("kill") } else { Ok(Report::Done) }
        }
        Order::Processes => Ok(Report::Processes(processes()?)),
    }
}

fn processes() -> Result<Vec<(i32, String)>> {
    let mut list = Vec::new();
    for entry in std::fs::read_dir("/proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        let words = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if pid != 1 && !words.is_empty() {
            list.push((pid, String::from_utf8_lossy(&words).replace('\0', " ").trim().to_owned()));
        }
    }
    list.sort();
    Ok(list)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::{self, Space};

    fn words(text: &str) -> Vec<String> {
        vec!["sh".to_owned(), "-c".to_owned(), text.to_owned()]
    }

    const LIMIT: Duration = Duration::from_secs(20);

    #[test]
    fn a_server_has_its_own_boot_id_processes_and_network_and_dies_whole() {
        if let Some(why) =
            lab::unavailable().or_else(|| program("duplex-lab").err().map(|error| error.to_string()))
        {
            println!("SKIPPED: {why}");
            return;
        }
        let space = Space::new().expect("a directory");
        let network = NetNs::new().expect("a network");
        let host =
            Host::boot(&network, "11111111-2222-3333-4444-555555555555", space.path()).expect("booted");
        let said =
            host.run(&words(&format!("cat {BOOT_ID}; echo $$; ls /sys >&2; exit 3")), LIMIT).expect("run");
        assert!(said.stdout.starts_with("11111111-2222-3333-4444-555555555555\n"), "{}", said.stdout);
        assert_eq!(said.ended.code, Some(3));
        assert!(said.stderr.contains("block"));
        let links =
            host.run(&["ip".to_owned(), "-o".to_owned(), "link".to_owned()], LIMIT).expect("run").stdout;
        assert_eq!(links.lines().count(), 1, "{links}");

        let (log, pipe) = (space.path().join("log"), space.path().join("pipe"));
        let script =
            format!("mkfifo {0}; setsid sh -c 'exec 9<>{0}; sleep 1000 & sleep 1000' & wait", pipe.display());
        let pid = host.spawn(&words(&script), &log, &log).expect("started");
        lab::wait::until("a daemon's children", LIMIT, || {
            Ok((host.processes()?.iter().filter(|(_, words)| words == "sleep 1000").count() == 2)
                .then_some(()))
        })
        .expect("two sleepers");
        assert_eq!(host.ended(pid).expect("asked"), None);
        host.kill().expect("killed");
        // Nobody holds the pipe any more: opening it for writing without waiting finds no reader.
        let open = rustix::fs::open(
            &pipe,
            rustix::fs::OFlags::WRONLY | rustix::fs::OFlags::NONBLOCK,
            rustix::fs::Mode::empty(),
        );
        assert_eq!(open.err(), Some(rustix::io::Errno::NXIO));
    }
}
