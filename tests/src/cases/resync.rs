//! SFT3-R and RDR: bringing a copy up to date: interrupted, steered, by the difference, onto a new disk.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::{
    Case, Stage, cheap, differing, marked, run_load, says, sent_in_resync, spoil, verify, write_some,
};
use crate::lab::history::{BLOCK_BYTES, Floor};
use crate::lab::pair::{LIMIT, VOLUME};
use crate::lab::writer::{Load, Shared, lock};
use crate::lab::{DiskKind, Pair, PairOptions, wait};

pub(super) const CASES: &[Case] = &[
    Case {
        name: "SFT3-R3",
        sabotage: "a copied block of the target is changed between two interruptions",
        run: interrupted,
        ends_mirrored: true,
        limit_s: 300,
    },
    Case {
        name: "SFT3-R4",
        sabotage: "the pause is left out",
        run: operator_control,
        ends_mirrored: true,
        limit_s: 240,
    },
    Case {
        name: "RDR-1",
        sabotage: "everything is copied instead of the difference",
        run: delta,
        ends_mirrored: true,
        limit_s: 180,
    },
    Case {
        name: "RDR-2",
        sabotage: "the other pair's disk is wiped first, so that it is taken as a new one",
        run: new_disk,
        ends_mirrored: false,
        limit_s: 300,
    },
];

const SLOW: &str = "[resync]\nmax_bytes_per_s = \"8MiB\"";

/// Beta down, and so many blocks from the beginning of the volume written on alpha.
fn fall_behind(pair: &mut Pair, history: &Shared, blocks: u64) -> Result<()> {
    pair.beta.kill()?;
    pair.alpha.wait("alone", LIMIT)?;
    let load = Load { blocks, requests: Some(blocks * 3), ..Load::everywhere(61, &*lock(history)?) };
    run_load(&pair.alpha, history, load)
}

fn resync_of(status: &Value) -> Option<(u64, u64)> {
    let resync = status["volumes"].get(0)?.get("resync")?;
    Some((resync["left_bytes"].as_u64()?, resync["total_bytes"].as_u64()?))
}

/// Waits until the running resync has done so many percent; gives the bytes left.
fn reach(pair: &Pair, percent: u64) -> Result<u64> {
    wait::until(&format!("{percent} % of a resync"), LIMIT, || {
        let status = pair.alpha.status()?;
        let Some((left, total)) = resync_of(&status) else {
            ensure!(status["state"] != "mirrored", "the resync ended before {percent} %: {status}");
            return Ok(None);
        };
        Ok((total > 0 && (total - left) * 100 >= total * percent).then_some(left))
    })
}

fn interrupted(stage: &mut Stage) -> Result<()> {
    let sabotage = stage.sabotage;
    let options = PairOptions { tables: SLOW.to_owned(), ..PairOptions::default() };
    let (pair, history) = stage.mirrored(options)?;
    let blocks = 8192;
    fall_behind(pair, &history, blocks)?;
    let hot = Load {
        seed: 62,
        depth: 4,
        blocks: 64,
        requests: Some(200),
        ..Load::everywhere(62, &*lock(&history)?)
    };
    pair.beta.boot(false)?;
    pair.beta.start_daemon()?;
    // 1 %: the link goes. 50 %: the target dies. 99 %: the source dies.
    let mut left = reach(pair, 1)?;
    run_load(&pair.alpha, &history, hot.clone())?;
    pair.cut(0)?;
    pair.alpha.wait("alone", LIMIT)?;
    not_from_zero(pair, left, "link cut")?;
    pair.restore(0)?;
    left = reach(pair, 50)?.min(left);
    pair.beta.kill()?;
    pair.alpha.wait("alone", LIMIT)?;
    not_from_zero(pair, left, "target killed")?;
    if sabotage {
        spoil_clean_block(pair)?;
    }
    pair.beta.boot(false)?;
    pair.beta.start_daemon()?;
    let read =
        pair.beta.wait_status("its disk to be read", |status| status["volumes"][0]["copy"] != "unknown")?;
    ensure!(
        read["volumes"][0]["copy"] == "inconsistent",
        "the target forgot that it is inconsistent: {}",
        read["volumes"][0]
    );
    run_load(&pair.alpha, &history, hot)?;
    // Slower near the end, or it is over between two looks.
    pair.alpha.must(&["resync", "max-rate", "512KiB"])?;
    left = reach(pair, 90)?;
    pair.alpha.kill()?;
    pair.beta
        .refused(&["promote", "--peer-is-down"], 1)
        .context("an inconsistent copy must not be promoted")?;
    pair.alpha.boot(false)?;
    pair.alpha.start_daemon()?;
    Stage::note(&format!("source killed with {left} bytes left"));
    pair.wait_mirrored()?;
    verify(&pair.alpha, &history, Floor::Acknowledged)
}

/// Changes a block of the target that is equal by now: nobody has a reason to copy it again.
fn spoil_clean_block(pair: &Pair) -> Result<()> {
    let size = pair.volume_bytes()?;
    let (a, b) = (pair.alpha.copy(size)?, pair.beta.copy(size)?);
    for block in 0..8192 {
        if a.block(block)? == b.block(block)? && a.block(block)?.iter().any(|byte| *byte != 0) {
            return spoil(&pair.beta, block);
        }
    }
    anyhow::bail!("no block was copied yet")
}

/// After an interruption the dirty log holds what was left, not everything. Marks in flight cover some more.
fn not_from_zero(pair: &Pair, left_bytes: u64, what: &str) -> Result<()> {
    let dirty = pair.alpha.dirty_blocks()? * BLOCK_BYTES as u64;
    Stage::note(&format!("{what}: {left_bytes} bytes were left, {dirty} are marked"));
    ensure!(dirty <= left_bytes + (16 << 20), "{what}: {dirty} bytes marked where {left_bytes} were left");
    Ok(())
}

fn operator_control(stage: &mut Stage) -> Result<()> {
    let sabotage = stage.sabotage;
    let options = PairOptions { tables: SLOW.to_owned(), ..PairOptions::default() };
    let (pair, history) = stage.mirrored(options)?;
    fall_behind(pair, &history, 8192)?;
    pair.beta.boot(false)?;
    pair.beta.start_daemon()?;
    reach(pair, 1)?;
    if !sabotage {
        pair.alpha.must(&["resync", "pause"])?;
    }
    let paused = pair.alpha.wait_status("a paused resync", |status| {
        status["volumes"][0]["resync"]["pace"].as_str().is_some_and(|pace| pace.contains("pause"))
    })?;
    let (left, _) = resync_of(&paused).context("no resync while paused")?;
    for field in ["total_bytes", "left_bytes", "sent_bytes", "rate_bytes_per_s"] {
        ensure!(paused["volumes"][0]["resync"][field].is_u64(), "status shows no {field}");
    }
    // Client writes go on while it stands still, and an interruption keeps every bit.
    write_some(&pair.alpha, &history, 63, 300)?;
    let (still, _) = resync_of(&pair.alpha.status()?).context("the paused resync is gone")?;
    ensure!(still >= left, "a paused resync went on: {left} bytes left before, {still} after");
    pair.beta.kill()?;
    pair.alpha.wait("alone", LIMIT)?;
    marked(&pair.alpha, left.div_ceil(BLOCK_BYTES as u64))
        .with_context(|| format!("the interruption lost bits of {left} bytes"))?;
    pair.beta.boot(false)?;
    pair.beta.start_daemon()?;
    for priority in ["low", "high", "normal"] {
        pair.alpha.must(&["resync", "priority", priority])?;
    }
    says(&pair.alpha.refused(&["resync", "priority", "highest"], 2)?, &["low"])?;
    pair.alpha.must(&["resync", "resume"])?;
    pair.alpha.must(&["resync", "max-rate", "0"])?;
    pair.wait_mirrored()?;
    verify(&pair.alpha, &history, Floor::Acknowledged)
}

fn delta(stage: &mut Stage) -> Result<()> {
    let sabotage = stage.sabotage;
    let (pair, history) =
        stage.mirrored(PairOptions { volume_bytes: 256 << 20, ..PairOptions::default() })?;
    write_some(&pair.alpha, &history, 71, 2000)?;
    let blocks = lock(&history)?.blocks();
    pair.beta.kill()?;
    pair.alpha.wait("alone", LIMIT)?;
    let load = Load {
        first_block: blocks / 2,
        blocks: blocks / 100,
        requests: Some(blocks / 50),
        ..Load::everywhere(72, &*lock(&history)?)
    };
    run_load(&pair.alpha, &history, load)?;
    let dirty = marked(&pair.alpha, differing(pair, pair.volume_bytes()?)?)?;
    let start = std::time::Instant::now();
    pair.beta.boot(false)?;
    pair.beta.start_daemon()?;
    pair.wait_mirrored()?;
    Stage::note(&format!(
        "{dirty} of {blocks} blocks dirty; mirrored again {} ms after",
        start.elapsed().as_millis()
    ));
    if sabotage {
        pair.alpha.must(&["resync", "start", "--full", VOLUME, "--target", "beta"])?;
        pair.wait_mirrored()?;
    }
    ensure!(dirty <= blocks / 50 + 2 * 1024, "{dirty} blocks dirty after writes to 1 % of {blocks}");
    cheap(&pair.alpha, dirty)?;
    verify(&pair.alpha, &history, Floor::Acknowledged)
}

fn new_disk(stage: &mut Stage) -> Result<()> {
    let sabotage = stage.sabotage;
    let options = PairOptions { disks: [DiskKind::File, DiskKind::File], ..PairOptions::default() };
    // A disk with another pair's copy.
    let (other, _) = stage.mirrored(options.clone())?;
    other.stop()?;
    let foreign = std::fs::read(other.beta.disk().path())?;

    let (pair, history) = stage.mirrored(options)?;
    write_some(&pair.alpha, &history, 81, 1000)?;
    let size = pair.volume_bytes()?;
    // A blank replacement gets everything.
    pair.beta.kill()?;
    let disk = pair.beta.disk().path().to_owned();
    let bytes = std::fs::metadata(&disk)?.len();
    std::fs::File::create(&disk)?.set_len(bytes)?;
    pair.beta.boot(false)?;
    pair.beta.must(&["create", VOLUME])?;
    pair.beta.start_daemon()?;
    pair.wait_mirrored()?;
    pair.assert_equal()?;
    verify(&pair.alpha, &history, Floor::Acknowledged)?;
    let written = lock(&history)?.touched().len() as u64 * BLOCK_BYTES as u64;
    let sent = sent_in_resync(&pair.alpha)?;
    Stage::note(&format!("full copy of {size} bytes with {written} written: {sent} payload bytes"));
    // The other pair's disk is refused, and stays as it was.
    pair.beta.kill()?;
    std::fs::write(&disk, &foreign)?;
    if sabotage {
        std::fs::File::create(&disk)?.set_len(bytes)?;
        pair.beta.boot(false)?;
        pair.beta.must(&["create", VOLUME])?;
    } else {
        pair.beta.boot(false)?;
        pair.beta.refused(&["create", VOLUME], 1).context("create over another pair's copy")?;
    }
    pair.beta.spawn_daemon()?;
    refused_or_ended(pair)?;
    pair.beta.kill()?;
    ensure!(same_data(&std::fs::read(&disk)?, &foreign), "the other pair's disk was changed");
    Ok(())
}

/// The daemon refuses to start, or refuses the session; either way it says so.
fn refused_or_ended(pair: &Pair) -> Result<()> {
    wait::until("a refusal of the other pair's disk", Duration::from_secs(15), || {
        if let Some(ended) = pair.beta.daemon_ended()? {
            ensure!(ended.code.is_some_and(|code| code != 0), "the daemon ended with {ended:?}");
            return Ok(Some(()));
        }
        let Ok(output) = pair.beta.cli(&["status", "--json"]) else { return Ok(None) };
        let status: Value = serde_json::from_str(&output.stdout).unwrap_or_default();
        Ok((!status["refusal"].is_null()).then_some(()))
    })
}

/// Equal but for the records of the metadata area, where a refused daemon may note that it started.
fn same_data(a: &[u8], b: &[u8]) -> bool {
    let begin = crate::lab::copies::DATA_BEGIN_BYTES as usize;
    a.len() == b.len() && a.get(begin..) == b.get(begin..)
}
