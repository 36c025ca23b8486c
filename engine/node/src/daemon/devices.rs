//! The volumes' block devices: a FUSE file under a loop device, with a link that operators use.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use duplex_core::ids::VolumeIndex;
use duplex_frontend::fuse::{Connection, FuseEnd, FuseMount};
use duplex_frontend::loopdev::{
    DetachMode, LoopDevice, LoopOptions, is_available, make_device_link, remove_device_link, set_up_device,
};
use duplex_frontend::nbd::{ListenAddress, Network};
use tokio::sync::mpsc;

use super::attach::{NotOpened, Opened};
use super::keeper::Keeper;
use super::run::Daemon;
use crate::config::{Config, Frontend, Nbd, RunDir};
use crate::volume::{NbdSettings, VolumeCommand, VolumeHandle};

/// A loop device and the link to it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Made {
    device: LoopDevice,
    link: PathBuf,
    /// Of the FUSE connection, in this process.
    number: u64,
}

#[derive(Clone, PartialEq, Eq, Debug)]
enum DeviceState {
    None,
    /// Or being asked for: a late holder may have it.
    Making,
    Up(Made),
    Removing,
}

/// What making a device needs.
struct Making {
    options: LoopOptions,
    directory: PathBuf,
    volume: VolumeHandle,
    keeper: Arc<Keeper>,
    number: u64,
}

/// At the end of the process, a device that is being made or removed is waited for this long.
const END_WAIT: Duration = Duration::from_secs(5);

/// A holder that did not answer is asked again after this long.
const TAKE_RETRY: Duration = Duration::from_secs(1);

/// A holder that could not be replaced is tried again after this long.
const HOLDER_RETRY: Duration = Duration::from_secs(30);

/// What the helper threads tell the main loop.
#[derive(Debug)]
pub(super) enum DeviceEvent {
    Made(usize, Result<Made, String>),
    /// A device is there, but a restart will end it.
    NotKept(usize, String),
    Removed(usize, Result<(), String>),
    /// This connection to the holder ended.
    HolderLost(u64),
    /// The disk that an `attach` wants, or why there is none.
    Opened(VolumeIndex, Box<Result<Opened, NotOpened>>),
    /// The old disk's thread, which this `attach` waits for, does not end.
    ThreadLate(u64),
    /// The marked blocks are in these files, or could not be saved.
    Saved(Result<Vec<PathBuf>, String>),
    /// What the holder, which was late, has of a predecessor's device.
    Taken(usize, Option<OwnedFd>),
    /// Another holder was started and keeps so many devices; `None`: none was needed.
    HolderReplaced(u64, Result<Option<usize>, String>),
}

/// The device of one volume.
#[derive(Debug)]
pub(super) struct Device {
    name: String,
    state: DeviceState,
    wanted: bool,
    /// The volume's clients are served.
    exposed: bool,
    /// A predecessor's, whose requests wait until this server's role is known.
    adopted: bool,
    /// The volume's thread, which ends once there is no device any more.
    ends: Option<VolumeHandle>,
}

impl Device {
    pub(super) fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            state: DeviceState::None,
            wanted: false,
            exposed: false,
            adopted: false,
            ends: None,
        }
    }

    /// The volume's thread is to end when it has no device.
    pub(super) fn end_after(&mut self, volume: VolumeHandle) {
        self.ends = Some(volume);
        if self.state == DeviceState::None {
            self.end_now();
        }
    }

    /// The thread that was to end does so now.
    pub(super) fn end_now(&mut self) {
        if let Some(volume) = self.ends.take() {
            volume.send(VolumeCommand::Stop);
        }
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
    pub(super) fn exposed(&mut self, at: usize, serving: bool) {
        self.devices[at].exposed = serving;
        self.device_wanted(at, serving);
    }

    pub(super) fn all_exposed(&self) -> bool {
        self.devices.iter().all(|device| device.exposed)
    }

    fn device_wanted(&mut self, at: usize, wanted: bool) {
        if !wanted && self.leaving_devices {
            return;
        }
        self.devices[at].adopted = false;
        let device_frontend = match self.config.volumes[at].frontend {
            Frontend::Auto => is_available(),
            Frontend::Fuse => true,
            Frontend::None => false,
        };
        self.devices[at].wanted = wanted && device_frontend;
        self.step_device(at);
    }

    fn step_device(&mut self, at: usize) {
        let device = &mut self.devices[at];
        let Some(volume) = device.ends.as_ref().or(self.volumes[at].as_ref()).cloned() else {
            return;
        };
        let events = self.device_events.clone();
        match (&device.state, device.wanted) {
            (DeviceState::None, true) => {
                device.state = DeviceState::Making;
                self.next_connection += 1;
                let sector_bytes = volume.shared.snapshot().copy.map_or(4096, |c| c.sector_bytes);
                let making = Making {
                    options: LoopOptions { volume: device.name.clone(), sector_bytes, read_only: false },
                    directory: self.run_dir.device_dir(),
                    volume,
                    keeper: Arc::clone(&self.keeper),
                    number: self.next_connection,
                };
                tokio::task::spawn_blocking(move || {
                    let made = make(&making, |text| {
                        let _ = events.blocking_send(DeviceEvent::NotKept(at, text));
                    });
                    let _ = events.blocking_send(DeviceEvent::Made(at, made));
                });
            }
            (DeviceState::Up(made), false) => {
                let made = made.clone();
                let name = device.name.clone();
                device.state = DeviceState::Removing;
                let directory = self.run_dir.device_dir();
                let keeper = Arc::clone(&self.keeper);
                tokio::task::spawn_blocking(move || {
                    let removed = remove(&made, &name, &directory, &volume, &keeper);
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
            DeviceEvent::NotKept(at, text) => {
                let name = &self.devices[at].name;
                let text = format!("volume {name}: a restart of this daemon will end its device: {text}");
                self.note("trouble", text, "device");
            }
            DeviceEvent::Made(at, Err(text)) => {
                self.devices[at].state = DeviceState::None;
                self.devices[at].wanted = false;
                if let Some(volume) = &self.volumes[at] {
                    volume.send(VolumeCommand::FuseEnd);
                }
                self.devices[at].end_now();
                self.note("trouble", format!("no block device, NBD only: {text}"), "device");
            }
            DeviceEvent::HolderLost(connection) => self.replace_holder(connection, false),
            DeviceEvent::HolderReplaced(connection, result) => self.holder_replaced(connection, result),
            DeviceEvent::Removed(at, result) => {
                self.devices[at].state = DeviceState::None;
                if let Err(text) = result {
                    self.note("trouble", text, "device");
                }
                self.devices[at].end_now();
                self.step_device(at);
            }
            DeviceEvent::Opened(index, opened) => self.opened(index, *opened),
            DeviceEvent::Saved(result) => self.saved(result),
            DeviceEvent::Taken(at, connection) => self.taken(at, connection),
            DeviceEvent::ThreadLate(number) => self.thread_late(number),
        }
    }

    /// The holder ended: without another one the next restart of this daemon would end the devices.
    fn replace_holder(&mut self, connection: u64, again: bool) {
        if self.leaving_devices || self.exiting {
            return;
        }
        let wait = if again { HOLDER_RETRY } else { self.keeper.replace_after() };
        let (keeper, events) = (Arc::clone(&self.keeper), self.device_events.clone());
        tokio::spawn(async move {
            tokio::time::sleep(wait).await;
            let replaced = tokio::task::spawn_blocking(move || keeper.replace(connection)).await;
            let result = match replaced {
                Ok(result) => result.map_err(|error| error.to_string()),
                Err(error) => Err(error.to_string()),
            };
            let _ = events.send(DeviceEvent::HolderReplaced(connection, result)).await;
        });
    }

    fn holder_replaced(&mut self, connection: u64, result: Result<Option<usize>, String>) {
        match result {
            Ok(None) => {}
            Ok(Some(devices)) => {
                let text = format!("the holder had ended; a new one keeps {devices} device(s)");
                self.note("holder-replaced", text, "the holder ended while this daemon lives");
            }
            Err(text) => {
                let text = format!("a restart of this daemon will end its devices: no holder: {text}");
                self.note("trouble", text, "holder");
                self.replace_holder(connection, true);
            }
        }
    }

    /// The FUSE connection ended by itself: the device is made again, if the volume still serves.
    pub(super) fn fuse_ended(&mut self, at: usize, number: u64, end: FuseEnd) {
        let (DeviceState::Up(made), Some(volume)) = (&self.devices[at].state, self.volumes[at].clone())
        else {
            return;
        };
        if made.number != number {
            return;
        }
        let made = made.clone();
        let name = self.devices[at].name.clone();
        self.note("trouble", format!("volume {name}: {}: {end}", made.link.display()), "device");
        self.devices[at].state = DeviceState::Removing;
        let events = self.device_events.clone();
        let directory = self.run_dir.device_dir();
        let keeper = Arc::clone(&self.keeper);
        tokio::task::spawn_blocking(move || {
            let removed = remove(&made, &name, &directory, &volume, &keeper);
            let _ = events.blocking_send(DeviceEvent::Removed(at, removed));
        });
    }

    /// A restarted daemon finds what its predecessor left: devices whose connection lives go on, the others end.
    pub(super) fn adopt_devices(&mut self) {
        let mut late = false;
        for at in 0..self.devices.len() {
            let name = self.devices[at].name.clone();
            if late {
                self.take_later(at);
                continue;
            }
            match self.keeper.take(&name) {
                Ok(connection) => self.taken(at, connection),
                Err(error) => {
                    late = true;
                    self.note("trouble", format!("volume {name}: asked again: {error}"), "device");
                    self.take_later(at);
                }
            }
        }
    }

    /// A holder that is late may have a living device: it is left alone, and the holder is asked until it answers.
    fn take_later(&mut self, at: usize) {
        self.devices[at].state = DeviceState::Making;
        let name = self.devices[at].name.clone();
        let (keeper, events) = (Arc::clone(&self.keeper), self.device_events.clone());
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(TAKE_RETRY).await;
                let (keeper, name) = (Arc::clone(&keeper), name.clone());
                if let Ok(Ok(connection)) = tokio::task::spawn_blocking(move || keeper.take(&name)).await {
                    let _ = events.send(DeviceEvent::Taken(at, connection)).await;
                    return;
                }
            }
        });
    }

    /// What the holder has of a predecessor's device.
    fn taken(&mut self, at: usize, connection: Option<OwnedFd>) {
        self.devices[at].state = DeviceState::None;
        let target = std::fs::read_link(self.run_dir.device(&self.devices[at].name)).ok();
        match connection.and_then(|descriptor| Connection::resumed(descriptor).ok()) {
            Some(connection) => self.adopt_device(at, connection, target),
            None if target.is_some() => self.drop_device(at, target),
            None => {
                self.devices[at].end_now();
                self.step_device(at);
            }
        }
    }

    /// The connection lives: its requests wait until the volume serves.
    fn adopt_device(&mut self, at: usize, connection: Connection, target: Option<PathBuf>) {
        let name = self.devices[at].name.clone();
        let file_system = connection.file_system();
        let found = LoopDevice::find(&name, file_system).into_iter();
        // Where the kernel does not tell the number, the link says which device it is.
        let mut found =
            found.filter(|device| file_system.is_some() || Some(device.path()) == target.as_deref());
        let (Some(device), Some(volume)) = (found.next(), self.volumes[at].clone()) else {
            drop(connection);
            return self.drop_device(at, target);
        };
        match make_device_link(&self.run_dir.device_dir(), &name, device.path()) {
            Ok(link) => {
                self.next_connection += 1;
                let number = self.next_connection;
                let text = format!("volume {name}: {} goes on", link.display());
                self.devices[at].state = DeviceState::Up(Made { device, link, number });
                self.devices[at].adopted = !self.devices[at].exposed;
                self.devices[at].wanted = true;
                volume.send(VolumeCommand::Fuse(connection, number));
                self.note("device-kept", text, "the daemon was started again");
            }
            Err(error) => {
                self.note("trouble", error.to_string(), "device");
                drop(connection);
                self.drop_device(at, Some(device.path().to_owned()));
            }
        }
    }

    /// Nobody has the connection any more, the holder neither: its device answers EIO and is taken away.
    fn drop_device(&mut self, at: usize, target: Option<PathBuf>) {
        self.devices[at].state = DeviceState::Removing;
        let name = self.devices[at].name.clone();
        let directory = self.run_dir.device_dir();
        let (keeper, events) = (Arc::clone(&self.keeper), self.device_events.clone());
        tokio::task::spawn_blocking(move || {
            keeper.forget(&name);
            let dropped = target.map_or(Ok(()), |target| drop_left(&name, &directory, &target));
            let _ = events.blocking_send(DeviceEvent::Removed(at, dropped));
        });
    }

    /// A restarted primary whose peer took over meanwhile: what waits in its devices fails, and they go.
    pub(super) fn settle_adopted(&mut self) {
        if !self.devices.iter().any(|device| device.adopted) || !self.peer_serves() {
            return;
        }
        for at in 0..self.devices.len() {
            if self.devices[at].adopted {
                if let Some(volume) = &self.volumes[at] {
                    volume.send(VolumeCommand::FuseRefuse);
                }
                self.device_wanted(at, false);
            }
        }
    }

    fn peer_serves(&self) -> bool {
        let live = self.server.session_view().and_then(|session| session.peer_live);
        self.server.role_word() == "secondary" && live.is_some_and(super::page::is_primary)
    }

    /// This process ends and a successor is to go on with the devices: requests wait for it.
    pub(super) fn leave_devices(&mut self) {
        self.leaving_devices = true;
        for volume in self.volumes.iter().flatten() {
            volume.send(VolumeCommand::FuseHold);
        }
    }

    /// Who uses the devices: role changes that take them away are refused meanwhile.
    pub(super) fn look_at_users(&mut self) {
        let users = self.users();
        self.server.set_in_use(users);
    }

    pub(super) fn users(&self) -> Option<String> {
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
        (!users.is_empty()).then(|| users.join(", "))
    }

    pub(super) fn users_unless(&mut self, force: bool) {
        if force {
            self.server.set_in_use(None);
        } else {
            self.look_at_users();
        }
    }

    /// At the end of the process: after `down` nothing is left; else the holder keeps the devices.
    pub(super) async fn end_devices(&mut self, events: &mut mpsc::Receiver<DeviceEvent>) {
        if self.leaving_devices {
            return;
        }
        for device in &mut self.devices {
            device.wanted = false;
        }
        for at in 0..self.devices.len() {
            self.step_device(at);
        }
        let gone = async {
            while self.devices.iter().any(|device| device.state != DeviceState::None) {
                match events.recv().await {
                    Some(event) => self.on_device(event),
                    None => break,
                }
            }
        };
        if tokio::time::timeout(END_WAIT, gone).await.is_err() {
            tracing::warn!("a device is still in use: it ends with this process, its users get EIO");
        }
        let keeper = Arc::clone(&self.keeper);
        let _ = tokio::task::spawn_blocking(move || keeper.stop()).await;
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
fn make(making: &Making, not_kept: impl FnOnce(String)) -> Result<Made, String> {
    let Making { options, directory, volume, keeper, number } = making;
    let (mount, connection) = FuseMount::create(&options.volume).map_err(|error| error.to_string())?;
    if mount.can_resend() {
        let kept = connection.duplicate().map_err(|error| error.to_string()).and_then(|descriptor| {
            keeper.keep(&options.volume, descriptor.as_fd()).map_err(|error| error.to_string())
        });
        if let Err(text) = kept {
            not_kept(text);
        }
    } else {
        not_kept("this kernel cannot send requests again (Linux 6.9 can)".to_owned());
    }
    volume.send(VolumeCommand::Fuse(connection, *number));
    let made = set_up_device(&mount, options).map_err(|error| error.to_string()).and_then(|device| {
        match make_device_link(directory, &options.volume, device.path()) {
            Ok(link) => Ok(Made { device, link, number: *number }),
            Err(error) => {
                let _ = device.detach(DetachMode::WhenClosed);
                Err(error.to_string())
            }
        }
    });
    if made.is_err() {
        keeper.forget(&options.volume);
    }
    made
}

fn remove(
    made: &Made,
    name: &str,
    directory: &Path,
    volume: &VolumeHandle,
    keeper: &Keeper,
) -> Result<(), String> {
    let detached = made.device.detach(DetachMode::WhenClosed).map_err(|error| error.to_string());
    let unlinked = remove_device_link(directory, name, made.device.path()).map_err(|error| error.to_string());
    volume.send(VolumeCommand::FuseEnd);
    keeper.forget(name);
    detached.and(unlinked)
}

/// Takes away the device to which a predecessor's link points.
fn drop_left(name: &str, directory: &Path, target: &Path) -> Result<(), String> {
    let mut left = LoopDevice::find(name, None).into_iter().filter(|device| device.path() == target);
    let detached = left.try_for_each(|device| device.detach(DetachMode::WhenClosed));
    let unlinked = remove_device_link(directory, name, target).map_err(|error| error.to_string());
    detached.map_err(|error| error.to_string()).and(unlinked.map(drop))
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
