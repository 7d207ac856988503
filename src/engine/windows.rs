//! The reserved windows: host clusters that may be taken at once, in the order in which they were reserved.

use std::collections::VecDeque;

use qcow2::HostCluster;

use crate::run::{FreeRun, HostRun};

/// Reserved clusters that no request has.
#[derive(Default)]
pub(crate) struct Windows(VecDeque<FreeRun>);

impl Windows {
    /// Adds a window behind all others.
    pub fn add(&mut self, window: FreeRun) {
        if window.run.count > 0 {
            self.0.push_back(window);
        }
    }

    /// Takes back clusters that were taken, to be the next ones. They become one run with the first run, and that one
    /// with the second, where these touch. Clusters are taken from the front, so their neighbours are there.
    pub fn give_back(&mut self, taken: FreeRun) {
        if taken.run.count == 0 {
            return;
        }
        self.0.push_front(taken);
        while let Some(joined) = self.0.get(1).and_then(|second| join(&self.0[0], second)) {
            self.0.pop_front();
            self.0[0] = joined;
        }
    }

    /// Takes up to `want` clusters as one run.
    pub fn take(&mut self, want: u64) -> Option<FreeRun> {
        let window = self.0.front_mut()?;
        let count = want.min(window.run.count);
        let taken =
            FreeRun { run: HostRun { start: window.run.start, count }, known_zero: window.known_zero };
        window.run.start.0 += count;
        window.run.count -= count;
        if window.run.count == 0 {
            self.0.pop_front();
        }
        Some(taken)
    }

    /// Takes a cluster for which `fits` is true from either end of a window; `None` if there is none.
    pub fn take_where(&mut self, fits: impl Fn(u64) -> bool) -> Option<FreeRun> {
        for at in 0..self.0.len() {
            let FreeRun { run, known_zero } = &mut self.0[at];
            let (first, last, known_zero) = (run.start.0, run.start.0 + run.count - 1, *known_zero);
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
                self.0.remove(at);
            }
            return Some(FreeRun { run: HostRun { start: HostCluster(taken), count: 1 }, known_zero });
        }
        None
    }

    /// True if no cluster can be taken.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The number of clusters.
    pub fn clusters(&self) -> u64 {
        self.0.iter().map(|window| window.run.count).sum()
    }

    /// The runs, in order.
    pub fn runs(&self) -> Vec<FreeRun> {
        self.0.iter().copied().collect()
    }

    /// Removes all clusters.
    pub fn clear(&mut self) {
        self.0.clear();
    }
}

/// Two runs as one, if they touch on either side and are alike.
fn join(one: &FreeRun, other: &FreeRun) -> Option<FreeRun> {
    let (low, high) = if one.run.start <= other.run.start { (one, other) } else { (other, one) };
    let touch = low.known_zero == high.known_zero && low.run.start.0 + low.run.count == high.run.start.0;
    let run = HostRun { start: low.run.start, count: low.run.count + high.run.count };
    touch.then_some(FreeRun { run, known_zero: low.known_zero })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(start: u64, count: u64, known_zero: bool) -> FreeRun {
        FreeRun { run: HostRun { start: HostCluster(start), count }, known_zero }
    }

    #[test]
    fn windows_are_taken_in_order() {
        let mut windows = Windows::default();
        windows.add(run(100, 4, true));
        windows.add(run(50, 2, false));
        assert_eq!(windows.take(3), Some(run(100, 3, true)));
        assert_eq!(windows.take(3), Some(run(103, 1, true)));
        assert_eq!(windows.take(3), Some(run(50, 2, false)));
        assert_eq!(windows.take(1), None);
    }

    #[test]
    fn a_cluster_is_chosen_at_either_end_of_a_window() {
        let mut windows = Windows::default();
        windows.add(run(10, 4, true));
        windows.add(run(20, 1, true));
        let fits = |wanted: u64| move |cluster| cluster >= wanted;
        let one = |start| Some(run(start, 1, true));
        assert_eq!(windows.take_where(fits(13)), one(13));
        assert_eq!(windows.take_where(fits(0)), one(10));
        assert_eq!(windows.take_where(fits(13)), one(20));
        assert_eq!((windows.take_where(fits(13)), windows.clusters()), (None, 2));
    }

    #[test]
    fn clusters_given_back_are_the_next() {
        let mut windows = Windows::default();
        windows.add(run(10, 8, true));
        let (first, second) = (windows.take(2).expect("some"), windows.take(2).expect("some"));
        windows.give_back(second);
        assert_eq!(windows.runs(), [run(12, 6, true)]);
        windows.give_back(run(10, 2, false));
        assert_eq!(
            windows.runs(),
            [run(10, 2, false), run(12, 6, true)],
            "only one of them is known to be zero"
        );
        assert_eq!((windows.take(9), first), (Some(run(10, 2, false)), run(10, 2, true)));
    }
    #[test]
    fn clusters_given_back_in_any_order_are_one_run_again() {
        for order in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
            let mut windows = Windows::default();
            windows.add(run(10, 8, true));
            let taken: Vec<_> = (0..3).map(|_| windows.take(2).expect("some")).collect();
            order.iter().for_each(|number| windows.give_back(taken[*number]));
            assert_eq!(windows.runs(), [run(10, 8, true)], "{order:?}");
        }
    }
}
