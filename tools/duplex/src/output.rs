//! What goes to the standard output, and in which colours.

use std::io::{IsTerminal, Write};

use duplex_node::failure::Failure;

/// Writes a line. A reader that went away ends the program quietly (SIGPIPE has its default action).
pub(crate) fn line(text: impl std::fmt::Display) -> Result<(), Failure> {
    writeln!(std::io::stdout().lock(), "{text}")
        .map_err(|error| Failure::failed(format!("cannot write to the standard output: {error}")))
}

/// Writes a value as JSON: one line, or indented for people to read.
pub(crate) fn json<T: serde::Serialize>(value: &T, indented: bool) -> Result<(), Failure> {
    let text = if indented { serde_json::to_string_pretty(value) } else { serde_json::to_string(value) };
    line(text.map_err(|error| Failure::failed(error.to_string()))?)
}

/// Colours, where they are wanted: on a terminal, without NO_COLOR.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Paint {
    on: bool,
}

/// A colour by its meaning.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Ink {
    Good,
    Watch,
    Bad,
    Strong,
    Faint,
}

impl Paint {
    pub(crate) fn stdout() -> Self {
        let wanted = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        Self { on: wanted && std::io::stdout().is_terminal() }
    }

    #[cfg(test)]
    pub(crate) const fn never() -> Self {
        Self { on: false }
    }

    pub(crate) fn ink(self, ink: Ink, text: impl std::fmt::Display) -> String {
        if !self.on {
            return text.to_string();
        }
        let code = match ink {
            Ink::Good => "32",
            Ink::Watch => "33",
            Ink::Bad => "31;1",
            Ink::Strong => "1",
            Ink::Faint => "2",
        };
        format!("\x1b[{code}m{text}\x1b[0m")
    }
}

/// Gives SIGPIPE its default action back, as programs in a pipe have it.
pub(crate) fn end_with_the_reader() {
    // SAFETY: sets a signal's default action; no handler runs.
    unsafe {
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
    }
}
