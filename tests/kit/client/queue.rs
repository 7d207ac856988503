//! One queue of requests on a ring: slots with their buffers, submission, completion, sleeping.
//!
//! Owns the queue's part of the shared memory and its three eventfds. A queue can move to another thread; queues
//! share only the mapping. The path from [`Queue::acquire`] to [`Queue::release`] allocates nothing. Protocol
//! errors of a device are reported; the device is never trusted.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::events::{Events, Wake};
use super::layout::QueueLayout;
use super::memory::{SharedMemory, View};
use super::raw::RawRing;
use super::request::{Command, Direction, Outcome, Request, SECTOR, sectors};
use super::ring::{self, Descriptor, Ring, RingLayout, store_descriptor};
use super::{ClientError, Status};

/// One request's location in a [`Queue`]: its descriptors, header, status and buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Slot(pub(super) u16);

impl Slot {
    /// A number from 0 up to, but not including, [`Queue::slots`].
    pub fn index(self) -> usize {
        usize::from(self.0)
    }
}

/// A completion on the fast path. The slot's buffer is unchanged until the slot is released.
#[derive(Clone, Copy, Debug)]
pub struct Completion {
    /// The request's slot.
    pub slot: Slot,
    /// Its status byte.
    pub status: Status,
    /// The used element's length in bytes.
    pub used_length: u32,
}

/// A handle from [`Queue::submit`] for the outcome, to be redeemed once with [`Queue::wait`] or [`Queue::take`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[must_use = "the outcome is kept until it is asked for"]
pub struct Ticket {
    queue: usize,
    serial: u64,
}

impl Ticket {
    /// The queue on which the request was sent.
    pub fn queue(self) -> usize {
        self.queue
    }
}

#[derive(Clone, Copy, Debug)]
struct SlotState {
    in_flight: bool,
    /// The command in flight, for the data and the checks at completion.
    command: Command,
    /// The serial number of the request's ticket, if it has one.
    serial: Option<u64>,
}

/// One queue of a client.
#[derive(Debug)]
pub struct Queue {
    index: usize,
    ring: Ring,
    memory: Arc<SharedMemory>,
    layout: QueueLayout,
    events: Events,
    headers: View<AtomicU64>,
    statuses: View<AtomicU8>,
    /// One table per slot, if the queue uses indirect descriptors.
    tables: Option<View<AtomicU64>>,
    slots: Vec<SlotState>,
    free: Vec<Slot>,
    in_flight: usize,
    timeout: Duration,
    spin_max: Duration,
    spin: Duration,
    next_serial: u64,
    outcomes: HashMap<u64, Outcome>,
    completions: Vec<Completion>,
    /// Kicks sent, so that a test or a benchmark can observe batching.
    kicks: u64,
    /// Times the queue slept on its call eventfd.
    sleeps: u64,
}

/// The parts of a queue; see [`Queue::new`].
pub(super) struct Parts {
    pub index: usize,
    pub memory: Arc<SharedMemory>,
    pub layout: QueueLayout,
    pub events: Events,
    pub event_idx: bool,
    pub base: u16,
    pub timeout: Duration,
    pub spin_max: Duration,
}

impl Queue {
    pub(super) fn new(parts: Parts) -> Self {
        let Parts { index, memory, layout, events, event_idx, base, timeout, spin_max } = parts;
        let ring = Ring::new(&memory, layout.ring, layout.size, base, event_idx);
        let idle = SlotState { in_flight: false, command: Command::flush(), serial: None };
        let slots = layout.slots;
        Self {
            index,
            ring,
            headers: View::new(&memory, layout.headers, 8 * usize::from(slots)),
            statuses: View::new(&memory, layout.headers, 64 * usize::from(slots)),
            tables: layout
                .tables
                .map(|at| View::new(&memory, at, 2 * usize::from(slots) * usize::from(layout.chain))),
            memory,
            layout,
            events,
            slots: vec![idle; usize::from(slots)],
            free: (0..slots).rev().map(Slot).collect(),
            in_flight: 0,
            timeout,
            spin_max,
            spin: spin_max,
            next_serial: 0,
            outcomes: HashMap::new(),
            completions: Vec::with_capacity(usize::from(slots)),
            kicks: 0,
            sleeps: 0,
        }
    }

    /// The number of this queue on the device.
    pub fn index(&self) -> usize {
        self.index
    }

    /// How many requests can be in flight.
    pub fn slots(&self) -> usize {
        self.slots.len()
    }

    /// Requests in flight.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Bytes of data that one request can carry.
    pub fn capacity(&self) -> usize {
        self.layout.capacity
    }

    /// Kicks sent so far.
    pub fn kicks(&self) -> u64 {
        self.kicks
    }

    /// Times the queue slept so far.
    pub fn sleeps(&self) -> u64 {
        self.sleeps
    }

    /// The longest wait for a completion before it counts as a failure.
    pub fn timeout(&self) -> Duration {
        self.timeout
    }

    /// The slot's buffer as words, to write or check contents in place.
    pub fn words(&self, slot: Slot) -> View<AtomicU64> {
        View::new(&self.memory, self.layout.data_of(slot.0), self.layout.capacity / 8)
    }

    /// Copies bytes to the start of the slot's buffer.
    pub fn write_data(&self, slot: Slot, bytes: &[u8]) {
        assert!(bytes.len() <= self.layout.capacity, "a slot's buffer has {} bytes", self.layout.capacity);
        self.memory.write(self.layout.data_of(slot.0), bytes);
    }

    /// Copies bytes from the start of the slot's buffer.
    pub fn read_data(&self, slot: Slot, bytes: &mut [u8]) {
        assert!(bytes.len() <= self.layout.capacity, "a slot's buffer has {} bytes", self.layout.capacity);
        self.memory.read(self.layout.data_of(slot.0), bytes);
    }

    /// Takes a free slot, or none if all are taken. [`Queue::release`] gives it back.
    pub fn acquire(&mut self) -> Option<Slot> {
        self.free.pop()
    }

    /// Gives a slot back.
    ///
    /// # Panics
    /// When its request is still in flight.
    pub fn release(&mut self, slot: Slot) {
        assert!(!self.slots[slot.index()].in_flight, "a slot in flight cannot be released");
        debug_assert!(!self.free.contains(&slot), "a slot is released once");
        self.free.push(slot);
    }

    /// Puts a request on the ring. The next [`Queue::notify`] shows it to the device.
    ///
    /// # Panics
    /// When the slot is in flight or the data is longer than its buffer.
    pub fn start(&mut self, slot: Slot, command: Command) {
        let state = &mut self.slots[slot.index()];
        assert!(!state.in_flight, "a slot carries one request at a time");
        assert!(command.length as usize <= self.layout.capacity, "a request must fit into its slot's buffer");
        *state = SlotState { in_flight: true, command, serial: None };
        self.in_flight += 1;
        let header = 8 * slot.index();
        self.headers[header].store(u64::from(command.kind), Ordering::Relaxed);
        self.headers[header + 1].store(command.sector, Ordering::Relaxed);
        self.statuses[64 * slot.index() + STATUS_AT].store(Status::UNSET, Ordering::Relaxed);
        let head = self.store_chain(slot, command);
        self.ring.offer(head);
    }

    /// Shows all started requests to the device, with one kick if it wants one.
    ///
    /// # Errors
    /// When the eventfd cannot be written.
    pub fn notify(&mut self) -> Result<(), ClientError> {
        if self.ring.publish() {
            self.kicks += 1;
            self.events.kick()?;
        }
        Ok(())
    }

    /// Moves every completion to `done` and returns their number. The slots stay taken.
    ///
    /// # Errors
    /// When the device used a chain that it was not given.
    pub fn reap(&mut self, done: &mut Vec<Completion>) -> Result<usize, ClientError> {
        let before = done.len();
        while let Some(used) = self.ring.take_used() {
            let slot = self.layout.slot_of(used.id).filter(|slot| self.slots[usize::from(*slot)].in_flight);
            let Some(slot) = slot.map(Slot) else {
                return Err(ClientError::BadUsed { queue: self.index, id: used.id });
            };
            let state = &mut self.slots[slot.index()];
            state.in_flight = false;
            self.in_flight -= 1;
            let writable = match state.command.direction {
                Direction::ToDevice => 1,
                Direction::FromDevice => state.command.length.saturating_add(1),
            };
            if used.length > writable {
                return Err(ClientError::BadUsedLength { queue: self.index, length: used.length, writable });
            }
            let status = self.statuses[64 * slot.index() + STATUS_AT].load(Ordering::Relaxed);
            done.push(Completion { slot, status: Status::from_byte(status), used_length: used.length });
        }
        Ok(done.len() - before)
    }

    /// Waits until a completion can be reaped. Polls for a time that adapts to the success of recent polls, then
    /// sleeps on the call eventfd.
    ///
    /// # Errors
    /// When nothing completes before the deadline, or the device hangs up or reports a broken ring.
    pub fn wait_used(&mut self, deadline: Instant) -> Result<(), ClientError> {
        if self.ring.has_used() || self.poll_used() {
            return Ok(());
        }
        let started = Instant::now();
        while self.ring.arm_call() {
            self.sleeps += 1;
            let slept = self.sleep(deadline, started);
            self.ring.disarm_call();
            if let Err(error) = slept {
                // Chains used before the end still count.
                return if self.ring.has_used() { Ok(()) } else { Err(error) };
            }
        }
        Ok(())
    }

    /// Sends a request and returns the ticket for its outcome.
    ///
    /// # Errors
    /// When the queue is full or the request cannot be put into a slot.
    pub fn submit(&mut self, request: &Request<'_>) -> Result<Ticket, ClientError> {
        self.check_length(request)?;
        let slot = self.acquire().ok_or(ClientError::Full(self.index))?;
        match self.fill(slot, request) {
            Ok(command) => self.start(slot, command),
            Err(error) => {
                self.release(slot);
                return Err(error);
            }
        }
        let serial = self.next_serial;
        self.next_serial += 1;
        self.slots[slot.index()].serial = Some(serial);
        self.notify()?;
        Ok(Ticket { queue: self.index, serial })
    }

    /// Collects the completed requests without waiting. Returns their number.
    ///
    /// # Errors
    /// When the device used a chain that it was not given.
    pub fn poll(&mut self) -> Result<usize, ClientError> {
        let mut completions = std::mem::take(&mut self.completions);
        let result = self.reap(&mut completions);
        for completion in completions.drain(..) {
            self.settle(completion);
        }
        self.completions = completions;
        result
    }

    /// The outcome of a ticket, if it was collected and not yet returned.
    pub fn take(&mut self, ticket: Ticket) -> Option<Outcome> {
        if ticket.queue == self.index { self.outcomes.remove(&ticket.serial) } else { None }
    }

    /// Waits for a ticket; the queue's timeout limits the time without any completion.
    ///
    /// # Errors
    /// When nothing completes in time, the session or the ring ends, or the ticket was already redeemed.
    pub fn wait(&mut self, ticket: Ticket) -> Result<Outcome, ClientError> {
        loop {
            self.poll()?;
            if let Some(outcome) = self.take(ticket) {
                return Ok(outcome);
            }
            let known = self.slots.iter().any(|slot| slot.in_flight && slot.serial == Some(ticket.serial));
            if ticket.queue != self.index || !known {
                return Err(ClientError::NoSuchTicket(self.index));
            }
            self.wait_used(Instant::now() + self.timeout)?;
        }
    }

    /// Sends a request and waits for its outcome.
    ///
    /// # Errors
    /// As [`Queue::submit`] and [`Queue::wait`].
    pub fn run(&mut self, request: &Request<'_>) -> Result<Outcome, ClientError> {
        let ticket = self.submit(request)?;
        self.wait(ticket)
    }

    /// The bare ring, for tests that break its rules. Do not mix it with requests of the queue.
    pub fn raw(&mut self) -> RawRing<'_> {
        RawRing::new(self.index, &mut self.ring, &self.memory, &self.layout, &self.events)
    }

    pub(super) fn ring_size(&self) -> u16 {
        self.ring.size()
    }

    pub(super) fn ring_layout(&self) -> RingLayout {
        self.ring.layout()
    }

    pub(super) fn shared_memory(&self) -> &SharedMemory {
        &self.memory
    }

    pub(super) fn events(&self) -> &Events {
        &self.events
    }

    pub(super) fn set_events(&mut self, events: Events) {
        self.events = events;
    }

    /// The index up to which requests are available to the device.
    pub(super) fn available_index(&self) -> u16 {
        self.ring.avail_index()
    }

    fn check_length(&self, request: &Request<'_>) -> Result<(), ClientError> {
        let capacity = self.layout.capacity;
        let length = match request {
            Request::Read { length, .. } => *length,
            Request::Write { data, .. } => data.len(),
            Request::Discard(segments) | Request::WriteZeroes(segments) => {
                segments.len().saturating_mul(super::request::SEGMENT_BYTES)
            }
            Request::Other { output, input, .. } => output.len().max(*input),
            Request::Flush | Request::GetId => 0,
        };
        if length > capacity { Err(ClientError::TooLong { length, capacity }) } else { Ok(()) }
    }

    /// Copies a request's data, whose length was checked, into a slot's buffer.
    fn fill(&mut self, slot: Slot, request: &Request<'_>) -> Result<Command, ClientError> {
        // Lengths fit in 32 bits: a slot's buffer is far below 4 GiB (see QueueLayout).
        Ok(match *request {
            Request::Read { offset, length } => {
                // A pattern that no test writes: it shows bytes that the device did not write.
                self.memory.fill(self.layout.data_of(slot.0), length, 0xa5);
                Command::read(sectors(offset)?, length as u32)
            }
            Request::Write { offset, data } => {
                self.write_data(slot, data);
                Command::write(sectors(offset)?, data.len() as u32)
            }
            Request::Flush => Command::flush(),
            Request::Discard(segments) => Command::discard(self.write_segments(slot, segments)?),
            Request::WriteZeroes(segments) => Command::write_zeroes(self.write_segments(slot, segments)?),
            Request::GetId => {
                self.memory.fill(self.layout.data_of(slot.0), super::request::ID_BYTES, 0xa5);
                Command::get_id()
            }
            Request::Other { kind, sector, output, input } => {
                self.write_data(slot, output);
                if output.is_empty() {
                    Command { kind, sector, length: input as u32, direction: Direction::FromDevice }
                } else {
                    Command { kind, sector, length: output.len() as u32, direction: Direction::ToDevice }
                }
            }
        })
    }

    fn write_segments(&self, slot: Slot, segments: &[super::Segment]) -> Result<u32, ClientError> {
        let start = self.layout.data_of(slot.0);
        for (index, segment) in segments.iter().enumerate() {
            self.memory.write(start + index * super::request::SEGMENT_BYTES, &segment.bytes()?);
        }
        Ok((segments.len() * super::request::SEGMENT_BYTES) as u32)
    }

    /// Writes the descriptors of a request: header, data in up to `segments` pieces, status. Returns the head.
    fn store_chain(&self, slot: Slot, command: Command) -> u16 {
        let chain = usize::from(self.layout.chain);
        let first = slot.index() * chain;
        let (table, first, base) = match &self.tables {
            Some(tables) => (&tables[2 * first..2 * (first + chain)], 0, 0),
            None => (self.ring.table(), first, first),
        };
        let data = self.memory.guest_address(self.layout.data_of(slot.0));
        let header = self.memory.guest_address(self.layout.headers + 64 * slot.index());
        let mut at = 0;
        let mut put = |address, length, flags| {
            let next = if flags & ring::NEXT == 0 { 0 } else { (base + at + 1) as u16 };
            store_descriptor(table, first + at, Descriptor { address, length, flags, next });
            at += 1;
        };
        put(header, 16, ring::NEXT);
        let flags = match command.direction {
            Direction::ToDevice => ring::NEXT,
            Direction::FromDevice => ring::NEXT | ring::WRITE,
        };
        // Pieces of whole sectors, if there are enough sectors.
        let piece = command.length.div_ceil(u32::from(self.layout.segments)).next_multiple_of(SECTOR as u32);
        let mut done = 0;
        while done < command.length {
            let length = piece.min(command.length - done);
            put(data + u64::from(done), length, flags);
            done += length;
        }
        put(header + STATUS_AT as u64, 1, ring::WRITE);
        if self.tables.is_none() {
            return first as u16;
        }
        let address = self.memory.guest_address(self.layout.table_of(slot.0));
        let length = (at * Descriptor::SIZE) as u32;
        self.ring.set_descriptor(slot.0, Descriptor { address, length, flags: ring::INDIRECT, next: 0 });
        slot.0
    }

    /// Records the outcome of a completed request, if it has a ticket, and frees its slot.
    fn settle(&mut self, completion: Completion) {
        let state = self.slots[completion.slot.index()];
        if let Some(serial) = state.serial {
            let mut data = Vec::new();
            if state.command.direction == Direction::FromDevice {
                data.resize(state.command.length as usize, 0);
                self.read_data(completion.slot, &mut data);
            }
            let Completion { status, used_length, .. } = completion;
            self.outcomes.insert(serial, Outcome { status, used_length, data });
        }
        self.release(completion.slot);
    }

    /// Polls for the current spin time. Success doubles that time up to its limit, failure halves it.
    fn poll_used(&mut self) -> bool {
        if self.spin_max.is_zero() {
            return false;
        }
        let end = Instant::now() + self.spin;
        loop {
            for _ in 0..32 {
                std::hint::spin_loop();
                if self.ring.has_used() {
                    self.spin = (self.spin * 2).min(self.spin_max);
                    return true;
                }
            }
            if Instant::now() >= end {
                self.spin = (self.spin / 2).max(self.spin_max / 16);
                return false;
            }
        }
    }

    /// Sleeps until the device calls. A spurious wake-up just returns.
    fn sleep(&self, deadline: Instant, started: Instant) -> Result<(), ClientError> {
        match self.events.sleep(deadline)? {
            Wake::Called => Ok(()),
            Wake::RingError => Err(ClientError::RingError(self.index)),
            Wake::Disconnected => Err(ClientError::Disconnected(self.index)),
            Wake::TimedOut => {
                let waited = started.elapsed();
                Err(ClientError::Timeout { queue: self.index, waited, in_flight: self.in_flight })
            }
        }
    }
}

/// Offset of the status byte in a slot's 64 bytes of header.
pub(super) const STATUS_AT: usize = 32;
