//! The chain map: one word a guest cluster, read without a lock.
//!
//! A directory entry locates the words of a slice ([`SLICE_WORDS`] guest clusters), in one of two ways. If all words
//! follow from the first, the slice is a *run*: the entry is the first word, and no other memory is needed. A slice
//! that reads as zero or whose data is contiguous is a run. Otherwise the entry names the frame that holds the words.
//!
//! Readers ([`ChainMap::lookup`]) take no lock and count no reference: they load the entry, the word, and the entry
//! again. Frames are bounded in number, evicted by clock and never freed while the map lives. Only their memory may be
//! released (map/idle.rs), so a stale read is harmless and is detected. All changes are made under the engine's one
//! lock, through [`MapWriter`]. It makes a slice a run as soon as its words allow, and ends the run when they no longer
//! do.
//!
//! With subclusters, a frame holds a second word for each cluster. It records which subclusters are data in the host
//! cluster that the first word names ([`Word::has_subclusters`]), and which read as zero. A reader must not combine a word
//! with the second word of another host cluster. It loads the entry, the word, the second word, the word again and the
//! entry again ([`ChainMap::lookup_subclusters`]). The writer ([`Frame::put`]) stores [`Word::MIXED`] between two host
//! clusters. A reader that loaded the second word of the new cluster sees that store when it loads the word again. The
//! old word cannot return while the reader is in its epoch, because its host cluster cannot be freed and reused before
//! (docs/concurrency.md, "Epochs"). Where only the subclusters change, one store of the second word publishes them.

mod idle;

pub(crate) use idle::Swept;

use qcow2::{GuestCluster, Subcluster, SubclusterSet, Subclusters};

use crate::bounds::{
    MAP_CHUNK_FRAMES as CHUNK_FRAMES, MAP_LEAF_ENTRIES as LEAF_ENTRIES, MAP_LEAVES_MAX as LEAVES_MAX,
    MAP_SLICE_WORDS as SLICE_WORDS, MAP_SPARE_LEAVES as SPARE_LEAVES,
};
use crate::rules::places;
use crate::sync::{AtomicBool, AtomicU64, OnceLock, Ordering, zeroed};
use crate::word::{KIND_SHIFT, Step, Word};

/// A slice of the guest's clusters, by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct SliceIndex(pub u64);

impl SliceIndex {
    pub fn of(cluster: GuestCluster) -> Self {
        SliceIndex(cluster.0 / SLICE_WORDS)
    }

    pub fn first(self) -> GuestCluster {
        GuestCluster(self.0 * SLICE_WORDS)
    }
}

/// The second word of a cluster: the known state of its subclusters.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SubclusterMap(pub(crate) u64);

impl SubclusterMap {
    /// All subclusters read as zero.
    pub(crate) const ZERO: SubclusterMap = SubclusterMap((SubclusterSet::ALL.0 as u64) << 32);

    /// The second word for these subclusters. With `nothing_below`, unallocated subclusters read as zero.
    pub(crate) fn new(subclusters: &Subclusters, nothing_below: bool) -> Self {
        let below = if nothing_below { subclusters.unallocated() } else { SubclusterSet::EMPTY };
        SubclusterMap(Subclusters { zero: subclusters.zero.with(below), ..*subclusters }.bitmap())
    }

    /// The state of a subcluster, and how many from it on have the same. [`Subcluster::Unallocated`] means unknown.
    #[inline]
    pub fn at(self, index: u32) -> (Subcluster, u32) {
        let (allocated, zero) = (SubclusterSet(self.0 as u32), SubclusterSet((self.0 >> 32) as u32));
        Subclusters { host: None, allocated, zero }.at(index)
    }
}

type Words = [AtomicU64; SLICE_WORDS as usize];

/// The first or the second words of a slice: one page of the operating system, so that its memory can be released.
#[cfg_attr(not(loom), repr(align(4096)))]
struct Page(Words);

struct Frame<'a> {
    words: &'a Words,
    /// The second words, where images have subclusters.
    seconds: Option<&'a Words>,
}

impl Frame<'_> {
    /// Stores the words of a cluster, in the order that the module comment requires.
    fn put(&self, at: usize, word: Word, second: SubclusterMap) {
        if let (true, Some(seconds)) = (word.has_subclusters(), self.seconds) {
            let before = self.word(at);
            if before.has_subclusters() && before != word {
                self.words[at].store(Word::MIXED.0, Ordering::Release);
            }
            // Release, paired with the acquire in `lookup_subclusters`: a reader that loads this sees the store above.
            seconds[at].store(second.0, Ordering::Release);
            if before == word {
                return;
            }
        }
        self.words[at].store(word.0, Ordering::Release);
    }

    /// The word of a cluster, for the writer.
    fn word(&self, at: usize) -> Word {
        Word(self.words[at].load(Ordering::Relaxed))
    }
}

/// A directory entry. If its kind bits (63–62) are not 0, the slice is a run, and the entry is the word of its first
/// cluster. Otherwise it names a frame by its number + 1 (bits 27–0; 0: no frame) and the generation of its use
/// (61–28). Generations do not wrap around between two loads of a reader.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Entry(u64);

const FRAME_BITS: u32 = 28;
const GENERATIONS: u64 = 1 << (KIND_SHIFT - FRAME_BITS);

/// The most frames that entries can name.
const FRAMES_MAX: usize = (1 << FRAME_BITS) - 1;

/// Where the words of a slice are.
enum Place {
    Nowhere,
    /// All follow from this first word.
    Run(Word),
    /// In this frame.
    Frame(usize),
}

impl Entry {
    const ABSENT: Entry = Entry(0);

    fn of_frame(frame: usize, generation: u64) -> Self {
        Entry((generation % GENERATIONS) << FRAME_BITS | (frame as u64 + 1))
    }

    fn of_run(first: Word) -> Self {
        Entry(first.0)
    }

    /// The first word, if the slice is a run.
    #[inline]
    fn run(self) -> Option<Word> {
        (self.0 >> KIND_SHIFT != 0).then_some(Word(self.0))
    }

    /// The frame's number, for an entry that is no run; if it names none, a number that no frame has.
    #[inline]
    fn frame(self) -> usize {
        ((self.0 & FRAMES_MAX as u64) as usize).wrapping_sub(1)
    }

    fn place(self) -> Place {
        match (self.run(), self) {
            (Some(first), _) => Place::Run(first),
            (None, Entry::ABSENT) => Place::Nowhere,
            (None, _) => Place::Frame(self.frame()),
        }
    }
}

/// Its length is a part of its type, so a lookup checks no bound.
type Leaf = Box<[AtomicU64; LEAF_ENTRIES as usize]>;

/// A leaf that knows no slice. It is made on the heap, as it is too large for a stack.
fn empty_leaf() -> Leaf {
    let entries: Box<[AtomicU64]> = (0..LEAF_ENTRIES).map(|_| AtomicU64::new(0)).collect();
    entries.try_into().expect("a leaf has LEAF_ENTRIES entries")
}

/// The shared side of the map.
pub(crate) struct ChainMap {
    /// Clusters of the disk. Stored under the engine's lock, after the slice of the old end was removed
    /// ([`MapWriter::grow`]). A reader of a cluster past the old end has seen the disk's new size, which is stored later.
    clusters: AtomicU64,
    /// The distance from word to word in a run of data: a cluster.
    step: Step,
    has_subclusters: bool,
    directory: Box<[OnceLock<Leaf>]>,
    chunks: Box<[OnceLock<Box<[Page]>>]>,
    /// One flag per frame. Set by readers, cleared by the clock and by sweeps.
    referenced: Box<[AtomicBool]>,
    /// For [`ChainMap::is_sweepable`].
    sweepable: AtomicBool,
}

impl ChainMap {
    /// A map for `clusters` guest clusters of 2^`unit_bits` bytes in at most `frames` frames. A frame is 4 KiB, or 8 KiB with
    /// second words for subclusters (`has_subclusters`). A chunk of frames is allocated when its first frame is used.
    ///
    /// The directory has room for a disk that grows; what it has no room for is resolved again each time.
    pub fn new(clusters: u64, unit_bits: u32, frames: usize, has_subclusters: bool) -> Self {
        let slices = clusters.div_ceil(SLICE_WORDS);
        let leaves = (slices.div_ceil(LEAF_ENTRIES) as usize).max(SPARE_LEAVES);
        let frames = frames.clamp(1, FRAMES_MAX);
        ChainMap {
            clusters: AtomicU64::new(clusters),
            step: Step::of_cluster(unit_bits),
            has_subclusters,
            directory: (0..leaves).map(|_| OnceLock::new()).collect(),
            chunks: (0..frames.div_ceil(CHUNK_FRAMES)).map(|_| OnceLock::new()).collect(),
            referenced: (0..frames).map(|_| AtomicBool::new(false)).collect(),
            sweepable: AtomicBool::new(false),
        }
    }

    /// The word of a cluster; unresolved if its slice is not resident. No lock, no allocation.
    #[inline]
    pub fn lookup(&self, cluster: GuestCluster) -> Word {
        let slice = SliceIndex::of(cluster);
        let Some(slot) = self.slot(slice) else { return Word::UNRESOLVED };
        loop {
            // Pairs with the release store in `MapWriter::publish_entry`: the frame's words belong to this slice, and
            // the data of a run is written.
            let entry = Entry(slot.load(Ordering::Acquire));
            if let Some(first) = entry.run() {
                return self.word_in_run(first, cluster);
            }
            let frame = entry.frame();
            let Some(words) = self.page(frame, 0) else { return Word::UNRESOLVED };
            // Acquire, paired with the release of every word store. If this word was stored for another slice, the load
            // below sees the store that took the frame from this slice.
            let word = words[(cluster.0 % SLICE_WORDS) as usize].load(Ordering::Acquire);
            if Entry(slot.load(Ordering::Relaxed)) == entry {
                let referenced = &self.referenced[frame];
                if !referenced.load(Ordering::Relaxed) {
                    referenced.store(true, Ordering::Relaxed);
                }
                return Word(word);
            }
        }
    }

    /// The word and the second word of a cluster; `None` if it has no second word or is not resident. No lock, no
    /// allocation.
    #[inline]
    pub fn lookup_subclusters(&self, cluster: GuestCluster) -> Option<(Word, SubclusterMap)> {
        let slot = self.slot(SliceIndex::of(cluster))?;
        let at = (cluster.0 % SLICE_WORDS) as usize;
        loop {
            let entry = Entry(slot.load(Ordering::Acquire));
            if entry.run().is_some() {
                return None;
            }
            let words = self.page(entry.frame(), 0)?;
            let word = Word(words[at].load(Ordering::Acquire));
            if !word.has_subclusters() {
                return None;
            }
            // Acquire: the loads below see every store before the store of this word.
            let second = self.page(entry.frame(), 1)?[at].load(Ordering::Acquire);
            let again = words[at].load(Ordering::Relaxed);
            if again == word.0 && Entry(slot.load(Ordering::Relaxed)) == entry {
                return Some((word, SubclusterMap(second)));
            }
        }
    }

    /// The word of a cluster whose slice is a run. A run ends at the end of the disk.
    #[inline]
    fn word_in_run(&self, first: Word, cluster: GuestCluster) -> Word {
        if cluster.0 < self.clusters() {
            first.in_run(cluster.0 % SLICE_WORDS, self.step)
        } else {
            Word::UNRESOLVED
        }
    }

    #[inline]
    fn clusters(&self) -> u64 {
        // Relaxed: ordered by the disk's size (see the field).
        self.clusters.load(Ordering::Relaxed)
    }

    /// The most frames that may be used at a time: one for each slice of the disk as it is now.
    fn frames_max(&self) -> usize {
        let slices = usize::try_from(self.clusters().div_ceil(SLICE_WORDS)).unwrap_or(usize::MAX);
        self.referenced.len().min(slices.max(1))
    }

    /// The number of clusters of the disk in a slice.
    fn slice_len(&self, slice: SliceIndex) -> usize {
        self.clusters().saturating_sub(slice.first().0).min(SLICE_WORDS) as usize
    }

    /// True if `next` follows `word` as in a run.
    fn joins(&self, word: Word, next: Word) -> bool {
        word.next(self.step) == Some(next)
    }

    /// The number of neighbours in the frame that a cluster with this word joins.
    fn joints_at(&self, frame: &Frame<'_>, at: usize, word: Word) -> usize {
        let before = at > 0 && self.joins(frame.word(at - 1), word);
        let after = at + 1 < frame.words.len() && self.joins(word, frame.word(at + 1));
        usize::from(before) + usize::from(after)
    }

    /// True if frames hold second words.
    pub fn has_subclusters(&self) -> bool {
        self.has_subclusters
    }

    #[inline]
    fn slot(&self, slice: SliceIndex) -> Option<&AtomicU64> {
        let leaf = self.directory.get((slice.0 / LEAF_ENTRIES) as usize)?.get()?;
        Some(&leaf[(slice.0 % LEAF_ENTRIES) as usize])
    }

    fn frame_bytes(&self) -> usize {
        self.pages_a_frame() * SLICE_WORDS as usize * 8
    }

    fn pages_a_frame(&self) -> usize {
        1 + usize::from(self.has_subclusters)
    }

    /// The words of a frame (page 0) or its second words (page 1); `None` if it has none.
    #[inline]
    fn page(&self, frame: usize, page: usize) -> Option<&Words> {
        let chunk = self.chunks.get(frame / CHUNK_FRAMES)?.get()?;
        let pages = self.pages_a_frame();
        chunk.get(frame % CHUNK_FRAMES * pages + page).filter(|_| page < pages).map(|page| &page.0)
    }

    /// A frame for the writer, allocated on first use.
    fn frame(&self, frame: usize) -> Frame<'_> {
        let (first, pages) = (frame / CHUNK_FRAMES, self.pages_a_frame());
        let chunk = self.chunks[first].get_or_init(|| {
            let frames = (self.referenced.len() - first * CHUNK_FRAMES).min(CHUNK_FRAMES);
            (0..frames * pages).map(|_| Page(zeroed())).collect()
        });
        let at = frame % CHUNK_FRAMES * pages;
        Frame { words: &chunk[at].0, seconds: self.has_subclusters.then(|| &chunk[at + 1].0) }
    }
}

/// The changing side of the map. Lives in the engine's locked state, so there is one writer at a time.
pub(crate) struct MapWriter {
    /// The contents of each frame that was ever used.
    owners: Vec<Owner>,
    /// Frames without a slice: `free` ones have memory, `bare` ones do not.
    free: Vec<usize>,
    bare: Vec<usize>,
    /// Number of frames (without a slice) whose memory is being released.
    away: usize,
    hand: usize,
    /// Leaves allocated so far.
    leaves: usize,
}

#[derive(Clone, Copy)]
struct Owner {
    slice: Option<SliceIndex>,
    /// The generation of this use.
    generation: u64,
    /// Pairs of neighbouring clusters that join as in a run. If all do, the slice is a run.
    joints: usize,
}

impl MapWriter {
    pub fn new() -> Self {
        MapWriter { owners: Vec::new(), free: Vec::new(), bare: Vec::new(), away: 0, hand: 0, leaves: 0 }
    }

    /// Bytes of memory that the map takes.
    pub fn bytes(&self, map: &ChainMap) -> usize {
        self.leaves * LEAF_ENTRIES as usize * 8 + (self.owners.len() - self.bare.len()) * map.frame_bytes()
    }

    /// True if a slice can be made resident.
    pub fn has_room(&self, map: &ChainMap, slice: SliceIndex) -> bool {
        let in_directory = slice.0 / LEAF_ENTRIES < map.directory.len() as u64;
        (in_directory && self.leaves < LEAVES_MAX) || map.slot(slice).is_some()
    }

    /// The disk has this many clusters from now on, at least as many as before. The slice in which it ended is resolved
    /// again: if it was a run, the run would go on past the old end.
    pub fn grow(&mut self, map: &ChainMap, clusters: u64) {
        let before = map.clusters();
        // That of the last cluster, which the disk may have ended in.
        self.forget_slice(map, SliceIndex(before.saturating_sub(1) / SLICE_WORDS));
        map.clusters.store(clusters.max(before), Ordering::Relaxed);
    }

    /// The words of a slice are resolved again when they are needed.
    pub fn forget_slice(&mut self, map: &ChainMap, slice: SliceIndex) {
        let Some(slot) = map.slot(slice) else { return };
        match Entry(slot.load(Ordering::Relaxed)).place() {
            Place::Nowhere => {}
            Place::Run(_) => Self::publish_entry(slot, Entry::ABSENT),
            Place::Frame(number) => {
                self.forget(map, number, slice);
                self.free.push(number);
            }
        }
    }

    /// Makes a slice resident with these words (at most [`SLICE_WORDS`]), evicting another if the map is full. Does
    /// nothing if [`MapWriter::has_room`] is false.
    #[cfg(test)]
    pub fn fill(&mut self, map: &ChainMap, slice: SliceIndex, words: &[Word]) {
        self.fill_with_seconds(map, slice, words, &[]);
    }

    /// As [`MapWriter::fill`], with the second words of those clusters that have them.
    pub fn fill_with_seconds(
        &mut self,
        map: &ChainMap,
        slice: SliceIndex,
        words: &[Word],
        seconds: &[SubclusterMap],
    ) {
        if !self.has_room(map, slice) {
            return;
        }
        let Some(leaf) = map.directory.get((slice.0 / LEAF_ENTRIES) as usize) else { return };
        if leaf.get().is_none() {
            self.leaves += 1;
        }
        let leaf = leaf.get_or_init(empty_leaf);
        self.set(map, slice, &leaf[(slice.0 % LEAF_ENTRIES) as usize], words, seconds);
    }

    /// Publishes a cluster's new words, if its slice is resident.
    pub fn publish(&mut self, map: &ChainMap, cluster: GuestCluster, word: Word, second: SubclusterMap) {
        let slice = SliceIndex::of(cluster);
        let Some(slot) = map.slot(slice) else { return };
        let at = (cluster.0 % SLICE_WORDS) as usize;
        if at >= map.slice_len(slice) {
            // Past the end of the disk: a run ends there.
            return;
        }
        match Entry(slot.load(Ordering::Relaxed)).place() {
            Place::Nowhere => {}
            Place::Run(first) if places::stays_run(first.in_run(at as u64, map.step) == word) => {}
            Place::Run(first) => {
                let count = map.slice_len(slice);
                let mut words: [Word; SLICE_WORDS as usize] =
                    std::array::from_fn(|at| first.in_run(at as u64, map.step));
                let mut seconds = [SubclusterMap::default(); SLICE_WORDS as usize];
                (words[at], seconds[at]) = (word, second);
                self.set(map, slice, slot, &words[..count], &seconds[..count]);
            }
            Place::Frame(number) => {
                let frame = map.frame(number);
                let owner = &mut self.owners[number];
                let before = frame.word(at);
                if before != word {
                    owner.joints -= map.joints_at(&frame, at, before);
                    owner.joints += map.joints_at(&frame, at, word);
                }
                let joints = owner.joints;
                frame.put(at, word, second);
                let first = frame.word(0);
                if is_run(first, joints, map.slice_len(slice)) {
                    self.begin_run(slot, first, Some(number));
                }
            }
        }
    }

    /// Sets the words of a slice: as a run if they are one, otherwise in its present frame or in a new one.
    fn set(
        &mut self,
        map: &ChainMap,
        slice: SliceIndex,
        slot: &AtomicU64,
        words: &[Word],
        seconds: &[SubclusterMap],
    ) {
        let present = match Entry(slot.load(Ordering::Relaxed)).place() {
            Place::Frame(number) => Some(number),
            Place::Run(_) | Place::Nowhere => None,
        };
        let joints = words.windows(2).filter(|pair| map.joins(pair[0], pair[1])).count();
        let first = words.first().copied().unwrap_or(Word::UNRESOLVED);
        if is_run(first, joints, map.slice_len(slice)) {
            return self.begin_run(slot, first, present);
        }
        let number = present.unwrap_or_else(|| self.take_frame(map));
        let frame = map.frame(number);
        for (at, word) in words.iter().enumerate() {
            frame.put(at, *word, seconds.get(at).copied().unwrap_or_default());
        }
        for stored in frame.words.iter().skip(words.len()) {
            stored.store(0, Ordering::Release);
        }
        let owner = &mut self.owners[number];
        owner.joints = joints;
        if present.is_none() {
            map.referenced[number].store(true, Ordering::Relaxed);
            owner.slice = Some(slice);
            owner.generation += 1;
            // Last: until this store, a reader finds the run that the slice was, or nothing.
            Self::publish_entry(slot, Entry::of_frame(number, owner.generation));
        }
    }

    /// Makes a slice a run, and frees its frame.
    fn begin_run(&mut self, slot: &AtomicU64, first: Word, frame: Option<usize>) {
        Self::publish_entry(slot, Entry::of_run(first));
        if let Some(number) = frame {
            self.owners[number].slice = None;
            self.free.push(number);
        }
    }

    fn publish_entry(slot: &AtomicU64, entry: Entry) {
        slot.store(entry.0, Ordering::Release);
    }

    /// A frame for another slice: a free one, or by clock one that no reader used lately.
    fn take_frame(&mut self, map: &ChainMap) -> usize {
        if let Some(number) = self.free.pop() {
            return number;
        }
        if let Some(number) = self.bare.pop() {
            self.note_sweepable(map);
            return number;
        }
        if self.owners.len() < map.frames_max() {
            self.owners.push(Owner { slice: None, generation: 0, joints: 0 });
            self.note_sweepable(map);
            return self.owners.len() - 1;
        }
        loop {
            let number = self.hand;
            self.hand = (self.hand + 1) % self.owners.len();
            // Without a slice: its memory is being released.
            let Some(slice) = self.owners[number].slice else { continue };
            if !map.referenced[number].swap(false, Ordering::Relaxed) {
                self.forget(map, number, slice);
                return number;
            }
        }
    }

    /// Removes the slice from a frame.
    fn forget(&mut self, map: &ChainMap, number: usize, slice: SliceIndex) {
        if let Some(slot) = map.slot(slice) {
            Self::publish_entry(slot, Entry::ABSENT);
        }
        self.owners[number].slice = None;
    }
}

/// True if a slice of `clusters` clusters is a run, given its first word and the number of joining pairs.
fn is_run(first: Word, joints: usize, clusters: usize) -> bool {
    first.heads_run() && places::all_join(joints, clusters)
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests;

#[cfg(test)]
#[cfg(not(loom))]
#[allow(clippy::disallowed_methods, reason = "readers are threads in these tests")]
mod races {
    use std::sync::Mutex;
    use std::thread;

    use super::tests::{APART, TOGETHER, slice_words, word};
    use super::*;

    const SLICES: u64 = 64;

    /// Changes a map with few frames while two threads look up clusters. Each cluster must be unresolved or have a word
    /// that `may_be` allows.
    fn while_read(
        (unit_bits, frames): (u32, usize),
        may_be: impl Fn(u64, Word) -> bool + Sync,
        change: impl Fn(&ChainMap, &mut MapWriter),
    ) {
        let map = ChainMap::new(SLICES * SLICE_WORDS, unit_bits, frames, false);
        let mut writer = MapWriter::new();
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            for seed in 1..3u64 {
                let (map, stop, may_be) = (&map, &stop, &may_be);
                scope.spawn(move || {
                    let mut x = seed;
                    while !stop.load(Ordering::Relaxed) {
                        x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                        let cluster = (x >> 33) % (SLICES * SLICE_WORDS);
                        let found = map.lookup(GuestCluster(cluster));
                        assert!(
                            found == Word::UNRESOLVED || may_be(cluster, found),
                            "{found:?} for {cluster}"
                        );
                    }
                });
            }
            change(&map, &mut writer);
            stop.store(true, Ordering::Relaxed);
        });
    }

    #[test]
    fn readers_never_see_another_slices_word_while_frames_are_reused() {
        let own = |cluster, found| found == word(cluster);
        while_read((APART, 2), own, |map, writer| {
            for round in 0..3000u64 {
                let slice = round.wrapping_mul(31) % SLICES;
                writer.fill(map, SliceIndex(slice), &slice_words(slice));
            }
        });
    }

    #[test]
    fn readers_never_see_another_slices_word_while_runs_begin_and_end() {
        let own = |cluster, found| found == word(cluster) || (found == Word::ZERO && cluster % 100 == 7);
        while_read((TOGETHER, 2), own, |map, writer| {
            for slice in 0..SLICES {
                writer.fill(map, SliceIndex(slice), &slice_words(slice));
            }
            // Each change begins or ends a run, and the frames move between slices.
            for round in 0..3000u64 {
                let slice = round.wrapping_mul(31) % SLICES;
                let cluster = (slice * SLICE_WORDS).next_multiple_of(100) + 7;
                for word in [Word::ZERO, word(cluster)] {
                    writer.publish(map, GuestCluster(cluster), word, SubclusterMap::default());
                }
            }
        });
    }

    #[test]
    fn readers_never_see_another_slices_word_while_memory_is_taken_away() {
        let own = |cluster, found| found == word(cluster);
        while_read((APART, 24), own, |map, writer| {
            let (writer, filled) = (Mutex::new(writer), AtomicBool::new(false));
            let lock = || writer.lock().expect("no panic under this lock");
            thread::scope(|scope| {
                // As the housekeeper does: it holds the lock while it sweeps, not while it releases memory.
                let sweeper = scope.spawn(|| {
                    let mut taken = 0;
                    while !filled.load(Ordering::Relaxed) || taken == 0 {
                        let swept = lock().sweep(map, 0);
                        let words = swept.frames.iter().flat_map(|frame| map.pages(*frame)).flatten();
                        words.for_each(|word| word.store(0, Ordering::Relaxed));
                        lock().take_back(map, &swept.frames);
                        taken += swept.frames.len();
                    }
                });
                for round in 0..3000u64 {
                    let slice = round.wrapping_mul(31) % SLICES;
                    lock().fill(map, SliceIndex(slice), &slice_words(slice));
                }
                filled.store(true, Ordering::Relaxed);
                sweeper.join().expect("the sweeper");
            });
        });
    }
}
