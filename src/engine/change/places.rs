//! What of an image file belongs to its internal snapshots, for the guard of a writable disk.
//!
//! Owns the sorted list of the L2 tables that snapshots name. It reads nothing.

use std::ops::Range;

use qcow2::{Geometry, HostCluster, HostOffset, L1Entry};

/// Where internal snapshots have metadata.
#[derive(Clone, Debug, Default)]
pub struct SnapshotPlaces {
    /// The snapshot table and the L1 tables of snapshots: offset, and length in bytes.
    pub tables: Vec<(HostOffset, u64)>,
    /// Clusters of the L2 tables that those L1 tables name, the active disk's too where they are shared.
    l2_tables: Vec<u64>,
}

impl SnapshotPlaces {
    /// Notes the L2 tables that a piece of an L1 table names, as far as they begin in the file.
    pub fn add_l1(&mut self, geometry: &Geometry, bytes: &[u8], file_length: u64) {
        for word in bytes.as_chunks::<8>().0 {
            // What a bad entry was to name nobody knows.
            if let Ok(L1Entry::Table { offset, .. }) = L1Entry::decode(u64::from_be_bytes(*word), geometry)
                && offset.0 < file_length
            {
                self.l2_tables.push(geometry.host_cluster(offset).0);
            }
        }
    }

    /// Sorts the L2 tables and drops those that are named twice: to be done after each L1 table, so that what they share
    /// takes no memory.
    pub fn settle(&mut self) {
        self.l2_tables.sort_unstable();
        self.l2_tables.dedup();
    }

    /// The clusters of the L2 tables, sorted.
    pub(crate) fn into_l2_tables(mut self) -> L2Tables {
        self.settle();
        L2Tables(self.l2_tables.into())
    }
}

/// The L2 tables that snapshots name. The list stays as it is while the disk is open, as snapshots do.
#[derive(Debug, Default)]
pub(crate) struct L2Tables(Box<[u64]>);

impl L2Tables {
    /// The first of them in a range of clusters.
    pub fn first_in(&self, range: Range<u64>) -> Option<u64> {
        let first = self.0.partition_point(|cluster| *cluster < range.start);
        self.0.get(first).copied().filter(|cluster| *cluster < range.end)
    }

    /// True if a snapshot names the cluster as an L2 table.
    pub fn contains(&self, cluster: HostCluster) -> bool {
        self.0.binary_search(&cluster.0).is_ok()
    }

    /// The first cluster past all of them.
    pub fn end(&self) -> u64 {
        self.0.last().map_or(0, |last| last + 1)
    }
}
