//! The bare ring, for tests that play a hostile or broken driver.
//!
//! Nothing here checks the values it writes; it only keeps the writes inside the client's own memory.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::ClientError;
use super::events::{Events, Wake};
use super::layout::QueueLayout;
use super::memory::{GUEST_BASE, SharedMemory};
use super::ring::{Descriptor, Ring, Used};

/// Raw access to one queue.
#[derive(Debug)]
pub struct RawRing<'a> {
    index: usize,
    ring: &'a mut Ring,
    memory: &'a Arc<SharedMemory>,
    layout: &'a QueueLayout,
    events: &'a Events,
}

/// What ended a wait on a bare ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RawEvent {
    /// The device used a chain.
    Used(Used),
    /// The device signalled the error eventfd.
    RingError,
    /// The device closed the session.
    Disconnected,
    /// Nothing happened in the given time.
    Nothing,
}

impl<'a> RawRing<'a> {
    pub(super) fn new(
        index: usize,
        ring: &'a mut Ring,
        memory: &'a Arc<SharedMemory>,
        layout: &'a QueueLayout,
        events: &'a Events,
    ) -> Self {
        Self { index, ring, memory, layout, events }
    }

    /// Entries of the ring.
    pub fn size(&self) -> u16 {
        self.ring.size()
    }

    /// Guest address of a page that no request uses.
    pub fn scratch_address(&self) -> u64 {
        self.memory.guest_address(self.layout.scratch)
    }

    /// Guest address of the buffer of slot number `slot`.
    ///
    /// # Panics
    /// When there is no such slot.
    pub fn data_address(&self, slot: u16) -> u64 {
        assert!(slot < self.layout.slots, "the queue has {} slots", self.layout.slots);
        self.memory.guest_address(self.layout.data_of(slot))
    }

    /// Bytes of a slot's buffer.
    pub fn data_capacity(&self) -> usize {
        self.layout.capacity
    }

    /// Guest addresses of the ring's three parts: descriptors, avail ring, used ring.
    pub fn ring_addresses(&self) -> [u64; 3] {
        let layout = self.ring.layout();
        [layout.descriptors, layout.available, layout.used].map(|offset| self.memory.guest_address(offset))
    }

    /// First guest address past all memory shared with the device.
    pub fn memory_end(&self) -> u64 {
        self.memory.guest_address(self.memory.length())
    }

    /// Writes bytes at a guest address.
    ///
    /// # Panics
    /// When the range is not in the client's memory.
    pub fn write_memory(&self, address: u64, bytes: &[u8]) {
        self.memory.write(offset_of(address), bytes);
    }

    /// Reads bytes at a guest address.
    ///
    /// # Panics
    /// When the range is not in the client's memory.
    pub fn read_memory(&self, address: u64, bytes: &mut [u8]) {
        self.memory.read(offset_of(address), bytes);
    }

    /// Writes a virtio-blk request header (16 bytes) at a guest address.
    pub fn write_header(&self, address: u64, kind: u32, sector: u64) {
        self.write_memory(address, &kind.to_le_bytes());
        self.write_memory(address + 4, &[0; 4]);
        self.write_memory(address + 8, &sector.to_le_bytes());
    }

    /// Sets an entry of the descriptor table.
    pub fn set_descriptor(&mut self, index: u16, descriptor: Descriptor) {
        self.ring.set_descriptor(index, descriptor);
    }

    /// Writes an indirect table at a guest address.
    pub fn write_table(&self, address: u64, table: &[Descriptor]) {
        for (index, descriptor) in table.iter().enumerate() {
            self.write_memory(address + (index * Descriptor::SIZE) as u64, &descriptor.bytes());
        }
    }

    /// Sets the avail entry at `position` modulo the size.
    pub fn set_avail_entry(&mut self, position: u16, head: u16) {
        self.ring.set_avail_entry(position, head);
    }

    /// Sets the avail index to any value. Sends no kick.
    pub fn set_avail_index(&mut self, index: u16) {
        self.ring.set_avail_index(index);
    }

    /// The avail index in memory.
    pub fn avail_index(&self) -> u16 {
        self.ring.avail_index()
    }

    /// The used index in memory.
    pub fn used_index(&self) -> u16 {
        self.ring.used_index()
    }

    /// Offers a head as a correct driver would, in the next avail entry, and kicks.
    ///
    /// # Errors
    /// When the eventfd cannot be written.
    pub fn offer(&mut self, head: u16) -> Result<(), ClientError> {
        self.ring.offer(head);
        self.ring.publish();
        self.kick()
    }

    /// Signals the kick eventfd.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn kick(&self) -> Result<(), ClientError> {
        self.events.kick()
    }

    /// Waits for the next used element, a ring error or the end of the session. A used element takes precedence.
    ///
    /// # Errors
    /// When the host fails to poll.
    pub fn wait(&mut self, timeout: Duration) -> Result<RawEvent, ClientError> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(used) = self.ring.take_used() {
                return Ok(RawEvent::Used(used));
            }
            if !self.ring.arm_call() {
                continue;
            }
            let wake = self.events.sleep(deadline)?;
            self.ring.disarm_call();
            if self.ring.has_used() {
                continue;
            }
            match wake {
                Wake::Called => {}
                Wake::RingError => return Ok(RawEvent::RingError),
                Wake::Disconnected => return Ok(RawEvent::Disconnected),
                Wake::TimedOut => return Ok(RawEvent::Nothing),
            }
        }
    }

    /// The number of this queue on the device.
    pub fn index(&self) -> usize {
        self.index
    }
}

fn offset_of(address: u64) -> usize {
    let offset = address.checked_sub(GUEST_BASE).expect("a guest address of the client's memory");
    usize::try_from(offset).expect("a guest address of the client's memory")
}
