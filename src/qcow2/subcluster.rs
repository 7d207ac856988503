//! Subclusters: the 32 equal parts of a cluster in an image with extended L2 entries, and the bitmap that describes
//! them.
//!
//! Owns the bitmap's bits (spec: "Extended L2 Entries") and the sets of subclusters of one kind. It knows no L2 entry:
//! `Subclusters::entry` and `Subclusters::of`, which convert to and from one, are in `entry`.

use std::ops::Range;

use crate::address::HostOffset;
use crate::geometry::SUBCLUSTERS;

/// A set of subclusters of one cluster; bit 0 is the first subcluster.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SubclusterSet(pub u32);

impl SubclusterSet {
    /// The empty set.
    pub const EMPTY: SubclusterSet = SubclusterSet(0);
    /// All 32.
    pub const ALL: SubclusterSet = SubclusterSet(u32::MAX);

    /// The subclusters of a range; indices past the last subcluster are ignored.
    pub const fn range(range: Range<u32>) -> SubclusterSet {
        SubclusterSet(below(range.end) & !below(range.start))
    }

    /// True if the set is empty.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// True if subcluster `index` is in the set.
    pub const fn contains(self, index: u32) -> bool {
        index < SUBCLUSTERS && self.0 >> index & 1 != 0
    }

    /// True if all of `others` are in the set.
    pub const fn covers(self, others: SubclusterSet) -> bool {
        others.0 & !self.0 == 0
    }

    /// The union with `others`.
    #[must_use]
    pub const fn with(self, others: SubclusterSet) -> SubclusterSet {
        SubclusterSet(self.0 | others.0)
    }

    /// The set without `others`.
    #[must_use]
    pub const fn without(self, others: SubclusterSet) -> SubclusterSet {
        SubclusterSet(self.0 & !others.0)
    }

    /// The intersection with `others`.
    #[must_use]
    pub const fn common(self, others: SubclusterSet) -> SubclusterSet {
        SubclusterSet(self.0 & others.0)
    }

    /// The range from the first to the last subcluster of the set; empty for an empty set.
    pub const fn hull(self) -> Range<u32> {
        if self.0 == 0 { 0..0 } else { self.0.trailing_zeros()..SUBCLUSTERS - self.0.leading_zeros() }
    }

    /// The length of the run from `index` on: subclusters that are all in the set, or all outside it.
    pub const fn run(self, index: u32) -> u32 {
        if index >= SUBCLUSTERS {
            return 0;
        }
        let alike = if self.contains(index) { self.0 } else { !self.0 };
        let run = (alike >> index).trailing_ones();
        let left = SUBCLUSTERS - index;
        if run < left { run } else { left }
    }
}

/// All bits below `bit`.
const fn below(bit: u32) -> u32 {
    if bit >= SUBCLUSTERS { u32::MAX } else { (1 << bit) - 1 }
}

/// The location of a host cluster.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HostPlace {
    /// Where the host cluster begins.
    pub offset: HostOffset,
    /// True if its refcount is one.
    pub copied: bool,
}

/// The kinds of subclusters.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Subcluster {
    /// Not in this image: reads give the backing file's data, or zeros without a backing file.
    Unallocated,
    /// Reads as zeros.
    Zero,
    /// Data, in its part of the host cluster.
    Data,
}

/// A cluster by its subclusters. `allocated` and `zero` are disjoint, and without a host cluster `allocated` is empty.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Subclusters {
    /// The host cluster. A subcluster has the same offset in it as in the guest cluster.
    pub host: Option<HostPlace>,
    /// The subclusters that hold data.
    pub allocated: SubclusterSet,
    /// The subclusters that read as zeros.
    pub zero: SubclusterSet,
}

impl Subclusters {
    /// No host cluster, and every subcluster unallocated.
    pub const NONE: Subclusters =
        Subclusters { host: None, allocated: SubclusterSet::EMPTY, zero: SubclusterSet::EMPTY };

    /// The kind of subcluster `index`, and the length of the run of that kind from it on.
    ///
    /// # Panics
    /// If there is no such subcluster: a programmer error.
    pub const fn at(&self, index: u32) -> (Subcluster, u32) {
        assert!(index < SUBCLUSTERS, "a cluster has 32 subclusters");
        let kind = if self.allocated.contains(index) {
            Subcluster::Data
        } else if self.zero.contains(index) {
            Subcluster::Zero
        } else {
            Subcluster::Unallocated
        };
        let (data, zero) = (self.allocated.run(index), self.zero.run(index));
        (kind, if data < zero { data } else { zero })
    }

    /// The subclusters that are neither allocated nor zero.
    pub const fn unallocated(&self) -> SubclusterSet {
        SubclusterSet::ALL.without(self.allocated).without(self.zero)
    }

    /// The bitmap as in the L2 entry: allocated subclusters in the lower half, zero subclusters in the upper half.
    pub const fn bitmap(&self) -> u64 {
        (self.zero.0 as u64) << 32 | self.allocated.0 as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_have_ranges_hulls_and_runs() {
        assert_eq!(SubclusterSet::range(0..32), SubclusterSet::ALL);
        assert_eq!(SubclusterSet::range(3..5), SubclusterSet(0b11000));
        assert_eq!(SubclusterSet::range(31..40), SubclusterSet(1 << 31));
        assert_eq!(SubclusterSet::range(5..5), SubclusterSet::EMPTY);
        assert_eq!(SubclusterSet(0b101000).hull(), 3..6);
        assert_eq!((SubclusterSet::EMPTY.hull(), SubclusterSet::ALL.hull()), (0..0, 0..32));
        let set = SubclusterSet(0x8000_0018);
        assert_eq!([0, 3, 4, 5, 31, 32].map(|index| set.run(index)), [3, 2, 1, 26, 1, 0]);
        assert_eq!((SubclusterSet::ALL.run(0), SubclusterSet::EMPTY.run(7)), (32, 25));
        assert!(set.contains(31) && !set.contains(30) && !set.contains(32));
        assert!(set.covers(SubclusterSet(8)) && !set.covers(SubclusterSet(9)));
    }

    #[test]
    fn a_run_ends_where_the_kind_changes() {
        let mixed = Subclusters { host: None, allocated: SubclusterSet(6), zero: SubclusterSet(1) };
        assert_eq!(mixed.at(0), (Subcluster::Zero, 1));
        assert_eq!(mixed.at(1), (Subcluster::Data, 2));
        assert_eq!(mixed.at(3), (Subcluster::Unallocated, 29));
        assert_eq!(mixed.bitmap(), 0x1_0000_0006);
    }
}
