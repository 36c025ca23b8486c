use super::*;
use crate::format::record::{CopyRecord, CopyState, Era};
use crate::message::LiveState;
use crate::resync::fixtures::{copy, generation, hello};

fn two(volumes: usize) -> (Hello, Hello) {
    (hello("a", vec![copy(); volumes]), hello("b", vec![copy(); volumes]))
}

fn verdict(a: &Hello, b: &Hello) -> PairDecision {
    let decision = decide_pair(a, b);
    let other = decide_pair(b, a);
    assert_eq!(decision, other.clone().reversed());
    assert_eq!(who_is_primary(&decision, a, b), who_is_primary(&other, b, a).reversed());
    decision
}

fn newer(copy: &mut CopyRecord, to: u128) {
    copy.history.insert(0, copy.generation);
    copy.base = copy.generation;
    copy.generation = generation(to);
}

#[test]
fn an_in_step_volume_follows() {
    let (mut a, mut b) = two(2);
    b.record.last_primary = 9;
    assert_eq!(verdict(&a, &b).outcome, PairOutcome::InStep { i_am_source: false });
    newer(&mut a.volumes[1].copy, 2);
    let parts = vec![Some(Part::Source(CopyPlan::Union)), Some(Part::Source(CopyPlan::Union))];
    let decision = verdict(&a, &b);
    assert_eq!(decision.outcome, PairOutcome::Copy { i_am_source: true, right_first: false, parts });
    assert_eq!((decision.decisive, decision.rule), (1, Rule::Descends));
    // Also where its own last primary would be the source.
    b.volumes[0].dirty_blocks = 1;
    assert_eq!(verdict(&a, &b).i_am_source(), Some(true));
}

#[test]
fn mixed_sources_are_refused_by_name() {
    let (mut a, mut b) = two(3);
    newer(&mut a.volumes[0].copy, 2);
    newer(&mut b.volumes[2].copy, 3);
    let outcome = PairOutcome::Refuse {
        code: "mixed-sources",
        mine: "source of v0".to_owned(),
        theirs: "source of v2".to_owned(),
    };
    assert_eq!(verdict(&a, &b).outcome, outcome);
}

#[test]
fn a_split_brain_on_one_volume_is_one_of_the_pair() {
    let (mut a, mut b) = two(3);
    newer(&mut a.volumes[0].copy, 2);
    a.volumes[1].copy.size_bytes = 4096;
    newer(&mut a.volumes[2].copy, 2);
    newer(&mut b.volumes[2].copy, 3);
    let decision = verdict(&a, &b);
    assert_eq!((decision.outcome, decision.decisive), (PairOutcome::SplitBrain, 2));
}

#[test]
fn other_volumes_are_refused() {
    let (a, b) = (hello("a", vec![copy()]), hello("b", vec![copy(), copy()]));
    let PairOutcome::Refuse { code, mine, theirs } = verdict(&a, &b).outcome else { panic!("not refused") };
    assert_eq!((code, mine.as_str(), theirs.as_str()), ("volumes-differ", "v0", "v0, v1"));
    let (a, b) = two(0);
    assert!(matches!(verdict(&a, &b).outcome, PairOutcome::Refuse { .. }));
}

#[test]
fn a_live_primary_with_one_unproven_peer_volume_goes_alone_first() {
    let (mut a, mut b) = two(2);
    a.live = LiveState::Frozen;
    let decision = verdict(&a, &b);
    assert_eq!(decision.outcome, PairOutcome::Resume { i_am_primary: true });
    assert_eq!(who_is_primary(&decision, &a, &b), Primary::Mine);
    b.volumes[1].copy.unproven = true;
    let decision = verdict(&a, &b);
    let parts = vec![Some(Part::Source(CopyPlan::Union)); 2];
    assert_eq!(decision.outcome, PairOutcome::Copy { i_am_source: true, right_first: true, parts });
}

#[test]
fn a_failed_copy_moves_the_whole_pair() {
    let (a, mut b) = two(2);
    b.volumes[0].copy.state = CopyState::Failed;
    b.record.last_primary = 9;
    let parts = vec![None, Some(Part::Source(CopyPlan::Union))];
    let outcome = PairOutcome::Copy { i_am_source: true, right_first: false, parts };
    assert_eq!(verdict(&a, &b).outcome, outcome);
}

#[test]
fn blank_volumes_wait_for_activate() {
    let (mut a, mut b) = two(2);
    for h in [&mut a, &mut b] {
        h.volumes[1].copy = CopyRecord::blank(64 << 20, 4096, 4096);
    }
    assert_eq!(verdict(&a, &b).outcome, PairOutcome::Wait(WaitFor::Activate));
}

#[test]
fn power_lost_on_both_names_one_source_for_all_volumes() {
    let (mut a, mut b) = two(2);
    for h in [&mut a, &mut b] {
        h.volumes.iter_mut().for_each(|v| v.copy.unproven = true);
    }
    a.volumes[0].copy.proven.epoch = 4;
    b.volumes[1].copy.proven.epoch = 4;
    assert_eq!(verdict(&a, &b).i_am_source(), Some(true));
}

#[test]
fn the_last_primary_comes_back_by_itself() {
    let (mut a, b) = two(1);
    let decision = verdict(&a, &b);
    assert_eq!(who_is_primary(&decision, &a, &b), Primary::Nobody);
    // In step: either flag counts.
    a.record.was_primary = true;
    assert_eq!(decision.i_am_source(), Some(false));
    assert_eq!(who_is_primary(&decision, &a, &b), Primary::Theirs);
}

#[test]
fn a_stale_flag_of_the_one_left_behind_does_not_undo_a_demotion() {
    let (mut a, mut b) = two(1);
    newer(&mut a.volumes[0].copy, 2);
    b.record.was_primary = true;
    let decision = verdict(&a, &b);
    assert_eq!((decision.rule, decision.i_am_source()), (Rule::Descends, Some(true)));
    assert_eq!(who_is_primary(&decision, &a, &b), Primary::Nobody);
    a.record.was_primary = true;
    assert_eq!(who_is_primary(&decision, &a, &b), Primary::Mine);
    let (mut a, mut b) = two(1);
    a.record.era = Era::Solo(6);
    b.record.was_primary = true;
    let decision = verdict(&a, &b);
    assert_eq!(decision.rule, Rule::SoloEra);
    assert_eq!(who_is_primary(&decision, &a, &b), Primary::Nobody);
}
