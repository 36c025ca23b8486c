//! What comes in becomes the core's input.

use duplex_core::ids::VolumeIndex;
use duplex_core::message::ControlMessage;
use duplex_core::mirror::api::{Order, Pace};
use duplex_core::pair::Server;
use duplex_core::pair::api::{Input, Operator};
use duplex_link::{LinkEvent, SessionEnd};

use super::run::Daemon;
use crate::config::Config;
use crate::control::api::{Answer, Command, PromoteMode};
use crate::control::server::Call;
use crate::control::status::SessionRefusal;
use crate::failure::Failure;
use crate::volume::{VolumeCommand, VolumeEvent, VolumeHandle};
use crate::{clock, crash_at};

/// What a command is where it is no question to the core.
enum Instead {
    /// Answered at once.
    Answer(Answer),
    /// Answered when the disk is there.
    Attach(VolumeIndex),
}

impl From<Answer> for Instead {
    fn from(answer: Answer) -> Self {
        Self::Answer(answer)
    }
}

/// The pace that the configuration names; operators change it while the daemon runs.
pub(super) fn set_pace(volume: &VolumeHandle, config: &Config) {
    for pace in
        [Pace::MaxBytesPerSecond(config.resync.max_bytes_per_s), Pace::Priority(config.resync.priority)]
    {
        volume.send(VolumeCommand::Order(Order::Pace(pace)));
    }
}

impl Daemon {
    /// Gives the server machine an input and carries out what follows.
    pub(super) fn feed(&mut self, input: Input) {
        self.inputs.push_back(input);
        while let Some(input) = self.inputs.pop_front() {
            crash_at::reached(|| Server::boundary_at(&input));
            self.server.handle(clock::now(), input);
            self.carry_out();
        }
    }

    pub(super) fn on_link(&mut self, event: LinkEvent) {
        match event {
            LinkEvent::SessionUp { session, peer } => {
                self.link_refusal = None;
                self.session = Some(session);
                self.tell_volumes(|| VolumeCommand::Session(session));
                self.feed(Input::LinkUp { session, peer_incarnation: peer.incarnation });
            }
            LinkEvent::SessionDown { session, end } => {
                let reason = match end {
                    SessionEnd::Closed(reason) => reason,
                    SessionEnd::ClosedByPeer(reason) => format!("closed by the peer: {reason}"),
                    SessionEnd::PeerRestarted => "the peer's process is another one now".to_owned(),
                };
                self.session_over(session);
                self.feed(Input::LinkDown { session, reason });
            }
            LinkEvent::Control(session, message) => {
                if matches!(message, ControlMessage::HandOverAsk) {
                    self.look_at_users();
                }
                self.feed(Input::Message(session, message));
            }
            LinkEvent::Data(connection) => {
                let at = usize::from(connection.volume.0);
                if let Some(volume) = self.volumes.get(at).and_then(Option::as_ref) {
                    volume.send(VolumeCommand::Connection(Box::new(connection)));
                }
            }
            LinkEvent::Path { path, up, active, why } => {
                let kind = if up { "path-up" } else { "path-lost" };
                let state = if active { "active" } else { "standing by" };
                let text = if up {
                    format!("link path {path} is up ({state})")
                } else {
                    format!("link path {path} is down: {why}")
                };
                self.note(kind, text, &why);
            }
            LinkEvent::Stranger { address, why } => {
                self.note("stranger", format!("stranger({address}): {why}"), &why);
            }
            LinkEvent::Refused(refusal) => {
                let fix = link_remedy(&refusal.code);
                let text = if refusal.mine.is_empty() && refusal.theirs.is_empty() {
                    // Not a value that could be shown.
                    format!("the link refuses the peer: the two differ in `{}`: {fix}", refusal.code)
                } else {
                    format!(
                        "the link refuses the peer: {}: here {}, there {}: {fix}",
                        refusal.code, refusal.mine, refusal.theirs
                    )
                };
                let some = |value: &String| Some(value.clone()).filter(|v| !v.is_empty());
                let shown = SessionRefusal {
                    code: refusal.code.clone(),
                    rule: Some("link".to_owned()),
                    mine: some(&refusal.mine),
                    theirs: some(&refusal.theirs),
                };
                if self.link_refusal.as_ref() != Some(&shown) {
                    self.link_refusal = Some(shown);
                    self.note_refusal(&refusal.code, text, &refusal.mine, &refusal.theirs);
                }
            }
            LinkEvent::CorruptFrame { path, why } => self.corrupt(path, &why),
        }
    }

    fn corrupt(&mut self, path: u16, why: &str) {
        self.note("corrupt-frame", format!("a frame on path {path} was altered on the way: {why}"), why);
    }

    pub(super) fn session_over(&mut self, session: duplex_core::ids::SessionId) {
        if self.session == Some(session) {
            self.session = None;
        }
        self.tell_volumes(|| VolumeCommand::SessionOver(session));
    }

    fn tell_volumes(&self, command: impl Fn() -> VolumeCommand) {
        for volume in self.volumes.iter().flatten() {
            volume.send(command());
        }
    }

    pub(super) fn on_volume(&mut self, index: VolumeIndex, event: VolumeEvent) -> Result<(), Failure> {
        let at = usize::from(index.0);
        match event {
            VolumeEvent::Report(report) => self.feed(Input::Report(index, report)),
            VolumeEvent::Exposed { serving } => self.exposed(at, serving),
            VolumeEvent::ChannelBroken { session, attempt, fatal, reason } => {
                tracing::info!(volume = at, "{reason}");
                let told = if fatal {
                    self.link.close_session(session, &reason)
                } else {
                    self.link.data_broken(session, index, attempt)
                };
                if let Err(error) = told {
                    tracing::warn!("{error}");
                }
                if fatal {
                    self.session_over(session);
                    self.feed(Input::LinkDown { session, reason });
                }
            }
            VolumeEvent::FuseEnded { number, end } => self.fuse_ended(at, number, end),
            VolumeEvent::Corrupt { path, why } => self.corrupt(path, &why),
            VolumeEvent::Trouble(text) => self.note("trouble", text, "a component failed"),
            VolumeEvent::Ended if self.expected_ends > 0 => {
                self.expected_ends -= 1;
                self.thread_ended(at);
            }
            VolumeEvent::Ended => {
                let name = &self.config.volumes[at].name;
                return Err(Failure::failed(format!("the thread of volume {name} ended")));
            }
        }
        Ok(())
    }

    pub(super) fn on_call(&mut self, call: Call) {
        let Call { command, caller, reply } = call;
        tracing::info!(uid = caller.uid, pid = caller.pid, verb = command.verb(), "operator");
        if let Some(typed) = command.typed() {
            self.note_command(&typed, caller.uid);
        }
        let answer_now = |daemon: &mut Self, answer: Answer, reply| {
            let _ = tokio::sync::oneshot::Sender::send(reply, answer);
            daemon.publish();
        };
        let operator = match self.operator(&command) {
            Ok(operator) => operator,
            Err(Instead::Answer(answer)) => return answer_now(self, answer, reply),
            Err(Instead::Attach(index)) => return self.attach(index, reply),
        };
        let token = self.token();
        if matches!(operator, Operator::Resolve { .. }) {
            if self.resolving.is_some() {
                let text = "another `resolve` is under way; it is answered when the blocks are saved";
                return answer_now(self, Answer::refused("busy", text), reply);
            }
            self.resolving = Some(token);
        }
        self.answers.insert(token, reply);
        self.feed(Input::Operator(token, operator));
        self.let_go();
    }

    /// What the core is asked, or what is done where the core is not asked.
    fn operator(&mut self, command: &Command) -> Result<Operator, Instead> {
        match command {
            Command::Activate => Ok(Operator::Activate),
            Command::Promote { mode: PromoteMode::Plain } => Ok(Operator::Promote),
            Command::Promote { mode: PromoteMode::PeerIsDown } => Ok(Operator::PromotePeerIsDown),
            Command::Promote { mode: PromoteMode::Force(generation) } => {
                Ok(Operator::PromoteForce(*generation))
            }
            Command::Demote { force } => {
                self.users_unless(*force);
                Ok(Operator::Demote)
            }
            Command::Switchover { force } => {
                self.users_unless(*force);
                Ok(Operator::Switchover)
            }
            Command::Down => {
                self.users_unless(false);
                Ok(Operator::Down)
            }
            Command::Connect => Err(self.want_link(true).into()),
            Command::Disconnect => Err(self.want_link(false).into()),
            Command::ResyncPause => Ok(Operator::Resync(Pace::Pause)),
            Command::ResyncResume => Ok(Operator::Resync(Pace::Resume)),
            Command::ResyncPriority { priority } => Ok(Operator::Resync(Pace::Priority(*priority))),
            Command::ResyncMaxRate { max_bytes_per_s } => {
                Ok(Operator::Resync(Pace::MaxBytesPerSecond(*max_bytes_per_s)))
            }
            Command::ResyncStartFull { volume, target } => {
                let known = [self.config.me, self.config.me.other()]
                    .iter()
                    .any(|side| self.config.servers.of(*side).name == *target);
                if !known {
                    let text = format!("{target} is not a server of this pair");
                    return Err(Answer::Wrong { text }.into());
                }
                Ok(Operator::FullCopy { volume: self.volume_named(volume)?, target: target.clone() })
            }
            Command::Resolve { victim } => Ok(Operator::Resolve { victim: victim.clone() }),
            Command::Detach { volume } => Ok(Operator::Detach(self.volume_named(volume)?)),
            Command::Attach { volume } => Err(Instead::Attach(self.volume_named(volume)?)),
            Command::Explain { volume } => {
                let index = volume.as_deref().map(|name| self.volume_named(name)).transpose()?;
                Err(self.explain(index).into())
            }
            Command::Dump { volume } => {
                let index = self.volume_named(volume)?;
                Err(self.dump(index).into())
            }
        }
    }

    /// Ends the threads of detached volumes: their backings are free for `duplex create`.
    fn let_go(&mut self) {
        for at in 0..self.volumes.len() {
            if self.server.lets_go(super::page::index(at)) {
                self.end_thread(at);
            }
        }
    }

    fn volume_named(&self, name: &str) -> Result<VolumeIndex, Answer> {
        self.config.volume(name).map(|(index, _)| index).ok_or_else(|| {
            let known: Vec<&str> = self.config.volumes.iter().map(|v| v.name.as_str()).collect();
            Answer::Wrong { text: format!("there is no volume {name}; there are {}", known.join(", ")) }
        })
    }

    fn want_link(&mut self, wanted: bool) -> Answer {
        let told = if wanted { self.link.connect() } else { self.link.disconnect() };
        match told {
            Ok(()) => {
                self.link_wanted = wanted;
                let (kind, text) = if wanted {
                    ("connect", "the link tries again")
                } else {
                    ("disconnect", "the link is given up")
                };
                self.note(kind, text.to_owned(), "by the operator");
                Answer::ok(text)
            }
            Err(error) => Answer::Failed { text: error.to_string() },
        }
    }
}

/// What mends a refusal of the link, by its code.
pub(super) fn link_remedy(code: &str) -> &'static str {
    match code {
        "secret" => {
            "copy the file named by `secret` in [security] from one server to the other, then restart that one"
        }
        "encryption" => "write the same `encryption` in [security] on both servers, then restart both",
        "version" => "install the same version of duplex on both servers",
        "pair" | "server-name" | "address" | "volume" => {
            "make duplex.toml the same on both servers (`--server` names which one each is), then restart both"
        }
        _ => "the next attempt follows by itself",
    }
}
