//! The requests of one queue that the disk has, and the chains that their slots belong to.
//!
//! A chain with one request has one slot, which is the tag. A discard of several segments has a slot for the chain and
//! one for each segment. Segment slots come from a small extra set, so that the depth promised to the disk always
//! holds. Segments wait in line while that set is used up.

use std::collections::VecDeque;

use slab::Slab;

use crate::bounds::SEGMENT_SLOTS;
use crate::device::{Done, GuestSlice, Request, Status, Tag};
use crate::request::{Kind, Submission};

/// A chain that the disk works on, or has finished.
#[derive(Debug)]
pub(crate) struct Pending {
    pub head: u16,
    pub kind: Kind,
    pub status_byte: GuestSlice,
    pub status: Status,
    /// Bytes of data, for the counters.
    pub bytes: u32,
    /// Bytes written to the chain on success, the status byte included.
    pub written: u32,
    /// Its requests that are not done.
    open: usize,
    /// The portion that it was taken with.
    portion: u32,
}

#[derive(Debug)]
enum Slot {
    Chain(Pending),
    Segment { chain: usize },
    Closing,
}

#[derive(Debug)]
pub(crate) struct InFlight {
    slots: Slab<Slot>,
    /// Segments not yet sent to the disk, with the slots of their chains.
    waiting: VecDeque<(usize, Request)>,
    /// Slots taken by segments.
    segments: usize,
    /// Counts portions, for [`InFlight::is_of_portion`].
    portion: u32,
}

impl InFlight {
    /// Room for every chain of a ring.
    pub(crate) fn new(ring_size: u16) -> Self {
        InFlight {
            slots: Slab::with_capacity(usize::from(ring_size) + SEGMENT_SLOTS + 1),
            waiting: VecDeque::new(),
            segments: 0,
            portion: 0,
        }
    }

    /// The most requests that a ring of this size has in flight on its disk.
    pub(crate) fn depth(ring_size: u16) -> u32 {
        u32::from(ring_size) + SEGMENT_SLOTS as u32 + 1
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// Slots in use: requests that the disk has, and chains whose segments it has.
    pub(crate) fn len(&self) -> usize {
        self.slots.len()
    }

    /// Chains that are added from now on are of another portion than those before.
    pub(crate) fn begin_portion(&mut self) {
        self.portion = self.portion.wrapping_add(1);
    }

    /// True if the chain was added since the last [`InFlight::begin_portion`].
    pub(crate) fn is_of_portion(&self, pending: &Pending) -> bool {
        pending.portion == self.portion
    }

    /// Adds a chain. A single request is returned, to be submitted with the tag. Several requests wait, and
    /// [`InFlight::next_segment`] returns them.
    pub(crate) fn add(&mut self, head: u16, submission: Submission) -> Option<(Tag, Request)> {
        let Submission { kind, status_byte, requests, bytes, written } = submission;
        let open = requests.len();
        let pending = Pending {
            head,
            kind,
            status_byte,
            status: Status::Ok,
            bytes,
            written,
            open,
            portion: self.portion,
        };
        let slot = self.slots.insert(Slot::Chain(pending));
        if let [request] = requests[..] {
            return Some((tag(slot), request));
        }
        self.waiting.extend(requests.into_iter().map(|request| (slot, request)));
        None
    }

    /// True if [`InFlight::next_segment`] would return a segment.
    pub(crate) fn may_submit(&self) -> bool {
        self.segments < SEGMENT_SLOTS && !self.waiting.is_empty()
    }

    /// The next segment that may be submitted.
    pub(crate) fn next_segment(&mut self) -> Option<(Tag, Request)> {
        if !self.may_submit() {
            return None;
        }
        let (chain, request) = self.waiting.pop_front()?;
        self.segments += 1;
        Some((tag(self.slots.insert(Slot::Segment { chain })), request))
    }

    /// A tag for the session's own flush.
    pub(crate) fn add_closing(&mut self) -> Tag {
        tag(self.slots.insert(Slot::Closing))
    }

    /// Records a request as done. Returns the chain if that was its last request.
    pub(crate) fn finish(&mut self, done: Done) -> Option<Pending> {
        let slot = done.tag.0 as usize;
        let chain =
            match self.slots.try_remove(slot).expect("the disk finished a request that it did not have") {
                Slot::Closing => return None,
                Slot::Segment { chain } => {
                    self.segments -= 1;
                    chain
                }
                Slot::Chain(pending) => {
                    assert_eq!(pending.open, 1, "the disk finished a request that it did not have");
                    return Some(Pending { status: done.status, ..pending });
                }
            };
        let Some(Slot::Chain(pending)) = self.slots.get_mut(chain) else {
            unreachable!("a segment's chain stays until all its segments are done");
        };
        pending.open -= 1;
        if done.status != Status::Ok {
            pending.status = done.status;
        }
        if pending.open > 0 {
            return None;
        }
        match self.slots.remove(chain) {
            Slot::Chain(pending) => Some(pending),
            _ => unreachable!("looked at just before"),
        }
    }
}

fn tag(slot: usize) -> Tag {
    Tag(u32::try_from(slot).expect("a ring has at most 32,768 descriptors"))
}
