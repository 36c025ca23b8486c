//! The disk's own loop: one thread that answers the kernel and the test, and never waits for either.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::fuse;
use super::platter::Platter;
use super::{Answer, Command, Counts, Fault, Loss, Operation};

/// What a request wants of the platter.
#[derive(Debug)]
enum Work {
    Read { offset: u64, length: usize },
    Write { offset: u64, bytes: Vec<u8> },
    Zero { offset: u64, length: u64 },
    Flush,
}

impl Work {
    fn operation(&self) -> Operation {
        match self {
            Work::Read { .. } => Operation::Read,
            Work::Write { .. } | Work::Zero { .. } => Operation::Write,
            Work::Flush => Operation::Flush,
        }
    }

    fn range(&self) -> (u64, u64) {
        match self {
            Work::Read { offset, length } => (*offset, offset + *length as u64),
            Work::Write { offset, bytes } => (*offset, offset + bytes.len() as u64),
            Work::Zero { offset, length } => (*offset, offset + length),
            Work::Flush => (0, u64::MAX),
        }
    }
}

/// A request that waits: for its delay, or for the end of a hold.
#[derive(Debug)]
struct Pending {
    unique: u64,
    work: Work,
    due: Instant,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Power {
    On,
    /// Nothing is applied, nothing is answered.
    Held,
    /// Everything fails.
    Off,
}

struct Disk {
    device: File,
    platter: Platter,
    power: Power,
    faults: Vec<Fault>,
    delays: Vec<(Operation, Duration)>,
    lies: bool,
    pending: VecDeque<Pending>,
    counts: Counts,
}

pub(super) fn serve(platter: &Path, volatile_cache: bool) -> Result<()> {
    let file = File::options().read(true).write(true).open(platter)?;
    let platter = Platter::new(file, volatile_cache)?;
    let (device, mount) = fuse::mount()?;
    set_nonblocking(&device)?;
    let control = UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned()?);
    let mut disk = Disk {
        device,
        platter,
        power: Power::On,
        faults: Vec::new(),
        delays: Vec::new(),
        lies: false,
        pending: VecDeque::new(),
        counts: Counts::default(),
    };
    disk.run(control, &mount)
}

fn set_nonblocking(device: &File) -> Result<()> {
    let flags = rustix::fs::fcntl_getfl(device)?;
    Ok(rustix::fs::fcntl_setfl(device, flags | rustix::fs::OFlags::NONBLOCK)?)
}

impl Disk {
    fn run(&mut self, control: UnixStream, mount: &OwnedFd) -> Result<()> {
        say(&control, &Answer::Ready { mount: mount.as_raw_fd() })?;
        let mut commands = BufReader::new(control.try_clone()?);
        let mut buffer = vec![0; fuse::IO_HEADER_BYTES + fuse::IO_BYTES_MAX];
        loop {
            let timeout = self.next_due().map(|due| timespec(due.saturating_duration_since(Instant::now())));
            let mut sources =
                [PollFd::new(&self.device, PollFlags::IN), PollFd::new(&control, PollFlags::IN)];
            match poll(&mut sources, timeout.as_ref()) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error).context("poll"),
            }
            let (kernel, test) = (sources[0].revents(), sources[1].revents());
            if !test.is_empty() && !self.command(&mut commands, &control)? {
                return Ok(());
            }
            if !kernel.is_empty() && !self.requests(&mut buffer)? {
                return Ok(());
            }
            self.run_due();
        }
    }

    /// One command of the test; false when it hung up.
    fn command(&mut self, commands: &mut BufReader<UnixStream>, control: &UnixStream) -> Result<bool> {
        let mut text = String::new();
        if commands.read_line(&mut text)? == 0 {
            return Ok(false);
        }
        let answer =
            match serde_json::from_str(&text).context("not a command").and_then(|what| self.obey(what)) {
                Ok(answer) => answer,
                Err(error) => Answer::Refused(format!("{error:#}")),
            };
        say(control, &answer)?;
        Ok(true)
    }

    fn obey(&mut self, command: Command) -> Result<Answer> {
        match command {
            Command::Fail(fault) => self.faults.push(fault),
            Command::Heal => {
                self.faults.clear();
                self.delays.clear();
                self.lies = false;
            }
            Command::Delay { operation, milliseconds } => {
                self.delays.retain(|(of, _)| *of != operation);
                if milliseconds > 0 {
                    self.delays.push((operation, Duration::from_millis(milliseconds)));
                }
            }
            Command::LieAboutFlush(lie) => self.lies = lie,
            Command::Hold => self.power = Power::Held,
            Command::LosePower(loss) => self.lose_power(loss)?,
            Command::PowerOn => self.power = Power::On,
            Command::Counts => {
                self.counts.volatile_bytes = self.platter.volatile_bytes();
                self.counts.held = self.pending.len() as u64;
                return Ok(Answer::Counts(self.counts));
            }
            Command::Poke { offset_bytes, bytes } => self.platter.poke(offset_bytes, &bytes)?,
        }
        Ok(Answer::Done)
    }

    fn lose_power(&mut self, loss: Loss) -> Result<()> {
        self.power = Power::Off;
        let mut under_way = Vec::new();
        while let Some(pending) = self.pending.pop_front() {
            self.reply(pending.unique, libc::EIO, &[]);
            if let Work::Write { offset, bytes } = pending.work {
                under_way.push((offset, bytes));
            }
        }
        Ok(self.platter.lose_power(loss, &under_way)?)
    }

    fn next_due(&self) -> Option<Instant> {
        match self.power {
            Power::On => self.pending.iter().map(|pending| pending.due).min(),
            Power::Held | Power::Off => None,
        }
    }

    fn run_due(&mut self) {
        if self.power != Power::On {
            return;
        }
        let now = Instant::now();
        let (due, later) =
            std::mem::take(&mut self.pending).into_iter().partition(|pending| pending.due <= now);
        self.pending = later;
        let due: VecDeque<Pending> = due;
        for pending in due {
            self.carry_out(pending.unique, pending.work);
        }
    }

    /// Reads what the kernel has; false when the mount is gone.
    fn requests(&mut self, buffer: &mut [u8]) -> Result<bool> {
        loop {
            match (&self.device).read(buffer) {
                Ok(length) => self.request(&buffer[..length]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(true),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {} // taken back by the kernel
                Err(error) if error.raw_os_error() == Some(libc::ENODEV) => return Ok(false),
                Err(error) => return Err(error).context("/dev/fuse"),
            }
        }
    }

    fn request(&mut self, bytes: &[u8]) {
        let header = fuse::header(bytes);
        let arguments = bytes.get(fuse::HEADER_BYTES..).unwrap_or_default();
        let unique = header.unique;
        match header.operation {
            fuse::INIT => self.reply(unique, 0, &fuse::init_answer()),
            fuse::GETATTR | fuse::SETATTR => {
                let answer = fuse::attribute_answer(self.platter.size_bytes());
                self.reply(unique, 0, &answer);
            }
            fuse::OPEN => self.reply(unique, 0, &fuse::open_answer()),
            fuse::STATFS => {
                let answer = fuse::statfs_answer(self.platter.size_bytes());
                self.reply(unique, 0, &answer);
            }
            fuse::RELEASE | fuse::FLUSH | fuse::DESTROY => self.reply(unique, 0, &[]),
            fuse::FORGET | fuse::BATCH_FORGET | fuse::INTERRUPT => {} // no answer is wanted
            fuse::LOOKUP => self.reply(unique, libc::ENOTDIR, &[]),
            fuse::READ => {
                let (offset, length) = (fuse::u64_at(arguments, 8), fuse::u32_at(arguments, 16) as usize);
                self.take(unique, Work::Read { offset, length });
            }
            fuse::WRITE => {
                let (offset, length) = (fuse::u64_at(arguments, 8), fuse::u32_at(arguments, 16) as usize);
                let data = bytes.get(fuse::IO_HEADER_BYTES..).unwrap_or_default();
                let bytes = data.get(..length).unwrap_or(data).to_vec();
                self.take(unique, Work::Write { offset, bytes });
            }
            fuse::FALLOCATE => {
                let (offset, length) = (fuse::u64_at(arguments, 8), fuse::u64_at(arguments, 16));
                self.take(unique, Work::Zero { offset, length });
            }
            fuse::FSYNC => self.take(unique, Work::Flush),
            _ => self.reply(unique, libc::ENOSYS, &[]),
        }
    }

    fn take(&mut self, unique: u64, work: Work) {
        let delay = self.delays.iter().find(|(of, _)| *of == work.operation()).map(|(_, delay)| *delay);
        match (self.power, delay) {
            (Power::Off, _) => self.reply(unique, libc::EIO, &[]),
            (Power::On, None) => self.carry_out(unique, work),
            (Power::Held, _) | (Power::On, Some(_)) => {
                let due = Instant::now() + delay.unwrap_or_default();
                self.pending.push_back(Pending { unique, work, due });
            }
        }
    }

    fn carry_out(&mut self, unique: u64, work: Work) {
        let (_, end) = work.range();
        if work.operation() != Operation::Flush && end > self.platter.size_bytes() {
            return self.reply(unique, libc::EIO, &[]);
        }
        if self.hits_fault(&work) {
            self.counts.faults += 1;
            return self.reply(unique, libc::EIO, &[]);
        }
        match self.apply(work) {
            Ok(payload) => self.reply(unique, 0, &payload),
            Err(error) => self.reply(unique, error.raw_os_error().unwrap_or(libc::EIO), &[]),
        }
    }

    fn hits_fault(&mut self, work: &Work) -> bool {
        let (begin, end) = work.range();
        let hit = self.faults.iter_mut().find(|fault| {
            fault.operation == work.operation()
                && fault.begin_bytes < end
                && begin < fault.end_bytes
                && fault.times != Some(0)
        });
        if let Some(Fault { times: Some(times), .. }) = hit {
            *times -= 1;
            return true;
        }
        hit.is_some()
    }

    fn apply(&mut self, work: Work) -> std::io::Result<Vec<u8>> {
        match work {
            Work::Read { offset, length } => {
                self.counts.reads += 1;
                let mut bytes = vec![0; length];
                self.platter.read(offset, &mut bytes)?;
                Ok(bytes)
            }
            Work::Write { offset, bytes } => {
                self.counts.writes += 1;
                self.counts.written_bytes += bytes.len() as u64;
                self.platter.write(offset, &bytes)?;
                let mut answer = vec![0; 8];
                answer[..4].copy_from_slice(&(bytes.len() as u32).to_le_bytes());
                Ok(answer)
            }
            Work::Zero { offset, length } => {
                self.counts.zeroes += 1;
                self.platter.zero(offset, length)?;
                Ok(Vec::new())
            }
            Work::Flush => {
                self.counts.flushes += 1;
                if !self.lies {
                    self.platter.flush()?;
                }
                Ok(Vec::new())
            }
        }
    }

    /// An answer nobody waits for any more (ENOENT) is no error.
    fn reply(&self, unique: u64, error: i32, payload: &[u8]) {
        let answer = fuse::answer(unique, error, if error == 0 { payload } else { &[] });
        let _ = (&self.device).write(&answer);
    }
}

fn say(mut control: &UnixStream, answer: &Answer) -> Result<()> {
    let mut text = serde_json::to_vec(answer)?;
    text.push(b'\n');
    Ok(control.write_all(&text)?)
}

fn timespec(duration: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(duration.subsec_nanos()),
    }
}
