//! A sparse volume of 64 TiB: created, copied for the first time, written here and there, its lone primary killed,
//! resynchronised. Memory stays small, and nobody writes the map as a whole: a first copy that did would leave 2 GiB.

use std::time::Instant;

use anyhow::{Result, ensure};

use super::{
    LONG, MEMORY_BOUND_BYTES, PATIENCE, Written, allocated_bytes, assert_equal, in_memory, judge_memory, step,
};
use crate::lab::nbd::Nbd;
use crate::lab::pair::{LIMIT, VOLUME};
use crate::lab::{Pair, Seed};

const VOLUME_BYTES: u64 = 64 << 40;
/// What metadata and a few thousand chunks of a resync may take on disk: each carries one written block. The whole map
/// alone would be 2 GiB.
const DISK_BOUND_BYTES: u64 = 1 << 30;
/// Of these the first copy finds some on the source.
const WRITES: u64 = 1000;

/// The round.
///
/// # Errors
/// With the bound that was passed.
pub fn run() -> Result<()> {
    in_memory(VOLUME_BYTES + (4 << 30), "64TiB", play)
}

fn play(pair: &mut Pair) -> Result<()> {
    let (mut seed, mut written) = (Seed::new(64), Written::default());
    step("create on both", || pair.create())?;
    judge_disk(pair, "created")?;
    pair.alpha.start_daemon()?;
    pair.alpha.must(&["activate"])?;
    pair.alpha.wait("role=primary", LIMIT)?;
    let mut nbd = Nbd::unix(&pair.alpha.nbd(), VOLUME, PATIENCE)?;
    ensure!(nbd.size_bytes() == VOLUME_BYTES, "the volume has {} bytes", nbd.size_bytes());
    written.scatter(&mut nbd, &mut seed, WRITES / 4, 32)?;
    pair.beta.start_daemon()?;
    step("first copy, its begin under writes", || {
        pair.alpha.wait_status("the first copy to begin", |status| {
            status["state"] == "mirrored" || status["volumes"][0]["resync"].is_object()
        })?;
        let longest = write_meanwhile(&mut nbd, &mut seed, &mut written)?;
        println!("  longest wait of a client's write in the first copy: {} ms", longest.as_millis());
        Ok(())
    })?;
    drop(nbd);
    step("first copy, after a crash in it", || {
        crash_in_copy(pair)?;
        pair.alpha.wait("mirrored", LONG)?;
        pair.beta.wait("mirrored", LONG)
    })?;
    judge_memory("after the first copy", &[&pair.alpha, &pair.beta], MEMORY_BOUND_BYTES)?;
    judge_disk(pair, "copied")?;
    equal(pair)?;
    let mut nbd = Nbd::unix(&pair.alpha.nbd(), VOLUME, PATIENCE)?;
    step("1,000 writes mirrored", || written.scatter(&mut nbd, &mut seed, WRITES, 32))?;
    pair.beta.kill()?;
    pair.alpha.wait("alone", LIMIT)?;
    step("1,000 writes alone", || written.scatter(&mut nbd, &mut seed, WRITES, 32))?;
    judge_memory("alone", &[&pair.alpha], MEMORY_BOUND_BYTES)?;
    drop(nbd);
    step("crash and start", || pair.alpha.crash_and_return())?;
    let recovered = pair.alpha.event("recovered")?;
    println!("  {}", recovered["text"].as_str().unwrap_or_default());
    written.verify(&mut Nbd::unix(&pair.alpha.nbd(), VOLUME, PATIENCE)?)?;
    pair.beta.boot(false)?;
    step("resync", || {
        pair.beta.start_daemon()?;
        pair.alpha.wait("mirrored", LONG)?;
        pair.beta.wait("mirrored", LONG)
    })?;
    let synced = pair.alpha.event("synced")?;
    println!("  {}", synced["text"].as_str().unwrap_or_default());
    judge_memory("after the resync", &[&pair.alpha, &pair.beta], MEMORY_BOUND_BYTES)?;
    judge_disk(pair, "resynchronised")?;
    written.verify(&mut Nbd::unix(&pair.alpha.nbd(), VOLUME, PATIENCE)?)?;
    equal(pair)?;
    pair.stop()
}

/// A client while ranges are zeroed: how long its slowest write waited.
fn write_meanwhile(nbd: &mut Nbd, seed: &mut Seed, written: &mut Written) -> Result<std::time::Duration> {
    let mut longest = std::time::Duration::ZERO;
    for _ in 0..200 {
        let start = Instant::now();
        written.scatter(nbd, seed, 1, 1)?;
        longest = longest.max(start.elapsed());
    }
    Ok(longest)
}

/// Stops the copy when some of it is durable and kills the source: it goes on there, not from the start.
fn crash_in_copy(pair: &mut Pair) -> Result<()> {
    let all = VOLUME_BYTES / 4096;
    pair.alpha.wait_status("a part of the copy is proven, or it ended", |status| {
        let left = status["volumes"][0]["resync"]["left_bytes"].as_u64();
        status["state"] == "mirrored" || left.is_some_and(|left| left / 4096 < all - all / 64)
    })?;
    pair.alpha.must(&["resync", "pause"])?;
    let before = pair.alpha.wait_status("the copy to stand still", |status| {
        status["state"] == "mirrored" || status["volumes"][0]["resync"]["pace"] == "paused"
    })?;
    ensure!(
        before["state"] != "mirrored",
        "the copy ended before it could be interrupted: it proves nothing"
    );
    pair.alpha.crash_and_return()?;
    let recovered = pair.alpha.event("recovered")?;
    let text = recovered["text"].as_str().unwrap_or_default();
    println!("  killed with {} blocks left; {text}", before["volumes"][0]["dirty_blocks"]);
    let left = text.split_whitespace().nth(1).and_then(|word| word.parse::<u64>().ok());
    let most = all - all / 128;
    ensure!(left.is_some_and(|left| left > 0 && left < most), "the copy begins anew: {text}");
    // The target was told of the pause, too, and lived.
    for server in [&pair.alpha, &pair.beta] {
        server.must(&["resync", "resume"])?;
    }
    Ok(())
}

fn equal(pair: &Pair) -> Result<()> {
    assert_equal(pair.alpha.disk().path(), pair.beta.disk().path(), VOLUME_BYTES)
}

fn judge_disk(pair: &Pair, when: &str) -> Result<()> {
    for server in [&pair.alpha, &pair.beta] {
        let bytes = allocated_bytes(server.disk().path())?;
        println!("  {when}, {}: {} KiB on disk", server.name(), bytes >> 10);
        ensure!(bytes < DISK_BOUND_BYTES, "{} wrote {} MiB: a whole map", server.name(), bytes >> 20);
    }
    Ok(())
}
