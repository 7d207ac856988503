//! Addresses and ranges of the guest's disk and of the image file, each a type of its own.
//!
//! Owns the names only: the arithmetic that needs a cluster size is in [`Geometry`](crate::Geometry).

use std::fmt;
use std::ops::Range;

/// A byte offset on the guest's disk.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct GuestOffset(pub u64);

/// A byte offset in the image file.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct HostOffset(pub u64);

/// The number of a cluster on the guest's disk, from 0.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct GuestCluster(pub u64);

/// The number of a cluster in the image file, from 0 (the header's).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct HostCluster(pub u64);

/// A range of bytes in the image file.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct HostRange {
    /// Where it begins.
    pub offset: HostOffset,
    /// Its length in bytes.
    pub length: u64,
}

impl HostRange {
    /// A range of `length` bytes from an offset on.
    pub const fn new(offset: HostOffset, length: u64) -> HostRange {
        HostRange { offset, length }
    }

    /// The first byte past it. It is for ranges that do not reach past 2^64 bytes.
    pub const fn end(self) -> HostOffset {
        HostOffset(self.offset.0 + self.length)
    }
}

/// A run of clusters in the image file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostRun {
    /// The first cluster.
    pub start: HostCluster,
    /// The number of clusters.
    pub count: u64,
}

impl HostRun {
    /// A run of `count` clusters.
    pub const fn new(start: HostCluster, count: u64) -> HostRun {
        HostRun { start, count }
    }

    /// A run of one cluster.
    pub const fn one(cluster: HostCluster) -> HostRun {
        HostRun::new(cluster, 1)
    }

    /// The first cluster past it.
    pub const fn end(self) -> HostCluster {
        HostCluster(self.start.0 + self.count)
    }

    /// The numbers of its clusters.
    pub const fn clusters(self) -> Range<u64> {
        self.start.0..self.start.0 + self.count
    }
}

impl fmt::Display for GuestOffset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Display for HostOffset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Display for GuestCluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl fmt::Display for HostCluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_show_in_hex_and_cluster_numbers_in_decimal() {
        assert_eq!(GuestOffset(0x1_0000).to_string(), "0x10000");
        assert_eq!(HostOffset(0).to_string(), "0x0");
        assert_eq!(GuestCluster(16).to_string(), "16");
        assert_eq!(HostCluster(17).to_string(), "17");
    }
}
