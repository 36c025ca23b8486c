//! Benchmarks of Duplex beside QEMU's mirror: both run on this machine at the same time, over files of the same size
//! on the same disk, and are measured in turns, so that what else the machine does falls on both. Every figure is the
//! median of its runs; only ratios of one run of the program mean anything.

pub mod fio;
pub mod load;
pub mod pair;
pub mod process;
pub mod qemu;
pub mod resync;
pub mod scratch;
pub mod table;
pub mod trace;
pub mod write;
