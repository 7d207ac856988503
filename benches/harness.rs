//! The two ways to run a micro-benchmark: by time with criterion, and a fixed number of times under callgrind, which
//! counts its instructions.
//!
//! Owns the command line of every benchmark of this package. It defines no operation itself.

use std::hint::black_box;
use std::process::exit;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput};

/// A benchmark: its name and its set-up.
pub type Named = (&'static str, fn() -> Case);

/// A repeated piece of work.
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
    /// A case whose `run` is measured and does `operations` operations; `prepare` runs before each `run`.
    pub fn new<S: 'static>(
        operations: u64,
        state: S,
        prepare: impl FnMut(&mut S) + 'static,
        run: impl FnMut(&mut S) + 'static,
    ) -> Self {
        Case { operations, steps: Box::new(With { state, prepare, run }) }
    }
}

/// Runs the cases as the command line requires: `--cases` lists them, `--count NAME RUNS` is for callgrind, other
/// arguments go to criterion.
pub fn main(group: &str, cases: &[Named]) {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words[..] {
        ["--cases"] => cases.iter().for_each(|(name, make)| println!("{}\t{name}", make().operations)),
        ["--count", wanted, runs] => {
            let case = cases.iter().find(|(name, _)| *name == wanted);
            let (Some((_, make)), Ok(runs)) = (case, runs.parse()) else {
                eprintln!("{wanted:?} is not a case, or {runs:?} is not a number");
                exit(2);
            };
            count(make(), runs);
        }
        _ => by_time(group, cases),
    }
}

/// Runs a case under callgrind. The first run, with empty caches and unallocated vectors, is not counted.
fn count(mut case: Case, runs: u64) {
    case.steps.prepare();
    case.steps.run();
    for _ in 0..runs {
        case.steps.prepare();
        counted_run(&mut *case.steps);
    }
}

/// Callgrind counts the instructions in this function, by its name.
#[inline(never)]
fn counted_run(steps: &mut dyn Steps) {
    steps.run();
    // Prevents a tail call, with which the function would end before `run`.
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
