//! Where data and metadata may lie, and when the map may describe a slice as a run.

use crate::aimed::Known;
use crate::mutation::{Mutation, unless_broken};

/// The metadata that forbids data I/O to a run, given the metadata in it.
pub fn obstacle<H>(metadata: Option<H>) -> Option<H> {
    unless_broken(metadata, [(Mutation::GuardBypassed, None)])
}

/// Whether data I/O may have been aimed at a cluster, given what the record of this session says.
pub fn aimed(recorded: Known) -> Known {
    unless_broken(recorded, [(Mutation::MetadataWhereAimed, Known::Not)])
}

/// True if a place may be written, given the in-place bit of its word, and whether it is in the top image's data file.
#[inline]
pub fn may_write_in_place(marked: bool, in_top: bool) -> bool {
    unless_broken(marked && in_top, [(Mutation::OldTopWritten, marked)])
}

/// True if a slice that is a run stays one. `follows`: the new word of the cluster is the one that the run has there.
#[inline]
pub fn stays_run(follows: bool) -> bool {
    unless_broken(follows, [(Mutation::RunKept, true)])
}

/// True if the words of a slice of `clusters` clusters all follow from the first, given how many join the one before.
#[inline]
pub fn all_join(joints: usize, clusters: usize) -> bool {
    unless_broken(joints + 1 >= clusters, [(Mutation::GapTakenForRun, joints + 2 >= clusters)])
}
