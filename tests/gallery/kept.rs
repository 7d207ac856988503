//! Recipes that failed once. Each always runs; a new finding's line goes here with a word on what it was.

/// What was wrong, and the recipe.
pub const KEPT: &[(&str, &str)] = &[
    (
        "the copy of a shared L2 table that is larger than the cache never ended",
        "cluster=128K refcount=2 l2=extended below=deep snapshots=full memory=scarce seed=1000034",
    ),
    (
        "the bytes of a raw backing file past its last whole sector read as zero",
        "refcount=2 l2=extended lazy=on compression=zstd below=raw-ragged snapshots=later seed=1000022",
    ),
];
