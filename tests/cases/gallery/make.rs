//! Makes an image from its recipe with qemu-img and qemu-io, and knows its contents without reading it.
//!
//! Owns the contents of new images: pieces of patterns with odd lengths. So no two sectors near each other are alike,
//! and all data compresses, some well and some badly.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::look::{
    Allocated, Below, Compression, Data, Discarding, L2, Lazy, Look, Memory, Recipe, Size, Snapshots,
    Version, Zeros,
};
use disk::{DetectZeroes, Discards, DiskOptions};
use strata_kit::client::SECTOR;
use strata_kit::images::{Format, ImageError, ImageSpec, Preallocation, memory_folder};
use strata_kit::model::{DiscardRule, contents};
use strata_kit::random::Random;
use strata_kit::{ByteModel, Qemu};
use strata_rig::bench::{Bench, Deed};
use strata_rig::{K, M, options};
use tempfile::TempDir;

/// Lengths of the patterns in bytes: primes, below the window of QEMU's deflate streams.
const PATTERNS: [u64; 4] = [61, 251, 1021, 4093];

/// The tools, and the files from which all images are made.
pub struct Workshop {
    pub qemu: Qemu,
    patterns: Vec<(PathBuf, Vec<u8>)>,
    folder: TempDir,
}

/// A finished image.
pub struct Made {
    pub bench: Bench,
    /// The files of its backing chain, and their bytes.
    pub below: Vec<(PathBuf, Vec<u8>)>,
    /// A raw external data file.
    pub raw_view: Option<PathBuf>,
    /// The folder with all files; it is deleted when this is dropped.
    _folder: TempDir,
}

/// A single write by qemu-io.
#[derive(Clone, Copy, Debug)]
enum Stroke {
    /// A pattern, compressed or not.
    Fill {
        offset: u64,
        length: u64,
        pattern: usize,
        compressed: bool,
    },
    Zeroes {
        offset: u64,
        length: u64,
        unmap: bool,
    },
    Discard {
        offset: u64,
        length: u64,
    },
}

/// A layer of a chain, with what may be done to it.
struct Layer {
    spec: ImageSpec,
    squeezes: bool,
    /// True for a raw file that ends within a sector.
    ragged: bool,
    /// Clusters that a stroke has touched.
    touched: BTreeSet<u64>,
}

impl Layer {
    fn new(spec: ImageSpec, squeezes: bool) -> Self {
        Layer { spec, squeezes, ragged: false, touched: BTreeSet::new() }
    }

    fn size(&self) -> u64 {
        self.spec.size.expect("each layer has its size")
    }

    /// The stroke, adapted to the layer. QEMU cannot compress into an allocated cluster, so that is discarded before,
    /// or filled uncompressed.
    fn prepared(&mut self, stroke: Stroke) -> Vec<Stroke> {
        let (Stroke::Fill { offset, length, .. }
        | Stroke::Zeroes { offset, length, .. }
        | Stroke::Discard { offset, length }) = stroke;
        let clusters = offset / self.spec.cluster_size..(offset + length).div_ceil(self.spec.cluster_size);
        let is_touched = self.touched.range(clusters.clone()).next().is_some()
            || self.spec.preallocation != Preallocation::Off;
        self.touched.extend(clusters);
        match stroke {
            Stroke::Fill { pattern, compressed: true, .. } if is_touched => match self.rule() {
                DiscardRule::ZeroesClusters => vec![Stroke::Discard { offset, length }, stroke],
                DiscardRule::Nothing => vec![Stroke::Fill { offset, length, pattern, compressed: false }],
            },
            stroke => vec![stroke],
        }
    }

    fn rule(&self) -> DiscardRule {
        if self.spec.version == 2 && self.spec.backing.is_some() {
            DiscardRule::Nothing
        } else {
            DiscardRule::ZeroesClusters
        }
    }
}

/// The size of the disk in bytes. It gives several L2 tables where they are small.
pub fn size(look: &Look) -> u64 {
    let cluster = look.cluster.bytes();
    let clusters = match cluster.ilog2() {
        9 | 11 | 12 => 600,
        10 => 500,
        13 => 200,
        14 | 15 => 100,
        16 => 64,
        17 => 40,
        18 => 24,
        19 => 16,
        20 => 10,
        _ => 7,
    };
    let odd = if look.size == Size::Odd { (cluster / 3).next_multiple_of(SECTOR) } else { 0 };
    // A disk cannot end within a cluster of one sector.
    clusters * cluster + if odd == cluster { 0 } else { odd }
}

/// The smallest unit of allocation in bytes.
pub fn granule(look: &Look) -> u64 {
    look.cluster.bytes() / if look.l2 == L2::Extended { 32 } else { 1 }
}

impl Workshop {
    /// A workshop in memory, if the host has such a folder.
    pub fn new(qemu: Qemu) -> Self {
        let folder = memory_folder().expect("a folder");
        let pattern = |length: &u64| {
            let path = folder.path().join(format!("pattern{length}"));
            let bytes = contents(*length as u32, 0, *length);
            std::fs::write(&path, &bytes).expect("a pattern");
            (path, bytes)
        };
        let patterns = PATTERNS.iter().map(pattern).collect();
        Self { qemu, patterns, folder }
    }

    /// Makes the image of a recipe.
    ///
    /// # Errors
    /// If one of QEMU's tools refuses.
    pub fn make(&self, recipe: &Recipe) -> Result<Made, ImageError> {
        let look = &recipe.look;
        let folder = tempfile::tempdir_in(self.folder.path()).expect("a folder");
        let random = &mut Random::new(recipe.seed);
        let mut made: Option<(PathBuf, Format)> = None;
        let (mut below, mut held) = (Vec::new(), Vec::new());
        for (number, mut layer) in layers_below(look).into_iter().enumerate() {
            let name = PathBuf::from(format!("below{number}"));
            let format = layer.spec.format;
            let path = folder.path().join(&name);
            layer.spec.backing = made.take();
            let mut model = start(&layer, &held);
            self.qemu.create(&path, &layer.spec)?;
            let painted = strokes(random, &mut layer, 6);
            self.paint(&path, &layer, &painted, &mut model)?;
            held = model.read(0, layer.size());
            if layer.ragged {
                held.truncate(held.len() - 212);
                std::fs::write(&path, &held).expect("a raw file");
            }
            made = Some((name, format));
            below.push((path.clone(), std::fs::read(&path).expect("the layer")));
        }
        let image = folder.path().join("image");
        let data = folder.path().join("data");
        let mut layer = top(look, made, &data);
        self.qemu.create(&image, &layer.spec)?;
        let mut model = start(&layer, &held);
        let painted = strokes(random, &mut layer, 8);
        self.paint(&image, &layer, &painted, &mut model)?;
        let mut bench = Bench {
            qemu: self.qemu.clone(),
            image,
            options: how(look, &data),
            granule: granule(look),
            contents: model.read(0, layer.size()),
            snapshots: Vec::new(),
            rule: if look.discards == Discarding::Ignore { DiscardRule::Nothing } else { layer.rule() },
        };
        if look.snapshots == Snapshots::Theirs {
            let count = 1 + random.below(look.refcount.snapshots_max().min(3));
            for number in 0..count {
                let name = format!("made {number}");
                // Several compressed clusters in one host cluster may leave no room in its refcount.
                if bench.try_theirs_aside(Deed::Create, &name).is_err() && look.refcount.bits() > 4 {
                    bench.try_theirs(Deed::Create, &name)?;
                }
                let painted = strokes(random, &mut layer, 4);
                self.paint(&bench.image, &layer, &painted, &mut model)?;
                bench.contents = model.read(0, layer.size());
            }
        }
        let raw_view = (look.data == Data::Raw).then_some(data);
        Ok(Made { bench, below, raw_view, _folder: folder })
    }

    /// Applies the strokes to an image and to its model.
    fn paint(
        &self,
        path: &Path,
        layer: &Layer,
        strokes: &[Stroke],
        model: &mut ByteModel,
    ) -> Result<(), ImageError> {
        let mut commands = Vec::new();
        for stroke in strokes {
            commands.push(match *stroke {
                Stroke::Fill { offset, length, pattern, compressed } => {
                    let (file, bytes) = &self.patterns[pattern];
                    let all: Vec<u8> = bytes.iter().copied().cycle().take(length as usize).collect();
                    model.write(offset, &all);
                    let flag = if compressed { "-c " } else { "" };
                    format!("write {flag}-s {} {offset} {length}", file.display())
                }
                Stroke::Zeroes { offset, length, unmap } => {
                    model.zero(offset, length);
                    let flag = if unmap { "-u " } else { "" };
                    format!("write -z {flag}{offset} {length}")
                }
                Stroke::Discard { offset, length } => {
                    model.discard(offset, length);
                    format!("discard {offset} {length}")
                }
            });
        }
        self.qemu.io(path, layer.spec.format, &commands)
    }
}

/// A model of a new layer over these contents.
fn start(layer: &Layer, below: &[u8]) -> ByteModel {
    // QEMU discards whole clusters only, even with subclusters.
    ByteModel::with_contents(below, layer.size(), layer.spec.cluster_size.max(SECTOR), layer.rule())
}

/// The options with which Strata opens the image.
fn how(look: &Look, data: &Path) -> DiskOptions {
    let mut how = options();
    if look.memory == Memory::Scarce {
        how = DiskOptions { map_bytes: 4096, table_bytes: 4 * 4096, inflated_bytes: 200 << 10, ..how };
    }
    how.detect_zeroes = match look.zeros {
        Zeros::Off => DetectZeroes::Off,
        Zeros::On => DetectZeroes::On,
        Zeros::Unmap => DetectZeroes::Unmap,
    };
    if look.discards == Discarding::Ignore {
        how.discards = Discards::Ignore;
    }
    how.data_file = (look.data != Data::Inside).then(|| data.to_owned());
    how.discard_no_unref = look.discards == Discarding::Keep;
    how
}

fn top(look: &Look, backing: Option<(PathBuf, Format)>, data: &Path) -> Layer {
    let mut spec = ImageSpec::qcow2(size(look)).cluster_size(look.cluster.bytes());
    spec.version = if look.version == Version::V2 { 2 } else { 3 };
    spec.refcount_bits = look.refcount.bits();
    spec.extended_l2 = look.l2 == L2::Extended;
    spec.zstd = look.compression == Compression::Zstd;
    spec.lazy_refcounts = look.lazy == Lazy::On;
    spec.data_file = match look.data {
        Data::Inside => None,
        Data::File => Some((data.to_owned(), false)),
        Data::Raw => Some((data.to_owned(), true)),
    };
    spec.preallocation = match look.preallocation {
        Allocated::Off => Preallocation::Off,
        Allocated::Metadata => Preallocation::Metadata,
        Allocated::Falloc => Preallocation::Falloc,
        Allocated::Full => Preallocation::Full,
    };
    spec.backing = backing;
    Layer::new(spec, look.compression != Compression::Nothing)
}

/// The layers of the backing chain, the base first.
fn layers_below(look: &Look) -> Vec<Layer> {
    let (size, cluster) = (size(look), look.cluster.bytes());
    let shorter = (size / 2 + cluster / 4).next_multiple_of(SECTOR);
    let longer = size + (cluster / 2).next_multiple_of(SECTOR) + 3 * cluster;
    let plain = |spec| Layer::new(spec, false);
    let packed = |spec| Layer::new(spec, true);
    let small = (cluster / 4).max(512);
    let large = (cluster * 4).min(2 * M);
    let medium = cluster.clamp(16 * K, 64 * K);
    match look.below {
        Below::Nothing => Vec::new(),
        Below::Raw => vec![plain(ImageSpec::raw(size))],
        Below::RawShort => vec![plain(ImageSpec::raw(shorter))],
        Below::RawLong => vec![plain(ImageSpec::raw(longer))],
        Below::RawRagged => vec![Layer { ragged: true, ..plain(ImageSpec::raw(shorter)) }],
        Below::Same => vec![plain(ImageSpec::qcow2(size).cluster_size(cluster))],
        Below::Short => vec![plain(ImageSpec::qcow2(shorter).cluster_size(small))],
        Below::Long => vec![plain(ImageSpec::qcow2(longer).cluster_size(large))],
        Below::Old => vec![packed(ImageSpec::qcow2(size).cluster_size(cluster).version(2))],
        Below::Packed => vec![packed(ImageSpec::qcow2(size).cluster_size(large).zstd())],
        Below::Parts => vec![plain(ImageSpec::qcow2(size).cluster_size(medium).extended())],
        Below::Deep => vec![
            plain(ImageSpec::raw(longer)),
            packed(ImageSpec::qcow2(shorter).cluster_size(small)),
            packed(ImageSpec::qcow2(size).cluster_size(medium).extended()),
        ],
    }
}

/// The strokes for a new layer.
fn strokes(random: &mut Random, layer: &mut Layer, count: usize) -> Vec<Stroke> {
    let size = layer.size();
    let raw = layer.spec.format == Format::Raw;
    let cluster = if raw { 4096 } else { layer.spec.cluster_size };
    let length_max = (6 * cluster).min((2 * cluster).max(M));
    let mut strokes = Vec::new();
    for _ in 0..count {
        let at = random.below(size.div_ceil(cluster)) * cluster;
        // Whole clusters, or up to the end of the disk.
        let whole = ((1 + random.below(8)) * cluster).min(length_max).min(size - at);
        // Any sectors, often near the border of a cluster.
        let within = random.below(cluster / SECTOR) * SECTOR;
        let offset = (at + random.of(&[0, 0, SECTOR, within])).min(size - SECTOR);
        let length = (1 + random.below(length_max / SECTOR)) * SECTOR;
        let length = length.min(size - offset);
        let pattern = random.below(PATTERNS.len() as u64) as usize;
        let stroke = match random.below(10) {
            0..=3 if layer.squeezes => Stroke::Fill { offset: at, length: whole, pattern, compressed: true },
            0 | 1 if !raw => Stroke::Zeroes { offset, length, unmap: random.below(2) == 0 },
            2 if !raw => Stroke::Discard { offset: at, length: whole },
            _ => Stroke::Fill { offset, length, pattern, compressed: false },
        };
        strokes.extend(layer.prepared(stroke));
    }
    if layer.ragged {
        strokes.push(Stroke::Fill { offset: size - SECTOR, length: SECTOR, pattern: 3, compressed: false });
    }
    strokes
}
