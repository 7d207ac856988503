//! For tests: the driver of a packed ring, and memory for it, written from virtio 1.2, 2.8, alone.
//!
//! It checks what a driver can check: nothing is handed back that is not outstanding, and nothing twice.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vm_memory::{Bytes, GuestAddress};

use crate::memory::{GuestMemory, MemoryTable, RegionInfo};
use crate::ring::{PackedRing, Position, RingLayout};

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;
pub(crate) const DISABLE: u16 = 1;
pub(crate) const DESCRIPTOR: u16 = 2;

/// Bytes of a memory region.
pub(crate) const REGION: u64 = 0x1000;
const RING: u64 = 0;
const DRIVER_EVENT: u64 = 0x800;
const DEVICE_EVENT: u64 = 0x900;
/// Where buffers may be.
pub(crate) const DATA: u64 = 0xa00;

/// Memory of `regions` adjacent regions, each in its own mapping.
pub(crate) fn memory(regions: u64) -> Arc<GuestMemory> {
    let infos: Vec<_> = (0..regions)
        .map(|n| RegionInfo { guest: n * REGION, size: REGION, user: n * REGION, offset: 0 })
        .collect();
    let file = |_: &RegionInfo| -> File {
        let file = tempfile::tempfile().expect("a temporary file");
        file.set_len(REGION).expect("its length");
        file
    };
    let files = infos.iter().map(file).collect();
    MemoryTable::new().with_regions(&infos, files).expect("sound regions").memory()
}

/// A part of a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub address: u64,
    pub length: u32,
    /// WRITE or INDIRECT.
    pub flags: u16,
}

/// A buffer that the device has.
#[derive(Clone, Debug)]
pub(crate) struct Outstanding {
    pub request: u64,
    pub pieces: Vec<Piece>,
}

#[derive(Debug)]
pub(crate) struct Driver {
    pub memory: Arc<GuestMemory>,
    pub layout: RingLayout,
    /// The next descriptor to make available, and the next to look at.
    pub next: Position,
    pub seen: Position,
    pub free: u16,
    /// By buffer id.
    pub outstanding: Vec<Option<Outstanding>>,
}

impl Driver {
    pub(crate) fn new(size: u16, memory: Arc<GuestMemory>) -> Self {
        let layout = RingLayout {
            size,
            descriptors: RING,
            available: DRIVER_EVENT,
            used: DEVICE_EVENT,
            base: PackedRing::START_BASE,
            event_index: true,
            indirect: true,
        };
        Self::at(layout, memory)
    }

    pub(crate) fn at(layout: RingLayout, memory: Arc<GuestMemory>) -> Self {
        let outstanding = vec![None; usize::from(layout.size)];
        let (next, seen) = (Position::START, Position::START);
        Driver { memory, layout, next, seen, free: layout.size, outstanding }
    }

    pub(crate) fn ring(&self) -> PackedRing {
        PackedRing::new(&self.layout, &self.memory).expect("a sound ring")
    }

    pub(crate) fn write(&self, bytes: &[u8], address: u64) {
        self.memory.map().write_slice(bytes, GuestAddress(address)).expect("guest memory");
    }

    pub(crate) fn number(&self, address: u64) -> u16 {
        u16::from_le(self.memory.map().load(GuestAddress(address), Ordering::Acquire).expect("guest memory"))
    }

    pub(crate) fn descriptor(&self, index: u16) -> u64 {
        self.layout.descriptors + 16 * u64::from(index)
    }

    /// Writes a descriptor, its flags last.
    pub(crate) fn write_descriptor(&self, at: u64, piece: Piece, id: u16, flags: u16) {
        self.write(&piece.address.to_le_bytes(), at);
        self.write(&piece.length.to_le_bytes(), at + 8);
        self.write(&id.to_le_bytes(), at + 12);
        self.write(&flags.to_le_bytes(), at + 14);
    }

    /// The flags that make a descriptor available at a position.
    pub(crate) fn available_flags(position: Position) -> u16 {
        if position.wrap() { 1 << 7 } else { 1 << 15 }
    }

    /// Makes a buffer available, its first descriptor last. It has an id that is not outstanding, and room.
    pub(crate) fn add(&mut self, request: u64, id: u16, pieces: &[Piece]) {
        let (count, size) = (pieces.len() as u16, self.layout.size);
        assert!(count <= self.free && self.outstanding[usize::from(id)].is_none());
        for (number, piece) in (0..count).zip(pieces).rev() {
            let at = self.next.advance(number, size);
            let next = if number + 1 < count { NEXT } else { 0 };
            let flags = piece.flags | next | Self::available_flags(at);
            self.write_descriptor(self.descriptor(at.index()), *piece, id, flags);
        }
        self.outstanding[usize::from(id)] = Some(Outstanding { request, pieces: pieces.to_vec() });
        self.next = self.next.advance(count, size);
        self.free -= count;
    }

    /// The next buffer that was handed back: its id, what it was, and the bytes written.
    pub(crate) fn take(&mut self) -> Option<(u16, Outstanding, u32)> {
        let at = self.descriptor(self.seen.index());
        let flags = self.number(at + 14);
        let (available, used) = (flags & (1 << 7) != 0, flags & (1 << 15) != 0);
        if available != used || used != self.seen.wrap() {
            return None;
        }
        let id = self.number(at + 12);
        let written = u32::from(self.number(at + 8)) | u32::from(self.number(at + 10)) << 16;
        assert_eq!(flags & WRITE != 0, written > 0);
        let was = self.outstanding.get_mut(usize::from(id)).and_then(Option::take);
        let was = was.expect("handed back twice, or never made available");
        let count = was.pieces.len() as u16;
        self.seen = self.seen.advance(count, self.layout.size);
        self.free += count;
        Some((id, was, written))
    }

    /// Tells the device when to notify.
    pub(crate) fn want(&self, flags: u16, position: Position) {
        self.write(&position.bits().to_le_bytes(), self.layout.available);
        self.write(&flags.to_le_bytes(), self.layout.available + 2);
    }

    /// What the device tells about kicks: flags and position.
    pub(crate) fn wanted_kicks(&self) -> (u16, Position) {
        let position = Position::from_bits(self.number(self.layout.used));
        (self.number(self.layout.used + 2), position)
    }
}
