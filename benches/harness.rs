//! The two ways to run a micro-benchmark: by time, as criterion does, and a fixed number of times, for callgrind to count
//! its instructions.
//!
//! Owns the command line of every benchmark of this package. What is measured is theirs.

use std::hint::black_box;
use std::process::exit;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput};

/// A benchmark: its name, and how to set it up.
pub type Named = (&'static str, fn() -> Case);

/// Something that is done again and again.
pub struct Case {
    operations: u64,
    steps: Box<dyn Steps>,
}

trait Steps {
    fn prepare(&mut self);
    fn run(&mut self);
}

struct With<S, P, R> {
    state: S,
    prepare: P,
    run: R,
}

impl<S, P: FnMut(&mut S), R: FnMut(&mut S)> Steps for With<S, P, R> {
    fn prepare(&mut self) {
        (self.prepare)(&mut self.state);
    }

    fn run(&mut self) {
        (self.run)(&mut self.state);
    }
}

impl Case {
    /// A case of which `run` is measured, in which so many operations are done; `prepare` goes before each.
    pub fn new<S: 'static>(
        operations: u64,
        state: S,
        prepare: impl FnMut(&mut S) + 'static,
        run: impl FnMut(&mut S) + 'static,
    ) -> Self {
        Case { operations, steps: Box::new(With { state, prepare, run }) }
    }
}

/// Runs the cases as the command line says: `--cases` lists them, `--count NAME RUNS` is for callgrind, anything else
/// goes to criterion.
pub fn main(group: &str, cases: &[Named]) {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words[..] {
        ["--cases"] => cases.iter().for_each(|(name, make)| println!("{}\t{name}", make().operations)),
        ["--count", wanted, runs] => {
            let case = cases.iter().find(|(name, _)| *name == wanted);
            let (Some((_, make)), Ok(runs)) = (case, runs.parse()) else {
                eprintln!("no case {wanted:?}, or no number: {runs:?}");
                exit(2);
            };
            count(make(), runs);
        }
        _ => by_time(group, cases),
    }
}

/// The first run, which meets empty caches and vectors without memory, is not counted.
fn count(mut case: Case, runs: u64) {
    case.steps.prepare();
    case.steps.run();
    for _ in 0..runs {
        case.steps.prepare();
        counted_run(&mut *case.steps);
    }
}

/// Callgrind counts what happens in here, by this name.
#[inline(never)]
fn counted_run(steps: &mut dyn Steps) {
    steps.run();
    // Something is left to do, so that this function is not left by a jump.
    black_box(());
}

fn by_time(group: &str, cases: &[Named]) {
    let mut criterion = Criterion::default().configure_from_args();
    let mut group = criterion.benchmark_group(group);
    for (name, make) in cases {
        let mut case = make();
        group.throughput(Throughput::Elements(case.operations));
        group.bench_function(*name, |bencher| {
            bencher.iter_custom(|rounds| {
                let mut taken = Duration::ZERO;
                for _ in 0..rounds {
                    case.steps.prepare();
                    let began = Instant::now();
                    case.steps.run();
                    taken += began.elapsed();
                }
                taken
            });
        });
    }
    group.finish();
    criterion.final_summary();
}
