//! Random work on files, each step synced before the next, with a journal outside of the file system of what was
//! begun and what was synced; and the check, after a crash, that every synced step is there.
//!
//! A worker is a program of the server (`duplex-lab files`), so that it dies with it. Its journal lies on the test
//! machine, which does not die.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use super::Seed;

/// Files of one worker.
const SLOTS: u64 = 24;
/// Pieces of one file, at most.
const PIECES_MAX: usize = 8;
/// Bytes of one piece, at most.
const PIECE_BYTES_MAX: u64 = 24 << 10;

/// A piece of a file: its content follows from the tag.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Piece {
    tag: u64,
    bytes: u64,
}

impl Piece {
    fn random(seed: &mut Seed) -> Piece {
        Piece { tag: seed.bits(), bytes: 1 + seed.below(PIECE_BYTES_MAX) }
    }

    fn content(self) -> Vec<u8> {
        let mut seed = Seed::new(self.tag);
        let words = usize::try_from(self.bytes.div_ceil(8)).expect("a piece is small");
        let mut content: Vec<u8> = (0..words).flat_map(|_| seed.bits().to_le_bytes()).collect();
        content.truncate(usize::try_from(self.bytes).expect("a piece is small"));
        content
    }
}

fn content(pieces: &[Piece]) -> Vec<u8> {
    pieces.iter().flat_map(|piece| piece.content()).collect()
}

fn length(pieces: &[Piece]) -> u64 {
    pieces.iter().map(|piece| piece.bytes).sum()
}

/// One step on one file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
enum Step {
    /// A new file takes the name's place at once: written and synced beside it, renamed, its directory synced.
    Replace { slot: u64, pieces: Vec<Piece> },
    /// One more piece at the end.
    Append { slot: u64, piece: Piece },
    /// A piece is overwritten in place by another one of its length.
    Overwrite { slot: u64, index: usize, tag: u64 },
    /// Only so many pieces stay.
    Truncate { slot: u64, pieces: usize },
    /// The file goes.
    Remove { slot: u64 },
}

/// A line of the journal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
enum Line {
    Begin(Step),
    Synced,
}

/// What the synced steps left: each file's pieces.
#[derive(Debug, Default)]
struct Model(BTreeMap<u64, Vec<Piece>>);

impl Model {
    fn draw(&self, seed: &mut Seed) -> Step {
        let slot = seed.below(SLOTS);
        let Some(pieces) = self.0.get(&slot) else {
            return Step::Replace { slot, pieces: new_pieces(seed) };
        };
        match seed.below(8) {
            0 | 1 => Step::Replace { slot, pieces: new_pieces(seed) },
            2 | 3 if pieces.len() < PIECES_MAX => Step::Append { slot, piece: Piece::random(seed) },
            4 | 5 => {
                Step::Overwrite { slot, index: seed.below(pieces.len() as u64) as usize, tag: seed.bits() }
            }
            6 if pieces.len() > 1 => {
                Step::Truncate { slot, pieces: 1 + seed.below(pieces.len() as u64 - 1) as usize }
            }
            7 => Step::Remove { slot },
            _ => Step::Append { slot, piece: Piece::random(seed) },
        }
    }

    fn apply(&mut self, step: &Step) -> Result<()> {
        match step {
            Step::Replace { slot, pieces } => {
                self.0.insert(*slot, pieces.clone());
            }
            Step::Append { slot, piece } => self.pieces(*slot)?.push(*piece),
            Step::Overwrite { slot, index, tag } => {
                self.pieces(*slot)?.get_mut(*index).context("a piece that is not there")?.tag = *tag;
            }
            Step::Truncate { slot, pieces } => self.pieces(*slot)?.truncate(*pieces),
            Step::Remove { slot } => {
                self.0.remove(slot);
            }
        }
        Ok(())
    }

    fn pieces(&mut self, slot: u64) -> Result<&mut Vec<Piece>> {
        self.0.get_mut(&slot).with_context(|| format!("a step on file {slot}, which is not there"))
    }
}

fn new_pieces(seed: &mut Seed) -> Vec<Piece> {
    (0..1 + seed.below(PIECES_MAX as u64)).map(|_| Piece::random(seed)).collect()
}

fn path_of(directory: &Path, slot: u64) -> PathBuf {
    directory.join(format!("f{slot}"))
}

fn sync_directory(directory: &Path) -> Result<()> {
    Ok(File::open(directory)?.sync_all()?)
}

/// Carries a step out and syncs it.
fn carry_out(directory: &Path, model: &Model, step: &Step) -> Result<()> {
    let open = |slot: &u64| OpenOptions::new().write(true).open(path_of(directory, *slot));
    let of = |slot: &u64| model.0.get(slot).map_or(&[][..], Vec::as_slice);
    match step {
        Step::Replace { slot, pieces } => {
            let beside = directory.join(format!("new{slot}"));
            let file = File::create(&beside)?;
            file.write_all_at(&content(pieces), 0)?;
            file.sync_all()?;
            std::fs::rename(&beside, path_of(directory, *slot))?;
            sync_directory(directory)
        }
        Step::Append { slot, piece } => {
            let file = open(slot)?;
            file.write_all_at(&piece.content(), length(of(slot)))?;
            Ok(file.sync_data()?)
        }
        Step::Overwrite { slot, index, tag } => {
            let (before, rest) = of(slot).split_at(*index);
            let file = open(slot)?;
            let piece = Piece { tag: *tag, ..rest[0] };
            file.write_all_at(&piece.content(), length(before))?;
            Ok(file.sync_data()?)
        }
        Step::Truncate { slot, pieces } => {
            let file = open(slot)?;
            file.set_len(length(&of(slot)[..*pieces]))?;
            Ok(file.sync_all()?)
        }
        Step::Remove { slot } => {
            std::fs::remove_file(path_of(directory, *slot))?;
            sync_directory(directory)
        }
    }
}

/// Work that nobody syncs and nobody checks: it keeps the file system's own structures moving.
fn noise(directory: &Path, seed: &mut Seed) -> Result<()> {
    let (a, b) = (seed.below(40), seed.below(40));
    let tree = directory.join(format!("noise{a}"));
    match seed.below(4) {
        0 => std::fs::create_dir_all(tree.join(format!("deep{b}")))?,
        1 if tree.is_dir() => std::fs::remove_dir_all(tree)?,
        2 => {
            let _ = std::fs::rename(directory.join(format!("loose{a}")), directory.join(format!("loose{b}")));
        }
        _ => std::fs::write(directory.join(format!("loose{a}")), Piece::random(seed).content())?,
    }
    Ok(())
}

/// Works in a new directory until the file system fails, somebody ends it, or so many steps are done.
pub fn work(directory: &Path, journal: &Path, seed: u64, steps_max: u64) -> Result<()> {
    std::fs::create_dir_all(directory)?;
    sync_directory(directory.parent().context("a directory without a parent")?)?;
    let mut journal = OpenOptions::new().create_new(true).append(true).open(journal)?;
    let mut write = |line: &Line| -> Result<()> {
        let mut text = serde_json::to_vec(line)?;
        text.push(b'\n');
        Ok(journal.write_all(&text)?)
    };
    let (mut model, mut seed) = (Model::default(), Seed::new(seed));
    for _ in 0..steps_max {
        let step = model.draw(&mut seed);
        write(&Line::Begin(step.clone()))?;
        carry_out(directory, &model, &step).with_context(|| format!("{step:?}"))?;
        write(&Line::Synced)?;
        model.apply(&step)?;
        noise(directory, &mut seed)?;
    }
    Ok(())
}

/// How many synced steps a journal tells of.
pub fn steps(journal: &Path) -> Result<u64> {
    let text = std::fs::read(journal).unwrap_or_default();
    let synced = serde_json::to_string(&Line::Synced)?;
    Ok(text.split(|byte| *byte == b'\n').filter(|line| *line == synced.as_bytes()).count() as u64)
}

/// Reads a journal: what is synced, and the step that was under way. The last line may be half.
fn replay(journal: &Path) -> Result<(Model, Option<Step>)> {
    let text = std::fs::read_to_string(journal).with_context(|| journal.display().to_string())?;
    let (mut model, mut under_way) = (Model::default(), None);
    for line in text.split_inclusive('\n').filter(|line| line.ends_with('\n')) {
        match serde_json::from_str(line).with_context(|| format!("no line of a journal: {line}"))? {
            Line::Begin(step) => under_way = Some(step),
            Line::Synced => model.apply(&under_way.take().context("synced, and nothing was begun")?)?,
        }
    }
    Ok((model, under_way))
}

/// What may be found under a name.
#[derive(Debug, PartialEq, Eq)]
enum Found {
    Nothing,
    Bytes(Vec<u8>),
}

/// Checks a worker's directory after a crash: every synced step is there, and of the one under way nothing that it
/// could not have left. Gives how many files were compared.
pub fn check(directory: &Path, journal: &Path) -> Result<u64> {
    let (model, under_way) = replay(journal)?;
    for slot in 0..SLOTS {
        let found = match std::fs::read(path_of(directory, slot)) {
            Ok(bytes) => Found::Bytes(bytes),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Found::Nothing,
            Err(error) => return Err(error).with_context(|| format!("file {slot} cannot be read")),
        };
        let wanted = model.0.get(&slot);
        let exact = match wanted {
            Some(pieces) => Found::Bytes(content(pieces)),
            None => Found::Nothing,
        };
        if found == exact {
            continue;
        }
        let old = wanted.map_or(&[][..], Vec::as_slice);
        let possible = under_way.as_ref().is_some_and(|step| may_leave(step, slot, old, &found));
        if !possible {
            bail!("file {slot}: {} (under way: {under_way:?})", differs(&exact, &found));
        }
    }
    Ok(model.0.len() as u64)
}

/// Whether a crash in this step may leave this.
fn may_leave(step: &Step, slot: u64, old: &[Piece], found: &Found) -> bool {
    let Found::Bytes(bytes) = found else { return *step == Step::Remove { slot } };
    match step {
        Step::Replace { slot: of, pieces } => *of == slot && *bytes == content(pieces),
        Step::Append { slot: of, piece } => {
            let most = length(old) + piece.bytes;
            *of == slot && bytes.starts_with(&content(old)) && bytes.len() as u64 <= most
        }
        Step::Overwrite { slot: of, index, .. } => {
            let (before, rest) = old.split_at((*index).min(old.len()));
            let (Some(_), true) = (rest.first(), *of == slot) else { return false };
            let exact = content(old);
            let (begin, end) = (length(before) as usize, length(&old[..=*index]) as usize);
            bytes.len() == exact.len() && bytes[..begin] == exact[..begin] && bytes[end..] == exact[end..]
        }
        // What goes may be zeroes before it goes.
        Step::Truncate { slot: of, pieces } => {
            let kept = content(&old[..(*pieces).min(old.len())]);
            *of == slot && bytes.starts_with(&kept) && bytes.len() as u64 <= length(old)
        }
        Step::Remove { .. } => false,
    }
}

fn differs(wanted: &Found, found: &Found) -> String {
    match (wanted, found) {
        (Found::Bytes(wanted), Found::Bytes(found)) => {
            let at =
                wanted.iter().zip(found).position(|(a, b)| a != b).unwrap_or(wanted.len().min(found.len()));
            format!("{} bytes synced, {} found, different from {at} on", wanted.len(), found.len())
        }
        (Found::Bytes(wanted), Found::Nothing) => {
            format!("{} bytes synced, and there is no file", wanted.len())
        }
        (Found::Nothing, Found::Bytes(found)) => {
            format!("no file was synced, and one of {} bytes is there", found.len())
        }
        (Found::Nothing, Found::Nothing) => "equal".to_owned(),
    }
}

/// A program's part: works, or checks and prints the number of files.
pub fn run(directory: &Path, journal: &Path, check_only: bool, seed: u64) -> Result<()> {
    if check_only {
        ensure!(directory.is_dir(), "{} is not there", directory.display());
        println!("{}", check(directory, journal)?);
        return Ok(());
    }
    work(directory, journal, seed, u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::Space;

    /// A worker's directory and journal after some steps, and one of its files.
    fn worked(space: &Space) -> (PathBuf, PathBuf, u64) {
        let (directory, journal) = (space.path().join("files"), space.path().join("journal"));
        work(&directory, &journal, 7, 200).expect("worked");
        let (model, _) = replay(&journal).expect("replayed");
        let (slot, _) = model.0.iter().find(|(_, pieces)| pieces.len() > 1).expect("a file of two pieces");
        (directory, journal, *slot)
    }

    fn begin(journal: &Path, step: &Step) {
        let mut file = OpenOptions::new().append(true).open(journal).expect("opened");
        writeln!(file, "{}", serde_json::to_string(&Line::Begin(step.clone())).expect("text"))
            .expect("written");
    }

    #[test]
    fn what_was_synced_is_found_and_what_is_lost_or_torn_is_told() {
        let space = Space::new().expect("a directory");
        let (directory, journal, slot) = worked(&space);
        assert_eq!(steps(&journal).expect("counted"), 200);
        assert!(check(&directory, &journal).expect("all is there") > 5);
        let path = path_of(&directory, slot);
        let bytes = std::fs::read(&path).expect("read");
        for (what, spoilt) in [
            ("a byte", [&bytes[..9], &[bytes[9] ^ 1], &bytes[10..]].concat()),
            ("its end", bytes[..bytes.len() - 1].to_vec()),
            ("more", [&bytes[..], b"x"].concat()),
        ] {
            std::fs::write(&path, spoilt).expect("written");
            assert!(check(&directory, &journal).is_err(), "{what}");
        }
        std::fs::remove_file(&path).expect("removed");
        assert!(check(&directory, &journal).is_err());
        std::fs::write(&path, &bytes).expect("written");
        let free = (0..SLOTS).find(|slot| !path_of(&directory, *slot).exists()).expect("a free name");
        std::fs::write(path_of(&directory, free), b"back again").expect("written");
        assert!(check(&directory, &journal).is_err(), "a removed file is back");
    }

    #[test]
    fn the_step_under_way_may_leave_what_it_can_and_no_more() {
        let space = Space::new().expect("a directory");
        let (directory, journal, slot) = worked(&space);
        let path = path_of(&directory, slot);
        let bytes = std::fs::read(&path).expect("read");
        let (model, _) = replay(&journal).expect("replayed");
        let first = model.0[&slot][0].bytes as usize;
        begin(&journal, &Step::Overwrite { slot, index: 0, tag: 1 });
        let mut torn = bytes.clone();
        torn[..first].fill(0xAA);
        std::fs::write(&path, &torn).expect("written");
        check(&directory, &journal).expect("the piece that is overwritten may be torn");
        torn[first] ^= 1;
        std::fs::write(&path, &torn).expect("written");
        assert!(check(&directory, &journal).is_err(), "not the next one");
        begin(&journal, &Step::Append { slot, piece: Piece { tag: 3, bytes: 100 } });
        std::fs::write(&path, [&bytes[..], &[0; 60]].concat()).expect("written");
        check(&directory, &journal).expect("an end that is appended may be torn");
        std::fs::write(&path, [&bytes[..], &[0; 101]].concat()).expect("written");
        assert!(check(&directory, &journal).is_err(), "not longer than that");
        begin(&journal, &Step::Replace { slot, pieces: vec![Piece { tag: 5, bytes: 10 }] });
        std::fs::write(&path, Piece { tag: 5, bytes: 10 }.content()).expect("written");
        check(&directory, &journal).expect("the new file may have its name");
        std::fs::write(&path, &bytes[..5]).expect("written");
        assert!(check(&directory, &journal).is_err(), "half of it not");
        begin(&journal, &Step::Truncate { slot, pieces: 1 });
        std::fs::write(&path, &bytes[..first]).expect("written");
        check(&directory, &journal).expect("cut");
        std::fs::write(&path, [&bytes[..first], &[0; 9]].concat()).expect("written");
        check(&directory, &journal).expect("what is cut off may be zeroes before");
        std::fs::write(&path, &bytes[..first - 1]).expect("written");
        assert!(check(&directory, &journal).is_err(), "not shorter than that");
        begin(&journal, &Step::Remove { slot });
        std::fs::remove_file(&path).expect("removed");
        check(&directory, &journal).expect("removed");
    }
}
