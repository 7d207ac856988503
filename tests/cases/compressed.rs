//! Compressed clusters: images made by `qemu-img convert -c`, and streams that must be accepted or refused as by QEMU.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use disk::{Disk, DiskOptions, Request, RequestId};
use flate2::write::DeflateEncoder;
use proptest::test_runner::{Config, TestRunner};
use qcow2::{Geometry, HostOffset, L2Entry, Version};
use storage::GuestSlice;
use storage::host::HostStorage;
use strata_kit::images::{Format, ImageSpec};
use strata_kit::model::{DiscardRule, Operation, contents, sequences};
use strata_kit::{ByteModel, Qemu, model};
use strata_rig::agree::assert_clean;
use strata_rig::{K, M, Rig, options, patch, pattern, tables, word, write};

/// The bytes of a disk whose clusters compress well, badly or not at all; some are zero.
fn mixed(size: u64, cluster: u64, seed: u32) -> Vec<u8> {
    let mut bytes = contents(seed, 0, size);
    for (number, cluster) in bytes.chunks_mut(cluster as usize).enumerate() {
        match number % 5 {
            0 => cluster.fill(number as u8 | 1),
            1 => cluster.fill(0),
            2 => {
                // Data that repeats at a long distance.
                let half = cluster.len() / 2;
                let (first, second) = cluster.split_at_mut(half);
                second[..half].copy_from_slice(first);
            }
            3 => cluster.iter_mut().for_each(|byte| *byte &= 0x0f),
            _ => {}
        }
    }
    bytes
}

/// Makes an image from these bytes with `qemu-img convert -c`.
fn converted(qemu: &Qemu, folder: &Path, bytes: &[u8], options: &str) -> PathBuf {
    let (raw, image) = (folder.join("raw"), folder.join("image"));
    std::fs::write(&raw, bytes).expect("a raw image");
    let [from, to] = [&raw, &image].map(|path| path.display().to_string());
    qemu.img(["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, &from, &to])
        .expect("qemu-img convert");
    image
}

#[test]
fn images_of_every_cluster_size_are_read_written_and_discarded() {
    let Some(qemu) = Qemu::find() else { return };
    for bits in 9..=21_u32 {
        let cluster = 1_u64 << bits;
        let size = (cluster * 37).clamp(48 * K, 16 * M) + 512;
        let geometry =
            model::Geometry { size, cluster_size: cluster, transfer_max: (4 * cluster).min(512 * K) };
        let initial = mixed(size, cluster, bits);
        for compression in ["zlib", "zstd"] {
            let folder = tempfile::tempdir().expect("a folder");
            let how = format!("cluster_size={cluster},compression_type={compression}");
            let image = converted(&qemu, folder.path(), &initial, &how);
            let mut rig = Rig::open(&image, &options()).expect("the image opens");
            assert!(rig.read_all() == initial, "{how}");
            rig.close();
            let pristine = std::fs::read(&image).expect("the image");
            let mut runner =
                TestRunner::new(Config { cases: 2, failure_persistence: None, ..Config::default() });
            let result = runner.run(&sequences(geometry, 40), |operations| {
                std::fs::write(&image, &pristine).expect("the image");
                let mut model =
                    ByteModel::with_contents(&initial, size, cluster, DiscardRule::ZeroesClusters);
                let mut rig = Rig::open(&image, &options()).expect("the image opens");
                rig.run(&operations, &mut model);
                model.compare_all(&rig.read_all()).expect("as the model");
                rig.close();
                assert_clean(&image, "the closed image");
                let found = qemu.read_all(&image, Format::Qcow2).expect("qemu-img reads it");
                model.compare_all(&found).expect("as the model, by qemu-img");
                Ok(())
            });
            result.unwrap_or_else(|error| panic!("{how}: {error}"));
        }
    }
}

/// Overwritten and discarded clusters leave no lost space: in the end the file is about as long as a new one.
#[test]
fn the_space_of_compressed_clusters_is_given_back() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let initial = mixed(8 * M, 64 * K, 1);
    let image = converted(&qemu, folder.path(), &initial, "cluster_size=64k");
    let length = || std::fs::metadata(&image).expect("the image").len();
    assert!(length() > 4 * M);
    let mut model = ByteModel::with_contents(&initial, 8 * M, 64 * K, DiscardRule::ZeroesClusters);
    let mut rig = Rig::open(&image, &options()).expect("the image opens");
    // In an order in which neighbours that share a host cluster are freed at different times.
    let offset = |number: u64| number * 37 % 128 * 64 * K;
    let operations: Vec<Operation> =
        (0..128).map(|number| Operation::Discard { offset: offset(number), length: 64 * K }).collect();
    rig.run(&operations, &mut model);
    rig.close();
    assert_clean(&image, "the closed image");
    assert!(length() <= M, "{} bytes are left", length());
}

/// Reads of 512 bytes, each in a compressed cluster of its own, are as much work as reads of whole clusters. Long
/// before there are many, the queue has no room for more. What one queue has leaves each other one its share.
#[test]
fn reads_of_compressed_clusters_leave_room_for_few() {
    let Some(qemu) = Qemu::find() else { return };
    let (folder, count) = (tempfile::tempdir().expect("a folder"), 1024);
    let image = converted(&qemu, folder.path(), &mixed(count * 64 * K, 64 * K, 1), "cluster_size=64k");
    let disk = Disk::open(HostStorage::new(), &image, &options()).expect("the image opens");
    let mut queues = [(); 2].map(|()| disk.queue(count as u32).expect("a queue"));
    let memory = [GuestSlice::from(Vec::leak(vec![0; 512]))];
    let mut taken = [0; 2];
    for (queue, taken) in queues.iter_mut().zip(&mut taken) {
        while queue.has_room() {
            assert!(*taken < count, "a queue takes any number of them");
            let request = Request::Read { offset: *taken * 64 * K };
            queue.submit(RequestId(*taken as u32), request, &memory);
            *taken += 1;
        }
    }
    assert!((1..=32 * M / (64 * K)).contains(&taken[0]), "{taken:?}");
    assert!((1..=8).contains(&taken[1]), "{taken:?}");
    let mut done = Vec::new();
    while (done.len() as u64) < taken[0] + taken[1] {
        for queue in &mut queues {
            queue.poll(&mut done);
            queue.wait(Some(Duration::from_millis(1)));
        }
    }
    assert!(done.iter().all(|done| done.result.is_ok()));
    assert!(queues.iter().all(|queue| queue.has_room()));
    drop(queues);
    disk.close().expect("a clean close");
}

/// Makes an image whose only cluster is this compressed stream.
fn with_stream(qemu: &Qemu, image: &Path, zstd: bool, cluster: u64, stream: &[u8]) {
    let spec = ImageSpec::qcow2(cluster).cluster_size(cluster).with(pattern(0, cluster, 1));
    qemu.create(image, &if zstd { spec.zstd() } else { spec }).expect("an image");
    let (_, l2, _) = tables(image);
    let at = word(image, l2) & 0x00ff_ffff_ffff_fe00;
    // Not at the start of a sector.
    let offset = HostOffset(at + 100);
    let sectors = (100 + stream.len() as u64).div_ceil(512);
    assert!(sectors * 512 <= 2 * cluster, "the descriptor can say so");
    let geometry = Geometry {
        version: Version::V3,
        cluster_bits: cluster.trailing_zeros(),
        refcount_order: 4,
        extended_l2: false,
        size: cluster,
    };
    patch(image, offset.0, stream);
    patch(image, l2, &L2Entry::Compressed { offset, sectors }.encode(&geometry).descriptor.to_be_bytes());
}

fn deflated(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = DeflateEncoder::new(Vec::new(), flate2::Compression::best());
    encoder.write_all(bytes).expect("to memory");
    encoder.finish().expect("to memory")
}

fn zstd_frame(bytes: &[u8]) -> Vec<u8> {
    zstd::bulk::compress(bytes, 3).expect("to memory")
}

/// A frame without a content size, with this window size and a checksum.
fn zstd_streamed(bytes: &[u8], window_log: u32) -> Vec<u8> {
    let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 3).expect("an encoder");
    encoder.window_log(window_log).expect("the format knows it");
    encoder.include_checksum(true).expect("the format knows it");
    encoder.write_all(bytes).expect("to memory");
    encoder.finish().expect("to memory")
}

#[test]
fn streams_are_judged_as_qemu_does() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let cluster = 64 * K;
    // The data repeats at a distance of 20,480, far beyond the 4 KiB window of QEMU's own streams.
    let unit = contents(1, 0, 20_480);
    let all: Vec<u8> = unit.iter().copied().cycle().take(cluster as usize).collect();
    let (long, short) = ([&all[..], &[7; 5000]].concat(), &all[..all.len() - 1]);
    let flipped = |mut stream: Vec<u8>, at: usize| {
        stream[at] ^= 0x10;
        stream
    };
    let skippable = [0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 1, 2, 3];
    let cut = |stream: Vec<u8>, bytes: usize| stream[..stream.len() - bytes].to_vec();
    let streams: Vec<(&str, bool, Vec<u8>, bool)> = vec![
        ("whole", false, deflated(&all), true),
        ("with something behind", false, [deflated(&all), vec![0xa5; 2000]].concat(), true),
        ("stored", false, deflated(&contents(3, 0, cluster)), true),
        ("long", false, deflated(&long), true),
        ("short", false, deflated(short), false),
        ("cut", false, cut(deflated(&all), 700), false),
        ("other bytes", false, flipped(deflated(&all), 9000), true),
        ("no such block", false, vec![0x07; 600], false),
        ("nothing", false, vec![0; 600], false),
        ("whole", true, zstd_frame(&all), true),
        ("with something behind", true, [zstd_frame(&all), vec![0xa5; 2000]].concat(), true),
        ("stored", true, zstd_frame(&contents(3, 0, cluster)), true),
        (
            "frames",
            true,
            [zstd_frame(&all[..7777]), zstd_frame(&[]), zstd_frame(&all[7777..])].concat(),
            true,
        ),
        ("a frame to be skipped", true, [&skippable[..], &zstd_frame(&all)].concat(), true),
        ("frames, long", true, [zstd_frame(&all[..7777]), zstd_frame(&all)].concat(), false),
        ("streamed", true, zstd_streamed(&all, 20), true),
        ("a large window", true, zstd_streamed(&all, 27), true),
        (
            "a damaged checksum",
            true,
            flipped(zstd_streamed(&all, 20), zstd_streamed(&all, 20).len() - 2),
            false,
        ),
        ("without its checksum", true, cut(zstd_streamed(&all, 20), 4), false),
        ("long", true, zstd_frame(&long), false),
        ("short", true, zstd_frame(short), false),
        ("cut", true, cut(zstd_frame(&all), 700), false),
        ("nothing", true, vec![0; 600], false),
    ];
    for (name, zstd, stream, good) in &streams {
        let image = folder.path().join("image");
        with_stream(&qemu, &image, *zstd, cluster, stream);
        let expected = qemu.read_all(&image, Format::Qcow2).ok();
        let mut rig = Rig::open(&image, &DiskOptions { read_only: true, ..options() }).expect("it opens");
        let read = rig.try_one(&Operation::Read { offset: 0, length: cluster });
        let found = read.is_ok().then(|| rig.read_all());
        rig.close();
        assert!(found == expected, "{name} (zstd {zstd}): QEMU reads {}, we {read:?}", expected.is_some());
        assert_eq!(expected.is_some(), *good, "{name} (zstd {zstd}): QEMU has changed its mind");
    }
}

/// The L2 entry of a guest cluster in an image with one L2 table.
fn entry(image: &Path, cluster: u64, geometry: &Geometry) -> L2Entry {
    let (_, l2, _) = tables(image);
    L2Entry::decode(word(image, l2 + cluster * 8), geometry).expect("a good entry")
}

#[test]
fn damage_to_one_cluster_is_that_clusters_alone() {
    let Some(qemu) = Qemu::find() else { return };
    let cluster = 64 * K;
    let size = 10 * cluster;
    let initial = mixed(size, cluster, 5);
    let geometry =
        Geometry { version: Version::V3, cluster_bits: 16, refcount_order: 4, extended_l2: false, size };
    for compression in ["zlib", "zstd"] {
        let folder = tempfile::tempdir().expect("a folder");
        let image = converted(&qemu, folder.path(), &initial, &format!("compression_type={compression}"));
        let L2Entry::Compressed { offset, .. } = entry(&image, 3, &geometry) else {
            panic!("cluster 3 compresses")
        };
        patch(&image, offset.0, &[0xff; 40]);
        let mut model = ByteModel::with_contents(&initial, size, cluster, DiscardRule::ZeroesClusters);
        let mut rig = Rig::open(&image, &options()).expect("it opens");
        for number in [0, 1, 2, 4, 5, 6, 7, 8, 9] {
            rig.run(&[Operation::Read { offset: number * cluster, length: cluster }], &mut model);
        }
        let wrong =
            rig.try_one(&Operation::Read { offset: 3 * cluster + 512, length: 512 }).expect_err("damaged");
        let message = wrong.to_string();
        let place = format!("compressed cluster at offset {:#x}", offset.0);
        assert!(message.contains(&place) && message.contains("image"), "{message}");
        // A write that needs the rest of the cluster fails, and changes nothing. A whole write repairs it.
        rig.try_one(&write(3 * cluster + 512, 512, 1)).expect_err("the rest cannot be copied");
        rig.run(&[write(2 * cluster, cluster, 2), write(4 * cluster + 512, 512, 3)], &mut model);
        rig.try_one(&Operation::Read { offset: 3 * cluster, length: 512 }).expect_err("still damaged");
        rig.run(&[write(3 * cluster, cluster, 4), Operation::Flush], &mut model);
        model.compare_all(&rig.read_all()).expect("as the model");
        rig.close();
        assert_clean(&image, "the closed image");
    }
}

/// A descriptor counts whole sectors, and the file may end with the stream.
#[test]
fn the_file_may_end_inside_the_last_sector() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    for zstd in [false, true] {
        let image = folder.path().join("image");
        let all = mixed(64 * K, 64 * K, 3);
        let stream = if zstd { zstd_frame(&all) } else { deflated(&all) };
        with_stream(&qemu, &image, zstd, 64 * K, &stream);
        let (_, l2, _) = tables(&image);
        let end = (word(&image, l2) & 0x00ff_ffff_ffff) + stream.len() as u64;
        let file = std::fs::OpenOptions::new().write(true).open(&image).expect("the image");
        file.set_len(end).expect("cut");
        let mut rig = Rig::open(&image, &options()).expect("it opens");
        assert!(rig.read_all() == all);
        let mut model = ByteModel::with_contents(&all, 64 * K, 64 * K, DiscardRule::ZeroesClusters);
        rig.run(&[write(512, 512, 1)], &mut model);
        model.compare_all(&rig.read_all()).expect("as the model");
        rig.close();
        assert_clean(&image, "the closed image");
    }
}

/// A descriptor whose range covers metadata frees none of it.
#[test]
fn compressed_data_over_metadata_is_never_released() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let operations = [
        write(0, 64 * K, 1),
        Operation::Discard { offset: 0, length: 64 * K },
        Operation::WriteZeroes { offset: 0, length: 64 * K, unmap: false },
    ];
    for (number, operation) in operations.iter().enumerate() {
        let image = folder.path().join(format!("image{number}"));
        with_stream(&qemu, &image, false, 64 * K, &deflated(&[1; 65536]));
        let (l1, l2, _) = tables(&image);
        let geometry = Geometry {
            version: Version::V3,
            cluster_bits: 16,
            refcount_order: 4,
            extended_l2: false,
            size: 64 * K,
        };
        // The last cluster that it touches belongs to the L1 table.
        let over = L2Entry::Compressed { offset: HostOffset(l1 - 512), sectors: 2 };
        patch(&image, l2, &over.encode(&geometry).descriptor.to_be_bytes());
        let mut rig = Rig::open(&image, &options()).expect("it opens");
        let wrong = rig.try_one(operation).expect_err("it names the L1 table").to_string();
        assert!(wrong.contains("holds other metadata"), "{wrong}");
        drop(rig);
        assert_eq!(word(&image, 72) & 2, 2, "it is marked corrupt");
    }
}

/// Small reads of one cluster, one by one and many at once, use one inflated copy. With very little memory for such
/// copies the results are the same.
#[test]
fn a_small_cache_gives_the_same_answers() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let initial = mixed(4 * M, 64 * K, 9);
    let image = converted(&qemu, folder.path(), &initial, "compression_type=zstd");
    let mut model = ByteModel::with_contents(&initial, 4 * M, 64 * K, DiscardRule::ZeroesClusters);
    let reads: Vec<Operation> =
        (0..1000_u64).map(|n| Operation::Read { offset: n * 4096 % (4 * M), length: 4096 }).collect();
    for (inflated_bytes, inflate_threads) in [(0, 1), (200 << 10, 3), (16 << 20, 0)] {
        let how = DiskOptions { inflated_bytes, inflate_threads, read_only: true, ..options() };
        let mut rig = Rig::open(&image, &how).expect("it opens");
        rig.run(&reads, &mut model);
        rig.close();
    }
}
