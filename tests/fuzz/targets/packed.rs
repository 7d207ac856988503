//! The packed ring compared with a driver written from virtio 1.2, 2.8: the device must take the chains that the driver
//! sent, hand them back where the driver looks, and notify when the driver asks for it.
//!
//! An input may also overwrite the ring. From then on nothing is compared: the ring is refused, or it goes on.

use std::collections::VecDeque;
use std::sync::Arc;

use vhost_blk::internals::{
    Chain, Fault, GuestMemory, GuestSlice, MemoryTable, PackedRing, PackedTracker, Position, RegionInfo,
    RingLayout, Used,
};
use vm_memory::{Bytes, GuestAddress};

use super::ring::places;
use super::values::Values;

/// Two adjacent regions, so that a range may cross from one into the other.
const REGION: u64 = 0x1_0000;
const RING: u64 = 0x1000;
const DRIVER_EVENT: u64 = 0x2000;
const DEVICE_EVENT: u64 = 0x2010;
const TABLES: u64 = 0x3000;
/// Descriptors that all indirect tables together may hold.
const TABLE_ENTRIES: u64 = 48;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const AVAILABLE: u16 = 1 << 7;
const USED: u16 = 1 << 15;
const DISABLE: u16 = 1;
const BY_DESCRIPTOR: u16 = 2;

/// A descriptor as the driver means it.
#[derive(Clone, Copy, Debug)]
struct Part {
    address: u64,
    length: u32,
    flags: u16,
}

/// A chain that the driver sent: its buffer id and its descriptors in the ring.
#[derive(Clone, Debug)]
struct Sent {
    id: u16,
    parts: Vec<Part>,
}

/// A ring, its record, and its driver.
struct Pair {
    memory: Arc<GuestMemory>,
    layout: RingLayout,
    ring: PackedRing,
    tracker: PackedTracker,
    /// Where the driver goes on, in both directions, and the descriptors that it may use.
    next: Position,
    seen: Position,
    free: u16,
    waiting: VecDeque<Sent>,
    taken: Vec<Sent>,
    /// The ring was overwritten.
    wild: bool,
}

/// The input: the layout, the entries of indirect tables, then rounds.
pub fn judge(input: &[u8]) {
    let mut values = Values(input);
    let mut pair = Pair::new(&mut values);
    for entry in 0..TABLE_ENTRIES {
        let part = pair.part(&mut values);
        pair.write(TABLES + 16 * entry, part, u16::from(values.u8()), part.flags);
    }
    for _ in 0..8 {
        if values.is_empty() || !pair.round(&mut values) {
            break;
        }
    }
}

impl Pair {
    fn new(values: &mut Values<'_>) -> Self {
        let (how, start) = (values.u8(), values.u16());
        let size = 1 + u16::from(how & 31);
        let start = Position::new(start % size, start & 0x8000 != 0);
        let layout = RingLayout {
            size,
            descriptors: RING,
            available: DRIVER_EVENT,
            used: DEVICE_EVENT,
            base: u32::from(start.bits()) | u32::from(start.bits()) << 16,
            event_index: how & 32 != 0,
            indirect: how & 64 == 0,
        };
        let regions = [0, REGION].map(|guest| RegionInfo { guest, size: REGION, user: guest, offset: 0 });
        let files = regions.iter().map(|_| {
            let file = tempfile::tempfile().expect("a temporary file");
            file.set_len(REGION).expect("its length can be set");
            file
        });
        let memory =
            MemoryTable::new().with_regions(&regions, files.collect()).expect("sound regions").memory();
        Self {
            ring: PackedRing::new(&layout, &memory).expect("a sound layout"),
            tracker: PackedTracker::alone(size),
            memory,
            layout,
            next: start,
            seen: start,
            free: size,
            waiting: VecDeque::new(),
            taken: Vec::new(),
            wild: false,
        }
    }

    fn put<T: vm_memory::ByteValued>(&self, address: u64, value: T) {
        self.memory.map().write_obj(value, GuestAddress(address)).expect("guest memory");
    }

    fn read<T: vm_memory::ByteValued>(&self, address: u64) -> T {
        self.memory.map().read_obj(GuestAddress(address)).expect("guest memory")
    }

    fn write(&self, at: u64, part: Part, id: u16, flags: u16) {
        self.put(at, part.address.to_le());
        self.put(at + 8, part.length.to_le());
        self.put(at + 12, id.to_le());
        self.put(at + 14, flags.to_le());
    }

    /// A descriptor from five bytes of the input.
    fn part(&self, values: &mut Values<'_>) -> Part {
        let (place, length, flags) = (values.u16(), values.u16(), u16::from(values.u8()));
        let flags = flags & (WRITE | INDIRECT);
        if flags & INDIRECT != 0 {
            let address = TABLES + 16 * (u64::from(place) % TABLE_ENTRIES);
            Part { address, length: u32::from(length) % 0x400 / 4 * 4, flags }
        } else {
            // Some are past the end of memory, some cross from one region into the other.
            Part { address: u64::from(place) * 4, length: u32::from(length) % 0x2000, flags }
        }
    }

    /// Makes chains available, takes some, gives some back. False if the ring is corrupt.
    fn round(&mut self, values: &mut Values<'_>) -> bool {
        let (chains, how) = (values.u8() % 8, values.u8());
        (0..chains).for_each(|_| self.send(values));
        if how & 0xe0 == 0xe0 {
            self.wild = true;
            let at = RING + u64::from(values.u16()) % (16 * u64::from(self.layout.size));
            self.put(at, values.u8());
        }
        self.want(values, how);
        self.take(usize::from(how & 15)) && self.give_back(values) && self.suppress()
    }

    /// The driver makes a chain available, its first descriptor last, if it has room for it.
    fn send(&mut self, values: &mut Values<'_>) {
        let (count, id) = (1 + u16::from(values.u8() & 3), u16::from(values.u8()) % self.layout.size);
        let parts: Vec<Part> = (0..count).map(|_| self.part(values)).collect();
        let is_known = |sent: &Sent| sent.id == id;
        if count > self.free || self.waiting.iter().any(is_known) || self.taken.iter().any(is_known) {
            return;
        }
        for (number, part) in (0..count).zip(&parts).rev() {
            let at = self.next.advance(number, self.layout.size);
            let more = if number + 1 < count { NEXT } else { 0 };
            let available = if at.wrap() { AVAILABLE } else { USED };
            self.write(RING + 16 * u64::from(at.index()), *part, id, part.flags | more | available);
        }
        self.next = self.next.advance(count, self.layout.size);
        self.free -= count;
        self.waiting.push_back(Sent { id, parts });
    }

    /// The driver says when it wants a notification.
    fn want(&self, values: &mut Values<'_>, how: u8) {
        let event = self.seen.advance(u16::from(values.u8()) % self.layout.size, self.layout.size).bits();
        let event = if how & 16 != 0 { event ^ 0x8000 } else { event };
        self.put(DRIVER_EVENT, event.to_le());
        self.put(DRIVER_EVENT + 2, u16::from(values.u8() & 3).to_le());
    }

    /// The device takes at most so many chains.
    fn take(&mut self, most: usize) -> bool {
        let waiting = match self.ring.available() {
            Ok(waiting) => usize::from(waiting),
            Err(error) => {
                assert!(self.wild, "{error}");
                return false;
            }
        };
        assert!(self.wild || waiting == self.waiting.len(), "{waiting}, {:?}", self.waiting);
        let mut chain = Chain::default();
        for _ in 0..waiting.min(most) {
            if let Err(error) = self.ring.pop(&self.memory, &mut chain) {
                assert!(self.wild, "{error}");
                return false;
            }
            self.tracker.begin(chain.head, self.ring.last_chain());
            let descriptors = self.ring.last_chain().len();
            let sent = self.waiting.pop_front().filter(|_| !self.wild);
            if let Some(sent) = sent {
                assert_eq!((chain.head, descriptors), (sent.id, sent.parts.len()));
                self.compare(&chain, &sent);
                self.taken.push(sent);
            } else {
                let part = Part { address: 0, length: 0, flags: 0 };
                self.taken.push(Sent { id: chain.head, parts: vec![part; descriptors] });
            }
        }
        true
    }

    /// The parts of a chain, those of its indirect table in its place; `None` if it has a table where it must not, or none
    /// that can be.
    fn flat(&self, sent: &Sent) -> Option<Vec<Part>> {
        if sent.parts.iter().all(|part| part.flags & INDIRECT == 0) {
            return Some(sent.parts.clone());
        }
        let [only] = sent.parts[..] else { return None };
        let is_table = only.length > 0 && only.length % 16 == 0 && self.layout.indirect;
        let entries =
            is_table.then(|| (0..u64::from(only.length / 16)).map(|entry| only.address + 16 * entry))?;
        let part = |at: u64| Part {
            address: u64::from_le(self.read(at)),
            length: u32::from_le(self.read(at + 8)),
            flags: u16::from_le(self.read(at + 14)),
        };
        Some(entries.map(part).collect())
    }

    /// A valid chain has the bytes of guest memory that the driver meant; an invalid one has a reason.
    fn compare(&self, chain: &Chain, sent: &Sent) {
        let parts = self.flat(sent);
        let all = parts.as_deref().unwrap_or_default();
        let slices = |writable: bool| -> Option<Vec<GuestSlice>> {
            let mut pieces = Vec::new();
            for part in all.iter().filter(|part| (part.flags & WRITE != 0) == writable) {
                self.memory.translate(part.address, part.length, &mut pieces).ok()?;
            }
            Some(pieces)
        };
        let (readable, writable) = (slices(false), slices(true));
        let is_mixed = all.windows(2).any(|two| two[0].flags & WRITE > two[1].flags & WRITE);
        let is_malformed = parts.is_none() || is_mixed;
        match chain.fault {
            None => {
                assert!(!is_malformed, "{sent:?}");
                assert_eq!(Some(places(&chain.readable)), readable.as_deref().map(places), "{sent:?}");
                assert_eq!(Some(places(&chain.writable)), writable.as_deref().map(places), "{sent:?}");
            }
            Some(Fault::Unreachable) => assert!(readable.is_none() || writable.is_none(), "{sent:?}"),
            Some(Fault::Malformed) => assert!(is_malformed || writable.is_none(), "{sent:?}"),
        }
    }

    /// Gives some chains back, in an order from the input. The driver finds them in that order.
    fn give_back(&mut self, values: &mut Values<'_>) -> bool {
        let mut given = Vec::new();
        for _ in 0..usize::from(values.u8()) % (self.taken.len() + 1) {
            let at = usize::from(values.u8()) % self.taken.len();
            given.push((self.taken.swap_remove(at), u32::from(values.u16())));
        }
        let used: Vec<Used> =
            given.iter().map(|(sent, written)| Used { head: sent.id, written: *written }).collect();
        let before = self.ring.next_used();
        self.tracker.list(used.iter().map(|used| used.head));
        self.ring.push_used(&used).expect("guest memory");
        self.tracker.clear(used.iter().map(|used| used.head));
        for (sent, written) in given {
            let at = RING + 16 * u64::from(self.seen.index());
            let (length, id, flags): (u32, u16, u16) =
                (self.read(at + 8), self.read(at + 12), self.read(at + 14));
            let wrap = if self.seen.wrap() { AVAILABLE | USED } else { 0 };
            let expected = wrap | if written > 0 { WRITE } else { 0 };
            let found = (u16::from_le(id), u32::from_le(length), u16::from_le(flags));
            assert_eq!(found, (sent.id, written, expected));
            let count = sent.parts.len() as u16;
            self.seen = self.seen.advance(count, self.layout.size);
            self.free += count;
        }
        assert_eq!(self.ring.next_used(), self.seen);
        let wants = self.wants_notification(before);
        assert_eq!(self.ring.needs_notification().expect("guest memory"), wants, "after {used:?}");
        true
    }

    /// Whether the driver asked for a notification about what was given back since a position: by a look at each one.
    fn wants_notification(&self, before: Position) -> bool {
        let flags = u16::from_le(self.read(DRIVER_EVENT + 2));
        if flags != BY_DESCRIPTOR || !self.layout.event_index {
            return flags != DISABLE;
        }
        let event = Position::from_bits(u16::from_le(self.read(DRIVER_EVENT)));
        let mut passed = Vec::new();
        let mut at = before;
        while at != self.seen {
            passed.push(at);
            at = at.advance(1, self.layout.size);
        }
        passed.contains(&event)
    }

    /// Turns the guest's kicks off and on again.
    fn suppress(&mut self) -> bool {
        self.ring.disable_kicks().expect("guest memory");
        assert_eq!(u16::from_le(self.read(DEVICE_EVENT + 2)), DISABLE);
        match self.ring.enable_kicks() {
            Ok(some) => assert!(self.wild || some != self.waiting.is_empty()),
            Err(error) => {
                assert!(self.wild, "{error}");
                return false;
            }
        }
        let wanted = if self.layout.event_index { BY_DESCRIPTOR } else { 0 };
        assert_eq!(u16::from_le(self.read(DEVICE_EVENT + 2)), wanted);
        if self.layout.event_index {
            let place = u16::from_le(self.read(DEVICE_EVENT));
            assert_eq!(place, self.ring.next_available().bits());
        }
        true
    }
}
