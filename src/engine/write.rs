//! Planning and committing guest writes to a qcow2 top image.

use std::task::Waker;

use qcow2::{GuestCluster, GuestOffset, HostCluster, HostOffset, L1Entry, L2Entry};

use crate::answer::{Answer, TableSlot, ready};
use crate::error::EngineError;
use crate::layers::EntryPlace;
use crate::map::ChainMap;
use crate::mutation::{Mutation, active};
use crate::state::State;
use crate::word::{FileIndex, Word};

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
    /// Write it, and what surrounds it in its clusters, to new clusters; then commit or abort.
    Allocate(Allocation),
}

/// A run of host clusters that is to hold a prefix of a write.
#[derive(Debug)]
#[must_use]
pub struct Allocation {
    /// The file.
    pub file: FileIndex,
    /// Where the run of clusters begins in the file.
    pub offset: HostOffset,
    /// The run reads as zero on the host: what is zero need not be written.
    pub known_zero: bool,
    /// Bytes of the first cluster before the guest's range.
    pub head: u64,
    /// Bytes of the guest's range.
    pub length: u64,
    /// Bytes of the last cluster after the guest's range (some may be past the end of the disk).
    pub tail: u64,
    cluster: GuestCluster,
    host: HostCluster,
    clusters: u64,
    /// The clusters are those that allocated zero clusters have already.
    reuse: bool,
    place: EntryPlace,
}

/// Where the next cluster of a write stands.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Standing {
    InPlace(HostOffset),
    /// An allocated zero cluster of our own.
    Reuse(HostOffset),
    New,
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
        let (geometry, file) = (top.geometry, top.file);
        let cluster_size = geometry.cluster_size();
        let first = geometry.guest_cluster(offset);
        let slot = TableSlot(geometry.l1_index(first));
        let own = |copied| copied || active(Mutation::SharedTableTakenForOwn);
        if !matches!(top.l1_entry(slot.0)?, L1Entry::Table { copied, .. } if own(copied)) {
            return Ok(Answer::Table(slot));
        }
        let place = top.entry_place(first);
        let entries_left = top.slice_entries() - place.index as u64;
        ready!(self.need_tables([place.table], waker)?);

        let head = geometry.in_cluster(offset.0);
        let wanted = (head + length).div_ceil(cluster_size).min(entries_left);
        let standing = self.standing(place, first, 0)?;
        let run = self.run_like(place, first, wanted, standing)?;
        let covered = |clusters: u64| (clusters * cluster_size - head).min(length);
        let (host, known_zero, clusters, reuse) = match standing {
            Standing::InPlace(host) => {
                let offset = HostOffset(host.0 + head);
                return Ok(Answer::Ready(WritePlan::InPlace { file, offset, length: covered(run) }));
            }
            Standing::Reuse(host) => {
                let known_zero = active(Mutation::ZeroClusterTakenForZero);
                (geometry.host_cluster(host), known_zero, run, true)
            }
            Standing::New => {
                let Some(taken) = self.write_state()?.take(run)? else { return Ok(Answer::Reserve) };
                let known_zero = taken.known_zero || active(Mutation::StaleTakenForZero);
                (taken.run.start, known_zero, taken.run.count, false)
            }
        };
        self.tables.pin(place.table);
        let length = covered(clusters);
        let tail = clusters * cluster_size - head - length;
        let offset = geometry.host_offset(host);
        let allocation = Allocation {
            file,
            offset,
            known_zero,
            head,
            length,
            tail,
            cluster: first,
            host,
            clusters,
            reuse,
            place,
        };
        Ok(Answer::Ready(WritePlan::Allocate(allocation)))
    }

    fn standing(&self, place: EntryPlace, first: GuestCluster, at: u64) -> Result<Standing, EngineError> {
        let place = EntryPlace { index: place.index + at as usize, ..place };
        let entry = self.top_entry(place, first.0 + at)?;
        self.guard_entry(entry, first.0 + at)?;
        Ok(match entry {
            L2Entry::Data { offset, copied } if copied || active(Mutation::SharedTakenForOwn) => {
                Standing::InPlace(offset)
            }
            L2Entry::ZeroAllocated { offset, copied: true } => Standing::Reuse(offset),
            // Compressed data is never written over: it shares its host clusters.
            _ => Standing::New,
        })
    }

    /// How many clusters from the first stand alike and, where they have host clusters, contiguously.
    fn run_like(
        &self,
        place: EntryPlace,
        first: GuestCluster,
        wanted: u64,
        like: Standing,
    ) -> Result<u64, EngineError> {
        let cluster_size = self.top_qcow2().geometry.cluster_size();
        let mut run = 1;
        while run < wanted {
            let expected = match like {
                Standing::InPlace(host) => Standing::InPlace(HostOffset(host.0 + run * cluster_size)),
                Standing::Reuse(host) => Standing::Reuse(HostOffset(host.0 + run * cluster_size)),
                Standing::New => Standing::New,
            };
            if self.standing(place, first, run)? != expected {
                break;
            }
            run += 1;
        }
        Ok(run)
    }

    /// Publishes an allocation whose bytes have been written.
    pub fn commit_write(&mut self, map: &ChainMap, done: Allocation) {
        let cluster_size = self.top_qcow2().geometry.cluster_size();
        for at in 0..done.clusters {
            let place = EntryPlace { index: done.place.index + at as usize, ..done.place };
            let guest = GuestCluster(done.cluster.0 + at);
            if !done.reuse {
                self.release_old(place, guest);
            }
            let offset = HostOffset(done.offset.0 + at * cluster_size);
            self.set_top_entry(place, L2Entry::Data { offset, copied: true });
            self.publish(map, guest, Word::data(done.file, offset, true));
        }
        self.tables.unpin(done.place.table);
    }

    /// Gives up an allocation. What was or may have been written there is no longer known to be zero.
    pub fn abort_write(&mut self, done: Allocation) {
        self.tables.unpin(done.place.table);
        if done.reuse {
            return;
        }
        let write = self.write.as_mut().expect("a plan was made");
        for at in 0..done.clusters {
            write.alloc.free_later(HostCluster(done.host.0 + at), 0);
        }
    }

    /// Puts the host clusters that an entry counts in, if any, into quarantine: the entry is about to change. Each loses
    /// one reference; those that others count in, too, are free only when the last is gone.
    pub fn release_old(&mut self, place: EntryPlace, guest: GuestCluster) {
        let Ok(entry) = self.top_entry(place, guest.0) else { return };
        let Some((first, count)) = entry.host_clusters(&self.top_qcow2().geometry) else { return };
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
