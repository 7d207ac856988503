//! The chain map: one word a guest cluster, read without a lock.
//!
//! Words lie in frames of [`SLICE_WORDS`]; a directory entry names the frame of a slice of the guest's clusters.
//! Readers ([`ChainMap::lookup`]) take no lock and count no reference: load the entry, load the word, load the entry
//! again. Frames are bounded in number, evicted by clock and never freed while the map lives, so a stale read is
//! harmless and is found out. All changes are made under the engine's one lock, through [`MapWriter`].
//!
//! Where images have subclusters, a frame has a second word a cluster: which of them are data in the host cluster that
//! the first word names ([`Word::has_parts`]), and which read as zero. A reader must join no word with the second word of
//! another host cluster. It loads the entry, the word, the second word, the word again and the entry again
//! ([`ChainMap::lookup_parts`]). The writer ([`Frame::put`]) goes from one host cluster to another by way of
//! [`Word::MIXED`]: whoever got the second word of the new cluster sees that store when it loads the word again, and a
//! word once gone does not come back while the reader is in its epoch: for that its host cluster would have to be freed
//! and handed out again (docs/concurrency.md, "Epochs"). Where only the subclusters change, one store of the second word
//! publishes it.

use qcow2::{GuestCluster, Subcluster, SubclusterSet, Subclusters};

use crate::sync::{AtomicBool, AtomicU64, OnceLock, Ordering, zeroed};
use crate::word::Word;

/// Words in a slice: guest clusters that are resolved and evicted together. Few under loom, which follows each word.
pub const SLICE_WORDS: u64 = if cfg!(loom) { 2 } else { 512 };

/// Directory entries in a leaf of the directory.
const LEAF_ENTRIES: u64 = if cfg!(loom) { 4 } else { 4096 };

/// The most leaves that are made, of 32 KiB each: enough for 2^31 clusters, so that a disk of some 2^60 bytes, which an
/// image of a few clusters may claim, does not cost more. What lies in no leaf is resolved anew each time.
const LEAVES_MAX: usize = if cfg!(loom) { 4 } else { 1024 };

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

/// The second word of a cluster: its subclusters, as far as they are known.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Parts(pub(crate) u64);

impl Parts {
    /// All of them read as zero.
    pub(crate) const ZERO: Parts = Parts((SubclusterSet::ALL.0 as u64) << 32);

    /// Of these subclusters; those without data of their own read as zero if there is nothing below.
    pub(crate) fn new(subclusters: &Subclusters, nothing_below: bool) -> Self {
        let below = if nothing_below { subclusters.unallocated() } else { SubclusterSet::EMPTY };
        Parts(Subclusters { zero: subclusters.zero.with(below), ..*subclusters }.bitmap())
    }

    /// What a subcluster is, and how many from it on are the same; [`Subcluster::Unallocated`] is not known.
    #[inline]
    pub fn at(self, index: u32) -> (Subcluster, u32) {
        let (allocated, zero) = (SubclusterSet(self.0 as u32), SubclusterSet((self.0 >> 32) as u32));
        Subclusters { host: None, allocated, zero }.at(index)
    }
}

struct Frame {
    words: [AtomicU64; SLICE_WORDS as usize],
    /// The second words, where images have subclusters.
    parts: Option<Box<[AtomicU64; SLICE_WORDS as usize]>>,
    /// Set by readers, cleared by the clock.
    referenced: AtomicBool,
}

impl Frame {
    fn new(has_parts: bool) -> Self {
        let parts = has_parts.then(|| Box::new(zeroed()));
        Frame { words: zeroed(), parts, referenced: AtomicBool::new(false) }
    }

    /// Stores what is known of a cluster. The order is that of the module's first lines.
    fn put(&self, at: usize, word: Word, parts: Parts) {
        if let (true, Some(seconds)) = (word.has_parts(), &self.parts) {
            let before = Word(self.words[at].load(Ordering::Relaxed));
            if before.has_parts() && before != word {
                self.words[at].store(Word::MIXED.0, Ordering::Release);
            }
            // Release, paired with the acquire in `lookup_parts`: who loads this sees the store above.
            seconds[at].store(parts.0, Ordering::Release);
            if before == word {
                return;
            }
        }
        self.words[at].store(word.0, Ordering::Release);
    }
}

/// A directory entry: frame number + 1 in the low half (0: no frame), the generation of its use in the high half.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Entry(u64);

impl Entry {
    const ABSENT: Entry = Entry(0);

    fn new(frame: usize, generation: u32) -> Self {
        Entry((u64::from(generation) << 32) | (frame as u64 + 1))
    }

    fn frame(self) -> Option<usize> {
        let low = self.0 & u64::from(u32::MAX);
        (low != 0).then(|| low as usize - 1)
    }
}

type Leaf = Box<[AtomicU64]>;

/// The shared side of the map.
pub(crate) struct ChainMap {
    has_parts: bool,
    directory: Box<[OnceLock<Leaf>]>,
    frames: Box<[OnceLock<Box<Frame>>]>,
}

impl ChainMap {
    /// A map for `clusters` guest clusters in at most `frames` frames (4 KiB each, made when first used).
    #[cfg(test)]
    pub fn new(clusters: u64, frames: usize) -> Self {
        Self::with_parts(clusters, frames, false)
    }

    /// As [`ChainMap::new`]; with second words for subclusters (8 KiB a frame) if `has_parts`.
    pub fn with_parts(clusters: u64, frames: usize, has_parts: bool) -> Self {
        let slices = clusters.div_ceil(SLICE_WORDS);
        let leaves = slices.div_ceil(LEAF_ENTRIES) as usize;
        ChainMap {
            has_parts,
            directory: (0..leaves).map(|_| OnceLock::new()).collect(),
            frames: (0..frames.max(1)).map(|_| OnceLock::new()).collect(),
        }
    }

    /// The word of a cluster; unresolved if its slice is not resident. No lock, no allocation.
    #[inline]
    pub fn lookup(&self, cluster: GuestCluster) -> Word {
        let slice = SliceIndex::of(cluster);
        let Some(slot) = self.slot(slice) else { return Word::UNRESOLVED };
        loop {
            // Pairs with the release store in `MapWriter::publish_entry`: the frame's words are this slice's.
            let entry = Entry(slot.load(Ordering::Acquire));
            let Some(frame) = entry.frame().and_then(|frame| self.frames[frame].get()) else {
                return Word::UNRESOLVED;
            };
            // Acquire, paired with the release of every word store: if this word was stored for another slice, the
            // store that took the frame away from ours is visible to the load below.
            let word = frame.words[(cluster.0 % SLICE_WORDS) as usize].load(Ordering::Acquire);
            if Entry(slot.load(Ordering::Relaxed)) == entry {
                if !frame.referenced.load(Ordering::Relaxed) {
                    frame.referenced.store(true, Ordering::Relaxed);
                }
                return Word(word);
            }
        }
    }

    /// The word and the second word of a cluster of subclusters; nothing if it is none, or not resident. As
    /// [`ChainMap::lookup`].
    #[inline]
    pub fn lookup_parts(&self, cluster: GuestCluster) -> Option<(Word, Parts)> {
        let slot = self.slot(SliceIndex::of(cluster))?;
        let at = (cluster.0 % SLICE_WORDS) as usize;
        loop {
            let entry = Entry(slot.load(Ordering::Acquire));
            let frame = self.frames[entry.frame()?].get()?;
            let word = Word(frame.words[at].load(Ordering::Acquire));
            if !word.has_parts() {
                return None;
            }
            // Acquire: the loads below see what was stored before this was.
            let parts = frame.parts.as_ref()?[at].load(Ordering::Acquire);
            let again = frame.words[at].load(Ordering::Relaxed);
            if again == word.0 && Entry(slot.load(Ordering::Relaxed)) == entry {
                return Some((word, Parts(parts)));
            }
        }
    }

    /// True if there are second words.
    pub fn has_parts(&self) -> bool {
        self.has_parts
    }

    #[inline]
    fn slot(&self, slice: SliceIndex) -> Option<&AtomicU64> {
        let leaf = self.directory.get((slice.0 / LEAF_ENTRIES) as usize)?.get()?;
        leaf.get((slice.0 % LEAF_ENTRIES) as usize)
    }

    fn frame(&self, frame: usize) -> &Frame {
        self.frames[frame].get_or_init(|| Box::new(Frame::new(self.has_parts)))
    }
}

/// The changing side of the map. Lives in the engine's locked state, so there is one writer at a time.
pub(crate) struct MapWriter {
    /// For each frame: the slice it holds and the generation of this use.
    owners: Vec<Owner>,
    hand: usize,
    /// Leaves made so far.
    leaves: usize,
}

#[derive(Clone, Copy)]
struct Owner {
    slice: Option<SliceIndex>,
    generation: u32,
}

impl MapWriter {
    pub fn new(map: &ChainMap) -> Self {
        MapWriter { owners: vec![Owner { slice: None, generation: 0 }; map.frames.len()], hand: 0, leaves: 0 }
    }

    /// True if a slice can be made resident.
    pub fn has_room(&self, map: &ChainMap, slice: SliceIndex) -> bool {
        self.leaves < LEAVES_MAX || map.slot(slice).is_some()
    }

    /// Makes a slice resident with these words (at most [`SLICE_WORDS`]), evicting another if the map is full; unless
    /// there is no room for it.
    #[cfg(test)]
    pub fn fill(&mut self, map: &ChainMap, slice: SliceIndex, words: &[Word]) {
        self.fill_with_parts(map, slice, words, &[]);
    }

    /// As [`MapWriter::fill`]; with the second words of those that have some.
    pub fn fill_with_parts(&mut self, map: &ChainMap, slice: SliceIndex, words: &[Word], parts: &[Parts]) {
        if !self.has_room(map, slice) {
            return;
        }
        let Some(leaf) = map.directory.get((slice.0 / LEAF_ENTRIES) as usize) else { return };
        if leaf.get().is_none() {
            self.leaves += 1;
        }
        let leaf = leaf.get_or_init(|| (0..LEAF_ENTRIES).map(|_| AtomicU64::new(0)).collect());
        let slot = &leaf[(slice.0 % LEAF_ENTRIES) as usize];
        let present = Entry(slot.load(Ordering::Relaxed)).frame();
        let number = present.unwrap_or_else(|| self.take_frame(map));
        let frame = map.frame(number);
        for (at, word) in words.iter().enumerate() {
            frame.put(at, *word, parts.get(at).copied().unwrap_or_default());
        }
        for stored in frame.words.iter().skip(words.len()) {
            stored.store(0, Ordering::Release);
        }
        if present.is_none() {
            frame.referenced.store(true, Ordering::Relaxed);
            let owner = &mut self.owners[number];
            owner.slice = Some(slice);
            owner.generation = owner.generation.wrapping_add(1);
            Self::publish_entry(slot, Entry::new(number, owner.generation));
        }
    }

    /// Publishes a cluster's new words, if its slice is resident.
    pub fn publish(&mut self, map: &ChainMap, cluster: GuestCluster, word: Word, parts: Parts) {
        let Some(slot) = map.slot(SliceIndex::of(cluster)) else { return };
        if let Some(frame) = Entry(slot.load(Ordering::Relaxed)).frame() {
            map.frame(frame).put((cluster.0 % SLICE_WORDS) as usize, word, parts);
        }
    }

    fn publish_entry(slot: &AtomicU64, entry: Entry) {
        slot.store(entry.0, Ordering::Release);
    }

    /// A frame for a new slice: one never used, or by clock one that no reader used lately.
    fn take_frame(&mut self, map: &ChainMap) -> usize {
        loop {
            let number = self.hand;
            self.hand = (self.hand + 1) % self.owners.len();
            let Some(slice) = self.owners[number].slice else { return number };
            if map.frame(number).referenced.swap(false, Ordering::Relaxed) {
                continue;
            }
            if let Some(slot) = map.slot(slice) {
                Self::publish_entry(slot, Entry::ABSENT);
            }
            self.owners[number].slice = None;
            return number;
        }
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use std::thread;

    use super::*;
    use crate::word::FileIndex;
    use qcow2::HostOffset;

    fn word(n: u64) -> Word {
        Word::data(FileIndex(0), HostOffset(n * 512), true)
    }

    fn slice_words(slice: u64) -> Vec<Word> {
        (0..SLICE_WORDS).map(|i| word(slice * SLICE_WORDS + i)).collect()
    }

    #[test]
    fn absent_slices_are_unresolved_and_filled_ones_answer() {
        let map = ChainMap::new(10_000, 4);
        let mut writer = MapWriter::new(&map);
        assert_eq!(map.lookup(GuestCluster(5)), Word::UNRESOLVED);
        assert_eq!(map.lookup(GuestCluster(u64::MAX)), Word::UNRESOLVED);
        writer.fill(&map, SliceIndex(0), &slice_words(0));
        assert_eq!(map.lookup(GuestCluster(5)), word(5));
        writer.publish(&map, GuestCluster(5), Word::ZERO, Parts::default());
        writer.publish(&map, GuestCluster(9999), Word::ZERO, Parts::default());
        assert_eq!(map.lookup(GuestCluster(5)), Word::ZERO);
        assert_eq!(map.lookup(GuestCluster(9999)), Word::UNRESOLVED);
    }

    #[test]
    fn a_vast_disk_makes_few_leaves() {
        let leaf = LEAF_ENTRIES * SLICE_WORDS;
        let map = ChainMap::new(1 << 40, 3);
        let mut writer = MapWriter::new(&map);
        for n in 0..2 * LEAVES_MAX as u64 {
            writer.fill(&map, SliceIndex::of(GuestCluster(n * leaf)), &slice_words(n));
        }
        assert_eq!(map.directory.iter().filter(|leaf| leaf.get().is_some()).count(), LEAVES_MAX);
        assert_eq!(map.lookup(GuestCluster(leaf * 2 * LEAVES_MAX as u64)), Word::UNRESOLVED);
        writer.fill(&map, SliceIndex(1), &slice_words(1));
        assert_eq!(map.lookup(SliceIndex(1).first()), word(SLICE_WORDS), "what has a leaf is kept");
    }

    #[test]
    fn a_full_map_evicts_and_never_mixes_slices() {
        let map = ChainMap::new(100 * SLICE_WORDS, 3);
        let mut writer = MapWriter::new(&map);
        for slice in 0..100 {
            writer.fill(&map, SliceIndex(slice), &slice_words(slice));
            for cluster in (0..100 * SLICE_WORDS).step_by(97) {
                let found = map.lookup(GuestCluster(cluster));
                assert!(found == Word::UNRESOLVED || found == word(cluster));
            }
        }
        let resident =
            (0..100).filter(|s| map.lookup(GuestCluster(s * SLICE_WORDS)) != Word::UNRESOLVED).count();
        assert_eq!(resident, 3);
    }

    #[test]
    fn readers_never_see_another_slices_word_while_frames_are_reused() {
        let map = ChainMap::new(64 * SLICE_WORDS, 2);
        let mut writer = MapWriter::new(&map);
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            let readers: Vec<_> = (0..2u64)
                .map(|seed| {
                    let (map, stop) = (&map, &stop);
                    scope.spawn(move || {
                        let mut x = seed + 1;
                        while !stop.load(Ordering::Relaxed) {
                            x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                            let cluster = (x >> 33) % (64 * SLICE_WORDS);
                            let found = map.lookup(GuestCluster(cluster));
                            assert!(found == Word::UNRESOLVED || found == word(cluster));
                        }
                    })
                })
                .collect();
            for round in 0..3000u64 {
                let slice = round.wrapping_mul(31) % 64;
                writer.fill(&map, SliceIndex(slice), &slice_words(slice));
            }
            stop.store(true, Ordering::Relaxed);
            for reader in readers {
                reader.join().expect("reader");
            }
        });
    }
}
