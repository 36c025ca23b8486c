//! What happened, as a hash always and as text when asked for.

use std::collections::VecDeque;

/// Lines kept when a run is traced.
const TAIL: usize = 400;
/// Longest line: a metadata block is not spelled out.
const LINE: usize = 260;

/// A run's inputs and actions in order.
#[derive(Debug)]
pub struct Trace {
    hash: u64,
    /// Things recorded.
    pub steps: u64,
    lines: Option<VecDeque<String>>,
    keep: usize,
}

impl Trace {
    /// `text`: keep lines too.
    pub fn new(text: bool) -> Self {
        Self { hash: 0xcbf2_9ce4_8422_2325, steps: 0, lines: text.then(VecDeque::new), keep: TAIL }
    }

    /// Keeps this many lines.
    pub fn keep(&mut self, lines: usize) {
        self.keep = lines;
    }

    /// One step: numbers into the hash, `line` only when text is kept.
    pub fn step(&mut self, now: u64, numbers: [u64; 3], line: impl FnOnce() -> String) {
        self.steps += 1;
        for number in [now, numbers[0], numbers[1], numbers[2]] {
            // FNV-1a over words instead of bytes.
            self.hash = (self.hash ^ number).wrapping_mul(0x0000_0100_0000_01b3);
            self.hash ^= self.hash >> 29;
        }
        if let Some(lines) = &mut self.lines {
            if lines.len() == self.keep {
                lines.pop_front();
            }
            let mut text: String = line().chars().take(LINE).collect();
            text.insert_str(0, &format!("{:>12.6} ", micros(now)));
            lines.push_back(text);
        }
    }

    /// True when lines are kept.
    pub const fn is_text(&self) -> bool {
        self.lines.is_some()
    }

    /// The hash so far.
    pub const fn hash(&self) -> u64 {
        self.hash
    }

    /// The last lines.
    pub fn tail(&self) -> Vec<String> {
        self.lines.iter().flatten().cloned().collect()
    }
}

/// Nanoseconds as seconds for people.
#[expect(clippy::cast_precision_loss, reason = "only shown")]
fn micros(now: u64) -> f64 {
    now as f64 / 1e9
}
