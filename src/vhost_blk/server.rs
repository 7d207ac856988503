//! The listening socket and the loop that serves one frontend after another.
//!
//! Owns the socket file. No frontend can end the server: only its own session ends, and the next frontend is accepted.

use std::net::Shutdown;
use std::os::fd::{AsFd as _, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Instant;

use rustix::net::{AddressFamily, SocketType, sockopt};
use tracing::{debug, error, info, warn};
use vhost::vhost_user::{BackendReqHandler, Error};

use crate::device::BlockDevice;
use crate::door::{Door, Leaving, Visitor};
use crate::error::{SessionEnd, SessionError};
use crate::fd::{close_inherited, copy_inherited};
use crate::loss::MemoryLoss;
use crate::memory::RegionInfo;
use crate::message::Envelope;
use crate::options::ServeOptions;
use crate::peer::{self, Peer};
use crate::pulse::{Pulse, Stage};
use crate::relay::{Relay, Wakers};
use crate::session::Session;
use crate::socket_file::Listening;
use crate::stop::StopHandle;

/// Where frontends come from.
#[derive(Debug)]
pub struct Server {
    source: Source,
}

#[derive(Debug)]
enum Source {
    /// Taken by `serve`, which closes it or puts it back to be handed over.
    Listening(Mutex<Option<Entrance>>),
    /// One frontend, and no other after it.
    Connected(UnixStream),
}

/// A listening socket, and a frontend that was accepted there and not served.
#[derive(Debug)]
struct Entrance {
    listening: Listening,
    waiting: Option<UnixStream>,
}

/// The sockets that one daemon hands over to another.
#[derive(Debug)]
pub struct Sockets {
    /// The listening socket.
    pub listener: OwnedFd,
    /// A frontend that was accepted there and has sent nothing yet.
    pub waiting: Option<OwnedFd>,
}

impl Server {
    fn listening(listening: Listening, waiting: Option<UnixStream>) -> Self {
        Server { source: Source::Listening(Mutex::new(Some(Entrance { listening, waiting }))) }
    }

    /// Listens on a new socket file. An existing socket file is replaced only if no process accepts on it.
    ///
    /// # Errors
    /// When a process accepts on it, when the path holds something else, or when the host refuses.
    pub fn bind(path: impl AsRef<Path>) -> Result<Self, SessionError> {
        Ok(Self::listening(Listening::bind(path.as_ref())?, None))
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
            return Ok(Self::listening(Listening::inherited(fd.into()).map_err(failed)?, None));
        }
        let stream = UnixStream::from(fd);
        stream.set_nonblocking(false).map_err(failed)?;
        Ok(Server { source: Source::Connected(stream) })
    }

    /// Uses the sockets that another daemon has handed over, and the listening socket's file at `path`.
    ///
    /// # Errors
    /// When they are not unix stream sockets of the right kind, or the file is gone.
    pub fn taken_over(sockets: Sockets, path: &Path) -> Result<Self, SessionError> {
        let wrong = |source| SessionError::InheritedFd { source };
        let Sockets { listener: fd, waiting } = sockets;
        match sockopt::socket_acceptconn(&fd) {
            Ok(true) if sockopt::socket_domain(&fd) == Ok(AddressFamily::UNIX) => {}
            Ok(_) => return Err(wrong(rustix::io::Errno::PROTOTYPE.into())),
            Err(error) => return Err(wrong(error.into())),
        }
        let listening = Listening::taken_over(fd.into(), path).map_err(wrong)?;
        let waiting = waiting.filter(|fd| sockopt::socket_domain(fd) == Ok(AddressFamily::UNIX));
        Ok(Self::listening(listening, waiting.map(UnixStream::from)))
    }

    /// Copies of the sockets that are not being served, to be handed over to another process: after
    /// [`StopHandle::hand_over`]. `None` if there are none.
    ///
    /// # Errors
    /// When the host refuses a descriptor.
    pub fn sockets(&self) -> std::io::Result<Option<Sockets>> {
        let Source::Listening(entrance) = &self.source else { return Ok(None) };
        let entrance = entrance.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(Entrance { listening, waiting }) = &*entrance else { return Ok(None) };
        let waiting = waiting.as_ref().map(UnixStream::try_clone).transpose()?;
        Ok(Some(Sockets {
            listener: listening.listener.try_clone()?.into(),
            waiting: waiting.map(Into::into),
        }))
    }

    /// The other process serves: the socket's file is its own.
    pub fn leave(self) {
        if let Source::Listening(entrance) = self.source {
            let entrance = entrance.into_inner().unwrap_or_else(PoisonError::into_inner);
            entrance.into_iter().for_each(|entrance| entrance.listening.leave());
        }
    }

    /// As [`Server::from_fd`], for a descriptor number that a parent process left open. The descriptor is copied, and
    /// the original closed: a stop must be able to close the listener.
    ///
    /// # Errors
    /// When it is not a unix stream socket.
    pub fn from_inherited(fd: RawFd) -> Result<Self, SessionError> {
        let failed = |source| SessionError::InheritedFd { source };
        let server = Self::from_fd(copy_inherited(fd).map_err(failed)?)?;
        close_inherited(fd).map_err(failed)?;
        Ok(server)
    }

    /// Gives up serving, and keeps the listening socket: for another protocol.
    ///
    /// # Errors
    /// When the socket is connected.
    pub fn into_listening(self) -> Result<Listening, SessionError> {
        match self.source {
            Source::Connected(_) => Err(SessionError::NotListening),
            Source::Listening(entrance) => {
                let taken = entrance.into_inner().unwrap_or_else(PoisonError::into_inner);
                taken.map(|entrance| entrance.listening).ok_or(SessionError::NotListening)
            }
        }
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
                let visitor = Visitor { peer: Peer::of(&stream), stream };
                run_session(visitor, None, device, options, stop);
                Ok(())
            }
            Source::Listening(entrance) => {
                let slot = || entrance.lock().unwrap_or_else(PoisonError::into_inner);
                let Some(taken) = slot().take() else { return Ok(()) };
                let kept = serve_all(taken, device, options, stop)?;
                *slot() = kept;
                Ok(())
            }
        }
    }
}

/// Serves one frontend after another until the server stops. Returns the listener if it is to be handed over.
fn serve_all<D: BlockDevice>(
    Entrance { listening, waiting }: Entrance,
    device: &Arc<D>,
    options: &ServeOptions,
    stop: &StopHandle,
) -> Result<Option<Entrance>, SessionError> {
    let failed = |source| SessionError::Wait { step: "set the wait for frontends up", source };
    let door = Door::new(waiting).map_err(failed)?;
    thread::scope(|scope| -> Result<(), SessionError> {
        let keep = || door.keep(listening, stop);
        thread::Builder::new().name("strata-door".to_owned()).spawn_scoped(scope, keep).map_err(failed)?;
        let _leaving = Leaving(&door);
        while let Some(visitor) = door.next()? {
            run_session(visitor, Some(&door), device, options, stop);
            door.left();
        }
        Ok(())
    })
    .map(|()| door.take_kept().map(|(listening, waiting)| Entrance { listening, waiting }))
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
    visitor: Visitor,
    door: Option<&Door>,
    device: &Arc<D>,
    options: &ServeOptions,
    stop: &StopHandle,
) {
    let Visitor { stream, peer } = &visitor;
    info!("a frontend connected ({peer})");
    let began = Instant::now();
    let loss = match MemoryLoss::new() {
        Ok(loss) => Arc::new(loss),
        Err(error) => return warn!(%error, "no eventfd for the session; the frontend is turned away"),
    };
    let (its_stream, its_stop) = match stream.try_clone() {
        Ok(stream) => (stream, stop.clone()),
        Err(error) => return warn!(%error, "no descriptor for the session; the frontend is turned away"),
    };
    let hurry = move || its_stop.is_stopped() || peer::has_hung_up(&its_stream);
    let session = Session::new(Arc::clone(device), options.clone(), Arc::clone(&loss), hurry);
    let session = Arc::new(Mutex::new(session));
    let pulse = &options.pulse;
    pulse.tell(Stage::Attached);
    let end = handle_messages(stream, &session, &loss, door, stop, pulse);
    pulse.session.rest();
    pulse.tell(Stage::Draining);
    let seconds = began.elapsed().as_secs();
    match end {
        SessionEnd::Left | SessionEnd::Stopped | SessionEnd::Unheard => {
            info!("the session of {seconds} s ends ({peer}): {end}");
        }
        SessionEnd::MemoryLost => tell_loss(&session),
        _ => warn!("the session of {seconds} s ends ({peer}): {end}"),
    }
    if let Some(door) = door {
        door.ending();
        if stop.is_stopped() {
            // First the listener, then the drain, and then the hang-up. A frontend that reconnects at once must not
            // enter the backlog of a socket that is no longer served.
            door.wait_closed();
        }
    }
    session.lock().unwrap_or_else(PoisonError::into_inner).close();
    stop.leave();
    if let (SessionEnd::Unheard, Some(door)) = (&end, door) {
        return door.put_back(visitor);
    }
    // An inherited connection has another descriptor that stays open, but the frontend must still see the end.
    let _ = stream.shutdown(Shutdown::Both);
    if !stop.is_stopped() && door.is_some() {
        pulse.tell(Stage::Waiting);
    }
    debug!("session closed");
}

fn tell_loss<D: BlockDevice>(session: &Mutex<Session<D>>) {
    let session = session.lock().unwrap_or_else(PoisonError::into_inner);
    let which = match session.lost_region() {
        Some(RegionInfo { guest, size, .. }) => format!("the memory region at {guest:#x} of {size:#x} bytes"),
        None if session.lost_in_flight_region() => "the in-flight region".to_owned(),
        None if session.lost_log() => "the dirty log".to_owned(),
        None => "a memory region that was removed".to_owned(),
    };
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
    pulse: &Pulse,
) -> SessionEnd {
    let limit = session.lock().unwrap_or_else(PoisonError::into_inner).message_timeout();
    let (relay, ours) = match Relay::new(stream, limit) {
        Ok(relay) => relay,
        Err(error) => return SessionEnd::Socket(error),
    };
    let mut handler = BackendReqHandler::from_stream(ours, Arc::clone(session));
    let wakers = Wakers { stop: stop.as_fd(), loss: loss.event() };
    let mut heard = false;
    loop {
        pulse.session.rest();
        let message = match relay.receive(&wakers) {
            Ok(message) => message,
            Err(SessionEnd::Stopped) if stop.hands_over() && !relay.has_heard() => {
                return SessionEnd::Unheard;
            }
            Err(_) if stop.is_stopped() => return SessionEnd::Stopped,
            Err(end) => return end,
        };
        pulse.session.step();
        let lock = || session.lock().unwrap_or_else(PoisonError::into_inner);
        if !std::mem::replace(&mut heard, true) {
            // Not before: a stop shuts the socket down, and one that was not heard goes on with another server.
            if let Err(error) = stop.enter(stream) {
                return SessionEnd::Socket(error);
            }
            door.inspect(|door| door.heard());
        }
        lock().begin_message(Envelope::parse(&message.bytes), message.channel());
        let handed = relay.hand_over(&message);
        drop(message);
        let handled = handed.map_err(Error::SocketError).and_then(|()| handler.handle_request());
        // A frontend that does not read its replies keeps the thread waiting, not stuck.
        pulse.session.rest();
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
