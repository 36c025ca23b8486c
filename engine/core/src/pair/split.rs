//! Split brain: nothing is overwritten until the operator named a victim and its blocks are saved.

use std::collections::BTreeMap;

use super::api::{Action, OperatorToken, Refusal};
use super::operator::Waiting;
use super::server::{Server, Serving, common_ancestor};
use super::session::Phase;
use super::steps::Step;
use crate::format::record::Era;
use crate::ids::ServerName;
use crate::message::ControlMessage;
use crate::mirror::api::CopyChange;

impl Server {
    pub(super) fn split_brain(&mut self, rule: &str) {
        let known = self.session.as_ref().is_some_and(|s| s.phase == Phase::SplitBrain);
        self.set_phase(Phase::SplitBrain);
        if known {
            return;
        }
        let Some(theirs) = self.session.as_ref().and_then(|s| s.peer_hello.clone()) else {
            return;
        };
        let mine: u64 = self.volumes.iter().filter_map(|v| v.facts.as_ref()).map(|f| f.dirty_blocks).sum();
        let peers: u64 = theirs.volumes.iter().map(|v| v.dirty_blocks).sum();
        let generations: Vec<String> = theirs.volumes.iter().map(|v| v.copy.generation.to_string()).collect();
        let fields = BTreeMap::from([
            ("code".to_owned(), "split-brain".to_owned()),
            ("mine".to_owned(), self.describe_generations()),
            ("theirs".to_owned(), generations.join(", ")),
            ("my_blocks".to_owned(), mine.to_string()),
            ("their_blocks".to_owned(), peers.to_string()),
        ]);
        let text = format!(
            "split brain ({rule}): here {mine} blocks, there {peers} blocks the other lacks; nothing is \
             overwritten. `duplex resolve --victim SERVER` after `duplex demote` there"
        );
        self.reason.clone_from(&text);
        self.event_with("split-brain", text, rule, fields);
    }

    pub(super) fn resolve(&mut self, token: OperatorToken, victim: &ServerName) {
        let refuse = |code, text: String| Err(Refusal { code, text });
        if self.session.as_ref().is_none_or(|s| s.phase != Phase::SplitBrain) {
            let text = "there is no split brain with a peer that is heard".to_owned();
            return self.answer(token, refuse("no-split-brain", text));
        }
        if *victim == self.config.peer {
            self.wait(token, Waiting::Resolve);
            self.send(ControlMessage::Resolve { victim: victim.clone() });
        } else if *victim == self.config.name {
            if self.serving != Serving::No {
                return self.answer(token, refuse("victim-is-primary", victim_serves(victim)));
            }
            self.wait(token, Waiting::Resolve);
            self.actions.push_back(Action::SaveBlocks);
        } else {
            let text = format!("{victim} is not a server of this pair");
            self.answer(token, refuse("unknown-server", text));
        }
    }

    pub(super) fn on_resolve_asked(&mut self, victim: &ServerName) {
        let split = self.session.as_ref().is_some_and(|s| s.phase == Phase::SplitBrain);
        if *victim != self.config.name || !split {
            let text = "there is no split brain there".to_owned();
            return self.send(ControlMessage::ResolveFailed { text });
        }
        if self.serving != Serving::No {
            return self.send(ControlMessage::ResolveFailed { text: victim_serves(victim) });
        }
        self.actions.push_back(Action::SaveBlocks);
    }

    /// The victim's blocks are stable in a file, or could not be saved: then nothing is given up.
    pub(super) fn on_saved(&mut self, result: Result<(), String>) {
        let split = self.session.as_ref().is_some_and(|s| s.phase == Phase::SplitBrain);
        let error = match result {
            Ok(()) if split && self.serving == Serving::No => None,
            Ok(()) => Some("the peer was lost, or this server serves, in between".to_owned()),
            Err(text) => Some(text),
        };
        if let Some(text) = error {
            self.send(ControlMessage::ResolveFailed { text: text.clone() });
            return self.on_resolved(Err(text));
        }
        let theirs = self.session.as_ref().and_then(|s| s.peer_hello.clone());
        let changes = self
            .volumes
            .iter()
            .enumerate()
            .map(|(at, volume)| {
                let mine = volume.facts.as_ref().map(|f| &f.copy);
                let theirs = theirs.as_ref().and_then(|h| h.volumes.get(at)).map(|v| &v.copy);
                match (mine, theirs) {
                    (Some(mine), Some(theirs)) => match common_ancestor(mine, theirs) {
                        Some(to) if to != mine.generation || mine.generation == theirs.generation => {
                            CopyChange::Surrender { to, full: !mine.map_reaches(to) }
                        }
                        Some(_) | None => CopyChange::Outdated,
                    },
                    (Some(_) | None, _) => CopyChange::None,
                }
            })
            .collect();
        self.record.era = Era::Pair;
        self.record.was_primary = false;
        self.eligible = false;
        self.record_all(Step::Surrendered, changes, true);
    }

    pub(super) fn surrendered(&mut self) {
        self.transition("resolved", "this server gave its own blocks up", |s| s.set_phase(Phase::Hello));
        self.send(ControlMessage::Resolved);
        self.on_resolved(Ok(()));
    }

    /// Answers the operator, on whichever side the command was typed.
    pub(super) fn on_resolved(&mut self, result: Result<(), String>) {
        if let Some(token) = self.take_asked(|w| *w == Waiting::Resolve) {
            let answer = match result {
                Ok(()) => Ok("resolved: the victim's blocks are saved and it is resynchronised".to_owned()),
                Err(text) => Err(Refusal { code: "resolve-failed", text }),
            };
            self.answer(token, answer);
        }
    }
}

fn victim_serves(victim: &ServerName) -> String {
    format!("{victim} is primary; `duplex demote` it first")
}
