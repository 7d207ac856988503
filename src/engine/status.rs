//! Numbers about an engine, for logs, metrics, housekeeping and waiting requests.

/// The freed clusters that are held back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HeldBack {
    /// Clusters that cannot be allocated yet.
    pub clusters: u64,
    /// Those that were in use; the others were allocated for writes that failed.
    pub freed: u64,
    /// Requests that free or allocate must wait, for clusters or for room in the journal.
    pub crowded: bool,
    /// Some of them, or records of a full journal, wait for a cut.
    pub uncut: bool,
    /// Clusters that were ever released for reuse.
    pub given_back: u64,
}

/// Numbers for logs and metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EngineStatus {
    /// Roughly the bytes of metadata that differ from the disk, or are written there and not durable.
    pub dirty_bytes: usize,
    /// Freed clusters that cannot be allocated yet.
    pub quarantined_clusters: u64,
    /// Their limit; requests under way may exceed it.
    pub quarantined_max: u64,
    /// Some are durably unlinked and only wait to be reclaimed.
    pub reclaimable: bool,
    /// A search for leaks is under way, or may still begin.
    pub searching: bool,
    /// Clusters with a refcount that are still unused. A crash leaks these, besides unflushed changes.
    pub reserved_clusters: u64,
    /// Cuts that became durable.
    pub cuts: u64,
    /// Memory of the chain map, in bytes.
    pub map_bytes: usize,
}
