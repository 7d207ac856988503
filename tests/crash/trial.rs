//! A random run, which one number stands for: a shape, a script, an order of turns, crashes; then another run on what
//! one of the crashes left, and another.

use std::fmt::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};

use storage::sim::Random;

use super::examine::panic_text;
use super::journal::Op;
use super::memory::SECTORS_MAX;
use super::rig::{Finished, Rig};
use super::shape::{Below, Past, Shape, Start};
use super::walk::{Choice, Walker};

/// Runs of a trial, each on what a crash of the one before left.
const GENERATIONS: u64 = 3;

/// The kinds of images.
pub fn shapes() -> Vec<Shape> {
    vec![
        Shape::new(9, 64),
        Shape::new(9, 96).past(Past::Written),
        Shape::new(9, 96).over(Below::Raw),
        Shape::new(9, 96).over(Below::Qcow2).past(Past::Written),
        Shape::new(10, 99).past(Past::Written),
        Shape::new(12, 128).past(Past::Written),
        Shape::new(12, 131).over(Below::Raw),
        Shape::new(12, 128).over(Below::Qcow2).past(Past::Written).short_of_memory(),
        Shape::new(9, 80).v2().past(Past::Written),
        Shape::new(9, 80).v2().over(Below::Raw).past(Past::Written),
        Shape::new(11, 96).v2().over(Below::Qcow2),
        Shape::new(9, 160).wide_refcounts().past(Past::Written).short_of_memory(),
        Shape::new(9, 128).wide_refcounts().past(Past::Long),
        Shape::new(9, 320).past(Past::Long),
        Shape::new(9, 400).v2().past(Past::Long).short_of_memory(),
        Shape::new(16, 1024).past(Past::Written),
        Shape::new(16, 768).over(Below::Raw),
    ]
}

/// Images of all shapes.
pub fn starts() -> Vec<Start> {
    shapes().iter().map(Shape::make).collect()
}

/// Makes scripts for a disk.
pub struct Author<'r> {
    random: &'r mut Random,
    shape: Shape,
    /// Most operations are about these sectors, so that they meet.
    busy: std::ops::Range<u64>,
}

impl<'r> Author<'r> {
    /// For disks of a shape.
    pub fn new(random: &'r mut Random, shape: Shape) -> Self {
        let width = (shape.cluster_sectors() * (2 + random.below(14))).min(shape.sectors);
        let first =
            random.below(shape.sectors - width + 1) / shape.cluster_sectors() * shape.cluster_sectors();
        Author { random, shape, busy: first..(first + width).min(shape.sectors) }
    }

    /// A script.
    pub fn script(&mut self, length: usize) -> Vec<Op> {
        (0..length).map(|_| self.op()).collect()
    }

    fn op(&mut self) -> Op {
        let through = self.random.chance(1, 12);
        match self.random.below(32) {
            0..12 => {
                let (sector, count) = self.place();
                Op::Write { sector, count, through }
            }
            12..16 => {
                let (sector, count) = self.place();
                Op::Zeroes { sector, count, unmap: self.random.chance(2, 3) }
            }
            16..21 => {
                let (sector, count) = self.place();
                Op::Discard { sector, count }
            }
            21..25 => {
                let (sector, count) = self.place();
                Op::Read { sector, count }
            }
            25..31 => Op::Flush,
            _ => Op::Pause([60, 200, 5200, 11_000][self.random.below(4) as usize]),
        }
    }

    /// A range of sectors: a part of a cluster, a cluster, several, or much.
    fn place(&mut self) -> (u64, u64) {
        let unit = self.shape.cluster_sectors();
        let (first, end) = match self.random.below(8) {
            0 => (0, self.shape.sectors),
            _ => (self.busy.start, self.busy.end),
        };
        let clusters = (end - first).div_ceil(unit);
        let cluster = first + self.random.below(clusters) * unit;
        let (sector, count) = match self.random.below(8) {
            0..2 => (cluster + self.random.below(unit), 1 + self.random.below(unit)),
            2..5 => (cluster, unit),
            5..7 => (cluster, unit * (1 + self.random.below(4))),
            _ => (cluster + self.random.below(unit), 1 + self.random.below((end - first).min(300))),
        };
        let sector = sector.min(self.shape.sectors - 1);
        (sector, count.min(self.shape.sectors - sector).min(SECTORS_MAX))
    }
}

/// How a script is run.
#[derive(Clone, Copy, Debug)]
pub struct Manner {
    /// Requests in flight, at most.
    pub at_once: usize,
    /// The housekeeper has time for its work at the end.
    pub rest: bool,
    /// The disk is closed, else left as it is.
    pub clean: bool,
    /// Who is turned when, and how long each I/O takes.
    pub seed: u64,
}

/// Runs a script and panics not.
///
/// # Errors
/// Whatever went wrong in the run itself.
pub fn play(start: &Start, script: &[Op], manner: Manner) -> Result<Finished, String> {
    let run = || -> Result<Finished, String> {
        let mut rig = Rig::open(start, manner.seed).map_err(|error| format!("it does not open: {error}"))?;
        rig.play(script, manner.at_once);
        if manner.rest {
            rig.rest();
        }
        Ok(if manner.clean { rig.finish() } else { rig.abandon() })
    };
    let finished = catch_unwind(AssertUnwindSafe(run))
        .unwrap_or_else(|panic| Err(format!("the run panicked: {}", panic_text(&*panic))))?;
    if let Some(misread) = &finished.misread {
        return Err(misread.clone());
    }
    if let Some((index, error)) = finished.failures.first() {
        return Err(format!("request {index} failed without a fault: {error}"));
    }
    if let Err(error) = &finished.closed {
        return Err(format!("the close failed: {error}"));
    }
    Ok(finished)
}

/// What is needed to see a violation again.
pub fn describe(start: &Start, script: &[Op], manner: &str, wrong: &str) -> String {
    let mut text = format!("{wrong}\n{:?}\n{manner}", start.shape);
    for (index, op) in script.iter().enumerate() {
        let _ = write!(text, "\n  {index}: {op:?}");
    }
    text
}

/// Does the trial that a number stands for.
///
/// # Errors
/// The first violation, with all that is needed to see it again.
pub fn trial(starts: &[Start], seed: u64, walker: &mut Walker, count: impl Fn(usize)) -> Result<(), String> {
    let mut random = Random::new(seed);
    let mut start = starts[random.below(starts.len() as u64) as usize].clone();
    for generation in 0..GENERATIONS {
        let length = 4 + random.below(40) as usize;
        let script = Author::new(&mut random, start.shape).script(length);
        let at_once = 1 + random.below(7) as usize;
        let (rest, clean) = (random.chance(1, 4), random.chance(1, 2));
        let manner = Manner { at_once, rest, clean, seed: random.next_bits() };
        count(script.len());
        let tried = play(&start, &script, manner).and_then(|run| {
            walker.crash(&run, &start, &Choice::sample(4), manner.seed)?;
            if clean {
                walker.closed(&run, &start)?;
            }
            walker.some_crash(&run, &start, manner.seed)
        });
        start = tried.map_err(|wrong| {
            let manner = format!("seed {seed}, generation {generation}, {manner:?}");
            describe(&start, &script, &manner, &wrong)
        })?;
    }
    Ok(())
}
