//! The target of a resync: gives its marks, takes chunks, adopts the source's lineage (G5, G6 step 2).

use super::api::{CopyChange, CopyPlan};
use super::record::{After, Job};
use super::volume::{SessionRole, Volume};
use crate::dirty_log::{DirtyLog, NextPage};
use crate::ids::{Generation, Proven};
use crate::message::VolumeMessage;

/// Pages of marks under way to the source.
const MARKS_WINDOW: u64 = 8;

/// How far the target is.
#[derive(Debug, Default)]
pub(super) struct Taking {
    /// Marks still to be sent: the next page.
    marks_from: Option<u64>,
    sent: u64,
    taken: u64,
    adopting: bool,
}

impl Taking {
    /// The adoption is durable.
    pub(super) const fn adopted(&mut self) {
        self.adopting = false;
    }

    pub(super) fn reset(&mut self) {
        *self = Self::default();
    }
}

impl Volume {
    pub(super) fn begin_target(&mut self, plan: CopyPlan) {
        self.taking.reset();
        match plan {
            CopyPlan::Union => self.taking.marks_from = Some(0),
            CopyPlan::None | CopyPlan::Full => {}
        }
    }

    /// Sends the next pages of this side's map.
    pub(super) fn pump_marks(&mut self) -> bool {
        let mut moved = false;
        while let Some(from) = self.taking.marks_from
            && self.taking.sent - self.taking.taken < MARKS_WINDOW
        {
            let Some(log) = self.log.as_mut() else {
                return moved;
            };
            match log.next_page(from) {
                NextPage::Loading => return moved,
                NextPage::Page { index, bits } => {
                    self.taking.marks_from = Some(index + 1);
                    self.taking.sent += 1;
                    self.send(VolumeMessage::MarksPage { index, bits: bits.to_vec() }, None);
                }
                NextPage::End => {
                    self.taking.marks_from = None;
                    self.send(VolumeMessage::MarksEnd { pages: self.taking.sent }, None);
                }
            }
            moved = true;
        }
        moved
    }

    pub(super) fn on_marks_ack(&mut self, pages: u64) {
        self.taking.taken = self.taking.taken.max(pages.min(self.taking.sent));
    }

    /// Nothing is left to copy: adopt, in one record after a flush (G6 step 2).
    pub(super) fn on_sync_done(&mut self, generation: Generation, history: Vec<Generation>, proven: Proven) {
        let is_target = self.joined.is_some_and(|j| j.role == SessionRole::Target);
        if !is_target || self.taking.adopting || self.failed.is_some() {
            return;
        }
        self.taking.adopting = true;
        self.recording.queue(Job {
            server: None,
            change: CopyChange::None,
            preflush: true,
            unproven: false,
            after: After::Adopt { generation, history, proven },
        });
    }

    /// The source's marks: taken in on the source's side.
    pub(super) fn marks_room(&self) -> bool {
        self.log.as_ref().is_some_and(DirtyLog::can_merge)
    }
}
