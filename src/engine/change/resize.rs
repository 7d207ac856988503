//! Plans another size for the disk: what stays, what is removed, and the new tables.
//!
//! Owns where the active disk is cut, and the bytes of new L2 tables. A disk retains the data before both its old and
//! its new end. Anything past that is removed: the part cut off, an old VM state, or the rest from another program's
//! resize. The new part reads as zero: it is not allocated, or has zero entries where the backing file would show
//! through. The caller must have zeroed the rest of the cluster that contains the old end before.

use std::ops::Range;

use qcow2::entry::HOST_OFFSET_LIMIT;
use qcow2::header::L1_TABLE_SIZE_MAX;
use qcow2::{Geometry, Header, HostCluster, HostOffset, L1Entry, L2Entry, Snapshot, Version};

use super::refusal::ChangeRefusal;
use crate::check::READ_MAX;
use crate::rules::change as rules;

/// The new size of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resize {
    /// In bytes.
    pub size: u64,
    /// The size of the backing file's disk in bytes; 0 if there is none.
    pub backing_size: u64,
    /// True if the L2 table across the end is copied even if nothing in it changes. So it can move nearer to the file's
    /// start, as the L1 table does.
    pub compacts: bool,
}

impl Resize {
    /// Refuses a resize of a disk in use that its header or its snapshots show to be impossible.
    ///
    /// # Errors
    /// As for an image that is not in use.
    pub fn examine_in_use(&self, header: &Header, snapshots: &[Snapshot]) -> Result<(), ChangeRefusal> {
        self.examine(header)?;
        self.examine_snapshots(snapshots)
    }

    /// Refuses a resize that the header alone shows to be impossible.
    pub(super) fn examine(&self, header: &Header) -> Result<(), ChangeRefusal> {
        let geometry = header.geometry();
        if let Some(bitmaps) = header.bitmaps() {
            return Err(ChangeRefusal::ResizeWithBitmaps { count: bitmaps.count });
        }
        if header.version == Version::V2 && header.snapshots > 0 {
            return Err(ChangeRefusal::ResizeWithSnapshotsInV2);
        }
        if header.version == Version::V2 && !self.zeroed(&geometry).is_empty() {
            return Err(ChangeRefusal::BackingShowsThrough { backing_size: self.backing_size });
        }
        let mapped = (L1_TABLE_SIZE_MAX / 8 * geometry.l2_entries()) << geometry.cluster_bits;
        let max = if header.has_data_file() { mapped.min(HOST_OFFSET_LIMIT) } else { mapped };
        if self.size > max {
            return Err(ChangeRefusal::DiskTooLarge { size: self.size, max });
        }
        Ok(())
    }

    /// Refuses a snapshot without its own size, which would change its size with the disk.
    pub(super) fn examine_snapshots(&self, snapshots: &[Snapshot]) -> Result<(), ChangeRefusal> {
        match snapshots.iter().find(|snapshot| snapshot.disk_size().is_none()) {
            Some(snapshot) => {
                let id = snapshot.id.clone();
                Err(ChangeRefusal::SnapshotWithoutSize { id })
            }
            None => Ok(()),
        }
    }

    /// Where the active disk is cut.
    pub(super) fn cut(&self, geometry: &Geometry) -> Cut {
        let clusters = geometry.clusters_for(self.size.min(geometry.size));
        let in_table = clusters % geometry.l2_entries() * geometry.l2_entry_size();
        Cut { clusters, in_table, ..Cut::default() }
    }

    /// The clusters that get a zero entry, because the backing file has data there.
    fn zeroed(&self, geometry: &Geometry) -> Range<u64> {
        let first = geometry.clusters_for(geometry.size);
        let end = geometry.clusters_for(self.size.min(self.backing_size));
        first..end.max(first)
    }

    /// The new L2 tables. The first replaces the one across the cut, if that is replaced.
    pub(super) fn tables(&self, cut: &Cut, geometry: &Geometry) -> NewTables {
        let zeroed = self.zeroed(geometry);
        let per_table = geometry.l2_entries();
        let first = cut.clusters / per_table;
        let end = if !zeroed.is_empty() {
            zeroed.end.div_ceil(per_table)
        } else if cut.goes || (self.compacts && cut.table.is_some()) {
            first + 1
        } else {
            first
        };
        NewTables { geometry: *geometry, indices: first..end, zeroed, stays: cut.stays.clone(), offset: 0 }
    }
}

/// Where the active disk is cut. The part before the cut stays.
#[derive(Default)]
pub(super) struct Cut {
    /// Clusters of the disk that stay.
    clusters: u64,
    /// The offset in bytes, within its L2 table, of the entry of the first cluster removed; 0 if that entry is the
    /// first.
    in_table: u64,
    /// The cluster of that table, if it exists.
    pub table: Option<u64>,
    /// The part of that table that stays.
    stays: Vec<u8>,
    /// True if the other part is not empty.
    goes: bool,
}

impl Cut {
    /// The number of L2 tables before the cut, including the one across it.
    pub fn tables(&self, geometry: &Geometry) -> u64 {
        self.clusters.div_ceil(geometry.l2_entries())
    }

    /// Finds the table across the cut. The last of the L1 entries before the cut names it.
    pub fn find_table(&mut self, l1: &[u64], geometry: &Geometry) {
        let last = self.tables(geometry).checked_sub(1).filter(|_| self.in_table > 0);
        let raw = last.and_then(|last| l1.get(last as usize).copied()).unwrap_or(0);
        self.table = match L1Entry::decode(raw, geometry) {
            Ok(L1Entry::Table { offset, .. }) => Some(geometry.host_cluster(offset).0),
            _ => None,
        };
    }

    /// Splits a piece of an L2 table of the active disk into the parts that stay and go. The piece lies at `offset` and
    /// begins `within` bytes into its table.
    pub fn split<'b>(
        &mut self,
        geometry: &Geometry,
        offset: HostOffset,
        within: u64,
        bytes: &'b [u8],
    ) -> (&'b [u8], &'b [u8]) {
        if self.table.is_none_or(|table| geometry.host_offset(HostCluster(table)).0 != offset.0 - within) {
            return (bytes, &[]);
        }
        let staying = self.in_table.saturating_sub(within).min(bytes.len() as u64);
        let (stays, goes) = bytes.split_at(staying as usize);
        self.stays.extend_from_slice(rules::kept_entries(bytes, stays));
        self.goes |= goes.iter().any(|byte| *byte != 0);
        (stays, goes)
    }
}

/// L2 tables that are written one after another without gaps.
#[derive(Debug)]
pub(super) struct NewTables {
    geometry: Geometry,
    /// The indices in the L1 table of the tables still to be written.
    pub indices: Range<u64>,
    /// The guest clusters that get a zero entry.
    zeroed: Range<u64>,
    /// The first bytes of the first table.
    stays: Vec<u8>,
    /// The offset of the next table.
    pub offset: u64,
}

impl NewTables {
    /// The length in bytes of all tables still to be written.
    pub fn length(&self) -> u64 {
        (self.indices.end - self.indices.start) << self.geometry.cluster_bits
    }

    /// The next tables to be written at once: their offset and their bytes.
    pub fn next_piece(&mut self) -> Option<(u64, Vec<u8>)> {
        let (size, per_table) = (self.geometry.cluster_size(), self.geometry.l2_entries());
        let count = (READ_MAX / size).max(1).min(self.indices.end - self.indices.start);
        if count == 0 {
            return None;
        }
        let first = self.indices.start * per_table;
        let mut bytes = std::mem::take(&mut self.stays);
        bytes.resize((count * size) as usize, 0);
        for cluster in self.zeroed.start.max(first)..self.zeroed.end.min(first + count * per_table) {
            let zero = L2Entry::Zero.encode(&self.geometry);
            zero.store(&mut bytes, (cluster - first) as usize, &self.geometry);
        }
        let at = self.offset;
        self.indices.start += count;
        self.offset += count * size;
        Some((at, bytes))
    }
}
