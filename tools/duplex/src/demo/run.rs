//! Programs of the system and work on files, each with a time limit: a device that hangs must not take the demo along.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

use super::interrupt;

/// Programs the demo calls, and Debian's package of each.
const NEEDS: [(&str, &str); 6] = [
    ("ip", "iproute2"),
    ("losetup", "mount"),
    ("mount", "mount"),
    ("umount", "mount"),
    ("mkfs.ext4", "e2fsprogs"),
    ("e2fsck", "e2fsprogs"),
];

/// Between two looks at something that is waited for.
pub(crate) const LOOK: Duration = Duration::from_millis(20);

/// Fails and names the package where a program is missing.
pub(crate) fn require_tools() -> Result<()> {
    let missing: Vec<String> = NEEDS
        .iter()
        .filter(|(program, _)| find(program).is_none())
        .map(|(program, package)| format!("{program} (package {package})"))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    bail!(
        "missing programs: {}; install them, for example with `apt-get install PACKAGE`",
        missing.join(", ")
    )
}

fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var("PATH").unwrap_or_default();
    let directories = path.split(':').chain(["/usr/sbin", "/sbin", "/usr/bin", "/bin"]);
    directories.filter(|d| !d.is_empty()).map(|d| Path::new(d).join(program)).find(|p| p.is_file())
}

/// A command of the system, also where /sbin is not on the path.
pub(crate) fn tool(program: &str) -> Command {
    Command::new(find(program).unwrap_or_else(|| PathBuf::from(program)))
}

/// How a program ended.
#[derive(Debug)]
pub(crate) struct Done {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Done {
    /// Both streams, without empty lines.
    pub(crate) fn text(&self) -> String {
        let lines = self.stdout.lines().chain(self.stderr.lines());
        lines.map(str::trim_end).filter(|line| !line.is_empty()).collect::<Vec<_>>().join("\n")
    }
}

/// Runs a program to its end, whatever its exit code.
///
/// # Errors
/// It cannot be started, does not end in time, or the user interrupted.
pub(crate) fn run(command: &mut Command, limit: Duration) -> Result<Done> {
    let shown = show(command);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("`{shown}` cannot be started"))?;
    let stdout = child.stdout.take().map(collect);
    let stderr = child.stderr.take().map(collect);
    let end = Instant::now() + limit;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if let Err(error) = interrupt::check() {
            give_up(&mut child);
            return Err(error);
        }
        if Instant::now() >= end {
            give_up(&mut child);
            bail!("`{shown}` did not end in {} s", limit.as_secs());
        }
        std::thread::sleep(LOOK / 4);
    };
    let text = |reader: Option<JoinHandle<String>>| reader.and_then(|r| r.join().ok()).unwrap_or_default();
    Ok(Done { code: status.code(), stdout: text(stdout), stderr: text(stderr) })
}

/// Runs a program that must succeed, and gives its standard output.
///
/// # Errors
/// As [`run`], or its exit code is not 0.
pub(crate) fn must(command: &mut Command, limit: Duration) -> Result<String> {
    let shown = show(command);
    let done = run(command, limit)?;
    match done.code {
        Some(0) => Ok(done.stdout),
        Some(code) => bail!("`{shown}` ended with {code}: {}", done.text()),
        None => bail!("`{shown}` was killed: {}", done.text()),
    }
}

/// A killed program that waits for a dead device ends when the device does: it is not waited for without end.
fn give_up(child: &mut Child) {
    let _ = child.kill();
    let end = Instant::now() + Duration::from_secs(2);
    while Instant::now() < end && matches!(child.try_wait(), Ok(None)) {
        std::thread::sleep(LOOK);
    }
}

fn collect(mut stream: impl Read + Send + 'static) -> JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = stream.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// A command as it would be typed.
pub(crate) fn show(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
}

/// Work on files in a thread of its own: if the device hangs, the thread is left behind and ends with the device.
pub(crate) struct Work<T> {
    what: String,
    answer: mpsc::Receiver<Result<T>>,
}

impl<T: Send + 'static> Work<T> {
    /// Begins it.
    pub(crate) fn begin(what: &str, work: impl FnOnce() -> Result<T> + Send + 'static) -> Self {
        let (send, answer) = mpsc::channel();
        std::thread::spawn(move || {
            // Nobody waits any more when the demo gave up.
            let _ = send.send(work());
        });
        Self { what: what.to_owned(), answer }
    }

    /// Its result, or `None` while it goes on.
    pub(crate) fn look(&self, wait: Duration) -> Result<Option<T>> {
        interrupt::check()?;
        match self.answer.recv_timeout(wait) {
            Ok(result) => result.with_context(|| self.what.clone()).map(Some),
            Err(mpsc::RecvTimeoutError::Timeout) => Ok(None),
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                Err(anyhow!("{}: the thread ended early", self.what))
            }
        }
    }

    /// Waits for its result.
    pub(crate) fn end(self, limit: Duration) -> Result<T> {
        let end = Instant::now() + limit;
        loop {
            if let Some(result) = self.look(LOOK)? {
                return Ok(result);
            }
            if Instant::now() >= end {
                bail!("{}: not done in {} s; the device hangs", self.what, limit.as_secs());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(20);

    #[test]
    fn a_program_is_run_to_its_end_and_a_bad_end_says_what_was_said() {
        let mut command = Command::new("sh");
        let done = run(command.args(["-c", "echo out; echo bad >&2; exit 3"]), LIMIT).expect("sh starts");
        assert_eq!((done.code, done.stdout.as_str(), done.stderr.as_str()), (Some(3), "out\n", "bad\n"));
        let mut command = Command::new("sh");
        let error = must(command.args(["-c", "echo bad >&2; exit 3"]), LIMIT).expect_err("exit code 3");
        assert!(error.to_string().ends_with("ended with 3: bad"), "{error}");
    }

    #[test]
    fn a_program_that_never_ends_is_given_up() {
        let mut command = Command::new("sleep");
        let error = run(command.arg("1000"), Duration::from_millis(30)).expect_err("it never ends");
        assert!(error.to_string().starts_with("`sleep 1000` did not end"), "{error}");
    }

    #[test]
    fn work_that_hangs_is_left() {
        let (_keep, never) = mpsc::channel::<()>();
        let work = Work::begin("reading", move || Ok(never.recv()?));
        let error = work.end(Duration::from_millis(30)).expect_err("it hangs");
        assert!(error.to_string().starts_with("reading: not done"), "{error}");
        assert_eq!(Work::begin("counting", || Ok(7)).end(LIMIT).expect("it ends"), 7);
    }
}
