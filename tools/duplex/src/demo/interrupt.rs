//! Ctrl-C and its relatives: noted by the handler, seen at the next look, so that the tidying always runs.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Result, bail};

static ASKED: AtomicBool = AtomicBool::new(false);
static TIDYING: AtomicBool = AtomicBool::new(false);

const SIGNALS: [libc::c_int; 4] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT];

extern "C" fn note(_: libc::c_int) {
    ASKED.store(true, Ordering::Relaxed);
}

/// From now on the signals that end programs are noted.
pub(crate) fn watch() {
    let handler: extern "C" fn(libc::c_int) = note;
    for signal in SIGNALS {
        // SAFETY: the handler does nothing but store into an atomic, which is allowed in a signal handler.
        unsafe { libc::signal(signal, handler as libc::sighandler_t) };
    }
}

/// From now on nothing interrupts: what was made is being taken away.
pub(crate) fn begin_tidying() {
    TIDYING.store(true, Ordering::Relaxed);
}

/// Fails once the user asked to stop.
pub(crate) fn check() -> Result<()> {
    if ASKED.load(Ordering::Relaxed) && !TIDYING.load(Ordering::Relaxed) {
        bail!("interrupted");
    }
    Ok(())
}
