//! Images with persistent bitmaps, in-process: a writable open marks them, and nothing else ever changes them.

use std::path::{Path, PathBuf};

use disk::DiskOptions;
use disk::check::Verdict;
use qcow2::{Bitmap, BitmapDirectory, Header, bitmap_table_entry};
use serde_json::{Value, json};
use strata_kit::images::{Format, ImageSpec};
use strata_kit::model::{DiscardRule, Operation};
use strata_kit::{ByteModel, Qemu};
use strata_rig::agree::{assert_clean, check_agrees};
use strata_rig::{K, M, Rig, options, patch, pattern, tables, word, write};

/// The size of the disks, in bytes.
const SIZE: u64 = 64 * M;
/// The offset of the autoclear features in the header.
const AUTOCLEAR: u64 = 88;

/// An image with one bitmap that is kept up to date, and one that no longer is. Both have bits set.
fn image(qemu: &Qemu, folder: &Path) -> PathBuf {
    let path = folder.join("disk.qcow2");
    let text = path.display().to_string();
    qemu.create(&path, &ImageSpec::qcow2(SIZE).with(pattern(0, 2 * M, 7))).expect("an image");
    for name in ["kept", "old"] {
        qemu.img(["bitmap", "--add", "-g", "4096", &text, name]).expect("a bitmap");
    }
    qemu.write(&path, Format::Qcow2, &[pattern(M, 3 * M, 8)]).expect("written");
    qemu.img(["bitmap", "--disable", &text, "old"]).expect("disabled");
    path
}

/// The bitmaps of an image and the offsets of their clusters, read from its bytes.
fn bitmaps(path: &Path) -> (Vec<Bitmap>, Vec<u64>) {
    let file = std::fs::read(path).expect("the image");
    let header = Header::parse(&file, file.len() as u64).expect("a header");
    let (geometry, bitmaps) = (header.geometry(), header.bitmaps().expect("bitmaps"));
    let mut directory = BitmapDirectory::new(&bitmaps, geometry, file.len() as u64);
    let mut list = Vec::new();
    while let Some(qcow2::HostRange { offset: at, length }) = directory.next_piece() {
        directory.feed(&file[at.0 as usize..(at.0 + length) as usize], |bitmap| list.push(bitmap));
    }
    assert!(!directory.is_broken());
    let entries = list.iter().flat_map(|bitmap| {
        (0..u64::from(bitmap.table_entries)).map(|n| word(path, bitmap.table_offset.0 + n * 8))
    });
    let data = entries.filter_map(|raw| bitmap_table_entry(raw, &geometry).expect("an entry"));
    let data = data.map(|cluster| cluster.0).collect();
    (list, data)
}

/// QEMU's information about the bitmaps.
fn told(qemu: &Qemu, path: &Path) -> Value {
    let info = qemu.info(path, Format::Qcow2).expect("info");
    let mut found = info["format-specific"]["data"]["bitmaps"].clone();
    if let Some(list) = found.as_array_mut() {
        list.sort_by_key(|bitmap| bitmap["name"].to_string());
    }
    found
}

/// Bytes of the clusters at these offsets, up to the end of the file.
fn clusters(path: &Path, places: &[u64]) -> Vec<Vec<u8>> {
    let file = std::fs::read(path).expect("the image");
    places.iter().map(|at| file[*at as usize..file.len().min((*at + 64 * K) as usize)].to_vec()).collect()
}

#[test]
fn writes_make_no_bitmap_lie() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let image = image(&qemu, folder.path());
    let text = image.display().to_string();
    let flags = |kept: Value| {
        json!([{ "name": "kept", "granularity": 4096, "flags": kept },
               { "name": "old", "granularity": 4096, "flags": [] }])
    };
    assert_eq!(told(&qemu, &image), flags(json!(["auto"])));
    // Also sets an unknown autoclear bit.
    patch(&image, AUTOCLEAR, &(1u64 << 40 | 1).to_be_bytes());
    let before = std::fs::read(&image).expect("image");
    Rig::open(&image, &DiskOptions { read_only: true, ..options() }).expect("opens").close();
    assert!(std::fs::read(&image).expect("image") == before, "reading changes nothing");

    let (_, places) = bitmaps(&image);
    assert_eq!(places.len(), 2, "both bitmaps have a cluster");
    let kept = clusters(&image, &places);
    let contents = qemu.read_all(&image, Format::Qcow2).expect("read");
    let mut model = ByteModel::with_contents(&contents, SIZE, 64 * K, DiscardRule::ZeroesClusters);
    let mut rig = Rig::open(&image, &options()).expect("opens");
    assert_eq!(word(&image, AUTOCLEAR), 1, "the bitmaps are still there, and nothing else");
    assert_eq!(bitmaps(&image).0.iter().map(Bitmap::is_in_use).collect::<Vec<_>>(), [true, false]);
    // Frees many clusters, and then allocates all free clusters and more.
    let mut operations = vec![Operation::Discard { offset: 512 * K, length: 3 * M }, Operation::Flush];
    operations.extend((0..40).map(|n| write(n * M + 4 * K, 900 * K, n as u32)));
    rig.run(&operations, &mut model);
    rig.close();
    assert_clean(&image, "the closed image");
    model.compare_all(&qemu.read_all(&image, Format::Qcow2).expect("read")).expect("contents");
    assert!(clusters(&image, &places) == kept, "what bitmaps hold is nobody's to change");

    // To QEMU one bitmap is inconsistent, and the other is unchanged.
    assert_eq!(told(&qemu, &image), flags(json!(["in-use", "auto"])));
    let copy = folder.path().join("copy.qcow2").display().to_string();
    let convert = ["convert", "-O", "qcow2", "--bitmaps"];
    qemu.img(convert.into_iter().chain([text.as_str(), &copy])).expect_err("one is inconsistent");
    let skip = ["--skip-broken-bitmaps", text.as_str(), &copy];
    qemu.img(convert.into_iter().chain(skip)).expect("the other is copied");
    let copied = told(&qemu, Path::new(&copy));
    assert_eq!((copied.as_array().map(Vec::len), &copied[0]["name"]), (Some(1), &json!("old")));
    qemu.img(["bitmap", "--remove", &text, "kept"]).expect("removed");
    assert_clean(&image, "the closed image");

    // Without a bitmap to keep up to date, an open changes only the length of the file.
    let before = std::fs::read(&image).expect("image");
    Rig::open(&image, &options()).expect("opens").close();
    let after = std::fs::read(&image).expect("image");
    assert!(after[..before.len()] == before[..], "nothing to mark");
}

#[test]
fn an_entry_that_names_a_bitmap_is_not_written_through() {
    let Some(qemu) = Qemu::find() else { return };
    for (index, what) in ["directory", "table", "cluster"].into_iter().enumerate() {
        let folder = tempfile::tempdir().expect("a folder");
        let image = image(&qemu, folder.path());
        let (list, places) = bitmaps(&image);
        let target = [directory_of(&image), list[0].table_offset.0, places[1]][index];
        let (_, l2, _) = tables(&image);
        patch(&image, l2 + 8, &(target | 1 << 63).to_be_bytes());
        let mut rig = Rig::open(&image, &options()).expect("opens");
        let before = clusters(&image, &[target]);
        rig.try_one(&Operation::Read { offset: 0, length: 512 }).expect("a read");
        let message = rig.try_one(&write(64 * K, 4 * K, 1)).expect_err(what).to_string();
        assert!(message.contains("holds other metadata"), "{message}");
        drop(rig);
        assert!(clusters(&image, &[target]) == before, "the {what} is as it was");
        assert_eq!(word(&image, 72) & 2, 2, "marked corrupt");
    }
}

#[test]
fn a_bitmap_that_counts_as_free_is_not_handed_out() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let image = image(&qemu, folder.path());
    let (_, places) = bitmaps(&image);
    let (_, _, block) = tables(&image);
    patch(&image, block + places[0] / (64 * K) * 2, &[0, 0]);
    let before = clusters(&image, &places);
    let mut rig = Rig::open(&image, &options()).expect("opens");
    // Each reservation searches some more clusters.
    let failure = (0..512).find_map(|n| rig.try_one(&write(32 * M + n * 64 * K, 64 * K, 3)).err());
    let message = failure.expect("found").to_string();
    assert!(message.contains("refcount is zero"), "{message}");
    drop(rig);
    assert!(clusters(&image, &places) == before, "the bitmaps are as they were");
}

#[test]
fn bitmaps_upon_other_metadata_are_refused_for_writing() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let image = image(&qemu, folder.path());
    let (list, _) = bitmaps(&image);
    let (_, l2, _) = tables(&image);
    patch(&image, list[0].table_offset.0, &l2.to_be_bytes());
    let before = std::fs::read(&image).expect("image");
    let error = Rig::open(&image, &options()).err().expect("refused").to_string();
    assert!(error.contains("bitmaps"), "{error}");
    assert!(std::fs::read(&image).expect("image") == before, "what is refused is not written to");
    Rig::open(&image, &DiskOptions { read_only: true, ..options() }).expect("reading").close();
}

#[test]
fn damaged_bitmaps_are_given_up_and_the_disk_is_served() {
    let Some(qemu) = Qemu::find() else { return };
    type Damage = fn(&Path);
    let damages: [(&str, Damage); 4] = [
        ("granularity", |image| patch(image, directory_of(image) + 17, &[99])),
        ("table past the end", |image| patch(image, directory_of(image), &(1u64 << 40).to_be_bytes())),
        ("reserved bit in a table", |image| {
            let table = bitmaps(image).0[0].table_offset.0;
            patch(image, table, &[0x80]);
        }),
        ("cluster past the end", |image| {
            let table = bitmaps(image).0[0].table_offset.0;
            patch(image, table, &(1u64 << 40).to_be_bytes());
        }),
    ];
    for (what, damage) in damages {
        let folder = tempfile::tempdir().expect("a folder");
        let image = image(&qemu, folder.path());
        let contents = qemu.read_all(&image, Format::Qcow2).expect("read");
        let mut model = ByteModel::with_contents(&contents, SIZE, 64 * K, DiscardRule::ZeroesClusters);
        damage(&image);
        let mut rig = Rig::open(&image, &options()).unwrap_or_else(|error| panic!("{what}: {error}"));
        assert_eq!(word(&image, AUTOCLEAR), 0, "{what}: nobody takes them for right");
        rig.run(&[write(20 * M, 900 * K, 1), Operation::Flush], &mut model);
        rig.close();
        assert!(told(&qemu, &image).is_null(), "{what}");
        model.compare_all(&qemu.read_all(&image, Format::Qcow2).expect("read")).expect("contents");
        let report = check_agrees(&image, what).expect("a header");
        assert_eq!(report.verdict(), Verdict::Leaks, "{what}");
    }
}

fn directory_of(image: &Path) -> u64 {
    let file = std::fs::read(image).expect("the image");
    let header = Header::parse(&file, file.len() as u64).expect("a header");
    header.bitmaps().expect("bitmaps").directory_offset.0
}
