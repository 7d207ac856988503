//! L2 entries of an image with an external data file (spec: "Standard Cluster Descriptor", on external data files).
//!
//! Owns how they differ from other L2 entries. Each guest cluster is at its own offset in the data file, and no other
//! cluster shares it. Offset 0 is therefore valid, and the COPIED flag tells data at offset 0 from an unallocated
//! cluster. The data file has no refcounts and no compressed clusters.

use crate::address::{GuestCluster, HostOffset};
use crate::entry::{COMPRESSED, COPIED, EntryError, L2Entry, OFFSET_MASK, RawL2Entry, ZERO, subclusters_of};
use crate::geometry::Geometry;
use crate::subcluster::{HostPlace, SubclusterSet, Subclusters};

/// The location of a guest cluster in an external data file.
pub fn data_file_place(geometry: &Geometry, guest: GuestCluster) -> HostPlace {
    HostPlace { offset: HostOffset(geometry.guest_offset(guest).0), copied: true }
}

impl L2Entry {
    /// As [`L2Entry::decode`], for guest cluster `guest` of an image with an external data file. A host cluster is
    /// always decoded as `copied`, whatever its flag.
    ///
    /// # Errors
    /// As for [`L2Entry::decode`]; also if the cluster is compressed, or its data is not at the guest's own offset.
    pub fn decode_external(
        raw: impl Into<RawL2Entry>,
        geometry: &Geometry,
        guest: GuestCluster,
    ) -> Result<L2Entry, EntryError> {
        let entry = raw.into();
        let RawL2Entry { descriptor: raw, .. } = entry;
        if raw & COMPRESSED != 0 {
            return Err(EntryError::CompressedInDataFile { raw });
        }
        let reads_as_zero = raw & ZERO != 0 && !geometry.extended_l2;
        let offset = HostOffset(raw & OFFSET_MASK);
        // As in QEMU, a zero cluster with offset 0 has no host cluster.
        if offset.0 == 0 && (raw & COPIED == 0 || reads_as_zero) {
            return L2Entry::decode(entry, geometry);
        }
        let host = data_file_place(geometry, guest);
        if offset != host.offset {
            return Err(EntryError::DataFileOffset { raw, expected: host.offset });
        }
        let (allocated, zero) = match (geometry.extended_l2, reads_as_zero) {
            (true, _) => subclusters_of(entry)?,
            (false, true) => (SubclusterSet::EMPTY, SubclusterSet::ALL),
            (false, false) => (SubclusterSet::ALL, SubclusterSet::EMPTY),
        };
        Ok(Subclusters { host: Some(host), allocated, zero }.entry())
    }

    /// As [`L2Entry::encode`], for an image with an external data file.
    ///
    /// # Panics
    /// As for [`L2Entry::encode`], but offset 0 is valid; also if the cluster is compressed.
    pub fn encode_external(self, geometry: &Geometry) -> RawL2Entry {
        let subclusters = Subclusters::of(self).expect("an external data file has no compressed clusters");
        match (subclusters.host, self) {
            (Some(HostPlace { offset: HostOffset(0), .. }), _) if geometry.extended_l2 => {
                RawL2Entry { descriptor: COPIED, bitmap: subclusters.bitmap() }
            }
            (Some(HostPlace { offset: HostOffset(0), .. }), L2Entry::Data { .. }) => COPIED.into(),
            // A zero cluster at offset 0 cannot be encoded with its host cluster. The next write allocates it again.
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
    fn only_the_guests_own_offset_is_accepted() {
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
    fn an_encoded_entry_is_decoded_to_itself() {
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
    fn contradictory_subclusters_are_refused() {
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
