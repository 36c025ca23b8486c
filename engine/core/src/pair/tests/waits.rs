//! What waits for the other server, and for how long.

use super::*;

const fn is_hand_over_record(_: VolumeIndex, order: &Order) -> bool {
    matches!(order, Order::Record { .. })
}

#[test]
fn mirrored_that_comes_before_the_own_volumes_told_is_kept_until_they_do() {
    let mut bench = Bench::syncing();
    // The source hears of the adoption on the data connection, and is quicker than the target's own volume.
    bench.synced(A);
    assert_eq!(bench.live(A), LiveState::PrimaryMirrored);
    assert_eq!(bench.nodes[B].server.state_word(), "syncing", "its own copy is not adopted yet");
    bench.adopt(B);
    assert_eq!(bench.nodes[B].server.state_word(), "mirrored");
    assert_eq!(bench.live(B), LiveState::Secondary);
    bench.advance(2000);
    assert_eq!(bench.live(A), LiveState::PrimaryMirrored);
}

#[test]
fn mirrored_of_an_ended_session_is_not_kept_for_the_next() {
    let mut bench = Bench::syncing();
    bench.synced(A);
    bench.cut();
    bench.advance(1500);
    bench.meet();
    bench.advance(100);
    bench.adopt(B);
    assert_eq!(bench.nodes[B].server.state_word(), "syncing", "the source of this session did not say it");
}

#[test]
fn down_does_not_wait_for_ever_for_a_peer_that_never_takes_over() {
    let mut bench = Bench::mirrored(1, Some(A));
    // The peer lives and answers heartbeats, but its record never becomes durable.
    bench.nodes[B].hold = is_hand_over_record;
    let token = bench.ask(A, Operator::Down);
    bench.advance(5_000);
    assert_eq!(bench.answer(A, token), None, "the peer may still take over");
    assert!(!bench.serves(A));
    bench.advance(30_000);
    let text = bench.answer(A, token).expect("bounded").clone().expect("the end itself is orderly");
    assert!(text.contains("did not say that it is primary"), "{text}");
    assert!(text.contains("promote --peer-is-down"), "{text}");
    assert!(bench.nodes[A].exited);
    assert!(bench.nodes[A].disks[0].server.clean);
}

#[test]
fn a_switchover_does_not_wait_for_ever_for_a_peer_that_never_takes_over() {
    let mut bench = Bench::mirrored(1, Some(A));
    bench.nodes[B].hold = is_hand_over_record;
    let token = bench.ask(A, Operator::Switchover);
    bench.advance(40_000);
    let refusal = bench.answer(A, token).expect("bounded").clone().expect_err("it is not done");
    assert_eq!(refusal.code, "no-answer");
    // A late peer is welcome all the same.
    bench.release(B);
    bench.advance(300);
    assert_eq!(bench.live(B), LiveState::PrimaryMirrored);
    assert_eq!(bench.live(A), LiveState::Secondary);
}

#[test]
fn promote_does_not_wait_for_ever_for_a_primary_that_never_hands_over() {
    let mut bench = Bench::mirrored(1, Some(A));
    bench.nodes[A].hold = |_, order| matches!(order, Order::Drain { .. });
    let token = bench.ask(B, Operator::Promote);
    bench.advance(40_000);
    let refusal = bench.answer(B, token).expect("bounded").clone().expect_err("it is not done");
    assert_eq!(refusal.code, "no-answer");
    // Nor is the primary's next command kept back.
    bench.release(A);
    let token = bench.ask(A, Operator::Switchover);
    bench.advance(300);
    assert!(bench.answer(A, token).is_some_and(Result::is_ok));
}

#[test]
fn a_wait_ends_when_a_copy_fails() {
    let mut bench = Bench::mirrored(1, Some(A));
    bench.nodes[B].hold = is_hand_over_record;
    let token = bench.ask(A, Operator::Switchover);
    bench.disk_fails(B, 0);
    bench.advance(40_000);
    assert!(bench.answer(A, token).is_some());
}

#[test]
fn a_source_cut_off_while_it_gives_its_right_back_goes_alone_at_once() {
    let mut bench = Bench::syncing();
    bench.nodes[A].hold = |_, order| matches!(order, Order::Return { .. });
    bench.adopt(B);
    bench.synced(A);
    assert_eq!(bench.live(A), LiveState::Returning);
    let before = bench.nodes[A].disks[0].copy.generation;
    bench.cut();
    bench.nodes[A].hold = |_, _| false;
    bench.advance(20);
    // The peer was never told `mirrored`: it may not serve, so no silence has to pass.
    assert_eq!(bench.live(A), LiveState::Alone);
    assert_ne!(bench.nodes[A].disks[0].copy.generation, before, "G7: the peer may have adopted the old one");
    bench.meet();
    bench.advance(100);
    assert_eq!(bench.live(A), LiveState::Syncing);
    assert!(matches!(bench.nodes[B].disks[0].copy.state, CopyState::Inconsistent { .. }));
}

#[test]
fn a_return_that_was_cut_off_ends_in_the_next_session() {
    let mut bench = Bench::syncing();
    bench.nodes[A].hold = |_, order| matches!(order, Order::Return { .. });
    bench.adopt(B);
    bench.synced(A);
    bench.cut();
    bench.nodes[A].hold = |_, _| false;
    bench.nodes[A].held.clear();
    bench.meet();
    bench.advance(100);
    assert_eq!(bench.live(A), LiveState::Syncing);
    bench.adopt(B);
    bench.synced(A);
    bench.advance(100);
    assert_eq!(bench.live(A), LiveState::PrimaryMirrored);
    assert_eq!(bench.live(B), LiveState::Secondary);
}

const fn is_drain(_: VolumeIndex, order: &Order) -> bool {
    matches!(order, Order::Drain { .. })
}

/// A mirrored primary whose volumes have operations in flight that do not end.
fn busy() -> Bench {
    let mut bench = Bench::mirrored(2, Some(A));
    bench.nodes[A].hold = is_drain;
    bench
}

/// The commands that drain first.
const DRAINING: [Operator; 3] = [Operator::Switchover, Operator::Down, Operator::Demote];

#[test]
fn a_drain_whose_peer_is_lost_is_answered_at_once() {
    for command in DRAINING {
        let mut bench = busy();
        let token = bench.ask(A, command.clone());
        bench.advance(300);
        assert_eq!(bench.answer(A, token), None, "{command:?}");
        bench.cut();
        let refusal = bench.answer(A, token).expect("answered").clone().expect_err("it is not done");
        assert_eq!(refusal.code, "peer-lost", "{command:?}");
        bench.advance(1500);
        assert_eq!(bench.live(A), LiveState::Alone, "{command:?}");
        // A volume that tells late, of a drain that nobody wants any more.
        bench.release(A);
        bench.advance(100);
        assert_eq!(bench.live(A), LiveState::Alone, "{command:?}");
        assert!(bench.serves(A) && !bench.nodes[A].exited, "{command:?}");
        assert!(bench.nodes[A].disks.iter().all(|d| d.server.was_primary), "{command:?}");
        let again = bench.ask(A, Operator::Demote);
        assert!(bench.answer(A, again).is_some_and(Result::is_ok), "the next one is not kept back by it");
    }
}

#[test]
fn a_drain_whose_peer_s_copy_fails_is_answered_at_once() {
    for command in DRAINING {
        let mut bench = busy();
        let token = bench.ask(A, command.clone());
        bench.disk_fails(B, 0);
        assert!(bench.answer(A, token).is_some_and(Result::is_err), "{command:?}");
        assert_eq!(bench.live(A), LiveState::Alone, "{command:?}");
    }
}

#[test]
fn a_drain_whose_own_copy_fails_is_answered_with_the_reason() {
    for command in DRAINING {
        let mut bench = busy();
        let token = bench.ask(A, command.clone());
        bench.disk_fails(A, 1);
        let refusal = bench.answer(A, token).expect("answered").clone().expect_err("it is not done");
        assert_eq!(refusal.code, "disk-failed", "{command:?}");
        assert!(refusal.text.contains("v1"), "{}", refusal.text);
        bench.advance(300);
        assert_eq!(bench.live(B), LiveState::Alone, "{command:?}");
    }
}

#[test]
fn a_drain_that_does_not_end_is_answered_and_the_volumes_serve_again() {
    for command in DRAINING {
        let mut bench = busy();
        let token = bench.ask(A, command.clone());
        for disk in &mut bench.nodes[A].disks {
            disk.serve = None;
        }
        bench.advance(40_000);
        let refusal = bench.answer(A, token).expect("bounded").clone().expect_err("it is not done");
        assert_eq!(refusal.code, "no-answer", "{command:?}");
        assert_eq!(bench.live(A), LiveState::PrimaryMirrored, "{command:?}");
        assert!(bench.nodes[A].disks.iter().all(|d| d.serve == Some(ServeMode::Mirrored)), "{command:?}");
        bench.release(A);
        bench.advance(100);
        assert_eq!(bench.live(A), LiveState::PrimaryMirrored, "{command:?}");
    }
}

#[test]
fn a_second_command_does_not_take_the_first_one_s_drain() {
    for first in [Operator::Switchover, Operator::Down] {
        for second in DRAINING {
            let mut bench = busy();
            let token = bench.ask(A, first.clone());
            assert_eq!(bench.refused(A, second.clone()).code, "not-now", "{first:?}, {second:?}");
            bench.release(A);
            bench.advance(300);
            assert!(bench.answer(A, token).is_some_and(Result::is_ok), "{first:?}, {second:?}");
            assert!(!bench.serves(A), "{first:?}, {second:?}");
        }
    }
}

#[test]
fn down_here_and_promote_there_do_not_take_each_other_s_drain() {
    let mut bench = busy();
    let down = bench.ask(A, Operator::Down);
    let promote = bench.ask(B, Operator::Promote);
    let refusal = bench.answer(B, promote).expect("answered").clone().expect_err("not now");
    assert_eq!(refusal.code, "not-now");
    bench.release(A);
    bench.advance(300);
    assert!(bench.answer(A, down).is_some_and(Result::is_ok));
    assert!(bench.nodes[A].exited);

    let mut bench = busy();
    let promote = bench.ask(B, Operator::Promote);
    assert_eq!(bench.refused(A, Operator::Down).code, "not-now");
    bench.release(A);
    bench.advance(300);
    assert!(bench.answer(B, promote).is_some_and(Result::is_ok));
    assert_eq!(bench.live(B), LiveState::PrimaryMirrored);
}

#[test]
fn an_end_in_order_answers_the_command_whose_drain_it_takes() {
    for command in DRAINING {
        let mut bench = busy();
        let token = bench.ask(A, command.clone());
        bench.ask(A, Operator::Stop);
        let refusal = bench.answer(A, token).expect("answered").clone().expect_err("it is not done");
        assert_eq!(refusal.code, "stopping", "{command:?}");
    }
}
