//! Helper processes of the lab: our own program `duplex-lab`, with a socket as its standard input on which both sides
//! send one JSON value a line.

use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::super::system::NoProgram;

/// The lab's helper program, beside the running one (or above it, for a test under `deps`).
pub fn program(name: &str) -> Result<PathBuf> {
    let here = std::env::current_exe()?;
    let found =
        here.ancestors().skip(1).take(2).map(|directory| directory.join(name)).find(|path| path.is_file());
    found.ok_or_else(|| NoProgram(name.to_owned(), "build it with `cargo build --workspace --bins`").into())
}

/// A running helper. Dropping it closes the socket, waits a little for its end, and kills it if need be.
#[derive(Debug)]
pub struct Helper {
    child: Child,
    line: Mutex<Line>,
}

#[derive(Debug)]
struct Line {
    writer: Option<UnixStream>,
    reader: BufReader<UnixStream>,
}

impl Helper {
    /// Starts `duplex-lab ARGUMENTS`.
    pub fn start(arguments: &[String]) -> Result<Helper> {
        let mut command = Command::new(program("duplex-lab")?);
        command.args(arguments);
        Helper::start_command(command)
    }

    /// Starts this command with a socket as its standard input.
    pub fn start_command(mut command: Command) -> Result<Helper> {
        let (ours, theirs) = UnixStream::pair()?;
        let child = command
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .spawn()
            .with_context(|| format!("{command:?} cannot be started"))?;
        ours.set_read_timeout(Some(Duration::from_secs(30)))?;
        let line = Line { reader: BufReader::new(ours.try_clone()?), writer: Some(ours) };
        Ok(Helper { child, line: Mutex::new(line) })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The next line it says by itself.
    pub fn receive<T: DeserializeOwned>(&mut self) -> Result<T> {
        let line =
            self.line.get_mut().map_err(|_| anyhow::anyhow!("a thread died while it talked to a helper"))?;
        line.receive()
    }

    /// Says a line and gives the answer.
    pub fn ask<T: DeserializeOwned>(&self, question: &impl Serialize) -> Result<T> {
        let mut line =
            self.line.lock().map_err(|_| anyhow::anyhow!("a thread died while it talked to a helper"))?;
        let mut text = serde_json::to_vec(question)?;
        text.push(b'\n');
        line.writer
            .as_mut()
            .context("the helper was told to end")?
            .write_all(&text)
            .context("the helper is gone")?;
        line.receive()
    }

    /// Waits for its end, at most so long.
    pub fn wait_end(&mut self, limit: Duration) -> Result<()> {
        super::super::wait::until("a helper process to end", limit, || Ok(self.child.try_wait()?)).map(drop)
    }
}

impl Line {
    fn receive<T: DeserializeOwned>(&mut self) -> Result<T> {
        let mut text = String::new();
        if self.reader.read_line(&mut text).context("the helper does not answer")? == 0 {
            bail!("the helper ended");
        }
        serde_json::from_str(&text).with_context(|| format!("the helper said {text:?}"))
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        if let Ok(line) = self.line.get_mut() {
            line.writer = None;
            let _ = line.reader.get_ref().shutdown(std::net::Shutdown::Both);
        }
        if self.wait_end(Duration::from_secs(5)).is_err() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}
