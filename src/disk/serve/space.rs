//! Requests that find no space on the host: whether they wait for it, for how long at a time, and what is logged.
//!
//! Owns the wait and its count. A waiting request holds no claim and no epoch, so that freed clusters can be
//! reclaimed meanwhile. The retries themselves are in slow.rs.

use std::future::poll_fn;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use names::shown;
use slab::Slab;
use storage::IoQueue;
use tracing::{info, warn};

use crate::options::OnEnospc;
use crate::runtime::driver::Driver;

/// The first wait before a retry of a request; each wait is twice the one before.
const PAUSE_MIN: Duration = Duration::from_millis(100);
/// The longest wait.
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// The least time between two log lines about the beginning of a wait.
const LOG_AGAIN: Duration = Duration::from_secs(10);

/// Numbers of requests that wait for space on the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SpaceStatus {
    /// Requests that wait now.
    pub waiting: u64,
    /// Requests that have waited since the disk was opened.
    pub waited: u64,
}

/// A handle to watch a disk's waits and to end them. It may outlive the disk.
#[derive(Clone)]
pub struct SpaceWatch {
    space: Arc<Space>,
}

impl SpaceWatch {
    /// The numbers of requests that wait.
    pub fn status(&self) -> SpaceStatus {
        self.space.status()
    }

    /// The disk is being stopped: requests that wait fail, and none waits from now on.
    pub fn stop_waiting(&self) {
        self.space.lock().stop_waiting = true;
        self.space.wake();
    }
}

/// State about space that a disk's threads share.
pub(crate) struct Space {
    on_enospc: OnEnospc,
    /// The top image, for the log.
    path: PathBuf,
    /// Leaf lock.
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// The disk is being stopped.
    stop_waiting: bool,
    /// Requests that wait or retry.
    waiters: Slab<Option<Waker>>,
    waited: u64,
    /// Counts the times that freed clusters were given back.
    reclaims: u64,
    /// When the beginning of a wait was last logged.
    logged_at: Option<Instant>,
    /// The end of that wait is still to be logged.
    end_is_due: bool,
}

impl Space {
    pub fn new(on_enospc: OnEnospc, path: &Path) -> Arc<Self> {
        Arc::new(Space { on_enospc, path: path.to_owned(), state: Mutex::default() })
    }

    pub fn watch(self: &Arc<Self>) -> SpaceWatch {
        SpaceWatch { space: Arc::clone(self) }
    }

    /// Whether requests wait for space, by the options.
    pub fn waits(&self) -> bool {
        self.on_enospc == OnEnospc::Wait
    }

    pub fn status(&self) -> SpaceStatus {
        let state = self.lock();
        SpaceStatus { waiting: state.waiters.len() as u64, waited: state.waited }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Freed clusters can be used again: waiting requests retry at once.
    pub fn reclaimed(&self) {
        self.lock().reclaims += 1;
        self.wake();
    }

    /// Wakes all waiting requests, to check whether they are still to wait.
    pub fn wake(&self) {
        let wakers: Vec<Waker> =
            self.lock().waiters.iter_mut().filter_map(|(_, waker)| waker.take()).collect();
        wakers.into_iter().for_each(Waker::wake);
    }

    /// Begins the wait of a request that found no space.
    pub fn begin<'a, Q: IoQueue>(&'a self, driver: &'a Driver<Q>) -> Waiting<'a, Q> {
        let began = driver.now();
        let mut state = self.lock();
        let first = state.waiters.is_empty();
        let key = state.waiters.insert(None);
        state.waited += 1;
        let recent = state.logged_at.is_some_and(|at| began.saturating_duration_since(at) < LOG_AGAIN);
        let logs = first && !recent;
        if logs {
            (state.logged_at, state.end_is_due) = (Some(began), true);
        }
        let seen = state.reclaims;
        drop(state);
        if logs {
            let path = shown(&self.path);
            warn!(%path, "the host has no space: requests that need space wait for it, and others continue");
        }
        Waiting { space: self, driver, key, began, seen, listen: true, pause: PAUSE_MIN, stopped: false }
    }
}

/// A request that waits or retries, until dropped.
#[must_use]
pub(crate) struct Waiting<'a, Q: IoQueue> {
    space: &'a Space,
    driver: &'a Driver<Q>,
    key: usize,
    began: Instant,
    /// The number of reclaims at its last retry.
    seen: u64,
    /// A reclaim ends the next pause. It never ends two pauses in a row: a failed write gives its clusters back
    /// itself, and would wake itself without end.
    listen: bool,
    pause: Duration,
    /// It has stopped waiting although there is no space.
    stopped: bool,
}

impl<Q: IoQueue> Waiting<'_, Q> {
    /// Waits until a retry is worthwhile; false if the disk, or the request's queue (`must_stop`), is being stopped.
    pub async fn pause(&mut self, must_stop: impl Fn() -> bool) -> bool {
        let mut alarm = self.driver.alarm(self.driver.now() + self.pause);
        let (go_on, reclaimed) = poll_fn(|context| {
            let mut state = self.space.lock();
            state.waiters[self.key] = Some(context.waker().clone());
            let reclaimed = self.listen && state.reclaims != self.seen;
            if state.stop_waiting || must_stop() {
                return Poll::Ready((false, false));
            }
            if reclaimed || alarm.is_over() {
                self.seen = state.reclaims;
                return Poll::Ready((true, reclaimed));
            }
            drop(state);
            alarm.wake(context.waker());
            Poll::Pending
        })
        .await;
        self.listen = !reclaimed;
        self.pause = (self.pause * 2).min(PAUSE_MAX);
        self.stopped = !go_on;
        go_on
    }
}

impl<Q: IoQueue> Drop for Waiting<'_, Q> {
    fn drop(&mut self) {
        let mut state = self.space.lock();
        state.waiters.remove(self.key);
        let logs = state.waiters.is_empty() && std::mem::take(&mut state.end_is_due);
        drop(state);
        if !logs {
            return;
        }
        let path = shown(&self.space.path);
        let waited = self.driver.now().saturating_duration_since(self.began);
        if self.stopped {
            warn!(%path, ?waited, "the disk or the queue is being stopped: requests that waited for space fail");
        } else {
            info!(%path, ?waited, "no request waits for space on the host any more");
        }
    }
}
