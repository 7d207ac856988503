//! Predicts when an early commit pays: whether a flush will follow the next allocation at once.
//!
//! Owns the record of the early commit that is under way. early_commit.rs makes it.

use crate::bounds::TABLE_SLICE_BYTES_MAX;

/// After this many cuts with one allocation each, the next is expected to be such a cut, too. If that is wrong, a table
/// slice is written once more than needed, and a flush waits without need for the data of a cluster.
const LONE_CUTS: u8 = 2;

/// When the link of an allocation is written to the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Early {
    /// With the next cut.
    No,
    /// Together with the data, if that is safe when the data is written.
    Wanted,
    /// The early commit has begun, or has ended.
    Begun,
}

/// Predicts whether a flush follows the next allocation at once, and records whether an early commit is under way.
#[derive(Default)]
pub(crate) struct EarlyLinks {
    /// Allocations that were published since the last cut.
    allocations: u32,
    /// Cuts with one allocation each, since the last one with more.
    lone_cuts: u8,
    /// There was an early commit, and no cut since then is durable.
    unsynced: bool,
    /// An early commit is under way.
    running: bool,
}

impl EarlyLinks {
    /// How to link an allocation that is planned now.
    pub fn of_next(&self) -> Early {
        if self.allocations == 0 && self.lone_cuts >= LONE_CUTS { Early::Wanted } else { Early::No }
    }

    /// An allocation is published; `linked` says how it was linked.
    pub fn note_allocation(&mut self, linked: Early) {
        self.allocations = self.allocations.saturating_add(1);
        self.unsynced |= linked == Early::Begun;
    }

    /// A cut is taken; `dirty` says whether it has anything to write.
    pub fn note_cut(&mut self, dirty: bool) {
        let in_vain = self.unsynced && dirty;
        self.lone_cuts = match std::mem::take(&mut self.allocations) {
            0 => self.lone_cuts,
            1 if !in_vain => self.lone_cuts.saturating_add(1),
            _ => 0,
        };
    }

    /// A cut is durable.
    pub fn note_sync(&mut self) {
        self.unsynced = false;
    }

    /// Roughly the bytes of tables from early commits that may not be durable.
    pub fn unsynced_bytes(&self) -> usize {
        if self.unsynced { TABLE_SLICE_BYTES_MAX as usize } else { 0 }
    }

    /// An early commit is under way: no cut may be taken.
    pub fn is_running(&self) -> bool {
        self.running
    }

    /// An early commit begins.
    pub fn begin(&mut self) {
        self.running = true;
    }

    /// The early commit has ended.
    pub fn end(&mut self) {
        self.running = false;
    }
}
