//! The front door for developers: `cargo xtask test` is what continuous integration runs, and every other
//! verb is one part of it, or one tool of the workspace with what it needs installed first.

mod packages;
mod process;
mod suite;
mod tidy;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

use crate::process::Tool;

#[derive(Debug, Parser)]
#[command(name = "cargo xtask", about = "Builds, tests and shows Duplex")]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Everything continuous integration asks for: format, lints, tidy, tests, simulator, cases, crashes, scale
    Test,
    /// The rules of the house that no compiler checks: layers, file sizes, words, SAFETY comments
    Tidy,
    /// The whole product on this one machine: two servers, a failure, a resync, a failover
    Demo {
        /// Build with optimisation (takes longer to build, shows real speed)
        #[arg(long)]
        release: bool,
        /// Handed on to `duplex demo`, such as --keep
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// The acceptance cases, all or by name
    Cases {
        /// Names as in the acceptance list (SFT3-B1 ...), --sabotage, --sabotage-all, --list
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// The deterministic simulator
    Sim {
        /// --seeds N | --seed S | --sweep | --mutants
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Crashes of the real program: under random writes, and at named boundaries of the protocol
    Crash {
        /// --rounds N --seed S | --at all | --at NAME [--role ROLE] [--how kill|power] | --sabotage
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Scale on the real program: a sparse volume of 64 TiB, a log full of cold extents, 64 volumes
    Scale {
        /// huge, cold, many; all when none is given
        args: Vec<String>,
    },
    /// Measurements, optimised build
    Bench {
        /// Names of benchmarks, --json, --trace
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Writes man pages and shell completions
    Man {
        /// Where to write them
        #[arg(default_value = "target/man")]
        directory: String,
    },
    /// Installs the system packages that tests and demo need (as root), or names them
    Packages,
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn run(cli: Cli) -> Result<ExitCode> {
    std::env::set_current_dir(process::workspace_root()?)?;
    match cli.verb {
        Verb::Test => suite::run(),
        Verb::Tidy => tidy::run(),
        Verb::Demo { release, args } => {
            packages::require(packages::DEMO)?;
            let mut words = vec!["demo".to_owned()];
            words.extend(args);
            Tool::new("duplex", "duplex").release(release).hand_over(&words)
        }
        Verb::Cases { args } => {
            packages::require(packages::LAB)?;
            if args.iter().any(|word| word.starts_with("--sabotage")) {
                process::build_without("no-peer-flush", false)?;
            }
            process::build_programs(false)?;
            Tool::new("duplex-tests", "duplex-cases").hand_over(&args)
        }
        Verb::Sim { args } => Tool::new("duplex-tests", "duplex-sim").hand_over(&args),
        Verb::Crash { args } => {
            packages::require(packages::LAB)?;
            process::build_crash_at()?;
            Tool::new("duplex-tests", "duplex-crash").hand_over(&args)
        }
        Verb::Scale { args } => {
            packages::require(packages::LAB)?;
            process::build_programs(false)?;
            Tool::new("duplex-tests", "duplex-scale").hand_over(&args)
        }
        Verb::Bench { args } => {
            packages::require(packages::BENCH)?;
            if args.iter().any(|word| word == "write") && !args.iter().any(|word| word == "--trace") {
                process::build_without("no-dirty-log", true)?;
            }
            process::build_programs(true)?;
            Tool::new("duplex-benches", "duplex-bench").release(true).hand_over(&args)
        }
        Verb::Man { directory } => {
            std::fs::create_dir_all(&directory)?;
            let tool = Tool::new("duplex", "duplex");
            for kind in ["man", "completions"] {
                let made =
                    tool.command(&["generate".to_owned(), kind.to_owned(), directory.clone()]).status()?;
                anyhow::ensure!(made.success(), "`duplex generate {kind} {directory}` failed");
            }
            println!("man pages and completions are in {directory}");
            Ok(ExitCode::SUCCESS)
        }
        Verb::Packages => {
            packages::require(packages::LAB)?;
            packages::require(packages::BENCH)?;
            Ok(ExitCode::SUCCESS)
        }
    }
}
