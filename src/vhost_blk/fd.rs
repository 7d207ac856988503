//! File descriptors that came from elsewhere: the frontend's eventfds and those a parent process left us.
//!
//! Owns the two conversions that the compiler cannot check, and the writing of a signal that never blocks.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{FileType, OFlags};
use vmm_sys_util::eventfd::EventFd;

/// True if the descriptor may be an eventfd: of those kinds that have no name in any file system, and so no file type.
/// What has one is refused, for a read or a write of it may last for ever (FUSE, a network's file system) and nothing
/// ends it, or never wait at all (a file, /dev/zero).
pub(crate) fn may_be_event(file: &File) -> bool {
    rustix::fs::fstat(file).is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Unknown)
}

/// The frontend's kick descriptor as an eventfd. Another descriptor without a name may hide behind it (a timer, an
/// epoll): reads of it may fail, but they can be ended.
pub(crate) fn eventfd_from(file: File) -> EventFd {
    // SAFETY: the descriptor is owned by `file`, which gives it up, so the EventFd is its only owner.
    unsafe { EventFd::from_raw_fd(file.into_raw_fd()) }
}

/// A close-on-exec copy of a descriptor that the process was started with. The original stays open.
pub(crate) fn copy_inherited(raw: RawFd) -> io::Result<OwnedFd> {
    if raw < 0 {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    // SAFETY: the borrow lasts for one system call only, which answers EBADF if nothing is open there.
    let borrowed = unsafe { BorrowedFd::borrow_raw(raw) };
    Ok(rustix::io::fcntl_dupfd_cloexec(borrowed, 3)?)
}

/// An eventfd of the frontend to which we write.
#[derive(Debug)]
pub(crate) struct Signal {
    file: File,
    /// The frontend left it blocking. We must not change that: the flag is shared with the frontend, which may read
    /// it blocking.
    blocking: bool,
}

impl Signal {
    pub(crate) fn new(file: File) -> Self {
        let blocking = rustix::fs::fcntl_getfl(&file).map_or(true, |flags| !flags.contains(OFlags::NONBLOCK));
        Signal { file, blocking }
    }

    /// Adds one. A full counter is as good as a signal, and a closed one is the frontend's affair.
    pub(crate) fn raise(&self) {
        if self.blocking && !self.has_room() {
            return;
        }
        let _ = (&self.file).write(&1u64.to_ne_bytes());
    }

    fn has_room(&self) -> bool {
        let mut fds = [PollFd::new(&self.file, PollFlags::OUT)];
        matches!(rustix::event::poll(&mut fds, Some(&Timespec::default())), Ok(1))
    }
}

/// Where the session leaves a queue's signal, and from where its worker takes it. The session may change it at any
/// time: QEMU does whenever an interrupt vector is masked.
#[derive(Debug, Default)]
pub(crate) struct SignalSlot {
    /// Counts the changes, so that a worker need not lock. Stored with Release after the slot; loaded with Acquire.
    changes: AtomicU32,
    /// Guards the signal. A leaf: nothing is called with it held.
    signal: Mutex<Option<Arc<Signal>>>,
}

impl SignalSlot {
    pub(crate) fn set(&self, file: Option<File>) {
        let signal = file.map(|file| Arc::new(Signal::new(file)));
        *self.signal.lock().unwrap_or_else(PoisonError::into_inner) = signal;
        self.changes.fetch_add(1, Ordering::Release);
    }

    pub(crate) fn get(&self) -> Option<Arc<Signal>> {
        self.signal.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn raise(&self) {
        if let Some(signal) = self.get() {
            signal.raise();
        }
    }
}

/// A worker's cached view of a [`SignalSlot`].
#[derive(Debug)]
pub(crate) struct SignalView {
    slot: Arc<SignalSlot>,
    seen: u32,
    signal: Option<Arc<Signal>>,
}

impl SignalView {
    pub(crate) fn new(slot: Arc<SignalSlot>) -> Self {
        let seen = slot.changes.load(Ordering::Acquire);
        let signal = slot.get();
        SignalView { slot, seen, signal }
    }

    /// Raises the newest signal. If the session changes it at this very moment, the old one may be raised: the
    /// session raises the new one itself after every change.
    pub(crate) fn raise(&mut self) {
        let changes = self.slot.changes.load(Ordering::Acquire);
        if changes != self.seen {
            self.seen = changes;
            self.signal = self.slot.get();
        }
        if let Some(signal) = &self.signal {
            signal.raise();
        }
    }
}

/// Sleeps until one of two descriptors can be read, or the other end of the first is gone. `(first, second)`.
pub(crate) fn wait_readable(first: impl AsFd, second: impl AsFd) -> io::Result<(bool, bool)> {
    let mut fds = [PollFd::new(&first, PollFlags::IN), PollFd::new(&second, PollFlags::IN)];
    loop {
        match rustix::event::poll(&mut fds, None) {
            Ok(_) => return Ok((!fds[0].revents().is_empty(), !fds[1].revents().is_empty())),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_blocking_counter_does_not_block() {
        let event = EventFd::new(0).expect("an eventfd");
        event.write(u64::MAX - 1).expect("fills the counter");
        let copy = rustix::io::fcntl_dupfd_cloexec(borrow(&event), 3).expect("a copy");
        Signal::new(File::from(copy)).raise();
        assert_eq!(event.read().expect("its count"), u64::MAX - 1);
    }

    #[test]
    fn a_view_follows_its_slot() {
        let slot = Arc::new(SignalSlot::default());
        let mut view = SignalView::new(Arc::clone(&slot));
        view.raise();
        let event = EventFd::new(libc::EFD_NONBLOCK).expect("an eventfd");
        let copy = rustix::io::fcntl_dupfd_cloexec(borrow(&event), 3).expect("a copy");
        slot.set(Some(File::from(copy)));
        view.raise();
        assert_eq!(event.read().expect("its count"), 1);
        slot.set(None);
        view.raise();
        assert!(event.read().is_err());
    }

    #[test]
    fn what_has_a_name_is_no_event() {
        let event = EventFd::new(0).expect("an eventfd");
        let copy = rustix::io::fcntl_dupfd_cloexec(borrow(&event), 3).expect("a copy");
        assert!(may_be_event(&File::from(copy)));
        let (pipe, _) = std::io::pipe().expect("a pipe");
        let memory = rustix::fs::memfd_create("x", rustix::fs::MemfdFlags::CLOEXEC).expect("a memfd");
        let (socket, _) = std::os::unix::net::UnixStream::pair().expect("a pair");
        let zero = File::open("/dev/zero").expect("/dev/zero");
        for file in [OwnedFd::from(pipe).into(), memory.into(), OwnedFd::from(socket).into(), zero] {
            assert!(!may_be_event(&file), "{file:?}");
        }
    }

    #[test]
    fn no_descriptor_is_no_panic() {
        assert!(copy_inherited(-1).is_err());
        assert!(copy_inherited(1_000_000).is_err());
    }

    fn borrow(event: &EventFd) -> BorrowedFd<'_> {
        use std::os::fd::AsRawFd;
        // SAFETY: the eventfd outlives the borrow, which is bound to it.
        unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
    }
}
