//! System calls that only the tests need and that the compiler cannot check.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use rustix::fs::OFlags;
use vmm_sys_util::eventfd::EventFd;

/// How many bytes that were sent on a socket the other end has not taken yet.
pub fn not_taken(stream: &UnixStream) -> i32 {
    let mut bytes = 0;
    // SAFETY: the descriptor is open, and the kernel writes one int.
    let result = unsafe { libc::ioctl(stream.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    bytes
}

/// Makes an eventfd block, for all who share it.
pub fn make_blocking(event: &EventFd) {
    // SAFETY: the eventfd is open while the borrow lasts.
    let borrowed = unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) };
    rustix::fs::fcntl_setfl(borrowed, OFlags::empty()).expect("it is open");
}
