//! The errors of a disk: of opening it, and of serving a request.

use std::path::PathBuf;

use engine::EngineError;
use engine::check::{NotRepairable, Refusal, Report};
use names::{one_line, shown};
use qcow2::{FormatError, HostOffset, Unsupported};
use storage::{Errno, StorageError};
use thiserror::Error;

use crate::inflate::InflateError;
use crate::open::foreign::Foreign;

/// Why an image could not be opened, checked, repaired or closed.
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
        /// The structure that was read or written.
        structure: &'static str,
        /// Byte offset in the file.
        offset: u64,
        /// The host's error.
        source: Errno,
    },
    /// The image's bytes break the format.
    #[error("{}: {source}", shown(path))]
    Format {
        /// The image.
        path: PathBuf,
        /// The broken field and its offset.
        source: FormatError,
    },
    /// The file is in another format.
    #[error("{}: {source}; the file {}", shown(path), foreign.in_words())]
    NotQcow2 {
        /// The file.
        path: PathBuf,
        /// The broken field and its offset.
        source: FormatError,
        /// Its format.
        foreign: Foreign,
    },
    /// The image is valid but needs an unsupported feature.
    #[error("{}: {source}", shown(path))]
    Unsupported {
        /// The image.
        path: PathBuf,
        /// The feature.
        source: Unsupported,
    },
    /// An image that was not closed cleanly could not be repaired.
    #[error(
        "the image is marked dirty (it was not closed cleanly), and its refcounts cannot be rebuilt: {0}"
    )]
    Dirty(Box<OpenError>),
    /// The image has something that cannot be checked yet.
    #[error("{}: {source}", shown(path))]
    NotCheckable {
        /// The image.
        path: PathBuf,
        /// The reason.
        source: Refusal,
    },
    /// New refcounts cannot repair the image. Nothing was written.
    #[error("{}: {source}", shown(path))]
    NotRepairable {
        /// The image.
        path: PathBuf,
        /// The reason.
        source: NotRepairable,
        /// The report of the check.
        found: Box<Report>,
    },
    /// The image's persistent bitmaps break the format.
    #[error("{}: {source}", shown(path))]
    Bitmaps {
        /// The image.
        path: PathBuf,
        /// The damage.
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
        /// The entry's index in the table, from 0.
        index: u32,
        /// Its offset.
        offset: HostOffset,
    },
    /// The snapshots have more metadata than is protected while an image is written.
    #[error(
        "{}: the L1 tables of its internal snapshots have {length} bytes together, and at most {max} are watched over \
         while an image is written: delete some snapshots, or open it read-only",
        shown(path)
    )]
    SnapshotsTooLarge {
        /// The image.
        path: PathBuf,
        /// Bytes of all tables.
        length: u64,
        /// The most there may be.
        max: u64,
    },
    /// No snapshot has this ID or name.
    #[error("{}: has no internal snapshot \"{}\", by ID or by name", shown(path), shown(wanted))]
    NoSuchSnapshot {
        /// The image.
        path: PathBuf,
        /// The requested ID or name.
        wanted: String,
    },
    /// A snapshot whose table cannot be used.
    #[error("{}: the snapshot \"{}\" is damaged: {source}", shown(path), shown(wanted))]
    BadSnapshot {
        /// The image.
        path: PathBuf,
        /// The requested ID or name.
        wanted: String,
        /// The reason.
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
    /// Discarded clusters are to keep their location in an image that cannot record that they read as zero.
    #[error(
        "{}: clusters can keep their places when they are discarded only in a qcow2 image of version 3",
        shown(path)
    )]
    NoZeroClusters {
        /// The image.
        path: PathBuf,
    },
    /// An image has its data in an external file that the operator did not name.
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
    /// A data file was named for an image that keeps its data itself.
    #[error("{}: keeps its data itself, so it cannot be in the data file {}", shown(image), shown(file))]
    DataFileNotWanted {
        /// The image.
        image: PathBuf,
        /// The file that was named for it.
        file: PathBuf,
    },
    /// A data file was named for an image that is not in the chain.
    #[error(
        "no backing file in the chain is called {}, for which --backing-data-file names a data file",
        shown(layer)
    )]
    DataFileOfNoLayer {
        /// The name.
        layer: PathBuf,
    },
    /// A data file is also another file of the chain.
    #[error("{}: its data file {} is another file of the chain", shown(image), shown(file))]
    DataFileTwice {
        /// The image.
        image: PathBuf,
        /// The file.
        file: PathBuf,
    },
    /// A data file cannot grow to the disk's size.
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
    /// A backing name is not accepted.
    #[error("{}: names the backing file \"{}\": {source}", shown(path), shown(backing))]
    BackingName {
        /// The overlay.
        path: PathBuf,
        /// The name in its header.
        backing: Vec<u8>,
        /// The reason.
        source: BackingNameError,
    },
    /// Something is wrong with a layer below the top image.
    #[error("{source} (layer {} of the chain {})", chain.len(), chain_in_words(chain))]
    Backing {
        /// The layers from the top image down to the one with the error.
        chain: Vec<PathBuf>,
        /// That layer's overlay records its format.
        recorded: bool,
        /// The error.
        source: Box<OpenError>,
    },
    /// The chain contains a file twice.
    #[error("{}: is in the chain twice: its backing files form a loop", shown(path))]
    BackingLoop {
        /// The file met twice.
        path: PathBuf,
    },
    /// The chain is too deep.
    #[error("{}: the chain has more than {limit} layers", shown(path))]
    ChainTooDeep {
        /// The first layer past the limit.
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
        /// The error.
        source: RequestError,
    },
}

impl OpenError {
    /// The error itself, without the chain around it.
    pub fn innermost(&self) -> &OpenError {
        match self {
            OpenError::Backing { source, .. } => source.innermost(),
            other => other,
        }
    }
}

/// The number of layers named at each end of a chain.
const NAMES_SHOWN: usize = 3;

/// The names of a chain from the top down; only those at its ends for a deep one.
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

/// Why a request failed. The guest gets only the failure; the log has the reason.
#[derive(Clone, Debug, Error)]
pub enum RequestError {
    /// The image's tables make no sense, or the disk has failed before.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The host's I/O failed.
    #[error("{action} failed: {source}")]
    Io {
        /// The action that failed.
        action: &'static str,
        /// The host's error.
        source: Errno,
    },
    /// Too much freed space is held back: the request must start again when some of it was given back. This is never
    /// a request's final result.
    #[error("too much freed space is held back")]
    Crowded,
    /// The disk became smaller after the caller had checked the request's range.
    #[error("it reaches past the end of the disk, which became smaller")]
    PastEnd,
    /// The request waited for space on the host, or would have, and its queue or the disk is being stopped. Whoever serves
    /// the guest next may do it again.
    #[error("it no longer waits for space: {0}")]
    GivenUp(Box<RequestError>),
    /// A compressed cluster cannot be inflated. Others can be served.
    #[error("{}: compressed cluster at offset {offset:#x}, {length} bytes: {source}", shown(path))]
    Compressed {
        /// The image.
        path: PathBuf,
        /// Offset of its data in the file.
        offset: u64,
        /// Bytes of the data.
        length: u64,
        /// The damage.
        source: InflateError,
    },
}

impl RequestError {
    /// Makes an error with the action in which the host failed.
    pub(crate) fn io(action: &'static str) -> impl FnOnce(Errno) -> RequestError {
        move |source| RequestError::Io { action, source }
    }

    /// True if the request failed only because it no longer waits for space.
    pub fn was_given_up(&self) -> bool {
        matches!(self, RequestError::GivenUp(_))
    }

    /// The end of a request that no longer waits for space.
    pub(crate) fn give_up(self) -> RequestError {
        RequestError::GivenUp(Box::new(self))
    }

    /// True if the host has no space (left for this user): nothing is broken.
    pub fn is_no_space(&self) -> bool {
        match self {
            RequestError::Io { source, .. } => is_no_space(*source),
            RequestError::GivenUp(error) => error.is_no_space(),
            _ => false,
        }
    }
}

/// True for the host's errors when there is no space, or none left for this user, or for this file.
pub(crate) fn is_no_space(errno: Errno) -> bool {
    matches!(errno, Errno::ENOSPC | Errno::EDQUOT | Errno::EFBIG)
}

/// Why a backing name is not accepted.
#[derive(Debug, Error)]
pub enum BackingNameError {
    /// No name follows `file:`.
    #[error("it is empty")]
    Empty,
    /// The name is not one of a file.
    #[error("\"{}\" is a protocol, and only files are opened", shown(protocol))]
    Protocol {
        /// Its name.
        protocol: Vec<u8>,
    },
    /// The JSON is broken, or holds more than a format and a file.
    #[error(
        "as a json: name it may hold \"driver\", and \"file\" with \"driver\" and \"filename\", and no more: {}",
        one_line(&.0.to_string())
    )]
    Json(serde_json::Error),
    /// The JSON names no file, or two.
    #[error("its JSON must name one file")]
    JsonFile,
    /// The JSON names a format that is not served.
    #[error("its JSON has the driver \"{}\"; only qcow2 and raw are served", shown(driver))]
    JsonFormat {
        /// The driver.
        driver: String,
    },
    /// The JSON names something other than a file.
    #[error("its JSON has the driver \"{}\" for the file; only files are opened", shown(driver))]
    JsonProtocol {
        /// The driver.
        driver: String,
    },
    /// The JSON has a relative name, whose folder is unknown.
    #[error(
        "its JSON has the relative name \"{}\", which QEMU looks for in the folder where it is started; only \
         a whole path is taken",
        shown(filename)
    )]
    JsonRelative {
        /// The name.
        filename: String,
    },
    /// The name and the header disagree.
    #[error(
        "its JSON has the driver \"{}\", but the header has the format \"{}\"",
        shown(driver),
        shown(format)
    )]
    JsonDisagrees {
        /// The driver in the name.
        driver: String,
        /// The format in the header.
        format: String,
    },
}

/// Why the bitmaps of an image cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum BadBitmaps {
    /// An entry of the directory is bad.
    #[error("entry {index} of the bitmap directory, at offset {offset}, is broken or missing")]
    Directory {
        /// Its index in the directory, from 0.
        index: u32,
        /// Its offset.
        offset: HostOffset,
    },
    /// The tables together are too large.
    #[error("the tables of its bitmaps have {length} bytes together, and at most {max} are looked at")]
    TooLarge {
        /// Bytes of all tables.
        length: u64,
        /// The limit in bytes.
        max: u64,
    },
    /// An entry of a table is bad.
    #[error("the bitmap table entry {raw:#018x} at offset {offset} makes no sense")]
    TableEntry {
        /// The entry.
        raw: u64,
        /// Its offset.
        offset: HostOffset,
    },
    /// A table or a part of a bitmap is not in the file.
    #[error("{length} bytes of a bitmap at offset {start} are past the end of the file")]
    PastEnd {
        /// The recorded offset.
        start: HostOffset,
        /// Bytes.
        length: u64,
    },
}

/// Why a snapshot cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum BadSnapshot {
    /// No L1 table can be at that offset.
    #[error("its L1 table of {entries} entries cannot be at offset {offset}")]
    L1Place {
        /// The recorded offset.
        offset: HostOffset,
        /// The recorded number of entries.
        entries: u32,
    },
    /// The L1 table cannot map the whole disk.
    #[error("its L1 table has {entries} entries, but its disk needs {needed}")]
    TooFewL1Entries {
        /// Entries of the table.
        entries: u32,
        /// Entries needed.
        needed: u64,
    },
}
