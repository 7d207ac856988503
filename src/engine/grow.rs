//! Makes a disk larger while it is in use: gives the tables and the map of the engine the new size.
//!
//! Owns how far the L1 table may become longer where it lies. The caller makes metadata durable before the header
//! names the new size, and zeroes the new part. The order is in docs/durability.md, "A disk that grows while it is
//! in use".

use qcow2::{Geometry, HostOffset, HostRange};

use crate::Engine;
use crate::epoch::Epoch;
use crate::error::EngineError;
use crate::flush::l1_block_of;
use crate::layers::Layer;
use crate::state::State;
use crate::sync::Ordering;

/// What a larger disk needs. Have the host allocate the piece of the L1 table, then commit.
#[derive(Debug, PartialEq, Eq)]
#[must_use]
pub struct GrowthPlan {
    /// The new size in bytes.
    size: u64,
    /// The entries that the L1 table will have; none in a raw image.
    l1_entries: u64,
    /// The part of the L1 table that a cut will write anew.
    pub table: Option<HostRange>,
}

impl State {
    fn plan_growth_to(&self, size: u64) -> Result<GrowthPlan, EngineError> {
        let Some(top) = self.top() else { return Ok(GrowthPlan { size, l1_entries: 0, table: None }) };
        let write = self.write.as_ref().ok_or(EngineError::ReadOnly)?;
        let needed = Geometry { size, ..top.geometry }.l1_entries();
        let held = top.l1.len();
        if needed <= held {
            return Ok(GrowthPlan { size, l1_entries: held, table: None });
        }
        // The clusters of the table are its own as far as they go. Their bytes past its end mean nothing.
        let room = top.geometry.clusters_for(held * 8) * top.geometry.cluster_size() / 8;
        if needed > room {
            return Err(EngineError::L1TableFull { entries: needed, room });
        }
        let (first, last) = (l1_block_of(&top.geometry, held), l1_block_of(&top.geometry, needed - 1));
        let length = self.l1_block_place(first).length;
        let offset = HostOffset(write.l1_offset.0 + first * length);
        let table = Some(HostRange { offset, length: (last - first + 1) * length });
        Ok(GrowthPlan { size, l1_entries: needed, table })
    }
}

impl Engine {
    /// Plans to make the disk larger than [`Engine::size`], in bytes, a multiple of 512.
    ///
    /// # Errors
    /// [`EngineError::L1TableFull`]: the L1 table would have to move. A read-only qcow2 image; the disk has failed.
    pub fn plan_growth(&self, size: u64) -> Result<GrowthPlan, EngineError> {
        self.ensure_healthy()?;
        self.with(|state, _| state.plan_growth_to(size))
    }

    /// The tables, the map and [`Engine::size`] reach to the new end.
    pub fn commit_growth(&self, plan: &GrowthPlan) {
        self.with(|state, _| {
            match &mut state.layers[0] {
                Layer::Raw { size, .. } => *size = plan.size,
                Layer::Qcow2(top) => {
                    let held = top.l1.len();
                    if plan.table.is_some() {
                        let blocks = l1_block_of(&top.geometry, held)
                            ..=l1_block_of(&top.geometry, plan.l1_entries - 1);
                        let write = state.write.as_mut().expect("a plan was made");
                        write.l1_dirty.extend(blocks);
                    }
                    top.l1.grow(plan.l1_entries);
                    top.geometry.size = plan.size;
                }
            }
            // Unfinished fills may end at the old end.
            state.fills.clear();
            state.map_writer.grow(&self.map, plan.size.div_ceil(self.unit()));
            // Release: see `Engine::size`.
            self.size.store(plan.size, Ordering::Release);
        });
    }

    /// The disk ends here from now on, in bytes, at most at [`Engine::size`]. Writes that are planned later write nothing
    /// past this end to an external data file.
    pub fn set_end(&self, end: u64) {
        self.with(|state, _| {
            if let Some(write) = &mut state.write {
                write.end = end;
            }
        });
    }

    /// Ends the present epoch. Requests that begin later see everything that was changed before this call.
    pub fn end_epoch(&self) -> Epoch {
        self.epochs.advance()
    }

    /// True if all requests that began in this epoch or before have ended.
    pub fn have_ended(&self, epoch: Epoch) -> bool {
        self.epochs.passed(epoch)
    }

    /// The L1 table's entries and its offset, for the header; none in a raw or read-only image.
    pub fn l1_table(&self) -> Option<(u32, HostOffset)> {
        self.with(|state, _| {
            let write = state.write.as_ref()?;
            Some((state.top()?.l1.len() as u32, write.l1_offset))
        })
    }
}
