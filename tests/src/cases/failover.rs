//! SFT3-S: a server or the link fails, and comes back.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::{Case, Stage, cheap, client, differing, marked, number, spoil, stall, verify, write_some};
use crate::lab::history::Floor;
use crate::lab::pair::LIMIT;
use crate::lab::writer::{Finished, Load, Shared, lock};
use crate::lab::{Pair, PairOptions, wait};

/// `silent_ms` by default, and what a stall may take beyond it.
const STALL_MS: u64 = 800 + 300;

pub(super) const CASES: &[Case] = &[
    Case {
        name: "SFT3-S1d",
        sabotage: "a block of the returned server's copy is changed after the resync",
        run: repaired_node,
        ends_mirrored: true,
        limit_s: 240,
    },
    Case {
        name: "SFT3-S2",
        sabotage: "the secondary is not killed",
        run: secondary_dies,
        ends_mirrored: false,
        limit_s: 180,
    },
    Case {
        name: "SFT3-S2b",
        sabotage: "an acknowledged block of the primary is wiped while it is off",
        run: alone_and_killed,
        ends_mirrored: true,
        limit_s: 240,
    },
    Case {
        name: "SFT3-S3b",
        sabotage: "the cable stays unplugged",
        run: link_repaired,
        ends_mirrored: true,
        limit_s: 180,
    },
    Case {
        name: "SFT3-S3c",
        sabotage: "both paths are cut",
        run: backup_link,
        ends_mirrored: true,
        limit_s: 180,
    },
];

/// A client that must have seen no error and no broken connection.
fn unharmed(finished: &Finished) -> Result<()> {
    ensure!(finished.broken.is_none(), "the client's connection broke: {:?}", finished.broken);
    ensure!(finished.errors.is_empty(), "the client got errors: {:?}", finished.errors);
    Ok(())
}

fn repaired_node(stage: &mut Stage) -> Result<()> {
    let sabotage = stage.sabotage;
    let (pair, history) = stage.mirrored(PairOptions::default())?;
    let size = pair.volume_bytes()?;
    // An eighth of the volume: what was in flight at the crash is marked by whole extents.
    let blocks = lock(&history)?.blocks() / 8;
    let load = Load { blocks, ..Load::everywhere(11, &*lock(&history)?) };
    let mut load = pair.alpha.client(&history, load)?;
    load.wait_more(500, LIMIT)?;
    pair.alpha.kill()?;
    let finished = load.join()?;
    ensure!(finished.broken.is_some(), "the client did not notice that its server died");
    pair.beta.wait("joining", LIMIT)?;
    pair.beta.must(&["promote", "--peer-is-down"])?;
    pair.beta.wait("role=primary", LIMIT)?;
    verify(&pair.beta, &history, Floor::Acknowledged)?;
    write_some(&pair.beta, &history, 12, 200)?;
    let differ = differing(pair, size)?;
    pair.alpha.boot(false)?;
    pair.alpha.start_daemon()?;
    pair.wait_mirrored()?;
    ensure!(pair.alpha.status_word("/role")? == "secondary", "the returned server took its role back");
    ensure!(pair.beta.status_word("/role")? == "primary", "beta lost its role");
    // Marks of writes in flight at the crash cover whole extents, so more is sent than differs.
    let recovered = number(&pair.alpha.event("recovered")?, "dirty_blocks")?;
    Stage::note(&format!("{differ} blocks differed, {recovered} were marked on alpha"));
    ensure!(recovered <= blocks, "{recovered} blocks marked after writes to {blocks}");
    cheap(&pair.beta, differ)?;
    verify(&pair.beta, &history, Floor::Acknowledged)?;
    if sabotage {
        spoil(&pair.alpha, 3)?;
    }
    Ok(())
}

fn secondary_dies(stage: &mut Stage) -> Result<()> {
    let sabotage = stage.sabotage;
    let (pair, history) = stage.mirrored(PairOptions::default())?;
    let load = client(&pair.alpha, &history, 21)?;
    load.wait_more(300, LIMIT)?;
    if !sabotage {
        pair.beta.kill()?;
    }
    pair.alpha.wait("alone", Duration::from_secs(if sabotage { 5 } else { 60 }))?;
    load.wait_more(300, LIMIT)?;
    let finished = load.finish()?;
    unharmed(&finished)?;
    ensure!(pair.alpha.status_word("/role")? == "primary", "alpha is not primary any more");
    ensure!(pair.alpha.status_word("/state")? == "alone", "alpha is not alone");
    stall("the longest answer over the loss of the secondary", finished.longest, STALL_MS)?;
    let event = pair.alpha.event("alone")?;
    ensure!(event["peer_state"].is_null() || event["peer_state"].is_string(), "{event}");
    let touched = lock(&history)?.touched().len() as u64;
    let dirty =
        pair.alpha.wait_status("marks of the writes", |status| status["volumes"][0]["dirty_blocks"] != 0)?;
    Stage::note(&format!("{} dirty blocks of {touched} ever written", dirty["volumes"][0]["dirty_blocks"]));
    verify(&pair.alpha, &history, Floor::Acknowledged)
}

fn alone_and_killed(stage: &mut Stage) -> Result<()> {
    let sabotage = stage.sabotage;
    let (pair, history) = stage.mirrored(PairOptions::default())?;
    pair.beta.kill()?;
    pair.alpha.wait("alone", LIMIT)?;
    let mut load = client(&pair.alpha, &history, 31)?;
    load.wait_more(400, LIMIT)?;
    pair.alpha.kill()?;
    load.join()?;
    if sabotage {
        wipe_acknowledged(pair, &history)?;
    }
    pair.alpha.boot(false)?;
    pair.alpha.start_daemon()?;
    pair.alpha.wait("role=primary", LIMIT)?;
    pair.alpha.event("recovered")?;
    marked(&pair.alpha, 1).context("the dirty log was lost")?;
    verify(&pair.alpha, &history, Floor::Acknowledged)?;
    pair.beta.boot(false)?;
    pair.beta.start_daemon()?;
    pair.wait_mirrored()?;
    verify(&pair.alpha, &history, Floor::Acknowledged)
}

/// Zeroes a block that a client was promised.
fn wipe_acknowledged(pair: &Pair, history: &Shared) -> Result<()> {
    let history = lock(history)?;
    let block = history.touched().into_iter().find(|block| history.promised(*block) > 0);
    let block = block.context("nothing was written")?;
    drop(history);
    spoil(&pair.alpha, block)
}

fn link_repaired(stage: &mut Stage) -> Result<()> {
    let sabotage = stage.sabotage;
    let (pair, history) = stage.mirrored(PairOptions::default())?;
    let size = pair.volume_bytes()?;
    let load = client(&pair.alpha, &history, 41)?;
    load.wait_more(200, LIMIT)?;
    pair.cut(0)?;
    pair.alpha.wait("alone", LIMIT)?;
    load.wait_more(200, LIMIT)?;
    let finished = load.finish()?;
    unharmed(&finished)?;
    stall("the longest answer over the loss of the link", finished.longest, STALL_MS)?;
    pair.beta.wait("joining", LIMIT)?;
    ensure!(pair.beta.status_word("/role")? != "primary", "the secondary took over without a word");
    pair.alpha.event("link-lost")?;
    let differ = differing(pair, size)?;
    marked(&pair.alpha, differ)?;
    if !sabotage {
        pair.restore(0)?;
    }
    pair.beta.wait("mirrored", Duration::from_secs(if sabotage { 5 } else { 60 }))?;
    pair.wait_mirrored()?;
    cheap(&pair.alpha, differ)?;
    ensure!(pair.beta.status_word("/role")? == "secondary", "beta is not secondary");
    verify(&pair.alpha, &history, Floor::Acknowledged)
}

fn backup_link(stage: &mut Stage) -> Result<()> {
    let sabotage = stage.sabotage;
    let (pair, history) = stage.mirrored(PairOptions { paths: 2, ..PairOptions::default() })?;
    let load = client(&pair.alpha, &history, 51)?;
    load.wait_more(300, LIMIT)?;
    pair.cut(0)?;
    if sabotage {
        pair.cut(1)?;
    }
    load.wait_more(300, LIMIT)?;
    wait::until("path 0 down and path 1 up", LIMIT, || {
        let status = pair.alpha.status()?;
        ensure!(status["state"] == "mirrored", "alpha left the mirror: {}", status["reason"]);
        let up = |path: usize| status["link"][path]["state"] == "up";
        Ok((!up(0) && up(1)).then_some(()))
    })?;
    for server in [&pair.alpha, &pair.beta] {
        ensure!(server.status_word("/state")? == "mirrored", "{} left the mirror", server.name());
        ensure!(server.events_of("link-lost")?.is_empty(), "{} lost its peer", server.name());
        let alone = server.events_of("going-alone")?;
        ensure!(alone.is_empty(), "{} went alone: {alone:?}", server.name());
    }
    let finished = load.finish()?;
    unharmed(&finished)?;
    stall("the longest answer over the loss of a path", finished.longest, 1000)?;
    pair.restore(0)?;
    pair.alpha.wait_status("both paths up", |status| {
        status["link"][0]["state"] == "up" && status["link"][1]["state"] == "up"
    })?;
    verify(&pair.alpha, &history, Floor::Acknowledged)
}
