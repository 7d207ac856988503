//! The record of one split queue in the in-flight region: which chains were taken and not yet handed back.
//!
//! A worker records each chain before the disk gets it, and each batch that it hands back around the store of the used
//! index. A worker may die between any two stores. Its successor finishes the batch that was being handed back, and
//! learns which chains it must do again, in which order. docs/concurrency.md, "The in-flight region", has the order of
//! the stores.

use super::cells::Split;
use super::defects::{AreaError, VERSION, check_header, put_in_order};
use super::layout::{Layout, RingKind};
use super::region::{QueueArea, Region};

/// A ring as its successor finds it in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RingIndexes {
    /// Descriptors of the ring.
    pub size: u16,
    /// The driver's index: the end of the chains that it made available.
    pub available: u16,
    /// The device's index: the end of the chains that were handed back.
    pub used: u16,
}

/// A queue's area, brought in order.
#[derive(Debug)]
pub(crate) struct Recovered {
    pub tracker: SplitTracker,
    /// The heads of the chains to do again, in the order in which they were taken. At most as many as the ring has
    /// descriptors, each in range and there once. They stay recorded.
    pub in_flight: Vec<u16>,
}

/// Keeps the record of one queue. One worker has it, and stores to the area from one thread only.
#[derive(Debug)]
pub struct SplitTracker {
    area: QueueArea<Split>,
    /// The counter of the next chain.
    counter: u64,
    /// Our copy of `last_batch_head`.
    last: u16,
}

impl SplitTracker {
    /// The record of a ring of `size` descriptors, unused so far, in a region of its own.
    ///
    /// # Panics
    /// When the host refuses the region.
    pub fn alone(size: u16) -> Self {
        let region =
            Region::alone(Layout { kind: RingKind::Split, queues: 1, queue_size: size }).expect("a region");
        Self::begin_anew(region.queue(0).expect("the only queue"), 0)
    }

    /// Whether a ring was served with this area before, at whatever time.
    pub(crate) fn was_used(area: &QueueArea<Split>) -> bool {
        // Stays when the area is given up.
        area.header().desc_num.load() != 0
    }

    /// Takes an area over from the last worker, which may have died. If the driver waits for nothing, nothing is in
    /// flight, and the area begins anew whatever it holds: the guest may have reset its ring since. May itself die at
    /// any store and be done again.
    ///
    /// # Errors
    /// When the area or the ring cannot be as they are. Then nothing was changed.
    pub(crate) fn recover(area: QueueArea<Split>, ring: RingIndexes) -> Result<Recovered, AreaError> {
        let (header, entries) = (area.header(), area.entries().len());
        if entries < usize::from(ring.size) {
            return Err(AreaError::Small { entries, size: ring.size });
        }
        let outstanding = ring.available.wrapping_sub(ring.used);
        if outstanding > ring.size {
            return Err(AreaError::Outstanding { outstanding, size: ring.size });
        }
        let version = header.version.load();
        if version == 0 || outstanding == 0 {
            return Ok(Recovered { tracker: Self::begin_anew(area, ring.used), in_flight: Vec::new() });
        }
        check_header(version, header.features.load(), header.desc_num.load(), entries)?;
        let batch = last_batch(&area, ring)?;
        let in_flight = in_flight(&area, ring, &batch, outstanding)?;
        // Only now is anything stored. Used index last: until it is there, a successor does the same again.
        for (entry, listed) in area.entries().iter().zip(batch) {
            if listed {
                entry.inflight.store(0);
            }
        }
        header.used_idx.store(ring.used);
        let counter = in_flight.last().map_or(0, |(counter, _)| counter + 1);
        let last = header.last_batch_head.load();
        let in_flight = in_flight.into_iter().map(|(_, head)| head).collect();
        Ok(Recovered { tracker: SplitTracker { area, counter, last }, in_flight })
    }

    fn begin_anew(area: QueueArea<Split>, used: u16) -> Self {
        let header = area.header();
        // The version is 0 until everything else is in order.
        header.version.store(0);
        for entry in area.entries() {
            entry.inflight.store(0);
        }
        header.features.store(0);
        // A region is made for at most 65,535 descriptors.
        header.desc_num.store(area.entries().len() as u16);
        header.last_batch_head.store(0);
        header.used_idx.store(used);
        header.version.store(VERSION);
        SplitTracker { area, counter: 0, last: 0 }
    }

    /// Records a chain that was taken. Before the disk gets it, and before the next chain is taken.
    ///
    /// # Panics
    /// When the ring has no such descriptor.
    #[inline]
    pub fn begin(&mut self, head: u16) {
        let entry = &self.area.entries()[usize::from(head)];
        entry.counter.store(self.counter);
        entry.inflight.store(1);
        self.counter += 1;
    }

    /// Lists the chains that are about to be handed back. Before the store of the used index.
    #[inline]
    pub fn list(&mut self, heads: impl Iterator<Item = u16>) {
        let entries = self.area.entries();
        for head in heads {
            entries[usize::from(head)].next.store(self.last);
            self.last = head;
        }
        self.area.header().last_batch_head.store(self.last);
    }

    /// Records that the listed chains were handed back, up to this used index of the ring. After its store, and
    /// before the next chain is taken.
    #[inline]
    pub fn clear(&mut self, heads: impl Iterator<Item = u16>, used: u16) {
        let entries = self.area.entries();
        for head in heads {
            entries[usize::from(head)].inflight.store(0);
        }
        self.area.header().used_idx.store(used);
    }

    /// Gives the area up. Only when every chain was handed back, but for the newest ones, which are in the ring again.
    /// Whoever uses it next begins anew, with whatever ring.
    pub(crate) fn close(self) {
        self.area.header().version.store(0);
    }
}

/// The chains of the batch that was handed back last, if its record is not complete: true at each of their heads.
fn last_batch(area: &QueueArea<Split>, ring: RingIndexes) -> Result<Vec<bool>, AreaError> {
    let (header, entries) = (area.header(), area.entries());
    let recorded = header.used_idx.load();
    let chains = ring.used.wrapping_sub(recorded);
    if chains > ring.size {
        return Err(AreaError::Batch { recorded, used: ring.used, size: ring.size });
    }
    let mut listed = vec![false; usize::from(ring.size)];
    let mut head = header.last_batch_head.load();
    for _ in 0..chains {
        match listed.get_mut(usize::from(head)) {
            Some(seen) if !*seen => *seen = true,
            _ => return Err(AreaError::BatchHead { head }),
        }
        head = entries[usize::from(head)].next.load();
    }
    Ok(listed)
}

/// Counters and heads of the chains in flight, in order, without those of the last batch.
fn in_flight(
    area: &QueueArea<Split>,
    ring: RingIndexes,
    batch: &[bool],
    outstanding: u16,
) -> Result<Vec<(u64, u16)>, AreaError> {
    let mut found = Vec::new();
    for (head, entry) in (0..).zip(area.entries()) {
        match entry.inflight.load() {
            0 => continue,
            1 => {}
            state => return Err(AreaError::State { head, state }),
        }
        match batch.get(usize::from(head)) {
            Some(true) => {}
            Some(false) => found.push((entry.counter.load(), head)),
            None => return Err(AreaError::Head { head, size: ring.size }),
        }
    }
    if found.len() > usize::from(outstanding) {
        return Err(AreaError::TooMany { in_flight: found.len(), outstanding });
    }
    put_in_order(&mut found)?;
    Ok(found)
}
