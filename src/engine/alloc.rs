//! The host clusters that may be allocated: reserved windows, free runs, and the quarantine of freed clusters.
//!
//! The life of a cluster: free → window (its refcount is 1 in memory from then on) → in use → quarantine
//! (unlinked in memory) → free again. The last step requires that the unlink is durable and that all I/O begun before
//! it has ended.

use std::collections::VecDeque;
use std::ops::Range;
use std::task::Waker;

use qcow2::HostCluster;

use crate::answer::TableSlot;
use crate::bounds::{
    CUT_SHARE, QUARANTINE_BYTES_MAX, QUARANTINE_BYTES_MIN, QUARANTINE_CLUSTERS_MAX, QUARANTINE_SHARE,
    WINDOW_BYTES_MAX, WINDOW_BYTES_MIN,
};
use crate::epoch::Epoch;
use crate::free::{FreeClusters, TAIL_BYTES};
use crate::mutation::{Mutation, active};
use crate::run::{FreeRun, Run};
use crate::touched::Touched;
use crate::turns::{Turn, Turns, Wanted};
use crate::waiters::{Waiters, WakeList};
use crate::windows::Windows;

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
    windows: Windows,
    /// The requests that wait for a window, and the clusters set aside for them.
    turns: Turns,
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
    held_up: Waiters,
    /// The file's greatest length in this session, in bytes.
    pub file_length: u64,
    /// A task reserves, or makes the file longer. The file's length has one writer at a time: a late writer could cut off
    /// what was written behind its length.
    reserving: bool,
    /// Flushes that wait for the end of that.
    awaits_length: Waiters,
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
            windows: Windows::default(),
            turns: Turns::default(),
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
            reserving: false,
            awaits_length: Waiters::default(),
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
        self.begin_reserving();
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

    /// True if the next cut is to lengthen the file, and must wait while a task reserves. Then the waker is registered.
    pub fn awaits_length(&mut self, cluster_size: u64, waker: &Waker) -> bool {
        let waits = self.reserving && self.wanted_length(cluster_size).is_some();
        if waits {
            self.awaits_length.add(waker);
        }
        waits
    }

    /// A task begins to reserve, or to make the file longer.
    pub fn begin_reserving(&mut self) {
        assert!(!self.reserving, "the file's length has one writer at a time");
        self.reserving = true;
    }

    /// The task that reserved has ended: its window, if any, is there. Serves the line.
    pub fn end_reserving(&mut self, fits: impl Fn(u64) -> bool, wakes: &mut WakeList) {
        assert!(self.reserving, "a task reserves");
        self.reserving = false;
        wakes.append(self.awaits_length.take());
        self.serve(fits, wakes);
    }

    /// True if a request in the line is to reserve the next window now: it is the first, has no clusters, and nobody
    /// reserves. Otherwise the waker is registered.
    pub fn may_reserve(&mut self, turn: &Turn, waker: &Waker) -> bool {
        if self.reserving {
            self.turns.await_turn(turn, waker);
        }
        !self.reserving && self.turns.is_first(turn, waker)
    }

    /// True if a request has no clusters, although it still waits for some.
    pub fn waits_for_clusters(&self, turn: &Turn) -> bool {
        turn.is_open() && self.turns.clusters_of(turn).is_none()
    }

    /// True if the windows have no cluster that a request needs for a table.
    pub fn wants_new(&self, turn: &Turn) -> bool {
        self.turns.was_passed_over(turn)
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

    /// Clusters for a request: those set aside for it, or up to `want` as one run from the windows. If there are none,
    /// the request joins the line. Call [`Allocator::taken`] once they are used.
    pub fn take(&mut self, turn: &Turn, want: u64) -> Option<FreeRun> {
        if turn.is_open() {
            let FreeRun { mut run, known_zero } = self.turns.clusters_of(turn)?;
            run.count = run.count.min(want);
            return Some(FreeRun { run, known_zero });
        }
        let taken = self.windows.take(want);
        if taken.is_none() {
            self.turns.join(turn, Wanted::Data(want));
        }
        taken
    }

    /// A cluster for a table; else as [`Allocator::take`]. `fits` tells whether a cluster may become a table.
    pub fn take_for_table(
        &mut self,
        turn: &Turn,
        slot: TableSlot,
        fits: impl Fn(u64) -> bool,
        wakes: &mut WakeList,
    ) -> Option<FreeRun> {
        match self.turns.clusters_of(turn) {
            Some(run) if fits(run.run.start.0) => return Some(run),
            // An entry has named the cluster since it was set aside.
            Some(_) => {
                self.end_turn(turn, &fits, wakes);
            }
            None if turn.is_open() => return None,
            None => {}
        }
        let taken = self.windows.take_where(&fits);
        if taken.is_none() {
            self.turns.join(turn, Wanted::Table(slot));
            // Notes that a window is left, if so, and that it has no cluster for this request.
            self.turns.serve(&mut self.windows, fits, wakes);
        }
        taken
    }

    /// A request uses so many clusters. If they were set aside for it, its turn ends, and clusters that it does not want
    /// any more go to others.
    pub fn taken(&mut self, turn: &Turn, used: u64, fits: impl Fn(u64) -> bool, wakes: &mut WakeList) {
        if let Some((Some(FreeRun { run, known_zero }), _)) = self.turns.end(turn)
            && used < run.count
        {
            let rest = Run { start: HostCluster(run.start.0 + used), count: run.count - used };
            self.windows.give_back(FreeRun { run: rest, known_zero });
            self.serve(fits, wakes);
        }
    }

    /// A request no longer plans. Clusters that were set aside for it go to others. Returns what it waited for.
    pub fn end_turn(
        &mut self,
        turn: &Turn,
        fits: impl Fn(u64) -> bool,
        wakes: &mut WakeList,
    ) -> Option<Wanted> {
        let (given, wanted) = self.turns.end(turn)?;
        if let Some(run) = given {
            self.windows.give_back(run);
        }
        self.serve(fits, wakes);
        Some(wanted)
    }

    /// Serves the line from the windows. If nobody reserves, the first request that is left is to do so.
    fn serve(&mut self, fits: impl Fn(u64) -> bool, wakes: &mut WakeList) {
        self.turns.serve(&mut self.windows, fits, wakes);
        if !self.reserving {
            self.turns.wake_first(wakes);
        }
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
        self.windows.add(window);
    }

    /// Clusters in the windows, and those set aside.
    pub fn reserved_clusters(&self) -> u64 {
        self.windows.clusters() + self.turns.clusters()
    }

    /// The clusters in the windows. A clean end frees them.
    pub fn windows(&self) -> Vec<FreeRun> {
        self.windows.runs()
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

    /// A task waits for clusters to leave the quarantine.
    pub fn await_reclaim(&mut self, waker: &Waker) {
        self.held_up.add(waker);
    }

    /// A task no longer waits for that.
    pub fn stop_waiting(&mut self, waker: &Waker) {
        self.held_up.remove(waker);
    }

    /// Clusters have left the quarantine: as many tasks go on as there is room for.
    pub fn wake_held_up(&mut self, wakes: &mut WakeList) {
        let room = self.quarantined_max.saturating_sub(self.quarantined);
        wakes.append(self.held_up.take_first(room.max(1)));
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
