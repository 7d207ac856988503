//! Changes of the snapshots or the size of an image, crashed at every event, and with every I/O failing in turn. The
//! disk and the list of snapshots with their contents are then, as a whole, either the old state or the new one.
//!
//! `crash_exhaustive` and `crash_random` change images between other requests.

use std::path::Path;
use std::time::Duration;

use qcow2::Compression;
use storage::Errno;
use storage_sim::{CrashLimits, CrashScope, Fault, Image, Outcome, Random, Replay, SimOptions, SimWorld};
use strata_crash::changes::{
    State, crash_all, deeds, extent, full, judge, leaks_are_found_after_all,
    no_change_takes_what_a_journal_names, refcount_table_clusters, run, starts, states, written,
};
use strata_crash::journal::{Deed, Op};
use strata_crash::recovery::serve;
use strata_crash::shape::{Below, DATA, Past, Shape, Start};
use strata_crash::stamp::SECTOR;
use strata_crash::tally::Tally;
use strata_crash::trial::{Manner, play};
use strata_crash::walk::{Choice, Walker};

#[test]
fn no_crash_leaves_a_change_half_done() {
    let tally = Tally::new(Duration::from_secs(600));
    for start in starts() {
        for deed in deeds(&start) {
            match crash_all(&start, deed, &tally) {
                Ok(seen) => assert!(seen[0] > 0 && seen[1] > 0, "{:?}, {deed:?}: {seen:?}", start.shape),
                Err(wrong) => tally.found(format!("{:?}, {deed:?}: {wrong}", start.shape)),
            }
            tally.count_run(1);
        }
    }
    tally.conclude("crashed changes");
}

/// The changes of a full image enlarge its refcount table, so the crashes above cover that, too.
#[test]
fn a_full_refcount_table_is_replaced_by_each_change_that_takes_clusters() {
    let start = full();
    assert_eq!(refcount_table_clusters(&start.image), 1);
    // Without its only snapshot the image needs no snapshot table.
    for deed in deeds(&start).into_iter().filter(|deed| *deed != Deed::Delete) {
        let world = SimWorld::from_image(start.image.clone(), 5, SimOptions::calm());
        run(&world, &start, deed).expect("it is done");
        assert!(refcount_table_clusters(&world.image()) > 1, "{deed:?}");
    }
}

/// The crashes above also cover changes that remove refblocks, and those that move the new tables again and truncate
/// the file.
#[test]
fn a_smaller_disk_has_fewer_refblocks_and_a_shorter_file() {
    let (mut fewer, mut shorter) = (0, 0);
    // A full image has no free clusters for new tables.
    for start in starts().into_iter().filter(|start| start.leaks == 0) {
        for deed in deeds(&start) {
            let Deed::Resize(to) = deed else { continue };
            if to >= start.values.len() as u64 || !start.shape.is_qcow2() {
                continue;
            }
            let world = SimWorld::from_image(start.image.clone(), 5, SimOptions::calm());
            run(&world, &start, deed).expect("it is done");
            let (before, after) = (extent(&start.image), extent(&world.image()));
            assert!(
                after.1 <= before.1,
                "{:?}, {deed:?}: the file grew from {} to {}",
                start.shape,
                before.1,
                after.1
            );
            fewer += u32::from(after.0 < before.0);
            shorter += u32::from(after.1 < before.1);
        }
    }
    assert!(fewer > 0 && shorter > 0, "fewer refblocks {fewer} times, a shorter file {shorter} times");
}

#[test]
fn every_io_of_a_change_may_fail() {
    let tally = Tally::new(Duration::from_secs(600));
    let outcomes = [Outcome::Short(Errno::EIO), Outcome::Fail(Errno::ENOSPC)];
    for start in starts() {
        // Examining the full image is slow, and it matters most for failures to find space.
        let outcomes = if start.leaks > 0 { &outcomes[1..] } else { &outcomes[..] };
        for deed in deeds(&start) {
            let states = states(&start, deed);
            for outcome in outcomes.iter().copied() {
                for nth in 0.. {
                    let world = SimWorld::from_image(start.image.clone(), nth, SimOptions::default());
                    let fault = world.inject(Fault::nth(nth, outcome));
                    let result = run(&world, &start, deed);
                    if world.hits(fault) == 0 {
                        result.expect("nothing failed");
                        break;
                    }
                    let found = after_failure(&world, &start, &states, &tally, result.is_ok());
                    if let Err(wrong) = found {
                        tally.found(format!("{:?}, {deed:?}, {outcome:?} of {nth}: {wrong}", start.shape));
                    }
                    tally.count_run(1);
                }
            }
        }
    }
    tally.conclude("failures in changes");
}

/// The free clusters at the end of the file, which trigger the search for leaks, survive a change.
#[test]
fn leaks_of_a_killed_writer_are_still_found_after_a_change() {
    leaks_are_found_after_all().expect("no leaks are left");
}

/// A daemon was killed, and its journal waits for the frontend. Before a change takes clusters that the journal names, the
/// journal is worth nothing.
#[test]
fn no_change_takes_clusters_that_a_journal_names() {
    no_change_takes_what_a_journal_names().expect("the journal is whole, or is not carried out");
}

/// A disk that shrinks in use keeps no cluster past its end, whatever version 2 can record and the policy keeps. And it
/// can be larger again: then the new part reads as zero.
#[test]
fn a_disk_that_shrinks_in_use_keeps_nothing_past_its_end() {
    let tally = Tally::new(Duration::from_secs(600));
    let shapes = [
        Shape::new(10, 96).v2().over(Below::Raw),
        Shape::new(10, 96).v2().over(Below::Qcow2).past(Past::Written),
        Shape::new(10, 96).over(Below::Raw).past(Past::Written).keeping_places(),
        Shape::new(9, 80).past(Past::Kept),
        Shape::new(12, 96).over(Below::Raw).past(Past::Compressed(Compression::Deflate)),
        Shape::new(15, 704).subclusters().over(Below::Raw).past(Past::Written),
        Shape::new(12, 100).apart().over(Below::Raw).past(Past::Written),
        Shape::new(12, 104).apart(),
        Shape::new(12, 104).apart_raw(),
    ];
    for start in shapes.map(|shape| shape.make()) {
        let (unit, sectors) = (start.shape.cluster_sectors(), start.shape.sectors);
        for smaller in [unit + unit / 2 + 1, 3 * unit, 5 * unit + 1, sectors - 1] {
            let mut script = vec![Op::write(unit, 2 * unit), Op::write(sectors - unit, unit), Op::Flush];
            script.push(Op::Live(smaller));
            let read = Op::Read { sector: 0, count: sectors.min(64) };
            script.extend([Op::write(0, 1), Op::write(smaller - 1, 1), Op::Flush, read]);
            for larger in [None, Some(smaller + 1), Some(sectors + unit)] {
                let mut script = script.clone();
                script.extend(larger.into_iter().flat_map(|larger| [Op::Live(larger), read]));
                let manner = Manner { at_once: 1, rest: false, clean: true, seed: 3 };
                let mut walker = Walker::new(&tally);
                let judged = play(&start, &script, manner).and_then(|run| {
                    assert!(run.misread.is_none(), "{:?}", run.misread);
                    walker.closed(&run, &start)?;
                    let data = run.world.image().file(Path::new(DATA)).map(|data| data.length());
                    let size = larger.unwrap_or(smaller) * SECTOR;
                    if let Some(length) = data.filter(|length| *length > size) {
                        return Err(format!("the data file has {length} bytes, the disk {size}"));
                    }
                    walker.crash(&run, &start, &Choice { states_max: 4, ..Choice::sample(20) }, 3)
                });
                if let Err(wrong) = judged {
                    let how = format!("{:?} to {smaller} and {larger:?}", start.shape);
                    tally.found(format!("{how}: {wrong}"));
                }
                tally.count_run(script.len());
            }
        }
    }
    tally.conclude("disks that shrink in use");
}

#[test]
fn a_file_that_was_searched_ends_like_one_that_was_closed() {
    let start = Shape::new(16, 1024).make();
    let [killed, closed] = [false, true].map(|clean| written(&start, clean));
    let served = serve(&killed.image, &killed).expect("it is served");
    let ends = [&killed.image, &served, &closed.image].map(|image| extent(image).1);
    assert!(ends[0] > ends[1] && ends[1] == ends[2], "{ends:?}");
}

/// Checks that the image now, and after a crash, has one of the two states. If `done`, it must be the second.
fn after_failure(
    world: &SimWorld,
    start: &Start,
    states: &[State; 2],
    tally: &Tally,
    done: bool,
) -> Result<(), String> {
    let history = world.history();
    let mut replay = Replay::new(&history);
    replay.advance_to(history.end());
    let limits = CrashLimits { exhaustive: 2, samples: 2, tears: 2 };
    let mut images: Vec<Image> = vec![world.image()];
    let plans = replay.plans(&limits, CrashScope::All, &mut Random::new(9));
    images.extend(plans.iter().map(|plan| replay.image(plan)));
    for image in images {
        let which = judge(&image, start, states, tally)?;
        if done && which == 0 {
            return Err("it was said to be done, and is not".into());
        }
    }
    Ok(())
}
