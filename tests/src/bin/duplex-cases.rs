//! Runs acceptance cases, one after the other: `NAME ok 1.9 s` · `NAME FAIL why` · `NAME missing` · `NAME hung why` ·
//! `NAME unable why`: a program is not there, or the case ended without a verdict.
//!
//! Each case runs in a process of its own, so that one that hangs is ended whole: its servers, disks, loop devices
//! and networks end with it, and what lies on disk is swept.

use std::io::Read;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Parser;
use duplex_tests::cases::{self, Case, Stage};
use duplex_tests::lab::system::NoProgram;
use duplex_tests::lab::{self, disk::process::program};

#[derive(Debug, Parser)]
#[command(name = "duplex-cases", about = "Runs the acceptance cases on real servers made of namespaces")]
struct Cli {
    /// Names as in the acceptance list; all when none is given
    names: Vec<String>,
    /// Break each case's subject: it must print FAIL
    #[arg(long)]
    sabotage: bool,
    /// Every case sabotaged; succeeds when every one prints FAIL
    #[arg(long)]
    sabotage_all: bool,
    /// Name the cases and what their sabotage does
    #[arg(long)]
    list: bool,
    /// Run this one here, in this process
    #[arg(long, hide = true)]
    one: Option<String>,
}

/// A case's process ends so when what it checked did not hold.
const FAILED: u8 = 1;
/// A case's process ends so when it could not be played.
const UNABLE: u8 = 3;

/// What became of a case.
enum Verdict {
    Ok(Duration),
    Fail(String),
    /// It ran longer than it may: nobody knows what it would have said.
    Hung(String),
    /// It could not be played.
    Unable(String),
    Missing,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let all = cases::all();
    if let Some(name) = &cli.one {
        return match all.iter().find(|case| case.name == name) {
            Some(case) => play(case, cli.sabotage),
            None => ExitCode::from(2),
        };
    }
    if cli.list {
        for case in &all {
            println!("{:10} --sabotage: {}", case.name, case.sabotage);
        }
        return ExitCode::SUCCESS;
    }
    if let Some(why) = lab::unavailable() {
        eprintln!("duplex-cases: {why}");
        return ExitCode::from(2);
    }
    let names = if cli.names.is_empty() {
        cases::WANTED.iter().chain(cases::CLIENTS).map(|name| (*name).to_owned()).collect()
    } else {
        cli.names
    };
    let sabotage = cli.sabotage || cli.sabotage_all;
    // Without them a sabotaged case would fail for the wrong reason.
    if let Some(error) =
        cases::SABOTAGE_PROGRAMS.iter().filter(|_| sabotage).find_map(|name| program(name).err())
    {
        eprintln!("duplex-cases: {error:#}; `cargo xtask cases --sabotage NAME` builds it");
        return ExitCode::from(2);
    }
    let mut as_wanted = true;
    for name in &names {
        let verdict = match all.iter().find(|case| case.name == name) {
            Some(case) => run(case, sabotage).unwrap_or_else(|error| Verdict::Unable(format!("{error:#}"))),
            None => Verdict::Missing,
        };
        match verdict {
            Verdict::Ok(took) => {
                println!("{name} ok {:.1} s", took.as_secs_f64());
                as_wanted &= !sabotage;
            }
            Verdict::Fail(why) => {
                println!("{name} FAIL {why}");
                as_wanted &= cli.sabotage_all;
            }
            // Sabotaged too, these prove nothing.
            Verdict::Hung(why) => {
                println!("{name} hung {why}");
                as_wanted = false;
            }
            Verdict::Unable(why) => {
                println!("{name} unable {why}");
                as_wanted = false;
            }
            Verdict::Missing => {
                println!("{name} missing");
                as_wanted = false;
            }
        }
    }
    if as_wanted { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Runs a case in a process of its own, bounded.
fn run(case: &Case, sabotage: bool) -> Result<Verdict> {
    let start = Instant::now();
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["--one", case.name]);
    if sabotage {
        command.arg("--sabotage");
    }
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).process_group(0).spawn()?;
    let mut said = child.stdout.take().context("no standard output")?;
    let reader = std::thread::spawn(move || {
        let mut text = String::new();
        said.read_to_string(&mut text).map(|_| text)
    });
    let limit = Duration::from_secs(case.limit_s);
    let ended = lab::wait::until("the case", limit, || Ok(child.try_wait()?));
    let Ok(status) = ended else {
        let group = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process_group(group, rustix::process::Signal::KILL)?;
        child.wait()?;
        lab::Space::new().context("sweeping after a case that hung")?;
        return Ok(Verdict::Hung(format!("ran longer than {} s", case.limit_s)));
    };
    let text = reader.join().map_err(|_| anyhow::anyhow!("the reader panicked"))??;
    let why = text.lines().next().map_or_else(|| format!("ended with {status}"), str::to_owned);
    Ok(match status.code() {
        Some(0) => Verdict::Ok(start.elapsed()),
        Some(code) if code == i32::from(FAILED) => Verdict::Fail(why),
        // A program that is not there, a panic, a signal.
        Some(_) | None => Verdict::Unable(why),
    })
}

/// The child's side: runs the case, prints why it failed in one line, and what a person needs to see on standard error.
fn play(case: &Case, sabotage: bool) -> ExitCode {
    // A runner that is ended takes its case along, and that its servers.
    if let Err(error) = rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))
    {
        eprintln!("duplex-cases: {error}");
    }
    let mut stage = Stage::new(sabotage);
    let played = stage.play(case);
    if let Err(error) = &played {
        println!("{}", format!("{error:#}").replace('\n', " | "));
        if !sabotage {
            eprintln!("{}", stage.report());
        }
    }
    let cleared = stage.clear();
    if let (Ok(()), Err(error)) = (&played, &cleared) {
        println!("the end: {}", format!("{error:#}").replace('\n', " | "));
    }
    match played.and(cleared) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.is::<NoProgram>() => ExitCode::from(UNABLE),
        Err(_) => ExitCode::from(FAILED),
    }
}
