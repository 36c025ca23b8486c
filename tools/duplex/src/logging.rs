//! Log lines of the daemon, on the standard error.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

use crate::cli::LogFormat;

/// Begins logging; `DUPLEX_LOG` chooses the level (default `info`).
pub(crate) fn begin(format: LogFormat) {
    let filter = EnvFilter::try_from_env("DUPLEX_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let lines = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none());
    // A second subscriber cannot be set; the first one stays, which is what is wanted.
    let _ = match format {
        LogFormat::Json => lines.json().try_init(),
        LogFormat::Text if std::env::var_os("JOURNAL_STREAM").is_some() => lines.without_time().try_init(),
        LogFormat::Text => lines.try_init(),
    };
}
