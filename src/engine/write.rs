//! Planning and committing guest writes to a qcow2 top image.

use std::ops::Range;
use std::sync::Arc;
use std::task::Waker;

use qcow2::external::data_file_place;
use qcow2::{
    Geometry, GuestCluster, GuestOffset, HostCluster, HostOffset, HostPlace, L1Entry, L2Entry, SECTOR,
    SUBCLUSTERS, SubclusterSet, Subclusters,
};

use crate::answer::{Answer, TableSlot, ready};
use crate::early::Early;
use crate::error::EngineError;
use crate::layers::EntryPlace;
use crate::locked::{Locked, TakeBack};
use crate::map::ChainMap;
use crate::rules::clusters::{self, Named, is_own};
use crate::rules::order;
use crate::state::State;
use crate::tables::TableId;
use crate::turns::Turn;
use crate::waiters::WakeList;
use crate::word::{FileIndex, Word};

/// How to do a prefix of a write.
#[derive(Debug)]
#[must_use]
pub enum WritePlan {
    /// Write the data in place; there is nothing to commit.
    InPlace {
        /// The file.
        file: FileIndex,
        /// Where.
        offset: HostOffset,
        /// Bytes of the guest's range.
        length: u64,
    },
    /// Write the data, and the rest of its granules, to the new run; then commit or drop it.
    Allocate(Allocation),
}

/// A run of granules of host clusters that will hold a prefix of a write. A granule is the smallest part of a cluster
/// that can be allocated: a subcluster with extended L2 entries, otherwise the cluster.
///
/// If it is dropped before [`crate::Engine::commit_write`], its new clusters go into quarantine, on any thread. All I/O
/// for it must have ended.
#[derive(Debug)]
#[must_use]
pub struct Allocation {
    /// The file.
    pub file: FileIndex,
    /// Where the run begins in the file.
    pub offset: HostOffset,
    /// The run reads as zero on the host, so zeros need not be written.
    pub known_zero: bool,
    /// Bytes of the run before the guest's range.
    pub head: u64,
    /// Bytes of the guest's range.
    pub length: u64,
    /// Bytes of the run after the guest's range (some may be past the end of the disk).
    pub tail: u64,
    pub(crate) cluster: GuestCluster,
    pub(crate) host: HostCluster,
    pub(crate) clusters: u64,
    /// The granules of the run, numbered from the first granule of the first cluster.
    granules: Range<u64>,
    /// The entries name these host clusters already.
    pub(crate) reuse: bool,
    pub(crate) place: EntryPlace,
    pub(crate) early: Early,
    /// Records that the journal keeps room for.
    pub(crate) records: u64,
    /// What takes the clusters back; `None` once they are committed.
    armed: Option<Arc<EngineLock>>,
}

/// The engine's lock.
pub(crate) type EngineLock = Locked<State, Dropped>;

/// What an allocation held that was dropped before its commit.
pub(crate) struct Dropped {
    host: HostCluster,
    clusters: u64,
    reuse: bool,
    table: TableId,
    early: Early,
    records: u64,
}

impl Allocation {
    /// From now on a drop gives the clusters back.
    pub(crate) fn arm(&mut self, lock: &Arc<EngineLock>) {
        self.armed = Some(Arc::clone(lock));
    }

    /// Its clusters are about to be linked: they stay.
    pub(crate) fn disarm(&mut self) {
        self.armed = None;
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        if let Some(lock) = self.armed.take() {
            let Allocation { host, clusters, reuse, place, early, records, .. } = *self;
            lock.leave(Dropped { host, clusters, reuse, table: place.table, early, records });
        }
    }
}

/// The state of a granule that a write touches.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Standing {
    /// It is allocated, in a host cluster that the top image owns.
    InPlace(HostOffset),
    /// It has a place in a host cluster that the top image owns; the bytes there do not matter.
    Reuse(HostOffset),
    /// It has no host cluster, or one of which nothing must be kept.
    New,
    /// Other granules of its cluster must be kept, but the top image does not own the host cluster.
    Copy,
}

impl Standing {
    /// The state of a granule `bytes` further on, if the run continues there.
    fn further(self, bytes: u64) -> Standing {
        match self {
            Standing::InPlace(host) => Standing::InPlace(HostOffset(host.0 + bytes)),
            Standing::Reuse(host) => Standing::Reuse(HostOffset(host.0 + bytes)),
            Standing::New | Standing::Copy => self,
        }
    }
}

/// The granules of a write: how they lie in the clusters of the top image.
#[derive(Clone, Copy)]
struct Granules {
    /// Bytes of a granule.
    size: u64,
    /// Granules in a cluster: 1 or 32.
    per_cluster: u64,
    /// Index, in its cluster, of the first granule that the write touches.
    first: u64,
}

impl Granules {
    fn of(geometry: &Geometry, offset: GuestOffset) -> Self {
        let size = geometry.granule_size();
        let per_cluster = geometry.cluster_size() / size;
        Granules { size, per_cluster, first: geometry.in_cluster(offset.0) / size }
    }
}

impl State {
    /// Plans a prefix of a write: at most up to the end of an L2 slice, and one contiguous run on the host. The caller
    /// must hold a claim on the range.
    pub fn plan_write(
        &mut self,
        offset: GuestOffset,
        length: u64,
        turn: &Turn,
        waker: &Waker,
        wakes: &mut WakeList,
    ) -> Result<Answer<WritePlan>, EngineError> {
        self.write_state()?;
        ready!(self.may_dirty());
        let top = self.top_qcow2();
        let (geometry, file) = (top.geometry, top.data());
        let first = geometry.guest_cluster(offset);
        let slot = TableSlot(geometry.l1_index(first));
        if !matches!(top.l1_entry(slot.0)?, L1Entry::Table { copied, .. } if is_own(Named::Table, copied)) {
            return Ok(Answer::Table(slot));
        }
        let place = top.entry_place(first);
        let entries_left = top.slice_entries() - place.index as u64;
        ready!(self.need_tables([place.table], waker)?);
        ready!(self.need_space([place.table])?);

        let granules = Granules::of(&geometry, offset);
        let Granules { size, per_cluster, first: begin } = granules;
        let head = offset.0 % size;
        let wanted = (head + length).div_ceil(size).min(entries_left * per_cluster - begin);
        let (standing, run) = self.run_like(place, first, granules, wanted)?;
        let covered = |end: u64| ((end - begin) * size - head).min(length);
        let end = begin + run;
        let (host, known_zero, end, span, reuse) = match standing {
            Standing::InPlace(host) => {
                let offset = HostOffset(host.0 + head);
                return Ok(Answer::Ready(WritePlan::InPlace { file, offset, length: covered(end) }));
            }
            Standing::Reuse(host) => {
                ready!(self.may_record()?);
                (geometry.host_cluster(host), clusters::is_known_zero(None), end, begin..end, true)
            }
            Standing::New | Standing::Copy => {
                ready!(self.may_free()?);
                ready!(self.may_record()?);
                let clusters = end.div_ceil(per_cluster);
                let Some(taken) = self.write_state()?.take(turn, clusters, wakes)? else {
                    return Ok(Answer::Reserve);
                };
                let end = end.min(taken.run.count * per_cluster);
                let span = if standing == Standing::Copy {
                    self.with_what_is_kept(place, first, granules, end)?
                } else {
                    begin..end
                };
                (taken.run.start, clusters::is_known_zero(Some(taken)), end, span, false)
            }
        };
        self.tables.pin(place.table);
        let length = covered(end);
        let head = head + (begin - span.start) * size;
        let whole = (span.end - span.start) * size;
        let tail = whole.min(self.room_after(first, span.start * size)).saturating_sub(head + length);
        let mut allocation = Allocation {
            file,
            offset: HostOffset(geometry.host_offset(host).0 + span.start * size),
            known_zero,
            head,
            length,
            tail,
            cluster: first,
            host,
            clusters: span.end.div_ceil(per_cluster),
            granules: span,
            reuse,
            place,
            early: self.write_state()?.flush.early.of_next(),
            records: 0,
            armed: None,
        };
        self.reserve_records(&mut allocation);
        Ok(Answer::Ready(WritePlan::Allocate(allocation)))
    }

    /// The state of a granule, and how many granules of its cluster from it on are alike.
    fn standing(
        &mut self,
        place: EntryPlace,
        first: GuestCluster,
        granules: Granules,
        number: u64,
    ) -> Result<(Standing, u64), EngineError> {
        let Granules { size, per_cluster, .. } = granules;
        let (at, index) = (number / per_cluster, number % per_cluster);
        let place = EntryPlace { index: place.index + at as usize, ..place };
        let entry = self.top_entry(place, first.0 + at)?;
        self.guard_entry(entry, first.0 + at)?;
        let left = per_cluster - index;
        let Some(subclusters) = Subclusters::of(entry) else {
            // Compressed data is never overwritten: it shares its host clusters.
            return Ok((if per_cluster > 1 { Standing::Copy } else { Standing::New }, left));
        };
        let in_use = subclusters.allocated.contains(index as u32);
        Ok(match subclusters.host.or(self.fixed_place(GuestCluster(first.0 + at))) {
            Some(HostPlace { offset, copied }) if is_own(Named::Data { in_use }, copied) => {
                let host = HostOffset(offset.0 + index * size);
                let run = u64::from(subclusters.allocated.run(index as u32)).min(left);
                if in_use { (Standing::InPlace(host), run) } else { (Standing::Reuse(host), run) }
            }
            Some(_) if per_cluster > 1 && !subclusters.allocated.is_empty() => (Standing::Copy, left),
            // The whole cluster is written to a new host cluster.
            _ => (Standing::New, left),
        })
    }

    /// The place of a cluster in an external data file, whether or not it is in use.
    fn fixed_place(&self, cluster: GuestCluster) -> Option<HostPlace> {
        let top = self.top_qcow2();
        top.data_file.map(|_| data_file_place(&top.geometry, cluster))
    }

    /// The most bytes of a run that begins `within` bytes into a cluster. An external data file is as long as the disk,
    /// in whole sectors, and nothing is written past its end.
    fn room_after(&self, cluster: GuestCluster, within: u64) -> u64 {
        let top = self.top_qcow2();
        let start = top.geometry.guest_offset(cluster).0 + within;
        match &self.write {
            Some(write) if top.data_file.is_some() => {
                write.end.next_multiple_of(SECTOR).saturating_sub(start)
            }
            _ => u64::MAX,
        }
    }

    /// The state of the first granule, and how many from it on (at most `wanted`) are alike. Those that have a place on
    /// the host must also be contiguous there.
    fn run_like(
        &mut self,
        place: EntryPlace,
        first: GuestCluster,
        granules: Granules,
        wanted: u64,
    ) -> Result<(Standing, u64), EngineError> {
        let (like, mut run) = self.standing(place, first, granules, granules.first)?;
        while run < wanted {
            let (standing, more) = self.standing(place, first, granules, granules.first + run)?;
            if standing != like.further(run * granules.size) {
                break;
            }
            run += more;
        }
        Ok((like, run.min(wanted)))
    }

    /// The granules to write if the touched ones, up to `end`, move to new clusters. In the first and the last cluster,
    /// that includes everything from the first allocated granule to the last.
    fn with_what_is_kept(
        &self,
        place: EntryPlace,
        first: GuestCluster,
        granules: Granules,
        end: u64,
    ) -> Result<Range<u64>, EngineError> {
        let per_cluster = granules.per_cluster;
        let last = (end - 1) / per_cluster;
        let kept = |at: u64| -> Result<_, EngineError> {
            let place = EntryPlace { index: place.index + at as usize, ..place };
            let subclusters = Subclusters::of(self.top_entry(place, first.0 + at)?);
            let hull = subclusters.map_or(0..per_cluster as u32, |subclusters| subclusters.allocated.hull());
            Ok(at * per_cluster + u64::from(hull.start)..at * per_cluster + u64::from(hull.end))
        };
        Ok(clusters::span_to_write(granules.first..end, kept(0)?.start..kept(last)?.end))
    }

    /// Publishes an allocation whose bytes have been written.
    pub fn commit_write(&mut self, map: &ChainMap, done: Allocation, wakes: &mut WakeList) {
        self.write.as_mut().expect("a plan was made").flush.end_early(done.early, wakes);
        self.record_links(&done);
        for at in 0..done.clusters {
            let (place, guest, entry) = self.link(&done, at);
            if !done.reuse {
                self.release_old(place, guest);
            }
            if done.early == Early::Begun {
                self.set_linked_entry(place, entry);
            } else if self.may_precede_data(map, &done, guest) {
                self.set_entry_unordered(place, entry);
            } else {
                self.set_top_entry(place, entry);
            }
            self.publish_entry(map, guest, entry);
        }
        self.tables.unpin(done.place.table);
        self.write.as_mut().expect("a plan was made").flush.early.note_allocation(done.early);
    }

    /// True if the link of an allocation's cluster may become durable before the data: the guest then reads zeros, as
    /// it would without the write.
    pub(crate) fn may_precede_data(&self, map: &ChainMap, new: &Allocation, guest: GuestCluster) -> bool {
        order::link_may_precede_data(new.known_zero && !new.reuse, map.lookup(guest) == Word::ZERO)
    }

    /// For a cluster of an allocation: the place of its entry, its guest cluster, and its entry once the data is
    /// written.
    pub(crate) fn link(&self, new: &Allocation, at: u64) -> (EntryPlace, GuestCluster, L2Entry) {
        let place = EntryPlace { index: new.place.index + at as usize, ..new.place };
        let guest = GuestCluster(new.cluster.0 + at);
        let offset = self.top_qcow2().geometry.host_offset(HostCluster(new.host.0 + at));
        (place, guest, self.written_entry(place, guest, new, at, offset))
    }

    /// The new entry of cluster number `at` of an allocation whose bytes have been written.
    fn written_entry(
        &self,
        place: EntryPlace,
        guest: GuestCluster,
        done: &Allocation,
        at: u64,
        offset: HostOffset,
    ) -> L2Entry {
        let host = HostPlace { offset, copied: true };
        if !self.top_qcow2().geometry.extended_l2 {
            return L2Entry::Data { offset, copied: true };
        }
        let of_cluster = u64::from(SUBCLUSTERS);
        let within = |number: u64| number.saturating_sub(at * of_cluster).min(of_cluster) as u32;
        let written = SubclusterSet::range(within(done.granules.start)..within(done.granules.end));
        let old = self.top_entry(place, guest.0).ok().and_then(Subclusters::of);
        let new = clusters::after_write(old.unwrap_or(Subclusters::NONE), written, done.reuse);
        Subclusters { host: Some(host), ..new }.entry()
    }

    /// The early commit of an allocation, if there was one, has ended, but the entry on disk differs, or may
    /// differ, from the final entry. The slice is written again, with its links after the data.
    pub fn forget_early_link(&mut self, early: &mut Early, table: TableId, wakes: &mut WakeList) {
        if *early != Early::Begun {
            return;
        }
        let flush = &mut self.write.as_mut().expect("a plan was made").flush;
        flush.end_early(*early, wakes);
        *early = Early::No;
        if order::aborted_link_is_dirty() {
            flush.links_follow_data();
            self.tables.change(table);
        }
    }

    /// Puts the host clusters that an entry references, if any, into quarantine, because the entry is about to change.
    /// Each loses one reference. A cluster with other references becomes free only when the last one is gone.
    pub fn release_old(&mut self, place: EntryPlace, guest: GuestCluster) {
        let Ok(entry) = self.top_entry(place, guest.0) else { return };
        let Some(run) = self.counted_clusters(entry) else { return };
        let lost = clusters::references_lost(matches!(entry, L2Entry::Compressed { .. }), run);
        let write = self.write.as_mut().expect("a plan was made");
        for host in lost.run.clusters() {
            for _ in 0..lost.times {
                write.alloc.free_later(HostCluster(host), write.flush.next_cut());
            }
        }
    }
}

impl TakeBack<Dropped> for State {
    /// Takes an allocation back. Data may have been written to its clusters, so they are not known to be zero.
    fn take_back(&mut self, mut dropped: Dropped, wakes: &mut WakeList) {
        self.forget_early_link(&mut dropped.early, dropped.table, wakes);
        self.tables.unpin(dropped.table);
        let write = self.write.as_mut().expect("a plan was made");
        write.journal.release(dropped.records);
        if dropped.reuse {
            return;
        }
        // An early commit may have left a link to it on the disk. Then the slice has been dirty since before any cut
        // that may free the cluster, so 0 is late enough.
        for at in 0..dropped.clusters {
            write.alloc.free_later(HostCluster(dropped.host.0 + at), 0);
        }
        self.note_wanted_cut();
    }
}
