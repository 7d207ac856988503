//! One thread's io_uring: submitting, reaping, sleeping, and watching eventfds.
//!
//! What an operation's calls are and mean is decided in [`slots`](super::slots); this file only carries them. It never
//! gives up memory that the kernel may still use: dropping the queue waits for every call in flight.
//!
//! No more operations are handed to the ring at a time than its completion queue has room for, so that it cannot
//! overflow; the others wait here in the order of their arrival.

use std::collections::VecDeque;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use io_uring::types::{Fd, FsyncFlags, SubmitArgs, Timespec};
use io_uring::{EnterFlags, IoUring, Probe, opcode, squeue};
use tracing::{debug, warn};
use vmm_sys_util::eventfd::EventFd;

use super::notify::Wakeup;
use super::slots::{Call, Slot, Slots, Verdict, answer_at_once};
use super::{FileTable, OpenFile, inline};
use crate::error::{Step, StorageError};
use crate::{Completion, Errno, FileId, IoQueue, Kind, Notifier, Operation, Token};

/// The most operations in flight in one ring. More are queued.
const DEPTH_MAX: u32 = 4096;

/// Ring entries beside those of operations: reads of watched eventfds and their cancellation.
const CONTROL_ENTRIES: u32 = 32;

/// What a completion queue entry belongs to: the upper half of its user data. The lower half is an index.
const TAG_OPERATION: u32 = 0;
const TAG_WATCH_READ: u32 = 1;
const TAG_WATCH_POLL: u32 = 2;
const TAG_CANCEL: u32 = 3;

/// One thread's queue of operations on [`HostStorage`](super::HostStorage) files. It cannot leave its thread: the
/// kernel accepts only the one that made the ring.
pub struct UringQueue {
    ring: IoUring,
    state: State,
    abilities: Abilities,
    table: Arc<FileTable>,
    /// For operations that are done at once.
    scratch: Slot,
    not_send: PhantomData<*const ()>,
}

/// How far a ring is left to its one thread; each includes the ones before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Flavour {
    /// No flag.
    Plain,
    /// The kernel does not interrupt the thread, and says when it has put work off (Linux 5.19).
    Cooperative,
    /// Only this thread submits (Linux 6.0).
    SingleIssuer,
    /// Completions are worked off only when this thread asks (Linux 6.1).
    Deferred,
}

/// All flavours, the best first.
pub(super) const FLAVOURS: [Flavour; 4] =
    [Flavour::Deferred, Flavour::SingleIssuer, Flavour::Cooperative, Flavour::Plain];

/// What the kernel can do.
#[derive(Clone, Copy, Debug)]
struct Abilities {
    /// A wait can have a timeout (Linux 5.11).
    timed_wait: bool,
    /// The length of a file can be set by the ring (Linux 6.9).
    truncate: bool,
}

/// Everything but the ring itself, so that completions can be taken while the ring is borrowed.
struct State {
    /// The files seen so far, by id.
    files: Vec<Option<Arc<OpenFile>>>,
    slots: Slots,
    /// Operations that wait for room in the ring, oldest first.
    backlog: VecDeque<u32>,
    /// Operations whose next call is due; they count as in the kernel.
    due: VecDeque<u32>,
    /// Operations in the kernel or in the submission queue.
    in_kernel: u32,
    /// What the caller lets `in_kernel` reach, and what the completion queue has room for.
    depth: u32,
    completion_entries: u32,
    watches: Vec<Watch>,
    /// Watches to be armed.
    unarmed: Vec<u32>,
    /// Watch and cancel entries in the kernel or in the submission queue.
    controls: u32,
    /// Finished and not yet reaped.
    ready: Vec<Completion>,
    /// A watched eventfd was signalled since the last wait ended.
    woken: bool,
    /// The queue is being dropped: nothing is started any more.
    closing: bool,
    wakeup: Arc<Wakeup>,
}

/// An eventfd whose signals end a wait.
struct Watch {
    event: WatchedEvent,
    /// Where the kernel puts the counter; boxed, as watches move. Nobody looks at the value.
    counter: Box<AtomicU64>,
    /// A read of a non-blocking eventfd says EAGAIN at once on many kernels, instead of waiting. Such an eventfd is
    /// first polled, and the read is linked to the poll.
    poll_first: bool,
    /// Entries of this watch in the kernel or in the submission queue.
    armed: u32,
    /// Not to be armed again, as it is no eventfd or was closed.
    dead: bool,
}

enum WatchedEvent {
    Foreign(EventFd),
    Own(Arc<Wakeup>),
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
        let ring = set_up_ring(depth + CONTROL_ENTRIES, wanted).map_err(ring_error)?;
        let abilities = Abilities::ask(&ring)?;
        let wakeup = Arc::new(Wakeup::new()?);
        debug!(depth, entries = ring.params().sq_entries(), ?abilities, "io_uring set up");
        let mut state = State {
            files: Vec::new(),
            slots: Slots::default(),
            backlog: VecDeque::new(),
            due: VecDeque::new(),
            in_kernel: 0,
            depth,
            completion_entries: ring.params().cq_entries(),
            watches: Vec::new(),
            unarmed: Vec::new(),
            controls: 0,
            ready: Vec::new(),
            woken: false,
            closing: false,
            wakeup: Arc::clone(&wakeup),
        };
        state.add_watch(WatchedEvent::Own(wakeup));
        Ok(UringQueue { ring, state, abilities, table, scratch: Slot::idle(), not_send: PhantomData })
    }

    #[cfg(test)]
    pub(super) fn set_truncate_ability(&mut self, able: bool) {
        self.abilities.truncate = able;
    }

    #[cfg(test)]
    pub(super) fn set_timed_wait_ability(&mut self, able: bool) {
        self.abilities.timed_wait = able;
    }

    fn ensure_file(&mut self, id: FileId) {
        let index = usize::from(id.0);
        if self.state.files.get(index).is_some_and(Option::is_some) {
            return;
        }
        if self.state.files.len() <= index {
            self.state.files.resize(index + 1, None);
        }
        self.state.files[index] = Some(self.table.get(id));
    }

    /// Moves what is due into the submission queue, as far as there is room.
    fn feed(&mut self) {
        self.state.feed(&mut self.ring.submission());
    }

    /// Hands the submission queue to the kernel; the kernel also runs what it has put off for this thread.
    fn enter(&mut self, flags: EnterFlags) -> io::Result<usize> {
        let to_submit = self.ring.submission().len() as u32;
        // SAFETY: no argument is passed. What the entries point at is owned by slots, watches or statics, which live
        // until their completions are taken.
        unsafe { self.ring.submitter().enter::<libc::sigset_t>(to_submit, 0, flags.bits(), None) }
    }

    /// Takes all completions that are visible.
    fn drain(&mut self) {
        let UringQueue { ring, state, .. } = self;
        for entry in ring.completion() {
            state.complete(entry.user_data(), entry.result());
        }
    }

    /// Completions that the kernel has put off until this thread comes by.
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
                // What is still due found no room before; there is some now.
                Ok(taken) if taken > 0 && self.state.has_due() => {}
                Ok(_) => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Short of memory, or of room for completions: what was not taken stays, and goes with the next call.
                Err(error) if is_passing(&error) => return,
                Err(error) => panic!("io_uring_enter failed, which no state of the host explains: {error}"),
            }
        }
    }

    /// Submits and sleeps until one completion is there.
    fn sleep(&mut self, timeout: Option<Duration>) {
        self.feed();
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

/// The longest timeout that is handed to the kernel; a wait may return early.
const WAIT_MAX: Duration = Duration::from_secs(1 << 30);

impl IoQueue for UringQueue {
    fn push(&mut self, token: Token, operation: Operation) {
        self.ensure_file(operation.file);
        let file = file_of(&self.state.files, operation.file);
        if let Some(result) = answer_at_once(&operation, file) {
            self.state.ready.push(Completion { token, result, parts: operation.parts });
            return;
        }
        if file.memory_backed || (operation.kind == Kind::SetLength && !self.abilities.truncate) {
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
            // Errors show in the next submit.
            let _ = self.enter(EnterFlags::GETEVENTS);
            self.drain();
        }
        if self.state.has_due_operations() {
            // Nobody may call submit again for operations that they have submitted already.
            self.submit_all();
            self.drain();
        }
        done.append(&mut self.state.ready);
    }

    fn wait(&mut self, timeout: Option<Duration>) {
        self.drain();
        let at_once = timeout == Some(Duration::ZERO) || self.state.woken || !self.state.ready.is_empty();
        if at_once {
            self.submit_all();
            self.state.wakeup.end_sleep();
        } else if self.state.wakeup.begin_sleep() {
            self.sleep(timeout);
            self.state.wakeup.end_sleep();
        } else {
            self.submit_all();
        }
        self.drain();
        self.state.woken = false;
    }

    fn watch(&mut self, event: EventFd) {
        self.state.add_watch(WatchedEvent::Foreign(event));
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
    /// Waits for every call in flight. Operations that have not reached the kernel are dropped undone.
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
                    // Going on would hand memory back that the kernel may still write to.
                    eprintln!("io_uring_enter failed with operations in flight: {error}");
                    std::process::abort();
                }
            }
            self.drain();
        }
    }
}

impl State {
    fn add_watch(&mut self, event: WatchedEvent) {
        let index = u32::try_from(self.watches.len()).expect("fewer watches than 2^32 fit in memory");
        self.watches.push(Watch {
            event,
            counter: Box::new(AtomicU64::new(0)),
            poll_first: false,
            armed: 0,
            dead: false,
        });
        self.unarmed.push(index);
    }

    /// What `in_kernel` may reach: every entry in the ring must have room for its completion.
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
        let fd = file_of(&self.files, slot.file).raw_fd();
        let entry = entry_of(&slot.next_call(), fd).user_data(user_data(TAG_OPERATION, index));
        // SAFETY: what the entry points at is owned by the slot (its parts and iovecs) or static, and stays where it is
        // until the completion is taken: a slot is finished only then, and dropping the queue waits for it. The file
        // stays open as long as `files` has it.
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
        let verdict = slot.take_result(result, file_of(&self.files, slot.file));
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
            self.woken |= watch.take_read(result);
        } else if result < 0 && !is_passing_errno(-result) && result != -libc::ECANCELED {
            watch.die(result);
        }
        if watch.armed == 0 && !watch.dead && !self.closing {
            self.unarmed.push(index);
        }
    }

    /// Entries that end everything which waits for a signal.
    fn cancellations(&self) -> Vec<squeue::Entry> {
        let armed = (0u32..).zip(&self.watches).filter(|(_, watch)| watch.armed > 0);
        let tagged =
            armed.flat_map(|(index, _)| [user_data(TAG_WATCH_POLL, index), user_data(TAG_WATCH_READ, index)]);
        tagged
            .map(|target| opcode::AsyncCancel::new(target).build().user_data(user_data(TAG_CANCEL, 0)))
            .collect()
    }
}

impl Watch {
    fn fd(&self) -> RawFd {
        match &self.event {
            WatchedEvent::Foreign(event) => event.as_raw_fd(),
            WatchedEvent::Own(wakeup) => wakeup.event.as_raw_fd(),
        }
    }

    /// Queues the read, behind a poll if need be. The number of entries, or `None` if there is no room.
    fn arm(&mut self, index: u32, queue: &mut squeue::SubmissionQueue<'_>) -> Option<u32> {
        let needed = if self.poll_first { 2 } else { 1 };
        if queue.capacity() - queue.len() < needed {
            return None;
        }
        let fd = Fd(self.fd());
        if self.poll_first {
            let poll = opcode::PollAdd::new(fd, libc::POLLIN as u32)
                .build()
                .flags(squeue::Flags::IO_LINK)
                .user_data(user_data(TAG_WATCH_POLL, index));
            // SAFETY: a poll points at no memory; the eventfd stays open until the queue is dropped.
            unsafe { queue.push(&poll) }.expect("there is room for two entries");
        }
        let read = opcode::Read::new(fd, self.counter.as_ptr().cast(), 8)
            .build()
            .user_data(user_data(TAG_WATCH_READ, index));
        // SAFETY: the counter is boxed, atomic (so that the kernel may write it behind our back) and freed only after
        // the queue's drop has seen this entry's completion.
        unsafe { queue.push(&read) }.expect("there is room for the entry");
        self.armed = needed as u32;
        Some(self.armed)
    }

    /// Takes the result of the read: true if the eventfd was signalled.
    fn take_read(&mut self, result: i32) -> bool {
        match result {
            8 => return true,
            _ if result == -libc::EAGAIN => self.poll_first = true,
            _ if result == -libc::EINTR || result == -libc::ECANCELED => {}
            _ => self.die(result),
        }
        false
    }

    fn die(&mut self, result: i32) {
        warn!(fd = self.fd(), result, "no longer watched: it does not behave like an eventfd");
        self.dead = true;
    }
}

fn file_of(files: &[Option<Arc<OpenFile>>], id: FileId) -> &OpenFile {
    files[usize::from(id.0)].as_deref().expect("a file is looked up when its operation is pushed")
}

fn user_data(tag: u32, index: u32) -> u64 {
    u64::from(tag) << 32 | u64::from(index)
}

fn entry_of(call: &Call, fd: RawFd) -> squeue::Entry {
    let fd = Fd(fd);
    match *call {
        Call::Read { address, len, offset } => opcode::Read::new(fd, address, len).offset(offset).build(),
        Call::Write { address, len, offset } => opcode::Write::new(fd, address, len).offset(offset).build(),
        Call::Readv { iovecs, count, offset } => opcode::Readv::new(fd, iovecs, count).offset(offset).build(),
        Call::Writev { iovecs, count, offset } => {
            opcode::Writev::new(fd, iovecs, count).offset(offset).build()
        }
        Call::Fallocate { mode, offset, len } => {
            opcode::Fallocate::new(fd, len).offset(offset).mode(mode).build()
        }
        Call::Sync => opcode::Fsync::new(fd).flags(FsyncFlags::DATASYNC).build(),
        Call::Truncate { len } => opcode::Ftruncate::new(fd, len).build(),
    }
}

/// Errors of io_uring_enter after which everything is as before: interrupted, or short of memory or of room.
fn is_passing(error: &io::Error) -> bool {
    error.raw_os_error().is_some_and(is_passing_errno)
}

fn is_passing_errno(errno: i32) -> bool {
    matches!(errno, libc::EINTR | libc::EAGAIN | libc::EBUSY | libc::ENOMEM)
}

/// The wait of kernels that have no timed one: the ring's descriptor is readable when a completion is there.
fn poll_ring(fd: RawFd, timeout: Duration) {
    let millis = i32::try_from(timeout.as_micros().div_ceil(1000)).unwrap_or(i32::MAX);
    let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    // SAFETY: one valid pollfd that outlives the call. Its result does not matter: a wait may end without a reason.
    unsafe { libc::poll(&mut poll, 1, millis) };
}

/// Makes a ring with the best flags that the kernel takes.
fn set_up_ring(entries: u32, wanted: &[Flavour]) -> io::Result<IoUring> {
    let mut refusal = io::Error::from_raw_os_error(libc::EINVAL);
    for flavour in wanted {
        let mut builder = IoUring::builder();
        builder.setup_clamp();
        if *flavour >= Flavour::Cooperative {
            builder.setup_coop_taskrun().setup_taskrun_flag().setup_submit_all();
        }
        if *flavour >= Flavour::SingleIssuer {
            builder.setup_single_issuer();
        }
        if *flavour >= Flavour::Deferred {
            builder.setup_defer_taskrun();
        }
        match builder.build(entries) {
            Ok(ring) => return Ok(ring),
            // A flag that this kernel does not know.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => refusal = error,
            Err(error) => return Err(error),
        }
    }
    Err(refusal)
}

fn ring_error(source: io::Error) -> StorageError {
    match source.raw_os_error() {
        Some(libc::ENOSYS | libc::EPERM | libc::EACCES) => StorageError::UringRefused { source },
        _ => StorageError::Queue { step: Step::SetUpRing, source },
    }
}

impl Abilities {
    fn ask(ring: &IoUring) -> Result<Self, StorageError> {
        let mut probe = Probe::new();
        // Linux 5.6 brought this question and all the operations that we cannot do without.
        let asked = ring.submitter().register_probe(&mut probe);
        let needed = [opcode::Read::CODE, opcode::Write::CODE, opcode::Fallocate::CODE];
        if asked.is_err() || !needed.iter().all(|code| probe.is_supported(*code)) {
            return Err(StorageError::UringRefused { source: io::Error::from_raw_os_error(libc::ENOSYS) });
        }
        Ok(Abilities {
            timed_wait: ring.params().is_feature_ext_arg(),
            truncate: probe.is_supported(opcode::Ftruncate::CODE),
        })
    }
}
