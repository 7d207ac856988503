//! Tests the repair of tables whose offset in the header is invalid, and of snapshot tables that cannot be read.

use qcow2::{Snapshot, snapshot::encode_table};

use super::*;

fn put_snapshots(image: &mut Image, count: u32, offset: u64) {
    let mut field = count.to_be_bytes().to_vec();
    field.extend(offset.to_be_bytes());
    image.bytes[position::SNAPSHOTS..][..12].copy_from_slice(&field);
}

/// Adds a snapshot table with these entries, damaged by `change`.
fn add_table(image: &mut Image, names: &[&str], change: impl Fn(&mut Vec<u8>)) -> u64 {
    let entry = |name: &&str| Snapshot {
        extra: Vec::new(),
        ..Snapshot::new(b"1".to_vec(), name.as_bytes().to_vec(), 0)
    };
    let entries: Vec<Snapshot> = names.iter().map(entry).collect();
    let mut table = encode_table(&entries);
    change(&mut table);
    let offset = image.add_cluster(0);
    image.bytes[offset as usize..][..table.len()].copy_from_slice(&table);
    put_snapshots(image, names.len() as u32, offset);
    offset
}

fn is_strictly_right(image: &Image) -> bool {
    Header::parse(&image.bytes[..512], image.bytes.len() as u64).is_ok()
}

#[test]
fn an_impossible_refcount_table_is_rebuilt() {
    for version in [Version::V2, Version::V3] {
        for (offset, clusters) in
            [(512, 0), (0, 1), (0, 0), (700, 1), (1 << 63, 1), (512, u32::MAX), ((1 << 63) - 512, 1)]
        {
            let mut image = Image::new(version, 9, 4, 40);
            image.put(position::REFCOUNT_TABLE_OFFSET as u64, offset);
            image.bytes[position::REFCOUNT_TABLE_CLUSTERS..][..4].copy_from_slice(&clusters.to_be_bytes());
            assert!(!is_strictly_right(&image));
            assert!(
                image.kinds().iter().any(|kind| kind.name() == "bad-refcount-table"),
                "{:?}",
                image.kinds()
            );
            let refused = image.check().plan_repair(RepairKind::Leaks).err();
            assert_eq!(refused, Some(NotRepairable::StructureDamaged));
            image.repair_everywhere(RepairKind::All);
            assert!(is_strictly_right(&image), "{offset:#x}, {clusters}");
        }
    }
}

#[test]
fn snapshots_that_cannot_be_read_are_dropped_where_nothing_can_be_theirs() {
    for version in [Version::V2, Version::V3] {
        for (count, offset) in [(1, 1 << 30), (65_537, 0x1_0000), (1, 0), (2, 700), (1, 1 << 63)] {
            let mut image = Image::new(version, 9, 4, 40);
            put_snapshots(&mut image, count, offset);
            assert_eq!(image.verdict(), Verdict::Corrupt);
            let refused = image.check().plan_repair(RepairKind::Leaks).err();
            assert_eq!(refused, Some(NotRepairable::SnapshotsUnread));
            image.clone().repair_everywhere(RepairKind::All);
            // A cluster without references may belong to one of the snapshots.
            image.add_cluster(7);
            let refused = image.check().plan_repair(RepairKind::All).err();
            assert_eq!(refused, Some(NotRepairable::SnapshotsLost), "{offset:#x}");
            assert_eq!(image.check().report().refusal(RepairKind::All), refused);
            image.repair_everywhere(RepairKind::AllDroppingSnapshots);
            assert_eq!((image.header().snapshots, image.header().snapshots_offset.0), (0, 0));
            assert!(is_strictly_right(&image));
        }
    }
}

#[test]
fn snapshots_that_can_be_read_stay() {
    let mut image = v3(4);
    // The second entry has too much extra data.
    let length = encode_table(&[Snapshot::new(b"1".to_vec(), b"first".to_vec(), 0)]).len() - 24;
    let old = add_table(&mut image, &["first", "second"], |table| table[length + 38] = 0xff);
    assert!(image.kinds().contains(&BadSnapshot { index: 1 }));
    image.repair_everywhere(RepairKind::AllDroppingSnapshots);
    let header = image.header();
    assert_eq!(header.snapshots, 1);
    assert_ne!(header.snapshots_offset.0, old);
    assert_eq!(image.refcount(old / 512), 0);
    let at = header.snapshots_offset.0 as usize;
    assert_eq!(&image.bytes[at + 57..at + 62], b"first");
}

#[test]
fn snapshots_of_version_3_get_the_sizes_that_they_lack() {
    let mut image = v3(4);
    add_table(&mut image, &["one", "two"], |_| {});
    assert!(image.kinds().contains(&FindingKind::IncompleteSnapshot { index: 1 }));
    assert_eq!(image.check().report().refusal(RepairKind::All), None);
    image.repair_everywhere(RepairKind::All);
    let mut table = SnapshotTable::new(image.header().snapshots_offset, 2, image.bytes.len() as u64);
    let mut sizes = Vec::new();
    while let Some(qcow2::HostRange { offset: at, length }) = table.next_piece() {
        let bytes = &image.bytes[at.0 as usize..(at.0 + length) as usize];
        table.feed(bytes, |entry| sizes.push(entry.snapshot.disk_size()));
    }
    assert_eq!(sizes, [Some(image.geometry.size); 2]);
    // Version 2 does not require these sizes.
    let mut image = Image::new(Version::V2, 9, 4, 40);
    add_table(&mut image, &["one"], |_| {});
    assert_eq!(image.verdict(), Verdict::Clean);
}

#[test]
fn a_repair_clears_autoclear_bits_that_it_does_not_know_before_it_writes() {
    for kind in [RepairKind::Leaks, RepairKind::All] {
        let mut image = v3(4);
        image.put(position::AUTOCLEAR as u64, 1 << 63 | 1 << 40);
        image.add_cluster(7);
        let steps: Vec<FileStep> = image.check().plan_repair(kind).expect("a plan").collect();
        let first = FileStep::Write { offset: HostOffset(position::AUTOCLEAR as u64), bytes: vec![0; 8] };
        assert_eq!((&steps[0], &steps[1]), (&first, &FileStep::Sync));
        image.repair_everywhere(kind);
        assert_eq!(image.header().autoclear, 0);
    }
}

#[test]
fn a_repair_gives_back_what_nobody_uses() {
    for kind in [RepairKind::Leaks, RepairKind::All] {
        let mut image = v3(4);
        let length = image.bytes.len();
        let leaked = image.add_cluster(7);
        image.add_data(40, 8);
        image.add_cluster(9);
        image.repair_everywhere(kind);
        assert_eq!(image.bytes.len(), length + 2 * 512, "the last leaked cluster is cut off");
        assert!(image.bytes[leaked as usize..][..512].iter().all(|byte| *byte == 0), "the first is punched");
    }
}

#[test]
fn a_repair_of_leaks_cuts_nothing_off_whose_refcount_is_too_low() {
    let mut image = v3(4);
    image.add_cluster(7);
    image.add_data(40, 8);
    let last = image.bytes.len() as u64 / 512 - 1;
    image.set_refcount(last, 0);
    let before = image.contents();
    let steps: Vec<FileStep> = image.check().plan_repair(RepairKind::Leaks).expect("a plan").collect();
    steps.iter().for_each(|step| image.apply(step));
    assert_eq!(image.contents(), before);
}
