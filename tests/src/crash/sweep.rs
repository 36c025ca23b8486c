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

/// Crashes at one point and drives the pair back. Gives the operator's verbs that were needed.
fn run(point: Point, seed: u64) -> Result<Vec<String>> {
    let mut scene = Scene::new(point, seed).context("the pair does not begin")?;
    let done = scene.lead().and_then(|()| scene.crash()).and_then(|floor| scene.recover(floor));
    if done.is_err() {
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

/// Sweeps these points, `jobs` at a time; prints a line each. True if all held.
pub fn sweep(chosen: &[Point], seed: u64, jobs: usize) -> Result<bool> {
    check_names()?;
    let (next, failed) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..jobs.max(1) {
            scope.spawn(|| {
                while let Some(point) = chosen.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let start = Instant::now();
                    let done = run(*point, seed);
                    let seconds = start.elapsed().as_secs_f64();
                    match done {
                        Ok(typed) if typed.is_empty() => println!("{point} ok {seconds:.1} s"),
                        Ok(typed) => println!("{point} ok {seconds:.1} s ({})", typed.join(", ")),
                        Err(error) => {
                            let (at, role, how) = (point.boundary, point.role.name(), point.how.name());
                            println!(
                                "{point} FAIL {error:#}; again: cargo xtask crash --at {at} --role {role} --how {how} --seed {seed}"
                            );
                            if let Ok(mut failed) = failed.lock() {
                                failed.push(*point);
                            }
                        }
                    }
                }
            });
        }
    });
    let failed = failed.into_inner().map_err(|_| anyhow::anyhow!("a sweep's thread panicked"))?;
    println!("{} crash points, {} failed", chosen.len(), failed.len());
    Ok(failed.is_empty())
}
