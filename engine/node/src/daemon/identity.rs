//! Who this process is: boot id, incarnation, seeds.

use duplex_core::ids::{BootId, Incarnation};

/// Where the kernel tells its boot id.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// The kernel's boot id.
///
/// # Errors
/// `/proc` is not mounted, or what stands there is no id.
pub(super) fn boot_id() -> Result<BootId, String> {
    let text = std::fs::read_to_string(BOOT_ID).map_err(|error| format!("cannot read {BOOT_ID}: {error}"))?;
    let digits: String = text.trim().chars().filter(|c| *c != '-').collect();
    digits.parse().map_err(|_| format!("{BOOT_ID}: {:?} is no boot id", text.trim()))
}

/// A new identity for this process.
pub(super) fn incarnation() -> Incarnation {
    Incarnation(rand::random::<u128>().max(1))
}

/// The seed of the ids the core draws.
pub(super) fn seed() -> u128 {
    rand::random()
}
