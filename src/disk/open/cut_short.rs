//! Images that were cut short, such as an interrupted copy: structures that their tables name past the end of the
//! file.
//!
//! Owns the comparison with the tables in memory at open. It reads nothing, so it costs only a pass over those
//! tables. Data clusters past the end are not searched for. The engine decides how requests treat such tables.

use engine::{Entries, UsedEntry};
use names::shown;
use qcow2::{Header, HostOffset, L1Entry};
use storage::FileInfo;
use tracing::warn;

/// Structures past the end of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PastEnd {
    /// Their number.
    pub count: u64,
    /// The kind of the first, by the order of the tables.
    pub structure: &'static str,
    /// Offset of the first.
    pub offset: HostOffset,
}

/// The structures of an image that begin at or past the end of its file, or reach past it.
pub(crate) fn past_end(
    header: &Header,
    l1: &Entries,
    refcount_table: Option<&Entries>,
    length: u64,
) -> Option<PastEnd> {
    let geometry = header.geometry();
    let mut found: Option<PastEnd> = None;
    let mut note = |structure, offset| {
        found.get_or_insert(PastEnd { count: 0, structure, offset }).count += 1;
    };
    let l1_bytes = geometry.l1_entries().min(u64::from(header.l1_entries)) * 8;
    if header.l1_offset.0.saturating_add(l1_bytes) > length {
        note("L1 table", header.l1_offset);
    }
    if header.refcount_table_offset.0 >= length {
        note("refcount table", header.refcount_table_offset);
    }
    if header.snapshots > 0 && header.snapshots_offset.0 >= length {
        note("snapshot table", header.snapshots_offset);
    }
    for UsedEntry { raw, .. } in l1.used() {
        if let Ok(L1Entry::Table { offset, .. }) = L1Entry::decode(raw, &geometry)
            && offset.0 >= length
        {
            note("L2 table", offset);
        }
    }
    let refblocks = refcount_table.into_iter().flat_map(Entries::used);
    for offset in refblocks.map(|entry| entry.raw).filter(|raw| geometry.is_aligned(*raw) && *raw >= length) {
        note("refcount block", HostOffset(offset));
    }
    found
}

/// Warns of an image whose file ends too early.
pub(crate) fn warn_if_cut_short(
    info: &FileInfo,
    header: &Header,
    l1: &Entries,
    refcount_table: Option<&Entries>,
) {
    let Some(PastEnd { count, structure, offset }) = past_end(header, l1, refcount_table, info.length) else {
        return;
    };
    warn!(
        path = %shown(&info.path),
        "the image is cut short: its file has {} bytes, and {count} of its tables lie past that end, first the \
         {structure} at offset {offset}; what they describe is lost to the guest. Copy the image anew, or see what `strata \
         check` finds",
        info.length
    );
}
