//! Every bound of the engine that decides only how much is done or kept at a time, never what is right.
//!
//! Under the feature `tiny-bounds` each is so small that a short test goes past it. A model under loom has bounds of its
//! own.

/// A bound as the product has it, and a tiny one.
const fn bound(product: u64, tiny: u64) -> u64 {
    if cfg!(feature = "tiny-bounds") { tiny } else { product }
}

/// A bound as the product has it, a tiny one, and the one under loom.
const fn loom(product: u64, tiny: u64, loom: u64) -> u64 {
    if cfg!(loom) { loom } else { bound(product, tiny) }
}

/// True if the bounds are tiny: no program for users is to be built that way.
pub const ARE_TINY: bool = cfg!(feature = "tiny-bounds");

/// Bits in a chunk of [`crate::aimed`]; whole words.
pub(crate) const AIMED_CHUNK_BITS: u64 = bound(512, 64);
/// The most chunks there: some 50 MiB with the table that they are in, and exact bits enough for 16 TiB of clusters of
/// 64 KiB each.
pub(crate) const AIMED_CHUNKS_MAX: usize = bound(1 << 19, 8) as usize;

/// The most bytes that a window of the allocator reserves.
pub(crate) const WINDOW_BYTES_MAX: u64 = bound(16 << 20, 64 << 10);
/// What the first window reserves; each next one is twice as large.
pub(crate) const WINDOW_BYTES_MIN: u64 = bound(1 << 20, 4 << 10);
/// Clusters that are reserved at a time only because others are not to become metadata.
pub(crate) const NEW_CLUSTERS: u64 = bound(16, 1);

/// How often the place where the file is to grow is moved past clusters that an entry may name, for one request.
pub(crate) const DOUBTS_MAX: usize = 4096;

/// The most bytes of freed clusters that are held back, and the most clusters (a run of them takes 24 bytes of memory).
pub(crate) const QUARANTINE_BYTES_MAX: u64 = bound(64 << 20, 16 << 10);
pub(crate) const QUARANTINE_CLUSTERS_MAX: u64 = bound(1 << 16, 4);
/// Of a small disk, no more than this share of its size, and always at least so many bytes.
pub(crate) const QUARANTINE_SHARE: u64 = 8;
pub(crate) const QUARANTINE_BYTES_MIN: u64 = bound(1 << 20, 4 << 10);
/// A cut is due early once this share of what may be held back waits for one.
pub(crate) const CUT_SHARE: u64 = 4;

/// The most runs of free clusters: some 2 MiB.
pub(crate) const FREE_RUNS_MAX: usize = bound(1 << 15, 2) as usize;
/// The most chunks of free clusters: some 4 MiB.
pub(crate) const FREE_CHUNKS_MAX: usize = bound(1 << 15, 4) as usize;
/// Clusters in such a chunk; whole words.
pub(crate) const FREE_CHUNK_CLUSTERS: u64 = bound(512, 64);

/// Refblock slices searched for free clusters in one go.
pub(crate) const SCAN_SLICES: u64 = bound(8, 1);
/// The most clusters looked at in one go: narrow refcounts put many into a slice.
pub(crate) const SCAN_CLUSTERS: u64 = bound(16 << 10, 64);

/// The most runs reclaimed in one go.
pub(crate) const RECLAIM_RUNS_MAX: usize = bound(1024, 2) as usize;
/// The most clusters of them: each is counted under the engine's lock.
pub(crate) const RECLAIM_CLUSTERS_MAX: u64 = bound(16 << 10, 3);
/// The most refblock slices that one go may need: few against what the cache holds.
pub(crate) const RECLAIM_SLICES_MAX: usize = bound(64, 2) as usize;

/// The most clusters searched for leaks at a time: the references to each take a byte and a bit.
pub(crate) const LEAK_CLUSTERS_AT_ONCE: u64 = bound(16 << 20, 4096);
/// The most leaks noted before they are taken back.
pub(crate) const LEAKS_AT_ONCE: usize = bound(256 << 10, 64) as usize;
/// The most of anything that the search for leaks asks the engine for, or gives it, at a time.
pub(crate) const LEAK_PIECE: usize = bound(1024, 2) as usize;

/// The most bytes of neighbouring table slices written as one.
pub(crate) const CUT_WRITE_BYTES_MAX: usize = bound(1 << 20, 4 << 10) as usize;

/// The most extents that one plan gives.
pub(crate) const EXTENTS_MAX: usize = bound(256, 1) as usize;
/// The most bytes that are resolved exactly at a time: bounded, as clusters may have 512 bytes.
pub(crate) const EXACT_BYTES_MAX: u64 = bound(128 << 10, 512);
/// The most fills of map slices under way that are remembered; beyond that they start over.
pub(crate) const FILLS_MAX: usize = bound(4096, 1) as usize;
/// The most table slices that one answer asks for.
pub(crate) const LOADS_MAX: usize = bound(256, 1) as usize;

/// The most bytes of a table that are cached as one.
pub const TABLE_SLICE_BYTES_MAX: u64 = bound(4096, 512);
/// The most bytes of tables, and of the map, that are kept whatever the engine was given.
pub(crate) const TABLES_BYTES_MAX: usize = bound(1 << 40, 4 << 10) as usize;
pub(crate) const MAP_BYTES_MAX: usize = bound(1 << 40, 256) as usize;
/// The most table slices that one insertion looks at for one to evict.
pub(crate) const SWEEP_STEPS: usize = bound(64, 4) as usize;

/// Words in a slice of the map: guest clusters that are resolved and evicted together. Few under loom, which follows each
/// word.
pub const MAP_SLICE_WORDS: u64 = loom(512, 8, 2);
/// Entries in a leaf of the map's directory.
pub(crate) const MAP_LEAF_ENTRIES: u64 = loom(4096, 4, 4);
/// The most leaves, of 32 KiB each: enough for 2^31 clusters, so that a disk of some 2^60 bytes, which an image of a few
/// clusters may claim, does not cost more. What lies in no leaf is resolved anew each time.
pub(crate) const MAP_LEAVES_MAX: usize = loom(1024, 2, 4) as usize;
/// Frames that are made together: as each page begins where one of the system's does, single ones would waste as much.
pub(crate) const MAP_CHUNK_FRAMES: usize = loom(16, 1, 1) as usize;
/// Frames that one sweep for idle memory looks at, and the most that it gives.
pub(crate) const MAP_SWEPT_AT_ONCE: usize = bound(256, 1) as usize;
