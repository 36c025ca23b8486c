//! SFT3-B: the beginnings of a pair: first activation, a late joiner, stale sides, two primaries, refused handshakes.

use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, ensure};

use super::{Case, Stage, cheap, client, differing, history_of, number, says, spoil, verify, write_some};
use crate::lab::disk::Operation;
use crate::lab::history::{BLOCK_BYTES, Floor};
use crate::lab::pair::{LIMIT, VOLUME, field};
use crate::lab::writer::{Shared, lock};
use crate::lab::{DiskKind, Pair, PairOptions, Server, wait};

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
    pair.alpha.wait("role=primary", LIMIT)?;
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
    // Nothing was known of its blank copy: everything is copied. Late again, with a history: the difference.
    let event = pair.beta.event("will-sync")?;
    says(field(&event, "/reason")?, &["target", "blank"])?;
    pair.beta.kill()?;
    pair.alpha.wait("alone", LIMIT)?;
    write_some(&pair.alpha, &history, 3, 100)?;
    let differ = differing(pair, pair.volume_bytes()?)?;
    pair.beta.boot(false)?;
    pair.beta.start_daemon()?;
    pair.wait_mirrored()?;
    ensure!(pair.beta.status_word("/role")? == "secondary", "beta is not secondary");
    cheap(&pair.alpha, differ)?;
    verify(&pair.alpha, &history, Floor::Acknowledged)
}

fn stale_side_alone(stage: &mut Stage) -> Result<()> {
    let sabotage = stage.sabotage;
    let (pair, history) = stage.mirrored(PairOptions::default())?;
    write_some(&pair.alpha, &history, 3, 200)?;
    pair.beta.kill()?;
    pair.alpha.wait("alone", LIMIT)?;
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
fn own_generation(server: &Server) -> Result<String> {
    server.status_word("/volumes/0/generation")
}

fn both_active(stage: &mut Stage) -> Result<()> {
    let sabotage = stage.sabotage;
    let disks = [DiskKind::Loop, DiskKind::Faulty];
    let (pair, history) = stage.mirrored(PairOptions { disks, ..PairOptions::default() })?;
    write_some(&pair.alpha, &history, 6, 300)?;
    pair.cut(0)?;
    pair.alpha.wait("alone", LIMIT)?;
    // Each finds by itself that it hears nothing.
    pair.beta.wait("joining", LIMIT)?;
    pair.beta.must(&["promote", "--peer-is-down"])?;
    pair.beta.wait("role=primary", LIMIT)?;
    let split = lock(&history)?.clone();
    let theirs: Shared = Arc::new(Mutex::new(split.clone()));
    write_some(&pair.alpha, &history, 7, 200)?;
    write_some(&pair.beta, &theirs, 8, 200)?;
    let since = |history: &Shared| -> Result<Vec<u64>> {
        let history = lock(history)?;
        let newer = |block: &u64| history.promised(*block) > split.promised(*block);
        Ok(history.touched().into_iter().filter(newer).collect())
    };
    let (on_alpha, on_beta) = (since(&history)?, since(&theirs)?);
    let size = pair.volume_bytes()?;
    let before = (pair.alpha.copy(size)?.digest()?, pair.beta.copy(size)?.digest()?);
    pair.restore(0)?;
    pair.wait_both("both to refuse", |a, b| !a["refusal"].is_null() && !b["refusal"].is_null())?;
    told_of_the_split(pair, on_alpha.len(), on_beta.len())?;
    // Each goes on with its own clients; nothing is copied either way.
    verify(&pair.alpha, &history, Floor::Acknowledged)?;
    verify(&pair.beta, &theirs, Floor::Acknowledged)?;
    if sabotage {
        spoil(&pair.alpha, 5)?;
    }
    let after = (pair.alpha.copy(size)?.digest()?, pair.beta.copy(size)?.digest()?);
    ensure!(before == after, "a copy changed while both were refused");
    let lost = blocks_of(&pair.beta, size, &on_beta)?;
    resolve(pair, &history, &lost)
}

/// Both say `split-brain` once, with both generations and how many blocks each has that the other lacks.
fn told_of_the_split(pair: &Pair, on_alpha: usize, on_beta: usize) -> Result<()> {
    let generations = [own_generation(&pair.alpha)?, own_generation(&pair.beta)?];
    ensure!(generations[0] != generations[1], "both wrote alone in one generation: {generations:?}");
    for (me, server) in [&pair.alpha, &pair.beta].into_iter().enumerate() {
        let status = server.status()?;
        let name = server.name();
        ensure!(field(&status, "/refusal/code")? == "split-brain", "{name}: {}", status["refusal"]);
        ensure!(status["role"] == "primary", "{name} lost its role: {}", status["role"]);
        let event = server.event("split-brain")?;
        for (word, generation) in [("mine", &generations[me]), ("theirs", &generations[1 - me])] {
            ensure!(event[word] == **generation, "{name}: `{word}` is not {generation}: {event}");
        }
        let written = if me == 0 { [on_alpha, on_beta] } else { [on_beta, on_alpha] };
        for (word, least) in ["my_blocks", "their_blocks"].into_iter().zip(written) {
            let told = number(&event, word)?;
            ensure!(told >= least as u64, "{name}: {least} blocks were written, `{word}` says {told}");
        }
        let events = server.events_of("split-brain")?.len();
        ensure!(events == 1, "{name} tells {events} times of one split brain");
        says(&server.must(&["explain"])?, &["both wrote alone"])?;
    }
    Ok(())
}

/// What these blocks of a copy hold now.
fn blocks_of(server: &Server, size: u64, blocks: &[u64]) -> Result<Vec<(u64, Vec<u8>)>> {
    let copy = server.copy(size)?;
    blocks.iter().map(|block| Ok((*block, copy.block(*block)?))).collect()
}

/// The operator picks beta as the victim; every block that it wrote is saved, then overwritten.
fn resolve(pair: &mut Pair, history: &Shared, lost: &[(u64, Vec<u8>)]) -> Result<()> {
    pair.beta.refused(&["resolve", "--victim", "beta"], 1).context("the victim is still primary")?;
    pair.beta.must(&["demote"])?;
    // Saving, block by block, takes longer than the peer's patience: the victim is heard meanwhile.
    let links = pair.alpha.events_of("link-lost")?.len();
    pair.beta.faulty()?.delay(Operation::Read, 15)?;
    pair.alpha.must(&["resolve", "--victim", "beta"])?;
    ensure!(
        pair.alpha.events_of("link-lost")?.len() == links,
        "the victim was lost while it saved its blocks"
    );
    pair.beta.faulty()?.heal()?;
    pair.wait_mirrored()?;
    ensure!(pair.beta.status_word("/role")? == "secondary", "the victim is not secondary");
    verify(&pair.alpha, history, Floor::Acknowledged)?;
    let saved: Vec<_> = std::fs::read_dir(pair.beta.state_directory().join("saved"))
        .context("no directory of saved blocks")?
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "blocks"))
        .collect();
    ensure!(saved.len() == 1, "one file of saved blocks is expected: {saved:?}");
    let file = saved[0].display().to_string();
    let onto = pair.directory().join("restored");
    std::fs::File::create(&onto)?.set_len(pair.volume_bytes()?)?;
    pair.beta.must(&["dump", "--saved", &file, "--onto", &onto.display().to_string()])?;
    let restored = std::fs::read(&onto)?;
    ensure!(!lost.is_empty(), "beta wrote nothing that could be lost");
    for (block, content) in lost {
        let begin = usize::try_from(*block)? * BLOCK_BYTES;
        let found = restored.get(begin..begin + BLOCK_BYTES).context("a block past the end")?;
        ensure!(found == content, "block {block} as beta wrote it is not in {file}");
    }
    let (block, _) = &lost[0];
    let range = format!("{}:{BLOCK_BYTES}", block * BLOCK_BYTES as u64);
    pair.beta.must(&["dump", "--saved", &file, "--extract", &range])?;
    Stage::note(&format!("{} blocks of the victim are saved and restorable", lost.len()));
    Ok(())
}

/// What is written differently in beta's configuration, and the code of the refusal.
const DIFFERENCES: &[(&str, &str, &str)] = &[
    ("frontend = \"none\"", "frontend = \"none\"\nblock_bytes = 16384", "block-size"),
    ("frontend = \"none\"", "frontend = \"none\"\nsize = \"32MiB\"", "volume-size"),
    ("[security]", "[arbiter]\nsilent_ms = 900\n[security]", "configuration"),
    ("10.9.0.1:7700", "10.9.0.1:7701", "address"),
    ("pair = \"lab\"", "pair = \"bal\"", "pair"),
    ("alpha", "alfa", "server-name"),
];

fn handshake_refusals(stage: &mut Stage) -> Result<()> {
    let sabotage = stage.sabotage;
    for (from, to, code) in DIFFERENCES {
        let pair = stage.pair(PairOptions::default())?;
        if !sabotage {
            pair.beta.edit_config(from, to)?;
        }
        refused_with(pair, code).with_context(|| format!("beta has {to:?}"))?;
    }
    // A volume that does not fit.
    let pair = stage.pair(PairOptions::default())?;
    if !sabotage {
        let path = pair.beta.disk().path().to_owned();
        let small = pair.directory().join("small.disk");
        std::fs::File::create(&small)?.set_len(16 << 20)?;
        pair.beta.edit_config(&path.display().to_string(), &small.display().to_string())?;
    }
    refused_with(pair, "too-small")
}

/// Alpha alone with data, beta blank with its own configuration: refused with this code and both values, and beta's
/// disk stays as it was.
fn refused_with(pair: &mut Pair, wanted: &str) -> Result<()> {
    pair.create()?;
    pair.alpha.start_daemon()?;
    pair.alpha.must(&["activate"])?;
    pair.beta.start_daemon()?;
    let limit = std::time::Duration::from_secs(15);
    let event = wait::until("a refusal on either side", limit, || {
        let state = pair.beta.status_word("/state")?;
        ensure!(state != "mirrored" && state != "syncing", "the peer was not refused: beta is {state}");
        for server in [&pair.alpha, &pair.beta] {
            if let Some(event) = server.events_of("refused")?.pop() {
                return Ok(Some(event));
            }
        }
        Ok(None)
    })?;
    ensure!(event["code"] == *wanted, "refused as {}, not as {wanted}: {event}", event["code"]);
    ensure!(!event["mine"].is_null() && !event["theirs"].is_null(), "a refusal without both values: {event}");
    let read = pair.beta.wait_status("its disk to be read", |s| s["volumes"][0]["copy"] != "unknown")?;
    ensure!(read["volumes"][0]["copy"] == "blank", "beta's copy of {VOLUME} changed: {}", read["volumes"][0]);
    ensure!(pair.alpha.status_word("/role")? == "primary", "alpha stopped serving");
    Ok(())
}
