//! The parts of an image file that belong to its internal snapshots, for the guard of a writable disk.
//!
//! Owns the sorted list of the L2 tables that snapshots name. It reads nothing from the file.

use std::ops::Range;

use qcow2::{Geometry, HostCluster, HostRange, L1Entry};

/// The fewest new L2 tables in the list for which sorting is worth while.
const UNSETTLED_MIN: usize = 1 << 16;

/// Where internal snapshots have metadata.
#[derive(Clone, Debug, Default)]
pub struct SnapshotPlaces {
    /// The snapshot table, then the L1 tables of snapshots.
    pub tables: Vec<HostRange>,
    /// Clusters of the L2 tables that those L1 tables name, including tables shared with the active disk.
    l2_tables: Vec<u64>,
    /// True if part of a snapshot is not where its entry says, or contains something unknown.
    unknown: bool,
    /// The number of items at the front of `l2_tables` that are sorted and unique.
    settled: usize,
}

impl SnapshotPlaces {
    /// Notes the L2 tables that a piece of an L1 table names, as far as they begin in the file. Tables that snapshots
    /// share are stored once: the list has at most twice as many items as there are tables, and one piece more.
    pub fn add_l1(&mut self, geometry: &Geometry, bytes: &[u8], file_length: u64) {
        for word in bytes.as_chunks::<8>().0 {
            match L1Entry::decode(u64::from_be_bytes(*word), geometry) {
                Ok(L1Entry::Unallocated) => {}
                Ok(L1Entry::Table { offset, .. }) if offset.0 < file_length => {
                    self.l2_tables.push(geometry.host_cluster(offset).0);
                }
                // The intended target of a bad entry is unknown.
                _ => self.unknown = true,
            }
        }
        // Sort only when the list has doubled: so each item is sorted a few times, however many snapshots there are.
        if self.l2_tables.len() - self.settled >= self.settled.max(UNSETTLED_MIN) {
            self.settle();
        }
    }

    /// Notes that a snapshot has an unknown part.
    pub fn has_unknown(&mut self) {
        self.unknown = true;
    }

    /// True if all parts of the file that belong to snapshots are known.
    pub fn is_whole(&self) -> bool {
        !self.unknown
    }

    /// Sorts the L2 tables and removes duplicates.
    fn settle(&mut self) {
        self.l2_tables.sort_unstable();
        self.l2_tables.dedup();
        self.settled = self.l2_tables.len();
    }

    /// The clusters of the L2 tables, sorted.
    pub(crate) fn into_l2_tables(mut self) -> L2Tables {
        self.settle();
        L2Tables(self.l2_tables.into())
    }
}

/// The L2 tables that snapshots name. The list does not change while the disk is open, as snapshots do not.
#[derive(Debug, Default)]
pub(crate) struct L2Tables(Box<[u64]>);

impl L2Tables {
    /// The first L2 table in a range of clusters.
    pub fn first_in(&self, range: Range<u64>) -> Option<u64> {
        let first = self.0.partition_point(|cluster| *cluster < range.start);
        self.0.get(first).copied().filter(|cluster| *cluster < range.end)
    }

    /// True if a snapshot names the cluster as an L2 table.
    pub fn contains(&self, cluster: HostCluster) -> bool {
        self.0.binary_search(&cluster.0).is_ok()
    }

    /// The first cluster past all L2 tables.
    pub fn end(&self) -> u64 {
        self.0.last().map_or(0, |last| last + 1)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn geometry() -> Geometry {
        Geometry {
            version: qcow2::Version::V3,
            size: 1 << 40,
            cluster_bits: 9,
            extended_l2: false,
            refcount_order: 4,
        }
    }

    /// Adds an L1 table that names these L2 tables.
    fn add(places: &mut SnapshotPlaces, tables: impl Iterator<Item = u64>) {
        let bytes: Vec<u8> = tables.flat_map(|cluster| (cluster << 9).to_be_bytes()).collect();
        places.add_l1(&geometry(), &bytes, u64::MAX);
    }

    /// How often the list was sorted, and its greatest length, while this many tables of 8,192 entries were added.
    fn effort(snapshots: u64, table_of: impl Fn(u64, u64) -> u64) -> (usize, usize) {
        let (mut places, mut sorts, mut most) = (SnapshotPlaces::default(), 0, 0);
        for snapshot in 0..snapshots {
            let before = places.settled;
            add(&mut places, (0..8192).map(|entry| table_of(snapshot, entry)));
            sorts += usize::from(places.settled != before);
            most = most.max(places.l2_tables.len());
        }
        (sorts, most)
    }

    #[test]
    fn tables_of_unrelated_snapshots_are_sorted_a_few_times() {
        let (sorts, _) = effort(512, |snapshot, entry| 1 + snapshot + entry * 512);
        assert!(sorts <= 8, "512 tables of 8,192 entries were sorted {sorts} times");
    }

    #[test]
    fn l2_tables_that_snapshots_share_are_stored_once() {
        let (_, most) = effort(512, |_, entry| 1 + entry);
        assert!(most <= 8192 + UNSETTLED_MIN + 8192, "{most} items for 8,192 tables");
        let mut places = SnapshotPlaces::default();
        for _ in 0..3 {
            add(&mut places, [7, 3, 9].into_iter());
        }
        let tables = places.into_l2_tables();
        assert_eq!(tables.0.as_ref(), [3, 7, 9]);
    }
}
