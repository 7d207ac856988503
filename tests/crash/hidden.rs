//! An internal snapshot that is hidden from the disk. It shares all L2 tables and data clusters with the active image.
//! So nothing may be written in place before it is copied, and no count may fall to 0 while the snapshot uses the
//! cluster.
//!
//! It shows that the flags and refcounts alone protect a snapshot. The header does not count it while the disk is open,
//! so no guard covers it. A crash state is checked with the snapshot revealed: every refcount must be right. The
//! snapshot itself must read as before.

use std::path::Path;

use qcow2::entry::COPIED;
use qcow2::{Geometry, Header, L1Entry, L2Entry, RawL2Entry, position};
use storage_sim::Image;

use super::shape::TOP;
use super::stamp::Value;

/// Bytes of an entry of the snapshot table before its strings: the fixed part and the extra data of version 3.
const ENTRY_BYTES: usize = 40 + 16;

/// The location and the values of a hidden snapshot.
#[derive(Clone)]
pub struct Hidden {
    header: Header,
    l1_offset: u64,
    /// The values by sector.
    pub values: Vec<Value>,
}

/// The top image while something is added to it.
pub struct Making {
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// Its header.
    pub header: Header,
    geometry: Geometry,
}

/// Makes a snapshot of the top image, which must be intact and closed, and hides it. The image's sectors hold `values`.
pub fn hide(image: &Image, values: &[Value]) -> (Image, Hidden) {
    let mut making = Making::of(image);
    let header = making.header.clone();
    let l1 = making.share();
    let l1_offset = making.append(&l1);
    let table = making.append(&entry(l1_offset, &header));
    making.put(position::SNAPSHOTS_OFFSET as u64, &table.to_be_bytes());
    let hidden = Hidden { header, l1_offset, values: values.to_vec() };
    (image.with(Path::new(TOP), 0, &making.bytes), hidden)
}

impl Hidden {
    /// The same image with the snapshot named in its header.
    pub fn revealed(&self, image: &Image) -> Image {
        image.with(Path::new(TOP), position::SNAPSHOTS as u64, &1u32.to_be_bytes())
    }

    /// The same image with the contents of the snapshot. It may only be read.
    pub fn as_it_was(&self, image: &Image) -> Image {
        let patch = position::patch_l1_table(self.header.l1_entries, qcow2::HostOffset(self.l1_offset));
        image.with(Path::new(TOP), patch.offset.0, &patch.bytes)
    }
}

/// The snapshot's entry in the table of snapshots (spec: "Snapshots").
fn entry(l1_offset: u64, header: &Header) -> Vec<u8> {
    let mut entry = vec![0; ENTRY_BYTES];
    entry[..8].copy_from_slice(&l1_offset.to_be_bytes());
    entry[8..12].copy_from_slice(&header.l1_entries.to_be_bytes());
    // Its name and its ID have one byte each.
    entry[12..14].copy_from_slice(&1u16.to_be_bytes());
    entry[14..16].copy_from_slice(&1u16.to_be_bytes());
    entry[36..40].copy_from_slice(&16u32.to_be_bytes());
    entry[48..56].copy_from_slice(&header.size.to_be_bytes());
    entry.extend(b"1s");
    entry.resize(entry.len().next_multiple_of(8), 0);
    entry
}

impl Making {
    /// Starts from the top image, which must be intact and closed.
    pub fn of(image: &Image) -> Making {
        let bytes = image.file(Path::new(TOP)).expect("the image").to_bytes();
        let header = Header::parse(&bytes, bytes.len() as u64).expect("an image that was closed");
        Making { bytes, geometry: header.geometry(), header }
    }

    /// Writes bytes at an offset.
    pub fn put(&mut self, at: u64, bytes: &[u8]) {
        self.bytes[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
    }

    /// Adds a reference to everything that the active L1 table refers to, and clears the COPIED flags. Returns the new
    /// L1 table.
    fn share(&mut self) -> Vec<u8> {
        let start = self.header.l1_offset.0 as usize;
        for index in 0..self.header.l1_entries as usize {
            let raw = qcow2::entry(&self.bytes[start..], index);
            let entry = L1Entry::decode(raw, &self.geometry).expect("an image that was closed");
            let L1Entry::Table { offset, .. } = entry else { continue };
            self.count(offset.0);
            self.share_table(offset.0 as usize);
            let shared = L1Entry::Table { offset, copied: false };
            qcow2::set_entry(&mut self.bytes[start..], index, shared.encode());
        }
        self.bytes[start..start + self.header.l1_entries as usize * 8].to_vec()
    }

    fn share_table(&mut self, table: usize) {
        for index in 0..self.geometry.l2_entries() as usize {
            let raw = RawL2Entry::load(&self.bytes[table..], index, &self.geometry);
            let entry = L2Entry::decode(raw, &self.geometry).expect("an image that was closed");
            let Some(host) = entry.host() else { continue };
            self.count(host.offset.0);
            let shared = RawL2Entry { descriptor: raw.descriptor & !COPIED, ..raw };
            shared.store(&mut self.bytes[table..], index, &self.geometry);
        }
    }

    /// Adds a reference to the cluster at an offset.
    fn count(&mut self, offset: u64) {
        let (cluster, entries) = (self.geometry.cluster_size(), self.geometry.refblock_entries());
        let index = offset / cluster;
        let table = self.header.refcount_table_offset.0 as usize;
        let block = qcow2::entry(&self.bytes[table..], (index / entries) as usize) as usize;
        assert!(block > 0, "the image's refblocks count what is added to it");
        let counts = &mut self.bytes[block..block + cluster as usize];
        let (order, index) = (self.geometry.refcount_order, (index % entries) as usize);
        let count = qcow2::refcount(order, counts, index);
        qcow2::set_refcount(order, counts, index, count + 1);
    }

    /// Appends clusters that hold `bytes`, and returns their offset.
    pub fn append(&mut self, bytes: &[u8]) -> u64 {
        let cluster = self.geometry.cluster_size() as usize;
        let at = self.bytes.len().next_multiple_of(cluster);
        let end = (at + bytes.len()).next_multiple_of(cluster);
        self.bytes.resize(end, 0);
        self.put(at as u64, bytes);
        for offset in (at..end).step_by(cluster) {
            self.count(offset as u64);
        }
        at as u64
    }
}
