//! The driver's side of a packed ring (virtio 1.2, 2.8). Its queue has the same addresses as one with a split ring: the
//! descriptor ring, the driver's event suppression as `available`, and the device's as `used`.

use std::sync::atomic::{Ordering, fence};

use super::guest::{Driver, F_EVENT_IDX, Guest, NEXT};

const AVAILABLE: u16 = 1 << 7;
const USED: u16 = 1 << 15;
const DISABLE: u16 = 1;
const DESCRIPTOR: u16 = 2;

/// A place in the ring, and the wrap counter there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    pub index: u16,
    pub wrap: bool,
}

impl Place {
    pub const START: Place = Place { index: 0, wrap: true };

    /// The lower half of a base in vhost-user's messages.
    pub fn bits(self) -> u16 {
        self.index | u16::from(self.wrap) << 15
    }

    pub fn from_bits(bits: u16) -> Self {
        Place { index: bits & 0x7fff, wrap: bits & 0x8000 != 0 }
    }

    fn after(self, descriptors: u16, size: u16) -> Self {
        let index = self.index + descriptors;
        if index < size { Place { index, ..self } } else { Place { index: index - size, wrap: !self.wrap } }
    }

    /// Descriptors from here to another place, within two laps.
    fn distance(self, other: Place, size: u16) -> u32 {
        let lap = u32::from(size);
        let linear = |place: Place| u32::from(place.index) + if place.wrap { 0 } else { lap };
        (linear(other) + 2 * lap - linear(self)) % (2 * lap)
    }
}

/// What the driver of a packed ring remembers.
pub struct PackedSide {
    /// The next descriptor to make available, and the next to look at.
    pub next: Place,
    pub seen: Place,
    next_id: u16,
    /// By buffer id: the parts of a chain that was made, and is not back yet. Address, length and flags of each.
    chains: Vec<Option<Vec<(u64, u32, u16)>>>,
}

impl PackedSide {
    pub fn new(size: u16) -> Self {
        let chains = vec![None; usize::from(size)];
        PackedSide { next: Place::START, seen: Place::START, next_id: size / 2, chains }
    }
}

fn side(driver: &mut Driver) -> &mut PackedSide {
    driver.packed.as_mut().expect("a packed ring")
}

impl Guest {
    pub fn packed(&self, queue: usize) -> Option<&PackedSide> {
        self.queues[queue].packed.as_ref()
    }

    /// Keeps the parts of a chain until it is made available. Returns its buffer id.
    pub(super) fn packed_chain(&mut self, queue: usize, parts: &[(u64, u32, u16)]) -> u16 {
        let size = self.queues[queue].size;
        let side = side(&mut self.queues[queue]);
        let ids = (0..size).map(|step| (side.next_id + step) % size);
        let id =
            ids.into_iter().find(|id| side.chains[usize::from(*id)].is_none()).expect("a free buffer id");
        // Not in the order of the ring.
        side.next_id = (id + size - 1) % size;
        side.chains[usize::from(id)] = Some(parts.to_vec());
        id
    }

    pub fn packed_descriptor(&self, at: u64, (address, length, _): (u64, u32, u16), id: u16, flags: u16) {
        self.put_at(at, &address.to_le_bytes());
        self.put_at(at + 8, &length.to_le_bytes());
        self.write_u16(at + 12, id);
        self.write_u16(at + 14, flags);
    }

    /// Puts a chain into the ring, its first descriptor last.
    pub(super) fn packed_make_available(&mut self, queue: usize, id: u16) {
        let (table, size) = (self.queues[queue].descriptors, self.queues[queue].size);
        let side = side(&mut self.queues[queue]);
        let parts = side.chains[usize::from(id)].clone().expect("a chain with this id");
        let next = side.next;
        side.next = next.after(parts.len() as u16, size);
        for (number, part) in parts.iter().enumerate().rev() {
            let at = next.after(number as u16, size);
            let more = if number + 1 < parts.len() { NEXT } else { 0 };
            let available = if at.wrap { AVAILABLE } else { USED };
            let flags = part.2 | more | available;
            self.packed_descriptor(table + 16 * u64::from(at.index), *part, id, flags);
        }
        let next = self.queues[queue].packed.as_ref().map(|side| side.next.bits());
        self.queues[queue].next_available = next.expect("a packed ring");
        fence(Ordering::SeqCst);
    }

    /// The buffer id and the length at a place, if the device handed something back there.
    fn used_at(&self, queue: usize, place: Place) -> Option<(u16, u32)> {
        let at = self.queues[queue].descriptors + 16 * u64::from(place.index);
        let flags = self.read_u16(at + 14);
        let wanted = if place.wrap { AVAILABLE | USED } else { 0 };
        let length = || u32::from_le_bytes(self.get(at + 8, 4).try_into().expect("four bytes"));
        (flags & (AVAILABLE | USED) == wanted).then(|| (self.read_u16(at + 12), length()))
    }

    /// Descriptors of the chain with a buffer id.
    fn descriptors_of(&self, queue: usize, id: u16) -> u16 {
        let side = self.packed(queue).expect("a packed ring");
        let chain = side.chains[usize::from(id)].as_ref();
        chain.expect("handed back twice, or never made available").len() as u16
    }

    /// How many chains the device has handed back.
    pub(super) fn packed_used(&self, queue: usize) -> u16 {
        let (mut count, size) = (self.queues[queue].seen_used, self.queues[queue].size);
        let mut place = self.packed(queue).expect("a packed ring").seen;
        while let Some((id, _)) = self.used_at(queue, place) {
            place = place.after(self.descriptors_of(queue, id), size);
            count = count.wrapping_add(1);
        }
        count
    }

    /// Takes the next chain that was handed back, which is there: buffer id and length.
    pub(super) fn packed_take(&mut self, queue: usize) -> (u32, u32) {
        let (place, size) = (self.packed(queue).expect("a packed ring").seen, self.queues[queue].size);
        let (id, length) = self.used_at(queue, place).expect("it is there");
        let descriptors = self.descriptors_of(queue, id);
        let driver = &mut self.queues[queue];
        driver.seen_used = driver.seen_used.wrapping_add(1);
        let side = side(driver);
        side.seen = place.after(descriptors, size);
        side.chains[usize::from(id)] = None;
        (u32::from(id), length)
    }

    /// Whether the device wants a kick for what was made available from a place on (virtio 1.2, 2.8.10).
    pub(super) fn packed_wants_kick(&self, queue: usize, before: u16) -> bool {
        let driver = &self.queues[queue];
        let flags = self.read_u16(driver.used + 2) & 3;
        if flags != DESCRIPTOR || self.features & F_EVENT_IDX == 0 {
            return flags != DISABLE;
        }
        let (before, event) = (Place::from_bits(before), Place::from_bits(self.read_u16(driver.used)));
        let next = self.packed(queue).expect("a packed ring").next;
        before.distance(event, driver.size) < before.distance(next, driver.size)
    }

    /// Puts the ring and the driver back to their first state.
    pub(super) fn packed_clear(&mut self, queue: usize) {
        let driver = &mut self.queues[queue];
        driver.packed = Some(PackedSide::new(driver.size));
        (driver.next_available, driver.seen_used) = (Place::START.bits(), 0);
        let (table, bytes) = (driver.descriptors, 16 * usize::from(driver.size));
        self.put_at(table, &vec![0; bytes]);
    }
}
