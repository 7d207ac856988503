//! Internal snapshots against a model and against `qemu-img snapshot`. Each tool makes, applies and deletes the
//! snapshots of the other. Refcounts of every width reach their maximum, refusals leave every byte unchanged, and some
//! images are hostile.

use std::path::Path;

use disk::snapshot::{Change, ChangeError, ChangeRefusal, Snapshot};
use disk::{DiskOptions, OpenError};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use storage::host::HostStorage;
use strata_kit::Qemu;
use strata_kit::images::{Content, Format, ImageSpec, Preallocation};
use strata_kit::model::{DiscardRule, Geometry, Operation, sequences};
use strata_rig::bench::{self, Bench, Deed, list};
use strata_rig::{K, M, Rig, options, patch, pattern, tables, word, write};

fn create(name: &str) -> Change {
    Deed::Create.of(name)
}

fn apply(wanted: &str) -> Change {
    Deed::Apply.of(wanted)
}

fn delete(wanted: &str) -> Change {
    Deed::Delete.of(wanted)
}

fn change(image: &Path, change: Change) -> Result<Snapshot, ChangeError> {
    disk::snapshot::change(&HostStorage::new(), image, change, &options())
}

fn of_snapshot(name: &str) -> DiskOptions {
    DiskOptions { snapshot: Some(name.into()), ..options() }
}

/// A new image on the bench.
fn bench(qemu: &Qemu, folder: &Path, spec: &ImageSpec) -> Bench {
    let image = folder.join("image.qcow2");
    qemu.create(&image, spec).expect("an image");
    let contents = qemu.read_all(&image, Format::Qcow2).expect("read");
    let rule = if spec.version == 2 && spec.backing.is_some() {
        DiscardRule::Nothing
    } else {
        DiscardRule::ZeroesClusters
    };
    let (qemu, granule) = (qemu.clone(), spec.granule_size());
    Bench { qemu, image, options: options(), granule, contents, snapshots: Vec::new(), rule }
}

/// A random step.
#[derive(Clone, Debug)]
enum Step {
    Run(Vec<Operation>),
    Create { ours: bool },
    Apply { which: usize, ours: bool },
    Delete { which: usize, ours: bool },
}

fn steps(geometry: Geometry) -> impl Strategy<Value = Vec<Step>> {
    let ours = prop::bool::weighted(0.7);
    let step = prop_oneof![
        3 => sequences(geometry, 12).prop_map(Step::Run),
        2 => ours.prop_map(|ours| Step::Create { ours }),
        1 => (0..4_usize, ours).prop_map(|(which, ours)| Step::Apply { which, ours }),
        1 => (0..4_usize, ours).prop_map(|(which, ours)| Step::Delete { which, ours }),
    ];
    prop::collection::vec(step, 10)
}

fn specs() -> Vec<ImageSpec> {
    let base = |cluster: u64| {
        let size = (cluster * 24).clamp(64 * K, 8 * M) + 512;
        ImageSpec::qcow2(size).cluster_size(cluster).with(pattern(0, 4 * cluster, 1)).with(Content::Zeroes {
            offset: cluster,
            length: cluster,
            unmap: false,
        })
    };
    let bits = |mut spec: ImageSpec, bits: u8| {
        spec.refcount_bits = bits;
        spec
    };
    vec![
        base(64 * K),
        base(512),
        base(512).version(2),
        base(4 * K).version(2),
        bits(base(512), 64),
        bits(base(K), 32),
        bits(base(4 * K), 8),
        bits(base(512), 4),
        bits(base(2 * M), 16),
        base(64 * K).preallocation(Preallocation::Metadata),
        base(64 * K).extended(),
        base(4 * K).with(Content::Compressed { offset: 8 * 4 * K, length: 8 * 4 * K, byte: 7 }),
    ]
}

#[test]
fn random_changes_equal_the_model_whoever_makes_them() {
    let Some(qemu) = Qemu::find() else { return };
    for spec in specs() {
        let size = spec.size.expect("a size");
        let transfer_max = (4 * spec.cluster_size).min(256 * K);
        let geometry = Geometry { size, cluster_size: spec.cluster_size, transfer_max };
        let mut runner = TestRunner::new(ProptestConfig {
            cases: std::env::var("STRATA_MODEL_CASES").ok().and_then(|text| text.parse().ok()).unwrap_or(2),
            max_shrink_iters: 100,
            failure_persistence: None,
            ..ProptestConfig::default()
        });
        let result = runner.run(&steps(geometry), |steps| {
            let folder = tempfile::tempdir().expect("a folder");
            let mut bench = bench(&qemu, folder.path(), &spec);
            for (number, step) in steps.iter().enumerate() {
                let chosen = |which: usize| {
                    let count = bench.snapshots.len();
                    (count > 0).then(|| bench.snapshots[which % count].0.clone())
                };
                match step {
                    Step::Run(operations) => bench.run(operations),
                    Step::Create { ours } => bench.change(Deed::Create, &format!("taken at {number}"), *ours),
                    Step::Apply { which, ours } => {
                        if let Some(name) = chosen(*which) {
                            bench.change(Deed::Apply, &name, *ours);
                        }
                    }
                    Step::Delete { which, ours } => {
                        if let Some(name) = chosen(*which) {
                            bench.change(Deed::Delete, &name, *ours);
                        }
                    }
                }
                bench.examine(&format!("{spec:?}, step {number} of {steps:?}"));
            }
            for (name, contents) in &bench.snapshots {
                assert!(bench.theirs(name) == *contents, "qemu-img reads {name} otherwise");
            }
            Ok(())
        });
        if let Err(error) = result {
            panic!("{spec:?}: {error}");
        }
    }
}

#[test]
fn refcounts_of_every_width_are_used_to_their_end() {
    let Some(qemu) = Qemu::find() else { return };
    for bits in [1_u8, 2, 4, 8, 16, 32, 64] {
        let folder = tempfile::tempdir().expect("a folder");
        let mut spec = ImageSpec::qcow2(256 * K).cluster_size(512).with(pattern(0, 64 * K, 1));
        spec.refcount_bits = bits;
        let mut bench = bench(&qemu, folder.path(), &spec);
        // One reference belongs to the disk.
        let max = qcow2::refcount_max(bits.trailing_zeros());
        let fit = (max - 1).min(20);
        for number in 0..fit {
            bench.change(Deed::Create, &format!("taken {number}"), true);
        }
        if max - 1 == fit {
            let error = bench.refused(create("one too many"));
            assert!(
                matches!(error, ChangeRefusal::RefcountFull { needed, .. } if needed == max + 1),
                "{error}"
            );
        }
        bench.examine(&format!("{bits} bits, full"));
        // Clusters with the maximal refcount are copied. This needs no count above the maximum.
        bench.run(&[write(512, 3 * K, 1), write(40 * K, 512, 2), Operation::Flush, write(512, 512, 3)]);
        bench.run(&[
            Operation::Discard { offset: 8 * K, length: 4 * K },
            Operation::WriteZeroes { offset: 16 * K, length: 4 * K, unmap: false },
        ]);
        bench.examine(&format!("{bits} bits, written"));
        if fit > 0 {
            // QEMU would raise counts that are at the maximum. Clusters that both states have need no higher count.
            bench.change(Deed::Apply, "taken 0", true);
            bench.examine(&format!("{bits} bits, applied"));
        }
        while let Some((name, _)) = bench.snapshots.first().cloned() {
            bench.change(Deed::Delete, &name, true);
        }
        bench.run(&[write(0, 64 * K, 4)]);
        bench.examine(&format!("{bits} bits, all deleted"));
    }
}

/// The refcount structure grows with the needs of snapshots. Freed clusters are reused and given back.
#[test]
fn many_snapshots_come_and_go() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    // 64 counts in a refblock, 64 refblocks in a refcount table of one cluster.
    let mut spec = ImageSpec::qcow2(2 * M).cluster_size(512).with(pattern(0, 1536 * K, 1));
    spec.refcount_bits = 64;
    let mut bench = bench(&qemu, folder.path(), &spec);
    for number in 0..60 {
        bench.change(Deed::Create, &format!("taken {number}"), true);
        bench.run(&[write(number * 20 * K, 17 * K, number as u32)]);
    }
    bench.examine("all there");
    assert!(word(&bench.image, 56) >> 32 > 1, "the refcount table has grown");
    let full = std::fs::metadata(&bench.image).expect("image");
    for number in (0..60).step_by(2) {
        bench.change(Deed::Delete, &format!("taken {number}"), true);
    }
    bench.examine("half of them");
    bench.change(Deed::Apply, "taken 1", true);
    for number in (1..60).step_by(2) {
        bench.change(Deed::Delete, &format!("taken {number}"), true);
    }
    bench.examine("none left");
    use std::os::unix::fs::MetadataExt;
    let left = std::fs::metadata(&bench.image).expect("image");
    assert!(left.blocks() < full.blocks(), "{} blocks of {} are left", left.blocks(), full.blocks());
    assert_eq!(word(&bench.image, 64), 0, "no snapshots, no table");
}

#[test]
fn names_and_ids_are_distinguished() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let mut bench = bench(&qemu, folder.path(), &ImageSpec::qcow2(M).with(pattern(0, 64 * K, 1)));
    bench.change(Deed::Create, "one", true);
    bench.run(&[write(0, K, 1)]);
    bench.change(Deed::Create, "two", true);
    for taken in ["one", "1", "2"] {
        assert_eq!(bench.refused(create(taken)), ChangeRefusal::Exists { name: taken.into() });
    }
    for (name, length) in [(String::new(), 0), ("n".repeat(256), 256)] {
        assert_eq!(bench.refused(create(&name)), ChangeRefusal::NameLength { length, max: 255 });
    }
    let missing = ChangeRefusal::NotFound { wanted: "3".into() };
    assert_eq!((bench.refused(apply("3")), bench.refused(delete("3"))), (missing.clone(), missing));
    // Only QEMU's tool accepts a name that is the ID of another snapshot.
    bench.change(Deed::Create, "1", false);
    assert_eq!(bench.refused(delete("1")), ChangeRefusal::Ambiguous { wanted: "1".into() });
    change(&bench.image, apply("1")).expect("the ID goes before the name");
    bench.contents = bench.snapshots[0].1.clone();
    assert!(bench::read(&bench.image, &of_snapshot("1")) == bench.contents);
    change(&bench.image, delete("3")).expect("by its ID");
    bench.snapshots.pop();
    bench.examine("told apart");
    let wanted = of_snapshot("four");
    let Err(error) = Rig::open(&bench.image, &wanted) else { panic!("there is no such snapshot") };
    assert!(matches!(error, OpenError::NoSuchSnapshot { .. }), "{error}");
}

#[test]
fn a_snapshot_of_another_size_brings_its_size_back() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    for cluster in [512, 64 * K] {
        let spec = ImageSpec::qcow2(M).cluster_size(cluster).with(pattern(0, 100 * K, 1));
        let mut bench = bench(&qemu, folder.path(), &spec);
        bench.change(Deed::Create, "small", true);
        let image = bench.image.display().to_string();
        qemu.img(["resize", "-q", "-f", "qcow2", &image, "3M"]).expect("resize");
        bench.contents.resize(3 << 20, 0);
        bench.run(&[write(2 * M, 300 * K, 1), write(0, K, 2)]);
        bench.change(Deed::Create, "large", true);
        bench.change(Deed::Apply, "small", true);
        bench.examine("small again");
        bench.run(&[write(500 * K, 100 * K, 3)]);
        bench.change(Deed::Apply, "large", true);
        bench.examine("large again");
        std::fs::remove_file(&bench.image).expect("gone");
    }
}

/// Copying an L2 table needs the whole table in memory, however little memory there is.
#[test]
fn many_shared_tables_are_copied_at_once() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    // A table is four slices of 4 KiB and maps 16 MiB.
    let spec = (0..16).fold(ImageSpec::qcow2(256 * M).cluster_size(16 * K).extended(), |spec, table| {
        spec.with(pattern(table * 16 * M, 32 * K, 1 + table as u8))
    });
    let mut bench = bench(&qemu, folder.path(), &spec);
    bench.options = DiskOptions { table_bytes: 4 * 4096, map_bytes: 4096, ..options() };
    bench.change(Deed::Create, "kept", true);
    let writes: Vec<_> = (0..32).map(|n| write(n % 16 * 16 * M + n / 16 * 1024, 512, n as u32)).collect();
    bench.run(&writes);
    bench.examine("copied");
}

#[test]
fn a_snapshot_takes_what_its_tables_hold_and_not_whole_clusters() {
    use std::os::unix::fs::MetadataExt;
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let mut bench = bench(&qemu, folder.path(), &ImageSpec::qcow2(64 * M).cluster_size(2 * M));
    bench.run(&[write(0, 64 * K, 1), write(20 * M, 64 * K, 2)]);
    let allocated = |bench: &Bench| std::fs::metadata(&bench.image).expect("the image").blocks() * 512;
    let before = allocated(&bench);
    for n in 1..=4 {
        bench.change(Deed::Create, &format!("snapshot {n}"), true);
        let taken = allocated(&bench) - before;
        assert!(taken <= n * 16 * K, "{n} snapshots take {taken} bytes");
    }
    // A table in a cluster that held other data before.
    bench.change(Deed::Delete, "snapshot 2", true);
    bench.change(Deed::Create, "again", true);
    let taken = allocated(&bench) - before;
    assert!(taken <= 5 * 16 * K, "{taken} bytes are taken");
    bench.examine("small tables");
}

/// QEMU stores the VM state after the end of the disk, in the snapshot's own tables.
#[test]
fn vm_state_is_kept_listed_and_deleted() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let cluster = 4 * K;
    let spec = ImageSpec::qcow2(2 * M).cluster_size(cluster).with(pattern(0, 100 * K, 1));
    let mut bench = bench(&qemu, folder.path(), &spec);
    // Write the VM state after the end of the disk, make the snapshot, and shrink the disk again.
    let image = bench.image.display().to_string();
    qemu.img(["resize", "-q", "-f", "qcow2", &image, "4M"]).expect("resize");
    qemu.write(&bench.image, Format::Qcow2, &[pattern(2 * M, 64 * K, 9)]).expect("a VM state");
    qemu.img(["snapshot", "-c", "running", &image]).expect("a snapshot");
    qemu.img(["resize", "-q", "-f", "qcow2", "--shrink", &image, "2M"]).expect("resize");
    let entry = word(&bench.image, 64);
    patch(&bench.image, entry + 40, &(64 * K).to_be_bytes());
    patch(&bench.image, entry + 48, &(2 * M).to_be_bytes());
    bench.snapshots.push(("running".into(), bench.contents.clone()));
    assert_eq!(list(&bench.image, &options())[0].vm_state_size(), 64 * K);
    bench.examine("with VM state");
    bench.run(&[write(0, 64 * K, 1)]);
    bench.change(Deed::Create, "plain", true);
    bench.change(Deed::Apply, "running", true);
    bench.examine("applied");
    assert_eq!(list(&bench.image, &options())[0].vm_state_size(), 64 * K, "it is still there");
    // The disk has the VM state, too, and so has every snapshot made of the disk, by either tool.
    let l1 = |at: u64| word(&bench.image, at + 8) & qcow2::entry::OFFSET_MASK;
    let vm_state = l1(word(&bench.image, word(&bench.image, 64)));
    assert_ne!(vm_state, 0);
    assert_eq!(l1(word(&bench.image, 40)), vm_state, "the active L1 table leads to the VM state");
    bench.change(Deed::Create, "with it", true);
    let snapshots = list(&bench.image, &options());
    let with_it = snapshots.last().expect("the new one");
    assert_eq!(word(&bench.image, with_it.l1_offset.0 + 8) & qcow2::entry::OFFSET_MASK, vm_state);
    bench.examine("made with VM state");
    bench.change(Deed::Delete, "with it", false);
    bench.change(Deed::Delete, "running", true);
    bench.examine("deleted");
}

/// Unknown extra data stays, byte for byte.
#[test]
fn unknown_extra_data_is_kept() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let mut bench = bench(&qemu, folder.path(), &ImageSpec::qcow2(M).with(pattern(0, 64 * K, 1)));
    bench.change(Deed::Create, "one", true);
    let entry = word(&bench.image, 64);
    let mut known = list(&bench.image, &options())[0].clone();
    known.extra.extend((0..100).map(|n| n as u8 ^ 0x5a));
    patch(&bench.image, entry, &qcow2::snapshot::encode_table(std::slice::from_ref(&known)));
    bench.change(Deed::Create, "two", true);
    bench.change(Deed::Create, "three", true);
    bench.change(Deed::Delete, "two", true);
    assert_eq!(list(&bench.image, &options())[0], known);
    bench.examine("with unknown data");
}

/// Entries with forbidden offsets are refused for every change, and nothing is overwritten.
#[test]
fn nothing_of_a_snapshot_is_overwritten_whatever_the_tables_say() {
    let Some(qemu) = Qemu::find() else { return };
    for structure in ["snapshot table", "L1 table", "L2 table"] {
        let folder = tempfile::tempdir().expect("a folder");
        let mut bench = bench(&qemu, folder.path(), &ImageSpec::qcow2(4 * M).with(pattern(0, M, 1)));
        bench.change(Deed::Create, "kept", true);
        // From now on the disk has its own L2 table.
        bench.run(&[write(0, 64 * K, 1)]);
        let entry = word(&bench.image, 64);
        let l1 = word(&bench.image, entry);
        let target = match structure {
            "snapshot table" => entry,
            "L1 table" => l1,
            _ => word(&bench.image, l1) & 0x00ff_ffff_ffff_fe00,
        };
        let (_, l2, _) = tables(&bench.image);
        patch(&bench.image, l2, &(target | 1 << 63).to_be_bytes());
        let cluster =
            |image: &Path| std::fs::read(image).expect("image")[target as usize..][..64 << 10].to_vec();
        let before = cluster(&bench.image);
        // A new snapshot does not read the L2 tables of other snapshots.
        let all = [apply("kept"), delete("kept"), create("more")];
        for change_of in all.into_iter().take(if structure == "L2 table" { 2 } else { 3 }) {
            let error = bench.refused(change_of);
            assert!(error.to_string().contains("damaged"), "{error}");
        }
        let mut rig = Rig::open(&bench.image, &options()).expect("it opens");
        assert!(rig.try_one(&write(512, 512, 2)).is_err(), "a write to the {structure}");
        drop(rig);
        assert!(cluster(&bench.image) == before, "the {structure} was overwritten");
    }
}

/// An active L1 entry with COPIED set for a shared L2 table would have the table changed in place.
#[test]
fn a_shared_table_that_is_flagged_as_owned_is_refused() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let mut bench = bench(&qemu, folder.path(), &ImageSpec::qcow2(M).with(pattern(0, 64 * K, 1)));
    bench.change(Deed::Create, "kept", true);
    let (l1, _, _) = tables(&bench.image);
    assert_eq!(word(&bench.image, l1) >> 63, 0, "it is not flagged");
    patch(&bench.image, l1, &(word(&bench.image, l1) | 1 << 63).to_be_bytes());
    let Err(error) = Rig::open(&bench.image, &options()) else { panic!("it opens for writing") };
    assert!(error.to_string().contains("holds other metadata"), "{error}");
    assert!(bench::read(&bench.image, &DiskOptions { read_only: true, ..options() }) == bench.contents);
}

/// A refcount that is too low is found before any cluster is freed.
#[test]
fn wrong_refcounts_are_refused() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let mut bench = bench(&qemu, folder.path(), &ImageSpec::qcow2(M).with(pattern(0, 64 * K, 1)));
    bench.change(Deed::Create, "kept", true);
    let (_, l2, block) = tables(&bench.image);
    let data = word(&bench.image, l2) & 0x00ff_ffff_ffff_fe00;
    patch(&bench.image, block + data / (64 * K) * 2, &1_u16.to_be_bytes());
    for what in [apply("kept"), delete("kept")] {
        assert!(matches!(bench.refused(what), ChangeRefusal::RefcountTooLow { .. }));
    }
}

/// The rebuild of a dirty image counts shared clusters, and both sets and clears flags.
#[test]
fn a_dirty_image_with_snapshots_is_rebuilt() {
    let Some(qemu) = Qemu::find() else { return };
    for cluster in [512, 64 * K] {
        let folder = tempfile::tempdir().expect("a folder");
        let spec = ImageSpec::qcow2(4 * M).cluster_size(cluster).with(pattern(0, M, 1));
        let mut bench = bench(&qemu, folder.path(), &spec);
        bench.change(Deed::Create, "kept", true);
        bench.run(&[write(0, 64 * K, 1)]);
        let (l1, l2, block) = tables(&bench.image);
        let shared = l2 + cluster / 8 * 8 - 8;
        // A shared cluster with COPIED set and a count of 1, an unshared one without the flag, and so in the L1 table.
        let offset = 0x00ff_ffff_ffff_fe00;
        let entry = word(&bench.image, shared);
        assert!(entry & offset != 0 || cluster > 512);
        if entry & offset != 0 {
            patch(&bench.image, shared, &(entry | 1 << 63).to_be_bytes());
        }
        patch(&bench.image, block, &[0; 64]);
        patch(&bench.image, l2, &(word(&bench.image, l2) & offset).to_be_bytes());
        patch(&bench.image, l1, &(word(&bench.image, l1) & offset).to_be_bytes());
        patch(&bench.image, 72, &1_u64.to_be_bytes());
        bench.run(&[write(128 * K, 512, 2)]);
        bench.examine("rebuilt");
        bench.change(Deed::Delete, "kept", true);
        bench.examine("deleted");
    }
}

/// The next change repairs an interrupted change of a dirty image.
#[test]
fn a_change_repairs_a_dirty_image_first() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let mut bench = bench(&qemu, folder.path(), &ImageSpec::qcow2(M).with(pattern(0, 64 * K, 1)));
    let (_, _, block) = tables(&bench.image);
    patch(&bench.image, block + 8, &[0; 8]);
    patch(&bench.image, 72, &1_u64.to_be_bytes());
    bench.change(Deed::Create, "kept", true);
    bench.examine("repaired");
    assert_eq!(word(&bench.image, 72), 0);
}
