//! Bounds of the storage that decide only how much is done or kept at a time, never what is right.
//!
//! Under the feature `tiny-bounds` each is so small that a short test goes past it.

/// A bound as the product has it, or a tiny one.
const fn bound(product: u64, tiny: u64) -> u64 {
    if cfg!(feature = "tiny-bounds") { tiny } else { product }
}

/// True if the bounds are tiny: no program for users is to be built that way.
pub const ARE_TINY: bool = cfg!(feature = "tiny-bounds");

/// Bytes of the first chunk: nearly all nonzero data is recognised here.
pub(crate) const ZEROES_FIRST_BYTES: usize = bound(64, 8) as usize;

/// Bytes of each further chunk.
pub(crate) const ZEROES_CHUNK_BYTES: usize = bound(1024, 16) as usize;

/// The most entries of one readv or writev (IOV_MAX).
pub(crate) const IOVECS_MAX: usize = bound(1024, 1) as usize;

/// The most bytes of one read or write: below the kernel's own bound, and a multiple of every alignment.
pub(crate) const CALL_BYTES_MAX: u64 = bound(1 << 30, 4 << 10);

/// Zeros that overwrite a range where the file system cannot zero it, and how many such blocks one call writes.
pub(crate) const ZEROS_BYTES: usize = bound(64 << 10, 4 << 10) as usize;

/// How many such blocks one call writes.
pub(crate) const ZEROS_PER_CALL: usize = bound(64, 1) as usize;

/// The most bytes of a read that is tried: above that, copying on several processors saves more than the pool costs.
pub(crate) const CACHED_BYTES_MAX: u64 = bound(32 << 10, 512);

/// The most operations in flight in one ring. More are queued.
pub(crate) const RING_DEPTH_MAX: u32 = bound(4096, 2) as u32;

/// Above this many operations in the ring, none on files in memory is offloaded: the worker threads have enough to do.
pub(crate) const OFFLOADED_MAX: usize = bound(64, 1) as usize;

/// The fewest bytes of an offloaded operation: below that, handing it to another thread costs more than running it.
pub(crate) const OFFLOADED_BYTES_MIN: u64 = bound(32 << 10, 512);

/// Events taken in one call; further ones stay for the next.
pub(crate) const EVENTS: usize = bound(16, 1) as usize;
