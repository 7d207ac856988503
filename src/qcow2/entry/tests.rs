//! Tests of the entries of L1, L2 and refcount tables.

use super::*;

fn geometry(version: Version, cluster_bits: u32) -> Geometry {
    Geometry { version, cluster_bits, refcount_order: 4, extended_l2: false, size: 1 << 30 }
}

fn v3() -> Geometry {
    geometry(Version::V3, 16)
}

#[test]
fn l1_entries_are_decoded() {
    let table = |offset, copied| Ok(L1Entry::Table { offset: HostOffset(offset), copied });
    for (raw, expected) in [
        (0, Ok(L1Entry::Unallocated)),
        (COPIED, Ok(L1Entry::Unallocated)),
        (0x7f00_0000_0000_01ff, Ok(L1Entry::Unallocated)),
        (0x1_0000, table(0x1_0000, false)),
        (COPIED | 0x1_0000, table(0x1_0000, true)),
        (0x7f00_0000_0001_01ff, table(0x1_0000, false)),
        (0x00ff_ffff_ffff_0000, table(0x00ff_ffff_ffff_0000, false)),
        (0x1_8000, Err(EntryError::Unaligned { raw: 0x1_8000 })),
        (0x200, Err(EntryError::Unaligned { raw: 0x200 })),
    ] {
        assert_eq!(L1Entry::decode(raw, &v3()), expected, "{raw:#x}");
    }
}

#[test]
fn l2_entries_are_decoded() {
    let place = HostOffset(0x5_0000);
    let unaligned = |raw| Err(EntryError::Unaligned { raw });
    for (raw, expected) in [
        (0, Ok(L2Entry::Unallocated)),
        (0x3f00_0000_0000_01fe, Ok(L2Entry::Unallocated)),
        (1, Ok(L2Entry::Zero)),
        (COPIED | 1, Ok(L2Entry::Zero)),
        (0x5_0001, Ok(L2Entry::ZeroAllocated { offset: place, copied: false })),
        (COPIED | 0x5_0001, Ok(L2Entry::ZeroAllocated { offset: place, copied: true })),
        (0x5_0000, Ok(L2Entry::Data { offset: place, copied: false })),
        (COPIED | 0x5_0000, Ok(L2Entry::Data { offset: place, copied: true })),
        (0x3f00_0000_0005_01fe, Ok(L2Entry::Data { offset: place, copied: false })),
        (COPIED, Ok(L2Entry::Unallocated)),
        (0x5_0200, unaligned(0x5_0200)),
        (0x8001, unaligned(0x8001)),
    ] {
        assert_eq!(L2Entry::decode(raw, &v3()), expected, "{raw:#x}");
    }
}

#[test]
fn version_2_has_no_zero_flag() {
    let v2 = geometry(Version::V2, 16);
    for raw in [1, 0x5_0001, COPIED | 0x5_0001] {
        assert_eq!(L2Entry::decode(raw, &v2), Err(EntryError::ZeroFlagInV2 { raw }));
    }
    assert!(matches!(L2Entry::decode(COMPRESSED | 1, &v2), Ok(L2Entry::Compressed { .. })));
}

#[test]
fn extended_entries_are_decoded_and_encoded() {
    let extended = Geometry { extended_l2: true, ..v3() };
    let (offset, all) = (HostOffset(0x5_0000), 0xffff_ffff_u64);
    let some = |host: Option<bool>, allocated, zero| {
        let host = host.map(|copied| HostPlace { offset, copied });
        let (allocated, zero) = (SubclusterSet(allocated), SubclusterSet(zero));
        Ok(L2Entry::Subclusters(Subclusters { host, allocated, zero }))
    };
    let twice = |raw, bitmap| Err(EntryError::SubclusterTwice { raw, bitmap });
    let nowhere = |raw, bitmap| Err(EntryError::SubclusterNowhere { raw, bitmap });
    for (descriptor, bitmap, expected) in [
        (0, 0, Ok(L2Entry::Unallocated)),
        (0, all << 32, Ok(L2Entry::Zero)),
        (COPIED, all << 32, Ok(L2Entry::Zero)),
        (0, 1 << 32, some(None, 0, 1)),
        (0x5_0000, all, Ok(L2Entry::Data { offset, copied: false })),
        (COPIED | 0x5_0000, all, Ok(L2Entry::Data { offset, copied: true })),
        (COPIED | 0x5_0000, all << 32, Ok(L2Entry::ZeroAllocated { offset, copied: true })),
        (COPIED | 0x5_0000, 0x8000_0000_0000_0005, some(Some(true), 5, 1 << 31)),
        (0x5_0000, 0, some(Some(false), 0, 0)),
        (0x5_0000, 1 << 32 | 1, twice(0x5_0000, 1 << 32 | 1)),
        (0, 1 << 32 | 1, twice(0, 1 << 32 | 1)),
        (0, 1 << 31, nowhere(0, 1 << 31)),
        (COPIED, 0, Ok(L2Entry::Unallocated)),
        (COPIED, 1 << 32, some(None, 0, 1)),
        (0x5_0200, 0, Err(EntryError::Unaligned { raw: 0x5_0200 })),
    ] {
        let raw = RawL2Entry { descriptor, bitmap };
        assert_eq!(L2Entry::decode(raw, &extended), expected, "{raw:x?}");
        if let Ok(entry) = expected {
            let kept = if entry.host().is_none() { 0 } else { descriptor };
            assert_eq!(entry.encode(&extended), RawL2Entry { descriptor: kept, bitmap });
        }
    }
}

#[test]
fn a_cluster_of_one_kind_has_an_ordinary_entry() {
    let (offset, copied) = (HostOffset(0x5_0000), true);
    let host = Some(HostPlace { offset, copied });
    let (none, all) = (SubclusterSet::EMPTY, SubclusterSet::ALL);
    for (host, allocated, zero, entry) in [
        (host, all, none, L2Entry::Data { offset, copied }),
        (host, none, all, L2Entry::ZeroAllocated { offset, copied }),
        (None, none, all, L2Entry::Zero),
        (None, none, none, L2Entry::Unallocated),
    ] {
        let subclusters = Subclusters { host, allocated, zero };
        assert_eq!(subclusters.entry(), entry);
        assert_eq!(Subclusters::of(entry), Some(subclusters));
    }
    let mixed = Subclusters { host, allocated: SubclusterSet(6), zero: SubclusterSet(1) };
    assert_eq!(mixed.entry(), L2Entry::Subclusters(mixed));
    // An unused host cluster differs from no host cluster.
    let unused = Subclusters { host, allocated: none, zero: none };
    assert_eq!(unused.entry(), L2Entry::Subclusters(unused));
}

#[test]
fn with_extended_l2_the_zero_flag_is_reserved() {
    let extended = Geometry { extended_l2: true, ..v3() };
    assert_eq!(L2Entry::decode(1, &extended), Ok(L2Entry::Unallocated));
    let raw = RawL2Entry { descriptor: 0x5_0001, bitmap: 0xffff_ffff };
    let data = L2Entry::Data { offset: HostOffset(0x5_0000), copied: false };
    assert_eq!(L2Entry::decode(raw, &extended), Ok(data));
    assert_eq!(data.encode(&extended), RawL2Entry { descriptor: 0x5_0000, ..raw });
}

#[test]
fn a_compressed_entry_has_no_subclusters() {
    let extended = Geometry { extended_l2: true, ..v3() };
    let raw = RawL2Entry { descriptor: COMPRESSED | 0x5_0001, bitmap: u64::MAX };
    let entry = L2Entry::Compressed { offset: HostOffset(0x5_0001), sectors: 1 };
    assert_eq!(L2Entry::decode(raw, &extended), Ok(entry));
    assert_eq!(entry.encode(&extended), RawL2Entry { bitmap: 0, ..raw });
}

#[test]
fn a_raw_entry_is_loaded_from_the_index_where_it_was_stored() {
    let extended = Geometry { extended_l2: true, ..v3() };
    let mut table = [0xee; 64];
    RawL2Entry { descriptor: 1, bitmap: 2 }.store(&mut table, 1, &extended);
    assert_eq!([entry(&table, 1), entry(&table, 2), entry(&table, 3)], [0xeeee_eeee_eeee_eeee, 1, 2]);
    assert_eq!(RawL2Entry::load(&table, 1, &extended), RawL2Entry { descriptor: 1, bitmap: 2 });
    RawL2Entry::from(7).store(&mut table, 4, &v3());
    assert_eq!([entry(&table, 4), entry(&table, 5)], [7, 0xeeee_eeee_eeee_eeee]);
    assert_eq!(RawL2Entry::load(&table, 4, &v3()), 7.into());
}

#[test]
fn the_compressed_bit_is_tested_first() {
    let raw = COMPRESSED | COPIED | 0x5_0001;
    let expected = L2Entry::Compressed { offset: HostOffset(0x5_0001), sectors: 1 };
    assert_eq!(L2Entry::decode(raw, &v3()), Ok(expected));
}

#[test]
fn compressed_data_can_be_two_clusters_long() {
    for cluster_bits in 9..=21 {
        let geometry = geometry(Version::V3, cluster_bits);
        let offset_bits = 62 - (cluster_bits - 8);
        let offset = HOST_OFFSET_LIMIT.min(1 << offset_bits) - 1;
        let raw = COMPRESSED | (COMPRESSED - (1 << offset_bits)) | offset;
        let sectors = 2 * geometry.cluster_size() / COMPRESSED_SECTOR_SIZE;
        let entry = L2Entry::Compressed { offset: HostOffset(offset), sectors };
        assert_eq!(L2Entry::decode(raw, &geometry), Ok(entry), "{cluster_bits} bits");
        assert_eq!(entry.encode(&geometry), raw.into());
        let next = L2Entry::decode(raw + 1, &geometry);
        if offset_bits > 56 {
            assert_eq!(next, Err(EntryError::OffsetTooLarge { raw: raw + 1 }));
        }
    }
}

#[test]
fn compressed_data_ends_at_the_end_of_a_sector() {
    assert_eq!(compressed_length(HostOffset(0x1_0000), 1), 512);
    assert_eq!(compressed_length(HostOffset(0x1_01ff), 1), 1);
    assert_eq!(compressed_length(HostOffset(0x1_01ff), 2), 513);
}

#[test]
fn refcount_table_entries_are_decoded() {
    for (raw, expected) in [
        (0, Ok(None)),
        (0x1ff, Ok(None)),
        (0x3_0000, Ok(Some(HostOffset(0x3_0000)))),
        (0x3_01ff, Ok(Some(HostOffset(0x3_0000)))),
        (0x3_0200, Err(EntryError::Unaligned { raw: 0x3_0200 })),
        (0x7fff_ffff_fffe_0000, Ok(Some(HostOffset(0x7fff_ffff_fffe_0000)))),
        (0x7fff_ffff_ffff_0000, Err(EntryError::OffsetTooLarge { raw: 0x7fff_ffff_ffff_0000 })),
        (1 << 63, Err(EntryError::OffsetTooLarge { raw: 1 << 63 })),
    ] {
        assert_eq!(refblock_offset(raw, &v3()), expected, "{raw:#x}");
    }
    assert_eq!(encode_refblock_offset(HostOffset(0x3_0000), &v3()), 0x3_0000);
}

#[test]
fn encoding_an_impossible_entry_panics() {
    let v2 = geometry(Version::V2, 16);
    let at = HostOffset;
    let extended = Geometry { extended_l2: true, ..v3() };
    let host = Some(HostPlace { offset: at(0x5_0000), copied: true });
    let some = |host, allocated, zero| {
        let (allocated, zero) = (SubclusterSet(allocated), SubclusterSet(zero));
        L2Entry::Subclusters(Subclusters { host, allocated, zero })
    };
    let cases: [(L2Entry, Geometry); 10] = [
        (L2Entry::Zero, v2),
        (some(host, 1, 2), v3()),
        (some(host, 3, 2), extended),
        (some(None, 1, 2), extended),
        (L2Entry::Data { offset: at(0), copied: true }, v3()),
        (L2Entry::Data { offset: at(0x200), copied: true }, v3()),
        (L2Entry::ZeroAllocated { offset: at(1 << 56), copied: true }, v3()),
        (L2Entry::Compressed { offset: at(1 << 54), sectors: 1 }, v3()),
        (L2Entry::Compressed { offset: at(0x1_0000), sectors: 0 }, v3()),
        (L2Entry::Compressed { offset: at(0x1_0000), sectors: 257 }, v3()),
    ];
    for (entry, geometry) in cases {
        assert!(std::panic::catch_unwind(|| entry.encode(&geometry)).is_err(), "{entry:?}");
    }
    for offset in [0, 0x100, 1 << 56] {
        let entry = L1Entry::Table { offset: at(offset), copied: false };
        assert!(std::panic::catch_unwind(|| entry.encode()).is_err(), "{entry:?}");
    }
}
