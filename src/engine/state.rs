//! The engine's locked state, and the checks of tables that every plan needs.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Waker;

use qcow2::{GuestCluster, HostCluster, HostOffset, L1Entry, L2Entry, RawL2Entry};

use crate::alloc::Allocator;
use crate::answer::{Answer, TableLoad, TablePlace, TableSlot};
use crate::bounds::LOADS_MAX;
use crate::cut::FlushState;
use crate::error::{EngineError, Proof, Structure};
use crate::fill::FillJob;
use crate::guard::MetadataGuard;
use crate::hashed::HashMap;
use crate::journal::Journal;
use crate::layers::{EntryPlace, Layer, Qcow2Layer};
use crate::map::{MapWriter, SliceIndex};
use crate::refcounts::Refcounts;
use crate::run::{FreeRun, HostRun};
use crate::tables::{Found, TableId, Tables};
use crate::turns::{TableJob, Turn, Wanted};
use crate::waiters::WakeList;

/// Everything behind the engine's one lock, which is held for work in memory only, never across I/O.
pub(crate) struct State {
    pub layers: Vec<Layer>,
    pub tables: Tables,
    pub map_writer: MapWriter,
    /// Fills of map slices that wait for tables.
    pub fills: HashMap<SliceIndex, FillJob>,
    /// With more bytes of dirty tables than this, plans require a flush first.
    pub dirty_bytes_max: usize,
    /// The top image may be written, whatever its format.
    pub writable: bool,
    /// Present if the top image is a qcow2 image open for writing.
    pub write: Option<WriteState>,
    /// A cut is due, because many freed clusters wait for one. Stored under the engine's lock, read without.
    pub wants_cut: Arc<AtomicBool>,
}

/// The state that only a writable qcow2 top image has.
pub(crate) struct WriteState {
    pub refcounts: Refcounts,
    pub alloc: Allocator,
    pub guard: MetadataGuard,
    pub flush: FlushState,
    pub journal: Journal,
    /// L2 tables that are becoming the top image's own.
    pub table_jobs: HashMap<TableSlot, TableJob>,
    /// Where the L1 table lies.
    pub l1_offset: HostOffset,
    /// L1 blocks that differ from the disk.
    pub l1_dirty: BTreeSet<u64>,
    /// See [`crate::TopSpec`].
    pub keep_discarded: bool,
    /// See [`crate::Engine::set_end`].
    pub end: u64,
}

impl WriteState {
    /// Takes a run of up to `want` clusters out of the reserved windows, for data; `None` if the request must wait for
    /// its turn.
    ///
    /// # Errors
    /// If one of them holds metadata: two entries of a damaged image named it, so it became free while in use.
    pub fn take(
        &mut self,
        turn: &Turn,
        want: u64,
        wakes: &mut WakeList,
    ) -> Result<Option<FreeRun>, EngineError> {
        let Some(taken) = self.alloc.take(turn, want) else { return Ok(None) };
        self.guard.aim(taken.run).map_err(EngineError::free_metadata)?;
        let guard = &self.guard;
        self.alloc.taken(turn, taken.run.count, |cluster| guard.may_become_metadata(cluster), wakes);
        Ok(Some(taken))
    }

    /// Takes a cluster for an L2 table: one at which surely no data I/O was aimed in this session. `None` if the request
    /// must wait for its turn.
    ///
    /// # Errors
    /// As for [`WriteState::take`].
    pub fn take_for_table(
        &mut self,
        turn: &Turn,
        slot: TableSlot,
        wakes: &mut WakeList,
    ) -> Result<Option<HostRun>, EngineError> {
        let guard = &self.guard;
        let fits = |cluster| guard.may_become_metadata(cluster);
        let Some(FreeRun { run, .. }) = self.alloc.take_for_table(turn, slot, fits, wakes) else {
            return Ok(None);
        };
        self.guard.add(run.start, run.count, Structure::L2).map_err(EngineError::free_metadata)?;
        let guard = &self.guard;
        self.alloc.taken(turn, run.count, |cluster| guard.may_become_metadata(cluster), wakes);
        Ok(Some(run))
    }

    /// The task that reserved, or made the file longer, has ended.
    pub fn end_reserving(&mut self, wakes: &mut WakeList) {
        let WriteState { guard, alloc, .. } = self;
        alloc.end_reserving(|cluster| guard.may_become_metadata(cluster), wakes);
    }

    /// A request no longer plans: its clusters and its place in the line go to others, as does the making of its table.
    pub fn end_turn(&mut self, turn: &Turn, wakes: &mut WakeList) {
        let number = turn.number();
        let WriteState { guard, alloc, .. } = self;
        let ended = alloc.end_turn(turn, |cluster| guard.may_become_metadata(cluster), wakes);
        if let Some(Wanted::Table(slot)) = ended
            && self.table_jobs.get(&slot).is_some_and(|job| job.turn == number)
        {
            wakes.append(self.table_jobs.remove(&slot).expect("it was just found").waiters.take());
        }
    }
}

/// Table slices that a plan lacks.
#[derive(Default)]
pub(crate) struct Missing {
    absent: Vec<TableId>,
    loading: Vec<TableId>,
    /// How many of the absent slices are surely needed; `None`: all of them.
    needed: Option<usize>,
}

impl Missing {
    pub fn any(&self) -> bool {
        !self.absent.is_empty() || !self.loading.is_empty()
    }

    pub fn full(&self) -> bool {
        self.absent.len() >= LOADS_MAX
    }

    /// Slices noted from now on are only likely to be needed.
    pub fn look_ahead(&mut self) {
        self.needed.get_or_insert(self.absent.len());
    }

    /// Notes a slice unless it is resident; true if it is.
    pub fn note(&mut self, id: TableId, found: &Found<'_>) -> bool {
        match found {
            Found::Ready(_) => return true,
            Found::Loading => self.loading.push(id),
            Found::Missing if self.full() || self.absent.contains(&id) => {}
            Found::Missing => self.absent.push(id),
        }
        false
    }
}

impl State {
    pub fn top(&self) -> Option<&Qcow2Layer> {
        match self.layers.first() {
            Some(Layer::Qcow2(layer)) => Some(layer),
            _ => None,
        }
    }

    /// The top image, where the caller knows that it is a qcow2 image.
    pub fn top_qcow2(&self) -> &Qcow2Layer {
        self.top().expect("plans that change tables are asked of qcow2 images only")
    }

    pub fn top_qcow2_mut(&mut self) -> &mut Qcow2Layer {
        match self.layers.first_mut() {
            Some(Layer::Qcow2(layer)) => layer,
            _ => panic!("plans that change tables are asked of qcow2 images only"),
        }
    }

    /// For plans that will make tables dirty: `Flush` if too many are dirty already.
    pub fn may_dirty(&self) -> Answer<()> {
        if self.tables.dirty_bytes() > self.dirty_bytes_max { Answer::Flush } else { Answer::Ready(()) }
    }

    /// After changes that may make a cut due, or no longer due.
    pub fn note_wanted_cut(&mut self) {
        let wants = self
            .write
            .as_ref()
            .is_some_and(|write| write.alloc.quarantine().wants_cut() || write.journal.wants_cut());
        // Relaxed: it orders nothing. A reader that misses this value sees it after the next change.
        self.wants_cut.store(wants, Ordering::Relaxed);
    }

    /// Wakes all tasks that wait for anything under this lock, as the disk has failed: changes find that, reads wait again.
    pub fn wake_all(&mut self, wakes: &mut WakeList) {
        self.tables.wake_all(wakes);
        let Some(write) = &mut self.write else { return };
        write.alloc.wake_all(wakes);
        write.flush.wake_all(wakes);
        write.table_jobs.values_mut().for_each(|job| wakes.append(job.waiters.take()));
    }

    pub fn write_state(&mut self) -> Result<&mut WriteState, EngineError> {
        self.write.as_mut().ok_or(EngineError::ReadOnly)
    }

    /// True if anything lies below the top image.
    pub fn has_backing(&self) -> bool {
        self.layers.len() > 1
    }

    /// The answer to a plan that lacks tables: load the absent slices, or wait for those that other tasks load.
    pub fn ask_for<T>(&mut self, missing: Missing, waker: &Waker) -> Result<Answer<T>, EngineError> {
        if missing.absent.is_empty() {
            for id in missing.loading {
                self.tables.wait_load(id, waker);
            }
            return Ok(Answer::Wait);
        }
        let mut loads = Vec::with_capacity(missing.absent.len());
        let needed = missing.needed.unwrap_or(missing.absent.len());
        for (number, id) in missing.absent.iter().enumerate() {
            loads.push(TableLoad { ahead: number >= needed, ..self.load_of(*id)? });
        }
        for id in missing.absent {
            self.tables.begin_load(id);
        }
        Ok(Answer::Load(loads))
    }

    /// Ends the load of a slice; `bytes` is `None` if it failed.
    pub fn end_load(&mut self, load: &TableLoad, bytes: Option<Box<[u8]>>, wakes: &mut WakeList) {
        let of_top = match load.table {
            TableId::L2 { layer, .. } => self.layers[0].file() == layer,
            TableId::Refblock { .. } => true,
        };
        self.tables.end_load(load.table, bytes, (load.ahead, of_top), wakes);
    }

    /// The load of a slice. Its table must exist.
    fn load_of(&self, id: TableId) -> Result<TableLoad, EngineError> {
        match id {
            TableId::L2 { layer, table, slice } => {
                let Some(Layer::Qcow2(layer)) = self.layers.iter().find(|other| other.file() == layer) else {
                    panic!("L2 slices are asked of qcow2 layers only")
                };
                let L1Entry::Table { offset, .. } = layer.l1_entry(table)? else {
                    panic!("slices of existing tables only")
                };
                let length = layer.slice_bytes() as usize;
                Ok(TableLoad {
                    table: id,
                    file: layer.file,
                    offset: layer.slice_offset(offset, slice),
                    length,
                    ahead: false,
                })
            }
            TableId::Refblock { block, slice } => {
                let top = self.top_qcow2();
                let write = self.write.as_ref().ok_or(EngineError::ReadOnly)?;
                let offset = write.refcounts.block_offset(block)?.expect("slices of existing refblocks only");
                let length = top.slice_bytes() as usize;
                Ok(TableLoad {
                    table: id,
                    file: top.file,
                    offset: top.slice_offset(offset, slice),
                    length,
                    ahead: false,
                })
            }
        }
    }

    /// Checks that these slices are resident; otherwise requests those that are not.
    pub fn need_tables(
        &mut self,
        ids: impl IntoIterator<Item = TableId>,
        waker: &Waker,
    ) -> Result<Answer<()>, EngineError> {
        let mut missing = Missing::default();
        for id in ids {
            let found = self.tables.find(id);
            missing.note(id, &found);
        }
        if missing.any() { self.ask_for(missing, waker) } else { Ok(Answer::Ready(())) }
    }

    /// Checks that the host has allocated these resident slices of the top image, which are about to change: a cut must
    /// not need space. Otherwise requests the allocation.
    pub fn need_space(&self, ids: impl IntoIterator<Item = TableId>) -> Result<Answer<()>, EngineError> {
        let length = self.top_qcow2().slice_bytes();
        let mut places = Vec::new();
        for id in ids.into_iter().filter(|id| self.tables.is_hole(*id)) {
            places.push(TablePlace { table: id, offset: self.place_on_disk(id)?, length });
        }
        Ok(if places.is_empty() { Answer::Ready(()) } else { Answer::Allocate(places) })
    }

    /// For plans that may put clusters into quarantine: `Crowded` if the quarantine is full.
    pub fn may_free(&mut self) -> Result<Answer<()>, EngineError> {
        let crowded = self.write_state()?.alloc.quarantine().is_crowded();
        Ok(if crowded { Answer::Crowded } else { Answer::Ready(()) })
    }

    /// The refblock slices that hold the counts of a run of clusters, without those whose refblock does not exist.
    pub fn refblock_slices(&self, start: HostCluster, count: u64) -> Result<Vec<TableId>, EngineError> {
        let write = self.write.as_ref().ok_or(EngineError::ReadOnly)?;
        write.refcounts.slices_of(start, count)
    }

    /// Refuses an L2 entry of the top image that names metadata: nothing may be written or freed there. Otherwise the
    /// clusters that it names cannot become metadata from now on.
    pub fn guard_entry(&mut self, entry: L2Entry, guest: u64) -> Result<(), EngineError> {
        let Some(run) = self.counted_clusters(entry) else { return Ok(()) };
        let Some(write) = &mut self.write else { return Ok(()) };
        write.guard.aim(run).map_err(|(cluster, holds)| {
            Proof::Overlap { structure: Structure::L2, index: guest, cluster, holds }.into()
        })
    }

    /// The clusters of the top image's own file whose refcounts count this entry. Clusters of an external data file
    /// have no refcounts.
    pub fn counted_clusters(&self, entry: L2Entry) -> Option<HostRun> {
        let top = self.top_qcow2();
        if top.data_file.is_some() { None } else { entry.host_clusters(&top.geometry) }
    }

    /// The decoded L2 entry at a place in a resident slice of the top image.
    pub fn top_entry(&self, place: EntryPlace, cluster: u64) -> Result<L2Entry, EngineError> {
        decode_l2(self.top_qcow2(), self.tables.bytes(place.table), place.index, cluster)
    }

    /// Changes an L2 entry of the top image in a resident slice.
    pub fn set_top_entry(&mut self, place: EntryPlace, entry: L2Entry) {
        if let Some(write) = &mut self.write {
            write.flush.links_follow_data();
        }
        self.set_entry_unordered(place, entry);
    }

    /// The same for an entry that is on the disk already, in a slice that was clean before.
    pub fn set_linked_entry(&mut self, place: EntryPlace, entry: L2Entry) {
        let (geometry, raw) = (self.top_qcow2().geometry, self.top_qcow2().encode_entry(entry));
        raw.store(self.tables.change_as_written(place.table), place.index, &geometry);
    }

    /// The same for an entry that may become durable before the data that it names: docs/durability.md, "One fdatasync
    /// where it is enough".
    pub fn set_entry_unordered(&mut self, place: EntryPlace, entry: L2Entry) {
        let (geometry, raw) = (self.top_qcow2().geometry, self.top_qcow2().encode_entry(entry));
        raw.store(self.tables.change(place.table), place.index, &geometry);
    }
}

/// Decodes the L2 entry at an index of a slice, naming it in the error.
pub(crate) fn decode_l2(
    layer: &Qcow2Layer,
    slice: &[u8],
    index: usize,
    cluster: u64,
) -> Result<L2Entry, EngineError> {
    layer.decode_entry(RawL2Entry::load(slice, index, &layer.geometry), GuestCluster(cluster))
}
