//! What happened and why (P7): one event a change of state.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::ids::{Epoch, ServerName};

/// One event, without time and order: the shell adds those.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Event {
    /// Whose event.
    pub server: ServerName,
    /// Stable word.
    pub kind: String,
    /// One sentence.
    pub text: String,
    /// The rule or cause that decided.
    pub reason: String,
    /// Epoch known here.
    pub epoch: Epoch,
    /// Operators' word for the state before.
    pub state_before: String,
    /// And after.
    pub state_after: String,
    /// The peer's state as last heard.
    pub peer_state: Option<String>,
    /// What was seen.
    pub evidence: BTreeMap<String, String>,
    /// Fields of the kind.
    pub fields: BTreeMap<String, String>,
}
