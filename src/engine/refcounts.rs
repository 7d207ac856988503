//! The refcount structure of the top image: the refcount table in memory and the location of each count.
//!
//! Owns the table and the list of its blocks that differ from the disk. The refblocks are slices in the table cache.

use std::collections::BTreeSet;
use std::ops::Range;

use qcow2::{Geometry, HostCluster, HostOffset, HostRange};

use crate::bounds::TABLE_SLICE_BYTES_MAX;
use crate::entries::{Entries, UsedEntry};
use crate::error::{EngineError, Structure};
use crate::tables::TableId;

/// Entries of the refcount table that are written together: 4 KiB, or a cluster if that is smaller.
pub(crate) fn table_block_entries(geometry: &Geometry) -> u64 {
    geometry.cluster_size().min(TABLE_SLICE_BYTES_MAX) / 8
}

/// The most bytes a refcount table may have (qcow2-rules: 8 MiB, QEMU's limit too).
pub(crate) const TABLE_BYTES_MAX: u64 = 8 << 20;

pub(crate) struct Refcounts {
    pub geometry: Geometry,
    /// Entries as on disk; as many as the table's clusters hold.
    pub table: Entries,
    pub table_offset: HostOffset,
    /// Blocks of the table (see [`table_block_entries`]) that differ from the disk.
    pub dirty: BTreeSet<u64>,
    /// The whole table is at a new place that nothing durable names.
    pub table_is_new: bool,
    /// The header on disk does not name `table_offset`.
    pub header_stale: bool,
}

/// The place of one count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CountPlace {
    pub table: TableId,
    pub index: usize,
}

impl Refcounts {
    pub fn new(geometry: Geometry, table: Entries, table_offset: HostOffset) -> Self {
        Refcounts {
            geometry,
            table,
            table_offset,
            dirty: BTreeSet::new(),
            table_is_new: false,
            header_stale: false,
        }
    }

    /// Clusters of the table in memory.
    pub fn table_clusters(&self) -> u64 {
        self.geometry.clusters_for(self.table.len() * 8)
    }

    /// Where a refblock lies; `None` if it does not exist (all its counts are zero).
    pub fn block_offset(&self, block: u64) -> Result<Option<HostOffset>, EngineError> {
        qcow2::refblock_offset(self.table.get(block), &self.geometry).map_err(|source| {
            EngineError::BadEntry { layer: 0, structure: Structure::RefcountTable, index: block, source }
        })
    }

    /// The block that counts a cluster.
    pub fn block_of(&self, cluster: u64) -> u64 {
        cluster / self.geometry.refblock_entries()
    }

    /// Counts in a cached slice of a refblock.
    pub fn slice_entries(&self) -> u64 {
        (self.slice_bytes() * 8) >> self.geometry.refcount_order
    }

    pub fn slice_bytes(&self) -> u64 {
        self.geometry.cluster_size().min(TABLE_SLICE_BYTES_MAX)
    }

    pub fn slices_per_block(&self) -> u32 {
        (self.geometry.cluster_size() / self.slice_bytes()) as u32
    }

    /// Where a cluster's count lies, whether or not its block exists.
    pub fn place(&self, cluster: u64) -> CountPlace {
        let in_block = cluster % self.geometry.refblock_entries();
        let slice = (in_block / self.slice_entries()) as u32;
        CountPlace {
            table: TableId::Refblock { block: self.block_of(cluster), slice },
            index: (in_block % self.slice_entries()) as usize,
        }
    }

    /// The slices of existing blocks that count a run of clusters.
    pub fn slices_of(&self, start: HostCluster, count: u64) -> Result<Vec<TableId>, EngineError> {
        let mut slices = Vec::new();
        let end = start.0 + count;
        let mut cluster = start.0;
        while cluster < end {
            let place = self.place(cluster);
            if self.block_offset(self.block_of(cluster))?.is_some() {
                slices.push(place.table);
            }
            cluster = (cluster / self.slice_entries() + 1) * self.slice_entries();
        }
        Ok(slices)
    }

    /// Names a new block in the table.
    pub fn set_block(&mut self, block: u64, offset: HostOffset) {
        self.table.set(UsedEntry { index: block, raw: offset.0 });
        if !self.table_is_new {
            self.dirty.insert(block / table_block_entries(&self.geometry));
        }
    }

    /// The place of each block of the table that names one of these refblocks (in ascending order).
    pub fn table_places(&self, refblocks: impl Iterator<Item = u64>) -> Vec<HostRange> {
        let entries = table_block_entries(&self.geometry);
        let mut blocks: Vec<u64> = refblocks.map(|refblock| refblock / entries).collect();
        blocks.dedup();
        let bytes = entries * 8;
        let place = |block| HostRange::new(HostOffset(self.table_offset.0 + block * bytes), bytes);
        blocks.into_iter().map(place).collect()
    }

    /// The bytes of a block of the table, for writing.
    pub fn table_block(&self, block: u64) -> (HostOffset, Box<[u8]>) {
        let entries = table_block_entries(&self.geometry);
        let first = block * entries;
        let offset = HostOffset(self.table_offset.0 + first * 8);
        (offset, encode_entries(&self.table, first..first + entries))
    }
}

/// Entries as bytes, zeros past the end of the table.
pub(crate) fn encode_entries(table: &Entries, indices: Range<u64>) -> Box<[u8]> {
    let mut bytes = vec![0; (indices.end - indices.start) as usize * 8];
    for (at, index) in indices.enumerate() {
        qcow2::set_entry(&mut bytes, at, table.get(index));
    }
    bytes.into()
}
