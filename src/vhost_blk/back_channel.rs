//! The back channel: the socket on which the device sends messages to its frontend.
//!
//! Owns the socket of the present session. It sends one message: the configuration space has changed. QEMU reads the
//! space while it handles that message, so it is sent by a thread other than the session's, which must answer. No lock
//! is held meanwhile.

use std::io::{self, IoSlice};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendFlags};
use vhost::vhost_user::message::BackendReq;

use crate::descriptor;
use crate::message::HEADER;

/// The flags of a message: version 1, no answer wanted.
const FLAGS: u32 = 1;

/// The way to a frontend, if it has given one.
#[derive(Debug, Default)]
pub struct BackChannel {
    /// A leaf.
    present: Mutex<Option<Arc<Channel>>>,
}

#[derive(Debug)]
struct Channel {
    /// None only while it is dropped.
    socket: Option<OwnedFd>,
}

impl Drop for Channel {
    fn drop(&mut self) {
        // The frontend may have put descriptors into the socket, which are closed with it.
        self.socket.take().into_iter().for_each(descriptor::close_beside);
    }
}

impl BackChannel {
    fn present(&self) -> MutexGuard<'_, Option<Arc<Channel>>> {
        self.present.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The frontend has given a channel, or has left.
    pub(crate) fn set(&self, socket: Option<OwnedFd>) {
        let channel = socket.map(|socket| Arc::new(Channel { socket: Some(socket) }));
        let before = std::mem::replace(&mut *self.present(), channel);
        drop(before);
    }

    /// Tells the frontend that the configuration space has changed; false if it has given no channel. Never waits. Not to
    /// be called by the thread of a session.
    ///
    /// # Errors
    /// When the frontend does not read the channel, or has left.
    pub fn tell_change(&self) -> io::Result<bool> {
        let Some(channel) = self.present().clone() else { return Ok(false) };
        let Some(socket) = &channel.socket else { return Ok(false) };
        let request = BackendReq::CONFIG_CHANGE_MSG as u32;
        let message: Vec<u8> = [request, FLAGS, 0].iter().flat_map(|word| word.to_ne_bytes()).collect();
        debug_assert_eq!(message.len(), HEADER);
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        let sent = rustix::net::sendmsg(
            socket,
            &[IoSlice::new(&message)],
            &mut SendAncillaryBuffer::default(),
            flags,
        );
        match sent {
            Ok(bytes) if bytes == message.len() => Ok(true),
            Ok(_) => Err(Errno::MSGSIZE.into()),
            Err(error) => Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_change_is_one_header() {
        let channel = BackChannel::default();
        assert!(!channel.tell_change().expect("no channel is no error"));
        let (ours, mut theirs) = UnixStream::pair().expect("a pair");
        channel.set(Some(ours.into()));
        assert!(channel.tell_change().expect("it is sent"));
        let mut message = [0; HEADER];
        theirs.read_exact(&mut message).expect("a message");
        assert_eq!(message, [2u32, 1, 0].map(u32::to_ne_bytes).concat()[..]);
    }

    #[test]
    fn a_frontend_that_does_not_read_holds_nobody_up() {
        let channel = BackChannel::default();
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        channel.set(Some(ours.into()));
        let full = (0..1_000_000).map(|_| channel.tell_change()).find_map(Result::err).expect("it is full");
        assert_eq!(full.kind(), io::ErrorKind::WouldBlock);
        drop(theirs);
        assert_eq!(channel.tell_change().expect_err("it has left").kind(), io::ErrorKind::BrokenPipe);
        channel.set(None);
        assert!(!channel.tell_change().expect("no channel is no error"));
    }
}
