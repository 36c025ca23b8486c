//! Runs the scale rounds, one after the other: `NAME ok 1.9 s` · `NAME FAIL why`.

use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use duplex_tests::{lab, scale};

#[derive(Debug, Parser)]
#[command(name = "duplex-scale", about = "Scale on the real program: 64 TiB, cold extents, many volumes")]
struct Cli {
    /// huge, cold, many; all when none is given
    names: Vec<String>,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Some(why) = lab::unavailable() {
        eprintln!("duplex-scale: {why}");
        return ExitCode::from(2);
    }
    let known = |name: &String| scale::ROUNDS.iter().any(|(round, _)| round == name);
    if let Some(name) = cli.names.iter().find(|name| !known(name)) {
        eprintln!("duplex-scale: there is no round {name}; there are huge, cold and many");
        return ExitCode::from(2);
    }
    // The disks are files in memory: a run that is killed must not leave them mounted.
    if let Err(error) = lab::host::own_mounts() {
        eprintln!("duplex-scale: {error:#}");
        return ExitCode::from(2);
    }
    let mut held = true;
    for (name, run) in scale::ROUNDS {
        if !cli.names.is_empty() && !cli.names.iter().any(|wanted| wanted == name) {
            continue;
        }
        let start = Instant::now();
        match run() {
            Ok(()) => println!("{name} ok {:.1} s", start.elapsed().as_secs_f64()),
            Err(error) => {
                println!("{name} FAIL {error:#}");
                held = false;
            }
        }
    }
    if held { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
