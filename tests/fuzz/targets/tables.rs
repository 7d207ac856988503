//! Entries of L1, L2, refcount and bitmap tables, and refcounts, under every geometry.

use qcow2::{
    Geometry, L1Entry, L2Entry, RawL2Entry, Subclusters, Version, bitmap_table_entry, refblock_offset,
    refcount, refcount_max, set_refcount,
};

use super::values::Values;

/// The input: geometries and entries in turn.
pub fn judge(input: &[u8]) {
    let mut values = Values(input);
    while !values.is_empty() {
        let geometry = geometry(&mut values);
        let raw = RawL2Entry { descriptor: values.u64(), bitmap: values.u64() };
        entries(raw, &geometry);
        refcounts(raw, geometry.refcount_order, values.u8());
    }
}

fn geometry(values: &mut Values<'_>) -> Geometry {
    let (how, bits) = (values.u8(), u32::from(values.u8()));
    let extended_l2 = how & 2 != 0;
    let cluster_bits = if extended_l2 { 14 + bits % 8 } else { 9 + bits % 13 };
    let old = how & 1 != 0 && !extended_l2;
    let version = if old { Version::V2 } else { Version::V3 };
    let refcount_order = if old { 4 } else { u32::from(how >> 2) % 7 };
    Geometry { version, cluster_bits, refcount_order, extended_l2, size: 1 << 40 }
}

fn entries(raw: RawL2Entry, geometry: &Geometry) {
    if let Ok(entry) = L1Entry::decode(raw.descriptor, geometry) {
        assert_eq!(L1Entry::decode(entry.encode(), geometry), Ok(entry));
    }
    if let Ok(entry) = L2Entry::decode(raw, geometry) {
        let again = entry.encode(geometry);
        assert_eq!(L2Entry::decode(again, geometry), Ok(entry), "{entry:?}");
        assert_eq!(again.descriptor & !raw.descriptor, 0, "no bit that was not there: {entry:?}");
        let mut table = vec![0; 64];
        raw.store(&mut table, 1, geometry);
        assert_eq!(L2Entry::decode(RawL2Entry::load(&table, 1, geometry), geometry), Ok(entry));
        if let Some(run) = entry.host_clusters(geometry) {
            let last = run.start.0.checked_add(run.count - 1).expect("a last cluster");
            assert!(
                run.count <= 3 && geometry.host_offset_checked(qcow2::HostCluster(last)).is_some(),
                "{entry:?}"
            );
        }
        if geometry.extended_l2
            && let Some(subclusters) = Subclusters::of(entry)
        {
            assert_eq!(subclusters.entry(), entry);
            assert!(subclusters.allocated.common(subclusters.zero).is_empty());
        }
    }
    if let Ok(Some(offset)) = refblock_offset(raw.descriptor, geometry) {
        assert!(geometry.is_aligned(offset.0) && offset.0.checked_add(geometry.cluster_size()).is_some());
    }
    if let Ok(Some(offset)) = bitmap_table_entry(raw.descriptor, geometry) {
        assert!(geometry.is_aligned(offset.0));
    }
}

/// A change of one refcount changes no other.
fn refcounts(raw: RawL2Entry, order: u32, index: u8) {
    let mut block = [raw.descriptor.to_be_bytes(), raw.bitmap.to_be_bytes()].concat();
    let count = (block.len() * 8) >> order;
    let index = usize::from(index) % count;
    let all = |block: &[u8]| (0..count).map(|index| refcount(order, block, index)).collect::<Vec<_>>();
    let mut expected = all(&block);
    expected[index] = raw.bitmap & refcount_max(order);
    set_refcount(order, &mut block, index, expected[index]);
    assert_eq!(all(&block), expected);
}
