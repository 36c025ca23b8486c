use super::*;
use crate::format::record::Era;
use crate::ids::Generation;
use crate::ids::{Epoch, PairId, Proven, Sequence, ServerName, VolumeId};
use crate::message::LiveState;
use crate::resync::fixtures::{copy, generation, hello};

fn two() -> (Hello, Hello) {
    (hello("a", vec![copy()]), hello("b", vec![copy()]))
}

fn verdict(a: &Hello, b: &Hello) -> Decision {
    let side = |server| Side { server, volume: &server.volumes[0] };
    let decision = decide(side(a), side(b));
    assert_eq!(decision, decide(side(b), side(a)).reversed(), "both sides must see the same");
    decision
}

fn rec(h: &mut Hello) -> &mut CopyRecord {
    &mut h.volumes[0].copy
}

/// `h` went alone: a new generation on top of its own.
fn goes_alone(h: &mut Hello, to: u128) {
    let record = rec(h);
    record.history.insert(0, record.generation);
    record.base = record.generation;
    record.generation = generation(to);
    h.record.era = Era::Solo(6);
}

fn expect(a: &Hello, b: &Hello, rule: Rule, outcome: Outcome) {
    assert_eq!(verdict(a, b), Decision { rule, outcome });
}

fn expect_code(a: &Hello, b: &Hello, rule: Rule, wanted: &str) -> (String, String) {
    let decision = verdict(a, b);
    assert_eq!(decision.rule, rule);
    let Outcome::Refuse { code, mine, theirs } = decision.outcome else {
        panic!("not refused: {decision:?}")
    };
    assert_eq!(code, wanted);
    (mine, theirs)
}

#[test]
fn d1_foreign_names_both_values() {
    type Change = fn(&mut Hello);
    let cases: [(&str, Change); 7] = [
        ("foreign-pair", |h| rec(h).pair = PairId(99)),
        ("foreign-volume", |h| rec(h).volume = VolumeId(99)),
        ("volume-size", |h| rec(h).size_bytes = 1 << 20),
        ("block-size", |h| rec(h).block_bytes = 8192),
        ("sector-size", |h| rec(h).sector_bytes = 512),
        ("foreign-pair-name", |h| h.pair_name = "other".to_owned()),
        ("same-server", |h| h.server = ServerName("a".to_owned())),
    ];
    for (code, change) in cases {
        let (a, mut b) = two();
        change(&mut b);
        let (mine, theirs) = expect_code(&a, &b, Rule::Foreign, code);
        assert_eq!(mine == theirs, code == "same-server", "{code}: {mine} {theirs}");
    }
}

#[test]
fn d1_a_blank_copy_must_fit() {
    let (a, mut b) = two();
    *rec(&mut b) = CopyRecord::blank(32 << 20, 4096, 4096);
    let (mine, theirs) = expect_code(&a, &b, Rule::Foreign, "too-small");
    assert_eq!((mine.as_str(), theirs.as_str()), ("67108864", "33554432"));
    let (mut a, mut b) = two();
    rec(&mut a).sector_bytes = 512;
    *rec(&mut b) = CopyRecord::blank(128 << 20, 4096, 4096);
    expect_code(&a, &b, Rule::Foreign, "sector-size");
}

#[test]
fn d2_unsettled_comes_before_the_data() {
    let (mut a, b) = two();
    a.granted = true;
    goes_alone(&mut a, 2);
    expect(&a, &b, Rule::Unsettled, Outcome::Wait(WaitFor::Settled));
    let (a, mut b) = two();
    b.cas_outstanding = true;
    expect(&a, &b, Rule::Unsettled, Outcome::Wait(WaitFor::Settled));
}

#[test]
fn d3_blank() {
    let (a, mut b) = two();
    *rec(&mut b) = CopyRecord::blank(128 << 20, 4096, 4096);
    expect(&a, &b, Rule::Blank, Outcome::Source(CopyPlan::Full));
    let (mut a, b) = (a, b);
    rec(&mut a).state = CopyState::Outdated;
    expect_code(&a, &b, Rule::Blank, "no-usable-copy");
    *rec(&mut a) = CopyRecord::blank(128 << 20, 4096, 4096);
    expect(&a, &b, Rule::BlankBoth, Outcome::Wait(WaitFor::Activate));
}

#[test]
fn d4_failed_copy() {
    let (a, mut b) = two();
    rec(&mut b).state = CopyState::Failed;
    expect(&a, &b, Rule::FailedCopy, Outcome::NoResync { i_serve: true });
    // The failed copy went on alone: the good one is old and must not serve (P6).
    goes_alone(&mut b, 2);
    expect_code(&a, &b, Rule::FailedCopy, "no-usable-copy");
    // It adopted nothing, but wrote alone at the tail of a resync.
    let (a, mut b) = two();
    rec(&mut b).state = CopyState::Failed;
    b.record.era = Era::Solo(6);
    b.volumes[0].dirty_blocks = 1;
    expect_code(&a, &b, Rule::FailedCopy, "no-usable-copy");
}

#[test]
fn d5_unreturned_solo() {
    let (mut a, mut b) = two();
    // V15: A alone, B adopted A's generation and was forced; A returns with blocks of its own.
    goes_alone(&mut a, 2);
    a.volumes[0].dirty_blocks = 1;
    *rec(&mut b) = a.volumes[0].copy.clone();
    goes_alone(&mut b, 3);
    b.live = LiveState::Alone;
    expect(&a, &b, Rule::UnreturnedSolo, Outcome::SplitBrain);
    // The same when B was restarted as well.
    b.live = LiveState::Joining;
    expect(&a, &b, Rule::UnreturnedSolo, Outcome::SplitBrain);
    // Without a block of its own A has nothing to lose.
    a.volumes[0].dirty_blocks = 0;
    expect(&a, &b, Rule::Descends, Outcome::Target(CopyPlan::Union));
}

#[test]
fn d6_both_active() {
    let (mut a, mut b) = two();
    goes_alone(&mut a, 2);
    goes_alone(&mut b, 3);
    a.live = LiveState::Alone;
    b.live = LiveState::Syncing;
    expect(&a, &b, Rule::BothActive, Outcome::SplitBrain);
    // Both died since: the same number with two holders.
    for (h, holder) in [(&mut a, "a"), (&mut b, "b")] {
        h.live = LiveState::Joining;
        h.record.epoch_seen = Epoch { number: 6, holder: Some(ServerName(holder.to_owned())) };
    }
    expect(&a, &b, Rule::BothActive, Outcome::SplitBrain);
    let (mut a, mut b) = two();
    a.live = LiveState::Frozen;
    b.live = LiveState::Frozen;
    expect(&a, &b, Rule::BothActive, Outcome::SplitBrain);
}

#[test]
fn d7_diverged_and_d8_unrelated() {
    let (mut a, mut b) = two();
    goes_alone(&mut a, 2);
    goes_alone(&mut b, 3);
    b.record.era = Era::Pair;
    expect(&a, &b, Rule::Diverged, Outcome::SplitBrain);
    rec(&mut b).history.clear();
    expect_code(&a, &b, Rule::Unrelated, "unrelated");
}

#[test]
fn d8_an_ancestor_older_than_the_history_is_unrelated() {
    let (mut a, b) = two();
    for n in 2..=17 {
        goes_alone(&mut a, n);
    }
    assert_eq!(rec(&mut a).history.len(), crate::limits::HISTORY_MAX);
    expect(&a, &b, Rule::Descends, Outcome::Source(CopyPlan::Full));
    goes_alone(&mut a, 18);
    rec(&mut a).history.truncate(crate::limits::HISTORY_MAX);
    expect_code(&a, &b, Rule::Unrelated, "unrelated");
}

#[test]
fn d9_descends_by_union_or_in_full() {
    let (mut a, mut b) = two();
    goes_alone(&mut a, 2);
    a.live = LiveState::Alone;
    expect(&a, &b, Rule::Descends, Outcome::Source(CopyPlan::Union));
    // A's map is relative to 2 now: B at 1 is too old for it.
    goes_alone(&mut a, 3);
    expect(&a, &b, Rule::Descends, Outcome::Source(CopyPlan::Full));
    // B was being copied towards 2, or towards 3.
    for toward in [2, 3] {
        rec(&mut b).state = CopyState::Inconsistent { toward: generation(toward) };
        expect(&a, &b, Rule::Descends, Outcome::Source(CopyPlan::Union));
    }
    rec(&mut b).state = CopyState::Inconsistent { toward: generation(9) };
    expect(&a, &b, Rule::Descends, Outcome::Source(CopyPlan::Full));
}

#[test]
fn d9_a_first_copy_that_broke_off_goes_on() {
    let (mut a, mut b) = two();
    rec(&mut b).generation = Generation::NONE;
    rec(&mut b).state = CopyState::Inconsistent { toward: generation(1) };
    expect(&a, &b, Rule::Descends, Outcome::Source(CopyPlan::Union));
    goes_alone(&mut a, 2);
    goes_alone(&mut a, 3);
    expect(&a, &b, Rule::Descends, Outcome::Source(CopyPlan::Full));
}

#[test]
fn d9_marks_that_were_kept_over_several_solo_runs_reach_back() {
    let (mut a, mut b) = two();
    for n in 2..=4 {
        goes_alone(&mut a, n);
        // Something was marked each time: the map is still relative to 1.
        rec(&mut a).base = generation(1);
    }
    expect(&a, &b, Rule::Descends, Outcome::Source(CopyPlan::Union));
    for n in 2..=3 {
        rec(&mut b).generation = generation(n);
        rec(&mut b).history = (1..n).rev().map(generation).collect();
        expect(&a, &b, Rule::Descends, Outcome::Source(CopyPlan::Union));
    }
    // Relative to 3, it reaches neither 1 nor 2.
    rec(&mut a).base = generation(3);
    rec(&mut b).generation = generation(2);
    rec(&mut b).history = vec![generation(1)];
    expect(&a, &b, Rule::Descends, Outcome::Source(CopyPlan::Full));
    // Its base fell off the history: only its own generation counts.
    rec(&mut a).base = generation(99);
    rec(&mut b).generation = generation(3);
    rec(&mut b).history = vec![generation(2)];
    expect(&a, &b, Rule::Descends, Outcome::Source(CopyPlan::Full));
}

#[test]
fn d9_after_a_full_copy_began_an_older_disk_needs_everything() {
    let (mut a, mut b) = two();
    goes_alone(&mut a, 2);
    a.live = LiveState::Alone;
    expect(&a, &b, Rule::Descends, Outcome::Source(CopyPlan::Union));
    // A new disk came in B's place: A marked everything under 3 and copied a part.
    goes_alone(&mut a, 3);
    rec(&mut a).base = generation(3);
    expect(&a, &b, Rule::Descends, Outcome::Source(CopyPlan::Full));
    rec(&mut b).state = CopyState::Inconsistent { toward: generation(2) };
    expect(&a, &b, Rule::Descends, Outcome::Source(CopyPlan::Full));
    rec(&mut b).state = CopyState::Inconsistent { toward: generation(3) };
    expect(&a, &b, Rule::Descends, Outcome::Source(CopyPlan::Union));
}

#[test]
fn blocks_of_a_lineage_the_source_does_not_know_need_everything() {
    // B was being copied towards 9 when A's disk was put back to an image of generation 1.
    let (mut a, mut b) = two();
    rec(&mut b).state = CopyState::Inconsistent { toward: generation(9) };
    expect(&a, &b, Rule::Unfinished, Outcome::Source(CopyPlan::Full));
    goes_alone(&mut a, 2);
    expect(&a, &b, Rule::Descends, Outcome::Source(CopyPlan::Full));
    rec(&mut b).state = CopyState::Inconsistent { toward: generation(2) };
    expect(&a, &b, Rule::Descends, Outcome::Source(CopyPlan::Union));
}

#[test]
fn d9x_newer_unusable() {
    let (mut a, b) = two();
    goes_alone(&mut a, 2);
    rec(&mut a).state = CopyState::Inconsistent { toward: generation(3) };
    expect_code(&a, &b, Rule::NewerUnusable, "newer-unusable");
}

#[test]
fn d10_unfinished_and_d10s_solo_era() {
    let (a, mut b) = two();
    rec(&mut b).state = CopyState::Inconsistent { toward: generation(1) };
    expect(&a, &b, Rule::Unfinished, Outcome::Source(CopyPlan::Union));
    rec(&mut b).state = CopyState::Outdated;
    expect(&a, &b, Rule::Unfinished, Outcome::Source(CopyPlan::Union));
    let (a, mut b) = two();
    b.record.era = Era::Solo(6);
    b.volumes[0].dirty_blocks = 3;
    expect(&a, &b, Rule::SoloEra, Outcome::Target(CopyPlan::Union));
}

#[test]
fn a_copy_that_lacks_the_record_of_going_alone_is_not_solo() {
    let (mut a, mut b) = two();
    a.record.era = Era::Solo(6);
    a.volumes[0].dirty_blocks = 3;
    expect(&a, &b, Rule::SoloEra, Outcome::Source(CopyPlan::Union));
    // The power went in the middle of G4: what this copy acknowledged is on the peer, too, and only there.
    a.volumes[0].lacks_solo = true;
    rec(&mut a).unproven = true;
    expect(&a, &b, Rule::Survivor, Outcome::Target(CopyPlan::Union));
    b.live = LiveState::Alone;
    expect(&a, &b, Rule::SoloEra, Outcome::Target(CopyPlan::Union));
}

#[test]
fn d11_and_d12_a_live_primary() {
    let (mut a, mut b) = two();
    a.live = LiveState::Frozen;
    a.volumes[0].dirty_blocks = 2;
    expect(&a, &b, Rule::Resume, Outcome::Resume { i_am_primary: true });
    rec(&mut b).unproven = true;
    expect(&a, &b, Rule::LiveButPeerUnproven, Outcome::SourceAfterRight(CopyPlan::Union));
}

#[test]
fn d13_to_d15_nobody_live() {
    let (mut a, mut b) = two();
    rec(&mut a).unproven = true;
    a.record.last_primary = 9;
    expect(&a, &b, Rule::Survivor, Outcome::Target(CopyPlan::Union));
    rec(&mut b).unproven = true;
    expect(&a, &b, Rule::BothLostPower, Outcome::Source(CopyPlan::Union));
    rec(&mut b).proven = Proven { epoch: 5, seq: Sequence(1) };
    expect(&a, &b, Rule::BothLostPower, Outcome::Target(CopyPlan::Union));
    let (mut a, mut b) = two();
    expect(&a, &b, Rule::LastPrimary, Outcome::InStep { i_am_source: false });
    a.record.last_primary = 5;
    expect(&a, &b, Rule::LastPrimary, Outcome::InStep { i_am_source: true });
    b.volumes[0].dirty_blocks = 1;
    expect(&a, &b, Rule::LastPrimary, Outcome::Source(CopyPlan::Union));
}

/// Every combination of the fields that matter for one side.
fn product(name: &str, last_primary: u64, proven: u64) -> Vec<Hello> {
    let line = |n, history: &[u128], base| {
        (generation(n), history.iter().copied().map(generation).collect::<Vec<_>>(), generation(base))
    };
    let lines = [
        line(1, &[], 0),
        line(2, &[1], 1),
        line(3, &[1], 1),
        line(4, &[2, 1], 2),
        line(0, &[], 0),
        line(50, &[], 0),
    ];
    let states = [
        CopyState::Blank,
        CopyState::UpToDate,
        CopyState::Outdated,
        CopyState::Inconsistent { toward: generation(2) },
        CopyState::Failed,
    ];
    let lives = [LiveState::Joining, LiveState::Frozen, LiveState::Alone];
    let mut all = Vec::new();
    for (generation, history, base) in lines {
        for state in states {
            for live in lives {
                for bits in 0..16_u8 {
                    let bit = |n: u8| bits & (1 << n) != 0;
                    let mut h = hello(name, vec![copy()]);
                    h.live = live;
                    h.granted = bit(0) && bit(1) && bit(2) && bit(3);
                    h.record.era = if bit(0) { Era::Solo(6) } else { Era::Pair };
                    h.record.last_primary = last_primary;
                    h.volumes[0].dirty_blocks = u64::from(bit(1));
                    let record = rec(&mut h);
                    record.generation = generation;
                    record.history.clone_from(&history);
                    record.base = base;
                    record.state = state;
                    record.unproven = bit(2);
                    record.proven = Proven { epoch: 5, seq: Sequence(proven) };
                    all.push(h);
                }
            }
        }
    }
    all
}

/// Checks what must hold for every pair of hellos; returns the rule.
fn check(a: &Hello, b: &Hello) -> Rule {
    let side = |server| Side { server, volume: &server.volumes[0] };
    let decision = decide(side(a), side(b));
    assert_eq!(decision, decide(side(b), side(a)).reversed(), "not antisymmetric: {a:?} {b:?}");
    let (mine, theirs) = (&a.volumes[0].copy, &b.volumes[0].copy);
    let (source, target) = match decision.outcome {
        Outcome::Source(_) | Outcome::SourceAfterRight(_) => (a, b),
        Outcome::Target(_) | Outcome::TargetAfterRight(_) => (b, a),
        Outcome::Resume { .. } | Outcome::InStep { .. } => {
            assert_eq!(mine.generation, theirs.generation);
            assert_eq!((mine.state, theirs.state), (CopyState::UpToDate, CopyState::UpToDate));
            return decision.rule;
        }
        Outcome::NoResync { i_serve } => {
            let good = if i_serve { mine } else { theirs };
            assert_eq!(good.state, CopyState::UpToDate, "stale data served: {a:?} {b:?}");
            return decision.rule;
        }
        Outcome::Refuse { .. } | Outcome::Wait(_) | Outcome::SplitBrain => return decision.rule,
    };
    let (from, to) = (&source.volumes[0].copy, &target.volumes[0].copy);
    assert_eq!(from.state, CopyState::UpToDate, "copied from a copy that is not up to date: {a:?} {b:?}");
    assert_ne!(to.state, CopyState::Failed);
    let never_filled = to.state == CopyState::Blank || to.generation.is_none();
    let related = from.generation == to.generation || from.descends_from(to.generation);
    assert!(never_filled || related, "diverged or unrelated data overwritten: {a:?} {b:?}");
    if let Outcome::Source(CopyPlan::Union) | Outcome::Target(CopyPlan::Union) = decision.outcome {
        // A copy half made towards a generation may hold any block of it.
        let held = match to.state {
            CopyState::Inconsistent { toward } => toward,
            CopyState::Blank | CopyState::UpToDate | CopyState::Outdated | CopyState::Failed => to.generation,
        };
        let reached = from.map_reaches(held) || from.generation == held;
        assert!(reached, "a map relied on that does not reach back: {a:?} {b:?}");
    }
    if !never_filled {
        assert!(!to.descends_from(from.generation), "newer data overwritten: {a:?} {b:?}");
        let runs_alone = target.live.is_alone() && to.state == CopyState::UpToDate;
        assert!(!runs_alone, "a server that runs alone overwritten: {a:?} {b:?}");
    }
    decision.rule
}

#[test]
fn every_combination_is_decided_alike_and_safely() {
    let mut seen = std::collections::BTreeSet::new();
    for (last_a, last_b, proven_a, proven_b) in [(3, 3, 1, 1), (4, 3, 1, 2)] {
        let all_a = product("a", last_a, proven_a);
        let all_b = product("b", last_b, proven_b);
        for a in &all_a {
            for b in &all_b {
                seen.insert(check(a, b));
            }
        }
    }
    // Foreign identities are not in the product: the row test covers them.
    let missing: Vec<_> = Rule::ALL.iter().filter(|rule| !seen.contains(rule)).collect();
    assert_eq!(missing, [&Rule::Foreign]);
}

#[test]
fn names_and_numbers_are_unique() {
    let names: std::collections::BTreeSet<_> = Rule::ALL.iter().map(|rule| rule.name()).collect();
    assert_eq!(names.len(), Rule::ALL.len());
    assert_eq!(Rule::NewerUnusable.to_string(), "newer-unusable (D9x)");
}
