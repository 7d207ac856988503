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

use qcow2::entry::{COPIED, encode_refblock_offset};
use qcow2::position::{
    Features, Patch, REFCOUNT_TABLE_OFFSET, patch_autoclear, patch_disk, patch_features, patch_refcount_table,
    patch_snapshots,
};
use qcow2::{
    Geometry, Header, HostCluster, HostOffset, HostPlace, HostRange, Incompatible, L1Entry, L2Entry,
    RawL2Entry, Snapshot, Version,
};

use super::growth::{Growth, Room};
use super::pieces::{cancel, encode_l1, take_piece, take_run};
use super::refusal::ChangeRefusal;
use super::resize::NewTables;
use super::step::PlanStep;
use super::{Change, Planner, SnapshotChange};
use crate::check::counts::Counts;
use crate::file_step::FileStep;
use crate::free::TAIL_BYTES;
use crate::rules::change::{self as rules, Group};

/// The alignment in bytes of a write of the changed part of a table.
const SECTOR: usize = qcow2::SECTOR as usize;
/// The unit in bytes of writes of a new table. Hosts have blocks of that size or smaller.
const BLOCK: u64 = 4096;

/// Which flags a correction changes.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Correction {
    /// True for an L1 table, false for L2 tables.
    in_l1: bool,
    /// True if flags are also set, false if they are only cleared.
    sets: bool,
}

enum Action {
    Bytes(u64, Vec<u8>),
    /// L2 tables.
    Tables(NewTables),
    /// Refblocks, by index in the refcount table.
    Refblocks(VecDeque<u64>),
    /// Tables in which flags are corrected.
    Correct(Correction, VecDeque<HostRange>),
    Sync,
    Lower,
    /// Removes from the refcount table the refblocks that no longer count anything.
    DropBlocks,
    /// Lowers the counts of the removed refblocks' clusters.
    LowerDropped,
}

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

/// A refblock.
#[derive(Clone, Copy)]
struct Refblock {
    /// Its index in the refcount table.
    index: u64,
    /// Where it lies.
    offset: HostOffset,
}

/// Tables in which flags change.
#[derive(Default)]
struct Flagged {
    /// The clusters of the L2 tables.
    l2_tables: Vec<u64>,
    /// The L1 table, if its flags change too.
    l1: Option<HostRange>,
}

/// The parts from which a plan is made.
struct Draft {
    header: Header,
    geometry: Geometry,
    counts: Counts,
    lower: Counts,
    blocks: Vec<Refblock>,
    /// Existing refblocks whose counts rise.
    raised: BTreeSet<u64>,
    /// Writes to free space.
    new: Vec<(u64, Vec<u8>)>,
    /// The space that these writes do not fill in their clusters.
    tails: VecDeque<HostRange>,
    new_l1: Option<HostOffset>,
    tables: Option<NewTables>,
    growth: Growth,
    /// The change of the header.
    switch: (u64, Vec<u8>),
    /// The L2 tables whose flags are cleared before the header changes or set after it, and the L1 table if it changes
    /// too.
    clear: Flagged,
    set: Flagged,
    autoclear: u64,
    /// True if the file may become shorter: refblocks that count nothing must not keep it long.
    drops_blocks: bool,
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

/// The entries of a new L1 table.
struct NewL1 {
    entries: Vec<u64>,
    /// The table has at least so many entries; those not given are 0.
    least: u64,
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

impl Draft {
    fn new(planner: Planner) -> Result<Draft, ChangeRefusal> {
        let Planner { change, header, geometry, base, mut active, mut target, cut, .. } = planner;
        let (snapshots, index) = (planner.snapshots, planner.index);
        let clusters = base.clusters;
        let known = base.refblocks.iter();
        let mut blocks: Vec<Refblock> =
            known.map(|block| Refblock { index: block.index, offset: HostOffset(block.offset) }).collect();
        blocks.sort_unstable_by_key(|block| block.index);
        let mut draft = Draft {
            geometry,
            counts: base.recorded,
            lower: Counts::new(clusters + 1),
            blocks,
            raised: BTreeSet::new(),
            new: Vec::new(),
            tails: VecDeque::new(),
            new_l1: None,
            tables: None,
            growth: Growth::default(),
            switch: (0, Vec::new()),
            clear: Flagged::default(),
            set: Flagged::default(),
            autoclear: header.autoclear_kept(header.bitmaps().is_some()),
            drops_blocks: matches!(&change, Change::Resize(resize) if resize.size <= geometry.size),
            header,
        };
        let active_l1 = HostRange::new(draft.header.l1_offset, u64::from(draft.header.l1_entries) * 8);
        let active_tables: Vec<u64> = active.walk.l2.keys().copied().collect();
        match change {
            Change::Snapshot(SnapshotChange::Create { .. }) => {
                draft.raise(&active.walk.references)?;
                draft.clear = Flagged { l2_tables: active_tables, l1: Some(active_l1) };
                let l1 = NewL1 { entries: active.l1, least: active.entries };
                draft.add_snapshot(snapshots, l1, clusters)?;
            }
            Change::Snapshot(SnapshotChange::Delete { .. }) => {
                draft.lower = target.walk.references;
                let length = u64::from(snapshots[index].l1_entries) * 8;
                draft.free(HostRange::new(snapshots[index].l1_offset, length));
                draft.set = Flagged { l2_tables: active_tables, l1: Some(active_l1) };
                draft.remove_snapshot(snapshots, index, clusters)?;
            }
            Change::Snapshot(SnapshotChange::Apply { .. }) => {
                // Clusters that both trees name have the same count at every step.
                cancel(&mut target.walk.references, &mut active.walk.references);
                draft.raise(&target.walk.references)?;
                draft.lower = active.walk.references;
                draft.free(active_l1);
                draft.clear.l2_tables = target.walk.l2.keys().copied().collect();
                let size = snapshots[index].disk_size().unwrap_or(geometry.size);
                // The VM state past the disk is included, as in QEMU.
                let l1 = NewL1 { entries: target.l1, least: target.entries };
                draft.switch_l1(l1, size, None, clusters)?;
            }
            Change::Resize(resize) => {
                draft.lower = target.walk.references;
                draft.free(active_l1);
                let tables = resize.tables(&cut, &geometry);
                if let Some(table) = cut.table.filter(|_| tables.length() > 0) {
                    draft.lower.add(HostCluster(table), 1);
                }
                let l1 = NewL1 { entries: active.l1, least: 0 };
                draft.switch_l1(l1, resize.size, Some(tables), clusters)?;
            }
        }
        Ok(draft)
    }

    /// Raises the counts by these references.
    fn raise(&mut self, references: &Counts) -> Result<(), ChangeRefusal> {
        let max = qcow2::refcount_max(self.geometry.refcount_order);
        let entries = self.geometry.refblock_entries();
        for cluster in references.touched(references) {
            let more = references.get(cluster);
            if more == 0 {
                continue;
            }
            let needed = self.counts.get(cluster).saturating_add(more);
            if needed > max || needed == u64::MAX {
                let offset = self.geometry.host_offset(HostCluster(cluster));
                return Err(ChangeRefusal::RefcountFull { offset, needed, max });
            }
            self.counts.set(HostCluster(cluster), needed);
            self.raised.insert(cluster / entries);
        }
        Ok(())
    }

    /// Notes that the clusters of a table will no longer be used.
    fn free(&mut self, table: HostRange) {
        let first = self.geometry.host_cluster(table.offset).0;
        for cluster in first..first + self.geometry.clusters_for(table.length) {
            self.lower.add(HostCluster(cluster), 1);
        }
    }

    /// Takes room for tables of these lengths in bytes, and returns their offsets.
    fn take_room(&mut self, lengths: &[u64], clusters: u64) -> Result<Vec<u64>, ChangeRefusal> {
        let size = self.geometry.cluster_size();
        let entries = self.geometry.refblock_entries();
        let known: BTreeSet<u64> = self.blocks.iter().map(|block| block.index).collect();
        let table_entries = u64::from(self.header.refcount_table_clusters) * (size / 8);
        let mut room = Room::new(&mut self.counts, self.geometry, clusters);
        let mut places = Vec::new();
        for length in lengths {
            let wanted = self.geometry.clusters_for(*length);
            places.push(if wanted == 0 { 0 } else { room.take(wanted)?.start.0 * size });
        }
        self.growth = room.grow(&known, table_entries)?;
        for run in &room.taken {
            self.raised.extend(run.start.0 / entries..=(run.end().0 - 1) / entries);
        }
        let new = self.growth.blocks.iter();
        self.blocks.extend(
            new.map(|(index, cluster)| Refblock { index: *index, offset: HostOffset(cluster * size) }),
        );
        self.blocks.sort_unstable_by_key(|block| block.index);
        if self.growth.table.is_some() {
            let length = u64::from(self.header.refcount_table_clusters) * size;
            self.free(HostRange::new(self.header.refcount_table_offset, length));
        }
        Ok(places)
    }

    /// Writes a new table, in whole blocks. The rest of its clusters is not written and may hold old data, so it is
    /// given back at the end.
    fn write_new(&mut self, offset: u64, mut bytes: Vec<u8>) {
        let cluster = self.geometry.cluster_size();
        let length = bytes.len().next_multiple_of(BLOCK.min(cluster) as usize);
        // An L1 table may have 32 MiB; `resize` alone might reserve twice that.
        bytes.reserve_exact(length - bytes.len());
        bytes.resize(length, 0);
        let filled = length as u64;
        if !filled.is_multiple_of(cluster) {
            let rest = filled.next_multiple_of(cluster) - filled;
            self.tails.push_back(HostRange::new(HostOffset(offset + filled), rest));
        }
        self.new.push((offset, bytes));
    }

    fn add_snapshot(
        &mut self,
        mut snapshots: Vec<Snapshot>,
        l1: NewL1,
        clusters: u64,
    ) -> Result<(), ChangeRefusal> {
        let old_length = snapshots[..snapshots.len() - 1].iter().map(|old| old.encoded_length() as u64).sum();
        let new_length = snapshots.iter().map(|snapshot| snapshot.encoded_length() as u64).sum();
        let entries = l1.least;
        let places = self.take_room(&[entries * 8, new_length], clusters)?;
        let new = snapshots.last_mut().expect("the new one is the last");
        // At most 32 MiB of entries, so the number fits.
        (new.l1_offset, new.l1_entries) = (HostOffset(places[0]), entries as u32);
        self.write_new(places[0], encode_l1(&l1.entries, entries, |_| false));
        self.write_new(places[1], qcow2::snapshot::encode_table(&snapshots));
        self.switch_to(patch_snapshots(snapshots.len() as u32, HostOffset(places[1])));
        self.free(HostRange::new(self.header.snapshots_offset, old_length));
        Ok(())
    }

    fn remove_snapshot(
        &mut self,
        mut snapshots: Vec<Snapshot>,
        index: usize,
        clusters: u64,
    ) -> Result<(), ChangeRefusal> {
        let length = |snapshots: &[Snapshot]| snapshots.iter().map(|one| one.encoded_length() as u64).sum();
        self.free(HostRange::new(self.header.snapshots_offset, length(&snapshots)));
        snapshots.remove(index);
        let places = self.take_room(&[length(&snapshots)], clusters)?;
        self.write_new(places[0], qcow2::snapshot::encode_table(&snapshots));
        self.switch_to(patch_snapshots(snapshots.len() as u32, HostOffset(places[0])));
        Ok(())
    }

    /// Gives the disk another size and a new L1 table, with entries for the new L2 tables. The table has all entries that
    /// the size needs.
    fn switch_l1(
        &mut self,
        l1: NewL1,
        size: u64,
        mut tables: Option<NewTables>,
        clusters: u64,
    ) -> Result<(), ChangeRefusal> {
        let NewL1 { entries: mut l1, least } = l1;
        // A disk has at least one entry, whether it needs one or not.
        let entries = Geometry { size, ..self.geometry }.l1_entries().max(least).max(1);
        let length = tables.as_ref().map_or(0, NewTables::length);
        let places = self.take_room(&[entries * 8, length], clusters)?;
        if let Some(tables) = &mut tables {
            tables.offset = places[1];
            l1.reserve_exact((entries as usize).saturating_sub(l1.len()));
            l1.resize(entries as usize, 0);
            for (n, index) in tables.indices.clone().enumerate() {
                l1[index as usize] = places[1] + n as u64 * self.geometry.cluster_size();
            }
        }
        self.tables = tables;
        let (counts, geometry) = (&self.counts, self.geometry);
        let bytes = encode_l1(&l1, entries, |offset| counts.get(geometry.host_cluster(offset).0) == 1);
        self.write_new(places[0], bytes);
        self.new_l1 = Some(HostOffset(places[0]));
        self.switch_to(patch_disk(size, entries as u32, HostOffset(places[0])));
        Ok(())
    }

    fn switch_to<const LENGTH: usize>(&mut self, patch: Patch<LENGTH>) {
        self.switch = (patch.offset.0, patch.bytes.to_vec());
    }

    /// All actions, in order.
    fn actions(&mut self) -> VecDeque<Action> {
        let mut actions = VecDeque::new();
        for group in rules::order() {
            let some = self.group(*group);
            // The removal of refblocks brings its own syncs, if there is anything to remove.
            let is_synced = !some.is_empty() && *group != Group::DropBlocks;
            actions.extend(some);
            actions.extend(is_synced.then_some(Action::Sync));
        }
        actions
    }

    /// The actions of a group, but for the sync that ends it.
    fn group(&mut self, group: Group) -> Vec<Action> {
        match group {
            Group::ClearAutoclear => self.clear_autoclear(),
            Group::NewStructures => self.new_structures(),
            Group::MarkDirty => self.mark(true),
            Group::NameStructures => self.name_structures(),
            Group::ClearFlags => self.corrections(&self.clear, false),
            Group::RaiseCounts => vec![Action::Refblocks(self.raised.iter().copied().collect())],
            Group::SwitchHeader => vec![Action::Bytes(self.switch.0, self.switch.1.clone())],
            Group::LowerCounts => vec![Action::Lower],
            Group::DropBlocks if self.drops_blocks => vec![Action::DropBlocks],
            Group::DropBlocks => Vec::new(),
            Group::SetFlags => self.corrections(&self.set, true),
            Group::ClearMark => self.mark(false),
        }
    }

    /// All writes to free space.
    fn new_structures(&mut self) -> Vec<Action> {
        let mut actions: Vec<Action> =
            self.new.drain(..).map(|(offset, bytes)| Action::Bytes(offset, bytes)).collect();
        actions.extend(self.tables.take().map(Action::Tables));
        if !self.growth.blocks.is_empty() {
            actions.push(Action::Refblocks(self.growth.blocks.keys().copied().collect()));
        }
        if let Some(table) = self.growth.table {
            let size = self.geometry.cluster_size();
            let mut bytes = vec![0; (table.count * size) as usize];
            for Refblock { index, offset } in &self.blocks {
                let raw = encode_refblock_offset(*offset, &self.geometry);
                qcow2::set_entry(&mut bytes, *index as usize, raw);
            }
            actions.push(Action::Bytes(table.start.0 * size, bytes));
        }
        actions
    }

    /// Names the new refblocks, or the new refcount table.
    fn name_structures(&self) -> Vec<Action> {
        let size = self.geometry.cluster_size();
        if let Some(table) = self.growth.table {
            // At most 8 MiB of clusters, so the number fits.
            let patch = patch_refcount_table(HostOffset(table.start.0 * size), table.count as u32);
            debug_assert_eq!(patch.offset.0, REFCOUNT_TABLE_OFFSET as u64);
            return vec![Action::Bytes(patch.offset.0, patch.bytes.to_vec())];
        }
        let name = |(index, cluster): (&u64, &u64)| {
            let raw = encode_refblock_offset(HostOffset(cluster * size), &self.geometry);
            Action::Bytes(self.header.refcount_table_offset.0 + index * 8, raw.to_be_bytes().to_vec())
        };
        self.growth.blocks.iter().map(name).collect()
    }

    fn corrections(&self, tables: &Flagged, sets: bool) -> Vec<Action> {
        let size = self.geometry.cluster_size();
        let mut actions = Vec::new();
        if !tables.l2_tables.is_empty() {
            let l2_tables = tables.l2_tables.iter();
            let l2_tables =
                l2_tables.map(|cluster| HostRange::new(HostOffset(cluster * size), size)).collect();
            actions.push(Action::Correct(Correction { in_l1: false, sets }, l2_tables));
            actions.extend(
                tables.l1.map(|l1| Action::Correct(Correction { in_l1: true, sets }, VecDeque::from([l1]))),
            );
        }
        actions
    }

    /// Clears unknown autoclear bits. Version 2 has none.
    fn clear_autoclear(&self) -> Vec<Action> {
        if self.header.version == Version::V2 || self.header.autoclear == self.autoclear {
            return Vec::new();
        }
        let patch = patch_autoclear(self.autoclear);
        vec![Action::Bytes(patch.offset.0, patch.bytes.to_vec())]
    }

    /// Marks the image as dirty or as sound, and clears unknown autoclear bits. Version 2 has no marks.
    fn mark(&self, dirty: bool) -> Vec<Action> {
        if self.header.version == Version::V2 {
            return Vec::new();
        }
        let marks = self.header.incompatible.without(Incompatible::DIRTY);
        let marks = if dirty { marks.with(Incompatible::DIRTY) } else { marks };
        let patch = patch_features(Features {
            incompatible: marks,
            compatible: self.header.compatible,
            autoclear: self.autoclear,
        });
        vec![Action::Bytes(patch.offset.0, patch.bytes.to_vec())]
    }
}
