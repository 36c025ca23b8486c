//! The frontends of one volume: the NBD server, and the FUSE device where there is one.

use std::path::PathBuf;
use std::time::Duration;

use duplex_core::ids::RequestId;
use duplex_core::request::RequestError;
use duplex_core::time::Instant;
use duplex_frontend::fuse::{Connection, FuseConfig, FuseDevice, FuseEnd, Service};
use duplex_frontend::nbd::{ListenAddress, NbdConfig, NbdServer, Network, ServerState};
use duplex_frontend::{FrontendEvent, Geometry, request_owner};
use duplex_ring::{Arena, Completion, Owner, Ring};

/// Owner number of the NBD server in the volume's ring.
pub(super) const NBD: Owner = Owner(2);
/// Owner numbers of the FUSE devices, one after the other: the last completions of one that ends never meet the next.
const FUSE_FIRST: u16 = 3;
const FUSE_OWNERS: u16 = 8;

/// How clients reach a volume.
#[derive(Clone, Debug)]
pub struct NbdSettings {
    /// The export's name.
    pub export: String,
    /// The empty name means it, too.
    pub is_default: bool,
    /// Unix socket or TCP address.
    pub listen: ListenAddress,
    /// Networks that may come over TCP.
    pub allowed: Vec<Network>,
    /// What a client of a secondary is told.
    pub refusal: String,
}

/// A FUSE device in use.
struct Fuse {
    owner: Owner,
    number: u64,
    device: FuseDevice,
    /// Its end was told.
    end_told: bool,
}

/// Both frontends.
#[derive(Default)]
pub(super) struct Frontends {
    nbd: Option<NbdServer>,
    fuse: Option<Fuse>,
    /// A connection that came before the volume had a size.
    waiting: Option<(Connection, u64)>,
    fuses_made: u16,
    serving: bool,
    /// A successor takes the FUSE connection: what is not answered is left to it.
    holding: bool,
    /// FUSE devices that are being let go of.
    ending: Vec<Fuse>,
    volume: String,
    geometry: Option<Geometry>,
}

impl Frontends {
    pub(super) fn new(volume: &str) -> Self {
        Self { volume: volume.to_owned(), ..Self::default() }
    }

    pub(super) const fn serving(&self) -> bool {
        self.serving
    }

    pub(super) fn clients(&self) -> usize {
        self.nbd.as_ref().map_or(0, NbdServer::connections)
    }

    /// The volume has a size: clients may come. Errors of listeners are told, not fatal.
    pub(super) fn open(
        &mut self,
        settings: &NbdSettings,
        size_bytes: u64,
        sector_bytes: u32,
        ring: &mut Ring,
        arena: &mut Arena,
    ) -> Result<(), String> {
        let geometry = Geometry { size_bytes, sector_bytes, read_only: false };
        if self.geometry == Some(geometry) || size_bytes == 0 {
            return Ok(());
        }
        self.geometry = Some(geometry);
        let mut config = NbdConfig::new(settings.export.clone(), geometry);
        config.is_default = settings.is_default;
        config.listeners = vec![settings.listen.clone()];
        config.allowed.clone_from(&settings.allowed);
        config.direct_send = false;
        let mut server = NbdServer::new(NBD, config);
        let refusing = ServerState::Refusing { text: settings.refusal.clone() };
        let set = server.set_state(refusing, ring);
        let started = server.start(ring, arena);
        self.nbd = Some(server);
        set.and(started).map_err(|error| format!("volume {}: {error}", self.volume))
    }

    /// A connection to serve once the volume has a size.
    pub(super) fn take_fuse(&mut self, connection: Connection, number: u64) {
        self.waiting = Some((connection, number));
    }

    /// Begins to serve the connection that waits, if there is one and the volume has a size.
    pub(super) fn begin_fuse(&mut self, ring: &mut Ring, arena: &mut Arena) {
        let Some(geometry) = self.geometry else {
            return;
        };
        let Some((connection, number)) = self.waiting.take() else {
            return;
        };
        self.detach_fuse(ring, arena);
        let config = FuseConfig {
            volume: self.volume.clone(),
            size_bytes: geometry.size_bytes,
            sector_bytes: geometry.sector_bytes,
        };
        let owner = Owner(FUSE_FIRST + self.fuses_made % FUSE_OWNERS);
        self.fuses_made = self.fuses_made.wrapping_add(1);
        let resumed = connection.is_resumed();
        let mut device = FuseDevice::new(owner, config, connection);
        device.start(ring, arena);
        if !resumed && !self.serving {
            // Nobody waits for it; whoever sets its loop device up must not wait either.
            device.set_service(Service::Refusing, arena, &mut Vec::new());
        }
        self.fuse = Some(Fuse { owner, number, device, end_told: false });
    }

    pub(super) fn detach_fuse(&mut self, ring: &mut Ring, arena: &mut Arena) {
        self.waiting = None;
        if let Some(mut fuse) = self.fuse.take() {
            fuse.device.close(ring, arena);
            self.ending.push(fuse);
        }
    }

    /// Requests wait: for this volume to serve, or for a successor of this process.
    pub(super) fn hold_fuse(&mut self, arena: &mut Arena, out: &mut Vec<FrontendEvent>) {
        self.holding = true;
        if let Some(fuse) = self.fuse.as_mut() {
            fuse.device.set_service(Service::Held, arena, out);
        }
    }

    /// Requests fail, if the volume does not serve.
    pub(super) fn refuse_fuse(&mut self, arena: &mut Arena, out: &mut Vec<FrontendEvent>) {
        if !self.serving
            && !self.holding
            && let Some(fuse) = self.fuse.as_mut()
        {
            fuse.device.set_service(Service::Refusing, arena, out);
        }
    }

    /// Once: why the FUSE device ended by itself.
    pub(super) fn fuse_ended(&mut self) -> Option<(u64, FuseEnd)> {
        let fuse = self.fuse.as_mut().filter(|fuse| !fuse.end_told)?;
        let end = fuse.device.end()?;
        fuse.end_told = true;
        Some((fuse.number, end))
    }

    fn fuse_of(&mut self, owner: Owner) -> Option<&mut FuseDevice> {
        let fuses = self.fuse.iter_mut().chain(&mut self.ending);
        fuses.filter(|fuse| fuse.owner == owner).map(|fuse| &mut fuse.device).next()
    }

    /// Serve clients, or refuse them.
    pub(super) fn expose(
        &mut self,
        serving: bool,
        refusal: &str,
        ring: &mut Ring,
        arena: &mut Arena,
        out: &mut Vec<FrontendEvent>,
    ) -> Result<(), String> {
        self.serving = serving;
        if !self.holding
            && let Some(fuse) = self.fuse.as_mut()
        {
            let service = if serving { Service::Serving } else { Service::Refusing };
            fuse.device.set_service(service, arena, out);
        }
        let Some(server) = self.nbd.as_mut() else {
            return Ok(());
        };
        let state =
            if serving { ServerState::Serving } else { ServerState::Refusing { text: refusal.to_owned() } };
        server.set_state(state, ring).map_err(|error| format!("volume {}: {error}", self.volume))
    }

    /// A FUSE device that came while the volume served already.
    pub(super) fn serve_fuse(&mut self, arena: &mut Arena, out: &mut Vec<FrontendEvent>) {
        if self.serving
            && !self.holding
            && let Some(fuse) = self.fuse.as_mut()
            && fuse.device.service() != Service::Serving
        {
            fuse.device.set_service(Service::Serving, arena, out);
        }
    }

    pub(super) fn on_completion(
        &mut self,
        completion: Completion,
        ring: &mut Ring,
        arena: &mut Arena,
        out: &mut Vec<FrontendEvent>,
    ) {
        if completion.token.owner == NBD {
            if let Some(server) = self.nbd.as_mut() {
                server.on_completion(completion, ring, arena, out);
            }
        } else if let Some(device) = self.fuse_of(completion.token.owner) {
            device.on_completion(completion, ring, arena, out);
        }
    }

    pub(super) fn complete(
        &mut self,
        id: RequestId,
        result: Result<(), RequestError>,
        ring: &mut Ring,
        arena: &mut Arena,
        out: &mut Vec<FrontendEvent>,
    ) {
        if request_owner(id) == NBD.0 {
            if let Some(server) = self.nbd.as_mut() {
                server.complete(id, result, ring, arena);
            }
        } else if self.holding && result == Err(RequestError::NotServing) {
            // Not answered: the successor gets the request again.
        } else if let Some(device) = self.fuse_of(Owner(request_owner(id))) {
            device.complete(id, result, arena, out);
        }
    }

    pub(super) fn flush(&mut self, ring: &mut Ring, arena: &mut Arena) {
        if let Some(server) = self.nbd.as_mut() {
            server.flush(ring, arena);
        }
        for fuse in self.fuse.iter_mut().chain(&mut self.ending) {
            fuse.device.flush(ring, arena);
        }
        self.ending.retain(|fuse| !fuse.device.is_idle());
    }

    pub(super) fn deadline(&self) -> Option<Instant> {
        self.nbd.as_ref().and_then(NbdServer::deadline)
    }

    pub(super) fn on_time(&mut self, now: Instant, ring: &mut Ring) {
        if let Some(server) = self.nbd.as_mut()
            && server.deadline().is_some_and(|at| at <= now)
        {
            server.on_time(now, ring);
        }
    }

    pub(super) fn close(&mut self, ring: &mut Ring, arena: &mut Arena) {
        if let Some(server) = self.nbd.as_mut() {
            server.close(ring);
        }
        self.detach_fuse(ring, arena);
    }

    pub(super) fn is_idle(&self) -> bool {
        self.nbd.as_ref().is_none_or(NbdServer::is_idle)
            && self.ending.iter().all(|fuse| fuse.device.is_idle())
    }
}

impl NbdSettings {
    /// A Unix socket at `path`, mode 0660, with the group where one is given.
    pub fn unix(export: &str, path: PathBuf, group: Option<u32>, refusal: String) -> Self {
        Self {
            export: export.to_owned(),
            is_default: false,
            listen: ListenAddress::Unix { path, group },
            allowed: Network::LOOPBACK.to_vec(),
            refusal,
        }
    }
}

/// A stopping thread waits this long for its clients' last answers.
pub(super) const CLOSE_TIME: Duration = Duration::from_secs(3);
