//! Reclaiming: freed clusters whose unlink is durable, and which no I/O can touch any more, lose their refcount, are
//! punched out of the file, and become free.

use std::collections::BTreeMap;
use std::task::Waker;

use qcow2::{HostCluster, HostOffset};

use crate::alloc::{FreeRun, Run, Unlinked};
use crate::answer::{Answer, ready};
use crate::epoch::Epochs;
use crate::error::EngineError;
use crate::state::State;
use crate::tables::TableId;

/// The most clusters reclaimed in one go.
const RECLAIM_CLUSTERS: u64 = 4096;

/// Runs of clusters that nobody uses any more. Punch each, then commit, saying which were punched.
#[derive(Debug)]
#[must_use]
pub struct ReclaimPlan {
    /// Where each run lies: offset and length in bytes.
    pub punches: Vec<(HostOffset, u64)>,
    runs: Vec<Run>,
    /// Cluster → its new count.
    counts: BTreeMap<u64, u64>,
    pins: Vec<TableId>,
}

impl State {
    /// `Ready(None)` if there is nothing to reclaim now, or somebody else does it.
    pub fn plan_reclaim(
        &mut self,
        epochs: &Epochs,
        waker: &Waker,
    ) -> Result<Answer<Option<ReclaimPlan>>, EngineError> {
        let write = self.write_state()?;
        if write.alloc.reclaiming {
            return Ok(Answer::Ready(None));
        }
        let mut batch: Vec<Unlinked> = Vec::new();
        let mut clusters = 0;
        for unlinked in &write.alloc.unlinked {
            if clusters >= RECLAIM_CLUSTERS || !epochs.passed(unlinked.epoch) {
                break;
            }
            clusters += unlinked.run.count;
            batch.push(*unlinked);
        }
        if batch.is_empty() {
            return Ok(Answer::Ready(None));
        }
        let mut pins = Vec::new();
        for unlinked in &batch {
            pins.extend(self.refblock_slices(unlinked.run.start, unlinked.run.count)?);
        }
        pins.sort_unstable();
        pins.dedup();
        ready!(self.need_tables(pins.iter().copied(), waker)?);
        let counts = self.decremented(&batch)?;
        let runs = runs_of(counts.iter().filter(|(_, count)| **count == 0).map(|(cluster, _)| *cluster));
        for id in &pins {
            self.tables.pin(*id);
        }
        let write = self.write_state()?;
        write.alloc.unlinked.drain(..batch.len());
        write.alloc.reclaiming = true;
        let geometry = write.refcounts.geometry;
        let punches = runs
            .iter()
            .map(|run| (geometry.host_offset(run.start), run.count * geometry.cluster_size()))
            .collect();
        Ok(Answer::Ready(Some(ReclaimPlan { punches, runs, counts, pins })))
    }

    /// What each cluster's count will be.
    fn decremented(&self, batch: &[Unlinked]) -> Result<BTreeMap<u64, u64>, EngineError> {
        let refcounts = &self.write.as_ref().ok_or(EngineError::ReadOnly)?.refcounts;
        let mut counts = BTreeMap::new();
        for unlinked in batch {
            let run = unlinked.run;
            for cluster in run.start.0..run.start.0 + run.count {
                if refcounts.block_offset(refcounts.block_of(cluster))?.is_none() {
                    return Err(EngineError::RefcountZero { cluster });
                }
                let count = counts.entry(cluster).or_insert_with(|| self.refcount(cluster));
                *count = count.checked_sub(1).ok_or(EngineError::RefcountZero { cluster })?;
            }
        }
        Ok(counts)
    }

    /// Publishes the new counts; what was punched is known to be zero. `punched` has an item for each run.
    pub fn commit_reclaim(&mut self, plan: ReclaimPlan, punched: &[bool]) {
        for (cluster, count) in plan.counts {
            self.set_refcount(cluster, count);
        }
        for id in &plan.pins {
            self.tables.unpin(*id);
        }
        let alloc = &mut self.write.as_mut().expect("a plan was made").alloc;
        alloc.reclaiming = false;
        for (run, punched) in plan.runs.into_iter().zip(punched) {
            alloc.add_free(FreeRun { run, known_zero: *punched });
        }
    }
}

/// Joins ascending cluster numbers into runs.
fn runs_of(clusters: impl Iterator<Item = u64>) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for cluster in clusters {
        match runs.last_mut() {
            Some(last) if last.start.0 + last.count == cluster => last.count += 1,
            _ => runs.push(Run { start: HostCluster(cluster), count: 1 }),
        }
    }
    runs
}
