//! The search for leaks while the disk is in use: clusters that a crash left counted although nothing names them.
//!
//! A [`LeakSearch`] counts references without a lock. The engine locates the tables, copies the slices that are in
//! memory, and notes which clusters it touches meanwhile. It frees leaks in the same way as unlinked clusters. Why
//! everything that is found is a leak: docs/concurrency.md, "The search for leaks".

use std::collections::VecDeque;
use std::ops::Range;

use qcow2::{EntryError, Geometry, HostCluster, HostOffset, L1Entry, L2Entry, RawL2Entry};
use thiserror::Error;

use crate::Engine;
use crate::bounds::{LEAK_CLUSTERS_AT_ONCE, LEAK_PIECE, LEAKS_AT_ONCE};
use crate::entries::UsedEntry;
use crate::error::{EngineError, Structure};
use crate::free::TAIL_BYTES;
use crate::guard::MetadataRun;
use crate::rules::reuse;
use crate::run::HostRun;
use crate::state::State;
use crate::tables::TableId;

/// From this number on, the references to a cluster are not counted, and the cluster is left alone.
const REFERENCES_MAX: u8 = u8::MAX;
/// The most clusters with too low a count that are noted. More are damage, whatever was written meanwhile.
const TOO_LOW_MAX: usize = 4096;

/// Why a search for leaks stops early. That is no failure of the disk, which continues to be served.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum LeakSearchEnd {
    /// It was cancelled, or too much was written meanwhile.
    #[error("it was called off")]
    CalledOff,
    /// A table entry is invalid.
    #[error("{structure}, entry {index}: {source}")]
    BadEntry {
        /// The table.
        structure: Structure,
        /// The entry's number in it.
        index: u64,
        /// Why.
        source: EntryError,
    },
    /// More references than the refcount, or a refcount that no crash leaves.
    #[error("the refcount of cluster {cluster:#x} is {refcount}, and {references} references were found")]
    WrongRefcount {
        /// Host cluster number.
        cluster: u64,
        /// The refcount in the image.
        refcount: u64,
        /// The references that the search counted.
        references: u64,
    },
    /// A cluster that nothing names holds metadata.
    #[error("cluster {cluster:#x} is named by nothing, and holds metadata: {holds}")]
    Metadata {
        /// Host cluster number.
        cluster: u64,
        /// What it holds.
        holds: Structure,
    },
}

/// A table of the top image that changes while the disk is in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LiveTable {
    /// The L2 table of this entry of the active L1 table.
    L2(u64),
    /// The refblock of this entry of the refcount table.
    Refblock(u64),
}

/// A part of a table: its location, and its slices in memory.
#[derive(Debug)]
pub struct SeenTable {
    /// Where the part is in the file.
    pub offset: HostOffset,
    /// Bytes of a slice.
    pub slice_bytes: usize,
    /// The slices that are in memory; `None` for the others. Those may be read from the file while the caller stays in
    /// its epoch.
    pub slices: Vec<Option<Box<[u8]>>>,
}

/// A cluster whose count is higher than its references.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leak {
    cluster: u64,
    /// By how much its count is too high.
    times: u8,
    /// Nothing names the cluster.
    whole: bool,
}

/// Counts the references to a range of the file's clusters.
pub struct LeakSearch {
    geometry: Geometry,
    range: Range<u64>,
    /// References to each cluster, up to [`REFERENCES_MAX`].
    references: Vec<u8>,
    /// A bit for each cluster: an entry with a flag for "not shared" names it.
    flagged: Vec<u64>,
    leaks: VecDeque<Leak>,
    /// Clusters with a count below their references: damage, unless they were changed meanwhile.
    too_low: Vec<LeakSearchEnd>,
    /// If not all leaks were noted: the cluster from which on they were not.
    stopped_at: Option<u64>,
}

impl LeakSearch {
    fn new(geometry: Geometry, range: Range<u64>) -> Self {
        let clusters = (range.end - range.start) as usize;
        LeakSearch {
            geometry,
            range,
            references: vec![0; clusters],
            flagged: vec![0; clusters.div_ceil(64)],
            leaks: VecDeque::new(),
            too_low: Vec::new(),
            stopped_at: None,
        }
    }

    /// The clusters searched.
    pub fn range(&self) -> Range<u64> {
        self.range.clone()
    }

    /// Where the next search begins.
    pub fn next(&self) -> u64 {
        self.stopped_at.unwrap_or(self.range.end)
    }

    /// True if leaks that were found have not been freed yet.
    pub fn has_leaks(&self) -> bool {
        !self.leaks.is_empty()
    }

    fn place(&self, cluster: u64) -> Option<usize> {
        self.range.contains(&cluster).then(|| (cluster - self.range.start) as usize)
    }

    /// Excludes clusters that hold metadata permanently.
    pub fn exclude(&mut self, run: HostRun) {
        let end = run.start.0.saturating_add(run.count).min(self.range.end);
        for cluster in run.start.0.max(self.range.start)..end {
            self.references[(cluster - self.range.start) as usize] = REFERENCES_MAX;
        }
    }

    /// Adds `times` references to a cluster. `flagged`: by entries of the active disk that record whether it is shared.
    pub fn count(&mut self, cluster: HostCluster, flagged: bool, times: u64) {
        let Some(at) = self.place(cluster.0) else { return };
        let times = u8::try_from(times).unwrap_or(REFERENCES_MAX);
        self.references[at] = self.references[at].saturating_add(times);
        if flagged {
            self.flagged[at / 64] |= 1 << (at % 64);
        }
    }

    /// Counts the references of a piece of an L2 table, from entry `first` on. `times` L1 entries name the table;
    /// `active`: it belongs to the active disk.
    ///
    /// # Errors
    /// An entry is invalid.
    pub fn count_l2(
        &mut self,
        first: u64,
        bytes: &[u8],
        active: bool,
        times: u64,
    ) -> Result<(), LeakSearchEnd> {
        let geometry = self.geometry;
        let entries = bytes.len() as u64 / geometry.l2_entry_size();
        for index in 0..entries {
            let raw = RawL2Entry::load(bytes, index as usize, &geometry);
            if raw == RawL2Entry::default() {
                continue;
            }
            let entry = L2Entry::decode(raw, &geometry).map_err(|source| LeakSearchEnd::BadEntry {
                structure: Structure::L2,
                index: first + index,
                source,
            })?;
            let flagged = active && !matches!(entry, L2Entry::Compressed { .. });
            let Some(run) = entry.host_clusters(&geometry) else { continue };
            for cluster in run.clusters() {
                self.count(HostCluster(cluster), flagged, times);
            }
        }
        Ok(())
    }

    /// Compares a piece of a refblock, from the count of cluster `first` on, with the references counted.
    ///
    /// # Errors
    /// A count is too high by more than crashes leave, or too many counts are too low.
    pub fn compare(&mut self, first: u64, bytes: &[u8]) -> Result<(), LeakSearchEnd> {
        if self.stopped_at.is_some() {
            return Ok(());
        }
        let order = self.geometry.refcount_order;
        let entries = ((bytes.len() as u64) << 3) >> order;
        for index in
            self.range.start.max(first) - first..self.range.end.min(first + entries).max(first) - first
        {
            let cluster = first + index;
            let at = (cluster - self.range.start) as usize;
            let references = self.references[at];
            if references == REFERENCES_MAX {
                continue;
            }
            let refcount = qcow2::refcount(order, bytes, index as usize);
            let named = u64::from(references);
            if refcount < named {
                let wrong = LeakSearchEnd::WrongRefcount { cluster, refcount, references: named };
                if self.too_low.len() >= TOO_LOW_MAX {
                    return Err(wrong);
                }
                self.too_low.push(wrong);
            } else if refcount > named {
                // A count of 1 with a clear flag costs a copy, and QEMU's check reports it as an error.
                let is_flagged = self.flagged[at / 64] >> (at % 64) & 1 == 1;
                if references == 1 && is_flagged {
                    continue;
                }
                let times = u8::try_from(refcount - named).map_err(|_| LeakSearchEnd::WrongRefcount {
                    cluster,
                    refcount,
                    references: named,
                })?;
                if self.leaks.len() >= LEAKS_AT_ONCE {
                    self.stopped_at = Some(cluster);
                    return Ok(());
                }
                self.leaks.push_back(Leak { cluster, times, whole: references == 0 });
            }
        }
        Ok(())
    }
}

impl State {
    /// The end of the search for leaks: the file's end at open, or the end of its refblocks if lower.
    fn searched_end(&self) -> Option<u64> {
        let write = self.write.as_ref()?;
        let last = write.refcounts.table.used().next_back().map_or(0, |block| block.index + 1);
        let counted = last.saturating_mul(write.refcounts.geometry.refblock_entries());
        write.alloc.touched().map(|_| write.alloc.end_at_open().min(counted))
    }

    /// A part of a live table; `None` if there is no such table.
    fn look_at(&self, table: LiveTable, slices: Range<u32>) -> Result<Option<SeenTable>, EngineError> {
        let write = self.write.as_ref().ok_or(EngineError::ReadOnly)?;
        let top = self.top_qcow2();
        let offset = match table {
            LiveTable::L2(index) => match top.l1_entry(index)? {
                L1Entry::Table { offset, .. } => Some(offset),
                L1Entry::Unallocated => None,
            },
            LiveTable::Refblock(block) => write.refcounts.block_offset(block)?,
        };
        let Some(offset) = offset else { return Ok(None) };
        let resident = slices.clone().map(|slice| {
            let id = match table {
                LiveTable::L2(table) => TableId::L2 { layer: top.file, table, slice },
                LiveTable::Refblock(block) => TableId::Refblock { block, slice },
            };
            reuse::seen_by_leak_search(self.tables.peek(id)).map(Box::from)
        });
        Ok(Some(SeenTable {
            slices: resident.collect(),
            offset: top.slice_offset(offset, slices.start),
            slice_bytes: top.slice_bytes() as usize,
        }))
    }

    /// Frees some leaks, and returns how many clusters.
    fn give_back(&mut self, leaks: &mut VecDeque<Leak>) -> Result<u64, LeakSearchEnd> {
        let write = self.write.as_mut().ok_or(LeakSearchEnd::CalledOff)?;
        let mut taken = 0;
        for _ in 0..LEAK_PIECE {
            if !write.alloc.quarantine().has_room_for_leaks() {
                break;
            }
            let Some(leak) = leaks.pop_front() else { break };
            let touched = write.alloc.touched().ok_or(LeakSearchEnd::CalledOff)?;
            if touched.contains(leak.cluster) {
                continue;
            }
            let run = HostRun { start: HostCluster(leak.cluster), count: 1 };
            if leak.whole
                && let Some((cluster, holds)) = write.guard.within(run)
            {
                return Err(LeakSearchEnd::Metadata { cluster, holds });
            }
            // Nothing durable names it, so any cut is late enough.
            (0..leak.times).for_each(|_| write.alloc.free_later(run.start, 0));
            taken += u64::from(leak.whole);
        }
        Ok(taken)
    }
}

impl Engine {
    /// True if the file ended with free clusters when it was opened ([`Engine::tail_at_open`]): its last writer did not
    /// close it cleanly. `counts_zero` returns whether the count of a cluster is zero now.
    pub fn ends_in_free_clusters(&self, counts_zero: impl Fn(u64) -> bool) -> bool {
        self.with(|state, _| {
            let Some(write) = &mut state.write else { return false };
            let Some(touched) = write.alloc.touched() else { return false };
            let tail = write.alloc.tail();
            let free = |cluster: u64| counts_zero(cluster) || touched.contains(cluster);
            if tail.is_empty() || !tail.clone().all(free) {
                return false;
            }
            if !tail.clone().any(|cluster| touched.contains(cluster)) {
                write.alloc.tail_is_free();
            }
            true
        })
    }

    /// Bytes of the free clusters at the end of a file in use.
    pub fn mark_bytes(&self) -> u64 {
        TAIL_BYTES.max(self.unit())
    }

    /// The clusters at the file's end at open. They are free if its last writer did not close it.
    pub fn tail_at_open(&self) -> Range<u64> {
        self.with(|state, _| state.write.as_ref().map_or(0..0, |write| write.alloc.tail()))
    }

    /// Begins to count the references to the clusters from `from` on. `None` if there are no more, or there is nothing
    /// to search.
    pub fn leak_search(&self, from: u64) -> Option<LeakSearch> {
        self.with(|state, _| {
            let end = state.searched_end()?;
            let geometry = state.top_qcow2().geometry;
            (from < end)
                .then(|| LeakSearch::new(geometry, from..end.min(from.saturating_add(LEAK_CLUSTERS_AT_ONCE))))
        })
    }

    /// Some of the metadata from a cluster on, in order. An empty list: there is no more.
    pub fn metadata_from(&self, from: u64) -> Vec<MetadataRun> {
        self.with(|state, _| {
            state.write.as_ref().map_or(Vec::new(), |write| write.guard.runs_from(from, LEAK_PIECE))
        })
    }

    /// Some of the tables that the active L1 table names from an entry on, in order: the entry's index and the cluster.
    /// An empty list: there are no more.
    ///
    /// # Errors
    /// A bad entry.
    pub fn active_tables_from(&self, from: u64) -> Result<Vec<(u64, HostCluster)>, LeakSearchEnd> {
        self.with(|state, _| {
            let top = state.top_qcow2();
            let mut tables = Vec::new();
            for UsedEntry { index, raw } in top.l1.used_from(from).take(LEAK_PIECE) {
                let bad = |source| LeakSearchEnd::BadEntry { structure: Structure::L1, index, source };
                match L1Entry::decode(raw, &top.geometry).map_err(bad)? {
                    L1Entry::Table { offset, .. } => tables.push((index, top.geometry.host_cluster(offset))),
                    // The meaning of such bits is unknown.
                    L1Entry::Unallocated => return Err(bad(EntryError::Unaligned { raw })),
                }
            }
            Ok(tables)
        })
    }

    /// Some slices of a table; `None` if there is no such table. The caller must be in an epoch, and must stay in it
    /// until it has read the other slices from the file.
    ///
    /// # Errors
    /// A bad entry.
    pub fn look_at_table(
        &self,
        table: LiveTable,
        slices: Range<u32>,
    ) -> Result<Option<SeenTable>, EngineError> {
        self.with(|state, _| state.look_at(table, slices))
    }

    /// Frees some of the leaks that a search found, and returns how many clusters. As unlinked clusters, they become
    /// free when a cut is durable. The rest must wait until some of them are free.
    ///
    /// # Errors
    /// The result of the search is impossible: no more leaks may be freed.
    pub fn give_back_leaks(&self, search: &mut LeakSearch) -> Result<u64, LeakSearchEnd> {
        for wrong in std::mem::take(&mut search.too_low) {
            let LeakSearchEnd::WrongRefcount { cluster, .. } = wrong else { return Err(wrong) };
            let changed = self.with(|state, _| {
                let touched = state.write.as_ref().and_then(|write| write.alloc.touched());
                touched.is_none_or(|touched| touched.contains(cluster))
            });
            if !changed {
                return Err(wrong);
            }
        }
        self.with_freeing(|state, _| state.give_back(&mut search.leaks))
    }

    /// The search for leaks is over: touched clusters are no longer noted. If it was `complete`, the free clusters at
    /// the end of the file are no longer needed.
    pub fn end_leak_search(&self, complete: bool) {
        self.with(|state, _| {
            let searched = state.searched_end();
            if let Some(write) = &mut state.write {
                let tail = write.alloc.tail();
                let run = HostRun { start: HostCluster(tail.start), count: tail.end - tail.start };
                let has_counts = searched.is_some_and(|end| tail.end <= end);
                write.alloc.end_search(complete && has_counts && write.guard.within(run).is_none());
            }
        });
    }
}
