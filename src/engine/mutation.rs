//! Deliberate breakages of the write order, the quarantine and the cut. Tests must notice each of them.
//!
//! A rule is a plain function in `rules`, here or in the disk. It names its breakages beside its answer, through
//! [`unless_broken`]. Without the feature `mutations`, [`active`] is constantly false and nothing here has any effect.
//! With it, a thread activates a mutation for itself by [`with`]. Only test targets may enable the feature.

/// Something to break.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutation {
    /// A freed cluster is reused at once.
    ReuseAtOnce,
    /// A freed cluster is reused when any cut is durable, instead of the cut that holds its unlink.
    ReuseBeforeUnlink,
    /// A freed cluster is reused while I/O that began before its unlink is still running.
    ReuseWhileInUse,
    /// Space is punched out after its cluster is free, instead of before.
    PunchAfterFree,
    /// Refcounts are written together with the links that they count.
    CountsWithLinks,
    /// New L2 tables are written together with the L1 entries that name them.
    TablesWithLinks,
    /// Existing L2 entries are written before the data that they name is durable.
    LinksBeforeData,
    /// New refblocks are written together with the entries that name them.
    RefblocksWithEntries,
    /// The header names a new refcount table before it is written.
    HeaderFirst,
    /// No fdatasync before the links are written.
    NoSyncBeforeLinks,
    /// A link to any data is treated as needing no data before it.
    LinksNeedNoData,
    /// A link to a new cluster is treated as needing no data before it, whatever the guest read there before.
    LinksForgetBacking,
    /// No fdatasync after new refblocks.
    NoSyncAfterRefblocks,
    /// No fdatasync after the links.
    NoSyncAfterLinks,
    /// No fdatasync where no metadata is dirty.
    NoSyncOfData,
    /// No fdatasync of an external data file.
    DataFileNotSynced,
    /// Zeros are not written to a data file that must be readable as a raw image.
    RawViewForgotten,
    /// A failed fdatasync is treated as successful.
    FailedSyncIgnored,
    /// A failed metadata write does not stop later writes.
    FailedWriteForgiven,
    /// After a cut that found no space, its tables are not written again.
    FailedCutForgotten,
    /// A flush joins a cut that was taken before it arrived.
    JoinsRunningCut,
    /// A write is acknowledged and linked before its data is written.
    CommitBeforeData,
    /// A new L2 table is never linked.
    LinkForgotten,
    /// Every new cluster is assumed to read as zero.
    StaleTakenForZero,
    /// An allocated zero cluster is assumed to hold zeros in the file.
    ZeroClusterTakenForZero,
    /// Clusters that a failed write may have changed are assumed to read as zero.
    AbortedTakenForZero,
    /// A discard exposes the backing file.
    DiscardBaresBacking,
    /// Compressed data is released only in the first of the host clusters that it touches.
    CompressedTailKept,
    /// Compressed data is released twice.
    CompressedReleasedTwice,
    /// A shared cluster becomes free when one of its references is gone.
    SharedTakenForFree,
    /// A data cluster that a snapshot shares is written in place.
    SharedTakenForOwn,
    /// An L2 table that a snapshot shares is changed in place.
    SharedTableTakenForOwn,
    /// A write to some subclusters allocates all that are not zero.
    AllSubclustersAllocated,
    /// A write keeps the zero bits of the subclusters that it wrote.
    ZeroSubclustersKept,
    /// A write to a shared cluster does not copy the data of its other subclusters.
    SharedSubclustersForgotten,
    /// A discard of some subclusters frees their host cluster although others in it are in use.
    SubclusterFreesCluster,
    /// A discarded cluster that keeps its place is emptied so late that the next write may have begun.
    EmptiedLate,
    /// Data is written over metadata if an entry names it.
    GuardBypassed,
    /// A cluster becomes metadata although data may still be written there.
    MetadataWhereAimed,
    /// A clean close cuts a cluster in use off the end of the file.
    CloseCutsTooMuch,
    /// The header names a snapshot, or its disk, before the refcounts are raised.
    SnapshotHeaderFirst,
    /// Clusters that a new snapshot shares stay flagged as not shared.
    SnapshotFlagsKept,
    /// Refcounts are lowered while the header still names what they count.
    SnapshotLoweredFirst,
    /// Writes continue before the mark that bitmaps are out of date is durable.
    BitmapsMarkedLate,
    /// Clusters past the new end of a disk are freed but stay named in the L2 table across that end.
    ResizeKeepsLinks,
    /// When a disk grows, old bytes past its old end, in the cluster across that end, become visible.
    ResizeKeepsTail,
    /// The backing file is visible in the new part of a disk.
    ResizeBaresBacking,
    /// The header names the new size of a disk in use before the new part reads as zero.
    LiveSizeFirst,
    /// The new part of a disk in use keeps what the image has there.
    LiveGrowthKeepsOld,
    /// A slice of the map that is a run stays one although one of its clusters has changed.
    RunKept,
    /// A slice of the map is treated as a run although one of its clusters does not join the one before.
    GapTakenForRun,
    /// A change without a claim is made despite claims on its cluster.
    ClaimIgnored,
    /// An early commit is made while a cut is under way.
    EarlyLinkBesideCut,
    /// An early commit is made although the count of its cluster is not on the disk.
    EarlyLinkBeforeCounts,
    /// The failure of an early commit is ignored.
    EarlyLinkFailureForgotten,
    /// The link of an aborted early commit is left on the disk.
    EarlyLinkLeft,
    /// A cut is taken during an early commit.
    CutBesideEarlyLink,
    /// A request that ends on a queue that is being stopped keeps its claim.
    ClaimKeptByLeaver,
    /// A request keeps waiting for space although its queue is being stopped.
    WaitNotGivenUp,
    /// The search for leaks frees clusters that were reserved or unlinked since the disk was opened.
    LeakSearchForgetsChanges,
    /// The search for leaks reads tables from the file although they are in memory.
    LeakSearchReadsTheDisk,
    /// The file does not end with free clusters while it is written.
    TailNotMarked,
    /// Counts are written before the free clusters at the file's end are durable.
    TailNotSynced,
    /// A change of an image that is not in use removes the free clusters at the file's end.
    ChangeUnmarks,
    /// A change of an image that is not in use writes to free space while a journal may still name that space.
    ChangeKeepsNumber,
    /// The records of a commit are valid only after the next commit.
    RecordedLate,
    /// Records leave the journal when a cut is taken, before it is durable.
    TailBeforeCut,
    /// A replay allocates tables before the clusters that the records name are counted.
    ReplayCountsLate,
    /// Clusters of the image that was the top before a snapshot are still written in place.
    OldTopWritten,
    /// The next open finds the overlay before the overlay is durable.
    OverlayNotSynced,
    /// The disk goes on with the overlay, but the next open finds the old top.
    OverlayNotNamed,
    /// The old top is not made durable before the overlay is the top.
    OldTopNotFlushed,
}

impl Mutation {
    /// All mutations.
    pub const ALL: &[Mutation] = &[
        Mutation::ReuseAtOnce,
        Mutation::ReuseBeforeUnlink,
        Mutation::ReuseWhileInUse,
        Mutation::PunchAfterFree,
        Mutation::CountsWithLinks,
        Mutation::TablesWithLinks,
        Mutation::LinksBeforeData,
        Mutation::RefblocksWithEntries,
        Mutation::HeaderFirst,
        Mutation::NoSyncBeforeLinks,
        Mutation::LinksNeedNoData,
        Mutation::LinksForgetBacking,
        Mutation::NoSyncAfterRefblocks,
        Mutation::NoSyncAfterLinks,
        Mutation::NoSyncOfData,
        Mutation::DataFileNotSynced,
        Mutation::RawViewForgotten,
        Mutation::FailedSyncIgnored,
        Mutation::FailedWriteForgiven,
        Mutation::FailedCutForgotten,
        Mutation::JoinsRunningCut,
        Mutation::CommitBeforeData,
        Mutation::LinkForgotten,
        Mutation::StaleTakenForZero,
        Mutation::ZeroClusterTakenForZero,
        Mutation::AbortedTakenForZero,
        Mutation::DiscardBaresBacking,
        Mutation::CompressedTailKept,
        Mutation::CompressedReleasedTwice,
        Mutation::SharedTakenForFree,
        Mutation::SharedTakenForOwn,
        Mutation::SharedTableTakenForOwn,
        Mutation::AllSubclustersAllocated,
        Mutation::ZeroSubclustersKept,
        Mutation::SharedSubclustersForgotten,
        Mutation::SubclusterFreesCluster,
        Mutation::EmptiedLate,
        Mutation::GuardBypassed,
        Mutation::MetadataWhereAimed,
        Mutation::CloseCutsTooMuch,
        Mutation::SnapshotHeaderFirst,
        Mutation::SnapshotFlagsKept,
        Mutation::SnapshotLoweredFirst,
        Mutation::BitmapsMarkedLate,
        Mutation::ResizeKeepsLinks,
        Mutation::ResizeKeepsTail,
        Mutation::ResizeBaresBacking,
        Mutation::LiveSizeFirst,
        Mutation::LiveGrowthKeepsOld,
        Mutation::RunKept,
        Mutation::GapTakenForRun,
        Mutation::ClaimIgnored,
        Mutation::EarlyLinkBesideCut,
        Mutation::EarlyLinkBeforeCounts,
        Mutation::EarlyLinkFailureForgotten,
        Mutation::EarlyLinkLeft,
        Mutation::CutBesideEarlyLink,
        Mutation::ClaimKeptByLeaver,
        Mutation::WaitNotGivenUp,
        Mutation::LeakSearchForgetsChanges,
        Mutation::LeakSearchReadsTheDisk,
        Mutation::TailNotMarked,
        Mutation::TailNotSynced,
        Mutation::ChangeUnmarks,
        Mutation::ChangeKeepsNumber,
        Mutation::RecordedLate,
        Mutation::TailBeforeCut,
        Mutation::ReplayCountsLate,
        Mutation::OldTopWritten,
        Mutation::OverlayNotSynced,
        Mutation::OverlayNotNamed,
        Mutation::OldTopNotFlushed,
    ];
}

#[cfg(feature = "mutations")]
thread_local! {
    static ACTIVE: std::cell::Cell<Option<Mutation>> = const { std::cell::Cell::new(None) };
}

/// True if this thread is to break this.
#[cfg(feature = "mutations")]
pub fn active(mutation: Mutation) -> bool {
    ACTIVE.get() == Some(mutation)
}

/// True if this thread is to break this.
#[cfg(not(feature = "mutations"))]
#[inline(always)]
pub const fn active(_: Mutation) -> bool {
    false
}

/// The answer of a rule: `right`, unless this thread is to break the rule in one of these ways. Then it is the answer
/// beside that breakage. Without the feature `mutations` nothing is left of the other answers.
#[inline(always)]
pub fn unless_broken<T, const N: usize>(right: T, breakages: [(Mutation, T); N]) -> T {
    let broken = breakages.into_iter().find(|(mutation, _)| active(*mutation));
    broken.map_or(right, |(_, wrong)| wrong)
}

/// Activates a mutation on this thread while `work` runs.
#[cfg(feature = "mutations")]
pub fn with<T>(mutation: Mutation, work: impl FnOnce() -> T) -> T {
    /// Deactivates the mutation, even after a panic.
    struct Mend;
    impl Drop for Mend {
        fn drop(&mut self) {
            ACTIVE.set(None);
        }
    }
    ACTIVE.set(Some(mutation));
    let _mend = Mend;
    work()
}
