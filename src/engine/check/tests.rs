//! The checker on images in memory: its reads, its findings, and its repairs. No bytes may make it panic, run without
//! end or use much memory.

use std::collections::HashSet;

use proptest::prelude::*;
use qcow2::entry::COPIED;
use qcow2::position;
use qcow2::{
    Geometry, Header, HostOffset, Incompatible, L2Entry, NewImage, Salvaged, Version, set_entry, set_refcount,
};

use super::*;
use crate::file_step::FileStep;

mod tables;

/// An image file in memory.
#[derive(Clone)]
struct Image {
    bytes: Vec<u8>,
    geometry: Geometry,
}

impl Image {
    /// An image whose first `data` guest clusters hold data, with L2 tables between them.
    fn new(version: Version, cluster_bits: u32, refcount_order: u32, data: u64) -> Self {
        let l2_entries = 1 << (cluster_bits - 3);
        let size = (data.next_multiple_of(l2_entries) + l2_entries) << cluster_bits;
        let geometry = Geometry { version, cluster_bits, refcount_order, extended_l2: false, size };
        let mut bytes = Vec::new();
        for (offset, piece) in NewImage::new(geometry).layout().expect("a layout") {
            assert_eq!(offset.0, bytes.len() as u64);
            bytes.extend(piece);
        }
        let mut image = Image { bytes, geometry };
        for cluster in 0..data {
            image.add_data(cluster, cluster as u8);
        }
        image
    }

    fn salvaged(&self) -> Salvaged {
        let first = self.bytes.len().min(self.geometry.cluster_size() as usize);
        Header::salvage(&self.bytes[..first], self.bytes.len() as u64).expect("a header that can be used")
    }

    fn header(&self) -> Header {
        self.salvaged().header
    }

    fn entry(&self, offset: u64) -> u64 {
        qcow2::entry(&self.bytes[offset as usize..], 0)
    }

    fn put(&mut self, offset: u64, raw: u64) {
        set_entry(&mut self.bytes[offset as usize..], 0, raw);
    }

    /// The location of a cluster's refcount: its refblock, and the index in it. The first refblock reaches far enough.
    fn refblock(&self) -> usize {
        self.entry(self.header().refcount_table_offset.0) as usize
    }

    fn set_refcount(&mut self, cluster: u64, count: u64) {
        let at = self.refblock();
        set_refcount(self.geometry.refcount_order, &mut self.bytes[at..], cluster as usize, count);
    }

    fn refcount(&self, cluster: u64) -> u64 {
        qcow2::refcount(self.geometry.refcount_order, &self.bytes[self.refblock()..], cluster as usize)
    }

    /// A new cluster at the end of the file, with refcount 1.
    fn add_cluster(&mut self, fill: u8) -> u64 {
        let offset = self.bytes.len() as u64;
        self.bytes.resize((offset + self.geometry.cluster_size()) as usize, fill);
        let cluster = offset >> self.geometry.cluster_bits;
        assert!(cluster < self.geometry.refblock_entries(), "the first refblock reaches far enough");
        self.set_refcount(cluster, 1);
        offset
    }

    /// The offset of a guest cluster's L2 entry; creates the table if there is none.
    fn l2_place(&mut self, cluster: u64) -> u64 {
        let l2_entries = self.geometry.l2_entries();
        let l1_place = self.header().l1_offset.0 + cluster / l2_entries * 8;
        if self.entry(l1_place) == 0 {
            let table = self.add_cluster(0);
            self.put(l1_place, table | COPIED);
        }
        (self.entry(l1_place) & !COPIED) + cluster % l2_entries * 8
    }

    fn add_data(&mut self, cluster: u64, fill: u8) {
        let place = self.l2_place(cluster);
        let offset = HostOffset(self.add_cluster(fill));
        self.put(place, L2Entry::Data { offset, copied: true }.encode(&self.geometry).descriptor);
    }

    fn check(&self) -> Checked {
        let mut checker = Checker::of_salvaged(&self.salvaged(), self.bytes.len() as u64).expect("a check");
        let (mut read, mut held) = (0, 0);
        while let Step::Read { offset, length } = checker.step() {
            assert!(length as u64 <= READ_MAX && length > 0 && offset.0.is_multiple_of(8));
            let from = (offset.0 as usize).min(self.bytes.len());
            let to = (offset.0 as usize + length).min(self.bytes.len());
            let mut piece = self.bytes[from..to].to_vec();
            assert!(length - piece.len() < 8, "only the last entry of the file may be cut");
            piece.resize(length, 0);
            checker.feed(&piece);
            read += length;
            held = held.max(checker.held_bytes());
        }
        let size = self.bytes.len();
        assert!(read <= 8 * size + 4096, "{read} bytes read of a file of {size}");
        assert!(held <= 16 * size + 65_536, "{held} bytes held for a file of {size}");
        checker.finish()
    }

    fn verdict(&self) -> Verdict {
        self.check().report().verdict()
    }

    fn kinds(&self) -> Vec<FindingKind> {
        self.check().report().findings.iter().map(|finding| finding.kind).collect()
    }

    /// The contents of the whole disk, read through the present tables.
    fn contents(&self) -> Vec<Vec<u8>> {
        let header = self.header();
        let size = self.geometry.cluster_size();
        let cluster = |n: u64| {
            let l1 = self.entry(header.l1_offset.0 + n / self.geometry.l2_entries() * 8) & !COPIED;
            let offset = match l1 {
                0 => return Vec::new(),
                table => self.entry(table + n % self.geometry.l2_entries() * 8) & qcow2::entry::OFFSET_MASK,
            };
            if offset == 0 {
                return Vec::new();
            }
            self.bytes[offset as usize..(offset + size) as usize].to_vec()
        };
        (0..self.geometry.guest_clusters()).map(cluster).collect()
    }

    fn apply(&mut self, step: &FileStep) {
        match step {
            FileStep::Write { offset, bytes } => {
                let end = offset.0 as usize + bytes.len();
                if self.bytes.len() < end {
                    self.bytes.resize(end, 0);
                }
                self.bytes[offset.0 as usize..end].copy_from_slice(bytes);
            }
            FileStep::Punch(range) => {
                let end = (range.end().0).min(self.bytes.len() as u64) as usize;
                self.bytes[range.offset.0 as usize..end].fill(0);
            }
            FileStep::Cut { length } => self.bytes.truncate(*length as usize),
            FileStep::Sync => {}
        }
    }

    /// Repairs, and simulates a crash at every step. Between syncs, each write is once the only one done and once the
    /// only one missing.
    fn repair_everywhere(&mut self, kind: RepairKind) {
        let before = self.contents();
        let mut steps: Vec<FileStep> = self.check().plan_repair(kind).expect("repairable").collect();
        // Space is given back last, when all else is durable.
        let given = steps.iter().rposition(|step| *step == FileStep::Sync).map_or(0, |last| last + 1);
        let given = steps.split_off(given);
        let is_given = |step: &FileStep| matches!(step, FileStep::Punch(_) | FileStep::Cut { .. });
        assert!(given.iter().all(is_given) && !steps.iter().any(is_given));
        let mut durable = self.clone();
        let stages: Vec<&[FileStep]> = steps.split_inclusive(|step| *step == FileStep::Sync).collect();
        let marks = |step: &FileStep| matches!(step, FileStep::Write { offset, .. } if offset.0 == position::INCOMPATIBLE as u64);
        let first_mark = stages.iter().position(|stage| stage.iter().any(marks));
        let first_mark = first_mark.filter(|_| self.marks() & Incompatible::DIRTY.0 == 0).unwrap_or(0);
        for (number, stage) in stages.iter().enumerate() {
            // From the first mark to the last sync but one, a version 3 image must be marked dirty.
            let between = number > first_mark && number + 1 < stages.len();
            let marked = kind != RepairKind::Leaks && self.geometry.version == Version::V3 && between;
            for missing in 0..=stage.len() {
                for alone in [false, true] {
                    let mut crashed = durable.clone();
                    let kept = stage.iter().enumerate().filter(|(n, _)| (*n == missing) == alone);
                    kept.for_each(|(_, step)| crashed.apply(step));
                    assert!(!marked || crashed.marks() & Incompatible::DIRTY.0 != 0, "stage {number}");
                    // The header names a new structure only when it is complete.
                    let renamed =
                        crashed.header().refcount_table_offset != self.header().refcount_table_offset;
                    assert!(!renamed || crashed.check().report().structure_damaged == 0, "stage {number}");
                    crashed.again(&before, kind);
                }
            }
            stage.iter().for_each(|step| durable.apply(step));
        }
        for step in &given {
            durable.apply(step);
            durable.clone().again(&before, kind);
        }
        *self = durable;
        assert_eq!(self.contents(), before);
    }

    /// After a crash the contents are intact, and a second repair leaves the image clean.
    fn again(mut self, before: &[Vec<u8>], kind: RepairKind) {
        assert_eq!(self.contents(), before);
        let verdict = self.verdict();
        let steps: Vec<FileStep> = self.check().plan_repair(kind).expect("repairable").collect();
        steps.iter().for_each(|step| self.apply(step));
        assert_eq!(self.verdict(), Verdict::Clean, "after a repair of {verdict:?}: {:?}", self.kinds());
        assert_eq!(self.contents(), before);
    }

    fn marks(&self) -> u64 {
        self.header().incompatible.0
    }
}

/// True if a finding is the expected one.
type Expected = fn(&FindingKind) -> bool;

fn v3(refcount_order: u32) -> Image {
    Image::new(Version::V3, 9, refcount_order, 40)
}

#[test]
fn a_sound_image_is_clean() {
    for version in [Version::V2, Version::V3] {
        for cluster_bits in [9, 12, 16, 21] {
            let orders = if version == Version::V2 { 4..=4 } else { 0..=6 };
            for order in orders {
                let image = Image::new(version, cluster_bits, order, 12);
                let checked = image.check();
                let report = checked.report();
                assert_eq!(report.verdict(), Verdict::Clean, "{:?}", report.findings);
                assert_eq!(report.allocated_clusters, 12);
                assert_eq!(report.image_end_offset, image.bytes.len() as u64);
                assert_eq!(checked.plan_repair(RepairKind::All).expect("a plan").count(), 0);
            }
        }
    }
}

#[test]
fn leaks_are_counted_by_the_cluster_and_lowered() {
    for order in [0, 1, 3, 4, 6] {
        let mut image = v3(order);
        for _ in 0..5 {
            image.add_cluster(0xaa);
        }
        let report = image.check().into_report();
        assert_eq!((report.verdict(), report.leaked_clusters, report.corruptions), (Verdict::Leaks, 5, 0));
        assert_eq!(report.findings[0].kind, FindingKind::Leak { recorded: 1, references: 0 });
        for kind in [RepairKind::Leaks, RepairKind::All] {
            let mut image = image.clone();
            image.repair_everywhere(kind);
            assert_eq!((image.verdict(), image.marks()), (Verdict::Clean, 0));
        }
    }
}

#[test]
fn refcounts_too_low_and_missing_are_rebuilt() {
    for order in [0, 2, 4, 5] {
        let mut image = v3(order);
        let last = (image.bytes.len() as u64 >> 9) - 1;
        image.set_refcount(last, 0);
        assert_eq!(
            image.kinds(),
            [
                FindingKind::Copied {
                    part: ImagePart::L2,
                    raw: image.entry(image.clone().l2_place(39)),
                    refcount: 0
                },
                FindingKind::RefcountTooLow { recorded: 0, references: 1 },
            ]
        );
        // A repair of leaks leaves this finding, and does no harm.
        let leaks = image.check().plan_repair(RepairKind::Leaks).expect("a plan");
        assert_eq!(leaks.count(), 0);
        image.repair_everywhere(RepairKind::All);
        assert_eq!((image.verdict(), image.refcount(last)), (Verdict::Clean, 1));
    }
}

#[test]
fn an_unreadable_refcount_structure_is_replaced() {
    let far = 1_u64 << 40;
    for version in [Version::V2, Version::V3] {
        let image = Image::new(version, 9, 4, 40);
        let table = image.header().refcount_table_offset.0;
        let block = image.entry(table);
        let damages: [(&str, u64, u64); 5] = [
            ("no refblock", table, 0),
            ("past the end", table, far),
            ("unaligned", table, block + 256 + 512 * 3 / 2),
            ("a second time", table + 8, block),
            ("the L1 table", table, image.header().l1_offset.0),
        ];
        for (what, at, raw) in damages {
            let mut image = image.clone();
            image.put(at, raw);
            assert_eq!(image.verdict(), Verdict::Corrupt, "{what}");
            image.repair_everywhere(RepairKind::All);
            assert_eq!((image.verdict(), image.marks()), (Verdict::Clean, 0), "{what}");
        }
    }
    // The whole table lies past the end of the file.
    let mut image = v3(4);
    let place = position::REFCOUNT_TABLE_OFFSET as u64;
    image.put(place, far);
    assert_eq!(image.verdict(), Verdict::Corrupt);
    assert!(image.check().plan_repair(RepairKind::Leaks).is_err());
    image.repair_everywhere(RepairKind::All);
    assert_eq!(image.verdict(), Verdict::Clean);
}

#[test]
fn a_dirty_image_is_marked_until_the_end() {
    let mut image = v3(4);
    image.put(position::INCOMPATIBLE as u64, Incompatible::DIRTY.0);
    image.set_refcount(20, 0);
    let steps: Vec<FileStep> = image.check().plan_repair(RepairKind::All).expect("a plan").collect();
    let marks = |step: &&FileStep| match step {
        FileStep::Write { offset, .. } => offset.0 == position::INCOMPATIBLE as u64,
        _ => false,
    };
    assert_eq!(steps.iter().filter(marks).count(), 1, "marked already: {steps:?}");
    let last_sync = steps.iter().rposition(|step| *step == FileStep::Sync).expect("a sync");
    assert_eq!(steps.iter().rposition(|step| marks(&step)), Some(last_sync - 1));
    image.repair_everywhere(RepairKind::All);
    assert_eq!((image.verdict(), image.marks()), (Verdict::Clean, 0));
    // Only the marks are wrong.
    let both = Incompatible::DIRTY.with(Incompatible::CORRUPT);
    image.put(position::INCOMPATIBLE as u64, both.0);
    image.repair_everywhere(RepairKind::All);
    assert_eq!(image.marks(), 0);
}

#[test]
fn flags_follow_the_new_refcounts() {
    let mut image = v3(4);
    // Two guest clusters share one host cluster, as after a snapshot; the flags have not been cleared yet.
    let (first, second) = (image.l2_place(3), image.l2_place(4));
    let raw = image.entry(first);
    image.put(second, raw);
    // One of them has lost its flag.
    let third = image.l2_place(9);
    image.put(third, image.entry(third) & !COPIED);
    assert_eq!(image.verdict(), Verdict::Corrupt);
    image.repair_everywhere(RepairKind::All);
    assert_eq!(image.verdict(), Verdict::Clean);
    assert_eq!([first, second, third].map(|at| image.entry(at) & COPIED != 0), [false, false, true]);
}

#[test]
fn each_broken_entry_is_named_and_not_repaired() {
    let image = v3(4);
    let l1 = image.header().l1_offset.0;
    let l2 = image.clone().l2_place(5);
    let far = 1_u64 << 40;
    let end = image.bytes.len() as u64;
    let (l1_raw, l2_raw) = (image.entry(l1), image.entry(l2));
    let cases: [(u64, u64, Expected); 11] = [
        (l1, l1_raw | 1 << 56, |kind| {
            matches!(kind, FindingKind::ReservedBits { part: ImagePart::ActiveL1, .. })
        }),
        (l1, l1_raw | 1, |kind| matches!(kind, FindingKind::ReservedBits { part: ImagePart::ActiveL1, .. })),
        (l1, COPIED, |kind| matches!(kind, FindingKind::BadEntry { part: ImagePart::ActiveL1, .. })),
        (l1, far | COPIED, |kind| matches!(kind, FindingKind::PastEnd { part: ImagePart::L2, .. })),
        (l1, l1 | COPIED, |kind| matches!(kind, FindingKind::Overlap { part: ImagePart::ActiveL1, .. })),
        (l2, l2_raw | 2, |kind| matches!(kind, FindingKind::ReservedBits { part: ImagePart::L2, .. })),
        (l2, l2_raw | 1 << 61, |kind| matches!(kind, FindingKind::ReservedBits { part: ImagePart::L2, .. })),
        (l2, end | COPIED, |kind| matches!(kind, FindingKind::PastEnd { part: ImagePart::Data, .. })),
        (l2, l1 | COPIED, |kind| matches!(kind, FindingKind::Overlap { part: ImagePart::ActiveL1, .. })),
        (l2, (l2 & !511) | COPIED, |kind| matches!(kind, FindingKind::Overlap { part: ImagePart::L2, .. })),
        (l2, l2_raw | COPIED | 1 << 62, |kind| matches!(kind, FindingKind::CopiedCompressed { .. })),
    ];
    for (at, raw, expected) in cases {
        let mut image = image.clone();
        image.put(at, raw);
        let kinds = image.kinds();
        assert!(kinds.iter().any(expected), "{raw:#x} at {at:#x}: {kinds:?}");
        assert_eq!(image.verdict(), Verdict::Corrupt);
        let refused = image.check().plan_repair(RepairKind::All).err();
        assert!(matches!(refused, Some(NotRepairable::Damaged { .. })), "{raw:#x} at {at:#x}: {refused:?}");
    }
}

#[test]
fn defects_that_qemu_tolerates_are_noted_or_repaired() {
    let is_odd =
        |image: &Image| image.kinds().iter().any(|kind| kind.is_note() && kind.name() == "odd-entry");
    // The next guest cluster after the data has no host cluster.
    let mut image = v3(4);
    let place = image.l2_place(40);
    image.put(place, COPIED);
    assert!(is_odd(&image));
    assert_eq!((image.verdict(), image.check().report().notes), (Verdict::Clean, 1));
    assert_eq!(image.check().plan_repair(RepairKind::All).expect("a plan").count(), 0);
    let mut v2 = Image::new(Version::V2, 9, 4, 8);
    let (with, without) = (v2.l2_place(5), v2.l2_place(8));
    v2.put(with, v2.entry(with) | 1);
    v2.put(without, 1);
    let report = v2.check().into_report();
    assert_eq!((report.verdict(), report.corruptions, report.allocated_clusters), (Verdict::Corrupt, 2, 8));
    assert!(v2.kinds().iter().all(|kind| kind.name() == "zero-flag"));
    let steps: Vec<FileStep> = v2.check().plan_repair(RepairKind::All).expect("repairable").collect();
    steps.iter().for_each(|step| v2.apply(step));
    let report = v2.check().into_report();
    assert_eq!((report.verdict(), report.allocated_clusters), (Verdict::Clean, 7));
    assert_eq!((v2.entry(with), v2.entry(without)), (0, 0));
    // In an L1 entry this is no mere note: the table would be where the header is.
    let l1 = image.header().l1_offset.0;
    image.put(l1, COPIED);
    assert_eq!(image.verdict(), Verdict::Corrupt);
}

#[test]
fn a_refcount_that_overflows_is_named() {
    let mut image = v3(0);
    let (first, second) = (image.l2_place(3), image.l2_place(4));
    image.put(second, image.entry(first));
    assert!(image.kinds().contains(&FindingKind::RefcountOverflow { references: 2, max: 1 }));
    assert!(image.check().plan_repair(RepairKind::All).is_err());
}

#[test]
fn compressed_data_is_counted_by_the_clusters_it_touches() {
    let mut image = v3(4);
    let host = image.add_cluster(0x11);
    image.add_cluster(0x22);
    let place = image.l2_place(40);
    let entry = L2Entry::Compressed { offset: HostOffset(host + 100), sectors: 2 };
    image.put(place, entry.encode(&image.geometry).descriptor);
    let report = image.check().into_report();
    assert_eq!((report.verdict(), report.allocated_clusters), (Verdict::Clean, 41), "{:?}", report.findings);
}

#[test]
fn findings_are_counted_when_the_list_is_full() {
    let mut image = Image::new(Version::V3, 9, 0, 2000);
    for _ in 0..1500 {
        image.add_cluster(0);
    }
    let report = image.check().into_report();
    assert_eq!((report.leaked_clusters, report.findings.len() as u64), (1500, FINDINGS_OF_KIND_MAX));
    assert_eq!(report.tallies, [Tally { name: "leak", count: 1500 }]);
}

#[test]
fn a_region_that_a_table_names_many_times_is_read_once() {
    // An L1 table of 4096 entries that all name one L2 table, whose entries all name one cluster.
    let geometry = Geometry {
        version: Version::V3,
        cluster_bits: 9,
        refcount_order: 4,
        extended_l2: false,
        size: 4096 * 64 * 512,
    };
    let mut image = Image { bytes: Vec::new(), geometry };
    for (_, piece) in NewImage::new(geometry).layout().expect("a layout") {
        image.bytes.extend(piece);
    }
    let (table, data) = (image.add_cluster(0), image.add_cluster(7));
    let l1 = image.header().l1_offset.0;
    (0..4096).for_each(|n| image.put(l1 + n * 8, table | COPIED));
    (0..64).for_each(|n| image.put(table + n * 8, data | COPIED));
    let report = image.check().into_report();
    assert_eq!(report.verdict(), Verdict::Corrupt);
    assert_eq!(report.allocated_clusters, 4096 * 64);
    let kind = FindingKind::RefcountOverflow { references: 4096 * 64, max: 65_535 };
    assert!(report.findings.iter().any(|finding| finding.kind == kind));
}

#[test]
fn many_snapshots_with_one_l1_table_cost_no_more_than_the_file() {
    let mut image = v3(4);
    let count = 700_u64;
    let table = image.bytes.len() as u64;
    for n in 0..count {
        // Each entry claims the file from the header's neighbour on, each a little more of it.
        let mut entry = vec![0; 56];
        set_entry(&mut entry, 0, 512);
        entry[8..12].copy_from_slice(&(n as u32 * 8).to_be_bytes());
        entry[39] = 16;
        image.bytes.extend(entry);
    }
    let mut field = [0; 12];
    field[..4].copy_from_slice(&(count as u32).to_be_bytes());
    field[4..].copy_from_slice(&table.to_be_bytes());
    image.bytes[position::SNAPSHOTS..position::SNAPSHOTS + 12].copy_from_slice(&field);
    assert_eq!(image.verdict(), Verdict::Corrupt);
    assert!(image.check().plan_repair(RepairKind::All).is_err());
}

#[test]
fn an_image_that_cannot_be_checked_is_refused_by_name() {
    let image = Image::new(Version::V3, 16, 4, 1);
    let header = image.header();
    let refusal = |header: &Header, length: u64| Checker::new(header, length).err();
    let unknown = Header { incompatible: Incompatible(1 << 17), ..header.clone() };
    assert!(matches!(refusal(&unknown, 1 << 20), Some(Refusal::Unsupported(_))));
    let encrypted = Header { crypt_method: 2, ..header.clone() };
    assert!(matches!(refusal(&encrypted, 1 << 20), Some(Refusal::Unsupported(_))));
    assert!(matches!(refusal(&header, 1 << 62), Some(Refusal::TooManyClusters { .. })));
    let external = Header { incompatible: Incompatible::DATA_FILE, ..header };
    assert_eq!(refusal(&external, 1 << 20), None);
}

#[test]
fn guest_data_in_another_file_is_not_counted() {
    let mut image = v3(4);
    let place = image.l2_place(3);
    let mark = |image: &mut Image| {
        let at = position::INCOMPATIBLE as u64;
        image.put(at, Incompatible::DATA_FILE.0);
    };
    let mut external = image.clone();
    mark(&mut external);
    // In the external file each guest cluster is at its own offset: 0, and offsets far past the end of this file.
    for cluster in 0..40 {
        let place = external.l2_place(cluster);
        external.put(place, (cluster * 512) | COPIED);
    }
    // The data is now in another file, so its clusters in this one are leaks.
    let report = external.check().into_report();
    assert_eq!(
        (report.verdict(), report.leaked_clusters, report.allocated_clusters),
        (Verdict::Leaks, 40, 40)
    );
    // No other offset may hold this guest cluster.
    external.put(place, 1 << 40 | COPIED);
    assert!(external.kinds().iter().any(|kind| kind.name() == "bad-entry"));
    assert_eq!(external.verdict(), Verdict::Corrupt);
    external.put(place, (3 * 512) | COPIED);
    assert_eq!(external.verdict(), Verdict::Leaks);
    // A repair sets a lost flag again.
    external.put(place + 16, external.entry(place + 16) & !COPIED);
    assert_eq!(external.verdict(), Verdict::Corrupt);
    let steps: Vec<FileStep> = external.check().plan_repair(RepairKind::All).expect("a plan").collect();
    steps.iter().for_each(|step| external.apply(step));
    assert_eq!(external.verdict(), Verdict::Clean);
    assert_ne!(external.entry(place + 16) & COPIED, 0);
    let raw = 1 << 62 | 0x1_0000;
    external.put(place, raw);
    assert_eq!(external.kinds(), [FindingKind::CompressedWithDataFile { raw }]);
}

#[test]
fn progress_ends_at_its_total() {
    let image = v3(4);
    let mut checker = Checker::new(&image.header(), image.bytes.len() as u64).expect("a check");
    let mut seen = Vec::new();
    while let Step::Read { offset, length } = checker.step() {
        let before = checker.progress();
        assert!(before.done < before.total, "{before:?}");
        checker.feed(&image.bytes[offset.0 as usize..offset.0 as usize + length]);
        let after = checker.progress();
        assert_eq!(after.done - before.done, length as u64);
        seen.push(after.part);
    }
    assert_eq!(seen[..3], [ImagePart::RefcountTable, ImagePart::Refblock, ImagePart::ActiveL1]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// `check` itself asserts that it reads little and uses little memory.
    #[test]
    fn no_image_makes_a_check_panic_hang_or_use_much_memory(
        order in 0_u32..=6,
        flips in prop::collection::vec((0_usize..4096, 0_u8..8, any::<bool>()), 1..24),
        cut in prop::option::of(0_usize..40_000),
    ) {
        let mut image = v3(order);
        let length = image.bytes.len();
        let mut seen = HashSet::new();
        for (at, bit, anywhere) in flips {
            // Most flips are in the header and the tables that follow it.
            let at = if anywhere { at * 7919 % length } else { at % length };
            if seen.insert((at, bit)) {
                image.bytes[at] ^= 1 << bit;
            }
        }
        if let Some(cut) = cut {
            image.bytes.truncate(cut.max(512));
        }
        let first = image.bytes.len().min(512);
        let Ok(header) = Header::parse(&image.bytes[..first], image.bytes.len() as u64) else { return Ok(()) };
        image.geometry = header.geometry();
        if Checker::new(&header, image.bytes.len() as u64).is_err() {
            return Ok(());
        }
        let verdict = image.verdict();
        let Ok(steps) = image.check().plan_repair(RepairKind::All) else { return Ok(()) };
        let steps: Vec<FileStep> = steps.collect();
        prop_assert!(image.bytes.len() < 1 << 20);
        steps.iter().for_each(|step| image.apply(step));
        prop_assert_eq!(image.verdict(), Verdict::Clean, "after {:?}: {:?}", verdict, image.kinds());
    }
}
