//! What is wrong with a configuration or its surroundings, in a form that an operator can act on.

use std::fmt;
use std::path::PathBuf;

use serde::Serialize;

/// How bad a [`Problem`] is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Severity {
    /// The daemon does not start with it.
    Error,
    /// The daemon starts and says so.
    Warning,
}

/// A place in the configuration file. Lines and columns count from 1; columns count characters.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize)]
pub struct Place {
    /// Line.
    pub line: u32,
    /// Column.
    pub column: u32,
}

impl Place {
    /// Where a file as a whole is meant.
    pub const START: Self = Self { line: 1, column: 1 };
}

/// One thing that is wrong: where, which key, which value, what about it, and how to mend it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Problem {
    /// Error or warning.
    pub severity: Severity,
    /// The configuration file.
    pub file: PathBuf,
    /// Line and column in it.
    #[serde(flatten)]
    pub place: Place,
    /// The key with its tables, `volumes.data.backing`.
    pub key: String,
    /// The value as it is written there; `None` where there is none.
    pub value: Option<String>,
    /// Stable word for scripts.
    pub code: &'static str,
    /// What is wrong, in a sentence.
    pub text: String,
    /// What to write or do instead.
    pub fix: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}: ", self.file.display(), self.place.line, self.place.column)?;
        match self.severity {
            Severity::Error => f.write_str("error: ")?,
            Severity::Warning => f.write_str("warning: ")?,
        }
        if !self.key.is_empty() {
            f.write_str(&self.key)?;
            if let Some(value) = &self.value {
                write!(f, " = {value}")?;
            }
            f.write_str(": ")?;
        }
        write!(f, "{} [{}]\n    fix: {}", self.text, self.code, self.fix)
    }
}

/// Everything that is wrong, in file order. Never empty when used as an error.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub struct Problems(pub Vec<Problem>);

impl Problems {
    /// True when one of them keeps the daemon from starting.
    pub fn has_errors(&self) -> bool {
        self.0.iter().any(|problem| problem.severity == Severity::Error)
    }

    /// In the order of the file.
    pub fn sort(&mut self) {
        self.0.sort_by(|a, b| (a.severity, a.place, &a.key).cmp(&(b.severity, b.place, &b.key)));
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.0.iter().enumerate() {
            if index > 0 {
                f.write_str("\n")?;
            }
            write!(f, "{problem}")?;
        }
        Ok(())
    }
}
