//! What the two servers would do with each other, before anything happens.

use super::server::Server;
use super::session::Phase;
use crate::ids::VolumeIndex;
use crate::mirror::api::CopyPlan;
use crate::resync::decide::Outcome;
use crate::resync::pair::decide_pair;

/// Which way a volume's data would go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Direction {
    /// Nothing would be copied.
    None,
    /// From this server.
    ToPeer,
    /// To this server.
    FromPeer,
    /// Both hold what the other lacks.
    SplitBrain,
    /// The servers refuse each other.
    Refused,
}

/// One volume.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Explained {
    /// The rule, printable.
    pub rule: String,
    /// Which way.
    pub direction: Direction,
    /// Everything, not the marked blocks only.
    pub full: bool,
    /// Blocks the peer marked.
    pub peer_dirty_blocks: u64,
}

impl Server {
    /// By the hellos of the present session, as long as it is not in step; `None` while there are none.
    pub fn explain(&self, index: VolumeIndex) -> Option<Explained> {
        let session = self.session.as_ref()?;
        let (mine, theirs) = (session.sent.as_ref()?, session.peer_hello.as_ref()?);
        let at = usize::from(index.0);
        if session.phase == Phase::Mirrored {
            let rule = "in-step".to_owned();
            return Some(Explained { rule, direction: Direction::None, full: false, peer_dirty_blocks: 0 });
        }
        let decision = decide_pair(mine, theirs).volumes.into_iter().nth(at)?;
        let peer_dirty_blocks = theirs.volumes.get(at).map_or(0, |v| v.dirty_blocks);
        let (direction, full) = match decision.outcome {
            Outcome::Source(plan) | Outcome::SourceAfterRight(plan) => {
                (Direction::ToPeer, plan == CopyPlan::Full)
            }
            Outcome::Target(plan) | Outcome::TargetAfterRight(plan) => {
                (Direction::FromPeer, plan == CopyPlan::Full)
            }
            Outcome::Resume { .. } | Outcome::InStep { .. } | Outcome::NoResync { .. } | Outcome::Wait(_) => {
                (Direction::None, false)
            }
            Outcome::SplitBrain => (Direction::SplitBrain, false),
            Outcome::Refuse { .. } => (Direction::Refused, false),
        };
        Some(Explained { rule: decision.rule.to_string(), direction, full, peer_dirty_blocks })
    }
}
