//! What one run is like, drawn from its seed: sizes, speeds, which faults happen.

use duplex_core::request::DiskOpKind;

use super::rng::Rng;
use super::script::Fault;
use super::world::MS;

const US: u64 = 1000;

/// One volume.
#[derive(Clone, Debug)]
pub struct VolumeProfile {
    /// Its name.
    pub name: String,
    /// Its size.
    pub size_bytes: u64,
    /// Blocks the clients use.
    pub hot_blocks: u64,
    /// Requests in flight at most.
    pub depth: usize,
    /// Mean pause between two requests.
    pub think_ns: u64,
}

/// One run.
#[derive(Clone, Debug)]
pub struct Profile {
    /// The volumes.
    pub volumes: Vec<VolumeProfile>,
    /// Clock rates in parts of a million.
    pub rates: [u64; 2],
    /// The link's delay.
    pub delay: (u64, u64),
    /// Longest way of an order between two threads.
    pub hop_ns: u64,
    /// Disks are slow.
    pub slow_disk: bool,
    /// Chunks of zeroes travel as ranges.
    pub zero_chunks: bool,
    /// Of a thousand questions for holes, those answered with less than there is.
    pub blind_per_mille: u64,
    /// Faults that happen in this run, with weights.
    pub faults: Vec<(u64, Fault)>,
    /// Mean pause between two faults.
    pub fault_pause_ns: u64,
    /// How long faults happen.
    pub chaos_ns: u64,
    /// Percent of reads, flushes, zeroes among requests.
    pub mix: [u64; 3],
    /// Of a thousand writes.
    pub fua_per_mille: u64,
}

impl Profile {
    /// Draws one.
    pub fn draw(rng: &mut Rng) -> Self {
        let count = rng.weighted(&[(6, 1), (3, 2), (1, 3)]).unwrap_or(1);
        let volumes = (0..count).map(|at| Self::volume(at, rng)).collect();
        let delay = rng.weighted(&[(3, (20 * US, 200 * US)), (2, (100 * US, 2 * MS)), (1, (MS, 30 * MS))]);
        Self {
            volumes,
            rates: [rng.between(910_000, 1_090_000), rng.between(910_000, 1_090_000)],
            delay: delay.unwrap_or((20 * US, 200 * US)),
            hop_ns: rng.weighted(&[(1, 0), (2, 100 * US), (1, 3 * MS)]).unwrap_or(0),
            slow_disk: rng.chance(200),
            zero_chunks: rng.chance(800),
            blind_per_mille: rng.weighted(&[(4, 50), (1, 500), (1, 1000)]).unwrap_or(50),
            faults: Self::faults(rng),
            fault_pause_ns: rng.between(100, 1500) * MS,
            chaos_ns: rng.between(4000, 16_000) * MS,
            mix: [rng.between(5, 40), rng.between(0, 15), rng.between(0, 10)],
            fua_per_mille: rng.weighted(&[(2, 0), (1, 100)]).unwrap_or(0),
        }
    }

    fn volume(at: usize, rng: &mut Rng) -> VolumeProfile {
        let extents = rng.weighted(&[(20, 2), (10, 5), (3, 12), (1, 70)]).unwrap_or(2);
        VolumeProfile {
            name: format!("v{at}"),
            size_bytes: extents << 22,
            hot_blocks: rng.between(8, 64),
            depth: usize::try_from(rng.between(1, 8)).unwrap_or(1),
            think_ns: rng.weighted(&[(2, 3 * MS), (2, 15 * MS), (1, 80 * MS)]).unwrap_or(MS),
        }
    }

    /// Each family happens in some runs and not in others: rare ones are not drowned by frequent ones.
    fn faults(rng: &mut Rng) -> Vec<(u64, Fault)> {
        let families = [
            (600, 10, Fault::Cut),
            (300, 5, Fault::OneWay),
            (600, 8, Fault::Blip),
            (600, 8, Fault::Kill),
            (400, 8, Fault::PowerCut),
            (250, 4, Fault::BothPowerCut),
            (200, 4, Fault::BothKilled),
            (300, 6, Fault::Pause),
            (300, 5, Fault::Demote),
            (500, 8, Fault::Switchover),
            (600, 12, Fault::Promote),
            (700, 16, Fault::PromotePeerIsDown),
            (200, 4, Fault::Down),
            (200, 4, Fault::Stop),
            (200, 4, Fault::ResyncPause),
            (100, 2, Fault::FullCopy),
            (60, 2, Fault::BadBlocks),
            (60, 1, Fault::DiskDies),
            (150, 6, Fault::SwapDisk),
            (500, 6, Fault::Quiet),
        ];
        let mut chosen: Vec<(u64, Fault)> =
            families.iter().filter(|(often, _, _)| rng.chance(*often)).map(|(_, w, f)| (*w, *f)).collect();
        if chosen.is_empty() {
            chosen.push((1, Fault::Cut));
        }
        chosen
    }

    /// How long a disk operation takes.
    pub fn disk_delay(&self, kind: &DiskOpKind, rng: &mut Rng) -> u64 {
        let (low, high) = match kind {
            DiskOpKind::SeekData { .. } => (0, 2 * US),
            DiskOpKind::Read { .. } | DiskOpKind::MetaRead { .. } => (20 * US, 300 * US),
            DiskOpKind::Write { fua: false, .. } | DiskOpKind::Zero { fua: false, .. } => (20 * US, 500 * US),
            DiskOpKind::Write { fua: true, .. } | DiskOpKind::Zero { fua: true, .. } => (100 * US, 3 * MS),
            DiskOpKind::Flush | DiskOpKind::MetaWrite { .. } => (100 * US, 3 * MS),
        };
        let slow = if self.slow_disk { 8 } else { 1 };
        let hiccup = if rng.chance(3) { 60 * MS } else { 0 };
        rng.between(low, high) * slow + hiccup
    }
}
