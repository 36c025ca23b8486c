//! The one program: the daemon and everything an operator types.

mod cli;
mod demo;
mod generate;
mod logging;
mod output;
mod progress;
mod render;
mod verbs;

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;

use cli::Cli;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are answers, everything else is wrong use.
            let code = if error.use_stderr() { 2 } else { 0 };
            let _ = error.print();
            return ExitCode::from(code);
        }
    };
    match verbs::run(cli) {
        Ok(exit) => ExitCode::from(exit.code()),
        Err(failure) => {
            // Also where nobody reads it any more.
            let _ = writeln!(std::io::stderr(), "{}", failure.text);
            ExitCode::from(failure.exit.code())
        }
    }
}
