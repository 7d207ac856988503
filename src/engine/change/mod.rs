//! Changes of an image that no process uses: internal snapshots are created, applied and deleted, and the disk is
//! resized. Also finds the parts of an image file that belong to snapshots, for programs that write to the file.
//!
//! A [`Planner`] does no I/O. As in a check, [`Planner::step`] returns what to read, and [`Planner::feed`] takes the
//! bytes. [`Planner::plan`] refuses an impossible change before anything is written. The [`Plan`] gives the writes and
//! their order (docs/durability.md, "Changes of an image that nobody uses"). The checker's own walk reads the tables,
//! but only those of the active disk and of the one snapshot concerned. The memory is a few bytes for each cluster in
//! use and for each L2 table.

mod draft;
mod growth;
mod pieces;
mod places;
mod plan;
mod refusal;
mod resize;
mod step;

pub(crate) use places::L2Tables;
pub use places::SnapshotPlaces;
pub use plan::Plan;
pub use refusal::ChangeRefusal;
pub use resize::Resize;
pub use step::PlanStep;

use qcow2::header::{L1_TABLE_SIZE_MAX, SNAPSHOTS_MAX};
use qcow2::snapshot::TABLE_LENGTH_MAX;
use qcow2::{Geometry, Header, HostCluster, HostOffset, HostRange, Incompatible, Snapshot, SnapshotTable};

use crate::check::ImagePart;
use crate::check::Step;
use crate::check::sweep::Sweep;
use crate::check::walk::{L2Use, Walk};

use self::resize::Cut;

/// The longest name in bytes, as in QEMU.
pub const NAME_LENGTH_MAX: usize = 255;

/// A change of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Create, apply or delete a snapshot.
    Snapshot(SnapshotChange),
    /// Resize the disk. Data past the new end is lost; the new part reads as zero.
    Resize(Resize),
}

/// A change of the snapshots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SnapshotChange {
    /// Preserve the present state of the disk under a name.
    Create {
        /// The name.
        name: String,
        /// The present time in seconds since 1970.
        seconds: u32,
        /// The nanoseconds of the present time.
        nanoseconds: u32,
    },
    /// Return the disk to the state of a snapshot.
    Apply {
        /// The snapshot's ID, or its name.
        wanted: String,
    },
    /// Delete a snapshot.
    Delete {
        /// The snapshot's ID, or its name.
        wanted: String,
    },
}

/// A tree of tables: an L1 table, the L2 tables that it names, and the clusters that these name.
struct Tree {
    walk: Walk,
    part: ImagePart,
    times: L2Use,
    /// Entries of the L1 table as on disk.
    l1: Vec<u64>,
    /// The number of entries that belong to the tree.
    entries: u64,
    l1_offset: HostOffset,
}

impl Tree {
    fn new(header: &Header, file_length: u64, part: ImagePart, times: L2Use) -> Result<Self, ChangeRefusal> {
        let walk = Walk::new(header, file_length)?;
        Ok(Tree { walk, part, times, l1: Vec::new(), entries: 0, l1_offset: HostOffset(0) })
    }

    fn l1_sweep(&self) -> Sweep<()> {
        let mut sweep = Sweep::default();
        sweep.push(HostRange::new(self.l1_offset, self.entries * 8), self.walk.file_length, ());
        sweep
    }

    fn take_l1(&mut self, offset: HostOffset, bytes: &[u8]) {
        self.l1.extend(bytes.as_chunks::<8>().0.iter().map(|word| u64::from_be_bytes(*word)));
        self.walk.l1(offset, bytes, self.part, self.times);
    }
}

/// The structure that is being read.
enum Phase {
    RefcountTable(Sweep<()>),
    Refblocks(Sweep<u64>),
    Table(SnapshotTable),
    ActiveL1(Sweep<()>),
    TargetL1(Sweep<()>),
    ActiveL2(Sweep<L2Use>),
    TargetL2(Sweep<L2Use>),
    Done,
}

/// Reads the metadata that a plan needs.
pub struct Planner {
    change: Change,
    header: Header,
    geometry: Geometry,
    /// The refcounts in the image. The references are those of all metadata but L2 tables.
    base: Walk,
    /// The active disk.
    active: Tree,
    /// The snapshot that is applied or deleted. For a resize: the part of the active disk past its new end.
    target: Tree,
    /// Where a resize cuts the active disk in two.
    cut: Cut,
    snapshots: Vec<Snapshot>,
    table_length: u64,
    /// The index of the snapshot concerned; a new one is the last.
    index: usize,
    phase: Phase,
    refusal: Option<ChangeRefusal>,
}

impl Planner {
    /// Starts a change of the image with this header in a file of this length in bytes. The header is not marked dirty.
    ///
    /// # Errors
    /// If the header alone shows that the change is impossible.
    pub fn new(header: &Header, file_length: u64, change: Change) -> Result<Self, ChangeRefusal> {
        match &change {
            Change::Resize(resize) => resize.examine(header)?,
            _ if header.incompatible.contains(Incompatible::DATA_FILE) => {
                return Err(ChangeRefusal::DataFile);
            }
            _ => {}
        }
        let base = Walk::new(header, file_length)?;
        let once = L2Use { active: 1, snapshots: 0 };
        let active = Tree::new(header, file_length, ImagePart::ActiveL1, once)?;
        let once = L2Use { active: 0, snapshots: 1 };
        let target = Tree::new(header, file_length, ImagePart::SnapshotL1, once)?;
        let phase = Phase::RefcountTable(base.refcount_table_sweep());
        Ok(Planner {
            change,
            header: header.clone(),
            geometry: header.geometry(),
            base,
            active,
            target,
            cut: Cut::default(),
            snapshots: Vec::new(),
            table_length: 0,
            index: 0,
            phase,
            refusal: None,
        })
    }

    /// The next step, as for a check. A second call without [`Planner::feed`] gives the same step.
    pub fn step(&mut self) -> Step {
        loop {
            let wanted = match &mut self.phase {
                _ if self.refusal.is_some() => return Step::Done,
                Phase::RefcountTable(sweep) | Phase::ActiveL1(sweep) | Phase::TargetL1(sweep) => sweep.next(),
                Phase::Refblocks(sweep) => sweep.next(),
                Phase::ActiveL2(sweep) | Phase::TargetL2(sweep) => sweep.next(),
                Phase::Table(table) => table.next_piece(),
                Phase::Done => return Step::Done,
            };
            if let Some(HostRange { offset, length }) = wanted {
                return Step::Read { offset, length: length as usize };
            }
            if let Err(refusal) = self.advance() {
                self.refusal = Some(refusal);
            }
        }
    }

    /// The next pieces that [`Planner::step`] will return, at most `most` of them, as far as they are known.
    pub fn ahead(&self, most: usize) -> Vec<HostRange> {
        match &self.phase {
            Phase::RefcountTable(sweep) | Phase::ActiveL1(sweep) | Phase::TargetL1(sweep) => {
                sweep.ahead(most)
            }
            Phase::Refblocks(sweep) => sweep.ahead(most),
            Phase::ActiveL2(sweep) | Phase::TargetL2(sweep) => sweep.ahead(most),
            Phase::Table(_) | Phase::Done => Vec::new(),
        }
    }

    /// Takes all the bytes that [`Planner::step`] requested.
    pub fn feed(&mut self, bytes: &[u8]) {
        let (base, active, target) = (&mut self.base, &mut self.active, &mut self.target);
        match &mut self.phase {
            Phase::RefcountTable(sweep) => {
                sweep.feed(bytes, |piece, bytes| base.refcount_table(piece.offset, piece.within / 8, bytes));
            }
            Phase::Refblocks(sweep) => {
                sweep.feed(bytes, |piece, bytes| base.refblock(HostCluster(*piece.tag), piece.within, bytes));
            }
            Phase::Table(table) => table.feed(bytes, |entry| {
                base.snapshot(&entry);
                self.snapshots.push(entry.snapshot);
            }),
            Phase::ActiveL1(sweep) => sweep.feed(bytes, |piece, bytes| active.take_l1(piece.offset, bytes)),
            Phase::TargetL1(sweep) => sweep.feed(bytes, |piece, bytes| target.take_l1(piece.offset, bytes)),
            Phase::ActiveL2(sweep) => {
                let (cut, geometry) = (&mut self.cut, self.geometry);
                sweep.feed(bytes, |piece, bytes| {
                    let (stays, goes) = cut.split(&geometry, piece.offset, piece.within, bytes);
                    active.walk.l2(piece.offset, piece.within, stays, *piece.tag);
                    if !goes.is_empty() {
                        let within = piece.within + stays.len() as u64;
                        let offset = HostOffset(piece.offset.0 + stays.len() as u64);
                        target.walk.l2(offset, within, goes, *piece.tag);
                    }
                });
            }
            Phase::TargetL2(sweep) => {
                sweep.feed(bytes, |piece, bytes| {
                    target.walk.l2(piece.offset, piece.within, bytes, *piece.tag);
                });
            }
            Phase::Done => {}
        }
    }

    fn advance(&mut self) -> Result<(), ChangeRefusal> {
        self.phase = match &self.phase {
            Phase::RefcountTable(_) => Phase::Refblocks(self.base.refblock_sweep()),
            Phase::Refblocks(_) => Phase::Table(self.base.snapshot_walk()),
            Phase::Table(table) => {
                if table.is_broken() {
                    let (index, offset) = table.place();
                    return Err(ChangeRefusal::BadTable { index, offset });
                }
                self.table_length = table.length();
                self.base.snapshot_table_length = self.table_length;
                self.base.count_fixed_places();
                self.base.count_refcount_structure();
                self.resolve()?;
                Phase::ActiveL1(self.active.l1_sweep())
            }
            Phase::ActiveL1(_) => {
                self.cut.find_table(&self.active.l1, &self.geometry);
                Phase::TargetL1(self.target.l1_sweep())
            }
            Phase::TargetL1(_) => Phase::ActiveL2(self.active.walk.l2_sweep()),
            Phase::ActiveL2(_) => Phase::TargetL2(self.target.walk.l2_sweep()),
            Phase::TargetL2(_) | Phase::Done => Phase::Done,
        };
        Ok(())
    }

    /// Finds the snapshot or the cut that the change is about.
    fn resolve(&mut self) -> Result<(), ChangeRefusal> {
        self.active.l1_offset = self.header.l1_offset;
        self.active.entries = self.header.l1_entries.into();
        match &self.change {
            Change::Snapshot(SnapshotChange::Create { name, seconds, nanoseconds }) => {
                let (seconds, nanoseconds) = (*seconds, *nanoseconds);
                let snapshot = Snapshot { seconds, nanoseconds, ..self.new_snapshot(name)? };
                // Data past the end of the disk is a VM state, if anything. The new snapshot shares it, as in QEMU.
                self.index = self.snapshots.len();
                self.snapshots.push(snapshot);
            }
            Change::Snapshot(SnapshotChange::Apply { wanted }) => {
                self.index = self.find(wanted)?;
                let snapshot = &self.snapshots[self.index];
                let size = snapshot.disk_size().unwrap_or(self.geometry.size);
                let needed = Geometry { size, ..self.geometry }.l1_entries();
                let entries = u64::from(snapshot.l1_entries);
                self.examine_length(entries)?;
                if entries < needed || needed > L1_TABLE_SIZE_MAX / 8 {
                    return Err(ChangeRefusal::TooFewL1Entries { entries, needed });
                }
                if let Some(bitmaps) = self.header.bitmaps().filter(|_| size != self.geometry.size) {
                    return Err(ChangeRefusal::ResizeWithBitmaps { count: bitmaps.count });
                }
                // The VM state past the disk is included.
                (self.target.l1_offset, self.target.entries) = (snapshot.l1_offset, entries);
            }
            Change::Snapshot(SnapshotChange::Delete { wanted }) => {
                self.index = self.find(wanted)?;
                let snapshot = &self.snapshots[self.index];
                let other = |(index, other): (usize, &Snapshot)| {
                    index != self.index && other.name == wanted.as_bytes() && snapshot.id == wanted.as_bytes()
                };
                self.examine_length(snapshot.l1_entries.into())?;
                if self.snapshots.iter().enumerate().any(other) {
                    return Err(ChangeRefusal::Ambiguous { wanted: wanted.clone() });
                }
                (self.target.l1_offset, self.target.entries) =
                    (snapshot.l1_offset, snapshot.l1_entries.into());
            }
            Change::Resize(resize) => {
                resize.examine_snapshots(&self.snapshots)?;
                self.cut = resize.cut(&self.geometry);
                // The rest of the table maps data past the new end, and also data past the old end.
                let entries = self.active.entries;
                self.active.entries = entries.min(self.cut.tables(&self.geometry));
                let rest = self.header.l1_offset.0 + self.active.entries * 8;
                (self.target.l1_offset, self.target.entries) =
                    (HostOffset(rest), entries - self.active.entries);
            }
        }
        Ok(())
    }

    /// Refuses an L1 table longer than the format allows, before it is read.
    fn examine_length(&self, entries: u64) -> Result<(), ChangeRefusal> {
        if entries > L1_TABLE_SIZE_MAX / 8 { examine_findings(&self.base) } else { Ok(()) }
    }

    fn new_snapshot(&self, name: &str) -> Result<Snapshot, ChangeRefusal> {
        if name.is_empty() || name.len() > NAME_LENGTH_MAX {
            return Err(ChangeRefusal::NameLength { length: name.len(), max: NAME_LENGTH_MAX });
        }
        // The name alone could not tell the two snapshots apart.
        if qcow2::snapshot::find(&self.snapshots, name.as_bytes()).is_some() {
            return Err(ChangeRefusal::Exists { name: name.to_owned() });
        }
        let id = qcow2::snapshot::next_id(&self.snapshots);
        let snapshot = Snapshot::new(id, name.as_bytes().to_vec(), self.geometry.size);
        let length = self.table_length + snapshot.encoded_length() as u64;
        if self.snapshots.len() as u64 >= u64::from(SNAPSHOTS_MAX) || length > TABLE_LENGTH_MAX {
            return Err(ChangeRefusal::TableFull);
        }
        Ok(snapshot)
    }

    fn find(&self, wanted: &str) -> Result<usize, ChangeRefusal> {
        let found = qcow2::snapshot::find(&self.snapshots, wanted.as_bytes());
        found.ok_or_else(|| ChangeRefusal::NotFound { wanted: wanted.to_owned() })
    }

    /// Makes the plan. Nothing has been written so far.
    ///
    /// # Errors
    /// If the change is impossible.
    ///
    /// # Panics
    /// If there is more to read: a programmer error.
    pub fn plan(self) -> Result<Plan, ChangeRefusal> {
        if let Some(refusal) = self.refusal {
            return Err(refusal);
        }
        assert!(matches!(self.phase, Phase::Done), "all has been read");
        self.examine()?;
        Plan::new(self)
    }

    /// Refuses an image whose tables or refcounts are wrong where this change relies on them. Clusters in use must not
    /// be given away.
    fn examine(&self) -> Result<(), ChangeRefusal> {
        let (base, active, target) = (&self.base, &self.active.walk, &self.target.walk);
        [base, active, target].into_iter().try_for_each(examine_findings)?;
        let size = self.geometry.cluster_size();
        let damaged = |cluster: u64| ChangeRefusal::Overlap { offset: HostOffset(cluster * size) };
        let too_low = |cluster: u64| ChangeRefusal::RefcountTooLow { offset: HostOffset(cluster * size) };
        for place in base.places.iter().chain(&base.refcount_places) {
            for cluster in place.run.clusters() {
                if base.references.get(cluster) != 1 {
                    return Err(damaged(cluster));
                }
                if base.recorded.get(cluster) == 0 {
                    return Err(too_low(cluster));
                }
            }
        }
        for (walk, other) in [(active, target), (target, active)] {
            for (cluster, times) in &walk.l2 {
                let shared = other.references.get(*cluster) > 0;
                let is_table = walk.references.get(*cluster) == 1 && times.all() == 1;
                if !is_table || (shared && !other.l2.contains_key(cluster)) {
                    return Err(damaged(*cluster));
                }
            }
        }
        for cluster in active.references.touched(&target.references) {
            let references = active.references.get(cluster).saturating_add(target.references.get(cluster));
            if references > 0 && base.references.get(cluster) > 0 {
                return Err(damaged(cluster));
            }
            if references > base.recorded.get(cluster) {
                return Err(too_low(cluster));
            }
        }
        Ok(())
    }
}

/// Refuses an image if a walk found something wrong.
fn examine_findings(walk: &Walk) -> Result<(), ChangeRefusal> {
    match walk.report.findings.iter().find(|finding| !finding.kind.is_leak()) {
        Some(finding) => Err(ChangeRefusal::Damaged(Box::new(*finding))),
        None => Ok(()),
    }
}
