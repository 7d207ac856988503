//! Finds room for new metadata: free clusters in the file or past its end. Also adds the refblocks and the refcount
//! table that their refcounts need.
//!
//! Owns which clusters are taken. The plan decides what is written there.

use std::collections::{BTreeMap, BTreeSet};

use qcow2::entry::HOST_OFFSET_LIMIT;
use qcow2::header::REFCOUNT_TABLE_SIZE_MAX;
use qcow2::{Geometry, HostCluster};

use super::refusal::ChangeRefusal;
use crate::check::counts::Counts;
use crate::run::HostRun;

/// Takes free clusters.
pub(super) struct Room<'a> {
    /// Each taken cluster has the count 1 from then on.
    counts: &'a mut Counts,
    geometry: Geometry,
    /// The first cluster past the file.
    end: u64,
    pub taken: Vec<HostRun>,
}

/// The additions to the refcount structure that give all taken clusters a refcount.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Growth {
    /// New refblocks: index in the refcount table → cluster.
    pub blocks: BTreeMap<u64, u64>,
    /// A larger refcount table.
    pub table: Option<HostRun>,
}

impl<'a> Room<'a> {
    /// Starts with a file of this many clusters.
    pub fn new(counts: &'a mut Counts, geometry: Geometry, clusters: u64) -> Self {
        // The cluster after the last may be in use: the last table or data of a file need not be written whole.
        let end = clusters + u64::from(counts.get(clusters) > 0);
        Room { counts, geometry, end, taken: Vec::new() }
    }

    /// Takes the first run of `count` adjacent free clusters.
    pub fn take(&mut self, count: u64) -> Result<HostRun, ChangeRefusal> {
        // The header's cluster is never free.
        let (mut first, mut at) = (1, 1);
        while at < self.end && at - first < count {
            if self.counts.get(at) > 0 {
                first = at + 1;
            }
            at += 1;
        }
        let end = first.checked_add(count).ok_or(ChangeRefusal::TooLarge)?;
        if end > HOST_OFFSET_LIMIT >> self.geometry.cluster_bits {
            return Err(ChangeRefusal::TooLarge);
        }
        self.end = self.end.max(end);
        self.counts.grow(end);
        for cluster in first..end {
            self.counts.set(HostCluster(cluster), 1);
        }
        let run = HostRun::new(HostCluster(first), count);
        self.taken.push(run);
        Ok(run)
    }

    /// Adds refblocks, and a larger refcount table if needed, until every taken cluster has a refcount.
    pub fn grow(&mut self, known: &BTreeSet<u64>, table_entries: u64) -> Result<Growth, ChangeRefusal> {
        let (entries, per_cluster) = (self.geometry.refblock_entries(), self.geometry.cluster_size() / 8);
        let table_clusters_max = REFCOUNT_TABLE_SIZE_MAX >> self.geometry.cluster_bits;
        let mut growth = Growth::default();
        let mut seen = 0;
        loop {
            // Each new block takes a cluster too.
            while let Some(run) = self.taken.get(seen).copied() {
                seen += 1;
                for index in run.start.0 / entries..=(run.end().0 - 1) / entries {
                    if !known.contains(&index) && !growth.blocks.contains_key(&index) {
                        let block = self.take(1)?;
                        growth.blocks.insert(index, block.start.0);
                    }
                }
            }
            let highest = growth.blocks.keys().last().copied().unwrap_or(0);
            let reach = growth.table.map_or(table_entries, |table| table.count * per_cluster);
            if highest < reach {
                return Ok(growth);
            }
            if let Some(table) = growth.table.take() {
                for cluster in table.clusters() {
                    self.counts.set(HostCluster(cluster), 0);
                }
            }
            // The table gets half as many clusters again as needed, so that growth stays rare.
            let needed = (highest + 1).div_ceil(per_cluster);
            let wanted = (needed + needed.div_ceil(2)).min(table_clusters_max);
            if needed > table_clusters_max {
                return Err(ChangeRefusal::TooLarge);
            }
            growth.table = Some(self.take(wanted)?);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use qcow2::Version;

    fn geometry(refcount_order: u32) -> Geometry {
        Geometry { version: Version::V3, cluster_bits: 9, refcount_order, extended_l2: false, size: 0 }
    }

    fn full(clusters: u64) -> Counts {
        let mut counts = Counts::new(clusters + 1);
        (0..clusters).for_each(|cluster| counts.set(HostCluster(cluster), 1));
        counts
    }

    #[test]
    fn holes_are_taken_before_the_file_grows() {
        let mut counts = full(20);
        for hole in [5, 6, 8, 9, 10, 18, 19] {
            counts.set(HostCluster(hole), 0);
        }
        let mut room = Room::new(&mut counts, geometry(4), 20);
        let firsts: Vec<u64> = [3, 2, 4, 1].map(|count| room.take(count).expect("room").start.0).to_vec();
        assert_eq!(firsts, [8, 5, 18, 22]);
        assert_eq!(room.taken.len(), 4);
        assert_eq!((counts.get(21), counts.get(22), counts.get(23)), (1, 1, 0));
    }

    #[test]
    fn the_cluster_past_a_partial_last_cluster_may_be_in_use() {
        let mut counts = full(4);
        counts.set(HostCluster(4), 1);
        assert_eq!(Room::new(&mut counts, geometry(4), 4).take(1).expect("room").start.0, 5);
    }

    #[test]
    fn refblocks_count_themselves() {
        // Each block has 64 counts; the second block does not exist.
        let mut counts = full(63);
        let mut room = Room::new(&mut counts, geometry(6), 63);
        room.take(2).expect("room");
        let growth = room.grow(&BTreeSet::from([0]), 64).expect("growth");
        assert_eq!(growth, Growth { blocks: BTreeMap::from([(1, 65)]), table: None });
        assert_eq!(counts.get(65), 1);
    }

    #[test]
    fn a_table_that_is_too_short_is_replaced() {
        let mut counts = full(64 * 64);
        let known: BTreeSet<u64> = (0..64).collect();
        let mut room = Room::new(&mut counts, geometry(6), 64 * 64);
        room.take(1).expect("room");
        let growth = room.grow(&known, 64).expect("growth");
        assert_eq!(growth.blocks, BTreeMap::from([(64, 64 * 64 + 1)]));
        assert_eq!(growth.table, Some(HostRun::new(HostCluster(64 * 64 + 2), 3)));
    }
}
