//! The steps of a change, in an order in which a crash after any step is safe (docs/durability.md, "Changes of an image
//! that nobody uses").
//!
//! 0. Unknown autoclear bits are cleared, if any are set. Sync. They may be the number of a journal, which must be worth
//!    nothing before the space that it names is used.
//! 1. All new structures are written to free space: refblocks, a refcount table, L1 table, L2 tables, snapshot table.
//!    Sync. A lack of space shows here, when nothing has changed.
//! 2. The header is marked dirty, if the version has the mark. Sync.
//! 3. New refblocks are named. Sync.
//! 4. The flags COPIED of clusters that will be shared are cleared. Sync.
//! 5. Refcounts are raised. Sync.
//! 6. The header names the new L1 table, with the disk's size, or the new snapshot table: one sector. Sync.
//! 7. Refcounts are lowered. Sync. If the disk does not grow, refblocks that no longer count anything are removed from
//!    the refcount table. Sync. Then the refcounts of their clusters are lowered. Sync.
//! 8. The flags COPIED of clusters that are no longer shared are set. Sync.
//! 9. The header's mark is cleared. Sync.
//! 10. Unused space is given back to the host, including the space that new tables do not fill in their clusters. If
//!     the disk is resized, the file is cut after its last cluster in use.
//!
//! The steps are generated one by one, to save memory.

use std::collections::{BTreeSet, VecDeque};
use std::ops::Range;

use qcow2::entry::COPIED;
use qcow2::{
    Geometry, HostCluster, HostOffset, HostPlace, HostRange, L1Entry, L2Entry, RawL2Entry, Snapshot,
};

use super::draft::{Action, Correction, Draft, Refblock};
use super::pieces::{take_piece, take_run};
use super::refusal::ChangeRefusal;
use super::step::PlanStep;
use super::{Change, Planner};
use crate::check::counts::Counts;
use crate::file_step::FileStep;
use crate::free::TAIL_BYTES;
use crate::rules::change as rules;

/// The alignment in bytes of a write of the changed part of a table.
const SECTOR: usize = qcow2::SECTOR as usize;
/// A change, step by step.
pub struct Plan {
    actions: VecDeque<Action>,
    geometry: Geometry,
    /// The refcounts that the image must have at this step.
    counts: Counts,
    /// The amounts by which the counts are lowered later.
    lower: Counts,
    /// By index, ascending.
    blocks: Vec<Refblock>,
    /// The offset of the refcount table when the counts are lowered.
    refcount_table: u64,
    correction: Correction,
    /// Space to give back.
    free: VecDeque<HostRange>,
    /// True if the file is cut at the end.
    cuts: bool,
    /// Bytes of free clusters that the file must end with, because it did before; 0 if it did not.
    tail: u64,
    /// The first cluster past all counted ones while the plan is carried out.
    used_end: u64,
    /// The offset of the new active L1 table, if there is one.
    new_l1: Option<HostOffset>,
    snapshot: Option<Snapshot>,
}

impl Plan {
    pub(super) fn new(planner: Planner) -> Result<Plan, ChangeRefusal> {
        let is_resize = matches!(planner.change, Change::Resize(_));
        let snapshot = (!is_resize).then(|| planner.snapshots[planner.index].clone());
        let tail = tail_of(&planner);
        let mut draft = Draft::new(planner)?;
        let geometry = draft.geometry;
        let used_end = used_end(&draft.counts);
        let actions = draft.actions();
        let correction = Correction { in_l1: false, sets: false };
        let refcount_table = match draft.growth.table {
            Some(table) => table.start.0 * geometry.cluster_size(),
            None => draft.header.refcount_table_offset.0,
        };
        let Draft { counts, lower, blocks, tails: free, new_l1, .. } = draft;
        Ok(Plan {
            actions,
            geometry,
            counts,
            lower,
            blocks,
            refcount_table,
            correction,
            free,
            cuts: is_resize,
            tail,
            used_end,
            new_l1,
            snapshot,
        })
    }

    /// The snapshot that the change is about, if any. For a new one the offset of its L1 table is not set.
    pub fn snapshot(&self) -> Option<&Snapshot> {
        self.snapshot.as_ref()
    }

    /// The length in bytes that the file must durably have before the first step. It makes the file end with free
    /// clusters at every step, so the next writer still searches for the leaks of an earlier crash. None if the file
    /// did not end so before.
    pub fn marked_length(&self) -> Option<u64> {
        let used = self.used_end.checked_mul(self.geometry.cluster_size())?;
        used.checked_add(self.tail).filter(|_| self.tail > 0)
    }

    /// The offset of the disk's new L1 table, if it gets one.
    pub fn new_l1(&self) -> Option<HostOffset> {
        self.new_l1
    }

    /// The next step; None at the end.
    pub fn next_step(&mut self) -> Option<PlanStep> {
        loop {
            let step = match self.actions.front_mut() {
                None => return self.give_back(),
                Some(Action::Sync) => {
                    self.actions.pop_front();
                    return Some(PlanStep::File(FileStep::Sync));
                }
                Some(Action::Lower) => {
                    self.actions.pop_front();
                    let blocks = self.lower_counts();
                    self.actions.push_front(Action::Refblocks(blocks));
                    None
                }
                Some(Action::DropBlocks) => {
                    self.actions.pop_front();
                    self.drop_blocks();
                    continue;
                }
                Some(Action::LowerDropped) => {
                    self.actions.pop_front();
                    // Refblocks that have left the table have no location to be written to.
                    let mut blocks = self.lower_counts();
                    blocks
                        .retain(|index| self.blocks.binary_search_by_key(index, |block| block.index).is_ok());
                    self.actions.push_front(Action::Refblocks(blocks));
                    None
                }
                Some(Action::Bytes(offset, bytes)) => take_piece(offset, bytes).map(PlanStep::File),
                Some(Action::Tables(tables)) => {
                    tables.next_piece().map(|(offset, bytes)| write(HostOffset(offset), bytes))
                }
                Some(Action::Refblocks(indices)) => indices.pop_front().map(|index| {
                    let at = self.blocks.binary_search_by_key(&index, |block| block.index);
                    let offset = self.blocks[at.expect("a known refblock")].offset;
                    write(offset, self.counts.refblock(&self.geometry, index))
                }),
                Some(Action::Correct(correction, runs)) => {
                    self.correction = *correction;
                    take_run(runs)
                }
            };
            match step {
                Some(step) => return Some(step),
                None if matches!(self.actions.front(), Some(Action::Refblocks(some)) if !some.is_empty()) => {
                }
                None => {
                    self.actions.pop_front();
                }
            }
        }
    }

    /// True if [`Plan::next_step`] will return more of the tables that the last [`PlanStep::Correct`] was about. Those
    /// tables may be read and corrected together. Each must be written before the next step of another kind.
    pub fn corrects_more(&self) -> bool {
        matches!(self.actions.front(), Some(Action::Correct(_, runs)) if !runs.is_empty())
    }

    /// Corrects the flags in the bytes that [`PlanStep::Correct`] names. Returns the changed part, if any, in whole
    /// sectors as far as there are bytes.
    pub fn correct(&self, bytes: &mut [u8]) -> Option<Range<usize>> {
        let Correction { in_l1, sets } = self.correction;
        let entry_size = if in_l1 { 8 } else { self.geometry.l2_entry_size() as usize };
        let mut changed: Option<Range<usize>> = None;
        for at in (0..bytes.len()).step_by(entry_size) {
            let Some(HostPlace { offset, copied }) = self.named(&bytes[at..at + entry_size], in_l1) else {
                continue;
            };
            let sole = self.counts.get(self.geometry.host_cluster(offset).0) == 1;
            if copied == sole || (sole && !sets) {
                continue;
            }
            let descriptor = qcow2::entry(&bytes[at..], 0);
            qcow2::set_entry(&mut bytes[at..], 0, descriptor ^ COPIED);
            let sector = at / SECTOR * SECTOR;
            let first = changed.map_or(sector, |changed| changed.start);
            changed = Some(first..(sector + SECTOR).min(bytes.len()));
        }
        changed
    }

    /// The cluster that an entry names, with its flag, if the entry has one.
    fn named(&self, entry: &[u8], in_l1: bool) -> Option<HostPlace> {
        if entry.iter().all(|byte| *byte == 0) {
            return None;
        }
        if !in_l1 {
            let raw = RawL2Entry::load(entry, 0, &self.geometry);
            return L2Entry::decode(raw, &self.geometry).ok().and_then(L2Entry::host);
        }
        match L1Entry::decode(qcow2::entry(entry, 0), &self.geometry) {
            Ok(L1Entry::Table { offset, copied }) => Some(HostPlace { offset, copied }),
            _ => None,
        }
    }

    /// Lowers the counts and returns the indices of the refblocks that change.
    fn lower_counts(&mut self) -> VecDeque<u64> {
        let lower = std::mem::take(&mut self.lower);
        let (entries, size) = (self.geometry.refblock_entries(), self.geometry.cluster_size());
        let mut blocks = BTreeSet::new();
        for cluster in lower.touched(&lower) {
            let less = lower.get(cluster);
            if less == 0 {
                continue;
            }
            self.counts.subtract(HostCluster(cluster), less);
            blocks.insert(cluster / entries);
            if self.counts.get(cluster) > 0 {
                continue;
            }
            match self.free.back_mut() {
                Some(last) if last.end().0 == cluster * size => last.length += size,
                _ => self.free.push_back(HostRange::new(HostOffset(cluster * size), size)),
            }
        }
        blocks.into_iter().collect()
    }

    /// Plans to remove from the refcount table the refblocks that count only themselves and each other.
    fn drop_blocks(&mut self) {
        let (entries, size) = (self.geometry.refblock_entries(), self.geometry.cluster_size());
        let mut left = self.counts.clone();
        let mut writes = VecDeque::new();
        loop {
            let before = self.blocks.len();
            self.blocks.retain(|Refblock { index, offset }| {
                let own = offset.0 / size;
                let mut counted = index * entries..(index + 1) * entries;
                if counted.any(|cluster| left.get(cluster) != u64::from(cluster == own)) {
                    return true;
                }
                left.subtract(HostCluster(own), 1);
                self.lower.grow(own + 1);
                self.lower.set(HostCluster(own), 1);
                writes.push_back(Action::Bytes(self.refcount_table + index * 8, vec![0; 8]));
                false
            });
            // Repeat: another refblock may have counted nothing but a refblock removed here.
            if self.blocks.len() == before {
                break;
            }
        }
        if writes.is_empty() {
            return;
        }
        for action in [Action::Sync, Action::LowerDropped, Action::Sync] {
            writes.push_back(action);
        }
        while let Some(action) = writes.pop_back() {
            self.actions.push_front(action);
        }
    }

    fn give_back(&mut self) -> Option<PlanStep> {
        if let Some(unused) = self.free.pop_front() {
            return Some(PlanStep::File(FileStep::Punch(unused)));
        }
        std::mem::take(&mut self.cuts).then(|| {
            let end = used_end(&self.counts).max(1);
            PlanStep::File(FileStep::Cut { length: end * self.geometry.cluster_size() + self.tail })
        })
    }
}

fn write(offset: HostOffset, bytes: Vec<u8>) -> PlanStep {
    PlanStep::File(FileStep::Write { offset, bytes })
}

/// The first cluster past all counted ones.
fn used_end(counts: &Counts) -> u64 {
    counts.touched(counts).filter(|cluster| counts.get(*cluster) > 0).last().map_or(0, |last| last + 1)
}

/// The bytes of free clusters with which the file must end to be marked as before; 0 if it is not marked. See
/// docs/durability.md, "Leaks of an earlier crash".
fn tail_of(planner: &Planner) -> u64 {
    let (base, size) = (&planner.base, planner.geometry.cluster_size());
    let first = base.file_length.saturating_sub(TAIL_BYTES) / size;
    let is_free = |cluster: u64| base.recorded.get(cluster) == 0;
    let is_marked = first < base.clusters && (first..base.clusters).all(is_free);
    if rules::keeps_mark(is_marked) { TAIL_BYTES.max(size) } else { 0 }
}
