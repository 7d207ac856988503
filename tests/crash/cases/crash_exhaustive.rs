//! Every sequence of up to three operations on small images, with a crash at every event.
//!
//! `STRATA_CRASH_SECONDS=36000` tries all of them. A shorter time tries all sequences of one and two operations first,
//! then a part of those of three.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use storage_sim::Random;
use strata_crash::sequences::{
    LENGTH_MAX, count, exhaust, exhaust_failing, exhaust_hanging, exhaust_opening, habit, sequence, shapes,
};
use strata_crash::shape::{Shape, Start};
use strata_crash::tally::Tally;
use strata_crash::trial::describe;
use strata_crash::walk::Walker;
use strata_crash::{number, threads};

/// A sequence: the index of its image, its length and its number. `together` puts all its operations in flight at once.
/// With `habit` the disk expects a flush after each write.
#[derive(Clone, Copy, Debug)]
struct Job {
    start: usize,
    length: u32,
    number: u64,
    together: bool,
    habit: bool,
}

/// The length of the longest sequences that are also tried on a disk that expects a flush.
const HABIT_LENGTH_MAX: u32 = 2;

/// All sequences, the short ones first. Sequences of one length are shuffled.
fn jobs(starts: &[Start]) -> Vec<Job> {
    let mut random = Random::new(number("STRATA_CRASH_SEED").unwrap_or(1));
    let mut jobs = Vec::new();
    for length in 1..=LENGTH_MAX {
        let mut some: Vec<Job> = Vec::new();
        for (index, start) in starts.iter().enumerate() {
            let numbers = 0..count(&start.shape, length);
            let may_expect = length <= HABIT_LENGTH_MAX && !habit(&start.shape).is_empty();
            let manners = [(false, false), (true, false), (false, true), (true, true)];
            let possible = manners
                .into_iter()
                .filter(|(together, habit)| (length > 1 || !together) && (may_expect || !habit));
            let possible: Vec<(bool, bool)> = possible.collect();
            some.extend(numbers.flat_map(|number| {
                let job = move |(together, habit)| Job { start: index, length, number, together, habit };
                possible.clone().into_iter().map(job)
            }));
        }
        for at in (1..some.len()).rev() {
            some.swap(at, random.below(at as u64 + 1) as usize);
        }
        jobs.extend(some);
    }
    jobs
}

fn run(starts: &[Start], job: Job, walker: &mut Walker) -> Result<usize, String> {
    let start = &starts[job.start];
    let ops = sequence(&start.shape, job.length, job.number);
    let manner = format!("{job:?}");
    let before = if job.habit { habit(&start.shape) } else { Vec::new() };
    exhaust(start, &before, &ops, job.together, walker)
        .map_err(|wrong| describe(start, &ops, &manner, &wrong))?;
    Ok(before.len() + ops.len())
}

#[test]
fn no_crash_in_a_short_sequence_loses_what_was_flushed() {
    let starts: Vec<Start> = shapes().iter().map(Shape::make).collect();
    let jobs = jobs(&starts);
    let tally = Tally::new(Duration::from_secs(number("STRATA_CRASH_SECONDS").unwrap_or(40)));
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..threads() {
            scope.spawn(|| {
                let mut walker = Walker::new(&tally);
                while let Some(job) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
                    match run(&starts, *job, &mut walker) {
                        Ok(length) => tally.count_run(length),
                        Err(finding) => tally.found(finding),
                    }
                    if tally.is_over() {
                        break;
                    }
                }
            });
        }
    });
    tally.conclude(&format!("sequences, {} of {}", tally.runs(), jobs.len()));
}

#[test]
fn no_crash_in_opening_and_closing_loses_what_was_there() {
    let tally = Tally::new(Duration::from_secs(60));
    let mut walker = Walker::new(&tally);
    for start in shapes().iter().map(Shape::make) {
        if let Err(wrong) = exhaust_opening(&start, &mut walker) {
            tally.found(describe(&start, &[], "opened and closed", &wrong));
        }
        tally.count_run(0);
    }
    tally.conclude("openings");
}

#[test]
fn no_crash_while_an_io_hangs_in_opening_or_closing_loses_what_was_there() {
    let tally = Tally::new(Duration::from_secs(600));
    let mut walker = Walker::new(&tally);
    for start in shapes().iter().map(Shape::make) {
        match exhaust_hanging(&start, &mut walker) {
            Ok(runs) => (0..runs).for_each(|_| tally.count_run(3)),
            Err(wrong) => tally.found(describe(&start, &[], "an I/O hangs", &wrong)),
        }
    }
    tally.conclude("hanging I/O");
}

#[test]
fn no_crash_after_a_write_failed_beside_a_link_loses_what_was_flushed() {
    let tally = Tally::new(Duration::from_secs(600));
    let mut walker = Walker::new(&tally);
    for start in shapes().iter().map(Shape::make) {
        match exhaust_failing(&start, &mut walker) {
            Ok(runs) => (0..runs).for_each(|_| tally.count_run(6)),
            Err(wrong) => tally.found(describe(&start, &habit(&start.shape), "a write fails", &wrong)),
        }
    }
    tally.conclude("failing writes");
}
