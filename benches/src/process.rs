//! Processes that a run starts and surely ends, and what they cost.

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::scratch::{Scratch, await_that};

/// The unit of the times in `/proc`: USER_HZ, 100 a second on every machine this is built for.
const TICK_US: u64 = 10_000;

/// A process that dies with this value.
#[derive(Debug)]
pub struct Running {
    child: Child,
    name: String,
}

impl Running {
    /// Starts it with both outputs going to `NAME.log` of the run's directory.
    pub fn start(scratch: &Scratch, name: &str, mut command: Command) -> Result<Running> {
        let log = scratch.log(&format!("{name}.log"))?;
        command.stdin(Stdio::null()).stderr(log.try_clone()?).stdout(log);
        let child = command.spawn().with_context(|| format!("{command:?} cannot be started"))?;
        Ok(Running { child, name: name.to_owned() })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// An error with the end of its log if it has ended.
    pub fn check(&mut self, scratch: &Scratch) -> Result<()> {
        if let Some(status) = self.child.try_wait()? {
            let log = std::fs::read_to_string(scratch.path().join(format!("{}.log", self.name)));
            bail!("{} ended ({status}): {}", self.name, log.unwrap_or_default());
        }
        Ok(())
    }

    /// Ends it at once.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill().and_then(|()| self.child.wait()).map(drop).context("a process cannot be ended")
    }

    /// SIGINT, and waits for its end.
    pub fn interrupt(&mut self) -> Result<()> {
        let pid = i32::try_from(self.pid()).ok().and_then(rustix::process::Pid::from_raw).context("a pid")?;
        rustix::process::kill_process(pid, rustix::process::Signal::INT)?;
        await_that(&format!("the end of {}", self.name), Duration::from_secs(20), || {
            Ok(self.child.try_wait()?.map(drop))
        })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail only if it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Processor time of processes so far, user and system together, in microseconds (counted in ticks of 10 ms).
pub fn cpu_us(pids: &[u32]) -> Result<u64> {
    let mut ticks = 0;
    for pid in pids {
        let path = format!("/proc/{pid}/stat");
        let stat = std::fs::read_to_string(&path).with_context(|| format!("{path} cannot be read"))?;
        ticks += ticks_of(&stat).with_context(|| format!("{path} has no times: {stat}"))?;
    }
    Ok(ticks * TICK_US)
}

/// utime and stime: the 14th and 15th field, counted behind the name, which may hold anything.
fn ticks_of(stat: &str) -> Option<u64> {
    let behind = stat.rsplit_once(')')?.1;
    let mut fields = behind.split_whitespace().skip(11);
    Some(fields.next()?.parse::<u64>().ok()? + fields.next()?.parse::<u64>().ok()?)
}

/// The thread of a process with this name (the kernel keeps 15 bytes of it).
pub fn thread_named(pid: u32, name: &str) -> Result<u32> {
    for entry in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let entry = entry?;
        let found = std::fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        if found.trim_end() == name {
            return Ok(entry.file_name().to_string_lossy().parse()?);
        }
    }
    bail!("process {pid} has no thread {name}")
}

/// Times the thread has gone to sleep by itself so far: each is one wake later.
pub fn sleeps_of(pid: u32, thread: u32) -> Result<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/task/{thread}/status"))?;
    text.lines()
        .find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"))
        .and_then(|value| value.trim().parse().ok())
        .context("the status of a thread has no voluntary_ctxt_switches")
}

/// The program beside this one, or above it for a test.
pub fn beside(name: &str) -> Result<std::path::PathBuf> {
    let here = std::env::current_exe()?;
    here.ancestors()
        .skip(1)
        .take(2)
        .map(|directory| directory.join(name))
        .find(|path| path.is_file())
        .with_context(|| format!("no program {name} beside {}: build it first", here.display()))
}

/// Whether a program is on the path.
pub fn present(program: &str) -> bool {
    let path = std::env::var("PATH").unwrap_or_default();
    path.split(':').any(|directory| std::path::Path::new(directory).join(program).is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_stand_behind_a_name_that_holds_anything() {
        let stat = "7 (a) b (c) S 1 7 7 0 -1 4194560 1 2 3 4 120 34 5 6 20 0 1 0 99";
        assert_eq!(ticks_of(stat), Some(154));
        assert_eq!(ticks_of("7 (a"), None);
    }

    #[test]
    fn this_process_has_used_time_and_has_threads() {
        let me = std::process::id();
        cpu_us(&[me]).expect("read");
        assert!(thread_named(me, "no-such-thread").is_err());
    }
}
