//! Every I/O of some runs fails in turn, in every way. The guest's request fails, and nothing is half linked, hangs or
//! panics. After a failed metadata write or fdatasync the disk refuses writes for good; after any other failure it
//! continues.
//!
//! `STRATA_FAULT_SEEDS=n` tries this many orders of polls and latencies of each run.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use storage_sim::Verb;
use strata_crash::faulty::{FAILURES, Trouble, play};
use strata_crash::journal::Op;
use strata_crash::shape::{Below, Past, Shape, Start};
use strata_crash::tally::Tally;
use strata_crash::trial::{Manner, describe};
use strata_crash::walk::Walker;
use strata_crash::{number, threads};

/// A run whose I/Os fail in turn.
struct Scenario {
    name: &'static str,
    start: Start,
    script: Vec<Op>,
    at_once: usize,
}

fn scenarios() -> Vec<Scenario> {
    let written = |shape: Shape| shape.past(Past::Written);
    let everything = |shape: Shape| {
        let unit = shape.cluster_sectors();
        vec![
            Op::write(0, unit),
            Op::Read { sector: 0, count: shape.sectors.min(64) },
            Op::write(3 * unit + unit / 2, 1),
            Op::Flush,
            Op::Discard { sector: unit, count: 2 * unit },
            Op::Zeroes { sector: 4 * unit, count: unit, unmap: true },
            Op::Flush,
            Op::Pause(300),
            Op::Zeroes { sector: 5 * unit, count: unit, unmap: false },
            Op::write(5 * unit, 1),
            Op::write(unit, 3 * unit),
            Op::Write { sector: 7 * unit, count: 1, through: true },
            Op::Pause(6000),
            Op::write(shape.sectors - 2 * unit, 2 * unit),
            Op::Flush,
            Op::Read { sector: 0, count: shape.sectors.min(64) },
        ]
    };
    let growth = |shape: Shape| {
        let half = shape.sectors / 2;
        vec![
            Op::write(0, half),
            Op::Flush,
            Op::write(half, shape.sectors - half),
            Op::Discard { sector: 2, count: 40 },
            Op::Flush,
            Op::Pause(300),
            Op::write(4, 20),
            Op::Flush,
        ]
    };
    // From the third write on, the disk makes early commits.
    let each_flushed = |shape: Shape| {
        let clusters = shape.sectors / shape.cluster_sectors();
        let writes = (1..7).map(|back| (clusters - back) * shape.cluster_sectors());
        let script = writes.flat_map(|sector| [Op::write(sector, 1), Op::Flush]);
        script.chain([Op::Pause(6000), Op::write(0, 1), Op::Flush]).collect()
    };
    let small = written(Shape::new(9, 96));
    let four = written(Shape::new(12, 128));
    let over = written(Shape::new(10, 96).over(Below::Qcow2));
    let fresh = Shape::new(12, 128);
    let old = written(Shape::new(9, 80).v2().over(Below::Raw));
    let parts = written(Shape::new(15, 512).subclusters());
    let apart = written(Shape::new(10, 96).apart().over(Below::Raw));
    let apart_raw = written(Shape::new(9, 96).apart_raw());
    let packed = Shape::new(9, 80).past(Past::Compressed(qcow2::Compression::Deflate));
    let long = Shape::new(9, 176).wide_refcounts().past(Past::Long);
    let scenario = |name, shape: Shape, script: Vec<Op>, at_once| Scenario {
        name,
        start: shape.make(),
        script,
        at_once,
    };
    vec![
        scenario("clusters of 512 bytes", small, everything(small), 1),
        scenario("clusters of 4 KiB, together", four, everything(four), 4),
        scenario("over qcow2", over, everything(over), 1),
        scenario("compressed clusters", packed, everything(packed), 1),
        scenario("version 2 over raw", old, everything(old), 1),
        scenario("data apart", apart, everything(apart), 1),
        scenario("data apart, raw, together", apart_raw, everything(apart_raw), 4),
        scenario("subclusters", parts, everything(parts), 1),
        scenario("a flush after each", fresh, each_flushed(fresh), 1),
        scenario("a flush after each, together", fresh, each_flushed(fresh), 4),
        scenario("growth", long, growth(long), 1),
        scenario("growth, together", long, growth(long), 4),
    ]
}

/// Every failure of every I/O of a scenario.
fn troubles(scenario: &Scenario, manner: Manner) -> Vec<Trouble> {
    let aftermath = play(&scenario.start, &scenario.script, manner, &[]).expect("it runs without a failure");
    let world = aftermath.run.expect("it opens").world;
    let mut troubles = Vec::new();
    for verb in Verb::ALL {
        for nth in 0..world.count(verb) {
            for lasting in [false, true] {
                troubles.extend(FAILURES.map(|outcome| Trouble { verb, nth, lasting, outcome }));
            }
        }
    }
    troubles
}

#[test]
fn every_io_may_fail() {
    let tally = Tally::new(Duration::from_secs(number("STRATA_CRASH_SECONDS").unwrap_or(600)));
    let scenarios = scenarios();
    let mut jobs = Vec::new();
    for seed in 1..=number("STRATA_FAULT_SEEDS").unwrap_or(3) {
        for scenario in &scenarios {
            let manner = Manner { at_once: scenario.at_once, rest: true, clean: true, seed };
            let troubles = troubles(scenario, manner);
            assert!(troubles.len() > 200, "{}: {} failures are too few", scenario.name, troubles.len());
            jobs.extend(troubles.into_iter().map(|trouble| (scenario, manner, trouble)));
        }
    }
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..threads() {
            scope.spawn(|| {
                let mut walker = Walker::new(&tally);
                while let Some(job) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let (Scenario { name, start, script, .. }, manner, trouble) = job;
                    let judged = play(start, script, *manner, &[*trouble])
                        .and_then(|aftermath| aftermath.judge(trouble, start, &mut walker, *manner));
                    tally.count_run(script.len());
                    if let Err(wrong) = judged {
                        let how = format!("{name}, {trouble:?}, {manner:?}");
                        tally.found(describe(start, script, &how, &wrong));
                    }
                    if tally.is_over() {
                        break;
                    }
                }
            });
        }
    });
    tally.conclude(&format!("failures, {} of {}", tally.runs(), jobs.len()));
}
