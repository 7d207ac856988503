//! A watched eventfd: a read that is outstanding in the ring until a signal comes.
//!
//! It builds its entries and interprets their results; the queue rearms it and counts the entries. It never closes the
//! eventfd or frees the counter while an entry is in the kernel: the queue's drop waits for them.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use io_uring::types::Fd;
use io_uring::{opcode, squeue};
use tracing::warn;
use vmm_sys_util::eventfd::EventFd;

use super::notify::Wakeup;
use super::ring::is_passing_errno;

/// The kind of a completion queue entry: the upper half of its user data. The lower half is an index.
pub(super) const TAG_OPERATION: u32 = 0;
pub(super) const TAG_WATCH_READ: u32 = 1;
pub(super) const TAG_WATCH_POLL: u32 = 2;
pub(super) const TAG_CANCEL: u32 = 3;

/// An eventfd whose signals end a wait.
pub(super) struct Watch {
    event: WatchedEvent,
    /// The kernel stores the counter here; boxed, because watches move. The value is not used.
    counter: Box<AtomicU64>,
    /// A read of a non-blocking eventfd waits on new kernels (6.18), and returns EAGAIN at once on older ones. After an
    /// EAGAIN the eventfd is polled first, with the read linked to the poll.
    pub(super) poll_first: bool,
    /// Entries of this watch in the kernel or in the submission queue.
    pub(super) armed: u32,
    /// Not armed again: it is not an eventfd, or was closed.
    pub(super) dead: bool,
}

/// The owner of the eventfd.
pub(super) enum WatchedEvent {
    Foreign(EventFd),
    Own(Arc<Wakeup>),
}

impl Watch {
    pub(super) fn new(event: WatchedEvent) -> Self {
        Watch { event, counter: Box::new(AtomicU64::new(0)), poll_first: false, armed: 0, dead: false }
    }

    /// True for the queue's own eventfd, which the notifier signals.
    pub(super) fn is_own(&self) -> bool {
        matches!(self.event, WatchedEvent::Own(_))
    }

    fn fd(&self) -> RawFd {
        match &self.event {
            WatchedEvent::Foreign(event) => event.as_raw_fd(),
            WatchedEvent::Own(wakeup) => wakeup.event.as_raw_fd(),
        }
    }

    /// Queues the read, after a poll if `poll_first`. Returns the number of entries, or `None` if there is no room.
    pub(super) fn arm(&mut self, index: u32, queue: &mut squeue::SubmissionQueue<'_>) -> Option<u32> {
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
        // SAFETY: the counter is boxed, and atomic, so that the kernel may write it behind our back. It is freed
        // only after the queue's drop has seen this entry's completion.
        unsafe { queue.push(&read) }.expect("there is room for the entry");
        self.armed = needed as u32;
        Some(self.armed)
    }

    /// Takes the result of the read: true if the eventfd was signalled.
    pub(super) fn take_read(&mut self, result: i32) -> bool {
        match result {
            8 => return true,
            _ if result == -libc::EAGAIN => self.poll_first = true,
            _ if result == -libc::EINTR || result == -libc::ECANCELED => {}
            _ => self.die(result),
        }
        false
    }

    /// Takes the result of the poll before the read; the read then consumes the signal.
    pub(super) fn take_poll(&mut self, result: i32) {
        if result < 0 && result != -libc::ECANCELED && !is_passing_errno(-result) {
            self.die(result);
        }
    }

    fn die(&mut self, result: i32) {
        warn!(fd = self.fd(), result, "no longer watched: it does not behave like an eventfd");
        self.dead = true;
    }
}

/// The user data of an entry, which identifies its completion.
pub(super) fn user_data(tag: u32, index: u32) -> u64 {
    u64::from(tag) << 32 | u64::from(index)
}
