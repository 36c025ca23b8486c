//! Start, main loop, signals, end.

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::Duration;

use duplex_core::boundary::Boundary;
use duplex_core::ids::{Epoch, SessionId, VolumeIndex};
use duplex_core::pair::Server;
use duplex_core::pair::api::{Input, Operator, OperatorToken, ServerConfig};
use duplex_core::time::Instant;
use duplex_frontend::holder::systemd;
use duplex_link::{Encryption, Link, LinkConfig, LinkEvent, LinkHandle, PathConfig, Secret, Secrets, Timers};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot, watch};

use super::attach::Attaching;
use super::devices::{Device, DeviceEvent};
use super::keeper::Keeper;
use super::page::Rate;
use super::{Options, identity};
use crate::config::environment::{self, Purpose};
use crate::config::{Config, Problems, RunDir, Severity, secret};
use crate::control::api::Answer;
use crate::control::server::{Backend, Call, bind, serve};
use crate::control::status::{SessionRefusal, Status};
use crate::events::EventLog;
use crate::failure::Failure;
use crate::volume::{Settings, VolumeCommand, VolumeEvent, VolumeHandle, place, spawn};
use crate::{clock, crash_at};

/// How long a killed predecessor's operations may hold a backing (see the store's text).
pub(super) const CLAIM_WAIT: Duration = Duration::from_secs(30);
/// Events of volumes, commands of operators that may wait for the main loop.
const QUEUE: usize = 4096;
/// The status page is renewed at least this often.
const PAGE_EVERY: Duration = Duration::from_millis(100);

/// What a start may go on with.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Prepared {
    /// The configuration.
    pub config: Config,
    /// What is worth saying and keeps nothing from starting.
    pub warnings: Problems,
}

/// Reads the configuration and looks at this machine.
///
/// # Errors
/// Every problem that keeps the daemon from starting, warnings after them.
pub fn prepare(options: &Options) -> Result<Prepared, Failure> {
    let config = Config::load(&options.config, options.server.as_deref())?;
    let found = environment::check(&config, &options.run_dir, Purpose::Start);
    if found.has_errors() {
        return Err(found.into());
    }
    debug_assert!(found.0.iter().all(|problem| problem.severity == Severity::Warning));
    Ok(Prepared { config, warnings: found })
}

/// Everything the main loop holds.
pub(super) struct Daemon {
    pub(super) config: Config,
    pub(super) run_dir: RunDir,
    pub(super) server: Server,
    pub(super) volumes: Vec<Option<VolumeHandle>>,
    pub(super) threads: Vec<JoinHandle<()>>,
    pub(super) link: LinkHandle,
    pub(super) link_wanted: bool,
    pub(super) link_refusal: Option<SessionRefusal>,
    pub(super) boot_id: duplex_core::ids::BootId,
    /// Threads that were told to end while the daemon goes on.
    pub(super) expected_ends: usize,
    /// The blocks of a split brain's victim are being saved, which began in this epoch.
    pub(super) saving: Option<Epoch>,
    /// The `resolve` that is not answered yet.
    pub(super) resolving: Option<OperatorToken>,
    pub(super) attaching: Option<Attaching>,
    /// How many there were.
    pub(super) attaches: u64,
    pub(super) session: Option<SessionId>,
    pub(super) last_heard: Option<Instant>,
    pub(super) events: EventLog,
    pub(super) answers: BTreeMap<OperatorToken, oneshot::Sender<Answer>>,
    pub(super) next_token: u64,
    pub(super) devices: Vec<Device>,
    pub(super) device_events: mpsc::Sender<DeviceEvent>,
    pub(super) rates: Vec<Rate>,
    pub(super) status: watch::Sender<Arc<Status>>,
    pub(super) volume_events: mpsc::Sender<(VolumeIndex, VolumeEvent)>,
    /// Inputs that came of carrying actions out.
    pub(super) inputs: VecDeque<Input>,
    pub(super) exiting: bool,
    /// A signal ended this process: the holder keeps the devices for a successor. `down` takes them away.
    pub(super) leaving_devices: bool,
    pub(super) keeper: Arc<Keeper>,
    /// Numbers the FUSE connections of this process.
    pub(super) next_connection: u64,
}

struct Sources {
    link: mpsc::Receiver<LinkEvent>,
    volumes: mpsc::Receiver<(VolumeIndex, VolumeEvent)>,
    commands: mpsc::Receiver<Call>,
    devices: mpsc::Receiver<DeviceEvent>,
}

/// Runs this server until it is told to end.
///
/// # Errors
/// Why it could not start, or why it ended in disorder.
pub fn run(options: &Options) -> Result<(), Failure> {
    // SAFETY: the process has one thread yet, and nobody else takes what systemd passed.
    let stored = unsafe { systemd::take_stored() };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| Failure::failed(format!("cannot start the runtime: {error}")))?;
    let result = runtime.block_on(run_here(options, stored));
    runtime.shutdown_timeout(Duration::from_secs(1));
    result
}

async fn run_here(options: &Options, stored: Vec<(String, OwnedFd)>) -> Result<(), Failure> {
    let Prepared { config, warnings } = prepare(options)?;
    let run_dir = options.run_dir.clone();
    for problem in &warnings.0 {
        tracing::warn!("{problem}");
    }
    let control = bind(&run_dir).map_err(|error| Failure::failed(error.to_string()))?;
    let me = config.servers.of(config.me).clone();
    let state_dir = config.state_dir.of(config.me).clone();
    let events = EventLog::open(&state_dir, &me.name).map_err(|error| Failure::failed(error.to_string()))?;
    let boot_id = identity::boot_id().map_err(Failure::failed)?;
    let incarnation = identity::incarnation();
    let (volume_events, volumes_in) = mpsc::channel(QUEUE);
    let (device_events, devices_in) = mpsc::channel(QUEUE);
    let (volumes, threads) = open_volumes(&config, &run_dir, boot_id, &volume_events).await?;
    let (link, link_in) = start_link(&config, incarnation, boot_id)?;
    let server = Server::new(server_config(&config, incarnation, boot_id));
    let (commands, commands_in) = mpsc::channel(QUEUE);
    let count = config.volumes.len();
    let peer_name = config.servers.of(config.me.other()).name.clone();
    let names: Vec<String> = config.volumes.iter().map(|v| v.name.clone()).collect();
    let (status, status_in) = watch::channel(Arc::new(Status::empty(&config.pair, &me.name, &peer_name)));
    let mut daemon = Daemon {
        config,
        run_dir,
        server,
        volumes,
        threads,
        link,
        link_wanted: true,
        link_refusal: None,
        boot_id,
        expected_ends: 0,
        saving: None,
        resolving: None,
        attaching: None,
        attaches: 0,
        session: None,
        last_heard: None,
        events: events.clone(),
        answers: BTreeMap::new(),
        next_token: 1,
        devices: names.iter().map(|name| Device::new(name)).collect(),
        device_events: device_events.clone(),
        rates: vec![Rate::default(); count],
        status,
        volume_events,
        inputs: VecDeque::new(),
        exiting: false,
        leaving_devices: false,
        keeper: Arc::new(Keeper::new(&options.run_dir, stored, device_events)),
        next_connection: 0,
    };
    daemon.publish();
    let refused_events = events.clone();
    let refused_server = me.name.clone();
    let backend = Backend {
        commands,
        status: status_in,
        events,
        on_refused: Arc::new(move |caller| {
            let event = super::output::plain_event(
                &refused_server,
                "refused",
                format!("control socket: uid {} is refused", caller.uid),
                &format!("refused({})", caller.uid),
            );
            if let Err(error) = refused_events.append(event) {
                tracing::error!("{error}");
            }
        }),
    };
    let (stop_control, stop_seen) = watch::channel(false);
    let control = tokio::spawn(serve(control, backend, stop_seen));
    let mut sources =
        Sources { link: link_in, volumes: volumes_in, commands: commands_in, devices: devices_in };
    daemon.note("started", format!("server {} started", me.name), "start");
    daemon.adopt_devices();
    let result = daemon.main_loop(&mut sources).await;
    if result.is_err() {
        // Somebody starts it again, and users of the devices see a pause.
        daemon.leave_devices();
    }
    daemon.end(&mut sources.devices).await;
    let _ = stop_control.send(true);
    let _ = control.await;
    result
}

fn server_config(
    config: &Config,
    incarnation: duplex_core::ids::Incarnation,
    boot_id: duplex_core::ids::BootId,
) -> ServerConfig {
    ServerConfig {
        name: config.servers.of(config.me).name.clone(),
        peer: config.servers.of(config.me.other()).name.clone(),
        pair_name: config.pair.clone(),
        incarnation,
        boot_id,
        volumes: config.volumes.iter().map(|v| v.name.clone()).collect(),
        config: config.canonical(),
        heartbeat: config.arbiter.heartbeat,
        freeze: config.arbiter.freeze,
        silent: config.arbiter.silent,
        id_seed: identity::seed(),
    }
}

type Opened = (Vec<Option<VolumeHandle>>, Vec<JoinHandle<()>>);

/// Claims every backing (side by side: a killed predecessor's claims end at about the same time) and starts
/// the threads.
async fn open_volumes(
    config: &Config,
    run_dir: &RunDir,
    boot_id: duplex_core::ids::BootId,
    events: &mpsc::Sender<(VolumeIndex, VolumeEvent)>,
) -> Result<Opened, Failure> {
    let mut opening = Vec::new();
    for volume in &config.volumes {
        let data = volume.backing.of(config.me).clone();
        let metadata = volume.metadata.of(config.me).path().map(std::path::Path::to_owned);
        opening.push(tokio::task::spawn_blocking(move || {
            crash_at::reached(|| Some(Boundary::G11BeforeClaim));
            let placed = place::open(data, metadata, CLAIM_WAIT);
            crash_at::reached(|| Some(Boundary::G11Claimed));
            placed
        }));
    }
    let mut handles = Vec::new();
    let mut threads = Vec::new();
    for (at, task) in opening.into_iter().enumerate() {
        let name = config.volumes[at].name.clone();
        let failed = |text: String| Failure::failed(format!("volume {name}: {text}"));
        let placed = task
            .await
            .map_err(|error| failed(error.to_string()))?
            .map_err(|error| failed(error.to_string()))?;
        let settings = Settings {
            name: name.clone(),
            index: super::page::index(at),
            boot_id,
            stall: config.arbiter.stall,
            nbd: super::devices::nbd_settings(config, run_dir, at),
            events: events.clone(),
        };
        let (handle, thread) = spawn(settings, placed).map_err(|error| failed(error.to_string()))?;
        super::input::set_pace(&handle, config);
        handles.push(Some(handle));
        threads.push(thread);
    }
    Ok((handles, threads))
}

fn start_link(
    config: &Config,
    incarnation: duplex_core::ids::Incarnation,
    boot_id: duplex_core::ids::BootId,
) -> Result<(LinkHandle, mpsc::Receiver<LinkEvent>), Failure> {
    let read = |path: &std::path::Path| {
        let bytes = secret::read(path).map_err(|error| Failure::failed(error.to_string()))?;
        Secret::new(&bytes).map_err(|error| Failure::failed(format!("{}: {error}", path.display())))
    };
    let current = read(&config.security.secret)?;
    let other = config.security.secret_old.as_deref().map(read).transpose()?;
    let me = config.servers.of(config.me);
    let peer = config.servers.of(config.me.other());
    let link = LinkConfig {
        server: me.name.clone(),
        peer: peer.name.clone(),
        pair_name: config.pair.clone(),
        paths: me.link.iter().zip(&peer.link).map(|(mine, theirs)| PathConfig::new(*mine, *theirs)).collect(),
        secrets: Secrets { current, other },
        encryption: if config.security.encryption { Encryption::Tls } else { Encryption::Off },
        incarnation,
        boot_id,
        volumes: config.volumes.iter().map(|v| v.name.clone()).collect(),
        frame_max_bytes: LinkConfig::frame_limit_bytes(),
        timers: Timers::default(),
    };
    Link::start(link).map_err(|error| Failure::failed(error.to_string()))
}

impl Daemon {
    async fn main_loop(&mut self, sources: &mut Sources) -> Result<(), Failure> {
        let failed = |error: std::io::Error| Failure::failed(format!("cannot watch for signals: {error}"));
        let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
        let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
        let mut page = tokio::time::interval(PAGE_EVERY);
        page.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
        super::output::tell_systemd(&[sd_notify::NotifyState::Ready]);
        while !self.exiting {
            let wait = self.wait();
            tokio::select! {
                biased;
                event = sources.link.recv() => match event {
                    Some(event) => self.on_link(event),
                    None => return Err(Failure::failed("the mirror link ended by itself".to_owned())),
                },
                Some((index, event)) = sources.volumes.recv() => self.on_volume(index, event)?,
                Some(event) = sources.devices.recv() => self.on_device(event),
                Some(call) = sources.commands.recv() => self.on_call(call),
                _ = terminate.recv() => self.on_signal("SIGTERM"),
                _ = interrupt.recv() => self.on_signal("SIGINT"),
                () = tokio::time::sleep(wait) => self.feed(Input::Time),
                _ = page.tick() => self.on_tick(),
            }
            self.after_input();
        }
        Ok(())
    }

    fn wait(&self) -> Duration {
        let now = clock::now();
        let until = self.server.next_deadline().unwrap_or(Instant::NEVER);
        until.since(now).min(Duration::from_secs(1))
    }

    fn on_signal(&mut self, name: &str) {
        tracing::info!("{name}: stopping");
        self.leave_devices();
        let token = self.token();
        self.feed(Input::Operator(token, Operator::Stop));
    }

    fn on_tick(&mut self) {
        let now = clock::now();
        let turn = self.volumes.iter().flatten().all(|volume| {
            let turned = Instant(volume.shared.turned_ns.load(Ordering::Relaxed));
            now.since(turned) < self.config.arbiter.freeze
        });
        self.server.set_volumes_turn(turn);
        self.settle_adopted();
        super::output::tell_systemd(&[sd_notify::NotifyState::Watchdog]);
    }

    /// What follows from every input: actions, the lease, the page.
    fn after_input(&mut self) {
        self.carry_out();
        self.hand_lease_on();
        if let Some(at) = super::output::heard(&self.server) {
            self.last_heard = Some(at);
        }
        self.publish();
    }

    fn hand_lease_on(&self) {
        let until = self.server.lease_until().0;
        for volume in self.volumes.iter().flatten() {
            let before = volume.shared.lease_until_ns.swap(until, Ordering::AcqRel);
            if until > before && volume.shared.wants_lease.load(Ordering::Acquire) {
                volume.wake();
            }
        }
    }

    pub(super) fn publish(&mut self) {
        let page = self.page();
        self.status.send_if_modified(|shown| {
            let changed = **shown != page;
            if changed {
                *shown = Arc::new(page);
            }
            changed
        });
    }

    pub(super) fn token(&mut self) -> OperatorToken {
        self.next_token += 1;
        OperatorToken(self.next_token)
    }

    /// Ends the threads; what they hold is free when this returns.
    async fn end(&mut self, devices: &mut mpsc::Receiver<DeviceEvent>) {
        super::output::tell_systemd(&[sd_notify::NotifyState::Stopping]);
        self.end_devices(devices).await;
        for volume in self.volumes.iter().flatten() {
            volume.send(VolumeCommand::Stop);
        }
        for device in &mut self.devices {
            device.end_now();
        }
        // An `attach` that still waits is told that the daemon stops.
        self.attaching = None;
        let threads = std::mem::take(&mut self.threads);
        let joined = tokio::task::spawn_blocking(move || {
            for thread in threads {
                if thread.join().is_err() {
                    tracing::error!("a volume's thread panicked");
                }
            }
        });
        let _ = joined.await;
        // Whatever the core still had to say to operators is said: dropping the rest answers "stopping".
        self.answers.clear();
        if let Err(error) = self.events.sync() {
            tracing::error!("{error}");
        }
    }
}
