//! Who an operation belongs to, packed into the kernel's 64-bit user data.

use crate::error::Errno;

/// A component of the volume thread. Chosen by the thread's loop, 1 or more.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Owner(pub u16);

impl Owner {
    /// The ring's own operations (waker, cancellations); their completions are never shown.
    pub(crate) const RING: Self = Self(0);
}

/// What an operation is called between its push and its completion.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Token {
    /// The component that gets the completion.
    pub owner: Owner,
    /// The component's own kind of operation.
    pub kind: u16,
    /// The component's own index, usually into a slab.
    pub index: u32,
}

impl Token {
    /// A token by its parts.
    pub const fn new(owner: Owner, kind: u16, index: u32) -> Self {
        Self { owner, kind, index }
    }

    /// The kernel's user data: owner in the top 16 bits, then kind, then index.
    pub const fn pack(self) -> u64 {
        (self.owner.0 as u64) << 48 | (self.kind as u64) << 32 | self.index as u64
    }

    /// The token of a user data word.
    pub const fn unpack(user_data: u64) -> Self {
        Self {
            owner: Owner((user_data >> 48) as u16),
            kind: (user_data >> 32) as u16,
            index: user_data as u32,
        }
    }
}

/// A finished operation, or one part of a multishot operation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Completion {
    /// What was pushed.
    pub token: Token,
    /// The kernel's result: a count, or a negative errno.
    pub result: i32,
    /// The kernel's completion flags (`IORING_CQE_F_*`).
    pub flags: u32,
}

impl Completion {
    /// The result as a count or an error.
    pub fn outcome(&self) -> Result<u32, Errno> {
        u32::try_from(self.result).map_err(|_| Errno::from_raw_os_error(self.result.saturating_neg()))
    }

    /// True when further completions of the same token follow (multishot, or the notification of a
    /// zero-copy send): its buffers still belong to the kernel.
    pub fn has_more(&self) -> bool {
        io_uring::cqueue::more(self.flags)
    }

    /// True for the notification that the kernel has let go of a zero-copy send's buffers.
    pub fn is_notification(&self) -> bool {
        io_uring::cqueue::notif(self.flags)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_survives_the_user_data() {
        for token in [
            Token::new(Owner(1), 2, 3),
            Token::new(Owner(u16::MAX), u16::MAX, u32::MAX),
            Token::new(Owner(0), 0, 0),
            Token::new(Owner(0x8000), 1, 0x8000_0000),
        ] {
            assert_eq!(Token::unpack(token.pack()), token);
        }
    }

    #[test]
    fn an_outcome_is_a_count_or_an_errno() {
        let token = Token::new(Owner(1), 0, 0);
        let done = Completion { token, result: 4096, flags: 0 };
        assert_eq!(done.outcome(), Ok(4096));
        let failed = Completion { token, result: -libc::EIO, flags: 0 };
        assert_eq!(failed.outcome(), Err(Errno::IO));
    }
}
