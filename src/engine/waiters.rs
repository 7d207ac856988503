//! The small types that every wait list is made of: the waiting tasks, and whether a task has been woken already.
//!
//! Owns no lock and wakes no task by itself. A wait list lies under the lock of what its tasks wait for, and the tasks
//! are woken after that lock is released.

use std::task::Waker;

use crate::sync::{AtomicBool, Ordering};

/// The tasks that wait for one thing, each once, in order of arrival.
#[derive(Debug, Default)]
pub struct Waiters(Vec<Waker>);

impl Waiters {
    /// Adds a task, unless it waits already: a task that was woken for another reason calls this again.
    pub fn add(&mut self, waker: &Waker) {
        if !self.0.iter().any(|waiting| waiting.will_wake(waker)) {
            self.0.push(waker.clone());
        }
    }

    /// Removes all tasks, to be woken when the lock is released.
    pub fn take(&mut self) -> WakeList {
        WakeList(std::mem::take(&mut self.0))
    }
}

/// Wakers to be woken when no lock is held.
#[derive(Debug, Default)]
#[must_use]
pub struct WakeList(Vec<Waker>);

impl WakeList {
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
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicUsize;
    use std::task::Wake;

    use super::*;

    #[derive(Default)]
    struct Counted(AtomicUsize);

    impl Wake for Counted {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn a_task_that_asks_again_and_again_is_woken_once() {
        let tasks: [Arc<Counted>; 2] = Default::default();
        let wakers = tasks.each_ref().map(|task| Waker::from(Arc::clone(task)));
        let woken = || tasks.each_ref().map(|task| task.0.load(Ordering::Relaxed));
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
        assert_eq!(woken(), [1, 1], "who was woken has left the list");
        waiters.add(&wakers[1]);
        waiters.take().wake();
        assert_eq!(woken(), [1, 2]);
    }

    #[test]
    fn only_the_first_wake_before_a_poll_counts() {
        let flag = WakeFlag::new(false);
        assert!(flag.raise() && !flag.raise() && flag.is_raised());
        assert!(flag.lower() && !flag.lower());
        assert!(flag.raise());
    }
}
