//! `decide`: who copies to whom, by docs/protocol.md section 8, for one volume.
//!
//! Total, antisymmetric (`decide(a, b) == decide(b, a).reversed()`), and it never clears a mark. The first
//! rule that fits decides. Without a register "the register is not the joiner's" is always true.

use std::fmt;

use crate::format::record::{CopyRecord, CopyState};
use crate::message::{Hello, VolumeHello};
use crate::mirror::api::CopyPlan;

/// One server's view of one volume.
#[derive(Clone, Copy, Debug)]
pub struct Side<'a> {
    /// The server's facts.
    pub server: &'a Hello,
    /// The copy's facts.
    pub volume: &'a VolumeHello,
}

/// A row of the table.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Rule {
    /// D1: not the same pair, volume, size or block.
    Foreign,
    /// D2: a right is being asked for or not yet used.
    Unsettled,
    /// D3: exactly one copy is blank.
    Blank,
    /// D3: both copies are blank.
    BlankBoth,
    /// D4: a copy is latched as failed.
    FailedCopy,
    /// D5: a server that never gave its solo right back returns with blocks of its own.
    UnreturnedSolo,
    /// D6: both run alone.
    BothActive,
    /// D7: both went on from a common ancestor.
    Diverged,
    /// D8: nothing in common.
    Unrelated,
    /// D9: one copy descends from the other.
    Descends,
    /// D9x: the newer copy cannot be used.
    NewerUnusable,
    /// D10: a resync that did not end.
    Unfinished,
    /// D10s: exactly one side has not given its solo right back.
    SoloEra,
    /// D11: a live primary meets a copy that lost its memory.
    LiveButPeerUnproven,
    /// D12: the live primary goes on where it was.
    Resume,
    /// D13: exactly one side lost its memory.
    Survivor,
    /// D14: both lost their memory.
    BothLostPower,
    /// D15: the one that was primary last.
    LastPrimary,
}

impl Rule {
    /// Every rule, in the order in which they are tried.
    pub const ALL: [Self; 18] = [
        Self::Foreign,
        Self::Unsettled,
        Self::Blank,
        Self::BlankBoth,
        Self::FailedCopy,
        Self::UnreturnedSolo,
        Self::BothActive,
        Self::Diverged,
        Self::Unrelated,
        Self::Descends,
        Self::NewerUnusable,
        Self::Unfinished,
        Self::SoloEra,
        Self::LiveButPeerUnproven,
        Self::Resume,
        Self::Survivor,
        Self::BothLostPower,
        Self::LastPrimary,
    ];

    /// The number in docs/protocol.md section 8.
    pub const fn number(self) -> &'static str {
        match self {
            Self::Foreign => "D1",
            Self::Unsettled => "D2",
            Self::Blank | Self::BlankBoth => "D3",
            Self::FailedCopy => "D4",
            Self::UnreturnedSolo => "D5",
            Self::BothActive => "D6",
            Self::Diverged => "D7",
            Self::Unrelated => "D8",
            Self::Descends => "D9",
            Self::NewerUnusable => "D9x",
            Self::Unfinished => "D10",
            Self::SoloEra => "D10s",
            Self::LiveButPeerUnproven => "D11",
            Self::Resume => "D12",
            Self::Survivor => "D13",
            Self::BothLostPower => "D14",
            Self::LastPrimary => "D15",
        }
    }

    /// The printable name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Foreign => "foreign",
            Self::Unsettled => "unsettled",
            Self::Blank => "blank",
            Self::BlankBoth => "blank-both",
            Self::FailedCopy => "failed-copy",
            Self::UnreturnedSolo => "unreturned-solo",
            Self::BothActive => "both-active",
            Self::Diverged => "diverged",
            Self::Unrelated => "unrelated",
            Self::Descends => "descends",
            Self::NewerUnusable => "newer-unusable",
            Self::Unfinished => "unfinished",
            Self::SoloEra => "solo-era",
            Self::LiveButPeerUnproven => "live-but-peer-unproven",
            Self::Resume => "resume",
            Self::Survivor => "survivor",
            Self::BothLostPower => "both-lost-power",
            Self::LastPrimary => "last-primary",
        }
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.name(), self.number())
    }
}

/// What nobody but time or the operator can settle.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum WaitFor {
    /// The register's answer; then a new handshake.
    Settled,
    /// The operator's `activate`.
    Activate,
}

/// What a rule says, from one side's view.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// No session for this volume, for a stated reason.
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
    /// This copy is copied to the other.
    Source(CopyPlan),
    /// The other copy is copied here.
    Target(CopyPlan),
    /// This live primary goes alone first (G4), then is the source.
    SourceAfterRight(CopyPlan),
    /// The other, a live primary, goes alone first, then copies here.
    TargetAfterRight(CopyPlan),
    /// No copy: the live primary sends its in-flight operations again, same epoch.
    Resume {
        /// This side is the live primary.
        i_am_primary: bool,
    },
    /// Equal and without any mark.
    InStep {
        /// This side would be the source.
        i_am_source: bool,
    },
    /// One copy is failed: nothing is copied, the other serves (G12).
    NoResync {
        /// This side's copy is the good one.
        i_serve: bool,
    },
    /// Both sides have what the other lacks: nothing is overwritten.
    SplitBrain,
}

/// A rule and what it says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Decision {
    /// The rule that fitted first.
    pub rule: Rule,
    /// Its verdict.
    pub outcome: Outcome,
}

impl Decision {
    /// The same decision as the other side sees it.
    #[must_use]
    pub fn reversed(self) -> Self {
        let outcome = match self.outcome {
            Outcome::Refuse { code, mine, theirs } => Outcome::Refuse { code, mine: theirs, theirs: mine },
            Outcome::Wait(what) => Outcome::Wait(what),
            Outcome::Source(plan) => Outcome::Target(plan),
            Outcome::Target(plan) => Outcome::Source(plan),
            Outcome::SourceAfterRight(plan) => Outcome::TargetAfterRight(plan),
            Outcome::TargetAfterRight(plan) => Outcome::SourceAfterRight(plan),
            Outcome::Resume { i_am_primary } => Outcome::Resume { i_am_primary: !i_am_primary },
            Outcome::InStep { i_am_source } => Outcome::InStep { i_am_source: !i_am_source },
            Outcome::NoResync { i_serve } => Outcome::NoResync { i_serve: !i_serve },
            Outcome::SplitBrain => Outcome::SplitBrain,
        };
        Self { rule: self.rule, outcome }
    }
}

impl<'a> Side<'a> {
    fn copy(self) -> &'a CopyRecord {
        &self.volume.copy
    }

    fn is_blank(self) -> bool {
        self.copy().state == CopyState::Blank
    }

    fn is_failed(self) -> bool {
        self.copy().state == CopyState::Failed
    }

    fn is_up_to_date(self) -> bool {
        self.copy().state == CopyState::UpToDate
    }

    /// This copy belongs to a solo run that was not given back.
    fn is_solo(self) -> bool {
        self.server.record.era.is_solo() && !self.volume.lacks_solo
    }

    /// Serves alone, by right.
    fn is_alone(self) -> bool {
        self.server.live.is_alone()
    }

    /// A primary of a pair era that remembers everything it acknowledged.
    fn is_live_primary(self) -> bool {
        self.server.live.is_live_primary() && !self.copy().unproven
    }

    /// Came back with the solo right it never gave back, and with blocks of its own.
    fn has_unreturned_blocks(self) -> bool {
        self.is_solo() && self.volume.dirty_blocks > 0
    }

    /// What stands behind a refusal that is about the state of the data.
    fn describe(self) -> String {
        let copy = self.copy();
        format!(
            "{}: {} generation {}, {} blocks marked",
            self.server.server,
            copy.state.word(),
            copy.generation,
            self.volume.dirty_blocks
        )
    }
}

/// How two data lineages relate.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Lineage {
    Equal,
    /// Theirs is an ancestor of mine.
    MineNewer,
    TheirsNewer,
    Diverged,
    Unrelated,
}

/// A copy that was never filled (it adopted an identity and waits for its first full copy) is older than
/// every filled one: it holds nothing of its own.
fn lineage(mine: &CopyRecord, theirs: &CopyRecord) -> Lineage {
    if mine.generation == theirs.generation {
        return Lineage::Equal;
    }
    if theirs.generation.is_none() {
        return Lineage::MineNewer;
    }
    if mine.generation.is_none() {
        return Lineage::TheirsNewer;
    }
    let mine_descends = mine.descends_from(theirs.generation);
    let theirs_descends = theirs.descends_from(mine.generation);
    match (mine_descends, theirs_descends) {
        (true, false) => Lineage::MineNewer,
        (false, true) => Lineage::TheirsNewer,
        (true, true) => Lineage::Diverged,
        (false, false) if shares_history(mine, theirs) => Lineage::Diverged,
        (false, false) => Lineage::Unrelated,
    }
}

fn shares_history(mine: &CopyRecord, theirs: &CopyRecord) -> bool {
    mine.history.iter().any(|generation| !generation.is_none() && theirs.descends_from(*generation))
}

/// Who is the source of one volume and what is copied. Pure and total; see docs/protocol.md section 8.
pub fn decide(mine: Side<'_>, theirs: Side<'_>) -> Decision {
    foreign(mine, theirs)
        .or_else(|| unsettled(mine, theirs))
        .or_else(|| blank(mine, theirs))
        .or_else(|| failed(mine, theirs))
        .or_else(|| active(mine, theirs))
        .unwrap_or_else(|| match lineage(mine.copy(), theirs.copy()) {
            Lineage::Equal => equal(mine, theirs),
            Lineage::MineNewer => descends(mine, theirs),
            Lineage::TheirsNewer => descends(theirs, mine).reversed(),
            Lineage::Diverged => Decision { rule: Rule::Diverged, outcome: Outcome::SplitBrain },
            Lineage::Unrelated => refuse(Rule::Unrelated, "unrelated", mine.describe(), theirs.describe()),
        })
}

fn refuse(rule: Rule, code: &'static str, mine: impl ToString, theirs: impl ToString) -> Decision {
    Decision { rule, outcome: Outcome::Refuse { code, mine: mine.to_string(), theirs: theirs.to_string() } }
}

/// D1.
fn foreign(mine: Side<'_>, theirs: Side<'_>) -> Option<Decision> {
    let no = |code, a: &dyn ToString, b: &dyn ToString| {
        Some(refuse(Rule::Foreign, code, a.to_string(), b.to_string()))
    };
    if mine.server.server == theirs.server.server {
        return no("same-server", &mine.server.server, &theirs.server.server);
    }
    if mine.server.pair_name != theirs.server.pair_name {
        return no("foreign-pair-name", &mine.server.pair_name, &theirs.server.pair_name);
    }
    if mine.volume.name != theirs.volume.name {
        return no("foreign-volume-name", &mine.volume.name, &theirs.volume.name);
    }
    let (a, b) = (mine.copy(), theirs.copy());
    if mine.is_blank() || theirs.is_blank() {
        return fits(mine, theirs);
    }
    if a.pair != b.pair {
        return no("foreign-pair", &a.pair, &b.pair);
    }
    if a.volume != b.volume {
        return no("foreign-volume", &a.volume, &b.volume);
    }
    if a.size_bytes != b.size_bytes {
        return no("volume-size", &a.size_bytes, &b.size_bytes);
    }
    if a.block_bytes != b.block_bytes {
        return no("block-size", &a.block_bytes, &b.block_bytes);
    }
    if a.sector_bytes != b.sector_bytes {
        return no("sector-size", &a.sector_bytes, &b.sector_bytes);
    }
    None
}

/// A blank copy takes the other's identity if its disk is large enough and its sectors are small enough.
fn fits(mine: Side<'_>, theirs: Side<'_>) -> Option<Decision> {
    let too_small = |blank: &CopyRecord, full: &CopyRecord| blank.size_bytes < full.size_bytes;
    let too_coarse = |blank: &CopyRecord, full: &CopyRecord| blank.sector_bytes > full.sector_bytes;
    let (a, b) = (mine.copy(), theirs.copy());
    let (blank, full) = match (mine.is_blank(), theirs.is_blank()) {
        (true, false) => (a, b),
        (false, true) => (b, a),
        (true, true) | (false, false) => return None,
    };
    if too_small(blank, full) {
        return Some(refuse(Rule::Foreign, "too-small", a.size_bytes, b.size_bytes));
    }
    if too_coarse(blank, full) {
        return Some(refuse(Rule::Foreign, "sector-size", a.sector_bytes, b.sector_bytes));
    }
    None
}

/// D2.
fn unsettled(mine: Side<'_>, theirs: Side<'_>) -> Option<Decision> {
    let pending = |side: Side<'_>| side.server.cas_outstanding || side.server.granted;
    (pending(mine) || pending(theirs))
        .then_some(Decision { rule: Rule::Unsettled, outcome: Outcome::Wait(WaitFor::Settled) })
}

/// D3.
fn blank(mine: Side<'_>, theirs: Side<'_>) -> Option<Decision> {
    let from = |full: Side<'_>, empty: Side<'_>| {
        if full.is_up_to_date() {
            Decision { rule: Rule::Blank, outcome: Outcome::Source(CopyPlan::Full) }
        } else {
            refuse(Rule::Blank, "no-usable-copy", full.describe(), empty.describe())
        }
    };
    match (mine.is_blank(), theirs.is_blank()) {
        (true, true) => Some(Decision { rule: Rule::BlankBoth, outcome: Outcome::Wait(WaitFor::Activate) }),
        (false, true) => Some(from(mine, theirs)),
        (true, false) => Some(from(theirs, mine).reversed()),
        (false, false) => None,
    }
}

/// D4. The good copy serves only if the failed one cannot hold anything newer (P6).
fn failed(mine: Side<'_>, theirs: Side<'_>) -> Option<Decision> {
    let good_serves = |good: Side<'_>, bad: Side<'_>| {
        let current = match lineage(good.copy(), bad.copy()) {
            Lineage::Equal => !bad.has_unreturned_blocks(),
            Lineage::MineNewer => true,
            Lineage::TheirsNewer | Lineage::Diverged | Lineage::Unrelated => false,
        };
        if good.is_up_to_date() && (current || good.is_alone()) {
            Decision { rule: Rule::FailedCopy, outcome: Outcome::NoResync { i_serve: true } }
        } else {
            refuse(Rule::FailedCopy, "no-usable-copy", good.describe(), bad.describe())
        }
    };
    match (mine.is_failed(), theirs.is_failed()) {
        (false, false) => None,
        (false, true) => Some(good_serves(mine, theirs)),
        (true, false) => Some(good_serves(theirs, mine).reversed()),
        (true, true) => Some(refuse(Rule::FailedCopy, "no-usable-copy", mine.describe(), theirs.describe())),
    }
}

/// D5 and D6: what both did alone.
fn active(mine: Side<'_>, theirs: Side<'_>) -> Option<Decision> {
    let split = |rule| Some(Decision { rule, outcome: Outcome::SplitBrain });
    let unreturned = |server: Side<'_>, joiner: Side<'_>| {
        server.is_alone() && !joiner.is_alone() && joiner.has_unreturned_blocks()
    };
    if unreturned(mine, theirs) || unreturned(theirs, mine) {
        return split(Rule::UnreturnedSolo);
    }
    // The same, met after the other one was restarted too: its generation is built on mine, but I never
    // gave my right back, so it was forced and lacks the blocks I wrote since.
    let overtaken = |older: Side<'_>, newer: Side<'_>| {
        lineage(newer.copy(), older.copy()) == Lineage::MineNewer
            && !older.copy().generation.is_none()
            && (older.has_unreturned_blocks() || older.is_alone())
    };
    if overtaken(mine, theirs) || overtaken(theirs, mine) {
        return split(Rule::UnreturnedSolo);
    }
    let both_alone = mine.is_alone() && theirs.is_alone();
    let both_live = mine.is_live_primary() && theirs.is_live_primary();
    if both_alone || both_live || same_number(mine, theirs) {
        return split(Rule::BothActive);
    }
    None
}

/// Both ran alone under the same number: without a register two servers can draw it.
fn same_number(mine: Side<'_>, theirs: Side<'_>) -> bool {
    let (a, b) = (&mine.server.record, &theirs.server.record);
    a.era.is_solo() && a.era == b.era && a.epoch_seen.number == b.epoch_seen.number && {
        match (&a.epoch_seen.holder, &b.epoch_seen.holder) {
            (Some(x), Some(y)) => x != y,
            (None, _) | (_, None) => false,
        }
    }
}

/// D9 and D9x: `newer` descends from `older`.
fn descends(newer: Side<'_>, older: Side<'_>) -> Decision {
    if !newer.is_up_to_date() {
        return refuse(Rule::NewerUnusable, "newer-unusable", newer.describe(), older.describe());
    }
    Decision { rule: Rule::Descends, outcome: Outcome::Source(plan(newer, older)) }
}

/// The marks of both name every block that may differ only if the source's map reaches what the target holds: its
/// generation, or the one it was last made towards, of which it may hold any block.
fn plan(source: Side<'_>, target: Side<'_>) -> CopyPlan {
    let holds = match target.copy().state {
        CopyState::Inconsistent { toward } => toward,
        CopyState::Blank | CopyState::UpToDate | CopyState::Outdated | CopyState::Failed => {
            target.copy().generation
        }
    };
    if source.copy().map_reaches(holds) { CopyPlan::Union } else { CopyPlan::Full }
}

/// D10 to D15: the same generation on both.
fn equal(mine: Side<'_>, theirs: Side<'_>) -> Decision {
    let towards = |rule, i_am_source: bool| {
        let (source, target) = if i_am_source { (mine, theirs) } else { (theirs, mine) };
        let decision = Decision { rule, outcome: Outcome::Source(plan(source, target)) };
        if i_am_source { decision } else { decision.reversed() }
    };
    match (mine.is_up_to_date(), theirs.is_up_to_date()) {
        (false, false) => {
            return refuse(Rule::NewerUnusable, "no-usable-copy", mine.describe(), theirs.describe());
        }
        (true, false) => return towards(Rule::Unfinished, true),
        (false, true) => return towards(Rule::Unfinished, false),
        (true, true) => {}
    }
    if mine.is_alone() != theirs.is_alone() {
        return towards(Rule::SoloEra, mine.is_alone());
    }
    if mine.is_solo() != theirs.is_solo() {
        return towards(Rule::SoloEra, mine.is_solo());
    }
    match (mine.is_live_primary(), theirs.is_live_primary()) {
        (true, false) => live_primary(theirs),
        (false, true) => live_primary(mine).reversed(),
        // Both at once was D6.
        (true, true) | (false, false) => nobody_live(mine, theirs),
    }
}

/// D11 and D12, as the live primary sees them.
fn live_primary(other: Side<'_>) -> Decision {
    if other.copy().unproven {
        let outcome = Outcome::SourceAfterRight(CopyPlan::Union);
        Decision { rule: Rule::LiveButPeerUnproven, outcome }
    } else {
        Decision { rule: Rule::Resume, outcome: Outcome::Resume { i_am_primary: true } }
    }
}

/// D13 to D15.
fn nobody_live(mine: Side<'_>, theirs: Side<'_>) -> Decision {
    let towards = |rule, i_am_source: bool| {
        let decision = Decision { rule, outcome: Outcome::Source(CopyPlan::Union) };
        if i_am_source { decision } else { decision.reversed() }
    };
    let last = |side: Side<'_>| (side.server.record.last_primary, side.server.server.clone());
    match (mine.copy().unproven, theirs.copy().unproven) {
        (false, true) => towards(Rule::Survivor, true),
        (true, false) => towards(Rule::Survivor, false),
        (true, true) => {
            let rank = |side: Side<'_>| (side.copy().proven, last(side));
            towards(Rule::BothLostPower, rank(mine) > rank(theirs))
        }
        (false, false) => {
            let i_am_source = last(mine) > last(theirs);
            if mine.volume.dirty_blocks == 0 && theirs.volume.dirty_blocks == 0 {
                Decision { rule: Rule::LastPrimary, outcome: Outcome::InStep { i_am_source } }
            } else {
                towards(Rule::LastPrimary, i_am_source)
            }
        }
    }
}

#[cfg(test)]
#[path = "decide_tests.rs"]
mod tests;
