//! Full copies. The source first marks every block under a new generation, durably; only then may the target
//! begin. A copy that was made before, such as a disk put back after its replacement was half filled, is
//! then never taken for one that the map knows.

use super::api::OperatorToken;
use super::operator::refuse;
use super::server::{Server, Serving};
use super::session::Phase;
use super::steps::Step;
use crate::format::record::Origin;
use crate::ids::{Generation, VolumeIndex};
use crate::message::{ControlMessage, Hello};
use crate::mirror::api::{CopyChange, CopyPlan, Part};

impl Server {
    pub(super) fn full_copy(&mut self, token: OperatorToken, volume: VolumeIndex, target_is_me: bool) {
        if self.in_step_session().is_none() {
            let text = format!("both copies must be in step; the state is {}", self.state_word());
            return self.answer(token, refuse("not-mirrored", text));
        }
        if target_is_me == self.is_primary() {
            let text = "the target of a full copy is a secondary; its peer must be primary";
            return self.answer(token, refuse("not-secondary", text));
        }
        if target_is_me {
            self.send(ControlMessage::FullCopy { volume: volume.0 });
        } else {
            self.begin_full_copy(usize::from(volume.0));
        }
        self.answer(token, Ok("the full copy begins".to_owned()));
    }

    pub(super) fn on_full_copy_asked(&mut self, volume: u16) {
        if self.serving == Serving::Mirrored && self.in_step_session().is_some() {
            self.begin_full_copy(usize::from(volume));
        }
    }

    /// This server goes alone in a generation whose map reaches no older copy: by `decide` the peer needs
    /// everything then, whatever happens in between.
    fn begin_full_copy(&mut self, at: usize) {
        if let Some(wanted) = self.full_copy.get_mut(at) {
            *wanted = true;
            self.go_alone("a full copy to the peer was asked for", Origin::Solo);
        }
    }

    /// The source's maps are being made ready for a full copy; its next hello says so.
    pub(super) fn makes_maps_whole(&mut self, parts: &[Part], rule: &str) -> bool {
        if self.is_pending(|step| matches!(step, Step::MapsWhole { .. })) {
            self.set_phase(Phase::Hello);
            return true;
        }
        let wanting: Vec<bool> = self
            .volumes
            .iter()
            .zip(parts)
            .map(|(volume, part)| *part == Part::Source(CopyPlan::Full) && !volume.whole_map)
            .collect();
        if !wanting.contains(&true) {
            return false;
        }
        self.set_phase(Phase::Hello);
        self.reason = format!("every block is being marked for a full copy ({rule})");
        let changes = wanting
            .iter()
            .map(|wants| match wants {
                true => CopyChange::WholeMap { generation: Generation(self.draw()) },
                false => CopyChange::None,
            })
            .collect();
        self.record_all(Step::MapsWhole { volumes: wanting }, changes, false);
        true
    }

    pub(super) fn maps_are_whole(&mut self, volumes: &[bool]) {
        for (volume, whole) in self.volumes.iter_mut().zip(volumes) {
            volume.whole_map |= whole;
        }
    }
}

/// The source has yet to mark every block of a volume that is to be copied in full.
pub(super) fn waits_for_whole_map(parts: &[Part], source: &Hello) -> bool {
    parts
        .iter()
        .zip(&source.volumes)
        .any(|(part, volume)| *part == Part::Target(CopyPlan::Full) && !volume.whole_map)
}
