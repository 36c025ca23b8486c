//! Why a verb ended, with the exit code that belongs to it.

use crate::config::Problems;
use crate::control::api::Exit;

/// A verb's bad end.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{text}")]
pub struct Failure {
    /// Exit code.
    pub exit: Exit,
    /// What, and how to mend it.
    pub text: String,
}

impl Failure {
    /// Wrong use or wrong configuration.
    pub fn wrong(text: impl Into<String>) -> Self {
        Self { exit: Exit::Wrong, text: text.into() }
    }

    /// Refused by the state of things.
    pub fn refused(text: impl Into<String>) -> Self {
        Self { exit: Exit::Refused, text: text.into() }
    }

    /// I/O or internal.
    pub fn failed(text: impl Into<String>) -> Self {
        Self { exit: Exit::Failed, text: text.into() }
    }
}

impl From<Problems> for Failure {
    fn from(problems: Problems) -> Self {
        Self::wrong(problems.to_string())
    }
}
