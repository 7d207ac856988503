//! The crash machine: runs whole disks on a simulated host, crashes them everywhere, and compares what is left with what
//! was promised.
//!
//! `shape` makes images, `rig` runs a disk, `journal` is the oracle, `walk` makes the crash states of a run and compares,
//! `examine` looks at one, `second` has QEMU look at a sample, `trial` is a random run that a seed stands for, `tally`
//! counts.
#![allow(dead_code, reason = "each test target uses its own part of the machine")]

pub mod examine;
pub mod journal;
pub mod memory;
pub mod rig;
pub mod second;
pub mod shape;
pub mod stamp;
pub mod tally;
pub mod trial;
pub mod walk;
