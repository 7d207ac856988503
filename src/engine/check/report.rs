//! The findings of a check: their kinds, their offsets, and the verdict.
//!
//! Decides which finding is a leak and which a corruption, and which of them new refcounts can mend.

use std::fmt;

use qcow2::{EntryError, FormatError, HostOffset, Structure, Unsupported};
use thiserror::Error;

/// The most findings of a kind that a report lists one by one. It counts all of them.
pub const FINDINGS_OF_KIND_MAX: u64 = 30;

/// A structure of an image file that a finding is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImagePart {
    /// The header's cluster.
    Header,
    /// The active L1 table.
    ActiveL1,
    /// The L1 table of an internal snapshot.
    SnapshotL1,
    /// An L2 table.
    L2,
    /// Guest data.
    Data,
    /// The refcount table.
    RefcountTable,
    /// A refblock.
    Refblock,
    /// The table of internal snapshots.
    SnapshotTable,
    /// The directory of persistent bitmaps.
    BitmapDirectory,
    /// The table of a persistent bitmap.
    BitmapTable,
    /// A part of a persistent bitmap itself.
    Bitmap,
}

impl fmt::Display for ImagePart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ImagePart::Header => "header",
            ImagePart::ActiveL1 => "active L1 table",
            ImagePart::SnapshotL1 => "L1 table of a snapshot",
            ImagePart::L2 => "L2 table",
            ImagePart::Data => "guest data",
            ImagePart::RefcountTable => "refcount table",
            ImagePart::Refblock => "refblock",
            ImagePart::SnapshotTable => "snapshot table",
            ImagePart::BitmapDirectory => "bitmap directory",
            ImagePart::BitmapTable => "table of a bitmap",
            ImagePart::Bitmap => "bitmap",
        })
    }
}

/// The kind of a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum FindingKind {
    /// The refcount of a cluster is higher than its references: the space is lost, but nothing else.
    #[error("leaked cluster: refcount {recorded}, references {references}")]
    Leak {
        /// The refcount in the file.
        recorded: u64,
        /// The references counted.
        references: u64,
    },
    /// The refcount of a cluster is lower than its references: the cluster can be allocated again while it is in use.
    #[error("refcount {recorded} is too low, references {references}")]
    RefcountTooLow {
        /// The refcount in the file.
        recorded: u64,
        /// The references counted.
        references: u64,
    },
    /// More references than a refcount of this width can hold.
    #[error("{references} references, but refcounts of this image end at {max}")]
    RefcountOverflow {
        /// The references counted.
        references: u64,
        /// The largest refcount.
        max: u64,
    },
    /// The flag COPIED of an entry is set though the refcount is not one, or clear though it is one.
    #[error("COPIED of {part} entry {raw:#018x} disagrees with refcount {refcount}")]
    Copied {
        /// The table that the entry is in.
        part: ImagePart,
        /// The entry.
        raw: u64,
        /// The refcount in the file of the cluster that the entry names.
        refcount: u64,
    },
    /// A compressed cluster has the flag COPIED, which is never right.
    #[error("COPIED is set on a compressed cluster, entry {raw:#018x}")]
    CopiedCompressed {
        /// The entry.
        raw: u64,
    },
    /// A compressed cluster has no subclusters, but its entry has a bitmap of them.
    #[error("compressed cluster, entry {raw:#018x}, with a bitmap of subclusters {bitmap:#018x}")]
    CompressedSubclusters {
        /// The entry.
        raw: u64,
        /// Its bitmap.
        bitmap: u64,
    },
    /// An entry has bits set that the format reserves.
    #[error("{part} entry {raw:#018x} has reserved bits set")]
    ReservedBits {
        /// The table that the entry is in.
        part: ImagePart,
        /// The entry.
        raw: u64,
    },
    /// An entry without a valid meaning.
    #[error("{part}: {source}")]
    BadEntry {
        /// The table that the entry is in.
        part: ImagePart,
        /// The fault of the entry.
        source: EntryError,
    },
    /// The zero flag in version 2, which does not define it. A guest cluster with such an entry cannot be read.
    #[error("L2 table entry {raw:#018x} has the zero flag, which version 2 does not know{}", if *.has_backing {
        ": `qemu-img amend -o compat=1.1` makes the image version 3, where it means zeros"
    } else {
        ""
    })]
    ZeroFlag {
        /// The entry.
        raw: u64,
        /// True if there is a backing file; then version 2 has no entry for zeros.
        has_backing: bool,
    },
    /// A structure or data that lies past the end of the file.
    #[error("{part} of {length} bytes at {target} is past the end of the file")]
    PastEnd {
        /// The structure.
        part: ImagePart,
        /// Its offset.
        target: HostOffset,
        /// Its length in bytes.
        length: u64,
    },
    /// A cluster of metadata is also used for something else.
    #[error("the cluster of the {part} has something else in it too: references {references}")]
    Overlap {
        /// The metadata.
        part: ImagePart,
        /// All references to the cluster.
        references: u64,
    },
    /// A field or a part of the header breaks the format, so the structure that it describes cannot be read.
    #[error("{}", source.without_advice())]
    BadHeader {
        /// The fault.
        source: FormatError,
    },
    /// An entry of the snapshot table breaks the format, or the file ends before it. The entries after it are unknown.
    #[error("entry {index} of the snapshot table is broken or missing")]
    BadSnapshot {
        /// Its index in the table, from 0.
        index: u32,
    },
    /// The offset or the length in a snapshot's entry cannot be that of an L1 table.
    #[error("snapshot {index} cannot have an L1 table of {entries} entries at {target}")]
    BadSnapshotL1 {
        /// The snapshot's index in the table, from 0.
        index: u32,
        /// The offset of its L1 table according to the entry.
        target: HostOffset,
        /// The number of L1 entries according to the entry.
        entries: u64,
    },
    /// A version 3 snapshot lacks the fields that version 3 demands.
    #[error("entry {index} of the snapshot table lacks its disk size or its VM state size")]
    IncompleteSnapshot {
        /// Its index in the table, from 0.
        index: u32,
    },
    /// Internal snapshots in an image with an external data file. Nothing preserves the data that they name.
    #[error("{count} internal snapshot(s) in an image with an external data file")]
    SnapshotsWithDataFile {
        /// The number of snapshots.
        count: u32,
    },
    /// A compressed cluster in an image with an external data file, which can hold only plain data.
    #[error("compressed cluster, entry {raw:#018x}, in an image with an external data file")]
    CompressedWithDataFile {
        /// The entry.
        raw: u64,
    },
    /// An entry of the bitmap directory breaks the format, or there are more or fewer entries than the header states.
    /// The entries after it are unknown.
    #[error("entry {index} of the bitmap directory is broken, missing or one too many")]
    BadBitmap {
        /// Its index in the directory, from 0.
        index: u32,
    },
    /// An entry of a bitmap's table without a valid meaning.
    #[error("entry {raw:#018x} of a bitmap's table has reserved bits set or is not aligned")]
    BadBitmapEntry {
        /// The entry.
        raw: u64,
    },
}

/// The remedy for a finding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Remedy {
    /// A new refcount.
    Count,
    /// A new value of the flag COPIED.
    Flag,
    /// A new entry.
    Entry,
    /// A new refcount structure.
    Structure,
    /// A new snapshot table with more fields.
    Snapshots,
    /// A new snapshot table without the entries that cannot be read.
    LostSnapshots,
    /// No new refcount is needed.
    NotNeeded,
    /// None: guest data may be lost or unreachable, and no new refcount mends that.
    None,
}

impl FindingKind {
    /// Its name, for tallies and for programs.
    pub fn name(&self) -> &'static str {
        match self {
            FindingKind::Leak { .. } => "leak",
            FindingKind::RefcountTooLow { .. } => "refcount-too-low",
            FindingKind::RefcountOverflow { .. } => "refcount-overflow",
            FindingKind::Copied { .. } => "copied-flag",
            FindingKind::CopiedCompressed { .. } => "copied-compressed",
            FindingKind::CompressedSubclusters { .. } => "compressed-subclusters",
            FindingKind::ReservedBits { .. } => "reserved-bits",
            FindingKind::BadEntry { .. } if self.is_note() => "odd-entry",
            FindingKind::BadEntry { .. } => "bad-entry",
            FindingKind::ZeroFlag { .. } => "zero-flag",
            FindingKind::PastEnd { .. } => "past-end",
            FindingKind::Overlap { .. } => "overlap",
            FindingKind::BadHeader { source } => match source.structure {
                Structure::RefcountTable => "bad-refcount-table",
                Structure::SnapshotTable => "bad-snapshot-table",
                _ => "bad-extension",
            },
            FindingKind::BadSnapshot { .. } => "bad-snapshot",
            FindingKind::BadSnapshotL1 { .. } => "bad-snapshot-l1",
            FindingKind::IncompleteSnapshot { .. } => "incomplete-snapshot",
            FindingKind::SnapshotsWithDataFile { .. } => "snapshots-with-data-file",
            FindingKind::CompressedWithDataFile { .. } => "compressed-with-data-file",
            FindingKind::BadBitmap { .. } => "bad-bitmap",
            FindingKind::BadBitmapEntry { .. } => "bad-bitmap-entry",
        }
    }

    /// True if the finding only wastes space.
    pub fn is_leak(&self) -> bool {
        matches!(self, FindingKind::Leak { .. })
    }

    /// True for a fault that the format forbids, that `qemu-img check` accepts, and that harms nothing else. This is
    /// the flag COPIED on an L2 entry without an offset, which counts as unallocated. It is reported, but does not
    /// change the verdict.
    pub fn is_note(&self) -> bool {
        let FindingKind::BadEntry { part: ImagePart::L2, source } = self else { return false };
        matches!(source, EntryError::DataAtOffsetZero { .. })
    }

    pub(super) fn remedy(&self) -> Remedy {
        if self.is_note() {
            return Remedy::NotNeeded;
        }
        let refcounts = |part| matches!(part, ImagePart::RefcountTable | ImagePart::Refblock);
        match *self {
            FindingKind::Leak { .. } | FindingKind::RefcountTooLow { .. } => Remedy::Count,
            FindingKind::Copied { .. } => Remedy::Flag,
            FindingKind::ZeroFlag { has_backing: false, .. } => Remedy::Entry,
            FindingKind::ReservedBits { part, .. }
            | FindingKind::BadEntry { part, .. }
            | FindingKind::PastEnd { part, .. }
            | FindingKind::Overlap { part, .. }
                if refcounts(part) =>
            {
                Remedy::Structure
            }
            FindingKind::BadHeader { source } => match source.structure {
                Structure::RefcountTable => Remedy::Structure,
                Structure::SnapshotTable => Remedy::LostSnapshots,
                _ => Remedy::None,
            },
            FindingKind::BadSnapshot { .. } => Remedy::LostSnapshots,
            FindingKind::IncompleteSnapshot { .. } => Remedy::Snapshots,
            _ => Remedy::None,
        }
    }
}

/// A fault and its offset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("offset {offset}: {kind}")]
pub struct Finding {
    /// The offset in the image file: of the wrong entry, or of the cluster with the wrong refcount.
    pub offset: HostOffset,
    /// The fault.
    pub kind: FindingKind,
}

/// The short answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    /// Nothing is wrong.
    Clean,
    /// Only space is lost.
    Leaks,
    /// Data is wrong, or may become wrong.
    Corrupt,
}

/// The number of findings of a kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tally {
    /// The name, as in [`FindingKind::name`].
    pub name: &'static str,
    /// The number of all findings of this kind.
    pub count: u64,
}

/// The result of a check.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Findings that are neither leaks nor notes.
    pub corruptions: u64,
    /// Findings that do not change the verdict ([`FindingKind::is_note`]).
    pub notes: u64,
    /// Clusters whose refcount is higher than their references.
    pub leaked_clusters: u64,
    /// The first findings of each kind, at most [`FINDINGS_OF_KIND_MAX`]. The tallies have the full numbers.
    pub findings: Vec<Finding>,
    /// The kinds found, in the order of their first findings.
    pub tallies: Vec<Tally>,
    /// Guest clusters of the active disk.
    pub total_clusters: u64,
    /// Guest clusters that have a host cluster, compressed ones included.
    pub allocated_clusters: u64,
    /// Guest clusters whose host cluster does not follow the previous one in their L2 table, and all compressed ones.
    pub fragmented_clusters: u64,
    /// Guest clusters that are compressed.
    pub compressed_clusters: u64,
    /// The end in bytes of the last cluster that has a refcount or a reference.
    pub image_end_offset: u64,
    /// Findings that no repair mends.
    pub(super) beyond_repair: u64,
    /// Findings that need a new refcount structure.
    pub(super) structure_damaged: u64,
    /// Findings that need a new snapshot table with more fields.
    pub(super) snapshots_incomplete: u64,
    /// Findings that make snapshots unreadable.
    pub(super) snapshots_lost: u64,
    /// True if refcounts may be too low: some are, or the image is marked so.
    pub(super) refcounts_too_low: bool,
}

impl Report {
    /// The short answer.
    pub fn verdict(&self) -> Verdict {
        match (self.corruptions, self.leaked_clusters) {
            (0, 0) => Verdict::Clean,
            (0, _) => Verdict::Leaks,
            _ => Verdict::Corrupt,
        }
    }

    pub(super) fn add(&mut self, offset: u64, kind: FindingKind) {
        if kind.is_leak() {
            self.leaked_clusters += 1;
        } else if kind.is_note() {
            self.notes += 1;
        } else {
            self.corruptions += 1;
        }
        self.refcounts_too_low |= matches!(kind, FindingKind::RefcountTooLow { .. });
        match kind.remedy() {
            Remedy::None => self.beyond_repair += 1,
            Remedy::Structure => self.structure_damaged += 1,
            Remedy::Snapshots => self.snapshots_incomplete += 1,
            Remedy::LostSnapshots => self.snapshots_lost += 1,
            Remedy::Count | Remedy::Flag | Remedy::Entry | Remedy::NotNeeded => {}
        }
        if self.tally(kind.name()) <= FINDINGS_OF_KIND_MAX {
            self.findings.push(Finding { offset: HostOffset(offset), kind });
        }
    }

    /// Counts one more finding of a kind and returns the new number.
    fn tally(&mut self, name: &'static str) -> u64 {
        let known = self.tallies.iter_mut().find(|tally| tally.name == name);
        if let Some(tally) = known {
            tally.count += 1;
            return tally.count;
        }
        self.tallies.push(Tally { name, count: 1 });
        1
    }
}

/// Why an image is not checked: no answer is better than a wrong one.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Refusal {
    /// A feature that is not implemented yet.
    #[error(transparent)]
    Unsupported(#[from] Unsupported),
    /// The file has more clusters than a check can count.
    #[error("the file has {clusters} clusters, and at most {max} can be checked: use larger clusters")]
    TooManyClusters {
        /// Clusters of the file.
        clusters: u64,
        /// The most there may be.
        max: u64,
    },
}
