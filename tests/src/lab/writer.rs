//! A client that writes stamped blocks at random, several at once, flushes now and then, and remembers what it was promised.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

use super::Seed;
use super::history::{BLOCK_BYTES, Floor, FlushMark, History};
use super::nbd::{Ask, Nbd};

/// What the client does.
#[derive(Debug, Clone)]
pub struct Load {
    /// Which sequence of random choices.
    pub seed: u64,
    /// Requests in flight.
    pub depth: usize,
    /// Blocks it touches: from here …
    pub first_block: u64,
    /// … so many.
    pub blocks: u64,
    /// A flush once in so many requests; 0: never.
    pub flush_once_in: u64,
    /// A discard or write-zeroes once in so many requests; 0: never.
    pub zero_once_in: u64,
    /// Where to stop; `None`: when told.
    pub requests: Option<u64>,
}

impl Load {
    /// Random writes over the whole volume, a flush once in 50.
    pub fn everywhere(seed: u64, history: &History) -> Load {
        Load {
            seed,
            depth: 16,
            first_block: 0,
            blocks: history.blocks(),
            flush_once_in: 50,
            zero_once_in: 0,
            requests: None,
        }
    }
}

/// A shared history.
pub type Shared = Arc<Mutex<History>>;

/// Why and how a client ended.
#[derive(Debug)]
pub struct Finished {
    /// Requests that were acknowledged without an error.
    pub acknowledged: u64,
    /// Longest wait for one answer.
    pub longest: Duration,
    /// Error answers, the first ones: an errno each.
    pub errors: Vec<u32>,
    /// Why the connection ended, unless the client itself ended it.
    pub broken: Option<anyhow::Error>,
}

/// A running client.
#[derive(Debug)]
pub struct Writer {
    thread: Option<JoinHandle<Finished>>,
    stop: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
    failed: Arc<AtomicU64>,
}

/// Locks the history; a client that panicked while it held it is an error.
pub fn lock(history: &Shared) -> Result<MutexGuard<'_, History>> {
    history.lock().map_err(|_| anyhow!("a client panicked"))
}

impl Writer {
    /// Starts a client on an NBD socket.
    pub fn start(socket: &Path, export: &str, history: &Shared, load: Load) -> Result<Writer> {
        let nbd = Nbd::unix(socket, export, Duration::from_secs(60))?;
        let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let failed = Arc::new(AtomicU64::new(0));
        let mut client = Client {
            nbd,
            seed: Seed::new(load.seed),
            load,
            history: Arc::clone(history),
            busy: HashSet::new(),
            flight: HashMap::new(),
            stop: Arc::clone(&stop),
            done: Arc::clone(&done),
            failed: Arc::clone(&failed),
            finished: Finished { acknowledged: 0, longest: Duration::ZERO, errors: Vec::new(), broken: None },
        };
        let thread = std::thread::Builder::new().name("client".to_owned()).spawn(move || {
            client.finished.broken = client.run().err();
            client.finished
        })?;
        Ok(Writer { thread: Some(thread), stop, done, failed })
    }

    /// Requests acknowledged so far.
    pub fn acknowledged(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    /// Waits until so many more are acknowledged; an error answer ends the waiting.
    pub fn wait_more(&self, more: u64, limit: Duration) -> Result<()> {
        let goal = self.acknowledged() + more;
        super::wait::until(&format!("{more} more acknowledged requests"), limit, || {
            if self.thread.as_ref().is_some_and(JoinHandle::is_finished) && self.acknowledged() < goal {
                bail!("the client ended after {} requests", self.acknowledged());
            }
            let failed = self.failed.load(Ordering::Relaxed);
            if failed > 0 {
                bail!("the client got {failed} errors after {} answers", self.acknowledged());
            }
            Ok((self.acknowledged() >= goal).then_some(()))
        })
    }

    /// Ends it, with everything in flight answered, and gives what it saw.
    pub fn finish(mut self) -> Result<Finished> {
        self.stop.store(true, Ordering::Relaxed);
        self.join()
    }

    /// Waits for its own end: its last request, or a broken connection.
    pub fn join(&mut self) -> Result<Finished> {
        let thread = self.thread.take().context("the client was waited for already")?;
        thread.join().map_err(|_| anyhow!("the client panicked"))
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

#[derive(Debug)]
enum Flight {
    Write { block: u64, sequence: u64, since: Instant },
    Flush { mark: FlushMark, since: Instant },
}

#[derive(Debug)]
struct Client {
    nbd: Nbd,
    seed: Seed,
    load: Load,
    history: Shared,
    busy: HashSet<u64>,
    flight: HashMap<u64, Flight>,
    stop: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
    failed: Arc<AtomicU64>,
    finished: Finished,
}

impl Client {
    fn run(&mut self) -> Result<()> {
        let mut sent = 0;
        loop {
            let enough =
                self.load.requests.is_some_and(|most| sent >= most) || self.stop.load(Ordering::Relaxed);
            if enough && self.flight.is_empty() {
                return Ok(());
            }
            if !enough && self.flight.len() < self.load.depth.max(1) {
                self.send()?;
                sent += 1;
            } else {
                self.receive()?;
            }
        }
    }

    fn send(&mut self) -> Result<()> {
        let since = Instant::now();
        if self.load.flush_once_in > 0 && self.seed.once_in(self.load.flush_once_in) {
            let mark = lock(&self.history)?.flush();
            let cookie = self.nbd.send(0, &Ask::Flush)?;
            self.flight.insert(cookie, Flight::Flush { mark, since });
            return Ok(());
        }
        let block = loop {
            let block = self.load.first_block + self.seed.below(self.load.blocks);
            if !self.busy.contains(&block) {
                break block;
            }
        };
        let zeroes = self.load.zero_once_in > 0 && self.seed.once_in(self.load.zero_once_in);
        let (sequence, ask) = if zeroes {
            let ask = match self.seed.below(3) {
                0 => Ask::Trim(BLOCK_BYTES as u32),
                1 => Ask::WriteZeroes(BLOCK_BYTES as u32, true),
                _ => Ask::WriteZeroes(BLOCK_BYTES as u32, false),
            };
            (lock(&self.history)?.zero(block), ask)
        } else {
            let (sequence, bytes) = lock(&self.history)?.write(block);
            (sequence, Ask::Write(bytes))
        };
        self.busy.insert(block);
        let cookie = self.nbd.send(block * BLOCK_BYTES as u64, &ask)?;
        self.flight.insert(cookie, Flight::Write { block, sequence, since });
        Ok(())
    }

    fn receive(&mut self) -> Result<()> {
        let answer = self.nbd.receive()?;
        let flight = self.flight.remove(&answer.cookie).context("an answer to nothing that was asked")?;
        let mut history = lock(&self.history)?;
        let since = match flight {
            Flight::Write { block, sequence, since } => {
                self.busy.remove(&block);
                if answer.error == 0 {
                    history.acknowledge(block, sequence);
                }
                since
            }
            Flight::Flush { mark, since } => {
                if answer.error == 0 {
                    history.flushed(mark);
                } else {
                    history.flush_failed(mark);
                }
                since
            }
        };
        self.finished.longest = self.finished.longest.max(since.elapsed());
        if answer.error == 0 {
            self.finished.acknowledged += 1;
            self.done.fetch_add(1, Ordering::Relaxed);
        } else {
            self.failed.fetch_add(1, Ordering::Relaxed);
            // The first ones tell enough.
            if self.finished.errors.len() < 16 {
                self.finished.errors.push(answer.error);
            }
        }
        Ok(())
    }
}

/// Reads every touched block over NBD and judges it.
pub fn verify_client(socket: &Path, export: &str, history: &Shared, floor: Floor) -> Result<u64> {
    let mut nbd = Nbd::unix(socket, export, Duration::from_secs(60))?;
    let mut history = lock(history)?;
    let touched = history.touched();
    for block in &touched {
        let bytes = nbd.read(block * BLOCK_BYTES as u64, BLOCK_BYTES as u32)?;
        history.read(*block, &bytes, floor)?;
    }
    Ok(touched.len() as u64)
}

/// Judges a backing's data area, block by block, without asking the daemon and without settling.
pub fn verify_backing(backing: &Path, history: &Shared, floor: Floor) -> Result<()> {
    let history = lock(history)?;
    let copy = super::copies::Copy::open(backing, history.blocks() * BLOCK_BYTES as u64)?;
    copy.scan(|offset, bytes| {
        for (number, block) in bytes.chunks(BLOCK_BYTES).enumerate() {
            history.judge(offset / BLOCK_BYTES as u64 + number as u64, block, floor)?;
        }
        Ok(())
    })
    .with_context(|| backing.display().to_string())
}

/// The path of a volume's NBD socket in a run directory.
pub fn socket_in(run_directory: &Path, volume: &str) -> PathBuf {
    run_directory.join(format!("{volume}.nbd"))
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;
    use crate::lab::{Space, wait};

    const LIMIT: Duration = Duration::from_secs(20);

    /// A real NBD server over a file; what the client was promised is then in the file, unless someone breaks it.
    #[test]
    fn a_real_server_keeps_its_promises_and_a_broken_block_is_found() {
        let space = Space::new().expect("a directory");
        let blocks = 256;
        let size = blocks * BLOCK_BYTES as u64;
        let disk = space.sparse_file("disk", super::super::copies::DATA_BEGIN_BYTES + size).expect("a file");
        let socket = space.path().join("data.nbd");
        let spec = format!(
            "driver=raw,offset={},size={size},file.driver=file,file.discard=unmap,file.filename={}",
            super::super::copies::DATA_BEGIN_BYTES,
            disk.display()
        );
        let server = Command::new("qemu-nbd")
            .args([
                "--image-opts",
                "--export-name=data",
                "--persistent",
                "--shared=4",
                "--discard=unmap",
                "--socket",
            ])
            .arg(&socket)
            .arg(spec)
            .stdout(Stdio::null())
            .spawn();
        let Ok(mut server) = server else {
            println!("SKIPPED: qemu-nbd is not installed");
            return;
        };
        wait::until("qemu-nbd", LIMIT, || Ok(socket.exists().then_some(()))).expect("it listens");
        let history: Shared = Arc::new(Mutex::new(History::new(3, blocks)));
        let load = Load {
            zero_once_in: 10,
            requests: Some(2000),
            ..Load::everywhere(1, &lock(&history).expect("held"))
        };
        let mut writer = Writer::start(&socket, "data", &history, load).expect("connected");
        let finished = writer.join().expect("no panic");
        assert!(finished.broken.is_none() && finished.errors.is_empty(), "{finished:?}");
        assert_eq!(finished.acknowledged, 2000);
        assert!(verify_client(&socket, "data", &history, Floor::Acknowledged).expect("kept") > 200);
        server.kill().expect("killed");
        server.wait().expect("gone");
        verify_backing(&disk, &history, Floor::Acknowledged).expect("kept");
        let touched = lock(&history).expect("held").touched()[3];
        let offset = super::super::copies::DATA_BEGIN_BYTES + touched * BLOCK_BYTES as u64 + 600;
        let file = std::fs::File::options().write(true).open(&disk).expect("opened");
        std::os::unix::fs::FileExt::write_all_at(&file, &[0x5a; 3], offset).expect("broken");
        assert!(verify_backing(&disk, &history, Floor::Flushed).is_err());
    }
}
