//! System calls that only the tests need and that the compiler cannot check.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

use rustix::fs::OFlags;
use tempfile::TempDir;
use vmm_sys_util::eventfd::EventFd;

/// The number of bytes sent on a socket that the other end has not taken yet.
pub fn not_taken(stream: &UnixStream) -> i32 {
    let mut bytes = 0;
    // SAFETY: the descriptor is open, and the kernel writes one int.
    let result = unsafe { libc::ioctl(stream.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    bytes
}

/// Makes an eventfd block, for all its holders.
pub fn make_blocking(event: &EventFd) {
    // SAFETY: the eventfd is open while the borrow lasts.
    let borrowed = unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) };
    rustix::fs::fcntl_setfl(borrowed, OFlags::empty()).expect("it is open");
}

/// A file system that is mounted on its own folder until this is dropped.
pub struct Mount {
    folder: TempDir,
}

impl Mount {
    /// A tmpfs of `bytes` bytes; `None` where this process may not mount one.
    pub fn tmpfs(bytes: u64) -> Option<Self> {
        Self::new(c"tmpfs", &format!("size={bytes}"))
    }

    /// The file system whose server has this descriptor of /dev/fuse; `None` where this process may not mount it.
    pub fn fuse(server: &File) -> Option<Self> {
        let fd = server.as_raw_fd();
        Self::new(c"fuse", &format!("fd={fd},rootmode=40000,user_id=0,group_id=0"))
    }

    fn new(kind: &CStr, options: &str) -> Option<Self> {
        let folder = tempfile::tempdir().expect("a folder");
        let path = CString::new(folder.path().as_os_str().as_bytes()).expect("a path");
        let options = CString::new(options).expect("no zeros");
        // SAFETY: four texts that end with a zero and live until the call ends.
        let result = unsafe {
            libc::mount(kind.as_ptr(), path.as_ptr(), kind.as_ptr(), libc::MS_NOSUID, options.as_ptr().cast())
        };
        (result == 0).then_some(Mount { folder })
    }

    pub fn path(&self) -> &Path {
        self.folder.path()
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let path = CString::new(self.folder.path().as_os_str().as_bytes()).expect("a path");
        // SAFETY: a text that ends with a zero and lives until the call ends.
        unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH) };
    }
}

/// Reports that the calling test proves nothing here.
pub fn skipped(reason: &str) {
    let thread = std::thread::current();
    let _ = writeln!(std::io::stderr(), "SKIPPED: {}: {reason}", thread.name().unwrap_or("?"));
}
