//! What leads to a boundary, and the crash there.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::PROGRAM;
use super::points::{How, Point, Role};
use crate::lab::disk::Loss;
use crate::lab::history::{BLOCK_BYTES, Floor, History};
use crate::lab::pair::LIMIT;
use crate::lab::writer::{Load, Shared, Writer, lock};
use crate::lab::{DiskKind, Pair, PairOptions, Seed, Server, wait};

/// A boundary is reached within this, or never.
const REACH_LIMIT: Duration = Duration::from_secs(40);
/// Requests before something happens.
const WARM: u64 = 60;

/// A pair, its history, and who dies.
#[derive(Debug)]
pub(super) struct Scene {
    pub(super) pair: Pair,
    pub(super) history: Shared,
    pub(super) point: Point,
    pub(super) seed: Seed,
    /// The client on alpha, while it writes.
    pub(super) load: Option<Writer>,
}

impl Scene {
    /// A mirrored pair under writes; the daemon that will die waits for its word.
    ///
    /// `lie`: after the first copy the disk of who loses its power answers flushes and does nothing.
    pub(super) fn new(point: Point, seed: u64, lie: bool) -> Result<Scene> {
        let disk = |alpha: bool| {
            if point.how == How::Power && point.role.is_alpha() == alpha {
                DiskKind::Faulty
            } else {
                DiskKind::Loop
            }
        };
        let options = PairOptions {
            volume_bytes: 16 << 20,
            disks: [disk(true), disk(false)],
            ..PairOptions::default()
        };
        let mut pair = Pair::new(options)?;
        for server in [&mut pair.alpha, &mut pair.beta] {
            server.set_program(PROGRAM);
        }
        let mut scene = Scene {
            pair,
            history: Arc::new(Mutex::new(History::new(seed, 0))),
            point,
            seed: Seed::new(seed),
            load: None,
        };
        scene.give_words()?;
        scene.pair.start_mirrored()?;
        if lie && point.how == How::Power {
            scene.victim().faulty()?.lie_about_flush(true)?;
        }
        let blocks = scene.pair.volume_bytes()? / BLOCK_BYTES as u64;
        scene.history = Arc::new(Mutex::new(History::new(seed, blocks)));
        Ok(scene)
    }

    pub(super) fn victim(&mut self) -> &mut Server {
        if self.point.role.is_alpha() { &mut self.pair.alpha } else { &mut self.pair.beta }
    }

    fn file(&mut self, name: &str) -> PathBuf {
        self.victim().directory().join(name)
    }

    fn give_words(&mut self) -> Result<()> {
        let how = match self.point.how {
            How::Kill => "kill",
            How::Power => "stop",
        };
        let (armed, marker) = (self.file("armed"), self.file("reached"));
        let (armed, marker) = (armed.display().to_string(), marker.display().to_string());
        let boundary = self.point.boundary;
        let words = ["--crash-at", boundary, "--crash-how", how, "--crash-armed-by", &armed];
        self.victim().set_daemon_words(&[&words[..], &["--crash-marker", &marker]].concat());
        Ok(())
    }

    /// From now on the boundary counts.
    fn arm(&mut self) -> Result<()> {
        Ok(std::fs::write(self.file("armed"), "")?)
    }

    /// Writes on alpha.
    fn write(&mut self) -> Result<()> {
        let all = Load::everywhere(self.seed.bits(), &*lock(&self.history)?);
        let load = Load { depth: 8, zero_once_in: 20, ..all };
        self.load = Some(self.pair.alpha.client(&self.history, load)?);
        self.warm(WARM)
    }

    fn warm(&self, requests: u64) -> Result<()> {
        self.load.as_ref().context("nobody writes")?.wait_more(requests, LIMIT)
    }

    /// The client's server died, or gave its role up: whatever the client saw.
    fn end_broken_load(&mut self) -> Result<()> {
        self.load.take().map_or(Ok(()), |load| load.finish().map(drop))
    }

    /// The client's server lived: everything was answered, without an error.
    pub(super) fn end_load(&mut self) -> Result<()> {
        if let Some(load) = self.load.take() {
            let finished = load.finish()?;
            let fine = finished.broken.is_none() && finished.errors.is_empty();
            ensure!(fine, "the client on the server that lived saw {finished:?}");
        }
        Ok(())
    }

    /// Beta dies, and alpha goes alone under writes.
    fn lonely(&mut self) -> Result<()> {
        self.pair.beta.kill()?;
        self.pair.alpha.wait("alone", LIMIT)?;
        self.warm(2 * WARM)
    }

    /// Does what leads to the boundary; comes back when the victim stands there.
    pub(super) fn lead(&mut self) -> Result<()> {
        self.write()?;
        match self.point.role {
            Role::Primary => {
                self.arm()?;
                self.pair.beta.kill()?;
            }
            Role::Secondary => {
                self.arm()?;
                self.pair.alpha.kill()?;
                self.end_broken_load()?;
                self.pair.beta.wait("joining", LIMIT)?;
                self.pair.beta.spawn_cli(&["promote", "--peer-is-down"])?;
            }
            Role::Source => {
                self.lonely()?;
                self.arm()?;
                self.pair.beta.boot(false)?;
                self.pair.beta.spawn_daemon()?;
            }
            Role::IdleSource => {
                self.lonely()?;
                self.end_load()?;
                self.pair.alpha.must(&["demote"])?;
                self.arm()?;
                self.pair.beta.boot(false)?;
                self.pair.beta.spawn_daemon()?;
            }
            Role::Target => {
                self.lonely()?;
                self.arm()?;
                self.pair.beta.boot(false)?;
                self.pair.beta.spawn_daemon()?;
            }
            Role::OldPrimary | Role::NewPrimary => {
                self.arm()?;
                self.pair.alpha.spawn_cli(&["switchover"])?;
            }
            Role::RestartedAlone => {
                self.lonely()?;
                self.restart_armed()?;
            }
            Role::RestartedPrimary => self.restart_armed()?,
            Role::RestartedSecondary => {
                self.die()?;
                self.pair.alpha.wait("alone", LIMIT)?;
                self.warm(2 * WARM)?;
                self.come_back_armed()?;
            }
        }
        self.wait_marker()
    }

    fn restart_armed(&mut self) -> Result<()> {
        self.die()?;
        self.end_broken_load()?;
        self.come_back_armed()
    }

    fn come_back_armed(&mut self) -> Result<()> {
        self.arm()?;
        self.come_back_without_daemon()?;
        self.victim().spawn_daemon()
    }

    /// The victim's machine runs again, on its cable.
    fn come_back_without_daemon(&mut self) -> Result<()> {
        let power = self.point.how == How::Power;
        if power {
            self.pair.restore(0)?;
        }
        self.victim().boot(power)
    }

    /// The victim runs again, with no boundary to stop at.
    pub(super) fn come_back(&mut self) -> Result<()> {
        self.come_back_without_daemon()?;
        self.victim().set_daemon_words(&[]);
        self.victim().start_daemon()
    }

    fn wait_marker(&mut self) -> Result<()> {
        let (marker, boundary) = (self.file("reached"), self.point.boundary);
        let promoted = self.point.role == Role::Secondary;
        let history = Arc::clone(&self.history);
        let bits = self.seed.bits();
        let server = self.victim();
        let mut client = None;
        wait::until(&format!("{} to stand at {boundary}", server.name()), REACH_LIMIT, || {
            if marker.exists() {
                return Ok(Some(()));
            }
            if let Some(ended) = server.daemon_ended()? {
                // Its last word may have come in between.
                if marker.exists() {
                    return Ok(Some(()));
                }
                bail!("the daemon ended elsewhere ({ended:?}):\n{}", server.log_tail(20));
            }
            if promoted && client.is_none() && server.nbd().exists() {
                // A request, for the boundary before the first completion.
                let load = Load { requests: Some(WARM), ..Load::everywhere(bits, &*lock(&history)?) };
                client = server.client(&history, load).ok();
            }
            // A client that begins as the daemon stops waits longer for its answer than this may take.
            Ok(marker.exists().then_some(()))
        })
        .context("the boundary was not reached")?;
        let said = std::fs::read_to_string(&marker)?;
        // The marker is made, then written.
        ensure!(said.is_empty() || said.trim() == boundary, "it stopped at {said:?} instead of {boundary}");
        Ok(())
    }

    /// The crash at the boundary: the victim killed itself, or stands still until its power is cut.
    pub(super) fn crash(&mut self) -> Result<Floor> {
        if self.point.how == How::Kill {
            let ended = self.victim().wait_daemon_end()?;
            ensure!(ended.signal == Some(9), "the daemon did not kill itself: {ended:?}");
        }
        self.die()?;
        if self.point.role.is_alpha() || self.point.role == Role::NewPrimary {
            self.end_broken_load()?;
        }
        Ok(self.floor())
    }

    /// The whole machine of the victim dies. Of a power cut its peer hears nothing.
    fn die(&mut self) -> Result<()> {
        match self.point.how {
            How::Kill => self.victim().kill(),
            How::Power => {
                self.pair.cut(0)?;
                let bits = self.seed.bits();
                let loss = if bits.is_multiple_of(3) { Loss::Drop } else { Loss::Tear { seed: bits } };
                self.victim().power_cut(loss)
            }
        }
    }

    /// What the clients may count on. Only a server that completed alone and lost its power forgets what was not
    /// flushed: else a copy that kept its memory has everything, or the record's flush came first.
    fn floor(&self) -> Floor {
        match (self.point.how, self.point.role) {
            (How::Power, Role::Source | Role::RestartedAlone) => Floor::Flushed,
            (
                How::Kill | How::Power,
                Role::Primary
                | Role::Secondary
                | Role::IdleSource
                | Role::Target
                | Role::OldPrimary
                | Role::NewPrimary
                | Role::RestartedPrimary
                | Role::RestartedSecondary,
            )
            | (How::Kill, Role::Source | Role::RestartedAlone) => Floor::Acknowledged,
        }
    }
}
