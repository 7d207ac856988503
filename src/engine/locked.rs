//! The engine's lock, and what comes back without it: a plan that is dropped before its commit.
//!
//! The drop may happen on any thread, even under the lock, so it must not wait for the lock. It leaves what the
//! plan held in a list. If the lock is free, the same thread takes it back. Else the thread that holds the lock
//! does, once it has released it (docs/concurrency.md, "Plans, pins and one-at-a-time jobs").

use std::fmt;
use std::sync::PoisonError;

use crate::sync::{AtomicBool, Mutex, MutexGuard, Ordering, fence};
use crate::waiters::WakeList;

/// State that takes back what dropped plans held.
pub(crate) trait TakeBack<D> {
    /// Takes it back, under the lock.
    fn take_back(&mut self, dropped: D, wakes: &mut WakeList);
}

/// State under a lock, held for work in memory only.
pub(crate) struct Locked<S, D> {
    state: Mutex<S>,
    /// What dropped plans held. Leaf lock, also taken under the other.
    dropped: Mutex<Vec<D>>,
    /// The list is not empty. Changed under its lock.
    any_dropped: AtomicBool,
}

impl<S, D> fmt::Debug for Locked<S, D> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Locked")
    }
}

impl<S: TakeBack<D>, D> Locked<S, D> {
    /// State that nobody has locked.
    pub fn new(state: S) -> Self {
        Locked {
            state: Mutex::new(state),
            dropped: Mutex::new(Vec::new()),
            any_dropped: AtomicBool::new(false),
        }
    }

    /// Works under the lock, then wakes. The state has taken back what was dropped before the call.
    pub fn with<R>(&self, f: impl FnOnce(&mut S, &mut WakeList) -> R) -> R {
        self.work(self.state.lock().expect("no panic under the engine's lock"), f)
    }

    /// The same, also after a panic under the lock: for work that is right whatever the state is.
    pub fn with_any<R>(&self, f: impl FnOnce(&mut S, &mut WakeList) -> R) -> R {
        self.work(self.state.lock().unwrap_or_else(PoisonError::into_inner), f)
    }

    fn work<R>(&self, mut state: MutexGuard<'_, S>, f: impl FnOnce(&mut S, &mut WakeList) -> R) -> R {
        let mut wakes = WakeList::default();
        // A thread that drops a plan and then takes the lock may come before the thread that is to settle the drop.
        self.take_all_back(&mut state, &mut wakes);
        let result = f(&mut state, &mut wakes);
        drop(state);
        wakes.wake();
        self.settle();
        result
    }

    /// A plan was dropped: takes back what it held, or leaves that to the thread that holds the lock.
    pub fn leave(&self, dropped: D) {
        {
            let mut list = self.dropped.lock().unwrap_or_else(PoisonError::into_inner);
            list.push(dropped);
            self.any_dropped.store(true, Ordering::Relaxed);
        }
        self.settle();
    }

    /// Takes back what is in the list, unless another thread has the lock: that one comes here when it has released it.
    fn settle(&self) {
        loop {
            // One thread adds to the list, another releases the lock. The first to come here may not see what the
            // other did. Then the other sees both the list and the free lock.
            fence(Ordering::SeqCst);
            if !self.any_dropped.load(Ordering::Relaxed) {
                return;
            }
            let Ok(mut state) = self.state.try_lock() else { return };
            let mut wakes = WakeList::default();
            self.take_all_back(&mut state, &mut wakes);
            drop(state);
            wakes.wake();
        }
    }

    /// Takes back what is in the list.
    fn take_all_back(&self, state: &mut S, wakes: &mut WakeList) {
        // Relaxed is enough: a drop that happened before this lock was taken has stored true, and only a holder of
        // the lock stores false.
        if !self.any_dropped.load(Ordering::Relaxed) {
            return;
        }
        let list = {
            let mut list = self.dropped.lock().unwrap_or_else(PoisonError::into_inner);
            self.any_dropped.store(false, Ordering::Relaxed);
            std::mem::take(&mut *list)
        };
        list.into_iter().for_each(|dropped| state.take_back(dropped, wakes));
    }

    /// Looks at the state, and takes nothing back.
    #[cfg(all(test, loom))]
    pub fn peek<R>(&self, f: impl FnOnce(&S) -> R) -> R {
        f(&self.state.lock().expect("no panic"))
    }
}
