//! One server of the pair, steered as an operator steers it: by the program's verbs and `status --json`.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use duplex_node::control::status::{Status, VolumeStatus};

use super::config::VOLUME;
use super::network::{self, Network};
use super::{interrupt, run};

const LIMIT: Duration = Duration::from_secs(60);
/// Between two looks at a status page.
const LOOK: Duration = Duration::from_millis(100);

/// A server: a network of its own, a disk, and the processes that run there.
pub(crate) struct Server {
    pub(crate) name: &'static str,
    /// Its files.
    pub(crate) directory: PathBuf,
    program: PathBuf,
    config: PathBuf,
    pub(crate) network: Network,
    child: Option<Child>,
}

impl Server {
    /// Makes its directory and network. Nothing runs yet.
    pub(crate) fn new(name: &'static str, demo: &Path, program: &Path) -> Result<Self> {
        let directory = demo.join(name);
        std::fs::create_dir(&directory)?;
        std::fs::create_dir(directory.join("mnt"))?;
        let network = Network::new(&directory.join("netns"))?;
        let (program, config) = (program.to_owned(), demo.join("duplex.toml"));
        Ok(Self { name, directory, program, config, network, child: None })
    }

    pub(crate) fn run_dir(&self) -> PathBuf {
        self.directory.join("run")
    }

    /// Where its file system is mounted while it is primary.
    pub(crate) fn mount_point(&self) -> PathBuf {
        self.directory.join("mnt")
    }

    /// The mirrored device.
    pub(crate) fn device(&self) -> PathBuf {
        self.run_dir().join("dev").join(VOLUME)
    }

    fn log(&self) -> PathBuf {
        self.directory.join("daemon.log")
    }

    /// A verb of this server, as it would be typed.
    pub(crate) fn typed(&self, words: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.arg("--config").arg(&self.config).args(["--server", self.name]);
        command.arg("--run-dir").arg(self.run_dir()).args(words);
        command
    }

    /// A verb that must succeed. Its answer.
    pub(crate) fn verb(&self, words: &[&str]) -> Result<String> {
        let mut command = self.typed(words);
        self.network.enter(&mut command);
        let done = run::run(&mut command, LIMIT)?;
        match done.code {
            // Progress goes to the standard error.
            Some(0) => Ok(done.stdout.trim_end().to_owned()),
            Some(code) => {
                bail!("{}: `duplex {}` ended with {code}: {}", self.name, words.join(" "), done.text())
            }
            None => bail!("{}: `duplex {}` was killed", self.name, words.join(" ")),
        }
    }

    /// Starts the daemon and waits until it answers.
    pub(crate) fn start(&mut self) -> Result<()> {
        let log = File::options().create(true).append(true).open(self.log())?;
        let mut command = self.typed(&["daemon"]);
        command.env("NO_COLOR", "1").stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        self.network.enter(&mut command);
        self.child =
            Some(command.spawn().with_context(|| format!("{}: the daemon cannot be started", self.name))?);
        let end = Instant::now() + LIMIT;
        loop {
            self.must_run()?;
            if self.look()?.is_some() {
                return Ok(());
            }
            if Instant::now() >= end {
                bail!("{}: the daemon does not answer; its log ends with\n{}", self.name, self.log_end());
            }
            std::thread::sleep(run::LOOK);
        }
    }

    /// Fails when the daemon ended by itself.
    fn must_run(&mut self) -> Result<()> {
        let Some(child) = &mut self.child else {
            bail!("{}: no daemon was started", self.name);
        };
        match child.try_wait()? {
            None => Ok(()),
            Some(status) => {
                self.child = None;
                bail!("{}: the daemon ended ({status}); its log ends with\n{}", self.name, self.log_end())
            }
        }
    }

    /// The last lines of the daemon's log.
    pub(crate) fn log_end(&self) -> String {
        const LINES: usize = 15;
        let text = std::fs::read(self.log()).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        let from = lines.len().saturating_sub(LINES);
        lines[from..].iter().map(|line| format!("    {line}")).collect::<Vec<_>>().join("\n")
    }

    /// Its status page, or `None` while nobody answers.
    pub(crate) fn look(&self) -> Result<Option<Status>> {
        let mut command = self.typed(&["status", "--json", "--timeout", "10"]);
        self.network.enter(&mut command);
        let done = run::run(&mut command, LIMIT)?;
        match done.code {
            Some(0) => {
                let page = serde_json::from_str(&done.stdout);
                page.map(Some).with_context(|| format!("{}: status --json: {}", self.name, done.stdout))
            }
            // No daemon yet: its code is 3.
            Some(3) => Ok(None),
            Some(_) | None => bail!("{}: `duplex status` failed: {}", self.name, done.text()),
        }
    }

    /// Its status page.
    pub(crate) fn status(&mut self) -> Result<Status> {
        let page = self.look()?;
        if page.is_none() {
            self.must_run()?;
        }
        page.ok_or_else(|| anyhow!("{}: the daemon does not answer", self.name))
    }

    /// Waits until the page shows what is waited for, and gives that page.
    pub(crate) fn wait(
        &mut self,
        what: &str,
        limit: Duration,
        mut holds: impl FnMut(&Status) -> bool,
    ) -> Result<Status> {
        let end = Instant::now() + limit;
        loop {
            interrupt::check()?;
            let page = self.status()?;
            if holds(&page) {
                return Ok(page);
            }
            if Instant::now() >= end {
                bail!(
                    "{}: waited {} s for {what}; it is {}, {} ({})",
                    self.name,
                    limit.as_secs(),
                    page.state,
                    page.role,
                    page.reason.unwrap_or_default()
                );
            }
            std::thread::sleep(LOOK);
        }
    }

    /// Kills daemon, holder and whatever else runs on this server, at once.
    pub(crate) fn kill(&mut self) -> Result<usize> {
        let file = self.directory.join("netns");
        let count = network::processes(&file).len();
        network::kill_all(&file)?;
        self.bury()?;
        Ok(count)
    }

    /// Waits for the daemon's end.
    pub(crate) fn bury(&mut self) -> Result<()> {
        let end = Instant::now() + LIMIT;
        while let Some(child) = &mut self.child {
            if child.try_wait()?.is_some() {
                self.child = None;
            } else if Instant::now() >= end {
                bail!("{}: the daemon does not end; its log ends with\n{}", self.name, self.log_end());
            } else {
                std::thread::sleep(run::LOOK);
            }
        }
        Ok(())
    }
}

/// The demo's volume on a page.
pub(crate) fn volume(page: &Status) -> Result<&VolumeStatus> {
    page.volumes.iter().find(|volume| volume.name == VOLUME).with_context(|| format!("status lacks {VOLUME}"))
}

/// Bytes marked as differing.
pub(crate) fn dirty_bytes(page: &Status) -> Result<u64> {
    let volume = volume(page)?;
    Ok(volume.dirty_blocks.saturating_mul(u64::from(volume.block_bytes)))
}

/// Bytes this server sent over the mirror link since its daemon began.
pub(crate) fn sent_bytes(page: &Status) -> u64 {
    page.link.iter().map(|path| path.sent_bytes).sum()
}
