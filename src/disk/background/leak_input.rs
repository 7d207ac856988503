//! The input of the search for leaks, collected at open: the tables of snapshots, and whether anything unknown may own
//! clusters.

use std::sync::atomic::AtomicBool;

use engine::TopSpec;
use qcow2::feature::{AUTOCLEAR_BITMAPS, AUTOCLEAR_RAW_DATA_FILE, COMPATIBLE_LAZY_REFCOUNTS};
use qcow2::{Header, HostRange, extension};

/// Input of a disk's search, and whether it is still to run.
#[derive(Debug, Default)]
pub(crate) struct LeakInput {
    /// The L1 tables of snapshots: offset, and length in bytes.
    pub snapshot_l1: Vec<HostRange>,
    /// There is nothing to search, or the search went as far as it can.
    pub settled: AtomicBool,
    /// A journal was carried out in part. Clusters that its other records name may be counted. The search leaves them
    /// alone, as they were touched in this session, so it is for the next writer to find them.
    pub half_replayed: AtomicBool,
}

impl LeakInput {
    /// The input of a top image's search.
    pub fn of(top: Option<&TopSpec>) -> Self {
        // The first is the snapshot table.
        let tables = top.map_or(&[][..], |top| &top.snapshots.tables);
        LeakInput { snapshot_l1: tables.iter().skip(1).copied().collect(), ..LeakInput::default() }
    }
}

/// True if the header names nothing that may own clusters unknown to us. `bitmaps`: the image's bitmaps are known.
pub(crate) fn knows_all_owners(header: &Header, bitmaps: bool) -> bool {
    let known = [extension::BACKING_FORMAT, extension::FEATURE_NAMES, extension::DATA_FILE];
    let has_bitmaps = header.extensions.iter().any(|extension| extension.magic == extension::BITMAPS);
    let known = |magic| known.contains(&magic) || magic == extension::BITMAPS;
    header.extensions.iter().all(|extension| known(extension.magic))
        && (bitmaps || !has_bitmaps)
        && header.unknown_fields.iter().all(|byte| *byte == 0)
        && header.compatible & !COMPATIBLE_LAZY_REFCOUNTS == 0
        && (header.journal_number().is_some()
            || header.autoclear & !(AUTOCLEAR_BITMAPS | AUTOCLEAR_RAW_DATA_FILE) == 0)
}
