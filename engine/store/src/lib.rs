//! Backing devices: claiming, sizes, asynchronous and synchronous I/O, and what is already on them.
//!
//! A [`Backing`] is a claimed file, block device or loop device (with an optional metadata file of its own). On it
//! work, one at a time, a [`MetaIo`] (synchronous: `create`, `dump`, `compare`, the first look at a superblock) and a
//! [`Store`] (the volume thread's operations on its ring). [`probe`](mod@probe) tells what a device holds before anything is
//! written to it, [`usage`] who uses it.
//!
//! # What keeps a backing claimed after its daemon was killed
//!
//! The claim (`O_EXCL`, the OFD lock) lives as long as the *open file*, and that is kept by every descriptor of it and by
//! every operation in flight on it. Measured with a process killed by SIGKILL in the middle of 32 writes (loop device on ext4 and
//! on FUSE, regular file; alone and as a namespace's init; 6.18):
//!
//! - `waitpid` returns after about 1 ms, the claim goes after 10 to 80 ms: the killed ring is taken down by a kernel worker that looks again
//!   every 50 ms. An idle ring lets go at once. Registered files, pending reads of pipes, sockets and event descriptors and
//!   multishot operations change nothing: they are cancelled.
//! - An operation that the device does not answer keeps the claim until it answers or the device goes away: with a FUSE server
//!   stopped for 2 s it was 2 s. Nothing in userspace can shorten that.
//! - A child forked without exec keeps it for its whole life. So every descriptor here is close-on-exec, and a process that
//!   must outlive the daemon has to be started by fork *and* exec, before the backing is opened or with nothing inherited.
//!
//! Therefore [`Backing::open`] tries again for [`BackingConfig::wait`] when nobody permanent (a mount, a holder, swap) is in sight.

mod backing;
mod error;
mod geometry;
mod holes;
mod meta_io;
mod placement;
pub mod probe;
mod slot;
mod store;
pub mod usage;

pub use backing::{Access, Backing, BackingConfig, WAIT_DEFAULT, create_metadata_file};
pub use error::StoreError;
pub use geometry::Geometry;
pub use meta_io::MetaIo;
pub use placement::{Placement, PlacementError};
pub use store::{Failure, META_MAX_BYTES, OPERATIONS_MAX, Store, StoreEvent};
