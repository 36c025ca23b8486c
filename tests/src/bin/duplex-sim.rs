//! `duplex-sim`: both servers, the link, the disks and the clients in virtual time, by seed.

use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use clap::Parser;
use duplex_tests::sim::cover::{Cover, UNREACHABLE};
use duplex_tests::sim::finish::{Look, Outcome, run};
use duplex_tests::sim::mutant::Mutant;
use duplex_tests::sim::sweep::{Swept, crashes, thin};
use duplex_tests::sim::trap::Trap;

/// Seeds a mutant is given to be found in.
const MUTANT_SEEDS: u64 = 400;
/// Multi-seed runs shorter than this are not asked to reach everything.
const COVER_SEEDS: u64 = 1000;

/// Seeds of a sweep.
const SWEEP_SEEDS: u64 = 16;

#[derive(Debug, Parser)]
#[command(about = "The deterministic simulator of a mirrored pair")]
struct Args {
    /// Runs this many seeds, from --from
    #[arg(long, conflicts_with = "seed")]
    seeds: Option<u64>,
    /// First seed of --seeds
    #[arg(long, default_value_t = 1)]
    from: u64,
    /// Runs one seed and prints the hash of its trace
    #[arg(long)]
    seed: Option<u64>,
    /// Prints this many lines of the trace's end
    #[arg(long, default_value_t = 0)]
    trace: usize,
    /// Writes the history of one block to stderr, as VOLUME:BLOCK
    #[arg(long, value_parser = place)]
    watch: Option<(usize, u64)>,
    /// With a deliberate bug
    #[arg(long)]
    mutant: Option<Mutant>,
    /// Looks for every deliberate bug
    #[arg(long)]
    mutants: bool,
    /// Crashes at every boundary of every of --seeds [default: 16], one run each
    #[arg(long)]
    sweep: bool,
    /// About so many runs of --sweep, spread evenly
    #[arg(long)]
    runs: Option<usize>,
    /// Of --runs: which of the points; another number takes others
    #[arg(long, default_value_t = 0)]
    offset: usize,
    /// With --seed: crash there, as g4-durable@2:alpha:own:kill
    #[arg(long)]
    crash: Option<Trap>,
    /// Prints what was reached how often
    #[arg(long)]
    cover: bool,
}

fn place(text: &str) -> Result<(usize, u64), String> {
    let (volume, block) = text.split_once(':').ok_or("write VOLUME:BLOCK")?;
    let number = |error: std::num::ParseIntError| error.to_string();
    Ok((volume.parse().map_err(number)?, block.parse().map_err(number)?))
}

/// A panic of the core is a finding like any other.
fn guarded(seed: u64, mutant: Option<Mutant>, look: Look) -> Result<Outcome, String> {
    let caught = std::panic::catch_unwind(|| run(seed, mutant, look));
    caught.map_err(|cause| {
        let text = cause.downcast_ref::<String>().cloned();
        let text = text.or_else(|| cause.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        format!("panic: {}", text.unwrap_or_else(|| "unknown".to_owned()))
    })
}

fn broken(result: &Result<Outcome, String>) -> Option<String> {
    match result {
        Ok(outcome) => outcome.broken.clone(),
        Err(panic) => Some(panic.clone()),
    }
}

/// Runs the seeds on every processor; results come in any order.
fn over_seeds(
    from: u64,
    count: u64,
    mutant: Option<Mutant>,
    take: impl Fn(u64, Result<Outcome, String>) -> bool + Sync,
) {
    let next = AtomicU64::new(from);
    let stop = AtomicBool::new(false);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= from + count {
                        break;
                    }
                    if !take(seed, guarded(seed, mutant, Look::default())) {
                        stop.store(true, Ordering::Relaxed);
                    }
                }
            });
        }
    });
}

fn one(args: &Args, seed: u64) -> bool {
    let lines = (args.trace > 0).then_some(args.trace);
    let result = guarded(seed, args.mutant, Look { lines, watch: args.watch, crash: args.crash });
    let why = broken(&result);
    if let Ok(outcome) = &result {
        for line in &outcome.tail {
            println!("{line}");
        }
        let [reads, writes, flushes] = outcome.requests;
        let seconds = outcome.virtual_ns / 1_000_000_000;
        println!(
            "seed {seed}: {seconds} s, {} steps, {reads} reads, {writes} writes, {flushes} flushes",
            outcome.steps
        );
        println!("hash={:016x}", outcome.hash);
    }
    if let Some(why) = &why {
        println!("seed {seed} FAIL {why}");
    }
    why.is_none()
}

fn many(args: &Args, count: u64) -> bool {
    let found = std::sync::Mutex::new((Cover::default(), Vec::new(), 0_u64, [0_u64; 3]));
    over_seeds(args.from, count, args.mutant, |seed, result| {
        let mut found = found.lock().expect("nothing panics while it holds this");
        if let Some(why) = broken(&result) {
            println!("seed {seed} FAIL {why}");
            found.1.push(seed);
        }
        if let Ok(outcome) = &result {
            found.0.add(&outcome.cover);
            found.2 += outcome.steps;
            found.3.iter_mut().zip(outcome.requests).for_each(|(sum, n)| *sum += n);
        }
        found.1.len() < 20
    });
    let (cover, mut failed, steps, [reads, writes, flushes]) =
        found.into_inner().expect("nothing panics while it holds this");
    failed.sort_unstable();
    if args.cover {
        for (name, count) in cover.all() {
            println!("{count:>9} {name}");
        }
    }
    if let Some(seed) = failed.first() {
        println!("the end of seed {seed}:");
        if let Ok(outcome) = guarded(*seed, args.mutant, Look { lines: Some(60), ..Look::default() }) {
            outcome.tail.iter().for_each(|line| println!("{line}"));
        }
        println!("failed seeds: {failed:?}; the same again: cargo xtask sim --seed {seed} --trace 400");
    }
    let missing = cover.missing();
    let asked = count >= COVER_SEEDS && args.mutant.is_none();
    for name in &missing {
        println!("{} no seed reached: {name}", if asked { "FAIL" } else { "note:" });
    }
    println!(
        "{} kinds of thing cannot happen without a witness or a lie: {}",
        UNREACHABLE.len(),
        unreachable()
    );
    println!(
        "{count} seeds, {} failed, {steps} steps, {reads} reads, {writes} writes, {flushes} flushes",
        failed.len()
    );
    failed.is_empty() && (missing.is_empty() || !asked)
}

fn unreachable() -> String {
    UNREACHABLE.map(|(name, why)| format!("{name} ({why})")).join("; ")
}

fn mutants(args: &Args) -> bool {
    let mut caught = 0;
    for mutant in Mutant::ALL {
        let found = std::sync::Mutex::new(None::<(u64, String)>);
        over_seeds(args.from, MUTANT_SEEDS, Some(mutant), |seed, result| {
            let Some(why) = broken(&result) else { return true };
            let mut found = found.lock().expect("nothing panics while it holds this");
            found.get_or_insert((seed, why));
            false
        });
        match found.into_inner().expect("nothing panics while it holds this") {
            Some((seed, why)) => {
                caught += 1;
                println!("{} caught seed {seed}: {why}", mutant.name());
            }
            None => println!("{} survived", mutant.name()),
        }
    }
    println!("{caught} of {} mutants found", Mutant::ALL.len());
    caught == Mutant::ALL.len()
}

/// Runs `work` on every item, on every processor.
fn over<T: Sync>(items: &[T], work: impl Fn(&T) + Sync) {
    let next = AtomicUsize::new(0);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed)) {
                    work(item);
                }
            });
        }
    });
}

/// Crash points one by one.
fn sweep(args: &Args) -> bool {
    let seeds: Vec<u64> = (args.from..args.from + args.seeds.unwrap_or(SWEEP_SEEDS)).collect();
    let found = std::sync::Mutex::new((Vec::new(), Vec::new()));
    over(&seeds, |seed| {
        let plain = guarded(*seed, args.mutant, Look::default());
        let mut found = found.lock().expect("nothing panics while it holds this");
        if let Some(why) = broken(&plain) {
            found.1.push((*seed, why));
        }
        if let Ok(plain) = &plain {
            found.0.extend(crashes(plain).into_iter().map(|trap| (*seed, trap)));
        }
    });
    let (mut all, plainly_failed) = found.into_inner().expect("nothing panics while it holds this");
    all.sort_by_key(|(seed, trap)| (trap.boundary, trap.host, *seed, trap.times, trap.victim));
    let known = all.len();
    let chosen = match args.runs {
        Some(most) => {
            println!("crash points of --offset {}", args.offset);
            thin(all, most, args.offset)
        }
        None => all,
    };
    let swept = std::sync::Mutex::new(Swept::default());
    over(&chosen, |(seed, trap)| {
        let look = Look { crash: Some(*trap), ..Look::default() };
        let result = guarded(*seed, args.mutant, look);
        swept.lock().expect("nothing panics while it holds this").add(*seed, *trap, result);
    });
    let swept = swept.into_inner().expect("nothing panics while it holds this");
    swept.lines().iter().for_each(|line| println!("{line}"));
    for (seed, trap, why) in &swept.failed {
        println!(
            "FAIL seed {seed} {trap}: {why}; again: cargo xtask sim --seed {seed} --crash {trap} --trace 400"
        );
    }
    for (seed, why) in &plainly_failed {
        println!("FAIL seed {seed} without a crash: {why}; again: cargo xtask sim --seed {seed} --trace 400");
    }
    let missing = swept.missing();
    missing.iter().for_each(|place| println!("FAIL no crash at {place}"));
    let (done, failed) = (swept.crashes, swept.failed.len() + plainly_failed.len());
    println!("{done} of {known} crash points of {} seeds, {failed} failed", seeds.len());
    failed == 0 && missing.is_empty()
}

fn main() -> ExitCode {
    let args = Args::parse();
    let fine = if args.sweep {
        sweep(&args)
    } else if args.mutants {
        mutants(&args)
    } else if let Some(seed) = args.seed {
        one(&args, seed)
    } else {
        many(&args, args.seeds.unwrap_or(200))
    };
    if fine { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
