//! The thread of one started queue: takes chains from the ring, submits requests to the disk, and hands back completed
//! chains.
//!
//! Owns the ring, the disk's queue and the slots while it runs. It takes no lock that another thread holds while
//! waiting. Only the session thread that stops it waits for it, and that thread holds no such lock.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU32, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tracing::{debug, error, warn};
use vmm_sys_util::eventfd::EventFd;

use crate::bounds::PORTION_MOST;
use crate::device::{BlockDevice, BlockQueue, Done, Request, Status};
use crate::error::RingError;
use crate::fd::{self, RaiseMark, SignalSlot, SignalView};
use crate::in_flight::InFlight;
use crate::memory::GuestMemory;
use crate::metrics::{Metrics, QueueMetrics};
use crate::poll::PollBudget;
use crate::portion::Portion;
use crate::request::{Checker, Parsed, write_status};
use crate::ring::{Chain, Ring, Used};

/// An idle queue may wake so many times in a row with nothing to do. More is no accident: a guest or a frontend kicks
/// without end.
const IDLE_WAKES_MAX: u32 = 64;
/// The pause after each further idle wake.
const IDLE_WAKE_PAUSE: Duration = Duration::from_millis(1);
/// A stop that takes longer than this is worth a line in the log, and another for each time it passes again.
const SLOW_STOP: Duration = Duration::from_secs(30);

/// State that the session shares with all its workers.
#[derive(Debug)]
pub(crate) struct Shared {
    /// Writes are done only when durable. Relaxed: the guest that changed it waits for the answer of SET_CONFIG, and
    /// the next avail index it stores is loaded with Acquire.
    write_through: AtomicBool,
    /// Counts the memory's changes. Stored with Release after the memory; loaded with Acquire.
    changes: AtomicU32,
    /// Guards the current memory. A leaf: nothing is called with it held.
    memory: Mutex<Arc<GuestMemory>>,
    /// A ring of this session has started. Only the session's thread uses it.
    pub started: AtomicBool,
    /// The log already has the line that the guest's memory is not shared.
    unshared_told: AtomicBool,
}

impl Shared {
    pub(crate) fn new() -> Self {
        Shared {
            write_through: AtomicBool::new(true),
            changes: AtomicU32::new(0),
            memory: Mutex::new(Arc::new(GuestMemory::empty())),
            started: AtomicBool::new(false),
            unshared_told: AtomicBool::new(false),
        }
    }

    /// Logs once a session that the guest's memory is not shared with us, and the setting that helps.
    pub(crate) fn tell_unshared(&self, queue: u16) {
        if self.unshared_told.swap(true, Ordering::Relaxed) {
            return;
        }
        warn!(
            queue,
            "the guest uses the disk, but its memory is not shared with this daemon, so its requests cannot be seen and the \
             guest waits for ever. QEMU: -object memory-backend-memfd,id=mem,size=SIZE,share=on -machine \
             memory-backend=mem, with the SIZE of -m. Cloud Hypervisor: --memory size=SIZE,shared=on"
        );
    }

    pub(crate) fn set_write_through(&self, write_through: bool) {
        self.write_through.store(write_through, Ordering::Release);
    }

    /// Replaces the memory. Running workers switch to it before the next chain they take. While any worker runs, the
    /// new memory must therefore hold everything that the old one held.
    pub(crate) fn set_memory(&self, memory: Arc<GuestMemory>) {
        *self.memory.lock().unwrap_or_else(PoisonError::into_inner) = memory;
        self.changes.fetch_add(1, Ordering::Release);
    }

    pub(crate) fn memory(&self) -> Arc<GuestMemory> {
        Arc::clone(&self.memory.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The inputs of a new worker.
pub(crate) struct WorkerSetup<D> {
    pub index: u16,
    pub device: Arc<D>,
    pub ring: Ring,
    pub ring_size: u16,
    /// The ring was used before: its previous worker or daemon may have lost an interrupt.
    pub resumed: bool,
    pub memory: Arc<GuestMemory>,
    pub shared: Arc<Shared>,
    pub kick: EventFd,
    pub call: Arc<SignalSlot>,
    pub error: Arc<SignalSlot>,
    pub metrics: Arc<Metrics>,
    pub poll_max: Duration,
}

/// The result of a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Exit {
    /// The index in the available ring of the next chain to take.
    pub next_available: u16,
    /// The ring was corrupt, or the worker itself failed: it must be set up again before it runs again.
    pub broken: bool,
}

const RUN: u8 = 0;
const STOP: u8 = 1;
const STOP_AND_FLUSH: u8 = 2;

#[derive(Debug)]
struct Control {
    /// RUN, STOP or STOP_AND_FLUSH. Stored before the notifier is used, loaded before every wait.
    command: AtomicU8,
    /// The worker's position in the available ring, in case it dies. Relaxed: read after a join.
    next_available: AtomicU16,
    raising: RaiseMark,
}

impl Control {
    fn stopping(&self) -> bool {
        self.command.load(Ordering::Acquire) != RUN
    }
}

/// A running worker, seen from the session. Dropping it stops it.
pub(crate) struct Worker {
    index: u16,
    control: Arc<Control>,
    notify: Arc<dyn Fn() + Send + Sync>,
    exit: Receiver<Exit>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Starts the thread and waits until it has its queue on the disk.
    ///
    /// # Errors
    /// When the host refuses a thread, or the disk refuses a queue.
    pub(crate) fn start<D: BlockDevice>(setup: WorkerSetup<D>) -> io::Result<Worker> {
        let index = setup.index;
        let control = Arc::new(Control {
            command: AtomicU8::new(RUN),
            next_available: AtomicU16::new(setup.ring.next_available()),
            raising: RaiseMark::default(),
        });
        let (started, starting) = mpsc::sync_channel(1);
        let (exited, exit) = mpsc::sync_channel(1);
        let its_control = Arc::clone(&control);
        let thread = std::thread::Builder::new()
            .name(format!("strata-q{index}"))
            .spawn(move || thread_main(setup, &its_control, &started, &exited))?;
        match starting.recv() {
            Ok(Ok(notify)) => Ok(Worker { index, control, notify, exit, thread: Some(thread) }),
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

    /// Stops the worker: it takes no more chains, finishes what it has, optionally makes everything durable, and
    /// ends. After that no guest memory is written. As long as the disk needs, whatever that is.
    pub(crate) fn stop(mut self, flush: bool) -> Exit {
        self.end(if flush { STOP_AND_FLUSH } else { STOP })
    }

    fn end(&mut self, command: u8) -> Exit {
        self.control.command.store(command, Ordering::Release);
        (self.notify)();
        let began = Instant::now();
        let (mut told, mut seen) = (began, 0);
        let exit = loop {
            match self.exit.recv_timeout(fd::INTERRUPT_EVERY) {
                Ok(exit) => break exit,
                Err(RecvTimeoutError::Timeout) => {
                    self.interrupt_signal(&mut seen);
                    if told.elapsed() >= SLOW_STOP {
                        told = Instant::now();
                        warn!(queue = self.index, waited = ?began.elapsed(), "the queue still has requests in flight");
                    }
                }
                // Not reached: the thread always sends before it ends.
                Err(RecvTimeoutError::Disconnected) => {
                    let next_available = self.control.next_available.load(Ordering::Relaxed);
                    break Exit { next_available, broken: true };
                }
            }
        };
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        exit
    }
}

impl Worker {
    /// Interrupts the worker's write to its call descriptor, if it is in the same write as at the previous call.
    fn interrupt_signal(&self, seen: &mut u32) {
        if let Some(thread) = &self.thread
            && self.control.raising.is_stuck(seen)
        {
            fd::interrupt(thread);
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        if self.thread.is_some() {
            self.end(STOP);
        }
    }
}

type Started = SyncSender<io::Result<Arc<dyn Fn() + Send + Sync>>>;

fn thread_main<D: BlockDevice>(
    setup: WorkerSetup<D>,
    control: &Control,
    started: &Started,
    exited: &SyncSender<Exit>,
) {
    let (index, error_signal, metrics) = (setup.index, Arc::clone(&setup.error), Arc::clone(&setup.metrics));
    // Any unwinding drops the disk's queue first, which waits until no guest memory is in use, and then the memory.
    let exit = catch_unwind(AssertUnwindSafe(|| run(setup, control, started)));
    let exit = exit.unwrap_or_else(|_| {
        error!(queue = index, "the worker failed; its queue is stopped");
        metrics.queue(index).ring_error();
        error_signal.raise();
        Some(Exit { next_available: control.next_available.load(Ordering::Relaxed), broken: true })
    });
    if let Some(exit) = exit {
        let _ = exited.send(exit);
    }
}

fn run<D: BlockDevice>(setup: WorkerSetup<D>, control: &Control, started: &Started) -> Option<Exit> {
    let mut queue = match setup.device.queue(InFlight::depth(setup.ring_size)) {
        Ok(queue) => queue,
        Err(error) => {
            let _ = started.send(Err(error));
            return None;
        }
    };
    queue.watch(setup.kick);
    let notify = queue.notifier();
    let mut running = Running {
        queue,
        index: setup.index,
        ring: setup.ring,
        in_flight: InFlight::new(setup.ring_size),
        checker: Checker::new(setup.device.profile()),
        chain: Chain::default(),
        used: Vec::with_capacity(usize::from(PORTION_MOST)),
        done: Vec::with_capacity(usize::from(PORTION_MOST)),
        control,
        call: SignalView::new(setup.call),
        error: setup.error,
        metrics: setup.metrics.queue(setup.index),
        portion: Portion::new(),
        at_once: 0,
        poll: [PollBudget::new(setup.poll_max), PollBudget::new(setup.poll_max)],
        idle_wakes: 0,
        seen: setup.shared.changes.load(Ordering::Acquire),
        memory: setup.memory,
        retired: Vec::new(),
        shared: setup.shared,
    };
    // The memory may have changed after the session read it and before this thread read the counter.
    running.memory = running.shared.memory();
    let _ = started.send(Ok(notify));
    Some(running.run(setup.resumed))
}

/// A worker on its own thread. Fields drop in their order here: the queue before the memory.
struct Running<'a, Q: BlockQueue> {
    queue: Q,
    index: u16,
    ring: Ring,
    in_flight: InFlight,
    checker: Checker,
    chain: Chain,
    /// Completed chains that are not yet handed back.
    used: Vec<Used>,
    done: Vec<Done>,
    control: &'a Control,
    call: SignalView,
    error: Arc<SignalSlot>,
    metrics: &'a QueueMetrics,
    portion: Portion,
    /// Chains of the current portion that are done.
    at_once: usize,
    /// One budget for waits with nothing in flight, which the guest ends, and one for waits with requests in flight,
    /// which the host ends too. They are independent: a disk may be slow and its guest quick.
    poll: [PollBudget; 2],
    /// Waits since the last chain that ended with nothing to do and nothing in flight.
    idle_wakes: u32,
    seen: u32,
    memory: Arc<GuestMemory>,
    /// Older memory that requests in flight may still use.
    retired: Vec<Arc<GuestMemory>>,
    shared: Arc<Shared>,
}

impl<Q: BlockQueue> Running<'_, Q> {
    fn run(mut self, resumed: bool) -> Exit {
        if resumed {
            self.call.raise(&self.control.raising);
        }
        let broken = match self.serve() {
            Ok(()) => false,
            Err(error) => {
                self.report(error);
                true
            }
        };
        let lost = self.drain();
        if self.control.command.load(Ordering::Acquire) == STOP_AND_FLUSH {
            self.flush();
        }
        let next_available = self.ring.next_available();
        debug!(queue = self.index, next_available, broken, "queue stopped");
        Exit { next_available, broken: broken || lost }
    }

    /// Serves the ring until a stop, or until the ring is found corrupt.
    fn serve(&mut self) -> Result<(), RingError> {
        self.ring.disable_kicks()?;
        while !self.control.stopping() {
            let waiting = self.ring.available()?;
            let progress = if waiting > 0 { self.serve_portion(waiting)? } else { self.finish()? };
            if !progress {
                self.idle()?;
            }
        }
        Ok(())
    }

    /// Takes a portion of the chains that are waiting, and hands back what is done.
    fn serve_portion(&mut self, waiting: u16) -> Result<bool, RingError> {
        let began = Instant::now();
        let chains = waiting.min(self.portion.get());
        self.queue.expect_more(waiting > chains);
        self.in_flight.begin_portion();
        self.take(chains)?;
        self.at_once = self.used.len();
        self.finish()?;
        self.portion.over(chains, self.at_once, began.elapsed());
        Ok(true)
    }

    /// Takes so many chains, which are there, and gives them to the disk. What needs no disk is answered.
    fn take(&mut self, chains: u16) -> Result<(), RingError> {
        self.idle_wakes = 0;
        // After the available index was loaded: a chain may be in memory that was added before it was made available.
        self.refresh_memory();
        let write_through = self.shared.write_through.load(Ordering::Relaxed);
        for _ in 0..chains {
            self.ring.pop(&self.memory, &mut self.chain)?;
            self.start(write_through);
        }
        self.control.next_available.store(self.ring.next_available(), Ordering::Relaxed);
        Ok(())
    }

    /// Starts the current chain.
    fn start(&mut self, write_through: bool) {
        let head = self.chain.head;
        let submission = match self.checker.parse(&mut self.chain, write_through) {
            Parsed::NoStatus => {
                self.metrics.malformed();
                self.used.push(Used { head, written: 0 });
                return;
            }
            Parsed::Answer(answer) => {
                write_status(&answer.status_byte, answer.status);
                self.metrics.request(answer.kind, answer.status, 0);
                self.used.push(Used { head, written: answer.written });
                return;
            }
            Parsed::Submit(submission) => submission,
        };
        let data = match submission.requests.first() {
            Some(Request::Read { .. }) => &self.chain.writable[..],
            Some(Request::Write { .. }) => &self.chain.readable[..],
            _ => &[],
        };
        let moves = matches!(submission.requests[..], [Request::Read { .. } | Request::Write { .. }]);
        if submission.requests.is_empty() || (moves && data.is_empty()) {
            write_status(&submission.status_byte, Status::Ok);
            self.metrics.request(submission.kind, Status::Ok, 0);
            self.used.push(Used { head, written: 1 });
            return;
        }
        if let Some((tag, request)) = self.in_flight.add(head, submission) {
            self.queue.submit(tag, request, data);
        }
    }

    /// Lets the disk work, and hands back completed chains with at most one interrupt. False if nothing more can be
    /// done until an event.
    fn finish(&mut self) -> Result<bool, RingError> {
        while let Some((tag, request)) = self.in_flight.next_segment() {
            self.queue.submit(tag, request, &[]);
        }
        self.queue.turn(&mut self.done);
        for done in self.done.drain(..) {
            if let Some(pending) = self.in_flight.finish(done) {
                self.at_once += usize::from(self.in_flight.is_of_portion(&pending));
                write_status(&pending.status_byte, pending.status);
                self.metrics.request(pending.kind, pending.status, pending.bytes);
                let written = if pending.status == Status::Ok { pending.written } else { 1 };
                self.used.push(Used { head: pending.head, written });
            }
        }
        if self.used.is_empty() {
            return Ok(self.in_flight.may_submit());
        }
        let pushed = self.ring.push_used(&self.used);
        self.used.clear();
        pushed?;
        if self.ring.needs_notification()? {
            self.call.raise(&self.control.raising);
            self.metrics.interrupt();
        }
        if self.in_flight.is_empty() {
            self.retired.clear();
        }
        Ok(true)
    }

    /// Nothing to do: polls for a while, then sleeps until the guest kicks, the disk has something, or the session
    /// notifies.
    fn idle(&mut self) -> Result<(), RingError> {
        let began = Instant::now();
        let kind = usize::from(!self.in_flight.is_empty());
        // With several requests in flight, poll for a shorter time: a completion that waits briefly costs nothing,
        // because the host is still busy with the others.
        let budget = self.poll[kind].get() / self.in_flight.len().max(1) as u32;
        let mut round = 0;
        while !budget.is_zero() && began.elapsed() < budget {
            relax(&mut round);
            let found = self.ring.available()? > 0 || (!self.in_flight.is_empty() && self.finish()?);
            if found {
                self.poll[kind].found(began.elapsed());
            }
            if found || self.control.stopping() {
                return Ok(());
            }
        }
        if !self.ring.enable_kicks()? && !self.control.stopping() {
            self.metrics.sleep();
            self.queue.wait(None);
            if self.idle_wakes == 0 && !self.ring.was_used() {
                self.look_for_guest()?;
            }
            self.pace();
            self.poll[kind].slept(began.elapsed());
        }
        self.ring.disable_kicks()
    }

    /// The first sleep of a never used ring has ended, so most likely the guest kicked. If no chain is available and
    /// the memory was never written, the guest uses other memory.
    #[cold]
    fn look_for_guest(&self) -> Result<(), RingError> {
        if !self.control.stopping() && self.ring.available()? == 0 && self.memory.is_untouched() {
            self.shared.tell_unshared(self.index);
        }
        Ok(())
    }

    /// Keeps whoever kicks for nothing from taking a whole processor: a flood of them, or a descriptor that is always
    /// readable. Not while requests are in flight, whose steps end waits as well.
    fn pace(&mut self) {
        if !self.in_flight.is_empty() {
            return;
        }
        self.idle_wakes = self.idle_wakes.saturating_add(1);
        if self.idle_wakes > IDLE_WAKES_MAX {
            std::thread::sleep(IDLE_WAKE_PAUSE);
        }
    }

    fn refresh_memory(&mut self) {
        let changes = self.shared.changes.load(Ordering::Acquire);
        if changes == self.seen {
            return;
        }
        self.seen = changes;
        let old = std::mem::replace(&mut self.memory, self.shared.memory());
        if !self.in_flight.is_empty() {
            self.retired.push(old);
        }
    }

    /// Finishes every request that the disk has; true if the ring was lost meanwhile. The guest may then miss answers,
    /// but the disk is drained all the same. Requests that wait for help fail (docs/concurrency.md, "Stopping a ring").
    fn drain(&mut self) -> bool {
        self.queue.give_up();
        let mut lost = false;
        loop {
            let idle = match self.finish() {
                Ok(busy) => !busy,
                Err(error) => {
                    lost = true;
                    self.used.clear();
                    self.report(error);
                    false
                }
            };
            if self.in_flight.is_empty() {
                break;
            }
            // Not after a completion: waiting segments may go to the disk now, and nothing else would end the wait.
            if idle {
                self.queue.wait(None);
            }
        }
        // The next user of the ring should find kicks enabled. It checks the ring first anyway.
        let _ = self.ring.enable_kicks();
        lost
    }

    /// Makes all writes durable. The guest did not request this flush, so a failure is only logged; the disk itself
    /// refuses later requests.
    fn flush(&mut self) {
        let tag = self.in_flight.add_closing();
        self.queue.submit(tag, Request::Flush, &[]);
        while !self.in_flight.is_empty() {
            self.queue.turn(&mut self.done);
            for done in self.done.drain(..) {
                if done.status != Status::Ok {
                    warn!(queue = self.index, "the flush of a stopping queue failed");
                }
                self.in_flight.finish(done);
            }
            if !self.in_flight.is_empty() {
                self.queue.wait(None);
            }
        }
    }

    fn report(&self, error: RingError) {
        warn!(queue = self.index, %error, "the ring is corrupt; the queue is stopped");
        self.metrics.ring_error();
        self.error.raise();
    }
}

/// Waits a moment. Now and then it yields the processor to other threads: the guest may need this very one.
fn relax(round: &mut u32) {
    *round = round.wrapping_add(1);
    if round.is_multiple_of(8) {
        std::thread::yield_now();
    } else {
        for _ in 0..16 {
            std::hint::spin_loop();
        }
    }
}
