//! The crash machine: runs whole disks on a simulated host, crashes them everywhere, and compares what is left with what
//! was promised.
//!
//! `shape` makes images, `hidden` shares their clusters with a snapshot, `rig` runs a disk, `journal` is the oracle, `walk` makes the crash states of a run and compares,
//! `examine` looks at one, `recovery` has its leaks searched for, `bitmap` at its bitmap, `second` has QEMU look at a sample, `tally` counts. `sequences` are all the short runs, a
//! `trial` is a long random one that a number stands for, `faulty` is one in which the host fails,
//! `scarce` one in which it runs out of space;
//! `windows` are the two mistakes of QEMU; `overlaps` are images on which data and metadata want the same place; `changes`
//! are those of images that nobody uses, by themselves.

pub mod bitmap;
pub mod changes;
pub mod compressed;
pub mod examine;
pub mod faulty;
pub mod hidden;
pub mod journal;
pub mod memory;
pub mod overlaps;
pub mod recovery;
pub mod rig;
pub mod scarce;
pub mod second;
pub mod sequences;
pub mod shape;
pub mod stamp;
pub mod tally;
pub mod trial;
pub mod walk;
pub mod windows;

/// A number in the environment.
pub fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|text| text.parse().ok())
}

/// How many threads a campaign has.
pub fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from).min(16)
}
