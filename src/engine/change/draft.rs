//! What a change writes, before it is put into steps: new structures, flags, counts and the switch of the header.
//!
//! Owns the places of new structures, and the groups of actions. `rules::change` has the order of the groups, and `plan`
//! carries the actions on, step by step.

use std::collections::{BTreeSet, VecDeque};

use qcow2::entry::encode_refblock_offset;
use qcow2::position::{
    Features, Patch, REFCOUNT_TABLE_OFFSET, patch_autoclear, patch_disk, patch_features,
    patch_refcount_table, patch_snapshots,
};
use qcow2::{Geometry, Header, HostCluster, HostOffset, HostRange, Incompatible, Snapshot, Version};

use super::growth::{Growth, Room};
use super::pieces::{cancel, encode_l1};
use super::refusal::ChangeRefusal;
use super::resize::NewTables;
use super::{Change, Planner, SnapshotChange};
use crate::check::counts::Counts;
use crate::rules::change::{self as rules, Group};

/// The unit in bytes of writes of a new table. Hosts have blocks of that size or smaller.
const BLOCK: u64 = 4096;

/// Which flags a correction changes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Correction {
    /// True for an L1 table, false for L2 tables.
    pub in_l1: bool,
    /// True if flags are also set, false if they are only cleared.
    pub sets: bool,
}

pub(super) enum Action {
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

/// A refblock.
#[derive(Clone, Copy)]
pub(super) struct Refblock {
    /// Its index in the refcount table.
    pub index: u64,
    /// Where it lies.
    pub offset: HostOffset,
}

/// Tables in which flags change.
#[derive(Default)]
pub(super) struct Flagged {
    /// The clusters of the L2 tables.
    l2_tables: Vec<u64>,
    /// The L1 table, if its flags change too.
    l1: Option<HostRange>,
}

/// The parts from which a plan is made.
pub(super) struct Draft {
    pub header: Header,
    pub geometry: Geometry,
    pub counts: Counts,
    pub lower: Counts,
    pub blocks: Vec<Refblock>,
    /// Existing refblocks whose counts rise.
    raised: BTreeSet<u64>,
    /// Writes to free space.
    new: Vec<(u64, Vec<u8>)>,
    /// The space that these writes do not fill in their clusters.
    pub tails: VecDeque<HostRange>,
    pub new_l1: Option<HostOffset>,
    tables: Option<NewTables>,
    pub growth: Growth,
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

/// The entries of a new L1 table.
struct NewL1 {
    entries: Vec<u64>,
    /// The table has at least so many entries; those not given are 0.
    least: u64,
}

impl Draft {
    /// Decides what the change writes, without an order.
    ///
    /// # Errors
    /// If the change is impossible.
    pub fn new(planner: Planner) -> Result<Draft, ChangeRefusal> {
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
    pub fn actions(&mut self) -> VecDeque<Action> {
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
