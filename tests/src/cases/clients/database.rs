//! PostgreSQL on ext4 on the mirrored device, under pgbench.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};

use super::{End, come_back, random_loss, rounds, sides, take_over};
use crate::cases::{Case, Stage};
use crate::lab::filesystem::{FileSystem, device_of, wait_gone};
use crate::lab::pair::LIMIT;
use crate::lab::postgres::{Bench, Postgres, SharedLedger, lock};
use crate::lab::{DiskKind, Pair, PairOptions, Seed};

pub(super) const CASES: &[Case] = &[
    Case {
        name: "CLIENT-1",
        sabotage: "the cable is pulled before the primary's host is killed, so that an old copy is promoted",
        run: database_over_a_kill,
        ends_mirrored: true,
        limit_s: 300,
    },
    Case {
        name: "CLIENT-2",
        sabotage: "the other server's disk answers flushes without carrying them out, and loses power too",
        run: database_over_power_cuts,
        ends_mirrored: true,
        limit_s: 300,
    },
    Case {
        name: "CLIENT-3",
        sabotage: "the holder is killed with the daemon",
        run: database_over_a_dead_daemon,
        ends_mirrored: true,
        limit_s: 300,
    },
];

const FILES: FileSystem = FileSystem::Ext4;
const VOLUME_BYTES: u64 = 256 << 20;

/// A pair with a database on its primary.
struct Play {
    point: PathBuf,
    database: Postgres,
    ledger: SharedLedger,
}

fn prepare(stage: &mut Stage, disks: DiskKind) -> Result<(&mut Pair, Play)> {
    let options = PairOptions {
        volume_bytes: VOLUME_BYTES,
        disks: [disks, disks],
        frontend: "fuse",
        ..PairOptions::default()
    };
    let pair = stage.pair(options)?;
    pair.start_mirrored()?;
    let point = pair.directory().join("mnt");
    FILES.make(&pair.alpha)?;
    FILES.mount(&pair.alpha, &point)?;
    let mut database = Postgres::new(&point, &pair.directory().join("pg"))?;
    database.create(&pair.alpha)?;
    Ok((pair, Play { point, database, ledger: SharedLedger::default() }))
}

impl Play {
    fn committed(&self) -> Result<u64> {
        Ok(lock(&self.ledger)?.total())
    }

    /// Every commit is there, and the whole database can be read.
    fn check(&self) -> Result<()> {
        let there = self.database.check_commits(&*lock(&self.ledger)?)?;
        Stage::note(&format!("{} transactions seen committed, {there} are there", self.committed()?));
        self.database.check_all()
    }

    /// One round: the primary ends under pgbench, the other goes on, the first returns.
    fn round(
        &mut self,
        pair: &mut Pair,
        round: u64,
        end: End,
        seed: &mut Seed,
        sabotage: bool,
    ) -> Result<()> {
        let (primary, other) = sides(pair, round);
        let device = device_of(primary)?;
        let bench = Bench::start(&self.database, &self.ledger);
        if sabotage && end != End::Kill {
            other.faulty()?.lie_about_flush(true)?;
        }
        bench.wait_more(150 + seed.below(300))?;
        if sabotage && end == End::Kill {
            primary.network().cut(crate::lab::pair::adapter(0))?;
            primary.wait("alone", LIMIT)?;
            bench.wait_more(300)?;
        }
        let loss = if sabotage { crate::lab::disk::Loss::Drop } else { random_loss(seed) };
        take_over(primary, other, end, loss)?;
        bench.broken()?;
        wait_gone(&device)?;
        FILES.check_after_crash(other, &self.point)?;
        FILES.mount(other, &self.point)?;
        self.database.start(other).context("PostgreSQL after the failure")?;
        self.check().context("after the failure")?;
        let bench = Bench::start(&self.database, &self.ledger);
        let back = come_back(primary, other, end);
        let went_on = bench.finish();
        back?;
        went_on?;
        self.check().context("after the return")
    }

    /// Stops the database in order, unmounts and checks the file system.
    fn end(mut self, pair: &mut Pair, rounds: u64) -> Result<()> {
        let (primary, _) = sides(pair, rounds);
        self.database.stop(primary)?;
        FILES.unmount(primary, &self.point)?;
        FILES.check(primary)
    }
}

fn play(stage: &mut Stage, disks: DiskKind, ends: &[End]) -> Result<()> {
    let sabotage = stage.sabotage;
    let (pair, mut play) = prepare(stage, disks)?;
    let count = rounds(ends.len() as u64);
    let mut seed = Seed::new(0xda7a + count);
    for round in 0..count {
        let end = ends[round as usize % ends.len()];
        play.round(pair, round, end, &mut seed, sabotage)
            .with_context(|| format!("round {round}, {end:?}"))?;
    }
    play.end(pair, count)
}

fn database_over_a_kill(stage: &mut Stage) -> Result<()> {
    play(stage, DiskKind::Loop, &[End::Kill])
}

fn database_over_power_cuts(stage: &mut Stage) -> Result<()> {
    play(stage, DiskKind::Faulty, &[End::PowerCutOfBoth, End::PowerCut])
}

fn database_over_a_dead_daemon(stage: &mut Stage) -> Result<()> {
    let sabotage = stage.sabotage;
    let (pair, play) = prepare(stage, DiskKind::Loop)?;
    let bench = Bench::start(&play.database, &play.ledger);
    let result: Result<()> = (|| {
        for _ in 0..rounds(3) {
            bench.wait_more(200)?;
            if sabotage {
                pair.alpha.kill_holder()?;
            }
            pair.alpha.kill_daemon()?;
            pair.alpha.start_daemon()?;
            pair.alpha.wait("role=primary", LIMIT)?;
            bench.wait_more(200)?;
            pair.wait_mirrored()?;
        }
        Ok(())
    })();
    let finished = bench.finish();
    result?;
    finished?;
    let log = play.database.log();
    let noticed =
        log.lines().find(|line| ["ERROR:", "FATAL:", "PANIC:"].iter().any(|word| line.contains(word)));
    // Until the database first answers it refuses clients.
    let noticed = noticed.filter(|line| !line.contains("is starting up"));
    ensure!(noticed.is_none(), "PostgreSQL noticed: {noticed:?}");
    play.check()?;
    play.end(pair, 0)
}
