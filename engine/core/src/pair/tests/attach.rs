//! A disk that comes back while the process runs: it gives no right and takes none.

use super::*;

/// The peer adopted everything and the source gives its right back; then its disk fails, and the peer serves.
fn failed_while_returning() -> Bench {
    let mut bench = Bench::syncing();
    bench.nodes[A].hold = |_, order| matches!(order, Order::Return { .. });
    bench.adopt(B);
    bench.synced(A);
    assert_eq!(bench.live(A), LiveState::Returning);
    bench.disk_fails(A, 0);
    bench.nodes[A].hold = |_, _| false;
    bench.meet();
    bench.advance(300);
    assert_eq!(bench.live(B), LiveState::Alone);
    assert!(bench.nodes[A].disks[0].server.era.is_solo(), "the failed disk took no record");
    bench
}

#[test]
fn it_does_not_begin_a_second_primary() {
    let mut bench = failed_while_returning();
    bench.cut();
    bench.attach(A, 0);
    bench.advance(3000);
    assert!(!bench.serves(A), "beta serves");
    assert_eq!(bench.refused(A, Operator::Promote).code, "peer-not-heard");
    bench.meet();
    bench.advance(300);
    assert!(!bench.serves(A));
    let source = bench.nodes[A].server.session_view().and_then(|s| s.i_am_source);
    assert_eq!(source, Some(false), "beta holds what was written since");
}

#[test]
fn one_that_failed_at_the_start_waits_for_the_operator() {
    let mut bench = Bench::syncing();
    bench.begin_process(A);
    bench.disk_fails(A, 0);
    bench.load(A);
    assert!(!bench.serves(A));
    // Who knows what the operator did with beta meanwhile?
    bench.attach(A, 0);
    bench.advance(3000);
    assert!(!bench.serves(A));
    let token = bench.ask(A, Operator::Promote);
    assert!(matches!(bench.answer(A, token), Some(Ok(_))), "{:?}", bench.answer(A, token));
}

#[test]
fn one_that_could_not_be_read_at_the_start_gives_no_right_either() {
    let mut bench = Bench::syncing();
    bench.begin_process(A);
    let text = "the superblock cannot be read".to_owned();
    bench.input(A, Input::Report(VolumeIndex(0), Report::Unusable { code: "io", text }));
    bench.attach(A, 0);
    bench.advance(3000);
    assert!(!bench.serves(A));
    let token = bench.ask(A, Operator::Promote);
    assert!(matches!(bench.answer(A, token), Some(Ok(_))), "{:?}", bench.answer(A, token));
}

/// Two volumes, both adopted: alpha gives its right back.
fn returning_with_two() -> Bench {
    let mut bench = Bench::mirrored(2, Some(A));
    bench.cut();
    bench.advance(1500);
    bench.meet();
    bench.advance(100);
    bench.nodes[A].hold = |_, order| matches!(order, Order::Return { .. });
    for volume in [0, 1] {
        bench.adopt_volume(B, volume);
    }
    for volume in [0, 1] {
        let report = Report::Synced { total_bytes: 0, sent_bytes: 0 };
        bench.input(A, Input::Report(VolumeIndex(volume), report));
    }
    assert_eq!(bench.live(A), LiveState::Returning);
    bench
}

#[test]
fn a_right_given_back_stays_so_on_the_other_volumes() {
    let mut bench = returning_with_two();
    bench.nodes[A].held.clear();
    bench.nodes[A].hold = |_, _| false;
    bench.disk_fails(A, 0);
    assert!(!bench.nodes[A].disks[1].server.era.is_solo(), "the other disk's record is written without it");
    bench.restart(A);
    bench.advance(3000);
    assert!(!bench.serves(A));
}

#[test]
fn a_right_given_back_stays_so_in_whichever_order_the_disks_took_it() {
    let mut bench = returning_with_two();
    bench.nodes[A].hold = |_, _| false;
    // The record of volume 0 stands, that of volume 1 does not yet; then the disk of volume 0 fails.
    let at = bench.nodes[A].held.iter().position(|(index, _)| index.0 == 0).expect("held");
    let (index, order) = bench.nodes[A].held.remove(at);
    let report = bench.nodes[A].obey(index, order).expect("recorded");
    bench.input(A, Input::Report(index, report));
    bench.nodes[A].held.clear();
    bench.disk_fails(A, 0);
    assert!(bench.nodes[A].disks.iter().all(|disk| !disk.server.era.is_solo()));
    bench.meet();
    bench.advance(300);
    assert_eq!(bench.live(B), LiveState::Alone, "it adopted everything");
}

#[test]
fn a_record_that_lands_after_its_disk_was_given_up_does_not_count() {
    let mut bench = Bench::mirrored(1, Some(A));
    bench.nodes[A].hold = |_, order| matches!(order, Order::Record { .. });
    bench.cut();
    bench.advance(1500);
    assert_eq!(bench.live(A), LiveState::Granted);
    let (_, late) = bench.nodes[A].held.pop().expect("the record of going alone");
    bench.disk_fails(A, 0);
    let Order::Record { tag, change: CopyChange::NewGeneration { generation, .. }, .. } = late else {
        panic!("it goes alone");
    };
    let copy = Box::new(CopyRecord { generation, ..copy() });
    bench.input(A, Input::Report(VolumeIndex(0), Report::Recorded { tag, copy }));
    bench.nodes[A].hold = |_, _| false;
    bench.meet();
    bench.advance(300);
    assert_eq!(bench.live(B), LiveState::Alone, "nothing was completed in that generation");
}

#[test]
fn a_right_given_back_is_not_taken_up_by_the_other_volumes() {
    let mut bench = returning_with_two();
    // It loses the peer, goes alone again, and a disk fails in the middle.
    bench.nodes[A].hold = |index, order| index.0 == 0 && matches!(order, Order::Record { .. });
    bench.cut();
    bench.advance(1500);
    assert_eq!(bench.live(A), LiveState::Granted);
    bench.disk_fails(A, 0);
    assert!(!bench.nodes[A].disks[1].server.era.is_solo(), "beta may be primary: it adopted everything");
    assert_eq!(bench.refused(A, Operator::Promote).code, "not-up-to-date");
    bench.nodes[A].hold = |_, _| false;
    bench.attach(A, 0);
    bench.advance(3000);
    assert!(!bench.serves(A));
    assert_eq!(bench.refused(A, Operator::Promote).code, "peer-not-heard");
}

#[test]
fn the_other_volumes_keep_the_blocks_they_wrote_alone() {
    let mut bench = Bench::mirrored(2, Some(A));
    bench.cut();
    bench.advance(1500);
    assert_eq!(bench.live(A), LiveState::Alone);
    for volume in [0, 1] {
        bench.nodes[A].disks[volume].dirty_blocks = 5;
        let index = VolumeIndex(u16::try_from(volume).expect("two"));
        bench.input(A, Input::Report(index, Report::Dirty { blocks: 5 }));
    }
    bench.disk_fails(A, 1);
    let token = bench.ask(A, Operator::Demote);
    assert!(bench.answer(A, token).is_some_and(Result::is_ok));
    bench.attach(A, 1);
    let lacks: Vec<bool> = bench.nodes[A].server.volumes.iter().map(|v| v.lacks_solo).collect();
    assert_eq!(lacks, [false, false], "both were served alone");
    assert!(bench.nodes[A].disks.iter().all(|d| d.server.era.is_solo()));
}

#[test]
fn a_target_whose_disk_dies_before_anybody_serves_leaves_the_service_to_the_good_copy() {
    // Beta lost its memory, alpha was primary and lost power too: alpha copies to beta, serving or not.
    let mut bench = Bench::new(1, None);
    bench.nodes[A].disks[0].copy.unproven = true;
    bench.nodes[B].disks[0].copy.unproven = true;
    bench.nodes[A].disks[0].dirty_blocks = 3;
    bench.nodes[A].disks[0].server.last_primary = 1;
    bench.load(A);
    bench.load(B);
    bench.meet();
    bench.advance(100);
    let source = bench.nodes[A].server.session_view().and_then(|s| s.i_am_source);
    assert_eq!(source, Some(true));
    bench.disk_fails(B, 0);
    assert_eq!(bench.session, None, "both say anew what they hold");
    bench.meet();
    bench.advance(300);
    assert!(!bench.serves(A), "nobody asked for a primary");
    let token = bench.ask(A, Operator::Promote);
    assert!(matches!(bench.answer(A, token), Some(Ok(_))), "{:?}", bench.answer(A, token));
    assert_eq!(bench.live(A), LiveState::Alone);
}
