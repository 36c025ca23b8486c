//! `bench resync`: a full copy beside QEMU's `sync=full`.

use anyhow::Result;

use crate::pair::Pair;
use crate::qemu::Mirror;
use crate::scratch::Scratch;
use crate::table::{Bound, Figure, Table};
use crate::write::Settings;

/// Measures, and adds the figures.
pub fn run(settings: &Settings, note: &dyn Fn(&str), table: &mut Table) -> Result<()> {
    let scratch = Scratch::new(&settings.directory)?;
    note("starting the pair");
    let pair = Pair::start(&scratch, &settings.program, "plain", settings.size_bytes, false)?;
    let images =
        [scratch.image("qemu-a", settings.size_bytes)?, scratch.image("qemu-b", settings.size_bytes)?];
    let mib = settings.size_bytes as f64 / f64::from(1 << 20);
    let (mut ours, mut theirs): (Vec<f64>, Vec<f64>) = (Vec::new(), Vec::new());
    let (mut ours_cpu, mut theirs_cpu) = (Vec::new(), Vec::new());
    for round in 0..settings.rounds {
        note(&format!("full copy of {mib} MiB, round {} of {}", round + 1, settings.rounds));
        let (seconds, cpu) = pair.copy_everything()?;
        ours.push(mib / seconds);
        ours_cpu.push(cpu as f64 / mib);
        let qemu = Mirror::start(&scratch, "qemu", &images)?;
        theirs.push(mib / qemu.copy_s);
        theirs_cpu.push(qemu.copy_cpu_us as f64 / mib);
    }
    table.push(Figure::measured("ours_copy_mib_s", "full copy, ours: MiB/s", ours.clone()));
    table.push(Figure::measured("qemu_copy_mib_s", "full copy, qemu: MiB/s", theirs.clone()));
    table.push(Figure::measured("ours_copy_cpu_us_per_mib", "full copy, ours: CPU per MiB, us", ours_cpu));
    table.push(Figure::measured("qemu_copy_cpu_us_per_mib", "full copy, qemu: CPU per MiB, us", theirs_cpu));
    let text = "full copy: ours / qemu";
    table.push(Figure::ratio("copy_ratio", text, &ours, &theirs, Bound::AtLeast(1.0)));
    Ok(())
}
