//! Recipes that failed once. Each always runs. Add the line of a new finding here, with a word on the fault.

/// The fault, and the recipe.
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
