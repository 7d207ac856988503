//! The layers of a chain as the engine sees them: the top image at 0, then each backing file.
//!
//! A layer's place in the chain changes when an overlay is put on top. What must keep its meaning (the names of cached
//! table slices) names the layer by its file, whose number never changes.
//!
//! Owns the L1 tables and the locations of L2 slices. The L1 tables are in memory, without their zeros; the format
//! limits each to 32 MiB.

use qcow2::{Geometry, GuestCluster, HostOffset, L1Entry, L2Entry, RawL2Entry};

use crate::bounds::TABLE_SLICE_BYTES_MAX;
use crate::entries::Entries;
use crate::error::{EngineError, Structure};
use crate::tables::TableId;
use crate::word::FileIndex;

/// A layer of a chain.
pub struct LayerSpec {
    /// The file that holds it.
    pub file: FileIndex,
    /// The format of the file.
    pub format: LayerFormat,
}

impl LayerSpec {
    /// The file that holds the layer's data.
    pub fn data_file(&self) -> FileIndex {
        match &self.format {
            LayerFormat::Qcow2 { data_file: Some(file), .. } => *file,
            _ => self.file,
        }
    }
}

/// The format of a layer.
pub enum LayerFormat {
    /// A raw image of this many bytes (a multiple of 512).
    Raw {
        /// Bytes.
        size: u64,
    },
    /// A qcow2 image.
    Qcow2 {
        /// Its geometry.
        geometry: Geometry,
        /// Its active L1 table: entries as on disk, at least as many as the size needs.
        l1: Entries,
        /// The external data file, if it has one.
        data_file: Option<FileIndex>,
    },
}

pub(crate) enum Layer {
    Raw { file: FileIndex, size: u64 },
    Qcow2(Qcow2Layer),
}

pub(crate) struct Qcow2Layer {
    /// Its place in the chain: 0 is the top image.
    pub number: u16,
    pub file: FileIndex,
    pub geometry: Geometry,
    pub l1: Entries,
    /// The external data file, if it has one.
    pub data_file: Option<FileIndex>,
}

impl Layer {
    pub fn new(number: usize, spec: LayerSpec) -> Self {
        match spec.format {
            LayerFormat::Raw { size } => Layer::Raw { file: spec.file, size },
            LayerFormat::Qcow2 { geometry, l1, data_file } => {
                let (number, file) = (number as u16, spec.file);
                Layer::Qcow2(Qcow2Layer { number, file, geometry, l1, data_file })
            }
        }
    }

    /// An overlay was put on top of the chain.
    pub fn move_down(&mut self) {
        if let Layer::Qcow2(layer) = self {
            layer.number += 1;
        }
    }

    /// The file that holds it.
    pub fn file(&self) -> FileIndex {
        match self {
            Layer::Raw { file, .. } => *file,
            Layer::Qcow2(layer) => layer.file,
        }
    }

    /// Virtual size in bytes.
    pub fn size(&self) -> u64 {
        match self {
            Layer::Raw { size, .. } => *size,
            Layer::Qcow2(layer) => layer.geometry.size,
        }
    }
}

/// An L2 entry's place: its slice and its index there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct EntryPlace {
    pub table: TableId,
    pub index: usize,
}

impl Qcow2Layer {
    /// The file that holds the data.
    pub fn data(&self) -> FileIndex {
        self.data_file.unwrap_or(self.file)
    }

    /// Encodes an L2 entry of this image for the file.
    pub fn encode_entry(&self, entry: L2Entry) -> RawL2Entry {
        match self.data_file {
            Some(_) => entry.encode_external(&self.geometry),
            None => entry.encode(&self.geometry),
        }
    }

    /// Decodes an L2 entry of this image.
    pub fn decode_entry(&self, raw: RawL2Entry, cluster: GuestCluster) -> Result<L2Entry, EngineError> {
        let entry = match self.data_file {
            Some(_) => L2Entry::decode_external(raw, &self.geometry, cluster),
            None => L2Entry::decode(raw, &self.geometry),
        };
        entry.map_err(|source| EngineError::BadEntry {
            layer: usize::from(self.number),
            structure: Structure::L2,
            index: cluster.0,
            source,
        })
    }

    /// Bytes of a cached slice of this image's tables.
    pub fn slice_bytes(&self) -> u64 {
        self.geometry.cluster_size().min(TABLE_SLICE_BYTES_MAX)
    }

    /// L2 entries in a cached slice.
    pub fn slice_entries(&self) -> u64 {
        self.slice_bytes() / self.geometry.l2_entry_size()
    }

    /// Slices in an L2 table.
    pub fn slices_per_table(&self) -> u32 {
        (self.geometry.cluster_size() / self.slice_bytes()) as u32
    }

    /// The L1 entry that covers a guest cluster.
    pub fn l1_entry(&self, index: u64) -> Result<L1Entry, EngineError> {
        L1Entry::decode(self.l1.get(index), &self.geometry).map_err(|source| EngineError::BadEntry {
            layer: usize::from(self.number),
            structure: Structure::L1,
            index,
            source,
        })
    }

    /// The slice that holds a guest cluster's L2 entry, whether or not the table exists.
    pub fn entry_place(&self, cluster: GuestCluster) -> EntryPlace {
        let in_table = self.geometry.l2_index(cluster);
        let table = self.geometry.l1_index(cluster);
        let slice = (in_table / self.slice_entries()) as u32;
        EntryPlace {
            table: TableId::L2 { layer: self.file, table, slice },
            index: (in_table % self.slice_entries()) as usize,
        }
    }

    /// Where a slice lies, given its table's offset.
    pub fn slice_offset(&self, table: HostOffset, slice: u32) -> HostOffset {
        HostOffset(table.0 + u64::from(slice) * self.slice_bytes())
    }
}
