//! Crashes of the real program: at named boundaries (`points`, `scene`, `recover`, `sweep`), and at random under a lone
//! primary's writes (`rounds`). Nothing here shares code with the product: it starts a test build of the program, whose
//! `--crash-at` stops it dead.

pub mod points;
mod recover;
pub mod rounds;
mod scene;
pub mod sweep;

/// The test build of the program.
pub const PROGRAM: &str = "duplex-crash-at";
