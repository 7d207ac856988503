//! The housekeeper: one thread per disk. It flushes metadata that has been dirty for long, and gives freed space and
//! unused memory of the map back to the host.
//!
//! It sleeps while there is no such work.

use std::convert::Infallible;
use std::future::poll_fn;
use std::rc::Rc;
use std::sync::{Arc, mpsc};
use std::task::Poll;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use engine::Engine;
use storage::Storage;
use storage::pages::give_back;
use tracing::warn;

use crate::background::bell::Bell;
use crate::error::OpenError;
use crate::runtime::driver::Driver;
use crate::runtime::timers::Alarm;
use crate::serve::worker::Worker;
use crate::shared::{SIDE_QUEUE_DEPTH, Shared, WORKERS_MAX};

/// How long metadata may stay dirty without a flush from the guest. Twice as long if a flush came shortly before it
/// got dirty, as the housekeeper is not notified of that.
const DIRTY_AGE_MAX: Duration = Duration::from_secs(5);
/// The pause between checks whether freed clusters are out of reach of all I/O.
const RECLAIM_RETRY: Duration = Duration::from_millis(50);

/// The period of the sweep of the map. Memory that was unused for one period, at most two, is given back.
const SWEEP_EVERY: Duration = Duration::from_secs(300);

/// The housekeeper's thread.
pub(crate) struct Housekeeper {
    thread: JoinHandle<()>,
    bell: Arc<Bell>,
}

impl Housekeeper {
    pub fn start<S: Storage>(shared: Arc<Shared<S>>) -> Result<Self, OpenError> {
        let bell = Arc::clone(&shared.bell);
        bell.begin();
        let (report, started) = mpsc::channel();
        let thread = std::thread::Builder::new()
            .name("strata-keeper".into())
            .spawn(move || match shared.storage.queue(SIDE_QUEUE_DEPTH) {
                Ok(queue) => {
                    let driver = Driver::new(queue);
                    let worker = Worker::new(shared, Rc::clone(&driver)).expect("the first worker of a disk");
                    // If the opener is gone, the send fails, and the disk is gone too.
                    let _ = report.send(Ok(()));
                    driver.block_on(keep(&worker));
                }
                Err(error) => drop(report.send(Err(OpenError::from(error)))),
            })
            .map_err(OpenError::Thread)?;
        match started.recv() {
            Ok(Ok(())) => Ok(Housekeeper { thread, bell }),
            Ok(Err(error)) => Err(error),
            Err(_) => panic!("the housekeeper ended before it reported"),
        }
    }

    /// Ends the thread after its present work.
    pub fn stop(self) {
        self.bell.stop();
        if self.thread.join().is_err() {
            warn!("the housekeeper of a disk ended in a panic");
        }
    }
}

/// A housekeeper without a thread: the caller of [`crate::Disk::open_unkept`] drives it, as it drives its queues. For
/// a simulator, which has one thread for everything.
pub struct Keeper<S: Storage> {
    driver: Rc<Driver<S::Queue>>,
    bell: Arc<Bell>,
}

impl<S: Storage> Keeper<S> {
    pub(crate) fn new(shared: Arc<Shared<S>>) -> Result<Self, OpenError> {
        let driver = Driver::new(shared.storage.queue(SIDE_QUEUE_DEPTH)?);
        let bell = Arc::clone(&shared.bell);
        let limit = WORKERS_MAX;
        let worker = Worker::new(shared, Rc::clone(&driver)).ok_or(OpenError::TooManyQueues { limit })?;
        bell.begin();
        driver.spawn(async move { keep(&worker).await });
        Ok(Keeper { driver, bell })
    }

    /// Does all work that is possible now. Never blocks.
    pub fn poll(&mut self) {
        self.driver.poll(|_| panic!("the housekeeper has no fast path"));
    }

    /// Sleeps until there may be something to do, or the time is over.
    pub fn wait(&mut self, timeout: Option<Duration>) {
        self.driver.wait(timeout);
    }
}

impl<S: Storage> Drop for Keeper<S> {
    /// Ends the housekeeper after its present work.
    fn drop(&mut self) {
        self.bell.stop();
        while self.driver.has_tasks() {
            self.poll();
            if self.driver.has_tasks() {
                self.driver.wait(None);
            }
        }
    }
}

/// The schedule of the sweeps of the map.
#[derive(Default)]
struct Sweeps {
    next: Option<Instant>,
}

impl Sweeps {
    /// Sweeps the map if it is time. Returns the time of the next sweep, if there is anything to sweep.
    fn sweep_if_due<S: Storage>(&mut self, worker: &Worker<S>) -> Option<Instant> {
        let bell = &worker.shared.bell;
        let now = worker.driver.now();
        if self.next.is_some_and(|next| next <= now) {
            sweep(worker.engine(), || bell.stopped());
            self.next = None;
        }
        let filled = worker.engine().map_is_sweepable();
        bell.set_sweeping(filled);
        self.next = filled.then(|| self.next.unwrap_or(now + SWEEP_EVERY));
        self.next
    }
}

/// Gives memory of the map back that was not used since the last sweep.
fn sweep(engine: &Engine, stopped: impl Fn() -> bool) {
    let mut from = Some(0);
    while let Some(at) = from.filter(|_| !stopped()) {
        let idle = engine.sweep_map(at);
        give_back(idle.pages());
        from = idle.next();
    }
}

/// The housekeeper's work.
async fn keep<S: Storage>(worker: &Worker<S>) {
    let search = async {
        until_decided(worker).await;
        worker.search_leaks().await;
        Ok::<(), Infallible>(())
    };
    let chores = async {
        do_chores(worker).await;
        Ok(())
    };
    // All of the thread's work in one task, so that one wake wakes both.
    let _ = worker.driver.run_together(vec![Box::pin(search), Box::pin(chores)]).await;
}

/// Waits until a journal of a dead daemon is carried out or given up: until then any cluster may be named in it.
async fn until_decided<S: Storage>(worker: &Worker<S>) {
    let bell = &worker.shared.bell;
    poll_fn(|context| {
        bell.set_waker(context.waker());
        if bell.stopped() || !worker.shared.awaits_journal() { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
}

async fn do_chores<S: Storage>(worker: &Worker<S>) {
    let bell = &worker.shared.bell;
    let (mut dirty_since, mut sweeps, mut flush_failed) = (None, Sweeps::default(), false);
    while !bell.stopped() && !worker.engine().has_failed() {
        let next_sweep = sweeps.sweep_if_due(worker);
        if !has_work(worker) {
            dirty_since = None;
            idle(worker, next_sweep, true).await;
            continue;
        }
        let since = *dirty_since.get_or_insert_with(|| worker.driver.now());
        let mut age = worker.driver.now().saturating_duration_since(since);
        // After a failed flush the next one waits for its time.
        let due = !flush_failed && bell.take_hurry() && worker.engine().wants_cut();
        if age >= DIRTY_AGE_MAX || due {
            flush_failed = false;
            if let Err(error) = worker.flush().await {
                warn!(%error, "flushing metadata in the background failed");
                flush_failed = true;
            }
            (dirty_since, age) = (None, Duration::ZERO);
        }
        if let Err(error) = worker.reclaim_until_stopped().await {
            warn!(%error, "giving freed space back failed");
            idle(worker, Some(worker.driver.now() + DIRTY_AGE_MAX), false).await;
        }
        let status = worker.engine().status();
        let left = DIRTY_AGE_MAX.saturating_sub(age);
        let pause = if status.reclaimable { RECLAIM_RETRY.min(left) } else { left };
        // A guest's flush ends the pause if it unlinked anything, so that this space is given back at once.
        pause_until(worker, worker.driver.now() + pause, status.cuts, !flush_failed).await;
        if worker.engine().status().cuts != status.cuts {
            (dirty_since, flush_failed) = (None, false);
        }
    }
}

fn has_work<S: Storage>(worker: &Worker<S>) -> bool {
    let status = worker.engine().status();
    status.dirty_bytes > 0 || status.quarantined_clusters > 0
}

/// True if the map can be swept and no sweep is planned yet.
fn has_sweep<S: Storage>(worker: &Worker<S>) -> bool {
    !worker.shared.bell.is_sweeping() && worker.engine().map_is_sweepable()
}

/// Waits until rung (if `listen`), stopped, or the time has come.
async fn idle<S: Storage>(worker: &Worker<S>, until: Option<Instant>, listen: bool) {
    let bell = &worker.shared.bell;
    let mut alarm = until.map(|until| worker.driver.alarm(until));
    let mut started = false;
    poll_fn(|context| {
        bell.set_waker(context.waker());
        if !started {
            started = true;
            bell.listen(listen);
        }
        let rung = listen && !bell.is_listening();
        let over = alarm.as_ref().is_some_and(Alarm::is_over);
        if bell.stopped() || rung || over || (listen && (has_work(worker) || has_sweep(worker))) {
            return Poll::Ready(());
        }
        if let Some(alarm) = &mut alarm {
            alarm.wake(context.waker());
        }
        Poll::Pending
    })
    .await;
    bell.listen(false);
}

/// Waits until stopped, the time has come, a cut after number `cuts` is durable, or (if `heeds`) a cut is due.
async fn pause_until<S: Storage>(worker: &Worker<S>, until: Instant, cuts: u64, heeds: bool) {
    let bell = &worker.shared.bell;
    let mut alarm = worker.driver.alarm(until);
    poll_fn(|context| {
        bell.set_waker(context.waker());
        let due = heeds && bell.is_hurried();
        if bell.stopped() || due || alarm.is_over() || worker.engine().status().cuts != cuts {
            return Poll::Ready(());
        }
        alarm.wake(context.waker());
        Poll::Pending
    })
    .await;
}

impl<S: Storage> Shared<S> {
    /// Metadata was changed: notifies the housekeeper, which flushes it in time.
    pub(crate) fn note_change(&self) {
        self.bell.ring();
        if self.engine.wants_cut() {
            self.bell.hurry();
        }
    }

    /// The engine answered a question, and may have filled the map for it.
    pub(crate) fn note_answer(&self) {
        if self.engine.map_is_sweepable() && !self.bell.is_sweeping() {
            self.bell.ring();
        }
    }

    /// A cut is durable: clusters that it unlinked can be given back. If there are none, the housekeeper stays
    /// asleep: waking its thread would slow every flush.
    pub(crate) fn note_cut(&self) {
        if self.engine.status().quarantined_clusters > 0 {
            self.bell.wake();
        }
    }
}
