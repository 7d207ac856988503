//! One thread's io_uring: submitting, reaping, sleeping, and watching eventfds.
//!
//! [`slots`](super::slots) decides which calls an operation makes and what their results mean; this file only carries
//! them. It never releases memory that the kernel may still use: dropping the queue waits for every call in flight.
//!
//! The ring never holds more operations than its completion queue has room for, so that it cannot overflow. Further
//! ones wait here in order of arrival.

use std::collections::VecDeque;
use std::io;
use std::marker::PhantomData;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use io_uring::types::{SubmitArgs, Timespec};
use io_uring::{EnterFlags, IoUring, opcode, squeue};
use tracing::debug;
use vmm_sys_util::eventfd::EventFd;

use super::notify::Wakeup;
use super::ring::{self, Abilities, FLAVOURS, Flavour, WAIT_MAX, entry_of, is_passing, poll_ring};
use super::slots::{Slot, Slots, Verdict, answer_at_once};
use super::watch::{
    TAG_CANCEL, TAG_OPERATION, TAG_WATCH_POLL, TAG_WATCH_READ, Watch, WatchedEvent, user_data,
};
use super::{FileTable, SeenFiles, inline};
use crate::bounds::{OFFLOADED_BYTES_MIN, OFFLOADED_MAX, RING_DEPTH_MAX as DEPTH_MAX};
use crate::error::StorageError;
use crate::{Completion, Errno, IoQueue, Kind, Notifier, Operation, Token};

/// Ring entries in addition to those of operations: reads of watched eventfds, and cancellations.
const CONTROL_ENTRIES: u32 = 32;

/// One thread's queue of operations on [`HostStorage`](super::HostStorage) files. It cannot leave its thread: the
/// kernel accepts only the thread that created the ring.
pub struct UringQueue {
    ring: IoUring,
    state: State,
    abilities: Abilities,
    /// For operations that run at once.
    scratch: Slot,
    not_send: PhantomData<*const ()>,
}

/// Everything but the ring itself, so that completions can be taken while the ring is borrowed.
struct State {
    files: SeenFiles,
    slots: Slots,
    /// Operations that wait for room in the ring, oldest first.
    backlog: VecDeque<u32>,
    /// Operations whose next call is due; they are counted in `in_kernel`.
    due: VecDeque<u32>,
    /// Operations in the kernel or in the submission queue.
    in_kernel: u32,
    /// The caller's limit of `in_kernel`, and the room of the completion queue.
    depth: u32,
    completion_entries: u32,
    watches: Vec<Watch>,
    /// Watches to be armed.
    unarmed: Vec<u32>,
    /// Watches of the caller's eventfds that are to be armed once signals are heeded again.
    unheeded: Vec<u32>,
    heeds_signals: bool,
    /// Signals on the caller's eventfds.
    signals: u64,
    /// Watch and cancel entries in the kernel or in the submission queue.
    controls: u32,
    /// Finished and not yet reaped.
    ready: Vec<Completion>,
    /// The queue's own eventfd was signalled since the last wait ended.
    woken: bool,
    /// One of the caller's was, since the last wait that heeded signals ended.
    signalled: bool,
    /// The queue is being dropped and starts no calls.
    closing: bool,
    wakeup: Arc<Wakeup>,
}

impl UringQueue {
    pub(super) fn new(table: Arc<FileTable>, depth: u32) -> Result<Self, StorageError> {
        Self::with_flavours(table, depth, &FLAVOURS)
    }

    pub(super) fn with_flavours(
        table: Arc<FileTable>,
        depth: u32,
        wanted: &[Flavour],
    ) -> Result<Self, StorageError> {
        let depth = depth.clamp(1, DEPTH_MAX);
        let ring = ring::set_up(depth + CONTROL_ENTRIES, wanted)?;
        let abilities = Abilities::ask(&ring)?;
        let wakeup = Arc::new(Wakeup::new()?);
        debug!(depth, entries = ring.params().sq_entries(), ?abilities, "io_uring set up");
        let mut state = State {
            files: SeenFiles::new(table),
            slots: Slots::default(),
            backlog: VecDeque::new(),
            due: VecDeque::new(),
            in_kernel: 0,
            depth,
            completion_entries: ring.params().cq_entries(),
            watches: Vec::new(),
            unarmed: Vec::new(),
            unheeded: Vec::new(),
            heeds_signals: true,
            signals: 0,
            controls: 0,
            ready: Vec::new(),
            woken: false,
            signalled: false,
            closing: false,
            wakeup: Arc::clone(&wakeup),
        };
        state.add_watch(WatchedEvent::Own(wakeup));
        Ok(UringQueue { ring, state, abilities, scratch: Slot::idle(), not_send: PhantomData })
    }

    #[cfg(test)]
    pub(super) fn set_truncate_ability(&mut self, able: bool) {
        self.abilities.truncate = able;
    }

    #[cfg(test)]
    pub(super) fn set_timed_wait_ability(&mut self, able: bool) {
        self.abilities.timed_wait = able;
    }

    /// Makes all watches behave as on a kernel whose reads of non-blocking eventfds do not wait.
    #[cfg(test)]
    pub(super) fn poll_watches_first(&mut self) {
        for watch in &mut self.state.watches {
            watch.poll_first = true;
        }
    }

    /// Moves due entries into the submission queue, as far as there is room.
    fn feed(&mut self) {
        self.state.feed(&mut self.ring.submission());
    }

    /// Hands the submission queue to the kernel, which also runs the work it deferred to this thread.
    fn enter(&mut self, flags: EnterFlags) -> io::Result<usize> {
        let to_submit = self.ring.submission().len() as u32;
        // SAFETY: no argument is passed. The memory that entries point to belongs to slots, watches or statics, which
        // live until their completions are taken.
        unsafe { self.ring.submitter().enter::<libc::sigset_t>(to_submit, 0, flags.bits(), None) }
    }

    /// Takes all visible completions.
    fn drain(&mut self) {
        let UringQueue { ring, state, .. } = self;
        for entry in ring.completion() {
            state.complete(entry.user_data(), entry.result());
        }
    }

    /// True if the kernel has deferred completions until this thread enters it.
    fn has_deferred(&mut self) -> bool {
        let queue = self.ring.submission();
        queue.taskrun() || queue.cq_overflow()
    }

    fn submit_all(&mut self) {
        loop {
            self.feed();
            let deferred = self.has_deferred();
            if self.ring.submission().is_empty() && !deferred {
                return;
            }
            let flags = if deferred { EnterFlags::GETEVENTS } else { EnterFlags::empty() };
            match self.enter(flags) {
                // Entries found no room before; now there is some.
                Ok(taken) if taken > 0 && self.state.has_due() => {}
                Ok(_) => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // No memory, or no room for completions: entries that were not taken stay queued for the next call.
                Err(error) if is_passing(&error) => return,
                Err(error) => panic!("io_uring_enter failed, which no state of the host explains: {error}"),
            }
        }
    }

    /// Submits and sleeps until one completion arrives.
    fn sleep(&mut self, timeout: Option<Duration>) {
        self.feed();
        if self.state.has_due() {
            self.submit_all();
        }
        let outcome = match timeout {
            None => self.ring.submit_and_wait(1),
            Some(timeout) if self.abilities.timed_wait => {
                let timespec = Timespec::from(timeout.min(WAIT_MAX));
                self.ring.submitter().submit_with_args(1, &SubmitArgs::new().timespec(&timespec))
            }
            Some(timeout) => self.ring.submit().inspect(|_| poll_ring(self.ring.as_raw_fd(), timeout)),
        };
        match outcome {
            Ok(_) => {}
            Err(error) if error.raw_os_error() == Some(libc::ETIME) || is_passing(&error) => {}
            Err(error) => panic!("io_uring_enter failed, which no state of the host explains: {error}"),
        }
    }
}

impl UringQueue {
    /// Waits. True if only a signal that is not heeded ended the sleep: its watch had been armed before. The watch is armed
    /// again when signals are heeded, so that happens once for each.
    fn wait_once(&mut self, timeout: Option<Duration>) -> bool {
        self.drain();
        let woken = self.state.woken || (self.state.signalled && self.state.heeds_signals);
        let at_once = timeout == Some(Duration::ZERO) || woken || !self.state.ready.is_empty();
        let before = self.state.signals;
        let mut may_sleep_on = false;
        if at_once {
            self.submit_all();
            self.state.wakeup.end_sleep();
        } else if self.state.wakeup.begin_sleep() {
            self.sleep(timeout);
            may_sleep_on = !self.state.wakeup.end_sleep();
        } else {
            self.submit_all();
        }
        self.drain();
        let State { heeds_signals, signals, woken, ready, .. } = &self.state;
        may_sleep_on && !heeds_signals && *signals != before && !woken && ready.is_empty()
    }
}

impl IoQueue for UringQueue {
    fn push(&mut self, token: Token, operation: Operation) {
        let file = self.state.files.get(operation.file);
        if let Some(result) = answer_at_once(&operation, file) {
            self.state.ready.push(Completion { token, result, parts: operation.parts });
            return;
        }
        let offload = operation.offload
            && self.state.slots.len() < OFFLOADED_MAX
            && operation.parts_len() >= OFFLOADED_BYTES_MIN;
        if (file.memory_backed && !offload) || (operation.kind == Kind::SetLength && !self.abilities.truncate)
        {
            self.scratch.begin(token, operation, file);
            let result = inline::run(&mut self.scratch, file);
            self.state.ready.push(self.scratch.finish(result));
            return;
        }
        let index = self.state.slots.insert(token, operation, file);
        self.state.backlog.push_back(index);
        self.feed();
    }

    fn submit(&mut self) {
        self.submit_all();
    }

    fn reap(&mut self, done: &mut Vec<Completion>) {
        self.drain();
        if self.state.ready.is_empty() && self.state.in_kernel > 0 && self.has_deferred() {
            // An error recurs in the next submit.
            let _ = self.enter(EnterFlags::GETEVENTS);
            self.drain();
        }
        if self.state.has_due_operations() {
            // The caller need not submit again for operations that it has already submitted.
            self.submit_all();
            self.drain();
        }
        done.append(&mut self.state.ready);
    }

    fn wait(&mut self, timeout: Option<Duration>) {
        let until = timeout.and_then(|timeout| self.now().checked_add(timeout));
        let mut left = timeout;
        while self.wait_once(left) {
            left = until.map(|until| until.saturating_duration_since(self.now()));
        }
        self.state.woken = false;
        self.state.signalled &= !self.state.heeds_signals;
    }

    /// A descriptor that turns out not to be an eventfd is no longer watched, with a warning. One that always has eight
    /// bytes to read looks like an eventfd: the caller must know what it passes.
    fn watch(&mut self, event: EventFd) {
        self.state.add_watch(WatchedEvent::Foreign(event));
    }

    fn signals(&self) -> u64 {
        self.state.signals
    }

    fn heed_signals(&mut self, heed: bool) {
        let state = &mut self.state;
        state.heeds_signals = heed;
        let due = std::mem::take(&mut state.unarmed);
        due.into_iter().chain(std::mem::take(&mut state.unheeded)).for_each(|index| state.arm_later(index));
    }

    fn notifier(&self) -> Arc<dyn Notifier> {
        Arc::clone(&self.state.wakeup) as Arc<dyn Notifier>
    }

    fn in_flight(&self) -> usize {
        self.state.slots.len() + self.state.ready.len()
    }

    fn now(&self) -> Instant {
        Instant::now()
    }
}

impl Drop for UringQueue {
    /// Waits for every call in flight. Operations that still wait for room are dropped undone.
    fn drop(&mut self) {
        let state = &mut self.state;
        state.closing = true;
        state.backlog.clear();
        state.unarmed.clear();
        state.in_kernel -= state.due.len() as u32;
        state.due.clear();
        let mut cancels = state.cancellations();
        while !cancels.is_empty() || self.state.in_kernel > 0 || self.state.controls > 0 {
            let mut queue = self.ring.submission();
            while let Some(entry) = cancels.last() {
                // SAFETY: a cancellation points at no memory.
                if unsafe { queue.push(entry) }.is_err() {
                    break;
                }
                cancels.pop();
                self.state.controls += 1;
            }
            drop(queue);
            match self.ring.submit_and_wait(1) {
                Ok(_) => {}
                Err(error) if is_passing(&error) => {}
                Err(error) => {
                    // Continuing would release memory that the kernel may still write to.
                    eprintln!("io_uring_enter failed with operations in flight: {error}");
                    std::process::abort();
                }
            }
            self.drain();
            if self.state.controls == self.state.armed() {
                // No cancellation is in flight. One may have come too early, between a poll and the read linked to it.
                cancels = self.state.cancellations();
            }
        }
    }
}

impl State {
    fn add_watch(&mut self, event: WatchedEvent) {
        let index = u32::try_from(self.watches.len()).expect("fewer watches than 2^32 fit in memory");
        self.watches.push(Watch::new(event));
        self.arm_later(index);
    }

    /// Notes that a watch is to be armed: soon, or once signals are heeded again.
    fn arm_later(&mut self, index: u32) {
        if self.heeds_signals || self.watches[index as usize].is_own() {
            self.unarmed.push(index);
        } else {
            self.unheeded.push(index);
        }
    }

    /// The limit of `in_kernel`: every entry in the ring must have room for its completion.
    fn operations_max(&self) -> u32 {
        let control_room = u32::try_from(2 * self.watches.len()).unwrap_or(u32::MAX);
        self.depth.min(self.completion_entries.saturating_sub(control_room)).max(1)
    }

    fn has_due_operations(&self) -> bool {
        !self.due.is_empty() || (!self.backlog.is_empty() && self.in_kernel < self.operations_max())
    }

    fn has_due(&self) -> bool {
        self.has_due_operations() || !self.unarmed.is_empty()
    }

    /// Moves what is due into the submission queue, as far as there is room.
    fn feed(&mut self, queue: &mut squeue::SubmissionQueue<'_>) {
        while let Some(index) = self.unarmed.last().copied() {
            let Some(armed) = self.watches[index as usize].arm(index, queue) else { return };
            self.controls += armed;
            self.unarmed.pop();
        }
        while let Some(index) = self.due.front().copied() {
            if !self.start(index, queue) {
                return;
            }
            self.due.pop_front();
        }
        let operations_max = self.operations_max();
        while let Some(index) = self.backlog.front().copied() {
            if self.in_kernel >= operations_max || !self.start(index, queue) {
                return;
            }
            self.backlog.pop_front();
            self.in_kernel += 1;
        }
    }

    /// Queues the next call of an operation. False if the submission queue is full.
    fn start(&mut self, index: u32, queue: &mut squeue::SubmissionQueue<'_>) -> bool {
        if queue.is_full() {
            return false;
        }
        let slot = self.slots.get(index);
        let fd = self.files.seen(slot.file).raw_fd();
        let entry = entry_of(&slot.next_call(), fd).user_data(user_data(TAG_OPERATION, index));
        // SAFETY: the memory that the entry points to belongs to the slot (its parts and iovecs) or is static. It
        // does not move until the completion is taken: a slot is finished only then, and dropping the queue waits
        // for it. The file stays open as long as `files` has it.
        unsafe { queue.push(&entry) }.is_ok()
    }

    /// Takes one completion queue entry.
    fn complete(&mut self, user_data: u64, result: i32) {
        let (tag, index) = ((user_data >> 32) as u32, user_data as u32);
        match tag {
            TAG_OPERATION => self.complete_call(index, result),
            TAG_WATCH_READ | TAG_WATCH_POLL => self.complete_watch(tag, index, result),
            _ => self.controls -= 1,
        }
    }

    fn complete_call(&mut self, index: u32, result: i32) {
        let slot = self.slots.get(index);
        let verdict = slot.take_result(result, self.files.seen(slot.file));
        let result = match verdict {
            Verdict::Again if !self.closing => {
                self.due.push_back(index);
                return;
            }
            Verdict::Again => Err(Errno(libc::ECANCELED)),
            Verdict::Done(result) => result,
        };
        self.in_kernel -= 1;
        let completion = self.slots.finish(index, result);
        self.ready.push(completion);
    }

    fn complete_watch(&mut self, tag: u32, index: u32, result: i32) {
        let watch = &mut self.watches[index as usize];
        self.controls -= 1;
        watch.armed -= 1;
        if tag == TAG_WATCH_READ {
            let signalled = watch.take_read(result);
            if watch.is_own() {
                self.woken |= signalled;
            } else {
                self.signalled |= signalled;
                self.signals += u64::from(signalled);
            }
        } else {
            watch.take_poll(result);
        }
        if watch.armed == 0 && !watch.dead && !self.closing {
            self.arm_later(index);
        }
    }

    /// Entries of watches in the kernel or in the submission queue.
    fn armed(&self) -> u32 {
        self.watches.iter().map(|watch| watch.armed).sum()
    }

    /// Entries that cancel every armed watch.
    fn cancellations(&self) -> Vec<squeue::Entry> {
        let armed = (0u32..).zip(&self.watches).filter(|(_, watch)| watch.armed > 0);
        let tagged =
            armed.flat_map(|(index, _)| [user_data(TAG_WATCH_POLL, index), user_data(TAG_WATCH_READ, index)]);
        tagged
            .map(|target| opcode::AsyncCancel::new(target).build().user_data(user_data(TAG_CANCEL, 0)))
            .collect()
    }
}
