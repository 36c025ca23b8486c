//! Two real servers: configuration, secret, disks, cables, daemons; the operator's verbs in each; and what to print
//! when something did not hold.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::copies::Unequal;
use super::disk::DiskOptions;
use super::disk::process::program;
use super::server::{Disk, Server};
use super::{FaultyDisk, LoopDevice, NetNs, Space, wait};

/// The volume every pair has.
pub const VOLUME: &str = "data";
/// Port of the mirror link.
pub const LINK_PORT: u16 = 7700;
/// Long enough for anything that should happen on an idle or a loaded test machine.
pub const LIMIT: Duration = Duration::from_secs(60);

/// What lies under a server's volumes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskKind {
    /// A loop device over a sparse file.
    Loop,
    /// The sparse file itself.
    File,
    /// A loop device over a disk that can fail and lose power.
    Faulty,
    /// A sparse file in memory (tmpfs): may be larger than any file system's files.
    Memory,
}

/// How a pair is made.
#[derive(Debug, Clone)]
pub struct PairOptions {
    /// Size of each volume.
    pub volume_bytes: u64,
    /// Under alpha and under beta.
    pub disks: [DiskKind; 2],
    /// Paths of the mirror link: 1 or 2.
    pub paths: usize,
    /// `encryption = "on"`.
    pub encryption: bool,
    /// `frontend = …` of the volume.
    pub frontend: &'static str,
    /// Further lines of the volume's table.
    pub volume_lines: String,
    /// Further tables at the end of the file, such as `[resync]`.
    pub tables: String,
}

impl Default for PairOptions {
    fn default() -> Self {
        PairOptions {
            volume_bytes: 64 << 20,
            disks: [DiskKind::Loop, DiskKind::Loop],
            paths: 1,
            encryption: true,
            frontend: "none",
            volume_lines: String::new(),
            tables: String::new(),
        }
    }
}

/// Two servers. Dropping it ends and removes everything.
#[derive(Debug)]
pub struct Pair {
    /// The first.
    pub alpha: Server,
    /// The second.
    pub beta: Server,
    /// How it was made.
    pub options: PairOptions,
    // The directory goes last: servers and disks live in it.
    space: Space,
}

impl Pair {
    /// Two servers with disks, cables, one configuration and one secret; booted, no daemon, no metadata.
    pub fn new(options: PairOptions) -> Result<Pair> {
        let space = Space::new()?;
        let (net_a, net_b) = (NetNs::new()?, NetNs::new()?);
        for path in 0..options.paths {
            let [here, there] = [1, 2].map(|host| format!("10.9.{path}.{host}/24"));
            net_a.cable(adapter(path), &here, &net_b, adapter(path), &there)?;
        }
        let disks_a = make_disk(&space, "alpha", options.disks[0], disk_bytes(options.volume_bytes))?;
        let disks_b = make_disk(&space, "beta", options.disks[1], disk_bytes(options.volume_bytes))?;
        let mut alpha = Server::new("alpha", net_a, disks_a, space.directory("alpha")?);
        let mut beta = Server::new("beta", net_b, disks_b, space.directory("beta")?);
        let secret = space.path().join("secret");
        let text = configuration(&options, &alpha, &beta, &secret);
        for server in [&mut alpha, &mut beta] {
            std::fs::write(server.config(), &text)?;
            server.boot(true)?;
        }
        let words = [
            program("duplex")?.display().to_string(),
            "secret".to_owned(),
            "new".to_owned(),
            secret.display().to_string(),
        ];
        let made = alpha.host()?.run(&words, LIMIT)?;
        if !made.success() {
            bail!("`duplex secret new` failed: {}", made.text());
        }
        Ok(Pair { alpha, beta, options, space })
    }

    /// The directory of this pair.
    pub fn directory(&self) -> &Path {
        self.space.path()
    }

    /// The secret's file.
    pub fn secret(&self) -> PathBuf {
        self.space.path().join("secret")
    }

    /// Writes metadata on both.
    pub fn create(&self) -> Result<()> {
        for server in [&self.alpha, &self.beta] {
            server.must(&["create", VOLUME])?;
        }
        Ok(())
    }

    /// Metadata, daemons, `activate` on alpha, until both are mirrored.
    pub fn start_mirrored(&mut self) -> Result<()> {
        self.create()?;
        self.alpha.start_daemon()?;
        self.beta.start_daemon()?;
        self.alpha.must(&["activate"])?;
        self.wait_mirrored()
    }

    /// Waits until both say `mirrored`.
    pub fn wait_mirrored(&self) -> Result<()> {
        self.alpha.wait("mirrored", LIMIT)?;
        self.beta.wait("mirrored", LIMIT)
    }

    /// The server that is not this one.
    pub fn other(&self, server: &Server) -> &Server {
        if server.name() == self.alpha.name() { &self.beta } else { &self.alpha }
    }

    /// Pulls the cable of a path.
    pub fn cut(&self, path: usize) -> Result<()> {
        self.alpha.network().cut(adapter(path))
    }

    /// Puts it back.
    pub fn restore(&self, path: usize) -> Result<()> {
        self.alpha.network().restore(adapter(path))
    }

    /// Size of the volume, by the primary's or any server's status.
    pub fn volume_bytes(&self) -> Result<u64> {
        for server in [&self.alpha, &self.beta] {
            let size = server.status().ok().and_then(|status| status["volumes"][0]["size_bytes"].as_u64());
            if let Some(size) = size.filter(|size| *size > 0) {
                return Ok(size);
            }
        }
        bail!("neither server says the volume's size")
    }

    /// Compares both copies by reading both backings; says where they differ first.
    pub fn assert_equal(&self) -> Result<()> {
        match self.difference()? {
            None => Ok(()),
            Some(difference) => Err(Unequal(difference).into()),
        }
    }

    /// How both copies differ.
    pub fn difference(&self) -> Result<Option<super::copies::Difference>> {
        let size = self.volume_bytes()?;
        super::copies::compare(&self.alpha.copy(size)?, &self.beta.copy(size)?)
    }

    /// What a person needs to see why a case failed.
    pub fn report(&self) -> String {
        let mut text = String::new();
        for server in [&self.alpha, &self.beta] {
            let _ = writeln!(text, "--- {}: status", server.name());
            let _ = match server.status() {
                Ok(status) => writeln!(text, "{status}"),
                Err(error) => writeln!(text, "{error:#}"),
            };
            let _ = writeln!(text, "--- {}: last events", server.name());
            let events = server.events().unwrap_or_default();
            for event in &events[events.len().saturating_sub(15)..] {
                let word = |field: &str| event[field].as_str().unwrap_or("-").to_owned();
                let _ = writeln!(
                    text,
                    "{} {}: {} ({})",
                    word("time"),
                    word("kind"),
                    word("text"),
                    word("reason")
                );
            }
            let _ = writeln!(
                text,
                "--- {}: last lines of the daemon's log\n{}",
                server.name(),
                server.log_tail(40)
            );
        }
        text
    }

    /// Makes both end; what did not go by itself is an error.
    pub fn stop(&mut self) -> Result<()> {
        for server in [&mut self.beta, &mut self.alpha] {
            server.power_off()?;
        }
        Ok(())
    }

    /// Waits for a condition of both statuses.
    pub fn wait_both(&self, what: &str, mut holds: impl FnMut(&Value, &Value) -> bool) -> Result<()> {
        wait::until(what, LIMIT, || {
            let (Ok(a), Ok(b)) = (self.alpha.status(), self.beta.status()) else { return Ok(None) };
            Ok(holds(&a, &b).then_some(()))
        })
    }
}

/// The adapter's name of a path, the same on both servers.
pub fn adapter(path: usize) -> &'static str {
    if path == 0 { "mir" } else { "mir2" }
}

/// A disk that holds the metadata area and a volume of this size, and not 4 MiB more.
pub fn disk_bytes(volume_bytes: u64) -> u64 {
    volume_bytes + (2 << 20)
}

/// A disk of this kind in a pair's directory.
pub fn make_disk(space: &Space, name: &str, kind: DiskKind, bytes: u64) -> Result<Disk> {
    let file = space.path().join(format!("{name}.disk"));
    Ok(match kind {
        DiskKind::File => Disk::File(space.sparse_file(&format!("{name}.disk"), bytes)?),
        DiskKind::Loop => {
            space.sparse_file(&format!("{name}.disk"), bytes)?;
            Disk::Loop(LoopDevice::over_file(&file, 512)?)
        }
        DiskKind::Memory => {
            let directory = space.memory()?;
            let file = directory.join(format!("{name}.disk"));
            std::fs::File::create(&file)?.set_len(bytes)?;
            Disk::File(file)
        }
        DiskKind::Faulty => {
            let options = DiskOptions { size_bytes: bytes, sector_bytes: 512, volatile_cache: true };
            Disk::Faulty(FaultyDisk::new(&file, options)?)
        }
    })
}

/// The one configuration of both servers.
pub fn configuration(options: &PairOptions, alpha: &Server, beta: &Server, secret: &Path) -> String {
    let addresses = |host: u8| {
        let paths: Vec<String> =
            (0..options.paths).map(|path| format!("\"10.9.{path}.{host}:{LINK_PORT}\"")).collect();
        paths.join(", ")
    };
    format!(
        r#"pair = "lab"
state_dir = {{ alpha = "{state_a}", beta = "{state_b}" }}

[servers.alpha]
link = [{link_a}]
[servers.beta]
link = [{link_b}]

[volumes.{VOLUME}]
backing = {{ alpha = "{backing_a}", beta = "{backing_b}" }}
frontend = "{frontend}"
{volume_lines}

[security]
secret = "{secret}"
encryption = "{encryption}"

{tables}
"#,
        state_a = alpha.state_directory().display(),
        state_b = beta.state_directory().display(),
        link_a = addresses(1),
        link_b = addresses(2),
        backing_a = alpha.disk().path().display(),
        backing_b = beta.disk().path().display(),
        frontend = options.frontend,
        volume_lines = options.volume_lines,
        secret = secret.display(),
        encryption = if options.encryption { "on" } else { "off" },
        tables = options.tables,
    )
}

/// A text that is part of a daemon's refusal.
pub fn field<'a>(value: &'a Value, path: &str) -> Result<&'a str> {
    value.pointer(path).and_then(Value::as_str).with_context(|| format!("no text at {path} in {value}"))
}
