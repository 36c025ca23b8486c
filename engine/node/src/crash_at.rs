//! Test builds only (`--features crash-at`): the process stops dead at a named boundary of the core, so that a driver can
//! see what is left of the pair. In every other build the questions below are empty functions.

#[cfg(feature = "crash-at")]
pub use armed::{CrashAt, How, arm};
#[cfg(feature = "crash-at")]
pub(crate) use armed::{begins, ended, log_write_is_lost, reached};
#[cfg(not(feature = "crash-at"))]
pub(crate) use product::{begins, ended, log_write_is_lost, reached};

#[cfg(not(feature = "crash-at"))]
mod product {
    use duplex_core::boundary::Boundary;
    use duplex_core::ids::DiskOpId;
    use duplex_core::request::DiskOp;

    /// Nothing stops here.
    #[inline(always)]
    pub(crate) fn reached(_: impl FnOnce() -> Option<Boundary>) {}

    /// Every operation is carried out whole.
    #[inline(always)]
    pub(crate) fn begins(_: &mut DiskOp, _: impl FnOnce(&DiskOp) -> Option<Boundary>) {}

    /// Nothing stops here.
    #[inline(always)]
    pub(crate) const fn ended(_: DiskOpId) {}

    /// Every write is carried out.
    #[inline(always)]
    pub(crate) const fn log_write_is_lost(_: &DiskOp) -> bool {
        false
    }
}

#[cfg(feature = "crash-at")]
mod armed {
    use std::cell::Cell;
    use std::io::Write as _;
    use std::path::PathBuf;
    use std::str::FromStr;
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU64, Ordering};

    use duplex_core::boundary::Boundary;
    use duplex_core::ids::DiskOpId;
    use duplex_core::limits::DATA_OFFSET_BYTES;
    use duplex_core::request::{DiskOp, DiskOpKind};
    use rustix::process::{Signal, getpid, kill_process};

    /// First byte of the activity log in the metadata area: behind two superblocks.
    const LOG_BEGIN_BYTES: u64 = 8192;

    static CRASH: OnceLock<CrashAt> = OnceLock::new();
    static PASSED: AtomicU64 = AtomicU64::new(0);

    thread_local! {
        /// The flush after which this volume's thread ends the process.
        static FLUSHING: Cell<Option<DiskOpId>> = const { Cell::new(None) };
    }

    /// What the process does at the boundary.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub enum How {
        /// It kills itself.
        Kill,
        /// It stops itself: the driver cuts its power.
        Stop,
    }

    impl FromStr for How {
        type Err = String;

        fn from_str(text: &str) -> Result<Self, String> {
            match text {
                "kill" => Ok(Self::Kill),
                "stop" => Ok(Self::Stop),
                other => Err(format!("{other:?}: `kill` or `stop`")),
            }
        }
    }

    /// Where and how to stop.
    #[derive(Clone, PartialEq, Eq, Debug)]
    pub struct CrashAt {
        /// Where, and which time, from 1.
        pub at: Option<(Boundary, u64)>,
        /// How.
        pub how: How,
        /// Times count only while this file is there.
        pub armed_by: Option<PathBuf>,
        /// Made at the boundary, just before the end.
        pub marker: Option<PathBuf>,
        /// Blocks of the activity log are acknowledged and not written: a crash test must notice.
        pub lose_log_writes: bool,
    }

    impl CrashAt {
        /// `NAME` or `NAME@TIMES`.
        ///
        /// # Errors
        /// In words, with every name there is.
        pub fn parse_place(text: &str) -> Result<(Boundary, u64), String> {
            let (name, times) = text.split_once('@').unwrap_or((text, "1"));
            let boundary = name.parse::<Boundary>().map_err(|error| error.to_string())?;
            let times = times.parse().ok().filter(|times| *times > 0);
            let times = times.ok_or_else(|| format!("{text:?}: after @ comes which time, from 1"))?;
            Ok((boundary, times))
        }

        fn is_armed(&self) -> bool {
            self.armed_by.as_ref().is_none_or(|path| path.exists())
        }

        /// Counts this time.
        fn is_the_time(&self) -> bool {
            self.at.is_some_and(|(_, times)| PASSED.fetch_add(1, Ordering::Relaxed) + 1 == times)
        }

        fn end(&self, boundary: Boundary) -> ! {
            if let Some(path) = &self.marker {
                let told =
                    std::fs::File::create(path).and_then(|mut file| writeln!(file, "{}", boundary.name()));
                if let Err(error) = told {
                    eprintln!("{}: {error}", path.display());
                }
            }
            let signal = match self.how {
                How::Kill => Signal::KILL,
                How::Stop => Signal::STOP,
            };
            loop {
                let _ = kill_process(getpid(), signal);
                std::thread::park();
            }
        }
    }

    /// Arms the process, once, at its start.
    pub fn arm(crash: CrashAt) {
        let _ = CRASH.set(crash);
    }

    /// The shell stands at a boundary: ends here if this is the one.
    pub(crate) fn reached(place: impl FnOnce() -> Option<Boundary>) {
        let Some(crash) = CRASH.get() else { return };
        let Some((wanted, _)) = crash.at else { return };
        if place() == Some(wanted) && crash.is_armed() && crash.is_the_time() {
            crash.end(wanted);
        }
    }

    /// A disk operation begins. If the process is to end between a record's flush and its write, the flush becomes the
    /// whole of the operation.
    pub(crate) fn begins(op: &mut DiskOp, place: impl FnOnce(&DiskOp) -> Option<Boundary>) {
        let Some(crash) = CRASH.get() else { return };
        let Some((wanted, _)) = crash.at else { return };
        let between = place(op).and_then(Boundary::between_flush_and_write);
        if between == Some(wanted) && crash.is_armed() && crash.is_the_time() {
            op.kind = DiskOpKind::Flush;
            FLUSHING.set(Some(op.id));
        }
    }

    /// A disk operation of this thread ended: ends here if it was that flush.
    pub(crate) fn ended(id: DiskOpId) {
        if let Some(crash) = CRASH.get()
            && let Some((wanted, _)) = crash.at
            && FLUSHING.get() == Some(id)
        {
            crash.end(wanted);
        }
    }

    /// A block of the activity log, in a process that loses them.
    pub(crate) fn log_write_is_lost(op: &DiskOp) -> bool {
        let lose = CRASH.get().is_some_and(|crash| crash.lose_log_writes);
        let DiskOpKind::MetaWrite { offset_bytes, .. } = &op.kind else { return false };
        lose && (LOG_BEGIN_BYTES..DATA_OFFSET_BYTES).contains(offset_bytes)
    }
}
