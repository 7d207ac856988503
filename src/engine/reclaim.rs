//! Reclaiming freed clusters whose unlink is durable and which no I/O can reach any more. They lose their refcount, are
//! punched out of the file, and become free.

use std::collections::{BTreeMap, BTreeSet};
use std::task::Waker;

use qcow2::{HostCluster, HostRange};

use crate::answer::{Answer, ready};
use crate::bounds::{
    RECLAIM_CLUSTERS_MAX as CLUSTERS_MAX, RECLAIM_RUNS_MAX as RUNS_MAX, RECLAIM_SLICES_MAX as SLICES_MAX,
};
use crate::epoch::Epochs;
use crate::error::EngineError;
use crate::quarantine::{Reclaimed, Unlinked};
use crate::rules::reuse;
use crate::run::{FreeRun, HostRun};
use crate::state::{State, WriteState};
use crate::tables::TableId;
use crate::waiters::WakeList;

/// Runs of unused clusters. Punch each, then commit with the list of punched runs.
#[derive(Debug)]
#[must_use]
pub struct ReclaimPlan {
    /// The bytes of each run.
    pub punches: Vec<HostRange>,
    runs: Vec<HostRun>,
    /// The new count of each cluster.
    counts: BTreeMap<u64, u64>,
    pins: Vec<TableId>,
    /// The clusters that leave the quarantine.
    leaving: Reclaimed,
}

impl ReclaimPlan {
    /// True if any of the clusters was in use before. The others were only taken for a write that failed.
    pub fn frees(&self) -> bool {
        self.leaving.freed > 0
    }
}

impl State {
    /// Plans a reclaim; `Ready(None)` if there is nothing to reclaim now, or another task reclaims.
    pub fn plan_reclaim(
        &mut self,
        epochs: &Epochs,
        waker: &Waker,
    ) -> Result<Answer<Option<ReclaimPlan>>, EngineError> {
        let write = self.write_state()?;
        if write.alloc.quarantine().is_reclaiming() {
            return Ok(Answer::Ready(None));
        }
        let most = CLUSTERS_MAX.min(SLICES_MAX as u64 / 2 * write.refcounts.slice_entries());
        let mut batch: Vec<Unlinked> = Vec::new();
        let mut clusters = 0;
        let mut pins = BTreeSet::new();
        for unlinked in write.alloc.quarantine_mut().unlinked(most) {
            if batch.len() >= RUNS_MAX || !reuse::is_out_of_reach(epochs.passed(unlinked.epoch)) {
                break;
            }
            let slices = write.refcounts.slices_of(unlinked.run.start, unlinked.run.count)?;
            clusters += unlinked.run.count;
            if !batch.is_empty() && (pins.len() + slices.len() > SLICES_MAX || clusters > CLUSTERS_MAX) {
                break;
            }
            pins.extend(slices);
            batch.push(*unlinked);
        }
        if batch.is_empty() {
            return Ok(Answer::Ready(None));
        }
        let pins: Vec<TableId> = pins.into_iter().collect();
        ready!(self.may_dirty());
        ready!(self.need_tables(pins.iter().copied(), waker)?);
        let counts = self.decremented(&batch)?;
        let free = counts.iter().filter(|(_, count)| reuse::is_free(**count));
        let runs = runs_of(free.map(|(cluster, _)| *cluster));
        let write = self.write_state()?;
        // If this fails, two entries of a damaged image named the cluster: releasing the first freed it, and it has
        // been handed out since.
        for run in &runs {
            write.guard.aim(*run).map_err(EngineError::free_metadata)?;
        }
        for id in &pins {
            self.tables.pin(*id);
        }
        let write = self.write_state()?;
        let count = |unlinked: &Unlinked| unlinked.run.count;
        let all = batch.iter().map(count).sum();
        let freed = batch.iter().filter(|unlinked| unlinked.was_used).map(count).sum();
        let leaving = Reclaimed { clusters: all, freed };
        write.alloc.quarantine_mut().begin_reclaim(batch.len());
        let geometry = write.refcounts.geometry;
        let punches = runs
            .iter()
            .map(|run| HostRange::new(geometry.host_offset(run.start), run.count * geometry.cluster_size()))
            .collect();
        Ok(Answer::Ready(Some(ReclaimPlan { punches, runs, counts, pins, leaving })))
    }

    /// The new count of each cluster in the batch.
    fn decremented(&self, batch: &[Unlinked]) -> Result<BTreeMap<u64, u64>, EngineError> {
        let WriteState { refcounts, guard, .. } = self.write.as_ref().ok_or(EngineError::ReadOnly)?;
        let mut counts = BTreeMap::new();
        for unlinked in batch {
            let run = unlinked.run;
            for cluster in run.clusters() {
                let zero = EngineError::free_data(cluster);
                if refcounts.block_offset(refcounts.block_of(cluster))?.is_none() {
                    return Err(zero);
                }
                let count = counts.entry(cluster).or_insert_with(|| self.refcount(cluster));
                *count = count.checked_sub(1).ok_or(zero)?;
                // An unlinked cluster is in the guard only if a snapshot has it, too.
                let holder = guard.within(HostRun::one(HostCluster(cluster)));
                if let (0, Some(holder)) = (*count, holder) {
                    return Err(EngineError::free_metadata(holder));
                }
            }
        }
        Ok(counts)
    }

    /// Publishes the new counts. Punched runs are known to be zero; `punched` has an item for each run.
    pub fn commit_reclaim(&mut self, plan: ReclaimPlan, punched: &[bool], wakes: &mut WakeList) {
        for (cluster, count) in plan.counts {
            self.set_refcount(HostCluster(cluster), count);
        }
        for id in &plan.pins {
            self.tables.unpin(*id);
        }
        let alloc = &mut self.write.as_mut().expect("a plan was made").alloc;
        alloc.quarantine_mut().end_reclaim(plan.leaving, wakes);
        for (run, punched) in plan.runs.into_iter().zip(punched) {
            alloc.add_free(FreeRun { run, known_zero: *punched });
        }
    }
}

/// Joins ascending cluster numbers into runs.
fn runs_of(clusters: impl Iterator<Item = u64>) -> Vec<HostRun> {
    let mut runs: Vec<HostRun> = Vec::new();
    for cluster in clusters {
        match runs.last_mut() {
            Some(last) if last.start.0 + last.count == cluster => last.count += 1,
            _ => runs.push(HostRun::one(HostCluster(cluster))),
        }
    }
    runs
}
