//! Images with wrong entries or refcounts, so that data and metadata claim the same location. No request of the guest
//! may write data over metadata (docs/durability.md, "The guard").

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use qcow2::entry::{COPIED, OFFSET_MASK};
use qcow2::{Header, Incompatible};

use super::examine::panic_text;
use super::journal::Op;
use super::rig::Rig;
use super::shape::{Shape, Start, TOP};
use super::stamp::{SECTOR, Value, read_stamp};

/// Metadata that a wrong entry may refer to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The active L1 table.
    L1,
    /// The L2 table that the entry is in.
    L2,
    /// The refcount table.
    RefcountTable,
    /// The refblock.
    Refblock,
}

/// The damage of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lie {
    /// The entry of sector 1 refers to metadata, with the COPIED flag set.
    Names(Part),
    /// The entries of sectors 0 and 1 refer to the same cluster, both with the COPIED flag set.
    Twice,
    /// The cluster of sector 0 has a refcount of 0.
    CountsAsFree,
}

impl Lie {
    /// All of them.
    pub const ALL: [Lie; 6] = [
        Lie::Names(Part::L1),
        Lie::Names(Part::L2),
        Lie::Names(Part::RefcountTable),
        Lie::Names(Part::Refblock),
        Lie::Twice,
        Lie::CountsAsFree,
    ];

    /// Operations with which the damage does harm, unless it is prevented.
    fn script(self) -> Vec<Op> {
        // Brings both entries into the map.
        let mut ops = vec![Op::Read { sector: 0, count: 2 }];
        // The first write that needs a new table. A cluster that is free, or becomes free, would be allocated for it.
        let far = Op::write(64, 2);
        match self {
            Lie::Names(_) => ops.extend([Op::write(1, 1), Op::Discard { sector: 1, count: 1 }, far]),
            Lie::Twice => {
                ops.extend([Op::Discard { sector: 0, count: 1 }, Op::Flush, Op::Pause(12_000)]);
                ops.extend([far, Op::Flush, Op::write(1, 1)]);
            }
            Lie::CountsAsFree => ops.extend([far, Op::Flush, Op::write(0, 1)]),
        }
        ops.push(Op::Flush);
        ops
    }

    /// True if the damage is detected and the image is marked corrupt.
    fn is_noticed(self) -> bool {
        self != Lie::Twice
    }
}

/// An image's bytes and the locations of its metadata.
struct Anatomy {
    bytes: Vec<u8>,
    cluster: usize,
    l1: usize,
    l2: Vec<usize>,
    table: usize,
    blocks: Vec<usize>,
}

impl Anatomy {
    fn of(bytes: Vec<u8>) -> Anatomy {
        let header = header(&bytes);
        let cluster = header.geometry().cluster_size() as usize;
        let (l1, table) = (header.l1_offset.0 as usize, header.refcount_table_offset.0 as usize);
        let named = |at: usize, entries: usize| -> Vec<usize> {
            let entry = |index| (qcow2::entry(&bytes[at..], index) & OFFSET_MASK) as usize;
            (0..entries).map(entry).filter(|offset| *offset != 0).collect()
        };
        let l2 = named(l1, header.l1_entries as usize);
        let blocks = named(table, cluster / 8);
        Anatomy { bytes, cluster, l1, l2, table, blocks }
    }

    fn offset(&self, part: Part) -> usize {
        match part {
            Part::L1 => self.l1,
            Part::L2 => self.l2[0],
            Part::RefcountTable => self.table,
            Part::Refblock => self.blocks[0],
        }
    }

    /// The locations of the metadata.
    fn places(&self) -> BTreeSet<usize> {
        let fixed = [0, self.l1, self.table].into_iter();
        fixed.chain(self.l2.iter().copied()).chain(self.blocks.iter().copied()).collect()
    }

    /// A cluster of these that holds data of the guest.
    fn written_by_guest(&self, places: &BTreeSet<usize>) -> Option<usize> {
        let is_data = |at: &&usize| {
            self.bytes[**at..**at + self.cluster]
                .chunks_exact(SECTOR as usize)
                .any(|sector| matches!(read_stamp(0, sector), Value::Write(_) | Value::Foreign { .. }))
        };
        places.iter().find(is_data).copied()
    }
}

fn header(bytes: &[u8]) -> Header {
    let area = Header::cluster_size_hint(bytes).expect("a header") as usize;
    Header::parse(&bytes[..area], bytes.len() as u64).expect("a header")
}

/// An image with some data and this damage.
fn damaged(lie: Lie) -> Start {
    let empty = Shape::new(9, 200).make();
    let rig = Rig::open(&empty, 1).expect("it opens");
    let written = rig.play_alone(&[Op::write(0, 8), Op::Flush]);
    let values = written.settled_values();
    let image = written.world.image();
    let mut anatomy = Anatomy::of(image.file(Path::new(TOP)).expect("the image").to_bytes());
    let l2 = anatomy.l2[0];
    let first = qcow2::entry(&anatomy.bytes[l2..], 0);
    match lie {
        Lie::Names(part) => {
            let raw = anatomy.offset(part) as u64 | COPIED;
            qcow2::set_entry(&mut anatomy.bytes[l2..], 1, raw);
        }
        Lie::Twice => qcow2::set_entry(&mut anatomy.bytes[l2..], 1, first),
        Lie::CountsAsFree => {
            let (block, cluster) = (anatomy.blocks[0], (first & OFFSET_MASK) as usize / anatomy.cluster);
            qcow2::set_refcount(4, &mut anatomy.bytes[block..block + 512], cluster, 0);
        }
    }
    Start { image: image.with(Path::new(TOP), 0, &anatomy.bytes), values, ..empty }
}

/// Plays the script of a damage.
///
/// # Errors
/// If data lies where metadata was or is, or if detectable damage was not detected.
pub fn try_one(lie: Lie) -> Result<(), String> {
    let start = damaged(lie);
    let before = Anatomy::of(start.image.file(Path::new(TOP)).expect("the image").to_bytes());
    let run = catch_unwind(AssertUnwindSafe(|| {
        let mut rig = Rig::open(&start, 1).map_err(|error| format!("{lie:?}: it does not open: {error}"))?;
        rig.play(&lie.script(), 1);
        Ok::<_, String>(rig.finish())
    }));
    let run = run.unwrap_or_else(|panic| Err(format!("{lie:?}: a panic: {}", panic_text(&*panic))))?;
    let image = run.world.image();
    let bytes = image.file(Path::new(TOP)).expect("the image").to_bytes();
    if before.places().iter().any(|at| at + before.cluster > bytes.len()) {
        return Err(format!("{lie:?}: the file was cut through metadata"));
    }
    let old = Anatomy { bytes: bytes.clone(), ..before };
    if let Some(at) = old.written_by_guest(&old.places()) {
        return Err(format!("{lie:?}: what was metadata at {at:#x} holds data of the guest's"));
    }
    let new = Anatomy::of(bytes);
    if let Some(at) = new.written_by_guest(&new.places()) {
        return Err(format!("{lie:?}: what became metadata at {at:#x} holds data of the guest's"));
    }
    let marked = header(&new.bytes).incompatible.contains(Incompatible::CORRUPT);
    if marked != lie.is_noticed() {
        return Err(format!("{lie:?}: marked corrupt: {marked}; failed: {:?}", run.failures));
    }
    Ok(())
}

/// Tries every damage.
///
/// # Errors
/// As for [`try_one`].
pub fn try_all() -> Result<(), String> {
    Lie::ALL.into_iter().try_for_each(try_one)
}
