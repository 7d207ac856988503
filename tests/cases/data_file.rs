//! Images whose data is in an external file. They are read and written as QEMU does, with each cluster at the offset
//! that the format requires. A flag makes the file a raw image as well. Some images are refused by name.

use std::path::{Path, PathBuf};

use disk::{DiskOptions, OpenError};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use qcow2::entry::{COMPRESSED, COPIED};
use strata_kit::images::{Content, Format, ImageSpec};
use strata_kit::model::{DiscardRule, Geometry, Operation, sequences, sequences_of_parts};
use strata_kit::{ByteModel, Qemu};
use strata_rig::agree::assert_clean;
use strata_rig::{K, M, Rig, options, patch, pattern, tables, word, write};

/// An image in a folder, with its data in another file of that folder.
struct Pair {
    image: PathBuf,
    data: PathBuf,
}

impl Pair {
    /// Makes the pair with QEMU. `more` are options of `qemu-img create`.
    fn make(qemu: &Qemu, folder: &Path, name: &str, more: &str, size: u64, backing: Option<&str>) -> Pair {
        let (image, data) = (folder.join(format!("{name}.qcow2")), folder.join(format!("{name}.data")));
        let options = format!("data_file={}{more}", data.display());
        let mut create = vec!["create", "-q", "-f", "qcow2", "-o", &options];
        if let Some(backing) = backing {
            create.extend(["-b", backing, "-F", "qcow2"]);
        }
        let (path, size) = (image.display().to_string(), size.to_string());
        create.extend([path.as_str(), size.as_str()]);
        qemu.img(create).expect("an image");
        Pair { image, data }
    }

    fn options(&self) -> DiskOptions {
        DiskOptions { data_file: Some(self.data.clone()), ..options() }
    }

    fn read_only(&self) -> DiskOptions {
        DiskOptions { read_only: true, ..self.options() }
    }
}

fn refused(image: &Path, options: &DiskOptions) -> OpenError {
    match Rig::open(image, options) {
        Ok(_) => panic!("{} opens", image.display()),
        Err(error) => error,
    }
}

/// Contents of every kind: data, zeros with and without a host cluster, and discards.
fn contents() -> Vec<Content> {
    let zeroes = |offset, length, unmap| Content::Zeroes { offset, length, unmap };
    vec![
        pattern(0, M, 1),
        pattern(3 * M + 512, M + 1024, 2),
        zeroes(0, 64 * K, false),
        zeroes(128 * K, 64 * K, true),
        Content::Discard { offset: 256 * K, length: 128 * K },
        pattern(0, 512, 3),
    ]
}

struct Case {
    name: &'static str,
    more: &'static str,
    cluster: u64,
    parts: bool,
    size: u64,
    over: bool,
}

const CASES: &[Case] = &[
    Case { name: "plain", more: "", cluster: 64 * K, parts: false, size: 6 * M, over: false },
    Case { name: "raw", more: ",data_file_raw=on", cluster: 64 * K, parts: false, size: 6 * M, over: false },
    Case { name: "over", more: "", cluster: 64 * K, parts: false, size: 6 * M + 5 * 512, over: true },
    Case {
        name: "parts",
        more: ",extended_l2=on",
        cluster: 64 * K,
        parts: true,
        size: 6 * M + 512,
        over: false,
    },
    Case {
        name: "parts-over",
        more: ",extended_l2=on",
        cluster: 64 * K,
        parts: true,
        size: 6 * M,
        over: true,
    },
    Case {
        name: "parts-raw",
        more: ",extended_l2=on,data_file_raw=on",
        cluster: 64 * K,
        parts: true,
        size: 6 * M,
        over: false,
    },
    Case { name: "small", more: ",cluster_size=512", cluster: 512, parts: false, size: 5 * M, over: true },
    Case {
        name: "small-raw",
        more: ",cluster_size=1024,data_file_raw=on",
        cluster: K,
        parts: false,
        size: 5 * M + 512,
        over: false,
    },
    Case {
        name: "large",
        more: ",cluster_size=2M",
        cluster: 2 * M,
        parts: false,
        size: 9 * M + 512,
        over: true,
    },
];

fn operations_on(case: &Case) -> BoxedStrategy<Vec<Operation>> {
    let transfer_max = (4 * case.cluster).min(512 * K);
    let geometry = Geometry { size: case.size, cluster_size: case.cluster, transfer_max };
    if case.parts {
        sequences_of_parts(geometry, case.cluster / 32, 60).boxed()
    } else {
        sequences(geometry, 60).boxed()
    }
}

fn run_case(qemu: &Qemu, folder: &Path, case: &Case, sessions: &[Vec<Operation>]) {
    let base = folder.join("base.qcow2");
    let below = ImageSpec::qcow2(4 * M).cluster_size(16 * K).with(pattern(K, 3 * M, 9));
    qemu.create(&base, &below).expect("a backing file");
    let pair = Pair::make(qemu, folder, "image", case.more, case.size, case.over.then_some("base.qcow2"));
    qemu.write(&pair.image, Format::Qcow2, &contents()).expect("contents");
    let granule = if case.parts { case.cluster / 32 } else { case.cluster };
    let initial = qemu.read_all(&pair.image, Format::Qcow2).expect("read");
    let mut model = ByteModel::with_contents(&initial, case.size, granule, DiscardRule::ZeroesClusters);
    for operations in sessions {
        let mut rig = Rig::open(&pair.image, &pair.options()).expect("the image opens");
        rig.run(operations, &mut model);
        let found = rig.read_all();
        model.compare_all(&found).unwrap_or_else(|difference| panic!("{}: {difference}", case.name));
        rig.close();
        assert_clean(&pair.image, case.name);
        let by_qemu = qemu.read_all(&pair.image, Format::Qcow2).expect("qemu-img reads the image");
        model.compare_all(&by_qemu).unwrap_or_else(|found| panic!("{}, by qemu-img: {found}", case.name));
        let raw = std::fs::read(&pair.data).expect("the data file");
        assert!(raw.len() as u64 >= case.size, "{}: the data file is as long as the disk", case.name);
        if case.more.contains("raw") {
            let seen = model.compare_all(&raw[..case.size as usize]);
            seen.unwrap_or_else(|difference| panic!("{}, as a raw image: {difference}", case.name));
        }
    }
}

#[test]
fn random_sequences_equal_the_model_and_the_raw_view() {
    let Some(qemu) = Qemu::find() else { return };
    for case in CASES {
        let mut runner = TestRunner::new(ProptestConfig {
            cases: 2,
            max_shrink_iters: 100,
            failure_persistence: None,
            ..ProptestConfig::default()
        });
        let sessions = proptest::collection::vec(operations_on(case), 2);
        let result = runner.run(&sessions, |sessions| {
            let folder = tempfile::tempdir().expect("a folder");
            run_case(&qemu, folder.path(), case, &sessions);
            Ok(())
        });
        if let Err(error) = result {
            panic!("{}: {error}", case.name);
        }
    }
}

#[test]
fn new_data_goes_where_qemu_puts_it() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let ours = Pair::make(&qemu, folder.path(), "ours", "", 2 * M, None);
    let theirs = Pair::make(&qemu, folder.path(), "theirs", "", 2 * M, None);
    let zeroes = |offset| Content::Zeroes { offset, length: 64 * K, unmap: false };
    let done = [pattern(0, 4096, 1), pattern(M, 128 * K, 1), zeroes(0), zeroes(M), pattern(0, 512, 2)];
    qemu.write(&theirs.image, Format::Qcow2, &done).expect("written");
    let mut model = ByteModel::new(2 * M, 64 * K, DiscardRule::ZeroesClusters);
    let mut rig = Rig::open(&ours.image, &ours.options()).expect("it opens");
    let zeroes = |offset| Operation::WriteZeroes { offset, length: 64 * K, unmap: false };
    let done = [write(0, 4096, 1), write(M, 128 * K, 1), zeroes(0), zeroes(M), write(0, 512, 2)];
    rig.run(&done, &mut model);
    rig.close();
    let entries = |image: &Path| {
        let l2 = tables(image).1;
        (0..32).map(|index| word(image, l2 + index * 8)).collect::<Vec<_>>()
    };
    assert_eq!(entries(&ours.image), entries(&theirs.image));
    assert_eq!(entries(&ours.image)[0], COPIED, "data at offset 0");
    assert_clean(&ours.image, "ours");
}

#[test]
fn space_goes_back_to_the_host() {
    use std::os::unix::fs::MetadataExt;
    let Some(qemu) = Qemu::find() else { return };
    for more in ["", ",data_file_raw=on", ",extended_l2=on"] {
        let folder = tempfile::tempdir().expect("a folder");
        let pair = Pair::make(&qemu, folder.path(), "image", more, 4 * M, None);
        qemu.write(&pair.image, Format::Qcow2, &[pattern(0, 4 * M, 1)]).expect("written");
        let used = || std::fs::metadata(&pair.data).expect("the data file").blocks() * 512;
        assert!(used() >= 4 * M, "{more}: {} bytes", used());
        let mut model =
            ByteModel::with_contents(&vec![1; 4 << 20], 4 * M, 64 * K, DiscardRule::ZeroesClusters);
        let mut rig = Rig::open(&pair.image, &pair.options()).expect("it opens");
        let unmap = Operation::WriteZeroes { offset: 0, length: M, unmap: true };
        rig.run(&[unmap, Operation::Discard { offset: 2 * M, length: 2 * M }], &mut model);
        assert!(used() <= M, "{more}: {} bytes", used());
        model.compare_all(&rig.read_all()).expect("contents");
        rig.close();
        assert_clean(&pair.image, more);
    }
}

#[test]
fn only_a_file_that_was_named_is_opened() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let pair = Pair::make(&qemu, folder.path(), "image", "", M, None);
    let says = |error: OpenError, words: &[&str]| {
        let message = error.to_string();
        for word in words {
            assert!(message.contains(word), "{message:?} says nothing of {word:?}");
        }
    };
    let recorded = pair.data.display().to_string();
    says(
        refused(&pair.image, &options()),
        &["external file", &recorded, "only a file that you name is opened"],
    );
    let plain = folder.path().join("plain.qcow2");
    qemu.create(&plain, &ImageSpec::qcow2(M)).expect("an image");
    says(refused(&plain, &pair.options()), &["plain.qcow2: keeps its data itself", &recorded]);
    let raw = DiskOptions { format: disk::Format::Raw, ..pair.options() };
    says(refused(&plain, &raw), &["plain.qcow2: keeps its data itself"]);
    let itself = DiskOptions { data_file: Some(pair.image.clone()), ..options() };
    assert!(matches!(refused(&pair.image, &itself), OpenError::DataFileTwice { .. } | OpenError::Storage(_)));
    let itself = DiskOptions { read_only: true, ..itself };
    assert!(matches!(refused(&pair.image, &itself), OpenError::DataFileTwice { .. }));
    let gone = DiskOptions { data_file: Some(folder.path().join("gone")), ..options() };
    says(refused(&pair.image, &gone), &["gone"]);
    let snapshot = DiskOptions { snapshot: Some("x".into()), ..pair.options() };
    says(refused(&pair.image, &snapshot), &["internal snapshots", "external data file"]);
    // Two images must not write the data file at the same time.
    let held = Rig::open(&pair.image, &pair.options()).expect("it opens");
    let patient = DiskOptions { lock_timeout: std::time::Duration::ZERO, ..options() };
    let format = disk::Format::Raw;
    let other = DiskOptions { format, ..patient };
    says(refused(&pair.data, &other), &["image.data"]);
    let theirs = qemu.write(&pair.data, Format::Raw, &[pattern(0, 512, 1)]).expect_err("QEMU is kept out");
    assert!(theirs.to_string().contains("lock"), "{theirs}");
    held.close();
}

#[test]
fn backing_files_have_their_own() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let base = Pair::make(&qemu, folder.path(), "base", ",cluster_size=16k", 3 * M + 512, None);
    qemu.write(&base.image, Format::Qcow2, &[pattern(0, 100 * K, 1), pattern(2 * M, M, 2)]).expect("written");
    let middle = Pair::make(&qemu, folder.path(), "middle", ",extended_l2=on", 4 * M, Some("base.qcow2"));
    qemu.write(&middle.image, Format::Qcow2, &[pattern(50 * K, K, 3), pattern(3 * M, K, 4)])
        .expect("written");
    let top = Pair::make(&qemu, folder.path(), "top", "", 4 * M, Some("middle.qcow2"));
    let mut below = vec![(base.image.clone(), base.data.clone())];
    let missing = DiskOptions { backing_data_files: below.clone(), ..top.options() };
    let message = refused(&top.image, &missing).to_string();
    assert!(message.starts_with(&format!("{}: keeps its data", middle.image.display())), "{message}");
    below.push((middle.image.clone(), middle.data.clone()));
    let mut strange = below.clone();
    strange.push((folder.path().join("other.qcow2"), base.data.clone()));
    let message =
        refused(&top.image, &DiskOptions { backing_data_files: strange, ..top.options() }).to_string();
    assert!(message.contains("no backing file in the chain is called"), "{message}");
    let twice = vec![below[0].clone(), (middle.image.clone(), base.data.clone())];
    let error = refused(&top.image, &DiskOptions { backing_data_files: twice, ..top.options() });
    assert!(
        matches!(error, OpenError::Backing { ref source, .. } if matches!(**source, OpenError::DataFileTwice { .. })),
        "{error}"
    );

    let all = DiskOptions { backing_data_files: below, ..top.options() };
    let expected = qemu.read_all(&top.image, Format::Qcow2).expect("read");
    let before = [&base.data, &middle.data].map(|path| std::fs::read(path).expect("a file"));
    let mut model = ByteModel::with_contents(&expected, 4 * M, 64 * K, DiscardRule::ZeroesClusters);
    let mut rig = Rig::open(&top.image, &all).expect("it opens");
    model.compare_all(&rig.read_all()).expect("the whole chain");
    rig.run(&[write(30 * K, 4 * K, 1), write(2 * M + 512, 512, 2)], &mut model);
    rig.run(&[Operation::Discard { offset: 2 * M + 64 * K, length: 64 * K }], &mut model);
    model.compare_all(&rig.read_all()).expect("contents");
    rig.close();
    assert_clean(&top.image, "the top image");
    model.compare_all(&qemu.read_all(&top.image, Format::Qcow2).expect("read")).expect("by qemu-img");
    assert!([&base.data, &middle.data].map(|path| std::fs::read(path).expect("a file")) == before);
}

#[test]
fn a_short_data_file_becomes_as_long_as_the_disk() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let size = M + 3 * 512;
    for more in ["", ",data_file_raw=on"] {
        let pair = Pair::make(&qemu, folder.path(), "image", more, size, None);
        let file = std::fs::OpenOptions::new().write(true).open(&pair.data).expect("the data file");
        file.set_len(70_000).expect("cut");
        let mut model = ByteModel::new(size, 64 * K, DiscardRule::ZeroesClusters);
        let mut rig = Rig::open(&pair.image, &pair.read_only()).expect("it opens");
        model.compare_all(&rig.read_all()).expect("zeros past its end");
        rig.close();
        assert_eq!(std::fs::metadata(&pair.data).expect("it").len(), 70_000, "nothing is written");
        let mut rig = Rig::open(&pair.image, &pair.options()).expect("it opens");
        rig.run(&[write(M + 512, 1024, 7), write(M / 2, 512, 8)], &mut model);
        model.compare_all(&rig.read_all()).expect("contents");
        rig.close();
        assert_eq!(std::fs::metadata(&pair.data).expect("it").len(), size, "{more}");
        assert_clean(&pair.image, more);
        model.compare_all(&qemu.read_all(&pair.image, Format::Qcow2).expect("read")).expect("by qemu-img");
    }
}

#[test]
fn entries_that_an_external_file_cannot_have_are_corruption() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    for more in ["", ",data_file_raw=on", ",extended_l2=on"] {
        let stride = if more.contains("extended") { 16 } else { 8 };
        for (raw, word_of_it) in [
            (COMPRESSED | 0x5_0000, "compressed"),
            (COPIED | 0x9_0000, "own offset"),
            (0x9_0000, "own offset"),
            (COPIED, "own offset"),
            (COPIED | 0x2_0200, "own offset"),
        ] {
            let pair = Pair::make(&qemu, folder.path(), "image", more, M, None);
            qemu.write(&pair.image, Format::Qcow2, &[pattern(0, M, 1)]).expect("written");
            let l2 = tables(&pair.image).1;
            patch(&pair.image, l2 + 2 * stride, &raw.to_be_bytes());
            let read = |rig: &mut Rig, cluster: u64| {
                rig.try_one(&Operation::Read { offset: cluster * 64 * K, length: 4096 })
            };
            let mut rig = Rig::open(&pair.image, &pair.read_only()).expect("it opens");
            let message = read(&mut rig, 2).expect_err("no data").to_string();
            assert!(message.contains(word_of_it) && message.contains("entry 2"), "{raw:#x}: {message}");
            read(&mut rig, 1).expect("others can be read");
            rig.close();
            let mut rig = Rig::open(&pair.image, &pair.options()).expect("it opens");
            rig.try_one(&write(2 * 64 * K, 512, 1)).expect_err("no write");
            rig.try_one(&write(0, 512, 1)).expect_err("no write any more");
            drop(rig);
            assert_eq!(word(&pair.image, 72) & 2, 2, "{raw:#x}: it is marked corrupt");
        }
    }
}

#[test]
fn an_image_with_snapshots_is_not_written() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let pair = Pair::make(&qemu, folder.path(), "image", "", M, None);
    // No program makes such an image: one with a snapshot, whose header is then changed to name an external data file.
    let image = folder.path().join("snapshots.qcow2");
    qemu.create(&image, &ImageSpec::qcow2(M)).expect("an image");
    let name = image.display().to_string();
    qemu.img(["snapshot", "-c", "one", name.as_str()]).expect("a snapshot");
    patch(&image, 72, &4u64.to_be_bytes());
    let message = refused(&image, &pair.options()).to_string();
    assert!(message.contains("internal snapshots") && message.contains("read-only"), "{message}");
    Rig::open(&image, &pair.read_only()).expect("it can be read").close();
}

#[test]
fn a_raw_view_over_a_backing_file_is_given_up() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let base = folder.path().join("base.qcow2");
    qemu.create(&base, &ImageSpec::qcow2(M).with(pattern(0, M, 1))).expect("an image");
    let pair = Pair::make(&qemu, folder.path(), "image", "", M, Some("base.qcow2"));
    patch(&pair.image, 88, &2u64.to_be_bytes());
    let mut model = ByteModel::with_contents(&vec![1; M as usize], M, 64 * K, DiscardRule::ZeroesClusters);
    let mut rig = Rig::open(&pair.image, &pair.options()).expect("it opens");
    let zeroes = Operation::WriteZeroes { offset: 0, length: 64 * K, unmap: true };
    rig.run(
        &[zeroes, Operation::Discard { offset: 64 * K, length: 64 * K }, write(200 * K, K, 1)],
        &mut model,
    );
    model.compare_all(&rig.read_all()).expect("contents");
    rig.close();
    assert_eq!(word(&pair.image, 88), 0, "the autoclear bit");
    assert_clean(&pair.image, "no raw view");
    model.compare_all(&qemu.read_all(&pair.image, Format::Qcow2).expect("read")).expect("by qemu-img");
}
