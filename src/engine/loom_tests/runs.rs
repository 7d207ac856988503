//! Models of slices that become runs and stop being runs: "The map without a lock" in docs/concurrency.md.
//!
//! A slice has two clusters here. It is a run if the second directly follows the first on the host, or both read as
//! zero.

use super::*;

/// A cluster size in bytes for which the words of [`word`] are a run.
const TOGETHER: u32 = 16;

/// A map of two slices with these words; the second slice is resident only if its words are given.
fn map_of(frames: usize, first: [Word; 2], second: Option<[Word; 2]>) -> (Arc<ChainMap>, MapWriter) {
    let map = ChainMap::new(2 * SLICE_WORDS, TOGETHER, frames, false);
    let mut writer = MapWriter::new();
    writer.fill(&map, SliceIndex(0), &first);
    if let Some(second) = second {
        writer.fill(&map, SliceIndex(1), &second);
    }
    (Arc::new(map), writer)
}

/// Words of the second slice; they are no run.
const SCATTERED: [Word; 2] = [Word::MIXED, Word::ZERO];

/// Looks up a cluster in a thread of its own, which must find one of these words.
fn finds(map: &Arc<ChainMap>, cluster: u64, words: &[Word]) -> thread::JoinHandle<()> {
    let (map, words) = (Arc::clone(map), words.to_vec());
    thread::spawn(move || {
        let found = map.lookup(GuestCluster(cluster));
        assert!(words.contains(&found), "{found:?} for cluster {cluster}");
    })
}

fn join<const N: usize>(readers: [thread::JoinHandle<()>; N]) {
    for reader in readers {
        reader.join().expect("reader");
    }
}

/// The frame is taken from another slice, which is read at the same time.
#[test]
fn a_run_ends_by_a_commit_in_another_slices_frame() {
    explore(Some(3), || {
        let (map, mut writer) = map_of(1, [word(0), word(1)], Some(SCATTERED));
        let readers = [
            finds(&map, 1, &[word(1), word(77)]),
            finds(&map, SLICE_WORDS, &[Word::UNRESOLVED, SCATTERED[0]]),
        ];
        writer.publish(&map, GuestCluster(1), word(77), SubclusterMap::default());
        join(readers);
    });
}

/// A cluster that the commit does not change stays resident all the time.
#[test]
fn the_other_cluster_of_a_run_that_ends_stays() {
    explore(None, || {
        let (map, mut writer) = map_of(1, [word(0), word(1)], None);
        let reader = finds(&map, 0, &[word(0)]);
        writer.publish(&map, GuestCluster(1), word(77), SubclusterMap::default());
        join([reader]);
    });
}

/// The frame that a new run frees goes to another slice at once.
#[test]
fn a_run_begins_and_its_frame_goes_to_another_slice() {
    explore(Some(3), || {
        let (map, mut writer) = map_of(1, [word(0), word(77)], None);
        let readers = [
            finds(&map, 1, &[word(1), word(77)]),
            finds(&map, SLICE_WORDS + 1, &[Word::UNRESOLVED, SCATTERED[1]]),
        ];
        writer.publish(&map, GuestCluster(1), word(1), SubclusterMap::default());
        writer.fill(&map, SliceIndex(1), &SCATTERED);
        join(readers);
    });
}

/// Run, frame, run, frame: a reader sees the words in order, and finds one at any time.
#[test]
fn a_slice_that_becomes_a_run_and_back_goes_forward_only() {
    explore(Some(3), || {
        let story = [word(1), word(77), Word::ZERO, word(78)];
        let (map, mut writer) = map_of(1, [word(0), story[0]], None);
        let reader = {
            let map = Arc::clone(&map);
            thread::spawn(move || {
                let place = || {
                    let found = map.lookup(GuestCluster(1));
                    story.iter().position(|word| *word == found).expect("one of the story's")
                };
                let first = place();
                assert!(first <= place(), "a commit was undone");
            })
        };
        writer.publish(&map, GuestCluster(0), Word::ZERO, SubclusterMap::default());
        for word in &story[1..] {
            writer.publish(&map, GuestCluster(1), *word, SubclusterMap::default());
        }
        join([reader]);
    });
}

/// A reader of a word that began or ended a run sees its data.
#[test]
fn a_run_brings_the_data_of_its_last_commit() {
    for before in [[word(0), word(77)], [Word::ZERO, Word::ZERO]] {
        explore(None, move || {
            let (map, mut writer) = map_of(1, before, None);
            let data = Arc::new(UnsafeCell::new(()));
            let reader = {
                let (map, data) = (Arc::clone(&map), Arc::clone(&data));
                thread::spawn(move || {
                    if map.lookup(GuestCluster(1)) == word(1) {
                        data.with(|_| ());
                    }
                })
            };
            data.with_mut(|_| ());
            writer.publish(&map, GuestCluster(1), word(1), SubclusterMap::default());
            join([reader]);
        });
    }
}

/// A cluster is unlinked by ending a run, or by beginning one. Either way, it is reused only after its I/O.
#[test]
fn a_cluster_of_a_run_is_kept_from_reuse_while_in_use() {
    for words in [[word(0), word(1)], [word(0), Word::ZERO]] {
        explore(None, move || {
            let mut bench = Bench::over(map_of(1, words, None), 1);
            let worker = bench.epochs.register();
            let worker = bench.worker(worker, request);
            bench.reclaim();
            worker.join().expect("worker");
        });
    }
}

/// The slice is a run for a while, and another slice has its frame meanwhile.
#[test]
fn second_words_do_not_outlive_a_run() {
    explore(Some(3), || {
        let map = ChainMap::new(2 * SLICE_WORDS, TOGETHER, 1, true);
        let mut writer = MapWriter::new();
        fill_split(&mut writer, &map, 0, 1);
        let map = Arc::new(map);
        let reader = split_reader(&map, 0, &[1, 2]);
        for cluster in [0, 1] {
            writer.publish(&map, GuestCluster(cluster), word(cluster), SubclusterMap::default());
        }
        fill_split(&mut writer, &map, 1, 5);
        let (second, subclusters) = split(2);
        writer.publish(&map, GuestCluster(0), second, subclusters);
        join([reader]);
    });
}
