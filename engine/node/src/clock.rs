//! CLOCK_BOOTTIME: goes on while the machine sleeps, never jumps with the wall clock.

use duplex_core::time::Instant;
use rustix::time::{ClockId, clock_gettime};

/// The present moment.
pub fn now() -> Instant {
    let time = clock_gettime(ClockId::Boottime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    let nanos = u64::try_from(time.tv_nsec).unwrap_or(0);
    Instant(seconds * 1_000_000_000 + nanos)
}
