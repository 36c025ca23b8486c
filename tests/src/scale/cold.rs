//! An activity log full of cold extents under a thousand writers: 4,096 extents, room for 900. Everyone is answered,
//! mirrored and alone, and after a crash no more extents were in flight than the log holds.

use anyhow::{Context, Result, ensure};

use super::{MEMORY_BOUND_BYTES, PATIENCE, Written, assert_equal, in_memory, judge_memory, step};
use crate::lab::nbd::Nbd;
use crate::lab::pair::{LIMIT, VOLUME};
use crate::lab::{Pair, Seed};

const VOLUME_BYTES: u64 = 16 << 30;
/// Connections, and requests in flight on each: a thousand.
const CLIENTS: u64 = 4;
const DEPTH: usize = 250;
const WRITES_EACH: u64 = 2500;
/// What the activity log holds.
const EXTENTS_MOST: u64 = 900;

/// The round.
///
/// # Errors
/// With the bound that was passed.
pub fn run() -> Result<()> {
    in_memory(VOLUME_BYTES, "16GiB", play)
}

fn play(pair: &mut Pair) -> Result<()> {
    pair.start_mirrored()?;
    let mut written = step("10,000 writes mirrored, 1,000 in flight", || load(pair, 1))?;
    judge_memory("mirrored", &[&pair.alpha, &pair.beta], MEMORY_BOUND_BYTES)?;
    pair.beta.kill()?;
    pair.alpha.wait("alone", LIMIT)?;
    let alone = step("10,000 writes alone, 1,000 in flight", || load(pair, 2))?;
    for (written, alone) in written.iter_mut().zip(alone) {
        written.overwritten_by(alone);
    }
    judge_memory("alone", &[&pair.alpha], MEMORY_BOUND_BYTES)?;
    pair.alpha.crash_and_return()?;
    let recovered = pair.alpha.event("recovered")?;
    let text = recovered["text"].as_str().unwrap_or_default();
    println!("  {text}");
    // None in flight would say that the log was not read, or not full of cold extents.
    ensure!((1..=EXTENTS_MOST).contains(&extents(text)?), "1 to {EXTENTS_MOST} extents are expected: {text}");
    pair.beta.boot(false)?;
    step("resync", || {
        pair.beta.start_daemon()?;
        pair.wait_mirrored()
    })?;
    let mut nbd = Nbd::unix(&pair.alpha.nbd(), VOLUME, PATIENCE)?;
    for one in &written {
        one.verify(&mut nbd)?;
    }
    assert_equal(pair.alpha.disk().path(), pair.beta.disk().path(), VOLUME_BYTES)?;
    pair.stop()
}

/// All clients at once, each on every [`CLIENTS`]th block: no two write the same one.
fn load(pair: &Pair, phase: u64) -> Result<Vec<Written>> {
    let socket = pair.alpha.nbd();
    std::thread::scope(|scope| {
        let work = |client: u64| {
            let socket = &socket;
            move || -> Result<Written> {
                let mut nbd = Nbd::unix(socket, VOLUME, PATIENCE)?;
                let mut written = Written::of_share(client, CLIENTS);
                let mut seed = Seed::new(phase * 100 + client);
                written.scatter(&mut nbd, &mut seed, WRITES_EACH, DEPTH)?;
                Ok(written)
            }
        };
        let clients: Vec<_> = (0..CLIENTS).map(|client| scope.spawn(work(client))).collect();
        let ended = clients.into_iter().map(|client| client.join().expect("a client does not panic"));
        ended.collect::<Result<Vec<_>>>().context("a client")
    })
}

/// "recovered N dirty blocks, M extents were in flight": M.
fn extents(text: &str) -> Result<u64> {
    let words: Vec<&str> = text.split_whitespace().collect();
    let at = words.iter().position(|word| *word == "extents").context("no extents in the event")?;
    Ok(words[at - 1].parse()?)
}
