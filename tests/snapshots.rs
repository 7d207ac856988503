//! Internal snapshots against a model and against `qemu-img snapshot`: each makes, applies and deletes what the other
//! made; refcounts of every width up to their ends; refusals that leave every byte as it was; images that mean harm.

mod rig;

use std::path::{Path, PathBuf};

use disk::check::Verdict;
use disk::snapshot::{Change, ChangeError, ChangeRefusal, Snapshot};
use disk::{DiskOptions, OpenError};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use serde_json::Value;
use storage::host::HostStorage;
use strata_tests::images::{Check, Content, Format, ImageSpec, Preallocation};
use strata_tests::model::{DiscardRule, Geometry, Operation, sequences};
use strata_tests::{ByteModel, Qemu};

use crate::rig::{K, M, Rig, options, patch, pattern, tables, word, write};

fn create(name: &str) -> Change {
    Change::Create { name: name.into(), seconds: 1_795_272_286, nanoseconds: 123 }
}

fn apply(wanted: &str) -> Change {
    Change::Apply { wanted: wanted.into() }
}

fn delete(wanted: &str) -> Change {
    Change::Delete { wanted: wanted.into() }
}

fn change(image: &Path, change: Change) -> Result<Snapshot, ChangeError> {
    disk::snapshot::change(&HostStorage::new(), image, change, &options())
}

fn list(image: &Path) -> Vec<Snapshot> {
    disk::snapshot::list(&HostStorage::new(), image, &options()).expect("a list")
}

fn refused(image: &Path, what: Change) -> ChangeRefusal {
    let before = std::fs::read(image).expect("image");
    let error = match change(image, what) {
        Err(ChangeError::Refused { source, .. }) => source,
        other => panic!("{other:?}"),
    };
    assert!(std::fs::read(image).expect("image") == before, "{error}: a refusal wrote to the image");
    error
}

fn of_snapshot(name: &str) -> DiskOptions {
    DiskOptions { snapshot: Some(name.into()), ..options() }
}

fn read(image: &Path, options: &DiskOptions) -> Vec<u8> {
    let mut rig = Rig::open(image, options).expect("it opens");
    let found = rig.read_all();
    rig.close();
    found
}

/// An image, what its disk is to hold, and what each of its snapshots is.
struct Bench {
    qemu: Qemu,
    image: PathBuf,
    cluster: u64,
    contents: Vec<u8>,
    snapshots: Vec<(String, Vec<u8>)>,
    rule: DiscardRule,
}

impl Bench {
    fn new(qemu: &Qemu, folder: &Path, spec: &ImageSpec) -> Self {
        let image = folder.join("image.qcow2");
        qemu.create(&image, spec).expect("an image");
        let contents = qemu.read_all(&image, Format::Qcow2).expect("read");
        let rule = if spec.version == 2 && spec.backing.is_some() {
            DiscardRule::Nothing
        } else {
            DiscardRule::ZeroesClusters
        };
        let (qemu, cluster) = (qemu.clone(), spec.granule_size());
        Bench { qemu, image, cluster, contents, snapshots: Vec::new(), rule }
    }

    fn run(&mut self, operations: &[Operation]) {
        let size = self.contents.len() as u64;
        let mut model = ByteModel::with_contents(&self.contents, size, self.cluster, self.rule);
        let mut rig = Rig::open(&self.image, &options()).expect("it opens");
        rig.run(operations, &mut model);
        self.contents = rig.read_all();
        model.compare_all(&self.contents).expect("the disk equals the model");
        rig.close();
    }

    /// Does a change by ours or by QEMU's tool.
    fn change(&mut self, letter: &str, name: &str, ours: bool) {
        if ours {
            let what = match letter {
                "-c" => create(name),
                "-a" => apply(name),
                _ => delete(name),
            };
            change(&self.image, what).unwrap_or_else(|error| panic!("{letter} {name}: {error}"));
        } else {
            self.qemu.img(["snapshot", letter, name, &self.image.display().to_string()]).expect("qemu-img");
        }
        let place = self.snapshots.iter().position(|(known, _)| known == name);
        match (letter, place) {
            ("-c", _) => self.snapshots.push((name.to_owned(), self.contents.clone())),
            ("-a", Some(place)) => self.contents = self.snapshots[place].1.clone(),
            ("-d", Some(place)) => {
                self.snapshots.remove(place);
            }
            _ => panic!("there is no {name}"),
        }
    }

    /// Everything is as it should be, as ours and QEMU's see it.
    fn examine(&self, what: &str) {
        assert_eq!(self.qemu.check(&self.image).expect("check"), Check::Clean, "{what}");
        let report = disk::check::check(&HostStorage::new(), &self.image, &options()).expect("check");
        assert_eq!(report.verdict(), Verdict::Clean, "{what}: {report:?}");
        self.compare_lists();
        assert!(read(&self.image, &options()) == self.contents, "{what}: the disk reads otherwise");
        let theirs = self.qemu.read_all(&self.image, Format::Qcow2).expect("read");
        assert!(theirs == self.contents, "{what}: qemu-img reads otherwise");
        for (name, contents) in &self.snapshots {
            assert!(read(&self.image, &of_snapshot(name)) == *contents, "{what}: {name} reads otherwise");
        }
    }

    fn compare_lists(&self) {
        let image = self.image.display().to_string();
        let text = self.qemu.img(["info", "--output=json", &image]).expect("info");
        let json: Value = serde_json::from_str(&text).expect("JSON");
        let theirs = json.get("snapshots").and_then(Value::as_array).cloned().unwrap_or_default();
        let ours = list(&self.image);
        assert_eq!(ours.len(), theirs.len());
        for ((ours, theirs), (name, _)) in ours.iter().zip(&theirs).zip(&self.snapshots) {
            let text = |name: &str| theirs[name].as_str().expect("text").as_bytes().to_vec();
            let number = |name: &str| theirs[name].as_u64().unwrap_or(0);
            assert_eq!((&ours.id, &ours.name), (&text("id"), &text("name")));
            assert_eq!(ours.name, name.as_bytes());
            let date = (u64::from(ours.seconds), u64::from(ours.nanoseconds));
            assert_eq!(date, (number("date-sec"), number("date-nsec")));
            assert_eq!(
                (ours.vm_state_size(), ours.icount().unwrap_or(0)),
                (number("vm-state-size"), number("icount"))
            );
        }
    }

    /// What QEMU reads of a snapshot.
    fn theirs(&self, name: &str) -> Vec<u8> {
        let target = self.image.with_extension("raw");
        let [image, out] = [&self.image, &target].map(|path| path.display().to_string());
        let name = format!("snapshot.name={name}");
        self.qemu.img(["convert", "-l", &name, "-f", "qcow2", "-O", "raw", &image, &out]).expect("convert");
        std::fs::read(&target).expect("the copy")
    }
}

/// What a random step does.
#[derive(Clone, Debug)]
enum Deed {
    Run(Vec<Operation>),
    Create { ours: bool },
    Apply { which: usize, ours: bool },
    Delete { which: usize, ours: bool },
}

fn deeds(geometry: Geometry) -> impl Strategy<Value = Vec<Deed>> {
    let ours = prop::bool::weighted(0.7);
    let deed = prop_oneof![
        3 => sequences(geometry, 12).prop_map(Deed::Run),
        2 => ours.prop_map(|ours| Deed::Create { ours }),
        1 => (0..4_usize, ours).prop_map(|(which, ours)| Deed::Apply { which, ours }),
        1 => (0..4_usize, ours).prop_map(|(which, ours)| Deed::Delete { which, ours }),
    ];
    prop::collection::vec(deed, 10)
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
        let result = runner.run(&deeds(geometry), |deeds| {
            let folder = tempfile::tempdir().expect("a folder");
            let mut bench = Bench::new(&qemu, folder.path(), &spec);
            for (number, deed) in deeds.iter().enumerate() {
                let chosen = |which: usize| {
                    let count = bench.snapshots.len();
                    (count > 0).then(|| bench.snapshots[which % count].0.clone())
                };
                match deed {
                    Deed::Run(operations) => bench.run(operations),
                    Deed::Create { ours } => bench.change("-c", &format!("taken at {number}"), *ours),
                    Deed::Apply { which, ours } => {
                        if let Some(name) = chosen(*which) {
                            bench.change("-a", &name, *ours);
                        }
                    }
                    Deed::Delete { which, ours } => {
                        if let Some(name) = chosen(*which) {
                            bench.change("-d", &name, *ours);
                        }
                    }
                }
                bench.examine(&format!("{spec:?}, step {number} of {deeds:?}"));
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
        let mut bench = Bench::new(&qemu, folder.path(), &spec);
        // One reference is the disk's own.
        let max = qcow2::refcount_max(bits.trailing_zeros());
        let fit = (max - 1).min(20);
        for number in 0..fit {
            bench.change("-c", &format!("taken {number}"), true);
        }
        if max - 1 == fit {
            let error = refused(&bench.image, create("one too many"));
            assert!(
                matches!(error, ChangeRefusal::RefcountFull { needed, .. } if needed == max + 1),
                "{error}"
            );
        }
        bench.examine(&format!("{bits} bits, full"));
        // What is shared by as many as can be is copied; nothing needs a count above the end for that.
        bench.run(&[write(512, 3 * K, 1), write(40 * K, 512, 2), Operation::Flush, write(512, 512, 3)]);
        bench.run(&[
            Operation::Discard { offset: 8 * K, length: 4 * K },
            Operation::WriteZeroes { offset: 16 * K, length: 4 * K, unmap: false },
        ]);
        bench.examine(&format!("{bits} bits, written"));
        if fit > 0 {
            // QEMU would raise what is at its end already; what both have needs no more.
            bench.change("-a", "taken 0", true);
            bench.examine(&format!("{bits} bits, applied"));
        }
        while let Some((name, _)) = bench.snapshots.first().cloned() {
            bench.change("-d", &name, true);
        }
        bench.run(&[write(0, 64 * K, 4)]);
        bench.examine(&format!("{bits} bits, all deleted"));
    }
}

/// The refcount structure grows with what the snapshots need, and what is freed is used again and given back.
#[test]
fn many_snapshots_come_and_go() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    // 64 counts a refblock, 64 refblocks in a refcount table of one cluster.
    let mut spec = ImageSpec::qcow2(2 * M).cluster_size(512).with(pattern(0, 1536 * K, 1));
    spec.refcount_bits = 64;
    let mut bench = Bench::new(&qemu, folder.path(), &spec);
    for number in 0..60 {
        bench.change("-c", &format!("taken {number}"), true);
        bench.run(&[write(number * 20 * K, 17 * K, number as u32)]);
    }
    bench.examine("all there");
    assert!(word(&bench.image, 56) >> 32 > 1, "the refcount table has grown");
    let full = std::fs::metadata(&bench.image).expect("image");
    for number in (0..60).step_by(2) {
        bench.change("-d", &format!("taken {number}"), true);
    }
    bench.examine("half of them");
    bench.change("-a", "taken 1", true);
    for number in (1..60).step_by(2) {
        bench.change("-d", &format!("taken {number}"), true);
    }
    bench.examine("none left");
    use std::os::unix::fs::MetadataExt;
    let left = std::fs::metadata(&bench.image).expect("image");
    assert!(left.blocks() < full.blocks(), "{} blocks of {} are left", left.blocks(), full.blocks());
    assert_eq!(word(&bench.image, 64), 0, "no snapshots, no table");
}

#[test]
fn names_and_ids_are_told_apart() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let mut bench = Bench::new(&qemu, folder.path(), &ImageSpec::qcow2(M).with(pattern(0, 64 * K, 1)));
    bench.change("-c", "one", true);
    bench.run(&[write(0, K, 1)]);
    bench.change("-c", "two", true);
    for taken in ["one", "1", "2"] {
        assert_eq!(refused(&bench.image, create(taken)), ChangeRefusal::Exists { name: taken.into() });
    }
    for (name, length) in [(String::new(), 0), ("n".repeat(256), 256)] {
        assert_eq!(refused(&bench.image, create(&name)), ChangeRefusal::NameLength { length, max: 255 });
    }
    let missing = ChangeRefusal::NotFound { wanted: "3".into() };
    assert_eq!(
        (refused(&bench.image, apply("3")), refused(&bench.image, delete("3"))),
        (missing.clone(), missing)
    );
    // QEMU's tool makes what ours does not: a name that is another's ID.
    bench.change("-c", "1", false);
    assert_eq!(refused(&bench.image, delete("1")), ChangeRefusal::Ambiguous { wanted: "1".into() });
    change(&bench.image, apply("1")).expect("the ID goes before the name");
    bench.contents = bench.snapshots[0].1.clone();
    assert!(read(&bench.image, &of_snapshot("1")) == bench.contents);
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
        let mut bench = Bench::new(&qemu, folder.path(), &spec);
        bench.change("-c", "small", true);
        let image = bench.image.display().to_string();
        qemu.img(["resize", "-q", "-f", "qcow2", &image, "3M"]).expect("resize");
        bench.contents.resize(3 << 20, 0);
        bench.run(&[write(2 * M, 300 * K, 1), write(0, K, 2)]);
        bench.change("-c", "large", true);
        bench.change("-a", "small", true);
        bench.examine("small again");
        bench.run(&[write(500 * K, 100 * K, 3)]);
        bench.change("-a", "large", true);
        bench.examine("large again");
        std::fs::remove_file(&bench.image).expect("gone");
    }
}

/// QEMU keeps the VM state behind the disk, in the snapshot's own tables.
#[test]
fn vm_state_is_kept_listed_and_deleted() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let cluster = 4 * K;
    let spec = ImageSpec::qcow2(2 * M).cluster_size(cluster).with(pattern(0, 100 * K, 1));
    let mut bench = Bench::new(&qemu, folder.path(), &spec);
    // Write it behind the disk, take the snapshot, cut it off the disk.
    let image = bench.image.display().to_string();
    qemu.img(["resize", "-q", "-f", "qcow2", &image, "4M"]).expect("resize");
    qemu.write(&bench.image, Format::Qcow2, &[pattern(2 * M, 64 * K, 9)]).expect("a VM state");
    qemu.img(["snapshot", "-c", "running", &image]).expect("a snapshot");
    qemu.img(["resize", "-q", "-f", "qcow2", "--shrink", &image, "2M"]).expect("resize");
    let entry = word(&bench.image, 64);
    patch(&bench.image, entry + 40, &(64 * K).to_be_bytes());
    patch(&bench.image, entry + 48, &(2 * M).to_be_bytes());
    bench.snapshots.push(("running".into(), bench.contents.clone()));
    assert_eq!(list(&bench.image)[0].vm_state_size(), 64 * K);
    bench.examine("with VM state");
    bench.run(&[write(0, 64 * K, 1)]);
    bench.change("-c", "plain", true);
    bench.change("-a", "running", true);
    bench.examine("applied");
    assert_eq!(list(&bench.image)[0].vm_state_size(), 64 * K, "it is still there");
    bench.change("-d", "running", true);
    bench.examine("deleted");
}

/// Extra data that nobody knows stays, byte for byte.
#[test]
fn unknown_extra_data_is_kept() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let mut bench = Bench::new(&qemu, folder.path(), &ImageSpec::qcow2(M).with(pattern(0, 64 * K, 1)));
    bench.change("-c", "one", true);
    let entry = word(&bench.image, 64);
    let mut known = list(&bench.image)[0].clone();
    known.extra.extend((0..100).map(|n| n as u8 ^ 0x5a));
    patch(&bench.image, entry, &qcow2::snapshot::encode_table(std::slice::from_ref(&known)));
    bench.change("-c", "two", true);
    bench.change("-c", "three", true);
    bench.change("-d", "two", true);
    assert_eq!(list(&bench.image)[0], known);
    bench.examine("with unknown data");
}

/// Entries that name what they must not: refused, whoever means harm, and nothing is overwritten.
#[test]
fn nothing_of_a_snapshot_is_overwritten_whatever_the_tables_say() {
    let Some(qemu) = Qemu::find() else { return };
    for structure in ["snapshot table", "L1 table", "L2 table"] {
        let folder = tempfile::tempdir().expect("a folder");
        let mut bench = Bench::new(&qemu, folder.path(), &ImageSpec::qcow2(4 * M).with(pattern(0, M, 1)));
        bench.change("-c", "kept", true);
        // From now on the disk has an L2 table of its own.
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
        // A new snapshot has nothing to do with the L2 tables of others, which are not read for it.
        let all = [apply("kept"), delete("kept"), create("more")];
        for change_of in all.into_iter().take(if structure == "L2 table" { 2 } else { 3 }) {
            let error = refused(&bench.image, change_of);
            assert!(error.to_string().contains("damaged"), "{error}");
        }
        let mut rig = Rig::open(&bench.image, &options()).expect("it opens");
        assert!(rig.try_one(&write(512, 512, 2)).is_err(), "a write to the {structure}");
        drop(rig);
        assert!(cluster(&bench.image) == before, "the {structure} was overwritten");
    }
}

/// An active L1 entry that claims a shared L2 table as its own would have it changed in place.
#[test]
fn a_shared_table_that_is_flagged_as_owned_is_refused() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let mut bench = Bench::new(&qemu, folder.path(), &ImageSpec::qcow2(M).with(pattern(0, 64 * K, 1)));
    bench.change("-c", "kept", true);
    let (l1, _, _) = tables(&bench.image);
    assert_eq!(word(&bench.image, l1) >> 63, 0, "it is not flagged");
    patch(&bench.image, l1, &(word(&bench.image, l1) | 1 << 63).to_be_bytes());
    let Err(error) = Rig::open(&bench.image, &options()) else { panic!("it opens for writing") };
    assert!(error.to_string().contains("holds other metadata"), "{error}");
    assert!(read(&bench.image, &DiskOptions { read_only: true, ..options() }) == bench.contents);
}

/// A refcount that is too low is found before anything is given away.
#[test]
fn wrong_refcounts_are_refused() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let mut bench = Bench::new(&qemu, folder.path(), &ImageSpec::qcow2(M).with(pattern(0, 64 * K, 1)));
    bench.change("-c", "kept", true);
    let (_, l2, block) = tables(&bench.image);
    let data = word(&bench.image, l2) & 0x00ff_ffff_ffff_fe00;
    patch(&bench.image, block + data / (64 * K) * 2, &1_u16.to_be_bytes());
    for what in [apply("kept"), delete("kept")] {
        assert!(matches!(refused(&bench.image, what), ChangeRefusal::RefcountTooLow { .. }));
    }
}

/// The rebuild of a dirty image counts what snapshots share, and puts the flags right both ways.
#[test]
fn a_dirty_image_with_snapshots_is_rebuilt() {
    let Some(qemu) = Qemu::find() else { return };
    for cluster in [512, 64 * K] {
        let folder = tempfile::tempdir().expect("a folder");
        let spec = ImageSpec::qcow2(4 * M).cluster_size(cluster).with(pattern(0, M, 1));
        let mut bench = Bench::new(&qemu, folder.path(), &spec);
        bench.change("-c", "kept", true);
        bench.run(&[write(0, 64 * K, 1)]);
        let (l1, l2, block) = tables(&bench.image);
        let shared = l2 + cluster / 8 * 8 - 8;
        // A shared cluster flagged as owned and counted once; an owned one not flagged; and so in the L1 table.
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
        bench.change("-d", "kept", true);
        bench.examine("deleted");
    }
}

/// An interrupted change of a dirty image is repaired by the next.
#[test]
fn a_change_repairs_a_dirty_image_first() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let mut bench = Bench::new(&qemu, folder.path(), &ImageSpec::qcow2(M).with(pattern(0, 64 * K, 1)));
    let (_, _, block) = tables(&bench.image);
    patch(&bench.image, block + 8, &[0; 8]);
    patch(&bench.image, 72, &1_u64.to_be_bytes());
    bench.change("-c", "kept", true);
    bench.examine("repaired");
    assert_eq!(word(&bench.image, 72), 0);
}
