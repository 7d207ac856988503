//! Runs of host clusters, the units of the allocator and of the guard.

use std::ops::Range;

use qcow2::HostCluster;

/// A run of host clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct HostRun {
    /// The first cluster.
    pub start: HostCluster,
    /// The number of clusters.
    pub count: u64,
}

impl HostRun {
    /// A run of `count` clusters.
    pub const fn new(start: HostCluster, count: u64) -> HostRun {
        HostRun { start, count }
    }

    /// A run of one cluster.
    pub const fn one(cluster: HostCluster) -> HostRun {
        HostRun::new(cluster, 1)
    }

    /// The first cluster past it.
    pub const fn end(self) -> HostCluster {
        HostCluster(self.start.0 + self.count)
    }

    /// The numbers of its clusters.
    pub const fn clusters(self) -> Range<u64> {
        self.start.0..self.start.0 + self.count
    }
}

/// A run of unused clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FreeRun {
    pub run: HostRun,
    /// It reads as zero on the host: never written, or punched since.
    pub known_zero: bool,
}
