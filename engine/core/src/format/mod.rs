//! Bytes on disk: what stands where, checksummed, versioned. Pure functions between structs and bytes.
//! Drawn in `docs/on-disk-format.md`.

pub mod log_block;
pub mod map_page;
pub mod placement;
pub mod record;
pub mod seal;
pub mod superblock;
