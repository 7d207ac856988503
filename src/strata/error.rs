//! What ends the program early, and how it is told: what, where, why, and what to do about it.

use std::error::Error;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use disk::OpenError;
use disk::check::CheckError;
use qcow2::{FormatError, FormatErrorKind, Structure};
use storage::StorageError;
use storage::error::Step;
use thiserror::Error;
use vhost_blk::SessionError;

use crate::limits;
use crate::listen::SOCKET_PATH_MAX;
use crate::log;
use crate::text::printable;

/// What a chain was opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// To serve it writable.
    Write,
    /// To serve it read-only.
    Read,
    /// To describe it.
    Describe,
    /// To check or repair it.
    Check,
}

/// Why the program ends with exit code 1.
#[derive(Debug, Error)]
pub enum ProgramError {
    /// The chain could not be opened.
    #[error("{source}")]
    Open {
        /// The top image.
        image: PathBuf,
        /// What for.
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
        /// It.
        image: PathBuf,
        /// Why not.
        source: Box<CheckError>,
    },
    /// A raw image has no metadata.
    #[error("{}: a raw image has no metadata, so there is nothing to check", image.display())]
    NothingToCheck {
        /// It.
        image: PathBuf,
    },
    /// A snapshot could not be made, applied or deleted.
    #[error(transparent)]
    Snapshot(disk::snapshot::ChangeError),
    /// The disk has not got another size.
    #[error(transparent)]
    Resize(disk::resize::ResizeError),
    /// The image could not be closed cleanly.
    #[error("the image could not be closed cleanly: {source}")]
    Close {
        /// The top image.
        image: PathBuf,
        /// Why not.
        source: OpenError,
    },
    /// A session still holds the disk after the server has stopped.
    #[error("{}: cannot be closed, as a session still uses it", image.display())]
    InUse {
        /// The top image.
        image: PathBuf,
    },
    /// The server could not be set up, or had to stop.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// The kernel has no room for so long a name.
    #[error("socket {}: the path has {length} bytes, and a unix socket's may have {SOCKET_PATH_MAX}", path.display())]
    SocketPathTooLong {
        /// The path.
        path: PathBuf,
        /// Bytes.
        length: usize,
    },
    /// The folder that the socket is to be in cannot be used.
    #[error("socket {}: the folder {} cannot be used: {source}", path.display(), folder.display())]
    SocketFolder {
        /// The path of the socket.
        path: PathBuf,
        /// The folder.
        folder: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// The socket file could not be given to whom it is for.
    #[error("socket {}: {step} failed: {source}", path.display())]
    SocketAccess {
        /// The path.
        path: PathBuf,
        /// What was tried.
        step: &'static str,
        /// What the host said.
        source: io::Error,
    },
    /// The service manager passed another number of sockets than one.
    #[error("the service manager passed {count} sockets (LISTEN_FDS), and a disk is served on one")]
    PassedSockets {
        /// How many.
        count: u32,
    },
    /// No such group.
    #[error("the group \"{group}\" of --socket-group is not in /etc/group")]
    NoSuchGroup {
        /// Its name.
        group: String,
    },
    /// The host refused what the program needs besides the disk and the socket.
    #[error("{step} failed: {source}")]
    Host {
        /// What was tried.
        step: &'static str,
        /// What the host said.
        source: io::Error,
    },
    /// What was to be printed could not be.
    #[error("printing failed: {0}")]
    Print(io::Error),
}

impl ProgramError {
    /// What to do about it, where the message itself does not say.
    fn hint(&self) -> Option<String> {
        limits::hint(self).or_else(|| self.own_hint())
    }

    fn own_hint(&self) -> Option<String> {
        match self {
            ProgramError::Open { image, purpose, source } => open_hint(image, *purpose, source),
            ProgramError::Check { image, source } => match source.as_ref() {
                CheckError::Open(source) => open_hint(image, Purpose::Check, source),
                _ => None,
            },
            ProgramError::Close { image, .. } => {
                Some(format!("look at the image with `strata check {}`", image.display()))
            }
            ProgramError::Session(error) => session_hint(error),
            ProgramError::SocketPathTooLong { .. } => Some(
                "choose a shorter path, for example under /run, or one relative to the current folder".into(),
            ),
            ProgramError::SocketFolder { folder, source, .. } if source.kind() == io::ErrorKind::NotFound => {
                Some(format!("make the folder first: `mkdir -p {}`", folder.display()))
            }
            ProgramError::SocketAccess { .. } => {
                Some("only root may give a file to any group; others only to a group they are in".into())
            }
            ProgramError::NoSuchGroup { .. } => Some("groups from elsewhere can be given by number".into()),
            _ => None,
        }
    }
}

fn open_hint(image: &Path, purpose: Purpose, error: &OpenError) -> Option<String> {
    match error {
        OpenError::Backing { chain, recorded, source } => Some(backing_hint(chain, *recorded, source)),
        OpenError::Storage(StorageError::File { step: Step::Open, path, source }) => match source.kind() {
            io::ErrorKind::NotFound if path != image => Some("is the path right?".into()),
            io::ErrorKind::NotFound => Some(format!(
                "is the path right? `qemu-img create -f qcow2 {} 10G` makes a new image",
                image.display()
            )),
            _ if purpose == Purpose::Write && storage::host::is_readable(path) => Some(
                "it can be read but not written: give --read-only, or make it writable for this user".into(),
            ),
            io::ErrorKind::PermissionDenied => Some("this user must be able to open it".into()),
            _ => None,
        },
        OpenError::Storage(StorageError::Locked { .. }) => Some(locked_hint(purpose).into()),
        OpenError::Storage(StorageError::Outside { .. }) => Some(OUTSIDE_HINT.into()),
        OpenError::Format { source, .. } if is_bad_magic(source) => {
            Some("if it is a raw image, say --format raw".into())
        }
        OpenError::Format { source, .. }
            if matches!(source.structure, Structure::RefcountTable | Structure::SnapshotTable) =>
        {
            Some(format!("`strata check {}` tells whether that can be mended", image.display()))
        }
        _ => None,
    }
}

const OUTSIDE_HINT: &str =
    "if it is meant to be used, allow its folder too: --chain-root may be given several times";

/// What to do about a layer below the image; the last name of the chain is its own.
fn backing_hint(chain: &[PathBuf], recorded: bool, error: &OpenError) -> String {
    let (image, overlay) = match chain {
        [image, .., overlay, _] | [image @ overlay, _] => (image.display(), overlay.display()),
        _ => return "the image cannot be used without it".into(),
    };
    let what = match error {
        OpenError::Storage(StorageError::File { step: Step::Open, source, .. })
            if source.kind() == io::ErrorKind::NotFound =>
        {
            format!("bring it back, or name another with `qemu-img rebase -u -b FILE -F FORMAT {overlay}`")
        }
        OpenError::Storage(StorageError::File { step: Step::Open, .. }) => {
            "this user must be able to read it".into()
        }
        OpenError::Storage(StorageError::Locked { .. }) => {
            "a backing file may be read by many, but written by nobody".into()
        }
        OpenError::Storage(StorageError::Outside { .. }) => OUTSIDE_HINT.into(),
        OpenError::Format { source, .. } if is_bad_magic(source) && recorded => format!(
            "its overlay records that it is qcow2; if it is raw, say so with \
             `qemu-img rebase -u -b FILE -F raw {overlay}`"
        ),
        OpenError::Format { source, .. } if is_bad_magic(source) => {
            "its overlay records no format; if it is raw, say --backing-format raw".into()
        }
        _ => "the image cannot be used without it".into(),
    };
    format!("it is in the backing chain of {image}: {what}")
}

fn locked_hint(purpose: Purpose) -> &'static str {
    match purpose {
        Purpose::Write => "two may use one image at a time only if both do with --read-only",
        Purpose::Read => "an image that is being written cannot be read by others, not even with --read-only",
        Purpose::Check => {
            "an image in use can be looked at with --force-share, but not repaired; what is found may just have been changing"
        }
        Purpose::Describe => {
            "what an image says of itself may change at any moment while it is being written; -U reads it all the same"
        }
    }
}

fn is_bad_magic(error: &FormatError) -> bool {
    matches!(error.kind, FormatErrorKind::BadMagic { .. })
}

fn session_hint(error: &SessionError) -> Option<String> {
    let hint = match error {
        SessionError::SocketInUse { .. } => "stop that program, or choose another --socket-path",
        SessionError::NotASocket { .. } => "choose another --socket-path, or remove that file yourself",
        SessionError::Socket { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
            "this user must be able to make files in the folder"
        }
        SessionError::InheritedFd { .. } => {
            "--fd is for a parent that leaves a listening or connected unix socket open at that number"
        }
        _ => return None,
    };
    Some(hint.to_owned())
}

/// Tells people on the standard error, if anybody reads it.
pub fn show(error: &ProgramError) {
    let prefix = log::error_prefix();
    let mut text = format!("{prefix}strata: error: {}\n", printable(&with_causes(error)));
    if let Some(hint) = error.hint() {
        text += &format!("{prefix}strata: hint: {}\n", printable(&hint));
    }
    let _ = io::stderr().write_all(text.as_bytes());
}

/// The message, and those of its causes that it does not contain.
fn with_causes(error: &dyn Error) -> String {
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

    #[test]
    fn a_backing_file_is_told_from_the_image() {
        let missing = |path: &str| {
            let source = io::ErrorKind::NotFound.into();
            OpenError::Storage(StorageError::File { step: Step::Open, path: path.into(), source })
        };
        let open = |source| ProgramError::Open { image: "top".into(), purpose: Purpose::Write, source };
        assert!(open(missing("top")).hint().expect("a hint").contains("qemu-img create"));
        let chain = ["top", "middle", "base"].map(PathBuf::from).to_vec();
        let source = Box::new(missing("base"));
        let below = open(OpenError::Backing { chain, recorded: true, source });
        assert!(below.to_string().ends_with("(layer 3 of the chain top -> middle -> base)"), "{below}");
        let hint = below.hint().expect("a hint");
        assert!(hint.contains("backing chain of top") && hint.contains("FORMAT middle`"), "{hint}");
    }
}
