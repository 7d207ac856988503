//! Compressed clusters in a new image, as a converting tool leaves them: one directly after the other, so that they
//! share host clusters.

use std::io::Write as _;

use flate2::write::DeflateEncoder;
use qcow2::{Compression, Geometry, HostOffset, Incompatible, L1Entry, L2Entry, position};

use super::shape::{FIRST_WRITE, Shape};
use super::stamp::{SECTOR, Value, stamp};

/// Adds compressed clusters to a new image. Of every four clusters, two hold data that does not compress and takes a
/// little more than a cluster. The third holds zeros, which take very little. The last stays unallocated.
pub fn fill(shape: &Shape, mut bytes: Vec<u8>, values: &mut [Value], how: Compression) -> Vec<u8> {
    let geometry = shape.geometry();
    let cluster = geometry.cluster_size() as usize;
    if how == Compression::Zstd {
        bytes[position::COMPRESSION_TYPE] = 1;
        bytes[position::INCOMPATIBLE + 7] |= Incompatible::COMPRESSION.0 as u8;
    }
    let packed = (0..geometry.guest_clusters()).filter(|guest| guest % 4 != 3);
    let mut data = Vec::new();
    let mut places = Vec::new();
    for guest in packed {
        let stream = compress(&contents(shape, guest, values), how);
        // A descriptor counts whole sectors, at most two clusters of them.
        if data.len() % SECTOR as usize + stream.len() > 2 * cluster {
            data.resize(data.len().next_multiple_of(SECTOR as usize), 0);
        }
        places.push((guest, data.len() as u64, stream.len() as u64));
        data.extend(stream);
    }

    bytes.resize(bytes.len().next_multiple_of(cluster), 0);
    let first_table = bytes.len();
    let tables = geometry.l1_entries() as usize;
    bytes.resize(first_table + tables * cluster, 0);
    let blocks = add_refblocks(&mut bytes, &geometry, data.len());
    let l1 = qcow2::entry(&bytes[position::L1_OFFSET..], 0) as usize;
    for table in 0..tables {
        let offset = HostOffset((first_table + table * cluster) as u64);
        qcow2::set_entry(&mut bytes[l1..], table, L1Entry::Table { offset, copied: true }.encode());
        count(&mut bytes, &geometry, offset.0, 1);
    }
    for block in blocks {
        count(&mut bytes, &geometry, block, 1);
    }
    let base = bytes.len() as u64;
    for (guest, at, length) in places {
        let offset = HostOffset(base + at);
        let sectors = (offset.0 % SECTOR + length).div_ceil(SECTOR);
        let entry = L2Entry::Compressed { offset, sectors }.encode(&geometry).descriptor;
        // The tables are contiguous, like one table.
        let place = first_table + guest as usize * geometry.l2_entry_size() as usize;
        qcow2::set_entry(&mut bytes[place..], 0, entry);
        count(&mut bytes, &geometry, offset.0, sectors * SECTOR - offset.0 % SECTOR);
    }
    bytes.extend(data);
    bytes.resize(bytes.len().next_multiple_of(cluster), 0);
    bytes
}

/// Adds refblocks at the end. They suffice to count the file so far, themselves, and `data` bytes after them.
fn add_refblocks(bytes: &mut Vec<u8>, geometry: &Geometry, data: usize) -> Vec<u64> {
    let cluster = geometry.cluster_size() as usize;
    let table = qcow2::entry(&bytes[position::REFCOUNT_TABLE_OFFSET..], 0) as usize;
    let mut added = Vec::new();
    for index in 0.. {
        let counted = index as u64 * geometry.refblock_entries();
        if counted >= geometry.clusters_for((bytes.len() + data) as u64) {
            break;
        }
        if qcow2::entry(&bytes[table..], index) == 0 {
            added.push(bytes.len() as u64);
            let offset = bytes.len() as u64;
            qcow2::set_entry(&mut bytes[table..table + cluster], index, offset);
            bytes.resize(bytes.len() + cluster, 0);
        }
    }
    added
}

/// The bytes that the guest reads from a cluster. Records them in `values`.
fn contents(shape: &Shape, guest: u64, values: &mut [Value]) -> Vec<u8> {
    let mut contents = vec![0; shape.cluster_bytes() as usize];
    let first = guest * shape.cluster_sectors();
    for (sector, bytes) in (first..shape.sectors).zip(contents.chunks_exact_mut(SECTOR as usize)) {
        values[sector as usize] = if guest % 4 == 2 { Value::Zero } else { Value::Write(FIRST_WRITE) };
        if guest % 4 != 2 {
            stamp(sector, FIRST_WRITE, bytes);
        }
    }
    contents
}

fn compress(contents: &[u8], how: Compression) -> Vec<u8> {
    match how {
        Compression::Deflate => {
            let mut encoder = DeflateEncoder::new(Vec::new(), flate2::Compression::default());
            encoder.write_all(contents).expect("to memory");
            encoder.finish().expect("to memory")
        }
        Compression::Zstd => zstd::bulk::compress(contents, 3).expect("to memory"),
    }
}

/// Adds one reference to every cluster of a range.
fn count(bytes: &mut [u8], geometry: &Geometry, offset: u64, length: u64) {
    let (cluster, order) = (geometry.cluster_size(), geometry.refcount_order);
    let table = qcow2::entry(&bytes[position::REFCOUNT_TABLE_OFFSET..], 0) as usize;
    for number in offset / cluster..(offset + length).div_ceil(cluster) {
        let block = qcow2::entry(&bytes[table..], (number / geometry.refblock_entries()) as usize);
        assert_ne!(block, 0, "there are refblocks enough");
        let counts = &mut bytes[block as usize..][..cluster as usize];
        let index = (number % geometry.refblock_entries()) as usize;
        let before = qcow2::refcount(order, counts, index);
        qcow2::set_refcount(order, counts, index, before + 1);
    }
}
