//! Where a server stands between the steps of the rules: asked by test builds and by the simulator.

use super::api::{Action, Input};
use super::server::Server;
use crate::boundary::Boundary;
use crate::message::ControlMessage;
use crate::mirror::api::{Order, Report, ServeMode};

impl Server {
    /// The boundary at which a server stands when it asked for this action and the shell did not begin it.
    pub fn boundary_before(action: &Action) -> Option<Boundary> {
        match action {
            Action::Order(_, order) => match order {
                Order::Serve { mode: ServeMode::Alone, .. } => Some(Boundary::G4BeforeServe),
                Order::Return { .. } => Some(Boundary::G6SourceBeforeReturn),
                Order::Drain { .. } => Some(Boundary::G9OldBeforeDrain),
                Order::Serve { .. }
                | Order::Record { .. }
                | Order::Join { .. }
                | Order::Leave
                | Order::Host { .. }
                | Order::Freeze { .. }
                | Order::Close
                | Order::Pace(_)
                | Order::TellMarks { .. }
                | Order::Fail { .. } => None,
            },
            Action::Send(_, message) => Some(ends_of(message)?.0),
            Action::CloseSession(_)
            | Action::Answer(..)
            | Action::Event(_)
            | Action::SaveBlocks
            | Action::Exit => None,
        }
    }

    /// The boundary at which a server stands when this arrived and it was not told.
    pub fn boundary_at(input: &Input) -> Option<Boundary> {
        match input {
            Input::Message(_, message) => Some(ends_of(message)?.1),
            Input::Report(_, Report::Drained { .. }) => Some(Boundary::G9OldDrained),
            Input::Report(..)
            | Input::LinkUp { .. }
            | Input::LinkDown { .. }
            | Input::Operator(..)
            | Input::Saved(_)
            | Input::Gone(_)
            | Input::Reopened(_)
            | Input::Time => None,
        }
    }
}

/// Where the sender stands before a message goes out, and the receiver when it came.
const fn ends_of(message: &ControlMessage) -> Option<(Boundary, Boundary)> {
    match message {
        ControlMessage::Mirrored { .. } => {
            Some((Boundary::G6SourceBeforeMirrored, Boundary::G6TargetMirroredHeard))
        }
        ControlMessage::MirroredAck { .. } => {
            Some((Boundary::G6TargetBeforeMirroredAck, Boundary::G6SourceMirroredAcked))
        }
        ControlMessage::HandedOver { .. } => {
            Some((Boundary::G9OldBeforeHandedOver, Boundary::G9NewHandedOverHeard))
        }
        ControlMessage::Primary { .. } => Some((Boundary::G9NewBeforePrimary, Boundary::G9OldPrimaryHeard)),
        ControlMessage::Hello(_)
        | ControlMessage::Agree { .. }
        | ControlMessage::Refuse { .. }
        | ControlMessage::Heartbeat { .. }
        | ControlMessage::PromoteAsk { .. }
        | ControlMessage::PromoteAnswer { .. }
        | ControlMessage::HandOverAsk
        | ControlMessage::HandOverRefused { .. }
        | ControlMessage::Demoted { .. }
        | ControlMessage::Resync { .. }
        | ControlMessage::FullCopy { .. }
        | ControlMessage::Resolve { .. }
        | ControlMessage::Resolved
        | ControlMessage::ResolveFailed { .. }
        | ControlMessage::CopyFailed { .. }
        | ControlMessage::Bye { .. } => None,
    }
}
