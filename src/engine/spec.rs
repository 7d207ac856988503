//! The parameters of an engine: the chain, the bounds of its memory, and where the top image has its metadata.

use qcow2::{HostOffset, HostRange};

use crate::change::SnapshotPlaces;
use crate::entries::Entries;
use crate::layers::LayerSpec;

/// Parameters of an engine.
pub struct EngineSpec {
    /// The chain, the top image first. At least one; at most [`crate::Word::FILES_MAX`].
    pub layers: Vec<LayerSpec>,
    /// The top image may be written.
    pub writable: bool,
    /// The top image's own metadata; required if the image is qcow2 and writable.
    pub top: Option<TopSpec>,
    /// The most bytes of chain map.
    pub map_bytes: usize,
    /// The most bytes of cached tables, above a small minimum. Dirty ones may take half before a flush.
    pub table_bytes: usize,
    /// The most workers at a time.
    pub workers: usize,
}

/// Where the metadata of a writable qcow2 top image lies.
pub struct TopSpec {
    /// The active L1 table's offset.
    pub l1_offset: HostOffset,
    /// The refcount table's offset.
    pub refcount_table_offset: HostOffset,
    /// The entries of the refcount table as on disk: whole clusters of them.
    pub refcount_table: Entries,
    /// The file's length in bytes.
    pub file_length: u64,
    /// The ranges of the file that bitmaps occupy.
    pub bitmaps: Vec<HostRange>,
    /// The metadata of internal snapshots.
    pub snapshots: SnapshotPlaces,
    /// A discarded or zeroed host cluster stays allocated to its guest cluster; only its space is punched. Needs
    /// version 3.
    pub keep_discarded: bool,
    /// All owners of clusters of the file are known, so a search for leaks is safe.
    pub may_search_leaks: bool,
}
