//! Checks descriptors from a frontend before any use.
//!
//! A descriptor may belong to a file on a FUSE or network server that never answers. A thread that reads its
//! attributes, touches a page of it or closes it then sleeps where no signal reaches. So only eventfds and their like,
//! memory files and files of local file systems are admitted. Any other is replaced by a descriptor of /dev/null, and
//! the message is refused for a wrong descriptor. The check itself never contacts a file system's server.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Statx, StatxFlags};
use rustix::net::{AddressFamily, sockopt};
use tracing::{debug, warn};

/// With so many descriptors waiting to be closed, no more are received.
const WAITING_MAX: usize = 256;
/// The most threads that close at a time. Each may be stuck in a close.
const CLOSERS_MAX: usize = 4;
/// File systems whose pages come from this host's memory or block devices. An overlay is as local as the file systems
/// that an administrator put below it.
const LOCAL: &[&str] = &[
    "bcachefs",
    "btrfs",
    "devtmpfs",
    "exfat",
    "ext2",
    "ext3",
    "ext4",
    "f2fs",
    "hugetlbfs",
    "jfs",
    "nilfs2",
    "ntfs3",
    "overlay",
    "ramfs",
    "tmpfs",
    "vfat",
    "xfs",
    "zfs",
];

/// The kind of file that a descriptor refers to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A file without a name in any file system: an eventfd, a timer, an epoll.
    Anonymous,
    /// A file that lives in memory: a memfd, or a file on tmpfs or hugetlbfs.
    Memory,
    /// A file on a local file system.
    Local,
    /// Any other kind, as text for the log.
    Other(String),
}

/// Finds the kind of a descriptor without contacting the server of its file system.
pub(crate) fn kind_of(fd: impl AsFd) -> Kind {
    let fd = fd.as_fd();
    // Only files in memory can be sealed.
    if rustix::fs::fcntl_get_seals(fd).is_ok() {
        return Kind::Memory;
    }
    let found = match attributes(fd) {
        Ok(found) => found,
        Err(error) => return Kind::Other(format!("something without attributes ({error})")),
    };
    match FileType::from_raw_mode(u32::from(found.stx_mode)) {
        FileType::Unknown => Kind::Anonymous,
        FileType::RegularFile => file_kind(&found),
        other => Kind::Other(format!("{other:?}")),
    }
}

/// The attributes that the kernel has cached. `fstat` would make the file system's server fetch newer ones.
pub(crate) fn attributes(fd: impl AsFd) -> rustix::io::Result<Statx> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    rustix::fs::statx(fd, c"", flags, StatxFlags::BASIC_STATS | StatxFlags::MNT_ID)
}

fn file_kind(found: &Statx) -> Kind {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let id = (found.stx_mask & StatxFlags::MNT_ID.bits() != 0).then_some(found.stx_mnt_id);
    match file_system(&mounts, id, (found.stx_dev_major, found.stx_dev_minor)) {
        Some(name) if LOCAL.contains(&name) => Kind::Local,
        Some(name) => Kind::Other(format!("a file on {name}")),
        // A mount that we do not see. File systems without a block device have devices of major number 0.
        None if found.stx_dev_major != 0 => Kind::Local,
        None => Kind::Other("a file on a file system that is not mounted here".to_owned()),
    }
}

/// The type of the file system that has this mount ID, or else this device, in the text of a mountinfo file.
fn file_system(mounts: &str, id: Option<u64>, device: (u32, u32)) -> Option<&str> {
    let device = format!("{}:{}", device.0, device.1);
    let parsed = || {
        mounts.lines().filter_map(|line| {
            let (place, system) = line.split_once(" - ")?;
            let mut words = place.split(' ');
            let id: u64 = words.next()?.parse().ok()?;
            Some((id, words.nth(1)?, system.split(' ').next()?))
        })
    };
    let by_id = parsed().find(|(other, _, _)| Some(*other) == id);
    by_id.or_else(|| parsed().find(|(_, other, _)| *other == device)).map(|(_, _, name)| name)
}

/// Returns the descriptor if it is admitted, else one of /dev/null; `None` if the host has no descriptor left for that.
/// A unix socket is admitted as a back channel only.
pub(crate) fn admit(fd: OwnedFd, as_channel: bool) -> Option<OwnedFd> {
    if as_channel && sockopt::socket_domain(&fd).is_ok_and(|domain| domain == AddressFamily::UNIX) {
        return Some(fd);
    }
    let Kind::Other(what) = kind_of(&fd) else { return Some(fd) };
    warn!(
        "the frontend sent a descriptor of {what}; it is not used. Events need eventfds, and guest memory needs a \
         memfd or a file on tmpfs, hugetlbfs or a local file system"
    );
    close_beside(fd);
    null().inspect_err(|error| warn!(%error, "/dev/null cannot take its place")).ok()
}

fn null() -> io::Result<OwnedFd> {
    Ok(rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?)
}

/// Descriptors to be closed by separate threads.
#[derive(Debug)]
struct Closing {
    waiting: Vec<OwnedFd>,
    threads: usize,
}

/// Guards the descriptors that wait to be closed. A leaf: nothing is closed with it held.
static CLOSING: Mutex<Closing> = Mutex::new(Closing { waiting: Vec::new(), threads: 0 });

fn closing() -> MutexGuard<'static, Closing> {
    CLOSING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether descriptors may be received: not while too many wait to be closed.
pub(crate) fn may_receive() -> bool {
    closing().waiting.len() < WAITING_MAX
}

/// Closes a descriptor on another thread, because the close may never return.
pub(crate) fn close_beside(fd: OwnedFd) {
    let mut state = closing();
    state.waiting.push(fd);
    if state.threads == CLOSERS_MAX {
        return;
    }
    state.threads += 1;
    let started = std::thread::Builder::new().name("strata-close".to_owned()).spawn(close_all);
    if let Err(error) = started {
        state.threads -= 1;
        debug!(%error, "no thread to close descriptors; they wait for the next");
    }
}

fn close_all() {
    loop {
        let mut state = closing();
        let Some(fd) = state.waiting.pop() else {
            state.threads -= 1;
            return;
        };
        drop(state);
        drop(fd);
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;

    #[test]
    fn kinds_are_told_apart() {
        let memory = rustix::fs::memfd_create("x", rustix::fs::MemfdFlags::CLOEXEC).expect("a memfd");
        assert_eq!(kind_of(&memory), Kind::Memory);
        let event = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).expect("an eventfd");
        assert_eq!(kind_of(&event), Kind::Anonymous);
        let (pipe, _) = std::io::pipe().expect("a pipe");
        let (socket, _) = std::os::unix::net::UnixStream::pair().expect("a pair");
        let zero = fs::File::open("/dev/zero").expect("/dev/zero");
        for fd in [OwnedFd::from(pipe), socket.into(), zero.into()] {
            assert!(matches!(kind_of(&fd), Kind::Other(_)));
            let admitted = admit(fd, false).expect("a descriptor of /dev/null");
            let path = fs::read_link(format!("/proc/self/fd/{}", admitted.as_raw_fd())).expect("procfs");
            assert_eq!(path, std::path::Path::new("/dev/null"));
        }
        // Not a memory file: procfs is not among the local file systems.
        let process = fs::File::open("/proc/self/status").expect("procfs");
        assert_eq!(kind_of(&process), Kind::Other("a file on proc".to_owned()));
    }

    #[test]
    fn mounts_are_found_by_id_and_else_by_device() {
        let mounts = "36 35 98:0 /a /mnt rw,noatime master:1 - ext4 /dev/sda rw\n\
                      nonsense\n\
                      37 36 0:51 / /mnt/x rw - fuse.sshfs host: rw\n";
        assert_eq!(file_system(mounts, Some(36), (0, 51)), Some("ext4"));
        assert_eq!(file_system(mounts, Some(99), (0, 51)), Some("fuse.sshfs"));
        assert_eq!(file_system(mounts, None, (98, 0)), Some("ext4"));
        assert_eq!(file_system(mounts, None, (98, 1)), None);
    }
}
