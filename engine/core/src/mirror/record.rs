//! Writing the superblock: one record at a time, each a whole block, alternately in two slots.

use std::collections::VecDeque;

use super::api::{CopyChange, MapReach, Report};
use super::start::{Starting, first_map_counter, log_geometry};
use super::volume::{DiskPurpose, Volume};
use crate::dirty_log::DirtyLog;
use crate::format::record::{CopyRecord, CopyState, Origin, ServerRecord};
use crate::format::superblock::{self, SUPERBLOCK_BYTES, Superblock};
use crate::ids::{Generation, Proven};
use crate::limits::HISTORY_MAX;
use crate::message::{RemoteOutcome, VolumeMessage};
use crate::request::{DiskOpKind, DiskOutcome};
use crate::time::Instant;

/// Errno for a number that does not fit, as Linux numbers it.
const EOVERFLOW: i32 = 75;

/// What a record was for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum After {
    /// The start of the volume.
    Start,
    /// An order of the server machine.
    Tag(u64),
    /// G6 step 3: open in pair era.
    Return(u64),
    /// G6 step 2: the target adopts the source's lineage.
    Adopt { generation: Generation, history: Vec<Generation>, proven: Proven },
}

/// One record to write.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Job {
    /// `None`: what the newest record says.
    pub(super) server: Option<ServerRecord>,
    pub(super) change: CopyChange,
    pub(super) preflush: bool,
    /// Sets the flag; only G4, adoption and identity clear it.
    pub(super) unproven: bool,
    pub(super) after: After,
}

/// The generation the map is relative to when a new one begins.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum MapBase {
    Kept,
    Old,
    New,
}

#[derive(Debug)]
struct Writing {
    superblock: Superblock,
    counter: u64,
    new_log: bool,
    job: Job,
    started: Instant,
}

/// Records waiting and the one being written.
#[derive(Debug, Default)]
pub(super) struct Recording {
    queue: VecDeque<Job>,
    writing: Option<Box<Writing>>,
    /// A record that may be written only once its marks are durable, or the old log is quiet.
    marking: Option<Box<Job>>,
    slot: u8,
    next_counter: u64,
}

impl Recording {
    /// After the start: the newest superblock was in `slot`.
    pub(super) const fn begin(&mut self, slot: u8, next_counter: u64) {
        self.slot = slot;
        self.next_counter = next_counter;
    }

    pub(super) fn queue(&mut self, job: Job) {
        self.queue.push_back(job);
    }

    /// The record being written.
    pub(super) fn job(&self) -> Option<&Job> {
        self.writing.as_deref().map(|writing| &writing.job)
    }

    /// When the record being written began.
    pub(super) fn began(&self) -> Option<Instant> {
        self.writing.as_deref().map(|writing| writing.started)
    }

    /// Something is to be recorded, now or once its marks are durable.
    fn has_job(&self) -> bool {
        self.marking.is_some() || !self.queue.is_empty()
    }
}

impl Volume {
    pub(super) fn order_record(
        &mut self,
        tag: u64,
        server: ServerRecord,
        change: CopyChange,
        preflush: bool,
    ) {
        let job = Job { server: Some(server), change, preflush, unproven: false, after: After::Tag(tag) };
        self.recording.queue(job);
    }

    /// Starts the next record if none is under way.
    pub(super) fn pump_records(&mut self) -> bool {
        if self.failed.is_some() || self.recording.writing.is_some() {
            return false;
        }
        if !matches!(self.start, Starting::Recording | Starting::Ready) {
            return false;
        }
        // Asked after every input: nothing is copied while there is nothing to record.
        if self.superblock.is_none() || !self.recording.has_job() {
            return false;
        }
        let Some(job) = self.next_job() else {
            return false;
        };
        let Some(mut next) = self.superblock.clone() else {
            return false;
        };
        if let Some(server) = &job.server {
            next.server.clone_from(server);
        }
        let new_log = self.apply_change(&mut next, &job);
        let counter = self.recording.next_counter;
        let slot = self.recording.slot ^ 1;
        let offset_bytes = u64::from(slot) * SUPERBLOCK_BYTES as u64;
        let Ok(bytes) = superblock::encode(&next, slot, counter) else {
            // Names and history are bounded before they get here; the counter is used up after 2^64 records.
            self.fail_mine(EOVERFLOW, None);
            return true;
        };
        self.recording.next_counter += 1;
        self.recording.slot = slot;
        let preflush = job.preflush;
        let writing = Writing { superblock: next, counter, new_log, job, started: self.now };
        self.recording.writing = Some(Box::new(writing));
        self.disk(DiskPurpose::Super, DiskOpKind::MetaWrite { offset_bytes, bytes, preflush });
        true
    }

    /// The next record that may be written now.
    fn next_job(&mut self) -> Option<Job> {
        let log = self.log.as_mut()?;
        // A new log begins with an identity: what the old one has under way ends first.
        let log_is_busy = self.log_slots.iter().any(Option::is_some);
        let begins_log = |job: &Job| matches!(job.change, CopyChange::Identity { .. });
        if let Some(job) = self.recording.marking.take() {
            if log.merges_durable() && !(log_is_busy && begins_log(&job)) {
                return Some(*job);
            }
            self.recording.marking = Some(job);
            return None;
        }
        let job = self.recording.queue.pop_front()?;
        if log_is_busy && begins_log(&job) {
            self.recording.marking = Some(Box::new(job));
            return None;
        }
        if marks_everything(&job.change) {
            log.set_all();
            if !log.merges_durable() {
                self.recording.marking = Some(Box::new(job));
                return None;
            }
        }
        Some(job)
    }

    /// Changes the copy's part; true if the dirty log begins anew with this record.
    fn apply_change(&self, next: &mut Superblock, job: &Job) -> bool {
        let floor = self.log.as_ref().map_or(next.map_floor, DirtyLog::next_floor);
        next.copy.unproven |= job.unproven;
        match &job.after {
            After::Start => {
                next.log_life += 1;
                if let Some(proven) = self.log.as_ref().and_then(DirtyLog::replayed_proven) {
                    next.copy.proven = next.copy.proven.max(proven);
                }
            }
            After::Tag(_) => {}
            // Both copies are the same and nothing is marked: the map begins anew, relative to this.
            After::Return(_) => next.copy.base = next.copy.generation,
            After::Adopt { generation, history, proven } => {
                next.copy.generation = *generation;
                next.copy.history.clone_from(history);
                next.copy.history.truncate(HISTORY_MAX);
                next.copy.base = *generation;
                next.copy.state = CopyState::UpToDate;
                next.copy.unproven = false;
                next.copy.proven = *proven;
                next.map_floor = floor;
            }
        }
        match &job.change {
            CopyChange::None => false,
            CopyChange::Identity { .. } => {
                adopt_identity(&mut next.copy, &job.change);
                next.map_floor = floor;
                next.log_life += 1;
                true
            }
            CopyChange::NewGeneration { generation, origin, reach } => {
                begin_generation(&mut next.copy, *generation, *origin, self.base_of(*reach));
                false
            }
            CopyChange::TakeBack { before } => {
                take_back(&mut next.copy, before);
                false
            }
            CopyChange::Target { toward } => {
                next.copy.state = CopyState::Inconsistent { toward: *toward };
                false
            }
            CopyChange::Outdated => {
                next.copy.state = CopyState::Outdated;
                false
            }
            CopyChange::WholeMap { generation } => {
                descend(&mut next.copy, *generation);
                next.copy.base = *generation;
                false
            }
            CopyChange::Proven => {
                next.copy.unproven = false;
                false
            }
            CopyChange::Surrender { to, full: _ } => {
                surrender(&mut next.copy, *to);
                false
            }
        }
    }

    /// What the map is relative to in a new generation. Marks that are left still reach back as far as before;
    /// an empty map reaches back to where it begins.
    fn base_of(&self, reach: MapReach) -> MapBase {
        let empty = self.log.as_ref().is_none_or(|log| log.dirty_blocks() == 0);
        match reach {
            MapReach::Nothing => MapBase::New,
            MapReach::Back if empty => MapBase::Old,
            MapReach::Back => MapBase::Kept,
        }
    }

    pub(super) fn on_record_disk(&mut self, outcome: &DiskOutcome) {
        let Some(writing) = self.recording.writing.take() else {
            return;
        };
        if let DiskOutcome::Failed { errno } = outcome {
            self.fail_mine(*errno, None);
            return;
        }
        let Writing { superblock, counter, new_log, job, started: _ } = *writing;
        self.superblock = Some(superblock);
        self.after_log_change(new_log, counter, &job);
        self.recorded(job);
    }

    fn after_log_change(&mut self, new_log: bool, counter: u64, job: &Job) {
        let Some(superblock) = self.superblock.as_ref() else {
            return;
        };
        if new_log {
            self.log = Some(DirtyLog::fresh(
                log_geometry(superblock),
                superblock.instance,
                superblock.log_life,
                first_map_counter(counter),
            ));
            return;
        }
        let Some(log) = self.log.as_mut() else {
            return;
        };
        match job.after {
            After::Start => log.begin_life(superblock.log_life),
            After::Adopt { .. } => log.clear_all_at(superblock.map_floor),
            After::Tag(_) | After::Return(_) => {}
        }
    }

    fn recorded(&mut self, job: Job) {
        let Some(copy) = self.copy().cloned().map(Box::new) else {
            return;
        };
        match job.after {
            After::Start => self.started(),
            After::Tag(tag) => self.report(Report::Recorded { tag, copy }),
            After::Return(tag) => self.returned(tag, copy),
            After::Adopt { .. } => {
                self.send(VolumeMessage::SyncAck { outcome: RemoteOutcome::Done }, None);
                self.taking.adopted();
                self.report(Report::Adopted { copy });
            }
        }
    }
}

fn adopt_identity(copy: &mut CopyRecord, change: &CopyChange) {
    let CopyChange::Identity { pair, volume, size_bytes, block_bytes, sector_bytes, generation, state } =
        change
    else {
        return;
    };
    copy.pair = *pair;
    copy.volume = *volume;
    copy.size_bytes = *size_bytes;
    copy.block_bytes = *block_bytes;
    copy.sector_bytes = *sector_bytes;
    copy.generation = *generation;
    copy.history.clear();
    copy.base = *generation;
    copy.proven = Proven::default();
    copy.unproven = false;
    copy.origin = Origin::Created;
    copy.state = *state;
}

/// Every block is marked, durably, before such a record is written.
const fn marks_everything(change: &CopyChange) -> bool {
    match change {
        CopyChange::Surrender { full, .. } => *full,
        CopyChange::WholeMap { .. } => true,
        CopyChange::None
        | CopyChange::Identity { .. }
        | CopyChange::NewGeneration { .. }
        | CopyChange::Target { .. }
        | CopyChange::TakeBack { .. }
        | CopyChange::Outdated
        | CopyChange::Proven => false,
    }
}

/// The copy's own generation becomes an ancestor.
fn descend(copy: &mut CopyRecord, generation: Generation) {
    copy.history.insert(0, copy.generation);
    copy.history.truncate(HISTORY_MAX);
    copy.generation = generation;
}

fn begin_generation(copy: &mut CopyRecord, generation: Generation, origin: Origin, base: MapBase) {
    let old = copy.generation;
    descend(copy, generation);
    copy.base = match base {
        MapBase::Kept => copy.base,
        MapBase::Old => old,
        MapBase::New => generation,
    };
    copy.origin = origin;
    copy.unproven = false;
    copy.state = CopyState::UpToDate;
}

/// The marks only grew meanwhile: they still tell everything that differs from `before.base`.
fn take_back(copy: &mut CopyRecord, before: &CopyRecord) {
    copy.generation = before.generation;
    copy.history.clone_from(&before.history);
    copy.base = before.base;
    copy.origin = before.origin;
    copy.unproven = before.unproven;
    copy.state = before.state;
}

fn surrender(copy: &mut CopyRecord, to: Generation) {
    let older = copy.history.iter().position(|g| *g == to).map_or(copy.history.len(), |at| at + 1);
    copy.history.drain(..older);
    copy.generation = to;
    copy.base = to;
    copy.state = CopyState::Outdated;
    copy.unproven = false;
}
