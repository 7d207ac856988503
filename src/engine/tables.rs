//! The cache of table slices: pieces of L2 tables (of every layer) and of refblocks, as they are on disk or will be.
//!
//! Owns which slices are resident, loading, pinned, dirty or being written. A dirty, pinned or fresh slice is never
//! evicted; eviction never writes. Slices are named by their place in the format, not by their host offset, so a table
//! that moves keeps its name.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::task::Waker;

use slab::Slab;

use crate::bounds::{SWEEP_STEPS, TABLE_SLICE_BYTES_MAX};
use crate::hashed::HashMap;
use crate::waiters::{Waiters, WakeList};
use crate::word::FileIndex;

/// Passes of the clock that a loaded slice survives before its first use. The plan that requested the load will use it,
/// unless another of the plan's loads failed.
const GRACE: u8 = 8;

/// Names a slice of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum TableId {
    /// A slice of an L2 table.
    L2 {
        /// The layer, by its file.
        layer: FileIndex,
        /// Index of the table in the L1 table.
        table: u64,
        /// Slice number in the table.
        slice: u32,
    },
    /// A slice of a refblock of the top image.
    Refblock {
        /// Index of the block in the refcount table.
        block: u64,
        /// Slice number in the block.
        slice: u32,
    },
}

/// Whether a slice differs from the disk, and how it must be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Dirt {
    Clean,
    /// A slice of a table that the durable image links already.
    Existing,
    /// A slice of a table that nothing durable links yet.
    New,
}

pub(crate) struct Table {
    pub bytes: Box<[u8]>,
    dirt: Dirt,
    /// A copy of it is being written to the disk.
    writing: bool,
    pins: u32,
    /// Passes of the clock that it still survives without a first use.
    fresh: u8,
    /// Used since the last pass of the clock.
    referenced: bool,
    /// It was read as zeros, so the file may have a hole there.
    hole: bool,
}

impl Table {
    /// True if no plan and no cut needs it.
    fn is_idle(&self) -> bool {
        self.pins == 0 && !self.writing && self.dirt == Dirt::Clean
    }
}

enum Slot {
    Loading(Waiters),
    Ready(Table),
}

/// The slots of all slices that are resident or loading, by name.
#[derive(Default)]
struct Slots {
    slots: Slab<(TableId, Slot)>,
    by_id: HashMap<TableId, usize>,
    /// The slot found last. A change of an entry looks its slice up several times.
    last: Cell<usize>,
}

impl Slots {
    #[inline]
    fn find(&self, id: TableId) -> Option<usize> {
        let last = self.last.get();
        match self.slots.get(last) {
            Some((held, _)) if *held == id => Some(last),
            _ => self.find_by_id(id),
        }
    }

    fn find_by_id(&self, id: TableId) -> Option<usize> {
        let found = *self.by_id.get(&id)?;
        self.last.set(found);
        Some(found)
    }

    #[inline]
    fn get(&self, id: TableId) -> Option<&Slot> {
        self.find(id).map(|at| &self.slots[at].1)
    }

    #[inline]
    fn get_mut(&mut self, id: TableId) -> Option<&mut Slot> {
        self.find(id).map(|at| &mut self.slots[at].1)
    }

    /// A slice that is resident.
    #[inline]
    fn ready(&mut self, id: TableId) -> &mut Table {
        match self.get_mut(id) {
            Some(Slot::Ready(table)) => table,
            _ => panic!("{id:?} is not resident"),
        }
    }

    /// Adds the slot of a slice that had none.
    fn insert(&mut self, id: TableId, slot: Slot) {
        let before = self.by_id.insert(id, self.slots.insert((id, slot)));
        assert!(before.is_none(), "{id:?} is resident or loading already");
    }

    fn remove(&mut self, id: TableId) -> Option<Slot> {
        Some(self.slots.remove(self.by_id.remove(&id)?).1)
    }
}

/// The result of a lookup.
pub(crate) enum Found<'a> {
    Ready(&'a [u8]),
    Loading,
    Missing,
}

pub(crate) struct Tables {
    slots: Slots,
    /// Ready slices in clock order.
    ring: Vec<TableId>,
    hand: usize,
    resident_bytes: usize,
    capacity_bytes: usize,
    dirty: BTreeSet<TableId>,
}

impl Tables {
    pub fn new(capacity_bytes: usize) -> Self {
        Tables {
            slots: Slots::default(),
            ring: Vec::new(),
            hand: 0,
            resident_bytes: 0,
            capacity_bytes,
            dirty: BTreeSet::new(),
        }
    }

    pub fn find(&mut self, id: TableId) -> Found<'_> {
        match self.slots.get_mut(id) {
            Some(Slot::Ready(table)) => {
                table.referenced = true;
                table.fresh = 0;
                Found::Ready(&table.bytes)
            }
            Some(Slot::Loading(_)) => Found::Loading,
            None => Found::Missing,
        }
    }

    /// The bytes of a slice, if it is resident. This does not count as a use.
    pub fn peek(&self, id: TableId) -> Option<&[u8]> {
        match self.slots.get(id) {
            Some(Slot::Ready(table)) => Some(&table.bytes),
            _ => None,
        }
    }

    /// The bytes of a slice that is known to be resident (pinned, or just found).
    pub fn bytes(&self, id: TableId) -> &[u8] {
        match self.slots.get(id) {
            Some(Slot::Ready(table)) => &table.bytes,
            _ => panic!("{id:?} is not resident"),
        }
    }

    /// A resident slice to be changed; marks it dirty. A slice of a new table stays new.
    pub fn change(&mut self, id: TableId) -> &mut [u8] {
        let table = self.slots.ready(id);
        if table.dirt == Dirt::Clean {
            table.dirt = Dirt::Existing;
            self.dirty.insert(id);
        }
        &mut table.bytes
    }

    /// True if a resident slice may be a hole in the file.
    pub fn is_hole(&self, id: TableId) -> bool {
        matches!(self.slots.get(id), Some(Slot::Ready(table)) if table.hole)
    }

    /// The host has allocated a slice. The cache may have evicted it meanwhile.
    pub fn note_allocated(&mut self, id: TableId) {
        if let Some(Slot::Ready(table)) = self.slots.get_mut(id) {
            table.hole = false;
        }
    }

    /// Marks a resident slice as dirty, to be written as `dirt` requires (never `Clean`).
    pub fn mark(&mut self, id: TableId, dirt: Dirt) {
        let table = self.slots.ready(id);
        table.dirt = dirt;
        self.dirty.insert(id);
    }

    /// Notes that a load of this slice begins.
    pub fn begin_load(&mut self, id: TableId) {
        self.slots.insert(id, Slot::Loading(Waiters::default()));
    }

    /// Waits for a load in progress.
    pub fn wait_load(&mut self, id: TableId, waker: &Waker) {
        if let Some(Slot::Loading(waiters)) = self.slots.get_mut(id) {
            waiters.add(waker);
        }
    }

    /// Wakes all that wait for a load.
    pub fn wake_all(&mut self, wakes: &mut WakeList) {
        for (_, (_, slot)) in &mut self.slots.slots {
            if let Slot::Loading(waiters) = slot {
                wakes.append(waiters.take());
            }
        }
    }

    /// Ends a load; `bytes` is `None` if it failed. A slice loaded ahead has no grace. `of_top`: it is a table of the top
    /// image, which may change.
    pub fn end_load(
        &mut self,
        id: TableId,
        bytes: Option<Box<[u8]>>,
        (ahead, of_top): (bool, bool),
        wakes: &mut WakeList,
    ) {
        match self.slots.remove(id) {
            Some(Slot::Loading(mut waiters)) => wakes.append(waiters.take()),
            _ => panic!("{id:?} was not loading"),
        }
        if let Some(bytes) = bytes {
            let hole = of_top && bytes.iter().all(|byte| *byte == 0);
            self.add(id, bytes, Dirt::Clean, if ahead { 0 } else { GRACE });
            self.slots.ready(id).hole = hole;
        }
    }

    /// Adds a slice created in memory.
    pub fn insert(&mut self, id: TableId, bytes: Box<[u8]>, dirt: Dirt) {
        self.add(id, bytes, dirt, GRACE);
    }

    fn add(&mut self, id: TableId, bytes: Box<[u8]>, dirt: Dirt, fresh: u8) {
        self.make_room(bytes.len());
        self.resident_bytes += bytes.len();
        self.ring.push(id);
        if dirt != Dirt::Clean {
            self.dirty.insert(id);
        }
        let table = Table { bytes, dirt, writing: false, pins: 0, fresh, referenced: true, hole: false };
        self.slots.insert(id, Slot::Ready(table));
    }

    pub fn pin(&mut self, id: TableId) {
        self.slots.ready(id).pins += 1;
    }

    pub fn unpin(&mut self, id: TableId) {
        self.slots.ready(id).pins -= 1;
    }

    /// The dirty slices, in the order in which [`Tables::cut`] takes them.
    pub fn dirty_ids(&self) -> Vec<TableId> {
        self.dirty.iter().copied().collect()
    }

    /// About how many bytes are dirty (as if each slice had the full length).
    pub fn dirty_bytes(&self) -> usize {
        self.dirty.len() * TABLE_SLICE_BYTES_MAX as usize
    }

    /// Takes all dirty slices into a cut: from now on they are clean and being written.
    pub fn cut(&mut self) -> Vec<(TableId, Dirt, Box<[u8]>)> {
        let dirty = std::mem::take(&mut self.dirty);
        let mut taken = Vec::with_capacity(dirty.len());
        for id in dirty {
            let table = self.slots.ready(id);
            taken.push((id, table.dirt, table.bytes.clone()));
            table.dirt = Dirt::Clean;
            table.writing = true;
        }
        taken
    }

    /// A resident slice for a change that the disk has already: it does not become dirty.
    pub fn change_as_written(&mut self, id: TableId) -> &mut [u8] {
        &mut self.slots.ready(id).bytes
    }

    /// The copy of a slice that a cut took is on disk.
    pub fn note_written(&mut self, id: TableId) {
        self.slots.ready(id).writing = false;
    }

    /// The copy of a slice that a cut took could not be written: the slice is dirty again, as `dirt`.
    pub fn note_not_written(&mut self, id: TableId, dirt: Dirt) {
        self.slots.ready(id).writing = false;
        self.mark(id, dirt);
    }

    /// Removes all slices of refblocks: those that come later are of another image. None is dirty or in use.
    pub fn forget_refblocks(&mut self) {
        let mut kept = Vec::with_capacity(self.ring.len());
        for id in std::mem::take(&mut self.ring) {
            if matches!(id, TableId::L2 { .. }) {
                kept.push(id);
                continue;
            }
            let table = self.slots.ready(id);
            assert!(table.is_idle(), "{id:?} is in use");
            self.resident_bytes -= table.bytes.len();
            self.slots.remove(id);
        }
        (self.ring, self.hand) = (kept, 0);
    }

    /// The most bytes of clean slices from now on, if that is more than before.
    pub fn raise_capacity(&mut self, bytes: usize) {
        self.capacity_bytes = self.capacity_bytes.max(bytes);
    }

    /// Evicts by clock until `bytes` more fit. It visits a bounded number of slices. If most must stay, the cache
    /// exceeds its capacity for a while, and the next insertions continue from there.
    fn make_room(&mut self, bytes: usize) {
        let mut steps = SWEEP_STEPS.min(2 * self.ring.len());
        while self.resident_bytes + bytes > self.capacity_bytes && steps > 0 {
            steps -= 1;
            if self.hand >= self.ring.len() {
                self.hand = 0;
            }
            let id = self.ring[self.hand];
            let table = self.slots.ready(id);
            let stays = table.fresh > 0 || !table.is_idle();
            table.fresh = table.fresh.saturating_sub(1);
            if stays || std::mem::take(&mut table.referenced) {
                self.hand += 1;
                continue;
            }
            self.resident_bytes -= table.bytes.len();
            self.slots.remove(id);
            self.ring.swap_remove(self.hand);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(table: u64) -> TableId {
        TableId::L2 { layer: FileIndex(0), table, slice: 0 }
    }

    fn load(tables: &mut Tables, table: u64) {
        tables.begin_load(id(table));
        let mut wakes = WakeList::default();
        tables.end_load(id(table), Some(vec![table as u8; 4096].into()), (false, true), &mut wakes);
        wakes.wake();
    }

    fn resident(tables: &Tables, table: u64) -> bool {
        tables.slots.get(id(table)).is_some()
    }

    #[test]
    fn eviction_spares_slices_that_are_fresh_pinned_dirty_or_being_written() {
        let mut tables = Tables::new(4 * 4096);
        for n in 0..4 {
            load(&mut tables, n);
        }
        assert!(matches!(tables.find(id(0)), Found::Ready(_)));
        tables.pin(id(0));
        assert!(matches!(tables.find(id(1)), Found::Ready(_)));
        tables.change(id(1))[0] = 9;
        assert!(matches!(tables.find(id(2)), Found::Ready(_)));
        // 3 is fresh: no lookup has used it yet.
        for n in 10..16 {
            load(&mut tables, n);
            assert!(matches!(tables.find(id(n)), Found::Ready(_)));
        }
        assert!(resident(&tables, 0) && resident(&tables, 1) && resident(&tables, 3));
        assert!(!resident(&tables, 2));
        let cut = tables.cut();
        assert_eq!(cut.len(), 1);
        assert_eq!((cut[0].0, cut[0].1, cut[0].2[0]), (id(1), Dirt::Existing, 9));
        for n in 20..30 {
            load(&mut tables, n);
            assert!(matches!(tables.find(id(n)), Found::Ready(_)));
        }
        assert!(resident(&tables, 1), "being written");
        tables.note_written(id(1));
        tables.unpin(id(0));
        for n in 30..40 {
            load(&mut tables, n);
            assert!(matches!(tables.find(id(n)), Found::Ready(_)));
        }
        assert!(!resident(&tables, 0) && !resident(&tables, 1));
        assert!(tables.resident_bytes <= 4 * 4096);
    }
}
