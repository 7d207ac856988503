//! The engine alone, without files, against a byte-array model. The test carries out plans on byte vectors.
//! After every flush the bytes are reopened, as after a crash. They must equal the flushed contents, with exact
//! refcounts except for leaks.

mod bench;
mod drops;

use engine::ZeroMode;
use proptest::prelude::*;
use qcow2::Version;
use strata_kit::ByteModel;
use strata_kit::model::{DiscardRule, Geometry, Operation, contents, sequences, sequences_of_parts};

use crate::bench::{Bench, Files, Kind, apart, check_references, image, parts, whole};

/// Opens the bytes as they are now, without the state in memory, and compares them with the flushed contents.
fn reopen_and_compare(files: &Files, flushed: &ByteModel) {
    check_references(&files.0[0]);
    let mut bench = Bench::open(files.clone());
    let found = bench.read(0, bench.engine.size());
    flushed.compare_all(&found).unwrap_or_else(|difference| panic!("reopened after a flush: {difference}"));
}

/// Runs sessions on a chain. `kinds` are its layers from the top down, and `version` is that of the top.
fn run(version: Version, kinds: &[Kind], size: u64, sessions: &[Vec<Operation>], below: &[Operation]) {
    let granule = kinds[0].granule_size();
    let layer = |kind: Kind, version, overlay| image(version, kind, size, overlay);
    let mut chain: Vec<Vec<u8>> = Vec::new();
    let mut model = ByteModel::new(size, granule, DiscardRule::ZeroesClusters);
    // The layers below, from the base up. Each is written through its own engine.
    for (depth, kind) in kinds.iter().enumerate().skip(1).rev() {
        let mut files = vec![layer(*kind, Version::V3, !chain.is_empty())];
        files.extend(chain);
        let mut bench = Bench::open(Files(files));
        let mut own = ByteModel::with_contents(
            &bench.read(0, size),
            size,
            kind.granule_size(),
            DiscardRule::ZeroesClusters,
        );
        for operation in below.iter().skip(depth - 1) {
            bench.apply(operation, &mut own);
        }
        bench.flush().expect("flush");
        chain = bench.files.0;
        model = ByteModel::with_contents(&own.read(0, size), size, granule, DiscardRule::ZeroesClusters);
    }
    let over = !chain.is_empty();
    if over && version == Version::V2 {
        model = ByteModel::with_contents(&model.read(0, size), size, granule, DiscardRule::Nothing);
    }
    let mut files = vec![layer(kinds[0], version, over)];
    files.extend(chain);
    if kinds[0].apart {
        // The guest must never see bytes that no entry refers to.
        files.push(vec![0xee; size.next_multiple_of(512) as usize]);
    }
    let mut files = Files(files);
    for operations in sessions {
        let mut bench = Bench::open(files);
        for operation in operations {
            bench.apply(operation, &mut model);
            if *operation == Operation::Flush {
                reopen_and_compare(&bench.files, &model);
            }
        }
        bench.flush().expect("flush");
        reopen_and_compare(&bench.files, &model);
        files = bench.files;
    }
}

#[test]
fn a_vast_disk_is_served_beyond_what_the_map_keeps() {
    // With tiny bounds the map's directory has an entry for every few clusters.
    let (size, far) = if engine::BOUNDS_ARE_TINY { (1 << 44, 1 << 26) } else { (1 << 60, 1 << 42) };
    let mut bench = Bench::open(Files(vec![image(Version::V3, whole(21), size, false)]));
    let mut written = Vec::new();
    for n in 0..1200 {
        let at = n * far + 4096;
        assert_eq!(bench.read(at, 512), [0; 512], "{at:#x}");
        if n % 400 == 399 {
            let data = contents(n as u32, at, 512);
            bench.write(at, &data).expect("a write");
            written.push((at, data));
        }
    }
    bench.flush().expect("flush");
    let mut bench = Bench::open(bench.files);
    for (at, data) in written {
        assert_eq!(bench.read(at, 512), data, "{at:#x}");
        bench.zero(at, 512, ZeroMode::Unmap).expect("zeroes");
        assert_eq!(bench.read(at, 512), [0; 512], "{at:#x}");
    }
}

#[test]
fn a_link_is_written_beside_its_data_where_a_flush_follows_each() {
    let size = 300 << 10;
    let mut bench = Bench::open(Files(vec![image(Version::V3, whole(10), size, false)]));
    let mut model = ByteModel::new(size, 1 << 10, DiscardRule::ZeroesClusters);
    // From now on a reservation, whose counts are written first, provides all clusters for the rest of the test.
    for offset in [128 << 10, 160 << 10] {
        bench.apply(&Operation::Write { offset, length: 32 << 10, seed: 0 }, &mut model);
    }
    bench.flush().expect("a flush");
    let mut write = |bench: &mut Bench, cluster: u64| {
        let write = Operation::Write { offset: (cluster << 10) + 512, length: 512, seed: cluster as u32 };
        bench.apply(&write, &mut model);
        model.clone()
    };
    let mut links = |bench: &mut Bench, flushed: &[u64], then: u64| {
        for cluster in flushed {
            let model = write(bench, *cluster);
            bench.flush().expect("a flush");
            reopen_and_compare(&bench.files, &model);
        }
        let before = bench.early_links;
        let model = write(bench, then);
        (bench.early_links - before, model)
    };
    assert_eq!(links(&mut bench, &[0], 1).0, 0, "once is no habit");
    assert_eq!(links(&mut bench, &[2], 3).0, 0, "two writes to a flush");
    bench.flush().expect("a flush");
    let (count, model) = links(&mut bench, &[4, 5], 6);
    assert_eq!(count, 1);
    // The disk holds everything written, flushed or not.
    reopen_and_compare(&bench.files, &model);
    assert_eq!(links(&mut bench, &[], 7).0, 0, "no flush followed");
    bench.flush().expect("a flush");
    assert_eq!(links(&mut bench, &[], 8).0, 0, "two writes to a flush again");
    bench.flush().expect("a flush");
    assert_eq!(links(&mut bench, &[9, 10], 2).0, 0, "nothing to link");
    assert_eq!(bench.early_links, 3, "the first attempt at the data of the last failed");
    assert_eq!(links(&mut bench, &[], 11).0, 0, "the count of what that gave back is not on the disk");
    bench.flush().expect("a flush");
    let (count, model) = links(&mut bench, &[12], 13);
    assert_eq!(count, 1, "what is overwritten counts for nothing");
    reopen_and_compare(&bench.files, &model);
}

macro_rules! model_test {
    ($name:ident, $version:expr, $kinds:expr, $size:expr) => {
        proptest! {
            #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]
            #[test]
            fn $name(
                sessions in proptest::collection::vec(operations($kinds[0], $size, 40), 1..3),
                below in operations($kinds[$kinds.len() - 1], $size, 12),
            ) {
                run($version, &$kinds, $size, &sessions, &below);
                run($version, &$kinds, $size, &each_flushed(&sessions), &below);
            }
        }
    };
}

/// The same sessions with a flush after each operation.
fn each_flushed(sessions: &[Vec<Operation>]) -> Vec<Vec<Operation>> {
    let flushed = |session: &Vec<Operation>| {
        session.iter().flat_map(|operation| [*operation, Operation::Flush]).collect()
    };
    sessions.iter().map(flushed).collect()
}

fn operations(kind: Kind, size: u64, count_max: usize) -> BoxedStrategy<Vec<Operation>> {
    let geometry = Geometry { size, cluster_size: kind.cluster_size(), transfer_max: 64 << 10 };
    if kind.extended_l2 {
        sequences_of_parts(geometry, kind.granule_size(), count_max).boxed()
    } else {
        sequences(geometry, count_max).boxed()
    }
}

model_test!(one_image_of_small_clusters, Version::V3, [whole(9)], 300 * 512);
model_test!(one_image_of_several_slices, Version::V3, [whole(9)], 1300 * 512);
model_test!(one_image_version_2, Version::V2, [whole(12)], 100 * 4096 + 512);
model_test!(an_overlay, Version::V3, [whole(12), whole(12)], 100 * 4096);
model_test!(an_overlay_version_2, Version::V2, [whole(12), whole(12)], 100 * 4096);
model_test!(large_over_small_over_large, Version::V3, [whole(14), whole(10), whole(16)], 40 * 16384 + 1536);
model_test!(small_over_large, Version::V3, [whole(9), whole(14), whole(12)], 20 * 16384);
model_test!(subclusters, Version::V3, [parts(14)], 12 * 16384 + 512);
model_test!(subclusters_over_subclusters, Version::V3, [parts(14), parts(14)], 12 * 16384);
model_test!(subclusters_over_larger_ones, Version::V3, [parts(14), parts(16), whole(12)], 12 * 16384 + 1024);
model_test!(subclusters_over_smaller_ones, Version::V3, [parts(15), parts(14), whole(16)], 6 * 32768);
model_test!(data_apart, Version::V3, [apart(whole(12))], 100 * 4096 + 512);
model_test!(data_apart_over_clusters, Version::V3, [apart(whole(9)), whole(12)], 300 * 512);
model_test!(data_apart_in_subclusters, Version::V3, [apart(parts(14)), parts(14)], 12 * 16384 + 1024);
model_test!(clusters_over_subclusters, Version::V3, [whole(10), parts(15)], 5 * 32768);
