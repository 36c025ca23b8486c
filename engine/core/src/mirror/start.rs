//! The start of a volume: superblock, replay of the activity log, and what a lost memory means (G10).

use super::api::Report;
use super::record::{After, Job};
use super::volume::{DiskPurpose, Volume};
use crate::dirty_log::{DirtyLog, LogGeometry};
use crate::format::record::CopyState;
use crate::format::superblock::{self, SUPERBLOCK_BYTES, Superblock};
use crate::mirror::api::CopyChange;
use crate::request::{DiskOpKind, DiskOutcome};

/// How far the start is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Starting {
    ReadingSuperblock,
    Replaying,
    Recording,
    Ready,
    Unusable,
}

impl Volume {
    /// True once the volume takes orders and its facts are known.
    pub fn is_loaded(&self) -> bool {
        self.start == Starting::Ready
    }

    pub(super) fn begin_start(&mut self) {
        let length_bytes = u32::try_from(2 * SUPERBLOCK_BYTES).expect("two superblocks are small");
        self.disk(DiskPurpose::SuperRead, DiskOpKind::MetaRead { offset_bytes: 0, length_bytes });
    }

    pub(super) fn on_superblock_read(&mut self, outcome: DiskOutcome) {
        let bytes = match outcome {
            DiskOutcome::Bytes(bytes) if bytes.len() == 2 * SUPERBLOCK_BYTES => bytes,
            DiskOutcome::Bytes(_) | DiskOutcome::Done | DiskOutcome::Zeroes { .. } => {
                return self.unusable("io", "the superblocks were read short".to_owned());
            }
            DiskOutcome::Failed { errno } => {
                return self.unusable("io", format!("the superblocks cannot be read (errno {errno})"));
            }
        };
        let (first, second) = bytes.split_at(SUPERBLOCK_BYTES);
        let selected = match superblock::select(first, second) {
            Ok(selected) => selected,
            Err(error) => return self.unusable(error.code(), error.to_string()),
        };
        let found = selected.superblock;
        if found.capacity_bytes != self.config.capacity_bytes {
            return self.unusable(
                "wrong-size",
                format!(
                    "the metadata was made for a backing with room for {} bytes, this one has room for {}; \
                     bring the old size back, or create the copy anew",
                    found.capacity_bytes, self.config.capacity_bytes
                ),
            );
        }
        self.recording.begin(selected.slot, selected.next_counter);
        self.log = Some(DirtyLog::load(
            log_geometry(&found),
            found.instance,
            found.log_life,
            found.map_floor,
            first_map_counter(selected.next_counter),
        ));
        self.superblock = Some(found);
        self.start = Starting::Replaying;
    }

    /// Once the log is replayed: one record that begins a new life of the log, with `unproven` if memory was
    /// lost (F10), before anything else is written.
    pub(super) fn pump_start(&mut self) -> bool {
        if self.start == Starting::Recording && self.failed.is_some() {
            self.unusable("io", "the superblock cannot be written".to_owned());
            return true;
        }
        if self.start != Starting::Replaying {
            return false;
        }
        let (Some(log), Some(found)) = (self.log.as_ref(), self.superblock.as_ref()) else {
            return false;
        };
        if log.failed().is_some() {
            self.unusable("io", "the dirty log cannot be read or written".to_owned());
            return true;
        }
        if !log.is_loaded() {
            return false;
        }
        let mut server = found.server.clone();
        let rebooted = server.boot_id != self.config.boot_id;
        let settled_primary = server.was_primary && log.log_was_empty();
        let lost_memory = rebooted
            && !server.clean
            && !server.era.is_solo()
            && found.copy.state == CopyState::UpToDate
            && !settled_primary;
        server.boot_id = self.config.boot_id;
        server.clean = false;
        self.start = Starting::Recording;
        self.recording.queue(Job {
            server: Some(server),
            change: CopyChange::None,
            preflush: true,
            unproven: lost_memory,
            after: After::Start,
        });
        true
    }

    /// The starting record is durable.
    pub(super) fn started(&mut self) {
        if self.start != Starting::Recording {
            // It came too late: the volume was given up.
            return;
        }
        self.start = Starting::Ready;
        if let Some(facts) = self.facts() {
            self.report(Report::Loaded(Box::new(facts)));
        }
    }

    fn unusable(&mut self, code: &'static str, text: String) {
        self.start = Starting::Unusable;
        self.report(Report::Unusable { code, text });
    }
}

/// The geometry of the dirty log as this superblock describes it.
pub(super) fn log_geometry(superblock: &Superblock) -> LogGeometry {
    LogGeometry {
        size_bytes: superblock.copy.size_bytes,
        block_bytes: superblock.copy.block_bytes,
        log_slots: superblock.placement.log_slots,
        capacity_extents: crate::dirty_log::CAPACITY_EXTENTS,
        placement: superblock.placement,
    }
}

/// Map sectors written from now on count from here: above everything an earlier life wrote, because each
/// life writes a superblock with a greater counter first.
pub(super) const fn first_map_counter(superblock_counter: u64) -> u64 {
    superblock_counter << 32
}
