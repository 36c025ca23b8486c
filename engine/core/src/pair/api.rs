//! What goes into the server machine and what comes out.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::event::Event;
use crate::ids::{BootId, Generation, Incarnation, ServerName, SessionId, VolumeIndex};
use crate::message::ControlMessage;
use crate::mirror::api::{Order, Pace, Report};

/// What never changes while the process lives.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ServerConfig {
    /// This server.
    pub name: ServerName,
    /// The other one.
    pub peer: ServerName,
    /// Name of the pair.
    pub pair_name: String,
    /// This process.
    pub incarnation: Incarnation,
    /// This boot.
    pub boot_id: BootId,
    /// Volume names, in index order.
    pub volumes: Vec<String>,
    /// Canonical configuration, as far as both must agree.
    pub config: BTreeMap<String, String>,
    /// Between two heartbeats.
    pub heartbeat: Duration,
    /// Lease.
    pub freeze: Duration,
    /// Silence after which the peer counts as lost.
    pub silent: Duration,
    /// Random, from the shell: the source of the ids drawn here.
    pub id_seed: u128,
}

/// The shell's name for an operator's request.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct OperatorToken(pub u64);

/// An operator's command, as far as the machine decides on it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Operator {
    /// First start of a new pair.
    Activate,
    /// Become primary in a session where nobody serves, or ask the primary to hand over.
    Promote,
    /// The operator testifies that the peer is down.
    PromotePeerIsDown,
    /// Data may be lost; the operator typed this server's generation.
    PromoteForce(Generation),
    /// Stop being primary. The shell made sure that the device is not in use, or was told to force.
    Demote,
    /// Exchange roles.
    Switchover,
    /// Hand over if possible, settle, end in order.
    Down,
    /// SIGTERM: settle and end, no hand-over.
    Stop,
    /// Pace of the resync.
    Resync(Pace),
    /// Copy everything to the named server.
    FullCopy {
        /// Which volume.
        volume: VolumeIndex,
        /// The server that is overwritten.
        target: ServerName,
    },
    /// The victim of a split brain. The shell saves the victim's blocks when the machine asks for it.
    Resolve {
        /// Who gives up its own blocks.
        victim: ServerName,
    },
    /// Give up the local copy of a volume (replace a disk).
    Detach(VolumeIndex),
}

/// Why a command was not done: exit code 1.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{code}: {text}")]
pub struct Refusal {
    /// Stable word.
    pub code: &'static str,
    /// In a sentence, with the fix.
    pub text: String,
}

/// An input of the server machine.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Input {
    /// A volume reports.
    Report(VolumeIndex, Report),
    /// The link has a session with an authenticated peer.
    LinkUp {
        /// Its id, the same on both sides.
        session: SessionId,
        /// The process at the other end.
        peer_incarnation: Incarnation,
    },
    /// The link gave the session up.
    LinkDown {
        /// Which.
        session: SessionId,
        /// In words.
        reason: String,
    },
    /// The peer said this.
    Message(SessionId, ControlMessage),
    /// The operator wants this.
    Operator(OperatorToken, Operator),
    /// The saved blocks asked for by [`Action::SaveBlocks`] are stable, or could not be saved.
    Saved(Result<(), String>),
    /// The shell ends the volume of a failed copy to open its backing anew: until [`Input::Reopened`] nothing answers
    /// for it. Clients of a front were sent away before.
    Gone(VolumeIndex),
    /// The shell opened a volume's backing again; the volume loads anew.
    Reopened(VolumeIndex),
    /// Nothing but time.
    Time,
}

/// What the shell must do now.
#[derive(Clone, PartialEq, Debug)]
pub enum Action {
    /// Give this to a volume.
    Order(VolumeIndex, Order),
    /// Send on the control channel.
    Send(SessionId, ControlMessage),
    /// End the session: both sides will try again with a new one.
    CloseSession(SessionId),
    /// Answer the operator.
    Answer(OperatorToken, Result<String, Refusal>),
    /// Write down and publish.
    Event(Box<Event>),
    /// Save the blocks this server alone wrote (all volumes' marked blocks) to a file, flushed; answer
    /// [`Input::Saved`].
    SaveBlocks,
    /// End the process.
    Exit,
}
