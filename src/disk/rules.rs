//! The disk's rules that keep data safe. Each rule is a plain function, and its deliberate breakages stand beside it.
//!
//! The engine's part is in its own `rules`. The code that follows a rule names no breakage. Owns no state.

use engine::Stage;
use engine::mutation::{Mutation, unless_broken};
use qcow2::{GuestOffset, HostOffset};

/// Writes that an fdatasync makes durable before anything else is written.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Synced {
    /// The length of the file with free clusters at its end.
    Length,
    /// New refblocks and a new refcount table.
    Refblocks,
    /// The guest's data in an external data file. `alone`: no metadata is dirty.
    DataFile {
        /// No metadata is dirty.
        alone: bool,
    },
    /// Counts, new tables, and the guest's data in the image's own file.
    Counts {
        /// No metadata is dirty.
        alone: bool,
    },
    /// The links.
    Links,
}

/// True if an fdatasync must follow these writes.
pub fn needs_sync(writes: Synced) -> bool {
    let is_alone = matches!(writes, Synced::DataFile { alone: true } | Synced::Counts { alone: true });
    unless_broken(
        true,
        [
            (Mutation::TailNotSynced, writes != Synced::Length),
            (Mutation::NoSyncAfterRefblocks, writes != Synced::Refblocks),
            (Mutation::DataFileNotSynced, !matches!(writes, Synced::DataFile { .. })),
            (Mutation::NoSyncBeforeLinks, !matches!(writes, Synced::Counts { .. })),
            (Mutation::NoSyncOfData, !is_alone),
            (Mutation::NoSyncAfterLinks, writes != Synced::Links),
        ],
    )
}

/// The stage of a cut in which the header names a new refcount table: after the table is durable.
pub fn header_stage() -> Stage {
    unless_broken(Stage::One, [(Mutation::HeaderFirst, Stage::Zero)])
}

/// The result of an fdatasync as it counts.
pub fn judged_sync<E>(result: Result<(), E>) -> Result<(), E> {
    unless_broken(result, [(Mutation::FailedSyncIgnored, Ok(()))])
}

/// True if metadata may still be written after a failed write of metadata: only space was lacking.
pub fn may_write_on(no_space: bool) -> bool {
    unless_broken(no_space, [(Mutation::FailedWriteForgiven, true)])
}

/// An operation that must have ended before the next step.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Awaited {
    /// The write of data, before the new mapping is committed.
    Data,
    /// The record that an early commit failed, before its allocation is committed.
    FailedLink,
    /// The punch of freed clusters, before they are free.
    PunchOfFreed,
    /// The punch of clusters that keep their place, before the claim on them is released.
    PunchInPlace,
    /// The sync of the mark that bitmaps are out of date, before anything else is written.
    BitmapMarks,
    /// The sync of a new overlay, before anything names it.
    NewOverlay,
}

/// True if the next step must wait for this.
pub fn waits_for(operation: Awaited) -> bool {
    unless_broken(
        true,
        [
            (Mutation::CommitBeforeData, operation != Awaited::Data),
            (Mutation::EarlyLinkFailureForgotten, operation != Awaited::FailedLink),
            (Mutation::PunchAfterFree, operation != Awaited::PunchOfFreed),
            (Mutation::EmptiedLate, operation != Awaited::PunchInPlace),
            (Mutation::BitmapsMarkedLate, operation != Awaited::BitmapMarks),
            (Mutation::OverlayNotSynced, operation != Awaited::NewOverlay),
        ],
    )
}

/// True if requests no longer wait for space, given whether their queue is being stopped.
pub fn stops_waiting(is_stopping: bool) -> bool {
    unless_broken(is_stopping, [(Mutation::WaitNotGivenUp, false)])
}

/// True if a request that ends releases its claim, whether or not its queue is being stopped.
pub fn releases_claim(is_stopping: bool) -> bool {
    unless_broken(true, [(Mutation::ClaimKeptByLeaver, !is_stopping)])
}

/// True if the data file of an image with this flag must be readable as a raw image.
pub fn is_raw_view(is_flagged: bool) -> bool {
    unless_broken(is_flagged, [(Mutation::RawViewForgotten, false)])
}

/// The length in bytes to which a clean close cuts the file, given the end of its last cluster in use.
pub fn closed_length(end: HostOffset, cluster_size: u64) -> u64 {
    unless_broken(end.0, [(Mutation::CloseCutsTooMuch, end.0.wrapping_sub(cluster_size))])
}

/// Bytes of the backing file that the new part of a disk must hide.
pub fn hidden_backing_size(backing_size: u64) -> u64 {
    unless_broken(backing_size, [(Mutation::ResizeBaresBacking, 0)])
}

/// True if a disk that grows from this end must first zero the rest of the cluster in which it ends.
pub fn must_zero_tail(end: GuestOffset, cluster_size: u64) -> bool {
    unless_broken(!end.0.is_multiple_of(cluster_size), [(Mutation::ResizeKeepsTail, false)])
}

/// True if the clusters that records name are counted before a replay allocates any.
pub fn replay_counts_first() -> bool {
    unless_broken(true, [(Mutation::ReplayCountsLate, false)])
}

/// A step of a resize of a disk in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResizeStep {
    /// The tables and the map reach to the new end. The L1 table is durably so long.
    Extend,
    /// All requests that know only the old end, or that began when the disk was larger, have ended.
    AwaitOlder,
    /// The part between the two ends reads as zero, and its space is freed.
    Clear,
    /// No cluster past the new end has an entry, and the space of those that had one is freed.
    Remove,
    /// Everything so far is durable.
    Flush,
    /// The header durably names the new size.
    StoreSize,
    /// A file that holds the disk byte by byte is cut at the new end.
    Cut,
}

/// The order in which a disk in use grows: docs/durability.md, "Resizing a disk in use".
pub fn growth_order() -> &'static [ResizeStep] {
    use ResizeStep::{AwaitOlder, Clear, Extend, Flush, StoreSize};
    const RIGHT: &[ResizeStep] = &[Extend, AwaitOlder, Clear, Flush, StoreSize];
    unless_broken(
        RIGHT,
        [
            (Mutation::LiveSizeFirst, &[Extend, AwaitOlder, StoreSize, Clear, Flush]),
            (Mutation::LiveGrowthKeepsOld, &[Extend, AwaitOlder, Flush, StoreSize]),
        ],
    )
}

/// The order in which a disk in use shrinks.
pub fn shrinking_order() -> &'static [ResizeStep] {
    use ResizeStep::{AwaitOlder, Cut, Flush, Remove, StoreSize};
    &[AwaitOlder, StoreSize, Cut, Remove, Flush]
}

/// A step of a snapshot of a disk in use, once the overlay is durable and nobody has the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SnapshotStep {
    /// The old top is durable, and its journal has ended.
    Retire,
    /// The next open finds the overlay.
    Name,
    /// The overlay is the top.
    Switch,
}

/// The order of these steps: docs/durability.md, "A snapshot of a disk in use".
pub fn snapshot_order() -> &'static [SnapshotStep] {
    use SnapshotStep::{Name, Retire, Switch};
    const RIGHT: &[SnapshotStep] = &[Retire, Name, Switch];
    unless_broken(RIGHT, [(Mutation::OverlayNotNamed, &[Retire, Switch])])
}

/// True if the old top is made durable before the overlay becomes the top.
pub fn flushes_old_top() -> bool {
    unless_broken(true, [(Mutation::OldTopNotFlushed, false)])
}
