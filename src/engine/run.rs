//! Runs of host clusters, the units of the allocator and of the guard.

use qcow2::HostCluster;

/// A run of host clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The first cluster.
    pub start: HostCluster,
    /// The number of clusters.
    pub count: u64,
}

/// A run of unused clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FreeRun {
    pub run: Run,
    /// It reads as zero on the host: never written, or punched since.
    pub known_zero: bool,
}
