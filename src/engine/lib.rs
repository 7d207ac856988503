//! The metadata engine of one disk: what each guest byte is, where new clusters go, and in what order metadata may
//! reach the disk.
//!
//! Synchronous and without I/O: a request asks for a plan, does the I/O itself with no lock held, and commits. A plan
//! may answer that tables must be loaded first ([`Answer::Load`]), or that another job must be done or waited for.
//! Everything but [`Engine::lookup`] runs under one lock, for memory work only. The engine never calls back; it only
//! wakes the wakers that were left with it, after its lock is released.
#![forbid(unsafe_code)]

mod aimed;
mod alloc;
mod answer;
pub mod bounds;
pub mod change;
pub mod check;
mod claims;
mod early;
mod entries;
mod epoch;
mod error;
mod flush;
mod free;
mod guard;
mod hashed;
mod layers;
mod leaks;
#[cfg(all(test, loom))]
mod loom_tests;
mod map;
pub mod mutation;
mod reclaim;
mod refcounts;
mod reserve;
mod resolve;
mod state;
mod sync;
mod table_job;
mod tables;
mod waiters;
mod word;
mod write;
mod zero;

pub use answer::{Answer, TableLoad, TablePlace, TableSlot};
pub use bounds::ARE_TINY as BOUNDS_ARE_TINY;
pub use bounds::MAP_SLICE_WORDS as SLICE_WORDS;
pub use claims::ClaimId;
pub use entries::Entries;
pub use epoch::{Epoch, Epochs, WorkerEpochs};
pub use error::{EngineError, Proof, Structure};
pub use flush::{FlushCut, FlushStep, HeaderSwitch, Stage, TableWrite};
pub use layers::{LayerFormat, LayerSpec};
pub use leaks::{Leak, LeakSearch, LeakSearchEnd, LiveTable, SeenTable};
pub use map::Parts;
pub use reclaim::ReclaimPlan;
pub use reserve::ReservePlan;
pub use resolve::{CompressedCluster, Extent, Source, push_extent};
pub use table_job::TablePlan;
pub use tables::TableId;
pub use waiters::{Waiters, WakeFlag, WakeList};
pub use word::{FileIndex, Mapping, Word};
pub use write::{Allocation, WritePlan};
pub use zero::{ZeroMode, Zeroed};

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::task::Waker;

use qcow2::{GuestCluster, GuestOffset, HostOffset};

use crate::alloc::Allocator;
use crate::bounds::{MAP_BYTES_MAX, TABLE_SLICE_BYTES_MAX, TABLES_BYTES_MAX};
use crate::change::SnapshotPlaces;
use crate::claims::Claims;
use crate::early::Early;
use crate::flush::FlushState;
use crate::guard::MetadataGuard;
use crate::hashed::HashMap;
use crate::layers::{Layer, Qcow2Layer};
use crate::leaks::Touched;
use crate::map::{ChainMap, MapWriter, Swept};
use crate::refcounts::Refcounts;
use crate::state::{State, WriteState};
use crate::sync::AtomicU64;
use crate::tables::Tables;

/// The map's unit for a raw top image, in bytes.
const RAW_UNIT: u64 = 65536;
/// Bytes of a map frame.
const FRAME_BYTES: usize = SLICE_WORDS as usize * 8;

/// What an engine is made of.
pub struct EngineSpec {
    /// The chain, the top image first. At least one; at most [`Word::FILES_MAX`].
    pub layers: Vec<LayerSpec>,
    /// The top image may be written.
    pub writable: bool,
    /// The top image's own metadata; needed if it is a qcow2 image and writable.
    pub top: Option<TopSpec>,
    /// The most bytes of chain map.
    pub map_bytes: usize,
    /// The most bytes of clean tables to keep, and of dirty ones to let gather before a flush.
    pub table_bytes: usize,
    /// The most workers at a time.
    pub workers: usize,
}

/// Where a writable qcow2 top image has its metadata.
pub struct TopSpec {
    /// The active L1 table.
    pub l1_offset: HostOffset,
    /// The refcount table.
    pub refcount_table_offset: HostOffset,
    /// Its entries as on disk, whole clusters of them.
    pub refcount_table: Entries,
    /// The file's length in bytes.
    pub file_length: u64,
    /// What its bitmaps take of the file: offsets, and lengths in bytes.
    pub bitmaps: Vec<(HostOffset, u64)>,
    /// What its internal snapshots have of it.
    pub snapshots: SnapshotPlaces,
    /// A host cluster stays where it is when the guest discards or zeroes what it holds; only its space is given back.
    /// Needs version 3.
    pub keep_discarded: bool,
    /// All that may have clusters of the file is known, so that leaks may be searched for.
    pub may_search_leaks: bool,
}

/// A cluster of which some subclusters are data in one host cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PartedCluster {
    /// The file.
    pub file: FileIndex,
    /// Where the host cluster begins in it.
    pub offset: HostOffset,
    /// True if what is data may be written there.
    pub in_place: bool,
    /// What each of them is.
    pub parts: Parts,
}

/// The engine of one disk, shared by all its workers.
pub struct Engine {
    map: ChainMap,
    /// Bytes that a word of the map stands for, as a shift.
    unit_bits: u32,
    /// As [`Engine::granule`], as a shift.
    granule_bits: u32,
    size: u64,
    epochs: Arc<Epochs>,
    claims: Claims,
    failed: AtomicBool,
    /// So much waits for a cut that one is due. Stored under the engine's lock.
    wants_cut: AtomicBool,
    state: Mutex<State>,
}

/// What is held back of the freed clusters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HeldBack {
    /// Clusters that cannot be handed out yet.
    pub clusters: u64,
    /// Those of them that were in use, and were not only taken for writes that failed.
    pub freed: u64,
    /// So many that requests which free or allocate have to wait.
    pub crowded: bool,
    /// Some of them wait for a cut.
    pub uncut: bool,
    /// Clusters that were ever given back.
    pub given_back: u64,
}

/// Numbers for logs and metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EngineStatus {
    /// About how many bytes of metadata differ from the disk, or are written there and not durable.
    pub dirty_bytes: usize,
    /// Freed clusters that cannot be handed out yet.
    pub quarantined_clusters: u64,
    /// How many there may be, but for what is under way.
    pub quarantined_max: u64,
    /// Some of them only wait to be reclaimed.
    pub reclaimable: bool,
    /// Leaks are being searched for, or may be.
    pub searching: bool,
    /// Clusters that are counted as used and are not used yet: what a crash leaks besides what was not flushed.
    pub reserved_clusters: u64,
    /// Cuts that became durable.
    pub cuts: u64,
    /// Bytes of memory that the chain map takes.
    pub map_bytes: usize,
}

/// Memory of the map that nothing names: pages whose memory may be taken away, so that they read as zero afterwards or as
/// they do. Dropped, it is the map's again.
pub struct IdleMap<'a> {
    engine: &'a Engine,
    swept: Swept,
}

impl IdleMap<'_> {
    /// The pages, each of 4 KiB and at a multiple of that.
    pub fn pages(&self) -> impl Iterator<Item = &[AtomicU64]> {
        self.swept.frames.iter().flat_map(|frame| self.engine.map.pages(*frame))
    }

    /// Where to go on, if that was not the end of the map.
    pub fn next(&self) -> Option<usize> {
        self.swept.next
    }
}

impl Drop for IdleMap<'_> {
    fn drop(&mut self) {
        self.engine.with(|state, _| state.map_writer.take_back(&self.engine.map, &self.swept.frames));
    }
}

impl Engine {
    /// An engine over tables as they are on disk.
    ///
    /// # Errors
    /// A writable top image whose pieces of metadata overlap.
    ///
    /// # Panics
    /// If the layers are none, or a writable qcow2 top image comes without its [`TopSpec`]: programmer errors.
    pub fn new(spec: EngineSpec) -> Result<Self, EngineError> {
        let layers: Vec<Layer> =
            spec.layers.into_iter().enumerate().map(|(n, layer)| Layer::new(n, layer)).collect();
        let top = layers.first().expect("a chain has a top");
        let (unit, granule, size) = match top {
            Layer::Raw { size, .. } => {
                // Larger for a huge image, so that the map's directory stays small.
                let unit = RAW_UNIT.max((size >> 35).next_power_of_two());
                (unit, unit, *size)
            }
            Layer::Qcow2(Qcow2Layer { geometry, .. }) => {
                (geometry.cluster_size(), geometry.granule_size(), geometry.size)
            }
        };
        let clusters = size.div_ceil(unit);
        let slices = usize::try_from(clusters.div_ceil(SLICE_WORDS)).unwrap_or(usize::MAX);
        // Where any layer's clusters are the map's and have subclusters, the map has a second word for each cluster.
        let has_parts = layers.iter().any(|layer| match layer {
            Layer::Qcow2(Qcow2Layer { geometry, .. }) => {
                geometry.extended_l2 && geometry.cluster_size() == unit
            }
            Layer::Raw { .. } => false,
        });
        let frame_bytes = if has_parts { 2 * FRAME_BYTES } else { FRAME_BYTES };
        let map = ChainMap::new(
            clusters,
            unit,
            slices.min(spec.map_bytes.min(MAP_BYTES_MAX) / frame_bytes),
            has_parts,
        );
        // An exact walk needs a slice of each layer at a time, the copy of an L2 table all of it, and so may others at
        // once: with less they would drive each other's slices out for ever.
        let whole_table = match top {
            Layer::Qcow2(layer) => layer.geometry.cluster_size() as usize,
            Layer::Raw { .. } => 0,
        };
        let table_bytes = spec
            .table_bytes
            .min(TABLES_BYTES_MAX)
            .max(8 * layers.len() * TABLE_SLICE_BYTES_MAX as usize)
            .max(4 * whole_table);
        let write = match top {
            Layer::Qcow2(layer) if spec.writable => {
                let top = spec.top.expect("a writable qcow2 image comes with its own metadata");
                Some(write_state(layer.geometry, &layer.l1, top)?)
            }
            _ => None,
        };
        let state = State {
            map_writer: MapWriter::new(),
            fills: HashMap::default(),
            tables: Tables::new(table_bytes),
            layers,
            // Dirty slices cannot be evicted: half of the cache is left for clean ones.
            dirty_bytes_max: table_bytes / 2,
            writable: spec.writable,
            write,
        };
        Ok(Engine {
            map,
            unit_bits: unit.trailing_zeros(),
            granule_bits: granule.trailing_zeros(),
            size,
            epochs: Epochs::new(spec.workers),
            claims: Claims::default(),
            failed: AtomicBool::new(false),
            wants_cut: AtomicBool::new(false),
            state: Mutex::new(state),
        })
    }

    /// Virtual size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Bytes that a word of the map stands for: the top image's cluster size. A power of two.
    pub fn unit(&self) -> u64 {
        1 << self.unit_bits
    }

    /// Bytes of the least piece of the disk that can be allocated, zeroed or discarded by itself: a subcluster of the top
    /// image if it has some, else [`Engine::unit`]. A power of two.
    pub fn granule(&self) -> u64 {
        1 << self.granule_bits
    }

    /// The epochs, for workers to register with.
    pub fn epochs(&self) -> &Arc<Epochs> {
        &self.epochs
    }

    /// What the chain gives for the cluster (of [`Engine::unit`] bytes) at a guest offset, if the map has it. The
    /// caller is in an epoch and stays in it while it uses the answer. No lock.
    #[inline]
    pub fn lookup(&self, offset: GuestOffset) -> Mapping {
        self.map.lookup(GuestCluster(offset.0 >> self.unit_bits)).mapping()
    }

    /// The subclusters of the cluster at a guest offset where [`Engine::lookup`] says [`Mapping::Parts`]; nothing if that
    /// has changed meanwhile. The caller is in an epoch, as for [`Engine::lookup`]. No lock.
    #[inline]
    pub fn lookup_parts(&self, offset: GuestOffset) -> Option<PartedCluster> {
        let (word, parts) = self.map.lookup_parts(GuestCluster(offset.0 >> self.unit_bits))?;
        let (file, offset, in_place) = word.place();
        Some(PartedCluster { file, offset, in_place, parts })
    }

    /// True if the disk has failed: no write may be acknowledged any more.
    #[inline]
    pub fn has_failed(&self) -> bool {
        // Acquire pairs with the release in `fail`; a write that misses it by a moment was concurrent with the failure.
        self.failed.load(Ordering::Acquire)
    }

    /// From now on every write and flush fails.
    pub fn fail(&self) {
        self.failed.store(true, Ordering::Release);
    }

    fn with<R>(&self, f: impl FnOnce(&mut State, &mut WakeList) -> R) -> R {
        let mut wakes = WakeList::default();
        let result = f(&mut self.state.lock().expect("no panic under the engine's lock"), &mut wakes);
        wakes.wake();
        result
    }

    /// As [`Engine::with`], for what changes how much waits for a cut.
    fn with_freeing<R>(&self, f: impl FnOnce(&mut State, &mut WakeList) -> R) -> R {
        self.with(|state, wakes| {
            let result = f(state, wakes);
            // Orders nothing: who misses it by a moment sees it with the next change.
            let wants = state.write.as_ref().is_some_and(|write| write.alloc.wants_cut());
            self.wants_cut.store(wants, Ordering::Relaxed);
            result
        })
    }

    /// True if so much of what was freed waits for a cut that one is due, without any flush of the guest's. No lock.
    #[inline]
    pub fn wants_cut(&self) -> bool {
        self.wants_cut.load(Ordering::Relaxed)
    }

    /// What is held back of the freed clusters. The waker is woken when some of it has been given back.
    pub fn held_back(&self, waker: &Waker) -> HeldBack {
        self.with(|state, _| {
            let Some(WriteState { alloc, .. }) = &mut state.write else { return HeldBack::default() };
            if !waker.will_wake(Waker::noop()) {
                alloc.held_up.add(waker);
            }
            HeldBack {
                clusters: alloc.quarantined,
                freed: alloc.freed,
                crowded: alloc.is_crowded(),
                uncut: alloc.waits_for_cut(),
                given_back: alloc.given_back,
            }
        })
    }

    /// Plans a change of the top image: what makes no sense to it is proof of damage. Plans of reads never come this way.
    fn change<T>(&self, plan: impl FnOnce(&mut State) -> Result<T, EngineError>) -> Result<T, EngineError> {
        self.check()?;
        self.with(|state, _| plan(state)).map_err(EngineError::of_change)
    }

    fn check(&self) -> Result<(), EngineError> {
        if self.has_failed() { Err(EngineError::Failed) } else { Ok(()) }
    }

    /// Queues a claim on the clusters that a range touches; see [`Engine::claim_held`].
    pub fn claim(&self, offset: GuestOffset, length: u64) -> ClaimId {
        let (first, last) = self.units(offset, length);
        self.claims.add(first, last)
    }

    /// A claim on the clusters that a range touches that is held at once; none if another is in its way.
    pub fn try_claim(&self, offset: GuestOffset, length: u64) -> Option<ClaimId> {
        let (first, last) = self.units(offset, length);
        self.claims.try_add(first, last)
    }

    /// The first and the last unit that a range touches.
    fn units(&self, offset: GuestOffset, length: u64) -> (u64, u64) {
        let last = offset.0 + length.saturating_sub(1);
        (offset.0 >> self.unit_bits, last >> self.unit_bits)
    }

    /// True if the claim is held; else the waker is woken when it is.
    pub fn claim_held(&self, claim: ClaimId, waker: &Waker) -> bool {
        self.claims.held(claim, waker)
    }

    /// Gives a claim up.
    pub fn release_claim(&self, claim: ClaimId) {
        self.claims.release(claim);
    }

    /// Where a prefix of a range comes from.
    ///
    /// # Errors
    /// A bad table entry.
    pub fn plan_read(
        &self,
        offset: GuestOffset,
        length: u64,
        waker: &Waker,
    ) -> Result<Answer<Vec<Extent>>, EngineError> {
        self.with(|state, _| state.extents(&self.map, self.unit(), offset, length, waker))
    }

    /// As [`Engine::plan_read`], but asks only for the tables of exactly this range, and does not fill the map: for when
    /// a table that only its neighbours need cannot be read.
    ///
    /// # Errors
    /// As for [`Engine::plan_read`].
    pub fn plan_read_exact(
        &self,
        offset: GuestOffset,
        length: u64,
        waker: &Waker,
    ) -> Result<Answer<Vec<Extent>>, EngineError> {
        self.with(|state, _| state.exact_extents(offset, length, waker))
    }

    /// Hands in a table slice that [`Answer::Load`] asked for.
    pub fn table_loaded(&self, load: &TableLoad, bytes: Box<[u8]>) {
        self.with(|state, wakes| state.tables.end_load(load.table, Some(bytes), load.ahead, wakes));
    }

    /// A table slice could not be read. Others who wait for it will ask for it again.
    pub fn table_failed(&self, load: &TableLoad) {
        self.with(|state, wakes| state.tables.end_load(load.table, None, load.ahead, wakes));
    }

    /// The host has allocated a piece of a table that [`Answer::Allocate`] named, or cannot allocate ahead at all.
    pub fn table_allocated(&self, place: &TablePlace) {
        self.with(|state, _| state.tables.allocated(place.table));
    }

    /// Plans a prefix of a write; the caller holds a claim on the range.
    ///
    /// # Errors
    /// The disk has failed or is read-only; a bad table entry.
    pub fn plan_write(
        &self,
        offset: GuestOffset,
        length: u64,
        waker: &Waker,
    ) -> Result<Answer<WritePlan>, EngineError> {
        self.change(|state| state.plan_write(offset, length, waker))
    }

    /// Publishes an allocation whose bytes are all written.
    pub fn commit_write(&self, done: Allocation) {
        self.with_freeing(|state, wakes| state.commit_write(&self.map, done, wakes));
    }

    /// Gives an allocation up.
    pub fn abort_write(&self, done: Allocation) {
        self.with_freeing(|state, wakes| state.abort_write(done, wakes));
    }

    /// To be asked when the data of an allocation is about to be written: what to write beside it, if a flush is expected
    /// that would write it anyway. That write has ended, too, when the allocation is committed or given up; if it failed,
    /// [`Engine::link_failed`] comes before.
    pub fn link_early(&self, new: &mut Allocation) -> Option<TableWrite> {
        if new.early != Early::Wanted || self.has_failed() {
            return None;
        }
        self.with(|state, _| state.link_early(&self.map, new))
    }

    /// What [`Engine::link_early`] gave could not be written: the next cut will.
    pub fn link_failed(&self, new: &mut Allocation) {
        self.with(|state, wakes| state.forget_early_link(new, wakes));
    }

    /// Discards or zeroes a prefix of a range of whole granules, in memory; the caller holds a claim on it.
    ///
    /// # Errors
    /// As for [`Engine::plan_write`].
    pub fn zero(
        &self,
        offset: GuestOffset,
        length: u64,
        mode: ZeroMode,
        waker: &Waker,
    ) -> Result<Answer<Zeroed>, EngineError> {
        self.check()?;
        self.with_freeing(|state, _| state.zero(&self.map, offset, length, mode, waker))
            .map_err(EngineError::of_change)
    }

    /// Plans to make an L2 table the top image's own; `Ready(None)` if it is.
    ///
    /// # Errors
    /// As for [`Engine::plan_write`].
    pub fn plan_table(
        &self,
        slot: TableSlot,
        waker: &Waker,
    ) -> Result<Answer<Option<TablePlan>>, EngineError> {
        self.change(|state| state.plan_table(slot, waker))
    }

    /// The table's cluster is allocated on the host.
    pub fn commit_table(&self, plan: TablePlan) {
        self.with(|state, wakes| state.commit_table(plan, wakes));
    }

    /// The table's cluster could not be allocated on the host.
    pub fn abort_table(&self, plan: TablePlan) {
        self.with(|state, wakes| state.abort_table(plan, wakes));
    }

    /// Plans to reserve clusters for allocations to come; `Ready(None)` if some are reserved.
    ///
    /// # Errors
    /// As for [`Engine::plan_write`], [`EngineError::RefcountTableFull`] and [`EngineError::FileTooLarge`].
    pub fn plan_reserve(&self, waker: &Waker) -> Result<Answer<Option<ReservePlan>>, EngineError> {
        self.change(|state| state.plan_reserve(waker))
    }

    /// The file has the length, and the metadata the space, that the plan named.
    pub fn commit_reserve(&self, plan: ReservePlan) {
        self.with(|state, wakes| state.commit_reserve(plan, wakes));
    }

    /// The host could not do what the plan named.
    pub fn abort_reserve(&self, plan: ReservePlan) {
        self.with(|state, wakes| state.abort_reserve(plan, wakes));
    }

    /// The host had no room for a window: the next is to be as small as they come. False if that one was.
    pub fn shrink_window(&self) -> bool {
        self.with(|state, _| state.write.as_mut().is_some_and(|write| write.alloc.shrink_window()))
    }

    /// A flush arrives: everything acknowledged so far is to be durable. The ticket goes to [`Engine::plan_flush`].
    ///
    /// # Errors
    /// The disk has failed or is read-only.
    pub fn begin_flush(&self) -> Result<u64, EngineError> {
        self.check()?;
        self.with(|state, _| Ok(state.write_state()?.flush.ticket()))
    }

    /// The next step of a flush.
    ///
    /// # Errors
    /// The disk has failed.
    pub fn plan_flush(&self, ticket: u64, waker: &Waker) -> Result<FlushStep, EngineError> {
        self.check()?;
        self.with(|state, _| state.plan_flush(&self.epochs, ticket, waker))
    }

    /// A cut is durable.
    pub fn commit_cut(&self, cut: &FlushCut) {
        self.with_freeing(|state, wakes| state.commit_cut(cut, wakes));
    }

    /// A cut found no space: everything in it is dirty again.
    pub fn fail_cut(&self, cut: &FlushCut, stage: Stage) {
        self.with(|state, wakes| state.fail_cut(cut, stage, wakes));
    }

    /// Plans to reclaim freed clusters; `Ready(None)` if there are none to be had now.
    ///
    /// # Errors
    /// The disk has failed; a refcount that is zero already.
    pub fn plan_reclaim(&self, waker: &Waker) -> Result<Answer<Option<ReclaimPlan>>, EngineError> {
        self.change(|state| state.plan_reclaim(&self.epochs, waker))
    }

    /// The runs are punched, as far as `punched` says (an item for each).
    pub fn commit_reclaim(&self, plan: ReclaimPlan, punched: &[bool]) {
        self.with(|state, wakes| state.commit_reclaim(plan, punched, wakes));
    }

    /// At a clean end, with no request in flight: gives reserved clusters back.
    ///
    /// # Errors
    /// The disk has failed or is read-only.
    pub fn release_windows(&self, waker: &Waker) -> Result<Answer<()>, EngineError> {
        self.change(|state| state.release_windows(waker))
    }

    /// At a clean end: the length in bytes to cut the file to. None if the file, `present` bytes long, is longer than
    /// this session found or made it: something lies there that the refcounts do not know.
    ///
    /// # Errors
    /// The disk is read-only.
    pub fn trim_end(&self, present: u64) -> Result<Option<u64>, EngineError> {
        self.with(|state, _| {
            let alloc = &mut state.write_state()?.alloc;
            let length = alloc.trim_end() << self.unit_bits;
            Ok((length < present && present <= alloc.file_length).then_some(length))
        })
    }

    /// The file was made at least so long as a cut named, or that failed.
    pub fn file_was_lengthened(&self, length: u64) {
        self.with(|state, wakes| {
            if let Some(write) = &mut state.write {
                write.alloc.file_length = write.alloc.file_length.max(length);
                wakes.append(write.alloc.reserving.take().expect("nobody else sets it").take());
            }
        });
    }

    /// Numbers for logs, metrics and housekeeping.
    pub fn status(&self) -> EngineStatus {
        self.with(|state, _| {
            let map_bytes = state.map_writer.bytes(&self.map);
            let Some(write) = &state.write else {
                return EngineStatus { map_bytes, ..EngineStatus::default() };
            };
            EngineStatus {
                dirty_bytes: state.tables.dirty_bytes() + write.flush.early.unsynced_bytes(),
                quarantined_clusters: write.alloc.quarantined,
                quarantined_max: write.alloc.quarantined_max(),
                reserved_clusters: write.alloc.reserved_clusters(),
                reclaimable: !write.alloc.unlinked.is_empty(),
                searching: write.alloc.touched.is_some(),
                cuts: write.flush.completed(),
                map_bytes,
            }
        })
    }

    /// Whether the map has memory that [`Engine::sweep_map`] gives back once it is not used. Takes no lock; who filled the map
    /// sees it at once.
    pub fn map_is_sweepable(&self) -> bool {
        self.map.is_sweepable()
    }

    /// Looks through a part of the map, from `from` on (0, then [`IdleMap::next`]), for memory that was not used since the
    /// last time that it was looked through. What it stood for is resolved anew when it is needed.
    pub fn sweep_map(&self, from: usize) -> IdleMap<'_> {
        IdleMap { engine: self, swept: self.with(|state, _| state.map_writer.sweep(&self.map, from)) }
    }
}

fn write_state(geometry: qcow2::Geometry, l1: &Entries, top: TopSpec) -> Result<WriteState, EngineError> {
    let refcounts = Refcounts::new(geometry, top.refcount_table, top.refcount_table_offset);
    // Blocks past the end of the file would be in the way of growth: grow from the last of them.
    let last_block = refcounts.table.used().next_back().map_or(0, |(block, _)| block);
    let guard =
        MetadataGuard::of_image(&geometry, l1, top.l1_offset, &refcounts, &top.bitmaps, top.snapshots)?;
    let in_blocks = last_block * geometry.refblock_entries();
    let end = geometry.clusters_for(top.file_length).max(in_blocks).max(guard.end());
    let mut alloc = Allocator::new(end, geometry.cluster_size(), geometry.size);
    alloc.opened(top.file_length, geometry.cluster_size());
    // From the very beginning: what is touched later is what the search must leave alone.
    alloc.touched = top.may_search_leaks.then(Touched::default);
    Ok(WriteState {
        refcounts,
        alloc,
        guard,
        flush: FlushState::new(),
        table_jobs: HashMap::default(),
        l1_offset: top.l1_offset,
        l1_dirty: BTreeSet::new(),
        keep_discarded: top.keep_discarded && geometry.version == qcow2::Version::V3,
    })
}
