//! The quarantine: clusters that were unlinked in memory, until their unlink is durable and all I/O that began before it
//! has ended.
//!
//! Owns how much may be held back, and the tasks that wait for room.

use std::collections::VecDeque;
use std::task::Waker;

use qcow2::{Geometry, HostCluster};

use crate::bounds::{
    CUT_SHARE, QUARANTINE_BYTES_MAX, QUARANTINE_BYTES_MIN, QUARANTINE_CLUSTERS_MAX, QUARANTINE_SHARE,
};
use crate::epoch::Epoch;
use crate::mutation::{Mutation, active};
use crate::run::HostRun;
use crate::status::HeldBack;
use crate::waiters::{Waiters, WakeList};

/// A run unlinked in memory.
#[derive(Clone, Copy, Debug)]
struct Freed {
    run: HostRun,
    /// The cut that makes the unlink durable; 0 if it was never linked in memory.
    cut: u64,
}

/// A run whose unlink is durable.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Unlinked {
    pub run: HostRun,
    /// It was in use before, not only allocated for a write that failed.
    pub was_used: bool,
    /// I/O begun in this epoch or earlier may still access the run.
    pub epoch: Epoch,
}

/// How many clusters leave by a reclaim.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reclaimed {
    pub clusters: u64,
    /// Those of them that were in use before.
    pub freed: u64,
}

/// See the top of this file.
pub(crate) struct Quarantine {
    /// Runs that wait for a cut.
    freed_runs: VecDeque<Freed>,
    /// Runs that wait for the end of I/O, and for a reclaim.
    unlinked: VecDeque<Unlinked>,
    /// Clusters in either.
    clusters: u64,
    /// Clusters that wait for a cut.
    uncut: u64,
    /// Clusters in either that were in use before.
    freed: u64,
    /// With so many clusters, requests that free or allocate must wait.
    clusters_max: u64,
    /// Clusters that ever left.
    given_back: u64,
    /// A task reclaims.
    reclaiming: bool,
    /// Tasks that wait for room.
    waiters: Waiters,
}

impl Quarantine {
    /// An empty quarantine for a disk.
    pub fn new(geometry: &Geometry) -> Self {
        let held_bytes = (geometry.size / QUARANTINE_SHARE).clamp(QUARANTINE_BYTES_MIN, QUARANTINE_BYTES_MAX);
        Quarantine {
            freed_runs: VecDeque::new(),
            unlinked: VecDeque::new(),
            clusters: 0,
            uncut: 0,
            freed: 0,
            clusters_max: (held_bytes >> geometry.cluster_bits).clamp(1, QUARANTINE_CLUSTERS_MAX),
            given_back: 0,
            reclaiming: false,
            waiters: Waiters::default(),
        }
    }

    /// Adds a cluster, joined with the last run where possible. `cut` is the cut that makes its unlink durable; 0 if it
    /// was never linked in memory.
    pub fn add(&mut self, cluster: HostCluster, cut: u64) {
        self.clusters += 1;
        self.uncut += 1;
        self.freed += u64::from(cut != 0);
        if let Some(last) = self.freed_runs.back_mut()
            && last.cut == cut
            && last.run.start.0 + last.run.count == cluster.0
        {
            last.run.count += 1;
            return;
        }
        self.freed_runs.push_back(Freed { run: HostRun { start: cluster, count: 1 }, cut });
    }

    /// A cut is durable: what it unlinked waits only for I/O of `epoch` and before.
    pub fn cut_is_durable(&mut self, cut: u64, epoch: Epoch) {
        let mut later = VecDeque::new();
        for freed in self.freed_runs.drain(..) {
            if freed.cut <= cut || active(Mutation::ReuseBeforeUnlink) {
                self.uncut -= freed.run.count;
                self.unlinked.push_back(Unlinked { run: freed.run, was_used: freed.cut != 0, epoch });
            } else {
                later.push_back(freed);
            }
        }
        self.freed_runs = later;
    }

    /// True if requests that free or allocate must wait until clusters leave.
    pub fn is_crowded(&self) -> bool {
        self.clusters >= self.clusters_max
    }

    /// The most clusters that may be held back; requests under way may exceed it.
    pub fn clusters_max(&self) -> u64 {
        self.clusters_max
    }

    /// True if enough clusters wait for a cut to make one due.
    pub fn wants_cut(&self) -> bool {
        self.uncut > 0 && self.uncut >= self.clusters_max / CUT_SHARE
    }

    /// True if leaks, too, may be held back without making a request wait for that.
    pub fn has_room_for_leaks(&self) -> bool {
        self.clusters < (self.clusters_max / CUT_SHARE).max(1)
    }

    /// What is held back now.
    pub fn held_back(&self) -> HeldBack {
        HeldBack {
            clusters: self.clusters,
            freed: self.freed,
            crowded: self.is_crowded(),
            uncut: self.uncut > 0,
            given_back: self.given_back,
        }
    }

    /// A task waits for clusters to leave.
    pub fn await_room(&mut self, waker: &Waker) {
        self.waiters.add(waker);
    }

    /// A task no longer waits for that.
    pub fn stop_waiting(&mut self, waker: &Waker) {
        self.waiters.remove(waker);
    }

    /// Wakes all tasks that wait for clusters to leave, or for room in the journal: they wait here, too.
    pub fn wake_all(&mut self, wakes: &mut WakeList) {
        wakes.append(self.waiters.take());
    }

    /// The runs whose unlink is durable, the oldest first. The first has at most `count` clusters: the rest of a longer
    /// one is a run of its own.
    pub fn unlinked(&mut self, count: u64) -> &VecDeque<Unlinked> {
        if let Some(first) = self.unlinked.front_mut()
            && first.run.count > count
        {
            let rest =
                HostRun { start: HostCluster(first.run.start.0 + count), count: first.run.count - count };
            let rest = Unlinked { run: rest, ..*first };
            first.run.count = count;
            self.unlinked.insert(1, rest);
        }
        &self.unlinked
    }

    /// True if some runs are durably unlinked.
    pub fn is_reclaimable(&self) -> bool {
        !self.unlinked.is_empty()
    }

    /// True if a task reclaims.
    pub fn is_reclaiming(&self) -> bool {
        self.reclaiming
    }

    /// A task begins to reclaim the first `runs` unlinked runs.
    pub fn begin_reclaim(&mut self, runs: usize) {
        self.unlinked.drain(..runs);
        self.reclaiming = true;
    }

    /// The reclaim has ended: these clusters leave. As many tasks go on as there is room for.
    pub fn end_reclaim(&mut self, left: Reclaimed, wakes: &mut WakeList) {
        self.reclaiming = false;
        self.clusters -= left.clusters;
        self.freed -= left.freed;
        self.given_back += left.clusters;
        let room = self.clusters_max.saturating_sub(self.clusters);
        wakes.append(self.waiters.take_first(room.max(1)));
    }
}

#[cfg(test)]
mod tests {
    use qcow2::Version;

    use super::*;

    fn geometry(cluster_size: u64, size: u64) -> Geometry {
        let cluster_bits = cluster_size.trailing_zeros();
        Geometry { version: Version::V3, cluster_bits, refcount_order: 4, extended_l2: false, size }
    }

    fn free(quarantine: &mut Quarantine, clusters: u64, cut: u64) {
        (0..clusters).for_each(|number| quarantine.add(HostCluster(1000 + 2 * number), cut));
    }

    #[test]
    fn the_quarantine_is_bounded_by_bytes_clusters_and_the_disk() {
        for (disk, cluster, most) in [
            (1 << 40, 65536, QUARANTINE_BYTES_MAX / 65536),
            (1 << 40, 512, QUARANTINE_CLUSTERS_MAX),
            (16 * QUARANTINE_BYTES_MIN, 4096, QUARANTINE_BYTES_MIN * 16 / QUARANTINE_SHARE / 4096),
            (0, 4096, QUARANTINE_BYTES_MIN / 4096),
            (0, 2 << 20, 1),
        ] {
            let (mut quarantine, most) = (Quarantine::new(&geometry(cluster, disk)), most.max(1));
            free(&mut quarantine, most - 1, 1);
            assert!(!quarantine.is_crowded(), "{disk} {cluster}");
            free(&mut quarantine, 1, 1);
            assert!(quarantine.is_crowded() && quarantine.wants_cut(), "{disk} {cluster}");
        }
    }

    #[test]
    fn a_cut_is_due_for_what_it_would_unlink_and_nothing_else() {
        let mut quarantine = Quarantine::new(&geometry(65536, 1 << 40));
        let due = (quarantine.clusters_max / CUT_SHARE).max(1);
        free(&mut quarantine, due, 1);
        assert!(quarantine.wants_cut());
        quarantine.cut_is_durable(1, Epoch(1));
        assert!(!quarantine.wants_cut());
        assert!(!quarantine.held_back().uncut && quarantine.held_back().clusters == due);
        free(&mut quarantine, due - 1, 2);
        assert_eq!((quarantine.wants_cut(), quarantine.held_back().uncut), (false, due > 1));
    }
}
