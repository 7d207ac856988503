//! Gives the top image an L2 table of its own. It is a new one if there is none, or a copy of a table that a
//! snapshot shares.
//!
//! All slices of the new table are resident and dirty until a cut writes them. The cut links the table only in its last
//! stage.

use std::task::Waker;

use qcow2::{HostCluster, HostOffset, HostRange, L1Entry};

use crate::answer::{Answer, TableSlot, ready};
use crate::entries::UsedEntry;
use crate::error::EngineError;
use crate::flush::l1_block_of;
use crate::layers::Qcow2Layer;
use crate::rules::order;
use crate::state::State;
use crate::tables::{Dirt, TableId};
use crate::turns::Turn;
use crate::waiters::WakeList;

/// A cluster that will become an L2 table. Have the host allocate it, then commit; or abort.
#[derive(Debug)]
#[must_use]
pub struct TablePlan {
    slot: TableSlot,
    host: HostCluster,
    /// Where the table will lie: one cluster.
    pub place: HostRange,
    /// The L1 block that will name the table. The host must allocate that block, too.
    pub link: HostRange,
    /// The table that this one copies; its slices are pinned.
    copy_of: Option<HostOffset>,
}

fn slices(top: &Qcow2Layer, slot: TableSlot) -> Vec<TableId> {
    (0..top.slices_per_table()).map(|slice| TableId::L2 { layer: top.file, table: slot.0, slice }).collect()
}

impl State {
    /// Plans a table; `Ready(None)` if the top image has it already.
    pub fn plan_table(
        &mut self,
        slot: TableSlot,
        turn: &Turn,
        waker: &Waker,
        wakes: &mut WakeList,
    ) -> Result<Answer<Option<TablePlan>>, EngineError> {
        let copy_of = match self.top_qcow2().l1_entry(slot.0)? {
            L1Entry::Table { copied: true, .. } => return Ok(Answer::Ready(None)),
            L1Entry::Table { offset, copied: false } => Some(offset),
            L1Entry::Unallocated => None,
        };
        ready!(self.may_dirty());
        if let Some(job) = self.write_state()?.table_jobs.get_mut(&slot)
            && !turn.has(job.turn)
        {
            job.waiters.add(waker);
            return Ok(Answer::Wait);
        }
        let ids = if copy_of.is_some() { slices(self.top_qcow2(), slot) } else { Vec::new() };
        ready!(self.need_tables(ids.iter().copied(), waker)?);
        let write = self.write_state()?;
        let Some(taken) = write.take_for_table(turn, slot, wakes)? else {
            // Others that need the table wait for it meanwhile, not for clusters.
            write.table_jobs.entry(slot).or_default().turn = turn.number();
            return Ok(Answer::Reserve);
        };
        write.table_jobs.entry(slot).or_default().turn = None;
        for id in ids {
            self.tables.pin(id);
        }
        let geometry = &self.top_qcow2().geometry;
        let host = taken.start;
        let place = HostRange::new(geometry.host_offset(host), geometry.cluster_size());
        let link = self.l1_block_place(l1_block_of(geometry, slot.0));
        Ok(Answer::Ready(Some(TablePlan { slot, host, place, link, copy_of })))
    }

    pub fn commit_table(&mut self, plan: TablePlan, wakes: &mut WakeList) {
        let top = self.top_qcow2_mut();
        let (ids, slice_bytes) = (slices(top, plan.slot), top.slice_bytes() as usize);
        let raw = L1Entry::Table { offset: plan.place.offset, copied: true }.encode();
        top.l1.set(UsedEntry { index: plan.slot.0, raw });
        let block = l1_block_of(&top.geometry, plan.slot.0);
        let old = plan.copy_of.map(|offset| top.geometry.host_cluster(offset));
        for id in ids {
            if old.is_some() {
                self.tables.mark(id, Dirt::New);
                self.tables.unpin(id);
            } else {
                self.tables.insert(id, vec![0; slice_bytes].into(), Dirt::New);
            }
        }
        let write = self.write.as_mut().expect("a plan was made");
        write.l1_dirty.extend(order::block_to_link(block));
        if let Some(old) = old {
            write.guard.remove(old, 1);
            write.alloc.free_later(old, write.flush.next_cut());
        }
        wakes.append(write.table_jobs.remove(&plan.slot).expect("the job was noted").waiters.take());
    }

    pub fn abort_table(&mut self, plan: TablePlan, wakes: &mut WakeList) {
        if plan.copy_of.is_some() {
            for id in slices(self.top_qcow2(), plan.slot) {
                self.tables.unpin(id);
            }
        }
        let write = self.write.as_mut().expect("a plan was made");
        write.guard.remove(plan.host, 1);
        // Nothing durable names the cluster, but it may have been written: it is freed through the quarantine.
        write.alloc.free_later(plan.host, 0);
        wakes.append(write.table_jobs.remove(&plan.slot).expect("the job was noted").waiters.take());
    }
}
