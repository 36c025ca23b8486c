//! Which way data goes when two servers meet: pure functions over both hellos.

pub mod decide;
pub mod pair;

#[cfg(test)]
pub(crate) mod fixtures;
