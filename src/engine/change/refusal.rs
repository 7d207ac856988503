//! Why an image that no process uses cannot be changed. Nothing has been written then.

use names::shown;
use qcow2::HostOffset;
use thiserror::Error;

use crate::check::{Finding, Refusal};

/// The reason why a change is refused.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ChangeRefusal {
    /// The image has a feature that the walk of its tables does not support.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// Snapshots cannot preserve data in another file.
    #[error("the image keeps its data in an external data file, of which there can be no snapshots")]
    DataFile,
    /// The table of snapshots cannot be read.
    #[error(
        "entry {index} of the snapshot table, at offset {offset}, is broken or missing: `strata check -r all` mends the \
         table if no snapshot is lost by that"
    )]
    BadTable {
        /// The entry's index in the table, from 0.
        index: u32,
        /// The offset of the entry.
        offset: HostOffset,
    },
    /// A name of an invalid length.
    #[error("a name has 1 to {max} bytes, and this one has {length}")]
    NameLength {
        /// Bytes of the name.
        length: usize,
        /// The most there may be.
        max: usize,
    },
    /// A snapshot with this name or ID already exists.
    #[error("there is a snapshot with the ID or the name \"{}\" already", shown(name))]
    Exists {
        /// The name.
        name: String,
    },
    /// No snapshot has this name or ID.
    #[error("there is no snapshot with the ID or the name \"{}\"", shown(wanted))]
    NotFound {
        /// The requested ID or name.
        wanted: String,
    },
    /// The ID or name fits two snapshots, so it is not clear which one to delete.
    #[error(
        "\"{}\" is the ID of one snapshot and the name of another: delete the other by its ID first, or this one by \
         its name",
        shown(wanted)
    )]
    Ambiguous {
        /// The requested ID or name.
        wanted: String,
    },
    /// The snapshot table has the most entries or bytes that are allowed.
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
    /// The refcount of a cluster cannot rise further.
    #[error(
        "the cluster at offset {offset} would need refcount {needed}, and refcounts of this image end at {max}: delete a \
         snapshot first, or convert the image with `qemu-img convert -O qcow2 -o refcount_bits=16`"
    )]
    RefcountFull {
        /// The offset of the cluster.
        offset: HostOffset,
        /// The refcount needed.
        needed: u64,
        /// The largest refcount.
        max: u64,
    },
    /// The walk of the tables found a fault.
    #[error("the image is damaged, at {0}: `strata check` and `qemu-img check` tell more")]
    Damaged(Box<Finding>),
    /// Metadata overlaps something else.
    #[error("the image is damaged: the cluster of metadata at offset {offset} has something else in it too")]
    Overlap {
        /// The offset of the cluster.
        offset: HostOffset,
    },
    /// The refcount of a cluster in use is too low, so the cluster might be given away.
    #[error(
        "the image is damaged: the refcount of the cluster at offset {offset} is too low; repair it with \
         `strata check -r all` first"
    )]
    RefcountTooLow {
        /// The offset of the cluster.
        offset: HostOffset,
    },
    /// There is no room for new metadata.
    #[error("the file is as large as its format allows")]
    TooLarge,
    /// The image has persistent bitmaps, which would describe a disk of another size.
    #[error(
        "the image has persistent bitmaps ({count}), which fit a disk of its present size only: remove them with `qemu-img \
         bitmap --remove` first, or resize the image with `qemu-img resize`"
    )]
    ResizeWithBitmaps {
        /// The number of bitmaps.
        count: u32,
    },
    /// The image is of version 2, whose snapshots have the size of the image.
    #[error(
        "the image is of version 2 and has snapshots, which would change their size with it: delete them first, or make it \
         one of version 3 with `qemu-img amend -o compat=1.1`"
    )]
    ResizeWithSnapshotsInV2,
    /// A snapshot has no size of its own, so it has that of the image.
    #[error(
        "the snapshot with the ID \"{}\" does not say how large its disk is, and would change its size with the image: \
         delete it, or have `strata check -r all` add that",
        shown(id)
    )]
    SnapshotWithoutSize {
        /// Its ID.
        id: Vec<u8>,
    },
    /// The new part of the disk would not read as zero.
    #[error(
        "the backing file has {backing_size} bytes, which would show through in the new part of the disk, as version 2 \
         has no zero clusters: make the image one of version 3 with `qemu-img amend -o compat=1.1`"
    )]
    BackingShowsThrough {
        /// Bytes of the backing file's disk.
        backing_size: u64,
    },
    /// The disk needs a larger L1 table than the format allows.
    #[error("a disk of {size} bytes is too large: with the cluster size of this image it may have {max}")]
    DiskTooLarge {
        /// Bytes of the disk.
        size: u64,
        /// The most there may be.
        max: u64,
    },
}
