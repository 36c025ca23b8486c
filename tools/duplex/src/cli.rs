//! Everything that can be typed. Man pages and completions are made from these definitions.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum, ValueHint};
use duplex_core::ids::Generation;
use duplex_node::config::{DEFAULT_CONFIG, DEFAULT_RUN_DIR};
use duplex_node::control::api::Wait;

/// Mirrors the disks of a running server onto a second one.
#[derive(Parser, Debug)]
#[command(name = "duplex", version, about, propagate_version = true, arg_required_else_help = true)]
#[command(
    after_help = "Exit codes: 0 yes, done · 1 no, refused by the state · 2 wrong use or configuration · 3 no daemon · \
                  4 timed out · 5 failed (I/O or internal)"
)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) common: Common,
    #[command(subcommand)]
    pub(crate) verb: Verb,
}

/// Known to every verb.
#[derive(Args, Debug, Clone)]
pub(crate) struct Common {
    /// The configuration, the same file on both servers
    #[arg(long, global = true, value_name = "FILE", default_value = DEFAULT_CONFIG, value_hint = ValueHint::FilePath)]
    pub(crate) config: PathBuf,
    /// Which server this is [default: the host name]
    #[arg(long, global = true, value_name = "NAME")]
    pub(crate) server: Option<String>,
    /// Sockets and device links; the control socket is DIR/control
    #[arg(long, global = true, value_name = "DIR", default_value = DEFAULT_RUN_DIR, value_hint = ValueHint::DirPath)]
    pub(crate) run_dir: PathBuf,
    /// Answer in JSON
    #[arg(long, global = true)]
    pub(crate) json: bool,
}

#[derive(Subcommand, Debug)]
pub(crate) enum Verb {
    /// Check configuration and machine: every problem with file, line, key and fix; changes nothing
    Check,
    /// The secret that both servers share
    Secret {
        #[command(subcommand)]
        verb: SecretVerb,
    },
    /// Write fresh metadata for volumes on this server
    Create(Create),
    /// Run this server
    Daemon(Daemon),
    /// Keep the devices while the daemon restarts (started by the daemon)
    Holder,
    /// First start of a new pair: this server becomes primary, the peer its copy
    Activate,
    /// Both servers at a glance
    Status(Status),
    /// What happened and why
    Events(Events),
    /// Make this server primary
    Promote(Promote),
    /// Stop being primary
    Demote(Force),
    /// Exchange the roles of the two servers
    Switchover(Force),
    /// Let the mirror link try again
    Connect,
    /// Give the mirror link up until `connect`
    Disconnect,
    /// Give the local copy of a volume up, to replace its disk while running
    Detach(VolumeName),
    /// Take a volume's (new) disk again
    Attach(VolumeName),
    /// Watch and steer the resync; an interrupted one keeps every bit
    Resync {
        #[command(subcommand)]
        verb: Option<ResyncVerb>,
    },
    /// What would be copied where, by which rule, and what would be lost
    Explain {
        /// One volume [default: all]
        volume: Option<String>,
    },
    /// After a split brain: save the victim's own blocks, then let it resync
    Resolve {
        /// The server that gives up what it wrote alone
        #[arg(long, value_name = "SERVER")]
        victim: String,
    },
    /// The metadata of a volume, readable, also without a daemon; or blocks saved by `resolve`
    Dump(Dump),
    /// Compare the data of two backings of stopped servers
    Compare {
        /// One backing
        #[arg(value_hint = ValueHint::FilePath)]
        file_a: PathBuf,
        /// The other
        #[arg(value_hint = ValueHint::FilePath)]
        file_b: PathBuf,
    },
    /// Orderly stop; hands over first if this is the primary
    Down,
    /// The whole thing on one machine, in namespaces (as root)
    Demo(Demo),
    /// Man pages and completions from these definitions
    #[command(hide = true)]
    Generate {
        /// What to make
        kind: GenerateKind,
        /// Where to
        #[arg(value_hint = ValueHint::DirPath)]
        dir: PathBuf,
    },
    /// Run a witness (not in this version)
    #[command(hide = true)]
    Witness(Later),
    /// Reverse the last switchover (not in this version)
    #[command(hide = true)]
    Switchback(Later),
    /// Let a server kept out by the flap gate try again (not in this version)
    #[command(hide = true)]
    Clear(Later),
    /// Compare both copies online (not in this version)
    #[command(hide = true)]
    Verify(Later),
    /// Live terminal monitor (not in this version)
    #[command(hide = true)]
    Top(Later),
}

#[derive(Subcommand, Debug)]
pub(crate) enum SecretVerb {
    /// Make a new secret, mode 0600; never overwrites
    New {
        /// The file to make
        #[arg(value_hint = ValueHint::FilePath)]
        file: PathBuf,
    },
}

#[derive(Args, Debug)]
pub(crate) struct Create {
    /// The volumes' names
    #[arg(required = true, value_name = "VOLUME")]
    pub(crate) volumes: Vec<String>,
    /// Give up whatever the backing holds
    #[arg(long, conflicts_with = "keep_data")]
    pub(crate) overwrite_data: bool,
    /// Bring the backing's data along; needs metadata = "FILE"
    #[arg(long)]
    pub(crate) keep_data: bool,
}

#[derive(Args, Debug)]
pub(crate) struct Daemon {
    /// How log lines look
    #[arg(long, value_name = "FORMAT", default_value = "text")]
    pub(crate) log: LogFormat,
    /// Of test builds
    #[cfg(feature = "crash-at")]
    #[command(flatten)]
    pub(crate) crash: Crash,
}

/// Where a test build stops dead.
#[cfg(feature = "crash-at")]
#[derive(Args, Debug)]
pub(crate) struct Crash {
    /// Stop dead at this boundary, the first time or @ which time, from 1; `help` lists all
    #[arg(long, value_name = "NAME[@TIMES]")]
    pub(crate) crash_at: Option<String>,
    /// `kill`: kill itself; `stop`: stop itself
    #[arg(long, value_name = "HOW", default_value = "kill")]
    pub(crate) crash_how: duplex_node::crash_at::How,
    /// Times count only while this file is there
    #[arg(long, value_name = "FILE")]
    pub(crate) crash_armed_by: Option<PathBuf>,
    /// Make this file at the boundary
    #[arg(long, value_name = "FILE")]
    pub(crate) crash_marker: Option<PathBuf>,
    /// Acknowledge blocks of the activity log and do not write them
    #[arg(long)]
    pub(crate) lose_log_writes: bool,
}

#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum LogFormat {
    /// One line each; without time and colour where the journal adds them
    Text,
    /// One JSON object each
    Json,
}

#[derive(Args, Debug)]
pub(crate) struct Status {
    /// Wait until the server is in this state, or has `role=ROLE`
    #[arg(long, value_name = "STATE", value_parser = parse_wait)]
    pub(crate) wait: Option<Wait>,
    /// Longest wait in seconds [default: for ever]
    #[arg(long, value_name = "S", value_parser = parse_seconds)]
    pub(crate) timeout: Option<Duration>,
}

#[derive(Args, Debug)]
pub(crate) struct Events {
    /// Go on with what happens from now on
    #[arg(long, short)]
    pub(crate) follow: bool,
    /// Not older than this: 2026-01-31T12:00:00Z, or 10m, 2h, 3d ago
    #[arg(long, value_name = "TIME", value_parser = parse_since)]
    pub(crate) since: Option<jiff::Timestamp>,
}

#[derive(Args, Debug)]
pub(crate) struct Promote {
    /// I know that the peer is down: this copy was mirrored when it was lost
    #[arg(long, conflicts_with = "force")]
    pub(crate) peer_is_down: bool,
    /// Data may be lost: this server's generation, as `duplex explain` shows it
    #[arg(long, value_name = "GENERATION")]
    pub(crate) force: Option<Generation>,
}

#[derive(Args, Debug)]
pub(crate) struct Force {
    /// Even while the device is in use: open requests get an I/O error
    #[arg(long)]
    pub(crate) force: bool,
}

#[derive(Args, Debug)]
pub(crate) struct VolumeName {
    /// The volume's name
    pub(crate) volume: String,
}

#[derive(Subcommand, Debug)]
pub(crate) enum ResyncVerb {
    /// Stop copying; every bit stays
    Pause,
    /// Go on copying
    Resume,
    /// Weight against clients
    Priority {
        /// The weight
        priority: Priority,
    },
    /// Upper bound in bytes a second: 50MiB; 0 = none
    MaxRate {
        /// The bound
        #[arg(value_parser = parse_size)]
        bytes_per_s: u64,
    },
    /// Copy on demand
    Start {
        /// Everything of this volume
        #[arg(long, value_name = "VOLUME")]
        full: String,
        /// The server that is overwritten
        #[arg(long, value_name = "SERVER")]
        target: String,
        /// Show the progress until it is done
        #[arg(long)]
        follow: bool,
    },
}

#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Priority {
    /// One chunk at a time while clients work
    Low,
    /// Yields to clients
    Normal,
    /// As if there were no clients
    High,
}

#[derive(Args, Debug)]
pub(crate) struct Dump {
    /// The volume's name
    #[arg(required_unless_present = "saved", conflicts_with = "saved")]
    pub(crate) volume: Option<String>,
    /// Blocks that `resolve` saved
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) saved: Option<PathBuf>,
    /// Write these bytes of the volume to the standard output
    #[arg(long, value_name = "OFFSET:LENGTH", requires = "saved", conflicts_with_all = ["onto", "volume"], value_parser = parse_range)]
    pub(crate) extract: Option<(u64, u64)>,
    /// Put every saved block into this file
    #[arg(long, value_name = "FILE", requires = "saved", conflicts_with = "volume", value_hint = ValueHint::FilePath)]
    pub(crate) onto: Option<PathBuf>,
}

#[derive(Args, Debug)]
pub(crate) struct Demo {
    /// Leave the pair running and say what to type next
    #[arg(long)]
    pub(crate) keep: bool,
    /// Where the disks' files go [default: $TMPDIR, else /var/tmp]
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) dir: Option<PathBuf>,
    /// Size of each disk
    #[arg(long, value_name = "SIZE", default_value = "1GiB", value_parser = parse_size)]
    pub(crate) size: u64,
    /// Remove what kept or killed demos left behind, and do nothing else
    #[arg(long, conflicts_with_all = ["keep", "size"])]
    pub(crate) clean: bool,
}

#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum GenerateKind {
    /// One page a verb, section 8
    Man,
    /// bash, zsh, fish
    Completions,
}

/// A verb of a later version takes anything and refuses.
#[derive(Args, Debug)]
pub(crate) struct Later {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, hide = true)]
    pub(crate) _rest: Vec<String>,
}

fn parse_wait(text: &str) -> Result<Wait, String> {
    text.parse()
}

fn parse_seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 =
        text.trim_end_matches('s').parse().map_err(|_| "is not a number of seconds".to_owned())?;
    Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())
}

fn parse_size(text: &str) -> Result<u64, String> {
    duplex_node::config::parse_size(text).ok_or_else(|| "write bytes, or 64MiB, 1GiB, 2TiB".to_owned())
}

fn parse_range(text: &str) -> Result<(u64, u64), String> {
    let parts = text.split_once(':').and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)));
    let wrong = || "write OFFSET:LENGTH in bytes".to_owned();
    let (offset, length): (u64, u64) = parts.ok_or_else(wrong)?;
    if length == 0 || offset.checked_add(length).is_none() { Err(wrong()) } else { Ok((offset, length)) }
}

fn parse_since(text: &str) -> Result<jiff::Timestamp, String> {
    let wrong = || "write a time such as 2026-01-31T12:00:00Z, or 30s, 10m, 2h, 3d ago".to_owned();
    if let Ok(time) = text.parse::<jiff::Timestamp>() {
        return Ok(time);
    }
    if let Ok(local) = text.parse::<jiff::civil::DateTime>() {
        let zoned = local.to_zoned(jiff::tz::TimeZone::system()).map_err(|_| wrong())?;
        return Ok(zoned.timestamp());
    }
    let number = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let count: i64 = number.parse().map_err(|_| wrong())?;
    let unit_s: i64 = match &text[number.len()..] {
        "s" => 1,
        "m" | "min" => 60,
        "h" => 3600,
        "d" => 86_400,
        _ => return Err(wrong()),
    };
    let ago = count.checked_mul(unit_s).filter(|seconds| *seconds >= 0).ok_or_else(wrong)?;
    let back = jiff::SignedDuration::from_secs(ago);
    jiff::Timestamp::now().checked_sub(back).map_err(|_| wrong())
}
