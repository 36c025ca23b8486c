//! The ring against the real kernel.
#![allow(clippy::unwrap_used, reason = "tests and their helpers: a panic with its place is the report")]

use std::os::fd::AsRawFd;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use duplex_ring::{Completion, ENTRIES_DEFAULT, Errno, Owner, Ring, RingError, Token};
use io_uring::opcode;
use io_uring::types::Fd;
use rustix::pipe::{PipeFlags, pipe_with};

const MINE: Owner = Owner(7);
const NOW: Option<Duration> = Some(Duration::ZERO);

fn push_nop(ring: &mut Ring, index: u32) {
    // SAFETY: a NOP points to nothing.
    unsafe { ring.push(opcode::Nop::new().build(), Token::new(MINE, 1, index)) };
}

fn turn_until(ring: &mut Ring, count: usize) -> Vec<Completion> {
    let mut out = Vec::new();
    while out.len() < count {
        ring.turn(None, &mut out).unwrap();
    }
    out
}

#[test]
fn completions_come_in_order_with_their_tokens_in_one_enter() {
    let mut ring = Ring::new(ENTRIES_DEFAULT).unwrap();
    for index in 0..100 {
        push_nop(&mut ring, index);
    }
    let mut out = Vec::new();
    ring.turn(None, &mut out).unwrap();
    assert_eq!(ring.enters(), 1);
    let indexes: Vec<u32> = out.iter().map(|completion| completion.token.index).collect();
    assert_eq!(indexes, (0..100).collect::<Vec<_>>());
    assert!(out.iter().all(|completion| completion.token.owner == MINE && completion.token.kind == 1));
    assert!(out.iter().all(|completion| completion.outcome() == Ok(0)));
}

#[test]
fn a_backlog_beyond_both_queues_loses_nothing_and_keeps_order() {
    // 8 submission entries, 32 completion entries, 1000 operations.
    let mut ring = Ring::new(8).unwrap();
    for index in 0..1000 {
        push_nop(&mut ring, index);
    }
    let out = turn_until(&mut ring, 1000);
    let indexes: Vec<u32> = out.iter().map(|completion| completion.token.index).collect();
    assert_eq!(indexes, (0..1000).collect::<Vec<_>>());
}

#[test]
fn an_overflowing_completion_queue_loses_nothing() {
    // Each pipe read pends until data comes; all then complete at once, far more than the 32 completion entries.
    let mut ring = Ring::new(8).unwrap();
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).unwrap();
    let mut bytes = vec![0_u8; 500];
    for (index, byte) in bytes.iter_mut().enumerate() {
        let read = opcode::Read::new(Fd(reader.as_raw_fd()), byte, 1).build();
        // SAFETY: the bytes and the pipe live until the end of the test, after the last completion.
        unsafe { ring.push(read, Token::new(MINE, 2, index as u32)) };
    }
    let mut out = Vec::new();
    ring.turn(NOW, &mut out).unwrap();
    assert!(out.is_empty());
    rustix::io::write(&writer, &[5; 500]).unwrap();
    let mut out = turn_until(&mut ring, 500);
    assert_eq!(out.len(), 500);
    out.sort_by_key(|completion| completion.token.index);
    out.dedup_by_key(|completion| completion.token.index);
    assert_eq!(out.len(), 500, "each once");
    assert!(bytes.iter().all(|&byte| byte == 5));
}

#[test]
fn a_waker_ends_a_turn_from_another_thread_every_time() {
    let mut ring = Ring::new(64).unwrap();
    let waker = ring.waker();
    let (go, gone) = mpsc::channel();
    let other = thread::spawn(move || {
        for () in gone {
            waker.wake();
        }
    });
    let mut out = Vec::new();
    for _ in 0..100 {
        go.send(()).unwrap();
        ring.turn(None, &mut out).unwrap();
        assert!(out.is_empty(), "a wake is never shown");
    }
    drop(go);
    other.join().unwrap();
}

#[test]
fn a_wake_before_the_turn_is_not_lost() {
    let mut ring = Ring::new(64).unwrap();
    ring.waker().wake();
    ring.waker().wake();
    let mut out = Vec::new();
    ring.turn(None, &mut out).unwrap();
    assert!(out.is_empty());
}

#[test]
fn a_backlog_is_submitted_whole_before_the_turn_waits() {
    let mut ring = Ring::new(8).unwrap();
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).unwrap();
    let mut bytes = [0_u8; 60];
    let mut push_reads = |ring: &mut Ring, from: usize| {
        for (index, byte) in bytes.iter_mut().enumerate().skip(from).take(30) {
            let read = opcode::Read::new(Fd(reader.as_raw_fd()), byte, 1).build();
            // SAFETY: the bytes and the pipe live until the end of the test, after the last completion.
            unsafe { ring.push(read, Token::new(MINE, 2, index as u32)) };
        }
    };
    // None of the reads completes: only the last entry ends the turn.
    push_reads(&mut ring, 0);
    push_nop(&mut ring, 77);
    let out = turn_until(&mut ring, 1);
    assert_eq!((out.len(), out[0].token.index), (1, 77));
    // A wake seen by the first of several enters ends the turn after the last.
    push_reads(&mut ring, 30);
    ring.waker().wake();
    let mut out = Vec::new();
    ring.turn(None, &mut out).unwrap();
    assert!(out.is_empty());
    rustix::io::write(&writer, &[1; 60]).unwrap();
    assert_eq!(turn_until(&mut ring, 60).len(), 60);
}

#[test]
fn a_turn_without_news_ends_at_its_time() {
    let mut ring = Ring::new(64).unwrap();
    let mut out = Vec::new();
    ring.turn(NOW, &mut out).unwrap();
    ring.turn(Some(Duration::from_millis(20)), &mut out).unwrap();
    assert_eq!(ring.enters(), 2);
    assert!(out.is_empty());
}

#[test]
fn a_cancelled_operation_completes_once_and_the_cancellation_is_hidden() {
    let mut ring = Ring::new(64).unwrap();
    let (reader, _writer) = pipe_with(PipeFlags::CLOEXEC).unwrap();
    let mut bytes = [0_u8; 2];
    let (first, second) = bytes.split_at_mut(1);
    let token = Token::new(MINE, 3, 9);
    for (byte, token) in [(first, token), (second, Token::new(MINE, 3, 10))] {
        let read = opcode::Read::new(Fd(reader.as_raw_fd()), byte.as_mut_ptr(), 1).build();
        // SAFETY: the bytes and the pipe outlive the ring's use: both reads are reaped below.
        unsafe { ring.push(read, token) };
    }
    let mut out = Vec::new();
    ring.turn(NOW, &mut out).unwrap();
    ring.cancel(token);
    let out = turn_until(&mut ring, 1);
    assert_eq!(out.len(), 1);
    assert_eq!(out[0].token, token);
    assert_eq!(out[0].outcome(), Err(Errno::CANCELED));
    ring.cancel_descriptor(reader.as_raw_fd());
    let out = turn_until(&mut ring, 1);
    assert_eq!(out[0].token.index, 10);
    assert_eq!(out[0].outcome(), Err(Errno::CANCELED));
}

#[test]
fn a_ring_made_elsewhere_belongs_to_the_thread_of_its_first_turn() {
    let mut ring = thread::spawn(|| Ring::new(64).unwrap()).join().unwrap();
    push_nop(&mut ring, 1);
    assert_eq!(turn_until(&mut ring, 1).len(), 1);
    let error = thread::spawn(move || ring.turn(NOW, &mut Vec::new()).unwrap_err()).join().unwrap();
    assert_eq!(error, RingError::WrongThread);
}

#[test]
fn a_dropped_ring_lets_go_of_what_a_component_forgot() {
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).unwrap();
    let mut byte = Box::new(0_u8);
    let mut ring = Ring::new(64).unwrap();
    let read = opcode::Read::new(Fd(reader.as_raw_fd()), &mut *byte, 1).build();
    // SAFETY: the box outlives the ring, whose drop cancels the read.
    unsafe { ring.push(read, Token::new(MINE, 4, 0)) };
    ring.turn(NOW, &mut Vec::new()).unwrap();
    drop(ring);
    rustix::io::write(&writer, &[9]).unwrap();
    let mut seen = [0_u8; 1];
    assert_eq!(rustix::io::read(&reader, &mut seen), Ok(1), "the byte is still in the pipe");
    assert_eq!((*byte, seen[0]), (0, 9));
}

#[test]
fn a_prompt_operation_alone_does_not_end_a_turn() {
    let mut ring = Ring::new(64).unwrap();
    if !ring.waits_for_several() {
        println!("SKIPPED: this kernel waits for one completion only (before 6.12)");
        return;
    }
    let soon = io_uring::types::Timespec::new().nsec(100_000);
    // SAFETY: a NOP points to nothing, the time outlives the turn that ends the timeout.
    unsafe {
        ring.push_prompt(opcode::Nop::new().build(), Token::new(MINE, 1, 1));
        ring.push(opcode::Timeout::new(&raw const soon).build(), Token::new(MINE, 1, 2));
    }
    let mut out = Vec::new();
    ring.turn(None, &mut out).unwrap();
    let indexes: Vec<u32> = out.iter().map(|completion| completion.token.index).collect();
    assert_eq!((indexes, ring.enters()), (vec![1, 2], 1));
}

#[test]
fn a_prompt_operation_that_hangs_keeps_no_other_completion_back() {
    let (reader, _writer) = pipe_with(PipeFlags::CLOEXEC).unwrap();
    let mut byte = Box::new(0_u8);
    let mut ring = Ring::new(64).unwrap();
    let read = opcode::Read::new(Fd(reader.as_raw_fd()), &mut *byte, 1).build();
    // SAFETY: the box outlives the ring, whose drop cancels the read.
    unsafe { ring.push_prompt(read, Token::new(MINE, 1, 1)) };
    push_nop(&mut ring, 2);
    let out = turn_until(&mut ring, 1);
    assert_eq!(out[0].token.index, 2);
    drop(ring);
    assert_eq!(*byte, 0);
}

#[test]
fn a_turn_that_gathers_takes_in_what_ends_soon() {
    let mut ring = Ring::new(64).unwrap();
    if !ring.waits_for_several() {
        println!("SKIPPED: this kernel waits for one completion only (before 6.12)");
        return;
    }
    let soon = io_uring::types::Timespec::new().nsec(20_000);
    push_nop(&mut ring, 1);
    // SAFETY: the time outlives the turn that ends the timeout.
    unsafe { ring.push(opcode::Timeout::new(&raw const soon).build(), Token::new(MINE, 1, 2)) };
    ring.gather(1);
    let mut out = Vec::new();
    ring.turn(None, &mut out).unwrap();
    let indexes: Vec<u32> = out.iter().map(|completion| completion.token.index).collect();
    assert_eq!((indexes, ring.enters()), (vec![1, 2], 1));
}

#[test]
fn what_is_gathered_in_vain_keeps_no_completion_back() {
    let (reader, _writer) = pipe_with(PipeFlags::CLOEXEC).unwrap();
    let mut byte = Box::new(0_u8);
    let mut ring = Ring::new(64).unwrap();
    let read = opcode::Read::new(Fd(reader.as_raw_fd()), &mut *byte, 1).build();
    // SAFETY: the box outlives the ring, whose drop cancels the read.
    unsafe { ring.push(read, Token::new(MINE, 1, 1)) };
    push_nop(&mut ring, 2);
    ring.gather(3);
    let mut out = Vec::new();
    ring.turn(None, &mut out).unwrap();
    assert_eq!(out.iter().map(|completion| completion.token.index).collect::<Vec<_>>(), [2]);
    drop(ring);
    assert_eq!(*byte, 0);
}
