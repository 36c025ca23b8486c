//! The sweep over named boundaries.

use std::collections::BTreeSet;
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use super::PROGRAM;
use super::points::{self, Point};
use super::scene::Scene;
use crate::lab::disk::process::program;
use crate::lab::is_wrong_data;

/// Crashes at one point and drives the pair back. Gives the operator's verbs that were needed.
fn run(point: Point, how: Sweep) -> Result<Vec<String>> {
    let mut scene = Scene::new(point, how.seed, how.lie).context("the pair does not begin")?;
    let done = scene.lead().and_then(|()| scene.crash()).and_then(|floor| scene.recover(floor));
    if done.is_err() && !how.lie {
        eprintln!("--- {point}\n{}", scene.pair.report());
    }
    done
}

/// The program and this sweep know the same boundaries: none is left out.
fn check_names() -> Result<()> {
    let output = Command::new(program(PROGRAM)?).args(["daemon", "--crash-at", "help"]).output()?;
    let text = String::from_utf8(output.stdout)?;
    let theirs: BTreeSet<&str> = text.lines().filter_map(|line| line.split_whitespace().next()).collect();
    let ours: BTreeSet<&str> = points::all().iter().map(|point| point.boundary).collect();
    let left_out: Vec<_> = theirs.symmetric_difference(&ours).collect();
    ensure!(!theirs.is_empty() && left_out.is_empty(), "boundaries known to one side only: {left_out:?}");
    Ok(())
}

/// How to sweep.
#[derive(Debug, Clone, Copy)]
pub struct Sweep {
    /// Which sequence of random choices, for each point.
    pub seed: u64,
    /// So many points at a time.
    pub jobs: usize,
    /// The disks that lose their power answer flushes and do nothing: a sweep must notice.
    pub lie: bool,
}

/// How many points failed.
#[derive(Debug, Clone, Copy, Default)]
pub struct Failed {
    /// For any reason.
    pub all: usize,
    /// Because data was not what it must be.
    pub wrong_data: usize,
}

/// Sweeps these points; prints a line each.
///
/// # Errors
/// The program has boundaries that this sweep does not know, or the other way round.
pub fn sweep(chosen: &[Point], how: Sweep) -> Result<Failed> {
    check_names()?;
    let (next, failed) = (AtomicUsize::new(0), Mutex::new(Failed::default()));
    std::thread::scope(|scope| {
        for _ in 0..how.jobs.max(1) {
            scope.spawn(|| {
                while let Some(point) = chosen.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let start = Instant::now();
                    let done = run(*point, how);
                    let seconds = start.elapsed().as_secs_f64();
                    match done {
                        Ok(typed) if typed.is_empty() => println!("{point} ok {seconds:.1} s"),
                        Ok(typed) => println!("{point} ok {seconds:.1} s ({})", typed.join(", ")),
                        Err(error) => {
                            let (at, role, way) = (point.boundary, point.role.name(), point.how.name());
                            let seed = how.seed;
                            println!(
                                "{point} FAIL {error:#}; again: cargo xtask crash --at {at} --role {role} --how {way} --seed {seed}"
                            );
                            if let Ok(mut failed) = failed.lock() {
                                failed.all += 1;
                                failed.wrong_data += usize::from(is_wrong_data(&error));
                            }
                        }
                    }
                }
            });
        }
    });
    let failed = failed.into_inner().map_err(|_| anyhow::anyhow!("a sweep's thread panicked"))?;
    println!("{} crash points, {} failed, {} by their data", chosen.len(), failed.all, failed.wrong_data);
    Ok(failed)
}
