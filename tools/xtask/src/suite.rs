//! `cargo xtask test`: the whole suite, phase by phase, each timed and bounded.
//! The last line is read by machines: `N passed, N failed, N skipped`.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::packages;
use crate::process::{self, Outcome, Tool};
use crate::tidy;

/// The acceptance cases that hold today: each must print `ok`. A case enters here when it passes, and never leaves.
pub(crate) const CASES_HELD: &[&str] = &[
    "SFT3-B1", "SFT3-B2", "SFT3-B3", "SFT3-B4", "SFT3-B5", "SFT3-S1d", "SFT3-S2", "SFT3-S2b", "SFT3-S3b",
    "SFT3-S3c", "SFT3-R3", "SFT3-R4", "SFT3-O4", "RDR-1", "RDR-2", "DISK-1", "DISK-2", "DISK-4", "DISK-5",
    "DISK-6", "SEC-1", "SEC-3", "SEC-4", "SEC-5", "RUN-1", "RUN-4", "SWAP-1", "SWAP-2", "CLIENT-1",
    "CLIENT-2", "CLIENT-3", "CLIENT-4", "CLIENT-5", "CLIENT-6", "CLIENT-7",
];
/// Power cuts of DISK-4 in the suite; `cargo xtask cases DISK-4` makes all that are asked for.
const DISK4_CUTS: u32 = 10;
/// Set in the suite: the long cases take their shorter form.
const SHORT_FORM: &str = "DUPLEX_CASES_SHORT";

/// Simulator seeds, and crash rounds on the real program, of one run of the suite.
const SIM_SEEDS: u32 = 2000;
const CRASH_ROUNDS: u32 = 20;
/// Crash points of one run of the suite: in the simulator, and on the real program. `--sweep` and `--at all` take all.
const SWEEP_RUNS: u32 = 700;
const CRASH_POINTS: u32 = 36;

/// Other crash points than those of offset 0: the same commit has the same suite, whoever wants others says so.
const OFFSET: &str = "DUPLEX_CRASH_OFFSET";

fn crash_offset() -> String {
    let offset = std::env::var(OFFSET).unwrap_or_else(|_| "0".to_owned());
    println!("crash points of {OFFSET}={offset}");
    offset
}

/// Rounds of `duplex-scale`.
const SCALE_ROUNDS: [&str; 3] = ["huge", "cold", "many"];

/// What a phase added to the count.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Count {
    pub(crate) passed: u32,
    pub(crate) failed: u32,
    pub(crate) skipped: u32,
}

impl Count {
    const PASSED: Count = Count { passed: 1, failed: 0, skipped: 0 };
    const FAILED: Count = Count { passed: 0, failed: 1, skipped: 0 };
    const SKIPPED: Count = Count { passed: 0, failed: 0, skipped: 1 };

    fn add(&mut self, other: Count) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }

    fn of(held: bool) -> Count {
        if held { Count::PASSED } else { Count::FAILED }
    }

    /// The whole suite holds: nothing failed, and nothing was skipped where everything can run.
    fn holds(self, everything_can_run: bool) -> bool {
        self.failed == 0 && (self.skipped == 0 || !everything_can_run)
    }
}

/// Runs the whole suite.
pub(crate) fn run() -> Result<ExitCode> {
    let mut total = Count::default();
    let begin = Instant::now();
    let mut phase = |name: &str, work: &mut dyn FnMut() -> Result<Count>| {
        let start = Instant::now();
        println!("== {name}");
        let count = work().unwrap_or_else(|error| {
            println!("{name}: {error:#}");
            Count::FAILED
        });
        println!(
            "== {name}: {} passed, {} failed, {} skipped in {:.1} s",
            count.passed,
            count.failed,
            count.skipped,
            start.elapsed().as_secs_f64()
        );
        total.add(count);
        count.failed == 0
    };

    phase("packages", &mut install);
    phase("format", &mut || command("format", cargo(&["fmt", "--all", "--check"]), minutes(2)));
    let built = phase("build", &mut || {
        command("build", cargo(&["build", "--workspace", "--all-targets"]), minutes(15))
    });
    phase("clippy", &mut || {
        let words = ["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"];
        command("clippy", cargo(&words), minutes(10))
    });
    phase("tidy", &mut tidy_count);
    if built {
        phase("tests", &mut tests);
        phase("simulator", &mut simulator);
        phase("simulator sweep", &mut simulator_sweep);
        phase("cases", &mut cases);
        phase("crash", &mut crash);
        phase("scale", &mut scale);
        phase("crash points", &mut crash_points);
    }
    println!("whole run {:.1} s", begin.elapsed().as_secs_f64());
    println!("{} passed, {} failed, {} skipped", total.passed, total.failed, total.skipped);
    let everything_can_run = packages::is_root() && cfg!(target_os = "linux");
    Ok(if total.holds(everything_can_run) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn minutes(count: u64) -> Duration {
    Duration::from_secs(60 * count)
}

fn cargo(words: &[&str]) -> Command {
    let mut command = process::cargo();
    command.args(words);
    command
}

fn log_file(name: &str) -> PathBuf {
    Path::new("target/suite").join(format!("{name}.log"))
}

fn install() -> Result<Count> {
    match packages::require(packages::LAB) {
        Ok(()) => Ok(Count::default()),
        Err(error) if packages::is_root() => Err(error),
        Err(error) => {
            println!("SKIPPED: {error:#}");
            Ok(Count::SKIPPED)
        }
    }
}

/// A command that counts as one: its output is shown when it fails.
fn command(name: &str, command: Command, limit: Duration) -> Result<Count> {
    let log = log_file(name);
    let mut tail = Vec::new();
    let outcome = process::watch(command, &log, limit, |text| tail.push(text.to_owned()))?;
    if !outcome.success {
        show_tail(&tail, 120);
        say_why(name, &outcome, limit);
    }
    Ok(Count::of(outcome.success))
}

fn show_tail(lines: &[String], most: usize) {
    for text in &lines[lines.len().saturating_sub(most)..] {
        println!("{text}");
    }
}

fn say_why(name: &str, outcome: &Outcome, limit: Duration) {
    if outcome.timed_out {
        println!("{name}: ended by the suite, it ran longer than {} s", limit.as_secs());
    }
}

fn tidy_count() -> Result<Count> {
    let findings = tidy::findings()?;
    for finding in &findings {
        println!("{finding}");
    }
    Ok(Count::of(findings.is_empty()))
}

/// Unit and integration tests of the workspace.
fn tests() -> Result<Count> {
    let words = ["test", "--workspace", "--no-fail-fast", "--", "--show-output"];
    let limit = minutes(12);
    let mut parse = TestOutput::default();
    let mut all = Vec::new();
    let outcome = process::watch(cargo(&words), &log_file("tests"), limit, |text| {
        all.push(text.to_owned());
        if let Some(shown) = parse.line(text) {
            println!("{shown}");
        }
    })?;
    let mut count = parse.count();
    if !outcome.success {
        show_tail(&all, 200);
        say_why("tests", &outcome, limit);
        if count.failed == 0 {
            count.failed = 1;
        }
    }
    Ok(count)
}

/// Reads what the test harness prints.
#[derive(Debug, Default)]
struct TestOutput {
    passed: u32,
    failed: u32,
    ignored: u32,
    skipped: u32,
}

impl TestOutput {
    /// Takes one line; returns it where a person should see it.
    fn line<'a>(&mut self, text: &'a str) -> Option<&'a str> {
        if text.trim_start().starts_with("SKIPPED: ") {
            self.skipped += 1;
            return Some(text);
        }
        if let Some(rest) = text.strip_prefix("test result: ") {
            for part in rest.split([';', '.']) {
                let mut words = part.split_whitespace();
                let (Some(number), Some(kind)) =
                    (words.next().and_then(|n| n.parse::<u32>().ok()), words.next())
                else {
                    continue;
                };
                match kind {
                    "passed" => self.passed += number,
                    "failed" => self.failed += number,
                    "ignored" => self.ignored += number,
                    _ => {}
                }
            }
            return None;
        }
        (text.starts_with("test ") && text.ends_with("FAILED")).then_some(text)
    }

    /// A test that printed `SKIPPED: reason` ended well for the harness, and counts as skipped here; an ignored one too.
    fn count(&self) -> Count {
        Count {
            passed: self.passed.saturating_sub(self.skipped),
            failed: self.failed,
            skipped: self.skipped + self.ignored,
        }
    }
}

fn simulator() -> Result<Count> {
    let tool = Tool::new("duplex-tests", "duplex-sim");
    let arguments = ["--seeds".to_owned(), SIM_SEEDS.to_string()];
    command("simulator", tool.command(&arguments), minutes(6))
}

/// A crash at each of some moments, one by one.
fn simulator_sweep() -> Result<Count> {
    let tool = Tool::new("duplex-tests", "duplex-sim");
    let arguments =
        ["--sweep", "--runs", &SWEEP_RUNS.to_string(), "--offset", &crash_offset()].map(str::to_owned);
    command("simulator-sweep", tool.command(&arguments), minutes(4))
}

fn cases() -> Result<Count> {
    if !packages::is_root() {
        println!("SKIPPED: the acceptance cases need root");
        return Ok(Count { skipped: u32::try_from(CASES_HELD.len())?, ..Count::default() });
    }
    let names: Vec<String> = CASES_HELD.iter().map(|name| (*name).to_owned()).collect();
    let limit = minutes(11);
    let mut count = Count::default();
    let tool = Tool::new("duplex-tests", "duplex-cases");
    let mut command = tool.command(&names);
    command.env("DUPLEX_DISK4_CUTS", DISK4_CUTS.to_string()).env(SHORT_FORM, "1");
    let outcome = process::watch(command, &log_file("cases"), limit, |text| {
        println!("{text}");
        count.add(case_line(text));
    })?;
    say_why("cases", &outcome, limit);
    let counted = count.passed + count.failed + count.skipped;
    count.failed += u32::try_from(CASES_HELD.len())?.saturating_sub(counted);
    Ok(count)
}

/// `NAME ok 1.9 s` · `NAME FAIL why` · `NAME missing` · `NAME hung why` · `NAME unable why`; a held case that is
/// missing, or has no verdict, has failed.
fn case_line(text: &str) -> Count {
    let mut words = text.split_whitespace();
    let name = words.next().unwrap_or_default();
    if !CASES_HELD.contains(&name) {
        return Count::default();
    }
    match words.next() {
        Some("ok") => Count::PASSED,
        Some("FAIL" | "missing" | "hung" | "unable") => Count::FAILED,
        Some(_) | None => Count::default(),
    }
}

fn crash() -> Result<Count> {
    crash_tool("crash", &[&["--rounds", &CRASH_ROUNDS.to_string()]])
}

/// Crashes at named boundaries, and the proof that lost marks are found.
fn crash_points() -> Result<Count> {
    if packages::is_root() {
        process::build_crash_at()?;
    }
    let (most, offset) = (CRASH_POINTS.to_string(), crash_offset());
    crash_tool("crash-points", &[&["--at", "all", "--most", &most, "--offset", &offset], &["--sabotage"]])
}

fn crash_tool(name: &str, runs: &[&[&str]]) -> Result<Count> {
    let tool = Tool::new("duplex-tests", "duplex-crash");
    if !packages::is_root() {
        println!("SKIPPED: the crash rounds need root");
        return Ok(Count::SKIPPED);
    }
    let mut count = Count::default();
    for words in runs {
        let arguments: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
        count.add(command(name, tool.command(&arguments), minutes(6))?);
    }
    Ok(count)
}

fn scale() -> Result<Count> {
    if !packages::is_root() {
        println!("SKIPPED: the scale rounds need root");
        return Ok(Count { skipped: u32::try_from(SCALE_ROUNDS.len())?, ..Count::default() });
    }
    let limit = minutes(4);
    let mut count = Count::default();
    let command = Tool::new("duplex-tests", "duplex-scale").command(&SCALE_ROUNDS.map(str::to_owned));
    let outcome = process::watch(command, &log_file("scale"), limit, |text| {
        println!("{text}");
        let mut words = text.split_whitespace();
        if words.next().is_some_and(|name| SCALE_ROUNDS.contains(&name)) {
            match words.next() {
                Some("ok") => count.add(Count::PASSED),
                Some("FAIL") => count.add(Count::FAILED),
                Some(_) | None => {}
            }
        }
    })?;
    say_why("scale", &outcome, limit);
    count.failed += u32::try_from(SCALE_ROUNDS.len())?.saturating_sub(count.passed + count.failed);
    Ok(count)
}

#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn the_harness_output_is_counted() {
        let mut output = TestOutput::default();
        for text in [
            "running 4 tests",
            "test a ... ok",
            "test b ... FAILED",
            "---- c stdout ----",
            "SKIPPED: not root",
            "test result: FAILED. 2 passed; 1 failed; 1 ignored; 0 measured; 3 filtered out; finished in 0.10s",
            "test result: ok. 5 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s",
        ] {
            output.line(text);
        }
        assert_eq!(output.count(), Count { passed: 6, failed: 1, skipped: 2 });
    }

    #[test]
    fn a_skip_fails_only_where_everything_can_run() {
        let skipped = Count { passed: 3, failed: 0, skipped: 1 };
        assert!(!skipped.holds(true));
        assert!(skipped.holds(false));
        assert!(!Count { failed: 1, ..skipped }.holds(false));
    }
}
