//! SFT3-B: the beginnings of a pair: first activation, a late joiner, stale sides, two primaries, refused handshakes.

use anyhow::{Context, Result, ensure};

use super::{Case, Stage, client, history_of, says, spoil, verify, write_some};
use crate::lab::history::Floor;
use crate::lab::pair::{VOLUME, field};
use crate::lab::writer::Shared;
use crate::lab::{Pair, PairOptions};

pub(super) const CASES: &[Case] = &[
    Case {
        name: "SFT3-B1",
        sabotage: "one block of beta's copy is changed behind its back",
        run: first_activate,
        ends_mirrored: true,
        limit_s: 120,
    },
    Case {
        name: "SFT3-B2",
        sabotage: "the cable stays unplugged when beta starts",
        run: late_joiner,
        ends_mirrored: true,
        limit_s: 180,
    },
    Case {
        name: "SFT3-B3",
        sabotage: "beta is promoted by force before it is looked at",
        run: stale_side_alone,
        ends_mirrored: false,
        limit_s: 180,
    },
    Case {
        name: "SFT3-B4",
        sabotage: "one block of the survivor is changed while both are refused",
        run: both_active,
        ends_mirrored: true,
        limit_s: 240,
    },
    Case {
        name: "SFT3-B5",
        sabotage: "the configurations are left equal",
        run: handshake_refusals,
        ends_mirrored: false,
        limit_s: 300,
    },
];

fn first_activate(stage: &mut Stage) -> Result<()> {
    let sabotage = stage.sabotage;
    let pair = stage.pair(PairOptions::default())?;
    pair.create()?;
    pair.alpha.start_daemon()?;
    pair.beta.start_daemon()?;
    pair.wait_both("both to be joining", |a, b| a["state"] == "joining" && b["state"] == "joining")?;
    pair.alpha.must(&["activate"])?;
    pair.wait_mirrored()?;
    let history = history_of(pair)?;
    write_some(&pair.alpha, &history, 1, 500)?;
    ensure!(pair.alpha.status_word("/role")? == "primary", "alpha is not primary");
    ensure!(pair.beta.status_word("/role")? == "secondary", "beta is not secondary");
    pair.alpha.event("activated")?;
    pair.alpha.event("synced")?;
    pair.beta.event("synced")?;
    says(&pair.alpha.refused(&["activate"], 1)?, &["activ"])?;
    verify(&pair.alpha, &history, Floor::Acknowledged)?;
    if sabotage {
        spoil(&pair.beta, 77)?;
    }
    Ok(())
}

fn late_joiner(stage: &mut Stage) -> Result<()> {
    let sabotage = stage.sabotage;
    let pair = stage.pair(PairOptions::default())?;
    pair.create()?;
    pair.alpha.start_daemon()?;
    pair.alpha.must(&["activate"])?;
    pair.alpha.wait("role=primary", crate::lab::pair::LIMIT)?;
    let history = history_of(pair)?;
    write_some(&pair.alpha, &history, 2, 500)?;
    if sabotage {
        pair.cut(0)?;
    }
    pair.beta.start_daemon()?;
    pair.beta.wait("mirrored", std::time::Duration::from_secs(if sabotage { 8 } else { 60 }))?;
    pair.wait_mirrored()?;
    ensure!(pair.beta.status_word("/role")? == "secondary", "beta is not secondary");
    let events = pair.beta.events()?;
    ensure!(
        events.iter().any(|event| event["state_after"] == "joining"),
        "no event says that beta was joining"
    );
    verify(&pair.alpha, &history, Floor::Acknowledged)
}

fn stale_side_alone(stage: &mut Stage) -> Result<()> {
    let sabotage = stage.sabotage;
    let (pair, history) = stage.mirrored(PairOptions::default())?;
    write_some(&pair.alpha, &history, 3, 200)?;
    pair.beta.kill()?;
    pair.alpha.wait("alone", crate::lab::pair::LIMIT)?;
    write_some(&pair.alpha, &history, 4, 200)?;
    let size = pair.volume_bytes()?;
    pair.alpha.kill()?;
    let before = pair.beta.copy(size)?.digest()?;
    pair.beta.boot(false)?;
    pair.beta.start_daemon()?;
    if sabotage {
        let generation = own_generation(&pair.beta)?;
        pair.beta.must(&["promote", "--force", &generation])?;
    }
    pair.beta.refused(&["promote"], 1).and_then(|text| says(&text, &["peer"]))?;
    let wrong = "0123456789abcdef0123456789abcdef";
    pair.beta.refused(&["promote", "--force", wrong], 1).context("a generation that is not its own")?;
    ensure!(pair.beta.status_word("/role")? != "primary", "the stale side became primary");
    ensure!(client(&pair.beta, &history, 5).is_err(), "the stale side serves clients");
    ensure!(pair.beta.copy(size)?.digest()? == before, "the stale side's volume was touched");
    Ok(())
}

/// A server's generation as `explain` and `status` show it.
fn own_generation(server: &crate::lab::Server) -> Result<String> {
    server.status_word("/volumes/0/generation")
}

fn both_active(stage: &mut Stage) -> Result<()> {
    let sabotage = stage.sabotage;
    let (pair, history) = stage.mirrored(PairOptions::default())?;
    write_some(&pair.alpha, &history, 6, 300)?;
    pair.cut(0)?;
    pair.alpha.wait("alone", crate::lab::pair::LIMIT)?;
    pair.beta.must(&["promote", "--peer-is-down"])?;
    pair.beta.wait("role=primary", crate::lab::pair::LIMIT)?;
    let theirs: Shared =
        std::sync::Arc::new(std::sync::Mutex::new(crate::lab::writer::lock(&history)?.clone()));
    write_some(&pair.alpha, &history, 7, 200)?;
    write_some(&pair.beta, &theirs, 8, 200)?;
    let size = pair.volume_bytes()?;
    let before = (pair.alpha.copy(size)?.digest()?, pair.beta.copy(size)?.digest()?);
    pair.restore(0)?;
    pair.wait_both("both to refuse", |a, b| !a["refusal"].is_null() && !b["refusal"].is_null())?;
    for server in [&pair.alpha, &pair.beta] {
        let status = server.status()?;
        ensure!(
            ["both-active", "split-brain", "diverged"].contains(&field(&status, "/refusal/code")?),
            "{}: {}",
            server.name(),
            status["refusal"]
        );
        server.event("split-brain")?;
        server.must(&["explain"])?;
    }
    if sabotage {
        spoil(&pair.alpha, 5)?;
    }
    let after = (pair.alpha.copy(size)?.digest()?, pair.beta.copy(size)?.digest()?);
    ensure!(before == after, "a copy changed while both were refused");
    resolve(pair, &history, &theirs)
}

/// The operator picks beta as the victim; its blocks are saved, then overwritten.
fn resolve(pair: &mut Pair, history: &Shared, theirs: &Shared) -> Result<()> {
    pair.beta.refused(&["resolve", "--victim", "beta"], 1).context("the victim is still primary")?;
    pair.beta.must(&["demote"])?;
    pair.alpha.must(&["resolve", "--victim", "beta"])?;
    pair.wait_mirrored()?;
    verify(&pair.alpha, history, Floor::Acknowledged)?;
    let saved: Vec<_> = std::fs::read_dir(pair.beta.state_directory().join("saved"))
        .context("no directory of saved blocks")?
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "blocks"))
        .collect();
    ensure!(saved.len() == 1, "one file of saved blocks is expected: {saved:?}");
    let file = saved[0].display().to_string();
    let theirs = crate::lab::writer::lock(theirs)?;
    let changed = theirs.touched().into_iter().filter(|block| {
        // Blocks that only beta wrote after the split: alpha's history does not know their newest write.
        crate::lab::writer::lock(history).is_ok_and(|ours| ours.promised(*block) != theirs.promised(*block))
    });
    let mut restored = 0;
    for block in changed.take(8) {
        let range = format!("{}:4096", block * 4096);
        let output = pair.beta.cli(&["dump", "--saved", &file, "--extract", &range])?;
        if !output.success() {
            continue; // a block that only alpha wrote
        }
        restored += 1;
    }
    ensure!(restored > 0, "no saved block can be extracted from {file}");
    Ok(())
}

/// What is written differently in beta's configuration, and the code of the refusal.
const DIFFERENCES: &[(&str, &str, &[&str])] = &[
    ("frontend = \"none\"", "frontend = \"none\"\nblock_bytes = 16384", &["block", "configuration"]),
    ("[security]", "[arbiter]\nsilent_ms = 900\n[security]", &["configuration"]),
    ("10.9.0.1:7700", "10.9.0.1:7701", &["address", "configuration"]),
    ("pair = \"lab\"", "pair = \"bal\"", &["pair", "foreign"]),
    ("alpha", "alfa", &["server-name"]),
];

fn handshake_refusals(stage: &mut Stage) -> Result<()> {
    let sabotage = stage.sabotage;
    for (from, to, codes) in DIFFERENCES {
        let pair = stage.pair(PairOptions::default())?;
        if !sabotage {
            pair.beta.edit_config(from, to)?;
        }
        refused_with(pair, codes).with_context(|| format!("beta has {to:?}"))?;
    }
    // A volume that does not fit.
    let pair = stage.pair(PairOptions::default())?;
    if !sabotage {
        let path = pair.beta.disk().path().to_owned();
        let small = pair.directory().join("small.disk");
        std::fs::File::create(&small)?.set_len(16 << 20)?;
        pair.beta.edit_config(&path.display().to_string(), &small.display().to_string())?;
    }
    refused_with(pair, &["too-small", "size"])
}

/// Alpha alone with data, beta blank with its own configuration: refused on both sides by one of these codes, with
/// both values, and beta's disk stays as it was.
fn refused_with(pair: &mut Pair, codes: &[&str]) -> Result<()> {
    pair.create()?;
    pair.alpha.start_daemon()?;
    pair.alpha.must(&["activate"])?;
    pair.beta.start_daemon()?;
    let limit = std::time::Duration::from_secs(15);
    let event = crate::lab::wait::until("a refusal on either side", limit, || {
        for server in [&pair.alpha, &pair.beta] {
            if let Some(event) = server.events_of("refused")?.pop() {
                return Ok(Some(event));
            }
        }
        Ok(None)
    })?;
    let code = field(&event, "/code")?.to_owned();
    ensure!(
        codes.iter().any(|wanted| code.contains(wanted)),
        "refused as `{code}`, not as one of {codes:?}: {event}"
    );
    ensure!(!event["mine"].is_null() && !event["theirs"].is_null(), "a refusal without both values: {event}");
    let read = pair.beta.wait_status("its disk to be read", |s| s["volumes"][0]["copy"] != "unknown")?;
    ensure!(read["volumes"][0]["copy"] == "blank", "beta's copy of {VOLUME} changed: {}", read["volumes"][0]);
    ensure!(pair.alpha.status_word("/role")? == "primary", "alpha stopped serving");
    Ok(())
}
