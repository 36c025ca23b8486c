//! CLIENT: programs that others wrote, on a real pair: a database, file systems, block tools. They come beside the
//! acceptance list, which names no client.

mod blocks;
mod database;
mod files;

use anyhow::{Context, Result, ensure};

use super::{Case, says};
use crate::lab::disk::Loss;
use crate::lab::pair::{LIMIT, field};
use crate::lab::{Pair, Seed, Server};

/// Every case here; more rounds may take longer.
pub(super) fn all() -> Vec<Case> {
    let mut cases = [database::CASES, files::CASES, blocks::CASES].concat();
    for case in &mut cases {
        case.limit_s = case.limit_s.max(ROUND_LIMIT_S * rounds(0));
    }
    cases
}

/// A round that takes longer on average has failed.
const ROUND_LIMIT_S: u64 = 60;

/// How a primary ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// Every process of its host is killed at once, the disk loses nothing.
    Kill,
    /// Its power is cut: what its disk had not flushed is lost.
    PowerCut,
    /// The power of both is cut at one instant.
    PowerCutOfBoth,
}

impl End {
    /// Process kills and power cuts by turns.
    fn of_round(round: u64) -> End {
        match round % 3 {
            0 => End::Kill,
            1 => End::PowerCut,
            _ => End::PowerCutOfBoth,
        }
    }
}

/// Rounds of each case that has rounds, if the environment says how many.
fn rounds(otherwise: u64) -> u64 {
    std::env::var("DUPLEX_CLIENT_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(otherwise)
}

/// The primary of this round and the other one: they change places every round.
fn sides(pair: &mut Pair, round: u64) -> (&mut Server, &mut Server) {
    if round.is_multiple_of(2) {
        (&mut pair.alpha, &mut pair.beta)
    } else {
        (&mut pair.beta, &mut pair.alpha)
    }
}

fn random_loss(seed: &mut Seed) -> Loss {
    if seed.once_in(2) { Loss::Drop } else { Loss::Tear { seed: seed.bits() } }
}

/// Ends the primary in the middle of what it does; the other one is promoted, after a boot where its power went, too.
fn take_over(primary: &mut Server, other: &mut Server, end: End, loss: Loss) -> Result<()> {
    match end {
        End::Kill => primary.kill()?,
        End::PowerCut => primary.power_cut(loss)?,
        End::PowerCutOfBoth => {
            primary.faulty()?.hold()?;
            other.faulty()?.hold()?;
            primary.after_hold(loss)?;
            other.after_hold(loss)?;
            other.boot(true)?;
            other.start_daemon()?;
        }
    }
    other.wait("joining", LIMIT)?;
    if end == End::PowerCutOfBoth {
        // A server that was off cannot know what the other did meanwhile: the operator names the generation.
        let refused = other.refused(&["promote", "--peer-is-down"], 1)?;
        says(&refused, &["not-proven-current"])?;
        // The status page is a little behind.
        let status = other
            .wait_status("its own generation", |status| status["volumes"][0]["generation"].is_string())?;
        other.must(&["promote", "--force", field(&status, "/volumes/0/generation")?])?;
    } else {
        other.must(&["promote", "--peer-is-down"])?;
    }
    other.wait("role=primary", LIMIT)
}

/// The old primary's host is switched on again and becomes secondary.
fn come_back(old: &mut Server, primary: &Server, end: End) -> Result<()> {
    old.boot(end != End::Kill)?;
    old.start_daemon()?;
    primary.wait("mirrored", LIMIT).context("after the old primary's return")?;
    old.wait("mirrored", LIMIT)?;
    ensure!(old.status_word("/role")? == "secondary", "{} took its role back", old.name());
    ensure!(primary.status_word("/role")? == "primary", "{} lost its role", primary.name());
    Ok(())
}
