//! A single change of the snapshots or the size of an image: its result, and crashes at every event.

use std::path::Path;
use std::sync::Arc;

use disk::resize::{NewSize, Shrinking, resize};
use disk::snapshot::{Change, change};
use qcow2::{Compression, Header};
use storage::Errno;
use storage_sim::{CrashLimits, CrashScope, Fault, Image, Outcome, Random, Replay, SimOptions, SimWorld};

use super::deaths::{memory_for, succeed, words_of};
use super::direct;
use super::examine::examine;
use super::journal::{Deed, Op};
use super::recovery::serve;
use super::sequences::sizes;
use super::shape::{Below, FIRST_WRITE, Past, Shape, Snapshots, Start, TOP};
use super::stamp::{SECTOR, Value};
use super::tally::Tally;
use super::trial::{Manner, play};

/// The name of a new snapshot.
const NEW: &str = "new";

/// All possible changes of an image.
pub fn deeds(start: &Start) -> Vec<Deed> {
    let mut deeds = Vec::new();
    if !start.snapshots.is_empty() {
        deeds.extend([Deed::Create, Deed::Apply, Deed::Delete]);
    }
    let shape = &start.shape;
    if shape.is_resizable() {
        let now = start.values.len() as u64;
        // To the end of the cluster, and to a sector before it.
        let edge = now.next_multiple_of(shape.cluster_sectors());
        let near = [edge, edge - 1].into_iter().filter(|to| *to > now);
        // If zeros cannot hide the backing file, only this far.
        let most = if shape.discards_nothing() { edge } else { u64::MAX };
        let far = sizes(shape).into_iter().filter(|to| *to != now && *to <= most);
        deeds.extend(near.chain(far).map(Deed::Resize));
    }
    deeds
}

/// Images, most of them with a snapshot. Some disks end in the middle of a cluster, with data after the end.
pub fn starts() -> Vec<Start> {
    let kept = [
        Shape::new(9, 80),
        Shape::new(9, 80).v2(),
        Shape::new(12, 128),
        Shape::new(10, 96).v2().over(Below::Raw),
        Shape::new(9, 96).narrow_refcounts(),
        // These need new refblocks.
        Shape::new(9, 200).wide_refcounts(),
    ];
    let plain = [
        // The backing file is longer. At the new end, the disk has a table or none.
        Shape::new(9, 200).over(Below::Raw),
        Shape::new(12, 128).over(Below::Raw).past(Past::Written),
        Shape::new(10, 98).v2().over(Below::Qcow2).past(Past::Written),
        Shape::new(9, 80).v2().past(Past::Written),
        // These have refblocks without references once the disk is smaller.
        Shape::new(9, 200).wide_refcounts().past(Past::Written),
        Shape::new(14, 320).subclusters().over(Below::Raw).past(Past::Written),
        Shape::new(12, 96).past(Past::Compressed(Compression::Deflate)),
        Shape::raw(64).past(Past::Written),
        Shape::new(12, 100).apart().over(Below::Raw).past(Past::Written),
        Shape::new(12, 100).apart_raw().past(Past::Written),
    ];
    let mut starts: Vec<Start> = kept.map(|shape| shape.past(Past::Kept).make()).to_vec();
    starts.extend(plain.map(|shape| shape.make()));
    starts.push(full());
    let smaller: Vec<Start> = starts.iter().filter(|start| start.shape.is_resizable()).map(shrunk).collect();
    starts.into_iter().chain(smaller).collect()
}

/// An image in which every cluster that its refcount table can count is in use. Most of them are leaks. The next
/// allocation needs a larger table.
pub fn full() -> Start {
    let start = Shape::new(9, 80).wide_refcounts().past(Past::Kept).make();
    let geometry = start.shape.geometry();
    let mut bytes = start.image.file(Path::new(TOP)).expect("the image").to_bytes();
    let header = Header::parse(&bytes, bytes.len() as u64).expect("an image that was closed");
    let (size, entries) = (geometry.cluster_size() as usize, geometry.refblock_entries() as usize);
    let table = header.refcount_table_offset.0 as usize;
    let blocks = header.refcount_table_clusters as usize * size / 8;
    bytes.resize(blocks * entries * size, 0);
    for index in 0..blocks {
        if qcow2::entry(&bytes[table..], index) == 0 {
            // There is no refblock yet: put it in the first cluster that it counts.
            qcow2::set_entry(&mut bytes[table..], index, (index * entries * size) as u64);
        }
        let block = qcow2::entry(&bytes[table..], index) as usize;
        for count in 0..entries {
            let counts = &mut bytes[block..block + size];
            if qcow2::refcount(geometry.refcount_order, counts, count) == 0 {
                qcow2::set_refcount(geometry.refcount_order, counts, count, 1);
            }
        }
    }
    let leaks = (blocks * entries) as u64;
    Start { image: start.image.with(Path::new(TOP), 0, &bytes), leaks, ..start }
}

/// Clusters of an image's refcount table.
pub fn refcount_table_clusters(image: &Image) -> u32 {
    let bytes = image.file(Path::new(TOP)).expect("the image").to_bytes();
    Header::parse(&bytes, bytes.len() as u64).expect("an image that was closed").refcount_table_clusters
}

/// The number of refblocks of an image, and the length of its file in bytes.
pub fn extent(image: &Image) -> (usize, usize) {
    let bytes = image.file(Path::new(TOP)).expect("the image").to_bytes();
    let header = Header::parse(&bytes, bytes.len() as u64).expect("an image that was closed");
    let table = &bytes[header.refcount_table_offset.0 as usize..];
    let entries = u64::from(header.refcount_table_clusters) << header.cluster_bits >> 3;
    let blocks = (0..entries as usize).filter(|index| qcow2::entry(table, *index) != 0).count();
    (blocks, bytes.len())
}

/// An image whose disk has become smaller.
fn shrunk(start: &Start) -> Start {
    let to = Deed::Resize(sizes(&start.shape)[0]);
    let world = SimWorld::from_image(start.image.clone(), 4, SimOptions::calm());
    run(&world, start, to).expect("it shrinks");
    let [_, (values, _)] = states(start, to);
    Start { image: world.image(), values, ..start.clone() }
}

/// The state of an image: its disk and its snapshots.
pub type State = (Vec<Value>, Snapshots);

/// The states before and after a change.
pub fn states(start: &Start, deed: Deed) -> [State; 2] {
    let (values, kept) = (start.values.clone(), start.snapshots.clone());
    let after = match deed {
        Deed::Create => {
            let new = (NEW.to_owned(), Arc::from(values.clone()));
            (values.clone(), [kept.clone(), vec![new]].concat())
        }
        Deed::Apply => (kept[0].1.to_vec(), kept.clone()),
        Deed::Delete => (values.clone(), kept[1..].to_vec()),
        Deed::Resize(sectors) => {
            let mut values = values.clone();
            values.resize(sectors as usize, Value::Zero);
            (values, kept.clone())
        }
    };
    [(values, kept), after]
}

/// Makes the change.
///
/// # Errors
/// The reason why it failed.
pub fn run(world: &SimWorld, start: &Start, deed: Deed) -> Result<(), String> {
    let (storage, options) = (world.storage(), start.shape.options());
    let oldest = start.snapshots.first().map(|(name, _)| name.clone()).unwrap_or_default();
    let wanted = match deed {
        Deed::Resize(sectors) => {
            let size = NewSize::Of(sectors * SECTOR);
            let resized = resize(storage, Path::new(TOP), size, Shrinking::Accepted, &options);
            return resized.map(drop).map_err(|error| error.to_string());
        }
        Deed::Create => Change::Create { name: NEW.into(), seconds: 1, nanoseconds: 2 },
        Deed::Apply => Change::Apply { wanted: oldest },
        Deed::Delete => Change::Delete { wanted: oldest },
    };
    change(&storage, Path::new(TOP), wanted, &options).map(drop).map_err(|error| error.to_string())
}

/// Examines the image, and returns which of the two states it has.
///
/// # Errors
/// The reason why it has neither.
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

/// Crashes a change at every event. Returns how often the image was as before and how often as after.
///
/// # Errors
/// The first crash that left neither state.
pub fn crash_all(start: &Start, deed: Deed, tally: &Tally) -> Result<[u64; 2], String> {
    let limits = CrashLimits { exhaustive: 5, samples: 12, tears: 6 };
    let states = states(start, deed);
    let world = SimWorld::from_image(start.image.clone(), 5, SimOptions::default());
    run(&world, start, deed)?;
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

/// An image after a flushed write and a flushed discard. Its writer closed it if `clean`, or else was killed.
pub fn written(start: &Start, clean: bool) -> Start {
    let count = start.shape.cluster_sectors();
    let script = [Op::write(0, count), Op::Flush, Op::Discard { sector: 0, count }, Op::Flush];
    let manner = Manner { at_once: 1, rest: false, clean, seed: 7 };
    let run = play(start, &script, manner).expect("it runs");
    Start { image: run.world.image(), values: run.settled_values(), ..start.clone() }
}

/// Crashes every change of an image whose daemon was killed and has left a journal, and has each failing at every I/O.
/// Whoever brings the journal back then gets what the daemon had acknowledged, or nothing of the journal.
///
/// # Errors
/// The first state in which the journal is neither whole nor worth nothing.
pub fn no_change_takes_what_a_journal_names() -> Result<(), String> {
    let start = Shape::new(9, 64).past(Past::Kept).make();
    let world = SimWorld::from_image(start.image.clone(), 1, SimOptions::calm());
    let memory = memory_for(32);
    let disk = direct::open(&world, &start.shape);
    disk.keep_journal(Some(memory.clone())).map_err(|error| error.to_string())?;
    // Nothing is flushed, so no count on the disk says that the new clusters are in use.
    direct::write(&disk, 0, 64, FIRST_WRITE + 500);
    let (left, words) = (world.image(), words_of(&memory));
    let answered = vec![Value::Write(FIRST_WRITE + 500); 64];
    for deed in [Deed::Create, Deed::Delete, Deed::Resize(sizes(&start.shape)[1])] {
        let follow = |image: Image| {
            let (image, replayed) = succeed(image, &start.top, &start.shape, &words)?;
            let seen = examine(&image, &start);
            let is_whole = seen.values.len() >= 64 && seen.values[..64] == answered;
            match seen.wrong {
                Some(wrong) => Err(wrong),
                None if replayed > 0 && !is_whole => Err("what was carried out is not there".to_owned()),
                None => Ok(replayed > 0),
            }
        };
        let place = |wrong: String| format!("{deed:?}: {wrong}");
        let whole = SimWorld::from_image(left.clone(), 5, SimOptions::default());
        run(&whole, &start, deed).map_err(place)?;
        let history = whole.history();
        let (mut replay, mut random) = (Replay::new(&history), Random::new(3));
        let limits = CrashLimits { exhaustive: 3, samples: 4, tears: 2 };
        let (mut with, mut without) = (0, 0);
        while replay.advance_to_change() {
            for plan in replay.plans(&limits, CrashScope::New, &mut random) {
                let found = follow(replay.image(&plan));
                let found = found.map_err(|wrong| place(format!("{wrong}\n{}", replay.describe(&plan))))?;
                *(if found { &mut with } else { &mut without }) += 1;
            }
        }
        for nth in 0.. {
            let failing = SimWorld::from_image(left.clone(), 5, SimOptions::default());
            let fault = failing.inject(Fault::nth(nth, Outcome::Fail(Errno::EIO)));
            let _ = run(&failing, &start, deed);
            if failing.hits(fault) == 0 {
                break;
            }
            follow(failing.image()).map_err(|wrong| place(format!("I/O {nth} failed: {wrong}")))?;
        }
        if with == 0 || without == 0 {
            return Err(place(format!("carried out after {with} crashes, and not after {without}")));
        }
    }
    Ok(())
}

/// Makes every change of images whose last writer was killed, and serves them until the search for leaks ends.
///
/// # Errors
/// A leak that remains, or another fault.
pub fn leaks_are_found_after_all() -> Result<(), String> {
    let mut leaky = 0;
    for start in starts().iter().filter(|start| start.leaks == 0 && start.shape.is_qcow2()) {
        let killed = written(start, false);
        leaky += u32::from(examine(&killed.image, &killed).leaks > 0);
        for deed in deeds(&killed) {
            let place = |wrong: &str| format!("{:?}, {deed:?}: {wrong}", start.shape);
            let world = SimWorld::from_image(killed.image.clone(), 5, SimOptions::calm());
            run(&world, &killed, deed)?;
            let [_, (values, snapshots)] = states(&killed, deed);
            let after = Start { values, snapshots, ..killed.clone() };
            let seen = examine(&serve(&world.image(), &after)?, &after);
            if let Some(wrong) = seen.wrong {
                return Err(place(&wrong));
            }
            if seen.leaks > 0 {
                return Err(place("clusters leak"));
            }
            if seen.values != after.values || seen.snapshots != after.snapshots {
                return Err(place("the disk or its snapshots are not what they were"));
            }
        }
    }
    if leaky > 5 { Ok(()) } else { Err(format!("only {leaky} killed writers left leaks")) }
}
