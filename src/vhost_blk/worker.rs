//! The thread of one started queue: its start and its end. `serving` owns the work in between, and `control` the state
//! that it shares with the session.
//!
//! A worker takes no lock that another thread holds while waiting. Only the session thread that stops it waits for it,
//! and that thread holds no such lock.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender};
use std::time::{Duration, Instant};

use tracing::{error, warn};

use crate::control::{Control, Exit, Shared, Stop, WorkerSetup, WorkerThread};
use crate::device::{BlockDevice, BlockQueue};
use crate::fd;
use crate::in_flight::InFlight;
use crate::pulse::Pulse;
use crate::serving::Running;
use crate::virtqueue::Virtqueue;

/// A stop that takes longer than this is worth a line in the log, and another for each time it passes again.
const SLOW_STOP: Duration = Duration::from_secs(30);

/// A running worker, seen from the session. Dropping it stops it.
pub(crate) struct Worker {
    index: u16,
    control: Arc<Control>,
    notify: Arc<dyn Fn() + Send + Sync>,
    exit: Receiver<Exit>,
    thread: Arc<WorkerThread>,
    shared: Arc<Shared>,
    pulse: Arc<Pulse>,
}

impl Worker {
    /// Starts the thread and waits until it has its queue on the disk.
    ///
    /// # Errors
    /// When the host refuses a thread, or the disk refuses a queue.
    pub(crate) fn start<D: BlockDevice, R: Virtqueue>(setup: WorkerSetup<D, R>) -> io::Result<Worker> {
        let (index, pulse, shared) = (setup.index, Arc::clone(&setup.pulse), Arc::clone(&setup.shared));
        let control = Arc::new(Control::new(setup.ring.base()));
        let (started, starting) = mpsc::sync_channel(1);
        let (exited, exit) = mpsc::sync_channel(1);
        let its_control = Arc::clone(&control);
        let thread = std::thread::Builder::new()
            .name(format!("strata-q{index}"))
            .spawn(move || thread_main(setup, &its_control, &started, &exited))?;
        // It may have to open the disk first, and wait for its lock.
        let in_step = pulse.session.pause();
        let answer = starting.recv();
        if in_step {
            pulse.session.step();
        }
        match answer {
            Ok(Ok(notify)) => {
                let thread = Arc::new(WorkerThread::new(Arc::clone(&control), thread));
                shared.add_thread(&thread);
                Ok(Worker { index, control, notify, exit, thread, shared, pulse })
            }
            Ok(Err(error)) => {
                let _ = thread.join();
                Err(error)
            }
            Err(_) => {
                let _ = thread.join();
                Err(io::Error::other("the worker failed while it started"))
            }
        }
    }

    /// Tells the worker to stop, without waiting for it.
    pub(crate) fn tell(&self, stop: Stop) {
        self.control.tell(stop);
        (self.notify)();
    }

    /// Waits until all these workers have stopped, which have been told. As long as the disk needs, whatever that is;
    /// but once `hurry` is true, what a pause would still serve stays in the rings.
    pub(crate) fn join_all(mut workers: Vec<Worker>, hurry: &dyn Fn() -> bool) -> Vec<Exit> {
        (0..workers.len()).map(|at| Self::join_first(&mut workers[at..], hurry)).collect()
    }

    /// Waits for the first of these workers. Keeps every worker of the session from being held by a signal: another one may
    /// have what this one waits for.
    fn join_first(workers: &mut [Worker], hurry: &dyn Fn() -> bool) -> Exit {
        let (began, pulse) = (Instant::now(), Arc::clone(&workers[0].pulse));
        let mut told = began;
        // A worker that is stuck shows in its own beat.
        let in_step = pulse.session.pause();
        let exit = loop {
            match workers[0].exit.recv_timeout(fd::INTERRUPT_EVERY) {
                Ok(exit) => break exit,
                Err(RecvTimeoutError::Timeout) => {
                    workers[0].shared.interrupt_signals();
                    let pauses = |worker: &&Worker| worker.control.stop() == Some(Stop::Pause);
                    if workers.iter().any(|worker| pauses(&worker)) && hurry() {
                        workers.iter().filter(pauses).for_each(|worker| worker.tell(Stop::Drain));
                    }
                    if told.elapsed() >= SLOW_STOP {
                        told = Instant::now();
                        let queue = workers[0].index;
                        warn!(queue, waited = ?began.elapsed(), "the queue still has requests in flight");
                    }
                }
                // Not reached: the thread always sends before it ends.
                Err(RecvTimeoutError::Disconnected) => break workers[0].control.broken_exit(),
            }
        };
        workers[0].thread.join();
        if in_step {
            pulse.session.step();
        }
        exit
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        if !self.thread.is_joined() {
            self.tell(Stop::Drain);
            Self::join_first(std::slice::from_mut(self), &|| false);
        }
    }
}

type Started = SyncSender<io::Result<Arc<dyn Fn() + Send + Sync>>>;

fn thread_main<D: BlockDevice, R: Virtqueue>(
    setup: WorkerSetup<D, R>,
    control: &Control,
    started: &Started,
    exited: &SyncSender<Exit>,
) {
    let (index, error_signal, metrics) = (setup.index, Arc::clone(&setup.error), Arc::clone(&setup.metrics));
    let pulse = Arc::clone(&setup.pulse);
    // Any unwinding drops the disk's queue first, which waits until no guest memory is in use, and then the memory.
    let exit = catch_unwind(AssertUnwindSafe(|| run(setup, control, started)));
    let exit = exit.unwrap_or_else(|_| {
        error!(queue = index, "the worker failed; its queue is stopped");
        metrics.queue(index).ring_error();
        error_signal.raise();
        Some(control.broken_exit())
    });
    pulse.queue(index).rest();
    if let Some(exit) = exit {
        let _ = exited.send(exit);
    }
}

fn run<D: BlockDevice, R: Virtqueue>(
    setup: WorkerSetup<D, R>,
    control: &Control,
    started: &Started,
) -> Option<Exit> {
    let queue = match setup.device.queue(InFlight::depth(setup.ring_size)) {
        Ok(queue) => queue,
        Err(error) => {
            let _ = started.send(Err(error));
            return None;
        }
    };
    let (index, notify) = (setup.index, queue.notifier());
    let (metrics, pulse) = (Arc::clone(&setup.metrics), Arc::clone(&setup.pulse));
    let running = Running::new(queue, setup, control, (metrics.queue(index), pulse.queue(index)));
    let _ = started.send(Ok(notify));
    Some(running.run())
}
