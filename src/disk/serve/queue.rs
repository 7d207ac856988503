//! A thread's queue of requests, and the fast path. A request whose clusters are all in the chain map goes to the
//! host at once: no future, no allocation, no lock, no copy.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use engine::mutation::{Mutation, active};
use engine::{Epoch, FileIndex, Mapping, PartedCluster, ZeroMode};
use qcow2::{GuestOffset, HostOffset, SUBCLUSTERS, Subcluster};
use slab::Slab;
use smallvec::SmallVec;
use storage::guest::{GuestSlices, fill_guest_zero, guest_len, subrange_into};
use storage::{Errno, GuestSlice, IoQueue, Kind, Notifier, Operation, Part, Parts, Storage, Token};

use crate::Shared;
use crate::bounds::{FAST_RUNS, SPARE_MAX};
use crate::error::{OpenError, RequestError, is_no_space};
use crate::runtime::driver::Driver;
use crate::serve::policy::Discards;
use crate::serve::read::owned;
use crate::serve::space::Waiting;
use crate::serve::worker::Worker;
use crate::serve::zero::Tried;

/// How often a request that finds no space is tried again at once, as long as others free some.
const SPACE_TRIES: u32 = 4;

/// The caller's ID of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RequestId(pub u32);

/// A request. Offsets and lengths are in bytes, multiples of 512, and within the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Fill the slices.
    Read {
        /// Offset on the disk.
        offset: u64,
    },
    /// Write the slices.
    Write {
        /// Offset on the disk.
        offset: u64,
        /// The request completes only when durable.
        write_through: bool,
    },
    /// Make every completed request durable.
    Flush,
    /// Give space back.
    Discard {
        /// Offset on the disk.
        offset: u64,
        /// Bytes.
        length: u64,
        /// The request completes only when durable.
        write_through: bool,
    },
    /// Make a range read as zero.
    WriteZeroes {
        /// Offset on the disk.
        offset: u64,
        /// Bytes.
        length: u64,
        /// Space may be given back.
        unmap: bool,
        /// The request completes only when durable.
        write_through: bool,
    },
}

impl Request {
    fn writes(&self) -> bool {
        !matches!(self, Request::Read { .. } | Request::Flush)
    }

    /// True if the request completes only when durable.
    fn is_through(&self) -> bool {
        match self {
            Request::Read { .. } => false,
            Request::Flush => true,
            Request::Write { write_through, .. }
            | Request::Discard { write_through, .. }
            | Request::WriteZeroes { write_through, .. } => *write_through,
        }
    }
}

/// A request that is done; its memory is no longer used.
#[derive(Debug)]
pub struct Completed {
    /// The request.
    pub id: RequestId,
    /// The result.
    pub result: Result<(), RequestError>,
}

/// A run of a request's bytes that has one target.
struct Run {
    target: Target,
    length: u64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Target {
    Zero,
    Data(FileIndex, HostOffset),
}

/// A fast-path request in flight.
struct InFlight {
    id: RequestId,
    epoch: Epoch,
    /// Operations still to complete.
    pending: u32,
    result: Result<(), Errno>,
    writes: bool,
}

/// A copy of a fast-path write, to retry it if it finds no space.
#[derive(Default)]
struct Kept {
    offset: u64,
    slices: GuestSlices,
}

/// One thread's access to a disk.
pub struct DiskQueue<S: Storage> {
    worker: Rc<Worker<S>>,
    driver: Rc<Driver<S::Queue>>,
    fast: Slab<InFlight>,
    /// By slot in `fast`; empty unless requests wait for space.
    kept: Vec<Kept>,
    /// Emptied part lists of completed operations. They are retained for their capacity, for the next operation with
    /// several pieces of memory.
    spare: Vec<Parts>,
    /// The memory of a run; retained to avoid an allocation.
    part: GuestSlices,
    done: Rc<RefCell<Vec<Completed>>>,
}

impl<S: Storage> DiskQueue<S> {
    pub(crate) fn new(shared: Arc<Shared<S>>, depth: u32) -> Result<Self, OpenError> {
        let driver = Driver::new(shared.storage.queue(depth)?);
        let worker = Worker::new(shared, Rc::clone(&driver))
            .ok_or(OpenError::TooManyQueues { limit: crate::WORKERS_MAX })?;
        let done = Rc::new(RefCell::new(Vec::new()));
        let (fast, kept, spare, part) = (Slab::new(), Vec::new(), Vec::new(), GuestSlices::new());
        Ok(DiskQueue { worker, driver, fast, kept, spare, part, done })
    }

    /// Starts a request. The slices cover exactly its bytes and stay valid until it completes.
    ///
    /// # Panics
    /// If the range is not within the disk or not a multiple of 512: the caller must check.
    pub fn submit(&mut self, id: RequestId, request: Request, slices: &[GuestSlice]) {
        self.check_range(&request, slices);
        if request.writes() && (self.worker.shared.read_only || self.worker.engine().has_failed()) {
            let error = if self.worker.shared.read_only {
                engine::EngineError::ReadOnly
            } else {
                engine::EngineError::Failed
            };
            self.done.borrow_mut().push(Completed { id, result: Err(error.into()) });
            return;
        }
        let epoch = self.worker.enter();
        let fast = match request {
            Request::Read { offset } => self.fast(id, epoch, Kind::Read, offset, slices),
            Request::Write { offset, write_through: false } if !self.worker.has_zeroes(offset, slices) => {
                self.fast(id, epoch, Kind::Write, offset, slices)
            }
            Request::Discard { offset, length, write_through: false }
                if self.worker.shared.policy.discards == Discards::Unmap =>
            {
                return self.zero(id, epoch, request, (offset, length, ZeroMode::Discard));
            }
            Request::WriteZeroes { offset, length, unmap, write_through: false } => {
                let mode = self.worker.shared.policy.mode(unmap);
                return self.zero(id, epoch, request, (offset, length, mode));
            }
            _ => false,
        };
        if !fast {
            self.slow(id, epoch, request, slices);
        }
    }

    /// Zeroes a range at once, or by a task.
    fn zero(&self, id: RequestId, epoch: Epoch, request: Request, range: (u64, u64, ZeroMode)) {
        let (offset, length, mode) = range;
        match self.worker.try_zero(offset, length, mode) {
            Tried::Done => {
                self.worker.exit(epoch);
                self.done.borrow_mut().push(Completed { id, result: Ok(()) });
            }
            Tried::Not => self.slow(id, epoch, request, &[]),
            Tried::Lacks(loads) => {
                let worker = Rc::clone(&self.worker);
                self.driver.spawn(async move {
                    // The request itself asks again for a table that cannot be loaded, and then fails.
                    let _ = worker.load_tables(loads).await;
                });
                self.slow(id, epoch, request, &[]);
            }
        }
    }

    fn check_range(&self, request: &Request, slices: &[GuestSlice]) {
        let (offset, length) = match *request {
            Request::Read { offset } | Request::Write { offset, .. } => (offset, guest_len(slices) as u64),
            Request::Flush => return,
            Request::Discard { offset, length, .. } | Request::WriteZeroes { offset, length, .. } => {
                (offset, length)
            }
        };
        let end = offset.checked_add(length);
        let within = end.is_some_and(|end| end <= self.worker.engine().size());
        assert!(
            within && (offset | length).is_multiple_of(512),
            "{request:?} of {length} bytes was not checked"
        );
    }

    /// Serves a read or write from the map alone; false if it cannot.
    fn fast(&mut self, id: RequestId, epoch: Epoch, kind: Kind, offset: u64, slices: &[GuestSlice]) -> bool {
        let writes = kind == Kind::Write;
        let length = guest_len(slices) as u64;
        let Some(runs) = self.runs(offset, length, writes) else { return false };
        let shared = &self.worker.shared;
        let takes = |run: &Run| match run.target {
            Target::Zero => true,
            Target::Data(file, _) => shared.file(file).takes(slices),
        };
        if !runs.iter().all(takes) {
            return false;
        }
        let pending = runs.iter().filter(|run| run.target != Target::Zero).count() as u32;
        let slot = self.fast.insert(InFlight { id, epoch, pending, result: Ok(()), writes });
        if writes && shared.space.waits() {
            keep(&mut self.kept, slot, offset, slices);
        }
        let mut at = 0;
        for run in &runs {
            let memory = if runs.len() == 1 {
                slices
            } else {
                subrange_into(&mut self.part, slices, at as usize, run.length as usize);
                &self.part[..]
            };
            at += run.length;
            match run.target {
                Target::Zero => fill_guest_zero(memory),
                Target::Data(file, offset) => {
                    let mut operation = Operation::bare(shared.file(file).id, kind, offset.0);
                    if memory.len() > 1 {
                        operation.parts = self.spare.pop().unwrap_or_default();
                    }
                    operation.parts.extend(memory.iter().copied().map(Part::Guest));
                    self.driver.queue().push(Token(slot as u64), operation);
                }
            }
        }
        if pending == 0 {
            self.finish_fast(slot);
        }
        true
    }

    /// The targets of a range by the map, in at most [`FAST_RUNS`] runs. `None` if there are more, if the map does
    /// not know one, or if a write may not go there.
    fn runs(&self, offset: u64, length: u64, writes: bool) -> Option<SmallVec<[Run; FAST_RUNS]>> {
        let engine = self.worker.engine();
        let unit = engine.unit();
        let mut runs: SmallVec<[Run; FAST_RUNS]> = SmallVec::new();
        let (mut at, end) = (offset, offset + length);
        while at < end {
            let within = at & (unit - 1);
            let mut piece = (unit - within).min(end - at);
            let target = match engine.lookup(GuestOffset(at)) {
                Mapping::Zero if !writes => Target::Zero,
                Mapping::Data { file, offset, in_place } if in_place || !writes => {
                    Target::Data(file, HostOffset(offset.0 + within))
                }
                Mapping::Parts => {
                    let cluster = engine.lookup_parts(GuestOffset(at))?;
                    let (target, alike) = part(&cluster, unit, within, writes)?;
                    piece = piece.min(alike);
                    target
                }
                _ => return None,
            };
            at += piece;
            let full = runs.len() == FAST_RUNS;
            match runs.last_mut() {
                Some(last) if follows(last, target) => last.length += piece,
                _ if full => return None,
                _ => runs.push(Run { target, length: piece }),
            }
        }
        Some(runs)
    }

    fn finish_fast(&mut self, slot: usize) {
        let ended = self.fast.remove(slot);
        self.worker.exit(ended.epoch);
        if ended.writes
            && self.worker.shared.space.waits()
            && ended.result.is_err_and(is_no_space)
            && let Some(Kept { offset, slices }) = self.kept.get_mut(slot).map(std::mem::take)
        {
            // The location may have another owner by now: look up the whole range again.
            let request = Request::Write { offset, write_through: false };
            return self.slow(ended.id, self.worker.enter(), request, &slices);
        }
        let mut result =
            ended.result.map_err(RequestError::io(if ended.writes { "writing" } else { "reading" }));
        if ended.writes && self.worker.engine().has_failed() {
            result = result.and(Err(engine::EngineError::Failed.into()));
        }
        self.worker.failures.note(ended.id, &result, || self.driver.now());
        self.done.borrow_mut().push(Completed { id: ended.id, result });
    }

    fn slow(&self, id: RequestId, epoch: Epoch, request: Request, slices: &[GuestSlice]) {
        let (worker, done, slices) = (Rc::clone(&self.worker), Rc::clone(&self.done), owned(slices));
        self.driver.spawn(async move {
            let result = worker.serve(epoch, request, &slices).await;
            worker.failures.note(id, &result, || worker.driver.now());
            done.borrow_mut().push(Completed { id, result });
        });
    }

    /// A hint: whether the caller has more requests to submit after the next turn.
    pub fn expect_more(&mut self, more: bool) {
        self.driver.expect_more(more);
    }

    /// Sends submitted operations, runs ready tasks, and moves completed requests into `done`. Never blocks.
    pub fn turn(&mut self, done: &mut Vec<Completed>) {
        let driver = Rc::clone(&self.driver);
        driver.turn(|completion| {
            let slot = completion.token.0 as usize;
            let request = &mut self.fast[slot];
            request.pending -= 1;
            request.result = request.result.and(completion.result);
            let mut parts = completion.parts;
            if parts.spilled() && self.spare.len() < SPARE_MAX {
                parts.clear();
                self.spare.push(parts);
            }
            if request.pending == 0 {
                self.finish_fast(slot);
            }
        });
        done.append(&mut self.done.borrow_mut());
    }

    /// Sleeps until a turn may find something to do, a watched eventfd or the notifier ends the sleep, or the time is
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

    /// How many requests of this queue wait for space on the host.
    pub fn waiting(&self) -> usize {
        self.worker.waiting.get()
    }

    /// The queue is being stopped: from now on no request of it waits for space on the host, but fails.
    pub fn give_up(&mut self) {
        self.worker.leaving.set(true);
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
        self.give_up();
        let mut done = Vec::new();
        while !self.fast.is_empty() || self.driver.has_tasks() {
            self.turn(&mut done);
            done.clear();
            if !self.fast.is_empty() || self.driver.has_tasks() {
                self.driver.wait(None);
            }
        }
    }
}

/// Records a write under its slot, in memory that an earlier write has left there.
fn keep(kept: &mut Vec<Kept>, slot: usize, offset: u64, slices: &[GuestSlice]) {
    if kept.len() <= slot {
        kept.resize_with(slot + 1, Kept::default);
    }
    let place = &mut kept[slot];
    place.offset = offset;
    place.slices.clear();
    place.slices.extend_from_slice(slices);
}

/// The target of a byte in a cluster with subclusters, and for how many bytes from there it holds. `None` if it is
/// unknown, or a write may not go there.
fn part(cluster: &PartedCluster, unit: u64, within: u64, writes: bool) -> Option<(Target, u64)> {
    let size = unit / u64::from(SUBCLUSTERS);
    let index = within / size;
    let (what, run) = cluster.parts.at(index as u32);
    let target = match what {
        Subcluster::Zero if !writes => Target::Zero,
        Subcluster::Data if cluster.in_place || !writes => {
            Target::Data(cluster.file, HostOffset(cluster.offset.0 + within))
        }
        _ => return None,
    };
    Some((target, (index + u64::from(run)) * size - within))
}

fn follows(last: &Run, target: Target) -> bool {
    match (last.target, target) {
        (Target::Zero, Target::Zero) => true,
        (Target::Data(file, offset), Target::Data(next, at)) => {
            file == next && offset.0 + last.length == at.0
        }
        _ => false,
    }
}

impl<S: Storage> Worker<S> {
    /// Serves a request off the fast path. If it finds no space, it is retried after freed space was made ready. Then
    /// it is retried after each wait, if requests wait for space.
    async fn serve(&self, epoch: Epoch, request: Request, slices: &[GuestSlice]) -> Result<(), RequestError> {
        let mut result = self.carry_out(epoch, request, slices).await;
        if self.lacks_space(&request, &result) {
            result = Box::pin(self.find_space(request, slices, result)).await;
        }
        result?;
        if request.is_through() { Box::pin(self.flush_patiently()).await } else { Ok(()) }
    }

    /// Retries a request that found no space: at once whenever freed space was given back meanwhile, and after each
    /// wait, if requests wait for space.
    async fn find_space(
        &self,
        request: Request,
        slices: &[GuestSlice],
        mut result: Result<(), RequestError>,
    ) -> Result<(), RequestError> {
        let mut waiting = None;
        // At first all clusters that are held back count. Later those of failed writes do not: they would be this
        // request's own.
        let mut all = true;
        loop {
            let mut tries = 0;
            while self.lacks_space(&request, &result) && tries < SPACE_TRIES && self.make_space(all).await {
                (tries, all) = (tries + 1, false);
                result = self.carry_out(self.enter(), request, slices).await;
            }
            if !self.waits_after(&request, &result) {
                return result;
            }
            let waiting = waiting.get_or_insert_with(|| self.shared.space.begin(&self.driver));
            if !self.wait_for_space(waiting).await {
                return result;
            }
            result = self.carry_out(self.enter(), request, slices).await;
        }
    }

    /// Carries out the request, not yet durably. Where too much freed space is held back, the request gives up its
    /// claim and epoch until there is room, and then continues.
    async fn carry_out(
        &self,
        mut epoch: Epoch,
        request: Request,
        slices: &[GuestSlice],
    ) -> Result<(), RequestError> {
        let done = Cell::new(0);
        loop {
            match self.carry_on(epoch, request, slices, &done).await {
                Err(RequestError::Crowded) => Box::pin(self.relieve()).await?,
                ended => return ended,
            }
            epoch = self.enter();
        }
    }

    /// Carries out as much of the request as there is room for. The epoch ends once the request no longer uses what
    /// it looked up.
    async fn carry_on(
        &self,
        epoch: Epoch,
        request: Request,
        slices: &[GuestSlice],
        done: &Cell<u64>,
    ) -> Result<(), RequestError> {
        let result = match request {
            // Boxed: a future has the size of its largest branch, and is moved as often as it is nested.
            Request::Read { offset } => Box::pin(self.read(offset, slices)).await,
            Request::Write { offset, .. } => {
                let claim = self.claim(offset, guest_len(slices) as u64).await;
                let result = Box::pin(self.write_or_zero(offset, slices)).await;
                drop(claim);
                result
            }
            Request::Discard { offset, length, .. } => self.discard(offset, length, done).await,
            Request::WriteZeroes { offset, length, unmap, .. } => {
                self.write_zeroes(offset, length, unmap, done).await
            }
            Request::Flush => Ok(()),
        };
        self.exit(epoch);
        result
    }

    /// Flushes. If there is no space, it retries after a reclaim, and after each wait if requests wait for space.
    async fn flush_patiently(&self) -> Result<(), RequestError> {
        let mut result = self.flush().await;
        if self.lacks_space(&Request::Flush, &result) {
            // Reclaim all that needs no cut.
            while self.reclaim_some().await? {}
            result = self.flush().await;
        }
        if self.waits_after(&Request::Flush, &result) {
            let mut waiting = self.shared.space.begin(&self.driver);
            while self.waits_after(&Request::Flush, &result) && self.wait_for_space(&mut waiting).await {
                result = self.flush().await;
            }
        }
        result
    }

    /// Waits until a retry is worthwhile; false if the request must not wait any more.
    async fn wait_for_space(&self, waiting: &mut Waiting<'_, S::Queue>) -> bool {
        self.waiting.set(self.waiting.get() + 1);
        let go_on = waiting.pause(|| self.gives_up()).await;
        self.waiting.set(self.waiting.get() - 1);
        go_on
    }

    /// True if requests no longer wait for space, because their queue is being stopped.
    pub fn gives_up(&self) -> bool {
        self.leaving.get() && !active(Mutation::WaitNotGivenUp)
    }

    /// Whether a request with this result may succeed once there is space.
    fn lacks_space(&self, request: &Request, result: &Result<(), RequestError>) -> bool {
        let no_space = result.as_ref().is_err_and(RequestError::is_no_space);
        let reads = matches!(request, Request::Read { .. });
        no_space && !reads && !self.engine().has_failed()
    }

    /// Whether a request with this result is to wait for space.
    fn waits_after(&self, request: &Request, result: &Result<(), RequestError>) -> bool {
        self.shared.space.waits() && self.lacks_space(request, result)
    }
}
