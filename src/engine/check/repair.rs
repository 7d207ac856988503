//! New refcounts for an image whose references are known: what to write, in what order. No I/O.
//!
//! The order (docs/durability.md gives the reasons for the same order in normal service):
//!
//! 1. If more than the header is to change, and the version knows it, the header is marked dirty. Sync.
//! 2. Refcounts. In place where the structure is sound: between the old count and the new one there is nothing that
//!    was not there before. Else a whole new structure is written behind the end of the file, synced, and only then
//!    named by the header, in one sector. Sync.
//! 3. The flags COPIED that disagree with the new refcounts. Sync.
//! 4. The header's marks "dirty" and "corrupt" are cleared. Sync.
//!
//! So a crash leaves an image that is marked dirty (version 2 has no such mark: one that a check finds as wrong as
//! before), whose references are untouched, and that can be repaired again; what was written behind the end of the file
//! is then at worst leaked. The lowering of leaks alone needs no mark, as no refcount is ever too low.

use std::collections::{BTreeSet, VecDeque};

use qcow2::entry::encode_refblock_offset;
use qcow2::header::REFCOUNT_TABLE_SIZE_MAX;
use qcow2::position::{Patch, patch_incompatible, patch_refcount_table};
use qcow2::{Geometry, HostOffset, Incompatible, Version};
use thiserror::Error;

use super::Checked;
use super::counts::Counts;
use super::walk::{FlagFix, Walk};

/// The most bytes of neighbouring flags that are written together.
const FLAGS_MAX: usize = 64 << 10;

/// What to repair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RepairKind {
    /// Refcounts that are too high; ones that are too low stay.
    Leaks,
    /// All refcounts, flags and marks. What a dirty image needs.
    All,
}

/// Why new refcounts cannot mend an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum NotRepairable {
    /// Tables that lead to guest data are damaged: refcounts made from them would give clusters away that are in use.
    #[error(
        "{findings} finding(s) are not about refcounts, so new refcounts cannot mend the image: restore it from a \
         copy, or copy what can be read with qemu-img convert"
    )]
    Damaged {
        /// How many.
        findings: u64,
    },
    /// The refcount structure itself is damaged, which the repair of leaks does not touch.
    #[error("the refcount structure is damaged: repair all, not the leaks only")]
    StructureDamaged,
    /// The refcounts need a larger table than the format allows.
    #[error("the file is too large for a new refcount table")]
    TooLarge,
}

/// What a repair does next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RepairStep {
    /// Write these bytes, at most a cluster or a refcount table (8 MiB) of them. They may lie behind the end of the
    /// file, and they need not fill sectors: what else is in a sector stays. Between syncs the order does not matter.
    Write {
        /// Where.
        offset: HostOffset,
        /// What.
        bytes: Vec<u8>,
    },
    /// Make all that was written durable before going on.
    Sync,
}

/// The steps of a repair, made one by one, so that they take little memory.
pub struct Repair {
    actions: VecDeque<Action>,
    geometry: Geometry,
    /// The new refcounts.
    counts: Counts,
}

enum Action {
    Refblock { index: u64, offset: u64 },
    Bytes { offset: u64, bytes: Vec<u8> },
    Flag(FlagFix),
    Sync,
}

impl Checked {
    /// Plans the repair. Nothing is to be written to the image between the check and the repair, but by the repair.
    ///
    /// # Errors
    /// If new refcounts cannot mend what was found.
    pub fn plan_repair(self, kind: RepairKind) -> Result<Repair, NotRepairable> {
        let mut walk = self.walk;
        if walk.report.beyond_repair > 0 {
            return Err(NotRepairable::Damaged { findings: walk.report.beyond_repair });
        }
        match kind {
            RepairKind::Leaks if walk.report.structure_damaged > 0 => Err(NotRepairable::StructureDamaged),
            RepairKind::Leaks => {
                lower(&mut walk);
                let mut actions = in_place(&walk);
                flags(&mut actions, &walk);
                Ok(Repair { actions, geometry: walk.geometry, counts: walk.references })
            }
            RepairKind::All => {
                let mut actions = if is_sound(&walk) { in_place(&walk) } else { anew(&mut walk)? };
                flags(&mut actions, &walk);
                mark(&mut actions, &walk);
                Ok(Repair { actions, geometry: walk.geometry, counts: walk.references })
            }
        }
    }
}

impl Iterator for Repair {
    type Item = RepairStep;

    fn next(&mut self) -> Option<RepairStep> {
        let step = match self.actions.pop_front()? {
            Action::Sync => RepairStep::Sync,
            Action::Bytes { offset, bytes } => RepairStep::Write { offset: HostOffset(offset), bytes },
            Action::Refblock { index, offset } => {
                let bytes = self.counts.refblock(&self.geometry, index);
                RepairStep::Write { offset: HostOffset(offset), bytes }
            }
            Action::Flag(first) => {
                let mut bytes = first.raw.to_be_bytes().to_vec();
                while let Some(Action::Flag(next)) = self.actions.front()
                    && next.offset == first.offset + bytes.len() as u64
                    && bytes.len() < FLAGS_MAX
                {
                    bytes.extend(next.raw.to_be_bytes());
                    self.actions.pop_front();
                }
                RepairStep::Write { offset: HostOffset(first.offset), bytes }
            }
        };
        Some(step)
    }
}

/// Makes the counts those that the repair of leaks alone gives.
fn lower(walk: &mut Walk) {
    for cluster in walk.references.touched(&walk.recorded) {
        let (recorded, references) = (walk.recorded.get(cluster), walk.references.get(cluster));
        if recorded < references {
            walk.references.set(cluster, recorded);
        }
    }
}

/// True if the refblocks that exist can hold the new refcounts.
fn is_sound(walk: &Walk) -> bool {
    if walk.report.structure_damaged > 0 {
        return false;
    }
    let entries = walk.geometry.refblock_entries();
    let known: BTreeSet<u64> = walk.refblocks.iter().map(|block| block.index).collect();
    let mut counted = walk.references.touched(&walk.references);
    counted.all(|cluster| walk.references.get(cluster) == 0 || known.contains(&(cluster / entries)))
}

/// Writes the refblocks in which a count changes.
fn in_place(walk: &Walk) -> VecDeque<Action> {
    let entries = walk.geometry.refblock_entries();
    let differs = |cluster: &u64| walk.references.get(*cluster) != walk.recorded.get(*cluster);
    let changed: BTreeSet<u64> =
        walk.references.touched(&walk.recorded).filter(differs).map(|cluster| cluster / entries).collect();
    let blocks = walk.refblocks.iter().filter(|block| changed.contains(&block.index));
    let mut actions: VecDeque<Action> =
        blocks.map(|block| Action::Refblock { index: block.index, offset: block.offset }).collect();
    if !actions.is_empty() {
        actions.push_back(Action::Sync);
    }
    actions
}

/// Writes a new refcount structure behind the end of the file, then names it. The clusters of the old one become free.
fn anew(walk: &mut Walk) -> Result<VecDeque<Action>, NotRepairable> {
    for place in &walk.refcount_places {
        for cluster in place.first..place.first + place.count {
            walk.references.subtract(cluster, 1);
        }
    }
    let (geometry, size) = (walk.geometry, walk.geometry.cluster_size());
    // A table that ends there may have the cluster behind the last.
    let start = walk.clusters + u64::from(walk.references.get(walk.clusters) > 0);
    let entries = geometry.refblock_entries();
    let counted = walk.references.touched(&walk.references);
    let counted = counted.filter(|cluster| walk.references.get(*cluster) > 0);
    let mut blocks: BTreeSet<u64> = counted.map(|cluster| cluster / entries).collect();
    let mut table_clusters = 0;
    // The new structure counts itself, so it grows until it suffices.
    loop {
        let end = start + table_clusters + blocks.len() as u64;
        let before = (table_clusters, blocks.len());
        if end > start {
            blocks.extend(start / entries..=(end - 1) / entries);
        }
        let highest = blocks.last().copied().unwrap_or(0);
        table_clusters = geometry.clusters_for((highest + 1) * 8);
        if table_clusters > REFCOUNT_TABLE_SIZE_MAX >> geometry.cluster_bits {
            return Err(NotRepairable::TooLarge);
        }
        if (table_clusters, blocks.len()) == before {
            break;
        }
    }
    let end = start + table_clusters + blocks.len() as u64;
    walk.references.grow(end);
    for cluster in start..end {
        walk.references.add(cluster, 1);
    }
    let mut table = vec![0; (table_clusters * size) as usize];
    let mut actions = VecDeque::new();
    for (n, index) in blocks.iter().enumerate() {
        let offset = (start + table_clusters + n as u64) * size;
        let raw = encode_refblock_offset(HostOffset(offset), &geometry);
        qcow2::set_entry(&mut table, *index as usize, raw);
        actions.push_back(Action::Refblock { index: *index, offset });
    }
    actions.push_back(Action::Bytes { offset: start * size, bytes: table });
    actions.push_back(Action::Sync);
    // At most 8 MiB of clusters, so it fits.
    actions.push_back(header(patch_refcount_table(HostOffset(start * size), table_clusters as u32)));
    actions.push_back(Action::Sync);
    Ok(actions)
}

/// Corrects flags, after the refcounts.
fn flags(actions: &mut VecDeque<Action>, walk: &Walk) {
    if !walk.flag_fixes.is_empty() {
        actions.extend(walk.flag_fixes.iter().copied().map(Action::Flag));
        actions.push_back(Action::Sync);
    }
}

/// Marks the image as dirty before everything else, and as sound after it.
fn mark(actions: &mut VecDeque<Action>, walk: &Walk) {
    let marked = walk.header.incompatible;
    if walk.header.version == Version::V2 {
        return;
    }
    let sound = marked.without(Incompatible::DIRTY).without(Incompatible::CORRUPT);
    if !actions.is_empty() && !marked.contains(Incompatible::DIRTY) {
        actions.push_front(Action::Sync);
        actions.push_front(header(patch_incompatible(marked.with(Incompatible::DIRTY))));
    }
    if !actions.is_empty() || marked != sound {
        actions.push_back(header(patch_incompatible(sound)));
        actions.push_back(Action::Sync);
    }
}

fn header<const LENGTH: usize>(patch: Patch<LENGTH>) -> Action {
    Action::Bytes { offset: patch.offset.0, bytes: patch.bytes.to_vec() }
}
