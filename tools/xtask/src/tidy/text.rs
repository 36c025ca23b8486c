//! Rules on the text of a file: its length, words that must not be there, SAFETY comments, and that the lab's
//! checkers share no code with what they check.

use std::path::Path;

/// A Rust file above this many lines is two files.
const MOST_LINES: usize = 800;

/// Words that may not stand in committed code, and why. Written in parts, or this file would find itself.
const CODE_WORDS: &[(&str, &str)] = &[
    (concat!("to", "do!"), "write it, or leave the feature out and say so in the README"),
    (concat!("unimple", "mented!"), "write it, or refuse it with a typed error"),
    (concat!("FIX", "ME"), "mend it"),
    (concat!("db", "g!("), "use tracing, or take it out"),
];

/// Words that may stand in no file at all.
const EVERYWHERE: &[(&str, &str)] = &[(concat!("/wo", "rk/"), "a path of one machine; nobody else has it")];

/// Parts of the tests that judge the product and must share no code with it.
const INDEPENDENT: &[&str] = &["tests/src/lab", "tests/src/cases", "tests/src/crash"];

/// The product's crates, as they are written in a `use`.
const PRODUCT: &[&str] =
    &["duplex_core", "duplex_ring", "duplex_store", "duplex_link", "duplex_frontend", "duplex_node"];

/// Checks one file.
pub(super) fn check(path: &Path, content: &str) -> Vec<String> {
    let mut found = Vec::new();
    let is_rust = path.extension().is_some_and(|extension| extension == "rs");
    if is_rust && content.lines().count() > MOST_LINES {
        let lines = content.lines().count();
        found.push(format!("{}: {lines} lines, more than {MOST_LINES}: split it by meaning", path.display()));
    }
    let independent = is_rust && INDEPENDENT.iter().any(|part| path.starts_with(part));
    for (number, line) in content.lines().enumerate() {
        let place = || format!("{}:{}", path.display(), number + 1);
        for (word, why) in EVERYWHERE.iter().chain(if is_rust { CODE_WORDS } else { &[] }) {
            if line.contains(word) {
                found.push(format!("{}: `{word}`: {why}", place()));
            }
        }
        if independent {
            for name in PRODUCT.iter().filter(|name| line.contains(**name)) {
                found.push(format!(
                    "{}: `{name}`: the lab judges the product and shares no code with it",
                    place()
                ));
            }
        }
    }
    if is_rust {
        found.extend(unsafe_without_reason(path, content));
    }
    found
}

/// Every `unsafe` block, function, impl or extern block has a `SAFETY:` comment (or a `# Safety` section) right above it.
fn unsafe_without_reason(path: &Path, content: &str) -> Vec<String> {
    let lines: Vec<&str> = content.lines().collect();
    let mut found = Vec::new();
    for (number, line) in lines.iter().enumerate() {
        if uses_unsafe(line) && !has_reason(&lines, number) {
            let place = format!("{}:{}", path.display(), number + 1);
            found.push(format!("{place}: `unsafe` without a `// SAFETY:` comment above it"));
        }
    }
    found
}

fn uses_unsafe(line: &str) -> bool {
    let code = line.split("//").next().unwrap_or_default();
    let keyword = concat!("un", "safe");
    ["{", "fn", "impl", "extern"].iter().any(|next| {
        let wanted = format!("{keyword} {next}");
        code.match_indices(&wanted).any(|(at, _)| {
            let before = code[..at].chars().next_back();
            let quoted = code[..at].matches('"').count() % 2 == 1;
            // `unsafe fn(…)` is the type of a pointer, not a use.
            let pointer = code[at + wanted.len()..].starts_with('(') && *next == "fn";
            !quoted && !pointer && !before.is_some_and(|c| c.is_alphanumeric() || c == '_')
        })
    })
}

/// Walks up over the statement, attributes and comments that belong to this line.
fn has_reason(lines: &[&str], number: usize) -> bool {
    let says = |line: &str| line.contains("SAFETY:") || line.contains("# Safety");
    if says(lines[number]) {
        return true;
    }
    for line in lines[..number].iter().rev() {
        let text = line.trim();
        if says(text) {
            return true;
        }
        let comment = text.starts_with("//");
        let attribute = text.starts_with("#[");
        // The head of the statement this block belongs to: `let x =` on a line of its own, an argument list.
        let head = text.ends_with('=') || text.ends_with('(') || text.ends_with("=>") || text.ends_with(',');
        if !(comment || attribute || head) {
            return false;
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(path: &str, content: &str) -> Vec<String> {
        check(Path::new(path), content)
    }

    #[test]
    fn a_long_file_is_found_and_one_at_the_bound_is_not() {
        assert_eq!(found("a.rs", &"x\n".repeat(MOST_LINES)).len(), 0);
        assert_eq!(found("a.rs", &"x\n".repeat(MOST_LINES + 1)).len(), 1);
        assert_eq!(found("a.md", &"x\n".repeat(MOST_LINES + 1)).len(), 0);
    }

    #[test]
    fn words_are_found_with_their_line() {
        for (word, _) in CODE_WORDS {
            let said = found("engine/a.rs", &format!("fn a() {{\n    {word}\n}}\n"));
            assert!(said[0].starts_with("engine/a.rs:2:"), "{said:?}");
        }
        let path = concat!("see /wo", "rk/x");
        assert_eq!(found("README.md", path).len(), 1);
    }

    #[test]
    fn the_lab_may_not_use_the_product() {
        assert_eq!(found("tests/src/lab/checker.rs", "use duplex_core::ids::VolumeId;\n").len(), 1);
        assert_eq!(found("tests/src/sim/world.rs", "use duplex_core::ids::VolumeId;\n").len(), 0);
    }

    #[test]
    fn unsafe_needs_its_reason() {
        let block = concat!("    let x = un", "safe { f() };\n");
        assert_eq!(found("a.rs", block).len(), 1);
        assert_eq!(found("a.rs", &format!("    // SAFETY: f has no conditions.\n{block}")).len(), 0);
        assert_eq!(found("a.rs", &format!("    // SAFETY: far away.\n    let y = 1;\n{block}")).len(), 1);
        let function = concat!("pub un", "safe fn g() {}\n");
        assert_eq!(
            found("a.rs", &format!("/// G.\n///\n/// # Safety\n/// None.\n#[inline]\n{function}")).len(),
            0
        );
        assert_eq!(found("a.rs", function).len(), 1);
        let lint = concat!("un", "safe_op_in_un", "safe_fn = 1\n");
        assert_eq!(found("a.rs", lint).len(), 0);
    }
}
