//! The bounds of the engine that limit only how much is done or stored at a time. They never affect correctness.
//!
//! Under the feature `tiny-bounds` each is so small that a short test exceeds it. Models under loom have their own
//! bounds.

/// A bound: the product's value and a tiny one.
const fn bound(product: u64, tiny: u64) -> u64 {
    if cfg!(feature = "tiny-bounds") { tiny } else { product }
}

/// A bound: the product's value, a tiny one, and the one under loom.
const fn loom(product: u64, tiny: u64, loom: u64) -> u64 {
    if cfg!(loom) { loom } else { bound(product, tiny) }
}

/// True if the bounds are tiny: never build a program for users like this.
pub const ARE_TINY: bool = cfg!(feature = "tiny-bounds");

/// Bits in a chunk of [`crate::aimed`]; a multiple of 64.
pub(crate) const AIMED_CHUNK_BITS: u64 = bound(512, 64);
/// The most chunks there: about 50 MiB with their hash table. Enough exact bits for 16 TiB of 64 KiB clusters.
pub(crate) const AIMED_CHUNKS_MAX: usize = bound(1 << 19, 8) as usize;

/// The most bytes that a window of the allocator reserves.
pub(crate) const WINDOW_BYTES_MAX: u64 = bound(16 << 20, 64 << 10);
/// What the first window reserves; each next one is twice as large.
pub(crate) const WINDOW_BYTES_MIN: u64 = bound(1 << 20, 4 << 10);
/// The most clusters reserved at a time only because the reserved ones must not become metadata.
pub(crate) const NEW_CLUSTERS: u64 = bound(16, 1);

/// How often one request may move the start of the file's growth past clusters that an entry may name.
pub(crate) const DOUBTS_MAX: usize = 4096;

/// The most bytes of freed clusters that are held back, and the most clusters (a run takes 24 bytes of memory).
pub(crate) const QUARANTINE_BYTES_MAX: u64 = bound(256 << 20, 16 << 10);
pub(crate) const QUARANTINE_CLUSTERS_MAX: u64 = bound(1 << 16, 4);
/// On a small disk the limit is the disk's size divided by this, but never less than the bytes below.
pub(crate) const QUARANTINE_SHARE: u64 = 8;
pub(crate) const QUARANTINE_BYTES_MIN: u64 = bound(1 << 20, 4 << 10);
/// A cut is due early once this fraction (one in so many) of the clusters that may be held back waits for one.
pub(crate) const CUT_SHARE: u64 = 4;

/// A cut is due early once this fraction (one in so many) of the journal's records waits for one.
pub(crate) const JOURNAL_CUT_SHARE: u64 = 2;
/// The most clusters of a journal that are carried out under the engine's lock at a time.
pub(crate) const REPLAYED_AT_ONCE: u64 = bound(512, 2);

/// The most runs of free clusters: about 2 MiB.
pub(crate) const FREE_RUNS_MAX: usize = bound(1 << 15, 2) as usize;
/// The most chunks of free clusters: about 4 MiB.
pub(crate) const FREE_CHUNKS_MAX: usize = bound(1 << 15, 4) as usize;
/// Clusters in such a chunk; a multiple of 64.
pub(crate) const FREE_CHUNK_CLUSTERS: u64 = bound(512, 64);

/// Refblock slices searched for free clusters at a time.
pub(crate) const SCAN_SLICES: u64 = bound(8, 1);
/// The most clusters searched at a time: a slice of narrow refcounts covers many.
pub(crate) const SCAN_CLUSTERS: u64 = bound(16 << 10, 64);

/// The most runs reclaimed at a time.
pub(crate) const RECLAIM_RUNS_MAX: usize = bound(1024, 2) as usize;
/// The most clusters in them: each refcount is changed under the engine's lock.
pub(crate) const RECLAIM_CLUSTERS_MAX: u64 = bound(16 << 10, 3);
/// The most refblock slices that one reclaim may need: few compared with the cache.
pub(crate) const RECLAIM_SLICES_MAX: usize = bound(64, 2) as usize;

/// The most clusters searched for leaks at a time: each takes a byte and a bit for its references.
pub(crate) const LEAK_CLUSTERS_AT_ONCE: u64 = bound(16 << 20, 4096);
/// The most leaks recorded before they are freed.
pub(crate) const LEAKS_AT_ONCE: usize = bound(256 << 10, 64) as usize;
/// The most items that the search for leaks gets from the engine, or passes to it, at a time.
pub(crate) const LEAK_PIECE: usize = bound(1024, 2) as usize;

/// The most bytes of neighbouring table slices written as one.
pub(crate) const CUT_WRITE_BYTES_MAX: usize = bound(1 << 20, 4 << 10) as usize;

/// The most extents in one plan.
pub(crate) const EXTENTS_MAX: usize = bound(256, 1) as usize;
/// The most bytes resolved exactly at a time: a cluster may have only 512 bytes.
pub(crate) const EXACT_BYTES_MAX: u64 = bound(128 << 10, 512);
/// The most unfinished fills of map slices that are stored; at the limit all of them start over.
pub(crate) const FILLS_MAX: usize = bound(4096, 1) as usize;
/// The most table slices that one answer requires.
pub(crate) const LOADS_MAX: usize = bound(256, 1) as usize;

/// The most bytes of a table that are cached as one.
pub const TABLE_SLICE_BYTES_MAX: u64 = bound(4096, 512);
/// Limits for the bytes of tables and of the map, whatever the engine's parameters say.
pub(crate) const TABLES_BYTES_MAX: usize = bound(1 << 40, 4 << 10) as usize;
pub(crate) const MAP_BYTES_MAX: usize = bound(1 << 40, 256) as usize;
/// The most table slices that one insertion checks for eviction.
pub(crate) const SWEEP_STEPS: usize = bound(64, 4) as usize;

/// Words in a slice of the map: guest clusters that are resolved and evicted together. Few under loom, which models
/// each word.
pub const MAP_SLICE_WORDS: u64 = loom(512, 8, 2);
/// Entries in a leaf of the map's directory.
pub(crate) const MAP_LEAF_ENTRIES: u64 = loom(4096, 4, 4);
/// The most leaves, of 32 KiB each: enough for 2^31 clusters. An image of a few clusters may claim to be a disk of 2^60
/// bytes; this bounds its cost. Clusters in no leaf are resolved again each time.
pub(crate) const MAP_LEAVES_MAX: usize = loom(1024, 2, 4) as usize;
/// Leaves for which every directory has room, so that a disk may grow: 64 are 2^27 clusters. They are allocated when used.
pub(crate) const MAP_SPARE_LEAVES: usize = loom(64, 2, 1) as usize;
/// Frames that every map may have, whatever the size of its disk, which may grow. They are allocated when used.
pub(crate) const MAP_FRAMES_MIN: usize = loom(8192, 1, 1) as usize;
/// Frames that are allocated together. Each page is aligned to a system page, which would waste one for a single frame.
pub(crate) const MAP_CHUNK_FRAMES: usize = loom(16, 1, 1) as usize;
/// Frames that one sweep for idle memory checks, and the most that it returns.
pub(crate) const MAP_SWEPT_AT_ONCE: usize = bound(256, 1) as usize;
