//! Bounds of an open disk. They decide only how much is done or cached at a time, never what is correct.
//!
//! Under the feature `tiny-bounds` each is so small that a short test exceeds it.

/// A bound of the product, or a tiny one for tests.
const fn bound(product: u64, tiny: u64) -> u64 {
    if cfg!(feature = "tiny-bounds") { tiny } else { product }
}

/// True if the bounds of this crate or of one below it are tiny: no program for users may be built that way.
pub const ARE_TINY: bool =
    cfg!(feature = "tiny-bounds") || engine::BOUNDS_ARE_TINY || storage::bounds::ARE_TINY;

/// Bytes of buffers that requests of one thread may hold at a time.
pub(crate) const BUFFER_BYTES: usize = bound(16 << 20, 8 << 10) as usize;

/// Bytes that one thread's requests may use for inflating at a time: compressed data and inflated clusters.
pub(crate) const INFLATING_BYTES: usize = bound(16 << 20, 1) as usize;

/// The most work, in bytes, that the requests of a disk off the fast path may be. At this bound a queue that has
/// its share takes no more of them. A stop has to wait for them: inflating that much takes about a tenth of a
/// second on two processors.
pub(crate) const WORK_BYTES: u64 = bound(32 << 20, 8 << 10);

/// A queue's share of that work, which it may have whatever the others have.
pub(crate) const WORK_BYTES_OF_A_QUEUE: u64 = bound(512 << 10, 1);

/// Bytes of free buffers that the pool retains.
pub(crate) const POOL_BYTES: usize = bound(8 << 20, 8 << 10) as usize;

/// Table writes in flight at a time.
pub(crate) const CUT_WRITES_AT_ONCE: usize = bound(32, 1) as usize;

/// The most bytes bounced at a time.
pub(crate) const BOUNCE_BYTES: usize = bound(1 << 20, 4 << 10) as usize;

/// The most bytes of the guest's that are copied into a buffer, so that one read brings the contents around them.
/// Copying this much costs less than a second request to the host.
pub(crate) const COPIED_MAX: u64 = bound(16 << 10, 512);

/// Punches in flight at a time.
pub(crate) const PUNCHES_AT_ONCE: usize = bound(16, 1) as usize;

/// Bytes of metadata read at a time.
pub(crate) const READ_PIECE_BYTES: u64 = bound(1 << 20, 4 << 10);

/// The most lists of an operation's memory that are retained.
pub(crate) const SPARE_MAX: usize = bound(128, 1) as usize;

/// The most runs that the fast path splits a request into.
pub(crate) const FAST_RUNS: usize = bound(8, 1) as usize;

/// L2 slices that a long discard processes before it lets the thread's other work continue.
pub(crate) const ROUNDS_AT_ONCE: u32 = bound(16, 1) as u32;

/// Table slices that are loaded at a time, so that a deep chain does not hold buffers without bound.
pub(crate) const LOADS_AT_ONCE: usize = bound(64, 1) as usize;

/// Rounds of a thread's turn, so that a task that is always ready cannot keep the thread from its other work.
pub(crate) const ROUNDS_OF_A_TURN: usize = bound(32, 4) as usize;
