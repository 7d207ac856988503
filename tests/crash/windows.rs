//! The two ways in which QEMU 10 loses flushed data: a freed host cluster is used again before the removal of its old
//! link is durable, so that after a crash the old address reads another address's data.
//!
//! How much is reserved when the cluster is freed decides whether it is used again at once, so every amount is tried.

use qcow2::Compression;

use super::journal::Op;
use super::shape::{Past, Shape, Start};
use super::trial::{Manner, describe, judge_answers, play};
use super::walk::{Choice, Walker};

/// Clusters that are freed.
const FREED: u64 = 4;
/// More than are ever reserved in one go with refblocks of 64 counts.
const RESERVED_MAX: u64 = 66;

/// An empty image of small refblocks, so that little is reserved at a time.
pub fn start() -> Start {
    Shape::new(9, 112).wide_refcounts().make()
}

/// An image whose first clusters are compressed: they are there before anything is written.
pub fn compressed() -> Start {
    Shape::new(9, 112).wide_refcounts().past(Past::Compressed(Compression::Deflate)).make()
}

/// Has some clusters written and flushed, if they are not compressed, takes `taken` others, frees the first by `free`, and writes elsewhere.
fn script(shape: &Shape, free: &[Op], taken: u64) -> (Vec<Op>, usize) {
    let mut ops = match shape.past {
        Past::Compressed(_) => Vec::new(),
        _ => vec![Op::write(0, FREED)],
    };
    if taken > 0 {
        ops.push(Op::write(16, taken));
    }
    ops.push(Op::Flush);
    let from = ops.len();
    ops.extend_from_slice(free);
    ops.extend([Op::write(96, FREED), Op::Flush, Op::write(104, FREED), Op::Flush]);
    (ops, from)
}

/// Tries every amount that may be reserved, each request alone and all together, with a crash at every event from the
/// freeing on. What went wrong in each.
pub fn try_all(start: &Start, free: &[Op], walker: &mut Walker) -> Vec<String> {
    let all = (0..=RESERVED_MAX).flat_map(|taken| [(taken, 1), (taken, 7)]);
    all.filter_map(|(taken, at_once)| try_one(start, free, taken, at_once, walker).err()).collect()
}

fn try_one(
    start: &Start,
    free: &[Op],
    taken: u64,
    at_once: usize,
    walker: &mut Walker,
) -> Result<(), String> {
    let (ops, from) = script(&start.shape, free, taken);
    let manner = Manner { at_once, rest: at_once == 1, clean: true, seed: taken };
    let tried = play(start, &ops, manner).and_then(|run| {
        judge_answers(&run)?;
        let from = run.journal.submitted_at(if at_once == 1 { from } else { 0 });
        let choice = Choice { states_max: 200, ..Choice::everything(from) };
        walker.crash(&run, start, &choice, taken)?;
        walker.closed(&run, start)
    });
    tried.map_err(|wrong| describe(start, &ops, &format!("{manner:?}"), &wrong))
}

/// A discard.
pub fn discard() -> Vec<Op> {
    vec![Op::Discard { sector: 0, count: FREED }]
}

/// Write zeroes that may give space back.
pub fn unmap() -> Vec<Op> {
    vec![Op::Zeroes { sector: 0, count: FREED, unmap: true }]
}

/// The same address is written anew, to another place of the file: the old one is freed as it is in a copy on write.
pub fn written_anew() -> Vec<Op> {
    vec![Op::Zeroes { sector: 0, count: FREED, unmap: true }, Op::write(0, FREED)]
}

/// Written over: compressed clusters are freed by that.
pub fn written_over() -> Vec<Op> {
    vec![Op::write(0, FREED)]
}
