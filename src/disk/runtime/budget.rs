//! Bounds of the memory that the requests of one thread hold.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::poll_fn;
use std::task::{Poll, Waker};

/// Bounds the memory that one thread's requests use for one purpose, first come first served.
pub(crate) struct Budget {
    bytes: usize,
    free: Cell<usize>,
    waiters: RefCell<VecDeque<(u64, Waker)>>,
}

impl Budget {
    pub fn new(bytes: usize) -> Self {
        Budget { bytes, free: Cell::new(bytes), waiters: RefCell::new(VecDeque::new()) }
    }

    /// Waits until `bytes` more fit the budget. A larger amount counts as the whole budget.
    pub async fn take(&self, bytes: usize) -> BufferPermit<'_> {
        let bytes = bytes.min(self.bytes);
        let mut number = None;
        poll_fn(|context| self.poll_take(bytes, &mut number, context.waker())).await;
        BufferPermit { budget: self, bytes }
    }

    fn poll_take(&self, bytes: usize, number: &mut Option<u64>, waker: &Waker) -> Poll<()> {
        let mut waiters = self.waiters.borrow_mut();
        let first = waiters.front().is_none_or(|(front, _)| Some(*front) == *number);
        if first && self.free.get() >= bytes {
            self.free.set(self.free.get() - bytes);
            if number.is_some() {
                waiters.pop_front();
            }
            if let Some((_, next)) = waiters.front() {
                next.wake_by_ref();
            }
            return Poll::Ready(());
        }
        match number {
            Some(number) => {
                let own = waiters.iter_mut().find(|(queued, _)| queued == number).expect("queued before");
                own.1 = waker.clone();
            }
            None => {
                let next = waiters.back().map_or(0, |(last, _)| last + 1);
                *number = Some(next);
                waiters.push_back((next, waker.clone()));
            }
        }
        Poll::Pending
    }
}

/// Permission to hold some buffer memory, until dropped.
#[must_use]
pub(crate) struct BufferPermit<'a> {
    budget: &'a Budget,
    bytes: usize,
}

impl Drop for BufferPermit<'_> {
    fn drop(&mut self) {
        self.budget.free.set(self.budget.free.get() + self.bytes);
        if let Some((_, next)) = self.budget.waiters.borrow().front() {
            next.wake_by_ref();
        }
    }
}
