//! A change of the snapshots of an image, crashed at every event, and with every I/O failing in turn: the disk is then
//! what it was or what it was to become, as a whole, and so is the list of snapshots, each with its contents.
//!
//! In the midst of other requests snapshots change in `crash_exhaustive` and `crash_random`.

mod crash;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crash::examine::examine;
use crash::journal::Deed;
use crash::shape::{Below, Past, Shape, Snapshots, Start, TOP};
use crash::stamp::Value;
use crash::tally::Tally;
use disk::snapshot::{Change, ChangeError, change};
use storage::Errno;
use storage::sim::{CrashLimits, CrashScope, Fault, Image, Outcome, Random, Replay, SimOptions, SimWorld};

const NEW: &str = "new";
const DEEDS: [Deed; 3] = [Deed::Create, Deed::Apply, Deed::Delete];

fn starts() -> Vec<Start> {
    let shapes = [
        Shape::new(9, 80),
        Shape::new(9, 80).v2(),
        Shape::new(12, 128),
        Shape::new(10, 96).v2().over(Below::Raw),
        Shape::new(9, 96).narrow_refcounts(),
        // New refblocks.
        Shape::new(9, 200).wide_refcounts(),
    ];
    shapes.map(|shape| shape.past(Past::Kept).make()).to_vec()
}

/// What an image is: its disk and its snapshots.
type State = (Vec<Value>, Snapshots);

/// What the image is before and after.
fn states(start: &Start, deed: Deed) -> [State; 2] {
    let (values, kept) = (start.values.clone(), start.snapshots.clone());
    let after = match deed {
        Deed::Create => {
            let new = (NEW.to_owned(), Arc::from(values.clone()));
            (values.clone(), [kept.clone(), vec![new]].concat())
        }
        Deed::Apply => (kept[0].1.to_vec(), kept.clone()),
        Deed::Delete => (values.clone(), kept[1..].to_vec()),
    };
    [(values, kept), after]
}

fn run(world: &SimWorld, start: &Start, deed: Deed) -> Result<(), ChangeError> {
    let oldest = start.snapshots[0].0.clone();
    let wanted = match deed {
        Deed::Create => Change::Create { name: NEW.into(), seconds: 1, nanoseconds: 2 },
        Deed::Apply => Change::Apply { wanted: oldest },
        Deed::Delete => Change::Delete { wanted: oldest },
    };
    change(&world.storage(), Path::new(TOP), wanted, &start.shape.options()).map(drop)
}

/// Looks at what is left; which of the two states it is, or why neither.
fn judge(image: &Image, start: &Start, states: &[State; 2], tally: &Tally) -> Result<usize, String> {
    tally.count_state(image.hash());
    let seen = examine(image, start);
    if let Some(wrong) = seen.wrong {
        return Err(wrong);
    }
    tally.second.ask(image, start, &seen)?;
    let state = (seen.values, seen.snapshots);
    let found = states.iter().position(|known| *known == state);
    found.ok_or_else(|| {
        let names: Vec<&String> = state.1.iter().map(|(name, _)| name).collect();
        let like = states.each_ref().map(|known| known.0 == state.0);
        format!("neither before nor after: the disk is as {like:?}, the snapshots are {names:?}")
    })
}

#[test]
fn no_crash_leaves_a_change_half_done() {
    let tally = Tally::new(Duration::from_secs(600));
    let limits = CrashLimits { exhaustive: 5, samples: 12, tears: 6 };
    for start in starts() {
        for deed in DEEDS {
            let states = states(&start, deed);
            let world = SimWorld::from_image(start.image.clone(), 5, SimOptions::default());
            run(&world, &start, deed).unwrap_or_else(|error| panic!("{:?}, {deed:?}: {error}", start.shape));
            let history = world.history();
            let mut replay = Replay::new(&history);
            let mut random = Random::new(3);
            let mut seen = [0, 0];
            while replay.advance_to_change() {
                for plan in replay.plans(&limits, CrashScope::New, &mut random) {
                    match judge(&replay.image(&plan), &start, &states, &tally) {
                        Ok(which) => seen[which] += 1,
                        Err(wrong) => tally.found(format!(
                            "{:?}, {deed:?}: {wrong}\n{}",
                            start.shape,
                            replay.describe(&plan)
                        )),
                    }
                }
            }
            replay.advance_to(history.end());
            let end = judge(replay.durable(), &start, &states, &tally);
            assert_eq!(end, Ok(1), "{:?}, {deed:?}: after the end", start.shape);
            assert!(seen[0] > 0 && seen[1] > 0, "{:?}, {deed:?}: {seen:?}", start.shape);
            tally.count_run(1);
        }
    }
    tally.conclude("crashed changes");
}

#[test]
fn every_io_of_a_change_may_fail() {
    let tally = Tally::new(Duration::from_secs(600));
    let outcomes = [Outcome::Short(Errno::EIO), Outcome::Fail(Errno::ENOSPC)];
    for start in starts() {
        for deed in DEEDS {
            let states = states(&start, deed);
            for outcome in outcomes {
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

/// What is there now, and what a crash would leave of it, is one of the two states, and the second if that was said.
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
