//! A random run that one number determines: a shape, a script, an order of polls, and crashes. Further runs start from
//! the image that one of these crashes left.

use std::fmt::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};

use disk::{DetectZeroes, OnEnospc};
use qcow2::Compression;
use storage_sim::Random;

use super::examine::panic_text;
use super::faulty::{self, Trouble};
use super::journal::{Deed, Op};
use super::memory::SECTORS_MAX;
use super::rig::{Finished, Rig};
use super::scarce;
use super::shape::{Below, Past, Shape, Start};
use super::walk::{Choice, Walker};

/// Runs of a trial. Each starts from the image that a crash of the previous run left.
const GENERATIONS: u64 = 3;

/// The kinds of images.
pub fn shapes() -> Vec<Shape> {
    vec![
        Shape::new(9, 64),
        Shape::new(9, 384),
        Shape::new(9, 96).past(Past::Written),
        Shape::new(9, 448).over(Below::Raw),
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
        Shape::new(9, 96).past(Past::Compressed(Compression::Deflate)),
        Shape::new(9, 160).wide_refcounts().past(Past::Compressed(Compression::Zstd)),
        Shape::new(15, 384).subclusters().past(Past::Compressed(Compression::Deflate)),
        Shape::new(9, 80).v2().over(Below::Raw).past(Past::Compressed(Compression::Deflate)),
        Shape::new(12, 128).over(Below::Qcow2).past(Past::Compressed(Compression::Zstd)).short_of_memory(),
        Shape::new(9, 96).past(Past::Kept),
        Shape::new(9, 80).v2().past(Past::Kept),
        Shape::new(9, 96).narrow_refcounts().past(Past::Kept),
        Shape::new(12, 128).over(Below::Qcow2).past(Past::Kept).short_of_memory(),
        Shape::new(9, 160).wide_refcounts().past(Past::Kept),
        Shape::new(9, 96).refcounts(0).past(Past::Written),
        Shape::new(9, 96).refcounts(2).past(Past::Kept),
        Shape::new(10, 96).refcounts(3).past(Past::Kept),
        Shape::new(9, 96).refcounts(5).past(Past::Kept),
        Shape::new(9, 96).past(Past::Dirty),
        Shape::new(9, 96).lazy().past(Past::Written),
        Shape::new(9, 80).lazy().over(Below::Raw).past(Past::Dirty),
        Shape::new(12, 128).lazy().past(Past::Kept),
        Shape::new(12, 128).over(Below::Raw).past(Past::Dirty),
        Shape::new(9, 96).past(Past::Bitmap { dirty: false }),
        Shape::new(12, 128).over(Below::Raw).past(Past::Bitmap { dirty: true }),
        Shape::new(9, 96).past(Past::Shared),
        Shape::new(9, 80).v2().over(Below::Raw).past(Past::Shared),
        Shape::new(9, 144).wide_refcounts().past(Past::Shared).short_of_memory(),
        Shape::new(12, 131).over(Below::Qcow2).past(Past::Shared),
        Shape::new(16, 1024).past(Past::Shared),
        // Several slices of the map.
        Shape::new(9, 1100).past(Past::Written),
        Shape::raw(200),
        Shape::raw(96).past(Past::Written),
        Shape::new(14, 512).subclusters(),
        Shape::new(14, 384).subclusters().past(Past::Written),
        Shape::new(15, 519).subclusters().over(Below::Raw),
        Shape::new(14, 320).subclusters().over(Below::Qcow2).past(Past::Written).short_of_memory(),
        Shape::new(15, 512).subclusters().past(Past::Shared),
        Shape::new(14, 320).subclusters().past(Past::Kept),
        Shape::new(9, 96).past(Past::Written).detecting(DetectZeroes::Unmap),
        Shape::new(12, 128).past(Past::Written).keeping_places(),
        Shape::new(16, 768).over(Below::Raw).detecting(DetectZeroes::Unmap).keeping_places(),
        Shape::new(12, 131)
            .over(Below::Qcow2)
            .past(Past::Shared)
            .detecting(DetectZeroes::On)
            .keeping_places(),
        Shape::new(14, 384).subclusters().past(Past::Written).detecting(DetectZeroes::Unmap).keeping_places(),
        Shape::new(9, 80).v2().past(Past::Written).detecting(DetectZeroes::Unmap),
        Shape::raw(200).detecting(DetectZeroes::Unmap),
        Shape::new(9, 96).apart().past(Past::Written),
        Shape::new(12, 131).apart().over(Below::Raw),
        Shape::new(12, 128).apart().over(Below::Qcow2).past(Past::Written).short_of_memory(),
        Shape::new(9, 96).apart().past(Past::Dirty),
        Shape::new(15, 384).subclusters().apart().past(Past::Written),
        Shape::new(9, 96).apart_raw(),
        Shape::new(12, 131).apart_raw().past(Past::Written),
        Shape::new(15, 384).subclusters().apart_raw(),
        Shape::new(12, 128).apart().past(Past::Written).detecting(DetectZeroes::Unmap).keeping_places(),
        Shape::new(12, 128).apart_raw().past(Past::Written).detecting(DetectZeroes::On),
    ]
}

/// The images of all shapes.
pub fn starts() -> Vec<Start> {
    shapes().iter().map(Shape::make).collect()
}

/// Makes scripts for a disk.
pub struct Author<'r> {
    random: &'r mut Random,
    shape: Shape,
    /// Most operations touch these sectors, so that they overlap.
    busy: std::ops::Range<u64>,
}

impl<'r> Author<'r> {
    /// An author of scripts for disks of a shape.
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

    /// A script that frees and allocates clusters all the time, so that windows run out and freed clusters are reused.
    pub fn churn(&mut self, length: usize) -> Vec<Op> {
        (0..length).map(|_| self.churning_op()).collect()
    }

    /// A script in which clusters are discarded while they are still written and read, and their space is soon reused.
    pub fn overtaken(&mut self) -> Vec<Op> {
        let unit = self.shape.cluster_sectors();
        let clusters = (self.shape.sectors / unit).min(SECTORS_MAX / unit).min(48);
        let count = clusters * unit;
        // Until more clusters are used than were reserved at first.
        let geometry = self.shape.geometry();
        let window = geometry.refblock_entries().min((1 << 20) / geometry.cluster_size());
        let mut ops = vec![Op::write(0, count)];
        for _ in 0..4 {
            // The late I/O has completed. Nothing else is in flight, so the following requests go straight to the host
            // and delay no other request.
            ops.extend([Op::Pause(0), Op::Read { sector: 0, count }]);
            ops.push(Op::Pause(0));
            for _ in 0..2 {
                let sector = self.random.below(count);
                ops.push(Op::Late(64 << self.random.below(4)));
                ops.push(if self.random.chance(3, 4) {
                    Op::write(sector, 1)
                } else {
                    Op::Read { sector, count: 1 }
                });
            }
            for _ in 0..2 + window / clusters {
                // In two parts, so that host clusters map other guest clusters than before.
                let first = (1 + self.random.below(clusters - 1)) * unit;
                ops.extend([Op::Discard { sector: 0, count }, Op::Flush]);
                ops.extend([Op::write(first, count - first), Op::write(0, first)]);
            }
        }
        ops.extend([Op::Pause(0), Op::Read { sector: 0, count }]);
        ops
    }

    /// A script that changes the size of the disk again and again, often within its last cluster.
    pub fn resized(&mut self) -> Vec<Op> {
        let unit = self.shape.cluster_sectors();
        let mut ops = Vec::new();
        for _ in 0..3 {
            let smaller = 1 + self.random.below(self.shape.sectors);
            let cluster = smaller / unit * unit;
            ops.extend([Op::write(cluster, unit.min(SECTORS_MAX)), Op::Change(Deed::Resize(smaller))]);
            ops.extend(self.script(2));
            let larger = if self.random.chance(1, 2) { cluster + unit } else { self.size() };
            ops.push(Op::Change(Deed::Resize(larger.min(self.shape.sectors_max()))));
            ops.extend(self.script(2));
        }
        ops
    }

    /// A script that resizes the disk in use again and again, while requests go on near its ends.
    pub fn resized_in_use(&mut self, length: usize) -> Vec<Op> {
        let unit = self.shape.cluster_sectors();
        let mut ops = Vec::new();
        for _ in 0..3 {
            let smaller = 1 + self.random.below(self.shape.sectors);
            let cluster = smaller / unit * unit;
            let near = |ops: &mut Vec<Op>, author: &mut Self| {
                ops.push(Op::write(cluster, unit.min(SECTORS_MAX)));
                ops.extend(author.script(length / 6));
                let count = unit.min(SECTORS_MAX);
                ops.push(if author.random.chance(1, 2) {
                    Op::write(cluster, count)
                } else {
                    Op::Discard { sector: cluster, count }
                });
            };
            near(&mut ops, self);
            ops.push(Op::Live(smaller));
            near(&mut ops, self);
            let larger = if self.random.chance(1, 2) { cluster + unit } else { self.size() };
            ops.push(Op::Live(larger.min(self.shape.sectors_max())));
            near(&mut ops, self);
        }
        ops
    }

    /// A script that puts overlays on top of the disk in use, and writes to the same places before and after.
    pub fn overlaid(&mut self, length: usize) -> Vec<Op> {
        let mut ops = Vec::new();
        for _ in 0..3 {
            ops.extend(self.script(length / 3));
            ops.push(Op::Overlay);
            ops.extend(self.script(length / 6));
        }
        without_resizes(&without_changes(&ops))
    }

    /// A script in which most writes need one cluster and are followed by a flush at once.
    pub fn flushed(&mut self, length: usize) -> Vec<Op> {
        let unit = self.shape.cluster_sectors();
        let mut ops = Vec::new();
        for _ in 0..length {
            let sector = self.busy.start + self.random.below(self.busy.end - self.busy.start);
            let in_cluster = (unit - sector % unit).min(self.busy.end - sector).min(SECTORS_MAX);
            match self.random.below(16) {
                0 => ops.push(self.op()),
                1..3 => ops.push(Op::Discard { sector: self.busy.start, count: 2 * unit }),
                3 => ops.push(Op::write(sector, in_cluster)),
                _ => ops.extend([Op::write(sector, 1 + self.random.below(in_cluster)), Op::Flush]),
            }
        }
        ops
    }

    /// A script in which an early commit meets a change of its own table and a flush. Each round makes the disk expect
    /// a flush after each write. Then it writes to a new cluster, discards another, and flushes, all at once and in any
    /// order. The flush that follows must find every link where it belongs.
    pub fn beside(&mut self) -> Vec<Op> {
        let unit = self.shape.cluster_sectors();
        let clusters = (self.shape.sectors / unit).min(self.shape.geometry().l2_entries());
        // Each cluster of a round is drawn from so many.
        let count = (clusters / 4).min(16);
        let mut ops = Vec::new();
        for _ in 0..4 {
            let first = self.random.below(clusters - 3 * count + 1);
            let place = |at: u64, random: &mut Random| (first + at * count + random.below(count)) * unit;
            // New clusters, and time to give back what they had.
            ops.extend([
                Op::Discard { sector: first * unit, count: 3 * count * unit },
                Op::Flush,
                Op::Pause(0),
            ]);
            let [one, two, three] = [0, 1, 2].map(|at| place(at, self.random));
            for sector in [one, two] {
                ops.extend([Op::write(sector, 1), Op::Pause(0), Op::Flush, Op::Pause(0)]);
            }
            let mut meeting = vec![Op::write(three, 1), Op::Discard { sector: one, count: unit }, Op::Flush];
            let at = self.random.below(3) as usize;
            meeting.rotate_left(at);
            if self.random.chance(2, 3) {
                // The first I/O of one of them is late.
                let at = self.random.below(3) as usize;
                meeting.insert(at, Op::Late(16 << self.random.below(4)));
            }
            ops.extend(meeting);
            ops.extend([Op::Pause(0), Op::Flush, Op::Pause(0)]);
        }
        ops
    }

    fn churning_op(&mut self) -> Op {
        let unit = self.shape.cluster_sectors();
        let clusters = (self.busy.end - self.busy.start).div_ceil(unit);
        let sector = self.busy.start + self.random.below(clusters) * unit;
        let most = (self.busy.end - sector).min(SECTORS_MAX);
        let count = (unit * (1 + self.random.below(6))).min(most);
        match self.random.below(16) {
            0..6 => Op::write(sector, count),
            6..8 => Op::write(sector, unit.min(most)),
            8..12 => Op::Discard { sector, count },
            12..14 => Op::Read { sector, count },
            _ => Op::Flush,
        }
    }

    fn op(&mut self) -> Op {
        let through = self.random.chance(1, 12);
        match self.random.below(34) {
            0..12 => {
                let (sector, count) = self.place();
                if self.shape.detect != DetectZeroes::Off && self.random.chance(1, 2) {
                    return Op::Gappy { sector, count };
                }
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
            31..33 => Op::Change([Deed::Create, Deed::Apply, Deed::Delete][self.random.below(3) as usize]),
            33 if self.random.chance(1, 2) => Op::Change(Deed::Resize(self.size())),
            _ => Op::Pause([60, 200, 5200, 11_000][self.random.below(4) as usize]),
        }
    }

    /// A size of the disk: any, or whole clusters.
    fn size(&mut self) -> u64 {
        let (unit, most) = (self.shape.cluster_sectors(), self.shape.sectors_max());
        let sectors = 1 + self.random.below(most);
        if self.random.chance(1, 3) { sectors.next_multiple_of(unit).min(most) } else { sectors }
    }

    /// A range of sectors: a part of a cluster, a cluster, several clusters, or many.
    fn place(&mut self) -> (u64, u64) {
        let unit = self.shape.cluster_sectors();
        let (first, end) = match self.random.below(8) {
            0 => (0, self.shape.sectors),
            _ => (self.busy.start, self.busy.end),
        };
        // On a disk with subclusters, either subclusters or whole clusters.
        let unit = if self.random.chance(1, 2) { self.shape.granule_sectors() } else { unit };
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

/// The manner in which a script is run.
#[derive(Clone, Copy, Debug)]
pub struct Manner {
    /// Requests in flight, at most.
    pub at_once: usize,
    /// The housekeeper has time for its work at the end.
    pub rest: bool,
    /// The disk is closed; otherwise it is left open.
    pub clean: bool,
    /// Determines the order of polls and the time that each I/O takes.
    pub seed: u64,
}

/// Runs a script without panicking.
///
/// # Errors
/// A failure of the run itself.
pub fn play(start: &Start, script: &[Op], manner: Manner) -> Result<Finished, String> {
    let run = || -> Result<Finished, String> {
        let mut rig = Rig::open(start, manner.seed).map_err(|error| format!("it does not open: {error}"))?;
        rig.play(script, manner.at_once);
        if manner.rest {
            rig.rest();
        }
        Ok(if manner.clean { rig.finish() } else { rig.abandon() })
    };
    catch_unwind(AssertUnwindSafe(run))
        .unwrap_or_else(|panic| Err(format!("the run panicked: {}", panic_text(&*panic))))
}

/// The text that is needed to reproduce a violation.
pub fn describe(start: &Start, script: &[Op], manner: &str, wrong: &str) -> String {
    let mut text = format!("{wrong}\n{:?}\n{manner}", start.shape);
    for (index, op) in script.iter().enumerate() {
        let _ = write!(text, "\n  {index}: {op:?}");
    }
    text
}

/// The focus of a trial.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tactic {
    /// A random focus in every run.
    Any,
    /// In every run an I/O fails.
    Failures,
    /// In every run the host runs out of space temporarily.
    Shortages,
    /// In every run I/O is late on clusters that are freed meanwhile.
    Overtaken,
    /// In every run the disk changes its size.
    Sizes,
    /// In every run the disk changes its size in use.
    LiveSizes,
    /// In every run flushes follow single writes, so that the disk makes early commits.
    Flushed,
    /// In every run the disk keeps a journal, and the daemon alone dies.
    Deaths,
    /// In every run overlays are put on top of the disk in use. Some keep a journal, and the daemon alone dies.
    Overlays,
}

/// Runs the trial of a number.
///
/// # Errors
/// The first violation, with the text that is needed to reproduce it.
pub fn trial(
    starts: &[Start],
    seed: u64,
    tactic: Tactic,
    walker: &mut Walker,
    count: impl Fn(usize),
) -> Result<(), String> {
    let mut random = Random::new(seed);
    let mut start = starts[random.below(starts.len() as u64) as usize].clone();
    for generation in 0..GENERATIONS {
        let length = 4 + random.below(40) as usize;
        let kind = match tactic {
            Tactic::Overtaken => 0,
            Tactic::Sizes => 5,
            Tactic::LiveSizes => 9,
            Tactic::Flushed => 7 + random.below(2),
            Tactic::Overlays => 16,
            _ => random.below(16),
        };
        let mut author = Author::new(&mut random, start.shape);
        let script = match kind {
            0 => author.overtaken(),
            1..5 => author.churn(2 * length),
            5 => author.resized(),
            6..8 => author.flushed(length),
            8 => author.beside(),
            9 => author.resized_in_use(length),
            16 => author.overlaid(length),
            _ => author.script(length),
        };
        let at_once = match kind {
            0 => 7,
            8 => 3,
            6..8 => 1 + random.below(4) as usize,
            _ => 1 + random.below(7) as usize,
        };
        let (rest, clean) = (random.chance(1, 4), random.chance(1, 2));
        let manner = Manner { at_once, rest, clean, seed: random.next_bits() };
        count(script.len());
        let tried = match random.below(5) {
            0 if tactic == Tactic::Overlays && start.shape.keeps_journal() => {
                with_deaths(&start, &script, manner, walker)
            }
            _ if tactic == Tactic::Overlays => {
                play(&start, &script, manner).and_then(|run| judge(&run, &start, manner, walker))
            }
            _ if tactic == Tactic::Deaths => with_deaths(&start, &script, manner, walker),
            _ if tactic == Tactic::Shortages => with_shortages(&start, &script, manner, &mut random, walker),
            _ if tactic == Tactic::Failures => with_failure(&start, &script, manner, &mut random, walker),
            0 => with_failure(&start, &script, manner, &mut random, walker),
            1 => {
                let delays = (0..6).map(|_| Trouble::delay(&mut random)).collect();
                with_delays(&start, &script, manner, delays, walker)
            }
            2 => with_shortages(&start, &script, manner, &mut random, walker),
            _ => play(&start, &script, manner).and_then(|run| judge(&run, &start, manner, walker)),
        };
        start = tried.map_err(|wrong| {
            let manner = format!("seed {seed}, generation {generation}, {manner:?}");
            describe(&start, &script, &manner, &wrong)
        })?;
    }
    Ok(())
}

/// Checks a run in which no I/O failed.
///
/// # Errors
/// The first misread, failed request or failed close.
pub fn judge_answers(run: &Finished) -> Result<(), String> {
    if let Some(misread) = &run.misread {
        return Err(misread.clone());
    }
    if let Some((index, error)) = run.failures.first() {
        return Err(format!("request {index} failed without a fault: {error}"));
    }
    run.closed.as_ref().map_err(|error| format!("the close failed: {error}")).copied()
}

/// Judges a run in which nothing fails. Returns a crash state of it.
fn judge(run: &Finished, start: &Start, manner: Manner, walker: &mut Walker) -> Result<Start, String> {
    judge_answers(run)?;
    walker.crash(run, start, &Choice::sample_of(run), manner.seed)?;
    if manner.clean && !run.hung {
        walker.closed(run, start)?;
    }
    walker.some_crash(run, start, manner.seed)
}

/// Plays a run in which the daemon alone dies at some moments. Returns what one of the deaths left, or a crash state.
fn with_deaths(start: &Start, script: &[Op], manner: Manner, walker: &mut Walker) -> Result<Start, String> {
    let run = || -> Result<Finished, String> {
        let rig = Rig::open_watched(start, manner.seed, script.len());
        let mut rig = rig.map_err(|error| format!("it does not open: {error}"))?;
        rig.play(script, manner.at_once);
        Ok(if manner.clean { rig.finish() } else { rig.abandon() })
    };
    let run = catch_unwind(AssertUnwindSafe(run))
        .unwrap_or_else(|panic| Err(format!("the run panicked: {}", panic_text(&*panic))))?;
    judge_answers(&run)?;
    let left = walker.deaths(&run, start, manner.seed)?;
    match left {
        Some(left) => Ok(left),
        None => judge(&run, start, manner, walker),
    }
}

/// The script without changes of the image: `crash_changes` tests these on a host that fails or hangs.
fn without_changes(script: &[Op]) -> Vec<Op> {
    script.iter().copied().filter(|op| !matches!(op, Op::Change(_))).collect()
}

/// The script without resizes of the disk in use, which fail at once with the host's I/O.
fn without_resizes(script: &[Op]) -> Vec<Op> {
    script.iter().copied().filter(|op| !matches!(op, Op::Live(_))).collect()
}

/// Plays a run in which an I/O fails. Returns a crash state of it.
fn with_failure(
    start: &Start,
    script: &[Op],
    manner: Manner,
    random: &mut Random,
    walker: &mut Walker,
) -> Result<Start, String> {
    let trouble = Trouble::random(random);
    let script = &without_resizes(&without_changes(script));
    let name = |wrong: String| format!("{wrong}\nwith {trouble:?}");
    let aftermath = faulty::play(start, script, manner, &[trouble]).map_err(name)?;
    aftermath.judge(&trouble, start, walker, manner).map_err(name)?;
    match &aftermath.run {
        Some(run) => walker.some_crash(run, start, manner.seed).map_err(name),
        None => Ok(start.clone()),
    }
}

/// Plays a run in which some I/Os are late. Returns a crash state of it.
fn with_delays(
    start: &Start,
    script: &[Op],
    manner: Manner,
    delays: Vec<Trouble>,
    walker: &mut Walker,
) -> Result<Start, String> {
    let script = &without_changes(script);
    let name = |wrong: String| format!("{wrong}\nwith {delays:?}");
    let aftermath = faulty::play(start, script, manner, &delays).map_err(name)?;
    let run = aftermath.run.ok_or("it does not open".to_owned()).map_err(name)?;
    judge(&run, start, manner, walker).map_err(name)
}

/// Plays a run in which the host temporarily runs out of space. Returns a crash state of it.
fn with_shortages(
    start: &Start,
    script: &[Op],
    manner: Manner,
    random: &mut Random,
    walker: &mut Walker,
) -> Result<Start, String> {
    let on_enospc = if random.chance(1, 3) { OnEnospc::Report } else { OnEnospc::Wait };
    let script = &without_resizes(&without_changes(script));
    let name = |wrong: String| format!("{wrong}\nwith shortages of space, {on_enospc:?}");
    let before = start.shape;
    let start = Start { shape: Shape { on_enospc, ..before }, ..start.clone() };
    let scarce = scarce::play(&start, script, manner).map_err(name)?;
    scarce.judge(on_enospc).map_err(name)?;
    walker.count_shortage(scarce.space.waited, scarce.run.given_up.len() as u64);
    walker.crash(&scarce.run, &start, &Choice::sample_of(&scarce.run), manner.seed).map_err(name)?;
    if manner.clean {
        walker.closed(&scarce.run, &start).map_err(name)?;
    }
    let left = walker.some_crash(&scarce.run, &start, manner.seed).map_err(name)?;
    Ok(Start { shape: before, ..left })
}
