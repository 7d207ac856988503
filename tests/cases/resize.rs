//! Changes of the disk size, against a model and by turns with `qemu-img resize`. The old contents stay, new sectors
//! read as zero whatever the file held there, and snapshots stay the same. Refusals leave every byte unchanged.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use disk::change::{ChangeError, ChangeRefusal};
use disk::resize::{NewSize, ResizeError, Resized, Shrinking, resize};
use disk::snapshot::{Change, change, list};
use disk::{DiskOptions, Format as DiskFormat, RequestError};
use qcow2::snapshot::encode_table;
use storage::host::HostStorage;
use strata_kit::images::{Content, Format, ImageSpec, Preallocation};
use strata_kit::model::{DiscardRule, Operation};
use strata_kit::{ByteModel, Qemu};
use strata_rig::agree::assert_clean;
use strata_rig::{K, M, Rig, options, patch, pattern, tables, word, write};

/// The largest disk of these tests, in bytes.
const MOST: u64 = 24 * M;

fn run(image: &Path, size: NewSize) -> Result<Resized, ResizeError> {
    resize(HostStorage::new(), image, size, Shrinking::Accepted, &options())
}

fn refused(image: &Path, size: NewSize, shrinking: Shrinking) -> ResizeError {
    let before = std::fs::read(image).expect("image");
    let error = resize(HostStorage::new(), image, size, shrinking, &options()).expect_err("refused");
    assert!(std::fs::read(image).expect("image") == before, "{error}: a refusal wrote to the image");
    error
}

fn refusal(image: &Path, size: u64) -> ChangeRefusal {
    match refused(image, NewSize::Of(size), Shrinking::Accepted) {
        ResizeError::Change(ChangeError::Refused { source, .. }) => source,
        other => panic!("{other:?}"),
    }
}

fn read(image: &Path, options: &DiskOptions) -> Vec<u8> {
    let mut rig = Rig::open(image, options).expect("it opens");
    let found = rig.read_all();
    rig.close();
    found
}

/// An image, and the expected contents of its disk and of each snapshot.
struct Bench {
    qemu: Qemu,
    image: PathBuf,
    granule: u64,
    rule: DiscardRule,
    contents: Vec<u8>,
    snapshots: Vec<(String, Vec<u8>)>,
}

impl Bench {
    fn new(qemu: &Qemu, folder: &Path, spec: &ImageSpec) -> Self {
        let image = folder.join("image.qcow2");
        qemu.create(&image, spec).expect("an image");
        let contents = qemu.read_all(&image, Format::Qcow2).expect("read");
        let v2_over = spec.version == 2 && spec.backing.is_some();
        let rule = if v2_over { DiscardRule::Nothing } else { DiscardRule::ZeroesClusters };
        let (qemu, granule) = (qemu.clone(), spec.granule_size());
        Bench { qemu, image, granule, rule, contents, snapshots: Vec::new() }
    }

    fn resize(&mut self, size: u64) {
        let from = self.contents.len() as u64;
        let resized =
            run(&self.image, NewSize::Of(size)).unwrap_or_else(|error| panic!("to {size}: {error}"));
        assert_eq!(resized, Resized { from, to: size });
        self.contents.resize(size as usize, 0);
        self.examine(&format!("from {from} to {size}"));
    }

    fn resize_by_qemu(&mut self, size: u64) {
        let image = self.image.display().to_string();
        self.qemu
            .img(["resize", "-q", "-f", "qcow2", "--shrink", &image, &size.to_string()])
            .expect("qemu-img");
        self.contents.resize(size as usize, 0);
        self.examine(&format!("to {size} by QEMU"));
    }

    /// Writes in several locations, including the last sector.
    fn write(&mut self, seed: u32) {
        let size = self.contents.len() as u64;
        let mut model = ByteModel::with_contents(&self.contents, size, self.granule, self.rule);
        let length = (3 * self.granule).min(256 * K).min(size);
        let middle = (size - length) / 1024 * 512;
        let mut rig = Rig::open(&self.image, &options()).expect("it opens");
        rig.run(
            &[
                write(middle, length, seed),
                write(size - 512, 512, seed),
                write(size - length, length.min(1024), seed + 1),
                Operation::Discard { offset: 0, length: self.granule.min(size) },
            ],
            &mut model,
        );
        self.contents = rig.read_all();
        model.compare_all(&self.contents).expect("the disk equals the model");
        rig.close();
    }

    fn keep(&mut self, name: &str) {
        let create = Change::Create { name: name.into(), seconds: 1, nanoseconds: 2 };
        change(&HostStorage::new(), &self.image, create, &options()).expect("a snapshot");
        self.snapshots.push((name.into(), self.contents.clone()));
    }

    fn apply(&mut self, name: &str) {
        let wanted = Change::Apply { wanted: name.into() };
        change(&HostStorage::new(), &self.image, wanted, &options()).expect("applied");
        let kept = self.snapshots.iter().find(|(known, _)| known == name).expect("it was made");
        self.contents = kept.1.clone();
        self.examine(&format!("{name} applied"));
    }

    /// Checks the image with both checkers. Compares the disk and all snapshots with the expected contents.
    fn examine(&self, what: &str) {
        assert_clean(&self.image, what);
        assert!(read(&self.image, &options()) == self.contents, "{what}: the disk reads otherwise");
        let theirs = self.qemu.read_all(&self.image, Format::Qcow2).expect("read");
        assert!(theirs == self.contents, "{what}: qemu-img reads otherwise");
        for (name, contents) in &self.snapshots {
            let of_snapshot = DiskOptions { snapshot: Some(name.clone()), ..options() };
            assert!(read(&self.image, &of_snapshot) == *contents, "{what}: {name} reads otherwise");
        }
    }
}

/// Sizes for clusters of `unit` bytes: across tables, within the last cluster, to its edge, and almost nothing.
fn sizes(unit: u64) -> Vec<u64> {
    // The bytes that one L2 table maps, limited to the size that a test reads.
    let table = (unit / 8 * unit).min(8 * M);
    let sizes = [
        unit * 24 + 1024,
        unit * 24 + 2048,
        unit * 25,
        table * 2 + 512,
        table + unit,
        table - 512,
        table * 2 + unit * 5,
        unit * 3 + 512,
        512,
        unit * 7,
    ];
    sizes.map(|size| size.min(MOST)).to_vec()
}

fn specs() -> Vec<ImageSpec> {
    let base = |cluster: u64| {
        let written = pattern(0, 4 * cluster, 1);
        let zero = Content::Zeroes { offset: cluster, length: cluster, unmap: false };
        ImageSpec::qcow2((cluster * 24).min(16 * M) + 512).cluster_size(cluster).with(written).with(zero)
    };
    let bits = |mut spec: ImageSpec, bits: u8| {
        spec.refcount_bits = bits;
        spec
    };
    let compressed =
        |cluster: u64| Content::Compressed { offset: 8 * cluster, length: 16 * cluster, byte: 7 };
    vec![
        base(512),
        base(512).version(2),
        bits(base(512), 64),
        bits(base(K), 1),
        base(4 * K).with(compressed(4 * K)),
        base(4 * K).preallocation(Preallocation::Metadata),
        base(64 * K),
        base(64 * K).extended(),
        base(2 * M),
    ]
}

#[test]
fn disks_keep_what_they_can_whoever_resizes_them() {
    let Some(qemu) = Qemu::find() else { return };
    for spec in specs() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut bench = Bench::new(&qemu, folder.path(), &spec);
        let snapshots = spec.version == 3 && spec.refcount_bits > 1;
        for (number, size) in sizes(spec.cluster_size).into_iter().enumerate() {
            bench.write(number as u32 * 7 + 1);
            if snapshots && number % 3 == 1 {
                bench.keep(&format!("taken {number}"));
            }
            // QEMU would show the bytes of the last cluster after the end.
            let aligned = (bench.contents.len() as u64).is_multiple_of(spec.cluster_size);
            if number % 4 == 3 && aligned && (!snapshots || number < 5) {
                bench.resize_by_qemu(size);
            } else {
                bench.resize(size);
            }
        }
        for name in bench.snapshots.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>() {
            bench.apply(&name);
            bench.resize(bench.contents.len() as u64 + 5 * 512);
            bench.write(99);
        }
    }
}

#[test]
fn a_longer_backing_file_does_not_show_in_the_new_part() {
    let Some(qemu) = Qemu::find() else { return };
    for (cluster, extended) in [(512, false), (4 * K, false), (64 * K, false), (64 * K, true)] {
        for (format, size_below) in [(Format::Raw, 2 * M + 512), (Format::Qcow2, 3 * M)] {
            for start in [cluster * 10, cluster * 9 + 1536] {
                let folder = tempfile::tempdir().expect("a folder");
                let below = ImageSpec { format, ..ImageSpec::qcow2(size_below) };
                qemu.create(&folder.path().join("base"), &below.with(pattern(0, size_below, 3)))
                    .expect("a base");
                let spec = ImageSpec::qcow2(start).cluster_size(cluster).backing("base", format);
                let spec = if extended { spec.extended() } else { spec };
                let spec = spec.with(pattern(2 * cluster, 2 * cluster, 5));
                let mut bench = Bench::new(&qemu, folder.path(), &spec);
                bench.resize(cluster * 10 + 1024);
                bench.keep("kept");
                bench.resize(M);
                bench.write(1);
                bench.resize(4 * M);
                bench.resize(512 * 5);
                bench.resize(2 * M);
                bench.write(9);
                bench.apply("kept");
                bench.resize(3 * M + 512);
            }
        }
    }
}

/// Data and L1 entries that other programs have left after the end are never visible, and their space is not lost.
#[test]
fn leftovers_past_the_end_are_never_visible() {
    let Some(qemu) = Qemu::find() else { return };
    for (size, wanted) in [(512 * K, 4 * M), (520 * K + 512, 2 * M), (512 * K, 256 * K), (2 * K, 3 * K)] {
        for snapshot in [false, true] {
            let folder = tempfile::tempdir().expect("a folder");
            // 32 KiB for each L2 table.
            let spec = ImageSpec::qcow2(M).cluster_size(512).with(pattern(0, M, 1));
            let mut bench = Bench::new(&qemu, folder.path(), &spec);
            if snapshot {
                bench.keep("all of it");
            }
            patch(&bench.image, 24, &u64::to_be_bytes(size));
            bench.contents.truncate(size as usize);
            bench.resize(wanted);
            bench.write(3);
            bench.examine("written");
        }
    }
}

#[test]
fn the_space_behind_the_new_end_is_given_back() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let spec = ImageSpec::qcow2(16 * M).with(pattern(0, 16 * M, 1));
    let mut bench = Bench::new(&qemu, folder.path(), &spec);
    bench.resize(2 * M);
    let bytes = std::fs::metadata(&bench.image).expect("image").blocks() * 512;
    assert!(bytes < 3 * M, "{bytes} bytes are left");
}

/// The new L1 table was first written after the old end of the file. It must not keep the file that long.
#[test]
fn the_file_of_a_smaller_disk_is_short() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    for spec in [
        ImageSpec::qcow2(MOST),
        ImageSpec::qcow2(MOST).cluster_size(4 * K),
        ImageSpec::qcow2(MOST).cluster_size(4 * K).version(2),
        ImageSpec::qcow2(MOST).extended(),
    ] {
        let image = folder.path().join("image.qcow2");
        // The end lies within a table that has data on both sides of it.
        let size = M + 64 * K;
        let mut contents = vec![7; size as usize];
        qemu.create(&image, &spec.clone().with(pattern(0, MOST, 7))).expect("an image");
        run(&image, NewSize::Of(size)).expect("it shrinks");
        assert_clean(&image, "a smaller disk");
        let length = std::fs::metadata(&image).expect("the image").len();
        assert!(length <= size + 10 * spec.cluster_size, "{spec:?}: the file has {length} bytes");
        run(&image, NewSize::Of(2 * M)).expect("it grows");
        contents.resize(2 * M as usize, 0);
        assert!(read(&image, &options()) == contents, "{spec:?}: the contents differ");
        std::fs::remove_file(&image).expect("gone");
    }
}

#[test]
fn features_that_a_change_cannot_maintain_are_refused() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let new = |name: &str, spec: &ImageSpec| {
        let image = folder.path().join(name);
        qemu.create(&image, spec).expect("an image");
        image
    };
    let plain = new("plain", &ImageSpec::qcow2(M).with(pattern(0, 64 * K, 1)));
    let refuses = |size, shrinking| refused(&plain, size, shrinking);
    use Shrinking::{Accepted, Refused};
    assert!(matches!(refuses(NewSize::Of(512 * K), Refused), ResizeError::WouldShrink { from: M, .. }));
    assert!(matches!(refuses(NewSize::Smaller(512), Refused), ResizeError::WouldShrink { .. }));
    assert!(matches!(refuses(NewSize::Of(0), Accepted), ResizeError::Empty { .. }));
    assert!(matches!(refuses(NewSize::Smaller(M), Accepted), ResizeError::Empty { .. }));
    assert!(matches!(refuses(NewSize::Smaller(M + 512), Accepted), ResizeError::NothingLeft { .. }));
    assert!(matches!(refuses(NewSize::Larger(u64::MAX), Accepted), ResizeError::TooLarge { .. }));
    assert!(matches!(refuses(NewSize::Of(1 << 63), Accepted), ResizeError::TooLarge { .. }));
    assert!(matches!(refuses(NewSize::Larger(100), Accepted), ResizeError::NoSectors { .. }));
    // 32 MiB of L1 table, each entry of which maps 512 MiB.
    let max = (32 * M / 8) * (512 * M);
    assert_eq!(refusal(&plain, max + 512), ChangeRefusal::DiskTooLarge { size: max + 512, max });
    let before = std::fs::read(&plain).expect("image");
    assert_eq!(run(&plain, NewSize::Of(M)).expect("nothing to do"), Resized { from: M, to: M });
    assert!(std::fs::read(&plain).expect("image") == before, "nothing to do, nothing done");

    let bitmaps = new("bitmaps", &ImageSpec::qcow2(M));
    let text = bitmaps.display().to_string();
    qemu.img(["bitmap", "--add", &text, "first"]).expect("a bitmap");
    assert_eq!(refusal(&bitmaps, 2 * M), ChangeRefusal::ResizeWithBitmaps { count: 1 });
    qemu.img(["bitmap", "--remove", &text, "first"]).expect("removed");
    run(&bitmaps, NewSize::Of(2 * M)).expect("none is left");

    // A snapshot of another size would bring that size back.
    let mut bench = Bench::new(&qemu, folder.path(), &ImageSpec::qcow2(M).with(pattern(0, M, 1)));
    bench.keep("small");
    bench.resize(2 * M);
    let text = bench.image.display().to_string();
    qemu.img(["bitmap", "--add", &text, "first"]).expect("a bitmap");
    let apply = || Change::Apply { wanted: "small".into() };
    let error = change(&HostStorage::new(), &bench.image, apply(), &options()).expect_err("refused");
    assert!(error.to_string().contains("persistent bitmaps (1)"), "{error}");
    qemu.img(["bitmap", "--remove", &text, "first"]).expect("removed");
    bench.apply("small");

    let old = new("old", &ImageSpec::qcow2(M).version(2).with(pattern(0, M, 1)));
    qemu.img(["snapshot", "-c", "kept", &old.display().to_string()]).expect("a snapshot");
    assert_eq!(refusal(&old, 2 * M), ChangeRefusal::ResizeWithSnapshotsInV2);

    // A snapshot in version 3 without the size of its disk.
    let bare = new("bare", &ImageSpec::qcow2(M).with(pattern(0, M, 1)));
    qemu.img(["snapshot", "-c", "kept", &bare.display().to_string()]).expect("a snapshot");
    let mut known = list(&HostStorage::new(), &bare, &options()).expect("a list");
    known[0].extra.clear();
    patch(&bare, word(&bare, 64), &encode_table(&known));
    assert_eq!(refusal(&bare, 2 * M), ChangeRefusal::SnapshotWithoutSize { id: b"1".to_vec() });

    new("base", &ImageSpec::raw(4 * M));
    let over = new("over", &ImageSpec::qcow2(M).version(2).backing("base", Format::Raw));
    assert_eq!(refusal(&over, 2 * M), ChangeRefusal::BackingShowsThrough { backing_size: 4 * M });
    run(&over, NewSize::Of(512 * K)).expect("it may shrink");

    let broken = new("broken", &ImageSpec::qcow2(M + 512).with(pattern(0, M, 1)));
    let (_, l2, block) = tables(&broken);
    let data = word(&broken, l2) & 0x00ff_ffff_ffff_fe00;
    patch(&broken, block + data / (64 * K) * 2, &[0, 0]);
    for size in [512 * K, 2 * M] {
        assert!(matches!(refusal(&broken, size), ChangeRefusal::RefcountTooLow { .. }));
    }
}

#[test]
fn a_dirty_image_is_repaired_first() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let mut bench = Bench::new(&qemu, folder.path(), &ImageSpec::qcow2(M + 512).with(pattern(0, M, 1)));
    let (_, _, block) = tables(&bench.image);
    patch(&bench.image, block + 8, &[0; 8]);
    patch(&bench.image, 72, &1_u64.to_be_bytes());
    bench.resize(3 * M);
    assert_eq!(word(&bench.image, 72), 0);
}

/// Data in an external file: its length follows the disk. If it is also a raw image, it shows the same disk.
#[test]
fn external_data_files_get_the_size_of_their_disk() {
    let Some(qemu) = Qemu::find() else { return };
    for (raw, backing) in [(true, false), (false, false), (false, true)] {
        let folder = tempfile::tempdir().expect("a folder");
        let (image, data) = (folder.path().join("image"), folder.path().join("data"));
        let base = folder.path().join("base");
        qemu.create(&base, &ImageSpec::raw(3 * M).with(pattern(0, 3 * M, 3))).expect("a base");
        let how = format!("data_file={},data_file_raw={}", data.display(), if raw { "on" } else { "off" });
        let (path, below) = (image.display().to_string(), base.display().to_string());
        let mut create = vec!["create", "-q", "-f", "qcow2", "-o", &how];
        if backing {
            create.extend(["-b", &below, "-F", "raw"]);
        }
        create.extend([&path, "1M"]);
        qemu.img(create).expect("an image");
        qemu.write(&image, Format::Qcow2, &[pattern(64 * K, M - 64 * K, 5)]).expect("written");
        let options = DiskOptions { data_file: Some(data.clone()), ..options() };
        let mut contents = qemu.read_all(&image, Format::Qcow2).expect("read");
        for size in [512 * K + 512, 520 * K, 600 * K + 1024, 4 * M, 2 * M + 512, 2 * M + 1024, 512, 3 * M] {
            let size = NewSize::Of(size);
            let resized = resize(HostStorage::new(), &image, size, Shrinking::Accepted, &options);
            let to = resized.expect("resized").to;
            contents.resize(to as usize, 0);
            let what = format!("raw: {raw}, to {to}");
            assert_clean(&image, &what);
            assert!(read(&image, &options) == contents, "{what}: the disk reads otherwise");
            let theirs = qemu.read_all(&image, Format::Qcow2).expect("read");
            assert!(theirs == contents, "{what}: qemu-img reads otherwise");
            let file = std::fs::read(&data).expect("the data file");
            assert_eq!(file.len() as u64, to, "{what}");
            assert!(!raw || file == contents, "{what}: the data file reads otherwise as a raw image");
            // Bytes after the end in that file are not part of the disk.
            std::fs::write(&data, [file, vec![0xee; 700 * K as usize]].concat()).expect("written");
            let mut rig = Rig::open(&image, &options).expect("it opens");
            rig.try_one(&write(to / 1024 * 512, 512, 1)).expect("a write");
            contents = rig.read_all();
            rig.close();
        }
    }
}

#[test]
fn raw_images_get_another_length() {
    let folder = tempfile::tempdir().expect("a folder");
    let image = folder.path().join("raw");
    std::fs::write(&image, [7; 5000]).expect("a file");
    let options = DiskOptions { format: DiskFormat::Raw, ..options() };
    let run = |size, shrinking| resize(HostStorage::new(), &image, size, shrinking, &options);
    assert!(matches!(
        run(NewSize::Of(4096), Shrinking::Refused),
        Err(ResizeError::WouldShrink { from: 5000, to: 4096, .. })
    ));
    assert_eq!(run(NewSize::Of(8192), Shrinking::Refused).expect("grown"), Resized { from: 5000, to: 8192 });
    assert!(std::fs::read(&image).expect("the file") == [[7; 5000].as_slice(), &[0; 3192]].concat());
    run(NewSize::Smaller(4096), Shrinking::Accepted).expect("cut");
    assert!(std::fs::read(&image).expect("the file") == [7; 4096]);
}

#[test]
fn a_disk_in_use_grows_and_shrinks() {
    let Some(qemu) = Qemu::find() else { return };
    for (cluster_size, over) in [(64 * K, false), (4 * K, true), (512, false)] {
        let folder = tempfile::tempdir().expect("a folder");
        let (base, image) = (folder.path().join("base.raw"), folder.path().join("image.qcow2"));
        let mut spec = ImageSpec { cluster_size, ..ImageSpec::qcow2(M + 512) };
        if over {
            std::fs::write(&base, vec![0xbb; 3 * M as usize]).expect("a longer backing file");
            spec.backing = Some((base.clone(), Format::Raw));
        }
        qemu.create(&image, &spec).expect("an image");
        let mut rig = Rig::open(&image, &options()).expect("it opens");
        let first = if over { 0xbb } else { 0 };
        let mut expected = vec![first; (M + 512) as usize];
        assert!(rig.read_all() == expected);
        for size in [M + 1024, 2 * M, M - 512, 2 * M - 4096, 64 * M.min(cluster_size * 64)] {
            let from = expected.len() as u64;
            let resized = rig.disk().resize(NewSize::Of(size), Shrinking::Accepted).expect("resized");
            assert_eq!(resized, Resized { from, to: size });
            expected.resize(size as usize, 0);
            assert!(rig.read_all() == expected, "{cluster_size}: {from} to {size}");
            let granule = spec.granule_size();
            let mut model = ByteModel::with_contents(&expected, size, granule, DiscardRule::ZeroesClusters);
            rig.run(&[write(size - 1024, 1024, 1), write(size / 2 / K * K, K, 2)], &mut model);
            expected = model.read(0, size);
        }
        rig.close();
        assert_clean(&image, "after resizes in use");
        assert!(qemu.read_all(&image, Format::Qcow2).expect("read") == expected);
    }
}

/// A piece of a request that was checked before the disk became smaller may come afterwards.
#[test]
fn no_request_reaches_past_the_new_end_of_a_smaller_disk_in_use() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let [raw, image, data] = ["raw", "image", "data"].map(|name| folder.path().join(name));
    std::fs::write(&raw, vec![7; 4 * M as usize]).expect("a file");
    let how = format!("data_file={}", data.display());
    qemu.img(["create", "-q", "-f", "qcow2", "-o", &how, &image.display().to_string(), "4M"])
        .expect("an image");
    let as_raw = DiskOptions { format: DiskFormat::Raw, ..options() };
    let with_data = DiskOptions { data_file: Some(data.clone()), ..options() };
    for (path, file, options) in [(&raw, &raw, as_raw), (&image, &data, with_data)] {
        let mut rig = Rig::open(path, &options).expect("it opens");
        rig.try_one(&write(3 * M, M, 1)).expect("a write");
        rig.disk().resize(NewSize::Of(2 * M), Shrinking::Accepted).expect("smaller");
        let late = [
            write(3 * M, 4096, 1),
            write(2 * M - 512, 1024, 1),
            Operation::WriteZeroes { offset: 2 * M, length: M, unmap: false },
            Operation::Discard { offset: 2 * M, length: M },
            Operation::Read { offset: 2 * M, length: 512 },
        ];
        for late in late {
            let error = rig.try_one(&late).expect_err("it is past the end");
            assert!(matches!(error, RequestError::PastEnd), "{late:?}: {error}");
        }
        assert_eq!(std::fs::metadata(file).expect("the file").len(), 2 * M);
        rig.try_one(&write(2 * M - 4096, 4096, 2)).expect("up to the end");
        rig.disk().resize(NewSize::Of(4 * M), Shrinking::Refused).expect("larger");
        assert!(rig.read_all()[2 * M as usize..].iter().all(|byte| *byte == 0), "nothing lies there");
        rig.try_one(&write(3 * M, M, 3)).expect("a write");
        rig.close();
    }
}

/// A stop does not wait until all the space past a smaller end is given back.
#[test]
fn a_smaller_size_stands_where_the_rest_is_given_up() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let image = folder.path().join("image");
    // More clusters than are cleared at once.
    let spec = ImageSpec { cluster_size: 512, ..ImageSpec::qcow2(2 * M) };
    qemu.create(&image, &spec.with(pattern(0, 2 * M, 9))).expect("an image");
    let mut rig = Rig::open(&image, &options()).expect("it opens");
    let mut resizing = rig.disk().resizing(NewSize::Of(M), Shrinking::Accepted).expect("it begins");
    let outcome = loop {
        if let Some(outcome) = resizing.poll() {
            break outcome;
        }
        if rig.disk().size() == M {
            resizing.give_up();
        }
        resizing.wait(None);
    };
    assert_eq!(outcome.expect("the size is durable"), Resized { from: 2 * M, to: M });
    drop(resizing);
    assert!(rig.read_all() == [9; M as usize]);
    rig.close();
    assert_clean(&image, "after a resize that was given up");
    let kept = std::fs::metadata(&image).expect("the image").blocks() * 512;
    assert!(kept > M + M / 4, "{kept} bytes are left: all was given back");
    // The rest is cleared when the disk grows again.
    let mut rig = Rig::open(&image, &options()).expect("it opens");
    rig.disk().resize(NewSize::Of(2 * M), Shrinking::Refused).expect("larger");
    assert!(rig.read_all() == [[9; M as usize], [0; M as usize]].concat());
    rig.close();
    assert_clean(&image, "after the growth");
}

#[test]
fn a_disk_in_use_is_not_resized_to_what_it_cannot_be() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let image = folder.path().join("image.qcow2");
    qemu.create(&image, &ImageSpec { cluster_size: 512, ..ImageSpec::qcow2(M) }).expect("an image");
    let mut rig = Rig::open(&image, &options()).expect("it opens");
    let refused =
        |rig: &Rig, size, shrinking| rig.disk().resize(size, shrinking).expect_err("refused").to_string();
    // 64 entries of 32 KiB each.
    let moves = refused(&rig, NewSize::Of(2 * M + 512), Shrinking::Refused);
    assert!(moves.contains("only while the image is not in use"), "{moves}");
    let shrinks = refused(&rig, NewSize::Smaller(512), Shrinking::Refused);
    assert!(shrinks.contains("loses the data past the new end"), "{shrinks}");
    assert!(refused(&rig, NewSize::Of(100), Shrinking::Accepted).contains("no multiple of 512"));
    assert_eq!(rig.disk().size(), M);
    assert!(rig.read_all() == vec![0; M as usize]);
    rig.disk().resize(NewSize::Of(2 * M), Shrinking::Refused).expect("it fits");
    rig.close();
    let read_only = DiskOptions { read_only: true, ..options() };
    let rig = Rig::open(&image, &read_only).expect("it opens");
    assert!(refused(&rig, NewSize::Larger(512), Shrinking::Refused).contains("read-only"));
    rig.close();
}
