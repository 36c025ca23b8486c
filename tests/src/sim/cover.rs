//! What the seeds reached: rules, steps, states, messages, faults.

use std::collections::BTreeMap;

use duplex_core::message::LiveState;
use duplex_core::resync::decide::Rule;

/// Counts by name.
#[derive(Clone, Debug, Default)]
pub struct Cover {
    counts: BTreeMap<String, u64>,
}

/// Rules that no run can reach as long as the operator does not lie and there is no witness, and why.
pub const UNREACHABLE: [(&str, &str); 7] = [
    ("decide foreign", "both disks belong to the pair; its row test covers it"),
    ("decide unreturned-solo", "only force leads here"),
    ("decide both-active", "needs an operator who calls a living peer dead"),
    ("decide diverged", "needs an operator who calls a living peer dead"),
    ("decide unrelated", "needs a foreign disk or seventeen generations apart"),
    ("decide newer-unusable", "the newer copy is the source until the older one adopted it"),
    ("state SyncTail", "the last adoption and the return are one step without a register"),
];

/// What a multi-seed run must reach.
pub fn wanted() -> Vec<String> {
    let mut names: Vec<String> = Rule::ALL.iter().map(|rule| format!("decide {}", rule.name())).collect();
    let states = [
        LiveState::Loading,
        LiveState::Joining,
        LiveState::Secondary,
        LiveState::PrimaryMirrored,
        LiveState::Frozen,
        LiveState::Granted,
        LiveState::Alone,
        LiveState::Syncing,
        LiveState::SyncTail,
        LiveState::Returning,
        LiveState::Stopping,
    ];
    names.extend(states.iter().map(|state| format!("state {state:?}")));
    let steps = [
        "G4 solo record",
        "G5 target record",
        "G6.1 sync done",
        "G6.2 adopted",
        "G6.3 return",
        "G6.5 mirrored",
        "G7 alone after a return that was cut off",
        "G8 new incarnation",
        "G9 handed over",
        "G10 unproven",
        "G10 settled primary keeps its word",
        "G12 copy failed",
        "G12 front",
        "W2 resume",
        "T2 solo restart",
        "fault link cut",
        "fault one way",
        "fault kill",
        "fault power cut",
        "fault both power cut",
        "fault pause",
        "fault disk",
        "new disk",
        "disk from the shelf",
        "operator promote-peer-is-down",
        "operator demote",
        "operator switchover",
        "operator down",
        "operator stop",
        "operator pause",
        "operator full-copy",
        "crash in resync",
        "copy of a hole",
        "marks compared",
    ];
    names.extend(steps.iter().map(|step| (*step).to_owned()));
    names.retain(|name| !UNREACHABLE.iter().any(|(unreachable, _)| unreachable == name));
    names
}

impl Cover {
    /// Counts one.
    pub fn hit(&mut self, name: &str) {
        match self.counts.get_mut(name) {
            Some(count) => *count += 1,
            None => {
                self.counts.insert(name.to_owned(), 1);
            }
        }
    }

    /// How often.
    pub fn count(&self, name: &str) -> u64 {
        self.counts.get(name).copied().unwrap_or(0)
    }

    /// Adds another run's counts.
    pub fn add(&mut self, other: &Self) {
        for (name, count) in &other.counts {
            *self.counts.entry(name.clone()).or_default() += count;
        }
    }

    /// Everything counted.
    pub const fn all(&self) -> &BTreeMap<String, u64> {
        &self.counts
    }

    /// What should have been reached and was not.
    pub fn missing(&self) -> Vec<String> {
        wanted().into_iter().filter(|name| self.count(name) == 0).collect()
    }
}
