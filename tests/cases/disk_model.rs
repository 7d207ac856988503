//! The disk, in-process, against a byte-array model: random sequences over chains and geometries. QEMU's tools check
//! and read each image afterwards.

use std::path::{Path, PathBuf};

use disk::{DetectZeroes, Discards, DiskOptions};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use storage::host::{Aio, HostStorage};
use strata_kit::images::{Content, Format, ImageSpec, Preallocation};
use strata_kit::model::{DiscardRule, Geometry, Operation, sequences, sequences_of_parts};
use strata_kit::{ByteModel, Qemu};
use strata_rig::agree::assert_clean;
use strata_rig::{K, M, Rig, options, pattern};

/// A chain under test, from the base up. The last image is the top.
struct Case {
    name: &'static str,
    chain: Vec<ImageSpec>,
}

/// An overlay over the previous layer of the list. `create_chain` sets the backing file.
fn over(format: Format, size: u64) -> ImageSpec {
    ImageSpec::qcow2(size).backing(PathBuf::new(), format)
}

/// Compressed content of a new image: whole clusters.
fn squeeze(offset: u64, length: u64, byte: u8) -> Content {
    Content::Compressed { offset, length, byte }
}

/// An image with compressed clusters, some of them overwritten.
fn squeezed(cluster_size: u64) -> ImageSpec {
    ImageSpec::qcow2(6 * M)
        .cluster_size(cluster_size)
        .with(squeeze(0, 4 * M, 1))
        .with(pattern(2 * M + 512, M + 1024, 2))
        .with(squeeze(4 * M, M, 3))
}

fn cases() -> Vec<Case> {
    let base = || ImageSpec::qcow2(6 * M).with(pattern(0, M, 1)).with(pattern(3 * M + 512, M + 1024, 2));
    let middle = || {
        over(Format::Qcow2, 6 * M)
            .cluster_size(64 * K)
            .with(pattern(M / 2, M, 3))
            .with(Content::Zeroes { offset: 3 * M, length: 256 * K, unmap: true })
            .with(Content::Zeroes { offset: 3 * M + 512 * K, length: 128 * K, unmap: false })
    };
    let mut cases = vec![
        Case { name: "v3, 64 KiB", chain: vec![ImageSpec::qcow2(6 * M)] },
        Case { name: "v2, 64 KiB", chain: vec![ImageSpec::qcow2(6 * M).version(2)] },
        Case { name: "odd size", chain: vec![ImageSpec::qcow2(3 * M + 5 * 512)] },
        Case { name: "over qcow2", chain: vec![base(), over(Format::Qcow2, 6 * M)] },
        Case { name: "v2 over qcow2", chain: vec![base(), over(Format::Qcow2, 6 * M).version(2)] },
        Case { name: "three layers", chain: vec![base(), middle(), over(Format::Qcow2, 7 * M + 512)] },
        Case {
            name: "over a shorter raw",
            chain: vec![
                ImageSpec::raw(2 * M + 512).with(pattern(0, 2 * M + 512, 7)),
                over(Format::Raw, 4 * M + 1024),
            ],
        },
        Case { name: "over a longer qcow2", chain: vec![base(), over(Format::Qcow2, 3 * M + 3 * 512)] },
        Case {
            name: "over a longer raw",
            chain: vec![ImageSpec::raw(6 * M).with(pattern(0, 6 * M, 7)), over(Format::Raw, 4 * M + 512)],
        },
        Case {
            name: "small clusters over large",
            chain: vec![base().cluster_size(256 * K), over(Format::Qcow2, 6 * M).cluster_size(4 * K)],
        },
        Case {
            name: "large clusters over small",
            chain: vec![base().cluster_size(4 * K), over(Format::Qcow2, 6 * M).cluster_size(128 * K)],
        },
        Case { name: "compressed", chain: vec![squeezed(64 * K)] },
        Case { name: "compressed, v2", chain: vec![squeezed(64 * K).version(2)] },
        Case { name: "compressed, zstd", chain: vec![squeezed(64 * K).zstd()] },
        Case {
            name: "compressed over compressed",
            chain: vec![
                squeezed(16 * K),
                over(Format::Qcow2, 6 * M).cluster_size(64 * K).zstd().with(squeeze(M, M, 11)),
            ],
        },
        Case {
            name: "small clusters over large compressed ones",
            chain: vec![squeezed(M).zstd(), over(Format::Qcow2, 6 * M).cluster_size(4 * K)],
        },
        Case {
            name: "v2 over compressed",
            chain: vec![squeezed(64 * K), over(Format::Qcow2, 6 * M).version(2).with(squeeze(0, M, 11))],
        },
        Case {
            name: "preallocated zero clusters",
            chain: vec![ImageSpec::qcow2(4 * M).with(pattern(0, 4 * M, 9)).with(Content::Zeroes {
                offset: M,
                length: 2 * M,
                unmap: false,
            })],
        },
    ];
    cases.push(Case {
        name: "over subclusters",
        chain: vec![parts(6 * M, 64 * K), over(Format::Qcow2, 6 * M)],
    });
    cases.push(Case {
        name: "small clusters over subclusters over large",
        chain: vec![
            base().cluster_size(256 * K),
            over(Format::Qcow2, 5 * M).cluster_size(128 * K).extended().with(pattern(M + 4 * K, 8 * K, 4)),
            over(Format::Qcow2, 6 * M).cluster_size(4 * K),
        ],
    });
    cases.push(Case {
        name: "large clusters over subclusters",
        chain: vec![parts(6 * M, 16 * K), over(Format::Qcow2, 6 * M).cluster_size(256 * K)],
    });
    cases.push(Case { name: "subclusters", chain: vec![ImageSpec::qcow2(6 * M + 512).extended()] });
    cases.push(Case { name: "subclusters with a past", chain: vec![parts(6 * M, 64 * K)] });
    cases.push(Case {
        name: "subclusters over subclusters",
        chain: vec![parts(6 * M, 32 * K), over(Format::Qcow2, 6 * M).extended()],
    });
    cases.push(Case {
        name: "subclusters over a shorter raw",
        chain: vec![
            ImageSpec::raw(2 * M + 512).with(pattern(0, 2 * M + 512, 7)),
            over(Format::Raw, 4 * M + 1024).cluster_size(128 * K).extended(),
        ],
    });
    cases.push(Case {
        name: "preallocated subclusters",
        chain: vec![ImageSpec::qcow2(4 * M).extended().preallocation(Preallocation::Metadata)],
    });
    for bits in [14, 16, 18, 21] {
        let cluster = 1u64 << bits;
        let size = (cluster * 40).min(24 * M) + 512;
        let name = match bits {
            14 => "subclusters of 512",
            16 => "subclusters of 2 KiB",
            18 => "subclusters of 8 KiB",
            _ => "subclusters of 64 KiB",
        };
        let below = ImageSpec::qcow2(size).cluster_size(4 * K).with(pattern(cluster / 2, cluster * 3, 5));
        cases.push(Case {
            name,
            chain: vec![below, over(Format::Qcow2, size).cluster_size(cluster).extended()],
        });
    }
    for bits in [1, 2, 4, 8, 32, 64] {
        let mut top = over(Format::Qcow2, 2 * M).cluster_size(512);
        top.refcount_bits = bits;
        let below = ImageSpec::qcow2(2 * M).with(pattern(K, M, 6));
        cases.push(Case { name: "refcounts of another width", chain: vec![below, top] });
    }
    for bits in [9, 10, 12, 14, 18, 21] {
        let cluster = 1u64 << bits;
        let size = (cluster * 40).clamp(64 * K, 24 * M) + 512;
        let name = match bits {
            9 => "clusters of 512",
            10 => "clusters of 1 KiB",
            12 => "clusters of 4 KiB",
            14 => "clusters of 16 KiB",
            18 => "clusters of 256 KiB",
            _ => "clusters of 2 MiB",
        };
        let below = ImageSpec::qcow2(size).cluster_size(cluster).with(pattern(cluster / 2, cluster * 3, 5));
        // Compressed in two runs, so that host clusters are shared.
        let above = over(Format::Qcow2, size)
            .cluster_size(cluster)
            .with(squeeze(cluster * 2, cluster * 5, 6))
            .with(squeeze(cluster * 9, cluster * 3, 8));
        cases.push(Case { name, chain: vec![below, above] });
    }
    cases
}

/// An image with subclusters of every kind, from the second cluster on.
fn parts(size: u64, cluster: u64) -> ImageSpec {
    let part = cluster / 32;
    let zeroes = |offset, length, unmap| Content::Zeroes { offset, length, unmap };
    ImageSpec::qcow2(size)
        .cluster_size(cluster)
        .extended()
        .with(pattern(cluster + part, 5 * part, 1))
        .with(zeroes(cluster + 2 * part, part, false))
        .with(pattern(3 * cluster - part, 2 * part, 2))
        .with(pattern(5 * cluster, 2 * cluster, 3))
        .with(zeroes(5 * cluster, 33 * part, false))
        .with(zeroes(8 * cluster + part, 3 * part, true))
}

fn geometry(top: &ImageSpec) -> Geometry {
    let size = top.size.expect("every case gives its size");
    Geometry { size, cluster_size: top.cluster_size, transfer_max: (4 * top.cluster_size).min(512 * K) }
}

/// Random operations on an image.
fn operations_on(top: &ImageSpec) -> BoxedStrategy<Vec<Operation>> {
    if top.extended_l2 {
        sequences_of_parts(geometry(top), top.granule_size(), 80).boxed()
    } else {
        sequences(geometry(top), 60).boxed()
    }
}

/// Runs two sessions of random operations on a fresh chain, one with io_uring and one with threads. After each, QEMU
/// checks and reads the image.
fn run_case(qemu: &Qemu, folder: &Path, case: &Case, options: &DiskOptions, sessions: &[Vec<Operation>]) {
    let top = case.chain.last().expect("a chain has a top");
    let paths = qemu.create_chain(folder, &case.chain).expect("qemu-img makes the chain");
    let image = paths.last().expect("a chain has a top");
    let ignored = options.discards == Discards::Ignore;
    let rule = if ignored || (top.version == 2 && case.chain.len() > 1) {
        DiscardRule::Nothing
    } else {
        DiscardRule::ZeroesClusters
    };
    let initial = qemu.read_all(image, Format::Qcow2).expect("qemu-img reads the chain");
    let backing: Vec<_> =
        paths[..paths.len() - 1].iter().map(|path| std::fs::read(path).expect("backing")).collect();
    let mut model = ByteModel::with_contents(&initial, geometry(top).size, top.granule_size(), rule);
    for (operations, aio) in sessions.iter().zip([Aio::IoUring, Aio::Threads]) {
        let mut rig = Rig::open_on(HostStorage::new().by(aio), image, options).expect("the image opens");
        rig.run(operations, &mut model);
        let found = rig.read_all();
        model.compare_all(&found).unwrap_or_else(|difference| panic!("{}: {difference}", case.name));
        rig.close();
        assert_clean(image, case.name);
        let found = qemu.read_all(image, Format::Qcow2).expect("qemu-img reads the image");
        model
            .compare_all(&found)
            .unwrap_or_else(|difference| panic!("{}, by qemu-img: {difference}", case.name));
    }
    for (path, before) in paths.iter().zip(backing) {
        assert!(std::fs::read(path).expect("backing") == before, "{}: a backing file changed", case.name);
    }
}

#[test]
fn random_sequences_equal_the_model() {
    run_cases(cases_per_chain(), |_, _| options());
}

/// Alternates between all treatments of zeros and discards, over all chains.
#[test]
fn zeros_and_discards_are_treated_in_every_way() {
    use DetectZeroes::{Off, On, Unmap};
    let modes = [
        (Unmap, Discards::Unmap, false),
        (On, Discards::Unmap, true),
        (On, Discards::Ignore, false),
        (Unmap, Discards::Unmap, true),
        (Off, Discards::Unmap, true),
        (Off, Discards::Ignore, true),
        (On, Discards::Unmap, false),
    ];
    run_cases(cases_per_chain().div_ceil(2), |number, top| {
        let (detect_zeroes, discards, keep) = modes[number % modes.len()];
        DiskOptions { detect_zeroes, discards, discard_no_unref: keep && top.version == 3, ..options() }
    });
}

/// Overlays are put on top between the operations. Each layer then keeps the disk as it was, for us and for QEMU's tools.
#[test]
fn overlays_of_a_disk_in_use_keep_each_layer() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    // In version 2 a discard over a backing file does nothing, and in the overlay it does.
    let cases = cases()
        .into_iter()
        .filter(|case| case.chain[case.chain.len() - 1].version == 3 || case.chain.len() == 1);
    for case in cases {
        let top = case.chain.last().expect("a top");
        let mut runner = TestRunner::new(ProptestConfig {
            cases: 1,
            max_shrink_iters: 100,
            failure_persistence: None,
            ..ProptestConfig::default()
        });
        let sessions = proptest::collection::vec(operations_on(top), 3);
        let number = std::cell::Cell::new(0);
        let result = runner.run(&sessions, |sessions| {
            number.set(number.get() + 1);
            let folder = folder.path().join(format!("{}-{}", case.name.replace(' ', "-"), number.get()));
            std::fs::create_dir_all(&folder).expect("a folder");
            overlay_case(&qemu, &folder, &case, &sessions);
            std::fs::remove_dir_all(&folder).expect("the folder goes");
            Ok(())
        });
        if let Err(error) = result {
            panic!("{}: {error}", case.name);
        }
    }
}

fn overlay_case(qemu: &Qemu, folder: &Path, case: &Case, sessions: &[Vec<Operation>]) {
    let top = case.chain.last().expect("a chain has a top");
    let paths = qemu.create_chain(folder, &case.chain).expect("qemu-img makes the chain");
    let mut image = paths.last().expect("a chain has a top").clone();
    let initial = qemu.read_all(&image, Format::Qcow2).expect("qemu-img reads the chain");
    let (size, granule) = (geometry(top).size, top.granule_size());
    let mut model = ByteModel::with_contents(&initial, size, granule, DiscardRule::ZeroesClusters);
    let mut rig = Rig::open(&image, &options()).expect("the image opens");
    let mut layers = Vec::new();
    for (number, operations) in sessions.iter().enumerate() {
        rig.run(operations, &mut model);
        layers.push((image, rig.read_all()));
        image = folder.join(format!("overlay {number}"));
        rig.put_overlay(&image);
    }
    rig.run(&sessions[0], &mut model);
    let found = rig.read_all();
    model.compare_all(&found).unwrap_or_else(|difference| panic!("{}: {difference}", case.name));
    layers.push((image, found));
    rig.close();
    for (image, held) in layers {
        assert_clean(&image, case.name);
        let found = qemu.read_all(&image, Format::Qcow2).expect("qemu-img reads the layer");
        assert!(found == held, "{}: {} has changed", case.name, image.display());
    }
}

/// Runs random sessions on every chain, with the options for its number and its top image.
fn run_cases(tries: u32, options: impl Fn(usize, &ImageSpec) -> DiskOptions) {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    for (at, case) in cases().into_iter().enumerate() {
        let top = case.chain.last().expect("a top");
        let options = options(at, top);
        let mut runner = TestRunner::new(ProptestConfig {
            cases: tries,
            max_shrink_iters: 200,
            failure_persistence: None,
            ..ProptestConfig::default()
        });
        let sessions = proptest::collection::vec(operations_on(top), 2);
        let number = std::cell::Cell::new(0);
        let result = runner.run(&sessions, |sessions| {
            number.set(number.get() + 1);
            let folder = folder.path().join(format!("{}-{}", case.name.replace(' ', "-"), number.get()));
            std::fs::create_dir_all(&folder).expect("a folder");
            run_case(&qemu, &folder, &case, &options, &sessions);
            std::fs::remove_dir_all(&folder).expect("the folder goes");
            Ok(())
        });
        if let Err(error) = result {
            panic!("{}: {error}", case.name);
        }
    }
}

/// The number of runs of each chain. STRATA_MODEL_CASES sets it for a longer run.
fn cases_per_chain() -> u32 {
    std::env::var("STRATA_MODEL_CASES").ok().and_then(|text| text.parse().ok()).unwrap_or(2)
}
