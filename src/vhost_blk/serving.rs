//! The work of a queue's thread: takes chains from the ring, submits requests to the disk, and hands back completed
//! chains.
//!
//! Owns the ring, the disk's queue and the slots while it runs. Between two looks for a stop it gives the disk a
//! bounded number of bytes (`bounds`). So a stop has a bounded number of bytes to drain.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use block::{Completed, Request};
use tracing::{debug, info, warn};

use crate::bounds::PORTION_MOST;
use crate::control::{Control, Exit, Shared, Stop, WorkerSetup};
use crate::device::{BlockDevice, BlockQueue, GuestSlice};
use crate::dirty_log::ChainLog;
use crate::error::RingError;
use crate::fd::{SignalSlot, SignalView};
use crate::in_flight::{End, InFlight, Pending};
use crate::memory::GuestMemory;
use crate::metrics::QueueMetrics;
use crate::pace::Pace;
use crate::pieces::Cutter;
use crate::poll::PollBudget;
use crate::portion::Portion;
use crate::pulse::Beat;
use crate::request::{Checker, Parsed, Status, write_status};
use crate::ring::{Chain, Used};
use crate::virtqueue::{Tracker, Virtqueue};

/// The result of a batch.
struct Step {
    /// Chains that were taken.
    taken: u16,
    /// False if nothing more can be done until an event.
    progress: bool,
}

/// A worker on its own thread. Fields drop in their order here: the queue before the memory.
pub(crate) struct Running<'a, Q: BlockQueue, R: Virtqueue> {
    queue: Q,
    index: u16,
    ring: R,
    tracker: Option<R::Tracker>,
    /// Chains of the last worker that the disk does not have again yet.
    again: VecDeque<R::Recorded>,
    /// Some of them were begun and stay recorded as in flight.
    leaves_some: bool,
    in_flight: InFlight,
    /// While guest memory is logged: what the chains in flight may write.
    chain_log: Option<ChainLog>,
    checker: Checker,
    chain: Chain,
    /// Completed chains that are not yet handed back.
    used: Vec<Used>,
    done: Vec<Completed<Q::Error>>,
    /// The memory of a piece; retained to avoid an allocation.
    slices: Vec<GuestSlice>,
    control: &'a Control,
    call: SignalView,
    error: Arc<SignalSlot>,
    metrics: &'a QueueMetrics,
    /// A step is what happens between two looks at the command.
    beat: &'a Beat,
    portion: Portion,
    /// Chains of the current portion that are done.
    at_once: usize,
    /// One budget for waits with nothing in flight, which the guest ends, and one for waits with requests in flight,
    /// which the host ends too. They are independent: a disk may be slow and its guest quick.
    poll: [PollBudget; 2],
    pace: Pace,
    seen: u32,
    memory: Arc<GuestMemory>,
    /// Older memory that requests in flight may still use.
    retired: Vec<Arc<GuestMemory>>,
    shared: Arc<Shared>,
    /// The ring was used before, so the guest may wait for an interrupt.
    resumed: bool,
    /// The ring was found corrupt.
    corrupt: bool,
}

impl<'a, Q: BlockQueue, R: Virtqueue> Running<'a, Q, R> {
    /// A worker that has not looked at its ring yet.
    pub(crate) fn new<D: BlockDevice<Queue = Q>>(
        mut queue: Q,
        setup: WorkerSetup<D, R>,
        control: &'a Control,
        (metrics, beat): (&'a QueueMetrics, &'a Beat),
    ) -> Self {
        queue.watch(setup.kick);
        let profile = setup.device.profile();
        // Before the memory is read: it may change at any moment.
        let seen = setup.shared.changes();
        Running {
            queue,
            index: setup.index,
            ring: setup.ring,
            tracker: setup.tracker,
            again: setup.again.into(),
            leaves_some: false,
            chain_log: setup.log.map(|log| ChainLog::new(log, setup.ring_size)),
            in_flight: InFlight::new(setup.ring_size, Cutter::new(&profile)),
            checker: Checker::new(profile),
            chain: Chain::default(),
            used: Vec::with_capacity(usize::from(PORTION_MOST)),
            done: Vec::with_capacity(usize::from(PORTION_MOST)),
            slices: Vec::new(),
            control,
            call: SignalView::new(setup.call),
            error: setup.error,
            metrics,
            beat,
            portion: Portion::new(),
            at_once: 0,
            poll: [PollBudget::new(setup.poll_max), PollBudget::new(setup.poll_max)],
            pace: Pace::default(),
            seen,
            memory: setup.shared.memory(),
            retired: Vec::new(),
            shared: setup.shared,
            resumed: setup.resumed,
            corrupt: false,
        }
    }

    /// Serves the ring until a stop.
    pub(crate) fn run(mut self) -> Exit {
        if self.resumed {
            self.raise_call();
        }
        let served = self.serve_again().and_then(|()| self.serve()).and_then(|()| self.serve_available());
        if let Err(error) = served {
            self.report(error);
            self.corrupt = true;
        }
        let lost = self.drain();
        // A ring that is corrupt ends by itself. The stop that comes later finds nobody who could flush.
        let flushed = self.control.stop().is_none_or(Stop::flushes) && self.flush();
        let base = self.ring.base();
        let broken = self.corrupt || lost;
        debug!(queue = self.index, base, broken, "queue stopped");
        // The record stays in a broken ring, and where chains of an earlier worker were not done again. Else nothing is
        // in flight now but chains that are back in the ring.
        let settled = !broken && !self.leaves_some && self.again.is_empty();
        if let (true, Some(tracker)) = (settled, self.tracker.take()) {
            tracker.close();
        }
        Exit { base, broken, flushed, settled }
    }

    /// Gives the disk what the last worker had in flight, before anything new. These chains cannot go back into the ring,
    /// as their places there may be in use again. So a pause waits for them; any other stop leaves them to the next
    /// worker, as the guest may have made them large. So does a pause while the disk itself is paused.
    fn serve_again(&mut self) -> Result<(), RingError> {
        while !self.again.is_empty() || (self.in_flight.has_rest() && self.queue.waiting() == 0) {
            self.beat.step();
            match self.control.stop() {
                None => {}
                Some(Stop::Pause) if !self.queue.is_paused() => self.settle(),
                Some(_) => return Ok(()),
            }
            // At most as many as the ring has descriptors.
            if !self.advance(self.again.len() as u16)?.progress {
                self.wait(None);
            }
        }
        Ok(())
    }

    /// Serves the ring until a stop, or until the ring is found corrupt.
    fn serve(&mut self) -> Result<(), RingError> {
        self.ring.disable_kicks()?;
        while !self.control.stopping() {
            self.beat.step();
            if let Some(left) = self.shared.held() {
                // Another ring is being stopped.
                if !self.finish()? {
                    self.wait(Some(left));
                }
                continue;
            }
            let waiting = self.ring.available()?;
            if !self.advance(waiting)?.progress {
                self.idle()?;
            }
        }
        Ok(())
    }

    /// Before a pause: serves what the guest has made available by now. What it adds meanwhile cannot prolong that. While
    /// the disk itself is paused, all of it stays in the ring.
    fn serve_available(&mut self) -> Result<(), RingError> {
        self.settle();
        let mut left = if self.control.stop() == Some(Stop::Pause) { self.ring.available()? } else { 0 };
        while self.control.stop() == Some(Stop::Pause) && (left > 0 || self.in_flight.has_rest()) {
            if self.queue.is_paused() {
                info!(
                    queue = self.index,
                    "the disk is paused: what the guest has requested stays in the ring"
                );
                break;
            }
            self.beat.step();
            let step = self.advance(left)?;
            left -= step.taken;
            if !step.progress {
                self.wait(None);
            }
        }
        Ok(())
    }

    /// Sleeps until an event or the timeout.
    fn wait(&mut self, timeout: Option<Duration>) {
        self.beat.rest();
        self.queue.wait(timeout);
        self.beat.step();
    }

    /// The ring is being stopped. From now on no request waits for help, and no kick ends a wait.
    fn settle(&mut self) {
        self.queue.stop_waiting();
        self.queue.heed_kicks(false);
    }

    /// One batch: takes some of `waiting` chains if there is room, lets the disk work, and hands back what is done.
    fn advance(&mut self, waiting: u16) -> Result<Step, RingError> {
        if waiting == 0 || !self.has_room() {
            let progress = self.finish()?;
            // The disk may have made room in that very poll, and what it has told by that comes only once.
            return Ok(Step { taken: 0, progress: progress || (waiting > 0 && self.has_room()) });
        }
        let began = Instant::now();
        let chains = waiting.min(self.portion.get());
        self.queue.expect_more(waiting > chains);
        self.in_flight.begin_portion();
        let taken = self.take(chains)?;
        self.at_once = self.used.len();
        self.finish()?;
        self.portion.over(taken, self.at_once, began.elapsed());
        Ok(Step { taken, progress: true })
    }

    /// Whether one more chain may be taken.
    fn has_room(&self) -> bool {
        self.in_flight.has_room(self.queue.waiting() > 0) && self.queue.has_room()
    }

    /// Takes at most so many chains, which are there, and gives them to the disk. What needs no disk is answered. Returns
    /// how many it took, at least one: fewer if they are large.
    fn take(&mut self, chains: u16) -> Result<u16, RingError> {
        self.pace.chain();
        // After the available index was loaded: a chain may be in memory that was added before it was made available.
        self.refresh_memory();
        let write_through = self.shared.write_through();
        let mut taken = 0;
        while taken < chains && (taken == 0 || self.has_room()) {
            let sequence = self.next_chain()?;
            self.start(sequence, write_through);
            taken += 1;
        }
        self.control.note_base(self.ring.base());
        Ok(taken)
    }

    /// Makes the next chain the current one: first those that are to be done again. Returns its place in the order of the
    /// chains that were taken, if it is known.
    fn next_chain(&mut self) -> Result<Option<u16>, RingError> {
        if let Some(recorded) = self.again.pop_front() {
            self.ring.take_again(&recorded, &self.memory, &mut self.chain)?;
            return Ok(None);
        }
        let sequence = self.ring.sequence();
        self.ring.pop(&self.memory, &mut self.chain)?;
        if let Some(tracker) = &mut self.tracker {
            self.ring.record(tracker, self.chain.head);
        }
        Ok(Some(sequence))
    }

    /// Starts the current chain.
    fn start(&mut self, sequence: Option<u16>, write_through: bool) {
        let head = self.chain.head;
        let submission = match self.checker.parse(&mut self.chain, write_through) {
            Parsed::NoStatus => {
                self.metrics.malformed();
                self.used.push(Used { head, written: 0 });
                return;
            }
            Parsed::Answer(answer) => {
                self.log_writes(u64::from(answer.written.saturating_sub(1)));
                write_status(&answer.status_byte, answer.status);
                self.metrics.request(answer.kind, answer.status, 0);
                self.used.push(Used { head, written: answer.written });
                return;
            }
            Parsed::Submit(submission) => submission,
        };
        let reads = matches!(submission.requests.first(), Some(Request::Read { .. }));
        self.log_writes(if reads { u64::from(submission.bytes) } else { 0 });
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
        if let Some((id, request)) = self.in_flight.add(head, sequence, submission, data) {
            self.queue.submit(id, request, data);
        }
    }

    /// Notes for the log that the first bytes of the current chain's writable part will be written, and its status. A
    /// guest can claim far more of both, and the marks for that would take long.
    fn log_writes(&mut self, bytes: u64) {
        if let Some(log) = &mut self.chain_log {
            log.begin(self.chain.head, self.ring.writable(bytes));
        }
    }

    /// Lets the disk work, and hands back completed chains with at most one interrupt. False if nothing more can be
    /// done until an event.
    fn finish(&mut self) -> Result<bool, RingError> {
        let waits = self.queue.waiting() > 0;
        while self.queue.has_room()
            && let Some((id, request)) = self.in_flight.next_piece(waits, &mut self.slices)
        {
            self.queue.submit(id, request, &self.slices);
        }
        self.queue.poll(&mut self.done);
        self.in_flight.end_batch();
        let mut done = std::mem::take(&mut self.done);
        let leaves = self.leaves();
        for done in done.drain(..) {
            let is_left = |error: &Q::Error| leaves && self.queue.was_given_up(error);
            if let Some(pending) = self.in_flight.finish(done, is_left) {
                self.at_once += usize::from(self.in_flight.is_of_portion(&pending));
                self.conclude(&pending);
            }
        }
        self.done = done;
        if self.used.is_empty() {
            return Ok(self.queue.has_room() && self.in_flight.may_submit(self.queue.waiting() > 0));
        }
        let pushed = self.hand_back();
        self.used.clear();
        pushed?;
        if self.ring.needs_notification()? {
            self.raise_call();
            self.metrics.interrupt();
        }
        if self.in_flight.is_empty() {
            self.retired.clear();
        }
        Ok(true)
    }

    /// Signals the guest. A descriptor that blocks is a wait for the frontend, so it is no step.
    fn raise_call(&mut self) {
        let in_step = self.beat.pause();
        self.call.raise(&self.control.raising);
        if in_step {
            self.beat.step();
        }
    }

    /// Hands completed chains back. The order of the records: docs/concurrency.md, "The in-flight region".
    fn hand_back(&mut self) -> Result<(), RingError> {
        let heads = || self.used.iter().map(|used| used.head);
        if let Some(log) = &mut self.chain_log {
            heads().for_each(|head| log.end(head));
        }
        let Some(tracker) = &mut self.tracker else { return self.ring.push_used(&self.used) };
        tracker.list(heads());
        self.ring.push_used(&self.used)?;
        self.ring.clear(tracker, heads());
        Ok(())
    }

    /// Whether requests that no longer wait for help stay recorded in the in-flight region, for the next worker: the session
    /// ends, or the server stops and the session is about to end. The frontend of any other stop needs their answers.
    fn leaves(&self) -> bool {
        self.tracker.is_some() && !self.corrupt && matches!(self.control.stop(), None | Some(Stop::Leave))
    }

    /// Answers a chain of which the disk has nothing any more, or puts it back.
    fn conclude(&mut self, pending: &Pending) {
        if let (End::PutBack | End::Leave, Some(log)) = (&pending.end, &mut self.chain_log) {
            log.end(pending.head);
        }
        match pending.end {
            End::Answer => {}
            End::PutBack => {
                self.ring.put_back(pending.head);
                if let Some(tracker) = &mut self.tracker {
                    tracker.put_back(pending.head);
                }
                return;
            }
            End::Leave => {
                self.leaves_some = true;
                return;
            }
        }
        write_status(&pending.status_byte, pending.status);
        self.metrics.request(pending.kind, pending.status, pending.bytes);
        let written = if pending.status == Status::Ok { pending.written } else { 1 };
        self.used.push(Used { head: pending.head, written });
    }

    /// Nothing to do: polls for a while, then sleeps until the guest kicks, the disk has something, or the session
    /// notifies.
    fn idle(&mut self) -> Result<(), RingError> {
        let began = Instant::now();
        let kind = usize::from(!self.in_flight.is_empty());
        // With several requests in flight, poll for a shorter time. A completion that waits briefly costs nothing,
        // because the host is still busy with the others.
        let budget = self.poll[kind].get() / self.in_flight.len().max(1) as u32;
        let mut round = 0;
        while !self.pace.is_slow() && !budget.is_zero() && began.elapsed() < budget {
            relax(&mut round);
            let found = self.has_chain()? || (!self.in_flight.is_empty() && self.finish()?);
            if found {
                self.poll[kind].found(began.elapsed());
            }
            if found || self.control.stopping() {
                return Ok(());
            }
        }
        // Without room for a chain, only a completion helps, and no kick is asked for.
        let missed = self.has_room() && self.ring.enable_kicks()?;
        if !missed && !self.control.stopping() {
            let paced = self.sleep()?;
            if !paced {
                self.poll[kind].slept(began.elapsed());
            }
        }
        self.ring.disable_kicks()
    }

    /// Whether there is a chain that may be taken.
    fn has_chain(&mut self) -> Result<bool, RingError> {
        Ok(self.has_room() && self.ring.available()? > 0)
    }

    /// Sleeps until an event. True if that was no sleep to learn from: kicks come for nothing.
    fn sleep(&mut self) -> Result<bool, RingError> {
        self.metrics.sleep();
        let pause = self.pace.pause();
        let kicks = self.queue.kicks();
        if pause.is_some() {
            self.queue.heed_kicks(false);
            self.wait(pause);
            self.queue.heed_kicks(true);
        } else {
            self.wait(None);
        }
        if self.pace.is_fresh() && !self.ring.was_used() {
            self.look_for_guest()?;
        }
        let kicked = self.queue.kicks() != kicks;
        if pause.is_none() && (kicked || self.in_flight.is_empty()) && !self.has_chain()? {
            self.pace.vain();
        }
        Ok(self.pace.is_slow())
    }

    /// The first sleep of a never used ring has ended, so most likely the guest kicked. If no chain is available and
    /// the memory was never written, the guest uses other memory.
    #[cold]
    fn look_for_guest(&mut self) -> Result<(), RingError> {
        if !self.control.stopping() && self.ring.available()? == 0 && self.memory.is_untouched() {
            self.shared.tell_unshared(self.index);
        }
        Ok(())
    }

    fn refresh_memory(&mut self) {
        let changes = self.shared.changes();
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
    /// but the disk is drained all the same. Requests that wait for help fail, and the disk gets no further piece of a
    /// large request (docs/concurrency.md, "Stopping a ring").
    fn drain(&mut self) -> bool {
        self.settle();
        let unbegun = self.in_flight.let_rests_go(self.ring.sequence(), self.leaves());
        let mut lost = false;
        loop {
            let progress = self.finish_or_lose(&mut lost);
            if self.in_flight.is_empty() {
                break;
            }
            if !progress {
                self.wait(None);
            }
        }
        if !unbegun.is_empty() {
            unbegun.iter().for_each(|pending| self.conclude(pending));
            self.finish_or_lose(&mut lost);
        }
        // The next user of the ring should find kicks enabled. It checks the ring first anyway.
        let _ = self.ring.enable_kicks();
        lost
    }

    /// As [`Running::finish`], for a ring that may be lost.
    fn finish_or_lose(&mut self, lost: &mut bool) -> bool {
        self.finish().unwrap_or_else(|error| {
            *lost = true;
            self.used.clear();
            self.report(error);
            true
        })
    }

    /// Makes all writes durable; false if that failed. The guest did not request this flush, so the frontend has to learn of
    /// a failure. The disk itself refuses later requests.
    fn flush(&mut self) -> bool {
        let mut durable = true;
        let id = self.in_flight.add_closing();
        self.queue.submit(id, Request::Flush, &[]);
        while !self.in_flight.is_empty() {
            self.queue.poll(&mut self.done);
            for done in self.done.drain(..) {
                if done.result.is_err() {
                    durable = false;
                }
                self.in_flight.finish(done, |_| false);
            }
            if !self.in_flight.is_empty() {
                self.wait(None);
            }
        }
        if !durable && self.shared.lines.flushes.admits(Instant::now()) {
            warn!(queue = self.index, "the flush of a stopping queue failed");
        }
        durable
    }

    fn report(&self, error: RingError) {
        if self.shared.lines.corrupt.admits(Instant::now()) {
            warn!(queue = self.index, %error, "the ring is corrupt; the queue is stopped");
        }
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
