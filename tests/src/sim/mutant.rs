//! Deliberate bugs in the shell around the core: a simulator that does not find them finds nothing.

use std::str::FromStr;

/// A bug.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mutant {
    /// A flush asked for by the peer is acknowledged and not done (P3).
    SkipPeerFlush,
    /// Blocks of the activity log are acknowledged and not written (G1).
    SkipLog,
    /// The target's marks arrive as empty pages (V5).
    DropMarks,
    /// Superblocks are acknowledged and not written, once the pair is activated.
    SkipSuperblock,
    /// Resync chunks are acknowledged and not written.
    SkipCopy,
    /// The record of a solo run does not flush what came before it (V9).
    SkipSoloFlush,
    /// Requests complete without a look at the lease (V12).
    IgnoreLease,
    /// A flush of the own disk is acknowledged and not done (P3).
    SkipOwnFlush,
    /// After a power cut the machine shows the old boot id (G10, V7).
    SameBootId,
    /// Replicated writes are acknowledged by the secondary and not written.
    SkipReplica,
    /// Holes of the source are acknowledged by the target and not zeroed.
    SkipHole,
    /// Where holes are looked for, what was written since the last flush is not seen.
    StaleHole,
}

impl Mutant {
    /// Every one.
    pub const ALL: [Self; 12] = [
        Self::SkipPeerFlush,
        Self::SkipLog,
        Self::DropMarks,
        Self::SkipSuperblock,
        Self::SkipCopy,
        Self::SkipSoloFlush,
        Self::IgnoreLease,
        Self::SkipOwnFlush,
        Self::SameBootId,
        Self::SkipReplica,
        Self::SkipHole,
        Self::StaleHole,
    ];

    /// As typed.
    pub const fn name(self) -> &'static str {
        match self {
            Self::SkipPeerFlush => "skip-peer-flush",
            Self::SkipLog => "skip-log",
            Self::DropMarks => "drop-marks",
            Self::SkipSuperblock => "skip-superblock",
            Self::SkipCopy => "skip-copy",
            Self::SkipSoloFlush => "skip-solo-flush",
            Self::IgnoreLease => "ignore-lease",
            Self::SkipOwnFlush => "skip-own-flush",
            Self::SameBootId => "same-boot-id",
            Self::SkipReplica => "skip-replica",
            Self::SkipHole => "skip-hole",
            Self::StaleHole => "stale-hole",
        }
    }
}

impl FromStr for Mutant {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let names = || Self::ALL.map(Self::name).join(", ");
        Self::ALL
            .into_iter()
            .find(|mutant| mutant.name() == text)
            .ok_or_else(|| format!("no mutant {text}; there are {}", names()))
    }
}
