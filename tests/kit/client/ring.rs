//! A split virtqueue from the driver's side (virtio 1.2, section 2.7).
//!
//! Owns the ring's three parts in shared memory, the driver's indices, and the notification rules. It knows nothing
//! of requests: it sends heads and receives used elements. Tests of a hostile driver may also set descriptors,
//! avail entries and indices to any value.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

use super::memory::{SharedMemory, View};

/// The chain continues with the descriptor that `next` names (VIRTQ_DESC_F_NEXT).
pub const NEXT: u16 = 1;
/// The device writes this buffer (VIRTQ_DESC_F_WRITE).
pub const WRITE: u16 = 2;
/// The buffer holds a table of descriptors (VIRTQ_DESC_F_INDIRECT).
pub const INDIRECT: u16 = 4;

/// "Send no call" in the avail ring's flags (VIRTQ_AVAIL_F_NO_INTERRUPT).
const NO_INTERRUPT: u16 = 1;
/// "Send no kick" in the used ring's flags (VIRTQ_USED_F_NO_NOTIFY).
const NO_NOTIFY: u16 = 1;

/// One entry of a descriptor table (virtio 2.7.5).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Descriptor {
    /// Guest address of the buffer.
    pub address: u64,
    /// Length of the buffer in bytes.
    pub length: u32,
    /// [`NEXT`], [`WRITE`], [`INDIRECT`].
    pub flags: u16,
    /// Index of the next descriptor, valid with [`NEXT`].
    pub next: u16,
}

impl Descriptor {
    /// Bytes of one table entry.
    pub const SIZE: usize = 16;

    /// The two 64-bit words of the table entry.
    pub fn words(self) -> [u64; 2] {
        [self.address, u64::from(self.length) | u64::from(self.flags) << 32 | u64::from(self.next) << 48]
    }

    /// The 16 bytes of the table entry.
    pub fn bytes(self) -> [u8; 16] {
        let [first, second] = self.words();
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&first.to_le_bytes());
        bytes[8..].copy_from_slice(&second.to_le_bytes());
        bytes
    }
}

/// Stores a descriptor into a table viewed as pairs of words.
pub(super) fn store_descriptor(table: &[AtomicU64], index: usize, descriptor: Descriptor) {
    let [first, second] = descriptor.words();
    table[2 * index].store(first, Ordering::Relaxed);
    table[2 * index + 1].store(second, Ordering::Relaxed);
}

/// Offsets of a ring's parts in the shared memory, in bytes.
#[derive(Clone, Copy, Debug)]
pub struct RingLayout {
    /// Offset of the descriptor table.
    pub descriptors: usize,
    /// Offset of the avail ring.
    pub available: usize,
    /// Offset of the used ring.
    pub used: usize,
    /// First offset past the ring.
    pub end: usize,
}

impl RingLayout {
    /// Lays out a ring of `size` entries from `start` on. The used ring gets its own cache lines, because the
    /// device writes it while the driver writes the others.
    pub fn new(start: usize, size: u16) -> Self {
        let size = usize::from(size);
        let descriptors = start.next_multiple_of(64);
        let available = (descriptors + Descriptor::SIZE * size).next_multiple_of(64);
        let used = (available + 6 + 2 * size).next_multiple_of(64);
        let end = (used + 6 + 8 * size).next_multiple_of(64);
        Self { descriptors, available, used, end }
    }
}

/// A used element (virtio 2.7.8).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// Head of the chain, as the device wrote it.
    pub id: u32,
    /// Bytes that the device claims to have written.
    pub length: u32,
}

/// The driver's end of one split ring.
#[derive(Debug)]
pub struct Ring {
    size: u16,
    event_idx: bool,
    layout: RingLayout,
    descriptors: View<AtomicU64>,
    /// flags, idx, ring[size], used_event.
    available: View<AtomicU16>,
    /// flags and idx in one word, (id, len)[size], avail_event in the last word's low half.
    used: View<AtomicU32>,
    next_avail: u16,
    published: u16,
    last_used: u16,
}

impl Ring {
    /// Creates an empty ring whose indices begin at `base`, with calls off.
    ///
    /// # Panics
    /// When `size` is not a power of two up to 32,768, or the layout is not inside the memory.
    pub fn new(
        memory: &Arc<SharedMemory>,
        layout: RingLayout,
        size: u16,
        base: u16,
        event_idx: bool,
    ) -> Self {
        assert!(
            size.is_power_of_two() && size <= 32768,
            "a split ring's size is a power of two up to 32,768"
        );
        let entries = usize::from(size);
        let ring = Self {
            size,
            event_idx,
            layout,
            descriptors: View::new(memory, layout.descriptors, 2 * entries),
            available: View::new(memory, layout.available, 3 + entries),
            used: View::new(memory, layout.used, 1 + 2 * entries + 1),
            next_avail: base,
            published: base,
            last_used: base,
        };
        ring.used[0].store(u32::from(base) << 16, Ordering::Relaxed);
        // A device that had reached `base` would have requested a kick at the next entry.
        ring.used[2 * entries + 1].store(u32::from(base), Ordering::Relaxed);
        ring.set_avail_index(base);
        ring.disarm_call();
        ring
    }

    /// Entries of the ring.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// The layout of the ring.
    pub fn layout(&self) -> RingLayout {
        self.layout
    }

    /// The descriptor table as pairs of words.
    pub(super) fn table(&self) -> &[AtomicU64] {
        &self.descriptors
    }

    /// Sets any descriptor to any value.
    ///
    /// # Panics
    /// When `index` is not in the table.
    pub fn set_descriptor(&self, index: u16, descriptor: Descriptor) {
        store_descriptor(&self.descriptors, usize::from(index), descriptor);
    }

    /// Puts a head into the next avail entry. The device does not see it before [`Ring::publish`].
    pub fn offer(&mut self, head: u16) {
        self.set_avail_entry(self.next_avail, head);
        self.next_avail = self.next_avail.wrapping_add(1);
    }

    /// Shows every offered head to the device. Returns whether the device wants a kick.
    pub fn publish(&mut self) -> bool {
        if self.published == self.next_avail {
            return false;
        }
        let old = std::mem::replace(&mut self.published, self.next_avail);
        // Release: pairs with the device's load of idx, so that it sees descriptors and entries.
        self.available[1].store(self.next_avail, Ordering::Release);
        // The store of idx precedes the load of avail_event / flags (virtio 2.7.21): the device does the reverse.
        fence(Ordering::SeqCst);
        if self.event_idx {
            // The truncation to u16 is intended: avail_event is the low half of the last word.
            let event = self.used[self.used.len() - 1].load(Ordering::Relaxed) as u16;
            needs_event(event, self.next_avail, old)
        } else {
            self.used[0].load(Ordering::Relaxed) as u16 & NO_NOTIFY == 0
        }
    }

    /// Takes the next used element, if there is one.
    pub fn take_used(&mut self) -> Option<Used> {
        if self.used_index() == self.last_used {
            return None;
        }
        let element = self.used_entry(self.last_used);
        self.last_used = self.last_used.wrapping_add(1);
        Some(element)
    }

    /// Whether an unread used element exists.
    pub fn has_used(&self) -> bool {
        self.used_index() != self.last_used
    }

    /// Requests a call at the next used element. If one exists already, turns calls off again and returns false.
    pub fn arm_call(&self) -> bool {
        if self.event_idx {
            self.available[self.available.len() - 1].store(self.last_used, Ordering::Relaxed);
        } else {
            self.available[0].store(0, Ordering::Relaxed);
        }
        // The request is stored before the check (virtio 2.7.10): the device stores used.idx before it loads the
        // request.
        fence(Ordering::SeqCst);
        if self.has_used() {
            self.disarm_call();
            return false;
        }
        true
    }

    /// Turns calls off. With EVENT_IDX this sets an event index that has already passed.
    pub fn disarm_call(&self) {
        if self.event_idx {
            let passed = self.last_used.wrapping_sub(1);
            self.available[self.available.len() - 1].store(passed, Ordering::Relaxed);
        } else {
            self.available[0].store(NO_INTERRUPT, Ordering::Relaxed);
        }
    }

    /// Sets the avail entry for `position` (modulo the size) to any head.
    pub fn set_avail_entry(&self, position: u16, head: u16) {
        let at = usize::from(position & (self.size - 1));
        self.available[2 + at].store(head, Ordering::Relaxed);
    }

    /// Sets the avail index to any value, visible to the device at once.
    pub fn set_avail_index(&self, index: u16) {
        self.available[1].store(index, Ordering::Release);
    }

    /// The avail index in memory.
    pub fn avail_index(&self) -> u16 {
        self.available[1].load(Ordering::Relaxed)
    }

    /// The used index as the device left it.
    pub fn used_index(&self) -> u16 {
        // Acquire: pairs with the device's release store of idx, so that the elements and the data are seen.
        (self.used[0].load(Ordering::Acquire) >> 16) as u16
    }

    /// The used element for `position` (modulo the size).
    pub fn used_entry(&self, position: u16) -> Used {
        let at = 1 + 2 * usize::from(position & (self.size - 1));
        let id = self.used[at].load(Ordering::Relaxed);
        let length = self.used[at + 1].load(Ordering::Relaxed);
        Used { id, length }
    }
}

/// Whether the step from `old` to `new` passes the index at which the other side wants a notification (virtio
/// 2.7.10).
fn needs_event(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_wanted_exactly_when_passed() {
        assert!(needs_event(5, 6, 5));
        assert!(!needs_event(6, 6, 5));
        assert!(!needs_event(4, 6, 5));
        assert!(needs_event(65535, 0, 65535));
        assert!(needs_event(0, 3, 65534));
        assert!(!needs_event(3, 3, 65534));
    }

    #[test]
    fn elements_come_back_across_the_wrap_of_the_indices() {
        let layout = RingLayout::new(64, 4);
        let memory = Arc::new(SharedMemory::new(layout.end).expect("memfd"));
        for event_idx in [false, true] {
            let mut ring = Ring::new(&memory, layout, 4, 65534, event_idx);
            assert!(ring.take_used().is_none());
            assert!(ring.arm_call(), "nothing is used yet");
            for round in 0..6u16 {
                ring.offer(round % 4);
                // The device's avail_event stays at the value from `new`, so only the first entry passes it.
                assert_eq!(ring.publish(), round == 0 || !event_idx);
                assert_eq!(ring.avail_index(), 65535u16.wrapping_add(round));
                // The device's part, written by hand.
                let used = 65534u16.wrapping_add(round);
                let at = 1 + 2 * usize::from(used % 4);
                ring.used[at].store(u32::from(round % 4), Ordering::Relaxed);
                ring.used[at + 1].store(7, Ordering::Relaxed);
                ring.used[0].store(u32::from(used.wrapping_add(1)) << 16, Ordering::Release);
                assert!(!ring.arm_call(), "an element waits");
                assert_eq!(ring.take_used(), Some(Used { id: u32::from(round % 4), length: 7 }));
                assert!(ring.take_used().is_none());
            }
        }
    }

    #[test]
    fn a_descriptor_is_its_sixteen_bytes() {
        let descriptor =
            Descriptor { address: 0x0102_0304_0506_0708, length: 0x1122_3344, flags: 5, next: 0x99aa };
        assert_eq!(descriptor.bytes(), [8, 7, 6, 5, 4, 3, 2, 1, 0x44, 0x33, 0x22, 0x11, 5, 0, 0xaa, 0x99]);
    }
}
