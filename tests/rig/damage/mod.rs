//! Damages one thing in an image at a time: table entries, refcounts, header fields, the file's length.
//!
//! Owns the locations of the structures in a small image. It judges nothing.

mod compressed;
mod header;

pub use compressed::PACKED;
pub use header::{BACKING, EXTENSIONS, HEADER, LENGTHS};

use qcow2::entry::{COMPRESSED, COPIED, OFFSET_MASK};
use qcow2::{Geometry, Header, HostOffset, Version, position, set_entry};

/// The bytes of an image file, and the offsets of its first tables.
#[derive(Clone)]
pub struct Raw {
    /// The file.
    pub bytes: Vec<u8>,
    geometry: Geometry,
    /// The offset of the active L1 table.
    l1: u64,
    /// The offset of the first L2 table.
    l2: u64,
    refcount_table: u64,
    refblock: u64,
}

/// A damage: its name, and the function that does it. The function returns false if the image has no place for this
/// damage.
pub type Damage = (&'static str, fn(&mut Raw) -> bool);

/// An offset that no small file reaches.
const FAR: u64 = 1 << 40;

impl Raw {
    /// Finds the structures of an image whose first guest clusters are allocated.
    pub fn new(bytes: Vec<u8>) -> Self {
        let header = Header::parse(&bytes, bytes.len() as u64).expect("a sound image");
        let (l1, refcount_table) = (header.l1_offset.0, header.refcount_table_offset.0);
        let mut raw = Raw { bytes, geometry: header.geometry(), l1, l2: 0, refcount_table, refblock: 0 };
        raw.l2 = raw.get(l1) & OFFSET_MASK;
        raw.refblock = raw.get(refcount_table);
        raw
    }

    fn get(&self, at: u64) -> u64 {
        qcow2::entry(&self.bytes[at as usize..], 0)
    }

    fn put(&mut self, at: u64, raw: u64) -> bool {
        let changed = self.get(at) != raw;
        set_entry(&mut self.bytes[at as usize..], 0, raw);
        changed
    }

    fn flip(&mut self, at: u64, bits: u64) -> bool {
        self.put(at, self.get(at) ^ bits)
    }

    /// The offset of the L2 entry of one of the first guest clusters.
    fn l2_entry(&self, index: u64) -> u64 {
        self.l2 + index * self.geometry.l2_entry_size()
    }

    /// Changes bits in the bitmap of subclusters of an L2 entry; false if there is none.
    fn flip_subclusters(&mut self, index: u64, bits: u64) -> bool {
        self.geometry.extended_l2 && self.flip(self.l2_entry(index) + 8, bits)
    }

    /// The host cluster of one of the first guest clusters.
    fn data(&self, index: u64) -> u64 {
        (self.get(self.l2_entry(index)) & OFFSET_MASK) >> self.geometry.cluster_bits
    }

    fn cluster_of(&self, offset: u64) -> u64 {
        offset >> self.geometry.cluster_bits
    }

    fn size(&self) -> u64 {
        self.geometry.cluster_size()
    }

    fn end(&self) -> u64 {
        self.geometry.clusters_for(self.bytes.len() as u64) * self.size()
    }

    /// Sets a refcount, truncated to its width. Returns false if the first refblock does not have it or it already has
    /// this value.
    fn count(&mut self, cluster: u64, count: u64) -> bool {
        let order = self.geometry.refcount_order;
        let (block, index) = (self.refblock as usize, cluster as usize);
        let count = count.min(qcow2::refcount_max(order));
        if cluster >= self.geometry.refblock_entries()
            || qcow2::refcount(order, &self.bytes[block..], index) == count
        {
            return false;
        }
        qcow2::set_refcount(order, &mut self.bytes[block..], index, count);
        true
    }

    fn version_3(&self) -> bool {
        self.geometry.version == Version::V3
    }

    /// The ranges of the metadata, for random damage.
    pub fn metadata(&self) -> Vec<(u64, u64)> {
        let size = self.size().min(512);
        let table = self.size().min(256);
        vec![
            (position::CLUSTER_BITS as u64 + 4, 84),
            (self.l1, 32),
            (self.l2, table),
            (self.refcount_table, 32),
            (self.refblock, size.min(64)),
        ]
    }
}

/// Damages of the tables that lead to data.
pub const MAPPING: &[Damage] = &[
    ("COPIED of an L2 entry cleared", |i| i.flip(i.l2_entry(0), COPIED)),
    ("COPIED of an L1 entry cleared", |i| i.flip(i.l1, COPIED)),
    ("an L2 entry cleared", |i| i.put(i.l2_entry(1), 0)),
    ("an L2 entry without offset but COPIED, zero", |i| i.version_3() && i.put(i.l2_entry(1), COPIED | 1)),
    ("two guest clusters share one", |i| i.put(i.l2_entry(1), i.get(i.l2_entry(0)))),
    ("two L2 entries swapped", |i| {
        let (a, b) = (i.get(i.l2_entry(0)), i.get(i.l2_entry(1)));
        i.put(i.l2_entry(0), b) && i.put(i.l2_entry(1), a)
    }),
    ("data right past the file", |i| i.put(i.l2_entry(0), i.end() | COPIED)),
    ("data far past the file", |i| i.put(i.l2_entry(0), FAR | COPIED)),
    ("data at the largest offset", |i| i.put(i.l2_entry(0), (OFFSET_MASK & !(i.size() - 1)) | COPIED)),
    ("data unaligned", |i| i.size() > 512 && i.flip(i.l2_entry(0), 512)),
    ("a zero cluster unaligned", |i| i.size() > 512 && i.version_3() && i.flip(i.l2_entry(0), 513)),
    ("reserved bit 1 of an L2 entry", |i| i.flip(i.l2_entry(0), 1 << 1)),
    ("reserved bit 8 of an L2 entry", |i| i.flip(i.l2_entry(2), 1 << 8)),
    ("reserved bit 56 of an L2 entry", |i| i.flip(i.l2_entry(0), 1 << 56)),
    ("reserved bit 61 of an empty L2 entry", |i| i.put(i.l2_entry(1), 1 << 61)),
    ("data in the L1 table", |i| i.put(i.l2_entry(0), i.l1 | COPIED)),
    ("data in its L2 table", |i| i.put(i.l2_entry(0), i.l2 | COPIED)),
    ("data in a refblock", |i| i.put(i.l2_entry(0), i.refblock | COPIED)),
    ("data in the refcount table", |i| i.put(i.l2_entry(0), i.refcount_table)),
    ("compressed", |i| i.flip(i.l2_entry(0), COMPRESSED | COPIED)),
    ("compressed and COPIED", |i| i.flip(i.l2_entry(0), COMPRESSED)),
    ("compressed far past the file", |i| i.put(i.l2_entry(0), FAR | COMPRESSED)),
    ("the zero flag on data", |i| i.version_3() && i.flip(i.l2_entry(0), 1)),
    ("a subcluster both allocated and zero", |i| i.flip_subclusters(3, 1 << 40)),
    ("a subcluster of an empty cluster allocated", |i| i.flip_subclusters(60, 1 << 3)),
    ("a subcluster of an empty cluster both", |i| i.flip_subclusters(60, 1 << 63 | 1 << 31)),
    ("a subcluster of an empty cluster zero", |i| i.flip_subclusters(60, 1 << 63)),
    ("a subcluster of an allocated cluster not allocated", |i| i.flip_subclusters(3, 1 << 31)),
    ("no subcluster of an allocated cluster allocated", |i| i.flip_subclusters(3, 0xffff_ffff)),
    ("compressed with subclusters", |i| i.geometry.extended_l2 && i.flip(i.l2_entry(3), COMPRESSED | COPIED)),
    ("an L1 entry cleared", |i| i.put(i.l1, 0)),
    ("an L1 entry without offset but COPIED", |i| i.put(i.l1, COPIED)),
    ("reserved bit 0 of an L1 entry", |i| i.flip(i.l1, 1)),
    ("reserved bit 8 of an L1 entry", |i| i.flip(i.l1, 1 << 8)),
    ("reserved bit 62 of an L1 entry", |i| i.flip(i.l1, 1 << 62)),
    ("an L2 table right past the file", |i| i.put(i.l1, i.end() | COPIED)),
    ("an L2 table far past the file", |i| i.put(i.l1, FAR | COPIED)),
    ("an L2 table unaligned", |i| i.size() > 512 && i.flip(i.l1, 512)),
    ("an L2 table in a refblock", |i| i.put(i.l1, i.refblock | COPIED)),
    ("an L2 table in the L1 table", |i| i.put(i.l1, i.l1 | COPIED)),
    ("an L2 table in guest data", |i| i.put(i.l1, i.data(0) << i.geometry.cluster_bits | COPIED)),
    ("two L1 entries share a table", |i| i.put(i.l1 + 8, i.get(i.l1))),
];

/// Damages of the refcounts.
pub const REFCOUNTS: &[Damage] = &[
    ("data counted twice", |i| i.count(i.data(0), 2)),
    ("data counted as often as can be", |i| i.count(i.data(0), u64::MAX)),
    ("data not counted", |i| i.count(i.data(0), 0)),
    ("the L2 table not counted", |i| i.count(i.cluster_of(i.l2), 0)),
    ("the L2 table counted twice", |i| i.count(i.cluster_of(i.l2), 2)),
    ("the header not counted", |i| i.count(0, 0)),
    ("the header counted twice", |i| i.count(0, 2)),
    ("the L1 table not counted", |i| i.count(i.cluster_of(i.l1), 0)),
    ("the L1 table counted thrice", |i| i.count(i.cluster_of(i.l1), 3)),
    ("the refcount table not counted", |i| i.count(i.cluster_of(i.refcount_table), 0)),
    ("the refcount table counted twice", |i| i.count(i.cluster_of(i.refcount_table), 2)),
    ("the refblock not counted", |i| i.count(i.cluster_of(i.refblock), 0)),
    ("the refblock counted twice", |i| i.count(i.cluster_of(i.refblock), 2)),
    ("a leak at the end", |i| leak(i, 1)),
    ("five leaks at the end", |i| leak(i, 5)),
    ("counts past the end of the file", |i| i.count(i.cluster_of(i.end()) + 3, 1)),
    ("all counts zero", |i| (0..i.cluster_of(i.end())).filter(|c| i.count(*c, 0)).count() > 0),
    ("every second count one too high", |i| {
        (0..i.cluster_of(i.end())).step_by(2).filter(|c| i.count(*c, 2)).count() > 0
    }),
    ("no refblock", |i| i.put(i.refcount_table, 0)),
    ("the refblock right past the file", |i| i.put(i.refcount_table, i.end())),
    ("the refblock far past the file", |i| i.put(i.refcount_table, FAR)),
    ("the refblock unaligned", |i| i.size() > 512 && i.flip(i.refcount_table, 512)),
    ("reserved bit 0 of a refcount table entry", |i| i.flip(i.refcount_table, 1)),
    ("reserved bit 8 of a refcount table entry", |i| i.flip(i.refcount_table, 1 << 8)),
    ("the refblock named twice", |i| i.put(i.refcount_table + 24, i.refblock)),
    ("a refblock in the L2 table", |i| i.put(i.refcount_table, i.l2)),
    ("a refblock in the L1 table", |i| i.put(i.refcount_table, i.l1)),
    ("a refblock in the refcount table", |i| i.put(i.refcount_table, i.refcount_table)),
    ("a refblock in guest data", |i| i.put(i.refcount_table + 24, i.data(0) << i.geometry.cluster_bits)),
    ("a needless refblock past the file", |i| i.put(i.refcount_table + 24, FAR)),
];

/// Damages of the header and of the file's length.
pub const FILE: &[Damage] = &[
    ("the refcount table right past the file", |i| i.put(position::REFCOUNT_TABLE_OFFSET as u64, i.end())),
    ("the refcount table far past the file", |i| i.put(position::REFCOUNT_TABLE_OFFSET as u64, FAR)),
    ("the refcount table in the L1 table", |i| i.put(position::REFCOUNT_TABLE_OFFSET as u64, i.l1)),
    ("the L1 table far past the file", |i| i.put(position::L1_OFFSET as u64, FAR)),
    ("the L1 table in the refblock", |i| i.put(position::L1_OFFSET as u64, i.refblock)),
    ("marked dirty", |i| i.version_3() && i.flip(position::INCOMPATIBLE as u64, 1)),
    ("marked corrupt", |i| i.version_3() && i.flip(position::INCOMPATIBLE as u64, 2)),
    ("the file half as long", |i| cut(i, |length| length / 2)),
    ("the file a byte shorter", |i| cut(i, |length| length - 1)),
    ("the file longer by a little", |i| cut(i, |length| length + 7)),
    ("the file longer by clusters", |i| cut(i, |length| length + (3 << 21) + 7)),
    ("a short L1 table past the end, not counted", |i| {
        let first = i.end();
        let entry = i.get(i.l1);
        i.put(position::L1_OFFSET as u64, first)
            && i.put(i.l1, 0)
            && entry != 0
            && i.geometry.l1_entries() * 8 < i.size()
    }),
    ("the last cluster gone", |i| {
        let end = i.end() - i.size();
        i.bytes.truncate(end as usize);
        true
    }),
];

fn cut(image: &mut Raw, length: fn(usize) -> usize) -> bool {
    let length = length(image.bytes.len());
    image.bytes.resize(length, 0);
    true
}

/// Adds clusters without references at the end.
fn leak(image: &mut Raw, count: u64) -> bool {
    let first = image.cluster_of(image.end());
    let length = image.end() + count * image.size();
    image.bytes.resize(length as usize, 0x5a);
    (first..first + count).all(|cluster| image.count(cluster, 1))
}

/// Damages of snapshots. The first entry of the snapshot table gives the offset of the L1 table.
pub const SNAPSHOTS: &[Damage] = &[
    ("a snapshot's L1 table unaligned", |i| i.size() > 512 && i.flip(snapshot(i), 512)),
    ("a snapshot's L1 table far past the file", |i| i.put(snapshot(i), FAR)),
    ("a snapshot's L1 table too long", |i| i.flip(snapshot(i) + 8, 1 << 63)),
    ("a snapshot's L1 table is the active one", |i| i.put(snapshot(i), i.l1)),
    ("a snapshot's L1 table cleared", |i| i.put(i.get(snapshot(i)), 0)),
    ("a reserved bit in a snapshot's L1 table", |i| i.flip(i.get(snapshot(i)), 1)),
    ("a snapshot with too much extra data", |i| i.flip(snapshot(i) + 32, 1 << 20)),
    ("a snapshot without extra data", |i| {
        i.version_3() && i.flip(snapshot(i) + 32, 24) && i.geometry.size > 0
    }),
    ("the snapshot table far past the file", |i| i.put(position::SNAPSHOTS_OFFSET as u64, FAR)),
    ("a snapshot too many", |i| {
        i.put(position::SNAPSHOTS as u64, i.get(position::SNAPSHOTS as u64) + (1 << 32))
    }),
    ("a snapshot too few", |i| {
        i.put(position::SNAPSHOTS as u64, i.get(position::SNAPSHOTS as u64) - (1 << 32))
    }),
    ("no snapshots", |i| i.flip(position::SNAPSHOTS as u64, 2 << 32)),
];

fn snapshot(image: &Raw) -> u64 {
    HostOffset(image.get(position::SNAPSHOTS_OFFSET as u64)).0
}

/// Damages of persistent bitmaps.
pub const BITMAPS: &[Damage] = &[
    ("a part of a bitmap far past the file", |i| i.put(bitmap_table(i), FAR)),
    ("a part of a bitmap right past the file", |i| i.put(bitmap_table(i), i.end())),
    ("a part of a bitmap unaligned", |i| i.flip(bitmap_table(i), 512)),
    ("a part of a bitmap in the L1 table", |i| i.put(bitmap_table(i), i.l1)),
    ("a part of a bitmap in guest data", |i| i.put(bitmap_table(i), i.data(0) << i.geometry.cluster_bits)),
    ("a part of a bitmap gone", |i| i.put(bitmap_table(i), 0)),
    ("a part of a bitmap all ones", |i| i.put(bitmap_table(i), 1)),
    ("reserved bit 1 of an entry of a bitmap's table", |i| i.flip(bitmap_table(i), 2)),
    ("reserved bit 63 of an entry of a bitmap's table", |i| i.flip(bitmap_table(i), 1 << 63)),
    ("a bitmap's table far past the file", |i| i.put(directory(i), FAR)),
    ("a bitmap's table in the L2 table", |i| i.put(directory(i), i.l2)),
    ("a bitmap's table unaligned", |i| i.flip(directory(i), 512)),
    ("a bitmap's table at offset 0", |i| i.put(directory(i), 0)),
    ("a bitmap of an unknown type", |i| i.flip(directory(i) + 16, 1 << 57)),
    ("a bitmap without a name", |i| i.flip(directory(i) + 16, 3 << 32)),
    ("a bitmap with extra data", |i| i.flip(directory(i) + 16, 8)),
    ("a bitmap with unknown flags", |i| i.flip(directory(i) + 8, 1 << 7)),
    ("a bitmap too many", |i| i.put(extension(i) + 8, i.get(extension(i) + 8) + (1 << 32))),
    ("a bitmap too few", |i| i.put(extension(i) + 8, i.get(extension(i) + 8) - (1 << 32))),
    ("the bitmap directory longer", |i| i.put(extension(i) + 16, i.get(extension(i) + 16) + 8)),
    ("the bitmap directory far past the file", |i| i.put(extension(i) + 24, FAR)),
    ("the bitmap directory in the L1 table", |i| i.put(extension(i) + 24, i.l1)),
    ("bitmaps that mean nothing", |i| i.flip(position::AUTOCLEAR as u64, 1)),
];

/// The offset of the bitmaps extension.
fn extension(image: &Raw) -> u64 {
    let magic = qcow2::extension::BITMAPS.to_be_bytes();
    let words = image.bytes[..512].chunks_exact(8);
    words.clone().position(|word| word[..4] == magic).expect("an image with bitmaps") as u64 * 8
}

fn directory(image: &Raw) -> u64 {
    image.get(extension(image) + 24)
}

/// The offset of the first bitmap's table, whose first entry names a cluster.
fn bitmap_table(image: &Raw) -> u64 {
    image.get(directory(image))
}
