//! A source that does not serve vouches for its copies before it copies them.
//!
//! Going alone (G4) makes a source's copies proven: what they hold counts from then on. A source that nobody made
//! primary has no G4. Were its copies left unproven, the target's adoption would make the *target's* copy of one
//! volume the proven one, and after an interruption each server would be the source of some volume.

use super::server::Server;
use super::session::Phase;
use super::steps::Step;
use crate::message::Hello;
use crate::mirror::api::CopyChange;

impl Server {
    /// Some copies are being recorded as proven; this server's next hello says so.
    pub(super) fn vouches(&mut self, rule: &str) -> bool {
        let unproven: Vec<bool> = self.copies().map(|copy| copy.unproven).collect();
        if !unproven.contains(&true) {
            return false;
        }
        self.set_phase(Phase::Hello);
        if self.is_pending(|step| matches!(step, Step::Vouched)) {
            return true;
        }
        self.reason = format!("this server is the source by {rule}: its copies count from now on");
        let changes = unproven
            .iter()
            .map(|unproven| if *unproven { CopyChange::Proven } else { CopyChange::None })
            .collect();
        self.record_all(Step::Vouched, changes, true);
        true
    }
}

/// The source has yet to vouch for a copy.
pub(super) fn waits_for_vouched(source: &Hello) -> bool {
    source.volumes.iter().any(|volume| volume.copy.unproven)
}
