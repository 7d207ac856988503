//! The locations of the top image's metadata. This is the header, the L1 table, the refcount table, refblocks, L2
//! tables, the same tables of internal snapshots, and everything that belongs to bitmaps.
//!
//! No guest data is ever written there and no such cluster is allocated, whatever the entries and refcounts of a
//! damaged or hostile image say. Conversely, a cluster to which this session sent data I/O never becomes metadata. That
//! I/O may still be under way, and a word of the map may send more there without checking the guard. So neither a
//! lookup nor I/O in place needs a check. docs/durability.md, "The guard", explains why each write is covered.
//!
//! By default QEMU does not protect the L2 tables that only snapshots name, because it would have to read them again at
//! every write. Here they are read once, at open, which bounds the size of the L1 tables of snapshots.

use std::collections::BTreeMap;
use std::ops::Range;

use qcow2::{Geometry, HostCluster, HostOffset, HostRange, L1Entry};

use crate::aimed::{Aimed, Known};
use crate::change::{L2Tables, SnapshotPlaces};
use crate::entries::{Entries, UsedEntry};
use crate::error::{EngineError, Proof, Structure};
use crate::refcounts::Refcounts;
use crate::rules::places;
use crate::run::HostRun;

/// A cluster and the metadata in it.
pub(crate) type Holder = (u64, Structure);

/// The clusters that hold metadata, and the aimed clusters, which never will.
#[derive(Default)]
pub(crate) struct MetadataGuard {
    /// First cluster → first cluster past the run, and its content. Runs do not overlap; equal neighbours are joined.
    runs: BTreeMap<u64, (u64, Structure)>,
    /// The clusters to which data I/O was aimed.
    aimed: Aimed,
    /// The L2 tables of snapshots; the active disk shares many of them.
    snapshot_l2: L2Tables,
}

/// A run of metadata of the same kind.
#[derive(Clone, Copy, Debug)]
pub struct MetadataRun {
    /// The clusters.
    pub run: HostRun,
    /// True for L2 tables. No other metadata is named by references.
    pub is_l2: bool,
}

impl MetadataGuard {
    /// The metadata of an image, as its tables name it.
    ///
    /// # Errors
    /// A bad entry, or two entries that name the same cluster.
    pub fn of_image(
        geometry: &Geometry,
        l1: &Entries,
        l1_offset: HostOffset,
        refcounts: &Refcounts,
        bitmaps: &[HostRange],
        snapshots: SnapshotPlaces,
    ) -> Result<Self, EngineError> {
        let mut guard = MetadataGuard::default();
        let overlap =
            |structure, index| move |(cluster, holds)| Proof::Overlap { structure, index, cluster, holds };
        guard.add(HostCluster(0), 1, Structure::Header).map_err(overlap(Structure::Header, 0))?;
        let l1_clusters = geometry.clusters_for(l1.len() * 8);
        guard
            .add(geometry.host_cluster(l1_offset), l1_clusters, Structure::L1)
            .map_err(overlap(Structure::L1, 0))?;
        guard
            .add(
                geometry.host_cluster(refcounts.table_offset),
                refcounts.table_clusters(),
                Structure::RefcountTable,
            )
            .map_err(overlap(Structure::RefcountTable, 0))?;
        for UsedEntry { index, .. } in refcounts.table.used() {
            if let Some(offset) = refcounts.block_offset(index)? {
                let cluster = geometry.host_cluster(offset);
                guard
                    .add(cluster, 1, Structure::Refblock)
                    .map_err(overlap(Structure::RefcountTable, index))?;
            }
        }
        for UsedEntry { index, raw } in l1.used() {
            // A bad L1 entry is reported when its range is used: the rest of the disk can be served.
            if let Ok(L1Entry::Table { offset, .. }) = L1Entry::decode(raw, geometry) {
                let cluster = geometry.host_cluster(offset);
                guard.add(cluster, 1, Structure::L2).map_err(overlap(Structure::L1, index))?;
            }
        }
        for (index, range) in bitmaps.iter().enumerate() {
            let (first, clusters) =
                (geometry.host_cluster(range.offset), geometry.clusters_for(range.length));
            guard
                .add(first, clusters, Structure::Bitmaps)
                .map_err(overlap(Structure::Bitmaps, index as u64))?;
        }
        for (index, range) in snapshots.tables.iter().enumerate() {
            let (first, clusters) =
                (geometry.host_cluster(range.offset), geometry.clusters_for(range.length));
            guard
                .add(first, clusters, Structure::Snapshots)
                .map_err(overlap(Structure::Snapshots, index as u64))?;
        }
        guard.snapshot_l2 = snapshots.into_l2_tables();
        for UsedEntry { index, raw } in l1.used() {
            // The entry allows changes in place although a snapshot uses the table, too.
            if let Ok(L1Entry::Table { offset, copied: true }) = L1Entry::decode(raw, geometry)
                && guard.snapshot_l2.contains(geometry.host_cluster(offset))
            {
                let cluster = geometry.host_cluster(offset).0;
                return Err(overlap(Structure::L1, index)((cluster, Structure::SnapshotL2)).into());
            }
        }
        Ok(guard)
    }

    /// Adds a run. At open, the only metadata that may be shared are the L2 tables of snapshots.
    ///
    /// # Errors
    /// The first of its clusters that is already in a run.
    pub fn add(&mut self, start: HostCluster, count: u64, holds: Structure) -> Result<(), Holder> {
        if count == 0 {
            return Ok(());
        }
        let (mut start, mut end) = (start.0, start.0 + count);
        if let Some(holder) = self.overlap(start..end) {
            return Err(holder);
        }
        let joins = |run: &(u64, Structure)| run.1 == holds;
        if let Some((before, _)) =
            self.runs.range(..start).next_back().filter(|(_, run)| run.0 == start && joins(run))
        {
            start = *before;
        }
        if let Some((past, _)) = self.runs.get(&end).copied().filter(joins) {
            self.runs.remove(&end);
            end = past;
        }
        self.runs.insert(start, (end, holds));
        Ok(())
    }

    /// Removes a run that no longer holds metadata.
    pub fn remove(&mut self, start: HostCluster, count: u64) {
        let (start, end) = (start.0, start.0 + count);
        let Some((&first, &(past, holds))) = self.runs.range(..=start).next_back() else { return };
        if past < end {
            return;
        }
        self.runs.remove(&first);
        if first < start {
            self.runs.insert(first, (start, holds));
        }
        if end < past {
            self.runs.insert(end, (past, holds));
        }
    }

    /// A cluster of a run that holds metadata, if there is one.
    pub fn within(&self, run: HostRun) -> Option<Holder> {
        let of_snapshot = self.snapshot_l2.first_in(run.clusters());
        self.overlap(run.clusters()).or(of_snapshot.map(|cluster| (cluster, Structure::SnapshotL2)))
    }

    /// Up to `most` runs of metadata that end past a cluster, in order. Leaves out the tables that only snapshots name.
    pub fn runs_from(&self, cluster: u64, most: usize) -> Vec<MetadataRun> {
        let before = self.runs.range(..cluster).next_back().filter(|(_, run)| run.0 > cluster);
        let runs = before.into_iter().chain(self.runs.range(cluster..)).take(most);
        let run = |start: u64, past| HostRun::new(HostCluster(start), past - start);
        runs.map(|(start, (past, holds))| MetadataRun {
            run: run(*start, past),
            is_l2: *holds == Structure::L2,
        })
        .collect()
    }

    /// True if a cluster that no metadata holds may do so: no data I/O was aimed at it.
    pub fn may_become_metadata(&self, cluster: u64) -> bool {
        self.aimed(cluster) == Known::Not
    }

    /// Declares that data may be written to a run, or the run punched, now or later: from now on it never becomes
    /// metadata. Call this before such I/O is planned, and before a word that allows it is published.
    ///
    /// # Errors
    /// A cluster of the run that holds metadata.
    pub fn aim(&mut self, run: HostRun) -> Result<(), Holder> {
        // A cluster that was aimed at before holds no metadata, and never will.
        if run.count == 1 && self.aimed(run.start.0) == Known::Surely {
            return Ok(());
        }
        if let Some(holder) = places::obstacle(self.within(run)) {
            return Err(holder);
        }
        self.aimed.add(run);
        Ok(())
    }

    /// Whether data I/O was aimed at a cluster in this session. If it was, or may have been, the cluster never becomes
    /// metadata.
    pub fn aimed(&self, cluster: u64) -> Known {
        places::aimed(self.aimed.knows(cluster))
    }

    /// The first cluster past the neighbours that the record no longer distinguishes from `cluster`.
    pub fn past_neighbours(&self, cluster: u64) -> u64 {
        self.aimed.past_neighbours(cluster)
    }

    /// The first cluster past all metadata.
    pub fn end(&self) -> u64 {
        self.runs.last_key_value().map_or(0, |(_, (past, _))| *past).max(self.snapshot_l2.end())
    }

    /// A cluster of a range that is in a run.
    fn overlap(&self, range: Range<u64>) -> Option<Holder> {
        let (&first, &(past, holds)) = self.runs.range(..range.end).next_back()?;
        (past > range.start && !range.is_empty()).then(|| (first.max(range.start), holds))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(start: u64, count: u64) -> HostRun {
        HostRun { start: HostCluster(start), count }
    }

    fn guard(runs: &[(u64, u64)]) -> MetadataGuard {
        let mut guard = MetadataGuard::default();
        for (start, count) in runs {
            guard.add(HostCluster(*start), *count, Structure::L2).expect("no overlap");
        }
        guard
    }

    fn runs(guard: &MetadataGuard) -> Vec<(u64, u64)> {
        guard.runs.iter().map(|(start, (past, _))| (*start, *past)).collect()
    }

    #[test]
    fn runs_join_overlap_and_split() {
        let mut guard = guard(&[(0, 1), (4, 0), (5, 2), (3, 2), (7, 1)]);
        assert_eq!(runs(&guard), [(0, 1), (3, 8)]);
        let taken = |cluster| Err((cluster, Structure::L2));
        assert_eq!(guard.add(HostCluster(2), 2, Structure::L1), taken(3));
        assert_eq!(guard.add(HostCluster(7), 9, Structure::L1), taken(7));
        let within = |start, count| guard.within(run(start, count)).map(|(cluster, _)| cluster);
        assert_eq!([within(2, 1), within(3, 1)], [None, Some(3)]);
        assert_eq!([within(1, 2), within(1, 3), within(7, 4), within(8, 4)], [None, Some(3), Some(7), None]);
        assert_eq!(guard.end(), 8);
        guard.remove(HostCluster(4), 2);
        assert_eq!(runs(&guard), [(0, 1), (3, 4), (6, 8)]);
        guard.remove(HostCluster(100), 1);
        guard.remove(HostCluster(7), 5);
        assert_eq!(guard.end(), 8, "what is not wholly there is not removed");
    }

    #[test]
    fn each_run_records_its_content() {
        let mut guard = guard(&[(4, 2)]);
        guard.add(HostCluster(6), 2, Structure::Refblock).expect("no overlap");
        guard.add(HostCluster(3), 1, Structure::Refblock).expect("no overlap");
        assert_eq!(runs(&guard), [(3, 4), (4, 6), (6, 8)]);
        let holds = |guard: &MetadataGuard, cluster| guard.within(run(cluster, 1));
        assert_eq!(holds(&guard, 5), Some((5, Structure::L2)));
        assert_eq!(holds(&guard, 6), Some((6, Structure::Refblock)));
        guard.remove(HostCluster(7), 1);
        assert_eq!((holds(&guard, 6), holds(&guard, 7)), (Some((6, Structure::Refblock)), None));
    }

    #[test]
    fn data_and_metadata_exclude_each_other() {
        let mut guard = guard(&[(4, 2)]);
        assert_eq!(guard.aim(run(2, 4)), Err((4, Structure::L2)));
        assert_eq!(guard.aimed(2), Known::Not, "nothing is aimed where something is in the way");
        assert_eq!(guard.aim(run(2, 2)), Ok(()));
        let aimed = [1, 2, 3, 4].map(|cluster| guard.aimed(cluster));
        assert_eq!(aimed, [Known::Not, Known::Surely, Known::Surely, Known::Not]);
    }
}
