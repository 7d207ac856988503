//! The eventfds of one queue, and sleeping on them.
//!
//! Knows nothing of rings: it reports what ended the sleep and leaves the rest to the caller.

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Instant;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::ClientError;

/// The eventfds of one queue.
#[derive(Debug)]
pub(super) struct Events {
    /// Driver to device: something is available.
    pub kick: EventFd,
    /// Device to driver: something is used.
    pub call: EventFd,
    /// Device to driver: the ring is broken.
    pub error: EventFd,
    /// Watches call, error and the socket's end.
    epoll: Epoll,
    /// Watched to notice when the device hangs up; must stay open meanwhile.
    _socket: Arc<UnixStream>,
}

/// What ended a sleep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wake {
    /// A call, or an interrupted wait: check the ring.
    Called,
    /// The error eventfd.
    RingError,
    /// The device closed the session.
    Disconnected,
    /// The deadline.
    TimedOut,
}

const CALL: u64 = 0;
const ERROR: u64 = 1;
const SOCKET: u64 = 2;

impl Events {
    /// Creates all three, close-on-exec and non-blocking.
    ///
    /// # Errors
    /// When the host has no more descriptors.
    pub fn new(socket: &Arc<UnixStream>) -> Result<Self, ClientError> {
        let make = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(ClientError::host("eventfd"));
        let (kick, call, error) = (make()?, make()?, make()?);
        let epoll = Epoll::new().map_err(ClientError::host("epoll"))?;
        let watched = [
            (call.as_raw_fd(), EventSet::IN, CALL),
            (error.as_raw_fd(), EventSet::IN, ERROR),
            (socket.as_raw_fd(), EventSet::READ_HANG_UP, SOCKET),
        ];
        for (fd, events, name) in watched {
            epoll
                .ctl(ControlOperation::Add, fd, EpollEvent::new(events, name))
                .map_err(ClientError::host("epoll"))?;
        }
        Ok(Self { kick, call, error, epoll, _socket: Arc::clone(socket) })
    }

    /// Signals the device.
    ///
    /// # Errors
    /// When the eventfd cannot be written.
    pub fn kick(&self) -> Result<(), ClientError> {
        self.kick.write(1).map_err(ClientError::host("kick"))
    }

    /// Sleeps until a call, a ring error, the end of the session or the deadline. Resets the eventfd that woke it.
    ///
    /// # Errors
    /// When the host fails to wait.
    pub fn sleep(&self, deadline: Instant) -> Result<Wake, ClientError> {
        // Rounded up, so that the deadline has passed when time is up.
        let left = deadline.saturating_duration_since(Instant::now()).as_micros().div_ceil(1000);
        let mut happened = [EpollEvent::default(); 3];
        let count = match self.epoll.wait(i32::try_from(left).unwrap_or(i32::MAX), &mut happened) {
            Ok(0) => return Ok(Wake::TimedOut),
            Ok(count) => count,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => return Ok(Wake::Called),
            Err(error) => return Err(ClientError::host("epoll")(error)),
        };
        let is = |name| happened[..count].iter().any(|event| event.data() == name);
        // A counter that was reset already (EAGAIN) is fine.
        if is(CALL) {
            let _ = self.call.read();
            return Ok(Wake::Called);
        }
        if is(ERROR) {
            let _ = self.error.read();
            return Ok(Wake::RingError);
        }
        Ok(Wake::Disconnected)
    }
}
