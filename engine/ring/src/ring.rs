//! The ring: push, turn, completions.

use std::collections::VecDeque;
use std::ptr;
use std::time::Duration;

use io_uring::types::{CancelBuilder, Fd, Timespec};
use io_uring::{IoUring, cqueue, opcode, squeue};

use crate::error::{Errno, RingError, disabled_setting, errno_of};
use crate::token::{Completion, Owner, Token};
use crate::waker::Waker;

/// Submission entries of a volume's ring unless the caller knows better.
pub const ENTRIES_DEFAULT: u32 = 1024;

const ENTER_GETEVENTS: u32 = 1 << 0;
const ENTER_EXT_ARG: u32 = 1 << 3;
/// Kind of the waker's read among the ring's own operations.
const KIND_WAKE: u16 = 0;
/// Kind of a cancellation among the ring's own operations.
const KIND_CANCEL: u16 = 1;
/// Times in a row that `io_uring_enter` may make no progress before the turn fails.
const FRUITLESS_ENTERS_MAX: u32 = 1000;
/// How long a dropped ring waits for the kernel to cancel what is still in flight.
const DROP_CANCEL_TIMEOUT: Timespec = Timespec::new().sec(1);

/// A prompt operation that is not prompt holds a turn up by at most this.
const PROMPT_WAIT_US: u32 = 1000;

/// A turn that [gathers](Ring::gather) goes on with what there is after this.
const GATHER_WAIT_US: u32 = 60;

/// `struct __kernel_timespec`.
#[repr(C)]
struct KernelTimespec {
    sec: i64,
    nsec: i64,
}

/// `struct io_uring_getevents_arg`.
#[repr(C)]
struct GetEventsArg {
    sigmask: u64,
    sigmask_size: u32,
    min_wait_usec: u32,
    timespec: u64,
}

/// One thread's io_uring. Any thread may make it and push; the first [`turn`](Ring::turn) binds it to its thread.
pub struct Ring {
    uring: IoUring,
    /// Entries that did not fit the submission queue, in order. Bounded by the components' tables.
    backlog: VecDeque<squeue::Entry>,
    waker: Waker,
    /// Where the kernel puts the waker's count. Boxed: it must not move while the read is armed.
    wake_count: Box<u64>,
    wake_armed: bool,
    enabled: bool,
    enters: u64,
    /// Prompt operations queued since the last enter.
    prompt: u32,
    /// Completions the next waiting enter waits for beyond the first.
    gather: u32,
    /// The kernel waits for several completions for a while, and then for one.
    waits_for_several: bool,
    completions_lost: u32,
}

impl Ring {
    /// A ring with `entries` submission entries (rounded up to a power of two by the kernel; 1024 or more for
    /// a volume) and four times as many completion entries.
    pub fn new(entries: u32) -> Result<Self, RingError> {
        let uring = IoUring::builder()
            .setup_r_disabled()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_coop_taskrun()
            .setup_submit_all()
            .setup_clamp()
            .setup_cqsize(entries.saturating_mul(4))
            .dontfork()
            .build(entries)
            .map_err(|error| RingError::refusal(errno_of(&error), entries, disabled_setting()))?;
        let waits_for_several = uring.params().is_feature_min_timeout();
        let waker = Waker::new().map_err(|errno| match errno {
            Errno::MFILE | Errno::NFILE => RingError::NoDescriptor(errno),
            other => RingError::Setup { step: "eventfd", errno: other },
        })?;
        Ok(Self {
            uring,
            backlog: VecDeque::new(),
            waker,
            wake_count: Box::new(0),
            wake_armed: false,
            enabled: false,
            enters: 0,
            prompt: 0,
            gather: 0,
            waits_for_several,
            completions_lost: 0,
        })
    }

    /// Queues an entry; the next [`turn`](Ring::turn) submits it. Never fails: what does not fit the submission
    /// queue waits in order.
    ///
    /// # Safety
    /// Everything the entry points to (buffers, vectors, addresses, descriptors) lives and stays put until its last
    /// completion has been taken out by `turn`. `token.owner` is not `Owner(0)`.
    pub unsafe fn push(&mut self, entry: squeue::Entry, token: Token) {
        debug_assert!(token.owner != Owner::RING, "owner 0 is the ring's own");
        self.enqueue(entry.user_data(token.pack()));
    }

    /// As [`push`](Ring::push), for an operation that as a rule ends while it is submitted and whose end is no news: a
    /// send to a socket with room. A waiting [`turn`](Ring::turn) waits for one completion more than these, instead
    /// of returning with theirs alone.
    ///
    /// # Safety
    /// As [`push`](Ring::push).
    pub unsafe fn push_prompt(&mut self, entry: squeue::Entry, token: Token) {
        self.prompt = self.prompt.saturating_add(1);
        // SAFETY: the caller's, the same.
        unsafe { self.push(entry, token) };
    }

    /// The next waiting [`turn`](Ring::turn) waits for so many completions beyond the first, at most 60 us in all: what
    /// ends soon anyway is then taken in together, by one wake. Only where
    /// [several can be waited for](Ring::waits_for_several).
    pub const fn gather(&mut self, more: u32) {
        self.gather = more;
    }

    /// Asks the kernel to cancel every operation pushed under `token`. Its completion comes as usual (with
    /// `ECANCELED`, or its result when it was faster); the cancellation itself is not shown.
    pub fn cancel(&mut self, token: Token) {
        let entry = opcode::AsyncCancel2::new(CancelBuilder::user_data(token.pack()).all()).build();
        self.enqueue(entry.user_data(Token::new(Owner::RING, KIND_CANCEL, 0).pack()));
    }

    /// Asks the kernel to cancel every operation in flight on the descriptor. Push it before the descriptor is
    /// closed, and close only after the completions have come.
    pub fn cancel_descriptor(&mut self, fd: std::os::fd::RawFd) {
        let entry = opcode::AsyncCancel2::new(CancelBuilder::fd(Fd(fd)).all()).build();
        self.enqueue(entry.user_data(Token::new(Owner::RING, KIND_CANCEL, 0).pack()));
    }

    /// Submits everything queued, waits for at least one completion or the time (`None` = for ever, zero = do not
    /// wait), and appends every completion to `out`. Returns with nothing new in `out` after the time, a wake or a signal.
    pub fn turn(&mut self, wait_for: Option<Duration>, out: &mut Vec<Completion>) -> Result<(), RingError> {
        self.enable()?;
        self.arm_waker();
        let before = out.len();
        let mut woken = self.drain(out);
        let mut fruitless = 0;
        loop {
            self.refill();
            // What does not fit goes in further enters; only the last one waits.
            let wait = if woken || out.len() > before || !self.backlog.is_empty() {
                Some(Duration::ZERO)
            } else {
                wait_for
            };
            let queued = self.queued();
            let entered = self.enter(queued, wait);
            woken |= self.drain(out);
            let left = self.queued();
            if left < queued {
                fruitless = 0;
            }
            match entered {
                Ok(()) | Err(Errno::TIME | Errno::INTR) => {
                    let overflowed = self.uring.submission().cq_overflow();
                    if left == 0 && self.backlog.is_empty() && !overflowed {
                        break;
                    }
                }
                // The completion queue was full or memory short: what was drained made room.
                Err(Errno::BUSY | Errno::AGAIN | Errno::NOMEM) => {}
                Err(Errno::BADR) => return Err(RingError::CompletionsLost),
                Err(Errno::EXIST) => return Err(RingError::WrongThread),
                Err(other) => return Err(RingError::Enter(other)),
            }
            fruitless += 1;
            if fruitless > FRUITLESS_ENTERS_MAX {
                return Err(RingError::Enter(entered.err().unwrap_or(Errno::BUSY)));
            }
            if left == queued && queued > 0 {
                // Memory is short: let the kernel reclaim some before the next try.
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        let lost = self.uring.completion().overflow();
        if lost != self.completions_lost {
            self.completions_lost = lost;
            return Err(RingError::CompletionsLost);
        }
        Ok(())
    }

    /// A handle by which other threads make [`turn`](Ring::turn) return.
    pub fn waker(&self) -> Waker {
        self.waker.clone()
    }

    /// How many times `io_uring_enter` was called.
    pub const fn enters(&self) -> u64 {
        self.enters
    }

    /// Whether this kernel (6.12 or later) lets a turn wait past [prompt](Ring::push_prompt) completions.
    pub const fn waits_for_several(&self) -> bool {
        self.waits_for_several
    }

    fn enable(&mut self) -> Result<(), RingError> {
        if !self.enabled {
            self.uring.submitter().register_enable_rings().map_err(|error| RingError::Setup {
                step: "io_uring_register(ENABLE_RINGS)",
                errno: errno_of(&error),
            })?;
            self.enabled = true;
        }
        Ok(())
    }

    fn arm_waker(&mut self) {
        if !self.wake_armed {
            let buffer = ptr::from_mut::<u64>(&mut self.wake_count).cast::<u8>();
            let read = opcode::Read::new(Fd(self.waker.as_raw_fd()), buffer, 8).build();
            self.enqueue(read.user_data(Token::new(Owner::RING, KIND_WAKE, 0).pack()));
            self.wake_armed = true;
        }
    }

    fn enqueue(&mut self, entry: squeue::Entry) {
        if !self.backlog.is_empty() {
            self.backlog.push_back(entry);
            return;
        }
        // SAFETY: `push`'s contract (or, for the ring's own operations, `self`) keeps what the entry points to alive.
        let full = unsafe { self.uring.submission().push(&entry) }.is_err();
        if full {
            self.backlog.push_back(entry);
        }
    }

    fn refill(&mut self) {
        if self.backlog.is_empty() {
            return;
        }
        let mut queue = self.uring.submission();
        while let Some(entry) = self.backlog.front() {
            // SAFETY: as in `enqueue`: the contract of `push` holds until the completion, backlog included.
            if unsafe { queue.push(entry) }.is_err() {
                break;
            }
            self.backlog.pop_front();
        }
    }

    fn queued(&mut self) -> u32 {
        // At most the queue's size, which is a u32.
        self.uring.submission().len() as u32
    }

    fn enter(&mut self, to_submit: u32, wait: Option<Duration>) -> Result<(), Errno> {
        self.enters += 1;
        let (prompt, gather) = (std::mem::take(&mut self.prompt), std::mem::take(&mut self.gather));
        let several = if self.waits_for_several { 1 + prompt.saturating_add(gather) } else { 1 };
        let (min_complete, limit) = match wait {
            Some(Duration::ZERO) => (0, None),
            Some(time) => (several, Some(kernel_timespec(time))),
            None => (several, None),
        };
        let first_wait_us = if gather > 0 { GATHER_WAIT_US } else { PROMPT_WAIT_US };
        let argument = GetEventsArg {
            sigmask: 0,
            sigmask_size: 0,
            min_wait_usec: if min_complete > 1 { first_wait_us } else { 0 },
            timespec: limit.as_ref().map_or(0, |limit| ptr::from_ref(limit) as u64),
        };
        // GETEVENTS even without waiting: deferred task work runs only then.
        // SAFETY: the argument and its timespec outlive the call; what the queued entries point to is `push`'s contract.
        let entered = unsafe {
            self.uring.submitter().enter(
                to_submit,
                min_complete,
                ENTER_GETEVENTS | ENTER_EXT_ARG,
                Some(&argument),
            )
        };
        entered.map(drop).map_err(|error| errno_of(&error))
    }

    /// Takes every completion out of the queue. True when a wake was among them.
    fn drain(&mut self, out: &mut Vec<Completion>) -> bool {
        let mut woken = false;
        for entry in self.uring.completion() {
            let token = Token::unpack(entry.user_data());
            if token.owner != Owner::RING {
                out.push(Completion { token, result: entry.result(), flags: entry.flags() });
            } else if token.kind == KIND_WAKE {
                woken = true;
                self.wake_armed = cqueue::more(entry.flags());
            }
        }
        woken
    }
}

impl Drop for Ring {
    /// Components reap their operations before they are dropped; this only makes sure that nothing of a forgotten
    /// one (and the waker's read) still writes to memory that is about to be freed.
    fn drop(&mut self) {
        if !self.enabled {
            return;
        }
        // The errors: nothing to cancel, or another thread drops the ring; there is nothing left to do about either.
        let _ = self.uring.submitter().register_sync_cancel(Some(DROP_CANCEL_TIMEOUT), CancelBuilder::any());
        let _ = self.enter(0, Some(Duration::ZERO));
        self.drain(&mut Vec::new());
        if self.wake_armed {
            // The kernel may still hold the read: eight bytes are given up rather than written to after they are freed.
            let count = std::mem::replace(&mut self.wake_count, Box::new(0));
            Box::leak(count);
        }
    }
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring")
            .field("backlog", &self.backlog.len())
            .field("enters", &self.enters)
            .finish_non_exhaustive()
    }
}

fn kernel_timespec(time: Duration) -> KernelTimespec {
    KernelTimespec {
        sec: i64::try_from(time.as_secs()).unwrap_or(i64::MAX),
        nsec: i64::from(time.subsec_nanos()),
    }
}
