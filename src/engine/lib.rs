//! The metadata engine of one disk: where each guest byte lies, where new clusters go, and in which order metadata may
//! reach the disk.
//!
//! Synchronous and without I/O: a request gets a plan, does the I/O itself with no lock held, and commits. Instead of a
//! plan the answer may be to load tables ([`Answer::Load`]), or to do another job or wait for one first.
//! Everything but [`Engine::lookup`] runs under one lock, for memory work only. The engine never calls back; it only
//! wakes registered wakers, after its lock is released.
#![forbid(unsafe_code)]

mod aimed;
mod alloc;
mod answer;
mod assemble;
pub mod bounds;
pub mod change;
pub mod check;
mod claimed_runs;
mod claims;
mod cut;
mod early;
mod early_commit;
mod entries;
mod epoch;
mod error;
mod file_step;
mod fill;
mod flush;
mod free;
mod grow;
mod guard;
mod hashed;
mod journal;
mod layers;
mod leaks;
mod locked;
#[cfg(all(test, loom))]
mod loom_tests;
mod map;
pub mod mutation;
mod overlay;
mod publish;
mod quarantine;
mod reclaim;
mod refcounts;
mod reserve;
mod resolve;
mod rules;
mod run;
mod spec;
mod state;
mod status;
mod sync;
mod table_job;
mod tables;
mod touched;
mod turns;
mod waiters;
mod windows;
mod word;
mod write;
mod zero;

pub use answer::{Answer, TableLoad, TablePlace, TableSlot};
pub use bounds::ARE_TINY as BOUNDS_ARE_TINY;
pub use bounds::MAP_SLICE_WORDS as SLICE_WORDS;
pub use claims::ClaimId;
pub use cut::{FlushCut, FlushStep, HeaderSwitch, TableWrite};
pub use entries::{Entries, UsedEntry};
pub use epoch::{Epoch, Epochs, WorkerEpochs};
pub use error::{EngineError, Proof, Structure};
pub use file_step::FileStep;
pub use grow::GrowthPlan;
pub use guard::MetadataRun;
pub use journal::{JournalError, JournalMemory, Replay};
pub use layers::{LayerFormat, LayerSpec};
pub use leaks::{Leak, LeakSearch, LeakSearchEnd, LiveTable, SeenTable};
pub use map::SubclusterMap;
pub use reclaim::ReclaimPlan;
pub use reserve::ReservePlan;
pub use resolve::{CompressedCluster, Extent, Source, push_extent};
pub use rules::order::Stage;
pub use spec::{EngineSpec, TopSpec};
pub use status::{EngineStatus, HeldBack};
pub use table_job::TablePlan;
pub use tables::TableId;
pub use turns::Turn;
pub use waiters::{Waiters, WakeFlag, WakeList};
pub use word::{FileIndex, Mapping, Word};
pub use write::{Allocation, WritePlan};
pub use zero::{ZeroMode, Zeroed};

use std::ops::RangeInclusive;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Waker;

use qcow2::{GuestCluster, GuestOffset, HostOffset};

use crate::claims::Claims;
use crate::early::Early;
use crate::map::{ChainMap, Swept};
use crate::rules::{order, places};
use crate::state::{State, WriteState};
use crate::sync::AtomicU64;
use crate::write::EngineLock;

/// A cluster with some subclusters that are data in one host cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SubclusterPlaces {
    /// The file.
    pub file: FileIndex,
    /// Where the host cluster begins in the file.
    pub offset: HostOffset,
    /// True if the data subclusters may be written in place.
    pub in_place: bool,
    /// The kind of each subcluster.
    pub subclusters: SubclusterMap,
}

/// The engine of one disk, shared by all its workers.
pub struct Engine {
    map: ChainMap,
    /// The file with the top image's data. It changes only while nobody else has the engine (overlay.rs).
    top_data: FileIndex,
    /// [`Engine::unit`], as a shift.
    unit_bits: u32,
    /// [`Engine::granule`], as a shift.
    granule_bits: u32,
    /// Stored under the engine's lock, when a disk grows (grow.rs).
    size: AtomicU64,
    epochs: Arc<Epochs>,
    claims: Claims,
    failed: AtomicBool,
    /// See [`State::wants_cut`].
    wants_cut: Arc<AtomicBool>,
    state: Arc<EngineLock>,
}

/// Unused memory of the map: pages that may be returned to the system. Afterwards they read as zero or keep their
/// content. On drop they belong to the map again.
pub struct IdleMap<'a> {
    engine: &'a Engine,
    swept: Swept,
}

impl IdleMap<'_> {
    /// The pages: 4 KiB each, aligned to 4 KiB.
    pub fn pages(&self) -> impl Iterator<Item = &[AtomicU64]> {
        self.swept.frames.iter().flat_map(|frame| self.engine.map.pages(*frame))
    }

    /// Where the next sweep starts; `None` at the end of the map.
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
    /// Virtual size in bytes. It grows with [`Engine::commit_growth`], and never shrinks.
    #[inline]
    pub fn size(&self) -> u64 {
        // Acquire pairs with the release in `Engine::commit_growth`: what the growth changed in the map comes first.
        self.size.load(Ordering::Acquire)
    }

    /// Bytes of guest data that a word of the map covers: the top image's cluster size. A power of two.
    pub fn unit(&self) -> u64 {
        1 << self.unit_bits
    }

    /// Bytes of the smallest unit that can be allocated, zeroed or discarded by itself. This is a subcluster of the
    /// top image if it has some, else [`Engine::unit`]. A power of two.
    pub fn granule(&self) -> u64 {
        1 << self.granule_bits
    }

    /// The epochs, for workers to register with.
    pub fn epochs(&self) -> &Arc<Epochs> {
        &self.epochs
    }

    /// The mapping of the cluster (of [`Engine::unit`] bytes) at a guest offset, if the map has it. The caller is in an
    /// epoch and stays in it while it uses the answer. No lock.
    #[inline]
    pub fn lookup(&self, offset: GuestOffset) -> Mapping {
        self.map.lookup(GuestCluster(offset.0 >> self.unit_bits)).mapping_over(self.top_data)
    }

    /// The subclusters of the cluster at a guest offset where [`Engine::lookup`] returned [`Mapping::Subclusters`]; `None` if
    /// that has changed meanwhile. The caller is in an epoch, as for [`Engine::lookup`]. No lock.
    #[inline]
    pub fn lookup_subclusters(&self, offset: GuestOffset) -> Option<SubclusterPlaces> {
        let (word, subclusters) = self.map.lookup_subclusters(GuestCluster(offset.0 >> self.unit_bits))?;
        let (file, offset, in_place) = word.place();
        let in_place = places::may_write_in_place(in_place, file == self.top_data);
        Some(SubclusterPlaces { file, offset, in_place, subclusters })
    }

    /// True if the disk has failed: no write may be acknowledged any more.
    #[inline]
    pub fn has_failed(&self) -> bool {
        // Acquire pairs with the release in `fail`; a write that misses it by a moment was concurrent with the failure.
        self.failed.load(Ordering::Acquire)
    }

    /// From now on every write and flush fails, also those that wait: what they wait for may have been lost in a panic.
    pub fn fail(&self) {
        self.failed.store(true, Ordering::Release);
        // A change looks at `failed` under the lock. So it either sees the store, or has noted its waker by now.
        self.state.with_any(State::wake_all);
    }

    fn with<R>(&self, f: impl FnOnce(&mut State, &mut WakeList) -> R) -> R {
        self.state.with(f)
    }

    /// As [`Engine::with`], for changes that may make a cut due, or no longer due.
    fn with_freeing<R>(&self, f: impl FnOnce(&mut State, &mut WakeList) -> R) -> R {
        self.with(|state, wakes| {
            let result = f(state, wakes);
            state.note_wanted_cut();
            result
        })
    }

    /// True if enough freed clusters wait for a cut to make one due without a flush from the guest. No lock.
    #[inline]
    pub fn wants_cut(&self) -> bool {
        self.wants_cut.load(Ordering::Relaxed)
    }

    /// The freed clusters that are held back. The waker is woken when some are released.
    pub fn held_back(&self, waker: &Waker) -> HeldBack {
        self.with(|state, _| {
            let Some(WriteState { alloc, journal, .. }) = &mut state.write else {
                return HeldBack::default();
            };
            if !waker.will_wake(Waker::noop()) {
                alloc.quarantine_mut().await_room(waker);
            }
            let held = alloc.quarantine().held_back();
            HeldBack {
                crowded: held.crowded || journal.is_crowded(),
                uncut: held.uncut || (journal.is_crowded() && journal.is_uncut()),
                ..held
            }
        })
    }

    /// The task no longer waits for held-back clusters to be released.
    pub fn stop_waiting(&self, waker: &Waker) {
        self.with(|state, _| {
            if let Some(WriteState { alloc, .. }) = &mut state.write {
                alloc.quarantine_mut().stop_waiting(waker);
            }
        });
    }

    /// Plans a change of the top image: an entry that makes no sense is proof of damage. Not for reads.
    fn change<T>(
        &self,
        plan: impl FnOnce(&mut State, &mut WakeList) -> Result<T, EngineError>,
    ) -> Result<T, EngineError> {
        self.with(|state, wakes| {
            self.ensure_healthy()?;
            plan(state, wakes)
        })
        .map_err(EngineError::of_change)
    }

    /// Refuses once the disk has failed. A call that may register a waker checks this under the lock: see
    /// [`Engine::fail`].
    fn ensure_healthy(&self) -> Result<(), EngineError> {
        if self.has_failed() { Err(EngineError::Failed) } else { Ok(()) }
    }

    /// Queues a claim on the clusters that a range touches; see [`Engine::claim_held`].
    pub fn claim(&self, offset: GuestOffset, length: u64) -> ClaimId {
        self.claims.add(self.units(offset, length))
    }

    /// The units that a range touches.
    fn units(&self, offset: GuestOffset, length: u64) -> RangeInclusive<u64> {
        let last = offset.0 + length.saturating_sub(1);
        offset.0 >> self.unit_bits..=last >> self.unit_bits
    }

    /// True if the claim is held; otherwise the waker is woken once it is.
    pub fn claim_held(&self, claim: ClaimId, waker: &Waker) -> bool {
        self.claims.held(claim, waker)
    }

    /// Releases a claim, held or waiting.
    pub fn release_claim(&self, claim: ClaimId) {
        self.claims.release(claim);
    }

    /// Plans the read of a prefix of a range: where its bytes come from.
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

    /// As [`Engine::plan_read`], but requires only the tables of exactly this range, and does not fill the map. Used
    /// when a table that only neighbouring clusters need cannot be read.
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

    /// Stores a slice that [`Answer::Load`] required.
    pub fn table_loaded(&self, load: &TableLoad, bytes: Box<[u8]>) {
        self.with(|state, wakes| state.end_load(load, Some(bytes), wakes));
    }

    /// A table slice could not be read. Other requests that wait for it will try again.
    pub fn table_failed(&self, load: &TableLoad) {
        self.with(|state, wakes| state.end_load(load, None, wakes));
    }

    /// The host has allocated a piece of a table that [`Answer::Allocate`] named, or cannot allocate in advance at all.
    pub fn table_allocated(&self, place: &TablePlace) {
        self.with(|state, _| state.tables.note_allocated(place.table));
    }

    /// Plans a prefix of a write; the caller holds a claim on the range.
    ///
    /// # Errors
    /// The disk has failed or is read-only; a bad table entry.
    pub fn plan_write(
        &self,
        offset: GuestOffset,
        length: u64,
        turn: &Turn,
        waker: &Waker,
    ) -> Result<Answer<WritePlan>, EngineError> {
        let mut answer = self.change(|state, wakes| state.plan_write(offset, length, turn, waker, wakes));
        if let Ok(Answer::Ready(WritePlan::Allocate(new))) = &mut answer {
            new.arm(&self.state);
        }
        answer
    }

    /// Publishes an allocation after all of its bytes are written.
    pub fn commit_write(&self, mut done: Allocation) {
        done.disarm();
        self.with_freeing(|state, wakes| state.commit_write(&self.map, done, wakes));
    }

    /// Call this just before the data of an allocation is written. Returns the early commit, a table write to do
    /// together with the data, if a flush is expected that would write it anyway. End that write, too, before the
    /// allocation is committed or dropped; if it failed, call [`Engine::link_failed`] first.
    pub fn link_early(&self, new: &mut Allocation) -> Option<TableWrite> {
        if new.early != Early::Wanted || self.has_failed() {
            return None;
        }
        self.with(|state, _| state.link_early(&self.map, new))
    }

    /// The early commit failed: the next cut writes the link.
    pub fn link_failed(&self, new: &mut Allocation) {
        let table = new.place.table;
        self.with(|state, wakes| state.forget_early_link(&mut new.early, table, wakes));
    }

    /// Discards or zeroes a prefix of a range of whole granules, in memory; the caller holds a claim on it.
    ///
    /// # Errors
    /// As for [`Engine::plan_write`].
    pub fn apply_zero(
        &self,
        offset: GuestOffset,
        length: u64,
        mode: ZeroMode,
        waker: &Waker,
    ) -> Result<Answer<Zeroed>, EngineError> {
        self.zero(|state| state.apply_zero(&self.map, offset, length, mode, waker))
    }

    /// Discards or zeroes one unit or whole granules of it, as [`Engine::apply_zero`], but without a claim. Returns `None`
    /// if another request has or awaits a claim there. Nobody is woken later.
    ///
    /// # Errors
    /// As for [`Engine::plan_write`].
    pub fn try_zero(
        &self,
        offset: GuestOffset,
        length: u64,
        mode: ZeroMode,
    ) -> Result<Option<Answer<Zeroed>>, EngineError> {
        self.zero(|state| {
            // Plans and commits need the lock that is held here. A request that claims from now on plans after this.
            if !order::may_change_unclaimed(self.claims.overlap(self.units(offset, length))) {
                return Ok(None);
            }
            state.apply_zero(&self.map, offset, length, mode, Waker::noop()).map(Some)
        })
    }

    fn zero<T>(&self, apply: impl FnOnce(&mut State) -> Result<T, EngineError>) -> Result<T, EngineError> {
        self.with_freeing(|state, _| {
            self.ensure_healthy()?;
            let zeroed = apply(state);
            // Also after a failure: what was changed before it stands.
            state.publish_records();
            zeroed
        })
        .map_err(EngineError::of_change)
    }

    /// Plans to give the top image an L2 table of its own; `Ready(None)` if it has one.
    ///
    /// # Errors
    /// As for [`Engine::plan_write`].
    pub fn plan_table(
        &self,
        slot: TableSlot,
        turn: &Turn,
        waker: &Waker,
    ) -> Result<Answer<Option<TablePlan>>, EngineError> {
        self.change(|state, wakes| state.plan_table(slot, turn, waker, wakes))
    }

    /// The table's cluster is allocated on the host.
    pub fn commit_table(&self, plan: TablePlan) {
        self.with(|state, wakes| state.commit_table(plan, wakes));
    }

    /// The table's cluster could not be allocated on the host.
    pub fn abort_table(&self, plan: TablePlan) {
        self.with(|state, wakes| state.abort_table(plan, wakes));
    }

    /// Plans to reserve clusters for the requests in the line; `Ready(None)` if this one does not wait in it. Requests
    /// behind the first only wait.
    ///
    /// # Errors
    /// As for [`Engine::plan_write`], [`EngineError::RefcountTableFull`] and [`EngineError::FileTooLarge`].
    pub fn plan_reserve(
        &self,
        turn: &Turn,
        waker: &Waker,
    ) -> Result<Answer<Option<ReservePlan>>, EngineError> {
        self.change(|state, _| state.plan_reserve(turn, waker))
    }

    /// A request that got a turn has its plan, or has failed: others are served.
    pub fn end_turn(&self, turn: &Turn) {
        if turn.is_open() {
            self.with(|state, wakes| {
                let write = state.write.as_mut().expect("only plans of writable images give turns");
                write.end_turn(turn, wakes);
            });
        }
    }

    /// The file has the planned length, and space for the planned metadata is allocated.
    pub fn commit_reserve(&self, plan: ReservePlan) {
        self.with(|state, wakes| state.commit_reserve(plan, wakes));
    }

    /// The host could not set the length or allocate the space. `length`: that of the file in bytes, if it was set.
    pub fn abort_reserve(&self, plan: ReservePlan, length: Option<u64>) {
        self.with(|state, wakes| state.abort_reserve(plan, length, wakes));
    }

    /// The host had no room for a window: makes the next one minimal. False if this one already was.
    pub fn shrink_window(&self) -> bool {
        self.with(|state, _| state.write.as_mut().is_some_and(|write| write.alloc.shrink_window()))
    }

    /// A flush arrives, for everything acknowledged so far. The ticket goes to [`Engine::plan_flush`].
    ///
    /// # Errors
    /// The disk has failed or is read-only.
    pub fn begin_flush(&self) -> Result<u64, EngineError> {
        self.ensure_healthy()?;
        self.with(|state, _| Ok(state.write_state()?.flush.ticket()))
    }

    /// The next step of a flush.
    ///
    /// # Errors
    /// The disk has failed.
    pub fn plan_flush(&self, ticket: u64, waker: &Waker) -> Result<FlushStep, EngineError> {
        self.with(|state, _| {
            self.ensure_healthy()?;
            state.plan_flush(&self.epochs, ticket, waker)
        })
    }

    /// A cut is durable.
    pub fn commit_cut(&self, cut: &FlushCut) {
        self.with_freeing(|state, wakes| state.commit_cut(cut, wakes));
    }

    /// A cut failed for lack of space: everything in it is dirty again.
    pub fn fail_cut(&self, cut: &FlushCut, stage: Stage) {
        self.with(|state, wakes| state.fail_cut(cut, stage, wakes));
    }

    /// Plans to reclaim freed clusters; `Ready(None)` if none can be reclaimed now.
    ///
    /// # Errors
    /// The disk has failed; a refcount that is zero already.
    pub fn plan_reclaim(&self, waker: &Waker) -> Result<Answer<Option<ReclaimPlan>>, EngineError> {
        self.change(|state, _| state.plan_reclaim(&self.epochs, waker))
    }

    /// The runs are punched where `punched` is true (one item for each run).
    pub fn commit_reclaim(&self, plan: ReclaimPlan, punched: &[bool]) {
        self.with(|state, wakes| state.commit_reclaim(plan, punched, wakes));
    }

    /// At a clean end, with no request in flight: frees the reserved clusters that were not used.
    ///
    /// # Errors
    /// The disk has failed or is read-only.
    pub fn release_windows(&self, waker: &Waker) -> Result<Answer<()>, EngineError> {
        self.change(|state, _| state.release_windows(waker))
    }

    /// At a clean end: the length in bytes to cut the file to; `None` to leave it. `present` is its length now. If this
    /// session neither found nor made it so long, its end holds bytes that the refcounts do not know: it is not cut.
    ///
    /// The engine does not change. If the cut fails, the disk can be used on. After the cut nothing may be reserved.
    ///
    /// # Errors
    /// The disk is read-only.
    pub fn closed_length(&self, present: u64) -> Result<Option<u64>, EngineError> {
        self.with(|state, _| {
            let alloc = &state.write_state()?.alloc;
            let length = alloc.end_in_use() << self.unit_bits;
            Ok((length < present && alloc.was_so_long(present)).then_some(length))
        })
    }

    /// The file has the length that a cut named, or (`None`) could not be made longer: then the next cut tries again.
    pub fn file_was_lengthened(&self, length: Option<u64>) {
        self.with(|state, wakes| {
            if let Some(write) = &mut state.write {
                length.into_iter().for_each(|length| write.alloc.note_length(length));
                write.end_reserving(wakes);
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
                quarantined_clusters: write.alloc.quarantine().held_back().clusters,
                quarantined_max: write.alloc.quarantine().clusters_max(),
                reserved_clusters: write.alloc.reserved_clusters(),
                reclaimable: write.alloc.quarantine().is_reclaimable(),
                searching: write.alloc.touched().is_some(),
                cuts: write.flush.completed(),
                map_bytes,
            }
        })
    }

    /// Whether the map has memory that [`Engine::sweep_map`] could give back once it is unused. Takes no lock; the
    /// thread that filled the map sees it at once.
    pub fn map_is_sweepable(&self) -> bool {
        self.map.is_sweepable()
    }

    /// Sweeps a part of the map, from `from` on (0, then [`IdleMap::next`]), for memory that was not used since the
    /// last sweep. The mappings in it are resolved again when they are needed.
    pub fn sweep_map(&self, from: usize) -> IdleMap<'_> {
        IdleMap { engine: self, swept: self.with(|state, _| state.map_writer.sweep(&self.map, from)) }
    }
}
