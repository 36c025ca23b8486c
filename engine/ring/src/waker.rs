//! Waking a volume thread from outside.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;

/// Makes the ring's [`turn`](crate::Ring::turn) return. Cheap to clone; usable from any thread; wakes that
/// come before the thread looks are merged into one.
#[derive(Clone, Debug)]
pub struct Waker {
    eventfd: Arc<OwnedFd>,
}

impl Waker {
    pub(crate) fn new() -> Result<Self, Errno> {
        // Blocking on purpose: a ring's read of a non-blocking eventfd ends with EAGAIN at once.
        let eventfd = eventfd(0, EventfdFlags::CLOEXEC)?;
        Ok(Self { eventfd: Arc::new(eventfd) })
    }

    /// Makes the current `turn`, or the next one, return. Never blocks: the counter would have to reach 2^64.
    pub fn wake(&self) {
        loop {
            match rustix::io::write(self.eventfd.as_fd(), &1u64.to_ne_bytes()) {
                Err(Errno::INTR) => {}
                // An eventfd that we hold open takes a count of one.
                Ok(_) | Err(_) => return,
            }
        }
    }

    pub(crate) fn as_raw_fd(&self) -> std::os::fd::RawFd {
        std::os::fd::AsRawFd::as_raw_fd(&*self.eventfd)
    }
}
