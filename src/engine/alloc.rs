//! The host clusters that may be allocated: reserved windows, free runs, and the quarantine of freed clusters.
//!
//! The life of a cluster: free → window (its refcount is 1 in memory from then on) → in use → quarantine
//! (unlinked in memory) → free again. The last step requires that the unlink is durable and that all I/O begun before
//! it has ended.

use std::collections::VecDeque;
use std::ops::Range;

use qcow2::HostCluster;

use crate::bounds::{
    CUT_SHARE, QUARANTINE_BYTES_MAX, QUARANTINE_BYTES_MIN, QUARANTINE_CLUSTERS_MAX, QUARANTINE_SHARE,
    WINDOW_BYTES_MAX, WINDOW_BYTES_MIN,
};
use crate::epoch::Epoch;
use crate::free::{FreeClusters, TAIL_BYTES};
use crate::mutation::{Mutation, active};
use crate::run::{FreeRun, Run};
use crate::touched::Touched;
use crate::waiters::Waiters;

/// A run unlinked in memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Freed {
    pub run: Run,
    /// The cut that makes the unlink durable; 0 if it was never linked in memory.
    pub cut: u64,
}

/// A run whose unlink is durable.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Unlinked {
    pub run: Run,
    /// It was in use before, not only allocated for a write that failed.
    pub was_used: bool,
    /// I/O begun in this epoch or earlier may still access the run.
    pub epoch: Epoch,
}

pub(crate) struct Allocator {
    windows: VecDeque<FreeRun>,
    pub free: FreeClusters,
    /// The first cluster past all that were ever in use: the file grows from here.
    pub end: u64,
    window_clusters: u64,
    window_clusters_max: u64,
    pub quarantine: VecDeque<Freed>,
    pub unlinked: VecDeque<Unlinked>,
    /// Clusters in quarantine or unlinked.
    pub quarantined: u64,
    /// Clusters in quarantine, which wait for a cut.
    uncut: u64,
    /// Clusters in quarantine or unlinked that were in use before.
    pub freed: u64,
    /// With so many in quarantine or unlinked, requests that free or allocate must wait.
    quarantined_max: u64,
    /// Clusters that ever left the quarantine.
    pub given_back: u64,
    /// Tasks that wait for clusters to leave the quarantine.
    pub held_up: Waiters,
    /// The file's greatest length in this session, in bytes.
    pub file_length: u64,
    /// Metadata needs a cluster to which this session surely sent no data I/O, and no window has one.
    pub wants_new: bool,
    /// Somebody reserves, or makes the file longer: who waits for it. The file's length has one writer at a time, as setting
    /// it to what another found too short would cut off what was written meanwhile.
    pub reserving: Option<Waiters>,
    /// Somebody reclaims.
    pub reclaiming: bool,
    /// Refblock slices before this cluster have been searched for free clusters.
    pub scanned: u64,
    /// Where the search ends: the end of the file at open.
    pub scan_end: u64,
    /// The clusters at the end of the file at open that are free if its last writer did not close it.
    pub tail: Range<u64>,
    /// No cluster from this one on has a refcount or is reserved.
    pub used_end: u64,
    /// A search for leaks is complete, and found no reference to the tail.
    pub tail_is_spare: bool,
    /// The file was made longer, and its new length may not be durable.
    pub length_unsynced: bool,
    /// Clusters that the search for leaks must leave alone; `None` if it is over.
    pub touched: Option<Touched>,
}

impl Allocator {
    /// An allocator for a file of `end` clusters, for a disk of `disk` bytes.
    pub fn new(end: u64, cluster_size: u64, disk: u64) -> Self {
        let held_bytes = (disk / QUARANTINE_SHARE).clamp(QUARANTINE_BYTES_MIN, QUARANTINE_BYTES_MAX);
        Allocator {
            windows: VecDeque::new(),
            free: FreeClusters::default(),
            end,
            window_clusters: (WINDOW_BYTES_MIN / cluster_size).max(1),
            window_clusters_max: (WINDOW_BYTES_MAX / cluster_size).max(1),
            quarantine: VecDeque::new(),
            unlinked: VecDeque::new(),
            quarantined: 0,
            uncut: 0,
            freed: 0,
            quarantined_max: (held_bytes / cluster_size).clamp(1, QUARANTINE_CLUSTERS_MAX),
            given_back: 0,
            held_up: Waiters::default(),
            file_length: 0,
            wants_new: false,
            reserving: None,
            reclaiming: false,
            scanned: 0,
            scan_end: end,
            tail: 0..0,
            used_end: end,
            tail_is_spare: false,
            length_unsynced: false,
            touched: None,
        }
    }

    /// Records the file's length in bytes at open.
    pub fn opened(&mut self, file_length: u64, cluster_size: u64) {
        self.scan_end = file_length.div_ceil(cluster_size);
        self.file_length = file_length;
        self.tail = file_length.saturating_sub(TAIL_BYTES) / cluster_size..self.scan_end;
    }

    /// [`Allocator::used_end`] once the tail is known to be free: the tail's start, if nothing was reserved past it.
    pub fn used_end_without_tail(&self) -> u64 {
        if self.used_end == self.scan_end { self.tail.start } else { self.used_end }
    }

    /// The length that the file needs before refcounts are written, so that it ends with free clusters until it is
    /// closed; `None` if it is long enough. No reservation begins until [`crate::Engine::file_was_lengthened`].
    pub fn marked_length(&mut self, cluster_size: u64) -> Option<u64> {
        if active(Mutation::TailNotMarked) {
            return None;
        }
        let length = self.wanted_length(cluster_size)?;
        assert!(self.reserving.is_none(), "the file's length has one writer at a time");
        self.reserving = Some(Waiters::default());
        self.file_length = length;
        self.length_unsynced = true;
        Some(length)
    }

    /// The length with free clusters at the end, if the file is shorter.
    fn wanted_length(&self, cluster_size: u64) -> Option<u64> {
        let tail = TAIL_BYTES.max(cluster_size);
        let length = self.used_end.checked_mul(cluster_size).and_then(|end| end.checked_add(tail))?;
        (length > self.file_length).then_some(length)
    }

    /// The list for flushes that wait while a task sets the file's length; `None` if the next cut need not wait.
    pub fn waits_for_length(&mut self, cluster_size: u64) -> Option<&mut Waiters> {
        let grows = self.wanted_length(cluster_size).is_some();
        self.reserving.as_mut().filter(|_| grows)
    }

    /// The refcount of a cluster changes, or the cluster loses a reference: it is no leak.
    pub fn touch(&mut self, cluster: u64) {
        if active(Mutation::LeakSearchForgetsChanges) {
            return;
        }
        if let Some(touched) = &mut self.touched
            && !touched.add(cluster)
        {
            self.touched = None;
        }
    }

    /// Clusters that the next window is to have.
    pub fn window_clusters(&self) -> u64 {
        self.window_clusters
    }

    /// Takes up to `want` clusters as one run from the reserved windows.
    pub fn take(&mut self, want: u64) -> Option<FreeRun> {
        let window = self.windows.front_mut()?;
        let count = want.min(window.run.count);
        let taken = FreeRun { run: Run { start: window.run.start, count }, known_zero: window.known_zero };
        window.run.start.0 += count;
        window.run.count -= count;
        if window.run.count == 0 {
            self.windows.pop_front();
        }
        Some(taken)
    }

    /// Takes a cluster for which `fits` is true from either end of a window; `None` if there is none.
    pub fn take_where(&mut self, fits: impl Fn(u64) -> bool) -> Option<Run> {
        for at in 0..self.windows.len() {
            let run = &mut self.windows[at].run;
            let (first, last) = (run.start.0, run.start.0 + run.count - 1);
            let taken = if fits(first) {
                run.start.0 += 1;
                first
            } else if fits(last) {
                last
            } else {
                continue;
            };
            run.count -= 1;
            if run.count == 0 {
                self.windows.remove(at);
            }
            return Some(Run { start: HostCluster(taken), count: 1 });
        }
        None
    }

    /// True if requests that free or allocate must wait until held-back clusters are released.
    pub fn is_crowded(&self) -> bool {
        self.quarantined >= self.quarantined_max
    }

    /// The most clusters that may be held back; requests under way may exceed it.
    pub fn quarantined_max(&self) -> u64 {
        self.quarantined_max
    }

    /// True if enough clusters wait for a cut to make one due.
    pub fn wants_cut(&self) -> bool {
        self.uncut > 0 && self.uncut >= self.quarantined_max / CUT_SHARE
    }

    /// True if leaks, too, may be held back without making a request wait for that.
    pub fn has_room_for_leaks(&self) -> bool {
        self.quarantined < (self.quarantined_max / CUT_SHARE).max(1)
    }

    /// True if anything waits for a cut.
    pub fn waits_for_cut(&self) -> bool {
        self.uncut > 0
    }

    /// The host had no room for a window: makes the next one minimal. False if it already was.
    pub fn shrink_window(&mut self) -> bool {
        std::mem::replace(&mut self.window_clusters, 1) > 1
    }

    /// True if a cluster can be taken.
    pub fn has_window(&self) -> bool {
        !self.windows.is_empty()
    }

    /// Adds a reserved window. If no other is left, the next one will be twice as large.
    pub fn add_window(&mut self, window: FreeRun) {
        if self.windows.is_empty() {
            self.window_clusters = (self.window_clusters * 2).min(self.window_clusters_max);
        }
        if window.run.count > 0 {
            self.windows.push_back(window);
        }
    }

    /// Clusters in the windows.
    pub fn reserved_clusters(&self) -> u64 {
        self.windows.iter().map(|window| window.run.count).sum()
    }

    /// The clusters in the windows. A clean end frees them.
    pub fn windows(&self) -> Vec<FreeRun> {
        self.windows.iter().copied().collect()
    }

    pub fn clear_windows(&mut self) {
        self.windows.clear();
    }

    /// Forgets the free clusters at the file's very end, so that it can be cut there. Returns the new end.
    pub fn trim_end(&mut self) -> u64 {
        self.end = self.free.trim(self.end);
        // The spare tail that an earlier session left. This session reserved nothing there.
        if self.tail_is_spare && self.end == self.scan_end && self.used_end <= self.tail.start {
            self.end = self.free.trim(self.tail.start);
        }
        self.end
    }

    /// Moves what a durable cut unlinked from `quarantine` to `unlinked`.
    pub fn cut_is_durable(&mut self, cut: u64, epoch: Epoch) {
        let mut later = VecDeque::new();
        for freed in self.quarantine.drain(..) {
            if freed.cut <= cut || active(Mutation::ReuseBeforeUnlink) {
                self.uncut -= freed.run.count;
                self.unlinked.push_back(Unlinked { run: freed.run, was_used: freed.cut != 0, epoch });
            } else {
                later.push_back(freed);
            }
        }
        self.quarantine = later;
    }

    /// Splits the oldest unlinked run so that it has at most `count` clusters.
    pub fn split_first_unlinked(&mut self, count: u64) {
        let Some(first) = self.unlinked.front_mut() else { return };
        if first.run.count > count {
            let rest = Run { start: HostCluster(first.run.start.0 + count), count: first.run.count - count };
            let rest = Unlinked { run: rest, ..*first };
            first.run.count = count;
            self.unlinked.insert(1, rest);
        }
    }

    /// Puts a cluster into quarantine, joined with the last run where possible.
    pub fn free_later(&mut self, cluster: HostCluster, cut: u64) {
        self.touch(cluster.0);
        if active(Mutation::ReuseAtOnce) {
            return self.free.add(FreeRun { run: Run { start: cluster, count: 1 }, known_zero: false });
        }
        if cut == 0 && active(Mutation::AbortedTakenForZero) {
            return self.free.add(FreeRun { run: Run { start: cluster, count: 1 }, known_zero: true });
        }
        self.quarantined += 1;
        self.uncut += 1;
        self.freed += u64::from(cut != 0);
        if let Some(last) = self.quarantine.back_mut()
            && last.cut == cut
            && last.run.start.0 + last.run.count == cluster.0
        {
            last.run.count += 1;
            return;
        }
        self.quarantine.push_back(Freed { run: Run { start: cluster, count: 1 }, cut });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(start: u64, count: u64, known_zero: bool) -> FreeRun {
        FreeRun { run: Run { start: HostCluster(start), count }, known_zero }
    }

    #[test]
    fn windows_are_taken_in_order() {
        let mut alloc = Allocator::new(100, 65536, 1 << 30);
        alloc.add_window(run(100, 4, true));
        alloc.add_window(run(50, 2, false));
        assert_eq!(alloc.take(3), Some(run(100, 3, true)));
        assert_eq!(alloc.take(3), Some(run(103, 1, true)));
        assert_eq!(alloc.take(3), Some(run(50, 2, false)));
        assert_eq!(alloc.take(1), None);
    }

    #[test]
    fn a_cluster_is_chosen_at_either_end_of_a_window() {
        let mut alloc = Allocator::new(100, 65536, 1 << 30);
        alloc.add_window(run(10, 4, true));
        alloc.add_window(run(20, 1, true));
        let fits = |wanted: u64| move |cluster| cluster >= wanted;
        let one = |start| Some(Run { start: HostCluster(start), count: 1 });
        assert_eq!(alloc.take_where(fits(13)), one(13));
        assert_eq!(alloc.take_where(fits(0)), one(10));
        assert_eq!(alloc.take_where(fits(13)), one(20));
        assert_eq!((alloc.take_where(fits(13)), alloc.reserved_clusters()), (None, 2));
    }

    fn freed(alloc: &mut Allocator, clusters: u64, cut: u64) {
        (0..clusters).for_each(|number| alloc.free_later(HostCluster(1000 + 2 * number), cut));
    }

    #[test]
    fn what_is_held_back_is_bounded_by_bytes_clusters_and_the_disk() {
        for (disk, cluster, most) in [
            (1 << 40, 65536, QUARANTINE_BYTES_MAX / 65536),
            (1 << 40, 512, QUARANTINE_CLUSTERS_MAX),
            (16 * QUARANTINE_BYTES_MIN, 4096, QUARANTINE_BYTES_MIN * 16 / QUARANTINE_SHARE / 4096),
            (0, 4096, QUARANTINE_BYTES_MIN / 4096),
            (0, 2 << 20, 1),
        ] {
            let (mut alloc, most) = (Allocator::new(100, cluster, disk), most.max(1));
            freed(&mut alloc, most - 1, 1);
            assert!(!alloc.is_crowded(), "{disk} {cluster}");
            freed(&mut alloc, 1, 1);
            assert!(alloc.is_crowded() && alloc.wants_cut(), "{disk} {cluster}");
        }
    }

    #[test]
    fn a_cut_is_due_for_what_it_would_unlink_and_nothing_else() {
        let mut alloc = Allocator::new(100, 65536, 1 << 40);
        let due = (alloc.quarantined_max / CUT_SHARE).max(1);
        freed(&mut alloc, due, 1);
        assert!(alloc.wants_cut());
        alloc.cut_is_durable(1, Epoch(1));
        assert!(!alloc.wants_cut() && !alloc.waits_for_cut() && alloc.quarantined == due);
        freed(&mut alloc, due - 1, 2);
        assert_eq!((alloc.wants_cut(), alloc.waits_for_cut()), (false, due > 1));
    }
}
