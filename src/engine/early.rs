//! Links that go to the disk together with the data that they name, so that the flush which is expected next finds nothing
//! to write: docs/durability.md, "A link beside its data".
//!
//! Owns when that is done. At most one such link is on its way at a time, and no cut meanwhile.

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

/// Cuts with one allocation each, after which the next is expected to be such a cut, too. If that is wrong, a table slice
/// is written once more than needed, and a flush waits for the data of a cluster that it need not wait for.
const LONE_CUTS: u8 = 2;

/// How the link of an allocation gets to the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Early {
    /// With the next cut.
    No,
    /// Beside the data, if that is safe when it is written.
    Wanted,
    /// It is on its way, or there.
    Begun,
}

/// What tells whether a flush follows an allocation at once, and whether a link is on its way on that chance.
#[derive(Default)]
pub(crate) struct EarlyLinks {
    /// Allocations that were published since the last cut.
    allocations: u32,
    /// Cuts with one allocation each, since the last one with more.
    lone_cuts: u8,
    /// A link was written beside its data, and no cut since is durable.
    unsynced: bool,
    /// A link is on its way to the disk.
    running: bool,
}

impl EarlyLinks {
    /// How an allocation that is made now is to be linked.
    pub fn of_next(&self) -> Early {
        if self.allocations == 0 && self.lone_cuts >= LONE_CUTS { Early::Wanted } else { Early::No }
    }

    /// An allocation that was linked so is published.
    pub fn allocated(&mut self, linked: Early) {
        self.allocations = self.allocations.saturating_add(1);
        self.unsynced |= linked == Early::Begun;
    }

    /// A cut is taken, of something that is dirty or of nothing.
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

    /// About how many bytes of tables with such links are not known to be durable.
    pub fn unsynced_bytes(&self) -> usize {
        if self.unsynced { TABLE_SLICE_BYTES_MAX as usize } else { 0 }
    }

    /// A link is on its way: no cut may be taken.
    pub fn is_running(&self) -> bool {
        self.running
    }
}

impl State {
    /// The table slice with the link of an allocation whose data is about to be written, if it is worth while and safe to
    /// write it at the same time. Then the allocation is committed, or given up, after that write has ended, and nothing
    /// else is waited for until then: a flush may wait for that.
    pub fn link_early(&mut self, map: &ChainMap, new: &mut Allocation) -> Option<TableWrite> {
        if !self.may_link_early(map, new) {
            return None;
        }
        let offset = self.place_on_disk(new.place.table).ok()?;
        let (place, _, entry) = self.link(new, 0);
        let mut bytes = self.tables.bytes(place.table).to_vec();
        let top = self.top_qcow2();
        top.encode_entry(entry).store(&mut bytes, place.index, &top.geometry);
        // The slice stays as long as the allocation has it pinned.
        self.write.as_mut().expect("a plan was made").flush.early.running = true;
        new.early = Early::Begun;
        Some(TableWrite { offset, bytes })
    }

    fn may_link_early(&self, map: &ChainMap, new: &Allocation) -> bool {
        let Some(write) = &self.write else { return false };
        let busy = write.flush.is_busy() && !active(Mutation::EarlyLinkBesideCut);
        let dirty = self.has_dirt() && !active(Mutation::EarlyLinkBeforeCounts);
        // Another was made since it was planned.
        let first = write.flush.early.of_next() == Early::Wanted;
        first && !busy && !dirty && new.clusters == 1 && self.may_precede_data(map, new, new.cluster)
    }

    /// The link of a cluster of an allocation may be durable before its data: the guest finds what it would have found
    /// without the write, zeros.
    pub(crate) fn may_precede_data(&self, map: &ChainMap, new: &Allocation, guest: GuestCluster) -> bool {
        let was_zero = map.lookup(guest) == Word::ZERO || active(Mutation::LinksForgetBacking);
        new.known_zero && !new.reuse && was_zero
    }

    /// A cluster of an allocation: the place of its entry, the cluster, and its entry once the data is there.
    pub(crate) fn link(&self, new: &Allocation, at: u64) -> (EntryPlace, GuestCluster, L2Entry) {
        let place = EntryPlace { index: new.place.index + at as usize, ..new.place };
        let guest = GuestCluster(new.cluster.0 + at);
        let offset = self.top_qcow2().geometry.host_offset(HostCluster(new.host.0 + at));
        (place, guest, self.written_entry(place, guest, new, at, offset))
    }

    /// The write of an allocation's link, if there was one, has ended.
    pub fn end_early_link(&mut self, new: &Allocation, wakes: &mut WakeList) {
        if new.early == Early::Begun {
            let flush = &mut self.write.as_mut().expect("a plan was made").flush;
            flush.early.running = false;
            wakes.append(flush.take_waiters());
        }
    }

    /// The same, but what the disk has of it is not, or may not be, what the entry will say: the slice is written anew, and
    /// in order.
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
