//! A disk that can fail, be slow, and lose what was not flushed: one file served over FUSE by a process of its own,
//! with a loop device on it. The process is apart, so that a killed test never waits for itself: its end of the
//! control socket closes, the disk ends, the kernel fails whatever is still under way.
//!
//! A power cut is `hold` (nothing is answered or applied any more), then the death of every process of the server,
//! then `lose_power` (all that was held is answered with EIO, so that the dead processes' io_uring lets go of the
//! device; the cache is dropped, kept or torn), then `power_on`.
//!
//! How long a killed io_uring process holds its device (measured by this module's tests, kernel 6.18): the exclusive
//! open and the OFD lock belong to the ring's registered or in-flight file references, and those end with the last
//! operation in flight, not with the process. With the disk answering, the hold is over 0 to 60 ms after the process
//! is gone (`io_ring_exit_work` looks every 50 ms). With one request unanswered it lasts for ever: neither the loop
//! device nor FUSE has a timeout. That is why `lose_power` answers everything, and why it must come after the kill.

mod fuse;
mod platter;
pub mod process;
mod server;

use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::LoopDevice;
use process::Helper;

/// What a fault or a delay is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Operation {
    /// Reads.
    Read,
    /// Writes, discards and write-zeroes.
    Write,
    /// Flushes; they have no range.
    Flush,
}

/// Operations that fail with EIO.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    /// Of this kind.
    pub operation: Operation,
    /// That touch a byte from here …
    pub begin_bytes: u64,
    /// … to before here.
    pub end_bytes: u64,
    /// So many of them; all for ever when `None`.
    pub times: Option<u32>,
}

impl Fault {
    /// Every operation of this kind, everywhere, for ever.
    pub fn all(operation: Operation) -> Fault {
        Fault { operation, begin_bytes: 0, end_bytes: u64::MAX, times: None }
    }

    /// Every operation of this kind that touches this range, for ever.
    pub fn range(operation: Operation, begin_bytes: u64, length_bytes: u64) -> Fault {
        Fault { operation, begin_bytes, end_bytes: begin_bytes + length_bytes, times: None }
    }
}

/// What a power cut does to what was written and not flushed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Loss {
    /// All of it is gone.
    Drop,
    /// All of it happened to reach the platter.
    Keep,
    /// Each 512-byte sector, also of writes under way, reached the platter or not, by this seed.
    Tear {
        /// Which sectors.
        seed: u64,
    },
}

/// What the disk did so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Reads answered.
    pub reads: u64,
    /// Writes applied.
    pub writes: u64,
    /// Bytes of them.
    pub written_bytes: u64,
    /// Flushes carried out.
    pub flushes: u64,
    /// Discards and write-zeroes applied.
    pub zeroes: u64,
    /// Operations failed by a fault.
    pub faults: u64,
    /// Bytes in the cache that a power cut would touch.
    pub volatile_bytes: u64,
    /// Operations held back at this moment.
    pub held: u64,
}

/// A command to the disk.
#[derive(Debug, Clone, Serialize, Deserialize)]
enum Command {
    Fail(Fault),
    Heal,
    Delay {
        operation: Operation,
        milliseconds: u64,
    },
    /// Flushes are answered with success and do nothing: the lie a sabotage needs.
    LieAboutFlush(bool),
    Hold,
    LosePower(Loss),
    PowerOn,
    Counts,
    Poke {
        offset_bytes: u64,
        bytes: Vec<u8>,
    },
}

/// The answer to each.
#[derive(Debug, Clone, Serialize, Deserialize)]
enum Answer {
    Ready { mount: i32 },
    Done,
    Counts(Counts),
    Refused(String),
}

/// How a disk is made.
#[derive(Debug, Clone, Copy)]
pub struct DiskOptions {
    /// Size of the disk.
    pub size_bytes: u64,
    /// Sector size the loop device shows: 512 or 4096.
    pub sector_bytes: u32,
    /// Whether it has a volatile cache; else each write is on the platter when answered.
    pub volatile_cache: bool,
}

/// The disk, its process and its loop device.
#[derive(Debug)]
pub struct FaultyDisk {
    // Declared in the order in which they must go: the device, its file, then the process that serves it.
    device: LoopDevice,
    helper: Helper,
}

impl FaultyDisk {
    /// A new disk whose platter is the (sparse) file `platter`, made here.
    pub fn new(platter: &Path, options: DiskOptions) -> Result<FaultyDisk> {
        std::fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .open(platter)
            .and_then(|file| file.set_len(options.size_bytes))
            .with_context(|| format!("{} cannot be made", platter.display()))?;
        let arguments = [
            "disk".to_owned(),
            "--platter".to_owned(),
            platter.display().to_string(),
            format!("--volatile={}", options.volatile_cache),
        ];
        let mut helper = Helper::start(&arguments)?;
        let mount = match helper.receive()? {
            Answer::Ready { mount } => mount,
            other @ (Answer::Done | Answer::Counts(_) | Answer::Refused(_)) => {
                anyhow::bail!("the disk did not start: {other:?}")
            }
        };
        let file = open_mount(helper.pid(), mount)?;
        let device = LoopDevice::over(file, options.sector_bytes)?;
        Ok(FaultyDisk { device, helper })
    }

    /// The loop device on it.
    pub fn device(&self) -> &LoopDevice {
        &self.device
    }

    /// `/dev/loopN`.
    pub fn path(&self) -> &Path {
        self.device.path()
    }

    fn tell(&self, command: Command) -> Result<Answer> {
        match self.helper.ask(&command)? {
            Answer::Refused(why) => anyhow::bail!("the disk refused {command:?}: {why}"),
            answer @ (Answer::Ready { .. } | Answer::Done | Answer::Counts(_)) => Ok(answer),
        }
    }

    /// Adds a fault.
    pub fn fail(&self, fault: Fault) -> Result<()> {
        self.tell(Command::Fail(fault)).map(drop)
    }

    /// Takes all faults, delays and lies away.
    pub fn heal(&self) -> Result<()> {
        self.tell(Command::Heal).map(drop)
    }

    /// Lets each operation of a kind take at least so long; zero takes the delay away.
    pub fn delay(&self, operation: Operation, milliseconds: u64) -> Result<()> {
        self.tell(Command::Delay { operation, milliseconds }).map(drop)
    }

    /// Answers flushes without carrying them out.
    pub fn lie_about_flush(&self, lie: bool) -> Result<()> {
        self.tell(Command::LieAboutFlush(lie)).map(drop)
    }

    /// From now on nothing is applied and nothing answered: the first moment of a power cut.
    pub fn hold(&self) -> Result<()> {
        self.tell(Command::Hold).map(drop)
    }

    /// Ends what was held with EIO and treats the cache as a power cut does. Everything fails until [`Self::power_on`].
    pub fn lose_power(&self, loss: Loss) -> Result<()> {
        self.tell(Command::LosePower(loss)).map(drop)
    }

    /// Serves again.
    pub fn power_on(&self) -> Result<()> {
        self.tell(Command::PowerOn).map(drop)
    }

    /// What it did so far.
    pub fn counts(&self) -> Result<Counts> {
        match self.tell(Command::Counts)? {
            Answer::Counts(counts) => Ok(counts),
            other @ (Answer::Ready { .. } | Answer::Done | Answer::Refused(_)) => {
                anyhow::bail!("the disk answered {other:?} to a question for its counts")
            }
        }
    }

    /// Changes bytes behind everyone's back: a bad disk.
    pub fn poke(&self, offset_bytes: u64, bytes: &[u8]) -> Result<()> {
        self.tell(Command::Poke { offset_bytes, bytes: bytes.to_vec() }).map(drop)
    }

    /// After [`Self::lose_power`]: waits until the dead processes let go of the device, then serves again.
    /// Gives how long the hold lasted.
    pub fn power_back(&self, limit: Duration) -> Result<Duration> {
        let held = self.device.wait_released(limit)?;
        self.power_on()?;
        Ok(held)
    }
}

/// Opens the root of the detached mount: a regular file, the disk.
fn open_mount(pid: u32, mount: i32) -> Result<OwnedFd> {
    let path = format!("/proc/{pid}/fd/{mount}");
    let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::CLOEXEC | rustix::fs::OFlags::DIRECT;
    rustix::fs::open(&path, flags, rustix::fs::Mode::empty())
        .with_context(|| format!("{path} cannot be opened"))
}

/// The process' own side: serves until its control socket closes.
pub fn serve(platter: &Path, volatile_cache: bool) -> Result<()> {
    server::serve(platter, volatile_cache)
}

#[cfg(test)]
mod tests;
