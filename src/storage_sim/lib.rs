//! A simulated host for tests: files in memory, a clock and a scheduler that follow from a seed, faults, and crashes.
//!
//! [`SimWorld`] is the host. The code under test gets [`SimWorld::storage`] in place of real files, and one thread turns
//! all of its queues. The world records what was done to the files; [`Replay`] walks through that [`History`] and makes
//! the [`Image`] that a crash at any instant may leave, each the start of another world. What a disk may do is said in
//! `replay`, what completes when in `world`. Never a real file, a real clock, or randomness but from the seed.
#![forbid(unsafe_code)]

mod contents;
mod crash;
mod fault;
mod history;
mod image;
mod plan;
mod queue;
mod ranges;
mod replay;
mod world;

#[cfg(test)]
mod crash_tests;
#[cfg(test)]
mod tests;

pub use contents::{Contents, PAGE_BYTES};
pub use crash::{CrashLimits, CrashScope};
pub use fault::{Fault, FaultId, Outcome, Verb};
pub use history::{History, Moment};
pub use image::Image;
pub use plan::CrashPlan;
pub use queue::{Hung, SimQueue, SimStorage};
pub use ranges::Ranges;
pub use replay::Replay;
pub use strata_random::Random;

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use storage::Errno;
use world::World;

/// Room for files in a new world: more than any test fills, and little enough that no claim of a file's size costs the
/// test's own memory.
const SPACE_BYTES: u64 = 4 << 30;

/// What kind of host it is.
#[derive(Clone, Debug)]
pub struct SimOptions {
    /// Offsets and lengths must be multiples of this, in bytes: a power of two.
    pub offset_alignment: u32,
    /// Addresses and lengths of memory must be multiples of this, in bytes: a power of two.
    pub memory_alignment: u32,
    /// The file system can punch holes; else they fail with EOPNOTSUPP, as do the next two.
    pub punch: bool,
    /// The file system can zero ranges.
    pub zero: bool,
    /// The file system can allocate space ahead.
    pub allocate: bool,
    /// Latencies are random, so that completions come in any order and effects at any time before; else everything
    /// happens in the order of the pushes.
    pub shuffle: bool,
    /// Keep a [`History`]. Costs a little time and all that is written in memory.
    pub record: bool,
}

impl Default for SimOptions {
    /// Direct I/O on a file system that can do everything, shuffled and recorded.
    fn default() -> Self {
        SimOptions {
            offset_alignment: 512,
            memory_alignment: 512,
            punch: true,
            zero: true,
            allocate: true,
            shuffle: true,
            record: true,
        }
    }
}

impl SimOptions {
    /// For looking at what a crash left: in order, and without a record.
    pub fn calm() -> Self {
        SimOptions { shuffle: false, record: false, ..Self::default() }
    }
}

/// A simulated host. Handles are copies; all see the same files, clock and faults.
#[derive(Clone)]
pub struct SimWorld {
    state: Arc<Mutex<World>>,
}

impl SimWorld {
    /// A host without files. Everything that is random follows from the seed and from the calls made.
    pub fn new(seed: u64, options: SimOptions) -> Self {
        Self::from_image(Image::default(), seed, options)
    }

    /// A host with the files of an image, all durable: what is found after a crash. There are no locks.
    pub fn from_image(image: Image, seed: u64, options: SimOptions) -> Self {
        SimWorld { state: Arc::new(Mutex::new(World::new(image, seed, options))) }
    }

    fn lock(&self) -> MutexGuard<'_, World> {
        queue::lock_world(&self.state)
    }

    /// Adds a file with these bytes, which count as durable.
    ///
    /// # Panics
    /// If there is a file of this name.
    pub fn add_file(&self, path: impl AsRef<Path>, bytes: &[u8]) {
        self.lock().add_file(path.as_ref(), bytes);
    }

    /// What a new process has: no file open. Its locks are its own.
    pub fn storage(&self) -> SimStorage {
        SimStorage::new(self.clone())
    }

    /// The files as reads see them now.
    pub fn image(&self) -> Image {
        self.lock().image()
    }

    /// The time now.
    pub fn now(&self) -> Instant {
        self.lock().now()
    }

    /// Lets time pass, with all that falls due in it.
    pub fn pass(&self, time: Duration) {
        self.lock().pass(time);
    }

    /// Lets the next thing happen: an effect or a completion. False if nothing is in flight that can go on.
    pub fn step(&self) -> bool {
        self.lock().step()
    }

    /// True if nothing in flight can go on, and no queue has anything to submit, to reap or to be woken for. Timers are
    /// not counted: they are known only to those who wait.
    pub fn is_idle(&self) -> bool {
        self.lock().is_idle()
    }

    /// The present instant in the history: for noting what had been promised when.
    pub fn moment(&self) -> Moment {
        self.lock().moment()
    }

    /// The run so far; empty if the world does not record.
    pub fn history(&self) -> History {
        self.lock().history.clone()
    }

    /// Injects a fault, for operations pushed from now on.
    pub fn inject(&self, fault: Fault) -> FaultId {
        self.lock().faults.add(fault)
    }

    /// Injects none of the faults any more. What hangs, hangs on.
    pub fn withdraw_faults(&self) {
        self.lock().faults.withdraw_all();
    }

    /// How many operations a fault has hit.
    pub fn hits(&self, fault: FaultId) -> u64 {
        self.lock().faults.hits(fault)
    }

    /// How many operations of a kind were pushed, but for those that the host refuses at once.
    pub fn count(&self, verb: Verb) -> u64 {
        self.lock().faults.count(verb)
    }

    /// Ends what hangs: it completes well, in time.
    pub fn release_hung(&self) {
        self.lock().release_hung();
    }

    /// Gives the file system room for that many bytes, all files together. Whoever finds none gets `errno` (ENOSPC or
    /// EDQUOT); a write or allocation may then be done in part.
    pub fn set_space(&self, bytes: u64, errno: Errno) {
        let mut world = self.lock();
        (world.space, world.space_errno) = (bytes, errno);
    }

    /// Bytes allocated, all files together.
    pub fn allocated(&self) -> u64 {
        self.lock().files.iter().map(|file| file.contents.allocated()).sum()
    }
}
