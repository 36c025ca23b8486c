//! The volumes' block devices: a FUSE file under a loop device, with a link that operators use.

use std::path::{Path, PathBuf};

use duplex_core::ids::VolumeIndex;
use duplex_core::pair::api::Input;
use duplex_frontend::fuse::FuseMount;
use duplex_frontend::loopdev::{
    DetachMode, LoopDevice, LoopOptions, is_available, make_device_link, remove_device_link, set_up_device,
};
use duplex_frontend::nbd::{ListenAddress, Network};

use super::run::Daemon;
use crate::config::{Config, Frontend, Metadata, Nbd, RunDir};
use crate::control::api::Answer;
use crate::volume::{NbdSettings, Settings, VolumeCommand, VolumeHandle, place, spawn};

/// A loop device and the link to it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Made {
    device: LoopDevice,
    link: PathBuf,
}

#[derive(Clone, PartialEq, Eq, Debug)]
enum DeviceState {
    None,
    Making,
    Up(Made),
    Removing,
}

/// What the helper threads tell the main loop.
#[derive(Debug)]
pub(super) enum DeviceEvent {
    Made(usize, Result<Made, String>),
    Removed(usize, Result<(), String>),
}

/// The device of one volume.
#[derive(Debug)]
pub(super) struct Device {
    name: String,
    state: DeviceState,
    wanted: bool,
}

impl Device {
    pub(super) fn new(name: &str) -> Self {
        Self { name: name.to_owned(), state: DeviceState::None, wanted: false }
    }

    /// The link that operators use, while there is a device.
    pub(super) fn link(&self) -> Option<String> {
        match &self.state {
            DeviceState::Up(made) => Some(made.link.display().to_string()),
            DeviceState::None | DeviceState::Making | DeviceState::Removing => None,
        }
    }
}

impl Daemon {
    /// The volume serves from now on, or does not.
    pub(super) fn device_wanted(&mut self, at: usize, wanted: bool) {
        let device_frontend = match self.config.volumes[at].frontend {
            Frontend::Auto => is_available(),
            Frontend::Fuse => true,
            Frontend::None => false,
        };
        self.devices[at].wanted = wanted && device_frontend;
        self.step_device(at);
    }

    fn step_device(&mut self, at: usize) {
        let Some(volume) = self.volumes[at].clone() else {
            return;
        };
        let device = &mut self.devices[at];
        let events = self.device_events.clone();
        match (&device.state, device.wanted) {
            (DeviceState::None, true) => {
                device.state = DeviceState::Making;
                let sector_bytes = volume.shared.snapshot().copy.map_or(4096, |c| c.sector_bytes);
                let options = LoopOptions { volume: device.name.clone(), sector_bytes, read_only: false };
                let directory = self.run_dir.device_dir();
                tokio::task::spawn_blocking(move || {
                    let made = make(&options, &directory, &volume);
                    let _ = events.blocking_send(DeviceEvent::Made(at, made));
                });
            }
            (DeviceState::Up(made), false) => {
                let made = made.clone();
                let name = device.name.clone();
                device.state = DeviceState::Removing;
                let directory = self.run_dir.device_dir();
                tokio::task::spawn_blocking(move || {
                    let removed = remove(&made, &name, &directory, &volume);
                    let _ = events.blocking_send(DeviceEvent::Removed(at, removed));
                });
            }
            (DeviceState::None, false)
            | (DeviceState::Up(_), true)
            | (DeviceState::Making | DeviceState::Removing, _) => {}
        }
    }

    pub(super) fn on_device(&mut self, event: DeviceEvent) {
        match event {
            DeviceEvent::Made(at, Ok(made)) => {
                let text = format!("volume {}: {}", self.devices[at].name, made.link.display());
                self.devices[at].state = DeviceState::Up(made);
                self.note("device-up", text, "the volume is served here");
                self.step_device(at);
            }
            DeviceEvent::Made(at, Err(text)) => {
                self.devices[at].state = DeviceState::None;
                self.devices[at].wanted = false;
                if let Some(volume) = &self.volumes[at] {
                    volume.send(VolumeCommand::FuseEnd);
                }
                self.note("trouble", format!("no block device, NBD only: {text}"), "device");
            }
            DeviceEvent::Removed(at, result) => {
                self.devices[at].state = DeviceState::None;
                if let Err(text) = result {
                    self.note("trouble", text, "device");
                }
                self.step_device(at);
            }
        }
    }

    /// A restarted daemon finds what its predecessor left.
    pub(super) fn adopt_devices(&mut self) {
        for at in 0..self.devices.len() {
            let name = &self.devices[at].name;
            let link = self.run_dir.device(name);
            let Ok(target) = std::fs::read_link(&link) else {
                continue;
            };
            for old in LoopDevice::find(name, None) {
                if old.path() == target
                    && let Err(error) = old.detach(DetachMode::WhenClosed)
                {
                    tracing::warn!("{error}");
                }
            }
            if let Err(error) = remove_device_link(&self.run_dir.device_dir(), name, &target) {
                tracing::warn!("{error}");
            }
        }
    }

    /// Who uses the devices: role changes that take them away are refused meanwhile.
    pub(super) fn look_at_users(&mut self) {
        let mut users = Vec::new();
        for device in &self.devices {
            if let DeviceState::Up(made) = &device.state {
                match made.device.users() {
                    Ok(found) => {
                        users.extend(found.iter().map(|user| format!("{} {user}", made.link.display())))
                    }
                    Err(error) => users.push(error.to_string()),
                }
            }
        }
        self.server.set_in_use((!users.is_empty()).then(|| users.join(", ")));
    }

    pub(super) fn users_unless(&mut self, force: bool) {
        if force {
            self.server.set_in_use(None);
        } else {
            self.look_at_users();
        }
    }

    /// At the end of the process: what nobody keeps is taken away.
    pub(super) async fn end_devices(&mut self) {
        let directory = self.run_dir.device_dir();
        let mut left = Vec::new();
        for (device, volume) in self.devices.iter_mut().zip(&self.volumes) {
            if let (DeviceState::Up(made), Some(volume)) = (&device.state, volume) {
                left.push((made.clone(), device.name.clone(), volume.clone()));
                device.state = DeviceState::None;
            }
        }
        let task = tokio::task::spawn_blocking(move || {
            for (made, name, volume) in left {
                if let Err(text) = remove(&made, &name, &directory, &volume) {
                    tracing::warn!("{text}");
                }
            }
        });
        let _ = task.await;
    }

    /// Takes a (new) backing of a volume into use, after its copy failed or was detached.
    pub(super) async fn reopen(&mut self, index: VolumeIndex) -> Answer {
        if self.server.role_word() == "primary" {
            let text =
                "this server is primary; the peer must serve while a disk is replaced (`duplex switchover`)";
            return Answer::refused("is-primary", text);
        }
        let at = usize::from(index.0);
        let volume = self.config.volumes[at].clone();
        if let Some(old) = self.volumes[at].take() {
            self.expected_ends += 1;
            old.send(VolumeCommand::Stop);
        }
        let data = volume.backing.of(self.config.me).clone();
        let metadata = match volume.metadata.of(self.config.me) {
            Metadata::Internal => None,
            Metadata::Path(path) => Some(path.clone()),
        };
        let opened =
            tokio::task::spawn_blocking(move || place::open(data, metadata, super::run::CLAIM_WAIT)).await;
        let placed = match opened {
            Ok(Ok(placed)) => placed,
            Ok(Err(error)) => return Answer::refused(error.code(), error.to_string()),
            Err(error) => return Answer::Failed { text: error.to_string() },
        };
        let settings = Settings {
            name: volume.name.clone(),
            index,
            boot_id: self.boot_id,
            stall: self.config.arbiter.stall,
            nbd: nbd_settings(&self.config, &self.run_dir, at),
            events: self.volume_events.clone(),
        };
        match spawn(settings, placed) {
            Ok((handle, thread)) => {
                self.volumes[at] = Some(handle);
                self.threads.push(thread);
                self.feed(Input::Reopened(index));
                self.note(
                    "attached",
                    format!("volume {}: the backing is taken again", volume.name),
                    "operator",
                );
                Answer::ok("attached")
            }
            Err(error) => Answer::Failed { text: error.to_string() },
        }
    }

    /// Where clients of a volume connect.
    pub(super) fn nbd_address(&self, at: usize) -> String {
        let volume = &self.config.volumes[at];
        match volume.nbd.of(self.config.me) {
            Nbd::Unix => self.run_dir.nbd(&volume.name).display().to_string(),
            Nbd::Tcp(address) => address.to_string(),
        }
    }
}

/// Blocks while the volume's thread answers the kernel's first questions.
fn make(options: &LoopOptions, directory: &Path, volume: &VolumeHandle) -> Result<Made, String> {
    let (mount, connection) = FuseMount::create(&options.volume).map_err(|error| error.to_string())?;
    volume.send(VolumeCommand::Fuse(connection));
    let device = set_up_device(&mount, options).map_err(|error| error.to_string())?;
    match make_device_link(directory, &options.volume, device.path()) {
        Ok(link) => Ok(Made { device, link }),
        Err(error) => {
            let _ = device.detach(DetachMode::WhenClosed);
            Err(error.to_string())
        }
    }
}

fn remove(made: &Made, name: &str, directory: &Path, volume: &VolumeHandle) -> Result<(), String> {
    let detached = made.device.detach(DetachMode::WhenClosed).map_err(|error| error.to_string());
    let unlinked = remove_device_link(directory, name, made.device.path()).map_err(|error| error.to_string());
    volume.send(VolumeCommand::FuseEnd);
    detached.and(unlinked)
}

/// The NBD server of a volume.
pub(super) fn nbd_settings(config: &Config, run_dir: &RunDir, at: usize) -> NbdSettings {
    let volume = &config.volumes[at];
    let peer = &config.servers.of(config.me.other()).name;
    let group = volume.nbd_group.as_deref().and_then(crate::config::environment::group_id);
    let mut settings = NbdSettings::unix(
        &volume.name,
        run_dir.nbd(&volume.name),
        group,
        format!("secondary; primary is {peer}"),
    );
    settings.is_default = config.volumes.len() == 1;
    if let Nbd::Tcp(address) = volume.nbd.of(config.me) {
        settings.listen = ListenAddress::Tcp(*address);
        let allowed = volume.nbd_allow.iter();
        settings.allowed.extend(allowed.map(|n| Network::new(n.address, n.prefix_bits)));
    }
    settings
}
