use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

use duplex_core::event::Event;
use duplex_core::ids::{Epoch, ServerName};

use super::{EventLog, EventLogError, EventRecord};
use crate::control::status::Time;

fn alpha() -> ServerName {
    ServerName("alpha".to_owned())
}

fn event(kind: &str, text: &str) -> Event {
    Event {
        server: alpha(),
        kind: kind.to_owned(),
        text: text.to_owned(),
        reason: String::new(),
        epoch: Epoch::never(),
        state_before: String::new(),
        state_after: "joining".to_owned(),
        peer_state: None,
        evidence: BTreeMap::new(),
        fields: BTreeMap::from([
            ("left_bytes".to_owned(), "12".to_owned()),
            ("code".to_owned(), "007".to_owned()),
            ("text".to_owned(), "mine".to_owned()),
        ]),
    }
}

fn kinds(log: &EventLog) -> Vec<String> {
    log.after(0, None).expect("read").iter().map(|record| record.kind.clone()).collect()
}

#[test]
fn the_record_is_as_documented() {
    let record = EventRecord::new(event("refused", "said no"), 5, Time::now());
    let value = serde_json::to_value(&record).expect("JSON");
    for key in [
        "time",
        "server",
        "kind",
        "text",
        "reason",
        "epoch",
        "state_before",
        "state_after",
        "peer_state",
        "evidence",
    ] {
        assert!(value.get(key).is_some(), "{key}");
    }
    assert!(value["peer_state"].is_null() && value["state_before"].is_null());
    assert_eq!(value["left_bytes"], 12);
    assert_eq!(value["code"], "007", "not a plain number");
    assert_eq!(value["text"], "said no");
    assert_eq!(value["refused_text"], "mine");
    assert_eq!(serde_json::from_value::<EventRecord>(value).expect("back"), record);
}

#[test]
fn events_survive_a_restart_and_numbers_go_on() {
    let dir = tempfile::tempdir().expect("directory");
    let log = EventLog::open(dir.path(), &alpha()).expect("new");
    log.append(event("started", "a")).expect("written");
    assert!(matches!(EventLog::open(dir.path(), &alpha()), Err(EventLogError::Busy { .. })));
    EventLog::open(dir.path(), &ServerName("beta".to_owned())).expect("another server has its own");
    drop(log);
    let log = EventLog::open(dir.path(), &alpha()).expect("again");
    let second = log.append(event("joining", "b")).expect("written");
    assert_eq!(second.sequence, 2);
    assert_eq!(kinds(&log), ["started", "joining"]);
    assert_eq!(*log.newest().borrow(), 2);
    assert_eq!(log.after(1, None).expect("read").len(), 1);
    let future = Time("2999-01-01T00:00:00Z".parse().expect("time"));
    assert!(log.after(0, Some(future)).expect("read").is_empty());
}

fn append_raw(path: &Path, bytes: &[u8]) {
    let mut file = std::fs::OpenOptions::new().append(true).open(path).expect("opened");
    file.write_all(bytes).expect("written");
}

#[test]
fn a_torn_or_spoilt_line_is_dropped() {
    let dir = tempfile::tempdir().expect("directory");
    let path = EventLog::path(dir.path(), &alpha());
    let log = EventLog::open(dir.path(), &alpha()).expect("new");
    log.append(event("started", "a")).expect("written");
    drop(log);
    let whole = std::fs::metadata(&path).expect("file").len();
    append_raw(&path, br#"{"sequence":2,"time":"2026-"#);
    let log = EventLog::open(dir.path(), &alpha()).expect("repaired");
    assert_eq!(std::fs::metadata(&path).expect("file").len(), whole, "the half line is cut");
    log.append(event("joining", "b")).expect("written");
    drop(log);
    append_raw(&path, &[0; 40_000]);
    append_raw(&path, b"\n[]\n\xff\n");
    append_raw(&path, &[0; 40_000]);
    let log = EventLog::open(dir.path(), &alpha()).expect("repaired");
    log.append(event("synced", "c")).expect("written");
    drop(log);
    let log = EventLog::open(dir.path(), &alpha()).expect("again");
    assert_eq!(kinds(&log), ["started", "joining", "synced"]);
}

#[test]
fn the_files_are_bounded_and_reading_crosses_them() {
    let dir = tempfile::tempdir().expect("directory");
    let log = EventLog::open_sized(dir.path(), &alpha(), 8192).expect("new");
    let long = "x".repeat(500);
    for _ in 0..2000 {
        log.append(event("resync-progress", &long)).expect("written");
    }
    let bytes: u64 = std::fs::read_dir(dir.path())
        .expect("directory")
        .map(|entry| entry.expect("entry").metadata().expect("file").len())
        .sum();
    assert!(bytes <= 2 * 8192, "{bytes}");
    let all = log.after(0, None).expect("read");
    let numbers: Vec<u64> = all.iter().map(|record| record.sequence).collect();
    assert_eq!(numbers.last(), Some(&2000));
    assert!(numbers.windows(2).all(|pair| pair[1] == pair[0] + 1), "no gap, nothing twice");
    drop(log);
    let log = EventLog::open_sized(dir.path(), &alpha(), 8192).expect("again");
    let kept = log.after(0, None).expect("read").len();
    assert!(kept > 8 && kept < 40, "both files are read: {kept}");
    assert_eq!(log.append(event("started", "")).expect("written").sequence, 2001);
}

#[test]
fn what_left_memory_comes_from_the_files() {
    let dir = tempfile::tempdir().expect("directory");
    let log = EventLog::open(dir.path(), &alpha()).expect("new");
    for _ in 0..1500 {
        log.append(event("resync-progress", "")).expect("written");
    }
    let numbers: Vec<u64> = log.after(0, None).expect("read").iter().map(|record| record.sequence).collect();
    assert_eq!(numbers, (1..=1500).collect::<Vec<u64>>());
}

#[test]
fn a_huge_event_is_cut_and_still_one_line() {
    let dir = tempfile::tempdir().expect("directory");
    let log = EventLog::open(dir.path(), &alpha()).expect("new");
    log.append(event("refused", &"é\n".repeat(100_000))).expect("written");
    drop(log);
    let log = EventLog::open(dir.path(), &alpha()).expect("again");
    let all = log.after(0, None).expect("read");
    assert_eq!(all.len(), 1);
    assert!(all[0].text.chars().count() <= 1000 && all[0].evidence.contains_key("cut"));
}

#[test]
fn a_directory_that_cannot_be_used_is_named() {
    let dir = tempfile::tempdir().expect("directory");
    let file = dir.path().join("file");
    std::fs::write(&file, b"").expect("written");
    let error = EventLog::open(&file, &alpha()).expect_err("a file is no directory");
    assert!(error.to_string().contains("state_dir"), "{error}");
}
