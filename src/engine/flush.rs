//! Flushing: cuts of all dirty metadata, in the three stages of docs/durability.md, with one leader at a time.

use std::collections::BTreeSet;
use std::task::Waker;

use qcow2::{Geometry, HostOffset, L1Entry};

use crate::bounds::CUT_WRITE_BYTES_MAX;
use crate::early::EarlyLinks;
use crate::epoch::{Epoch, Epochs};
use crate::error::EngineError;
use crate::mutation::{Mutation, active};
use crate::refcounts::{encode_entries, table_block_entries};
use crate::state::State;
use crate::tables::{Dirt, TableId};
use crate::waiters::{Waiters, WakeList};

/// The block of the L1 table (written as one) that an entry is in.
pub(crate) fn l1_block_of(geometry: &Geometry, index: u64) -> u64 {
    index / table_block_entries(geometry)
}

/// Bytes to be written to the top image's file.
#[derive(Debug)]
pub struct TableWrite {
    /// Where they go.
    pub offset: HostOffset,
    /// The bytes.
    pub bytes: Vec<u8>,
}

/// The refcount table's new location, for the header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeaderSwitch {
    /// The table's new offset.
    pub refcount_table_offset: HostOffset,
    /// The table's new size in clusters.
    pub refcount_table_clusters: u32,
}

/// All the metadata that was dirty at one moment. Write the stages in order, with an fdatasync after each that is not
/// empty. After stage 1 one is always required, as it also makes the guest's data durable, except for
/// [`FlushCut::links_alone`].
#[derive(Debug)]
#[must_use]
pub struct FlushCut {
    number: u64,
    /// First make the file this long in bytes, if possible, so that it ends with free clusters until it is closed. Then
    /// call [`crate::Engine::file_was_lengthened`], even if that failed.
    pub lengthen: Option<u64>,
    /// The file's length must be durable before any of these writes begins.
    pub length_first: bool,
    /// Metadata that nothing durable names, and that stage 1 will name.
    pub stage0: Vec<TableWrite>,
    /// Refcounts, and tables that stage 2 will name.
    pub stage1: Vec<TableWrite>,
    /// The header, to be written in stage 1 with the tables.
    pub header: Option<HeaderSwitch>,
    /// The links.
    pub stage2: Vec<TableWrite>,
    /// The cut has links alone, and they need nothing durable before them: one fdatasync is enough.
    pub links_alone: bool,
}

/// The next step of a flush.
#[derive(Debug)]
pub enum FlushStep {
    /// Everything acknowledged before the flush is durable.
    Done,
    /// Another flush leads; the waker is registered.
    Wait,
    /// Write this cut, then report the result to the engine.
    Lead(FlushCut),
}

/// The stage at which a cut failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// Stage 0 was not complete.
    Zero,
    /// Stage 0 is durable, stage 1 was not complete.
    One,
    /// Stage 1 is durable, stage 2 was not complete.
    Two,
}

pub(crate) struct FlushState {
    /// The next cut's number, from 1.
    next: u64,
    /// The last durable cut.
    completed: u64,
    running: Option<Running>,
    /// A link of the next cut may become durable only after the data that it names.
    ordered: bool,
    pub early: EarlyLinks,
    waiters: Waiters,
}

/// Everything that the running cut took; dirty again if it fails.
struct Running {
    number: u64,
    epoch: Epoch,
    slices: Vec<(TableId, Dirt)>,
    l1_blocks: BTreeSet<u64>,
    table_blocks: BTreeSet<u64>,
    table_was_new: bool,
    header_was_stale: bool,
}

impl FlushState {
    pub fn new() -> Self {
        let (early, waiters) = (EarlyLinks::default(), Waiters::default());
        FlushState { next: 1, completed: 0, running: None, ordered: false, early, waiters }
    }

    /// The cut that will hold a change made now.
    pub fn next_cut(&self) -> u64 {
        self.next
    }

    /// The cut with which a flush that arrives now ends.
    pub fn ticket(&self) -> u64 {
        match &self.running {
            Some(running) if active(Mutation::JoinsRunningCut) => running.number,
            _ => self.next,
        }
    }

    /// The next cut holds a link that may become durable only after the data that it names.
    pub fn links_follow_data(&mut self) {
        self.ordered = true;
    }

    pub fn completed(&self) -> u64 {
        self.completed
    }

    /// A cut or an early commit is under way: no other may begin.
    pub fn is_busy(&self) -> bool {
        self.running.is_some() || self.early.is_running()
    }

    /// Those who wait for what is on its way, to be woken.
    pub fn take_waiters(&mut self) -> WakeList {
        self.waiters.take()
    }
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
        if flush.completed >= ticket {
            return Ok(FlushStep::Done);
        }
        if flush.running.is_some() || (flush.early.is_running() && !active(Mutation::CutBesideEarlyLink)) {
            flush.waiters.add(waker);
            return Ok(FlushStep::Wait);
        }
        let dirty = self.has_dirt();
        let write = self.write_state()?;
        if dirty && let Some(waiters) = write.alloc.waits_for_length(write.refcounts.geometry.cluster_size())
        {
            // No deadlock: a reservation never waits for a flush.
            waiters.add(waker);
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
            let stage = match (id, dirt) {
                (TableId::Refblock { .. }, Dirt::New) if active(Mutation::RefblocksWithEntries) => {
                    &mut stage1
                }
                (TableId::Refblock { .. }, Dirt::Existing) if active(Mutation::CountsWithLinks) => {
                    &mut stage2
                }
                (TableId::L2 { .. }, Dirt::New) if active(Mutation::TablesWithLinks) => &mut stage2,
                (TableId::L2 { .. }, Dirt::Existing) if active(Mutation::LinksBeforeData) => &mut stage1,
                (TableId::Refblock { .. }, Dirt::New) => &mut stage0,
                (TableId::Refblock { .. }, _) | (TableId::L2 { .. }, Dirt::New) => &mut stage1,
                (TableId::L2 { .. }, _) => &mut stage2,
            };
            stage.push(TableWrite { offset, bytes: bytes.into_vec() });
            slices.push((id, dirt));
        }
        let write = self.write.as_mut().expect("a writable image");
        write.flush.early.cut(dirty);
        let cluster_size = write.refcounts.geometry.cluster_size();
        let lengthen = if dirty { write.alloc.marked_length(cluster_size) } else { None };
        let length_first = dirty && std::mem::take(&mut write.alloc.length_unsynced);
        let l1_blocks = std::mem::take(&mut write.l1_dirty);
        let refcounts = &mut write.refcounts;
        let table_blocks = std::mem::take(&mut refcounts.dirty);
        let table_was_new = std::mem::take(&mut refcounts.table_is_new);
        if table_was_new {
            let bytes = encode_entries(&refcounts.table, 0, refcounts.table.len()).into_vec();
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
        let ordered = std::mem::take(&mut write.flush.ordered);
        let number = write.flush.next;
        write.flush.next += 1;
        let epoch = epochs.advance();
        write.flush.running = Some(Running {
            number,
            epoch,
            slices,
            l1_blocks: l1_blocks.clone(),
            table_blocks,
            table_was_new,
            header_was_stale,
        });
        let links_alone = stage0.is_empty()
            && stage1.is_empty()
            && header.is_none()
            && l1_blocks.is_empty()
            && !stage2.is_empty()
            && (!ordered || active(Mutation::LinksNeedNoData));
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
        let bytes = encode_entries(&top.l1, block * entries, entries).into_vec();
        TableWrite { offset: self.l1_block_place(block).0, bytes }
    }

    /// The offset of a block of the L1 table, and its length in bytes.
    pub(crate) fn l1_block_place(&self, block: u64) -> (HostOffset, u64) {
        let bytes = table_block_entries(&self.top_qcow2().geometry) * 8;
        let base = self.write.as_ref().expect("a writable image").l1_offset;
        (HostOffset(base.0 + block * bytes), bytes)
    }

    /// The cut is durable.
    pub fn commit_cut(&mut self, cut: &FlushCut, wakes: &mut WakeList) {
        let write = self.write.as_mut().expect("a writable image");
        let running = write.flush.running.take().expect("a cut is running");
        assert_eq!(running.number, cut.number, "one cut at a time");
        write.flush.completed = running.number;
        write.flush.early.synced();
        write.alloc.cut_is_durable(running.number, running.epoch);
        wakes.append(write.flush.waiters.take());
        for (id, _) in running.slices {
            self.tables.written(id);
        }
    }

    /// The cut failed at `stage` for lack of space: all of it is dirty again. A table that may already be linked on
    /// disk counts as existing from now on: each change under a durable link must be written in its proper stage.
    pub fn fail_cut(&mut self, cut: &FlushCut, stage: Stage, wakes: &mut WakeList) {
        let write = self.write.as_mut().expect("a writable image");
        let running = write.flush.running.take().expect("a cut is running");
        assert_eq!(running.number, cut.number, "one cut at a time");
        wakes.append(write.flush.waiters.take());
        write.flush.links_follow_data();
        write.alloc.length_unsynced |= cut.length_first;
        write.l1_dirty.extend(running.l1_blocks);
        write.refcounts.header_stale |= running.header_was_stale;
        write.refcounts.dirty.extend(running.table_blocks);
        if running.table_was_new && stage == Stage::Zero {
            write.refcounts.table_is_new = true;
        } else if running.table_was_new {
            let entries = table_block_entries(&write.refcounts.geometry);
            write.refcounts.dirty.extend(0..write.refcounts.table.len().div_ceil(entries));
        }
        for (id, dirt) in running.slices {
            if active(Mutation::FailedCutForgotten) {
                self.tables.written(id);
                continue;
            }
            let linked = match id {
                TableId::Refblock { .. } => stage >= Stage::One,
                TableId::L2 { .. } => stage >= Stage::Two,
            };
            self.tables.not_written(id, if linked { Dirt::Existing } else { dirt });
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
