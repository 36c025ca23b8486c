//! Programs of this machine, run to their end, bounded. They stay in our process group: whoever ends a test that hangs
//! ends them with it.

use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

/// What a program that ran to its end said.
#[derive(Debug, Clone)]
pub struct Said {
    /// Whether it ended with exit code 0.
    pub success: bool,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Said {
    /// Both streams, for a message.
    pub fn text(&self) -> String {
        format!("{}{}", self.stdout, self.stderr).trim().to_owned()
    }
}

/// A program that is not there: nothing was tried.
#[derive(Debug, thiserror::Error)]
#[error("no program {0}: {1}")]
pub struct NoProgram(pub String, pub &'static str);

/// How to get a program of the system.
pub const INSTALL: &str = "`cargo xtask packages` installs what the lab needs";
/// What `timeout` and shells end with if they do not find a program.
const NOT_FOUND: i32 = 127;

/// A program that is killed after so long.
pub fn bounded(words: &[&str], limit: Duration) -> Command {
    let mut command = Command::new("timeout");
    let seconds = limit.as_secs().max(1).to_string();
    command.args(["--foreground", "--kill-after=2", &seconds]).args(words).stdin(Stdio::null());
    command
}

/// Runs a program to its end, whatever that is.
pub fn try_run(words: &[&str], limit: Duration) -> Result<Said> {
    let output =
        bounded(words, limit).output().with_context(|| format!("{} cannot be started", words.join(" ")))?;
    if output.status.code() == Some(NOT_FOUND) {
        return Err(NoProgram(words[0].to_owned(), INSTALL).into());
    }
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ok(Said { success: output.status.success(), stdout: text(&output.stdout), stderr: text(&output.stderr) })
}

/// Runs a program that must succeed; gives its standard output.
pub fn run(words: &[&str], limit: Duration) -> Result<String> {
    let said = try_run(words, limit)?;
    if said.success { Ok(said.stdout) } else { bail!("{} failed: {}", words.join(" "), said.text()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_bounded_and_its_failure_is_told() {
        let limit = Duration::from_secs(20);
        assert_eq!(run(&["sh", "-c", "echo out; echo err >&2"], limit).expect("it ran"), "out\n");
        let error = run(&["sh", "-c", "echo out; echo err >&2; exit 3"], limit).expect_err("it failed");
        assert!(error.to_string().contains("out\nerr"), "{error}");
        let error = try_run(&["no-such-program"], limit).expect_err("it is not there");
        assert!(error.is::<NoProgram>(), "{error}");
        assert!(!try_run(&["sleep", "1000"], Duration::from_secs(1)).expect("it ran").success);
    }
}
