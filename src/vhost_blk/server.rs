//! The listening socket, one frontend after another, and the way to stop.
//!
//! Owns the socket file. Nothing that a frontend does ends the server: its session ends, and the next one is accepted.

use std::fs;
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};
use tracing::{debug, error, info, warn};
use vhost::vhost_user::{BackendReqHandler, Error};

use crate::device::BlockDevice;
use crate::error::{SessionEnd, SessionError};
use crate::fd::{copy_inherited, wait_readable};
use crate::loss::MemoryLoss;
use crate::memory::RegionInfo;
use crate::message::Envelope;
use crate::metrics::Metrics;
use crate::relay::{Relay, Wakers};
use crate::session::Session;

/// `vhost` has 8 bits for a queue in the messages about its descriptors.
const MAX_QUEUES: u16 = 256;
/// Virtio 1.2, 2.7.
const MAX_QUEUE_SIZE: u16 = 32768;
/// When the host cannot accept (no descriptors left), the next try is after so long.
const ACCEPT_PAUSE: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

/// What a server offers its frontends.
#[derive(Clone, Debug)]
pub struct ServeOptions {
    /// Queues on offer, 1 to 256. Those that no guest uses cost nothing.
    pub num_queues: u16,
    /// The largest ring, in descriptors: a power of two from 2 to 32,768.
    pub queue_size: u16,
    /// How long at most a queue without work looks for some before it sleeps; zero to sleep at once.
    pub poll_max: Duration,
    /// How long a message may take from its first byte to its last.
    pub message_timeout: Duration,
    /// Where the queues count; for at least as many as there are queues.
    pub metrics: Arc<Metrics>,
}

impl ServeOptions {
    /// The defaults, with another number of queues and another size.
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

/// Stops a server from any thread, for good.
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
    /// When the host has no eventfd for us.
    pub fn new() -> io::Result<Self> {
        let event = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let (stopped, connection) = (AtomicBool::new(false), Mutex::new(None));
        Ok(StopHandle { inner: Arc::new(StopInner { event, stopped, connection }) })
    }

    /// Ends the session at hand, drained, and makes `serve` return. May be called more than once.
    pub fn stop(&self) {
        self.inner.stopped.store(true, Ordering::SeqCst);
        let _ = rustix::io::write(&self.inner.event, &1u64.to_ne_bytes());
        if let Some(connection) = &*self.connection() {
            let _ = connection.shutdown(Shutdown::Both);
        }
    }

    /// True from the first [`StopHandle::stop`] on.
    pub fn is_stopped(&self) -> bool {
        self.inner.stopped.load(Ordering::SeqCst)
    }

    fn connection(&self) -> std::sync::MutexGuard<'_, Option<UnixStream>> {
        self.inner.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes note of the socket to shut down; if the stop came first, it is shut down now.
    fn enter(&self, stream: &UnixStream) -> io::Result<()> {
        *self.connection() = Some(stream.try_clone()?);
        if self.is_stopped() {
            let _ = stream.shutdown(Shutdown::Both);
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

/// Where frontends come from.
#[derive(Debug)]
pub struct Server {
    source: Source,
}

#[derive(Debug)]
enum Source {
    /// With the socket file that goes when the server does, if it is ours.
    Listening { listener: UnixListener, _file: Option<SocketFile> },
    /// One frontend, and no other after it.
    Connected(UnixStream),
}

/// A socket file that we made and that we remove, if it is still ours.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    identity: (u64, u64),
}

impl Server {
    /// Listens on a new socket file. One that is there already is replaced only if nobody accepts on it.
    ///
    /// # Errors
    /// When somebody does, when something else is in the way, or when the host refuses.
    pub fn bind(path: impl AsRef<Path>) -> Result<Self, SessionError> {
        let path = path.as_ref();
        let failed = |step, source| SessionError::Socket { path: path.to_owned(), step, source };
        match fs::symlink_metadata(path) {
            Ok(metadata) if !metadata.file_type().is_socket() => {
                return Err(SessionError::NotASocket { path: path.to_owned() });
            }
            Ok(_) => {
                if is_served(path).map_err(|error| failed("look who listens", error))? {
                    return Err(SessionError::SocketInUse { path: path.to_owned() });
                }
                info!("replacing the stale socket {}", path.display());
                fs::remove_file(path).map_err(|error| failed("remove the stale file", error))?;
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed("stat it", error)),
        }
        let listener = UnixListener::bind(path).map_err(|error| failed("bind it", error))?;
        let metadata = fs::symlink_metadata(path).map_err(|error| failed("stat it", error))?;
        let file = SocketFile { path: path.to_owned(), identity: (metadata.dev(), metadata.ino()) };
        let server = Server { source: Source::Listening { listener, _file: Some(file) } };
        server.set_nonblocking().map_err(|error| failed("set it up", error))?;
        Ok(server)
    }

    /// Uses a socket that is listening already, or that one frontend is connected to already.
    ///
    /// # Errors
    /// When it is no unix stream socket.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, SessionError> {
        let wrong = |error: rustix::io::Errno| SessionError::InheritedFd { source: error.into() };
        let domain = sockopt::socket_domain(&fd).map_err(wrong)?;
        let kind = sockopt::socket_type(&fd).map_err(wrong)?;
        if domain != AddressFamily::UNIX || kind != SocketType::STREAM {
            return Err(wrong(rustix::io::Errno::PROTOTYPE));
        }
        let source = if sockopt::socket_acceptconn(&fd).map_err(wrong)? {
            Source::Listening { listener: fd.into(), _file: None }
        } else {
            Source::Connected(fd.into())
        };
        let server = Server { source };
        server.set_nonblocking().map_err(|source| SessionError::InheritedFd { source })?;
        Ok(server)
    }

    /// As [`Server::from_fd`], with a descriptor by its number, as a parent process leaves it. It is copied, and stays
    /// open itself.
    ///
    /// # Errors
    /// When it is no unix stream socket.
    pub fn from_inherited(fd: RawFd) -> Result<Self, SessionError> {
        Self::from_fd(copy_inherited(fd).map_err(|source| SessionError::InheritedFd { source })?)
    }

    /// Serves one frontend after another on the calling thread until it is told to stop, or until the only frontend,
    /// where there can be but one, has left. Every request that was taken is done on return.
    ///
    /// # Errors
    /// When the options are impossible, or no frontend can be waited for.
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
                run_session(stream, device, options, stop);
            }
            Source::Listening { listener, .. } => {
                while let Some(stream) = accept(listener, stop)? {
                    run_session(stream, device, options, stop);
                }
            }
        }
        Ok(())
    }

    /// A listener must not block when a frontend that was there is gone; a connection must block.
    fn set_nonblocking(&self) -> io::Result<()> {
        match &self.source {
            Source::Listening { listener, .. } => listener.set_nonblocking(true),
            Source::Connected(stream) => stream.set_nonblocking(false),
        }
    }
}

/// Serves one frontend after another: [`Server::serve`] for those who have no use for the server afterwards.
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

impl Drop for SocketFile {
    fn drop(&mut self) {
        let ours = fs::symlink_metadata(&self.path)
            .is_ok_and(|metadata| (metadata.dev(), metadata.ino()) == self.identity);
        if ours {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// True if somebody listens on the socket file.
fn is_served(path: &Path) -> io::Result<bool> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    match rustix::net::connect(&socket, &SocketAddrUnix::new(path)?) {
        // AGAIN: the queue of those who wait to be accepted is full.
        Ok(()) | Err(rustix::io::Errno::AGAIN) => Ok(true),
        Err(rustix::io::Errno::CONNREFUSED) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Waits for a frontend; `None` on a stop.
fn accept(listener: &UnixListener, stop: &StopHandle) -> Result<Option<UnixStream>, SessionError> {
    loop {
        let (_, stopped) = wait_readable(listener, stop)
            .map_err(|source| SessionError::Wait { step: "wait for a frontend", source })?;
        if stopped || stop.is_stopped() {
            return Ok(None);
        }
        match listener.accept() {
            Ok((stream, _)) => match stream.set_nonblocking(false) {
                Ok(()) => return Ok(Some(stream)),
                Err(error) => warn!(%error, "a frontend's socket cannot be set up"),
            },
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => {
                warn!(%error, "cannot accept a frontend");
                let mut fds = [PollFd::new(stop, PollFlags::IN)];
                let _ = rustix::event::poll(&mut fds, Some(&ACCEPT_PAUSE));
            }
        }
    }
}

/// Serves one frontend until it leaves, sends what ends a session, or the server stops.
fn run_session<D: BlockDevice>(
    stream: UnixStream,
    device: &Arc<D>,
    options: &ServeOptions,
    stop: &StopHandle,
) {
    info!("a frontend connected");
    let loss = match MemoryLoss::new() {
        Ok(loss) => Arc::new(loss),
        Err(error) => return warn!(%error, "no eventfd for the session; the frontend is turned away"),
    };
    let session = Session::new(Arc::clone(device), options.clone(), Arc::clone(&loss));
    let session = Arc::new(Mutex::new(session));
    match handle_messages(&stream, &session, &loss, stop) {
        SessionEnd::Left | SessionEnd::Stopped => info!("the frontend left, or has to"),
        SessionEnd::MemoryLost => tell_loss(&session),
        end => warn!(error = %end, "the session ends"),
    }
    session.lock().unwrap_or_else(PoisonError::into_inner).close();
    stop.leave();
    // An inherited connection has another descriptor that stays open: the frontend must see the end all the same.
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
    loop {
        let message = match relay.receive(&wakers) {
            Ok(message) => message,
            Err(_) if stop.is_stopped() => return SessionEnd::Stopped,
            Err(end) => return end,
        };
        let lock = || session.lock().unwrap_or_else(PoisonError::into_inner);
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
