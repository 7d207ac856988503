//! The images to be damaged: small, sound, and always the same, as they are built here byte by byte.
//!
//! Owns the layout of these images. Each guest cluster with data is filled with one byte.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::sync::Arc;

use flate2::write::DeflateEncoder;
use qcow2::entry::COPIED;
use qcow2::snapshot::encode_table;
use qcow2::{
    Extension, Geometry, Header, HostOffset, Incompatible, L1Entry, L2Entry, NewImage, RawL2Entry, Snapshot,
    Version, entry, extension, position, set_entry, set_refcount,
};

/// The name of an external data file.
pub const DATA: &str = "data";
/// The bytes of a single read.
pub const UNIT: u64 = 4096;

/// An image, and the contents of its disk.
#[derive(Clone)]
pub struct Victim {
    /// Its name, which tells its kind.
    pub name: &'static str,
    /// The file.
    pub bytes: Vec<u8>,
    /// The contents of its external data file, if it has one.
    pub data: Option<Arc<[u8]>>,
    /// The places to read, each with the byte that fills it.
    pub contents: BTreeMap<u64, u8>,
    /// An offset in an empty cluster, and the length of a cluster.
    pub empty: (u64, u64),
}

/// Builds an image.
struct Maker {
    geometry: Geometry,
    bytes: Vec<u8>,
    /// The external data file; empty if the data is in the image itself.
    data: Vec<u8>,
    contents: BTreeMap<u64, u8>,
}

impl Maker {
    /// An empty image.
    fn new(version: Version, cluster_bits: u32, extended_l2: bool) -> Self {
        let geometry = Geometry { version, cluster_bits, refcount_order: 4, extended_l2, size: 3 << 20 };
        let mut bytes = Vec::new();
        for (offset, piece) in NewImage::new(geometry).layout().expect("a geometry that the format allows") {
            bytes.resize(offset.0 as usize, 0);
            bytes.extend(piece);
        }
        Maker { geometry, bytes, data: Vec::new(), contents: BTreeMap::new() }
    }

    fn cluster(&self) -> u64 {
        self.geometry.cluster_size()
    }

    fn header(&self) -> Header {
        Header::parse(&self.bytes, self.bytes.len() as u64).expect("our own header")
    }

    fn put(&mut self, at: u64, raw: u64) {
        set_entry(&mut self.bytes[at as usize..], 0, raw);
    }

    fn get(&self, at: u64) -> u64 {
        entry(&self.bytes[at as usize..], 0)
    }

    /// Adds a cluster at the end, with this refcount, filled with one byte.
    fn add(&mut self, byte: u8, count: u64) -> HostOffset {
        let offset = self.bytes.len() as u64;
        self.bytes.resize((offset + self.cluster()) as usize, byte);
        self.count(offset, count);
        HostOffset(offset)
    }

    fn count(&mut self, offset: u64, count: u64) {
        let block = self.get(self.header().refcount_table_offset.0) as usize;
        let index = (offset / self.cluster()) as usize;
        set_refcount(self.geometry.refcount_order, &mut self.bytes[block..], index, count);
    }

    /// The L2 table that an L1 entry names; creates it if there is none.
    fn table(&mut self, index: u64) -> u64 {
        let at = self.header().l1_offset.0 + 8 * index;
        if self.get(at) == 0 {
            let offset = self.add(0, 1);
            self.put(at, L1Entry::Table { offset, copied: true }.encode());
        }
        self.get(at) & qcow2::entry::OFFSET_MASK
    }

    fn set(&mut self, guest: u64, entry: impl Into<RawL2Entry>) {
        let table = self.table(guest / self.geometry.l2_entries()) as usize;
        let index = (guest % self.geometry.l2_entries()) as usize;
        entry.into().store(&mut self.bytes[table..], index, &self.geometry);
    }

    fn holds(&mut self, guest: u64, byte: u8) {
        let start = guest * self.cluster();
        self.contents.extend((0..self.cluster() / UNIT).map(|n| (start + n * UNIT, byte)));
    }

    fn data(&mut self, guest: u64) {
        let byte = 0x10 ^ guest as u8;
        let offset = self.place(guest, byte);
        self.set_standard(guest, L2Entry::Data { offset, copied: true });
        self.holds(guest, byte);
    }

    /// Adds a host cluster for a guest cluster, filled with one byte.
    fn place(&mut self, guest: u64, byte: u8) -> HostOffset {
        if self.data.is_empty() {
            return self.add(byte, 1);
        }
        let (start, cluster) = (guest * self.cluster(), self.cluster() as usize);
        self.data[start as usize..][..cluster].fill(byte);
        HostOffset(start)
    }

    fn set_standard(&mut self, guest: u64, entry: L2Entry) {
        let apart = !self.data.is_empty();
        let raw = if apart { entry.encode_external(&self.geometry) } else { entry.encode(&self.geometry) };
        self.set(guest, raw);
    }

    /// Declares an external data file, filled with one byte everywhere.
    fn apart(&mut self) {
        self.data = vec![0xdd; self.geometry.size as usize];
        let mut header = self.header();
        header.incompatible = header.incompatible.with(Incompatible::DATA_FILE);
        let data = DATA.as_bytes().to_vec();
        header.extensions.push(Extension { magic: extension::DATA_FILE, data });
        let bytes = header.encode().expect("a header that the format allows");
        self.bytes[..bytes.len()].copy_from_slice(&bytes);
    }

    /// Adds every kind of cluster but compressed ones. Clusters 0 to 3 are data, 4 is zero, 5 is zero and keeps its
    /// cluster, 8 is empty. One data cluster is far behind.
    fn fill(&mut self) {
        // Both tables come first.
        let far = self.geometry.guest_clusters() - 1;
        self.table(0);
        self.table(far / self.geometry.l2_entries());
        (0..4).for_each(|guest| self.data(guest));
        if self.geometry.version == Version::V3 {
            self.set(4, L2Entry::Zero.encode(&self.geometry));
            let offset = self.place(5, 0xee);
            self.set_standard(5, L2Entry::ZeroAllocated { offset, copied: true });
        }
        [4, 5, 8, 9].iter().for_each(|guest| self.holds(*guest, 0));
        self.data(far);
    }

    /// Compresses guest clusters 6 and 7 into one host cluster.
    fn pack(&mut self) {
        let host = self.add(0, 2);
        let mut start = host.0 + 0x30;
        for guest in [6, 7] {
            let byte = 0x60 + guest as u8;
            let mut encoder = DeflateEncoder::new(Vec::new(), flate2::Compression::best());
            encoder.write_all(&vec![byte; self.cluster() as usize]).expect("to memory");
            let stream = encoder.finish().expect("to memory");
            let at = start as usize;
            self.bytes[at..at + stream.len()].copy_from_slice(&stream);
            let sectors = (start % 512 + stream.len() as u64).div_ceil(512);
            let entry = L2Entry::Compressed { offset: HostOffset(start), sectors };
            self.set(guest, entry.encode(&self.geometry));
            self.holds(guest, byte);
            start += 0x200;
        }
    }

    /// Adds a snapshot that shares all clusters of the disk.
    fn snapshot(&mut self, name: &str) {
        let (header, cluster) = (self.header(), self.cluster());
        let l1 = header.l1_offset.0;
        let entries = u64::from(header.l1_entries);
        for index in 0..entries {
            let raw = self.get(l1 + 8 * index);
            let table = raw & qcow2::entry::OFFSET_MASK;
            if table == 0 {
                continue;
            }
            self.put(l1 + 8 * index, raw & !COPIED);
            self.count(table, 2);
            for at in (table..table + cluster).step_by(8) {
                let raw = self.get(at);
                if raw & COPIED != 0 {
                    self.put(at, raw & !COPIED);
                    self.count(raw & qcow2::entry::OFFSET_MASK, 2);
                }
            }
        }
        let copy = self.add(0, 1);
        let (from, length) = (l1 as usize, (8 * entries) as usize);
        self.bytes.copy_within(from..from + length, copy.0 as usize);
        let mut snapshot = Snapshot::new(b"1".to_vec(), name.as_bytes().to_vec(), self.geometry.size);
        (snapshot.l1_offset, snapshot.l1_entries) = (copy, header.l1_entries);
        let table = self.add(0, 1);
        let encoded = encode_table(&[snapshot]);
        self.bytes[table.0 as usize..][..encoded.len()].copy_from_slice(&encoded);
        self.put(position::SNAPSHOTS_OFFSET as u64, table.0);
        self.bytes[position::SNAPSHOTS + 3] = 1;
    }

    /// Adds a persistent bitmap of one cluster, which is kept up to date.
    fn bitmap(&mut self, name: &str) {
        let (directory, table, bits) = (self.add(0, 1), self.add(0, 1), self.add(0, 1));
        self.bytes[bits.0 as usize] = 1;
        self.put(table.0, bits.0);
        let mut entry = table.0.to_be_bytes().to_vec();
        entry.extend(1_u32.to_be_bytes());
        // Flag `auto`; dirty tracking, 2^16 bytes a bit.
        entry.extend(2_u32.to_be_bytes());
        entry.extend([1, 16]);
        entry.extend((name.len() as u16).to_be_bytes());
        entry.extend([0; 4]);
        entry.extend(name.as_bytes());
        entry.resize(entry.len().next_multiple_of(8), 0);
        self.bytes[directory.0 as usize..][..entry.len()].copy_from_slice(&entry);
        let mut data = 1_u32.to_be_bytes().to_vec();
        data.extend([0; 4]);
        data.extend((entry.len() as u64).to_be_bytes());
        data.extend(directory.0.to_be_bytes());
        let mut header = self.header();
        header.autoclear |= 1;
        header.extensions.push(Extension { magic: extension::BITMAPS, data });
        let bytes = header.encode().expect("a header that the format allows");
        self.bytes[..bytes.len()].copy_from_slice(&bytes);
    }

    fn done(self, name: &'static str) -> Victim {
        let empty = (8 * self.cluster(), self.cluster());
        let data = (!self.data.is_empty()).then(|| self.data.into());
        Victim { name, bytes: self.bytes, data, contents: self.contents, empty }
    }
}

fn ordinary() -> Maker {
    let mut maker = Maker::new(Version::V3, 12, false);
    maker.fill();
    maker.pack();
    maker
}

/// Version 3, clusters of 4 KiB, some of them compressed.
pub fn plain() -> Victim {
    ordinary().done("plain")
}

/// Version 2.
pub fn old() -> Victim {
    let mut maker = Maker::new(Version::V2, 12, false);
    maker.fill();
    maker.done("version 2")
}

/// With a snapshot that shares everything.
pub fn snapshot() -> Victim {
    let mut maker = Maker::new(Version::V3, 12, false);
    maker.fill();
    maker.snapshot("one");
    maker.done("with a snapshot")
}

/// With its data in an external file.
pub fn data_file() -> Victim {
    let mut maker = Maker::new(Version::V3, 12, false);
    maker.apart();
    maker.fill();
    maker.done("with a data file")
}

/// With a persistent bitmap.
pub fn bitmap() -> Victim {
    let mut maker = ordinary();
    maker.bitmap("one");
    maker.done("with a bitmap")
}

/// With subclusters: cluster 3 has some with data, some with zeros and some unallocated.
pub fn subclusters() -> Victim {
    let mut maker = Maker::new(Version::V3, 14, true);
    maker.fill();
    let table = maker.table(0);
    // The first 16 subclusters are data, the next 8 are zero.
    maker.put(table + 3 * 16 + 8, 0x00ff_0000_0000_ffff);
    let cluster = maker.cluster();
    maker.contents.extend((2..4).map(|n| (3 * cluster + n * UNIT, 0)));
    maker.done("with subclusters")
}
