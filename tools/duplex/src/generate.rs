//! Man pages and completions from the definitions.

use std::path::Path;

use clap::CommandFactory;
use clap_complete::Shell;
use duplex_node::failure::Failure;

use crate::cli::{Cli, GenerateKind};

/// Makes them in `dir`.
pub(crate) fn generate(kind: GenerateKind, dir: &Path) -> Result<(), Failure> {
    let failed = |error: std::io::Error| Failure::failed(format!("{}: {error}", dir.display()));
    std::fs::create_dir_all(dir).map_err(failed)?;
    match kind {
        GenerateKind::Man => {
            let mut command = Cli::command();
            command.build();
            pages(&command, dir).map_err(failed)
        }
        GenerateKind::Completions => {
            for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
                clap_complete::generate_to(shell, &mut Cli::command(), "duplex", dir).map_err(failed)?;
            }
            Ok(())
        }
    }
}

/// `duplex.8`, `duplex-status.8`, `duplex-resync-pause.8`: hidden verbs have none.
fn pages(command: &clap::Command, dir: &Path) -> std::io::Result<()> {
    let name = command.get_display_name().unwrap_or_else(|| command.get_name()).replace(' ', "-");
    let mut page = Vec::new();
    clap_mangen::Man::new(command.clone()).section("8").render(&mut page)?;
    std::fs::write(dir.join(format!("{name}.8")), page)?;
    for verb in command.get_subcommands().filter(|verb| !verb.is_hide_set() && verb.get_name() != "help") {
        pages(verb, dir)?;
    }
    Ok(())
}
