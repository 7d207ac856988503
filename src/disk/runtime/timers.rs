//! The timers of one thread, and alarms that wake a task at a time.
//!
//! Owns no clock: the queue has it.

use std::cell::RefCell;
use std::task::Waker;
use std::time::Instant;

use slab::Slab;
use storage::IoQueue;

/// The times at which tasks are to be woken.
#[derive(Default)]
pub(crate) struct Timers {
    /// The time and the waker of each timer; no waker once it was woken.
    entries: RefCell<Slab<(Instant, Option<Waker>)>>,
}

impl Timers {
    /// Wakes the tasks whose time has come.
    pub fn fire(&self, now: impl FnOnce() -> Instant) {
        let mut entries = self.entries.borrow_mut();
        if entries.is_empty() {
            return;
        }
        let now = now();
        for (_, (until, waker)) in entries.iter_mut() {
            if *until <= now
                && let Some(waker) = waker.take()
            {
                waker.wake();
            }
        }
    }

    /// The time of the next task to be woken.
    pub fn next(&self) -> Option<Instant> {
        let entries = self.entries.borrow();
        entries.iter().filter_map(|(_, (until, waker))| waker.as_ref().map(|_| *until)).min()
    }

    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.entries.borrow().len()
    }
}

/// Wakes a task at a time, or soon after, unless it is dropped before.
pub(crate) struct Alarm<'a, Q> {
    timers: &'a Timers,
    /// The clock.
    queue: &'a RefCell<Q>,
    until: Instant,
    /// Its key in the timers, once a task was named.
    timer: Option<usize>,
}

impl<'a, Q: IoQueue> Alarm<'a, Q> {
    pub fn new(timers: &'a Timers, queue: &'a RefCell<Q>, until: Instant) -> Self {
        Alarm { timers, queue, until, timer: None }
    }

    /// Whether its time has come.
    pub fn is_over(&self) -> bool {
        self.queue.borrow().now() >= self.until
    }

    /// Names the task to wake, instead of any named before.
    pub fn wake(&mut self, waker: &Waker) {
        let mut entries = self.timers.entries.borrow_mut();
        let entry = (self.until, Some(waker.clone()));
        match self.timer {
            Some(timer) => entries[timer] = entry,
            None => self.timer = Some(entries.insert(entry)),
        }
    }
}

impl<Q> Drop for Alarm<'_, Q> {
    fn drop(&mut self) {
        if let Some(timer) = self.timer {
            self.timers.entries.borrow_mut().remove(timer);
        }
    }
}
