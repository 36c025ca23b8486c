//! What happened and why, kept in a bounded file that survives restarts.

mod log;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use duplex_core::event::Event;
use duplex_core::ids::{Epoch, ServerName};
use serde::{Deserialize, Serialize};

pub use log::{EventLog, EventLogError};

use crate::control::status::Time;

/// One event as it stands in the file and goes to `duplex events --json`.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct EventRecord {
    /// Counts this server's events; never reused.
    pub sequence: u64,
    /// When, by the wall clock.
    pub time: Time,
    /// Whose.
    pub server: ServerName,
    /// Stable word.
    pub kind: String,
    /// One sentence.
    pub text: String,
    /// The rule or cause that decided.
    pub reason: String,
    /// The newest epoch known here.
    pub epoch: Epoch,
    /// State before; `None` where no state belongs to it.
    pub state_before: Option<String>,
    /// And after.
    pub state_after: Option<String>,
    /// The peer's state as last heard.
    pub peer_state: Option<String>,
    /// What was seen.
    pub evidence: BTreeMap<String, String>,
    /// Fields of the kind.
    #[serde(flatten)]
    pub fields: BTreeMap<String, serde_json::Value>,
}

/// Names a field of a kind must not take.
const OWN_FIELDS: [&str; 11] = [
    "sequence",
    "time",
    "server",
    "kind",
    "text",
    "reason",
    "epoch",
    "state_before",
    "state_after",
    "peer_state",
    "evidence",
];

impl EventRecord {
    /// An event with its time and number. Fields of the kind that are decimal numbers become numbers; one
    /// named as a field of every event is kept as `KIND_NAME`.
    pub fn new(event: Event, sequence: u64, time: Time) -> Self {
        let word = |text: String| if text.is_empty() { None } else { Some(text) };
        let mut fields = BTreeMap::new();
        for (name, value) in event.fields {
            let number = value.parse::<u64>().ok().filter(|number| number.to_string() == value);
            let value = number.map_or(serde_json::Value::String(value), serde_json::Value::from);
            let taken = OWN_FIELDS.contains(&name.as_str());
            fields.insert(if taken { format!("{}_{name}", event.kind) } else { name }, value);
        }
        Self {
            sequence,
            time,
            server: event.server,
            kind: event.kind,
            text: event.text,
            reason: event.reason,
            epoch: event.epoch,
            state_before: word(event.state_before),
            state_after: word(event.state_after),
            peer_state: event.peer_state,
            evidence: event.evidence,
            fields,
        }
    }
}
