//! The images that a run starts from: geometry, what lies below, what has been written before.
//!
//! All are made in memory; none needs QEMU.

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
/// The backing file's.
pub const BASE: &str = "base";
/// The external data file's.
pub const DATA: &str = "data";
/// The number by which the backing file's sectors are stamped.
pub const BASE_WRITE: u32 = 1;
/// The number of the first write that a preparation makes; a run's own come after them.
pub const FIRST_WRITE: u32 = 2;

/// What lies below the top image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Below {
    /// Nothing: what is not written reads as zero.
    Nothing,
    /// A raw file, shorter than the disk.
    Raw,
    /// A qcow2 image.
    Qcow2,
}

/// Where the top image has its data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Data {
    /// In itself.
    Within,
    /// In an external file.
    Apart,
    /// In an external file that is to be a raw image, too.
    ApartRaw,
}

/// What has happened to the image before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Past {
    /// It is new.
    Fresh,
    /// Much of it was written, and closed cleanly.
    Written,
    /// As written, but marked dirty, with refcounts that are wrong in both ways: opening it rebuilds them.
    Dirty,
    /// As written, and then an internal snapshot was taken that the disk does not know of: all of it is shared.
    Shared,
    /// A converting tool has filled it with compressed clusters, which share clusters of the file.
    Compressed(Compression),
    /// As written, with a snapshot that shares some of it.
    Kept,
    /// As written, with a bitmap that writers must keep up to date; also marked dirty, as above.
    Bitmap {
        /// Marked dirty.
        dirty: bool,
    },
    /// It is new, but its file is so long that a few more clusters need a larger refcount table.
    Long,
}

/// Snapshots by name, and what each holds by sector.
pub type Snapshots = Vec<(String, Arc<[Value]>)>;

/// A kind of image to start from.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// The top image's format. A raw one has clusters of a sector, and nothing below it.
    pub format: Format,
    /// Version of the format: 2 or 3.
    pub version: u32,
    /// Bytes of a cluster, as a power of two.
    pub cluster_bits: u32,
    /// Bits of a refcount, as a power of two; 4 in version 2.
    pub refcount_order: u32,
    /// Sectors of the disk, when it is made.
    pub sectors: u64,
    /// Its clusters have subclusters.
    pub extended_l2: bool,
    /// Where its data is.
    pub data: Data,
    /// What lies below.
    pub below: Below,
    /// What was before.
    pub past: Past,
    /// Bytes of tables that the disk may keep, which also bounds what is dirty.
    pub table_bytes: usize,
    /// What becomes of requests that find no space.
    pub on_enospc: OnEnospc,
    /// What becomes of writes of zeros.
    pub detect: DetectZeroes,
    /// Discarded clusters keep their places.
    pub keeps_places: bool,
    /// Its header allows refcounts to be out of date while it is marked dirty.
    pub lazy: bool,
}

/// A shape, made: the files, and what the guest reads from them.
#[derive(Clone)]
pub struct Start {
    /// How it was made.
    pub shape: Shape,
    /// The files.
    pub image: Image,
    /// By sector.
    pub values: Vec<Value>,
    /// Its snapshots by name, and what each holds by sector.
    pub snapshots: Snapshots,
    /// Clusters leaked already.
    pub leaks: u64,
    /// The snapshot that shares the image's clusters.
    pub hidden: Option<Hidden>,
}

impl Shape {
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

    /// Over a backing file.
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

    /// With refcounts of 2 bits, so that no cluster can have more than two snapshots.
    pub const fn narrow_refcounts(self) -> Shape {
        Shape { refcount_order: 1, ..self }
    }

    /// With refcounts of so many bits, as a power of two.
    pub const fn refcounts(self, refcount_order: u32) -> Shape {
        Shape { refcount_order, ..self }
    }

    /// Writes of zeros are looked for.
    pub const fn detecting(self, detect: DetectZeroes) -> Shape {
        Shape { detect, ..self }
    }

    /// Discarded clusters keep their places.
    pub const fn keeping_places(self) -> Shape {
        Shape { keeps_places: true, ..self }
    }

    /// With the flag of lazy refcounts.
    pub const fn lazy(self) -> Shape {
        Shape { lazy: true, ..self }
    }

    /// With hardly any memory for tables, so that they are evicted and flushed all the time.
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

    /// Its data is in an external file.
    pub fn has_data_file(&self) -> bool {
        self.data != Data::Within
    }

    /// What the external data file shows as a raw image, by sector, if it is to be one.
    pub fn raw_view(&self, image: &Image) -> Option<Vec<Value>> {
        if self.data != Data::ApartRaw {
            return None;
        }
        Some(padded(&read_stamps(0, &image.file(Path::new(DATA))?.to_bytes()), self))
    }

    /// As many sectors as the disk may ever have.
    pub const fn sectors_max(&self) -> u64 {
        self.sectors + self.sectors / 2
    }

    /// Its size may change: bitmaps fit one size only; where snapshots are hidden from the disk, or version 2 does not record what size they have, it
    /// may not.
    pub fn is_resizable(&self) -> bool {
        let has_bitmap = matches!(self.past, Past::Bitmap { .. });
        self.past != Past::Shared && !has_bitmap && (self.version == 3 || self.past != Past::Kept)
    }

    /// It has metadata.
    pub fn is_qcow2(&self) -> bool {
        self.format == Format::Qcow2
    }

    /// Sectors of the least part of the disk that is allocated, zeroed or discarded by itself.
    pub fn granule_sectors(&self) -> u64 {
        self.geometry().granule_size() / SECTOR
    }

    /// Sectors of a stretch: as much as is looked at for zeros at a time.
    pub fn stretch_sectors(&self) -> u64 {
        self.granule_sectors().max(4096 / SECTOR)
    }

    /// A gappy write has zeros in this sector.
    pub fn is_gap(&self, sector: u64) -> bool {
        sector / self.stretch_sectors() % 2 == 1
    }

    /// A discard of these sectors need not make this one zero: that of a raw image, or of one that can be read as such, is
    /// a hint to the host, no more, and a compressed cluster has no parts that could be zeroed. The disk had so many sectors
    /// then.
    pub fn is_hint(&self, discarded: &Range<u64>, sector: u64, sectors: u64) -> bool {
        let unit = self.cluster_sectors();
        let first = sector / unit * unit;
        let whole = discarded.start <= first && (first + unit).min(sectors) <= discarded.end;
        let compressed = self.extended_l2 && matches!(self.past, Past::Compressed(_));
        !self.is_qcow2() || self.data == Data::ApartRaw || (compressed && !whole)
    }

    /// A discard leaves everything as it is: version 2 cannot hide what lies below.
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

    /// How the disk is opened.
    pub fn options(&self) -> DiskOptions {
        DiskOptions {
            format: self.format,
            lock_timeout: std::time::Duration::ZERO,
            map_bytes: 64 << 10,
            table_bytes: self.table_bytes,
            // A few clusters of 512 bytes, and none of the larger.
            inflated_bytes: 8 << 10,
            // All on one thread, in one order.
            inflate_threads: 0,
            on_enospc: self.on_enospc,
            detect_zeroes: self.detect,
            discard_no_unref: self.keeps_places,
            // Of a snapshot that the image does not know of all is a leak.
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
            // What no entry leads to must never be seen, and it need not be as long as the disk.
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
        Start { shape: *self, image, values, snapshots, leaks, hidden }
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
            // One refblock is left in the table.
            let clusters = (geometry.cluster_size() / 8 - 1) * geometry.refblock_entries();
            bytes.resize((clusters * geometry.cluster_size()) as usize, 0);
        }
        bytes
    }

    /// Marks an image dirty, lowers every third refcount of its first refblock to 0 and raises as many that are 0; how
    /// many of these are past the end of the file: no repair looks there, and they are leaks when the file grows.
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

    /// A raw file three quarters as long as the disk, with a gap in each eight sectors.
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

    /// A qcow2 image of other clusters, in which the even clusters of the top image are written, but for the last
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
        // All of its writes count as one.
        let mut bytes = image.file(Path::new(TOP)).expect("the image").to_bytes();
        for chunk in bytes.chunks_exact_mut(SECTOR as usize) {
            restamp(chunk);
        }
        for value in values.iter_mut().filter(|value| **value != Value::Zero) {
            *value = Value::Write(BASE_WRITE);
        }
        bytes
    }

    /// Plays a past: data in some clusters, zeros in others, something given back.
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
            // Parts of each kind, in clusters with and without space, and in data.
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

    /// An image without snapshots and leaks.
    fn start(&self, image: Image, values: Vec<Value>) -> Start {
        Start { shape: *self, image, values, snapshots: Vec::new(), leaks: 0, hidden: None }
    }
}

impl Start {
    /// An image that came of this one, as one sees it who knows of its snapshot.
    pub fn revealed(&self, image: &Image) -> Image {
        self.hidden.as_ref().map_or_else(|| image.clone(), |hidden| hidden.revealed(image))
    }
}

/// Gives a stamped sector the number of the backing file.
fn restamp(bytes: &mut [u8]) {
    let name = u64::from_le_bytes(bytes[8..16].try_into().expect("eight bytes"));
    let sector = name >> 32;
    if matches!(super::stamp::read_stamp(sector, bytes), Value::Write(_)) {
        stamp(sector, BASE_WRITE, bytes);
    }
}
