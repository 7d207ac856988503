//! The read-only check. It counts every reference to every cluster and compares the counts with the refcounts of the
//! image.
//!
//! A [`Checker`] does no I/O. [`Checker::step`] returns what to read, and [`Checker::feed`] takes the bytes. The result
//! is a [`Checked`]: a [`Report`], and the means to plan a [`Repair`]. The costs do not depend on what the image
//! claims. The clusters of the file bound the memory: two counts of two bytes per cluster, and what the tables really
//! hold. Each byte of the file is read a few times at most, however often entries name it.
//!
//! The verdict is "clean", "leaks" or "corrupt" where that of `qemu-img check` is, with one exception. Metadata that
//! overlaps something else is corrupt even if the refcounts agree with the overlap. Metadata is written in place
//! whatever its refcount is. So the next change of a mapping would change guest data, or a guest write would change the
//! mapping. (And `qemu-img check -r all` creates such refcounts.) Where QEMU stops because it cannot read a structure,
//! the verdict is "corrupt" too.
//!
//! If an image has an external data file, its metadata is checked. The data in the other file has no refcounts.

mod compare;
pub(crate) mod counts;
mod refusal;
mod repair;
mod report;
pub(crate) mod sweep;
#[cfg(all(test, not(loom)))]
mod tests;
pub(crate) mod walk;

pub use refusal::{NotRepairable, RepairKind};
pub use repair::Repair;
pub use report::{FINDINGS_OF_KIND_MAX, Finding, FindingKind, ImagePart, Refusal, Report, Tally, Verdict};

use qcow2::{BitmapDirectory, Header, HostCluster, HostOffset, HostRange, Salvaged, SnapshotTable};

use self::report::FindingKind::{BadBitmap, BadSnapshot};
use self::sweep::Sweep;
use self::walk::{L2Use, Walk};

/// The most bytes that a check reads at a time.
pub const READ_MAX: u64 = 1 << 20;
/// The most clusters of a file that can be checked (QEMU has the same bound).
pub const CLUSTERS_MAX: u64 = 1 << 31;

/// The next step of a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Read these bytes of the file, at most [`READ_MAX`] of them. Up to seven may be past the end of the file; they
    /// count as zeros.
    Read {
        /// The offset, a multiple of 8.
        offset: HostOffset,
        /// The number of bytes, a multiple of 8 unless the file ends there.
        length: usize,
    },
    /// Nothing is left: [`Checker::finish`] gives the result.
    Done,
}

/// The progress of a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// The structure that is being read.
    pub part: ImagePart,
    /// Bytes of it that have been read.
    pub done: u64,
    /// Bytes of it to read in all, as far as is known.
    pub total: u64,
}

/// A check in progress.
pub struct Checker {
    walk: Walk,
    phase: Phase,
}

/// The result of a check, with all that a repair needs to know.
pub struct Checked {
    walk: Walk,
}

/// The structure that is being read. The refcounts come first, so that flags can be compared with them. The flags come
/// last, when their right values are known.
enum Phase {
    RefcountTable(Sweep<()>),
    /// Each with the first cluster that it counts.
    Refblocks(Sweep<u64>),
    Snapshots(SnapshotTable),
    /// None if there are no bitmaps.
    Bitmaps(Option<BitmapDirectory>),
    /// Each piece with the number of bitmaps that share it.
    BitmapTables(Sweep<u64>),
    ActiveL1(Sweep<()>),
    /// Each piece with the number of snapshots that share it.
    SnapshotL1(Sweep<u64>),
    L2(Sweep<L2Use>),
    FlagsInL1(Sweep<()>),
    FlagsInL2(Sweep<()>),
    Done,
}

impl Checker {
    /// Starts a check of the image with this header in a file of this length in bytes.
    ///
    /// # Errors
    /// If the image has a feature that cannot be checked yet.
    pub fn new(header: &Header, file_length: u64) -> Result<Self, Refusal> {
        let mut walk = Walk::new(header, file_length)?;
        if let Some(source) = header.damaged_extensions {
            walk.report.add(source.offset.0, FindingKind::BadHeader { source });
        }
        let phase = Phase::RefcountTable(walk.refcount_table_sweep());
        Ok(Checker { walk, phase })
    }

    /// Starts a check of an image whose header may give an invalid offset for the refcount table or the snapshot table.
    ///
    /// # Errors
    /// As for [`Checker::new`].
    pub fn of_salvaged(salvaged: &Salvaged, file_length: u64) -> Result<Self, Refusal> {
        let mut checker = Self::new(&salvaged.header, file_length)?;
        for source in [salvaged.refcount_table, salvaged.snapshots].into_iter().flatten() {
            checker.walk.report.add(source.offset.0, FindingKind::BadHeader { source });
        }
        Ok(checker)
    }

    /// The next step. A second call without [`Checker::feed`] gives the same step.
    pub fn step(&mut self) -> Step {
        loop {
            let wanted = match &mut self.phase {
                Phase::RefcountTable(sweep)
                | Phase::ActiveL1(sweep)
                | Phase::FlagsInL1(sweep)
                | Phase::FlagsInL2(sweep) => sweep.next(),
                Phase::Refblocks(sweep) | Phase::SnapshotL1(sweep) | Phase::BitmapTables(sweep) => {
                    sweep.next()
                }
                Phase::L2(sweep) => sweep.next(),
                Phase::Snapshots(table) => table.next_piece(),
                Phase::Bitmaps(None) => None,
                Phase::Bitmaps(Some(directory)) => directory.next_piece(),
                Phase::Done => return Step::Done,
            };
            if let Some(HostRange { offset, length }) = wanted {
                return Step::Read { offset, length: length as usize };
            }
            self.advance();
        }
    }

    /// Takes all the bytes that [`Checker::step`] requested.
    ///
    /// # Panics
    /// If the number of bytes is not the requested one: a programmer error.
    pub fn feed(&mut self, bytes: &[u8]) {
        match self.step() {
            Step::Read { length, .. } => assert_eq!(bytes.len(), length, "as many bytes as asked for"),
            Step::Done => panic!("nothing was asked for"),
        }
        let walk = &mut self.walk;
        match &mut self.phase {
            Phase::RefcountTable(sweep) => sweep.feed(bytes, |piece, bytes| {
                walk.refcount_table(piece.offset, piece.within / 8, bytes);
            }),
            Phase::Refblocks(sweep) => {
                sweep.feed(bytes, |piece, bytes| walk.refblock(HostCluster(*piece.tag), piece.within, bytes));
            }
            Phase::Snapshots(table) => table.feed(bytes, |entry| {
                walk.snapshot(&entry);
                walk.snapshots.push(entry.snapshot);
            }),
            Phase::Bitmaps(directory) => {
                if let Some(directory) = directory {
                    directory.feed(bytes, |bitmap| walk.bitmap(&bitmap));
                }
            }
            Phase::BitmapTables(sweep) => {
                sweep.feed(bytes, |piece, bytes| walk.bitmap_table(piece.offset, bytes, *piece.tag));
            }
            Phase::ActiveL1(sweep) => {
                let once = L2Use { active: 1, snapshots: 0 };
                sweep.feed(bytes, |piece, bytes| walk.l1(piece.offset, bytes, ImagePart::ActiveL1, once));
            }
            Phase::SnapshotL1(sweep) => sweep.feed(bytes, |piece, bytes| {
                let times = L2Use { active: 0, snapshots: *piece.tag };
                walk.l1(piece.offset, bytes, ImagePart::SnapshotL1, times);
            }),
            Phase::L2(sweep) => {
                sweep.feed(bytes, |piece, bytes| walk.l2(piece.offset, piece.within, bytes, *piece.tag));
            }
            Phase::FlagsInL1(sweep) => {
                sweep.feed(bytes, |piece, bytes| walk.flags_in_l1(piece.offset, bytes));
            }
            Phase::FlagsInL2(sweep) => {
                sweep.feed(bytes, |piece, bytes| walk.flags_in_l2(piece.offset, bytes));
            }
            Phase::Done => {}
        }
    }

    /// Begins the next phase, after the present one has read everything.
    fn advance(&mut self) {
        let walk = &mut self.walk;
        self.phase = match &self.phase {
            Phase::RefcountTable(_) => Phase::Refblocks(walk.refblock_sweep()),
            Phase::Refblocks(_) => Phase::Snapshots(walk.snapshot_walk()),
            Phase::Snapshots(table) => {
                if table.is_broken() {
                    let (index, offset) = table.place();
                    walk.report.add(offset.0, BadSnapshot { index });
                }
                walk.snapshot_table_length = table.length();
                let (geometry, length) = (walk.geometry, walk.file_length);
                let bitmaps = walk.header.bitmaps();
                Phase::Bitmaps(bitmaps.map(|bitmaps| BitmapDirectory::new(&bitmaps, geometry, length)))
            }
            Phase::Bitmaps(directory) => {
                if let Some(directory) = directory.as_ref().filter(|directory| directory.is_broken()) {
                    let (index, offset) = directory.place();
                    walk.report.add(offset.0, BadBitmap { index });
                }
                walk.count_fixed_places();
                Phase::BitmapTables(walk.bitmap_table_sweep())
            }
            Phase::BitmapTables(_) => Phase::ActiveL1(walk.active_l1_sweep()),
            Phase::ActiveL1(_) => Phase::SnapshotL1(walk.snapshot_l1_sweep()),
            Phase::SnapshotL1(_) => Phase::L2(walk.l2_sweep()),
            Phase::L2(_) => {
                walk.find_overlaps();
                Phase::FlagsInL1(walk.active_l1_sweep())
            }
            Phase::FlagsInL1(_) => Phase::FlagsInL2(walk.active_l2_sweep()),
            Phase::FlagsInL2(_) | Phase::Done => {
                walk.count_refcount_structure();
                walk.compare();
                Phase::Done
            }
        };
    }

    /// The progress.
    pub fn progress(&self) -> Progress {
        let not_counted = |part| Progress { part, done: 0, total: 0 };
        match &self.phase {
            Phase::RefcountTable(sweep) => sweep.progress(ImagePart::RefcountTable),
            Phase::Refblocks(sweep) => sweep.progress(ImagePart::Refblock),
            Phase::Snapshots(_) => not_counted(ImagePart::SnapshotTable),
            Phase::Bitmaps(_) => not_counted(ImagePart::BitmapDirectory),
            Phase::BitmapTables(sweep) => sweep.progress(ImagePart::BitmapTable),
            Phase::ActiveL1(sweep) | Phase::FlagsInL1(sweep) => sweep.progress(ImagePart::ActiveL1),
            Phase::SnapshotL1(sweep) => sweep.progress(ImagePart::SnapshotL1),
            Phase::L2(sweep) => sweep.progress(ImagePart::L2),
            Phase::FlagsInL2(sweep) => sweep.progress(ImagePart::L2),
            Phase::Done => not_counted(ImagePart::L2),
        }
    }

    /// Approximate bytes of memory held, for tests of the bound.
    pub fn held_bytes(&self) -> usize {
        let phase = match &self.phase {
            Phase::RefcountTable(sweep)
            | Phase::ActiveL1(sweep)
            | Phase::FlagsInL1(sweep)
            | Phase::FlagsInL2(sweep) => sweep.held_bytes(),
            Phase::Refblocks(sweep) | Phase::SnapshotL1(sweep) | Phase::BitmapTables(sweep) => {
                sweep.held_bytes()
            }
            Phase::L2(sweep) => sweep.held_bytes(),
            Phase::Snapshots(_) | Phase::Bitmaps(_) | Phase::Done => 0,
        };
        phase + self.walk.held_bytes()
    }

    /// The result.
    ///
    /// # Panics
    /// If the check is not done: a programmer error.
    pub fn finish(self) -> Checked {
        assert!(matches!(self.phase, Phase::Done), "the check is done");
        Checked { walk: self.walk }
    }
}

impl Checked {
    /// The report.
    pub fn report(&self) -> &Report {
        &self.walk.report
    }

    /// Drops everything but the report.
    pub fn into_report(self) -> Report {
        self.walk.report
    }
}
