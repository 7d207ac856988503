//! A planned restart: a new daemon takes the socket and the image over from the one that serves.
//!
//! Every daemon that created its socket file listens on a second socket beside it. A new daemon (`--replace`) that has
//! looked at its options and its image connects there. The old one stops as at SIGTERM, but keeps the listener open: a
//! frontend that connects meanwhile waits in its backlog. When the image is closed, the old daemon passes the listener
//! (SCM_RIGHTS), and the new one opens the image and serves. If the new one ends before that, the old one serves again.
//!
//! Owns that conversation. Only processes of the same user, or of root, are heard (SO_PEERCRED). It never touches an image.

use std::ffi::OsString;
use std::io::{self, IoSlice, IoSliceMut, Read as _, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, sockopt,
};
use rustix::process::{PidfdFlags, getpid, pidfd_open};
use tracing::{info, warn};
use vhost_blk::Sockets;

use crate::limits::SOCKET_PATH_MAX;

/// What the socket's name has in addition.
const SUFFIX: &str = ".handover";
/// The messages: one byte each. The new daemon asks for the place; its [`Terms`] come with this.
const ASK: u8 = b'A';
/// The old one goes on: the guest could not live with these terms. Which one comes with this, as an index of [`REASONS`].
const REFUSE: u8 = b'R';
/// The old one has closed the image; the [`Sockets`] come with this, the listener first.
const GIVE: u8 = b'G';
/// The new one serves.
const SERVE: u8 = b'S';
/// The most sockets that are passed: the listener, and a frontend that was accepted and not heard yet.
const SOCKETS_MAX: usize = 2;
/// How long a daemon waits for the first message of a process that has connected.
const ASK_PATIENCE: Duration = Duration::from_secs(5);
/// How long the old daemon may take to stop, and the new one to open the image.
const PATIENCE: Duration = Duration::from_secs(120);

/// Why terms are refused.
const REASONS: [&str; 4] = [
    "it serves another image",
    "it offers more queues, and the guest may use them (--num-queues)",
    "it offers larger rings, and the guest may use them (--queue-size)",
    "the guest would see another kind of disk (--read-only, --logical-block-size)",
];

/// What a guest relies on that goes on with another daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms {
    /// The device of the image file.
    pub device: u64,
    /// The inode of the image file.
    pub inode: u64,
    /// Queues on offer.
    pub queues: u16,
    /// Descriptors of the largest ring.
    pub queue_size: u16,
    /// Bytes of a logical block.
    pub block: u32,
    /// Nothing may be written.
    pub read_only: bool,
}

impl Terms {
    const BYTES: usize = 25;

    fn to_bytes(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..8].copy_from_slice(&self.device.to_ne_bytes());
        bytes[8..16].copy_from_slice(&self.inode.to_ne_bytes());
        bytes[16..18].copy_from_slice(&self.queues.to_ne_bytes());
        bytes[18..20].copy_from_slice(&self.queue_size.to_ne_bytes());
        bytes[20..24].copy_from_slice(&self.block.to_ne_bytes());
        bytes[24] = u8::from(self.read_only);
        bytes
    }

    fn from_bytes(bytes: [u8; Self::BYTES]) -> Self {
        let [d0, d1, d2, d3, d4, d5, d6, d7, i0, i1, i2, i3, i4, i5, i6, i7, rest @ ..] = bytes;
        let [q0, q1, s0, s1, b0, b1, b2, b3, read_only] = rest;
        Terms {
            device: u64::from_ne_bytes([d0, d1, d2, d3, d4, d5, d6, d7]),
            inode: u64::from_ne_bytes([i0, i1, i2, i3, i4, i5, i6, i7]),
            queues: u16::from_ne_bytes([q0, q1]),
            queue_size: u16::from_ne_bytes([s0, s1]),
            block: u32::from_ne_bytes([b0, b1, b2, b3]),
            read_only: read_only != 0,
        }
    }

    /// The index in [`REASONS`] of what keeps a guest from going on under new terms.
    fn refusal(&self, new: &Terms) -> Option<u8> {
        let broken = [
            (new.device, new.inode) != (self.device, self.inode),
            new.queues < self.queues,
            new.queue_size < self.queue_size,
            (new.block, new.read_only) != (self.block, self.read_only),
        ];
        broken.iter().position(|broken| *broken).map(|index| index as u8)
    }
}

/// The path of the second socket; none if it would be too long.
fn handover_path(socket: &Path) -> Option<PathBuf> {
    let mut name = OsString::from(socket);
    name.push(SUFFIX);
    (name.as_bytes().len() <= SOCKET_PATH_MAX).then(|| name.into())
}

/// The old daemon's side: waits for a successor on a thread. Dropping it ends that.
pub struct Offer {
    thread: Option<JoinHandle<()>>,
    end: OwnedFd,
}

/// A daemon that is about to serve in our place.
#[derive(Debug)]
pub struct Successor(UnixStream);

/// The daemon that is about to stop for us.
#[derive(Debug)]
pub struct Predecessor {
    stream: UnixStream,
    /// Its process, if it can be seen from here.
    process: Option<OwnedFd>,
}

impl Offer {
    /// Listens next to the socket, which this process owns. `asked` is called once, with a successor under which the
    /// guest keeps these terms. Without a second socket the daemon serves all the same, and cannot be replaced.
    pub fn start(
        socket: &Path,
        terms: Terms,
        asked: impl FnOnce(Successor) + Send + 'static,
    ) -> io::Result<Option<Self>> {
        let Some(path) = handover_path(socket) else {
            info!("the socket's path is so long that this daemon cannot be replaced while it serves");
            return Ok(None);
        };
        // Only a daemon that is gone can have left it: this process owns the socket that it stands beside.
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(&path)?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
        listener.set_nonblocking(true)?;
        let end = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let its_end = end.try_clone()?;
        let thread = thread::Builder::new().name("strata-handover".to_owned()).spawn(move || {
            let found = wait_for_successor(&listener, &its_end, &terms);
            // Before anybody else may bind it.
            let _ = std::fs::remove_file(&path);
            drop(listener);
            if let Some(successor) = found {
                asked(successor);
            }
        })?;
        Ok(Some(Offer { thread: Some(thread), end }))
    }
}

impl Drop for Offer {
    fn drop(&mut self) {
        let _ = rustix::io::write(&self.end, &1u64.to_ne_bytes());
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            warn!("the thread that waits for a successor ended in a panic");
        }
    }
}

fn wait_for_successor(listener: &UnixListener, end: &OwnedFd, terms: &Terms) -> Option<Successor> {
    loop {
        let mut fds = [PollFd::new(end, PollFlags::IN), PollFd::new(listener, PollFlags::IN)];
        match poll(&mut fds, None) {
            Ok(_) if !fds[0].revents().is_empty() => return None,
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => {
                warn!(%error, "cannot wait for a successor");
                return None;
            }
        }
        match listener.accept() {
            Ok((stream, _)) => match hear(stream, terms, end) {
                Ok(successor) => return Some(successor),
                Err(error) => warn!(%error, "a process on the handover socket is not heard"),
            },
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => {
                warn!(%error, "cannot accept a successor");
                return None;
            }
        }
    }
}

/// True if the process at the other end belongs to this user or to root.
fn is_trusted(stream: impl AsFd) -> io::Result<bool> {
    let uid = sockopt::socket_peercred(stream)?.uid;
    Ok(uid.is_root() || uid == rustix::process::geteuid())
}

/// Hears the process at the other end, but not past the end of this daemon's service.
fn hear(mut stream: UnixStream, terms: &Terms, end: &OwnedFd) -> io::Result<Successor> {
    if !is_trusted(&stream)? {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, "it belongs to another user"));
    }
    stream.set_nonblocking(true)?;
    let (mut message, mut wanted) = ([0], [0; Terms::BYTES]);
    read_before(&stream, &mut message, end)?;
    if message != [ASK] {
        return Err(io::ErrorKind::InvalidData.into());
    }
    read_before(&stream, &mut wanted, end)?;
    stream.set_nonblocking(false)?;
    match terms.refusal(&Terms::from_bytes(wanted)) {
        None => Ok(Successor(stream)),
        Some(reason) => {
            stream.write_all(&[REFUSE, reason])?;
            Err(io::Error::other("the guest could not go on with it"))
        }
    }
}

/// Reads exactly so many bytes of a stream that does not block, within [`ASK_PATIENCE`]. Gives up when `end` is signalled.
fn read_before(mut stream: &UnixStream, buffer: &mut [u8], end: &OwnedFd) -> io::Result<()> {
    let deadline = Instant::now() + ASK_PATIENCE;
    let mut read = 0;
    while read < buffer.len() {
        match stream.read(&mut buffer[read..]) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(length) => {
                read += length;
                continue;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = left.try_into().expect("some seconds can be waited for");
        let mut fds = [PollFd::new(end, PollFlags::IN), PollFd::new(stream, PollFlags::IN)];
        match poll(&mut fds, Some(&timeout)) {
            Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
            Ok(_) if !fds[0].revents().is_empty() => return Err(io::ErrorKind::ConnectionAborted.into()),
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Waits for a message.
fn expect(mut stream: &UnixStream, wanted: u8, patience: Duration) -> io::Result<()> {
    stream.set_read_timeout(Some(patience))?;
    let mut message = [0];
    stream.read_exact(&mut message)?;
    if message == [wanted] { Ok(()) } else { Err(io::ErrorKind::InvalidData.into()) }
}

impl Successor {
    /// Passes the sockets: the image is closed. Waits until the successor serves. False if it has ended instead.
    ///
    /// # Errors
    /// When the successor neither serves nor ends in time: it may have the image.
    pub fn give(&self, sockets: &Sockets) -> io::Result<bool> {
        let files: Vec<_> = [Some(&sockets.listener), sockets.waiting.as_ref()]
            .into_iter()
            .flatten()
            .map(AsFd::as_fd)
            .collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(SOCKETS_MAX))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        control.push(SendAncillaryMessage::ScmRights(&files));
        let sent = rustix::net::sendmsg(&self.0, &[IoSlice::new(&[GIVE])], &mut control, SendFlags::NOSIGNAL);
        if sent.is_err() {
            return Ok(false);
        }
        match expect(&self.0, SERVE, PATIENCE) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(error),
            Err(_) => Ok(false),
        }
    }
}

impl Predecessor {
    /// Asks the daemon that serves on this socket to stop; `None` if there is none that can be asked.
    ///
    /// # Errors
    /// When the daemon belongs to another user.
    pub fn ask(socket: &Path, terms: Terms) -> io::Result<Option<Self>> {
        let Some(path) = handover_path(socket) else { return Ok(None) };
        let mut stream = match UnixStream::connect(path) {
            Ok(stream) => stream,
            Err(error)
                if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) =>
            {
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        if !is_trusted(&stream)? {
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, "it belongs to another user"));
        }
        // It lives, as it listens, so the number is its own.
        let process = sockopt::socket_peercred(&stream)?.pid;
        let process = pidfd_open(process, PidfdFlags::empty()).ok().filter(|_| process != getpid());
        stream.write_all(&[&[ASK][..], &terms.to_bytes()].concat())?;
        Ok(Some(Predecessor { stream, process }))
    }

    /// Waits until the image is free. The sockets; `None` if the daemon has ended without passing them.
    ///
    /// # Errors
    /// When it takes too long, or the daemon refuses because of the terms.
    pub fn take(&self) -> io::Result<Option<Sockets>> {
        self.stream.set_read_timeout(Some(PATIENCE))?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(SOCKETS_MAX))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut message = [0];
        let received = loop {
            let parts = &mut [IoSliceMut::new(&mut message)];
            match rustix::net::recvmsg(&self.stream, parts, &mut control, RecvFlags::CMSG_CLOEXEC) {
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::CONNRESET) => return self.wait_for_end().map(|()| None),
                other => break other?,
            }
        };
        if received.bytes == 1 && message == [REFUSE] {
            let mut reason = [0];
            (&self.stream).read_exact(&mut reason)?;
            let reason = REASONS.get(usize::from(reason[0])).unwrap_or(&"it does not say why");
            return Err(io::Error::other(*reason));
        }
        if received.bytes == 0 || message != [GIVE] {
            return self.wait_for_end().map(|()| None);
        }
        let files = control.drain().filter_map(|part| match part {
            RecvAncillaryMessage::ScmRights(files) => Some(files),
            _ => None,
        });
        let mut files = files.flatten();
        Ok(files.next().map(|listener| Sockets { listener, waiting: files.next() }))
    }

    /// Waits until the daemon has ended: it passes nothing, as it stops for another reason, and still has the image.
    fn wait_for_end(&self) -> io::Result<()> {
        let Some(process) = &self.process else { return Ok(()) };
        let timeout = PATIENCE.try_into().expect("two minutes can be waited for");
        match poll(&mut [PollFd::new(process, PollFlags::IN)], Some(&timeout))? {
            0 => Err(io::ErrorKind::TimedOut.into()),
            _ => Ok(()),
        }
    }

    /// This process serves: the other one ends.
    pub fn tell_serving(mut self) {
        if let Err(error) = self.stream.write_all(&[SERVE]) {
            warn!(%error, "the daemon that was replaced could not be told so");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    const TERMS: Terms =
        Terms { device: 1, inode: 2, queues: 4, queue_size: 256, block: 4096, read_only: false };

    /// A daemon that offers its disk on a socket in a folder, with the successors that have asked for it.
    struct Offering {
        folder: tempfile::TempDir,
        offer: Offer,
        successors: mpsc::Receiver<Successor>,
    }

    impl Offering {
        fn start() -> Self {
            let folder = tempfile::tempdir().expect("a folder");
            let (found, successors) = mpsc::channel();
            let found = move |successor| found.send(successor).expect("awaited");
            let offer = Offer::start(&folder.path().join("s"), TERMS, found);
            Offering { offer: offer.expect("it listens").expect("the path is short"), folder, successors }
        }

        fn socket(&self) -> PathBuf {
            self.folder.path().join("s")
        }

        /// A successor asks, and is heard.
        fn ask(&self, terms: Terms) -> (Predecessor, Successor) {
            let predecessor = Predecessor::ask(&self.socket(), terms).expect("it is ours");
            (predecessor.expect("it is there"), self.successors.recv().expect("it was asked"))
        }
    }

    fn meet() -> (tempfile::TempDir, Offer, Predecessor, Successor) {
        let offering = Offering::start();
        let (predecessor, successor) = offering.ask(TERMS);
        (offering.folder, offering.offer, predecessor, successor)
    }

    #[test]
    fn the_sockets_change_hands() {
        let (folder, offer, predecessor, successor) = meet();
        let path = folder.path().join("served");
        let listener = OwnedFd::from(UnixListener::bind(&path).expect("bound"));
        let (mut accepted, other_end) = UnixStream::pair().expect("a pair");
        let giving =
            thread::spawn(move || successor.give(&Sockets { listener, waiting: Some(other_end.into()) }));
        let waiting = UnixStream::connect(&path).expect("it waits in the backlog");
        let taken = predecessor.take().expect("in time").expect("the sockets");
        let (_stream, _) = UnixListener::from(taken.listener).accept().expect("the one that waited");
        accepted.write_all(b"x").expect("it is open");
        let mut heard = [0];
        UnixStream::from(taken.waiting.expect("it was passed")).read_exact(&mut heard).expect("heard");
        assert_eq!(&heard, b"x");
        predecessor.tell_serving();
        assert!(giving.join().expect("no panic").expect("in time"));
        drop((offer, waiting));
        assert!(!handover_path(&folder.path().join("s")).expect("short").exists());
    }

    #[test]
    fn a_successor_that_ends_is_none() {
        let (folder, _offer, predecessor, successor) = meet();
        let listener = OwnedFd::from(UnixListener::bind(folder.path().join("served")).expect("bound"));
        drop(predecessor);
        assert!(!successor.give(&Sockets { listener, waiting: None }).expect("it has ended"));
        let (_folder, _offer, predecessor, successor) = meet();
        drop(successor);
        assert!(predecessor.take().expect("it has ended").is_none());
    }

    /// The old daemon goes on, and another successor may ask.
    #[test]
    fn terms_that_the_guest_cannot_live_with_are_refused() {
        let offering = Offering::start();
        let worse = [
            Terms { inode: 3, ..TERMS },
            Terms { device: 3, ..TERMS },
            Terms { queues: 3, ..TERMS },
            Terms { queue_size: 128, ..TERMS },
            Terms { block: 512, ..TERMS },
            Terms { read_only: true, ..TERMS },
        ];
        for terms in worse {
            let predecessor =
                Predecessor::ask(&offering.socket(), terms).expect("it is ours").expect("it is there");
            let refused = predecessor.take().expect_err("refused");
            assert!(REASONS.contains(&refused.to_string().as_str()), "{terms:?}: {refused}");
        }
        let better = Terms { queues: 9, queue_size: 1024, ..TERMS };
        let _met = offering.ask(better);
    }

    #[test]
    fn nobody_is_asked_where_nobody_listens() {
        let folder = tempfile::tempdir().expect("a folder");
        assert!(Predecessor::ask(&folder.path().join("s"), TERMS).expect("no error").is_none());
        assert!(handover_path(Path::new(&"x".repeat(100))).is_none());
    }

    /// Neither one that says nothing, nor one that says half of what it must.
    #[test]
    fn a_silent_process_does_not_delay_the_end() {
        let folder = tempfile::tempdir().expect("a folder");
        let socket = folder.path().join("s");
        for said in [&b""[..], b"A"] {
            let offer = Offer::start(&socket, TERMS, |_| panic!("nobody asks")).expect("it listens");
            let path = handover_path(&socket).expect("short");
            let mut silent = UnixStream::connect(path).expect("it listens");
            silent.write_all(said).expect("sent");
            let began = Instant::now();
            drop(offer);
            assert!(began.elapsed() < ASK_PATIENCE / 2, "{:?}", began.elapsed());
            // A socket that is closed with bytes unread is reset.
            match silent.read(&mut [0]) {
                Ok(bytes) => assert_eq!(bytes, 0),
                Err(error) => assert_eq!(error.kind(), io::ErrorKind::ConnectionReset),
            }
        }
    }

    #[test]
    fn one_that_says_something_else_is_not_heard() {
        let offering = Offering::start();
        let path = handover_path(&offering.socket()).expect("short");
        let mut other = UnixStream::connect(&path).expect("it listens");
        other.write_all(b"x").expect("sent");
        assert_eq!(other.read(&mut [0]).expect("the end"), 0);
        drop(UnixStream::connect(&path).expect("it listens"));
        let _met = offering.ask(TERMS);
    }
}
