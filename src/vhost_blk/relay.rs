//! Passes whole messages between the frontend's socket and `vhost`.
//!
//! A frontend may send a message in any number of pieces. `vhost` reads a payload with one call, so it would mistake a
//! part for the whole. This file collects each message, hands it to `vhost` through a socket pair in one piece, and
//! passes the replies on. No wait here outlives a stop. No descriptor reaches `vhost` before it is checked
//! (`descriptor`).

use std::cell::Cell;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};

use crate::descriptor;
use crate::error::SessionEnd;
use crate::message::{HEADER, gives_channel, payload_bytes};

/// The longest payload that `vhost` accepts. It refuses a longer one from the header alone.
const PAYLOAD_MAX: usize = 4096;
/// The most descriptors sent with a message.
const DESCRIPTORS_MAX: usize = 32;

/// A message with its descriptors.
#[derive(Debug, Default)]
pub(crate) struct Message {
    pub bytes: Vec<u8>,
    files: Vec<OwnedFd>,
}

impl Message {
    /// A copy of the descriptor of a message that gives a back channel; `vhost` does not pass it on as it is.
    pub(crate) fn channel(&self) -> Option<OwnedFd> {
        match &self.files[..] {
            [file] if gives_channel(&self.bytes) => file.try_clone().ok(),
            _ => None,
        }
    }
}

/// The events that end the wait for a message.
pub(crate) struct Wakers<'a> {
    /// The server is stopping.
    pub stop: BorrowedFd<'a>,
    /// Some of the guest's memory is lost.
    pub loss: Option<BorrowedFd<'a>>,
}

/// Carries messages from the frontend to `vhost`, and replies back.
#[derive(Debug)]
pub(crate) struct Relay {
    frontend: UnixStream,
    inner: UnixStream,
    /// How long a message may take from its first byte to its last.
    limit: Duration,
    /// The frontend has sent something.
    heard: Cell<bool>,
}

impl Relay {
    /// A relay for this frontend, and the socket for `vhost`.
    ///
    /// # Errors
    /// When the host has no descriptors left.
    pub(crate) fn new(frontend: &UnixStream, limit: Duration) -> io::Result<(Self, UnixStream)> {
        let (inner, outer) = UnixStream::pair()?;
        Ok((Relay { frontend: frontend.try_clone()?, inner, limit, heard: Cell::new(false) }, outer))
    }

    /// Whether the frontend has sent anything yet.
    pub(crate) fn has_heard(&self) -> bool {
        self.heard.get()
    }

    /// Waits for the next message until it is complete.
    ///
    /// # Errors
    /// When the session must end instead, for any reason.
    pub(crate) fn receive(&self, wakers: &Wakers<'_>) -> Result<Message, SessionEnd> {
        let mut message = Message::default();
        let mut deadline = None;
        let mut whole = HEADER;
        while message.bytes.len() < whole {
            self.wait(wakers, deadline)?;
            let here = message.bytes.len();
            let taken = match take(&self.frontend, whole - here, &mut message) {
                Ok(taken) => taken,
                Err(Errno::AGAIN | Errno::INTR) => continue,
                Err(error) => return Err(SessionEnd::Socket(error.into())),
            };
            if message.files.len() > DESCRIPTORS_MAX || taken.cut {
                return Err(SessionEnd::TooManyDescriptors { limit: DESCRIPTORS_MAX });
            }
            if taken.bytes == 0 {
                return Err(if here == 0 { SessionEnd::Left } else { SessionEnd::CutOff });
            }
            self.heard.set(true);
            deadline.get_or_insert_with(|| Instant::now() + self.limit);
            if message.bytes.len() == HEADER {
                let payload = payload_bytes(&message.bytes);
                whole += if payload <= PAYLOAD_MAX { payload } else { 0 };
            }
        }
        Ok(message)
    }

    /// Sleeps until the frontend has sent something or left.
    fn wait(&self, wakers: &Wakers<'_>, deadline: Option<Instant>) -> Result<(), SessionEnd> {
        let loss = wakers.loss.unwrap_or(wakers.stop);
        let on = |fd| PollFd::from_borrowed_fd(fd, PollFlags::IN);
        let mut fds = [on(wakers.stop), on(loss), on(self.frontend.as_fd())];
        loop {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            // A limit that does not fit a Timespec is as good as none.
            let timeout = left.and_then(|left| Timespec::try_from(left).ok());
            match rustix::event::poll(&mut fds, timeout.as_ref()) {
                Ok(0) => return Err(SessionEnd::Unfinished { limit: self.limit }),
                Ok(_) if !fds[0].revents().is_empty() => return Err(SessionEnd::Stopped),
                Ok(_) if !fds[1].revents().is_empty() => return Err(SessionEnd::MemoryLost),
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(SessionEnd::Socket(error.into())),
            }
        }
    }

    /// Hands a message to `vhost`, whose next read finds it whole.
    ///
    /// # Errors
    /// When the host has no memory for the message.
    pub(crate) fn hand_over(&self, message: &Message) -> io::Result<()> {
        Ok(give(&self.inner, message)?)
    }

    /// Sends the replies of `vhost` to the frontend. Waits for a frontend that does not read; a stop shuts its socket
    /// down, which ends that wait.
    ///
    /// # Errors
    /// When the frontend's socket is broken.
    pub(crate) fn pass_replies(&self) -> io::Result<()> {
        loop {
            let mut reply = Message::default();
            match take(&self.inner, HEADER + PAYLOAD_MAX, &mut reply) {
                Ok(taken) if taken.bytes == 0 => return Ok(()),
                Ok(_) => give(&self.frontend, &reply)?,
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

struct Taken {
    bytes: usize,
    /// More descriptors came than there was room for. The kernel has closed the rest.
    cut: bool,
}

/// Takes at most `at_most` available bytes, and the descriptors sent with them. Does not wait.
fn take(socket: &UnixStream, at_most: usize, message: &mut Message) -> Result<Taken, Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    // While too many descriptors wait to be closed, the kernel closes new ones.
    let room = if descriptor::may_receive() { &mut space[..] } else { &mut [] };
    let mut control = RecvAncillaryBuffer::new(room);
    let mut bytes = vec![0; at_most];
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let received = rustix::net::recvmsg(socket, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags)?;
    message.bytes.extend(&bytes[..received.bytes]);
    let as_channel = gives_channel(&message.bytes);
    for part in control.drain() {
        if let RecvAncillaryMessage::ScmRights(files) = part {
            message.files.extend(files.filter_map(|file| descriptor::admit(file, as_channel)));
        }
    }
    Ok(Taken { bytes: received.bytes, cut: received.flags.contains(ReturnFlags::CTRUNC) })
}

/// Sends a message in as few pieces as the socket takes, its descriptors with the first.
fn give(socket: &UnixStream, message: &Message) -> Result<(), Errno> {
    let files: Vec<BorrowedFd<'_>> = message.files.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !files.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&files)) {
        return Err(Errno::TOOMANYREFS);
    }
    let mut left = &message.bytes[..];
    while !left.is_empty() {
        match rustix::net::sendmsg(socket, &[IoSlice::new(left)], &mut control, SendFlags::NOSIGNAL) {
            Ok(sent) => {
                left = &left[sent..];
                control.clear();
            }
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
