//! The split ring compared with rust-vmm's: Strata's ring and virtio-queue's `Queue` see the same memory. They must
//! take the same chains, give them back in the same way and want the same notifications.
//!
//! If Strata refuses what virtio-queue accepts, the input must contain one of the reasons listed here.

use std::sync::Arc;

use vhost_blk::internals::{
    Chain, Fault, GuestMemory, GuestSlice, MemoryTable, RegionInfo, RingLayout, SplitRing, Used,
};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Address, Bytes, GuestAddress};

use super::values::Values;

/// Two adjacent regions, so that a range may cross from one into the other.
const REGION: u64 = 0x1_0000;
const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
/// Each ring has a used ring of its own; they share everything else.
const USED: u64 = 0x3000;
const USED_OTHER: u64 = 0x4000;
const TABLES: u64 = 0x5000;
/// Descriptors that all indirect tables together may hold.
const TABLE_ENTRIES: u64 = 48;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Both rings over the same memory.
struct Pair {
    memory: Arc<GuestMemory>,
    ring: SplitRing,
    other: Queue,
    layout: RingLayout,
    in_flight: Vec<u16>,
}

/// The input: the layout, the descriptors, then rounds of chains made available.
pub fn judge(input: &[u8]) {
    let mut values = Values(input);
    let mut pair = Pair::new(&mut values);
    pair.write_descriptors(&mut values, DESCRIPTORS, u64::from(pair.layout.size));
    pair.write_descriptors(&mut values, TABLES, TABLE_ENTRIES);
    for _ in 0..8 {
        if values.is_empty() || !pair.round(&mut values) {
            break;
        }
    }
}

fn memory() -> Arc<GuestMemory> {
    let regions = [0, REGION].map(|guest| RegionInfo { guest, size: REGION, user: guest, offset: 0 });
    let files = regions.iter().map(|_| {
        let file = tempfile::tempfile().expect("a temporary file");
        file.set_len(REGION).expect("its length can be set");
        file
    });
    MemoryTable::new().with_regions(&regions, files.collect()).expect("sound regions").memory()
}

impl Pair {
    fn new(values: &mut Values<'_>) -> Self {
        let (how, base) = (values.u8(), values.u16());
        let layout = RingLayout {
            size: 2 << (how & 7).min(5),
            descriptors: DESCRIPTORS,
            available: AVAILABLE,
            used: USED,
            base: u32::from(base),
            event_index: how & 8 != 0,
            indirect: how & 16 == 0,
        };
        let memory = memory();
        let mut pair = Self {
            ring: SplitRing::new(&layout, &memory).expect("a sound layout"),
            other: Queue::new_from(&layout),
            memory,
            layout,
            in_flight: Vec::new(),
        };
        pair.write(AVAILABLE + 2, base);
        // A ring may start at any used index.
        let used = values.u16();
        pair.write(USED + 2, used);
        pair.ring = SplitRing::new(&layout, &pair.memory).expect("a sound layout");
        pair.write(USED_OTHER + 2, used);
        pair.other.set_next_used(used);
        pair
    }

    fn write(&self, address: u64, value: u16) {
        self.memory.map().write_obj(value.to_le(), GuestAddress(address)).expect("guest memory");
    }

    fn read(&self, address: u64, bytes: u64) -> Vec<u8> {
        let mut found = vec![0; bytes as usize];
        self.memory.map().read_slice(&mut found, GuestAddress(address)).expect("guest memory");
        found
    }

    /// Writes descriptors from six bytes of the input each.
    fn write_descriptors(&self, values: &mut Values<'_>, table: u64, count: u64) {
        for index in 0..count {
            let (place, length, flags, next) = (values.u16(), values.u16(), values.u8(), values.u8());
            let flags = u16::from(flags) & (NEXT | WRITE | INDIRECT);
            let (address, length) = if flags & INDIRECT != 0 {
                (TABLES + 16 * (u64::from(place) % TABLE_ENTRIES), u32::from(length) % 0x400 / 4 * 4)
            } else {
                // Some are past the end of memory, some cross from one region into the other.
                (u64::from(place) * 4, u32::from(length) % 0x2000)
            };
            let next = u16::from(next) % (self.layout.size + 2);
            let raw = Descriptor::new(address, length, flags, next);
            self.memory.map().write_obj(raw, GuestAddress(table + 16 * index)).expect("guest memory");
        }
    }

    /// Makes chains available, takes them, gives some back. False if the ring is corrupt.
    fn round(&mut self, values: &mut Values<'_>) -> bool {
        let (count, flags, event) = (values.u8(), values.u8(), values.u8());
        // Near the used index: any other event is far from the chains that are given back.
        let event = self.other.next_used().wrapping_add(u16::from(event % 16)).wrapping_sub(8);
        let size = self.layout.size;
        let mut index = self.ring.next_available();
        for _ in 0..u16::from(count) % (size + 2) {
            let head = u16::from(values.u8()) % (size + u16::from(flags & 2 != 0));
            self.write(AVAILABLE + 4 + 2 * u64::from(index % size), head);
            index = index.wrapping_add(1);
        }
        self.write(AVAILABLE + 2, index);
        self.write(AVAILABLE, u16::from(flags & 1));
        self.write(AVAILABLE + 4 + 2 * u64::from(size), event);
        self.take() && self.give_back(values, flags & 1 != 0) && self.suppress()
    }

    /// Takes all available chains from both.
    fn take(&mut self) -> bool {
        let map = self.memory.map().clone();
        let theirs: Option<Vec<_>> = self.other.iter(&map).ok().map(Iterator::collect);
        let (waiting, theirs) = match (self.ring.available(), theirs) {
            (Ok(waiting), Some(theirs)) => (waiting, theirs),
            (ours, theirs) => {
                assert_eq!(ours.is_err(), theirs.is_none(), "an index that jumps");
                return false;
            }
        };
        assert_eq!(usize::from(waiting), theirs.len());
        let mut chain = Chain::default();
        for their in theirs {
            let head = their.head_index();
            if self.ring.pop(&self.memory, &mut chain).is_err() {
                assert!(head >= self.layout.size || self.in_flight.contains(&head), "head {head} is sound");
                return false;
            }
            assert_eq!(chain.head, head);
            self.in_flight.push(head);
            self.compare(&chain, &their.collect::<Vec<_>>());
        }
        assert_eq!(self.ring.next_available(), self.other.next_avail());
        true
    }

    /// A valid chain has the same bytes of guest memory in both; an invalid one has a reason.
    fn compare(&self, chain: &Chain, theirs: &[Descriptor]) {
        let slices = |writable: bool| -> Option<Vec<GuestSlice>> {
            let mut pieces = Vec::new();
            let wanted = theirs.iter().filter(|one| (one.flags() & WRITE != 0) == writable);
            for one in wanted {
                self.memory.translate(one.addr().raw_value(), one.len(), &mut pieces).ok()?;
            }
            Some(pieces)
        };
        let (readable, writable) = (slices(false), slices(true));
        let is_mixed = theirs.windows(2).any(|two| two[0].flags() & WRITE > two[1].flags() & WRITE);
        let is_open = theirs.last().is_none_or(|last| last.flags() & NEXT != 0);
        let is_malformed = is_mixed || is_open || self.has_bad_indirect(chain.head);
        match chain.fault {
            None => {
                assert!(!is_malformed, "{theirs:?}");
                assert_eq!(Some(places(&chain.readable)), readable.as_deref().map(places), "{theirs:?}");
                assert_eq!(Some(places(&chain.writable)), writable.as_deref().map(places), "{theirs:?}");
            }
            Some(Fault::Unreachable) => assert!(readable.is_none() || writable.is_none(), "{theirs:?}"),
            Some(Fault::Malformed) => {
                assert!(is_malformed || writable.is_none(), "head {}: {theirs:?}", chain.head);
            }
        }
    }

    /// Whether the chain names an indirect table where it must not: without negotiation, together with NEXT, or
    /// from inside another table.
    fn has_bad_indirect(&self, head: u16) -> bool {
        let (mut index, mut left) = (head, self.layout.size);
        while index < self.layout.size && left > 0 {
            let at = GuestAddress(DESCRIPTORS + 16 * u64::from(index));
            let descriptor: Descriptor = self.memory.map().read_obj(at).expect("guest memory");
            if descriptor.flags() & INDIRECT != 0 {
                return !self.layout.indirect || descriptor.flags() & NEXT != 0;
            }
            (index, left) = (descriptor.next(), left - 1);
            if descriptor.flags() & NEXT == 0 {
                break;
            }
        }
        false
    }

    /// Gives some chains back to both, in an order from the input.
    fn give_back(&mut self, values: &mut Values<'_>, no_interrupt: bool) -> bool {
        let map = self.memory.map().clone();
        let mut given = Vec::new();
        for _ in 0..usize::from(values.u8()) % (self.in_flight.len() + 1) {
            let at = usize::from(values.u8()) % self.in_flight.len();
            given.push(Used { head: self.in_flight.swap_remove(at), written: u32::from(values.u16()) });
        }
        self.ring.push_used(&given).expect("guest memory");
        for used in &given {
            self.other.add_used(&map, used.head, used.written).expect("guest memory");
        }
        // `suppress` compares the flags before this range and the event index behind it.
        let (from, bytes) = (2, 2 + 8 * u64::from(self.layout.size));
        assert_eq!(self.read(USED + from, bytes), self.read(USED_OTHER + from, bytes), "{given:?}");
        let ours = self.ring.needs_notification().expect("guest memory");
        let theirs = self.other.needs_notification(&map).expect("guest memory");
        // Virtio-queue does not check the flag.
        let expected = if self.layout.event_index { theirs } else { !no_interrupt };
        assert_eq!(ours, expected, "a notification after {given:?}");
        true
    }

    /// Turns the guest's kicks off and on again.
    fn suppress(&mut self) -> bool {
        let map = self.memory.map().clone();
        let whole = 4 + 8 * u64::from(self.layout.size) + 2;
        self.ring.disable_kicks().expect("guest memory");
        self.other.disable_notification(&map).expect("guest memory");
        assert_eq!(self.read(USED, whole), self.read(USED_OTHER, whole), "kicks off");
        let ours = self.ring.enable_kicks().expect("a sound index");
        let theirs = self.other.enable_notification(&map).expect("guest memory");
        assert_eq!(ours, theirs);
        assert_eq!(self.read(USED, whole), self.read(USED_OTHER, whole), "kicks on");
        true
    }
}

/// Locations of slices in this process; adjacent slices are joined.
pub(super) fn places(slices: &[GuestSlice]) -> Vec<(usize, usize)> {
    let mut places: Vec<(usize, usize)> = Vec::new();
    for slice in slices.iter().filter(|slice| !slice.is_empty()) {
        let start = slice.ptr_guard().as_ptr() as usize;
        match places.last_mut() {
            Some((last, length)) if *last + *length == start => *length += slice.len(),
            _ => places.push((start, slice.len())),
        }
    }
    places
}

/// A queue of virtio-queue with the same layout, but for the used ring.
trait FromLayout {
    fn new_from(layout: &RingLayout) -> Self;
}

impl FromLayout for Queue {
    fn new_from(layout: &RingLayout) -> Self {
        let mut queue = Queue::new(layout.size).expect("a power of two");
        queue.set_size(layout.size);
        queue.set_desc_table_address(Some(layout.descriptors as u32), Some(0));
        queue.set_avail_ring_address(Some(layout.available as u32), Some(0));
        queue.set_used_ring_address(Some(USED_OTHER as u32), Some(0));
        queue.set_next_avail(layout.base as u16);
        queue.set_event_idx(layout.event_index);
        queue.set_ready(true);
        queue
    }
}
