//! Deliberate breakages of the write order, the quarantine and the cut, for tests that must notice each of them.
//!
//! Without the feature `mutations` nothing here does anything and no code asks: [`active`] is constantly false. With it,
//! a thread breaks what it asks for by [`with`]. Never to be enabled by anything but a test target.

/// Something to break.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutation {
    /// A freed cluster is handed out at once.
    ReuseAtOnce,
    /// A freed cluster is handed out when any cut is durable, not the one that holds its unlink.
    ReuseBeforeUnlink,
    /// A freed cluster is handed out while I/O that began before its unlink goes on.
    ReuseWhileInUse,
    /// Space is given back after its cluster is free, not before.
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
    /// Links to any data are taken to need no data before them.
    LinksNeedNoData,
    /// A link to a new cluster is taken to need no data before it, whatever lay there before for the guest.
    LinksForgetBacking,
    /// No fdatasync after new refblocks.
    NoSyncAfterRefblocks,
    /// No fdatasync after the links.
    NoSyncAfterLinks,
    /// No fdatasync where no metadata is dirty.
    NoSyncOfData,
    /// No fdatasync of an external data file.
    DataFileNotSynced,
    /// In a data file that is to be read as a raw image, zeros are not written.
    RawViewForgotten,
    /// A failed fdatasync is taken for a good one.
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
    /// Every new cluster is taken to read as zero.
    StaleTakenForZero,
    /// An allocated zero cluster is taken to hold zeros.
    ZeroClusterTakenForZero,
    /// What a failed write may have left is taken to read as zero.
    AbortedTakenForZero,
    /// A discard shows what lies below.
    DiscardBaresBacking,
    /// Compressed data is released only in the first of the host clusters that it touches.
    CompressedTailKept,
    /// Compressed data is released twice.
    CompressedReleasedTwice,
    /// A cluster is free when one of those who share it is gone.
    SharedTakenForFree,
    /// A data cluster that a snapshot shares is written in place.
    SharedTakenForOwn,
    /// An L2 table that a snapshot shares is changed in place.
    SharedTableTakenForOwn,
    /// A write to some subclusters allocates all that are not zero.
    AllPartsAllocated,
    /// A write leaves the zero bits of what it wrote.
    ZeroPartsKept,
    /// Subclusters of a shared cluster are taken over without their data.
    SharedPartsForgotten,
    /// A discard of some subclusters frees the host cluster of others that are in use.
    PartFreesCluster,
    /// A discarded cluster that keeps its place is emptied while the next write may be there already.
    EmptiedLate,
    /// Data is written where metadata is, if an entry says so.
    GuardBypassed,
    /// A cluster becomes metadata though data may still be written there.
    MetadataWhereAimed,
    /// A clean close cuts a cluster in use off the end of the file.
    CloseCutsTooMuch,
    /// The header names a snapshot, or its disk, before the refcounts are raised.
    SnapshotHeaderFirst,
    /// What a snapshot comes to share stays flagged as nobody else's.
    SnapshotFlagsKept,
    /// Refcounts are lowered before the header stops naming what they count.
    SnapshotLoweredFirst,
    /// Writes go on before it is durable that bitmaps are out of date.
    BitmapsMarkedLate,
    /// What is past the new end of a disk is given back, and stays named in the L2 table across that end.
    ResizeKeepsLinks,
    /// What the cluster across the old end of a disk has behind that end shows when the disk grows.
    ResizeKeepsTail,
    /// The backing file shows in the new part of a disk.
    ResizeBaresBacking,
    /// A slice of the map that is one run stays one though a cluster of it has changed.
    RunKept,
    /// A slice of the map is taken for one run though one cluster of it goes on elsewhere than where the last ends.
    GapTakenForRun,
    /// A claim that is to be held at once is, whoever is in its way.
    ClaimForced,
    /// A link is written beside its data while a cut is under way.
    EarlyLinkBesideCut,
    /// A link is written beside its data though the count of its cluster is not on the disk.
    EarlyLinkBeforeCounts,
    /// That a link could not be written beside its data changes nothing.
    EarlyLinkFailureForgotten,
    /// A link beside its data that was not to be is left on the disk.
    EarlyLinkLeft,
    /// A cut is taken while a link is written beside its data.
    CutBesideEarlyLink,
    /// A request that ends on a queue that is being stopped keeps its claim.
    ClaimKeptByLeaver,
    /// A request goes on waiting for space although its queue is being stopped.
    WaitNotGivenUp,
    /// The search for leaks takes back what was reserved or unlinked since the disk was opened.
    LeakSearchForgetsChanges,
    /// The search for leaks reads tables from the file though they are in memory.
    LeakSearchReadsTheDisk,
    /// The file does not end with free clusters while it is written.
    TailNotMarked,
    /// That the file ends with free clusters need not be durable before counts are written.
    TailNotSynced,
    /// A change of an image that nobody uses does not keep the free clusters at the file's end.
    ChangeUnmarks,
}

impl Mutation {
    /// All of them.
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
        Mutation::AllPartsAllocated,
        Mutation::ZeroPartsKept,
        Mutation::SharedPartsForgotten,
        Mutation::PartFreesCluster,
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
        Mutation::RunKept,
        Mutation::GapTakenForRun,
        Mutation::ClaimForced,
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

/// Breaks something for as long as `work` lasts, on this thread.
#[cfg(feature = "mutations")]
pub fn with<T>(mutation: Mutation, work: impl FnOnce() -> T) -> T {
    /// Mends it, even after a panic.
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
