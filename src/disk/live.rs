//! Snapshots of a disk in use: what is asked for, and why it is refused.

use std::io;
use std::path::PathBuf;

use names::shown;
use thiserror::Error;

use crate::error::OpenError;

/// An overlay that is to become the top image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewOverlay {
    /// Its file, which does not exist.
    pub path: PathBuf,
    /// The name of the present top image, as the overlay's header is to have it. A relative one is relative to the overlay's
    /// folder.
    pub backing_file: Vec<u8>,
}

/// Why the next open could not be told of the overlay.
#[derive(Debug)]
pub struct NotNamed {
    /// The host's error.
    pub source: io::Error,
    /// The next open surely finds the old top. If not, it may find either.
    pub undone: bool,
}

/// Why a snapshot of a disk in use failed. The disk goes on with its old top.
#[derive(Debug, Error)]
pub enum SnapshotError {
    /// The disk cannot have one now.
    #[error("{}: {source}", shown(path))]
    Refused {
        /// The top image.
        path: PathBuf,
        /// The reason.
        source: SnapshotRefusal,
    },
    /// The overlay could not be made, or the top image not be made durable.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// It could not be recorded for the next open that the overlay is the top.
    #[error("{}: it could not be recorded that the overlay is the top: {source}", shown(path))]
    Name {
        /// The top image.
        path: PathBuf,
        /// The host's error.
        source: io::Error,
    },
}

/// Why a disk cannot have a snapshot now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum SnapshotRefusal {
    /// It is open read-only.
    #[error("the disk is read-only")]
    ReadOnly,
    /// Metadata could not be made durable, or the image is damaged.
    #[error("the disk has failed or is damaged")]
    Failed,
    /// A dead daemon left a journal, and its frontend is not back.
    #[error("the last daemon was killed, and the frontend that has its journal is not back yet")]
    AwaitsJournal,
    /// The top image's data is in an external file.
    #[error("its data is in an external file: snapshots of such a disk in use are not supported")]
    DataFile,
    /// The chain has as many layers as it may have.
    #[error("the chain has {limit} layers, and no more can be opened")]
    ChainTooDeep {
        /// The most layers.
        limit: usize,
    },
    /// The map is larger than the disk: it was made smaller since it was opened, or its growth was given up late.
    #[error(
        "the disk was made smaller, or its growth was given up, since it was opened: open it again first"
    )]
    LargerMap,
    /// The disk has another size than the overlay.
    #[error("the disk was resized meanwhile")]
    Resized,
    /// A queue or another task has the disk.
    #[error("something else uses the disk at this moment")]
    InUse,
}
