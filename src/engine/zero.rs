//! Discard and write zeroes on whole clusters and subclusters: changes to metadata only, planned and committed in one
//! step.

use std::task::Waker;

use qcow2::{
    Geometry, GuestCluster, GuestOffset, HostRange, L1Entry, L2Entry, SubclusterSet, Subclusters, Version,
};

use crate::answer::{Answer, TableSlot, ready};
use crate::error::EngineError;
use crate::layers::EntryPlace;
use crate::map::{ChainMap, SubclusterMap};
use crate::rules::clusters::{self, OldHost};
use crate::state::State;
use crate::word::Word;

/// What the guest asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ZeroMode {
    /// Discard: free the space. The range reads as zero afterwards where the image can record that.
    Discard,
    /// Write zeroes; the space may be freed.
    Unmap,
    /// Write zeroes; the space is kept.
    Keep,
    /// No entry is left, and all space is freed, whatever the image keeps. Only for whole clusters that nobody reads,
    /// past the end of a disk that became smaller: what lies below the top image would show.
    Remove,
}

/// The result for a prefix of the range.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Zeroed {
    /// The prefix is done.
    Done {
        /// Length of the prefix in bytes.
        bytes: u64,
        /// Runs of the file (offset and length in bytes) whose clusters stay in place and whose space may be released
        /// at once. This must end while the claim on the range is held, before the next write to these clusters.
        unused: Vec<HostRange>,
    },
    /// Bytes that must be written as data: this image cannot record zeros there.
    NeedsData(u64),
}

/// What to do with one cluster.
enum Change {
    /// Nothing: it reads as it should.
    Nothing,
    /// It reads as it should, and the bytes at its place in the file are no longer needed.
    Empty(L2Entry),
    /// Give it this entry, and treat its old host cluster so.
    Set(L2Entry, OldHost),
    /// Write zeros to it.
    Data,
}

/// A guest range by clusters. It may cover the first and the last cluster only in part.
#[derive(Clone, Copy)]
struct Pieces {
    geometry: Geometry,
    /// Bytes of the first cluster before the range.
    before: u64,
    length: u64,
}

impl Pieces {
    /// Clusters that the range touches.
    fn clusters(&self) -> u64 {
        self.geometry.clusters_for(self.before + self.length)
    }

    /// Bytes of the range in its first `clusters` clusters.
    fn bytes(&self, clusters: u64) -> u64 {
        (clusters * self.geometry.cluster_size()).saturating_sub(self.before).min(self.length)
    }

    /// The subclusters of a cluster in the range; all in an image without subclusters.
    fn subclusters(&self, cluster: u64) -> SubclusterSet {
        let size = self.geometry.cluster_size();
        let start = if cluster == 0 { self.before } else { 0 };
        let end = (self.before + self.length - cluster * size).min(size);
        if !self.geometry.extended_l2 {
            return SubclusterSet::ALL;
        }
        let granule = self.geometry.granule_size();
        // The range is whole granules; only the disk's last one may end within one.
        let last = end.div_ceil(granule);
        SubclusterSet::range((start / granule) as u32..last as u32)
    }
}

impl State {
    /// Zeroes or discards a prefix of a range of whole granules, within one L2 slice. The caller must hold a claim on
    /// the range.
    pub fn apply_zero(
        &mut self,
        map: &ChainMap,
        offset: GuestOffset,
        length: u64,
        mode: ZeroMode,
        waker: &Waker,
    ) -> Result<Answer<Zeroed>, EngineError> {
        self.write_state()?;
        ready!(self.may_dirty());
        let geometry = self.top_qcow2().geometry;
        let first = geometry.guest_cluster(offset);
        let pieces = Pieces { geometry, before: geometry.in_cluster(offset.0), length };
        let clusters = pieces.clusters();
        if mode == ZeroMode::Discard && geometry.version == Version::V2 && self.has_backing() {
            return Ok(Answer::Ready(done(length)));
        }
        let slot = TableSlot(geometry.l1_index(first));
        match self.top_qcow2().l1_entry(slot.0)? {
            L1Entry::Table { copied: true, .. } => {}
            entry => {
                let nothing = ready!(self.nothing_to_zero(map, entry, first, clusters, mode, waker)?);
                if nothing > 0 {
                    return Ok(Answer::Ready(done(pieces.bytes(nothing))));
                }
                return Ok(if geometry.version == Version::V2 && entry == L1Entry::Unallocated {
                    // Version 2 has no zero flag: zeros written as data must hide the backing file.
                    Answer::Ready(Zeroed::NeedsData(pieces.bytes(1)))
                } else {
                    Answer::Table(slot)
                });
            }
        }
        let place = self.top_qcow2().entry_place(first);
        let left = self.top_qcow2().slice_entries() - place.index as u64;
        ready!(self.need_tables([place.table], waker)?);
        let mut done = 0;
        let mut unused = Vec::new();
        while done < clusters.min(left) {
            let place = EntryPlace { index: place.index + done as usize, ..place };
            let guest = GuestCluster(first.0 + done);
            // If a table is missing here, the changes so far stand: the next call finds those clusters to be zero.
            let entry = self.top_entry(place, guest.0)?;
            self.guard_entry(entry, guest.0)?;
            if !unused.is_empty() && entry.host().is_none() && self.has_backing() {
                // A table of a lower layer may need loading. Then this call returns, and `unused` would be lost.
                break;
            }
            let touched = pieces.subclusters(done);
            let change = ready!(self.change(map, entry, touched, guest, mode, waker)?);
            match change {
                Change::Nothing => {}
                Change::Empty(entry) => note_unused(&geometry, entry, &mut unused),
                Change::Data if done > 0 => break,
                Change::Data => return Ok(Answer::Ready(Zeroed::NeedsData(pieces.bytes(1)))),
                Change::Set(entry, old) => {
                    ready!(self.need_space([place.table])?);
                    if old == OldHost::Goes && done > 0 && self.write_state()?.alloc.quarantine().is_crowded()
                    {
                        break;
                    }
                    if done > 0 && self.write_state()?.journal.is_crowded() {
                        break;
                    }
                    if old == OldHost::Goes {
                        ready!(self.may_free()?);
                    }
                    ready!(self.may_record()?);
                    match old {
                        OldHost::Goes => self.release_old(place, guest),
                        OldHost::Empties => note_unused(&geometry, entry, &mut unused),
                        OldHost::Stays => {}
                    }
                    self.set_top_entry(place, entry);
                    self.record(guest, entry);
                    if mode == ZeroMode::Remove {
                        self.forget_words(map, guest);
                    } else if touched == SubclusterSet::ALL {
                        self.publish(map, guest, Word::ZERO, SubclusterMap::default());
                    } else {
                        self.publish_entry(map, guest, entry);
                    }
                }
            }
            done += 1;
        }
        Ok(Answer::Ready(Zeroed::Done { bytes: pieces.bytes(done), unused }))
    }

    /// How many clusters from `first` on need no change: they read as zero already, or have no entry to be removed. The
    /// top image has no L2 table of its own there.
    fn nothing_to_zero(
        &mut self,
        map: &ChainMap,
        entry: L1Entry,
        first: GuestCluster,
        clusters: u64,
        mode: ZeroMode,
        waker: &Waker,
    ) -> Result<Answer<u64>, EngineError> {
        let geometry = self.top_qcow2().geometry;
        let in_table = geometry.l2_entries() - geometry.l2_index(first);
        if entry != L1Entry::Unallocated {
            return Ok(Answer::Ready(0));
        }
        if !self.has_backing() || mode == ZeroMode::Remove {
            return Ok(Answer::Ready(clusters.min(in_table)));
        }
        let mut zero = 0;
        while zero < clusters.min(in_table) {
            let guest = GuestCluster(first.0 + zero);
            if ready!(self.word(map, geometry.cluster_size(), guest, waker)?) != Word::ZERO {
                break;
            }
            zero += 1;
        }
        Ok(Answer::Ready(zero))
    }

    fn change(
        &mut self,
        map: &ChainMap,
        entry: L2Entry,
        touched: SubclusterSet,
        guest: GuestCluster,
        mode: ZeroMode,
        waker: &Waker,
    ) -> Result<Answer<Change>, EngineError> {
        let geometry = self.top_qcow2().geometry;
        if mode == ZeroMode::Remove {
            let goes = self.counted_clusters(entry).is_some();
            let old = if goes { OldHost::Goes } else { OldHost::Stays };
            let is_there = entry != L2Entry::Unallocated;
            return Ok(Answer::Ready(if is_there {
                Change::Set(L2Entry::Unallocated, old)
            } else {
                Change::Nothing
            }));
        }
        match Subclusters::of(entry) {
            Some(subclusters) if geometry.extended_l2 => {
                return self.change_subclusters(map, subclusters, touched, guest, mode, waker);
            }
            // No part of a compressed cluster can be freed.
            None if touched != SubclusterSet::ALL && mode == ZeroMode::Discard => {
                return Ok(Answer::Ready(Change::Nothing));
            }
            None if touched != SubclusterSet::ALL => return Ok(Answer::Ready(Change::Data)),
            _ => {}
        }
        let v2 = geometry.version == Version::V2;
        let has_backing = self.has_backing();
        // The entry of a cluster without space of its own that reads as zero.
        let hides_backing = clusters::hides_backing(has_backing, mode == ZeroMode::Discard);
        let empty = if hides_backing { L2Entry::Zero } else { L2Entry::Unallocated };
        let keeps_place = self.write_state()?.keep_discarded;
        Ok(Answer::Ready(match (entry, mode) {
            (L2Entry::Unallocated, _) if !has_backing => Change::Nothing,
            (L2Entry::Unallocated, _) => {
                match ready!(self.word(map, geometry.cluster_size(), guest, waker)?) {
                    Word::ZERO => Change::Nothing,
                    _ if v2 => Change::Data,
                    _ => Change::Set(L2Entry::Zero, OldHost::Stays),
                }
            }
            (L2Entry::Zero, _) => Change::Nothing,
            (L2Entry::ZeroAllocated { .. }, ZeroMode::Keep) => Change::Nothing,
            (L2Entry::ZeroAllocated { copied: true, .. }, _) if keeps_place => Change::Empty(entry),
            (L2Entry::ZeroAllocated { .. }, _) => Change::Set(empty, OldHost::Goes),
            (L2Entry::Data { .. } | L2Entry::Compressed { .. }, _) if v2 && has_backing => Change::Data,
            // Version 2 has no entry for an allocated cluster that reads as zero: there the space is freed, as in QEMU.
            (L2Entry::Data { offset, copied: true }, _) if !v2 && (keeps_place || mode == ZeroMode::Keep) => {
                let old = if mode == ZeroMode::Keep { OldHost::Stays } else { OldHost::Empties };
                Change::Set(L2Entry::ZeroAllocated { offset, copied: true }, old)
            }
            // The space of compressed or shared clusters cannot be kept for a later write.
            (L2Entry::Data { .. } | L2Entry::Compressed { .. }, _) => Change::Set(empty, OldHost::Goes),
            (L2Entry::Subclusters(_), _) => panic!("only images with extended L2 entries have subclusters"),
        }))
    }

    /// What to do with some subclusters of a cluster.
    fn change_subclusters(
        &mut self,
        map: &ChainMap,
        old: Subclusters,
        touched: SubclusterSet,
        guest: GuestCluster,
        mode: ZeroMode,
        waker: &Waker,
    ) -> Result<Answer<Change>, EngineError> {
        let hides_backing = clusters::hides_backing(self.has_backing(), mode == ZeroMode::Discard);
        let Some(host) = old.host else {
            if !hides_backing || old.zero.covers(touched) {
                return Ok(Answer::Ready(Change::Nothing));
            }
            let unit = self.top_qcow2().geometry.cluster_size();
            if ready!(self.word(map, unit, guest, waker)?) == Word::ZERO {
                return Ok(Answer::Ready(Change::Nothing));
            }
            let new = Subclusters { zero: old.zero.with(touched), ..old };
            return Ok(Answer::Ready(Change::Set(new.entry(), OldHost::Stays)));
        };
        let keeps = mode == ZeroMode::Keep || self.write_state()?.keep_discarded;
        let allocated = old.allocated.without(touched);
        // Only space that the top image owns can be kept.
        let frees = allocated.is_empty() && !(keeps && host.copied);
        let zero = if hides_backing || (keeps && !frees) {
            old.zero.with(touched)
        } else if frees && !self.has_backing() {
            SubclusterSet::EMPTY
        } else {
            old.zero.without(touched)
        };
        let new = Subclusters { host: (!frees).then_some(host), allocated, zero };
        let empties = mode != ZeroMode::Keep && allocated.is_empty();
        let old_host = clusters::old_host(frees, empties, keeps);
        Ok(Answer::Ready(match old_host {
            // A preallocated place, or one whose data was zeroed before.
            OldHost::Empties if new == old => Change::Empty(new.entry()),
            _ if new == old => Change::Nothing,
            _ => Change::Set(new.entry(), old_host),
        }))
    }
}

/// The result for `bytes` that are done without an emptied cluster.
fn done(bytes: u64) -> Zeroed {
    Zeroed::Done { bytes, unused: Vec::new() }
}

/// Adds an entry's host cluster to a list of runs, joining it with the last run if contiguous.
fn note_unused(geometry: &Geometry, entry: L2Entry, runs: &mut Vec<HostRange>) {
    let Some(host) = entry.host() else { return };
    match runs.last_mut() {
        Some(run) if run.end() == host.offset => run.length += geometry.cluster_size(),
        _ => runs.push(HostRange::new(host.offset, geometry.cluster_size())),
    }
}
