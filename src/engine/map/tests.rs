//! Tests of the chain map, its runs and its clock.

use super::*;
use crate::word::FileIndex;
use qcow2::HostOffset;

/// Cluster bits: with `APART` the words below are no run, with `TOGETHER` they are one.
pub(super) const APART: u32 = 16;
pub(super) const TOGETHER: u32 = 9;

pub(super) fn word(n: u64) -> Word {
    Word::data(FileIndex(0), HostOffset(n * 512), true)
}

pub(super) fn slice_words(slice: u64) -> Vec<Word> {
    (0..SLICE_WORDS).map(|i| word(slice * SLICE_WORDS + i)).collect()
}

#[test]
fn absent_slices_are_unresolved_and_filled_ones_answer() {
    let map = ChainMap::new(10_000, APART, 4, false);
    let mut writer = MapWriter::new();
    assert_eq!(map.lookup(GuestCluster(5)), Word::UNRESOLVED);
    assert_eq!(map.lookup(GuestCluster(u64::MAX)), Word::UNRESOLVED);
    writer.fill(&map, SliceIndex(0), &slice_words(0));
    assert_eq!(map.lookup(GuestCluster(5)), word(5));
    writer.publish(&map, GuestCluster(5), Word::ZERO, SubclusterMap::default());
    writer.publish(&map, GuestCluster(9999), Word::ZERO, SubclusterMap::default());
    assert_eq!(map.lookup(GuestCluster(5)), Word::ZERO);
    assert_eq!(map.lookup(GuestCluster(9999)), Word::UNRESOLVED);
}

/// A disk may grow within its last cluster, and what that cluster reads as then is not what it was.
#[test]
fn a_disk_that_grows_resolves_its_last_cluster_again() {
    for (clusters, step) in
        [(SLICE_WORDS, APART), (SLICE_WORDS, TOGETHER), (SLICE_WORDS + 1, APART), (1, APART)]
    {
        for grown in [clusters, clusters + 1] {
            let map = ChainMap::new(clusters, step, 4, false);
            let mut writer = MapWriter::new();
            let slice = SliceIndex::of(GuestCluster(clusters - 1));
            let words = slice_words(slice.0);
            writer.fill(&map, slice, &words[..map.slice_len(slice)]);
            assert_eq!(map.lookup(GuestCluster(clusters - 1)), word(clusters - 1));
            writer.grow(&map, grown);
            assert_eq!(map.lookup(GuestCluster(clusters - 1)), Word::UNRESOLVED, "{clusters} to {grown}");
        }
    }
}

#[test]
fn a_vast_disk_makes_few_leaves() {
    let leaf = LEAF_ENTRIES * SLICE_WORDS;
    let map = ChainMap::new(leaf << 19, APART, 3, false);
    let mut writer = MapWriter::new();
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
    let map = ChainMap::new(100 * SLICE_WORDS, APART, 3, false);
    let mut writer = MapWriter::new();
    for slice in 0..100 {
        writer.fill(&map, SliceIndex(slice), &slice_words(slice));
        for cluster in (0..100 * SLICE_WORDS).step_by(97) {
            let found = map.lookup(GuestCluster(cluster));
            assert!(found == Word::UNRESOLVED || found == word(cluster));
        }
    }
    let resident = (0..100).filter(|s| map.lookup(GuestCluster(s * SLICE_WORDS)) != Word::UNRESOLVED).count();
    assert_eq!(resident, 3);
}

/// Sweeps the whole map. Clears the frames of the sweep, as if the host had released their memory, and returns them.
#[cfg(not(feature = "tiny-bounds"))]
fn sweep(map: &ChainMap, writer: &mut MapWriter) -> usize {
    let frames = take_idle(map, writer);
    clear(map, &frames);
    writer.take_back(map, &frames);
    frames.len()
}

/// Sweeps the whole map, and returns the frames of the sweep.
#[cfg(not(feature = "tiny-bounds"))]
fn take_idle(map: &ChainMap, writer: &mut MapWriter) -> Vec<usize> {
    let (mut frames, mut from) = (Vec::new(), Some(0));
    while let Some(at) = from {
        let swept = writer.sweep(map, at);
        frames.extend(swept.frames);
        from = swept.next;
    }
    frames
}

#[cfg(not(feature = "tiny-bounds"))]
fn clear(map: &ChainMap, frames: &[usize]) {
    let words = frames.iter().flat_map(|frame| map.pages(*frame)).flatten();
    words.for_each(|word| word.store(0, Ordering::Relaxed));
}

// Needs leaves for 40 slices.
#[cfg(not(feature = "tiny-bounds"))]
#[test]
fn a_sweep_takes_what_nobody_looked_up_since_the_last() {
    for has_subclusters in [false, true] {
        let map = ChainMap::new(100 * SLICE_WORDS, APART, 40, has_subclusters);
        let mut writer = MapWriter::new();
        for slice in 0..30 {
            writer.fill(&map, SliceIndex(slice), &slice_words(slice));
        }
        assert_eq!(sweep(&map, &mut writer), 0, "filling is using");
        let used = |slice: u64| slice % 3 == 1;
        (0..30).filter(|slice| used(*slice)).for_each(|slice| {
            map.lookup(GuestCluster(slice * SLICE_WORDS + 9));
        });
        let before = writer.bytes(&map);
        assert_eq!(sweep(&map, &mut writer), 20);
        assert_eq!(before - writer.bytes(&map), 20 * map.frame_bytes());
        for slice in 0..30 {
            let cluster = slice * SLICE_WORDS + 5;
            let there = if used(slice) { word(cluster) } else { Word::UNRESOLVED };
            assert_eq!(map.lookup(GuestCluster(cluster)), there);
        }
        assert_eq!((sweep(&map, &mut writer), sweep(&map, &mut writer)), (0, 9), "one stays");
        assert!(!map.is_sweepable());
        for slice in 0..40 {
            writer.fill(&map, SliceIndex(slice), &slice_words(slice));
        }
        assert_eq!(writer.owners.len(), 40, "frames without memory are used again");
        (0..40 * SLICE_WORDS).for_each(|at| assert_eq!(map.lookup(GuestCluster(at)), word(at)));
        assert_eq!(before + 10 * map.frame_bytes(), writer.bytes(&map));
    }
}

// Needs leaves for 100 slices.
#[cfg(not(feature = "tiny-bounds"))]
#[test]
fn no_slice_gets_a_frame_that_is_away() {
    let map = ChainMap::new(100 * SLICE_WORDS, APART, 4, false);
    let mut writer = MapWriter::new();
    (0..4).for_each(|slice| writer.fill(&map, SliceIndex(slice), &slice_words(slice)));
    take_idle(&map, &mut writer);
    let idle = take_idle(&map, &mut writer);
    assert_eq!(idle.len(), 3);
    for slice in 0..100 {
        writer.fill(&map, SliceIndex(slice), &slice_words(slice));
        clear(&map, &idle);
        let first = slice * SLICE_WORDS;
        (first..first + SLICE_WORDS).for_each(|at| assert_eq!(map.lookup(GuestCluster(at)), word(at)));
    }
    writer.take_back(&map, &idle);
    (0..3).for_each(|slice| writer.fill(&map, SliceIndex(slice), &slice_words(slice)));
    (0..3 * SLICE_WORDS).for_each(|at| assert_eq!(map.lookup(GuestCluster(at)), word(at)));
}

/// A map of `clusters` clusters that is a run from end to end, with two frames.
fn run(clusters: u64) -> (ChainMap, MapWriter) {
    let map = ChainMap::new(clusters, TOGETHER, 2, false);
    let mut writer = MapWriter::new();
    for slice in 0..clusters.div_ceil(SLICE_WORDS) {
        let count = (clusters - slice * SLICE_WORDS).min(SLICE_WORDS);
        writer.fill(&map, SliceIndex(slice), &slice_words(slice)[..count as usize]);
    }
    (map, writer)
}

fn agrees(map: &ChainMap, model: &[Word]) {
    for (cluster, word) in (0..).zip(model) {
        assert_eq!(map.lookup(GuestCluster(cluster)), *word, "cluster {cluster}");
    }
}

/// Frames that hold a slice.
fn held(writer: &MapWriter) -> usize {
    writer.owners.iter().filter(|owner| owner.slice.is_some()).count()
}

#[test]
fn a_contiguous_slice_takes_no_frame() {
    // More slices than frames, in one leaf.
    let clusters = 3 * SLICE_WORDS + 5;
    let (map, writer) = run(clusters);
    assert_eq!(writer.owners.len(), 0);
    assert_eq!(writer.bytes(&map), LEAF_ENTRIES as usize * 8);
    agrees(&map, &(0..clusters).map(word).collect::<Vec<_>>());
    assert_eq!(map.lookup(GuestCluster(clusters)), Word::UNRESOLVED, "a run ends with the disk");
    for all in [Word::ZERO, Word::MIXED] {
        let (map, mut writer) = run(clusters);
        writer.fill(&map, SliceIndex(1), &[all; SLICE_WORDS as usize]);
        assert_eq!((writer.owners.len(), map.lookup(SliceIndex(1).first())), (0, all));
    }
}

#[test]
fn a_slice_with_one_cluster_elsewhere_is_no_run() {
    for at in [0, 1, SLICE_WORDS as usize / 2, SLICE_WORDS as usize - 1] {
        for other in
            [Word::UNRESOLVED, Word::ZERO, word(9999), Word::data(FileIndex(1), HostOffset(512), true)]
        {
            let (map, mut writer) = run(2 * SLICE_WORDS);
            let mut words = slice_words(1);
            words[at] = other;
            writer.fill(&map, SliceIndex(1), &words);
            assert_eq!(held(&writer), 1, "{other:?} at {at}");
            agrees(&map, &[slice_words(0), words].concat());
        }
    }
}

#[test]
fn a_change_ends_a_run_and_the_same_change_undone_begins_it() {
    let clusters = SLICE_WORDS + 5;
    let (map, mut writer) = run(clusters);
    let mut model: Vec<Word> = (0..clusters).map(word).collect();
    for cluster in [0, 7, SLICE_WORDS - 1, SLICE_WORDS, clusters - 1] {
        for (new, taken) in [(word(cluster), 0), (word(5000), 1), (word(5000), 1), (word(cluster), 0)] {
            writer.publish(&map, GuestCluster(cluster), new, SubclusterMap::default());
            model[cluster as usize] = new;
            agrees(&map, &model);
            assert_eq!(held(&writer), taken, "{new:?} at {cluster}");
        }
    }
    assert_eq!(writer.owners.len(), 1, "a frame that is free is taken before another");
}

#[test]
fn words_published_in_any_order_end_as_a_run() {
    let (map, mut writer) = run(SLICE_WORDS);
    let mut model = slice_words(0);
    for round in 0..3 {
        for n in 0..SLICE_WORDS {
            // With an odd factor, each cluster occurs once.
            let cluster = (n * 77 + round * 13) % SLICE_WORDS;
            let new = if round % 2 == 0 { Word::ZERO } else { word(7000 + cluster) };
            writer.publish(&map, GuestCluster(cluster), new, SubclusterMap::default());
            model[cluster as usize] = new;
            assert_eq!(map.lookup(GuestCluster(cluster)), new);
            assert_eq!(held(&writer), usize::from(n + 1 < SLICE_WORDS));
        }
        agrees(&map, &model);
    }
}

#[test]
fn a_run_that_ends_in_a_full_map_evicts_another_slice() {
    let (map, mut writer) = run(6 * SLICE_WORDS);
    for slice in 0..6 {
        writer.publish(&map, SliceIndex(slice).first(), Word::ZERO, SubclusterMap::default());
        assert_eq!(map.lookup(SliceIndex(slice).first()), Word::ZERO);
        assert_eq!(map.lookup(GuestCluster(slice * SLICE_WORDS + 1)), word(slice * SLICE_WORDS + 1));
    }
    let resident = (0..6).filter(|s| map.lookup(SliceIndex(*s).first()) != Word::UNRESOLVED).count();
    assert_eq!((resident, held(&writer)), (2, 2));
}

/// Compares the map with a plain list of words, for random fills and commits of all kinds of words, with few frames.
#[test]
fn runs_and_frames_say_what_was_published() {
    let clusters = 4 * SLICE_WORDS + 3;
    let map = ChainMap::new(clusters, TOGETHER, 2, false);
    let mut writer = MapWriter::new();
    let mut model = vec![Word::ZERO; clusters as usize];
    let mut x = 7u64;
    let mut chance = |below: u64| {
        x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (x >> 33) % below
    };
    let mut runs = 0;
    for round in 0..400 {
        let first = chance(clusters);
        let count = if chance(2) == 0 { 1 + chance(5) } else { chance(3 * SLICE_WORDS) };
        let kind = chance(4);
        for cluster in first..(first + count).min(clusters) {
            let slice = SliceIndex::of(GuestCluster(cluster));
            let at = slice.first().0 as usize;
            let end = model.len().min(at + SLICE_WORDS as usize);
            if map.lookup(GuestCluster(cluster)) == Word::UNRESOLVED {
                writer.fill(&map, slice, &model[at..end]);
            }
            let new = match kind {
                0 => Word::ZERO,
                1 => Word::MIXED,
                _ => word(cluster + 10_000 * kind),
            };
            writer.publish(&map, GuestCluster(cluster), new, SubclusterMap::default());
            model[cluster as usize] = new;
        }
        for (cluster, word) in (0..).zip(&model) {
            let found = map.lookup(GuestCluster(cluster));
            assert!(found == *word || found == Word::UNRESOLVED, "round {round}: {found:?}, not {word:?}");
        }
        let resident = (0..5).filter(|s| map.lookup(SliceIndex(*s).first()) != Word::UNRESOLVED).count();
        runs += resident - held(&writer);
    }
    assert!(runs > 100, "chance made too few runs: {runs}");
}
