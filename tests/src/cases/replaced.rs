//! SWAP: a disk changed while the pair runs, the old one put back in the middle of it, and a new one attached too early.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::fs::FlockOperation;

use super::{Case, Stage, client, says, sent_in_resync, verify, write_some};
use crate::lab::copies::DATA_BEGIN_BYTES;
use crate::lab::disk::{Fault, Operation};
use crate::lab::history::Floor;
use crate::lab::pair::{LIMIT, VOLUME, disk_bytes};
use crate::lab::{DiskKind, Pair, PairOptions, wait};

pub(super) const CASES: &[Case] = &[
    Case {
        name: "SWAP-1",
        sabotage: "the old disk is given the metadata of the new one, and passes for the half that was copied",
        run: swapped_and_put_back,
        ends_mirrored: true,
        limit_s: 240,
    },
    Case {
        name: "SWAP-2",
        sabotage: "the new disk is never made",
        run: attached_too_early,
        ends_mirrored: false,
        limit_s: 240,
    },
];

fn swapped_and_put_back(stage: &mut Stage) -> Result<()> {
    let sabotage = stage.sabotage;
    let (pair, history) = stage.mirrored(PairOptions::default())?;
    let load = client(&pair.alpha, &history, 131)?;
    load.wait_more(300, LIMIT)?;
    says(&pair.alpha.refused(&["attach", VOLUME], 1)?, &["detach"])?;

    let old = pair.beta.disk().path().to_owned();
    let new = new_disk(pair)?;
    pair.alpha.must(&["resync", "max-rate", "8MiB"])?;
    pair.beta.must(&["detach", VOLUME])?;
    pair.alpha.wait("alone", LIMIT)?;
    point(pair, &old, &new)?;
    pair.beta.must(&["create", VOLUME])?;
    pair.beta.must(&["attach", VOLUME])?;
    let half = pair.volume_bytes()? / 2;
    wait::until("half of the full copy", LIMIT, || {
        let status = pair.alpha.status()?;
        let resync = &status["volumes"][0]["resync"];
        let left = resync["left_bytes"].as_u64();
        Ok((resync["total_bytes"].as_u64() == Some(half * 2) && left.is_some_and(|l| l < half)).then_some(()))
    })?;

    // What was copied to the new disk is marked no more; the old one has none of it.
    pair.beta.must(&["detach", VOLUME])?;
    point(pair, &new, &old)?;
    if sabotage {
        copy_metadata(&new, &old)?;
    }
    pair.alpha.must(&["resync", "max-rate", "0"])?;
    pair.beta.must(&["attach", VOLUME])?;
    pair.wait_mirrored()?;
    load.wait_more(100, LIMIT)?;
    let finished = load.finish()?;
    ensure!(finished.broken.is_none() && finished.errors.is_empty(), "the client was hurt: {finished:?}");
    pair.assert_equal()?;
    let sent = sent_in_resync(&pair.alpha)?;
    Stage::note(&format!("the old disk was put back: {sent} bytes sent"));
    ensure!(sent >= half, "only {sent} bytes were copied to a disk that nobody knows");
    verify(&pair.alpha, &history, Floor::Acknowledged)
}

/// What the one disk's metadata says is said by the other one, too.
fn copy_metadata(from: &Path, to: &Path) -> Result<()> {
    let mut bytes = vec![0; usize::try_from(DATA_BEGIN_BYTES)?];
    File::open(from)?.read_exact_at(&mut bytes, 0)?;
    let to = File::options().write(true).open(to)?;
    to.write_all_at(&bytes, 0)?;
    Ok(to.sync_all()?)
}

/// A second disk for beta, as large as the first.
fn new_disk(pair: &Pair) -> Result<PathBuf> {
    let path = pair.beta.directory().join("second.img");
    File::create(&path)?.set_len(disk_bytes(pair.options.volume_bytes))?;
    Ok(path)
}

/// Beta's backing has another path from now on.
fn point(pair: &Pair, from: &Path, to: &Path) -> Result<()> {
    let quoted = |path: &Path| format!("\"{}\"", path.display());
    pair.beta.edit_config(&quoted(from), &quoted(to)).context("beta's backing")
}

/// A disk fails, and `attach` is typed before there is another: each refusal leaves a pair that finds together again.
fn attached_too_early(stage: &mut Stage) -> Result<()> {
    let sabotage = stage.sabotage;
    let disks = [DiskKind::File, DiskKind::Faulty];
    let (pair, history) = stage.mirrored(PairOptions { disks, ..PairOptions::default() })?;
    write_some(&pair.alpha, &history, 132, 300)?;
    let faulty = pair.beta.faulty()?;
    faulty.fail(Fault::all(Operation::Write))?;
    faulty.fail(Fault::all(Operation::Read))?;
    write_some(&pair.alpha, &history, 133, 50)?;
    pair.beta.event("disk-failed")?;

    // Another disk that is not there yet: the old one's thread goes on.
    let (old, new) = (pair.beta.disk().path().to_owned(), pair.beta.directory().join("second.img"));
    point(pair, &old, &new)?;
    says(&pair.beta.refused(&["attach", VOLUME], 1)?, &["no such file"])?;
    blink(pair).context("after a disk that was not there")?;
    // The same disk, which fails still: its thread ended for it.
    point(pair, &new, &old)?;
    pair.beta.refused(&["attach", VOLUME], 1)?;
    blink(pair).context("after a disk that cannot be read")?;
    point(pair, &old, &new)?;
    if !sabotage {
        new_disk(pair)?;
        pair.beta.refused(&["attach", VOLUME], 1).context("nobody did `create`")?;
        blink(pair).context("after a disk without metadata")?;
        pair.beta.must(&["create", VOLUME])?;
    }
    held_for_a_while(pair, &new)?;
    pair.wait_mirrored()?;
    write_some(&pair.alpha, &history, 134, 100)?;
    crate::lab::writer::verify_backing(&new, &history, Floor::Acknowledged).context("the new disk")?;
    verify(&pair.alpha, &history, Floor::Acknowledged)
}

/// Somebody holds the new disk for longer than the peer's patience: beta waits for it and is heard meanwhile.
fn held_for_a_while(pair: &Pair, new: &Path) -> Result<()> {
    let holder = File::options().write(true).open(new).context("the new disk")?;
    rustix::fs::fcntl_lock(&holder, FlockOperation::NonBlockingLockExclusive)?;
    let lost = pair.alpha.events_of("link-lost")?.len();
    let typed = pair.beta.events_of("command")?.len();
    pair.beta.spawn_cli(&["attach", VOLUME])?;
    wait::until("`attach` to begin", LIMIT, || {
        Ok((pair.beta.events_of("command")?.len() > typed).then_some(()))
    })?;
    says(&pair.beta.refused(&["attach", VOLUME], 1)?, &["under way"])?;
    // The main loop takes further commands; a silent peer would be lost three times over.
    let begin = std::time::Instant::now();
    wait::until("three seconds to pass", LIMIT, || {
        pair.beta.must(&["resync", "max-rate", "0"])?;
        Ok((begin.elapsed() > Duration::from_secs(3)).then_some(()))
    })?;
    ensure!(
        pair.alpha.events_of("link-lost")?.len() == lost,
        "the peer was lost while beta waited for a disk"
    );
    drop(holder);
    Ok(())
}

/// The link is lost for a moment. Then beta says that its copy is failed: facts are exchanged again.
fn blink(pair: &Pair) -> Result<()> {
    let lost = || pair.alpha.events_of("link-lost").map(|events| events.len());
    wait::until("the link to be up", LIMIT, || {
        Ok((pair.alpha.events_of("link-up")?.len() > lost()?).then_some(()))
    })?;
    let before = lost()?;
    pair.cut(0)?;
    wait::until("the link to be lost", LIMIT, || Ok((lost()? > before).then_some(())))?;
    pair.restore(0)?;
    let failed = |status: &serde_json::Value| status["volumes"][0]["peer_copy"] == "failed";
    pair.alpha.wait_status("beta to say what it has", failed).map(drop)
}
