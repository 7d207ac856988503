//! One split virtqueue (virtio 1.2, 2.7), seen from the device: taking chains out, giving them back, and the
//! suppression of notifications both ways.
//!
//! Owns the position in both rings and the table of heads in flight. Every descriptor is copied once and only the copy
//! is used. It never touches what the chains point to. The state is virtio-queue's for now; nothing of it shows in the
//! interface, so that a ring of our own with cached pointers can take its place.

use std::num::Wrapping;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::{
    VRING_AVAIL_F_NO_INTERRUPT, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueState, QueueT};
use vm_memory::{Bytes, GuestAddress};

use crate::device::GuestSlice;
use crate::error::{BadAddress, RingError};
use crate::memory::GuestMemory;

const DESCRIPTOR_BYTES: u32 = 16;
const NEXT: u16 = VRING_DESC_F_NEXT as u16;
const WRITE: u16 = VRING_DESC_F_WRITE as u16;
const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;
const NO_INTERRUPT: u16 = VRING_AVAIL_F_NO_INTERRUPT as u16;

/// A chain may have this many descriptors through an indirect table, or as many as the ring if that is more.
const INDIRECT_CHAIN_LIMIT: usize = 1024;

/// Where a ring lies and how it is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingLayout {
    /// Descriptors: a power of two.
    pub size: u16,
    /// Guest address of the descriptor table.
    pub descriptors: u64,
    /// Guest address of the available ring.
    pub available: u64,
    /// Guest address of the used ring.
    pub used: u64,
    /// The index in the available ring of the next chain to take.
    pub base: u16,
    /// VIRTIO_F_EVENT_IDX was negotiated.
    pub event_index: bool,
    /// VIRTIO_F_INDIRECT_DESC was negotiated.
    pub indirect: bool,
}

/// A chain that the device is done with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// Its first descriptor.
    pub head: u16,
    /// Bytes written to its writable part.
    pub written: u32,
}

/// What is wrong with a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// No sense can be made of it (a loop, a `next` out of range, readable after writable, a bad indirect table): there is no
    /// telling where its status byte is.
    Malformed,
    /// Its shape is sound, and its last writable bytes can be reached, but some other part is outside guest memory.
    Unreachable,
}

/// A chain taken from the ring, its parts translated. Made once for a queue and filled again and again.
#[derive(Debug, Default)]
pub struct Chain {
    /// Its first descriptor: its name when it is given back.
    pub head: u16,
    /// What the device may read, in order.
    pub readable: Vec<GuestSlice>,
    /// What the device may write, in order.
    pub writable: Vec<GuestSlice>,
    /// What is wrong with it.
    pub fault: Option<Fault>,
}

/// A split virtqueue that runs.
#[derive(Debug)]
pub struct Ring {
    queue: Queue,
    size: u16,
    indirect: bool,
    event_index: bool,
    in_flight: HeadSet,
    /// The descriptors of the chain at hand; kept to spare the allocation.
    descriptors: Vec<Copied>,
}

/// Our copy of a descriptor.
#[derive(Clone, Copy, Debug)]
struct Copied {
    address: u64,
    length: u32,
    writable: bool,
}

impl Ring {
    /// Starts a ring. The used index goes on from where the guest's memory says it is.
    ///
    /// # Errors
    /// When the layout is impossible or a part of it is outside guest memory.
    pub fn new(layout: &RingLayout, memory: &GuestMemory) -> Result<Self, RingError> {
        let RingLayout { size, descriptors, available, used, base, event_index, indirect } = *layout;
        let slots = u64::from(size);
        memory.check(descriptors, slots * u64::from(DESCRIPTOR_BYTES))?;
        memory.check(available, 6 + 2 * slots)?;
        memory.check(used, 6 + 8 * slots)?;
        let state = QueueState {
            max_size: size,
            next_avail: base,
            next_used: 0,
            event_idx_enabled: event_index,
            size,
            ready: true,
            desc_table: descriptors,
            avail_ring: available,
            used_ring: used,
        };
        let mut queue = Queue::try_from(state).map_err(|_| RingError::Layout { size })?;
        let used_index = queue.used_idx(memory.map(), Ordering::Acquire).map_err(|_| outside(used))?;
        queue.set_next_used(used_index.0);
        Ok(Ring {
            queue,
            size,
            indirect,
            event_index,
            in_flight: HeadSet::new(size),
            descriptors: Vec::with_capacity(usize::from(size)),
        })
    }

    /// The index in the available ring of the next chain to take.
    pub fn next_available(&self) -> u16 {
        self.queue.next_avail()
    }

    /// True if anything ever passed through the ring.
    pub fn was_used(&self) -> bool {
        self.queue.next_avail() != 0 || self.queue.next_used() != 0
    }

    /// How many chains wait to be taken.
    ///
    /// # Errors
    /// When the guest claims more than the ring can hold.
    pub fn available(&self, memory: &GuestMemory) -> Result<u16, RingError> {
        let to = self
            .queue
            .avail_idx(memory.map(), Ordering::Acquire)
            .map_err(|_| outside(self.queue.avail_ring()))?;
        let from = Wrapping(self.queue.next_avail());
        let waiting = (to - from).0;
        if waiting > self.size {
            return Err(RingError::AvailableJump { from: from.0, to: to.0, size: self.size });
        }
        Ok(waiting)
    }

    /// Takes the next chain into `chain`. Only when [`Ring::available`] said that there is one.
    ///
    /// # Errors
    /// When the ring itself is corrupt; then nothing was taken. What is wrong with a single chain is in its `fault`.
    pub fn pop(&mut self, memory: &GuestMemory, chain: &mut Chain) -> Result<(), RingError> {
        let next = self.queue.next_avail();
        let offset = 4 + 2 * u64::from(next % self.size);
        let head = read_u16(memory, self.queue.avail_ring(), offset)?;
        if head >= self.size {
            return Err(RingError::HeadOutOfRange { head, size: self.size });
        }
        if !self.in_flight.insert(head) {
            return Err(RingError::HeadInFlight { head });
        }
        self.queue.set_next_avail(next.wrapping_add(1));
        chain.head = head;
        chain.readable.clear();
        chain.writable.clear();
        chain.fault = match self.walk(memory, head) {
            Ok(()) => self.translate(memory, chain),
            Err(Broken) => Some(Fault::Malformed),
        };
        if chain.fault == Some(Fault::Malformed) {
            chain.readable.clear();
            chain.writable.clear();
        }
        Ok(())
    }

    /// Gives chains back, in this order.
    ///
    /// # Errors
    /// When the used ring is not where it was.
    pub fn push_used(&mut self, memory: &GuestMemory, used: &[Used]) -> Result<(), RingError> {
        for element in used {
            assert!(self.in_flight.remove(element.head), "a chain that is not in flight was given back");
            self.queue
                .add_used(memory.map(), element.head, element.written)
                .map_err(|_| outside(self.queue.used_ring()))?;
        }
        Ok(())
    }

    /// Whether the guest wants to be told of the chains given back since this was last asked.
    ///
    /// # Errors
    /// When the rings are not where they were.
    pub fn needs_notification(&mut self, memory: &GuestMemory) -> Result<bool, RingError> {
        if self.event_index {
            return self.queue.needs_notification(memory.map()).map_err(|_| outside(self.queue.avail_ring()));
        }
        // The used index must be visible before the flag is read: the driver clears the flag, then looks at the index.
        fence(Ordering::SeqCst);
        Ok(read_u16(memory, self.queue.avail_ring(), 0)? & NO_INTERRUPT == 0)
    }

    /// Asks the guest to kick from now on; true if chains are waiting that it may not have kicked for.
    ///
    /// # Errors
    /// When the rings are not where they were, or the available index is impossible.
    pub fn enable_kicks(&mut self, memory: &GuestMemory) -> Result<bool, RingError> {
        self.queue.enable_notification(memory.map()).map_err(|_| outside(self.queue.used_ring()))?;
        Ok(self.available(memory)? > 0)
    }

    /// Tells the guest that it need not kick.
    ///
    /// # Errors
    /// When the used ring is not where it was.
    pub fn disable_kicks(&mut self, memory: &GuestMemory) -> Result<(), RingError> {
        self.queue.disable_notification(memory.map()).map_err(|_| outside(self.queue.used_ring()))
    }

    /// Copies the descriptors of the chain that starts at `head`, with bounded work whatever they say.
    fn walk(&mut self, memory: &GuestMemory, head: u16) -> Result<(), Broken> {
        self.descriptors.clear();
        let mut index = head;
        loop {
            if index >= self.size || self.descriptors.len() >= usize::from(self.size) {
                return Err(Broken);
            }
            let descriptor = read_descriptor(memory, self.queue.desc_table(), u32::from(index))?;
            if descriptor.flags() & INDIRECT != 0 {
                // Virtio 1.2, 2.7.5.3.1: never together with NEXT; its own WRITE flag is ignored.
                if !self.indirect || descriptor.flags() & NEXT != 0 {
                    return Err(Broken);
                }
                return self.walk_indirect(memory, descriptor.addr().0, descriptor.len());
            }
            self.copy(&descriptor)?;
            if descriptor.flags() & NEXT == 0 {
                return Ok(());
            }
            index = descriptor.next();
        }
    }

    fn walk_indirect(&mut self, memory: &GuestMemory, table: u64, bytes: u32) -> Result<(), Broken> {
        if bytes == 0 || !bytes.is_multiple_of(DESCRIPTOR_BYTES) {
            return Err(Broken);
        }
        memory.check(table, u64::from(bytes)).map_err(|_| Broken)?;
        let entries = bytes / DESCRIPTOR_BYTES;
        let limit = INDIRECT_CHAIN_LIMIT.max(usize::from(self.size));
        let mut index = 0;
        loop {
            if index >= entries || self.descriptors.len() >= limit {
                return Err(Broken);
            }
            let descriptor = read_descriptor(memory, table, index)?;
            if descriptor.flags() & INDIRECT != 0 {
                return Err(Broken);
            }
            self.copy(&descriptor)?;
            if descriptor.flags() & NEXT == 0 {
                return Ok(());
            }
            index = u32::from(descriptor.next());
        }
    }

    fn copy(&mut self, descriptor: &Descriptor) -> Result<(), Broken> {
        let writable = descriptor.flags() & WRITE != 0;
        // Virtio 1.2, 2.7.4.2: everything readable comes before everything writable.
        if !writable && self.descriptors.last().is_some_and(|last| last.writable) {
            return Err(Broken);
        }
        self.descriptors.push(Copied { address: descriptor.addr().0, length: descriptor.len(), writable });
        Ok(())
    }

    /// Translates the copied descriptors. A bad address does not hide the status byte behind it, as long as the last
    /// writable descriptor that has bytes is sound.
    fn translate(&self, memory: &GuestMemory, chain: &mut Chain) -> Option<Fault> {
        let mut fault = None;
        for copied in &self.descriptors {
            let pieces = if copied.writable { &mut chain.writable } else { &mut chain.readable };
            if memory.translate(copied.address, copied.length, pieces).is_ok() {
                if copied.writable && copied.length > 0 && fault == Some(Fault::Malformed) {
                    fault = Some(Fault::Unreachable);
                }
            } else if copied.writable && copied.length > 0 {
                fault = Some(Fault::Malformed);
            } else if fault.is_none() {
                fault = Some(Fault::Unreachable);
            }
        }
        fault
    }
}

/// A chain of which no sense can be made.
#[derive(Debug)]
struct Broken;

impl From<BadAddress> for Broken {
    fn from(_: BadAddress) -> Self {
        Broken
    }
}

fn outside(address: u64) -> RingError {
    RingError::Address(BadAddress { address, length: 2 })
}

fn read_u16(memory: &GuestMemory, base: u64, offset: u64) -> Result<u16, RingError> {
    // The ring was checked when it started, so the sum cannot wrap.
    let address = GuestAddress(base.wrapping_add(offset));
    let raw: u16 = memory.map().load(address, Ordering::Relaxed).map_err(|_| outside(address.0))?;
    Ok(u16::from_le(raw))
}

fn read_descriptor(memory: &GuestMemory, table: u64, index: u32) -> Result<Descriptor, Broken> {
    let address = table.checked_add(u64::from(index) * u64::from(DESCRIPTOR_BYTES)).ok_or(Broken)?;
    Ok(memory.read(address)?)
}

/// Which heads are in flight: one bit each.
#[derive(Debug)]
struct HeadSet {
    words: Vec<u64>,
}

impl HeadSet {
    fn new(size: u16) -> Self {
        HeadSet { words: vec![0; usize::from(size).div_ceil(64)] }
    }

    /// False if it was there already.
    fn insert(&mut self, head: u16) -> bool {
        let (word, bit) = (&mut self.words[usize::from(head / 64)], 1u64 << (head % 64));
        let fresh = *word & bit == 0;
        *word |= bit;
        fresh
    }

    /// False if it was not there.
    fn remove(&mut self, head: u16) -> bool {
        let (word, bit) = (&mut self.words[usize::from(head / 64)], 1u64 << (head % 64));
        let there = *word & bit != 0;
        *word &= !bit;
        there
    }
}
