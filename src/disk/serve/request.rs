//! The range of a request, and the form in which a disk completes requests.

use block::Request;
use storage::GuestSlice;
use storage::guest::guest_len;

use crate::error::RequestError;
use crate::range::ByteRange;

/// A request that a disk has completed.
pub type Completed = block::Completed<RequestError>;

/// The bytes of the disk that a request is about; none for a flush.
pub(crate) fn range_of(request: &Request, slices: &[GuestSlice]) -> Option<ByteRange> {
    match *request {
        Request::Read { offset } | Request::Write { offset, .. } => {
            Some(ByteRange::new(offset, guest_len(slices) as u64))
        }
        Request::Flush => None,
        Request::Discard { offset, length, .. } | Request::WriteZeroes { offset, length, .. } => {
            Some(ByteRange::new(offset, length))
        }
    }
}
