//! The status page, from the server machine and the volumes' snapshots.

use std::sync::atomic::Ordering;
use std::time::Duration;

use duplex_core::format::record::CopyState as Copy;
use duplex_core::ids::VolumeIndex;
use duplex_core::message::LiveState;
use duplex_core::time::Instant;

use super::run::Daemon;
use crate::config::Arbiter;
use crate::control::status::{
    CopyState, Frozen, LinkPath, PathState, Peer, RangeStatus, ResyncRole, ResyncStatus, Role,
    STATUS_VERSION, SessionRefusal, State, Status, Time, VolumeStatus,
};
use crate::volume::Snapshot;

/// A resync's rate, measured between two looks.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Rate {
    at: Instant,
    sent_bytes: u64,
    bytes_per_s: u64,
}

const RATE_EVERY: Duration = Duration::from_millis(500);

impl Daemon {
    /// The page as it is now.
    pub(super) fn page(&mut self) -> Status {
        let now = crate::clock::now();
        let volumes = (0..self.config.volumes.len()).map(|at| self.volume_page(at, now)).collect();
        let server = &self.server;
        // Whoever waits for a primary wants one whose clients are let in.
        let serves_soon = server.role_word() == "primary" && !self.all_exposed();
        let session = server.session_view();
        let heard = session.as_ref().map(|s| s.last_heard).or(self.last_heard);
        let since = server.frozen_since();
        Status {
            version: STATUS_VERSION,
            pair: self.config.pair.clone(),
            server: self.config.servers.of(self.config.me).name.clone(),
            state: if serves_soon && server.state_word() == "alone" {
                State::Joining
            } else {
                state(server.state_word())
            },
            role: if serves_soon { Role::Secondary } else { role(server.role_word()) },
            epoch: server.record().epoch_seen.clone(),
            reason: Some(self.reason(now)).filter(|r| !r.is_empty()),
            peer: Peer {
                server: self.config.servers.of(self.config.me.other()).name.clone(),
                state: session.as_ref().and_then(|s| s.peer_live).map(peer_state),
                role: session.as_ref().and_then(|s| s.peer_live).map(peer_role),
                heard_ms: heard.map(|at| u64::try_from(now.since(at).as_millis()).unwrap_or(u64::MAX)),
            },
            link: self.link_page(),
            lan: Vec::new(),
            witness: None,
            policy: Arbiter::POLICY.to_owned(),
            frozen: since.map(|at| Frozen { since: wall(now, at), reason: server.reason().to_owned() }),
            refusal: self.refusal_page(),
            volumes,
            memory: Vec::new(),
        }
    }

    fn reason(&self, now: Instant) -> String {
        let server = &self.server;
        if let (None, Some(refused)) = (server.session_view(), &self.link_refusal) {
            let fix = super::input::link_remedy(&refused.code);
            return format!("{}; the link refuses the peer ({}): {fix}", server.reason(), refused.code);
        }
        if server.session_view().is_none() && server.role_word() == "secondary" {
            let heard_s = self.last_heard.map(|at| now.since(at).as_secs());
            let heard = heard_s.map_or("never".to_owned(), |s| format!("{s} s ago"));
            return format!("{}; peer last heard {heard}; waits for promote", server.reason());
        }
        server.reason().to_owned()
    }

    fn refusal_page(&self) -> Option<SessionRefusal> {
        let unusable = (0..self.config.volumes.len()).find_map(|at| {
            let view = self.server.volume(index(at))?;
            view.unusable.map(|(code, text)| (code.to_owned(), text.to_owned()))
        });
        if let Some((code, text)) = unusable {
            return Some(SessionRefusal { code, rule: None, mine: Some(text), theirs: None });
        }
        if let Some((code, rule, mine, theirs)) = self.server.session_view().and_then(|s| s.refusal) {
            let some = |text: String| Some(text).filter(|t| !t.is_empty());
            return Some(SessionRefusal { code, rule: some(rule), mine: some(mine), theirs: some(theirs) });
        }
        self.link_refusal.clone()
    }

    fn link_page(&self) -> Vec<LinkPath> {
        let mine = &self.config.servers.of(self.config.me).link;
        let theirs = &self.config.servers.of(self.config.me.other()).link;
        let counters = self.link.path_counters();
        let paths = mine.iter().zip(theirs).zip(counters).zip(0u16..);
        paths
            .map(|(((local, remote), counters), path)| LinkPath {
                path,
                state: match (self.link_wanted, counters.up.load(Ordering::Relaxed)) {
                    (false, _) => PathState::Disconnected,
                    (true, true) => PathState::Up,
                    (true, false) => PathState::Connecting,
                },
                local: local.to_string(),
                remote: remote.to_string(),
                rtt_us: Some(counters.rtt_us.load(Ordering::Relaxed)).filter(|us| *us > 0),
                sent_bytes: counters.data_bytes_sent.load(Ordering::Relaxed),
                received_bytes: counters.data_bytes_received.load(Ordering::Relaxed),
            })
            .collect()
    }

    fn volume_page(&mut self, at: usize, now: Instant) -> VolumeStatus {
        let snapshot = self.volumes.get(at).and_then(Option::as_ref).map(|v| v.shared.snapshot());
        let snapshot = snapshot.unwrap_or_default();
        let resync = self.resync_page(at, &snapshot, now);
        let volume = &self.config.volumes[at];
        let view = self.server.volume(index(at));
        let copy = snapshot.copy.as_ref();
        let known = copy.filter(|c| c.state != Copy::Blank);
        VolumeStatus {
            name: volume.name.clone(),
            size_bytes: known.map(|c| c.size_bytes),
            device: self.devices.get(at).and_then(|d| d.link()),
            nbd: known.map(|_| self.nbd_address(at)),
            copy: snapshot.state.map_or(CopyState::Unknown, copy_state),
            peer_copy: view.and_then(|v| v.peer_copy).map_or(CopyState::Unknown, copy_state),
            generation: known.map(|c| c.generation).filter(|g| !g.is_none()),
            dirty_blocks: snapshot.dirty_blocks,
            block_bytes: copy.map_or(volume.block_bytes, |c| c.block_bytes),
            resync,
        }
    }

    fn resync_page(&mut self, at: usize, snapshot: &Snapshot, now: Instant) -> Option<ResyncStatus> {
        let Some(progress) = snapshot.progress else {
            let syncing = self.server.live() == LiveState::Secondary && self.server.state_word() == "syncing";
            return syncing.then(|| ResyncStatus {
                role: ResyncRole::Target,
                phase: "disk".to_owned(),
                total_bytes: 0,
                left_bytes: 0,
                sent_bytes: 0,
                rate_bytes_per_s: 0,
                eta_s: None,
                pace: "source decides".to_owned(),
                unreadable_blocks: 0,
                unreadable: Vec::new(),
            });
        };
        let rate = self.rates.get_mut(at)?;
        let since = now.since(rate.at);
        if progress.sent_bytes < rate.sent_bytes || since > 4 * RATE_EVERY {
            *rate = Rate { at: now, sent_bytes: progress.sent_bytes, bytes_per_s: 0 };
        } else if since >= RATE_EVERY {
            let bytes = progress.sent_bytes - rate.sent_bytes;
            let per_s = u128::from(bytes) * 1000 / since.as_millis().max(1);
            let bytes_per_s = u64::try_from(per_s).unwrap_or(u64::MAX);
            *rate = Rate { at: now, sent_bytes: progress.sent_bytes, bytes_per_s };
        }
        let (unreadable_blocks, ref ranges) = snapshot.unreadable;
        let block_bytes = snapshot.copy.as_ref().map_or(0, |c| u64::from(c.block_bytes));
        let only_unreadable = unreadable_blocks > 0 && progress.left_bytes <= unreadable_blocks * block_bytes;
        let pace = match (progress.paused, only_unreadable, snapshot.requests) {
            (true, _, _) => "paused",
            (false, true, _) => "waits for unreadable blocks",
            (false, false, 0) => "idle",
            (false, false, _) => "yields to clients",
        };
        Some(ResyncStatus {
            role: ResyncRole::Source,
            phase: "disk".to_owned(),
            total_bytes: progress.total_bytes,
            left_bytes: progress.left_bytes,
            sent_bytes: progress.sent_bytes,
            rate_bytes_per_s: rate.bytes_per_s,
            eta_s: (rate.bytes_per_s > 0).then(|| progress.left_bytes.div_ceil(rate.bytes_per_s)),
            pace: pace.to_owned(),
            unreadable_blocks,
            unreadable: ranges
                .iter()
                .map(|r| RangeStatus { offset_bytes: r.offset_bytes, length_bytes: r.length_bytes })
                .collect(),
        })
    }
}

pub(super) fn index(at: usize) -> VolumeIndex {
    VolumeIndex(u16::try_from(at).unwrap_or(u16::MAX))
}

fn state(word: &str) -> State {
    State::ALL.into_iter().find(|s| s.word() == word).unwrap_or(State::Joining)
}

fn role(word: &str) -> Role {
    Role::ALL.into_iter().find(|r| r.word() == word).unwrap_or(Role::None)
}

const fn peer_state(live: LiveState) -> State {
    match live {
        LiveState::Loading | LiveState::Joining => State::Joining,
        LiveState::Secondary | LiveState::PrimaryMirrored | LiveState::Frozen => State::Mirrored,
        LiveState::Granted | LiveState::Alone => State::Alone,
        LiveState::Syncing | LiveState::SyncTail | LiveState::Returning => State::Syncing,
        LiveState::Stopping => State::Down,
    }
}

/// The server that says this serves.
pub(super) fn is_primary(live: LiveState) -> bool {
    peer_role(live) == Role::Primary
}

const fn peer_role(live: LiveState) -> Role {
    match live {
        LiveState::Loading | LiveState::Joining => Role::None,
        LiveState::Secondary | LiveState::Stopping => Role::Secondary,
        LiveState::PrimaryMirrored
        | LiveState::Frozen
        | LiveState::Granted
        | LiveState::Alone
        | LiveState::Syncing
        | LiveState::SyncTail
        | LiveState::Returning => Role::Primary,
    }
}

const fn copy_state(state: Copy) -> CopyState {
    match state {
        Copy::Blank => CopyState::Blank,
        Copy::UpToDate => CopyState::UpToDate,
        Copy::Outdated => CopyState::Outdated,
        Copy::Inconsistent { .. } => CopyState::Inconsistent,
        Copy::Failed => CopyState::Failed,
    }
}

/// A moment of the boot clock on the wall clock, for people.
fn wall(now: Instant, at: Instant) -> Time {
    let ago = jiff::SignedDuration::try_from(now.since(at)).unwrap_or_default();
    let time = Time::now().0.checked_sub(ago).unwrap_or_else(|_| Time::now().0);
    Time(jiff::Timestamp::from_millisecond(time.as_millisecond()).unwrap_or(time))
}
