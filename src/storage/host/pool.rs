//! Jobs for threads that make plain system calls, for hosts that refuse io_uring.
//!
//! One pool serves all queues of a storage in order of arrival. Results go to the [`Outbox`] of the job; the pool does
//! not know its queues.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use tracing::error;

use super::OpenFile;
use super::inline;
use super::notify::Wakeup;
use super::slots::Slot;
use crate::workers::{self, Workers};
use crate::{Errno, Notifier};

/// The most threads, and so concurrent calls, of one storage.
const THREADS_MAX: usize = 64;

/// An operation that any thread may run.
pub(super) struct Job {
    pub(super) slot: Slot,
    pub(super) file: Arc<OpenFile>,
    pub(super) outbox: Arc<Outbox>,
}

// SAFETY: only the addresses in its slot keep a job from being `Send`. They point to buffers that the slot owns, to
// guest memory that outlives the operation, and to the slot's own list of both. Any thread may access the guest
// memory, as it is only ever copied. One thread at a time has the job.
unsafe impl Send for Job {}

/// A finished job and its result.
pub(super) type Finished = (Job, Result<(), Errno>);

/// The finished jobs of one queue.
pub(super) struct Outbox {
    done: Mutex<Vec<Finished>>,
    emptied: Condvar,
    pub(super) wakeup: Arc<Wakeup>,
}

impl Outbox {
    pub(super) fn new(wakeup: Arc<Wakeup>) -> Self {
        Outbox { done: Mutex::default(), emptied: Condvar::new(), wakeup }
    }

    /// Takes all finished jobs.
    pub(super) fn take(&self) -> Vec<Finished> {
        std::mem::take(&mut *lock(&self.done))
    }

    /// Waits for at least one finished job, and takes them.
    pub(super) fn wait(&self) -> Vec<Finished> {
        let done = self.emptied.wait_while(lock(&self.done), |done| done.is_empty());
        std::mem::take(&mut *done.unwrap_or_else(PoisonError::into_inner))
    }

    fn put(&self, job: Job, result: Result<(), Errno>) {
        lock(&self.done).push((job, result));
        self.emptied.notify_one();
        self.wakeup.notify();
    }
}

impl workers::Job for Job {
    type Scratch = ();

    fn run(self, _scratch: &mut ()) {
        carry_out(self);
    }
}

/// The threads of a storage.
#[derive(Debug)]
pub(super) struct Pool(Workers<Job>);

impl Default for Pool {
    fn default() -> Self {
        Pool(Workers::new("strata-io", THREADS_MAX))
    }
}

impl Pool {
    /// Queues the jobs; they run in any order.
    pub(super) fn submit(&self, jobs: impl IntoIterator<Item = Job>) {
        self.0.submit(jobs);
    }
}

/// A queue waits for every job that it has submitted, so each is returned, even after a panic.
fn carry_out(mut job: Job) {
    let result = catch_unwind(AssertUnwindSafe(|| inline::run(&mut job.slot, &job.file)));
    let result = result.unwrap_or_else(|_| {
        error!("a thread for I/O failed; its operation ends with an error");
        Err(Errno::EIO)
    });
    let outbox = Arc::clone(&job.outbox);
    outbox.put(job, result);
}

/// No thread panics while it holds one of these locks, so their contents are consistent.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
