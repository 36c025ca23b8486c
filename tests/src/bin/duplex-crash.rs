//! Crashes of the real program: at named boundaries, and in rounds under random writes.

use std::process::ExitCode;

use anyhow::{Result, ensure};
use clap::{Parser, ValueEnum};
use duplex_tests::crash::points::{self, How, Point, Role};
use duplex_tests::crash::rounds::{Rounds, Tally, rounds};
use duplex_tests::crash::sweep::{Sweep, sweep};
use duplex_tests::lab;

/// Rounds in which a lost activity log must be noticed.
const SABOTAGE_ROUNDS: u64 = 20;

#[derive(Debug, Parser)]
#[command(name = "duplex-crash", about = "Crashes of the real program")]
struct Cli {
    /// Rounds of a lone primary that dies under random writes
    #[arg(long, default_value_t = 20)]
    rounds: u64,
    /// Which sequence of random choices
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Crash at named boundaries instead: `all`, or names with commas between
    #[arg(long, value_name = "NAMES")]
    at: Option<String>,
    /// Of --at: in this role only
    #[arg(long, value_parser = role)]
    role: Option<Role>,
    /// Of --at: this way only
    #[arg(long)]
    how: Option<Way>,
    /// Of --at: at most so many points, spread evenly
    #[arg(long)]
    most: Option<usize>,
    /// Of --most: which of the points; another number takes others
    #[arg(long, default_value_t = 0)]
    offset: usize,
    /// Of --at: so many at a time
    #[arg(long, default_value_t = 2)]
    jobs: usize,
    /// Rounds with a primary that does not write its activity log; with --at: disks that lie about flushes.
    /// It must be found
    #[arg(long)]
    sabotage: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Way {
    /// The process kills itself
    Kill,
    /// The machine loses its power
    Power,
}

fn role(text: &str) -> Result<Role, String> {
    let names = || Role::ALL.map(Role::name).join(", ");
    Role::ALL.into_iter().find(|role| role.name() == text).ok_or_else(|| format!("there are {}", names()))
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Some(why) = lab::unavailable() {
        eprintln!("duplex-crash: {why}");
        return ExitCode::from(2);
    }
    let done = match &cli.at {
        Some(names) => chosen(&cli, names).and_then(|points| swept(&cli, &points)),
        None if cli.sabotage => Ok(sabotaged(&cli)),
        None => Ok(plain(&cli)),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("duplex-crash: {error:#}");
            ExitCode::from(2)
        }
    }
}

/// The points that were asked for; a name that is none is an error.
fn chosen(cli: &Cli, names: &str) -> Result<Vec<Point>> {
    let mut points = points::all();
    if names != "all" {
        for name in names.split(',') {
            ensure!(points.iter().any(|point| point.boundary == name), "there is no boundary {name:?}");
        }
        points.retain(|point| names.split(',').any(|name| name == point.boundary));
    }
    points.retain(|point| cli.role.is_none_or(|role| role == point.role));
    points.retain(|point| match cli.how {
        None => true,
        Some(Way::Kill) => point.how == How::Kill,
        Some(Way::Power) => point.how == How::Power,
    });
    ensure!(!points.is_empty(), "no point is left: {names} is never reached in this role");
    let Some(most) = cli.most else { return Ok(points) };
    println!("crash points of --offset {}", cli.offset);
    Ok(points::thin(&points, most, cli.offset))
}

fn swept(cli: &Cli, points: &[Point]) -> Result<bool> {
    let failed = sweep(points, Sweep { seed: cli.seed, jobs: cli.jobs, lie: cli.sabotage })?;
    if !cli.sabotage {
        return Ok(failed.all == 0);
    }
    // A pair that does not begin, or a time that ran out, finds no lie.
    let found = failed.wrong_data > 0;
    println!("disks that lie about flushes: {}", if found { "found" } else { "FAIL, not found" });
    Ok(found)
}

fn plain(cli: &Cli) -> bool {
    let mut tally = Tally::default();
    let done = rounds(&Rounds { rounds: cli.rounds, seed: cli.seed, lose_log_writes: false }, &mut tally);
    println!(
        "{} process kills, {} power cuts, {} of them in a resync",
        tally.process_kills, tally.power_cuts, tally.in_resync
    );
    match &done {
        Ok(()) => println!("{} rounds ok", cli.rounds),
        Err(error) => println!("FAIL seed {}: {error:#}", cli.seed),
    }
    done.is_ok()
}

/// A primary that forgets its log must be found out.
fn sabotaged(cli: &Cli) -> bool {
    let rounds = rounds(
        &Rounds { rounds: SABOTAGE_ROUNDS, seed: cli.seed, lose_log_writes: true },
        &mut Tally::default(),
    );
    match &rounds {
        Ok(()) => println!("FAIL {SABOTAGE_ROUNDS} rounds without an activity log found nothing"),
        Err(error) => println!("without an activity log, found: {error:#}"),
    }
    rounds.is_err_and(|error| lab::is_wrong_data(&error))
}
