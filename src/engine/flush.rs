//! Takes cuts of all dirty metadata, in the three stages of docs/durability.md, and ends them.

use std::task::Waker;

use qcow2::{Geometry, HostOffset, HostRange, L1Entry};

use crate::bounds::CUT_WRITE_BYTES_MAX;
use crate::cut::{FlushCut, FlushStep, HeaderSwitch, Running, TableWrite};
use crate::epoch::Epochs;
use crate::error::EngineError;
use crate::refcounts::{encode_entries, table_block_entries};
use crate::rules::order::{self, Stage};
use crate::state::State;
use crate::tables::{Dirt, TableId};
use crate::waiters::WakeList;

/// The block of the L1 table (written as one) that an entry is in.
pub(crate) fn l1_block_of(geometry: &Geometry, index: u64) -> u64 {
    index / table_block_entries(geometry)
}

impl State {
    /// A flush's next step. `ticket` is [`FlushState::ticket`] at the time when the flush arrived.
    pub fn plan_flush(
        &mut self,
        epochs: &Epochs,
        ticket: u64,
        waker: &Waker,
    ) -> Result<FlushStep, EngineError> {
        let flush = &mut self.write_state()?.flush;
        if flush.completed() >= ticket {
            return Ok(FlushStep::Done);
        }
        if !order::may_take_cut(flush.is_running(), flush.early.is_running()) {
            flush.wait(waker);
            return Ok(FlushStep::Wait);
        }
        let dirty = self.has_dirt();
        let write = self.write_state()?;
        // No deadlock: a reservation never waits for a flush.
        if dirty && write.alloc.awaits_length(write.refcounts.geometry.cluster_size(), waker) {
            return Ok(FlushStep::Wait);
        }
        self.take_cut(epochs).map(FlushStep::Lead)
    }

    fn take_cut(&mut self, epochs: &Epochs) -> Result<FlushCut, EngineError> {
        let (dirty, mut places) = (self.has_dirt(), Vec::new());
        for id in self.tables.dirty_ids() {
            places.push(self.place_on_disk(id)?);
        }
        let (mut stage0, mut stage1, mut stage2) = (Vec::new(), Vec::new(), Vec::new());
        let mut slices = Vec::new();
        for ((id, dirt, bytes), offset) in self.tables.cut().into_iter().zip(places) {
            let stage = match order::stage_of(id, dirt) {
                Stage::Zero => &mut stage0,
                Stage::One => &mut stage1,
                Stage::Two => &mut stage2,
            };
            stage.push(TableWrite { offset, bytes: bytes.into_vec() });
            slices.push((id, dirt));
        }
        let write = self.write.as_mut().expect("a writable image");
        write.flush.early.note_cut(dirty);
        let cluster_size = write.refcounts.geometry.cluster_size();
        let lengthen = if dirty { write.alloc.marked_length(cluster_size) } else { None };
        let length_first = dirty && write.alloc.take_unsynced_length();
        let l1_blocks = std::mem::take(&mut write.l1_dirty);
        let refcounts = &mut write.refcounts;
        let table_blocks = std::mem::take(&mut refcounts.dirty);
        let table_was_new = std::mem::take(&mut refcounts.table_is_new);
        if table_was_new {
            let bytes = encode_entries(&refcounts.table, 0..refcounts.table.len()).into_vec();
            stage0.push(TableWrite { offset: refcounts.table_offset, bytes });
        }
        for block in &table_blocks {
            let (offset, bytes) = refcounts.table_block(*block);
            stage1.push(TableWrite { offset, bytes: bytes.into_vec() });
        }
        let header_was_stale = std::mem::take(&mut refcounts.header_stale);
        let header = header_was_stale.then(|| HeaderSwitch {
            refcount_table_offset: refcounts.table_offset,
            refcount_table_clusters: refcounts.table_clusters() as u32,
        });
        let ordered = write.flush.take_ordered();
        let number = write.flush.next_cut();
        let journal_head = write.journal.head();
        if !order::tail_waits_for_the_cut() {
            write.journal.cut_is_durable(journal_head);
        }
        let epoch = epochs.advance();
        write.flush.begin(Running {
            number,
            epoch,
            slices,
            l1_blocks: l1_blocks.clone(),
            table_blocks,
            table_was_new,
            header_was_stale,
            journal_head,
        });
        let links_alone = stage0.is_empty()
            && stage1.is_empty()
            && header.is_none()
            && l1_blocks.is_empty()
            && !stage2.is_empty()
            && order::links_need_no_data(ordered);
        for block in l1_blocks {
            stage2.push(self.l1_block(block));
        }
        let [stage0, stage1, stage2] = [stage0, stage1, stage2].map(merged);
        Ok(FlushCut { number, lengthen, length_first, stage0, stage1, header, stage2, links_alone })
    }

    /// True if a cut taken now would have something to write.
    pub(crate) fn has_dirt(&self) -> bool {
        let of_writing = self.write.as_ref().is_some_and(|write| {
            let refcounts = &write.refcounts;
            let of_refcounts =
                refcounts.table_is_new || refcounts.header_stale || !refcounts.dirty.is_empty();
            !write.l1_dirty.is_empty() || of_refcounts
        });
        of_writing || self.tables.dirty_bytes() > 0
    }

    /// Where a slice of the top image lies.
    pub(crate) fn place_on_disk(&self, id: TableId) -> Result<HostOffset, EngineError> {
        let top = self.top_qcow2();
        match id {
            TableId::L2 { table, slice, .. } => match top.l1_entry(table)? {
                L1Entry::Table { offset, .. } => Ok(top.slice_offset(offset, slice)),
                L1Entry::Unallocated => panic!("a changed slice's table exists"),
            },
            TableId::Refblock { block, slice } => {
                let refcounts = &self.write.as_ref().expect("a writable image").refcounts;
                let offset = refcounts.block_offset(block)?.expect("a dirty slice's block exists");
                Ok(top.slice_offset(offset, slice))
            }
        }
    }

    fn l1_block(&self, block: u64) -> TableWrite {
        let top = self.top_qcow2();
        let entries = table_block_entries(&top.geometry);
        let bytes = encode_entries(&top.l1, block * entries..(block + 1) * entries).into_vec();
        TableWrite { offset: self.l1_block_place(block).offset, bytes }
    }

    /// The place of a block of the L1 table.
    pub(crate) fn l1_block_place(&self, block: u64) -> HostRange {
        let bytes = table_block_entries(&self.top_qcow2().geometry) * 8;
        let base = self.write.as_ref().expect("a writable image").l1_offset;
        HostRange::new(HostOffset(base.0 + block * bytes), bytes)
    }

    /// The cut is durable.
    pub fn commit_cut(&mut self, cut: &FlushCut, wakes: &mut WakeList) {
        let write = self.write.as_mut().expect("a writable image");
        let running = write.flush.end(cut, wakes);
        write.flush.note_durable(running.number);
        // Before a cluster that the cut unlinked can be used again: a record that names it would be replayed.
        if write.journal.cut_is_durable(running.journal_head) {
            write.alloc.quarantine_mut().wake_all(wakes);
        }
        write.alloc.quarantine_mut().cut_is_durable(running.number, running.epoch);
        for (id, _) in running.slices {
            self.tables.note_written(id);
        }
    }

    /// The cut failed at `stage` for lack of space: all of it is dirty again. A table that may already be linked on
    /// disk counts as existing from now on. Each change under a durable link must be written in its proper stage.
    pub fn fail_cut(&mut self, cut: &FlushCut, stage: Stage, wakes: &mut WakeList) {
        let write = self.write.as_mut().expect("a writable image");
        let running = write.flush.end(cut, wakes);
        write.flush.links_follow_data();
        if cut.length_first {
            write.alloc.length_is_unsynced();
        }
        write.l1_dirty.extend(running.l1_blocks);
        write.refcounts.header_stale |= running.header_was_stale;
        write.refcounts.dirty.extend(running.table_blocks);
        if running.table_was_new && stage == Stage::Zero {
            write.refcounts.table_is_new = true;
        } else if running.table_was_new {
            let entries = table_block_entries(&write.refcounts.geometry);
            write.refcounts.dirty.extend(0..write.refcounts.table.len().div_ceil(entries));
        }
        for (id, dirt) in order::to_write_again(running.slices) {
            let linked = match id {
                TableId::Refblock { .. } => stage >= Stage::One,
                TableId::L2 { .. } => stage >= Stage::Two,
            };
            self.tables.note_not_written(id, if linked { Dirt::Existing } else { dirt });
        }
    }
}

/// Sorts writes by offset and joins neighbours.
fn merged(mut writes: Vec<TableWrite>) -> Vec<TableWrite> {
    writes.sort_by_key(|write| write.offset);
    let mut joined: Vec<TableWrite> = Vec::with_capacity(writes.len());
    for write in writes {
        match joined.last_mut() {
            Some(last)
                if last.offset.0 + last.bytes.len() as u64 == write.offset.0
                    && last.bytes.len() + write.bytes.len() <= CUT_WRITE_BYTES_MAX =>
            {
                last.bytes.extend_from_slice(&write.bytes);
            }
            _ => joined.push(write),
        }
    }
    joined
}
