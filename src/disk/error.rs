//! What can go wrong with a disk: opening it, and serving a request.

use std::path::PathBuf;

use engine::EngineError;
use names::shown;
use qcow2::{FormatError, HostOffset, Unsupported};
use storage::{Errno, StorageError};
use thiserror::Error;

use crate::backing::BackingNameError;
use crate::bitmaps::BadBitmaps;
use crate::check::CheckError;
use crate::foreign::Foreign;
use crate::inflate::InflateError;
use crate::snapshot::BadSnapshot;

/// Why a disk could not be opened or closed.
#[derive(Debug, Error)]
pub enum OpenError {
    /// The host could not open, lock or size the file, or has no means for I/O.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// A read or write of the image file failed.
    #[error("{}: {structure} at offset {offset:#x}: {source}", shown(path))]
    Io {
        /// The image.
        path: PathBuf,
        /// What was read or written.
        structure: &'static str,
        /// Byte offset in the file.
        offset: u64,
        /// What the host said.
        source: Errno,
    },
    /// The image's bytes break the format.
    #[error("{}: {source}", shown(path))]
    Format {
        /// The image.
        path: PathBuf,
        /// What is broken and where.
        source: FormatError,
    },
    /// The file is in another format.
    #[error("{}: {source}; the file {}", shown(path), foreign.in_words())]
    NotQcow2 {
        /// The file.
        path: PathBuf,
        /// What is broken and where.
        source: FormatError,
        /// What it is.
        foreign: Foreign,
    },
    /// The image is valid but needs what is not built.
    #[error("{}: {source}", shown(path))]
    Unsupported {
        /// The image.
        path: PathBuf,
        /// What it needs.
        source: Unsupported,
    },
    /// An image that was not closed cleanly could not be repaired.
    #[error(
        "the image is marked dirty (it was not closed cleanly), and its refcounts cannot be rebuilt: {0}"
    )]
    Dirty(Box<CheckError>),
    /// The image's persistent bitmaps break the format.
    #[error("{}: {source}", shown(path))]
    Bitmaps {
        /// The image.
        path: PathBuf,
        /// What is broken.
        source: BadBitmaps,
    },
    /// The table of internal snapshots breaks the format.
    #[error(
        "{}: entry {index} of the snapshot table, at offset {offset}, is broken or missing. The disk itself can be \
         served: `strata serve --read-only`. `strata check -r all` mends the table if no snapshot is lost by that",
        shown(path)
    )]
    SnapshotTable {
        /// The image.
        path: PathBuf,
        /// The entry's place in the table, from 0.
        index: u32,
        /// Where it is.
        offset: HostOffset,
    },
    /// More metadata of snapshots than is watched over while an image is written.
    #[error(
        "{}: the L1 tables of its internal snapshots have {length} bytes together, and at most {max} are watched over \
         while an image is written: delete some snapshots, or open it read-only",
        shown(path)
    )]
    SnapshotsTooLarge {
        /// The image.
        path: PathBuf,
        /// Bytes of them all.
        length: u64,
        /// The most there may be.
        max: u64,
    },
    /// No snapshot is called so.
    #[error("{}: has no internal snapshot \"{}\", by ID or by name", shown(path), shown(wanted))]
    NoSuchSnapshot {
        /// The image.
        path: PathBuf,
        /// What it was asked for by.
        wanted: String,
    },
    /// A snapshot whose table cannot be used.
    #[error("{}: the snapshot \"{}\" is damaged: {source}", shown(path), shown(wanted))]
    BadSnapshot {
        /// The image.
        path: PathBuf,
        /// What it was asked for by.
        wanted: String,
        /// Why not.
        source: BadSnapshot,
    },
    /// A snapshot of an image that can have none.
    #[error("{}: is a raw image, which has no internal snapshots", shown(path))]
    SnapshotOfRaw {
        /// The image.
        path: PathBuf,
    },
    /// A writable qcow2 image on a block device.
    #[error(
        "{}: is a block device; a writable qcow2 image must be a regular file (a raw image may be a block device)",
        shown(path)
    )]
    WritableBlockDevice {
        /// The device.
        path: PathBuf,
    },
    /// Discarded clusters are to keep their places in an image that cannot say that they read as zero.
    #[error(
        "{}: clusters can keep their places when they are discarded only in a qcow2 image of version 3",
        shown(path)
    )]
    NoZeroClusters {
        /// The image.
        path: PathBuf,
    },
    /// An image whose data is in an external file, which nobody named.
    #[error(
        "{}: keeps its data in an external file{}, and only a file that you name is opened", shown(image),
        recorded.as_ref().map(|name| format!(" (its header calls it \"{}\")", shown(name))).unwrap_or_default()
    )]
    DataFileMissing {
        /// The image.
        image: PathBuf,
        /// The name in its header.
        recorded: Option<Vec<u8>>,
        /// It is the top image.
        top: bool,
    },
    /// A data file for an image that keeps its data itself.
    #[error("{}: keeps its data itself, so it cannot be in the data file {}", shown(image), shown(file))]
    DataFileNotWanted {
        /// The image.
        image: PathBuf,
        /// The file that was named for it.
        file: PathBuf,
    },
    /// A data file for an image that is not there.
    #[error(
        "no backing file in the chain is called {}, for which --backing-data-file names a data file",
        shown(layer)
    )]
    DataFileOfNoLayer {
        /// The name.
        layer: PathBuf,
    },
    /// A data file that is a file of the chain already.
    #[error("{}: its data file {} is another file of the chain", shown(image), shown(file))]
    DataFileTwice {
        /// The image.
        image: PathBuf,
        /// The file.
        file: PathBuf,
    },
    /// A data file that cannot grow to the disk's size.
    #[error(
        "{}: this block device has {length} bytes, too few for the data of a disk of {disk} bytes",
        shown(path)
    )]
    DataFileTooShort {
        /// The device.
        path: PathBuf,
        /// Its bytes.
        length: u64,
        /// The disk's.
        disk: u64,
    },
    /// A backing file is named without its format.
    #[error(
        "{}: names the backing file \"{}\" but not its format, and formats are never guessed",
        shown(path),
        shown(backing)
    )]
    BackingFormatMissing {
        /// The overlay.
        path: PathBuf,
        /// The name in its header.
        backing: Vec<u8>,
    },
    /// A backing file has a format that is not served.
    #[error(
        "{}: its backing file \"{}\" has format \"{}\"; only qcow2 and raw are served",
        shown(path),
        shown(backing),
        shown(format)
    )]
    BackingFormatUnknown {
        /// The overlay.
        path: PathBuf,
        /// The name in its header.
        backing: Vec<u8>,
        /// The format in its header.
        format: String,
    },
    /// A backing name that is not taken.
    #[error("{}: names the backing file \"{}\": {source}", shown(path), shown(backing))]
    BackingName {
        /// The overlay.
        path: PathBuf,
        /// The name in its header.
        backing: Vec<u8>,
        /// Why it is not taken.
        source: BackingNameError,
    },
    /// Something is wrong with a layer below the top image.
    #[error("{source} (layer {} of the chain {})", chain.len(), chain_in_words(chain))]
    Backing {
        /// The layers from the top image down to the one that it is about.
        chain: Vec<PathBuf>,
        /// Its overlay says which format that one has.
        recorded: bool,
        /// What is wrong.
        source: Box<OpenError>,
    },
    /// The chain comes back to a file that it has already.
    #[error("{}: is in the chain twice: its backing files form a loop", shown(path))]
    BackingLoop {
        /// The file met twice.
        path: PathBuf,
    },
    /// The chain is too deep.
    #[error("{}: the chain has more than {limit} layers", shown(path))]
    ChainTooDeep {
        /// The layer that was one too many.
        path: PathBuf,
        /// The most there may be.
        limit: usize,
    },
    /// The disk has as many queues as it can have.
    #[error("the disk has {limit} queues, and no more can be")]
    TooManyQueues {
        /// The most there may be.
        limit: usize,
    },
    /// The host refused a thread.
    #[error("the host refused a thread: {0}")]
    Thread(std::io::Error),
    /// Metadata could not be brought to disk, or was found damaged, while closing.
    #[error("{}: {source}", shown(path))]
    Request {
        /// The image.
        path: PathBuf,
        /// What failed.
        source: RequestError,
    },
}

impl OpenError {
    /// What is wrong, without the chain in which it is.
    pub fn innermost(&self) -> &OpenError {
        match self {
            OpenError::Backing { source, .. } => source.innermost(),
            other => other,
        }
    }
}

/// Layers told by name, at each end of a chain.
const NAMES_SHOWN: usize = 3;

/// The names of a chain from the top down; of a deep one, those at its ends.
fn chain_in_words(chain: &[PathBuf]) -> String {
    let join = |paths: &[PathBuf]| {
        let names: Vec<String> = paths.iter().map(|path| shown(path).to_string()).collect();
        names.join(" -> ")
    };
    let hidden = chain.len().saturating_sub(2 * NAMES_SHOWN);
    if hidden <= 1 {
        return join(chain);
    }
    let (first, last) = (&chain[..NAMES_SHOWN], &chain[chain.len() - NAMES_SHOWN..]);
    format!("{} -> ({hidden} more) -> {}", join(first), join(last))
}

/// Why a request failed. The guest learns only that it did; the log has this.
#[derive(Clone, Debug, Error)]
pub enum RequestError {
    /// The image's tables make no sense, or the disk has failed before.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The host's I/O failed.
    #[error("{what} failed: {source}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// What the host said.
        source: Errno,
    },
    /// Too much freed space is held back: the request is to begin anew when some of it was given back. No request ends so.
    #[error("too much freed space is held back")]
    Crowded,
    /// A compressed cluster cannot be inflated. Others can be served.
    #[error("{}: compressed cluster at offset {offset:#x}, {length} bytes: {source}", shown(path))]
    Compressed {
        /// The image.
        path: PathBuf,
        /// Where its data begins in the file.
        offset: u64,
        /// Bytes of the data.
        length: u64,
        /// What is wrong with it.
        source: InflateError,
    },
}

impl RequestError {
    /// Names what was being done when the host failed.
    pub(crate) fn io(what: &'static str) -> impl FnOnce(Errno) -> RequestError {
        move |source| RequestError::Io { what, source }
    }

    /// True if the host has no space (left for this user): nothing is broken.
    pub fn is_no_space(&self) -> bool {
        matches!(self, RequestError::Io { source, .. } if is_no_space(*source))
    }
}

/// True for what the host says where there is no space, or none left for this user, or for this file.
pub(crate) fn is_no_space(errno: Errno) -> bool {
    matches!(errno, Errno::ENOSPC | Errno::EDQUOT | Errno::EFBIG)
}
