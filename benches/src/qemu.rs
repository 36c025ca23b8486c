//! QEMU's mirror: a storage daemon that exports a disk over NBD and mirrors each write to a second one, whose NBD
//! server listens on a Unix socket. (Over TCP this mirror stalls for 40 ms at depths above 1, which would flatter
//! whoever is compared with it.)

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::process::{Running, cpu_us};
use crate::scratch::{Scratch, await_that};

/// Name of the export.
pub const EXPORT: &str = "d";
const LIMIT: Duration = Duration::from_secs(120);

/// Two storage daemons with a mirror job between them. Dropping it ends both.
#[derive(Debug)]
pub struct Mirror {
    primary: Running,
    secondary: Running,
    socket: PathBuf,
    /// Seconds of the first, full copy.
    pub copy_s: f64,
    /// Processor time of both in it, in microseconds.
    pub copy_cpu_us: u64,
}

impl Mirror {
    /// Starts both over two images, copies everything, and waits until writes are mirrored.
    pub fn start(scratch: &Scratch, name: &str, images: &[PathBuf; 2]) -> Result<Mirror> {
        let path = |what: &str| scratch.path().join(format!("{name}.{what}"));
        let (peer, socket, control) = (path("peer"), path("nbd"), path("qmp"));
        for old in [&peer, &socket, &control] {
            if old.exists() {
                std::fs::remove_file(old)?;
            }
        }
        let mut command = daemon(&images[1]);
        export(&mut command, &peer);
        let mut secondary = Running::start(scratch, &format!("{name}-b"), command)?;
        listening(scratch, &mut secondary, &peer)?;
        let mut command = daemon(&images[0]);
        command.arg("--blockdev");
        command.arg(format!(
            "driver=nbd,node-name=peer,server.type=unix,server.path={},export={EXPORT}",
            peer.display()
        ));
        export(&mut command, &socket);
        command.arg("--chardev").arg(format!("socket,id=q,path={},server=on,wait=off", control.display()));
        command.args(["--monitor", "chardev=q"]);
        let mut primary = Running::start(scratch, &format!("{name}-a"), command)?;
        listening(scratch, &mut primary, &control)?;
        let mut monitor = Monitor::connect(&control)?;
        monitor.call("qmp_capabilities", &json!({}))?;
        let pids = [primary.pid(), secondary.pid()];
        let (start, before) = (Instant::now(), cpu_us(&pids)?);
        let job = json!({
            "job-id": "m", "device": "d", "target": "peer", "sync": "full", "copy-mode": "write-blocking",
        });
        monitor.call("blockdev-mirror", &job)?;
        monitor.await_event("BLOCK_JOB_READY")?;
        let (copy_s, copy_cpu_us) = (start.elapsed().as_secs_f64(), cpu_us(&pids)? - before);
        Ok(Mirror { primary, secondary, socket, copy_s, copy_cpu_us })
    }

    /// Its NBD socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Both processes.
    pub fn pids(&self) -> Vec<u32> {
        vec![self.primary.pid(), self.secondary.pid()]
    }
}

fn daemon(image: &Path) -> Command {
    let mut command = Command::new("qemu-storage-daemon");
    command.arg("--blockdev");
    command.arg(format!("driver=file,filename={},node-name=f,cache.direct=on,aio=io_uring", image.display()));
    command.args(["--blockdev", "driver=raw,file=f,node-name=d"]);
    command
}

fn export(command: &mut Command, socket: &Path) {
    command.arg("--nbd-server").arg(format!("addr.type=unix,addr.path={}", socket.display()));
    command.arg("--export").arg(format!("type=nbd,id=e,node-name=d,name={EXPORT},writable=on"));
}

fn listening(scratch: &Scratch, daemon: &mut Running, socket: &Path) -> Result<()> {
    await_that(&format!("{}", socket.display()), LIMIT, || {
        daemon.check(scratch)?;
        Ok(UnixStream::connect(socket).ok().map(drop))
    })
}

struct Monitor {
    writer: UnixStream,
    reader: BufReader<UnixStream>,
}

impl Monitor {
    fn connect(path: &Path) -> Result<Monitor> {
        let writer = UnixStream::connect(path)?;
        writer.set_read_timeout(Some(LIMIT))?;
        let mut monitor = Monitor { reader: BufReader::new(writer.try_clone()?), writer };
        monitor.line().context("no greeting")?;
        Ok(monitor)
    }

    fn line(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.reader.read_line(&mut line)? == 0 {
            bail!("qemu-storage-daemon closed its monitor");
        }
        Ok(serde_json::from_str(&line)?)
    }

    fn call(&mut self, name: &str, arguments: &Value) -> Result<()> {
        let text = json!({ "execute": name, "arguments": arguments });
        writeln!(self.writer, "{text}")?;
        loop {
            let answer = self.line()?;
            if let Some(error) = answer.get("error") {
                bail!("{name}: {error}");
            }
            if answer.get("return").is_some() {
                return Ok(());
            }
        }
    }

    fn await_event(&mut self, name: &str) -> Result<()> {
        loop {
            let event = self.line()?;
            match event["event"].as_str() {
                Some(found) if found == name => return Ok(()),
                Some("BLOCK_JOB_ERROR" | "BLOCK_JOB_COMPLETED") => bail!("the mirror job ended: {event}"),
                Some(_) | None => {}
            }
        }
    }
}
