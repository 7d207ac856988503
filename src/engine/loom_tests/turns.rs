//! Models of the line for clusters: "Windows by turns" in docs/concurrency.md. One mutex stands for the engine's lock.

use super::*;
use crate::run::{FreeRun, HostRun};
use crate::turns::Turn;
use crate::waiters::WakeList;

/// The allocator, and where the next window begins.
struct Line {
    alloc: Allocator,
    next: u64,
    /// The turn's number of each request that waited, and its cluster.
    served: Vec<(u64, u64)>,
}

#[derive(Clone)]
struct Bench {
    line: Arc<Mutex<Line>>,
    /// The file's length: only who reserves, or makes the file longer, accesses it.
    length: Arc<UnsafeCell<()>>,
    /// Clusters in a window.
    window: u64,
}

/// What a request is to do about a window.
#[derive(PartialEq)]
enum Role {
    Served,
    Reserves,
}

impl Bench {
    fn new(window: u64) -> Self {
        let line = Line { alloc: Allocator::for_test(9), next: 0, served: Vec::new() };
        Bench { line: Arc::new(Mutex::new(line)), length: Arc::new(UnsafeCell::new(())), window }
    }

    fn with<T>(&self, f: impl FnOnce(&mut Line, &mut WakeList) -> T) -> T {
        let mut wakes = WakeList::default();
        let result = f(&mut self.line.lock().expect("lock"), &mut wakes);
        wakes.wake();
        result
    }

    /// A request that takes one cluster, as the engine's plans do.
    fn request(&self) {
        let turn = Turn::default();
        while !self.take(&turn) {
            if self.role(&turn) == Role::Reserves {
                self.reserve();
            }
        }
    }

    fn take(&self, turn: &Turn) -> bool {
        self.with(|line, wakes| {
            let number = turn.number();
            let Some(taken) = line.alloc.take(turn, 1) else { return false };
            line.served.extend(number.map(|number| (number, taken.run.start.0)));
            line.alloc.taken(turn, 1, |_| true, wakes);
            true
        })
    }

    fn role(&self, turn: &Turn) -> Role {
        block_on(poll_fn(|context| {
            self.with(|line, _| {
                if !line.alloc.waits_for_clusters(turn) {
                    return Poll::Ready(Role::Served);
                }
                if !line.alloc.may_reserve(turn, context.waker()) {
                    return Poll::Pending;
                }
                line.alloc.begin_reserving();
                Poll::Ready(Role::Reserves)
            })
        }))
    }

    fn reserve(&self) {
        self.length.with_mut(|_| ());
        self.with(|line, wakes| {
            let run = HostRun { start: HostCluster(line.next), count: self.window };
            line.next += self.window;
            line.alloc.add_window(FreeRun { run, known_zero: true }, None);
            line.alloc.end_reserving(|_| true, wakes);
        });
    }

    /// A request that fails once it has a place in the line, or its clusters.
    fn request_and_fail(&self) {
        let turn = Turn::default();
        if !self.take(&turn) {
            self.with(|line, wakes| line.alloc.end_turn(&turn, |_| true, wakes));
        }
    }

    /// A cut that makes the file longer.
    fn lengthen(&self) {
        block_on(poll_fn(|context| {
            self.with(|line, _| {
                if line.alloc.awaits_length(65536, context.waker()) {
                    return Poll::Pending;
                }
                line.alloc.begin_reserving();
                Poll::Ready(())
            })
        }));
        self.length.with_mut(|_| ());
        self.with(|line, wakes| line.alloc.end_reserving(|_| true, wakes));
    }

    fn spawn(&self, work: impl Fn(&Bench) + 'static) -> thread::JoinHandle<()> {
        let bench = self.clone();
        thread::spawn(move || work(&bench))
    }

    /// All have ended. Requests that waited were served in order of arrival.
    fn end(self, others: impl IntoIterator<Item = thread::JoinHandle<()>>) {
        others.into_iter().for_each(|other| other.join().expect("a request"));
        self.with(|line, _| {
            line.served.sort_unstable();
            assert!(line.served.is_sorted_by(|(_, one), (_, next)| one < next), "{:?}", line.served);
        });
    }
}

#[test]
fn three_requests_get_clusters_of_windows_of_one() {
    explore(Some(2), || {
        let bench = Bench::new(1);
        let others = [bench.spawn(Bench::request), bench.spawn(Bench::request)];
        bench.request();
        bench.end(others);
    });
}

#[test]
fn a_window_serves_two_requests() {
    explore(Some(3), || {
        let bench = Bench::new(2);
        let others = [bench.spawn(Bench::request), bench.spawn(Bench::request)];
        bench.request();
        bench.end(others);
    });
}

#[test]
fn a_request_that_fails_passes_its_turn_on() {
    explore(Some(3), || {
        let bench = Bench::new(1);
        let others = [bench.spawn(Bench::request_and_fail), bench.spawn(Bench::request)];
        bench.request();
        bench.end(others);
    });
}

/// Nobody makes the file longer while a task reserves, and each waits for the other.
#[test]
fn a_cut_that_lengthens_the_file_takes_turns_with_reservations() {
    explore(Some(3), || {
        let bench = Bench::new(1);
        let others = [bench.spawn(Bench::lengthen), bench.spawn(Bench::request)];
        bench.request();
        bench.end(others);
    });
}
