//! The disk, in-process, in situations that random sequences seldom reach. These are growth of the refcount
//! structure, space given back, file length over many sessions, named refusals, raw images and deep chains.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use disk::{Disk, DiskOptions, DiskQueue, Format as DiskFormat, OpenError, Request, RequestId};
use storage::GuestSlice;
use storage::host::HostStorage;
use strata_kit::images::{Content, Format, ImageSpec};
use strata_kit::model::{DiscardRule, Operation};
use strata_kit::{ByteModel, Qemu};
use strata_rig::agree::assert_clean;
use strata_rig::{K, M, Rig, options, patch, write};

fn refused(path: &Path, options: &DiskOptions) -> OpenError {
    match Rig::open(path, options) {
        Ok(_) => panic!("{} opens", path.display()),
        Err(error) => error,
    }
}

/// The block size of the file system that holds the image: bytes.
fn file_system_block(rig: &Rig) -> u64 {
    u64::from(rig.disk().files().next().expect("a file").block_size)
}

#[test]
fn the_refcount_table_and_its_blocks_grow() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    for (cluster, size) in [(512, 40 * M), (1024, 80 * M)] {
        let image = folder.path().join(format!("{cluster}.qcow2"));
        qemu.create(&image, &ImageSpec::qcow2(size).cluster_size(cluster)).expect("an image");
        let mut model = ByteModel::new(size, cluster, DiscardRule::ZeroesClusters);
        for session in 0..2 {
            let mut rig = Rig::open(&image, &options()).expect("opens");
            // Two halves, so that the second session grows the structure of the first. Some flushes in between.
            let half = size / 2;
            let mut operations = Vec::new();
            for at in (0..half / (256 * K)).map(|n| session * half + n * 256 * K) {
                operations.push(write(at, 256 * K, at as u32));
                if at % (4 * M) == 0 {
                    operations.push(Operation::Flush);
                }
            }
            rig.run(&operations, &mut model);
            let found = rig.read_all();
            model.compare_all(&found).expect("what was written is read");
            rig.close();
            assert_clean(&image, &format!("clusters of {cluster}"));
        }
        let found = qemu.read_all(&image, Format::Qcow2).expect("read");
        model.compare_all(&found).expect("QEMU reads what was written");
    }
}

#[test]
fn discarded_space_goes_back_to_the_host() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let image = folder.path().join("trim.qcow2");
    qemu.create(&image, &ImageSpec::qcow2(64 * M)).expect("an image");
    let mut model = ByteModel::new(64 * M, 64 * K, DiscardRule::ZeroesClusters);
    let mut rig = Rig::open(&image, &options()).expect("opens");
    let fill: Vec<_> = (0..64).map(|n| write(n * M, 512 * K, n as u32)).chain([Operation::Flush]).collect();
    rig.run(&fill, &mut model);
    let full = rig.disk().allocated(0).expect("allocated");
    assert!(full >= 32 * M);
    let trim: Vec<_> =
        (0..63).map(|n| Operation::Discard { offset: n * M, length: M }).chain([Operation::Flush]).collect();
    rig.run(&trim, &mut model);
    let deadline = Instant::now() + Duration::from_secs(20);
    while rig.disk().allocated(0).expect("allocated") > full - 30 * M {
        assert!(Instant::now() < deadline, "{:?} of {full} bytes are still there", rig.disk().allocated(0));
        // Any request will do: it lets the queue's time pass.
        rig.run(&[Operation::Read { offset: 63 * M, length: 4 * K }], &mut model);
    }
    // The freed clusters are reused: the file grows at most by the window that was reserved before.
    let refill: Vec<_> = (0..60).map(|n| write(n * M, 256 * K, n as u32 + 100)).collect();
    rig.run(&refill, &mut model);
    rig.close();
    assert!(std::fs::metadata(&image).expect("image").len() <= full + 18 * M);
    assert_clean(&image, "the closed image");
    model.compare_all(&qemu.read_all(&image, Format::Qcow2).expect("read")).expect("contents");
}

#[test]
fn the_file_does_not_grow_from_session_to_session() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let image = folder.path().join("steady.qcow2");
    qemu.create(&image, &ImageSpec::qcow2(16 * M)).expect("an image");
    let mut model = ByteModel::new(16 * M, 64 * K, DiscardRule::ZeroesClusters);
    let mut lengths = Vec::new();
    for round in 0..8 {
        let mut rig = Rig::open(&image, &options()).expect("opens");
        for n in 0..4 {
            let at = n * 2 * M;
            let again = [
                write(at, 300 * K, round * 8 + n as u32),
                Operation::Flush,
                Operation::Discard { offset: at, length: 128 * K },
                Operation::Flush,
            ];
            rig.run(&again, &mut model);
        }
        rig.close();
        assert_clean(&image, "the closed image");
        lengths.push(std::fs::metadata(&image).expect("image").len());
    }
    assert!(lengths[7] <= lengths[1], "the file grows: {lengths:?}");
    model.compare_all(&qemu.read_all(&image, Format::Qcow2).expect("read")).expect("contents");
}

#[test]
fn a_fresh_image_is_left_as_it_was() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let image = folder.path().join("idle.qcow2");
    qemu.create(&image, &ImageSpec::qcow2(16 * M)).expect("an image");
    let mut before = std::fs::read(&image).expect("image");
    let rig = Rig::open(&image, &options()).expect("opens");
    let block = file_system_block(&rig);
    rig.close();
    // Only the last block of the file system is filled.
    before.resize(before.len().next_multiple_of(block as usize), 0);
    let mut model = ByteModel::new(16 * M, 64 * K, DiscardRule::ZeroesClusters);
    let mut rig = Rig::open(&image, &options()).expect("opens");
    rig.run(&[Operation::Discard { offset: 0, length: 16 * M }, Operation::Flush], &mut model);
    rig.close();
    assert!(
        std::fs::read(&image).expect("image") == before,
        "opening, discarding nothing and closing wrote to it"
    );
}

#[test]
fn a_file_of_small_clusters_grows_by_whole_blocks() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let image = folder.path().join("small.qcow2");
    // Five clusters of metadata, so that the first window begins inside a block.
    qemu.create(&image, &ImageSpec::qcow2(256 * M).cluster_size(2 * K)).expect("an image");
    let mut rig = Rig::open(&image, &options()).expect("opens");
    let block = file_system_block(&rig);
    let mut model = ByteModel::new(256 * M, 2 * K, DiscardRule::ZeroesClusters);
    for n in 0..24 {
        rig.run(&[write(n * M, 400 * K, n as u32 + 1)], &mut model);
        let length = std::fs::metadata(&image).expect("image").len();
        assert_eq!(length % block, 0, "{length} bytes end inside a block of the file system");
    }
    rig.close();
    assert_clean(&image, "the closed image");
    model.compare_all(&qemu.read_all(&image, Format::Qcow2).expect("read")).expect("contents");
}

#[test]
fn raw_images_equal_the_model() {
    let folder = tempfile::tempdir().expect("a folder");
    let image = folder.path().join("raw.img");
    let bytes: Vec<u8> = (0..3 * M + 700).map(|n| (n / 512) as u8 | 1).collect();
    std::fs::write(&image, &bytes).expect("an image");
    let size = 3 * M + 1024;
    let options = DiskOptions { format: DiskFormat::Raw, ..options() };
    let mut rig = Rig::open(&image, &options).expect("opens");
    // On a raw image discards give back whole blocks of the file system.
    let block = file_system_block(&rig);
    let mut model = ByteModel::with_contents(&bytes, size, block, DiscardRule::ZeroesClusters);
    assert_eq!(rig.disk().size(), size, "rounded up to whole sectors");
    let operations = [
        write(0, 4 * K, 1),
        write(65 * K, 100 * K, 2),
        Operation::WriteZeroes { offset: M, length: 65 * K, unmap: true },
        Operation::WriteZeroes { offset: 2 * M + 512, length: 1024, unmap: false },
        Operation::Discard { offset: 3 * K, length: 8 * K },
        Operation::Flush,
        Operation::Read { offset: 0, length: 512 * K },
        write(size - 512, 512, 3),
    ];
    rig.run(&operations, &mut model);
    model.compare_all(&rig.read_all()).expect("contents");
    rig.close();
    let found = std::fs::read(&image).expect("image");
    model.compare_all(&found).expect("contents of the file");
}

/// A file ends within a sector: that sector belongs to the disk, and its missing bytes are zeros.
#[test]
fn a_raw_file_may_end_within_a_sector() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let bytes = strata_kit::model::contents(1, 0, 5 * 512)[..4 * 512 + 100].to_vec();
    let (raw, over) = (folder.path().join("ragged"), folder.path().join("over.qcow2"));
    std::fs::write(&raw, &bytes).expect("a raw file");
    qemu.create(&over, &ImageSpec::qcow2(M).backing("ragged", Format::Raw)).expect("an overlay");
    let mut model = ByteModel::with_contents(&bytes, M, 64 * K, DiscardRule::ZeroesClusters);
    let mut rig = Rig::open(&over, &options()).expect("opens");
    model.compare_all(&rig.read_all()).expect("the overlay shows all of it");
    rig.run(&[write(3 * 512, 512, 2)], &mut model);
    rig.close();
    model
        .compare_all(&qemu.read_all(&over, Format::Qcow2).expect("read"))
        .expect("what was around is copied");
    assert!(std::fs::read(&raw).expect("the raw file") == bytes);

    let how = DiskOptions { format: DiskFormat::Raw, ..options() };
    let mut model = ByteModel::with_contents(&bytes, 5 * 512, 512, DiscardRule::ZeroesClusters);
    let mut rig = Rig::open(&raw, &DiskOptions { read_only: true, ..how.clone() }).expect("opens");
    model.compare_all(&rig.read_all()).expect("the disk");
    rig.close();
    assert!(std::fs::read(&raw).expect("the raw file") == bytes);
    let mut rig = Rig::open(&raw, &how).expect("opens");
    rig.run(&[write(0, 512, 3), Operation::Read { offset: 3 * 512, length: 1024 }], &mut model);
    rig.run(&[write(4 * 512, 512, 4)], &mut model);
    rig.close();
    model.compare_all(&std::fs::read(&raw).expect("the raw file")).expect("the file is the disk");
}

/// A disk ends within a sector, which only other programs produce: that sector is not part of the disk, as with QEMU.
#[test]
fn a_qcow2_disk_may_end_within_a_sector() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let (base, over) = (folder.path().join("ragged"), folder.path().join("over.qcow2"));
    let (size, served) = (M - 256, M - 512);
    let filled = ImageSpec::qcow2(M).with(Content::Pattern { offset: 0, length: M, byte: 1 });
    qemu.create(&base, &filled).expect("an image");
    let bytes = qemu.read_all(&base, Format::Qcow2).expect("read")[..served as usize].to_vec();
    patch(&base, qcow2::position::SIZE as u64, &size.to_be_bytes());
    qemu.create(&over, &ImageSpec::qcow2(M).backing("ragged", Format::Qcow2)).expect("an overlay");

    let mut model = ByteModel::with_contents(&bytes, M, 64 * K, DiscardRule::ZeroesClusters);
    let mut rig = Rig::open(&over, &options()).expect("opens");
    model.compare_all(&rig.read_all()).expect("the overlay shows its whole sectors");
    rig.run(&[write(served - 8 * K, 512, 2)], &mut model);
    model.compare_all(&rig.read_all()).expect("what was around is copied");
    rig.close();
    model.compare_all(&qemu.read_all(&over, Format::Qcow2).expect("read")).expect("QEMU reads the same");

    let mut model = ByteModel::with_contents(&bytes, served, 64 * K, DiscardRule::ZeroesClusters);
    let mut rig = Rig::open(&base, &options()).expect("opens");
    model.compare_all(&rig.read_all()).expect("the disk");
    let last = served / (64 * K) * (64 * K);
    // A cluster of unknown contents replaces the discarded one.
    let discard = Operation::Discard { offset: last, length: served - last };
    rig.run(&[discard, Operation::Flush, write(served - 1024, 1024, 3), write(last, 512, 4)], &mut model);
    model.compare_all(&rig.read_all()).expect("the disk");
    rig.close();
    assert_clean(&base, "a disk that ends within a sector");
    model.compare_all(&qemu.read_all(&base, Format::Qcow2).expect("read")).expect("QEMU reads the same");
}

#[test]
fn a_read_only_disk_reads_and_flushes_and_is_not_touched() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let image = folder.path().join("ro.qcow2");
    let content = Content::Pattern { offset: M, length: M, byte: 7 };
    qemu.create(&image, &ImageSpec::qcow2(4 * M).with(content)).expect("an image");
    let before = std::fs::read(&image).expect("image");
    let contents = qemu.read_all(&image, Format::Qcow2).expect("read");
    let mut model = ByteModel::with_contents(&contents, 4 * M, 64 * K, DiscardRule::ZeroesClusters);
    let options = DiskOptions { read_only: true, ..options() };
    let mut rig = Rig::open(&image, &options).expect("opens");
    let mut second = Rig::open(&image, &options).expect("readers share an image");
    second.run(&[Operation::Read { offset: M, length: 64 * K }], &mut model);
    rig.run(&[Operation::Flush], &mut model);
    model.compare_all(&rig.read_all()).expect("contents");
    for operation in [
        write(0, 512, 1),
        Operation::Discard { offset: 0, length: M },
        Operation::WriteZeroes { offset: 0, length: M, unmap: false },
    ] {
        assert!(rig.try_one(&operation).is_err(), "{operation:?} on a read-only disk");
    }
    rig.close();
    second.close();
    assert!(std::fs::read(&image).expect("image") == before);
}

#[test]
fn a_chain_of_64_layers_is_read_and_written() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let mut chain =
        vec![ImageSpec::qcow2(8 * M).with(Content::Pattern { offset: 0, length: 8 * M, byte: 1 })];
    for layer in 0..63u64 {
        let spec = ImageSpec::qcow2(8 * M).backing(PathBuf::new(), Format::Qcow2);
        // Every fourth layer has its own data.
        chain.push(if layer % 4 == 0 {
            spec.with(Content::Pattern { offset: layer * 128 * K, length: 96 * K, byte: layer as u8 + 2 })
        } else {
            spec
        });
    }
    let paths = qemu.create_chain(folder.path(), &chain).expect("a chain");
    let image = paths.last().expect("a top");
    let contents = qemu.read_all(image, Format::Qcow2).expect("read");
    let mut model = ByteModel::with_contents(&contents, 8 * M, 64 * K, DiscardRule::ZeroesClusters);
    let mut rig = Rig::open(image, &options()).expect("opens");
    model.compare_all(&rig.read_all()).expect("contents");
    let some: Vec<_> = (0..16).map(|n| write(n * 500 * K, 20 * K, n as u32)).collect();
    rig.run(&some, &mut model);
    model.compare_all(&rig.read_all()).expect("contents");
    rig.close();
    assert_clean(image, "the closed image");
    model.compare_all(&qemu.read_all(image, Format::Qcow2).expect("read")).expect("contents");
}

#[test]
fn unsupported_features_are_refused_by_name() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name);
    let create = |name: &str, options: &str| {
        let image = path(name);
        qemu.img(["create", "-q", "-f", "qcow2", "-o", options, &image.display().to_string(), "4M"])
            .expect("an image");
        image
    };
    let named = |image: &Path, options: &DiskOptions, word: &str| {
        let message = refused(image, options).to_string();
        assert!(message.contains(word), "{message:?} says nothing of {word:?}");
        assert!(message.contains(&image.display().to_string()), "{message:?} does not name the file");
    };
    let corrupt = create("corrupt.qcow2", "compat=1.1");
    patch(&corrupt, 72, &2u64.to_be_bytes());
    named(&corrupt, &options(), "corrupt");
    Rig::open(&corrupt, &DiskOptions { read_only: true, ..options() })
        .expect("reading a corrupt image")
        .close();
    let unknown = create("unknown.qcow2", "compat=1.1");
    patch(&unknown, 72, &(1u64 << 40).to_be_bytes());
    named(&unknown, &options(), "40");
    let text = path("text");
    std::fs::write(&text, "no image at all, but long enough to be read as one").expect("a file");
    named(&text, &options(), "not a qcow2 image");
}

#[test]
fn backing_files_are_opened_only_by_plain_name_and_known_format() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name);
    qemu.create(&path("base.raw"), &ImageSpec::raw(4 * M)).expect("a base");
    let overlay = |name: &str| {
        let image = path(name);
        let spec = ImageSpec::qcow2(4 * M).backing("base.raw", Format::Raw);
        qemu.create(&image, &spec).expect("an overlay");
        image
    };
    let rebase = |image: &Path, backing: &str, format: &[&str]| {
        let image = image.display().to_string();
        let mut arguments = vec!["rebase", "-u", "-b", backing];
        arguments.extend(format);
        arguments.push(&image);
        qemu.img(arguments).expect("a rebase");
    };
    Rig::open(&overlay("good.qcow2"), &options())
        .expect("a relative name is relative to the overlay")
        .close();
    let image = overlay("protocol.qcow2");
    rebase(&image, "nbd://127.0.0.1/x", &["-F", "raw"]);
    assert!(matches!(refused(&image, &options()), OpenError::BackingName { .. }));
    let image = overlay("json.qcow2");
    let name = |driver: &str, key: &str| {
        let base = path("base.raw");
        let base = base.display();
        format!(
            "json:{{\"driver\":\"raw\",{key}\"file\":{{\"driver\":\"{driver}\",\"filename\":\"{base}\"}}}}"
        )
    };
    rebase(&image, &name("host_device", ""), &["-F", "raw"]);
    assert!(matches!(refused(&image, &options()), OpenError::BackingName { .. }));
    rebase(&image, &name("file", "\"offset\":512,"), &["-F", "raw"]);
    let message = refused(&image, &options()).to_string();
    assert!(message.contains("offset") && message.contains("json.qcow2"), "{message}");
    rebase(&image, &name("file", ""), &["-F", "raw"]);
    Rig::open(&image, &options()).expect("a plain description of a file").close();
    let image = overlay("format.qcow2");
    rebase(&image, "base.raw", &["-F", "vmdk"]);
    assert!(matches!(refused(&image, &options()), OpenError::BackingFormatUnknown { .. }));
    let image = overlay("loop.qcow2");
    rebase(&image, "second.qcow2", &["-F", "qcow2"]);
    let second = overlay("second.qcow2");
    rebase(&second, "loop.qcow2", &["-F", "qcow2"]);
    let message = refused(&image, &DiskOptions { read_only: true, ..options() }).to_string();
    assert!(message.contains("loop"), "{message}");
    refused(&image, &options());
    // No format is recorded: the extension's magic becomes an unknown one.
    let image = overlay("none.qcow2");
    let bytes = std::fs::read(&image).expect("image");
    let at = bytes.windows(4).position(|four| four == [0xe2, 0x79, 0x2a, 0xca]).expect("a format extension");
    patch(&image, at as u64, &[0x12, 0x34, 0x56, 0x78]);
    assert!(matches!(refused(&image, &options()), OpenError::BackingFormatMissing { .. }));
    Rig::open(&image, &DiskOptions { backing_format: Some(DiskFormat::Raw), ..options() })
        .expect("opens")
        .close();
}

#[test]
fn a_damaged_table_is_named_and_the_image_marked_when_a_write_meets_it() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let image = folder.path().join("damaged.qcow2");
    let content = Content::Pattern { offset: 0, length: M, byte: 7 };
    qemu.create(&image, &ImageSpec::qcow2(4 * M).with(content)).expect("an image");
    let bytes = std::fs::read(&image).expect("image");
    let word = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
    let l2 = word(word(40) as usize) & 0x00ff_ffff_ffff_fe00;
    // The entry of the third cluster loses its alignment; that of the fourth stays.
    patch(&image, l2 + 16, &(word(l2 as usize + 16) | 0x200).to_be_bytes());
    let mut rig = Rig::open(&image, &options()).expect("opens");
    let message =
        rig.try_one(&Operation::Read { offset: 128 * K, length: 512 }).expect_err("damaged").to_string();
    assert!(message.contains("L2 table") && message.contains("entry 2"), "{message}");
    let mut model = ByteModel::with_contents(&[7; 1 << 20], 4 * M, 64 * K, DiscardRule::ZeroesClusters);
    rig.run(&[Operation::Read { offset: 192 * K, length: 64 * K }], &mut model);
    rig.run(&[write(0, 512, 1), Operation::Flush], &mut model);
    rig.try_one(&write(128 * K, 512, 1)).expect_err("damaged");
    assert!(rig.try_one(&write(0, 512, 1)).is_err(), "writes are refused once a write has met damage");
    drop(rig);
    let features = std::fs::read(&image).expect("image")[79];
    assert_eq!(features & 2, 2, "the corrupt bit is set");
    assert!(std::fs::metadata(&image).expect("image").size() > 0);
}

#[test]
fn a_dirty_image_gets_its_refcounts_rebuilt() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let image = folder.path().join("dirty.qcow2");
    let content = Content::Pattern { offset: 0, length: M, byte: 7 };
    qemu.create(&image, &ImageSpec::qcow2(4 * M).with(content)).expect("an image");
    let contents = qemu.read_all(&image, Format::Qcow2).expect("read");
    let bytes = std::fs::read(&image).expect("image");
    let word = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
    // As left by lazy refcounts: marked dirty, and the counts of two data clusters are not written yet.
    let block = word(word(48) as usize);
    let data = word((word(word(40) as usize) & 0x00ff_ffff_ffff_fe00) as usize) & 0x00ff_ffff_ffff_fe00;
    patch(&image, block + data / (64 * K) * 2, &[0; 4]);
    patch(&image, 72, &1u64.to_be_bytes());
    let mut model = ByteModel::with_contents(&contents, 4 * M, 64 * K, DiscardRule::ZeroesClusters);
    let mut rig = Rig::open(&image, &options()).expect("opens");
    rig.run(&[write(2 * M, 256 * K, 1), Operation::Flush], &mut model);
    rig.close();
    assert_eq!(std::fs::read(&image).expect("image")[79] & 1, 0, "no longer dirty");
    assert_clean(&image, "the closed image");
    model.compare_all(&qemu.read_all(&image, Format::Qcow2).expect("read")).expect("contents");
}

#[test]
fn unknown_autoclear_bits_are_cleared_on_a_writable_open_only() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let image = folder.path().join("autoclear.qcow2");
    qemu.create(&image, &ImageSpec::qcow2(4 * M)).expect("an image");
    let bits = (1u64 << 33).to_be_bytes();
    patch(&image, 88, &bits);
    let field = || std::fs::read(&image).expect("image")[88..96].to_vec();
    Rig::open(&image, &DiskOptions { read_only: true, ..options() }).expect("opens").close();
    assert_eq!(field(), bits);
    Rig::open(&image, &options()).expect("opens").close();
    assert_eq!(field(), [0; 8]);
}

/// An internal snapshot shares L2 tables, data clusters and compressed data with the active image. No cluster with a
/// refcount above 1 is written in place, and every refcount is right afterwards.
#[test]
fn shared_clusters_are_copied_before_they_change() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    for (name, cluster, parts) in [("small", 4 * K, false), ("large", 64 * K, false), ("parts", 64 * K, true)]
    {
        let image = folder.path().join(format!("{name}.qcow2"));
        let mut spec = ImageSpec::qcow2(8 * M)
            .cluster_size(cluster)
            .with(Content::Pattern { offset: 0, length: 3 * M, byte: 5 })
            .with(Content::Zeroes { offset: 2 * M, length: 512 * K, unmap: false })
            .with(Content::Compressed { offset: 3 * M, length: M, byte: 6 });
        spec.extended_l2 = parts;
        for n in 0..6 {
            // Some subclusters of a cluster, some of them zero.
            let offset = 6 * M + n * 64 * K;
            spec = spec
                .with(Content::Pattern { offset: offset + 6 * K, length: 20 * K, byte: 6 })
                .with(Content::Zeroes { offset: offset + 12 * K, length: 4 * K, unmap: false });
        }
        qemu.create(&image, &spec).expect("an image");
        let text = image.display().to_string();
        qemu.img(["snapshot", "-c", "kept", &text]).expect("a snapshot");
        let before = qemu.read_all(&image, Format::Qcow2).expect("read");
        let mut model =
            ByteModel::with_contents(&before, 8 * M, spec.granule_size(), DiscardRule::ZeroesClusters);
        let mut rig = Rig::open(&image, &options()).expect("opens");
        let operations = [
            // Subclusters: an allocated, an unallocated and a zero one. The write to the last covers two clusters.
            write(6 * M + 8 * K, 2 * K, 7),
            write(6 * M + 64 * K + 40 * K + 512, 1024, 8),
            write(6 * M + 2 * 64 * K + 12 * K, 4 * K, 9),
            write(6 * M + 4 * 64 * K - 50 * K, 70 * K, 10),
            Operation::WriteZeroes { offset: 6 * M + 4 * 64 * K + 8 * K, length: 2 * K, unmap: false },
            Operation::Discard { offset: 6 * M + 5 * 64 * K + 4 * K, length: 30 * K },
            write(512, 1024, 1),
            write(cluster * 3 + 512, 2 * cluster, 2),
            Operation::Flush,
            Operation::Discard { offset: M, length: 256 * K },
            Operation::WriteZeroes { offset: M + 512 * K, length: 128 * K, unmap: false },
            Operation::WriteZeroes { offset: M + 768 * K, length: 64 * K, unmap: true },
            write(2 * M + 512, 4 * K, 3),
            write(5 * M, 300 * K, 4),
            Operation::Flush,
            write(512, 4096, 5),
            write(M + 512, 70 * K, 6),
            write(3 * M + 512, 70 * K, 7),
            Operation::Discard { offset: 3 * M + 512 * K, length: 128 * K },
            Operation::WriteZeroes { offset: 3 * M + 768 * K, length: 128 * K, unmap: false },
            Operation::Flush,
            write(3 * M + 512 * K, 64 * K, 8),
            write(6 * M + 4 * 64 * K + 8 * K, 512, 11),
            write(6 * M + 5 * 64 * K + 4 * K, 512, 12),
        ];
        rig.run(&operations, &mut model);
        model.compare_all(&rig.read_all()).expect("contents");
        rig.close();
        assert_clean(&image, &format!("clusters of {cluster}"));
        model.compare_all(&qemu.read_all(&image, Format::Qcow2).expect("read")).expect("contents");
        let kept = DiskOptions { snapshot: Some("kept".into()), ..options() };
        let mut rig = Rig::open(&image, &kept).expect("the snapshot opens");
        assert!(rig.read_all() == before, "the snapshot reads otherwise");
        assert!(rig.try_one(&write(0, 512, 1)).is_err(), "a snapshot is not written");
        rig.close();
        qemu.img(["snapshot", "-a", "kept", &text]).expect("the snapshot is applied");
        assert!(qemu.read_all(&image, Format::Qcow2).expect("read") == before, "the snapshot changed");
    }
}

/// A write into a new cluster copies nothing and writes few bytes, however large the cluster is. So the work in flight leaves
/// room for as many as a guest has.
#[test]
fn writes_into_new_clusters_of_two_mib_leave_room_for_many() {
    const COUNT: u64 = 128;
    // It is about the value of the bound.
    if disk::bounds::ARE_TINY {
        return;
    }
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let image = folder.path().join("large.qcow2");
    qemu.create(&image, &ImageSpec::qcow2((COUNT + 1) * 2 * M).cluster_size(2 * M)).expect("an image");
    let disk = Disk::open(HostStorage::new(), &image, &options()).expect("opens");
    let mut queue = disk.queue(COUNT as u32).expect("a queue");
    let memory = [GuestSlice::from(Vec::leak(vec![7; 4096]))];
    let finish = |queue: &mut DiskQueue<HostStorage>, count: usize| {
        let mut done = Vec::new();
        while done.len() < count {
            queue.poll(&mut done);
            queue.wait(Some(Duration::from_millis(1)));
        }
        assert!(done.iter().all(|done| done.result.is_ok()));
    };
    let write = |number: u64| Request::Write { offset: number * 2 * M, write_through: false };
    // The first write finds nothing known of its range.
    queue.submit(RequestId(0), write(COUNT), &memory);
    finish(&mut queue, 1);
    for number in 0..COUNT {
        assert!(queue.has_room(), "room for {number} of {COUNT} writes");
        queue.submit(RequestId(number as u32), write(number), &memory);
    }
    finish(&mut queue, COUNT as usize);
    drop(queue);
    disk.close().expect("a clean close");
    assert_clean(&image, "the closed image");
}
