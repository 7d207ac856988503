//! Assembles an engine from the tables that are on disk.
//!
//! Owns the sizes of its caches, and what a writable image needs at open.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use crate::Engine;
use crate::alloc::Allocator;
use crate::bounds::{
    MAP_BYTES_MAX, MAP_FRAMES_MIN, MAP_SLICE_WORDS as SLICE_WORDS, TABLE_SLICE_BYTES_MAX, TABLES_BYTES_MAX,
};
use crate::claims::Claims;
use crate::cut::FlushState;
use crate::entries::Entries;
use crate::epoch::Epochs;
use crate::error::EngineError;
use crate::guard::MetadataGuard;
use crate::hashed::HashMap;
use crate::journal::Journal;
use crate::layers::{Layer, Qcow2Layer};
use crate::map::{ChainMap, MapWriter};
use crate::refcounts::Refcounts;
use crate::spec::{EngineSpec, TopSpec};
use crate::state::{State, WriteState};
use crate::sync::AtomicU64;
use crate::tables::Tables;
use crate::write::EngineLock;

/// The map's unit for a raw top image, in bytes.
const RAW_UNIT: u64 = 65536;
/// Bytes of a map frame.
const FRAME_BYTES: usize = SLICE_WORDS as usize * 8;

impl Engine {
    /// An engine over the tables that are on disk.
    ///
    /// # Errors
    /// A writable top image with pieces of metadata that overlap.
    ///
    /// # Panics
    /// If there are no layers, or a writable qcow2 top image has no [`TopSpec`]: programmer errors.
    pub fn new(spec: EngineSpec) -> Result<Self, EngineError> {
        let top_data = spec.layers.first().expect("a chain has a top").data_file();
        let layers: Vec<Layer> =
            spec.layers.into_iter().enumerate().map(|(n, layer)| Layer::new(n, layer)).collect();
        let top = layers.first().expect("a chain has a top");
        let (unit, granule, size) = match top {
            Layer::Raw { size, .. } => {
                // Larger for a huge image, so that the map's directory stays small.
                let unit = RAW_UNIT.max((size >> 35).next_power_of_two());
                (unit, unit, *size)
            }
            Layer::Qcow2(Qcow2Layer { geometry, .. }) => {
                (geometry.cluster_size(), geometry.granule_size(), geometry.size)
            }
        };
        let clusters = size.div_ceil(unit);
        let slices = usize::try_from(clusters.div_ceil(SLICE_WORDS)).unwrap_or(usize::MAX);
        // A second word for each cluster, if a layer has subclusters and its cluster size is the map's unit.
        let has_subclusters = layers.iter().any(|layer| match layer {
            Layer::Qcow2(Qcow2Layer { geometry, .. }) => {
                geometry.extended_l2 && geometry.cluster_size() == unit
            }
            Layer::Raw { .. } => false,
        });
        let frame_bytes = if has_subclusters { 2 * FRAME_BYTES } else { FRAME_BYTES };
        let map = ChainMap::new(
            clusters,
            unit.trailing_zeros(),
            slices.max(MAP_FRAMES_MIN).min(spec.map_bytes.min(MAP_BYTES_MAX) / frame_bytes),
            has_subclusters,
        );
        // An exact walk needs a slice of each layer at once, a copy of an L2 table the whole table. Several
        // requests may do so together. In a smaller cache they would evict each other's slices for ever.
        let whole_table = match top {
            Layer::Qcow2(layer) => layer.geometry.cluster_size() as usize,
            Layer::Raw { .. } => 0,
        };
        let table_bytes =
            spec.table_bytes.min(TABLES_BYTES_MAX).max(table_bytes_min(layers.len())).max(4 * whole_table);
        let write = match top {
            Layer::Qcow2(layer) if spec.writable => {
                let top = spec.top.expect("a writable qcow2 image comes with its own metadata");
                Some(write_state(layer.geometry, &layer.l1, top)?)
            }
            _ => None,
        };
        let wants_cut = Arc::new(AtomicBool::new(false));
        let state = State {
            wants_cut: Arc::clone(&wants_cut),
            map_writer: MapWriter::new(),
            fills: HashMap::default(),
            tables: Tables::new(table_bytes),
            layers,
            // Dirty slices cannot be evicted: half of the cache remains for clean ones.
            dirty_bytes_max: table_bytes / 2,
            writable: spec.writable,
            write,
        };
        Ok(Engine {
            map,
            top_data,
            unit_bits: unit.trailing_zeros(),
            granule_bits: granule.trailing_zeros(),
            size: AtomicU64::new(size),
            epochs: Epochs::new(spec.workers),
            claims: Claims::default(),
            failed: AtomicBool::new(false),
            wants_cut,
            state: Arc::new(EngineLock::new(state)),
        })
    }
}

/// The least bytes of cached tables, for a chain of so many layers.
pub(crate) fn table_bytes_min(layers: usize) -> usize {
    8 * layers * TABLE_SLICE_BYTES_MAX as usize
}

pub(crate) fn write_state(
    geometry: qcow2::Geometry,
    l1: &Entries,
    top: TopSpec,
) -> Result<WriteState, EngineError> {
    let refcounts = Refcounts::new(geometry, top.refcount_table, top.refcount_table_offset);
    // Refblocks past the end of the file would block its growth: grow from the last of them.
    let last_block = refcounts.table.used().next_back().map_or(0, |block| block.index);
    let guard =
        MetadataGuard::of_image(&geometry, l1, top.l1_offset, &refcounts, &top.bitmaps, top.snapshots)?;
    let in_blocks = last_block * geometry.refblock_entries();
    let end = geometry.clusters_for(top.file_length).max(in_blocks).max(guard.end());
    let mut alloc = Allocator::new(end, &geometry);
    alloc.opened(top.file_length, &geometry, top.may_search_leaks);
    Ok(WriteState {
        refcounts,
        alloc,
        guard,
        flush: FlushState::new(),
        journal: Journal::default(),
        table_jobs: HashMap::default(),
        l1_offset: top.l1_offset,
        l1_dirty: BTreeSet::new(),
        keep_discarded: top.keep_discarded && geometry.version == qcow2::Version::V3,
        end: geometry.size,
    })
}
