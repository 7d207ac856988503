//! A new, empty image as bytes.
//!
//! Owns the order header, refcount table, refblocks, L1 table, without gaps. It writes nothing itself. Guest data is
//! not allocated: every cluster reads from the backing file, or as zeros.

use crate::address::HostOffset;
use crate::error::{FormatError, FormatErrorKind, Structure};
use crate::feature::Incompatible;
use crate::geometry::{CLUSTER_BITS_MAX, CLUSTER_BITS_MIN, Geometry, REFCOUNT_ORDER_MAX, Version};
use crate::header::{HEADER_LENGTH_V2, HEADER_LENGTH_V3, Header, L1_TABLE_SIZE_MAX};
use crate::position;
use crate::refcount::set_refcount;
use crate::table::{ENTRY_SIZE, set_entry};

/// The description of an image to create.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NewImage {
    /// Version, cluster size, refcount width, L2 entries and size of the disk.
    pub geometry: Geometry,
    /// Name of the backing file, as in the header.
    pub backing_file: Option<Vec<u8>>,
    /// Format of the backing file.
    pub backing_format: Option<String>,
}

/// Clusters of each structure.
struct Clusters {
    refcount_table: u64,
    refblocks: u64,
    l1_table: u64,
}

impl NewImage {
    /// An image without a backing file.
    pub fn new(geometry: Geometry) -> NewImage {
        NewImage { geometry, backing_file: None, backing_format: None }
    }

    /// The pieces to write and their offsets, in ascending order and without gaps. Each piece has whole clusters, so
    /// the end of the last piece is the file's length.
    ///
    /// # Errors
    /// If the format does not allow the geometry, or the header does not fit in a cluster.
    pub fn layout(&self) -> Result<Vec<(HostOffset, Vec<u8>)>, FormatError> {
        let geometry = &self.geometry;
        check_sizes(geometry)?;
        // For a disk of size 0 the format allows an empty L1 table, but every image created here has one entry.
        let l1_entries = geometry.l1_entries().max(1);
        let max = L1_TABLE_SIZE_MAX / ENTRY_SIZE as u64;
        if l1_entries > max {
            let kind = FormatErrorKind::DiskTooLarge { needed: l1_entries, max };
            return Err(FormatError::new(kind, Structure::L1Table, position::SIZE));
        }
        let clusters = count_clusters(geometry, l1_entries);
        let cluster_size = geometry.cluster_size();
        let refblocks_offset = (1 + clusters.refcount_table) * cluster_size;
        let l1_offset = refblocks_offset + clusters.refblocks * cluster_size;

        let header = self.header(l1_entries as u32, HostOffset(l1_offset), clusters.refcount_table as u32);
        let mut header = header.encode()?;
        header.resize(cluster_size as usize, 0);
        let mut refcount_table = vec![0; (clusters.refcount_table * cluster_size) as usize];
        for index in 0..clusters.refblocks {
            set_entry(&mut refcount_table, index as usize, refblocks_offset + index * cluster_size);
        }
        // Consecutive refblocks have no gap between them, so their refcounts are set as if in one block.
        let mut refblocks = vec![0; (clusters.refblocks * cluster_size) as usize];
        for index in 0..clusters.total() {
            set_refcount(geometry.refcount_order, &mut refblocks, index as usize, 1);
        }
        let l1_table = vec![0; (clusters.l1_table * cluster_size) as usize];
        Ok(vec![
            (HostOffset(0), header),
            (HostOffset(cluster_size), refcount_table),
            (HostOffset(refblocks_offset), refblocks),
            (HostOffset(l1_offset), l1_table),
        ])
    }

    fn header(&self, l1_entries: u32, l1_offset: HostOffset, refcount_table_clusters: u32) -> Header {
        let geometry = &self.geometry;
        let (header_length, unknown_length) = match geometry.version {
            Version::V2 => (HEADER_LENGTH_V2, 0),
            Version::V3 => (HEADER_LENGTH_V3, HEADER_LENGTH_V3 as usize - position::COMPRESSION_TYPE - 1),
        };
        let mut header = Header {
            version: geometry.version,
            cluster_bits: geometry.cluster_bits,
            size: geometry.size,
            crypt_method: 0,
            l1_entries,
            l1_offset,
            refcount_table_offset: HostOffset(geometry.cluster_size()),
            refcount_table_clusters,
            snapshots: 0,
            snapshots_offset: HostOffset(0),
            incompatible: if geometry.extended_l2 { Incompatible::EXTENDED_L2 } else { Incompatible(0) },
            compatible: 0,
            autoclear: 0,
            refcount_order: geometry.refcount_order,
            header_length,
            compression_type: 0,
            unknown_fields: vec![0; unknown_length],
            damaged_extensions: None,
            backing_file: self.backing_file.clone(),
            backing_format: None,
            extensions: Vec::new(),
        };
        header.set_backing_format(self.backing_format.as_deref());
        header
    }
}

impl Clusters {
    /// All clusters of the image, the header's included.
    fn total(&self) -> u64 {
        1 + self.refcount_table + self.refblocks + self.l1_table
    }
}

/// The refblocks count themselves and the refcount table too, so the loop adds refblocks until they suffice.
fn count_clusters(geometry: &Geometry, l1_entries: u64) -> Clusters {
    let l1_table = geometry.clusters_for(l1_entries * ENTRY_SIZE as u64);
    let mut clusters = Clusters { refcount_table: 1, refblocks: 1, l1_table };
    loop {
        let refblocks = clusters.total().div_ceil(geometry.refblock_entries());
        let refcount_table = geometry.clusters_for(refblocks * ENTRY_SIZE as u64);
        if (refblocks, refcount_table) == (clusters.refblocks, clusters.refcount_table) {
            return clusters;
        }
        clusters = Clusters { refcount_table, refblocks, l1_table };
    }
}

/// Checks the sizes that the arithmetic here depends on; encoding the header checks the rest.
fn check_sizes(geometry: &Geometry) -> Result<(), FormatError> {
    let bits = (geometry.cluster_bits, CLUSTER_BITS_MIN, CLUSTER_BITS_MAX);
    let order = (geometry.refcount_order, 0, REFCOUNT_ORDER_MAX);
    for ((value, min, max), structure, at) in [
        (bits, Structure::ClusterBits, position::CLUSTER_BITS),
        (order, Structure::RefcountOrder, position::REFCOUNT_ORDER),
    ] {
        if !(min..=max).contains(&value) {
            let kind = FormatErrorKind::OutOfRange { value: value.into(), min: min.into(), max: max.into() };
            return Err(FormatError::new(kind, structure, at));
        }
    }
    Ok(())
}
