//! Errors before I/O runs: opening and locking a file, reading its size, setting up a queue.
//!
//! The failure of an operation is not here: that is an [`Errno`](crate::Errno) in its completion.

use std::io;
use std::path::PathBuf;

use names::shown;
use thiserror::Error;

use crate::FileId;

/// A failure of the host, with its path.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum StorageError {
    /// A system call on a file failed.
    #[error("{}: {step} failed: {source}", shown(path))]
    File {
        /// The step that failed.
        step: Step,
        /// The file, as it was given to `open`.
        path: PathBuf,
        /// The host's error.
        source: io::Error,
    },
    /// The path names something that cannot be an image.
    #[error("{}: is {kind}; an image must be a regular file or a block device", shown(path))]
    NotAnImage {
        /// The file, as it was given to `open`.
        path: PathBuf,
        /// Its type.
        kind: FileKind,
    },
    /// The file lies outside of the allowed folders.
    #[error("{}: lies at {}, outside of the folders of --chain-root", shown(path), shown(place))]
    Outside {
        /// The file, as it was given to `open`.
        path: PathBuf,
        /// Where it is.
        place: PathBuf,
    },
    /// Another process (or another open image of this one) holds the image lock.
    #[error(
        "{}: is in use by another process{}, which {conflict}; stop it first (a virtual machine, or an image tool?)",
        shown(path),
        holder.as_ref().map_or(String::new(), |holder| format!(" ({holder})"))
    )]
    Locked {
        /// The file, as it was given to `open`.
        path: PathBuf,
        /// The first permission in the way.
        conflict: LockConflict,
        /// The process, if it could be found.
        holder: Option<Holder>,
    },
    /// The same file is already open in this storage, and one of the two is for writing.
    #[error(
        "{}: is already open as {}; a file that is written can be part of a chain only once",
        shown(path),
        shown(other)
    )]
    AlreadyOpen {
        /// The file, as it was given to `open`.
        path: PathBuf,
        /// The name under which it is open.
        other: PathBuf,
        /// Its id.
        file: FileId,
    },
    /// More files than a [`FileId`] can name.
    #[error("{}: {} files are open, and no more can be", shown(path), u16::MAX)]
    TooManyFiles {
        /// The file, as it was given to `open`.
        path: PathBuf,
    },
    /// The host forbids io_uring.
    #[error(
        "the host refuses io_uring: {source}. It needs Linux 5.6 or later, sysctl kernel.io_uring_disabled = 0 (or 1 \
         and the group of kernel.io_uring_group), and a seccomp filter (container, systemd unit) that lets \
         io_uring_setup, io_uring_enter and io_uring_register through"
    )]
    UringRefused {
        /// The error of io_uring_setup: ENOSYS, EPERM or EACCES.
        source: io::Error,
    },
    /// A queue could not be set up for another reason.
    #[error("{step} failed: {source}")]
    Queue {
        /// The step that failed.
        step: Step,
        /// The host's error. ENOMEM on an old kernel means the locked-memory limit.
        source: io::Error,
    },
}

impl StorageError {
    /// True if io_uring is unavailable: the host refuses it, or the process may not lock the memory for it (before
    /// Linux 5.12).
    pub(crate) fn names_io_uring(&self) -> bool {
        match self {
            StorageError::UringRefused { .. } => true,
            StorageError::Queue { step: Step::SetUpRing, source } => {
                source.raw_os_error() == Some(libc::ENOMEM)
            }
            _ => false,
        }
    }
}

/// The step in which a system call failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Step {
    /// open(2).
    Open,
    /// Reading /proc/self/fd.
    FindPlace,
    /// fstat(2) or statx(2).
    Stat,
    /// fstatfs(2).
    StatFileSystem,
    /// Asking a block device for its size or its sector size.
    ProbeBlockDevice,
    /// Setting the open file's flags.
    SetFlags,
    /// openat(2) of a new file.
    Create,
    /// fsync(2) of the file's folder.
    SyncFolder,
    /// unlinkat(2).
    Remove,
    /// Taking the image lock.
    Lock,
    /// io_uring_setup(2).
    SetUpRing,
    /// epoll_create1(2) or epoll_ctl(2).
    SetUpEpoll,
    /// eventfd(2).
    MakeEventFd,
}

/// The type of a file that cannot be an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// A directory.
    Directory,
    /// A named pipe.
    Fifo,
    /// A socket.
    Socket,
    /// A character device.
    CharacterDevice,
    /// Something else.
    Unknown,
}

/// A permission on an image's bytes, named as in QEMU's block layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Permission {
    /// To read data that is not changing.
    ConsistentRead,
    /// To write.
    Write,
    /// To write what is there already.
    WriteUnchanged,
    /// To change the file's length.
    Resize,
}

/// A process that holds an image lock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Its number.
    pub pid: u32,
    /// Its program's name, of plain characters.
    pub program: String,
}

impl std::fmt::Display for Holder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "pid {}, {}", self.pid, shown(&self.program))
    }
}

/// How another holder's lock conflicts with ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockConflict {
    /// It uses a permission that we do not share.
    Uses(Permission),
    /// It does not share a permission that we need.
    DoesNotShare(Permission),
    /// It belongs to an earlier storage of the same owner, whose I/O may not be over.
    Predecessor,
}

impl std::fmt::Display for Step {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Step::Open => "opening",
            Step::FindPlace => "asking where the open file is",
            Step::Stat => "asking for the file's attributes",
            Step::StatFileSystem => "asking for the file system's kind",
            Step::ProbeBlockDevice => "asking the block device for its geometry",
            Step::SetFlags => "setting the open file's flags",
            Step::Create => "creating the file",
            Step::SyncFolder => "making the file's name durable",
            Step::Remove => "removing the file",
            Step::Lock => "taking the image lock",
            Step::SetUpRing => "setting up an io_uring",
            Step::SetUpEpoll => "setting up an epoll",
            Step::MakeEventFd => "making an eventfd",
        })
    }
}

impl std::fmt::Display for FileKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            FileKind::Directory => "a directory",
            FileKind::Fifo => "a named pipe",
            FileKind::Socket => "a socket",
            FileKind::CharacterDevice => "a character device",
            FileKind::Unknown => "of an unknown type",
        })
    }
}

impl std::fmt::Display for Permission {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Permission::ConsistentRead => "consistent read",
            Permission::Write => "write",
            Permission::WriteUnchanged => "write unchanged",
            Permission::Resize => "resize",
        })
    }
}

impl std::fmt::Display for LockConflict {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            LockConflict::Uses(permission) => write!(f, "uses the permission \"{permission}\""),
            LockConflict::DoesNotShare(permission) => {
                write!(f, "does not share the permission \"{permission}\"")
            }
            LockConflict::Predecessor => {
                f.write_str("may still finish requests of the daemon that served here before")
            }
        }
    }
}
