//! Action tables of a volume: for each promise the order of what it does, and what it must not do yet.

mod rig;

use std::time::Duration;

use duplex_core::format::record::{CopyState, Era, Origin};
use duplex_core::ids::{ByteRange, Generation, Proven, Sequence};
use duplex_core::message::{RemoteOutcome, VolumeMessage};
use duplex_core::mirror::api::{CopyChange, CopyPlan, MapReach, Order, Part, ServeMode};
use rig::{BLOCK, Rig, SESSION, STALL, block, copy, record};

const EIO: i32 = 5;
/// An extent of the activity log.
const BLOCKS_OF_EXTENT: u64 = 1024;

#[test]
fn g1_the_mark_is_durable_before_either_copy_gets_the_write() {
    let mut rig = Rig::mirrored();
    assert_eq!(rig.write(1, 0), ["log"], "nothing but the mark");
    let mut both = rig.ends("log");
    both.sort();
    assert_eq!(both, ["send write 0+4096", "write 0+4096"]);
    // The extent is active: its next write needs no mark.
    let mut second = rig.write(2, 1);
    second.sort();
    assert_eq!(second, ["send write 4096+4096", "write 4096+4096"]);
}

#[test]
fn a_mirrored_write_completes_when_both_copies_have_it_whichever_comes_first() {
    for disk_first in [true, false] {
        let mut rig = Rig::mirrored();
        rig.write(1, 0);
        rig.ends("log");
        if disk_first {
            assert!(rig.ends("write 0+4096").is_empty());
            assert!(rig.ack(1).contains(&"complete 1".to_owned()));
        } else {
            assert!(rig.ack(1).is_empty());
            assert!(rig.ends("write 0+4096").contains(&"complete 1".to_owned()));
        }
    }
}

#[test]
fn w4_without_a_lease_nothing_completes_until_it_is_renewed() {
    let mut rig = Rig::mirrored();
    rig.later(Duration::from_nanos(u64::MAX / 2 + 10));
    rig.write(1, 0);
    rig.ends("log");
    rig.ends("write 0+4096");
    assert!(rig.ack(1).is_empty(), "the lease is over");
    assert!(rig.volume.waits_for_lease());
    rig.volume.set_lease(duplex_core::time::Instant(u64::MAX / 2 + 100), duplex_core::time::Instant::NEVER);
    let told = rig.give(duplex_core::mirror::api::Input::Time);
    assert!(told.contains(&"complete 1".to_owned()), "{told:?}");
}

#[test]
fn w3_a_read_waits_for_the_write_before_it_on_both_copies() {
    let mut rig = Rig::mirrored();
    rig.write(1, 0);
    rig.ends("log");
    assert!(rig.read(2, 0).is_empty(), "behind the write");
    rig.ends("write 0+4096");
    assert!(!rig.pending().contains(&"read 0+4096"), "the peer has not got it yet");
    let told = rig.ack(1);
    assert_eq!(told.iter().filter(|w| *w == "complete 1" || *w == "read 0+4096").count(), 2, "{told:?}");
    assert!(rig.ends("read 0+4096").contains(&"complete 2".to_owned()));
}

#[test]
fn f8_a_mirrored_flush_completes_when_both_copies_are_flushed() {
    let mut rig = Rig::mirrored();
    rig.write(1, 0);
    rig.ends("log");
    rig.ends("write 0+4096");
    rig.ack(1);
    let mut both = rig.flush(2);
    both.sort();
    assert_eq!(both, ["flush", "send flush"]);
    assert!(!rig.ends("flush").contains(&"complete 2".to_owned()), "the peer's cache still holds it");
    let told = rig.peer_flushed();
    assert!(told.contains(&"complete 2".to_owned()), "{told:?}");
}

#[test]
fn alone_a_write_is_marked_and_completes_by_the_own_disk() {
    let mut rig = Rig::alone();
    assert_eq!(rig.write(1, 0), ["log"]);
    // The server machine learns of the first mark, and needs no word of the next ones.
    assert_eq!(rig.ends("log"), ["write 0+4096", "report Dirty"]);
    assert_eq!(rig.ends("write 0+4096"), ["complete 1"]);
    assert_eq!(rig.volume.dirty_blocks(), 1);
    assert_eq!(rig.write(2, 1), ["write 4096+4096"]);
}

#[test]
fn what_is_marked_is_told_when_asked() {
    let mut rig = Rig::mirrored();
    assert_eq!(rig.order(Order::TellMarks { tag: 7 }), ["report Dirty", "report Drained"]);
}

#[test]
fn a_lone_copy_whose_log_fails_ends_what_waits_for_it() {
    let mut rig = Rig::alone();
    assert_eq!(rig.write(1, 0), ["log"]);
    let ended = |told: &[String], id: u32| told.iter().any(|word| word.starts_with(&format!("refuse {id}")));
    let told = rig.fails("log", 5);
    assert!(ended(&told, 1), "nobody else can answer: {told:?}");
    let told = rig.write(2, 1);
    assert!(ended(&told, 2), "{told:?}");
}

#[test]
fn g4_nothing_completes_between_the_freeze_and_the_order_to_serve_alone() {
    let mut rig = Rig::mirrored();
    rig.write(1, 0);
    rig.ends("log");
    rig.ends("write 0+4096");
    rig.order(Order::Freeze { tag: None });
    rig.order(Order::Leave);
    let change =
        CopyChange::NewGeneration { generation: Generation(2), origin: Origin::Solo, reach: MapReach::Back };
    let server = record(Era::Solo(4));
    let told = rig.order(Order::Record { tag: 9, server, change, preflush: true });
    assert_eq!(told, ["preflush record"], "what came before is stable before the record is");
    assert!(rig.read(2, 0).is_empty());
    assert_eq!(rig.ends("preflush record"), ["report Recorded"]);
    let told = rig.order(Order::Serve { mode: ServeMode::Alone, epoch: 4 });
    assert!(told.contains(&"complete 1".to_owned()), "{told:?}");
    let copy = rig.volume.copy().expect("it is loaded");
    assert_eq!((copy.generation, copy.base), (Generation(2), Generation(1)));
    assert!(rig.volume.dirty_blocks() > 0, "the peer may lack it");
}

#[test]
fn going_alone_again_with_marks_left_keeps_what_the_map_reaches() {
    let mut rig = Rig::alone();
    let go = |rig: &mut Rig, tag, to, reach| {
        let change = CopyChange::NewGeneration { generation: Generation(to), origin: Origin::Solo, reach };
        rig.order(Order::Record { tag, server: record(Era::Solo(tag)), change, preflush: true });
        rig.settle();
        rig.volume.copy().expect("it is loaded").clone()
    };
    // Nothing is marked: the map begins at the generation before.
    assert_eq!(go(&mut rig, 4, 2, MapReach::Back).base, Generation(1));
    assert_eq!(go(&mut rig, 5, 3, MapReach::Back).base, Generation(2));
    rig.write(1, 0);
    rig.settle();
    let copy = go(&mut rig, 6, 4, MapReach::Back);
    assert_eq!(copy.base, Generation(2), "the mark is as old as generation 2");
    assert!(copy.map_reaches(Generation(2)) && copy.map_reaches(Generation(3)));
    assert!(!copy.map_reaches(Generation(1)));
    let copy = go(&mut rig, 7, 5, MapReach::Nothing);
    assert!(copy.map_reaches(Generation(5)) && !copy.map_reaches(Generation(4)));
}

#[test]
fn before_a_full_copy_every_block_is_marked_durably_and_only_then_recorded() {
    let mut rig = Rig::alone();
    let change = CopyChange::WholeMap { generation: Generation(2) };
    let told = rig.order(Order::Record { tag: 4, server: record(Era::Solo(3)), change, preflush: false });
    assert!(told.contains(&"map".to_owned()) && !told.contains(&"record".to_owned()), "{told:?}");
    while rig.pending().contains(&"map") {
        assert!(!rig.pending().contains(&"record"), "the record waits for the marks");
        rig.ends("map");
    }
    assert_eq!(rig.ends("record"), ["report Recorded"]);
    assert_eq!(rig.volume.dirty_blocks() * BLOCK, rig::SIZE_BYTES);
    let copy = rig.volume.copy().expect("it is loaded");
    assert_eq!((copy.generation, copy.base), (Generation(2), Generation(2)));
    assert_eq!(copy.history, [Generation(1)]);
}

#[test]
fn g2_a_copied_block_is_clean_only_after_a_flush_of_both() {
    let mut rig = Rig::alone();
    rig.write(1, 0);
    rig.settle();
    rig.order(Order::Join { session: SESSION, part: Part::Source(CopyPlan::Union), resume: false });
    rig.hear(VolumeMessage::MarksEnd { pages: 0 }, None);
    let told = finish_marks(&mut rig);
    assert!(told.contains(&"read 0+4096".to_owned()), "{told:?}");
    let told = rig.ends("read 0+4096");
    assert!(told.contains(&"send copy 0+4096".to_owned()), "{told:?}");
    let told = rig.peer_copied();
    assert!(told.contains(&"send flush".to_owned()) && told.contains(&"flush".to_owned()), "{told:?}");
    assert_eq!(rig.volume.dirty_blocks(), 1, "neither cache is flushed");
    rig.ends("flush");
    assert_eq!(rig.volume.dirty_blocks(), 1, "the target's cache is not flushed");
    let mut told = rig.peer_flushed();
    told.extend(rig.settle());
    assert_eq!(rig.volume.dirty_blocks(), 0, "{told:?} {:?}", rig.pending());
    assert!(told.contains(&"send sync-done".to_owned()), "{told:?}");
}

#[test]
fn an_unreadable_block_leaves_the_volume_at_rest_while_a_flush_is_under_way() {
    let mut rig = Rig::alone();
    for (id, at) in [(1, 0), (2, 10), (3, 100)] {
        rig.write(id, at);
    }
    rig.settle();
    rig.order(Order::Join { session: SESSION, part: Part::Source(CopyPlan::Union), resume: false });
    rig.hear(VolumeMessage::MarksEnd { pages: 0 }, None);
    finish_marks(&mut rig);
    rig.fails("read 40960+4096", 5);
    assert_eq!(rig.pending(), ["read 0+4096", "read 409600+4096"]);
    rig.ends("read 0+4096");
    rig.peer_copied();
    assert!(rig.later(Duration::from_secs(1)).contains(&"send flush".to_owned()));
    // Its answer is awaited; the last block is copied, and only the unreadable one is left to look at.
    rig.ends("read 409600+4096");
    rig.peer_copied();
    assert!(rig.pending().contains(&"flush"));
    rig.later(Duration::from_millis(1));
    rig.ends("flush");
    rig.peer_flushed();
    rig.ends("flush");
    rig.peer_flushed();
    rig.settle();
    assert_eq!(rig.volume.dirty_blocks(), 1, "the unreadable one");
}

/// Marks become durable; what is begun then.
fn finish_marks(rig: &mut Rig) -> Vec<String> {
    let mut told = rig.give(duplex_core::mirror::api::Input::Time);
    while let Some(name) =
        rig.pending().iter().find(|n| **n == "map" || **n == "log").map(|n| (*n).to_owned())
    {
        told.extend(rig.ends(&name));
    }
    told.extend(rig.pending().iter().map(|n| (*n).to_owned()));
    told
}

#[test]
fn g6_a_target_flushes_and_adopts_in_one_record_before_it_answers() {
    let mut target = copy();
    target.state = CopyState::Inconsistent { toward: Generation(2) };
    let mut rig = Rig::new(record(Era::Pair), target);
    rig.order(Order::Join { session: SESSION, part: Part::Target(CopyPlan::Union), resume: false });
    rig.settle();
    let done = VolumeMessage::SyncDone {
        generation: Generation(2),
        history: vec![Generation(1)],
        proven: Proven { epoch: 3, seq: Sequence(1) },
    };
    assert_eq!(rig.hear(done, None), ["preflush record"]);
    assert_eq!(
        rig.volume.copy().expect("it is loaded").generation,
        Generation(1),
        "not before it is durable"
    );
    let told = rig.ends("preflush record");
    assert!(told.contains(&"send sync-ack done".to_owned()), "{told:?}");
    let copy = rig.volume.copy().expect("it is loaded");
    assert_eq!((copy.generation, copy.base, copy.state), (Generation(2), Generation(2), CopyState::UpToDate));
}

#[test]
fn a_secondary_acknowledges_a_write_after_its_disk_and_a_flush_after_its_flush() {
    let mut rig = Rig::secondary();
    let write = VolumeMessage::Write { seq: Sequence(1), range: block(0), fua: false };
    assert_eq!(rig.hear(write, Some(50)), ["write 0+4096"]);
    assert_eq!(rig.ends("write 0+4096"), ["send ack done"]);
    assert_eq!(rig.hear(VolumeMessage::Flush { id: 4 }, None), ["flush"]);
    assert_eq!(rig.ends("flush"), ["send flush-ack done"]);
}

#[test]
fn f2_a_failed_flush_latches_the_copy_and_is_not_tried_again() {
    let mut rig = Rig::mirrored();
    rig.write(1, 0);
    rig.ends("log");
    rig.ends("write 0+4096");
    rig.ack(1);
    rig.flush(2);
    let told = rig.fails("flush", EIO);
    assert!(told.contains(&"report CopyFailed".to_owned()), "{told:?}");
    assert!(!told.contains(&"complete 2".to_owned()));
    assert_eq!(rig.volume.copy_state(), Some(CopyState::Failed));
    assert!(!rig.later(Duration::from_secs(60)).contains(&"flush".to_owned()));
}

#[test]
fn g12_a_write_that_failed_on_one_side_completes_on_neither() {
    for own in [true, false] {
        let mut rig = Rig::mirrored();
        rig.write(1, 0);
        rig.ends("log");
        let told = if own {
            rig.ack(1);
            rig.fails("write 0+4096", EIO)
        } else {
            rig.ends("write 0+4096");
            let failed = RemoteOutcome::Failed { errno: EIO };
            rig.hear(VolumeMessage::Ack { seq: Sequence(1), outcome: failed }, None)
        };
        assert!(told.contains(&"report CopyFailed".to_owned()), "{told:?}");
        let answered = |word: &String| word.starts_with("complete") || word.starts_with("refuse");
        assert!(!told.iter().any(answered), "{told:?}");
    }
}

#[test]
fn g9_a_drain_ends_after_both_are_flushed_and_no_mark_is_left() {
    let mut rig = Rig::mirrored();
    rig.write(1, 0);
    rig.ends("log");
    rig.ends("write 0+4096");
    assert!(rig.order(Order::Drain { tag: 5 }).is_empty(), "a write is under way");
    assert_eq!(rig.write(2, 1), ["refuse 2: this server does not serve the volume"], "no new one begins");
    let told = rig.ack(1);
    assert!(told.contains(&"flush".to_owned()) && told.contains(&"send flush".to_owned()), "{told:?}");
    rig.ends("flush");
    let told = rig.peer_flushed();
    assert!(!told.contains(&"report Drained".to_owned()), "the log still names the extent");
    let told = rig.settle();
    assert!(told.contains(&"report Drained".to_owned()), "{told:?}");
    assert_eq!((rig.volume.dirty_blocks(), rig.volume.active_extents()), (0, 0));
}

#[test]
fn a_drain_that_is_given_up_takes_requests_again() {
    let mut rig = Rig::mirrored();
    rig.write(1, 0);
    rig.ends("log");
    rig.ends("write 0+4096");
    rig.order(Order::Drain { tag: 5 });
    rig.order(Order::Serve { mode: ServeMode::Mirrored, epoch: 3 });
    assert_eq!(rig.write(2, 1).len(), 2, "to both copies");
    let told = rig.ack(1);
    assert_eq!(told, ["complete 1"], "and nothing of the drain");
}

#[test]
fn one_session_s_words_do_not_count_in_another() {
    let mut rig = Rig::mirrored();
    rig.write(1, 0);
    rig.ends("log");
    rig.ends("write 0+4096");
    rig.order(Order::Freeze { tag: None });
    rig.order(Order::Leave);
    assert!(rig.ack(1).is_empty(), "of a session that is over");
    assert_eq!(rig.volume.requests_in_flight(), 1);
}

#[test]
fn bad_requests_are_refused_by_name_and_touch_nothing() {
    let mut rig = Rig::alone();
    let write = |offset, length| duplex_core::request::RequestOp::Write {
        range: ByteRange::new(offset, length),
        buffer: duplex_core::ids::BufferId(1),
        fua: false,
    };
    for (op, why) in [
        (write(1, BLOCK), "not aligned"),
        (write(0, BLOCK - 1), "not aligned"),
        (write(rig::SIZE_BYTES, BLOCK), "past the end"),
        (write(u64::MAX - BLOCK + 1, BLOCK), "past the end"),
    ] {
        let id = duplex_core::ids::RequestId(1);
        let request = duplex_core::request::Request { id, op };
        let told = rig.give(duplex_core::mirror::api::Input::Request(request));
        assert_eq!(told.len(), 1, "{told:?}");
        assert!(told[0].starts_with("refuse 1") && told[0].contains(why), "{told:?}");
    }
    assert_eq!(rig.volume.dirty_blocks(), 0);
}

/// What is said when something does not end within the stall time and a moment more, and not a moment less.
fn stalled(rig: &mut Rig) -> Vec<String> {
    let early = rig.wakes_for(STALL - Duration::from_secs(1));
    assert!(!early.contains(&"report CopyFailed".to_owned()), "{early:?}");
    let told = rig.wakes_for(Duration::from_secs(2));
    assert!(told.contains(&"report CopyFailed".to_owned()), "{told:?}, under way: {:?}", rig.pending());
    assert_eq!(rig.volume.copy_state(), Some(CopyState::Failed));
    told
}

fn is_refused(told: &[String], id: u32) -> bool {
    told.iter().any(|word| word.starts_with(&format!("refuse {id}:")))
}

#[test]
fn a_mark_that_the_disk_never_takes_fails_the_copy() {
    let mut rig = Rig::mirrored();
    assert_eq!(rig.write(1, 0), ["log"]);
    let told = stalled(&mut rig);
    assert!(!is_refused(&told, 1), "the peer answers, once the server says so: {told:?}");
}

#[test]
fn alone_a_write_whose_mark_the_disk_never_takes_ends_and_so_do_later_ones() {
    let mut rig = Rig::alone();
    assert_eq!(rig.write(1, 0), ["log"]);
    assert!(rig.write(2, 0).is_empty(), "behind the first");
    let told = stalled(&mut rig);
    assert!(is_refused(&told, 1) && is_refused(&told, 2), "{told:?}");
    assert!(is_refused(&rig.write(3, 1), 3));
    // The disk comes back: what was refused is not written then, nor is anything of a later request.
    let told = rig.ends("log");
    assert!(!told.iter().any(|word| word.starts_with("write")), "{told:?}");
}

#[test]
fn a_page_of_marks_that_the_disk_never_takes_fails_the_copy() {
    let mut rig = Rig::alone();
    let change = CopyChange::WholeMap { generation: Generation(2) };
    rig.order(Order::Record { tag: 4, server: record(Era::Solo(3)), change, preflush: false });
    assert!(rig.pending().contains(&"map"), "{:?}", rig.pending());
    stalled(&mut rig);
}

#[test]
fn a_record_that_the_disk_never_takes_fails_the_copy() {
    let change =
        CopyChange::NewGeneration { generation: Generation(2), origin: Origin::Solo, reach: MapReach::Back };
    for change in [change, CopyChange::Proven] {
        let mut rig = Rig::secondary();
        let told = rig.order(Order::Record { tag: 9, server: record(Era::Pair), change, preflush: true });
        assert_eq!(told, ["preflush record"]);
        stalled(&mut rig);
    }
}

#[test]
fn an_adoption_that_the_disk_never_takes_fails_the_copy() {
    let mut rig = Rig::secondary();
    let proven = Proven { epoch: 3, seq: Sequence(1) };
    let done = VolumeMessage::SyncDone { generation: Generation(2), history: vec![Generation(1)], proven };
    assert_eq!(rig.hear(done, None), ["preflush record"]);
    stalled(&mut rig);
}

#[test]
fn a_chunk_that_the_source_never_reads_fails_the_copy_and_keeps_no_client() {
    let mut rig = Rig::alone();
    rig.write(1, 0);
    rig.settle();
    rig.order(Order::Join { session: SESSION, part: Part::Source(CopyPlan::Union), resume: false });
    rig.hear(VolumeMessage::MarksEnd { pages: 0 }, None);
    finish_marks(&mut rig);
    assert_eq!(rig.pending(), ["read 0+4096"]);
    assert!(rig.write(2, 0).is_empty(), "behind the chunk");
    let mut told = stalled(&mut rig);
    told.extend(rig.wakes_for(Duration::from_secs(1)));
    assert!(is_refused(&told, 2), "{told:?}");
}

#[test]
fn time_behind_another_request_is_not_the_disk_s() {
    let mut rig = Rig::alone();
    rig.write(1, 0);
    rig.ends("log");
    assert!(rig.write(2, 0).is_empty(), "behind the first");
    rig.wakes_for(STALL / 3 * 2);
    rig.ends("write 0+4096");
    assert_eq!(rig.pending(), ["write 0+4096"], "the second");
    let told = rig.wakes_for(STALL / 3 * 2);
    assert!(!told.contains(&"report CopyFailed".to_owned()), "{told:?}");
    assert!(rig.ends("write 0+4096").contains(&"complete 2".to_owned()));
}

#[test]
fn a_server_that_stood_still_itself_fails_no_copy() {
    let mut rig = Rig::alone();
    rig.write(1, 0);
    rig.ends("log");
    // Stopped and let go on: the clock is seen before what the disk did meanwhile.
    let told = rig.later(STALL * 2);
    assert!(!told.contains(&"report CopyFailed".to_owned()), "{told:?}");
    assert!(rig.ends("write 0+4096").contains(&"complete 1".to_owned()));
    rig.write(2, 0);
    stalled(&mut rig);
}

#[test]
fn of_two_copies_that_are_late_together_one_is_left() {
    let mut rig = Rig::mirrored();
    rig.write(1, 0);
    rig.ends("log");
    let told = stalled(&mut rig);
    let failed = told.iter().filter(|word| *word == "report CopyFailed").count();
    assert_eq!(failed, 1, "{told:?}");
}

#[test]
fn a_disk_that_does_not_answer_keeps_neither_a_demotion_nor_a_closed_client() {
    let mut rig = Rig::alone();
    rig.write(1, 0);
    rig.ends("log");
    rig.order(Order::Drain { tag: 5 });
    let told = stalled(&mut rig);
    assert!(is_refused(&told, 1) && told.contains(&"report Drained".to_owned()), "{told:?}");

    let mut rig = Rig::mirrored();
    rig.write(1, 0);
    rig.ends("log");
    rig.write(2, BLOCKS_OF_EXTENT);
    rig.order(Order::Freeze { tag: None });
    rig.order(Order::Leave);
    rig.order(Order::Close);
    assert_eq!(rig.pending(), ["write 0+4096", "log"]);
    let told = stalled(&mut rig);
    assert!(is_refused(&told, 1) && is_refused(&told, 2), "nobody else will answer: {told:?}");
}
