//! Links that go to the disk together with the data that they name, so that the flush which is expected next finds nothing
//! to write: docs/durability.md, "A link beside its data".
//!
//! Owns when that is done. At most one such link is on its way at a time, and no cut meanwhile.

use qcow2::{GuestCluster, HostCluster, L2Entry};

use crate::flush::TableWrite;
use crate::layers::EntryPlace;
use crate::map::ChainMap;
use crate::mutation::{Mutation, active};
use crate::state::State;
use crate::tables::{SLICE_BYTES_MAX, TableId};
use crate::waiters::WakeList;
use crate::word::Word;
use crate::write::Allocation;

/// Cuts with one allocation each, after which the next is expected to be such a cut, too. If that is wrong, a table slice
/// was written once more than needed.
const LONE_CUTS: u8 = 2;

/// How the links of an allocation get to the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Early {
    /// With the next cut.
    No,
    /// Beside the data, if that is safe when it is written.
    Wanted,
    /// They are on their way, or there; no cut is taken until that has ended.
    Written,
}

/// What tells whether a flush follows an allocation at once, and the link on its way if one was written on that chance.
#[derive(Default)]
pub(crate) struct EarlyLinks {
    /// Allocations that were published since the last cut.
    allocations: u32,
    /// Cuts with one allocation each, since the last one with more.
    lone_cuts: u8,
    /// A link was written beside its data, and no cut since is durable.
    pub unsynced: bool,
    /// The slice that a link on its way to the disk is in.
    running: Option<TableId>,
}

impl EarlyLinks {
    /// An allocation that was linked so is published.
    pub fn allocated(&mut self, linked: Early) {
        self.allocations = self.allocations.saturating_add(1);
        self.unsynced |= linked == Early::Written;
    }

    /// A cut is taken.
    pub fn cut(&mut self) {
        self.lone_cuts = match std::mem::take(&mut self.allocations) {
            0 => self.lone_cuts,
            1 => self.lone_cuts.saturating_add(1),
            _ => 0,
        };
    }

    /// About how many bytes of tables with such links are not known to be durable.
    pub fn unsynced_bytes(&self) -> usize {
        if self.unsynced { SLICE_BYTES_MAX as usize } else { 0 }
    }

    /// A link is on its way: no cut may be taken.
    pub fn is_running(&self) -> bool {
        self.running.is_some()
    }

    /// The next allocation will be followed by a flush, as far as can be seen.
    fn expects_flush(&self) -> bool {
        self.allocations == 0 && self.lone_cuts >= LONE_CUTS
    }

    /// How an allocation that is made now is to be linked.
    pub fn way(&self) -> Early {
        if self.expects_flush() { Early::Wanted } else { Early::No }
    }
}

impl State {
    /// The table slice with the links of an allocation whose data is about to be written, if it is worth while and safe to
    /// write it at the same time. Then the allocation is committed, or given up, after that write has ended.
    pub fn link_early(&mut self, map: &ChainMap, new: &mut Allocation) -> Option<TableWrite> {
        if !self.may_link_early(map, new) {
            return None;
        }
        let offset = self.place_on_disk(new.place.table).ok()?;
        let mut bytes = self.tables.bytes(new.place.table).to_vec();
        for at in 0..new.clusters {
            let (place, _, entry) = self.link(new, at);
            self.top_qcow2().encode_entry(entry).store(&mut bytes, place.index, &self.top_qcow2().geometry);
        }
        self.tables.begin_writing(new.place.table);
        self.write.as_mut()?.flush.early.running = Some(new.place.table);
        new.early = Early::Written;
        Some(TableWrite { offset, bytes })
    }

    fn may_link_early(&self, map: &ChainMap, new: &Allocation) -> bool {
        let Some(write) = &self.write else { return false };
        let was_zero = |at: u64| map.lookup(GuestCluster(new.cluster.0 + at)) == Word::ZERO;
        write.flush.early.expects_flush()
            // Nothing that is not durable, but what the guest has written itself: so the refcounts are, too.
            && !write.flush.is_busy()
            && !self.has_dirt()
            // The link may be durable before the data, which the guest then finds to be what it was: zeros.
            && new.known_zero
            && !new.reuse
            && self.top_qcow2().data_file.is_none()
            && ((0..new.clusters).all(was_zero) || active(Mutation::EarlyLinksForgetBacking))
    }

    /// A cluster of an allocation: the place of its entry, the cluster, and its entry once the data is there.
    pub(crate) fn link(&self, new: &Allocation, at: u64) -> (EntryPlace, GuestCluster, L2Entry) {
        let place = EntryPlace { index: new.place.index + at as usize, ..new.place };
        let guest = GuestCluster(new.cluster.0 + at);
        let offset = self.top_qcow2().geometry.host_offset(HostCluster(new.host.0 + at));
        (place, guest, self.written_entry(place, guest, new, at, offset))
    }

    /// The write of an allocation's links, if there was one, has ended.
    pub fn end_early_link(&mut self, new: &Allocation, wakes: &mut WakeList) {
        if new.early != Early::Written {
            return;
        }
        let flush = &mut self.write.as_mut().expect("a plan was made").flush;
        let table = flush.early.running.take().expect("the link is on its way");
        wakes.append(flush.take_waiters());
        self.tables.written(table);
    }

    /// What the disk has of the links of an allocation is not, or may not be, what its entries will say: the slice is
    /// written anew, and in order.
    pub fn forget_early_link(&mut self, new: &mut Allocation, wakes: &mut WakeList) {
        if new.early != Early::Written {
            return;
        }
        self.end_early_link(new, wakes);
        new.early = Early::No;
        if active(Mutation::EarlyLinkLeft) {
            return;
        }
        self.tables.change(new.place.table);
        self.write.as_mut().expect("a plan was made").flush.links_follow_data();
    }
}
