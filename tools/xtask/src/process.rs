//! Running cargo and the tools of the workspace: one profile and one target directory for everything,
//! so that nothing is built twice; each phase bounded in time.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// The directory of the workspace's Cargo.toml.
pub(crate) fn workspace_root() -> Result<PathBuf> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.ancestors()
        .nth(2)
        .map(Path::to_path_buf)
        .context("tools/xtask is not two levels below the workspace")
}

/// Cargo as it called us.
pub(crate) fn cargo() -> Command {
    Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

/// `cargo metadata` of the workspace.
pub(crate) fn metadata(with_dependencies: bool) -> Result<Value> {
    let mut command = cargo();
    // One platform: else cargo fetches the crates of every other one first.
    command.args(["metadata", "--format-version", "1", "--filter-platform", "x86_64-unknown-linux-gnu"]);
    if !with_dependencies {
        command.arg("--no-deps");
    }
    let output = command.stderr(Stdio::inherit()).output().context("cargo metadata cannot be started")?;
    if !output.status.success() {
        bail!("cargo metadata failed");
    }
    serde_json::from_slice(&output.stdout).context("cargo metadata printed no JSON")
}

/// Builds every program of the workspace, with the products the lab starts (daemon, lab helpers).
pub(crate) fn build_programs(release: bool) -> Result<()> {
    let mut command = cargo();
    command.args(["build", "--quiet", "--workspace", "--bins"]);
    if release {
        command.arg("--release");
    }
    let status = command.status().context("cargo build cannot be started")?;
    if status.success() { Ok(()) } else { bail!("the build failed") }
}

/// Builds `duplex-FEATURE` beside the other programs: the product with one thing taken out, for a benchmark or for a
/// test that must notice it. The next build puts the real `duplex` back in its place.
pub(crate) fn build_without(feature: &str, release: bool) -> Result<()> {
    let mut command = cargo();
    command.args(["build", "--quiet", "--package", "duplex", "--features", feature]);
    if release {
        command.arg("--release");
    }
    let status = command.status().context("cargo build cannot be started")?;
    if !status.success() {
        bail!("the build with `{feature}` failed");
    }
    let metadata = metadata(false)?;
    let target = metadata["target_directory"].as_str().context("metadata has no target_directory")?;
    let directory = Path::new(target).join(if release { "release" } else { "debug" });
    let bare = directory.join(format!("duplex-{feature}"));
    std::fs::rename(directory.join("duplex"), &bare)
        .with_context(|| format!("{} cannot be put in place", bare.display()))
}

/// Builds `duplex-crash-at`, which stops dead where it is told to, and then every program of the workspace.
pub(crate) fn build_crash_at() -> Result<()> {
    build_without("crash-at", false)?;
    build_programs(false)
}

/// One program of the workspace.
#[derive(Debug)]
pub(crate) struct Tool {
    package: &'static str,
    binary: &'static str,
    release: bool,
}

impl Tool {
    pub(crate) fn new(package: &'static str, binary: &'static str) -> Tool {
        Tool { package, binary, release: false }
    }

    pub(crate) fn release(mut self, release: bool) -> Tool {
        self.release = release;
        self
    }

    /// Whether the workspace has this program.
    pub(crate) fn exists(&self) -> Result<bool> {
        let metadata = metadata(false)?;
        let packages = metadata["packages"].as_array().context("metadata has no packages")?;
        Ok(packages.iter().filter(|package| package["name"] == self.package).any(|package| {
            package["targets"].as_array().into_iter().flatten().any(|target| {
                target["name"] == self.binary
                    && target["kind"].as_array().is_some_and(|k| k.contains(&Value::from("bin")))
            })
        }))
    }

    /// `cargo run` of this program with these arguments.
    pub(crate) fn command(&self, arguments: &[String]) -> Command {
        let mut command = cargo();
        command.args(["run", "--quiet", "--package", self.package, "--bin", self.binary]);
        if self.release {
            command.arg("--release");
        }
        command.arg("--").args(arguments);
        command
    }

    /// Runs it in the foreground; its exit code becomes ours.
    pub(crate) fn hand_over(&self, arguments: &[String]) -> Result<ExitCode> {
        if !self.exists()? {
            bail!("the workspace has no program `{}` in package `{}` yet", self.binary, self.package);
        }
        let status =
            self.command(arguments).status().with_context(|| format!("{} cannot be started", self.binary))?;
        Ok(exit_code(status))
    }
}

fn exit_code(status: ExitStatus) -> ExitCode {
    ExitCode::from(u8::try_from(status.code().unwrap_or(5)).unwrap_or(5))
}

/// What a watched command did.
#[derive(Debug)]
pub(crate) struct Outcome {
    /// It ended by itself, with code 0.
    pub(crate) success: bool,
    /// It was ended by us at its time limit.
    pub(crate) timed_out: bool,
}

/// Runs a command in a process group of its own, hands each line of its output to `line` (and writes it to
/// `log`), and ends the whole group at the time limit.
pub(crate) fn watch(
    mut command: Command,
    log: &Path,
    limit: Duration,
    mut line: impl FnMut(&str),
) -> Result<Outcome> {
    if let Some(parent) = log.parent() {
        std::fs::create_dir_all(parent)?;
    }
    let mut log = File::create(log).with_context(|| format!("{} cannot be written", log.display()))?;
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .with_context(|| format!("{command:?} cannot be started"))?;
    let (sender, receiver) = mpsc::channel();
    let stdout = child.stdout.take().context("no standard output")?;
    let stderr = child.stderr.take().context("no standard error")?;
    forward(stdout, sender.clone());
    forward(stderr, sender);
    let end = Instant::now() + limit;
    let mut timed_out = false;
    loop {
        match receiver.recv_timeout(end.saturating_duration_since(Instant::now())) {
            Ok(text) => {
                writeln!(log, "{text}")?;
                line(&text);
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => break,
            Err(mpsc::RecvTimeoutError::Timeout) => {
                timed_out = true;
                end_group(&mut child)?;
                break;
            }
        }
    }
    let status = child.wait()?;
    Ok(Outcome { success: status.success() && !timed_out, timed_out })
}

fn forward(stream: impl std::io::Read + Send + 'static, sender: mpsc::Sender<String>) {
    std::thread::spawn(move || {
        for text in BufReader::new(stream).split(b'\n') {
            let Ok(text) = text else { return };
            if sender.send(String::from_utf8_lossy(&text).into_owned()).is_err() {
                return;
            }
        }
    });
}

/// Ends every process of the group the watched command leads: TERM first, so that it can clean up, then KILL.
fn end_group(leader: &mut Child) -> Result<()> {
    let group = format!("-{}", leader.id());
    let send =
        |signal: &str| Command::new("kill").args([signal, "--", &group]).stderr(Stdio::null()).status();
    send("-TERM")?;
    let end = Instant::now() + Duration::from_secs(10);
    while leader.try_wait()?.is_none() && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(20));
    }
    send("-KILL")?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("xtask-{}-{name}.log", std::process::id()))
    }

    #[test]
    fn lines_of_both_streams_arrive_and_failure_is_seen() {
        let path = log("lines");
        let mut command = Command::new("sh");
        command.args(["-c", "echo out; echo err >&2; exit 3"]);
        let mut lines = Vec::new();
        let outcome = watch(command, &path, Duration::from_secs(30), |text| lines.push(text.to_owned()))
            .expect("sh starts");
        lines.sort();
        assert_eq!(lines, ["err", "out"]);
        assert!(!outcome.success && !outcome.timed_out);
        std::fs::remove_file(path).expect("the log was written");
    }

    #[test]
    fn a_command_that_never_ends_is_ended() {
        let path = log("endless");
        let mut command = Command::new("sleep");
        command.arg("1000");
        let outcome = watch(command, &path, Duration::from_millis(50), |_| {}).expect("sleep starts");
        assert!(outcome.timed_out && !outcome.success);
        std::fs::remove_file(path).expect("the log was written");
    }
}
