//! Every I/O of some runs fails in turn, in every way. The guest's request fails, and nothing is half linked, hangs or
//! panics. After a failed metadata write or fdatasync the disk refuses writes for good; after any other failure it
//! continues.
//!
//! `STRATA_FAULT_SEEDS=n` tries this many orders of polls and latencies of each run.

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use storage::Errno;
use storage_sim::{Fault, Image, Outcome, SimOptions, SimWorld, Verb};
use strata_crash::changes::written;
use strata_crash::direct::{open, try_write, write};
use strata_crash::examine::examine;
use strata_crash::faulty::{FAILURES, Trouble, play};
use strata_crash::journal::Op;
use strata_crash::recovery::{serve, wait_for_search};
use strata_crash::rig::Rig;
use strata_crash::rig::releasing::Release;
use strata_crash::shape::{Below, FIRST_WRITE, Past, Shape, Start, TOP};
use strata_crash::tally::Tally;
use strata_crash::trial::{Manner, describe};
use strata_crash::walk::{Choice, Walker};
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

/// A daemon closes the disk before it lets another have the image. Whatever I/O of that fails, the disk is used on: what
/// was free at the end of the file is used again, and nothing old shows there.
#[test]
fn a_disk_that_cannot_be_released_is_used_on() {
    let tally = Tally::new(Duration::from_secs(600));
    let mut used_on = 0;
    for scenario in scenarios().iter().filter(|scenario| scenario.at_once == 1) {
        for outcome in [Outcome::Fail(Errno::EIO), Outcome::Fail(Errno::ENOSPC), Outcome::Short(Errno::EIO)] {
            for nth in 0.. {
                match released(scenario, Fault::nth(nth, outcome), nth, &tally) {
                    Ok(Released::Unhurt) => break,
                    Ok(Released::UsedOn) => used_on += 1,
                    Ok(Released::Failed) => {}
                    Err(wrong) => tally.found(format!("{}, {outcome:?} of {nth}: {wrong}", scenario.name)),
                }
                tally.count_run(scenario.script.len());
            }
        }
    }
    tally.conclude("failures in a release");
    assert!(used_on > 20, "only {used_on} disks were used on");
}

/// What became of a disk whose release met a fault.
enum Released {
    /// The fault was not met.
    Unhurt,
    /// The disk was used on, or was closed in spite of it.
    UsedOn,
    /// The disk refuses writes.
    Failed,
}

fn released(scenario: &Scenario, fault: Fault, seed: u64, tally: &Tally) -> Result<Released, String> {
    let start = &scenario.start;
    let unit = start.shape.cluster_sectors();
    let everywhere = |op: &dyn Fn(u64) -> Op| -> Vec<Op> {
        (0..start.shape.sectors / unit).map(|cluster| op(cluster * unit)).collect()
    };
    let (all, half) = (start.shape.sectors, unit / 2);
    let mut rig = Rig::open(start, seed).map_err(|error| error.to_string())?;
    rig.play(&scenario.script, 1);
    // The end of the file becomes free.
    rig.play(&[Op::Discard { sector: 0, count: all }, Op::Flush], 1);
    let Release { result, hit } = rig.release(fault);
    let released = match (hit, rig.has_failed()) {
        (false, _) => Released::Unhurt,
        (true, true) => Released::Failed,
        (true, false) => Released::UsedOn,
    };
    let mut run = if result.is_ok() || rig.has_failed() {
        rig.abandon()
    } else {
        // Each write covers a part of a new cluster, and the rest must read as zero.
        rig.play(&everywhere(&|sector| Op::write(sector + half, 1)), 1);
        let reads = everywhere(&|sector| Op::Read { sector, count: unit });
        rig.play(&[Op::Flush], 1);
        rig.play(&reads, 1);
        rig.finish()
    };
    if let Some(misread) = run.misread.take() {
        return Err(misread);
    }
    if let Some((index, error)) = run.failures.first() {
        return Err(format!("request {index} failed: {error}"));
    }
    if let Err(error) = &run.closed {
        return Err(format!("the disk that was used on is not closed: {error}"));
    }
    let mut walker = Walker::new(tally);
    // A file that was cut although the host said otherwise may end without free clusters.
    walker.unmarked = true;
    if !matches!(released, Released::Failed) {
        walker.closed(&run, start)?;
    }
    walker.crash(&run, start, &Choice { states_max: 4, ..Choice::sample(40) }, seed)?;
    Ok(released)
}

/// The housekeeper ends with a release. If that fails, the search for leaks goes on with the next one.
#[test]
fn leaks_are_searched_for_after_a_failed_release() {
    let start = Shape::new(16, 1024).make();
    let killed = written(&start, false);
    assert!(examine(&killed.image, &killed).leaks > 0);
    for verb in [Verb::Write, Verb::Read] {
        let world = SimWorld::from_image(killed.image.clone(), 1, SimOptions::calm());
        let mut disk = open(&world, &killed.shape);
        write(&disk, 0, 1, FIRST_WRITE + 5000);
        // It has no time to search.
        drop(disk.keeper().expect("a housekeeper"));
        let full = world.inject(Fault::nth(0, Outcome::Fail(Errno::ENOSPC)).of(verb));
        let finished = disk.finish();
        assert!(world.hits(full) > 0, "{verb:?}");
        world.withdraw_faults();
        if finished.is_err() {
            let mut keeper = disk.keeper().expect("a housekeeper");
            wait_for_search(&disk, &mut keeper).expect("a search");
            drop(keeper);
            disk.close().expect("a clean close");
        }
        let end = if verb == Verb::Read { serve(&world.image(), &killed) } else { Ok(world.image()) };
        assert_eq!(examine(&end.expect("it is served"), &killed).leaks, 0, "after a failed {verb:?}");
    }
}

/// The host lengthens the file for new clusters, but has no space for their refblocks. A clean close cuts that off again.
#[test]
fn a_file_that_was_lengthened_in_vain_is_cut_at_the_close() {
    let start = Shape::new(9, 176).wide_refcounts().make();
    let length = |image: &Image| image.file(Path::new(TOP)).expect("the image").length();
    let world = SimWorld::from_image(start.image.clone(), 1, SimOptions::calm());
    let disk = open(&world, &start.shape);
    // The rest of the first refblock.
    write(&disk, 0, 40, FIRST_WRITE);
    let before = length(&world.image());
    let full = world.inject(Fault::nth(0, Outcome::Fail(Errno::ENOSPC)).of(Verb::Allocate).lasting());
    try_write(&disk, 40, 100, FIRST_WRITE).expect_err("no space");
    assert!(world.hits(full) > 0 && length(&world.image()) > before);
    world.withdraw_faults();
    disk.close().expect("a clean close");
    // Without the free clusters at the end of a file in use.
    assert!(length(&world.image()) < before);
    assert_eq!(examine(&world.image(), &start).leaks, 0);
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
