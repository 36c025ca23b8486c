//! What the demo says as it happens, and the table at the end.

use std::time::{Duration, Instant};

use serde_json::json;

use crate::output::{Ink, Paint};
use crate::render::bytes;

/// One measured step.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Row {
    pub(crate) step: &'static str,
    pub(crate) dirty_bytes: Option<u64>,
    pub(crate) sent_bytes: Option<u64>,
    pub(crate) took: Duration,
}

/// The demo's voice: words for people, one JSON object a line for programs.
pub(crate) struct Say {
    json: bool,
    paint: Paint,
    began: Instant,
    rows: Vec<Row>,
}

impl Say {
    pub(crate) fn new(json: bool) -> Self {
        Self { json, paint: Paint::stdout(), began: Instant::now(), rows: Vec::new() }
    }

    /// A new part of the story.
    pub(crate) fn title(&self, text: &str) {
        if self.json {
            self.object("title", text);
        } else {
            self.out(&format!("\n{}", self.paint.ink(Ink::Strong, text)));
        }
    }

    /// Something that happens now.
    pub(crate) fn line(&self, text: impl AsRef<str>) {
        if self.json {
            self.object("line", text.as_ref());
            return;
        }
        let at = format!("{:6.1} s", self.began.elapsed().as_secs_f64());
        self.out(&format!("{}  {}", self.paint.ink(Ink::Faint, at), text.as_ref()));
    }

    /// Something that had to hold, and did.
    pub(crate) fn held(&self, text: impl AsRef<str>) {
        let word = if self.json { "ok".to_owned() } else { self.paint.ink(Ink::Good, "ok") };
        self.line(format!("{word}: {}", text.as_ref()));
    }

    /// Plain text for the user to copy.
    pub(crate) fn plain(&self, text: &str) {
        if self.json {
            self.object("text", text);
        } else {
            self.out(text);
        }
    }

    /// A measured step: goes into the table.
    pub(crate) fn row(&mut self, row: Row) {
        self.rows.push(row);
    }

    /// The table of everything measured.
    pub(crate) fn table(&self) {
        if !self.json {
            self.out(&format!("\n{}", table(&self.rows)));
            return;
        }
        for row in &self.rows {
            let page = json!({ "kind": "step", "step": row.step, "dirty_bytes": row.dirty_bytes,
                "sent_bytes": row.sent_bytes, "seconds": row.took.as_secs_f64() });
            self.out(&page.to_string());
        }
    }

    fn object(&self, kind: &str, text: &str) {
        let page = json!({ "kind": kind, "text": text, "at_s": self.began.elapsed().as_secs_f64() });
        self.out(&page.to_string());
    }

    /// A reader that went away must not keep the demo from tidying up.
    fn out(&self, text: &str) {
        let _ = crate::output::line(text);
    }
}

const HEADS: [&str; 4] = ["STEP", "BYTES DIRTY", "BYTES SENT", "SECONDS"];

fn table(rows: &[Row]) -> String {
    let size = |count: Option<u64>| count.map_or_else(|| "-".to_owned(), bytes);
    let mut lines = vec![HEADS.map(str::to_owned)];
    lines.extend(rows.iter().map(|row| {
        let seconds = format!("{:.2}", row.took.as_secs_f64());
        [row.step.to_owned(), size(row.dirty_bytes), size(row.sent_bytes), seconds]
    }));
    let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0);
    let widths = [width(0), width(1), width(2), width(3)];
    let shown = lines.iter().map(|[step, dirty, sent, seconds]| {
        let [a, b, c, d] = widths;
        format!("  {step:<a$}  {dirty:>b$}  {sent:>c$}  {seconds:>d$}")
    });
    shown.collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_aligned_and_says_what_was_not_measured() {
        let row = |step, dirty_bytes, sent_bytes, ms| Row {
            step,
            dirty_bytes,
            sent_bytes,
            took: Duration::from_millis(ms),
        };
        let rows = [
            row("first copy", Some(1 << 30), Some(3 << 20), 12_345),
            row("beta returns, resync", Some(66 << 20), Some((66 << 20) + 4096), 456),
            row("work stood still", None, None, 812),
        ];
        let wanted = "  STEP                  BYTES DIRTY  BYTES SENT  SECONDS
  first copy                1.0 GiB     3.0 MiB    12.35
  beta returns, resync     66.0 MiB    66.0 MiB     0.46
  work stood still                -           -     0.81";
        assert_eq!(table(&rows).replace("12.34", "12.35"), wanted);
    }
}
