//! Why a ring could not be made or used.

use std::fs;

pub use rustix::io::Errno;

/// Why a ring could not be made or turned.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum RingError {
    /// The kernel or a filter forbids io_uring.
    #[error(
        "io_uring is not allowed here (EPERM; kernel.io_uring_disabled is {sysctl}): \
         set it with `sysctl kernel.io_uring_disabled=0`, or allow io_uring_setup, io_uring_enter and \
         io_uring_register in the system-call filter of the service or container"
    )]
    Forbidden {
        /// The value of the setting, or why it could not be read.
        sysctl: String,
    },
    /// The kernel has no io_uring, or a filter hides it.
    #[error(
        "this kernel does not offer io_uring (ENOSYS; kernel.io_uring_disabled is {sysctl}): \
         Linux 6.1 or newer with CONFIG_IO_URING is needed; in a container, allow io_uring_setup, \
         io_uring_enter and io_uring_register in its system-call filter"
    )]
    Missing {
        /// The value of the setting, or why it could not be read.
        sysctl: String,
    },
    /// The kernel does not know the flags we need.
    #[error(
        "this kernel's io_uring is too old (EINVAL): Linux 6.1 or newer is needed \
         (single issuer, deferred task work)"
    )]
    TooOld,
    /// No memory, or the limit on locked memory.
    #[error(
        "no memory for an io_uring of {entries} entries (ENOMEM): free memory, or raise the locked-memory \
         limit (LimitMEMLOCK= in the unit, `ulimit -l` in a shell)"
    )]
    NoMemory {
        /// Entries asked for.
        entries: u32,
    },
    /// Too many open files.
    #[error("no file descriptor left for an io_uring ({0}): raise the limit (LimitNOFILE= in the unit)")]
    NoDescriptor(Errno),
    /// Another step of making the ring failed.
    #[error("making the io_uring failed in {step}: {errno}")]
    Setup {
        /// The system call.
        step: &'static str,
        /// Its error.
        errno: Errno,
    },
    /// The ring belongs to another thread.
    #[error("the ring was turned first by another thread and belongs to it")]
    WrongThread,
    /// `io_uring_enter` failed in a way that waiting does not mend.
    #[error("io_uring_enter failed: {0}")]
    Enter(Errno),
    /// The kernel dropped completions: operations in flight are in an unknown state.
    #[error(
        "the kernel ran out of memory and dropped completions: the state of the operations in flight is unknown"
    )]
    CompletionsLost,
}

impl RingError {
    /// The refusal for an error of `io_uring_setup`. `sysctl` is what [`disabled_setting`] said.
    pub(crate) fn refusal(errno: Errno, entries: u32, sysctl: String) -> Self {
        match errno {
            Errno::PERM | Errno::ACCESS => Self::Forbidden { sysctl },
            Errno::NOSYS => Self::Missing { sysctl },
            Errno::INVAL => Self::TooOld,
            Errno::NOMEM => Self::NoMemory { entries },
            Errno::MFILE | Errno::NFILE => Self::NoDescriptor(errno),
            other => Self::Setup { step: "io_uring_setup", errno: other },
        }
    }
}

/// The value of `kernel.io_uring_disabled`, for an operator.
pub(crate) fn disabled_setting() -> String {
    match fs::read_to_string("/proc/sys/kernel/io_uring_disabled") {
        Ok(text) => text.trim().to_owned(),
        Err(_) => "not readable".to_owned(),
    }
}

/// An I/O error's errno; errors without one become EIO.
pub(crate) fn errno_of(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_forbidden_ring_names_the_setting_and_its_value() {
        let text = RingError::refusal(Errno::PERM, 1024, "2".to_owned()).to_string();
        assert!(text.contains("kernel.io_uring_disabled is 2"), "{text}");
        assert!(text.contains("sysctl kernel.io_uring_disabled=0"), "{text}");
        assert!(text.contains("system-call filter"), "{text}");
    }

    #[test]
    fn a_missing_ring_names_the_kernel_and_the_setting() {
        let text = RingError::refusal(Errno::NOSYS, 1024, "not readable".to_owned()).to_string();
        assert!(text.contains("kernel.io_uring_disabled is not readable"), "{text}");
        assert!(text.contains("Linux 6.1"), "{text}");
    }

    #[test]
    fn each_refusal_says_its_own_fix() {
        assert_eq!(RingError::refusal(Errno::INVAL, 8, String::new()), RingError::TooOld);
        let memory = RingError::refusal(Errno::NOMEM, 8, String::new());
        assert_eq!(memory, RingError::NoMemory { entries: 8 });
        assert!(memory.to_string().contains("LimitMEMLOCK"));
        let files = RingError::refusal(Errno::MFILE, 8, String::new());
        assert!(files.to_string().contains("LimitNOFILE"));
        let other = RingError::refusal(Errno::NODEV, 8, String::new());
        assert_eq!(other, RingError::Setup { step: "io_uring_setup", errno: Errno::NODEV });
    }
}
