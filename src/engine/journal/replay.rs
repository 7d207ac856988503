//! Carries out what a dead process left in its journal: checks all of it, counts the clusters that the records name,
//! then links them.
//!
//! The last record of a guest cluster is its entry. Nothing is changed before everything has been checked, as if the
//! records were entries of the image. Doing it again, after a death or a failure in the middle, comes to the same.

use std::collections::{BTreeMap, BTreeSet};
use std::task::Waker;

use qcow2::{Geometry, GuestCluster, HostCluster, HostPlace, L1Entry, L2Entry};

use crate::Engine;
use crate::answer::{Answer, TableSlot, ready};
use crate::bounds::REPLAYED_AT_ONCE;
use crate::error::EngineError;
use crate::journal::record::Record;
use crate::journal::ring::{self, JournalError, JournalMemory};
use crate::layers::EntryPlace;
use crate::map::ChainMap;
use crate::reserve::ReservePlan;
use crate::run::HostRun;
use crate::state::State;

/// The entries that a dead process left, and how far they have been checked and carried out.
pub struct Replay {
    geometry: Geometry,
    /// Entries by guest cluster, in order.
    runs: Vec<Record>,
    /// The run that is next, and how many of its clusters are done.
    next: (usize, u64),
    /// Host clusters that an entry names and the disk's entry does not.
    claims: Vec<HostRun>,
    /// Host clusters that entries name as the disk's entries do.
    kept: Vec<HostRun>,
    /// Host clusters that the disk's entries name and the new ones do not.
    freed: Vec<HostRun>,
    /// Refblocks that the claims need and that do not exist.
    blocks: BTreeSet<u64>,
    /// How many claims, and how many clusters of the next one, are counted.
    claimed: (usize, u64),
}

impl Replay {
    /// The last record of each guest cluster, of those that an L1 table of so many entries maps. They may lie past
    /// the end of the disk. It may have been resized while it was in use, and the header may name the smaller size.
    fn of(records: Vec<Record>, geometry: Geometry, l1_entries: u64) -> Result<Self, JournalError> {
        let clusters = geometry.clusters_for(geometry.size).max(l1_entries * geometry.l2_entries());
        let mut latest = BTreeMap::new();
        for record in records {
            let wrong = |what| JournalError::Record { cluster: record.first.0, what };
            if record.count == 0 || record.count > geometry.l2_entries() {
                return Err(wrong("no L2 table has so many entries"));
            }
            if record.end() > clusters {
                return Err(wrong("it is past the end of the disk"));
            }
            put(&mut latest, record, &geometry).ok_or_else(|| wrong("its host offset is too large"))?;
        }
        let (claims, kept, freed) = (Vec::new(), Vec::new(), Vec::new());
        let (runs, blocks) = (latest.into_values().collect(), BTreeSet::new());
        Ok(Replay { geometry, runs, next: (0, 0), claims, kept, freed, blocks, claimed: (0, 0) })
    }

    /// Guest clusters with an entry in the journal.
    pub fn clusters(&self) -> u64 {
        self.runs.iter().map(|run| run.count).sum()
    }

    /// The next clusters, as one run in one L2 table slice of `slice_entries` entries.
    fn piece(&self, slice_entries: u64) -> Option<Record> {
        let (run, done) = self.next;
        let run = self.runs.get(run)?;
        let start = run.first.0 + done;
        let end = run.end().min((start / slice_entries + 1) * slice_entries);
        run.part(start..end.min(start + REPLAYED_AT_ONCE), &self.geometry)
    }

    /// So many clusters of the next run are done.
    fn advance(&mut self, clusters: u64) {
        let (run, done) = self.next;
        let ends = done + clusters >= self.runs[run].count;
        self.next = if ends { (run + 1, 0) } else { (run, done + clusters) };
    }

    /// Refuses entries that name the same host cluster, or one that another gives up.
    fn check_hosts(&mut self) -> Result<(), JournalError> {
        let mut named = [&self.claims[..], &self.kept].concat();
        let mut freed = std::mem::take(&mut self.freed);
        sort(&mut named);
        sort(&mut freed);
        let end = |run: &HostRun| run.start.0 + run.count;
        let twice = named.windows(2).find(|pair| end(&pair[0]) > pair[1].start.0);
        if let Some(pair) = twice {
            return Err(JournalError::Host { cluster: pair[1].start.0, what: "another record names it too" });
        }
        for claim in &self.claims {
            let at = freed.partition_point(|run| end(run) <= claim.start.0);
            if freed.get(at).is_some_and(|run| run.start.0 < end(claim)) {
                return Err(JournalError::Host { cluster: claim.start.0, what: "another entry names it" });
            }
        }
        Ok(())
    }
}

fn sort(runs: &mut [HostRun]) {
    runs.sort_unstable_by_key(|run| run.start);
}

/// Adds a cluster to a list of runs, joined with the last where possible.
fn push(runs: &mut Vec<HostRun>, run: HostRun) {
    match runs.last_mut() {
        Some(last) if last.start.0 + last.count == run.start.0 => last.count += run.count,
        _ => runs.push(run),
    }
}

/// Puts a record over those before it. `None` if a host offset does not fit an entry.
fn put(latest: &mut BTreeMap<u64, Record>, new: Record, geometry: &Geometry) -> Option<()> {
    let (start, end) = (new.first.0, new.end());
    new.raw_at(new.count - 1, geometry)?;
    if let Some((&first, &old)) = latest.range(..start).next_back().filter(|(_, old)| old.end() > start) {
        latest.insert(first, old.part(first..start, geometry)?);
        if old.end() > end {
            latest.insert(end, old.part(end..old.end(), geometry)?);
        }
    }
    while let Some((&first, &old)) = latest.range(start..end).next() {
        latest.remove(&first);
        if old.end() > end {
            latest.insert(end, old.part(end..old.end(), geometry)?);
        }
    }
    latest.insert(start, new);
    Some(())
}

/// The old entry and the new one of a cluster.
type Change = (GuestCluster, L2Entry, L2Entry);

impl State {
    /// The changes of a piece; an inner error if a record makes no sense.
    fn changes_of(
        &mut self,
        piece: &Record,
        waker: &Waker,
    ) -> Result<Answer<Result<Vec<Change>, JournalError>>, EngineError> {
        let geometry = self.top_qcow2().geometry;
        let has_table = self.top_qcow2().l1_entry(geometry.l1_index(piece.first))? != L1Entry::Unallocated;
        let place = self.top_qcow2().entry_place(piece.first);
        if has_table {
            ready!(self.need_tables([place.table], waker)?);
        }
        let mut changes = Vec::with_capacity(piece.count as usize);
        for at in 0..piece.count {
            let guest = GuestCluster(piece.first.0 + at);
            let place = EntryPlace { index: place.index + at as usize, ..place };
            let old = if has_table { self.top_entry(place, guest.0)? } else { L2Entry::Unallocated };
            let raw = piece.raw_at(at, &geometry);
            let new = raw.and_then(|raw| self.top_qcow2().decode_entry(raw, guest).ok());
            match new.filter(|new| !matches!(new, L2Entry::Compressed { .. })) {
                Some(new) => changes.push((guest, old, new)),
                None => {
                    let what = "it is no entry that a request makes";
                    return Ok(Answer::Ready(Err(JournalError::Record { cluster: guest.0, what })));
                }
            }
        }
        Ok(Answer::Ready(Ok(changes)))
    }

    /// Checks a piece of the records: which host clusters they claim, keep and free. True once all are checked.
    fn check_replay(
        &mut self,
        replay: &mut Replay,
        waker: &Waker,
    ) -> Result<Answer<Result<bool, JournalError>>, EngineError> {
        self.write_state()?;
        let Some(piece) = replay.piece(self.top_qcow2().slice_entries()) else {
            replay.next = (0, 0);
            return Ok(Answer::Ready(replay.check_hosts().map(|()| true)));
        };
        let changes = match ready!(self.changes_of(&piece, waker)?) {
            Ok(changes) => changes,
            Err(wrong) => return Ok(Answer::Ready(Err(wrong))),
        };
        let (mut claims, mut kept, mut freed) = (Vec::new(), Vec::new(), Vec::new());
        for (guest, old, new) in changes {
            let (named, before) = (self.counted_clusters(new), self.counted_clusters(old));
            let keeps = new.host() == old.host();
            match (named, new.host()) {
                (Some(run), _) if keeps => push(&mut kept, run),
                (Some(run), Some(HostPlace { copied: true, .. })) => push(&mut claims, run),
                (Some(_), _) => {
                    let what = "it names a shared cluster that the image does not";
                    return Ok(Answer::Ready(Err(JournalError::Record { cluster: guest.0, what })));
                }
                (None, _) => {}
            }
            if let Some(run) = before.filter(|_| !keeps) {
                push(&mut freed, run);
            }
        }
        for claim in &claims {
            if let Err(wrong) = self.check_claim(*claim, &mut replay.blocks)? {
                return Ok(Answer::Ready(Err(wrong)));
            }
        }
        for (list, more) in
            [(&mut replay.claims, claims), (&mut replay.kept, kept), (&mut replay.freed, freed)]
        {
            more.into_iter().for_each(|run| push(list, run));
        }
        replay.advance(piece.count);
        Ok(Answer::Ready(Ok(false)))
    }

    /// Checks that a run may become data: it is in the file and holds no metadata. Notes the refblocks that do not exist.
    ///
    /// Its counts say nothing. They are 0 or 1. They are more where the dead process had given back a cluster of
    /// compressed data and no cut had written its lower count.
    fn check_claim(
        &mut self,
        claim: HostRun,
        blocks: &mut BTreeSet<u64>,
    ) -> Result<Result<(), JournalError>, EngineError> {
        let write = self.write_state()?;
        let wrong = |cluster, what| Ok(Err(JournalError::Host { cluster, what }));
        if claim.start.0 + claim.count > write.alloc.end_at_open() {
            return wrong(claim.start.0, "it is past the end of the file");
        }
        if let Some((cluster, _)) = write.guard.within(claim) {
            return wrong(cluster, "it holds metadata");
        }
        let refcounts = &write.refcounts;
        let last = claim.start.0 + claim.count - 1;
        for block in refcounts.block_of(claim.start.0)..=refcounts.block_of(last) {
            if refcounts.block_offset(block)?.is_none() {
                blocks.insert(block);
            }
        }
        Ok(Ok(()))
    }

    /// Counts a piece of the claimed clusters. True once all are counted.
    fn claim_replayed(&mut self, replay: &mut Replay, waker: &Waker) -> Result<Answer<bool>, EngineError> {
        let (number, done) = replay.claimed;
        let Some(claim) = replay.claims.get(number).copied() else { return Ok(Answer::Ready(true)) };
        ready!(self.may_dirty());
        let start = HostCluster(claim.start.0 + done);
        let piece = HostRun { start, count: (claim.count - done).min(REPLAYED_AT_ONCE) };
        let slices = self.refblock_slices(piece.start, piece.count)?;
        ready!(self.need_tables(slices.iter().copied(), waker)?);
        ready!(self.need_space(slices.iter().copied())?);
        // From now on it cannot become metadata.
        self.write_state()?.guard.aim(piece).map_err(EngineError::free_metadata)?;
        for cluster in piece.clusters() {
            self.set_refcount(HostCluster(cluster), 1);
        }
        let ends = done + piece.count == claim.count;
        replay.claimed = if ends { (number + 1, 0) } else { (number, done + piece.count) };
        Ok(Answer::Ready(false))
    }

    /// Links a piece of the entries. True once all are linked.
    fn link_replayed(
        &mut self,
        map: &ChainMap,
        replay: &mut Replay,
        waker: &Waker,
    ) -> Result<Answer<bool>, EngineError> {
        ready!(self.may_dirty());
        let Some(piece) = replay.piece(self.top_qcow2().slice_entries()) else {
            return Ok(Answer::Ready(true));
        };
        // The records were checked, so what is wrong now is wrong in the image.
        let Ok(changes) = ready!(self.changes_of(&piece, waker)?) else { return Err(EngineError::Failed) };
        for (guest, old, new) in changes {
            ready!(self.replace_entry(map, guest, old, new)?);
            replay.advance(1);
        }
        Ok(Answer::Ready(false))
    }

    /// Gives a cluster its new entry, and frees what the old one named.
    fn replace_entry(
        &mut self,
        map: &ChainMap,
        guest: GuestCluster,
        old: L2Entry,
        new: L2Entry,
    ) -> Result<Answer<()>, EngineError> {
        if old == new {
            return Ok(Answer::Ready(()));
        }
        let slot = TableSlot(self.top_qcow2().geometry.l1_index(guest));
        if !matches!(self.top_qcow2().l1_entry(slot.0)?, L1Entry::Table { copied: true, .. }) {
            return Ok(Answer::Table(slot));
        }
        let place = self.top_qcow2().entry_place(guest);
        ready!(self.need_space([place.table])?);
        self.guard_entry(old, guest.0)?;
        self.guard_entry(new, guest.0)?;
        if new.host() != old.host() && self.counted_clusters(old).is_some() {
            ready!(self.may_free()?);
            self.release_old(place, guest);
        }
        self.set_top_entry(place, new);
        self.publish_entry(map, guest, new);
        Ok(Answer::Ready(()))
    }
}

impl Engine {
    /// The records of a journal that another process left for this number. Nothing has been changed or checked yet.
    ///
    /// # Errors
    /// There is no such journal, or it was damaged.
    pub fn read_journal(&self, memory: &JournalMemory, number: u64) -> Result<Replay, JournalError> {
        let (geometry, l1_entries) = self.with(|state, _| {
            let top = state.top_qcow2();
            (top.geometry, top.l1.len())
        });
        Replay::of(ring::read(memory, number)?, geometry, l1_entries)
    }

    /// Checks some of the records; true once all are checked. An inner error if they cannot be true. Changes nothing.
    ///
    /// # Errors
    /// A bad table entry of the image.
    pub fn check_replay(
        &self,
        replay: &mut Replay,
        waker: &Waker,
    ) -> Result<Answer<Result<bool, JournalError>>, EngineError> {
        self.with(|state, _| state.check_replay(replay, waker))
    }

    /// Plans refblocks for clusters that a checked replay names; `Ready(None)` if none are missing. Commit or abort it
    /// like any reservation.
    ///
    /// # Errors
    /// As for [`Engine::plan_reserve`].
    pub fn plan_replay_growth(
        &self,
        replay: &Replay,
        waker: &Waker,
    ) -> Result<Answer<Option<ReservePlan>>, EngineError> {
        self.change(|state, _| state.plan_refblocks(&replay.blocks, waker))
    }

    /// Counts some of the clusters that a checked replay names; true once all are counted. All their refblocks exist.
    ///
    /// # Errors
    /// As for [`Engine::plan_write`].
    pub fn claim_replayed(&self, replay: &mut Replay, waker: &Waker) -> Result<Answer<bool>, EngineError> {
        self.change(|state, _| state.claim_replayed(replay, waker))
    }

    /// Links some of the entries; true once all are linked.
    ///
    /// # Errors
    /// As for [`Engine::plan_write`].
    pub fn link_replayed(&self, replay: &mut Replay, waker: &Waker) -> Result<Answer<bool>, EngineError> {
        self.ensure_healthy()?;
        self.with_freeing(|state, _| state.link_replayed(&self.map, replay, waker))
            .map_err(EngineError::of_change)
    }
}
