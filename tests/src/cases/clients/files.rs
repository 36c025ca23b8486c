//! ext4 and XFS on the mirrored device, under synced work on files, over kills and power cuts.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use super::{End, come_back, random_loss, rounds, sides, take_over};
use crate::cases::{Case, Stage};
use crate::lab::disk::Loss;
use crate::lab::disk::process::program;
use crate::lab::filesystem::{FileSystem, device_of, on, wait_gone};
use crate::lab::pair::{LIMIT, adapter};
use crate::lab::{DiskKind, Pair, PairOptions, Seed, Server, filework, wait};

pub(super) const CASES: &[Case] = &[
    Case {
        name: "CLIENT-4",
        sabotage: "the cable is pulled before the primary's host is killed, so that an old copy is promoted",
        run: ext4_over_kills,
        ends_mirrored: true,
        limit_s: 300,
    },
    Case {
        name: "CLIENT-5",
        sabotage: "both servers' disks answer flushes without carrying them out",
        run: xfs_over_kills,
        ends_mirrored: true,
        limit_s: 300,
    },
];

/// Workers at once, each with a directory and a journal.
const WORKERS: u64 = 3;
/// Rounds whose files stay and are checked again after every later one.
const ROUNDS_KEPT: u64 = 2;

/// What is worked on, and where its journals are.
struct Play {
    files: FileSystem,
    point: PathBuf,
    journals: PathBuf,
}

impl Play {
    fn directory(&self, round: u64) -> PathBuf {
        self.point.join(format!("round{round}"))
    }

    fn journal(&self, round: u64, worker: u64) -> PathBuf {
        self.journals.join(format!("round{round}-{worker}"))
    }

    /// The words of a worker, or of its check.
    fn words(&self, round: u64, worker: u64) -> Result<Vec<String>> {
        let text = |path: &Path| path.display().to_string();
        Ok(vec![
            text(&program("duplex-lab")?),
            "files".to_owned(),
            "--directory".to_owned(),
            text(&self.directory(round).join(format!("worker{worker}"))),
            "--journal".to_owned(),
            text(&self.journal(round, worker)),
        ])
    }

    /// Starts this round's workers; gives their process ids on the server.
    fn start(&self, server: &Server, round: u64, seed: &mut Seed) -> Result<Vec<i32>> {
        on(server, &["mkdir", "-p", &self.directory(round).display().to_string()])?;
        let log = self.journals.join("workers.log");
        let mut workers = Vec::new();
        for worker in 0..WORKERS {
            let mut words = self.words(round, worker)?;
            words.extend(["--seed".to_owned(), seed.bits().to_string()]);
            workers.push(server.host()?.spawn(&words, &log, &log)?);
        }
        Ok(workers)
    }

    fn steps(&self, round: u64) -> Result<u64> {
        (0..WORKERS).map(|worker| filework::steps(&self.journal(round, worker))).sum()
    }

    /// Waits until so many more steps are synced; no worker may have met an error.
    fn wait_more(&self, server: &Server, workers: &[i32], round: u64, more: u64) -> Result<()> {
        let goal = self.steps(round)? + more;
        wait::until(&format!("{more} more synced steps"), LIMIT, || {
            for pid in workers {
                let ended = server.host()?.ended(*pid)?;
                ensure!(ended.is_none(), "a worker ended ({ended:?}): {}", self.said());
            }
            Ok((self.steps(round)? >= goal).then_some(()))
        })
    }

    fn said(&self) -> String {
        std::fs::read_to_string(self.journals.join("workers.log")).unwrap_or_default()
    }

    /// Every synced step of every round kept is there.
    fn check(&self, server: &Server, round: u64) -> Result<()> {
        let (mut files, mut steps) = (0, 0);
        for round in first_kept(round)..=round {
            for worker in 0..WORKERS {
                let mut words = self.words(round, worker)?;
                words.push("--check".to_owned());
                let said = on(server, &words.iter().map(String::as_str).collect::<Vec<_>>())?;
                files += said.trim().parse::<u64>().with_context(|| said.clone())?;
            }
            steps += self.steps(round)?;
        }
        Stage::note(&format!("{steps} synced steps, {files} files as they should be"));
        Ok(())
    }

    /// One round: the primary ends under work on files; the other has every synced step; the first returns.
    fn round(&self, pair: &mut Pair, round: u64, seed: &mut Seed, sabotage: bool) -> Result<()> {
        let end = End::of_round(round);
        let (primary, other) = sides(pair, round);
        let device = device_of(primary)?;
        let workers = self.start(primary, round, seed)?;
        if sabotage && self.files == FileSystem::Xfs {
            primary.faulty()?.lie_about_flush(true)?;
            other.faulty()?.lie_about_flush(true)?;
        }
        self.wait_more(primary, &workers, round, 100 + seed.below(200))?;
        if sabotage && self.files == FileSystem::Ext4 {
            primary.network().cut(adapter(0))?;
            primary.wait("alone", LIMIT)?;
            self.wait_more(primary, &workers, round, 100)?;
        }
        let loss = if sabotage { Loss::Drop } else { random_loss(seed) };
        take_over(primary, other, end, loss)?;
        wait_gone(&device)?;
        self.files.check_after_crash(other, &self.point)?;
        self.files.mount(other, &self.point)?;
        self.check(other, round)?;
        if let Some(old) = round.checked_sub(ROUNDS_KEPT) {
            on(other, &["rm", "-rf", &self.directory(old).display().to_string()])?;
        }
        come_back(primary, other, end)?;
        // Quiet for a moment: both copies and the file system are compared and checked whole.
        self.files.unmount(other, &self.point)?;
        self.files.check(other)?;
        pair.assert_equal()?;
        let (_, primary) = sides(pair, round);
        self.files.mount(primary, &self.point)
    }
}

fn first_kept(round: u64) -> u64 {
    (round + 1).saturating_sub(ROUNDS_KEPT)
}

fn play(stage: &mut Stage, files: FileSystem, volume_bytes: u64) -> Result<()> {
    let sabotage = stage.sabotage;
    let disks = [DiskKind::Faulty, DiskKind::Faulty];
    let options = PairOptions { volume_bytes, disks, frontend: "fuse", ..PairOptions::default() };
    let pair = stage.pair(options)?;
    pair.start_mirrored()?;
    let play =
        Play { files, point: pair.directory().join("mnt"), journals: pair.directory().join("journals") };
    std::fs::create_dir(&play.journals)?;
    files.make(&pair.alpha)?;
    files.mount(&pair.alpha, &play.point)?;
    let count = rounds(3);
    let mut seed = Seed::new(0xf11e + count);
    for round in 0..count {
        play.round(pair, round, &mut seed, sabotage)
            .with_context(|| format!("round {round}, {:?}", End::of_round(round)))?;
    }
    let (primary, _) = sides(pair, count);
    files.unmount(primary, &play.point)
}

fn ext4_over_kills(stage: &mut Stage) -> Result<()> {
    play(stage, FileSystem::Ext4, 256 << 20)
}

fn xfs_over_kills(stage: &mut Stage) -> Result<()> {
    play(stage, FileSystem::Xfs, 320 << 20)
}
