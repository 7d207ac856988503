//! A simulated host for tests: files in memory, a clock and scheduler determined by a seed, faults, and crashes.
//!
//! [`SimWorld`] is the host. The code under test uses [`SimWorld::storage`] instead of real files, and one thread runs
//! all of its queues. The world records the operations on the files. [`Replay`] walks through that [`History`] and
//! builds the [`Image`]s that a crash at any instant may leave, each the start of another world. `replay` holds the
//! rules of the disk, `world` the order of completions. No real file, no real clock, and no randomness except from the
//! seed.
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

/// The space of a new world. It is more than any test fills, and too little for a huge claimed file size to exhaust
/// the test's own memory.
const SPACE_BYTES: u64 = 4 << 30;

/// The properties of the host.
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
    /// Latencies are random: completions come in any order, and effects at any time before. Otherwise everything
    /// happens in the order of the pushes.
    pub shuffle: bool,
    /// Record a [`History`]. Costs a little time, and memory for all written bytes.
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
    /// For examining the state after a crash: in order, and without a record.
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
    /// A host without files. All randomness follows from the seed and the calls made.
    pub fn new(seed: u64, options: SimOptions) -> Self {
        Self::from_image(Image::default(), seed, options)
    }

    /// A host with the files of an image, all durable, as after a crash. There are no locks.
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

    /// The storage of a new process: no file is open, and its locks are separate.
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

    /// Advances the clock, with all events that fall due.
    pub fn pass(&self, time: Duration) {
        self.lock().pass(time);
    }

    /// Runs the next event, an effect or a completion. False if no operation in flight can proceed.
    pub fn step(&self) -> bool {
        self.lock().step()
    }

    /// True if no operation in flight can proceed, and no queue has anything to submit, to reap or to wake up for.
    /// Timers do not count: only their waiters know them.
    pub fn is_idle(&self) -> bool {
        self.lock().is_idle()
    }

    /// The present instant in the history, to record what was promised by then.
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

    /// Stops injecting faults. Operations that hang remain hanging.
    pub fn withdraw_faults(&self) {
        self.lock().faults.withdraw_all();
    }

    /// How many operations a fault has hit.
    pub fn hits(&self, fault: FaultId) -> u64 {
        self.lock().faults.hits(fault)
    }

    /// How many operations of a kind were pushed, without those that the host refuses at once.
    pub fn count(&self, verb: Verb) -> u64 {
        self.lock().faults.count(verb)
    }

    /// Releases hanging operations: they succeed after some time.
    pub fn release_hung(&self) {
        self.lock().release_hung();
    }

    /// Limits the space of the file system, for all files together. An operation without room fails with `errno`
    /// (ENOSPC or EDQUOT); a write or allocation may then be done in part.
    pub fn set_space(&self, bytes: u64, errno: Errno) {
        let mut world = self.lock();
        (world.space, world.space_errno) = (bytes, errno);
    }

    /// Bytes allocated, all files together.
    pub fn allocated(&self) -> u64 {
        self.lock().files.iter().map(|file| file.contents.allocated()).sum()
    }
}
