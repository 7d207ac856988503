//! The handle that stops a server from any thread, also in the middle of a session's wait for its frontend.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};

/// Stops a server permanently, from any thread.
#[derive(Clone, Debug)]
pub struct StopHandle {
    inner: Arc<StopInner>,
}

#[derive(Debug)]
struct StopInner {
    /// Becomes readable and stays so.
    event: OwnedFd,
    stopped: AtomicBool,
    /// The listener goes on to a successor.
    hands_over: AtomicBool,
    /// Guards the present session's socket, so that a stop ends even a wait in the middle of a message. A leaf.
    connection: Mutex<Option<UnixStream>>,
}

impl StopHandle {
    /// A handle that has not been used.
    ///
    /// # Errors
    /// When the host refuses an eventfd.
    pub fn new() -> io::Result<Self> {
        let event = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let (stopped, hands_over, connection) =
            (AtomicBool::new(false), AtomicBool::new(false), Mutex::new(None));
        Ok(StopHandle { inner: Arc::new(StopInner { event, stopped, hands_over, connection }) })
    }

    /// Closes the door, drains and ends the current session, and makes `serve` return. May be called more than once.
    pub fn stop(&self) {
        self.inner.stopped.store(true, Ordering::SeqCst);
        let _ = rustix::io::write(&self.inner.event, &1u64.to_ne_bytes());
        if let Some(connection) = &*self.connection() {
            end_waits(connection);
        }
    }

    /// As [`StopHandle::stop`], but the listening socket stays open and keeps its file: whoever connects meanwhile waits
    /// for the process that takes it over. [`crate::Server::sockets`] has it then.
    pub fn hand_over(&self) {
        self.inner.hands_over.store(true, Ordering::SeqCst);
        self.stop();
    }

    /// True from the first [`StopHandle::hand_over`] on.
    pub(crate) fn hands_over(&self) -> bool {
        self.inner.hands_over.load(Ordering::SeqCst)
    }

    /// True from the first [`StopHandle::stop`] on.
    pub fn is_stopped(&self) -> bool {
        self.inner.stopped.load(Ordering::SeqCst)
    }

    fn connection(&self) -> std::sync::MutexGuard<'_, Option<UnixStream>> {
        self.inner.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Stores the socket that a stop shuts down; if the stop came first, shuts it down now.
    pub(crate) fn enter(&self, stream: &UnixStream) -> io::Result<()> {
        *self.connection() = Some(stream.try_clone()?);
        if self.is_stopped() {
            end_waits(stream);
        }
        Ok(())
    }

    /// Forgets the socket: the session is over.
    pub(crate) fn leave(&self) {
        *self.connection() = None;
    }
}

impl AsFd for StopHandle {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inner.event.as_fd()
    }
}

/// Ends the session's waits for its frontend without hanging up. The hang-up follows when the requests in flight are
/// done.
fn end_waits(connection: &UnixStream) {
    let mut fds = [PollFd::new(connection, PollFlags::OUT)];
    let room = rustix::event::poll(&mut fds, Some(&Timespec::default()));
    // If the frontend leaves its replies unread, the session may block in a write, which only a hang-up ends. If there
    // is room, it is enough for the one reply that may still follow.
    let how = if matches!(room, Ok(1)) { Shutdown::Read } else { Shutdown::Both };
    let _ = connection.shutdown(how);
}
