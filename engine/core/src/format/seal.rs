//! Sealed blocks: how every metadata block shows whether it was written whole.
//!
//! A block is 4096 bytes, 8 sectors of 512. Each sector is 496 bytes of payload and a trailer of 16:
//! the counter of the write (u64), a CRC-32 (u32), and 4 zero bytes. The CRC covers payload, counter,
//! and the block's place: kind, index, sector, instance of the volume, life. So a sector of another
//! block, volume or life never passes, and a torn write (any subset of its sectors landed) shows as
//! sectors with different counters.

/// Bytes of a block.
pub const BLOCK_LEN: usize = 4096;
/// Bytes of a sector: the unit a disk writes whole or not at all.
pub const SECTOR_LEN: usize = 512;
/// Sectors of a block.
pub const SECTORS: usize = BLOCK_LEN / SECTOR_LEN;
/// Payload bytes of a sector.
pub const SECTOR_PAYLOAD_LEN: usize = 496;
/// Payload bytes of a block.
pub const PAYLOAD_LEN: usize = SECTOR_PAYLOAD_LEN * SECTORS;

/// What a block is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Superblock slot.
    Superblock,
    /// Slot of the activity log's ring.
    Log,
    /// Page of the dirty map.
    Page,
    /// Block of the map's summary.
    Summary,
}

impl Kind {
    const fn code(self) -> u8 {
        match self {
            Self::Superblock => 1,
            Self::Log => 2,
            Self::Page => 3,
            Self::Summary => 4,
        }
    }
}

/// A block's place: what its checksums are bound to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Seal {
    /// What it is.
    pub kind: Kind,
    /// Its number among its kind.
    pub index: u64,
    /// Instance of the volume's metadata; 0 in a superblock, which is read before it is known.
    pub instance: u128,
    /// Life of the activity log; 0 in all other kinds.
    pub life: u64,
}

/// What one sector is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SectorState {
    /// All zero: never written.
    Empty,
    /// Written whole, by the write of this counter.
    Intact {
        /// Of the write.
        counter: u64,
    },
    /// Anything else: damaged, or of another place.
    Damaged,
}

impl Seal {
    fn checksum(&self, sector: &[u8], number: usize) -> u32 {
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&sector[..SECTOR_PAYLOAD_LEN + 8]);
        hasher.update(&sector[SECTOR_PAYLOAD_LEN + 12..SECTOR_LEN]);
        let mut place = [0_u8; 34];
        place[0] = self.kind.code();
        place[1] = u8::try_from(number).unwrap_or(u8::MAX);
        place[2..10].copy_from_slice(&self.index.to_le_bytes());
        place[10..26].copy_from_slice(&self.instance.to_le_bytes());
        place[26..34].copy_from_slice(&self.life.to_le_bytes());
        hasher.update(&place);
        hasher.finalize()
    }

    /// The block with this payload (shorter ones are filled with zeroes, at most [`PAYLOAD_LEN`] count).
    pub fn seal(&self, payload: &[u8], counter: u64) -> Vec<u8> {
        let mut block = vec![0_u8; BLOCK_LEN];
        let mut pieces = payload.chunks(SECTOR_PAYLOAD_LEN);
        for (number, sector) in block.chunks_exact_mut(SECTOR_LEN).enumerate() {
            if let Some(piece) = pieces.next() {
                sector[..piece.len()].copy_from_slice(piece);
            }
            sector[SECTOR_PAYLOAD_LEN..SECTOR_PAYLOAD_LEN + 8].copy_from_slice(&counter.to_le_bytes());
            let crc = self.checksum(sector, number);
            sector[SECTOR_PAYLOAD_LEN + 8..SECTOR_PAYLOAD_LEN + 12].copy_from_slice(&crc.to_le_bytes());
        }
        block
    }

    /// State of sector `number` of a block; a block of the wrong length is damaged.
    pub fn sector(&self, block: &[u8], number: usize) -> SectorState {
        if block.len() != BLOCK_LEN || number >= SECTORS {
            return SectorState::Damaged;
        }
        let sector = &block[number * SECTOR_LEN..(number + 1) * SECTOR_LEN];
        if sector.iter().all(|&byte| byte == 0) {
            return SectorState::Empty;
        }
        let counter = read_u64(sector, SECTOR_PAYLOAD_LEN);
        let mut crc = [0_u8; 4];
        crc.copy_from_slice(&sector[SECTOR_PAYLOAD_LEN + 8..SECTOR_PAYLOAD_LEN + 12]);
        if u32::from_le_bytes(crc) == self.checksum(sector, number) {
            SectorState::Intact { counter }
        } else {
            SectorState::Damaged
        }
    }

    /// Counter and payload of a block written whole; `None` for any other.
    pub fn open(&self, block: &[u8]) -> Option<(u64, Vec<u8>)> {
        let SectorState::Intact { counter } = self.sector(block, 0) else { return None };
        for number in 1..SECTORS {
            if self.sector(block, number) != (SectorState::Intact { counter }) {
                return None;
            }
        }
        Some((counter, payload(block)))
    }
}

/// The payload bytes of sector `number`; the block has its length.
pub fn sector_payload(block: &[u8], number: usize) -> &[u8] {
    &block[number * SECTOR_LEN..number * SECTOR_LEN + SECTOR_PAYLOAD_LEN]
}

/// The payload of a block without any check.
fn payload(block: &[u8]) -> Vec<u8> {
    (0..SECTORS).flat_map(|number| sector_payload(block, number).iter().copied()).collect()
}

pub(crate) fn read_u64(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0_u8; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place() -> Seal {
        Seal { kind: Kind::Page, index: 7, instance: 99, life: 0 }
    }

    #[test]
    fn a_sealed_block_opens_and_bears_its_counter() {
        let payload: Vec<u8> = (0..PAYLOAD_LEN).map(|i| u8::try_from(i % 251).expect("small")).collect();
        let block = place().seal(&payload, 12);
        assert_eq!(place().open(&block), Some((12, payload)));
    }

    #[test]
    fn another_place_does_not_open_it() {
        let block = place().seal(&[1], 12);
        for other in [
            Seal { kind: Kind::Summary, ..place() },
            Seal { index: 8, ..place() },
            Seal { instance: 98, ..place() },
            Seal { life: 1, ..place() },
        ] {
            assert_eq!(other.sector(&block, 0), SectorState::Damaged);
            assert_eq!(other.open(&block), None);
        }
    }

    #[test]
    fn every_flipped_bit_shows() {
        let block = place().seal(&[5; 100], 3);
        for byte in 0..SECTOR_LEN {
            let mut broken = block.clone();
            broken[byte] ^= 1 << (byte % 8);
            assert_eq!(place().sector(&broken, 0), SectorState::Damaged, "byte {byte}");
        }
    }

    #[test]
    fn a_mix_of_two_writes_does_not_open() {
        let old = place().seal(&[1; PAYLOAD_LEN], 3);
        let new = place().seal(&[2; PAYLOAD_LEN], 4);
        for pattern in 1_u32..255 {
            let mut mix = old.clone();
            for number in (0..SECTORS).filter(|n| pattern & (1 << n) != 0) {
                let at = number * SECTOR_LEN..(number + 1) * SECTOR_LEN;
                mix[at.clone()].copy_from_slice(&new[at]);
            }
            assert_eq!(place().open(&mix), None);
        }
    }

    #[test]
    fn wrong_lengths_are_damaged() {
        assert_eq!(place().sector(&[0; 512], 0), SectorState::Damaged);
        assert_eq!(place().open(&[]), None);
        assert_eq!(place().sector(&[0; BLOCK_LEN], 0), SectorState::Empty);
    }
}
