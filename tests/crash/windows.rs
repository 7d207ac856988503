//! The two ways in which QEMU 10 loses flushed data: it reuses a freed host cluster before the removal of its old link
//! is durable. After a crash the old address then reads another address's data.
//!
//! The number of clusters reserved at that time decides whether the freed cluster is reused at once. So every number is
//! tried. Whether a cut is under way decides which cut makes the removal durable. So the cluster is freed before, beside and
//! within a cut.

use qcow2::Compression;

use super::journal::Op;
use super::shape::{Past, Shape, Start};
use super::trial::{Manner, describe, judge_answers, play};
use super::walk::{Choice, Walker};

/// Number of clusters that are freed.
const FREED: u64 = 4;
/// More clusters than one reservation takes with refblocks of 64 counts.
const RESERVED_MAX: u64 = 66;

/// An empty image with small refblocks, so that reservations are small.
pub fn start() -> Start {
    Shape::new(9, 112).wide_refcounts().make()
}

/// An image whose first clusters are compressed before anything is written.
pub fn compressed() -> Start {
    Shape::new(9, 112).wide_refcounts().past(Past::Compressed(Compression::Deflate)).make()
}

/// When the clusters are freed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Freed {
    /// Every request is alone.
    Alone,
    /// All requests are in flight at the same time.
    Together,
    /// While a cut is under way that lasts longer than the freeing. It was taken before, so it removes no link. The
    /// housekeeper has time before the next one.
    WithinCut,
}

/// How long that cut's first I/O takes, in milliseconds.
const LONG_CUT: u64 = 500;
/// Time for the housekeeper, in milliseconds.
const REST: u64 = 200;

/// Writes and flushes the first clusters, unless they are compressed. Then allocates `taken` others, frees the first
/// with `free`, and writes elsewhere.
fn script(shape: &Shape, free: &[Op], taken: u64, freed: Freed) -> (Vec<Op>, usize) {
    let mut ops = match shape.past {
        Past::Compressed(_) => Vec::new(),
        _ => vec![Op::write(0, FREED)],
    };
    if taken > 0 {
        ops.push(Op::write(16, taken));
    }
    ops.push(Op::Flush);
    let from = ops.len();
    let within = freed == Freed::WithinCut;
    if within {
        ops.extend([Op::Pause(0), Op::Late(LONG_CUT), Op::Flush]);
    }
    ops.extend_from_slice(free);
    if within {
        ops.push(Op::Pause(REST));
    }
    ops.extend([Op::write(96, FREED), Op::Flush, Op::write(104, FREED), Op::Flush]);
    (ops, from)
}

/// Tries every number of reserved clusters, and every time of the freeing. Crashes at every event from the freeing on, and
/// returns the violations.
pub fn try_all(start: &Start, free: &[Op], walker: &mut Walker) -> Vec<String> {
    let every = |freed| (0..=RESERVED_MAX).map(move |taken| (taken, freed));
    let some = (0..=RESERVED_MAX).step_by(6).map(|taken| (taken, Freed::WithinCut));
    let all = every(Freed::Alone).chain(every(Freed::Together)).chain(some);
    all.filter_map(|(taken, freed)| try_one(start, free, taken, freed, walker).err()).collect()
}

fn try_one(start: &Start, free: &[Op], taken: u64, freed: Freed, walker: &mut Walker) -> Result<(), String> {
    let (ops, from) = script(&start.shape, free, taken, freed);
    let at_once = if freed == Freed::Alone { 1 } else { 7 };
    let manner = Manner { at_once, rest: at_once == 1, clean: true, seed: taken };
    let tried = play(start, &ops, manner).and_then(|run| {
        judge_answers(&run)?;
        let from = run.journal.submitted_at(if at_once == 1 { from } else { 0 });
        let choice = Choice { states_max: 200, ..Choice::everything(from) };
        walker.crash(&run, start, &choice, taken)?;
        walker.closed(&run, start)
    });
    tried.map_err(|wrong| describe(start, &ops, &format!("{freed:?} {manner:?}"), &wrong))
}

/// A discard.
pub fn discard() -> Vec<Op> {
    vec![Op::Discard { sector: 0, count: FREED }]
}

/// A write of zeroes that may give space back.
pub fn unmap() -> Vec<Op> {
    vec![Op::Zeroes { sector: 0, count: FREED, unmap: true }]
}

/// A rewrite of the same address, which goes to another host cluster. The old one is freed as in a copy on write.
pub fn written_anew() -> Vec<Op> {
    vec![Op::Zeroes { sector: 0, count: FREED, unmap: true }, Op::write(0, FREED)]
}

/// An overwrite, which frees compressed clusters.
pub fn written_over() -> Vec<Op> {
    vec![Op::write(0, FREED)]
}
