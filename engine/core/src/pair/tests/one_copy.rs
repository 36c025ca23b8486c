//! One copy is failed: who serves, and what the operator may do (D4, G12).

use super::*;

/// `demote`, then a disk fails: nobody serves, the copies are not in step any more.
fn nobody_serves_and_beta_failed() -> Bench {
    let mut bench = Bench::mirrored(1, Some(A));
    let token = bench.ask(A, Operator::Demote);
    assert!(bench.answer(A, token).is_some_and(Result::is_ok));
    bench.disk_fails(B, 0);
    bench.advance(300);
    bench
}

#[test]
fn a_failed_copy_of_a_pair_without_a_primary_makes_none() {
    let bench = nobody_serves_and_beta_failed();
    assert!(!bench.serves(A), "the operator demoted it; nobody asked for a primary");
    assert!(!bench.serves(B));
    let reason = bench.nodes[A].server.reason();
    assert!(reason.contains("duplex promote"), "{reason}");
}

#[test]
fn promote_on_the_good_side_makes_it_primary_alone() {
    let mut bench = nobody_serves_and_beta_failed();
    let token = bench.ask(A, Operator::Promote);
    assert!(matches!(bench.answer(A, token), Some(Ok(_))), "{:?}", bench.answer(A, token));
    assert_eq!(bench.live(A), LiveState::Alone);
    assert_eq!(bench.nodes[A].disks[0].serve, Some(ServeMode::Alone));
    let copy = &bench.nodes[A].disks[0].copy;
    assert_eq!(copy.origin, Origin::Solo, "G4: a generation of its own before anything completes");
    assert!(bench.nodes[A].disks[0].server.era.is_solo());
}

#[test]
fn promote_on_the_bad_side_is_refused_with_the_reason() {
    let mut bench = nobody_serves_and_beta_failed();
    let refusal = bench.refused(B, Operator::Promote);
    assert_eq!(refusal.code, "not-up-to-date");
    for word in ["v0", "failed", "errno 5", "duplex promote", "alpha", "duplex attach v0"] {
        assert!(refusal.text.contains(word), "{word:?} is not in: {}", refusal.text);
    }
    assert!(!bench.serves(B));
}

#[test]
fn the_good_side_may_be_promoted_when_the_bad_one_is_lost() {
    let mut bench = nobody_serves_and_beta_failed();
    bench.cut();
    bench.advance(1500);
    let token = bench.ask(A, Operator::PromotePeerIsDown);
    assert!(matches!(bench.answer(A, token), Some(Ok(_))), "{:?}", bench.answer(A, token));
    let refusal = bench.refused(B, Operator::PromotePeerIsDown);
    assert_eq!(refusal.code, "not-up-to-date");
}

#[test]
fn the_good_side_becomes_primary_by_itself_where_one_was_primary() {
    let mut bench = Bench::new(1, Some(B));
    bench.load(A);
    bench.load(B);
    bench.disk_fails(B, 0);
    bench.meet();
    bench.advance(300);
    assert_eq!(bench.live(A), LiveState::Alone, "beta was primary and has no copy any more");
    assert!(!bench.serves(B));
}

#[test]
fn a_pair_that_meets_with_a_failed_copy_waits_for_promote_where_none_was_primary() {
    let mut bench = Bench::new(1, None);
    bench.load(A);
    bench.load(B);
    bench.disk_fails(B, 0);
    bench.meet();
    bench.advance(300);
    assert!(!bench.serves(A));
    let token = bench.ask(A, Operator::Promote);
    assert!(matches!(bench.answer(A, token), Some(Ok(_))), "{:?}", bench.answer(A, token));
    assert_eq!(bench.live(A), LiveState::Alone);
}

#[test]
fn a_primary_with_a_failed_copy_ends_its_service_before_the_good_one_begins() {
    let mut bench = Bench::mirrored(1, Some(B));
    bench.cut();
    bench.disk_fails(B, 0);
    // Frozen without a disk: the peer is met before the silence is over.
    assert_eq!(bench.live(B), LiveState::Frozen);
    bench.meet();
    bench.advance(100);
    assert!(!bench.serves(B));
    assert_eq!(bench.live(A), LiveState::Alone);
    let stopped = bench.nodes[B].disks[0].serve.is_none();
    assert!(stopped);
}

#[test]
fn the_last_copy_is_not_detached() {
    let mut bench = Bench::mirrored(1, Some(A));
    let token = bench.ask(B, Operator::Detach(VolumeIndex(0)));
    assert!(bench.answer(B, token).is_some_and(Result::is_ok));
    bench.advance(300);
    assert_eq!(bench.live(A), LiveState::Alone);
    let refusal = bench.refused(A, Operator::Detach(VolumeIndex(0)));
    assert_eq!(refusal.code, "last-copy");
    assert!(bench.serves(A));
    let reason = bench.nodes[A].server.reason().to_owned();
    assert!(reason.contains("copy failed"), "{reason}");
    let reason = bench.nodes[B].server.reason().to_owned();
    assert!(reason.contains("failed") && reason.contains("duplex attach v0"), "{reason}");
}

#[test]
fn nor_is_it_where_nobody_serves() {
    let mut bench = nobody_serves_and_beta_failed();
    let refusal = bench.refused(A, Operator::Detach(VolumeIndex(0)));
    assert_eq!(refusal.code, "last-copy");
    assert!(refusal.text.contains("beta") && refusal.text.contains("duplex attach v0"), "{}", refusal.text);
    assert!(!bench.nodes[A].disks[0].failed);
    // The failed one may go.
    let token = bench.ask(B, Operator::Detach(VolumeIndex(0)));
    assert!(bench.answer(B, token).is_some_and(Result::is_ok));
}

#[test]
fn the_users_of_a_front_are_not_cut_off() {
    for command in [Operator::Demote, Operator::Down] {
        let mut bench = Bench::mirrored(1, Some(A));
        bench.disk_fails(A, 0);
        bench.advance(300);
        assert_eq!(bench.nodes[A].disks[0].serve, Some(ServeMode::Front));
        bench.nodes[A].server.set_in_use(Some("/srv".to_owned()));
        let refusal = bench.refused(A, command.clone());
        assert_eq!(refusal.code, "in-use", "{command:?}");
        assert!(refusal.text.contains("/srv"), "{}", refusal.text);
        bench.advance(300);
        assert!(bench.serves(A) && !bench.nodes[A].exited, "{command:?}");
        bench.nodes[A].server.set_in_use(None);
        let token = bench.ask(A, command.clone());
        bench.advance(300);
        assert!(bench.answer(A, token).is_some_and(Result::is_ok), "{command:?}");
        assert!(!bench.serves(A), "{command:?}");
    }
}

#[test]
fn a_server_without_a_disk_can_be_demoted_and_gets_its_disk_back() {
    let mut bench = Bench::mirrored(1, Some(A));
    bench.cut();
    bench.advance(1500);
    assert_eq!(bench.live(A), LiveState::Alone);
    bench.disk_fails(A, 0);
    let token = bench.ask(A, Operator::Demote);
    assert!(bench.answer(A, token).is_some_and(Result::is_ok), "its failed disk takes no record");
    assert!(!bench.serves(A));
    // The disk only was away: it is taken again.
    bench.nodes[A].disks[0].failed = false;
    bench.input(A, Input::Reopened(VolumeIndex(0)));
    bench.load(A);
    bench.meet();
    bench.advance(300);
    let source = bench.nodes[A].server.session_view().and_then(|s| s.i_am_source);
    assert_eq!(source, Some(true), "its solo blocks are the newest");
    assert!(!bench.serves(A), "it was demoted, whatever its disk still says");
}

/// Beta's disk failed, and its volume is ended for a new one, which cannot be opened: whatever it is ordered is lost.
fn the_failed_disk_is_let_go(bench: &mut Bench) {
    bench.nodes[B].hold = |_, _| true;
    bench.input(B, Input::Gone(VolumeIndex(0)));
    assert!(bench.nodes[B].server.lets_go(VolumeIndex(0)));
}

#[test]
fn a_disk_that_could_not_be_attached_keeps_no_session_waiting() {
    let mut bench = Bench::mirrored(1, Some(A));
    bench.disk_fails(B, 0);
    bench.advance(300);
    the_failed_disk_is_let_go(&mut bench);
    bench.meet();
    bench.advance(300);
    assert_eq!(bench.live(A), LiveState::Alone);
    let view = bench.nodes[A].server.volume(VolumeIndex(0)).expect("volume 0");
    assert_eq!(view.peer_copy, Some(CopyState::Failed), "beta says a hello without its disk");
    // The next attempt finds a disk.
    bench.nodes[B].held.clear();
    bench.nodes[B].hold = |_, _| false;
    bench.nodes[B].disks[0].failed = false;
    bench.input(B, Input::Reopened(VolumeIndex(0)));
    bench.load(B);
    bench.meet();
    bench.advance(300);
    assert_eq!(bench.live(A), LiveState::Syncing);
    assert_eq!(bench.nodes[B].server.state_word(), "syncing");
}

#[test]
fn what_waited_for_a_disk_that_is_let_go_goes_on_without_it() {
    let mut bench = Bench::mirrored(1, Some(A));
    bench.disk_fails(B, 0);
    bench.cut();
    bench.nodes[B].hold = |_, order| matches!(order, Order::TellMarks { .. });
    bench.meet();
    bench.advance(100);
    assert_eq!(bench.nodes[B].held.len(), 1, "the hello waits for the marks");
    the_failed_disk_is_let_go(&mut bench);
    bench.meet();
    bench.advance(1500);
    assert_eq!(bench.live(A), LiveState::Alone);
    let view = bench.nodes[A].server.volume(VolumeIndex(0)).expect("volume 0");
    assert_eq!(view.peer_copy, Some(CopyState::Failed));
}

#[test]
fn the_clients_of_a_front_end_before_its_disk_is_let_go() {
    let mut bench = Bench::mirrored(1, Some(A));
    bench.disk_fails(A, 0);
    bench.advance(300);
    assert_eq!(bench.nodes[A].disks[0].serve, Some(ServeMode::Front));
    bench.input(A, Input::Gone(VolumeIndex(0)));
    assert!(!bench.serves(A), "nothing answers for its clients");
    assert_eq!(bench.live(B), LiveState::Alone);
    bench.nodes[A].hold = |_, _| true;
    let token = bench.ask(A, Operator::Down);
    assert!(bench.answer(A, token).is_some_and(Result::is_ok), "and it can end");
    assert!(bench.nodes[A].exited);
}
