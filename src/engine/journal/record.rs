//! A record of the journal. It holds the new L2 entry of a guest cluster, or of a run of guest clusters whose
//! entries follow from the first.

use std::ops::Range;

use qcow2::entry::{COMPRESSED, OFFSET_MASK};
use qcow2::{Geometry, GuestCluster, RawL2Entry};

/// Bits of the first word that are the guest cluster. The format has at most 2^40 clusters.
const CLUSTER_BITS: u32 = 40;
/// The largest number of clusters of a record.
pub(crate) const COUNT_MAX: u64 = (1 << (64 - CLUSTER_BITS)) - 1;

/// See the top of this file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Record {
    /// The first guest cluster.
    pub first: GuestCluster,
    /// How many guest clusters.
    pub count: u64,
    /// The entry of the first. Where it names a host cluster, each next entry names the next host cluster.
    pub raw: RawL2Entry,
}

impl Record {
    /// The record as words of the journal.
    pub fn words(&self) -> [u64; 3] {
        [self.count << CLUSTER_BITS | self.first.0, self.raw.descriptor, self.raw.bitmap]
    }

    /// The record in words of a journal. Nothing in it has been checked.
    pub fn of_words([clusters, descriptor, bitmap]: [u64; 3]) -> Self {
        let first = GuestCluster(clusters & ((1 << CLUSTER_BITS) - 1));
        Record { first, count: clusters >> CLUSTER_BITS, raw: RawL2Entry { descriptor, bitmap } }
    }

    /// The first guest cluster past the record.
    pub fn end(&self) -> u64 {
        self.first.0 + self.count
    }

    /// The entry of cluster number `at`; `None` if its host offset would not fit an entry.
    pub fn raw_at(&self, at: u64, geometry: &Geometry) -> Option<RawL2Entry> {
        let RawL2Entry { descriptor, bitmap } = self.raw;
        let host = descriptor & OFFSET_MASK;
        if host == 0 || descriptor & COMPRESSED != 0 {
            return Some(self.raw);
        }
        let moved = host.checked_add(at.checked_mul(geometry.cluster_size())?)?;
        let fits = moved & !OFFSET_MASK == 0;
        fits.then_some(RawL2Entry { descriptor: descriptor & !OFFSET_MASK | moved, bitmap })
    }

    /// Adds the next guest cluster, if its entry follows from the first. False if it does not.
    pub fn add(&mut self, guest: GuestCluster, raw: RawL2Entry, geometry: &Geometry) -> bool {
        let follows = guest.0 == self.end() && self.count < COUNT_MAX;
        let fits = follows && self.raw_at(self.count, geometry) == Some(raw);
        self.count += u64::from(fits);
        fits
    }

    /// The part of the record for these guest clusters, which lie in it.
    pub fn part(&self, clusters: Range<u64>, geometry: &Geometry) -> Option<Record> {
        let raw = self.raw_at(clusters.start - self.first.0, geometry)?;
        Some(Record { first: GuestCluster(clusters.start), count: clusters.end - clusters.start, raw })
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use qcow2::Version;

    fn geometry() -> Geometry {
        Geometry {
            size: 1 << 30,
            cluster_bits: 16,
            refcount_order: 4,
            version: Version::V3,
            extended_l2: false,
        }
    }

    #[test]
    fn a_record_survives_its_words() {
        let raw = RawL2Entry { descriptor: 1 << 63 | 5 << 16, bitmap: 7 };
        let record = Record { first: GuestCluster((1 << 40) - 1), count: COUNT_MAX, raw };
        assert_eq!(Record::of_words(record.words()), record);
    }

    #[test]
    fn entries_join_where_each_follows_from_the_first() {
        let geometry = geometry();
        let data = |host: u64| RawL2Entry::from(1 << 63 | host << 16);
        let mut record = Record { first: GuestCluster(10), count: 1, raw: data(5) };
        assert!(record.add(GuestCluster(11), data(6), &geometry));
        assert!(!record.add(GuestCluster(12), data(8), &geometry), "another host cluster");
        assert!(!record.add(GuestCluster(13), data(7), &geometry), "a gap in the guest's disk");
        assert_eq!((record.count, record.part(11..12, &geometry).map(|part| part.raw)), (2, Some(data(6))));
        let mut zeros = Record { first: GuestCluster(0), count: 1, raw: RawL2Entry::from(1) };
        assert!(zeros.add(GuestCluster(1), RawL2Entry::from(1), &geometry), "zeros have no place");
        let last = Record { first: GuestCluster(0), count: 9, raw: RawL2Entry::from(OFFSET_MASK & !0xffff) };
        assert_eq!(last.raw_at(1, &geometry), None, "past the largest offset");
    }
}
