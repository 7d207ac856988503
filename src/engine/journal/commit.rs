//! The records of a commit: added and made valid before the commit is published. And the beginning and end of a journal.

use qcow2::{GuestCluster, L2Entry};

use crate::Engine;
use crate::answer::Answer;
use crate::error::EngineError;
use crate::journal::ring::JournalMemory;
use crate::state::State;
use crate::write::Allocation;

impl State {
    /// For plans that end in records: `Crowded` if the journal has no room for them.
    pub fn may_record(&mut self) -> Result<Answer<()>, EngineError> {
        let crowded = self.write_state()?.journal.is_crowded();
        Ok(if crowded { Answer::Crowded } else { Answer::Ready(()) })
    }

    /// Reserves room for the records of an allocation.
    pub fn reserve_records(&mut self, new: &mut Allocation) {
        new.records = self.write.as_mut().map_or(0, |write| write.journal.reserve());
    }

    /// Records the entries that an allocation is about to get, and makes the records valid. Only then may the words be
    /// published: from then on a write in place may be answered that needs the entry.
    pub fn record_links(&mut self, done: &Allocation) {
        let journal = &mut self.write.as_mut().expect("a plan was made").journal;
        journal.release(done.records);
        if !journal.is_on() {
            return;
        }
        let geometry = self.top_qcow2().geometry;
        if geometry.extended_l2 {
            for at in 0..done.clusters {
                let (_, guest, entry) = self.link(done, at);
                self.record(guest, entry);
            }
        } else {
            let (_, guest, entry) = self.link(done, 0);
            let raw = self.top_qcow2().encode_entry(entry);
            let journal = &mut self.write.as_mut().expect("a plan was made").journal;
            journal.note(guest, done.clusters, raw, &geometry);
        }
        self.publish_records();
    }

    /// Adds an entry to the records of this commit.
    pub fn record(&mut self, guest: GuestCluster, entry: L2Entry) {
        if !self.write.as_ref().is_some_and(|write| write.journal.is_on()) {
            return;
        }
        let top = self.top_qcow2();
        let (geometry, raw) = (top.geometry, top.encode_entry(entry));
        let journal = &mut self.write.as_mut().expect("looked at just before").journal;
        journal.note(guest, 1, raw, &geometry);
    }

    /// Makes the records of this commit valid.
    pub fn publish_records(&mut self) {
        if let Some(write) = &mut self.write {
            write.journal.publish();
        }
    }
}

impl Engine {
    /// Begins a journal for the number in the image's header. No request is in flight, and everything is durable. False
    /// if the memory is too small for one, or the image is not written.
    ///
    /// # Panics
    /// If a request is in flight: a programmer error.
    pub fn begin_journal(&self, memory: JournalMemory, number: u64) -> bool {
        self.with(|state, _| {
            let Some(write) = &mut state.write else { return false };
            write.journal.begin(memory, number, &write.refcounts.geometry)
        })
    }

    /// Ends the journal. No request is in flight, and everything is durable.
    ///
    /// # Panics
    /// As for [`Engine::begin_journal`].
    pub fn end_journal(&self) {
        self.with(|state, _| {
            if let Some(write) = &mut state.write {
                write.journal.end();
            }
        });
    }

    /// True if commits are recorded in a journal.
    pub fn has_journal(&self) -> bool {
        self.with(|state, _| state.write.as_ref().is_some_and(|write| write.journal.is_on()))
    }
}
