//! From the decisions of several volumes to one decision of the pair: one server is the source of all.

use crate::message::{Hello, VolumeHello};
use crate::mirror::api::{CopyPlan, Part};
use crate::resync::decide::{Decision, Outcome, Rule, Side, WaitFor, decide};

/// What the two servers do with each other.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PairDecision {
    /// The verdict for all volumes together.
    pub outcome: PairOutcome,
    /// Position of the volume that decided.
    pub decisive: usize,
    /// The rule that decided.
    pub rule: Rule,
    /// Every volume's own decision, in volume order.
    pub volumes: Vec<Decision>,
}

/// The verdict, from one side's view.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum PairOutcome {
    /// No session.
    Refuse {
        /// Stable word.
        code: &'static str,
        /// This side's value.
        mine: String,
        /// The other side's value.
        theirs: String,
    },
    /// Nothing to do yet.
    Wait(WaitFor),
    /// On at least one volume both have what the other lacks: nothing is overwritten anywhere.
    SplitBrain,
    /// One server copies to the other. A volume whose copy failed takes no part.
    Copy {
        /// This server is the source of every volume.
        i_am_source: bool,
        /// The source is a live primary that goes alone first (D11).
        right_first: bool,
        /// Each volume's part, in volume order; `None` for a volume with a failed copy (D4).
        parts: Vec<Option<Part>>,
    },
    /// The live primary goes on in the same epoch, every volume sends its in-flight operations again.
    Resume {
        /// This server is the live primary.
        i_am_primary: bool,
    },
    /// Every volume is equal and unmarked.
    InStep {
        /// This server is the source, should nobody be primary.
        i_am_source: bool,
    },
}

impl PairDecision {
    /// The same decision as the other side sees it.
    #[must_use]
    pub fn reversed(self) -> Self {
        let outcome = match self.outcome {
            PairOutcome::Refuse { code, mine, theirs } => {
                PairOutcome::Refuse { code, mine: theirs, theirs: mine }
            }
            PairOutcome::Wait(what) => PairOutcome::Wait(what),
            PairOutcome::SplitBrain => PairOutcome::SplitBrain,
            PairOutcome::Copy { i_am_source, right_first, parts } => PairOutcome::Copy {
                i_am_source: !i_am_source,
                right_first,
                parts: parts.into_iter().map(|part| part.map(reverse)).collect(),
            },
            PairOutcome::Resume { i_am_primary } => PairOutcome::Resume { i_am_primary: !i_am_primary },
            PairOutcome::InStep { i_am_source } => PairOutcome::InStep { i_am_source: !i_am_source },
        };
        let volumes = self.volumes.into_iter().map(Decision::reversed).collect();
        Self { outcome, decisive: self.decisive, rule: self.rule, volumes }
    }

    /// This server is the source, where there is one.
    pub const fn i_am_source(&self) -> Option<bool> {
        match self.outcome {
            PairOutcome::Copy { i_am_source, .. } | PairOutcome::InStep { i_am_source } => Some(i_am_source),
            PairOutcome::Resume { i_am_primary } => Some(i_am_primary),
            PairOutcome::Refuse { .. } | PairOutcome::Wait(_) | PairOutcome::SplitBrain => None,
        }
    }
}

const fn reverse(part: Part) -> Part {
    match part {
        Part::Source(plan) => Part::Target(plan),
        Part::Target(plan) => Part::Source(plan),
    }
}

/// How strongly a volume's decision names a source.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Bond {
    /// Both copies are the same: it follows any other volume.
    Free,
    /// D15: both copies hold everything acknowledged, the last primary is only the better choice.
    Preference,
    /// D14: both copies hold everything flushed; the better proven one is only the better choice.
    StrongPreference,
    /// The other direction would lose or overwrite something.
    Fixed,
}

/// Which way a volume's decision points: `(bond, i_am_source)`. `None` for those that stop the pair.
fn pull(decision: &Decision) -> Option<(Bond, bool)> {
    let bond = match decision.rule {
        Rule::LastPrimary => Bond::Preference,
        Rule::BothLostPower => Bond::StrongPreference,
        Rule::Foreign
        | Rule::Unsettled
        | Rule::Blank
        | Rule::BlankBoth
        | Rule::FailedCopy
        | Rule::UnreturnedSolo
        | Rule::BothActive
        | Rule::Diverged
        | Rule::Unrelated
        | Rule::Descends
        | Rule::NewerUnusable
        | Rule::Unfinished
        | Rule::SoloEra
        | Rule::LiveButPeerUnproven
        | Rule::Resume
        | Rule::Survivor => Bond::Fixed,
    };
    match decision.outcome {
        Outcome::Source(_) | Outcome::SourceAfterRight(_) => Some((bond, true)),
        Outcome::Target(_) | Outcome::TargetAfterRight(_) => Some((bond, false)),
        Outcome::Resume { i_am_primary } => Some((bond, i_am_primary)),
        Outcome::NoResync { i_serve } => Some((bond, i_serve)),
        Outcome::InStep { i_am_source } => Some((Bond::Free, i_am_source)),
        Outcome::Refuse { .. } | Outcome::Wait(_) | Outcome::SplitBrain => None,
    }
}

/// Decides every volume and combines them. Both hellos must name the same volumes in the same order, else
/// the pair is refused as `volumes-differ`.
pub fn decide_pair(mine: &Hello, theirs: &Hello) -> PairDecision {
    let names = |hello: &Hello| hello.volumes.iter().map(|v| v.name.clone()).collect::<Vec<_>>();
    let (my_names, their_names) = (names(mine), names(theirs));
    if my_names != their_names || my_names.is_empty() {
        let outcome = PairOutcome::Refuse {
            code: "volumes-differ",
            mine: my_names.join(", "),
            theirs: their_names.join(", "),
        };
        return PairDecision { outcome, decisive: 0, rule: Rule::Foreign, volumes: Vec::new() };
    }
    let side = |server, volume| Side { server, volume };
    let volumes: Vec<Decision> = mine
        .volumes
        .iter()
        .zip(&theirs.volumes)
        .map(|(a, b): (&VolumeHello, &VolumeHello)| decide(side(mine, a), side(theirs, b)))
        .collect();
    combine(volumes, &my_names)
}

/// Combines the volumes' decisions: one source for all. A split brain on any is one on all, then a refusal,
/// then a wait; a volume in step follows the others; two fixed directions are refused as `mixed-sources`.
pub fn combine(volumes: Vec<Decision>, names: &[String]) -> PairDecision {
    let (outcome, decisive) = stopped(&volumes).unwrap_or_else(|| directed(&volumes, names));
    let rule = volumes.get(decisive).map_or(Rule::Foreign, |decision| decision.rule);
    PairDecision { outcome, decisive, rule, volumes }
}

/// The outcomes that allow no session of any volume.
fn stopped(volumes: &[Decision]) -> Option<(PairOutcome, usize)> {
    let find = |test: fn(&Outcome) -> bool| volumes.iter().position(|d| test(&d.outcome));
    if let Some(at) = find(|o| matches!(o, Outcome::SplitBrain)) {
        return Some((PairOutcome::SplitBrain, at));
    }
    let refusal = volumes.iter().enumerate().find_map(|(at, decision)| match &decision.outcome {
        Outcome::Refuse { code, mine, theirs } => {
            Some((PairOutcome::Refuse { code, mine: mine.clone(), theirs: theirs.clone() }, at))
        }
        Outcome::Wait(_)
        | Outcome::Source(_)
        | Outcome::Target(_)
        | Outcome::SourceAfterRight(_)
        | Outcome::TargetAfterRight(_)
        | Outcome::Resume { .. }
        | Outcome::InStep { .. }
        | Outcome::NoResync { .. }
        | Outcome::SplitBrain => None,
    });
    if refusal.is_some() {
        return refusal;
    }
    for what in [WaitFor::Settled, WaitFor::Activate] {
        if let Some(at) = volumes.iter().position(|d| d.outcome == Outcome::Wait(what)) {
            return Some((PairOutcome::Wait(what), at));
        }
    }
    None
}

/// Every volume names a source: agree on one.
fn directed(volumes: &[Decision], names: &[String]) -> (PairOutcome, usize) {
    let pulls: Vec<(Bond, bool)> = volumes.iter().filter_map(pull).collect();
    let strongest = pulls.iter().map(|(bond, _)| *bond).max().unwrap_or(Bond::Free);
    let decisive = pulls.iter().position(|(bond, _)| *bond == strongest).unwrap_or(0);
    let i_am_source = pulls.get(decisive).is_some_and(|(_, mine)| *mine);
    let fixed = |mine: bool| -> Vec<&str> {
        let named = pulls.iter().zip(names).filter(|(p, _)| **p == (Bond::Fixed, mine));
        named.map(|(_, name)| name.as_str()).collect()
    };
    if !fixed(true).is_empty() && !fixed(false).is_empty() {
        let say = |names: Vec<&str>| format!("source of {}", names.join(", "));
        let outcome =
            PairOutcome::Refuse { code: "mixed-sources", mine: say(fixed(true)), theirs: say(fixed(false)) };
        return (outcome, decisive);
    }
    let all = |test: fn(&Outcome) -> bool| volumes.iter().all(|d| test(&d.outcome));
    if all(|o| matches!(o, Outcome::InStep { .. })) {
        return (PairOutcome::InStep { i_am_source }, decisive);
    }
    if all(|o| matches!(o, Outcome::Resume { .. })) {
        return (PairOutcome::Resume { i_am_primary: i_am_source }, decisive);
    }
    // A live primary whose volumes are not all resumed goes alone first: it has one era for all of them.
    let right_first = volumes.iter().any(|d| match d.outcome {
        Outcome::Resume { .. } | Outcome::SourceAfterRight(_) | Outcome::TargetAfterRight(_) => true,
        Outcome::Refuse { .. }
        | Outcome::Wait(_)
        | Outcome::Source(_)
        | Outcome::Target(_)
        | Outcome::InStep { .. }
        | Outcome::NoResync { .. }
        | Outcome::SplitBrain => false,
    });
    let parts = volumes.iter().map(|d| part(&d.outcome, i_am_source)).collect();
    (PairOutcome::Copy { i_am_source, right_first, parts }, decisive)
}

/// A volume's part once the pair's source is known.
fn part(outcome: &Outcome, i_am_source: bool) -> Option<Part> {
    let plan = match outcome {
        Outcome::Source(plan)
        | Outcome::Target(plan)
        | Outcome::SourceAfterRight(plan)
        | Outcome::TargetAfterRight(plan) => *plan,
        // The union of two empty maps, or of the live primary's marks: it says what may differ.
        Outcome::Resume { .. } | Outcome::InStep { .. } => CopyPlan::Union,
        Outcome::NoResync { .. } | Outcome::Refuse { .. } | Outcome::Wait(_) | Outcome::SplitBrain => {
            return None;
        }
    };
    Some(if i_am_source { Part::Source(plan) } else { Part::Target(plan) })
}

/// Who is primary in the session that follows a decision.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Primary {
    /// This server.
    Mine,
    /// The other one.
    Theirs,
    /// Nobody, until the operator promotes one.
    Nobody,
}

impl Primary {
    /// The same as the other side sees it.
    #[must_use]
    pub const fn reversed(self) -> Self {
        match self {
            Self::Mine => Self::Theirs,
            Self::Theirs => Self::Mine,
            Self::Nobody => Self::Nobody,
        }
    }
}

/// A server that serves goes on. Where none does, the source becomes primary iff either side was primary
/// when it last changed its role; by `descends` and `solo-era` only the source's own word counts: the other
/// was left behind, its stale flag must not undo a demotion.
pub fn who_is_primary(decision: &PairDecision, mine: &Hello, theirs: &Hello) -> Primary {
    let Some(i_am_source) = decision.i_am_source() else { return Primary::Nobody };
    let (source, other) = if i_am_source { (mine, theirs) } else { (theirs, mine) };
    let primary = if i_am_source { Primary::Mine } else { Primary::Theirs };
    if source.live.is_alone() || source.live.is_live_primary() {
        return primary;
    }
    let own_word_only = decision.volumes.iter().any(|d| matches!(d.rule, Rule::Descends | Rule::SoloEra));
    let was_primary = source.record.was_primary || (!own_word_only && other.record.was_primary);
    // A live primary of a pair era that is not the source yields: its copy failed (G12), the service moves.
    let moves = !own_word_only && other.live.is_live_primary();
    if was_primary || moves { primary } else { Primary::Nobody }
}

#[cfg(test)]
#[path = "pair_tests.rs"]
mod tests;
