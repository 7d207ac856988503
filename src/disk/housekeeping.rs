//! The housekeeper: one thread a disk that flushes metadata which has been dirty for long, gives freed space back to the
//! host, and memory of the map that nobody uses.
//!
//! It sleeps while there is nothing of that.

use std::convert::Infallible;
use std::future::{Future, poll_fn};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::task::{Poll, Waker};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use engine::mutation::{Mutation, active};
use engine::{Engine, FileIndex};
use storage::pages::give_back;
use storage::{Errno, Kind, Operation, Storage};
use tracing::warn;

use crate::bounds::PUNCHES_AT_ONCE;
use crate::driver::{Alarm, Driver, Outcome};
use crate::error::{OpenError, RequestError};
use crate::layer::DiskFile;
use crate::worker::Worker;
use crate::{SIDE_QUEUE_DEPTH, Shared};

/// How long metadata may stay dirty with no flush from the guest; twice as long where a flush came soon before it got
/// dirty, as the housekeeper is not told of that.
const DIRTY_AGE_MAX: Duration = Duration::from_secs(5);
/// How long to wait before looking again whether freed clusters are out of reach of all I/O.
const RECLAIM_RETRY: Duration = Duration::from_millis(50);

/// How often the map is looked through: what nobody used for so long, or for twice as long at most, gives its memory back.
const SWEEP_EVERY: Duration = Duration::from_secs(300);

/// How others wake the housekeeper.
#[derive(Default)]
pub(crate) struct Bell {
    /// The housekeeper sleeps until it is rung for. Stored (SeqCst) before it looks for work a last time; rung after
    /// the work was made, so one of the two sees the other.
    listening: AtomicBool,
    /// It sleeps or works with the next sweep of the map in mind: it need not be told that there is something to sweep.
    sweeping: AtomicBool,
    /// So much waits for a cut that one is due at once.
    hurry: AtomicBool,
    stop: AtomicBool,
    /// Leaf lock.
    waker: Mutex<Option<Waker>>,
}

impl Bell {
    /// There is something to do, soon.
    pub fn ring(&self) {
        if self.listening.load(Ordering::SeqCst) && self.listening.swap(false, Ordering::SeqCst) {
            self.wake();
        }
    }

    /// A cut is due at once.
    fn hurry(&self) {
        if !self.hurry.load(Ordering::Relaxed) && !self.hurry.swap(true, Ordering::SeqCst) {
            self.wake();
        }
    }

    fn wake(&self) {
        let waker = self.waker.lock().expect("no panic under this lock").take();
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// There is something to sweep, which was not so when it was last asked for.
    fn has_sweep<S: Storage>(&self, worker: &Worker<S>) -> bool {
        !self.sweeping.load(Ordering::SeqCst) && worker.engine().map_is_sweepable()
    }

    pub fn stopped(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    /// Waits until rung (if `listen`), stopped, or the time has come.
    async fn idle<S: Storage>(&self, worker: &Worker<S>, until: Option<Instant>, listen: bool) {
        let mut alarm = until.map(|until| worker.driver.alarm(until));
        let mut started = false;
        poll_fn(|context| {
            *self.waker.lock().expect("no panic under this lock") = Some(context.waker().clone());
            if !started {
                started = true;
                self.listening.store(listen, Ordering::SeqCst);
            }
            let rung = listen && !self.listening.load(Ordering::SeqCst);
            let over = alarm.as_ref().is_some_and(Alarm::is_over);
            if self.stopped() || rung || over || (listen && (has_work(worker) || self.has_sweep(worker))) {
                return Poll::Ready(());
            }
            if let Some(alarm) = &mut alarm {
                alarm.wake(context.waker());
            }
            Poll::Pending
        })
        .await;
        self.listening.store(false, Ordering::SeqCst);
    }
}

fn has_work<S: Storage>(worker: &Worker<S>) -> bool {
    let status = worker.engine().status();
    status.dirty_bytes > 0 || status.quarantined_clusters > 0
}

/// The thread.
pub(crate) struct Housekeeper {
    thread: JoinHandle<()>,
    bell: Arc<Bell>,
}

impl Housekeeper {
    pub fn start<S: Storage>(shared: Arc<Shared<S>>) -> Result<Self, OpenError> {
        let bell = Arc::clone(&shared.bell);
        let (report, started) = mpsc::channel();
        let thread = std::thread::Builder::new()
            .name("strata-keeper".into())
            .spawn(move || match shared.storage.queue(SIDE_QUEUE_DEPTH) {
                Ok(queue) => {
                    let driver = Driver::new(queue);
                    let worker = Worker::new(shared, Rc::clone(&driver)).expect("the first worker of a disk");
                    // Nobody listens if the opener is gone, and then the disk is, too.
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

    /// Ends the thread after what it is doing now.
    pub fn stop(self) {
        self.bell.stop.store(true, Ordering::SeqCst);
        self.bell.wake();
        if self.thread.join().is_err() {
            warn!("the housekeeper of a disk ended in a panic");
        }
    }
}

/// A housekeeper without a thread: whoever opened the disk by [`crate::Disk::open_unkept`] turns it, as it turns its
/// queues. For a simulator, which has one thread for all.
pub struct Keeper<S: Storage> {
    driver: Rc<Driver<S::Queue>>,
    bell: Arc<Bell>,
}

impl<S: Storage> Keeper<S> {
    pub(crate) fn new(shared: Arc<Shared<S>>) -> Result<Self, OpenError> {
        let driver = Driver::new(shared.storage.queue(SIDE_QUEUE_DEPTH)?);
        let bell = Arc::clone(&shared.bell);
        let limit = crate::WORKERS_MAX;
        let worker = Worker::new(shared, Rc::clone(&driver)).ok_or(OpenError::TooManyQueues { limit })?;
        driver.spawn(async move { keep(&worker).await });
        Ok(Keeper { driver, bell })
    }

    /// Does what can be done now. Never blocks.
    pub fn turn(&mut self) {
        self.driver.turn(|_| panic!("the housekeeper has no fast path"));
    }

    /// Sleeps until there may be something to do, or the time is over.
    pub fn wait(&mut self, timeout: Option<Duration>) {
        self.driver.wait(timeout);
    }
}

impl Bell {
    /// Waits until stopped, the time has come, a cut after number `cuts` is durable, or one is due (if that counts).
    async fn pause<S: Storage>(&self, worker: &Worker<S>, until: Instant, cuts: u64, heeds: bool) {
        let mut alarm = worker.driver.alarm(until);
        poll_fn(|context| {
            *self.waker.lock().expect("no panic under this lock") = Some(context.waker().clone());
            let due = heeds && self.hurry.load(Ordering::SeqCst);
            if self.stopped() || due || alarm.is_over() || worker.engine().status().cuts != cuts {
                return Poll::Ready(());
            }
            alarm.wake(context.waker());
            Poll::Pending
        })
        .await;
    }
}

impl<S: Storage> Drop for Keeper<S> {
    /// Ends the housekeeper after what it is doing now.
    fn drop(&mut self) {
        self.bell.stop.store(true, Ordering::SeqCst);
        self.bell.wake();
        while self.driver.has_tasks() {
            self.turn();
            if self.driver.has_tasks() {
                self.driver.wait(None);
            }
        }
    }
}

/// When the map is looked through.
#[derive(Default)]
struct Sweeps {
    next: Option<Instant>,
}

impl Sweeps {
    /// Looks through the map if it is time to. When it is time again, if there is something to look through.
    fn turn<S: Storage>(&mut self, worker: &Worker<S>) -> Option<Instant> {
        let bell = &worker.shared.bell;
        let now = worker.driver.now();
        if self.next.is_some_and(|next| next <= now) {
            sweep(worker.engine(), || bell.stopped());
            self.next = None;
        }
        let filled = worker.engine().map_is_sweepable();
        bell.sweeping.store(filled, Ordering::SeqCst);
        self.next = filled.then(|| self.next.unwrap_or(now + SWEEP_EVERY));
        self.next
    }
}

/// Gives memory of the map back that nobody used since the last time.
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
        worker.search_leaks().await;
        Ok::<(), Infallible>(())
    };
    let chores = async {
        do_chores(worker).await;
        Ok(())
    };
    // All of a thread's tasks in one, so that whoever wakes it wakes both.
    let _ = worker.driver.run_together(vec![Box::pin(search), Box::pin(chores)]).await;
}

async fn do_chores<S: Storage>(worker: &Worker<S>) {
    let bell = &worker.shared.bell;
    let (mut dirty_since, mut sweeps, mut flush_failed) = (None, Sweeps::default(), false);
    while !bell.stopped() && !worker.engine().has_failed() {
        let next_sweep = sweeps.turn(worker);
        if !has_work(worker) {
            dirty_since = None;
            bell.idle(worker, next_sweep, true).await;
            continue;
        }
        let since = *dirty_since.get_or_insert_with(|| worker.driver.now());
        let mut age = worker.driver.now().saturating_duration_since(since);
        // After a flush that failed the next waits its time.
        let due = !flush_failed && bell.hurry.swap(false, Ordering::SeqCst) && worker.engine().wants_cut();
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
            bell.idle(worker, Some(worker.driver.now() + DIRTY_AGE_MAX), false).await;
        }
        let status = worker.engine().status();
        let left = DIRTY_AGE_MAX.saturating_sub(age);
        let pause = if status.reclaimable { RECLAIM_RETRY.min(left) } else { left };
        // A guest's flush ends the pause if it unlinked anything, so that this is given back at once.
        bell.pause(worker, worker.driver.now() + pause, status.cuts, !flush_failed).await;
        if worker.engine().status().cuts != status.cuts {
            (dirty_since, flush_failed) = (None, false);
        }
    }
}

impl<S: Storage> Worker<S> {
    /// Punches the whole file system blocks in a run, if there are any; and whether that is all of it. A punch that
    /// ends inside a block would collide with direct I/O in the same block ([`storage::FileInfo::block_size`]).
    pub fn start_punch(
        &self,
        file: &DiskFile,
        offset: u64,
        length: u64,
    ) -> (bool, Option<impl Future<Output = Outcome>>) {
        let (start, end) = file.whole_blocks(offset, length);
        let whole = (start, end) == (offset, offset + length);
        let punch = Operation::bare(file.id, Kind::Punch { length: end.saturating_sub(start) }, start);
        (whole, (start < end).then(|| self.driver.run(punch)))
    }

    async fn reclaim_until_stopped(&self) -> Result<(), RequestError> {
        while !self.shared.bell.stopped() && self.reclaim_some().await? {}
        Ok(())
    }

    /// Gives some of what was freed back; false if nothing can be given back now.
    pub async fn reclaim_some(&self) -> Result<bool, RequestError> {
        let Some(plan) = self.ask(|engine, waker| engine.plan_reclaim(waker)).await? else {
            return Ok(false);
        };
        for (offset, length) in &plan.punches {
            // No request is left that could put it back: those that knew it as compressed have ended.
            self.shared.inflated.forget(FileIndex(0), *offset, *length);
        }
        let top = &self.shared.files[0];
        let mut punched = Vec::with_capacity(plan.punches.len());
        for some in plan.punches.chunks(PUNCHES_AT_ONCE) {
            let started: Vec<_> =
                some.iter().map(|(offset, length)| self.start_punch(top, offset.0, *length)).collect();
            for (whole, operation) in started {
                let result = match operation {
                    // It goes on all the same.
                    Some(_) if active(Mutation::PunchAfterFree) => Ok(()),
                    Some(operation) => operation.await.0,
                    None => Ok(()),
                };
                if let Err(error) = result
                    && error != Errno::EOPNOTSUPP
                {
                    warn!(%error, "freed space could not be given back to the host; it is reused all the same");
                }
                punched.push(whole && result.is_ok());
            }
        }
        let frees = plan.frees();
        self.engine().commit_reclaim(plan, &punched);
        if frees {
            self.shared.space.reclaimed();
        }
        Ok(true)
    }
}

impl<S: Storage> Shared<S> {
    /// Metadata was changed: the housekeeper is to see to it in time.
    pub(crate) fn touched(&self) {
        self.bell.ring();
        if self.engine.wants_cut() {
            self.bell.hurry();
        }
    }

    /// The engine answered a question, for which it may have filled the map.
    pub(crate) fn asked(&self) {
        if self.engine.map_is_sweepable() && !self.bell.sweeping.load(Ordering::SeqCst) {
            self.bell.ring();
        }
    }

    /// A cut is durable: what it unlinked can be given back. If there is nothing of that, the housekeeper is left asleep: to
    /// wake it would cost every flush the wake-up of a thread.
    pub(crate) fn flushed(&self) {
        if self.engine.status().quarantined_clusters > 0 {
            self.bell.wake();
        }
    }
}
