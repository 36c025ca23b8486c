//! RUN: the daemon itself: restarted under load, started with nonsense.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use anyhow::{Context, Result, anyhow, ensure};
use rustix::process::Signal;
use serde_json::Value;

use super::wrong_configurations::WRONG;
use super::{Case, Stage};
use crate::lab::filesystem::device_of;
use crate::lab::history::Floor;
use crate::lab::pair::{LIMIT, VOLUME};
use crate::lab::{Pair, PairOptions, Seed, Server, system, wait};

pub(super) const CASES: &[Case] = &[
    Case {
        name: "RUN-1",
        sabotage: "the holder is killed with the daemon",
        run: restart_under_load,
        ends_mirrored: true,
        limit_s: 300,
    },
    Case {
        name: "RUN-4",
        sabotage: "the right configuration is tried as one of the wrong ones",
        run: configuration_errors,
        ends_mirrored: false,
        limit_s: 240,
    },
];

/// Files written and synced one after the other, each with a content that follows from its number.
struct Files {
    stop: Arc<AtomicBool>,
    written: Arc<AtomicU64>,
    thread: JoinHandle<Result<()>>,
}

const FILES: u64 = 64;

fn content(number: u64) -> Vec<u8> {
    let mut seed = Seed::new(number);
    (0..4096).flat_map(|_| seed.bits().to_le_bytes()).collect()
}

impl Files {
    fn start(directory: PathBuf) -> Files {
        let (stop, written) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (until, count) = (Arc::clone(&stop), Arc::clone(&written));
        let thread = std::thread::spawn(move || {
            while !until.load(Ordering::Relaxed) {
                let number = count.load(Ordering::Relaxed);
                let file = std::fs::File::create(directory.join(format!("f{}", number % FILES)))?;
                std::os::unix::fs::FileExt::write_all_at(&file, &content(number), 0)?;
                file.sync_all().with_context(|| format!("file {number}"))?;
                count.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        });
        Files { stop, written, thread }
    }

    fn wait_more(&self, more: u64) -> Result<()> {
        let goal = self.written.load(Ordering::Relaxed) + more;
        wait::until(&format!("{more} more files"), LIMIT, || {
            ensure!(!self.thread.is_finished(), "the writer of files ended");
            Ok((self.written.load(Ordering::Relaxed) >= goal).then_some(()))
        })
    }

    /// How many were written, all without an error.
    fn finish(self) -> Result<u64> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread
            .join()
            .map_err(|_| anyhow!("the writer of files panicked"))?
            .context("an I/O error reached a file")?;
        Ok(self.written.load(Ordering::Relaxed))
    }
}

fn check_files(directory: &Path, written: u64) -> Result<()> {
    for number in written.saturating_sub(FILES)..written {
        let found = std::fs::read(directory.join(format!("f{}", number % FILES)))?;
        ensure!(found == content(number), "file {number} has another content");
    }
    Ok(())
}

/// The server ends: ask elsewhere, or again later.
const ESHUTDOWN: u32 = 108;

/// An NBD client that connects again and asks again for what was not answered finds everything it was promised.
fn nbd_client_reconnects(stage: &mut Stage) -> Result<()> {
    let (pair, history) = stage.mirrored(PairOptions::default())?;
    for (round, signal) in [Signal::KILL, Signal::TERM].into_iter().enumerate() {
        let mut load = super::client(&pair.alpha, &history, 301 + round as u64)?;
        load.wait_more(300, LIMIT)?;
        pair.alpha.signal_daemon(signal)?;
        pair.alpha.wait_daemon_end()?;
        let finished = load.join()?;
        ensure!(finished.broken.is_some(), "the client outlived the daemon");
        // A daemon that ends in order says so to what it did not take any more; one that is killed says nothing.
        let told = |errno: &u32| signal == Signal::TERM && *errno == ESHUTDOWN;
        ensure!(finished.errors.iter().all(told), "an I/O error reached the client: {:?}", finished.errors);
        pair.alpha.start_daemon()?;
        pair.alpha.wait("role=primary", LIMIT)?;
        super::verify(&pair.alpha, &history, Floor::Acknowledged)?;
        super::write_some(&pair.alpha, &history, 311 + round as u64, 200)?;
        pair.wait_mirrored()?;
        super::verify(&pair.alpha, &history, Floor::Acknowledged)?;
    }
    pair.assert_equal()
}

/// The holder does not answer a restarted daemon at first: its device is left alone until it does.
fn start_before_a_late_holder(server: &mut Server) -> Result<()> {
    server.signal_holder(Signal::STOP)?;
    server.start_daemon()?;
    wait::until("the daemon to miss the holder's answer", LIMIT, || {
        let asked_again =
            |event: &Value| event["text"].as_str().is_some_and(|text| text.contains("asked again"));
        Ok(server.events_of("trouble")?.iter().any(asked_again).then_some(()))
    })?;
    server.signal_holder(Signal::CONT)
}

fn restart_under_load(stage: &mut Stage) -> Result<()> {
    let sabotage = stage.sabotage;
    nbd_client_reconnects(stage)?;
    // A killed daemon marks every extent of 4 MiB that was in use: on a small volume that would be all of it.
    let volume_bytes = 512 << 20;
    let pair = stage.pair(PairOptions { volume_bytes, frontend: "fuse", ..PairOptions::default() })?;
    pair.start_mirrored()?;
    let device = device_of(&pair.alpha)?;
    let name = device.display().to_string();
    let mount = pair.directory().join("mnt");
    std::fs::create_dir(&mount)?;
    let point = mount.display().to_string();
    // Without discards: they would put every extent into use.
    system::run(&["mkfs.ext4", "-q", "-E", "nodiscard", &name], LIMIT)?;
    system::run(&["mount", &name, &point], LIMIT)?;
    let files = Files::start(mount.clone());
    let result: Result<()> = (|| {
        files.wait_more(20)?;
        for round in 0..4 {
            if round == 2 {
                // A holder that ends alone is replaced: the restart that follows loses nothing.
                let earlier = pair.alpha.events_of("holder-replaced")?.len();
                pair.alpha.kill_holder()?;
                wait::until("another holder", LIMIT, || {
                    Ok((pair.alpha.events_of("holder-replaced")?.len() > earlier).then_some(()))
                })?;
            }
            if round % 2 == 0 {
                pair.alpha.kill_daemon()?;
            } else {
                pair.alpha.signal_daemon(Signal::TERM)?;
                pair.alpha.wait_daemon_end()?;
            }
            if sabotage {
                pair.alpha.kill_holder()?;
            }
            if round == 1 && !sabotage {
                start_before_a_late_holder(&mut pair.alpha)?;
            } else {
                pair.alpha.start_daemon()?;
            }
            pair.alpha.wait("role=primary", LIMIT)?;
            files.wait_more(20)?;
            pair.wait_mirrored()?;
        }
        let said = pair.alpha.refused(&["switchover"], 1)?;
        super::says(&said, &["use"]).context("a switchover while the device is mounted")
    })();
    let written = files.finish();
    let checked = written.as_ref().map_or(Ok(()), |written| check_files(&mount, *written));
    let unmounted = system::run(&["umount", &point], LIMIT);
    // Why the files stopped says more than that they did.
    let written = written.context("over the restarts")?;
    result?;
    Stage::note(&format!("{written} files written and synced over four restarts"));
    checked?;
    unmounted?;
    system::run(&["fsck.ext4", "-fn", &name], LIMIT).context("the file system after four restarts")?;
    ensure!(device_of(&pair.alpha)? == device, "the device has another name after the restarts");
    short_resyncs(pair)?;
    hand_over(pair)
}

/// A killed daemon's marks are copied, and no more; one that ended in order leaves nothing to copy.
fn short_resyncs(pair: &Pair) -> Result<()> {
    let ends = pair.alpha.events_of("synced")?;
    // The first is the first copy.
    let sent: Vec<u64> =
        ends.iter().skip(1).filter_map(|event| super::number(event, "sent_bytes").ok()).collect();
    ensure!(!sent.is_empty(), "no resync followed a kill: {ends:?}");
    let most = pair.volume_bytes()? / 2;
    ensure!(sent.iter().all(|sent| *sent < most), "restarts sent {sent:?} bytes: no short resyncs");
    Stage::note(&format!("{} resyncs sent {sent:?} bytes", sent.len()));
    Ok(())
}

/// A device goes with the role, and the holder with `down`.
fn hand_over(pair: &mut Pair) -> Result<()> {
    pair.alpha.must(&["switchover"])?;
    pair.beta.wait("role=primary", LIMIT)?;
    pair.beta.wait_status("a device", |status| status["volumes"][0]["device"].is_string())?;
    let link = pair.alpha.run_directory().join("dev").join(VOLUME);
    wait::until("alpha's device to go", LIMIT, || {
        let named = !pair.alpha.status()?["volumes"][0]["device"].is_null();
        Ok((!named && std::fs::symlink_metadata(&link).is_err()).then_some(()))
    })?;
    pair.alpha.must(&["down"])?;
    pair.alpha.wait_daemon_end()?;
    let left = pair.alpha.host()?.processes()?;
    ensure!(!left.iter().any(|(_, words)| words.contains(" holder")), "`down` leaves the holder: {left:?}");
    pair.alpha.start_daemon()?;
    pair.wait_mirrored()
}

fn configuration_errors(stage: &mut Stage) -> Result<()> {
    let sabotage = stage.sabotage;
    let pair = stage.pair(PairOptions::default())?;
    let server = &mut pair.alpha;
    let right = std::fs::read_to_string(server.config())?;
    let accepted = server.cli(&["check"])?;
    ensure!(accepted.ended.code != Some(2), "the right configuration is called wrong: {}", accepted.text());
    ensure!(WRONG.len() >= 30, "thirty wrong configurations are asked for");
    for (number, wrong) in WRONG.iter().enumerate() {
        ensure!(right.contains(wrong.from), "wrong configuration {number} does not apply");
        let text =
            if sabotage && number == 7 { right.clone() } else { right.replacen(wrong.from, wrong.to, 1) };
        std::fs::write(server.config(), &text)?;
        for verb in ["check", "daemon"] {
            named(server, verb, wrong.key, &text)
                .with_context(|| format!("`{verb}` with {:?} for {:?}", wrong.to, wrong.from))?;
        }
    }
    std::fs::write(server.config(), &right)?;
    server.must(&["create", VOLUME])?;
    server.start_daemon()
}

/// The verb ends with exit code 2 and names file, line, key and a fix.
fn named(server: &Server, verb: &str, key: &str, text: &str) -> Result<()> {
    let output = server.cli(&[verb])?;
    ensure!(output.ended.code == Some(2), "ended {:?}: {}", output.ended, output.text());
    let file = server.config().display().to_string();
    let said = output.text();
    ensure!(said.contains(&file), "does not name the file: {said}");
    let after = said.split(&file).skip(1).filter_map(|rest| rest.strip_prefix(':')?.split(':').next());
    let line = after.filter_map(|number| number.parse::<usize>().ok()).next();
    let line = line.with_context(|| format!("does not name a line: {said}"))?;
    ensure!(line >= 1 && line <= text.lines().count() + 1, "names line {line}: {said}");
    ensure!(said.replace(&file, "").contains(key), "does not name `{key}`: {said}");
    ensure!(said.contains("fix:"), "names no fix: {said}");
    Ok(())
}
