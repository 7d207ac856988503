//! The door: accepts frontends on its own thread, admits one at a time, and turns the others away.
//!
//! When the server stops, the door closes first, before a session is drained or hung up on. A frontend that reconnects
//! at once then finds no listener, and retries until the next daemon has one.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};
use tracing::{debug, warn};

use crate::error::SessionError;
use crate::line_limit::LineLimit;
use crate::peer::{self, Peer};
use crate::socket_file::Listening;
use crate::stop::StopHandle;

/// A frontend without a first message after so long is dropped.
const SILENCE_MAX: Duration = Duration::from_secs(10);
/// When the host cannot accept (no descriptors left), the pause before the next try.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// The most connections that are accepted between two looks for a stop: a process may connect as fast as they are accepted.
const ACCEPTS_MAX: usize = 16;
/// The shortest time between two warnings about the same process.
const WARN_PAUSE: Duration = Duration::from_secs(60);
/// The most warnings about frontends that are refused, in each [`WARN_PAUSE`].
const WARNINGS_MAX: u32 = 8;

/// An admitted frontend.
#[derive(Debug)]
pub(crate) struct Visitor {
    pub stream: UnixStream,
    pub peer: Peer,
}

/// The state that the door's thread and the session's thread share.
#[derive(Debug)]
pub(crate) struct Door {
    /// A leaf.
    state: Mutex<State>,
    changed: Condvar,
    /// Wakes the door's thread.
    wake: OwnedFd,
    silence_max: Duration,
}

#[derive(Debug, Default)]
struct State {
    /// The frontend in service.
    inside: Option<Inside>,
    /// The next frontend.
    next: Option<Visitor>,
    /// No frontend is admitted any more: the door must close.
    closing: bool,
    /// The listener is gone, or accepts no more.
    closed: bool,
    /// The listener, if it is to be handed over. Then so is the next frontend.
    kept: Option<Listening>,
    failed: Option<io::Error>,
}

#[derive(Debug)]
struct Inside {
    stream: UnixStream,
    peer: Peer,
    /// The time limit for the first message; none once it has arrived.
    deadline: Option<Instant>,
    ending: bool,
}

impl Inside {
    /// True if this frontend is leaving, so that the next one gets its place soon.
    fn is_going(&self) -> bool {
        self.ending || peer::has_hung_up(&self.stream)
    }
}

impl Door {
    /// A door behind which this frontend waits already.
    pub fn new(waiting: Option<UnixStream>) -> io::Result<Self> {
        let door = Self::with_silence_max(SILENCE_MAX)?;
        door.state().next = waiting.map(|stream| Visitor { peer: Peer::of(&stream), stream });
        Ok(door)
    }

    fn with_silence_max(silence_max: Duration) -> io::Result<Self> {
        let wake = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Door { state: Mutex::default(), changed: Condvar::new(), wake, silence_max })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// Waits for a frontend; `None` when the door is closed.
    pub fn next(&self) -> Result<Option<Visitor>, SessionError> {
        let mut state = self.state();
        loop {
            if let Some(source) = state.failed.take() {
                return Err(SessionError::Wait { step: "wait for a frontend", source });
            }
            if state.closed {
                return Ok(None);
            }
            let Some(visitor) = state.next.take() else {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            match visitor.stream.try_clone() {
                Ok(stream) => {
                    let (peer, deadline) =
                        (visitor.peer.clone(), Instant::now().checked_add(self.silence_max));
                    state.inside = Some(Inside { stream, peer, deadline, ending: false });
                    drop(state);
                    self.wake();
                    return Ok(Some(visitor));
                }
                Err(error) => {
                    warn!(%error, "the frontend ({}) is dropped: no descriptor for it", visitor.peer);
                }
            }
        }
    }

    /// The frontend inside has sent a message.
    pub fn heard(&self) {
        if let Some(inside) = &mut self.state().inside {
            inside.deadline = None;
        }
    }

    /// The session is ending: new frontends wait for its end.
    pub fn ending(&self) {
        if let Some(inside) = &mut self.state().inside {
            inside.ending = true;
        }
    }

    /// The session has ended.
    pub fn left(&self) {
        self.state().inside = None;
    }

    /// The frontend inside has not sent anything yet: it is the next one again, for another server.
    pub fn put_back(&self, visitor: Visitor) {
        self.state().next.get_or_insert(visitor);
    }

    /// The listener that was kept to be handed over, and the frontend that was accepted and not served.
    pub fn take_kept(&self) -> Option<(Listening, Option<UnixStream>)> {
        let mut state = self.state();
        let next = state.next.take().map(|visitor| visitor.stream);
        state.kept.take().map(|listening| (listening, next))
    }

    /// Waits until the listener is gone, or accepts no more.
    pub fn wait_closed(&self) {
        let state = self.state();
        drop(self.changed.wait_while(state, |state| !state.closed).unwrap_or_else(PoisonError::into_inner));
    }

    /// Admits frontends until the server stops or no thread serves them any more. On return the socket file and the
    /// listener are gone, unless they are to be handed over ([`Door::take_kept`]).
    pub fn keep(&self, listening: Listening, stop: &StopHandle) {
        let mut porter = Porter::new(self);
        let failed = loop {
            match porter.wait(&listening, stop) {
                Ok(true) => porter.answer(&listening),
                Ok(false) => break None,
                Err(error) => break Some(error),
            }
        };
        let hands_over = stop.hands_over();
        let kept = if hands_over {
            Some(listening)
        } else {
            drop(listening);
            None
        };
        let mut state = self.state();
        (state.closed, state.failed, state.kept) = (true, failed, kept);
        state.next.take_if(|_| !hands_over);
        drop(state);
        self.changed.notify_all();
    }
}

/// Closes the door when the session's thread leaves, for any reason.
pub(crate) struct Leaving<'a>(pub &'a Door);

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        self.0.state().closing = true;
        self.0.wake();
    }
}

/// The door's thread.
struct Porter<'a> {
    door: &'a Door,
    /// The last accept failed on the host.
    failing: bool,
    /// The last process that was turned away with a warning, and the time.
    warned: Option<(Peer, Instant)>,
    /// Limits the warnings about different processes.
    warnings: LineLimit,
}

impl<'a> Porter<'a> {
    fn new(door: &'a Door) -> Self {
        Porter { door, failing: false, warned: None, warnings: LineLimit::new(WARNINGS_MAX, WARN_PAUSE) }
    }

    /// Sleeps until there is work. False: the door must close.
    fn wait(&self, listening: &Listening, stop: &StopHandle) -> io::Result<bool> {
        let deadline = self.door.state().inside.as_ref().and_then(|inside| inside.deadline);
        let until = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let timeout = if self.failing { Some(ACCEPT_PAUSE) } else { until };
        // At least a millisecond, so that a deadline is over after the wait.
        let timeout = timeout.map(|timeout| timeout.max(Duration::from_millis(1)));
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        let mut fds = [
            PollFd::new(stop, PollFlags::IN),
            PollFd::new(&self.door.wake, PollFlags::IN),
            PollFd::new(&listening.listener, PollFlags::IN),
        ];
        let watched = if self.failing { &mut fds[..2] } else { &mut fds[..] };
        match rustix::event::poll(watched, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let _ = rustix::io::read(&self.door.wake, &mut [0; 8]);
        let mut state = self.door.state();
        drop_silent(&mut state, self.door.silence_max);
        Ok(!stop.is_stopped() && !state.closing)
    }

    /// Accepts waiting connections, a bounded number of them. The next wait ends at once if more are waiting.
    fn answer(&mut self, listening: &Listening) {
        for _ in 0..ACCEPTS_MAX {
            match listening.listener.accept() {
                Ok((stream, _)) => self.receive(stream),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                // The connection is gone already.
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) => {
                    if !self.failing {
                        warn!(%error, open_files = open_files_limit(), "cannot accept a frontend; trying again");
                    }
                    self.failing = true;
                    return;
                }
            }
        }
        self.failing = false;
    }

    fn receive(&mut self, stream: UnixStream) {
        let peer = Peer::of(&stream);
        if let Err(error) = stream.set_nonblocking(false) {
            warn!(%error, "the frontend ({peer}) is dropped: its socket cannot be set up");
            return;
        }
        let mut state = self.door.state();
        let inside = match &state.inside {
            _ if state.next.as_ref().is_some_and(|next| !peer::has_hung_up(&next.stream)) => {
                "another is waiting already".to_owned()
            }
            Some(inside) if !inside.is_going() => format!("the disk serves another ({})", inside.peer),
            _ => {
                state.next = Some(Visitor { stream, peer });
                drop(state);
                self.door.changed.notify_all();
                return;
            }
        };
        drop(state);
        self.tell_refused(peer, &inside);
    }

    /// Logs a refused frontend. Neither one process nor many can fill the log so.
    fn tell_refused(&mut self, peer: Peer, why: &str) {
        let now = Instant::now();
        let again = self
            .warned
            .as_ref()
            .is_some_and(|(who, when)| who.is(&peer) && now.saturating_duration_since(*when) < WARN_PAUSE);
        if again || !self.warnings.admits(now) {
            debug!("refused a frontend ({peer}) again: {why}");
            return;
        }
        warn!("refused a frontend ({peer}): {why}. A disk has one frontend at a time");
        self.warned = Some((peer, now));
    }
}

/// Hangs up on a frontend whose first message is overdue.
fn drop_silent(state: &mut State, silence_max: Duration) {
    let Some(inside) = &mut state.inside else { return };
    if inside.deadline.is_some_and(|deadline| Instant::now() >= deadline) {
        warn!("the frontend ({}) has sent no message for {} s: dropped", inside.peer, silence_max.as_secs());
        (inside.deadline, inside.ending) = (None, true);
        let _ = inside.stream.shutdown(std::net::Shutdown::Both);
    }
}

/// The most files that the process may have open at a time.
fn open_files_limit() -> Option<u64> {
    rustix::process::getrlimit(rustix::process::Resource::Nofile).current
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn a_silent_frontend_is_dropped_and_one_that_was_heard_stays() {
        let folder = tempfile::tempdir().expect("a folder");
        let (path, listening) = listen(&folder);
        let door = Door::with_silence_max(Duration::from_millis(40)).expect("a door");
        let stop = StopHandle::new().expect("a stop handle");
        std::thread::scope(|scope| {
            scope.spawn(|| door.keep(listening, &stop));
            let _leaving = Leaving(&door);
            let enter = || {
                let mut frontend = UnixStream::connect(&path).expect("connected");
                frontend.set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout");
                let visitor = door.next().expect("no failure").expect("a frontend");
                (move || frontend.read(&mut [0; 1]).expect("hung up on, in time"), visitor)
            };
            let (mut read, _visitor) = enter();
            assert_eq!(read(), 0);
            door.left();
            let (read, visitor) = enter();
            door.heard();
            // Long enough to pass the deadline that it would have had.
            std::thread::scope(|scope| {
                let reading = scope.spawn(read);
                let end = Instant::now() + Duration::from_millis(120);
                while Instant::now() < end {
                    assert!(!reading.is_finished(), "it was heard");
                    std::thread::yield_now();
                }
                visitor.stream.shutdown(std::net::Shutdown::Both).expect("shut down");
            });
            stop.stop();
            assert!(door.next().expect("no failure").is_none());
        });
        assert!(!path.exists());
    }
    fn listen(folder: &tempfile::TempDir) -> (std::path::PathBuf, Listening) {
        let path = folder.path().join("s");
        let listening = Listening::bind(&path).expect("bound");
        (path, listening)
    }

    /// Else a process that connects as fast as connections are accepted keeps the thread from the next look for a stop.
    #[test]
    fn the_door_looks_for_a_stop_between_connections() {
        let folder = tempfile::tempdir().expect("a folder");
        let (path, listening) = listen(&folder);
        let door = Door::new(None).expect("a door");
        let mut porter = Porter::new(&door);
        let flood: Vec<_> =
            (0..3 * ACCEPTS_MAX).map(|_| UnixStream::connect(&path).expect("connected")).collect();
        porter.answer(&listening);
        let mut left = 0;
        while listening.listener.accept().is_ok() {
            left += 1;
        }
        assert_eq!(left, flood.len() - ACCEPTS_MAX);
    }

    #[test]
    fn a_frontend_that_left_while_it_waited_keeps_no_other_out() {
        let folder = tempfile::tempdir().expect("a folder");
        let (path, listening) = listen(&folder);
        let door = Door::new(None).expect("a door");
        let mut porter = Porter::new(&door);
        let mut connect = || {
            let frontend = UnixStream::connect(&path).expect("connected");
            porter.answer(&listening);
            frontend
        };
        drop(connect());
        let mut alive = connect();
        let mut third = connect();
        third.set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout");
        assert_eq!(third.read(&mut [0; 1]).expect("hung up on"), 0, "one is waiting already");
        let visitor = door.next().expect("no failure").expect("a frontend");
        visitor.stream.shutdown(std::net::Shutdown::Both).expect("shut down");
        alive.set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout");
        assert_eq!(alive.read(&mut [0; 1]).expect("hung up on"), 0, "it was the one admitted");
    }
}
