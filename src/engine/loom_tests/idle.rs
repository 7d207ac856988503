//! Models of frames whose memory is released and allocated again: "The map without a lock" in docs/concurrency.md.

use super::*;

/// Sweeps the map twice, and releases the memory of the frames found. The first sweep only clears the flags that the
/// fills set. Any thread may do this. The zeros are stored as the host does it, with no order.
fn sweep(map: &ChainMap, writer: &mut MapWriter) {
    writer.sweep(map, 0);
    let swept = writer.sweep(map, 0);
    swept.frames.iter().flat_map(|frame| map.pages(*frame)).flatten().for_each(|word| {
        word.store(0, Ordering::Relaxed);
    });
    writer.take_back(map, &swept.frames);
}

#[test]
fn a_frame_loses_its_memory_and_goes_to_another_slice() {
    explore(Some(3), || {
        let (map, mut writer) = map(4, 2, 2);
        let readers = [reader(&map, 0), reader(&map, SLICE_WORDS)];
        sweep(&map, &mut writer);
        writer.fill(&map, SliceIndex(2), &words(2));
        writer.fill(&map, SliceIndex(3), &words(3));
        readers.into_iter().for_each(|reader| reader.join().expect("reader"));
    });
}

#[test]
fn a_slice_comes_back_without_a_moment_of_another() {
    explore(Some(3), || {
        let (map, mut writer) = map(3, 2, 2);
        let readers = [reader(&map, 0), reader(&map, SLICE_WORDS)];
        sweep(&map, &mut writer);
        writer.fill(&map, SliceIndex(1), &words(1));
        writer.fill(&map, SliceIndex(0), &words(0));
        readers.into_iter().for_each(|reader| reader.join().expect("reader"));
    });
}

/// The second word of a cluster is its own, or zero: no subcluster is known.
#[test]
fn second_words_are_their_own_or_say_nothing() {
    explore(Some(3), || {
        let map = Arc::new(ChainMap::new(4 * SLICE_WORDS, 16, 2, true));
        let mut writer = MapWriter::new();
        fill_split(&mut writer, &map, 0, 1);
        fill_split(&mut writer, &map, 1, 2);
        let reading = Arc::clone(&map);
        let reader = thread::spawn(move || {
            let found = reading.lookup_subclusters(GuestCluster(SLICE_WORDS));
            let (word, subclusters) = split(2);
            let known = [None, Some((word, subclusters)), Some((word, SubclusterMap(0)))].contains(&found);
            assert!(known, "{found:?}");
        });
        sweep(&map, &mut writer);
        fill_split(&mut writer, &map, 2, 3);
        fill_split(&mut writer, &map, 3, 4);
        reader.join().expect("reader");
    });
}

/// One thread releases memory while another fills slices, and a third reads.
#[test]
fn slices_are_filled_while_a_frame_is_away() {
    explore(Some(2), || {
        let (map, mut writer) = map(4, 2, 2);
        let reader = reader(&map, SLICE_WORDS);
        writer.sweep(&map, 0);
        let frames = writer.sweep(&map, 0).frames;
        let (taking, away) = (Arc::clone(&map), frames.clone());
        let keeper = thread::spawn(move || {
            away.iter().flat_map(|frame| taking.pages(*frame)).flatten().for_each(|word| {
                word.store(0, Ordering::Relaxed);
            });
        });
        writer.fill(&map, SliceIndex(2), &words(2));
        writer.fill(&map, SliceIndex(3), &words(3));
        keeper.join().expect("keeper");
        writer.take_back(&map, &frames);
        writer.fill(&map, SliceIndex(1), &words(1));
        reader.join().expect("reader");
        assert_eq!(map.lookup(GuestCluster(SLICE_WORDS)), word(SLICE_WORDS));
    });
}
