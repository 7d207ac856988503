//! Walks the tables of an image: counts the references, and judges each entry by itself.
//!
//! Owns the counts and the findings of a running check. `compare` judges the final counts.

use std::collections::BTreeMap;

use qcow2::entry::{COMPRESSED, COPIED, OFFSET_MASK, ZERO, compressed_length};
use qcow2::header::L1_TABLE_SIZE_MAX;
use qcow2::snapshot::{EXTRA_LENGTH_V3, TableEntry};
use qcow2::{
    Bitmap, EntryError, Geometry, GuestCluster, Header, HostCluster, HostOffset, HostPlace, HostRange,
    Incompatible, L1Entry, L2Entry, RawL2Entry, Snapshot, SnapshotTable, Version,
};

use super::CLUSTERS_MAX;
use super::counts::Counts;
use super::report::{FindingKind, ImagePart, Refusal, Report};
use super::sweep::{Cover, Covered, Sweep};
use crate::run::HostRun;

/// Reserved bits of an L1 entry.
const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;
/// Reserved bits of a standard L2 entry.
const L2_RESERVED: u64 = 0x3f00_0000_0000_01fe;
/// Reserved bits of an entry of the refcount table.
const REFCOUNT_TABLE_RESERVED: u64 = 0x1ff;

/// How often L1 tables name an L2 table.
#[derive(Clone, Copy, Default, Debug)]
pub(crate) struct L2Use {
    /// The active one.
    pub active: u64,
    /// Those of snapshots.
    pub snapshots: u64,
}

impl L2Use {
    pub fn all(self) -> u64 {
        self.active.saturating_add(self.snapshots)
    }
}

/// A run of clusters that belong to one structure.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    pub run: HostRun,
    pub part: ImagePart,
}

/// An entry whose flag COPIED must change.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FlagFix {
    pub offset: u64,
    pub raw: u64,
}

/// An L2 entry decoded for its references, and a note on anything odd in it.
struct Understood {
    entry: Result<L2Entry, EntryError>,
    /// A fault against the format that leaves the references clear ([`FindingKind::is_note`]).
    note: Option<EntryError>,
}

/// An L2 entry to be cleared: without a backing file its guest cluster then reads as zeros.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clearing {
    /// The offset of the entry in the file.
    pub offset: u64,
    /// The cluster whose references include the entry, if it is in the file.
    pub host: Option<u64>,
    /// How many of those references the entry makes.
    pub times: u64,
}

/// A usable refblock.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Refblock {
    pub index: u64,
    pub offset: u64,
}

pub(crate) struct Walk {
    pub header: Header,
    pub geometry: Geometry,
    pub file_length: u64,
    /// Clusters of the file; the file may end within the last. Entries may name one more: see [`Walk::is_past_end`].
    pub clusters: u64,
    /// References found.
    pub references: Counts,
    /// The refcounts in the image.
    pub recorded: Counts,
    /// In the order of the refcount table.
    pub refblocks: Vec<Refblock>,
    /// The L2 tables by their cluster.
    pub l2: BTreeMap<u64, L2Use>,
    /// The L1 tables of snapshots, in bytes and in clusters.
    snapshot_l1: (Cover, Cover),
    /// The length of the snapshot table in bytes.
    pub snapshot_table_length: u64,
    /// The tables of bitmaps, likewise in bytes and in clusters.
    bitmap_tables: (Cover, Cover),
    /// Guest data is in another file, which has no refcounts.
    external_data: bool,
    /// The offset right after the last host cluster seen in the present L2 table; 0 at the start of a table.
    next_contiguous: u64,
    /// Metadata apart from L2 tables and refcounts. It must not share its clusters.
    pub places: Vec<Place>,
    /// The refcount table and the refblocks that are in the file.
    pub refcount_places: Vec<Place>,
    /// With an external data file: the cluster of each active L2 table → the index of the L1 entry that names it.
    own_tables: BTreeMap<u64, u64>,
    pub flag_fixes: Vec<FlagFix>,
    /// The entries of the snapshot table that can be read.
    pub snapshots: Vec<Snapshot>,
    /// Entries to be cleared by a repair of all.
    pub clearings: Vec<Clearing>,
    pub report: Report,
}

impl Walk {
    pub fn new(header: &Header, file_length: u64) -> Result<Self, Refusal> {
        if let Some(unsupported) = header.unsupported() {
            return Err(unsupported.into());
        }
        let geometry = header.geometry();
        let clusters = geometry.clusters_for(file_length);
        if clusters > CLUSTERS_MAX {
            return Err(Refusal::TooManyClusters { clusters, max: CLUSTERS_MAX });
        }
        Ok(Walk {
            header: header.clone(),
            geometry,
            file_length,
            clusters,
            references: Counts::new(clusters + 1),
            recorded: Counts::new(clusters + 1),
            refblocks: Vec::new(),
            l2: BTreeMap::new(),
            snapshot_l1: Default::default(),
            snapshot_table_length: 0,
            bitmap_tables: Default::default(),
            external_data: header.has_data_file(),
            next_contiguous: 0,
            places: Vec::new(),
            refcount_places: Vec::new(),
            own_tables: BTreeMap::new(),
            flag_fixes: Vec::new(),
            snapshots: Vec::new(),
            clearings: Vec::new(),
            // QEMU counts whole sectors, as a guest does.
            report: Report {
                total_clusters: geometry.clusters_for(header.size / 512 * 512),
                refcounts_too_low: header.incompatible.contains(Incompatible::DIRTY),
                ..Report::default()
            },
        })
    }

    /// True if a region ends a cluster or more past the end of the file. A smaller overhang is allowed, because the
    /// last cluster of an image need not be written whole.
    fn is_past_end(&self, region: HostRange) -> bool {
        let Some(end) = region.offset.0.checked_add(region.length) else { return true };
        end.saturating_sub(self.file_length) >= self.geometry.cluster_size()
    }

    /// The clusters that a region touches.
    fn clusters_of(&self, region: HostRange) -> HostRun {
        let first = self.geometry.host_cluster(region.offset);
        HostRun::new(first, self.geometry.clusters_for(region.end().0) - first.0)
    }

    /// The region of a cluster at `offset`.
    fn cluster_at(&self, offset: HostOffset) -> HostRange {
        HostRange::new(offset, self.geometry.cluster_size())
    }

    /// Counts references to a region in the file and returns its clusters. A region past the end of the file is a
    /// finding at `entry`.
    fn count(&mut self, entry: HostOffset, part: ImagePart, region: HostRange, times: u64) -> Option<Place> {
        if region.length == 0 {
            return None;
        }
        if self.is_past_end(region) {
            let kind = FindingKind::PastEnd { part, target: region.offset, length: region.length };
            self.report.add(entry.0, kind);
            return None;
        }
        let run = self.clusters_of(region);
        for cluster in run.clusters() {
            self.references.add(HostCluster(cluster), times);
        }
        Some(Place { run, part })
    }

    // The refcounts in the image.

    pub fn refcount_table_length(&self) -> u64 {
        u64::from(self.header.refcount_table_clusters) << self.geometry.cluster_bits
    }

    pub fn refcount_table_sweep(&self) -> Sweep<()> {
        let mut sweep = Sweep::default();
        let table = HostRange::new(self.header.refcount_table_offset, self.refcount_table_length());
        sweep.push(table, self.file_length, ());
        sweep
    }

    /// Takes entries of the refcount table, from index `first` on, at `offset`.
    pub fn refcount_table(&mut self, offset: HostOffset, first: u64, bytes: &[u8]) {
        let (part, size) = (ImagePart::RefcountTable, self.geometry.cluster_size());
        for UsedEntry { offset: entry, index, raw } in entries(offset, first, bytes) {
            if raw & REFCOUNT_TABLE_RESERVED != 0 {
                self.report.add(entry.0, FindingKind::ReservedBits { part, raw });
            }
            match qcow2::refblock_offset(raw, &self.geometry) {
                Ok(None) => {}
                Ok(Some(target)) if target.0 >> self.geometry.cluster_bits >= self.clusters => {
                    let kind = FindingKind::PastEnd { part: ImagePart::Refblock, target, length: size };
                    self.report.add(entry.0, kind);
                }
                Ok(Some(target)) => self.refblocks.push(Refblock { index, offset: target.0 }),
                Err(source) => self.report.add(entry.0, FindingKind::BadEntry { part, source }),
            }
        }
    }

    /// The refblocks, as far as they count clusters that entries can name.
    pub fn refblock_sweep(&self) -> Sweep<u64> {
        let mut sweep = Sweep::default();
        for block in &self.refblocks {
            let first = block.index * self.geometry.refblock_entries();
            let counted = (self.clusters + 1).saturating_sub(first).min(self.geometry.refblock_entries());
            let length = (counted << self.geometry.refcount_order).div_ceil(8);
            sweep.push(HostRange::new(HostOffset(block.offset), length), self.file_length, first);
        }
        sweep
    }

    /// Takes bytes of a refblock. Its first refcount is that of cluster `first`, and the bytes begin `within` bytes
    /// into it.
    pub fn refblock(&mut self, first: HostCluster, within: u64, bytes: &[u8]) {
        let order = self.geometry.refcount_order;
        let words = bytes.as_chunks::<8>().0;
        for (n, word) in words.iter().enumerate().filter(|(_, word)| **word != [0; 8]) {
            let start = first.0 + (((within + n as u64 * 8) * 8) >> order);
            for index in 0..64_usize >> order {
                let (cluster, count) = (start + index as u64, qcow2::refcount(order, word, index));
                if count != 0 && cluster <= self.clusters {
                    self.recorded.set(HostCluster(cluster), count);
                }
            }
        }
    }

    // References.

    pub fn snapshot_walk(&self) -> SnapshotTable {
        SnapshotTable::new(self.header.snapshots_offset, self.header.snapshots, self.file_length)
    }

    pub fn snapshot(&mut self, entry: &TableEntry) {
        let (index, offset, snapshot) = (entry.index, entry.offset.0, &entry.snapshot);
        let (target, entries) = (snapshot.l1_offset, u64::from(snapshot.l1_entries));
        if self.geometry.version == Version::V3 && snapshot.extra.len() < EXTRA_LENGTH_V3 {
            self.report.add(offset, FindingKind::IncompleteSnapshot { index });
        }
        let length = entries * 8;
        if !self.geometry.is_aligned(target.0) || length > L1_TABLE_SIZE_MAX {
            self.report.add(offset, FindingKind::BadSnapshotL1 { index, target, entries });
        } else if length > 0 && self.is_past_end(HostRange::new(target, length)) {
            let part = ImagePart::SnapshotL1;
            self.report.add(offset, FindingKind::PastEnd { part, target, length });
        } else if length > 0 {
            let run = self.clusters_of(HostRange::new(target, length));
            let (bytes, clusters) = &mut self.snapshot_l1;
            bytes.add(target.0..target.0 + length);
            clusters.add(run.clusters());
        }
    }

    /// Counts the structures that the header, the snapshot table and the bitmap directory name, except the refcounts.
    pub fn count_fixed_places(&mut self) {
        let header = &self.header;
        let first = HostRange::new(HostOffset(0), self.geometry.cluster_size());
        let l1 = HostRange::new(header.l1_offset, u64::from(header.l1_entries) * 8);
        let snapshots = HostRange::new(header.snapshots_offset, self.snapshot_table_length);
        let [l1_field, snapshots_field] =
            [qcow2::position::L1_OFFSET, qcow2::position::SNAPSHOTS_OFFSET].map(|at| HostOffset(at as u64));
        let places = [
            self.count(HostOffset(0), ImagePart::Header, first, 1),
            self.count(l1_field, ImagePart::ActiveL1, l1, 1),
            self.count(snapshots_field, ImagePart::SnapshotTable, snapshots, 1),
        ];
        self.places.extend(places.into_iter().flatten());
        let (l1, tables) = (self.snapshot_l1.1.regions(), self.bitmap_tables.1.regions());
        self.count_covered(l1, ImagePart::SnapshotL1);
        self.count_covered(tables, ImagePart::BitmapTable);
        if let Some(bitmaps) = self.header.bitmaps() {
            let directory = HostRange::new(bitmaps.directory_offset, bitmaps.directory_size);
            let place = self.count(HostOffset(0), ImagePart::BitmapDirectory, directory, 1);
            self.places.extend(place);
        }
        if self.external_data && self.header.snapshots > 0 {
            let kind = FindingKind::SnapshotsWithDataFile { count: self.header.snapshots };
            self.report.add(qcow2::position::SNAPSHOTS as u64, kind);
        }
    }

    fn count_covered(&mut self, regions: Vec<Covered>, part: ImagePart) {
        for Covered { start, end, times } in regions {
            for cluster in start..end {
                self.references.add(HostCluster(cluster), times);
            }
            self.places.push(Place { run: HostRun::new(HostCluster(start), end - start), part });
        }
    }

    /// Notes a bitmap's table.
    pub fn bitmap(&mut self, bitmap: &Bitmap) {
        let table = HostRange::new(bitmap.table_offset, u64::from(bitmap.table_entries) * 8);
        if self.is_past_end(table) {
            let HostRange { offset: target, length } = table;
            let kind = FindingKind::PastEnd { part: ImagePart::BitmapTable, target, length };
            self.report.add(bitmap.offset.0, kind);
            return;
        }
        let run = self.clusters_of(table);
        let (bytes, clusters) = &mut self.bitmap_tables;
        bytes.add(table.offset.0..table.end().0);
        clusters.add(run.clusters());
    }

    pub fn bitmap_table_sweep(&self) -> Sweep<u64> {
        let mut sweep = Sweep::default();
        for Covered { start, end, times } in self.bitmap_tables.0.regions() {
            sweep.push(HostRange::new(HostOffset(start), end - start), self.file_length, times);
        }
        sweep
    }

    /// Takes entries of bitmaps' tables at `offset`; each counts `times`.
    pub fn bitmap_table(&mut self, offset: HostOffset, bytes: &[u8], times: u64) {
        for UsedEntry { offset: entry, raw, .. } in entries(offset, 0, bytes) {
            match qcow2::bitmap_table_entry(raw, &self.geometry) {
                Ok(None) => {}
                Ok(Some(target)) => {
                    self.count(entry, ImagePart::Bitmap, self.cluster_at(target), times);
                }
                Err(raw) => self.report.add(entry.0, FindingKind::BadBitmapEntry { raw }),
            }
        }
    }

    pub fn active_l1_sweep(&self) -> Sweep<()> {
        let mut sweep = Sweep::default();
        let length = u64::from(self.header.l1_entries) * 8;
        sweep.push(HostRange::new(self.header.l1_offset, length), self.file_length, ());
        sweep
    }

    pub fn snapshot_l1_sweep(&self) -> Sweep<u64> {
        let mut sweep = Sweep::default();
        for Covered { start, end, times } in self.snapshot_l1.0.regions() {
            sweep.push(HostRange::new(HostOffset(start), end - start), self.file_length, times);
        }
        sweep
    }

    /// Takes entries of an L1 table at `offset`; each counts `times`.
    pub fn l1(&mut self, offset: HostOffset, bytes: &[u8], part: ImagePart, times: L2Use) {
        for UsedEntry { offset: entry, raw, .. } in entries(offset, 0, bytes) {
            if raw & L1_RESERVED != 0 {
                self.report.add(entry.0, FindingKind::ReservedBits { part, raw });
            } else if raw & OFFSET_MASK == 0 {
                let source = EntryError::DataAtOffsetZero { raw };
                self.report.add(entry.0, FindingKind::BadEntry { part, source });
            }
            match L1Entry::decode(raw, &self.geometry) {
                Ok(L1Entry::Unallocated) => {}
                Ok(L1Entry::Table { offset: target, .. }) => {
                    let table = self.cluster_at(target);
                    if let Some(place) = self.count(entry, ImagePart::L2, table, times.all()) {
                        let known = self.l2.entry(place.run.start.0).or_default();
                        known.active = known.active.saturating_add(times.active);
                        known.snapshots = known.snapshots.saturating_add(times.snapshots);
                        if self.external_data && part == ImagePart::ActiveL1 {
                            self.own_tables
                                .insert(place.run.start.0, (entry.0 - self.header.l1_offset.0) / 8);
                        }
                    }
                }
                Err(source) => self.report.add(entry.0, FindingKind::BadEntry { part, source }),
            }
        }
    }

    pub fn l2_sweep(&self) -> Sweep<L2Use> {
        let mut sweep = Sweep::default();
        let size = self.geometry.cluster_size();
        for (cluster, times) in &self.l2 {
            sweep.push(self.cluster_at(HostOffset(cluster * size)), self.file_length, *times);
        }
        sweep
    }

    /// The L2 tables of the active disk.
    pub fn active_l2_sweep(&self) -> Sweep<()> {
        let mut sweep = Sweep::default();
        let size = self.geometry.cluster_size();
        for (cluster, _) in self.l2.iter().filter(|(_, times)| times.active > 0) {
            sweep.push(self.cluster_at(HostOffset(cluster * size)), self.file_length, ());
        }
        sweep
    }

    /// Takes entries of an L2 table at `offset`, which begin `within` bytes into it.
    pub fn l2(&mut self, offset: HostOffset, within: u64, bytes: &[u8], times: L2Use) {
        if within == 0 {
            self.next_contiguous = 0;
        }
        let table = self.own_tables.get(&((offset.0 - within) >> self.geometry.cluster_bits)).copied();
        for (entry, raw) in l2_entries(self.geometry, offset, bytes) {
            self.l2_flags(entry, raw);
            if let Some(table) = table {
                let at = (within + entry.0 - offset.0) / self.geometry.l2_entry_size();
                self.elsewhere(entry, raw, GuestCluster(table * self.geometry.l2_entries() + at));
            }
            let understood = self.understand(raw);
            if let Ok(standard) = understood.entry {
                self.zero_flag(entry, raw, standard, times);
            }
            if let Some(source) = understood.note {
                self.report.add(entry.0, FindingKind::BadEntry { part: ImagePart::L2, source });
            }
            match understood.entry {
                Ok(L2Entry::Compressed { offset, sectors }) => {
                    self.compressed(entry, raw.descriptor, offset, sectors, times);
                }
                Ok(standard) => {
                    if let Some(host) = standard.host() {
                        self.standard(entry, raw.descriptor, host.offset, times);
                    }
                }
                Err(source) => {
                    self.report.add(entry.0, FindingKind::BadEntry { part: ImagePart::L2, source });
                }
            }
        }
    }

    /// Reports data in an external file that is not at the guest's own offset.
    fn elsewhere(&mut self, entry: HostOffset, raw: RawL2Entry, guest: GuestCluster) {
        let decoded = L2Entry::decode_external(raw, &self.geometry, guest);
        if let Err(source @ EntryError::DataFileOffset { .. }) = decoded {
            self.report.add(entry.0, FindingKind::BadEntry { part: ImagePart::L2, source });
        }
    }

    /// Reports a zero flag in an image of version 2, which does not define it.
    fn zero_flag(&mut self, entry: HostOffset, raw: RawL2Entry, standard: L2Entry, times: L2Use) {
        let raw = raw.descriptor;
        if self.geometry.version != Version::V2 || raw & COMPRESSED != 0 || raw & ZERO == 0 {
            return;
        }
        let has_backing = self.header.backing_file.is_some();
        self.report.add(entry.0, FindingKind::ZeroFlag { raw, has_backing });
        if !has_backing {
            let cluster = |host: HostPlace| host.offset.0 >> self.geometry.cluster_bits;
            let host = standard.host().map(cluster).filter(|cluster| *cluster < self.clusters);
            self.clearings.push(Clearing { offset: entry.0, host, times: times.all() });
        }
    }

    /// Reports bits that must not be set in an L2 entry, whatever it names.
    fn l2_flags(&mut self, entry: HostOffset, RawL2Entry { descriptor: raw, bitmap }: RawL2Entry) {
        let compressed = raw & COMPRESSED != 0;
        if !compressed && raw & L2_RESERVED != 0 {
            self.report.add(entry.0, FindingKind::ReservedBits { part: ImagePart::L2, raw });
        }
        if compressed && raw & COPIED != 0 {
            self.report.add(entry.0, FindingKind::CopiedCompressed { raw });
        }
        if compressed && bitmap != 0 {
            self.report.add(entry.0, FindingKind::CompressedSubclusters { raw, bitmap });
        }
    }

    fn compressed(&mut self, entry: HostOffset, raw: u64, target: HostOffset, sectors: u64, times: L2Use) {
        if self.external_data {
            self.report.add(entry.0, FindingKind::CompressedWithDataFile { raw });
            return;
        }
        let report = &mut self.report;
        for number in
            [&mut report.allocated_clusters, &mut report.compressed_clusters, &mut report.fragmented_clusters]
        {
            *number = number.saturating_add(times.active);
        }
        let data = HostRange::new(target, compressed_length(target, sectors));
        self.count(entry, ImagePart::Data, data, times.all());
    }

    fn standard(&mut self, entry: HostOffset, raw: u64, target: HostOffset, times: L2Use) {
        let size = self.geometry.cluster_size();
        // In an external data file the offset may be 0.
        let offset = raw & OFFSET_MASK;
        let report = &mut self.report;
        report.allocated_clusters = report.allocated_clusters.saturating_add(times.active);
        if self.next_contiguous != 0 && offset != self.next_contiguous {
            report.fragmented_clusters = report.fragmented_clusters.saturating_add(times.active);
        }
        self.next_contiguous = offset.saturating_add(size);
        if !self.external_data {
            self.count(entry, ImagePart::Data, self.cluster_at(target), times.all());
        }
    }

    /// Decodes an L2 entry for its references.
    fn understand(&self, mut raw: RawL2Entry) -> Understood {
        let zero = raw.descriptor & ZERO != 0 && !self.geometry.extended_l2;
        let elsewhere = self.external_data && raw.descriptor & (COMPRESSED | COPIED) == COPIED && !zero;
        if elsewhere && raw.descriptor & OFFSET_MASK == 0 {
            // An external file may have data at offset 0. Any other offset will do here, as it is not counted.
            raw.descriptor |= self.geometry.cluster_size();
        }
        let nowhere = raw.descriptor & OFFSET_MASK == 0 && raw.descriptor & COPIED != 0;
        match L2Entry::decode(raw, &self.geometry) {
            Ok(entry @ (L2Entry::Unallocated | L2Entry::Subclusters(_))) if nowhere => {
                let source = EntryError::DataAtOffsetZero { raw: raw.descriptor };
                Understood { entry: Ok(entry), note: Some(source) }
            }
            Err(EntryError::ZeroFlagInV2 { .. }) => {
                let later = Geometry { version: Version::V3, ..self.geometry };
                Understood { entry: L2Entry::decode(raw, &later), note: None }
            }
            entry => Understood { entry, note: None },
        }
    }

    // Flags.

    /// Compares the flags of entries of the active L1 table.
    pub fn flags_in_l1(&mut self, offset: HostOffset, bytes: &[u8]) {
        for UsedEntry { offset: entry, raw, .. } in entries(offset, 0, bytes) {
            if let Ok(L1Entry::Table { offset: target, copied }) = L1Entry::decode(raw, &self.geometry) {
                self.flag(entry, raw, ImagePart::ActiveL1, target, copied);
            }
        }
    }

    /// Compares the flags of entries of an L2 table.
    pub fn flags_in_l2(&mut self, offset: HostOffset, bytes: &[u8]) {
        for (entry, raw) in l2_entries(self.geometry, offset, bytes) {
            let Some(host) = self.understand(raw).entry.ok().and_then(L2Entry::host) else { continue };
            if !self.external_data {
                self.flag(entry, raw.descriptor, ImagePart::L2, host.offset, host.copied);
            } else if !host.copied {
                // Data in an external file is never shared.
                let (part, raw) = (ImagePart::L2, raw.descriptor);
                self.report.add(entry.0, FindingKind::Copied { part, raw, refcount: 1 });
                self.flag_fixes.push(FlagFix { offset: entry.0, raw: raw | COPIED });
            }
        }
    }

    fn flag(&mut self, entry: HostOffset, raw: u64, part: ImagePart, target: HostOffset, copied: bool) {
        let cluster = target.0 >> self.geometry.cluster_bits;
        if cluster >= self.clusters {
            return;
        }
        let refcount = self.recorded.get(cluster);
        if copied != (refcount == 1) {
            self.report.add(entry.0, FindingKind::Copied { part, raw, refcount });
        }
        // The references do not include the refcount structure yet, which a repair may move.
        if copied != (self.references.get(cluster) == 1) {
            self.flag_fixes.push(FlagFix { offset: entry.0, raw: raw ^ COPIED });
        }
    }

    // The refcount structure as a user of clusters.

    /// Counts the refcount table and the refblocks. This is the last count, so anything else in their clusters shows.
    pub fn count_refcount_structure(&mut self) {
        let (offset, length) = (self.header.refcount_table_offset.0, self.refcount_table_length());
        let field = HostOffset(qcow2::position::REFCOUNT_TABLE_OFFSET as u64);
        let table = HostRange::new(HostOffset(offset), length);
        let table = self.count(field, ImagePart::RefcountTable, table, 1);
        self.refcount_places.extend(table);
        for n in 0..self.refblocks.len() {
            let Refblock { index, offset: target } = self.refblocks[n];
            let entry = HostOffset(offset + index * 8);
            let place = self.count(entry, ImagePart::Refblock, self.cluster_at(HostOffset(target)), 1);
            self.refcount_places.extend(place);
        }
    }

    pub fn held_bytes(&self) -> usize {
        // A B-tree map takes up to twice its items.
        let l2 =
            self.l2.len() * 2 * size_of::<(u64, L2Use)>() + self.own_tables.len() * 2 * 2 * size_of::<u64>();
        self.references.held_bytes()
            + self.recorded.held_bytes()
            + self.refblocks.capacity() * size_of::<Refblock>()
            + (self.places.capacity() + self.refcount_places.capacity()) * size_of::<Place>()
            + self.flag_fixes.capacity() * size_of::<FlagFix>()
            + self.snapshots.capacity() * size_of::<Snapshot>()
            + self.snapshot_table_length as usize
            + self.clearings.capacity() * size_of::<Clearing>()
            + (self.snapshot_l1.0.held_bytes() + self.snapshot_l1.1.held_bytes())
            + (self.bitmap_tables.0.held_bytes() + self.bitmap_tables.1.held_bytes())
            + l2
    }
}

/// The nonzero entries of a piece of an L2 table, with their offsets in the file. If the file ends within an entry, its
/// bitmap is zero.
fn l2_entries(
    geometry: Geometry,
    offset: HostOffset,
    bytes: &[u8],
) -> impl Iterator<Item = (HostOffset, RawL2Entry)> {
    let size = geometry.l2_entry_size();
    let extended = geometry.extended_l2;
    bytes.chunks(size as usize).enumerate().filter_map(move |(n, bytes)| {
        let words = bytes.as_chunks::<8>().0;
        let word = |n: usize| words.get(n).map_or(0, |word| u64::from_be_bytes(*word));
        let raw = RawL2Entry { descriptor: word(0), bitmap: if extended { word(1) } else { 0 } };
        (raw != RawL2Entry::default()).then_some((HostOffset(offset.0 + n as u64 * size), raw))
    })
}

/// A nonzero entry of a table.
struct UsedEntry {
    /// Its offset in the file.
    offset: HostOffset,
    index: u64,
    raw: u64,
}

/// The nonzero entries of a piece of a table. The piece is at `offset` and begins with entry `first`.
fn entries(offset: HostOffset, first: u64, bytes: &[u8]) -> impl Iterator<Item = UsedEntry> {
    let words = bytes.as_chunks::<8>().0.iter().enumerate().filter(|(_, word)| **word != [0; 8]);
    words.map(move |(n, word)| UsedEntry {
        offset: HostOffset(offset.0 + n as u64 * 8),
        index: first + n as u64,
        raw: u64::from_be_bytes(*word),
    })
}
