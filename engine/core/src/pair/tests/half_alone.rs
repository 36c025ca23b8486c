//! A disk or a process that ends in the middle of G4, with several volumes.

use super::*;

const fn record_of_volume_0(index: VolumeIndex, order: &Order) -> bool {
    index.0 == 0 && matches!(order, Order::Record { .. })
}

/// Alpha lost its peer and writes that it goes alone: volume 1 has the record, volume 0 not yet.
fn half_alone() -> Bench {
    let mut bench = Bench::mirrored(2, Some(A));
    bench.nodes[A].hold = record_of_volume_0;
    bench.cut();
    bench.advance(1500);
    assert_eq!(bench.live(A), LiveState::Granted);
    assert!(bench.nodes[A].disks[1].server.era.is_solo());
    assert!(!bench.nodes[A].disks[0].server.era.is_solo());
    bench
}

#[test]
fn a_disk_that_dies_while_going_alone_leaves_no_volume_with_a_lineage_of_its_own() {
    let mut bench = half_alone();
    bench.disk_fails(A, 0);
    assert!(!bench.serves(A));
    assert_eq!(bench.live(A), LiveState::Joining);
    assert_eq!(bench.nodes[A].disks[1].copy.generation, copy().generation);
    assert_eq!(bench.nodes[A].disks[1].copy.history, copy().history);
    assert!(!bench.nodes[A].disks[1].server.era.is_solo());
    assert!(bench.nodes[A].disks[1].server.was_primary, "the peer is to know that it takes over");
    let reason = bench.nodes[A].server.reason().to_owned();
    assert!(reason.contains("v0") && reason.contains("beta"), "{reason}");
    // The peer's copies are whole: it serves as soon as they meet.
    bench.meet();
    bench.advance(300);
    assert_eq!(bench.live(B), LiveState::Alone);
}

#[test]
fn its_replaced_disk_is_copied_from_the_peer_with_the_others() {
    let mut bench = half_alone();
    bench.disk_fails(A, 0);
    let fresh = CopyRecord::blank(64 << 20, 4096, 4096);
    bench.nodes[A].disks[0] = Disk {
        copy: fresh,
        server: ServerRecord::fresh(BootId(1)),
        dirty_blocks: 0,
        serve: None,
        failed: false,
    };
    bench.nodes[A].hold = |_, _| false;
    bench.restart(A);
    bench.meet();
    bench.advance(300);
    let refusal = bench.nodes[A].server.session_view().and_then(|s| s.refusal);
    assert_eq!(refusal, None);
    assert!(bench.nodes[A].disks.iter().all(|d| matches!(d.copy.state, CopyState::Inconsistent { .. })));
}

#[test]
fn a_command_that_waits_for_it_is_refused() {
    let mut bench = Bench::mirrored(2, Some(A));
    bench.cut();
    bench.nodes[B].hold = record_of_volume_0;
    bench.advance(1500);
    let token = bench.ask(B, Operator::PromotePeerIsDown);
    assert_eq!(bench.answer(B, token), None);
    bench.disk_fails(B, 0);
    let refusal = bench.answer(B, token).expect("answered").clone().expect_err("it cannot be done");
    assert!(refusal.text.contains("v0"), "{}", refusal.text);
}

#[test]
fn a_server_that_is_told_to_end_does_not_begin_to_serve() {
    let mut bench = Bench::mirrored(1, Some(A));
    bench.cut();
    bench.ask(B, Operator::PromotePeerIsDown);
    assert_eq!(bench.live(B), LiveState::Granted, "the old primary's lease may not be over");
    bench.nodes[B].hold = |_, order| matches!(order, Order::Record { .. });
    bench.ask(B, Operator::Down);
    bench.advance(3000);
    assert!(!bench.serves(B), "its record may say by now that it ended in order");
}

#[test]
fn a_server_that_ended_while_going_alone_waits_for_its_peer() {
    let mut bench = half_alone();
    bench.nodes[A].hold = |_, _| false;
    bench.restart(A);
    bench.advance(3000);
    assert!(!bench.serves(A), "nothing was completed alone: a volume that lacks the record is settled first");
    let reason = bench.nodes[A].server.reason().to_owned();
    assert!(reason.contains("v0") && reason.contains("promote"), "{reason}");
    bench.meet();
    bench.advance(300);
    assert_eq!(bench.live(A), LiveState::Syncing, "both volumes have a source");
}

#[test]
fn the_operator_who_knows_that_the_peer_is_down_may_let_it_go_alone_anew() {
    let mut bench = half_alone();
    bench.nodes[A].hold = |_, _| false;
    bench.restart(A);
    let refusal = bench.refused(A, Operator::Promote);
    assert_eq!(refusal.code, "peer-not-heard", "the peer may have been promoted");
    let token = bench.ask(A, Operator::PromotePeerIsDown);
    bench.advance(1500);
    assert!(matches!(bench.answer(A, token), Some(Ok(_))), "{:?}", bench.answer(A, token));
    assert!(bench.nodes[A].disks.iter().all(|d| d.copy.origin == Origin::Solo && d.server.era.is_solo()));
}

#[test]
fn what_it_lost_with_its_memory_may_be_on_the_peer_only() {
    let mut bench = half_alone();
    bench.nodes[A].hold = |_, _| false;
    // A power cut: the volume without the record lost what was not flushed.
    bench.nodes[A].disks[0].copy.unproven = true;
    bench.restart(A);
    let refusal = bench.refused(A, Operator::PromotePeerIsDown);
    assert_eq!(refusal.code, "not-proven-current");
    assert!(refusal.text.contains("--force"), "{}", refusal.text);
}

#[test]
fn a_solo_run_is_remembered_whichever_volume_has_its_record() {
    for volume in [0, 1] {
        let mut bench = half_alone();
        bench.nodes[A].hold = |_, _| false;
        bench.nodes[A].disks.swap(0, volume);
        // Written since with the number of the other one's.
        let number = bench.nodes[A].disks.iter().map(|d| d.server.order()).max().expect("two").1;
        for disk in &mut bench.nodes[A].disks {
            disk.server.counter = number;
            disk.server.epoch_seen.number = 7;
        }
        bench.restart(A);
        assert!(
            bench.nodes[A].server.record.era.is_solo(),
            "the record is on the disk swapped with {volume}"
        );
    }
}

#[test]
fn a_solo_run_that_is_taken_up_again_goes_on_without_a_disk_that_dies() {
    let mut bench = Bench::mirrored(2, Some(A));
    bench.cut();
    bench.advance(1500);
    assert_eq!(bench.live(A), LiveState::Alone);
    bench.nodes[A].hold = record_of_volume_0;
    bench.restart(A);
    assert_eq!(bench.live(A), LiveState::Granted);
    bench.disk_fails(A, 0);
    assert_eq!(bench.live(A), LiveState::Alone, "volume 1 holds writes that nobody else has");
}

#[test]
fn a_frozen_server_without_a_disk_ends_its_service_when_it_would_go_alone() {
    let mut bench = Bench::mirrored(2, Some(A));
    bench.cut();
    bench.disk_fails(A, 1);
    assert_eq!(bench.live(A), LiveState::Frozen, "the peer may come back at once");
    bench.advance(1500);
    assert!(!bench.serves(A));
    assert_eq!(bench.live(A), LiveState::Joining, "nobody waits for ever");
    assert_eq!(bench.nodes[A].disks[0].copy.generation, copy().generation);
}

#[test]
fn a_record_that_a_failed_disk_owes_does_not_keep_the_next_session_waiting() {
    let mut bench = Bench::mirrored(2, Some(A));
    bench.disk_fails(B, 0);
    bench.advance(300);
    assert_eq!(bench.live(A), LiveState::Alone);
    // The secondary notes the new primary; its failed disk takes no record.
    bench.cut();
    bench.meet();
    bench.advance(300);
    let mine = bench.nodes[B].server.session_view().map(|s| s.refusal);
    assert!(mine.is_some());
    let explained = bench.nodes[A].server.explain(VolumeIndex(0));
    assert!(explained.is_some(), "both hellos are there");
}

#[test]
fn a_source_whose_disk_dies_while_it_gives_its_right_back_leaves_the_service_to_its_peer() {
    let mut bench = Bench::syncing();
    bench.nodes[A].hold = |_, order| matches!(order, Order::Return { .. });
    bench.adopt(B);
    bench.synced(A);
    assert_eq!(bench.live(A), LiveState::Returning);
    bench.disk_fails(A, 0);
    bench.meet();
    bench.advance(300);
    assert!(!bench.serves(A));
    assert_eq!(bench.live(B), LiveState::Alone);
}
