//! Where a volume stands between the steps of the rules: asked by test builds and by the simulator.

use super::api::{Action, CopyChange, Input, ServeMode};
use super::flush::OwnFlushFor;
use super::record::After;
use super::start::Starting;
use super::volume::{DiskPurpose, Serve, Volume};
use crate::boundary::Boundary;
use crate::format::record::{CopyState, Era};
use crate::message::VolumeMessage;
use crate::request::{DiskOp, DiskOpKind};

/// What the record being written is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RecordPurpose {
    /// The first record of a start.
    Start,
    /// G4: a new generation, era = solo.
    GoAlone,
    /// G5.
    BecomeTarget,
    /// G6 step 2.
    Adopt,
    /// G6 step 3.
    Return,
    /// G9, on the old primary (or the operator's `demote`).
    BecomeSecondary,
    /// G9, on the new primary (or `promote` where nobody was primary).
    BecomePrimary,
    /// Another one.
    Other,
}

impl Volume {
    fn record_purpose(&self) -> Option<RecordPurpose> {
        let (job, old) = (self.recording.job()?, self.server_record()?);
        Some(match &job.after {
            After::Start => RecordPurpose::Start,
            After::Return(_) => RecordPurpose::Return,
            After::Adopt { .. } => RecordPurpose::Adopt,
            After::Tag(_) => match &job.change {
                CopyChange::NewGeneration { .. } => RecordPurpose::GoAlone,
                CopyChange::Target { .. }
                | CopyChange::Identity { state: CopyState::Inconsistent { .. }, .. } => {
                    RecordPurpose::BecomeTarget
                }
                CopyChange::None => {
                    let new = job.server.as_ref()?;
                    match (old.was_primary, new.was_primary, new.era) {
                        (true, false, Era::Pair) => RecordPurpose::BecomeSecondary,
                        (false, true, Era::Pair) => RecordPurpose::BecomePrimary,
                        (_, _, Era::Pair | Era::Solo(_)) => RecordPurpose::Other,
                    }
                }
                CopyChange::Identity { .. }
                | CopyChange::Proven
                | CopyChange::WholeMap { .. }
                | CopyChange::TakeBack { .. }
                | CopyChange::Outdated
                | CopyChange::Surrender { .. } => RecordPurpose::Other,
            },
        })
    }

    /// The boundary at which this volume stands when it asked for this action and the shell did not begin it.
    pub fn boundary_before(&self, action: &Action) -> Option<Boundary> {
        match action {
            Action::Disk(op) => self.boundary_before_disk(op),
            Action::Send(_, VolumeMessage::SyncDone { .. }, _) => Some(Boundary::G6SourceBeforeSyncDone),
            Action::Complete(_, Ok(())) => {
                (self.serve == Serve::Open(ServeMode::Alone)).then_some(Boundary::G4FirstCompletion)
            }
            Action::Complete(_, Err(_))
            | Action::Send(..)
            | Action::Release(_)
            | Action::CopyBuffer { .. }
            | Action::Report(_)
            | Action::Exposure(_) => None,
        }
    }

    /// The same before a disk operation.
    pub fn boundary_before_disk(&self, op: &DiskOp) -> Option<Boundary> {
        match (DiskPurpose::of(op.id)?, &op.kind) {
            (DiskPurpose::Super, _) => Boundary::before_record(self.record_purpose()?),
            (DiskPurpose::Flush(slot), _) => match self.own_flush(slot)? {
                OwnFlushFor::Return => Some(Boundary::G6SourceBeforeBothFlushed),
                OwnFlushFor::Drain => Some(Boundary::G9OldBeforeBothFlushed),
                OwnFlushFor::Marks => None,
            },
            (DiskPurpose::Log(_), DiskOpKind::MetaWrite { .. }) if self.settles_for_drain() => {
                Some(Boundary::G9OldBeforeSettle)
            }
            (
                DiskPurpose::Log(_)
                | DiskPurpose::Client(_)
                | DiskPurpose::Heal(_)
                | DiskPurpose::Peer(_)
                | DiskPurpose::CopyRead(_)
                | DiskPurpose::Seek(_)
                | DiskPurpose::PeerFlush(_)
                | DiskPurpose::SuperRead,
                _,
            ) => None,
        }
    }

    /// The boundary at which this volume stands when this arrived and it was not told.
    pub fn boundary_at(&self, input: &Input) -> Option<Boundary> {
        match input {
            Input::Disk(id, _) => match DiskPurpose::of(*id)? {
                DiskPurpose::Super => Boundary::record_durable(self.record_purpose()?),
                DiskPurpose::SuperRead => Some(Boundary::G11SuperblockRead),
                DiskPurpose::Log(_) if self.start == Starting::Replaying => Some(Boundary::G11InReplay),
                DiskPurpose::Log(_)
                | DiskPurpose::Client(_)
                | DiskPurpose::Heal(_)
                | DiskPurpose::Peer(_)
                | DiskPurpose::CopyRead(_)
                | DiskPurpose::Seek(_)
                | DiskPurpose::Flush(_)
                | DiskPurpose::PeerFlush(_) => None,
            },
            Input::Message(_, VolumeMessage::SyncAck { .. }, _) => Some(Boundary::G6SourceSyncAcked),
            Input::Message(..) | Input::Request(_) | Input::Order(_) | Input::Time => None,
        }
    }
}
