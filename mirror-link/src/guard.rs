//! Bounds for those who are not known yet: handshakes in progress, failures per address.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::Duration;

use tokio::time::Instant;

/// Handshakes in progress, of all addresses that are not the peer's.
const PENDING_MAX: usize = 32;
/// Handshakes in progress of one address that is not the peer's.
const PENDING_PER_ADDRESS_MAX: usize = 8;
/// Handshakes in progress of the peer's addresses: their own places, which nobody else can take.
const PENDING_OF_PEER_MAX: usize = 64;
/// Failures an address may have at once.
const FAILURES_MAX: u32 = 10;
/// One failure is forgiven after this.
const FORGIVE_AFTER: Duration = Duration::from_secs(1);
/// Addresses remembered.
const ADDRESSES_MAX: usize = 1024;

/// Why a connection is closed without a byte read.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub(crate) enum Turned {
    #[error("too many failed attempts: this address must wait")]
    TooOften,
    #[error("too many handshakes at once")]
    TooMany,
}

/// How a handshake ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Attempt {
    /// The other end holds the secret.
    Proven,
    /// It said something wrong.
    Failed,
    /// The connection ended before anything was proved. From the peer's address that is a bad network, not an attack:
    /// it must not keep the peer out.
    Vanished,
}

#[derive(Debug)]
struct Address {
    failures: u32,
    since: Instant,
    pending: usize,
    /// Already reported as turned away since its last attempt that was let in.
    reported: bool,
}

/// Who may try. Known addresses (the peer's) have their own places.
#[derive(Debug)]
pub(crate) struct Guard {
    peers: Vec<IpAddr>,
    addresses: HashMap<IpAddr, Address>,
    pending_others: usize,
    pending_peers: usize,
}

impl Guard {
    pub(crate) fn new(peers: Vec<IpAddr>) -> Self {
        Self { peers, addresses: HashMap::new(), pending_others: 0, pending_peers: 0 }
    }

    /// A connection came in. `Ok`: go on, and call [`Guard::leave`] when the handshake ended. `Err`: close it;
    /// the flag says whether this is news (once per address and rest).
    pub(crate) fn enter(&mut self, address: IpAddr, now: Instant) -> Result<(), (Turned, bool)> {
        let is_peer = self.peers.contains(&address);
        if !self.addresses.contains_key(&address) && self.addresses.len() >= ADDRESSES_MAX {
            self.forget(now);
            if self.addresses.len() >= ADDRESSES_MAX && !is_peer {
                return Err((Turned::TooMany, false));
            }
        }
        let entry = self.addresses.entry(address).or_insert(Address {
            failures: 0,
            since: now,
            pending: 0,
            reported: false,
        });
        entry.forgive(now);
        let news = !entry.reported;
        let turned = if is_peer {
            (self.pending_peers >= PENDING_OF_PEER_MAX).then_some(Turned::TooMany)
        } else {
            (self.pending_others >= PENDING_MAX || entry.pending >= PENDING_PER_ADDRESS_MAX)
                .then_some(Turned::TooMany)
        };
        let turned = if entry.failures >= FAILURES_MAX { Some(Turned::TooOften) } else { turned };
        if let Some(turned) = turned {
            entry.reported = true;
            return Err((turned, news));
        }
        entry.reported = false;
        entry.pending += 1;
        *(if is_peer { &mut self.pending_peers } else { &mut self.pending_others }) += 1;
        Ok(())
    }

    /// The handshake ended. A failure counts against the address; a success clears it.
    pub(crate) fn leave(&mut self, address: IpAddr, end: Attempt, now: Instant) {
        let is_peer = self.peers.contains(&address);
        let pending = if is_peer { &mut self.pending_peers } else { &mut self.pending_others };
        *pending = pending.saturating_sub(1);
        if let Some(entry) = self.addresses.get_mut(&address) {
            entry.pending = entry.pending.saturating_sub(1);
            entry.forgive(now);
            match end {
                Attempt::Proven => entry.failures = 0,
                Attempt::Vanished if is_peer => {}
                Attempt::Vanished | Attempt::Failed => {
                    entry.failures = entry.failures.saturating_add(1);
                    entry.since = now;
                }
            }
        }
    }

    fn forget(&mut self, now: Instant) {
        self.addresses.retain(|_, entry| {
            entry.forgive(now);
            entry.failures > 0 || entry.pending > 0
        });
    }
}

impl Address {
    fn forgive(&mut self, now: Instant) {
        let forgiven = now.duration_since(self.since).as_secs() / FORGIVE_AFTER.as_secs().max(1);
        if forgiven > 0 {
            self.failures = self.failures.saturating_sub(u32::try_from(forgiven).unwrap_or(u32::MAX));
            self.since = now;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(last: u8) -> IpAddr {
        IpAddr::from([10, 0, 0, last])
    }

    #[test]
    fn an_address_that_keeps_failing_must_wait() {
        let mut guard = Guard::new(vec![]);
        let start = Instant::now();
        for _ in 0..FAILURES_MAX {
            assert_eq!(guard.enter(address(1), start), Ok(()));
            guard.leave(address(1), Attempt::Failed, start);
        }
        assert_eq!(guard.enter(address(1), start), Err((Turned::TooOften, true)));
        assert_eq!(guard.enter(address(1), start), Err((Turned::TooOften, false)), "reported once");
        assert_eq!(guard.enter(address(2), start), Ok(()), "others are not held up");
        assert_eq!(guard.enter(address(1), start + FORGIVE_AFTER), Ok(()));
    }

    #[test]
    fn the_peers_places_cannot_be_taken() {
        let mut guard = Guard::new(vec![address(9)]);
        let now = Instant::now();
        let mut entered = 0;
        for last in 10..100 {
            for _ in 0..PENDING_PER_ADDRESS_MAX + 1 {
                entered += usize::from(guard.enter(address(last), now).is_ok());
            }
        }
        assert_eq!(entered, PENDING_MAX);
        assert_eq!(guard.enter(address(9), now), Ok(()));
        guard.leave(address(10), Attempt::Failed, now);
        assert_eq!(guard.enter(address(200), now), Ok(()), "a place became free");
    }

    #[test]
    fn a_bad_network_does_not_keep_the_peer_out() {
        let mut guard = Guard::new(vec![address(9)]);
        let now = Instant::now();
        for _ in 0..5 * FAILURES_MAX {
            assert_eq!(guard.enter(address(9), now), Ok(()));
            guard.leave(address(9), Attempt::Vanished, now);
        }
        for _ in 0..FAILURES_MAX {
            assert_eq!(guard.enter(address(1), now), Ok(()));
            guard.leave(address(1), Attempt::Vanished, now);
        }
        assert!(guard.enter(address(1), now).is_err());
    }

    #[test]
    fn the_table_of_addresses_is_bounded() {
        let mut guard = Guard::new(vec![]);
        let now = Instant::now();
        for index in 0..3 * ADDRESSES_MAX as u32 {
            let address = IpAddr::from(index.to_be_bytes());
            if guard.enter(address, now).is_ok() {
                guard.leave(address, Attempt::Failed, now);
            }
        }
        assert!(guard.addresses.len() <= ADDRESSES_MAX);
    }
}
