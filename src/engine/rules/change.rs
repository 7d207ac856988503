//! The order of a change of an image that no process uses (docs/durability.md, "Changes of an image that nobody uses").

use crate::mutation::{Mutation, unless_broken};

/// A group of steps of a change. A sync ends each group that has steps; only [`Group::DropBlocks`] brings its own syncs.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Group {
    /// Unknown autoclear bits are cleared, and with them the number of a journal that waits for its frontend.
    ClearAutoclear,
    /// All new structures are written to free space.
    NewStructures,
    /// The header is marked dirty.
    MarkDirty,
    /// The new refblocks, or the new refcount table, are named.
    NameStructures,
    /// The flags of clusters that will be shared are cleared.
    ClearFlags,
    /// Refcounts are raised.
    RaiseCounts,
    /// The header names the new L1 table or the new snapshot table.
    SwitchHeader,
    /// Refcounts are lowered.
    LowerCounts,
    /// Refblocks that count nothing leave the refcount table, if the file may become shorter.
    DropBlocks,
    /// The flags of clusters that are no longer shared are set.
    SetFlags,
    /// The header's mark is cleared.
    ClearMark,
}

use Group::{
    ClearAutoclear, ClearFlags, ClearMark, DropBlocks, LowerCounts, MarkDirty, NameStructures, NewStructures,
    RaiseCounts, SetFlags, SwitchHeader,
};

/// The groups in their order: a crash between any two leaves the old state or the new one, and at worst leaks.
#[rustfmt::skip]
pub fn order() -> &'static [Group] {
    const RIGHT: &[Group] = &[
        ClearAutoclear, NewStructures, MarkDirty, NameStructures, ClearFlags, RaiseCounts, SwitchHeader, LowerCounts, DropBlocks,
        SetFlags, ClearMark,
    ];
    unless_broken(RIGHT, [
        (Mutation::ChangeKeepsNumber, &RIGHT[1..]),
        (Mutation::SnapshotHeaderFirst, &[
            ClearAutoclear, NewStructures, MarkDirty, SwitchHeader, NameStructures, ClearFlags, RaiseCounts, LowerCounts, DropBlocks,
            SetFlags, ClearMark,
        ]),
        (Mutation::SnapshotFlagsKept, &[
            ClearAutoclear, NewStructures, MarkDirty, NameStructures, RaiseCounts, SwitchHeader, LowerCounts, DropBlocks,
            SetFlags, ClearMark,
        ]),
        (Mutation::SnapshotLoweredFirst, &[
            ClearAutoclear, NewStructures, MarkDirty, NameStructures, ClearFlags, LowerCounts, RaiseCounts, SwitchHeader, DropBlocks,
            SetFlags, ClearMark,
        ]),
    ])
}

/// True if the file must end with free clusters after the change, given whether it did before.
pub fn keeps_mark(was_marked: bool) -> bool {
    unless_broken(was_marked, [(Mutation::ChangeUnmarks, false)])
}

/// The entries of the table across the disk's new end that the copy of the table keeps: those before that end.
pub fn kept_entries<'b>(whole: &'b [u8], before_end: &'b [u8]) -> &'b [u8] {
    unless_broken(before_end, [(Mutation::ResizeKeepsLinks, whole)])
}
