//! The story, step by step. A step that does not hold ends it.

use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use duplex_node::control::status::{CopyState, Role, State, Status};

use super::config::{self, SERVERS, VOLUME};
use super::files::{self, Known};
use super::interrupt;
use super::network::{self, Network};
use super::run::{self, Work};
use super::say::{Row, Say};
use super::scene;
use super::server::{Server, dirty_bytes, sent_bytes, volume};
use crate::cli::Common;
use crate::progress::{Bar, Pace};
use crate::render::bytes;

const ALPHA: usize = 0;
const BETA: usize = 1;
/// For a step that takes seconds.
const SHORT: Duration = Duration::from_secs(60);
/// For a step that moves data.
const LONG: Duration = Duration::from_secs(600);
/// The activity log empties after a second without requests.
const REST: Duration = Duration::from_millis(2500);
const FILE_BYTES: u64 = 1 << 20;
/// Files that must be acknowledged before the primary's host dies while writing more.
const FILES_BEFORE_CRASH: usize = 8;

/// Everything on the stage.
pub(crate) struct Story<'a> {
    pub(crate) say: &'a mut Say,
    common: &'a Common,
    pub(crate) directory: PathBuf,
    pub(crate) servers: [Server; 2],
    disks: [PathBuf; 2],
    size_bytes: u64,
    files: Vec<Known>,
}

impl<'a> Story<'a> {
    /// Makes the stage: two servers without a daemon.
    pub(crate) fn set(
        say: &'a mut Say,
        common: &'a Common,
        directory: &Path,
        program: &Path,
        size_bytes: u64,
    ) -> Result<Self> {
        say.title("Two servers on this machine");
        let [first, second] = SERVERS;
        let servers = [Server::new(first, directory, program)?, Server::new(second, directory, program)?];
        let lan = Network::new(&directory.join("lan-netns"))?;
        network::wire([&servers[ALPHA].network, &servers[BETA].network], &lan)?;
        say.line(format!(
            "{first} and {second} are network namespaces, joined by a mirror link ({} - {}) and a LAN",
            config::LINK[0],
            config::LINK[1]
        ));
        let disk = |server: &Server| scene::disk(&server.directory.join("disk"), size_bytes);
        let disks = [disk(&servers[ALPHA])?, disk(&servers[BETA])?];
        for (name, disk) in SERVERS.iter().zip(&disks) {
            say.line(format!("{name}'s disk: {} of {}", disk.display(), bytes(size_bytes)));
        }
        let directory = directory.to_owned();
        Ok(Self { say, common, directory, servers, disks, size_bytes, files: Vec::new() })
    }

    /// Plays it, up to the old primary's return.
    pub(crate) fn play(&mut self) -> Result<()> {
        self.configure()?;
        self.activate()?;
        self.first_files()?;
        self.secondary_dies()?;
        self.secondary_returns()?;
        self.primary_dies()?;
        self.promote()?;
        self.old_primary_returns()
    }

    fn configure(&mut self) -> Result<()> {
        let file = self.directory.join("duplex.toml");
        let [first, second] = &self.disks;
        std::fs::write(&file, config::text(&self.directory, [first, second]))
            .with_context(|| format!("{} cannot be written", file.display()))?;
        let secret = self.directory.join("secret").display().to_string();
        self.servers[ALPHA].verb(&["secret", "new", &secret])?;
        self.say.line(format!("one configuration for both: {}", file.display()));
        for at in [ALPHA, BETA] {
            let name = self.servers[at].name;
            self.servers[at].verb(&["check"])?;
            let said = self.servers[at].verb(&["create", VOLUME])?;
            self.say.line(format!("{name}: duplex create {VOLUME}: {said}"));
        }
        for server in &mut self.servers {
            server.start()?;
            self.say.line(format!("{}: duplex daemon runs", server.name));
        }
        Ok(())
    }

    fn activate(&mut self) -> Result<()> {
        self.say.title("The first copy");
        // With the peer there the smaller size counts, and it must be heard for that.
        self.servers[ALPHA].wait("the peer to be heard", SHORT, |page| page.peer.heard_ms.is_some())?;
        let before = sent_bytes(&self.servers[ALPHA].status()?);
        let began = Instant::now();
        let said = self.servers[ALPHA].verb(&["activate"])?;
        self.say.line(format!("alpha: duplex activate: {said}"));
        self.synced(ALPHA)?;
        let page = self.servers[ALPHA].status()?;
        let size_bytes = volume(&page)?.size_bytes;
        let sent = sent_bytes(&page).saturating_sub(before);
        self.say.held(format!(
            "mirrored: {} in step, {} sent (empty ranges travel as ranges)",
            bytes(size_bytes.unwrap_or_default()),
            bytes(sent)
        ));
        self.row("first copy of the empty disks", size_bytes, Some(sent), began.elapsed());
        Ok(())
    }

    fn first_files(&mut self) -> Result<()> {
        self.say.title("A file system with real files");
        let device = self.device(ALPHA)?;
        let mut make = run::tool("mkfs.ext4");
        // No background initialisation: what is written from now on is what the demo writes.
        make.args(["-q", "-E", "lazy_itable_init=0,lazy_journal_init=0"]).arg(&device);
        run::must(&mut make, LONG)?;
        self.mount(ALPHA)?;
        self.say.line(format!("alpha: ext4 on {}, mounted", device.display()));
        let began = Instant::now();
        let count = self.write(ALPHA, "mirrored", self.size_bytes / 8)?;
        let page = self.servers[ALPHA].status()?;
        must_be(&page, State::Mirrored, Role::Primary)?;
        self.row("files written on both", Some(dirty_bytes(&page)?), None, began.elapsed());
        self.unmount(ALPHA)?;
        self.mount(ALPHA)?;
        self.verify(ALPHA)?;
        self.say.held(format!("{count} files, unmounted, mounted again, every SHA-256 is right"));
        Ok(())
    }

    fn secondary_dies(&mut self) -> Result<()> {
        self.say.title("The secondary dies");
        let began = Instant::now();
        let count = self.servers[BETA].kill()?;
        self.say.line(format!("beta: everything that ran there is killed (SIGKILL): {}", processes(count)));
        self.write(ALPHA, "first-alone", FILE_BYTES)?;
        let stood_still = began.elapsed();
        let page = self.servers[ALPHA].wait("state alone", SHORT, |page| page.state == State::Alone)?;
        self.say.held(format!(
            "alpha is alone and works on: the first write took {:.2} s ({})",
            stood_still.as_secs_f64(),
            page.reason.unwrap_or_default()
        ));
        self.row("secondary dies: work stands still", None, None, stood_still);
        let began = Instant::now();
        for part in 1..=4 {
            self.write(ALPHA, &format!("alone{part}"), self.size_bytes / 64)?;
            let dirty = dirty_bytes(&self.servers[ALPHA].status()?)?;
            self.say.line(format!(
                "alpha: {} more written; dirty log: {}",
                bytes(self.size_bytes / 64),
                bytes(dirty)
            ));
        }
        let dirty = self.settled(ALPHA, self.size_bytes / 16)?;
        self.say.held(format!("the dirty log has it all: {}", bytes(dirty)));
        self.row("files written alone", Some(dirty), None, began.elapsed());
        Ok(())
    }

    fn secondary_returns(&mut self) -> Result<()> {
        self.say.title("The secondary returns");
        self.resync(ALPHA, BETA, "secondary returns: resync")?;
        self.verify(ALPHA)
    }

    fn primary_dies(&mut self) -> Result<()> {
        self.say.title("The primary's host dies in the middle of its work");
        self.rest(ALPHA)?;
        let directory = self.servers[ALPHA].mount_point();
        let most = self.size_bytes / 8 / FILE_BYTES;
        let (acknowledged, heard) = mpsc::channel();
        let work = Work::begin("writing until the host dies", move || {
            let mut done = Vec::new();
            for number in 0..most {
                let name = format!("last-{number:04}");
                match files::write(&directory, &name, seed(&name), FILE_BYTES) {
                    Ok(known) => done.push(known),
                    // The device is gone: that is what was wanted.
                    Err(error) => return Ok((done, Some(format!("{error:#}")))),
                }
                let _ = acknowledged.send(());
            }
            Ok((done, None))
        });
        for _ in 0..FILES_BEFORE_CRASH {
            while heard.recv_timeout(run::LOOK).is_err() {
                if let Some((_, error)) = work.look(Duration::ZERO)? {
                    bail!("alpha cannot write: {}", error.unwrap_or_default());
                }
            }
        }
        let began = Instant::now();
        let count = self.servers[ALPHA].kill()?;
        self.say.line(format!("alpha: killed (SIGKILL) while files are being written: {}", processes(count)));
        let (done, error) = work.end(SHORT)?;
        self.say.line(format!(
            "alpha's last writer saw {} files acknowledged, then: {}",
            done.len(),
            error.as_deref().unwrap_or("it had finished")
        ));
        self.files.extend(done);
        scene::unmount(&self.servers[ALPHA].mount_point())?;
        self.say.line(format!(
            "alpha's dead device let its mount go after {:.2} s",
            began.elapsed().as_secs_f64()
        ));
        Ok(())
    }

    fn promote(&mut self) -> Result<()> {
        self.say.title("The secondary takes over, by the operator's word");
        let page =
            self.servers[BETA].wait("the peer to be lost", SHORT, |page| page.state == State::Joining)?;
        self.say.line(format!("beta: {}", page.reason.unwrap_or_default()));
        let began = Instant::now();
        let said = self.servers[BETA].verb(&["promote", "--peer-is-down"])?;
        self.say.line(format!("beta: duplex promote --peer-is-down: {said}"));
        let page = self.servers[BETA].wait("role primary", SHORT, |page| page.role == Role::Primary)?;
        must_be(&page, State::Alone, Role::Primary)?;
        let device = self.device(BETA)?;
        let checked = self.check_file_system(&device, "-p")?;
        self.say.line(format!("beta: e2fsck -p: {checked}"));
        self.mount(BETA)?;
        self.row("takeover: promote, fsck, mount", None, None, began.elapsed());
        let began = Instant::now();
        self.verify(BETA)?;
        self.say.held(format!(
            "beta has all {} acknowledged files ({}), every SHA-256 is right",
            self.files.len(),
            bytes(files::total_bytes(&self.files))
        ));
        self.row("every file read on the other server", None, None, began.elapsed());
        self.write(BETA, "after-takeover", self.size_bytes / 64)?;
        let dirty = self.settled(BETA, self.size_bytes / 64)?;
        self.say.line(format!(
            "beta works on alone: {} more written; dirty log: {}",
            bytes(self.size_bytes / 64),
            bytes(dirty)
        ));
        Ok(())
    }

    fn old_primary_returns(&mut self) -> Result<()> {
        self.say.title("The old primary returns as the secondary");
        self.resync(BETA, ALPHA, "old primary returns: resync")?;
        let page = self.servers[ALPHA].status()?;
        must_be(&page, State::Mirrored, Role::Secondary)?;
        self.verify(BETA)?;
        self.unmount(BETA)?;
        let device = self.device(BETA)?;
        let checked = self.check_file_system(&device, "-fn")?;
        self.say
            .held(format!("the file system is whole: {}", checked.rsplit("; ").next().unwrap_or_default()));
        Ok(())
    }

    /// Stops both in order, and compares what lies on the two disks.
    pub(crate) fn finish(&mut self) -> Result<()> {
        self.say.title("Orderly stop, and both disks compared");
        let said = self.servers[BETA].verb(&["down"])?;
        self.servers[BETA].bury()?;
        self.say.line(format!("beta: duplex down: {said}"));
        let page = self.servers[ALPHA].wait("role primary", SHORT, |page| page.role == Role::Primary)?;
        self.say.line(format!("alpha: {}, {} ({})", page.state, page.role, page.reason.unwrap_or_default()));
        let said = self.servers[ALPHA].verb(&["down"])?;
        self.servers[ALPHA].bury()?;
        self.say.line(format!("alpha: duplex down: {said}"));
        for at in [ALPHA, BETA] {
            let left = network::processes(&self.servers[at].directory.join("netns"));
            if !left.is_empty() {
                bail!("{}: processes {left:?} are left after `duplex down`", self.servers[at].name);
            }
        }
        let began = Instant::now();
        let [first, second] = self.disks.each_ref().map(|disk| disk.display().to_string());
        let said = self.servers[ALPHA].verb(&["compare", &first, &second])?;
        self.say.held(format!("duplex compare {first} {second}: {said}"));
        self.row("both disks compared", Some(0), None, began.elapsed());
        Ok(())
    }

    /// Mounts again and leaves it so.
    pub(crate) fn leave(&mut self) -> Result<usize> {
        self.mount(BETA)?;
        Ok(BETA)
    }

    /// Extents that were written lately count as different when the primary dies, as nobody knows which of their writes
    /// landed where. After a second without requests they are settled, and only what is written from then on counts.
    fn rest(&mut self, at: usize) -> Result<()> {
        self.say
            .line(format!("{} rests a moment: what was written before is settled", self.servers[at].name));
        let end = Instant::now() + REST;
        while Instant::now() < end {
            interrupt::check()?;
            std::thread::sleep(run::LOOK);
        }
        must_be(&self.servers[at].status()?, State::Mirrored, Role::Primary)
    }

    /// Waits until the dirty log counts at least this. What still is in the activity log is counted when it leaves it,
    /// about a second after its last write.
    fn settled(&mut self, at: usize, written_bytes: u64) -> Result<u64> {
        let what = format!("{} in the dirty log", bytes(written_bytes));
        let counted = |page: &Status| dirty_bytes(page).is_ok_and(|dirty| dirty >= written_bytes);
        dirty_bytes(&self.servers[at].wait(&what, SHORT, counted)?)
    }

    /// Starts a server that was killed, and copies to it what it lacks, and nothing else.
    fn resync(&mut self, source: usize, target: usize, step: &'static str) -> Result<()> {
        let page = self.servers[source].status()?;
        let before = sent_bytes(&page);
        let marked = dirty_bytes(&page)?;
        // Copying waits until everybody could see how much there is to copy.
        self.servers[source].verb(&["resync", "pause"])?;
        self.servers[target].start()?;
        self.say.line(format!("{}: duplex daemon runs again", self.servers[target].name));
        let mut seen = 0;
        let page = self.servers[source].wait("the resync to begin", SHORT, |page| {
            let total = volume(page).ok().and_then(|v| v.resync.as_ref()).map_or(0, |r| r.total_bytes);
            let stands = total > 0 && total == seen && page.state == State::Syncing;
            seen = total;
            stands
        })?;
        // What the returned server had marked itself comes on top of what the source knew.
        let dirty = seen.max(dirty_bytes(&page)?);
        let union = if dirty > marked {
            format!(
                "{} in the dirty log of {}, the rest was in flight when the other one died",
                bytes(marked),
                self.servers[source].name
            )
        } else {
            format!("as the dirty log of {} says", self.servers[source].name)
        };
        self.say.line(format!("{} differ: {union}", bytes(dirty)));
        let began = Instant::now();
        self.servers[source].verb(&["resync", "resume"])?;
        let dirty = dirty.max(self.synced(source)?);
        let took = began.elapsed();
        let sent = sent_bytes(&self.servers[source].status()?).saturating_sub(before);
        if sent > dirty + dirty / 10 + (4 << 20) {
            bail!("{} differed, but {} were sent", bytes(dirty), bytes(sent));
        }
        if dirty > self.size_bytes / 2 {
            bail!("{} of {} count as different: that is no difference", bytes(dirty), bytes(self.size_bytes));
        }
        self.say.held(format!(
            "mirrored: {} differed, {} were sent, of a volume of {}",
            bytes(dirty),
            bytes(sent),
            bytes(self.size_bytes)
        ));
        self.row(step, Some(dirty), Some(sent), took);
        Ok(())
    }

    /// Shows the progress until both say that they are in step. The greatest amount there was to copy.
    fn synced(&mut self, source: usize) -> Result<u64> {
        let mut bar = Bar::new(self.common, "resync");
        let mut total_bytes = 0;
        let done = self.servers[source].wait("state mirrored", LONG, |page| {
            let Ok(volume) = volume(page) else { return false };
            if let Some(resync) = &volume.resync {
                total_bytes = total_bytes.max(resync.total_bytes);
                let pace = Pace {
                    rate_bytes_per_s: resync.rate_bytes_per_s,
                    eta_s: resync.eta_s,
                    words: format!("({})", resync.pace),
                };
                let done = resync.total_bytes.saturating_sub(resync.left_bytes);
                bar.set(done, resync.total_bytes, Some(pace));
            }
            page.state == State::Mirrored
        });
        bar.finish();
        let page = done?;
        must_be(&page, State::Mirrored, Role::Primary)?;
        let copies = volume(&page)?;
        if (copies.copy, copies.peer_copy) != (CopyState::UpToDate, CopyState::UpToDate) {
            bail!("mirrored, but the copies are {} and {}", copies.copy, copies.peer_copy);
        }
        let target = 1 - source;
        self.servers[target].wait("state mirrored", SHORT, |page| {
            page.state == State::Mirrored && page.role == Role::Secondary
        })?;
        Ok(total_bytes)
    }

    /// The device of a primary, once it is there.
    fn device(&mut self, at: usize) -> Result<PathBuf> {
        let server = &mut self.servers[at];
        let device = server.device();
        let limit = Duration::from_secs(20);
        let shown = |page: &Status| volume(page).is_ok_and(|volume| volume.device.is_some());
        server.wait("a device", limit, |page| shown(page) && device.exists()).with_context(|| {
            format!(
                "{}: no device appears; it needs /dev/fuse and loop devices; the daemon's log ends with\n{}",
                server.name,
                server.log_end()
            )
        })?;
        scene::note_device(&self.directory, &device)?;
        Ok(device)
    }

    fn mount(&mut self, at: usize) -> Result<()> {
        let device = self.device(at)?;
        let mut mount = run::tool("mount");
        mount.args(["-t", "ext4", "-o", "noatime"]).arg(device).arg(self.servers[at].mount_point());
        run::must(&mut mount, SHORT).map(drop)
    }

    fn unmount(&mut self, at: usize) -> Result<()> {
        let mut unmount = run::tool("umount");
        unmount.arg(self.servers[at].mount_point());
        run::must(&mut unmount, SHORT).map(drop)
    }

    /// 0 is clean, 1 is repaired by replaying the journal.
    fn check_file_system(&self, device: &Path, how: &str) -> Result<String> {
        let done = run::run(run::tool("e2fsck").arg(how).arg(device), LONG)?;
        match done.code {
            Some(0) => Ok(without_path(&done.stdout)),
            Some(1) if how == "-p" => Ok(without_path(&done.stdout)),
            code => bail!("e2fsck {how} {} ended with {code:?}: {}", device.display(), done.text()),
        }
    }

    /// Writes files durably and remembers them. How many.
    fn write(&mut self, at: usize, prefix: &str, all_bytes: u64) -> Result<usize> {
        let directory = self.servers[at].mount_point();
        let prefix = prefix.to_owned();
        let count = (all_bytes / FILE_BYTES).max(1);
        let work = Work::begin(&format!("{}: writing files", self.servers[at].name), move || {
            let names = (0..count).map(|number| format!("{prefix}-{number:04}"));
            names
                .map(|name| files::write(&directory, &name, seed(&name), FILE_BYTES))
                .collect::<Result<Vec<_>>>()
        });
        let written = work.end(LONG)?;
        let count = written.len();
        self.files.extend(written);
        Ok(count)
    }

    fn verify(&self, at: usize) -> Result<()> {
        let directory = self.servers[at].mount_point();
        let known = self.files.clone();
        let work = Work::begin(&format!("{}: reading files", self.servers[at].name), move || {
            files::verify(&directory, &known)
        });
        work.end(LONG)
    }

    fn row(&mut self, step: &'static str, dirty_bytes: Option<u64>, sent_bytes: Option<u64>, took: Duration) {
        self.say.row(Row { step, dirty_bytes, sent_bytes, took });
    }
}

/// `PATH: clean` becomes `clean`; several lines become one.
fn without_path(said: &str) -> String {
    let lines = said.lines().map(str::trim).filter(|line| !line.is_empty());
    let short = lines.map(|line| line.split_once("demo: ").map_or(line, |(_, words)| words));
    short.collect::<Vec<_>>().join("; ")
}

fn processes(count: usize) -> String {
    if count == 1 { "1 process".to_owned() } else { format!("{count} processes") }
}

/// Contents differ from file to file and are the same in every run.
fn seed(name: &str) -> u64 {
    name.bytes()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

fn must_be(page: &Status, state: State, role: Role) -> Result<()> {
    if page.state == state && page.role == role {
        return Ok(());
    }
    bail!(
        "{} is {}, {}, but should be {state}, {role} ({})",
        page.server,
        page.state,
        page.role,
        page.reason.as_deref().unwrap_or("no reason given")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_e2fsck_says_is_one_line_without_the_device() {
        let said = "/var/tmp/d/beta/run/dev/demo: recovering journal\n/var/tmp/d/beta/run/dev/demo: clean, 1/2 files\n";
        assert_eq!(without_path(said), "recovering journal; clean, 1/2 files");
        assert_eq!(without_path("\nPass 1: Checking\n"), "Pass 1: Checking");
    }
}
