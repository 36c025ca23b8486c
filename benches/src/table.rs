//! Figures, their medians and the bounds on them; printed as a table or as one JSON object.

use serde_json::{Map, Value, json};

/// Middle of the runs; of an even number the mean of the two in the middle; 0 of none.
pub fn median(runs: &[f64]) -> f64 {
    let mut sorted = runs.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => 0.0,
        odd if odd % 2 == 1 => sorted[middle],
        _ => f64::midpoint(sorted[middle - 1], sorted[middle]),
    }
}

/// What a figure has to be.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Bound {
    /// Nothing asked.
    None,
    /// At least this.
    AtLeast(f64),
    /// At most this.
    AtMost(f64),
}

/// One figure.
#[derive(Debug, Clone, PartialEq)]
pub struct Figure {
    /// Stable, for machines; ends in its unit, or in `ratio`.
    pub name: String,
    /// In words.
    pub text: String,
    /// Every run.
    pub runs: Vec<f64>,
    /// What counts.
    pub median: f64,
    /// What it has to be.
    pub bound: Bound,
}

impl Figure {
    /// Measured values.
    pub fn measured(name: &str, text: &str, runs: Vec<f64>) -> Figure {
        Figure {
            name: name.to_owned(),
            text: text.to_owned(),
            median: median(&runs),
            runs,
            bound: Bound::None,
        }
    }

    /// The ratio of two medians; `runs` are the rounds' own ratios, which show the noise.
    pub fn ratio(name: &str, text: &str, ours: &[f64], theirs: &[f64], bound: Bound) -> Figure {
        let of = |a: f64, b: f64| if b > 0.0 { a / b } else { 0.0 };
        Figure {
            name: name.to_owned(),
            text: text.to_owned(),
            runs: ours.iter().zip(theirs).map(|(a, b)| of(*a, *b)).collect(),
            median: of(median(ours), median(theirs)),
            bound,
        }
    }

    /// The same with a bound.
    #[must_use]
    pub fn bounded(mut self, bound: Bound) -> Figure {
        self.bound = bound;
        self
    }

    /// Whether it is what it has to be.
    pub fn holds(&self) -> bool {
        match self.bound {
            Bound::None => true,
            Bound::AtLeast(least) => self.median >= least,
            Bound::AtMost(most) => self.median <= most,
        }
    }

    fn line(&self) -> String {
        let runs: Vec<String> = self.runs.iter().map(|run| number(*run)).collect();
        let judged = match self.bound {
            Bound::None => String::new(),
            Bound::AtLeast(least) => format!("  >= {}: {}", number(least), word(self.holds())),
            Bound::AtMost(most) => format!("  <= {}: {}", number(most), word(self.holds())),
        };
        let (text, median) = (&self.text, number(self.median));
        format!("{text:<46}{median:>9}   [{}]{judged}", runs.join(" "))
    }
}

const fn word(holds: bool) -> &'static str {
    if holds { "ok" } else { "FAIL" }
}

fn number(value: f64) -> String {
    let decimals = match value.abs() {
        at_least if at_least >= 1000.0 => 0,
        at_least if at_least >= 100.0 => 1,
        _ => 2,
    };
    format!("{value:.decimals$}")
}

/// The figures of a run.
#[derive(Debug, Default)]
pub struct Table {
    figures: Vec<Figure>,
}

impl Table {
    /// Adds one.
    pub fn push(&mut self, figure: Figure) {
        self.figures.push(figure);
    }

    /// All bounds hold.
    pub fn holds(&self) -> bool {
        self.figures.iter().all(Figure::holds)
    }

    /// For people: the median, and every run beside it.
    pub fn text(&self) -> String {
        self.figures.iter().map(|figure| figure.line() + "\n").collect()
    }

    /// One object: `{name: {median, runs, …}}`.
    pub fn json(&self) -> Value {
        let mut page = Map::new();
        for figure in &self.figures {
            let mut value = json!({ "median": figure.median, "runs": figure.runs });
            match figure.bound {
                Bound::None => {}
                Bound::AtLeast(least) => value["at_least"] = json!(least),
                Bound::AtMost(most) => value["at_most"] = json!(most),
            }
            if figure.bound != Bound::None {
                value["holds"] = json!(figure.holds());
            }
            page.insert(figure.name.clone(), value);
        }
        Value::Object(page)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_of_odd_even_and_none() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(median(&[]), 0.0);
    }

    #[test]
    fn a_ratio_is_of_medians_and_judged() {
        let figure = Figure::ratio("r", "r", &[2.0, 4.0, 9.0], &[1.0, 2.0, 100.0], Bound::AtLeast(2.5));
        assert_eq!((figure.median, figure.holds()), (2.0, false));
        let mut table = Table::default();
        table.push(figure);
        assert!(!table.holds() && table.text().contains("FAIL"));
        assert_eq!(table.json()["r"]["median"], 2.0);
        assert_eq!(table.json()["r"]["runs"].as_array().map(Vec::len), Some(3));
    }
}
