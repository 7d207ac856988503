//! Planning and committing guest writes to a qcow2 top image.

use std::ops::Range;
use std::task::Waker;

use qcow2::external::data_file_place;
use qcow2::{
    Geometry, GuestCluster, GuestOffset, HostCluster, HostOffset, HostPlace, L1Entry, L2Entry, SUBCLUSTERS,
    SubclusterSet, Subclusters,
};

use crate::answer::{Answer, TableSlot, ready};
use crate::early::Early;
use crate::error::EngineError;
use crate::layers::EntryPlace;
use crate::map::ChainMap;
use crate::mutation::{Mutation, active};
use crate::state::State;
use crate::waiters::WakeList;
use crate::word::FileIndex;

/// The least unit of I/O in bytes.
const SECTOR: u64 = 512;

/// What to do for a prefix of a write.
#[derive(Debug)]
#[must_use]
pub enum WritePlan {
    /// Write it where it is; there is nothing to commit.
    InPlace {
        /// The file.
        file: FileIndex,
        /// Where.
        offset: HostOffset,
        /// Bytes of the guest's range.
        length: u64,
    },
    /// Write it, and what surrounds it in its granules, to where nothing is; then commit or abort.
    Allocate(Allocation),
}

/// A run of granules of host clusters that is to hold a prefix of a write. A granule is the least part of a cluster that
/// can be allocated: a subcluster with extended L2 entries, else the cluster.
#[derive(Debug)]
#[must_use]
pub struct Allocation {
    /// The file.
    pub file: FileIndex,
    /// Where the run begins in the file.
    pub offset: HostOffset,
    /// The run reads as zero on the host: what is zero need not be written.
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
    /// The granules that the run has, by number from the first of the first cluster.
    granules: Range<u64>,
    /// The clusters are those that the entries have already.
    pub(crate) reuse: bool,
    pub(crate) place: EntryPlace,
    pub(crate) early: Early,
}

/// Where the next granule of a write stands.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Standing {
    /// It is allocated, in a host cluster of our own.
    InPlace(HostOffset),
    /// It has a place in a host cluster of our own, and what is there does not matter.
    Reuse(HostOffset),
    /// There is no host cluster, or none of which anything must be kept.
    New,
    /// Other granules of its cluster must be kept, but the host cluster is not our own.
    Copy,
}

impl Standing {
    /// Where a granule stands that is so many bytes further on, if the run goes on.
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
    /// The first that the write touches, in its cluster.
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
    /// holds a claim on the range.
    pub fn plan_write(
        &mut self,
        offset: GuestOffset,
        length: u64,
        waker: &Waker,
    ) -> Result<Answer<WritePlan>, EngineError> {
        self.write_state()?;
        ready!(self.may_dirty());
        let top = self.top_qcow2();
        let (geometry, file) = (top.geometry, top.data());
        let first = geometry.guest_cluster(offset);
        let slot = TableSlot(geometry.l1_index(first));
        let own = |copied| copied || active(Mutation::SharedTableTakenForOwn);
        if !matches!(top.l1_entry(slot.0)?, L1Entry::Table { copied, .. } if own(copied)) {
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
                let known_zero = active(Mutation::ZeroClusterTakenForZero);
                (geometry.host_cluster(host), known_zero, end, begin..end, true)
            }
            Standing::New | Standing::Copy => {
                ready!(self.may_free()?);
                let clusters = end.div_ceil(per_cluster);
                let Some(taken) = self.write_state()?.take(clusters)? else { return Ok(Answer::Reserve) };
                let end = end.min(taken.run.count * per_cluster);
                let span = if standing == Standing::Copy {
                    self.with_what_is_kept(place, first, granules, end)?
                } else {
                    begin..end
                };
                let known_zero = taken.known_zero || active(Mutation::StaleTakenForZero);
                (taken.run.start, known_zero, end, span, false)
            }
        };
        self.tables.pin(place.table);
        let length = covered(end);
        let head = head + (begin - span.start) * size;
        let whole = (span.end - span.start) * size;
        let tail = whole.min(self.room_after(first, span.start * size)) - head - length;
        let allocation = Allocation {
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
        };
        Ok(Answer::Ready(WritePlan::Allocate(allocation)))
    }

    /// Where a granule of a cluster stands, and how many from it on in that cluster stand likewise.
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
            // Compressed data is never written over: it shares its host clusters.
            return Ok((if per_cluster > 1 { Standing::Copy } else { Standing::New }, left));
        };
        let in_use = subclusters.allocated.contains(index as u32);
        Ok(match subclusters.host.or(self.fixed_place(GuestCluster(first.0 + at))) {
            Some(HostPlace { offset, copied })
                if copied || (in_use && active(Mutation::SharedTakenForOwn)) =>
            {
                let host = HostOffset(offset.0 + index * size);
                let run = u64::from(subclusters.allocated.run(index as u32)).min(left);
                if in_use { (Standing::InPlace(host), run) } else { (Standing::Reuse(host), run) }
            }
            Some(_) if per_cluster > 1 && !subclusters.allocated.is_empty() => (Standing::Copy, left),
            // A whole cluster is written anew.
            _ => (Standing::New, left),
        })
    }

    /// The place that a cluster has in an external data file, whether or not it is in use.
    fn fixed_place(&self, cluster: GuestCluster) -> Option<HostPlace> {
        let top = self.top_qcow2();
        top.data_file.map(|_| data_file_place(&top.geometry, cluster))
    }

    /// Bytes that a run may have which begins so many bytes into a cluster. An external data file is as long as the disk,
    /// in whole sectors: nothing is written behind it.
    fn room_after(&self, cluster: GuestCluster, within: u64) -> u64 {
        let top = self.top_qcow2();
        let start = top.geometry.guest_offset(cluster).0 + within;
        match top.data_file {
            Some(_) => top.geometry.size.next_multiple_of(SECTOR) - start,
            None => u64::MAX,
        }
    }

    /// Where the first granule stands, and how many from it on, at most `wanted`, stand alike and, where they have a
    /// place on the host, contiguously.
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

    /// Granules to be written if the touched ones, up to `end`, go to new clusters: they and, in the first and the last
    /// cluster, all that lies around them from the first allocated granule to the last.
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
        if active(Mutation::SharedPartsForgotten) {
            return Ok(granules.first..end);
        }
        Ok(granules.first.min(kept(0)?.start)..end.max(kept(last)?.end))
    }

    /// Publishes an allocation whose bytes have been written.
    pub fn commit_write(&mut self, map: &ChainMap, done: Allocation, wakes: &mut WakeList) {
        self.end_early_link(&done, wakes);
        for at in 0..done.clusters {
            let (place, guest, entry) = self.link(&done, at);
            if !done.reuse {
                self.release_old(place, guest);
            }
            if done.early == Early::Begun {
                self.set_linked_entry(place, entry);
            } else if self.may_precede_data(map, &done, guest) {
                self.set_free_entry(place, entry);
            } else {
                self.set_top_entry(place, entry);
            }
            self.publish_entry(map, guest, entry);
        }
        self.tables.unpin(done.place.table);
        self.write.as_mut().expect("a plan was made").flush.early.allocated(done.early);
    }

    /// The entry of a cluster of an allocation whose bytes have been written.
    pub(crate) fn written_entry(
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
        let Subclusters { allocated, zero, .. } = old.unwrap_or(Subclusters::NONE);
        let stays = done.reuse || active(Mutation::SharedPartsForgotten);
        let kept = if stays { allocated } else { SubclusterSet::EMPTY };
        assert!(kept.with(written).covers(allocated), "what was there has been copied");
        let zero = if active(Mutation::ZeroPartsKept) { zero } else { zero.without(written) };
        let all = active(Mutation::AllPartsAllocated);
        let allocated = if all { SubclusterSet::ALL } else { kept.with(written) }.without(zero);
        Subclusters { host: Some(host), allocated, zero }.entry()
    }

    /// Gives up an allocation. What was or may have been written there is no longer known to be zero.
    pub fn abort_write(&mut self, mut done: Allocation, wakes: &mut WakeList) {
        self.forget_early_link(&mut done, wakes);
        self.tables.unpin(done.place.table);
        if done.reuse {
            return;
        }
        let write = self.write.as_mut().expect("a plan was made");
        // The disk may name it all the same, by a link beside its data; then the slice is dirty since before any cut that
        // may come to free it, so 0 will do.
        for at in 0..done.clusters {
            write.alloc.free_later(HostCluster(done.host.0 + at), 0);
        }
    }

    /// Puts the host clusters that an entry counts in, if any, into quarantine: the entry is about to change. Each loses
    /// one reference; those that others count in, too, are free only when the last is gone.
    pub fn release_old(&mut self, place: EntryPlace, guest: GuestCluster) {
        let Ok(entry) = self.top_entry(place, guest.0) else { return };
        let Some((first, count)) = self.counted_clusters(entry) else { return };
        let compressed = matches!(entry, L2Entry::Compressed { .. });
        let count = if compressed && active(Mutation::CompressedTailKept) { 1 } else { count };
        let write = self.write.as_mut().expect("a plan was made");
        for host in first.0..first.0 + count {
            write.alloc.free_later(HostCluster(host), write.flush.next_cut());
            if compressed && active(Mutation::CompressedReleasedTwice) {
                write.alloc.free_later(HostCluster(host), write.flush.next_cut());
            }
        }
    }
}
