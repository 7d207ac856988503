//! What a worker and the session have in common: the inputs of a worker, the commands to it, and its result.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tracing::warn;
use vmm_sys_util::eventfd::EventFd;

use crate::dirty_log::DirtyLog;
use crate::fd::{self, RaiseMark, SignalSlot};
use crate::line_limit::SessionLines;
use crate::memory::GuestMemory;
use crate::metrics::Metrics;
use crate::pulse::Pulse;
use crate::virtqueue::Virtqueue;

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
    /// The threads of the workers, also of those that have ended. Only the session's thread uses it.
    threads: Mutex<Vec<Weak<WorkerThread>>>,
    /// Until then, in microseconds since `began`, rings take no more chains; 0 if they may. Relaxed: it orders nothing.
    held_until: AtomicU64,
    began: Instant,
    /// A ring of this session has started. Only the session's thread uses it.
    pub started: AtomicBool,
    /// The log already has the line that the guest's memory is not shared.
    unshared_told: AtomicBool,
    /// Limits the lines that the guest can cause.
    pub lines: SessionLines,
}

impl Shared {
    pub(crate) fn new() -> Self {
        Shared {
            write_through: AtomicBool::new(true),
            changes: AtomicU32::new(0),
            memory: Mutex::new(Arc::new(GuestMemory::empty())),
            threads: Mutex::default(),
            held_until: AtomicU64::new(0),
            began: Instant::now(),
            started: AtomicBool::new(false),
            unshared_told: AtomicBool::new(false),
            lines: SessionLines::default(),
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

    /// Has all rings take no more chains for that long. What they have goes on.
    pub(crate) fn hold(&self, time: Duration) {
        let until = (self.began.elapsed() + time).as_micros();
        self.held_until.store(u64::try_from(until).unwrap_or(0), Ordering::Relaxed);
    }

    /// For how long rings take no more chains, if at all.
    #[inline]
    pub(crate) fn held(&self) -> Option<Duration> {
        let until = self.held_until.load(Ordering::Relaxed);
        if until == 0 { None } else { self.left_until(until) }
    }

    #[cold]
    fn left_until(&self, until: u64) -> Option<Duration> {
        let left = Duration::from_micros(until).checked_sub(self.began.elapsed());
        if left.is_none() {
            // It is over, unless it has begun again meanwhile.
            let _ = self.held_until.compare_exchange(until, 0, Ordering::Relaxed, Ordering::Relaxed);
        }
        left
    }

    /// Notes the thread of a worker that has started.
    pub(crate) fn add_thread(&self, thread: &Arc<WorkerThread>) {
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        threads.retain(|other| other.strong_count() > 0);
        threads.push(Arc::downgrade(thread));
    }

    /// Interrupts each worker's write to its call descriptor, if it is in the same write as at the previous call.
    pub(crate) fn interrupt_signals(&self) {
        let threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        threads.iter().filter_map(Weak::upgrade).for_each(|thread| thread.interrupt_signal());
    }

    pub(crate) fn set_write_through(&self, write_through: bool) {
        self.write_through.store(write_through, Ordering::Release);
    }

    /// Whether writes are done only when durable.
    pub(crate) fn write_through(&self) -> bool {
        self.write_through.load(Ordering::Relaxed)
    }

    /// How often the memory has changed. Whoever loads this and then the memory has at least the memory of that change.
    pub(crate) fn changes(&self) -> u32 {
        self.changes.load(Ordering::Acquire)
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

/// A worker's thread. Only the session's thread uses it.
#[derive(Debug)]
pub(crate) struct WorkerThread {
    control: Arc<Control>,
    /// `None` once it was joined. A leaf lock.
    handle: Mutex<Option<JoinHandle<()>>>,
    /// The signal in which it was last seen.
    seen: AtomicU32,
}

impl WorkerThread {
    pub(crate) fn new(control: Arc<Control>, handle: JoinHandle<()>) -> Self {
        WorkerThread { control, handle: Mutex::new(Some(handle)), seen: AtomicU32::new(0) }
    }

    pub(crate) fn is_joined(&self) -> bool {
        self.handle.lock().unwrap_or_else(PoisonError::into_inner).is_none()
    }

    /// Waits for the thread's end.
    pub(crate) fn join(&self) {
        let handle = self.handle.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(handle) = handle {
            let _ = handle.join();
        }
    }

    fn interrupt_signal(&self) {
        let mut seen = self.seen.load(Ordering::Relaxed);
        if let Some(handle) = &*self.handle.lock().unwrap_or_else(PoisonError::into_inner)
            && self.control.raising.is_stuck(&mut seen)
        {
            fd::interrupt(handle);
        }
        self.seen.store(seen, Ordering::Relaxed);
    }
}

/// The inputs of a new worker.
pub(crate) struct WorkerSetup<D, R: Virtqueue> {
    pub index: u16,
    pub device: Arc<D>,
    pub ring: R,
    pub ring_size: u16,
    /// The record of the chains in flight, if the frontend keeps one.
    pub tracker: Option<R::Tracker>,
    /// The chains that the last worker had in flight, to be done first and in this order.
    pub again: Vec<R::Recorded>,
    /// Where the data and the status bytes that are written to guest memory are logged, if they are.
    pub log: Option<Arc<DirtyLog>>,
    /// The ring was used before: its previous worker or daemon may have lost an interrupt.
    pub resumed: bool,
    pub shared: Arc<Shared>,
    pub kick: EventFd,
    pub call: Arc<SignalSlot>,
    pub error: Arc<SignalSlot>,
    pub metrics: Arc<Metrics>,
    pub pulse: Arc<Pulse>,
    pub poll_max: Duration,
}

/// The result of a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Exit {
    /// Where the ring goes on, in the form of `RingLayout::base`.
    pub base: u32,
    /// The ring was corrupt, or the worker itself failed: it must be set up again before it runs again.
    pub broken: bool,
    /// Everything that was done before is durable: the worker has flushed the disk as its last step. False where it was
    /// not to, or could not.
    pub flushed: bool,
    /// Nothing is in flight any more: each chain was answered, or is back in the ring.
    pub settled: bool,
}

/// How a worker is stopped. In each case it takes no more chains, finishes what the disk has, and ends; after that no
/// guest memory is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// As soon as possible. What is in the ring stays there, and a large request that is not wholly at the disk
    /// goes back into it.
    Drain,
    /// As `Drain`, at the end of the session. What waits for help, and any chain of which the disk lacks a part, stays
    /// recorded in the in-flight region, if there is one, and is not answered.
    Leave,
    /// As `Drain`; then everything is made durable.
    DrainAndFlush,
    /// First everything is served that the guest has made available by now. Then everything is made durable.
    Pause,
}

impl Stop {
    /// Whether everything is made durable at the end.
    pub(crate) fn flushes(self) -> bool {
        matches!(self, Stop::Pause | Stop::DrainAndFlush)
    }
}

const RUN: u8 = 0;
const DRAIN: u8 = 1;
const DRAIN_AND_FLUSH: u8 = 2;
const PAUSE: u8 = 3;
const LEAVE: u8 = 4;

#[derive(Debug)]
pub(crate) struct Control {
    /// RUN or one for each [`Stop`]. Stored before the notifier is used, loaded before every wait.
    command: AtomicU8,
    /// The worker's position in its ring, in the form of `RingLayout::base`, in case it dies. Relaxed: read after a join.
    base: AtomicU32,
    pub raising: RaiseMark,
}

impl Control {
    /// For a worker whose ring goes on there.
    pub(crate) fn new(base: u32) -> Self {
        Control { command: AtomicU8::new(RUN), base: AtomicU32::new(base), raising: RaiseMark::default() }
    }

    /// Stores the command to stop. The worker sees it at its next look, and has to be woken for that.
    pub(crate) fn tell(&self, stop: Stop) {
        let command = match stop {
            Stop::Drain => DRAIN,
            Stop::DrainAndFlush => DRAIN_AND_FLUSH,
            Stop::Pause => PAUSE,
            Stop::Leave => LEAVE,
        };
        self.command.store(command, Ordering::Release);
    }

    /// True once there is a command to stop.
    pub(crate) fn stopping(&self) -> bool {
        self.command.load(Ordering::Acquire) != RUN
    }

    /// The present command to stop.
    pub(crate) fn stop(&self) -> Option<Stop> {
        match self.command.load(Ordering::Acquire) {
            DRAIN => Some(Stop::Drain),
            DRAIN_AND_FLUSH => Some(Stop::DrainAndFlush),
            PAUSE => Some(Stop::Pause),
            LEAVE => Some(Stop::Leave),
            _ => None,
        }
    }

    /// The result of a worker that died.
    pub(crate) fn broken_exit(&self) -> Exit {
        Exit { base: self.base.load(Ordering::Relaxed), broken: true, flushed: false, settled: false }
    }

    /// Records the worker's position in its ring.
    pub(crate) fn note_base(&self, base: u32) {
        self.base.store(base, Ordering::Relaxed);
    }
}
