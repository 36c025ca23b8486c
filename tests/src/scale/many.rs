//! Sixty-four volumes in one pair: what they cost when nothing happens, and that every one of them survives a crash.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use super::{PATIENCE, Usage, Written, assert_equal, in_memory, judge_memory, step};
use crate::lab::nbd::Nbd;
use crate::lab::pair::{LIMIT, VOLUME, disk_bytes};
use crate::lab::writer::socket_in;
use crate::lab::{Pair, Seed, Server};

const VOLUMES: usize = 64;
const VOLUME_BYTES: u64 = 64 << 20;
/// Resident at most: 12 MiB a volume: buffers of its resync are 4 MiB, 16 MiB with blocks of 1 MiB.
const MEMORY_BYTES: u64 = VOLUMES as u64 * (12 << 20);
/// How long idle daemons are watched.
const IDLE: Duration = Duration::from_secs(4);
/// Threads of a daemon: one a volume, a few of the control plane, and the kernel's workers of each ring.
const THREADS_MOST: u64 = 64 * 12;

/// The round.
///
/// # Errors
/// With the bound that was passed.
pub fn run() -> Result<()> {
    in_memory(VOLUME_BYTES, "64MiB", play)
}

fn play(pair: &mut Pair) -> Result<()> {
    let names = add_volumes(pair)?;
    let mut verb = vec!["create"];
    verb.extend(names.iter().map(String::as_str));
    step("create 64 volumes on both", || {
        pair.alpha.must(&verb)?;
        pair.beta.must(&verb)
    })?;
    step("activate, first copies", || {
        pair.alpha.start_daemon()?;
        pair.beta.start_daemon()?;
        pair.alpha.must(&["activate"])?;
        pair.wait_mirrored()
    })?;
    judge_memory("mirrored", &[&pair.alpha, &pair.beta], MEMORY_BYTES)?;
    let (mut seed, mut written) = (Seed::new(3), Vec::new());
    written.resize_with(VOLUMES, Written::default);
    step("writes on each", || write(&pair.alpha, &names, &mut seed, &mut written))?;
    idle(pair)?;
    pair.beta.kill()?;
    pair.alpha.wait("alone", LIMIT)?;
    step("writes on each, alone", || write(&pair.alpha, &names, &mut seed, &mut written))?;
    step("crash and start", || pair.alpha.crash_and_return())?;
    pair.beta.boot(false)?;
    step("resync", || {
        pair.beta.start_daemon()?;
        pair.wait_mirrored()
    })?;
    judge_memory("after the resync", &[&pair.alpha, &pair.beta], MEMORY_BYTES)?;
    for (name, written) in names.iter().zip(&written) {
        written.verify(&mut open(&pair.alpha, name)?)?;
        let [a, b] = [&pair.alpha, &pair.beta].map(|server| backing(server, name));
        assert_equal(&a, &b, VOLUME_BYTES)?;
    }
    pair.stop()
}

fn backing(server: &Server, name: &str) -> std::path::PathBuf {
    if name == VOLUME {
        return server.disk().path().to_owned();
    }
    server.disk().path().with_file_name(format!("{}-{name}.disk", server.name()))
}

/// Sparse files and tables for all volumes but the first; the names of all.
fn add_volumes(pair: &Pair) -> Result<Vec<String>> {
    let mut names = vec![VOLUME.to_owned()];
    let mut tables = String::new();
    for number in 1..VOLUMES {
        let name = format!("v{number:02}");
        let [a, b] = [&pair.alpha, &pair.beta].map(|server| backing(server, &name));
        for path in [&a, &b] {
            std::fs::File::create(path)?.set_len(disk_bytes(VOLUME_BYTES))?;
        }
        writeln!(
            tables,
            "[volumes.{name}]\nbacking = {{ alpha = \"{}\", beta = \"{}\" }}\nfrontend = \"none\"\nsize = \"64MiB\"\nblock_bytes = {}\n",
            a.display(),
            b.display(),
            // Blocks of every size there is, in turn.
            4096 << (number % 9)
        )?;
        names.push(name);
    }
    for server in [&pair.alpha, &pair.beta] {
        let text = std::fs::read_to_string(server.config())?;
        std::fs::write(server.config(), format!("{text}\n{tables}"))?;
    }
    Ok(names)
}

fn open(server: &Server, name: &str) -> Result<Nbd> {
    Nbd::unix(&socket_in(&server.run_directory(), name), name, PATIENCE)
}

fn write(server: &Server, names: &[String], seed: &mut Seed, written: &mut [Written]) -> Result<()> {
    for (name, written) in names.iter().zip(written) {
        written.scatter(&mut open(server, name)?, seed, 8, 8)?;
    }
    Ok(())
}

/// What daemons without work take of a processor. The wait is what is measured.
fn idle(pair: &Pair) -> Result<()> {
    let servers = [&pair.alpha, &pair.beta];
    // The marks of the writes before settle first.
    std::thread::sleep(IDLE);
    let (before, start) = (servers.map(Usage::of), Instant::now());
    std::thread::sleep(IDLE);
    for (server, before) in servers.into_iter().zip(before) {
        let (before, after) = (before?, Usage::of(server)?);
        let share = (after.cpu - before.cpu).as_secs_f64() / start.elapsed().as_secs_f64() * 100.0;
        println!("  idle, {}: {share:.1} % of a processor, {} threads", server.name(), after.threads);
        ensure!(after.threads <= THREADS_MOST, "{} threads, {THREADS_MOST} are allowed", after.threads);
        ensure!(share < 50.0, "an idle daemon takes {share:.1} % of a processor");
    }
    Ok(())
}
