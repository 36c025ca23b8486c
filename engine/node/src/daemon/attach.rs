//! `attach`: a (new) disk of a volume is taken into use while this server runs.
//!
//! Disks are opened on a helper thread, as that may take long: the main loop goes on meanwhile. The new disk is opened
//! before anything is given up. Only where the failed copy's own thread still holds it (it is the same disk, or one
//! of both files is) that thread ends first, and the core is told that nothing answers for the volume until it is
//! opened.

use std::path::Path;
use std::time::Duration;

use duplex_core::ids::VolumeIndex;
use duplex_core::pair::api::Input;
use tokio::sync::oneshot;

use super::devices::{DeviceEvent, nbd_settings};
use super::run::{CLAIM_WAIT, Daemon};
use crate::config::{Config, Volume};
use crate::control::api::Answer;
use crate::volume::place::{PlaceError, Placed};
use crate::volume::{Settings, place, spawn};

/// A disk that was opened, and where the configuration names it now.
#[derive(Debug)]
pub(super) struct Opened {
    volume: Volume,
    placed: Placed,
}

/// Why a disk was not opened.
#[derive(Debug)]
pub(super) enum NotOpened {
    /// This process holds it.
    HeldHere(PlaceError),
    /// The operator is told.
    Refused(Answer),
}

impl From<NotOpened> for Answer {
    fn from(not: NotOpened) -> Self {
        match not {
            NotOpened::HeldHere(error) => Self::refused(error.code(), error.to_string()),
            NotOpened::Refused(answer) => answer,
        }
    }
}

/// An `attach` that is under way.
#[derive(Debug)]
pub(super) struct Attaching {
    index: VolumeIndex,
    reply: oneshot::Sender<Answer>,
    /// Of this `attach` among all: a late word about an earlier one is not for it.
    number: u64,
    stage: Stage,
}

#[derive(Debug)]
enum Stage {
    /// A helper thread opens the disk.
    Opening,
    /// The failed copy's thread ends. Then this disk is taken, or the one that it held is opened.
    Ending(Option<Box<Opened>>),
}

/// A thread that ends answers its clients first. One that does not end in this time is not waited for.
const THREAD_END_WAIT: Duration = Duration::from_secs(10);

impl Daemon {
    /// Begins to take the backing of a volume into use, after its copy failed or was detached.
    pub(super) fn attach(&mut self, index: VolumeIndex, reply: oneshot::Sender<Answer>) {
        let refusal = match &self.attaching {
            Some(_) => {
                Some(Answer::refused("busy", "another `attach` is under way; try again when it has ended"))
            }
            None => self.may_attach(index).err(),
        };
        if let Some(answer) = refusal {
            let _ = reply.send(answer);
            return;
        }
        self.attaches += 1;
        self.attaching = Some(Attaching { index, reply, number: self.attaches, stage: Stage::Opening });
        let old_lives = self.volumes[usize::from(index.0)].is_some();
        // A thread that was told to end holds its disk a moment longer.
        self.open_aside(index, if old_lives { Duration::ZERO } else { CLAIM_WAIT });
    }

    /// Whether the state lets a disk be replaced; asked again after every wait.
    fn may_attach(&self, index: VolumeIndex) -> Result<(), Answer> {
        if self.exiting || self.server.state_word() == "down" {
            return Err(Answer::Stopping { text: "the daemon is stopping".to_owned() });
        }
        let failed = self.server.volume(index).is_some_and(|v| v.failed.is_some() || v.unusable.is_some());
        if !failed {
            let text = "the volume's copy is in use and not failed; `duplex detach` it first";
            return Err(Answer::refused("not-detached", text));
        }
        if self.server.role_word() == "primary" {
            let text =
                "this server is primary; the peer must serve while a disk is replaced (`duplex switchover`)";
            return Err(Answer::refused("is-primary", text));
        }
        // A front's clients, whom the peer's copy serves, end with the session.
        if let Some(by) = self.users() {
            let text = format!("the device is in use: {by}; unmount it first");
            return Err(Answer::refused("in-use", text));
        }
        Ok(())
    }

    /// Opens what the configuration names now on a helper thread; [`DeviceEvent::Opened`] follows.
    fn open_aside(&self, index: VolumeIndex, wait: Duration) {
        let name = self.config.volumes[usize::from(index.0)].name.clone();
        let file = self.config.file.clone();
        let me = self.config.my_server().name.0.clone();
        let events = self.device_events.clone();
        tokio::spawn(async move {
            let opening = tokio::task::spawn_blocking(move || open(&file, &me, &name, wait));
            let opened = match opening.await {
                Ok(opened) => opened,
                Err(error) => Err(NotOpened::Refused(Answer::Failed { text: error.to_string() })),
            };
            let _ = events.send(DeviceEvent::Opened(index, Box::new(opened))).await;
        });
    }

    /// The helper thread found a disk or none.
    pub(super) fn opened(&mut self, index: VolumeIndex, opened: Result<Opened, NotOpened>) {
        let Some(mut attaching) = self.attaching.take() else {
            return;
        };
        let old_lives = self.volumes[usize::from(index.0)].is_some();
        let answer = match (self.may_attach(index), opened) {
            (Err(answer), _) => answer,
            (Ok(()), Ok(opened)) if !old_lives => self.take_disk(index, opened),
            (Ok(()), Err(not)) if !(old_lives && matches!(not, NotOpened::HeldHere(_))) => not.into(),
            (Ok(()), opened) => {
                // A new disk is there, or the thread holds the very disk that is wanted: nobody waits for it from now on.
                attaching.stage = Stage::Ending(opened.ok().map(Box::new));
                let (number, events) = (attaching.number, self.device_events.clone());
                tokio::spawn(async move {
                    tokio::time::sleep(THREAD_END_WAIT).await;
                    let _ = events.send(DeviceEvent::ThreadLate(number)).await;
                });
                self.attaching = Some(attaching);
                self.feed(Input::Gone(index));
                return self.end_thread(usize::from(index.0));
            }
        };
        let _ = attaching.reply.send(answer);
    }

    /// Tells a volume's thread to end while the daemon goes on. A device that is left is taken away before: its
    /// kernel side may want an answer for that.
    pub(super) fn end_thread(&mut self, at: usize) {
        if self.volumes[at].is_some() {
            self.exposed(at, false);
        }
        if let Some(volume) = self.volumes[at].take() {
            self.expected_ends += 1;
            self.devices[at].end_after(volume);
        }
    }

    /// The thread of a volume ended as it was told, and holds nothing any more.
    pub(super) fn thread_ended(&mut self, at: usize) {
        let ours = |a: &mut Attaching| usize::from(a.index.0) == at && matches!(a.stage, Stage::Ending(_));
        let Some(mut attaching) = self.attaching.take_if(ours) else {
            return;
        };
        let index = attaching.index;
        let opened = match std::mem::replace(&mut attaching.stage, Stage::Opening) {
            Stage::Ending(opened) => opened,
            Stage::Opening => None,
        };
        let answer = match (self.may_attach(index), opened) {
            (Err(answer), _) => answer,
            (Ok(()), Some(opened)) => self.take_disk(index, *opened),
            (Ok(()), None) => {
                self.attaching = Some(attaching);
                return self.open_aside(index, CLAIM_WAIT);
            }
        };
        let _ = attaching.reply.send(answer);
    }

    /// A thread that was told to end does not.
    pub(super) fn thread_late(&mut self, number: u64) {
        let ending = |a: &&Attaching| a.number == number && matches!(a.stage, Stage::Ending(_));
        if let Some(at) = self.attaching.as_ref().filter(ending).map(|a| usize::from(a.index.0)) {
            let name = self.config.volumes[at].name.clone();
            self.note("trouble", format!("volume {name}: the old disk's thread does not end"), "attach");
            self.devices[at].end_now();
            self.thread_ended(at);
        }
    }

    /// The disk is there: a thread of its own takes it, and the volume loads anew.
    fn take_disk(&mut self, index: VolumeIndex, opened: Opened) -> Answer {
        let at = usize::from(index.0);
        let mine = &mut self.config.volumes[at];
        // Everything else in the file counts at the next start.
        mine.backing = opened.volume.backing;
        mine.metadata = opened.volume.metadata;
        let name = mine.name.clone();
        let settings = Settings {
            name: name.clone(),
            index,
            boot_id: self.boot_id,
            stall: self.config.arbiter.stall,
            nbd: nbd_settings(&self.config, &self.run_dir, at),
            events: self.volume_events.clone(),
        };
        match spawn(settings, opened.placed) {
            Ok((handle, thread)) => {
                super::input::set_pace(&handle, &self.config);
                self.volumes[at] = Some(handle);
                self.threads.push(thread);
                self.feed(Input::Reopened(index));
                self.note("attached", format!("volume {name}: the backing is taken again"), "operator");
                Answer::ok("attached")
            }
            Err(error) => Answer::Failed { text: error.to_string() },
        }
    }
}

/// A new disk may have a new path: the configuration says where it is now.
fn open(file: &Path, me: &str, name: &str, wait: Duration) -> Result<Opened, NotOpened> {
    let refused = |code: &str, text: String| NotOpened::Refused(Answer::refused(code, text));
    let fresh =
        Config::load(file, Some(me)).map_err(|problems| refused("configuration", problems.to_string()))?;
    let side = fresh.me;
    let Some(volume) = fresh.volumes.into_iter().find(|volume| volume.name == name) else {
        return Err(refused(
            "configuration",
            format!("{} no longer has a volume {name}", fresh.file.display()),
        ));
    };
    let data = volume.backing.of(side).clone();
    let metadata = volume.metadata.of(side).path().map(Path::to_owned);
    match place::open(data, metadata, wait) {
        Ok(placed) => Ok(Opened { volume, placed }),
        Err(error) if error.is_held_here() => Err(NotOpened::HeldHere(error)),
        Err(error) => Err(refused(error.code(), error.to_string())),
    }
}
