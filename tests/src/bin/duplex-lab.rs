//! The lab's helper processes; started by the lab, not by people.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use duplex_tests::lab;

#[derive(Debug, Parser)]
#[command(name = "duplex-lab", about = "Helper processes of the test laboratory")]
struct Cli {
    #[command(subcommand)]
    part: Part,
}

#[derive(Debug, Subcommand)]
enum Part {
    /// A disk over FUSE; commands on standard input, which is a socket
    Disk {
        /// The file that holds the platter
        #[arg(long)]
        platter: PathBuf,
        /// Whether unflushed writes are lost in a power cut
        #[arg(long, action = clap::ArgAction::Set)]
        volatile: bool,
    },
    /// Makes the namespaces of a server and starts its init there; orders on standard input, which is a socket
    Host {
        /// A file with the server's boot id
        #[arg(long)]
        boot_id: PathBuf,
    },
    /// The init of a server
    Init {
        /// A file with the server's boot id
        #[arg(long)]
        boot_id: PathBuf,
    },
    /// Holds a device exclusively and keeps writes in flight on it by io_uring
    Holder {
        /// The device
        device: PathBuf,
        /// How many writes of 4 KiB at once
        #[arg(long, default_value_t = 16)]
        depth: u32,
    },
    /// Works on files, each step synced, until it is ended; or checks what is left of such work after a crash
    Files {
        /// Where the files are, a directory of its own
        #[arg(long)]
        directory: PathBuf,
        /// What was begun and synced; outside of that file system
        #[arg(long)]
        journal: PathBuf,
        /// Which random work
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// Only check, and print how many files there are
        #[arg(long)]
        check: bool,
    },
}

fn main() -> ExitCode {
    let done = match Cli::parse().part {
        Part::Disk { platter, volatile } => lab::disk::serve(&platter, volatile),
        Part::Host { boot_id } => lab::host::outer(&boot_id),
        Part::Init { boot_id } => lab::host::init(&boot_id),
        Part::Holder { device, depth } => lab::ringload::run(&device, depth),
        Part::Files { directory, journal, seed, check } => {
            lab::filework::run(&directory, &journal, check, seed)
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("duplex-lab: {error:#}");
            ExitCode::FAILURE
        }
    }
}
