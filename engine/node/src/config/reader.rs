//! A TOML document that remembers where everything stands and collects what is wrong with it.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Path, PathBuf};

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::problem::{Place, Problem, Severity};
use super::unsupported;

/// Longest excerpt of a value in an error, in characters.
const VALUE_SHOWN_CHARS: usize = 80;

/// The text, its line starts, and what was found so far.
pub(crate) struct Reader<'a> {
    file: PathBuf,
    text: &'a str,
    line_starts: Vec<usize>,
    problems: RefCell<Vec<Problem>>,
    places: RefCell<BTreeMap<String, Seen>>,
}

/// Where a key's value stands, and its text.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Seen {
    pub(crate) place: Place,
    pub(crate) value: String,
}

impl<'a> Reader<'a> {
    pub(crate) fn new(file: &Path, text: &'a str) -> Self {
        let mut line_starts = vec![0];
        line_starts.extend(text.match_indices('\n').map(|(at, _)| at + 1));
        Self {
            file: file.to_owned(),
            text,
            line_starts,
            problems: RefCell::new(Vec::new()),
            places: RefCell::new(BTreeMap::new()),
        }
    }

    /// Line and column of a byte offset.
    pub(crate) fn place(&self, offset: usize) -> Place {
        let offset = offset.min(self.text.len());
        let line = self.line_starts.partition_point(|start| *start <= offset).max(1);
        let before = self.text.get(self.line_starts[line - 1]..offset).unwrap_or("");
        let column = before.chars().count() + 1;
        Place {
            line: u32::try_from(line).unwrap_or(u32::MAX),
            column: u32::try_from(column).unwrap_or(u32::MAX),
        }
    }

    /// The text of a span, shortened, on one line.
    fn excerpt(&self, span: Range<usize>) -> String {
        let text = self.text.get(span).unwrap_or("").trim();
        let mut short: String =
            text.chars().take(VALUE_SHOWN_CHARS).map(|c| if c.is_control() { ' ' } else { c }).collect();
        if text.chars().count() > VALUE_SHOWN_CHARS {
            short.push('…');
        }
        short
    }

    /// What stands in the file at this place, in one line.
    pub(crate) fn at(&self, span: &Range<usize>) -> &'a str {
        self.text.get(span.clone()).unwrap_or_default().lines().next().unwrap_or_default().trim()
    }

    pub(crate) fn report(
        &self,
        span: Range<usize>,
        key: &str,
        value: Option<String>,
        code: &'static str,
        what: impl Into<String>,
        fix: impl Into<String>,
    ) {
        self.problems.borrow_mut().push(Problem {
            severity: Severity::Error,
            file: self.file.clone(),
            place: self.place(span.start),
            key: key.to_owned(),
            value,
            code,
            text: what.into(),
            fix: fix.into(),
        });
    }

    /// What was found, and where every key that was read stands.
    pub(crate) fn finish(self) -> (Vec<Problem>, BTreeMap<String, Seen>) {
        (self.problems.into_inner(), self.places.into_inner())
    }
}

/// A table being read: every key that nobody asked for is an error at [`Table::finish`].
pub(crate) struct Table<'a> {
    pub(crate) reader: &'a Reader<'a>,
    path: String,
    table: &'a DeTable<'a>,
    span: Range<usize>,
    asked: RefCell<BTreeSet<String>>,
}

impl<'a> Table<'a> {
    pub(crate) fn new(
        reader: &'a Reader<'a>,
        path: String,
        table: &'a DeTable<'a>,
        span: Range<usize>,
    ) -> Self {
        reader
            .places
            .borrow_mut()
            .insert(path.clone(), Seen { place: reader.place(span.start), value: String::new() });
        Self { reader, path, table, span, asked: RefCell::new(BTreeSet::new()) }
    }

    /// The key's full name.
    pub(crate) fn key(&self, name: &str) -> String {
        if self.path.is_empty() { name.to_owned() } else { format!("{}.{name}", self.path) }
    }

    pub(crate) fn keys(&self) -> impl Iterator<Item = &'a str> + use<'a> {
        self.table.keys().map(|key| key.get_ref().as_ref())
    }

    /// Where the table begins.
    pub(crate) fn span(&self) -> Range<usize> {
        self.span.clone()
    }

    /// The value of a key, if it is there.
    pub(crate) fn get(&self, name: &str) -> Option<Value<'a>> {
        self.asked.borrow_mut().insert(name.to_owned());
        let (_, node) = self.table.iter().find(|(key, _)| key.get_ref().as_ref() == name)?;
        let value = Value { reader: self.reader, key: self.key(name), node };
        value.remember();
        Some(value)
    }

    /// Keys that are known but cannot be read now.
    pub(crate) fn skip(&self, names: &[&str]) {
        self.asked.borrow_mut().extend(names.iter().map(|name| (*name).to_owned()));
    }

    /// Reports that a key must be there and is not.
    pub(crate) fn missing(&self, name: &str, fix: impl Into<String>) {
        let what = if self.path.is_empty() {
            "is missing".to_owned()
        } else {
            format!("is missing in [{}]", self.path)
        };
        self.reader.report(self.span(), &self.key(name), None, "missing", what, fix);
    }

    /// Reports every key that was not asked for.
    pub(crate) fn finish(self) {
        let asked = self.asked.borrow();
        for (key, node) in self.table {
            let name = key.get_ref().as_ref();
            if asked.contains(name) {
                continue;
            }
            let full = self.key(name);
            let value = Value { reader: self.reader, key: full.clone(), node };
            if let Some(what) = unsupported::key(&full) {
                value.not_supported(what);
                continue;
            }
            let near = asked.iter().map(|known| (distance(name, known), known)).min();
            let fix = match near {
                Some((steps, known)) if steps <= 2.max(name.len() / 3) => {
                    format!("did you mean \"{known}\"? Otherwise take the line out")
                }
                Some(_) | None => {
                    let known: Vec<&str> = asked.iter().map(String::as_str).collect();
                    format!("take it out; known here: {}", known.join(", "))
                }
            };
            self.reader.report(
                key.span(),
                &full,
                Some(value.shown()),
                "unknown-key",
                "is not a known key",
                fix,
            );
        }
    }
}

/// A value being read.
#[derive(Clone)]
pub(crate) struct Value<'a> {
    pub(crate) reader: &'a Reader<'a>,
    pub(crate) key: String,
    node: &'a Spanned<DeValue<'a>>,
}

impl<'a> Value<'a> {
    fn remember(&self) {
        let seen = Seen { place: self.reader.place(self.node.span().start), value: self.shown() };
        self.reader.places.borrow_mut().insert(self.key.clone(), seen);
    }

    /// As it is written.
    pub(crate) fn shown(&self) -> String {
        match self.node.get_ref() {
            DeValue::Table(_) => "{…}".to_owned(),
            DeValue::String(_)
            | DeValue::Integer(_)
            | DeValue::Float(_)
            | DeValue::Boolean(_)
            | DeValue::Datetime(_)
            | DeValue::Array(_) => self.reader.excerpt(self.node.span()),
        }
    }

    /// Says what is wrong with it.
    pub(crate) fn wrong(&self, code: &'static str, what: impl Into<String>, fix: impl Into<String>) {
        self.reader.report(self.node.span(), &self.key, Some(self.shown()), code, what, fix);
    }

    /// Refuses what a later version will have.
    pub(crate) fn not_supported(&self, what: &unsupported::Later) {
        self.wrong("not-supported", format!("{} is not in this version", what.what), what.fix);
    }

    /// A key of this table, where this is one and has it.
    pub(crate) fn child(&self, name: &str) -> Option<Self> {
        let table = self.node.get_ref().as_table()?;
        let (_, node) = table.iter().find(|(key, _)| key.get_ref().as_ref() == name)?;
        Some(Self { reader: self.reader, key: format!("{}.{name}", self.key), node })
    }

    /// An element of this list, where this is one and has it.
    pub(crate) fn element(&self, index: usize) -> Option<Self> {
        let node = self.node.get_ref().as_array()?.get(index)?;
        Some(Self { reader: self.reader, key: format!("{}[{index}]", self.key), node })
    }

    pub(crate) fn is_table(&self) -> bool {
        self.node.get_ref().is_table()
    }

    pub(crate) fn is_integer(&self) -> bool {
        self.node.get_ref().is_integer()
    }

    /// A string without control characters, or a report.
    pub(crate) fn string(&self, fix: &str) -> Option<&'a str> {
        match self.node.get_ref().as_str() {
            Some(text) if text.chars().any(char::is_control) => {
                self.wrong("bad-character", "holds a control character", fix);
                None
            }
            Some("") => {
                self.wrong("empty", "is empty", fix);
                None
            }
            Some(text) => Some(text),
            None => {
                self.wrong("wrong-type", format!("is {}, not a string", self.type_name()), fix);
                None
            }
        }
    }

    /// A whole number within the bounds, or a report that names them.
    pub(crate) fn integer(&self, bounds: Range<u64>, unit: &str) -> Option<u64> {
        let fix = format!("write a whole number of {unit} from {} to {}", bounds.start, bounds.end - 1);
        let Some(number) = self.node.get_ref().as_integer() else {
            self.wrong("wrong-type", format!("is {}, not a whole number", self.type_name()), fix);
            return None;
        };
        let parsed = u64::from_str_radix(number.as_str(), number.radix()).ok();
        match parsed.filter(|value| bounds.contains(value)) {
            Some(value) => Some(value),
            None => {
                self.wrong("out-of-range", "is out of range", fix);
                None
            }
        }
    }

    /// One of the words, or a report that lists them.
    pub(crate) fn word(&self, words: &[&'static str]) -> Option<&'static str> {
        let fix = format!("write one of: {}", words.join(", "));
        let text = self.string(&fix)?;
        let known = words.iter().find(|word| **word == text).copied();
        if known.is_none() {
            self.wrong("unknown-value", "is not a known value", fix);
        }
        known
    }

    /// A table, or a report.
    pub(crate) fn table(&self, fix: &str) -> Option<Table<'a>> {
        match self.node.get_ref().as_table() {
            Some(table) => Some(Table::new(self.reader, self.key.clone(), table, self.node.span())),
            None => {
                self.wrong("wrong-type", format!("is {}, not a table", self.type_name()), fix);
                None
            }
        }
    }

    /// The elements of a list, or a report.
    pub(crate) fn list(&self, fix: &str) -> Option<Vec<Value<'a>>> {
        let Some(array) = self.node.get_ref().as_array() else {
            self.wrong("wrong-type", format!("is {}, not a list", self.type_name()), fix);
            return None;
        };
        let elements = array.iter().enumerate().map(|(index, node)| {
            let value = Value { reader: self.reader, key: format!("{}[{index}]", self.key), node };
            value.remember();
            value
        });
        Some(elements.collect())
    }

    fn type_name(&self) -> &'static str {
        match self.node.get_ref() {
            DeValue::String(_) => "a string",
            DeValue::Integer(_) => "a whole number",
            DeValue::Float(_) => "a broken number",
            DeValue::Boolean(_) => "true or false",
            DeValue::Datetime(_) => "a date",
            DeValue::Array(_) => "a list",
            DeValue::Table(_) => "a table",
        }
    }
}

/// Edit distance, for "did you mean". Names are short: the reader's caller bounds the file.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().take(64).collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().take(64).enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, cb) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(ca != *cb);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}
