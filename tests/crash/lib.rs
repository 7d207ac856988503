//! The crash machine. It runs whole disks on a simulated host, crashes them at every instant, and compares the
//! images that remain with the promises of durability.
//!
//! - Images: `shape` makes them, `compressed` adds compressed clusters, `bitmap` adds a bitmap, and `hidden` shares
//!   their clusters with a snapshot.
//! - Runs: `rig` runs a disk and `journal` is the oracle.
//! - Crash states: `walk` makes and compares them, `examine` examines one, and `recovery` completes its search for
//!   leaks. `second` has QEMU check a sample, and `tally` counts.
//! - Kinds of runs: `sequences` are all the short runs, and a `trial` is a long random run given by a number.
//!   A `campaign` is many of these. In `deaths` only the daemon dies. In `faulty` the host fails, and in `scarce` it
//!   runs out of space. `windows` are the two mistakes of QEMU.
//!   `overlaps` are images on which data and metadata claim the same location. `changes` are single changes of closed
//!   images.
//! - `direct` sends a disk single requests, for tests of one situation.

pub mod bitmap;
pub mod campaign;
pub mod changes;
pub mod compressed;
pub mod deaths;
pub mod direct;
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

/// The number in an environment variable.
pub fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|text| text.parse().ok())
}

/// The number of threads of a campaign.
pub fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from).min(16)
}
