//! Against qemu-img: images that it created are parsed correctly, and images created here pass its check.
//!
//! Without qemu-img on PATH each test prints that it is skipped; with `STRATA_REQUIRE_TOOLS=1` it fails instead.
#![allow(
    clippy::disallowed_types,
    clippy::disallowed_methods,
    reason = "the tests run QEMU's tools on files"
)]

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use qcow2::{Compression, Geometry, Header, Incompatible, NewImage, Unsupported, Version};
use tempfile::TempDir;

/// A temporary folder in which QEMU's tools run.
struct Qemu {
    folder: TempDir,
}

impl Qemu {
    /// `None` if QEMU's tools are not installed.
    fn find(test: &str) -> Option<Qemu> {
        for tool in ["qemu-img", "qemu-io"] {
            if Command::new(tool).arg("--version").output().is_err() {
                let required = std::env::var_os("STRATA_REQUIRE_TOOLS").is_some_and(|value| value == "1");
                assert!(!required, "STRATA_REQUIRE_TOOLS=1, but {tool} is not installed");
                // Not eprintln, whose output the test harness hides when a test passes.
                let _ = writeln!(std::io::stderr(), "SKIPPED {test}: {tool} is not installed");
                return None;
            }
        }
        Some(Qemu { folder: TempDir::new().expect("a temporary folder") })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Runs a tool in the folder. Returns its output; after a failure the command line and the output.
    fn try_run(&self, tool: &str, arguments: &[&str]) -> Result<String, String> {
        let output =
            Command::new(tool).args(arguments).current_dir(&self.folder).output().expect("an installed tool");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        if output.status.success() {
            return Ok(text);
        }
        Err(format!("{tool} {arguments:?}: {text}{}", String::from_utf8_lossy(&output.stderr)))
    }

    #[track_caller]
    fn run(&self, tool: &str, arguments: &[&str]) -> String {
        self.try_run(tool, arguments).unwrap_or_else(|error| panic!("{error}"))
    }

    #[track_caller]
    fn create(&self, options: &str, more: &[&str]) {
        let _ = fs::remove_file(self.path("image"));
        self.run("qemu-img", &[&["create", "-q", "-f", "qcow2", "-o", options], more].concat());
    }

    /// Parses a header as a program would: first the prefix, then as many bytes as the hint requires. Checks that the
    /// header is encoded to the same bytes.
    #[track_caller]
    fn header(&self) -> Header {
        let path = self.path("image");
        let length = fs::metadata(&path).expect("an image").len();
        let read = |bytes| {
            let mut data = Vec::new();
            File::open(&path).expect("an image").take(bytes).read_to_end(&mut data).expect("it can be read");
            data
        };
        let wanted = Header::cluster_size_hint(&read(Header::PREFIX_MAX as u64)).expect("a qcow2 image");
        let cluster = read(wanted);
        let header = Header::parse(&cluster, length).expect("a valid image");
        let encoded = header.encode().expect("a valid header");
        assert!(cluster[..encoded.len()] == encoded, "the bytes differ from qemu-img's");
        assert!(cluster[encoded.len()..].iter().all(|byte| *byte == 0), "bytes were dropped");
        header
    }

    fn write(&self, image: &NewImage) {
        let file = File::create(self.path("image")).expect("a new file");
        let mut end = 0;
        for (offset, bytes) in image.layout().expect("a valid geometry") {
            assert_eq!(offset.0, end, "there is a gap between two pieces");
            file.write_all_at(&bytes, offset.0).expect("it can be written");
            end += bytes.len() as u64;
        }
        assert_eq!(end % image.geometry.cluster_size(), 0);
    }
}

const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=21;
const VERSIONS: [(Version, &str); 2] = [(Version::V2, "0.10"), (Version::V3, "1.1")];

#[test]
fn headers_of_every_cluster_size_are_read() {
    let Some(qemu) = Qemu::find("headers_of_every_cluster_size_are_read") else { return };
    for (version, compat) in VERSIONS {
        for cluster_bits in CLUSTER_BITS {
            let options = format!("compat={compat},cluster_size={}", 1 << cluster_bits);
            qemu.create(&options, &["image", "1073742336"]);
            let header = qemu.header();
            let geometry = Geometry {
                version,
                cluster_bits,
                refcount_order: 4,
                extended_l2: false,
                size: 1_073_742_336,
            };
            assert_eq!(header.geometry(), geometry);
            assert_eq!((header.unsupported(), header.write_refusal()), (None, None));
            assert_eq!(u64::from(header.l1_entries), geometry.l1_entries());
            assert_eq!((header.backing_file, header.backing_format), (None, None));
        }
    }
}

#[test]
fn backing_files_are_read() {
    let Some(qemu) = Qemu::find("backing_files_are_read") else { return };
    qemu.run("qemu-img", &["create", "-q", "-f", "raw", "base.raw", "1M"]);
    qemu.run("qemu-img", &["create", "-q", "-f", "qcow2", "bäse.qcow2", "1M"]);
    for (_, compat) in VERSIONS {
        for (cluster_size, format) in [("512", "raw"), ("64k", "qcow2"), ("2M", "raw")] {
            let name = if format == "raw" { "base.raw" } else { "bäse.qcow2" };
            let options = format!("compat={compat},cluster_size={cluster_size}");
            qemu.create(&options, &["-b", name, "-F", format, "image"]);
            let header = qemu.header();
            assert_eq!(header.backing_file.as_deref(), Some(name.as_bytes()));
            assert_eq!(header.backing_file.as_deref(), Some(name.as_bytes()));
            assert_eq!(header.backing_format.as_deref(), Some(format));
            assert_eq!(header.size, 1 << 20);
        }
    }
}

#[test]
fn features_are_read() {
    let Some(qemu) = Qemu::find("features_are_read") else { return };
    for order in 0..=6 {
        qemu.create(&format!("refcount_bits={}", 1 << order), &["image", "1M"]);
        assert_eq!(qemu.header().refcount_order, order);
    }
    qemu.create("lazy_refcounts=on", &["image", "1M"]);
    let header = qemu.header();
    assert_eq!((header.compatible, header.unsupported(), header.write_refusal()), (1, None, None));

    qemu.create("extended_l2=on", &["image", "1G"]);
    let header = qemu.header();
    assert!(header.geometry().extended_l2);
    assert_eq!(u64::from(header.l1_entries), header.geometry().l1_entries());
    assert_eq!(header.unsupported(), None);
    assert_eq!(header.write_refusal(), None);

    for (how, raw) in [("data_file=data.raw", false), ("data_file=data.raw,data_file_raw=on", true)] {
        qemu.create(how, &["image", "1M"]);
        let header = qemu.header();
        assert_eq!((header.unsupported(), header.write_refusal()), (None, None));
        assert_eq!((header.has_data_file(), header.is_data_file_raw()), (true, raw));
        assert_eq!(header.data_file_name(), Some(b"data.raw".as_slice()));
    }

    let key = ["--object", "secret,id=key,data=secret", "image", "1M"];
    qemu.create("encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10", &key);
    assert_eq!(qemu.header().unsupported(), Some(Unsupported::Encryption { method: 2 }));
}

#[test]
fn the_compression_type_is_read() {
    let Some(qemu) = Qemu::find("the_compression_type_is_read") else { return };
    qemu.create("compression_type=zlib", &["image", "1M"]);
    assert_eq!(qemu.header().unsupported(), None);
    match qemu
        .try_run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", "compression_type=zstd", "image", "1M"])
    {
        Ok(_) => {
            let header = qemu.header();
            assert!(header.incompatible.contains(Incompatible::COMPRESSION));
            assert_eq!((header.unsupported(), header.compression()), (None, Some(Compression::Zstd)));
        }
        // This build of QEMU has no zstd.
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "SKIPPED a part of the_compression_type_is_read: {error}");
        }
    }
}

#[test]
fn snapshots_and_bitmaps_are_read() {
    let Some(qemu) = Qemu::find("snapshots_and_bitmaps_are_read") else { return };
    qemu.create("compat=1.1", &["image", "1M"]);
    qemu.run("qemu-img", &["bitmap", "--add", "image", "dirty"]);
    let header = qemu.header();
    assert_eq!((header.autoclear, header.write_refusal()), (1, None));
    assert!(header.extensions.iter().any(|extension| extension.magic == qcow2::extension::BITMAPS));
    for count in 1..=2 {
        qemu.run("qemu-img", &["snapshot", "-c", &format!("snapshot-{count}"), "image"]);
        assert_eq!(qemu.header().snapshots, count);
    }
}

#[test]
fn an_unknown_feature_has_the_name_from_the_image() {
    let Some(qemu) = Qemu::find("an_unknown_feature_has_the_name_from_the_image") else { return };
    qemu.create("compat=1.1", &["image", "1M"]);
    let mut header = qemu.header();
    let names = header.extensions.iter_mut().find(|e| e.magic == qcow2::extension::FEATURE_NAMES);
    // The table names the known bits; its first entry is changed to name another bit.
    names.expect("qemu-img writes the table").data[1] = 40;
    header.incompatible = header.incompatible.with(Incompatible(1 << 40));
    let name = Some(b"dirty bit".to_vec());
    assert_eq!(header.unsupported(), Some(Unsupported::IncompatibleFeature { bit: 40, name }));
}

/// Checks the image with qemu-img, then writes to it with qemu-io and checks it again.
#[track_caller]
fn assert_usable(qemu: &Qemu, geometry: &Geometry) {
    let context = format!("{geometry:?}");
    if let Err(error) = qemu.try_run("qemu-img", &["check", "-q", "-f", "qcow2", "image"]) {
        panic!("{context}: {error}");
    }
    let info = qemu.run("qemu-img", &["info", "--output=json", "-f", "qcow2", "image"]);
    for field in [
        format!("\"virtual-size\": {}", geometry.size),
        format!("\"cluster-size\": {}", geometry.cluster_size()),
        format!("\"refcount-bits\": {}", 1 << geometry.refcount_order),
    ] {
        assert!(info.contains(&field), "{context}: no {field} in {info}");
    }
    if geometry.size >= 8192 {
        let last = format!("write -P 7 {} 4096", (geometry.size - 4096) & !511);
        let commands =
            ["-f", "qcow2", "-c", "write -P 6 0 4096", "-c", &last, "-c", "read -P 6 0 4096", "image"];
        let output = qemu.run("qemu-io", &commands);
        assert!(!output.contains("failed"), "{context}: {output}");
        if let Err(error) = qemu.try_run("qemu-img", &["check", "-q", "-f", "qcow2", "image"]) {
            panic!("{context}, after writes: {error}");
        }
    }
}

#[test]
fn new_images_of_every_cluster_size_pass_the_check() {
    let Some(qemu) = Qemu::find("new_images_of_every_cluster_size_pass_the_check") else { return };
    for (version, _) in VERSIONS {
        for cluster_bits in CLUSTER_BITS {
            for size in [0, 512, 100 << 20] {
                let geometry =
                    Geometry { version, cluster_bits, refcount_order: 4, extended_l2: false, size };
                qemu.write(&NewImage::new(geometry));
                assert_usable(&qemu, &geometry);
            }
        }
    }
}

#[test]
fn new_images_of_every_refcount_width_pass_the_check() {
    let Some(qemu) = Qemu::find("new_images_of_every_refcount_width_pass_the_check") else { return };
    for refcount_order in 0..=6 {
        for (cluster_bits, size) in [(9, 4 << 30), (16, 1 << 40)] {
            let version = Version::V3;
            let geometry = Geometry { version, cluster_bits, refcount_order, extended_l2: false, size };
            qemu.write(&NewImage::new(geometry));
            assert_usable(&qemu, &geometry);
        }
    }
    let geometry = Geometry {
        version: Version::V3,
        cluster_bits: 16,
        refcount_order: 4,
        extended_l2: true,
        size: 1 << 40,
    };
    qemu.write(&NewImage::new(geometry));
    assert_usable(&qemu, &geometry);
}

#[test]
fn the_largest_new_image_passes_the_check_and_one_sector_more_is_refused() {
    let Some(qemu) = Qemu::find("the_largest_new_image_passes_the_check_and_one_sector_more_is_refused")
    else {
        return;
    };
    let version = Version::V3;
    for refcount_order in [4, 6] {
        let size = 128 << 30;
        let geometry = Geometry { version, cluster_bits: 9, refcount_order, extended_l2: false, size };
        qemu.write(&NewImage::new(geometry));
        assert_usable(&qemu, &geometry);
        assert!(NewImage::new(Geometry { size: size + 512, ..geometry }).layout().is_err());
    }
}

#[test]
fn new_overlays_read_their_backing_file() {
    let Some(qemu) = Qemu::find("new_overlays_read_their_backing_file") else { return };
    qemu.run("qemu-img", &["create", "-q", "-f", "qcow2", "base.qcow2", "1M"]);
    qemu.run("qemu-io", &["-f", "qcow2", "-c", "write -P 5 0 1M", "base.qcow2"]);
    for (version, _) in VERSIONS {
        for cluster_bits in CLUSTER_BITS {
            let size = 1 << 20;
            let geometry = Geometry { version, cluster_bits, refcount_order: 4, extended_l2: false, size };
            let mut image = NewImage::new(geometry);
            image.backing_file = Some(b"base.qcow2".to_vec());
            image.backing_format = Some("qcow2".to_owned());
            qemu.write(&image);
            let compared = ["compare", "-q", "-f", "qcow2", "-F", "qcow2", "image", "base.qcow2"];
            qemu.run("qemu-img", &compared);
            let info = qemu.run("qemu-img", &["info", "--output=json", "image"]);
            assert!(info.contains("\"backing-filename-format\": \"qcow2\""), "{info}");
            assert_usable(&qemu, &geometry);
        }
    }
}

#[test]
fn a_rewritten_header_still_describes_the_same_image() {
    let Some(qemu) = Qemu::find("a_rewritten_header_still_describes_the_same_image") else { return };
    fn rewrite(path: &Path, header: &Header) {
        let file = File::options().write(true).open(path).expect("an image");
        file.write_all_at(&header.encode().expect("a valid header"), 0).expect("it can be written");
    }
    qemu.create("compat=1.1", &["image", "1M"]);
    qemu.run("qemu-img", &["bitmap", "--add", "image", "dirty"]);
    qemu.run("qemu-img", &["create", "-q", "-f", "raw", "base.raw", "1M"]);
    let mut header = qemu.header();
    header.backing_file = Some(b"base.raw".to_vec());
    header.set_backing_format(Some("raw"));
    rewrite(&qemu.path("image"), &header);
    assert_eq!(qemu.header(), header);
    qemu.run("qemu-img", &["check", "-q", "image"]);
    let info = qemu.run("qemu-img", &["info", "--output=json", "image"]);
    for field in ["\"full-backing-filename\": \"base.raw\"", "\"name\": \"dirty\""] {
        assert!(info.contains(field), "{info}");
    }
}
