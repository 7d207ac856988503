//! The features and extensions of a header, in-process: a writable open retains, clears or refuses them.

use std::path::Path;

use disk::DiskOptions;
use qcow2::feature::COMPATIBLE_LAZY_REFCOUNTS;
use qcow2::{Extension, Header, Incompatible, extension};
use strata_kit::images::Format;
use strata_kit::model::{DiscardRule, Operation};
use strata_kit::{ByteModel, Qemu};
use strata_rig::agree::assert_clean;
use strata_rig::{K, M, Rig, options, patch, write};

/// Large enough for the refcount table to grow, with clusters of 512 bytes.
const SIZE: u64 = 20 * M;

fn header(path: &Path) -> Header {
    let file = std::fs::read(path).expect("the image");
    Header::parse(&file, file.len() as u64).expect("a header")
}

/// Changes a header as another program would.
fn change(path: &Path, change: impl FnOnce(&mut Header)) {
    let mut header = header(path);
    change(&mut header);
    let mut bytes = header.encode().expect("a right header");
    // No bytes of a longer old header may remain.
    bytes.resize(512, 0);
    patch(path, 0, &bytes);
}

/// A feature name table with one entry.
fn feature_name(kind: u8, bit: u8, name: &str) -> Extension {
    let mut data = vec![kind, bit];
    data.extend(name.as_bytes());
    data.resize(48, 0);
    Extension { magic: extension::FEATURE_NAMES, data }
}

#[test]
fn unknown_header_fields_outlive_every_change() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let image = folder.path().join("disk.qcow2");
    let text = image.display().to_string();
    let spec = "cluster_size=512,lazy_refcounts=on";
    qemu.img(["create", "-q", "-f", "qcow2", "-o", spec, &text, &SIZE.to_string()]).expect("an image");
    let unknown = Extension { magic: 0x1234_5678, data: (0..13).collect() };
    change(&image, |header| {
        header.compatible |= 1 << 5;
        header.autoclear = 1 << 40;
        header.extensions = vec![unknown.clone(), feature_name(1, 5, "quick"), unknown];
    });
    let before = header(&image);
    let bytes = std::fs::read(&image).expect("the image");
    let mut model = ByteModel::new(SIZE, 512, DiscardRule::ZeroesClusters);
    let mut rig = Rig::open(&image, &options()).expect("opens");
    let mut operations: Vec<_> =
        (0..SIZE / (256 * K)).map(|n| write(n * 256 * K, 256 * K, n as u32)).collect();
    operations.push(Operation::Flush);
    rig.run(&operations, &mut model);
    assert_eq!(header(&image).incompatible, Incompatible(0), "refcounts are exact: nothing is dirty");
    rig.close();
    let after = header(&image);
    assert_ne!(after.refcount_table_offset, before.refcount_table_offset, "the refcount table has grown");
    assert_eq!(after.compatible, COMPATIBLE_LAZY_REFCOUNTS | 1 << 5);
    let expected = Header {
        autoclear: 0,
        refcount_table_offset: after.refcount_table_offset,
        refcount_table_clusters: after.refcount_table_clusters,
        ..before
    };
    assert_eq!(after, expected);
    // From the compatible features on, only the autoclear features have changed. They are in these eight bytes.
    let now = std::fs::read(&image).expect("the image");
    assert!(now[80..88] == bytes[80..88] && now[96..512] == bytes[96..512], "byte for byte");
    assert_clean(&image, "the closed image");
    model.compare_all(&qemu.read_all(&image, Format::Qcow2).expect("read")).expect("contents");
}

#[test]
fn an_unknown_incompatible_feature_is_refused_by_the_name_that_the_image_has_for_it() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let image = folder.path().join("disk.qcow2");
    let text = image.display().to_string();
    qemu.img(["create", "-q", "-f", "qcow2", &text, "1M"]).expect("an image");
    change(&image, |header| {
        header.incompatible = header.incompatible.with(Incompatible(1 << 40));
        header.extensions = vec![feature_name(2, 40, "wrong field"), feature_name(0, 40, "fast\x1b thing")];
    });
    let before = std::fs::read(&image).expect("the image");
    for read_only in [false, true] {
        let opened = Rig::open(&image, &DiskOptions { read_only, ..options() });
        let message = opened.err().expect("refused").to_string();
        assert!(message.contains("bit 40 (fast\\u{1b} thing)"), "{message}");
    }
    assert!(std::fs::read(&image).expect("the image") == before, "what is refused is not written to");
}

#[test]
fn a_corrupt_image_is_only_read_until_it_is_repaired() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let image = folder.path().join("disk.qcow2");
    let text = image.display().to_string();
    qemu.img(["create", "-q", "-f", "qcow2", &text, "1M"]).expect("an image");
    change(&image, |header| header.incompatible = Incompatible::CORRUPT);
    Rig::open(&image, &DiskOptions { read_only: true, ..options() }).expect("reading").close();
    let message = Rig::open(&image, &options()).err().expect("refused").to_string();
    assert!(message.contains("strata check -r all") && message.contains("read-only"), "{message}");
    disk::check::repair(&storage::host::HostStorage::new(), &image, disk::check::RepairKind::All, &options())
        .expect("repaired");
    Rig::open(&image, &options()).expect("the advice is good").close();
}
