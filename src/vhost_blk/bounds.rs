//! Bounds of the session that decide only how much is done or kept at a time, never what is right.
//!
//! Under the feature `tiny-bounds` each is so small that a short test goes past it.

/// A bound as the product has it, or a tiny one.
const fn bound(product: u64, tiny: u64) -> u64 {
    if cfg!(feature = "tiny-bounds") { tiny } else { product }
}

/// True if the bounds are tiny: no program for users is to be built that way.
pub const ARE_TINY: bool = cfg!(feature = "tiny-bounds");

/// The most at a time: of the shortest there are.
pub(crate) const PORTION_MOST: u16 = bound(128, 1) as u16;

/// At a time for a disk that takes longer than a turn. With all of 32 at a time reads on a disk were a tenth to a fifth
/// slower here; with fewer than these a request takes more processor time.
pub(crate) const PORTION_STARTED: u16 = bound(8, 1) as u16;

/// Segments of discards in flight at the same time.
pub(crate) const SEGMENT_SLOTS: usize = bound(32, 1) as usize;
