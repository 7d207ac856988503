//! Why an image that nobody uses cannot be changed as asked. Nothing has been written then.

use names::shown;
use qcow2::HostOffset;
use thiserror::Error;

use crate::check::{Finding, Refusal};

/// Why not.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ChangeRefusal {
    /// The image has what the walk of its tables does not know.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// What is in another file cannot be kept.
    #[error("the image keeps its data in an external data file, of which there can be no snapshots")]
    DataFile,
    /// The table of snapshots cannot be read.
    #[error(
        "entry {index} of the snapshot table, at offset {offset}, is broken or missing: `strata check -r all` mends the \
         table if no snapshot is lost by that"
    )]
    BadTable {
        /// The entry's place in the table, from 0.
        index: u32,
        /// Where it is.
        offset: HostOffset,
    },
    /// A name that nothing can be called by.
    #[error("a name has 1 to {max} bytes, and this one has {length}")]
    NameLength {
        /// Bytes of the name.
        length: usize,
        /// The most there may be.
        max: usize,
    },
    /// There is such a snapshot already.
    #[error("there is a snapshot with the ID or the name \"{}\" already", shown(name))]
    Exists {
        /// The name.
        name: String,
    },
    /// There is no such snapshot.
    #[error("there is no snapshot with the ID or the name \"{}\"", shown(wanted))]
    NotFound {
        /// What was asked for.
        wanted: String,
    },
    /// Which of two is meant to go is not sure enough.
    #[error(
        "\"{}\" is the ID of one snapshot and the name of another: delete the other by its ID first, or this one by \
         its name",
        shown(wanted)
    )]
    Ambiguous {
        /// What was asked for.
        wanted: String,
    },
    /// As many snapshots as there may be, or as much as the table may hold.
    #[error("the snapshot table is full: delete a snapshot first")]
    TableFull,
    /// A snapshot's L1 table does not map its whole disk.
    #[error("the snapshot is damaged: its L1 table has {entries} entries, but its disk needs {needed}")]
    TooFewL1Entries {
        /// Entries of the table.
        entries: u64,
        /// Entries needed.
        needed: u64,
    },
    /// A cluster cannot be shared by more.
    #[error(
        "the cluster at offset {offset} would need refcount {needed}, and refcounts of this image end at {max}: delete a \
         snapshot first, or convert the image with `qemu-img convert -O qcow2 -o refcount_bits=16`"
    )]
    RefcountFull {
        /// Where the cluster is.
        offset: HostOffset,
        /// What it would take.
        needed: u64,
        /// The largest refcount.
        max: u64,
    },
    /// The tables say what they must not.
    #[error("the image is damaged, at {0}: `strata check` and `qemu-img check` tell more")]
    Damaged(Box<Finding>),
    /// Metadata lies upon something else.
    #[error("the image is damaged: the cluster of metadata at offset {offset} has something else in it too")]
    Overlap {
        /// Where the cluster is.
        offset: HostOffset,
    },
    /// A cluster in use might be given away.
    #[error(
        "the image is damaged: the refcount of the cluster at offset {offset} is too low; repair it with \
         `strata check -r all` first"
    )]
    RefcountTooLow {
        /// Where the cluster is.
        offset: HostOffset,
    },
    /// No place for new metadata.
    #[error("the file is as large as its format allows")]
    TooLarge,
    /// They would say something of a disk of another size.
    #[error(
        "the image has persistent bitmaps ({count}), which fit a disk of its present size only: remove them with `qemu-img \
         bitmap --remove` first, or resize the image with `qemu-img resize`"
    )]
    ResizeWithBitmaps {
        /// How many.
        count: u32,
    },
    /// Their size is that of the image.
    #[error(
        "the image is of version 2 and has snapshots, which would change their size with it: delete them first, or make it \
         one of version 3 with `qemu-img amend -o compat=1.1`"
    )]
    ResizeWithSnapshotsInV2,
    /// Its size is that of the image.
    #[error(
        "the snapshot with the ID \"{}\" does not say how large its disk is, and would change its size with the image: \
         delete it, or have `strata check -r all` add that",
        shown(id)
    )]
    SnapshotWithoutSize {
        /// Its ID.
        id: Vec<u8>,
    },
    /// What is new would not read as zero.
    #[error(
        "the backing file has {backing_size} bytes, which would show through in the new part of the disk, as version 2 \
         has no zero clusters: make the image one of version 3 with `qemu-img amend -o compat=1.1`"
    )]
    BackingShowsThrough {
        /// Bytes of the backing file's disk.
        backing_size: u64,
    },
    /// An L1 table cannot be so large.
    #[error("a disk of {size} bytes is too large: with the cluster size of this image it may have {max}")]
    DiskTooLarge {
        /// Bytes of the disk.
        size: u64,
        /// The most there may be.
        max: u64,
    },
}
