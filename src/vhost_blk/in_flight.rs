//! The requests of one queue that the disk has, and the chains that their slots belong to.
//!
//! A chain with one small request has one slot, whose number is its ID. Any other has a slot for the chain and one for each
//! piece that the disk has; the rest of it waits here. Slots of pieces come from a small extra set, so that the depth
//! promised to the disk always holds. Counts the bytes that the disk has, and those of the current batch.

use std::collections::VecDeque;

use block::{Completed, Request, RequestId};
use slab::Slab;

use crate::bounds::{IN_FLIGHT_BYTES, PIECE_BYTES, PIECE_SLOTS};
use crate::device::GuestSlice;
use crate::pieces::{Cutter, Rest};
use crate::request::{Kind, Status, Submission};

/// What becomes of a chain once the disk has nothing of it any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// It is answered.
    Answer,
    /// It goes back into the ring: whoever serves the ring next does all of it again.
    PutBack,
    /// It stays recorded as in flight in the region, so that the next worker does all of it again.
    Leave,
}

/// A chain that the disk works on, or has finished.
#[derive(Debug)]
pub(crate) struct Pending {
    pub head: u16,
    /// Its place in the order in which the chains were taken, if it is known. Counts modulo 65,536.
    pub sequence: Option<u16>,
    pub kind: Kind,
    pub status_byte: GuestSlice,
    pub status: Status,
    /// Bytes of data, for the counters.
    pub bytes: u32,
    /// Bytes written to the chain on success, the status byte included.
    pub written: u32,
    pub end: End,
    /// Its requests that the disk has.
    open: usize,
    /// The disk does not have all of it yet.
    has_rest: bool,
    /// The portion that it was taken with.
    portion: u32,
}

#[derive(Debug)]
enum Slot {
    Chain(Pending, u64),
    /// A piece of a chain, and its weight.
    Piece(usize, u64),
    Closing,
}

/// Reads, writes, write zeroes, discards.
const LANES: usize = 4;

/// The chains of one kind that go in pieces.
#[derive(Debug, Default)]
struct Lane {
    /// Those that the disk does not have all of, in the order of their arrival.
    rests: VecDeque<Rest>,
    /// Slots taken by their pieces.
    pieces: usize,
}

impl Lane {
    /// Whether the next piece has a slot.
    fn is_ready(&self) -> bool {
        !self.rests.is_empty() && self.pieces < PIECE_SLOTS
    }
}

#[derive(Debug)]
pub(crate) struct InFlight {
    slots: Slab<Slot>,
    cutter: Cutter,
    /// One for each kind of request that goes in pieces. Requests of one kind may all wait for help. They must not
    /// hold back those of another, and above all no reads and no discards, which may free space.
    lanes: [Lane; LANES],
    /// The weight of what the disk has: reads, and everything else.
    reads: u64,
    others: u64,
    /// The weight of what went to the disk since the last [`InFlight::end_batch`].
    batch: u64,
    /// Counts portions, for [`InFlight::is_of_portion`].
    portion: u32,
}

impl InFlight {
    /// Room for every chain of a ring.
    pub(crate) fn new(ring_size: u16, cutter: Cutter) -> Self {
        InFlight {
            slots: Slab::with_capacity(Self::depth(ring_size) as usize),
            cutter,
            lanes: Default::default(),
            reads: 0,
            others: 0,
            batch: 0,
            portion: 0,
        }
    }

    /// The most requests that a ring of this size has in flight on its disk.
    pub(crate) fn depth(ring_size: u16) -> u32 {
        u32::from(ring_size) + (LANES * PIECE_SLOTS) as u32 + 1
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// Slots in use: requests that the disk has, and chains whose pieces it has.
    pub(crate) fn len(&self) -> usize {
        self.slots.len()
    }

    /// True if the disk does not have all of some chain yet.
    pub(crate) fn has_rest(&self) -> bool {
        self.lanes.iter().any(|lane| !lane.rests.is_empty())
    }

    /// Whether one more chain may be taken, however large. `waits`: the disk has requests that wait for help.
    ///
    /// A chain that is not wholly at the disk is the last one taken, so that a stop can put it back. Neither this nor
    /// the weight in flight counts for requests that wait for help: others must pass them.
    pub(crate) fn has_room(&self, waits: bool) -> bool {
        (waits || !self.has_rest()) && self.has_weight(waits)
    }

    /// Whether one more piece may go to the disk in this batch.
    fn has_weight(&self, waits: bool) -> bool {
        let others = if waits { 0 } else { self.others };
        self.batch < PIECE_BYTES && self.reads + others < IN_FLIGHT_BYTES
    }

    /// A batch has gone to the disk: from now on the next one is counted.
    pub(crate) fn end_batch(&mut self) {
        self.batch = 0;
    }

    /// Chains that are added from now on are of another portion than those before.
    pub(crate) fn begin_portion(&mut self) {
        self.portion = self.portion.wrapping_add(1);
    }

    /// True if the chain was added since the last [`InFlight::begin_portion`].
    pub(crate) fn is_of_portion(&self, pending: &Pending) -> bool {
        pending.portion == self.portion
    }

    /// Adds a chain with its memory. A small request is returned, to be submitted with the ID. Any other waits, and
    /// [`InFlight::next_piece`] returns its pieces.
    pub(crate) fn add(
        &mut self,
        head: u16,
        sequence: Option<u16>,
        submission: Submission,
        data: &[GuestSlice],
    ) -> Option<(RequestId, Request)> {
        let Submission { kind, status_byte, requests, bytes, written } = submission;
        let whole = self.cutter.whole(&requests, bytes);
        let pending = Pending {
            head,
            sequence,
            kind,
            status_byte,
            status: Status::Ok,
            bytes,
            written,
            end: End::Answer,
            open: usize::from(whole.is_some()),
            has_rest: whole.is_none(),
            portion: self.portion,
        };
        let slot = self.slots.insert(Slot::Chain(pending, whole.unwrap_or(0)));
        if let Some(weight) = whole {
            self.count(kind, weight);
            return Some((id_of(slot), requests[0]));
        }
        self.lanes[lane_of(kind)].rests.push_back(Rest::new(slot, requests, data, bytes));
        None
    }

    /// True if [`InFlight::next_piece`] would return a piece.
    pub(crate) fn may_submit(&self, waits: bool) -> bool {
        self.has_weight(waits) && self.lanes.iter().any(Lane::is_ready)
    }

    /// The next piece that may be submitted. Its memory replaces `slices`.
    pub(crate) fn next_piece(
        &mut self,
        waits: bool,
        slices: &mut Vec<GuestSlice>,
    ) -> Option<(RequestId, Request)> {
        if !self.has_weight(waits) {
            return None;
        }
        let lane = self.lanes.iter_mut().find(|lane| lane.is_ready())?;
        let rest = lane.rests.front_mut()?;
        let (request, weight) = rest.next(&self.cutter, slices);
        let (chain, ends) = (rest.chain, rest.is_empty());
        if ends {
            lane.rests.pop_front();
        }
        lane.pieces += 1;
        let pending = chain_of(&mut self.slots, chain);
        pending.open += 1;
        pending.has_rest = !ends;
        let kind = pending.kind;
        self.count(kind, weight);
        Some((id_of(self.slots.insert(Slot::Piece(chain, weight))), request))
    }

    /// The ID of the session's own flush.
    pub(crate) fn add_closing(&mut self) -> RequestId {
        id_of(self.slots.insert(Slot::Closing))
    }

    /// Records a request as done. Returns the chain if that was its last request. A chain with a request that failed only
    /// because it no longer waits for help, as `is_left` says, stays recorded.
    pub(crate) fn finish<E>(
        &mut self,
        done: Completed<E>,
        is_left: impl FnOnce(&E) -> bool,
    ) -> Option<Pending> {
        let slot = done.id.0 as usize;
        let (status, end) = match &done.result {
            Ok(()) => (Status::Ok, End::Answer),
            Err(error) if is_left(error) => (Status::IoError, End::Leave),
            Err(_) => (Status::IoError, End::Answer),
        };
        let (chain, weight) =
            match self.slots.try_remove(slot).expect("the disk finished a request that it did not have") {
                Slot::Closing => return None,
                Slot::Piece(chain, weight) => (chain, weight),
                Slot::Chain(pending, weight) => {
                    assert!(!pending.has_rest, "the disk finished a request that it did not have");
                    *self.weight_of(pending.kind) -= weight;
                    return Some(Pending { status, end, ..pending });
                }
            };
        let pending = chain_of(&mut self.slots, chain);
        pending.open -= 1;
        if status != Status::Ok {
            pending.status = status;
        }
        if end == End::Leave {
            pending.end = end;
        }
        let (kind, failed) = (pending.kind, pending.status != Status::Ok);
        *self.weight_of(kind) -= weight;
        let lane = &mut self.lanes[lane_of(kind)];
        lane.pieces -= 1;
        if failed {
            // The guest learns of one error, so the disk is spared the rest.
            lane.rests.retain(|rest| rest.chain != chain);
            chain_of(&mut self.slots, chain).has_rest = false;
        }
        self.take_ended(chain)
    }

    /// The ring is being stopped: the disk gets no more pieces. A chain whose rest it lacks is put back into the
    /// ring if no later one stays taken: `next` is the place after the newest. Else it fails. A chain of an earlier
    /// worker, whose place is not known, stays recorded as in flight; with `leaves` so does any that would fail. Returns
    /// the chains of which the disk has nothing, in the order of their arrival; [`InFlight::finish`] returns the others.
    pub(crate) fn let_rests_go(&mut self, next: u16, leaves: bool) -> Vec<Pending> {
        let mut newest = next.wrapping_sub(1);
        let mut ended = Vec::new();
        let mut chains: Vec<usize> =
            self.lanes.iter_mut().flat_map(|lane| lane.rests.drain(..)).map(|rest| rest.chain).collect();
        // The newest first.
        chains.sort_by_key(|chain| {
            let sequence = chain_of(&mut self.slots, *chain).sequence;
            sequence.map_or(u32::MAX, |sequence| next.wrapping_sub(sequence).into())
        });
        for chain in chains {
            let pending = chain_of(&mut self.slots, chain);
            pending.has_rest = false;
            match pending.sequence {
                None => pending.end = End::Leave,
                Some(sequence) if sequence == newest => {
                    newest = newest.wrapping_sub(1);
                    pending.end = End::PutBack;
                }
                Some(_) if leaves => pending.end = End::Leave,
                Some(_) => pending.status = Status::IoError,
            }
            ended.extend(self.take_ended(chain));
        }
        ended.reverse();
        ended
    }

    /// Removes a chain that goes in pieces, if none of it is left.
    fn take_ended(&mut self, chain: usize) -> Option<Pending> {
        let pending = chain_of(&mut self.slots, chain);
        if pending.open > 0 || pending.has_rest {
            return None;
        }
        match self.slots.remove(chain) {
            Slot::Chain(pending, _) => Some(pending),
            _ => unreachable!("looked at just before"),
        }
    }

    fn count(&mut self, kind: Kind, weight: u64) {
        *self.weight_of(kind) += weight;
        self.batch += weight;
    }

    fn weight_of(&mut self, kind: Kind) -> &mut u64 {
        if kind == Kind::Read { &mut self.reads } else { &mut self.others }
    }
}

fn lane_of(kind: Kind) -> usize {
    match kind {
        Kind::Read => 0,
        Kind::Write => 1,
        Kind::WriteZeroes => 2,
        Kind::Discard => 3,
        Kind::Flush | Kind::GetId | Kind::Unknown => unreachable!("these do not go in pieces"),
    }
}

fn chain_of(slots: &mut Slab<Slot>, chain: usize) -> &mut Pending {
    match slots.get_mut(chain) {
        Some(Slot::Chain(pending, _)) => pending,
        _ => unreachable!("a piece's chain stays until all its pieces are done"),
    }
}

fn id_of(slot: usize) -> RequestId {
    RequestId(u32::try_from(slot).expect("a ring has at most 32,768 descriptors"))
}
