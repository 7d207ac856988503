//! Which host clusters may be handed out: reserved windows, free runs, and the quarantine of freed clusters.
//!
//! A cluster goes round: free → window (its refcount is 1 in memory from then on) → in use → quarantine (unlinked in
//! memory) → free again, and that last step only when the unlink is durable and all I/O begun before it has ended.

use std::collections::{BTreeMap, VecDeque};

use qcow2::HostCluster;

use crate::epoch::Epoch;
use crate::mutation::{Mutation, active};
use crate::waiters::Waiters;

/// The most bytes that a window reserves.
const WINDOW_BYTES_MAX: u64 = 16 << 20;
/// What the first window reserves; each next one is twice as large.
const WINDOW_BYTES_MIN: u64 = 1 << 20;

/// A run of host clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The first.
    pub start: HostCluster,
    /// How many.
    pub count: u64,
}

/// A run that nobody uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FreeRun {
    pub run: Run,
    /// It reads as zero on the host: never written, or punched since.
    pub known_zero: bool,
}

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
    /// I/O begun in this epoch or before may still touch the run.
    pub epoch: Epoch,
}

pub(crate) struct Allocator {
    windows: VecDeque<FreeRun>,
    free: BTreeMap<u64, FreeRun>,
    /// The first cluster past all that is or was in use: the file grows from here.
    pub end: u64,
    window_clusters: u64,
    window_clusters_max: u64,
    pub quarantine: VecDeque<Freed>,
    pub unlinked: VecDeque<Unlinked>,
    /// Clusters in quarantine or unlinked.
    pub quarantined: u64,
    /// The longest that this session found or made the file, in bytes.
    pub file_length: u64,
    /// A cluster is needed that was in no use in this session, and no window has one.
    pub wants_new: bool,
    /// Somebody reserves: who waits for it.
    pub reserving: Option<Waiters>,
    /// Somebody reclaims.
    pub reclaiming: bool,
    /// Refblock slices before this cluster have been searched for free clusters.
    pub scanned: u64,
    /// Where the search ends: the end of the file at open.
    pub scan_end: u64,
}

impl Allocator {
    /// An allocator for a file whose clusters end at `end`.
    pub fn new(end: u64, cluster_size: u64) -> Self {
        Allocator {
            windows: VecDeque::new(),
            free: BTreeMap::new(),
            end,
            window_clusters: (WINDOW_BYTES_MIN / cluster_size).max(1),
            window_clusters_max: (WINDOW_BYTES_MAX / cluster_size).max(1),
            quarantine: VecDeque::new(),
            unlinked: VecDeque::new(),
            quarantined: 0,
            file_length: 0,
            wants_new: false,
            reserving: None,
            reclaiming: false,
            scanned: 0,
            scan_end: end,
        }
    }

    /// Clusters that the next window is to have.
    pub fn window_clusters(&self) -> u64 {
        self.window_clusters
    }

    /// Takes up to `want` clusters in one run out of the reserved windows.
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

    /// Takes a cluster of which `fits` is true off either end of a window; nothing if there is none.
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

    /// True if a cluster is in a free run.
    pub fn is_free(&self, cluster: u64) -> bool {
        let before = self.free.range(..=cluster).next_back();
        before.is_some_and(|(_, free)| cluster < free.run.start.0 + free.run.count)
    }

    /// True if a cluster can be taken.
    pub fn has_window(&self) -> bool {
        !self.windows.is_empty()
    }

    /// Adds a window that has been reserved; the next is to be larger, if it is one in its turn.
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

    /// What the windows hold now: at a clean end it is given back.
    pub fn windows(&self) -> Vec<FreeRun> {
        self.windows.iter().copied().collect()
    }

    pub fn clear_windows(&mut self) {
        self.windows.clear();
    }

    /// The first free run.
    pub fn first_free(&self) -> Option<FreeRun> {
        self.free.values().next().copied()
    }

    /// Takes up to `count` clusters off the front of the first free run.
    pub fn take_free(&mut self, count: u64) -> Option<FreeRun> {
        let mut entry = self.free.first_entry()?;
        let whole = *entry.get();
        if whole.run.count <= count {
            return Some(entry.remove());
        }
        let taken = FreeRun { run: Run { start: whole.run.start, count }, known_zero: whole.known_zero };
        let start = HostCluster(whole.run.start.0 + count);
        entry.get_mut().run = Run { start, count: whole.run.count - count };
        let rest = entry.remove();
        self.free.insert(start.0, rest);
        Some(taken)
    }

    /// Adds a free run, merging it with its neighbours. Parts that are free already are left as they are.
    pub fn add_free(&mut self, added: FreeRun) {
        let mut start = added.run.start.0;
        let end = start + added.run.count;
        while start < end {
            if let Some((_, before)) = self.free.range(..=start).next_back() {
                let before_end = before.run.start.0 + before.run.count;
                if before_end > start {
                    start = before_end;
                    continue;
                }
            }
            let next = self.free.range(start..end).next().map_or(end, |(next, _)| *next);
            let run = Run { start: HostCluster(start), count: next - start };
            self.insert_free(FreeRun { run, known_zero: added.known_zero });
            start = next;
        }
    }

    /// Inserts a run that overlaps no other.
    fn insert_free(&mut self, mut added: FreeRun) {
        let start = added.run.start.0;
        if let Some((_, before)) = self.free.range(..start).next_back().map(|(k, v)| (*k, *v))
            && before.run.start.0 + before.run.count == start
            && before.known_zero == added.known_zero
        {
            self.free.remove(&before.run.start.0);
            added.run = Run { start: before.run.start, count: before.run.count + added.run.count };
        }
        let end = added.run.start.0 + added.run.count;
        if let Some(after) = self.free.get(&end).copied()
            && after.known_zero == added.known_zero
        {
            self.free.remove(&end);
            added.run.count += after.run.count;
        }
        self.free.insert(added.run.start.0, added);
    }

    /// Forgets free runs at the very end of the file, so that the file can be cut there; the new end.
    pub fn trim_end(&mut self) -> u64 {
        while let Some((_, last)) = self.free.last_key_value() {
            if last.run.start.0 + last.run.count != self.end {
                break;
            }
            self.end = last.run.start.0;
            self.free.pop_last();
        }
        self.end
    }

    /// Moves what a durable cut unlinked on towards reuse.
    pub fn cut_is_durable(&mut self, cut: u64, epoch: Epoch) {
        let mut later = VecDeque::new();
        for freed in self.quarantine.drain(..) {
            if freed.cut <= cut || active(Mutation::ReuseBeforeUnlink) {
                self.unlinked.push_back(Unlinked { run: freed.run, epoch });
            } else {
                later.push_back(freed);
            }
        }
        self.quarantine = later;
    }

    /// Cuts the oldest unlinked run so that it has at most `count` clusters.
    pub fn split_first_unlinked(&mut self, count: u64) {
        let Some(first) = self.unlinked.front_mut() else { return };
        if first.run.count > count {
            let rest = Run { start: HostCluster(first.run.start.0 + count), count: first.run.count - count };
            let rest = Unlinked { run: rest, epoch: first.epoch };
            first.run.count = count;
            self.unlinked.insert(1, rest);
        }
    }

    /// Puts a run into quarantine, joining it with the last where it can.
    pub fn free_later(&mut self, cluster: HostCluster, cut: u64) {
        if active(Mutation::ReuseAtOnce) {
            return self.add_free(FreeRun { run: Run { start: cluster, count: 1 }, known_zero: false });
        }
        if cut == 0 && active(Mutation::AbortedTakenForZero) {
            return self.add_free(FreeRun { run: Run { start: cluster, count: 1 }, known_zero: true });
        }
        self.quarantined += 1;
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

    fn free(alloc: &Allocator) -> Vec<(u64, u64, bool)> {
        alloc.free.values().map(|f| (f.run.start.0, f.run.count, f.known_zero)).collect()
    }

    #[test]
    fn free_runs_merge_and_never_overlap() {
        let mut alloc = Allocator::new(1000, 65536);
        alloc.add_free(run(10, 5, true));
        alloc.add_free(run(20, 5, true));
        alloc.add_free(run(15, 5, true));
        assert_eq!(free(&alloc), [(10, 15, true)]);
        alloc.add_free(run(5, 30, false));
        assert_eq!(free(&alloc), [(5, 5, false), (10, 15, true), (25, 10, false)]);
        assert_eq!(alloc.take_free(3), Some(run(5, 3, false)));
        assert_eq!(alloc.take_free(100), Some(run(8, 2, false)));
        assert_eq!(alloc.take_free(100), Some(run(10, 15, true)));
    }

    #[test]
    fn the_end_is_trimmed_as_far_as_it_is_free() {
        let mut alloc = Allocator::new(100, 65536);
        alloc.add_free(run(90, 10, true));
        alloc.add_free(run(80, 10, false));
        alloc.add_free(run(70, 5, false));
        assert_eq!(alloc.trim_end(), 80);
        assert_eq!(free(&alloc), [(70, 5, false)]);
    }

    #[test]
    fn windows_are_taken_in_order() {
        let mut alloc = Allocator::new(100, 65536);
        alloc.add_window(run(100, 4, true));
        alloc.add_window(run(50, 2, false));
        assert_eq!(alloc.take(3), Some(run(100, 3, true)));
        assert_eq!(alloc.take(3), Some(run(103, 1, true)));
        assert_eq!(alloc.take(3), Some(run(50, 2, false)));
        assert_eq!(alloc.take(1), None);
    }

    #[test]
    fn a_cluster_is_chosen_at_either_end_of_a_window() {
        let mut alloc = Allocator::new(100, 65536);
        alloc.add_window(run(10, 4, true));
        alloc.add_window(run(20, 1, true));
        let fits = |wanted: u64| move |cluster| cluster >= wanted;
        let one = |start| Some(Run { start: HostCluster(start), count: 1 });
        assert_eq!(alloc.take_where(fits(13)), one(13));
        assert_eq!(alloc.take_where(fits(0)), one(10));
        assert_eq!(alloc.take_where(fits(13)), one(20));
        assert_eq!((alloc.take_where(fits(13)), alloc.reserved_clusters()), (None, 2));
    }

    #[test]
    fn what_is_free_is_known() {
        let mut alloc = Allocator::new(100, 65536);
        alloc.add_free(run(10, 2, true));
        assert_eq!([9, 10, 11, 12].map(|cluster| alloc.is_free(cluster)), [false, true, true, false]);
    }
}
