//! Threads that make plain system calls, for hosts that refuse io_uring.
//!
//! One pool serves all queues of a storage in order of arrival. Threads start when there is work and end after some
//! idle time. Results go to the [`Outbox`] of the job; the pool does not know its queues.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tracing::{error, warn};

use super::OpenFile;
use super::inline;
use super::notify::Wakeup;
use super::slots::Slot;
use crate::{Errno, Notifier};

/// The most threads, and so concurrent calls, of one storage.
const THREADS_MAX: usize = 64;
/// How long a thread waits for work before it ends.
const IDLE_MAX: Duration = Duration::from_secs(10);

/// An operation that any thread may run.
pub(super) struct Job {
    pub(super) slot: Slot,
    pub(super) file: Arc<OpenFile>,
    pub(super) outbox: Arc<Outbox>,
}

// SAFETY: only the addresses in its slot keep a job from being `Send`. They point to buffers that the slot owns, to
// guest memory that outlives the operation (any thread may access it, as it is only ever copied), and to the slot's own
// list of both. One thread at a time has the job.
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

/// The threads and the jobs that wait for one.
#[derive(Default)]
pub(super) struct Pool {
    state: Mutex<State>,
    work: Condvar,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    threads: usize,
    idle: usize,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let state = lock(&self.state);
        write!(f, "Pool({} jobs, {} threads, {} idle)", state.jobs.len(), state.threads, state.idle)
    }
}

impl Pool {
    /// Queues the jobs; they run in any order.
    pub(super) fn submit(self: &Arc<Self>, jobs: impl IntoIterator<Item = Job>) {
        let mut state = lock(&self.state);
        state.jobs.extend(jobs);
        let (waiting, idle) = (state.jobs.len(), state.idle);
        let lacking = waiting.saturating_sub(idle).min(THREADS_MAX.saturating_sub(state.threads));
        state.threads += lacking;
        drop(state);
        for _ in 0..waiting.min(idle) {
            self.work.notify_one();
        }
        for started in 0..lacking {
            let pool = Arc::clone(self);
            let thread = std::thread::Builder::new().name("strata-io".to_owned());
            if let Err(error) = thread.spawn(move || pool.serve()) {
                warn!(%error, "no further thread for I/O");
                self.lack(lacking - started);
                return;
            }
        }
    }

    /// Corrects the count after threads could not be started. If there are none at all, the caller runs the jobs.
    fn lack(&self, threads: usize) {
        let mut state = lock(&self.state);
        state.threads -= threads;
        if state.threads == 0 {
            while let Some(job) = state.jobs.pop_front() {
                drop(state);
                carry_out(job);
                state = lock(&self.state);
            }
        }
    }

    fn serve(&self) {
        let mut state = lock(&self.state);
        loop {
            if let Some(job) = state.jobs.pop_front() {
                drop(state);
                carry_out(job);
                state = lock(&self.state);
                continue;
            }
            state.idle += 1;
            let waited = self.work.wait_timeout_while(state, IDLE_MAX, |state| state.jobs.is_empty());
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
            state.idle -= 1;
            if state.jobs.is_empty() {
                state.threads -= 1;
                return;
            }
        }
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
