//! The acceptance cases: each is one fault or one operator's action on a real pair, and what must then be seen.
//! Each has a sabotage that breaks its subject; sabotaged, it must fail.

mod clients;
mod disks;
mod failover;
mod first;
mod planned;
mod replaced;
mod resync;
mod run;
mod security;
mod wrong_configurations;

use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::lab::history::{BLOCK_BYTES, Floor, History};
use crate::lab::writer::{self, Load, Shared, Writer};
use crate::lab::{Pair, PairOptions, Server};

/// One case.
#[derive(Debug, Clone, Copy)]
pub struct Case {
    /// Its name in the acceptance list.
    pub name: &'static str,
    /// What `--sabotage` does to break its subject.
    pub sabotage: &'static str,
    /// Runs it.
    pub run: fn(&mut Stage) -> Result<()>,
    /// Whether it ends with a mirrored pair, whose invariants are then checked.
    pub ends_mirrored: bool,
    /// Seconds after which it has failed.
    pub limit_s: u64,
}

/// Every case there is.
pub fn all() -> Vec<Case> {
    let listed = [
        first::CASES,
        failover::CASES,
        resync::CASES,
        planned::CASES,
        disks::CASES,
        security::CASES,
        run::CASES,
        replaced::CASES,
    ];
    [listed.concat(), clients::all()].concat()
}

/// Programs that sabotage needs beside the product.
pub const SABOTAGE_PROGRAMS: &[&str] = &[disks::WITHOUT_PEER_FLUSH];

/// Names of the acceptance list that this version must pass; one without a case is printed as `missing`.
pub const WANTED: &[&str] = &[
    "SFT3-B1", "SFT3-B2", "SFT3-B3", "SFT3-B4", "SFT3-B5", "SFT3-S1d", "SFT3-S2", "SFT3-S2b", "SFT3-S3b",
    "SFT3-S3c", "SFT3-R3", "SFT3-R4", "SFT3-O4", "RDR-1", "RDR-2", "DISK-1", "DISK-2", "DISK-4", "DISK-5",
    "DISK-6", "SEC-1", "SEC-3", "SEC-4", "SEC-5", "RUN-1", "RUN-4", "SWAP-1", "SWAP-2",
];

/// Cases beside the acceptance list: programs that others wrote, on a real pair.
pub const CLIENTS: &[&str] =
    &["CLIENT-1", "CLIENT-2", "CLIENT-3", "CLIENT-4", "CLIENT-5", "CLIENT-6", "CLIENT-7"];

/// Where a case plays.
#[derive(Debug, Default)]
pub struct Stage {
    /// Whether this run is sabotaged.
    pub sabotage: bool,
    pair: Option<Pair>,
}

impl Stage {
    /// An empty stage.
    pub fn new(sabotage: bool) -> Stage {
        Stage { sabotage, pair: None }
    }

    /// A pair, booted, without daemons; an earlier one of this case is removed first.
    pub fn pair(&mut self, options: PairOptions) -> Result<&mut Pair> {
        if let Some(mut earlier) = self.pair.take() {
            earlier.stop()?;
        }
        Ok(self.pair.insert(Pair::new(options)?))
    }

    /// A mirrored pair with alpha primary, and a history of its volume.
    pub fn mirrored(&mut self, options: PairOptions) -> Result<(&mut Pair, Shared)> {
        let pair = self.pair(options)?;
        pair.start_mirrored()?;
        let history = history_of(pair)?;
        Ok((pair, history))
    }

    /// Says something measured.
    pub fn note(text: &str) {
        eprintln!("    {text}");
    }

    /// Runs a case on this stage, with the invariants after it.
    pub fn play(&mut self, case: &Case) -> Result<()> {
        (case.run)(self)?;
        if let (true, Some(pair)) = (case.ends_mirrored, &self.pair) {
            pair.wait_mirrored().context("at the end")?;
            invariants(pair)?;
        }
        Ok(())
    }

    /// What a person needs to see after a failure.
    pub fn report(&self) -> String {
        self.pair.as_ref().map(Pair::report).unwrap_or_default()
    }

    /// Removes the pair; what does not end is an error.
    pub fn clear(&mut self) -> Result<()> {
        self.pair.take().map_or(Ok(()), |mut pair| pair.stop())
    }
}

/// Whether the long cases take their shorter form, as in the suite.
fn short() -> bool {
    std::env::var_os("DUPLEX_CASES_SHORT").is_some()
}

/// What holds in every case, once settled (I1, I2 by the cases' own histories, I6, I7, equal copies).
fn invariants(pair: &Pair) -> Result<()> {
    let (a, b) = (pair.alpha.status()?, pair.beta.status()?);
    ensure!(!(a["role"] == "primary" && b["role"] == "primary"), "I1: both are primary");
    ensure!(a["role"] == "primary" || b["role"] == "primary", "mirrored, and nobody is primary");
    ensure!(a["epoch"] == b["epoch"], "I7: epochs differ: {} and {}", a["epoch"], b["epoch"]);
    for server in [&pair.alpha, &pair.beta] {
        let mut newest = 0;
        for event in server.events()? {
            // 0: written where no epoch is known, such as at the control socket.
            let number = event["epoch"]["number"].as_u64().context("an event without an epoch")?;
            ensure!(
                number == 0 || number >= newest,
                "I7: the epoch of {} fell from {newest}: {event}",
                server.name()
            );
            newest = newest.max(number);
            let changed = event["state_before"] != event["state_after"] && !event["state_after"].is_null();
            let explained = event["reason"].as_str().is_some_and(|reason| !reason.is_empty());
            ensure!(!changed || explained, "I6: a change without a reason on {}: {event}", server.name());
        }
        ensure!(server.daemon_ended()?.is_none(), "{}'s daemon is gone", server.name());
        let log = server.log_tail(100_000);
        if let Some(line) = log.lines().find(|line| line.contains("panicked at")) {
            bail!("{}'s daemon panicked: {line}", server.name());
        }
    }
    pair.assert_equal()
}

/// A history of the pair's volume, all zeroes.
fn history_of(pair: &Pair) -> Result<Shared> {
    let blocks = pair.volume_bytes()? / BLOCK_BYTES as u64;
    Ok(Arc::new(Mutex::new(History::new(u64::from(std::process::id()), blocks))))
}

/// A client all over the volume.
fn client(server: &Server, history: &Shared, seed: u64) -> Result<Writer> {
    let load = Load::everywhere(seed, &*writer::lock(history)?);
    server.client(history, load)
}

/// So many random requests, all of which must succeed.
fn write_some(server: &Server, history: &Shared, seed: u64, requests: u64) -> Result<()> {
    let load = Load { requests: Some(requests), ..Load::everywhere(seed, &*writer::lock(history)?) };
    run_load(server, history, load)
}

/// Writes by this load to its end, all of which must succeed.
fn run_load(server: &Server, history: &Shared, load: Load) -> Result<()> {
    let finished = server.client(history, load)?.join()?;
    if let Some(error) = finished.broken {
        return Err(error.context("the client's connection broke"));
    }
    ensure!(finished.errors.is_empty(), "the client got errors: {:?}", finished.errors);
    Ok(())
}

/// Every touched block read over NBD must be what was promised.
fn verify(server: &Server, history: &Shared, floor: Floor) -> Result<()> {
    writer::verify_client(&server.nbd(), crate::lab::pair::VOLUME, history, floor)
        .with_context(|| format!("read from {}", server.name()))
        .map(drop)
}

/// Changes one block of a server's copy behind everyone's back.
fn spoil(server: &Server, block: u64) -> Result<()> {
    let path = server.disk().path();
    let file = std::fs::OpenOptions::new().write(true).open(path)?;
    let offset = crate::lab::copies::DATA_BEGIN_BYTES + block * BLOCK_BYTES as u64;
    std::os::unix::fs::FileExt::write_all_at(&file, &[0xEE; BLOCK_BYTES], offset)?;
    Ok(file.sync_all()?)
}

/// How many blocks of two copies differ now, by reading both.
fn differing(pair: &Pair, size: u64) -> Result<u64> {
    let difference = crate::lab::copies::compare(&pair.alpha.copy(size)?, &pair.beta.copy(size)?)?;
    Ok(difference.map_or(0, |difference| difference.blocks))
}

/// I4: no fewer blocks are marked than differ, once the status page (which is a little behind) tells of the last
/// write. Gives how many are marked.
fn marked(server: &Server, differing_blocks: u64) -> Result<u64> {
    let status = server
        .wait_status(&format!("I4: marks of all {differing_blocks} blocks that differ"), |s| {
            s["volumes"][0]["dirty_blocks"].as_u64().is_some_and(|marked| marked >= differing_blocks)
        })?;
    number(&status["volumes"][0], "dirty_blocks")
}

/// Bytes that the newest finished resync sent, from the `synced` event of its source.
fn sent_in_resync(source: &Server) -> Result<u64> {
    let event = source.event("synced")?;
    number(&event, "sent_bytes")
}

/// A number of a JSON object.
fn number(value: &Value, field: &str) -> Result<u64> {
    value[field].as_u64().with_context(|| format!("no number `{field}` in {value}"))
}

/// I4 and I5: the newest resync of this source began with marks of at least the blocks that differed, and sent no more
/// than what was marked, and 5 %. The marks are those of its `sync-started` event: the status page is a little behind.
fn cheap(source: &Server, differing_blocks: u64) -> Result<()> {
    let sent = sent_in_resync(source)?;
    let started = source.event("sync-started")?;
    let marked = number(&started, "my_blocks")? + number(&started, "their_blocks")?;
    Stage::note(&format!("resync: {differing_blocks} blocks differed, {marked} marked, {sent} bytes sent"));
    ensure!(marked >= differing_blocks, "I4: {marked} blocks marked, {differing_blocks} differed: {started}");
    let most = (marked * BLOCK_BYTES as u64) as f64 * 1.05;
    ensure!(sent as f64 <= most, "I5: {sent} bytes sent for {marked} blocks marked");
    Ok(())
}

/// An upper bound on a stall; fails past three times its bound, as durations on a shared machine are rough.
fn stall(what: &str, took: std::time::Duration, bound_ms: u64) -> Result<()> {
    let milliseconds = u64::try_from(took.as_millis())?;
    Stage::note(&format!("{what}: {milliseconds} ms (bound {bound_ms} ms)"));
    ensure!(
        milliseconds <= 3 * bound_ms,
        "{what} took {milliseconds} ms, more than three times {bound_ms} ms"
    );
    Ok(())
}

/// An error whose text must name something.
fn says(text: &str, words: &[&str]) -> Result<()> {
    for word in words {
        ensure!(text.to_lowercase().contains(&word.to_lowercase()), "should say {word:?}: {text}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_wanted_case_is_there_once_with_a_named_sabotage() {
        let all = all();
        for name in WANTED.iter().chain(CLIENTS) {
            let found: Vec<&Case> = all.iter().filter(|case| case.name == *name).collect();
            assert_eq!(found.len(), 1, "{name}");
            assert!(!found[0].sabotage.is_empty());
        }
        assert_eq!(all.len(), WANTED.len() + CLIENTS.len());
    }
}
