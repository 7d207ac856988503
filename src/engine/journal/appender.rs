//! The journal as its owner sees it: where records are added, how many there is room for, and when they leave.
//!
//! Owns the positions and the room that plans have reserved. `ring` has the memory.

use qcow2::{Geometry, GuestCluster, RawL2Entry};

use crate::bounds::JOURNAL_CUT_SHARE;
use crate::journal::record::Record;
use crate::journal::ring::{JournalMemory, Ring};
use crate::journal::seal::Seal;
use crate::rules::order;

/// The most records of one allocation. Its clusters are one run, but subclusters may differ in the first and the last.
const ALLOCATION_RECORDS: u64 = 1;
const ALLOCATION_RECORDS_EXTENDED: u64 = 3;

/// The journal of the present session, if there is one.
#[derive(Default)]
pub(crate) struct Journal {
    ring: Option<Ring>,
    /// The first record that is needed. Positions grow from journal to journal, so that a cut that was taken before a
    /// switch moves nothing.
    tail: u64,
    /// Past the last record.
    head: u64,
    /// Records that plans have room for.
    reserved: u64,
    /// The most records of an allocation, and so of any plan.
    of_a_plan: u64,
    /// The record that the next entry may join.
    pending: Option<Record>,
}

impl Journal {
    /// True if commits are recorded.
    pub fn is_on(&self) -> bool {
        self.ring.is_some()
    }

    /// Past the last record: where a cut that is taken now ends.
    pub fn head(&self) -> u64 {
        self.head
    }

    /// True if so many more records fit.
    fn has_room(&self, records: u64) -> bool {
        self.ring.as_ref().is_none_or(|ring| {
            let taken = self.head - self.tail + self.reserved + u64::from(self.pending.is_some());
            taken + records <= ring.slots()
        })
    }

    /// True if plans must wait for a cut.
    pub fn is_crowded(&self) -> bool {
        !self.has_room(self.of_a_plan)
    }

    /// True if a cut would make room.
    pub fn is_uncut(&self) -> bool {
        self.is_on() && self.head > self.tail
    }

    /// True if so much of the room is taken that a cut is due.
    pub fn wants_cut(&self) -> bool {
        self.ring.as_ref().is_some_and(|ring| self.head - self.tail >= ring.slots() / JOURNAL_CUT_SHARE)
    }

    /// Reserves room for an allocation. Returns how many records, to be released when it is committed or given up.
    pub fn reserve(&mut self) -> u64 {
        let records = if self.is_on() { self.of_a_plan } else { 0 };
        self.reserved += records;
        records
    }

    /// An allocation no longer needs its room.
    pub fn release(&mut self, records: u64) {
        self.reserved -= records;
    }

    /// Adds an entry to the records that the next [`Journal::publish`] makes valid.
    pub fn note(&mut self, guest: GuestCluster, count: u64, raw: RawL2Entry, geometry: &Geometry) {
        if count == 1 && self.pending.as_mut().is_some_and(|last| last.add(guest, raw, geometry)) {
            return;
        }
        self.append();
        self.pending = Some(Record { first: guest, count, raw });
    }

    /// Stores the pending record behind the others.
    fn append(&mut self) {
        let (Some(record), Some(ring)) = (self.pending.take(), &self.ring) else { return };
        assert!(self.head - self.tail < ring.slots(), "each plan reserves room for its records");
        ring.store(self.head, &record);
        self.head += 1;
    }

    /// Makes all records valid.
    #[inline]
    pub fn publish(&mut self) {
        if self.pending.is_none() || !order::is_recorded_before_the_answer() {
            return;
        }
        self.append();
        if let Some(ring) = &self.ring {
            ring.move_head(self.head);
        }
    }

    /// A cut that was taken when the head was here is durable: the records before it are no longer needed. True if plans
    /// had to wait, and need not any more.
    pub fn cut_is_durable(&mut self, head: u64) -> bool {
        let was_crowded = self.is_crowded();
        self.tail = self.tail.max(head);
        if let Some(ring) = &self.ring {
            ring.move_tail(self.tail);
        }
        was_crowded && !self.is_crowded()
    }

    /// Begins a journal for a number, where the last one ends. False if the memory is too small.
    pub fn begin(&mut self, memory: JournalMemory, number: u64, geometry: &Geometry) -> bool {
        self.end();
        self.of_a_plan = if geometry.extended_l2 { ALLOCATION_RECORDS_EXTENDED } else { ALLOCATION_RECORDS };
        self.ring = Ring::begin(memory, Seal::of(number), self.head);
        self.is_on()
    }

    /// Ends the journal: everything in it is durable.
    pub fn end(&mut self) {
        assert!(self.reserved == 0, "no request is in flight when a journal begins or ends");
        (self.ring, self.pending, self.tail) = (None, None, self.head);
    }
}

#[cfg(all(test, not(loom)))]
mod tests;
