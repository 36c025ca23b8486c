//! Every bound in one place, with its reason.

/// Most bytes one client request may carry. FUSE's largest request with 256 pages; NBD clients are told.
pub const REQUEST_MAX_BYTES: u64 = 1 << 20;
/// Longest zero or discard in one piece; frontends cut longer ones. Nine extents of the activity log.
pub const ZERO_MAX_BYTES: u64 = 32 << 20;
/// Most bytes of holes that a resync has on their way to the target, in one range or several: only a target that showed
/// itself quick gets so many, any other `ZERO_MAX_BYTES`. A client's write to a hole waits until it is zeroed: 2.6 s on
/// a disk that writes 100 MB/s of zeroes. The stall time of 10 s is reached by one that took 128 MiB within 20 ms and
/// then writes less than 27 MB/s, and from the first range on by one below 3.4 MB/s.
pub const COPY_ZERO_MAX_BYTES: u64 = 256 << 20;
/// Default dirty-map granularity.
pub const BLOCK_BYTES: u32 = 4096;
/// Activity-log granularity.
pub const EXTENT_BYTES: u64 = 4 << 20;
/// Requests in flight a volume accepts; more wait in the frontend.
pub const REQUESTS_MAX: usize = 2048;
/// Generations remembered; an older common ancestor is `unrelated` (D8).
pub const HISTORY_MAX: usize = 16;
/// One copy chunk of a resync. 256 KiB at 16 in flight fills a link and a disk (measured, see benches).
pub const COPY_CHUNK_BYTES: u64 = 256 << 10;
/// Copy chunks in flight.
pub const COPY_CHUNKS_MAX: usize = 16;
/// Unreadable blocks healed from the peer before the copy is latched as failed.
pub const BAD_BLOCKS_MAX: u32 = 64;
/// Volumes of one server.
pub const VOLUMES_MAX: usize = 1024;
/// Data area of a backing with internal metadata begins here.
pub const DATA_OFFSET_BYTES: u64 = 1 << 20;
/// Volume sizes are rounded down to this.
pub const SIZE_ALIGN_BYTES: u64 = 4 << 20;
/// Largest volume.
pub const VOLUME_MAX_BYTES: u64 = 64 << 40;
