//! Plans new refcounts for an image whose references are known: the writes, and their order. It does no I/O.
//!
//! The order (docs/durability.md gives the reasons for the same order in normal service):
//!
//! 1. If more than the header changes, and the version has the mark, the header is marked dirty. Sync.
//! 2. Invalid entries that can be cleared without loss are cleared. Sync.
//! 3. A new snapshot table, if one is needed, is written past the end of the file. Sync.
//! 4. Refcounts are written, with the old and the new snapshot table. If the structure is sound, they are written in
//!    place: a crash leaves some old and some new counts, and nothing else. Otherwise a whole new structure is written
//!    past the end of the file and synced. Only then does the header name it, in one sector. Sync.
//! 5. The header names the new snapshot table, in one sector. Sync. The refcounts of the old table's clusters are
//!    lowered. Sync.
//! 6. The flags COPIED that disagree with the new refcounts are corrected. Sync.
//! 7. The header's marks "dirty" and "corrupt" are cleared. Sync.
//! 8. Unused space goes back to the host: freed clusters are punched, and the file is cut after the last cluster in
//!    use.
//!
//! Before all of these, unknown autoclear bits are cleared. Sync.
//!
//! So a crash leaves an image that is marked dirty, whose references are untouched, and that can be repaired again.
//! Version 2 has no such mark: there, a check finds the image as wrong as before. The writes past the end of the file
//! are at worst leaked. The repair of leaks alone needs no mark, as it never makes a refcount too low.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use qcow2::entry::encode_refblock_offset;
use qcow2::header::{HEADER_LENGTH_V3, REFCOUNT_TABLE_SIZE_MAX};
use qcow2::position::{Patch, patch_autoclear, patch_incompatible, patch_refcount_table, patch_snapshots};
use qcow2::{Geometry, HostCluster, HostOffset, HostRange, Incompatible, Version};

use super::Checked;
use super::counts::Counts;
use super::refusal::{NotRepairable, RepairKind};
use super::report::ImagePart;
use super::walk::{Clearing, FlagFix, Place, Walk};
use crate::file_step::FileStep;
use crate::run::HostRun;

/// The most bytes of adjacent flags that are written together.
const FLAGS_MAX: usize = 64 << 10;

/// The steps of a repair. They are generated one by one, to save memory.
pub struct Repair {
    actions: VecDeque<Action>,
    geometry: Geometry,
    /// The new refcounts.
    counts: Counts,
    /// The refcounts before the repair.
    recorded: Counts,
    /// The index in the refcount table → the offset of the refblock.
    blocks: BTreeMap<u64, u64>,
    /// The first cluster behind all clusters in use.
    end: u64,
}

enum Action {
    Refblock {
        index: u64,
        offset: u64,
    },
    Bytes {
        offset: u64,
        bytes: Vec<u8>,
    },
    Flag(FlagFix),
    Sync,
    /// These clusters are no longer used.
    Release(Vec<Place>),
    /// Gives unused space back to the host.
    GiveBack,
    Punch(HostRun),
    Cut {
        clusters: u64,
    },
}

impl Checked {
    /// Plans the repair. From the check on, only the repair may write to the image.
    ///
    /// # Errors
    /// If the repair cannot mend the findings.
    pub fn plan_repair(self, kind: RepairKind) -> Result<Repair, NotRepairable> {
        let mut walk = self.walk;
        if let Some(refusal) = walk.report.refusal(kind) {
            return Err(refusal);
        }
        let mut actions = VecDeque::new();
        let mut blocks = walk.refblocks.iter().map(|block| (block.index, block.offset)).collect();
        let mut end = first_behind(&walk);
        if kind == RepairKind::Leaks {
            lower(&mut walk);
            actions.extend(in_place(&walk));
            flags(&mut actions, &walk);
        } else {
            actions.extend(clear(&mut walk));
            let table = new_snapshot_table(&mut walk, &mut actions, &mut end);
            if is_sound(&walk) {
                actions.extend(in_place(&walk));
            } else {
                actions.extend(anew(&mut walk, &mut end, &mut blocks)?);
            }
            if let Some(header) = table {
                actions.extend([header, Action::Sync]);
                let old = walk.places.iter().filter(|place| place.part == ImagePart::SnapshotTable);
                let old: Vec<Place> = old.copied().collect();
                if !old.is_empty() {
                    actions.extend([Action::Release(old), Action::Sync]);
                }
            }
            flags(&mut actions, &walk);
            mark(&mut actions, &walk);
        }
        keep_known_autoclear(&mut actions, &walk);
        if !actions.is_empty() {
            actions.push_back(Action::GiveBack);
        }
        let Walk { geometry, references, recorded, .. } = walk;
        Ok(Repair { actions, geometry, counts: references, recorded, blocks, end })
    }
}

impl Iterator for Repair {
    type Item = FileStep;

    fn next(&mut self) -> Option<FileStep> {
        let size = self.geometry.cluster_size();
        loop {
            let step = match self.actions.pop_front()? {
                Action::Sync => FileStep::Sync,
                Action::Bytes { offset, bytes } => FileStep::Write { offset: HostOffset(offset), bytes },
                Action::Refblock { index, offset } => {
                    let bytes = self.counts.refblock(&self.geometry, index);
                    FileStep::Write { offset: HostOffset(offset), bytes }
                }
                Action::Flag(first) => self.neighbouring_flags(first),
                Action::Punch(run) => {
                    FileStep::Punch(HostRange::new(HostOffset(run.start.0 * size), run.count * size))
                }
                Action::Cut { clusters } => FileStep::Cut { length: clusters * size },
                Action::Release(places) => {
                    self.release(&places);
                    continue;
                }
                Action::GiveBack => {
                    self.give_back();
                    continue;
                }
            };
            return Some(step);
        }
    }
}

impl Repair {
    fn neighbouring_flags(&mut self, first: FlagFix) -> FileStep {
        let mut bytes = first.raw.to_be_bytes().to_vec();
        while let Some(Action::Flag(next)) = self.actions.front()
            && next.offset == first.offset + bytes.len() as u64
            && bytes.len() < FLAGS_MAX
        {
            bytes.extend(next.raw.to_be_bytes());
            self.actions.pop_front();
        }
        FileStep::Write { offset: HostOffset(first.offset), bytes }
    }

    /// Lowers the counts of clusters that are no longer used, and writes their refblocks next.
    fn release(&mut self, places: &[Place]) {
        let clusters = places.iter().flat_map(|place| place.run.clusters());
        let mut changed = BTreeSet::new();
        for cluster in clusters {
            self.counts.subtract(HostCluster(cluster), 1);
            changed.insert(cluster / self.geometry.refblock_entries());
        }
        for index in changed.into_iter().rev() {
            // Each counted cluster has a refblock.
            self.actions.push_front(Action::Refblock { index, offset: self.blocks[&index] });
        }
    }

    /// Plans to give back clusters whose count was nonzero before and is zero now, and all space after the last
    /// cluster in use.
    fn give_back(&mut self) {
        let freed = self.recorded.touched(&self.recorded);
        let freed = freed.filter(|cluster| {
            *cluster < self.end && self.recorded.get(*cluster) > 0 && self.counts.get(*cluster) == 0
        });
        let mut runs: Vec<HostRun> = Vec::new();
        for cluster in freed {
            match runs.last_mut() {
                Some(last) if last.end().0 == cluster => last.count += 1,
                _ => runs.push(HostRun::one(HostCluster(cluster))),
            }
        }
        self.actions.extend(runs.into_iter().map(Action::Punch));
        self.actions.push_back(Action::Cut { clusters: self.end });
    }
}

/// The first cluster behind all clusters that have a reference.
fn first_behind(walk: &Walk) -> u64 {
    let used = walk.references.touched(&walk.references).filter(|cluster| walk.references.get(*cluster) > 0);
    used.last().map_or(1, |last| last + 1)
}

/// Writes a new snapshot table past the end of the file, if one is needed. It has the readable entries of the old
/// one, with the sizes that version 3 demands. Returns the change of the header that names it.
fn new_snapshot_table(walk: &mut Walk, actions: &mut VecDeque<Action>, end: &mut u64) -> Option<Action> {
    if walk.report.snapshots_incomplete + walk.report.snapshots_lost == 0 {
        return None;
    }
    let mut snapshots = std::mem::take(&mut walk.snapshots);
    if walk.header.version == Version::V3 {
        snapshots.iter_mut().for_each(|snapshot| snapshot.complete(walk.header.size));
    }
    if snapshots.is_empty() {
        return Some(header(patch_snapshots(0, HostOffset(0))));
    }
    let size = walk.geometry.cluster_size();
    let mut bytes = qcow2::snapshot::encode_table(&snapshots);
    bytes.resize(bytes.len().next_multiple_of(size as usize), 0);
    let first = walk.clusters.max(*end);
    let count = bytes.len() as u64 / size;
    *end = first + count;
    walk.references.grow(*end);
    (first..*end).for_each(|cluster| walk.references.add(HostCluster(cluster), 1));
    actions.push_back(Action::Bytes { offset: first * size, bytes });
    actions.push_back(Action::Sync);
    // At most as many snapshots as before, so the number fits.
    Some(header(patch_snapshots(snapshots.len() as u32, HostOffset(first * size))))
}

/// Clears the unknown autoclear bits before anything else is written, as every open for writing does.
fn keep_known_autoclear(actions: &mut VecDeque<Action>, walk: &Walk) {
    let kept = walk.header.autoclear_kept(walk.header.bitmaps().is_some());
    if kept != walk.header.autoclear {
        actions.push_front(Action::Sync);
        actions.push_front(header(patch_autoclear(kept)));
    }
}

/// Changes the counts to those that the repair of leaks alone gives.
fn lower(walk: &mut Walk) {
    for cluster in walk.references.touched(&walk.recorded) {
        let (recorded, references) = (walk.recorded.get(cluster), walk.references.get(cluster));
        if recorded < references {
            walk.references.set(HostCluster(cluster), recorded);
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

/// Writes a new refcount structure past the end of the file, then names it in the header. The clusters of the old one
/// become free.
fn anew(
    walk: &mut Walk,
    end: &mut u64,
    known: &mut BTreeMap<u64, u64>,
) -> Result<VecDeque<Action>, NotRepairable> {
    for place in &walk.refcount_places {
        for cluster in place.run.clusters() {
            walk.references.subtract(HostCluster(cluster), 1);
        }
    }
    let (geometry, size) = (walk.geometry, walk.geometry.cluster_size());
    // A table that ends at the end of the file may own the cluster after the last.
    let start = walk.clusters.max(*end);
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
    *end = start + table_clusters + blocks.len() as u64;
    walk.references.grow(*end);
    for cluster in start..*end {
        walk.references.add(HostCluster(cluster), 1);
    }
    let mut table = vec![0; (table_clusters * size) as usize];
    let mut actions = VecDeque::new();
    known.clear();
    for (n, index) in blocks.iter().enumerate() {
        let offset = (start + table_clusters + n as u64) * size;
        let raw = encode_refblock_offset(HostOffset(offset), &geometry);
        qcow2::set_entry(&mut table, *index as usize, raw);
        actions.push_back(Action::Refblock { index: *index, offset });
        known.insert(*index, offset);
    }
    actions.push_back(Action::Bytes { offset: start * size, bytes: table });
    actions.push_back(Action::Sync);
    // At most 8 MiB of clusters, so it fits.
    actions.push_back(header(patch_refcount_table(HostOffset(start * size), table_clusters as u32)));
    actions.push_back(Action::Sync);
    Ok(actions)
}

/// Clears entries before the refcounts of the clusters that they name are lowered.
fn clear(walk: &mut Walk) -> Vec<Action> {
    let clearings = std::mem::take(&mut walk.clearings);
    let offsets: BTreeSet<u64> = clearings.iter().map(|clearing| clearing.offset).collect();
    walk.flag_fixes.retain(|fix| !offsets.contains(&fix.offset));
    for Clearing { host, times, .. } in &clearings {
        if let Some(host) = host {
            walk.references.subtract(HostCluster(*host), *times);
        }
    }
    let mut actions: Vec<Action> =
        offsets.into_iter().map(|offset| Action::Flag(FlagFix { offset, raw: 0 })).collect();
    if !actions.is_empty() {
        actions.push(Action::Sync);
    }
    actions
}

/// Corrects flags. This comes after the refcounts.
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
    // A single change of the header cannot be half done.
    let in_header = |action: &Action| match action {
        Action::Bytes { offset, .. } => *offset < HEADER_LENGTH_V3.into(),
        _ => matches!(action, Action::Sync),
    };
    if !actions.iter().all(in_header) && !marked.contains(Incompatible::DIRTY) {
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
