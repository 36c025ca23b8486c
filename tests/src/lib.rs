//! Simulator, acceptance cases and crash runs of Duplex, and the laboratory they run in.

pub mod cases;
pub mod crash;
pub mod lab;
pub mod scale;
pub mod sim;
