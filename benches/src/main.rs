//! `duplex-bench NAME…`: measurements beside the peers. Exit code 1 if a bound does not hold.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, ValueEnum};
use duplex_benches::process::beside;
use duplex_benches::table::Table;
use duplex_benches::write::Settings;
use duplex_benches::{resync, write};

#[derive(Debug, Parser)]
#[command(name = "duplex-bench", about = "Measures Duplex beside QEMU's mirror")]
struct Cli {
    /// What to measure
    #[arg(required = true)]
    names: Vec<Name>,
    /// One JSON object: median and runs of each figure
    #[arg(long)]
    json: bool,
    /// Count the volume threads' system calls instead of time
    #[arg(long)]
    trace: bool,
    /// Rounds; the median of them counts
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Length of one measurement of writes
    #[arg(long, default_value_t = 3.0, value_name = "S")]
    seconds: f64,
    /// Size of each volume in MiB [default: 512 for write, 2048 for resync]
    #[arg(long, value_name = "MIB")]
    size: Option<u64>,
    /// Where the images go: on the disk to measure
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// The program to measure [default: beside this one]
    #[arg(long, value_name = "FILE")]
    program: Option<PathBuf>,
    /// The program built with `--features no-dirty-log` [default: duplex-no-dirty-log beside it]
    #[arg(long, value_name = "FILE")]
    without_log: Option<PathBuf>,
    /// Writes counted under --trace
    #[arg(long, default_value_t = 20_000, value_name = "N")]
    writes: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Name {
    /// 4 KiB random writes at several depths
    Write,
    /// A full copy
    Resync,
}

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::from(5)
        }
    }
}

fn run(cli: &Cli) -> Result<bool> {
    let mut table = Table::default();
    let note = |text: &str| eprintln!("bench: {text}");
    for name in &cli.names {
        let settings = settings(cli, *name)?;
        match (name, cli.trace) {
            (Name::Write, false) => write::run(&settings, &note, &mut table)?,
            (Name::Write, true) => write::traced(&settings, &note, &mut table)?,
            (Name::Resync, _) => resync::run(&settings, &note, &mut table)?,
        }
    }
    if cli.json {
        println!("{}", table.json());
    } else {
        print!("{}", table.text());
    }
    Ok(table.holds())
}

fn settings(cli: &Cli, name: Name) -> Result<Settings> {
    let default_mib = match name {
        Name::Write => 512,
        Name::Resync => 2048,
    };
    let program = match &cli.program {
        Some(program) => program.clone(),
        None => beside("duplex")?,
    };
    let bare = program.with_file_name("duplex-no-dirty-log");
    let bare = bare.is_file().then_some(bare);
    Ok(Settings {
        directory: cli.dir.clone().unwrap_or_else(std::env::temp_dir),
        size_bytes: cli.size.unwrap_or(default_mib) << 20,
        rounds: cli.rounds.max(1),
        seconds: cli.seconds,
        program,
        without_log: cli.without_log.clone().or(bare),
        traced_writes: cli.writes.max(1),
    })
}
