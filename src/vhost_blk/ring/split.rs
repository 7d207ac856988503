//! One split virtqueue (virtio 1.2, 2.7), seen from the device: takes chains, gives them back, and suppresses
//! notifications in both directions.
//!
//! Owns the position in both rings and the table of heads in flight.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::{VRING_AVAIL_F_NO_INTERRUPT, VRING_USED_F_NO_NOTIFY};

use super::chain::{
    Broken, Chain, Copied, Copies, DESCRIPTOR_BYTES, INDIRECT, NEXT, RawDescriptor, RingLayout, SIZE_MAX,
    Table, Used, WRITE,
};
use crate::dirty_log::PartLog;
use crate::error::RingError;
use crate::loss::MemoryLoss;
use crate::memory::GuestMemory;
use crate::part::Part;

/// Both rings: 16 bits of flags, then the index, then the elements.
const INDEX: usize = 2;
const ELEMENTS: usize = 4;
const AVAILABLE_BYTES: usize = 2;
const USED_BYTES: usize = 8;
const NO_INTERRUPT: u16 = VRING_AVAIL_F_NO_INTERRUPT as u16;
const NO_NOTIFY: u16 = VRING_USED_F_NO_NOTIFY as u16;

/// A running split virtqueue.
#[derive(Debug)]
pub struct SplitRing {
    table: Part,
    available_ring: Part,
    used_ring: Part,
    /// Descriptors: a power of two.
    size: u16,
    indirect: bool,
    event_index: bool,
    /// The index in the available ring of the next chain to take.
    next_available: u16,
    /// The index in the used ring of the next chain to give back, and its value at the last check for a notification.
    next_used: u16,
    asked_at: u16,
    in_flight: HeadSet,
    /// Whether chains may still be given back.
    loss: Arc<MemoryLoss>,
    /// Where writes to the used ring are logged, if they are.
    used_log: Option<PartLog>,
    copies: Copies,
}

/// Our copy of a descriptor.
#[derive(Clone, Copy, Debug)]
struct Descriptor {
    address: u64,
    length: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    fn decode(raw: RawDescriptor) -> Self {
        let raw = u128::from_le(raw);
        Descriptor {
            address: raw as u64,
            length: (raw >> 64) as u32,
            flags: (raw >> 96) as u16,
            next: (raw >> 112) as u16,
        }
    }

    fn copied(&self) -> Copied {
        Copied { address: self.address, length: self.length, writable: self.flags & WRITE != 0 }
    }
}

impl SplitRing {
    /// Starts a ring. The used index continues from its value in guest memory.
    ///
    /// # Errors
    /// When the layout is invalid or a part of it is outside guest memory.
    pub fn new(layout: &RingLayout, memory: &Arc<GuestMemory>) -> Result<Self, RingError> {
        let RingLayout { size, descriptors, available, used, base, event_index, indirect } = *layout;
        let slots = usize::from(size);
        let aligned = descriptors.is_multiple_of(DESCRIPTOR_BYTES as u64)
            && available.is_multiple_of(2)
            && used.is_multiple_of(4);
        if !size.is_power_of_two() || size > SIZE_MAX || !aligned {
            return Err(RingError::Layout { size });
        }
        let next_available = u16::try_from(base).map_err(|_| RingError::Base { base, size })?;
        // The elements of each ring are followed by the index at which the other side wants a notification.
        let table = Part::find(memory, descriptors, slots * DESCRIPTOR_BYTES)?;
        let available_ring = Part::find(memory, available, ELEMENTS + slots * AVAILABLE_BYTES + 2)?;
        let used_ring = Part::find(memory, used, Self::used_bytes(size) as usize)?;
        let next_used = used_ring.load(INDEX, Ordering::Acquire)?;
        Ok(SplitRing {
            table,
            available_ring,
            used_ring,
            size,
            indirect,
            event_index,
            next_available,
            next_used,
            asked_at: next_used,
            in_flight: HeadSet::new(size),
            loss: Arc::clone(memory.loss()),
            used_log: None,
            copies: Copies::new(size),
        })
    }

    /// Bytes of the used ring of `size` descriptors, with its flags, its index and its event index.
    pub(crate) fn used_bytes(size: u16) -> u64 {
        (ELEMENTS + usize::from(size) * USED_BYTES + 2) as u64
    }

    /// Logs all writes to the used ring from now on.
    pub(crate) fn log_used_ring(&mut self, log: PartLog) {
        self.used_log = Some(log);
    }

    /// Where the first `bytes` bytes of the writable part of the chain that was last taken lie, and its last byte, which
    /// has the status: guest address and bytes of each range.
    pub(crate) fn writable(&self, bytes: u64) -> impl Iterator<Item = (u64, u32)> {
        self.copies.writable(bytes)
    }

    /// Descriptors of the ring.
    pub(crate) fn size(&self) -> u16 {
        self.size
    }

    /// The index in the available ring of the next chain to take.
    pub fn next_available(&self) -> u16 {
        self.next_available
    }

    /// The index in the used ring of the next chain to give back.
    pub fn next_used(&self) -> u16 {
        self.next_used
    }

    /// The driver's index in the available ring.
    ///
    /// # Errors
    /// When the ring is no longer accessible.
    #[inline]
    pub fn available_index(&self) -> Result<u16, RingError> {
        // Acquire, paired with the driver's barrier before it stores the index: the chains are there.
        Ok(self.available_ring.load(INDEX, Ordering::Acquire)?)
    }

    /// Continues after another device, which took so many chains that it has not given back. Each of them comes by
    /// [`SplitRing::take_again`].
    pub fn resume(&mut self, in_flight: u16) {
        self.next_available = self.next_used.wrapping_add(in_flight);
    }

    /// True if any chain ever passed through the ring.
    pub fn was_used(&self) -> bool {
        self.next_available != 0 || self.next_used != 0
    }

    /// The number of chains that wait to be taken.
    ///
    /// # Errors
    /// When the guest claims more than the ring can hold.
    #[inline]
    pub fn available(&self) -> Result<u16, RingError> {
        let to = self.available_index()?;
        let from = self.next_available;
        let waiting = to.wrapping_sub(from);
        if waiting > self.size {
            return Err(RingError::AvailableJump { from, to, size: self.size });
        }
        Ok(waiting)
    }

    /// Takes the next chain into `chain`. Only when [`SplitRing::available`] returned at least one.
    ///
    /// # Errors
    /// When the ring itself is corrupt; then nothing was taken. A defect of a single chain is in its `fault`.
    #[inline]
    pub fn pop(&mut self, memory: &GuestMemory, chain: &mut Chain) -> Result<(), RingError> {
        let slot = self.slot(self.next_available);
        let head = self.available_ring.load(ELEMENTS + slot * AVAILABLE_BYTES, Ordering::Relaxed)?;
        self.take_again(head, memory, chain)?;
        self.next_available = self.next_available.wrapping_add(1);
        Ok(())
    }

    /// Takes the chain with this head into `chain`, wherever it was made available.
    ///
    /// # Errors
    /// As for [`SplitRing::pop`].
    pub fn take_again(
        &mut self,
        head: u16,
        memory: &GuestMemory,
        chain: &mut Chain,
    ) -> Result<(), RingError> {
        if head >= self.size {
            return Err(RingError::HeadOutOfRange { head, size: self.size });
        }
        if !self.in_flight.insert(head) {
            return Err(RingError::HeadInFlight { head });
        }
        chain.head = head;
        let copied = self.walk(memory, head);
        self.copies.finish(copied, memory, chain);
        Ok(())
    }

    /// Puts the chain that was taken last back, unanswered: the next pop finds it again.
    ///
    /// # Panics
    /// If the chain is not in flight.
    pub fn put_back(&mut self, head: u16) {
        assert!(self.in_flight.remove(head), "a chain that is not in flight was put back");
        self.next_available = self.next_available.wrapping_sub(1);
    }

    /// Gives chains back, in this order. The guest sees all of them at once.
    ///
    /// # Errors
    /// When the used ring is no longer accessible, or some guest memory is lost: it may have held the data or the
    /// status of these chains. Then the guest sees none of them.
    #[inline]
    pub fn push_used(&mut self, used: &[Used]) -> Result<(), RingError> {
        let mut next = self.next_used;
        for element in used {
            assert!(self.in_flight.remove(element.head), "a chain that is not in flight was given back");
            // le32 id, le32 len.
            let raw = u64::from(element.head) | (u64::from(element.written) << 32);
            self.used_ring.write(raw.to_le(), ELEMENTS + self.slot(next) * USED_BYTES)?;
            next = next.wrapping_add(1);
        }
        if self.loss.is_lost() {
            return Err(RingError::MemoryLost);
        }
        let first = std::mem::replace(&mut self.next_used, next);
        // Release: a reader of the index sees the elements, and the bytes written to their chains.
        self.used_ring.store(next, INDEX, Ordering::Release)?;
        self.log_used(first, next);
        Ok(())
    }

    /// Whether the guest wants a notification for the chains given back since the previous call.
    ///
    /// # Errors
    /// When the rings are no longer accessible.
    #[inline]
    pub fn needs_notification(&mut self) -> Result<bool, RingError> {
        // The used index must be visible before the guest's wish is read: the driver stores its wish, then reads the
        // index.
        fence(Ordering::SeqCst);
        let before = std::mem::replace(&mut self.asked_at, self.next_used);
        if !self.event_index {
            return Ok(self.available_ring.load(0, Ordering::Relaxed)? & NO_INTERRUPT == 0);
        }
        // Virtio 1.2, 2.7.7.2: notify when the index passes this value. Several chains may have been given back since
        // then.
        let slots = usize::from(self.size);
        let event = self.available_ring.load(ELEMENTS + slots * AVAILABLE_BYTES, Ordering::Relaxed)?;
        Ok(self.next_used.wrapping_sub(event).wrapping_sub(1) < self.next_used.wrapping_sub(before))
    }

    /// Requests kicks from the guest from now on. True if chains wait for which the guest may not have kicked.
    ///
    /// # Errors
    /// When the rings are no longer accessible, or the available index is invalid.
    pub fn enable_kicks(&mut self) -> Result<bool, RingError> {
        if self.event_index {
            let event = ELEMENTS + usize::from(self.size) * USED_BYTES;
            self.store_wish(self.next_available, event)?;
        } else {
            self.store_wish(0, 0)?;
        }
        // The wish must be visible before the index is read: the driver stores the index, then reads the wish.
        fence(Ordering::SeqCst);
        Ok(self.available()? > 0)
    }

    /// Lets the guest skip kicks. With event indexes this stores nothing: the guest kicks once, for the requested
    /// chain, and then no more.
    ///
    /// # Errors
    /// When the used ring is no longer accessible.
    pub fn disable_kicks(&mut self) -> Result<(), RingError> {
        if self.event_index {
            return Ok(());
        }
        self.store_wish(NO_NOTIFY, 0)
    }

    /// Stores what kicks are wanted, at an offset in the used ring.
    fn store_wish(&self, wish: u16, offset: usize) -> Result<(), RingError> {
        self.used_ring.store(wish, offset, Ordering::Relaxed)?;
        if let Some(log) = &self.used_log {
            log.mark(offset, size_of::<u16>());
        }
        Ok(())
    }

    /// Logs the elements from one index up to another, not both the same, and the index itself.
    fn log_used(&self, from: u16, to: u16) {
        let Some(log) = &self.used_log else { return };
        log.mark(INDEX, size_of::<u16>());
        let (from, to) = (self.slot(from), self.slot(to));
        let elements =
            |from: usize, to: usize| log.mark(ELEMENTS + from * USED_BYTES, (to - from) * USED_BYTES);
        if from < to {
            elements(from, to);
        } else {
            elements(from, usize::from(self.size));
            elements(0, to);
        }
    }

    /// The slot of an index in its ring.
    #[inline]
    fn slot(&self, index: u16) -> usize {
        usize::from(index & (self.size - 1))
    }

    /// Copies the descriptors of the chain that starts at `head`. The work is bounded whatever the descriptors hold.
    fn walk(&mut self, memory: &GuestMemory, head: u16) -> Result<(), Broken> {
        self.copies.clear();
        let mut index = head;
        loop {
            if index >= self.size || self.copies.len() >= usize::from(self.size) {
                return Err(Broken);
            }
            let descriptor = Descriptor::decode(self.table.read(usize::from(index) * DESCRIPTOR_BYTES)?);
            if descriptor.flags & INDIRECT != 0 {
                // Virtio 1.2, 2.7.5.3.1: never together with NEXT; its own WRITE flag is ignored.
                if !self.indirect || descriptor.flags & NEXT != 0 {
                    return Err(Broken);
                }
                return self.walk_indirect(memory, descriptor.address, descriptor.length as usize);
            }
            self.copies.add(descriptor.copied())?;
            if descriptor.flags & NEXT == 0 {
                return Ok(());
            }
            index = descriptor.next;
        }
    }

    fn walk_indirect(&mut self, memory: &GuestMemory, address: u64, bytes: usize) -> Result<(), Broken> {
        let table = Table::find(memory, address, bytes)?;
        let mut index = 0;
        loop {
            if index >= table.entries || self.copies.is_full() {
                return Err(Broken);
            }
            let descriptor = Descriptor::decode(table.read(index)?);
            if descriptor.flags & INDIRECT != 0 {
                return Err(Broken);
            }
            self.copies.add(descriptor.copied())?;
            if descriptor.flags & NEXT == 0 {
                return Ok(());
            }
            index = usize::from(descriptor.next);
        }
    }
}

/// The set of heads in flight: one bit each.
#[derive(Debug)]
struct HeadSet {
    words: Vec<u64>,
}

impl HeadSet {
    fn new(size: u16) -> Self {
        HeadSet { words: vec![0; usize::from(size).div_ceil(64)] }
    }

    /// False if the head was already in the set.
    fn insert(&mut self, head: u16) -> bool {
        let (word, bit) = (&mut self.words[usize::from(head / 64)], 1u64 << (head % 64));
        let fresh = *word & bit == 0;
        *word |= bit;
        fresh
    }

    /// False if the head was not in the set.
    fn remove(&mut self, head: u16) -> bool {
        let (word, bit) = (&mut self.words[usize::from(head / 64)], 1u64 << (head % 64));
        let there = *word & bit != 0;
        *word &= !bit;
        there
    }
}
