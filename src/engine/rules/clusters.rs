//! What a write, a discard or write zeroes may do to a cluster, and what becomes of its entry and its host cluster.

use std::ops::Range;

use qcow2::{SubclusterSet, Subclusters};

use crate::mutation::{Mutation, unless_broken};
use crate::run::{FreeRun, HostRun};

/// What an entry names.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Named {
    /// An L2 table.
    Table,
    /// A host cluster, and whether a granule that matters has data there.
    Data { in_use: bool },
}

/// True if the top image alone has what an entry names, so that it may be changed in place. `copied` is the entry's flag.
pub fn is_own(named: Named, copied: bool) -> bool {
    unless_broken(
        copied,
        [
            (Mutation::SharedTableTakenForOwn, copied || named == Named::Table),
            (Mutation::SharedTakenForOwn, copied || named == Named::Data { in_use: true }),
        ],
    )
}

/// True if the place of an allocation surely reads as zero: the free run that was taken for it, if that is known. `None`:
/// it is the old host cluster of a cluster that reads as zero, which may hold anything.
pub fn is_known_zero(taken: Option<FreeRun>) -> bool {
    let right = taken.is_some_and(|free| free.known_zero);
    unless_broken(
        right,
        [
            (Mutation::StaleTakenForZero, taken.is_some()),
            (Mutation::ZeroClusterTakenForZero, right || taken.is_none()),
        ],
    )
}

/// The granules that a write to a new host cluster must write: those that it touches, and those whose data must be kept.
pub fn span_to_write(touched: Range<u64>, kept: Range<u64>) -> Range<u64> {
    let whole = touched.start.min(kept.start)..touched.end.max(kept.end);
    unless_broken(whole, [(Mutation::SharedSubclustersForgotten, touched)])
}

/// The subclusters after a write, with the host cluster of `old`. `stays`: the data is still in that host cluster, so the
/// old allocated subclusters are kept. Otherwise the write has copied them, and they are among the written ones.
pub fn after_write(old: Subclusters, written: SubclusterSet, stays: bool) -> Subclusters {
    let with =
        |kept: SubclusterSet, zero| Subclusters { allocated: kept.with(written).without(zero), zero, ..old };
    let kept = if stays { old.allocated } else { SubclusterSet::EMPTY };
    let zero = old.zero.without(written);
    let new = unless_broken(
        with(kept, zero),
        [
            (Mutation::SharedSubclustersForgotten, with(old.allocated, zero)),
            (Mutation::ZeroSubclustersKept, with(kept, old.zero)),
            (Mutation::AllSubclustersAllocated, with(SubclusterSet::ALL, zero)),
        ],
    );
    assert!(new.allocated.covers(old.allocated), "what was there has been copied");
    new
}

/// References that go with an entry.
#[derive(Clone, Copy)]
pub struct ReferencesLost {
    /// The clusters that lose references.
    pub run: HostRun,
    /// How many each of them loses.
    pub times: u32,
}

/// The references lost when an entry that names the clusters `run` goes.
pub fn references_lost(is_compressed: bool, run: HostRun) -> ReferencesLost {
    let once = ReferencesLost { run, times: 1 };
    let of_compressed = |lost| if is_compressed { lost } else { once };
    let first_only = ReferencesLost { run: HostRun::one(run.start), times: 1 };
    unless_broken(
        once,
        [
            (Mutation::CompressedTailKept, of_compressed(first_only)),
            (Mutation::CompressedReleasedTwice, of_compressed(ReferencesLost { run, times: 2 })),
        ],
    )
}

/// True if a zeroed or discarded cluster must hide what lies below the top image.
pub fn hides_backing(has_backing: bool, is_discard: bool) -> bool {
    unless_broken(has_backing, [(Mutation::DiscardBaresBacking, has_backing && !is_discard)])
}

/// What happens to the host cluster of an entry.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum OldHost {
    /// It stays, or there is none.
    Stays,
    /// It stays, and its contents are no longer needed.
    Empties,
    /// It is freed.
    Goes,
}

/// What happens to the host cluster of zeroed subclusters. `frees`: the new entry does not name it. `empties`: no
/// subcluster has data in it, and its space is not kept. `keeps`: the mode or the image keeps places.
pub fn old_host(frees: bool, empties: bool, keeps: bool) -> OldHost {
    let right = match (frees, empties) {
        (true, _) => OldHost::Goes,
        (false, true) => OldHost::Empties,
        (false, false) => OldHost::Stays,
    };
    unless_broken(right, [(Mutation::SubclusterFreesCluster, if keeps { right } else { OldHost::Goes })])
}
