//! Session bounds that limit only how much is done or kept at a time, never correctness.
//!
//! With the feature `tiny-bounds` each bound is so small that a short test exceeds it.

/// The product's bound, or a tiny one.
const fn bound(product: u64, tiny: u64) -> u64 {
    if cfg!(feature = "tiny-bounds") { tiny } else { product }
}

/// True if the bounds are tiny: programs for users must not be built that way.
pub const ARE_TINY: bool = cfg!(feature = "tiny-bounds");

/// The most chains of a portion, for the shortest requests.
pub(crate) const PORTION_MOST: u16 = bound(128, 1) as u16;

/// Chains of a portion for a disk that takes longer than one poll. With up to 32, reads on a disk were a tenth to a
/// fifth slower here. With fewer than 8, a request takes more processor time.
pub(crate) const PORTION_STARTED: u16 = bound(8, 1) as u16;

/// Bytes of data of a piece of a large request: a multiple of 512. A batch, between two looks for a stop, is less than
/// two pieces.
pub(crate) const PIECE_BYTES: u64 = bound(2 << 20, 4096);

/// Clusters or subclusters of a piece of a discard or write zeroes.
pub(crate) const PIECE_GRANULES: u64 = bound(1024, 1);

/// Pieces of one kind of request in flight on a queue at the same time.
pub(crate) const PIECE_SLOTS: usize = bound(32, 1) as usize;

/// While a queue has this many bytes in flight, it takes no more chains. A stop has to drain them.
pub(crate) const IN_FLIGHT_BYTES: u64 = bound(32 << 20, 8192);
