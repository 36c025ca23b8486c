//! Progress of long work, with rate and time left.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::cli::Common;
use crate::render::{bytes, duration};

/// How the daemon says that a resync goes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Pace {
    pub(crate) rate_bytes_per_s: u64,
    pub(crate) eta_s: Option<u64>,
    pub(crate) words: String,
}

/// A bar on a terminal; elsewhere a line now and then. Both on the standard error. None with `--json`.
pub(crate) struct Bar {
    bar: ProgressBar,
    what: String,
    lines: bool,
    /// When the last line was written, and the percentage it said.
    said: Option<(Instant, u64)>,
}

/// Between two lines where there is no terminal.
const LINE_TIME: Duration = Duration::from_secs(5);

impl Bar {
    pub(crate) fn new(common: &Common, what: &str) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let target = if terminal && !common.json {
            ProgressDrawTarget::stderr()
        } else {
            ProgressDrawTarget::hidden()
        };
        let bar = ProgressBar::with_draw_target(None, target);
        // The template is a constant: a fault in it shows in the first test run, and costs the looks only.
        if let Ok(style) = ProgressStyle::with_template("{prefix} [{bar:30}] {percent:>3} %  {msg}") {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_prefix(what.to_owned());
        Self { bar, what: what.to_owned(), lines: !terminal && !common.json, said: None }
    }

    /// Shows where it stands. Without a pace from elsewhere the bar measures its own.
    pub(crate) fn set(&mut self, done_bytes: u64, all_bytes: u64, pace: Option<Pace>) {
        self.bar.set_length(all_bytes);
        self.bar.set_position(done_bytes);
        let own_rate = self.bar.per_sec();
        let pace = pace.unwrap_or_else(|| Pace {
            rate_bytes_per_s: own_rate as u64,
            eta_s: (own_rate > 0.0).then(|| self.bar.eta().as_secs()),
            words: String::new(),
        });
        let left =
            pace.eta_s.map_or_else(|| "time left unknown".to_owned(), |s| format!("{} left", duration(s)));
        let text = format!(
            "{} of {}  {}/s  {left}  {}",
            bytes(done_bytes),
            bytes(all_bytes),
            bytes(pace.rate_bytes_per_s),
            pace.words
        );
        let text = text.trim_end().to_owned();
        if self.lines {
            self.line(percent(done_bytes, all_bytes), &text);
        }
        self.bar.set_message(text);
    }

    fn line(&mut self, percent: u64, text: &str) {
        let due = match self.said {
            None => true,
            Some((when, said)) => said != percent && (when.elapsed() >= LINE_TIME || percent == 100),
        };
        if due {
            eprintln!("{} {percent:>3} %  {text}", self.what);
            self.said = Some((Instant::now(), percent));
        }
    }

    /// Takes the bar away.
    pub(crate) fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

fn percent(done: u64, all: u64) -> u64 {
    if all == 0 {
        100
    } else {
        u64::try_from(u128::from(done.min(all)) * 100 / u128::from(all)).unwrap_or(100)
    }
}
