//! The layout of a queue's structures in the shared memory.
//!
//! Pure arithmetic, so that rings, slots and raw access agree. Offsets are in bytes from the start of the memory.

use super::memory::PAGE;
use super::ring::{Descriptor, RingLayout};

/// The most descriptors that a request may have in a table of its own.
const CHAIN_MAX: u16 = 1024;

/// The layout of one queue.
#[derive(Clone, Copy, Debug)]
pub struct QueueLayout {
    /// Entries of the ring.
    pub size: u16,
    /// The ring's parts.
    pub ring: RingLayout,
    /// Requests that fit at once.
    pub slots: u16,
    /// Descriptors of one request: header, data, status.
    pub chain: u16,
    /// The most data descriptors of one request.
    pub segments: u16,
    /// Descriptor tables, one per slot, if they are indirect.
    pub tables: Option<usize>,
    /// 64 bytes per slot: the header at 0, the status byte at 32.
    pub headers: usize,
    /// Buffers, one per slot.
    pub data: usize,
    /// Bytes of one buffer, whole pages.
    pub capacity: usize,
    /// Bytes from one buffer to the next: the capacity and one page more. Buffers a power of two apart would share
    /// a few sets of the host's caches and make every device look slower than it is.
    pub stride: usize,
    /// A page that no request uses, for raw access.
    pub scratch: usize,
    /// First offset past the queue's memory, page-aligned.
    pub end: usize,
}

impl QueueLayout {
    /// Lays a queue out from `start` on.
    ///
    /// # Panics
    /// When not even one request fits into the ring, or sizes are unreasonable: the caller chooses the options.
    pub fn new(
        start: usize,
        size: u16,
        segments: u16,
        capacity: usize,
        indirect: bool,
        slots_max: u16,
    ) -> Self {
        assert!((1..=CHAIN_MAX - 2).contains(&segments), "1 to {} data descriptors a request", CHAIN_MAX - 2);
        assert!(capacity <= 1 << 30, "buffers of at most 1 GiB");
        let chain = segments + 2;
        let slots = if indirect { size } else { size / chain }.min(slots_max);
        assert!(slots > 0, "a ring of {size} has no room for requests of {chain} descriptors");
        let count = usize::from(slots);
        let ring = RingLayout::new(start, size);
        let tables = indirect.then_some(ring.end);
        let headers = ring.end + if indirect { count * usize::from(chain) * Descriptor::SIZE } else { 0 };
        let headers = headers.next_multiple_of(64);
        let scratch = (headers + 64 * count).next_multiple_of(PAGE);
        let data = scratch + PAGE;
        let capacity = capacity.max(1).next_multiple_of(PAGE);
        let stride = capacity + PAGE;
        let end = data + count * stride;
        Self { size, ring, slots, chain, segments, tables, headers, data, capacity, stride, scratch, end }
    }

    /// Offset of a slot's buffer.
    pub fn data_of(&self, slot: u16) -> usize {
        self.data + usize::from(slot) * self.stride
    }

    /// Offset of a slot's descriptor table, which must be indirect.
    pub fn table_of(&self, slot: u16) -> usize {
        let tables = self.tables.expect("only a queue with indirect descriptors has tables");
        tables + usize::from(slot) * usize::from(self.chain) * Descriptor::SIZE
    }

    /// The slot whose chain begins with this head, if there is one.
    pub fn slot_of(&self, head: u32) -> Option<u16> {
        let head = u16::try_from(head).ok()?;
        let slot = if self.tables.is_some() {
            head
        } else if head.is_multiple_of(self.chain) {
            head / self.chain
        } else {
            return None;
        };
        (slot < self.slots).then_some(slot)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_name_slots_and_parts_do_not_overlap() {
        for indirect in [false, true] {
            let layout = QueueLayout::new(PAGE, 16, 2, 5000, indirect, u16::MAX);
            assert_eq!(layout.slots, if indirect { 16 } else { 4 });
            assert_eq!(layout.capacity, 2 * PAGE);
            let step = if indirect { 1 } else { 4 };
            for slot in 0..layout.slots {
                assert_eq!(layout.slot_of(u32::from(slot) * step), Some(slot));
            }
            assert_eq!(layout.slot_of(u32::from(layout.slots) * step), None);
            assert_eq!(layout.slot_of(0x1_0000), None);
            let parts = [layout.ring.end, layout.headers, layout.scratch, layout.data, layout.end];
            assert!(parts.is_sorted());
            assert_eq!(layout.data_of(layout.slots), layout.end);
            assert!(layout.end.is_multiple_of(PAGE));
        }
        assert_eq!(QueueLayout::new(0, 16, 1, 1, false, 3).slots, 3);
        assert_eq!(QueueLayout::new(0, 16, 1, 1, false, 9).slot_of(1), None);
    }
}
