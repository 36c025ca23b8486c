//! The superblock: identity, placement, and the durable records. Two slots, written in turn.
//!
//! Each write bears a counter greater than any counter in any intact sector of either slot, so two torn
//! writes of different lives can never complete each other. The newer whole slot counts.

use super::placement::MetaPlacement;
use super::record::{CopyRecord, CopyState, Era, Origin, ServerRecord};
use super::seal::{BLOCK_LEN, Kind, PAYLOAD_LEN, SECTORS, Seal, SectorState};
use crate::ids::{BootId, Epoch, Generation, PairId, Proven, Sequence, ServerName, VolumeId};
use crate::limits::{HISTORY_MAX, VOLUME_MAX_BYTES};

/// First bytes of a superblock.
pub const MAGIC: [u8; 8] = *b"DUPLEXsb";
/// Version written, and newest understood.
pub const VERSION: u32 = 1;
/// Feature bits understood. Reserved: 1 undo area, 2 block checksums, 4 memory image.
pub const FEATURES_KNOWN: u64 = 0;
/// Bytes of one superblock.
pub const SUPERBLOCK_BYTES: usize = BLOCK_LEN;
/// Longest server name in bytes.
pub const NAME_MAX_BYTES: usize = 255;

/// What a superblock holds.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Superblock {
    /// Drawn at create; part of every other block's checksum.
    pub instance: u128,
    /// Feature bits in use.
    pub features: u64,
    /// Where log and map stand.
    pub placement: MetaPlacement,
    /// First byte of the data in the backing; 0 with a metadata file.
    pub data_offset_bytes: u64,
    /// Room for data in the backing when the copy was made: the map's tail stands behind it. A backing whose
    /// room changed is refused.
    pub capacity_bytes: u64,
    /// The server's facts.
    pub server: ServerRecord,
    /// The copy's facts.
    pub copy: CopyRecord,
    /// Life of the activity log whose blocks count.
    pub log_life: u64,
    /// Map and summary sectors with a lower counter count as empty.
    pub map_floor: u64,
}

/// The superblock in force.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Selected {
    /// Its content.
    pub superblock: Superblock,
    /// The slot it stands in; the next one goes to the other slot.
    pub slot: u8,
    /// Counter of the next write.
    pub next_counter: u64,
}

/// Why there is no superblock to go by. Nothing was written.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SuperblockError {
    /// Both slots are all zero.
    #[error("the metadata area is blank; run `duplex create` on this backing first")]
    Blank,
    /// Something else is there.
    #[error(
        "the metadata area holds something that is not Duplex's; check the path of the backing, or wipe it"
    )]
    Foreign,
    /// Neither slot is whole.
    #[error(
        "both superblocks are damaged; where the peer has a good copy give this one up: stop the daemon, `duplex create --overwrite-data` for the volume, start it"
    )]
    Torn,
    /// Written by a newer program.
    #[error("the metadata has format version {found}, this program knows {known}; install the newer version")]
    NewerVersion {
        /// On disk.
        found: u32,
        /// By this program.
        known: u32,
    },
    /// Uses a feature this program does not have.
    #[error(
        "the metadata uses features {found:#x}, this program knows {known:#x}; install the newer version"
    )]
    UnknownFeatures {
        /// On disk.
        found: u64,
        /// By this program.
        known: u64,
    },
    /// Whole, but its numbers contradict each other.
    #[error(
        "the superblock contradicts itself in `{field}`; where the peer has a good copy give this one up: stop the daemon, `duplex create --overwrite-data` for the volume, start it"
    )]
    Inconsistent {
        /// The first bad field.
        field: &'static str,
    },
}

impl SuperblockError {
    /// The stable word.
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Blank => "no-metadata",
            Self::Foreign => "foreign",
            Self::Torn => "torn",
            Self::NewerVersion { .. } => "newer-version",
            Self::UnknownFeatures { .. } => "unknown-features",
            Self::Inconsistent { .. } => "inconsistent",
        }
    }
}

/// Why a superblock cannot be written.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum EncodeError {
    /// The epoch's holder has too long a name.
    #[error("the name of the epoch's holder has {0} bytes, at most 255 fit; shorten the server's name")]
    NameTooLong(usize),
    /// Too many generations.
    #[error("the history has {0} generations, at most 16 fit; drop the oldest")]
    HistoryTooLong(usize),
    /// The counter is used up.
    #[error("the superblock's counter is used up; replace the copy")]
    CounterUsedUp,
}

fn seal(slot: u8) -> Seal {
    Seal { kind: Kind::Superblock, index: u64::from(slot), instance: 0, life: 0 }
}

#[derive(Default)]
struct Writer(Vec<u8>);

impl Writer {
    fn bytes(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }
    fn u8(&mut self, value: u8) {
        self.0.push(value);
    }
    fn u32(&mut self, value: u32) {
        self.bytes(&value.to_le_bytes());
    }
    fn u64(&mut self, value: u64) {
        self.bytes(&value.to_le_bytes());
    }
    fn u128(&mut self, value: u128) {
        self.bytes(&value.to_le_bytes());
    }
}

/// The bytes of `slot` (0 or 1) with this counter.
pub fn encode(superblock: &Superblock, slot: u8, counter: u64) -> Result<Vec<u8>, EncodeError> {
    if counter == u64::MAX {
        return Err(EncodeError::CounterUsedUp);
    }
    let mut w = Writer::default();
    w.bytes(&MAGIC);
    w.u32(VERSION);
    w.u32(0);
    w.u64(superblock.features);
    w.u128(superblock.instance);
    let place = &superblock.placement;
    w.u64(place.log_offset_bytes);
    w.u64(u64::from(place.log_slots));
    w.u64(place.summary_offset_bytes);
    w.u64(place.summary_blocks);
    w.u64(place.pages_offset_bytes);
    w.u64(place.pages);
    w.u64(superblock.data_offset_bytes);
    w.u64(superblock.capacity_bytes);
    w.u64(superblock.log_life);
    w.u64(superblock.map_floor);
    encode_server(&mut w, &superblock.server)?;
    encode_copy(&mut w, &superblock.copy)?;
    debug_assert!(w.0.len() <= PAYLOAD_LEN, "bounded above");
    Ok(seal(slot).seal(&w.0, counter))
}

fn encode_server(w: &mut Writer, server: &ServerRecord) -> Result<(), EncodeError> {
    w.u64(server.counter);
    w.u128(server.boot_id.0);
    w.u64(server.epoch_seen.number);
    let holder = server.epoch_seen.holder.as_ref().map(|name| name.0.as_bytes());
    w.u8(u8::from(holder.is_some()));
    let name = holder.unwrap_or(&[]);
    w.u8(u8::try_from(name.len()).map_err(|_| EncodeError::NameTooLong(name.len()))?);
    w.bytes(name);
    let (era, number) = match server.era {
        Era::Pair => (0, 0),
        Era::Solo(number) => (1, number),
    };
    w.u8(era);
    w.u64(number);
    w.u64(server.last_primary);
    w.u8(u8::from(server.was_primary));
    w.u8(u8::from(server.clean));
    Ok(())
}

fn encode_copy(w: &mut Writer, copy: &CopyRecord) -> Result<(), EncodeError> {
    if copy.history.len() > HISTORY_MAX {
        return Err(EncodeError::HistoryTooLong(copy.history.len()));
    }
    w.u128(copy.pair.0);
    w.u128(copy.volume.0);
    w.u64(copy.size_bytes);
    w.u32(copy.block_bytes);
    w.u32(copy.sector_bytes);
    w.u128(copy.generation.0);
    w.u128(copy.base.0);
    let (state, toward) = match copy.state {
        CopyState::Blank => (0, Generation::NONE),
        CopyState::UpToDate => (1, Generation::NONE),
        CopyState::Outdated => (2, Generation::NONE),
        CopyState::Inconsistent { toward } => (3, toward),
        CopyState::Failed => (4, Generation::NONE),
    };
    w.u8(state);
    w.u128(toward.0);
    w.u8(u8::from(copy.unproven));
    w.u64(copy.proven.epoch);
    w.u64(copy.proven.seq.0);
    w.u8(match copy.origin {
        Origin::Created => 0,
        Origin::Solo => 1,
        Origin::Forced => 2,
    });
    w.u8(u8::try_from(copy.history.len()).unwrap_or(u8::MAX));
    for generation in &copy.history {
        w.u128(generation.0);
    }
    Ok(())
}

struct Reader<'a>(&'a [u8]);

type Field<T> = Result<T, SuperblockError>;

const fn bad<T>(field: &'static str) -> Field<T> {
    Err(SuperblockError::Inconsistent { field })
}

impl<'a> Reader<'a> {
    fn take(&mut self, length: usize) -> Field<&'a [u8]> {
        match self.0.split_at_checked(length) {
            Some((head, rest)) => {
                self.0 = rest;
                Ok(head)
            }
            None => bad("length"),
        }
    }
    fn array<const N: usize>(&mut self) -> Field<[u8; N]> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N)?);
        Ok(out)
    }
    fn u8(&mut self) -> Field<u8> {
        Ok(self.array::<1>()?[0])
    }
    fn flag(&mut self, field: &'static str) -> Field<bool> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => bad(field),
        }
    }
    fn u32(&mut self) -> Field<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }
    fn u64(&mut self) -> Field<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }
    fn u128(&mut self) -> Field<u128> {
        Ok(u128::from_le_bytes(self.array()?))
    }
}

fn decode(payload: &[u8]) -> Field<Superblock> {
    let mut r = Reader(payload);
    if r.array::<8>()? != MAGIC {
        return Err(SuperblockError::Foreign);
    }
    let found = r.u32()?;
    if found > VERSION {
        return Err(SuperblockError::NewerVersion { found, known: VERSION });
    }
    if found == 0 {
        return bad("version");
    }
    r.u32()?;
    let features = r.u64()?;
    if features & !FEATURES_KNOWN != 0 {
        return Err(SuperblockError::UnknownFeatures { found: features, known: FEATURES_KNOWN });
    }
    let instance = r.u128()?;
    let placement = MetaPlacement {
        log_offset_bytes: r.u64()?,
        log_slots: u32::try_from(r.u64()?).or(bad("log slots"))?,
        summary_offset_bytes: r.u64()?,
        summary_blocks: r.u64()?,
        pages_offset_bytes: r.u64()?,
        pages: r.u64()?,
    };
    let data_offset_bytes = r.u64()?;
    let capacity_bytes = r.u64()?;
    let log_life = r.u64()?;
    let map_floor = r.u64()?;
    let server = decode_server(&mut r)?;
    let copy = decode_copy(&mut r)?;
    let superblock = Superblock {
        instance,
        features,
        placement,
        data_offset_bytes,
        capacity_bytes,
        server,
        copy,
        log_life,
        map_floor,
    };
    check_geometry(&superblock)?;
    Ok(superblock)
}

fn decode_server(r: &mut Reader<'_>) -> Field<ServerRecord> {
    let counter = r.u64()?;
    let boot_id = BootId(r.u128()?);
    let number = r.u64()?;
    let has_holder = r.flag("holder")?;
    let length = usize::from(r.u8()?);
    let name = std::str::from_utf8(r.take(length)?).or(bad("holder"))?;
    let holder = has_holder.then(|| ServerName(name.to_owned()));
    let era = match (r.u8()?, r.u64()?) {
        (0, _) => Era::Pair,
        (1, number) => Era::Solo(number),
        _ => return bad("era"),
    };
    Ok(ServerRecord {
        counter,
        boot_id,
        epoch_seen: Epoch { number, holder },
        era,
        last_primary: r.u64()?,
        was_primary: r.flag("was_primary")?,
        clean: r.flag("clean")?,
    })
}

fn decode_copy(r: &mut Reader<'_>) -> Field<CopyRecord> {
    let pair = PairId(r.u128()?);
    let volume = VolumeId(r.u128()?);
    let size_bytes = r.u64()?;
    let block_bytes = r.u32()?;
    let sector_bytes = r.u32()?;
    let generation = Generation(r.u128()?);
    let base = Generation(r.u128()?);
    let state = r.u8()?;
    let toward = Generation(r.u128()?);
    let state = match state {
        0 => CopyState::Blank,
        1 => CopyState::UpToDate,
        2 => CopyState::Outdated,
        3 => CopyState::Inconsistent { toward },
        4 => CopyState::Failed,
        _ => return bad("copy state"),
    };
    let unproven = r.flag("unproven")?;
    let proven = Proven { epoch: r.u64()?, seq: Sequence(r.u64()?) };
    let origin = match r.u8()? {
        0 => Origin::Created,
        1 => Origin::Solo,
        2 => Origin::Forced,
        _ => return bad("origin"),
    };
    let length = usize::from(r.u8()?);
    if length > HISTORY_MAX {
        return bad("history");
    }
    let history = (0..length).map(|_| r.u128().map(Generation)).collect::<Field<Vec<_>>>()?;
    Ok(CopyRecord {
        pair,
        volume,
        size_bytes,
        block_bytes,
        sector_bytes,
        generation,
        history,
        base,
        state,
        unproven,
        proven,
        origin,
    })
}

/// The placement must have room for a volume of the copy's size (it was made for the capacity of the
/// backing, which may be greater), without overlap.
fn check_geometry(superblock: &Superblock) -> Field<()> {
    let (place, copy) = (&superblock.placement, &superblock.copy);
    if !copy.block_bytes.is_power_of_two() || !(512..=1 << 20).contains(&copy.block_bytes) {
        return bad("block_bytes");
    }
    if copy.sector_bytes != 512 && copy.sector_bytes != 4096 {
        return bad("sector_bytes");
    }
    if copy.size_bytes > VOLUME_MAX_BYTES {
        return bad("size_bytes");
    }
    let needed = MetaPlacement::for_size(copy.size_bytes, copy.block_bytes, place.log_slots);
    if place.log_slots != needed.log_slots || place.log_offset_bytes != needed.log_offset_bytes {
        return bad("log slots");
    }
    let block = BLOCK_LEN as u64;
    let summary_end = place
        .summary_blocks
        .checked_mul(block)
        .and_then(|length| length.checked_add(place.summary_offset_bytes));
    if place.summary_offset_bytes != needed.summary_offset_bytes
        || place.summary_blocks < needed.summary_blocks
        || summary_end != Some(place.pages_offset_bytes)
    {
        return bad("summary");
    }
    let limit = MetaPlacement::for_size(VOLUME_MAX_BYTES, 512, place.log_slots).pages;
    if place.pages < needed.pages || place.pages > limit || place.summary_blocks > limit {
        return bad("pages");
    }
    Ok(())
}

/// The counter the next write must bear: greater than that of any intact sector of either slot.
pub fn next_counter(slot0: &[u8], slot1: &[u8]) -> u64 {
    let mut newest = 0;
    for (slot, bytes) in [(0, slot0), (1, slot1)] {
        for number in 0..SECTORS {
            if let SectorState::Intact { counter } = seal(slot).sector(bytes, number) {
                newest = newest.max(counter);
            }
        }
    }
    newest.saturating_add(1)
}

/// The superblock in force, from the bytes of both slots.
pub fn select(slot0: &[u8], slot1: &[u8]) -> Result<Selected, SuperblockError> {
    let newest = [(0_u8, slot0), (1, slot1)]
        .into_iter()
        .filter_map(|(slot, bytes)| seal(slot).open(bytes).map(|(counter, payload)| (counter, slot, payload)))
        .max_by_key(|(counter, slot, _)| (*counter, *slot));
    if let Some((_, slot, payload)) = newest {
        let superblock = decode(&payload)?;
        return Ok(Selected { superblock, slot, next_counter: next_counter(slot0, slot1) });
    }
    if slot0.iter().chain(slot1).all(|&byte| byte == 0) {
        return Err(SuperblockError::Blank);
    }
    let ours = [(0, slot0), (1, slot1)].into_iter().any(|(slot, bytes)| {
        bytes.starts_with(&MAGIC)
            || (0..SECTORS)
                .any(|number| matches!(seal(slot).sector(bytes, number), SectorState::Intact { .. }))
    });
    Err(if ours { SuperblockError::Torn } else { SuperblockError::Foreign })
}

#[cfg(test)]
#[path = "superblock_tests.rs"]
mod tests;
