//! The small types that every wait list is made of: the waiting tasks, and whether a task has been woken already.
//!
//! Owns no lock and wakes no task by itself. A wait list lies under the lock of what its tasks wait for, and the tasks
//! are woken after that lock is released.

use std::collections::BTreeMap;
use std::collections::hash_map::Entry;
use std::task::Waker;

use crate::hashed::HashMap;
use crate::sync::{AtomicBool, Ordering};

/// The tasks that wait for one thing, each once, in order of arrival.
#[derive(Debug, Default)]
pub struct Waiters {
    /// By number.
    tasks: BTreeMap<u64, Waker>,
    numbers: HashMap<Identity, u64>,
    next: u64,
}

/// Tells the wakers of one task from those of others: the addresses of its data and of its functions. A stored waker
/// keeps its task's data in memory, so no other task has that address meanwhile.
type Identity = (usize, usize);

fn identity(waker: &Waker) -> Identity {
    (waker.data().addr(), std::ptr::from_ref(waker.vtable()).addr())
}

impl Waiters {
    /// Adds a task, unless it waits already: a task that was woken for another reason calls this again.
    pub fn add(&mut self, waker: &Waker) {
        if let Entry::Vacant(entry) = self.numbers.entry(identity(waker)) {
            entry.insert(self.next);
            self.tasks.insert(self.next, waker.clone());
            self.next += 1;
        }
    }

    /// Removes a task that no longer waits.
    pub fn remove(&mut self, waker: &Waker) {
        if let Some(number) = self.numbers.remove(&identity(waker)) {
            self.tasks.remove(&number);
        }
    }

    /// Removes all tasks, to be woken when the lock is released.
    pub fn take(&mut self) -> WakeList {
        self.numbers.clear();
        WakeList(std::mem::take(&mut self.tasks).into_values().collect())
    }

    /// Removes the first `count` tasks, to be woken when the lock is released.
    pub fn take_first(&mut self, count: u64) -> WakeList {
        let mut first = WakeList::default();
        while (first.0.len() as u64) < count
            && let Some((_, waker)) = self.tasks.pop_first()
        {
            self.numbers.remove(&identity(&waker));
            first.0.push(waker);
        }
        first
    }
}

/// Wakers to be woken when no lock is held.
#[derive(Debug, Default)]
#[must_use]
pub struct WakeList(Vec<Waker>);

impl WakeList {
    /// Adds a waker, if there is one.
    pub(crate) fn add(&mut self, waker: Option<Waker>) {
        self.0.extend(waker);
    }

    /// Adds what another list holds.
    pub(crate) fn append(&mut self, mut other: WakeList) {
        self.0.append(&mut other.0);
    }

    /// Wakes them all.
    pub fn wake(self) {
        self.0.into_iter().for_each(Waker::wake);
    }
}

/// Records whether a task has been woken since just before its last poll, so that many wakes cause one poll.
#[derive(Debug)]
pub struct WakeFlag(AtomicBool);

impl WakeFlag {
    /// A flag that is raised or not.
    pub fn new(raised: bool) -> Self {
        WakeFlag(AtomicBool::new(raised))
    }

    /// Notes a wake. True if it is the first: then the caller must ensure that the task is polled.
    #[must_use]
    pub fn raise(&self) -> bool {
        // Releases what the waking thread did, even if the wake is not the first: `lower` acquires from the last wake.
        !self.0.swap(true, Ordering::Release)
    }

    /// To be called right before a poll. The poll then sees all that was done before the wakes noted so far. True if
    /// there were any. The next wake is a first one again.
    pub fn lower(&self) -> bool {
        // A swap, not a store: a store would not acquire from a wake that it overwrites.
        self.0.swap(false, Ordering::Acquire)
    }

    /// True if the task is to be polled.
    pub fn is_raised(&self) -> bool {
        // Relaxed: `lower` provides the order, before the poll.
        self.0.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
#[cfg(not(loom))]
pub(crate) mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicUsize;
    use std::task::Wake;

    use super::*;

    /// A task that counts how often it is woken.
    #[derive(Default)]
    pub(crate) struct CountedTask(AtomicUsize);

    impl CountedTask {
        /// How often it was woken since the last call.
        pub fn take_wakes(&self) -> usize {
            self.0.swap(0, Ordering::Relaxed)
        }
    }

    impl Wake for CountedTask {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn a_task_that_asks_again_and_again_is_woken_once() {
        let tasks: [Arc<CountedTask>; 2] = Default::default();
        let wakers = tasks.each_ref().map(|task| Waker::from(Arc::clone(task)));
        let woken = || tasks.each_ref().map(|task| task.take_wakes());
        let mut waiters = Waiters::default();
        for waker in [&wakers[0], &wakers[1], &wakers[0], &wakers[0].clone()] {
            waiters.add(waker);
        }
        let mut wakes = WakeList::default();
        wakes.append(waiters.take());
        assert_eq!(woken(), [0, 0], "nobody is woken before the lock is released");
        wakes.wake();
        assert_eq!(woken(), [1, 1]);
        waiters.take().wake();
        assert_eq!(woken(), [0, 0], "a woken task has left the list");
        waiters.add(&wakers[1]);
        waiters.take().wake();
        assert_eq!(woken(), [0, 1]);
    }

    #[test]
    fn the_first_are_woken_first_and_those_that_left_not_at_all() {
        let tasks: [Arc<CountedTask>; 4] = Default::default();
        let wakers = tasks.each_ref().map(|task| Waker::from(Arc::clone(task)));
        let woken = || tasks.each_ref().map(|task| task.take_wakes());
        let mut waiters = Waiters::default();
        wakers.iter().for_each(|waker| waiters.add(waker));
        waiters.remove(&wakers[0]);
        waiters.take_first(2).wake();
        assert_eq!(woken(), [0, 1, 1, 0]);
        waiters.remove(&wakers[1]);
        waiters.add(&wakers[0]);
        waiters.take_first(1).wake();
        assert_eq!(woken(), [0, 0, 0, 1], "a task that comes back is the last");
        waiters.take_first(9).wake();
        assert_eq!(woken(), [1, 0, 0, 0]);
    }

    #[test]
    fn only_the_first_wake_before_a_poll_counts() {
        let flag = WakeFlag::new(false);
        assert!(flag.raise() && !flag.raise() && flag.is_raised());
        assert!(flag.lower() && !flag.lower());
        assert!(flag.raise());
    }
}
