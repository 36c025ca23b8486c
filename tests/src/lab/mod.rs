//! The laboratory: real servers on one machine. A server is a process tree in a PID, mount and network namespace of
//! its own, its disks are loop devices, some over a disk that fails, is slow or loses what was not flushed.
//!
//! Nothing here shares code with the product: it starts the program, talks NBD to it, and reads both backings itself.

pub mod copies;
pub mod disk;
pub mod filesystem;
pub mod filework;
pub mod history;
pub mod host;
pub mod loopdev;
pub mod nbd;
pub mod netns;
pub mod pair;
pub mod postgres;
pub mod relay;
pub mod ringload;
pub mod seed;
pub mod server;
pub mod space;
pub mod system;
pub mod wait;
pub mod writer;

pub use disk::FaultyDisk;
pub use host::Host;
pub use loopdev::LoopDevice;
pub use netns::NetNs;
pub use pair::{DiskKind, Pair, PairOptions};
pub use relay::Relay;
pub use seed::Seed;
pub use server::Server;
pub use space::Space;

/// Whether an error tells of data: copies that differ, or a block that breaks a promise. Whatever else went wrong tells
/// nothing of them.
pub fn is_wrong_data(error: &anyhow::Error) -> bool {
    error.downcast_ref::<history::Broken>().is_some() || error.downcast_ref::<copies::Unequal>().is_some()
}

/// Whether this process may build the lab; if not, why. Tests print `SKIPPED: reason` and return.
pub fn unavailable() -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("the lab needs root (namespaces, loop devices, mounts)".to_owned());
    }
    for device in ["/dev/fuse", "/dev/loop-control"] {
        if !std::path::Path::new(device).exists() {
            return Some(format!("the lab needs {device}"));
        }
    }
    None
}
