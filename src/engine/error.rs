//! The errors of the engine. They come only from the bytes of an image, or from a disk that has failed.

use qcow2::EntryError;
use thiserror::Error;

/// A structure of a qcow2 file, for messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Structure {
    /// The header.
    Header,
    /// The active L1 table.
    L1,
    /// An L2 table.
    L2,
    /// The refcount table.
    RefcountTable,
    /// A refblock.
    Refblock,
    /// The directory of bitmaps (entry 0), their tables and their clusters.
    Bitmaps,
    /// The snapshot table (entry 0) and the L1 tables of snapshots.
    Snapshots,
    /// An L2 table of a snapshot.
    SnapshotL2,
}

impl std::fmt::Display for Structure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Structure::Header => "header",
            Structure::L1 => "L1 table",
            Structure::L2 => "L2 table",
            Structure::RefcountTable => "refcount table",
            Structure::Refblock => "refcount block",
            Structure::Bitmaps => "bitmaps",
            Structure::Snapshots => "snapshot table",
            Structure::SnapshotL2 => "L2 table of a snapshot",
        })
    }
}

/// An error of the engine. Clone, because a failed disk repeats its reason.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum EngineError {
    /// An entry of a table makes no sense. Only the requests that need it fail.
    #[error("layer {layer}: {structure}, entry {index}: {source}")]
    BadEntry {
        /// 0 is the top image.
        layer: usize,
        /// The table.
        structure: Structure,
        /// The entry's number in the whole table (for L2: the guest cluster).
        index: u64,
        /// Why.
        source: EntryError,
    },
    /// The top image is damaged, and this is the proof. The image is marked corrupt for no other error.
    #[error(transparent)]
    Corrupt(#[from] Proof),
    /// The refcount table would grow past its limit of 8 MiB.
    #[error("the refcount table cannot grow past 8 MiB: the image file is as large as its format allows")]
    RefcountTableFull,
    /// The disk would need a longer L1 table than the table's clusters have room for.
    #[error(
        "a disk of this size needs {entries} entries in its L1 table, which has room for {room}; the table can be moved \
         only while the image is not in use"
    )]
    L1TableFull {
        /// Entries that the size needs.
        entries: u64,
        /// Entries that fit into the table's clusters.
        room: u64,
    },
    /// The image file would grow past the largest offset in its format.
    #[error("the image file cannot grow past 2^56 bytes, the largest offset of its format")]
    FileTooLarge,
    /// An earlier metadata write or flush failed, or the image is corrupt: nothing is written any more.
    #[error("the disk refuses writes since an earlier metadata write or flush failed")]
    Failed,
    /// The image was opened read-only.
    #[error("the image is open read-only")]
    ReadOnly,
}

/// Proof that the top image is damaged: two facts that contradict each other, both read from the image and both exact.
/// A mere suspicion is no proof. docs/durability.md, "The guard", lists the places in the code that find one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Proof {
    /// A change needs an entry that makes no sense.
    #[error("layer 0: {structure}, entry {index}: {source}")]
    BadEntry {
        /// The table.
        structure: Structure,
        /// The entry's number in the whole table (for L2: the guest cluster).
        index: u64,
        /// Why.
        source: EntryError,
    },
    /// A refcount contradicts the tables: zero for a cluster in use.
    #[error("layer 0: cluster {cluster:#x} is in use{} but its refcount is zero", told(*holds))]
    RefcountZero {
        /// Host cluster number.
        cluster: u64,
        /// The metadata that it holds.
        holds: Option<Structure>,
    },
    /// Two pieces of metadata, or metadata and data, lie in the same cluster.
    #[error(
        "layer 0: {structure}, entry {index} names cluster {cluster:#x}, which holds other metadata: {holds}"
    )]
    Overlap {
        /// The table with the entry.
        structure: Structure,
        /// The entry's number in the whole table (for L2: the guest cluster).
        index: u64,
        /// Host cluster number.
        cluster: u64,
        /// The other structure in that cluster.
        holds: Structure,
    },
}

/// The content of a cluster, in brackets.
fn told(holds: Option<Structure>) -> String {
    holds.map_or_else(String::new, |holds| format!(" (it holds metadata: {holds})"))
}

impl EngineError {
    /// A cluster with refcount zero holds metadata.
    pub(crate) fn free_metadata((cluster, holds): (u64, Structure)) -> Self {
        Proof::RefcountZero { cluster, holds: Some(holds) }.into()
    }

    /// An entry names a cluster with refcount zero.
    pub(crate) fn free_data(cluster: u64) -> Self {
        Proof::RefcountZero { cluster, holds: None }.into()
    }

    /// Turns the error of a read into that of a change. An entry that makes no sense fails a read, but for a change it
    /// is proof of damage. A zero flag in version 2 is no proof: another program's habit, and no location is in doubt.
    pub(crate) fn of_change(self) -> Self {
        match self {
            EngineError::BadEntry { source: EntryError::ZeroFlagInV2 { .. }, .. } => self,
            EngineError::BadEntry { layer: 0, structure, index, source } => {
                Proof::BadEntry { structure, index, source }.into()
            }
            other => other,
        }
    }

    /// True if the top image itself is damaged, so that its corrupt bit is to be set.
    pub fn is_top_corruption(&self) -> bool {
        matches!(self, EngineError::Corrupt(_))
    }
}
