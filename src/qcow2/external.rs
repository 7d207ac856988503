//! L2 entries of an image whose data is in an external file (spec: "Standard Cluster Descriptor", where it speaks of
//! external data files).
//!
//! Owns how they differ from others: each guest cluster has its place in that file at its own offset, and nobody shares
//! it. So the offset of an entry says nothing but that there is data, offset 0 is a place like any other, and the flag
//! COPIED tells it from none. There are no refcounts, and no compressed clusters.

use crate::address::{GuestCluster, HostOffset};
use crate::entry::{COMPRESSED, COPIED, EntryError, L2Entry, OFFSET_MASK, RawL2Entry, ZERO, subclusters_of};
use crate::geometry::Geometry;
use crate::subcluster::{HostPlace, SubclusterSet, Subclusters};

/// Where an external data file has a guest cluster.
pub fn data_file_place(geometry: &Geometry, guest: GuestCluster) -> HostPlace {
    HostPlace { offset: HostOffset(geometry.guest_offset(guest).0), copied: true }
}

impl L2Entry {
    /// As [`L2Entry::decode`], of the guest cluster `guest` of an image whose data is in an external file. A host cluster
    /// counts as flagged, whether it is or not.
    ///
    /// # Errors
    /// As for [`L2Entry::decode`]; and if the cluster is compressed, or its data elsewhere than at its own offset.
    pub fn decode_external(
        raw: impl Into<RawL2Entry>,
        geometry: &Geometry,
        guest: GuestCluster,
    ) -> Result<L2Entry, EntryError> {
        let entry = raw.into();
        let RawL2Entry { descriptor: raw, bitmap } = entry;
        if raw & COMPRESSED != 0 {
            return Err(EntryError::CompressedInDataFile { raw });
        }
        let reads_as_zero = raw & ZERO != 0 && !geometry.extended_l2;
        let offset = HostOffset(raw & OFFSET_MASK);
        // As in QEMU, a zero cluster has no place at offset 0.
        if offset.0 == 0 && (raw & COPIED == 0 || reads_as_zero) {
            return L2Entry::decode(entry, geometry);
        }
        let host = data_file_place(geometry, guest);
        if offset != host.offset {
            return Err(EntryError::DataFileOffset { raw, expected: host.offset });
        }
        let (allocated, zero) = match (geometry.extended_l2, reads_as_zero) {
            (true, _) => subclusters_of(raw, bitmap)?,
            (false, true) => (SubclusterSet::EMPTY, SubclusterSet::ALL),
            (false, false) => (SubclusterSet::ALL, SubclusterSet::EMPTY),
        };
        Ok(Subclusters { host: Some(host), allocated, zero }.entry())
    }

    /// As [`L2Entry::encode`], for an image whose data is in an external file.
    ///
    /// # Panics
    /// As for [`L2Entry::encode`], but not on offset 0; on a compressed cluster.
    pub fn encode_external(self, geometry: &Geometry) -> RawL2Entry {
        let subclusters = Subclusters::of(self).expect("an external data file has no compressed clusters");
        match (subclusters.host, self) {
            (Some(HostPlace { offset: HostOffset(0), .. }), _) if geometry.extended_l2 => {
                RawL2Entry { descriptor: COPIED, bitmap: subclusters.bitmap() }
            }
            (Some(HostPlace { offset: HostOffset(0), .. }), L2Entry::Data { .. }) => COPIED.into(),
            // It gets its place back when it is written.
            (Some(HostPlace { offset: HostOffset(0), .. }), _) => L2Entry::Zero.encode(geometry),
            _ => self.encode(geometry),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::Version;

    const V3: Geometry = Geometry {
        version: Version::V3,
        cluster_bits: 16,
        refcount_order: 4,
        extended_l2: false,
        size: 1 << 30,
    };

    fn data(offset: u64) -> Result<L2Entry, EntryError> {
        Ok(L2Entry::Data { offset: HostOffset(offset), copied: true })
    }

    #[test]
    fn each_cluster_is_at_its_own_offset() {
        let elsewhere =
            |raw, expected| Err(EntryError::DataFileOffset { raw, expected: HostOffset(expected) });
        let kept = Ok(L2Entry::ZeroAllocated { offset: HostOffset(0x5_0000), copied: true });
        for (raw, guest, expected) in [
            (0, 0, Ok(L2Entry::Unallocated)),
            (0, 5, Ok(L2Entry::Unallocated)),
            (1, 5, Ok(L2Entry::Zero)),
            (COPIED | 1, 0, Ok(L2Entry::Zero)),
            (COPIED | 1, 5, Ok(L2Entry::Zero)),
            (COPIED, 0, data(0)),
            (COPIED, 5, elsewhere(COPIED, 0x5_0000)),
            (COPIED | 0x5_0000, 5, data(0x5_0000)),
            (0x5_0000, 5, data(0x5_0000)),
            (COPIED | 0x5_0001, 5, kept),
            (0x5_0001, 5, kept),
            (COPIED | 0x5_0000, 6, elsewhere(COPIED | 0x5_0000, 0x6_0000)),
            (0x5_0200, 5, elsewhere(0x5_0200, 0x5_0000)),
            (0x5_0001, 0, elsewhere(0x5_0001, 0)),
            (COMPRESSED | 0x5_0000, 5, Err(EntryError::CompressedInDataFile { raw: COMPRESSED | 0x5_0000 })),
        ] {
            assert_eq!(
                L2Entry::decode_external(raw, &V3, GuestCluster(guest)),
                expected,
                "{raw:#x} of {guest}"
            );
        }
    }

    #[test]
    fn what_is_encoded_is_decoded() {
        let extended = Geometry { extended_l2: true, ..V3 };
        for guest in [0, 1, 77].map(GuestCluster) {
            let host = data_file_place(&V3, guest);
            let HostPlace { offset, copied } = host;
            let whole = [L2Entry::Unallocated, L2Entry::Zero, L2Entry::Data { offset, copied }];
            let kept = L2Entry::ZeroAllocated { offset, copied };
            let some = |host, allocated, zero| {
                let (allocated, zero) = (SubclusterSet(allocated), SubclusterSet(zero));
                L2Entry::Subclusters(Subclusters { host, allocated, zero })
            };
            let parts = [some(Some(host), 5, 1 << 31), some(Some(host), 0, 0), some(None, 0, 6)];
            for entry in whole.into_iter().chain(parts).chain([kept]) {
                let raw = entry.encode_external(&extended);
                assert_eq!(L2Entry::decode_external(raw, &extended, guest), Ok(entry));
            }
            for entry in whole {
                let raw = entry.encode_external(&V3);
                assert_eq!(L2Entry::decode_external(raw, &V3, guest), Ok(entry));
            }
            let lost = guest == GuestCluster(0);
            let expected = Ok(if lost { L2Entry::Zero } else { kept });
            assert_eq!(L2Entry::decode_external(kept.encode_external(&V3), &V3, guest), expected);
        }
    }

    #[test]
    fn subclusters_must_make_sense_there_too() {
        let extended = Geometry { extended_l2: true, ..V3 };
        let decode = |descriptor, bitmap, guest| {
            L2Entry::decode_external(RawL2Entry { descriptor, bitmap }, &extended, GuestCluster(guest))
        };
        let twice = 1 << 32 | 1;
        assert_eq!(decode(COPIED, twice, 0), Err(EntryError::SubclusterTwice { raw: COPIED, bitmap: twice }));
        assert_eq!(decode(0, 1, 0), Err(EntryError::SubclusterNowhere { raw: 0, bitmap: 1 }));
        assert_eq!(decode(COPIED, u64::from(u32::MAX), 0), data(0));
        assert!(matches!(decode(COPIED, 1, 3), Err(EntryError::DataFileOffset { .. })));
        assert!(matches!(decode(COMPRESSED, 0, 3), Err(EntryError::CompressedInDataFile { .. })));
    }
}
