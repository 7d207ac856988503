//! Reserving windows of clusters: freed clusters, unused clusters of the file, or new ones past its end.
//!
//! Reserved clusters have a refcount of 1 in memory, so a crash leaks at most the reserved, unused clusters. If the
//! file outgrows its refblocks or its refcount table, growing adds refblocks or a larger table.

use std::collections::BTreeSet;
use std::ops::{Range, RangeInclusive};
use std::task::Waker;

use qcow2::{HostCluster, HostRange};

use crate::aimed::Known;
use crate::answer::{Answer, ready};
use crate::bounds::{DOUBTS_MAX, NEW_CLUSTERS, SCAN_CLUSTERS, SCAN_SLICES};
use crate::error::{EngineError, Structure};
use crate::free::TAIL_BYTES;
use crate::guard::MetadataGuard;
use crate::refcounts::{Refcounts, TABLE_BYTES_MAX};
use crate::run::{FreeRun, HostRun};
use crate::state::{State, WriteState};
use crate::tables::{Dirt, TableId};
use crate::turns::Turn;
use crate::waiters::WakeList;

/// The largest file in bytes: an offset in a table has 56 bits.
const FILE_BYTES_MAX: u64 = 1 << 56;

/// Clusters about to be reserved. Set the file's length, allocate the metadata on the host, then commit; or abort.
#[derive(Debug)]
#[must_use]
pub struct ReservePlan {
    /// The file must be at least this many bytes long.
    pub file_length: Option<u64>,
    /// Metadata, new or about to change. The host must allocate it now, because writing it later must not fail for
    /// lack of space.
    pub metadata: Vec<HostRange>,
    window: FreeRun,
    growth: Option<Growth>,
    pins: Vec<TableId>,
}

/// New refcount metadata at the end of the file.
#[derive(Debug)]
struct Growth {
    /// Each block's index in the refcount table, and its cluster.
    blocks: Vec<(u64, HostCluster)>,
    /// First cluster and number of clusters of a larger refcount table.
    table: Option<HostRun>,
    /// All clusters of the new metadata.
    run: HostRun,
}

impl Growth {
    /// Adds the new metadata to the guard.
    fn guard(&self, guard: &mut MetadataGuard) {
        let blocks = guard.add(self.run.start, self.blocks.len() as u64, Structure::Refblock);
        let table =
            self.table.map_or(Ok(()), |table| guard.add(table.start, table.count, Structure::RefcountTable));
        blocks.and(table).expect("the file grows past all metadata");
    }
}

impl State {
    /// Plans a window; `Ready(None)` if the request does not wait for one. The first request in the line plans one at a
    /// time; the others wait.
    pub fn plan_reserve(
        &mut self,
        turn: &Turn,
        waker: &Waker,
    ) -> Result<Answer<Option<ReservePlan>>, EngineError> {
        let write = self.write_state()?;
        if !write.alloc.waits_for_clusters(turn) {
            return Ok(Answer::Ready(None));
        }
        if !write.alloc.may_reserve(turn, waker) {
            return Ok(Answer::Wait);
        }
        if write.alloc.wants_new(turn) {
            return self.plan_growth(&[], waker);
        }
        if let Some(free) = write.alloc.first_free() {
            return self.plan_free_window(free, waker);
        }
        ready!(self.scan(waker)?);
        if let Some(free) = self.write_state()?.alloc.first_free() {
            return self.plan_free_window(free, waker);
        }
        self.plan_growth(&[], waker)
    }

    /// A window of clusters that are free already.
    fn plan_free_window(
        &mut self,
        free: FreeRun,
        waker: &Waker,
    ) -> Result<Answer<Option<ReservePlan>>, EngineError> {
        let wanted = self.write_state()?.alloc.window_clusters().min(free.run.count);
        let pins = self.refblock_slices(free.run.start, wanted)?;
        ready!(self.need_tables(pins.iter().copied(), waker)?);
        ready!(self.need_space(pins.iter().copied())?);
        let write = self.write_state()?;
        let window = write.alloc.take_free(wanted).expect("a free run was seen");
        let plan = ReservePlan { file_length: None, metadata: Vec::new(), window, growth: None, pins };
        Ok(Answer::Ready(Some(self.start_reserve(plan))))
    }

    fn start_reserve(&mut self, plan: ReservePlan) -> ReservePlan {
        for id in &plan.pins {
            self.tables.pin(*id);
        }
        self.write.as_mut().expect("a plan was made").alloc.begin_reserving();
        plan
    }

    /// Searches the next few refblock slices for unused clusters, up to the end of the file at open.
    fn scan(&mut self, waker: &Waker) -> Result<Answer<()>, EngineError> {
        let write = self.write_state()?;
        let Range { start: from, end } = write.alloc.unsearched();
        if from >= end {
            return Ok(Answer::Ready(()));
        }
        let to = end.min(from + SCAN_CLUSTERS.min(SCAN_SLICES * write.refcounts.slice_entries()));
        let slices = write.refcounts.slices_of(HostCluster(from), to - from)?;
        ready!(self.need_tables(slices, waker)?);
        let State { tables, write, .. } = self;
        let Some(WriteState { refcounts, alloc, guard, .. }) = write else {
            return Err(EngineError::ReadOnly);
        };
        let mut cluster = from;
        while cluster < to {
            let slice_end = to.min((cluster / refcounts.slice_entries() + 1) * refcounts.slice_entries());
            if refcounts.block_offset(refcounts.block_of(cluster))?.is_some() {
                let place = refcounts.place(cluster);
                let bytes = tables.bytes(place.table);
                for at in 0..slice_end - cluster {
                    if qcow2::refcount(refcounts.geometry.refcount_order, bytes, place.index + at as usize)
                        == 0
                    {
                        if alloc.free().is_full() {
                            // A later scan finds it when there is room again.
                            alloc.searched_to(cluster + at);
                            return Ok(Answer::Ready(()));
                        }
                        let run = HostRun { start: HostCluster(cluster + at), count: 1 };
                        if let Some(holder) = guard.within(run) {
                            return Err(EngineError::free_metadata(holder));
                        }
                        if alloc.free().contains(cluster + at) {
                            continue;
                        }
                        match guard.aimed(cluster + at) {
                            Known::Not => alloc.add_free(FreeRun { run, known_zero: false }),
                            // An entry names the cluster, and it has not been freed since.
                            Known::Surely if !alloc.free().has_left_out() => {
                                return Err(EngineError::free_data(cluster + at));
                            }
                            // An entry may name the cluster, or it was left out when it was freed: it is not handed
                            // out.
                            Known::Surely | Known::Perhaps => {}
                        }
                    }
                }
            } else if let Some(used) =
                guard.within(HostRun { start: HostCluster(cluster), count: slice_end - cluster })
            {
                // A refblock added for the end of the file would record these clusters as unused.
                return Err(EngineError::free_metadata(used));
            }
            cluster = slice_end;
        }
        alloc.searched_to(to);
        Ok(Answer::Ready(()))
    }

    /// Plans those of these refblocks that do not exist, with a window; `Ready(None)` if all exist.
    pub fn plan_refblocks(
        &mut self,
        blocks: &BTreeSet<u64>,
        waker: &Waker,
    ) -> Result<Answer<Option<ReservePlan>>, EngineError> {
        let write = self.write_state()?;
        let mut missing = Vec::new();
        for block in blocks {
            if write.refcounts.block_offset(*block)?.is_none() {
                missing.push(*block);
            }
        }
        if missing.is_empty() {
            return Ok(Answer::Ready(None));
        }
        if write.alloc.awaits_reservation(waker) {
            return Ok(Answer::Wait);
        }
        self.plan_growth(&missing, waker)
    }

    /// A window past the end of the file, and these refblocks, which do not exist and count clusters before that end.
    fn plan_growth(
        &mut self,
        refblocks: &[u64],
        waker: &Waker,
    ) -> Result<Answer<Option<ReservePlan>>, EngineError> {
        for _ in 0..DOUBTS_MAX {
            let plan = ready!(self.plan_growth_here(refblocks, waker)?);
            if let Some(plan) = plan {
                return Ok(Answer::Ready(Some(self.start_reserve(plan))));
            }
        }
        // Entries name too many clusters past the end of the file: the next request continues.
        Err(EngineError::FileTooLarge)
    }

    /// Plans a window at the present end of the file. Moves the end and returns `None` if an entry may name data there.
    fn plan_growth_here(
        &mut self,
        refblocks: &[u64],
        waker: &Waker,
    ) -> Result<Answer<Option<ReservePlan>>, EngineError> {
        ready!(self.skip_used(waker)?);
        let write = self.write_state()?;
        let (end, entries) = (write.alloc.end(), write.refcounts.geometry.refblock_entries());
        let is_new = write.refcounts.block_offset(write.refcounts.block_of(end))?.is_none();
        let grows = is_new || !refblocks.is_empty();
        let growth = if grows { Some(write.refcounts.growth(end, refblocks)?) } else { None };
        let start = end + growth.as_ref().map_or(0, |growth| growth.run.count);
        let wanted = write.alloc.window_clusters();
        // If a window is left, only its clusters must not become metadata.
        let wanted = if write.alloc.has_window() { wanted.min(NEW_CLUSTERS) } else { wanted };
        let mut count = wanted.min(entries - start % entries);
        let mut pins = Vec::new();
        if !is_new {
            pins = self.refblock_slices(HostCluster(end), start + count - end)?;
            ready!(self.need_tables(pins.iter().copied(), waker)?);
            ready!(self.need_space(pins.iter().copied())?);
            let unused = (end..start + count).take_while(|cluster| !self.is_counted(*cluster)).count() as u64;
            if end + unused <= start {
                // Another writer left counts where the refblocks would be.
                self.write_state()?.alloc.move_end(end + unused + 1);
                return Ok(Answer::Ready(None));
            }
            count = end + unused - start;
        }
        // A new refblock also records the clusters before the end as unused. Those in the file may not have been
        // searched.
        let counts_from = if is_new { end / entries * entries } else { end };
        let WriteState { guard, alloc, .. } = self.write_state()?;
        for block in refblocks {
            let counted = HostRun { start: HostCluster(block * entries), count: entries };
            if let Some(holder) = guard.within(counted) {
                return Err(EngineError::free_metadata(holder));
            }
        }
        let in_file = alloc.end_at_open().min(end).saturating_sub(counts_from);
        if let Some(holder) = guard.within(HostRun { start: HostCluster(counts_from), count: in_file }) {
            return Err(EngineError::free_metadata(holder));
        }
        if let Some(cluster) =
            (counts_from..start + count).find(|cluster| guard.aimed(*cluster) == Known::Surely)
        {
            // An entry names the cluster.
            return Err(EngineError::free_data(cluster));
        }
        // Before the end, the search does not hand out clusters that an entry may name either.
        if let Some(cluster) = (end..start + count).rev().find(|cluster| guard.aimed(*cluster) != Known::Not)
        {
            alloc.move_end(guard.past_neighbours(cluster));
            return Ok(Answer::Ready(None));
        }
        let geometry = self.top_qcow2().geometry;
        let past =
            (start + count).checked_mul(geometry.cluster_size()).filter(|past| *past <= FILE_BYTES_MAX);
        // With the free clusters at the end that mark the file as not closed: see `Allocator::marked_length`.
        let file_length =
            Some(past.ok_or(EngineError::FileTooLarge)? + TAIL_BYTES.max(geometry.cluster_size()));
        let mut metadata = Vec::new();
        if let Some(growth) = &growth {
            let length = growth.run.count * geometry.cluster_size();
            metadata.push(HostRange::new(geometry.host_offset(growth.run.start), length));
            if growth.table.is_none() {
                metadata.extend(
                    self.write_state()?.refcounts.table_places(growth.blocks.iter().map(|(block, _)| *block)),
                );
            }
        }
        let window = FreeRun { run: HostRun { start: HostCluster(start), count }, known_zero: true };
        if let Some(growth) = &growth {
            // From now on no word may direct data there.
            growth.guard(&mut self.write_state()?.guard);
        }
        Ok(Answer::Ready(Some(ReservePlan { file_length, metadata, window, growth, pins })))
    }

    /// Moves the end of the file past clusters that count as used there: leaks of an earlier writer.
    fn skip_used(&mut self, waker: &Waker) -> Result<Answer<()>, EngineError> {
        loop {
            let write = self.write_state()?;
            let end = write.alloc.end();
            if write.refcounts.block_offset(write.refcounts.block_of(end))?.is_none() {
                return Ok(Answer::Ready(()));
            }
            let slices = write.refcounts.slices_of(HostCluster(end), 1)?;
            ready!(self.need_tables(slices, waker)?);
            let used = self.used_clusters_at(end)?;
            if used == 0 {
                return Ok(Answer::Ready(()));
            }
            self.write_state()?.alloc.move_end(end + used);
        }
    }

    /// How many clusters from `start` on, up to the end of its refblock slice, are in use. The slice must be resident.
    fn used_clusters_at(&self, start: u64) -> Result<u64, EngineError> {
        let refcounts = &self.write.as_ref().ok_or(EngineError::ReadOnly)?.refcounts;
        let left = refcounts.slice_entries() - start % refcounts.slice_entries();
        Ok((start..start + left).take_while(|cluster| self.refcount(*cluster) != 0).count() as u64)
    }

    /// True if a cluster's count is not 0. Its slice must be resident, if its refblock was not just planned.
    fn is_counted(&self, cluster: u64) -> bool {
        let refcounts = &self.write.as_ref().expect("writable images only").refcounts;
        let exists = matches!(refcounts.block_offset(refcounts.block_of(cluster)), Ok(Some(_)));
        exists && self.refcount(cluster) != 0
    }

    /// A cluster's count, from a resident slice.
    pub fn refcount(&self, cluster: u64) -> u64 {
        let refcounts = &self.write.as_ref().expect("writable images only").refcounts;
        let place = refcounts.place(cluster);
        qcow2::refcount(refcounts.geometry.refcount_order, self.tables.bytes(place.table), place.index)
    }

    /// Sets a cluster's count in a resident slice.
    pub fn set_refcount(&mut self, cluster: HostCluster, count: u64) {
        let HostCluster(cluster) = cluster;
        let refcounts = &self.write.as_ref().expect("writable images only").refcounts;
        let (place, order) = (refcounts.place(cluster), refcounts.geometry.refcount_order);
        qcow2::set_refcount(order, self.tables.change(place.table), place.index, count);
        if let Some(write) = &mut self.write {
            write.alloc.touch(cluster);
        }
    }

    pub fn commit_reserve(&mut self, plan: ReservePlan, wakes: &mut WakeList) {
        for id in &plan.pins {
            self.tables.unpin(*id);
        }
        if let Some(growth) = &plan.growth {
            self.commit_growth(growth);
        }
        let run = plan.window.run;
        for cluster in run.start.0..run.start.0 + run.count {
            self.set_refcount(HostCluster(cluster), 1);
        }
        let write = self.write.as_mut().expect("a plan was made");
        write.alloc.add_window(plan.window, plan.file_length);
        write.end_reserving(wakes);
    }

    fn commit_growth(&mut self, growth: &Growth) {
        let write = self.write.as_mut().expect("a plan was made");
        let next_cut = write.flush.next_cut();
        let geometry = write.refcounts.geometry;
        if let Some(table) = growth.table {
            let (old, clusters) = (write.refcounts.table_offset, write.refcounts.table_clusters());
            let old = geometry.host_cluster(old);
            for at in 0..clusters {
                write.alloc.free_later(HostCluster(old.0 + at), next_cut);
            }
            write.guard.remove(old, clusters);
            write.refcounts.move_table(table);
        }
        let slice_bytes = write.refcounts.slice_bytes() as usize;
        let slices = write.refcounts.slices_per_block();
        for (block, cluster) in &growth.blocks {
            write.refcounts.set_block(*block, geometry.host_offset(*cluster));
            for slice in 0..slices {
                let id = TableId::Refblock { block: *block, slice };
                self.tables.insert(id, vec![0; slice_bytes].into(), Dirt::New);
            }
        }
        for cluster in growth.run.start.0..growth.run.start.0 + growth.run.count {
            self.set_refcount(HostCluster(cluster), 1);
        }
    }

    /// `length`: that of the file in bytes, if it was set. Then a clean close may cut the file.
    pub fn abort_reserve(&mut self, plan: ReservePlan, length: Option<u64>, wakes: &mut WakeList) {
        for id in &plan.pins {
            self.tables.unpin(*id);
        }
        let write = self.write.as_mut().expect("a plan was made");
        if plan.file_length.is_none() {
            write.alloc.add_free(plan.window);
        }
        length.into_iter().for_each(|length| write.alloc.was_lengthened(length));
        if let Some(growth) = &plan.growth {
            write.guard.remove(growth.run.start, growth.blocks.len() as u64);
            growth.table.iter().for_each(|table| write.guard.remove(table.start, table.count));
        }
        write.end_reserving(wakes);
    }
}

impl State {
    /// At a clean end: what is reserved and unused is free again.
    pub fn release_windows(&mut self, waker: &Waker) -> Result<Answer<()>, EngineError> {
        let windows = self.write_state()?.alloc.windows();
        let mut slices = Vec::new();
        for window in &windows {
            slices.extend(self.refblock_slices(window.run.start, window.run.count)?);
        }
        slices.dedup();
        ready!(self.need_tables(slices, waker)?);
        for window in self.write_state()?.alloc.take_windows() {
            for cluster in window.run.start.0..window.run.start.0 + window.run.count {
                self.set_refcount(HostCluster(cluster), 0);
            }
            self.write_state()?.alloc.add_free(window);
        }
        Ok(Answer::Ready(()))
    }
}

impl Refcounts {
    /// The metadata to add at cluster `end`: the refblocks from there on that do not exist, and the `wanted` ones before.
    fn growth(&self, end: u64, wanted: &[u64]) -> Result<Growth, EngineError> {
        let per_cluster = self.geometry.cluster_size() / 8;
        let entries = self.geometry.refblock_entries();
        let held = self.table.len();
        let mut blocks = 1;
        loop {
            // The new blocks must cover the metadata itself and at least one cluster of a window after it.
            let mut table = 0;
            let mut last_block = self.block_of(end + blocks);
            if last_block >= held {
                // Half as large again as the present table, so that growth stays rare, as far as the format allows.
                let most = TABLE_BYTES_MAX / self.geometry.cluster_size();
                table = (last_block + 1).max(held + held / 2).div_ceil(per_cluster).min(most);
                last_block = self.block_of(end + blocks + table);
                if last_block >= table * per_cluster {
                    table = (last_block + last_block / 8 + 2).div_ceil(per_cluster).min(most);
                    last_block = self.block_of(end + blocks + table);
                }
                if last_block >= table * per_cluster {
                    return Err(EngineError::RefcountTableFull);
                }
            }
            let mut missing: BTreeSet<u64> = wanted.iter().copied().collect();
            missing.extend(self.missing_blocks(end / entries..=last_block)?);
            if missing.len() as u64 <= blocks {
                let blocks_taken = missing.len() as u64;
                let new_blocks =
                    missing.into_iter().zip(end..).map(|(block, at)| (block, HostCluster(at))).collect();
                let table_run = HostRun { start: HostCluster(end + blocks_taken), count: table };
                return Ok(Growth {
                    blocks: new_blocks,
                    table: (table > 0).then_some(table_run),
                    run: HostRun { start: HostCluster(end), count: blocks_taken + table },
                });
            }
            blocks = missing.len() as u64;
        }
    }

    /// Those of these blocks that do not exist.
    fn missing_blocks(&self, blocks: RangeInclusive<u64>) -> Result<Vec<u64>, EngineError> {
        let mut missing = Vec::new();
        for block in blocks {
            if self.block_offset(block)?.is_none() {
                missing.push(block);
            }
        }
        Ok(missing)
    }

    /// Moves the table to a larger place, with its entries unchanged.
    fn move_table(&mut self, place: HostRun) {
        self.table.grow(place.count * self.geometry.cluster_size() / 8);
        self.table_offset = self.geometry.host_offset(place.start);
        self.table_is_new = true;
        self.header_stale = true;
        self.dirty.clear();
    }
}
