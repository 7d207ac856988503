//! The errors that end the program early: what failed, where, why. `hint` owns what to do about it, `report` how it
//! reaches people and programs.

use std::error::Error;
use std::io;
use std::path::PathBuf;

use control::client::ClientError;
use disk::{Foreign, OpenError};
use names::shown;
use storage::StorageError;
use thiserror::Error;
use vhost_blk::SessionError;

use crate::limits::SOCKET_PATH_MAX;

/// The exit code of `qemu-img check` for a format that it cannot check.
const NOTHING_TO_CHECK: u8 = 63;

/// What an image was opened for: the command, and what it does with the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// To serve it writable.
    Serve,
    /// To serve it read-only.
    ServeReadOnly,
    /// To describe it.
    Info,
    /// To check it.
    Check,
    /// To repair it.
    Repair,
    /// To list its snapshots.
    SnapshotList,
    /// To create, apply or delete a snapshot.
    SnapshotChange,
    /// To resize its disk.
    Resize,
}

impl Purpose {
    /// The command's name.
    pub fn command(self) -> &'static str {
        match self {
            Purpose::Serve | Purpose::ServeReadOnly => "serve",
            Purpose::Info => "info",
            Purpose::Check | Purpose::Repair => "check",
            Purpose::SnapshotList | Purpose::SnapshotChange => "snapshot",
            Purpose::Resize => "resize",
        }
    }

    /// True if the image is opened to be written.
    pub fn writes(self) -> bool {
        matches!(self, Purpose::Serve | Purpose::Repair | Purpose::SnapshotChange | Purpose::Resize)
    }
}

/// Why the program ends early.
#[derive(Debug, Error)]
pub enum ProgramError {
    /// The chain could not be opened.
    #[error("{source}")]
    Open {
        /// The top image.
        image: PathBuf,
        /// What it was opened for.
        purpose: Purpose,
        /// Why not.
        source: OpenError,
    },
    /// A folder of the command line cannot be used.
    #[error("--chain-root {0}")]
    ChainRoot(StorageError),
    /// The image could not be checked or repaired.
    #[error("{source}")]
    Check {
        /// The image.
        image: PathBuf,
        /// What it was opened for.
        purpose: Purpose,
        /// Why not.
        source: Box<OpenError>,
    },
    /// A raw image has no metadata.
    #[error("{}: a raw image has no metadata, so there is nothing to check", shown(image))]
    NothingToCheck {
        /// The image.
        image: PathBuf,
    },
    /// A snapshot could not be created, applied or deleted.
    #[error(transparent)]
    Snapshot(disk::snapshot::ChangeError),
    /// The disk could not be resized.
    #[error(transparent)]
    Resize(disk::resize::ResizeError),
    /// A snapshot of a disk in use failed.
    #[error(transparent)]
    LiveSnapshot(disk::SnapshotError),
    /// The image could not be closed cleanly.
    #[error("the image could not be closed cleanly: {source}")]
    Close {
        /// The top image.
        image: PathBuf,
        /// Why not.
        source: OpenError,
    },
    /// A session still holds the disk after the server has stopped.
    #[error("{}: cannot be closed, as a session still uses it", shown(image))]
    InUse {
        /// The top image.
        image: PathBuf,
    },
    /// The server could not be set up, or had to stop.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// The path is longer than the kernel allows.
    #[error(
        "socket {}: the path has {length} bytes, and a unix socket's may have {SOCKET_PATH_MAX}",
        shown(path)
    )]
    SocketPathTooLong {
        /// The path.
        path: PathBuf,
        /// Its length in bytes.
        length: usize,
    },
    /// The folder of the socket cannot be used.
    #[error("socket {}: the folder {} cannot be used: {source}", shown(path), shown(folder))]
    SocketFolder {
        /// The path of the socket.
        path: PathBuf,
        /// The folder.
        folder: PathBuf,
        /// The host's error.
        source: io::Error,
    },
    /// The permissions of the socket file could not be set.
    #[error("socket {}: {step} failed: {source}", shown(path))]
    SocketAccess {
        /// The path.
        path: PathBuf,
        /// What was tried.
        step: &'static str,
        /// The host's error.
        source: io::Error,
    },
    /// The service manager passed a number of sockets other than one.
    #[error("the service manager passed {count} sockets (LISTEN_FDS), and a disk is served on one")]
    PassedSockets {
        /// How many.
        count: u32,
    },
    /// The daemon that serves on a socket could not be replaced.
    #[error("the daemon on socket {} cannot be replaced: {step} failed: {source}", shown(path))]
    Replace {
        /// The socket.
        path: PathBuf,
        /// What was tried.
        step: &'static str,
        /// The host's error.
        source: io::Error,
    },
    /// The disk does not end with a whole logical block.
    #[error(
        "{}: the disk has {size} bytes, which is no multiple of a logical block of {block} bytes",
        shown(image)
    )]
    BlockSize {
        /// The image.
        image: PathBuf,
        /// Bytes of the disk.
        size: u64,
        /// Bytes of a logical block.
        block: u32,
    },
    /// No such group.
    #[error("the group \"{}\" is not in /etc/group", shown(group))]
    NoSuchGroup {
        /// Its name.
        group: String,
    },
    /// The control socket could not be set up.
    #[error("control: {0}")]
    ControlSocket(#[source] Box<ProgramError>),
    /// A daemon that was asked for a flush could not make everything durable.
    #[error("the flush failed: {source}")]
    Flush {
        /// The top image.
        image: PathBuf,
        /// Why not.
        source: OpenError,
    },
    /// A daemon could not be asked, or has refused.
    #[error("control socket {}: {source}", shown(socket))]
    Ctl {
        /// The socket.
        socket: PathBuf,
        /// Why not.
        source: ClientError,
    },
    /// The host refused something the program needs besides the disk and the socket.
    #[error("{step} failed: {source}")]
    Host {
        /// What was tried.
        step: &'static str,
        /// The host's error.
        source: io::Error,
    },
    /// The output could not be printed.
    #[error("printing failed: {0}")]
    Print(io::Error),
}

impl ProgramError {
    /// The program's exit code: 1, or 63 if an image's format has nothing to check.
    pub fn exit_code(&self) -> u8 {
        match self {
            ProgramError::NothingToCheck { .. } => NOTHING_TO_CHECK,
            ProgramError::Check { source, .. } => match source.as_ref() {
                OpenError::NotQcow2 { foreign, .. } if *foreign != Foreign::Empty => NOTHING_TO_CHECK,
                _ => 1,
            },
            _ => 1,
        }
    }
}

/// The message, followed by those of its causes that it does not contain.
pub fn with_causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let said = cause.to_string();
        if !text.contains(&said) {
            text += &format!(": {said}");
        }
        next = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_is_told_once() {
        let source = io::Error::other("the reason");
        let error = ProgramError::Host { step: "trying", source };
        assert_eq!(with_causes(&error), "trying failed: the reason");
        #[derive(Debug, Error)]
        #[error("it failed")]
        struct Outer(#[source] io::Error);
        assert_eq!(with_causes(&Outer(io::Error::other("the reason"))), "it failed: the reason");
    }
}
