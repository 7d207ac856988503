//! What can go wrong between the client and a device.

use std::path::PathBuf;
use std::time::Duration;

/// Why the client could not go on. A request that the device answers with a bad status is no error: see
/// [`super::Status`].
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody accepts on the socket.
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
        /// What was asked for.
        step: &'static str,
        /// Why not.
        source: std::io::Error,
    },
    /// A vhost-user message failed, was refused, or its answer did not come in time.
    #[error("{step}: {source}")]
    Message {
        /// The message.
        step: &'static str,
        /// What `vhost` says of it.
        source: vhost::Error,
    },
    /// The device does not offer what the options ask for.
    #[error("the device offers no {0}")]
    NotOffered(&'static str),
    /// The device has fewer of something than asked for.
    #[error("{what}: {wanted} wanted, the device has {offered}")]
    TooFew {
        /// Of what.
        what: &'static str,
        /// As the options say.
        wanted: u64,
        /// As the device says.
        offered: u64,
    },
    /// The request does not fit into the buffers that the client has (see `Options::data_capacity`).
    #[error("a request of {length} bytes: the client's buffers have {capacity}")]
    TooLong {
        /// Bytes asked for.
        length: usize,
        /// Bytes that fit.
        capacity: usize,
    },
    /// An offset or length that virtio-blk, which counts in sectors of 512 bytes, cannot say.
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
        /// For how long.
        waited: Duration,
        /// How many requests wait.
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
        /// The head as the device gave it.
        id: u32,
    },
    /// The device says it wrote more bytes than the chain has.
    #[error("queue {queue}: {length} bytes written into a chain with {writable} writable ones")]
    BadUsedLength {
        /// The queue.
        queue: usize,
        /// As the device says.
        length: u32,
        /// As the driver gave.
        writable: u32,
    },
    /// A ticket was waited for twice, or belongs to another queue.
    #[error("queue {0}: no such ticket")]
    NoSuchTicket(usize),
    /// A request that the simple interface needs was answered with a bad status.
    #[error("{what} at byte {offset}: {status:?}")]
    Status {
        /// The request.
        what: &'static str,
        /// Its place on the disk.
        offset: u64,
        /// The answer.
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
