//! The durable facts of docs/protocol.md section 1: the server's record and the copy's record.

use serde::{Deserialize, Serialize};

use crate::ids::{BootId, Epoch, Generation, PairId, Proven, VolumeId};

/// Whose right the data runs under.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Era {
    /// Both copies belong together: nothing may complete on one of them.
    Pair,
    /// This server went alone in the epoch of this number and has not given the right back.
    Solo(u64),
}

impl Era {
    /// True in a solo run.
    pub const fn is_solo(self) -> bool {
        match self {
            Self::Pair => false,
            Self::Solo(_) => true,
        }
    }
}

/// The server's durable facts. A numbered copy stands in every volume's superblock; at start the
/// greatest (epoch number, counter) wins.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ServerRecord {
    /// Grows by one with every change of the record.
    pub counter: u64,
    /// The boot in which the record was written.
    pub boot_id: BootId,
    /// The newest epoch known.
    pub epoch_seen: Epoch,
    /// Pair or solo.
    pub era: Era,
    /// Number of the epoch in which this server was last primary; 0 = never.
    pub last_primary: u64,
    /// Role at the last change; cleared by `demote`, not by a kill or a power loss.
    pub was_primary: bool,
    /// The daemon ended in order.
    pub clean: bool,
}

impl ServerRecord {
    /// The record of a server that was never activated.
    pub const fn fresh(boot_id: BootId) -> Self {
        Self {
            counter: 0,
            boot_id,
            epoch_seen: Epoch::never(),
            era: Era::Pair,
            last_primary: 0,
            was_primary: false,
            clean: true,
        }
    }

    /// What orders two copies of the record: the greater one is the newer.
    pub const fn order(&self) -> (u64, u64) {
        (self.epoch_seen.number, self.counter)
    }
}

/// State of one copy of a volume.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "state")]
pub enum CopyState {
    /// Has capacity, but no identity and no data.
    Blank,
    /// Consistent and the newest known.
    UpToDate,
    /// Consistent, but the peer went on without it.
    Outdated,
    /// In the middle of a resync.
    Inconsistent {
        /// The generation it is being copied towards.
        toward: Generation,
    },
    /// Latched by a write or flush error.
    Failed,
}

impl CopyState {
    /// The operator's word.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Blank => "blank",
            Self::UpToDate => "up-to-date",
            Self::Outdated => "outdated",
            Self::Inconsistent { .. } => "inconsistent",
            Self::Failed => "failed",
        }
    }
}

/// How a generation came into being.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Origin {
    /// By `activate`.
    Created,
    /// By going alone (G4).
    Solo,
    /// By the operator's force.
    Forced,
}

/// The durable facts of one copy of one volume.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct CopyRecord {
    /// `NONE` while blank.
    pub pair: PairId,
    /// `NONE` while blank.
    pub volume: VolumeId,
    /// The volume's size; while blank the capacity of the backing.
    pub size_bytes: u64,
    /// Granularity of the dirty map.
    pub block_bytes: u32,
    /// 512 or 4096: what clients see.
    pub sector_bytes: u32,
    /// Identity of the data lineage.
    pub generation: Generation,
    /// Older generations, newest first; at most `limits::HISTORY_MAX`.
    pub history: Vec<Generation>,
    /// The generation the dirty map is relative to.
    pub base: Generation,
    /// State of the copy.
    pub state: CopyState,
    /// The machine lost its memory while the copy was part of a pair: acknowledged writes may be missing (G10).
    pub unproven: bool,
    /// Everything up to here was flushed on both.
    pub proven: Proven,
    /// How `generation` began.
    pub origin: Origin,
}

impl CopyRecord {
    /// A copy without identity.
    pub const fn blank(size_bytes: u64, block_bytes: u32, sector_bytes: u32) -> Self {
        Self {
            pair: PairId::NONE,
            volume: VolumeId::NONE,
            size_bytes,
            block_bytes,
            sector_bytes,
            generation: Generation::NONE,
            history: Vec::new(),
            base: Generation::NONE,
            state: CopyState::Blank,
            unproven: false,
            proven: Proven { epoch: 0, seq: crate::ids::Sequence(0) },
            origin: Origin::Created,
        }
    }

    /// True if the dirty map names every block in which a copy of this generation may differ: it is this copy's
    /// own, the one the map is relative to, or one between the two.
    pub fn map_reaches(&self, generation: Generation) -> bool {
        if generation.is_none() {
            return false;
        }
        if generation == self.generation || generation == self.base {
            return true;
        }
        // A map relative to this generation reaches no ancestor; nor does one whose base fell off the history.
        let Some(base) = self.history.iter().position(|g| *g == self.base) else {
            return false;
        };
        self.history.iter().position(|g| *g == generation).is_some_and(|at| at < base)
    }

    /// True if `generation` is one this copy descends from (its own not included).
    pub fn descends_from(&self, generation: Generation) -> bool {
        self.history.contains(&generation)
    }
}
