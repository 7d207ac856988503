//! The listening socket, the loop that serves one frontend after another, and the stop handle.
//!
//! Owns the socket file. No frontend can end the server: only its own session ends, and the next frontend is accepted.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};
use rustix::net::{AddressFamily, SocketType, sockopt};
use tracing::{debug, error, info, warn};
use vhost::vhost_user::{BackendReqHandler, Error};

use crate::device::BlockDevice;
use crate::door::{Door, Leaving};
use crate::error::{SessionEnd, SessionError};
use crate::fd::copy_inherited;
use crate::loss::MemoryLoss;
use crate::memory::RegionInfo;
use crate::message::Envelope;
use crate::metrics::Metrics;
use crate::peer::Peer;
use crate::relay::{Relay, Wakers};
use crate::session::Session;
use crate::socket_file::Listening;

/// `vhost` uses 8 bits for the queue in messages that carry descriptors.
const MAX_QUEUES: u16 = 256;
/// Virtio 1.2, 2.7.
const MAX_QUEUE_SIZE: u16 = 32768;

/// What a server offers its frontends.
#[derive(Clone, Debug)]
pub struct ServeOptions {
    /// Queues on offer, 1 to 256. Unused queues cost nothing.
    pub num_queues: u16,
    /// The largest ring, in descriptors: a power of two from 2 to 32,768.
    pub queue_size: u16,
    /// The longest time that a queue without work polls before it sleeps; zero to sleep at once.
    pub poll_max: Duration,
    /// How long a message may take from its first byte to its last.
    pub message_timeout: Duration,
    /// The counters of the queues, for at least `num_queues` queues.
    pub metrics: Arc<Metrics>,
}

impl ServeOptions {
    /// The defaults, with the given number and size of queues.
    pub fn new(num_queues: u16, queue_size: u16) -> Self {
        ServeOptions {
            num_queues,
            queue_size,
            poll_max: Duration::from_micros(100),
            message_timeout: Duration::from_secs(10),
            metrics: Arc::new(Metrics::new(num_queues)),
        }
    }

    fn check(&self) -> Result<(), SessionError> {
        let refuse =
            |name, value: u16, range| Err(SessionError::Option { name, value: u32::from(value), range });
        if !(1..=MAX_QUEUES).contains(&self.num_queues) {
            return refuse("the number of queues", self.num_queues, "from 1 to 256");
        }
        if !self.queue_size.is_power_of_two() || !(2..=MAX_QUEUE_SIZE).contains(&self.queue_size) {
            return refuse("the queue size", self.queue_size, "a power of two from 2 to 32768");
        }
        if self.metrics.queues() < usize::from(self.num_queues) {
            return refuse("the number of queues", self.num_queues, "at most that of the metrics");
        }
        Ok(())
    }
}

impl Default for ServeOptions {
    /// 64 queues of up to 1,024 descriptors.
    fn default() -> Self {
        Self::new(64, 1024)
    }
}

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
        let (stopped, connection) = (AtomicBool::new(false), Mutex::new(None));
        Ok(StopHandle { inner: Arc::new(StopInner { event, stopped, connection }) })
    }

    /// Closes the door, drains and ends the current session, and makes `serve` return. May be called more than once.
    pub fn stop(&self) {
        self.inner.stopped.store(true, Ordering::SeqCst);
        let _ = rustix::io::write(&self.inner.event, &1u64.to_ne_bytes());
        if let Some(connection) = &*self.connection() {
            end_waits(connection);
        }
    }

    /// True from the first [`StopHandle::stop`] on.
    pub fn is_stopped(&self) -> bool {
        self.inner.stopped.load(Ordering::SeqCst)
    }

    fn connection(&self) -> std::sync::MutexGuard<'_, Option<UnixStream>> {
        self.inner.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Stores the socket that a stop shuts down; if the stop came first, shuts it down now.
    fn enter(&self, stream: &UnixStream) -> io::Result<()> {
        *self.connection() = Some(stream.try_clone()?);
        if self.is_stopped() {
            end_waits(stream);
        }
        Ok(())
    }

    fn leave(&self) {
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

/// Where frontends come from.
#[derive(Debug)]
pub struct Server {
    source: Source,
}

#[derive(Debug)]
enum Source {
    /// Taken by `serve`, which closes it.
    Listening(Mutex<Option<Listening>>),
    /// One frontend, and no other after it.
    Connected(UnixStream),
}

impl Server {
    /// Listens on a new socket file. An existing socket file is replaced only if no process accepts on it.
    ///
    /// # Errors
    /// When a process accepts on it, when the path holds something else, or when the host refuses.
    pub fn bind(path: impl AsRef<Path>) -> Result<Self, SessionError> {
        let listening = Listening::bind(path.as_ref())?;
        Ok(Server { source: Source::Listening(Mutex::new(Some(listening))) })
    }

    /// Uses a socket that is already listening, or is already connected to one frontend.
    ///
    /// # Errors
    /// When it is not a unix stream socket.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, SessionError> {
        let wrong = |error: rustix::io::Errno| SessionError::InheritedFd { source: error.into() };
        let domain = sockopt::socket_domain(&fd).map_err(wrong)?;
        let kind = sockopt::socket_type(&fd).map_err(wrong)?;
        if domain != AddressFamily::UNIX || kind != SocketType::STREAM {
            return Err(wrong(rustix::io::Errno::PROTOTYPE));
        }
        let listens = sockopt::socket_acceptconn(&fd).map_err(wrong)?;
        let failed = |source| SessionError::InheritedFd { source };
        if listens {
            let listening = Listening::inherited(fd.into()).map_err(failed)?;
            return Ok(Server { source: Source::Listening(Mutex::new(Some(listening))) });
        }
        let stream = UnixStream::from(fd);
        stream.set_nonblocking(false).map_err(failed)?;
        Ok(Server { source: Source::Connected(stream) })
    }

    /// As [`Server::from_fd`], for a descriptor number that a parent process left open. The descriptor is copied, and
    /// the original stays open.
    ///
    /// # Errors
    /// When it is not a unix stream socket.
    pub fn from_inherited(fd: RawFd) -> Result<Self, SessionError> {
        Self::from_fd(copy_inherited(fd).map_err(|source| SessionError::InheritedFd { source })?)
    }

    /// Serves one frontend after another on the calling thread until it is stopped. With a connected socket, it serves
    /// the one frontend until that leaves. On return every accepted request is done.
    ///
    /// # Errors
    /// When the options are invalid, or waiting for frontends fails.
    pub fn serve<D: BlockDevice>(
        &self,
        device: &Arc<D>,
        options: &ServeOptions,
        stop: &StopHandle,
    ) -> Result<(), SessionError> {
        options.check()?;
        match &self.source {
            Source::Connected(stream) => {
                let stream = stream.try_clone().map_err(|source| SessionError::InheritedFd { source })?;
                let peer = Peer::of(&stream);
                run_session(stream, &peer, None, device, options, stop);
                Ok(())
            }
            Source::Listening(listening) => {
                let taken = listening.lock().unwrap_or_else(PoisonError::into_inner).take();
                taken.map_or(Ok(()), |listening| serve_all(listening, device, options, stop))
            }
        }
    }
}

/// Serves one frontend after another until the server stops.
fn serve_all<D: BlockDevice>(
    listening: Listening,
    device: &Arc<D>,
    options: &ServeOptions,
    stop: &StopHandle,
) -> Result<(), SessionError> {
    let failed = |source| SessionError::Wait { step: "set the wait for frontends up", source };
    let door = Door::new().map_err(failed)?;
    thread::scope(|scope| {
        let keep = || door.keep(listening, stop);
        thread::Builder::new().name("strata-door".to_owned()).spawn_scoped(scope, keep).map_err(failed)?;
        let _leaving = Leaving(&door);
        while let Some(visitor) = door.next()? {
            run_session(visitor.stream, &visitor.peer, Some(&door), device, options, stop);
            door.left();
        }
        Ok(())
    })
}

/// Serves one frontend after another: [`Server::serve`] for callers that do not need the server afterwards.
///
/// # Errors
/// As for [`Server::serve`].
pub fn serve<D: BlockDevice>(
    server: &Server,
    device: Arc<D>,
    options: &ServeOptions,
    stop: &StopHandle,
) -> Result<(), SessionError> {
    server.serve(&device, options, stop)
}

/// Serves one frontend until it leaves, sends a message that ends the session, or the server stops.
fn run_session<D: BlockDevice>(
    stream: UnixStream,
    peer: &Peer,
    door: Option<&Door>,
    device: &Arc<D>,
    options: &ServeOptions,
    stop: &StopHandle,
) {
    info!("a frontend connected ({peer})");
    let began = Instant::now();
    let loss = match MemoryLoss::new() {
        Ok(loss) => Arc::new(loss),
        Err(error) => return warn!(%error, "no eventfd for the session; the frontend is turned away"),
    };
    let session = Session::new(Arc::clone(device), options.clone(), Arc::clone(&loss));
    let session = Arc::new(Mutex::new(session));
    let end = handle_messages(&stream, &session, &loss, door, stop);
    let seconds = began.elapsed().as_secs();
    match end {
        SessionEnd::Left | SessionEnd::Stopped => info!("the session of {seconds} s ends ({peer}): {end}"),
        SessionEnd::MemoryLost => tell_loss(&session),
        _ => warn!("the session of {seconds} s ends ({peer}): {end}"),
    }
    if let Some(door) = door {
        door.ending();
        if stop.is_stopped() {
            // First the listener, then the drain, and then the hang-up: a frontend that reconnects at once must not
            // enter the backlog of a socket that is no longer served.
            door.wait_closed();
        }
    }
    session.lock().unwrap_or_else(PoisonError::into_inner).close();
    stop.leave();
    // An inherited connection has another descriptor that stays open, but the frontend must still see the end.
    let _ = stream.shutdown(Shutdown::Both);
    debug!("session closed");
}

fn tell_loss<D: BlockDevice>(session: &Mutex<Session<D>>) {
    let region = session.lock().unwrap_or_else(PoisonError::into_inner).lost_region();
    let which = region
        .map_or("a memory region that was removed".to_owned(), |RegionInfo { guest, size, .. }| {
            format!("the memory region at {guest:#x} of {size:#x} bytes")
        });
    error!(
        "a page of {which} is gone: its file was truncated, or its file system or the pool of huge pages is full; the \
         session ends, and requests in flight are not answered"
    );
}

/// Handles messages until there is a reason to end the session.
fn handle_messages<D: BlockDevice>(
    stream: &UnixStream,
    session: &Arc<Mutex<Session<D>>>,
    loss: &MemoryLoss,
    door: Option<&Door>,
    stop: &StopHandle,
) -> SessionEnd {
    let limit = session.lock().unwrap_or_else(PoisonError::into_inner).message_timeout();
    let set_up = stop.enter(stream).and_then(|()| Relay::new(stream, limit));
    let (relay, ours) = match set_up {
        Ok(relay) => relay,
        Err(error) => return SessionEnd::Socket(error),
    };
    let mut handler = BackendReqHandler::from_stream(ours, Arc::clone(session));
    let wakers = Wakers { stop: stop.as_fd(), loss: loss.event() };
    let mut heard = false;
    loop {
        let message = match relay.receive(&wakers) {
            Ok(message) => message,
            Err(_) if stop.is_stopped() => return SessionEnd::Stopped,
            Err(end) => return end,
        };
        let lock = || session.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(door) = door.filter(|_| !std::mem::replace(&mut heard, true)) {
            door.heard();
        }
        lock().begin_message(Envelope::parse(&message.bytes));
        let handed = relay.hand_over(&message);
        drop(message);
        let handled = handed.map_err(Error::SocketError).and_then(|()| handler.handle_request());
        let passed = relay.pass_replies();
        match handled {
            _ if stop.is_stopped() => return SessionEnd::Stopped,
            Ok(()) => {}
            Err(error) if lock().survives_failure() => debug!(%error, "the session goes on"),
            Err(error) => return SessionEnd::Message(error),
        }
        if let Err(error) = passed {
            return SessionEnd::Socket(error);
        }
    }
}
