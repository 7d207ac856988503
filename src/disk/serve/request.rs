//! Requests and their results.
//!
//! Owns the types that cross the border to whoever submits requests.

use storage::GuestSlice;
use storage::guest::guest_len;

use crate::error::RequestError;
use crate::range::ByteRange;

/// The caller's ID of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RequestId(pub u32);

/// A request. Offsets and lengths are in bytes, multiples of 512, and within the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Fill the slices.
    Read {
        /// Offset on the disk.
        offset: u64,
    },
    /// Write the slices.
    Write {
        /// Offset on the disk.
        offset: u64,
        /// The request completes only when durable.
        write_through: bool,
    },
    /// Make every completed request durable.
    Flush,
    /// Give space back.
    Discard {
        /// Offset on the disk.
        offset: u64,
        /// Bytes.
        length: u64,
        /// The request completes only when durable.
        write_through: bool,
    },
    /// Make a range read as zero.
    WriteZeroes {
        /// Offset on the disk.
        offset: u64,
        /// Bytes.
        length: u64,
        /// Space may be given back.
        unmap: bool,
        /// The request completes only when durable.
        write_through: bool,
    },
}

impl Request {
    /// The bytes of the disk that the request is about; none for a flush.
    pub(crate) fn range(&self, slices: &[GuestSlice]) -> Option<ByteRange> {
        match *self {
            Request::Read { offset } | Request::Write { offset, .. } => {
                Some(ByteRange::new(offset, guest_len(slices) as u64))
            }
            Request::Flush => None,
            Request::Discard { offset, length, .. } | Request::WriteZeroes { offset, length, .. } => {
                Some(ByteRange::new(offset, length))
            }
        }
    }

    /// True if the request may change the disk.
    pub(crate) fn writes(&self) -> bool {
        !matches!(self, Request::Read { .. } | Request::Flush)
    }

    /// True if the request completes only when its own changes are durable.
    pub(crate) fn is_write_through(&self) -> bool {
        match self {
            Request::Read { .. } | Request::Flush => false,
            Request::Write { write_through, .. }
            | Request::Discard { write_through, .. }
            | Request::WriteZeroes { write_through, .. } => *write_through,
        }
    }
}

/// A request that is done; its memory is no longer used.
#[derive(Debug)]
pub struct Completed {
    /// The request.
    pub id: RequestId,
    /// The result.
    pub result: Result<(), RequestError>,
}
