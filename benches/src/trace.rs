//! System calls of the volume's threads: `io_uring_enter` alone is allowed on the data path.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::load::Load;
use crate::pair::{Pair, VOLUME};
use crate::process::{Running, present, sleeps_of, thread_named};
use crate::scratch::{Scratch, await_that};
use crate::table::{Bound, Figure, Table};

/// The one call.
const ENTER: &str = "io_uring_enter";
const DEPTH: u64 = 32;
/// Before anything is counted: extents are in the activity log, lists have their size.
const WARM_WRITES: u64 = 4000;
const LIMIT: Duration = Duration::from_secs(20);

/// What the thread of a volume called.
#[derive(Debug, Clone, PartialEq)]
pub struct Counted {
    /// Calls by name.
    pub calls: BTreeMap<String, u64>,
    /// Times it went to sleep, and so was woken.
    pub wakes: u64,
}

impl Counted {
    /// Times it entered its ring.
    pub fn enters(&self) -> u64 {
        self.calls.get(ENTER).copied().unwrap_or(0)
    }

    /// Calls that have no place on the data path. `restart_syscall` is how a wait that the tracer interrupted goes on.
    pub fn others(&self) -> Vec<String> {
        let allowed = [ENTER, "restart_syscall"];
        let others = self.calls.iter().filter(|(name, _)| !allowed.contains(&name.as_str()));
        others.map(|(name, count)| format!("{name} x{count}")).collect()
    }
}

/// Why nothing can be counted here, if so.
pub fn unavailable() -> Option<String> {
    (!present("strace")).then(|| "strace is not installed".to_owned())
}

/// Does `writes` writes at depth 32 twice: once to count the wakes of the volume's threads, once under strace to
/// count their calls. Primary, then secondary.
pub fn count(scratch: &Scratch, pair: &Pair, writes: u64) -> Result<Vec<Counted>> {
    let mut load = Load::connect(&pair.socket(), VOLUME)?;
    load.write(WARM_WRITES, DEPTH)?;
    let mut threads = Vec::new();
    for pid in pair.pids() {
        threads.push((pid, thread_named(pid, &format!("volume-{VOLUME}"))?));
    }
    let sleeps = || threads.iter().map(|(pid, thread)| sleeps_of(*pid, *thread)).collect::<Result<Vec<_>>>();
    // Every stop by the tracer would count as one.
    let before = sleeps()?;
    load.write(writes, DEPTH)?;
    let after = sleeps()?;
    let mut tracers = Vec::new();
    for (pid, thread) in &threads {
        tracers.push(attach(scratch, *pid, *thread)?);
    }
    load.write(writes, DEPTH)?;
    let mut found = Vec::new();
    for (number, (mut tracer, output)) in tracers.into_iter().enumerate() {
        tracer.interrupt()?;
        let text = std::fs::read_to_string(&output).context("strace left no counts")?;
        found.push(Counted { calls: counts(&text)?, wakes: after[number] - before[number] });
    }
    Ok(found)
}

/// A strace that counts a thread's calls into a file, attached.
fn attach(scratch: &Scratch, pid: u32, thread: u32) -> Result<(Running, PathBuf)> {
    let output = scratch.path().join(format!("calls-{thread}"));
    let mut command = Command::new("strace");
    command.args(["-c", "-U", "calls,name", "-p", &thread.to_string(), "-o"]).arg(&output);
    let mut tracer = Running::start(scratch, &format!("strace-{thread}"), command)?;
    await_that("strace to attach", LIMIT, || {
        tracer.check(scratch)?;
        let status = std::fs::read_to_string(format!("/proc/{pid}/task/{thread}/status"))?;
        Ok((!status.contains("TracerPid:\t0\n")).then_some(()))
    })?;
    Ok((tracer, output))
}

/// The table of `strace -c -U calls,name`.
fn counts(text: &str) -> Result<BTreeMap<String, u64>> {
    let mut calls = BTreeMap::new();
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        if let [count, name] = words.as_slice()
            && let Ok(count) = count.parse::<u64>()
            && *name != "total"
        {
            calls.insert((*name).to_owned(), count);
        }
    }
    if calls.is_empty() {
        bail!("strace counted nothing: {text}");
    }
    Ok(calls)
}

/// The figures of `bench write --trace`; a call that has no place there is an error that names it.
pub fn figures(
    scratch: &Scratch,
    pair: &Pair,
    label: &str,
    text: &str,
    writes: u64,
    table: &mut Table,
) -> Result<()> {
    let found = count(scratch, pair, writes)?;
    for (role, counted) in ["primary", "secondary"].into_iter().zip(&found) {
        let per_write = |value: u64| vec![value as f64 / writes as f64];
        let others = counted.others();
        let mut push = |name: &str, words: &str, value: u64| {
            let name = format!("{label}_{role}_{name}_per_write");
            table.push(Figure::measured(
                &name,
                &format!("{text}, {role}: {words} per write"),
                per_write(value),
            ));
        };
        push("enters", "io_uring_enter", counted.enters());
        push("wakes", "wakes", counted.wakes);
        let name = format!("{label}_{role}_other_calls");
        let words = format!("{text}, {role}: other calls {}", others.join(", "));
        let figure = Figure::measured(&name, &words, vec![others.len() as f64]);
        table.push(figure.bounded(Bound::AtMost(0.0)));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_read_and_strangers_named() {
        let text = "    calls syscall\n--------- ----------------\n     2048 io_uring_enter\n        3 futex\n\
                    --------- ----------------\n     2051 total\n";
        let calls = counts(text).expect("read");
        let counted = Counted { calls, wakes: 0 };
        assert_eq!(counted.enters(), 2048);
        assert_eq!(counted.others(), ["futex x3"]);
        assert!(counts("strace: attach failed").is_err());
    }
}
