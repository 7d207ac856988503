//! What a check found: kinds of findings, where each is, and the verdict.
//!
//! Owns which finding is a leak and which a corruption, and which of them new refcounts can mend.

use std::fmt;

use qcow2::{EntryError, HostOffset, Unsupported};
use thiserror::Error;

/// The most findings that a report names one by one; it counts them all.
pub const FINDINGS_MAX: usize = 1000;

/// A structure of an image file that a finding is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
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
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Part::Header => "header",
            Part::ActiveL1 => "active L1 table",
            Part::SnapshotL1 => "L1 table of a snapshot",
            Part::L2 => "L2 table",
            Part::Data => "guest data",
            Part::RefcountTable => "refcount table",
            Part::Refblock => "refblock",
            Part::SnapshotTable => "snapshot table",
        })
    }
}

/// What is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum FindingKind {
    /// More references are recorded for a cluster than there are: its space is lost, nothing else.
    #[error("leaked cluster: refcount {recorded}, references {references}")]
    Leak {
        /// The refcount in the file.
        recorded: u64,
        /// The references counted.
        references: u64,
    },
    /// Fewer references are recorded than there are: the cluster can be handed out while it is in use.
    #[error("refcount {recorded} is too low, references {references}")]
    RefcountTooLow {
        /// The refcount in the file.
        recorded: u64,
        /// The references counted.
        references: u64,
    },
    /// More references than a refcount of this width can say.
    #[error("{references} references, but refcounts of this image end at {max}")]
    RefcountOverflow {
        /// The references counted.
        references: u64,
        /// The largest refcount.
        max: u64,
    },
    /// The flag COPIED of an entry is set though the refcount is not one, or clear though it is.
    #[error("COPIED of {part} entry {raw:#018x} disagrees with refcount {refcount}")]
    Copied {
        /// The table that the entry is in.
        part: Part,
        /// The entry.
        raw: u64,
        /// The refcount in the file of the cluster that it names.
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
        part: Part,
        /// The entry.
        raw: u64,
    },
    /// An entry that says nothing sensible.
    #[error("{part}: {source}")]
    BadEntry {
        /// The table that the entry is in.
        part: Part,
        /// What is wrong with it.
        source: EntryError,
    },
    /// Something is said to lie past the end of the file.
    #[error("{part} of {length} bytes at {target} is past the end of the file")]
    PastEnd {
        /// What is said to be there.
        part: Part,
        /// Where.
        target: HostOffset,
        /// How long it is in bytes.
        length: u64,
    },
    /// A cluster of metadata has something else in it too.
    #[error("the cluster of the {part} has something else in it too: references {references}")]
    Overlap {
        /// The metadata.
        part: Part,
        /// All references to the cluster.
        references: u64,
    },
    /// An entry of the snapshot table breaks the format, or the file ends before it: what follows is not known.
    #[error("entry {index} of the snapshot table is broken or missing")]
    BadSnapshot {
        /// Its place in the table, from 0.
        index: u32,
    },
    /// A snapshot's L1 table cannot be where, or as long as, its entry says.
    #[error("snapshot {index} cannot have an L1 table of {entries} entries at {target}")]
    BadSnapshotL1 {
        /// The snapshot's place in the table, from 0.
        index: u32,
        /// Where its L1 table is said to be.
        target: HostOffset,
        /// Entries that it is said to have.
        entries: u64,
    },
    /// A version 3 snapshot lacks the fields that version 3 demands.
    #[error("entry {index} of the snapshot table lacks its disk size or its VM state size")]
    IncompleteSnapshot {
        /// Its place in the table, from 0.
        index: u32,
    },
}

/// What it takes to mend a finding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Remedy {
    /// Another refcount in its place.
    Count,
    /// Another flag COPIED.
    Flag,
    /// A new refcount structure.
    Structure,
    /// Guest data may be lost or unreachable: no new refcount mends that.
    None,
}

impl FindingKind {
    /// True if it costs space only.
    pub fn is_leak(&self) -> bool {
        matches!(self, FindingKind::Leak { .. })
    }

    pub(super) fn remedy(&self) -> Remedy {
        let refcounts = |part| matches!(part, Part::RefcountTable | Part::Refblock);
        match *self {
            FindingKind::Leak { .. } | FindingKind::RefcountTooLow { .. } => Remedy::Count,
            FindingKind::Copied { .. } => Remedy::Flag,
            FindingKind::ReservedBits { part, .. }
            | FindingKind::BadEntry { part, .. }
            | FindingKind::PastEnd { part, .. }
            | FindingKind::Overlap { part, .. }
                if refcounts(part) =>
            {
                Remedy::Structure
            }
            _ => Remedy::None,
        }
    }
}

/// Something wrong, and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("offset {offset}: {kind}")]
pub struct Finding {
    /// In the image file: the entry that is wrong, or the cluster whose refcount is.
    pub offset: HostOffset,
    /// What is wrong.
    pub kind: FindingKind,
}

/// The short answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    /// Nothing is wrong.
    Clean,
    /// Space is lost, nothing else.
    Leaks,
    /// Data is or may come to be wrong.
    Corrupt,
}

/// What a check found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Findings that are not leaks.
    pub corruptions: u64,
    /// Clusters with a refcount above their references.
    pub leaked_clusters: u64,
    /// The first findings, at most [`FINDINGS_MAX`]; `corruptions + leaked_clusters` is their full number.
    pub findings: Vec<Finding>,
    /// Guest clusters of the active disk that have a host cluster, compressed ones included.
    pub allocated_clusters: u64,
    /// Where the last cluster ends that has a refcount or a reference, in bytes.
    pub image_end_offset: u64,
    /// Findings that new refcounts cannot mend.
    pub(super) beyond_repair: u64,
    /// Findings that need a new refcount structure.
    pub(super) structure_damaged: u64,
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
        } else {
            self.corruptions += 1;
        }
        match kind.remedy() {
            Remedy::None => self.beyond_repair += 1,
            Remedy::Structure => self.structure_damaged += 1,
            Remedy::Count | Remedy::Flag => {}
        }
        if self.findings.len() < FINDINGS_MAX {
            self.findings.push(Finding { offset: HostOffset(offset), kind });
        }
    }
}

/// Why an image is not checked: a wrong answer would be worse than none.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Refusal {
    /// A feature that is not built yet.
    #[error(transparent)]
    Unsupported(#[from] Unsupported),
    /// Persistent bitmaps have clusters of their own, which are not walked yet.
    #[error("the image has persistent bitmaps, which are not checked yet: use qemu-img check")]
    Bitmaps,
    /// The file has more clusters than a check can count.
    #[error("the file has {clusters} clusters, and at most {max} can be checked: use larger clusters")]
    TooManyClusters {
        /// Clusters of the file.
        clusters: u64,
        /// The most there may be.
        max: u64,
    },
}
