//! SFT3-O4: a server is taken down on purpose.

use anyhow::{Context, Result, ensure};

use super::{Case, Stage, stall, verify, write_some};
use crate::lab::history::Floor;
use crate::lab::nbd::Nbd;
use crate::lab::pair::{LIMIT, VOLUME};
use crate::lab::{PairOptions, wait};

pub(super) const CASES: &[Case] = &[Case {
    name: "SFT3-O4",
    sabotage: "the primary is killed instead of taken down",
    run: planned_down,
    ends_mirrored: true,
    limit_s: 240,
}];

fn planned_down(stage: &mut Stage) -> Result<()> {
    let sabotage = stage.sabotage;
    let (pair, history) = stage.mirrored(PairOptions::default())?;
    write_some(&pair.alpha, &history, 91, 300)?;
    let start = std::time::Instant::now();
    if sabotage {
        pair.alpha.kill()?;
    } else {
        pair.alpha.must(&["down"])?;
    }
    // The client's stall: from the order until the other serves the next request.
    wait::until("beta to serve", LIMIT / if sabotage { 10 } else { 1 }, || {
        let Ok(mut nbd) = Nbd::unix(&pair.beta.nbd(), VOLUME, LIMIT) else { return Ok(None) };
        Ok(nbd.read(0, 4096).is_ok().then_some(()))
    })?;
    stall("hand-over until the other serves", start.elapsed(), 300)?;
    let ended = pair.alpha.wait_daemon_end()?;
    ensure!(ended.code == Some(0), "`down` ended the daemon with {ended:?}");
    ensure!(pair.beta.events_of("takeover")?.is_empty(), "a planned down looks like a failure");
    ensure!(pair.beta.dirty_blocks()? == 0, "the hand-over left dirty blocks");
    verify(&pair.beta, &history, Floor::Acknowledged)?;
    write_some(&pair.beta, &history, 92, 200)?;
    pair.alpha.start_daemon()?;
    pair.wait_mirrored()?;
    pair.alpha.event("clean-stop").context("the stop was not logged as clean")?;
    ensure!(pair.alpha.status_word("/role")? == "secondary", "alpha took its role back");
    // The secondary is taken down: the primary goes on.
    pair.alpha.must(&["down"])?;
    pair.alpha.wait_daemon_end()?;
    pair.beta.wait("alone", LIMIT)?;
    write_some(&pair.beta, &history, 93, 200)?;
    pair.alpha.start_daemon()?;
    pair.wait_mirrored()?;
    verify(&pair.beta, &history, Floor::Acknowledged)?;
    // And a switchover, there and back.
    pair.beta.must(&["switchover"])?;
    pair.alpha.wait("role=primary", LIMIT)?;
    verify(&pair.alpha, &history, Floor::Acknowledged)
}
