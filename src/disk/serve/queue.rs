//! A thread's queue of requests: takes requests, sends each the fast or the slow way, and hands back those that are
//! done.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use block::{Request, RequestId};
use engine::{EngineError, Epoch, ZeroMode};
use storage::guest::GuestSlices;
use storage::{GuestSlice, IoQueue, Kind, Notifier, Storage};

use crate::error::OpenError;
use crate::options::Discards;
use crate::range::ByteRange;
use crate::runtime::driver::Driver;
use crate::serve::fast::FastPath;
use crate::serve::request::{Completed, range_of};
use crate::serve::worker::Worker;
use crate::serve::zero::Tried;
use crate::shared::{Shared, WORKERS_MAX};

/// One thread's access to a disk.
pub struct DiskQueue<S: Storage> {
    worker: Rc<Worker<S>>,
    driver: Rc<Driver<S::Queue>>,
    fast: FastPath<S>,
    done: Rc<RefCell<Vec<Completed>>>,
}

impl<S: Storage> DiskQueue<S> {
    pub(crate) fn new(shared: Arc<Shared<S>>, depth: u32) -> Result<Self, OpenError> {
        let driver = Driver::new(shared.storage.queue(depth)?);
        Self::on(shared, driver)
    }

    /// Starts a request. The slices cover exactly its bytes and stay valid until it completes.
    ///
    /// A range past the end of a disk that has become smaller in use fails.
    ///
    /// # Panics
    /// If the range is not within the disk as it was at its largest, or not a multiple of 512: the caller must check.
    pub fn submit(&mut self, id: RequestId, request: Request, slices: &[GuestSlice]) {
        let range = self.checked_range(&request, slices);
        if request.writes() && (self.worker.shared.read_only || self.worker.engine().has_failed()) {
            let error =
                if self.worker.shared.read_only { EngineError::ReadOnly } else { EngineError::Failed };
            return self.complete(Completed { id, result: Err(error.into()) });
        }
        let epoch = self.worker.enter();
        if let Err(error) = self.worker.check_end(range) {
            self.worker.exit(epoch);
            self.worker.failures.note(id, &Err(error.clone()), || self.worker.driver.now());
            return self.complete(Completed { id, result: Err(error) });
        }
        let started = match request {
            Request::Read { offset } => self.fast.start(id, epoch, Kind::Read, offset, slices),
            Request::Write { offset, write_through: false } if !self.worker.has_zeroes(offset, slices) => {
                self.fast.start(id, epoch, Kind::Write, offset, slices)
            }
            Request::Discard { offset, length, write_through: false }
                if self.worker.shared.policy.discards == Discards::Unmap =>
            {
                return self.zero(id, epoch, request, ByteRange::new(offset, length), ZeroMode::Discard);
            }
            Request::WriteZeroes { offset, length, unmap, write_through: false } => {
                let mode = self.worker.shared.policy.mode(unmap);
                return self.zero(id, epoch, request, ByteRange::new(offset, length), mode);
            }
            _ => false,
        };
        if !started {
            self.start_slow(id, epoch, request, slices);
        }
    }

    /// Zeroes a range at once, or by a task.
    fn zero(&self, id: RequestId, epoch: Epoch, request: Request, range: ByteRange, mode: ZeroMode) {
        match self.worker.try_zero(range, mode) {
            Tried::Done => {
                self.worker.exit(epoch);
                self.complete(Completed { id, result: Ok(()) });
            }
            Tried::Not => self.start_slow(id, epoch, request, &[]),
            Tried::Lacks(loads) => {
                let worker = Rc::clone(&self.worker);
                self.driver.spawn(async move {
                    // The request itself asks again for a table that cannot be loaded, and then fails.
                    let _ = worker.load_tables(loads).await;
                });
                self.start_slow(id, epoch, request, &[]);
            }
        }
    }

    /// The range of a request, which the caller has checked against a size of the disk.
    fn checked_range(&self, request: &Request, slices: &[GuestSlice]) -> Option<ByteRange> {
        let range = range_of(request, slices)?;
        let ByteRange { offset, length } = range;
        let end = offset.checked_add(length);
        let within = end.is_some_and(|end| end <= self.worker.engine().size());
        assert!(
            within && (offset | length).is_multiple_of(512),
            "{request:?} of {length} bytes was not checked"
        );
        Some(range)
    }

    fn complete(&self, completed: Completed) {
        self.done.borrow_mut().push(completed);
    }

    /// Serves a request by a task of its own.
    fn start_slow(&self, id: RequestId, epoch: Epoch, request: Request, slices: &[GuestSlice]) {
        let (worker, done) = (Rc::clone(&self.worker), Rc::clone(&self.done));
        // A copy that outlives the call of `submit`.
        let slices: GuestSlices = slices.iter().copied().collect();
        let work = worker.count_work(&request, &slices);
        self.driver.spawn(async move {
            let result = worker.serve(epoch, request, &slices, work).await;
            worker.failures.note(id, &result, || worker.driver.now());
            done.borrow_mut().push(Completed { id, result });
        });
    }

    /// How often this queue's tasks were polled since the beginning. Requests of the fast path have none. A measure of
    /// work for tests.
    pub fn polls(&self) -> u64 {
        self.driver.polls()
    }

    /// Lets the disk go, so that it can be changed while nobody has it. The queue itself if requests or tasks of it are still
    /// under way.
    ///
    /// # Errors
    /// The queue as it was.
    pub fn park(self) -> Result<ParkedQueue<S>, Box<Self>> {
        let is_idle = self.fast.is_idle() && !self.driver.has_tasks() && self.done.borrow().is_empty();
        if is_idle { Ok(ParkedQueue { driver: Rc::clone(&self.driver) }) } else { Err(Box::new(self)) }
    }

    fn on(shared: Arc<Shared<S>>, driver: Rc<Driver<S::Queue>>) -> Result<Self, OpenError> {
        let worker =
            Worker::new(shared, Rc::clone(&driver)).ok_or(OpenError::TooManyQueues { limit: WORKERS_MAX })?;
        let done = Rc::default();
        let fast = FastPath::new(Rc::clone(&worker), Rc::clone(&done));
        Ok(DiskQueue { worker, driver, fast, done })
    }

    /// A hint: whether the caller has more requests to submit after the next poll.
    pub fn expect_more(&mut self, more: bool) {
        self.driver.expect_more(more);
    }

    /// Sends submitted operations, runs ready tasks, and moves completed requests into `done`. Never blocks.
    pub fn poll(&mut self, done: &mut Vec<Completed>) {
        let driver = Rc::clone(&self.driver);
        driver.poll(|completion| {
            if let Some(write) = self.fast.complete(completion) {
                let request = Request::Write { offset: write.offset, write_through: false };
                self.start_slow(write.id, self.worker.enter(), request, &write.slices);
            }
        });
        done.append(&mut self.done.borrow_mut());
    }

    /// Sleeps until a poll may find something to do, a watched eventfd or the notifier ends the sleep, or the time is
    /// over.
    pub fn wait(&mut self, timeout: Option<Duration>) {
        if self.done.borrow().is_empty() {
            self.driver.wait(timeout);
        }
    }

    /// From now on a signal on `event` ends [`DiskQueue::wait`].
    pub fn watch(&mut self, event: vmm_sys_util::eventfd::EventFd) {
        self.driver.queue().watch(event);
    }

    /// Signals on watched eventfds that this queue has met so far.
    pub fn signals(&self) -> u64 {
        self.driver.queue().signals()
    }

    /// A hint: whether signals on watched eventfds are to end waits, as [`IoQueue::heed_signals`].
    pub fn heed_signals(&mut self, heed: bool) {
        self.driver.queue().heed_signals(heed);
    }

    /// Whether one more request may be submitted. False while the requests in flight may be so much work that a drain would
    /// take long. Then this queue has some of them, and the end of one of its own changes that. A hint: more may be
    /// submitted all the same.
    pub fn has_room(&self) -> bool {
        self.worker.work.has_room()
    }

    /// How many requests of this queue wait for space on the host.
    pub fn waiting(&self) -> usize {
        self.worker.waiting.get()
    }

    /// The queue is being stopped: from now on no request of it waits for space on the host, but fails.
    pub fn stop_waiting(&mut self) {
        self.worker.stop_waiting.set(true);
        self.worker.shared.space.wake();
    }

    /// Ends [`DiskQueue::wait`] from any thread.
    pub fn notifier(&self) -> Arc<dyn Notifier> {
        self.driver.notifier()
    }
}

impl<S: Storage> Drop for DiskQueue<S> {
    /// Waits until every request has ended and no guest memory is in use. Requests are never cancelled, but those
    /// that wait for space fail.
    fn drop(&mut self) {
        if std::thread::panicking() {
            // Requests of this queue may wait for what the one that panicked has left undone.
            self.worker.engine().fail();
        }
        self.stop_waiting();
        let mut done = Vec::new();
        while !self.fast.is_idle() || self.driver.has_tasks() {
            self.poll(&mut done);
            done.clear();
            if !self.fast.is_idle() || self.driver.has_tasks() {
                self.driver.wait(None);
            }
        }
    }
}

/// A queue that has let its disk go. It keeps its thread's means of I/O and what it watches.
pub struct ParkedQueue<S: Storage> {
    driver: Rc<Driver<S::Queue>>,
}

impl<S: Storage> ParkedQueue<S> {
    pub(crate) fn resume(self, shared: Arc<Shared<S>>) -> Result<DiskQueue<S>, OpenError> {
        DiskQueue::on(shared, self.driver)
    }

    /// As [`DiskQueue::wait`].
    pub fn wait(&mut self, timeout: Option<Duration>) {
        self.driver.wait(timeout);
    }

    /// As [`DiskQueue::watch`].
    pub fn watch(&mut self, event: vmm_sys_util::eventfd::EventFd) {
        self.driver.queue().watch(event);
    }

    /// As [`DiskQueue::signals`].
    pub fn signals(&self) -> u64 {
        self.driver.queue().signals()
    }

    /// As [`DiskQueue::heed_signals`].
    pub fn heed_signals(&mut self, heed: bool) {
        self.driver.queue().heed_signals(heed);
    }

    /// As [`DiskQueue::notifier`].
    pub fn notifier(&self) -> Arc<dyn Notifier> {
        self.driver.notifier()
    }
}
