//! A chain of descriptors, of either kind of ring: what the device gets of it, and how it is copied and checked.
//!
//! Every descriptor is copied once and only the copy is used. The work is bounded whatever the descriptors hold.

use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::{GuestAddress, VolatileMemory};

use crate::device::GuestSlice;
use crate::error::BadAddress;
use crate::memory::GuestMemory;

pub(super) const DESCRIPTOR_BYTES: usize = size_of::<RawDescriptor>();
pub(super) const NEXT: u16 = VRING_DESC_F_NEXT as u16;
pub(super) const WRITE: u16 = VRING_DESC_F_WRITE as u16;
pub(super) const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;

/// The most descriptors of a ring (virtio 1.2, 2.7 and 2.8).
pub(super) const SIZE_MAX: u16 = 32768;

/// A chain may have this many descriptors through an indirect table, or as many as the ring if that is more.
const INDIRECT_CHAIN_LIMIT: usize = 1024;

/// A descriptor as it lies in memory, read in one access. From the lowest bits up: 64 of address, 32 of length, and two
/// times 16, which are flags and next in a split ring, and buffer id and flags in a packed one.
pub(super) type RawDescriptor = u128;

/// The location of a ring and its format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingLayout {
    /// Descriptors, at most 32,768: in a split ring a power of two.
    pub size: u16,
    /// Guest address of the descriptor table, or of the descriptor ring.
    pub descriptors: u64,
    /// Guest address of the available ring, or of a packed ring's driver event suppression.
    pub available: u64,
    /// Guest address of the used ring, or of a packed ring's device event suppression.
    pub used: u64,
    /// Where the ring goes on, as the vhost-user messages have it: in a split ring the index in the available ring of the
    /// next chain to take. In a packed ring two positions, see [`super::Position`]: the next descriptor to take in the
    /// lower 16 bits, and the next to give back in the upper ones.
    pub base: u32,
    /// VIRTIO_F_EVENT_IDX was negotiated.
    pub event_index: bool,
    /// VIRTIO_F_INDIRECT_DESC was negotiated.
    pub indirect: bool,
}

/// A chain that the device is done with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// What identifies it: [`Chain::head`].
    pub head: u16,
    /// Bytes written to its writable part.
    pub written: u32,
}

/// The defect of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Its shape is invalid: a loop, a `next` out of range, readable after writable, or a bad indirect table. The
    /// location of its status byte is unknown.
    Malformed,
    /// Its shape is valid and its last writable bytes can be reached, but some other part is outside guest memory.
    Unreachable,
}

/// A chain taken from the ring, its parts translated. Created once for a queue and reused for every chain.
#[derive(Debug, Default)]
pub struct Chain {
    /// What identifies it when it is given back, below the size of its ring: its first descriptor in a split ring, its
    /// buffer id in a packed one.
    pub head: u16,
    /// The memory that the device may read, in order.
    pub readable: Vec<GuestSlice>,
    /// The memory that the device may write, in order.
    pub writable: Vec<GuestSlice>,
    /// The defect of the chain, if any.
    pub fault: Option<Fault>,
}

/// Our copy of a descriptor, as far as the parts of a chain need it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Copied {
    pub address: u64,
    pub length: u32,
    pub writable: bool,
}

/// The copied descriptors of the chain that was last taken, those of its indirect table in its place. Kept to reuse the
/// allocation.
#[derive(Debug)]
pub(super) struct Copies {
    copied: Vec<Copied>,
    /// The most descriptors of a chain with an indirect table.
    limit: usize,
}

impl Copies {
    pub(super) fn new(ring_size: u16) -> Self {
        let slots = usize::from(ring_size);
        Copies { copied: Vec::with_capacity(slots), limit: INDIRECT_CHAIN_LIMIT.max(slots) }
    }

    #[inline]
    pub(super) fn clear(&mut self) {
        self.copied.clear();
    }

    #[inline]
    pub(super) fn len(&self) -> usize {
        self.copied.len()
    }

    /// Whether a chain with an indirect table may have no more descriptors.
    #[inline]
    pub(super) fn is_full(&self) -> bool {
        self.copied.len() >= self.limit
    }

    /// Adds a descriptor of the chain.
    #[inline]
    pub(super) fn add(&mut self, descriptor: Copied) -> Result<(), Broken> {
        // Virtio 1.2, 2.7.4.2 and 2.8.17: everything readable comes before everything writable.
        if !descriptor.writable && self.copied.last().is_some_and(|last| last.writable) {
            return Err(Broken);
        }
        self.copied.push(descriptor);
        Ok(())
    }

    /// Makes a chain of the copies, or of the defect that was found while they were made.
    #[inline]
    pub(super) fn finish(&self, copied: Result<(), Broken>, memory: &GuestMemory, chain: &mut Chain) {
        chain.readable.clear();
        chain.writable.clear();
        chain.fault = match copied {
            Ok(()) => self.translate(memory, chain),
            Err(Broken) => Some(Fault::Malformed),
        };
        if chain.fault == Some(Fault::Malformed) {
            chain.readable.clear();
            chain.writable.clear();
        }
    }

    /// Translates the copied descriptors. A bad address does not hide the status byte after it, as long as the last
    /// writable descriptor that has bytes is valid.
    fn translate(&self, memory: &GuestMemory, chain: &mut Chain) -> Option<Fault> {
        let mut fault = None;
        for copied in &self.copied {
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

    /// Where the first `bytes` bytes of the writable part lie, and its last byte, which has the status: guest address and
    /// bytes of each range.
    pub(super) fn writable(&self, bytes: u64) -> impl Iterator<Item = (u64, u32)> {
        let writable = self.copied.iter().filter(|copied| copied.writable && copied.length > 0);
        let last = writable.clone().next_back();
        let status = last.map(|last| (last.address.wrapping_add(u64::from(last.length) - 1), 1));
        let mut left = bytes;
        let first = writable.map_while(move |copied| {
            let taken = u64::from(copied.length).min(left);
            left -= taken;
            // Not more than the descriptor's length.
            (taken > 0).then_some((copied.address, taken as u32))
        });
        first.chain(status)
    }
}

/// An indirect table in guest memory.
pub(super) struct Table<'a> {
    memory: &'a GuestMemory,
    /// The table, where it lies in one mapping.
    whole: Option<GuestSlice>,
    address: u64,
    pub entries: usize,
}

impl<'a> Table<'a> {
    /// Finds the table that a descriptor names.
    #[inline]
    pub(super) fn find(memory: &'a GuestMemory, address: u64, bytes: usize) -> Result<Self, Broken> {
        if bytes == 0 || !bytes.is_multiple_of(DESCRIPTOR_BYTES) {
            return Err(Broken);
        }
        let whole = memory.whole(address, bytes);
        if whole.is_none() {
            memory.check(GuestAddress(address), bytes as u64)?;
        }
        Ok(Table { memory, whole, address, entries: bytes / DESCRIPTOR_BYTES })
    }

    /// Copies a descriptor of the table, once.
    #[inline]
    pub(super) fn read(&self, index: usize) -> Result<RawDescriptor, Broken> {
        let at = index * DESCRIPTOR_BYTES;
        match &self.whole {
            Some(whole) => Ok(whole.get_ref::<RawDescriptor>(at).map_err(|_| Broken)?.load()),
            // The range was checked, so the sum fits 64 bits.
            None => Ok(self.memory.read(self.address + at as u64)?),
        }
    }
}

/// A chain that cannot be parsed.
#[derive(Debug)]
pub(super) struct Broken;

impl From<BadAddress> for Broken {
    fn from(_: BadAddress) -> Self {
        Broken
    }
}
