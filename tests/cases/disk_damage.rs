//! The disk on damaged, hostile and awkward images, in-process. Each was a bug that a review found.

use std::fs::{File, OpenOptions};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use disk::DiskOptions;
use strata_kit::images::{Content, Format, ImageSpec};
use strata_kit::model::{DiscardRule, Operation};
use strata_kit::{ByteModel, Qemu};
use strata_rig::{K, M, Rig, options, patch, pattern, tables, word, write};

#[test]
fn waiters_for_a_window_share_it() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let image = folder.path().join("fresh.qcow2");
    qemu.create(&image, &ImageSpec::qcow2(1024 * M)).expect("an image");
    let mut model = ByteModel::new(1024 * M, 64 * K, DiscardRule::ZeroesClusters);
    let mut rig = Rig::open(&image, &options()).expect("opens");
    let together: Vec<_> = (0..8).map(|n| write(n * M, 4 * K, 1)).collect();
    rig.run(&together, &mut model);
    let length = std::fs::metadata(&image).expect("image").len();
    assert!(length <= 4 * M, "eight small writes at once made a file of {length} bytes");
    rig.close();
}

#[test]
fn an_end_of_file_past_every_offset_is_refused() {
    let Some(qemu) = Qemu::find() else { return };
    // tmpfs supports files of 2^56 bytes.
    for (parent, bits) in [("/dev/shm", 16), ("/tmp", 16), ("/tmp", 1)] {
        let folder = tempfile::tempdir_in(parent).expect("a folder");
        let image = folder.path().join("far.qcow2");
        let text = image.display().to_string();
        let spec = format!("cluster_size=2M,refcount_bits={bits}");
        qemu.img(["create", "-q", "-f", "qcow2", "-o", &spec, &text, "64M"]).expect("an image");
        let mut table = word(&image, 48);
        let far = if bits == 1 { 1 << 19 } else { 1 << 15 };
        if bits == 1 {
            // A table of 8 MiB at another offset.
            let first = word(&image, table);
            table = 32 * M;
            patch(&image, 48, &table.to_be_bytes());
            patch(&image, 56, &4u32.to_be_bytes());
            patch(&image, table, &first.to_be_bytes());
        }
        patch(&image, table + 8 * far, &(48 * M).to_be_bytes());
        patch(&image, 52 * M - 1, &[0]);
        let mut rig = Rig::open(&image, &options()).expect("opens");
        let mut errors = (0..32).filter_map(|n| rig.try_one(&write(n * 2 * M, 512, 1)).err());
        let message = errors.next().expect("the file cannot grow").to_string();
        assert!(
            message.contains("2^56") || message.contains("growing") || message.contains("refcount"),
            "{message}"
        );
    }
}

#[test]
fn metadata_that_counts_as_free_is_not_handed_out() {
    let Some(qemu) = Qemu::find() else { return };
    for what in ["L2 table", "L1 table", "refblock"] {
        let folder = tempfile::tempdir().expect("a folder");
        let image = folder.path().join("counts.qcow2");
        qemu.create(&image, &ImageSpec::qcow2(64 * M).with(pattern(0, 2 * M, 7))).expect("an image");
        let contents = qemu.read_all(&image, Format::Qcow2).expect("read");
        let (l1, l2, block) = tables(&image);
        let target = match what {
            "L2 table" => l2,
            "L1 table" => l1,
            _ => block,
        };
        patch(&image, block + target / (64 * K) * 2, &[0, 0]);
        let mut rig = Rig::open(&image, &options()).expect("opens");
        let written = rig.try_one(&write(32 * M, 64 * K, 3));
        let message = written.expect_err("the damage is found when clusters are sought").to_string();
        assert!(message.contains("refcount is zero"), "{what}: {message}");
        let model = ByteModel::with_contents(&contents, 64 * M, 64 * K, DiscardRule::ZeroesClusters);
        model.compare_all(&rig.read_all()).unwrap_or_else(|difference| panic!("{what}: {difference}"));
        drop(rig);
        assert_eq!(word(&image, 72) & 2, 2, "{what}: the image is marked corrupt");
    }
}

#[test]
fn an_entry_that_names_metadata_is_not_written_through() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    for (name, operation) in [
        ("write", write(64 * K, 4 * K, 1)),
        ("discard", Operation::Discard { offset: 64 * K, length: 64 * K }),
        ("zeroes", Operation::WriteZeroes { offset: 64 * K, length: 64 * K, unmap: true }),
    ] {
        let image = folder.path().join(format!("{name}.qcow2"));
        qemu.create(&image, &ImageSpec::qcow2(64 * M).with(pattern(0, 64 * K, 7))).expect("an image");
        let (_, l2, _) = tables(&image);
        patch(&image, l2 + 8, &(l2 | 1 << 63).to_be_bytes());
        let before = word(&image, l2);
        let mut rig = Rig::open(&image, &options()).expect("opens");
        // Brings the word into the map.
        rig.try_one(&Operation::Read { offset: 0, length: 512 }).expect("a read");
        let message = rig.try_one(&operation).expect_err(name).to_string();
        assert!(message.contains("holds other metadata"), "{message}");
        drop(rig);
        assert_eq!(word(&image, l2), before, "{name}: the L2 table is as it was");
    }
}

#[test]
fn two_tables_in_one_place_are_refused_for_writing() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let image = folder.path().join("shared.qcow2");
    let spec = ImageSpec::qcow2(1024 * M).with(pattern(0, 64 * K, 7));
    qemu.create(&image, &spec).expect("an image");
    let (l1, _, _) = tables(&image);
    patch(&image, l1 + 8, &word(&image, l1).to_be_bytes());
    // An unknown autoclear bit.
    patch(&image, 88, &(1u64 << 40).to_be_bytes());
    let before = std::fs::read(&image).expect("image");
    let message = match Rig::open(&image, &options()) {
        Ok(_) => panic!("opens"),
        Err(error) => error.to_string(),
    };
    assert!(message.contains("L1 table, entry 1"), "{message}");
    assert!(std::fs::read(&image).expect("image") == before, "what is refused is not written to");
    Rig::open(&image, &DiskOptions { read_only: true, ..options() }).expect("reading").close();
}

#[test]
fn reclaim_needs_no_more_tables_than_the_cache_holds() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let image = folder.path().join("scattered.qcow2");
    let text = image.display().to_string();
    let spec = "cluster_size=4k,preallocation=metadata";
    qemu.img(["create", "-q", "-f", "qcow2", "-o", spec, &text, "3G"]).expect("an image");
    let options = DiskOptions { table_bytes: 512 * K as usize, ..options() };
    let mut rig = Rig::open(&image, &options).expect("opens");
    for n in 0..384 {
        rig.try_one(&Operation::Discard { offset: n * 8 * M, length: 4 * K }).expect("a discard");
    }
    rig.try_one(&Operation::Flush).expect("a flush");
    let deadline = Instant::now() + Duration::from_secs(60);
    while rig.disk().status().quarantined_clusters > 0 {
        assert!(Instant::now() < deadline, "reclaim hangs: {:?}", rig.disk().status());
        rig.try_one(&Operation::Read { offset: 0, length: 4 * K }).expect("a read");
    }
    rig.close();
}

#[test]
fn a_deep_chain_is_read_with_a_tiny_cache() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let mut chain = vec![ImageSpec::qcow2(64 * M)];
    for n in 0..16u64 {
        let spec = ImageSpec::qcow2(64 * M).backing(PathBuf::new(), Format::Qcow2);
        chain.push(spec.with(pattern(n * 64 * K, 64 * K, n as u8 + 1)));
    }
    let paths = qemu.create_chain(folder.path(), &chain).expect("a chain");
    let image = paths.last().expect("a top");
    let contents = qemu.read_all(image, Format::Qcow2).expect("read");
    let model = ByteModel::with_contents(&contents, 64 * M, 64 * K, DiscardRule::ZeroesClusters);
    let options = DiskOptions { table_bytes: 4 * 4096, map_bytes: 4096, ..options() };
    let mut rig = Rig::open(image, &options).expect("opens");
    model.compare_all(&rig.read_all()).expect("contents");
    rig.close();
}

#[test]
fn data_written_past_the_end_of_a_short_file_survives_the_close() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let image = folder.path().join("short.qcow2");
    qemu.create(&image, &ImageSpec::qcow2(64 * M).with(pattern(0, 2 * M, 7))).expect("an image");
    let length = std::fs::metadata(&image).expect("image").len();
    // Truncates the file, as if a copy of it had stopped early.
    let file = OpenOptions::new().write(true).open(&image).expect("the image");
    file.set_len(length - 256 * K).expect("cut");
    drop(file);
    let contents = qemu.read_all(&image, Format::Qcow2).expect("read");
    let mut model = ByteModel::with_contents(&contents, 64 * M, 64 * K, DiscardRule::ZeroesClusters);
    let mut rig = Rig::open(&image, &options()).expect("opens");
    rig.run(
        &[write(2 * M - 64 * K, 64 * K, 3), write(2 * M - 192 * K, 64 * K, 4), Operation::Flush],
        &mut model,
    );
    rig.run(&[write(32 * M, 64 * K, 5), Operation::Flush], &mut model);
    model.compare_all(&rig.read_all()).expect("contents");
    rig.close();
    model
        .compare_all(&qemu.read_all(&image, Format::Qcow2).expect("read"))
        .expect("contents after the close");
}

#[test]
fn a_write_of_whole_clusters_needs_nothing_from_below() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let compressed = Content::Compressed { offset: 0, length: 128 * K, byte: 4 };
    let chain = [
        ImageSpec::qcow2(4 * M).with(compressed),
        ImageSpec::qcow2(4 * M).backing(PathBuf::new(), Format::Qcow2),
    ];
    let paths = qemu.create_chain(folder.path(), &chain).expect("a chain");
    // The compressed data is gone: none of it can be copied.
    let (_, l2, _) = tables(&paths[0]);
    // QEMU compresses both clusters in parallel: either may come first in the file.
    let data = [0, 8].map(|at| word(&paths[0], l2 + at) & 0x003f_ffff_ffff_ffff);
    patch(&paths[0], data[0].min(data[1]), &[0; 512]);
    let mut rig = Rig::open(paths.last().expect("a top"), &options()).expect("opens");
    rig.try_one(&write(0, 64 * K, 1)).expect("the first write");
    rig.try_one(&write(0, 64 * K, 2)).expect("the second write");
    rig.try_one(&write(64 * K, 512, 3)).expect_err("a part of a cluster must be copied");
    rig.close();
}

#[test]
fn a_cluster_that_two_entries_name_is_not_handed_out_twice() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let image = folder.path().join("twice.qcow2");
    let spec = ImageSpec::qcow2(64 * M).cluster_size(4 * K).with(pattern(0, 8 * K, 7));
    qemu.create(&image, &spec).expect("an image");
    let (_, l2, _) = tables(&image);
    patch(&image, l2 + 8, &word(&image, l2).to_be_bytes());
    let mut rig = Rig::open(&image, &options()).expect("opens");
    let discard = |n: u64| Operation::Discard { offset: n * 4 * K, length: 4 * K };
    let settle = |rig: &Rig| {
        let deadline = Instant::now() + Duration::from_secs(60);
        while rig.disk().status().quarantined_clusters > 0 && word(&image, 72) & 2 == 0 {
            assert!(Instant::now() < deadline, "reclaim hangs: {:?}", rig.disk().status());
            std::thread::yield_now();
        }
    };
    rig.try_one(&discard(0)).expect("the first that names it");
    rig.try_one(&Operation::Flush).expect("a flush");
    settle(&rig);
    // The cluster is free already, and is freed again.
    rig.try_one(&discard(1)).expect("the second that names it");
    // On a slow machine the housekeeper may have flushed and found the damage already.
    let _ = rig.try_one(&Operation::Flush);
    settle(&rig);
    let message = rig.try_one(&write(16 * M, 4 * K, 2)).expect_err("the damage was found").to_string();
    assert!(message.contains("refuses writes"), "{message}");
    drop(rig);
    assert_eq!(word(&image, 72) & 2, 2, "the image is marked corrupt");
    let mut rig = Rig::open(&image, &DiskOptions { read_only: true, ..options() }).expect("reading");
    let model = ByteModel::new(64 * M, 4 * K, DiscardRule::ZeroesClusters);
    model.compare_all(&rig.read_all()).expect("both were discarded");
}

/// A header of version 3. `l1` is the number of entries and the offset of the L1 table. The refcount table is in the
/// second cluster and has `clusters` clusters.
fn header(cluster_bits: u32, size: u64, l1: (u32, u64), clusters: u32, refcount_order: u32) -> Vec<u8> {
    let mut bytes = b"QFI\xfb".to_vec();
    bytes.extend(3u32.to_be_bytes());
    bytes.extend([0; 12]);
    bytes.extend(cluster_bits.to_be_bytes());
    bytes.extend(size.to_be_bytes());
    bytes.extend([0; 4]);
    bytes.extend(l1.0.to_be_bytes());
    bytes.extend(l1.1.to_be_bytes());
    bytes.extend((1u64 << cluster_bits).to_be_bytes());
    bytes.extend(clusters.to_be_bytes());
    bytes.extend([0; 12 + 24]);
    bytes.extend(refcount_order.to_be_bytes());
    bytes.extend(104u32.to_be_bytes());
    bytes.extend([0; 8]);
    bytes
}

fn entries(values: impl Iterator<Item = u64>) -> Vec<u8> {
    values.flat_map(u64::to_be_bytes).collect()
}

/// Makes an image of 512-byte clusters and 64-bit refcounts whose refcount table of `clusters` clusters is full. The
/// next allocation needs a larger table.
fn image_with_full_refcount_table(image: &Path, clusters: u64) {
    let (blocks_held, size) = (clusters * 64, 64 * M);
    let l1_entries = size / (64 * 512);
    let meta = 1 + clusters + (l1_entries * 8).div_ceil(512);
    let mut blocks = 1;
    while (meta + blocks + 1).div_ceil(64) > blocks {
        blocks += 1;
    }
    let file = File::create(image).expect("an image");
    let put = |offset: u64, bytes: &[u8]| file.write_all_at(bytes, offset).expect("written");
    put(0, &header(9, size, (l1_entries as u32, (1 + clusters) * 512), clusters as u32, 6));
    put(512, &entries((0..blocks).map(|n| (meta + n) * 512)));
    put(512 + (blocks_held - 1) * 8, &entries([(meta + blocks) * 512].into_iter()));
    put(meta * 512, &entries((0..(blocks + 1) * 64).map(|_| 1)));
    file.set_len(blocks_held * 64 * 512).expect("a length");
}

#[test]
fn the_refcount_table_grows_as_far_as_its_format_allows() {
    let folder = tempfile::tempdir().expect("a folder");
    // Half as large again is within 8 MiB, past it, and far past it. The last table cannot grow at all.
    for (clusters, grows) in [(10_000, true), (12_000, true), (15_000, true), (16_384, false)] {
        let image = folder.path().join(format!("{clusters}.qcow2"));
        image_with_full_refcount_table(&image, clusters);
        let mut rig = Rig::open(&image, &options()).expect("opens");
        let written = rig.try_one(&write(0, 64 * K, 1)).and_then(|()| rig.try_one(&Operation::Flush));
        let said = format!("{clusters} clusters: {written:?}");
        match written {
            Ok(()) => assert!(grows, "{said}"),
            Err(error) => assert!(!grows && error.to_string().contains("8 MiB"), "{said}"),
        }
        rig.close();
        assert_eq!(word(&image, 72), 0, "{clusters} clusters: no mark");
    }
}

/// Makes an image of 4 KiB clusters and 1-bit refcounts with `data` data clusters. Each is alone in an unsearched
/// stretch of 512 host clusters. Returns the guest clusters without data.
fn image_of_scattered_clusters(image: &Path, data: u64) -> Range<u64> {
    const SIZE: u64 = 4096;
    let l1_entries = (data + 4096).div_ceil(512);
    let clusters = (data + 128) * 512;
    let blocks = clusters.div_ceil(SIZE * 8);
    let table = (blocks * 8).div_ceil(SIZE);
    let (l1, l2) = ((l1_entries * 8).div_ceil(SIZE), data.div_ceil(512));
    let at_l1 = 1 + table;
    let at_blocks = at_l1 + l1;
    let at_l2 = at_blocks + blocks;
    let meta = at_l2 + l2;
    let first = meta.div_ceil(512) + 1;
    let place = |n: u64| (first + n) * 512 + 256;
    let mut counts = vec![0u8; (blocks * SIZE) as usize];
    for cluster in (0..meta).chain((0..data).map(place)) {
        counts[cluster as usize / 8] |= 1 << (cluster % 8);
    }
    let file = File::create(image).expect("an image");
    let put = |offset: u64, bytes: &[u8]| file.write_all_at(bytes, offset).expect("written");
    put(0, &header(12, (data + 4096) * SIZE, (l1_entries as u32, at_l1 * SIZE), table as u32, 0));
    put(SIZE, &entries((0..blocks).map(|n| (at_blocks + n) * SIZE)));
    put(at_l1 * SIZE, &entries((0..l2).map(|n| ((at_l2 + n) * SIZE) | 1 << 63)));
    put(at_blocks * SIZE, &counts);
    put(at_l2 * SIZE, &entries((0..data).map(|n| (place(n) * SIZE) | 1 << 63)));
    file.set_len((first + data) * 512 * SIZE).expect("a length");
    data..data + 4096
}

#[test]
fn a_valid_image_with_scattered_data_is_not_marked_corrupt() {
    let folder = tempfile::tempdir().expect("a folder");
    let image = folder.path().join("scattered.qcow2");
    // More clusters than the guard remembers exactly.
    let data = (1 << 19) + 64;
    let empty = image_of_scattered_clusters(&image, data);
    let mut rig = Rig::open(&image, &options()).expect("opens");
    for offset in (0..data * 4 * K).step_by(2 * M as usize) {
        rig.try_one(&Operation::Read { offset, length: 512 }).expect("a read");
    }
    let operations: Vec<_> =
        empty.clone().step_by(61).map(|cluster| write(cluster * 4 * K, 4 * K, 1)).collect();
    let mut model = ByteModel::new((data + 4096) * 4 * K, 4 * K, DiscardRule::Nothing);
    rig.run(&operations, &mut model);
    rig.try_one(&Operation::Flush).expect("a flush");
    rig.close();
    assert_eq!(word(&image, 72), 0, "no mark");
    let mut rig = Rig::open(&image, &DiskOptions { read_only: true, ..options() }).expect("opens");
    let reads: Vec<_> =
        empty.step_by(61).map(|n| Operation::Read { offset: n * 4 * K, length: 4 * K }).collect();
    rig.run(&reads, &mut model);
    rig.close();
}
