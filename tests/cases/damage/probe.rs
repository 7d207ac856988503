//! Probes an image: our disk opens, reads, writes and closes it. This runs on a simulated host in one thread, so that
//! time and memory can be measured.

use std::collections::BTreeMap;
use std::time::Duration;

use disk::check::{Report, Verdict};
use disk::{DiskOptions, OpenError};
use storage_sim::SimWorld;

use strata_fuzz_targets::host::{bytes, checked, options, world};
use strata_fuzz_targets::session::Session;
use strata_rig::victims::{DATA, UNIT, Victim};

/// The contents at a place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Read {
    /// One byte throughout.
    All(u8),
    /// Different bytes.
    Mixed,
    /// The reason why it cannot be read.
    Fails(String),
}

/// How an image can be opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Opened {
    /// For writing.
    Writable,
    /// For reading only, and why not for writing.
    ReadOnly(String),
    /// Not at all, and why.
    Refused(String),
}

/// The outcome of a probe.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The checker's verdict before the probe and the kinds of its findings, or why it could not check.
    pub checked: Result<(Verdict, Vec<&'static str>), String>,
    /// How it was opened.
    pub opened: Opened,
    /// The contents by place.
    pub reads: BTreeMap<u64, Read>,
    /// The writes that were tried, each with the reason if it failed.
    pub writes: Vec<(&'static str, Option<String>)>,
    /// Places that were not written but have different contents afterwards.
    pub changed: Vec<u64>,
    /// True if the corrupt bit is set at the end and was not before.
    pub marked: bool,
}

/// The writes to try: name, offset, length. The first covers a part of a cluster.
pub fn writes(victim: &Victim) -> [(&'static str, u64, u64); 3] {
    let (empty, cluster) = victim.empty;
    [
        ("a write to data", 512, 1024),
        ("a write to an empty cluster", empty, UNIT),
        ("a discard", cluster, cluster),
    ]
}

/// Probes an image that was made from a victim. One disk, open for reading only, reads it, and another one writes it.
/// So the writing disk has not found any damage before.
pub fn probe(file: &[u8], victim: &Victim) -> Outcome {
    let mut outcome = Outcome {
        checked: Err(String::new()),
        opened: Opened::Writable,
        reads: BTreeMap::new(),
        writes: Vec::new(),
        changed: Vec::new(),
        marked: false,
    };
    let data_file = victim.data.as_ref().map(|_| DATA.into());
    let options = DiskOptions { data_file, ..options(false) };
    let world = |file: &[u8]| {
        let world = world(file);
        if let Some(data) = &victim.data {
            world.add_file(DATA, data);
        }
        world
    };
    let read_only = DiskOptions { read_only: true, ..options.clone() };
    let to_read = Session::open(&world(file), &read_only, None).map(|mut session| read(&mut session, victim));
    let world = world(file);
    let before = checked(&world);
    outcome.checked = before.as_ref().map(verdict).map_err(ToString::to_string);
    let to_write = Session::open(&world, &options, None);
    match (to_read, to_write) {
        (Err(why), Err(_)) => outcome.opened = Opened::Refused(why.to_string()),
        (Err(why), Ok(_)) => panic!("opens for writing, and not for reading: {why}"),
        (Ok(reads), Err(why)) => {
            outcome.reads = reads;
            outcome.opened = Opened::ReadOnly(why.to_string());
        }
        (Ok(reads), Ok(session)) => {
            outcome.reads = reads;
            let closed = write(&mut outcome, &world, session, victim);
            let marked = is_marked(&bytes(&world, 512));
            outcome.marked = marked && !is_marked(file);
            if let Ok(before) = before {
                judge(&before, checked(&world), marked || !closed, &outcome);
            }
        }
    }
    outcome
}

fn verdict(report: &Report) -> (Verdict, Vec<&'static str>) {
    let mut kinds: Vec<_> = report.findings.iter().map(|finding| finding.kind.name()).collect();
    kinds.sort_unstable();
    kinds.dedup();
    (report.verdict(), kinds)
}

/// Asserts that the writes left the image no worse than before, or that they found the damage.
fn judge(before: &Report, after: Result<Report, OpenError>, found: bool, outcome: &Outcome) {
    let found = found || outcome.writes.iter().any(|(_, failed)| failed.is_some());
    match after {
        Ok(after) => {
            assert!(found || after.verdict() <= before.verdict(), "{before:#?}\nbecame\n{after:#?}");
        }
        // The data past the end of the file was written there, as in QEMU, so the file is now too long.
        Err(OpenError::NotCheckable { .. }) => {}
        Err(error) => panic!("it can be checked no more: {error}"),
    }
}

/// Writes, compares all other data, lets the housekeeper work, and closes. Returns whether the close succeeded.
fn write(outcome: &mut Outcome, world: &SimWorld, mut session: Session, victim: &Victim) -> bool {
    let size = session.size();
    for (what, offset, length) in writes(victim).into_iter().filter(|(_, at, length)| at + length <= size) {
        match what {
            "a discard" => session.discard(offset, length),
            _ => session.write(offset, length, 0xa5, false),
        }
        outcome.writes.push((what, session.failures.drain(..).next().map(|error| error.to_string())));
    }
    session.flush();
    session.rest(world, Duration::from_secs(6));
    session.failures.clear();
    let written = |at: u64| {
        writes(victim).iter().any(|(_, offset, length)| at + UNIT > *offset && at < offset + length)
    };
    let now = read(&mut session, victim);
    let same = |place: &u64| now[place] == outcome.reads[place];
    outcome.changed = now.keys().filter(|place| !written(**place) && !same(place)).copied().collect();
    session.close().1.is_ok()
}

/// The corrupt bit, of version 3.
pub fn is_marked(file: &[u8]) -> bool {
    file.len() > 79 && file[7] == 3 && file[79] & 2 != 0
}

fn read(session: &mut Session, victim: &Victim) -> BTreeMap<u64, Read> {
    let size = session.size();
    let mut reads = BTreeMap::new();
    for place in victim.contents.keys().filter(|place| **place + UNIT <= size) {
        let read = match session.read(*place, UNIT) {
            Some(bytes) if bytes.iter().all(|byte| *byte == bytes[0]) => Read::All(bytes[0]),
            Some(_) => Read::Mixed,
            None => Read::Fails(session.failures.pop().expect("why it failed").to_string()),
        };
        reads.insert(*place, read);
    }
    reads
}
