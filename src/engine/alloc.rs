//! The host clusters that may be allocated: reserved windows, free runs, and the quarantine of freed clusters.
//!
//! The life of a cluster: free → window (its refcount is 1 in memory from then on) → in use → quarantine
//! (unlinked in memory) → free again. The last step requires that the unlink is durable and that all I/O begun before
//! it has ended.

use std::ops::Range;
use std::task::Waker;

use qcow2::{Geometry, HostCluster};

use crate::answer::TableSlot;
use crate::bounds::{WINDOW_BYTES_MAX, WINDOW_BYTES_MIN};
use crate::free::{FreeClusters, TAIL_BYTES};
use crate::mutation::{Mutation, active};
use crate::quarantine::Quarantine;
use crate::run::{FreeRun, HostRun};
use crate::touched::Touched;
use crate::turns::{Turn, Turns, Wanted};
use crate::waiters::{Waiters, WakeList};
use crate::windows::Windows;

pub(crate) struct Allocator {
    windows: Windows,
    /// The requests that wait for a window, and the clusters set aside for them.
    turns: Turns,
    free: FreeClusters,
    /// The first cluster past all that were ever in use: the file grows from here.
    end: u64,
    window_clusters: u64,
    window_clusters_max: u64,
    quarantine: Quarantine,
    /// The file's greatest length in this session, in bytes.
    file_length: u64,
    /// A task reserves, or makes the file longer. The file's length has one writer at a time: a late, shorter length would
    /// cut data off the file.
    reserving: bool,
    /// Flushes that wait for the end of that.
    awaits_length: Waiters,
    /// Refblock slices before this cluster have been searched for free clusters.
    scanned: u64,
    /// Where the search ends: the end of the file at open.
    scan_end: u64,
    /// The clusters at the end of the file at open that are free if its last writer did not close it.
    tail: Range<u64>,
    /// No cluster from this one on has a refcount or is reserved.
    used_end: u64,
    /// A search for leaks is complete, and found no reference to the tail.
    tail_is_spare: bool,
    /// The file was made longer, and its new length may not be durable.
    length_unsynced: bool,
    /// Clusters that the search for leaks must leave alone. `None` while no search runs.
    touched: Option<Touched>,
}

impl Allocator {
    /// An allocator for a file of `end` clusters.
    pub fn new(end: u64, geometry: &Geometry) -> Self {
        let cluster_size = geometry.cluster_size();
        Allocator {
            windows: Windows::default(),
            turns: Turns::default(),
            free: FreeClusters::default(),
            end,
            window_clusters: (WINDOW_BYTES_MIN / cluster_size).max(1),
            window_clusters_max: (WINDOW_BYTES_MAX / cluster_size).max(1),
            quarantine: Quarantine::new(geometry),
            file_length: 0,
            reserving: false,
            awaits_length: Waiters::default(),
            scanned: 0,
            scan_end: end,
            tail: 0..0,
            used_end: end,
            tail_is_spare: false,
            length_unsynced: false,
            touched: None,
        }
    }

    /// An allocator for a file of `end` clusters of 64 KiB and a disk of 1 GiB.
    #[cfg(test)]
    pub fn for_test(end: u64) -> Self {
        let version = qcow2::Version::V3;
        let geometry =
            Geometry { version, cluster_bits: 16, refcount_order: 4, extended_l2: false, size: 1 << 30 };
        Allocator::new(end, &geometry)
    }

    /// Records the file's length in bytes at open. From then on clusters are touched, if leaks may be searched for.
    pub fn opened(&mut self, file_length: u64, geometry: &Geometry, may_search_leaks: bool) {
        let cluster_size = geometry.cluster_size();
        self.scan_end = file_length.div_ceil(cluster_size);
        self.file_length = file_length;
        self.tail = file_length.saturating_sub(TAIL_BYTES) / cluster_size..self.scan_end;
        self.touched = may_search_leaks.then(Touched::default);
    }

    /// The clusters at the end of the file at open that are free if its last writer did not close it.
    pub fn tail(&self) -> Range<u64> {
        self.tail.clone()
    }

    /// The tail is free. If nothing was reserved past it, nothing is in use from its start on.
    pub fn tail_is_free(&mut self) {
        if self.used_end == self.scan_end {
            self.used_end = self.tail.start;
        }
    }

    /// The end of the file at open, in clusters.
    pub fn end_at_open(&self) -> u64 {
        self.scan_end
    }

    /// The first cluster past all that were ever in use: the file grows from here.
    pub fn end(&self) -> u64 {
        self.end
    }

    /// Clusters before this one are in use, or might be: the file grows from here.
    pub fn move_end(&mut self, end: u64) {
        self.end = end;
    }

    /// True if the file was at least so many bytes long at some moment of this session.
    pub fn was_so_long(&self, length: u64) -> bool {
        length <= self.file_length
    }

    /// The file is at least so many bytes long.
    pub fn note_length(&mut self, length: u64) {
        self.file_length = self.file_length.max(length);
    }

    /// A reservation made the file at least so many bytes long. That may not be durable.
    pub fn was_lengthened(&mut self, length: u64) {
        self.note_length(length);
        self.length_unsynced = true;
    }

    /// True once if the file's length must become durable: the cut that asks makes it so, or calls
    /// [`Allocator::length_is_unsynced`].
    pub fn take_unsynced_length(&mut self) -> bool {
        std::mem::take(&mut self.length_unsynced)
    }

    /// The file's length may not be durable.
    pub fn length_is_unsynced(&mut self) {
        self.length_unsynced = true;
    }

    /// The clusters of the file at open that are still to be searched for free ones.
    pub fn unsearched(&self) -> Range<u64> {
        self.scanned..self.scan_end.max(self.scanned)
    }

    /// Clusters before this one have been searched.
    pub fn searched_to(&mut self, cluster: u64) {
        self.scanned = cluster;
    }

    /// The unused clusters.
    pub fn free(&self) -> &FreeClusters {
        &self.free
    }

    /// The first run of unused clusters.
    pub fn first_free(&mut self) -> Option<FreeRun> {
        self.free.first()
    }

    /// Takes up to `count` clusters from the front of the first run of unused ones.
    pub fn take_free(&mut self, count: u64) -> Option<FreeRun> {
        self.free.take(count)
    }

    /// Adds unused clusters.
    pub fn add_free(&mut self, run: FreeRun) {
        self.free.add(run);
    }

    /// The freed clusters that are held back.
    pub fn quarantine(&self) -> &Quarantine {
        &self.quarantine
    }

    /// The same, to be changed. New clusters go through [`Allocator::free_later`].
    pub fn quarantine_mut(&mut self) -> &mut Quarantine {
        &mut self.quarantine
    }

    /// The clusters that the search for leaks must leave alone; `None` if there is no search, or it is over.
    pub fn touched(&self) -> Option<&Touched> {
        self.touched.as_ref()
    }

    /// The search for leaks is over. `tail_is_spare`: it was complete, and found no reference to the tail.
    pub fn end_search(&mut self, tail_is_spare: bool) {
        self.tail_is_spare = tail_is_spare;
        self.touched = None;
    }

    /// The length that the file needs before refcounts are written, so that it ends with free clusters until it is
    /// closed. `None` if it is long enough. No reservation begins until [`crate::Engine::file_was_lengthened`].
    pub fn marked_length(&mut self, cluster_size: u64) -> Option<u64> {
        if active(Mutation::TailNotMarked) {
            return None;
        }
        let length = self.wanted_length(cluster_size)?;
        self.begin_reserving();
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

    /// True while a task reserves. Then the waker is registered.
    pub fn awaits_reservation(&mut self, waker: &Waker) -> bool {
        if self.reserving {
            self.awaits_length.add(waker);
        }
        self.reserving
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

    /// Wakes all that wait for clusters, for room in the quarantine, or for the file's length.
    pub fn wake_all(&mut self, wakes: &mut WakeList) {
        self.turns.wake_all(wakes);
        self.quarantine.wake_all(wakes);
        wakes.append(self.awaits_length.take());
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
            if !self.windows.is_empty() {
                self.turns.pass_over(turn);
            }
        }
        taken
    }

    /// A request uses so many clusters. If they were set aside for it, its turn ends, and clusters that it does not want
    /// any more go to others.
    pub fn taken(&mut self, turn: &Turn, used: u64, fits: impl Fn(u64) -> bool, wakes: &mut WakeList) {
        if let Some((Some(FreeRun { run, known_zero }), _)) = self.turns.end(turn)
            && used < run.count
        {
            let rest = HostRun { start: HostCluster(run.start.0 + used), count: run.count - used };
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

    /// The host had no room for a window: makes the next one minimal. False if it already was.
    pub fn shrink_window(&mut self) -> bool {
        std::mem::replace(&mut self.window_clusters, 1) > 1
    }

    /// True if a cluster can be taken.
    pub fn has_window(&self) -> bool {
        !self.windows.is_empty()
    }

    /// Adds a reserved window; the file must be `file_length` bytes long for it. If no other window is left, the next one
    /// will be twice as large.
    pub fn add_window(&mut self, window: FreeRun, file_length: Option<u64>) {
        let past = window.run.start.0 + window.run.count;
        self.end = self.end.max(past);
        self.used_end = self.used_end.max(past);
        if let Some(length) = file_length {
            self.was_lengthened(length);
        }
        if self.windows.is_empty() {
            self.window_clusters = (self.window_clusters * 2).min(self.window_clusters_max);
        }
        self.windows.add(window);
    }

    /// Clusters in the windows, and those set aside.
    pub fn reserved_clusters(&self) -> u64 {
        self.windows.clusters() + self.turns.clusters()
    }

    /// Removes the windows, and returns their clusters: a clean end frees them.
    pub fn take_windows(&mut self) -> Vec<FreeRun> {
        let runs = self.windows.runs();
        self.windows.clear();
        runs
    }

    /// The clusters in the windows.
    pub fn windows(&self) -> Vec<FreeRun> {
        self.windows.runs()
    }

    /// The end of the file without the free clusters at its very end. Nothing changes: the file may be cut there, and if
    /// that fails, the same clusters are still free.
    pub fn end_in_use(&self) -> u64 {
        let end = self.free.start_of_last(self.end);
        // The spare tail that an earlier session left. This session reserved nothing there.
        let has_spare_tail = self.tail_is_spare && end == self.scan_end && self.used_end <= self.tail.start;
        if has_spare_tail { self.free.start_of_last(self.tail.start) } else { end }
    }

    /// Puts a cluster into quarantine. `cut` is the cut that makes its unlink durable; 0 if it was never linked in memory.
    pub fn free_later(&mut self, cluster: HostCluster, cut: u64) {
        self.touch(cluster.0);
        let at_once = active(Mutation::ReuseAtOnce);
        let taken_for_zero = cut == 0 && active(Mutation::AbortedTakenForZero);
        if at_once || taken_for_zero {
            let run = HostRun { start: cluster, count: 1 };
            return self.free.add(FreeRun { run, known_zero: !at_once });
        }
        self.quarantine.add(cluster, cut);
    }
}
