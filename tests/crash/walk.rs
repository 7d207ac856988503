//! Walks through a run's history, makes the crash states of each instant, and compares each with the promises of
//! durability.

use std::collections::HashMap;
use std::fmt::Write;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::rc::Rc;

use storage_sim::{CrashLimits, CrashPlan, CrashScope, Image, Moment, Random, Replay};

use super::examine::{Seen, counted_past_end, entries_past_end, examine};
use super::journal::{Kept, Unsettled, padded};
use super::recovery::recover;
use super::rig::Finished;
use super::shape::{Data, Past, Start};
use super::stamp::Value;
use super::tally::Tally;

/// One state in this many is opened and served until the search for leaks ends.
const RECOVERED_ONE_IN: u64 = 8;
/// The most examined states that are remembered.
const MEMORY_MAX: usize = 30_000;

/// The choice of crashes of a run that are tried.
#[derive(Clone, Copy, Debug)]
pub struct Choice {
    /// The first instant.
    pub from: Moment,
    /// One instant in this many, of those at which the set of crash states changes.
    pub one_in: u64,
    /// The limits of the crash states at each instant.
    pub limits: CrashLimits,
    /// The most crash states at each instant, drawn at random from these.
    pub states_max: usize,
}

impl Choice {
    /// Every instant from this one on, and every subset if there are few.
    pub fn everything(from: Moment) -> Self {
        Choice { from, one_in: 1, limits: CrashLimits::default(), states_max: usize::MAX }
    }

    /// A sample of a run, of about the same size for long and short runs.
    pub fn sample_of(run: &Finished) -> Self {
        Choice::sample((run.world.moment().0 as u64 / 160).max(4))
    }

    /// A sample over the whole run.
    pub fn sample(one_in: u64) -> Self {
        let limits = CrashLimits { exhaustive: 5, samples: 16, tears: 8 };
        Choice { from: Moment(0), one_in, limits, states_max: 24 }
    }
}

/// The walks of one thread. Remembers the states that it has examined.
pub struct Walker<'t> {
    tally: &'t Tally,
    seen: HashMap<u64, Rc<Seen>>,
    /// The run changes the closed image, which in version 2 leaves leaks without a mark.
    has_changes: bool,
    /// The host may fail to extend the file in the run, and then the image has no mark.
    pub unmarked: bool,
}

impl<'t> Walker<'t> {
    /// A walker for a campaign.
    pub fn new(tally: &'t Tally) -> Self {
        Walker { tally, seen: HashMap::new(), has_changes: false, unmarked: false }
    }

    /// Counts the requests of a run that waited for space, and those that failed as their queue was stopped.
    pub fn count_shortage(&self, waited: u64, given_up: u64) {
        self.tally.count_shortage(waited, given_up);
    }

    /// Examines an image, or returns the remembered result.
    ///
    /// # Errors
    /// A fault of the image that no promise allows.
    pub fn look(&mut self, image: &Image, start: &Start) -> Result<Rc<Seen>, String> {
        let mut hasher = DefaultHasher::new();
        (image.hash(), &start.top).hash(&mut hasher);
        let hash = hasher.finish();
        self.tally.count_state(hash);
        if let Some(seen) = self.seen.get(&hash) {
            return Ok(Rc::clone(seen));
        }
        let seen = examine(image, start);
        if let Some(wrong) = seen.wrong {
            return Err(wrong);
        }
        if hash.is_multiple_of(RECOVERED_ONE_IN) {
            let lasting = self.unmarked || (self.has_changes && start.shape.version == 2);
            recover(image, start, &seen, lasting)?;
        }
        self.tally.second.ask(image, start, &seen)?;
        if self.seen.len() >= MEMORY_MAX {
            self.seen.clear();
        }
        let seen = Rc::new(seen);
        self.seen.insert(hash, Rc::clone(&seen));
        Ok(seen)
    }

    /// Tries the crashes of a run.
    ///
    /// # Errors
    /// The first violation, its location and its crash.
    pub fn crash(&mut self, run: &Finished, start: &Start, choice: &Choice, seed: u64) -> Result<(), String> {
        let history = run.world.history();
        self.has_changes = run.journal.has_changes();
        let mut replay = Replay::new(&history);
        let mut random = Random::new(seed ^ 0xc4a5);
        let mut promise = Promise::new(run, start);
        // If every instant is tried, the states that were possible before have been tried before.
        let scope = if choice.one_in == 1 { CrashScope::New } else { CrashScope::All };
        while replay.advance_to_change() {
            if replay.moment() < choice.from || !random.chance(1, choice.one_in) {
                continue;
            }
            let mut plans = replay.plans(&choice.limits, scope, &mut random);
            thin(&mut plans, choice.states_max, &mut random);
            promise.move_to(replay.moment());
            let start = &start.over(run.top_at(replay.moment(), start));
            for plan in &plans {
                let image = replay.image(plan);
                let compared = self
                    .look(&image, start)
                    .and_then(|seen| promise.compare(&seen))
                    .and_then(|()| run.compare_layers(&image, replay.moment()));
                compared.map_err(|wrong| format!("{wrong}\n{}", replay.describe(plan)))?;
            }
            if self.tally.is_over() {
                break;
            }
        }
        Ok(())
    }

    /// A random crash state of a run, as the start of another run.
    ///
    /// # Errors
    /// If the state violates a promise.
    pub fn some_crash(&mut self, run: &Finished, start: &Start, seed: u64) -> Result<Start, String> {
        let history = run.world.history();
        self.has_changes = run.journal.has_changes();
        let mut random = Random::new(seed ^ 0x50e);
        let mut replay = Replay::new(&history);
        replay.advance_to(Moment(random.below(history.end().0 as u64 + 1) as usize));
        let mut plans = replay.plans(&Choice::sample(1).limits, CrashScope::All, &mut random);
        thin(&mut plans, 1, &mut random);
        let image = plans.first().map_or_else(|| replay.durable().clone(), |plan| replay.image(plan));
        let mut promise = Promise::new(run, start);
        promise.move_to(replay.moment());
        let start = &start.over(run.top_at(replay.moment(), start));
        let seen = self.look(&image, start)?;
        promise.compare(&seen)?;
        // A repair that writes a refblock also clears its counts past the end of the file. A repair that finds the
        // block right does not, so all of these counts may stay.
        let counted = if start.shape.is_qcow2() { counted_past_end(&image, &start.top)? } else { 0 };
        let leaks = (seen.leaks + seen.hidden_leaks).max(counted);
        Ok(Start {
            shape: start.shape,
            image,
            top: start.top.clone(),
            values: seen.values.clone(),
            snapshots: seen.snapshots.clone(),
            leaks,
            hidden: start.hidden.clone(),
        })
    }

    /// Checks what the deaths of a run leave, once a successor has served it: everything acknowledged, and no leaks.
    /// Returns the image after one of them, as the start of another run.
    ///
    /// # Errors
    /// The first violation.
    pub fn deaths(&mut self, run: &Finished, start: &Start, seed: u64) -> Result<Option<Start>, String> {
        self.has_changes = run.journal.has_changes();
        // The search for leaks does not see the hidden snapshot. And a cluster of compressed data may have lost one
        // reference in an unfinished cut and lose another in the replay. Then the search leaves it alone.
        let may_leak = matches!(start.shape.past, Past::Shared | Past::Compressed(_));
        self.unmarked = may_leak;
        let mut random = Random::new(seed ^ 0xd1e);
        let mut promise = Promise::new(run, start);
        let mut left = None;
        for (number, death) in run.deaths.iter().enumerate() {
            let name = |wrong: String| {
                format!("death {number} of {} at {:?}: {wrong}", run.deaths.len(), death.moment)
            };
            let image = death.succeed(&start.shape, &mut random).map_err(name)?;
            let start = &start.over(&death.top);
            let seen = self.look(&image, start).map_err(name)?;
            promise.move_to(death.moment);
            promise.past = usize::MAX;
            promise.allowed.clone_from(&death.allowed);
            if may_leak {
                promise.leaks_max = u64::MAX / 2;
            }
            promise.compare(&seen).map_err(name)?;
            if seen.leaks > start.leaks && !may_leak {
                return Err(name(format!("{} clusters leak, {} before", seen.leaks, start.leaks)));
            }
            let (values, snapshots) = (seen.values.clone(), seen.snapshots.clone());
            let leaks = seen.leaks + seen.hidden_leaks;
            left = Some(Start {
                shape: start.shape,
                image,
                top: start.top.clone(),
                values,
                snapshots,
                leaks,
                hidden: start.hidden.clone(),
            });
        }
        self.unmarked = false;
        Ok(left)
    }

    /// Checks the image after a clean close: all writes are durable, nothing new leaks, and the values are the last
    /// ones.
    ///
    /// # Errors
    /// The first violation.
    pub fn closed(&mut self, run: &Finished, start: &Start) -> Result<(), String> {
        let history = run.world.history();
        self.has_changes = run.journal.has_changes();
        let mut replay = Replay::new(&history);
        replay.advance_to(history.end());
        let mut promise = Promise::new(run, start);
        promise.move_to(history.end());
        let start = &start.over(run.top_at(history.end(), start));
        let seen = self.look(replay.durable(), start)?;
        run.compare_layers(replay.durable(), history.end())?;
        promise.compare(&seen).map_err(|wrong| format!("after a clean close: {wrong}"))?;
        if seen.leaks > start.leaks {
            return Err(format!("a clean close leaks {} clusters, {} before", seen.leaks, start.leaks));
        }
        if run.journal.has_live_sizes() && start.shape.is_qcow2() && start.shape.data != Data::ApartRaw {
            let before = entries_past_end(&start.image, &start.top)?;
            if seen.past_end > before {
                let after = seen.past_end;
                return Err(format!(
                    "{after} clusters past the end of the disk have entries, {before} before"
                ));
            }
        }
        if replay.open_count() > 0 {
            let open = replay.describe(&CrashPlan::nothing());
            return Err(format!("a clean close leaves writes that are not durable: {open}"));
        }
        Ok(())
    }
}

/// Retains a random selection of the plans.
fn thin(plans: &mut Vec<CrashPlan>, most: usize, random: &mut Random) {
    while plans.len() > most {
        plans.swap_remove(random.below(plans.len() as u64) as usize);
    }
}

/// The states that a crash may leave at the instant of a walk.
struct Promise<'r> {
    run: &'r Finished,
    start: &'r Start,
    changes: Vec<Moment>,
    /// The number of changes up to this instant.
    past: usize,
    allowed: Vec<Vec<Value>>,
    /// The external data file as a raw image at the start. It may have been ahead of the guest's view then, so
    /// `raw_allowed` holds further values that it may show.
    raw_start: Option<Vec<Value>>,
    raw_allowed: Vec<Vec<Value>>,
    leaks_max: u64,
    moment: Moment,
}

impl<'r> Promise<'r> {
    fn new(run: &'r Finished, start: &'r Start) -> Self {
        let changes = run.journal.changes();
        Promise {
            run,
            start,
            changes,
            past: usize::MAX,
            allowed: Vec::new(),
            raw_start: start.shape.raw_view(&start.image),
            raw_allowed: Vec::new(),
            leaks_max: 0,
            moment: Moment(0),
        }
    }

    fn move_to(&mut self, moment: Moment) {
        let past = self.changes.partition_point(|change| *change <= moment);
        if past != self.past {
            self.past = past;
            self.allowed = self.run.journal.allowed_at(moment);
            if let Some(start) = &self.raw_start {
                self.raw_allowed = self.run.journal.allowed_from(start, moment);
            }
        }
        self.moment = moment;
        self.leaks_max = self.leaks_at(moment);
    }

    /// The most clusters that a crash may leak (docs/durability.md, "What a crash leaks"), except for a refcount table
    /// that is being moved.
    fn leaks_at(&self, moment: Moment) -> u64 {
        let quiet = self.run.quiet.iter().rev().find(|quiet| **quiet <= moment).copied();
        let Unsettled { taken, freed } =
            self.run.journal.unsettled_clusters(quiet.unwrap_or(Moment(0)), moment, self.run.tries);
        // The reserved clusters were observed some time after the reservation.
        let samples = &self.run.reserved;
        let seen = samples.partition_point(|(at, _)| *at < moment);
        let reserved = samples.get(seen).or(samples.last()).map_or(0, |(_, most)| *most);
        let refblocks = (taken + freed + reserved) / self.start.shape.geometry().refblock_entries() + 1;
        self.start.leaks + taken + freed + reserved + refblocks
    }

    fn compare(&self, seen: &Seen) -> Result<(), String> {
        if let (Some(hidden), Some(found)) = (&self.start.hidden, &seen.snapshot)
            && let Some(at) = hidden.values.iter().zip(found).position(|(held, found)| held != found)
        {
            let (held, found) = (hidden.values[at], found[at]);
            return Err(format!("the snapshot held {held} in sector {at}, and now {found}"));
        }
        let wrong = |(_, (value, allowed)): &(usize, (&Value, &Vec<Value>))| !allowed.contains(value);
        let values = padded(&seen.values, &self.start.shape);
        let mut bad = values.iter().zip(&self.allowed).enumerate().filter(wrong).peekable();
        if bad.peek().is_some() {
            let mut text = String::from("wrong contents:");
            for (sector, (value, allowed)) in bad.take(6) {
                let allowed: Vec<String> = allowed.iter().map(Value::to_string).collect();
                let _ = write!(text, "\n    sector {sector} holds {value}, not {}", allowed.join(" or "));
            }
            return Err(text);
        }
        if values.len() != self.allowed.len() {
            return Err(format!("the disk has {} sectors", seen.values.len()));
        }
        if seen.trusted_bitmap && seen.values != self.start.values {
            return Err("a write was not noted in a bitmap that passes for right".to_owned());
        }
        self.compare_raw_view(seen)?;
        self.compare_snapshots(seen)?;
        // The old table and the new one, which is half as large again.
        let table = seen.table_clusters + seen.table_clusters / 2 + 2;
        let (leaks, most) = (seen.leaks + seen.hidden_leaks, self.leaks_max + table);
        if leaks > most {
            return Err(format!("{leaks} clusters leak, and at most {most} may at {:?}", self.moment));
        }
        Ok(())
    }

    fn compare_raw_view(&self, seen: &Seen) -> Result<(), String> {
        let Some(found) = &seen.raw_view else { return Ok(()) };
        let may = |sector: usize, value: &Value| {
            self.allowed[sector].contains(value) || self.raw_allowed[sector].contains(value)
        };
        match found.iter().enumerate().find(|(sector, value)| !may(*sector, value)) {
            Some((sector, value)) => {
                let guest = seen.values[sector];
                Err(format!(
                    "as a raw image, sector {sector} holds {value}, which it may not; the guest sees {guest}"
                ))
            }
            None => Ok(()),
        }
    }

    fn compare_snapshots(&self, seen: &Seen) -> Result<(), String> {
        let kept = self.run.journal.kept_at(self.moment);
        for (name, values) in &seen.snapshots {
            let Some((known, _)) = kept.iter().find(|(kept, _)| kept.name == *name) else {
                return Err(format!("there is a snapshot \"{name}\" that should not be there"));
            };
            let mut pairs = values.iter().zip(known.values.iter()).enumerate();
            if let Some((sector, (found, was))) = pairs.find(|(_, (found, was))| found != was) {
                return Err(format!("snapshot \"{name}\": sector {sector} holds {found}, not {was}"));
            }
            if values.len() != known.values.len() {
                return Err(format!("snapshot \"{name}\" has {} sectors", values.len()));
            }
        }
        let missing = |(kept, must): &&(&Kept, bool)| {
            *must && seen.snapshots.iter().all(|(name, _)| *name != kept.name)
        };
        match kept.iter().find(missing) {
            Some((kept, _)) => Err(format!("the snapshot \"{}\" is gone", kept.name)),
            None => Ok(()),
        }
    }
}
