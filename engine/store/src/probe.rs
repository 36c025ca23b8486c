//! What a device or file already holds, so that `create` destroys nothing by accident.

use std::fmt;
use std::path::Path;

use duplex_core::format::superblock;

use crate::backing::{Access, BackingConfig};
use crate::error::StoreError;
use crate::meta_io::MetaIo;
use crate::usage::{self, Use};

/// How much of each end is looked at.
pub const WINDOW_BYTES: u64 = 1 << 20;

/// Something found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Finding {
    /// A known signature.
    Signature {
        /// Such as `ext4`.
        what: &'static str,
        /// Where.
        offset_bytes: u64,
    },
    /// No known signature, but something else than zeroes.
    Content {
        /// First byte that is not zero.
        offset_bytes: u64,
    },
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Signature { what, offset_bytes } => write!(f, "{what} (at byte {offset_bytes})"),
            Self::Content { offset_bytes } => write!(f, "data of unknown kind (at byte {offset_bytes})"),
        }
    }
}

/// What a path holds and who uses it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Report {
    /// Signatures; or, without any, the first byte that is not zero.
    pub findings: Vec<Finding>,
    /// Mounts, swap, holders, loop devices, `/etc/fstab`, processes.
    pub uses: Vec<Use>,
}

impl Report {
    /// True when nothing is lost by writing to it: both ends read as zeroes and nobody uses it.
    pub const fn is_blank(&self) -> bool {
        self.findings.is_empty() && self.uses.is_empty()
    }
}

/// Looks at both ends of a device or file, without claiming it.
pub fn probe(path: &Path) -> Result<Report, StoreError> {
    let config = BackingConfig { data: path.to_owned(), metadata: None, wait: std::time::Duration::ZERO };
    let uses = usage::find(path);
    let mut io = MetaIo::open(&config, Access::ReadShared)?;
    Ok(Report { findings: probe_open(&mut io)?, uses })
}

/// Looks at both ends of an open backing, whatever its placement says.
pub fn probe_open(io: &mut MetaIo) -> Result<Vec<Finding>, StoreError> {
    let geometry = io.geometry();
    let sector = u64::from(geometry.sector_bytes);
    // A file's odd last bytes belong to no sector and are never written.
    let size = geometry.backing_bytes / sector * sector;
    let window = size.min(WINDOW_BYTES);
    let mut head = vec![0; window as usize];
    let mut tail = vec![0; window as usize];
    io.read_raw(0, &mut head)?;
    io.read_raw(size - window, &mut tail)?;
    Ok(recognise(&head, &tail, size))
}

/// Where a signature is looked for.
#[derive(Clone, Copy)]
enum At {
    /// From the first byte.
    Start(usize),
    /// Before the last byte.
    End(usize),
    /// In the last whole 64 KiB but one of the size (md 0.90).
    Md090,
}

struct Signature {
    what: &'static str,
    at: At,
    magic: &'static [u8],
}

const fn start(what: &'static str, offset: usize, magic: &'static [u8]) -> Signature {
    Signature { what, at: At::Start(offset), magic }
}

const fn end(what: &'static str, before_end: usize, magic: &'static [u8]) -> Signature {
    Signature { what, at: At::End(before_end), magic }
}

const MD_MAGIC: &[u8] = &0xa92b_4efc_u32.to_le_bytes();
const ZFS_MAGIC: &[u8] = &0x00ba_b10c_u64.to_le_bytes();

const SIGNATURES: &[Signature] = &[
    start("a copy of a volume of duplex, see `duplex dump`", 0, &superblock::MAGIC),
    start(
        "a copy of a volume of duplex, see `duplex dump`",
        superblock::SUPERBLOCK_BYTES,
        &superblock::MAGIC,
    ),
    start("XFS", 0, b"XFSB"),
    start("btrfs", 0x10040, b"_BHRfS_M"),
    start("LUKS", 0, b"LUKS\xba\xbe"),
    start("LUKS (second header)", 0x4000, b"SKUL\xba\xbe"),
    start("bcachefs or bcache", 0x1018, b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81"),
    start("F2FS", 0x400, &0xf2f5_2010_u32.to_le_bytes()),
    start("NTFS", 3, b"NTFS    "),
    start("exFAT", 3, b"EXFAT   "),
    start("FAT", 0x52, b"FAT32   "),
    start("FAT", 0x36, b"FAT16   "),
    start("FAT", 0x36, b"FAT12   "),
    start("ISO 9660", 0x8001, b"CD001"),
    start("squashfs", 0, b"hsqs"),
    start("EROFS", 0x400, &0xe0f5_e1e2_u32.to_le_bytes()),
    start("qcow2 image", 0, b"QFI\xfb"),
    start("swap space", 4096 - 10, b"SWAPSPACE2"),
    start("swap space", 8192 - 10, b"SWAPSPACE2"),
    start("swap space", 16384 - 10, b"SWAPSPACE2"),
    start("swap space", 65536 - 10, b"SWAPSPACE2"),
    start("suspended system in swap space", 4096 - 10, b"S1SUSPEND"),
    start("LVM physical volume", 0, b"LABELONE"),
    start("LVM physical volume", 512, b"LABELONE"),
    start("LVM physical volume", 1024, b"LABELONE"),
    start("LVM physical volume", 1536, b"LABELONE"),
    start("md array member", 0, MD_MAGIC),
    start("md array member", 4096, MD_MAGIC),
    end("md array member", 8192, MD_MAGIC),
    Signature { what: "md array member", at: At::Md090, magic: MD_MAGIC },
    start("GPT partition table", 512, b"EFI PART"),
    start("GPT partition table", 4096, b"EFI PART"),
    end("GPT partition table (backup)", 512, b"EFI PART"),
    end("GPT partition table (backup)", 4096, b"EFI PART"),
    start("ZFS", 128 << 10, ZFS_MAGIC),
    start("ZFS", 132 << 10, ZFS_MAGIC),
    end("DRBD metadata", 4096 - 0x3c, b"\x83\x74\x02"),
];

/// What the first and the last bytes of something of `size_bytes` say. `head` and `tail` are as long as each other, and
/// the same bytes when the whole is not longer than they are.
pub fn recognise(head: &[u8], tail: &[u8], size_bytes: u64) -> Vec<Finding> {
    let mut findings: Vec<Finding> = SIGNATURES
        .iter()
        .filter_map(|signature| {
            let offset_bytes = match signature.at {
                At::Start(offset) => offset as u64,
                At::End(before_end) => size_bytes.checked_sub(before_end as u64)?,
                At::Md090 => (size_bytes / 65536 * 65536).checked_sub(65536)?,
            };
            let found = bytes_at(head, tail, size_bytes, offset_bytes, signature.magic.len())?;
            (found == signature.magic).then_some(Finding::Signature { what: signature.what, offset_bytes })
        })
        .collect();
    findings.extend(ext(head));
    findings.extend(mbr(head));
    if findings.is_empty() {
        findings.extend(first_content(head, tail, size_bytes));
    }
    findings
}

fn bytes_at<'a>(
    head: &'a [u8],
    tail: &'a [u8],
    size_bytes: u64,
    offset: u64,
    len: usize,
) -> Option<&'a [u8]> {
    let tail_start = size_bytes.checked_sub(tail.len() as u64)?;
    let (window, at) = if offset + len as u64 <= head.len() as u64 {
        (head, offset)
    } else {
        (tail, offset.checked_sub(tail_start)?)
    };
    window.get(at as usize..at as usize + len)
}

/// ext2, ext3 and ext4 share a magic; the features tell which.
fn ext(head: &[u8]) -> Option<Finding> {
    let superblock = head.get(1024..2048)?;
    if superblock[0x38..0x3a] != [0x53, 0xef] {
        return None;
    }
    let word = |at: usize| {
        u32::from_le_bytes([superblock[at], superblock[at + 1], superblock[at + 2], superblock[at + 3]])
    };
    let has_journal = word(0x5c) & 0x4 != 0;
    // Extents, 64 bit, flexible groups.
    let is_ext4 = word(0x60) & (0x40 | 0x80 | 0x200) != 0;
    let what = match (is_ext4, has_journal) {
        (true, _) => "ext4",
        (false, true) => "ext3",
        (false, false) => "ext2",
    };
    Some(Finding::Signature { what, offset_bytes: 1024 })
}

/// A boot signature alone also ends a FAT boot sector: only with a used entry is it a partition table.
fn mbr(head: &[u8]) -> Option<Finding> {
    let sector = head.get(..512)?;
    let has_entry = (0..4).map(|entry| 446 + entry * 16).any(|at| {
        let status_valid = sector[at] & 0x7f == 0;
        status_valid && sector[at + 4] != 0 && sector[at + 12..at + 16] != [0; 4]
    });
    (sector[510..] == [0x55, 0xaa] && has_entry)
        .then_some(Finding::Signature { what: "MBR partition table", offset_bytes: 510 })
}

fn first_content(head: &[u8], tail: &[u8], size_bytes: u64) -> Option<Finding> {
    let first = |bytes: &[u8]| bytes.iter().position(|&byte| byte != 0).map(|at| at as u64);
    let offset_bytes = first(head).or_else(|| Some(size_bytes - tail.len() as u64 + first(tail)?))?;
    Some(Finding::Content { offset_bytes })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 8 << 20;
    const WINDOW: usize = WINDOW_BYTES as usize;

    fn with(offset: u64, magic: &[u8]) -> Vec<Finding> {
        let mut head = vec![0; WINDOW];
        let mut tail = vec![0; WINDOW];
        let tail_start = SIZE - WINDOW as u64;
        let (window, at) =
            if offset < tail_start { (&mut head, offset) } else { (&mut tail, offset - tail_start) };
        window[at as usize..at as usize + magic.len()].copy_from_slice(magic);
        recognise(&head, &tail, SIZE)
    }

    #[test]
    fn every_signature_of_the_table_is_found_where_it_belongs() {
        for signature in SIGNATURES {
            let offset_bytes = match signature.at {
                At::Start(offset) => offset as u64,
                At::End(before_end) => SIZE - before_end as u64,
                At::Md090 => SIZE - 65536,
            };
            let expected = Finding::Signature { what: signature.what, offset_bytes };
            assert!(with(offset_bytes, signature.magic).contains(&expected), "{}", signature.what);
        }
    }

    #[test]
    fn zeroes_are_nothing_and_one_byte_is_content() {
        assert_eq!(with(0, &[]), []);
        assert_eq!(with(77, &[1]), [Finding::Content { offset_bytes: 77 }]);
        assert_eq!(with(SIZE - 1, &[1]), [Finding::Content { offset_bytes: SIZE - 1 }]);
    }

    #[test]
    fn a_boot_signature_without_entries_is_no_partition_table() {
        assert_eq!(with(510, &[0x55, 0xaa]), [Finding::Content { offset_bytes: 510 }]);
        let mut entry = [0_u8; 66];
        entry[4] = 0x83;
        entry[12] = 1;
        entry[64..].copy_from_slice(&[0x55, 0xaa]);
        let found = with(446, &entry);
        assert_eq!(found, [Finding::Signature { what: "MBR partition table", offset_bytes: 510 }]);
    }

    #[test]
    fn tiny_things_are_looked_at_whole() {
        let bytes = [0_u8; 512];
        assert_eq!(recognise(&bytes, &bytes, 512), []);
        assert_eq!(recognise(&[], &[], 0), []);
        let mut bytes = [0_u8; 512];
        bytes[511] = 3;
        assert_eq!(recognise(&bytes, &bytes, 512), [Finding::Content { offset_bytes: 511 }]);
    }
}
