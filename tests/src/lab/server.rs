//! One server of a pair: its machine, its disk, its daemon, and the operator at its console.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::process::Signal;
use serde_json::Value;

use super::copies::Copy;
use super::disk::Loss;
use super::disk::process::program;
use super::host::{Ended, Output};
use super::pair::{LIMIT, VOLUME};
use super::writer::{Load, Shared, Writer, socket_in};
use super::{FaultyDisk, Host, LoopDevice, NetNs, wait};

/// What lies under a server's volume.
#[derive(Debug)]
pub enum Disk {
    /// A file.
    File(PathBuf),
    /// A loop device over a sparse file.
    Loop(LoopDevice),
    /// A loop device over a disk that can fail.
    Faulty(FaultyDisk),
}

impl Disk {
    /// What the configuration names.
    pub fn path(&self) -> &Path {
        match self {
            Disk::File(path) => path,
            Disk::Loop(device) => device.path(),
            Disk::Faulty(disk) => disk.path(),
        }
    }

    fn device(&self) -> Option<&LoopDevice> {
        match self {
            Disk::File(_) => None,
            Disk::Loop(device) => Some(device),
            Disk::Faulty(disk) => Some(disk.device()),
        }
    }
}

/// A server.
#[derive(Debug)]
pub struct Server {
    name: &'static str,
    host: Option<Host>,
    daemon: Option<i32>,
    boot_id: u64,
    network: NetNs,
    disk: Disk,
    root: PathBuf,
    daemon_words: Vec<String>,
    program: &'static str,
}

impl Drop for Server {
    /// Ends its processes, then takes away the loop devices that a killed daemon left.
    fn drop(&mut self) {
        self.daemon = None;
        drop(self.host.take());
        super::loopdev::detach_dead(&self.run_directory().join("dev"));
    }
}

impl Server {
    /// Not booted yet.
    pub fn new(name: &'static str, network: NetNs, disk: Disk, root: PathBuf) -> Server {
        let daemon_words = Vec::new();
        Server {
            name,
            host: None,
            daemon: None,
            boot_id: 0,
            network,
            disk,
            root,
            daemon_words,
            program: "duplex",
        }
    }

    /// Its name in the configuration.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Its network.
    pub fn network(&self) -> &NetNs {
        &self.network
    }

    /// Its disk.
    pub fn disk(&self) -> &Disk {
        &self.disk
    }

    /// Its disk, if it is one that can fail.
    pub fn faulty(&self) -> Result<&FaultyDisk> {
        match &self.disk {
            Disk::Faulty(disk) => Ok(disk),
            Disk::File(_) | Disk::Loop(_) => bail!("{} has no disk that can fail", self.name),
        }
    }

    /// Its machine, while it runs.
    pub fn host(&self) -> Result<&Host> {
        self.host.as_ref().with_context(|| format!("{} is off", self.name))
    }

    /// Its configuration file.
    pub fn config(&self) -> PathBuf {
        self.root.join("duplex.toml")
    }

    /// Its run directory.
    pub fn run_directory(&self) -> PathBuf {
        self.root.join("run")
    }

    /// Its state directory.
    pub fn state_directory(&self) -> PathBuf {
        self.root.join("state")
    }

    /// Its directory.
    pub fn directory(&self) -> &Path {
        &self.root
    }

    /// The volume's NBD socket.
    pub fn nbd(&self) -> PathBuf {
        socket_in(&self.run_directory(), VOLUME)
    }

    /// Further words for `duplex daemon`, from its next start on.
    pub fn set_daemon_words(&mut self, words: &[&str]) {
        self.daemon_words = words.iter().map(|word| (*word).to_owned()).collect();
    }

    /// Another build of the product, from the next verb on.
    pub fn set_program(&mut self, name: &'static str) {
        self.program = name;
    }

    /// Changes its configuration file.
    pub fn edit_config(&self, from: &str, to: &str) -> Result<()> {
        let text = std::fs::read_to_string(self.config())?;
        if !text.contains(from) {
            bail!("the configuration of {} has no {from:?}", self.name);
        }
        Ok(std::fs::write(self.config(), text.replace(from, to))?)
    }

    /// Boots the machine; with `new_boot` as after a power cut, else as if only the processes had died.
    pub fn boot(&mut self, new_boot: bool) -> Result<()> {
        if new_boot {
            self.boot_id += 1;
        }
        for directory in [self.run_directory(), self.state_directory()] {
            std::fs::create_dir_all(directory)?;
        }
        let side = u64::from(self.name.as_bytes()[0]);
        let id = format!("d0b1e700-{side:04x}-4000-8000-{:012x}", self.boot_id);
        self.host = Some(Host::boot(&self.network, &id, &self.root.join("host"))?);
        Ok(())
    }

    fn words(&self, verb: &[&str]) -> Result<Vec<String>> {
        let mut words = vec![
            program(self.program)?.display().to_string(),
            "--config".to_owned(),
            self.config().display().to_string(),
            "--server".to_owned(),
            self.name.to_owned(),
            "--run-dir".to_owned(),
            self.run_directory().display().to_string(),
        ];
        words.extend(verb.iter().map(|word| (*word).to_owned()));
        Ok(words)
    }

    fn log(&self) -> PathBuf {
        self.root.join("daemon.log")
    }

    /// Starts the daemon and waits until it answers.
    pub fn start_daemon(&mut self) -> Result<()> {
        self.spawn_daemon()?;
        wait::until(&format!("{}'s daemon to answer", self.name), LIMIT, || {
            if let Some(ended) = self.daemon_ended()? {
                bail!("{}'s daemon ended ({ended:?}):\n{}", self.name, self.log_tail(20));
            }
            Ok(self.cli(&["status", "--json"])?.success().then_some(()))
        })
    }

    /// Starts the daemon and does not wait.
    pub fn spawn_daemon(&mut self) -> Result<()> {
        let mut words = self.words(&["daemon"])?;
        words.extend(self.daemon_words.iter().cloned());
        let environment =
            [("RUST_BACKTRACE".to_owned(), "1".to_owned()), ("NO_COLOR".to_owned(), "1".to_owned())];
        self.daemon = Some(self.host()?.spawn_with(&words, &environment, &self.log(), &self.log())?);
        Ok(())
    }

    /// How the daemon ended; `None` while it runs or was never started.
    pub fn daemon_ended(&self) -> Result<Option<Ended>> {
        self.daemon.map_or(Ok(None), |pid| self.host()?.ended(pid))
    }

    /// Waits for the daemon's own end.
    pub fn wait_daemon_end(&mut self) -> Result<Ended> {
        let pid = self.daemon.with_context(|| format!("{} has no daemon", self.name))?;
        let ended = self.host()?.wait(pid, LIMIT)?;
        self.daemon = None;
        Ok(ended)
    }

    /// Sends a signal to the daemon alone.
    pub fn signal_daemon(&self, signal: Signal) -> Result<()> {
        let pid = self.daemon.with_context(|| format!("{} has no daemon", self.name))?;
        self.host()?.signal(pid, signal)
    }

    /// Kills the daemon alone; the holder and everything else lives.
    pub fn kill_daemon(&mut self) -> Result<()> {
        self.signal_daemon(Signal::KILL)?;
        self.wait_daemon_end().map(drop)
    }

    /// Kills the holder of the volumes' devices alone.
    pub fn kill_holder(&self) -> Result<()> {
        self.signal_holder(Signal::KILL)
    }

    /// Signals the holder of the volumes' devices alone.
    pub fn signal_holder(&self, signal: Signal) -> Result<()> {
        for (pid, words) in self.host()?.processes()? {
            if words.contains(" holder") {
                self.host()?.signal(pid, signal)?;
            }
        }
        Ok(())
    }

    /// Kills every process of the machine at once, and waits until its disk is free. Nothing written is lost.
    pub fn kill(&mut self) -> Result<()> {
        self.daemon = None;
        if let Some(host) = self.host.take() {
            host.kill()?;
        }
        if let Some(device) = self.disk.device() {
            device.wait_released(LIMIT)?;
        }
        Ok(())
    }

    /// Kills every process of the machine, boots it as before, and waits until it is primary again.
    pub fn crash_and_return(&mut self) -> Result<()> {
        self.kill()?;
        self.boot(false)?;
        self.start_daemon()?;
        self.wait("role=primary", LIMIT)
    }

    /// The same for the end of a case.
    pub fn power_off(&mut self) -> Result<()> {
        self.kill()
    }

    /// Cuts the power: every process dies, what was not flushed is treated as `loss` says. Boot with a new id after.
    pub fn power_cut(&mut self, loss: Loss) -> Result<()> {
        self.faulty()?.hold()?;
        self.after_hold(loss)
    }

    /// The second half of a power cut whose [`FaultyDisk::hold`] was done already (both servers at one instant).
    pub fn after_hold(&mut self, loss: Loss) -> Result<()> {
        self.daemon = None;
        let host = self.host.take();
        let disk = self.faulty()?;
        match host {
            Some(host) => host.kill_with(|| disk.lose_power(loss))?,
            None => disk.lose_power(loss)?,
        }
        disk.power_back(LIMIT).map(drop)
    }

    /// Runs a verb.
    pub fn cli(&self, verb: &[&str]) -> Result<Output> {
        self.host()?.run(&self.words(verb)?, LIMIT + Duration::from_secs(15))
    }

    /// Starts a verb and does not wait for its end; what it says goes to the daemon's log.
    pub fn spawn_cli(&self, verb: &[&str]) -> Result<()> {
        self.host()?.spawn(&self.words(verb)?, &self.log(), &self.log()).map(drop)
    }

    /// Runs a verb that must succeed; gives what it printed.
    pub fn must(&self, verb: &[&str]) -> Result<String> {
        let output = self.cli(verb)?;
        if output.success() {
            return Ok(output.stdout);
        }
        bail!("`duplex {}` on {} failed ({:?}): {}", verb.join(" "), self.name, output.ended, output.text())
    }

    /// Runs a verb that must be refused with this exit code; gives what it said.
    pub fn refused(&self, verb: &[&str], code: i32) -> Result<String> {
        let output = self.cli(verb)?;
        if output.ended.code == Some(code) {
            return Ok(output.text());
        }
        bail!(
            "`duplex {}` on {} should end with exit code {code}, ended {:?}: {}",
            verb.join(" "),
            self.name,
            output.ended,
            output.text()
        )
    }

    /// `duplex status --json`.
    pub fn status(&self) -> Result<Value> {
        let text = self.must(&["status", "--json"])?;
        serde_json::from_str(&text).with_context(|| format!("the status of {} is no JSON: {text}", self.name))
    }

    /// A text of the status, `""` for null.
    pub fn status_word(&self, pointer: &str) -> Result<String> {
        Ok(self.status()?.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned())
    }

    /// The volume's dirty blocks.
    pub fn dirty_blocks(&self) -> Result<u64> {
        self.status()?["volumes"][0]["dirty_blocks"].as_u64().context("the status has no dirty_blocks")
    }

    /// Waits for a state or `role=…`.
    pub fn wait(&self, what: &str, limit: Duration) -> Result<()> {
        let seconds = limit.as_secs().max(1).to_string();
        self.must(&["status", "--wait", what, "--timeout", &seconds])
            .with_context(|| format!("waited for {} to be {what}", self.name))
            .map(drop)
    }

    /// Waits for a condition of the status.
    pub fn wait_status(&self, what: &str, mut holds: impl FnMut(&Value) -> bool) -> Result<Value> {
        wait::until(&format!("{}: {what}", self.name), LIMIT, || {
            let status = self.status()?;
            Ok(holds(&status).then_some(status))
        })
    }

    /// Every event it remembers, oldest first.
    pub fn events(&self) -> Result<Vec<Value>> {
        let text = self.must(&["events", "--json"])?;
        text.lines()
            .map(|line| serde_json::from_str(line).with_context(|| format!("an event is no JSON: {line}")))
            .collect()
    }

    /// Events of a kind.
    pub fn events_of(&self, kind: &str) -> Result<Vec<Value>> {
        Ok(self.events()?.into_iter().filter(|event| event["kind"] == kind).collect())
    }

    /// The newest event of a kind, which must be there soon (an event may follow its state).
    pub fn event(&self, kind: &str) -> Result<Value> {
        wait::until(&format!("event `{kind}` on {}", self.name), Duration::from_secs(10), || {
            Ok(self.events_of(kind)?.pop())
        })
    }

    /// A stamped client on the volume's NBD socket.
    pub fn client(&self, history: &Shared, load: Load) -> Result<Writer> {
        Writer::start(&self.nbd(), VOLUME, history, load)
    }

    /// Its copy, read past every cache.
    pub fn copy(&self, size_bytes: u64) -> Result<Copy> {
        Copy::open(self.disk.path(), size_bytes)
    }

    /// The end of the daemon's log.
    pub fn log_tail(&self, lines: usize) -> String {
        let text = std::fs::read(self.log()).map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        let text = text.unwrap_or_default();
        let all: Vec<&str> = text.lines().collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::disk::DiskOptions;
    use crate::lab::{self, Space};

    /// A server with a disk that can fail; instead of the daemon, a process that keeps an io_uring busy on it.
    fn server(space: &Space) -> Server {
        let options = DiskOptions { size_bytes: 16 << 20, sector_bytes: 512, volatile_cache: true };
        let disk = FaultyDisk::new(&space.path().join("platter"), options).expect("a disk");
        let network = NetNs::new().expect("a network");
        Server::new("alpha", network, Disk::Faulty(disk), space.directory("alpha").expect("a directory"))
    }

    fn busy(server: &Server) {
        let host = server.host().expect("on");
        let words = [
            program("duplex-lab").expect("found").display().to_string(),
            "holder".to_owned(),
            server.disk().path().display().to_string(),
        ];
        let before = server.faulty().expect("faulty").counts().expect("counts").writes;
        let log = server.directory().join("holder.log");
        host.spawn(&words, &log, &log).expect("started");
        wait::until("writes", LIMIT, || Ok((server.faulty()?.counts()?.writes > before + 64).then_some(())))
            .unwrap_or_else(|error| {
                panic!("{error:#}: {}", std::fs::read_to_string(&log).unwrap_or_default())
            });
    }

    fn boot_id(server: &Server) -> String {
        let words = ["cat", "/proc/sys/kernel/random/boot_id"].map(str::to_owned);
        server.host().expect("on").run(&words, LIMIT).expect("run").stdout
    }

    #[test]
    fn power_cuts_and_kills_under_a_busy_ring_free_the_disk_every_time() {
        if let Some(why) =
            lab::unavailable().or_else(|| program("duplex-lab").err().map(|error| error.to_string()))
        {
            println!("SKIPPED: {why}");
            return;
        }
        let space = Space::new().expect("a directory");
        let mut server = server(&space);
        server.boot(true).expect("booted");
        let mut ids = vec![boot_id(&server)];
        for round in 0..6 {
            busy(&server);
            let start = std::time::Instant::now();
            if round % 2 == 0 {
                server.power_cut(Loss::Tear { seed: round }).expect("cut");
                server.boot(true).expect("booted");
                assert!(!ids.contains(&boot_id(&server)), "a power cut gives a new boot id");
            } else {
                server.kill().expect("killed");
                server.boot(false).expect("booted");
                assert_eq!(Some(&boot_id(&server)), ids.last(), "a process kill keeps it");
            }
            println!("round {round}: dead, free and booted in {} ms", start.elapsed().as_millis());
            ids.push(boot_id(&server));
            assert_eq!(server.host().expect("on").processes().expect("listed"), Vec::new());
        }
    }

    #[test]
    fn a_running_server_pins_no_mount_of_the_test() {
        if let Some(why) =
            lab::unavailable().or_else(|| program("duplex-lab").err().map(|error| error.to_string()))
        {
            println!("SKIPPED: {why}");
            return;
        }
        let space = Space::new().expect("a directory");
        let file = space.sparse_file("image", 16 << 20).expect("a file");
        let device = LoopDevice::over_file(&file, 512).expect("a device");
        let point = space.directory("mnt").expect("a directory");
        let run = |words: &[&std::ffi::OsStr]| {
            let status = std::process::Command::new(words[0]).args(&words[1..]).status().expect("started");
            assert!(status.success(), "{words:?}");
        };
        run(&["mkfs.ext4".as_ref(), "-q".as_ref(), device.path().as_os_str()]);
        run(&["mount".as_ref(), device.path().as_os_str(), point.as_os_str()]);
        let mut server = server(&space);
        server.boot(true).expect("booted while a file system is mounted");
        run(&["umount".as_ref(), point.as_os_str()]);
        // Only with the last mount of it gone can the device be opened exclusively.
        device.wait_released(Duration::from_secs(5)).expect("nobody pins it");
    }
}
