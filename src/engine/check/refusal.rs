//! The kinds of repair, and which of them mends the findings. The planning of a repair uses this, and so does the advice to the user.

use thiserror::Error;

use super::report::Report;

/// The kind of repair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RepairKind {
    /// Lowers refcounts that are too high; refcounts that are too low stay.
    Leaks,
    /// Corrects all refcounts, flags and marks, and the snapshot table. A dirty image needs this kind. Snapshots that
    /// cannot be read are dropped only if no cluster can belong to them.
    All,
    /// Like `All`, but snapshots that cannot be read are always dropped.
    AllDroppingSnapshots,
}

/// Why a repair cannot mend an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum NotRepairable {
    /// Tables that lead to guest data are damaged. Refcounts computed from them would give away clusters that are in
    /// use.
    #[error(
        "{findings} finding(s) are not about refcounts, and a repair would give away clusters that may be in use. Restore \
         the image from a copy, or save what can be read of the disk: `strata serve --read-only` serves it, \
         `qemu-img convert --salvage` copies it if QEMU opens the image"
    )]
    Damaged {
        /// The number of findings.
        findings: u64,
    },
    /// The refcount structure itself is damaged, which the repair of leaks does not touch.
    #[error("the refcount structure is damaged: `-r all` makes a new one")]
    StructureDamaged,
    /// Snapshots cannot be read, and the repair of leaks might free their clusters.
    #[error(
        "snapshots cannot be read, and what looks like a leak may be theirs: `-r leaks` frees nothing then"
    )]
    SnapshotsUnread,
    /// Snapshots cannot be read, and some clusters may belong to them.
    #[error(
        "snapshots cannot be read, and the clusters without a reference may be theirs. The disk itself is whole: \
         `strata serve --read-only` serves it. To give the unreadable snapshots up and free those clusters: \
         `strata check -r drop-snapshots`"
    )]
    SnapshotsLost,
    /// The refcounts need a larger table than the format allows.
    #[error("the file is too large for a new refcount table")]
    TooLarge,
}

impl Report {
    /// Why a repair of this kind would be refused, judged by the findings alone.
    pub fn refusal(&self, kind: RepairKind) -> Option<NotRepairable> {
        if self.beyond_repair > 0 {
            return Some(NotRepairable::Damaged { findings: self.beyond_repair });
        }
        match kind {
            RepairKind::Leaks if self.structure_damaged > 0 => Some(NotRepairable::StructureDamaged),
            RepairKind::Leaks if self.snapshots_lost > 0 => Some(NotRepairable::SnapshotsUnread),
            RepairKind::All if self.snapshots_lost > 0 && self.may_hide_snapshots() => {
                Some(NotRepairable::SnapshotsLost)
            }
            _ => None,
        }
    }

    /// True if snapshots cannot be read. A repair of all drops them from the table.
    pub fn has_unread_snapshots(&self) -> bool {
        self.snapshots_lost > 0
    }

    /// True if clusters may belong to snapshots that cannot be read. If all refcounts are right without those
    /// snapshots, no cluster does: it would have a refcount and no reference.
    fn may_hide_snapshots(&self) -> bool {
        self.leaked_clusters > 0 || self.structure_damaged > 0 || self.refcounts_too_low
    }
}
