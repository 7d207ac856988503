//! Where the top image has metadata: the header, the L1 table, the refcount table, refblocks and L2 tables, what
//! internal snapshots have of these, and all that belongs to bitmaps.
//!
//! No guest data is ever written there and no such cluster is handed out, whatever a damaged or hostile image's entries
//! and refcounts say. QEMU by default leaves out the L2 tables that only snapshots name, as it would have to read them
//! again at every write; here they are read once, at open, which bounds how large the L1 tables of snapshots may be.

use std::collections::BTreeMap;

use qcow2::{Geometry, HostCluster, HostOffset, L1Entry};

use crate::alloc::Run;
use crate::change::{L2Tables, SnapshotPlaces};
use crate::error::{EngineError, Structure};
use crate::refcounts::Refcounts;

/// Runs of clusters that hold metadata.
#[derive(Default)]
pub(crate) struct MetadataGuard {
    /// First cluster → first cluster past the run. Runs do not overlap; neighbours are joined.
    runs: BTreeMap<u64, u64>,
    /// Those of snapshots, many of them the active disk's too.
    snapshot_l2: L2Tables,
}

impl MetadataGuard {
    /// The metadata of an image, as its tables name it.
    ///
    /// # Errors
    /// A bad entry, or two entries that name the same place.
    pub fn of_image(
        geometry: &Geometry,
        l1: &[u64],
        l1_offset: HostOffset,
        refcounts: &Refcounts,
        bitmaps: &[(HostOffset, u64)],
        snapshots: SnapshotPlaces,
    ) -> Result<Self, EngineError> {
        let mut guard = MetadataGuard::default();
        let overlap = |structure, index| move |cluster| EngineError::Overlap { structure, index, cluster };
        guard.add(HostCluster(0), 1).map_err(overlap(Structure::L1, 0))?;
        let l1_clusters = geometry.clusters_for(l1.len() as u64 * 8);
        guard.add(geometry.host_cluster(l1_offset), l1_clusters).map_err(overlap(Structure::L1, 0))?;
        guard
            .add(geometry.host_cluster(refcounts.table_offset), refcounts.table_clusters())
            .map_err(overlap(Structure::RefcountTable, 0))?;
        for index in 0..refcounts.table.len() as u64 {
            if let Some(offset) = refcounts.block_offset(index)? {
                let cluster = geometry.host_cluster(offset);
                guard.add(cluster, 1).map_err(overlap(Structure::RefcountTable, index))?;
            }
        }
        for (index, raw) in l1.iter().enumerate() {
            // A bad L1 entry is named when its range is used: the rest of the disk can be served.
            if let Ok(L1Entry::Table { offset, .. }) = L1Entry::decode(*raw, geometry) {
                let cluster = geometry.host_cluster(offset);
                guard.add(cluster, 1).map_err(overlap(Structure::L1, index as u64))?;
            }
        }
        for (index, (offset, length)) in bitmaps.iter().enumerate() {
            let (first, clusters) = (geometry.host_cluster(*offset), geometry.clusters_for(*length));
            guard.add(first, clusters).map_err(overlap(Structure::Bitmaps, index as u64))?;
        }
        for (index, (offset, length)) in snapshots.tables.iter().enumerate() {
            let clusters = geometry.clusters_for(*length);
            guard
                .add(geometry.host_cluster(*offset), clusters)
                .map_err(overlap(Structure::Snapshots, index as u64))?;
        }
        guard.snapshot_l2 = snapshots.into_l2_tables();
        for (index, raw) in l1.iter().enumerate() {
            // To be changed in place though a snapshot has it too.
            if let Ok(L1Entry::Table { offset, copied: true }) = L1Entry::decode(*raw, geometry)
                && guard.snapshot_l2.contains(geometry.host_cluster(offset))
            {
                return Err(overlap(Structure::L1, index as u64)(geometry.host_cluster(offset).0));
            }
        }
        Ok(guard)
    }

    /// Adds a run.
    ///
    /// # Errors
    /// The first of its clusters that is in another run.
    pub fn add(&mut self, start: HostCluster, count: u64) -> Result<(), u64> {
        if count == 0 {
            return Ok(());
        }
        let (mut start, mut end) = (start.0, start.0 + count);
        if let Some(cluster) = self.overlap(start, end) {
            return Err(cluster);
        }
        if let Some((before, _)) = self.runs.range(..start).next_back().filter(|(_, past)| **past == start) {
            start = *before;
        }
        if let Some(past) = self.runs.remove(&end) {
            end = past;
        }
        self.runs.insert(start, end);
        Ok(())
    }

    /// Forgets a run that holds metadata no more.
    pub fn remove(&mut self, start: HostCluster, count: u64) {
        let (start, end) = (start.0, start.0 + count);
        let Some((&first, &past)) = self.runs.range(..=start).next_back() else { return };
        if past < end {
            return;
        }
        self.runs.remove(&first);
        if first < start {
            self.runs.insert(first, start);
        }
        if end < past {
            self.runs.insert(end, past);
        }
    }

    /// True if a cluster holds metadata.
    pub fn contains(&self, cluster: HostCluster) -> bool {
        self.overlap(cluster.0, cluster.0 + 1).is_some() || self.snapshot_l2.contains(cluster)
    }

    /// A cluster of a run that holds metadata, if there is one.
    pub fn within(&self, run: Run) -> Option<u64> {
        self.overlap(run.start.0, run.start.0 + run.count)
    }

    /// The first cluster past all metadata.
    pub fn end(&self) -> u64 {
        self.runs.last_key_value().map_or(0, |(_, past)| *past).max(self.snapshot_l2.end())
    }

    fn overlap(&self, start: u64, end: u64) -> Option<u64> {
        let (&first, &past) = self.runs.range(..end).next_back()?;
        (past > start && start < end).then(|| first.max(start))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guard(runs: &[(u64, u64)]) -> MetadataGuard {
        let mut guard = MetadataGuard::default();
        for (start, count) in runs {
            guard.add(HostCluster(*start), *count).expect("no overlap");
        }
        guard
    }

    #[test]
    fn runs_join_overlap_and_split() {
        let mut guard = guard(&[(0, 1), (4, 0), (5, 2), (3, 2), (7, 1)]);
        assert_eq!(guard.runs.iter().map(|(a, b)| (*a, *b)).collect::<Vec<_>>(), [(0, 1), (3, 8)]);
        assert_eq!(guard.add(HostCluster(2), 2), Err(3));
        assert_eq!(guard.add(HostCluster(7), 9), Err(7));
        assert!(!guard.contains(HostCluster(2)) && guard.contains(HostCluster(3)));
        let within = |start, count| guard.within(Run { start: HostCluster(start), count });
        assert_eq!([within(1, 2), within(1, 3), within(7, 4), within(8, 4)], [None, Some(3), Some(7), None]);
        assert_eq!(guard.end(), 8);
        guard.remove(HostCluster(4), 2);
        assert_eq!(guard.runs.iter().map(|(a, b)| (*a, *b)).collect::<Vec<_>>(), [(0, 1), (3, 4), (6, 8)]);
        guard.remove(HostCluster(100), 1);
        guard.remove(HostCluster(7), 5);
        assert_eq!(guard.end(), 8, "what is not wholly there is not removed");
    }
}
