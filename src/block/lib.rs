//! Requests of a block device: the words that a vhost-user session and a disk share, and nothing else.
//!
//! Imports nothing, so that neither side needs to know the other.
#![forbid(unsafe_code)]

/// Names a request in flight on one queue. The submitter chooses it, and may reuse it once the request has completed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RequestId(pub u32);

/// A request. Offsets and lengths are in bytes, multiples of 512, and within the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Fill the guest's memory from the disk.
    Read {
        /// Offset on the disk.
        offset: u64,
    },
    /// Write the guest's memory to the disk.
    Write {
        /// Offset on the disk.
        offset: u64,
        /// The request completes only when durable: FLUSH was not negotiated, or the write cache is off.
        write_through: bool,
    },
    /// Make durable every write that completed before this request was submitted.
    Flush,
    /// The contents of the range are no longer needed; its space may be given back.
    Discard {
        /// Offset on the disk.
        offset: u64,
        /// Bytes.
        length: u64,
        /// As for a write.
        write_through: bool,
    },
    /// Make the range read as zero.
    WriteZeroes {
        /// Offset on the disk.
        offset: u64,
        /// Bytes.
        length: u64,
        /// The space may be given back.
        unmap: bool,
        /// As for a write.
        write_through: bool,
    },
}

impl Request {
    /// True if the request may change the disk.
    pub fn writes(&self) -> bool {
        !matches!(self, Request::Read { .. } | Request::Flush)
    }

    /// True if the request completes only when its own changes are durable.
    pub fn is_write_through(&self) -> bool {
        match self {
            Request::Read { .. } | Request::Flush => false,
            Request::Write { write_through, .. }
            | Request::Discard { write_through, .. }
            | Request::WriteZeroes { write_through, .. } => *write_through,
        }
    }
}

/// A request that has completed. Its memory is no longer used.
#[derive(Debug, PartialEq, Eq)]
pub struct Completed<E> {
    /// The request.
    pub id: RequestId,
    /// Its result. The disk has logged an error by then.
    pub result: Result<(), E>,
}
