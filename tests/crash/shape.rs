//! The images that a run starts from: their geometry, their backing file and their past.
//!
//! All are made in memory, without QEMU.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use disk::{DetectZeroes, DiskOptions, Format, OnEnospc};
use qcow2::feature::{AUTOCLEAR_RAW_DATA_FILE, COMPATIBLE_LAZY_REFCOUNTS};
use qcow2::{Compression, Geometry, Incompatible, NewImage, Version};
use storage_sim::{Image, SimOptions, SimWorld};

use super::bitmap;
use super::compressed;
use super::hidden::{self, Hidden};
use super::journal::{Deed, Op, padded};
use super::rig::Rig;
use super::stamp::{SECTOR, Value, read_stamps, stamp};

/// The top image's name in a world.
pub const TOP: &str = "top";
/// The most overlays that runs put on top of an image.
const OVERLAYS_MAX: usize = 24;
/// The backing file's name.
pub const BASE: &str = "base";
/// The external data file's name.
pub const DATA: &str = "data";
/// The write number in the stamps of the backing file's sectors.
pub const BASE_WRITE: u32 = 1;
/// The number of the first write of a preparation. The writes of a run have later numbers.
pub const FIRST_WRITE: u32 = 2;

/// The backing file of the top image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Below {
    /// None: sectors that are not written read as zero.
    Nothing,
    /// A raw file, shorter than the disk.
    Raw,
    /// A qcow2 image.
    Qcow2,
}

/// The location of the data of the top image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Data {
    /// In the image file.
    Within,
    /// In an external file.
    Apart,
    /// In an external file that is also a raw image.
    ApartRaw,
}

/// The past of the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Past {
    /// The image is new.
    Fresh,
    /// Much of it was written, and it was closed cleanly.
    Written,
    /// As written, but marked dirty, with refcounts that are too low and too high. Opening it rebuilds them.
    Dirty,
    /// As written, and then an internal snapshot was made that the header does not count: all of it is shared.
    Shared,
    /// A converting tool filled it with compressed clusters, which share host clusters.
    Compressed(Compression),
    /// As written, with a snapshot that shares some of it.
    Kept,
    /// As written, with a bitmap that writers must keep up to date. It may also be marked dirty, as above.
    Bitmap {
        /// Marked dirty.
        dirty: bool,
    },
    /// The image is new, but its file is so long that a few more clusters need a larger refcount table.
    Long,
}

/// Snapshots: their names, and their values by sector.
pub type Snapshots = Vec<(String, Arc<[Value]>)>;

/// A kind of image to start from.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// The top image's format. A raw image has clusters of one sector and no backing file.
    pub format: Format,
    /// Version of the format: 2 or 3.
    pub version: u32,
    /// Bytes of a cluster, as a power of two.
    pub cluster_bits: u32,
    /// Bits of a refcount, as a power of two; 4 in version 2.
    pub refcount_order: u32,
    /// Sectors of the new disk.
    pub sectors: u64,
    /// The clusters have subclusters.
    pub extended_l2: bool,
    /// The location of its data.
    pub data: Data,
    /// The backing file.
    pub below: Below,
    /// The past.
    pub past: Past,
    /// Bytes of tables that the disk may cache. This also bounds the dirty bytes.
    pub table_bytes: usize,
    /// The handling of requests that find no space.
    pub on_enospc: OnEnospc,
    /// The handling of writes of zeros.
    pub detect: DetectZeroes,
    /// Discarded clusters keep their host clusters.
    pub keeps_places: bool,
    /// Its header allows refcounts to be out of date while it is marked dirty.
    pub lazy: bool,
}

/// A made shape: the files, and the values that the guest reads from them.
#[derive(Clone)]
pub struct Start {
    /// The shape.
    pub shape: Shape,
    /// The files.
    pub image: Image,
    /// The name of the top image.
    pub top: String,
    /// The values by sector.
    pub values: Vec<Value>,
    /// The snapshots of the image.
    pub snapshots: Snapshots,
    /// Clusters that are leaked already.
    pub leaks: u64,
    /// The hidden snapshot that shares the image's clusters.
    pub hidden: Option<Hidden>,
}

impl Shape {
    /// True if overlays of the disk in use are examined like the image itself: it has no other owners of clusters, its
    /// refcounts are as wide as those of a new overlay, and discards do the same in both.
    pub fn takes_overlays(&self) -> bool {
        self.is_qcow2()
            && self.version == 3
            && !self.has_data_file()
            && !self.lazy
            && self.refcount_order == 4
            && matches!(self.past, Past::Fresh | Past::Written | Past::Compressed(_))
    }

    /// A new image of version 3 without a backing file.
    pub const fn new(cluster_bits: u32, sectors: u64) -> Shape {
        Shape {
            format: Format::Qcow2,
            version: 3,
            cluster_bits,
            refcount_order: 4,
            sectors,
            extended_l2: false,
            data: Data::Within,
            below: Below::Nothing,
            past: Past::Fresh,
            table_bytes: 1 << 20,
            on_enospc: OnEnospc::Report,
            detect: DetectZeroes::Off,
            keeps_places: false,
            lazy: false,
        }
    }

    /// A raw file of zeros.
    pub const fn raw(sectors: u64) -> Shape {
        Shape { format: Format::Raw, ..Shape::new(9, sectors) }
    }

    /// With a backing file.
    pub const fn over(self, below: Below) -> Shape {
        Shape { below, ..self }
    }

    /// With a past.
    pub const fn past(self, past: Past) -> Shape {
        Shape { past, ..self }
    }

    /// Of version 2.
    pub const fn v2(self) -> Shape {
        Shape { version: 2, refcount_order: 4, ..self }
    }

    /// With refcounts of 64 bits, so that a refblock counts few clusters.
    pub const fn wide_refcounts(self) -> Shape {
        Shape { refcount_order: 6, ..self }
    }

    /// With extended L2 entries.
    pub const fn subclusters(self) -> Shape {
        Shape { extended_l2: true, ..self }
    }

    /// With its data in an external file.
    pub const fn apart(self) -> Shape {
        Shape { data: Data::Apart, ..self }
    }

    /// With its data in an external file that can be read as a raw image.
    pub const fn apart_raw(self) -> Shape {
        Shape { data: Data::ApartRaw, ..self }
    }

    /// With refcounts of 2 bits, so that at most two snapshots can share a cluster.
    pub const fn narrow_refcounts(self) -> Shape {
        Shape { refcount_order: 1, ..self }
    }

    /// With refcounts of this many bits, as a power of two.
    pub const fn refcounts(self, refcount_order: u32) -> Shape {
        Shape { refcount_order, ..self }
    }

    /// With detection of zeros in writes.
    pub const fn detecting(self, detect: DetectZeroes) -> Shape {
        Shape { detect, ..self }
    }

    /// With discarded clusters that keep their host clusters.
    pub const fn keeping_places(self) -> Shape {
        Shape { keeps_places: true, ..self }
    }

    /// With the lazy refcounts flag.
    pub const fn lazy(self) -> Shape {
        Shape { lazy: true, ..self }
    }

    /// With very little memory for tables, so that they are evicted and flushed all the time.
    pub const fn short_of_memory(self) -> Shape {
        Shape { table_bytes: 6 * 4096, ..self }
    }

    /// Bytes of a cluster.
    pub fn cluster_bytes(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Sectors of a cluster.
    pub fn cluster_sectors(&self) -> u64 {
        self.cluster_bytes() / SECTOR
    }

    /// True if the data is in an external file.
    pub fn has_data_file(&self) -> bool {
        self.data != Data::Within
    }

    /// True if the disk can keep a journal.
    pub fn keeps_journal(&self) -> bool {
        self.is_qcow2() && self.version == 3 && !self.has_data_file()
    }

    /// The values of the external data file as a raw image, by sector, if it is one.
    pub fn raw_view(&self, image: &Image) -> Option<Vec<Value>> {
        if self.data != Data::ApartRaw {
            return None;
        }
        Some(padded(&read_stamps(0, &image.file(Path::new(DATA))?.to_bytes()), self))
    }

    /// The most sectors that the disk may ever have.
    pub const fn sectors_max(&self) -> u64 {
        self.sectors + self.sectors / 2
    }

    /// True if the size may change. A bitmap fits one size only. Neither may it change with hidden snapshots, nor with
    /// snapshots in version 2, which does not record their size.
    pub fn is_resizable(&self) -> bool {
        let has_bitmap = matches!(self.past, Past::Bitmap { .. });
        self.past != Past::Shared && !has_bitmap && (self.version == 3 || self.past != Past::Kept)
    }

    /// True if the image has metadata.
    pub fn is_qcow2(&self) -> bool {
        self.format == Format::Qcow2
    }

    /// Sectors of the smallest part of the disk that can be allocated, zeroed or discarded separately.
    pub fn granule_sectors(&self) -> u64 {
        self.geometry().granule_size() / SECTOR
    }

    /// Sectors of a stretch: the unit of the detection of zeros.
    pub fn stretch_sectors(&self) -> u64 {
        self.granule_sectors().max(4096 / SECTOR)
    }

    /// True if a gappy write has zeros in this sector.
    pub fn is_gap(&self, sector: u64) -> bool {
        sector / self.stretch_sectors() % 2 == 1
    }

    /// True if a discard of these sectors need not make this sector zero. On a raw image, or one that can be read as
    /// raw, a discard is only a hint to the host. A compressed cluster has no parts that could be zeroed. `sectors` is
    /// the size of the disk at that time.
    pub fn is_hint(&self, discarded: &Range<u64>, sector: u64, sectors: u64) -> bool {
        let unit = self.cluster_sectors();
        let first = sector / unit * unit;
        let whole = discarded.start <= first && (first + unit).min(sectors) <= discarded.end;
        let compressed = self.extended_l2 && matches!(self.past, Past::Compressed(_));
        !self.is_qcow2() || self.data == Data::ApartRaw || (compressed && !whole)
    }

    /// True if a discard changes nothing: version 2 cannot hide the backing file.
    pub fn discards_nothing(&self) -> bool {
        self.version == 2 && self.below != Below::Nothing
    }

    /// The geometry of the top image.
    pub fn geometry(&self) -> Geometry {
        Geometry {
            version: if self.version == 2 { Version::V2 } else { Version::V3 },
            cluster_bits: self.cluster_bits,
            refcount_order: self.refcount_order,
            extended_l2: self.extended_l2,
            size: self.sectors * SECTOR,
        }
    }

    /// The options with which the disk is opened.
    pub fn options(&self) -> DiskOptions {
        DiskOptions {
            format: self.format,
            lock_timeout: std::time::Duration::ZERO,
            map_bytes: 64 << 10,
            table_bytes: self.table_bytes,
            // Room for a few clusters of 512 bytes, and for no larger ones.
            inflated_bytes: 8 << 10,
            // Everything on one thread, in one order.
            inflate_threads: 0,
            on_enospc: self.on_enospc,
            detect_zeroes: self.detect,
            discard_no_unref: self.keeps_places,
            // All clusters of a hidden snapshot look like leaks.
            search_leaks: self.past != Past::Shared,
            data_file: self.has_data_file().then(|| DATA.into()),
            ..DiskOptions::default()
        }
    }

    /// Makes the image.
    pub fn make(&self) -> Start {
        let mut world = SimWorld::new(1, SimOptions::calm());
        let mut values = vec![Value::Zero; self.sectors as usize];
        let below = match self.below {
            Below::Nothing => None,
            Below::Raw => Some("raw"),
            Below::Qcow2 => Some("qcow2"),
        };
        match self.below {
            Below::Nothing => {}
            Below::Raw => world.add_file(BASE, &self.raw_base(&mut values)),
            Below::Qcow2 => {
                let bytes = self.qcow2_base(&mut values);
                world.add_file(BASE, &bytes);
            }
        }
        let mut top =
            if self.is_qcow2() { self.empty(below) } else { vec![0; (self.sectors * SECTOR) as usize] };
        if let Past::Compressed(how) = self.past {
            top = compressed::fill(self, top, &mut values, how);
        }
        world.add_file(TOP, &top);
        match self.data {
            Data::Within => {}
            // The guest must never see bytes that no entry refers to. The file may be shorter than the disk.
            Data::Apart => world.add_file(DATA, &vec![0xee; (self.sectors * SECTOR * 3 / 4) as usize]),
            Data::ApartRaw => world.add_file(DATA, &vec![0; (self.sectors * SECTOR) as usize]),
        }
        let mut snapshots = Vec::new();
        let plays = [Past::Written, Past::Dirty, Past::Shared, Past::Kept];
        if plays.contains(&self.past) || matches!(self.past, Past::Bitmap { .. }) {
            (world, values, snapshots) = self.written(world, values);
        }
        let (mut image, mut leaks, mut hidden) = (world.image(), 0, None);
        match self.past {
            Past::Dirty => (image, leaks) = self.dirtied(&image),
            Past::Bitmap { dirty: false } => image = bitmap::add(&image),
            Past::Bitmap { dirty: true } => (image, leaks) = self.dirtied(&bitmap::add(&image)),
            Past::Shared => {
                let (shared, snapshot) = hidden::hide(&image, &values);
                (image, hidden) = (shared, Some(snapshot));
            }
            Past::Fresh | Past::Written | Past::Compressed(_) | Past::Long | Past::Kept => {}
        }
        Start { shape: *self, image, top: TOP.to_owned(), values, snapshots, leaks, hidden }
    }

    /// The bytes of an empty top image.
    fn empty(&self, below: Option<&str>) -> Vec<u8> {
        let mut new = NewImage::new(self.geometry());
        if let Some(format) = below {
            new.backing_file = Some(BASE.as_bytes().to_vec());
            new.backing_format = Some(format.to_owned());
        }
        let mut bytes = Vec::new();
        for (offset, piece) in new.layout().expect("a shape is one that the format allows") {
            bytes.resize(offset.0 as usize, 0);
            bytes.extend(piece);
        }
        if self.lazy {
            bytes[qcow2::position::COMPATIBLE + 7] |= COMPATIBLE_LAZY_REFCOUNTS as u8;
        }
        if self.has_data_file() {
            bytes[qcow2::position::INCOMPATIBLE + 7] |= Incompatible::DATA_FILE.0 as u8;
        }
        if self.data == Data::ApartRaw {
            bytes[qcow2::position::AUTOCLEAR + 7] |= AUTOCLEAR_RAW_DATA_FILE as u8;
        }
        if self.past == Past::Long {
            let geometry = self.geometry();
            // The table has room for one more refblock.
            let clusters = (geometry.cluster_size() / 8 - 1) * geometry.refblock_entries();
            bytes.resize((clusters * geometry.cluster_size()) as usize, 0);
        }
        bytes
    }

    /// Marks an image dirty, lowers every third refcount of its first refblock to 0, and raises as many that are 0.
    /// Also returns how many raised refcounts are past the end of the file. No repair reads there, and they are leaks
    /// when the file grows.
    fn dirtied(&self, image: &Image) -> (Image, u64) {
        let mut bytes = image.file(Path::new(TOP)).expect("the image").to_bytes();
        bytes[qcow2::position::INCOMPATIBLE + 7] |= 1;
        let geometry = self.geometry();
        let cluster = geometry.cluster_size() as usize;
        // A new image has its refcount table in cluster 1.
        let block = qcow2::entry(&bytes[cluster..], 0) as usize;
        let end = geometry.clusters_for(bytes.len() as u64);
        let mut past_end = 0;
        let counts = &mut bytes[block..block + cluster];
        for index in (1..geometry.refblock_entries() as usize).step_by(3) {
            let count = u64::from(qcow2::refcount(geometry.refcount_order, counts, index) == 0);
            qcow2::set_refcount(geometry.refcount_order, counts, index, count);
            past_end += if index as u64 >= end { count } else { 0 };
        }
        (image.with(Path::new(TOP), 0, &bytes), past_end)
    }

    /// A raw file three quarters as long as the disk, with a gap in every eight sectors.
    fn raw_base(&self, values: &mut [Value]) -> Vec<u8> {
        let sectors = self.sectors * 3 / 4;
        let mut bytes = vec![0; (sectors * SECTOR) as usize];
        for (sector, bytes) in bytes.chunks_exact_mut(SECTOR as usize).enumerate() {
            if sector % 8 != 7 {
                stamp(sector as u64, BASE_WRITE, bytes);
                values[sector] = Value::Write(BASE_WRITE);
            }
        }
        bytes
    }

    /// A qcow2 image with another cluster size. It has data at the even clusters of the top, except in the last
    /// quarter.
    fn qcow2_base(&self, values: &mut Vec<Value>) -> Vec<u8> {
        let bits = if self.cluster_bits > 10 { self.cluster_bits - 1 } else { 12 };
        let base = Shape { past: Past::Fresh, ..Shape::new(bits, self.sectors) };
        let world = SimWorld::new(1, SimOptions::calm());
        world.add_file(TOP, &base.empty(None));
        let step = 2 * self.cluster_sectors();
        let end = self.sectors * 3 / 4;
        let ops: Vec<Op> = (0..end)
            .step_by(step as usize)
            .map(|at| Op::write(at, self.cluster_sectors().min(end - at)))
            .collect();
        let start = base.start(world.image(), values.clone());
        let rig = Rig::open_numbered(&start, world, 1, BASE_WRITE).expect("a new image opens");
        let finished = rig.play_alone(&ops);
        *values = finished.settled_values();
        let image = finished.world.image();
        // All of its writes get the same number.
        let mut bytes = image.file(Path::new(TOP)).expect("the image").to_bytes();
        for chunk in bytes.chunks_exact_mut(SECTOR as usize) {
            restamp(chunk);
        }
        for value in values.iter_mut().filter(|value| **value != Value::Zero) {
            *value = Value::Write(BASE_WRITE);
        }
        bytes
    }

    /// Plays a past: data in some clusters, zeros in others, and some clusters given back.
    fn written(&self, world: SimWorld, values: Vec<Value>) -> (SimWorld, Vec<Value>, Snapshots) {
        let start = self.start(world.image(), values);
        let unit = self.cluster_sectors();
        let clusters = self.sectors / unit;
        let mut ops = Vec::new();
        for cluster in (0..clusters).filter(|cluster| cluster % 4 != 3) {
            ops.push(Op::write(cluster * unit, unit));
        }
        ops.push(Op::Flush);
        for cluster in (0..clusters).filter(|cluster| cluster % 4 == 2) {
            ops.push(Op::Zeroes { sector: cluster * unit, count: unit, unmap: cluster % 8 == 2 });
        }
        if self.extended_l2 {
            // Subclusters of each kind, in clusters with and without a host cluster, and in data.
            let part = self.granule_sectors();
            for cluster in (0..clusters).filter(|cluster| cluster % 8 >= 4 || cluster % 2 == 1) {
                let first = cluster * unit;
                let count = (self.sectors - first).min(3 * part);
                ops.push(Op::Zeroes { sector: first, count, unmap: cluster % 8 >= 6 });
                if cluster * unit + 10 * part <= self.sectors {
                    ops.push(Op::write(first + 2 * part, 4 * part));
                    ops.push(Op::Discard { sector: first + 5 * part, count: 5 * part });
                }
            }
        }
        if self.past == Past::Kept {
            ops.push(Op::Change(Deed::Create));
            ops.push(Op::write(0, unit));
            ops.push(Op::Discard { sector: unit, count: unit });
        }
        let rig = Rig::open_numbered(&start, world, 1, FIRST_WRITE).expect("a new image opens");
        let finished = rig.play_alone(&ops);
        let values = finished.settled_values();
        let kept = finished.journal.kept.iter();
        let snapshots = kept.map(|kept| (kept.name.clone(), Arc::clone(&kept.values))).collect();
        (finished.world, values, snapshots)
    }

    /// A start without snapshots and leaks.
    fn start(&self, image: Image, values: Vec<Value>) -> Start {
        let top = TOP.to_owned();
        Start { shape: *self, image, top, values, snapshots: Vec::new(), leaks: 0, hidden: None }
    }
}

impl Start {
    /// The same with another top image.
    pub fn over(&self, top: &str) -> Start {
        Start { top: top.to_owned(), ..self.clone() }
    }

    /// An image made from this one, with the hidden snapshot revealed.
    pub fn revealed(&self, image: &Image) -> Image {
        self.hidden.as_ref().map_or_else(|| image.clone(), |hidden| hidden.revealed(image))
    }
}

/// Restamps a sector with the number of the backing file.
fn restamp(bytes: &mut [u8]) {
    let name = u64::from_le_bytes(bytes[8..16].try_into().expect("eight bytes"));
    let sector = name >> 32;
    if matches!(super::stamp::read_stamp(sector, bytes), Value::Write(_)) {
        stamp(sector, BASE_WRITE, bytes);
    }
}

/// The names of overlays that runs put on top of the image, in their order.
pub fn overlay_names() -> impl Iterator<Item = String> {
    (1..=OVERLAYS_MAX).map(|number| format!("overlay {number}"))
}
