//! The sizes that follow from a header: clusters, tables and how an address splits into indices.
//!
//! Owns pure arithmetic. It checks nothing about an image: the [`Geometry`] of a parsed [`Header`](crate::Header) is
//! within the format's limits, and a geometry from anywhere else must be.

use crate::address::{GuestCluster, GuestOffset, HostCluster, HostOffset};

/// Bytes of a sector: the unit of a disk's size, and the least unit of an access to it and to its files.
pub const SECTOR: u64 = 512;
/// Subclusters in a cluster of an image with extended L2 entries.
pub const SUBCLUSTERS: u32 = 32;
/// The smallest cluster: 512 bytes.
pub const CLUSTER_BITS_MIN: u32 = 9;
/// The largest cluster: 2 MiB.
pub const CLUSTER_BITS_MAX: u32 = 21;
/// The smallest cluster with extended L2 entries: its 32 subclusters have 512 bytes each.
pub const CLUSTER_BITS_MIN_EXTENDED_L2: u32 = 14;
/// The widest refcounts: 64 bits.
pub const REFCOUNT_ORDER_MAX: u32 = 6;
/// The refcounts of version 2, whose header has no field for it: 16 bits.
pub const REFCOUNT_ORDER_V2: u32 = 4;

/// The version of the format, as in the header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Version {
    /// Version 2: 16-bit refcounts, no feature bits, no zero clusters.
    V2,
    /// Version 3.
    V3,
}

impl Version {
    /// The number in the header.
    pub const fn number(self) -> u32 {
        match self {
            Version::V2 => 2,
            Version::V3 => 3,
        }
    }
}

/// The values that the layout of an image depends on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Geometry {
    /// The format's version.
    pub version: Version,
    /// Binary logarithm of the cluster size in bytes, 9 to 21.
    pub cluster_bits: u32,
    /// Binary logarithm of the width of a refcount in bits, 0 to 6.
    pub refcount_order: u32,
    /// True if L2 entries are 16 bytes long and describe 32 subclusters each.
    pub extended_l2: bool,
    /// Size of the guest's disk in bytes.
    pub size: u64,
}

impl Geometry {
    /// Bytes in a cluster.
    pub const fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Bytes of a granule, the smallest unit that can be allocated: a subcluster with extended L2 entries, else a
    /// cluster.
    pub const fn granule_size(&self) -> u64 {
        if self.extended_l2 { self.cluster_size() / SUBCLUSTERS as u64 } else { self.cluster_size() }
    }

    /// Bytes in an L2 entry: 8, or 16 with extended L2 entries.
    pub const fn l2_entry_size(&self) -> u64 {
        if self.extended_l2 { 16 } else { 8 }
    }

    /// Entries in an L2 table, which is one cluster.
    pub const fn l2_entries(&self) -> u64 {
        1 << self.l2_bits()
    }

    /// Entries that the L1 table needs for the disk's size.
    pub const fn l1_entries(&self) -> u64 {
        self.guest_clusters().div_ceil(self.l2_entries())
    }

    /// Refcounts in a refblock, which is one cluster.
    pub const fn refblock_entries(&self) -> u64 {
        1 << (self.cluster_bits + 3 - self.refcount_order)
    }

    /// Clusters on the guest's disk; the last may be partial.
    pub const fn guest_clusters(&self) -> u64 {
        self.clusters_for(self.size)
    }

    /// The guest cluster that holds a byte.
    pub const fn guest_cluster(&self, offset: GuestOffset) -> GuestCluster {
        GuestCluster(offset.0 >> self.cluster_bits)
    }

    /// Where a guest cluster begins.
    ///
    /// # Panics
    /// If the cluster lies past 2^64 bytes: no disk has it, so this is a programmer error.
    pub const fn guest_offset(&self, cluster: GuestCluster) -> GuestOffset {
        assert!(
            cluster.0 <= u64::MAX >> self.cluster_bits,
            "a guest cluster past the end of the address space"
        );
        GuestOffset(cluster.0 << self.cluster_bits)
    }

    /// The host cluster that holds a byte of the file.
    pub const fn host_cluster(&self, offset: HostOffset) -> HostCluster {
        HostCluster(offset.0 >> self.cluster_bits)
    }

    /// Where a host cluster begins in the file. For a cluster number that an image claims (an index into the refcount
    /// table), see [`Geometry::host_offset_checked`].
    ///
    /// # Panics
    /// If the cluster lies past 2^64 bytes.
    pub const fn host_offset(&self, cluster: HostCluster) -> HostOffset {
        match self.host_offset_checked(cluster) {
            Some(offset) => offset,
            None => panic!("a host cluster past the end of the address space"),
        }
    }

    /// Where a host cluster begins in the file; `None` past 2^64 bytes. The largest refcount table has room for such
    /// clusters, so code that walks one must use this function.
    pub const fn host_offset_checked(&self, cluster: HostCluster) -> Option<HostOffset> {
        if cluster.0 <= u64::MAX >> self.cluster_bits {
            Some(HostOffset(cluster.0 << self.cluster_bits))
        } else {
            None
        }
    }

    /// The distance in bytes of an offset from the start of its cluster.
    pub const fn in_cluster(&self, offset: u64) -> u64 {
        offset & (self.cluster_size() - 1)
    }

    /// True if an offset is the start of a cluster.
    pub const fn is_aligned(&self, offset: u64) -> bool {
        self.in_cluster(offset) == 0
    }

    /// Clusters that hold `bytes`, rounded up.
    pub const fn clusters_for(&self, bytes: u64) -> u64 {
        bytes.div_ceil(self.cluster_size())
    }

    /// The index into the L1 table for a guest cluster.
    pub const fn l1_index(&self, cluster: GuestCluster) -> u64 {
        cluster.0 >> self.l2_bits()
    }

    /// A guest cluster's index in its L2 table.
    pub const fn l2_index(&self, cluster: GuestCluster) -> u64 {
        cluster.0 & (self.l2_entries() - 1)
    }

    /// The index in the refcount table of the refblock that counts a host cluster.
    pub const fn refcount_table_index(&self, cluster: HostCluster) -> u64 {
        cluster.0 / self.refblock_entries()
    }

    /// A host cluster's index in its refblock.
    pub const fn refblock_index(&self, cluster: HostCluster) -> u64 {
        cluster.0 % self.refblock_entries()
    }

    /// Binary logarithm of the entries in an L2 table.
    const fn l2_bits(&self) -> u32 {
        self.cluster_bits - if self.extended_l2 { 4 } else { 3 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn geometry(cluster_bits: u32, size: u64) -> Geometry {
        Geometry { version: Version::V3, cluster_bits, refcount_order: 4, extended_l2: false, size }
    }

    #[test]
    fn sizes_follow_from_the_cluster_size() {
        let small = geometry(9, 0);
        assert_eq!((small.cluster_size(), small.l2_entries(), small.refblock_entries()), (512, 64, 256));
        let large = geometry(21, 0);
        assert_eq!((large.cluster_size(), large.l2_entries()), (2 << 20, 1 << 18));
        assert_eq!(large.refblock_entries(), 1 << 20);
        let extended = Geometry { extended_l2: true, ..geometry(16, 0) };
        assert_eq!((extended.l2_entry_size(), extended.l2_entries()), (16, 4096));
        assert_eq!((extended.granule_size(), large.granule_size()), (2048, 2 << 20));
    }

    #[test]
    fn a_refblock_holds_as_many_refcounts_as_their_width_allows() {
        let entries = [0, 1, 2, 3, 4, 5, 6]
            .map(|refcount_order| Geometry { refcount_order, ..geometry(9, 0) }.refblock_entries());
        assert_eq!(entries, [4096, 2048, 1024, 512, 256, 128, 64]);
    }

    #[test]
    fn l1_entries_are_rounded_up() {
        let reach = 64 * 512;
        for (size, clusters, entries) in [
            (0, 0, 0),
            (1, 1, 1),
            (512, 1, 1),
            (513, 2, 1),
            (reach, 64, 1),
            (reach + 1, 65, 2),
            (u64::MAX, 1 << 55, 1 << 49),
        ] {
            let geometry = geometry(9, size);
            assert_eq!(
                (geometry.guest_clusters(), geometry.l1_entries()),
                (clusters, entries),
                "size {size}"
            );
        }
    }

    #[test]
    fn an_address_splits_into_indices() {
        let geometry = geometry(16, 1 << 40);
        let offset = GuestOffset((3 << 29) + (5 << 16) + 7);
        let cluster = geometry.guest_cluster(offset);
        assert_eq!((geometry.l1_index(cluster), geometry.l2_index(cluster)), (3, 5));
        assert_eq!(geometry.in_cluster(offset.0), 7);
        assert_eq!(geometry.guest_offset(cluster).0 + 7, offset.0);
        assert!(geometry.is_aligned(1 << 16) && !geometry.is_aligned((1 << 16) - 512));
        let host = geometry.host_cluster(HostOffset((32768 + 2) << 16 | 9));
        assert_eq!((geometry.refcount_table_index(host), geometry.refblock_index(host)), (1, 2));
        assert_eq!(geometry.host_offset(host), HostOffset((32768 + 2) << 16));
    }

    #[test]
    fn a_cluster_past_the_address_space_has_no_offset() {
        let geometry = geometry(21, 0);
        let last = HostCluster((1 << 43) - 1);
        assert_eq!(geometry.host_offset_checked(last), Some(HostOffset(u64::MAX - (2 << 20) + 1)));
        assert_eq!(geometry.host_offset_checked(HostCluster(1 << 43)), None);
    }
}
