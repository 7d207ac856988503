//! Compares the checker and the repair with `qemu-img check`. The images come from QEMU's tools; some then get one
//! fault each, and some get random flipped bits.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use disk::check::{NotRepairable, RepairKind, Repaired, Report, Verdict};
use disk::{DiskOptions, OpenError};
use qcow2::Header;
use storage::host::HostStorage;
use strata_kit::Qemu;
use strata_kit::images::{Content, Format, ImageSpec, Preallocation, find_tool, memory_folder};
use strata_kit::random::Random;
use strata_rig::agree::{assert_clean, check_agrees, is_exception, our_opinion, second_opinion};
use strata_rig::damage::{
    BITMAPS, Damage, EXTENSIONS, FILE, HEADER, LENGTHS, MAPPING, PACKED, REFCOUNTS, Raw, SNAPSHOTS,
};
use strata_rig::victims;

const K: u64 = 1024;
const M: u64 = 1024 * K;

fn options() -> DiskOptions {
    DiskOptions { lock_timeout: Duration::from_secs(5), ..DiskOptions::default() }
}

fn repair(image: &Path, kind: RepairKind) -> Result<Repaired, OpenError> {
    disk::check::repair(&HostStorage::new(), image, kind, &options())
}

fn pattern(offset: u64, length: u64, byte: u8) -> Content {
    Content::Pattern { offset, length, byte }
}

/// An image with every kind of L2 entry, over several L2 tables where they are small.
fn filled(size: u64, cluster_size: u64) -> ImageSpec {
    let spec = ImageSpec::qcow2(size).cluster_size(cluster_size);
    spec.with(pattern(0, 8 * cluster_size.max(4 * K), 1))
        .with(pattern(size / 2, 3 * cluster_size + 512, 2))
        .with(Content::Zeroes { offset: cluster_size, length: cluster_size, unmap: false })
        .with(Content::Zeroes { offset: 5 * cluster_size, length: cluster_size, unmap: true })
        .with(Content::Discard { offset: 2 * cluster_size, length: cluster_size })
        .with(pattern(size - 512, 512, 3))
}

/// Adds subclusters of every kind.
fn subclusters(spec: ImageSpec) -> ImageSpec {
    let part = spec.cluster_size / 32;
    let base = 12 * spec.cluster_size;
    let zeroes = |offset, length, unmap| Content::Zeroes { offset, length, unmap };
    spec.extended()
        .with(pattern(base + part, 3 * part, 4))
        .with(zeroes(base + 3 * part, 4 * part, false))
        .with(zeroes(base + 64 * part, part, true))
        .with(zeroes(0, 2 * part, false))
        .with(zeroes(6 * 32 * part, 32 * part, false))
        .with(pattern(6 * 32 * part + 31 * part, part, 5))
}

fn with_refcount_bits(mut spec: ImageSpec, bits: u8) -> ImageSpec {
    spec.refcount_bits = bits;
    spec
}

#[test]
fn it_agrees_on_sound_images() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = memory_folder().expect("a folder");
    let mut specs: Vec<(String, ImageSpec)> = Vec::new();
    for bits in 9..=21 {
        let cluster_size = 1 << bits;
        let size = (24 * cluster_size).max(4 * M) + 3 * 512;
        for version in [2, 3] {
            specs.push((format!("v{version}, {bits} bits"), filled(size, cluster_size).version(version)));
        }
    }
    for width in [1, 2, 4, 8, 16, 32, 64] {
        for cluster_size in [512, 4 * K, 64 * K] {
            let name = format!("refcounts of {width} bits, clusters of {cluster_size}");
            specs.push((name, with_refcount_bits(filled(4 * M, cluster_size), width)));
        }
    }
    for how in [Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full] {
        for cluster_size in [512, 64 * K, 2 * M] {
            let spec = ImageSpec::qcow2(6 * M).cluster_size(cluster_size).preallocation(how);
            specs.push((format!("{how:?}, clusters of {cluster_size}"), spec));
        }
    }
    for bits in 14..=21 {
        let cluster_size = 1 << bits;
        let spec = subclusters(filled((24 * cluster_size).max(4 * M), cluster_size));
        specs.push((format!("subclusters, {bits} bits"), spec));
    }
    let compressed = Content::Compressed { offset: M, length: M, byte: 9 };
    specs.push(("compressed, subclusters".into(), filled(4 * M, 64 * K).extended().with(compressed)));
    specs.push(("compressed".into(), filled(4 * M, 64 * K).with(compressed).with(pattern(M, 100, 1))));
    specs.push(("compressed by zstd".into(), filled(4 * M, 4 * K).zstd().with(compressed)));
    specs.push(("compressed, zstd".into(), filled(4 * M, 64 * K).zstd().with(compressed)));
    specs.push(("empty".into(), ImageSpec::qcow2(0)));
    specs.push(("a large empty disk".into(), ImageSpec::qcow2(1 << 46).cluster_size(2 * M)));
    for (name, spec) in specs {
        let image = folder.path().join("image.qcow2");
        qemu.create(&image, &spec).expect("an image");
        assert_clean(&image, &name);
        std::fs::remove_file(&image).expect("gone");
    }
}

#[test]
fn it_agrees_on_chains() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = memory_folder().expect("a folder");
    let over =
        |cluster: u64| ImageSpec::qcow2(6 * M).cluster_size(cluster).backing(PathBuf::new(), Format::Qcow2);
    let specs =
        [filled(6 * M, 64 * K), over(4 * K).with(pattern(M, M, 5)), over(512).with(pattern(M, 3 * K, 6))];
    for image in qemu.create_chain(folder.path(), &specs).expect("a chain") {
        assert_clean(&image, "a layer");
    }
}

/// Makes an image with two snapshots, one of which is older than half of the data.
fn snapshots(qemu: &Qemu, image: &Path, spec: &ImageSpec) {
    qemu.create(image, spec).expect("an image");
    let take = |name: &str| qemu.img(["snapshot".as_ref(), "-c".as_ref(), name.as_ref(), image.as_os_str()]);
    take("first").expect("a snapshot");
    qemu.write(image, Format::Qcow2, &[pattern(0, 64 * K, 7), pattern(3 * M, 200 * K, 8)]).expect("written");
    take("second, with a longer name").expect("a snapshot");
    let length = spec.cluster_size.max(8 * K);
    qemu.write(image, Format::Qcow2, &[pattern(64 * K, length, 9)]).expect("written");
}

#[test]
fn it_agrees_on_internal_snapshots() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = memory_folder().expect("a folder");
    for (cluster_size, version) in [(512, 3), (4 * K, 2), (64 * K, 3), (2 * M, 3)] {
        let image = folder.path().join(format!("{cluster_size}.qcow2"));
        snapshots(&qemu, &image, &filled(60 * M, cluster_size).version(version));
        let report = check_agrees(&image, "two snapshots").expect("a sound header");
        assert_eq!(report.verdict(), Verdict::Clean, "clusters of {cluster_size}");
        qemu.img(["snapshot".as_ref(), "-d".as_ref(), "first".as_ref(), image.as_os_str()]).expect("deleted");
        assert_eq!(check_agrees(&image, "one snapshot").expect("a sound header").verdict(), Verdict::Clean);
    }
}

/// The images to be damaged: names and bytes.
fn victims(qemu: &Qemu, folder: &Path) -> Vec<(String, Vec<u8>)> {
    let mut victims = Vec::new();
    let specs = [
        ("v3, 64 KiB", filled(8 * M, 64 * K)),
        ("v2, 4 KiB", filled(8 * M, 4 * K).version(2)),
        ("v3, 512 B, 8-bit refcounts", with_refcount_bits(filled(M, 512), 8)),
        ("v3, 64 KiB, 1-bit refcounts", with_refcount_bits(filled(8 * M, 64 * K), 1)),
        ("v3, 4 KiB, 64-bit refcounts", with_refcount_bits(filled(4 * M, 4 * K), 64)),
        ("subclusters of 2 KiB", subclusters(filled(8 * M, 64 * K))),
    ];
    for (name, spec) in specs {
        let image = folder.join("victim.qcow2");
        qemu.create(&image, &spec).expect("an image");
        victims.push((name.to_owned(), std::fs::read(&image).expect("read")));
        std::fs::remove_file(&image).expect("gone");
    }
    victims
}

/// Checks a damaged image, repairs it if possible, and checks the result. Returns the verdict, and whether it was
/// repaired.
fn suffer(qemu: &Qemu, image: &Path, what: &str) -> (Option<Verdict>, bool) {
    let Some(report) = check_agrees(image, what) else { return (None, false) };
    let before = std::fs::read(image).expect("read");
    let contents = qemu.read_all(image, Format::Qcow2).ok();
    if report.verdict() == Verdict::Leaks {
        let repaired = repair(image, RepairKind::Leaks).unwrap_or_else(|error| panic!("{what}: {error}"));
        assert_eq!(
            (repaired.found.verdict(), repaired.left.verdict()),
            (Verdict::Leaks, Verdict::Clean),
            "{what}"
        );
        assert_eq!(check_agrees(image, what).map(|report| report.verdict()), Some(Verdict::Clean), "{what}");
        assert_eq!(qemu.read_all(image, Format::Qcow2).ok(), contents, "{what}");
        std::fs::write(image, &before).expect("as before");
    }
    // A repair succeeds exactly if the report advises it.
    let refusal = report.refusal(RepairKind::All);
    let repaired = match repair(image, RepairKind::All) {
        Err(OpenError::NotRepairable { source: source @ NotRepairable::SnapshotsLost, .. }) => {
            assert_eq!(refusal, Some(source), "{what}");
            assert_eq!(std::fs::read(image).expect("read"), before, "{what}: not repaired, but written");
            repair(image, RepairKind::AllDroppingSnapshots)
        }
        Err(OpenError::NotRepairable { path, source, found }) => {
            assert_eq!(refusal, Some(source), "{what}");
            Err(OpenError::NotRepairable { path, source, found })
        }
        other => {
            assert_eq!(refusal, None, "{what}");
            other
        }
    };
    match repaired {
        Ok(repaired) => {
            assert_eq!(repaired.found, report, "{what}");
            assert_eq!(repaired.left.verdict(), Verdict::Clean, "{what}: {:#?}", repaired.left);
            let theirs = second_opinion(image);
            assert_eq!(theirs.verdict, Some(Verdict::Clean), "{what}: {}", theirs.text);
            // Data that could be read before the repair reads the same after it.
            if let Some(before) = contents {
                let after = qemu.read_all(image, Format::Qcow2);
                let after = after.unwrap_or_else(|error| panic!("{what}: {error}"));
                assert!(before == after, "{what}: the contents differ");
            }
            (Some(report.verdict()), true)
        }
        Err(OpenError::NotRepairable { .. }) => {
            assert_eq!(std::fs::read(image).expect("read"), before, "{what}: not repaired, but written");
            (Some(report.verdict()), false)
        }
        Err(error) => panic!("{what}: {error}"),
    }
}

/// Does each damage to a fresh copy of an image. Returns how many were done, and how many of them could be repaired.
fn damage_all(qemu: &Qemu, folder: &Path, name: &str, bytes: &[u8], damages: &[Damage]) -> (u32, u32) {
    let (mut done, mut mended) = (0, 0);
    let sound = Raw::new(bytes.to_vec());
    for (damage, run) in damages {
        let mut raw = sound.clone();
        if !run(&mut raw) {
            continue;
        }
        let image = folder.join("damaged.qcow2");
        std::fs::write(&image, &raw.bytes).expect("written");
        let (_, repaired) = suffer(qemu, &image, &format!("{name}: {damage}"));
        done += 1;
        mended += u32::from(repaired);
        std::fs::remove_file(&image).expect("gone");
    }
    (done, mended)
}

fn damage_victims(damages: &[Damage], done_min: u32, mended_min: u32) {
    let Some(qemu) = Qemu::find() else { return };
    let folder = memory_folder().expect("a folder");
    let (mut done, mut mended) = (0, 0);
    for (name, bytes) in victims(&qemu, folder.path()) {
        let (more, repaired) = damage_all(&qemu, folder.path(), &name, &bytes, damages);
        done += more;
        mended += repaired;
    }
    assert!(done >= done_min && mended >= mended_min, "{done} damages done, {mended} mended");
}

#[test]
fn it_agrees_on_damaged_mappings() {
    damage_victims(MAPPING, 140, 15);
}

#[test]
fn it_agrees_on_damaged_refcounts_and_mends_them() {
    damage_victims(REFCOUNTS, 110, 110);
}

#[test]
fn it_agrees_on_damaged_headers_and_lengths() {
    damage_victims(FILE, 45, 20);
}

/// Headers that one of the two checkers refuses, and the other checks and finds sound. tests/cases/damage/table.txt has the
/// reasons.
const TAKEN_BY_ONE: &[&str] = &[
    "a header of 108 bytes",
    "a raw external data file, by its autoclear bit alone",
    "an end mark with a length",
];

#[test]
fn it_agrees_on_fields_of_the_header_and_on_streams() {
    let Some(_) = Qemu::find() else { return };
    let folder = memory_folder().expect("a folder");
    let image = folder.path().join("damaged.qcow2");
    let sound = Raw::new(victims::plain().bytes);
    let mut done = 0;
    for (damage, run) in [HEADER, EXTENSIONS, LENGTHS, PACKED].concat() {
        let mut raw = sound.clone();
        if !run(&mut raw) {
            continue;
        }
        std::fs::write(&image, &raw.bytes).expect("written");
        done += 1;
        let ours = our_opinion(&image);
        if ours.is_ok() && !TAKEN_BY_ONE.contains(&damage) {
            drop(check_agrees(&image, damage));
            continue;
        }
        // A refused image may or may not be called corrupt; the difference does not matter here.
        let theirs = second_opinion(&image);
        let found_sound = |verdict| matches!(verdict, Some(Verdict::Clean | Verdict::Leaks));
        let split = found_sound(ours.as_ref().ok().map(Report::verdict)) || found_sound(theirs.verdict);
        assert_eq!(split, TAKEN_BY_ONE.contains(&damage), "{damage}: {ours:#?}\n{}", theirs.text);
    }
    assert!(done >= 110, "{done} damages done");
}

#[test]
fn it_agrees_on_damaged_snapshots() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = memory_folder().expect("a folder");
    let mut done = 0;
    for (cluster_size, version) in [(4 * K, 2), (64 * K, 3)] {
        let image = folder.path().join("victim.qcow2");
        snapshots(&qemu, &image, &filled(8 * M, cluster_size).version(version));
        let bytes = std::fs::read(&image).expect("read");
        let name = format!("v{version} with snapshots");
        for damages in [MAPPING, REFCOUNTS, SNAPSHOTS] {
            done += damage_all(&qemu, folder.path(), &name, &bytes, damages).0;
        }
    }
    assert!(done >= 100, "{done} damages done");
}

/// Makes an image with data and two persistent bitmaps, the first of which has a cluster.
fn bitmaps(qemu: &Qemu, image: &Path, cluster_size: u64) {
    qemu.create(image, &ImageSpec::qcow2(32 * M).cluster_size(cluster_size)).expect("an image");
    for name in ["one", "two"] {
        let add = ["bitmap", "--add", "-g", "64K"].map(std::ffi::OsStr::new);
        qemu.img(add.into_iter().chain([image.as_os_str(), name.as_ref()])).expect("a bitmap");
    }
    qemu.write(image, Format::Qcow2, &[pattern(0, M, 7), pattern(20 * M, M, 8)]).expect("written");
}

#[test]
fn it_agrees_on_bitmaps_sound_and_damaged() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = memory_folder().expect("a folder");
    for cluster_size in [4 * K, 64 * K] {
        let image = folder.path().join("bitmaps.qcow2");
        bitmaps(&qemu, &image, cluster_size);
        assert_clean(&image, "bitmaps");
        let bytes = std::fs::read(&image).expect("read");
        let (done, mended) = damage_all(&qemu, folder.path(), "bitmaps", &bytes, BITMAPS);
        assert!(done as usize == BITMAPS.len() && mended >= 3, "{done} done, {mended} mended");
        std::fs::remove_file(&image).expect("gone");
    }
}

#[test]
fn it_agrees_on_images_whose_data_is_in_another_file() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = memory_folder().expect("a folder");
    for more in ["", ",data_file_raw=on", ",extended_l2=on"] {
        let image = folder.path().join("image.qcow2");
        let how = format!("data_file={}{more}", folder.path().join("data").display());
        let create = ["create", "-q", "-f", "qcow2", "-o", &how].map(std::ffi::OsStr::new);
        qemu.img(create.into_iter().chain([image.as_os_str(), "8M".as_ref()])).expect("an image");
        let contents = filled(8 * M, 64 * K).contents;
        qemu.write(&image, Format::Qcow2, &contents).expect("written");
        assert_clean(&image, &how);
        let bytes = std::fs::read(&image).expect("read");
        let name = format!("data elsewhere{more}");
        let done = damage_all(&qemu, folder.path(), &name, &bytes, MAPPING).0
            + damage_all(&qemu, folder.path(), &name, &bytes, FILE).0;
        assert!(done >= 30, "{done} damages done");
        std::fs::remove_file(&image).expect("gone");
    }
}

#[test]
fn an_encrypted_image_is_refused_by_name() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = memory_folder().expect("a folder");
    let image = folder.path().join("image.qcow2");
    let how = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
    let create = ["create", "-q", "-f", "qcow2", "--object", "secret,id=s,data=abc", "-o", how];
    qemu.img(create.map(std::ffi::OsStr::new).into_iter().chain([image.as_os_str(), "1M".as_ref()]))
        .expect("an image");
    let refused = our_opinion(&image).expect_err("no answer").to_string();
    assert!(refused.contains("encrypted (LUKS)"), "{refused}");
}

#[test]
fn it_agrees_on_snapshots_with_little_extra_data() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = memory_folder().expect("a folder");
    for version in [2, 3] {
        let image = folder.path().join("image.qcow2");
        qemu.create(&image, &filled(4 * M, 64 * K).version(version)).expect("an image");
        qemu.img(["snapshot".as_ref(), "-c".as_ref(), "one".as_ref(), image.as_os_str()])
            .expect("a snapshot");
        let bytes = std::fs::read(&image).expect("read");
        let table = qcow2::entry(&bytes[qcow2::position::SNAPSHOTS_OFFSET..], 0) as usize;
        for (extra, complete) in [(0, false), (8, false), (15, false), (16, true), (24, true), (32, true)] {
            let mut bytes = bytes.clone();
            // Bytes that are no longer extra data count as the name.
            bytes[table + 39] = extra;
            std::fs::write(&image, &bytes).expect("written");
            let what = format!("v{version}, {extra} bytes of extra data");
            let verdict = check_agrees(&image, &what).expect("a sound header").verdict();
            assert_eq!(verdict == Verdict::Clean, complete || version == 2, "{what}");
        }
        std::fs::remove_file(&image).expect("gone");
    }
}

#[test]
fn an_image_that_qemu_left_dirty_is_rebuilt() {
    let Some(qemu) = Qemu::find() else { return };
    let Some(qemu_io) = find_tool("qemu-io") else { return };
    let folder = memory_folder().expect("a folder");
    // The second image has more clusters than one refblock counts.
    for (cluster_size, length) in [(64 * K, 2 * M), (512, 300 * K)] {
        let image = folder.path().join(format!("{cluster_size}.qcow2"));
        let how = format!("lazy_refcounts=on,cluster_size={cluster_size}");
        let create = ["create", "-q", "-f", "qcow2", "-o", &how].map(std::ffi::OsStr::new);
        qemu.img(create.into_iter().chain([image.as_os_str(), "4M".as_ref()])).expect("an image");
        // qemu-io aborts while the refcounts are in memory only.
        let write = format!("write -P 7 512 {length}");
        let mut command = Command::new(&qemu_io);
        command.args(["-f", "qcow2", "-c", &write, "-c", "flush", "-c", "abort"]).arg(&image);
        assert!(!command.output().expect("runs").status.success(), "qemu-io aborts");
        let what = format!("lazy refcounts, clusters of {cluster_size}");
        let (verdict, repaired) = suffer(&qemu, &image, &what);
        assert_eq!((verdict, repaired), (Some(Verdict::Corrupt), true), "{what}");
        let contents = qemu.read_all(&image, Format::Qcow2).expect("read");
        let written = &contents[512..512 + length as usize];
        assert!(written.iter().all(|byte| *byte == 7), "{what}");
        let first = std::fs::read(&image).expect("read");
        assert_eq!(qcow2::entry(&first[qcow2::position::INCOMPATIBLE..], 0), 0, "{what}: marks");
    }
}

#[test]
fn defects_that_qemu_tolerates_are_noted() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = memory_folder().expect("a folder");
    let image = folder.path().join("image.qcow2");
    qemu.create(&image, &ImageSpec::qcow2(4 * M).with(pattern(0, 64 * K, 1))).expect("an image");
    let mut bytes = std::fs::read(&image).expect("read");
    // The L2 table is the fifth cluster; its second entry is empty.
    bytes[0x4_0008..0x4_0010].copy_from_slice(&(1u64 << 63).to_be_bytes());
    std::fs::write(&image, bytes).expect("written");
    let report = check_agrees(&image, "COPIED without an offset").expect("a sound header");
    assert_eq!((report.verdict(), report.notes), (Verdict::Clean, 1));
}

/// `qemu-img check` does not report this flag, but QEMU cannot read such a cluster. Without a backing file a repair
/// clears the entry.
#[test]
fn a_zero_flag_in_version_2_is_found_and_cleared() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = memory_folder().expect("a folder");
    qemu.create(&folder.path().join("base.qcow2"), &ImageSpec::qcow2(4 * M)).expect("a base");
    for (entry, host, backed) in
        [(1, 0, false), (1 << 63 | 0x5_0001, 1, false), (1 << 63 | 0x5_0001, 1, true)]
    {
        let what = format!("entry {entry:#x}, over a backing file: {backed}");
        let image = folder.path().join("image.qcow2");
        let mut spec = ImageSpec::qcow2(4 * M).version(2).with(pattern(0, 128 * K, 1));
        if backed {
            spec = spec.backing("base.qcow2", Format::Qcow2);
        }
        qemu.create(&image, &spec).expect("an image");
        let mut bytes = std::fs::read(&image).expect("read");
        bytes[0x4_0000..0x4_0008].copy_from_slice(&u64::to_be_bytes(entry));
        std::fs::write(&image, &bytes).expect("written");
        let report = check_agrees(&image, &what).expect("a sound header");
        let found = report.findings.iter().filter(|finding| finding.kind.name() == "zero-flag").count();
        assert_eq!((report.verdict(), found), (Verdict::Corrupt, 1), "{what}: {report:#?}");
        let repaired = repair(&image, RepairKind::All);
        if backed {
            assert!(matches!(repaired, Err(OpenError::NotRepairable { .. })), "{what}");
            assert!(report.findings[0].to_string().contains("amend"), "{what}: {report:#?}");
            assert!(std::fs::read(&image).expect("read") == bytes, "{what}");
        } else {
            repaired.unwrap_or_else(|error| panic!("{what}: {error}"));
            assert_clean(&image, &what);
            let read = qemu.read_all(&image, Format::Qcow2).expect("read");
            assert!(read[..64 << 10].iter().all(|byte| *byte == 0), "{what}");
            assert!(read[64 << 10..128 << 10].iter().all(|byte| *byte == 1), "{what}");
            let freed = report.allocated_clusters - our_opinion(&image).expect("a report").allocated_clusters;
            assert_eq!(freed, host, "{what}");
        }
        std::fs::remove_file(&image).expect("gone");
    }
}

/// The one fault about which our checker is stricter than QEMU's, here with refcounts and flags that agree with it.
#[test]
fn metadata_that_data_lies_upon_is_corrupt_whatever_qemu_says() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = memory_folder().expect("a folder");
    let image = folder.path().join("image.qcow2");
    qemu.create(&image, &ImageSpec::qcow2(4 * M).with(pattern(0, 64 * K, 1))).expect("an image");
    let mut bytes = std::fs::read(&image).expect("read");
    let header = Header::parse(&bytes, bytes.len() as u64).expect("a sound header");
    // The second guest cluster overlaps the L1 table.
    let l1 = header.l1_offset.0;
    bytes[0x4_0008..0x4_0010].copy_from_slice(&l1.to_be_bytes());
    let refblock = qcow2::entry(&bytes[header.refcount_table_offset.0 as usize..], 0) as usize;
    qcow2::set_refcount(header.refcount_order, &mut bytes[refblock..], (l1 / (64 * K)) as usize, 2);
    std::fs::write(&image, bytes).expect("written");
    assert_eq!(second_opinion(&image).verdict, Some(Verdict::Clean));
    let report = check_agrees(&image, "data on the L1 table").expect("a sound header");
    assert_eq!(report.verdict(), Verdict::Corrupt);
    assert!(report.findings.iter().all(|finding| is_exception(&finding.kind)), "{report:#?}");
    assert!(matches!(repair(&image, RepairKind::All), Err(OpenError::NotRepairable { .. })));
}

#[test]
fn it_agrees_on_images_with_random_bits_flipped() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = memory_folder().expect("a folder");
    let mut generator = Random::new(1);
    let mut random = |below: u64| generator.below(below);
    let (mut clean, mut leaks, mut corrupt, mut refused) = (0, 0, 0, 0);
    for (name, bytes) in victims(&qemu, folder.path()) {
        let sound = Raw::new(bytes);
        let ranges = sound.metadata();
        for round in 0..60 {
            let mut bytes = sound.bytes.clone();
            let mut flips = Vec::new();
            for _ in 0..=random(3) {
                let (start, length) = ranges[random(ranges.len() as u64) as usize];
                let (at, bit) = (start + random(length), random(8));
                flips.push((at, bit));
                bytes[at as usize] ^= 1 << bit;
            }
            let what = format!("{name}, round {round}: byte and bit {flips:x?}");
            let image = folder.path().join("flipped.qcow2");
            std::fs::write(&image, &bytes).expect("written");
            match our_opinion(&image) {
                Ok(_) => match check_agrees(&image, &what).expect("looked at before").verdict() {
                    Verdict::Clean => clean += 1,
                    Verdict::Leaks => leaks += 1,
                    Verdict::Corrupt => corrupt += 1,
                },
                Err(error) => {
                    let theirs = second_opinion(&image);
                    let format = matches!(error, OpenError::Format { .. });
                    // Our rules for headers refuse a table in the header's cluster. QEMU opens such an image and finds
                    // it corrupt.
                    let bad = theirs.verdict.is_none_or(|verdict| verdict == Verdict::Corrupt);
                    assert!(!format || bad, "{what}: {error}\n{}", theirs.text);
                    refused += 1;
                }
            }
            std::fs::remove_file(&image).expect("gone");
        }
    }
    assert!(leaks > 0 && corrupt > 50, "{clean} clean, {leaks} leaks, {corrupt} corrupt, {refused} refused");
}
