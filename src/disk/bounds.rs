//! Bounds of an open disk that decide only how much is done or kept at a time, never what is right.
//!
//! Under the feature `tiny-bounds` each is so small that a short test goes past it.

/// A bound as the product has it, or a tiny one.
const fn bound(product: u64, tiny: u64) -> u64 {
    if cfg!(feature = "tiny-bounds") { tiny } else { product }
}

/// True if the bounds of this crate or of one below it are tiny: no program for users is to be built that way.
pub const ARE_TINY: bool =
    cfg!(feature = "tiny-bounds") || engine::BOUNDS_ARE_TINY || storage::bounds::ARE_TINY;

/// Bytes of buffers that requests of one thread may hold at a time.
pub(crate) const BUFFER_BYTES: usize = bound(16 << 20, 8 << 10) as usize;

/// Bytes that clusters being inflated by one thread's requests may take at a time: their data and what becomes of it.
pub(crate) const INFLATING_BYTES: usize = bound(16 << 20, 1) as usize;

/// Bytes of free buffers kept for the next.
pub(crate) const POOL_BYTES: usize = bound(8 << 20, 8 << 10) as usize;

/// Table writes in flight at a time.
pub(crate) const CUT_WRITES_AT_ONCE: usize = bound(32, 1) as usize;

/// The most bytes bounced at a time.
pub(crate) const BOUNCE_BYTES: usize = bound(1 << 20, 4 << 10) as usize;

/// The most of the guest's bytes that are copied and written again from a buffer, so that what lies around them is one
/// read: copying so much costs less than a second request to the host.
pub(crate) const COPIED_MAX: u64 = bound(16 << 10, 512);

/// Punches in flight at a time.
pub(crate) const PUNCHES_AT_ONCE: usize = bound(16, 1) as usize;

/// Bytes of metadata read at a time.
pub(crate) const READ_PIECE_BYTES: u64 = bound(1 << 20, 4 << 10);

/// The most lists of an operation's memory that are kept for the next.
pub(crate) const SPARE_MAX: usize = bound(128, 1) as usize;

/// The most runs that the fast path splits a request into.
pub(crate) const FAST_RUNS: usize = bound(8, 1) as usize;

/// L2 slices that a long discard goes through before it lets the thread's other work go on.
pub(crate) const ROUNDS_AT_ONCE: u32 = bound(16, 1) as u32;

/// Table slices that are loaded at a time, so that a deep chain does not hold buffers without bound.
pub(crate) const LOADS_AT_ONCE: usize = bound(64, 1) as usize;

/// Rounds of a thread's turn, so that a task that is always ready cannot keep the thread from its other work.
pub(crate) const ROUNDS_OF_A_TURN: usize = bound(32, 4) as usize;
