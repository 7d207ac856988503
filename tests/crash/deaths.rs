//! The death of the daemon alone, at random moments of a run. All that it sent to the host survives, and so does
//! the memory of its journal. Everything that it had acknowledged must be there afterwards.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use disk::{Disk, JournalKept, JournalMemory};
use storage_sim::{Image, Moment, Random, Replay, SimOptions, SimWorld};

use super::journal::Journal;
use super::recovery::wait_for_search;
use super::shape::Shape;
use super::stamp::Value;

/// Words of a journal before its records, and words of a record.
const HEADER_WORDS: usize = 32;
const RECORD_WORDS: usize = 4;
/// The most deaths of a run.
const DEATHS_MAX: usize = 12;

struct Words(Vec<AtomicU64>);

impl AsRef<[AtomicU64]> for Words {
    fn as_ref(&self) -> &[AtomicU64] {
        &self.0
    }
}

/// Memory of these words.
pub fn memory_of(words: &[u64]) -> JournalMemory {
    Arc::new(Words(words.iter().map(|word| AtomicU64::new(*word)).collect()))
}

/// Memory of an empty journal with room for so many records.
pub fn memory_for(slots: usize) -> JournalMemory {
    memory_of(&vec![0; HEADER_WORDS + slots * RECORD_WORDS])
}

/// The words of a journal's memory.
pub fn words_of(memory: &JournalMemory) -> Vec<u64> {
    (**memory).as_ref().iter().map(|word| word.load(Ordering::Relaxed)).collect()
}

/// What a death left.
pub struct Death {
    /// The moment in the history of the run.
    pub moment: Moment,
    /// The values that each sector may hold: all acknowledged requests count.
    pub allowed: Vec<Vec<Value>>,
    /// The name of the top image.
    pub top: String,
    image: Image,
    words: Vec<u64>,
}

/// Notes what deaths at random moments of a run would leave.
pub struct DeathWatch {
    /// The memory of the journal.
    pub memory: JournalMemory,
    /// The deaths so far.
    pub deaths: Vec<Death>,
    random: Random,
    one_in: u64,
}

impl DeathWatch {
    /// A watch for a run of some `requests`, with a journal of some size.
    pub fn new(requests: usize, seed: u64) -> Self {
        let mut random = Random::new(seed ^ 0xdead);
        let slots = [8, 9, 16, 64, 512][random.below(5) as usize];
        let one_in = 4 + 8 * requests as u64 / DEATHS_MAX as u64;
        DeathWatch { memory: memory_for(slots), deaths: Vec::new(), random, one_in }
    }

    /// Maybe the daemon dies now.
    pub fn tick(&mut self, world: &SimWorld, top: &str, journal: &Journal) {
        if self.deaths.len() < DEATHS_MAX && self.random.chance(1, self.one_in) {
            let (moment, allowed) = (world.moment(), journal.acknowledged());
            let (top, image, words) = (top.to_owned(), world.image(), words_of(&self.memory));
            self.deaths.push(Death { moment, allowed, top, image, words });
        }
    }
}

impl Death {
    /// The closed image after a successor has served it. Maybe that one dies as well while it carries out the journal, and
    /// another follows.
    ///
    /// # Errors
    /// Why it cannot be served.
    pub fn succeed(&self, shape: &Shape, random: &mut Random) -> Result<Image, String> {
        let mut image = self.image.clone();
        if random.chance(1, 3) {
            let world = SimWorld::from_image(image, 1, SimOptions::default());
            let disk = open(&world, &self.top, shape)?;
            disk.keep_journal(Some(memory_of(&self.words))).map_err(|error| format!("to replay: {error}"))?;
            let history = world.history();
            let mut replay = Replay::new(&history);
            replay.advance_to(Moment(random.below(history.end().0 as u64 + 1) as usize));
            image = replay.image(&replay.everything());
        }
        succeed(image, &self.top, shape, &self.words).map(|(image, _)| image)
    }
}

fn open(world: &SimWorld, top: &str, shape: &Shape) -> Result<Disk<storage_sim::SimStorage>, String> {
    Disk::open_unkept(world.storage(), Path::new(top), &shape.options())
        .map_err(|error| format!("after a death it does not open: {error}"))
}

/// Brings a dead daemon's journal to its image, serves until the search for leaks ends, and closes. Returns the image, and
/// for how many guest clusters the journal was carried out.
///
/// # Errors
/// Why it cannot be served.
pub fn succeed(image: Image, top: &str, shape: &Shape, words: &[u64]) -> Result<(Image, u64), String> {
    let failed = |error| format!("after a death: {error}");
    let world = SimWorld::from_image(image, 1, SimOptions::calm());
    let disk = open(&world, top, shape)?;
    let mut keeper = disk.keeper().map_err(failed)?;
    // The housekeeper's turn comes first: it must wait.
    keeper.poll();
    let kept = disk.keep_journal(Some(memory_of(words))).map_err(failed)?;
    let JournalKept::Begun { replayed } = kept else { return Err("no journal was begun".to_owned()) };
    wait_for_search(&disk, &mut keeper)?;
    drop(keeper);
    disk.close().map_err(failed)?;
    Ok((world.image(), replayed))
}
