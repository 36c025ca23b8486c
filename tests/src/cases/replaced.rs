//! SWAP: a disk changed while the pair runs, and the old one put back in the middle of it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use super::{Case, Stage, client, says, sent_in_resync, verify};
use crate::lab::copies::DATA_BEGIN_BYTES;
use crate::lab::history::Floor;
use crate::lab::pair::{LIMIT, VOLUME, disk_bytes};
use crate::lab::{Pair, PairOptions, wait};

pub(super) const CASES: &[Case] = &[Case {
    name: "SWAP-1",
    sabotage: "the old disk is given the metadata of the new one, and passes for the half that was copied",
    run: swapped_and_put_back,
    ends_mirrored: true,
    limit_s: 240,
}];

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
