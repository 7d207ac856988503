//! The errors between the client and a device.

use std::path::PathBuf;
use std::time::Duration;

/// Why the client could not continue. A bad status from the device is no error: see [`super::Status`].
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No server accepts on the socket.
    #[error("connect to {path}: {source}")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The host refused something that the client needs for itself (memory, an eventfd).
    #[error("{step}: {source}")]
    Host {
        /// What was requested.
        step: &'static str,
        /// The host's error.
        source: std::io::Error,
    },
    /// A vhost-user message failed, was refused, or was not answered in time.
    #[error("{step}: {source}")]
    Message {
        /// The message.
        step: &'static str,
        /// The error from `vhost`.
        source: vhost::Error,
    },
    /// The device does not offer what the options require.
    #[error("the device offers no {0}")]
    NotOffered(&'static str),
    /// The device has fewer of something than requested.
    #[error("{what}: {wanted} wanted, the device has {offered}")]
    TooFew {
        /// The thing in question.
        what: &'static str,
        /// The number that the options request.
        wanted: u64,
        /// The number that the device offers.
        offered: u64,
    },
    /// The request does not fit into the client's buffers (see `Options::data_capacity`).
    #[error("a request of {length} bytes: the client's buffers have {capacity}")]
    TooLong {
        /// Bytes requested.
        length: usize,
        /// Bytes that fit.
        capacity: usize,
    },
    /// An offset or length that virtio-blk cannot express, as it counts in sectors of 512 bytes.
    #[error("{0} is no multiple of 512")]
    Misaligned(u64),
    /// Every slot of the queue is in flight.
    #[error("queue {0} is full")]
    Full(usize),
    /// No completion came in time.
    #[error("queue {queue}: nothing completed for {waited:?}, {in_flight} requests in flight")]
    Timeout {
        /// The queue.
        queue: usize,
        /// How long the queue waited.
        waited: Duration,
        /// How many requests are in flight.
        in_flight: usize,
    },
    /// The device closed the session.
    #[error("queue {0}: the device closed the session")]
    Disconnected(usize),
    /// The device signalled the ring's error eventfd.
    #[error("queue {0}: the device reports a ring error")]
    RingError(usize),
    /// The device used a chain that is not in flight.
    #[error("queue {queue}: the device used chain {id}, which is not in flight")]
    BadUsed {
        /// The queue.
        queue: usize,
        /// The head that the device used.
        id: u32,
    },
    /// The device claims to have written more bytes than the chain can hold.
    #[error("queue {queue}: {length} bytes written into a chain with {writable} writable ones")]
    BadUsedLength {
        /// The queue.
        queue: usize,
        /// Bytes that the device claims to have written.
        length: u32,
        /// Writable bytes of the chain.
        writable: u32,
    },
    /// A ticket was waited for twice, or belongs to another queue.
    #[error("queue {0}: no such ticket")]
    NoSuchTicket(usize),
    /// A request of the simple interface was answered with a bad status.
    #[error("{what} at byte {offset}: {status:?}")]
    Status {
        /// The request.
        what: &'static str,
        /// Its byte offset on the disk.
        offset: u64,
        /// The status.
        status: super::Status,
    },
}

impl ClientError {
    /// Wraps a host error, for `map_err`.
    pub(crate) fn host(step: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Host { step, source }
    }

    /// Wraps a message error, for `map_err`.
    pub(crate) fn message(step: &'static str) -> impl FnOnce(vhost::Error) -> Self {
        move |source| Self::Message { step, source }
    }
}
