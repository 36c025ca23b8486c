//! Log lines of the daemon, on the standard error.

use std::io::{IsTerminal, Write};

use tracing_subscriber::EnvFilter;

use crate::cli::LogFormat;

/// Begins logging; `DUPLEX_LOG` chooses the level (default `info`).
pub(crate) fn begin(format: LogFormat) {
    let filter = EnvFilter::try_from_env("DUPLEX_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let lines = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(|| Lossy(std::io::stderr()))
        .with_ansi(std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none());
    // A second subscriber cannot be set; the first one stays, which is what is wanted.
    let _ = match format {
        LogFormat::Json => lines.json().try_init(),
        LogFormat::Text if std::env::var_os("JOURNAL_STREAM").is_some() => lines.without_time().try_init(),
        LogFormat::Text => lines.try_init(),
    };
}

/// Log lines that cannot be written are lost: the mirror goes on when nobody reads the log any more, or its disk is full.
struct Lossy<W>(W);

impl<W: Write> Write for Lossy<W> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let _ = self.0.write_all(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        let _ = self.0.flush();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_that_nobody_reads_is_no_error() {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        drop(reader);
        assert!((&writer).write_all(b"x").is_err(), "nobody reads it");
        let mut lossy = Lossy(writer);
        assert_eq!(lossy.write(b"a line").expect("lost"), 6);
        lossy.flush().expect("lost");
    }
}
