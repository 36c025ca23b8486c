//! Crash rounds: a lone primary is killed under random writes, as a process or with its power, restarted, resynchronised,
//! and both backings are compared whole. In some rounds the crash falls into a resync.

use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, ensure};

use super::PROGRAM;
use crate::lab::disk::Loss;
use crate::lab::history::{BLOCK_BYTES, Floor, History};
use crate::lab::pair::{LIMIT, VOLUME};
use crate::lab::writer::{Load, Shared, lock, verify_client};
use crate::lab::{DiskKind, Pair, PairOptions, Seed, wait};

/// What to do.
#[derive(Debug, Clone, Copy)]
pub struct Rounds {
    /// How many.
    pub rounds: u64,
    /// Which sequence of random choices.
    pub seed: u64,
    /// Alpha is a test build that acknowledges blocks of the activity log and does not write them.
    pub lose_log_writes: bool,
}

/// What the rounds did.
#[derive(Debug, Default)]
pub struct Tally {
    /// Alpha's processes killed.
    pub process_kills: u64,
    /// Alpha's power cut.
    pub power_cuts: u64,
    /// Either of them within a resync.
    pub in_resync: u64,
}

/// Rounds of a lone primary that dies under random writes.
///
/// # Errors
/// The first promise that was broken, with its round; or too few crashes within a resync.
pub fn rounds(options: &Rounds, tally: &mut Tally) -> Result<()> {
    let made = PairOptions {
        disks: [DiskKind::Faulty, DiskKind::Loop],
        tables: "[resync]\nmax_bytes_per_s = \"64MiB\"".to_owned(),
        ..PairOptions::default()
    };
    let mut pair = Pair::new(made)?;
    if options.lose_log_writes {
        pair.alpha.set_program(PROGRAM);
        pair.alpha.set_daemon_words(&["--lose-log-writes"]);
    }
    pair.start_mirrored()?;
    let blocks = pair.volume_bytes()? / BLOCK_BYTES as u64;
    let history: Shared = Arc::new(Mutex::new(History::new(options.seed, blocks)));
    let mut seed = Seed::new(options.seed);
    for round in 0..options.rounds {
        let done = one(&mut pair, &history, &mut seed, round, tally);
        if let Err(error) = done {
            eprintln!("{}", pair.report());
            return Err(error.context(format!("round {round}")));
        }
        println!("round {round} ok");
    }
    let wanted = options.rounds / 10;
    ensure!(
        tally.in_resync >= wanted,
        "only {} crashes fell into a resync, {wanted} wanted",
        tally.in_resync
    );
    Ok(())
}

/// One round: begins and ends mirrored with alpha primary.
fn one(pair: &mut Pair, history: &Shared, seed: &mut Seed, round: u64, tally: &mut Tally) -> Result<()> {
    let floor = lone_writes_and_crash(pair, history, seed, round, tally)?;
    verify_client(&pair.alpha.nbd(), VOLUME, history, floor).context("after the crash")?;
    pair.beta.boot(false)?;
    pair.beta.start_daemon()?;
    if round % 4 == 3 && crash_in_resync(pair, history, seed, round, tally)? {
        verify_client(&pair.alpha.nbd(), VOLUME, history, Floor::Flushed)
            .context("after the crash in a resync")?;
    }
    pair.wait_mirrored()?;
    pair.assert_equal()?;
    verify_client(&pair.alpha.nbd(), VOLUME, history, Floor::Flushed).map(drop)
}

/// Alpha alone under writes, killed in the middle, restarted.
fn lone_writes_and_crash(
    pair: &mut Pair,
    history: &Shared,
    seed: &mut Seed,
    round: u64,
    tally: &mut Tally,
) -> Result<Floor> {
    pair.beta.kill()?;
    pair.alpha.wait("alone", LIMIT)?;
    let load = Load { zero_once_in: 20, ..Load::everywhere(seed.bits(), &*lock(history)?) };
    let mut load = pair.alpha.client(history, load)?;
    load.wait_more(100 + seed.below(900), LIMIT)?;
    let floor = crash(pair, seed, round, tally)?;
    load.join()?;
    Ok(floor)
}

/// Kills alpha, every other time with its power, and starts it again.
fn crash(pair: &mut Pair, seed: &mut Seed, round: u64, tally: &mut Tally) -> Result<Floor> {
    let power = round % 2 == 1;
    let floor = if power {
        tally.power_cuts += 1;
        let loss = if seed.once_in(3) { Loss::Drop } else { Loss::Tear { seed: seed.bits() } };
        pair.alpha.power_cut(loss)?;
        Floor::Flushed
    } else {
        tally.process_kills += 1;
        pair.alpha.kill()?;
        Floor::Acknowledged
    };
    pair.alpha.boot(power)?;
    pair.alpha.start_daemon()?;
    pair.alpha.wait("role=primary", LIMIT)?;
    Ok(floor)
}

/// Kills alpha while it copies to beta under writes; false when the resync was too quick.
fn crash_in_resync(
    pair: &mut Pair,
    history: &Shared,
    seed: &mut Seed,
    round: u64,
    tally: &mut Tally,
) -> Result<bool> {
    let syncing = wait::until("a resync to begin", LIMIT, || {
        let status = pair.alpha.status()?;
        if status["state"] == "mirrored" {
            return Ok(Some(false));
        }
        Ok((status["state"] == "syncing" && !status["volumes"][0]["resync"].is_null()).then_some(true))
    })?;
    if !syncing {
        return Ok(false);
    }
    let load = Load { requests: Some(seed.below(200)), ..Load::everywhere(seed.bits(), &*lock(history)?) };
    let mut load = pair.alpha.client(history, load)?;
    let still = pair.alpha.status_word("/state")? == "syncing";
    crash(pair, seed, round / 4, tally)?;
    load.join()?;
    if still {
        tally.in_resync += 1;
    }
    Ok(true)
}
