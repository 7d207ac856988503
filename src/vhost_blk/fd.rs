//! File descriptors from outside: the frontend's eventfds and those inherited from a parent process.
//!
//! Owns the conversions that the compiler cannot check, and the writing of signals. Such a write may block: the counter
//! is full, and the descriptor is blocking or became so after the check. The flag is shared with the frontend, so only
//! an interrupt ends that write for sure (docs/concurrency.md, "Signals to the frontend").

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, Once, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::OFlags;
use rustix::io::FdFlags;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::descriptor::{self, Kind};

/// How often a thread that is stuck in a signal is interrupted.
pub(crate) const INTERRUPT_EVERY: Duration = Duration::from_millis(5);

/// True if the descriptor may be an eventfd: it has no name in any file system, and so no file type. Named descriptors
/// are refused: a read or a write of one may never wait (a file, /dev/zero). Or it may last for ever, with no way to
/// end it (FUSE, a network's file system).
pub(crate) fn may_be_event(file: &File) -> bool {
    descriptor::kind_of(file) == Kind::Anonymous
}

/// The frontend's kick descriptor as an eventfd. It may be another unnamed descriptor (a timer, an epoll): reads of
/// that may fail, but they can be ended.
pub(crate) fn eventfd_from(file: File) -> EventFd {
    // SAFETY: the descriptor is owned by `file`, which gives it up, so the EventFd is its only owner.
    unsafe { EventFd::from_raw_fd(file.into_raw_fd()) }
}

/// Closes the original of a descriptor that was copied. A descriptor that the process was started with is not
/// close-on-exec, and all that it opened itself are: those stay open, whatever number was given.
pub(crate) fn close_inherited(raw: RawFd) -> io::Result<()> {
    // SAFETY: the borrow lasts for one system call only, which answers EBADF if nothing is open there.
    let flags = rustix::io::fcntl_getfd(unsafe { BorrowedFd::borrow_raw(raw) })?;
    if flags.contains(FdFlags::CLOEXEC) {
        return Ok(());
    }
    if raw <= libc::STDERR_FILENO {
        // The standard descriptors never close, or the next file would get such a number.
        let null = File::open("/dev/null")?;
        // SAFETY: the number stays open, and `dup2` owns it for this call only.
        let mut standard = std::mem::ManuallyDrop::new(unsafe { OwnedFd::from_raw_fd(raw) });
        return Ok(rustix::io::dup2(null, &mut standard)?);
    }
    // SAFETY: open since the start of the process, as it is not close-on-exec, so no other owner in it has the number.
    drop(unsafe { OwnedFd::from_raw_fd(raw) });
    Ok(())
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

/// An eventfd of the frontend that we write to.
#[derive(Debug)]
pub(crate) struct Signal {
    file: File,
    /// The frontend left it blocking. We must not change that: the flag is shared with the frontend, which may rely on
    /// blocking reads.
    blocking: bool,
}

impl Signal {
    pub(crate) fn new(file: File) -> Self {
        let blocking = rustix::fs::fcntl_getfl(&file).map_or(true, |flags| !flags.contains(OFlags::NONBLOCK));
        Signal { file, blocking }
    }

    /// Adds one. A full counter is as good as a signal, and a closed one is the frontend's affair. The write may block
    /// until the thread is interrupted, and then ends without a signal.
    fn raise(&self) {
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

/// Shows the thread that stops a worker whether the worker is in the middle of a signal. Relaxed: it orders nothing,
/// and is read several times before any action follows.
#[derive(Debug, Default)]
pub(crate) struct RaiseMark(AtomicU32);

impl RaiseMark {
    /// Runs `raise`, at most one signal. The count is odd meanwhile. Only the worker stores it.
    fn around(&self, raise: impl FnOnce()) {
        let before = self.0.load(Ordering::Relaxed);
        self.0.store(before.wrapping_add(1), Ordering::Relaxed);
        raise();
        self.0.store(before.wrapping_add(2), Ordering::Relaxed);
    }

    /// Whether the worker is in the same signal as at the previous call. `seen` keeps the count between calls.
    pub(crate) fn is_stuck(&self, seen: &mut u32) -> bool {
        let now = self.0.load(Ordering::Relaxed);
        now % 2 == 1 && std::mem::replace(seen, now) == now
    }
}

/// Interrupts the signal that a thread is stuck in, if it still is. Other calls of the thread would be interrupted as
/// well, so use it only for a thread that was seen to be stuck.
pub(crate) fn interrupt<T>(thread: &JoinHandle<T>) {
    let _ = thread.kill(interrupting());
}

/// The signal that interrupts writes. Its handler does nothing, and interrupted calls are not restarted.
fn interrupting() -> libc::c_int {
    static INSTALLED: Once = Once::new();
    extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    INSTALLED.call_once(|| {
        if let Err(error) = register_signal_handler(SIGRTMIN(), nothing) {
            // Only a wrong number could be refused, and an unhandled signal would end the program.
            panic!("no handler for the first real-time signal: {error}");
        }
    });
    SIGRTMIN()
}

/// A timer that interrupts the calling thread repeatedly while it lives.
struct Interrupter(libc::timer_t);

impl Interrupter {
    fn new() -> io::Result<Self> {
        // SAFETY: plain data, for which zeros are a value.
        let (mut event, mut times) =
            unsafe { (std::mem::zeroed::<libc::sigevent>(), std::mem::zeroed::<libc::itimerspec>()) };
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = interrupting();
        event.sigev_notify_thread_id = rustix::thread::gettid().as_raw_nonzero().get();
        times.it_value.tv_nsec = INTERRUPT_EVERY.subsec_nanos().into();
        times.it_interval = times.it_value;
        let mut timer = std::ptr::null_mut();
        // SAFETY: all three point to values of ours, which the calls only use while they last.
        unsafe {
            if libc::timer_create(libc::CLOCK_MONOTONIC, &raw mut event, &raw mut timer) != 0 {
                return Err(io::Error::last_os_error());
            }
            let interrupter = Interrupter(timer);
            if libc::timer_settime(timer, 0, &raw const times, std::ptr::null_mut()) != 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(interrupter)
        }
    }
}

impl Drop for Interrupter {
    fn drop(&mut self) {
        // SAFETY: the timer was created by `new`, and is deleted once.
        let _ = unsafe { libc::timer_delete(self.0) };
    }
}

/// The slot through which the session passes a queue's signal to its worker. The session may change it at any time:
/// QEMU does whenever an interrupt vector is masked.
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

    /// Raises the signal, on any thread and in bounded time. Costs several system calls.
    pub(crate) fn raise(&self) {
        let Some(signal) = self.get() else { return };
        // Without a timer nothing could end a blocked write.
        if let Ok(_interrupter) = Interrupter::new() {
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
        interrupting();
        let seen = slot.changes.load(Ordering::Acquire);
        let signal = slot.get();
        SignalView { slot, seen, signal }
    }

    /// Raises the newest signal on the worker's thread; the thread that stops the worker may interrupt it (`mark`).
    /// If the session changes the signal at this very moment, the old one may be raised. The session itself raises
    /// the new one after every change.
    pub(crate) fn raise(&mut self, mark: &RaiseMark) {
        let changes = self.slot.changes.load(Ordering::Acquire);
        if changes != self.seen {
            self.seen = changes;
            self.signal = self.slot.get();
        }
        if let Some(signal) = &self.signal {
            mark.around(|| signal.raise());
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

    /// A full counter whose descriptor was made blocking after the check.
    fn full_and_then_blocking() -> (EventFd, File) {
        let event = EventFd::new(libc::EFD_NONBLOCK).expect("an eventfd");
        event.write(u64::MAX - 1).expect("fills the counter");
        let file = File::from(rustix::io::fcntl_dupfd_cloexec(borrow(&event), 3).expect("a copy"));
        (event, file)
    }

    #[test]
    fn a_session_is_not_held_by_a_signal() {
        let (event, file) = full_and_then_blocking();
        let slot = SignalSlot::default();
        slot.set(Some(file));
        rustix::fs::fcntl_setfl(borrow(&event), OFlags::empty()).expect("it blocks now");
        slot.raise();
        assert_eq!(event.read().expect("its count"), u64::MAX - 1);
    }

    #[test]
    fn a_stuck_signal_is_seen_and_interrupted() {
        let (event, file) = full_and_then_blocking();
        let (slot, mark) = (Arc::new(SignalSlot::default()), Arc::new(RaiseMark::default()));
        slot.set(Some(file));
        let mut view = SignalView::new(slot);
        rustix::fs::fcntl_setfl(borrow(&event), OFlags::empty()).expect("it blocks now");
        let its_mark = Arc::clone(&mark);
        let thread = std::thread::spawn(move || view.raise(&its_mark));
        let mut seen = 0;
        while !thread.is_finished() {
            std::thread::yield_now();
            if mark.is_stuck(&mut seen) {
                interrupt(&thread);
            }
        }
        thread.join().expect("it does not panic");
        assert!(!mark.is_stuck(&mut seen));
        assert_eq!(event.read().expect("its count"), u64::MAX - 1);
    }

    #[test]
    fn a_view_follows_its_slot() {
        let slot = Arc::new(SignalSlot::default());
        let mark = RaiseMark::default();
        let mut view = SignalView::new(Arc::clone(&slot));
        view.raise(&mark);
        let event = EventFd::new(libc::EFD_NONBLOCK).expect("an eventfd");
        let copy = rustix::io::fcntl_dupfd_cloexec(borrow(&event), 3).expect("a copy");
        slot.set(Some(File::from(copy)));
        view.raise(&mark);
        assert_eq!(event.read().expect("its count"), 1);
        slot.set(None);
        view.raise(&mark);
        assert!(event.read().is_err());
    }

    #[test]
    fn pipes_files_and_sockets_are_no_eventfds() {
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
    fn a_missing_descriptor_causes_no_panic() {
        assert!(copy_inherited(-1).is_err());
        assert!(copy_inherited(1_000_000).is_err());
    }

    fn borrow(event: &EventFd) -> BorrowedFd<'_> {
        use std::os::fd::AsRawFd;
        // SAFETY: the eventfd outlives the borrow, which is bound to it.
        unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
    }
}
