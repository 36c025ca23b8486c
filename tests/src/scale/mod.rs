//! Scale on the real program: a sparse volume of 64 TiB, a log full of cold extents, many volumes in one pair. Each prints
//! what it saw and fails on its bounds: memory, bytes on disk, extents in flight, equal copies. Never on a duration.

pub mod cold;
pub mod huge;
pub mod many;

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::SeekFrom;
use rustix::io::Errno;

use crate::lab::copies::DATA_BEGIN_BYTES;
use crate::lab::nbd::{Ask, Nbd};
use crate::lab::{DiskKind, Pair, PairOptions, Seed, Server};

/// Resident memory that a daemon with one volume may have had at its most (VmHWM: the program's own text counts, too).
pub const MEMORY_BOUND_BYTES: u64 = 256 << 20;
/// No answer for so long is an error.
pub const PATIENCE: Duration = Duration::from_secs(120);
/// Long enough for a first copy of 64 TiB by an unoptimised build on a busy machine.
pub const LONG: Duration = Duration::from_secs(400);
const BLOCK_BYTES: u64 = 4096;
/// A tick of /proc/PID/stat, on every Linux.
const TICK_MS: u64 = 10;

/// One round: its name and what it does.
pub type Round = (&'static str, fn() -> Result<()>);

/// All of them.
pub const ROUNDS: [Round; 3] = [("huge", huge::run), ("cold", cold::run), ("many", many::run)];

/// Plays a round on a pair whose disks are sparse files in memory; `size` is the volume's, as the configuration says it.
fn in_memory(disk_bytes: u64, size: &str, play: fn(&mut Pair) -> Result<()>) -> Result<()> {
    let mut pair = Pair::new(PairOptions {
        volume_bytes: disk_bytes,
        disks: [DiskKind::Memory; 2],
        volume_lines: format!("size = \"{size}\""),
        ..PairOptions::default()
    })?;
    let done = play(&mut pair);
    if done.is_err() {
        eprintln!("{}", pair.report());
    }
    done
}

/// Prints how long a step took.
pub fn step<T>(what: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let start = Instant::now();
    let done = work().with_context(|| what.to_owned())?;
    println!("  {what}: {:.1} s", start.elapsed().as_secs_f64());
    Ok(done)
}

/// What a daemon uses.
#[derive(Debug, Clone, Copy, Default)]
pub struct Usage {
    /// Most memory resident at any time.
    pub peak_bytes: u64,
    /// Memory of its own resident now.
    pub own_bytes: u64,
    /// Threads now.
    pub threads: u64,
    /// Processor time so far.
    pub cpu: Duration,
}

impl Usage {
    /// Of a server's running daemon.
    pub fn of(server: &Server) -> Result<Usage> {
        let process = daemon(server)?;
        let status = std::fs::read_to_string(process.join("status"))?;
        let number = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.and_then(|rest| rest.trim_start_matches(':').split_whitespace().next()?.parse::<u64>().ok())
                .with_context(|| format!("no {name} in the status of a process"))
        };
        let stat = std::fs::read_to_string(process.join("stat"))?;
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        let ticks: u64 = [11, 12].iter().filter_map(|at| fields.get(*at)?.parse::<u64>().ok()).sum();
        Ok(Usage {
            peak_bytes: number("VmHWM")? << 10,
            own_bytes: number("RssAnon")? << 10,
            threads: number("Threads")?,
            cpu: Duration::from_millis(ticks * TICK_MS),
        })
    }
}

/// The daemon's directory below /proc, as this process sees it.
fn daemon(server: &Server) -> Result<std::path::PathBuf> {
    let config = server.config().display().to_string();
    for entry in std::fs::read_dir("/proc")? {
        let path = entry?.path();
        let Ok(words) = std::fs::read(path.join("cmdline")) else { continue };
        let words: Vec<String> =
            words.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned()).collect();
        let is_daemon = words.iter().any(|word| word == "daemon");
        if is_daemon && words.contains(&config) && words.iter().any(|word| word == server.name()) {
            return Ok(path);
        }
    }
    bail!("{} has no daemon", server.name())
}

/// Prints what both daemons use, and holds their memory against the bound.
pub fn judge_memory(when: &str, servers: &[&Server], bound_bytes: u64) -> Result<()> {
    for server in servers {
        let usage = Usage::of(server)?;
        println!(
            "  {when}, {}: VmHWM {} MiB, RssAnon {} MiB, {} threads, {:.1} s of processor",
            server.name(),
            usage.peak_bytes >> 20,
            usage.own_bytes >> 20,
            usage.threads,
            usage.cpu.as_secs_f64()
        );
        ensure!(
            usage.peak_bytes < bound_bytes,
            "{} had {} MiB resident, {} are allowed",
            server.name(),
            usage.peak_bytes >> 20,
            bound_bytes >> 20
        );
    }
    Ok(())
}

/// What was written and acknowledged: block and stamp.
#[derive(Debug, Default)]
pub struct Written {
    blocks: BTreeMap<u64, u64>,
    next: u64,
    /// Only blocks with this remainder by that number.
    share: Option<(u64, u64)>,
}

fn content(block: u64, stamp: u64) -> Vec<u8> {
    (0..BLOCK_BYTES / 8).flat_map(|at| (stamp.rotate_left(17) ^ block ^ (at << 48)).to_le_bytes()).collect()
}

impl Written {
    /// Only one of `clients` shares of the blocks.
    pub fn of_share(client: u64, clients: u64) -> Written {
        Written { share: Some((client, clients)), ..Written::default() }
    }

    /// These were acknowledged later: of two writes to one block theirs counts.
    pub fn overwritten_by(&mut self, later: Written) {
        self.blocks.extend(later.blocks);
    }

    /// Writes so many blocks anywhere, `depth` at a time; all are acknowledged when it returns.
    pub fn scatter(&mut self, nbd: &mut Nbd, seed: &mut Seed, count: u64, depth: usize) -> Result<()> {
        let blocks = nbd.size_bytes() / BLOCK_BYTES;
        let mut sent = 0;
        while sent < count || nbd.in_flight() > 0 {
            while sent < count && nbd.in_flight() < depth {
                let mut block = seed.below(blocks);
                if let Some((client, clients)) = self.share {
                    block = block / clients * clients + client;
                }
                if self.blocks.contains_key(&block) {
                    continue;
                }
                self.next += 1;
                self.blocks.insert(block, self.next);
                nbd.send(block * BLOCK_BYTES, &Ask::Write(content(block, self.next)))?;
                sent += 1;
            }
            let answer = nbd.receive()?;
            ensure!(answer.error == 0, "a write failed with error {}", answer.error);
        }
        Ok(())
    }

    /// Reads all of it back.
    pub fn verify(&self, nbd: &mut Nbd) -> Result<()> {
        for (block, stamp) in &self.blocks {
            let found = nbd.read(block * BLOCK_BYTES, BLOCK_BYTES as u32)?;
            ensure!(found == content(*block, *stamp), "block {block} does not hold what was acknowledged");
        }
        Ok(())
    }
}

/// Bytes that a file takes on its disk.
pub fn allocated_bytes(path: &Path) -> Result<u64> {
    Ok(std::fs::metadata(path)?.blocks() * 512)
}

/// Compares two sparse backings' data areas: wherever one has data.
pub fn assert_equal(one: &Path, other: &Path, size_bytes: u64) -> Result<()> {
    let files = [File::open(one)?, File::open(other)?];
    let end = DATA_BEGIN_BYTES + size_bytes;
    let mut at = DATA_BEGIN_BYTES;
    let mut chunks = [vec![0; 64 << 10], vec![0; 64 << 10]];
    loop {
        let next = files.iter().map(|file| data_at(file, at)).collect::<Result<Vec<_>>>()?;
        let Some(first) = next.into_iter().flatten().min().filter(|first| *first < end) else {
            return Ok(());
        };
        let length = usize::try_from((end - first).min(64 << 10))?;
        for (file, chunk) in files.iter().zip(&mut chunks) {
            file.read_exact_at(&mut chunk[..length], first)?;
        }
        if let Some(byte) = (0..length).find(|byte| chunks[0][*byte] != chunks[1][*byte]) {
            bail!("the copies differ at data offset {}", first + byte as u64 - DATA_BEGIN_BYTES);
        }
        at = first + length as u64;
    }
}

fn data_at(file: &File, from: u64) -> Result<Option<u64>> {
    match rustix::fs::seek(file, SeekFrom::Data(from)) {
        Ok(at) => Ok(Some(at)),
        Err(Errno::NXIO) => Ok(None),
        Err(error) => Err(error).context("SEEK_DATA"),
    }
}
