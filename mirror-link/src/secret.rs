//! The shared secret and its proof.

use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};

use hmac::{Hmac, KeyInit, Mac};
use sha2::{Digest, Sha256};

use duplex_core::ids::{Incarnation, SessionId};

/// Shortest secret taken: a shorter one could be guessed. `duplex secret` makes 64 random hex digits.
pub const SECRET_MIN_BYTES: usize = 32;
/// Longest secret taken.
pub const SECRET_MAX_BYTES: usize = 1024;
/// Bytes of a proof.
const PROOF_BYTES: usize = 32;

/// A secret both servers hold. Never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Vec<u8>);

/// Why bytes cannot be a secret.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error(
    "a secret of {bytes} bytes: it must have {SECRET_MIN_BYTES} to {SECRET_MAX_BYTES}, and be random, not a word"
)]
pub struct SecretLengthError {
    /// Given.
    pub bytes: usize,
}

impl Secret {
    /// Takes 32 to 1024 bytes.
    pub fn new(bytes: &[u8]) -> Result<Self, SecretLengthError> {
        if (SECRET_MIN_BYTES..=SECRET_MAX_BYTES).contains(&bytes.len()) {
            Ok(Self(bytes.to_vec()))
        } else {
            Err(SecretLengthError { bytes: bytes.len() })
        }
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// The secrets that are valid now: one, or two while the secret is being changed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Secrets {
    /// The one to use.
    pub current: Secret,
    /// The other one that is still, or already, valid.
    pub other: Option<Secret>,
}

impl Secrets {
    fn all(&self) -> impl Iterator<Item = &Secret> {
        std::iter::once(&self.current).chain(&self.other)
    }
}

/// The secrets as every handshake sees them, replaceable while running.
#[derive(Clone, Debug)]
pub(crate) struct SharedSecrets(Arc<RwLock<Secrets>>);

impl SharedSecrets {
    pub(crate) fn new(secrets: Secrets) -> Self {
        Self(Arc::new(RwLock::new(secrets)))
    }

    pub(crate) fn get(&self) -> Secrets {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn set(&self, secrets: Secrets) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = secrets;
    }
}

/// Which end of a connection a server is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Role {
    /// Connects.
    Dialler,
    /// Listens.
    Listener,
}

impl Role {
    const fn label(self) -> &'static [u8] {
        match self {
            Self::Dialler => b"duplex-link 1 dialler\0",
            Self::Listener => b"duplex-link 1 listener\0",
        }
    }

    pub(crate) const fn number(self) -> u8 {
        match self {
            Self::Dialler => 1,
            Self::Listener => 2,
        }
    }
}

/// Everything a proof covers: it is worth nothing on another connection, in another direction, for other names.
#[derive(Clone, Debug)]
pub(crate) struct Transcript {
    /// Bytes only the two ends of this TLS connection know; `None` on a plain connection.
    pub(crate) binding: Option<[u8; 32]>,
    /// The dialler's whole greeting frame: nonce, role, name, session.
    pub(crate) dialler: Vec<u8>,
    /// The listener's.
    pub(crate) listener: Vec<u8>,
}

impl Transcript {
    fn mac(&self, secret: &Secret, role: Role) -> Hmac<Sha256> {
        let mut mac = Hmac::<Sha256>::new_from_slice(&secret.0).expect("HMAC takes keys of any length");
        mac.update(role.label());
        match &self.binding {
            Some(binding) => {
                mac.update(b"tls\0");
                mac.update(binding);
            }
            None => mac.update(b"off\0"),
        }
        for greeting in [&self.dialler, &self.listener] {
            mac.update(&(greeting.len() as u64).to_le_bytes());
            mac.update(greeting);
        }
        mac
    }

    /// One proof by each valid secret.
    pub(crate) fn proofs(&self, secrets: &Secrets, role: Role) -> Vec<u8> {
        secrets.all().flat_map(|secret| self.mac(secret, role).finalize().into_bytes()).collect()
    }

    /// Is one of the proofs by one of our secrets? Which one? Compared in constant time.
    pub(crate) fn verify(&self, secrets: &Secrets, role: Role, proofs: &[u8]) -> Option<Secret> {
        let (proofs, rest) = proofs.as_chunks::<PROOF_BYTES>();
        if !rest.is_empty() || proofs.len() > 2 {
            return None;
        }
        let valid =
            |secret: &Secret| proofs.iter().any(|proof| self.mac(secret, role).verify_slice(proof).is_ok());
        secrets.all().find(|secret| valid(secret)).cloned()
    }
}

/// The identity of a session: neither server draws it alone.
pub(crate) fn session_id(dialler: (Incarnation, u128), listener: (Incarnation, u128)) -> SessionId {
    let mut hash = Sha256::new();
    hash.update(b"duplex-link 1 session\0");
    for (incarnation, part) in [dialler, listener] {
        hash.update(incarnation.0.to_le_bytes());
        hash.update(part.to_le_bytes());
    }
    let digest = hash.finalize();
    let (first, _) = digest.split_first_chunk::<16>().expect("a SHA-256 digest has 32 bytes");
    SessionId(u128::from_le_bytes(*first))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secret(byte: u8) -> Secret {
        Secret::new(&[byte; 32]).unwrap()
    }

    fn transcript() -> Transcript {
        Transcript { binding: None, dialler: b"a".to_vec(), listener: b"b".to_vec() }
    }

    #[test]
    fn a_proof_is_good_for_one_connection_and_one_direction() {
        let secrets = Secrets { current: secret(1), other: None };
        let proof = transcript().proofs(&secrets, Role::Dialler);
        assert!(transcript().verify(&secrets, Role::Dialler, &proof).is_some());
        assert!(transcript().verify(&secrets, Role::Listener, &proof).is_none(), "reflected");
        let other = Transcript { listener: b"c".to_vec(), ..transcript() };
        assert!(other.verify(&secrets, Role::Dialler, &proof).is_none(), "replayed");
        let tls = Transcript { binding: Some([0; 32]), ..transcript() };
        assert!(tls.verify(&secrets, Role::Dialler, &proof).is_none(), "carried into another connection");
        let shifted = Transcript { dialler: b"ab".to_vec(), listener: Vec::new(), ..transcript() };
        assert!(shifted.verify(&secrets, Role::Dialler, &proof).is_none());
    }

    #[test]
    fn while_a_secret_is_changed_old_and_new_are_valid() {
        let old = Secrets { current: secret(1), other: None };
        let both = Secrets { current: secret(2), other: Some(secret(1)) };
        let new = Secrets { current: secret(2), other: None };
        for (prover, verifier, expected) in [
            (&old, &both, Some(secret(1))),
            (&both, &old, Some(secret(1))),
            (&both, &new, Some(secret(2))),
            (&old, &new, None),
        ] {
            let proofs = transcript().proofs(prover, Role::Listener);
            assert_eq!(transcript().verify(verifier, Role::Listener, &proofs), expected);
        }
        assert!(transcript().verify(&both, Role::Listener, &[]).is_none());
    }

    #[test]
    fn secrets_are_long_and_never_printed() {
        assert!(Secret::new(b"short").is_err());
        assert!(!format!("{:?}", secret(77)).contains("77"));
    }
}
