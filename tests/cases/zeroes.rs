//! Writes of zeros, discards, discarded clusters that keep their host clusters, and preallocated images. The resulting
//! mapping is compared with that of qemu-io on the same image with the same options.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use disk::{DetectZeroes, Discards, DiskOptions, OpenError};
use strata_kit::images::{Format, ImageSpec, Preallocation, find_tool};
use strata_kit::model::{DiscardRule, GAPPY_SEEDS, Operation, ZERO_SEEDS};
use strata_kit::{ByteModel, Qemu};
use strata_rig::agree::assert_clean;
use strata_rig::{K, M, Rig, options, pattern, write};

const SIZE: u64 = 8 * M;

/// A treatment of zeros and discards, with our options and QEMU's.
#[derive(Clone, Copy, Debug)]
struct Mode {
    detect: DetectZeroes,
    discards: Discards,
    keep: bool,
}

impl Mode {
    const fn new(detect: DetectZeroes, discards: Discards, keep: bool) -> Self {
        Mode { detect, discards, keep }
    }

    fn options(self) -> DiskOptions {
        let Mode { detect: detect_zeroes, discards, keep: discard_no_unref } = self;
        DiskOptions { detect_zeroes, discards, discard_no_unref, ..options() }
    }

    fn of_qemu(self, image: &Path) -> String {
        let detect = match self.detect {
            DetectZeroes::Off => "off",
            DetectZeroes::On => "on",
            DetectZeroes::Unmap => "unmap",
        };
        let discard = if self.discards == Discards::Ignore { "ignore" } else { "unmap" };
        let keep = if self.keep { "on" } else { "off" };
        format!(
            "driver=qcow2,file.filename={},detect-zeroes={detect},discard={discard},discard-no-unref={keep}",
            image.display()
        )
    }
}

/// Every combination that QEMU accepts.
fn modes() -> Vec<Mode> {
    let mut modes = Vec::new();
    for detect in [DetectZeroes::Off, DetectZeroes::On, DetectZeroes::Unmap] {
        for discards in [Discards::Unmap, Discards::Ignore] {
            if (detect, discards) != (DetectZeroes::Unmap, Discards::Ignore) {
                modes.extend([false, true].map(|keep| Mode::new(detect, discards, keep)));
            }
        }
    }
    modes
}

/// A write of only zeros.
fn zeros(offset: u64, length: u64) -> Operation {
    write(offset, length, ZERO_SEEDS)
}

/// Runs the same operations with qemu-io.
fn by_qemu(options: &str, operations: &[Operation]) {
    let mut command = Command::new(find_tool("qemu-io").expect("found before"));
    command.args(["--image-opts", options]);
    for operation in operations {
        let text = match *operation {
            Operation::Write { offset, length, seed } if seed >= ZERO_SEEDS => {
                format!("write -P 0 {offset} {length}")
            }
            Operation::Write { offset, length, .. } => format!("write -P 5 {offset} {length}"),
            Operation::WriteZeroes { offset, length, unmap } => {
                format!("write -z {}{offset} {length}", if unmap { "-u " } else { "" })
            }
            Operation::Discard { offset, length } => format!("discard {offset} {length}"),
            Operation::Flush => "flush".to_owned(),
            Operation::Read { offset, length } => format!("read {offset} {length}"),
        };
        command.args(["-c", &text]);
    }
    let output = command.output().expect("qemu-io runs");
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success() && !said.contains("failed"), "{options}: {said}");
}

/// The start of each cluster of an image: whether it certainly reads as zero, and its offset in the file.
fn clusters(qemu: &Qemu, image: &Path, cluster: u64) -> BTreeMap<u64, (bool, Option<u64>)> {
    let mut clusters = BTreeMap::new();
    for extent in qemu.map(image, Format::Qcow2).expect("a map") {
        // If the host has a hole in a cluster there are two extents. The first one counts.
        let first = extent.start.next_multiple_of(cluster);
        for at in (first..extent.start + extent.length).step_by(cluster as usize) {
            let place = extent.offset.map(|offset| offset + at - extent.start);
            clusters.insert(at / cluster, (extent.zero && !extent.data, place));
        }
    }
    clusters
}

/// The same without the offsets: QEMU and Strata allocate in different orders.
fn kinds(qemu: &Qemu, image: &Path) -> Vec<(bool, bool)> {
    clusters(qemu, image, 64 * K).into_values().map(|(zero, place)| (zero, place.is_some())).collect()
}

fn copy(folder: &Path, image: &Path, name: &str) -> PathBuf {
    let copy = folder.join(name);
    std::fs::copy(image, &copy).expect("a copy");
    copy
}

fn rule(mode: Mode) -> DiscardRule {
    if mode.discards == Discards::Ignore { DiscardRule::Nothing } else { DiscardRule::ZeroesClusters }
}

#[test]
fn clusters_become_what_qemu_makes_of_them() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let chain = [
        ImageSpec::qcow2(SIZE).with(pattern(0, 4 * M, 1)),
        ImageSpec::qcow2(SIZE).backing(PathBuf::new(), Format::Qcow2).with(pattern(M, 2 * M, 2)),
    ];
    let chained = qemu.create_chain(folder.path(), &chain).expect("a chain");
    let single = folder.path().join("single.qcow2");
    qemu.create(&single, &ImageSpec::qcow2(SIZE).with(pattern(M, 2 * M, 2))).expect("an image");
    // On data, on unallocated clusters and on data of the backing file; whole clusters and parts; and all of it twice.
    let operations = [
        zeros(M, 128 * K),
        zeros(5 * M, 256 * K),
        zeros(0, 64 * K),
        zeros(6 * M + 4 * K, 8 * K),
        zeros(M + 512 * K + 4 * K, 4 * K),
        Operation::Discard { offset: M + 256 * K, length: 128 * K },
        Operation::Discard { offset: 128 * K, length: 64 * K },
        Operation::WriteZeroes { offset: 2 * M, length: 128 * K, unmap: true },
        Operation::WriteZeroes { offset: 2 * M + 128 * K, length: 64 * K, unmap: false },
        Operation::WriteZeroes { offset: 192 * K, length: 64 * K, unmap: true },
        Operation::Discard { offset: 2 * M + 128 * K, length: 64 * K },
        zeros(2 * M + 64 * K, 64 * K),
        zeros(M, 64 * K),
        Operation::Flush,
    ];
    for image in [&single, &chained[1]] {
        for mode in modes() {
            let what = format!("{} with {mode:?}", image.display());
            let (ours, theirs) =
                (copy(folder.path(), image, "ours.qcow2"), copy(folder.path(), image, "theirs.qcow2"));
            by_qemu(&mode.of_qemu(&theirs), &operations);
            let before = qemu.read_all(&ours, Format::Qcow2).expect("read");
            let mut model = ByteModel::with_contents(&before, SIZE, 64 * K, rule(mode));
            let mut rig = Rig::open(&ours, &mode.options()).expect("opens");
            for operation in operations {
                // One by one, as qemu-io does.
                rig.run(&[operation], &mut model);
            }
            model.compare_all(&rig.read_all()).unwrap_or_else(|difference| panic!("{what}: {difference}"));
            rig.close();
            assert_clean(&ours, &what);
            assert!(
                qemu.read_all(&ours, Format::Qcow2).expect("read")
                    == qemu.read_all(&theirs, Format::Qcow2).expect("read"),
                "{what}: the contents are not QEMU's"
            );
            assert_eq!(kinds(&qemu, &ours), kinds(&qemu, &theirs), "{what}");
        }
    }
}

#[test]
fn zeros_within_a_write_take_no_space() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let image = folder.path().join("gappy.qcow2");
    qemu.create(&image, &ImageSpec::qcow2(SIZE)).expect("an image");
    let mode = Mode::new(DetectZeroes::On, Discards::Unmap, false);
    let mut model = ByteModel::new(SIZE, 64 * K, DiscardRule::ZeroesClusters);
    let mut rig = Rig::open(&image, &mode.options()).expect("opens");
    // Stretches of 64 KiB, starting in the middle of a cluster.
    let seed = (GAPPY_SEEDS..).find(|seed| seed % 5 == 4).expect("there are many");
    rig.run(&[write(4 * K, 960 * K, seed), Operation::Flush], &mut model);
    model.compare_all(&rig.read_all()).expect("contents");
    rig.close();
    assert_clean(&image, "gappy");
    let found = clusters(&qemu, &image, 64 * K);
    let (mut data, mut gaps) = (0, 0);
    for cluster in 1..15 {
        let zero = model.read(cluster * 64 * K, 64 * K).iter().all(|byte| *byte == 0);
        assert_eq!(found[&cluster].1.is_none(), zero, "cluster {cluster}");
        *if zero { &mut gaps } else { &mut data } += 1;
    }
    assert!(data > 0 && gaps > 0, "{data} of data, {gaps} of zeros");
}

#[test]
fn kept_clusters_stay_in_order_and_their_space_goes_back() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    for (name, spec) in [
        ("whole", ImageSpec::qcow2(SIZE)),
        ("parts", ImageSpec::qcow2(SIZE).cluster_size(128 * K).extended()),
    ] {
        let image = folder.path().join(name);
        let cluster = spec.cluster_size;
        qemu.create(&image, &spec.with(pattern(0, SIZE, 3))).expect("an image");
        let before = clusters(&qemu, &image, cluster);
        let length = std::fs::metadata(&image).expect("image").len();
        let contents = qemu.read_all(&image, Format::Qcow2).expect("read");
        let mut model = ByteModel::with_contents(
            &contents,
            SIZE,
            cluster / if name == "parts" { 32 } else { 1 },
            DiscardRule::ZeroesClusters,
        );
        let mode = Mode::new(DetectZeroes::Unmap, Discards::Unmap, true);
        let mut rig = Rig::open(&image, &mode.options()).expect("opens");
        let full = rig.disk().allocated(0).expect("the host says");
        // Scattered discards, and writes that reuse the clusters, in mixed order.
        for round in 0..3 {
            for step in 0..SIZE / cluster {
                let at = step * 7 % (SIZE / cluster) * cluster;
                let operation = match (step + round) % 4 {
                    0 => Operation::Discard { offset: at, length: cluster },
                    1 => Operation::WriteZeroes { offset: at, length: cluster, unmap: true },
                    2 => zeros(at, cluster),
                    _ => write(at + 4 * K, 8 * K, step as u32 + 1),
                };
                rig.run(&[operation], &mut model);
            }
            rig.run(&[Operation::Flush], &mut model);
        }
        rig.run(&[Operation::Discard { offset: 0, length: SIZE }, Operation::Flush], &mut model);
        let left = rig.disk().allocated(0).expect("the host says");
        assert!(left + SIZE / 2 < full, "{name}: of {full} bytes {left} are left");
        assert_eq!(rig.disk().status().quarantined_clusters, 0, "{name}: nothing was freed");
        rig.run(&[write(0, SIZE / 16, 9), write(SIZE / 2, SIZE / 16, 10)], &mut model);
        model.compare_all(&rig.read_all()).expect("contents");
        rig.close();
        assert_clean(&image, name);
        model.compare_all(&qemu.read_all(&image, Format::Qcow2).expect("read")).expect("contents by QEMU");
        assert_eq!(std::fs::metadata(&image).expect("image").len(), length, "{name}: the file's length");
        let after = clusters(&qemu, &image, cluster);
        let places = |map: &BTreeMap<u64, (bool, Option<u64>)>| -> Vec<Option<u64>> {
            map.values().map(|(_, place)| *place).collect()
        };
        assert_eq!(places(&after), places(&before), "{name}: every cluster is where it was");
    }
}

/// Host clusters without a written subcluster, and those zeroed before, give their space back, too.
#[test]
fn kept_places_give_their_space_back_whatever_they_held() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let image = folder.path().join("image.qcow2");
    let zeroes = Operation::WriteZeroes { offset: 0, length: SIZE, unmap: false };
    let falloc = |spec: ImageSpec| spec.preallocation(Preallocation::Falloc);
    for (spec, first) in [
        (falloc(ImageSpec::qcow2(SIZE).extended()), None),
        (falloc(ImageSpec::qcow2(SIZE).extended()), Some(write(0, M / 2, 1))),
        (falloc(ImageSpec::qcow2(SIZE)), Some(zeroes)),
        (ImageSpec::qcow2(SIZE).with(pattern(0, SIZE, 3)), Some(zeroes)),
    ] {
        qemu.create(&image, &spec).expect("an image");
        let before = clusters(&qemu, &image, spec.cluster_size);
        let how = DiskOptions { discard_no_unref: true, ..options() };
        let contents = qemu.read_all(&image, Format::Qcow2).expect("read");
        let granule = spec.granule_size();
        let mut model = ByteModel::with_contents(&contents, SIZE, granule, DiscardRule::ZeroesClusters);
        let mut rig = Rig::open(&image, &how).expect("opens");
        rig.run(&first.into_iter().collect::<Vec<_>>(), &mut model);
        assert!(rig.disk().allocated(0).expect("the host says") >= SIZE);
        rig.run(&[Operation::Discard { offset: 0, length: SIZE }, Operation::Flush], &mut model);
        let left = rig.disk().allocated(0).expect("the host says");
        assert!(left < M, "{spec:?}: {left} bytes are left");
        rig.run(&[write(M, M, 2)], &mut model);
        model.compare_all(&rig.read_all()).expect("contents");
        rig.close();
        assert_clean(&image, "emptied places");
        let places = |map: BTreeMap<u64, (bool, Option<u64>)>| map.into_values().map(|(_, place)| place);
        let after = clusters(&qemu, &image, spec.cluster_size);
        assert!(places(after).eq(places(before)), "{spec:?}: every cluster is where it was");
        std::fs::remove_file(&image).expect("gone");
    }
}

/// Version 2 has no entry for an allocated cluster that reads as zero. QEMU, too, frees such a cluster without `unmap`.
#[test]
fn version_2_gives_back_what_is_zeroed() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let image = folder.path().join("old.qcow2");
    qemu.create(&image, &ImageSpec::qcow2(SIZE).version(2).with(pattern(0, SIZE, 3))).expect("an image");
    let contents = qemu.read_all(&image, Format::Qcow2).expect("read");
    let mut model = ByteModel::with_contents(&contents, SIZE, 64 * K, DiscardRule::ZeroesClusters);
    let mut rig = Rig::open(&image, &options()).expect("opens");
    let zeroes = Operation::WriteZeroes { offset: 4 * K, length: SIZE - 4 * K, unmap: false };
    rig.run(&[zeroes, Operation::Flush], &mut model);
    model.compare_all(&rig.read_all()).expect("contents");
    rig.close();
    assert_clean(&image, "zeroed");
    let left = std::fs::metadata(&image).expect("image").len();
    assert!(left < M, "the file has {left} bytes");
}

/// Such write zeroes are as much work as writes, and the session bounds them so.
#[test]
fn zeros_are_data_where_they_cannot_be_recorded() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let at = |name: &str| folder.path().join(name);
    qemu.create(&at("base"), &ImageSpec::raw(SIZE)).expect("an image");
    let over = |spec: ImageSpec| spec.backing("base", Format::Raw);
    let raw_too = DiskOptions { format: disk::Format::Raw, ..options() };
    let cases = [
        ("old", ImageSpec::qcow2(SIZE).version(2), options(), false),
        ("old over a base", over(ImageSpec::qcow2(SIZE).version(2)), options(), true),
        ("new over a base", over(ImageSpec::qcow2(SIZE)), options(), false),
        ("raw", ImageSpec::raw(SIZE), raw_too, true),
    ];
    for (name, spec, how, expected) in cases {
        qemu.create(&at(name), &spec).expect("an image");
        let rig = Rig::open(&at(name), &how).expect("opens");
        assert_eq!(rig.disk().zeros_are_data(), expected, "{name}");
        rig.close();
    }
}

#[test]
fn clusters_keep_their_places_only_where_zeros_can_be_recorded() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let (old, raw) = (folder.path().join("old.qcow2"), folder.path().join("raw.img"));
    qemu.create(&old, &ImageSpec::qcow2(SIZE).version(2)).expect("an image");
    qemu.create(&raw, &ImageSpec::raw(SIZE)).expect("an image");
    let keep = DiskOptions { discard_no_unref: true, ..options() };
    let raw_too = DiskOptions { format: disk::Format::Raw, ..keep.clone() };
    for (image, how) in [(&old, &keep), (&raw, &raw_too)] {
        match Rig::open(image, how) {
            Err(OpenError::NoZeroClusters { path }) => assert_eq!(&path, image),
            Err(other) => panic!("{other}"),
            Ok(_) => panic!("{} opens", image.display()),
        }
    }
    Rig::open(&old, &DiskOptions { read_only: true, ..keep }).expect("nothing is discarded").close();
}

#[test]
fn ignored_discards_leave_everything_as_it_is() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let image = folder.path().join("ignored.qcow2");
    qemu.create(&image, &ImageSpec::qcow2(SIZE).with(pattern(0, 4 * M, 3))).expect("an image");
    let before = std::fs::read(&image).expect("image");
    let mut model = ByteModel::with_contents(
        &qemu.read_all(&image, Format::Qcow2).expect("read"),
        SIZE,
        64 * K,
        DiscardRule::Nothing,
    );
    let mode = Mode::new(DetectZeroes::Off, Discards::Ignore, false);
    let mut rig = Rig::open(&image, &mode.options()).expect("opens");
    rig.run(&[Operation::Discard { offset: 0, length: SIZE }, Operation::Flush], &mut model);
    model.compare_all(&rig.read_all()).expect("contents");
    rig.close();
    assert!(std::fs::read(&image).expect("image") == before, "a discard changed the file");
    let raw = folder.path().join("raw.img");
    std::fs::write(&raw, vec![7; SIZE as usize]).expect("an image");
    let options = DiskOptions { format: disk::Format::Raw, ..mode.options() };
    let mut rig = Rig::open(&raw, &options).expect("opens");
    rig.try_one(&Operation::Discard { offset: 0, length: SIZE }).expect("done");
    rig.close();
    assert!(std::fs::read(&raw).expect("image").iter().all(|byte| *byte == 7));
}

#[test]
fn allocated_images_are_written_in_place() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let specs = [
        ImageSpec::qcow2(SIZE),
        ImageSpec::qcow2(SIZE).version(2),
        ImageSpec::qcow2(SIZE).cluster_size(4 * K),
        ImageSpec::qcow2(SIZE).extended(),
    ];
    for (number, spec) in specs.into_iter().enumerate() {
        for how in [Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full] {
            let what = format!("{number} {how:?}");
            let image = folder.path().join(&what);
            let cluster = spec.cluster_size;
            qemu.create(&image, &spec.clone().preallocation(how)).expect("an image");
            let before = clusters(&qemu, &image, cluster);
            let length = std::fs::metadata(&image).expect("image").len();
            assert!(before.values().all(|(_, place)| place.is_some()), "{what}: it is all allocated");
            let mut model = ByteModel::new(SIZE, cluster, DiscardRule::ZeroesClusters);
            let mut rig = Rig::open(&image, &options()).expect("opens");
            let mut operations = vec![write(0, M / 2, 1), write(M + 512, 3 * K, 2), write(7 * M, M / 2, 3)];
            operations.extend((0..20).map(|n| write(2 * M + n * 100 * K, 70 * K, n as u32 + 4)));
            rig.run(&operations, &mut model);
            let status = rig.disk().status();
            assert_eq!((status.reserved_clusters, status.quarantined_clusters), (0, 0), "{what}: {status:?}");
            if !spec.extended_l2 {
                assert_eq!(status.dirty_bytes, 0, "{what}: no mapping changed");
            }
            rig.run(&[Operation::Flush], &mut model);
            model.compare_all(&rig.read_all()).expect("contents");
            rig.close();
            assert_clean(&image, &what);
            model
                .compare_all(&qemu.read_all(&image, Format::Qcow2).expect("read"))
                .expect("contents by QEMU");
            assert_eq!(std::fs::metadata(&image).expect("image").len(), length, "{what}: the file's length");
            let places = clusters(&qemu, &image, cluster);
            for (cluster, (_, place)) in before {
                assert_eq!(places[&cluster].1, place, "{what}: cluster {cluster} has its place");
            }
        }
    }
}
