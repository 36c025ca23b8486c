//! Named boundaries between the steps of rules G4, G5, G6, G9 and G11: the places where a crash is most telling. Test
//! builds of the daemon stop at one of them, the simulator at each of them in turn.
//!
//! The machines only say where they are ([`crate::mirror::Volume::boundary_before`] and its sisters); the shell that
//! carries out their actions asks. A product build never does.

use std::str::FromStr;

use crate::mirror::RecordPurpose;

/// A place between two steps. `before-flush`: the record's PREFLUSH is about to be asked for. `flushed`: the flush is
/// done, the record is not written. `durable`: the record is durable, and nothing followed from it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[expect(missing_docs, reason = "each is named and told by `name` and `text`")]
pub enum Boundary {
    G4BeforeFlush,
    G4Flushed,
    G4Durable,
    G4BeforeServe,
    G4FirstCompletion,
    G5BeforeFlush,
    G5Flushed,
    G5Durable,
    G6SourceBeforeSyncDone,
    G6TargetBeforeFlush,
    G6TargetFlushed,
    G6TargetDurable,
    G6SourceSyncAcked,
    G6SourceBeforeReturn,
    G6SourceBeforeBothFlushed,
    G6SourceBeforeFlush,
    G6SourceFlushed,
    G6SourceDurable,
    G6SourceBeforeMirrored,
    G6TargetMirroredHeard,
    G6TargetBeforeMirroredAck,
    G6SourceMirroredAcked,
    G9OldBeforeDrain,
    G9OldBeforeBothFlushed,
    G9OldBeforeSettle,
    G9OldDrained,
    G9OldBeforeFlush,
    G9OldFlushed,
    G9OldDurable,
    G9OldBeforeHandedOver,
    G9NewHandedOverHeard,
    G9NewBeforeFlush,
    G9NewFlushed,
    G9NewDurable,
    G9NewBeforePrimary,
    G9OldPrimaryHeard,
    G11BeforeClaim,
    G11Claimed,
    G11SuperblockRead,
    G11InReplay,
    G11BeforeFlush,
    G11Flushed,
    G11Durable,
}

impl Boundary {
    /// Every one, in the order in which a pair comes to them.
    pub const ALL: [Self; 43] = [
        Self::G4BeforeFlush,
        Self::G4Flushed,
        Self::G4Durable,
        Self::G4BeforeServe,
        Self::G4FirstCompletion,
        Self::G5BeforeFlush,
        Self::G5Flushed,
        Self::G5Durable,
        Self::G6SourceBeforeSyncDone,
        Self::G6TargetBeforeFlush,
        Self::G6TargetFlushed,
        Self::G6TargetDurable,
        Self::G6SourceSyncAcked,
        Self::G6SourceBeforeReturn,
        Self::G6SourceBeforeBothFlushed,
        Self::G6SourceBeforeFlush,
        Self::G6SourceFlushed,
        Self::G6SourceDurable,
        Self::G6SourceBeforeMirrored,
        Self::G6TargetMirroredHeard,
        Self::G6TargetBeforeMirroredAck,
        Self::G6SourceMirroredAcked,
        Self::G9OldBeforeDrain,
        Self::G9OldBeforeBothFlushed,
        Self::G9OldBeforeSettle,
        Self::G9OldDrained,
        Self::G9OldBeforeFlush,
        Self::G9OldFlushed,
        Self::G9OldDurable,
        Self::G9OldBeforeHandedOver,
        Self::G9NewHandedOverHeard,
        Self::G9NewBeforeFlush,
        Self::G9NewFlushed,
        Self::G9NewDurable,
        Self::G9NewBeforePrimary,
        Self::G9OldPrimaryHeard,
        Self::G11BeforeClaim,
        Self::G11Claimed,
        Self::G11SuperblockRead,
        Self::G11InReplay,
        Self::G11BeforeFlush,
        Self::G11Flushed,
        Self::G11Durable,
    ];

    /// As typed, and what it is.
    const fn told(self) -> (&'static str, &'static str) {
        match self {
            Self::G4BeforeFlush => ("g4-before-flush", "going alone: before the flush"),
            Self::G4Flushed => ("g4-flushed", "going alone: flushed, the record is not written"),
            Self::G4Durable => ("g4-durable", "going alone: the record is durable, nothing completed"),
            Self::G4BeforeServe => ("g4-before-serve", "going alone: before the volume is told to serve"),
            Self::G4FirstCompletion => ("g4-first-completion", "alone: before a request completes"),
            Self::G5BeforeFlush => ("g5-before-flush", "target: before the flush of its first record"),
            Self::G5Flushed => ("g5-flushed", "target: flushed, `inconsistent` is not written"),
            Self::G5Durable => ("g5-durable", "target: `inconsistent` is durable, no block was taken"),
            Self::G6SourceBeforeSyncDone => ("g6-source-before-sync-done", "source: before SyncDone is sent"),
            Self::G6TargetBeforeFlush => ("g6-target-before-flush", "target: before the adoption's flush"),
            Self::G6TargetFlushed => ("g6-target-flushed", "target: flushed, the adoption is not written"),
            Self::G6TargetDurable => {
                ("g6-target-durable", "target: the adoption is durable, SyncAck is not sent")
            }
            Self::G6SourceSyncAcked => ("g6-source-sync-acked", "source: SyncAck came"),
            Self::G6SourceBeforeReturn => {
                ("g6-source-before-return", "source: before the right is given back")
            }
            Self::G6SourceBeforeBothFlushed => {
                ("g6-source-before-both-flushed", "source: before the flush of both copies")
            }
            Self::G6SourceBeforeFlush => {
                ("g6-source-before-flush", "source: both flushed, before the record's flush")
            }
            Self::G6SourceFlushed => ("g6-source-flushed", "source: flushed, `era = pair` is not written"),
            Self::G6SourceDurable => ("g6-source-durable", "source: `era = pair` is durable"),
            Self::G6SourceBeforeMirrored => ("g6-source-before-mirrored", "source: before Mirrored is sent"),
            Self::G6TargetMirroredHeard => ("g6-target-mirrored-heard", "target: Mirrored came"),
            Self::G6TargetBeforeMirroredAck => {
                ("g6-target-before-mirrored-ack", "target: the epoch is durable, before MirroredAck is sent")
            }
            Self::G6SourceMirroredAcked => ("g6-source-mirrored-acked", "source: MirroredAck came"),
            Self::G9OldBeforeDrain => ("g9-old-before-drain", "old primary: before it drains"),
            Self::G9OldBeforeBothFlushed => {
                ("g9-old-before-both-flushed", "old primary: drained, before the flush of both copies")
            }
            Self::G9OldBeforeSettle => {
                ("g9-old-before-settle", "old primary: both flushed, before the marks go")
            }
            Self::G9OldDrained => ("g9-old-drained", "old primary: no request, no mark"),
            Self::G9OldBeforeFlush => ("g9-old-before-flush", "old primary: before the record's flush"),
            Self::G9OldFlushed => ("g9-old-flushed", "old primary: flushed, `secondary` is not written"),
            Self::G9OldDurable => ("g9-old-durable", "old primary: `secondary` is durable"),
            Self::G9OldBeforeHandedOver => {
                ("g9-old-before-handed-over", "old primary: before HandedOver is sent")
            }
            Self::G9NewHandedOverHeard => ("g9-new-handed-over-heard", "new primary: HandedOver came"),
            Self::G9NewBeforeFlush => ("g9-new-before-flush", "new primary: before the record's flush"),
            Self::G9NewFlushed => ("g9-new-flushed", "new primary: flushed, `primary` is not written"),
            Self::G9NewDurable => ("g9-new-durable", "new primary: `primary` is durable"),
            Self::G9NewBeforePrimary => {
                ("g9-new-before-primary", "new primary: it serves, before Primary is sent")
            }
            Self::G9OldPrimaryHeard => ("g9-old-primary-heard", "old primary: Primary came"),
            Self::G11BeforeClaim => ("g11-before-claim", "start: before the backing is claimed"),
            Self::G11Claimed => {
                ("g11-claimed", "start: the backing is claimed, nothing is read by the volume")
            }
            Self::G11SuperblockRead => ("g11-superblock-read", "start: the superblocks are read"),
            Self::G11InReplay => ("g11-in-replay", "start: a part of the log is read"),
            Self::G11BeforeFlush => {
                ("g11-before-flush", "start: replayed, before the flush of the first record")
            }
            Self::G11Flushed => ("g11-flushed", "start: flushed, the first record is not written"),
            Self::G11Durable => ("g11-durable", "start: the first record is durable"),
        }
    }

    /// As typed.
    pub const fn name(self) -> &'static str {
        self.told().0
    }

    /// In words.
    pub const fn text(self) -> &'static str {
        self.told().1
    }

    /// The three of a record.
    const fn of_record(purpose: RecordPurpose) -> Option<[Self; 3]> {
        match purpose {
            RecordPurpose::Start => Some([Self::G11BeforeFlush, Self::G11Flushed, Self::G11Durable]),
            RecordPurpose::GoAlone => Some([Self::G4BeforeFlush, Self::G4Flushed, Self::G4Durable]),
            RecordPurpose::BecomeTarget => Some([Self::G5BeforeFlush, Self::G5Flushed, Self::G5Durable]),
            RecordPurpose::Adopt => {
                Some([Self::G6TargetBeforeFlush, Self::G6TargetFlushed, Self::G6TargetDurable])
            }
            RecordPurpose::Return => {
                Some([Self::G6SourceBeforeFlush, Self::G6SourceFlushed, Self::G6SourceDurable])
            }
            RecordPurpose::BecomeSecondary => {
                Some([Self::G9OldBeforeFlush, Self::G9OldFlushed, Self::G9OldDurable])
            }
            RecordPurpose::BecomePrimary => {
                Some([Self::G9NewBeforeFlush, Self::G9NewFlushed, Self::G9NewDurable])
            }
            RecordPurpose::Other => None,
        }
    }

    pub(crate) fn before_record(purpose: RecordPurpose) -> Option<Self> {
        Self::of_record(purpose).map(|[before, _, _]| before)
    }

    pub(crate) fn record_durable(purpose: RecordPurpose) -> Option<Self> {
        Self::of_record(purpose).map(|[_, _, durable]| durable)
    }

    /// The boundary between the flush and the write of the record whose beginning is this one. One disk operation does
    /// both: who wants to stop here carries out the flush alone.
    pub const fn between_flush_and_write(self) -> Option<Self> {
        match self {
            Self::G4BeforeFlush => Some(Self::G4Flushed),
            Self::G5BeforeFlush => Some(Self::G5Flushed),
            Self::G6TargetBeforeFlush => Some(Self::G6TargetFlushed),
            Self::G6SourceBeforeFlush => Some(Self::G6SourceFlushed),
            Self::G9OldBeforeFlush => Some(Self::G9OldFlushed),
            Self::G9NewBeforeFlush => Some(Self::G9NewFlushed),
            Self::G11BeforeFlush => Some(Self::G11Flushed),
            Self::G4Flushed
            | Self::G4Durable
            | Self::G4BeforeServe
            | Self::G4FirstCompletion
            | Self::G5Flushed
            | Self::G5Durable
            | Self::G6SourceBeforeSyncDone
            | Self::G6TargetFlushed
            | Self::G6TargetDurable
            | Self::G6SourceSyncAcked
            | Self::G6SourceBeforeReturn
            | Self::G6SourceBeforeBothFlushed
            | Self::G6SourceFlushed
            | Self::G6SourceDurable
            | Self::G6SourceBeforeMirrored
            | Self::G6TargetMirroredHeard
            | Self::G6TargetBeforeMirroredAck
            | Self::G6SourceMirroredAcked
            | Self::G9OldBeforeDrain
            | Self::G9OldBeforeBothFlushed
            | Self::G9OldBeforeSettle
            | Self::G9OldDrained
            | Self::G9OldFlushed
            | Self::G9OldDurable
            | Self::G9OldBeforeHandedOver
            | Self::G9NewHandedOverHeard
            | Self::G9NewFlushed
            | Self::G9NewDurable
            | Self::G9NewBeforePrimary
            | Self::G9OldPrimaryHeard
            | Self::G11BeforeClaim
            | Self::G11Claimed
            | Self::G11SuperblockRead
            | Self::G11InReplay
            | Self::G11Flushed
            | Self::G11Durable => None,
        }
    }
}

/// A name that is not in the list.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("there is no boundary {found}; there are {}", Boundary::ALL.map(Boundary::name).join(", "))]
pub struct UnknownBoundary {
    /// What was typed.
    pub found: String,
}

impl FromStr for Boundary {
    type Err = UnknownBoundary;

    fn from_str(text: &str) -> Result<Self, UnknownBoundary> {
        let found = Self::ALL.into_iter().find(|boundary| boundary.name() == text);
        found.ok_or_else(|| UnknownBoundary { found: text.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_name_is_its_own_and_parses_back() {
        let names: BTreeSet<&str> = Boundary::ALL.iter().map(|b| b.name()).collect();
        assert_eq!(names.len(), Boundary::ALL.len());
        for boundary in Boundary::ALL {
            assert_eq!(boundary.name().parse(), Ok(boundary));
        }
        let error = "g4".parse::<Boundary>().expect_err("no such name").to_string();
        assert!(error.contains("g4-durable") && error.contains("g11-durable"), "{error}");
    }
}
