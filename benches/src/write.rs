//! `bench write`: random 4 KiB writes beside QEMU's mirror.

use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::fio::{self, Sample};
use crate::pair::{Pair, VOLUME};
use crate::qemu::{EXPORT, Mirror};
use crate::scratch::Scratch;
use crate::table::{Bound, Figure, Table};
use crate::trace;

/// How much is measured, and where.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The disk the images go on.
    pub directory: PathBuf,
    /// Of each volume.
    pub size_bytes: u64,
    /// Rounds; each measures everything once.
    pub rounds: usize,
    /// Of one measurement.
    pub seconds: f64,
    /// The program measured.
    pub program: PathBuf,
    /// The same without a dirty log, where it was built.
    pub without_log: Option<PathBuf>,
    /// Writes while calls are counted.
    pub traced_writes: u64,
}

/// The depths compared with QEMU.
const DEPTHS: [u32; 2] = [1, 32];
/// The depths where a stall of one delayed acknowledgement (40 ms) would show.
const STALL_DEPTHS: [u32; 4] = [2, 4, 8, 16];
/// A write that takes this long waited for a timer, not for a disk: half of a delayed acknowledgement.
const STALL_US: f64 = 20_000.0;

/// Measures, and adds the figures.
pub fn run(settings: &Settings, note: &dyn Fn(&str), table: &mut Table) -> Result<()> {
    let scratch = Scratch::new(&settings.directory)?;
    note("starting both pairs and QEMU's mirror");
    let start =
        |name, encryption| Pair::start(&scratch, &settings.program, name, settings.size_bytes, encryption);
    let (ours, tls) = (start("plain", false)?, start("tls", true)?);
    let images =
        [scratch.image("qemu-a", settings.size_bytes)?, scratch.image("qemu-b", settings.size_bytes)?];
    let qemu = Mirror::start(&scratch, "qemu", &images)?;
    for depth in DEPTHS {
        let mut runs: [Vec<Sample>; 3] = [Vec::new(), Vec::new(), Vec::new()];
        for round in 0..settings.rounds {
            note(&format!("depth {depth}, round {} of {}", round + 1, settings.rounds));
            runs[0].push(measure(settings, &ours.socket(), VOLUME, depth, &ours.pids())?);
            runs[1].push(measure(settings, qemu.socket(), EXPORT, depth, &qemu.pids())?);
            runs[2].push(measure(settings, &tls.socket(), VOLUME, depth, &tls.pids())?);
        }
        depth_figures(depth, &runs, table);
    }
    drop(qemu);
    for depth in STALL_DEPTHS {
        note(&format!("depth {depth}: stalls"));
        for (pair, name, text) in [(&ours, "", ""), (&tls, "tls_", ", TLS")] {
            let runs = (0..settings.rounds)
                .map(|_| measure(settings, &pair.socket(), VOLUME, depth, &pair.pids()))
                .collect::<Result<Vec<_>>>()?;
            let name = format!("{name}stall_qd{depth}_p50_us");
            let text = format!("depth {depth}{text}: median latency, us (no stall)");
            let figure = Figure::measured(&name, &text, values(&runs, |run| run.p50_us));
            table.push(figure.bounded(Bound::AtMost(STALL_US)));
        }
    }
    drop(tls);
    alone(settings, &scratch, ours, note, table)
}

fn measure(settings: &Settings, socket: &Path, export: &str, depth: u32, pids: &[u32]) -> Result<Sample> {
    fio::random_writes(socket, export, settings.size_bytes, depth, settings.seconds, pids)
}

fn values(runs: &[Sample], of: impl Fn(&Sample) -> f64) -> Vec<f64> {
    runs.iter().map(of).collect()
}

fn depth_figures(depth: u32, runs: &[Vec<Sample>; 3], table: &mut Table) {
    let least = if depth == 1 { 1.2 } else { 1.4 };
    for ((name, text), runs) in
        [("ours", "ours"), ("qemu", "qemu"), ("tls", "ours, TLS")].into_iter().zip(runs)
    {
        let mut push = |unit: &str, words: &str, of: fn(&Sample) -> f64| {
            let name = format!("{name}_qd{depth}_{unit}");
            table.push(Figure::measured(&name, &format!("depth {depth}, {text}: {words}"), values(runs, of)));
        };
        push("iops", "writes/s", |run| run.iops);
        push("p99_us", "p99, us", |run| run.p99_us);
        push("cpu_us", "CPU per write of both servers, us", |run| run.cpu_us);
    }
    let [ours, qemu, tls] = runs;
    let mut ratio = |name: &str, text: &str, a: &[Sample], of: fn(&Sample) -> f64, bound: Bound| {
        let name = format!("qd{depth}_{name}_ratio");
        let text = format!("depth {depth}: {text} / qemu");
        table.push(Figure::ratio(&name, &text, &values(a, of), &values(qemu, of), bound));
    };
    ratio("iops", "ours", ours, |run| run.iops, Bound::AtLeast(least));
    ratio("tls_iops", "ours with TLS", tls, |run| run.iops, Bound::None);
    ratio("p99", "p99 of ours", ours, |run| run.p99_us, Bound::None);
    let most = if depth == 1 { Bound::None } else { Bound::AtMost(0.5) };
    ratio("cpu", "CPU per write of ours", ours, |run| run.cpu_us, most);
    ratio("tls_cpu", "CPU per write of ours with TLS", tls, |run| run.cpu_us, Bound::None);
}

/// A lone primary, against the same volume without a dirty log.
fn alone(
    settings: &Settings,
    scratch: &Scratch,
    mut ours: Pair,
    note: &dyn Fn(&str),
    table: &mut Table,
) -> Result<()> {
    let Some(program) = &settings.without_log else {
        note("alone: left out, no build without a dirty log (--without-log)");
        return Ok(());
    };
    note("alone: losing both peers");
    let mut bare = Pair::start(scratch, program, "bare", settings.size_bytes, false)?;
    ours.lose_peer()?;
    bare.lose_peer()?;
    let (mut with, mut without) = (Vec::new(), Vec::new());
    for round in 0..settings.rounds {
        note(&format!("alone, round {} of {}", round + 1, settings.rounds));
        with.push(measure(settings, &ours.socket(), VOLUME, 32, &ours.pids())?);
        without.push(measure(settings, &bare.socket(), VOLUME, 32, &bare.pids())?);
    }
    let (with, without) = (values(&with, |run| run.iops), values(&without, |run| run.iops));
    table.push(Figure::measured("alone_qd32_iops", "alone, depth 32: writes/s", with.clone()));
    table.push(Figure::measured("alone_bare_qd32_iops", "alone, no dirty log: writes/s", without.clone()));
    let text = "alone: with / without dirty log";
    table.push(Figure::ratio("alone_log_ratio", text, &with, &without, Bound::AtLeast(0.9)));
    Ok(())
}

/// `bench write --trace`.
pub fn traced(settings: &Settings, note: &dyn Fn(&str), table: &mut Table) -> Result<()> {
    if let Some(why) = trace::unavailable() {
        anyhow::bail!("calls cannot be counted: {why}");
    }
    let scratch = Scratch::new(&settings.directory)?;
    for (encryption, label, text) in [(false, "plain", "TLS off"), (true, "tls", "TLS on")] {
        note(&format!("{text}: {} writes at depth 32 under strace", settings.traced_writes));
        let pair = Pair::start(&scratch, &settings.program, label, settings.size_bytes, encryption)?;
        trace::figures(&scratch, &pair, label, text, settings.traced_writes, table)?;
    }
    Ok(())
}
