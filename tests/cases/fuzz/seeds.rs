//! The seeds of the fuzzing: small images made by QEMU's tools, and parts of them.
//!
//! Owns the choice of images, and how to cut an input for each target out of one.

use std::io::Write as _;
use std::path::Path;

use flate2::write::DeflateEncoder;
use qcow2::{Geometry, Header, Incompatible, position};
use strata_kit::Qemu;
use strata_kit::images::{Content, Format, ImageSpec, Preallocation};

use strata_fuzz_targets::encode_image;

const K: u64 = 1024;

/// Inputs, each with its target's name.
pub type Seeds = Vec<(&'static str, Vec<u8>)>;

/// An image's bytes.
struct Sample(Vec<u8>);

fn pattern(offset: u64, length: u64, byte: u8) -> Content {
    Content::Pattern { offset, length, byte }
}

fn filled(size: u64, cluster: u64) -> ImageSpec {
    ImageSpec::qcow2(size)
        .cluster_size(cluster)
        .with(pattern(0, 3 * cluster, 1))
        .with(pattern(size - cluster, cluster, 2))
        .with(Content::Zeroes { offset: cluster, length: cluster, unmap: false })
        .with(Content::Zeroes { offset: 4 * cluster, length: cluster, unmap: true })
}

fn specs() -> Vec<ImageSpec> {
    let width = |mut spec: ImageSpec, bits| {
        spec.refcount_bits = bits;
        spec
    };
    let packed = |spec: ImageSpec, cluster: u64| {
        spec.with(Content::Compressed { offset: 6 * cluster, length: 2 * cluster, byte: 7 })
    };
    vec![
        filled(48 * K, 512),
        filled(256 * K, 4 * K).version(2),
        width(filled(40 * K, 512), 64),
        width(filled(2048 * K, 64 * K), 1),
        packed(filled(256 * K, 4 * K), 4 * K),
        packed(filled(64 * K, 512).zstd(), 512),
        packed(filled(512 * K, 16 * K).extended(), 16 * K).with(pattern(9 * 16 * K + 512, 1024, 3)),
        filled(128 * K, 4 * K).backing("base", Format::Raw),
        ImageSpec::qcow2(64 * K).cluster_size(512).preallocation(Preallocation::Metadata),
        ImageSpec::qcow2(1 << 40).with(pattern(0, 512, 3)).with(pattern(1 << 39, 512, 3)),
    ]
}

fn samples(qemu: &Qemu, folder: &Path) -> Vec<Sample> {
    std::fs::write(folder.join("base"), [0xba; 16 << 10]).expect("a file below");
    let image = folder.join("top");
    let mut samples = Vec::new();
    let mut take = |image: &Path| samples.push(Sample(std::fs::read(image).expect("the image")));
    for spec in specs() {
        qemu.create(&image, &spec).expect("an image");
        take(&image);
    }
    let text = image.display().to_string();
    for spec in [filled(64 * K, 512).version(2), filled(256 * K, 4 * K)] {
        qemu.create(&image, &spec).expect("an image");
        qemu.img(["snapshot", "-c", "first", &text]).expect("a snapshot");
        qemu.write(&image, Format::Qcow2, &[pattern(0, 8 * K, 5)]).expect("written");
        qemu.img(["snapshot", "-c", "another", &text]).expect("a snapshot");
        take(&image);
    }
    qemu.create(&image, &filled(256 * K, 4 * K)).expect("an image");
    for name in ["one", "other"] {
        qemu.img(["bitmap", "--add", "-g", "4K", &text, name]).expect("a bitmap");
    }
    qemu.write(&image, Format::Qcow2, &[pattern(16 * K, 8 * K, 5)]).expect("written");
    take(&image);
    for how in ["", ",data_file_raw=on"] {
        let how = format!("cluster_size=4k,data_file={}{how}", folder.join("data").display());
        qemu.img(["create", "-q", "-f", "qcow2", "-o", &how, &text, "256k"]).expect("an image");
        qemu.write(&image, Format::Qcow2, &[pattern(8 * K, 12 * K, 5)]).expect("written");
        take(&image);
    }
    // As after an unclean shutdown.
    let mut dirty = samples[0].0.clone();
    dirty[position::INCOMPATIBLE + 7] |= Incompatible::DIRTY.0 as u8;
    samples.push(Sample(dirty));
    samples
}

/// The seeds of all targets.
pub fn all(qemu: &Qemu) -> Seeds {
    let folder = tempfile::tempdir().expect("a folder");
    let mut seeds = [compressed(), rings(), packed_rings()].concat();
    for Sample(file) in samples(qemu, folder.path()) {
        let header = Header::parse(&file, file.len() as u64).expect("QEMU's own header");
        seeds.push(("header", file[..file.len().min(1024)].to_vec()));
        let area = &file[header.header_length as usize..512];
        for how in [0, 6] {
            seeds.push(("extensions", [&[how][..], area].concat()));
        }
        seeds.push(("tables", tables(&file, &header)));
        if header.snapshots > 0 {
            let table = &file[header.snapshots_offset.0 as usize..];
            let count = (header.snapshots as u16).to_be_bytes();
            seeds.push(("snapshots", [&count, &table[..table.len().min(512)]].concat()));
        }
        if let Some(bitmaps) = header.bitmaps() {
            let start = bitmaps.directory_offset.0 as usize;
            let directory = &file[start..start + bitmaps.directory_size as usize];
            let mut input = (bitmaps.count as u16).to_be_bytes().to_vec();
            input.extend((bitmaps.directory_size as u16).to_be_bytes());
            input.push(3);
            input.extend(directory);
            seeds.push(("bitmaps", input));
        }
        seeds.extend(
            scripts()
                .into_iter()
                .filter_map(|(how, script)| encode_image(how, &script, &file).map(|input| ("image", input))),
        );
    }
    seeds
}

/// The initial scripts: all kinds of requests, a repair, changes of snapshots and of the size.
fn scripts() -> Vec<(u8, Vec<[u8; 5]>)> {
    let requests = [
        [0x20, 0, 0, 255, 0],
        [6, 0, 1, 9, 0x51],
        [4, 0, 4, 20, 0],
        [3, 0, 40, 8, 1],
        [8, 0, 0, 0, 0],
        [0x27, 0x80, 3, 30, 0x52],
        [9, 0, 0, 0, 0],
        [0x37, 0, 2, 1, 0x53],
        [10, 0, 0, 0, 0],
        [5, 0, 3, 0, 0x54],
        [0, 0, 0, 60, 0],
    ];
    let snapshots = [[0, 0, 0, 0, 0], [2, 0, 0, 0, 0], [3, 0, 0, 0, 0], [1, 0, 0, 0, 0]];
    let sizes = [[0, 0, 200, 0, 0], [1, 1, 3, 0, 0], [2 + 20, 0, 7, 0, 0], [3, 0, 9, 0, 0]];
    vec![
        (0, requests.to_vec()),
        (1, requests.to_vec()),
        (4, Vec::new()),
        (6, snapshots.to_vec()),
        (8, sizes.to_vec()),
        (10, requests.to_vec()),
        (26, requests.to_vec()),
    ]
}

/// The first entries of the tables, each preceded by the geometry.
fn tables(file: &[u8], header: &Header) -> Vec<u8> {
    let geometry = header.geometry();
    let word = |at: u64| qcow2::entry(&file[at as usize..], 0);
    let (l1, refcounts) = (header.l1_offset.0, header.refcount_table_offset.0);
    let l2 = word(l1) & qcow2::entry::OFFSET_MASK;
    let places = [l1, refcounts, l2, l2 + geometry.l2_entry_size(), l2 + 6 * geometry.l2_entry_size()];
    places.iter().flat_map(|at| tagged(&geometry, word(*at), word(at + 8))).collect()
}

fn tagged(geometry: &Geometry, first: u64, second: u64) -> Vec<u8> {
    let extended = u8::from(geometry.extended_l2) << 1;
    let how = extended | (geometry.refcount_order as u8) << 2;
    let bits = geometry.cluster_bits as u8 - if geometry.extended_l2 { 14 } else { 9 };
    [&[how, bits][..], &first.to_be_bytes(), &second.to_be_bytes(), &[1]].concat()
}

/// Packed rings of several sizes with reads of three descriptors each, in the ring or in an indirect table. The last round
/// overwrites a byte of the ring.
fn packed_rings() -> Seeds {
    let part = |place: u16, length: u16, flags: u8| {
        [&place.to_be_bytes()[..], &length.to_be_bytes(), &[flags]].concat()
    };
    let three = [part(0x1800, 16, 0), part(0x2000, 4096, 2), part(0x1810, 1, 2)];
    let tables: Vec<u8> = (0..48).flat_map(|entry| [&three[entry % 3][..], &[0]].concat()).collect();
    let mut seeds = Vec::new();
    for how in [0x06_u8, 0x2b, 0x3f, 0x21] {
        let send = |id: u8| match id % 2 {
            0 => [&[2, id][..], &three.concat()].concat(),
            _ => [&[0, id][..], &part(0, 48, 4)].concat(),
        };
        let round = |number: u8| {
            let sent: Vec<u8> = (4 * number..4 * number + 4).flat_map(send).collect();
            let overwrites: &[u8] = if number == 5 { &[0xe4, 0, 46, 0x80] } else { &[4] };
            [
                &[4][..],
                &overwrites[..1],
                &sent,
                &overwrites[1..],
                &[number, 2],
                &[3, 1, 16, 1, 0, 0, 1, 0, 0, 7],
            ]
            .concat()
        };
        let rounds: Vec<u8> = (0..6).flat_map(round).collect();
        seeds.push(("packed", [&[how, 0x80, 2][..], &tables, &rounds].concat()));
    }
    seeds
}

/// Rings of several sizes with reads of three descriptors each, in the ring or in an indirect table.
fn rings() -> Seeds {
    let descriptor = |place: u16, length: u16, flags: u8, next: u8| {
        [&place.to_be_bytes()[..], &length.to_be_bytes(), &[flags, next]].concat()
    };
    let three = |first: u8| {
        [
            descriptor(0x1800, 16, 1, first + 1),
            descriptor(0x2000, 4096, 3, first + 2),
            descriptor(0x1810, 1, 2, 0),
        ]
        .concat()
    };
    let mut seeds = Vec::new();
    for how in [0x03_u8, 0x0b, 0x05, 0x0d] {
        let size = 2_usize << (how & 7);
        let direct: Vec<u8> = (0..size / 3).flat_map(|chain| three(3 * chain as u8)).collect();
        let indirect: Vec<u8> = (0..size).flat_map(|_| descriptor(0, 48, 4, 0)).collect();
        for mut table in [direct, indirect] {
            table.resize(6 * size, 0);
            let tables: Vec<u8> = (0..48).step_by(3).flat_map(|_| three(0)).collect();
            let round = |event: u8| [&[2, 0, event][..], &[0, 3, 2, 0, 0, 17, 0, 0, 1]].concat();
            let rounds: Vec<u8> = (0..4).flat_map(|number| round(2 * number + 1)).collect();
            seeds.push(("ring", [&[how, 0xff, 0xfe, 0xff, 0xfd][..], &table, &tables, &rounds].concat()));
        }
    }
    seeds
}

/// Streams of both kinds, for several cluster sizes.
fn compressed() -> Seeds {
    let mut seeds = Vec::new();
    for (how, cluster) in [(0_u8, 512), (0x70, 64 << 10), (0x32, 16 << 10), (8, 512)] {
        let contents: Vec<u8> = (0..cluster).map(|at: u32| (at / 7 * at % 251) as u8 & 0x1f).collect();
        let mut encoder = DeflateEncoder::new(Vec::new(), flate2::Compression::best());
        encoder.write_all(&contents).expect("to memory");
        let deflate = encoder.finish().expect("to memory");
        let zstd = zstd::bulk::compress(&contents, 3).expect("to memory");
        let (first, second) = contents.split_at(contents.len() / 2);
        let frames = [first, second].map(|part| zstd::bulk::compress(part, 1).expect("to memory")).concat();
        for (kind, stream) in [(0, &deflate), (1, &zstd), (1, &frames)] {
            let wild = 0x4000_0000_0000_0000_u64.to_be_bytes();
            for start in [0_u16, 100] {
                let input = [&[how | kind][..], &wild, &start.to_be_bytes(), stream].concat();
                seeds.push(("compressed", input));
            }
        }
    }
    seeds
}
