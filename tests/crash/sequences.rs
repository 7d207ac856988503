//! Every short sequence of operations at a few locations of a disk.
//!
//! A sequence is crashed from its last operation on. The part before is a shorter sequence, which plays identically
//! because it has the same seed.

use disk::DetectZeroes;
use qcow2::Compression;
use storage_sim::{Outcome, Verb};

use super::faulty::{self, FAILURES, Trouble};
use super::journal::{Deed, Op};
use super::rig::Rig;
use super::shape::{Below, Past, Shape, Start};
use super::trial::{Manner, judge_answers, play};
use super::walk::{Choice, Walker};

/// The length of the longest sequences.
pub const LENGTH_MAX: u32 = 3;

/// The geometries: the smallest of each kind.
pub fn shapes() -> Vec<Shape> {
    vec![
        Shape::new(9, 80).past(Past::Written),
        Shape::new(10, 96).over(Below::Raw).past(Past::Written),
        Shape::new(9, 160).wide_refcounts().past(Past::Written),
        Shape::new(9, 176).wide_refcounts().past(Past::Long),
        Shape::new(12, 64),
        Shape::new(9, 80).v2().past(Past::Written),
        Shape::new(10, 96).v2().over(Below::Raw).past(Past::Written),
        Shape::new(12, 64).over(Below::Qcow2).past(Past::Written).short_of_memory(),
        Shape::new(9, 80).over(Below::Qcow2),
        Shape::new(16, 640).past(Past::Written),
        Shape::new(9, 80).past(Past::Kept),
        Shape::new(9, 80).v2().past(Past::Kept),
        Shape::new(10, 96).over(Below::Raw).narrow_refcounts().past(Past::Kept),
        Shape::new(9, 176).wide_refcounts().past(Past::Kept),
        Shape::new(9, 80).past(Past::Dirty),
        Shape::new(9, 80).past(Past::Bitmap { dirty: false }),
        Shape::new(10, 96).over(Below::Raw).past(Past::Bitmap { dirty: true }),
        Shape::new(9, 80).past(Past::Compressed(Compression::Deflate)),
        Shape::new(12, 64).over(Below::Raw).past(Past::Compressed(Compression::Zstd)),
        Shape::new(10, 96).over(Below::Raw).past(Past::Dirty),
        Shape::new(9, 80).past(Past::Shared),
        Shape::new(10, 96).v2().over(Below::Raw).past(Past::Shared),
        Shape::raw(80).past(Past::Written),
        Shape::new(15, 352).subclusters(),
        Shape::new(15, 384).subclusters().past(Past::Written),
        Shape::new(15, 352).subclusters().over(Below::Raw).past(Past::Written),
        Shape::new(15, 352).subclusters().past(Past::Shared),
        Shape::new(12, 64).past(Past::Written).detecting(DetectZeroes::Unmap),
        Shape::new(10, 96).over(Below::Raw).past(Past::Written).keeping_places(),
        Shape::new(12, 64).past(Past::Shared).detecting(DetectZeroes::On).keeping_places(),
        Shape::new(15, 352).subclusters().past(Past::Written).detecting(DetectZeroes::Unmap).keeping_places(),
        Shape::new(9, 80).apart().past(Past::Written),
        Shape::new(12, 64).apart().over(Below::Raw).past(Past::Written),
        Shape::new(12, 64).apart_raw().past(Past::Written),
        Shape::new(15, 352).subclusters().apart().past(Past::Written),
    ]
}

/// The operations of which sequences consist.
pub fn alphabet(shape: &Shape) -> Vec<Op> {
    let unit = shape.cluster_sectors();
    let mut ops = vec![Op::Flush, grow(shape)];
    // With a past these are data, data, and an allocated or plain zero cluster. A new image has none, or backing data.
    for cluster in [0, 1, 2] {
        let (sector, count) = (cluster * unit, unit);
        ops.push(Op::write(sector, count));
        if unit > 1 {
            ops.push(Op::write(sector + unit / 2, 1));
        }
        ops.push(Op::Zeroes { sector, count, unmap: true });
        ops.push(Op::Zeroes { sector, count, unmap: false });
        ops.push(Op::Discard { sector, count });
    }
    if shape.extended_l2 {
        // Parts of clusters: in a data cluster, in a cluster with or without subclusters of its past, and across two.
        let part = shape.granule_sectors();
        for sector in [4 * part, unit + 2 * part, 2 * unit - part] {
            let count = 2 * part;
            ops.push(Op::write(sector, count));
            ops.push(Op::write(sector + part / 2, 1));
            ops.push(Op::Zeroes { sector, count, unmap: true });
            ops.push(Op::Zeroes { sector, count, unmap: false });
            ops.push(Op::Discard { sector, count });
        }
    }
    if shape.detect != DetectZeroes::Off {
        let stretch = shape.stretch_sectors();
        // Only zeros; and data around zeros, from the middle of one stretch to the middle of another.
        ops.push(Op::Gappy { sector: stretch, count: stretch });
        ops.push(Op::Gappy { sector: stretch + stretch / 2, count: 3 * stretch });
    }
    if shape.past == Past::Kept {
        ops.extend([Deed::Create, Deed::Apply, Deed::Delete].map(Op::Change));
    }
    if shape.is_resizable() {
        ops.extend(sizes(shape).map(|sectors| Op::Change(Deed::Resize(sectors))));
    }
    ops
}

/// Other sizes of the disk. The smaller one ends within a cluster, which has data if the image has a past. The other is
/// larger than ever.
pub fn sizes(shape: &Shape) -> [u64; 2] {
    let unit = shape.cluster_sectors();
    let clusters = shape.sectors / unit;
    [clusters / 8 * 4 * unit + unit.div_ceil(2), shape.sectors_max()]
}

/// A write that needs new tables. It begins at the end of the first L2 table, if the disk is that large. It is long
/// enough to use up a window of clusters.
fn grow(shape: &Shape) -> Op {
    let unit = shape.cluster_sectors();
    let table = shape.geometry().l2_entries() * unit;
    let first = if table < shape.sectors { table } else { 3 * unit };
    Op::write(first, shape.sectors - first)
}

/// The number of sequences of exactly this many operations.
pub fn count(shape: &Shape, length: u32) -> u64 {
    (alphabet(shape).len() as u64).pow(length)
}

/// The sequence with this number.
pub fn sequence(shape: &Shape, length: u32, number: u64) -> Vec<Op> {
    let ops = alphabet(shape);
    let base = ops.len() as u64;
    (0..length).map(|place| ops[(number / base.pow(place) % base) as usize]).collect()
}

/// Operations that make a disk expect a flush after each write: two writes of new clusters, each flushed. None where
/// they would have no effect.
pub fn habit(shape: &Shape) -> Vec<Op> {
    let unit = shape.cluster_sectors();
    let clusters = shape.sectors / unit;
    if shape.below != Below::Nothing || shape.has_data_file() || !shape.is_qcow2() {
        return Vec::new();
    }
    // One after the other, even if later operations are concurrent.
    let flushed = |back| [Op::write((clusters - back) * unit, 1), Op::Pause(0), Op::Flush, Op::Pause(0)];
    [2, 1].into_iter().flat_map(flushed).collect()
}

/// Plays a sequence after some operations, one by one or all at once. Then lets the housekeeper do its work, closes,
/// and tries every crash.
///
/// # Errors
/// The first violation.
pub fn exhaust(
    start: &Start,
    before: &[Op],
    ops: &[Op],
    together: bool,
    walker: &mut Walker,
) -> Result<(), String> {
    let manner = Manner { at_once: if together { ops.len() } else { 1 }, rest: true, clean: true, seed: 7 };
    let run = play(start, &[before, ops].concat(), manner)?;
    judge_answers(&run)?;
    let requests = before.iter().filter(|op| !matches!(op, Op::Pause(_))).count();
    let from = requests + if together { 0 } else { ops.len() - 1 };
    walker.crash(&run, start, &Choice::everything(run.journal.submitted_at(from)), 7)?;
    walker.closed(&run, start)
}

/// Opens, changes a little and closes, while each I/O in turn hangs until the machine crashes. An I/O that a request
/// needs hangs only until the wait has been long enough. Tries crashes of these runs.
///
/// # Errors
/// The first violation.
pub fn exhaust_hanging(start: &Start, walker: &mut Walker) -> Result<usize, String> {
    let unit = start.shape.cluster_sectors();
    let script =
        [Op::write(unit / 2, unit), Op::Discard { sector: 0, count: unit }, Op::write(4 * unit, unit)];
    let manner = Manner { at_once: 1, rest: false, clean: true, seed: 7 };
    let calm = play(start, &script, manner)?;
    let (mut runs, mut hung) = (0, 0);
    for verb in Verb::ALL {
        for nth in 0..calm.world.count(verb) {
            let trouble = Trouble { verb, nth, lasting: false, outcome: Outcome::Hang };
            let tried = faulty::play(start, &script, manner, &[trouble]).and_then(|aftermath| {
                let run = aftermath.run.as_ref().ok_or("it does not open")?;
                hung += usize::from(run.hung);
                judge_answers(run)?;
                let choice = Choice { states_max: 8, ..Choice::everything(storage_sim::Moment(0)) };
                walker.crash(run, start, &choice, nth)
            });
            tried.map_err(|wrong| format!("{wrong}\nwith {trouble:?}"))?;
            runs += 1;
        }
    }
    if hung == 0 { Err("nothing hung in the opening or the close".to_owned()) } else { Ok(runs) }
}

/// Opens and closes, and tries every crash of that run.
///
/// # Errors
/// The first violation.
pub fn exhaust_opening(start: &Start, walker: &mut Walker) -> Result<(), String> {
    let rig = Rig::open(start, 7).map_err(|error| format!("it does not open: {error}"))?;
    let run = rig.finish();
    walker.crash(&run, start, &Choice::everything(storage_sim::Moment(0)), 7)?;
    walker.closed(&run, start)
}

/// Writes to a new cluster and flushes with an early commit, while each write of the host in turn fails in every way.
/// Tries crashes after that. Returns the number of runs.
///
/// # Errors
/// The first violation.
pub fn exhaust_failing(start: &Start, walker: &mut Walker) -> Result<usize, String> {
    let mut script = habit(&start.shape);
    if script.is_empty() {
        return Ok(0);
    }
    // Time enough for a wrong entry to reach the disk before anything else is written to the same table.
    script.extend([Op::write(0, 1), Op::Pause(0), Op::Flush, Op::Pause(12_000)]);
    let manner = Manner { at_once: 1, rest: false, clean: true, seed: 7 };
    let writes = play(start, &script, manner)?.world.count(Verb::Write);
    for nth in 0..writes {
        for outcome in FAILURES {
            let trouble = Trouble { verb: Verb::Write, nth, lasting: false, outcome };
            let tried = faulty::play(start, &script, manner, &[trouble]).and_then(|aftermath| {
                aftermath.judge(&trouble, start, walker, manner)?;
                let Some(run) = &aftermath.run else { return Ok(()) };
                let choice = Choice { states_max: 8, ..Choice::everything(storage_sim::Moment(0)) };
                walker.crash(run, start, &choice, nth)
            });
            tried.map_err(|wrong| format!("{wrong}\nwith {trouble:?}"))?;
        }
    }
    Ok(writes as usize * FAILURES.len())
}
