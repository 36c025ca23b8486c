//! The whole thing on one machine: two servers made of namespaces, a file system on the mirrored device, one server
//! killed after the other, every file checked. It uses the program's public verbs only, so what it shows is what an
//! operator gets.

mod config;
mod files;
mod interrupt;
mod network;
mod run;
mod say;
mod scene;
mod server;
mod story;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use duplex_node::failure::Failure;

use crate::cli::{Common, Demo};
use say::Say;
use story::Story;

/// Room for a file system, its journal and the files.
const LEAST_BYTES: u64 = 128 << 20;
const STEP_BYTES: u64 = 4 << 20;

/// Runs it, or removes what earlier runs left.
pub(crate) fn run(common: &Common, options: &Demo) -> Result<(), Failure> {
    if !rustix::process::geteuid().is_root() {
        return Err(Failure::wrong(
            "duplex demo makes namespaces, loop devices and mounts: run it as root, for example with sudo",
        ));
    }
    if options.size < LEAST_BYTES || !options.size.is_multiple_of(STEP_BYTES) {
        return Err(Failure::wrong(format!(
            "--size {} is not possible; write a multiple of 4MiB from 128MiB on",
            options.size
        )));
    }
    run::require_tools().map_err(|error| Failure::wrong(format!("{error:#}")))?;
    interrupt::watch();
    let base = options.dir.clone().unwrap_or_else(default_base);
    let result = if options.clean { clean(common, &base) } else { show(common, options, &base) };
    result.map_err(|error| Failure::failed(format!("duplex demo: {error:#}")))
}

/// `/var/tmp` lies on a disk where `/tmp` may be memory.
fn default_base() -> PathBuf {
    std::env::var_os("TMPDIR")
        .filter(|dir| !dir.is_empty())
        .map_or_else(|| PathBuf::from("/var/tmp"), PathBuf::from)
}

fn show(common: &Common, options: &Demo, base: &Path) -> Result<()> {
    let mut say = Say::new(common.json);
    let program = std::env::current_exe().context("the program's own path")?;
    let mut stage = Stage::new(scene::make(base, options.size)?);
    let directory = stage.directory.clone();
    // A panic must not keep the stage from being taken away with a word about it.
    let played = catch_unwind(AssertUnwindSafe(|| {
        let mut story = Story::set(&mut say, common, &directory, &program, options.size)?;
        let played = story.play().and_then(|()| {
            if options.keep {
                let primary = story.leave()?;
                return Ok(Some(next(&story, primary, base, &program)));
            }
            story.finish().map(|()| None)
        });
        if played.is_err() {
            for server in &story.servers {
                eprintln!("{}'s log ends with\n{}", server.name, server.log_end());
            }
        }
        played
    }))
    .unwrap_or_else(|_| Err(anyhow!("the demo itself panicked; see above")));
    match played {
        Ok(Some(words)) => {
            say.table();
            say.plain(&words);
            stage.keep = true;
            Ok(())
        }
        Ok(None) => {
            let removed = stage.remove();
            say.table();
            removed?;
            say.plain("\nEverything held. No process, mount, loop device, namespace or file is left.");
            Ok(())
        }
        Err(error) => {
            let removed = stage.remove();
            match removed {
                Ok(()) => Err(error.context("it did not hold (everything was tidied up)")),
                Err(left) => Err(error.context(format!("it did not hold, and {left:#}"))),
            }
        }
    }
}

/// The demo's directory and all that hangs on it; taken away at the end, whatever the end is.
struct Stage {
    directory: PathBuf,
    keep: bool,
}

impl Stage {
    const fn new(directory: PathBuf) -> Self {
        Self { directory, keep: false }
    }

    fn remove(&mut self) -> Result<()> {
        self.keep = true;
        interrupt::begin_tidying();
        scene::remove(&self.directory)
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        if !self.keep
            && let Err(error) = self.remove()
        {
            eprintln!("duplex demo: {error:#}");
        }
    }
}

fn clean(common: &Common, base: &Path) -> Result<()> {
    let say = Say::new(common.json);
    interrupt::begin_tidying();
    let found = scene::abandoned(base)?;
    if found.is_empty() {
        say.plain(&format!("nothing of a demo is left below {}", base.display()));
    }
    for directory in found {
        scene::remove(&directory)?;
        say.plain(&format!("{} and all that hung on it is removed", directory.display()));
    }
    Ok(())
}

/// What to type while the pair is kept.
fn next(story: &Story<'_>, primary: usize, base: &Path, program: &Path) -> String {
    let (now, other) = (&story.servers[primary], &story.servers[1 - primary]);
    let verb = |server: &server::Server| run::show(&server.typed(&[]));
    let netns = other.directory.join("netns");
    let pids: Vec<String> = network::processes(&netns).iter().map(ToString::to_string).collect();
    let lines = [
        format!(
            "\nThe pair goes on running. {} is primary, mounted at {}.",
            now.name,
            now.mount_point().display()
        ),
        "Both servers' verbs, for your shell:".to_owned(),
        format!("  {0}() {{ {1} \"$@\"; }}", now.name, verb(now)),
        format!("  {0}() {{ {1} \"$@\"; }}", other.name, verb(other)),
        "Then, for example:".to_owned(),
        format!("  {} status", now.name),
        format!("  {} events", other.name),
        format!("  kill -9 {}        # {}'s host dies", pids.join(" "), other.name),
        format!("  dd if=/dev/urandom of={}/more bs=1M count=64 conv=fsync", now.mount_point().display()),
        format!("  {} status             # alone, with a dirty log", now.name),
        format!(
            "  setsid nsenter --net={} {} daemon >>{} 2>&1 &",
            netns.display(),
            verb(other),
            other.directory.join("daemon.log").display()
        ),
        format!("  {} status --wait mirrored", now.name),
        format!(
            "  umount {} && {} switchover && sleep 1 && mount {} {}",
            now.mount_point().display(),
            now.name,
            other.device().display(),
            other.mount_point().display()
        ),
        "Remove it all:".to_owned(),
        format!("  {} demo --clean --dir {}", program.display(), base.display()),
    ];
    lines.join("\n")
}
