//! One packed virtqueue (virtio 1.2, 2.8), seen from the device: takes chains, gives them back, and suppresses
//! notifications in both directions.
//!
//! Owns both positions in the ring and the table of buffer ids in flight. Driver and device write the same
//! descriptors: what is given back may overwrite a chain that is still in flight. So only our copy of a chain counts
//! once it was taken.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::{
    VRING_PACKED_DESC_F_AVAIL, VRING_PACKED_DESC_F_USED, VRING_PACKED_EVENT_FLAG_DESC,
    VRING_PACKED_EVENT_FLAG_DISABLE, VRING_PACKED_EVENT_FLAG_ENABLE,
};

use super::chain::{
    Broken, Chain, Copied, Copies, DESCRIPTOR_BYTES, INDIRECT, NEXT, RawDescriptor, RingLayout, SIZE_MAX,
    Table, Used, WRITE,
};
use super::position::Position;
use crate::dirty_log::PartLog;
use crate::error::RingError;
use crate::loss::MemoryLoss;
use crate::memory::GuestMemory;
use crate::part::Part;

/// Offsets in a descriptor: length, buffer id and flags. The address comes first.
const LENGTH: usize = 8;
const ID: usize = 12;
const FLAGS: usize = 14;
const AVAILABLE: u16 = 1 << VRING_PACKED_DESC_F_AVAIL;
const USED: u16 = 1 << VRING_PACKED_DESC_F_USED;
/// Event suppression (virtio 1.2, 2.8.10): a position, then flags.
const EVENT_FLAGS: usize = 2;
const EVENT_BYTES: usize = 4;
const EVENT_FLAGS_MASK: u16 = 3;
const ENABLE: u16 = VRING_PACKED_EVENT_FLAG_ENABLE as u16;
const DISABLE: u16 = VRING_PACKED_EVENT_FLAG_DISABLE as u16;
const DESCRIPTOR: u16 = VRING_PACKED_EVENT_FLAG_DESC as u16;

/// A running packed virtqueue.
#[derive(Debug)]
pub struct PackedRing {
    descriptors: Part,
    driver_event: Part,
    device_event: Part,
    /// Descriptors.
    size: u16,
    indirect: bool,
    event_index: bool,
    /// The next descriptor to take.
    next_available: Position,
    /// Chains from there on that are known to be available, and their descriptors.
    waiting: u16,
    waiting_descriptors: u16,
    /// The next descriptor to give back, and its value at the last check for a notification.
    next_used: Position,
    asked_at: Position,
    /// The descriptors of the chain in flight with each buffer id; 0 if there is none.
    lengths: Vec<u16>,
    /// Descriptors of all chains in flight.
    in_flight: u16,
    /// Counts chains that were taken and not put back.
    taken: u16,
    /// A device has used it before.
    began_used: bool,
    /// Whether chains may still be given back.
    loss: Arc<MemoryLoss>,
    log: Option<Log>,
    /// The ring's descriptors of the chain that was last taken.
    chain: Vec<PackedDescriptor>,
    copies: Copies,
}

/// Where writes to the ring are logged.
#[derive(Debug)]
struct Log {
    descriptors: PartLog,
    device_event: PartLog,
}

/// Our copy of a descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackedDescriptor {
    /// Guest address of the bytes, or of an indirect table.
    pub address: u64,
    /// Bytes.
    pub length: u32,
    /// The buffer id; only that of a chain's last descriptor counts.
    pub id: u16,
    /// Its flags.
    pub flags: u16,
}

impl PackedDescriptor {
    fn decode(raw: RawDescriptor) -> Self {
        let raw = u128::from_le(raw);
        PackedDescriptor {
            address: raw as u64,
            length: (raw >> 64) as u32,
            id: (raw >> 96) as u16,
            flags: (raw >> 112) as u16,
        }
    }

    /// Whether the chain goes on after it.
    pub(crate) fn has_next(&self) -> bool {
        self.flags & NEXT != 0
    }

    fn copied(&self) -> Copied {
        Copied { address: self.address, length: self.length, writable: self.flags & WRITE != 0 }
    }
}

/// A chain as another worker took it, from its record: at least one descriptor, and not more than the ring has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordedChain(pub Vec<PackedDescriptor>);

/// Whether the flags are those of a descriptor that the driver made available in a lap with this wrap counter.
#[inline]
fn is_available(flags: u16, wrap: bool) -> bool {
    flags & (AVAILABLE | USED) == available_bits(wrap)
}

#[inline]
fn available_bits(wrap: bool) -> u16 {
    if wrap { AVAILABLE } else { USED }
}

/// The flags of a descriptor that is given back in a lap with this wrap counter.
#[inline]
fn used_flags(wrap: bool, written: u32) -> u16 {
    let write = if written > 0 { WRITE } else { 0 };
    if wrap { AVAILABLE | USED | write } else { write }
}

impl PackedRing {
    /// The base of a ring that nobody has used.
    pub(crate) const START_BASE: u32 = 0x8000_8000;

    /// Starts a ring at the positions in `base`. If the upper half of `base` is 0, the frontend sends no more than the
    /// lower half, and nothing is in flight.
    ///
    /// # Errors
    /// When the layout is invalid, a position is outside the ring, or a part of the ring is outside guest memory.
    pub fn new(layout: &RingLayout, memory: &Arc<GuestMemory>) -> Result<Self, RingError> {
        let RingLayout { size, descriptors, available, used, base, event_index, indirect } = *layout;
        let aligned = descriptors.is_multiple_of(DESCRIPTOR_BYTES as u64)
            && available.is_multiple_of(EVENT_BYTES as u64)
            && used.is_multiple_of(EVENT_BYTES as u64);
        if !(1..=SIZE_MAX).contains(&size) || !aligned {
            return Err(RingError::Layout { size });
        }
        let (lower, upper) = (base as u16, (base >> 16) as u16);
        let next_available = Position::from_bits(lower);
        let next_used = Position::from_bits(if upper == 0 { lower } else { upper });
        let is_inside = next_available.index() < size && next_used.index() < size;
        let in_flight = if is_inside { next_used.distance(next_available, size) } else { u32::MAX };
        // Those of a device that did not come to give them back. Nobody will, so they are never free again.
        let in_flight = u16::try_from(in_flight).ok().filter(|in_flight| *in_flight <= size);
        let in_flight = in_flight.ok_or(RingError::Base { base, size })?;
        let slots = usize::from(size);
        let mut ring = PackedRing {
            descriptors: Part::find(memory, descriptors, slots * DESCRIPTOR_BYTES)?,
            driver_event: Part::find(memory, available, EVENT_BYTES)?,
            device_event: Part::find(memory, used, EVENT_BYTES)?,
            size,
            indirect,
            event_index,
            next_available,
            waiting: 0,
            waiting_descriptors: 0,
            next_used,
            asked_at: next_used,
            lengths: vec![0; slots],
            in_flight,
            taken: 0,
            began_used: false,
            loss: Arc::clone(memory.loss()),
            log: None,
            chain: Vec::with_capacity(slots),
            copies: Copies::new(size),
        };
        ring.began_used = ring.is_used()?;
        Ok(ring)
    }

    /// Whether a device was here before. After an even number of laps both positions are where they began, but some
    /// descriptors have flags that neither new memory has nor the driver stores in its first lap. Only the flags count: the
    /// driver may be writing its first descriptor now, and stores them last.
    fn is_used(&self) -> Result<bool, RingError> {
        if (self.next_available, self.next_used) != (Position::START, Position::START) {
            return Ok(true);
        }
        for index in 0..self.size {
            let flags = self.flags_at(Position::new(index, true))?;
            if flags != 0 && !is_available(flags, true) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Bytes of the descriptor ring of `size` descriptors.
    pub(crate) fn descriptor_bytes(size: u16) -> u64 {
        u64::from(size) * DESCRIPTOR_BYTES as u64
    }

    /// Bytes of the device's event suppression.
    pub(crate) const DEVICE_EVENT_BYTES: u64 = EVENT_BYTES as u64;

    /// Logs all writes to the ring from now on.
    pub(crate) fn log_writes(&mut self, descriptors: PartLog, device_event: PartLog) {
        self.log = Some(Log { descriptors, device_event });
    }

    /// Where the first `bytes` bytes of the writable part of the chain that was last taken lie, and its last byte, which
    /// has the status: guest address and bytes of each range.
    pub(crate) fn writable(&self, bytes: u64) -> impl Iterator<Item = (u64, u32)> {
        self.copies.writable(bytes)
    }

    /// The ring's descriptors of the chain that was last taken: at least one.
    pub fn last_chain(&self) -> &[PackedDescriptor] {
        &self.chain
    }

    /// Descriptors of the ring.
    pub(crate) fn size(&self) -> u16 {
        self.size
    }

    /// The next descriptor to take.
    pub fn next_available(&self) -> Position {
        self.next_available
    }

    /// The next descriptor to give back.
    pub fn next_used(&self) -> Position {
        self.next_used
    }

    /// Both positions, in the form of [`RingLayout::base`].
    pub fn base(&self) -> u32 {
        u32::from(self.next_available.bits()) | u32::from(self.next_used.bits()) << 16
    }

    /// How many chains were taken and not put back, modulo 65,536.
    pub(crate) fn taken(&self) -> u16 {
        self.taken
    }

    /// True if any chain ever passed through the ring. It cannot be seen where both sides are where they began and the driver
    /// has made every descriptor available since.
    pub fn was_used(&self) -> bool {
        self.began_used || self.next_available != Position::START || self.next_used != Position::START
    }

    /// Whether the descriptor there is as the driver made it available: no device has given it back since.
    ///
    /// # Errors
    /// When the ring is no longer accessible.
    pub(crate) fn is_available_at(&self, position: Position) -> Result<bool, RingError> {
        Ok(is_available(self.flags_at(position)?, position.wrap()))
    }

    /// Continues after another device, which has taken so many descriptors that it has not given back. Each of their
    /// chains comes by [`PackedRing::take_again`].
    ///
    /// That device may have died while it wrote a batch, before the driver could see any of it. Then some of these
    /// descriptors look as if they were given back, and the driver would believe it as soon as it got that far. So all
    /// of them are made to look available again. The driver does not look at them before it sees the next one.
    ///
    /// # Errors
    /// When the ring is no longer accessible.
    pub(crate) fn resume(&mut self, next_used: Position, in_flight: u16) -> Result<(), RingError> {
        let mut at = next_used;
        for _ in 0..in_flight {
            let flags = self.flags_at(at)?;
            if !is_available(flags, at.wrap()) {
                let flags = flags & !(AVAILABLE | USED) | available_bits(at.wrap());
                self.descriptors.store(flags, Self::offset(at) + FLAGS, Ordering::Release)?;
            }
            at = at.advance(1, self.size);
        }
        self.log_given_back(next_used, in_flight.into());
        (self.next_used, self.asked_at, self.next_available) = (next_used, next_used, at);
        // Counted again as they are taken again.
        self.in_flight = 0;
        Ok(())
    }

    /// The number of chains that wait to be taken.
    ///
    /// # Errors
    /// When a chain is longer than the ring has room for, or not all of it is available.
    #[inline]
    pub fn available(&mut self) -> Result<u16, RingError> {
        let mut at = self.next_available.advance(self.waiting_descriptors, self.size);
        while let Some(length) = self.chain_at(at)? {
            self.waiting += 1;
            self.waiting_descriptors += length;
            at = at.advance(length, self.size);
        }
        Ok(self.waiting)
    }

    /// The descriptors of the chain that is available at `start`, the end of those that wait; `None` if there is none.
    #[inline]
    fn chain_at(&self, start: Position) -> Result<Option<u16>, RingError> {
        let room = self.size - self.in_flight - self.waiting_descriptors;
        let (mut at, mut length) = (start, 0);
        while length < room {
            // Acquire, paired with the driver's barrier before it stores the first descriptor's flags: the chain is
            // there.
            let flags = self.flags_at(at)?;
            if !is_available(flags, at.wrap()) {
                let cut = RingError::ChainCut { index: at.index() };
                return if length == 0 { Ok(None) } else { Err(cut) };
            }
            length += 1;
            if flags & NEXT == 0 {
                return Ok(Some(length));
            }
            at = at.advance(1, self.size);
        }
        if length == 0 { Ok(None) } else { Err(RingError::ChainTooLong { index: start.index(), room }) }
    }

    /// Takes the next chain into `chain`. Only when [`PackedRing::available`] returned at least one.
    ///
    /// # Errors
    /// When the ring itself is corrupt; then nothing was taken. A defect of a single chain is in its `fault`.
    #[inline]
    pub fn pop(&mut self, memory: &GuestMemory, chain: &mut Chain) -> Result<(), RingError> {
        let start = self.next_available;
        let mut at = start;
        self.chain.clear();
        loop {
            let descriptor = PackedDescriptor::decode(self.descriptors.read(Self::offset(at))?);
            self.chain.push(descriptor);
            if !is_available(descriptor.flags, at.wrap()) {
                return Err(RingError::ChainChanged { index: start.index() });
            }
            at = at.advance(1, self.size);
            if !descriptor.has_next() || self.chain.len() >= usize::from(self.waiting_descriptors) {
                break;
            }
        }
        // At most as many as those that wait.
        let length = self.chain.len() as u16;
        let left = (self.waiting.checked_sub(1), self.waiting_descriptors.checked_sub(length));
        let (Some(waiting), Some(descriptors)) = left else {
            return Err(RingError::ChainChanged { index: start.index() });
        };
        // The driver may have changed where its chains end after they were counted.
        if self.chain[self.chain.len() - 1].has_next() || (waiting == 0) != (descriptors == 0) {
            return Err(RingError::ChainChanged { index: start.index() });
        }
        self.take(memory, chain)?;
        (self.waiting, self.waiting_descriptors) = (waiting, descriptors);
        self.next_available = at;
        self.taken = self.taken.wrapping_add(1);
        Ok(())
    }

    /// Takes a chain of the last worker into `chain`, whatever the ring holds now.
    ///
    /// # Errors
    /// As for [`PackedRing::pop`].
    pub fn take_again(
        &mut self,
        recorded: &RecordedChain,
        memory: &GuestMemory,
        chain: &mut Chain,
    ) -> Result<(), RingError> {
        self.chain.clear();
        self.chain.extend_from_slice(&recorded.0);
        self.take(memory, chain)
    }

    /// Takes the chain whose descriptors were just copied.
    #[inline]
    fn take(&mut self, memory: &GuestMemory, chain: &mut Chain) -> Result<(), RingError> {
        let (id, length) = (self.chain[self.chain.len() - 1].id, self.chain.len() as u16);
        let Some(taken) = self.lengths.get_mut(usize::from(id)) else {
            return Err(RingError::IdOutOfRange { id, size: self.size });
        };
        if *taken != 0 {
            return Err(RingError::IdInFlight { id });
        }
        *taken = length;
        self.in_flight += length;
        chain.head = id;
        let copied = self.walk(memory);
        self.copies.finish(copied, memory, chain);
        Ok(())
    }

    /// Puts a chain back, unanswered: the next pops find it again once every chain taken after it is back as well, in any
    /// order. Nothing that was given back meanwhile has overwritten it, as the descriptors of all chains before it come
    /// first.
    ///
    /// # Panics
    /// If the chain is not in flight.
    pub fn put_back(&mut self, id: u16) {
        let length = self.remove(id);
        self.next_available = self.next_available.retreat(length, self.size);
        self.waiting += 1;
        self.waiting_descriptors += length;
        self.taken = self.taken.wrapping_sub(1);
    }

    /// Gives chains back, in this order. The guest sees all of them at once.
    ///
    /// # Errors
    /// When the ring is no longer accessible, or some guest memory is lost: it may have held the data or the status of
    /// these chains. Then the guest sees none of them.
    #[inline]
    pub fn push_used(&mut self, used: &[Used]) -> Result<(), RingError> {
        let Some((first, others)) = used.split_first() else { return Ok(()) };
        let start = self.next_used;
        let mut next = start.advance(self.remove(first.head), self.size);
        for element in others {
            let flags = used_flags(next.wrap(), element.written);
            // le32 length, le16 buffer id, le16 flags. The driver reads none of them before the first descriptor.
            let raw = u64::from(element.written) | u64::from(element.head) << 32 | u64::from(flags) << 48;
            self.descriptors.write(raw.to_le(), Self::offset(next) + LENGTH)?;
            next = next.advance(self.remove(element.head), self.size);
        }
        let at = Self::offset(start);
        self.descriptors.write(first.written.to_le(), at + LENGTH)?;
        self.descriptors.write(first.head.to_le(), at + ID)?;
        if self.loss.is_lost() {
            return Err(RingError::MemoryLost);
        }
        self.next_used = next;
        // Release: a reader of these flags sees the other descriptors, and the bytes written to their chains.
        self.descriptors.store(used_flags(start.wrap(), first.written), at + FLAGS, Ordering::Release)?;
        // A batch has at most as many descriptors as the ring.
        self.log_given_back(start, start.distance(next, self.size));
        Ok(())
    }

    /// Whether the guest wants a notification for the chains given back since the previous call.
    ///
    /// # Errors
    /// When the driver's event suppression is no longer accessible.
    #[inline]
    pub fn needs_notification(&mut self) -> Result<bool, RingError> {
        // The used descriptors must be visible before the guest's wish is read: the driver stores its wish, then reads
        // the descriptors.
        fence(Ordering::SeqCst);
        let before = std::mem::replace(&mut self.asked_at, self.next_used);
        // Acquire: the driver stores the position before the flags that make it count.
        let flags = self.driver_event.load(EVENT_FLAGS, Ordering::Acquire)? & EVENT_FLAGS_MASK;
        if flags == DISABLE {
            return Ok(false);
        }
        if flags != DESCRIPTOR || !self.event_index {
            return Ok(true);
        }
        let event = Position::from_bits(self.driver_event.load(0, Ordering::Relaxed)?);
        // One that is not in the ring is never passed; better one notification too many.
        let is_passed = || before.distance(event, self.size) < before.distance(self.next_used, self.size);
        Ok(event.index() >= self.size || is_passed())
    }

    /// Requests kicks from the guest from now on. True if chains wait for which the guest may not have kicked.
    ///
    /// # Errors
    /// When the ring is no longer accessible, or invalid.
    pub fn enable_kicks(&mut self) -> Result<bool, RingError> {
        if self.event_index {
            self.device_event.store(self.next_available.bits(), 0, Ordering::Relaxed)?;
            self.store_event_flags(DESCRIPTOR)?;
        } else {
            self.store_event_flags(ENABLE)?;
        }
        // The wish must be visible before the descriptors are read: the driver stores them, then reads the wish.
        fence(Ordering::SeqCst);
        Ok(self.available()? > 0)
    }

    /// Lets the guest skip kicks.
    ///
    /// # Errors
    /// When the device's event suppression is no longer accessible.
    pub fn disable_kicks(&mut self) -> Result<(), RingError> {
        self.store_event_flags(DISABLE)
    }

    /// Stores what kicks are wanted. The position, if it counts, was stored before.
    fn store_event_flags(&self, flags: u16) -> Result<(), RingError> {
        self.device_event.store(flags, EVENT_FLAGS, Ordering::Release)?;
        if let Some(log) = &self.log {
            log.device_event.mark(0, EVENT_BYTES);
        }
        Ok(())
    }

    /// Takes a chain out of those in flight. Returns its descriptors.
    ///
    /// # Panics
    /// If the chain is not in flight.
    #[inline]
    fn remove(&mut self, id: u16) -> u16 {
        let length = std::mem::take(&mut self.lengths[usize::from(id)]);
        assert!(length > 0, "a chain that is not in flight was given back");
        self.in_flight -= length;
        length
    }

    /// The offset of a descriptor in the ring.
    #[inline]
    fn offset(position: Position) -> usize {
        usize::from(position.index()) * DESCRIPTOR_BYTES
    }

    #[inline]
    fn flags_at(&self, position: Position) -> Result<u16, RingError> {
        Ok(self.descriptors.load(Self::offset(position) + FLAGS, Ordering::Acquire)?)
    }

    /// Logs so many descriptors from a position on, at most all of the ring.
    fn log_given_back(&self, from: Position, descriptors: u32) {
        let Some(log) = &self.log else { return };
        let (first, count, size) = (usize::from(from.index()), descriptors as usize, usize::from(self.size));
        let until_end = count.min(size - first);
        log.descriptors.mark(first * DESCRIPTOR_BYTES, until_end * DESCRIPTOR_BYTES);
        log.descriptors.mark(0, (count - until_end) * DESCRIPTOR_BYTES);
    }

    /// Copies the parts of the chain in `self.chain`, or those in its indirect table.
    fn walk(&mut self, memory: &GuestMemory) -> Result<(), Broken> {
        self.copies.clear();
        if let [only] = self.chain[..]
            && only.flags & INDIRECT != 0
        {
            return self.walk_indirect(memory, only.address, only.length as usize);
        }
        for descriptor in &self.chain {
            // Virtio 1.2, 2.8.19: never together with NEXT.
            if descriptor.flags & INDIRECT != 0 {
                return Err(Broken);
            }
            self.copies.add(descriptor.copied())?;
        }
        Ok(())
    }

    /// Virtio 1.2, 2.8.7: the table's descriptors are the chain, in their order. Of their flags only WRITE counts.
    fn walk_indirect(&mut self, memory: &GuestMemory, address: u64, bytes: usize) -> Result<(), Broken> {
        if !self.indirect {
            return Err(Broken);
        }
        let table = Table::find(memory, address, bytes)?;
        for index in 0..table.entries {
            if self.copies.is_full() {
                return Err(Broken);
            }
            self.copies.add(PackedDescriptor::decode(table.read(index)?).copied())?;
        }
        Ok(())
    }
}
