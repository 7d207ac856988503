//! A flush of the metadata as data: the cut with its three stages, and which flushes lead, wait or are done.
//!
//! Owns the numbers of cuts and the record of the running one. flush.rs takes cuts and ends them.

use std::collections::BTreeSet;
use std::task::Waker;

use qcow2::HostOffset;

use crate::early::{Early, EarlyLinks};
use crate::epoch::Epoch;
use crate::rules::order;
use crate::tables::{Dirt, TableId};
use crate::waiters::{Waiters, WakeList};

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
    pub(crate) number: u64,
    /// First make the file this long in bytes, if possible, so that it ends with free clusters until it is closed. Its new
    /// length must be durable before any of these writes begins. Call [`crate::Engine::file_was_lengthened`] in any case.
    pub lengthen: Option<u64>,
    /// The file's present length must be durable before any of these writes begins.
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

/// The cuts of a disk: the running one, and what is known of the next.
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
pub(crate) struct Running {
    pub number: u64,
    pub epoch: Epoch,
    /// Slices of tables, and how they had to be written.
    pub slices: Vec<(TableId, Dirt)>,
    /// Blocks of the L1 table.
    pub l1_blocks: BTreeSet<u64>,
    /// Blocks of the refcount table.
    pub table_blocks: BTreeSet<u64>,
    /// The whole refcount table was at a new place.
    pub table_was_new: bool,
    /// The header named an old refcount table.
    pub header_was_stale: bool,
    /// The head of the journal when the cut was taken.
    pub journal_head: u64,
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
        order::flush_ends_with(self.running.as_ref().map(|running| running.number), self.next)
    }

    /// The next cut holds a link that may become durable only after the data that it names.
    pub fn links_follow_data(&mut self) {
        self.ordered = true;
    }

    /// The last durable cut; 0 if none is.
    pub fn completed(&self) -> u64 {
        self.completed
    }

    /// True if a cut is under way.
    pub fn is_running(&self) -> bool {
        self.running.is_some()
    }

    /// A cut or an early commit is under way: no other may begin.
    pub fn is_busy(&self) -> bool {
        self.is_running() || self.early.is_running()
    }

    /// Wakes this task when the cut or the early commit that is under way has ended.
    pub fn wait(&mut self, waker: &Waker) {
        self.waiters.add(waker);
    }

    /// Wakes all tasks that wait for the end of what is under way.
    pub fn wake_all(&mut self, wakes: &mut WakeList) {
        wakes.append(self.waiters.take());
    }

    /// True if a link of the next cut may become durable only after its data. From now on this is about the cut after.
    pub fn take_ordered(&mut self) -> bool {
        std::mem::take(&mut self.ordered)
    }

    /// The next cut is taken: it runs from now on.
    pub fn begin(&mut self, taken: Running) {
        assert_eq!(taken.number, self.next, "cuts are taken in order");
        self.next += 1;
        self.running = Some(taken);
    }

    /// The running cut has ended, durable or not. Returns everything that it took.
    pub fn end(&mut self, cut: &FlushCut, wakes: &mut WakeList) -> Running {
        let running = self.running.take().expect("a cut is running");
        assert_eq!(running.number, cut.number, "one cut at a time");
        wakes.append(self.waiters.take());
        running
    }

    /// The cut with this number is durable.
    pub fn note_durable(&mut self, number: u64) {
        self.completed = number;
        self.early.note_sync();
    }

    /// The early commit of an allocation has ended, if there was one.
    pub fn end_early(&mut self, linked: Early, wakes: &mut WakeList) {
        if linked == Early::Begun {
            self.early.end();
            wakes.append(self.waiters.take());
        }
    }
}
