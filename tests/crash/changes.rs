//! A change of the snapshots of an image by itself: what it makes of an image, and its crashes at every event.

use std::path::Path;
use std::sync::Arc;

use disk::snapshot::{Change, ChangeError, change};
use storage::sim::{CrashLimits, CrashScope, Image, Random, Replay, SimOptions, SimWorld};

use super::examine::examine;
use super::journal::Deed;
use super::shape::{Below, Past, Shape, Snapshots, Start, TOP};
use super::stamp::Value;
use super::tally::Tally;

/// The name of a snapshot that is made.
const NEW: &str = "new";
/// All that is done.
pub const DEEDS: [Deed; 3] = [Deed::Create, Deed::Apply, Deed::Delete];

/// Images with a snapshot.
pub fn starts() -> Vec<Start> {
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
pub type State = (Vec<Value>, Snapshots);

/// What the image is before and after.
pub fn states(start: &Start, deed: Deed) -> [State; 2] {
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

/// Does it.
///
/// # Errors
/// Why it could not be done.
pub fn run(world: &SimWorld, start: &Start, deed: Deed) -> Result<(), ChangeError> {
    let oldest = start.snapshots[0].0.clone();
    let wanted = match deed {
        Deed::Create => Change::Create { name: NEW.into(), seconds: 1, nanoseconds: 2 },
        Deed::Apply => Change::Apply { wanted: oldest },
        Deed::Delete => Change::Delete { wanted: oldest },
    };
    change(&world.storage(), Path::new(TOP), wanted, &start.shape.options()).map(drop)
}

/// Looks at what is left; which of the two states it is.
///
/// # Errors
/// Why neither.
pub fn judge(image: &Image, start: &Start, states: &[State; 2], tally: &Tally) -> Result<usize, String> {
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

/// Crashes a change everywhere: how often the image was as before, how often as after.
///
/// # Errors
/// The first crash that left neither.
pub fn crash_all(start: &Start, deed: Deed, tally: &Tally) -> Result<[u64; 2], String> {
    let limits = CrashLimits { exhaustive: 5, samples: 12, tears: 6 };
    let states = states(start, deed);
    let world = SimWorld::from_image(start.image.clone(), 5, SimOptions::default());
    run(&world, start, deed).map_err(|error| error.to_string())?;
    let history = world.history();
    let mut replay = Replay::new(&history);
    let mut random = Random::new(3);
    let mut seen = [0, 0];
    while replay.advance_to_change() {
        for plan in replay.plans(&limits, CrashScope::New, &mut random) {
            let which = judge(&replay.image(&plan), start, &states, tally);
            seen[which.map_err(|wrong| format!("{wrong}\n{}", replay.describe(&plan)))?] += 1;
        }
    }
    replay.advance_to(history.end());
    match judge(replay.durable(), start, &states, tally)? {
        0 => Err("at the end it is as it was before".into()),
        _ => Ok(seen),
    }
}
