//! Damage that is found while an image is in use. Metadata is never overwritten. A write marks the image corrupt where
//! QEMU marks it (qemu-io runs on a copy); a read never does. Nothing else of the file changes, and undamaged data can
//! be read.

use std::path::{Path, PathBuf};
use std::process::Command;

use disk::DiskOptions;
use strata_kit::images::{Content, Format, ImageSpec, find_tool};
use strata_kit::model::{DiscardRule, Operation};
use strata_kit::{ByteModel, Qemu};
use strata_rig::{K, M, Rig, options, patch, pattern, tables, word, write};

const COPIED: u64 = 1 << 63;
/// The offset of the incompatible features, and the bit "corrupt".
const FEATURES: u64 = 72;
const CORRUPT: u64 = 2;

#[test]
fn no_data_is_written_over_metadata_whatever_an_image_says() {
    strata_crash::overlaps::try_all().unwrap_or_else(|wrong| panic!("{wrong}"));
}

/// A kind of damage and the operation that meets it.
struct Damage {
    name: &'static str,
    spec: ImageSpec,
    /// A snapshot is made first.
    snapshot: bool,
    /// Patches the image.
    harm: fn(&Path),
    meets: Operation,
    /// Text that our error must contain.
    says: &'static str,
}

fn plain() -> ImageSpec {
    ImageSpec::qcow2(64 * M).with(pattern(0, 256 * K, 7))
}

fn read(offset: u64) -> Operation {
    Operation::Read { offset, length: 4 * K }
}

/// Sets the entry of the second cluster.
fn entry(image: &Path, raw: u64) {
    let (_, l2, _) = tables(image);
    patch(image, l2 + 8, &raw.to_be_bytes());
}

/// Sets the refcount of the cluster at an offset to zero, in the first refblock.
fn uncount(image: &Path, offset: u64) {
    let (_, _, block) = tables(image);
    patch(image, block + offset / (64 * K) * 2, &[0, 0]);
}

fn damages() -> Vec<Damage> {
    let whole = |name, harm, meets, says| Damage { name, spec: plain(), snapshot: false, harm, meets, says };
    let parts = |name, harm, says| {
        let spec = plain().extended();
        Damage { name, spec, snapshot: false, harm, meets: read(64 * K), says }
    };
    let taken = |name, harm| {
        let says = "holds other metadata";
        Damage { name, spec: plain(), snapshot: true, harm, meets: write(64 * K, 4 * K, 1), says }
    };
    let far = || write(32 * M, 64 * K, 1);
    vec![
        whole(
            "data at no cluster's start, read",
            |image| entry(image, COPIED | 0x5_0200),
            read(64 * K),
            "entry 1",
        ),
        whole(
            "data at no cluster's start, written",
            |image| entry(image, COPIED | 0x5_0200),
            write(64 * K, 4 * K, 1),
            "entry 1",
        ),
        whole(
            "an L2 table at no cluster's start, read",
            |image| patch(image, word(image, 40), &(COPIED | 0x4_0200).to_be_bytes()),
            read(0),
            "L1 table, entry 0",
        ),
        whole(
            "an L2 table at no cluster's start, written",
            |image| patch(image, word(image, 40), &(COPIED | 0x4_0200).to_be_bytes()),
            write(0, 4 * K, 1),
            "L1 table, entry 0",
        ),
        whole(
            "data upon the L1 table",
            |image| entry(image, COPIED | tables(image).0),
            write(64 * K, 4 * K, 1),
            "holds other metadata: L1 table",
        ),
        whole(
            "data upon its L2 table",
            |image| entry(image, COPIED | tables(image).1),
            write(64 * K, 4 * K, 1),
            "holds other metadata: L2 table",
        ),
        whole(
            "data upon the refblock",
            |image| entry(image, COPIED | tables(image).2),
            write(64 * K, 4 * K, 1),
            "holds other metadata: refcount block",
        ),
        whole(
            "data upon the refcount table",
            |image| entry(image, COPIED | word(image, 48)),
            write(64 * K, 4 * K, 1),
            "holds other metadata: refcount table",
        ),
        taken("data upon the snapshot table", |image| entry(image, COPIED | word(image, 64))),
        taken("data upon a snapshot's L1 table", |image| {
            // The first field of the first entry.
            entry(image, COPIED | word(image, word(image, 64)));
        }),
        whole("the header counts as free", |image| uncount(image, 0), far(), "holds metadata: header"),
        whole(
            "the L1 table counts as free",
            |image| uncount(image, tables(image).0),
            far(),
            "holds metadata: L1 table",
        ),
        whole(
            "the L2 table counts as free",
            |image| uncount(image, tables(image).1),
            far(),
            "holds metadata: L2 table",
        ),
        whole(
            "the refblock counts as free",
            |image| uncount(image, tables(image).2),
            far(),
            "holds metadata: refcount block",
        ),
        parts(
            "a subcluster that is data and zero",
            |image| patch(image, tables(image).1 + 24, &(1u64 << 32 | 1).to_be_bytes()),
            "both allocated and zero",
        ),
        parts(
            "subclusters without a host cluster",
            |image| patch(image, tables(image).1 + 16, &[0; 8]),
            "no host cluster",
        ),
        Damage {
            name: "a zero flag in version 2",
            spec: plain().version(2),
            snapshot: false,
            harm: |image| entry(image, COPIED | tables(image).1 | 1),
            meets: read(64 * K),
            says: "version 2",
        },
    ]
}

/// Runs the operation with qemu-io, and returns its output.
fn by_qemu(image: &Path, operation: &Operation) -> String {
    let text = match *operation {
        Operation::Read { offset, length } => format!("read {offset} {length}"),
        Operation::Write { offset, length, .. } => format!("write {offset} {length}"),
        _ => panic!("reads and writes only"),
    };
    let mut command = Command::new(find_tool("qemu-io").expect("found before"));
    let output = command.args(["-f", "qcow2", "-c", &text]).arg(image).output().expect("qemu-io runs");
    String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
}

fn is_marked(image: &Path, version: u8) -> bool {
    version == 3 && word(image, FEATURES) & CORRUPT != 0
}

#[test]
fn damage_that_a_write_meets_marks_the_image_as_qemu_marks_it_and_a_read_never() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    for Damage { name, spec, snapshot, harm, meets, says } in damages() {
        let image = folder.path().join("ours.qcow2");
        let theirs: PathBuf = folder.path().join("theirs.qcow2");
        qemu.create(&image, &spec).expect("an image");
        if snapshot {
            let text = image.display().to_string();
            qemu.img(["snapshot", "-c", "kept", &text]).expect("a snapshot");
            // The active disk gets its own tables and data again.
            qemu.write(&image, Format::Qcow2, &[pattern(0, 256 * K, 7)]).expect("written");
        }
        let whole = qemu.read_all(&image, Format::Qcow2).expect("read");
        harm(&image);
        std::fs::copy(&image, &theirs).expect("a copy");
        let before = std::fs::read(&image).expect("the image");
        let said = by_qemu(&theirs, &meets);
        let marked = is_marked(&theirs, spec.version);
        assert!(said.contains("failed") || said.contains("error"), "{name}: QEMU says {said}");

        assert!(marked || spec.version == 2, "{name}: QEMU says {said}");
        let mut rig = Rig::open(&image, &options()).unwrap_or_else(|error| panic!("{name}: {error}"));
        let message = rig.try_one(&meets).expect_err(name).to_string();
        assert!(message.contains(says), "{name}: {message}");
        // If a table for reading the first cluster is damaged, nothing can be read.
        let has_rest = !name.starts_with("an L2 table at");
        let mut model = ByteModel::with_contents(&whole, 64 * M, 64 * K, DiscardRule::Nothing);
        if has_rest {
            rig.run(&[read(0), read(192 * K)], &mut model);
        }
        if matches!(meets, Operation::Read { .. }) {
            // QEMU disables the disk. Here only the read has failed.
            rig.run(&[Operation::Flush], &mut model);
            if has_rest {
                rig.run(&[write(128 * K, 4 * K, 9), Operation::Flush, read(128 * K)], &mut model);
            }
            rig.close();
            assert!(!is_marked(&image, spec.version), "{name}: a read has marked the image");
            continue;
        }
        let refused = rig.try_one(&write(128 * K, 4 * K, 9)).expect_err("nothing is written any more");
        assert!(refused.to_string().contains("refuses writes"), "{name}: {refused}");
        drop(rig);
        assert_eq!(is_marked(&image, spec.version), marked, "{name}: marked corrupt; QEMU says {said}");
        let mut after = std::fs::read(&image).expect("the image");
        after.truncate(before.len());
        let features = FEATURES as usize..FEATURES as usize + 8;
        if spec.version == 3 {
            after[features.clone()].copy_from_slice(&before[features]);
        }
        let differs = before.iter().zip(&after).position(|(a, b)| a != b);
        assert_eq!(differs, None, "{name}: the file has changed");
        if marked {
            let message = Rig::open(&image, &options()).err().expect("refused for writing").to_string();
            assert!(message.contains("corrupt"), "{name}: {message}");
            Rig::open(&image, &DiskOptions { read_only: true, ..options() }).expect("reading").close();
        }
    }
}

#[test]
fn a_refblock_at_no_clusters_start_is_refused_before_anything_is_written() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let image = folder.path().join("refblock.qcow2");
    qemu.create(&image, &plain()).expect("an image");
    patch(&image, word(&image, 48), &(tables(&image).2 | 0x200).to_be_bytes());
    let before = std::fs::read(&image).expect("the image");
    let message = Rig::open(&image, &options()).err().expect("refused").to_string();
    assert!(message.contains("refcount table, entry 0"), "{message}");
    assert!(std::fs::read(&image).expect("the image") == before);
    Rig::open(&image, &DiskOptions { read_only: true, ..options() }).expect("reading").close();
}

#[test]
fn a_cluster_that_two_entries_name_does_not_become_metadata_when_one_frees_it() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let image = folder.path().join("twice.qcow2");
    let content = Content::Pattern { offset: 0, length: 8 * K, byte: 7 };
    qemu.create(&image, &ImageSpec::qcow2(64 * M).cluster_size(4 * K).with(content)).expect("an image");
    entry(&image, word(&image, tables(&image).1));
    let mut rig = Rig::open(&image, &options()).expect("opens");
    // Both are in the map now, for writes in place.
    rig.try_one(&Operation::Read { offset: 0, length: 8 * K }).expect("a read");
    rig.try_one(&Operation::Discard { offset: 0, length: 4 * K }).expect("a discard");
    rig.try_one(&Operation::Flush).expect("a flush");
    let mut turns = 0;
    while rig.disk().status().quarantined_clusters > 0 {
        turns += 1;
        assert!(turns < 100_000_000, "reclaim hangs: {:?}", rig.disk().status());
        std::thread::yield_now();
    }
    // These need an L2 table and clusters. The free cluster gets data.
    let far = [write(8 * M, 4 * K, 1), write(8 * M + 4 * K, 4 * K, 2)];
    let mut model = ByteModel::new(64 * M, 4 * K, DiscardRule::ZeroesClusters);
    rig.run(&far, &mut model);
    rig.run(&[Operation::Flush], &mut model);
    rig.try_one(&write(4 * K, 4 * K, 3)).expect("in place, through the second entry");
    rig.run(&[Operation::Flush], &mut model);
    rig.close();
    let mut rig = Rig::open(&image, &DiskOptions { read_only: true, ..options() }).expect("opens");
    rig.run(&[Operation::Read { offset: 8 * M + 4 * K, length: 4 * K }], &mut model);
    rig.close();
}
