//! Early commits: links written together with the data that they name, so that the flush that is expected next finds
//! nothing to write. See docs/durability.md, "A link written with its data".
//!
//! At most one such link is being written at a time, and no cut meanwhile.

use crate::cut::TableWrite;
use crate::early::Early;
use crate::map::ChainMap;
use crate::rules::order;
use crate::state::State;
use crate::write::Allocation;

impl State {
    /// The table slice with the link of an allocation whose data is about to be written, if writing both at once is
    /// worthwhile and safe. After that write has ended, commit or drop the allocation. Until then wait for nothing
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
        self.write.as_mut().expect("a plan was made").flush.early.begin();
        new.early = Early::Begun;
        Some(TableWrite { offset, bytes })
    }

    fn may_link_early(&self, map: &ChainMap, new: &Allocation) -> bool {
        let Some(write) = &self.write else { return false };
        let may_begin = order::may_commit_early(write.flush.is_busy(), self.has_dirt());
        // False if another allocation was published since this one was planned.
        let first = write.flush.early.of_next() == Early::Wanted;
        first && may_begin && new.clusters == 1 && self.may_precede_data(map, new, new.cluster)
    }
}
