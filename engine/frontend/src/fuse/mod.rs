//! The volume as the one file of a FUSE file system, which a loop device turns into a block device.
//!
//! [`FuseMount`] makes the file system, detached: it is in nobody's tree of files, so nothing but the loop device
//! keeps it. [`FuseDevice`] serves it on the volume's ring. The requests of a process that died wait in the kernel
//! as long as somebody keeps the `/dev/fuse` descriptor (see [`crate::holder`]); its successor has them sent again.

mod device;
mod entries;
mod mount;
pub mod protocol;

pub use device::{FuseConfig, FuseDevice, FuseEnd, FuseStats, Service};
pub use mount::{Connection, FuseError, FuseMount, connection_is_alive};
