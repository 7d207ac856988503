//! A pool of threads for work that would hold up a queue's thread: plain system calls, and inflating.
//!
//! A thread starts when there is work for it and ends after some time without work. Jobs run in any order. The pool
//! does not know who waits for a job: a job reports its own end.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use tracing::warn;

/// How long a thread waits for work before it ends.
const IDLE_MAX: Duration = Duration::from_secs(10);

/// A piece of work that any thread may do.
pub trait Job: Send + 'static {
    /// State that a thread keeps between its jobs, such as a decoder.
    type Scratch: Default;

    /// Does the work, and reports its end to whoever waits for it. If it panics, dropping the job must report that.
    fn run(self, scratch: &mut Self::Scratch);
}

/// A pool of threads. Dropping it waits for the jobs that have begun or wait, and for the threads to end.
pub struct Workers<J: Job> {
    shared: Arc<Shared<J>>,
    /// The name of each thread.
    name: &'static str,
    threads_max: usize,
}

struct Shared<J> {
    /// Leaf lock: no job runs while it is held.
    state: Mutex<State<J>>,
    /// There is work, or the pool is being dropped.
    work: Condvar,
}

struct State<J> {
    jobs: VecDeque<J>,
    /// Threads that have not decided to end.
    running: usize,
    /// Running threads that wait for work.
    idle: usize,
    threads: Vec<JoinHandle<()>>,
    stopping: bool,
}

impl<J: Job> Workers<J> {
    /// A pool of at most `threads_max` threads, at least one. Each has this name, of at most 15 bytes.
    pub fn new(name: &'static str, threads_max: usize) -> Self {
        let (jobs, threads) = (VecDeque::new(), Vec::new());
        let state = State { jobs, running: 0, idle: 0, threads, stopping: false };
        let shared = Shared { state: Mutex::new(state), work: Condvar::new() };
        Workers { shared: Arc::new(shared), name, threads_max: threads_max.max(1) }
    }

    /// Queues the jobs. If the host refuses the very first thread, the caller's thread does the work.
    pub fn submit(&self, jobs: impl IntoIterator<Item = J>) {
        let mut state = self.shared.lock();
        state.jobs.extend(jobs);
        let waiting = state.jobs.len();
        let wanted = waiting.saturating_sub(state.idle).min(self.threads_max.saturating_sub(state.running));
        let notified = waiting.min(state.idle);
        let started = (0..wanted).try_for_each(|_| self.start_thread(&mut state));
        let orphaned = if state.running == 0 { std::mem::take(&mut state.jobs) } else { VecDeque::new() };
        drop(state);
        (0..notified).for_each(|_| self.shared.work.notify_one());
        if let Err(error) = started {
            warn!(%error, "the host refused a thread; the work takes longer");
        }
        let mut scratch = J::Scratch::default();
        orphaned.into_iter().for_each(|job| run(job, &mut scratch));
    }

    fn start_thread(&self, state: &mut State<J>) -> std::io::Result<()> {
        state.threads.retain(|thread| !thread.is_finished());
        let shared = Arc::clone(&self.shared);
        let thread = std::thread::Builder::new().name(self.name.to_owned()).spawn(move || shared.serve())?;
        state.threads.push(thread);
        state.running += 1;
        Ok(())
    }

    /// Threads that run now, with or without a job.
    pub fn running(&self) -> usize {
        self.shared.lock().running
    }
}

impl<J: Job> std::fmt::Debug for Workers<J> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let state = self.shared.lock();
        let (jobs, running, idle) = (state.jobs.len(), state.running, state.idle);
        write!(f, "Workers({}: {jobs} jobs, {running} threads, {idle} idle)", self.name)
    }
}

impl<J: Job> Drop for Workers<J> {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.stopping = true;
        let threads = std::mem::take(&mut state.threads);
        drop(state);
        self.shared.work.notify_all();
        for thread in threads {
            if thread.join().is_err() {
                warn!(thread = self.name, "a thread of a pool ended in a panic");
            }
        }
    }
}

impl<J: Job> Shared<J> {
    /// No thread panics while it holds this lock, so the contents are consistent.
    fn lock(&self) -> MutexGuard<'_, State<J>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The loop of a thread.
    fn serve(&self) {
        let mut scratch = J::Scratch::default();
        while let Some(job) = self.next() {
            run(job, &mut scratch);
        }
    }

    /// The next job. `None` if the thread must end: it then no longer counts as running.
    fn next(&self) -> Option<J> {
        let mut state = self.lock();
        if state.jobs.is_empty() && !state.stopping {
            state.idle += 1;
            let waits = |state: &mut State<J>| state.jobs.is_empty() && !state.stopping;
            let waited = self.work.wait_timeout_while(state, IDLE_MAX, waits);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
            state.idle -= 1;
        }
        let job = state.jobs.pop_front();
        state.running -= usize::from(job.is_none());
        job
    }
}

/// Runs a job. After a panic the scratch state may be inconsistent, so the next job gets a new one.
fn run<J: Job>(job: J, scratch: &mut J::Scratch) {
    if catch_unwind(AssertUnwindSafe(|| job.run(scratch))).is_err() {
        *scratch = J::Scratch::default();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{self, Sender};

    use super::*;

    /// Adds its number to those that the thread has seen, and reports how many those are. Panics on 7.
    struct Count {
        number: u32,
        seen: Sender<(u32, usize)>,
    }

    impl Job for Count {
        type Scratch = Vec<u32>;

        fn run(self, scratch: &mut Vec<u32>) {
            scratch.push(self.number);
            assert_ne!(self.number, 7, "the number that this test breaks on");
            self.seen.send((self.number, scratch.len())).expect("the test waits");
        }
    }

    #[test]
    fn every_job_runs_once_however_many_threads_there_are() {
        for threads_max in 1..4 {
            let (seen, runs) = mpsc::channel();
            let pool = Workers::new("test", threads_max);
            pool.submit((0..7).chain(8..100).map(|number| Count { number, seen: seen.clone() }));
            assert!(pool.running() <= threads_max);
            drop((pool, seen));
            let mut numbers: Vec<u32> = runs.iter().map(|(number, _)| number).collect();
            numbers.sort_unstable();
            assert_eq!(numbers, (0..7).chain(8..100).collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_thread_goes_on_after_a_panic_with_fresh_scratch_state() {
        let (seen, runs) = mpsc::channel();
        let pool = Workers::new("test", 1);
        pool.submit([5, 7, 9].map(|number| Count { number, seen: seen.clone() }));
        assert_eq!([runs.recv(), runs.recv()], [Ok((5, 1)), Ok((9, 1))]);
    }
}
