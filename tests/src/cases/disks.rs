//! DISK: the copies themselves: failing disks, power cuts, discards, wrong disks.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::{Case, Stage, client, run_load, says, spoil, verify, write_some};
use crate::lab::disk::{Fault, Loss, Operation};
use crate::lab::history::{BLOCK_BYTES, Floor};
use crate::lab::pair::{LIMIT, VOLUME, disk_bytes, field};
use crate::lab::writer::{Load, Shared, lock};
use crate::lab::{DiskKind, Pair, PairOptions, Seed, wait};

pub(super) const CASES: &[Case] = &[
    Case {
        name: "DISK-1",
        sabotage: "the peer is dead before the disk fails, so nobody can serve",
        run: primarys_disk_fails,
        ends_mirrored: false,
        limit_s: 240,
    },
    Case {
        name: "DISK-2",
        sabotage: "no fault is put into the disk",
        run: secondarys_disk_fails,
        ends_mirrored: false,
        limit_s: 180,
    },
    Case {
        name: "DISK-4",
        sabotage: "both servers run a build of the product that does not flush the peer",
        run: flush_is_a_flush,
        ends_mirrored: true,
        limit_s: 900,
    },
    Case {
        name: "DISK-5",
        sabotage: "one discarded block of beta's copy is filled again behind its back",
        run: discard_and_zeroes,
        ends_mirrored: true,
        limit_s: 240,
    },
    Case {
        name: "DISK-6",
        sabotage: "the right disk is presented",
        run: wrong_disk,
        ends_mirrored: false,
        limit_s: 300,
    },
];

/// As NBD numbers it.
const EIO: u32 = 5;

fn faulty() -> PairOptions {
    PairOptions { disks: [DiskKind::Faulty, DiskKind::Faulty], ..PairOptions::default() }
}

fn primarys_disk_fails(stage: &mut Stage) -> Result<()> {
    let sabotage = stage.sabotage;
    for operation in [Operation::Write, Operation::Read] {
        let (pair, history) = stage.mirrored(faulty())?;
        write_some(&pair.alpha, &history, 101, 300)?;
        let load = client(&pair.alpha, &history, 102)?;
        load.wait_more(200, LIMIT)?;
        if sabotage {
            pair.beta.kill()?;
            pair.alpha.wait("alone", LIMIT)?;
        }
        pair.alpha.faulty()?.fail(Fault::all(operation))?;
        if operation == Operation::Read {
            // One bad block is healed; after 64 of them the copy is given up.
            verify(&pair.alpha, &history, Floor::Acknowledged)?;
        }
        load.wait_more(200, LIMIT)?;
        let finished = load.finish()?;
        ensure!(finished.broken.is_none() && finished.errors.is_empty(), "the client was hurt: {finished:?}");
        latched_and_served_by_the_peer(pair, operation)?;
        verify(&pair.alpha, &history, Floor::Acknowledged).context("served from the peer's copy")?;
        verify(&pair.beta, &history, Floor::Acknowledged).context("a client of the new primary")?;
        crate::lab::writer::verify_backing(pair.beta.disk().path(), &history, Floor::Acknowledged)
            .context("the peer's copy lacks what was acknowledged")?;
    }
    users_of_a_front(stage)?;
    nobody_left(stage)
}

/// A front whose device is used keeps its users: `attach` is refused until they are gone, then the disk comes back.
fn users_of_a_front(stage: &mut Stage) -> Result<()> {
    let (pair, history) = stage.mirrored(PairOptions { frontend: "fuse", ..faulty() })?;
    let device = crate::lab::filesystem::device_of(&pair.alpha)?.display().to_string();
    let out = pair.directory().join("user.log");
    let words = ["sh", "-c", "exec <$0; echo open; exec sleep 1000", &device].map(str::to_owned);
    pair.alpha.faulty()?.fail(Fault::all(Operation::Write))?;
    write_some(&pair.alpha, &history, 105, 50)?;
    pair.alpha.event("front")?;
    let user = pair.alpha.host()?.spawn(&words, &out, &out)?;
    wait::until("the device to be open", LIMIT, || {
        Ok(std::fs::read_to_string(&out)?.contains("open").then_some(()))
    })?;
    says(&pair.alpha.refused(&["attach", VOLUME], 1)?, &["in use", "sleep"])?;
    write_some(&pair.alpha, &history, 106, 50).context("after the refusal")?;
    pair.alpha.host()?.signal(user, rustix::process::Signal::KILL)?;
    pair.alpha.host()?.wait(user, LIMIT)?;
    pair.alpha.faulty()?.heal()?;
    pair.alpha.must(&["attach", VOLUME])?;
    pair.wait_mirrored()?;
    verify(&pair.beta, &history, Floor::Acknowledged)?;
    pair.alpha.must(&["promote"])?;
    crate::lab::filesystem::device_of(&pair.alpha).context("it has a device again")?;
    verify(&pair.alpha, &history, Floor::Acknowledged)
}

/// With the peer gone before, nobody can serve: the client is told so, and does not wait for ever.
fn nobody_left(stage: &mut Stage) -> Result<()> {
    let (pair, history) = stage.mirrored(faulty())?;
    pair.beta.kill()?;
    pair.alpha.wait("alone", LIMIT)?;
    write_some(&pair.alpha, &history, 103, 100)?;
    pair.alpha.faulty()?.fail(Fault::all(Operation::Write))?;
    let load = Load { requests: Some(200), ..Load::everywhere(104, &*lock(&history)?) };
    let finished = pair.alpha.client(&history, load)?.join()?;
    ensure!(finished.broken.is_none(), "the client's connection broke: {:?}", finished.broken);
    ensure!(finished.errors.contains(&EIO), "a dead disk answered {finished:?}");
    pair.alpha.event("disk-failed").map(drop)
}

/// The failed copy is latched, and the peer is primary now; alpha only forwards. Both say so, and why.
fn latched_and_served_by_the_peer(pair: &Pair, operation: Operation) -> Result<()> {
    let failed = pair.alpha.wait_status("its copy to be failed", |s| s["volumes"][0]["copy"] == "failed")?;
    ensure!(failed["role"] != "primary", "alpha is primary with a failed copy: {failed}");
    pair.beta.wait("role=primary", LIMIT)?;
    ensure!(pair.beta.status_word("/state")? == "alone", "beta does not serve alone");
    let events = pair.alpha.events_of("disk-failed")?;
    ensure!(events.len() == 1, "one failure is told {} times: {events:?}", events.len());
    ensure!(
        events[0]["errno"].is_u64() && (events[0]["offset_bytes"].is_u64() || operation == Operation::Read),
        "no errno and offset: {}",
        events[0]
    );
    says(field(&pair.alpha.event("front")?, "/text")?, &["served from the peer's copy"])?;
    pair.beta.event("disk-failed")?;
    says(field(&pair.beta.event("alone")?, "/reason")?, &["the primary's copy failed"])?;
    pair.alpha.refused(&["promote"], 1)?;
    pair.alpha.refused(&["promote", "--peer-is-down"], 1).context("a failed copy must not be promoted")?;
    Ok(())
}

fn secondarys_disk_fails(stage: &mut Stage) -> Result<()> {
    let sabotage = stage.sabotage;
    let (pair, history) = stage.mirrored(faulty())?;
    let load = client(&pair.alpha, &history, 111)?;
    load.wait_more(200, LIMIT)?;
    if !sabotage {
        pair.beta.faulty()?.fail(Fault::all(Operation::Write))?;
    }
    let limit = Duration::from_secs(if sabotage { 5 } else { 60 });
    wait::until("beta's copy to be failed", limit, || {
        Ok((pair.alpha.status_word("/volumes/0/peer_copy")? == "failed").then_some(()))
    })?;
    load.wait_more(200, LIMIT)?;
    let finished = load.finish()?;
    ensure!(finished.broken.is_none() && finished.errors.is_empty(), "the client was hurt: {finished:?}");
    ensure!(pair.alpha.status_word("/role")? == "primary", "alpha is not primary any more");
    pair.alpha.wait_status("marks of the writes", |status| status["volumes"][0]["dirty_blocks"] != 0)?;
    pair.beta.event("disk-failed")?;
    pair.beta.refused(&["promote"], 1)?;
    pair.beta.refused(&["promote", "--peer-is-down"], 1).context("a failed copy must not be promoted")?;
    verify(&pair.alpha, &history, Floor::Acknowledged)
}

/// How many power cuts; the acceptance asks for 50, 20 of them of both servers at once.
fn cuts() -> u64 {
    std::env::var("DUPLEX_DISK4_CUTS").ok().and_then(|text| text.parse().ok()).unwrap_or(50)
}

/// The product without its flush to the peer; `cargo xtask cases --sabotage` builds it.
pub(super) const WITHOUT_PEER_FLUSH: &str = "duplex-no-peer-flush";

fn flush_is_a_flush(stage: &mut Stage) -> Result<()> {
    let sabotage = stage.sabotage;
    let pair = stage.pair(PairOptions { volume_bytes: 32 << 20, ..faulty() })?;
    if sabotage {
        pair.alpha.set_program(WITHOUT_PEER_FLUSH);
        pair.beta.set_program(WITHOUT_PEER_FLUSH);
    }
    pair.start_mirrored()?;
    let history = super::history_of(pair)?;
    let mut seed = Seed::new(4);
    let mut written = 0;
    for cut in 0..cuts() {
        let load = Load { flush_once_in: 2, ..Load::everywhere(120 + cut, &*lock(&history)?) };
        let mut load = pair.alpha.client(&history, load)?;
        load.wait_more(400 + seed.below(200), LIMIT)?;
        let loss = match seed.below(3) {
            0 => Loss::Drop,
            1 => Loss::Keep,
            _ => Loss::Tear { seed: seed.bits() },
        };
        let loss = if sabotage { Loss::Drop } else { loss };
        let both = cut % 5 < 2;
        power_cut(pair, both, loss)?;
        written += load.acknowledged();
        let finished = load.join()?;
        ensure!(finished.broken.is_some() || !both, "the client outlived a cut of both");
        // Every write flushed before the cut is on each copy that was cut, whatever the other has.
        let floor = Floor::Flushed;
        for server in [&pair.alpha, &pair.beta] {
            let path = server.disk().path().to_owned();
            crate::lab::writer::verify_backing(&path, &history, floor)
                .with_context(|| format!("cut {cut} ({loss:?}, both: {both}): {}", server.name()))?;
        }
        bring_back(pair).with_context(|| format!("after cut {cut}"))?;
        verify(&pair.alpha, &history, floor)?;
        pair.assert_equal().with_context(|| format!("after cut {cut}"))?;
    }
    Stage::note(&format!("{} power cuts over {written} writes and flushes", cuts()));
    // 10,000 writes and as many flushes over 50 cuts.
    ensure!(written >= cuts() * 400, "only {written} writes and flushes");
    Ok(())
}

/// Cuts both at one instant, or alpha and then (so that its copy can be looked at) beta's daemon.
fn power_cut(pair: &mut Pair, both: bool, loss: Loss) -> Result<()> {
    pair.alpha.faulty()?.hold()?;
    if both {
        pair.beta.faulty()?.hold()?;
    }
    pair.alpha.after_hold(loss)?;
    if both { pair.beta.after_hold(loss) } else { pair.beta.power_cut(loss) }
}

/// Boots both with new boot ids; the pair must find together with alpha primary.
fn bring_back(pair: &mut Pair) -> Result<()> {
    for server in [&mut pair.alpha, &mut pair.beta] {
        server.boot(true)?;
        server.start_daemon()?;
    }
    pair.wait_mirrored()?;
    if pair.alpha.status_word("/role")? != "primary" {
        pair.beta.must(&["switchover"])?;
        pair.alpha.wait("role=primary", LIMIT)?;
    }
    Ok(())
}

fn discard_and_zeroes(stage: &mut Stage) -> Result<()> {
    let sabotage = stage.sabotage;
    let options = PairOptions { tables: "[resync]\nmax_bytes_per_s = \"16MiB\"".to_owned(), ..faulty() };
    let (pair, history) = stage.mirrored(options)?;
    let zeroing = |seed: u64, requests: u64| -> Result<Load> {
        let most = lock(&history)?.blocks();
        let plain = Load::everywhere(seed, &*lock(&history)?);
        Ok(Load { blocks: most.min(4096), zero_once_in: 3, requests: Some(requests), ..plain })
    };
    run_load(&pair.alpha, &history, zeroing(131, 1500)?)?; // mirrored
    verify(&pair.alpha, &history, Floor::Acknowledged)?;
    for server in [&pair.alpha, &pair.beta] {
        let counts = server.faulty()?.counts()?;
        ensure!(counts.zeroes > 0, "{} got no discard or write-zeroes: {counts:?}", server.name());
    }
    pair.beta.kill()?;
    pair.alpha.wait("alone", LIMIT)?;
    run_load(&pair.alpha, &history, zeroing(132, 1500)?)?; // alone
    pair.beta.boot(false)?;
    pair.beta.start_daemon()?;
    run_load(&pair.alpha, &history, zeroing(133, 1500)?)?; // during the resync
    pair.wait_mirrored()?;
    verify(&pair.alpha, &history, Floor::Acknowledged)?;
    holes_stay_holes(pair, &history)?;
    if sabotage {
        spoil(&pair.beta, 9)?;
    }
    Ok(())
}

/// A range discarded at the end takes no room on either platter.
fn holes_stay_holes(pair: &Pair, history: &Shared) -> Result<()> {
    use crate::lab::nbd::{Ask, Nbd};
    let length: u32 = 4 << 20;
    let blocks = u64::from(length) / BLOCK_BYTES as u64;
    let first = 4096;
    ensure!(lock(history)?.blocks() >= first + blocks, "the volume is too small for this check");
    let load = Load {
        first_block: first,
        blocks,
        requests: Some(blocks * 2),
        ..Load::everywhere(134, &*lock(history)?)
    };
    run_load(&pair.alpha, history, load)?;
    let mut nbd = Nbd::unix(&pair.alpha.nbd(), VOLUME, LIMIT)?;
    for block in first..first + blocks {
        let mut history = lock(history)?;
        let sequence = history.zero(block);
        history.acknowledge(block, sequence);
    }
    nbd.call(first * BLOCK_BYTES as u64, &Ask::Trim(length))?;
    nbd.flush()?;
    for server in [&pair.alpha, &pair.beta] {
        let platter = pair.directory().join(format!("{}.disk", server.name()));
        let file = std::fs::File::open(&platter)?;
        let begin = crate::lab::copies::DATA_BEGIN_BYTES + first * BLOCK_BYTES as u64;
        let data = rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(begin)).unwrap_or(u64::MAX);
        ensure!(
            data >= begin + u64::from(length),
            "{}: discarded bytes still take room from {data} on",
            server.name()
        );
    }
    Ok(())
}

/// What is done to beta's disk while beta is off.
type Damage = fn(&Path, &[u8]) -> Result<()>;

fn wrong_disk(stage: &mut Stage) -> Result<()> {
    let sabotage = stage.sabotage;
    let options = PairOptions { disks: [DiskKind::File, DiskKind::File], ..PairOptions::default() };
    let (other, _) = stage.mirrored(options.clone())?;
    other.stop()?;
    let foreign = std::fs::read(other.beta.disk().path())?;
    let damages: [(&str, Damage); 4] = [
        ("another pair's copy", |disk, foreign| Ok(std::fs::write(disk, foreign)?)),
        ("a shorter disk", |disk, _| {
            Ok(std::fs::File::options().write(true).open(disk)?.set_len(disk_bytes(64 << 20) / 2)?)
        }),
        ("a torn metadata area", |disk, _| scribble(disk, 2048)),
        ("a random metadata area", |disk, _| scribble(disk, 0)),
    ];
    let (pair, history) = stage.mirrored(options)?;
    write_some(&pair.alpha, &history, 141, 500)?;
    pair.beta.kill()?;
    let disk = pair.beta.disk().path().to_owned();
    let right = std::fs::read(&disk)?;
    for (name, damage) in damages {
        std::fs::write(&disk, &right)?;
        if !sabotage {
            damage(&disk, &foreign)?;
        }
        let before = std::fs::read(&disk)?;
        pair.beta.boot(false)?;
        pair.beta.spawn_daemon()?;
        let said = refusal(pair).with_context(|| name.to_owned())?;
        Stage::note(&format!("{name}: {}", said.lines().next().unwrap_or_default()));
        says(&said, &[VOLUME]).with_context(|| name.to_owned())?;
        pair.beta.kill()?;
        let after = std::fs::read(&disk)?;
        let begin = crate::lab::copies::DATA_BEGIN_BYTES as usize;
        ensure!(before.get(begin..) == after.get(begin..), "{name}: the data area was written to");
        ensure!(pair.alpha.status_word("/role")? == "primary", "{name}: alpha stopped serving");
    }
    Ok(())
}

/// Random bytes over the metadata area, from so far into each block on.
fn scribble(disk: &Path, from: usize) -> Result<()> {
    let mut seed = Seed::new(6);
    let mut bytes = std::fs::read(disk)?;
    for block in bytes[..crate::lab::copies::DATA_BEGIN_BYTES as usize].chunks_mut(BLOCK_BYTES) {
        block[from..].iter_mut().for_each(|byte| *byte = seed.bits() as u8);
    }
    Ok(std::fs::write(disk, bytes)?)
}

/// What beta says when it refuses: its daemon's last words, or the refusal in its status.
fn refusal(pair: &Pair) -> Result<String> {
    wait::until("a refusal", Duration::from_secs(15), || {
        if let Some(ended) = pair.beta.daemon_ended()? {
            ensure!(ended.code.is_some_and(|code| code != 0), "the daemon ended with {ended:?}");
            return Ok(Some(pair.beta.log_tail(5)));
        }
        let output = pair.beta.cli(&["status", "--json"])?;
        let status: serde_json::Value = serde_json::from_str(&output.stdout).unwrap_or_default();
        Ok((!status["refusal"].is_null()).then(|| format!("{VOLUME}: {}", status["refusal"])))
    })
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_acceptance_asks_for_fifty_cuts_with_twenty_of_both() {
        if std::env::var_os("DUPLEX_DISK4_CUTS").is_none() {
            assert!(super::cuts() >= 50);
        }
        assert!((0..50).filter(|cut| cut % 5 < 2).count() >= 20);
    }
}
