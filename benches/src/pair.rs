//! A pair of ours: two daemons on 127.0.0.1 and 127.0.0.2, joined by TCP, over two files.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::process::{Running, cpu_us};
use crate::scratch::{Scratch, await_that};

/// The volume's name.
pub const VOLUME: &str = "data";
/// For anything that should happen on a busy machine.
const LIMIT: Duration = Duration::from_secs(120);
const NAMES: [&str; 2] = ["alpha", "beta"];
/// Metadata before the data, with room to spare.
const METADATA_BYTES: u64 = 16 << 20;

/// Two daemons; alpha is primary. Dropping it ends both.
#[derive(Debug)]
pub struct Pair {
    program: PathBuf,
    root: PathBuf,
    daemons: [Option<Running>; 2],
}

impl Pair {
    /// Makes the files, starts both daemons and waits until the copies are equal.
    pub fn start(
        scratch: &Scratch,
        program: &Path,
        name: &str,
        size_bytes: u64,
        encryption: bool,
    ) -> Result<Pair> {
        let root = scratch.path().join(name);
        std::fs::create_dir(&root)?;
        let mut pair = Pair { program: program.to_path_buf(), root, daemons: [None, None] };
        for server in NAMES {
            scratch.image(&format!("{name}/{server}.image"), size_bytes + METADATA_BYTES)?;
            std::fs::create_dir(pair.root.join(server))?;
        }
        std::fs::write(pair.root.join("duplex.toml"), pair.configuration(size_bytes, encryption)?)?;
        let secret = pair.root.join("secret").display().to_string();
        pair.must(0, &["secret", "new", &secret])?;
        for server in 0..2 {
            pair.must(server, &["create", VOLUME, "--overwrite-data"])?;
            pair.start_daemon(scratch, server)?;
        }
        pair.must(0, &["activate"])?;
        for server in 0..2 {
            pair.wait(server, "mirrored")?;
        }
        Ok(pair)
    }

    fn configuration(&self, size_bytes: u64, encryption: bool) -> Result<String> {
        let listener = TcpListener::bind("127.0.0.2:0")?;
        let port = listener.local_addr()?.port();
        let root = self.root.display();
        let encryption = if encryption { "on" } else { "off" };
        Ok(format!(
            r#"pair = "bench"
state_dir = {{ alpha = "{root}/alpha/state", beta = "{root}/beta/state" }}

[servers.alpha]
link = ["127.0.0.1:{port}"]
[servers.beta]
link = ["127.0.0.2:{port}"]

[volumes.{VOLUME}]
backing = {{ alpha = "{root}/alpha.image", beta = "{root}/beta.image" }}
size = "{}MiB"
frontend = "none"

[security]
secret = "{root}/secret"
encryption = "{encryption}"
"#,
            size_bytes >> 20
        ))
    }

    fn command(&self, server: usize, verb: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.arg("--config").arg(self.root.join("duplex.toml")).args(["--server", NAMES[server]]);
        command.arg("--run-dir").arg(self.run_directory(server)).args(verb);
        command.env("NO_COLOR", "1");
        command
    }

    fn run_directory(&self, server: usize) -> PathBuf {
        self.root.join(NAMES[server]).join("run")
    }

    /// Runs a verb that must succeed; gives what it printed.
    fn must(&self, server: usize, verb: &[&str]) -> Result<String> {
        let output = self.command(server, verb).output().context("duplex cannot be started")?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            bail!("`duplex {}` on {} failed: {said}", verb.join(" "), NAMES[server]);
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    fn start_daemon(&mut self, scratch: &Scratch, server: usize) -> Result<()> {
        let label = format!("{}-{}", self.root.file_name().unwrap_or_default().display(), NAMES[server]);
        let mut daemon = Running::start(scratch, &label, self.command(server, &["daemon"]))?;
        await_that(&format!("the daemon of {label}"), LIMIT, || {
            daemon.check(scratch)?;
            Ok(self.status(server).ok())
        })?;
        self.daemons[server] = Some(daemon);
        Ok(())
    }

    fn status(&self, server: usize) -> Result<Value> {
        Ok(serde_json::from_str(&self.must(server, &["status", "--json"])?)?)
    }

    fn wait(&self, server: usize, state: &str) -> Result<()> {
        let seconds = LIMIT.as_secs().to_string();
        self.must(server, &["status", "--wait", state, "--timeout", &seconds]).map(drop)
    }

    /// The primary's NBD socket.
    pub fn socket(&self) -> PathBuf {
        self.run_directory(0).join(format!("{VOLUME}.nbd"))
    }

    /// The daemons that run.
    pub fn pids(&self) -> Vec<u32> {
        self.daemons.iter().flatten().map(Running::pid).collect()
    }

    /// The primary's process.
    pub fn primary(&self) -> Result<u32> {
        self.daemons[0].as_ref().map(Running::pid).context("the primary does not run")
    }

    /// Kills the secondary and waits until the primary goes on alone.
    pub fn lose_peer(&mut self) -> Result<()> {
        if let Some(mut daemon) = self.daemons[1].take() {
            daemon.kill()?;
        }
        self.wait(0, "alone")
    }

    /// Copies everything anew; seconds from the command to `mirrored`, and the daemons' processor time in it.
    pub fn copy_everything(&self) -> Result<(f64, u64)> {
        let pids = self.pids();
        let (start, before) = (Instant::now(), cpu_us(&pids)?);
        self.must(0, &["resync", "start", "--full", VOLUME, "--target", NAMES[1]])?;
        await_that("the full copy to begin", LIMIT, || {
            Ok((self.status(0)?["state"] != "mirrored").then_some(()))
        })?;
        // One process that waits: looking again and again would take the processor from what is measured.
        self.wait(0, "mirrored")?;
        Ok((start.elapsed().as_secs_f64(), cpu_us(&pids)? - before))
    }
}
