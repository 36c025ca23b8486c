//! `cargo xtask tidy`: the rules of the house that neither compiler nor clippy checks.

mod layers;
mod text;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};

use crate::process;

/// Runs every check and prints what it found.
pub(crate) fn run() -> Result<ExitCode> {
    let found = findings()?;
    for finding in &found {
        println!("{finding}");
    }
    if found.is_empty() {
        println!("tidy: layers, sizes, words and SAFETY comments hold");
        return Ok(ExitCode::SUCCESS);
    }
    println!("tidy: {} findings", found.len());
    Ok(ExitCode::FAILURE)
}

/// Everything that breaks a rule, one line each: the place, what is wrong, what to do.
pub(crate) fn findings() -> Result<Vec<String>> {
    let mut found = layers::check(&process::metadata(true)?)?;
    let mut files = Vec::new();
    collect(Path::new("."), &mut files)?;
    files.sort();
    for path in files {
        let Ok(content) = std::fs::read_to_string(&path) else {
            continue; // not text: fixtures and pictures
        };
        found.extend(text::check(&path, &content));
    }
    Ok(found)
}

/// Every file of the working tree but build products and version control.
fn collect(directory: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let entries =
        std::fs::read_dir(directory).with_context(|| format!("{} cannot be read", directory.display()))?;
    for entry in entries {
        let entry = entry?;
        let kind = entry.file_type()?;
        let name = entry.file_name();
        if kind.is_dir() {
            // Cargo tags its target directories, wherever they are.
            if name != "target" && name != ".git" && !entry.path().join("CACHEDIR.TAG").exists() {
                collect(&entry.path(), files)?;
            }
        } else if kind.is_file() && name != "Cargo.lock" && name != ".git" {
            let path = entry.path();
            files.push(path.strip_prefix(".").map(Path::to_path_buf).unwrap_or(path));
        }
    }
    Ok(())
}
