//! Runs operations at once by plain system calls: on files in memory, and reads from the page cache.
//!
//! io_uring hands calls on tmpfs to a kernel thread, which costs about eight times the call itself.
//! [`slots`](super::slots) decides the calls; this file only makes them.

use std::os::fd::RawFd;

use super::OpenFile;
use super::slots::{Call, Slot, Verdict};
use crate::Errno;

/// Runs the slot's operation to its end.
pub(super) fn run(slot: &mut Slot, file: &OpenFile) -> Result<(), Errno> {
    loop {
        let result = make_call(file.raw_fd(), &slot.next_call());
        if let Verdict::Done(result) = slot.take_result(result, file) {
            return result;
        }
    }
}

/// Makes a read call that only the page cache serves; returns the bytes read. `None` if it has none or the call fails:
/// the normal path then reports the error. Also `None` at the end of the file, because Linux 5.9 and 5.10 return 0
/// where they would wait (preadv2(2), BUGS).
pub(super) fn read_without_waiting(fd: RawFd, call: &Call) -> Option<i32> {
    let single;
    let (iovecs, count, offset) = match *call {
        Call::Read { address, len, offset } => {
            single = libc::iovec { iov_base: address.cast(), iov_len: len as usize };
            (&raw const single, 1, offset)
        }
        Call::Readv { iovecs, count, offset } => (iovecs, count, offset),
        _ => return None,
    };
    // SAFETY: as in `make_call`.
    let result =
        unsafe { libc::preadv2(fd, iovecs, count as libc::c_int, offset as libc::off_t, libc::RWF_NOWAIT) };
    i32::try_from(result).ok().filter(|result| *result > 0)
}

/// Reads and so resets an eventfd without waiting, whatever its flags. True if it was signalled. False also on a host that
/// cannot read it so.
pub(super) fn take_signal(fd: RawFd) -> bool {
    let mut counter = [0; 8];
    // A read at the file's own position: an eventfd has no other.
    let call = Call::Read { address: counter.as_mut_ptr(), len: 8, offset: u64::MAX };
    read_without_waiting(fd, &call) == Some(8)
}

/// Makes one call; returns the bytes moved or a negated errno, like a completion queue entry. Offsets fit i64: that is
/// checked when the operation is pushed.
fn make_call(fd: RawFd, call: &Call) -> i32 {
    // SAFETY: the descriptor is open. Every address with its length comes from a part that the slot owns, or from
    // the static zeros, which are only read. A part is an AlignedBuf, or guest memory whose maker promised that it
    // outlives the operation. The iovec arrays belong to the slot and hold `count` entries. None of it is borrowed
    // by Rust meanwhile.
    let result = unsafe {
        match *call {
            Call::Read { address, len, offset } => {
                libc::pread(fd, address.cast(), len as usize, offset as libc::off_t)
            }
            Call::Write { address, len, offset } => {
                libc::pwrite(fd, address.cast(), len as usize, offset as libc::off_t)
            }
            Call::Readv { iovecs, count, offset } => {
                libc::preadv(fd, iovecs, count as libc::c_int, offset as libc::off_t)
            }
            Call::Writev { iovecs, count, offset } => {
                libc::pwritev(fd, iovecs, count as libc::c_int, offset as libc::off_t)
            }
            Call::Fallocate { mode, offset, len } => {
                libc::fallocate(fd, mode, offset as libc::off_t, len as libc::off_t) as isize
            }
            Call::Sync => libc::fdatasync(fd) as isize,
            Call::Truncate { len } => libc::ftruncate(fd, len as libc::off_t) as isize,
        }
    };
    if result < 0 {
        return -std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO);
    }
    // The kernel moves at most 0x7ffff000 bytes in one call.
    i32::try_from(result).unwrap_or(-libc::EIO)
}
