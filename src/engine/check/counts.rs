//! One count per host cluster of the file.
//!
//! A page is allocated with its first count, so a sparse file costs little memory. A page takes two bytes per cluster.
//! Counts that do not fit in two bytes are stored separately.

use std::collections::HashMap;

use qcow2::{Geometry, HostCluster};

/// Clusters in a page.
const PAGE: u64 = 1024;
/// Marks a count in a page that is stored in `large`.
const LARGE: u16 = u16::MAX;

/// One count per cluster number; all begin at 0.
#[derive(Clone, Default)]
pub(crate) struct Counts {
    pages: Vec<Option<Box<[u16; PAGE as usize]>>>,
    large: HashMap<u64, u64>,
    clusters: u64,
}

impl Counts {
    /// Counts for the clusters below `clusters`.
    pub fn new(clusters: u64) -> Self {
        Counts { pages: vec![None; clusters.div_ceil(PAGE) as usize], large: HashMap::new(), clusters }
    }

    /// The count of a cluster; 0 for one past the last.
    pub fn get(&self, cluster: u64) -> u64 {
        let Some(Some(page)) = self.pages.get((cluster / PAGE) as usize) else { return 0 };
        match page[(cluster % PAGE) as usize] {
            LARGE => self.large[&cluster],
            small => u64::from(small),
        }
    }

    /// Sets the count of a cluster.
    ///
    /// # Panics
    /// If there is no such cluster: a programmer error.
    pub fn set(&mut self, cluster: HostCluster, count: u64) {
        let HostCluster(cluster) = cluster;
        assert!(cluster < self.clusters, "cluster {cluster} of {}", self.clusters);
        let slot = &mut self.pages[(cluster / PAGE) as usize];
        if slot.is_none() && count == 0 {
            return;
        }
        let page = slot.get_or_insert_with(|| Box::new([0; PAGE as usize]));
        let place = &mut page[(cluster % PAGE) as usize];
        if *place == LARGE {
            self.large.remove(&cluster);
        }
        *place = match u16::try_from(count) {
            Ok(small) if small != LARGE => small,
            _ => {
                self.large.insert(cluster, count);
                LARGE
            }
        };
    }

    /// Adds to the count of a cluster; the sum saturates.
    ///
    /// # Panics
    /// As for [`Counts::set`].
    pub fn add(&mut self, cluster: HostCluster, count: u64) {
        self.set(cluster, self.get(cluster.0).saturating_add(count));
    }

    /// Subtracts from the count of a cluster; the result is at least 0.
    ///
    /// # Panics
    /// As for [`Counts::set`].
    pub fn subtract(&mut self, cluster: HostCluster, count: u64) {
        self.set(cluster, self.get(cluster.0).saturating_sub(count));
    }

    /// The clusters of all pages that are allocated here or in `other`, ascending.
    pub fn touched(&self, other: &Counts) -> impl Iterator<Item = u64> + use<> {
        let last = self.clusters.max(other.clusters);
        let numbers = 0..self.pages.len().max(other.pages.len());
        let has = |counts: &Counts, number: usize| counts.pages.get(number).is_some_and(Option::is_some);
        let pages: Vec<usize> = numbers.filter(|n| has(self, *n) || has(other, *n)).collect();
        pages.into_iter().flat_map(move |number| {
            let first = number as u64 * PAGE;
            first..(first + PAGE).min(last)
        })
    }

    /// Extends the counts to this many clusters; the new counts are 0.
    pub fn grow(&mut self, clusters: u64) {
        self.clusters = self.clusters.max(clusters);
        self.pages.resize(self.clusters.div_ceil(PAGE) as usize, None);
    }

    /// The bytes of the refblock at this index in the refcount table.
    pub fn refblock(&self, geometry: &Geometry, index: u64) -> Vec<u8> {
        let mut bytes = vec![0; geometry.cluster_size() as usize];
        let entries = geometry.refblock_entries();
        for (n, cluster) in (index * entries..(index + 1) * entries).enumerate() {
            let count = self.get(cluster);
            if count > 0 {
                qcow2::set_refcount(geometry.refcount_order, &mut bytes, n, count);
            }
        }
        bytes
    }

    /// Approximate bytes of memory held.
    pub fn held_bytes(&self) -> usize {
        let pages = self.pages.iter().flatten().count();
        self.pages.len() * size_of::<usize>() + pages * PAGE as usize * 2 + self.large.capacity() * 24
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_every_size_are_kept_apart() {
        let mut counts = Counts::new(3 * PAGE + 5);
        let values = [0, 1, 65_534, 65_535, 65_536, u64::MAX];
        for (n, value) in values.iter().enumerate() {
            counts.set(HostCluster(n as u64), *value);
            counts.set(HostCluster(3 * PAGE + 4 - n as u64 % 5), *value);
        }
        assert_eq!([0, 1, 2, 3, 4, 5].map(|n| counts.get(n)), values);
        counts.add(HostCluster(2), 1);
        counts.add(HostCluster(5), 1);
        counts.subtract(HostCluster(3), 1);
        counts.subtract(HostCluster(0), 1);
        assert_eq!([0, 2, 3, 5].map(|n| counts.get(n)), [0, 65_535, 65_534, u64::MAX]);
        counts.set(HostCluster(4), 7);
        assert_eq!(counts.get(4), 7);
        assert_eq!(counts.get(PAGE), 0);
        assert_eq!(counts.get(99 * PAGE), 0);
    }

    #[test]
    fn only_touched_pages_are_walked_and_held() {
        let mut counts = Counts::new(1 << 30);
        let mut other = Counts::new(PAGE + 1);
        assert_eq!(counts.touched(&other).count(), 0);
        counts.set(HostCluster(9 * PAGE), 0);
        assert_eq!(counts.touched(&other).count(), 0);
        counts.add(HostCluster(7 * PAGE + 3), 1);
        counts.add(HostCluster((1 << 30) - 1), 1);
        other.add(HostCluster(PAGE), 1);
        let walked: Vec<u64> = counts.touched(&other).collect();
        assert_eq!(walked.len() as u64, 3 * PAGE);
        assert_eq!((walked[0], walked[PAGE as usize]), (PAGE, 7 * PAGE));
        assert_eq!(other.touched(&counts).collect::<Vec<_>>(), walked);
        assert!(counts.held_bytes() < 10 << 20);
        other.grow(4 * PAGE + 1);
        other.add(HostCluster(4 * PAGE), 1);
        assert_eq!(other.touched(&other).last(), Some(4 * PAGE));
    }
}
