//! The file: JSON lines, rotated at a size, a torn last line dropped.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use duplex_core::event::Event;
use duplex_core::ids::ServerName;
use tokio::sync::watch;

use super::EventRecord;
use crate::control::status::Time;

/// A file is closed and set aside at this size; one older file is kept.
const FILE_MAX_BYTES: u64 = 4 << 20;
/// Newest events kept in memory for those who follow.
const RECENT_MAX: usize = 1024;
/// Longest line; longer texts are cut.
const LINE_MAX_BYTES: usize = 16 << 10;
/// Longest text or value kept of an event whose line is too long.
const CUT_CHARS: usize = 1000;

/// The events file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum EventLogError {
    /// The system said no.
    #[error("events file {}: cannot {what}: {error}; make the directory writable for the daemon or set state_dir", path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// Which step.
        what: &'static str,
        /// The system's words.
        error: std::io::Error,
    },
    /// Another process writes it.
    #[error("events file {} is written by another daemon; stop it or give this one a state_dir of its own", path.display())]
    Busy {
        /// Which file.
        path: PathBuf,
    },
}

/// The events of one server. Cheap to clone; all clones are one log.
#[derive(Clone, Debug)]
pub struct EventLog {
    inner: Arc<Mutex<Inner>>,
    newest: watch::Receiver<u64>,
}

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    file: File,
    length_bytes: u64,
    file_max_bytes: u64,
    sequence: u64,
    recent: VecDeque<Arc<EventRecord>>,
    newest: watch::Sender<u64>,
}

impl EventLog {
    /// Where a server's events are in its state directory.
    pub fn path(state_dir: &Path, server: &ServerName) -> PathBuf {
        state_dir.join(format!("events-{server}.jsonl"))
    }

    /// Opens or makes a server's file, locks it, drops a torn last line.
    ///
    /// # Errors
    /// The file cannot be made, read or locked.
    pub fn open(state_dir: &Path, server: &ServerName) -> Result<Self, EventLogError> {
        Self::open_sized(state_dir, server, FILE_MAX_BYTES)
    }

    pub(super) fn open_sized(
        state_dir: &Path,
        server: &ServerName,
        file_max_bytes: u64,
    ) -> Result<Self, EventLogError> {
        let path = Self::path(state_dir, server);
        let failed = |what| {
            let path = path.clone();
            move |error| EventLogError::Io { path, what, error }
        };
        std::fs::create_dir_all(state_dir).map_err(failed("make its directory"))?;
        let mut file = open_for_append(&path).map_err(failed("open it"))?;
        lock(&file, &path)?;
        let length_bytes = drop_torn_line(&mut file).map_err(failed("repair its end"))?;
        let mut recent = VecDeque::new();
        for each in [older(&path), path.clone()] {
            let read = read_file(&each, |record| {
                if recent.len() == RECENT_MAX {
                    recent.pop_front();
                }
                recent.push_back(Arc::new(record));
            });
            read.map_err(failed("read it"))?;
        }
        let sequence = recent.iter().map(|record| record.sequence).max().unwrap_or(0);
        let (sender, newest) = watch::channel(sequence);
        let inner = Inner { path, file, length_bytes, file_max_bytes, sequence, recent, newest: sender };
        Ok(Self { inner: Arc::new(Mutex::new(inner)), newest })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // A panic of another holder leaves a usable log: every change below is complete or undone.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes an event down and wakes those who follow. The event is kept in memory, numbered and published
    /// even when the file cannot take it.
    ///
    /// # Errors
    /// The file could not take it; nothing of it is in the file.
    pub fn append(&self, event: Event) -> Result<Arc<EventRecord>, EventLogError> {
        let mut inner = self.lock();
        inner.sequence += 1;
        let record = Arc::new(EventRecord::new(event, inner.sequence, Time::now()));
        let written = inner.write(&record);
        if inner.recent.len() == RECENT_MAX {
            inner.recent.pop_front();
        }
        inner.recent.push_back(Arc::clone(&record));
        let sequence = inner.sequence;
        inner.newest.send_replace(sequence);
        written.map(|()| record)
    }

    /// Makes what was written stable. For an orderly stop; events are not worth a flush each.
    ///
    /// # Errors
    /// The disk refused.
    pub fn sync(&self) -> Result<(), EventLogError> {
        let inner = self.lock();
        inner.file.sync_data().map_err(|error| EventLogError::Io {
            path: inner.path.clone(),
            what: "flush it",
            error,
        })
    }

    /// The number of the newest event, changing with each.
    pub fn newest(&self) -> watch::Receiver<u64> {
        self.newest.clone()
    }

    /// Events with a greater number, not older than `since`, oldest first, from memory; from the files where
    /// memory does not reach back. Blocks on a disk read then.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn after(&self, sequence: u64, since: Option<Time>) -> Result<Vec<Arc<EventRecord>>, EventLogError> {
        let wanted = |record: &EventRecord| {
            record.sequence > sequence && since.is_none_or(|since| record.time >= since)
        };
        let inner = self.lock();
        let reaches = inner.recent.front().is_none_or(|first| {
            first.sequence <= sequence + 1 || since.is_some_and(|since| first.time < since)
        });
        if reaches {
            return Ok(inner.recent.iter().filter(|record| wanted(record)).cloned().collect());
        }
        let first_in_memory = inner.recent.front().map_or(u64::MAX, |first| first.sequence);
        let mut all = Vec::new();
        for each in [older(&inner.path), inner.path.clone()] {
            read_file(&each, |record| {
                if wanted(&record) && record.sequence < first_in_memory {
                    all.push(Arc::new(record));
                }
            })
            .map_err(|error| EventLogError::Io { path: each, what: "read it", error })?;
        }
        all.extend(inner.recent.iter().filter(|record| wanted(record)).cloned());
        Ok(all)
    }
}

impl Inner {
    fn write(&mut self, record: &EventRecord) -> Result<(), EventLogError> {
        let failed = |path: &Path, what| {
            let path = path.to_owned();
            move |error| EventLogError::Io { path, what, error }
        };
        let line = line(record);
        let line_bytes = u64::try_from(line.len()).unwrap_or(u64::MAX);
        if self.length_bytes > 0 && self.length_bytes.saturating_add(line_bytes) > self.file_max_bytes {
            self.rotate()?;
        }
        if let Err(error) = self.file.write_all(line.as_bytes()) {
            // A full disk may have taken half a line.
            let _ = self.file.set_len(self.length_bytes);
            return Err(failed(&self.path, "write it")(error));
        }
        self.length_bytes += line_bytes;
        Ok(())
    }

    fn rotate(&mut self) -> Result<(), EventLogError> {
        let path = self.path.clone();
        let failed = |what| {
            let path = path.clone();
            move |error| EventLogError::Io { path, what, error }
        };
        self.file.sync_data().map_err(failed("flush it"))?;
        std::fs::rename(&path, older(&path)).map_err(failed("set it aside"))?;
        let file = open_for_append(&path).map_err(failed("begin a new one"))?;
        lock(&file, &path)?;
        self.file = file;
        self.length_bytes = 0;
        Ok(())
    }
}

fn older(path: &Path) -> PathBuf {
    path.with_extension("1.jsonl")
}

fn open_for_append(path: &Path) -> std::io::Result<File> {
    OpenOptions::new().read(true).append(true).create(true).mode(0o640).open(path)
}

fn lock(file: &File, path: &Path) -> Result<(), EventLogError> {
    use rustix::fs::{FlockOperation, flock};
    match flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(()),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(EventLogError::Busy { path: path.to_owned() }),
        Err(errno) => Err(EventLogError::Io { path: path.to_owned(), what: "lock it", error: errno.into() }),
    }
}

/// Cuts what stands after the last line end; returns the length that is left.
fn drop_torn_line(file: &mut File) -> std::io::Result<u64> {
    let length = file.metadata()?.len();
    let mut end = length;
    let mut chunk = vec![0; LINE_MAX_BYTES];
    while end > 0 {
        let start = end.saturating_sub(u64::try_from(chunk.len()).unwrap_or(u64::MAX));
        let part = &mut chunk[..usize::try_from(end - start).unwrap_or(0)];
        file.seek(SeekFrom::Start(start))?;
        file.read_exact(part)?;
        if let Some(at) = part.iter().rposition(|byte| *byte == b'\n') {
            end = start + u64::try_from(at).unwrap_or(0) + 1;
            break;
        }
        end = start;
    }
    if end < length {
        file.set_len(end)?;
    }
    Ok(end)
}

/// Gives every whole record; lines a power cut spoilt are passed over.
fn read_file(path: &Path, mut each: impl FnMut(EventRecord)) -> std::io::Result<()> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    // Somebody may have put a huge file there: it is read to its bound only.
    let mut reader = BufReader::new(file.take(2 * FILE_MAX_BYTES));
    let mut line = Vec::new();
    loop {
        line.clear();
        if reader.read_until(b'\n', &mut line)? == 0 {
            return Ok(());
        }
        if line.last() == Some(&b'\n')
            && let Ok(record) = serde_json::from_slice(&line)
        {
            each(record);
        }
    }
}

/// One line, never longer than the bound and never without its end.
fn line(record: &EventRecord) -> String {
    let full = serde_json::to_string(record).unwrap_or_default();
    let mut line = if !full.is_empty() && full.len() < LINE_MAX_BYTES { full } else { cut_line(record) };
    line.push('\n');
    line
}

fn cut_line(record: &EventRecord) -> String {
    let cut = |text: &str| text.chars().take(CUT_CHARS).collect::<String>();
    let short = EventRecord {
        text: cut(&record.text),
        reason: cut(&record.reason),
        evidence: std::iter::once(("cut".to_owned(), "the event was too long to keep whole".to_owned()))
            .collect(),
        fields: std::collections::BTreeMap::new(),
        ..record.clone()
    };
    serde_json::to_string(&short).unwrap_or_default()
}
