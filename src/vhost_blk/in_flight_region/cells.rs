//! The fields of the in-flight region, as atomics that other processes see.
//!
//! Every load acquires and every store releases. So the stores of one worker reach the memory in the order of its
//! program, which is all that a successor relies on: it finds the state after some number of them
//! (docs/concurrency.md, "The in-flight region"). On x86 that order costs nothing.

use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use vm_memory::AtomicInteger;

use super::layout::RingKind;

/// A number in shared memory.
#[derive(Debug)]
#[repr(transparent)]
pub(crate) struct Cell<A>(A);

impl<A: AtomicInteger> Cell<A> {
    #[inline]
    pub(super) fn load(&self) -> A::V {
        self.0.load(Ordering::Acquire)
    }

    #[inline]
    pub(super) fn store(&self, value: A::V) {
        #[cfg(test)]
        crate::death::step();
        self.0.store(value, Ordering::Release);
    }
}

/// The beginning of the area of a queue with a split ring: QueueRegionSplit of the specification.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct Header {
    /// Feature flags. None are defined.
    pub(super) features: Cell<AtomicU64>,
    /// 1, or 0 while the area holds nothing.
    pub(super) version: Cell<AtomicU16>,
    /// The number of descriptor states after the header.
    pub(super) desc_num: Cell<AtomicU16>,
    /// The head that was listed last: the beginning of the last batch.
    pub(super) last_batch_head: Cell<AtomicU16>,
    /// The ring's used index up to which no state is in flight any more.
    pub(super) used_idx: Cell<AtomicU16>,
}

/// The state of one descriptor of a split ring: DescStateSplit of the specification. It is in use for heads of chains only.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct Entry {
    /// 1 while the chain is in flight, else 0.
    pub(super) inflight: Cell<AtomicU8>,
    _padding: [AtomicU8; 5],
    /// The head that was listed before this one.
    pub(super) next: Cell<AtomicU16>,
    /// Grows from chain to chain, in the order in which they were taken.
    pub(super) counter: Cell<AtomicU64>,
}

/// The beginning of the area of a queue with a packed ring: QueueRegionPacked of the specification.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct PackedHeader {
    /// Feature flags. None are defined.
    pub(super) features: Cell<AtomicU64>,
    /// 1, or 0 while the area holds nothing.
    pub(super) version: Cell<AtomicU16>,
    /// The number of descriptor states after the header.
    pub(super) desc_num: Cell<AtomicU16>,
    /// The first entry of the list of free ones, and its value when all before was complete.
    pub(super) free_head: Cell<AtomicU16>,
    pub(super) old_free_head: Cell<AtomicU16>,
    /// `used_idx`, `old_used_idx`, `used_wrap_counter` and `old_used_wrap_counter`, see [`UsedPositions`]. They share a
    /// word, so one store changes all of them.
    pub(super) used: Cell<AtomicU64>,
    _padding: [AtomicU8; 8],
}

/// The position at which the device gives back its next chain, as the header of a packed ring's area has it: with the
/// batch that is being given back, and without.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct UsedPositions {
    pub index: u16,
    pub old_index: u16,
    pub wrap: u8,
    pub old_wrap: u8,
}

impl UsedPositions {
    pub(super) fn from_word(word: u64) -> Self {
        let bytes = word.to_ne_bytes();
        let number = |at: usize| u16::from_ne_bytes([bytes[at], bytes[at + 1]]);
        UsedPositions { index: number(0), old_index: number(2), wrap: bytes[4], old_wrap: bytes[5] }
    }

    pub(super) fn word(self) -> u64 {
        let (index, old_index) = (self.index.to_ne_bytes(), self.old_index.to_ne_bytes());
        let bytes = [index[0], index[1], old_index[0], old_index[1], self.wrap, self.old_wrap, 0, 0];
        u64::from_ne_bytes(bytes)
    }
}

/// The state of one descriptor of a packed ring that was taken: DescStatePacked of the specification. A chain uses as many
/// as it has descriptors in the ring, whatever their places there.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct PackedEntry {
    /// 1 while the chain that begins here is in flight, else 0.
    pub(super) inflight: Cell<AtomicU8>,
    _padding: AtomicU8,
    /// The next entry of the chain, or of the list of free ones.
    pub(super) next: Cell<AtomicU16>,
    /// In the first entry of a chain: its last one, and how many it has.
    pub(super) last: Cell<AtomicU16>,
    pub(super) num: Cell<AtomicU16>,
    /// In the first entry of a chain: grows from chain to chain, in the order in which they were taken.
    pub(super) counter: Cell<AtomicU64>,
    /// The descriptor.
    pub(super) id: Cell<AtomicU16>,
    pub(super) flags: Cell<AtomicU16>,
    pub(super) len: Cell<AtomicU32>,
    pub(super) addr: Cell<AtomicU64>,
}

/// Strata's own page behind the areas. A successor of a later version may find a longer page of an earlier one zeroed.
#[derive(Debug)]
#[repr(C)]
pub(super) struct Own {
    /// [`MAGIC`], or the page is somebody else's.
    pub magic: Cell<AtomicU64>,
    /// [`OWN_VERSION`].
    pub(super) version: Cell<AtomicU32>,
    /// What the guest last set its write cache to: 0 if unknown, 1 for off, 2 for on.
    pub write_cache: Cell<AtomicU8>,
}

/// Marks Strata's page.
pub(super) const MAGIC: u64 = u64::from_ne_bytes(*b"STRATAIF");
/// The version of Strata's page.
pub(super) const OWN_VERSION: u32 = 1;

const _: () = assert!(align_of::<Own>() <= 8);

/// The fields of a queue's area for one kind of ring. Headers and entries consist of atomics, and need no more than the
/// alignment of a word of 8 bytes.
pub(crate) trait AreaKind {
    const KIND: RingKind;
    type Header;
    type Entry;
    const SIZES_AND_ALIGNMENT: () = assert!(
        size_of::<Self::Header>() == Self::KIND.header_bytes()
            && size_of::<Self::Entry>() == Self::KIND.entry_bytes()
            && align_of::<Self::Header>() <= 8
            && align_of::<Self::Entry>() <= 8
    );
}

/// The fields for split rings.
#[derive(Debug)]
pub(crate) struct Split;

impl AreaKind for Split {
    const KIND: RingKind = RingKind::Split;
    type Header = Header;
    type Entry = Entry;
}

/// The fields for packed rings.
#[derive(Debug)]
pub(crate) struct Packed;

impl AreaKind for Packed {
    const KIND: RingKind = RingKind::Packed;
    type Header = PackedHeader;
    type Entry = PackedEntry;
}
