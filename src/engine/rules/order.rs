//! In which order metadata and data become durable, and what may be under way at the same time (docs/durability.md).

use crate::mutation::{Mutation, unless_broken};
use crate::tables::{Dirt, TableId};

/// A stage of a cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// Metadata that nothing durable names.
    Zero,
    /// Refcounts, and tables that the last stage names.
    One,
    /// The links.
    Two,
}

/// The stage that writes a dirty table slice.
pub fn stage_of(id: TableId, dirt: Dirt) -> Stage {
    let is_l2 = matches!(id, TableId::L2 { .. });
    let right = match (is_l2, dirt) {
        (false, Dirt::New) => Stage::Zero,
        (false, _) | (true, Dirt::New) => Stage::One,
        (true, _) => Stage::Two,
    };
    let moved = |slice: (bool, Dirt), stage| if (is_l2, dirt) == slice { stage } else { right };
    unless_broken(
        right,
        [
            (Mutation::RefblocksWithEntries, moved((false, Dirt::New), Stage::One)),
            (Mutation::CountsWithLinks, moved((false, Dirt::Existing), Stage::Two)),
            (Mutation::TablesWithLinks, moved((true, Dirt::New), Stage::Two)),
            (Mutation::LinksBeforeData, moved((true, Dirt::Existing), Stage::One)),
        ],
    )
}

/// Of the slices of a cut that failed: those that must be written again.
pub fn to_write_again(slices: Vec<(TableId, Dirt)>) -> Vec<(TableId, Dirt)> {
    unless_broken(slices, [(Mutation::FailedCutForgotten, Vec::new())])
}

/// The cut with which a flush ends that arrives while this cut is running. The running cut was taken before the flush
/// arrived, so only the next one has everything that was acknowledged until then.
pub fn flush_ends_with(running: Option<u64>, next: u64) -> u64 {
    unless_broken(next, [(Mutation::JoinsRunningCut, running.unwrap_or(next))])
}

/// True if a cut may be taken, given whether another one or an early commit is under way.
pub fn may_take_cut(cut_runs: bool, early_commit_runs: bool) -> bool {
    unless_broken(!cut_runs && !early_commit_runs, [(Mutation::CutBesideEarlyLink, !cut_runs)])
}

/// True if a change that is planned and committed in one step may be made without a claim, given whether a claim overlaps it.
pub fn may_change_unclaimed(overlaps_claim: bool) -> bool {
    unless_broken(!overlaps_claim, [(Mutation::ClaimIgnored, true)])
}

/// True if an early commit may begin, given whether a cut or another early commit is under way, and whether any
/// metadata is dirty. The count of its cluster might be dirty.
pub fn may_commit_early(is_busy: bool, is_dirty: bool) -> bool {
    unless_broken(
        !is_busy && !is_dirty,
        [(Mutation::EarlyLinkBesideCut, !is_dirty), (Mutation::EarlyLinkBeforeCounts, !is_busy)],
    )
}

/// True if a cut of links alone needs nothing durable before it. `follow_data`: one of its links may become durable only
/// after its data.
pub fn links_need_no_data(follow_data: bool) -> bool {
    unless_broken(!follow_data, [(Mutation::LinksNeedNoData, true)])
}

/// True if the link of a new cluster may become durable before the data: the guest then reads zeros, as it would without
/// the write.
pub fn link_may_precede_data(is_new_and_zero: bool, read_zero_before: bool) -> bool {
    unless_broken(is_new_and_zero && read_zero_before, [(Mutation::LinksForgetBacking, is_new_and_zero)])
}

/// The block of the L1 table that the next cut must write, so that it links a new L2 table.
pub fn block_to_link(block: u64) -> Option<u64> {
    unless_broken(Some(block), [(Mutation::LinkForgotten, None)])
}

/// True if the slice with the link of an aborted early commit must be written again.
pub fn aborted_link_is_dirty() -> bool {
    unless_broken(true, [(Mutation::EarlyLinkLeft, false)])
}

/// True if the records of a commit are valid in the journal before the request is answered.
#[inline]
pub fn is_recorded_before_the_answer() -> bool {
    unless_broken(true, [(Mutation::RecordedLate, false)])
}

/// True if records leave the journal only when the cut with their entries is durable.
pub fn tail_waits_for_the_cut() -> bool {
    unless_broken(true, [(Mutation::TailBeforeCut, false)])
}
