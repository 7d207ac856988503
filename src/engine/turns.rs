//! The line of requests that wait for clusters: who is served next, and the clusters set aside for those whose turn has
//! come.
//!
//! Requests are served in order of arrival. Clusters of a new window are set aside for as many requests as it suffices
//! for, and only these are woken. If requests are left, the first of them makes the next window, so it is woken as well.
//! A request behind it has nothing to do. docs/concurrency.md, "Windows by turns", gives the rules.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::task::Waker;

use crate::answer::TableSlot;
use crate::run::FreeRun;
use crate::waiters::{Waiters, WakeList};
use crate::windows::Windows;

/// A request's turn for clusters: nothing, a place in the line, or clusters set aside. The engine changes it while it
/// plans. Pass it to [`crate::Engine::end_turn`] whenever the request no longer plans: requests behind it may depend on
/// that.
#[derive(Debug, Default)]
#[must_use]
pub struct Turn(Cell<Option<u64>>);

impl Turn {
    /// True if the request waits, or has clusters that it did not use.
    pub fn is_open(&self) -> bool {
        self.0.get().is_some()
    }

    /// True if it has this number.
    pub(crate) fn has(&self, number: Option<u64>) -> bool {
        number.is_some() && self.0.get() == number
    }

    /// Its number in the order of arrival, if it is open.
    pub(crate) fn number(&self) -> Option<u64> {
        self.0.get()
    }
}

/// What a request wants clusters for.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Wanted {
    /// Up to so many clusters for data: as one run, at least one cluster.
    Data(u64),
    /// A cluster for the L2 table of a slot: one to which this session sent no data I/O.
    Table(TableSlot),
}

impl Wanted {
    fn is_for_data(self) -> bool {
        matches!(self, Wanted::Data(_))
    }
}

/// An L2 table in the making.
#[derive(Default)]
pub(crate) struct TableJob {
    /// The turn of the request that makes it, while that waits for a cluster.
    pub turn: Option<u64>,
    /// The tasks that wait for the table.
    pub waiters: Waiters,
}

/// A request in the line.
struct Waiting {
    wanted: Wanted,
    /// It needs a cluster that no data I/O was aimed at, and there were clusters, but no such one.
    passed_over: bool,
    waker: Option<Waker>,
}

/// The turns of all requests.
#[derive(Default)]
pub(crate) struct Turns {
    next: u64,
    /// Those that wait, by number.
    line: BTreeMap<u64, Waiting>,
    /// How many of them want clusters for data.
    for_data: usize,
    /// Those that have clusters, by number.
    served: BTreeMap<u64, (FreeRun, Wanted)>,
}

impl Turns {
    /// Puts a request at the end of the line, unless it waits already.
    pub fn join(&mut self, turn: &Turn, wanted: Wanted) {
        if turn.is_open() {
            return;
        }
        self.line.insert(self.next, Waiting { wanted, passed_over: false, waker: None });
        self.for_data += usize::from(wanted.is_for_data());
        turn.0.set(Some(self.next));
        self.next += 1;
    }

    /// The clusters that are set aside for a request.
    pub fn clusters_of(&self, turn: &Turn) -> Option<FreeRun> {
        let (run, _) = self.served.get(&turn.0.get()?)?;
        Some(*run)
    }

    /// True if the request is the first in the line; otherwise `waker` is woken once it is, or when it is served.
    pub fn is_first(&mut self, turn: &Turn, waker: &Waker) -> bool {
        let Some(number) = turn.0.get() else { return false };
        let first = self.line.first_key_value().is_some_and(|(first, _)| *first == number);
        if !first {
            self.await_turn(turn, waker);
        }
        first
    }

    /// Notes the waker of a request in the line.
    pub fn await_turn(&mut self, turn: &Turn, waker: &Waker) {
        if let Some(waiting) = turn.0.get().and_then(|number| self.line.get_mut(&number)) {
            waiting.waker = Some(waker.clone());
        }
    }

    /// Notes that the windows have clusters, but none for this request, which waits.
    pub fn pass_over(&mut self, turn: &Turn) {
        if let Some(waiting) = turn.0.get().and_then(|number| self.line.get_mut(&number)) {
            waiting.passed_over = true;
        }
    }

    /// True if the request waits, and the last window had no cluster for it.
    pub fn was_passed_over(&self, turn: &Turn) -> bool {
        turn.0.get().and_then(|number| self.line.get(&number)).is_some_and(|waiting| waiting.passed_over)
    }

    /// Sets clusters aside for requests in the line, as long as there are any. `fits` tells whether a cluster may
    /// become a table. A long line of requests for tables that no cluster fits costs one attempt. Only the first of
    /// them must know, as it makes the next window.
    pub fn serve(&mut self, windows: &mut Windows, fits: impl Fn(u64) -> bool, wakes: &mut WakeList) {
        let mut from = 0;
        let mut may_fit = true;
        while !windows.is_empty()
            && let Some((&number, waiting)) = self.line.range_mut(from..).next()
        {
            from = number + 1;
            let run = match waiting.wanted {
                // What is left begins with another cluster, which may fit.
                Wanted::Data(clusters) => windows.take(clusters).inspect(|_| may_fit = true),
                Wanted::Table(_) if may_fit => windows.take_where(&fits),
                Wanted::Table(_) => None,
            };
            let Some(run) = run else {
                waiting.passed_over = true;
                may_fit = false;
                if self.for_data == 0 {
                    break;
                }
                continue;
            };
            let Waiting { wanted, waker, .. } = self.leave(number).expect("it was just found");
            self.served.insert(number, (run, wanted));
            wakes.add(waker);
        }
    }

    /// Wakes the first request in the line.
    pub fn wake_first(&mut self, wakes: &mut WakeList) {
        if let Some(mut first) = self.line.first_entry() {
            wakes.add(first.get_mut().waker.take());
        }
    }

    /// Wakes all requests in the line.
    pub fn wake_all(&mut self, wakes: &mut WakeList) {
        self.line.values_mut().for_each(|waiting| wakes.add(waiting.waker.take()));
    }

    /// Ends a turn. Returns the clusters that were set aside for it, and what they were wanted for.
    pub fn end(&mut self, turn: &Turn) -> Option<(Option<FreeRun>, Wanted)> {
        let number = turn.0.take()?;
        if let Some((run, wanted)) = self.served.remove(&number) {
            return Some((Some(run), wanted));
        }
        self.leave(number).map(|waiting| (None, waiting.wanted))
    }

    /// Takes a request out of the line.
    fn leave(&mut self, number: u64) -> Option<Waiting> {
        let waiting = self.line.remove(&number)?;
        self.for_data -= usize::from(waiting.wanted.is_for_data());
        Some(waiting)
    }

    /// The clusters that are set aside.
    pub fn clusters(&self) -> u64 {
        self.served.values().map(|(run, _)| run.run.count).sum()
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use qcow2::HostCluster;

    use super::*;
    use crate::alloc::Allocator;
    use crate::run::HostRun;
    use crate::waiters::tests::CountedTask;

    /// Requests that want clusters, and how often each was woken.
    struct Line {
        alloc: Allocator,
        turns: Vec<Turn>,
        tasks: Vec<Arc<CountedTask>>,
    }

    impl Line {
        /// Requests in the line. They want this many clusters for data each, or a table where that is 0.
        fn of(wanted: &[u64]) -> Self {
            let mut line = Line { alloc: Allocator::for_test(100), turns: Vec::new(), tasks: Vec::new() };
            for clusters in wanted {
                line.turns.push(Turn::default());
                line.tasks.push(Arc::default());
                assert_eq!(line.take(line.turns.len() - 1, *clusters), None);
            }
            line
        }

        fn take(&mut self, request: usize, clusters: u64) -> Option<(u64, u64)> {
            let (turn, mut wakes) = (&self.turns[request], WakeList::default());
            let taken = match clusters {
                0 => self.alloc.take_for_table(turn, TableSlot(0), fits, &mut wakes),
                _ => self.alloc.take(turn, clusters),
            }?;
            self.alloc.taken(turn, taken.run.count, fits, &mut wakes);
            wakes.wake();
            Some((taken.run.start.0, taken.run.count))
        }

        fn may_reserve(&mut self, request: usize) -> bool {
            let waker = Waker::from(Arc::clone(&self.tasks[request]));
            let turn = &self.turns[request];
            self.alloc.waits_for_clusters(turn) && self.alloc.may_reserve(turn, &waker)
        }

        /// The first request reserves a window; all others wait. Returns who is woken.
        fn window(&mut self, first: usize, start: u64, count: u64) -> Vec<usize> {
            assert!(self.may_reserve(first));
            self.alloc.begin_reserving();
            assert!((0..self.turns.len()).all(|request| !self.may_reserve(request)), "one at a time");
            let mut wakes = WakeList::default();
            self.alloc.add_window(
                FreeRun { run: HostRun { start: HostCluster(start), count }, known_zero: true },
                None,
            );
            self.alloc.end_reserving(fits, &mut wakes);
            wakes.wake();
            self.woken()
        }

        fn end(&mut self, request: usize) -> Vec<usize> {
            let mut wakes = WakeList::default();
            self.alloc.end_turn(&self.turns[request], fits, &mut wakes);
            wakes.wake();
            self.woken()
        }

        /// The requests woken since the last call.
        fn woken(&self) -> Vec<usize> {
            let woken = |request: &usize| self.tasks[*request].take_wakes() > 0;
            (0..self.tasks.len()).filter(woken).collect()
        }
    }

    /// No data I/O was aimed at clusters from 1000 on.
    fn fits(cluster: u64) -> bool {
        cluster >= 1000
    }

    #[test]
    fn a_window_serves_the_first_in_line_and_wakes_nobody_in_vain() {
        let mut line = Line::of(&[1; 6]);
        assert_eq!(line.window(0, 1000, 3), [0, 1, 2, 3], "three are served, the next makes the next window");
        assert_eq!(line.take(1, 1), Some((1001, 1)));
        assert_eq!(line.take(0, 1), Some((1000, 1)), "each has its own, whoever comes first");
        assert_eq!((line.take(4, 1), line.may_reserve(4)), (None, false), "it is not its turn");
        assert_eq!(line.window(3, 1003, 5), [3, 4, 5], "the other is awake already");
        assert_eq!(line.alloc.reserved_clusters(), 6);
        for request in 2..6 {
            assert_eq!(line.take(request, 1), Some((1000 + request as u64, 1)));
        }
        let late = Turn::default();
        assert_eq!(line.alloc.take(&late, 9).map(|run| run.run.count), Some(2), "nobody waits for the rest");
    }

    #[test]
    fn a_request_gets_the_clusters_that_it_wants_as_far_as_they_go() {
        let mut line = Line::of(&[3, 4, 2]);
        assert_eq!(line.window(0, 1000, 5), [0, 1, 2]);
        assert_eq!(line.take(0, 3), Some((1000, 3)));
        assert_eq!(line.take(1, 4), Some((1003, 2)), "a run that is shorter");
        assert_eq!(line.window(2, 1005, 8), [2]);
        assert_eq!(line.take(2, 1), Some((1005, 1)), "it wants less than before");
        assert_eq!(
            line.alloc.windows(),
            [FreeRun { run: HostRun { start: HostCluster(1006), count: 7 }, known_zero: true }]
        );
    }

    #[test]
    fn a_request_that_ends_its_turn_blocks_no_other() {
        let mut line = Line::of(&[1; 5]);
        assert_eq!(line.window(0, 1000, 2), [0, 1, 2]);
        assert_eq!(line.end(1), [3], "its cluster goes to the next, which is awake; the one behind reserves");
        assert_eq!(line.take(2, 1), Some((1001, 1)));
        assert!(!line.may_reserve(4));
        assert_eq!(line.end(3), [4], "the next is the first");
        assert!(line.may_reserve(4));
        assert_eq!(line.end(4), []);
        assert_eq!(line.take(0, 1), Some((1000, 1)), "what was set aside stays");
        assert_eq!(line.alloc.reserved_clusters(), 0);
    }

    /// Reclaimed clusters may fit no table. A guest can then make any number of requests wait for tables.
    #[test]
    fn many_tables_that_no_cluster_fits_cost_a_few_attempts_each() {
        const TABLES: usize = 2000;
        let mut line = Line::of(&[]);
        let window = FreeRun { run: HostRun { start: HostCluster(10), count: 5 }, known_zero: true };
        line.alloc.add_window(window, None);
        let attempts = AtomicUsize::new(0);
        let counted = |cluster| {
            attempts.fetch_add(1, Ordering::Relaxed);
            fits(cluster)
        };
        let (turns, mut wakes) =
            ((0..TABLES).map(|_| Turn::default()).collect::<Vec<_>>(), WakeList::default());
        for turn in &turns {
            assert!(line.alloc.take_for_table(turn, TableSlot(0), counted, &mut wakes).is_none());
        }
        assert!(line.alloc.wants_new(&turns[0]));
        for served in (0..TABLES).step_by(10) {
            line.alloc.begin_reserving();
            let start = HostCluster(1000 + served as u64);
            line.alloc.add_window(FreeRun { run: HostRun { start, count: 10 }, known_zero: true }, None);
            line.alloc.end_reserving(counted, &mut wakes);
            assert!(
                line.alloc.wants_new(turns.get(served + 10).unwrap_or(&turns[0])) || served + 10 == TABLES
            );
        }
        let attempts = attempts.load(Ordering::Relaxed);
        assert!(attempts < 10 * TABLES, "{attempts} attempts");
        turns.iter().for_each(|turn| assert!(!line.alloc.waits_for_clusters(turn)));
        for turn in &turns {
            assert!(matches!(line.alloc.end_turn(turn, fits, &mut wakes), Some(Wanted::Table(_))));
        }
    }

    #[test]
    fn a_table_waits_for_a_cluster_that_no_data_was_aimed_at() {
        let mut line = Line::of(&[0, 1, 1]);
        assert_eq!(line.window(0, 10, 1), [0, 1], "the second is served, the first must go on");
        assert!(line.alloc.wants_new(&line.turns[0]));
        assert_eq!(line.window(0, 1000, 2), [0, 2]);
        assert_eq!(line.take(0, 0), Some((1000, 1)));
        assert_eq!(line.take(2, 1), Some((1001, 1)));
        assert_eq!(line.take(1, 1), Some((10, 1)));
    }
}
