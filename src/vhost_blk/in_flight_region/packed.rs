//! The record of one packed queue in the in-flight region: which chains were taken and not yet handed back, with their
//! descriptors, as the ring may hold others by then.
//!
//! A worker records each chain before the disk gets it, and each batch that it hands back around the store that shows it
//! to the driver. A worker may die between any two stores. Its successor completes or undoes the batch that was being
//! handed back, and learns which chains it must do again, in which order, and where in the ring it goes on.
//! docs/concurrency.md, "The in-flight region", has the order of the stores.

use super::cells::{Packed, PackedEntry, PackedHeader, UsedPositions};
use super::defects::{AreaError, VERSION, check_header, put_in_order};
use super::layout::{Layout, RingKind};
use super::region::{QueueArea, Region};
use crate::ring::{PackedDescriptor, PackedRing, Position, RecordedChain};

/// A queue's area, brought in order, with the ring at its place.
#[derive(Debug)]
pub(crate) struct Recovered {
    pub tracker: PackedTracker,
    /// The chains to do again, in the order in which they were taken. They have different buffer ids, below the size of
    /// the ring, and together at most as many descriptors as the ring. They stay recorded.
    pub in_flight: Vec<RecordedChain>,
}

/// Keeps the record of one queue. One worker has it, and stores to the area from one thread only. Nothing is read from the
/// area after the start.
#[derive(Debug)]
pub struct PackedTracker {
    area: QueueArea<Packed>,
    /// Descriptors of the ring.
    size: u16,
    /// The counter of the next chain.
    counter: u64,
    /// Our copies: of `free_head`, of each entry's `next`, and of the used positions without and with the listed chains.
    free: u16,
    next: Vec<u16>,
    old_used: Position,
    used: Position,
    /// The entries of the chain with each buffer id. Those of chains that are not in flight mean nothing.
    places: Vec<Place>,
    /// Chains that are in the ring again, in any order. They stay recorded until the area is closed.
    put_back: Vec<u16>,
}

/// The entries of a chain.
#[derive(Clone, Copy, Debug, Default)]
struct Place {
    first: u16,
    last: u16,
    num: u16,
}

impl PackedTracker {
    /// The record of a ring of `size` descriptors, unused so far, in a region of its own.
    ///
    /// # Panics
    /// When the host refuses the region.
    pub fn alone(size: u16) -> Self {
        let layout = Layout { kind: RingKind::Packed, queues: 1, queue_size: size };
        let region = Region::alone(layout).expect("a region");
        Self::begin_anew(region.queue(0).expect("the only queue"), size, Position::START)
    }

    /// Whether a ring was served with this area before, at whatever time.
    pub(crate) fn was_used(area: &QueueArea<Packed>) -> bool {
        // Stays when the area is given up.
        area.header().desc_num.load() != 0
    }

    /// Takes an area over from the last worker, which may have died, and puts the ring at its place. If the area is empty,
    /// the ring stays where it is. May itself die at any store and be done again.
    ///
    /// # Errors
    /// When the area cannot be as it is, or the ring is not accessible, or the area is empty and the ring has descriptors in
    /// flight. Then nothing was changed.
    pub(crate) fn recover(area: QueueArea<Packed>, ring: &mut PackedRing) -> Result<Recovered, AreaError> {
        let (header, size) = (area.header(), ring.size());
        if area.entries().len() < usize::from(size) {
            return Err(AreaError::Small { entries: area.entries().len(), size });
        }
        let version = header.version.load();
        if version == 0 {
            let used = ring.next_used();
            // A successor takes as many descriptors as are recorded, and would take those in between a second time.
            let descriptors = used.distance(ring.next_available(), size);
            if descriptors > 0 {
                return Err(AreaError::Unrecorded { descriptors });
            }
            let tracker = Self::begin_anew(area, size, used);
            return Ok(Recovered { tracker, in_flight: Vec::new() });
        }
        check_header(version, header.features.load(), header.desc_num.load(), area.entries().len())?;
        let found = Found::read(&area, ring)?;
        ring.resume(found.used, found.descriptors)?;
        // Only now is anything stored to the area. The used positions last: until they are there, a successor does the
        // same again.
        for (entry, is_free) in area.entries().iter().zip(&found.is_free) {
            if *is_free && entry.inflight.load() != 0 {
                entry.inflight.store(0);
            }
        }
        header.old_free_head.store(found.free);
        header.free_head.store(found.free);
        header.used.store(used_word(found.used, found.used));
        let Found { free, used, next, places, chains, counter, .. } = found;
        Ok(Recovered {
            tracker: PackedTracker {
                area,
                size,
                counter,
                free,
                next,
                old_used: used,
                used,
                places,
                put_back: Vec::new(),
            },
            in_flight: chains,
        })
    }

    fn begin_anew(area: QueueArea<Packed>, size: u16, used: Position) -> Self {
        let header = area.header();
        // A region is made for at most 65,535 descriptors.
        let entries = area.entries().len() as u16;
        // The version is 0 until everything else is in order. The list ends with an entry that does not exist.
        header.version.store(0);
        let next: Vec<u16> = (1..=entries).collect();
        for (entry, next) in area.entries().iter().zip(&next) {
            entry.inflight.store(0);
            entry.next.store(*next);
        }
        header.features.store(0);
        header.desc_num.store(entries);
        header.free_head.store(0);
        header.old_free_head.store(0);
        header.used.store(used_word(used, used));
        header.version.store(VERSION);
        let places = vec![Place::default(); usize::from(size)];
        PackedTracker {
            area,
            size,
            counter: 0,
            free: 0,
            next,
            old_used: used,
            used,
            places,
            put_back: Vec::new(),
        }
    }

    /// Records a chain that was taken, with its descriptors. Before the disk gets it, and before the next chain is taken.
    ///
    /// # Panics
    /// When the chain has no descriptors, more than the ring has left, or a buffer id that the ring does not have.
    #[inline]
    pub fn begin(&mut self, id: u16, chain: &[PackedDescriptor]) {
        let entries = self.area.entries();
        let (first, mut last, mut free) = (self.free, self.free, self.free);
        for descriptor in chain {
            let entry = &entries[usize::from(free)];
            entry.addr.store(descriptor.address);
            entry.len.store(descriptor.length);
            entry.flags.store(descriptor.flags);
            entry.id.store(descriptor.id);
            (last, free) = (free, self.next[usize::from(free)]);
        }
        let num = u16::try_from(chain.len()).expect("a ring has at most 32,768 descriptors");
        let head = &entries[usize::from(first)];
        head.last.store(last);
        head.num.store(num);
        head.counter.store(self.counter);
        head.inflight.store(1);
        let header = self.area.header();
        header.free_head.store(free);
        // From now on the chain counts.
        header.old_free_head.store(free);
        self.places[usize::from(id)] = Place { first, last, num };
        self.counter += 1;
        self.free = free;
    }

    /// Lists the chains that are about to be handed back. Before the store that shows them to the driver.
    #[inline]
    pub fn list(&mut self, ids: impl Iterator<Item = u16>) {
        for id in ids {
            let Place { num, .. } = self.put_on_free_list(id);
            self.used = self.used.advance(num, self.size);
        }
        let header = self.area.header();
        header.free_head.store(self.free);
        header.used.store(used_word(self.old_used, self.used));
    }

    /// Records that the listed chains were handed back. After the store that shows them to the driver, and before the next
    /// chain is taken.
    #[inline]
    pub fn clear(&mut self, ids: impl Iterator<Item = u16>) {
        let entries = self.area.entries();
        for id in ids {
            entries[usize::from(self.places[usize::from(id)].first)].inflight.store(0);
        }
        let header = self.area.header();
        // A successor that finds the used positions apart does this again, so they come last.
        header.old_free_head.store(self.free);
        header.used.store(used_word(self.used, self.used));
        self.old_used = self.used;
    }

    /// Notes that a chain is in the ring again. No more are taken, and at the end every chain taken after it is in the ring
    /// again too.
    pub(crate) fn put_back(&mut self, id: u16) {
        self.put_back.push(id);
    }

    /// Leaves the area with nothing in flight, and its position in the ring. Only when every chain was handed back, or is
    /// in the ring again.
    pub(crate) fn close(mut self) {
        // They may come in any order, so they leave the record all at once. Until then it has each of them: no chain is
        // read past its last entry.
        let ids = std::mem::take(&mut self.put_back);
        if ids.is_empty() {
            return;
        }
        let firsts: Vec<u16> = ids.into_iter().map(|id| self.put_on_free_list(id).first).collect();
        let header = self.area.header();
        header.free_head.store(self.free);
        // From now on none of them counts, whatever its `inflight`.
        header.old_free_head.store(self.free);
        for first in firsts {
            self.area.entries()[usize::from(first)].inflight.store(0);
        }
    }

    /// Links the entries of a chain before the free ones. The area's own head of that list stays.
    #[inline]
    fn put_on_free_list(&mut self, id: u16) -> Place {
        let place = self.places[usize::from(id)];
        self.area.entries()[usize::from(place.last)].next.store(self.free);
        self.next[usize::from(place.last)] = self.free;
        self.free = place.first;
        place
    }
}

/// The used positions without and with the batch that is being handed back.
#[inline]
fn used_word(old: Position, new: Position) -> u64 {
    let (wrap, old_wrap) = (u8::from(new.wrap()), u8::from(old.wrap()));
    UsedPositions { index: new.index(), old_index: old.index(), wrap, old_wrap }.word()
}

/// What an area says, checked.
struct Found {
    /// Where the next chain is given back.
    used: Position,
    /// The first free entry, the entries that are free, and the entry after each.
    free: u16,
    is_free: Vec<bool>,
    next: Vec<u16>,
    /// The chains in flight in order, the entries of each by its buffer id, and their descriptors together.
    chains: Vec<RecordedChain>,
    places: Vec<Place>,
    descriptors: u16,
    /// The counter of the next chain.
    counter: u64,
}

impl Found {
    fn read(area: &QueueArea<Packed>, ring: &PackedRing) -> Result<Self, AreaError> {
        let (free, used) = last_batch(area.header(), ring)?;
        // Read once, as the frontend may change it at any time.
        let next: Vec<u16> = area.entries().iter().map(|entry| entry.next.load()).collect();
        let is_free = free_entries(free, &next)?;
        let order = heads_in_order(area.entries(), &is_free)?;
        let counter = order.last().map_or(0, |(counter, _)| counter + 1);
        let mut found = Found {
            used,
            free,
            next,
            chains: Vec::with_capacity(order.len()),
            places: vec![Place::default(); usize::from(ring.size())],
            descriptors: 0,
            counter,
            is_free,
        };
        let mut is_taken = found.is_free.clone();
        for (_, first) in order {
            found.read_chain(area.entries(), first, &mut is_taken, ring.size())?;
        }
        let lost = is_taken.iter().filter(|is_taken| !**is_taken).count();
        if lost > 0 { Err(AreaError::Lost { lost }) } else { Ok(found) }
    }

    /// Reads the chain that begins at an entry. All its entries are still to be taken.
    fn read_chain(
        &mut self,
        entries: &[PackedEntry],
        first: u16,
        is_taken: &mut [bool],
        size: u16,
    ) -> Result<(), AreaError> {
        let (num, last) = (entries[usize::from(first)].num.load(), entries[usize::from(first)].last.load());
        let descriptors = usize::from(self.descriptors) + usize::from(num);
        if descriptors > usize::from(size) {
            return Err(AreaError::Descriptors { descriptors, size });
        }
        let (mut at, mut end) = (first, first);
        let mut chain = Vec::with_capacity(usize::from(num));
        for _ in 0..num {
            match is_taken.get_mut(usize::from(at)) {
                Some(is_taken) if !*is_taken => *is_taken = true,
                _ => return Err(AreaError::Chain { first, entry: at }),
            }
            let entry = &entries[usize::from(at)];
            chain.push(PackedDescriptor {
                address: entry.addr.load(),
                length: entry.len.load(),
                id: entry.id.load(),
                flags: entry.flags.load(),
            });
            (end, at) = (at, self.next[usize::from(at)]);
        }
        let Some(final_one) = chain.last().filter(|_| end == last) else {
            return Err(AreaError::Length { first, num });
        };
        let id = final_one.id;
        match self.places.get_mut(usize::from(id)) {
            Some(place) if place.num == 0 => *place = Place { first, last, num },
            _ => return Err(AreaError::Id { first, id }),
        }
        // Not more than the size.
        self.descriptors = descriptors as u16;
        self.chains.push(RecordedChain(chain));
        Ok(())
    }
}

/// The head of the free entries, and where the next chain is given back. If a batch was being handed back, the ring says
/// whether the driver could see it: then it counts, else it does not.
fn last_batch(header: &PackedHeader, ring: &PackedRing) -> Result<(u16, Position), AreaError> {
    let word = UsedPositions::from_word(header.used.load());
    let size = ring.size();
    let wraps = u16::from(word.wrap) << 8 | u16::from(word.old_wrap);
    let wrong =
        AreaError::Positions { used: u32::from(word.old_index) << 16 | u32::from(word.index), wraps, size };
    if word.index >= size || word.old_index >= size || word.wrap > 1 || word.old_wrap > 1 {
        return Err(wrong);
    }
    let (old, new) =
        (Position::new(word.old_index, word.old_wrap == 1), Position::new(word.index, word.wrap == 1));
    if old.distance(new, size) > u32::from(size) {
        return Err(wrong);
    }
    if old != new && !ring.is_available_at(old)? {
        Ok((header.free_head.load(), new))
    } else {
        Ok((header.old_free_head.load(), old))
    }
}

/// True at each entry of the list of free ones. It ends with an entry that does not exist.
fn free_entries(first: u16, next: &[u16]) -> Result<Vec<bool>, AreaError> {
    let mut is_free = vec![false; next.len()];
    let mut entry = first;
    while usize::from(entry) != next.len() {
        match is_free.get_mut(usize::from(entry)) {
            Some(seen) if !*seen => *seen = true,
            _ => return Err(AreaError::Free { entry }),
        }
        entry = next[usize::from(entry)];
    }
    Ok(is_free)
}

/// Counters and first entries of the chains in flight, in the order in which they were taken. What a free entry says was
/// not complete, or no longer counts.
fn heads_in_order(entries: &[PackedEntry], is_free: &[bool]) -> Result<Vec<(u64, u16)>, AreaError> {
    let mut found = Vec::new();
    for ((head, entry), is_free) in (0..).zip(entries).zip(is_free) {
        match entry.inflight.load() {
            0 => {}
            1 if *is_free => {}
            1 => found.push((entry.counter.load(), head)),
            state => return Err(AreaError::State { head, state }),
        }
    }
    put_in_order(&mut found)?;
    Ok(found)
}
