//! Runs of guest clusters, each with the last claim on it, for `claims.rs`.
//!
//! Owns the search for the runs that a range meets. A few runs are in a short list, and only more are in a tree. So a
//! claim among a few others costs neither tree work nor an allocation.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use smallvec::SmallVec;

/// The most runs in the list. Searching it takes as long as searching the tree.
const LIST_MAX: usize = 8;

/// A run of clusters with the same last claim.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ClaimedRun {
    pub first: u64,
    pub last: u64,
    /// The slot of the last claim.
    pub claim: usize,
}

impl ClaimedRun {
    fn meets(&self, clusters: &RangeInclusive<u64>) -> bool {
        self.first <= *clusters.end() && *clusters.start() <= self.last
    }
}

/// Runs that do not overlap. Clusters in none are not claimed.
#[derive(Default)]
pub(crate) struct ClaimedRuns {
    /// All runs, in no order, while `tree` is empty; otherwise empty.
    list: SmallVec<[ClaimedRun; LIST_MAX]>,
    /// By first cluster.
    tree: BTreeMap<u64, ClaimedRun>,
}

impl ClaimedRuns {
    /// True if a run meets these clusters.
    pub fn overlaps(&self, clusters: &RangeInclusive<u64>) -> bool {
        self.list.iter().any(|run| run.meets(clusters)) || self.last_in_tree(clusters).is_some()
    }

    /// Removes and returns a run that meets these clusters.
    pub fn take_overlapping(&mut self, clusters: &RangeInclusive<u64>) -> Option<ClaimedRun> {
        if let Some(at) = self.list.iter().position(|run| run.meets(clusters)) {
            return Some(self.list.swap_remove(at));
        }
        let first = self.last_in_tree(clusters)?;
        self.tree.remove(&first)
    }

    /// The first cluster of the last run in the tree that meets these clusters.
    fn last_in_tree(&self, clusters: &RangeInclusive<u64>) -> Option<u64> {
        if self.tree.is_empty() {
            return None;
        }
        let (_, run) = self.tree.range(..=*clusters.end()).next_back()?;
        (run.last >= *clusters.start()).then_some(run.first)
    }

    /// Adds a run, which meets no other.
    pub fn insert(&mut self, run: ClaimedRun) {
        if self.tree.is_empty() {
            if self.list.len() < LIST_MAX {
                return self.list.push(run);
            }
            self.tree.extend(self.list.drain(..).map(|run| (run.first, run)));
        }
        self.tree.insert(run.first, run);
    }

    /// Removes the run that begins with cluster `first`, if `claim` is the last claim on it.
    pub fn remove(&mut self, first: u64, claim: usize) {
        let is_it = |run: &ClaimedRun| run.first == first && run.claim == claim;
        if let Some(at) = self.list.iter().position(is_it) {
            self.list.swap_remove(at);
        } else if self.tree.get(&first).is_some_and(is_it) {
            self.tree.remove(&first);
        }
    }

    /// The number of runs.
    #[cfg(test)]
    #[cfg(not(loom))]
    pub fn len(&self) -> usize {
        self.list.len() + self.tree.len()
    }
}
