//! One thread's queue on hosts that refuse io_uring: operations go to the [`Pool`], and the wait is an epoll.
//!
//! It never releases memory that a call may still use: dropping the queue waits for every job in the pool.

use std::collections::VecDeque;
use std::marker::PhantomData;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tracing::warn;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::cached::CachedReads;
use super::notify::Wakeup;
use super::pool::{Finished, Job, Outbox, Pool};
use super::slots::{Slot, answer_at_once};
use super::{FileTable, OpenFile, SeenFiles, inline};
use crate::bounds::EVENTS;
use crate::error::{Step, StorageError};
use crate::{Completion, IoQueue, Notifier, Operation, Token};

/// One thread's queue of operations on [`HostStorage`](super::HostStorage) files.
pub struct ThreadQueue {
    files: SeenFiles,
    pool: Arc<Pool>,
    outbox: Arc<Outbox>,
    /// Pushed and not yet in the pool, oldest first.
    backlog: VecDeque<Job>,
    /// Jobs in the pool or not yet taken back, and their limit.
    in_pool: usize,
    depth: usize,
    /// Finished and not yet reaped.
    ready: Vec<Completion>,
    /// Slots for reuse.
    spare: Vec<Slot>,
    /// For operations that run at once.
    scratch: Slot,
    cached: CachedReads,
    epoll: Epoll,
    /// Edge-triggered, so that they need not be read.
    watches: Vec<EventFd>,
    heeds_signals: bool,
    /// One came while none was heeded, and no wait has ended for it yet.
    signalled: bool,
    /// Signals on `watches`.
    signals: u64,
    not_send: PhantomData<*const ()>,
}

impl ThreadQueue {
    pub(super) fn new(table: Arc<FileTable>, pool: Arc<Pool>, depth: u32) -> Result<Self, StorageError> {
        let failed = |source| StorageError::Queue { step: Step::SetUpEpoll, source };
        let wakeup = Arc::new(Wakeup::new()?);
        let epoll = Epoll::new().map_err(failed)?;
        epoll.ctl(ControlOperation::Add, wakeup.event.as_raw_fd(), interest(OWN)).map_err(failed)?;
        Ok(ThreadQueue {
            files: SeenFiles::new(table),
            pool,
            outbox: Arc::new(Outbox::new(wakeup)),
            backlog: VecDeque::new(),
            in_pool: 0,
            depth: depth.max(1) as usize,
            ready: Vec::new(),
            spare: Vec::new(),
            scratch: Slot::idle(),
            cached: CachedReads::default(),
            epoll,
            watches: Vec::new(),
            heeds_signals: true,
            signalled: false,
            signals: 0,
            not_send: PhantomData,
        })
    }

    fn take_in(&mut self, done: Vec<Finished>) {
        self.in_pool -= done.len();
        for (job, result) in done {
            let mut slot = job.slot;
            self.ready.push(slot.finish(result));
            self.spare.push(slot);
        }
    }

    fn drain(&mut self) {
        if self.in_pool > 0 {
            let done = self.outbox.take();
            self.take_in(done);
        }
    }

    /// Sleeps until any event or the timeout; without a timeout until an event.
    fn sleep(&mut self, timeout: Option<Duration>) {
        let millis = timeout
            .map_or(-1, |timeout| i32::try_from(timeout.as_micros().div_ceil(1000)).unwrap_or(i32::MAX));
        let mut events = [EpollEvent::default(); EVENTS];
        // A wait may end early, as it does when a signal interrupts it.
        let count = self.epoll.wait(millis, &mut events).unwrap_or(0);
        self.signals += events[..count].iter().filter(|event| event.data() != OWN).count() as u64;
    }
}

/// The epoll's data for the queue's own eventfd, which the notifier signals, and for the caller's.
const OWN: u64 = 0;
const FOREIGN: u64 = 1;

/// Edge-triggered: each signal is one event, and no event remains although the counter is never read.
fn interest(data: u64) -> EpollEvent {
    EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, data)
}

impl IoQueue for ThreadQueue {
    fn push(&mut self, token: Token, operation: Operation) {
        let file: &Arc<OpenFile> = self.files.get(operation.file);
        if let Some(result) = answer_at_once(&operation, file) {
            self.ready.push(Completion { token, result, parts: operation.parts });
            return;
        }
        if file.memory_backed {
            self.scratch.begin(token, operation, file);
            let result = inline::run(&mut self.scratch, file);
            self.ready.push(self.scratch.finish(result));
            return;
        }
        let mut slot = self.spare.pop().unwrap_or_else(Slot::idle);
        let cached = self.cached.tries(&operation, file);
        slot.begin(token, operation, file);
        if cached && let Some(result) = self.cached.run(&mut slot, file) {
            self.ready.push(slot.finish(result));
            self.spare.push(slot);
            return;
        }
        let (file, outbox) = (Arc::clone(file), Arc::clone(&self.outbox));
        self.backlog.push_back(Job { slot, file, outbox });
    }

    fn submit(&mut self) {
        let count = self.backlog.len().min(self.depth - self.in_pool);
        if count > 0 {
            self.in_pool += count;
            self.pool.submit(self.backlog.drain(..count));
        }
    }

    fn reap(&mut self, done: &mut Vec<Completion>) {
        self.drain();
        // The caller need not submit again for operations that it has already submitted.
        self.submit();
        done.append(&mut self.ready);
    }

    fn wait(&mut self, timeout: Option<Duration>) {
        self.submit();
        self.drain();
        let wakeup = Arc::clone(&self.outbox.wakeup);
        let signalled = self.heeds_signals && std::mem::take(&mut self.signalled);
        self.signals += u64::from(signalled);
        if timeout == Some(Duration::ZERO) || signalled || !self.ready.is_empty() {
            wakeup.end_sleep();
        } else if wakeup.begin_sleep() {
            self.sleep(timeout);
            wakeup.end_sleep();
        }
        self.drain();
    }

    fn watch(&mut self, event: EventFd) {
        match self.epoll.ctl(ControlOperation::Add, event.as_raw_fd(), interest(FOREIGN)) {
            Ok(()) => self.watches.push(event),
            Err(error) => warn!(%error, "not watched: it does not behave like an eventfd"),
        }
    }

    fn signals(&self) -> u64 {
        self.signals
    }

    /// The counters are read when signals are heeded again: otherwise each eventfd that ever was signalled would end a wait
    /// then. One that was last signalled before still does so, once.
    fn heed_signals(&mut self, heed: bool) {
        if std::mem::replace(&mut self.heeds_signals, heed) == heed {
            return;
        }
        // An error of the descriptor cannot be masked, so it must be an edge as well.
        let deaf = EpollEvent::new(EventSet::EDGE_TRIGGERED, FOREIGN);
        let wanted = if heed { interest(FOREIGN) } else { deaf };
        for event in &self.watches {
            self.signalled |= heed && inline::take_signal(event.as_raw_fd());
            // Not reached: the descriptor stays in the epoll as long as it is open.
            if let Err(error) = self.epoll.ctl(ControlOperation::Modify, event.as_raw_fd(), wanted) {
                warn!(%error, "the watch of an eventfd cannot be changed");
            }
        }
    }

    fn notifier(&self) -> Arc<dyn Notifier> {
        Arc::clone(&self.outbox.wakeup) as Arc<dyn Notifier>
    }

    fn in_flight(&self) -> usize {
        self.backlog.len() + self.in_pool + self.ready.len()
    }

    fn now(&self) -> Instant {
        Instant::now()
    }
}

impl Drop for ThreadQueue {
    /// Operations that were not handed to the pool are dropped undone.
    fn drop(&mut self) {
        while self.in_pool > 0 {
            let done = self.outbox.wait();
            self.take_in(done);
        }
    }
}
