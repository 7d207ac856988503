//! Early commits: links written together with the data that they name, so that the flush that is expected next finds
//! nothing to write. See docs/durability.md, "A link beside its data".
//!
//! Decides when to do so. At most one such link is being written at a time, and no cut meanwhile.

use qcow2::{GuestCluster, HostCluster, L2Entry};

use crate::bounds::TABLE_SLICE_BYTES_MAX;
use crate::flush::TableWrite;
use crate::layers::EntryPlace;
use crate::map::ChainMap;
use crate::mutation::{Mutation, active};
use crate::state::State;
use crate::waiters::WakeList;
use crate::word::Word;
use crate::write::Allocation;

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
    pub fn allocated(&mut self, linked: Early) {
        self.allocations = self.allocations.saturating_add(1);
        self.unsynced |= linked == Early::Begun;
    }

    /// A cut is taken; `dirty` says whether it has anything to write.
    pub fn cut(&mut self, dirty: bool) {
        let in_vain = self.unsynced && dirty;
        self.lone_cuts = match std::mem::take(&mut self.allocations) {
            0 => self.lone_cuts,
            1 if !in_vain => self.lone_cuts.saturating_add(1),
            _ => 0,
        };
    }

    /// A cut is durable.
    pub fn synced(&mut self) {
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
}

impl State {
    /// The table slice with the link of an allocation whose data is about to be written, if writing both at once is
    /// worthwhile and safe. After that write has ended, commit or abort the allocation. Until then wait for nothing
    /// else: a flush waits for the early commit, and so may the other work.
    pub fn link_early(&mut self, map: &ChainMap, new: &mut Allocation) -> Option<TableWrite> {
        if !self.may_link_early(map, new) {
            return None;
        }
        let offset = self.place_on_disk(new.place.table).ok()?;
        let (place, _, entry) = self.link(new, 0);
        let mut bytes = self.tables.bytes(place.table).to_vec();
        let top = self.top_qcow2();
        top.encode_entry(entry).store(&mut bytes, place.index, &top.geometry);
        // The slice stays in the cache: the allocation has it pinned.
        self.write.as_mut().expect("a plan was made").flush.early.running = true;
        new.early = Early::Begun;
        Some(TableWrite { offset, bytes })
    }

    fn may_link_early(&self, map: &ChainMap, new: &Allocation) -> bool {
        let Some(write) = &self.write else { return false };
        let busy = write.flush.is_busy() && !active(Mutation::EarlyLinkBesideCut);
        let dirty = self.has_dirt() && !active(Mutation::EarlyLinkBeforeCounts);
        // False if another allocation was published since this one was planned.
        let first = write.flush.early.of_next() == Early::Wanted;
        first && !busy && !dirty && new.clusters == 1 && self.may_precede_data(map, new, new.cluster)
    }

    /// True if the link of an allocation's cluster may become durable before the data: the guest then reads zeros, as
    /// it would without the write.
    pub(crate) fn may_precede_data(&self, map: &ChainMap, new: &Allocation, guest: GuestCluster) -> bool {
        let was_zero = map.lookup(guest) == Word::ZERO || active(Mutation::LinksForgetBacking);
        new.known_zero && !new.reuse && was_zero
    }

    /// For a cluster of an allocation: the place of its entry, its guest cluster, and its entry once the data is
    /// written.
    pub(crate) fn link(&self, new: &Allocation, at: u64) -> (EntryPlace, GuestCluster, L2Entry) {
        let place = EntryPlace { index: new.place.index + at as usize, ..new.place };
        let guest = GuestCluster(new.cluster.0 + at);
        let offset = self.top_qcow2().geometry.host_offset(HostCluster(new.host.0 + at));
        (place, guest, self.written_entry(place, guest, new, at, offset))
    }

    /// The early commit of an allocation, if there was one, has ended.
    pub fn end_early_link(&mut self, new: &Allocation, wakes: &mut WakeList) {
        if new.early == Early::Begun {
            let flush = &mut self.write.as_mut().expect("a plan was made").flush;
            flush.early.running = false;
            wakes.append(flush.take_waiters());
        }
    }

    /// The same, but the entry on disk differs, or may differ, from the final entry: the slice is written again, with
    /// its links after the data.
    pub fn forget_early_link(&mut self, new: &mut Allocation, wakes: &mut WakeList) {
        if new.early != Early::Begun {
            return;
        }
        self.end_early_link(new, wakes);
        new.early = Early::No;
        if !active(Mutation::EarlyLinkLeft) {
            self.tables.change(new.place.table);
            self.write.as_mut().expect("a plan was made").flush.links_follow_data();
        }
    }
}
