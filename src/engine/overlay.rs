//! Puts an overlay on top of the chain of a disk that goes on being used.
//!
//! Owns what changes in memory: which layer is the top, and its metadata. The map stays as it is: an empty overlay
//! changes nothing that a word says, and a word's in-place bit counts only for the file of the present top
//! (docs/concurrency.md, "The gate"). What must be durable before is the caller's part.

use crate::assemble::{table_bytes_min, write_state};
use crate::layers::{Layer, LayerSpec};
use crate::state::{State, WriteState};
use crate::{Engine, EngineError, TopSpec};

impl Engine {
    /// Puts an empty overlay on top of a writable chain: what was the top is a backing image from now on. Everything is
    /// durable, the journal has ended, and no request has the engine: exclusive access shows that.
    ///
    /// # Errors
    /// If the overlay's pieces of metadata overlap. Nothing has changed then.
    ///
    /// # Panics
    /// If the overlay differs from the map's unit, its granule or the size of the disk, or something is not durable:
    /// programmer errors.
    pub fn put_on_top(&mut self, overlay: LayerSpec, top: TopSpec) -> Result<(), EngineError> {
        let data = overlay.data_file();
        let layer = Layer::new(0, overlay);
        let Layer::Qcow2(image) = &layer else { panic!("an overlay is a qcow2 image") };
        let geometry = image.geometry;
        assert_eq!(geometry.cluster_size(), self.unit(), "the overlay has other clusters");
        assert_eq!(geometry.granule_size(), self.granule(), "the overlay has other subclusters");
        assert_eq!(geometry.size, self.size(), "the overlay has another size");
        let write = write_state(geometry, &image.l1, top)?;
        self.with(|state, _| state.put_on_top(layer, write));
        self.top_data = data;
        Ok(())
    }
}

impl State {
    fn put_on_top(&mut self, layer: Layer, write: WriteState) {
        assert!(self.writable && !self.has_dirt(), "the old top is durable");
        // Unfinished fills go on with the layers by their places.
        self.fills.clear();
        self.tables.forget_refblocks();
        for below in &mut self.layers {
            below.move_down();
        }
        self.layers.insert(0, layer);
        self.tables.raise_capacity(table_bytes_min(self.layers.len()));
        self.write = Some(write);
        self.note_wanted_cut();
    }
}
