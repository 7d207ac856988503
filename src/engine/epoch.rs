//! Epochs: how the engine knows that every I/O begun before some moment has ended.
//!
//! Each worker publishes the epoch of its oldest request that may hold a word of the chain map, or a host offset
//! from a plan. A cluster unlinked before the epoch was advanced from `e` is out of reach of all I/O once no worker
//! publishes `e` or less. The argument is in docs/concurrency.md, "Epochs"; the pairs of atomics are named here.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::sync::{AtomicU64, Mutex, Ordering, fence};

/// A moment, counted up from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Epoch(pub u64);

/// The value that an idle worker publishes.
const NONE: u64 = u64::MAX;

/// Each worker's word on a cache line of its own.
#[repr(align(128))]
struct Slot(AtomicU64);

/// The epochs of one disk, shared by its workers.
pub struct Epochs {
    now: AtomicU64,
    slots: Box<[Slot]>,
    /// The slots that are taken. Leaf lock: nothing is locked while it is held.
    taken: Mutex<Box<[bool]>>,
}

impl Epochs {
    /// Epochs for at most `workers` workers at a time.
    pub fn new(workers: usize) -> Arc<Self> {
        Arc::new(Epochs {
            now: AtomicU64::new(1),
            slots: (0..workers).map(|_| Slot(AtomicU64::new(NONE))).collect(),
            taken: Mutex::new(vec![false; workers].into_boxed_slice()),
        })
    }

    /// Registers a worker; `None` if all slots are taken.
    pub fn register(self: &Arc<Self>) -> Option<WorkerEpochs> {
        let mut taken = self.taken.lock().expect("no panic under this lock");
        let slot = taken.iter().position(|taken| !taken)?;
        taken[slot] = true;
        Some(WorkerEpochs { epochs: Arc::clone(self), slot, live: VecDeque::new() })
    }

    /// Ends the present epoch and returns it. Call it after the unlinks that the epoch must cover.
    pub(crate) fn advance(&self) -> Epoch {
        Epoch(self.now.fetch_add(1, Ordering::SeqCst))
    }

    /// True if every request that began in `epoch` or before has ended.
    pub(crate) fn passed(&self, epoch: Epoch) -> bool {
        // Pairs with the fence in `WorkerEpochs::enter`: either this scan sees the worker's epoch, or the worker's
        // later loads see every unlink made before this fence.
        fence(Ordering::SeqCst);
        // Acquire pairs with the release in `WorkerEpochs::exit`: the I/O has ended before its epoch is withdrawn.
        self.slots.iter().all(|slot| slot.0.load(Ordering::Acquire) > epoch.0)
    }
}

/// One worker's requests in flight, by epoch.
pub struct WorkerEpochs {
    epochs: Arc<Epochs>,
    slot: usize,
    /// (epoch, requests still in flight), oldest first; only the last can still grow. The front is never zero.
    live: VecDeque<(u64, u32)>,
}

impl WorkerEpochs {
    /// Called before a request loads its first word; pass the returned epoch to [`WorkerEpochs::exit`].
    #[inline]
    pub fn enter(&mut self) -> Epoch {
        let now = self.epochs.now.load(Ordering::SeqCst);
        match self.live.back_mut() {
            Some((epoch, count)) if *epoch == now => *count += 1,
            Some(_) => self.live.push_back((now, 1)),
            None => {
                self.live.push_back((now, 1));
                self.epochs.slots[self.slot].0.store(now, Ordering::SeqCst);
                // Pairs with the fence in `Epochs::passed`.
                fence(Ordering::SeqCst);
            }
        }
        Epoch(now)
    }

    /// Called when all I/O of the request has ended.
    #[inline]
    pub fn exit(&mut self, epoch: Epoch) {
        // Requests often end in the order of their epochs.
        let at = match self.live.front() {
            Some((front, _)) if *front == epoch.0 => 0,
            _ => self.live.partition_point(|(live, _)| *live < epoch.0),
        };
        let entry = self.live.get_mut(at).filter(|(live, _)| *live == epoch.0);
        let (_, count) = entry.expect("exit of an epoch that was entered");
        *count -= 1;
        if *count == 0 && at == 0 {
            self.withdraw();
        }
    }

    /// Publishes the oldest epoch that is still live.
    fn withdraw(&mut self) {
        while self.live.front().is_some_and(|(_, count)| *count == 0) {
            self.live.pop_front();
        }
        let oldest = self.live.front().map_or(NONE, |(epoch, _)| *epoch);
        self.epochs.slots[self.slot].0.store(oldest, Ordering::Release);
    }
}

impl Drop for WorkerEpochs {
    fn drop(&mut self) {
        if !self.live.is_empty() {
            // The thread ends with requests in flight (a panic). Its epoch stays published and its slot taken, so that
            // no cluster which they may still access is ever reused.
            return;
        }
        self.epochs.slots[self.slot].0.store(NONE, Ordering::Release);
        if let Ok(mut taken) = self.epochs.taken.lock() {
            taken[self.slot] = false;
        }
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_passes_when_its_requests_ended() {
        let epochs = Epochs::new(2);
        let mut a = epochs.register().expect("slot");
        let mut b = epochs.register().expect("slot");
        assert!(epochs.register().is_none());
        let first = a.enter();
        let tag = epochs.advance();
        assert!(!epochs.passed(tag));
        let second = a.enter();
        let other = b.enter();
        assert!(second > tag && other > tag);
        a.exit(first);
        assert!(epochs.passed(tag), "requests of later epochs do not hold up an earlier one");
        let later = epochs.advance();
        assert!(!epochs.passed(later));
        a.exit(second);
        assert!(!epochs.passed(later));
        b.exit(other);
        assert!(epochs.passed(later));
    }

    #[test]
    fn out_of_order_exits_keep_the_oldest() {
        let epochs = Epochs::new(1);
        let mut worker = epochs.register().expect("slot");
        let first = worker.enter();
        let tag = epochs.advance();
        let second = worker.enter();
        worker.exit(second);
        assert!(!epochs.passed(tag));
        worker.exit(first);
        assert!(epochs.passed(tag));
        drop(worker);
        assert!(epochs.register().is_some());
    }
}
