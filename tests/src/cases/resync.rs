//! SFT3-R and RDR: bringing a copy up to date: interrupted, steered, by the difference, onto a new disk.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::{
    Case, Stage, cheap, differing, marked, number, run_load, says, sent_in_resync, spoil, stall, verify,
    write_some,
};
use crate::lab::history::{BLOCK_BYTES, Floor};
use crate::lab::pair::{LIMIT, VOLUME, field};
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
    let load = Load { blocks, requests: Some(blocks * 2), ..Load::everywhere(61, &*lock(history)?) };
    run_load(&pair.alpha, history, load)
}

fn resync_of(status: &Value) -> Option<(u64, u64)> {
    let resync = status["volumes"].get(0)?.get("resync")?;
    Some((resync["left_bytes"].as_u64()?, resync["total_bytes"].as_u64()?))
}

/// Waits until a resync that began with `whole` bytes has done so many percent of them, slower near its end, and nearly
/// still once there; gives the bytes left.
fn reach(pair: &Pair, whole: u64, percent: u64) -> Result<u64> {
    let goal = whole - whole * percent / 100;
    let mut cap = "";
    let left = wait::until(&format!("{percent} % of a resync"), LIMIT, || {
        let status = pair.alpha.status()?;
        let Some((left, total)) = resync_of(&status) else {
            ensure!(status["state"] != "mirrored", "the resync ended before {percent} %: {status}");
            return Ok(None);
        };
        if total > 0 && left <= goal {
            return Ok(Some(left));
        }
        let wanted = match left.saturating_sub(goal) {
            _ if percent < 90 => "4MiB",
            far if far > 2 << 20 => "4MiB",
            near if near > 512 << 10 => "2MiB",
            _ => "256KiB",
        };
        if total > 0 && wanted != cap {
            cap = wanted;
            pair.alpha.must(&["resync", "max-rate", cap])?;
        }
        Ok(None)
    })?;
    pair.alpha.must(&["resync", "max-rate", "16KiB"])?;
    Ok(left)
}

/// How a resync is interrupted.
#[derive(Debug, Clone, Copy)]
enum Break {
    Link,
    Target,
    Source,
}

impl Break {
    /// What may be marked again: a killed source marks the extent of 4 MiB of the hot blocks, and one beside it. The
    /// others keep their map as it is.
    const fn marks_again_bytes(self) -> u64 {
        match self {
            Break::Link | Break::Target => 0,
            Break::Source => 8 << 20,
        }
    }
}

/// At 1, 50 and 99 percent, each in turn. The suite makes the first round.
const ROUNDS: [[Break; 3]; 3] = [
    [Break::Link, Break::Target, Break::Source],
    [Break::Target, Break::Source, Break::Link],
    [Break::Source, Break::Link, Break::Target],
];

fn interrupted(stage: &mut Stage) -> Result<()> {
    let sabotage = stage.sabotage;
    let options = PairOptions { tables: SLOW.to_owned(), ..PairOptions::default() };
    let (pair, history) = stage.mirrored(options)?;
    let rounds = if super::short() { 1 } else { ROUNDS.len() };
    for breaks in &ROUNDS[..rounds] {
        fall_behind(pair, &history, 8192)?;
        pair.alpha.must(&["resync", "max-rate", "4MiB"])?;
        pair.beta.boot(false)?;
        pair.beta.start_daemon()?;
        let whole = pair.alpha.dirty_blocks()? * BLOCK_BYTES as u64;
        for (percent, how) in [1, 50, 99].into_iter().zip(breaks) {
            let left = reach(pair, whole, percent)?;
            ensure!(left > 0, "nothing was left to interrupt at {percent} %");
            target_is_inconsistent(pair)?;
            hot_blocks(pair, &history)?;
            proven(pair, left)?;
            let before = resyncs(pair)?.len();
            interrupt(pair, *how, sabotage)?;
            resumed(pair, before, left + how.marks_again_bytes())
                .with_context(|| format!("{how:?} lost at {percent} %"))?;
        }
        end_without_a_stall(pair, &history)?;
    }
    verify(&pair.alpha, &history, Floor::Acknowledged)
}

/// Writes to a few blocks while the resync runs.
fn hot_blocks(pair: &Pair, history: &Shared) -> Result<()> {
    let everywhere = Load::everywhere(62, &*lock(history)?);
    run_load(&pair.alpha, history, Load { depth: 4, blocks: 64, requests: Some(100), ..everywhere })
}

/// What was copied is flushed on both and marked no more.
fn proven(pair: &Pair, left_bytes: u64) -> Result<()> {
    let proven = |status: &Value| {
        status["volumes"][0]["dirty_blocks"].as_u64().is_some_and(|d| d * BLOCK_BYTES as u64 <= left_bytes)
    };
    pair.alpha.wait_status("what was copied to be proven", proven).map(drop)
}

/// Until the end, the target's copy counts as inconsistent.
fn target_is_inconsistent(pair: &Pair) -> Result<()> {
    let status = pair.beta.wait_status("its disk to be read", |s| s["volumes"][0]["copy"] != "unknown")?;
    let copy = &status["volumes"][0]["copy"];
    ensure!(copy == "inconsistent", "the target forgot that it is inconsistent: {}", status["volumes"][0]);
    Ok(())
}

/// Breaks the resync off and lets it begin again.
fn interrupt(pair: &mut Pair, how: Break, sabotage: bool) -> Result<()> {
    match how {
        Break::Link => {
            pair.cut(0)?;
            pair.alpha.wait("alone", LIMIT)?;
            pair.restore(0)?;
        }
        Break::Target => {
            pair.beta.kill()?;
            pair.alpha.wait("alone", LIMIT)?;
            if sabotage {
                spoil_clean_block(pair)?;
            }
            pair.beta.boot(false)?;
            pair.beta.start_daemon()?;
            target_is_inconsistent(pair)?;
        }
        Break::Source => {
            pair.alpha.kill()?;
            pair.beta
                .refused(&["promote", "--peer-is-down"], 1)
                .context("an inconsistent copy must not be promoted")?;
            pair.alpha.boot(false)?;
            pair.alpha.start_daemon()?;
        }
    }
    Ok(())
}

/// How alpha's resyncs began, oldest first.
fn resyncs(pair: &Pair) -> Result<Vec<Value>> {
    pair.alpha.events_of("sync-started")
}

/// The resync that follows begins with what was left, all of it proven: after 1 % not with everything again.
fn resumed(pair: &Pair, before: usize, most_bytes: u64) -> Result<()> {
    // By its event: the state is seen earlier than the event, and the event before it tells of another resync.
    let event = wait::until("the resync to go on", LIMIT, || {
        let started = resyncs(pair)?;
        Ok(started.get(before..).and_then(|new| new.last()).cloned())
    })?;
    let (mine, theirs) = (number(&event, "my_blocks")?, number(&event, "their_blocks")?);
    let marked = (mine + theirs) * BLOCK_BYTES as u64;
    Stage::note(&format!("{most_bytes} bytes at most, goes on with {mine} + {theirs} blocks marked"));
    ensure!(marked <= most_bytes, "began with {marked} bytes where {most_bytes} were left");
    Ok(())
}

/// The rest goes at full speed under writes to hot blocks, which must not keep it from ending.
fn end_without_a_stall(pair: &Pair, history: &Shared) -> Result<()> {
    let hot = Load { depth: 4, blocks: 64, ..Load::everywhere(63, &*lock(history)?) };
    let hot = pair.alpha.client(history, hot)?;
    let start = std::time::Instant::now();
    pair.alpha.must(&["resync", "max-rate", "0"])?;
    pair.wait_mirrored()?;
    stall("the last percent under hot writes", start.elapsed(), 3000)?;
    let finished = hot.finish()?;
    ensure!(finished.broken.is_none() && finished.errors.is_empty(), "the client was hurt: {finished:?}");
    pair.assert_equal()
}

/// Changes a block of the target that is equal by now: nobody has a reason to copy it again.
fn spoil_clean_block(pair: &Pair) -> Result<()> {
    let size = pair.volume_bytes()?;
    let (a, b) = (pair.alpha.copy(size)?, pair.beta.copy(size)?);
    // From the end: hot blocks are at the beginning, and copying begins there.
    for block in (64..8192).rev() {
        if a.block(block)? == b.block(block)? && a.block(block)?.iter().any(|byte| *byte != 0) {
            return spoil(&pair.beta, block);
        }
    }
    anyhow::bail!("no block was copied yet")
}

fn operator_control(stage: &mut Stage) -> Result<()> {
    let sabotage = stage.sabotage;
    let options = PairOptions { tables: SLOW.to_owned(), ..PairOptions::default() };
    let (pair, history) = stage.mirrored(options)?;
    fall_behind(pair, &history, 5120)?;
    pair.alpha.must(&["resync", "max-rate", "4MiB"])?;
    pair.beta.boot(false)?;
    pair.beta.start_daemon()?;
    pair.alpha.wait_status("a running resync", |status| resync_of(status).is_some_and(|(_, all)| all > 0))?;
    // A cap set live, twice.
    for (cap, bytes_per_s) in [("2MiB", 2 << 20), ("1MiB", 1 << 20)] {
        pair.alpha.must(&["resync", "max-rate", cap])?;
        capped(pair, bytes_per_s)?;
    }
    if sabotage {
        pair.alpha.must(&["resync", "max-rate", "0"])?;
    } else {
        pair.alpha.must(&["resync", "pause"])?;
    }
    let left = paused(pair)?;
    // Client writes go on while it stands still, and an interruption keeps every bit.
    write_some(&pair.alpha, &history, 63, 300)?;
    let (still, _) = resync_of(&pair.alpha.status()?).context("the paused resync is gone")?;
    ensure!(still >= left, "a paused resync went on: {left} bytes left before, {still} after");
    pair.beta.kill()?;
    pair.alpha.wait("alone", LIMIT)?;
    let differ = differing(pair, pair.volume_bytes()?)?;
    marked(&pair.alpha, differ.max(left.div_ceil(BLOCK_BYTES as u64)))
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
    commands_are_logged(pair)?;
    verify(&pair.alpha, &history, Floor::Acknowledged)
}

/// The page and the command line show how far, how fast and how long still; the rate keeps to the cap.
fn capped(pair: &Pair, bytes_per_s: u64) -> Result<()> {
    let begin = || resync_of(&pair.alpha.status()?).context("the resync ended under a cap");
    let (start, (before, _)) = (std::time::Instant::now(), begin()?);
    let status = pair.alpha.wait_status("progress with a rate", |status| {
        let resync = &status["volumes"][0]["resync"];
        let left = resync["left_bytes"].as_u64().unwrap_or(before);
        before.saturating_sub(left) >= bytes_per_s && resync["rate_bytes_per_s"].as_u64().unwrap_or(0) > 0
    })?;
    let resync = &status["volumes"][0]["resync"];
    let copied = before - number(resync, "left_bytes")?;
    let rate = (copied as f64 / start.elapsed().as_secs_f64()) as u64;
    Stage::note(&format!("capped at {bytes_per_s} bytes/s: {rate} bytes/s"));
    ensure!(rate <= 3 * bytes_per_s, "{rate} bytes/s under a cap of {bytes_per_s} bytes/s");
    for field in ["total_bytes", "left_bytes", "sent_bytes", "eta_s"] {
        ensure!(resync[field].is_u64(), "status shows no {field}: {resync}");
    }
    ensure!(resync["phase"] == "disk" && resync["role"] == "source", "status shows no order: {resync}");
    says(&pair.alpha.must(&["status"])?, &["%", "/s", "left"]).context("`duplex status` for people")
}

/// Waits until the page says that the resync stands still; gives the bytes left.
fn paused(pair: &Pair) -> Result<u64> {
    let status = pair.alpha.wait_status("a paused resync", |status| {
        status["state"] == "mirrored" || status["volumes"][0]["resync"]["pace"] == "paused"
    })?;
    ensure!(status["state"] != "mirrored", "the resync went on to its end instead of pausing");
    resync_of(&status).map(|(left, _)| left).context("no resync while paused")
}

/// Each command is told with its user, and its effect.
fn commands_are_logged(pair: &Pair) -> Result<()> {
    let commands = pair.alpha.events_of("command")?;
    let effects = pair.alpha.events_of("resync-command")?;
    for (command, effect) in [
        ("resync pause", "paused"),
        ("resync priority low", "low priority"),
        ("resync max-rate 1048576", "at most 1048576 bytes/s"),
        ("resync max-rate 0", "no cap"),
        ("resync resume", "goes on"),
    ] {
        let told = commands.iter().any(|event| event["command"] == *command && event["uid"] == 0);
        ensure!(told, "no event tells of `{command}` and who typed it: {commands:?}");
        let done = effects.iter().any(|event| event["text"].as_str().is_some_and(|t| t.contains(effect)));
        ensure!(done, "no event tells what `{command}` did: {effects:?}");
    }
    Ok(())
}

/// How long the secondary is away; the suite does not wait.
const AWAY: Duration = Duration::from_secs(60);

fn delta(stage: &mut Stage) -> Result<()> {
    let sabotage = stage.sabotage;
    let tables = "[resync]\nmax_bytes_per_s = \"64MiB\"".to_owned();
    let options = PairOptions { volume_bytes: 256 << 20, tables, ..PairOptions::default() };
    let (pair, history) = stage.mirrored(options)?;
    write_some(&pair.alpha, &history, 71, 2000)?;
    let blocks = lock(&history)?.blocks();
    let lost = std::time::Instant::now();
    pair.beta.kill()?;
    pair.alpha.wait("alone", LIMIT)?;
    let load = Load {
        first_block: blocks / 2,
        blocks: blocks / 100,
        requests: Some(blocks / 50),
        ..Load::everywhere(72, &*lock(&history)?)
    };
    run_load(&pair.alpha, &history, load)?;
    if !super::short() {
        // Being away so long is the case itself.
        std::thread::sleep(AWAY.saturating_sub(lost.elapsed()));
    }
    let differ = differing(pair, pair.volume_bytes()?)?;
    marked(&pair.alpha, differ)?;
    let sent = link_bytes(pair)?;
    pair.beta.boot(false)?;
    pair.beta.start_daemon()?;
    if sabotage {
        pair.wait_mirrored()?;
        pair.alpha.must(&["resync", "start", "--full", VOLUME, "--target", "beta"])?;
    }
    pair.wait_mirrored()?;
    let wire = link_bytes(pair)?.saturating_sub(sent);
    let started = pair.alpha.event("sync-started")?;
    let dirty = number(&started, "my_blocks")?;
    ensure!(dirty <= blocks / 50 + 2 * 1024, "{dirty} blocks dirty after writes to 1 % of {blocks}");
    cheap(&pair.alpha, differ)?;
    // The same by the link's own count, where marks, handshake and heartbeats come on top.
    let most = dirty * BLOCK_BYTES as u64 * 105 / 100 + (256 << 10);
    ensure!(wire <= most, "I5: {wire} bytes on the link for {dirty} blocks that differed");
    let took = resync_times(pair)?;
    let (first, last) = (took[0], *took.last().context("no resync")?);
    // The bytes are judged above; what they took on this machine is told.
    Stage::note(&format!(
        "{dirty} of {blocks} blocks dirty: {} ms and {wire} bytes on the link; the first copy took {} ms",
        last.as_millis(),
        first.as_millis()
    ));
    verify(&pair.alpha, &history, Floor::Acknowledged)
}

/// Bytes that alpha sent on the mirror link since its start.
fn link_bytes(pair: &Pair) -> Result<u64> {
    number(&pair.alpha.status()?["link"][0], "sent_bytes")
}

const DAY_MS: u64 = 24 * 3600 * 1000;

/// Milliseconds since midnight of a time like `2026-11-21T14:41:30.190Z`.
fn time_of_day_ms(time: &str) -> Result<u64> {
    let clock = time.split('T').nth(1).and_then(|rest| rest.strip_suffix('Z')).context("a time of UTC")?;
    let parts: Vec<u64> = clock.split([':', '.']).map(str::parse).collect::<Result<_, _>>()?;
    let [hours, minutes, seconds, milliseconds] = parts[..] else { anyhow::bail!("the time {time}") };
    Ok(((hours * 60 + minutes) * 60 + seconds) * 1000 + milliseconds)
}

/// From `sync-started` to `synced`, each resync of alpha.
fn resync_times(pair: &Pair) -> Result<Vec<Duration>> {
    let mut times = Vec::new();
    let mut began = None;
    for event in pair.alpha.events()? {
        let at = || time_of_day_ms(field(&event, "/time")?);
        match (field(&event, "/kind")?, began) {
            ("sync-started", _) => began = Some(at()?),
            ("synced", Some(from)) => {
                times.push(Duration::from_millis((at()? + DAY_MS - from) % DAY_MS));
                began = None;
            }
            _ => {}
        }
    }
    ensure!(!times.is_empty(), "no resync ended");
    Ok(times)
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
    let started = pair.alpha.event("sync-started")?;
    says(field(&started, "/reason")?, &["blank"])?;
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
    ensure!(pair.alpha.status_word("/role")? == "primary", "alpha stopped serving");
    verify(&pair.alpha, &history, Floor::Acknowledged)
}

/// The daemon refuses to start, or refuses the session; either way it says that the disk is another pair's.
fn refused_or_ended(pair: &Pair) -> Result<()> {
    wait::until("a refusal of the other pair's disk", Duration::from_secs(15), || {
        if let Some(ended) = pair.beta.daemon_ended()? {
            ensure!(ended.code.is_some_and(|code| code != 0), "the daemon ended with {ended:?}");
            return says(&pair.beta.log_tail(5), &["pair"]).map(Some);
        }
        let Ok(output) = pair.beta.cli(&["status", "--json"]) else { return Ok(None) };
        let status: Value = serde_json::from_str(&output.stdout).unwrap_or_default();
        let taken = status["state"] == "syncing" || status["state"] == "mirrored";
        ensure!(!taken, "the other pair's disk is taken: beta is {}", status["state"]);
        if status["refusal"].is_null() {
            return Ok(None);
        }
        Stage::note(&format!("the other pair's disk: {}", status["refusal"]));
        says(&status["refusal"].to_string(), &["pair"]).map(Some)
    })
}

/// Equal but for the records of the metadata area, where a refused daemon may note that it started.
fn same_data(a: &[u8], b: &[u8]) -> bool {
    let begin = crate::lab::copies::DATA_BEGIN_BYTES as usize;
    a.len() == b.len() && a.get(begin..) == b.get(begin..)
}
