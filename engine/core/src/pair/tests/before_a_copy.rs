//! What a source makes durable before the target begins.

use super::*;
use crate::mirror::api::{CopyPlan, Part};

/// Both servers lost power while nobody was primary; alpha's volume 1 is the better proven one.
fn both_lost_power() -> Bench {
    let mut bench = Bench::new(2, None);
    for disk in bench.nodes.iter_mut().flat_map(|node| &mut node.disks) {
        disk.copy.unproven = true;
        disk.dirty_blocks = 1;
    }
    bench.nodes[A].disks[1].copy.unproven = false;
    bench
}

fn is_target_record(_: VolumeIndex, order: &Order) -> bool {
    matches!(order, Order::Record { change: CopyChange::Target { .. }, .. })
}

fn is_source_record(_: VolumeIndex, order: &Order) -> bool {
    matches!(order, Order::Record { change: CopyChange::Proven | CopyChange::WholeMap { .. }, .. })
}

#[test]
fn a_source_that_does_not_serve_vouches_before_the_target_begins() {
    let mut bench = both_lost_power();
    bench.nodes[A].hold = is_source_record;
    bench.load(A);
    bench.load(B);
    bench.meet();
    assert!(!bench.nodes[A].held.is_empty(), "volume 0 is unproven");
    assert!(bench.nodes[B].disks.iter().all(|d| d.copy.state == CopyState::UpToDate), "the target waits");
    bench.release(A);
    assert!(bench.nodes[A].disks.iter().all(|d| !d.copy.unproven));
    let inconsistent = |d: &Disk| matches!(d.copy.state, CopyState::Inconsistent { .. });
    assert!(bench.nodes[B].disks.iter().all(inconsistent));
}

#[test]
fn a_target_that_adopted_one_volume_of_two_is_still_the_target_of_both() {
    let mut bench = both_lost_power();
    bench.load(A);
    bench.load(B);
    bench.meet();
    // Volume 0 was unproven on both: the target's adoption makes it proven there.
    bench.adopt_volume(B, 0);
    bench.restart(B);
    bench.meet();
    let refusal = bench.nodes[A].server.session_view().and_then(|s| s.refusal);
    assert_eq!(refusal, None);
    assert_eq!(bench.nodes[A].server.session_view().and_then(|s| s.i_am_source), Some(true));
}

#[test]
fn a_full_copy_begins_when_every_block_is_marked_under_a_new_generation() {
    let mut bench = Bench::mirrored(1, Some(A));
    bench.cut();
    bench.advance(1500);
    let old = bench.nodes[A].disks[0].copy.generation;
    bench.nodes[B].disks[0].copy = CopyRecord::blank(64 << 20, 4096, 4096);
    bench.nodes[A].hold = is_source_record;
    bench.restart(B);
    bench.meet();
    assert_eq!(bench.nodes[A].held.len(), 1);
    assert_eq!(bench.nodes[B].disks[0].copy.state, CopyState::Blank, "the target waits");
    bench.nodes[A].hold = |_, order| matches!(order, Order::Join { part: Part::Source(CopyPlan::Full), .. });
    let order = bench.nodes[A].held.remove(0);
    let report = bench.nodes[A].obey(order.0, order.1).expect("recorded");
    bench.input(A, Input::Report(order.0, report));
    assert_eq!(bench.nodes[A].held.len(), 1, "the copy begins");
    let source = bench.nodes[A].disks[0].copy.clone();
    assert!(source.generation != old && source.base == source.generation && source.descends_from(old));
    let toward = CopyState::Inconsistent { toward: source.generation };
    assert_eq!(bench.nodes[B].disks[0].copy.state, toward);
    // The next disk in its place is not one that was copied towards this generation.
    bench.nodes[B].disks[0].copy = CopyRecord::blank(64 << 20, 4096, 4096);
    bench.nodes[A].hold = is_source_record;
    bench.nodes[A].held.clear();
    bench.restart(B);
    bench.meet();
    assert_eq!(bench.nodes[A].held.len(), 1, "again a generation of its own");
}

#[test]
fn a_session_lost_before_the_source_vouched_begins_with_it_again() {
    let mut bench = both_lost_power();
    bench.nodes[A].hold = is_source_record;
    bench.load(A);
    bench.load(B);
    bench.meet();
    bench.cut();
    bench.meet();
    assert!(bench.nodes[B].disks.iter().all(|d| d.copy.state == CopyState::UpToDate));
    bench.nodes[B].hold = is_target_record;
    bench.release(A);
    assert_eq!(bench.nodes[B].held.len(), 2, "now it becomes a target");
}
