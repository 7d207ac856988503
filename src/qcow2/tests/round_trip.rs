//! Round trips of generated values, and hostile bytes: decoding never panics, and a decoded value survives a round
//! trip.

use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use qcow2::extension::{BACKING_FORMAT, BITMAPS, ENCRYPTION_HEADER};
use qcow2::geometry::{REFCOUNT_ORDER_MAX, REFCOUNT_ORDER_V2};
use qcow2::{
    Extension, Geometry, Header, HostOffset, HostPlace, Incompatible, L1Entry, L2Entry, NewImage, RawL2Entry,
    Subcluster, SubclusterSet, Subclusters, Version, refblock_offset,
};

fn version() -> impl Strategy<Value = Version> {
    prop_oneof![Just(Version::V2), Just(Version::V3)]
}

fn geometry() -> impl Strategy<Value = Geometry> {
    (version(), 9..=21_u32, 0..=REFCOUNT_ORDER_MAX, any::<bool>(), 0..1_u64 << 30).prop_map(
        |(version, cluster_bits, order, extended, size)| Geometry {
            version,
            cluster_bits,
            refcount_order: if version == Version::V2 { REFCOUNT_ORDER_V2 } else { order },
            extended_l2: extended && version == Version::V3 && cluster_bits >= 14,
            size,
        },
    )
}

/// Bitmaps of subclusters, most of them valid.
fn bitmap() -> impl Strategy<Value = u64> {
    let some = |(allocated, zero): (u32, u32)| u64::from(zero & !allocated) << 32 | u64::from(allocated);
    prop_oneof![
        4 => any::<(u32, u32)>().prop_map(some),
        1 => any::<u64>(),
        1 => Just(u64::from(u32::MAX)),
        1 => Just(u64::from(u32::MAX) << 32),
        1 => Just(0),
    ]
}

fn extension() -> impl Strategy<Value = Extension> {
    let special = |magic: &u32| ![0, BACKING_FORMAT, BITMAPS, ENCRYPTION_HEADER].contains(magic);
    (any::<u32>().prop_filter("has contents that are checked", special), vec(any::<u8>(), 0..40))
        .prop_map(|(magic, data)| Extension { magic, data })
}

/// Any valid header: that of a new image, with all other fields varied.
fn header() -> impl Strategy<Value = Header> {
    let features = (any::<u64>(), any::<u64>(), any::<u64>(), any::<u8>());
    let tables = (0..100_u32, 1..1_u64 << 20, 1..1_u64 << 20, 0..=65_536_u32, 1..1_u64 << 20);
    let texts = (option::of(vec(any::<u8>(), 1..60)), option::of("[a-z0-9]{1,15}"), vec(extension(), 0..3));
    let later_fields = (any::<bool>(), 0..3_usize, any::<u8>());
    (geometry(), features, tables, texts, later_fields).prop_map(
        |(geometry, features, tables, texts, later)| {
            let first = NewImage::new(geometry).layout().expect("a valid geometry").swap_remove(0).1;
            let mut header = Header::parse(&first, first.len() as u64).expect("a valid header");
            let (l1_more, l1_cluster, table_cluster, snapshots, snapshots_cluster) = tables;
            let place = |cluster: u64| HostOffset(cluster << geometry.cluster_bits);
            header.l1_entries += l1_more;
            header.l1_offset = place(l1_cluster);
            header.refcount_table_offset = place(table_cluster);
            header.snapshots = snapshots;
            header.snapshots_offset = place(snapshots_cluster);
            header.crypt_method = l1_more;
            if geometry.version == Version::V3 {
                let (incompatible, compatible, autoclear, compression_type) = features;
                let (short, blocks, byte) = later;
                header.header_length = if short { 104 } else { 112 + 8 * blocks as u32 };
                header.unknown_fields = vec![byte; (header.header_length as usize).saturating_sub(105)];
                header.compression_type = if short { 0 } else { compression_type };
                let kept = Incompatible(incompatible)
                    .without(Incompatible::EXTENDED_L2.with(Incompatible::COMPRESSION))
                    .with(header.incompatible);
                let compressed = header.compression_type != 0;
                header.incompatible = if compressed { kept.with(Incompatible::COMPRESSION) } else { kept };
                (header.compatible, header.autoclear) = (compatible, autoclear);
            }
            (header.backing_file, _, header.extensions) = texts.clone();
            header.set_backing_format(texts.1.as_deref());
            header
        },
    )
}

proptest! {
    #[test]
    fn a_header_survives_a_round_trip(header in header(), tail in any::<bool>()) {
        let mut bytes = header.encode().expect("a valid header");
        prop_assert!(bytes.len() as u64 <= header.geometry().cluster_size());
        prop_assert_eq!(Header::cluster_size_hint(&bytes), Ok(header.geometry().cluster_size()));
        if tail {
            bytes.resize(header.geometry().cluster_size() as usize, 0);
        }
        prop_assert_eq!(Header::parse(&bytes, bytes.len() as u64), Ok(header));
    }

    #[test]
    fn a_damaged_header_is_refused_or_survives_a_round_trip(
        header in header(),
        damage in vec((0..200_usize, any::<u8>()), 1..6),
        length in option::of(0..600_usize),
    ) {
        let mut bytes = header.encode().expect("a valid header");
        for (at, value) in damage {
            if let Some(byte) = bytes.get_mut(at) {
                *byte = value;
            }
        }
        bytes.truncate(length.unwrap_or(bytes.len()));
        let _ = Header::cluster_size_hint(&bytes);
        if let Ok(header) = Header::parse(&bytes, bytes.len() as u64) {
            let _ = (header.unsupported(), header.write_refusal(), header.data_file_name());
            // A header that fills its cluster to the last byte may not fit any more with padding.
            if let Ok(again) = header.encode() {
                prop_assert_eq!(Header::parse(&again, again.len() as u64), Ok(header));
            }
        }
    }

    #[test]
    fn l1_entries_preserve_all_but_reserved_bits(raw in any::<u64>(), geometry in geometry()) {
        for raw in [raw, raw & !((1 << geometry.cluster_bits) - 1)] {
            if let Ok(entry) = L1Entry::decode(raw, &geometry) {
                prop_assert_eq!(L1Entry::decode(entry.encode(), &geometry), Ok(entry));
                if entry != L1Entry::Unallocated {
                    prop_assert_eq!(entry.encode(), raw & !0x7f00_0000_0000_01ff);
                }
            }
        }
    }

    #[test]
    fn l2_entries_preserve_all_but_reserved_bits(
        raw in any::<u64>(),
        low in 0..4_u64,
        bitmap in bitmap(),
        geometry in geometry(),
    ) {
        for descriptor in [raw, (raw & !((1 << geometry.cluster_bits) - 1)) | low, 0] {
            let bitmap = if geometry.extended_l2 { bitmap } else { 0 };
            let raw = RawL2Entry { descriptor, bitmap };
            let Ok(entry) = L2Entry::decode(raw, &geometry) else { continue };
            let encoded = entry.encode(&geometry);
            prop_assert_eq!(L2Entry::decode(encoded, &geometry), Ok(entry));
            // With extended L2 entries the zero flag is a reserved bit.
            let reserved = 0x3f00_0000_0000_01fe | u64::from(geometry.extended_l2);
            let kept = RawL2Entry { descriptor: descriptor & !reserved, bitmap };
            match entry {
                L2Entry::Compressed { .. } => {
                    prop_assert_eq!(encoded, RawL2Entry::from(descriptor & !(1 << 63)));
                }
                L2Entry::Subclusters(_) if descriptor == 0 => {
                    prop_assert_eq!(encoded, RawL2Entry { descriptor: 0, bitmap });
                }
                L2Entry::Data { .. } | L2Entry::ZeroAllocated { .. } | L2Entry::Subclusters(_) => {
                    prop_assert_eq!(encoded, kept);
                }
                L2Entry::Unallocated | L2Entry::Zero => {}
            }
        }
    }

    #[test]
    fn runs_of_subclusters_match_the_bits(allocated in any::<u32>(), zero in any::<u32>()) {
        let host = Some(HostPlace { offset: HostOffset(1 << 21), copied: true });
        let zero = zero & !allocated;
        let subclusters =
            Subclusters { host, allocated: SubclusterSet(allocated), zero: SubclusterSet(zero) };
        let mut at = 0;
        while at < 32 {
            let (kind, run) = subclusters.at(at);
            prop_assert!(run > 0 && at + run <= 32);
            for bit in at..at + run {
                let expected = match (allocated >> bit & 1, zero >> bit & 1) {
                    (1, _) => Subcluster::Data,
                    (_, 1) => Subcluster::Zero,
                    _ => Subcluster::Unallocated,
                };
                prop_assert_eq!(kind, expected);
            }
            at += run;
            prop_assert!(at == 32 || subclusters.at(at).0 != kind);
        }
        prop_assert_eq!(Subclusters::of(subclusters.entry()), Some(subclusters));
    }

    #[test]
    fn compressed_descriptors_follow_the_specs_formula(raw in any::<u64>(), geometry in geometry()) {
        let raw = raw | 1 << 62;
        // Spec: let x = 62 - (cluster_bits - 8). Bits 0 to x-1 are the host offset, and bits x to 61 the number of
        // additional sectors of 512 bytes.
        let x = 62 - (geometry.cluster_bits - 8);
        let (low, high) = (raw % (1 << x), (raw % (1 << 62)) >> x);
        match L2Entry::decode(raw, &geometry) {
            Ok(L2Entry::Compressed { offset, sectors }) => {
                prop_assert_eq!((offset.0, sectors), (low, high + 1));
                let length = qcow2::entry::compressed_length(offset, sectors);
                // The data ends at the end of its last sector, and has at most two clusters.
                prop_assert_eq!(offset.0 + length, (offset.0 / 512 + sectors) * 512);
                prop_assert!(length > 0 && length <= 2 * geometry.cluster_size());
                let touched = Some(qcow2::HostRun::new(
                    qcow2::HostCluster(offset.0 / geometry.cluster_size()),
                    (offset.0 + length - 1) / geometry.cluster_size() - offset.0 / geometry.cluster_size() + 1,
                ));
                let entry = L2Entry::Compressed { offset, sectors };
                prop_assert_eq!(entry.host_clusters(&geometry), touched);
            }
            other => prop_assert!(low >= 1 << 56 && other.is_err(), "{other:?}"),
        }
    }

    #[test]
    fn refblock_offsets_are_aligned_and_within_a_file(raw in any::<u64>(), geometry in geometry()) {
        for raw in [raw, raw & !((1 << geometry.cluster_bits) - 1)] {
            if let Ok(Some(offset)) = refblock_offset(raw, &geometry) {
                prop_assert!(geometry.is_aligned(offset.0));
                prop_assert!(i64::try_from(offset.0 + geometry.cluster_size()).is_ok());
            }
        }
    }

    #[test]
    fn an_address_is_rebuilt_from_its_indices(geometry in geometry(), offset in 0..1_u64 << 60) {
        let cluster = geometry.guest_cluster(qcow2::GuestOffset(offset));
        prop_assert_eq!(geometry.guest_offset(cluster).0 + geometry.in_cluster(offset), offset);
        let (l1, l2) = (geometry.l1_index(cluster), geometry.l2_index(cluster));
        prop_assert_eq!(l1 * geometry.l2_entries() + l2, cluster.0);
        let host = geometry.host_cluster(HostOffset(offset));
        let (table, block) = (geometry.refcount_table_index(host), geometry.refblock_index(host));
        prop_assert_eq!(table * geometry.refblock_entries() + block, host.0);
    }
}
