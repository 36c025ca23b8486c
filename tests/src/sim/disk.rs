//! A disk with a volatile cache: what was not flushed may be lost, kept or torn when the power goes.

use std::collections::BTreeMap;

use duplex_core::ids::{BufferId, ByteRange, DiskOpId};
use duplex_core::request::{DiskOp, DiskOpKind, DiskOutcome};

use super::page::{self, Buffers, PAGE_BYTES, Page};
use super::rng::Rng;

/// EIO.
const EIO: i32 = 5;

/// The two address spaces of a backing.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Area {
    /// The volume's data.
    Data,
    /// Superblocks, log, map.
    Meta,
}

/// A page's place.
pub type Place = (Area, u64);

/// A range of the data area that fails.
#[derive(Clone, Copy, Debug)]
pub struct Fault {
    /// First page.
    pub first: u64,
    /// Last page.
    pub last: u64,
    /// Reads fail; a successful write heals the page.
    pub read: bool,
    /// Writes fail.
    pub write: bool,
}

/// An operation that was started and has not ended.
#[derive(Debug)]
pub struct Pending {
    /// The core's name for it.
    pub id: DiskOpId,
    effect: Effect,
    /// Cached writes up to this one had completed when the operation was started.
    covers: u64,
}

#[derive(Debug)]
enum Effect {
    Read { first: u64, count: usize, buffer: BufferId },
    Write { pages: Vec<(Place, Page)>, stable: bool, preflush: bool },
    Flush,
    MetaRead { first: u64, count: usize },
    SeekData { first: u64, count: usize },
}

#[derive(Debug)]
struct Cached {
    order: u64,
    place: Place,
    page: Page,
}

/// What a finished operation gives back.
#[derive(Debug)]
pub struct Finished {
    /// For the core.
    pub outcome: DiskOutcome,
    /// The content read into a buffer.
    pub read: Option<(BufferId, Vec<Page>)>,
}

/// How a power cut treats what was not stable.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Cut {
    /// Everything is lost.
    Lose,
    /// Everything reached the medium in time.
    Keep,
    /// Any subset, any sector.
    Tear,
}

/// One backing.
#[derive(Debug, Default)]
pub struct Disk {
    stable: BTreeMap<Place, Page>,
    current: BTreeMap<Place, Page>,
    cache: Vec<Cached>,
    order: u64,
    /// Faulty ranges of the data area.
    pub faults: Vec<Fault>,
    /// Every operation fails.
    pub dead: bool,
    /// Flushes and preflushes are acknowledged and not done: a deliberate bug.
    pub lies: bool,
    /// What was written since the last flush is not seen where holes are looked for: a deliberate bug.
    pub stale_holes: bool,
    /// Which piece of hardware this is: no two disks of a run have the same number.
    pub number: u64,
    /// The number of the disk that it was made equal to last, while its map can still tell what differs from that one.
    pub twin: Option<u64>,
}

fn split(range: ByteRange) -> (u64, usize) {
    let page = PAGE_BYTES as u64;
    let first = range.offset_bytes / page;
    let count = range.end_bytes().div_ceil(page) - first;
    (first, usize::try_from(count).expect("a range of a simulated volume fits in memory"))
}

impl Pending {
    /// True if the operation reads into this buffer.
    pub fn fills(&self, buffer: BufferId) -> bool {
        match &self.effect {
            Effect::Read { buffer: mine, .. } => *mine == buffer,
            Effect::Write { .. } | Effect::Flush | Effect::MetaRead { .. } | Effect::SeekData { .. } => false,
        }
    }
}

impl Disk {
    /// Starts an operation.
    ///
    /// # Errors
    /// If the core starts a write over another one that has not ended (W1).
    pub fn begin(&self, op: &DiskOp, buffers: &Buffers, others: &[&Pending]) -> Result<Pending, String> {
        let effect = match &op.kind {
            DiskOpKind::Read { range, buffer } => {
                let (first, count) = split(*range);
                Effect::Read { first, count, buffer: *buffer }
            }
            DiskOpKind::Write { range, buffer, fua } => {
                let (first, count) = split(*range);
                let pages = buffers.pages(*buffer, count);
                let pages = (first..).map(|at| (Area::Data, at)).zip(pages).collect();
                Effect::Write { pages, stable: *fua, preflush: false }
            }
            DiskOpKind::Zero { range, fua, may_unmap: _ } => {
                let (first, count) = split(*range);
                let pages = (first..).take(count).map(|at| ((Area::Data, at), None)).collect();
                Effect::Write { pages, stable: *fua, preflush: false }
            }
            DiskOpKind::SeekData { range } => {
                let (first, count) = split(*range);
                Effect::SeekData { first, count }
            }
            DiskOpKind::Flush => Effect::Flush,
            DiskOpKind::MetaRead { offset_bytes, length_bytes } => {
                let (first, count) = split(ByteRange::new(*offset_bytes, u64::from(*length_bytes)));
                Effect::MetaRead { first, count }
            }
            DiskOpKind::MetaWrite { offset_bytes, bytes, preflush } => {
                let first = offset_bytes / PAGE_BYTES as u64;
                let pages = bytes.chunks(PAGE_BYTES).map(page::from_bytes);
                let pages = (first..).map(|at| (Area::Meta, at)).zip(pages).collect();
                Effect::Write { pages, stable: true, preflush: *preflush }
            }
        };
        if let Effect::Write { pages, .. } = &effect {
            for other in others {
                if let Effect::Write { pages: busy, .. } = &other.effect
                    && pages.iter().any(|(place, _)| busy.iter().any(|(taken, _)| taken == place))
                {
                    return Err(format!("{:?} is written over {:?}, which has not ended", op.id, other.id));
                }
            }
        }
        Ok(Pending { id: op.id, effect, covers: self.order })
    }

    /// Ends an operation.
    pub fn finish(&mut self, pending: Pending) -> Finished {
        if self.fails(&pending.effect) {
            return Finished { outcome: DiskOutcome::Failed { errno: EIO }, read: None };
        }
        match pending.effect {
            Effect::Read { first, count, buffer } => {
                let pages = (first..).take(count).map(|at| self.visible((Area::Data, at))).collect();
                Finished { outcome: DiskOutcome::Done, read: Some((buffer, pages)) }
            }
            Effect::MetaRead { first, count } => {
                let pages = (first..).take(count).map(|at| self.visible((Area::Meta, at)));
                let bytes = pages.flat_map(|page| page::to_bytes(&page)).collect();
                Finished { outcome: DiskOutcome::Bytes(bytes), read: None }
            }
            Effect::SeekData { first, count } => {
                let length_bytes = self.zeroes(first, count) * PAGE_BYTES as u64;
                Finished { outcome: DiskOutcome::Zeroes { length_bytes }, read: None }
            }
            Effect::Flush => {
                self.settle(pending.covers);
                Finished { outcome: DiskOutcome::Done, read: None }
            }
            Effect::Write { pages, stable, preflush } => {
                if preflush {
                    self.settle(pending.covers);
                }
                for (place, page) in pages {
                    self.write(place, page, stable);
                }
                Finished { outcome: DiskOutcome::Done, read: None }
            }
        }
    }

    fn fails(&mut self, effect: &Effect) -> bool {
        if self.dead {
            return true;
        }
        let hit = |fault: &Fault, at: u64| (fault.first..=fault.last).contains(&at);
        match effect {
            Effect::Read { first, count, .. } => {
                let mut pages = (*first..).take(*count);
                pages.any(|at| self.faults.iter().any(|fault| fault.read && hit(fault, at)))
            }
            Effect::Write { pages, .. } => {
                let data = |place: &Place| (place.0 == Area::Data).then_some(place.1);
                let numbers: Vec<u64> = pages.iter().filter_map(|(place, _)| data(place)).collect();
                let failed = self.faults.iter().any(|f| f.write && numbers.iter().any(|at| hit(f, *at)));
                if !failed {
                    // A rewritten sector is remapped: it reads again.
                    self.faults.retain(|f| f.write || !numbers.iter().any(|at| hit(f, *at)));
                }
                failed
            }
            Effect::Flush | Effect::MetaRead { .. } | Effect::SeekData { .. } => false,
        }
    }

    /// Pages of zeroes from `first` on.
    fn zeroes(&self, first: u64, count: usize) -> u64 {
        let pages = if self.stale_holes { &self.stable } else { &self.current };
        let data = pages.range((Area::Data, first)..(Area::Meta, 0)).find(|(_, page)| page.is_some());
        let until = data.map_or(u64::MAX, |((_, at), _)| *at);
        (until - first).min(count as u64)
    }

    fn write(&mut self, place: Place, page: Page, stable: bool) {
        self.current.insert(place, page.clone());
        if stable {
            self.cache.retain(|cached| cached.place != place);
            self.stable.insert(place, page);
        } else {
            self.order += 1;
            self.cache.push(Cached { order: self.order, place, page });
        }
    }

    fn settle(&mut self, upto: u64) {
        if self.lies {
            return;
        }
        for cached in &self.cache {
            if cached.order <= upto {
                self.stable.insert(cached.place, cached.page.clone());
            }
        }
        self.cache.retain(|cached| cached.order > upto);
    }

    fn visible(&self, place: Place) -> Page {
        self.current.get(&place).cloned().flatten()
    }

    /// A page of the data area as a read would see it.
    pub fn data(&self, at: u64) -> Page {
        self.visible((Area::Data, at))
    }

    /// Metadata as a read would see it.
    pub fn meta(&self, first: u64, count: usize) -> Vec<u8> {
        (first..).take(count).flat_map(|at| page::to_bytes(&self.visible((Area::Meta, at)))).collect()
    }

    /// Every page of the data area that was ever written.
    pub fn written(&self) -> Vec<u64> {
        let keys = self.current.keys().filter(|(area, _)| *area == Area::Data);
        keys.map(|(_, at)| *at).collect()
    }

    /// A page of the data area that nobody of this pair wrote: what a disk held before `create`.
    pub fn litter(&mut self, at: u64, page: Page) {
        self.write((Area::Data, at), page, true);
    }

    /// Puts bytes there, stable: what `create` wrote before the run.
    pub fn format(&mut self, offset_bytes: u64, bytes: &[u8]) {
        let first = offset_bytes / PAGE_BYTES as u64;
        for (at, chunk) in (first..).zip(bytes.chunks(PAGE_BYTES)) {
            self.write((Area::Meta, at), page::from_bytes(chunk), true);
        }
    }

    /// The process was killed: what it had started lands or does not, page by page.
    pub fn kill(&mut self, pending: Vec<Pending>, rng: &mut Rng) {
        for mut op in pending {
            let whole = rng.chance(500);
            if let Effect::Write { pages, .. } = &mut op.effect {
                if !whole {
                    pages.retain(|_| rng.chance(400));
                }
                self.finish(op);
            }
        }
    }

    /// The power went: started operations and the cache end as `cut` says.
    pub fn power_cut(&mut self, pending: Vec<Pending>, cut: Cut, rng: &mut Rng) {
        let kept = |rng: &mut Rng| match cut {
            Cut::Lose => false,
            Cut::Keep => true,
            Cut::Tear => rng.chance(500),
        };
        for op in pending {
            let Effect::Write { pages, preflush, .. } = op.effect else { continue };
            if !kept(rng) || self.dead {
                continue;
            }
            if preflush {
                self.settle(op.covers);
            }
            for (place, page) in pages {
                let torn = match place.0 {
                    Area::Data if kept(rng) => page,
                    Area::Data => continue,
                    Area::Meta if cut == Cut::Keep => page,
                    Area::Meta => self.torn(place, &page, rng),
                };
                self.order += 1;
                self.cache.push(Cached { order: self.order, place, page: torn });
                if place.0 == Area::Meta {
                    self.settle_last();
                }
            }
        }
        for cached in std::mem::take(&mut self.cache) {
            if kept(rng) {
                self.stable.insert(cached.place, cached.page);
            }
        }
        self.current.clone_from(&self.stable);
    }

    fn settle_last(&mut self) {
        if let Some(cached) = self.cache.pop() {
            self.stable.insert(cached.place, cached.page);
        }
    }

    /// Old and new content mixed by 512-byte sectors.
    fn torn(&self, place: Place, new: &Page, rng: &mut Rng) -> Page {
        let mut bytes = page::to_bytes(&self.stable.get(&place).cloned().flatten());
        let new = page::to_bytes(new);
        for (old, fresh) in bytes.chunks_exact_mut(512).zip(new.chunks_exact(512)) {
            if rng.chance(500) {
                old.copy_from_slice(fresh);
            }
        }
        page::from_bytes(&bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(disk: &mut Disk, buffers: &mut Buffers, at: u64, stamp: u64, fua: bool) {
        let buffer = buffers.put(vec![page::stamped(stamp)]);
        let range = ByteRange::new(at * 4096, 4096);
        let op = DiskOp { id: DiskOpId(1), kind: DiskOpKind::Write { range, buffer, fua } };
        let pending = disk.begin(&op, buffers, &[]).unwrap();
        disk.finish(pending);
        buffers.release(buffer);
    }

    fn stamp(disk: &Disk, at: u64) -> Option<u64> {
        page::stamp_of(&disk.data(at))
    }

    #[test]
    fn a_cut_loses_what_was_not_flushed() {
        let (mut disk, mut buffers, mut rng) = (Disk::default(), Buffers::default(), Rng::new(1));
        write(&mut disk, &mut buffers, 1, 10, false);
        let flush = DiskOp { id: DiskOpId(2), kind: DiskOpKind::Flush };
        let flush = disk.begin(&flush, &buffers, &[]).unwrap();
        write(&mut disk, &mut buffers, 2, 20, false);
        write(&mut disk, &mut buffers, 3, 30, true);
        disk.finish(flush);
        disk.power_cut(Vec::new(), Cut::Lose, &mut rng);
        assert_eq!(stamp(&disk, 1), Some(10));
        assert_eq!(stamp(&disk, 2), Some(0), "the flush was started before this write");
        assert_eq!(stamp(&disk, 3), Some(30));
        assert_eq!(buffers.in_use(), 0);
    }

    #[test]
    fn overlapping_writes_are_found() {
        let (disk, mut buffers) = (Disk::default(), Buffers::default());
        let buffer = buffers.put(vec![page::stamped(1); 2]);
        let op = |offset| DiskOp {
            id: DiskOpId(offset),
            kind: DiskOpKind::Write { range: ByteRange::new(offset, 8192), buffer, fua: false },
        };
        let first = disk.begin(&op(0), &buffers, &[]).unwrap();
        assert!(disk.begin(&op(4096), &buffers, &[&first]).is_err());
        assert!(disk.begin(&op(8192), &buffers, &[&first]).is_ok());
    }

    #[test]
    fn a_torn_record_mixes_sectors() {
        let (mut disk, buffers) = (Disk::default(), Buffers::default());
        disk.format(0, &[1; 4096]);
        let op = DiskOp {
            id: DiskOpId(1),
            kind: DiskOpKind::MetaWrite { offset_bytes: 0, bytes: vec![2; 4096], preflush: false },
        };
        let mut mixed = false;
        for seed in 0..20 {
            disk.format(0, &[1; 4096]);
            let pending = disk.begin(&op, &buffers, &[]).unwrap();
            disk.power_cut(vec![pending], Cut::Tear, &mut Rng::new(seed));
            let bytes = disk.meta(0, 1);
            assert!(bytes.chunks(512).all(|sector| sector.iter().all(|b| *b == sector[0])));
            mixed |= bytes.contains(&1) && bytes.contains(&2);
        }
        assert!(mixed);
    }
}
