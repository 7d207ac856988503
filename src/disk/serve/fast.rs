//! The fast path: reads and overwrites whose clusters are all in the chain map go to the host at once. No future, no
//! allocation, no lock, no copy.
//!
//! Owns these requests while they are in flight. It refuses every request that it cannot serve; the slow path is in
//! slow.rs.

use std::cell::RefCell;
use std::rc::Rc;

use block::RequestId;
use engine::{EngineError, Epoch, FileIndex, Mapping, SubclusterPlaces};
use qcow2::{GuestOffset, HostOffset, SUBCLUSTERS, Subcluster};
use slab::Slab;
use smallvec::SmallVec;
use storage::guest::{GuestSlices, fill_guest_zero, guest_len, subrange_into};
use storage::{Completion, Errno, GuestSlice, IoQueue, Kind, Operation, Part, Parts, Storage, Token};

use crate::bounds::{FAST_RUNS, SPARE_MAX};
use crate::error::{RequestError, is_no_space};
use crate::range::ByteRange;
use crate::serve::request::Completed;
use crate::serve::worker::Worker;

/// A run of a request's bytes that has one target.
struct Run {
    target: Target,
    length: u64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Target {
    Zero,
    Data(FileIndex, HostOffset),
}

/// A request in flight.
struct InFlight {
    id: RequestId,
    epoch: Epoch,
    /// Operations still to complete.
    pending: u32,
    result: Result<(), Errno>,
    writes: bool,
}

/// A copy of a write, to retry it if it finds no space.
#[derive(Default)]
struct Kept {
    offset: u64,
    slices: GuestSlices,
}

/// A write that found no space, where requests wait for it: the slow path must serve it from the beginning.
pub(crate) struct NoSpace {
    pub id: RequestId,
    pub offset: u64,
    pub slices: GuestSlices,
}

/// The fast path of one thread.
pub(crate) struct FastPath<S: Storage> {
    worker: Rc<Worker<S>>,
    in_flight: Slab<InFlight>,
    /// By slot in `in_flight`; empty unless requests wait for space.
    kept: Vec<Kept>,
    /// Emptied part lists of completed operations. They are retained for their capacity, for the next operation with
    /// several pieces of memory.
    spare: Vec<Parts>,
    /// The memory of a run; retained to avoid an allocation.
    memory: GuestSlices,
    /// Where completed requests go: the queue's list.
    done: Rc<RefCell<Vec<Completed>>>,
}

impl<S: Storage> FastPath<S> {
    /// A fast path that adds completed requests to `done`.
    pub fn new(worker: Rc<Worker<S>>, done: Rc<RefCell<Vec<Completed>>>) -> Self {
        let (kept, spare, memory) = (Vec::new(), Vec::new(), GuestSlices::new());
        FastPath { worker, in_flight: Slab::new(), kept, spare, memory, done }
    }

    /// True if no request is in flight.
    pub fn is_idle(&self) -> bool {
        self.in_flight.is_empty()
    }

    /// Serves a read or write from the map alone. False if it cannot: the slow path must, and its epoch has not ended.
    pub fn start(
        &mut self,
        id: RequestId,
        epoch: Epoch,
        kind: Kind,
        offset: u64,
        slices: &[GuestSlice],
    ) -> bool {
        let writes = kind == Kind::Write;
        let range = ByteRange::new(offset, guest_len(slices) as u64);
        let Some(runs) = self.runs(range, writes) else { return false };
        let shared = &self.worker.shared;
        let takes = |run: &Run| match run.target {
            Target::Zero => true,
            Target::Data(file, _) => shared.file(file).takes(slices),
        };
        if !runs.iter().all(takes) {
            return false;
        }
        let pending = runs.iter().filter(|run| run.target != Target::Zero).count() as u32;
        let slot = self.in_flight.insert(InFlight { id, epoch, pending, result: Ok(()), writes });
        if writes && shared.space.waits() {
            keep(&mut self.kept, slot, offset, slices);
        }
        let mut at = 0;
        for run in &runs {
            let memory = if runs.len() == 1 {
                slices
            } else {
                subrange_into(&mut self.memory, slices, at as usize, run.length as usize);
                &self.memory[..]
            };
            at += run.length;
            match run.target {
                Target::Zero => fill_guest_zero(memory),
                Target::Data(file, offset) => {
                    let mut operation = Operation::bare(shared.file(file).id, kind, offset.0);
                    if memory.len() > 1 {
                        operation.parts = self.spare.pop().unwrap_or_default();
                    }
                    operation.parts.extend(memory.iter().copied().map(Part::Guest));
                    self.worker.driver.queue().push(Token(slot as u64), operation);
                }
            }
        }
        if pending == 0 {
            let lacking = self.finish(slot);
            debug_assert!(lacking.is_none(), "a request without I/O needs no space");
        }
        true
    }

    /// The targets of a range by the map, in at most [`FAST_RUNS`] runs. `None` if there are more, if the map does
    /// not know one, or if a write may not go there.
    fn runs(&self, range: ByteRange, writes: bool) -> Option<SmallVec<[Run; FAST_RUNS]>> {
        let engine = self.worker.engine();
        let unit = engine.unit();
        let mut runs: SmallVec<[Run; FAST_RUNS]> = SmallVec::new();
        let (mut at, end) = (range.offset, range.end());
        while at < end {
            let within = at & (unit - 1);
            let mut piece = (unit - within).min(end - at);
            let target = match engine.lookup(GuestOffset(at)) {
                Mapping::Zero if !writes => Target::Zero,
                Mapping::Data { file, offset, in_place } if in_place || !writes => {
                    Target::Data(file, HostOffset(offset.0 + within))
                }
                Mapping::Subclusters => {
                    let cluster = engine.lookup_subclusters(GuestOffset(at))?;
                    let (target, alike) = part(&cluster, GuestOffset(at), unit, writes)?;
                    piece = piece.min(alike);
                    target
                }
                _ => return None,
            };
            at += piece;
            let full = runs.len() == FAST_RUNS;
            match runs.last_mut() {
                Some(last) if follows(last, target) => last.length += piece,
                _ if full => return None,
                _ => runs.push(Run { target, length: piece }),
            }
        }
        Some(runs)
    }

    /// Takes the completion of one operation. After its last one a request is completed, or returned for the slow path.
    #[inline]
    pub fn complete(&mut self, completion: Completion) -> Option<Box<NoSpace>> {
        let slot = completion.token.0 as usize;
        let request = &mut self.in_flight[slot];
        request.pending -= 1;
        request.result = request.result.and(completion.result);
        let is_last = request.pending == 0;
        let mut parts = completion.parts;
        if parts.spilled() && self.spare.len() < SPARE_MAX {
            parts.clear();
            self.spare.push(parts);
        }
        if is_last { self.finish(slot) } else { None }
    }

    #[inline]
    fn finish(&mut self, slot: usize) -> Option<Box<NoSpace>> {
        let ended = self.in_flight.remove(slot);
        let worker = &self.worker;
        worker.exit(ended.epoch);
        if ended.writes
            && worker.shared.space.waits()
            && ended.result.is_err_and(is_no_space)
            && let Some(Kept { offset, slices }) = self.kept.get_mut(slot).map(std::mem::take)
        {
            // The location may have another owner by now: look up the whole range again.
            return Some(Box::new(NoSpace { id: ended.id, offset, slices }));
        }
        let mut result =
            ended.result.map_err(RequestError::io(if ended.writes { "writing" } else { "reading" }));
        if ended.writes && worker.engine().has_failed() {
            result = result.and(Err(EngineError::Failed.into()));
        }
        worker.failures.note(ended.id, &result, || worker.driver.now());
        self.done.borrow_mut().push(Completed { id: ended.id, result });
        None
    }
}

/// Records a write under its slot, in memory that an earlier write has left there.
fn keep(kept: &mut Vec<Kept>, slot: usize, offset: u64, slices: &[GuestSlice]) {
    if kept.len() <= slot {
        kept.resize_with(slot + 1, Kept::default);
    }
    let place = &mut kept[slot];
    place.offset = offset;
    place.slices.clear();
    place.slices.extend_from_slice(slices);
}

/// The target of the byte at an offset, in a cluster of `unit` bytes with subclusters, and for how many bytes from there
/// it holds. `None` if it is unknown, or a write may not go there.
fn part(cluster: &SubclusterPlaces, at: GuestOffset, unit: u64, writes: bool) -> Option<(Target, u64)> {
    let within = at.0 & (unit - 1);
    let size = unit / u64::from(SUBCLUSTERS);
    let index = within / size;
    let (kind, run) = cluster.subclusters.at(index as u32);
    let target = match kind {
        Subcluster::Zero if !writes => Target::Zero,
        Subcluster::Data if cluster.in_place || !writes => {
            Target::Data(cluster.file, HostOffset(cluster.offset.0 + within))
        }
        _ => return None,
    };
    Some((target, (index + u64::from(run)) * size - within))
}

fn follows(last: &Run, target: Target) -> bool {
    match (last.target, target) {
        (Target::Zero, Target::Zero) => true,
        (Target::Data(file, offset), Target::Data(next, at)) => {
            file == next && offset.0 + last.length == at.0
        }
        _ => false,
    }
}
