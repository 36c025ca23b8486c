//! The core's actions are carried out.

use std::collections::BTreeMap;
use std::path::PathBuf;

use duplex_core::event::Event;
use duplex_core::format::record::CopyState;
use duplex_core::ids::{ServerName, VolumeIndex};
use duplex_core::pair::Server;
use duplex_core::pair::api::{Action, Input};
use duplex_core::time::Instant;

use super::devices::DeviceEvent;
use super::run::Daemon;
use crate::control::api::{Answer, Direction, Explanation};
use crate::crash_at;
use crate::volume::VolumeCommand;

impl Daemon {
    pub(super) fn carry_out(&mut self) {
        while let Some(action) = self.server.poll_action() {
            crash_at::reached(|| Server::boundary_before(&action));
            match action {
                Action::Order(index, order) => {
                    if let Some(volume) = self.volumes.get(usize::from(index.0)).and_then(Option::as_ref) {
                        volume.send(VolumeCommand::Order(order));
                    }
                }
                Action::Send(session, message) => {
                    if let Err(error) = self.link.send(session, message) {
                        tracing::warn!("{error}");
                    }
                }
                Action::CloseSession(session) => {
                    let reason = self.server.reason().to_owned();
                    if let Err(error) = self.link.close_session(session, &reason) {
                        tracing::warn!("{error}");
                    }
                    self.session_over(session);
                }
                Action::Answer(token, result) => {
                    if self.resolving == Some(token) {
                        self.resolving = None;
                    }
                    if let Some(reply) = self.answers.remove(&token) {
                        let _ = reply.send(Answer::from(result));
                    }
                }
                Action::Event(event) => self.append(*event),
                Action::SaveBlocks => self.save_blocks(),
                Action::Exit => self.exiting = true,
            }
        }
    }

    fn append(&mut self, event: Event) {
        tracing::info!(kind = event.kind, reason = event.reason, "{}", event.text);
        if let Err(error) = self.events.append(event) {
            tracing::error!("{error}");
        }
    }

    /// An event of the shell: nothing the core decided.
    pub(super) fn note(&mut self, kind: &str, text: String, reason: &str) {
        self.note_with(kind, text, reason, BTreeMap::new());
    }

    pub(super) fn note_refusal(&mut self, code: &str, text: String, mine: &str, theirs: &str) {
        let fields = BTreeMap::from([
            ("code".to_owned(), code.to_owned()),
            ("mine".to_owned(), mine.to_owned()),
            ("theirs".to_owned(), theirs.to_owned()),
        ]);
        self.note_with("refused", text, code, fields);
    }

    /// Who typed what; its effects are events of their own.
    pub(super) fn note_command(&mut self, typed: &str, uid: u32) {
        let fields =
            BTreeMap::from([("command".to_owned(), typed.to_owned()), ("uid".to_owned(), uid.to_string())]);
        self.note_with("command", format!("`duplex {typed}` by user {uid}"), "by the operator", fields);
    }

    fn note_with(&mut self, kind: &str, text: String, reason: &str, fields: BTreeMap<String, String>) {
        let name = self.config.servers.of(self.config.me).name.clone();
        let mut event = plain_event(&name, kind, text, reason);
        event.epoch = self.server.record().epoch_seen.clone();
        self.server.state_word().clone_into(&mut event.state_before);
        self.server.state_word().clone_into(&mut event.state_after);
        event.fields = fields;
        self.append(event);
    }

    /// The victim of a split brain: every marked block of every volume to a file, before anything overwrites it. That takes
    /// its time, on a helper thread; asked for by both servers' operators at once, one file answers both.
    fn save_blocks(&mut self) {
        if self.saving.is_some() {
            return;
        }
        self.saving = Some(self.server.record().epoch_seen.clone());
        let (config, events) = (self.config.clone(), self.device_events.clone());
        tokio::spawn(async move {
            let saving =
                tokio::task::spawn_blocking(move || crate::offline::save_marked(&config, &config.volumes));
            let result = match saving.await {
                Ok(result) => result.map_err(|error| error.to_string()),
                Err(error) => Err(error.to_string()),
            };
            let _ = events.send(DeviceEvent::Saved(result)).await;
        });
    }

    /// The helper thread saved the marked blocks, or could not.
    pub(super) fn saved(&mut self, result: Result<Vec<PathBuf>, String>) {
        let served = self.saving.take().is_none_or(|epoch| epoch != self.server.record().epoch_seen);
        if let Ok(files) = &result {
            for file in files {
                self.note(
                    "saved",
                    format!("this server's own blocks are saved in {}", file.display()),
                    "resolve",
                );
            }
        }
        let result = match result {
            Ok(_) if served => Err("this server served while its blocks were saved; try again".to_owned()),
            Ok(_) => Ok(()),
            Err(text) => Err(text),
        };
        self.feed(Input::Saved(result));
    }

    /// What would be copied where, by which rule, and what would be lost.
    pub(super) fn explain(&self, only: Option<VolumeIndex>) -> Answer {
        let all: Vec<Explanation> = (0..self.config.volumes.len())
            .map(super::page::index)
            .filter(|index| only.is_none_or(|only| only == *index))
            .map(|index| self.explain_one(index))
            .collect();
        Explanation::answer(&all)
    }

    fn explain_one(&self, index: VolumeIndex) -> Explanation {
        let at = usize::from(index.0);
        let snapshot = self.volumes.get(at).and_then(Option::as_ref).map(|v| v.shared.snapshot());
        let snapshot = snapshot.unwrap_or_default();
        let block_bytes = snapshot.copy.as_ref().map_or(0, |c| u64::from(c.block_bytes));
        let generation = snapshot.copy.as_ref().map(|c| c.generation).filter(|g| !g.is_none());
        let volume = self.config.volumes[at].name.clone();
        let mine = snapshot.dirty_blocks * block_bytes;
        match self.server.explain(index) {
            Some(known) => {
                let in_step = known.direction == duplex_core::pair::Direction::None;
                let copy_bytes = if in_step {
                    0
                } else if known.full {
                    snapshot.copy.as_ref().map_or(0, |c| c.size_bytes)
                } else {
                    (snapshot.dirty_blocks + known.peer_dirty_blocks) * block_bytes
                };
                let theirs = known.peer_dirty_blocks * block_bytes;
                let (direction, lost_bytes, text) = match known.direction {
                    duplex_core::pair::Direction::ToPeer => {
                        (Direction::ToPeer, theirs, "this server is the source".to_owned())
                    }
                    duplex_core::pair::Direction::FromPeer => {
                        (Direction::FromPeer, mine, "the peer is the source".to_owned())
                    }
                    duplex_core::pair::Direction::None => {
                        (Direction::None, 0, "nothing is copied".to_owned())
                    }
                    duplex_core::pair::Direction::SplitBrain => (
                        Direction::SplitBrain,
                        mine.min(theirs),
                        format!(
                            "both wrote alone: {mine} bytes here, {theirs} bytes there; nothing is overwritten"
                        ),
                    ),
                    duplex_core::pair::Direction::Refused => {
                        (Direction::Refused, 0, "the servers refuse each other".to_owned())
                    }
                };
                let rule = Some(known.rule);
                Explanation {
                    volume,
                    rule,
                    direction,
                    full: known.full,
                    copy_bytes,
                    lost_bytes,
                    generation,
                    text,
                }
            }
            None => Explanation {
                volume,
                rule: None,
                direction: Direction::Unknown,
                full: false,
                copy_bytes: mine,
                lost_bytes: 0,
                generation,
                text: match snapshot.state {
                    Some(CopyState::Blank) => {
                        "blank: `duplex activate`, or it copies from an active peer".to_owned()
                    }
                    Some(_) | None => format!("the peer is not heard; {mine} bytes are marked here"),
                },
            },
        }
    }

    pub(super) fn dump(&self, index: VolumeIndex) -> Answer {
        let snapshot =
            self.volumes.get(usize::from(index.0)).and_then(Option::as_ref).map(|v| v.shared.snapshot());
        match snapshot.and_then(|s| s.copy.map(|copy| (copy, s.dirty_blocks))) {
            Some((copy, dirty)) => {
                let (text, data) = crate::offline::describe(&copy, Some(self.server.record()), dirty);
                Answer::Ok { text, data: Some(data) }
            }
            None => Answer::refused("not-loaded", "the metadata is not read"),
        }
    }
}

/// An event without evidence.
pub(super) fn plain_event(server: &ServerName, kind: &str, text: String, reason: &str) -> Event {
    Event {
        server: server.clone(),
        kind: kind.to_owned(),
        text,
        reason: reason.to_owned(),
        epoch: duplex_core::ids::Epoch::never(),
        state_before: String::new(),
        state_after: String::new(),
        peer_state: None,
        evidence: BTreeMap::new(),
        fields: BTreeMap::new(),
    }
}

/// When the peer was last heard, while a session stands.
pub(super) fn heard(server: &Server) -> Option<Instant> {
    server.session_view().map(|s| s.last_heard)
}

/// Tells systemd, where it runs us.
pub(super) fn tell_systemd(states: &[sd_notify::NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!("systemd: {error}");
    }
}
