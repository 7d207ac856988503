//! A compressed cluster: its entry and its data. Whatever both hold, other clusters are served, two reads give the
//! same answer, and the cluster can be written whole.

use disk::DiskOptions;
use qcow2::{
    Geometry, Header, HostOffset, Incompatible, L1Entry, L2Entry, NewImage, Version, set_entry, set_refcount,
};
use storage_sim::SimWorld;

use super::host::{options, world};
use super::session::{Known, SECTOR, Session};
use super::values::Values;

/// The largest offset of the stream in its cluster.
const START_MAX: u64 = 512;

/// The input: the image's properties, the entry, and the stream, which ends the file.
pub fn judge(input: &[u8]) {
    let mut values = Values(input);
    let (how, wild, start) = (values.u8(), values.u64(), u64::from(values.u16()) % START_MAX);
    let extended_l2 = how & 2 != 0;
    let cluster_bits = if extended_l2 { 14 + u32::from(how >> 4) % 3 } else { 9 + u32::from(how >> 4) % 8 };
    let geometry = Geometry {
        version: Version::V3,
        cluster_bits,
        refcount_order: 4,
        extended_l2,
        size: 4 << cluster_bits,
    };
    let cluster = geometry.cluster_size();
    let stream = values.0;
    // The most that an entry can cover, and a little more.
    let stream = &stream[..stream.len().min(2 * cluster as usize + 600)];
    let (file, honest) = image(&geometry, how & 1 != 0, stream, start, (how & 4 != 0).then_some(wild));
    let world = world(&file);
    let small = how & 8 != 0;
    let whole = read(&world, &geometry, small);
    if honest {
        write(&world, &geometry, small, whole.is_some());
    } else {
        // The entry may point to metadata: then the write is refused.
        let _ =
            Session::open(&world, &options(small), None).map(|mut session| session.write(0, SECTOR, 1, true));
    }
}

/// The bytes of the image, and whether its entry points exactly to the stream.
fn image(geometry: &Geometry, zstd: bool, stream: &[u8], start: u64, wild: Option<u64>) -> (Vec<u8>, bool) {
    let cluster = geometry.cluster_size();
    let mut file: Vec<u8> = Vec::new();
    for (offset, piece) in NewImage::new(*geometry).layout().expect("a geometry that the format allows") {
        file.resize(offset.0 as usize, 0);
        file.extend(piece);
    }
    let mut header = Header::parse(&file, file.len() as u64).expect("our own header");
    if zstd {
        header.compression_type = 1;
        header.incompatible = header.incompatible.with(Incompatible::COMPRESSION);
    }
    let encoded = header.encode().expect("a header that the format allows");
    file[..encoded.len()].copy_from_slice(&encoded);
    let table = file.len() as u64;
    // The entry's field may be too small for this number.
    let sectors = (start + stream.len() as u64).div_ceil(512).max(1);
    let sectors_max = 1 << (geometry.cluster_bits - 8);
    let offset = HostOffset(table + cluster + start);
    let entry = L2Entry::Compressed { offset, sectors: sectors.min(sectors_max) }.encode(geometry).descriptor;
    let raw = wild.map_or(entry, |wild| wild | qcow2::entry::COMPRESSED);
    let l1 = L1Entry::Table { offset: HostOffset(table), copied: true };
    set_entry(&mut file[header.l1_offset.0 as usize..], 0, l1.encode());
    file.resize((table + cluster + start) as usize, 0);
    set_entry(&mut file[table as usize..], 0, raw);
    file.extend(stream);
    let padded = (file.len() + usize::from(stream.is_empty())).next_multiple_of(512);
    file.resize(padded, 0);
    // Every refcount is 1: the stream's clusters belong to it alone.
    let block = qcow2::entry(&file[header.refcount_table_offset.0 as usize..], 0) as usize;
    let end = geometry.clusters_for(file.len() as u64);
    for index in 0..end as usize {
        set_refcount(geometry.refcount_order, &mut file[block..], index, 1);
    }
    (file, wild.is_none())
}

/// Reads the compressed cluster twice and another once; returns the compressed cluster's data.
fn read(world: &SimWorld, geometry: &Geometry, small: bool) -> Option<Vec<u8>> {
    let options = DiskOptions { read_only: true, ..options(small) };
    let mut session = Session::open(world, &options, Some(Known::default())).expect("its header is right");
    let cluster = geometry.cluster_size();
    let first = session.read(0, cluster);
    let other = session.read(cluster, cluster).expect("an empty cluster");
    assert!(other.iter().all(|byte| *byte == 0));
    assert_eq!(session.read(0, cluster), first, "the same answer");
    first
}

/// A cluster that cannot be inflated cannot be written in part, but it can be written whole.
fn write(world: &SimWorld, geometry: &Geometry, small: bool, readable: bool) {
    let cluster = geometry.cluster_size();
    let mut session = Session::open(world, &options(small), Some(Known::default())).expect("it opens");
    session.read(0, cluster);
    session.failures.clear();
    let all = cluster == SECTOR;
    session.write(0, SECTOR, 3, false);
    assert_eq!(session.failures.is_empty(), readable || all, "{:?}", session.failures);
    session.failures.clear();
    session.write(0, cluster, 5, false);
    session.read(0, cluster);
    session.flush();
    assert!(session.failures.is_empty(), "{:?}", session.failures);
    let (_, closed) = session.close();
    closed.expect("a clean close");
}
