//! Commands, answers and exit codes.

use duplex_core::ids::{Generation, ServerName};
use duplex_core::mirror::api::Priority;
use serde::{Deserialize, Serialize};

use super::status::{Role, State, Status};

/// Exit codes of the program.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(u8)]
pub enum Exit {
    /// Yes, done.
    Done = 0,
    /// No, or refused by the state.
    Refused = 1,
    /// Wrong use or wrong configuration.
    Wrong = 2,
    /// No daemon answers.
    NoDaemon = 3,
    /// Timed out.
    TimedOut = 4,
    /// Failed: I/O or internal.
    Failed = 5,
}

impl Exit {
    /// The number.
    pub const fn code(self) -> u8 {
        self as u8
    }
}

/// How a promotion is justified.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "how", content = "generation")]
pub enum PromoteMode {
    /// In a session: nobody serves, or the primary yields.
    Plain,
    /// The operator testifies that the peer is down.
    PeerIsDown,
    /// Data may be lost; the operator typed this server's generation.
    Force(Generation),
}

/// What the operator wants done.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "verb", deny_unknown_fields)]
pub enum Command {
    /// First start of a new pair: this server becomes primary.
    Activate,
    /// Become primary.
    Promote {
        /// By which right.
        mode: PromoteMode,
    },
    /// Stop being primary.
    Demote {
        /// Answer open requests with EIO instead of refusing while the device is in use.
        force: bool,
    },
    /// Exchange roles.
    Switchover {
        /// As for `demote`.
        force: bool,
    },
    /// Let the mirror link try again.
    Connect,
    /// Give the mirror link up and keep it so.
    Disconnect,
    /// Give the local copy of a volume up (replace a disk).
    Detach {
        /// Its name.
        volume: String,
    },
    /// Take the (new) backing of a volume again.
    Attach {
        /// Its name.
        volume: String,
    },
    /// Stop copying; every bit stays.
    ResyncPause,
    /// Go on copying.
    ResyncResume,
    /// Weight of the resync against clients.
    ResyncPriority {
        /// The weight.
        priority: Priority,
    },
    /// Upper bound of the resync.
    ResyncMaxRate {
        /// Bytes in a second; 0 = none.
        max_bytes_per_s: u64,
    },
    /// Copy everything on demand.
    ResyncStartFull {
        /// The volume's name.
        volume: String,
        /// The server that is overwritten.
        target: ServerName,
    },
    /// What would be copied where, and what would be lost.
    Explain {
        /// One volume; `None` = all.
        volume: Option<String>,
    },
    /// The victim of a split brain gives up its own blocks, which are saved first.
    Resolve {
        /// Which server.
        victim: ServerName,
    },
    /// The metadata of a volume, readable.
    Dump {
        /// Its name.
        volume: String,
    },
    /// Orderly stop; hands over first when this is the primary and the peer is mirrored.
    Down,
}

impl Command {
    /// As it was typed, for the record; `None` where nothing is to change.
    pub fn typed(&self) -> Option<String> {
        Some(match self {
            Self::Explain { .. } | Self::Dump { .. } => return None,
            Self::Activate | Self::Connect | Self::Disconnect | Self::Down => self.verb().to_owned(),
            Self::Promote { mode: PromoteMode::Plain } => "promote".to_owned(),
            Self::Promote { mode: PromoteMode::PeerIsDown } => "promote --peer-is-down".to_owned(),
            Self::Promote { mode: PromoteMode::Force(generation) } => format!("promote --force {generation}"),
            Self::Demote { force } | Self::Switchover { force } => {
                format!("{}{}", self.verb(), if *force { " --force" } else { "" })
            }
            Self::Detach { volume } | Self::Attach { volume } => format!("{} {volume}", self.verb()),
            Self::ResyncPause => "resync pause".to_owned(),
            Self::ResyncResume => "resync resume".to_owned(),
            Self::ResyncPriority { priority } => format!("resync priority {}", priority.word()),
            Self::ResyncMaxRate { max_bytes_per_s } => format!("resync max-rate {max_bytes_per_s}"),
            Self::ResyncStartFull { volume, target } => {
                format!("resync start --full {volume} --target {target}")
            }
            Self::Resolve { victim } => format!("resolve --victim {victim}"),
        })
    }

    /// The operator's word for it.
    pub const fn verb(&self) -> &'static str {
        match self {
            Self::Activate => "activate",
            Self::Promote { .. } => "promote",
            Self::Demote { .. } => "demote",
            Self::Switchover { .. } => "switchover",
            Self::Connect => "connect",
            Self::Disconnect => "disconnect",
            Self::Detach { .. } => "detach",
            Self::Attach { .. } => "attach",
            Self::ResyncPause
            | Self::ResyncResume
            | Self::ResyncPriority { .. }
            | Self::ResyncMaxRate { .. }
            | Self::ResyncStartFull { .. } => "resync",
            Self::Explain { .. } => "explain",
            Self::Resolve { .. } => "resolve",
            Self::Dump { .. } => "dump",
            Self::Down => "down",
        }
    }
}

/// What became of a request.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "result")]
pub enum Answer {
    /// Done.
    Ok {
        /// One sentence, or a page for `explain` and `dump`.
        text: String,
        /// The same for programs, where there is more to say.
        data: Option<serde_json::Value>,
    },
    /// Refused by the state, or by who asked.
    Refused {
        /// Stable word.
        code: String,
        /// In a sentence, with the fix.
        text: String,
    },
    /// The request makes no sense: unknown volume, bad value.
    Wrong {
        /// In a sentence, with the fix.
        text: String,
    },
    /// It did not happen in time.
    TimedOut {
        /// In a sentence.
        text: String,
    },
    /// The daemon is going down; the request was not carried out.
    Stopping {
        /// In a sentence.
        text: String,
    },
    /// I/O or internal failure.
    Failed {
        /// In a sentence.
        text: String,
    },
}

impl Answer {
    /// Done, with a sentence.
    pub fn ok(text: impl Into<String>) -> Self {
        Self::Ok { text: text.into(), data: None }
    }

    /// Refused.
    pub fn refused(code: impl Into<String>, text: impl Into<String>) -> Self {
        Self::Refused { code: code.into(), text: text.into() }
    }

    /// What the program exits with.
    pub const fn exit(&self) -> Exit {
        match self {
            Self::Ok { .. } => Exit::Done,
            Self::Refused { .. } => Exit::Refused,
            Self::Wrong { .. } => Exit::Wrong,
            Self::TimedOut { .. } => Exit::TimedOut,
            Self::Stopping { .. } => Exit::NoDaemon,
            Self::Failed { .. } => Exit::Failed,
        }
    }

    /// The sentence.
    pub fn text(&self) -> &str {
        match self {
            Self::Ok { text, .. }
            | Self::Refused { text, .. }
            | Self::Wrong { text }
            | Self::TimedOut { text }
            | Self::Stopping { text }
            | Self::Failed { text } => text,
        }
    }
}

impl From<Result<String, duplex_core::pair::api::Refusal>> for Answer {
    fn from(result: Result<String, duplex_core::pair::api::Refusal>) -> Self {
        match result {
            Ok(text) => Self::ok(text),
            Err(refusal) => Self::refused(refusal.code, refusal.text),
        }
    }
}

/// Which way data would go, for `explain`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Direction {
    /// Nothing would be copied.
    None,
    /// From this server to its peer.
    ToPeer,
    /// From the peer to this server.
    FromPeer,
    /// Both wrote alone: nothing is copied until `resolve`.
    SplitBrain,
    /// The session would be refused.
    Refused,
    /// The peer was not heard: it depends on it.
    Unknown,
}

/// `data` of an answer to `explain`: one volume.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Explanation {
    /// The volume's name.
    pub volume: String,
    /// The rule that decides, as in the protocol: `descends (D9)`; `None` while the peer was never heard.
    pub rule: Option<String>,
    /// Which way.
    pub direction: Direction,
    /// Everything, not the marked blocks only.
    pub full: bool,
    /// Bytes that would be copied, as far as this server knows.
    pub copy_bytes: u64,
    /// Bytes written on one server only that would be overwritten.
    pub lost_bytes: u64,
    /// This copy's generation: what `promote --force` wants to see.
    pub generation: Option<Generation>,
    /// In a sentence.
    pub text: String,
}

impl Explanation {
    /// The answer to `explain`: a page for people, the structure for programs.
    pub fn answer(all: &[Self]) -> Answer {
        let mut page = String::new();
        for one in all {
            let rule = one.rule.as_deref().unwrap_or("-");
            let generation = one.generation.map_or_else(|| "-".to_owned(), |id| id.to_string());
            page.push_str(&format!(
                "{}\n  rule        {rule}\n  copy        {} bytes{}\n  lost        {} bytes\n  generation  {generation}\n  {}\n",
                one.volume,
                one.copy_bytes,
                if one.full { " (everything)" } else { "" },
                one.lost_bytes,
                one.text
            ));
        }
        match serde_json::to_value(all) {
            Ok(data) => Answer::Ok { text: page.trim_end().to_owned(), data: Some(data) },
            Err(error) => Answer::Failed { text: format!("cannot write the explanation: {error}") },
        }
    }
}

/// What `status --wait` waits for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Wait {
    /// A state of this server.
    State(State),
    /// A role of this server.
    Role(Role),
}

impl Wait {
    /// True when the status shows it.
    pub fn holds(self, status: &Status) -> bool {
        match self {
            Self::State(state) => status.state == state,
            Self::Role(role) => status.role == role,
        }
    }
}

impl std::fmt::Display for Wait {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::State(state) => f.write_str(state.word()),
            Self::Role(role) => write!(f, "role={}", role.word()),
        }
    }
}

impl std::str::FromStr for Wait {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let state = text.strip_prefix("state=").unwrap_or(text);
        if let Some(state) = State::ALL.into_iter().find(|known| known.word() == state) {
            return Ok(Self::State(state));
        }
        let role =
            text.strip_prefix("role=").and_then(|role| Role::ALL.into_iter().find(|r| r.word() == role));
        role.map(Self::Role).ok_or_else(|| {
            let states: Vec<&str> = State::ALL.iter().map(|state| state.word()).collect();
            format!(
                "is not a state; write one of {}, or role=primary, role=secondary, role=none",
                states.join(", ")
            )
        })
    }
}
